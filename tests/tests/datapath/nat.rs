//! Which source ports translation chooses.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    slice::from_ref,
};

use anyhow::{Context, Result, ensure};
use netdp::{
    dataplane::{Count, Dataplane, NatPorts},
    model::Protocol,
};
use netdp_common::{config::Timeouts, counter::Reason};
use netdp_tests::{packet::ETHERNET_BYTES, probe::expect_same};

use crate::{
    datagram::{Datagram, Kind, Shape, Wire, verify},
    family::Family,
    fixture::{
        A, FIXED_SOURCE, Fixture, HOST, OUTSIDE, ROUTER_MAC, TCX_REDIRECT, UPLINK_MAC, address,
        bridge_mac, dropped, dropped_for_nobody, from_container, from_container_wire,
        from_outside_wire, from_uplink, gateway, hex, into_network, knows_claims, mac, network_of,
        pass, pass_as, socket, to_uplink,
    },
    standard::published,
};

/// Opens a flow from a container to the world and returns the source it got. The packet has left
/// through up0, and its answer has come back.
fn dial(
    fixture: &mut Fixture,
    kind: Kind,
    endpoint: &'static str,
    port: u16,
    to: SocketAddrV4,
) -> Result<SocketAddrV4> {
    let network = network_of(endpoint);
    let dials = from_container_wire(endpoint, port, to);
    let packet = Datagram::new(kind, dials);
    fixture.expect(
        "dial",
        from_container(endpoint),
        &packet,
        pass().opening(network, Reason::FlowOut),
    )?;
    let key = (dials.source, to, kind.protocol(fixture.family).0);
    let flows = fixture.flows()?;
    let flow = flows
        .iter()
        .find(|flow| (flow.source, flow.destination, flow.protocol) == key)
        .expect("a flow that has just been opened");
    let source = flow.translated_source;
    let routed = dials.on_link(UPLINK_MAC, ROUTER_MAC);
    let leaves = to_uplink("up0", Some(crate::fixture::bridge(network)));
    fixture.expect("leave", leaves, &packet.with_wire(routed), pass_as(routed.from(source)))?;
    let reply = match kind {
        Kind::Syn => Kind::SynAck,
        Kind::Request => Kind::Reply,
        other => other,
    };
    let answer = Datagram::new(reply, routed.from(source).answer());
    let back = answer.wire.to(dials.source);
    fixture.expect("answer", from_uplink("up0"), &answer, pass_as(back))?;
    let back = answer.with_wire(back.on_link(bridge_mac(network), mac(endpoint)));
    fixture.expect("deliver", into_network(network, Some("up0")), &back, pass())?;
    Ok(source)
}

const SERVER: SocketAddrV4 = SocketAddrV4::new(OUTSIDE, 80);

pub(crate) fn a_port_outside_the_ephemeral_range_is_kept(fixture: &mut Fixture) -> Result<()> {
    for kind in [Kind::Syn, Kind::Udp] {
        for port in [1, 80, 4000, 32_767, 61_000, 65_535] {
            let source = dial(fixture, kind, "a1", port, SERVER)?;
            ensure!(source == SocketAddrV4::new(HOST, port), "{kind:?} from {port}: {source}");
        }
    }
    Ok(())
}

pub(crate) fn identifiers_of_pings_come_from_the_reserved_range(
    fixture: &mut Fixture,
) -> Result<()> {
    // The host's own pings have any, and nobody can look them up.
    let to = SocketAddrV4::new(OUTSIDE, 0);
    for identifier in [0, 1, 4000, 49_999, 61_000, 65_535] {
        let source = dial(fixture, Kind::Request, "a1", identifier, to)?;
        ensure!((50_000..=60_999).contains(&source.port()), "ping {identifier}: {source}");
    }
    for identifier in [50_000, 55_555, 60_999] {
        let other = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 4), 0);
        let source = dial(fixture, Kind::Request, "a1", identifier, other)?;
        ensure!(source == SocketAddrV4::new(HOST, identifier), "ping {identifier}: {source}");
    }
    Ok(())
}

