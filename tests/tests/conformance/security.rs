//! SEC: attempts that must fail, and be counted where there is a packet to count.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use etherparse::ArpOperation;
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::{Lab, SUBNET_A};
use netdp_tests::packet::{Envelope, arp, summarise};
use netdp_tests::probe::{PATIENCE, expect_same};
use netdp_tests::runtime::poll_until;

use crate::{counted_soon, standard_containers};

const A1: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 2);
const A2: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 3);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);

pub(crate) fn forged_sources_are_dropped(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let (a1, a2) = (&containers.a1, &containers.a2);
        let neighbour = a2.udp_server("a2", "172.20.0.3:7")?;
        a1.udp("172.20.0.3:7").exchange()?.by("a2")?;
        a2.tcp("172.20.0.2:80").bytes(1000).exchange()?.by("a1")?;
        let own = Envelope {
            source_mac: a1.mac("eth0")?,
            destination_mac: a2.mac("eth0")?,
            source: A1,
            destination: A2,
            ttl: 64,
        };
        let stranger = [2, 0, 0, 0, 0, 0x99];
        let gateway_mac = gateway_mac(lab, a1)?;

        let foreign = Envelope { source: Ipv4Addr::new(172, 20, 0, 99), ..own };
        let gateways = Envelope { source: Ipv4Addr::new(172, 20, 0, 1), ..own };
        let forged_mac = Envelope { source_mac: stranger, ..own };
        let stolen_mac = Envelope { source_mac: own.destination_mac, ..own };
        for forged in [foreign, gateways, forged_mac, stolen_mac] {
            let frame = forged.udp(9, 7, b"forged");
            counted_soon(lab, "spoofed_source", || a1.inject("eth0", &frame))?;
        }
        // Out of the network as well: E must not see it under any address.
        let seen = lab.outside().sniff("out0", |frame| {
            summarise(frame).is_some_and(|packet| packet.ports == Some((9, 7)))
        })?;
        let leaving = Envelope {
            destination_mac: gateway_mac,
            source: Ipv4Addr::new(198, 51, 100, 7),
            destination: OUTSIDE,
            ..own
        };
        let frame = leaving.udp(9, 7, b"forged");
        counted_soon(lab, "spoofed_source", || a1.inject("eth0", &frame))?;

        let gateway = Ipv4Addr::new(172, 20, 0, 1);
        let before = a2.ip_json(&["neighbour", "show", "to", "172.20.0.1"])?[0]["lladdr"].clone();
        let claims = [
            arp(ArpOperation::REPLY, own.source_mac, gateway, own.destination_mac, A2),
            arp(ArpOperation::REPLY, stranger, A1, own.destination_mac, A2),
            arp(ArpOperation::REQUEST, own.source_mac, gateway, [0; 6], A2),
        ];
        for (claim, reason) in claims.iter().zip(["spoofed_arp", "spoofed_source", "spoofed_arp"]) {
            counted_soon(lab, reason, || a1.inject("eth0", claim))?;
        }
        let after = a2.ip_json(&["neighbour", "show", "to", "172.20.0.1"])?[0]["lladdr"].clone();
        expect_same("the gateway's hardware address at a2", &after, &before)?;

        // The same frame, honest, arrives: the attempts would have, too.
        a1.inject("eth0", &own.udp(9, 7, b"honest"))?;
        let last = poll_until(PATIENCE, "the honest datagram", || {
            Ok(neighbour.received().get(1).copied())
        })?;
        expect_same("its source", &last.peer, &"172.20.0.2:9".parse()?)?;
        expect_same("datagrams", &neighbour.received().len(), &2)?;
        let _outside = lab.outside().udp_server("outside", "10.0.0.3:8")?;
        a1.udp("10.0.0.3:8").exchange()?.saw_client_at("10.0.0.2")?;
        expect_same("forged frames outside", &seen.frames().len(), &0)
    })
}

fn gateway_mac(lab: &Lab, container: &netdp_tests::namespace::Namespace) -> Result<[u8; 6]> {
    container.ping("172.20.0.1").replied()?;
    let network = lab.json(&["network", "inspect", "net-a"])?;
    lab.host().mac(network[0]["bridge"].as_str().context("read the name of the bridge")?)
}

