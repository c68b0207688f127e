//! What the flow table and translation should do: a table in a `BTreeMap`, and what each hook
//! makes of a packet. Pure; parties are named by IPv4 addresses in both families.
//!
//! Follows the documents, not the programs: two halves per flow, each with what its own direction
//! has shown. Knows nothing of maps, bytes or CPUs. The only thing that it can't know is which of
//! the free ports is chosen; it is told, and judges.

use std::{
    collections::BTreeMap,
    mem,
    net::{Ipv4Addr, SocketAddrV4},
};

use anyhow::{Result, bail, ensure};
use netdp::model::NetworkId;
use netdp_common::{
    config::Timeouts,
    counter::Reason,
    flow::{IPPROTO_TCP, IPPROTO_UDP, State, seen},
};

use crate::fixture::{A, B, HOST, OUTSIDE, address, gateway};

/// The containers, and their networks.
pub(crate) const CONTAINERS: [(&str, NetworkId); 3] = [("a1", A), ("a2", A), ("b1", B)];
/// The host's ports that lead to containers, over TCP and UDP.
pub(crate) const PUBLISHED: [(u16, (&str, u16)); 4] =
    [(8080, ("a1", 80)), (8081, ("a1", 80)), (8443, ("b1", 443)), (50_003, ("a2", 80))];
/// A port that sockets of the host have on [`HOST`].
pub(crate) const HOST_SOCKET: u16 = 50_005;
/// Source ports to choose from: few, so that they run out.
pub(crate) const RESERVED: (u16, u16) = (50_000, 50_005);
/// Source ports that the host's own sockets are given.
pub(crate) const EPHEMERAL: (u16, u16) = (32_768, 60_999);
/// Flows that a container of network a may have opened.
pub(crate) const LIMIT: usize = 5;

/// Seconds by which time passes. No timeout lies near a multiple of it, so that the seconds a test
/// takes itself decide nothing.
pub(crate) const STEP: u32 = 20;
/// No half is idle for longer: it makes no difference any more.
pub(crate) const LONGEST: u32 = 3 * STEP;
/// How long idle flows are kept.
pub(crate) const TIMEOUTS: Timeouts = Timeouts {
    tcp_established: 50,
    tcp_transitory: 30,
    udp_replied: 50,
    udp_unreplied: 10,
    icmp: 30,
    other: 50,
};
/// Zone of packets from outside.
pub(crate) const WORLD: u32 = 0;

/// Where a packet, or a flow's part of it, comes from and goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ends {
    pub(crate) source: SocketAddrV4,
    pub(crate) destination: SocketAddrV4,
}

impl Ends {
    pub(crate) fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source }
    }
}

/// What packets of a half look like when they arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) zone: u32,
    pub(crate) protocol: u8,
    pub(crate) ends: Ends,
}

/// One direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Half {
    /// What its packets look like when they leave.
    pub(crate) to: Ends,
    pub(crate) reply_zone: u32,
    pub(crate) network: u32,
    pub(crate) policy_generation: u32,
    /// Of the container whose packets they are, 0 for the world.
    pub(crate) generation: u32,
    /// Bits of [`seen`].
    pub(crate) seen: u8,
    /// Seconds since its last packet, a multiple of [`STEP`].
    pub(crate) idle: u32,
    pub(crate) is_original: bool,
}

impl Half {
    /// Where the answer arrives.
    pub(crate) fn peer_key(&self, protocol: u8) -> Key {
        Key { zone: self.reply_zone, protocol, ends: self.to.reversed() }
    }
}

/// What a packet of a flow shows of it; an error about one shows nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shows {
    /// Bits of [`seen`].
    pub(crate) bits: u8,
    /// A first SYN.
    pub(crate) opens: bool,
    /// A flow may begin with it.
    pub(crate) may_open: bool,
    /// Its sequence number is one that the other end awaits.
    pub(crate) is_in_window: bool,
}

/// A packet as the flow table knows it: an error as an answer to what it quotes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    pub(crate) protocol: u8,
    pub(crate) ends: Ends,
    /// `None` of an error.
    pub(crate) shows: Option<Shows>,
}

