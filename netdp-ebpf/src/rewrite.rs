//! Rewriting a packet in place, all checksums included.
//!
//! Writes go through the kernel's checksum helpers, which know CHECKSUM_PARTIAL and
//! CHECKSUM_COMPLETE. What a checksum changes by is what the addresses change by and what the
//! ports change by, each computed once. The one sub-program that all hooks call keeps their stacks
//! small. Plain packets go a shorter way ([`crate::stroke`]).

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    programs::sk_buff::SkBuff,
};
use netdp_common::{
    addr::{Address, Be16, Tuple},
    checksum::Difference,
    counter::Reason,
    flow::{IPPROTO_TCP, IPPROTO_UDP},
};

use crate::{family::Family, kernel};

pub(crate) const TCP_CHECKSUM: u32 = 16;
pub(crate) const UDP_CHECKSUM: u32 = 6;
pub(crate) const ICMP_CHECKSUM: u32 = 2;
pub(crate) const ICMP_IDENTIFIER: u32 = 4;

/// An offset where no checksum stands. A number, for the compiler keeps the inside of an `Option` on
/// the stack also where there is none, and kernels before Linux 6.3 refuse to read what was never
/// written there.
pub(crate) const NOWHERE: u32 = 0;

/// What to rewrite. It lies in a map ([`crate::maps::Maps::rewrite`]): the stack is too small.
/// Offsets are in bytes from the first header that the hook sees; booleans are 0 or 1.
pub(crate) struct Rewrite<F: Family> {
    /// What the flow table knows the packet by ...
    pub(crate) from: Tuple<F::Address>,
    /// ... and what becomes of that.
    pub(crate) to: Tuple<F::Address>,
    /// Offset of the IP header.
    pub(crate) ip: u32,
    /// Offset of the transport header.
    pub(crate) l4: u32,
    /// IP protocol; of an ICMP error, that of the quoted packet.
    pub(crate) proto: u32,
    /// No transport header: a later fragment.
    pub(crate) headless: u32,
    /// An ICMP error.
    pub(crate) is_error: u32,
    /// An ICMP error's own source: a router on the way, or the host that was addressed.
    pub(crate) source: F::Address,
    /// Offset of the transport header that an ICMP error quotes.
    pub(crate) quoted_l4: u32,
    /// Offset of the packet's end.
    pub(crate) end: u32,
}

/// Does the rewrite that lies in [`crate::maps::Maps::rewrite`] and returns 1; 0 where the kernel
/// refused a write (no memory to unshare the packet).
#[inline(always)]
pub(crate) fn apply<F: Family>(skb: *mut __sk_buff) -> u32 {
    let Some(rewrite) = F::rewrite() else { return 0 };
    let writer = Writer { skb: SkBuff::new(skb), rewrite };
    let outcome =
        if rewrite.is_error != 0 { writer.rewrite_error() } else { writer.rewrite_packet() };
    u32::from(outcome.is_ok())
}

/// The rewriting of one packet.
pub(crate) struct Writer<'a, F: Family> {
    pub(crate) skb: SkBuff,
    pub(crate) rewrite: &'a Rewrite<F>,
}

