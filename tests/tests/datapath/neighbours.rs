//! IPv6 on the link: who may say what of whom, and what a link-local address reaches.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use etherparse::{PacketBuilder, ip_number};
use netdp::{dataplane::Count, model::NetworkId};
use netdp_common::counter::Reason;
use netdp_tests::packet::{
    ETHERNET_BYTES, Envelope, Station, advertise_neighbour, advertise_router, redirect,
    solicit_neighbour,
};

use crate::{
    datagram::{Datagram, Kind},
    family::ipv6,
    fixture::{
        A, At, Fixture, HOST, ICC_OFF, ISOLATED, OUTSIDE, ROUTER_MAC, TCX_DROP, TCX_NEXT,
        UPLINK_MAC, address, bridge_mac, from_container, from_container_wire, from_uplink, gateway,
        into_network, mac, network_of,
    },
};

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_LISTENERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x16);
/// Bytes of an IPv6 header.
const IPV6_BYTES: usize = 40;
/// Bytes of a solicitation or advertisement before its options.
const FIXED: usize = 24;

/// The link-local address that follows from a MAC (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

/// A container by its own address.
fn station(endpoint: &str) -> Station {
    (mac(endpoint), ipv6(address(endpoint)))
}

/// Everybody who takes a multicast address.
fn group(address: Ipv6Addr) -> Station {
    let [.., a, b, c, d] = address.octets();
    // RFC 2464, 7.
    ([0x33, 0x33, a, b, c, d], address)
}

/// The group of those who may have an address (RFC 4291, 2.7.1).
fn solicited(address: Ipv6Addr) -> Station {
    let [.., a, b, c] = address.octets();
    let (high, low) = (0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    group(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, high, low))
}