/// What becomes of a packet at a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Goes on as it came.
    Pass,
    /// Goes on, rewritten.
    PassAs(Ends),
    /// Rewritten, and goes to a container of the same network.
    Switched(Ends),
    /// Rewritten, and goes back to its sender.
    TurnAround(Ends),
    Dropped(NetworkId, Reason),
    /// Dropped, and its sender may be told.
    Refused(NetworkId, Reason),
}

/// Who else may have a say in a flow's source port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ports {
    /// The source address stays.
    Clients,
    /// It becomes one of the host's.
    Hosts,
}

/// A flow to be opened.
struct Opening {
    key: Key,
    to: Ends,
    reply_zone: u32,
    network: NetworkId,
    generation: u32,
    reply_generation: u32,
    policy_generation: u32,
    ports: Ports,
    limit: usize,
}

/// The table and what it rests on.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) halves: BTreeMap<Key, Half>,
    /// Generation of each container.
    pub(crate) generations: BTreeMap<Ipv4Addr, u32>,
    /// Who may not open, or keep, a flow into network a from elsewhere.
    pub(crate) denied: Option<Ipv4Addr>,
    /// Generation of network a's policy; the others have none.
    pub(crate) policy_generation: u32,
    /// Whether an agent collects.
    pub(crate) has_agent: bool,
    /// Flows that the next one to be opened looks at, where no agent collects.
    pub(crate) in_turn: Vec<Key>,
}

impl Model {
    /// An empty table.
    pub(crate) fn new(generations: BTreeMap<Ipv4Addr, u32>, policy_generation: u32) -> Self {
        Self {
            halves: BTreeMap::new(),
            generations,
            denied: None,
            policy_generation,
            has_agent: true,
            in_turn: Vec::new(),
        }
    }

    /// The same without a flow, and with an agent.
    pub(crate) fn emptied(&self) -> Self {
        let denied = self.denied;
        Self { denied, ..Self::new(self.generations.clone(), self.policy_generation) }
    }

    /// What a container sends. `chosen` is the source port that a flow for it was given.
    pub(crate) fn container_sends(
        &mut self,
        packet: Packet,
        chosen: Option<u16>,
    ) -> Result<Verdict> {
        let own = *packet.ends.source.ip();
        let zone = network_of(own).expect("a container has a network");
        let generation = self.generations[&own];
        let key = Key { zone: zone.0, protocol: packet.protocol, ends: packet.ends };
        match self.follow(key, generation, packet.shows) {
            Err(verdict) => return Ok(verdict),
            Ok(Some(half)) => return Ok(sent_on(own, key.zone, half)),
            Ok(None) => {}
        }
        let destination = packet.ends.destination;
        let target = published(packet, destination);
        match (network_of(*destination.ip()), target) {
            _ if is_local(*destination.ip()) && target.is_none() => Ok(Verdict::Pass),
            (_, Some((server, port))) => self.open_to_published(packet, key, server, port, chosen),
            (Some(network), None) if network == zone => Ok(Verdict::Pass),
            (Some(_), None) => Ok(Verdict::Dropped(zone, Reason::Isolation)),
            (None, None) => {
                let to = Ends { source: SocketAddrV4::new(HOST, 0), ..packet.ends };
                let opening = Opening {
                    key,
                    to,
                    reply_zone: WORLD,
                    network: zone,
                    generation,
                    reply_generation: 0,
                    policy_generation: 0,
                    ports: Ports::Hosts,
                    limit: limit(zone),
                };
                Ok(self.open(opening, packet, chosen)?.unwrap_or(Verdict::Pass))
            }
        }
    }

