//! LIF-01, first line: connections live through the agent's death and return. And what else
//! happens to an agent: meddling with its links and pins, a rival.

mod fallback;
mod scale;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use netdp_tests::backend::{Backend, Variant};
use netdp_tests::harness::run_tests;
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::net::{FAMILIES, Family};
use netdp_tests::packet::summarise;
use netdp_tests::probe::{PATIENCE, TcpServer, Traffic, UdpServer, UdpSession, expect_same};
use netdp_tests::runtime::{patient, poll_until};
use serde_json::Value;

/// How often the agent is killed.
const KILLS: usize = 10;
/// Longest time that an exchange may take while the agent comes and goes.
const LONGEST_STALL: Duration = Duration::from_secs(2);
/// Payload of one exchange of continuous traffic, each way.
const TRAFFIC_BYTES: usize = 64 << 10;

fn main() -> ExitCode {
    run_tests(&[
        ("open_connections_survive_ten_kills", || {
            in_each_family(|family| {
                survives(Backend::Ebpf, family, KILLS, |lab| lab.agent()?.kill9())
            })
        }),
        ("open_connections_survive_a_stop", || {
            in_each_family(|family| survives(Backend::Ebpf, family, 1, |lab| lab.agent()?.stop()))
        }),
        ("open_connections_survive_kills_with_iptables", || {
            let backend = Backend::Iptables(Variant::Nft);
            let end = |lab: &Lab| lab.agent()?.kill9();
            FAMILIES.iter().try_for_each(|&family| survives(backend, family, 3, end))
        }),
        ("without_ebpf_the_agent_takes_iptables", || {
            in_each_family(fallback::without_ebpf_the_agent_takes_iptables)
        }),
        (
            "many_ports_are_one_transaction_and_one_port_is_a_short_one",
            scale::many_ports_are_one_transaction_and_one_port_is_a_short_one,
        ),
        ("with_ebpf_the_agent_takes_it", || in_each_family(fallback::with_ebpf_the_agent_takes_it)),
        ("a_bridge_that_lost_its_alias_passes_nothing", || {
            in_each_family(bridge_without_alias_passes_nothing)
        }),
        ("a_second_agent_is_refused", || in_each_family(second_agent_is_refused)),
        ("a_removed_pin_is_put_back", || in_each_family(removed_pin_is_put_back)),
        ("links_of_others_are_left_alone", || in_each_family(links_of_others_are_left_alone)),
    ])
}

/// Runs a test in every family that netdp carries.
fn in_each_family(test: fn(Family) -> Result<()>) -> Result<()> {
    FAMILIES.iter().try_for_each(|&family| test(family).with_context(|| family.name()))
}

/// A lab in which everything runs that an agent's death might break.
struct Scene<'a> {
    lab: &'a Lab,
    a1: Namespace,
    a2: Namespace,
    b1: Namespace,
    a1_tcp: TcpServer,
    a1_udp: UdpServer,
    _outside_tcp: TcpServer,
    /// Host port that netdp chose for A2's port 80.
    chosen_port: u64,
}

impl<'a> Scene<'a> {
    fn set_up(lab: &'a Lab) -> Result<Self> {
        let net = lab.net();
        lab.create_network("net-a", net.subnet_a, &[])?;
        lab.create_network("net-b", net.subnet_b, &[])?;
        let a1 = lab.attach("net-a", "a1", net.a1, &["8080:80", "8080:80/udp"])?;
        let a2 = lab.attach("net-a", "a2", net.a2, &["80"])?;
        let b1 = lab.attach("net-b", "b1", net.b1, &[])?;
        lab.set_policy("net-a", &format!("deny from {}\n", net.guests[1]))?;
        Ok(Self {
            lab,
            a1_tcp: a1.tcp_server("a1", (net.a1, 80))?,
            a1_udp: a1.udp_server("a1", (net.a1, 80))?,
            a1,
            a2,
            b1,
            _outside_tcp: lab.outside().tcp_server("outside", (net.outside, 7))?,
            chosen_port: chosen_port(&inspect(lab)?)?,
        })
    }

    /// One connection of each kind, exchanging without pause.
    fn start_traffic(&self) -> Result<Vec<(&'static str, Traffic)>> {
        let net = self.lab.net();
        let connections = [
            ("out", self.a1.tcp((net.outside, 7))),
            ("published", self.lab.outside().tcp((net.host, 8080))),
            ("same bridge", self.a2.tcp((net.a1, 80))),
            ("hairpin", self.a2.tcp((net.host, 8080))),
            ("hairpin to itself", self.a1.tcp((net.host, 8080))),
            ("hairpin across networks", self.b1.tcp((net.host, 8080))),
        ];
        connections
            .into_iter()
            .map(|(kind, probe)| Ok((kind, probe.open()?.into_traffic(TRAFFIC_BYTES))))
            .collect()
    }

