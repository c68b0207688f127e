//! Flows: following one, opening one.

use aya_ebpf::bindings::__sk_buff;
use netdp_common::{
    addr::Be16,
    config::Config,
    counter::Reason,
    flow::{Flow, FlowKey, IPPROTO_TCP, IPPROTO_UDP, flag, is_in_window, seen},
};

use crate::{
    aging,
    family::Family,
    kernel, mapping, maps,
    packet::{Headers, Packet},
    policy, publish,
    table::{self, FlowRef, Linked},
    verdict::{Decision, drop},
};

/// Instead of a number that can't be given back, for a slot of the index may still lead there.
const LOST: u32 = u32::MAX;

/// Ports looked at in search of a free one, each time that one is needed.
const PORT_TRIES: u32 = 16;

/// How often a new flow tries to have a port before it is refused: none may be free where it looks,
/// the host may have the one that is, or another CPU be faster.
const ROUNDS: u32 = 8;

/// Looks for the half that a packet arriving in `zone` belongs to, notes the packet in it and
/// returns a copy of it that is good until the program ends.
///
/// `generation` is that of the container at hand: a half of a predecessor with the same address is
/// removed and not found.
#[inline(always)]
pub(crate) fn follow<F: Family>(
    packet: &Packet<'_, F>,
    zone: u32,
    generation: u32,
) -> Decision<Option<&'static Flow<F::Address>>> {
    if !packet.is_tracked() {
        return Ok(None);
    }
    let Some(half) = F::half() else { return drop(Reason::NotReady, 0) };
    let is_found = note::<F>(packet.headers(), zone, generation, half)?;
    Ok(is_found.then_some(half))
}

/// Finds a half, copies it and notes what the packet shows.
///
/// A sub-program of its own, for the stacks of its callers.
#[inline(never)]
fn note<F: Family>(
    headers: &Headers<F>,
    zone: u32,
    generation: u32,
    copy: &mut Flow<F::Address>,
) -> Decision<bool> {
    let Some(flow) = table::flow_of::<F>(zone, &headers.tuple, headers.proto) else {
        return Ok(false);
    };
    let Some(key) = F::wanted() else { return Ok(false) };
    if !flow.copy_of(key, copy) {
        return Ok(false);
    }
    let now = kernel::now();
    if copy.exit != 0 && copy.last_seen != now {
        // Good for the second in which it was found, whatever becomes of this packet.
        flow.lead_out_of(0);
        copy.exit = 0;
    }
    let half = &*copy;
    if half.generation != generation {
        remove::<F>(key);
        return Ok(false);
    }
    if half.flags & flag::INBOUND != 0 {
        judge_again::<F>(key, flow, half)?;
    }
    // An error shows nothing: it neither refreshes a flow nor ends it (RFC 5508, REQ-6).
    if headers.seen == 0 {
        return Ok(true);
    }
    if headers.proto == IPPROTO_TCP {
        follow_tcp(headers, flow, half, now);
    } else {
        flow.touch(half, half.seen | headers.seen, now);
    }
    // Only what goes out keeps it alive (RFC 4787, REQ-6), and no reset does. Last, for the key is
    // no longer the flow's then.
    let goes_out = half.flags & (flag::MAPPED | flag::INBOUND) == flag::MAPPED;
    if goes_out && headers.seen & seen::RST == 0 && half.last_seen != now {
        mapping::refresh::<F>(key);
    }
    Ok(true)
}

/// Notes what a TCP packet shows.
#[inline(always)]
fn follow_tcp<F: Family>(
    headers: &Headers<F>,
    flow: FlowRef<F::Address>,
    half: &Flow<F::Address>,
    now: u32,
) {
    let mut shown = headers.seen;
    if headers.opens && restarts::<F>(flow, half) {
        flow.restart(shown, now);
        return;
    }
    if shown & seen::CLOSING != 0 && !is_plausible_end::<F>(headers, flow) {
        // Its receiver judges for itself; somebody who can't see the connection ends nothing here.
        shown &= !seen::CLOSING;
        if headers.seen & seen::RST != 0 {
            return;
        }
    }
    if shown & seen::RST != 0 {
        // Held, not refreshed (RFC 7857, 2.2).
        flow.show(half, half.seen | shown);
        return;
    }
    if headers.seen & seen::ACK != 0 {
        flow.acknowledge(half, headers.acknowledged);
    }
    // A direction that goes on was not reset.
    flow.touch(half, half.seen & !seen::RST | shown, now);
}

