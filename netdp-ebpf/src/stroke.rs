//! Rewriting a plain packet in one stroke: read and written where it lies, with as few calls into the
//! kernel as there are checksums that only the kernel can bring up to date.
//!
//! Plain is TCP or UDP with a checksum, over Ethernet, with nothing between IP header and transport.
//! All else is [`crate::rewrite`]'s.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    programs::TcContext,
};
use netdp_common::{
    addr::{Address, Tuple},
    checksum::Difference,
    counter::Reason,
    flow::{IPPROTO_TCP, IPPROTO_UDP},
};
use network_types::{eth::EthHdr, udp::UdpHdr};

use crate::{
    bytes::Bytes,
    family::Family,
    kernel,
    rewrite::{TCP_CHECKSUM, UDP_CHECKSUM},
};

/// What [`take`] returns where the packet is not plain after all, and untouched.
pub(crate) const LEFT: u32 = 0;
/// What it returns where the packet is rewritten.
pub(crate) const DONE: u32 = 1;
/// What it returns where the kernel refused a write.
const BROKEN: u32 = 2;

/// Rewrites the packet whose headers lie in [`crate::maps::Maps::headers`], as the half in
/// [`crate::maps::Maps::half`] says; it loses so many hops. The headers must have told that it is plain
/// but for what lies in the transport's.
#[inline(always)]
pub(crate) fn take<F: Family>(skb: *mut __sk_buff, lost: u32) -> u32 {
    let ctx = TcContext::new(skb);
    let (Some(headers), Some(half)) = (F::headers(), F::half()) else { return LEFT };
    let Some(frame) = whole::<F>(&ctx) else { return LEFT };
    let proto = headers.proto;
    if proto == IPPROTO_UDP && frame.half(at_transport::<F>() + UDP_CHECKSUM as usize) == 0 {
        return LEFT;
    }
    if rewrite::<F>(&ctx, proto, &half.to, lost as u8).is_ok() { DONE } else { BROKEN }
}

/// Where the transport's header stands.
#[inline(always)]
const fn at_transport<F: Family>() -> usize {
    EthHdr::LEN + size_of::<F::Header>()
}

/// The packet, if it lies in one piece as far as it is read here.
#[inline(always)]
fn whole<F: Family>(ctx: &TcContext) -> Option<Bytes> {
    Bytes::of(ctx, at_transport::<F>() + UdpHdr::LEN)
}

/// Rewrites a plain packet of `proto`: addresses and ports become `to`, and it loses so many hops, fewer
/// than it has.
///
/// Errors: the kernel refused a write (no memory to unshare the packet).
#[inline(always)]
pub(crate) fn rewrite<F: Family>(
    ctx: &TcContext,
    proto: u8,
    to: &Tuple<F::Address>,
    lost: u8,
) -> Result<(), Reason> {
    // The four bytes before the addresses: one is the time to live, and IPv4's checksum is there.
    let before = F::ADDRESSES as usize - 4;
    let Some(frame) = whole::<F>(ctx) else { return Err(Reason::Rewrite) };
    let ip = frame.at(EthHdr::LEN);
    let source = Change::of(ip.at(F::ADDRESSES as usize), &to.src);
    let destination = Change::of(ip.at(F::ADDRESSES as usize + size_of::<F::Address>()), &to.dst);
    let ports = frame.word(at_transport::<F>());
    let mut life = ip.word(before).to_ne_bytes();

    let skb = ctx.skb.skb;
    let addresses = source.difference.plus(destination.difference);
    let (offset, flags) = if proto == IPPROTO_TCP {
        (TCP_CHECKSUM, 0)
    } else {
        (UDP_CHECKSUM, u64::from(BPF_F_MARK_MANGLED_0))
    };
    let checksum = at_transport::<F>() as u32 + offset;
    if source.bits | destination.bits != 0 {
        kernel::update_checksum(skb, checksum, addresses, flags | u64::from(BPF_F_PSEUDO_HDR))?;
    }
    if ports != to.ports() {
        kernel::update_checksum(skb, checksum, Difference::of(ports, to.ports()), flags)?;
    }

    // What checksums see: the two bytes that the time to live is one of.
    let pair = (F::TTL as usize - before) & !1;
    let half_word = |bytes: [u8; 4]| u32::from(u16::from_ne_bytes([bytes[pair], bytes[pair + 1]]));
    let longer = half_word(life);
    life[F::TTL as usize - before] -= lost;
    let changed = addresses.plus(Difference::of(longer, half_word(life)));
    match F::HEADER_CHECKSUM {
        Some(offset) => {
            let at = offset as usize - before;
            let there = u16::from_ne_bytes([life[at], life[at + 1]]);
            let sum = Difference::of(0, u32::from(!there)).plus(changed);
            let [a, b] = sum.checksum().to_ne_bytes();
            life[at] = a;
            life[at + 1] = b;
        }
        None => kernel::account(skb, changed),
    }

    // The kernel may have moved the packet.
    let Some(frame) = whole::<F>(ctx) else { return Err(Reason::Rewrite) };
    let ip = frame.at(EthHdr::LEN);
    ip.set_word(before, u32::from_ne_bytes(life));
    // The ports follow in the packet as they do here.
    ip.write(F::ADDRESSES as usize, to);
    Ok(())
}

/// What happens to an address.
struct Change {
    /// What checksums change by.
    difference: Difference,
    /// Bits that change, of all words laid over each other.
    bits: u32,
}

impl Change {
    /// From the address that stands in the packet to `new`.
    #[inline(always)]
    fn of<A: Address>(old: Bytes, new: &A) -> Self {
        let mut change = Self { difference: Difference::NONE, bits: 0 };
        for (word, new) in new.words().iter().enumerate() {
            let old = old.word(4 * word);
            change.difference = change.difference.plus(Difference::of(old, *new));
            change.bits |= old ^ *new;
        }
        change
    }
}