/// What becomes of a frame that a container sends.
fn expect(
    fixture: &mut Fixture,
    (name, endpoint): (&str, &'static str),
    frame: &[u8],
    refused: Option<Reason>,
) -> Result<()> {
    expect_at(
        fixture,
        from_container(endpoint),
        frame,
        refused.map(|why| (network_of(endpoint), why)),
    )
    .with_context(|| format!("{name}, from {endpoint}"))
}

/// What becomes of a frame; what passes does so as it came, and opens nothing.
fn expect_at(
    fixture: &mut Fixture,
    at: At,
    frame: &[u8],
    refused: Option<(NetworkId, Reason)>,
) -> Result<()> {
    let bytes = frame.len() as u64;
    let counted = refused.map(|(network, reason)| Count {
        network: Some(network),
        reason,
        packets: 1,
        bytes,
    });
    let verdict = if refused.is_some() { TCX_DROP } else { TCX_NEXT };
    let out = fixture.expect_frame(at, frame, verdict, counted)?;
    ensure!(refused.is_some() || out == frame, "sent {frame:02x?}\nseen {out:02x?}");
    fixture.expect_flows(&[])
}

pub(crate) fn a_container_solicits_and_advertises_only_itself(fixture: &mut Fixture) -> Result<()> {
    let (own_mac, own) = station("a1");
    let local = link_local(own_mac);
    let (neighbour, router) = (station("a2"), (bridge_mac(A), ipv6(gateway(A))));
    let nobody = (own_mac, Ipv6Addr::UNSPECIFIED);
    let me = (own_mac, own);
    let solicit = |from, target, mac| solicit_neighbour(from, solicited(target), target, mac);
    let advertise = |from, target, mac| advertise_neighbour(from, neighbour, target, mac);
    for (name, frame) in [
        ("asks for the gateway", solicit(me, router.1, own_mac)),
        ("asks for a neighbour", solicit(me, neighbour.1, own_mac)),
        ("asks as its link-local self", solicit((own_mac, local), router.1, own_mac)),
        ("looks whether its address is taken", solicit(nobody, own, own_mac)),
        ("looks whether its link-local one is", solicit(nobody, local, own_mac)),
        ("advertises itself", advertise(me, own, own_mac)),
        ("advertises its link-local self", advertise((own_mac, local), local, own_mac)),
        ("advertises one as the other", advertise((own_mac, local), own, own_mac)),
        ("tells everybody", advertise_neighbour(me, group(ALL_NODES), own, own_mac)),
    ] {
        expect(fixture, (name, "a1"), &frame, None)?;
    }
    let forged = Some(Reason::SpoofedNeighbour);
    for (name, frame) in [
        ("advertises the gateway", advertise(me, router.1, own_mac)),
        ("advertises a neighbour", advertise(me, neighbour.1, own_mac)),
        ("advertises the gateway's link-local", advertise(me, link_local(router.0), own_mac)),
        ("advertises another MAC", advertise(me, own, neighbour.0)),
        ("advertises the bridge's MAC", advertise(me, own, router.0)),
        ("asks with another MAC", solicit(me, router.1, neighbour.0)),
        ("claims the gateway's address for itself", solicit(nobody, router.1, own_mac)),
        ("claims a neighbour's address", solicit(nobody, neighbour.1, own_mac)),
    ] {
        expect(fixture, (name, "a1"), &frame, forged)?;
    }
    let spoofed = Some(Reason::SpoofedSource);
    for (name, from) in [
        ("a neighbour's address", (own_mac, neighbour.1)),
        ("a neighbour's link-local", (own_mac, link_local(neighbour.0))),
        ("the gateway's", (own_mac, router.1)),
        ("a neighbour's MAC", (neighbour.0, own)),
    ] {
        expect(fixture, (name, "a1"), &solicit(from, router.1, from.0), spoofed)?;
        expect(fixture, (name, "a1"), &advertise(from, own, from.0), spoofed)?;
    }
    Ok(())
}

pub(crate) fn options_of_neighbour_discovery_are_read_to_the_end(
    fixture: &mut Fixture,
) -> Result<()> {
    let me = station("a1");
    let frame = advertise_neighbour(me, station("a2"), me.1, me.0);
    let options = ETHERNET_BYTES + IPV6_BYTES + FIXED;
    // Rebuilds the frame with other options; nobody on the way looks at the checksum.
    let with = |bytes: &[u8]| {
        let mut frame = [&frame[..options], bytes].concat();
        let length = ((FIXED + bytes.len()) as u16).to_be_bytes();
        frame[ETHERNET_BYTES + 4..ETHERNET_BYTES + 6].copy_from_slice(&length);
        frame
    };
    let option = |kind, mac: [u8; 6]| [&[kind, 1], &mac[..]].concat();
    let (own, other) = (option(2, me.0), option(2, mac("a2")));
    // A nonce (RFC 3971, 5.3.2), and one that is longer than what it is read by.
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    let long = [&[14, 2][..], &[7; 14]].concat();
    for (name, bytes) in [
        ("none", Vec::new()),
        ("its own", own.clone()),
        ("its own as source and target", [option(1, me.0), own.clone()].concat()),
        ("others before it", [&nonce[..], &long, &own].concat()),
    ] {
        expect(fixture, (name, "a1"), &with(&bytes), None)?;
    }
    let zero = [2, 0, 0, 0, 0, 0, 0, 0];
    for (name, bytes) in [
        ("another's", other.clone()),
        ("another's as the source", option(1, mac("a2"))),
        ("another's behind its own", [own.clone(), other.clone()].concat()),
        ("another's behind a long one", [&long[..], &other].concat()),
        ("one without a length", zero.to_vec()),
        ("another's behind one without a length", [&zero[..], &other].concat()),
        ("one that ends early", own[..6].to_vec()),
        ("one that says it is longer", [14, 2, 1, 2, 3, 4, 5, 6].to_vec()),
        ("more than anybody needs", nonce.repeat(9)),
    ] {
        expect(fixture, (name, "a1"), &with(&bytes), Some(Reason::SpoofedNeighbour))?;
    }
    // It ends before its target does.
    let mut short = frame[..options - 8].to_vec();
    short[ETHERNET_BYTES + 5] = FIXED as u8 - 8;
    expect(fixture, ("half a target", "a1"), &short, Some(Reason::SpoofedNeighbour))
}

pub(crate) fn a_container_is_no_router(fixture: &mut Fixture) -> Result<()> {
    let me = station("a1");
    let local = (me.0, link_local(me.0));
    let impostor = Some(Reason::Impostor);
    for from in [me, local] {
        for to in [group(ALL_NODES), station("a2"), (bridge_mac(A), ipv6(gateway(A)))] {
            let frame = advertise_router(from, to);
            expect(fixture, ("advertises a router", "a1"), &frame, impostor)?;
            let frame = redirect(from, to, from, ipv6(OUTSIDE));
            expect(fixture, ("redirects", "a1"), &frame, impostor)?;
        }
    }
    // To ask for one is anybody's right.
    let frame = icmp(local, group(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2)), 133, &[]);
    expect(fixture, ("solicits a router", "a1"), &frame, None)
}

