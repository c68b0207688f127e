//! The end of flows: collected, reclaimed, limited, accounted for.

use std::net::SocketAddrV4;

use anyhow::{Context, Result, ensure};
use netdp::dataplane::{Count, Dataplane};
use netdp_common::{config::Timeouts, counter::Reason};

use crate::{
    datagram::{Datagram, Kind},
    fixture::{
        A, Fixture, HOST, OUTSIDE, TCX_NEXT, bridge_mac, dropped, from_container,
        from_container_wire, from_outside_wire, from_uplink, mac, network_of, pass, pass_as,
        socket,
    },
    nat::expect_refusal,
};

const SERVER: SocketAddrV4 = SocketAddrV4::new(OUTSIDE, 80);
const CLIENT: SocketAddrV4 = SocketAddrV4::new(OUTSIDE, 5000);
const DIALLED: SocketAddrV4 = SocketAddrV4::new(HOST, 8080);

/// All different, and short enough for a machine that has just started.
const TIMEOUTS: Timeouts = Timeouts {
    tcp_established: 60,
    tcp_transitory: 40,
    udp_replied: 30,
    udp_unreplied: 20,
    icmp: 10,
    other: 50,
};

/// Far longer than a test takes.
const SLACK: u32 = 5;

/// A packet of an endpoint to the world, from a port that is kept.
fn asks(fixture: &mut Fixture, endpoint: &'static str, kind: Kind, port: u16) -> Result<()> {
    let packet = Datagram::new(kind, from_container_wire(endpoint, port, server(kind)));
    let opening = pass().opening(network_of(endpoint), Reason::FlowOut);
    fixture.expect("asks", from_container(endpoint), &packet, opening)?;
    Ok(())
}

/// The same when the flow is there.
fn goes_on(fixture: &mut Fixture, endpoint: &'static str, kind: Kind, port: u16) -> Result<()> {
    let packet = Datagram::new(kind, from_container_wire(endpoint, port, server(kind)));
    fixture.expect("goes on", from_container(endpoint), &packet, pass())?;
    Ok(())
}

/// The world's answer to a1.
fn is_answered(fixture: &mut Fixture, kind: Kind, port: u16) -> Result<()> {
    let wire = from_outside_wire(server(kind), SocketAddrV4::new(HOST, port));
    let want = pass_as(wire.to(socket("a1", port)));
    fixture.expect("is answered", from_uplink("up0"), &Datagram::new(kind, wire), want)?;
    Ok(())
}

/// Whom a packet is for: where there are no ports, there is none.
fn server(kind: Kind) -> SocketAddrV4 {
    let port = if matches!(kind, Kind::Request | Kind::Reply | Kind::Gre) { 0 } else { 80 };
    SocketAddrV4::new(OUTSIDE, port)
}

/// Opens a flow of a1 with each of these in turn, the first from inside, the next from outside.
fn talk(fixture: &mut Fixture, kinds: &[Kind], port: u16) -> Result<()> {
    for (index, &kind) in kinds.iter().enumerate() {
        match index {
            0 => asks(fixture, "a1", kind, port)?,
            index if index.is_multiple_of(2) => goes_on(fixture, "a1", kind, port)?,
            _ => is_answered(fixture, kind, port)?,
        }
    }
    Ok(())
}

