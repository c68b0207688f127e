//! The way past the host's stack: what belongs to a flow goes from the hook at which it arrives
//! straight out of the uplink, or into the container.
//!
//! Only what the stack would do nothing else with than forward it. All else it gets: packets at the
//! end of their life, too large ones, options, interfaces without Ethernet.

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use netdp_common::{
    counter::Reason,
    endpoint::Endpoint,
    flow::{Flow, stage},
    interface::{Interface, flag as interface_flag, role},
};
use network_types::eth::EthHdr;

use crate::{
    bytes::Bytes,
    container::Sender,
    family::Family,
    flow, kernel, maps,
    maps::Lane,
    packet::{Headers, Packet, Route},
    table,
    verdict::{Decision, Verdict, drop},
};

/// What [`send`] returns where the packet is left to the stack, untouched.
pub(crate) const LEFT: i32 = i32::MIN;
/// What it returns where the kernel refused to write to it.
pub(crate) const BROKEN: i32 = i32::MIN + 1;

/// The bit of a MAC address's first byte that tells a group from a station (IEEE 802).
const GROUP: u8 = 1;

/// Whether there is a way past the stack at all.
#[inline(always)]
pub(crate) fn is_open() -> bool {
    maps::config().is_some_and(|config| config.fast_path != 0)
}

/// Sends a packet that arrived in `zone`, and that `half` leads to a container, straight there;
/// `None` where the stack has to take it, as it is.
#[inline(always)]
pub(crate) fn into_container<F: Family>(
    packet: &Packet<'_, F>,
    half: &Flow<F::Address>,
    zone: u32,
) -> Decision<Option<Verdict>> {
    let exit = if is_open() { container_exit::<F>(packet, half) } else { 0 };
    flow::note_exit(packet, zone, half, exit);
    by::<F>(packet, half, exit, u32::MAX)
}

/// Sends a packet that arrived in `zone`, and that `half` leads to the world, straight out by this
/// route; `None` where the stack has to take it, as it is.
#[inline(always)]
pub(crate) fn out<F: Family>(
    packet: &Packet<'_, F>,
    half: &Flow<F::Address>,
    zone: u32,
    route: Route,
    exit: &Interface,
) -> Decision<Option<Verdict>> {
    flow::note_exit(packet, zone, half, exit_by(route, exit));
    by::<F>(packet, half, if has_way(exit) { route.ifindex } else { 0 }, route.mtu)
}

/// What to note as [`Flow::exit`] of a half whose packets leave by this route.
#[inline(always)]
pub(crate) fn exit_by(route: Route, exit: &Interface) -> u32 {
    // What goes by a route with a smaller MTU than its interface's is looked at each time.
    if has_way(exit) && route.mtu >= exit.mtu { route.ifindex } else { 0 }
}

/// What to note as [`Flow::exit`] of a half that leads to a container.
#[inline(always)]
pub(crate) fn exit_to(endpoint: &Endpoint) -> u32 {
    if is_open() { endpoint.ifindex } else { 0 }
}

/// Whether packets can leave past the stack by an uplink.
#[inline(always)]
fn has_way(exit: &Interface) -> bool {
    is_open() && exit.flags & interface_flag::ETHERNET != 0
}

/// The host's end of the veth of the container that a half leads to; 0 where it is not the
/// container that the flow was opened for, which is the wall's to judge.
#[inline(always)]
fn container_exit<F: Family>(packet: &Packet<'_, F>, half: &Flow<F::Address>) -> u32 {
    let known = maps::near_interface(half.exit);
    if known.is_some_and(|exit| leads_to_endpoint::<F>(exit, half)) {
        return half.exit;
    }
    let Some(endpoint) = F::endpoint(half.to.dst) else { return 0 };
    let own = table::flow_of::<F>(half.reply_zone(), &half.to.reversed(), packet.proto);
    let is_own = own.is_some_and(|own| own.generation() == endpoint.generation);
    if is_own && endpoint.network == half.reply_zone() { endpoint.ifindex } else { 0 }
}

/// Hands a packet to another member of the sender's network, if it is for one that `find` finds;
/// otherwise the bridge has to find who it is for. `find` gets packet, headers, and network and
/// generation of the sender.
#[inline(always)]
pub(crate) fn to_neighbour<F: Family>(
    packet: &Packet<'_, F>,
    sender: &Sender,
    find: fn(*mut __sk_buff, &Headers<F>, u32, u32) -> i32,
) -> Verdict {
    if !is_open() {
        return Verdict::Pass;
    }
    match find(packet.skb(), packet.headers(), sender.id, sender.interface.generation) {
        LEFT => Verdict::Pass,
        code => Verdict::Sent(code),
    }
}

