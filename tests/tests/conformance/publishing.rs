//! PUB: what a published port does, and what it leaves alone.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::SUBNET_A;
use netdp_tests::packet::Envelope;
use netdp_tests::probe::{Failure, PATIENCE, expect_same};
use netdp_tests::runtime::poll_until;
use serde_json::Value;

use crate::{counted_soon, expect_no_flows_of, standard_containers};

/// Bytes of a datagram that fills a frame.
const FULL_DATAGRAM_BYTES: usize = 1400;

pub(crate) fn client_address_reaches_the_container(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let _containers = standard_containers(lab)?;
        let seen = lab.outside().tcp("10.0.0.2:8080").exchange()?;
        seen.by("a1")?.saw_client_at("10.0.0.3")?;
        expect_same("the client's port", &seen.peer, &seen.client_local)?;
        expect_same("the server's end", &seen.local, &"172.20.0.2:80".parse()?)?;

        let seen = lab.outside().udp("10.0.0.2:8080").bytes(FULL_DATAGRAM_BYTES / 2).exchange()?;
        seen.by("a1")?;
        expect_same("the client's port", &seen.peer, &seen.client_local)?;
        expect_same("the replier", &seen.reply_from, &"10.0.0.2:8080".parse()?)?;

        // Published on every local address, the second one too, from any source.
        let seen = lab.outside().tcp("10.0.0.22:8080").from("192.0.2.4:0").exchange()?;
        seen.by("a1")?.saw_client_at("192.0.2.4")?;
        lab.outside().tcp("10.0.0.2:8081").refused()
    })
}

pub(crate) fn neighbour_reaches_the_published_port(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        for host in ["10.0.0.2:8080", "10.0.0.22:8080", "172.20.0.1:8080"] {
            let seen = containers.a2.tcp(host).exchange()?;
            seen.by("a1")?.saw_client_at("172.20.0.3")?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
            let seen = containers.a2.udp(host).exchange()?;
            seen.by("a1")?.saw_client_at("172.20.0.3")?;
            expect_same("the replier", &seen.reply_from, &host.parse()?)?;
        }
        Ok(())
    })
}

pub(crate) fn container_reaches_its_own_published_port(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let seen = containers.a1.tcp("10.0.0.2:8080").exchange()?;
        seen.by("a1")?.saw_client_at("172.20.0.1")?;
        let seen = containers.a1.udp("10.0.0.2:8080").exchange()?;
        seen.by("a1")?.saw_client_at("172.20.0.1")?;
        expect_same("the replier", &seen.reply_from, &"10.0.0.2:8080".parse()?)
    })
}

pub(crate) fn other_network_reaches_the_published_port(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        for host in ["10.0.0.2:8080", "172.21.0.1:8080", "172.20.0.1:8080"] {
            let seen = containers.b1.tcp(host).exchange()?;
            seen.by("a1")?.saw_client_at("172.21.0.2")?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
            let seen = containers.b1.udp(host).exchange()?;
            seen.by("a1")?.saw_client_at("172.21.0.2")?;
            expect_same("the replier", &seen.reply_from, &host.parse()?)?;
        }
        Ok(())
    })
}

pub(crate) fn other_host_addresses_stay_the_hosts(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &[])?;
        let published = ["10.0.0.2:8080:80", "10.0.0.2:8080:80/udp"];
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &published)?;
        let server = a1.tcp_server("a1", "172.20.0.2:80")?;
        let _udp = a1.udp_server("a1", "172.20.0.2:80")?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("a1")?;

        lab.outside().tcp("10.0.0.22:8080").refused()?;
        lab.outside().udp("10.0.0.22:8080").refused()?;
        let _host_tcp = lab.host().tcp_server("host", "10.0.0.22:8080")?;
        let _host_udp = lab.host().udp_server("host", "10.0.0.22:8080")?;
        lab.outside().tcp("10.0.0.22:8080").exchange()?.by("host")?.saw_client_at("10.0.0.3")?;
        lab.outside().udp("10.0.0.22:8080").exchange()?.by("host")?.saw_client_at("10.0.0.3")?;
        lab.outside().udp("10.0.0.2:8080").exchange()?.by("a1")?;
        expect_same("clients of the container", &server.accepted().len(), &1)
    })
}

pub(crate) fn outside_port_of_the_same_number_is_reached(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let _tcp = lab.outside().tcp_server("outside", "10.0.0.3:8080")?;
        let _udp = lab.outside().udp_server("outside", "10.0.0.3:8080")?;
        for container in [&containers.a1, &containers.a2] {
            let seen = container.tcp("10.0.0.3:8080").exchange()?;
            seen.by("outside")?.saw_client_at("10.0.0.2")?;
            let seen = container.udp("10.0.0.3:8080").exchange()?;
            seen.by("outside")?.saw_client_at("10.0.0.2")?;
        }
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])
    })
}