pub(crate) fn a_port_in_the_ephemeral_range_moves_to_the_reserved_one(
    fixture: &mut Fixture,
) -> Result<()> {
    // Apart, so that one is not mistaken for the other.
    let ports = NatPorts { reserved: (20_000, 20_999), ephemeral: (32_768, 60_999) };
    fixture.apply(|program| program.nat_ports = ports)?;
    for (kind, to) in
        [(Kind::Syn, SERVER), (Kind::Udp, SERVER), (Kind::Request, SocketAddrV4::new(OUTSIDE, 0))]
    {
        for port in [32_768, 40_000, 60_999] {
            let source = dial(fixture, kind, "a1", port, to)?;
            let reserved = (20_000..=20_999).contains(&source.port());
            ensure!(reserved && *source.ip() == HOST, "{kind:?} from {port}: {source}");
        }
    }
    Ok(())
}

pub(crate) fn two_containers_with_one_port_get_two(fixture: &mut Fixture) -> Result<()> {
    let ephemeral_free = |port: u16| (50_000..=60_999).contains(&port);
    for (kind, to) in
        [(Kind::Syn, SERVER), (Kind::Udp, SERVER), (Kind::Request, SocketAddrV4::new(OUTSIDE, 0))]
    {
        let port = kind.kept(4000);
        let first = dial(fixture, kind, "a1", port, to)?;
        let second = dial(fixture, kind, "a2", port, to)?;
        let third = dial(fixture, kind, "b1", port, to)?;
        ensure!(first == SocketAddrV4::new(HOST, port), "{kind:?}: {first}");
        ensure!(ephemeral_free(second.port()) && ephemeral_free(third.port()), "{second}, {third}");
        ensure!(second != third, "{kind:?}: both are {second}");
    }
    // Not needlessly: another destination is another flow.
    let other = dial(fixture, Kind::Udp, "a2", 4000, SocketAddrV4::new(OUTSIDE, 81))?;
    ensure!(other == SocketAddrV4::new(HOST, 4000), "{other}");
    Ok(())
}

pub(crate) fn a_published_port_is_never_a_source(fixture: &mut Fixture) -> Result<()> {
    let family = fixture.family;
    let ports = NatPorts { reserved: (20_000, 20_003), ephemeral: (32_768, 60_999) };
    fixture.apply(|program| {
        program.nat_ports = ports;
        // Three of the four reserved ports are published: on all addresses, on this one, and on
        // another one, which does no harm.
        for (address, port) in
            [(Ipv4Addr::UNSPECIFIED, 20_000), (HOST, 20_001), (Ipv4Addr::new(10, 1, 0, 2), 20_002)]
        {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let (key, target) = published(family, (address, port), protocol, ("a1", 80));
                program.published.insert(key, target);
            }
        }
    })?;
    for kind in [Kind::Syn, Kind::Udp] {
        let mut taken = BTreeSet::new();
        // From a published port itself, from one that is published elsewhere, from any other.
        for (port, to) in [(8080, 80), (9090, 81), (40_000, 82), (20_000, 83), (20_001, 84)] {
            let source = dial(fixture, kind, "a1", port, SocketAddrV4::new(OUTSIDE, to))?;
            taken.insert(source.port());
        }
        ensure!(taken.is_subset(&BTreeSet::from([20_002, 20_003])), "{kind:?}: {taken:?}");
    }
    // An ICMP identifier is no port.
    let ping = dial(fixture, Kind::Request, "a1", 20_000, SocketAddrV4::new(OUTSIDE, 0))?;
    ensure!(ping.port() == 20_000, "{ping}");
    Ok(())
}

pub(crate) fn a_port_of_a_host_socket_is_never_a_source(fixture: &mut Fixture) -> Result<()> {
    let host = fixture.family.address(HOST);
    let listener = TcpListener::bind((host, 4000)).context("listen as the host")?;
    let socket = UdpSocket::bind((host, 4000)).context("bind a socket of the host")?;
    for kind in [Kind::Syn, Kind::Udp] {
        let source = dial(fixture, kind, "a1", 4000, SERVER)?;
        ensure!(source.port() != 4000, "{kind:?}: {source} is the host's own");
        // One port further nobody is at home.
        let next = dial(fixture, kind, "a1", 4001, SERVER)?;
        ensure!(next.port() == 4001, "{kind:?}: {next}");
    }
    drop((listener, socket));
    let source = dial(fixture, Kind::Udp, "a2", 4000, SERVER)?;
    ensure!(source.port() == 4000, "the host's socket is gone, yet {source}");
    Ok(())
}

