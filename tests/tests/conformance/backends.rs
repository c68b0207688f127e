//! LIF: one backend takes the other's place, and others take its rules away.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netdp_tests::backend::{Backend, Variant};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::packet::Envelope;
use netdp_tests::probe::expect_same;
use netdp_tests::runtime::poll_until;

use crate::{Containers, standard_containers};

/// How long the agent may take to notice what no event tells it.
const NOTICED: Duration = Duration::from_secs(40);

/// Fails unless what is allowed passes, and nothing else.
fn expect_enforced(lab: &Lab, containers: &Containers) -> Result<()> {
    let net = lab.net();
    let allowed = lab.outside().tcp((net.host, 8080)).from((net.guests[0], 0));
    allowed.exchange()?.by("a1")?.saw_client_at(net.guests[0])?;
    containers.a1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
    let admitted = containers.a1_tcp.accepted().len();
    lab.outside().tcp((net.host, 8080)).from((net.guests[1], 0)).dropped()?;
    lab.outside().tcp((net.a1, 80)).dropped()?;
    containers.b1.tcp((net.a1, 80)).dropped()?;
    expect_same("clients of the container", &containers.a1_tcp.accepted().len(), &admitted)
}

/// Datagrams that no policy lets in, one after the other, by every way there is.
fn intrusions(lab: &Lab, b1: &Namespace) -> Result<[(Namespace, &'static str, Vec<u8>); 2]> {
    let net = lab.net();
    let outside = Envelope {
        source_mac: lab.outside().mac("out0")?,
        destination_mac: lab.host().mac("up0")?,
        source: net.outside,
        destination: net.a1,
        ttl: 64,
    };
    let neighbour = Envelope {
        source_mac: b1.mac("eth0")?,
        destination_mac: crate::bridge_mac(lab, "net-b")?,
        source: net.b1,
        ..outside
    };
    Ok([
        (lab.outside().clone(), "out0", outside.udp(5000, 80, b"intruder")),
        (b1.clone(), "eth0", neighbour.udp(5000, 80, b"intruder")),
    ])
}

/// Fails when the host still has something of a backend.
fn expect_nothing_left(lab: &Lab, backend: Backend) -> Result<()> {
    if backend != Backend::Ebpf {
        return lab.expect_no_netfilter();
    }
    let pins = lab.bpffs().join("netdp");
    let left = fs::read_dir(&pins).map(|entries| entries.count()).unwrap_or_default();
    expect_same("pins", &left, &0)?;
    let programs = lab.host().output("bpftool", &["net", "list"])?;
    let programs = String::from_utf8_lossy(&programs.stdout).into_owned();
    ensure!(!programs.contains("nd-1"), "programs are left: {programs}");
    Ok(())
}

pub(crate) fn backends_take_each_others_place(row: &Row) -> Result<Outcome> {
    let net = row.net();
    let other = if row.is_ebpf() { Backend::Iptables(Variant::Nft) } else { Backend::Ebpf };
    row.in_lab(
        |builder| builder,
        |lab| {
            let containers = standard_containers(lab)?;
            let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
            let policy = format!("allow from {}\ndeny from any\n", net.guests[0]);
            lab.set_policy("net-a", &policy)?;
            expect_enforced(lab, &containers)?;
            let received = containers.a1_udp.received().len();
            let [outside, neighbour] = intrusions(lab, &containers.b1)?;
            for backend in [other, row.backend] {
                lab.agent()?.stop()?;
                lab.agent()?.use_backend(backend);
                // All the while, somebody knocks.
                std::thread::scope(|scope| -> Result<()> {
                    let (over, is_over) = std::sync::mpsc::channel::<()>();
                    let knocks = scope.spawn(move || -> Result<u64> {
                        let mut rounds = 0;
                        while is_over
                            .recv_timeout(Duration::from_millis(5))
                            .is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout)
                        {
                            rounds += 1;
                            for (from, link, frame) in
                                [outside_of(&outside), outside_of(&neighbour)]
                            {
                                from.inject(link, frame)?;
                            }
                        }
                        Ok(rounds)
                    });
                    let started = lab.agent()?.start();
                    drop(over);
                    let rounds = knocks.join().ok().context("join the knocks")??;
                    ensure!(rounds > 10, "only {rounds} knocks");
                    started
                })?;
                let status = lab.json(&["status"])?;
                expect_same("the dataplane", &status["dataplane"], &backend.name().into())?;
                expect_enforced(lab, &containers)?;
                let gone = if backend == other { row.backend } else { other };
                expect_nothing_left(lab, gone)?;
                let check = lab.agent()?.request("GET", "/v1/check", b"")?;
                expect_same("drift", &check, &(200, "[]".to_owned()))?;
            }
            let now = containers.a1_udp.received().len();
            expect_same("datagrams of intruders", &now, &received)
        },
    )
}

fn outside_of<'a>(
    (from, link, frame): &'a (Namespace, &'static str, Vec<u8>),
) -> (&'a Namespace, &'static str, &'a [u8]) {
    (from, link, frame)
}

pub(crate) fn rules_that_others_wipe_come_back(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
        let policy = format!("allow from {}\ndeny from any\n", net.guests[0]);
        lab.set_policy("net-a", &policy)?;
        expect_enforced(lab, &containers)?;
        for wipe in wipes(row.backend) {
            for command in wipe {
                let (program, arguments) = command.split_first().context("read a command")?;
                let output = lab.host().output(program, arguments)?;
                let said = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "{command:?}: {said}");
            }
            if !row.is_ebpf() {
                let (_, drift) = lab.agent()?.request("GET", "/v1/check", b"")?;
                ensure!(drift.contains("tables chain"), "report the drift: {drift}");
            }
            poll_until(NOTICED, &format!("rules after {wipe:?}"), || {
                let check = lab.agent()?.request("GET", "/v1/check", b"")?;
                Ok((check == (200, "[]".to_owned())).then_some(()))
            })?;
            expect_enforced(lab, &containers)?;
        }
        Ok(())
    })
}

/// What others do to rules, for each kind of tables.
fn wipes(backend: Backend) -> Vec<Vec<Vec<&'static str>>> {
    let flush = |programs: [&'static str; 2]| -> Vec<Vec<&'static str>> {
        let tables = ["filter", "nat", "raw"];
        let each = |program| tables.map(|table| vec![program, "--table", table, "--flush"]);
        programs.into_iter().flat_map(each).collect()
    };
    let firewall = |programs: [&'static str; 2]| -> Vec<Vec<&'static str>> {
        // Somebody else comes first.
        programs
            .map(|program| vec![program, "--insert", "FORWARD", "-i", "none0", "-j", "DROP"])
            .into()
    };
    match backend {
        Backend::Iptables(Variant::Legacy) => {
            let programs = ["iptables-legacy", "ip6tables-legacy"];
            vec![flush(programs), firewall(programs)]
        }
        Backend::Iptables(Variant::Nft) => {
            let programs = ["iptables-nft", "ip6tables-nft"];
            vec![flush(programs), firewall(programs), vec![vec!["nft", "flush", "ruleset"]]]
        }
        Backend::Ebpf => vec![vec![vec!["nft", "flush", "ruleset"]]],
    }
}
