//! PUB: what a published port does, and what it leaves alone.

use std::fs;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netdp_tests::agent::Agent;
use netdp_tests::docker::Docker;
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::net::Net;
use netdp_tests::packet::Envelope;
use netdp_tests::probe::{Endpoint, Failure, PATIENCE, TcpServer, expect_same};
use netdp_tests::runtime::{patient, poll_until};
use serde_json::Value;

use super::{
    containers_publishing, counted_soon, expect_no_flows_of, neighbours, neighbours_publishing,
    standard_containers,
};

/// Bytes of a datagram that fills a frame.
const FULL_DATAGRAM_BYTES: usize = 1400;

pub(crate) fn client_address_reaches_the_container(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let _containers = neighbours(lab)?;
        let seen = lab.outside().tcp((net.host, 8080)).exchange()?;
        seen.by("a1")?.saw_client_at(net.outside)?;
        expect_same("the client's port", &seen.peer, &seen.client_local)?;
        expect_same("the server's end", &seen.local, &(net.a1, 80).endpoint())?;

        let seen = lab.outside().udp((net.host, 8080)).bytes(FULL_DATAGRAM_BYTES / 2).exchange()?;
        seen.by("a1")?;
        expect_same("the client's port", &seen.peer, &seen.client_local)?;
        expect_same("the replier", &seen.reply_from, &(net.host, 8080).endpoint())?;

        // Published on every local address, the second one too, from any source.
        let seen =
            lab.outside().tcp((net.host_second, 8080)).from((net.guests[3], 0)).exchange()?;
        seen.by("a1")?.saw_client_at(net.guests[3])?;
        lab.outside().tcp((net.host, 8081)).refused()
    })
}

/// Fails unless the host's own clients reach port 8080 of `address`, and A1 behind it, as if the
/// port were there.
fn expect_host_reaches(lab: &Lab, address: IpAddr) -> Result<()> {
    let gateway = lab.net().gateway_a;
    let dialled = (address, 8080);
    let seen = lab.host().tcp(dialled).exchange()?;
    seen.by("a1")?.saw_client_at(gateway)?;
    expect_same("the peer of a TCP client", &seen.client_peer, &dialled.endpoint())?;
    for probe in [lab.host().udp(dialled), lab.host().udp(dialled).connected()] {
        let mut session = probe.open()?;
        for _ in 0..2 {
            let seen = session.exchange()?;
            seen.by("a1")?.saw_client_at(gateway)?;
            expect_same("the replier of a UDP client", &seen.reply_from, &dialled.endpoint())?;
        }
    }
    lab.host().tcp((address, 8081)).refused()
}

pub(crate) fn host_reaches_the_published_port(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let here = Net::publish_on(net.host, "8082:80");
        let _containers = containers_publishing(lab, &[&here])?;
        for address in [net.host, net.host_second, net.gateway_a, net.gateway_b] {
            expect_host_reaches(lab, address).with_context(|| format!("dial {address}"))?;
        }
        // One that is published on one address only is not there on the other.
        lab.host().tcp((net.host, 8082)).exchange()?.by("a1")?.saw_client_at(net.gateway_a)?;
        lab.host().tcp((net.host_second, 8082)).refused()?;
        lab.host().tcp((net.loopback, 8082)).refused()?;
        // A service elsewhere with the same port is nobody's to translate.
        let _outside = lab.outside().tcp_server("outside", (net.outside, 8080))?;
        lab.host().tcp((net.outside, 8080)).exchange()?.by("outside")?.saw_client_at(net.host)?;

        if !lab.has_netdp() {
            // What Docker has published stays so for as long as the container runs.
            return Ok(());
        }
        let mut session = lab.host().udp((net.host, 8080)).open()?;
        session.exchange()?.by("a1")?;
        lab.netdp(&["unpublish", "a1", "-p", "8080:80", "-p", "8080:80/udp"])?;
        ensure!(session.exchange().is_err(), "a client outlived the published port");
        lab.host().tcp((net.host, 8080)).refused()
    })
}

