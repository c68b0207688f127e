//! OUT: what containers send, and what the host itself does.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::{Lab, SUBNET_A, SecondInterface};
use netdp_tests::namespace::Namespace;
use netdp_tests::packet::{Envelope, summarise, verify_checksums};
use netdp_tests::probe::{Answer, IcmpError, PATIENCE, Ping, expect_same};
use netdp_tests::runtime::poll_until;

use crate::{counted, standard_containers};

/// IP protocol number of ICMP.
const ICMP: u8 = 1;

/// Runs TCP, UDP and ping from a container to E, which must see it at `seen_as`.
fn expect_seen_as(lab: &Lab, container: &Namespace, seen_as: &str) -> Result<()> {
    let _tcp = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
    let _udp = lab.outside().udp_server("outside", "10.0.0.3:7")?;
    container.tcp("10.0.0.3:7").exchange()?.by("outside")?.saw_client_at(seen_as)?;
    let seen = container.udp("10.0.0.3:7").exchange()?;
    seen.by("outside")?.saw_client_at(seen_as)?;
    expect_same("the replier", &seen.reply_from, &"10.0.0.3:7".parse()?)?;
    expect_ping_seen_as(lab, container, seen_as)
}

fn expect_ping_seen_as(lab: &Lab, container: &Namespace, seen_as: &str) -> Result<()> {
    let requests = lab.outside().sniff("out0", |frame| {
        let to_outside = Ipv4Addr::new(10, 0, 0, 3);
        summarise(frame).is_some_and(|p| p.protocol == ICMP && p.destination == to_outside)
    })?;
    container.ping("10.0.0.3").replied()?;
    let request = requests.wait_for(PATIENCE, "an echo request at E", |_| true)?;
    verify_checksums(&request)?;
    let source = summarise(&request).map(|packet| packet.source);
    expect_same("the source of the echo request", &source, &Some(seen_as.parse()?))
}

pub(crate) fn outside_sees_the_uplink_address(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        expect_seen_as(lab, &containers.a1, "10.0.0.2")?;
        expect_seen_as(lab, &containers.b1, "10.0.0.2")
    })
}

pub(crate) fn outside_sees_the_chosen_address(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &["--snat-ip", "10.0.0.22"])?;
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &[])?;
        expect_seen_as(lab, &a1, "10.0.0.22")
    })
}

pub(crate) fn outside_sees_the_container_without_masquerade(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &["--masquerade=false"])?;
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &[])?;
        expect_seen_as(lab, &a1, "172.20.0.2")
    })
}

pub(crate) fn each_uplink_gives_its_own_address(row: &Row) -> Result<Outcome> {
    row.in_lab(
        |builder| builder.second(SecondInterface::Uplink),
        |lab| {
            let containers = standard_containers(lab)?;
            let second = lab.second()?;
            let _server = second.tcp_server("second", "10.1.0.3:7")?;
            let _udp = second.udp_server("second", "10.1.0.3:7")?;
            expect_seen_as(lab, &containers.a1, "10.0.0.2")?;
            for container in [&containers.a1, &containers.b1] {
                let seen = container.tcp("10.1.0.3:7").exchange()?;
                seen.by("second")?.saw_client_at("10.1.0.2")?;
                container.udp("10.1.0.3:7").exchange()?.saw_client_at("10.1.0.2")?;
            }
            // As a DHCP client does: the old address goes, the new one comes.
            lab.host().ip("address del 10.1.0.2/24 dev up1\naddress add 10.1.0.9/24 dev up1\n")?;
            poll_until(PATIENCE, "the new address of up1", || {
                let seen = containers.a1.udp("10.1.0.3:7").exchange().ok();
                Ok(seen.filter(|seen| seen.saw_client_at("10.1.0.9").is_ok()))
            })?;
            let seen = containers.a1.tcp("10.1.0.3:7").exchange()?;
            seen.by("second")?.saw_client_at("10.1.0.9")?;
            second.tcp("10.1.0.9:8080").exchange()?.by("a1")?.saw_client_at("10.1.0.3")?;
            expect_seen_as(lab, &containers.a1, "10.0.0.2")
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
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let error = icmp_error(&containers.a1.ping("10.0.0.3").ttl(1))?;
        expect_same("time exceeded", &(error.kind, error.code), &(11, 0))?;
        expect_same("the first hop", &error.source, &"172.20.0.1".parse()?)?;
        expect_same("the quoted destination", &error.quoted_destination, &"10.0.0.3".parse()?)?;
        // The second hop is E itself.
        containers.a1.ping("10.0.0.3").ttl(2).replied()
    })
}