    /// From a container to a published port.
    fn open_to_published(
        &mut self,
        packet: Packet,
        key: Key,
        server: Ipv4Addr,
        port: u16,
        chosen: Option<u16>,
    ) -> Result<Verdict> {
        let own = *packet.ends.source.ip();
        let network = network_of(server).expect("a container has a network");
        let is_inside = network.0 == key.zone;
        let to_itself = own == server;
        let source = if to_itself { gateway(network) } else { own };
        let source = SocketAddrV4::new(source, 0);
        let to = Ends { source, destination: SocketAddrV4::new(server, port) };
        if packet.may_open() && !is_inside && !self.allows(network.0, own) {
            return Ok(Verdict::Dropped(network, Reason::Policy));
        }
        let opening = Opening {
            key,
            to,
            reply_zone: network.0,
            network,
            generation: self.generations[&own],
            reply_generation: self.generations[&server],
            policy_generation: if is_inside { 0 } else { self.policy_generation_of(network.0) },
            ports: if to_itself { Ports::Hosts } else { Ports::Clients },
            limit: limit(NetworkId(key.zone)),
        };
        if let Some(verdict) = self.open(opening, packet, chosen)? {
            return Ok(verdict);
        }
        Ok(sent_on(own, key.zone, self.halves[&key]))
    }

    /// What comes from outside.
    pub(crate) fn uplink_receives(
        &mut self,
        packet: Packet,
        chosen: Option<u16>,
    ) -> Result<Verdict> {
        let key = Key { zone: WORLD, protocol: packet.protocol, ends: packet.ends };
        match self.follow(key, 0, packet.shows) {
            Err(verdict) => return Ok(verdict),
            Ok(Some(half)) => return Ok(Verdict::PassAs(half.to)),
            Ok(None) => {}
        }
        let Some((server, port)) = published(packet, packet.ends.destination) else {
            return Ok(Verdict::Pass);
        };
        let network = network_of(server).expect("a container has a network");
        if packet.may_open() && !self.allows(network.0, *packet.ends.source.ip()) {
            return Ok(Verdict::Dropped(network, Reason::Policy));
        }
        let source = SocketAddrV4::new(*packet.ends.source.ip(), 0);
        let opening = Opening {
            key,
            to: Ends { source, destination: SocketAddrV4::new(server, port) },
            reply_zone: network.0,
            network,
            generation: 0,
            reply_generation: self.generations[&server],
            policy_generation: self.policy_generation_of(network.0),
            ports: Ports::Clients,
            limit: usize::MAX,
        };
        Ok(match self.open(opening, packet, chosen)? {
            // Nobody outside is told.
            Some(Verdict::Refused(network, reason)) => Verdict::Dropped(network, reason),
            Some(verdict) => verdict,
            None => Verdict::PassAs(self.halves[&key].to),
        })
    }

    /// What the host's stack sends into a network, having got it from `zone`.
    pub(crate) fn network_receives(
        &mut self,
        packet: Packet,
        zone: u32,
        network: NetworkId,
    ) -> Verdict {
        let key = Key { zone, protocol: packet.protocol, ends: packet.ends };
        // The answer to a container that dialled one of the host's addresses.
        let answer = self.halves.get(&key).filter(|half| half.reply_zone == network.0);
        if let Some(half) = answer.filter(|half| zone != WORLD && !half.is_original) {
            return Verdict::PassAs(half.to);
        }
        let own = Key { zone: network.0, ends: packet.ends.reversed(), ..key };
        match self.halves.get(&own) {
            Some(half) if half.generation == self.generations[own.ends.source.ip()] => {
                Verdict::Pass
            }
            Some(_) => {
                self.remove(own);
                Verdict::Dropped(network, Reason::StaleFlow)
            }
            None if zone == WORLD => Verdict::Dropped(network, Reason::DirectAccess),
            None => Verdict::Dropped(network, Reason::Isolation),
        }
    }

    /// What the host's stack sends out, having got it from a container of `zone`.
    pub(crate) fn uplink_sends(&self, packet: Packet, zone: u32) -> Verdict {
        let key = Key { zone, protocol: packet.protocol, ends: packet.ends };
        match self.halves.get(&key).filter(|half| half.reply_zone == WORLD) {
            Some(half) => Verdict::PassAs(half.to),
            None => Verdict::Dropped(NetworkId(zone), Reason::Unmasqueraded),
        }
    }

