//! Whole ways of packets and their answers, hook by hook, for every protocol and every shape.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result};
use netdp::model::NetworkId;
use netdp_common::counter::Reason;

use crate::{
    datagram::{Datagram, Kind, Shape, Wire},
    family::Family,
    fixture::{
        A, At, B, Fixture, HOST, HOST_SECOND, HOST_TUN, HOST_UP1, OUTSIDE, OUTSIDE_TUN,
        OUTSIDE_UP1, ROUTER_MAC, SNAT, SeenFlow, UPLINK_MAC, Want, address, bridge, bridge_mac,
        from_container, from_container_wire, from_outside_wire, from_uplink, gateway, into_network,
        mac, network_of, pass, pass_as, sent_as, to_uplink, turn_around_as,
    },
};

/// What two ends say to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Talk {
    Tcp,
    Udp,
    BareUdp,
    Ping,
    Sctp,
    Gre,
}

const ALL: &[Talk] = &[Talk::Tcp, Talk::Udp, Talk::BareUdp, Talk::Ping, Talk::Sctp, Talk::Gre];
/// What a routed network lets in from outside.
const ROUTED: &[Talk] = &[Talk::Tcp, Talk::Udp, Talk::BareUdp, Talk::Ping];
const PORTS: &[Talk] = &[Talk::Tcp, Talk::Udp, Talk::BareUdp];

impl Talk {
    /// Question and answer, twice.
    fn rounds(self) -> [(Kind, Kind); 2] {
        match self {
            Self::Tcp => [(Kind::Syn, Kind::SynAck), (Kind::Segment, Kind::Segment)],
            Self::Udp => [(Kind::Udp, Kind::Udp); 2],
            Self::BareUdp => [(Kind::BareUdp, Kind::BareUdp); 2],
            Self::Ping => [(Kind::Request, Kind::Reply); 2],
            Self::Sctp => [(Kind::Sctp, Kind::Sctp); 2],
            Self::Gre => [(Kind::Gre, Kind::Gre); 2],
        }
    }

    /// State after the first question, the first answer, the second question.
    fn states(self) -> [&'static str; 3] {
        match self {
            Self::Tcp => ["half-open", "half-open", "established"],
            _ => ["unreplied", "replied", "replied"],
        }
    }

    /// The port that is dialled; a ping has none.
    fn port(self, port: u16) -> u16 {
        if matches!(self, Self::Ping | Self::Gre) { 0 } else { port }
    }

    /// The port that is dialled from, or the identifier.
    fn own_port(self, port: u16) -> u16 {
        if self == Self::Gre { 0 } else { self.rounds()[0].0.kept(port) }
    }

    fn at(self, address: Ipv4Addr, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(address, self.port(port))
    }
}

/// One hook on the way: the packet as it arrives there and as it leaves.
#[derive(Clone, Copy)]
struct Leg {
    at: At,
    arrives: Wire,
    leaves: Wire,
    turns_around: bool,
    /// The stack has forwarded it: one hop less to live.
    forwarded: bool,
    /// It goes past the stack from here, and loses so many hops.
    sent: Option<u8>,
}

impl Leg {
    fn arriving(at: At, arrives: Wire, leaves: Wire) -> Self {
        Self { at, arrives, leaves, turns_around: false, forwarded: false, sent: None }
    }

    fn forwarded(at: At, arrives: Wire, leaves: Wire) -> Self {
        Self { forwarded: true, ..Self::arriving(at, arrives, leaves) }
    }

    fn want(&self) -> Want {
        if let Some(hops) = self.sent {
            sent_as(self.leaves, hops)
        } else if self.turns_around {
            turn_around_as(self.leaves)
        } else if self.arrives == self.leaves {
            pass()
        } else {
            pass_as(self.leaves)
        }
    }
}

/// The way that these legs are where the host's stack is passed by: all that is done on it is done at
/// once.
fn shortened(legs: &[Leg]) -> Vec<Leg> {
    let (first, last) = (&legs[0], &legs[legs.len() - 1]);
    if first.turns_around {
        return vec![Leg {
            turns_around: true,
            ..Leg::arriving(first.at, first.arrives, last.leaves)
        }];
    }
    // The kernel writes the addresses of the next link when it has found the next hop.
    let leaves = if last.at.is_at_uplink() {
        last.leaves.on_link(first.arrives.source_mac, first.arrives.destination_mac)
    } else {
        last.leaves
    };
    let hops = legs.iter().filter(|leg| leg.forwarded).count() as u8;
    vec![Leg { sent: Some(hops), ..Leg::arriving(first.at, first.arrives, leaves) }]
}

