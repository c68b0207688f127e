//! Who may not talk to whom, and who may not be who: one packet, one verdict, one counter.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, ensure};
use etherparse::ArpOperation;
use netdp::dataplane::Count;
use netdp_common::counter::Reason;
use netdp_tests::packet::{self, BROADCAST, ETHERNET_BYTES};

use crate::{
    datagram::{Datagram, Kind, Shape, Wire},
    family::Family,
    fixture::{
        A, At, B, Fixture, HOST, HOST_SECOND, HOST_UP1, ICC_OFF, INTERNAL, ISOLATED, OUTSIDE,
        OUTSIDE_UNKNOWN, OUTSIDE_UP1, ROUTED, ROUTER_MAC, TCX_DROP, TCX_NEXT, UNMASQUERADED,
        UNPROTECTED, UNREACHABLE, UPLINK_MAC, Want, address, bridge_mac, dropped,
        dropped_for_nobody, from_container, from_container_wire, from_outside_wire, from_uplink,
        gateway, hex, host_in, into_network, mac, network_of, pass, socket, to_uplink,
    },
};

/// One packet and what should become of it.
struct Case {
    name: &'static str,
    at: At,
    packet: Datagram,
    want: Want,
}

/// Runs cases that open no flows.
fn check(fixture: &mut Fixture, cases: Vec<Case>) -> Result<()> {
    for case in cases {
        fixture.expect(case.name, case.at, &case.packet, case.want)?;
        fixture.expect_flows(&[])?;
    }
    Ok(())
}

/// A SYN, a UDP datagram and a ping from a container.
fn sends(name: &'static str, endpoint: &'static str, to: Ipv4Addr, want: Want) -> Vec<Case> {
    let case = |kind, port| Case {
        name,
        at: from_container(endpoint),
        packet: Datagram::new(
            kind,
            from_container_wire(endpoint, 4000, SocketAddrV4::new(to, port)),
        ),
        want,
    };
    vec![case(Kind::Syn, 80), case(Kind::Udp, 80), case(Kind::Request, 0)]
}

/// The same three from outside, at up0.
fn comes(name: &'static str, from: Ipv4Addr, to: Ipv4Addr, port: u16, want: Want) -> Vec<Case> {
    let case = |kind, port| Case {
        name,
        at: from_uplink("up0"),
        packet: Datagram::new(
            kind,
            from_outside_wire(SocketAddrV4::new(from, 5000), SocketAddrV4::new(to, port)),
        ),
        want,
    };
    vec![case(Kind::Syn, port), case(Kind::Udp, port), case(Kind::Request, 0)]
}

pub(crate) fn networks_are_walls(fixture: &mut Fixture) -> Result<()> {
    let all = [
        sends("another network", "a1", address("b1"), dropped(A, Reason::Isolation)),
        sends("an unprotected one", "a1", address("u1"), dropped(A, Reason::Isolation)),
        sends("a routed one", "b1", address("r1"), dropped(B, Reason::Isolation)),
        sends("the host on its own gateway", "a1", gateway(A), pass()),
        sends("the host on another gateway", "a1", gateway(B), pass()),
        sends("the host on an uplink", "a1", HOST, pass()),
        sends("a neighbour", "a1", address("a2"), pass()),
        sends("nobody in the subnet", "a1", host_in(A, 200), pass()),
        sends("a neighbour without icc", "c1", address("c2"), dropped(ICC_OFF, Reason::Icc)),
        sends("the host without icc", "c1", gateway(ICC_OFF), pass()),
        sends("beyond an unknown exit", "a1", OUTSIDE_UNKNOWN, dropped(A, Reason::NoUplink)),
        sends("loopback", "a1", Ipv4Addr::LOCALHOST, dropped(A, Reason::Martian)),
    ];
    check(fixture, all.into_iter().flatten().collect())
}