    /// Removes both halves.
    fn remove(&mut self, key: Key) {
        if let Some(half) = self.halves.remove(&key) {
            self.halves.remove(&half.peer_key(key.protocol));
        }
    }

    /// Finds a packet's half and notes what it shows.
    fn follow(
        &mut self,
        key: Key,
        generation: u32,
        shows: Option<Shows>,
    ) -> Result<Option<Half>, Verdict> {
        let Some(&half) = self.halves.get(&key) else { return Ok(None) };
        if half.generation != generation {
            self.remove(key);
            return Ok(None);
        }
        let client = if half.is_original { key.ends.source } else { half.to.destination };
        // What never entered from elsewhere has no generation.
        let judged = [0, self.policy_generation_of(half.network)];
        if !judged.contains(&half.policy_generation) {
            if !self.allows(half.network, *client.ip()) {
                self.remove(key);
                return Err(Verdict::Dropped(NetworkId(half.network), Reason::Policy));
            }
            self.halves.get_mut(&key).expect("there").policy_generation = judged[1];
        }
        if let Some(shows) = shows {
            self.note(key, shows);
        }
        Ok(Some(half))
    }

    fn note(&mut self, key: Key, shows: Shows) {
        let peer = self.halves[&key].peer_key(key.protocol);
        let peer_seen = self.halves[&peer].seen;
        let half = self.halves.get_mut(&key).expect("a half that was found");
        let mut bits = shows.bits;
        if key.protocol == IPPROTO_TCP {
            let state = State::new(key.protocol, half.seen, peer_seen);
            if shows.opens && matches!(state, State::Closing | State::Reset) {
                (half.seen, half.idle) = (bits, 0);
                let peer = self.halves.get_mut(&peer).expect("a half has another");
                (peer.seen, peer.idle) = (0, 0);
                return;
            }
            if !shows.is_in_window && peer_seen & seen::ACK != 0 {
                if bits & seen::RST != 0 {
                    return;
                }
                bits &= !seen::FIN;
            }
            if bits & seen::RST != 0 {
                half.seen |= bits;
                return;
            }
            half.seen &= !seen::RST;
        }
        half.seen |= bits;
        half.idle = 0;
    }

    /// Opens a flow, or says why not.
    fn open(
        &mut self,
        new: Opening,
        packet: Packet,
        chosen: Option<u16>,
    ) -> Result<Option<Verdict>> {
        if !packet.may_open() {
            return Ok(Some(Verdict::Dropped(new.network, Reason::NoFlow)));
        }
        if self.opened_by(new.generation) >= new.limit {
            return Ok(Some(Verdict::Refused(new.network, Reason::EndpointLimit)));
        }
        let leaving = |port| {
            let source = SocketAddrV4::new(*new.to.source.ip(), port);
            let to = Ends { source, ..new.to };
            let reply =
                Key { zone: new.reply_zone, protocol: new.key.protocol, ends: to.reversed() };
            (to, reply)
        };
        let is_free = |port| {
            let (to, reply) = leaving(port);
            let is_hosts = new.ports == Ports::Hosts && is_hosts(to.source, packet.protocol);
            !is_hosts && !self.halves.contains_key(&reply)
        };
        let wish = packet.ends.source.port();
        // The host's sockets may have any ephemeral port, its pings any identifier.
        let is_never_the_hosts = if has_ports(new.key.protocol) {
            !(EPHEMERAL.0..=EPHEMERAL.1).contains(&wish)
        } else {
            (RESERVED.0..=RESERVED.1).contains(&wish)
        };
        let may_keep = new.ports == Ports::Clients || is_never_the_hosts;
        let is_kept = may_keep && is_free(wish);
        let allowed: Vec<u16> = if is_kept {
            vec![wish]
        } else {
            (RESERVED.0..=RESERVED.1).filter(|port| is_free(*port)).collect()
        };
        if chosen.is_none() && allowed.is_empty() {
            return Ok(Some(Verdict::Refused(new.network, Reason::PortsExhausted)));
        }
        ensure!(
            chosen.is_some_and(|port| allowed.contains(&port)),
            "source port: wanted one of {allowed:?}, seen {chosen:?}"
        );
        let (to, reply_key) = leaving(chosen.unwrap_or_default());
        let Opening { key, reply_zone, policy_generation, .. } = new;
        let network = new.network.0;
        let half = Half {
            to,
            reply_zone,
            network,
            policy_generation,
            generation: new.generation,
            seen: packet.shows.map_or(0, |shows| shows.bits),
            idle: 0,
            is_original: true,
        };
        let reply = Half {
            to: key.ends.reversed(),
            reply_zone: key.zone,
            generation: new.reply_generation,
            seen: 0,
            is_original: false,
            ..half
        };
        self.halves.insert(key, half);
        self.halves.insert(reply_key, reply);
        if !self.has_agent {
            for key in mem::take(&mut self.in_turn) {
                self.look_at(key);
            }
        }
        Ok(None)
    }

