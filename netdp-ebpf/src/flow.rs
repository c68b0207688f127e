//! Flows: following one, opening one.

use netdp_common::{
    addr::Be16,
    config::Config,
    counter::Reason,
    flow::{Flow4, FlowKey4, flag, seen},
};

use crate::{
    kernel,
    maps::{self, FlowRef},
    packet::Packet,
    policy, publish,
    verdict::{Decision, drop},
};

const EEXIST: i32 = -17;

/// Free source ports tried before a new flow is refused.
const PORT_TRIES: u32 = 32;

/// Looks for the half that a packet arriving in `zone` belongs to, notes the packet in it and
/// returns a copy of it that is good until the program ends.
///
/// `generation` is that of the container at hand: a half of a predecessor with the same address is
/// removed and not found.
#[inline(always)]
pub(crate) fn follow(
    packet: &Packet,
    zone: u32,
    generation: u32,
) -> Decision<Option<&'static Flow4>> {
    if !packet.is_tracked() {
        return Ok(None);
    }
    let Some(half) = maps::half() else { return drop(Reason::NotReady, 0) };
    let key = FlowKey4::new(zone, packet.tuple, packet.proto);
    let is_found = note(&key, half, generation, packet.seen.into(), packet.opens.into())?;
    Ok(is_found.then_some(half))
}

/// Finds a half, copies it and notes what the packet shows: bits of [`seen`], and whether it
/// opens a TCP connection.
///
/// A sub-program of its own, for the stacks of its callers.
#[inline(never)]
fn note(
    key: &FlowKey4,
    copy: &mut Flow4,
    generation: u32,
    seen: u32,
    opens: u32,
) -> Decision<bool> {
    let Some(flow) = maps::flow(key) else { return Ok(false) };
    flow.copy_to(copy);
    let half = &*copy;
    if half.generation != generation {
        remove(key, half);
        return Ok(false);
    }
    if half.flags & flag::INBOUND != 0 {
        judge_again(key, flow, half)?;
    }
    if opens != 0 {
        restart_if_closing(flow, half, key.proto);
    }
    // An error shows nothing: it neither refreshes a flow nor ends it (RFC 5508, REQ-6).
    if seen != 0 {
        flow.touch(half, seen as u8, kernel::now());
    }
    Ok(true)
}

/// Judges a flow again after its network's policy has changed.
#[inline(always)]
fn judge_again(key: &FlowKey4, flow: FlowRef, half: &Flow4) -> Decision<()> {
    let Some(network) = maps::network(half.network) else {
        remove(key, half);
        return drop(Reason::StaleFlow, half.network);
    };
    // Once, before the verdict: a policy that changes meanwhile must judge the flow again.
    let policy_generation = network.policy_generation;
    if policy_generation == half.policy_generation {
        return Ok(());
    }
    let client = if half.flags & flag::ORIGINAL != 0 { key.tuple.src } else { half.to.dst };
    if !policy::allows(half.network, network, client) {
        remove(key, half);
        return drop(Reason::Policy, half.network);
    }
    flow.approve(policy_generation);
    Ok(())
}

/// A SYN on a flow that is ending opens a new connection between the same ports: nothing of the
/// old one may shorten its life (RFC 6191 lets clients reuse a port in TIME_WAIT).
#[inline(always)]
fn restart_if_closing(flow: FlowRef, half: &Flow4, proto: u8) {
    let peer = maps::flow(&half.peer_key(proto));
    let peer_seen = peer.map_or(0, |peer| peer.load().seen);
    if (half.seen | peer_seen) & seen::CLOSING != 0 {
        flow.restart();
        if let Some(peer) = peer {
            peer.restart();
        }
    }
}

/// Removes both halves.
#[inline(always)]
pub(crate) fn remove(key: &FlowKey4, half: &Flow4) {
    maps::remove_flow(&half.peer_key(key.proto));
    maps::remove_flow(key);
}

/// The half that a packet of `zone` followed when it arrived, for the hook at which it leaves.
#[inline(always)]
pub(crate) fn find(packet: &Packet, zone: u32) -> Option<Flow4> {
    if !packet.is_tracked() {
        return None;
    }
    maps::flow(&FlowKey4::new(zone, packet.tuple, packet.proto)).map(FlowRef::load)
}

/// Whether a packet on its way into `network` is part of a flow that allows it: the container's
/// own half, the answer to this packet, is there.
#[inline(always)]
pub(crate) fn allows_into(
    packet: &Packet,
    network: u32,
    generation: u32,
    is_watched: bool,
) -> Decision<bool> {
    if !packet.is_tracked() {
        return Ok(false);
    }
    let key = FlowKey4::new(network, packet.tuple.reversed(), packet.proto);
    let Some(flow) = maps::flow(&key) else { return Ok(false) };
    let half = flow.load();
    if half.generation != generation {
        remove(&key, &half);
        return drop(Reason::StaleFlow, network);
    }
    // Without a program at its interface nothing can have been translated on the way in.
    Ok(is_watched || half.to == key.tuple)
}

