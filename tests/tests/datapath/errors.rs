//! ICMP errors about packets of flows: translated with what they quote, byte for byte.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use netdp::dataplane::Count;
use netdp_common::counter::Reason;
use netdp_tests::packet::ETHERNET_BYTES;

use crate::{
    datagram::{Datagram, Kind, Shape, Wire},
    family::Family,
    fixture::{
        A, At, B, Fixture, HOST, OUTSIDE, ROUTER_MAC, TCX_DROP, TCX_NEXT, UPLINK_MAC, address,
        bridge_mac, from_container, from_container_wire, from_outside_wire, from_uplink, gateway,
        into_network, mac, pass, pass_as, socket, to_uplink,
    },
    icmp_error::{Error, Fault},
};

const SERVER: SocketAddrV4 = SocketAddrV4::new(OUTSIDE, 80);
const CLIENT: SocketAddrV4 = SocketAddrV4::new(OUTSIDE, 5000);
const DIALLED: SocketAddrV4 = SocketAddrV4::new(HOST, 8080);
/// A router somewhere on the way.
const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// Bytes of an IP header without options.
fn ip_bytes(family: Family) -> usize {
    match family {
        Family::V4 => 20,
        Family::V6 => 40,
    }
}

/// What routers quote at least: an IP header and 8 bytes; and all of it.
fn quoted(family: Family) -> [usize; 2] {
    [ip_bytes(family) + 8, usize::MAX]
}

const KINDS: [Kind; 3] = [Kind::Segment, Kind::Udp, Kind::Request];

impl Error {
    fn from_outside(source: Ipv4Addr) -> Self {
        let macs = (ROUTER_MAC, UPLINK_MAC);
        Self {
            macs,
            source,
            destination: HOST,
            fault: Fault::TimeExceeded,
            quoted_bytes: usize::MAX,
        }
    }

    fn from_a1(destination: Ipv4Addr) -> Self {
        let macs = (mac("a1"), bridge_mac(A));
        Self {
            macs,
            source: address("a1"),
            destination,
            fault: Fault::PortUnreachable,
            quoted_bytes: usize::MAX,
        }
    }
}

/// Fails unless the programs make `wanted` of `sent`, and count nothing.
fn expect_made(fixture: &mut Fixture, at: At, sent: &[u8], wanted: &[u8]) -> Result<()> {
    let out = fixture.expect_frame(at, sent, TCX_NEXT, None)?;
    ensure!(out == wanted, "{at:?}\nsent   {sent:02x?}\nwanted {wanted:02x?}\nseen   {out:02x?}");
    Ok(())
}

/// Opens a flow from a1 to the world; returns the wire of its packets outside.
fn dial_out(fixture: &mut Fixture, kind: Kind) -> Result<Wire> {
    let wire = dials_out(kind);
    let opening = pass().opening(A, Reason::FlowOut);
    fixture.expect("out", from_container("a1"), &Datagram::new(kind, wire), opening)?;
    Ok(wire.from(SocketAddrV4::new(HOST, wire.source.port())))
}

/// Packets of a1 to the world.
fn dials_out(kind: Kind) -> Wire {
    from_container_wire("a1", kind.kept(4000), SERVER)
}

/// Opens a flow from outside to a1's published port.
fn dial_in(fixture: &mut Fixture, kind: Kind) -> Result<()> {
    let wire = from_outside_wire(CLIENT, DIALLED);
    let opening = pass_as(wire.to(socket("a1", 80))).opening(A, Reason::FlowIn);
    fixture.expect("in", from_uplink("up0"), &Datagram::new(kind, wire), opening)?;
    Ok(())
}

pub(crate) fn errors_about_outgoing_packets_reach_the_container(
    fixture: &mut Fixture,
) -> Result<()> {
    for kind in KINDS {
        let outside = dial_out(fixture, kind)?;
        let inside = dials_out(kind);
        // A router on the way, and the server itself: both keep their addresses.
        for source in [ROUTER, OUTSIDE] {
            for quoted_bytes in quoted(fixture.family) {
                let error = Error { quoted_bytes, ..Error::from_outside(source) };
                let sent = error.about(fixture.family, kind, outside);
                let wanted = Error { destination: address("a1"), ..error.clone() }.about(
                    fixture.family,
                    kind,
                    inside,
                );
                expect_made(fixture, from_uplink("up0"), &sent, &wanted)?;
                expect_made(fixture, into_network(A, Some("up0")), &wanted, &wanted)?;
            }
        }
    }
    Ok(())
}