pub(crate) fn port_ranges_lead_each_to_its_own(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &[])?;
        let _taken = lab.host().tcp_server("host", "0.0.0.0:8000")?;
        let a1 = lab.container("a1")?;
        let published = ["9000-9009:8000-8009", "8000-8010:80"];
        let endpoint = lab.connect("net-a", &a1, "a1", "172.20.0.2", &published)?;
        let ports = host_ports(&endpoint["published"])?;
        let (ranged, chosen): (Vec<_>, Vec<_>) =
            ports.into_iter().partition(|(_, container)| *container != 80);
        let expected: Vec<_> = (0..10).map(|offset| (9000 + offset, 8000 + offset)).collect();
        expect_same("ports of the range", &ranged, &expected)?;
        let [(free, 80)] = chosen[..] else {
            anyhow::bail!("expect one port for container port 80: {endpoint}");
        };
        // 8000 is in use by the host, so it was not free.
        ensure!((8001..=8010).contains(&free), "choose a free port of 8000-8010: {free}");

        for (host, container) in ranged.into_iter().chain([(free, 80)]) {
            let _server = a1.tcp_server("a1", &format!("172.20.0.2:{container}"))?;
            let seen = lab.outside().tcp(&format!("10.0.0.2:{host}")).exchange()?;
            seen.by("a1")?.saw_client_at("10.0.0.3")?;
            expect_same("the container's port", &u64::from(seen.local.port()), &container)?;
        }
        lab.outside().tcp("10.0.0.2:8000").exchange()?.by("host")?;
        lab.outside().tcp("10.0.0.2:9010").refused()
    })
}

/// Host and container port of each published port.
fn host_ports(published: &Value) -> Result<Vec<(u64, u64)>> {
    let list = published.as_array().context("read a list of published ports")?;
    let number = |port: &Value, field: &str| {
        port[field].as_u64().with_context(|| format!("read {field} of {port}"))
    };
    let mut ports = list
        .iter()
        .map(|port| Ok((number(port, "host_port")?, number(port, "container_port")?)))
        .collect::<Result<Vec<_>>>()?;
    ports.sort_unstable();
    Ok(ports)
}

pub(crate) fn ports_in_use_are_refused_both_ways(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &[])?;
        let a1 = lab.container("a1")?;
        let arguments = ["connect", "net-a", a1.name(), "--name", "a1", "--ip", "172.20.0.2", "-p"];
        let connect = |port: &'static str| [&arguments[..], &[port]].concat();

        let tcp = lab.host().tcp_server("host", "0.0.0.0:8080")?;
        let udp = lab.host().udp_server("host", "10.0.0.22:8080")?;
        let pid = std::process::id().to_string();
        for port in ["8080:80", "10.0.0.2:8080:80", "8080:80/udp", "10.0.0.22:8080:80/udp"] {
            let reason = lab.netdp_fails(&connect(port))?;
            ensure!(reason.contains("8080"), "name the port: {reason}");
            let named = reason.contains(&pid) || reason.contains("conformance");
            ensure!(named, "name the process {pid} that has the port: {reason}");
            let network = lab.json(&["network", "inspect", "net-a"])?;
            expect_same("endpoints", &network[0]["endpoints"], &Value::Array(vec![]))?;
        }
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("host")?;
        drop((tcp, udp));

        lab.netdp(&connect("8080:80"))?;
        lab.netdp(&["publish", "a1", "-p", "8080:80/udp"])?;
        let _server = a1.tcp_server("a1", "172.20.0.2:80")?;
        for address in ["0.0.0.0:8080", "10.0.0.2:8080", "127.0.0.1:8080"] {
            expect_in_use(lab.host().tcp_server("host", address).map(drop))?;
            expect_in_use(lab.host().udp_server("host", address).map(drop))?;
        }
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("a1")?;
        // Two containers can't publish the same port either.
        lab.attach("net-a", "a2", "172.20.0.3", &[])?;
        let reason = lab.netdp_fails(&["publish", "a2", "-p", "8080:80"])?;
        ensure!(reason.contains("8080") && reason.contains("a1"), "name port and owner: {reason}");

        lab.netdp(&["unpublish", "a1", "-p", "8080:80"])?;
        lab.host().tcp_server("host", "0.0.0.0:8080").map(drop)
    })
}

fn expect_in_use(bound: Result<()>) -> Result<()> {
    let error = bound.err().context("bind a published port on the host: it succeeded")?;
    let code = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    expect_same("the error of a bind", &code, &Some(nix::errno::Errno::EADDRINUSE as i32))
}

pub(crate) fn udp_flow_never_reaches_a_successor(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let mut client = lab.outside().udp("10.0.0.2:8080").from("10.0.0.3:5000").open()?;
        client.exchange()?.by("a1")?;
        client.exchange()?.by("a1")?;
        expect_same("datagrams", &containers.a1_udp.received().len(), &2)?;

        // A successor with the same host port at another address gets the flow anew.
        lab.netdp(&["disconnect", "net-a", "a1"])?;
        expect_no_flows_of(lab, "172.20.0.2")?;
        lab.outside().udp("10.0.0.2:8080").refused()?;
        let a3 = lab.attach("net-a", "a3", "172.20.0.4", &["8080:80/udp"])?;
        let a3_udp = a3.udp_server("a3", "172.20.0.4:80")?;
        client.exchange()?.by("a3")?.saw_client_at("10.0.0.3")?;

        // One at the same address that does not publish the port gets nothing at all.
        lab.netdp(&["disconnect", "net-a", "a3"])?;
        let a4 = lab.attach("net-a", "a4", "172.20.0.4", &[])?;
        let a4_udp = a4.udp_server("a4", "172.20.0.4:80")?;
        client.send()?;
        lab.outside().udp("10.0.0.2:8080").refused()?;
        lab.host().udp("172.20.0.4:80").exchange()?.by("a4")?;
        expect_same("datagrams of the successor", &a4_udp.received().len(), &1)?;
        expect_same("datagrams of the predecessor", &a3_udp.received().len(), &1)
    })
}