/// Whether a FIN or RST can come from the end it claims to come from: what it says lies where the
/// other end has acknowledged. Before that has said anything there is little to end.
#[inline(always)]
fn is_plausible_end<F: Family>(headers: &Headers<F>, flow: FlowRef<F::Address>) -> bool {
    flow.peer::<F>()
        .and_then(FlowRef::acknowledged)
        .is_none_or(|acknowledged| is_in_window(headers.sequence, acknowledged))
}

/// Judges a flow again after its network's policy has changed.
#[inline(always)]
fn judge_again<F: Family>(
    key: &FlowKey<F::Address>,
    flow: FlowRef<F::Address>,
    half: &Flow<F::Address>,
) -> Decision<()> {
    let Some(network) = maps::network(half.network()) else {
        remove::<F>(key);
        return drop(Reason::StaleFlow, half.network());
    };
    // Once, before the verdict: a policy that changes meanwhile must judge the flow again.
    let policy_generation = network.policy_generation;
    if policy_generation == half.policy_generation {
        return Ok(());
    }
    let client = if half.flags & flag::ORIGINAL != 0 { key.tuple.src } else { half.to.dst };
    if !policy::allows::<F>(half.network(), network, client) {
        remove::<F>(key);
        return drop(Reason::Policy, half.network());
    }
    flow.approve(policy_generation);
    Ok(())
}

/// A SYN on a flow that is over opens a new connection between the same ports: nothing of the old
/// one may shorten its life (RFC 6191 lets clients reuse a port in TIME_WAIT). Makes the other half
/// forget what it has seen, and returns whether this half has to.
#[inline(always)]
fn restarts<F: Family>(flow: FlowRef<F::Address>, half: &Flow<F::Address>) -> bool {
    let peer = flow.peer::<F>();
    let peer_seen = peer.map_or(0, FlowRef::seen);
    let is_reset = (half.seen | peer_seen) & seen::RST != 0;
    let is_closed = half.seen & peer_seen & seen::FIN != 0;
    if let Some(peer) = peer.filter(|_| is_reset || is_closed) {
        peer.restart(0, kernel::now());
    }
    is_reset || is_closed
}

/// Removes both halves; the flow no longer counts for the endpoint that opened it. Returns how many
/// flows that were. A sub-program of its own, for the stacks of its callers.
#[inline(never)]
pub(crate) fn remove<F: Family>(key: &FlowKey<F::Address>) -> u32 {
    let Some(opener) = table::remove::<F>(key) else { return 0 };
    if let Some(usage) = maps::usage(opener) {
        usage.add(-1);
    }
    1
}

/// Notes the interface by which packets of `half` leave past the host's stack, 0 for none.
#[inline(always)]
pub(crate) fn note_exit<F: Family>(
    packet: &Packet<'_, F>,
    zone: u32,
    half: &Flow<F::Address>,
    exit: u32,
) {
    if half.exit != exit
        && let Some(flow) = table::flow_of::<F>(zone, &packet.tuple, packet.proto)
    {
        flow.lead_out_of(exit);
    }
}

/// A copy of the half that a packet of `zone` followed when it arrived, for the hook at which it
/// leaves; good until the program ends.
#[inline(always)]
pub(crate) fn find<F: Family>(
    packet: &Packet<'_, F>,
    zone: u32,
) -> Option<&'static Flow<F::Address>> {
    if !packet.is_tracked() {
        return None;
    }
    let half = F::half()?;
    let flow = table::flow_of::<F>(zone, &packet.tuple, packet.proto)?;
    flow.copy_of(F::wanted()?, half).then_some(half)
}

