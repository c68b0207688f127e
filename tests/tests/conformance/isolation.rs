//! ISO: who may not reach whom, and that it is counted.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::{SUBNET_A, SecondInterface};
use netdp_tests::namespace::Namespace;
use netdp_tests::packet::Envelope;
use netdp_tests::probe::{Failure, expect_failure, expect_same};

use crate::{counted, counted_soon, standard_containers};

pub(crate) fn neighbours_talk_untranslated(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let _tcp = containers.a2.tcp_server("a2", "172.20.0.3:9")?;
        let _udp = containers.a2.udp_server("a2", "172.20.0.3:9")?;
        let directions = [
            (&containers.a2, "172.20.0.3", "a1", "172.20.0.2:80"),
            (&containers.a1, "172.20.0.2", "a2", "172.20.0.3:9"),
        ];
        for (client, address, name, destination) in directions {
            let seen = client.tcp(destination).exchange()?;
            seen.by(name)?.saw_client_at(address)?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
            let seen = client.udp(destination).exchange()?;
            seen.by(name)?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
            expect_same("the replier", &seen.reply_from, &destination.parse()?)?;
        }
        containers.a2.ping("172.20.0.2").replied()?;
        containers.a1.ping("172.20.0.3").replied()
    })
}

/// The hardware address that `namespace` knows for a neighbour.
fn neighbour_mac(namespace: &Namespace, address: &str) -> Result<Option<String>> {
    let neighbours = namespace.ip_json(&["neighbour", "show", "to", address])?;
    Ok(neighbours[0]["lladdr"].as_str().map(String::from))
}

pub(crate) fn icc_off_parts_neighbours(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &["--icc=false"])?;
        let published = ["8080:80", "8080:80/udp"];
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &published)?;
        let a2 = lab.attach("net-a", "a2", "172.20.0.3", &[])?;
        let server = a1.tcp_server("a1", "172.20.0.2:80")?;
        let udp = a1.udp_server("a1", "172.20.0.2:80")?;
        counted(lab, "icc", || a2.tcp("172.20.0.2:80").dropped())?;
        counted(lab, "icc", || a2.udp("172.20.0.2:80").dropped())?;
        counted(lab, "icc", || a2.ping("172.20.0.2").dropped())?;
        // ARP passed: the answer is there, although nothing else was.
        ensure!(neighbour_mac(&a2, "172.20.0.2")?.is_some(), "ARP between neighbours failed");
        expect_same("clients of the container", &server.accepted(), &vec![])?;
        expect_same("datagrams of the container", &udp.received(), &vec![])?;

        // Addressed to the neighbour's MAC, whatever the IP address says.
        let knock = Envelope {
            source_mac: a2.mac("eth0")?,
            destination_mac: a1.mac("eth0")?,
            source: Ipv4Addr::new(172, 20, 0, 3),
            destination: Ipv4Addr::new(198, 51, 100, 7),
            ttl: 64,
        };
        counted_soon(lab, "icc", || a2.inject("eth0", &knock.udp(9, 80, b"knock")))?;

        a2.tcp("10.0.0.2:8080").exchange()?.by("a1")?.saw_client_at("172.20.0.3")?;
        a2.udp("10.0.0.2:8080").exchange()?.by("a1")?.saw_client_at("172.20.0.3")?;
        a1.tcp("10.0.0.2:8080").exchange()?.by("a1")?.saw_client_at("172.20.0.1")?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("a1")?;
        Ok(())
    })
}

pub(crate) fn networks_are_walls(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let (a1, b1) = (&containers.a1, &containers.b1);
        let _open = a1.tcp_server("a1", "172.20.0.2:81")?;
        for destination in ["172.20.0.2:80", "172.20.0.2:81"] {
            counted(lab, "isolation", || b1.tcp(destination).dropped())?;
        }
        counted(lab, "isolation", || b1.udp("172.20.0.2:80").dropped())?;
        counted(lab, "isolation", || b1.ping("172.20.0.2").dropped())?;
        counted(lab, "isolation", || a1.ping("172.21.0.2").dropped())?;
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
        expect_same("datagrams of the container", &containers.a1_udp.received(), &vec![])?;
        containers.a2.tcp("172.20.0.2:80").exchange()?.by("a1")?;
        b1.tcp("10.0.0.2:8080").exchange()?.by("a1")?.saw_client_at("172.21.0.2")?;
        Ok(())
    })
}

