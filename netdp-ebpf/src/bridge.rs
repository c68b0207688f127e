//! `into_network`: the wall. Whatever the host's stack sends into a network passes here, wherever
//! it came in, so an interface without a program opens no hole.

use aya_ebpf::programs::TcContext;
use netdp_common::{
    counter::Reason,
    flow::{ZONE_WORLD, stage},
    interface::{Interface, role},
    network::{Network, flag},
};
use network_types::eth::EthHdr;

use crate::{
    family::Family,
    flow, maps, own_error, packet,
    packet::{Carried, Packet},
    verdict::{Decision, Verdict, drop},
};

/// The network whose bridge the hook is at.
#[inline(always)]
fn network(ctx: &TcContext) -> Decision<(u32, &'static Network)> {
    let Some(bridge) = maps::interface(packet::ifindex(ctx)) else {
        return drop(Reason::NotReady, 0);
    };
    let id = bridge.network;
    match maps::network(id) {
        Some(network) => Ok((id, network)),
        None => drop(Reason::NotReady, id),
    }
}

/// Anything but IP: ARP of the host, where the network carries IPv4.
#[inline(always)]
pub(crate) fn other_into_network(ctx: &TcContext, carried: Carried) -> Decision {
    let (id, network) = network(ctx)?;
    if carried == Carried::Arp && network.has(flag::IPV4) {
        return Ok(Verdict::Pass);
    }
    drop(Reason::Family, id)
}

/// An IP packet.
#[inline(always)]
pub(crate) fn into_network<F: Family>(ctx: &TcContext) -> Decision {
    let (id, network) = network(ctx)?;
    if !network.has(F::CARRIED) {
        return drop(Reason::Family, id);
    }
    let arrived_at = packet::arrived_at(ctx);
    if arrived_at == 0 {
        return from_host::<F>(ctx, id, network);
    }
    let origin = maps::interface(arrived_at);
    let zone = origin.filter(is_network).map_or(ZONE_WORLD, |origin| origin.network);
    let packet = Packet::<F>::parse(ctx, EthHdr::LEN, zone).or_else(|reason| drop(reason, id))?;
    packet.remember_ports();
    // An answer on its way back to a container that dialled one of the host's addresses.
    if zone != ZONE_WORLD
        && let Some(half) = flow::find(&packet, zone)
        && half.stage == stage::EGRESS
        && half.reply_zone() == id
    {
        packet.rewrite_by_parts(0).or_else(|reason| drop(reason, id))?;
        return Ok(Verdict::Pass);
    }
    if let Some(endpoint) = F::endpoint(packet.destination)
        && flow::allows_into(&packet, id, endpoint.generation, origin.is_some())?
    {
        return Ok(Verdict::Pass);
    }
    drop(if zone == ZONE_WORLD { Reason::DirectAccess } else { Reason::Isolation }, id)
}

#[inline(always)]
fn is_network(origin: &&'static Interface) -> bool {
    origin.role == role::NETWORK
}

/// From the host itself. Its own access needs no flow.
#[inline(always)]
fn from_host<F: Family>(ctx: &TcContext, id: u32, network: &Network) -> Decision {
    if network.has(flag::ISOLATED) {
        let packet = Packet::<F>::parse(ctx, EthHdr::LEN, 0).or_else(|reason| drop(reason, id))?;
        // Who is out of reach may still be found, as by ARP.
        return if F::is_discovery(&packet) {
            Ok(Verdict::Pass)
        } else {
            drop(Reason::HostAccess, id)
        };
    }
    if own_error::is_possible::<F>(ctx) {
        own_error::translate::<F>(ctx, EthHdr::LEN);
    }
    Ok(Verdict::Pass)
}
