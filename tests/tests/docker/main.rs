//! Docker itself as the outside oracle: the rows of the behaviour catalogue, by the same bodies as in the
//! suite conformance, with Docker's daemon on the host in the agent's place.
//!
//! What Docker does otherwise is a line of `netdp_tests::beside`, with our reason; the suite fails when a
//! line is missing, or no longer true. It closes with the comparison.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use libtest_mimic::{Completion, Failed, Trial};
use netdp_tests::backend::{Backend, Firewall};
use netdp_tests::beside::{Difference, Meeting, UNASKED, is_listed, judge};
use netdp_tests::docker::Installation;
use netdp_tests::harness::{Row, brief, catch, full, run_docker_trials};
use netdp_tests::lab::Offload;
use netdp_tests::net::{FAMILIES, Family};
use netdp_tests::probe::locked;

#[expect(dead_code, reason = "the suite conformance has an entry and lists of its own")]
#[path = "../conformance/main.rs"]
mod conformance;

/// How Docker met each row so far, by firewall, place in the catalogue and family.
type Comparison = Arc<Mutex<BTreeMap<(&'static str, usize, Family), Line>>>;

/// A line of the comparison.
struct Line {
    id: &'static str,
    /// In a word.
    verdict: &'static str,
    /// What Docker does otherwise.
    what: &'static str,
}

fn main() -> ExitCode {
    let comparison = Comparison::default();
    let mut trials = vec![Trial::test("lists", || Ok(expect_lists_name_rows()?))];
    let installed = Installation::find();
    match &installed {
        Ok(installed) => {
            trials.extend(rows(Firewall::Iptables, installed, &comparison));
            if installed.knows_firewalls {
                trials.extend(rows(Firewall::Nftables, installed, &comparison));
            } else {
                let reason = format!("Docker {} has no nftables; 29 has", installed.version);
                trials.push(skipped("nftables".to_owned(), reason));
            }
        }
        Err(error) => {
            let names = conformance::CHECKS.iter().map(|(id, _)| format!("{id}/docker"));
            trials.extend(names.map(|name| skipped(name, brief(error))));
        }
    }
    let code = run_docker_trials(trials);
    if let Ok(installed) = installed {
        print(&installed.version, &comparison);
    }
    code
}

fn skipped(name: String, reason: String) -> Trial {
    Trial::ignorable_test(name, move || Ok(Completion::ignored_with(reason)))
}

/// Every row that can be asked, for both families.
fn rows(
    firewall: Firewall,
    installed: &'static Installation,
    comparison: &Comparison,
) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (place, &(id, run)) in conformance::CHECKS.iter().enumerate() {
        for &family in FAMILIES {
            let backend = Backend::Docker(firewall);
            let row =
                Row { id, backend, engine: None, unkept: None, family, offload: Offload::On, run };
            let comparison = Arc::clone(comparison);
            trials.push(match unasked(id, firewall) {
                Some(reason) => skipped(row.trial_name(), reason.to_owned()),
                None => Trial::ignorable_test(row.trial_name(), move || {
                    meet(&row, place, firewall, installed, &comparison)
                }),
            });
        }
    }
    trials
}

/// Why a row can't be asked of Docker.
fn unasked(id: &str, firewall: Firewall) -> Option<&'static str> {
    if firewall == Firewall::Nftables && id.starts_with("POL-") {
        return Some("with nftables Docker leaves no chain to its users");
    }
    UNASKED.iter().find(|(known, _)| *known == id).map(|(_, reason)| *reason)
}

/// Has Docker meet a row, and notes how.
fn meet(
    row: &Row,
    place: usize,
    firewall: Firewall,
    installed: &Installation,
    comparison: &Comparison,
) -> Result<Completion, Failed> {
    let note = |verdict, what| {
        let key = (firewall.name(), place, row.family);
        locked(comparison).insert(key, Line { id: row.id, verdict, what });
    };
    let outcome = catch(|| (row.run)(row));
    match judge(row.id, row.family, &outcome) {
        Ok(Meeting::Same) => note("same", ""),
        Ok(Meeting::Differs(known)) => note("differs", known.docker),
        Err(wrong) if is_listed(installed, firewall) => {
            note("NEW", "not as listed");
            let report = outcome.err().map(|error| full(&error)).unwrap_or_default();
            return Err(format!("{report}\n{wrong}").into());
        }
        // Another version may do as it likes: what it does is to be looked at, not to stop anybody.
        Err(wrong) => {
            note("NEW", "not as listed for another version");
            return Ok(Completion::ignored_with(wrong));
        }
    }
    Ok(Completion::Completed)
}

/// Fails unless the lists name rows that there are, and none twice over.
fn expect_lists_name_rows() -> anyhow::Result<()> {
    use netdp_tests::beside::DIFFERENCES;
    let is_row = |id: &str| conformance::CHECKS.iter().any(|(row, _)| *row == id);
    for (id, _) in UNASKED {
        anyhow::ensure!(is_row(id), "{id} is no row");
    }
    for Difference { id, families, .. } in DIFFERENCES {
        anyhow::ensure!(is_row(id), "{id} is no row");
        anyhow::ensure!(unasked(id, Firewall::Iptables).is_none(), "{id} is not asked at all");
        for &family in *families {
            let same = DIFFERENCES.iter().filter(|d| d.id == *id && d.families.contains(&family));
            anyhow::ensure!(same.count() == 1, "{id} is listed twice for {}", family.name());
        }
    }
    Ok(())
}

/// Prints what each row came to.
fn print(version: &str, comparison: &Comparison) {
    let comparison = locked(comparison);
    if comparison.is_empty() {
        return;
    }
    println!(
        "Docker {version} beside what netdp promises and the suite conformance holds it to:\n"
    );
    println!("{:<8} {:<7} {:<9} {:<8} what Docker does", "row", "family", "firewall", "verdict");
    for ((firewall, _, family), Line { id, verdict, what }) in comparison.iter() {
        let line = format!("{id:<8} {:<7} {firewall:<9} {verdict:<8} {what}", family.name());
        println!("{}", line.trim_end());
    }
    let same = comparison.values().filter(|line| line.verdict == "same").count();
    println!("\n{same} the same, {} not\n", comparison.len() - same);
}
