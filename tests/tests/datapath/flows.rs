//! The life of flows: opening, following, ending, losing what they rest on.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddrV4},
};

use anyhow::{Result, ensure};
use netdp::{
    dataplane::{Dataplane, PublishedKey, PublishedTarget},
    model::{EndpointId, Protocol},
};
use netdp_common::{config::Timeouts, counter::Reason};

use crate::{
    datagram::{Datagram, Kind, SEQUENCE},
    family::{Family, ipv6},
    fixture::{
        A, FLOWS, Fixture, HOST, OUTSIDE, ROUTED, ROUTER_MAC, TCX_NEXT, UPLINK_MAC, address,
        bridge_mac, dropped, from_container, from_container_wire, from_outside_wire, from_uplink,
        id_of, into_network, mac, pass, pass_as, socket, to_uplink,
    },
    halves::Fate,
    standard::published,
};

const SERVER: SocketAddrV4 = SocketAddrV4::new(OUTSIDE, 80);
const CLIENT: SocketAddrV4 = SocketAddrV4::new(OUTSIDE, 5000);
const DIALLED: SocketAddrV4 = SocketAddrV4::new(HOST, 8080);

/// A packet of a1 to the world.
fn asks(fixture: &mut Fixture, kind: Kind, port: u16, opens: bool) -> Result<()> {
    let packet = Datagram::new(kind, from_container_wire("a1", port, SERVER));
    let want = if opens { pass().opening(A, Reason::FlowOut) } else { pass() };
    fixture.expect("asks", from_container("a1"), &packet, want)?;
    Ok(())
}

/// Its answer.
fn is_answered(fixture: &mut Fixture, kind: Kind, port: u16) -> Result<()> {
    let wire = from_outside_wire(SERVER, SocketAddrV4::new(HOST, port));
    let want = pass_as(wire.to(socket("a1", port)));
    fixture.expect("is answered", from_uplink("up0"), &Datagram::new(kind, wire), want)?;
    Ok(())
}

/// A packet from outside to a1's published port.
fn is_dialled(fixture: &mut Fixture, kind: Kind, opens: bool) -> Result<()> {
    let wire = from_outside_wire(CLIENT, DIALLED);
    let want = pass_as(wire.to(socket("a1", 80)));
    let want = if opens { want.opening(A, Reason::FlowIn) } else { want };
    fixture.expect("is dialled", from_uplink("up0"), &Datagram::new(kind, wire), want)?;
    Ok(())
}

fn expect_state(fixture: &mut Fixture, wanted: &str) -> Result<()> {
    let states: Vec<_> = fixture.flows()?.iter().map(|flow| flow.state).collect();
    ensure!(states == [wanted], "wanted one flow, {wanted}; seen {states:?}");
    Ok(())
}

pub(crate) fn a_tcp_flow_shows_its_state(fixture: &mut Fixture) -> Result<()> {
    for (from_a1, kind, state) in [
        (true, Kind::Syn, "half-open"),
        (true, Kind::Syn, "half-open"),
        (false, Kind::SynAck, "half-open"),
        (true, Kind::Segment, "established"),
        (false, Kind::Segment, "established"),
        // Ended in one direction, the other may go on for as long as it likes.
        (false, Kind::Fin, "half-closed"),
        (true, Kind::Segment, "half-closed"),
        (true, Kind::Fin, "closing"),
        (false, Kind::Reset, "reset"),
        (true, Kind::Segment, "reset"),
        // The end that was said to have reset it goes on: it has not.
        (false, Kind::Segment, "closing"),
    ] {
        if from_a1 {
            let opens = fixture.halves()? == 0;
            asks(fixture, kind, 4000, opens)?;
        } else {
            is_answered(fixture, kind, 4000)?;
        }
        expect_state(fixture, state)?;
    }
    Ok(())
}

