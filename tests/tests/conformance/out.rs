//! OUT: what containers send, and what the host itself does.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::{Lab, SecondInterface};
use netdp_tests::namespace::Namespace;
use netdp_tests::net::{IPV4, IPV6};
use netdp_tests::packet::{Envelope, summarise, summarise_packet, verify_checksums};
use netdp_tests::probe::{Answer, Endpoint, IcmpError, PATIENCE, Ping, expect_same};
use netdp_tests::runtime::poll_until;

use super::{containers_publishing, counted, neighbours, standard_containers};

/// Runs TCP, UDP and ping from a container to E, which must see it at `seen_as`.
fn expect_seen_as(lab: &Lab, container: &Namespace, seen_as: IpAddr) -> Result<()> {
    let net = lab.net();
    let _tcp = lab.outside().tcp_server("outside", (net.outside, 7))?;
    let _udp = lab.outside().udp_server("outside", (net.outside, 7))?;
    container.tcp((net.outside, 7)).exchange()?.by("outside")?.saw_client_at(seen_as)?;
    let seen = container.udp((net.outside, 7)).exchange()?;
    seen.by("outside")?.saw_client_at(seen_as)?;
    expect_same("the replier", &seen.reply_from, &(net.outside, 7).endpoint())?;
    expect_ping_seen_as(lab, container, seen_as)
}

fn expect_ping_seen_as(lab: &Lab, container: &Namespace, seen_as: IpAddr) -> Result<()> {
    let net = lab.net();
    let requests = lab.outside().sniff("out0", |frame| {
        let is_request = |kind| matches!(kind, (8 | 128, 0));
        summarise(frame)
            .is_some_and(|p| p.icmp.is_some_and(is_request) && p.destination == net.outside)
    })?;
    container.ping(net.outside).replied()?;
    let request = requests.wait_for(PATIENCE, "an echo request at E", |_| true)?;
    verify_checksums(&request)?;
    let source = summarise(&request).map(|packet| packet.source);
    expect_same("the source of the echo request", &source, &Some(seen_as))
}

pub(crate) fn outside_sees_the_uplink_address(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        expect_seen_as(lab, &containers.a1, net.host)?;
        expect_seen_as(lab, &containers.b1, net.host)
    })
}

pub(crate) fn outside_sees_the_chosen_address(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &["--snat-ip", &net.host_second.to_string()])?;
        let a1 = lab.attach("net-a", "a1", net.a1, &[])?;
        expect_seen_as(lab, &a1, net.host_second)
    })
}

pub(crate) fn outside_sees_the_container_without_masquerade(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &["--masquerade=false"])?;
        let a1 = lab.attach("net-a", "a1", net.a1, &[])?;
        expect_seen_as(lab, &a1, net.a1)
    })
}

pub(crate) fn each_uplink_gives_its_own_address(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_lab(
        |builder| builder.second(SecondInterface::Uplink),
        |lab| {
            let containers = standard_containers(lab)?;
            let second = lab.second()?;
            let _server = second.tcp_server("second", (net.second, 7))?;
            let _udp = second.udp_server("second", (net.second, 7))?;
            expect_seen_as(lab, &containers.a1, net.host)?;
            for container in [&containers.a1, &containers.b1] {
                let seen = container.tcp((net.second, 7)).exchange()?;
                seen.by("second")?.saw_client_at(net.host_up1)?;
                container.udp((net.second, 7)).exchange()?.saw_client_at(net.host_up1)?;
            }
            // As a DHCP client does: the old address goes, the new one comes.
            lab.host().ip(&format!(
                "address del {} dev up1\naddress add {} dev up1\n",
                net.with_prefix(net.host_up1),
                net.with_prefix(net.on_link(1, 9))
            ))?;
            poll_until(PATIENCE, "the new address of up1", || {
                let seen = containers.a1.udp((net.second, 7)).exchange().ok();
                Ok(seen.filter(|seen| seen.saw_client_at(net.on_link(1, 9)).is_ok()))
            })?;
            let seen = containers.a1.tcp((net.second, 7)).exchange()?;
            seen.by("second")?.saw_client_at(net.on_link(1, 9))?;
            second
                .tcp((net.on_link(1, 9), 8080))
                .exchange()?
                .by("a1")?
                .saw_client_at(net.second)?;
            expect_seen_as(lab, &containers.a1, net.host)
        },
    )
}