pub(crate) fn outside_can_not_pretend_to_be_inside(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let outside = lab.outside();
        let honest = Envelope {
            source_mac: outside.mac("out0")?,
            destination_mac: lab.host().mac("up0")?,
            source: OUTSIDE,
            destination: HOST,
            ttl: 64,
        };
        let loopback = lab.host().udp_server("host", "127.0.0.1:7")?;
        let to_loopback = Envelope { destination: Ipv4Addr::LOCALHOST, ..honest };
        let from_loopback = Envelope { source: Ipv4Addr::new(127, 0, 0, 5), ..honest };
        for (envelope, port) in [(to_loopback, 7), (to_loopback, 8080), (from_loopback, 8080)] {
            let frame = envelope.udp(5000, port, b"martian");
            counted_soon(lab, "martian", || outside.inject("out0", &frame))?;
        }
        let as_neighbour = Envelope { source: A2, ..honest };
        let straight = Envelope { source: A2, destination: A1, ..honest };
        for (envelope, port) in [(as_neighbour, 8080), (straight, 80)] {
            let frame = envelope.udp(5000, port, b"from outside");
            counted_soon(lab, "outside_spoof", || outside.inject("out0", &frame))?;
            let frame = envelope.tcp_syn(5000, port, 1);
            counted_soon(lab, "outside_spoof", || outside.inject("out0", &frame))?;
        }
        outside.inject("out0", &honest.udp(5000, 8080, b"honest"))?;
        let first = poll_until(PATIENCE, "the honest datagram", || {
            Ok(containers.a1_udp.received().first().copied())
        })?;
        expect_same("its source", &first.peer, &"10.0.0.3:5000".parse()?)?;
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
        expect_same("datagrams on loopback", &loopback.received(), &vec![])
    })
}

pub(crate) fn nonsense_is_refused_and_changes_nothing(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &[])?;
        lab.attach("net-a", "a1", "172.20.0.2", &["8080:80"])?;
        let spare = lab.container("spare")?;
        let state = || -> Result<_> {
            let networks = lab.json(&["network", "inspect", "net-a"])?;
            Ok((lab.json(&["network", "ls"])?, networks, lab.host().links()?))
        };
        let before = state()?;

        let long = "n".repeat(300);
        for name in ["", " ", "a b", "../etc", "-x", "né", "net/a", long.as_str(), "net-a"] {
            expect_refused(lab, &["network", "create", "--subnet", "172.22.0.0/24", "--", name])?;
        }
        for subnet in [
            "172.22.0.0/33",
            "172.22.0.0/-1",
            "172.22.0.0",
            "172.22.0/24",
            "172.22.0.1/24",
            "172.22.0.0/32",
            "172.20.0.0/25",
            "172.0.0.0/8",
            "10.0.0.0/24",
            "127.0.0.0/24",
            "224.0.0.0/24",
            "0.0.0.0/0",
            "fd00::/64",
        ] {
            expect_refused(lab, &["network", "create", "new", "--subnet", subnet])?;
        }
        let create = ["network", "create", "new", "--subnet", "172.22.0.0/24"];
        for option in [
            &["--gateway", "172.23.0.1"][..],
            &["--gateway", "172.22.0.255"],
            &["--ip-range", "172.23.0.0/25"],
            &["--mtu", "1"],
            &["--mtu", "99999999999"],
            &["--gateway-mode", "magic"],
            &["--snat-ip", "nowhere"],
            &["--opt", "com.example.unknown=1"],
            &["--opt", "no-equals-sign"],
        ] {
            expect_refused(lab, &[&create[..], option].concat())?;
        }
        for arguments in [
            &["connect", "unknown", spare.name(), "--name", "spare"][..],
            &["connect", "net-a", "no-such-namespace", "--name", "spare"],
            &["connect", "net-a", "/proc/version", "--name", "spare"],
            &["connect", "net-a", spare.name(), "--name", "a1"],
            &["connect", "net-a", spare.name(), "--name", "spare", "--ip", "172.20.0.2"],
            &["connect", "net-a", spare.name(), "--name", "spare", "--ip", "172.20.0.1"],
            &["connect", "net-a", spare.name(), "--name", "spare", "--ip", "172.20.0.255"],
            &["connect", "net-a", spare.name(), "--name", "spare", "--ip", "172.21.0.9"],
            &["connect", "net-a", spare.name(), "--name", "spare", "--mac", "ff:ff:ff:ff:ff:ff"],
            &["connect", "net-a", spare.name(), "--name", "spare", "--mac", "nonsense"],
            &["connect", "net-a", spare.name(), "--name", "spare", "--interface", "lo"],
            &[
                "connect",
                "net-a",
                spare.name(),
                "--name",
                "spare",
                "--interface",
                "far-too-long-a-name",
            ],
            &["connect", "net-a", spare.name(), "--name", "spare", "-p", "8080:80"],
            &["connect", "net-a", spare.name(), "--name", "spare", "-p", "192.0.2.77:81:80"],
            &["publish", "a1", "-p", "0:80"],
            &["publish", "a1", "-p", "81:65536"],
            &["publish", "a1", "-p", "82-81:80"],
            &["publish", "a1", "-p", "81-90:80-85"],
            &["publish", "a1", "-p", "81:80/igmp"],
            &["publish", "unknown", "-p", "81:80"],
            &["unpublish", "a1", "-p", "81:80"],
            &["disconnect", "net-a", "unknown"],
            &["disconnect", "unknown", "a1"],
            &["network", "rm", "unknown"],
            &["network", "rm", "net-a"],
            &["policy", "set", "net-a", "/nonexistent"],
            &["policy", "rm", "net-a", "1"],
        ] {
            expect_refused(lab, arguments)?;
        }
        refuse_raw_requests(lab)?;
        expect_same("netdp's state", &state()?, &before)?;
        expect_same("links of the spare container", &spare.links()?, &vec!["lo".to_owned()])
    })
}