pub(crate) fn direct_access_from_outside_is_dropped(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let outside = lab.outside();
        counted(lab, "direct_access", || outside.tcp("172.20.0.2:80").dropped())?;
        counted(lab, "direct_access", || outside.udp("172.20.0.2:80").dropped())?;
        counted(lab, "direct_access", || outside.ping("172.20.0.2").dropped())?;
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
        expect_same("datagrams of the container", &containers.a1_udp.received(), &vec![])?;
        outside.tcp("10.0.0.2:8080").exchange()?.by("a1")?.saw_client_at("10.0.0.3")?;
        Ok(())
    })
}

pub(crate) fn interface_without_program_opens_no_hole(row: &Row) -> Result<Outcome> {
    row.in_lab(
        |builder| builder.second(SecondInterface::Unlisted),
        |lab| {
            let containers = standard_containers(lab)?;
            let second = lab.second()?;
            // A host that routes between its interfaces: otherwise the stack drops it first.
            lab.host().set_sysctl("net.ipv4.conf.up1.forwarding", "1")?;
            counted(lab, "direct_access", || second.tcp("172.20.0.2:80").dropped())?;
            counted(lab, "direct_access", || second.udp("172.20.0.2:80").dropped())?;
            counted(lab, "direct_access", || second.ping("172.20.0.2").dropped())?;
            expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
            expect_same("datagrams of the container", &containers.a1_udp.received(), &vec![])?;
            // A datagram that pretends to answer an open flow.
            let _server = lab.outside().udp_server("outside", "10.0.0.3:7000")?;
            let client = "172.20.0.2:6005";
            containers.a1.udp("10.0.0.3:7000").from(client).exchange()?.by("outside")?;
            let victim = containers.a1.udp_server("a1", client)?;
            let forged = Envelope {
                source_mac: second.mac("out1")?,
                destination_mac: lab.host().mac("up1")?,
                source: Ipv4Addr::new(10, 0, 0, 3),
                destination: Ipv4Addr::new(172, 20, 0, 2),
                ttl: 64,
            };
            let frame = forged.udp(7000, 6005, b"forged");
            counted_soon(lab, "direct_access", || second.inject("out1", &frame))?;
            expect_same("datagrams of the client", &victim.received(), &vec![])?;
            // The host itself is there, so the probes did arrive at it.
            second.ping("10.1.0.2").replied()
        },
    )
}

pub(crate) fn internal_network_is_closed(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &["--internal"])?;
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &[])?;
        let a2 = lab.attach("net-a", "a2", "172.20.0.3", &[])?;
        let reason = lab.netdp_fails(&["publish", "a1", "-p", "8080:80"])?;
        ensure!(reason.contains("internal"), "say why nothing is published: {reason}");
        lab.outside().tcp("10.0.0.2:8080").refused()?;

        let server = a1.tcp_server("a1", "172.20.0.2:80")?;
        counted(lab, "direct_access", || lab.outside().tcp("172.20.0.2:80").dropped())?;
        let outside = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
        let no_route = a1.tcp("10.0.0.3:7").exchange();
        expect_failure(no_route, &Failure::Unreachable, "leave without a route")?;
        a1.ip("route add default via 172.20.0.1\n")?;
        counted(lab, "internal", || a1.tcp("10.0.0.3:7").dropped())?;
        counted(lab, "internal", || a1.ping("10.0.0.3").dropped())?;
        expect_same("clients of the container", &server.accepted(), &vec![])?;
        expect_same("clients outside", &outside.accepted(), &vec![])?;

        a2.tcp("172.20.0.2:80").exchange()?.by("a1")?.saw_client_at("172.20.0.3")?;
        a2.ping("172.20.0.2").replied()?;
        let _gateway = lab.host().tcp_server("host", "172.20.0.1:7")?;
        a1.tcp("172.20.0.1:7").exchange()?.by("host")?.saw_client_at("172.20.0.2")?;
        a1.ping("172.20.0.1").replied()
    })
}

