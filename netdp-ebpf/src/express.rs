//! The express lane: a plain packet of a flow that is going on, which is what most packets are.
//!
//! Does in one go what the programs would do with it by and by (parse, follow, rewrite, send past
//! the stack), reading the packet where it lies. It decides nothing: whatever is not as plain as can
//! be, and one packet of each flow in a second, is left to the program, untouched.

use aya_ebpf::programs::TcContext;
use netdp_common::{
    addr::Address,
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
    rewrite::UDP_CHECKSUM,
    shortcut, stroke, table,
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

/// What there is to know of a packet besides its flow.
struct Rest {
    /// Bytes, IP header included: of each packet that it will be cut into.
    bytes: u32,
    /// Hops that it has left.
    life: u8,
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
    let Some((key, rest)) = read::<F>(ctx, frame.at(EthHdr::LEN), zone) else {
        return Ok(LEFT);
    };
    let Some(flow) = table::flow_at_once::<F>(&key) else { return Ok(LEFT) };
    // Once: it may change any time.
    let half = *flow.peek();
    if !flow.has_key(&key)
        || half.generation != generation
        || half.last_seen != kernel::now()
        || half.seen & (rest.shown | seen::RST) != rest.shown
        || !is_approved(&half)
    {
        return Ok(LEFT);
    }
    let Some(exit) = maps::near_interface(half.exit) else { return Ok(LEFT) };
    let is_switched = half.stage == stage::SWITCH;
    let is_at_its_end = rest.life <= 1 && !is_switched;
    let leads_there = match exit.role {
        role::UPLINK => half.reply_zone() == ZONE_WORLD,
        role::ENDPOINT => shortcut::leads_to_endpoint::<F>(exit, &half),
        _ => false,
    };
    if !leads_there || is_at_its_end || rest.bytes > exit.mtu {
        return Ok(LEFT);
    }
    if key.proto == IPPROTO_TCP {
        flow.acknowledge(&half, rest.acknowledged);
    }
    match send::<F>(ctx, key.proto, &half, exit, is_switched) {
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

/// Whether the policy that has a say has not changed since it was asked.
#[inline(always)]
fn is_approved<A: Address>(half: &Flow<A>) -> bool {
    half.flags & flag::INBOUND == 0
        || maps::network(half.network())
            .is_some_and(|network| network.policy_generation == half.policy_generation)
}

/// Reads TCP that neither begins nor ends, or UDP.
#[inline(always)]
fn read<F: Plain>(ctx: &TcContext, ip: Bytes, zone: u32) -> Option<(FlowKey<F::Address>, Rest)> {
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
    let mut key = FlowKey::new(zone, Default::default(), proto);
    ip.read(F::ADDRESSES as usize, &mut key.tuple);
    let life = ip.byte(F::TTL as usize);
    Some((key, Rest { bytes, life, shown, acknowledged }))
}

/// Rewrites the packet and sends it out of `exit`.
#[inline(always)]
fn send<F: Plain>(
    ctx: &TcContext,
    proto: u8,
    half: &Flow<F::Address>,
    exit: &Interface,
    is_switched: bool,
) -> Result<i32, Reason> {
    stroke::rewrite::<F>(ctx, proto, &half.to, u8::from(!is_switched))?;
    shortcut::deliver(ctx, half.exit, exit, is_switched)
}
