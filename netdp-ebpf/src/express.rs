//! The express lane: a plain packet of a flow that is going on, which is what most packets are.
//!
//! Does in one go what the programs would do with it by and by (parse, follow, rewrite, send past
//! the stack), reading the packet where it lies. It decides nothing: whatever is not as plain as can
//! be, and one packet of each flow in a second, is left to the program, untouched.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    programs::TcContext,
};
use netdp_common::{
    addr::Address,
    checksum::Difference,
    counter::Reason,
    flow::{Flow, FlowKey, IPPROTO_TCP, IPPROTO_UDP, ZONE_WORLD, flag, seen, stage},
    interface::{Interface, role},
};
use network_types::{eth::EthHdr, tcp::TcpHdr, udp::UdpHdr};

use crate::{
    bytes::Bytes,
    family::{Family, V4, V6},
    kernel, maps,
    maps::Lane,
    packet,
    rewrite::{TCP_CHECKSUM, UDP_CHECKSUM},
    shortcut,
    verdict::{Decision, drop},
};

/// What a lane returns where it leaves the packet to the program.
pub(crate) const LEFT: i32 = shortcut::LEFT;

/// Bits of a TCP header's fourteenth byte.
const FIN_SYN_RST: u8 = 7;
const ACK: u8 = 16;

/// What the lane has to know of a family.
pub(crate) trait Plain: Family {
    /// Whether the header at `ip` has nothing besides the fields that all have, and its packet is
    /// whole.
    fn is_plain(ip: Bytes) -> bool;

    /// Bytes of the packet, its IP header included, as that says.
    fn length(ip: Bytes) -> u32;
}

impl Plain for V4 {
    #[inline(always)]
    fn is_plain(ip: Bytes) -> bool {
        const VERSION_AND_WORDS: u8 = 0x45;
        const MORE_AND_OFFSET: u16 = 0x3fff;
        ip.byte(0) == VERSION_AND_WORDS && u16::from_be(ip.half(6)) & MORE_AND_OFFSET == 0
    }

    #[inline(always)]
    fn length(ip: Bytes) -> u32 {
        u16::from_be(ip.half(2)).into()
    }
}

impl Plain for V6 {
    #[inline(always)]
    fn is_plain(ip: Bytes) -> bool {
        // Extension headers would stand where the transport's number has to.
        ip.byte(0) >> 4 == 6
    }

    #[inline(always)]
    fn length(ip: Bytes) -> u32 {
        u32::from(u16::from_be(ip.half(4))) + size_of::<Self::Header>() as u32
    }
}

/// What is rewritten.
struct Head<A> {
    /// The four bytes before the addresses: one is the time to live, and IPv4's checksum is there.
    before: [u8; 4],
    /// Key of the flow, of which addresses and ports follow in the packet.
    key: FlowKey<A>,
}

/// What else there is to know of a packet.
struct Rest {
    /// Bytes, IP header included: of each packet that it will be cut into.
    bytes: u32,
    /// Bits of [`seen`].
    shown: u8,
    /// TCP: acknowledgement number, host byte order.
    acknowledged: u32,
}

/// A packet that a container sends; `generation` and `mac` are the container's.
#[inline(always)]
pub(crate) fn from_container<F: Plain>(ctx: &TcContext) -> Decision<i32> {
    let Some(sender) = maps::near_interface(packet::ifindex(ctx)) else { return Ok(LEFT) };
    if sender.role != role::ENDPOINT || packet::is_tagged(ctx) {
        return Ok(LEFT);
    }
    take::<F>(ctx, sender.network, sender.generation, Some(sender))
}

/// A packet from outside.
#[inline(always)]
pub(crate) fn from_uplink<F: Plain>(ctx: &TcContext) -> Decision<i32> {
    let Some(uplink) = maps::near_interface(packet::ifindex(ctx)) else { return Ok(LEFT) };
    if packet::ip_offset(uplink) == 0 || packet::is_for_another(ctx) || packet::is_tagged(ctx) {
        return Ok(LEFT);
    }
    take::<F>(ctx, ZONE_WORLD, 0, None)
}