/// What no socket has need not be compared with all of them, and is from the moment on that one may have it.
pub(crate) fn a_port_that_a_program_asks_for_is_not_chosen(fixture: &mut Fixture) -> Result<()> {
    const RESERVED: u16 = 20_000;
    /// Looks after which sockets that have gone are missed at the latest.
    const LOOKS: usize = 80;
    /// Flows that leave by all of four ports, but for once in 10⁷ times.
    const DIALS: u16 = 64;
    let host = fixture.family.address(HOST);
    let ports = NatPorts { reserved: (RESERVED, RESERVED + 3), ephemeral: (32_768, 60_999) };
    fixture.settle_claims()?;
    fixture.apply(|program| program.nat_ports = ports)?;
    ensure!(fixture.are_ports_claimed()?, "nobody has looked for sockets of these ports");
    // There before anybody looked, and two that come afterwards.
    let (udp, tcp) = (UdpSocket::bind, TcpListener::bind);
    let first = udp((host, RESERVED)).context("bind a socket of the host")?;
    let are_known = knows_claims()?;
    for _ in 0..LOOKS {
        fixture.backend().collect()?;
        ensure!(fixture.are_ports_claimed()?, "a socket has one of the ports");
    }
    let mut to = 1000;
    let mut chosen = |fixture: &mut Fixture, kind| -> Result<BTreeSet<u16>> {
        let mut ports = BTreeSet::new();
        for _ in 0..DIALS {
            to += 1;
            let source = dial(fixture, kind, "a1", 40_000, SocketAddrV4::new(OUTSIDE, to))?;
            ports.insert(source.port() - RESERVED);
        }
        Ok(ports)
    };
    expect_same("UDP's ports", &chosen(fixture, Kind::Udp)?, &BTreeSet::from([1, 2, 3]))?;
    drop(first);
    if are_known {
        for _ in 0..LOOKS {
            fixture.backend().collect()?;
        }
        ensure!(!fixture.are_ports_claimed()?, "nobody has one of the ports any more");
    }
    let all = BTreeSet::from([0, 1, 2, 3]);
    expect_same("UDP's ports", &chosen(fixture, Kind::Udp)?, &all)?;
    let second = udp((host, RESERVED + 1)).context("bind a socket of the host")?;
    let third = tcp((host, RESERVED + 2)).context("listen as the host")?;
    expect_same("UDP's ports", &chosen(fixture, Kind::Udp)?, &BTreeSet::from([0, 2, 3]))?;
    expect_same("TCP's ports", &chosen(fixture, Kind::Syn)?, &BTreeSet::from([0, 1, 3]))?;
    // Without the agent every flow looks for itself, whatever was known.
    if are_known {
        fixture.set_collection(Timeouts::RFC, true)?;
        fixture.pretend_nobody_claims()?;
        expect_same("UDP's ports, unseen", &chosen(fixture, Kind::Udp)?, &all)?;
        fixture.set_collection(Timeouts::RFC, false)?;
        expect_same("UDP's ports", &chosen(fixture, Kind::Udp)?, &BTreeSet::from([0, 2, 3]))?;
        fixture.set_collection(Timeouts::RFC, true)?;
        fixture.backend().forget_host_ports()?;
    }
    drop((second, third));
    for _ in 0..LOOKS {
        fixture.backend().collect()?;
    }
    ensure!(!are_known || !fixture.are_ports_claimed()?, "the sockets are gone");
    // What the kernel gives away by itself is not asked for.
    let reserved = "/proc/sys/net/ipv4/ip_local_reserved_ports";
    let before = fs::read_to_string(reserved).context("read the reserved ports")?;
    fs::write(reserved, "50000-60999\n").context("reserve other ports")?;
    let looked = fixture.backend().collect();
    fs::write(reserved, before).context("reserve the ports again")?;
    looked?;
    ensure!(fixture.are_ports_claimed()?, "the ports are anybody's");
    if are_known {
        fixture.settle_claims()?;
    }
    // Whoever was away does not know what has happened.
    fixture.reopen()?;
    ensure!(fixture.are_ports_claimed()?, "nobody has looked since the backend was opened");
    Ok(())
}