/// Whether a packet on its way into `network` is part of a flow that allows it: the container's
/// own half, the answer to this packet, is there.
#[inline(always)]
pub(crate) fn allows_into<F: Family>(
    packet: &Packet<'_, F>,
    network: u32,
    generation: u32,
    is_watched: bool,
) -> Decision<bool> {
    if !packet.is_tracked() {
        return Ok(false);
    }
    let Some(flow) = table::flow_of::<F>(network, &packet.tuple.reversed(), packet.proto) else {
        return Ok(false);
    };
    let (Some(key), Some(half)) = (F::wanted(), F::half()) else { return Ok(false) };
    if !flow.copy_of(key, half) {
        return Ok(false);
    }
    if half.generation != generation {
        remove::<F>(key);
        return drop(Reason::StaleFlow, network);
    }
    // Without a program at its interface nothing can have been translated on the way in.
    Ok(is_watched || half.to == key.tuple)
}

/// A flow to be opened. It lies in a map ([`crate::maps::Maps::new_flow`]): the stack is too
/// small.
pub(crate) struct NewFlow<F: Family> {
    /// Where and how the first packet arrives.
    pub(crate) key: FlowKey<F::Address>,
    /// What becomes of it. `to.sport` is a wish where `ports` is not [`SourcePorts::Kept`].
    pub(crate) half: Flow<F::Address>,
    /// The other half; `generation` and `stage` of it are the caller's to fill.
    pub(crate) reply: Flow<F::Address>,
    /// Where the answer arrives; filled in when the flow is opened.
    pub(crate) reply_key: FlowKey<F::Address>,
    pub(crate) ports: SourcePorts,
    /// Of the flow, in its table.
    pub(crate) number: u32,
}

impl<F: Family> NewFlow<F> {
    /// Prepares a flow that begins with `packet`, which arrives in `zone` and as yet is not translated; the
    /// answer arrives in `reply_zone`, and `network` has the say. The fields that are not of the
    /// halves are the caller's to fill.
    #[inline(always)]
    pub(crate) fn prepare(
        &mut self,
        packet: &Packet<'_, F>,
        zone: u32,
        reply_zone: u32,
        network: u32,
    ) {
        self.key.zone = zone as u16;
        self.key.tuple = packet.tuple;
        self.key.proto = packet.proto;
        self.key.pad = 0;
        let half = &mut self.half;
        half.to = packet.tuple;
        half.reply_zone = reply_zone as u16;
        half.generation = 0;
        half.exit = 0;
        half.network = network as u16;
        half.policy_generation = 0;
        half.last_seen = kernel::now();
        half.acknowledged = packet.acknowledged;
        half.seen = packet.seen;
        half.flags = flag::ORIGINAL;
        half.stage = 0;
        half.pad = 0;
        self.reply.seen = 0;
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
    /// As `Host`, but first the port of the mapping by which the flow leaves, whatever it is.
    Mapped,
}

/// Opens the flow that was prepared for `packet`, counting it as `kind` for `network`; the endpoint
/// that opens it may have `limit` of them, 0 meaning any number. Returns the half in force, as
/// [`follow`] does.
#[inline(always)]
pub(crate) fn begin<F: Family>(
    packet: &Packet<'_, F>,
    network: u32,
    kind: Reason,
    limit: u32,
) -> Decision<&'static Flow<F::Address>> {
    let skb = packet.skb();
    let mut opened = F::open(skb, network, kind as u32, limit);
    // Here, and not where it is opened: the stack would not do.
    if opened == Opened::Full as u32 && aging::make_room::<F>() {
        maps::count(network, Reason::Reclaimed as u32, 0);
        opened = F::open(skb, network, kind as u32, limit);
    }
    if opened == Opened::New as u32 {
        aging::begin::<F>(kernel::now());
    }
    outcome(opened, network)?;
    let (Some(new), Some(half)) = (F::new_flow(), F::half()) else {
        return drop(Reason::NotReady, network);
    };
    maps::copy_half(&new.half, half);
    Ok(half)
}

/// Opens and counts the flow that lies in [`crate::maps::Maps::new_flow`]; see [`begin`]. Returns one of
/// [`Opened`]; where that is good news, `half` is the half in force, which another CPU may have inserted.
#[inline(always)]
pub(crate) fn open<F: Family>(skb: *mut __sk_buff, network: u32, kind: u32, limit: u32) -> u32 {
    let (Some(config), Some(new)) = (maps::config(), F::new_flow()) else {
        return Opened::NoRoom as u32;
    };
    let usage = maps::usage(new.half.generation);
    let is_exhausted = limit != 0 && usage.is_some_and(|usage| usage.get() >= u64::from(limit));
    let opened =
        if is_exhausted { adopt_whole(new, Opened::TooMany) } else { insert(skb, new, config) };
    if matches!(opened, Opened::New)
        && let Some(usage) = usage
    {
        usage.add(1);
    }
    if matches!(opened, Opened::New | Opened::There) {
        maps::count(network, kind, kernel::length(skb));
    }
    opened as u32
}