/// Hands a packet to the member that has its destination's address. A sub-program of its own, for the
/// stacks of its callers.
#[inline(never)]
pub(crate) fn to_destination<F: Family>(
    skb: *mut __sk_buff,
    headers: &Headers<F>,
    network: u32,
    own_generation: u32,
) -> i32 {
    hand_over(skb, headers, &headers.destination, network, own_generation)
}

/// Hands a packet to the member of a network that has `address`, if the frame is for that one.
#[inline(always)]
pub(crate) fn hand_over<F: Family>(
    skb: *mut __sk_buff,
    headers: &Headers<F>,
    address: &F::Address,
    network: u32,
    own_generation: u32,
) -> i32 {
    let Some(peer) = F::endpoint(*address) else { return LEFT };
    let station = headers.frame().destination;
    // Solicitations go to a group that only the one with the address is in.
    let is_for_peer = station == peer.mac || station[0] & GROUP != 0;
    if peer.network != network || peer.generation == own_generation || !is_for_peer {
        return LEFT;
    }
    maps::count_lane(Lane::Fast);
    kernel::redirect_peer(skb, peer.ifindex)
}

/// Whether an interface that a half has led to before is still that container's.
#[inline(always)]
pub(crate) fn leads_to_endpoint<F: Family>(exit: &Interface, half: &Flow<F::Address>) -> bool {
    exit.role == role::ENDPOINT && *F::address(exit) == half.to.dst
}

#[inline(always)]
fn by<F: Family>(
    packet: &Packet<'_, F>,
    half: &Flow<F::Address>,
    exit: u32,
    limit: u32,
) -> Decision<Option<Verdict>> {
    match if exit == 0 { LEFT } else { F::send(packet.skb(), exit, limit) } {
        LEFT => {
            maps::count_lane(Lane::Stack);
            Ok(None)
        }
        BROKEN => drop(Reason::Rewrite, half.network()),
        code => Ok(Some(Verdict::Sent(code))),
    }
}

/// Sends the packet whose headers lie in [`crate::maps::Maps::headers`], rewritten as the half in
/// [`crate::maps::Maps::half`] says, out of the interface `exit` if it has no more than `limit` bytes.
/// Returns what the hook has to return, [`LEFT`] or [`BROKEN`].
#[inline(always)]
pub(crate) fn send<F: Family>(skb: *mut __sk_buff, exit: u32, limit: u32) -> i32 {
    let ctx = TcContext::new(skb);
    let Some(packet) = Packet::<F>::parsed(&ctx) else { return LEFT };
    let (Some(half), Some(interface)) = (F::half(), maps::interface(exit)) else { return LEFT };
    let is_switched = half.stage == stage::SWITCH;
    let lasts = is_switched || packet.ttl > 1;
    if !lasts || !packet.is_plain_frame() || !packet.fits(limit.min(interface.mtu)) {
        return LEFT;
    }
    match carry(&packet, exit, interface, is_switched) {
        Ok(code) => {
            maps::count_lane(Lane::Fast);
            code
        }
        Err(_) => BROKEN,
    }
}

#[inline(always)]
fn carry<F: Family>(
    packet: &Packet<'_, F>,
    exit: u32,
    interface: &Interface,
    is_switched: bool,
) -> Result<i32, Reason> {
    packet.rewrite(u8::from(!is_switched))?;
    deliver(packet.context(), exit, interface, is_switched)
}

/// Sends a packet, as it is, out of the uplink `exit`, or into the container there: from another member
/// of its network if `is_switched`, else from the bridge.
#[inline(always)]
pub(crate) fn deliver(
    ctx: &TcContext,
    exit: u32,
    interface: &Interface,
    is_switched: bool,
) -> Result<i32, Reason> {
    if interface.role == role::UPLINK {
        return Ok(kernel::redirect_neighbour(exit));
    }
    let Some(frame) = Bytes::of(ctx, EthHdr::LEN) else { return Err(Reason::Rewrite) };
    let source = if is_switched {
        [frame.half(6), frame.half(8), frame.half(10)]
    } else {
        halves(&maps::network(interface.network).ok_or(Reason::NotReady)?.mac)
    };
    let destination = halves(&interface.mac);
    let pair = |a: u16, b: u16| {
        let ([a, b], [c, d]) = (a.to_ne_bytes(), b.to_ne_bytes());
        u32::from_ne_bytes([a, b, c, d])
    };
    frame.set_word(0, pair(destination[0], destination[1]));
    frame.set_word(4, pair(destination[2], source[0]));
    frame.set_word(8, pair(source[1], source[2]));
    Ok(kernel::redirect_peer(ctx.skb.skb, exit))
}

#[inline(always)]
fn halves(mac: &[u8; 6]) -> [u16; 3] {
    let [a, b, c, d, e, f] = *mac;
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]), u16::from_ne_bytes([e, f])]
}