pub(crate) fn internal_and_isolated_networks_have_no_way_out(fixture: &mut Fixture) -> Result<()> {
    let internal = || dropped(INTERNAL, Reason::Internal);
    let isolated = || dropped(ISOLATED, Reason::HostAccess);
    let all = [
        sends("internal, inside", "i1", address("i2"), pass()),
        sends("internal, its gateway", "i1", gateway(INTERNAL), pass()),
        sends("internal, another gateway", "i1", gateway(A), internal()),
        sends("internal, an uplink's address", "i1", HOST, internal()),
        sends("internal, another network", "i1", address("a1"), internal()),
        sends("internal, the world", "i1", OUTSIDE, internal()),
        sends("isolated, inside", "x1", address("x2"), pass()),
        sends("isolated, its gateway", "x1", gateway(ISOLATED), isolated()),
        sends("isolated, an uplink's address", "x1", HOST, isolated()),
        sends(
            "isolated, another network",
            "x1",
            address("a1"),
            dropped(ISOLATED, Reason::Internal),
        ),
        sends("isolated, the world", "x1", OUTSIDE, dropped(ISOLATED, Reason::Internal)),
    ];
    check(fixture, all.into_iter().flatten().collect())?;
    // Not by a published port either, which other networks do reach.
    for endpoint in ["i1", "x1"] {
        let want = if endpoint == "i1" { internal() } else { isolated() };
        let wire = from_container_wire(endpoint, 4000, SocketAddrV4::new(HOST, 8080));
        fixture.expect(
            endpoint,
            from_container(endpoint),
            &Datagram::new(Kind::Syn, wire),
            want,
        )?;
    }
    fixture.expect_flows(&[])
}

pub(crate) fn an_internal_network_stays_closed_in_every_gateway_mode(
    fixture: &mut Fixture,
) -> Result<()> {
    fixture.apply(|program| {
        for id in [UNPROTECTED, ROUTED] {
            program.networks.get_mut(&id).unwrap().internal = true;
        }
    })?;
    let outside = SocketAddrV4::new(OUTSIDE, 5000);
    let mut cases = Vec::new();
    for endpoint in ["u1", "r1"] {
        let wire = from_outside_wire(outside, socket(endpoint, 80));
        cases.push(Case {
            name: "direct access to an internal network",
            at: from_uplink("up0"),
            packet: Datagram::new(Kind::Syn, wire),
            want: dropped(network_of(endpoint), Reason::DirectAccess),
        });
    }
    check(fixture, cases)
}

pub(crate) fn the_world_reaches_no_container_address(fixture: &mut Fixture) -> Result<()> {
    let direct = |id| dropped(id, Reason::DirectAccess);
    let all = [
        comes("a container", OUTSIDE, address("a1"), 80, direct(A)),
        comes("nobody in a subnet", OUTSIDE, host_in(A, 200), 80, direct(A)),
        comes("a gateway", OUTSIDE, gateway(A), 80, pass()),
        comes("an internal container", OUTSIDE, address("i1"), 80, direct(INTERNAL)),
        comes("an isolated container", OUTSIDE, address("x1"), 80, direct(ISOLATED)),
        comes("without masquerade", OUTSIDE, address("m1"), 80, direct(UNMASQUERADED)),
        comes("a host port nobody publishes", OUTSIDE, HOST, 22, pass()),
        comes("published on another address", OUTSIDE, HOST_SECOND, 9090, pass()),
        comes("published on another address", OUTSIDE, HOST_UP1, 9090, pass()),
        comes("multicast", OUTSIDE, Ipv4Addr::new(224, 0, 0, 251), 5353, pass()),
        comes("broadcast", OUTSIDE, Ipv4Addr::BROADCAST, 67, pass()),
    ];
    check(fixture, all.into_iter().flatten().collect())?;
    // Routed: published ports only, at the container's own address.
    let outside = SocketAddrV4::new(OUTSIDE, 5000);
    let case = |name, to, want| Case {
        name,
        at: from_uplink("up0"),
        packet: Datagram::new(Kind::Syn, from_outside_wire(outside, to)),
        want,
    };
    check(
        fixture,
        vec![
            case("routed, not published", socket("r1", 81), direct(ROUTED)),
            case("routed, the host's port", SocketAddrV4::new(HOST, 8082), pass()),
        ],
    )
}

