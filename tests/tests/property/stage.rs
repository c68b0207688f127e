//! Where stories are played: the loaded programs on one side, the model on the other, and
//! everything that can be seen of both compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use netdp::{
    dataplane::{Dataplane, NatPorts, Program, PublishedTarget},
    model::{Action, EndpointId, NetworkId, Protocol, Rule},
};
use netdp_common::{
    counter::Reason,
    flow::{IPPROTO_TCP, IPPROTO_UDP},
};
use netdp_tests::runtime::poll_until;
use nix::time::{ClockId, clock_gettime};

use crate::{
    datagram::{Kind, Wire, verify},
    event::{Dial, Event, kind_along},
    family::Family,
    fixture::{
        A, B, Fixture, HOST, Outcome, ROUTER_MAC, TCX_DROP, TCX_NEXT, TCX_REDIRECT, UPLINK_MAC,
        address, bridge, bridge_mac, from_container, from_uplink, hex, id_of, into_network, mac,
        to_uplink,
    },
    halves::{Fate, Half as Entry, Zone},
    letter::Letter,
    model::{
        CONTAINERS, EPHEMERAL, Ends, HOST_SOCKET, Half, Key, LIMIT, LONGEST, Model, PUBLISHED,
        RESERVED, STEP, TIMEOUTS, Verdict, WORLD, network_of,
    },
    standard::published,
};

/// A router somewhere on the way.
const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// Who sends nothing.
const NOBODY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// Generation of a container that was there before.
const PREDECESSOR: u32 = 7;
/// Flows that whoever opens one looks at, where no agent collects.
const EACH_TIME: usize = 2;
/// Room for more flows than a story opens.
const FLOWS: u32 = 4096;

/// See the module.
pub(crate) struct Stage {
    family: Family,
    fixture: Fixture,
    /// Sockets of the host, held.
    _sockets: (TcpListener, UdpSocket),
    model: Model,
    /// Generation that the next container gets.
    next_generation: u32,
    /// Drops that the model has seen in this story.
    dropped: BTreeMap<(NetworkId, Reason), u64>,
    /// The same, as the programs have counted them since ever.
    counted: BTreeMap<(NetworkId, Reason), u64>,
    pub(crate) events: usize,
    /// Flows opened, collected, refused.
    tally: BTreeMap<&'static str, usize>,
}

impl Stage {
    pub(crate) fn build(family: Family) -> Result<Self> {
        // On a machine that has just started nothing can have been idle for long.
        let patience = Duration::from_secs(2 * u64::from(LONGEST));
        poll_until(patience, "some uptime", || Ok((now()? > LONGEST + STEP).then_some(())))?;
        let mut fixture = Fixture::new(FLOWS)?;
        fixture.family = family;
        fixture.apply(limit_program)?;
        let host = family.address(HOST);
        let sockets = (
            TcpListener::bind((host, HOST_SOCKET)).context("listen as the host")?,
            UdpSocket::bind((host, HOST_SOCKET)).context("bind a socket of the host")?,
        );
        let generations = CONTAINERS.map(|(name, _)| (address(name), id_of(name).0));
        let policy_generation = fixture.program.networks[&A].policy_generation;
        let mut stage = Self {
            family,
            fixture,
            _sockets: sockets,
            model: Model::new(generations.into(), policy_generation),
            next_generation: 1000,
            dropped: BTreeMap::new(),
            counted: BTreeMap::new(),
            events: 0,
            tally: BTreeMap::new(),
        };
        stage.counted = stage.drops()?;
        Ok(stage)
    }

    /// What was played.
    pub(crate) fn summary(&self) -> String {
        let tally: Vec<_> =
            self.tally.iter().map(|(what, times)| format!("{times} {what}")).collect();
        format!("{} events: {}", self.events, tally.join(", "))
    }

    /// Plays a story from an empty table on.
    pub(crate) fn play(&mut self, story: &[Event]) -> Result<()> {
        self.clear()?;
        for (index, event) in story.iter().enumerate() {
            self.happen(event)
                .and_then(|()| self.compare())
                .with_context(|| format!("event {index}, {event:?}"))?;
            self.events += 1;
        }
        for account in self.fixture.usage()?.iter() {
            let (generation, flows) = account?;
            let opened = self.model.opened_by(generation) as u64;
            ensure!(flows == opened, "account of {generation}: {flows} of {opened} flows");
        }
        let counted = self.drops()?;
        let before = |row| self.counted.get(row).copied().unwrap_or_default();
        let moved: BTreeMap<_, _> = counted
            .iter()
            .map(|(row, packets)| (*row, packets - before(row)))
            .filter(|(_, packets)| *packets > 0)
            .collect();
        self.counted = counted;
        ensure!(moved == self.dropped, "drops: wanted {:?}, counted {moved:?}", self.dropped);
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        self.fixture.remove_flows()?;
        self.fixture.set_collection(TIMEOUTS, true)?;
        self.model = self.model.emptied();
        for generation in self.model.generations.values() {
            self.settle(*generation)?;
        }
        if self.model.denied.is_some() {
            self.deny(None)?;
        }
        self.dropped.clear();
        self.counted = self.drops()?;
        Ok(())
    }