pub(crate) fn idle_flows_are_collected_after_the_timeout_of_their_state(
    fixture: &mut Fixture,
) -> Result<()> {
    let cases: &[(&[Kind], u16, u32)] = &[
        (&[Kind::Syn, Kind::SynAck, Kind::Segment], 4000, TIMEOUTS.tcp_established),
        (&[Kind::Segment, Kind::Fin, Kind::Segment], 4000, TIMEOUTS.tcp_established),
        (&[Kind::Syn], 4000, TIMEOUTS.tcp_transitory),
        (&[Kind::Syn, Kind::SynAck], 4000, TIMEOUTS.tcp_transitory),
        (&[Kind::Segment, Kind::Fin, Kind::Fin], 4000, TIMEOUTS.tcp_transitory),
        (&[Kind::Segment, Kind::Reset], 4000, TIMEOUTS.tcp_transitory),
        (&[Kind::Udp], 4000, TIMEOUTS.udp_unreplied),
        (&[Kind::Udp, Kind::Udp], 4000, TIMEOUTS.udp_replied),
        (&[Kind::Request], Kind::Request.kept(4000), TIMEOUTS.icmp),
        (&[Kind::Request, Kind::Reply], Kind::Request.kept(4000), TIMEOUTS.icmp),
        (&[Kind::Gre], 0, TIMEOUTS.other),
        (&[Kind::Gre, Kind::Gre], 0, TIMEOUTS.other),
    ];
    for &(kinds, port, timeout) in cases {
        talk(fixture, kinds, port)?;
        fixture.age(timeout - SLACK)?;
        expect_collected(fixture, 0, 2).with_context(|| format!("{kinds:?}, too soon"))?;
        fixture.age(2 * SLACK)?;
        expect_collected(fixture, 1, 0).with_context(|| format!("{kinds:?}, in time"))?;
    }
    Ok(())
}

/// Collects under [`TIMEOUTS`]; what the agent leaves there for the next time are its own.
fn expect_collected(fixture: &mut Fixture, wanted: usize, left: usize) -> Result<()> {
    fixture.set_collection(TIMEOUTS, true)?;
    let collected = fixture.backend().collect()?;
    let halves = fixture.halves()?;
    ensure!(
        (collected, halves) == (wanted, left),
        "wanted {wanted} flows collected and {left} halves left, seen {collected} and {halves}"
    );
    Ok(())
}

pub(crate) fn a_packet_in_either_direction_keeps_a_flow(fixture: &mut Fixture) -> Result<()> {
    for from_a1 in [true, false] {
        talk(fixture, &[Kind::Udp, Kind::Udp], 4000)?;
        fixture.age(TIMEOUTS.udp_replied + SLACK)?;
        if from_a1 {
            goes_on(fixture, "a1", Kind::Udp, 4000)?;
        } else {
            is_answered(fixture, Kind::Udp, 4000)?;
        }
        expect_collected(fixture, 0, 2).with_context(|| format!("from a1: {from_a1}"))?;
        fixture.remove_flows()?;
    }
    Ok(())
}

pub(crate) fn only_idle_flows_are_collected(fixture: &mut Fixture) -> Result<()> {
    // More than one order to the collector holds, old and new ones mixed.
    for port in 4000..4050 {
        asks(fixture, "a1", Kind::Udp, port)?;
    }
    fixture.age(TIMEOUTS.udp_unreplied + SLACK)?;
    for port in 4050..4100 {
        asks(fixture, "a1", Kind::Udp, port)?;
    }
    for port in (4000..4050).step_by(2) {
        goes_on(fixture, "a1", Kind::Udp, port)?;
    }
    expect_collected(fixture, 25, 2 * 75)?;
    for port in (4000..4050).step_by(2).chain(4050..4100) {
        goes_on(fixture, "a1", Kind::Udp, port)?;
        is_answered(fixture, Kind::Udp, port)?;
    }
    Ok(())
}

pub(crate) fn without_an_agent_new_flows_see_to_others(shared: &mut Fixture) -> Result<()> {
    // A table of its own: no other test has moved its hand.
    let fixture = &mut shared.with_room_for(16)?;
    for is_agent_there in [true, false] {
        fixture.set_collection(TIMEOUTS, is_agent_there)?;
        fixture.remove_flows()?;
        for port in 4000..4003 {
            asks(fixture, "a1", Kind::Udp, port)?;
        }
        is_answered(fixture, Kind::Udp, 4001)?;
        fixture.age(TIMEOUTS.udp_unreplied + SLACK)?;
        // Each looks at two, and some are left of the round before.
        for port in 4003..4009 {
            asks(fixture, "a1", Kind::Udp, port)?;
        }
        // Of the old ones the unanswered go; the answered one has time left.
        let mut left: Vec<_> = fixture.flows()?.iter().map(|flow| flow.source.port()).collect();
        left.sort_unstable();
        let wanted: Vec<u16> = if is_agent_there {
            (4000..4009).collect()
        } else {
            [4001].into_iter().chain(4003..4009).collect()
        };
        ensure!(left == wanted, "agent there: {is_agent_there}: wanted {wanted:?}, seen {left:?}");
        ensure!(fixture.halves()? == 2 * wanted.len(), "half a flow is left");
    }
    Ok(())
}

