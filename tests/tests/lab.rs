//! The laboratory itself, without netdp: probes tell the truth about plain routing.

#![expect(clippy::unwrap_used, reason = "a panic is a failure of the test")]

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use etherparse::ip_number;
use netdp_tests::harness::run_tests;
use netdp_tests::lab::{Lab, Offload, SecondInterface};
use netdp_tests::namespace::Namespace;
use netdp_tests::net::{IPV4, IPV6, Net};
use netdp_tests::packet::{ETHERNET_BYTES, Envelope, summarise, verify_checksums};
use netdp_tests::probe::{Answer, Endpoint, Failure, PATIENCE, expect_failure, expect_same};
use netdp_tests::runtime::poll_until;

fn main() -> ExitCode {
    run_tests(&[
        ("tcp_probe_reports_both_ends", || both(tcp_probe_reports_both_ends)),
        ("udp_probe_reports_both_ends", || both(udp_probe_reports_both_ends)),
        ("ping_tells_replies_from_errors", || both(ping_tells_replies_from_errors)),
        ("refusal_silence_and_missing_routes_differ", || {
            both(refusal_silence_and_missing_routes_differ)
        }),
        ("traffic_notices_a_cut", || both(traffic_notices_a_cut)),
        ("sniffed_frames_are_complete_without_offload", || {
            both(sniffed_frames_are_complete_without_offload)
        }),
        ("injected_frames_arrive", || both(injected_frames_arrive)),
        ("fragments_are_put_together", || both(fragments_are_put_together)),
        ("wrong_checksums_are_noticed_without_offload", || {
            both(wrong_checksums_are_noticed_without_offload)
        }),
        ("second_outside_host_is_reached_over_its_own_link", || both(second_outside_host)),
        ("nothing_is_left_behind", nothing_is_left_behind),
    ])
}

/// Runs a test in each family.
fn both(test: fn(&Net) -> Result<()>) -> Result<()> {
    for net in [&IPV4, &IPV6] {
        test(net).with_context(|| net.family.name())?;
    }
    Ok(())
}

/// A lab whose host forwards between the outside and one routed container, A1.
fn routed_lab(offload: Offload) -> Result<(Lab, Namespace)> {
    let lab = Lab::builder().without_agent().offload(offload).build()?;
    for family in ["ipv4", "ipv6"] {
        lab.host().set_sysctl(&format!("net.{family}.conf.all.forwarding"), "1")?;
    }
    let container = lab.container("a1")?;
    lab.host().ip(&format!(
        "link add to-a1 type veth peer name eth0 netns {}\nlink set to-a1 up\n",
        container.name()
    ))?;
    container.ip("link set eth0 up\n")?;
    for net in [&IPV4, &IPV6] {
        let [gateway, own] = [net.gateway_a, net.a1].map(|address| net.with_prefix(address));
        // An address that the kernel still looks for duplicates of can't be used.
        let at_once = if net.a1.is_ipv6() { "nodad" } else { "" };
        lab.host().ip(&format!("address add {gateway} dev to-a1 {at_once}\n"))?;
        container.ip(&format!(
            "address add {own} dev eth0 {at_once}\nroute add default via {}\n",
            net.gateway_a
        ))?;
    }
    if offload == Offload::Off {
        lab.host().disable_offload()?;
        container.disable_offload()?;
    }
    Ok((lab, container))
}

fn tcp_probe_reports_both_ends(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = container.tcp_server("a1", (net.a1, 80))?;
    let seen = lab.outside().tcp((net.a1, 80)).from((net.guests[3], 5555)).exchange()?;
    seen.by("a1")?.saw_client_at(net.guests[3])?;
    expect_same("the client's end", &seen.client_local, &(net.guests[3], 5555).endpoint())?;
    expect_same("the server's peer", &seen.peer, &seen.client_local)?;
    expect_same("the server's end", &seen.local, &seen.client_peer)?;
    expect_same("accepted clients", &server.accepted(), &vec![seen.client_local])
}