/// An ICMPv6 message with four empty bytes and a body.
fn icmp(from: Station, to: Station, kind: u8, body: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(from.0, to.0)
        .ipv6(from.1.octets(), to.1.octets(), 1)
        .icmpv6_raw(kind, 0, [0; 4]);
    let mut frame = Vec::with_capacity(builder.size(body.len()));
    builder.write(&mut frame, body).expect("a vector takes every frame below 64 KiB");
    frame
}

/// Puts hop-by-hop options that are a router alert before what a frame carries (RFC 3810, 5).
fn alerting_routers(frame: &[u8]) -> Vec<u8> {
    let headers = ETHERNET_BYTES + IPV6_BYTES;
    let next = frame[ETHERNET_BYTES + 6];
    let mut frame = [&frame[..headers], &[next, 0, 5, 2, 0, 0, 1, 0], &frame[headers..]].concat();
    frame[ETHERNET_BYTES + 6] = ip_number::IPV6_HEADER_HOP_BY_HOP.0;
    let length = (frame.len() - headers) as u16;
    frame[ETHERNET_BYTES + 4..ETHERNET_BYTES + 6].copy_from_slice(&length.to_be_bytes());
    frame
}

pub(crate) fn without_an_address_a_container_only_prepares_to_have_one(
    fixture: &mut Fixture,
) -> Result<()> {
    let nobody = (mac("a1"), Ipv6Addr::UNSPECIFIED);
    let local = (mac("a1"), link_local(mac("a1")));
    for from in [nobody, local] {
        let report = icmp(from, group(ALL_LISTENERS), 143, &[]);
        expect(fixture, ("reports groups", "a1"), &alerting_routers(&report), None)?;
        let report = icmp(from, group(ALL_NODES), 131, &ALL_NODES.octets());
        expect(fixture, ("reports a group", "a1"), &alerting_routers(&report), None)?;
    }
    let envelope = Envelope {
        source_mac: nobody.0,
        destination_mac: bridge_mac(A),
        source: nobody.1.into(),
        destination: ipv6(OUTSIDE).into(),
        ttl: 64,
    };
    let multicast = Envelope { destination: ALL_NODES.into(), ..envelope };
    let spoofed = Some(Reason::SpoofedSource);
    for (name, frame) in [
        ("a datagram", envelope.udp(4000, 80, b"from nobody")),
        ("a connection", envelope.tcp_syn(4000, 80, 1)),
        ("a ping", envelope.echo_request(7, 1, b"from nobody")),
        ("a datagram to everybody", multicast.udp(4000, 80, b"from nobody")),
    ] {
        expect(fixture, (name, "a1"), &frame, spoofed)?;
    }
    Ok(())
}

