//! `into_network`: the wall. Whatever the host's stack sends into a network passes here, wherever
//! it came in, so an interface without a program opens no hole.

use aya_ebpf::programs::TcContext;
use netdp_common::{
    counter::Reason,
    flow::{ZONE_WORLD, stage},
    interface::role,
    network::flag,
};
use network_types::eth::EthHdr;

use crate::{
    flow, maps, packet,
    packet::{Frame, Packet},
    verdict::{Decision, Verdict, drop},
};

#[inline(always)]
pub(crate) fn into_network(ctx: &TcContext) -> Decision {
    let Some(bridge) = maps::interface(packet::ifindex(ctx)) else {
        return drop(Reason::NotReady, 0);
    };
    let id = bridge.network;
    let Some(network) = maps::network(id) else { return drop(Reason::NotReady, id) };
    let frame = Frame::parse(ctx).or_else(|reason| drop(reason, id))?;
    if frame.is_arp() {
        return Ok(Verdict::Pass);
    }
    if !frame.is_ipv4() {
        return drop(Reason::Family, id);
    }
    let arrived_at = packet::arrived_at(ctx);
    if arrived_at == 0 {
        // From the host itself. Its own access needs no flow.
        if network.has(flag::ISOLATED) {
            return drop(Reason::HostAccess, id);
        }
        return Ok(Verdict::Pass);
    }
    let origin = maps::interface(arrived_at);
    let from_network = origin.filter(|origin| origin.role == role::NETWORK);
    let zone = from_network.map_or(ZONE_WORLD, |origin| origin.network);
    let mut packet = Packet::parse(ctx, EthHdr::LEN, zone).or_else(|reason| drop(reason, id))?;
    packet.remember_ports();
    // An answer on its way back to a container that dialled one of the host's addresses.
    if zone != ZONE_WORLD
        && let Some(half) = flow::find(&packet, zone)
        && half.stage == stage::EGRESS
        && half.reply_zone == id
    {
        packet.rewrite(&half.to).or_else(|reason| drop(reason, id))?;
        return Ok(Verdict::Pass);
    }
    if let Some(endpoint) = maps::endpoint(packet.destination)
        && flow::allows_into(&packet, id, endpoint.generation, origin.is_some())?
    {
        return Ok(Verdict::Pass);
    }
    drop(if zone == ZONE_WORLD { Reason::DirectAccess } else { Reason::Isolation }, id)
}
