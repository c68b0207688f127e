//! Rewriting a packet in place, all checksums included.
//!
//! Writes go through the kernel's checksum helpers, which know CHECKSUM_PARTIAL and
//! CHECKSUM_COMPLETE. The one sub-program that all hooks call keeps their stacks small.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    programs::sk_buff::SkBuff,
};
use netdp_common::{
    addr::{Be16, Be32, Tuple4},
    counter::Reason,
    flow::{IPPROTO_TCP, IPPROTO_UDP},
};

use crate::packet::Quoted;

pub(crate) const IPV4_CHECKSUM: u32 = 10;
pub(crate) const IPV4_SOURCE: u32 = 12;
pub(crate) const IPV4_DESTINATION: u32 = 16;
pub(crate) const TCP_CHECKSUM: u32 = 16;
pub(crate) const UDP_CHECKSUM: u32 = 6;
pub(crate) const ICMP_CHECKSUM: u32 = 2;
pub(crate) const ICMP_IDENTIFIER: u32 = 4;

/// What to rewrite. It lies in a map ([`crate::maps::rewrite`]): the stack is too small. Offsets
/// are in bytes from the first header that the hook sees; booleans are 0 or 1.
pub(crate) struct Rewrite {
    /// What the flow table knows the packet by ...
    pub(crate) from: Tuple4,
    /// ... and what becomes of that.
    pub(crate) to: Tuple4,
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
    /// An ICMP error from a router on the way, not from the host that was addressed.
    pub(crate) is_sent_by_router: u32,
    /// What an ICMP error quotes.
    pub(crate) quoted: Quoted,
}

/// Rewrites the packet.
///
/// Errors: the kernel refused a write (no memory to unshare the packet).
#[inline(never)]
pub(crate) fn apply(skb: *mut __sk_buff, rewrite: &Rewrite) -> Result<(), Reason> {
    let writer = Writer { skb: SkBuff::new(skb), rewrite };
    if rewrite.is_error != 0 { writer.rewrite_error() } else { writer.rewrite_packet() }
}

/// The rewriting of one packet.
pub(crate) struct Writer<'a> {
    skb: SkBuff,
    pub(crate) rewrite: &'a Rewrite,
}

impl Writer<'_> {
    #[inline(always)]
    fn rewrite_packet(&self) -> Result<(), Reason> {
        let Rewrite { from, to, ip, l4, headless, .. } = *self.rewrite;
        let checksum = match headless {
            0 => l4 + self.transport_checksum_offset(),
            _ => 0,
        };
        self.set_packet_address(from.src, to.src, ip + IPV4_SOURCE, checksum)?;
        self.set_packet_address(from.dst, to.dst, ip + IPV4_DESTINATION, checksum)?;
        if headless != 0 {
            return Ok(());
        }
        if self.has_ports() {
            self.set_packet_port(from.sport, to.sport, l4, checksum)?;
            self.set_packet_port(from.dport, to.dport, l4 + 2, checksum)
        } else {
            self.set_packet_port(from.identifier(), to.identifier(), l4 + ICMP_IDENTIFIER, checksum)
        }
    }

    #[inline(always)]
    fn set_packet_address(
        &self,
        from: Be32,
        to: Be32,
        at: u32,
        checksum: u32,
    ) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        let (old, new) = (u64::from(from.raw), u64::from(to.raw));
        // ICMPv4 checksums know nothing of addresses (RFC 792).
        if checksum != 0 && self.has_ports() {
            self.replace(checksum, old, new, u64::from(BPF_F_PSEUDO_HDR) | self.udp_flag() | 4)?;
        }
        self.replace_ip_checksum(self.rewrite.ip, old, new)?;
        self.store(at, &to)
    }

    #[inline(always)]
    fn set_packet_port(&self, from: Be16, to: Be16, at: u32, checksum: u32) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        self.replace(checksum, from.raw.into(), to.raw.into(), self.udp_flag() | 2)?;
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

    /// Offset of the checksum within the transport header.
    #[inline(always)]
    pub(crate) fn transport_checksum_offset(&self) -> u32 {
        if self.is(IPPROTO_TCP) {
            TCP_CHECKSUM
        } else if self.is(IPPROTO_UDP) {
            UDP_CHECKSUM
        } else {
            ICMP_CHECKSUM
        }
    }

    /// A UDP checksum of 0 means none (RFC 768): it stays 0, and a computed 0 becomes 0xffff.
    #[inline(always)]
    pub(crate) fn udp_flag(&self) -> u64 {
        if self.is(IPPROTO_UDP) { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 }
    }

    #[inline(always)]
    pub(crate) fn replace_ip_checksum(&self, ip: u32, old: u64, new: u64) -> Result<(), Reason> {
        let at = (ip + IPV4_CHECKSUM) as usize;
        self.skb.l3_csum_replace(at, old, new, 4).map_err(|_| Reason::Rewrite)
    }

    #[inline(always)]
    pub(crate) fn replace(&self, at: u32, old: u64, new: u64, flags: u64) -> Result<(), Reason> {
        self.skb.l4_csum_replace(at as usize, old, new, flags).map_err(|_| Reason::Rewrite)
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