pub(crate) fn too_large_packets_are_reported_or_fragmented(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let a1 = &containers.a1;
        lab.host().ip("link set up0 mtu 1400\n")?;
        lab.outside().ip("link set out0 mtu 1400\n")?;

        let error = icmp_error(&a1.ping("10.0.0.3").packet_bytes(1450).dont_fragment())?;
        expect_same("fragmentation needed", &(error.kind, error.code), &(3, 4))?;
        expect_same("its source", &error.source, &"172.20.0.1".parse()?)?;
        expect_same("the next hop's MTU", &error.next_hop_mtu, &Some(1400))?;
        expect_same("the quoted destination", &error.quoted_destination, &"10.0.0.3".parse()?)?;

        let fragments = lab.outside().sniff("out0", |frame| {
            let to_outside = Ipv4Addr::new(10, 0, 0, 3);
            summarise(frame).is_some_and(|p| p.is_fragment && p.destination == to_outside)
        })?;
        let server = lab.outside().udp_server("outside", "10.0.0.3:7")?;
        a1.udp("10.0.0.3:7").bytes(1422).send()?;
        let arrived =
            poll_until(PATIENCE, "the datagram", || Ok(server.received().first().copied()))?;
        expect_same("the datagram's source", &arrived.peer.ip(), &"10.0.0.2".parse()?)?;
        expect_same("its size", &arrived.bytes, &1422)?;
        poll_until(
            PATIENCE,
            "two fragments",
            || Ok((fragments.frames().len() >= 2).then_some(())),
        )?;
        for frame in fragments.frames() {
            let source = summarise(&frame).map(|packet| packet.source);
            expect_same("a fragment's source", &source, &Some("10.0.0.2".parse()?))?;
        }
        // The first packet of a flow as well, to whom no error has taught the path's MTU.
        let server = lab.outside().udp_server("outside", "192.0.2.1:9")?;
        a1.udp("192.0.2.1:9").bytes(1422).send()?;
        let arrived =
            poll_until(PATIENCE, "the datagram", || Ok(server.received().first().copied()))?;
        expect_same("the datagram's source", &arrived.peer.ip(), &"10.0.0.2".parse()?)?;
        // TCP learns the path's MTU from the same error.
        let _tcp = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
        a1.tcp("10.0.0.3:7").exchange()?.saw_client_at("10.0.0.2")?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("a1")?.saw_client_at("10.0.0.3")?;
        Ok(())
    })
}

pub(crate) fn host_services_see_the_container(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        for address in ["10.0.0.2", "10.0.0.22", "172.20.0.1", "172.21.0.1"] {
            let service = format!("{address}:7777");
            let _tcp = lab.host().tcp_server("host", &service)?;
            let _udp = lab.host().udp_server("host", &service)?;
            containers.a1.tcp(&service).exchange()?.by("host")?.saw_client_at("172.20.0.2")?;
            let seen = containers.a1.udp(&service).exchange()?;
            seen.by("host")?.saw_client_at("172.20.0.2")?;
            expect_same("the replier", &seen.reply_from, &service.parse()?)?;
            containers.a1.ping(address).replied()?;
        }
        Ok(())
    })
}

pub(crate) fn host_answers_pings(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let _containers = standard_containers(lab)?;
        lab.outside().ping("10.0.0.2").replied()?;
        lab.outside().ping("10.0.0.22").replied()?;
        lab.host().ping("10.0.0.3").replied()
    })
}

