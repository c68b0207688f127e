//! ISO: who may not reach whom, and that it is counted.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use etherparse::ArpOperation;
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::{Lab, SecondInterface};
use netdp_tests::namespace::Namespace;
use netdp_tests::net::{Family, IPV4, IPV6, Net};
use netdp_tests::packet::{BROADCAST, Envelope, arp, summarise};
use netdp_tests::probe::{Endpoint, Failure, expect_failure, expect_same};

use super::{counted, counted_soon, neighbours, standard_containers};

pub(crate) fn neighbours_talk_untranslated(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let _tcp = containers.a2.tcp_server("a2", (net.a2, 9))?;
        let _udp = containers.a2.udp_server("a2", (net.a2, 9))?;
        let directions = [
            (&containers.a2, net.a2, "a1", (net.a1, 80)),
            (&containers.a1, net.a1, "a2", (net.a2, 9)),
        ];
        for (client, address, name, destination) in directions {
            let seen = client.tcp(destination).exchange()?;
            seen.by(name)?.saw_client_at(address)?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
            let seen = client.udp(destination).exchange()?;
            seen.by(name)?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
            expect_same("the replier", &seen.reply_from, &destination.endpoint())?;
        }
        containers.a2.ping(net.a1).replied()?;
        containers.a1.ping(net.a2).replied()
    })
}

/// The hardware address that `namespace` knows for a neighbour.
fn neighbour_mac(namespace: &Namespace, address: IpAddr) -> Result<Option<String>> {
    let neighbours = namespace.ip_json(&["neighbour", "show", "to", &address.to_string()])?;
    Ok(neighbours[0]["lladdr"].as_str().map(String::from))
}

/// A firewall of the host's that forwards nothing.
const FORWARD_NOTHING: &str =
    "table inet others { chain forward { type filter hook forward priority 0; policy drop; }; }";

/// Runs `nft` on the host.
fn nft(lab: &Lab, rules: &str) -> Result<()> {
    let said = lab.host().output("nft", &[rules])?;
    let error = String::from_utf8_lossy(&said.stderr);
    ensure!(said.status.success(), "nft {rules}: {}", error.trim());
    Ok(())
}

pub(crate) fn rules_of_others_do_not_matter(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let _outside = lab.outside().tcp_server("outside", (net.outside, 80))?;
        let _outside_udp = lab.outside().udp_server("outside", (net.outside, 80))?;
        let talk = || -> Result<()> {
            lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
            lab.outside().udp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
            for client in [&containers.a1, &containers.b1] {
                client.tcp((net.outside, 80)).exchange()?.saw_client_at(net.host)?;
                client.udp((net.outside, 80)).exchange()?.saw_client_at(net.host)?;
                client.ping(net.outside).replied()?;
            }
            containers.b1.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.b1)?;
            containers.a2.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.a2)?;
            containers.a2.tcp((net.a1, 80)).exchange()?.by("a1")?.saw_client_at(net.a2)?;
            lab.host().tcp((net.host, 8080)).exchange()?.by("a1")?;
            // Walls stand, whoever flushes what.
            counted(lab, "isolation", || containers.b1.tcp((net.a1, 80)).dropped())?;
            counted(lab, "direct_access", || lab.outside().tcp((net.a1, 80)).dropped())
        };
        let bridge = lab.bridge("net-a")?;
        let between = [net.outside, net.a1];
        let of_both = move |frame: &[u8]| {
            summarise(frame).is_some_and(|seen| {
                between.contains(&seen.source) && between.contains(&seen.destination)
            })
        };
        let on_bridge = lab.host().sniff(&bridge, of_both)?;
        let in_a1 = containers.a1.sniff("eth0", of_both)?;
        nft(lab, FORWARD_NOTHING).context("with a chain that forwards nothing")?;
        talk()?;
        let mut open = lab.outside().tcp((net.host, 8080)).open()?;
        open.exchange(100)?;
        nft(lab, "flush ruleset")?;
        talk().context("after a flush")?;
        open.exchange(100_000).context("of a connection from before")?;
        // Where people look for packets: there and not there.
        ensure!(!in_a1.frames().is_empty(), "nothing was seen in the container");
        expect_same("frames on the bridge", &on_bridge.frames(), &vec![])?;
        let lanes = &lab.json(&["status"])?["lanes"];
        ensure!(lanes["fast"].as_u64() > Some(100), "packets went {lanes}");
        Ok(())
    })
}