/// Speaks to the API without the command line between.
fn refuse_raw_requests(lab: &Lab) -> Result<()> {
    let huge = format!(r#"{{"name": "{}"}}"#, "n".repeat(16 << 20));
    let deep = "[".repeat(100_000);
    let networks = "/v1/networks";
    let bodies: [(&str, &str, &[u8]); 14] = [
        ("POST", networks, b""),
        ("POST", networks, b"{"),
        ("POST", networks, b"null"),
        ("POST", networks, b"\xff\xfe\x00"),
        ("POST", networks, deep.as_bytes()),
        ("POST", networks, huge.as_bytes()),
        ("POST", networks, br#"{"name": 7}"#),
        ("POST", networks, br#"{"name": "new", "subnets": "172.22.0.0/24"}"#),
        ("POST", networks, br#"{"name": "new", "mtu": -1}"#),
        ("POST", networks, br#"{"name": "new", "surprise": true}"#),
        ("POST", "/v1/networks/net-a/endpoints", br#"{"netns": "../../etc/passwd"}"#),
        ("DELETE", "/v1/networks/..%2f..%2fetc", b""),
        ("PATCH", networks, b"{}"),
        ("GET", "/v1/nothing", b""),
    ];
    for (method, path, body) in bodies {
        let (status, answer) = lab.agent()?.request(method, path, body)?;
        let start: String = String::from_utf8_lossy(body).chars().take(60).collect();
        ensure!((400..500).contains(&status), "{method} {path} {start:?}: {answer}");
    }
    Ok(())
}

/// Fails unless the command is refused (1) or is no command (2), with a reason and no panic.
fn expect_refused(lab: &Lab, arguments: &[&str]) -> Result<()> {
    let output = lab.agent()?.run(arguments)?;
    let reason = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    ensure!(matches!(code, Some(1 | 2)), "netdp {arguments:?}: {}: {reason}", output.status);
    ensure!(!reason.trim().is_empty(), "netdp {arguments:?}: refused without a reason");
    ensure!(!reason.contains("panicked"), "netdp {arguments:?}: {reason}");
    Ok(())
}

pub(crate) fn ports_of_the_host_stay_the_hosts(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let a1 = &containers.a1;
        let _outside = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
        let _outside_udp = lab.outside().udp_server("outside", "10.0.0.3:7")?;
        let _host = lab.host().tcp_server("host", "0.0.0.0:2222")?;
        let host_udp = lab.host().udp_server("host", "10.0.0.2:2223")?;
        // The container's source port is one that the host listens on, or has published.
        for stolen in [2222, 8080] {
            let seen = a1
                .tcp("10.0.0.3:7")
                .from(&format!("172.20.0.2:{stolen}"))
                .bytes(1000)
                .exchange()?;
            seen.by("outside")?.saw_client_at("10.0.0.2")?;
            ensure!(seen.peer.port() != stolen, "the container got the host's port {stolen}");
        }
        let seen = a1.udp("10.0.0.3:7").from("172.20.0.2:2223").exchange()?;
        ensure!(seen.by("outside")?.peer.port() != 2223, "the container got the host's udp port");
        // A port that nobody has is kept.
        let seen = a1.tcp("10.0.0.3:7").from("172.20.0.2:2224").bytes(1000).exchange()?;
        expect_same("a free source port", &seen.peer.port(), &2224)?;
        // And who dials the host from the port that the container dialled reaches the host.
        let dialled = lab.outside().udp("10.0.0.2:2223").from("10.0.0.3:9").exchange()?;
        dialled.by("host")?.saw_client_at("10.0.0.3")?;
        expect_same("datagrams of the host", &host_udp.received().len(), &1)
    })
}