pub(crate) fn the_world_is_not_inside(fixture: &mut Fixture) -> Result<()> {
    let spoof = |id| dropped(id, Reason::OutsideSpoof);
    let martian = || dropped_for_nobody(Reason::Martian);
    let all = [
        comes("a container's address", address("a1"), HOST, 8080, spoof(A)),
        comes("a gateway's address", gateway(B), address("u1"), 80, spoof(B)),
        comes("from loopback", Ipv4Addr::LOCALHOST, HOST, 8080, martian()),
        comes("to loopback", OUTSIDE, Ipv4Addr::new(127, 1, 2, 3), 8080, martian()),
    ];
    check(fixture, all.into_iter().flatten().collect())
}

pub(crate) fn the_host_becomes_no_router_for_others(fixture: &mut Fixture) -> Result<()> {
    let wire =
        from_outside_wire(SocketAddrV4::new(OUTSIDE, 5000), SocketAddrV4::new(OUTSIDE_UP1, 80));
    let packet = Datagram::new(Kind::Syn, wire);
    let want = dropped_for_nobody(Reason::NotRouted);
    fixture.expect("did not forward before", from_uplink("up0"), &packet, want)?;
    let up0 = fixture.ifindex("up0");
    let family = fixture.family;
    fixture.apply(|program| {
        let up0 = program.uplinks.get_mut(&up0).unwrap();
        // The other family's answer is its own.
        up0.forwarded_before4 = family == Family::V4;
        up0.forwarded_before6 = family == Family::V6;
    })?;
    fixture.expect("forwarded before", from_uplink("up0"), &packet, pass())?;
    fixture.expect("and on", to_uplink("up1", Some("up0")), &packet.with_ttl(63), pass())?;
    fixture.expect_flows(&[])
}

pub(crate) fn a_container_is_only_itself(fixture: &mut Fixture) -> Result<()> {
    let to = SocketAddrV4::new(OUTSIDE, 80);
    let own = from_container_wire("a1", 4000, to);
    let spoofed = || dropped(A, Reason::SpoofedSource);
    let case = |name, wire| Case {
        name,
        at: from_container("a1"),
        packet: Datagram::new(Kind::Udp, wire),
        want: spoofed(),
    };
    let mut cases = vec![
        case("a neighbour's MAC", Wire { source_mac: mac("a2"), ..own }),
        case("the bridge's MAC", Wire { source_mac: bridge_mac(A), ..own }),
    ];
    for (name, address) in [
        ("a neighbour's address", address("a2")),
        ("the gateway's", gateway(A)),
        ("another network's", address("b1")),
        ("the host's", HOST),
        ("loopback", Ipv4Addr::LOCALHOST),
        ("none", Ipv4Addr::UNSPECIFIED),
        ("somebody outside", OUTSIDE),
        ("broadcast", Ipv4Addr::BROADCAST),
    ] {
        cases.push(case(name, own.from(SocketAddrV4::new(address, 4000))));
    }
    check(fixture, cases)
}