pub(crate) fn host_reaches_the_published_port_by_loopback(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let here = Net::publish_on(net.loopback, "8082:80");
        let _containers = neighbours_publishing(lab, &[&here])?;
        expect_host_reaches(lab, net.loopback)?;
        // One that is published on loopback only is there, and nowhere else.
        lab.host().tcp((net.loopback, 8082)).exchange()?.by("a1")?.saw_client_at(net.gateway_a)?;
        lab.host().tcp((net.host, 8082)).refused()?;
        lab.outside().tcp((net.host, 8082)).refused()?;
        // The agent does it all without a process for each port.
        let agent = lab.agent().ok().and_then(Agent::pid);
        let daemon = lab.docker().map(Docker::pid);
        for pid in [agent, daemon].into_iter().flatten() {
            expect_same("processes for its ports", &processes_for_ports(pid)?, &vec![])?;
        }
        // And is not needed for it, where packets from there can be sent on.
        if row.is_ebpf() {
            lab.agent()?.kill9()?;
            expect_host_reaches(lab, net.loopback)?;
            lab.agent()?.start()?;
        }
        Ok(())
    })
}

/// What Docker has whatever is published: a daemon, one for all containers, and one for each.
const WITHOUT_PORTS: [&str; 3] = ["dockerd", "containerd", "containerd-shim"];

/// The names of the processes below `pid` that may be there for published ports.
fn processes_for_ports(pid: u32) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("list processes")? {
        let entry = entry.context("list processes")?;
        // Other entries have no such file, and processes come and go.
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let (Some(name), Some(parent)) = (field("Name:\t"), field("PPid:\t")) else { continue };
        if parent != pid.to_string() {
            continue;
        }
        if name == "dockerd" {
            let child = entry.file_name().to_string_lossy().parse().context("read a pid")?;
            found.extend(processes_for_ports(child)?);
        }
        if !WITHOUT_PORTS.contains(&name) {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

pub(crate) fn neighbour_reaches_the_published_port(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        for host in [(net.host, 8080), (net.host_second, 8080), (net.gateway_a, 8080)] {
            let seen = containers.a2.tcp(host).exchange()?;
            seen.by("a1")?.saw_client_at(net.a2)?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
            let seen = containers.a2.udp(host).exchange()?;
            seen.by("a1")?.saw_client_at(net.a2)?;
            expect_same("the replier", &seen.reply_from, &host.endpoint())?;
        }
        Ok(())
    })
}

pub(crate) fn container_reaches_its_own_published_port(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let seen = containers.a1.tcp((net.host, 8080)).exchange()?;
        seen.by("a1")?.saw_client_at(net.gateway_a)?;
        let seen = containers.a1.udp((net.host, 8080)).exchange()?;
        seen.by("a1")?.saw_client_at(net.gateway_a)?;
        expect_same("the replier", &seen.reply_from, &(net.host, 8080).endpoint())
    })
}

pub(crate) fn other_network_reaches_the_published_port(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        for host in [(net.host, 8080), (net.gateway_b, 8080), (net.gateway_a, 8080)] {
            let seen = containers.b1.tcp(host).exchange()?;
            seen.by("a1")?.saw_client_at(net.b1)?;
            expect_same("the client's port", &seen.peer, &seen.client_local)?;
            let seen = containers.b1.udp(host).exchange()?;
            seen.by("a1")?.saw_client_at(net.b1)?;
            expect_same("the replier", &seen.reply_from, &host.endpoint())?;
        }
        Ok(())
    })
}

