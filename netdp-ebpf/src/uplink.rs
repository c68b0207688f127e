//! `from_uplink` and `to_uplink`: the doors.

use aya_ebpf::programs::TcContext;
use netdp_common::{
    addr::{Address, Be16},
    counter::Reason,
    flow::{Flow, ZONE_WORLD, flag as flow_flag, stage},
    interface::{Interface, role},
    network::flag,
};

use crate::{
    family::Family,
    flow::{self, SourcePorts},
    mapping, maps, own_error, packet,
    packet::{Packet, Transport},
    policy, publish, shortcut,
    verdict::{Decision, Verdict, drop},
};

#[inline(always)]
pub(crate) fn from_uplink<F: Family>(ctx: &TcContext) -> Decision {
    // An uplink that has just appeared: `into_network` lets nothing in without a flow.
    let Some(uplink) = maps::interface(packet::ifindex(ctx)) else { return Ok(Verdict::Pass) };
    if packet::ip_offset(uplink) != 0 && packet::is_for_another(ctx) {
        // For an interface on top of this one, which is an uplink itself, or for nobody here.
        return Ok(Verdict::Pass);
    }
    // What makes no sense is the stack's to drop.
    let Ok(packet) = Packet::<F>::parse(ctx, packet::ip_offset(uplink), ZONE_WORLD) else {
        return Ok(Verdict::Pass);
    };
    packet.remember_ports();
    if packet.source.is_loopback() || packet.destination.is_loopback() {
        return drop(Reason::Martian, 0);
    }
    match flow::follow(&packet, ZONE_WORLD, 0)? {
        Some(half) => send_on(&packet, half),
        None => decide(&packet, uplink, packet::ifindex(ctx)),
    }
}

/// Sends a packet of a flow on its way to its container.
#[inline(always)]
fn send_on<F: Family>(packet: &Packet<'_, F>, half: &Flow<F::Address>) -> Decision {
    if let Some(sent) = shortcut::into_container(packet, half, ZONE_WORLD)? {
        return Ok(sent);
    }
    packet.rewrite(0).or_else(|reason| drop(reason, half.network()))?;
    Ok(Verdict::Pass)
}

/// What becomes of a packet without a flow.
#[inline(always)]
fn decide<F: Family>(packet: &Packet<'_, F>, uplink: &Interface, ifindex: u32) -> Decision {
    if packet.source.is_link_local() {
        // Nobody forwards it, so no container can answer it.
        return Ok(Verdict::Pass);
    }
    if let Some(network) = F::network_of(packet.source) {
        return drop(Reason::OutsideSpoof, network);
    }
    let destination = packet.destination;
    if is_local::<F>(destination, uplink) {
        return match publish::target(packet) {
            Some(target) => admit(packet, target.address, target.port, target.network, 0),
            None => match mapping::admits(packet) {
                Some(half) => {
                    admit(packet, half.to.dst, half.to.dport, half.network(), flow_flag::MAPPED)
                }
                None => Ok(Verdict::Pass),
            },
        };
    }
    if destination.is_multicast_or_broadcast() || destination.is_link_local() {
        return Ok(Verdict::Pass);
    }
    if let Some(network) = F::network_of(destination) {
        return to_container(packet, network);
    }
    if uplink.flags & F::FORWARDED == 0 {
        // We switched forwarding on for our networks' sake; the host does not become a router.
        if packet.route(ifindex).is_some() {
            return drop(Reason::NotRouted, 0);
        }
    }
    Ok(Verdict::Pass)
}

/// [`maps::Maps::is_local`], for a packet that arrived at `uplink`: most are for the address that it has
/// itself, for which no table has to be asked.
#[inline(always)]
fn is_local<F: Family>(address: F::Address, uplink: &Interface) -> bool {
    address == *F::address(uplink) && !address.is_unspecified() || F::is_local(address)
}