pub(crate) fn errors_of_the_path_carry_its_mtu(fixture: &mut Fixture) -> Result<()> {
    let outside = dial_out(fixture, Kind::Segment)?;
    let inside = dials_out(Kind::Segment);
    let error = Error { fault: Fault::TooBig(1280), ..Error::from_outside(ROUTER) };
    let wanted = Error { destination: address("a1"), ..error.clone() }.about(
        fixture.family,
        Kind::Segment,
        inside,
    );
    expect_made(
        fixture,
        from_uplink("up0"),
        &error.about(fixture.family, Kind::Segment, outside),
        &wanted,
    )
}

pub(crate) fn errors_about_answers_reach_the_container(fixture: &mut Fixture) -> Result<()> {
    for kind in [Kind::Segment, Kind::Udp] {
        dial_in(fixture, kind)?;
        for quoted_bytes in quoted(fixture.family) {
            let error = Error { quoted_bytes, ..Error::from_outside(ROUTER) };
            let sent = error.about(fixture.family, kind, from_outside_wire(DIALLED, CLIENT));
            let inside = from_outside_wire(socket("a1", 80), CLIENT);
            let wanted = Error { destination: address("a1"), ..error.clone() }.about(
                fixture.family,
                kind,
                inside,
            );
            expect_made(fixture, from_uplink("up0"), &sent, &wanted)?;
        }
    }
    Ok(())
}

pub(crate) fn errors_of_the_container_leave_as_the_hosts(fixture: &mut Fixture) -> Result<()> {
    for kind in [Kind::Segment, Kind::Udp] {
        dial_in(fixture, kind)?;
        for quoted_bytes in quoted(fixture.family) {
            let error = Error { quoted_bytes, ..Error::from_a1(OUTSIDE) };
            let sent =
                error.about(fixture.family, kind, from_outside_wire(CLIENT, socket("a1", 80)));
            expect_made(fixture, from_container("a1"), &sent, &sent)?;
            let wanted = Error { source: HOST, ..error.clone() }.about(
                fixture.family,
                kind,
                from_outside_wire(CLIENT, DIALLED),
            );
            expect_made(fixture, to_uplink("up0", Some("br-a")), &sent, &wanted)?;
        }
    }
    Ok(())
}

pub(crate) fn errors_find_their_way_across_networks(fixture: &mut Fixture) -> Result<()> {
    let dialled = from_container_wire("b1", 4000, DIALLED);
    let across = pass_as(dialled.to(socket("a1", 80))).opening(A, Reason::FlowHairpin);
    fixture.expect("across", from_container("b1"), &Datagram::new(Kind::Udp, dialled), across)?;
    let error = Error::from_a1(address("b1"));
    let sent = error.about(fixture.family, Kind::Udp, dialled.to(socket("a1", 80)));
    expect_made(fixture, from_container("a1"), &sent, &sent)?;
    let wanted = Error { source: HOST, ..error.clone() }.about(fixture.family, Kind::Udp, dialled);
    expect_made(fixture, into_network(B, Some("br-a")), &sent, &wanted)
}

pub(crate) fn errors_find_their_way_within_a_network(fixture: &mut Fixture) -> Result<()> {
    let dialled = from_container_wire("a2", 4000, DIALLED);
    let switched = dialled.to(socket("a1", 80)).on_link(mac("a2"), mac("a1"));
    let opening = pass_as(switched).opening(A, Reason::FlowHairpin);
    fixture.expect("switch", from_container("a2"), &Datagram::new(Kind::Udp, dialled), opening)?;
    let error = Error { macs: (mac("a1"), mac("a2")), ..Error::from_a1(address("a2")) };
    let sent = error.about(fixture.family, Kind::Udp, switched);
    let wanted = Error { source: HOST, ..error.clone() }.about(fixture.family, Kind::Udp, dialled);
    expect_made(fixture, from_container("a1"), &sent, &wanted)
}