fn icmp_error(ping: &Ping) -> Result<IcmpError> {
    match ping.send()? {
        Answer::Error(error) => Ok(error),
        reply @ Answer::Reply { .. } => bail!("{ping}: expected an ICMP error, got {reply:?}"),
    }
}

pub(crate) fn first_hop_is_the_gateway(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let error = icmp_error(&containers.a1.ping(net.outside).ttl(1))?;
        expect_same("time exceeded", &(error.kind, error.code), &net.time_exceeded)?;
        expect_same("the first hop", &error.source, &net.gateway_a)?;
        expect_same("the quoted destination", &error.quoted_destination, &net.outside)?;
        // The second hop is E itself.
        containers.a1.ping(net.outside).ttl(2).replied()
    })
}

pub(crate) fn too_large_packets_are_reported_or_fragmented(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let a1 = &containers.a1;
        lab.host().ip("link set up0 mtu 1400\n")?;
        lab.outside().ip("link set out0 mtu 1400\n")?;

        let error = icmp_error(&a1.ping(net.outside).packet_bytes(1450).dont_fragment())?;
        expect_same("packet too big", &(error.kind, error.code), &net.too_big)?;
        expect_same("its source", &error.source, &net.gateway_a)?;
        expect_same("the next hop's MTU", &error.next_hop_mtu, &Some(1400))?;
        expect_same("the quoted destination", &error.quoted_destination, &net.outside)?;

        // Who forwards fragments over IPv4. Over IPv6 the sender does, and has learnt from the ping.
        let fragments = lab.outside().sniff("out0", |frame| {
            summarise(frame).is_some_and(|p| p.is_fragment && p.destination == net.outside)
        })?;
        let server = lab.outside().udp_server("outside", (net.outside, 7))?;
        a1.udp((net.outside, 7)).bytes(1422).send()?;
        let arrived =
            poll_until(PATIENCE, "the datagram", || Ok(server.received().first().copied()))?;
        expect_same("the datagram's source", &arrived.peer.ip(), &net.host)?;
        expect_same("its size", &arrived.bytes, &1422)?;
        poll_until(
            PATIENCE,
            "two fragments",
            || Ok((fragments.frames().len() >= 2).then_some(())),
        )?;
        for frame in fragments.frames() {
            let source = summarise(&frame).map(|packet| packet.source);
            expect_same("a fragment's source", &source, &Some(net.host))?;
        }
        // The first packet of a flow as well, to whom no error has taught the path's MTU; over IPv6
        // it is the lesson, and the next one arrives.
        let server = lab.outside().udp_server("outside", (net.guests[0], 9))?;
        let session = a1.udp((net.guests[0], 9)).bytes(1422).open()?;
        session.send()?;
        let arrived = poll_until(PATIENCE, "the datagram", || {
            if !net.is_ipv4() {
                session.send()?;
            }
            Ok(server.received().first().copied())
        })?;
        expect_same("the datagram's source", &arrived.peer.ip(), &net.host)?;
        // TCP learns the path's MTU from the same error.
        let _tcp = lab.outside().tcp_server("outside", (net.outside, 7))?;
        a1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
        lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
        Ok(())
    })
}

pub(crate) fn host_services_see_the_container(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        for address in [net.host, net.host_second, net.gateway_a, net.gateway_b] {
            let service = (address, 7777);
            let _tcp = lab.host().tcp_server("host", service)?;
            let _udp = lab.host().udp_server("host", service)?;
            containers.a1.tcp(service).exchange()?.by("host")?.saw_client_at(net.a1)?;
            let seen = containers.a1.udp(service).exchange()?;
            seen.by("host")?.saw_client_at(net.a1)?;
            expect_same("the replier", &seen.reply_from, &service.endpoint())?;
            containers.a1.ping(address).replied()?;
        }
        Ok(())
    })
}