pub(crate) fn other_host_addresses_stay_the_hosts(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &[])?;
        let [tcp, udp] = ["8080:80", "8080:80/udp"].map(|ports| Net::publish_on(net.host, ports));
        let a1 = lab.attach("net-a", "a1", net.a1, &[&tcp, &udp])?;
        let server = a1.tcp_server("a1", (net.a1, 80))?;
        let _udp = a1.udp_server("a1", (net.a1, 80))?;
        lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?;

        lab.outside().tcp((net.host_second, 8080)).refused()?;
        lab.outside().udp((net.host_second, 8080)).refused()?;
        let _host_tcp = lab.host().tcp_server("host", (net.host_second, 8080))?;
        let _host_udp = lab.host().udp_server("host", (net.host_second, 8080))?;
        lab.outside()
            .tcp((net.host_second, 8080))
            .exchange()?
            .by("host")?
            .saw_client_at(net.outside)?;
        lab.outside()
            .udp((net.host_second, 8080))
            .exchange()?
            .by("host")?
            .saw_client_at(net.outside)?;
        lab.outside().udp((net.host, 8080)).exchange()?.by("a1")?;
        expect_same("clients of the container", &server.accepted().len(), &1)
    })
}

pub(crate) fn outside_port_of_the_same_number_is_reached(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let _tcp = lab.outside().tcp_server("outside", (net.outside, 8080))?;
        let _udp = lab.outside().udp_server("outside", (net.outside, 8080))?;
        for container in [&containers.a1, &containers.a2] {
            let seen = container.tcp((net.outside, 8080)).exchange()?;
            seen.by("outside")?.saw_client_at(net.host)?;
            let seen = container.udp((net.outside, 8080)).exchange()?;
            seen.by("outside")?.saw_client_at(net.host)?;
        }
        expect_same("clients of the container", &containers.a1_tcp.accepted(), &vec![])
    })
}

pub(crate) fn port_ranges_lead_each_to_its_own(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &[])?;
        let _taken = lab.host().tcp_server("host", (net.any, 8000))?;
        let a1 = lab.container("a1")?;
        let published = ["9000-9009:8000-8009", "8000-8010:80"];
        let endpoint = lab.connect("net-a", &a1, "a1", net.a1, &published)?;
        let ports = host_ports(&endpoint["published"], net)?;
        let (ranged, chosen): (Vec<_>, Vec<_>) =
            ports.into_iter().partition(|(_, container)| *container != 80);
        let expected: Vec<_> = (0..10).map(|offset| (9000 + offset, 8000 + offset)).collect();
        expect_same("ports of the range", &ranged, &expected)?;
        let [(free, 80)] = chosen[..] else {
            bail!("expect one port for container port 80: {endpoint}");
        };
        // 8000 is in use by the host, so it was not free.
        ensure!((8001..=8010).contains(&free), "choose a free port of 8000-8010: {free}");

        for (host, container) in ranged.into_iter().chain([(free, 80)]) {
            let _server = a1.tcp_server("a1", (net.a1, container))?;
            let seen = lab.outside().tcp((net.host, host)).exchange()?;
            seen.by("a1")?.saw_client_at(net.outside)?;
            expect_same("the container's port", &seen.local.port(), &container)?;
        }
        lab.outside().tcp((net.host, 8000)).exchange()?.by("host")?;
        lab.outside().tcp((net.host, 9010)).refused()
    })
}

/// Host and container port of each port that is published in the family.
fn host_ports(published: &Value, net: &Net) -> Result<Vec<(u16, u16)>> {
    let list = published.as_array().context("read a list of published ports")?;
    let number = |port: &Value, field: &str| {
        let number = port[field].as_u64().and_then(|number| u16::try_from(number).ok());
        number.with_context(|| format!("read {field} of {port}"))
    };
    let mut ports = Vec::new();
    for port in list {
        let address = port["host_ip"].as_str().context("read the address of a published port")?;
        if address.parse::<IpAddr>()?.is_ipv4() == net.is_ipv4() {
            ports.push((number(port, "host_port")?, number(port, "container_port")?));
        }
    }
    ports.sort_unstable();
    Ok(ports)
}

/// How long all ports of an address may take. A release takes less than a second; a build for
/// debugging ten times as long, and there are other tests.
const AT_ONCE: Duration = Duration::from_secs(20);