    /// Flows that the container of this generation has opened.
    pub(crate) fn opened_by(&self, generation: u32) -> usize {
        let own = |half: &&Half| half.is_original && half.generation == generation;
        self.halves.values().filter(own).count()
    }

    fn policy_generation_of(&self, network: u32) -> u32 {
        if network == A.0 { self.policy_generation } else { 1 }
    }

    fn allows(&self, network: u32, client: Ipv4Addr) -> bool {
        network != A.0 || self.denied != Some(client)
    }

    /// Whoever opens a flow looks after those whose turn it is, where no agent does.
    fn look_at(&mut self, key: Key) {
        if self.halves.contains_key(&key) && self.is_over(key) {
            self.remove(key);
        }
    }

    fn is_over(&self, key: Key) -> bool {
        let half = self.halves[&key];
        let peer = self.halves[&half.peer_key(key.protocol)];
        let (original, reply) = if half.is_original { (half, peer) } else { (peer, half) };
        let state = State::new(key.protocol, original.seen, reply.seen);
        half.idle.min(peer.idle) > state.timeout(key.protocol, &TIMEOUTS)
    }

    /// Removes what is over; returns how many flows.
    pub(crate) fn collect(&mut self) -> usize {
        let keys: Vec<_> = self.halves.keys().copied().collect();
        let mut removed = 0;
        for key in keys {
            if self.halves.contains_key(&key) && self.is_over(key) {
                self.remove(key);
                removed += 1;
            }
        }
        removed
    }

    /// Time passes.
    pub(crate) fn age(&mut self) {
        for half in self.halves.values_mut() {
            half.idle = LONGEST.min(half.idle + STEP);
        }
    }

    /// Another container takes the place of one.
    pub(crate) fn replace(&mut self, container: Ipv4Addr, generation: u32) {
        self.generations.insert(container, generation);
        let keys: Vec<_> = self.halves.keys().copied().collect();
        for key in keys {
            let own = self.generations.get(key.ends.source.ip()).copied();
            let is_stale = |half: &Half| key.zone != WORLD && Some(half.generation) != own;
            if self.halves.get(&key).is_some_and(is_stale) {
                self.remove(key);
            }
        }
    }
}

impl Packet {
    fn may_open(&self) -> bool {
        self.shows.is_some_and(|shows| shows.may_open)
    }
}

/// What becomes of a packet of a half at the hook where it comes from its container.
fn sent_on(own: Ipv4Addr, zone: u32, half: Half) -> Verdict {
    let from_host = [HOST, gateway(A), gateway(B)].contains(half.to.source.ip());
    if half.reply_zone == zone {
        return if *half.to.destination.ip() == own {
            Verdict::TurnAround(half.to)
        } else {
            Verdict::Switched(half.to)
        };
    }
    // A source of the host's would be refused by its stack: it is set where the packet leaves.
    if from_host { Verdict::Pass } else { Verdict::PassAs(half.to) }
}

/// The network of a container.
pub(crate) fn network_of(party: Ipv4Addr) -> Option<NetworkId> {
    CONTAINERS.iter().find(|(name, _)| address(name) == party).map(|(_, network)| *network)
}

