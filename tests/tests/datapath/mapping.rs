//! Networks that map independently of endpoints: one port outside for each port of a container.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};

use anyhow::{Context, Result, ensure};
use netdp::{
    dataplane::{Count, Dataplane, NatPorts},
    model::{Action, EndpointId, NatBehaviour},
};
use netdp_common::{config::Timeouts, counter::Reason};

use crate::{
    datagram::{Datagram, Kind, SEQUENCE},
    fixture::{
        A, Fixture, HOST, OUTSIDE, ROUTER_MAC, TCX_NEXT, UPLINK_MAC, bridge, bridge_mac, dropped,
        from_container, from_container_wire, from_outside_wire, from_uplink, id_of, into_network,
        mac, network_of, pass, pass_as, socket, to_uplink,
    },
    nat::expect_refusal,
    policies::{rule, set},
};

/// A port that is never kept.
const PORT: u16 = 40_001;
const KINDS: [Kind; 3] = [Kind::Syn, Kind::Udp, Kind::Request];
const SERVERS: [Ipv4Addr; 3] = [OUTSIDE, Ipv4Addr::new(10, 0, 0, 4), Ipv4Addr::new(11, 0, 0, 1)];
const STRANGER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(11, 0, 0, 99), 7777);

fn behave(fixture: &mut Fixture, nat: NatBehaviour) -> Result<()> {
    fixture.apply(|program| {
        if let Some(network) = program.networks.get_mut(&A) {
            network.nat = nat;
        }
    })?;
    Ok(())
}

fn server(kind: Kind, address: Ipv4Addr) -> SocketAddrV4 {
    SocketAddrV4::new(address, if kind == Kind::Request { 0 } else { 80 })
}

