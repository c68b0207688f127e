//! The rows of the behaviour catalogue through Docker, by the same bodies as in the suite conformance:
//! networks are netdp's, made by its driver, and containers are Docker's.
//!
//! What Docker has no words for is a line of `netdp_tests::through`, with the reason; the suite fails when
//! a line is missing, or no longer true. The host's netfilter is empty before, during and after each row
//! that eBPF keeps.

use std::process::ExitCode;

use anyhow::ensure;
use libtest_mimic::Trial;
use netdp_tests::backend::{Backend, Engine, Variant};
use netdp_tests::harness::{Row, row_trials, run_docker_trials};
use netdp_tests::lab::Offload;
use netdp_tests::net::{FAMILIES, Family};
use netdp_tests::through::{UNSAID, unkept};

#[expect(dead_code, reason = "the suite conformance has an entry and lists of its own")]
#[path = "../conformance/main.rs"]
mod conformance;

/// Rows that leave this process with much memory, of which each command that is run later would take a
/// copy of the tables: they come last.
const LARGE: [&str; 2] = ["OUT-11", "PUB-11"];

/// Rows that are asked of iptables as well: one of each kind, for Docker is told the same by both.
const OF_IPTABLES: [&str; 4] = ["PUB-01", "PUB-13", "OUT-01", "ISO-03"];

fn main() -> ExitCode {
    let backends = [Backend::Ebpf, Backend::Iptables(Variant::Nft)];
    let mut rows = Vec::new();
    for &family in FAMILIES {
        for backend in backends {
            let row = |&(id, run): &(&'static str, conformance::Check)| {
                let (engine, offload) = (Some(Engine::Docker), Offload::On);
                Row { id, backend, engine, unkept: unkept(id), family, offload, run }
            };
            rows.extend(conformance::CHECKS.iter().map(row).filter(is_asked));
        }
    }
    rows.sort_by_key(|row| LARGE.contains(&row.id));
    let mut trials = row_trials(rows);
    trials.push(Trial::test("list", || Ok(expect_list_names_rows()?)));
    run_docker_trials(trials)
}

/// Whether a row is asked: what Docker has a say in, in each family, all else in networks of both.
fn is_asked(row: &Row) -> bool {
    let is_of_both = row.family == Family::Ipv6;
    if !row.is_ebpf() {
        return is_of_both && OF_IPTABLES.contains(&row.id);
    }
    let is_dockers = ["PUB-", "OUT-", "ISO-"].iter().any(|group| row.id.starts_with(group));
    is_dockers || is_of_both
}

/// Fails unless the list names rows that there are, and none twice over.
fn expect_list_names_rows() -> anyhow::Result<()> {
    for unsaid in UNSAID {
        let id = unsaid.id;
        ensure!(conformance::CHECKS.iter().any(|(row, _)| *row == id), "{id} is no row");
        let same = UNSAID.iter().filter(|other| other.id == id);
        ensure!(same.count() == 1, "{id} is listed twice");
    }
    Ok(())
}
