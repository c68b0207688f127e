//! Runs tests that need a process of their own making, and records conformance rows.
//!
//! A row is one promise of the behaviour catalogue for one backend and one address family. It may
//! run in several variants; the record holds the worst result.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, anyhow, bail};
use libtest_mimic::{Arguments, Completion, Trial};
use serde::Serialize;

use crate::backend::{Backend, Engine, Firewall, Variant};
use crate::docker::Installation;
use crate::kernels::{self, Exception};
use crate::lab::{Lab, LabBuilder, Offload};
use crate::net::{Family, Net};
use crate::probe::locked;
use crate::runtime::{isolate, slowness};
use crate::stage;

/// Names the file that conformance results are written to.
const JSON_VARIABLE: &str = "NETDP_TEST_JSON";
/// Names a file with the names of tests that are not to be run, one a line.
const SKIP_VARIABLE: &str = "NETDP_TEST_SKIP";
/// Labs wait more than they compute.
const DEFAULT_THREADS: usize = 5;
/// Labs with Docker wait even more, for its daemon and its containers.
const DOCKER_THREADS: usize = 5;
/// Limits are longer where everything takes longer, so that more labs can wait.
const SLOW_THREADS: usize = 4;

/// How a test ended that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The promise holds.
    Pass,
    /// The promise can't be tried here, and why.
    Skip(String),
}

/// Why a backend does not keep a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unkept {
    /// It can't: a test that passes is news.
    For(&'static str),
    /// It can't on some hosts.
    Perhaps(&'static str),
    /// It is asked in words that don't say it: the test fails with one of these.
    Unsaid {
        /// What it says then.
        seen: &'static [&'static str],
        /// Why there are no such words.
        reason: &'static str,
    },
}

/// One promise, for one backend and one address family.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its id in the behaviour catalogue.
    pub id: &'static str,
    /// What has to keep it.
    pub backend: Backend,
    /// In whose words it is asked, if not in netdp's.
    pub engine: Option<Engine>,
    /// Why the backend can't keep it, if it can't: then it must not.
    pub unkept: Option<Unkept>,
    /// The family that the row is about.
    pub family: Family,
    /// Whether the lab's links have offloads.
    pub offload: Offload,
    /// The test itself.
    pub run: fn(&Row) -> Result<Outcome>,
}

impl Row {
    /// The lab's addresses in the row's family.
    #[must_use]
    pub fn net(&self) -> &'static Net {
        self.family.net()
    }

    /// Whether the eBPF backend has to keep it.
    #[must_use]
    pub fn is_ebpf(&self) -> bool {
        self.backend.is_ebpf()
    }

    /// Runs `test` in a lab of its own, then checks that the host has no netfilter rule if the
    /// backend needs none. Where an engine speaks, that is so before as well, and when the engine has
    /// removed what it made.
    ///
    /// # Errors
    /// When the lab can't be built, or with the lab's description when the test fails.
    pub fn in_lab(
        &self,
        prepare: impl FnOnce(LabBuilder) -> LabBuilder,
        test: impl FnOnce(&Lab) -> Result<()>,
    ) -> Result<Outcome> {
        let builder = Lab::builder().family(self.family).offload(self.offload);
        let builder = prepare(builder.backend(self.backend).by_engine(self.engine));
        let expect_clean = |lab: &Lab, when: &'static str| match self.is_ebpf() {
            true => lab.expect_no_netfilter().context(when),
            false => Ok(()),
        };
        let run = |lab: &Lab| test(lab).and_then(|()| expect_clean(lab, "at the end of the test"));
        if self.engine.is_none() {
            let lab = builder.build()?;
            lab.explain(run(&lab))?;
            return Ok(Outcome::Pass);
        }
        stage::with_lab(builder, |lab| {
            lab.explain(expect_clean(lab, "before the test").and_then(|()| run(lab)))?;
            lab.explain(lab.clear().and_then(|()| expect_clean(lab, "when all is removed")))
        })?;
        Ok(Outcome::Pass)
    }

    /// Runs `test` in the standard lab.
    ///
    /// # Errors
    /// As [`Row::in_lab`].
    pub fn in_standard_lab(&self, test: impl FnOnce(&Lab) -> Result<()>) -> Result<Outcome> {
        self.in_lab(|builder| builder, test)
    }

    /// What the test is called.
    #[must_use]
    pub fn trial_name(&self) -> String {
        let programs = match self.backend {
            Backend::Iptables(Variant::Legacy) => "/legacy",
            Backend::EbpfByStack => "/by-stack",
            Backend::Docker(Firewall::Nftables) => "/nftables",
            Backend::Docker(Firewall::Off) => "/off",
            Backend::Ebpf
            | Backend::Iptables(Variant::Nft)
            | Backend::Docker(Firewall::Iptables) => "",
        };
        let offload = match self.offload {
            Offload::On => "",
            Offload::Off => "/offload-off",
        };
        let engine = self.engine.map(|engine| format!("/by-{}", engine.name()));
        let engine = engine.unwrap_or_default();
        let (backend, family) = (self.backend.name(), self.family.name());
        format!("{}/{backend}/{family}{programs}{offload}{engine}", self.id)
    }

    /// Runs the test. One that can't pass is skipped for as long as it does not.
    fn outcome(&self) -> Result<Outcome> {
        if let Some(program) = self.backend.missing_program() {
            return Ok(Outcome::Skip(format!("{program} is not installed here")));
        }
        if let (Some(Engine::Docker), Err(error)) = (self.engine, Installation::find()) {
            return Ok(Outcome::Skip(brief(&error)));
        }
        let outcome = catch(|| (self.run)(self));
        match (self.unkept, outcome) {
            (Some(Unkept::For(reason) | Unkept::Unsaid { reason, .. }), Ok(Outcome::Pass)) => {
                Err(anyhow!("it passes, although it is marked as not kept ({reason}): unmark it"))
            }
            (Some(Unkept::For(reason) | Unkept::Perhaps(reason)), Err(_)) => {
                Ok(Outcome::Skip(reason.to_owned()))
            }
            (Some(Unkept::Unsaid { seen, reason }), Err(error))
                if seen.iter().any(|seen| brief(&error).contains(seen)) =>
            {
                Ok(Outcome::Skip(reason.to_owned()))
            }
            (_, outcome) => outcome,
        }
    }
}