/// A way and the way back.
struct Journey {
    there: Vec<Leg>,
    back: Vec<Leg>,
    opens: (NetworkId, Reason),
}

impl Journey {
    /// Whether a packet in this shape may go past the host's stack.
    fn may_be_shortened(&self, family: Family, shape: Shape) -> bool {
        // Options are the stack's to read, and IPv6 has a header for fragments.
        let is_plain = !shape.options && (family == Family::V4 || !shape.cut);
        is_plain && !self.there.iter().any(|leg| leg.at.is_at_tun())
    }

    /// The flow as the table should show it.
    fn record(&self, family: Family, talk: Talk, state: &'static str) -> SeenFlow {
        let (first, last) = (self.there[0].arrives, self.there[self.there.len() - 1].leaves);
        SeenFlow {
            protocol: talk.rounds()[0].0.protocol(family).0,
            network: self.opens.0,
            source: first.source,
            destination: first.destination,
            translated_source: last.source,
            translated_destination: last.destination,
            state,
        }
    }
}

/// Walks a journey with every protocol in every shape.
fn walk(fixture: &mut Fixture, talks: &[Talk], journey: impl Fn(Talk) -> Journey) -> Result<()> {
    for &talk in talks {
        if !talk.rounds()[0].0.is_of(fixture.family) {
            continue;
        }
        for shape in Shape::ALL {
            for fast_path in [false, true] {
                fixture.set_fast_path(fast_path)?;
                walk_once(fixture, talk, shape, &journey(talk), fast_path)
                    .with_context(|| format!("{talk:?}, {shape:?}, fast path {fast_path}"))?;
                fixture.remove_flows()?;
            }
        }
    }
    Ok(())
}

fn walk_once(
    fixture: &mut Fixture,
    talk: Talk,
    shape: Shape,
    journey: &Journey,
    fast_path: bool,
) -> Result<()> {
    let [asked, answered, established] = talk.states();
    for (round, (question, answer)) in talk.rounds().into_iter().enumerate() {
        // A SYN is never in pieces: the rest would count as data.
        let shape = Shape { cut: shape.cut && question != Kind::Syn, ..shape };
        let is_short = fast_path && journey.may_be_shortened(fixture.family, shape);
        let way = |legs: &[Leg]| if is_short { shortened(legs) } else { legs.to_vec() };
        let datagram = Datagram::new(question, journey.there[0].arrives);
        travel(fixture, "question", &way(&journey.there), datagram.shaped(shape), |want| {
            if round == 0 { want.opening(journey.opens.0, journey.opens.1) } else { want }
        })?;
        let state = if round == 0 { asked } else { established };
        fixture.expect_flows(&[journey.record(fixture.family, talk, state)])?;
        let datagram = Datagram::new(answer, journey.back[0].arrives);
        travel(fixture, "answer", &way(&journey.back), datagram.shaped(shape), |want| want)?;
        let state = if round == 0 { answered } else { established };
        fixture.expect_flows(&[journey.record(fixture.family, talk, state)])?;
    }
    Ok(())
}

fn travel(
    fixture: &mut Fixture,
    name: &str,
    legs: &[Leg],
    mut datagram: Datagram,
    first: impl FnOnce(Want) -> Want,
) -> Result<()> {
    let mut first = Some(first);
    for leg in legs {
        if leg.forwarded {
            datagram.ttl -= 1;
        }
        // A new link has other MACs; the rest is what the leg before has left.
        let on_link = datagram.wire.on_link(leg.arrives.source_mac, leg.arrives.destination_mac);
        assert_eq!(on_link, leg.arrives, "a journey without a gap");
        datagram = datagram.with_wire(leg.arrives);
        let want = leg.want();
        let want = if let Some(first) = first.take() { first(want) } else { want };
        datagram = fixture.expect(name, leg.at, &datagram, want)?;
    }
    Ok(())
}