fn udp_probe_reports_both_ends(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = lab.outside().udp_server("outside", (net.outside, 53))?;
    for bytes in [1, 1400, 9000, 40_000] {
        let seen = container.udp((net.outside, 53)).bytes(bytes).exchange()?;
        seen.by("outside")?.saw_client_at(net.a1)?;
        expect_same("the server's peer", &seen.peer, &seen.client_local)?;
        expect_same("the replier", &seen.reply_from, &(net.outside, 53).endpoint())?;
    }
    expect_same("datagrams", &server.received().len(), &4)
}

fn ping_tells_replies_from_errors(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    container.ping(net.outside).replied()?;
    let Answer::Error(error) = container.ping(net.outside).ttl(1).send()? else {
        anyhow::bail!("expect an error for TTL 1");
    };
    expect_same("time exceeded", &(error.kind, error.code), &net.time_exceeded)?;
    expect_same("its source", &error.source, &net.gateway_a)?;

    lab.host().ip("link set up0 mtu 1400\n")?;
    lab.outside().ip("link set out0 mtu 1400\n")?;
    let large = container.ping(net.outside).packet_bytes(1450);
    let Answer::Error(error) = large.clone().dont_fragment().send()? else {
        anyhow::bail!("expect an error for DF");
    };
    expect_same("packet too big", &(error.kind, error.code), &net.too_big)?;
    expect_same("the next hop's MTU", &error.next_hop_mtu, &Some(1400))?;
    expect_same("the quoted destination", &error.quoted_destination, &net.outside)?;
    large.replied()
}

fn refusal_silence_and_missing_routes_differ(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    container.tcp((net.outside, 81)).refused()?;
    container.udp((net.outside, 81)).refused()?;
    let no_route = lab.outside().tcp((net.elsewhere, 80)).exchange();
    expect_failure(no_route, &Failure::Unreachable, "tcp without a route")?;
    let elsewhere = net.elsewhere;
    lab.outside().ip(&format!("route add {elsewhere} via {}\n", net.host))?;
    lab.host().ip(&format!("route add {elsewhere} via {}\n", net.a1))?;
    container.ip(&format!("address add {elsewhere} dev lo\n"))?;
    container.tcp_server("a1", (elsewhere, 80)).map(drop)?;
    // Without a way back there is silence.
    container.ip(&format!("route add {} dev lo\n", net.outside))?;
    lab.outside().tcp((elsewhere, 80)).dropped()?;
    lab.outside().udp((elsewhere, 80)).dropped()?;
    lab.outside().ping(elsewhere).dropped()
}

fn traffic_notices_a_cut(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = container.tcp_server("a1", (net.a1, 80))?;
    let traffic = lab.outside().tcp((net.a1, 80)).open()?.into_traffic(1000);
    poll_until(PATIENCE, "some exchanges", || Ok((traffic.exchanges() > 10).then_some(())))?;
    drop(server);
    poll_until(PATIENCE, "the end of traffic", || Ok(traffic.failure()))?;
    let error = traffic.stop().unwrap_err();
    let failure = error.downcast_ref::<Failure>();
    ensure!(matches!(failure, Some(Failure::Closed | Failure::Reset)), "a cut is {error:?}");
    Ok(())
}

fn sniffed_frames_are_complete_without_offload(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::Off)?;
    // Both ways, and without what the kernel says by itself: reports of multicast groups have a
    // router alert option, which the oracle need not know.
    let sniffer = lab.outside().sniff("out0", |frame| {
        summarise(frame).is_some_and(|packet| !packet.destination.is_multicast())
    })?;
    let _server = lab.outside().tcp_server("outside", (net.outside, 80))?;
    let _echo = lab.outside().udp_server("outside", (net.outside, 80))?;
    container.tcp((net.outside, 80)).bytes(200_000).exchange()?;
    container.udp((net.outside, 80)).exchange()?;
    container.ping(net.outside).replied()?;
    sniffer.wait_for(PATIENCE, "an echo reply", |frame| {
        summarise(frame).is_some_and(|packet| matches!(packet.icmp, Some((0 | 129, 0))))
    })?;
    for frame in sniffer.frames() {
        ensure!(frame.len() <= 1514, "a frame of {} bytes", frame.len());
        verify_checksums(&frame)?;
    }
    Ok(())
}