pub(crate) fn every_port_of_an_address_is_published_at_once(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &[])?;
        let a1 = lab.container("a1")?;
        let (host, outside) = (lab.host(), lab.outside());
        let address = net.host_second;
        let all = Net::publish_on(address, "1-65535:1-65535");
        // Those that the kernel chooses from, for programs that don't mind.
        let chosen_udp = Net::publish_on(address, "32768-49999:32768-49999/udp");
        // Docker publishes when a container starts, netdp whenever it is told.
        let is_dockers = lab.docker().is_some();
        if !is_dockers {
            lab.connect("net-a", &a1, "a1", net.a1, &[])?;
        }
        let publish = || -> Result<()> {
            let started = Instant::now();
            if is_dockers {
                lab.connect("net-a", &a1, "a1", net.a1, &[&all])?;
            } else {
                lab.netdp(&["publish", "a1", "-p", &all])?;
            }
            let took = started.elapsed();
            ensure!(took < patient(AT_ONCE), "it took {took:?}");
            Ok(())
        };

        // Those in use are named, and none is published.
        let servers = [22, 8000, 40_000].map(|port| host.tcp_server("host", (address, port)));
        let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
        let _elsewhere = host.tcp_server("host", (net.host, 443))?;
        let reason = match is_dockers {
            true => lab.connect_fails("net-a", &a1, "a1", net.a1, &[&all])?,
            false => lab.netdp_fails(&["publish", "a1", "-p", &all])?,
        };
        for port in [22, 8000, 40_000] {
            let port = (address, port).endpoint().to_string();
            ensure!(reason.contains(&port), "name {port}: {reason}");
        }
        ensure!(!reason.contains(":443 "), "443 is another address's: {reason}");
        let published = || -> Result<u64> {
            let status = lab.json(&["status"])?;
            status["published"].as_u64().context("read how many ports are published")
        };
        expect_same("published ports", &published()?, &0)?;
        outside.tcp((address, 22)).exchange()?.by("host")?;
        outside.tcp((address, 80)).refused()?;
        servers.into_iter().try_for_each(TcpServer::end_after_clients)?;

        publish()?;
        expect_same("published ports", &published()?, &65_535)?;
        let ports = [1, 22, 80, 40_000, 55_555, 65_535];
        let a1_servers = ports.map(|port| a1.tcp_server("a1", (net.a1, port)));
        let _a1_servers = a1_servers.into_iter().collect::<Result<Vec<_>>>()?;
        let expect_published = || -> Result<()> {
            for port in ports {
                let seen = outside.tcp((address, port)).bytes(10_000).exchange()?;
                seen.by("a1")?.saw_client_at(net.outside)?;
                expect_same("the container's port", &seen.local.port(), &port)?;
                // At once: a server of the lab would wait for the port.
                let bind = || Ok(TcpListener::bind((address, port)).map(drop)?);
                expect_in_use(host.run(bind))?;
            }
            Ok(())
        };
        expect_published()?;
        if is_dockers {
            // What follows is between netdp and the host.
            return Ok(());
        }
        // The host goes on to dial, from this address, too; containers by another one.
        let _tcp = outside.tcp_server("outside", (net.outside, 7))?;
        let _udp = outside.udp_server("outside", (net.outside, 7))?;
        lab.netdp(&["publish", "a1", "-p", &chosen_udp])?;
        let dials = host.tcp((net.outside, 7)).from((address, 0)).bytes(10_000);
        dials.exchange()?.saw_client_at(address)?;
        let asks = host.udp((net.outside, 7)).from((address, 0)).connected();
        asks.exchange()?.saw_client_at(address)?;
        a1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
        host.tcp_server("host", (net.host, 22)).map(drop)?;

        lab.agent()?.kill9()?;
        expect_published()?;
        lab.agent()?.start()?;
        expect_same("published ports", &published()?, &(65_535 + 17_232))?;
        expect_published()?;
        lab.netdp(&["unpublish", "a1", "-p", &all, "-p", &chosen_udp])?;
        expect_same("published ports", &published()?, &0)?;
        outside.tcp((address, 22)).refused()?;
        host.tcp_server("host", (net.any, 22)).map(drop)
    })
}