pub(crate) fn link_local_addresses_reach_the_link(fixture: &mut Fixture) -> Result<()> {
    let between = |from: Station, to: Station| Envelope {
        source_mac: from.0,
        destination_mac: to.0,
        source: from.1.into(),
        destination: to.1.into(),
        ttl: 64,
    };
    let local = |endpoint: &str| (mac(endpoint), link_local(mac(endpoint)));
    let bridge = |network| (bridge_mac(network), link_local(bridge_mac(network)));
    let far = |endpoint: &str, to: Ipv4Addr| (bridge_mac(network_of(endpoint)), ipv6(to));
    for (name, endpoint, to, refused) in [
        ("a neighbour", "a1", local("a2"), None),
        ("the host", "a1", bridge(A), None),
        ("everybody", "a1", group(ALL_NODES), None),
        ("the world", "a1", far("a1", OUTSIDE), Some(Reason::Martian)),
        ("a published port", "a1", far("a1", HOST), Some(Reason::Martian)),
        ("another network", "a1", far("a1", address("b1")), Some(Reason::Martian)),
        ("a neighbour without icc", "c1", local("c2"), Some(Reason::Icc)),
        ("everybody without icc", "c1", group(ALL_NODES), Some(Reason::Icc)),
        ("the host without icc", "c1", bridge(ICC_OFF), None),
        ("the host, isolated", "x1", bridge(ISOLATED), Some(Reason::HostAccess)),
        ("a neighbour, isolated", "x1", local("x2"), None),
    ] {
        let envelope = between(local(endpoint), to);
        for frame in [envelope.udp(4000, 8080, b"x"), envelope.echo_request(7, 1, b"x")] {
            expect(fixture, (name, endpoint), &frame, refused)?;
        }
    }
    // From its own address to link-local ones the same, and never to a published port.
    for (name, to, endpoint, refused) in [
        ("a neighbour's", local("a2"), "a1", None),
        ("the host's", bridge(A), "a1", None),
        ("a neighbour's without icc", local("c2"), "c1", Some(Reason::Icc)),
    ] {
        let frame = between(station(endpoint), to).udp(4000, 8080, b"x");
        expect(fixture, (name, endpoint), &frame, refused)?;
    }
    // A DHCPv6 server answers from a link-local address to one (RFC 8415, 18.3).
    for to in [local("a2"), station("a2"), group(ALL_NODES)] {
        let impostor = Some(Reason::Impostor);
        let offer = between(local("a1"), to).udp(547, 546, b"offer");
        let refused = if to == station("a2") { Some(Reason::Martian) } else { impostor };
        expect(fixture, ("a DHCPv6 server", "a1"), &offer, refused)?;
        let offer = between(station("a1"), to).udp(547, 546, b"offer");
        expect(fixture, ("a DHCPv6 server", "a1"), &offer, impostor)?;
    }
    let all_servers = group(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2));
    let request = between(local("a1"), all_servers).udp(546, 547, b"request");
    expect(fixture, ("a DHCPv6 client", "a1"), &request, None)?;
    // Nobody forwards what comes from outside.
    let outside = (ROUTER_MAC, link_local(ROUTER_MAC));
    let host = (UPLINK_MAC, ipv6(HOST));
    for to in [host, (UPLINK_MAC, link_local(UPLINK_MAC)), group(ALL_NODES)] {
        let frame = between(outside, to).udp(5000, 8080, b"x");
        expect_at(fixture, from_uplink("up0"), &frame, None)?;
    }
    let frame = between(outside, (UPLINK_MAC, ipv6(address("u1")))).udp(5000, 80, b"x");
    expect_at(fixture, from_uplink("up0"), &frame, None)?;
    // What one of them sends into a network all the same has no flow.
    let inside = between((bridge_mac(A), outside.1), station("a1")).udp(5000, 80, b"x");
    let refused = Some((A, Reason::DirectAccess));
    expect_at(fixture, into_network(A, Some("up0")), &inside, refused)
}