/// The end of a packet whose flow could not be opened.
#[inline(always)]
fn outcome(opened: u32, network: u32) -> Decision<()> {
    const FULL: u32 = Opened::Full as u32;
    const NO_ROOM: u32 = Opened::NoRoom as u32;
    const NO_PORT: u32 = Opened::NoPort as u32;
    const TOO_MANY: u32 = Opened::TooMany as u32;
    match opened {
        FULL | NO_ROOM => drop(Reason::FlowTableFull, network),
        NO_PORT => drop(Reason::PortsExhausted, network),
        TOO_MANY => drop(Reason::EndpointLimit, network),
        _ => Ok(()),
    }
}

/// What became of a flow that was to be opened.
#[derive(Clone, Copy)]
pub(crate) enum Opened {
    /// It was not there before.
    New,
    /// Another CPU was faster.
    There,
    /// The table is full.
    Full,
    /// The index is, where its halves belong.
    NoRoom,
    /// No free source port.
    NoPort,
    /// The endpoint has as many as it may have.
    TooMany,
}

/// Gives the flow a number and both halves their places in the index.
#[inline(always)]
fn insert<F: Family>(skb: *mut __sk_buff, new: &mut NewFlow<F>, config: &Config) -> Opened {
    if let Err(refusal) = table::take_number::<F>(&mut new.number) {
        return adopt_whole(new, refusal);
    }
    let opened = link(skb, new, config);
    if !matches!(opened, Opened::New) && new.number != LOST {
        table::free::<F>(new.number);
    }
    opened
}

/// Puts both halves into the index, the reply first because it decides whether a port is free.
#[inline(always)]
fn link<F: Family>(skb: *mut __sk_buff, new: &mut NewFlow<F>, config: &Config) -> Opened {
    let ports =
        if has_changeable_ports::<F>(new.key.proto) { new.ports } else { SourcePorts::Kept };
    new.reply.to.src = new.key.tuple.dst;
    new.reply.to.dst = new.key.tuple.src;
    new.reply.to.sport = new.key.tuple.dport;
    new.reply.to.dport = new.key.tuple.sport;
    new.reply.reply_zone = new.key.zone;
    new.reply.exit = 0;
    new.reply.network = new.half.network;
    new.reply.policy_generation = new.half.policy_generation;
    new.reply.last_seen = new.half.last_seen;
    new.reply.acknowledged = 0;
    new.reply.flags = new.half.flags & !(flag::ORIGINAL | flag::MAPPED);
    new.reply.pad = 0;
    new.half.write_peer_key(new.key.proto, &mut new.reply_key);
    let mut next = 0;
    let mut is_chosen = may_keep::<F>(ports, new.key.proto, new.half.to.sport, config);
    let mut is_mapped = ports == SourcePorts::Mapped;
    // Most ports are free, and the insertion tells which is not.
    let mut is_bold = true;
    for _ in 0..ROUNDS {
        let is_kept = is_chosen;
        if !is_kept && !choose_port(new, config, &mut next, is_bold) {
            // Taken ports lie close together: on to somewhere else.
            next = kernel::random();
            continue;
        }
        is_bold &= is_kept;
        is_chosen = false;
        let is_own_mapping = is_mapped;
        is_mapped = false;
        if matches!(ports, SourcePorts::Host | SourcePorts::Mapped)
            && (is_the_hosts(skb, new, is_kept, config)
                || config.has_mappings != 0
                    && !is_own_mapping
                    && mapping::has_port::<F>(&new.reply_key))
        {
            continue;
        }
        let Some(spot) = table::spot::<F>(&new.reply_key) else { break };
        spot.approach::<F>();
        table::fill(new);
        let linked = spot.link::<F>(2 * new.number + 1);
        if linked == Linked::Now as u32 {
            return finish(new);
        }
        if linked == Linked::Before as u32 {
            // By another CPU for this very flow?
            let other = table::flow::<F>(&new.reply_key).and_then(FlowRef::peer::<F>);
            if let Some(other) = other.filter(|other| other.has_key(&new.key)) {
                other.copy_to(&mut new.half);
                return Opened::There;
            }
        } else if ports == SourcePorts::Kept {
            return Opened::NoRoom;
        }
        if ports == SourcePorts::Kept {
            break;
        }
    }
    adopt_whole(new, Opened::NoPort)
}