pub(crate) fn icc_off_parts_neighbours(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &["--icc=false"])?;
        let published = ["8080:80", "8080:80/udp"];
        let a1 = lab.attach("net-a", "a1", net.a1, &published)?;
        let a2 = lab.attach("net-a", "a2", net.a2, &[])?;
        let server = a1.tcp_server("a1", (net.a1, 80))?;
        let udp = a1.udp_server("a1", (net.a1, 80))?;
        counted(lab, "icc", || a2.tcp((net.a1, 80)).dropped())?;
        counted(lab, "icc", || a2.udp((net.a1, 80)).dropped())?;
        counted(lab, "icc", || a2.ping(net.a1).dropped())?;
        // ARP and neighbour discovery passed: the answer is there, although nothing else was.
        ensure!(neighbour_mac(&a2, net.a1)?.is_some(), "neighbours did not find each other");
        expect_same("clients of the container", &server.accepted(), &vec![])?;
        expect_same("datagrams of the container", &udp.received(), &vec![])?;

        // Addressed to the neighbour's MAC, whatever the IP address says.
        let knock = Envelope {
            source_mac: a2.mac("eth0")?,
            destination_mac: a1.mac("eth0")?,
            source: net.a2,
            destination: net.elsewhere,
            ttl: 64,
        };
        counted_soon(lab, "icc", || a2.inject("eth0", &knock.udp(9, 80, b"knock")))?;

        a1.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.gateway_a)?;
        lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?;
        a2.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.a2)?;
        a2.udp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.a2)?;
        Ok(())
    })
}

pub(crate) fn networks_are_walls(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let (a1, b1) = (&containers.a1, &containers.b1);
        let _open = a1.tcp_server("a1", (net.a1, 81))?;
        for destination in [(net.a1, 80), (net.a1, 81)] {
            counted(lab, "isolation", || b1.tcp(destination).dropped())?;
        }
        counted(lab, "isolation", || b1.udp((net.a1, 80)).dropped())?;
        counted(lab, "isolation", || b1.ping(net.a1).dropped())?;
        counted(lab, "isolation", || a1.ping(net.b1).dropped())?;
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
        expect_same("datagrams of the container", &containers.a1_udp.received(), &vec![])?;
        containers.a2.tcp((net.a1, 80)).exchange()?.by("a1")?;
        b1.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.b1)?;
        Ok(())
    })
}

pub(crate) fn direct_access_from_outside_is_dropped(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let outside = lab.outside();
        counted(lab, "direct_access", || outside.tcp((net.a1, 80)).dropped())?;
        counted(lab, "direct_access", || outside.udp((net.a1, 80)).dropped())?;
        counted(lab, "direct_access", || outside.ping(net.a1).dropped())?;
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
        expect_same("datagrams of the container", &containers.a1_udp.received(), &vec![])?;
        outside.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
        Ok(())
    })
}

pub(crate) fn interface_without_program_opens_no_hole(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_lab(
        |builder| builder.second(SecondInterface::Unlisted),
        |lab| {
            let containers = neighbours(lab)?;
            let second = lab.second()?;
            // A host that routes between its interfaces: otherwise the stack drops it first.
            lab.host().forward_from("up1", net.family)?;
            counted(lab, "direct_access", || second.tcp((net.a1, 80)).dropped())?;
            counted(lab, "direct_access", || second.udp((net.a1, 80)).dropped())?;
            counted(lab, "direct_access", || second.ping(net.a1).dropped())?;
            expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
            expect_same("datagrams of the container", &containers.a1_udp.received(), &vec![])?;
            // A datagram that pretends to answer an open flow.
            let _server = lab.outside().udp_server("outside", (net.outside, 7000))?;
            let client = (net.a1, 6005);
            containers.a1.udp((net.outside, 7000)).from(client).exchange()?.by("outside")?;
            let victim = containers.a1.udp_server("a1", client)?;
            let forged = Envelope {
                source_mac: second.mac("out1")?,
                destination_mac: lab.host().mac("up1")?,
                source: net.outside,
                destination: net.a1,
                ttl: 64,
            };
            let frame = forged.udp(7000, 6005, b"forged");
            counted_soon(lab, "direct_access", || second.inject("out1", &frame))?;
            expect_same("datagrams of the client", &victim.received(), &vec![])?;
            // The host itself is there, so the probes did arrive at it.
            second.ping(net.host_up1).replied()
        },
    )
}