pub(crate) fn a_syn_on_an_ending_flow_starts_afresh(fixture: &mut Fixture) -> Result<()> {
    asks(fixture, Kind::Syn, 4000, true)?;
    for end in [Kind::Fin, Kind::Reset] {
        is_answered(fixture, Kind::SynAck, 4000)?;
        asks(fixture, Kind::Segment, 4000, false)?;
        expect_state(fixture, "established")?;
        is_answered(fixture, end, 4000)?;
        asks(fixture, end, 4000, false)?;
        asks(fixture, Kind::Syn, 4000, false)?;
        expect_state(fixture, "half-open")?;
    }
    is_answered(fixture, Kind::SynAck, 4000)?;
    asks(fixture, Kind::Segment, 4000, false)?;
    expect_state(fixture, "established")
}

/// How far ahead of what was acknowledged an end is believed.
const WINDOW: u32 = 1 << 20;

/// An end of the connection of a1's port 4000, at a distance from what the other end expects.
fn ends(fixture: &mut Fixture, kind: Kind, distance: u32) -> Result<()> {
    let wire = from_outside_wire(SERVER, SocketAddrV4::new(HOST, 4000));
    let packet =
        Datagram { sequence: SEQUENCE.wrapping_add(distance), ..Datagram::new(kind, wire) };
    let want = pass_as(wire.to(socket("a1", 4000)));
    fixture.expect("ends", from_uplink("up0"), &packet, want)?;
    Ok(())
}

/// Opens the connection of a1's port 4000.
fn connects(fixture: &mut Fixture) -> Result<()> {
    asks(fixture, Kind::Syn, 4000, true)?;
    is_answered(fixture, Kind::SynAck, 4000)?;
    asks(fixture, Kind::Segment, 4000, false)?;
    expect_state(fixture, "established")
}

pub(crate) fn only_a_reset_in_the_window_ends_a_flow(fixture: &mut Fixture) -> Result<()> {
    connects(fixture)?;
    for distance in [WINDOW + 1, 1 << 31, u32::MAX - 1000, u32::MAX] {
        ends(fixture, Kind::Reset, distance)?;
        expect_state(fixture, "established")?;
    }
    for distance in [0, 1000, WINDOW] {
        ends(fixture, Kind::Reset, distance)?;
        expect_state(fixture, "reset")?;
        // The end that is said to have gone goes on.
        is_answered(fixture, Kind::Segment, 4000)?;
        expect_state(fixture, "established")?;
    }
    // That the other one goes on says nothing of it.
    ends(fixture, Kind::Reset, 0)?;
    asks(fixture, Kind::Segment, 4000, false)?;
    expect_state(fixture, "reset")?;
    // A reset does not keep its flow: it is as old as the last packet before it.
    fixture.age(Timeouts::RFC.tcp_transitory + 1)?;
    ends(fixture, Kind::Reset, 0)?;
    ensure!(fixture.backend().collect()? == 1, "kept by a reset");
    Ok(())
}

pub(crate) fn a_fin_out_of_the_window_ends_nothing(fixture: &mut Fixture) -> Result<()> {
    connects(fixture)?;
    for distance in [WINDOW + 1, 1 << 31, u32::MAX] {
        ends(fixture, Kind::Fin, distance)?;
        expect_state(fixture, "established")?;
    }
    ends(fixture, Kind::Fin, WINDOW)?;
    expect_state(fixture, "half-closed")?;
    // Half-closed, it lives as long as any connection.
    fixture.age(Timeouts::RFC.tcp_transitory + 1)?;
    ensure!(fixture.backend().collect()? == 0, "collected half-closed");
    asks(fixture, Kind::Fin, 4000, false)?;
    expect_state(fixture, "closing")?;
    fixture.age(Timeouts::RFC.tcp_transitory + 1)?;
    ensure!(fixture.backend().collect()? == 1, "kept though both have ended");
    Ok(())
}

pub(crate) fn a_connection_survives_the_loss_of_its_flow(fixture: &mut Fixture) -> Result<()> {
    asks(fixture, Kind::Segment, 4000, true)?;
    is_answered(fixture, Kind::Segment, 4000)?;
    expect_state(fixture, "established")?;
    is_dialled(fixture, Kind::Segment, true)
}