/// Runs a container's datagram that is refused: the container is told, in a sound ICMP error
/// from its gateway that quotes the packet.
pub(crate) fn expect_refusal(
    fixture: &mut Fixture,
    endpoint: &'static str,
    datagram: &Datagram,
    reason: Reason,
) -> Result<()> {
    let frame = datagram.frame(fixture.family);
    let network = network_of(endpoint);
    let counted = Count { network: Some(network), reason, packets: 1, bytes: frame.len() as u64 };
    let error =
        fixture.expect_frame(from_container(endpoint), &frame, TCX_REDIRECT, Some(counted))?;
    verify(from_ref(&error))?;
    let (addresses, header, message) = match fixture.family {
        Family::V4 => (26, 20, [3, 13]),
        Family::V6 => (22, 40, [1, 1]),
    };
    let octets = |party| match fixture.family.address(party) {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let ends = [octets(gateway(network)), octets(address(endpoint))].concat();
    ensure!(error[..12] == [mac(endpoint), bridge_mac(network)].concat(), "{}", hex(&error));
    ensure!(error[addresses..addresses + ends.len()] == ends, "{}", hex(&error));
    let icmp = ETHERNET_BYTES + header;
    ensure!(error[icmp..icmp + 2] == message, "{}", hex(&error));
    let quoted = &error[icmp + 8..];
    ensure!(quoted == &frame[ETHERNET_BYTES..][..quoted.len()], "{}", hex(&error));
    Ok(())
}

pub(crate) fn without_a_free_port_a_new_flow_is_refused(fixture: &mut Fixture) -> Result<()> {
    let ports = NatPorts { reserved: (20_000, 20_003), ephemeral: (32_768, 60_999) };
    fixture.apply(|program| program.nat_ports = ports)?;
    for (kind, to, other) in [
        (Kind::Syn, SERVER, SocketAddrV4::new(OUTSIDE, 81)),
        (Kind::Udp, SERVER, SocketAddrV4::new(OUTSIDE, 81)),
        (
            Kind::Request,
            SocketAddrV4::new(OUTSIDE, 0),
            SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 4), 0),
        ),
    ] {
        let mut taken = BTreeSet::new();
        for port in 40_000..40_004 {
            taken.insert(dial(fixture, kind, "a1", port, to)?.port());
        }
        ensure!(taken == (20_000..=20_003).collect(), "{kind:?}: {taken:?}");
        let halves = fixture.halves()?;
        let refused = Datagram::new(kind, from_container_wire("a1", 40_004, to));
        expect_refusal(fixture, "a1", &refused, Reason::PortsExhausted)?;
        ensure!(fixture.halves()? == halves, "a refused flow left a half");
        // The others go on, and other destinations and kept ports are no part of it; a ping has
        // none of those.
        let established = Datagram::new(kind, from_container_wire("a1", 40_000, to));
        fixture.expect("an older one", from_container("a1"), &established, pass())?;
        dial(fixture, kind, "a1", 40_004, other)?;
        if kind != Kind::Request {
            dial(fixture, kind, "a1", 4000, to)?;
        }
    }
    Ok(())
}

pub(crate) fn what_has_no_ports_is_given_none(fixture: &mut Fixture) -> Result<()> {
    let to = SocketAddrV4::new(OUTSIDE, 0);
    for kind in [Kind::Gre, Kind::StrayIcmp] {
        let source = dial(fixture, kind, "a1", 0, to)?;
        ensure!(source == SocketAddrV4::new(HOST, 0), "{kind:?}: {source}");
        // Nothing would tell its answers from those to the first.
        let second = Datagram::new(kind, from_container_wire("a2", 0, to));
        expect_refusal(fixture, "a2", &second, Reason::PortsExhausted)?;
    }
    Ok(())
}

pub(crate) fn without_a_source_address_nothing_leaves(fixture: &mut Fixture) -> Result<()> {
    let up0 = fixture.ifindex("up0");
    fixture.apply(|program| {
        let up0 = program.uplinks.get_mut(&up0).unwrap();
        (up0.masquerade4, up0.masquerade6) = (None, None);
    })?;
    let packet = Datagram::new(Kind::Syn, from_container_wire("a1", 4000, SERVER));
    let want = dropped(A, Reason::NoUplink);
    fixture.expect("no address", from_container("a1"), &packet, want)?;
    fixture.expect_flows(&[])?;
    // A fixed source needs none of the uplink's.
    let source = dial(fixture, Kind::Syn, "s1", 4000, SERVER)?;
    ensure!(network_of("s1") == FIXED_SOURCE && *source.ip() != HOST, "{source}");
    // No address is none that anybody dials.
    let client = SocketAddrV4::new(OUTSIDE, 5000);
    let nowhere = from_outside_wire(client, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 8080));
    let packet = Datagram::new(Kind::Syn, nowhere);
    let want = dropped_for_nobody(Reason::NotRouted);
    fixture.expect("to nowhere", from_uplink("up0"), &packet, want)?;
    // What the host has, it has on every uplink.
    let dialled = from_outside_wire(client, SocketAddrV4::new(HOST, 8080));
    open_at(fixture, Kind::Syn, "a1", dialled)?;
    Ok(())
}