pub(crate) fn internal_network_is_closed(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &["--internal"])?;
        let a1 = lab.attach("net-a", "a1", net.a1, &[])?;
        let a2 = lab.attach("net-a", "a2", net.a2, &[])?;
        if lab.has_netdp() {
            let reason = lab.netdp_fails(&["publish", "a1", "-p", "8080:80"])?;
            ensure!(reason.contains("internal"), "say why nothing is published: {reason}");
        }
        lab.outside().tcp((net.host, 8080)).refused()?;

        let server = a1.tcp_server("a1", (net.a1, 80))?;
        counted(lab, "direct_access", || lab.outside().tcp((net.a1, 80)).dropped())?;
        let outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
        let no_route = a1.tcp((net.outside, 7)).exchange();
        expect_failure(no_route, &Failure::Unreachable, "leave without a route")?;
        a1.ip(&format!("route add default via {}\n", net.gateway_a))?;
        counted(lab, "internal", || a1.tcp((net.outside, 7)).dropped())?;
        counted(lab, "internal", || a1.ping(net.outside).dropped())?;
        expect_same("clients of the container", &server.accepted(), &vec![])?;
        expect_same("clients outside", &outside.accepted(), &vec![])?;

        a2.tcp((net.a1, 80)).exchange()?.by("a1")?.saw_client_at(net.a2)?;
        a2.ping(net.a1).replied()?;
        let _gateway = lab.host().tcp_server("host", (net.gateway_a, 7))?;
        a1.tcp((net.gateway_a, 7)).exchange()?.by("host")?.saw_client_at(net.a1)?;
        a1.ping(net.gateway_a).replied()
    })
}

pub(crate) fn host_reaches_every_container_port(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let _open = containers.a1.tcp_server("a1", (net.a1, 81))?;
        for destination in [(net.a1, 80), (net.a1, 81)] {
            let seen = lab.host().tcp(destination).exchange()?;
            seen.by("a1")?.saw_client_at(net.gateway_a)?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
        }
        let seen = lab.host().udp((net.a1, 80)).exchange()?;
        seen.by("a1")?.saw_client_at(net.gateway_a)?;
        expect_same("the replier", &seen.reply_from, &(net.a1, 80).endpoint())?;
        lab.host().ping(net.a1).replied()?;
        lab.host().ping(net.b1).replied()?;
        // A bridge that has learned nothing would show to all what is for one.
        let for_a1 = containers.a1.mac("eth0")?;
        let overheard = containers.a2.sniff("eth0", move |frame| frame.starts_with(&for_a1))?;
        let bridge = lab.bridge("net-a")?;
        for _ in 0..3 {
            lab.host().ip(&format!("link set {bridge} type bridge fdb_flush\n"))?;
            lab.host().ping(net.a1).replied()?;
        }
        expect_same("frames for a1 that a2 saw", &overheard.frames(), &vec![])
    })
}

pub(crate) fn unprotected_network_accepts_direct_access(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &["--gateway-mode", "nat-unprotected"])?;
        let a1 = lab.attach("net-a", "a1", net.a1, &["8080:80"])?;
        let _server = a1.tcp_server("a1", (net.a1, 80))?;
        for destination in [(net.a1, 80), (net.host, 8080)] {
            let seen = lab.outside().tcp(destination).exchange()?;
            seen.by("a1")?.saw_client_at(net.outside)?;
        }
        lab.outside().ping(net.a1).replied()?;
        let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
        a1.tcp((net.outside, 7)).exchange()?.by("outside")?.saw_client_at(net.host)?;
        Ok(())
    })
}