pub(crate) fn a_full_table_refuses_new_flows_and_keeps_old_ones(
    shared: &mut Fixture,
) -> Result<()> {
    let flows = 16;
    let fixture = &mut shared.with_room_for(flows)?;
    let mut opened = 0;
    for port in 4000..4000 + flows as u16 {
        asks(fixture, Kind::Udp, port, true)?;
        is_answered(fixture, Kind::Udp, port)?;
        opened += 1;
    }
    let halves = fixture.halves()?;
    ensure!(halves == 2 * opened, "{opened} flows in {halves} halves");
    let full = |network| dropped(network, Reason::FlowTableFull);
    let out = Datagram::new(Kind::Udp, from_container_wire("a1", 3000, SERVER));
    fixture.expect("one more out", from_container("a1"), &out, full(A))?;
    let into = Datagram::new(Kind::Udp, from_outside_wire(CLIENT, DIALLED));
    fixture.expect("one more in", from_uplink("up0"), &into, full(A))?;
    let across = Datagram::new(Kind::Udp, from_container_wire("b1", 3000, DIALLED));
    fixture.expect("one more across", from_container("b1"), &across, full(A))?;
    ensure!(fixture.halves()? == halves, "a refused flow left a half");
    for port in 4000..4000 + flows as u16 {
        asks(fixture, Kind::Udp, port, false)?;
        is_answered(fixture, Kind::Udp, port)?;
    }
    Ok(())
}

pub(crate) fn a_large_table_fills(shared: &mut Fixture) -> Result<()> {
    // So many that sets of the index differ in how full they are. One of three thousand tables like this
    // has no room for a key though the table is not full: a flow is refused, or gets another port.
    const ROOM: u16 = 1024;
    let fixture = &mut shared.with_room_for(ROOM.into())?;
    let dialled = |port| from_outside_wire(SocketAddrV4::new(*CLIENT.ip(), port), DIALLED);
    let mut opened = Vec::new();
    for port in 10_000..10_000 + ROOM {
        let frame = Datagram::new(Kind::Udp, dialled(port)).frame(fixture.family);
        if fixture.run(from_uplink("up0"), &frame)?.verdict == TCX_NEXT {
            opened.push(port);
        }
    }
    ensure!(opened.len() + 1 >= ROOM.into(), "{} of {ROOM} flows", opened.len());
    ensure!(fixture.halves()? == 2 * opened.len(), "a refused flow left a half");
    let mut seen = Vec::new();
    fixture.visit_halves(|half| {
        let [_, (_, client)] = half.from;
        seen.extend((!half.is_original).then_some(client));
        Fate::Kept
    })?;
    for port in seen {
        let answer = dialled(port).answer().from(socket("a1", 80));
        let answer = answer.on_link(mac("a1"), bridge_mac(A));
        fixture.expect(
            "answer",
            from_container("a1"),
            &Datagram::new(Kind::Udp, answer),
            pass(),
        )?;
    }
    // All numbers come back.
    fixture.age(Timeouts::RFC.udp_replied + 1)?;
    let collected = fixture.backend().collect()?;
    ensure!(collected == opened.len(), "{collected} of {} collected", opened.len());
    for port in 10_000..10_000 + ROOM / 2 {
        let frame = Datagram::new(Kind::Udp, dialled(port)).frame(fixture.family);
        let verdict = fixture.run(from_uplink("up0"), &frame)?.verdict;
        ensure!(verdict == TCX_NEXT, "a second time: verdict {verdict}");
    }
    Ok(())
}