/// What is used up may have gone to this very flow, on another CPU; `refusal` where it has not.
#[inline(always)]
fn adopt_whole<F: Family>(new: &mut NewFlow<F>, refusal: Opened) -> Opened {
    let Some(winner) = table::flow::<F>(&new.key) else { return refusal };
    winner.copy_to(&mut new.half);
    Opened::There
}

/// Sets a source port that no flow to the same destination has, looking from `next` on, which
/// moves; any one, unseen, if `is_bold`. `false` where none was found.
#[inline(always)]
fn choose_port<F: Family>(
    new: &mut NewFlow<F>,
    config: &Config,
    next: &mut u32,
    is_bold: bool,
) -> bool {
    let span = u32::from(config.nat_last.wrapping_sub(config.nat_first)) + 1;
    if is_bold {
        *next = kernel::random();
    }
    for _ in 0..PORT_TRIES {
        let offset = *next % span;
        *next = next.wrapping_add(1);
        let port = Be16::new(config.nat_first.wrapping_add(offset as u16));
        new.reply_key.tuple.dport = port;
        if is_bold || table::flow::<F>(&new.reply_key).is_none() {
            new.half.to.sport = port;
            return true;
        }
    }
    false
}

/// Whether the source that a new flow would have belongs to the host: published or a socket's. Both are
/// looked for only where they can be: of the ports that we choose few hosts have one.
#[inline(always)]
fn is_the_hosts<F: Family>(
    skb: *mut __sk_buff,
    new: &NewFlow<F>,
    is_kept: bool,
    config: &Config,
) -> bool {
    let reply = &new.reply_key;
    (is_kept || config.is_nat_published != 0) && is_published::<F>(reply)
        || (is_kept || may_be_claimed(new.half.last_seen))
            && kernel::has_socket(skb, &reply.tuple, reply.proto.into())
}

/// Whether a socket of the host may have a port that we choose. Without the agent nobody sees what
/// becomes of the hooks and of the reservation on which the answer rests.
#[inline(always)]
fn may_be_claimed(now: u32) -> bool {
    maps::are_ports_claimed() || !aging::is_agent_there(now)
}

/// A sub-program of its own, for the stack of its caller.
#[inline(never)]
fn is_published<F: Family>(reply: &FlowKey<F::Address>) -> bool {
    publish::is_published::<F>(reply.tuple.dst, reply.tuple.dport, reply.proto)
}

/// Whether the ports of a protocol can be changed with its checksum.
#[inline(always)]
fn has_changeable_ports<F: Family>(proto: u8) -> bool {
    // The other family's ICMP has no identifier here.
    matches!(proto, IPPROTO_TCP | IPPROTO_UDP) || proto == F::ICMP
}

/// Puts the original half into the index after the reply half.
#[inline(always)]
fn finish<F: Family>(new: &mut NewFlow<F>) -> Opened {
    let spot = table::spot::<F>(&new.key);
    if spot.is_some_and(|spot| spot.link::<F>(2 * new.number) == Linked::Now as u32) {
        return Opened::New;
    }
    if !table::take_back_reply(new) {
        new.number = LOST;
    }
    // Another CPU was faster, and its reply half is another.
    adopt_whole(new, Opened::NoRoom)
}

/// Whether the client's own port may stay.
#[inline(always)]
fn may_keep<F: Family>(ports: SourcePorts, proto: u8, wish: Be16, config: &Config) -> bool {
    let wish = wish.get();
    match ports {
        SourcePorts::Kept | SourcePorts::Preferred | SourcePorts::Mapped => true,
        // No lookup tells what identifiers the host pings with, and programs like the same ones:
        // process ids, 1. In our own range they hardly meet.
        SourcePorts::Host if proto == F::ICMP => config.is_nat_port(wish),
        SourcePorts::Host => wish < config.ephemeral_first || wish > config.ephemeral_last,
    }
}