fn is_local(party: Ipv4Addr) -> bool {
    [HOST, gateway(A), gateway(B)].contains(&party)
}

fn has_ports(protocol: u8) -> bool {
    [IPPROTO_TCP, IPPROTO_UDP].contains(&protocol)
}

/// Where a port of the host leads.
fn published(packet: Packet, dialled: SocketAddrV4) -> Option<(Ipv4Addr, u16)> {
    if packet.shows.is_none() || !has_ports(packet.protocol) || !is_local(*dialled.ip()) {
        return None;
    }
    let (_, (server, port)) = PUBLISHED.iter().find(|(port, _)| *port == dialled.port())?;
    Some((address(server), *port))
}

/// Whether a source port is the host's own: published, or a socket's.
fn is_hosts(source: SocketAddrV4, protocol: u8) -> bool {
    let is_published = PUBLISHED.iter().any(|(port, _)| *port == source.port());
    has_ports(protocol) && (is_published || source == SocketAddrV4::new(HOST, HOST_SOCKET))
}

fn limit(network: NetworkId) -> usize {
    if network == A { LIMIT } else { usize::MAX }
}

/// A test's name and the test.
type Test = (&'static str, fn() -> Result<()>);

/// The model's own tests: what a story rests on.
pub(crate) const TESTS: &[Test] = &[
    ("model::a_port_is_kept_where_it_may_be", a_port_is_kept_where_it_may_be),
    ("model::an_answer_leads_back", an_answer_leads_back),
];

/// A datagram of a container to somebody outside.
fn asking(container: &str, port: u16) -> Packet {
    let server = SocketAddrV4::new(OUTSIDE, 80);
    let ends = Ends { source: SocketAddrV4::new(address(container), port), destination: server };
    let shows =
        Shows { bits: seen::ANY | seen::DATA, opens: false, may_open: true, is_in_window: true };
    Packet { protocol: IPPROTO_UDP, ends, shows: Some(shows) }
}

fn model() -> Model {
    Model::new(CONTAINERS.map(|(name, _)| (address(name), 1)).into(), 1)
}

fn a_port_is_kept_where_it_may_be() -> Result<()> {
    // A port that stays, and must; one that is taken, published, or for the host's sockets.
    for (port, chosen, is_right) in [
        (4000, 4000, true),
        (4000, RESERVED.0, false),
        (8080, 8080, false),
        (8080, RESERVED.0, true),
        (EPHEMERAL.0, EPHEMERAL.0, false),
        (EPHEMERAL.0, HOST_SOCKET, false),
        (EPHEMERAL.0, RESERVED.1 + 1, false),
        (EPHEMERAL.0, RESERVED.0, true),
    ] {
        let outcome = model().container_sends(asking("a1", port), Some(chosen));
        ensure!(outcome.is_ok() == is_right, "{port} became {chosen}: {outcome:?}");
    }
    let mut model = model();
    model.container_sends(asking("a1", 4000), Some(4000))?;
    ensure!(model.clone().container_sends(asking("a2", 4000), Some(4000)).is_err(), "taken");
    model.container_sends(asking("a2", 4000), Some(RESERVED.0))?;
    Ok(())
}

fn an_answer_leads_back() -> Result<()> {
    let mut model = model();
    let asks = asking("b1", 4000);
    ensure!(model.container_sends(asks, Some(4000))? == Verdict::Pass);
    let Verdict::PassAs(left) = model.uplink_sends(asks, B.0) else { bail!("it stays in") };
    ensure!(*left.source.ip() == HOST, "it leaves from {}", left.source);
    let answer = Packet { ends: left.reversed(), ..asks };
    let back = model.uplink_receives(answer, None)?;
    ensure!(back == Verdict::PassAs(asks.ends.reversed()), "{back:?}");
    ensure!(
        model.network_receives(Packet { ends: asks.ends.reversed(), ..asks }, WORLD, B)
            == Verdict::Pass
    );
    Ok(())
}