pub(crate) fn what_a_set_has_no_room_for_stands_beside_it(shared: &mut Fixture) -> Result<()> {
    // Twelve slots in each of the two; answers belong anywhere, and may have some of them.
    const SLOTS: usize = 24;
    const ANSWERS: usize = 8;
    let fixture = &mut shared.with_room_for(1024)?;
    let dialled = |port| from_outside_wire(SocketAddrV4::new(*CLIENT.ip(), port), DIALLED);
    let set = fixture.set_of(dialled(10_000))?;
    let mut homes = [Vec::new(), Vec::new()];
    for port in 10_000..u16::MAX {
        let its_set = fixture.set_of(dialled(port))?;
        if its_set | 1 == set | 1 {
            homes[usize::from(its_set != set)].push(port);
        }
    }
    ensure!(homes.iter().all(|ports| ports.len() > SLOTS), "too few ports for them");
    // The first has more than it has room for, so the other gets no twelve of its own.
    for from in 0..2 {
        let ports: Vec<_> = (0..2).flat_map(|turn| &homes[from ^ turn][..18]).copied().collect();
        let mut opened = Vec::new();
        for port in ports {
            let frame = Datagram::new(Kind::Udp, dialled(port)).frame(fixture.family);
            if fixture.run(from_uplink("up0"), &frame)?.verdict == TCX_NEXT {
                opened.push(port);
            }
        }
        let others = opened.iter().filter(|port| homes[from ^ 1].contains(port)).count();
        ensure!(opened.len() > SLOTS - ANSWERS && opened.len() <= SLOTS, "{} open", opened.len());
        ensure!(others > 0 && others < 12, "{others} of the other set's are open");
        ensure!(fixture.halves()? == 2 * opened.len(), "a refused flow left a half");
        for &port in &opened {
            let into = pass_as(dialled(port).to(socket("a1", 80)));
            let dials = Datagram::new(Kind::Udp, dialled(port));
            fixture.expect("goes on", from_uplink("up0"), &dials, into)?;
            let answer = dialled(port).answer().from(socket("a1", 80));
            let answer = Datagram::new(Kind::Udp, answer.on_link(mac("a1"), bridge_mac(A)));
            fixture.expect("answers", from_container("a1"), &answer, pass())?;
        }
        // Their slots are free again, here and there: the second turn finds as much room.
        let removed = fixture.remove_flows()?;
        ensure!(removed == opened.len(), "{removed} of {} removed", opened.len());
        ensure!(fixture.halves()? == 0, "not all is removed");
    }
    Ok(())
}

pub(crate) fn a_table_that_was_not_finished_is_begun_again(shared: &mut Fixture) -> Result<()> {
    const ROOM: u16 = 16;
    let fixture = &mut shared.with_room_for(ROOM.into())?;
    // As an agent leaves it that dies while it makes the table.
    fixture.unfinish_tables()?;
    fixture.reopen()?;
    for port in 4000..4000 + ROOM {
        asks(fixture, Kind::Udp, port, true)?;
        is_answered(fixture, Kind::Udp, port)?;
    }
    let one_more = Datagram::new(Kind::Udp, from_container_wire("a1", 3000, SERVER));
    let full = dropped(A, Reason::FlowTableFull);
    fixture.expect("one more", from_container("a1"), &one_more, full)?;
    Ok(())
}

pub(crate) fn a_successor_inherits_no_flow(fixture: &mut Fixture) -> Result<()> {
    asks(fixture, Kind::Udp, 4000, true)?;
    is_answered(fixture, Kind::Udp, 4000)?;
    is_dialled(fixture, Kind::Udp, true)?;
    let wire = from_container_wire("b1", 4000, DIALLED);
    let opening = pass_as(wire.to(socket("a1", 80))).opening(A, Reason::FlowHairpin);
    fixture.expect("across", from_container("b1"), &Datagram::new(Kind::Udp, wire), opening)?;
    fixture.apply(|program| {
        let successor = EndpointId(999);
        let endpoint = program.endpoints.remove(&id_of("a1")).unwrap();
        program.endpoints.insert(successor, endpoint);
        let follow = |(key, target): (_, PublishedTarget)| {
            let is_meant = target.endpoint == id_of("a1");
            let endpoint = if is_meant { successor } else { target.endpoint };
            (key, PublishedTarget { endpoint, ..target })
        };
        program.published = program.published.iter().map(follow).collect();
    })?;
    fixture.expect_flows(&[])?;
    ensure!(fixture.halves()? == 0, "half a flow is left");
    // An answer to the predecessor is the host's to refuse, and may not enter the network.
    let late = Datagram::new(Kind::Udp, from_outside_wire(SERVER, SocketAddrV4::new(HOST, 4000)));
    fixture.expect("late answer", from_uplink("up0"), &late, pass())?;
    let inside = late.wire.to(socket("a1", 4000)).on_link(bridge_mac(A), mac("a1"));
    let want = dropped(A, Reason::DirectAccess);
    fixture.expect("late", into_network(A, Some("up0")), &late.with_wire(inside), want)?;
    is_dialled(fixture, Kind::Udp, true)
}