/// From the outside to A1, by way of the host.
fn envelope(lab: &Lab, net: &Net) -> Result<Envelope> {
    Ok(Envelope {
        source_mac: lab.outside().mac("out0")?,
        destination_mac: lab.host().mac("up0")?,
        source: net.outside,
        destination: net.a1,
        ttl: 64,
    })
}

fn injected_frames_arrive(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = container.udp_server("a1", (net.a1, 80))?;
    lab.outside().inject("out0", &envelope(&lab, net)?.udp(7000, 80, b"by hand"))?;
    let arrived = poll_until(PATIENCE, "the datagram", || Ok(server.received().first().copied()))?;
    expect_same("its source", &arrived.peer, &(net.outside, 7000).endpoint())
}

fn fragments_are_put_together(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::On)?;
    let server = container.udp_server("a1", (net.a1, 80))?;
    let envelope = envelope(&lab, net)?;
    let whole = envelope.udp(7000, 80, &[7; 1000]);
    let datagram = &whole[ETHERNET_BYTES + net.header_bytes..];
    for (offset, more, part) in [(0, true, &datagram[..504]), (504, false, &datagram[504..])] {
        let fragment = envelope.fragment(ip_number::UDP, 77, offset, more, part)?;
        lab.outside().inject("out0", &fragment)?;
    }
    let arrived = poll_until(PATIENCE, "the datagram", || Ok(server.received().first().copied()))?;
    expect_same("its size", &arrived.bytes, &1000)
}

fn wrong_checksums_are_noticed_without_offload(net: &Net) -> Result<()> {
    let (lab, container) = routed_lab(Offload::Off)?;
    let server = container.udp_server("a1", (net.a1, 80))?;
    let mut wrong = envelope(&lab, net)?.udp(7000, 80, b"wrong");
    let last = wrong.len() - 1;
    wrong[last] ^= 1;
    ensure!(verify_checksums(&wrong).is_err(), "the oracle missed a wrong checksum");
    lab.outside().inject("out0", &wrong)?;
    lab.outside().inject("out0", &envelope(&lab, net)?.udp(7001, 80, b"right"))?;
    // The right one came later: had the wrong one passed, it would be first.
    let first = poll_until(PATIENCE, "a datagram", || Ok(server.received().first().copied()))?;
    expect_same("the first datagram's port", &first.peer.port(), &7001)
}

fn second_outside_host(net: &Net) -> Result<()> {
    let lab = Lab::builder().without_agent().second(SecondInterface::Unlisted).build()?;
    let _server = lab.second()?.tcp_server("second", (net.second, 80))?;
    lab.host().tcp((net.second, 80)).exchange()?.by("second")?.saw_client_at(net.host_up1)?;
    Ok(())
}

fn nothing_is_left_behind() -> Result<()> {
    let lab = Lab::builder().without_agent().build()?;
    let directory = lab.directory().to_owned();
    let paths: Vec<_> = lab.namespaces().iter().map(Namespace::path).collect();
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo");
    ensure!(paths.iter().all(|path| path.exists()), "expect {paths:?}");
    ensure!(mounts()?.contains(directory.to_str().unwrap()), "expect a bpffs");
    for net in [&IPV4, &IPV6] {
        let routes = lab.outside().ip_json(&["route", "get", &net.a1.to_string()])?;
        let host = net.host.to_string();
        expect_same("the way to the host", &routes[0]["gateway"].as_str(), &Some(host.as_str()))?;
    }
    lab.expect_no_netfilter()?;
    drop(lab);
    ensure!(!paths.iter().any(|path| path.exists()), "leave {paths:?}");
    ensure!(!directory.exists(), "leave {}", directory.display());
    ensure!(!mounts()?.contains(directory.to_str().unwrap()), "leave a bpffs mounted");
    let error = poll_until(Duration::ZERO, "nothing", || Ok(None::<()>)).unwrap_err();
    ensure!(error.to_string().contains("nothing"), "name what was awaited: {error}");
    Ok(())
}