#[inline(always)]
fn take<F: Plain>(
    ctx: &TcContext,
    zone: u32,
    generation: u32,
    sender: Option<&Interface>,
) -> Decision<i32> {
    if !shortcut::is_open() {
        return Ok(LEFT);
    }
    let headers = EthHdr::LEN + size_of::<F::Header>() + TcpHdr::LEN;
    let Some(frame) = Bytes::of(ctx, headers) else { return Ok(LEFT) };
    if let Some(sender) = sender
        && !is_from(frame, &sender.mac)
    {
        return Ok(LEFT);
    }
    let Some((mut head, rest)) = read::<F>(ctx, frame.at(EthHdr::LEN), zone) else {
        return Ok(LEFT);
    };
    let Some(flow) = F::flow(&head.key) else { return Ok(LEFT) };
    // Once: it may change any time.
    let half = *flow.peek();
    if half.generation != generation
        || half.last_seen != kernel::now()
        || half.seen & (rest.shown | seen::RST) != rest.shown
        || !is_approved(&half)
    {
        return Ok(LEFT);
    }
    let Some(exit) = maps::near_interface(half.exit) else { return Ok(LEFT) };
    let is_switched = half.stage == stage::SWITCH;
    let life = &mut head.before[F::TTL as usize + 4 - F::ADDRESSES as usize];
    let is_at_its_end = *life <= 1 && !is_switched;
    let leads_there = match exit.role {
        role::UPLINK => half.reply_zone() == ZONE_WORLD,
        role::ENDPOINT => shortcut::leads_to_endpoint::<F>(exit, &half),
        _ => false,
    };
    if !leads_there || is_at_its_end || rest.bytes > exit.mtu {
        return Ok(LEFT);
    }
    if head.key.proto == IPPROTO_TCP {
        flow.acknowledge(&half, rest.acknowledged);
    }
    let lost = u8::from(!is_switched);
    match send::<F>(ctx, &mut head, &half, exit, lost) {
        Ok(code) => {
            maps::count_lane(Lane::Fast);
            Ok(code)
        }
        Err(_) => drop(Reason::Rewrite, half.network()),
    }
}

#[inline(always)]
fn is_from(frame: Bytes, mac: &[u8; 6]) -> bool {
    let [a, b, c, d, e, f] = *mac;
    frame.half(6) == u16::from_ne_bytes([a, b]) && frame.word(8) == u32::from_ne_bytes([c, d, e, f])
}

#[inline(always)]
fn halves(mac: &[u8; 6]) -> [u16; 3] {
    let [a, b, c, d, e, f] = *mac;
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
}

/// Whether the policy that has a say has not changed since it was asked.
#[inline(always)]
fn is_approved<A: Address>(half: &Flow<A>) -> bool {
    half.flags & flag::INBOUND == 0
        || maps::network(half.network())
            .is_some_and(|network| network.policy_generation == half.policy_generation)
}

/// Reads TCP that neither begins nor ends, or UDP.
#[inline(always)]
fn read<F: Plain>(ctx: &TcContext, ip: Bytes, zone: u32) -> Option<(Head<F::Address>, Rest)> {
    let ip_header = size_of::<F::Header>();
    let (length, transport) = (F::length(ip), ip.at(ip_header));
    if !F::is_plain(ip) || EthHdr::LEN as u32 + length > ctx.len() {
        return None;
    }
    let proto = ip.byte(F::PROTOCOL as usize);
    let (header, shown, acknowledged) = if proto == IPPROTO_TCP {
        let flags = transport.byte(13);
        if flags & (FIN_SYN_RST | ACK) != ACK {
            return None;
        }
        let header = u32::from(transport.byte(12) >> 4) * 4;
        (header, seen::ANY | seen::DATA | seen::ACK, u32::from_be(transport.word(8)))
    } else if proto == IPPROTO_UDP {
        // One without a checksum is not as plain as it looks.
        if transport.half(UDP_CHECKSUM as usize) == 0 {
            return None;
        }
        (UdpHdr::LEN as u32, seen::ANY | seen::DATA, 0)
    } else {
        return None;
    };
    let headers = ip_header as u32 + header;
    if length < headers {
        return None;
    }
    let segment = kernel::segment_size(ctx.skb.skb);
    let bytes = if segment == 0 { length } else { headers + segment };
    let mut head = Head { before: [0; 4], key: FlowKey::new(zone, Default::default(), proto) };
    let first = F::ADDRESSES as usize - 4;
    ip.read(first, &mut head.before);
    ip.read(first + 4, &mut head.key.tuple);
    Some((head, Rest { bytes, shown, acknowledged }))
}