pub(crate) fn host_answers_pings(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let _containers = neighbours(lab)?;
        lab.outside().ping(net.host).replied()?;
        lab.outside().ping(net.host_second).replied()?;
        lab.host().ping(net.outside).replied()
    })
}

pub(crate) fn pings_with_one_identifier_stay_apart(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let everybody = [lab.host(), &containers.a1, &containers.a2, &containers.b1];
        // What process ids and programs make of them, and both ends.
        for identifier in [1, 7, 4711, 40_000, 65_535] {
            // In every order: a flow outlives its question.
            for first in 0..everybody.len() {
                for turn in 0..everybody.len() {
                    let one = everybody[(first + turn) % everybody.len()];
                    one.ping(net.outside).identifier(identifier).replied()?;
                }
            }
        }
        Ok(())
    })
}

pub(crate) fn one_port_is_one_port_outside(row: &Row) -> Result<Outcome> {
    /// In the host's own range, so that it is never kept.
    const PORT: u16 = 40_001;
    let net = row.net();
    row.in_standard_lab(|lab| {
        let options = |nat| ["--opt", nat];
        lab.create_network("net-a", net.subnet_a, &options("netdp.nat=endpoint-independent"))?;
        let only_mapping = options("netdp.nat=endpoint-independent-mapping");
        lab.create_network("net-b", net.subnet_b, &only_mapping)?;
        let outside = lab.outside();
        let servers = [net.outside, net.guests[0], net.guests[1]];
        let _tcp: Vec<_> = servers.map(|at| outside.tcp_server("outside", (at, 7))).into();
        let _udp: Vec<_> = servers.map(|at| outside.udp_server("outside", (at, 7))).into();
        for (network, name, address) in [("net-a", "a1", net.a1), ("net-b", "b1", net.b1)] {
            let container = lab.attach(network, name, address, &[])?;
            let (mut by_tcp, mut by_udp) = (Vec::new(), Vec::new());
            for server in servers {
                let local = (address, PORT);
                by_tcp.push(container.tcp((server, 7)).from(local).exchange()?.peer);
                by_udp.push(container.udp((server, 7)).from(local).exchange()?.peer);
            }
            for seen in [&by_tcp, &by_udp] {
                expect_same("the address outside", &seen[0].ip(), &net.host)?;
                ensure!(seen.iter().all(|one| *one == seen[0]), "one port is seen as {seen:?}");
            }
            let _tcp = container.tcp_server(name, (address, PORT))?;
            let _udp = container.udp_server(name, (address, PORT))?;
            let stranger = (net.guests[4], 5555);
            let (tcp, udp) = (outside.tcp(by_tcp[0]), outside.udp(by_udp[0]));
            let (tcp, udp) = (tcp.from(stranger), udp.from(stranger));
            if name == "a1" {
                tcp.exchange()?.by(name)?.saw_client_at(stranger.0)?;
                udp.exchange()?.by(name)?.saw_client_at(stranger.0)?;
            } else {
                tcp.refused()?;
                udp.refused()?;
            }
        }
        Ok(())
    })
}

pub(crate) fn multicast_stays_on_the_bridge(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let neighbour = containers.a2.udp_server("a2", (net.any, 7))?;
        neighbour.join_group(net.group, "eth0")?;
        let stranger = containers.b1.udp_server("b1", (net.any, 7))?;
        stranger.join_group(net.group, "eth0")?;
        let outside = lab.outside().udp_server("outside", (net.any, 7))?;
        outside.join_group(net.group, "out0")?;
        let mut destinations = vec![(net.group, 7).endpoint()];
        if net.is_ipv4() {
            destinations.extend(["172.20.0.255:7".endpoint(), "255.255.255.255:7".endpoint()]);
        }
        for (count, destination) in (1..).zip(destinations) {
            containers.a1.udp(destination).send()?;
            let arrived = poll_until(PATIENCE, &destination.to_string(), || {
                Ok(neighbour.received().get(count - 1).copied())
            })?;
            expect_same("its source", &arrived.peer.ip(), &net.a1)?;
        }
        // A fresh probe over each path, so that what was sent before would have arrived.
        containers.a1.udp((net.outside, 7)).exchange()?.by("outside")?;
        lab.host().udp((net.b1, 7)).exchange()?.by("b1")?;
        ensure!(outside.received().len() == 1, "routed outside: {:?}", outside.received());
        ensure!(stranger.received().len() == 1, "routed to net-b: {:?}", stranger.received());
        Ok(())
    })
}