pub(crate) fn multicast_stays_on_the_bridge(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let group = Ipv4Addr::new(239, 1, 2, 3);
        let neighbour = containers.a2.udp_server("a2", "0.0.0.0:7")?;
        neighbour.join_group(group, Ipv4Addr::new(172, 20, 0, 3))?;
        let stranger = containers.b1.udp_server("b1", "0.0.0.0:7")?;
        stranger.join_group(group, Ipv4Addr::new(172, 21, 0, 2))?;
        let outside = lab.outside().udp_server("outside", "0.0.0.0:7")?;
        outside.join_group(group, Ipv4Addr::new(10, 0, 0, 3))?;
        for (count, destination) in
            (1..).zip(["239.1.2.3:7", "172.20.0.255:7", "255.255.255.255:7"])
        {
            containers.a1.udp(destination).send()?;
            let arrived = poll_until(PATIENCE, destination, || {
                Ok(neighbour.received().get(count - 1).copied())
            })?;
            expect_same("its source", &arrived.peer.ip(), &"172.20.0.2".parse()?)?;
        }
        // A fresh probe over each path, so that what was sent before would have arrived.
        containers.a1.udp("10.0.0.3:7").exchange()?.by("outside")?;
        lab.host().udp("172.21.0.2:7").exchange()?.by("b1")?;
        ensure!(outside.received().len() == 1, "routed outside: {:?}", outside.received());
        ensure!(stranger.received().len() == 1, "routed to net-b: {:?}", stranger.received());
        Ok(())
    })
}

/// How soon a change of the host's links has to be in force: a second is promised, and probes on a
/// busy machine take another.
const NOTICED: Duration = Duration::from_secs(2);

/// Waits until the server at `destination` sees `container` as `seen_as`.
fn expect_soon_seen_as(container: &Namespace, destination: &str, seen_as: &str) -> Result<()> {
    poll_until(NOTICED, &format!("a connection seen as {seen_as}"), || {
        let seen = container.tcp(destination).patience(NOTICED / 8).bytes(100).exchange();
        Ok(seen.ok().filter(|seen| seen.saw_client_at(seen_as).is_ok()).map(drop))
    })
}

fn is_from_a_container(frame: &[u8]) -> bool {
    let is_ours = |source: Ipv4Addr| source.octets()[..2] == [172, 20];
    summarise(frame).is_some_and(|packet| is_ours(packet.source))
}

pub(crate) fn uplinks_come_and_go(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let a1 = &containers.a1;
        let (host, outside) = (lab.host(), lab.outside());
        let _first = outside.tcp_server("outside", "10.0.0.3:7")?;
        let mut session = a1.tcp("10.0.0.3:7").open()?;
        session.exchange(100_000)?.saw_client_at("10.0.0.2")?;
        for round in 0..3 {
            let peer = outside.name();
            host.ip(&format!(
                "link add up2 type veth peer name out2 netns {peer}\n\
                 address add 10.2.0.2/24 dev up2\n"
            ))?;
            outside.ip("address add 10.2.0.3/24 dev out2\nlink set out2 up\n")?;
            let leaks = outside.sniff("out2", is_from_a_container)?;
            let server = outside.tcp_server("outside", "10.2.0.3:7")?;
            host.ip("link set up2 up\n")?;
            expect_soon_seen_as(a1, "10.2.0.3:7", "10.2.0.2")?;
            host.ip("link set up2 down\nlink set up2 name up3\nlink set up3 up\n")?;
            expect_soon_seen_as(a1, "10.2.0.3:7", "10.2.0.2")?;
            host.ip("address add 10.2.0.4/24 dev up3\naddress del 10.2.0.2/24 dev up3\n")?;
            host.ip("address replace 10.2.0.4/24 dev up3\n")?;
            expect_soon_seen_as(a1, "10.2.0.3:7", "10.2.0.4")?;
            expect_same("frames that left un-NATed", &leaks.frames(), &vec![])?;
            drop(server);
            host.ip("link del up3\n")?;
            ensure!(
                a1.tcp("10.2.0.3:7").exchange().is_err(),
                "reached E by an interface that is gone, in round {round}"
            );
            session.exchange(100_000)?.saw_client_at("10.0.0.2")?;
        }
        Ok(())
    })
}