pub(crate) fn the_hand_goes_round_the_whole_table(shared: &mut Fixture) -> Result<()> {
    let fixture = &mut shared.with_room_for(16)?;
    fixture.set_collection(TIMEOUTS, false)?;
    for port in 4000..4012 {
        asks(fixture, "a1", Kind::Udp, port)?;
    }
    // Six that open a flow look at the twelve that there were, and none looks where none was.
    let mut looked_at = Vec::new();
    for port in 4000..4006 {
        fixture.remove_flows()?;
        asks(fixture, "a1", Kind::Udp, port)?;
        looked_at.extend(fixture.looked_at()?.take(2));
    }
    looked_at.sort_unstable();
    ensure!(looked_at == (0..12).collect::<Vec<_>>(), "looked at {looked_at:?}");
    Ok(())
}

pub(crate) fn a_table_that_grows_is_looked_through(shared: &mut Fixture) -> Result<()> {
    let fixture = &mut shared.with_room_for(128)?;
    fixture.set_collection(TIMEOUTS, false)?;
    for port in 4000..4020 {
        asks(fixture, "a1", Kind::Udp, port)?;
    }
    fixture.age(TIMEOUTS.udp_unreplied + SLACK)?;
    // As many again as were there: the hand is faster than the table grows.
    for port in 5000..5020 {
        asks(fixture, "a1", Kind::Udp, port)?;
    }
    let left: Vec<_> = fixture.flows()?.iter().map(|flow| flow.source.port()).collect();
    ensure!(left.iter().all(|port| *port >= 5000), "left: {left:?}");
    Ok(())
}

/// Flows that a small table holds.
const ROOM: u16 = 16;

/// Runs a SYN or datagram of a1 that has to take the place of another flow.
fn takes_a_place(fixture: &mut Fixture, port: u16) -> Result<()> {
    let packet = Datagram::new(Kind::Udp, from_container_wire("a1", port, SERVER));
    let frame = packet.frame(fixture.family);
    let count = |reason, bytes| Count { network: Some(A), reason, packets: 1, bytes };
    let counted = [count(Reason::FlowOut, frame.len() as u64), count(Reason::Reclaimed, 0)];
    fixture.expect_frame(from_container("a1"), &frame, TCX_NEXT, counted)?;
    Ok(())
}

pub(crate) fn an_unanswered_flow_makes_room_in_a_full_table(shared: &mut Fixture) -> Result<()> {
    let fixture = &mut shared.with_room_for(ROOM.into())?;
    for port in 4000..4000 + ROOM {
        asks(fixture, "a1", Kind::Udp, port)?;
        if port != 4003 {
            is_answered(fixture, Kind::Udp, port)?;
        }
    }
    takes_a_place(fixture, 3000)?;
    // The newcomer is next, but last in line: each who wants a place looks at half of this table.
    let packet = |port| Datagram::new(Kind::Udp, from_container_wire("a1", port, SERVER));
    let full = dropped(A, Reason::FlowTableFull);
    fixture.expect("looks at the first half", from_container("a1"), &packet(3001), full)?;
    takes_a_place(fixture, 3001)?;
    is_answered(fixture, Kind::Udp, 3001)?;
    for port in [3002, 3003, 3004] {
        fixture.expect("all are answered", from_container("a1"), &packet(port), full)?;
    }
    for port in (4000..4000 + ROOM).filter(|port| *port != 4003).chain([3001]) {
        goes_on(fixture, "a1", Kind::Udp, port)?;
        is_answered(fixture, Kind::Udp, port)?;
    }
    ensure!(fixture.halves()? == 2 * usize::from(ROOM), "{} halves", fixture.halves()?);
    Ok(())
}

