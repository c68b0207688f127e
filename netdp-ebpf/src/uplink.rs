//! `from_uplink` and `to_uplink`: the doors.

use aya_ebpf::programs::TcContext;
use netdp_common::{
    addr::Tuple4,
    counter::Reason,
    flow::{ZONE_WORLD, flag as flow_flag, stage},
    interface::{Interface, flag as interface_flag, role},
    network::flag,
};
use network_types::eth::EthHdr;

use crate::{
    flow::{self, SourcePorts},
    maps, packet,
    packet::{Frame, Packet, Transport},
    policy, publish,
    verdict::{Decision, Verdict, drop},
};

/// Offset of the IPv4 header; `None` where the packet is no IPv4.
#[inline(always)]
fn ipv4_offset(ctx: &TcContext, uplink: &Interface) -> Option<usize> {
    if uplink.flags & interface_flag::ETHERNET == 0 {
        // The version of an IPv6 packet makes it malformed.
        return Some(0);
    }
    Frame::parse(ctx).ok()?.is_ipv4().then_some(EthHdr::LEN)
}

#[inline(always)]
pub(crate) fn from_uplink(ctx: &TcContext) -> Decision {
    // An uplink that has just appeared: `into_network` lets nothing in without a flow.
    let Some(uplink) = maps::interface(packet::ifindex(ctx)) else { return Ok(Verdict::Pass) };
    if packet::is_for_another(ctx) {
        // For an interface on top of this one, which is an uplink itself, or for nobody here.
        return Ok(Verdict::Pass);
    }
    let Some(ip) = ipv4_offset(ctx, uplink) else { return Ok(Verdict::Pass) };
    // What makes no sense is the stack's to drop.
    let Ok(mut packet) = Packet::parse(ctx, ip, ZONE_WORLD) else { return Ok(Verdict::Pass) };
    packet.remember_ports();
    if packet.source.is_loopback() || packet.destination.is_loopback() {
        return drop(Reason::Martian, 0);
    }
    match flow::follow(&packet, ZONE_WORLD, 0)? {
        Some(half) => {
            packet.rewrite(&half.to).or_else(|reason| drop(reason, half.network))?;
            Ok(Verdict::Pass)
        }
        None => decide(&mut packet, uplink, packet::ifindex(ctx)),
    }
}

/// What becomes of a packet without a flow.
#[inline(always)]
fn decide(packet: &mut Packet, uplink: &Interface, ifindex: u32) -> Decision {
    if let Some(network) = maps::subnet(packet.source) {
        return drop(Reason::OutsideSpoof, network);
    }
    let destination = packet.destination;
    if maps::is_local(destination) {
        return match publish::target(packet) {
            Some(target) => {
                let to = Tuple4 { dst: target.address, dport: target.port, ..packet.tuple };
                admit(packet, to, target.network)
            }
            None => Ok(Verdict::Pass),
        };
    }
    if destination.is_multicast_or_broadcast() {
        return Ok(Verdict::Pass);
    }
    if let Some(network) = maps::subnet(destination) {
        return to_container(packet, network);
    }
    if uplink.flags & interface_flag::FORWARDED_BEFORE == 0 {
        // We switched forwarding on for our networks' sake; the host does not become a router.
        if packet.route(ifindex).is_some() {
            return drop(Reason::NotRouted, 0);
        }
    }
    Ok(Verdict::Pass)
}

/// Straight to a container's address: only where the network is open.
#[inline(always)]
fn to_container(packet: &mut Packet, id: u32) -> Decision {
    let Some(network) = maps::network(id) else { return drop(Reason::NotReady, id) };
    let open = network.has(flag::UNPROTECTED)
        || network.has(flag::ROUTED)
            && (packet.transport == Transport::Query
                || publish::at(packet.tuple.dst, packet.tuple.dport, packet.proto).is_some());
    if !open {
        return drop(Reason::DirectAccess, id);
    }
    admit(packet, packet.tuple, id)
}

/// Opens a flow into network `id`, if its policy lets the source in.
#[inline(always)]
fn admit(packet: &mut Packet, to: Tuple4, id: u32) -> Decision {
    let Some(network) = maps::network(id) else { return drop(Reason::NotReady, id) };
    let Some(endpoint) = maps::endpoint(to.dst) else { return drop(Reason::StaleFlow, id) };
    packet.require_opening(id)?;
    if maps::is_local(packet.tuple.src) {
        return drop(Reason::Martian, id);
    }
    // Once, before the verdict: a policy that changes meanwhile must judge the flow again.
    let policy_generation = network.policy_generation;
    if !policy::allows(id, network, packet.tuple.src) {
        return drop(Reason::Policy, id);
    }
    let translated = to.dst != packet.tuple.dst;
    let Some(new) = maps::new_flow() else { return drop(Reason::NotReady, id) };
    new.begin(packet, ZONE_WORLD, id, id);
    new.half.to = to;
    new.half.flags |= flow_flag::INBOUND;
    new.half.policy_generation = policy_generation;
    new.half.stage = stage::INGRESS;
    new.reply_generation = endpoint.generation;
    new.reply_stage = stage::EGRESS;
    new.ports = if translated { SourcePorts::Preferred } else { SourcePorts::Kept };
    flow::open(new).or_else(|reason| drop(reason, id))?;
    maps::count(id, Reason::FlowIn, packet.len());
    packet.rewrite(&new.half.to).or_else(|reason| drop(reason, id))?;
    Ok(Verdict::Pass)
}

#[inline(always)]
pub(crate) fn to_uplink(ctx: &TcContext) -> Decision {
    let arrived_at = packet::arrived_at(ctx);
    if arrived_at == 0 {
        // The host's own traffic.
        return Ok(Verdict::Pass);
    }
    let Some(origin) = maps::interface(arrived_at) else { return Ok(Verdict::Pass) };
    if origin.role != role::NETWORK {
        return Ok(Verdict::Pass);
    }
    let id = origin.network;
    let Some(uplink) = maps::interface(packet::ifindex(ctx)) else {
        return drop(Reason::NotReady, id);
    };
    let Some(ip) = ipv4_offset(ctx, uplink) else { return drop(Reason::Family, id) };
    let mut packet = Packet::parse(ctx, ip, id).or_else(|reason| drop(reason, id))?;
    packet.remember_ports();
    // `from_container` has opened a flow for everything that may leave.
    match flow::find(&packet, id) {
        Some(half) if half.stage == stage::EGRESS && half.reply_zone == ZONE_WORLD => {
            packet.rewrite(&half.to).or_else(|reason| drop(reason, id))?;
            Ok(Verdict::Pass)
        }
        // A container has no other source than its own: an uplink on top of this one (VLAN,
        // macvlan) has translated the packet.
        None if maps::subnet(packet.source) != Some(id) => Ok(Verdict::Pass),
        _ => drop(Reason::Unmasqueraded, id),
    }
}
