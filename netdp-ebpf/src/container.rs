//! `from_container`: everything a container sends, before the bridge sees it.

use aya_ebpf::programs::TcContext;
use netdp_common::{
    addr::{Address, Be32},
    counter::Reason,
    flow::{Flow, IPPROTO_UDP, ZONE_WORLD, flag as flow_flag, stage},
    interface::{Interface, role},
    network::{Network, flag},
    publish::Published,
};
use network_types::eth::EthHdr;

use crate::{
    family::Family,
    flow::{self, SourcePorts},
    mapping, maps, packet,
    packet::{Arp, Frame, Packet, Route},
    policy, publish, refuse, shortcut,
    verdict::{Decision, Verdict, drop},
};

/// Who sends: its interface entry and its network.
pub(crate) struct Sender {
    pub(crate) interface: &'static Interface,
    pub(crate) id: u32,
    pub(crate) network: &'static Network,
    /// Whether the frame is addressed to another station than the bridge: whatever its addresses
    /// say, it is for a neighbour.
    pub(crate) is_for_neighbour: bool,
}

impl Sender {
    /// Who sends through the interface whose hook runs.
    #[inline(always)]
    fn at(ctx: &TcContext) -> Decision<Self> {
        let Some(interface) = maps::interface(packet::ifindex(ctx)) else {
            return drop(Reason::NotReady, 0);
        };
        let id = interface.network;
        let Some(network) = maps::network(id) else { return drop(Reason::NotReady, id) };
        if interface.role != role::ENDPOINT {
            return drop(Reason::NotReady, id);
        }
        Ok(Self { interface, id, network, is_for_neighbour: false })
    }

    /// The same, of a frame that is not parsed any further.
    #[inline(always)]
    fn of_frame(ctx: &TcContext) -> Decision<Self> {
        let mut sender = Self::at(ctx)?;
        let frame = sender.check(Frame::parse(ctx))?;
        sender.check_frame(ctx, &frame)?;
        Ok(sender)
    }