/// Straight to a container's address: only where the network is open.
#[inline(always)]
fn to_container<F: Family>(packet: &Packet<'_, F>, id: u32) -> Decision {
    let Some(network) = maps::network(id) else { return drop(Reason::NotReady, id) };
    let open = network.has(flag::UNPROTECTED)
        || network.has(flag::ROUTED)
            && (packet.transport == Transport::Query
                || publish::at::<F>(packet.tuple.dst, packet.tuple.dport, packet.proto).is_some());
    if !open {
        return drop(Reason::DirectAccess, id);
    }
    admit(packet, packet.tuple.dst, packet.tuple.dport, id, 0)
}

/// Opens a flow to a container's port in network `id`, if its policy lets the source in; `by` is
/// what its flags say besides.
#[inline(always)]
fn admit<F: Family>(
    packet: &Packet<'_, F>,
    address: F::Address,
    port: Be16,
    id: u32,
    by: u8,
) -> Decision {
    let Some(network) = maps::network(id) else { return drop(Reason::NotReady, id) };
    let Some(endpoint) = F::endpoint(address) else { return drop(Reason::StaleFlow, id) };
    packet.require_opening(id)?;
    if F::is_local(packet.tuple.src) {
        return drop(Reason::Martian, id);
    }
    // Once, before the verdict: a policy that changes meanwhile must judge the flow again.
    let policy_generation = network.policy_generation;
    if !policy::allows::<F>(id, network, packet.tuple.src) {
        return drop(Reason::Policy, id);
    }
    let translated = address != packet.tuple.dst;
    let Some(new) = F::new_flow() else { return drop(Reason::NotReady, id) };
    new.prepare(packet, ZONE_WORLD, id, id);
    new.half.to.dst = address;
    new.half.to.dport = port;
    new.half.flags |= flow_flag::INBOUND | by;
    new.half.policy_generation = policy_generation;
    new.half.stage = stage::INGRESS;
    new.half.exit = shortcut::exit_to(endpoint);
    new.reply.generation = endpoint.generation;
    new.reply.stage = stage::EGRESS;
    new.ports = if translated { SourcePorts::Preferred } else { SourcePorts::Kept };
    let half = flow::begin(packet, id, Reason::FlowIn, 0)?;
    send_on(packet, half)
}

/// Where a packet that leaves by an uplink comes from: the network's id. `None`: from no network.
#[inline(always)]
fn origin(ctx: &TcContext) -> Option<u32> {
    maps::interface(packet::arrived_at(ctx))
        .filter(|origin| origin.role == role::NETWORK)
        .map(|origin| origin.network)
}

/// Neither IPv4 nor IPv6.
#[inline(always)]
pub(crate) fn other_to_uplink(ctx: &TcContext) -> Decision {
    match origin(ctx) {
        Some(id) => drop(Reason::Family, id),
        None => Ok(Verdict::Pass),
    }
}

#[inline(always)]
pub(crate) fn to_uplink<F: Family>(ctx: &TcContext) -> Decision {
    let uplink = || maps::interface(packet::ifindex(ctx));
    if packet::arrived_at(ctx) == 0 {
        // The host's own traffic.
        if own_error::is_possible::<F>(ctx)
            && let Some(uplink) = uplink()
        {
            own_error::translate::<F>(ctx, packet::ip_offset(uplink));
        }
        return Ok(Verdict::Pass);
    }
    let Some(id) = origin(ctx) else { return Ok(Verdict::Pass) };
    let Some(uplink) = uplink() else { return drop(Reason::NotReady, id) };
    let ip = packet::ip_offset(uplink);
    let packet = Packet::<F>::parse(ctx, ip, id).or_else(|reason| drop(reason, id))?;
    packet.remember_ports();
    if packet.source != packet.tuple.src {
        // An error of a container about somebody else's packet.
        return drop(Reason::Unmasqueraded, id);
    }
    // `from_container` has opened a flow for everything that may leave.
    match flow::find(&packet, id) {
        Some(half) if half.stage == stage::EGRESS && half.reply_zone() == ZONE_WORLD => {
            packet.rewrite_by_parts(0).or_else(|reason| drop(reason, id))?;
            Ok(Verdict::Pass)
        }
        // A container has no other source than its own: an uplink on top of this one (VLAN,
        // macvlan) has translated the packet.
        None if F::network_of(packet.source) != Some(id) => Ok(Verdict::Pass),
        _ => drop(Reason::Unmasqueraded, id),
    }
}
