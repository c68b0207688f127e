//! SEC: attempts that must fail, and be counted where there is a packet to count.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, bail, ensure};
use etherparse::ArpOperation;
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::net::{Family, Net};
use netdp_tests::packet::{Envelope, advertise_neighbour, arp, solicit_neighbour, summarise};
use netdp_tests::probe::{Endpoint, PATIENCE, expect_same};
use netdp_tests::runtime::poll_until;

use super::{bridge_mac, counted_soon, neighbours};

pub(crate) fn forged_sources_are_dropped(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let (a1, a2) = (&containers.a1, &containers.a2);
        let neighbour = a2.udp_server("a2", (net.a2, 7))?;
        a1.udp((net.a2, 7)).exchange()?.by("a2")?;
        a2.tcp((net.a1, 80)).bytes(1000).exchange()?.by("a1")?;
        let own = Envelope {
            source_mac: a1.mac("eth0")?,
            destination_mac: a2.mac("eth0")?,
            source: net.a1,
            destination: net.a2,
            ttl: 64,
        };
        let gateway_mac = bridge_mac(lab, "net-a")?;

        let foreign = Envelope { source: net.a_nobody, ..own };
        let gateways = Envelope { source: net.gateway_a, ..own };
        let forged_mac = Envelope { source_mac: STRANGER, ..own };
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
            source: net.elsewhere,
            destination: net.outside,
            ..own
        };
        let frame = leaving.udp(9, 7, b"forged");
        counted_soon(lab, "spoofed_source", || a1.inject("eth0", &frame))?;

        a2.ping(net.gateway_a).replied()?;
        let before = neighbour_mac(a2, net.gateway_a)?;
        for (reason, claim) in forged_claims(net, own.source_mac, own.destination_mac)? {
            counted_soon(lab, reason, || a1.inject("eth0", &claim))?;
        }
        let after = neighbour_mac(a2, net.gateway_a)?;
        ensure!(before.is_some(), "a2 does not know its gateway");
        expect_same("the gateway's hardware address at a2", &after, &before)?;

        // The same frame, honest, arrives: the attempts would have, too.
        a1.inject("eth0", &own.udp(9, 7, b"honest"))?;
        let last = poll_until(PATIENCE, "the honest datagram", || {
            Ok(neighbour.received().get(1).copied())
        })?;
        expect_same("its source", &last.peer, &(net.a1, 9).endpoint())?;
        expect_same("datagrams", &neighbour.received().len(), &2)?;
        let _outside = lab.outside().udp_server("outside", (net.outside, 8))?;
        a1.udp((net.outside, 8)).exchange()?.saw_client_at(net.host)?;
        expect_same("forged frames outside", &seen.frames().len(), &0)
    })
}

/// A hardware address that nobody has.
const STRANGER: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

/// What A1 may not say to A2 of whose hardware address is whose, and the reason it is dropped for.
fn forged_claims(net: &Net, a1_mac: [u8; 6], a2_mac: [u8; 6]) -> Result<Vec<(&str, Vec<u8>)>> {
    Ok(match (net.gateway_a, net.a1, net.a2) {
        (IpAddr::V4(gateway), IpAddr::V4(a1), IpAddr::V4(a2)) => vec![
            ("spoofed_arp", arp(ArpOperation::REPLY, a1_mac, gateway, a2_mac, a2)),
            ("spoofed_source", arp(ArpOperation::REPLY, STRANGER, a1, a2_mac, a2)),
            ("spoofed_arp", arp(ArpOperation::REQUEST, a1_mac, gateway, [0; 6], a2)),
        ],
        (IpAddr::V6(gateway), IpAddr::V6(a1), IpAddr::V6(a2)) => {
            let (own, peer) = ((a1_mac, a1), (a2_mac, a2));
            let liar = (a1_mac, gateway);
            vec![
                // Another's address, under one's own name and under that of the robbed.
                ("spoofed_neighbour", advertise_neighbour(own, peer, gateway, a1_mac)),
                ("spoofed_source", advertise_neighbour(liar, peer, gateway, a1_mac)),
                // One's own address, at another's hardware address, and from it.
                ("spoofed_neighbour", advertise_neighbour(own, peer, a1, STRANGER)),
                ("spoofed_source", advertise_neighbour((STRANGER, a1), peer, a1, STRANGER)),
                // A question teaches as well.
                ("spoofed_source", solicit_neighbour(liar, peer, a2, a1_mac)),
                ("spoofed_neighbour", solicit_neighbour(own, peer, a2, STRANGER)),
            ]
        }
        (gateway, ..) => bail!("mix families with {gateway}"),
    })
}