/// How soon a change of the host's links has to be in force: a second is promised, and probes on a
/// busy machine take another.
const NOTICED: Duration = Duration::from_secs(2);

/// Waits until the server at `destination` sees `container` as `seen_as`.
fn expect_soon_seen_as(
    container: &Namespace,
    destination: (IpAddr, u16),
    seen_as: IpAddr,
) -> Result<()> {
    poll_until(NOTICED, &format!("a connection seen as {seen_as}"), || {
        let seen = container.tcp(destination).patience(NOTICED / 8).bytes(100).exchange();
        Ok(seen.ok().filter(|seen| seen.saw_client_at(seen_as).is_ok()).map(drop))
    })
}

fn is_from_a_container(frame: &[u8]) -> bool {
    let containers = [IPV4.a1, IPV4.a2, IPV6.a1, IPV6.a2];
    summarise(frame).is_some_and(|packet| containers.contains(&packet.source))
}

pub(crate) fn uplinks_come_and_go(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let a1 = &containers.a1;
        let (host, outside) = (lab.host(), lab.outside());
        let _first = outside.tcp_server("outside", (net.outside, 7))?;
        let mut session = a1.tcp((net.outside, 7)).open()?;
        session.exchange(100_000)?.saw_client_at(net.host)?;
        for round in 0..3 {
            let peer = outside.name();
            let [ours, theirs, later] = [2, 3, 4].map(|host| net.on_link(2, host));
            let [first, second] = [ours, later].map(|address| net.with_prefix(address));
            host.ip(&format!(
                "link add up2 type veth peer name out2 netns {peer}\n\
                 address add {first} dev up2\n"
            ))?;
            let theirs_there = net.with_prefix(theirs);
            outside.ip(&format!("address add {theirs_there} dev out2\nlink set out2 up\n"))?;
            let leaks = outside.sniff("out2", is_from_a_container)?;
            let server = outside.tcp_server("outside", (theirs, 7))?;
            host.ip("link set up2 up\n")?;
            expect_soon_seen_as(a1, (theirs, 7), ours)?;
            let mut old = a1.tcp((theirs, 7)).open()?;
            old.exchange(1000)?.saw_client_at(ours)?;
            host.ip("link set up2 down\nlink set up2 name up3\nlink set up3 up\n")?;
            expect_soon_seen_as(a1, (theirs, 7), ours)?;
            // Who has forgotten the connection with the link must not let its end pass as it is.
            drop(old);
            // With the first IPv4 address go the others of its subnet, so the second comes twice.
            host.ip(&format!("address add {second} dev up3\naddress del {first} dev up3\n"))?;
            host.ip(&format!("address replace {second} dev up3\n"))?;
            expect_soon_seen_as(a1, (theirs, 7), later)?;
            expect_same("frames that left un-NATed", &leaks.frames(), &vec![])?;
            drop(server);
            host.ip("link del up3\n")?;
            ensure!(
                a1.tcp((theirs, 7)).exchange().is_err(),
                "reached E by an interface that is gone, in round {round}"
            );
            session.exchange(100_000)?.saw_client_at(net.host)?;
        }
        Ok(())
    })
}