pub(crate) fn unpublish_ends_open_flows(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let mut session = lab.outside().tcp("10.0.0.2:8080").open()?;
        session.exchange(100_000)?.by("a1")?;
        lab.netdp(&["unpublish", "a1", "-p", "8080:80"])?;
        // The host's own stack answers with a reset, as for any port that is closed.
        expect_cut(session.exchange(1000))?;
        lab.outside().tcp("10.0.0.2:8080").refused()?;
        expect_same("clients of the container", &containers.a1_tcp.accepted().len(), &1)?;
        lab.outside().udp("10.0.0.2:8080").exchange()?.by("a1")?;

        lab.netdp(&["publish", "a1", "-p", "8080:80"])?;
        let mut session = lab.outside().tcp("10.0.0.2:8080").open()?;
        session.exchange(100_000)?.by("a1")?;
        lab.netdp(&["disconnect", "net-a", "a1"])?;
        expect_cut(session.exchange(1000))?;
        lab.outside().tcp("10.0.0.2:8080").refused()?;
        lab.outside().udp("10.0.0.2:8080").refused()?;
        poll_until(PATIENCE, "the end of the flows", || {
            Ok(expect_no_flows_of(lab, "172.20.0.2").ok())
        })
    })
}

pub(crate) fn chosen_port_is_reported_and_stays(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &[])?;
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &[])?;
        let _server = a1.tcp_server("a1", "172.20.0.2:80")?;
        let reported = lab.json(&["publish", "a1", "-p", "80"])?;
        let port = reported[0]["host_port"].as_u64().context("read the chosen port")?;
        let dialled = format!("10.0.0.2:{port}");
        lab.outside().tcp(&dialled).exchange()?.by("a1")?.saw_client_at("10.0.0.3")?;
        lab.agent()?.kill9()?;
        lab.agent()?.start()?;
        let inspected = lab.json(&["network", "inspect", "net-a"])?;
        let kept = inspected[0]["endpoints"][0]["published"][0]["host_port"].as_u64();
        expect_same("the port after a restart", &kept, &Some(port))?;
        lab.outside().tcp(&dialled).exchange()?.by("a1")?.saw_client_at("10.0.0.3")?;
        Ok(())
    })
}

pub(crate) fn fragmented_datagrams_arrive_whole(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        for bytes in [1473, 9000, 40_000] {
            let seen = lab.outside().udp("10.0.0.2:8080").bytes(bytes).exchange()?;
            seen.by("a1")?.saw_client_at("10.0.0.3")?;
            let seen = containers.a2.udp("10.0.0.2:8080").bytes(bytes).exchange()?;
            seen.by("a1")?.saw_client_at("172.20.0.3")?;
            let seen = containers.b1.udp("10.0.0.2:8080").bytes(bytes).exchange()?;
            seen.by("a1")?.saw_client_at("172.21.0.2")?;
        }
        let _outside = lab.outside().udp_server("outside", "10.0.0.3:7")?;
        let seen = containers.a1.udp("10.0.0.3:7").bytes(9000).exchange()?;
        seen.by("outside")?.saw_client_at("10.0.0.2")?;
        Ok(())
    })
}

pub(crate) fn loopback_publish_is_closed_to_the_outside(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", SUBNET_A, &[])?;
        let a1 = lab.attach("net-a", "a1", "172.20.0.2", &["127.0.0.1:8080:80/udp"])?;
        let server = a1.udp_server("a1", "172.20.0.2:80")?;
        let outside = lab.outside();
        let knock = Envelope {
            source_mac: outside.mac("out0")?,
            destination_mac: lab.host().mac("up0")?,
            source: Ipv4Addr::new(10, 0, 0, 3),
            destination: Ipv4Addr::LOCALHOST,
            ttl: 64,
        };
        counted_soon(lab, "martian", || outside.inject("out0", &knock.udp(9, 8080, b"knock")))?;
        outside.udp("10.0.0.2:8080").refused()?;
        expect_same("datagrams of the container", &server.received(), &vec![])
    })
}

/// Fails unless an exchange met the end of its connection, rather than data or silence.
fn expect_cut<T: std::fmt::Debug>(result: Result<T>) -> Result<()> {
    let error = result.err().context("exchange on a flow that was cut: it succeeded")?;
    match error.downcast_ref::<Failure>() {
        Some(Failure::Reset | Failure::Closed) => Ok(()),
        _ => Err(error.context("expect a reset")),
    }
}
