//! Mappings: in networks that ask for it, an endpoint's port has one port outside whomever it talks
//! to (RFC 4787, REQ-1), and, if that is asked for, too, whoever sends there reaches it (REQ-8).
//!
//! A mapping is a flow to nobody, opened like any other; the flows that leave by it keep it alive.

use netdp_common::{
    addr::{Be16, Tuple},
    counter::Reason,
    flow::{Flow, FlowKey, ZONE_MAPPING, ZONE_WORLD, seen, stage},
    network::flag,
};

use crate::{
    container::Sender,
    family::Family,
    flow::{self, SourcePorts},
    kernel, maps,
    packet::{Packet, Transport},
    table::{self, FlowRef},
    verdict::Decision,
};

/// The source that the mapping of the packet's sender gives it, which is opened where there is
/// none; `None` where that leaves by another address than `exit`: the route has moved.
#[inline(always)]
pub(crate) fn source<F: Family>(
    packet: &Packet<'_, F>,
    sender: &Sender,
    exit: &F::Address,
) -> Decision<Option<Be16>> {
    let (Some(half), Some(new)) = (F::half(), F::new_flow()) else {
        return sender.drop(Reason::NotReady);
    };
    new.prepare(packet, sender.id, ZONE_WORLD | ZONE_MAPPING, sender.id);
    new.key.make_mapping();
    if let Some(found) = table::flow::<F>(&new.key)
        && found.copy_of(&new.key, half)
    {
        if half.generation == sender.interface.generation {
            let leaves_there = half.to.src == *exit;
            return Ok(leaves_there.then_some(half.to.sport));
        }
        flow::remove::<F>(&new.key);
    }
    new.half.to = new.key.tuple;
    new.half.to.src = *exit;
    new.half.generation = sender.interface.generation;
    new.half.stage = stage::EGRESS;
    // It is not a connection that could be half open: it lives as long as what leaves by it.
    new.half.seen = seen::ANY | seen::DATA;
    new.reply.seen = new.half.seen;
    new.reply.generation = sender.interface.generation;
    new.reply.stage = stage::INGRESS;
    new.ports = SourcePorts::Host;
    flow::begin(packet, sender.id, Reason::Mapping, sender.network.endpoint_flows)?;
    Ok((new.half.to.src == *exit).then_some(new.half.to.sport))
}

/// Whether the ports of the protocol are mapped.
#[inline(always)]
pub(crate) fn is_for(transport: Transport) -> bool {
    matches!(transport, Transport::Tcp | Transport::Udp | Transport::Query)
}

/// Keeps the mapping alive by which packets of `key` leave, and makes that its key.
#[inline(always)]
pub(crate) fn refresh<F: Family>(key: &mut FlowKey<F::Address>) {
    key.make_mapping();
    if let Some(mapping) = table::flow::<F>(key) {
        mapping.refresh(kernel::now());
    }
}

/// The world's half of the mapping that lets a packet in that no flow and no published port did.
#[inline(always)]
pub(crate) fn admits<F: Family>(packet: &Packet<'_, F>) -> Option<&'static Flow<F::Address>> {
    if maps::config()?.has_mappings == 0
        || !matches!(packet.transport, Transport::Tcp | Transport::Udp)
    {
        return None;
    }
    let half = F::half()?;
    let Tuple { dst, dport, .. } = packet.tuple;
    if !mapping_at::<F>(dst, dport, packet.proto)?.copy_of(F::wanted()?, half) {
        return None;
    }
    let endpoint = F::endpoint(half.to.dst)?;
    let is_open = maps::network(half.network())?.has(flag::MAPPING | flag::FULL_CONE)
        && endpoint.generation == half.generation
        // A socket of the host that took the port later.
        && !kernel::has_socket(packet.skb(), &packet.tuple, packet.proto.into());
    is_open.then_some(half)
}

/// Whether a mapping has the port by which packets that are answered at `reply` leave.
///
/// A sub-program of its own, for the stack of its caller.
#[inline(never)]
pub(crate) fn has_port<F: Family>(reply: &FlowKey<F::Address>) -> bool {
    let Tuple { dst, dport, .. } = reply.tuple;
    !reply.is_mapping() && mapping_at::<F>(dst, dport, reply.proto).is_some()
}

/// The world's half of the mapping that has an address and a port outside.
#[inline(always)]
fn mapping_at<F: Family>(
    address: F::Address,
    port: Be16,
    proto: u8,
) -> Option<FlowRef<F::Address>> {
    let nobody = Tuple { dst: address, dport: port, ..Tuple::default() };
    table::flow_of::<F>(ZONE_WORLD | ZONE_MAPPING, &nobody, proto)
}