/// A flow to be opened. It lies in a map ([`maps::new_flow`]): the stack is too small.
pub(crate) struct NewFlow {
    /// Where and how the first packet arrives.
    pub(crate) key: FlowKey4,
    /// What becomes of it. `to.sport` is a wish where `ports` is not [`SourcePorts::Kept`].
    pub(crate) half: Flow4,
    /// `generation` of the other half.
    pub(crate) reply_generation: u32,
    /// `stage` of the other half.
    pub(crate) reply_stage: u8,
    pub(crate) ports: SourcePorts,
}

impl NewFlow {
    /// Begins a flow with `packet`, which arrives in `zone` and as yet is not translated; the
    /// answer arrives in `reply_zone`, and `network` has the say. The fields that are not of the
    /// halves are the caller's to fill.
    #[inline(always)]
    pub(crate) fn begin(&mut self, packet: &Packet, zone: u32, reply_zone: u32, network: u32) {
        self.key = FlowKey4::new(zone, packet.tuple, packet.proto);
        self.half = Flow4 {
            to: packet.tuple,
            reply_zone,
            network,
            last_seen: kernel::now(),
            seen: packet.seen,
            flags: flag::ORIGINAL,
            ..Flow4::default()
        };
    }
}

/// Which source ports the flow may have after translation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourcePorts {
    /// The client's own, or the flow can't be.
    Kept,
    /// The client's own unless taken: the client's address stays, so nobody else's port is at
    /// stake.
    Preferred,
    /// The source becomes an address of the host: a port that no socket of the host and no
    /// published port can have.
    Host,
    /// As `Host`, and the client's own is known to be taken.
    Chosen,
}

/// Opens a flow: inserts both halves, the reply first because it decides whether a port is free.
///
/// On return `new.half` is the half in force, which another CPU may have inserted.
///
/// A sub-program of its own: the verifier walks it once for each caller, not once for each path
/// that leads there.
#[inline(never)]
pub(crate) fn open(new: &mut NewFlow) -> Result<(), Reason> {
    let Some(config) = maps::config() else { return Err(Reason::NotReady) };
    let wish = new.half.to.sport;
    let reply = Flow4 {
        to: new.key.tuple.reversed(),
        reply_zone: new.key.zone,
        generation: new.reply_generation,
        stage: new.reply_stage,
        flags: new.half.flags & !flag::ORIGINAL,
        seen: 0,
        ..new.half
    };
    let span = u32::from(config.nat_last.wrapping_sub(config.nat_first)) + 1;
    let start = kernel::random();
    for attempt in 0..PORT_TRIES {
        if attempt > 0 || !may_keep(new.ports, wish, config) {
            if new.ports == SourcePorts::Kept {
                break;
            }
            let offset = (start.wrapping_add(attempt)) % span;
            new.half.to.sport = Be16::new(config.nat_first.wrapping_add(offset as u16));
        }
        let reply_key = new.half.peer_key(new.key.proto);
        if matches!(new.ports, SourcePorts::Host | SourcePorts::Chosen)
            && publish::is_published(new.half.to.src, new.half.to.sport, new.key.proto)
        {
            continue;
        }
        match maps::insert_flow(&reply_key, &reply) {
            Ok(()) => return finish(new, &reply_key),
            Err(EEXIST) => {}
            Err(_) => return Err(Reason::FlowTableFull),
        }
        // Taken: by another CPU for this very flow, or by a flow that lost its other half?
        if maps::flow(&reply_key).is_some_and(|other| other.leads_where(&reply)) {
            return adopt(new);
        }
    }
    Err(Reason::PortsExhausted)
}

/// Inserts the original half after the reply half got its place.
#[inline(always)]
fn finish(new: &mut NewFlow, reply_key: &FlowKey4) -> Result<(), Reason> {
    match maps::insert_flow(&new.key, &new.half) {
        Ok(()) => Ok(()),
        Err(EEXIST) => {
            // Another CPU was faster and has a reply half of its own.
            let Some(winner) = maps::flow(&new.key) else {
                maps::remove_flow(reply_key);
                return Err(Reason::PortsExhausted);
            };
            if !winner.leads_where(&new.half) {
                maps::remove_flow(reply_key);
            }
            new.half = winner.load();
            Ok(())
        }
        Err(_) => {
            maps::remove_flow(reply_key);
            Err(Reason::FlowTableFull)
        }
    }
}

/// Takes the reply half that is there for our own and sees to the original.
#[inline(always)]
fn adopt(new: &mut NewFlow) -> Result<(), Reason> {
    match maps::insert_flow(&new.key, &new.half) {
        Ok(()) => Ok(()),
        Err(EEXIST) => {
            if let Some(winner) = maps::flow(&new.key) {
                new.half = winner.load();
            }
            Ok(())
        }
        Err(_) => Err(Reason::FlowTableFull),
    }
}

/// Whether the client's own port may stay.
#[inline(always)]
fn may_keep(ports: SourcePorts, wish: Be16, config: &Config) -> bool {
    let wish = wish.get();
    match ports {
        SourcePorts::Kept | SourcePorts::Preferred => true,
        SourcePorts::Host => wish < config.ephemeral_first || wish > config.ephemeral_last,
        SourcePorts::Chosen => false,
    }
}
