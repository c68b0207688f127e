//! `into_network`: the wall. Whatever the host's stack sends into a network passes here, wherever
//! it came in, so an interface without a program opens no hole.

use aya_ebpf::programs::TcContext;
use netdp_common::{counter::Reason, flow::stage, interface::role, network::flag};
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
    let mut packet = Packet::parse(ctx, EthHdr::LEN).or_else(|reason| drop(reason, id))?;
    let origin = maps::interface(arrived_at);
    let from_network = origin.filter(|origin| origin.role == role::NETWORK);
    // An answer on its way back to a container that dialled one of the host's addresses.
    if let Some(origin) = from_network
        && let Some(half) = flow::find(&packet, origin.network)
        && half.stage == stage::EGRESS
        && half.reply_zone == id
    {
        packet.rewrite(&half.to).or_else(|reason| drop(reason, id))?;
        return Ok(Verdict::Pass);
    }
    let Some(endpoint) = maps::endpoint(packet.tuple.dst) else {
        return drop(refusal(from_network.is_some()), id);
    };
    if flow::allows_into(&packet, id, endpoint.generation)? {
        return Ok(Verdict::Pass);
    }
    drop(refusal(from_network.is_some()), id)
}

/// The reason that names where the packet came from.
#[inline(always)]
fn refusal(from_network: bool) -> Reason {
    if from_network { Reason::Isolation } else { Reason::DirectAccess }
}