pub(crate) fn errors_open_and_refresh_nothing(fixture: &mut Fixture) -> Result<()> {
    // About nothing that we know: the host's, as it came.
    let error = Error::from_outside(ROUTER);
    let sent = error.about(
        fixture.family,
        Kind::Udp,
        from_outside_wire(SocketAddrV4::new(HOST, 4000), SERVER),
    );
    expect_made(fixture, from_uplink("up0"), &sent, &sent)?;
    // Of a container, about nothing that we know: nowhere.
    let unknown = from_outside_wire(CLIENT, socket("a1", 80));
    let sent = Error::from_a1(OUTSIDE).about(fixture.family, Kind::Udp, unknown);
    let bytes = sent.len() as u64;
    let count = Count { network: Some(A), reason: Reason::NoFlow, packets: 1, bytes };
    fixture.expect_frame(from_container("a1"), &sent, TCX_DROP, Some(count))?;
    fixture.expect_flows(&[])?;

    // About a flow: its state stays what its own packets made it.
    let outside = dial_out(fixture, Kind::Udp)?;
    let sent = error.about(fixture.family, Kind::Udp, outside);
    fixture.expect_frame(from_uplink("up0"), &sent, TCX_NEXT, None)?;
    let states: Vec<_> = fixture.flows()?.iter().map(|flow| flow.state).collect();
    ensure!(states == ["unreplied"], "an error counted as an answer: {states:?}");
    Ok(())
}

pub(crate) fn errors_about_others_flows_are_forgeries(fixture: &mut Fixture) -> Result<()> {
    dial_in(fixture, Kind::Udp)?;
    let quoted = from_outside_wire(CLIENT, socket("a1", 80));
    let forged = Error {
        macs: (mac("a2"), bridge_mac(A)),
        source: address("a2"),
        ..Error::from_a1(OUTSIDE)
    };
    let sent = forged.about(fixture.family, Kind::Udp, quoted);
    let bytes = sent.len() as u64;
    let count = Count { network: Some(A), reason: Reason::SpoofedSource, packets: 1, bytes };
    fixture.expect_frame(from_container("a2"), &sent, TCX_DROP, Some(count))?;
    // The flow is unharmed.
    let wire = from_outside_wire(CLIENT, DIALLED);
    let want = pass_as(wire.to(socket("a1", 80)));
    fixture.expect("still", from_uplink("up0"), &Datagram::new(Kind::Udp, wire), want)?;
    Ok(())
}

pub(crate) fn errors_that_quote_too_little_are_the_hosts(fixture: &mut Fixture) -> Result<()> {
    let outside = dial_out(fixture, Kind::Udp)?;
    let header = ip_bytes(fixture.family);
    for quoted_bytes in [0, 10, header, header + 7] {
        let error = Error { quoted_bytes, ..Error::from_outside(ROUTER) };
        let sent = error.about(fixture.family, Kind::Udp, outside);
        expect_made(fixture, from_uplink("up0"), &sent, &sent)?;
    }
    Ok(())
}

/// Runs what comes from outside, and compares with what a1 should get.
fn expect_for_a1(
    fixture: &mut Fixture,
    error: &Error,
    quoted: &Datagram,
    inside: Wire,
) -> Result<()> {
    let packet = |datagram: &Datagram, family| datagram.frame(family)[ETHERNET_BYTES..].to_vec();
    let family = fixture.family;
    let sent = error.quoting(family, &packet(quoted, family));
    let wanted = Error { destination: address("a1"), ..error.clone() }
        .quoting(family, &packet(&quoted.with_wire(inside), family));
    expect_made(fixture, from_uplink("up0"), &sent, &wanted)
}

pub(crate) fn errors_quote_as_much_as_they_like(fixture: &mut Fixture) -> Result<()> {
    let mut kinds = vec![Kind::Segment, Kind::Udp, Kind::BareUdp, Kind::Request];
    kinds.retain(|kind| kind.is_of(fixture.family));
    for kind in kinds {
        let (inside, outside) = (dials_out(kind), dial_out(fixture, kind)?);
        let quoted = Datagram::new(kind, outside);
        // Through the transport header and its checksum, and some way into the payload.
        let least = ip_bytes(fixture.family) + 8;
        // What ends in the middle of a TCP checksum can't be told from what it was.
        let torn = ip_bytes(fixture.family) + 17;
        for quoted_bytes in (least..least + 40).filter(|bytes| *bytes != torn) {
            let error = Error { quoted_bytes, ..Error::from_outside(ROUTER) };
            expect_for_a1(fixture, &error, &quoted, inside)
                .with_context(|| format!("{kind:?}, {quoted_bytes} bytes quoted"))?;
        }
        fixture.remove_flows()?;
    }
    Ok(())
}