pub(crate) fn an_unpublished_port_is_closed_to_its_flows(fixture: &mut Fixture) -> Result<()> {
    for kind in [Kind::Syn, Kind::Udp] {
        is_dialled(fixture, kind, true)?;
    }
    asks(fixture, Kind::Udp, 4000, true)?;
    fixture.apply(|program| program.published.retain(|key, _| key.port != 8080))?;
    // The one that did not come through the port lives.
    let left = fixture.flows()?;
    ensure!(left.len() == 1 && left[0].source.port() == 4000, "{left:?}");
    let wire = from_outside_wire(CLIENT, DIALLED);
    for kind in [Kind::Segment, Kind::Udp] {
        fixture.expect("to the host", from_uplink("up0"), &Datagram::new(kind, wire), pass())?;
    }
    let answer = Datagram::new(Kind::Segment, wire.to(socket("a1", 80)).answer());
    let answer = answer.with_wire(answer.wire.on_link(mac("a1"), bridge_mac(A)));
    // The container's next segment opens a flow of its own, from its own port.
    let opening = pass().opening(A, Reason::FlowOut);
    fixture.expect("answer", from_container("a1"), &answer, opening)?;
    Ok(())
}

pub(crate) fn an_unpublished_port_of_a_routed_network_is_closed_to_its_flows(
    fixture: &mut Fixture,
) -> Result<()> {
    let wire = from_outside_wire(CLIENT, socket("r1", 80));
    let packet = Datagram::new(Kind::Udp, wire);
    let opening = pass().opening(ROUTED, Reason::FlowIn);
    fixture.expect("published", from_uplink("up0"), &packet, opening)?;
    fixture
        .apply(|program| program.published.retain(|_, target| target.endpoint != id_of("r1")))?;
    let want = dropped(ROUTED, Reason::DirectAccess);
    fixture.expect("unpublished", from_uplink("up0"), &packet, want)?;
    fixture.expect_flows(&[])
}

pub(crate) fn a_port_published_elsewhere_leads_there_at_once(fixture: &mut Fixture) -> Result<()> {
    is_dialled(fixture, Kind::Udp, true)?;
    let family = fixture.family;
    fixture.apply(|program| {
        let (key, target) =
            published(family, (Ipv4Addr::UNSPECIFIED, 8080), Protocol::Udp, ("a2", 53));
        program.published.insert(key, target);
    })?;
    let wire = from_outside_wire(CLIENT, DIALLED);
    let packet = Datagram::new(Kind::Udp, wire);
    let wanted = wire.to(socket("a2", 53));
    let opening = pass_as(wanted).opening(A, Reason::FlowIn);
    fixture.expect("moved", from_uplink("up0"), &packet, opening)?;
    ensure!(fixture.halves()? == 2);
    Ok(())
}

pub(crate) fn other_ports_changes_leave_a_flow_alone(fixture: &mut Fixture) -> Result<()> {
    is_dialled(fixture, Kind::Syn, true)?;
    asks(fixture, Kind::Syn, 4000, true)?;
    let family = fixture.family;
    fixture.apply(|program| {
        program.published.remove(PublishedKey {
            address: family.address(Ipv4Addr::UNSPECIFIED),
            port: 8081,
            protocol: Protocol::Tcp,
        });
        program.endpoints.remove(&id_of("a2"));
    })?;
    is_dialled(fixture, Kind::Segment, false)?;
    asks(fixture, Kind::Segment, 4000, false)
}