/// Rewrites the packet, of whose life `lost` are lost, and sends it out of `exit`.
#[inline(always)]
fn send<F: Plain>(
    ctx: &TcContext,
    head: &mut Head<F::Address>,
    half: &Flow<F::Address>,
    exit: &Interface,
    lost: u8,
) -> Result<i32, Reason> {
    let skb = ctx.skb.skb;
    let (from, to) = (head.key.tuple, half.to);
    let addresses = from.src.difference(to.src).plus(from.dst.difference(to.dst));
    let at_transport = (EthHdr::LEN + size_of::<F::Header>()) as u32;
    let (offset, flags) = if head.key.proto == IPPROTO_TCP {
        (TCP_CHECKSUM, 0)
    } else {
        (UDP_CHECKSUM, u64::from(BPF_F_MARK_MANGLED_0))
    };
    let checksum = at_transport + offset;
    if from.src.xor(to.src) | from.dst.xor(to.dst) != 0 {
        kernel::update_checksum(skb, checksum, addresses, flags | u64::from(BPF_F_PSEUDO_HDR))?;
    }
    if from.ports() != to.ports() {
        let ports = Difference::of(from.ports(), to.ports());
        kernel::update_checksum(skb, checksum, ports, flags)?;
    }
    let before = head.before;
    let first = F::ADDRESSES as usize - 4;
    head.before[F::TTL as usize - first] -= lost;
    // What checksums see: the two bytes that the time to live is one of.
    let pair = (F::TTL as usize - first) & !1;
    let half_word = |bytes: [u8; 4]| u32::from(u16::from_ne_bytes([bytes[pair], bytes[pair + 1]]));
    let changed = addresses.plus(Difference::of(half_word(before), half_word(head.before)));
    match F::HEADER_CHECKSUM {
        Some(offset) => {
            let at = offset as usize - first;
            let there = u16::from_ne_bytes([head.before[at], head.before[at + 1]]);
            let sum = Difference::of(0, u32::from(!there)).plus(changed);
            let [a, b] = sum.checksum().to_ne_bytes();
            head.before[at] = a;
            head.before[at + 1] = b;
        }
        None => kernel::account(skb, changed),
    }
    head.key.tuple = to;
    // The kernel may have moved the packet.
    let Some(frame) = Bytes::of(ctx, at_transport as usize + 4) else {
        return Err(Reason::Rewrite);
    };
    let ip = frame.at(EthHdr::LEN);
    ip.write(first, &head.before);
    ip.write(first + 4, &head.key.tuple);
    if exit.role == role::UPLINK {
        return Ok(kernel::redirect_neighbour(half.exit));
    }
    let source = if lost == 0 {
        [frame.half(6), frame.half(8), frame.half(10)]
    } else {
        halves(&maps::network(exit.network).ok_or(Reason::NotReady)?.mac)
    };
    let destination = halves(&exit.mac);
    let pair = |a: u16, b: u16| {
        let ([a, b], [c, d]) = (a.to_ne_bytes(), b.to_ne_bytes());
        u32::from_ne_bytes([a, b, c, d])
    };
    frame.set_word(0, pair(destination[0], destination[1]));
    frame.set_word(4, pair(destination[2], source[0]));
    frame.set_word(8, pair(source[1], source[2]));
    Ok(kernel::redirect_peer(skb, half.exit))
}