pub(crate) fn errors_quote_options_and_first_fragments(fixture: &mut Fixture) -> Result<()> {
    for kind in KINDS {
        let (inside, outside) = (dials_out(kind), dial_out(fixture, kind)?);
        for shape in Shape::ALL {
            let quoted = Datagram::new(kind, outside).shaped(shape);
            expect_for_a1(fixture, &Error::from_outside(ROUTER), &quoted, inside)
                .with_context(|| format!("{kind:?}, {shape:?}"))?;
        }
        fixture.remove_flows()?;
    }
    Ok(())
}

pub(crate) fn errors_that_quote_later_fragments_are_the_hosts(fixture: &mut Fixture) -> Result<()> {
    let family = fixture.family;
    let outside = dial_out(fixture, Kind::Udp)?;
    let cut = Shape { cut: true, ..Shape::PLAIN };
    let later = Datagram::new(Kind::Udp, outside).shaped(cut).frames(family).remove(1);
    let sent = Error::from_outside(ROUTER).quoting(family, &later[ETHERNET_BYTES..]);
    expect_made(fixture, from_uplink("up0"), &sent, &sent)
}

/// An error that the host itself sends to a client: it meets no hook before the one it leaves by.
fn of_the_host(macs: ([u8; 6], [u8; 6]), source: Ipv4Addr, destination: Ipv4Addr) -> Error {
    Error { macs, source, destination, fault: Fault::TooBig(1280), quoted_bytes: usize::MAX }
}

pub(crate) fn errors_of_the_host_quote_what_its_client_sent(fixture: &mut Fixture) -> Result<()> {
    let family = fixture.family;
    let leaves = to_uplink("up0", None);
    for kind in [Kind::Segment, Kind::Udp] {
        dial_in(fixture, kind)?;
        for quoted_bytes in quoted(family) {
            for fault in [Fault::TooBig(1280), Fault::TimeExceeded, Fault::PortUnreachable] {
                let error = of_the_host((UPLINK_MAC, ROUTER_MAC), HOST, OUTSIDE);
                let error = Error { fault, quoted_bytes, ..error };
                let sent = error.about(family, kind, from_outside_wire(CLIENT, socket("a1", 80)));
                let wanted = error.about(family, kind, from_outside_wire(CLIENT, DIALLED));
                expect_made(fixture, leaves, &sent, &wanted)?;
            }
        }
    }
    // To a container that dialled a port of another network.
    let dialled = from_container_wire("b1", 4000, DIALLED);
    let inside = dialled.to(socket("a1", 80));
    let opening = pass_as(inside).opening(A, Reason::FlowHairpin);
    fixture.expect("across", from_container("b1"), &Datagram::new(Kind::Udp, dialled), opening)?;
    let error = of_the_host((bridge_mac(B), mac("b1")), gateway(B), address("b1"));
    let sent = error.about(family, Kind::Udp, inside);
    let wanted = error.about(family, Kind::Udp, dialled);
    expect_made(fixture, into_network(B, None), &sent, &wanted)?;
    // An error shows nothing of a flow.
    let states: Vec<_> = fixture.flows()?.iter().map(|flow| flow.state).collect();
    ensure!(!states.contains(&"replied"), "an error counted as an answer: {states:?}");
    Ok(())
}

pub(crate) fn errors_of_the_host_about_others_stay_as_they_are(
    fixture: &mut Fixture,
) -> Result<()> {
    let family = fixture.family;
    dial_in(fixture, Kind::Udp)?;
    let error = of_the_host((UPLINK_MAC, ROUTER_MAC), HOST, OUTSIDE);
    let other = SocketAddrV4::new(OUTSIDE, 5001);
    for about in [
        // To the host itself; to a container, by nobody's flow.
        from_outside_wire(CLIENT, SocketAddrV4::new(HOST, 22)),
        from_outside_wire(other, socket("a1", 80)),
        from_outside_wire(CLIENT, socket("a1", 81)),
    ] {
        let sent = error.about(family, Kind::Udp, about);
        expect_made(fixture, to_uplink("up0", None), &sent, &sent)?;
    }
    // About what a container sent: it reads of the packet as it was.
    dial_out(fixture, Kind::Udp)?;
    let error = of_the_host((bridge_mac(A), mac("a1")), gateway(A), address("a1"));
    let sent = error.about(family, Kind::Udp, from_container_wire("a1", 4000, SERVER));
    expect_made(fixture, into_network(A, None), &sent, &sent)
}
