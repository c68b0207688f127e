//! `from_container`: everything a container sends, before the bridge sees it.

use aya_ebpf::programs::TcContext;
use netdp_common::{
    addr::Be32,
    counter::Reason,
    flow::{Flow4, ZONE_WORLD, flag as flow_flag, stage},
    interface::{Interface, role},
    network::{Network, flag},
    publish::Published4,
};
use network_types::eth::EthHdr;

use crate::{
    flow::{self, NewFlow, SourcePorts},
    kernel, maps, packet,
    packet::{Arp, Frame, Packet},
    policy, publish,
    verdict::{Decision, Verdict, drop},
};

/// Who sends: its interface entry and its network.
struct Sender {
    interface: &'static Interface,
    id: u32,
    network: &'static Network,
}

impl Sender {
    #[inline(always)]
    fn drop<T>(&self, reason: Reason) -> Decision<T> {
        drop(reason, self.id)
    }

    /// Attributes a failed parse or rewrite to the sender's network.
    #[inline(always)]
    fn check<T>(&self, result: Result<T, Reason>) -> Decision<T> {
        result.or_else(|reason| self.drop(reason))
    }
}

#[inline(always)]
pub(crate) fn from_container(ctx: &TcContext) -> Decision {
    let sender = sender(packet::ifindex(ctx))?;
    let frame = sender.check(Frame::parse(ctx))?;
    if frame.source != sender.interface.mac {
        return sender.drop(Reason::SpoofedSource);
    }
    if packet::is_tagged(ctx) {
        return sender.drop(Reason::Family);
    }
    if frame.is_arp() {
        return arp(ctx, &sender);
    }
    if !frame.is_ipv4() {
        return sender.drop(Reason::Family);
    }
    let is_for_neighbour = frame.destination != sender.network.mac;
    let mut packet = sender.check(Packet::parse(ctx, EthHdr::LEN, sender.id))?;
    // An error is about a packet that came to the sender: others' flows are not its business.
    let own = sender.interface.address;
    if packet.source != own || packet.tuple.src != own {
        return sender.drop(Reason::SpoofedSource);
    }
    packet.remember_ports();
    if packet.destination.is_loopback() {
        return sender.drop(Reason::Martian);
    }
    // Flow first: an answer must match before isolation can drop it.
    match flow::follow(&packet, sender.id, sender.interface.generation)? {
        Some(half) => send_on(&mut packet, half, &sender),
        None => {
            // Whatever the address says, this is for a neighbour.
            if is_for_neighbour && !sender.network.has(flag::ICC) {
                return sender.drop(Reason::Icc);
            }
            decide(&mut packet, &sender)
        }
    }
}

#[inline(always)]
fn sender(ifindex: u32) -> Decision<Sender> {
    let Some(interface) = maps::interface(ifindex) else { return drop(Reason::NotReady, 0) };
    let id = interface.network;
    let Some(network) = maps::network(id) else { return drop(Reason::NotReady, 0) };
    if interface.role != role::ENDPOINT {
        return drop(Reason::NotReady, id);
    }
    Ok(Sender { interface, id, network })
}

/// ARP says only what is true of its sender (0.0.0.0 is a probe, RFC 5227).
#[inline(always)]
fn arp(ctx: &TcContext, sender: &Sender) -> Decision {
    let arp = sender.check(Arp::parse(ctx))?;
    let address = Be32 { raw: u32::from_ne_bytes(arp.sender_address) };
    let own = address == sender.interface.address || address.is_unspecified();
    if arp.sender_mac != sender.interface.mac || !own {
        return sender.drop(Reason::SpoofedArp);
    }
    Ok(Verdict::Pass)
}

/// What becomes of a packet without a flow.
#[inline(always)]
fn decide(packet: &mut Packet, sender: &Sender) -> Decision {
    let destination = packet.destination;
    let network = sender.network;
    if destination.is_multicast_or_broadcast() || network.is_broadcast(destination) {
        return to_neighbour(sender);
    }
    if maps::is_local(destination) {
        return to_host(packet, sender);
    }
    if network.contains(destination) {
        return to_neighbour(sender);
    }
    if network.flags & (flag::INTERNAL | flag::ISOLATED) != 0 {
        return sender.drop(Reason::Internal);
    }
    to_world(packet, sender)
}

/// To another member, by the bridge.
#[inline(always)]
fn to_neighbour(sender: &Sender) -> Decision {
    if !sender.network.has(flag::ICC) {
        return sender.drop(Reason::Icc);
    }
    Ok(Verdict::Pass)
}

/// To one of the host's own addresses: a published port, or the host itself.
#[inline(always)]
fn to_host(packet: &mut Packet, sender: &Sender) -> Decision {
    let network = sender.network;
    if network.has(flag::ISOLATED) {
        return sender.drop(Reason::HostAccess);
    }
    if network.has(flag::INTERNAL) {
        // Another network's gateway would be a way out.
        if packet.destination != network.gateway {
            return sender.drop(Reason::Internal);
        }
        return Ok(Verdict::Pass);
    }
    match publish::target(packet) {
        Some(target) => to_published(packet, sender, &target),
        None => Ok(Verdict::Pass),
    }
}