    /// New connections pass or are dropped as ever.
    fn expect_enforced(&self) -> Result<()> {
        let net = self.lab.net();
        let outside = self.lab.outside();
        let seen = outside.tcp((net.host, 8080)).bytes(TRAFFIC_BYTES).exchange()?;
        seen.by("a1")?.saw_client_at(net.outside)?;
        expect_same("the client's port", &seen.peer, &seen.client_local)?;
        let seen = self.a1.tcp((net.outside, 7)).bytes(TRAFFIC_BYTES).exchange()?;
        seen.by("outside")?.saw_client_at(net.host)?;

        let admitted = self.a1_tcp.accepted().len();
        let refused = [
            self.b1.tcp((net.a1, 80)),
            outside.tcp((net.a1, 80)),
            outside.tcp((net.host, 8080)).from((net.guests[1], 0)),
        ];
        thread::scope(|scope| {
            let attempts: Vec<_> =
                refused.iter().map(|probe| scope.spawn(|| probe.dropped())).collect();
            attempts
                .into_iter()
                .try_for_each(|attempt| attempt.join().map_err(|_| anyhow!("probe panicked"))?)
        })?;
        expect_same("clients of the container", &self.a1_tcp.accepted().len(), &admitted)
    }
}

/// Runs traffic through `rounds` deaths of the agent, brought about by `end`.
fn survives(
    backend: Backend,
    family: Family,
    rounds: usize,
    end: fn(&Lab) -> Result<()>,
) -> Result<()> {
    let lab = Lab::builder().backend(backend).family(family).build()?;
    let is_clean = || if backend.is_ebpf() { lab.expect_no_netfilter() } else { Ok(()) };
    let result = survive(&lab, rounds, end).and_then(|()| is_clean());
    lab.explain(result)
}

fn survive(lab: &Lab, rounds: usize, end: fn(&Lab) -> Result<()>) -> Result<()> {
    let net = lab.net();
    let scene = Scene::set_up(lab)?;
    let before = inspect(lab)?;
    let traffic = scene.start_traffic()?;
    let mut datagrams = lab.outside().udp((net.host, 8080)).from((net.outside, 5000)).open()?;
    expect_progress(&traffic)?;
    for round in 1..=rounds {
        live_through(&scene, &traffic, &mut datagrams, end)
            .with_context(|| format!("round {round}"))?;
        expect_same("networks and endpoints", &inspect(lab)?, &before)?;
        expect_same("the chosen port", &chosen_port(&inspect(lab)?)?, &scene.chosen_port)?;
    }
    expect_same("datagrams", &scene.a1_udp.received().len(), &(rounds * 2))?;
    for (kind, traffic) in traffic {
        let report = traffic.stop().with_context(|| format!("traffic of {kind}"))?;
        let stall = report.longest_stall;
        ensure!(stall < patient(LONGEST_STALL), "{kind} stalled for {stall:?}");
    }
    Ok(())
}

/// One death and return of the agent.
fn live_through(
    scene: &Scene,
    traffic: &[(&str, Traffic)],
    datagrams: &mut UdpSession,
    end: fn(&Lab) -> Result<()>,
) -> Result<()> {
    end(scene.lab)?;
    expect_progress(traffic)?;
    scene.expect_enforced().context("while the agent is dead")?;
    datagrams.exchange()?.by("a1")?;
    scene.lab.agent()?.start()?;
    expect_progress(traffic)?;
    scene.expect_enforced().context("after the agent's return")?;
    datagrams.exchange()?.by("a1")?;
    Ok(())
}

/// Fails unless every connection goes on.
fn expect_progress(traffic: &[(&str, Traffic)]) -> Result<()> {
    for (kind, traffic) in traffic {
        let before = traffic.exchanges();
        poll_until(PATIENCE, &format!("progress of {kind}"), || {
            if let Some(failure) = traffic.failure() {
                bail!("traffic of {kind} ended by itself: {failure}");
            }
            Ok((traffic.exchanges() > before + 1).then_some(()))
        })?;
    }
    Ok(())
}

fn inspect(lab: &Lab) -> Result<Value> {
    lab.json(&["network", "inspect", "net-a", "net-b"])
}

fn chosen_port(networks: &Value) -> Result<u64> {
    let endpoints = networks[0]["endpoints"].as_array().context("read the endpoints")?;
    let a2 = endpoints.iter().find(|one| one["name"] == "a2").context("find endpoint a2")?;
    a2["published"][0]["host_port"].as_u64().context("read the port that was chosen")
}