pub(crate) fn a_spoofed_first_fragment_teaches_nothing(fixture: &mut Fixture) -> Result<()> {
    let cut = Shape { cut: true, ..Shape::PLAIN };
    // Somebody outside asks a published port; its fragments have the same id as a forgery.
    let outside = SocketAddrV4::new(OUTSIDE, 5000);
    let wire = from_outside_wire(outside, SocketAddrV4::new(HOST, 8080));
    let real = Datagram::new(Kind::Udp, wire.to(SocketAddrV4::new(HOST, 53))).shaped(cut);
    let forged = Datagram::new(Kind::Udp, wire.on_link(mac("b1"), bridge_mac(B))).shaped(cut);
    let counted = |frame: &[u8], reason| Count {
        network: Some(B),
        reason,
        packets: 1,
        bytes: frame.len() as u64,
    };
    let first = &forged.frames(fixture.family)[0];
    let spoofed = counted(first, Reason::SpoofedSource);
    fixture.expect_frame(from_container("b1"), first, TCX_DROP, Some(spoofed))?;
    // A later fragment of the real one that overtakes its first: nothing is known of it.
    let later = &real.frames(fixture.family)[1];
    let out = fixture.expect_frame(from_uplink("up0"), later, TCX_NEXT, None)?;
    assert_eq!(&out, later, "translated as a container said");
    fixture.expect_flows(&[])
}

pub(crate) fn a_container_claims_only_its_own_address_by_arp(fixture: &mut Fixture) -> Result<()> {
    let (own_mac, own, zero) = (mac("a1"), address("a1"), [0; 6]);
    let request = |sender_mac, sender, target| {
        packet::arp(ArpOperation::REQUEST, sender_mac, sender, zero, target)
    };
    let reply = |sender_mac, sender| {
        packet::arp(ArpOperation::REPLY, sender_mac, sender, mac("a2"), address("a2"))
    };
    // The Ethernet header is honest, the claim is not.
    let honest = |mut frame: Vec<u8>| {
        frame[6..12].copy_from_slice(&own_mac);
        frame
    };
    for (name, frame) in [
        ("asks", request(own_mac, own, gateway(A))),
        ("probes", request(own_mac, Ipv4Addr::UNSPECIFIED, own)),
        ("announces", request(own_mac, own, own)),
        ("answers", reply(own_mac, own)),
    ] {
        let out = fixture.expect_frame(from_container("a1"), &frame, TCX_NEXT, None);
        assert_eq!(out.unwrap_or_else(|error| panic!("{name}: {error:#}")), frame);
    }
    let truncated = request(own_mac, own, gateway(A))[..41].to_vec();
    let mut other_protocol = request(own_mac, own, gateway(A));
    other_protocol[17] ^= 1;
    for (name, reason, frame) in [
        ("another MAC", Reason::SpoofedSource, request(mac("a2"), own, gateway(A))),
        ("claims for another MAC", Reason::SpoofedArp, honest(request(mac("a2"), own, gateway(A)))),
        ("claims the gateway", Reason::SpoofedArp, reply(own_mac, gateway(A))),
        ("claims a neighbour", Reason::SpoofedArp, request(own_mac, address("a2"), own)),
        (
            "probes for another MAC",
            Reason::SpoofedArp,
            honest(request(mac("a2"), Ipv4Addr::UNSPECIFIED, own)),
        ),
        ("ends early", Reason::Malformed, truncated),
        ("is not for IPv4", Reason::Malformed, other_protocol),
    ] {
        let counted = Count { network: Some(A), reason, packets: 1, bytes: frame.len() as u64 };
        fixture
            .expect_frame(from_container("a1"), &frame, TCX_DROP, Some(counted))
            .unwrap_or_else(|error| panic!("{name}: {error:#}"));
    }
    // Without icc, too, neighbours find each other; the bridge may ask in every network.
    let frame = packet::arp(ArpOperation::REQUEST, mac("c1"), address("c1"), zero, address("c2"));
    fixture.expect_frame(from_container("c1"), &frame, TCX_NEXT, None)?;
    for id in [A, ISOLATED] {
        let frame =
            packet::arp(ArpOperation::REQUEST, bridge_mac(id), gateway(id), zero, host_in(id, 2));
        fixture.expect_frame(into_network(id, None), &frame, TCX_NEXT, None)?;
    }
    Ok(())
}