/// Puts `count` extension headers of a kind before what a frame carries.
fn chained(frame: &[u8], kind: u8, count: usize) -> Vec<u8> {
    let headers = ETHERNET_BYTES + IPV6_BYTES;
    let mut next = frame[ETHERNET_BYTES + 6];
    let mut chain = Vec::new();
    for _ in 0..count {
        chain = [&[next, 0, 1, 4, 0, 0, 0, 0], &chain[..]].concat();
        next = kind;
    }
    // The last one written is the first in the packet, and its next header the one behind it.
    let mut frame = [&frame[..headers], &chain, &frame[headers..]].concat();
    frame[ETHERNET_BYTES + 6] = next;
    let length = (frame.len() - headers) as u16;
    frame[ETHERNET_BYTES + 4..ETHERNET_BYTES + 6].copy_from_slice(&length.to_be_bytes());
    frame
}

pub(crate) fn extension_headers_are_stepped_over_up_to_six(fixture: &mut Fixture) -> Result<()> {
    let options = ip_number::IPV6_DEST_OPTIONS.0;
    let packet = |kind| {
        let wire = from_container_wire("a1", 4000, SocketAddrV4::new(OUTSIDE, 80));
        Datagram::new(kind, wire).frame(fixture.family)
    };
    let frames = [Kind::Syn, Kind::Udp].map(packet);
    for frame in frames {
        for count in 0..=9 {
            let frame = chained(&frame, options, count);
            let passes = count <= 6;
            let reason = if passes { Reason::FlowOut } else { Reason::Malformed };
            let bytes = frame.len() as u64;
            let counted = Count { network: Some(A), reason, packets: 1, bytes };
            let verdict = if passes { TCX_NEXT } else { TCX_DROP };
            let out = fixture
                .expect_frame(from_container("a1"), &frame, verdict, [counted])
                .with_context(|| format!("{count} extension headers"))?;
            ensure!(out == frame, "changed before it leaves");
            fixture.remove_flows()?;
        }
    }
    Ok(())
}

pub(crate) fn what_has_a_routing_header_is_not_translated(fixture: &mut Fixture) -> Result<()> {
    let routing = ip_number::IPV6_ROUTE_HEADER.0;
    let out = from_container_wire("a1", 4000, SocketAddrV4::new(OUTSIDE, 80));
    let frame = chained(&Datagram::new(Kind::Udp, out).frame(fixture.family), routing, 1);
    expect(fixture, ("with a routing header", "a1"), &frame, Some(Reason::Protocol))?;
    // Nor is it taken for a packet of a flow whose ports and addresses it shows.
    let opens = Datagram::new(Kind::Udp, out);
    let opening = crate::fixture::pass().opening(A, Reason::FlowOut);
    fixture.expect("opens", from_container("a1"), &opens, opening)?;
    let bytes = frame.len() as u64;
    let counted = Count { network: Some(A), reason: Reason::Protocol, packets: 1, bytes };
    fixture.expect_frame(from_container("a1"), &frame, TCX_DROP, [counted])?;
    let leaves = out.on_link(UPLINK_MAC, ROUTER_MAC);
    let frame = chained(&Datagram::new(Kind::Udp, leaves).frame(fixture.family), routing, 1);
    let counted = Count { reason: Reason::Unmasqueraded, ..counted };
    let leaves = crate::fixture::to_uplink("up0", Some("br-a"));
    fixture.expect_frame(leaves, &frame, TCX_DROP, [counted])?;
    Ok(())
}

/// The tests' own idea of the address agrees with the standard library's.
pub(crate) fn link_local_addresses_follow_from_macs(_: &mut Fixture) -> Result<()> {
    let address = link_local([0x02, 0x42, 0xac, 0x14, 0, 2]);
    ensure!(IpAddr::V6(address) == "fe80::42:acff:fe14:2".parse::<IpAddr>()?, "{address}");
    Ok(())
}
