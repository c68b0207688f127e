//! The laboratory itself, without netdp: probes tell the truth about plain routing.

#![expect(clippy::unwrap_used, reason = "a panic is a failure of the test")]

use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use netdp_tests::harness::run_tests;
use netdp_tests::lab::{Lab, Offload, SUBNET_A, SecondInterface};
use netdp_tests::namespace::Namespace;
use netdp_tests::packet::{Envelope, summarise, verify_checksums};
use netdp_tests::probe::{Answer, Failure, PATIENCE, expect_failure, expect_same};
use netdp_tests::runtime::poll_until;

fn main() -> ExitCode {
    run_tests(&[
        ("tcp_probe_reports_both_ends", tcp_probe_reports_both_ends),
        ("udp_probe_reports_both_ends", udp_probe_reports_both_ends),
        ("ping_tells_replies_from_errors", ping_tells_replies_from_errors),
        ("refusal_silence_and_missing_routes_differ", refusal_silence_and_missing_routes_differ),
        ("traffic_notices_a_cut", traffic_notices_a_cut),
        (
            "sniffed_frames_are_complete_without_offload",
            sniffed_frames_are_complete_without_offload,
        ),
        ("injected_frames_arrive", injected_frames_arrive),
        (
            "wrong_checksums_are_noticed_without_offload",
            wrong_checksums_are_noticed_without_offload,
        ),
        ("second_outside_host_is_reached_over_its_own_link", second_outside_host),
        ("nothing_is_left_behind", nothing_is_left_behind),
    ])
}

/// A lab whose host forwards between the outside and one routed container at 172.20.0.2.
fn routed_lab(offload: Offload) -> Result<(Lab, Namespace)> {
    let lab = Lab::builder().without_agent().offload(offload).build()?;
    lab.host().set_sysctl("net.ipv4.ip_forward", "1")?;
    let container = lab.container("a1")?;
    lab.host().ip(&format!(
        "link add to-a1 type veth peer name eth0 netns {}\n\
         link set to-a1 up\n\
         address add 172.20.0.1/24 dev to-a1\n",
        container.name()
    ))?;
    container.ip("link set eth0 up\n\
         address add 172.20.0.2/24 dev eth0\n\
         route add default via 172.20.0.1\n")?;
    if offload == Offload::Off {
        lab.host().disable_offload()?;
        container.disable_offload()?;
    }
    Ok((lab, container))
}

fn tcp_probe_reports_both_ends() -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = container.tcp_server("a1", "172.20.0.2:80")?;
    let seen = lab.outside().tcp("172.20.0.2:80").from("192.0.2.4:5555").exchange()?;
    seen.by("a1")?.saw_client_at("192.0.2.4")?;
    expect_same("the client's end", &seen.client_local, &"192.0.2.4:5555".parse().unwrap())?;
    expect_same("the server's peer", &seen.peer, &seen.client_local)?;
    expect_same("the server's end", &seen.local, &seen.client_peer)?;
    expect_same("accepted clients", &server.accepted(), &vec![seen.client_local])
}

fn udp_probe_reports_both_ends() -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = lab.outside().udp_server("outside", "10.0.0.3:53")?;
    for bytes in [1, 1400, 9000, 40_000] {
        let seen = container.udp("10.0.0.3:53").bytes(bytes).exchange()?;
        seen.by("outside")?.saw_client_at("172.20.0.2")?;
        expect_same("the server's peer", &seen.peer, &seen.client_local)?;
        expect_same("the replier", &seen.reply_from, &"10.0.0.3:53".parse().unwrap())?;
    }
    expect_same("datagrams", &server.received().len(), &4)
}

fn ping_tells_replies_from_errors() -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    container.ping("10.0.0.3").replied()?;
    let Answer::Error(error) = container.ping("10.0.0.3").ttl(1).send()? else {
        anyhow::bail!("expect an error for TTL 1");
    };
    expect_same("time exceeded", &(error.kind, error.code), &(11, 0))?;
    expect_same("its source", &error.source, &"172.20.0.1".parse().unwrap())?;

    lab.host().ip("link set up0 mtu 1400\n")?;
    lab.outside().ip("link set out0 mtu 1400\n")?;
    let large = container.ping("10.0.0.3").packet_bytes(1450);
    let Answer::Error(error) = large.clone().dont_fragment().send()? else {
        anyhow::bail!("expect an error for DF");
    };
    expect_same("fragmentation needed", &(error.kind, error.code), &(3, 4))?;
    expect_same("the next hop's MTU", &error.next_hop_mtu, &Some(1400))?;
    expect_same("the quoted destination", &error.quoted_destination, &"10.0.0.3".parse().unwrap())?;
    large.replied()
}

fn refusal_silence_and_missing_routes_differ() -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    container.tcp("10.0.0.3:81").refused()?;
    container.udp("10.0.0.3:81").refused()?;
    let no_route = lab.outside().tcp("198.51.100.1:80").exchange();
    expect_failure(no_route, &Failure::Unreachable, "tcp without a route")?;
    lab.outside().ip("route add 198.51.100.0/24 via 10.0.0.2\n")?;
    lab.host().ip("route add 198.51.100.0/24 dev to-a1\n")?;
    container.ip("address add 198.51.100.1/32 dev lo\n")?;
    container.tcp_server("a1", "198.51.100.1:80").map(drop)?;
    // Without a way back there is silence.
    container.ip("route replace default dev lo\n")?;
    lab.outside().tcp("198.51.100.1:80").dropped()?;
    lab.outside().udp("198.51.100.1:80").dropped()?;
    lab.outside().ping("198.51.100.1").dropped()
}