pub(crate) fn host_reaches_every_container_port(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let _open = containers.a1.tcp_server("a1", "172.20.0.2:81")?;
        for destination in ["172.20.0.2:80", "172.20.0.2:81"] {
            let seen = lab.host().tcp(destination).exchange()?;
            seen.by("a1")?.saw_client_at("172.20.0.1")?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
        }
        let seen = lab.host().udp("172.20.0.2:80").exchange()?;
        seen.by("a1")?.saw_client_at("172.20.0.1")?;
        expect_same("the replier", &seen.reply_from, &"172.20.0.2:80".parse()?)?;
        lab.host().ping("172.20.0.2").replied()?;
        lab.host().ping("172.21.0.2").replied()
    })
}

pub(crate) fn unprotected_network_accepts_direct_access(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &["--gateway-mode", "nat-unprotected"])?;
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &["8080:80"])?;
        let _server = a1.tcp_server("a1", "172.20.0.2:80")?;
        for destination in ["172.20.0.2:80", "10.0.0.2:8080"] {
            let seen = lab.outside().tcp(destination).exchange()?;
            seen.by("a1")?.saw_client_at("10.0.0.3")?;
        }
        lab.outside().ping("172.20.0.2").replied()?;
        let _outside = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
        a1.tcp("10.0.0.3:7").exchange()?.by("outside")?.saw_client_at("10.0.0.2")?;
        Ok(())
    })
}

pub(crate) fn routed_network_accepts_published_ports(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &["--gateway-mode", "routed"])?;
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &["8080:80"])?;
        let _published = a1.tcp_server("a1", "172.20.0.2:80")?;
        let closed = a1.tcp_server("a1", "172.20.0.2:81")?;
        let seen = lab.outside().tcp("172.20.0.2:80").exchange()?;
        seen.by("a1")?.saw_client_at("10.0.0.3")?;
        lab.outside().ping("172.20.0.2").replied()?;
        counted(lab, "direct_access", || lab.outside().tcp("172.20.0.2:81").dropped())?;
        expect_same("clients of the other port", &closed.accepted(), &vec![])?;
        lab.outside().tcp("10.0.0.2:8080").refused()?;
        let _outside = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
        a1.tcp("10.0.0.3:7").exchange()?.by("outside")?.saw_client_at("172.20.0.2")?;
        Ok(())
    })
}

pub(crate) fn isolated_network_has_no_host(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &["--gateway-mode", "isolated"])?;
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &[])?;
        let a2 = lab.attach("net-a", "a2", "172.20.0.3", &[])?;
        let server = a1.tcp_server("a1", "172.20.0.2:80")?;
        a2.tcp("172.20.0.2:80").exchange()?.by("a1")?.saw_client_at("172.20.0.3")?;
        let before = server.accepted().len();
        let host = lab.host().tcp_server("host", "0.0.0.0:7")?;
        counted(lab, "host_access", || lab.host().tcp("172.20.0.2:80").dropped())?;
        counted(lab, "host_access", || a1.tcp("172.20.0.1:7").dropped())?;
        counted(lab, "host_access", || a1.ping("172.20.0.1").dropped())?;
        a1.ip("route add default via 172.20.0.1\n")?;
        counted(lab, "host_access", || a1.tcp("10.0.0.2:7").dropped())?;
        counted(lab, "internal", || a1.ping("10.0.0.3").dropped())?;
        counted(lab, "direct_access", || lab.outside().tcp("172.20.0.2:80").dropped())?;
        expect_same("clients of the host", &host.accepted(), &vec![])?;
        expect_same("clients of the container", &server.accepted().len(), &before)
    })
}

pub(crate) fn ipv6_does_not_pass_an_ipv4_network(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let (a1, a2) = (&containers.a1, &containers.a2);
        let is_ipv6 = |frame: &[u8]| frame.get(12..14) == Some(&[0x86, 0xdd]);
        let neighbour = a2.sniff("eth0", is_ipv6)?;
        let outside = lab.outside().sniff("out0", is_ipv6)?;
        // An empty IPv6 packet, to everybody and to the gateway.
        let mut frame = vec![0xff; 6];
        frame.extend(a1.mac("eth0")?);
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 59, 64]);
        frame.extend([0xfe; 32]);
        counted_soon(lab, "family", || a1.inject("eth0", &frame))?;
        // Something that does pass, later: what was before it has had its chance.
        a2.ping("172.20.0.2").replied()?;
        lab.outside().ping("10.0.0.2").replied()?;
        expect_same("IPv6 frames at the neighbour", &neighbour.frames(), &vec![])?;
        expect_same("IPv6 frames outside", &outside.frames(), &vec![])
    })
}