pub(crate) fn routed_network_accepts_published_ports(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &["--gateway-mode", "routed"])?;
        let a1 = lab.attach("net-a", "a1", net.a1, &["8080:80"])?;
        let _published = a1.tcp_server("a1", (net.a1, 80))?;
        let closed = a1.tcp_server("a1", (net.a1, 81))?;
        let seen = lab.outside().tcp((net.a1, 80)).exchange()?;
        seen.by("a1")?.saw_client_at(net.outside)?;
        lab.outside().ping(net.a1).replied()?;
        counted(lab, "direct_access", || lab.outside().tcp((net.a1, 81)).dropped())?;
        expect_same("clients of the other port", &closed.accepted(), &vec![])?;
        lab.outside().tcp((net.host, 8080)).refused()?;
        let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
        a1.tcp((net.outside, 7)).exchange()?.by("outside")?.saw_client_at(net.a1)?;
        Ok(())
    })
}

pub(crate) fn isolated_network_has_no_host(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &["--gateway-mode", "isolated"])?;
        let a1 = lab.attach("net-a", "a1", net.a1, &[])?;
        let a2 = lab.attach("net-a", "a2", net.a2, &[])?;
        let server = a1.tcp_server("a1", (net.a1, 80))?;
        a2.tcp((net.a1, 80)).exchange()?.by("a1")?.saw_client_at(net.a2)?;
        let before = server.accepted().len();
        let host = lab.host().tcp_server("host", (net.any, 7))?;
        counted(lab, "host_access", || lab.host().tcp((net.a1, 80)).dropped())?;
        counted(lab, "host_access", || a1.tcp((net.gateway_a, 7)).dropped())?;
        counted(lab, "host_access", || a1.ping(net.gateway_a).dropped())?;
        a1.ip(&format!("route add default via {}\n", net.gateway_a))?;
        counted(lab, "host_access", || a1.tcp((net.host, 7)).dropped())?;
        counted(lab, "internal", || a1.ping(net.outside).dropped())?;
        counted(lab, "direct_access", || lab.outside().tcp((net.a1, 80)).dropped())?;
        expect_same("clients of the host", &host.accepted(), &vec![])?;
        expect_same("clients of the container", &server.accepted().len(), &before)
    })
}

pub(crate) fn other_family_does_not_pass(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let only = if net.is_ipv4() { &[][..] } else { &["--ipv4=false"] };
        lab.create_network_of("net-a", &[net.subnet_a], only)?;
        let attach = |role: &str, address: IpAddr| -> Result<Namespace> {
            let container = lab.container(role)?;
            lab.connect_at("net-a", &container, role, &[&address.to_string()], &[])?;
            Ok(container)
        };
        let (a1, a2) = (attach("a1", net.a1)?, attach("a2", net.a2)?);
        let mac = a1.mac("eth0")?;
        // To everybody, the gateway included; no family asks for more than the EtherType.
        let everybody = |other: &Net| Envelope {
            source_mac: mac,
            destination_mac: BROADCAST,
            source: other.a1,
            destination: other.outside,
            ttl: 64,
        };
        let (frames, types) = match net.family {
            Family::Ipv4 => (vec![everybody(&IPV6).udp(9, 7, b"other")], vec![IPV6.ether_type]),
            Family::Ipv6 => {
                let (own, gateway) = (Ipv4Addr::new(172, 20, 0, 2), Ipv4Addr::new(172, 20, 0, 1));
                let question = arp(ArpOperation::REQUEST, mac, own, [0; 6], gateway);
                let frames = vec![everybody(&IPV4).udp(9, 7, b"other"), question];
                (frames, vec![IPV4.ether_type, [0x08, 0x06]])
            }
        };
        let is_other = move |frame: &[u8]| {
            frame.get(12..14).is_some_and(|kind| types.iter().any(|other| other == kind))
        };
        let from_a1 = move |frame: &[u8]| frame.get(6..12) == Some(&mac);
        let neighbour = a2.sniff("eth0", {
            let is_other = is_other.clone();
            move |frame| is_other(frame) && from_a1(frame)
        })?;
        let outside = lab.outside().sniff("out0", move |frame| {
            let marked = frame.windows(5).any(|bytes| bytes == b"other");
            is_other(frame) && marked
        })?;
        for frame in frames {
            counted_soon(lab, "family", || a1.inject("eth0", &frame))?;
        }
        // Something that does pass, later: what was before it has had its chance.
        a2.ping(net.a1).replied()?;
        lab.outside().ping(net.host).replied()?;
        expect_same("frames of the other family at the neighbour", &neighbour.frames(), &vec![])?;
        expect_same("frames of the other family outside", &outside.frames(), &vec![])
    })
}
