//! SEC: configuration that a container has no right to give, absurd packets, ways out of a network
//! that has none.

use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context, Result, bail};
use etherparse::ip_number;
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::net::{Family, IPV4, IPV6, Net};
use netdp_tests::packet::{
    BROADCAST, ETHERNET_BYTES, Envelope, Station, advertise_router, redirect, summarise,
};
use netdp_tests::probe::{PATIENCE, expect_same};
use netdp_tests::runtime::poll_until;

use super::{FLOW_COUNTERS, bridge_mac, counted, counted_soon, neighbours};

/// What every hostile payload contains, so that it is found wherever it gets.
const MARK: &[u8] = b"marked by the attacker";

fn is_marked(frame: &[u8]) -> bool {
    frame.windows(MARK.len()).any(|bytes| bytes == MARK)
}

/// Waits until a drop of whatever reason has been counted.
fn dropped_soon(lab: &Lab, attempt: impl FnOnce() -> Result<()>) -> Result<()> {
    if !lab.has_netdp() {
        return attempt();
    }
    let before = lab.counters()?;
    attempt()?;
    poll_until(PATIENCE, "a drop", || {
        let moved = lab.counters()?.since(&before);
        let is_drop = |reason: &str| !FLOW_COUNTERS.contains(&reason);
        Ok(moved.keys().any(|(_, reason)| is_drop(reason)).then_some(()))
    })
}

/// The link-local address that an interface makes of its hardware address (RFC 4291 A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    let pair = |high, low| u16::from_be_bytes([high, low]);
    let tail = [pair(a ^ 2, b), pair(c, 0xff), pair(0xfe, d), pair(e, f)];
    Ipv6Addr::new(0xfe80, 0, 0, 0, tail[0], tail[1], tail[2], tail[3])
}

/// What A1 must not tell A2: to be its router, a better way, or who gives addresses.
fn rogue_frames(net: &Net, own: [u8; 6], peer: [u8; 6]) -> Result<Vec<Vec<u8>>> {
    let envelope = |destination_mac, source, destination| Envelope {
        source_mac: own,
        destination_mac,
        source,
        destination,
        ttl: 64,
    };
    if net.is_ipv4() {
        let everybody = [255; 4].into();
        return Ok([(BROADCAST, everybody), (peer, net.a2)]
            .map(|(mac, address)| envelope(mac, net.a1, address).udp(67, 68, MARK))
            .to_vec());
    }
    let (IpAddr::V6(a1), IpAddr::V6(a2)) = (IPV6.a1, IPV6.a2) else {
        bail!("read the addresses of the containers: they are not IPv6")
    };
    let gateway: Station = (own, link_local(own));
    let all_nodes: Station = ([0x33, 0x33, 0, 0, 0, 1], Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
    let neighbour: Station = (peer, a2);
    let far = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
    Ok(vec![
        advertise_router(gateway, all_nodes),
        advertise_router(gateway, neighbour),
        advertise_router((own, a1), all_nodes),
        redirect(gateway, neighbour, gateway, far),
        envelope(peer, a1.into(), a2.into()).udp(547, 546, MARK),
        envelope(peer, gateway.1.into(), link_local(peer).into()).udp(547, 546, MARK),
    ])
}

pub(crate) fn rogue_configuration_is_dropped(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let (a1, a2) = (&containers.a1, &containers.a2);
        let seen = a2.sniff("eth0", |frame| {
            summarise(frame).is_some_and(|packet| {
                let offer = matches!(packet.ports, Some((67, 68) | (547, 546)));
                offer || matches!(packet.icmp, Some((134 | 137, 0)) if packet.protocol == 58)
            })
        })?;
        let client = a2.udp_server("a2", (net.any, if net.is_ipv4() { 68 } else { 546 }))?;
        for frame in rogue_frames(net, a1.mac("eth0")?, a2.mac("eth0")?)? {
            counted_soon(lab, "impostor", || a1.inject("eth0", &frame))?;
        }
        // What comes later and may, does.
        let _neighbour = a2.udp_server("a2", (net.a2, 7))?;
        a1.udp((net.a2, 7)).exchange()?.by("a2")?;
        expect_same("rogue frames at the neighbour", &seen.frames(), &vec![])?;
        expect_same("offers to the neighbour", &client.received(), &vec![])?;
        // A client may ask, of a server that is none of ours.
        let ports = if net.is_ipv4() { (68, 67) } else { (546, 547) };
        let server = a2.udp_server("a2", (net.a2, ports.1))?;
        a1.udp((net.a2, ports.1)).from((net.a1, ports.0)).send()?;
        poll_until(PATIENCE, "the client's question", || Ok(server.received().first().copied()))?;
        Ok(())
    })
}