pub(crate) fn flows_from_a_lost_address_of_the_host_end(fixture: &mut Fixture) -> Result<()> {
    asks(fixture, Kind::Udp, 4000, true)?;
    let up0 = fixture.ifindex("up0");
    let next = Ipv4Addr::new(10, 0, 0, 50);
    fixture.apply(|program| {
        let up0 = program.uplinks.get_mut(&up0).unwrap();
        (up0.masquerade4, up0.masquerade6) = (Some(next), Some(ipv6(next)));
        for family in [Family::V4, Family::V6] {
            program.local.remove(&family.address(HOST));
            program.local.insert(family.address(next));
        }
    })?;
    fixture.expect_flows(&[])?;
    asks(fixture, Kind::Udp, 4000, true)?;
    let wire = from_container_wire("a1", 4000, SERVER).on_link(UPLINK_MAC, ROUTER_MAC);
    let wanted = pass_as(wire.from(SocketAddrV4::new(next, 4000)));
    let packet = Datagram::new(Kind::Udp, wire);
    fixture.expect("leaves", to_uplink("up0", Some("br-a")), &packet, wanted)?;
    Ok(())
}

pub(crate) fn a_reopened_backend_keeps_flows_and_programs(fixture: &mut Fixture) -> Result<()> {
    asks(fixture, Kind::Syn, 4000, true)?;
    is_dialled(fixture, Kind::Syn, true)?;
    fixture.reopen()?;
    ensure!(fixture.apply(|_| {})? == 0, "the first apply after adoption wrote something");
    is_answered(fixture, Kind::SynAck, 4000)?;
    asks(fixture, Kind::Segment, 4000, false)?;
    is_dialled(fixture, Kind::Segment, false)?;
    ensure!(address("a1") == *socket("a1", 0).ip() && fixture.halves()? == 4);
    Ok(())
}

pub(crate) fn two_cpus_that_open_one_flow_agree(fixture: &mut Fixture) -> Result<()> {
    // Ports that are translated to random ones: two that open the flow want different ones.
    let ports = 33_000..33_400;
    let frames: Vec<_> = ports
        .map(|port| {
            let wire = from_container_wire("a1", port, SERVER);
            Datagram::new(Kind::Syn, wire).frame(fixture.family)
        })
        .collect();
    for frame in &frames {
        for outcome in fixture.run_twice(from_container("a1"), frame)? {
            ensure!(outcome.verdict == TCX_NEXT, "verdict {}", outcome.verdict);
        }
    }
    let flows = fixture.flows()?;
    ensure!(flows.len() == frames.len(), "{} flows", flows.len());
    let (mut arriving, mut answering) = (BTreeSet::new(), BTreeSet::new());
    fixture.visit_halves(|half| {
        if half.network == A.0 {
            arriving.insert(half.arriving());
            answering.insert(half.answering());
        }
        Fate::Kept
    })?;
    ensure!(arriving.len() == 2 * frames.len(), "{} halves", arriving.len());
    ensure!(arriving == answering, "halves without their other one");
    // Whatever both did, each flow has the halves that belong together.
    ensure!(fixture.backend().collect()? == 0, "halves without their other one");
    Ok(())
}

pub(crate) fn two_cpus_that_open_the_last_flow_agree(fixture: &mut Fixture) -> Result<()> {
    for (flows, port) in (1..).zip(33_000..33_400) {
        fixture.limit_endpoints(A, flows)?;
        let packet = Datagram::new(Kind::Syn, from_container_wire("a1", port, SERVER));
        let frame = packet.frame(fixture.family);
        for outcome in fixture.run_twice(from_container("a1"), &frame)? {
            ensure!(outcome.verdict == TCX_NEXT, "flow {flows}: verdict {}", outcome.verdict);
        }
    }
    fixture.limit_endpoints(A, 0)
}

/// Both halves, their slots in the index and the number of the flow.
pub(crate) fn a_flow_takes_no_more_memory_than_conntracks(fixture: &mut Fixture) -> Result<()> {
    /// What a masqueraded flow takes of `nf_conntrack` in either family, counted in /proc/slabinfo
    /// over 40,000 of them (Linux 6.18): an object of 256 bytes, an extension of 128.
    const CONNTRACK: u64 = 256 + 128;
    let maps = match fixture.family {
        Family::V4 => ["FLOW4", "INDEX4", "FREE4"],
        Family::V6 => ["FLOW6", "INDEX6", "FREE6"],
    };
    let mut bytes = 0;
    for map in maps {
        bytes += fixture.map_bytes(map)?;
    }
    let each = bytes.div_ceil(FLOWS.into());
    ensure!(each <= CONNTRACK, "{each} bytes for a flow");
    Ok(())
}