/// The lab's description as it was when a test failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Report(pub String);

/// A test and the promise that it is named by.
pub type Promise = (&'static str, fn() -> Result<()>);

/// Runs tests that build their own labs.
pub fn run_tests(tests: &[Promise]) -> ExitCode {
    run_trials(trials(tests))
}

/// Tests that build their own labs, to be run among others.
pub fn trials(tests: &[Promise]) -> Vec<Trial> {
    let trial = |&(name, test): &Promise| {
        Trial::test(name, move || catch(test).map_err(|error| full(&error).into()))
    };
    tests.iter().map(trial).collect()
}

/// Tests that can't be run here, and why.
pub fn skipped(tests: &[Promise], reason: &str) -> Vec<Trial> {
    let trial = |&(name, _): &Promise| {
        let reason = reason.to_owned();
        Trial::ignorable_test(name, move || Ok(Completion::ignored_with(reason)))
    };
    tests.iter().map(trial).collect()
}

/// Runs rows and records their results where `NETDP_TEST_JSON` says.
pub fn run_rows(rows: Vec<Row>) -> ExitCode {
    run_trials(row_trials(rows))
}

/// Rows as trials, which record their results where `NETDP_TEST_JSON` says.
pub fn row_trials(rows: Vec<Row>) -> Vec<Trial> {
    let record = Arc::new(Record::new());
    let trials = rows.into_iter().map(|row| {
        let record = Arc::clone(&record);
        Trial::ignorable_test(row.trial_name(), move || {
            let outcome = excused(&row, row.outcome());
            record.add(&row, &outcome)?;
            match outcome {
                Ok(Outcome::Pass) => Ok(Completion::Completed),
                Ok(Outcome::Skip(reason)) => Ok(Completion::ignored_with(reason)),
                Err(error) => Err(full(&error).into()),
            }
        })
    });
    trials.collect()
}

/// Runs trials whose labs have Docker.
#[must_use]
pub fn run_docker_trials(trials: Vec<Trial>) -> ExitCode {
    let code = run_on_threads(trials, DOCKER_THREADS);
    stage::end();
    code
}

/// Runs trials one after the other, in their order: they share what is expensive to start.
#[must_use]
pub fn run_in_order(trials: Vec<Trial>) -> ExitCode {
    run_on_threads(trials, 1)
}

/// What counts of a row on a kernel that is known not to keep its promise.
fn excused(row: &Row, outcome: Result<Outcome>) -> Result<Outcome> {
    let kernel = kernels::running()?;
    let exception = Exception::find(row.id, row.family, kernel).filter(|_| row.is_ebpf());
    let Some(exception) = exception else { return outcome };
    match outcome {
        Ok(Outcome::Pass) => {
            let ((major, minor), reason) = (kernel, exception.reason);
            bail!("it passes on Linux {major}.{minor}, which was held to be unable: {reason}")
        }
        Ok(Outcome::Skip(reason)) => Ok(Outcome::Skip(reason)),
        Err(error) => Ok(Outcome::Skip(format!("{} (seen: {})", exception.reason, brief(&error)))),
    }
}

/// Runs trials, some at a time.
#[must_use]
pub fn run_trials(trials: Vec<Trial>) -> ExitCode {
    run_on_threads(trials, if slowness() > 1 { SLOW_THREADS } else { DEFAULT_THREADS })
}

fn run_on_threads(mut trials: Vec<Trial>, threads: usize) -> ExitCode {
    if let Some(path) = std::env::var_os(SKIP_VARIABLE) {
        let names = match fs::read_to_string(&path) {
            Ok(names) => names,
            Err(error) => {
                eprintln!("error: read {}: {error}", path.display());
                return ExitCode::FAILURE;
            }
        };
        trials.retain(|trial| !names.lines().any(|name| name == trial.name()));
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(threads);
    if !arguments.list
        && let Err(error) = isolate()
    {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Turns a panic into an error, so that it is recorded like any other failure.
///
/// # Errors
/// As the test, or with the panic's message.
pub fn catch<T>(test: impl FnOnce() -> Result<T>) -> Result<T> {
    panic::catch_unwind(AssertUnwindSafe(test)).unwrap_or_else(|payload| {
        let message = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(anyhow!("panicked: {message}"))
    })
}

/// Results so far; a missing file name means that nobody asked.
#[derive(Debug)]
struct Record {
    path: Option<PathBuf>,
    entries: Mutex<BTreeMap<(&'static str, &'static str, &'static str), Entry>>,
}

/// One result in the file. The order of `result` is from good to bad.
#[derive(Clone, Debug, Serialize)]
struct Entry {
    id: &'static str,
    backend: &'static str,
    family: &'static str,
    result: Verdict,
    reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Pass,
    Skip,
    Fail,
}

impl Record {
    fn new() -> Self {
        Self { path: std::env::var_os(JSON_VARIABLE).map(PathBuf::from), entries: Mutex::default() }
    }

    /// Adds a result and writes the file anew: a run that is killed leaves what it knew.
    fn add(&self, row: &Row, outcome: &Result<Outcome>) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let (result, reason) = match outcome {
            Ok(Outcome::Pass) => (Verdict::Pass, String::new()),
            Ok(Outcome::Skip(reason)) => (Verdict::Skip, format!("{}: {reason}", row.trial_name())),
            Err(error) => (Verdict::Fail, format!("{}: {}", row.trial_name(), brief(error))),
        };
        let family = row.family.name();
        let backend = row.backend.name();
        let entry = Entry { id: row.id, backend, family, result, reason };
        let mut entries = locked(&self.entries);
        entries
            .entry((row.id, backend, family))
            .and_modify(|known| {
                if entry.result > known.result {
                    *known = entry.clone();
                }
            })
            .or_insert(entry);
        let list: Vec<_> = entries.values().collect();
        let text = serde_json::to_string_pretty(&list).context("encode results")?;
        fs::write(path, text).with_context(|| format!("write results to {}", path.display()))
    }
}

/// The description of the lab, if there is one, then the causes.
#[must_use]
pub fn full(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Report>() {
        Some(Report(report)) => format!("{report}\nfailed: {}", brief(error)),
        None => format!("failed: {}", brief(error)),
    }
}

/// The causes of a failure without the description of the lab.
#[must_use]
pub fn brief(error: &anyhow::Error) -> String {
    let reports = usize::from(error.downcast_ref::<Report>().is_some());
    let causes: Vec<_> = error.chain().skip(reports).map(ToString::to_string).collect();
    causes.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_to_be_unsaid_is_tried_both_ways() {
        let outcome = |run| {
            let unkept = Unkept::Unsaid { seen: &["no word for that"], reason: "nobody speaks so" };
            let unkept = Some(unkept);
            let (backend, family, offload) = (Backend::Ebpf, Family::Ipv4, Offload::On);
            Row { id: "PUB-01", backend, engine: None, unkept, family, offload, run }.outcome()
        };
        let unsaid = outcome(|_| bail!("it has no word for that")).unwrap();
        assert_eq!(unsaid, Outcome::Skip("nobody speaks so".into()));
        // Said after all, and not kept for another reason.
        assert!(outcome(|_| Ok(Outcome::Pass)).is_err());
        assert!(outcome(|_| bail!("timed out")).is_err());
    }
}