pub(crate) fn ports_in_use_are_refused_both_ways(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &[])?;
        let a1 = lab.container("a1")?;
        let tcp = lab.host().tcp_server("host", (net.any, 8080))?;
        let udp = lab.host().udp_server("host", (net.host_second, 8080))?;
        // As `ps` has it.
        let program = fs::read_to_string("/proc/self/comm").context("read this program's name")?;
        let pid = std::process::id().to_string();
        let on_host = Net::publish_on(net.host, "8080:80");
        let on_second = Net::publish_on(net.host_second, "8080:80/udp");
        for port in ["8080:80", &on_host, "8080:80/udp", &on_second] {
            let reason = lab.connect_fails("net-a", &a1, "a1", net.a1, &[port])?;
            ensure!(reason.contains("8080"), "name the port: {reason}");
            if !lab.has_netdp() {
                continue;
            }
            let named = reason.contains(&pid) || reason.contains(program.trim());
            ensure!(named, "name the process {pid} that has the port: {reason}");
            let network = lab.json(&["network", "inspect", "net-a"])?;
            expect_same("endpoints", &network[0]["endpoints"], &Value::Array(vec![]))?;
        }
        lab.outside().tcp((net.host, 8080)).exchange()?.by("host")?;
        tcp.end_after_clients()?;
        drop(udp);

        lab.connect("net-a", &a1, "a1", net.a1, &["8080:80", "8080:80/udp"])?;
        let _server = a1.tcp_server("a1", (net.a1, 80))?;
        for address in [(net.any, 8080), (net.host, 8080), (net.loopback, 8080)] {
            let tcp = || TcpListener::bind(address).map(drop).context("bind tcp");
            let udp = || UdpSocket::bind(address).map(drop).context("bind udp");
            expect_in_use(lab.host().run(tcp))?;
            expect_in_use(lab.host().run(udp))?;
        }
        lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?;
        if !lab.has_netdp() {
            // Nor can a second container have it.
            let refused = lab.attach("net-a", "a2", net.a2, &["8080:80"]);
            ensure!(refused.is_err(), "two containers publish one port");
            return Ok(());
        }
        // Where a program of the kernel refuses, the port stays taken without the agent.
        let status = lab.json(&["status"])?;
        let features = status["features"].as_array().context("read the kernel's features")?;
        let by_program = features.iter().find(|row| row["name"] == "bind-refusal");
        ensure!(by_program.is_some() == row.is_ebpf(), "look for bind-refusal in {features:?}");
        if by_program.is_some_and(|row| row["is_there"] == true) {
            lab.agent()?.kill9()?;
            let bind = || TcpListener::bind((net.any, 8080)).map(drop).context("bind");
            expect_in_use(lab.host().run(bind))?;
            lab.agent()?.start()?;
        }
        // Two containers can't publish the same port either.
        lab.attach("net-a", "a2", net.a2, &[])?;
        let reason = lab.netdp_fails(&["publish", "a2", "-p", "8080:80"])?;
        ensure!(reason.contains("8080") && reason.contains("a1"), "name port and owner: {reason}");

        lab.netdp(&["unpublish", "a1", "-p", "8080:80"])?;
        lab.host().tcp_server("host", (net.any, 8080)).map(drop)
    })
}

fn expect_in_use(bound: Result<()>) -> Result<()> {
    let error = bound.err().context("bind a published port on the host: it succeeded")?;
    let code = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
    expect_same("the error of a bind", &code, &Some(nix::errno::Errno::EADDRINUSE as i32))
}

pub(crate) fn udp_flow_never_reaches_a_successor(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let mut client = lab.outside().udp((net.host, 8080)).from((net.outside, 5000)).open()?;
        client.exchange()?.by("a1")?;
        client.exchange()?.by("a1")?;
        expect_same("datagrams", &containers.a1_udp.received().len(), &2)?;

        // A successor with the same host port at another address gets the flow anew.
        lab.disconnect("net-a", "a1")?;
        expect_no_flows_of(lab, net.a1)?;
        lab.outside().udp((net.host, 8080)).refused()?;
        let a3 = lab.attach("net-a", "a3", net.a3, &["8080:80/udp"])?;
        let a3_udp = a3.udp_server("a3", (net.a3, 80))?;
        client.exchange()?.by("a3")?.saw_client_at(net.outside)?;

        // One at the same address that does not publish the port gets nothing at all.
        lab.disconnect("net-a", "a3")?;
        let a4 = lab.attach("net-a", "a4", net.a3, &[])?;
        let a4_udp = a4.udp_server("a4", (net.a3, 80))?;
        client.send()?;
        lab.outside().udp((net.host, 8080)).refused()?;
        lab.host().udp((net.a3, 80)).exchange()?.by("a4")?;
        expect_same("datagrams of the successor", &a4_udp.received().len(), &1)?;
        expect_same("datagrams of the predecessor", &a3_udp.received().len(), &1)
    })
}