pub(crate) fn an_endpoint_opens_as_many_flows_as_its_network_allows(
    fixture: &mut Fixture,
) -> Result<()> {
    fixture.limit_endpoints(A, 2)?;
    asks(fixture, "a1", Kind::Udp, 4000)?;
    let hairpin = from_container_wire("a1", 4000, SocketAddrV4::new(HOST, 8443));
    let opening =
        pass_as(hairpin.to(socket("b1", 443))).opening(network_of("b1"), Reason::FlowHairpin);
    fixture.expect("across", from_container("a1"), &Datagram::new(Kind::Udp, hairpin), opening)?;
    let third = Datagram::new(Kind::Syn, from_container_wire("a1", 4001, SERVER));
    expect_refusal(fixture, "a1", &third, Reason::EndpointLimit)?;
    ensure!(fixture.halves()? == 4, "a refused flow left a half");
    // Those that are open, those into it, and those of its neighbours go on.
    goes_on(fixture, "a1", Kind::Udp, 4000)?;
    let dials = from_outside_wire(CLIENT, DIALLED);
    let opening = pass_as(dials.to(socket("a1", 80))).opening(A, Reason::FlowIn);
    fixture.expect("into it", from_uplink("up0"), &Datagram::new(Kind::Udp, dials), opening)?;
    asks(fixture, "a2", Kind::Udp, 4002)?;
    // One that ends makes room for another.
    fixture.age(TIMEOUTS.udp_unreplied + SLACK)?;
    goes_on(fixture, "a2", Kind::Udp, 4002)?;
    expect_collected(fixture, 3, 2)?;
    asks(fixture, "a1", Kind::Syn, 4001)?;
    fixture.limit_endpoints(A, 0)
}

pub(crate) fn an_account_follows_the_flows_of_its_endpoint(fixture: &mut Fixture) -> Result<()> {
    let expect = |fixture: &Fixture, a1, b1| {
        let used = (fixture.used_by("a1")?, fixture.used_by("b1")?);
        ensure!(used == (a1, b1), "flows of a1 and b1: wanted {:?}, seen {used:?}", (a1, b1));
        anyhow::Ok(())
    };
    for port in 4000..4003 {
        asks(fixture, "a1", Kind::Udp, port)?;
    }
    goes_on(fixture, "a1", Kind::Udp, 4000)?;
    let across = from_container_wire("b1", 4000, DIALLED);
    let arrives = across.to(socket("a1", 80));
    let opening = pass_as(arrives).opening(A, Reason::FlowHairpin);
    let packet = Datagram::new(Kind::Udp, across);
    fixture.expect("across", from_container("b1"), &packet, opening)?;
    expect(fixture, 3, 1)?;
    // Into a container is nobody's; neither is an answer.
    let dials = from_outside_wire(CLIENT, DIALLED);
    let opening = pass_as(dials.to(socket("a1", 80))).opening(A, Reason::FlowIn);
    fixture.expect("in", from_uplink("up0"), &Datagram::new(Kind::Udp, dials), opening)?;
    let answer = arrives.answer().on_link(mac("a1"), bridge_mac(A));
    fixture.expect("answer", from_container("a1"), &Datagram::new(Kind::Udp, answer), pass())?;
    expect(fixture, 3, 1)?;
    // A port that is closed ends the flow through it, idle time the others.
    fixture.apply(|program| program.published.retain(|key, _| key.port != 8080))?;
    expect(fixture, 3, 0)?;
    fixture.age(TIMEOUTS.udp_unreplied + SLACK)?;
    expect_collected(fixture, 3, 0)?;
    expect(fixture, 0, 0)
}
