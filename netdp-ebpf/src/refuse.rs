//! Telling a container that its packet was refused: an ICMP error in place of the packet, turned
//! around at the veth, so that it need not wait (RFC 5508, REQ-8; RFC 6888, REQ-11).

use aya_ebpf::{
    bindings::{__sk_buff, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    programs::sk_buff::SkBuff,
};
use netdp_common::{
    addr::{Be32, Be128},
    checksum::Difference,
    counter::Reason,
};
use network_types::{eth::EthHdr, tcp::TcpHdr};

use crate::{
    family::{Family, V4, V6},
    kernel, maps,
    packet::{Frame, Headers, Transport},
};

/// Errors per second and endpoint: who is told that often knows (RFC 1812, 4.3.2.8; RFC 4443, 2.4 f).
const PER_SECOND: u32 = 100;
const HOP_LIMIT: u8 = 64;
/// Bytes of the ICMP header.
const ICMP: usize = 8;
/// Bytes that are quoted of a transport, but for TCP: of that a whole header, because the kernel may
/// still have to put the checksum into it.
const QUOTED: usize = 8;
/// Most words that are quoted: an IPv6 header and TCP's.
const WORDS: usize = 15;

/// Bytes of a packet, a multiple of four.
pub(crate) trait Words: Copy {
    /// Their sum, as checksums have it.
    fn sum(&self) -> Difference;
}

impl<const N: usize> Words for [u32; N] {
    #[inline(always)]
    fn sum(&self) -> Difference {
        let mut sum = Difference::NONE;
        for word in self {
            sum = sum.plus(Difference::of(0, *word));
        }
        sum
    }
}

/// The error "administratively prohibited" of a family.
pub(crate) trait Prohibited: Family {
    /// An IP header without options, in words.
    type HeaderWords: Words;
    /// ICMP type and code.
    const MESSAGE: [u8; 2];

    /// The header of a message of this many bytes.
    fn header(from: Self::Address, to: Self::Address, message: usize) -> Self::HeaderWords;

    /// The sum of what the ICMP checksum covers besides the message.
    fn pseudo_header(from: Self::Address, to: Self::Address, message: usize) -> Difference;
}

impl Prohibited for V4 {
    type HeaderWords = [u32; 5];
    // RFC 1812, 5.2.7.1.
    const MESSAGE: [u8; 2] = [3, 13];

    #[inline(always)]
    fn header(from: Be32, to: Be32, message: usize) -> [u32; 5] {
        /// Internetwork control, as Linux has it on its errors.
        const PRECEDENCE: u8 = 0xc0;
        let [high, low] = ((size_of::<[u32; 5]>() + message) as u16).to_be_bytes();
        let start = u32::from_ne_bytes([0x45, PRECEDENCE, high, low]);
        let rest = |checksum: [u8; 2]| {
            u32::from_ne_bytes([HOP_LIMIT, Self::ICMP, checksum[0], checksum[1]])
        };
        let bare = [start, 0, rest([0; 2]), from.raw, to.raw];
        [start, 0, rest(bare.sum().checksum().to_ne_bytes()), from.raw, to.raw]
    }

    #[inline(always)]
    fn pseudo_header(_: Be32, _: Be32, _: usize) -> Difference {
        Difference::NONE
    }
}

impl Prohibited for V6 {
    type HeaderWords = [u32; 10];
    // RFC 4443, 3.1.
    const MESSAGE: [u8; 2] = [1, 1];

    #[inline(always)]
    fn header(from: Be128, to: Be128, message: usize) -> [u32; 10] {
        let [high, low] = (message as u16).to_be_bytes();
        let ([a, b, c, d], [e, f, g, h]) = (from.raw, to.raw);
        let start = u32::from_ne_bytes([0x60, 0, 0, 0]);
        [start, u32::from_ne_bytes([high, low, Self::ICMP, HOP_LIMIT]), a, b, c, d, e, f, g, h]
    }

    #[inline(always)]
    fn pseudo_header(from: Be128, to: Be128, message: usize) -> Difference {
        let next_header = u32::from(Self::ICMP).to_be();
        from.raw.sum().plus(to.raw.sum()).plus([(message as u32).to_be(), next_header].sum())
    }
}

/// How many errors an endpoint was sent in the second at hand.
#[derive(Clone, Copy, Default)]
pub(crate) struct Allowance {
    second: u32,
    sent: u32,
}

/// Whether the reason is one that a container should hear of.
#[inline(always)]
pub(crate) fn is_told(reason: Reason) -> bool {
    matches!(reason, Reason::PortsExhausted | Reason::EndpointLimit)
}

/// Makes the container's packet that was parsed last into an error about itself. Returns 1, or 0
/// where that can't be.
#[inline(always)]
pub(crate) fn answer<F: Prohibited>(skb: *mut __sk_buff, ifindex: u32) -> u32 {
    u32::from(is_allowed(ifindex) && make_error::<F>(&SkBuff::new(skb), ifindex).is_some())
}

#[inline(always)]
fn is_allowed(ifindex: u32) -> bool {
    let Some(allowance) = maps::allowance(ifindex) else { return false };
    let now = kernel::now();
    if allowance.second != now {
        allowance.second = now;
        allowance.sent = 0;
    }
    allowance.sent += 1;
    allowance.sent <= PER_SECOND
}

#[inline(always)]
fn make_error<F: Prohibited>(skb: &SkBuff, ifindex: u32) -> Option<()> {
    let headers = F::headers()?;
    let interface = maps::interface(ifindex)?;
    let network = maps::network(interface.network)?;
    // Options and extension headers are rare, and silence is allowed.
    if headers.outer.l4 != EthHdr::LEN + size_of::<F::HeaderWords>() {
        return None;
    }
    write::<F>(skb, headers, F::subnet(network).gateway)?;
    skb.store(0, &Frame { destination: interface.mac, source: network.mac }, 0).ok()
}

/// Cuts the packet down to its IP header and some bytes of the transport, and puts the error's
/// headers before that.
#[inline(always)]
fn write<F: Prohibited>(skb: &SkBuff, headers: &Headers<F>, from: F::Address) -> Option<()> {
    let header = size_of::<F::HeaderWords>();
    let to = headers.source;
    let is_tcp = headers.transport == Transport::Tcp;
    let quote = header + if is_tcp { TcpHdr::LEN } else { QUOTED };
    if headers.outer.end < EthHdr::LEN + quote {
        return None;
    }
    let message = ICMP + quote;
    let [kind, code] = F::MESSAGE;
    let start = [u32::from_ne_bytes([kind, code, 0, 0])];
    let mut sum = start.sum().plus(F::pseudo_header(from, to, message));
    for word in 0..WORDS {
        if word * 4 < quote {
            sum = sum.plus(Difference::of(0, headers.word(word)));
        }
    }
    kernel::cut(skb.skb, (EthHdr::LEN + quote) as u32).then_some(())?;
    skb.adjust_room((header + ICMP) as i32, BPF_ADJ_ROOM_MAC, 0).ok()?;
    let [high, low] = sum.checksum().to_ne_bytes();
    let icmp = [u32::from_ne_bytes([kind, code, high, low]), 0];
    let ip = F::header(from, to, message);
    skb.store(EthHdr::LEN, &ip, 0).ok()?;
    skb.store(EthHdr::LEN + header, &icmp, 0).ok()?;
    // What is quoted was in the sum before.
    kernel::account(skb.skb, ip.sum().plus(icmp.sum()));
    Some(())
}