pub(crate) fn other_families_stay_out(fixture: &mut Fixture) -> Result<()> {
    let wire = from_container_wire("a1", 4000, SocketAddrV4::new(OUTSIDE, 80));
    for ether_type in [0x8100_u16, 0x88a8, 0x8847, 0x0004] {
        let mut frame = Datagram::new(Kind::Udp, wire).frame(fixture.family);
        frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
        let bytes = frame.len() as u64;
        let counted =
            |network| Count { network: Some(network), reason: Reason::Family, packets: 1, bytes };
        let family = Some(counted(A));
        fixture.expect_frame(from_container("a1"), &frame, TCX_DROP, family)?;
        for arrived in [None, Some("up0"), Some("br-b")] {
            let mut frame = frame.clone();
            frame[..6].copy_from_slice(&BROADCAST);
            fixture.expect_frame(into_network(A, arrived), &frame, TCX_DROP, family)?;
        }
        fixture.expect_frame(to_uplink("up0", Some("br-a")), &frame, TCX_DROP, family)?;
        // The host's own business.
        fixture.expect_frame(from_uplink("up0"), &frame, TCX_NEXT, None)?;
        fixture.expect_frame(to_uplink("up0", None), &frame, TCX_NEXT, None)?;
    }
    Ok(())
}

pub(crate) fn multicast_and_broadcast_stay_in_the_network(fixture: &mut Fixture) -> Result<()> {
    let mut cases = Vec::new();
    for (name, to) in [
        ("multicast", Ipv4Addr::new(239, 1, 2, 3)),
        ("broadcast", Ipv4Addr::BROADCAST),
        ("the subnet's broadcast", host_in(A, 255)),
    ] {
        let wire = from_container_wire("a1", 4000, SocketAddrV4::new(to, 5353));
        let wire = Wire { destination_mac: BROADCAST, ..wire };
        let packet = Datagram::new(Kind::Udp, wire);
        cases.push(Case { name, at: from_container("a1"), packet: packet.clone(), want: pass() });
        // Whoever tries to route it.
        let want = dropped(A, Reason::Unmasqueraded);
        cases.push(Case { name, at: to_uplink("up0", Some("br-a")), packet, want });
    }
    let wire = from_container_wire("c1", 4000, SocketAddrV4::new(Ipv4Addr::BROADCAST, 5353));
    cases.push(Case {
        name: "broadcast without icc",
        at: from_container("c1"),
        packet: Datagram::new(Kind::Udp, wire),
        want: dropped(ICC_OFF, Reason::Icc),
    });
    check(fixture, cases)
}

pub(crate) fn a_packet_at_the_end_of_its_life_is_the_stacks_to_answer(
    fixture: &mut Fixture,
) -> Result<()> {
    let cases = sends("ttl 1", "a1", OUTSIDE, pass())
        .into_iter()
        .map(|case| Case { packet: case.packet.with_ttl(1), ..case });
    check(fixture, cases.collect())
}

pub(crate) fn what_has_no_route_ends_at_this_hop(fixture: &mut Fixture) -> Result<()> {
    for case in sends("no route", "a1", UNREACHABLE, pass()) {
        let frame = case.packet.frame(fixture.family);
        let left = fixture.expect_frame(case.at, &frame, TCX_NEXT, None)?;
        // The stack answers with "unreachable". Should a route appear before, it does not forward.
        let wanted = case.packet.with_ttl(1).frame(fixture.family);
        ensure!(left == wanted, "left as {}, wanted {}", hex(&left), hex(&wanted));
    }
    Ok(())
}