/// To a port that a container publishes, perhaps the sender itself.
#[inline(always)]
fn to_published(packet: &mut Packet, sender: &Sender, target: &Published4) -> Decision {
    let Some(endpoint) = maps::endpoint(target.address) else {
        return sender.drop(Reason::StaleFlow);
    };
    packet.require_opening(target.network)?;
    let same_network = target.network == sender.id;
    let Some(new) = maps::new_flow() else { return sender.drop(Reason::NotReady) };
    new.begin(packet, sender.id, target.network, target.network);
    new.reply_generation = endpoint.generation;
    new.reply_stage = stage::SWITCH;
    new.ports = SourcePorts::Preferred;
    let half = &mut new.half;
    half.to.dst = target.address;
    half.to.dport = target.port;
    half.generation = sender.interface.generation;
    half.stage = stage::SWITCH;
    if target.address == packet.tuple.src {
        // It would not take an answer from its own address off the wire.
        half.to.src = sender.network.gateway;
        new.ports = SourcePorts::Host;
    }
    if !same_network {
        let Some(network) = maps::network(target.network) else {
            return sender.drop(Reason::StaleFlow);
        };
        // Once, before the verdict: a policy that changes meanwhile must judge the flow again.
        half.policy_generation = network.policy_generation;
        if !policy::allows(target.network, network, packet.tuple.src) {
            return drop(Reason::Policy, target.network);
        }
        half.flags |= flow_flag::INBOUND;
        half.stage = stage::INGRESS;
        new.reply_stage = stage::EGRESS;
    }
    open(new, target.network, Reason::FlowHairpin, packet)?;
    send_on(packet, &new.half, sender)
}

/// Out through an uplink.
#[inline(always)]
fn to_world(packet: &mut Packet, sender: &Sender) -> Decision {
    let network = sender.network;
    if packet.ttl <= 1 {
        // The stack answers, and can't forward it.
        return Ok(Verdict::Pass);
    }
    // No route, a blackhole, forwarding off: the stack's to answer. `to_uplink` has no flow for
    // the packet then and would drop it.
    let Some(exit) = leave(packet, sender)? else { return Ok(Verdict::Pass) };
    let source = exit.address;
    packet.require_opening(sender.id)?;
    let Some(new) = maps::new_flow() else { return sender.drop(Reason::NotReady) };
    new.begin(packet, sender.id, ZONE_WORLD, sender.id);
    new.reply_generation = 0;
    new.reply_stage = stage::INGRESS;
    new.ports = SourcePorts::Kept;
    let half = &mut new.half;
    half.generation = sender.interface.generation;
    half.stage = stage::EGRESS;
    if network.has(flag::MASQUERADE) {
        half.to.src = if network.snat.is_unspecified() { source } else { network.snat };
        if half.to.src.is_unspecified() {
            return sender.drop(Reason::NoUplink);
        }
        let answer = half.to.reversed();
        let taken = kernel::has_socket(packet.skb(), &answer, packet.proto.into());
        new.ports = if taken { SourcePorts::Chosen } else { SourcePorts::Host };
    }
    open(new, sender.id, Reason::FlowOut, packet)?;
    Ok(Verdict::Pass)
}

#[inline(always)]
fn open(new: &mut NewFlow, network: u32, kind: Reason, packet: &Packet) -> Decision<()> {
    match flow::open(new) {
        Ok(()) => {
            maps::count(network, kind, packet.len());
            Ok(())
        }
        Err(reason) => drop(reason, network),
    }
}

/// Sends a packet of a flow on its way.
#[inline(always)]
fn send_on(packet: &mut Packet, half: &Flow4, sender: &Sender) -> Decision {
    match half.stage {
        stage::SWITCH => switch(packet, half, sender),
        stage::INGRESS => {
            sender.check(packet.rewrite(&half.to))?;
            Ok(Verdict::Pass)
        }
        // The route may have moved to an interface that would not translate.
        _ if half.reply_zone == ZONE_WORLD => leave(packet, sender).map(|_| Verdict::Pass),
        _ => Ok(Verdict::Pass),
    }
}

/// The uplink by which the packet leaves; `None` where the stack answers it instead.
#[inline(always)]
fn leave(packet: &Packet, sender: &Sender) -> Decision<Option<&'static Interface>> {
    let Some(ifindex) = packet.route(sender.network.bridge) else { return Ok(None) };
    match maps::interface(ifindex) {
        Some(exit) if exit.role == role::UPLINK => Ok(Some(exit)),
        Some(_) => sender.drop(Reason::Isolation),
        None => sender.drop(Reason::NoUplink),
    }
}

/// Rewrites the packet and lets the bridge carry it to its peer in the same network. The bridge
/// does not send out of the port it received on, so what is for the sender itself turns around.
#[inline(always)]
fn switch(packet: &mut Packet, half: &Flow4, sender: &Sender) -> Decision {
    let Some(peer) = maps::endpoint(half.to.dst).filter(|peer| peer.network == sender.id) else {
        return sender.drop(Reason::StaleFlow);
    };
    sender.check(packet.rewrite(&half.to))?;
    sender.check(packet.set_destination_mac(&peer.mac))?;
    if half.to.dst == sender.interface.address {
        sender.check(packet.set_source_mac(&sender.network.mac))?;
        return Ok(Verdict::TurnAround);
    }
    Ok(Verdict::Pass)
}