/// From a container through an uplink, seen there as `seen_as`.
fn outward(
    talk: Talk,
    endpoint: &'static str,
    (uplink, outside): (&'static str, Ipv4Addr),
    seen_as: Ipv4Addr,
) -> Journey {
    let network = network_of(endpoint);
    let dials = from_container_wire(endpoint, talk.own_port(4000), talk.at(outside, 80));
    let routed = dials.on_link(UPLINK_MAC, ROUTER_MAC);
    let seen = routed.from(SocketAddrV4::new(seen_as, talk.own_port(4000)));
    let delivered = seen.answer().to(dials.source);
    let switched = delivered.on_link(bridge_mac(network), mac(endpoint));
    Journey {
        there: vec![
            Leg::arriving(from_container(endpoint), dials, dials),
            Leg::forwarded(to_uplink(uplink, Some(bridge(network))), routed, seen),
        ],
        back: vec![
            Leg::arriving(from_uplink(uplink), seen.answer(), delivered),
            Leg::forwarded(into_network(network, Some(uplink)), switched, switched),
        ],
        opens: (network, Reason::FlowOut),
    }
}

/// From outside to `dialled`, which leads to a container's port 80 (`a1` and its like).
fn inward(
    talk: Talk,
    (uplink, outside): (&'static str, Ipv4Addr),
    dialled: SocketAddrV4,
    endpoint: &'static str,
) -> Journey {
    let network = network_of(endpoint);
    let dials = from_outside_wire(SocketAddrV4::new(outside, talk.own_port(5000)), dialled);
    let target = talk.at(address(endpoint), 80);
    let translated = dials.to(target);
    let switched = translated.on_link(bridge_mac(network), mac(endpoint));
    let answers = switched.answer();
    let routed = answers.on_link(UPLINK_MAC, ROUTER_MAC);
    Journey {
        there: vec![
            Leg::arriving(from_uplink(uplink), dials, translated),
            Leg::forwarded(into_network(network, Some(uplink)), switched, switched),
        ],
        back: vec![
            Leg::arriving(from_container(endpoint), answers, answers),
            Leg::forwarded(to_uplink(uplink, Some(bridge(network))), routed, routed.from(dialled)),
        ],
        opens: (network, Reason::FlowIn),
    }
}

/// From b1 to a published port of a1, dialled at `dialled`.
fn across(dialled: SocketAddrV4) -> Journey {
    let target = SocketAddrV4::new(address("a1"), 80);
    let dials = from_container_wire("b1", 4000, dialled);
    let translated = dials.to(target);
    let switched = translated.on_link(bridge_mac(A), mac("a1"));
    let answers = switched.answer();
    let routed = answers.on_link(bridge_mac(B), mac("b1"));
    Journey {
        there: vec![
            Leg::arriving(from_container("b1"), dials, translated),
            Leg::forwarded(into_network(A, Some("br-b")), switched, switched),
        ],
        back: vec![
            Leg::arriving(from_container("a1"), answers, answers),
            Leg::forwarded(into_network(B, Some("br-a")), routed, routed.from(dialled)),
        ],
        opens: (A, Reason::FlowHairpin),
    }
}

/// From a member of a network to a port that another member publishes.
fn switched(client: &'static str, server: &'static str, dialled: u16, port: u16) -> Journey {
    let dialled = SocketAddrV4::new(HOST, dialled);
    let dials = from_container_wire(client, 4000, dialled);
    let arrives = dials.to(SocketAddrV4::new(address(server), port));
    let arrives = arrives.on_link(mac(client), mac(server));
    let answers = arrives.answer();
    Journey {
        there: vec![Leg::arriving(from_container(client), dials, arrives)],
        back: vec![Leg::arriving(from_container(server), answers, answers.from(dialled))],
        opens: (network_of(client), Reason::FlowHairpin),
    }
}

/// From a1 to a port that it publishes itself: it sees the gateway.
fn to_itself(_: Talk) -> Journey {
    let dialled = SocketAddrV4::new(HOST, 8080);
    let dials = from_container_wire("a1", 4000, dialled);
    let arrives = dials
        .from(SocketAddrV4::new(gateway(A), 4000))
        .to(SocketAddrV4::new(address("a1"), 80))
        .on_link(bridge_mac(A), mac("a1"));
    let answers = arrives.answer();
    let returns = answers.from(dialled).to(dials.source).on_link(bridge_mac(A), mac("a1"));
    let turning = |arrives, leaves| Leg {
        turns_around: true,
        ..Leg::arriving(from_container("a1"), arrives, leaves)
    };
    Journey {
        there: vec![turning(dials, arrives)],
        back: vec![turning(answers, returns)],
        opens: (A, Reason::FlowHairpin),
    }
}

const UP0: (&str, Ipv4Addr) = ("up0", OUTSIDE);
const UP1: (&str, Ipv4Addr) = ("up1", OUTSIDE_UP1);
const TUN0: (&str, Ipv4Addr) = ("tun0", OUTSIDE_TUN);

pub(crate) fn a_container_reaches_the_world_as_the_uplink(fixture: &mut Fixture) -> Result<()> {
    walk(fixture, ALL, |talk| outward(talk, "a1", UP0, HOST))?;
    walk(fixture, ALL, |talk| outward(talk, "a1", UP1, HOST_UP1))
}

pub(crate) fn a_container_reaches_the_world_through_an_uplink_without_ethernet(
    fixture: &mut Fixture,
) -> Result<()> {
    walk(fixture, ALL, |talk| outward(talk, "a1", TUN0, HOST_TUN))
}

pub(crate) fn a_fixed_source_address_is_kept(fixture: &mut Fixture) -> Result<()> {
    walk(fixture, ALL, |talk| outward(talk, "s1", UP0, SNAT))?;
    walk(fixture, ALL, |talk| outward(talk, "s1", UP1, SNAT))
}

pub(crate) fn a_container_keeps_its_address_where_masquerade_is_off(
    fixture: &mut Fixture,
) -> Result<()> {
    walk(fixture, ALL, |talk| outward(talk, "m1", UP0, address("m1")))?;
    walk(fixture, ALL, |talk| outward(talk, "r1", UP0, address("r1")))
}

pub(crate) fn a_published_port_answers_the_world(fixture: &mut Fixture) -> Result<()> {
    walk(fixture, PORTS, |talk| inward(talk, UP0, SocketAddrV4::new(HOST, 8080), "a1"))?;
    walk(fixture, PORTS, |talk| inward(talk, UP0, SocketAddrV4::new(HOST_SECOND, 8081), "a1"))?;
    walk(fixture, PORTS, |talk| inward(talk, UP1, SocketAddrV4::new(HOST_UP1, 8080), "a1"))?;
    walk(fixture, PORTS, |talk| inward(talk, TUN0, SocketAddrV4::new(HOST_TUN, 8080), "a1"))
}

pub(crate) fn an_unprotected_network_is_dialled_directly(fixture: &mut Fixture) -> Result<()> {
    walk(fixture, ALL, |talk| inward(talk, UP0, talk.at(address("u1"), 80), "u1"))
}

pub(crate) fn a_routed_network_is_dialled_at_published_ports_and_pinged(
    fixture: &mut Fixture,
) -> Result<()> {
    walk(fixture, ROUTED, |talk| inward(talk, UP0, talk.at(address("r1"), 80), "r1"))
}

pub(crate) fn a_published_port_answers_other_networks(fixture: &mut Fixture) -> Result<()> {
    for dialled in [HOST, HOST_UP1, gateway(A), gateway(B)] {
        walk(fixture, PORTS, |_| across(SocketAddrV4::new(dialled, 8080)))?;
    }
    Ok(())
}

pub(crate) fn a_published_port_answers_its_own_network(fixture: &mut Fixture) -> Result<()> {
    walk(fixture, PORTS, |_| switched("a2", "a1", 8080, 80))
}

pub(crate) fn a_published_port_answers_its_own_network_without_icc(
    fixture: &mut Fixture,
) -> Result<()> {
    walk(fixture, PORTS, |_| switched("c2", "c1", 7070, 70))
}

pub(crate) fn a_container_reaches_its_own_published_port_as_the_gateway(
    fixture: &mut Fixture,
) -> Result<()> {
    walk(fixture, PORTS, to_itself)
}