/// Opens a flow to the world, all the way out; returns its source there. `maps`: it is the first
/// of its endpoint's port.
fn dial(
    fixture: &mut Fixture,
    kind: Kind,
    (endpoint, port): (&'static str, u16),
    to: SocketAddrV4,
    maps: bool,
) -> Result<SocketAddrV4> {
    let network = network_of(endpoint);
    let dials = from_container_wire(endpoint, port, to);
    let packet = Datagram::new(kind, dials);
    let frame = packet.frame(fixture.family);
    let counted =
        |reason| Count { network: Some(network), reason, packets: 1, bytes: frame.len() as u64 };
    let reasons: &[Reason] =
        if maps { &[Reason::FlowOut, Reason::Mapping] } else { &[Reason::FlowOut] };
    let counts = reasons.iter().map(|&reason| counted(reason));
    fixture
        .expect_frame(from_container(endpoint), &frame, TCX_NEXT, counts)
        .with_context(|| format!("{kind:?} from {endpoint}:{port} to {to}"))?;
    let key = (dials.source, to, kind.protocol(fixture.family).0);
    let flows = fixture.flows()?;
    let flow = flows.iter().find(|flow| (flow.source, flow.destination, flow.protocol) == key);
    let source = flow.context("find the flow that has just been opened")?.translated_source;
    let routed = dials.on_link(UPLINK_MAC, ROUTER_MAC);
    let leaves = to_uplink("up0", Some(bridge(network)));
    fixture.expect("leave", leaves, &packet.with_wire(routed), pass_as(routed.from(source)))?;
    Ok(source)
}

pub(crate) fn an_endpoints_port_has_one_port_outside(fixture: &mut Fixture) -> Result<()> {
    behave(fixture, NatBehaviour::EndpointIndependentMapping)?;
    for kind in KINDS {
        let mut sources = Vec::new();
        for (place, address) in SERVERS.into_iter().enumerate() {
            sources.push(dial(fixture, kind, ("a1", PORT), server(kind, address), place == 0)?);
        }
        ensure!(sources[1..].iter().all(|source| *source == sources[0]), "{kind:?}: {sources:?}");
        let other = dial(fixture, kind, ("a2", PORT), server(kind, OUTSIDE), true)?;
        ensure!(other != sources[0], "{kind:?}: two endpoints leave as {other}");
        // A network that did not ask for it.
        let other = dial(fixture, kind, ("b1", PORT), server(kind, OUTSIDE), false)?;
        ensure!(other != sources[0], "{kind:?}: two networks leave as {other}");
    }
    Ok(())
}

pub(crate) fn a_mapped_port_is_nobody_elses(fixture: &mut Fixture) -> Result<()> {
    behave(fixture, NatBehaviour::EndpointIndependentMapping)?;
    fixture.apply(|program| {
        program.nat_ports = NatPorts { reserved: (20_000, 20_001), ephemeral: (32_768, 60_999) };
    })?;
    for kind in [Kind::Syn, Kind::Udp] {
        let mapped = dial(fixture, kind, ("a1", PORT), server(kind, SERVERS[0]), true)?;
        for address in [SERVERS[1], SERVERS[2]] {
            let source = dial(fixture, kind, ("b1", PORT), server(kind, address), false)?;
            ensure!(source != mapped, "{kind:?}: b1 leaves as {source}");
            let wire = from_container_wire("b1", PORT + 1, server(kind, address));
            let more = Datagram::new(kind, wire);
            expect_refusal(fixture, "b1", &more, Reason::PortsExhausted)?;
        }
    }
    Ok(())
}

/// A stranger's packet to the port that a1's has outside.
fn knocks(kind: Kind, mapped: SocketAddrV4) -> Datagram {
    Datagram::new(kind, from_outside_wire(STRANGER, mapped))
}

pub(crate) fn strangers_come_in_where_that_is_asked_for(fixture: &mut Fixture) -> Result<()> {
    for kind in [Kind::Syn, Kind::Udp] {
        behave(fixture, NatBehaviour::EndpointIndependentMapping)?;
        let mapped = dial(fixture, kind, ("a1", PORT), server(kind, OUTSIDE), true)?;
        let knocks = knocks(kind, mapped);
        fixture.expect("mapping only", from_uplink("up0"), &knocks, pass())?;

        behave(fixture, NatBehaviour::EndpointIndependent)?;
        let inside = knocks.wire.to(socket("a1", PORT));
        let opening = pass_as(inside).opening(A, Reason::FlowIn);
        fixture.expect("full cone", from_uplink("up0"), &knocks, opening)?;
        let delivered = knocks.with_wire(inside.on_link(bridge_mac(A), mac("a1")));
        fixture.expect("deliver", into_network(A, Some("up0")), &delivered, pass())?;
        let answers = if kind == Kind::Syn { Kind::SynAck } else { Kind::Udp };
        let answer = from_container_wire("a1", PORT, STRANGER);
        fixture.expect("answer", from_container("a1"), &Datagram::new(answers, answer), pass())?;
        let routed = Datagram::new(answers, answer.on_link(UPLINK_MAC, ROUTER_MAC));
        let leaves = to_uplink("up0", Some("br-a"));
        fixture.expect("leave", leaves, &routed, pass_as(routed.wire.from(mapped)))?;

        // The flow rests on the mapping's kind, not on a published port.
        fixture.apply(|program| program.published.retain(|key, _| key.port != 8081))?;
        fixture.expect("again", from_uplink("up0"), &knocks, pass_as(inside))?;

        fixture.apply(|program| set(program, vec![rule(Action::Deny, [0; 4], [255; 4])]))?;
        let denied = dropped(A, Reason::Policy);
        fixture.expect("policy", from_uplink("up0"), &knocks, denied)?;
        fixture.apply(|program| set(program, Vec::new()))?;
    }
    Ok(())
}

pub(crate) fn a_socket_of_the_host_comes_before_a_mapping(fixture: &mut Fixture) -> Result<()> {
    behave(fixture, NatBehaviour::EndpointIndependent)?;
    // A port that is kept, which a program of the host may bind later.
    let mapped = dial(fixture, Kind::Syn, ("a1", 4000), server(Kind::Syn, OUTSIDE), true)?;
    ensure!(mapped == SocketAddrV4::new(HOST, 4000), "{mapped}");
    let listener = TcpListener::bind((fixture.family.address(HOST), 4000))?;
    let knocks = knocks(Kind::Syn, mapped);
    fixture.expect("the host's", from_uplink("up0"), &knocks, pass())?;
    drop(listener);
    let opening = pass_as(knocks.wire.to(socket("a1", 4000))).opening(A, Reason::FlowIn);
    fixture.expect("the container's", from_uplink("up0"), &knocks, opening)?;
    Ok(())
}

pub(crate) fn a_mapping_lives_as_long_as_something_leaves_by_it(
    fixture: &mut Fixture,
) -> Result<()> {
    behave(fixture, NatBehaviour::EndpointIndependent)?;
    let to = server(Kind::Udp, OUTSIDE);
    let mapped = dial(fixture, Kind::Udp, ("a1", PORT), to, true)?;
    let most = Timeouts::RFC.udp_replied;
    let packet = Datagram::new(Kind::Udp, from_container_wire("a1", PORT, to));
    for round in 0..3 {
        fixture.age(most - 5)?;
        fixture.expect("goes on", from_container("a1"), &packet, pass())?;
        fixture.backend().collect()?;
        let other = SocketAddrV4::new(OUTSIDE, 81 + round);
        let next = dial(fixture, Kind::Udp, ("a1", PORT), other, false)?;
        ensure!(next == mapped, "{next}, mapped {mapped}");
    }
    // What comes in keeps it no longer (RFC 4787, REQ-6).
    fixture.age(most - 5)?;
    let opening = pass_as(knocks(Kind::Udp, mapped).wire.to(socket("a1", PORT)));
    let opening = opening.opening(A, Reason::FlowIn);
    fixture.expect("comes in", from_uplink("up0"), &knocks(Kind::Udp, mapped), opening)?;
    fixture.age(10)?;
    fixture.backend().collect()?;
    let left = fixture.flows()?;
    ensure!(left.iter().all(|flow| !flow.destination.ip().is_unspecified()), "{left:#?}");
    Ok(())
}

pub(crate) fn a_successor_inherits_no_mapping(fixture: &mut Fixture) -> Result<()> {
    behave(fixture, NatBehaviour::EndpointIndependent)?;
    let mapped = dial(fixture, Kind::Udp, ("a1", PORT), server(Kind::Udp, OUTSIDE), true)?;
    fixture.apply(|program| {
        let endpoint = program.endpoints.remove(&id_of("a1"));
        program.endpoints.extend(endpoint.map(|endpoint| (EndpointId(999), endpoint)));
        program.published.retain(|_, target| target.endpoint != id_of("a1"));
    })?;
    ensure!(fixture.halves()? == 0, "something of the predecessor is left");
    fixture.expect("late", from_uplink("up0"), &knocks(Kind::Udp, mapped), pass())?;
    ensure!(fixture.halves()? == 0, "a stranger opened a flow to the successor");
    Ok(())
}

/// A packet that keeps the mapping alive, once a second, is judged as any other.
pub(crate) fn a_reset_out_of_the_window_ends_no_mapped_flow(fixture: &mut Fixture) -> Result<()> {
    behave(fixture, NatBehaviour::EndpointIndependentMapping)?;
    let to = server(Kind::Syn, OUTSIDE);
    let mapped = dial(fixture, Kind::Syn, ("a1", PORT), to, true)?;
    let answers = from_outside_wire(to, mapped);
    let back = pass_as(answers.to(socket("a1", PORT)));
    fixture.expect("answer", from_uplink("up0"), &Datagram::new(Kind::SynAck, answers), back)?;
    for (distance, is_reset) in [(1 << 31, false), (0, true)] {
        fixture.age(2)?;
        let reset = Datagram::new(Kind::Reset, from_container_wire("a1", PORT, to));
        let reset = Datagram { sequence: SEQUENCE.wrapping_add(distance), ..reset };
        fixture.expect("reset", from_container("a1"), &reset, pass())?;
        let flows = fixture.flows()?;
        let flow = flows.iter().find(|flow| flow.destination == to).context("find the flow")?;
        ensure!((flow.state == "reset") == is_reset, "{distance} bytes ahead: {flow:?}");
    }
    Ok(())
}