pub(crate) fn nothing_leaves_by_an_interface_without_program(row: &Row) -> Result<Outcome> {
    row.in_lab(
        |builder| builder.second(SecondInterface::Unlisted),
        |lab| {
            let containers = standard_containers(lab)?;
            let a1 = &containers.a1;
            let leaks = lab.second()?.sniff("out1", is_from_a_container)?;
            counted(lab, "no_uplink", || a1.tcp("10.1.0.3:7").dropped())?;
            let _server = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
            let mut session = a1.tcp("10.0.0.3:7").open()?;
            session.exchange(100_000)?.saw_client_at("10.0.0.2")?;
            // The route of an open flow moves away from its uplink, and back.
            lab.host().ip("route add 10.0.0.3/32 via 10.1.0.3\n")?;
            counted(lab, "no_uplink", || a1.udp("10.0.0.3:7").dropped())?;
            counted(lab, "no_uplink", || {
                ensure!(session.exchange(1000).is_err(), "the flow found a way out");
                Ok(())
            })?;
            // A packet too large for the interface: the route alone is no answer.
            lab.host().ip("link set up1 mtu 1000\n")?;
            counted(lab, "no_uplink", || a1.udp("10.0.0.3:9").bytes(1300).dropped())?;
            expect_same("frames that left un-NATed", &leaks.frames(), &vec![])?;
            lab.host().ip("route del 10.0.0.3/32\n")?;
            a1.tcp("10.0.0.3:7").exchange()?.saw_client_at("10.0.0.2")?;
            Ok(())
        },
    )
}

pub(crate) fn uplink_on_an_uplink_works(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        lab.host().ip("link add link up0 name upper0 type macvlan mode bridge\n\
             address add 10.3.0.2/24 dev upper0\nlink set upper0 up\n")?;
        lab.outside().ip("address add 10.3.0.3/24 dev out0\n")?;
        let _server = lab.outside().tcp_server("outside", "10.3.0.3:7")?;
        expect_soon_seen_as(&containers.a1, "10.3.0.3:7", "10.3.0.2")?;
        containers.a1.tcp("10.3.0.3:7").exchange()?.saw_client_at("10.3.0.2")?;
        let seen = lab.outside().tcp("10.3.0.2:8080").exchange()?;
        seen.by("a1")?.saw_client_at("10.3.0.3")?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("a1")?.saw_client_at("10.0.0.3")?;
        Ok(())
    })
}

pub(crate) fn errors_of_the_path_come_back(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let (a1, outside) = (&containers.a1, lab.outside());
        // Port unreachable, made and read by real stacks: from outside, to outside, and between
        // containers, of the same network and of another.
        a1.udp("10.0.0.3:9").refused()?;
        lab.netdp(&["publish", "a1", "-p", "8081:81/udp"])?;
        outside.udp("10.0.0.2:8081").refused()?;
        containers.b1.udp("10.0.0.2:8081").refused()?;
        containers.a2.udp("10.0.0.2:8081").refused()?;

        // A router on the way has a smaller MTU.
        let _server = outside.udp_server("outside", "10.0.0.3:7")?;
        let asked = outside.sniff("out0", |frame| {
            summarise(frame).is_some_and(|p| p.ports.is_some_and(|(_, to)| to == 7))
        })?;
        let mut session = a1.udp("10.0.0.3:7").open()?;
        session.exchange()?;
        let question = asked.wait_for(PATIENCE, "a datagram at E", |_| true)?;
        let router = Envelope {
            source_mac: outside.mac("out0")?,
            destination_mac: lab.host().mac("up0")?,
            source: Ipv4Addr::new(192, 0, 2, 5),
            destination: Ipv4Addr::new(10, 0, 0, 2),
            ttl: 60,
        };
        outside.inject("out0", &router.fragmentation_needed(1280, &question[14..]))?;
        poll_until(PATIENCE, "the path's MTU in the container", || {
            let route = a1.ip_json(&["route", "get", "10.0.0.3"])?;
            Ok(route.to_string().contains("1280").then_some(()))
        })
    })
}