    /// Packets dropped, as the programs count them.
    fn drops(&mut self) -> Result<BTreeMap<(NetworkId, Reason), u64>> {
        let counts = self.fixture.backend().counters()?.into_iter();
        let drops = counts.filter(|count| count.reason.is_drop());
        Ok(drops
            .map(|count| ((count.network.unwrap_or(NetworkId(0)), count.reason), count.packets))
            .collect())
    }

    fn note(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn happen(&mut self, event: &Event) -> Result<()> {
        match *event {
            Event::Dial(dial) => self.send(dialled(dial), false),
            Event::Race(dial) => self.send(dialled(dial), true),
            Event::Follow { half, back, tcp, forged } => {
                let Some((key, half)) = self.pick(half) else { return Ok(()) };
                let key = if back { half.peer_key(key.protocol) } else { key };
                let kind = kind_along(key.protocol, key.ends.destination.port() == 0, tcp);
                let wire = wire(key.ends);
                self.send(Letter { wire, kind, forged, complainer: None }, false)
            }
            Event::Complain { half, router } => {
                let Some((key, half)) = self.pick(half) else { return Ok(()) };
                let key = half.peer_key(key.protocol);
                let receiver = *key.ends.source.ip();
                // Routers are outside.
                let complainer = if router && key.zone == WORLD { ROUTER } else { receiver };
                let kind =
                    kind_along(key.protocol, key.ends.destination.port() == 0, Kind::Segment);
                let letter = Letter {
                    wire: wire(key.ends),
                    kind,
                    forged: false,
                    complainer: Some(complainer),
                };
                self.send(letter, false)
            }
            Event::Age => self.age(),
            Event::Collect => self.collect(),
            Event::Agent { is_there } => {
                self.model.has_agent = is_there;
                self.fixture.set_collection(TIMEOUTS, is_there)
            }
            Event::Outdate { container } => self.outdate(container),
            Event::Replace { container } => self.replace(container),
            Event::Deny(client) => self.deny(client),
        }
    }

    fn pick(&self, place: usize) -> Option<(Key, Half)> {
        let halves = &self.model.halves;
        let place = place.checked_rem(halves.len())?;
        halves.iter().nth(place).map(|(key, half)| (*key, *half))
    }

    /// Sends a letter through the first hook, and through the one that follows.
    fn send(&mut self, letter: Letter, wants_race: bool) -> Result<()> {
        let packet = letter.packet(self.family);
        let own = network_of(*letter.wire.source.ip());
        let (at, zone) = match own {
            Some(network) => (from_container(name_of(*letter.wire.source.ip())), network.0),
            None => (from_uplink("up0"), WORLD),
        };
        let key = Key { zone, protocol: packet.protocol, ends: packet.ends };
        let half = self.model.halves.get(&key).copied();
        let generation = self.model.generations.get(key.ends.source.ip()).copied();
        let opens = half.is_none_or(|half| half.generation != generation.unwrap_or_default());
        let frame = letter.frame(self.family);
        let numbers = if self.model.has_agent { BTreeMap::new() } else { self.numbers()? };
        let outcomes = if wants_race && half.is_none() {
            self.note("races");
            self.fixture.run_twice(at, &frame)?.into()
        } else {
            vec![self.fixture.run(at, &frame)?]
        };
        let chosen = if opens { self.entries()?.get(&key).copied() } else { None };
        let chosen = chosen.map(|half| half.to.source.port());
        if chosen.is_some() {
            self.note("flows");
        }
        if !self.model.has_agent {
            // Of those that are looked at, the one that has just been opened is not over.
            let in_turn = self.fixture.looked_at()?.take(EACH_TIME).collect::<Vec<_>>();
            let in_turn = in_turn.iter().rev().filter_map(|number| numbers.get(number).copied());
            self.model.in_turn = in_turn.collect();
        }
        let mut next = None;
        for outcome in outcomes {
            let verdict = match own {
                Some(_) => self.model.container_sends(packet, chosen)?,
                None => self.model.uplink_receives(packet, chosen)?,
            };
            next = self.judge(letter, verdict, &outcome).with_context(|| format!("at {at:?}"))?;
        }
        match next {
            Some(letter) => self.forward(letter, own),
            None => Ok(()),
        }
    }

    /// What the host's stack does with a letter that the first hook has let pass.
    fn forward(&mut self, letter: Letter, from: Option<NetworkId>) -> Result<()> {
        let receiver = *letter.receiver().ip();
        let packet = letter.packet(self.family);
        let zone = from.map_or(WORLD, |network| network.0);
        let arrived = from.map_or("up0", bridge);
        match (network_of(receiver), from) {
            // To a neighbour, by the bridge.
            (Some(network), Some(from)) if network == from => Ok(()),
            (Some(network), _) => {
                let letter = letter.on_link(bridge_mac(network), mac(name_of(receiver)));
                let at = into_network(network, Some(arrived));
                let outcome = self.fixture.run(at, &letter.frame(self.family))?;
                let verdict = self.model.network_receives(packet, zone, network);
                self.judge(letter, verdict, &outcome).with_context(|| format!("at {at:?}"))?;
                Ok(())
            }
            (None, Some(_)) if is_outside(receiver) => {
                let letter = letter.on_link(UPLINK_MAC, ROUTER_MAC);
                let at = to_uplink("up0", Some(arrived));
                let outcome = self.fixture.run(at, &letter.frame(self.family))?;
                let verdict = self.model.uplink_sends(packet, zone);
                let left =
                    self.judge(letter, verdict, &outcome).with_context(|| format!("at {at:?}"))?;
                if let Some(left) = left {
                    ensure!(left.sender() == HOST, "{} has left the host", left.sender());
                }
                Ok(())
            }
            // To the host itself.
            (None, _) => Ok(()),
        }
    }

    /// Compares what became of a letter with what should; returns it as it goes on.
    fn judge(
        &mut self,
        letter: Letter,
        verdict: Verdict,
        outcome: &Outcome,
    ) -> Result<Option<Letter>> {
        let context = || format!("{letter:?}, wanted {verdict:?}, seen {}", outcome.verdict);
        let (wanted, left, goes_on) = match verdict {
            Verdict::Pass => (TCX_NEXT, letter, true),
            Verdict::PassAs(to) => (TCX_NEXT, letter.translated(to), true),
            Verdict::Switched(to) => {
                let receiver = mac(name_of(*to.destination.ip()));
                (TCX_NEXT, letter.translated(to).on_link(letter.wire.source_mac, receiver), false)
            }
            Verdict::TurnAround(to) => {
                let bridge = bridge_mac(network_of(*to.destination.ip()).context("no container")?);
                let letter = letter.translated(to).on_link(bridge, letter.wire.source_mac);
                (TCX_REDIRECT, letter, false)
            }
            Verdict::Dropped(network, reason) => {
                ensure!(outcome.verdict == TCX_DROP, "{}", context());
                *self.dropped.entry((network, reason)).or_default() += 1;
                return Ok(None);
            }
            Verdict::Refused(network, reason) => {
                *self.dropped.entry((network, reason)).or_default() += 1;
                self.note("refusals");
                // Its sender is told, but not more often than it takes.
                if outcome.verdict == TCX_REDIRECT {
                    let told = outcome.frame.get(..6) == Some(&letter.wire.source_mac);
                    ensure!(told, "{}: told {}", context(), hex(&outcome.frame));
                    verify(std::slice::from_ref(&outcome.frame)).with_context(context)?;
                } else {
                    ensure!(outcome.verdict == TCX_DROP, "{}", context());
                }
                return Ok(None);
            }
        };
        let frame = left.frame(self.family);
        ensure!(
            outcome.verdict == wanted && outcome.frame == frame,
            "{}\n    wanted {}\n    seen   {}",
            context(),
            hex(&frame),
            hex(&outcome.frame)
        );
        Ok(goes_on.then_some(left))
    }

    fn age(&mut self) -> Result<()> {
        self.model.age();
        let (family, model, now) = (self.family, &self.model, now()?);
        let aged = self.fixture.visit_halves(|entry| match key_of(family, entry) {
            Some(key) if model.halves.contains_key(&key) => {
                entry.last_seen = now - model.halves[&key].idle;
                Fate::Changed
            }
            _ => Fate::Kept,
        })?;
        ensure!(aged == model.halves.len(), "{aged} halves aged");
        Ok(())
    }

    fn collect(&mut self) -> Result<()> {
        self.fixture.set_collection(TIMEOUTS, true)?;
        let collected = self.fixture.backend().collect()?;
        self.fixture.set_collection(TIMEOUTS, self.model.has_agent)?;
        let wanted = self.model.collect();
        *self.tally.entry("collected").or_default() += collected;
        ensure!(collected == wanted, "collected: wanted {wanted} flows, seen {collected}");
        Ok(())
    }

    fn outdate(&mut self, container: Ipv4Addr) -> Result<()> {
        let generation = self.model.generations[&container];
        for half in self.model.halves.values_mut() {
            if half.generation == generation {
                half.generation = PREDECESSOR;
            }
        }
        self.fixture.visit_halves(|entry| {
            if entry.generation == generation {
                entry.generation = PREDECESSOR;
                return Fate::Changed;
            }
            Fate::Kept
        })?;
        self.settle(generation)
    }

    /// Flows by their numbers.
    fn numbers(&self) -> Result<BTreeMap<u32, Key>> {
        let (family, mut numbers) = (self.family, BTreeMap::new());
        self.fixture.visit_halves(|entry| {
            let key = key_of(family, entry).filter(|_| entry.is_original);
            numbers.extend(key.map(|key| (entry.number, key)));
            Fate::Kept
        })?;
        Ok(numbers)
    }

    /// Puts an account right after the table was changed behind the programs' back.
    fn settle(&self, generation: u32) -> Result<()> {
        let flows = self.model.opened_by(generation) as u64;
        Ok(self.fixture.usage()?.insert(generation, flows, 0)?)
    }

    fn replace(&mut self, container: Ipv4Addr) -> Result<()> {
        let old = EndpointId(self.model.generations[&container]);
        let new = EndpointId(self.next_generation);
        self.next_generation += 1;
        self.fixture.apply(|program| {
            if let Some(endpoint) = program.endpoints.remove(&old) {
                program.endpoints.insert(new, endpoint);
            }
            let follow = |(key, target): (_, PublishedTarget)| {
                let endpoint = if target.endpoint == old { new } else { target.endpoint };
                (key, PublishedTarget { endpoint, ..target })
            };
            program.published = program.published.iter().map(follow).collect();
        })?;
        self.model.replace(container, new.0);
        Ok(())
    }

    fn deny(&mut self, client: Option<Ipv4Addr>) -> Result<()> {
        let mut policy_generation = 0;
        self.fixture.apply(|program| {
            let Some(network) = program.networks.get_mut(&A) else { return };
            network.policy = denying(client.unwrap_or(NOBODY));
            network.policy_generation += 1;
            policy_generation = network.policy_generation;
        })?;
        (self.model.denied, self.model.policy_generation) = (client, policy_generation);
        Ok(())
    }

    /// The flow table.
    fn entries(&self) -> Result<BTreeMap<Key, Half>> {
        let (mut table, mut strangers) = (BTreeMap::new(), 0);
        let (family, now) = (self.family, now()?);
        self.fixture.visit_halves(|entry| {
            match (key_of(family, entry), ends(family, entry.to)) {
                (Some(key), Some(to)) => {
                    let half = Half {
                        to,
                        reply_zone: entry.reply_zone.0,
                        network: entry.network,
                        policy_generation: entry.policy_generation,
                        generation: entry.generation,
                        seen: entry.seen,
                        idle: now.saturating_sub(entry.last_seen) / STEP * STEP,
                        is_original: entry.is_original,
                    };
                    table.insert(key, half);
                }
                _ => strangers += 1,
            }
            Fate::Kept
        })?;
        ensure!(strangers == 0, "{strangers} halves of the other family, or of nobody");
        Ok(table)
    }

    /// Compares the flow table with the model, and looks whether it keeps the promises whatever
    /// the model says.
    fn compare(&self) -> Result<()> {
        let table = self.entries()?;
        for (key, half) in &table {
            let wanted = self.model.halves.get(key);
            ensure!(wanted == Some(half), "{key:?}\n    wanted {wanted:?}\n    seen   {half:?}");
        }
        let missing = self.model.halves.iter().find(|(key, _)| !table.contains_key(key));
        ensure!(missing.is_none(), "missing: {missing:?}");

        let mut leaving = BTreeSet::new();
        for (key, half) in &table {
            let peer_key = half.peer_key(key.protocol);
            let peer = table.get(&peer_key).filter(|peer| peer.peer_key(key.protocol) == *key);
            let peer = peer.with_context(|| format!("half a flow: {key:?}, {half:?}"))?;
            ensure!(peer.to == key.ends.reversed(), "no way back to {key:?}: {peer:?}");
            ensure!(leaving.insert(peer_key), "two flows have one answer: {peer_key:?}");
            if half.is_original {
                check_source(key, half)?;
            }
        }
        Ok(())
    }
}

/// A source port that was chosen is nobody else's.
fn check_source(key: &Key, half: &Half) -> Result<()> {
    let (source, port) = (half.to.source, half.to.source.port());
    if key.ends.source == source {
        return Ok(());
    }
    let is_kept = port == key.ends.source.port();
    let is_reserved = (RESERVED.0..=RESERVED.1).contains(&port);
    ensure!(is_kept || is_reserved, "{port} is not reserved for {key:?}");
    if [IPPROTO_TCP, IPPROTO_UDP].contains(&key.protocol) && source.ip() != key.ends.source.ip() {
        let is_published = PUBLISHED.iter().any(|(published, _)| *published == port);
        let is_hosts = source == SocketAddrV4::new(HOST, HOST_SOCKET);
        ensure!(!is_published && !is_hosts, "{source} is the host's own");
        let is_ephemeral = (EPHEMERAL.0..=EPHEMERAL.1).contains(&port);
        ensure!(is_reserved || !is_ephemeral, "{source} may become a socket's of the host");
    }
    Ok(())
}

/// Networks a and b, and what the model knows of ports and limits.
fn limit_program(program: &mut Program) {
    program.nat_ports = NatPorts { reserved: RESERVED, ephemeral: EPHEMERAL };
    program.networks.retain(|id, _| [A, B].contains(id));
    program.endpoints.retain(|_, endpoint| [A, B].contains(&endpoint.network));
    if let Some(network) = program.networks.get_mut(&A) {
        network.endpoint_flows = LIMIT as u32;
        // Never without rules: the agent looks after all flows when a network gets its first.
        network.policy = denying(NOBODY);
    }
    program.published.clear();
    for (port, target) in PUBLISHED {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for family in [Family::V4, Family::V6] {
                let dialled = (Ipv4Addr::UNSPECIFIED, port);
                program.published.extend([published(family, dialled, protocol, target)]);
            }
        }
    }
}