fn traffic_notices_a_cut() -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = container.tcp_server("a1", "172.20.0.2:80")?;
    let traffic = lab.outside().tcp("172.20.0.2:80").open()?.into_traffic(1000);
    poll_until(PATIENCE, "some exchanges", || Ok((traffic.exchanges() > 10).then_some(())))?;
    drop(server);
    poll_until(PATIENCE, "the end of traffic", || Ok(traffic.failure()))?;
    let error = traffic.stop().unwrap_err();
    let failure = error.downcast_ref::<Failure>();
    ensure!(matches!(failure, Some(Failure::Closed | Failure::Reset)), "a cut is {error:?}");
    Ok(())
}

fn sniffed_frames_are_complete_without_offload() -> Result<()> {
    let (lab, container) = routed_lab(Offload::Off)?;
    let sniffer = lab.outside().sniff("out0", |frame| summarise(frame).is_some())?;
    let _server = lab.outside().tcp_server("outside", "10.0.0.3:80")?;
    let _echo = lab.outside().udp_server("outside", "10.0.0.3:80")?;
    container.tcp("10.0.0.3:80").bytes(200_000).exchange()?;
    container.udp("10.0.0.3:80").exchange()?;
    container.ping("10.0.0.3").replied()?;
    sniffer.wait_for(PATIENCE, "an echo reply", |frame| {
        summarise(frame).is_some_and(|packet| packet.protocol == 1)
    })?;
    for frame in sniffer.frames() {
        ensure!(frame.len() <= 1514, "a frame of {} bytes", frame.len());
        verify_checksums(&frame)?;
    }
    Ok(())
}

/// A datagram from the outside to 172.20.0.2:80, by way of the host.
fn envelope(lab: &Lab) -> Result<Envelope> {
    Ok(Envelope {
        source_mac: lab.outside().mac("out0")?,
        destination_mac: lab.host().mac("up0")?,
        source: Ipv4Addr::new(10, 0, 0, 3),
        destination: Ipv4Addr::new(172, 20, 0, 2),
        ttl: 64,
    })
}

fn injected_frames_arrive() -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = container.udp_server("a1", "172.20.0.2:80")?;
    lab.outside().inject("out0", &envelope(&lab)?.udp(7000, 80, b"by hand"))?;
    let arrived = poll_until(PATIENCE, "the datagram", || Ok(server.received().first().copied()))?;
    expect_same("its source", &arrived.peer, &"10.0.0.3:7000".parse().unwrap())
}

fn wrong_checksums_are_noticed_without_offload() -> Result<()> {
    let (lab, container) = routed_lab(Offload::Off)?;
    let server = container.udp_server("a1", "172.20.0.2:80")?;
    let mut wrong = envelope(&lab)?.udp(7000, 80, b"wrong");
    let last = wrong.len() - 1;
    wrong[last] ^= 1;
    ensure!(verify_checksums(&wrong).is_err(), "the oracle missed a wrong checksum");
    lab.outside().inject("out0", &wrong)?;
    lab.outside().inject("out0", &envelope(&lab)?.udp(7001, 80, b"right"))?;
    // The right one came later: had the wrong one passed, it would be first.
    let first = poll_until(PATIENCE, "a datagram", || Ok(server.received().first().copied()))?;
    expect_same("the first datagram's port", &first.peer.port(), &7001)
}

fn second_outside_host() -> Result<()> {
    let lab = Lab::builder().without_agent().second(SecondInterface::Unlisted).build()?;
    let _server = lab.second()?.tcp_server("second", "10.1.0.3:80")?;
    lab.host().tcp("10.1.0.3:80").exchange()?.by("second")?.saw_client_at("10.1.0.2")?;
    Ok(())
}

fn nothing_is_left_behind() -> Result<()> {
    let lab = Lab::builder().without_agent().build()?;
    let directory = lab.directory().to_owned();
    let paths: Vec<_> = lab.namespaces().iter().map(Namespace::path).collect();
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo");
    ensure!(paths.iter().all(|path| path.exists()), "expect {paths:?}");
    ensure!(mounts()?.contains(directory.to_str().unwrap()), "expect a bpffs");
    let routes = lab.outside().ip_json(&["route", "show", SUBNET_A])?;
    expect_same("the way to the host", &routes[0]["gateway"].as_str(), &Some("10.0.0.2"))?;
    lab.expect_no_netfilter()?;
    drop(lab);
    ensure!(!paths.iter().any(|path| path.exists()), "leave {paths:?}");
    ensure!(!directory.exists(), "leave {}", directory.display());
    ensure!(!mounts()?.contains(directory.to_str().unwrap()), "leave a bpffs mounted");
    let error = poll_until(Duration::ZERO, "nothing", || Ok(None::<()>)).unwrap_err();
    ensure!(error.to_string().contains("nothing"), "name what was awaited: {error}");
    Ok(())
}