/// The hardware address that a container knows for a neighbour.
fn neighbour_mac(container: &Namespace, address: IpAddr) -> Result<Option<String>> {
    let known = container.ip_json(&["neighbour", "show", "to", &address.to_string()])?;
    Ok(known[0]["lladdr"].as_str().map(String::from))
}

pub(crate) fn outside_can_not_pretend_to_be_inside(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let outside = lab.outside();
        let honest = Envelope {
            source_mac: outside.mac("out0")?,
            destination_mac: lab.host().mac("up0")?,
            source: net.outside,
            destination: net.host,
            ttl: 64,
        };
        let loopback = lab.host().udp_server("host", (net.loopback, 7))?;
        let to_loopback = Envelope { destination: net.loopback, ..honest };
        let of_loopback = match net.loopback {
            IpAddr::V4(_) => Ipv4Addr::new(127, 0, 0, 5).into(),
            // There is no other.
            IpAddr::V6(_) => net.loopback,
        };
        let from_loopback = Envelope { source: of_loopback, ..honest };
        for (envelope, port) in [(to_loopback, 7), (to_loopback, 8080), (from_loopback, 8080)] {
            let frame = envelope.udp(5000, port, b"martian");
            counted_soon(lab, "martian", || outside.inject("out0", &frame))?;
        }
        let as_neighbour = Envelope { source: net.a2, ..honest };
        let straight = Envelope { source: net.a2, destination: net.a1, ..honest };
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
        expect_same("its source", &first.peer, &(net.outside, 5000).endpoint())?;
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])?;
        expect_same("datagrams on loopback", &loopback.received(), &vec![])
    })
}

/// What the command line must refuse, in one family.
struct Nonsense {
    /// A subnet with which nothing is wrong.
    free: &'static str,
    /// Malformed, not a network's, of somebody else, overlapping.
    subnets: &'static [&'static str],
    /// For a network with the free subnet.
    options: &'static [&'static [&'static str]],
    /// Not in network a, or not a host's.
    addresses: &'static [&'static str],
    /// A published port on an address that the host does not have.
    publish: &'static str,
}

const NONSENSE_IPV4: Nonsense = Nonsense {
    free: "172.22.0.0/24",
    subnets: &[
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
    ],
    options: &[
        &["--gateway", "172.23.0.1"],
        &["--gateway", "172.22.0.255"],
        &["--ip-range", "172.23.0.0/25"],
    ],
    addresses: &["172.20.0.255", "172.20.0.0", "172.21.0.9", "fd00:20::9"],
    publish: "192.0.2.77:81:80",
};

const NONSENSE_IPV6: Nonsense = Nonsense {
    free: "fd00:22::/64",
    subnets: &[
        "fd00:22::/129",
        "fd00:22::/-1",
        "fd00:22::",
        "fd00:22:/64",
        "fd00:22::1/64",
        "fd00:22::/128",
        "fd00:20::/80",
        "fd00::/8",
        "fd00::/64",
        "::1/128",
        "fe80::/64",
        "ff05::/64",
        "::/0",
    ],
    options: &[
        &["--gateway", "fd00:23::1"],
        // The subnet-router anycast address (RFC 4291 2.6.1).
        &["--gateway", "fd00:22::"],
        &["--ip-range", "fd00:23::/80"],
    ],
    addresses: &["fd00:20::", "fd00:21::9", "fe80::9", "::1"],
    publish: "[2001:db8::77]:81:80",
};