/// How long the agent may take to notice what no event tells it.
const NOTICED: Duration = Duration::from_secs(40);

/// A lab with container B1 of `net-b`.
fn lab_with_b1(family: Family) -> Result<(Lab, Namespace)> {
    let net = family.net();
    let lab = Lab::builder().family(family).build()?;
    lab.create_network("net-b", net.subnet_b, &[])?;
    let b1 = lab.attach("net-b", "b1", net.b1, &[])?;
    Ok((lab, b1))
}

fn bridge_without_alias_passes_nothing(family: Family) -> Result<()> {
    let net = family.net();
    let (lab, b1) = lab_with_b1(family)?;
    lab.explain((|| {
        let _server = lab.outside().tcp_server("outside", (net.outside, 7))?;
        let mut session = b1.tcp((net.outside, 7)).open()?;
        session.exchange(100_000)?.saw_client_at(net.host)?;
        lab.host().ip("link set nd-1 alias mine\n")?;
        // Not known to be ours: nothing of it may pass, translated or not.
        poll_until(PATIENCE, "the end of the flow", || {
            Ok(b1.tcp((net.outside, 7)).bytes(1000).exchange().is_err().then_some(()))
        })?;
        let leaks = lab.outside().sniff("out0", |frame| {
            summarise(frame).is_some_and(|packet| packet.ports.is_some_and(|(_, to)| to == 7))
        })?;
        b1.tcp((net.outside, 7)).dropped()?;
        expect_same("frames at E", &leaks.frames(), &vec![])?;
        lab.host().ip("link set nd-1 alias \"netdp network net-b\"\n")?;
        poll_until(NOTICED, "a connection", || Ok(b1.tcp((net.outside, 7)).exchange().ok()))?
            .saw_client_at(net.host)?;
        Ok(())
    })())
}

fn second_agent_is_refused(family: Family) -> Result<()> {
    let net = family.net();
    let (lab, b1) = lab_with_b1(family)?;
    lab.explain((|| {
        let agent = lab.agent()?;
        let program = agent.program().to_string_lossy().into_owned();
        let rival = |name: &str| lab.directory().join(name).to_string_lossy().into_owned();
        let (state, run) = (rival("rival-state"), rival("rival-run"));
        let bpffs = lab.bpffs().to_string_lossy().into_owned();
        let arguments =
            ["agent", "--state-dir", &state, "--run-dir", &run, "--bpffs", &bpffs, "--socket"];
        let socket = rival("rival.sock");
        let refused =
            lab.host().output(&program, &[&arguments[..], &[socket.as_str()]].concat())?;
        let stderr = String::from_utf8_lossy(&refused.stderr);
        expect_same("the rival's exit code", &refused.status.code(), &Some(1))?;
        ensure!(stderr.contains("another netdp agent"), "the rival said: {stderr}");
        let _server = lab.outside().tcp_server("outside", (net.outside, 7))?;
        b1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
        Ok(())
    })())
}

fn removed_pin_is_put_back(family: Family) -> Result<()> {
    let net = family.net();
    let (lab, b1) = lab_with_b1(family)?;
    lab.explain((|| {
        let links = lab.bpffs().join(format!("netdp/v{}/links", netdp_common::abi::ABI));
        // Notes are directories there; filters, where the kernel has no tcx, need no pin.
        let pins = || -> Result<BTreeSet<PathBuf>> {
            let paths = fs::read_dir(&links)?.map(|entry| Ok(entry?.path()));
            paths.filter(|path| path.as_ref().map_or(true, |path| !path.is_dir())).collect()
        };
        let before = pins()?;
        ensure!(!before.is_empty(), "no pins in {}", links.display());
        for pin in &before {
            fs::remove_file(pin)?;
        }
        poll_until(NOTICED, "the pins", || Ok((pins()? == before).then_some(())))?;
        let _server = lab.outside().tcp_server("outside", (net.outside, 7))?;
        b1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
        Ok(())
    })())
}

fn links_of_others_are_left_alone(family: Family) -> Result<()> {
    let net = family.net();
    let (lab, _b1) = lab_with_b1(family)?;
    lab.explain((|| {
        lab.host().ip("link add office0 type veth peer name office1\n\
             link set office0 alias \"netdp uplink to office\"\n\
             link add nd-77 type bridge\n")?;
        lab.agent()?.kill9()?;
        lab.agent()?.start()?;
        lab.create_network("net-a", net.subnet_a, &[])?;
        let links = lab.host().links()?;
        for link in ["office0", "office1", "nd-77"] {
            ensure!(links.iter().any(|name| name == link), "{link} is gone from {links:?}");
        }
        Ok(())
    })())
}