impl<F: Family> Writer<'_, F> {
    #[inline(always)]
    fn rewrite_packet(&self) -> Result<(), Reason> {
        let Rewrite { from, to, ip, l4, headless, .. } = self.rewrite;
        let checksum = self.checksum_offset().filter(|_| *headless == 0);
        let covering = match checksum {
            Some(offset) if self.has_ports() || F::ICMP_HAS_PSEUDO_HEADER => l4 + offset,
            _ => NOWHERE,
        };
        self.set_addresses(
            *ip,
            [&from.src, &from.dst],
            [&to.src, &to.dst],
            (covering, self.udp_flag()),
        )?;
        let Some(checksum) = checksum else { return Ok(()) };
        if self.has_ports() {
            self.set_ports(from.ports(), to.ports(), *l4, l4 + checksum)
        } else {
            let (old, new) = (from.identifier(), to.identifier());
            self.set_identifier(old, new, l4 + ICMP_IDENTIFIER, l4 + checksum)
        }
    }

    /// Sets source and destination in the header at `ip`, and brings up to date its own checksum
    /// and the one that covers them, which is [`NOWHERE`] or stands at an offset and is given with
    /// what [`Self::update`] has to know of it.
    #[inline(always)]
    pub(crate) fn set_addresses(
        &self,
        ip: u32,
        from: [&F::Address; 2],
        to: [&F::Address; 2],
        (covering, flags): (u32, u64),
    ) -> Result<(), Reason> {
        let difference = self.store_addresses(ip, from, to)?;
        if covering != NOWHERE {
            self.update(covering, difference, flags | u64::from(BPF_F_PSEUDO_HDR))?;
        }
        if F::HEADER_CHECKSUM.is_none() {
            // Nothing in the packet makes up for the addresses, but for the checksum that covers
            // them: and that one's change the kernel has just subtracted as if something did.
            kernel::account(self.skb.skb, difference);
        }
        self.update_header_checksum(ip, difference)
    }

    /// Writes the addresses that are new; returns what that changes.
    #[inline(always)]
    pub(crate) fn store_addresses(
        &self,
        ip: u32,
        from: [&F::Address; 2],
        to: [&F::Address; 2],
    ) -> Result<Difference, Reason> {
        let at = ip + F::ADDRESSES;
        if from[0] != to[0] {
            self.store(at, to[0])?;
        }
        if from[1] != to[1] {
            self.store(at + size_of::<F::Address>() as u32, to[1])?;
        }
        Ok(from[0].difference(*to[0]).plus(from[1].difference(*to[1])))
    }

    #[inline(always)]
    fn set_ports(&self, from: u32, to: u32, at: u32, checksum: u32) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        let difference = Difference::of(from, to);
        if self.is(IPPROTO_UDP) && self.load(checksum)? == Be16::default() {
            // Without a checksum nothing in the packet makes up for the ports. The addresses have
            // been seen to: IPv4's own checksum makes up for them, IPv6's were accounted for.
            kernel::account(self.skb.skb, difference);
        } else {
            self.update(checksum, difference, self.udp_flag())?;
        }
        self.store(at, &to)
    }

    #[inline(always)]
    fn set_identifier(&self, from: Be16, to: Be16, at: u32, checksum: u32) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        self.update(checksum, Difference::of(from.raw.into(), to.raw.into()), 0)?;
        self.store(at, &to)
    }

    #[inline(always)]
    pub(crate) fn is(&self, proto: u8) -> bool {
        self.rewrite.proto == u32::from(proto)
    }

    #[inline(always)]
    pub(crate) fn has_ports(&self) -> bool {
        self.is(IPPROTO_TCP) || self.is(IPPROTO_UDP)
    }

    /// Offset of the checksum within the transport header; `None` where it stays as it is because
    /// nothing that it covers changes.
    #[inline(always)]
    pub(crate) fn checksum_offset(&self) -> Option<u32> {
        if self.is(IPPROTO_TCP) {
            Some(TCP_CHECKSUM)
        } else if self.is(IPPROTO_UDP) {
            Some(UDP_CHECKSUM)
        } else if self.is(F::ICMP) {
            Some(ICMP_CHECKSUM)
        } else {
            None
        }
    }

    /// A UDP checksum of 0 means none (RFC 768): it stays 0, and a computed 0 becomes 0xffff.
    #[inline(always)]
    pub(crate) fn udp_flag(&self) -> u64 {
        if self.is(IPPROTO_UDP) { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 }
    }

    /// Brings the checksum of the IP header at `ip` up to date, where it has one.
    #[inline(always)]
    pub(crate) fn update_header_checksum(
        &self,
        ip: u32,
        difference: Difference,
    ) -> Result<(), Reason> {
        let Some(offset) = F::HEADER_CHECKSUM else { return Ok(()) };
        let at = (ip + offset) as usize;
        self.skb.l3_csum_replace(at, 0, difference.get().into(), 0).map_err(|_| Reason::Rewrite)
    }

    /// Brings a transport's checksum up to date.
    #[inline(always)]
    pub(crate) fn update(&self, at: u32, difference: Difference, flags: u64) -> Result<(), Reason> {
        kernel::update_checksum(self.skb.skb, at, difference, flags)
    }

    #[inline(always)]
    pub(crate) fn load(&self, at: u32) -> Result<Be16, Reason> {
        self.skb.load(at as usize).map_err(|_| Reason::Malformed)
    }

    #[inline(always)]
    pub(crate) fn store<T>(&self, at: u32, value: &T) -> Result<(), Reason> {
        self.skb.store(at as usize, value, 0).map_err(|_| Reason::Rewrite)
    }
}