pub(crate) fn nothing_leaves_by_an_interface_without_program(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_lab(
        |builder| builder.second(SecondInterface::Unlisted),
        |lab| {
            let containers = neighbours(lab)?;
            let a1 = &containers.a1;
            let leaks = lab.second()?.sniff("out1", is_from_a_container)?;
            counted(lab, "no_uplink", || a1.tcp((net.second, 7)).dropped())?;
            let _server = lab.outside().tcp_server("outside", (net.outside, 7))?;
            let mut session = a1.tcp((net.outside, 7)).open()?;
            session.exchange(100_000)?.saw_client_at(net.host)?;
            // The route of an open flow moves away from its uplink, and back.
            lab.host().ip(&format!("route add {} via {}\n", net.outside, net.second))?;
            counted(lab, "no_uplink", || a1.udp((net.outside, 7)).dropped())?;
            // A flow that goes past the host's stack looks for its route once a second.
            counted(lab, "no_uplink", || {
                poll_until(PATIENCE, "the flow to lose its way", || {
                    Ok(session.exchange(1000).is_err().then_some(()))
                })
            })?;
            // A packet too large for the interface: the route alone is no answer.
            lab.host().ip("link set up1 mtu 1280\n")?;
            // Over IPv6 it is answered before any rule of iptables.
            let too_large = a1.udp((net.outside, 9)).bytes(1300);
            if net.is_ipv4() || row.is_ebpf() {
                counted(lab, "no_uplink", || too_large.dropped())?;
            } else {
                too_large.send()?;
            }
            expect_same("frames that left un-NATed", &leaks.frames(), &vec![])?;
            lab.host().ip(&format!("route del {} via {}\n", net.outside, net.second))?;
            a1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
            Ok(())
        },
    )
}

pub(crate) fn uplink_on_an_uplink_works(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let [ours, theirs] = [2, 3].map(|host| net.with_prefix(net.on_link(3, host)));
        lab.host().ip(&format!(
            "link add link up0 name upper0 type macvlan mode bridge\n\
             address add {ours} dev upper0\nlink set upper0 up\n"
        ))?;
        lab.outside().ip(&format!("address add {theirs} dev out0\n"))?;
        let _server = lab.outside().tcp_server("outside", (net.on_link(3, 3), 7))?;
        expect_soon_seen_as(&containers.a1, (net.on_link(3, 3), 7), net.on_link(3, 2))?;
        containers.a1.tcp((net.on_link(3, 3), 7)).exchange()?.saw_client_at(net.on_link(3, 2))?;
        let seen = lab.outside().tcp((net.on_link(3, 2), 8080)).exchange()?;
        seen.by("a1")?.saw_client_at(net.on_link(3, 3))?;
        lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
        Ok(())
    })
}

pub(crate) fn errors_of_the_path_come_back(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = containers_publishing(lab, &["8081:81/udp"])?;
        let (a1, outside) = (&containers.a1, lab.outside());
        // Port unreachable, made and read by real stacks: from outside and to outside.
        a1.udp((net.outside, 9)).refused()?;
        outside.udp((net.host, 8081)).refused()?;

        // A router on the way has a smaller MTU.
        let _server = outside.udp_server("outside", (net.outside, 7))?;
        let asked = outside.sniff("out0", |frame| {
            summarise(frame).is_some_and(|p| p.ports.is_some_and(|(_, to)| to == 7))
        })?;
        let mut session = a1.udp((net.outside, 7)).open()?;
        session.exchange()?;
        let question = asked.wait_for(PATIENCE, "a datagram at E", |_| true)?;
        let router = Envelope {
            source_mac: outside.mac("out0")?,
            destination_mac: lab.host().mac("up0")?,
            source: net.guests[4],
            destination: net.host,
            ttl: 60,
        };
        outside.inject("out0", &router.too_big(1280, &question[14..]))?;
        poll_until(PATIENCE, "the path's MTU in the container", || {
            let route = a1.ip_json(&["route", "get", &net.outside.to_string()])?;
            Ok(route.to_string().contains("1280").then_some(()))
        })?;
        // Between containers, of another network and of the same.
        containers.b1.udp((net.host, 8081)).refused()?;
        containers.a2.udp((net.host, 8081)).refused()
    })
}