/// Changes of a good UDP frame after which nobody should be handed its payload.
fn absurd(envelope: &Envelope, ports: (u16, u16), net: &Net) -> Result<Vec<Vec<u8>>> {
    let good = envelope.udp(ports.0, ports.1, &MARK.repeat(4));
    let ip = ETHERNET_BYTES;
    let udp = ip + net.header_bytes;
    let with = |offset: usize, bytes: &[u8]| {
        let mut frame = good.clone();
        frame[offset..offset + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let mut frames: Vec<_> =
        (ip..good.len()).step_by(3).map(|length| good[..length].to_vec()).collect();
    // A version that is none, lengths that lie, a sum that is wrong.
    for first in [0x00, 0x15, 0x55, 0x40, 0x44, 0x4f, 0x65, 0xf5] {
        if first != good[ip] {
            frames.push(with(ip, &[first]));
        }
    }
    let length_at = if net.is_ipv4() { ip + 2 } else { ip + 4 };
    for length in [0u16, 1, 7, 19, 0x7fff, 0xffff] {
        frames.push(with(length_at, &length.to_be_bytes()));
        frames.push(with(udp + 4, &length.to_be_bytes()));
    }
    frames.push(with(udp + 6, &[good[udp + 6] ^ 0x55, good[udp + 7]]));
    // Transports that nobody has, and extension headers that are none.
    let protocol_at = if net.is_ipv4() { ip + 9 } else { ip + 6 };
    for protocol in [0, 41, 43, 44, 51, 60, 132, 135, 139, 253, 255] {
        frames.push(with(protocol_at, &[protocol]));
    }
    let datagram = &good[udp..];
    let fragment =
        |id, offset, more, part: &[u8]| envelope.fragment(ip_number::UDP, id, offset, more, part);
    // The second overlaps the ports of the first, and one its end.
    let mut other_port = datagram[..16].to_vec();
    other_port[2..4].copy_from_slice(&81u16.to_be_bytes());
    frames.push(fragment(1, 0, true, &datagram[..16])?);
    frames.push(fragment(1, 0, true, &other_port)?);
    frames.push(fragment(1, 16, false, &datagram[16..])?);
    frames.push(fragment(2, 0, true, &datagram[..32])?);
    frames.push(fragment(2, 24, false, &datagram[24..])?);
    // Nothing of the ports, and all that follows; beyond the end of any packet; without a first.
    frames.push(fragment(3, 0, true, &[])?);
    frames.push(fragment(3, 8, false, &datagram[8..])?);
    frames.push(fragment(4, 0xfff8, false, &datagram[..16])?);
    frames.push(fragment(5, 8, false, &datagram[8..])?);
    // A first fragment of TCP that ends before its flags (RFC 1858).
    let segment = envelope.tcp_syn(ports.0, ports.1, 1);
    frames.push(envelope.fragment(ip_number::TCP, 6, 0, true, &segment[udp..udp + 8])?);
    frames.push(envelope.fragment(ip_number::TCP, 6, 8, false, &segment[udp + 8..])?);
    Ok(frames)
}

pub(crate) fn absurd_packets_reach_nobody(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let (a1, outside) = (&containers.a1, lab.outside());
        // Not published: reached only if a packet means one thing to netdp and another to A1.
        let closed = a1.udp_server("a1", (net.a1, 81))?;
        let server = outside.udp_server("outside", (net.outside, 7))?;
        let inwards = Envelope {
            source_mac: outside.mac("out0")?,
            destination_mac: lab.host().mac("up0")?,
            source: net.outside,
            destination: net.host,
            ttl: 64,
        };
        let outwards = Envelope {
            source_mac: a1.mac("eth0")?,
            destination_mac: bridge_mac(lab, "net-a")?,
            source: net.a1,
            destination: net.outside,
            ttl: 64,
        };
        let leaks = outside.sniff("out0", move |frame| {
            summarise(frame).is_some_and(|packet| packet.source == net.a1)
        })?;
        outside.flood("out0", absurd(&inwards, (5000, 8080), net)?)?;
        a1.flood("eth0", absurd(&outwards, (5000, 7), net)?)?;
        // The same, unchanged, arrives. Of what was before it only what is whole may: a stack that
        // ignores a fragment which it has already puts the others together.
        let good = MARK.repeat(4);
        outside.inject("out0", &inwards.udp(5001, 8080, &good))?;
        a1.inject("eth0", &outwards.udp(5001, 7, &good))?;
        for (server, source, what) in [
            (&containers.a1_udp, net.outside, "the good datagram in the container"),
            (&server, net.host, "the good datagram outside"),
        ] {
            // What leaves keeps its port only where the backend knows that it is free.
            let is_kept = source == net.outside || row.is_ebpf();
            let is_it = |port| !is_kept || port == 5001;
            poll_until(PATIENCE, what, || {
                Ok(server.received().iter().any(|seen| is_it(seen.peer.port())).then_some(()))
            })?;
            for seen in server.received() {
                expect_same(what, &(seen.peer.ip(), seen.bytes), &(source, good.len()))?;
            }
        }
        expect_same("datagrams of the closed port", &closed.received(), &vec![])?;
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
        expect_same("packets that left un-NATed", &leaks.frames(), &vec![])?;
        outside.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
        a1.udp((net.outside, 7)).exchange()?.by("outside")?.saw_client_at(net.host)?;
        Ok(())
    })
}