pub(crate) fn unpublish_ends_open_flows(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        // What Docker has published stays so for as long as the container runs.
        if lab.has_netdp() {
            let mut session = lab.outside().tcp((net.host, 8080)).open()?;
            session.exchange(100_000)?.by("a1")?;
            lab.netdp(&["unpublish", "a1", "-p", "8080:80"])?;
            // The host's own stack answers with a reset, as for any port that is closed.
            expect_cut(session.exchange(1000))?;
            lab.outside().tcp((net.host, 8080)).refused()?;
            expect_same("clients of the container", &containers.a1_tcp.accepted().len(), &1)?;
            lab.outside().udp((net.host, 8080)).exchange()?.by("a1")?;
            lab.netdp(&["publish", "a1", "-p", "8080:80"])?;
        }
        let mut session = lab.outside().tcp((net.host, 8080)).open()?;
        session.exchange(100_000)?.by("a1")?;
        lab.disconnect("net-a", "a1")?;
        expect_cut(session.exchange(1000))?;
        lab.outside().tcp((net.host, 8080)).refused()?;
        lab.outside().udp((net.host, 8080)).refused()?;
        poll_until(PATIENCE, "the end of the flows", || Ok(expect_no_flows_of(lab, net.a1).ok()))
    })
}

pub(crate) fn chosen_port_is_reported_and_stays(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &[])?;
        let a1 = lab.container("a1")?;
        let reported = lab.connect("net-a", &a1, "a1", net.a1, &["80"])?;
        let [(port, 80)] = host_ports(&reported["published"], net)?[..] else {
            bail!("expect one port for container port 80: {reported}");
        };
        let _server = a1.tcp_server("a1", (net.a1, 80))?;
        let dialled = (net.host, port);
        lab.outside().tcp(dialled).exchange()?.by("a1")?.saw_client_at(net.outside)?;
        if !lab.has_netdp() {
            // Its containers end with it, unless they are told to outlive it.
            return Ok(());
        }
        lab.agent()?.kill9()?;
        lab.agent()?.start()?;
        let inspected = lab.json(&["network", "inspect", "net-a"])?;
        let kept = inspected[0]["endpoints"][0]["published"][0]["host_port"].as_u64();
        expect_same("the port after a restart", &kept, &Some(port.into()))?;
        lab.outside().tcp(dialled).exchange()?.by("a1")?.saw_client_at(net.outside)?;
        Ok(())
    })
}

pub(crate) fn fragmented_datagrams_arrive_whole(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let sizes = [1473, 9000, 40_000];
        for bytes in sizes {
            let seen = lab.outside().udp((net.host, 8080)).bytes(bytes).exchange()?;
            seen.by("a1")?.saw_client_at(net.outside)?;
        }
        let _outside = lab.outside().udp_server("outside", (net.outside, 7))?;
        let seen = containers.a1.udp((net.outside, 7)).bytes(9000).exchange()?;
        seen.by("outside")?.saw_client_at(net.host)?;
        for bytes in sizes {
            let seen = containers.a2.udp((net.host, 8080)).bytes(bytes).exchange()?;
            seen.by("a1")?.saw_client_at(net.a2)?;
            let seen = containers.b1.udp((net.host, 8080)).bytes(bytes).exchange()?;
            seen.by("a1")?.saw_client_at(net.b1)?;
        }
        Ok(())
    })
}