/// Rules that keep one client out.
fn denying(client: Ipv4Addr) -> Vec<Rule> {
    let client = [Family::V4, Family::V6].map(|family| family.address(client));
    client.map(|client| Rule { action: Action::Deny, first: client, last: client }).into()
}

/// A packet that somebody sends of its own accord.
fn dialled(dial: Dial) -> Letter {
    let ends = Ends { source: dial.from, destination: dial.to };
    Letter { wire: wire(ends), kind: dial.kind, forged: false, complainer: None }
}

/// A packet where it begins.
fn wire(ends: Ends) -> Wire {
    let (source, destination) = (*ends.source.ip(), *ends.destination.ip());
    let (source_mac, destination_mac) = match (network_of(source), network_of(destination)) {
        (Some(own), Some(other)) if own == other => {
            (mac(name_of(source)), mac(name_of(destination)))
        }
        (Some(own), _) => (mac(name_of(source)), bridge_mac(own)),
        (None, _) => (ROUTER_MAC, UPLINK_MAC),
    };
    Wire { source_mac, destination_mac, source: ends.source, destination: ends.destination }
}

/// Name of a container.
fn name_of(party: Ipv4Addr) -> &'static str {
    let found = CONTAINERS.iter().find(|(name, _)| address(name) == party);
    found.expect("an address of a container").0
}

fn is_outside(party: Ipv4Addr) -> bool {
    party.octets()[0] == 10 && party != HOST
}

fn key_of(family: Family, entry: &Entry) -> Option<Key> {
    let Zone(zone) = entry.zone;
    Some(Key { zone, protocol: entry.protocol, ends: ends(family, entry.from)? })
}

/// Both ends as parties; `None` for addresses of another family.
fn ends(family: Family, [source, destination]: [(IpAddr, u16); 2]) -> Option<Ends> {
    let party = |(address, port)| Some(SocketAddrV4::new(family.party(address)?, port));
    Some(Ends { source: party(source)?, destination: party(destination)? })
}

/// The programs' clock.
fn now() -> Result<u32> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the clock")?;
    u32::try_from(now.tv_sec()).context("uptime in 32 bits of seconds")
}