    /// Drops a frame with another source MAC or a VLAN tag, and notes whom it is for.
    #[inline(always)]
    fn check_frame(&mut self, ctx: &TcContext, frame: &Frame) -> Decision<()> {
        if frame.source != self.interface.mac {
            return self.drop(Reason::SpoofedSource);
        }
        if packet::is_tagged(ctx) {
            return self.drop(Reason::Family);
        }
        self.is_for_neighbour = frame.destination != self.network.mac;
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn drop<T>(&self, reason: Reason) -> Decision<T> {
        drop(reason, self.id)
    }

    /// Attributes a failed parse or rewrite to the sender's network.
    #[inline(always)]
    pub(crate) fn check<T>(&self, result: Result<T, Reason>) -> Decision<T> {
        result.or_else(|reason| self.drop(reason))
    }

    /// Drops a frame of a family that the network does not carry.
    #[inline(always)]
    fn require(&self, carried: u32) -> Decision<()> {
        if self.network.has(carried) { Ok(()) } else { self.drop(Reason::Family) }
    }
}

/// An IP packet of a container.
#[inline(always)]
pub(crate) fn from_container<F: Family>(ctx: &TcContext) -> Decision {
    judge::<F>(ctx).or_else(|dropped| {
        let bytes = ctx.len();
        if refuse::is_told(dropped.reason) && F::answer(ctx.skb.skb, packet::ifindex(ctx)) != 0 {
            return Ok(Verdict::Answer(dropped, bytes));
        }
        Err(dropped)
    })
}

#[inline(always)]
fn judge<F: Family>(ctx: &TcContext) -> Decision {
    let mut sender = Sender::at(ctx)?;
    // Who forges a MAC address may well forge the rest: the frame comes first.
    let parsed = Packet::<F>::parse(ctx, EthHdr::LEN, sender.id);
    let packet = sender.check(parsed)?;
    sender.check_frame(ctx, &packet.frame())?;
    sender.require(F::CARRIED)?;
    if let Some(decision) = F::on_link(&packet, &sender) {
        return decision;
    }
    // An error is about a packet that came to the sender: others' flows are not its business.
    let own = *F::address(sender.interface);
    if packet.source != own || packet.tuple.src != own {
        return sender.drop(Reason::SpoofedSource);
    }
    packet.remember_ports();
    if packet.destination.is_loopback() {
        return sender.drop(Reason::Martian);
    }
    // Flow first: an answer must match before isolation can drop it.
    match flow::follow(&packet, sender.id, sender.interface.generation)? {
        Some(half) => send_on(&packet, half, &sender),
        None => {
            if sender.is_for_neighbour && !sender.network.has(flag::ICC) {
                return sender.drop(Reason::Icc);
            }
            decide(&packet, &sender)
        }
    }
}

/// An ARP packet of a container. It says only what is true of its sender (0.0.0.0 is a probe, RFC
/// 5227).
#[inline(always)]
pub(crate) fn arp_from_container(ctx: &TcContext) -> Decision {
    let sender = Sender::of_frame(ctx)?;
    sender.require(flag::IPV4)?;
    let arp = sender.check(Arp::parse(ctx))?;
    let address = Be32 { raw: u32::from_ne_bytes(arp.sender_address) };
    let own = address == sender.interface.ipv4 || address.is_unspecified();
    if arp.sender_mac != sender.interface.mac || !own {
        return sender.drop(Reason::SpoofedArp);
    }
    Ok(Verdict::Pass)
}

/// Anything else from a container.
#[inline(always)]
pub(crate) fn other_from_container(ctx: &TcContext) -> Decision {
    Sender::of_frame(ctx)?.drop(Reason::Family)
}

/// What becomes of a packet without a flow.
#[inline(always)]
fn decide<F: Family>(packet: &Packet<'_, F>, sender: &Sender) -> Decision {
    let destination = packet.destination;
    let network = sender.network;
    let subnet = F::subnet(network);
    if destination.is_multicast_or_broadcast() || subnet.is_broadcast(destination) {
        return to_neighbour(packet, sender);
    }
    if F::is_local(destination) {
        return to_host(packet, sender);
    }
    if subnet.contains(destination) {
        return to_neighbour(packet, sender);
    }
    if network.flags & (flag::INTERNAL | flag::ISOLATED) != 0 {
        return sender.drop(Reason::Internal);
    }
    to_world(packet, sender)
}

/// To another member, by the bridge.
#[inline(always)]
fn to_neighbour<F: Family>(packet: &Packet<'_, F>, sender: &Sender) -> Decision {
    if poses_as_dhcp_server(packet) {
        return sender.drop(Reason::Impostor);
    }
    if !sender.network.has(flag::ICC) {
        return sender.drop(Reason::Icc);
    }
    Ok(shortcut::to_neighbour(packet, sender, shortcut::to_destination))
}

/// Whether it is what a DHCP server sends to its clients (RFC 2131, 4.1; RFC 8415, 7.2).
#[inline(always)]
pub(crate) fn poses_as_dhcp_server<F: Family>(packet: &Packet<'_, F>) -> bool {
    packet.proto == IPPROTO_UDP
        && matches!((packet.tuple.sport.get(), packet.tuple.dport.get()), (67, 68) | (547, 546))
}

/// To one of the host's own addresses: a published port, or the host itself.
#[inline(always)]
fn to_host<F: Family>(packet: &Packet<'_, F>, sender: &Sender) -> Decision {
    let network = sender.network;
    if network.has(flag::ISOLATED) {
        return sender.drop(Reason::HostAccess);
    }
    if network.has(flag::INTERNAL) {
        // Another network's gateway would be a way out.
        if packet.destination != F::subnet(network).gateway {
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
fn to_published<F: Family>(
    packet: &Packet<'_, F>,
    sender: &Sender,
    target: &Published<F::Address>,
) -> Decision {
    let Some(endpoint) = F::endpoint(target.address) else {
        return sender.drop(Reason::StaleFlow);
    };
    packet.require_opening(target.network)?;
    let same_network = target.network == sender.id;
    let Some(new) = F::new_flow() else { return sender.drop(Reason::NotReady) };
    new.prepare(packet, sender.id, target.network, target.network);
    new.reply.generation = endpoint.generation;
    new.reply.stage = stage::SWITCH;
    new.ports = SourcePorts::Preferred;
    let half = &mut new.half;
    half.to.dst = target.address;
    half.to.dport = target.port;
    half.generation = sender.interface.generation;
    half.stage = stage::SWITCH;
    if target.address == packet.tuple.src {
        // It would not take an answer from its own address off the wire.
        half.to.src = F::subnet(sender.network).gateway;
        new.ports = SourcePorts::Host;
    } else {
        half.exit = shortcut::exit_to(endpoint);
    }
    if !same_network {
        let Some(network) = maps::network(target.network) else {
            return sender.drop(Reason::StaleFlow);
        };
        // Once, before the verdict: a policy that changes meanwhile must judge the flow again.
        half.policy_generation = network.policy_generation;
        if !policy::allows::<F>(target.network, network, packet.tuple.src) {
            return drop(Reason::Policy, target.network);
        }
        half.flags |= flow_flag::INBOUND;
        half.stage = stage::INGRESS;
        new.reply.stage = stage::EGRESS;
    }
    let limit = sender.network.endpoint_flows;
    let half = flow::begin(packet, target.network, Reason::FlowHairpin, limit)?;
    send_on(packet, half, sender)
}

/// Out through an uplink.
#[inline(always)]
fn to_world<F: Family>(packet: &Packet<'_, F>, sender: &Sender) -> Decision {
    let network = sender.network;
    if packet.ttl <= 1 {
        // The stack answers, and can't forward it.
        return Ok(Verdict::Pass);
    }
    let Some((route, exit)) = leave(packet, sender)? else { return stay(packet, sender) };
    packet.require_opening(sender.id)?;
    // Where it lies in a map: a copy would have to stay on the stack.
    let snat = &F::subnet(network).snat;
    let source = if snat.is_unspecified() { F::address(exit) } else { snat };
    let is_mapped =
        network.has(flag::MASQUERADE | flag::MAPPING) && mapping::is_for(packet.transport);
    let mapped = if is_mapped { mapping::source(packet, sender, source)? } else { None };
    let Some(new) = F::new_flow() else { return sender.drop(Reason::NotReady) };
    new.prepare(packet, sender.id, ZONE_WORLD, sender.id);
    new.reply.generation = 0;
    new.reply.stage = stage::INGRESS;
    new.ports = SourcePorts::Kept;
    let half = &mut new.half;
    half.generation = sender.interface.generation;
    half.exit = shortcut::exit_by(route, exit);
    half.stage = stage::EGRESS;
    if network.has(flag::MASQUERADE) {
        half.to.src = *source;
        if half.to.src.is_unspecified() {
            return sender.drop(Reason::NoUplink);
        }
        new.ports = SourcePorts::Host;
        if let Some(port) = mapped {
            half.to.sport = port;
            half.flags |= flow_flag::MAPPED;
            new.ports = SourcePorts::Mapped;
        }
    }
    let half = flow::begin(packet, sender.id, Reason::FlowOut, network.endpoint_flows)?;
    let sent = shortcut::out(packet, half, sender.id, route, exit)?;
    Ok(sent.unwrap_or(Verdict::Pass))
}

/// Sends a packet of a flow on its way.
#[inline(always)]
fn send_on<F: Family>(
    packet: &Packet<'_, F>,
    half: &Flow<F::Address>,
    sender: &Sender,
) -> Decision {
    match half.stage {
        stage::SWITCH => switch(packet, half, sender),
        // The route may have moved to an interface that would not translate.
        stage::EGRESS if half.reply_zone() == ZONE_WORLD => match leave(packet, sender)? {
            Some((route, exit)) => {
                let sent = shortcut::out(packet, half, sender.id, route, exit)?;
                Ok(sent.unwrap_or(Verdict::Pass))
            }
            None => stay(packet, sender),
        },
        stage => {
            if let Some(sent) = shortcut::into_container(packet, half, sender.id)? {
                return Ok(sent);
            }
            if stage == stage::INGRESS {
                sender.check(packet.rewrite(0))?;
            }
            Ok(Verdict::Pass)
        }
    }
}

/// No route, a blackhole, forwarding off: the stack's to answer. Before it looks, a route may
/// appear, by an interface that has no program yet and would not translate: so the packet ends
/// here.
#[inline(always)]
fn stay<F: Family>(packet: &Packet<'_, F>, sender: &Sender) -> Decision {
    sender.check(packet.end_life())?;
    Ok(Verdict::Pass)
}

/// The uplink by which the packet leaves, and how; `None` where the stack answers it instead.
#[inline(always)]
fn leave<F: Family>(
    packet: &Packet<'_, F>,
    sender: &Sender,
) -> Decision<Option<(Route, &'static Interface)>> {
    let Some(route) = packet.route(sender.network.bridge) else { return Ok(None) };
    match maps::interface(route.ifindex) {
        Some(exit) if exit.role == role::UPLINK => Ok(Some((route, exit))),
        Some(_) => sender.drop(Reason::Isolation),
        None => sender.drop(Reason::NoUplink),
    }
}

/// Rewrites the packet and lets the bridge carry it to its peer in the same network. The bridge
/// does not send out of the port it received on, so what is for the sender itself turns around.
#[inline(always)]
fn switch<F: Family>(packet: &Packet<'_, F>, half: &Flow<F::Address>, sender: &Sender) -> Decision {
    let is_for_itself = half.to.dst == *F::address(sender.interface);
    if !is_for_itself && let Some(sent) = shortcut::into_container(packet, half, sender.id)? {
        return Ok(sent);
    }
    let Some(peer) = F::endpoint(half.to.dst).filter(|peer| peer.network == sender.id) else {
        return sender.drop(Reason::StaleFlow);
    };
    sender.check(packet.rewrite(0))?;
    sender.check(packet.set_destination_mac(&peer.mac))?;
    if is_for_itself {
        sender.check(packet.set_source_mac(&sender.network.mac))?;
        return Ok(Verdict::TurnAround);
    }
    Ok(Verdict::Pass)
}