pub(crate) fn only_the_host_and_flows_enter_a_network(fixture: &mut Fixture) -> Result<()> {
    let enters = |name, arrived, source: Ipv4Addr, to: Ipv4Addr, network, want| {
        [(Kind::Syn, 80), (Kind::Udp, 80), (Kind::Request, 0)].map(|(kind, port)| Case {
            name,
            at: into_network(network, arrived),
            packet: Datagram::new(
                kind,
                Wire {
                    source_mac: bridge_mac(network),
                    destination_mac: [2, 0x42, 0, 0, 0, 9],
                    source: SocketAddrV4::new(source, 5000),
                    destination: SocketAddrV4::new(to, port),
                },
            ),
            want,
        })
    };
    let direct = dropped(A, Reason::DirectAccess);
    let isolation = dropped(A, Reason::Isolation);
    let all = [
        enters("the host", None, gateway(A), address("a1"), A, pass()),
        enters("the host", None, gateway(INTERNAL), address("i1"), INTERNAL, pass()),
        enters(
            "the host",
            None,
            gateway(ISOLATED),
            address("x1"),
            ISOLATED,
            dropped(ISOLATED, Reason::HostAccess),
        ),
        enters("an uplink", Some("up0"), OUTSIDE, address("a1"), A, direct),
        enters("an unknown interface", Some("other0"), OUTSIDE_UNKNOWN, address("a1"), A, direct),
        enters(
            "an unknown interface, nobody",
            Some("other0"),
            OUTSIDE_UNKNOWN,
            host_in(A, 99),
            A,
            direct,
        ),
        enters("another network", Some("br-b"), address("b1"), address("a1"), A, isolation),
        enters("its own network", Some("br-a"), address("a2"), address("a1"), A, isolation),
        enters("multicast", Some("up0"), OUTSIDE, Ipv4Addr::new(239, 1, 2, 3), A, direct),
    ];
    check(fixture, all.into_iter().flatten().collect())
}

pub(crate) fn nothing_of_a_container_leaves_without_a_flow(fixture: &mut Fixture) -> Result<()> {
    let wire = from_container_wire("a1", 4000, SocketAddrV4::new(OUTSIDE, 80))
        .on_link(UPLINK_MAC, ROUTER_MAC);
    let case = |name, arrived, kind, want| Case {
        name,
        at: to_uplink("up0", arrived),
        packet: Datagram::new(kind, wire),
        want,
    };
    let unmasqueraded = || dropped(A, Reason::Unmasqueraded);
    check(
        fixture,
        vec![
            case("a new flow", Some("br-a"), Kind::Syn, unmasqueraded()),
            case("a datagram", Some("br-a"), Kind::Udp, unmasqueraded()),
            case("a ping", Some("br-a"), Kind::Request, unmasqueraded()),
            case("another ICMP", Some("br-a"), Kind::OtherIcmp, unmasqueraded()),
            case("the host's own", None, Kind::Syn, pass()),
            case("another uplink's", Some("up1"), Kind::Syn, pass()),
        ],
    )
}

pub(crate) fn only_what_can_open_a_flow_does(fixture: &mut Fixture) -> Result<()> {
    let out = from_container_wire("a1", 4000, SocketAddrV4::new(OUTSIDE, 80));
    let ping = from_container_wire("a1", 0, SocketAddrV4::new(OUTSIDE, 7));
    let outside = SocketAddrV4::new(OUTSIDE, 5000);
    let dialled = from_outside_wire(outside, SocketAddrV4::new(HOST, 8080));
    let reply =
        from_outside_wire(SocketAddrV4::new(OUTSIDE, 0), SocketAddrV4::new(address("u1"), 7));
    let case =
        |name, at, kind, wire, want| Case { name, at, packet: Datagram::new(kind, wire), want };
    let no_flow = |id| dropped(id, Reason::NoFlow);
    let (a1, b1, up0) = (from_container("a1"), from_container("b1"), from_uplink("up0"));
    let hairpin = from_container_wire("b1", 4000, SocketAddrV4::new(HOST, 8080));
    check(
        fixture,
        vec![
            case("a reset, out", a1, Kind::Reset, out, no_flow(A)),
            case("an echo reply, out", a1, Kind::Reply, ping, no_flow(A)),
            case("another ICMP, out", a1, Kind::OtherIcmp, out, dropped(A, Reason::Protocol)),
            case("a reset, in", up0, Kind::Reset, dialled, no_flow(A)),
            case("a reset, across", b1, Kind::Reset, hairpin, no_flow(A)),
            case("an echo reply, in", up0, Kind::Reply, reply, no_flow(UNPROTECTED)),
            case(
                "another ICMP, in",
                up0,
                Kind::OtherIcmp,
                reply,
                dropped(UNPROTECTED, Reason::Protocol),
            ),
            case(
                "an echo reply to the host",
                a1,
                Kind::Reply,
                ping.to(SocketAddrV4::new(gateway(A), 7)),
                pass(),
            ),
            case(
                "an echo request to the host",
                up0,
                Kind::Request,
                from_outside_wire(outside, SocketAddrV4::new(HOST, 0)),
                pass(),
            ),
        ],
    )?;
    // Later fragments whose first nobody saw.
    for (at, wire, network) in [(a1, out, A), (up0, reply, UNPROTECTED)] {
        let cut = Shape { cut: true, ..Shape::PLAIN };
        let frame = Datagram::new(Kind::Udp, wire).shaped(cut).frames(fixture.family).remove(1);
        let bytes = frame.len() as u64;
        let reason = Reason::Fragment;
        let counted = Count { network: Some(network), reason, packets: 1, bytes };
        fixture.expect_frame(at, &frame, TCX_DROP, Some(counted))?;
    }
    fixture.expect_flows(&[])
}

