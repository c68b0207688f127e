//! LIF: one backend takes the other's place, and others take its rules away.

use std::fs;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netdp_tests::backend::{Backend, Variant};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::packet::Envelope;
use netdp_tests::probe::expect_same;
use netdp_tests::runtime::poll_until;

use super::{Containers, bridge_mac, standard_containers};

/// How long the agent may take to notice what no event tells it.
const NOTICED: Duration = Duration::from_secs(40);

/// How often one knocks in a row.
const KNOCKS: usize = 100;

/// Between two rows of knocks.
const PAUSE: Duration = Duration::from_millis(5);

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

/// A frame that nobody should be handed, who sends it, and on which link.
type Knock = (Namespace, &'static str, Vec<u8>);

/// What no policy lets in, by every way there is.
fn knocks(lab: &Lab, b1: &Namespace) -> Result<[Knock; 2]> {
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
        destination_mac: bridge_mac(lab, "net-b")?,
        source: net.b1,
        ..outside
    };
    Ok([
        (lab.outside().clone(), "out0", outside.udp(5000, 80, b"knock")),
        (b1.clone(), "eth0", neighbour.udp(5000, 80, b"knock")),
    ])
}

/// Fails when the host still has something of a backend.
fn expect_nothing_left(lab: &Lab, backend: Backend) -> Result<()> {
    if !backend.is_ebpf() {
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

/// Knocks without a pause for as long as `work` takes.
fn while_knocking(knocks: &[Knock], work: impl FnOnce() -> Result<()>) -> Result<()> {
    thread::scope(|scope| {
        let (working, is_over) = mpsc::channel::<()>();
        let rounds = scope.spawn(move || -> Result<u64> {
            let mut rounds = 0;
            while is_over.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
                for (from, link, frame) in knocks {
                    from.flood(link, vec![frame.clone(); KNOCKS])?;
                }
                rounds += 1;
            }
            Ok(rounds)
        });
        let done = work();
        drop(working);
        let rounds = rounds.join().ok().context("join whoever knocks")??;
        ensure!(rounds > 0, "nobody knocked");
        done
    })
}

pub(crate) fn backends_take_each_others_place(row: &Row) -> Result<Outcome> {
    let net = row.net();
    let other = if row.is_ebpf() { Backend::Iptables(Variant::Nft) } else { Backend::Ebpf };
    if let Some(program) = other.missing_program() {
        return Ok(Outcome::Skip(format!("{program} is not installed here")));
    }
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
        let policy = format!("allow from {}\ndeny from any\n", net.guests[0]);
        lab.set_policy("net-a", &policy)?;
        expect_enforced(lab, &containers)?;
        let received = containers.a1_udp.received().len();
        let knocks = knocks(lab, &containers.b1)?;
        for (backend, gone) in [(other, row.backend), (row.backend, other)] {
            let agent = lab.agent()?;
            agent.stop()?;
            agent.use_backend(backend);
            while_knocking(&knocks, || agent.start())?;
            let status = lab.json(&["status"])?;
            expect_same("the dataplane", &status["dataplane"], &backend.name().into())?;
            expect_enforced(lab, &containers)?;
            expect_nothing_left(lab, gone)?;
            expect_same("drift", &drift(lab)?, &NO_DRIFT.to_owned())?;
        }
        let now = containers.a1_udp.received().len();
        expect_same("datagrams of whoever knocked", &now, &received)
    })
}

/// What the agent says when nothing differs.
const NO_DRIFT: &str = "[]";

/// What differs, as the agent sees it.
fn drift(lab: &Lab) -> Result<String> {
    let (status, answer) = lab.agent()?.request("GET", "/v1/check", b"")?;
    expect_same("the status code", &status, &200)?;
    // The body follows the head.
    Ok(answer.rsplit("\r\n").next().unwrap_or_default().to_owned())
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
            for command in &wipe {
                let (program, arguments) = command.split_first().context("read a command")?;
                let output = lab.host().output(program, arguments)?;
                let said = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "{command:?}: {said}");
            }
            if !row.is_ebpf() {
                let drift = drift(lab)?;
                ensure!(drift.contains("tables chain"), "report the drift: {drift}");
            }
            poll_until(NOTICED, &format!("rules after {wipe:?}"), || {
                Ok((drift(lab)? == NO_DRIFT).then_some(()))
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
        Backend::Ebpf | Backend::EbpfByStack | Backend::Docker(_) => {
            vec![vec![vec!["nft", "flush", "ruleset"]]]
        }
    }
}