pub(crate) fn tunnel_is_an_uplink(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let (a1, host, outside) = (&containers.a1, lab.host(), lab.outside());
        let _tunnel = host.tunnel(outside, "tun4")?;
        let [ours, theirs] = [2, 3].map(|host| net.on_link(4, host));
        for (namespace, address) in [(host, ours), (outside, theirs)] {
            let address = net.with_prefix(address);
            namespace
                .ip(&format!("link set tun4 mtu 1400 up\naddress add {address} dev tun4\n"))?;
        }
        let leaks = outside.sniff("tun4", |packet| {
            let containers = [IPV4.a1, IPV4.a2, IPV6.a1, IPV6.a2];
            summarise_packet(packet).is_some_and(|packet| containers.contains(&packet.source))
        })?;
        let _tcp = outside.tcp_server("outside", (theirs, 7))?;
        let _udp = outside.udp_server("outside", (theirs, 7))?;
        expect_soon_seen_as(a1, (theirs, 7), ours)?;
        a1.tcp((theirs, 7)).exchange()?.by("outside")?.saw_client_at(ours)?;
        a1.ping(theirs).replied()?;
        let seen = outside.tcp((ours, 8080)).exchange()?;
        seen.by("a1")?.saw_client_at(theirs)?;
        expect_same("the client's port", &seen.peer, &seen.client_local)?;
        // Where netfilter tracks connections, it puts fragments together and takes them apart again.
        if !net.is_ipv4() && row.is_ebpf() {
            // IPv6 routers do not fragment: what is too large is lost, and teaches the path's MTU.
            a1.udp((theirs, 7)).bytes(9000).send()?;
            poll_until(PATIENCE, "the path's MTU in the container", || {
                let route = a1.ip_json(&["route", "get", &theirs.to_string()])?;
                Ok(route.to_string().contains("1400").then_some(()))
            })?;
        }
        // In one packet, and in several.
        for bytes in [64, 9000] {
            let seen = a1.udp((theirs, 7)).bytes(bytes).exchange()?;
            seen.by("outside")?.saw_client_at(ours)?;
            expect_same("the replier", &seen.reply_from, &(theirs, 7).endpoint())?;
            let seen = outside.udp((ours, 8080)).bytes(bytes).exchange()?;
            seen.by("a1")?.saw_client_at(theirs)?;
            expect_same("the replier", &seen.reply_from, &(ours, 8080).endpoint())?;
        }
        outside.ping(ours).replied()?;
        outside.ip(&format!("route replace {} dev tun4\n", net.subnet_a))?;
        counted(lab, "direct_access", || outside.tcp((net.a1, 80)).dropped())?;
        counted(lab, "direct_access", || outside.ping(net.a1).dropped())?;
        expect_same("packets that left un-NATed", &leaks.frames(), &vec![])
    })
}

/// How soon the agent notices what no event tells of.
const LOOKED: Duration = Duration::from_secs(15);

pub(crate) fn ipsec_policies_of_the_host_hold(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let _server = lab.outside().tcp_server("outside", (net.outside, 7))?;
        let mut open = containers.a1.tcp((net.outside, 7)).open()?;
        open.exchange(100)?.saw_client_at(net.host)?;
        // Whoever has no key is not talked to.
        let policy = |verb: &str, rest: &str| {
            let whom = net.outside;
            lab.host()
                .ip(&format!("xfrm policy {verb} src {} dst {whom} dir fwd {rest}\n", net.a1))?;
            lab.host().ip(&format!("xfrm policy {verb} src {} dst {whom} dir out {rest}\n", net.a1))
        };
        policy("add", "action block")?;
        poll_until(LOOKED, "the policy to hold", || {
            Ok(containers.a1.tcp((net.outside, 7)).dropped().is_ok().then_some(()))
        })?;
        ensure!(open.exchange(100).is_err(), "an open connection went past the policy");
        // It is about nobody else.
        containers.b1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
        policy("delete", "")?;
        poll_until(LOOKED, "the way to be free", || {
            Ok(containers.a1.tcp((net.outside, 7)).exchange().is_ok().then_some(()))
        })
    })
}