pub(crate) fn a_container_is_no_dhcp_server(fixture: &mut Fixture) -> Result<()> {
    let everybody = Ipv4Addr::BROADCAST;
    let case = |name, endpoint: &'static str, from, to: (Ipv4Addr, u16), want| Case {
        name,
        at: from_container(endpoint),
        packet: Datagram::new(
            Kind::Udp,
            Wire {
                destination_mac: BROADCAST,
                ..from_container_wire(endpoint, from, SocketAddrV4::new(to.0, to.1))
            },
        ),
        want,
    };
    let impostor = || dropped(A, Reason::Impostor);
    check(
        fixture,
        vec![
            case("offers to everybody", "a1", 67, (everybody, 68), impostor()),
            case("offers to a neighbour", "a1", 67, (address("a2"), 68), impostor()),
            case("offers to everybody, IPv6", "a1", 547, (everybody, 546), impostor()),
            case("offers to a neighbour, IPv6", "a1", 547, (address("a2"), 546), impostor()),
            case("without icc", "c1", 67, (everybody, 68), dropped(ICC_OFF, Reason::Icc)),
            case("asks", "a1", 68, (everybody, 67), pass()),
            case("asks, IPv6", "a1", 546, (everybody, 547), pass()),
            case("asks the host", "a1", 68, (gateway(A), 67), pass()),
        ],
    )
}

pub(crate) fn a_protocol_that_cannot_be_translated_stays_in(fixture: &mut Fixture) -> Result<()> {
    // DCCP, UDP-Lite, AH: checksums or signatures over the addresses that nobody brings up to
    // date.
    for protocol in [33, 136, 51] {
        for (to, refused) in [
            (SocketAddrV4::new(OUTSIDE, 80), Some(Reason::Protocol)),
            (socket("a2", 80), None),
            (SocketAddrV4::new(HOST, 8080), None),
        ] {
            let wire = from_container_wire("a1", 4000, to);
            let mut frame = Datagram::new(Kind::Gre, wire).frame(fixture.family);
            match fixture.family {
                Family::V4 => {
                    // The header's checksum is the stack's to look at.
                    frame[ETHERNET_BYTES + 9] = protocol;
                }
                Family::V6 => frame[ETHERNET_BYTES + 6] = protocol,
            }
            let bytes = frame.len() as u64;
            let counted =
                refused.map(|reason| Count { network: Some(A), reason, packets: 1, bytes });
            let verdict = if refused.is_some() { TCX_DROP } else { TCX_NEXT };
            let out = fixture.expect_frame(from_container("a1"), &frame, verdict, counted)?;
            assert_eq!(out, frame, "protocol {protocol} to {to}");
        }
    }
    fixture.expect_flows(&[])
}