pub(crate) fn loopback_publish_is_closed_to_the_outside(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &[])?;
        let on_loopback = Net::publish_on(net.loopback, "8080:80/udp");
        let a1 = lab.attach("net-a", "a1", net.a1, &[&on_loopback])?;
        let server = a1.udp_server("a1", (net.a1, 80))?;
        let outside = lab.outside();
        let knock = Envelope {
            source_mac: outside.mac("out0")?,
            destination_mac: lab.host().mac("up0")?,
            source: net.outside,
            destination: net.loopback,
            ttl: 64,
        };
        let knock = || outside.inject("out0", &knock.udp(9, 8080, b"knock"));
        if net.is_ipv4() || row.is_ebpf() {
            counted_soon(lab, "martian", knock)?;
        } else {
            // The kernel drops it before any rule of iptables.
            knock()?;
        }
        outside.udp((net.host, 8080)).refused()?;
        expect_same("datagrams of the container", &server.received(), &vec![])
    })
}

pub(crate) fn ports_follow_the_way_out(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        lab.create_network("net-a", net.subnet_a, &[])?;
        lab.create_network("net-b", net.subnet_b, &[])?;
        let ipv6 = if net.is_ipv4() { "--ipv6=false" } else { "--ipv6=true" };
        lab.create_network_of("closed", &[], &["--internal", ipv6])?;
        let c = lab.container("c1")?;
        // Docker publishes when a container starts, and leaves open where that leads to.
        let ports: [&[&str]; 3] = match lab.docker() {
            Some(_) => [&["8080:80", "8080:80/udp", "8081:81"], &[], &[]],
            None => [&[], &["8080:80", "8080:80/udp"], &["8081:81"]],
        };
        // A network without a way out is none, though it came first.
        lab.connect_at("closed", &c, "c1", &[], ports[0])?;
        lab.connect("net-a", &c, "c1", net.a1, ports[1])?;
        lab.connect("net-b", &c, "c1", net.b1, ports[2])?;
        let _tcp = [80, 81].map(|port| c.tcp_server("c1", (net.any, port)));
        let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
        let expect_at = |address: IpAddr, ports: &[(u16, u16)]| -> Result<()> {
            for &(host, container) in ports {
                let seen = lab.outside().tcp((net.host, host)).bytes(10_000).exchange()?;
                seen.by("c1")?.saw_client_at(net.outside)?;
                expect_same("the container's end", &seen.local, &(address, container).endpoint())?;
                let seen = lab.host().tcp((net.loopback, host)).bytes(10_000).exchange()?;
                expect_same("the container's end", &seen.local, &(address, container).endpoint())?;
            }
            c.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
            Ok(())
        };
        let both = [(8080, 80), (8081, 81)];
        expect_at(net.a1, &both)?;
        let mut session = lab.outside().tcp((net.host, 8080)).open()?;
        session.exchange(1000)?.by("c1")?;

        // The other network is the way out now, and the first one comes too late to be it again. To
        // Docker it is for its name, of which net-a is the first.
        lab.disconnect("net-a", "c1")?;
        ensure!(session.exchange(1000).is_err(), "a session outlived its endpoint");
        expect_at(net.b1, &both)?;
        lab.connect("net-a", &c, "c1", net.a1, &[])?;
        let way_out = if lab.docker().is_some() { net.a1 } else { net.b1 };
        expect_at(way_out, &both)?;
        lab.agent()?.kill9()?;
        lab.agent()?.start()?;
        expect_at(way_out, &both)?;
        lab.disconnect("net-b", "c1")?;
        expect_at(net.a1, &both)?;
        // What is unpublished, wherever it is now, is gone.
        lab.netdp(&["unpublish", "c1", "--network", "net-a", "-p", "8081:81"])?;
        lab.outside().tcp((net.host, 8081)).refused()?;
        expect_at(net.a1, &both[..1])?;
        lab.disconnect("net-a", "c1")?;
        lab.outside().tcp((net.host, 8080)).refused()?;
        lab.host().tcp_server("host", (net.any, 8080)).map(drop)
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