pub(crate) fn clients_that_collide_behind_a_published_port_stay_apart(
    fixture: &mut Fixture,
) -> Result<()> {
    let client = SocketAddrV4::new(OUTSIDE, 5000);
    let dialled = [8080, 8081].map(|port| from_outside_wire(client, SocketAddrV4::new(HOST, port)));
    for kind in [Kind::Syn, Kind::Udp] {
        let mut seen = Vec::new();
        for dials in dialled {
            let opened = open_at(fixture, kind, "a1", dials)?;
            ensure!(*opened.source.ip() == OUTSIDE, "the client's address stays: {opened:?}");
            seen.push(opened.source);
        }
        ensure!(seen[0] == client && seen[1] != client, "{seen:?}");
        // Each answer comes from the port that was dialled.
        for (source, dials) in seen.into_iter().zip(dialled) {
            let reply = if kind == Kind::Syn { Kind::SynAck } else { kind };
            let wire = from_container_wire("a1", 80, source).on_link(UPLINK_MAC, ROUTER_MAC);
            let answer = Datagram::new(reply, wire);
            let inside = answer.with_wire(wire.on_link(mac("a1"), bridge_mac(A)));
            fixture.expect("answers", from_container("a1"), &inside, pass())?;
            let wanted = wire.from(dials.destination).to(client);
            let leaves = to_uplink("up0", Some("br-a"));
            fixture.expect("leaves", leaves, &answer, pass_as(wanted))?;
        }
    }
    Ok(())
}

/// Opens a flow from outside to a container's port 80 and returns the packet as it went in.
fn open_at(fixture: &mut Fixture, kind: Kind, endpoint: &str, dials: Wire) -> Result<Wire> {
    let before = fixture.flows()?;
    let frame = Datagram::new(kind, dials).frame(fixture.family);
    let outcome = fixture.run(from_uplink("up0"), &frame)?;
    ensure!(outcome.verdict == crate::fixture::TCX_NEXT, "{outcome:?}");
    let flows = fixture.flows()?;
    let flow = flows
        .iter()
        .find(|flow| {
            flow.protocol == kind.protocol(fixture.family).0
                && (flow.source, flow.destination) == (dials.source, dials.destination)
        })
        .expect("a flow that has just been opened");
    ensure!(flows.len() == before.len() + 1, "{flows:?}");
    let wanted = dials.from(flow.translated_source).to(socket(endpoint, 80));
    ensure!(outcome.frame == Datagram::new(kind, wanted).frame(fixture.family), "{outcome:?}");
    Ok(wanted)
}

pub(crate) fn containers_that_collide_behind_a_published_port_stay_apart(
    fixture: &mut Fixture,
) -> Result<()> {
    let dials =
        [8080, 8081].map(|port| from_container_wire("b1", 4000, SocketAddrV4::new(HOST, port)));
    let first = dials[0].to(socket("a1", 80));
    let opening = pass_as(first).opening(A, Reason::FlowHairpin);
    fixture.expect("first", from_container("b1"), &Datagram::new(Kind::Udp, dials[0]), opening)?;
    let second = Datagram::new(Kind::Udp, dials[1]);
    let outcome = fixture.run(from_container("b1"), &second.frame(fixture.family))?;
    let flows = fixture.flows()?;
    let sources: BTreeSet<_> = flows.iter().map(|flow| flow.translated_source).collect();
    ensure!(flows.len() == 2 && sources.len() == 2, "{flows:?}");
    ensure!(sources.iter().all(|source| *source.ip() == address("b1")), "{sources:?}");
    let port =
        sources.iter().map(SocketAddrV4::port).find(|port| *port != 4000).expect("a second port");
    let wanted = first.from(socket("b1", port));
    ensure!(outcome.frame == second.with_wire(wanted).frame(fixture.family), "{outcome:?}");
    // And back, to the port that b1 dialled from.
    let routed = wanted.answer().on_link(bridge_mac(network_of("b1")), mac("b1"));
    let answer = Datagram::new(Kind::Udp, routed);
    let inside = answer.with_wire(routed.on_link(mac("a1"), bridge_mac(A)));
    fixture.expect("answers", from_container("a1"), &inside, pass())?;
    let returned = routed.from(dials[1].destination).to(dials[1].source);
    fixture.expect(
        "returns",
        into_network(network_of("b1"), Some("br-a")),
        &answer,
        pass_as(returned),
    )?;
    Ok(())
}