pub(crate) fn nonsense_is_refused_and_changes_nothing(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &[])?;
        lab.attach("net-a", "a1", net.a1, &["8080:80"])?;
        let spare = lab.container("spare")?;
        let state = || -> Result<_> {
            let networks = lab.json(&["network", "inspect", "net-a"])?;
            Ok((lab.json(&["network", "ls"])?, networks, lab.host().links()?))
        };
        let before = state()?;

        let long = "n".repeat(300);
        let nonsense = match net.family {
            Family::Ipv4 => &NONSENSE_IPV4,
            Family::Ipv6 => &NONSENSE_IPV6,
        };
        for name in ["", " ", "a b", "../etc", "-x", "né", "net/a", long.as_str(), "net-a"] {
            expect_refused(lab, &["network", "create", "--subnet", nonsense.free, "--", name])?;
        }
        for subnet in nonsense.subnets {
            expect_refused(lab, &["network", "create", "new", "--subnet", subnet])?;
        }
        let create = ["network", "create", "new", "--subnet", nonsense.free];
        for option in [
            &["--mtu", "1"][..],
            &["--mtu", "99999999999"],
            &["--gateway-mode", "magic"],
            &["--snat-ip", "nowhere"],
            &["--opt", "com.example.unknown=1"],
            &["--opt", "no-equals-sign"],
        ] {
            expect_refused(lab, &[&create[..], option].concat())?;
        }
        for option in nonsense.options {
            expect_refused(lab, &[&create[..], option].concat())?;
        }
        let taken = [net.a1, net.gateway_a].map(|address| address.to_string());
        let taken = taken.iter().map(String::as_str);
        for address in nonsense.addresses.iter().copied().chain(taken) {
            let spare = spare.name();
            expect_refused(lab, &["connect", "net-a", spare, "--name", "spare", "--ip", address])?;
        }
        for arguments in [
            &["connect", "unknown", spare.name(), "--name", "spare"][..],
            &["connect", "net-a", "no-such-namespace", "--name", "spare"],
            &["connect", "net-a", "/proc/version", "--name", "spare"],
            &["connect", "net-a", spare.name(), "--name", "a1"],
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
            &["connect", "net-a", spare.name(), "--name", "spare", "-p", nonsense.publish],
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
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let a1 = &containers.a1;
        let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
        let _outside_udp = lab.outside().udp_server("outside", (net.outside, 7))?;
        let _host = lab.host().tcp_server("host", (net.any, 2222))?;
        let host_udp = lab.host().udp_server("host", (net.host, 2223))?;
        // The container's source port is one that the host listens on, or has published.
        for stolen in [2222, 8080] {
            let seen = a1.tcp((net.outside, 7)).from((net.a1, stolen)).bytes(1000).exchange()?;
            seen.by("outside")?.saw_client_at(net.host)?;
            ensure!(seen.peer.port() != stolen, "the container got the host's port {stolen}");
        }
        let seen = a1.udp((net.outside, 7)).from((net.a1, 2223)).exchange()?;
        ensure!(seen.by("outside")?.peer.port() != 2223, "the container got the host's udp port");
        // A port that nobody has is kept.
        // iptables does not know which ports sockets have, and keeps none.
        if row.is_ebpf() {
            let seen = a1.tcp((net.outside, 7)).from((net.a1, 2224)).bytes(1000).exchange()?;
            expect_same("a free source port", &seen.peer.port(), &2224)?;
        }
        // And who dials the host from the port that the container dialled reaches the host.
        let dialled = lab.outside().udp((net.host, 2223)).from((net.outside, 9)).exchange()?;
        dialled.by("host")?.saw_client_at(net.outside)?;
        expect_same("datagrams of the host", &host_udp.received().len(), &1)
    })
}