pub(crate) fn internal_network_has_no_way_out(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &["--internal"])?;
        lab.create_network("net-b", net.subnet_b, &[])?;
        let a1 = lab.attach("net-a", "a1", net.a1, &[])?;
        let b1 = lab.attach("net-b", "b1", net.b1, &["8080:80"])?;
        let b1_tcp = b1.tcp_server("b1", (net.b1, 80))?;
        let b1_udp = b1.udp_server("b1", (net.b1, 80))?;
        let outside = lab.outside();
        let outside_tcp = outside.tcp_server("outside", (net.outside, 7))?;
        let outside_udp = outside.udp_server("outside", (net.outside, 7))?;
        let host = lab.host().udp_server("host", (net.any, 7))?;
        let is_from_a1 = |frame: &[u8]| {
            let own = [IPV4.a1, IPV6.a1];
            is_marked(frame) || summarise(frame).is_some_and(|packet| own.contains(&packet.source))
        };
        let leaks = outside.sniff("out0", is_from_a1)?;
        let neighbours = b1.sniff("eth0", is_from_a1)?;

        // A forced route, to the outside, the other network and its gateway, and the host.
        a1.ip(&format!("route add default via {}\n", net.gateway_a))?;
        counted(lab, "internal", || a1.tcp((net.outside, 7)).dropped())?;
        counted(lab, "internal", || a1.udp((net.outside, 7)).dropped())?;
        counted(lab, "internal", || a1.ping(net.outside).dropped())?;
        for address in [net.b1, net.gateway_b, net.host, net.host_second] {
            counted(lab, "internal", || a1.ping(address).dropped())?;
        }
        for destination in [(net.b1, 80), (net.host, 8080), (net.gateway_b, 8080), (net.host, 7)] {
            counted(lab, "internal", || a1.udp(destination).dropped())?;
        }
        counted(lab, "internal", || a1.ping(net.outside).ttl(1).dropped())?;
        // Errors about packets that never were, and the other family.
        let envelope = Envelope {
            source_mac: a1.mac("eth0")?,
            destination_mac: bridge_mac(lab, "net-a")?,
            source: net.a1,
            destination: net.outside,
            ttl: 64,
        };
        let answer = Envelope { source: net.outside, destination: net.a1, ..envelope };
        let about = answer.udp(7, 9, MARK)[ETHERNET_BYTES..].to_vec();
        for error in [envelope.port_unreachable(&about), envelope.time_exceeded(&about)] {
            dropped_soon(lab, || a1.inject("eth0", &error))?;
        }
        // The gateway's own hardware address with somebody else's address, and the reverse.
        let redirected = Envelope { source: net.b1, ..envelope };
        counted_soon(lab, "spoofed_source", || a1.inject("eth0", &redirected.udp(9, 7, MARK)))?;
        leave_by_the_other_family(lab, &a1, net, envelope)?;

        // In from the other side, with a route, and as an answer to nothing.
        counted(lab, "direct_access", || outside.udp((net.a1, 7)).dropped())?;
        counted(lab, "isolation", || b1.udp((net.a1, 7)).dropped())?;

        expect_same("clients outside", &outside_tcp.accepted(), &vec![])?;
        expect_same("datagrams outside", &outside_udp.received(), &vec![])?;
        expect_same("clients of the neighbour", &b1_tcp.accepted(), &vec![])?;
        expect_same("datagrams of the neighbour", &b1_udp.received(), &vec![])?;
        expect_same("datagrams of the host", &host.received(), &vec![])?;
        expect_same("frames outside", &leaks.frames(), &vec![])?;
        expect_same("frames in the other network", &neighbours.frames(), &vec![])?;
        // All of them were there to be reached.
        b1.udp((net.outside, 7)).exchange()?.by("outside")?;
        outside.udp((net.host, 7)).exchange()?.by("host")?;
        let _gateway = lab.host().tcp_server("host", (net.gateway_a, 9))?;
        a1.tcp((net.gateway_a, 9)).exchange()?.by("host")?.saw_client_at(net.a1)?;
        Ok(())
    })
}

/// What one family is refused, the other must not give.
fn leave_by_the_other_family(
    lab: &Lab,
    a1: &Namespace,
    net: &Net,
    envelope: Envelope,
) -> Result<()> {
    let other = match net.family {
        Family::Ipv4 => Family::Ipv6,
        Family::Ipv6 => Family::Ipv4,
    };
    let other = other.net();
    let frame = Envelope { source: other.a1, destination: other.outside, ..envelope };
    // A network of one family does not carry the other; of both, it is internal in both.
    let reason = if net.is_ipv4() { "family" } else { "internal" };
    counted_soon(lab, reason, || a1.inject("eth0", &frame.udp(9, 7, MARK)))
        .with_context(|| format!("leave by {}", other.family.name()))
}