pub(crate) fn checksums_hold_for_every_carry(fixture: &mut Fixture) -> Result<()> {
    let mut kinds = vec![Kind::Segment, Kind::Udp, Kind::BareUdp, Kind::Request];
    kinds.retain(|kind| kind.is_of(fixture.family));
    let seed = 0x6e65_7464_7020_2026_u64;
    let mut random = Random(seed);
    for round in 0..400 {
        let kind = kinds[round % kinds.len()];
        let port = if kind == Kind::Request { 0 } else { random.next() as u16 | 1 };
        let outside = Ipv4Addr::from(0x0b00_0000 | (random.next() as u32 & 0x00ff_ffff));
        let own = kind.kept(1 + round as u16);
        let dials = from_container_wire("a1", own, SocketAddrV4::new(outside, port));
        let length = random.next() as usize % 1400;
        let mut packet = Datagram::new(kind, dials)
            .shaped(Shape { options: random.next().is_multiple_of(2), cut: false });
        packet.identification = random.next() as u16;
        packet.payload = (0..length).map(|_| random.next() as u8).collect();
        let opening = pass().opening(A, Reason::FlowOut);
        let name = format!("round {round} of seed {seed:#x}");
        fixture.expect(&name, from_container("a1"), &packet, opening)?;
        let routed = dials.on_link(UPLINK_MAC, ROUTER_MAC);
        let seen = pass_as(routed.from(SocketAddrV4::new(HOST, own)));
        fixture.expect(&name, to_uplink("up0", Some("br-a")), &packet.with_wire(routed), seen)?;
    }
    Ok(())
}

pub(crate) fn a_udp_checksum_never_becomes_zero(fixture: &mut Fixture) -> Result<()> {
    let dials = from_container_wire("a1", 4000, SERVER);
    let routed = dials.on_link(UPLINK_MAC, ROUTER_MAC);
    let seen = routed.from(SocketAddrV4::new(HOST, 4000));
    let mut packet = Datagram::new(Kind::Udp, dials);
    // The checksum is the last field of the header, and the payload is behind it.
    let field = packet.frame(fixture.family).len() - packet.payload.len() - 2;
    let sums_to_zero = |word: &u16| {
        let mut packet = packet.with_wire(seen);
        packet.payload[..2].copy_from_slice(&word.to_be_bytes());
        packet.frame(fixture.family)[field..field + 2] == [0xff, 0xff]
    };
    let word = (0..=u16::MAX).find(sums_to_zero).context("find a payload whose sum is zero")?;
    packet.payload[..2].copy_from_slice(&word.to_be_bytes());
    let opening = pass().opening(A, Reason::FlowOut);
    fixture.expect("out", from_container("a1"), &packet, opening)?;
    let leaves = to_uplink("up0", Some("br-a"));
    fixture.expect("zero", leaves, &packet.with_wire(routed), pass_as(seen))?;
    Ok(())
}

pub(crate) fn a_packet_too_large_for_its_exit_is_the_stacks_to_answer(
    fixture: &mut Fixture,
) -> Result<()> {
    for kind in [Kind::Segment, Kind::Udp] {
        let wire = from_container_wire("a1", 4000, SERVER);
        let mut packet = Datagram::new(kind, wire);
        packet.payload = vec![7; 1800];
        let opening = pass().opening(A, Reason::FlowOut);
        fixture.expect("first", from_container("a1"), &packet, opening)?;
        fixture.expect("next", from_container("a1"), &packet, pass())?;
    }
    Ok(())
}

/// SplitMix64: the same numbers for the same seed, everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
