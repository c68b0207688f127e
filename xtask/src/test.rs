//! The test suites: running them with nothing but what they need as root, and counting. What
//! a suite tests is its own business; this file knows only libtest's result lines.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::iter::Sum;
use std::ops::Add;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::check::UNIT_TESTED;
use crate::process::{Finished, as_root, ensure_root, run_quiet, run_shown};
use crate::unpacked::{self, CLIENTS, DOCKER, Engine};
use crate::{bench, cargo, demo, setup, tidy, vm};

/// A group of tests that is run and counted as one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Suite {
    /// Pure logic of every crate, on the host
    Unit,
    /// The tree's own rules
    Tidy,
    /// The lab itself: namespaces, probes, sniffers
    Lab,
    /// Every BPF program, loaded and attached
    Load,
    /// BPF programs on single packets: verdicts, rewritten headers, checksums
    Datapath,
    /// Programs of the host and published ports
    Sockets,
    /// BPF programs on frames that make no sense, for a quarter of a minute
    Fuzz,
    /// BPF programs beside a model of flow table and NAT, on 100,000 random events
    Property,
    /// Promises of docs/behaviour.md, kept on real packets
    Conformance,
    /// The same traffic through netdp and through netfilter
    Differential,
    /// The same promises, asked of Docker itself
    Docker,
    /// Container engines as they are, and the plugins, with networks of netdp's
    Engines,
    /// The same promises, of Docker's containers in networks of netdp's
    Through,
    /// Restarts, crashes and clean-up of the agent
    Lifecycle,
    /// The demo, as one test
    Demo,
    /// Every benchmark, as one test of whether it runs
    Bench,
    /// The suite load, on the kernels of Debian's releases
    Vm,
}

impl Suite {
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    fn needs_root(self) -> bool {
        !matches!(self, Self::Unit | Self::Tidy | Self::Vm)
    }

    /// Whether it is a test of the tests crate, and can run wherever its executable is.
    pub(crate) fn is_executable(self) -> bool {
        use Suite::{Bench, Demo, Docker, Engines, Through, Tidy, Unit, Vm};
        !matches!(self, Unit | Tidy | Docker | Engines | Through | Demo | Bench | Vm)
    }
}

/// `named` in the order suites run, without repetition; all suites when none is named.
pub(crate) fn selection(named: &[Suite]) -> Vec<Suite> {
    let mut suites = if named.is_empty() { Suite::value_variants() } else { named }.to_vec();
    suites.sort();
    suites.dedup();
    suites
}

/// Runs `suites` to the end, whatever fails, and closes with the counts. The conformance
/// suite writes its results to `json`. Succeeds when every suite ran tests and none failed.
pub(crate) fn run(suites: &[Suite], json: Option<&Path>) -> Result<ExitCode> {
    if suites.iter().any(|suite| suite.needs_root()) {
        setup::run(setup::Scope::Everything)?;
        ensure_root("testing in network namespaces")?;
    } else if suites.contains(&Suite::Vm) {
        setup::run(setup::Scope::Machines)?;
    } else {
        setup::run(setup::Scope::Toolchain)?;
    }
    let mut netdp = None;
    let mut outcomes = Vec::new();
    for suite in suites {
        println!("\n== {}", suite.name());
        let started = Instant::now();
        let results = run_suite(*suite, &mut netdp, json).unwrap_or_else(|error| {
            eprintln!("{}: {error:#}", suite.name());
            Results { counts: Counts::of_one(false), failures: format!("{error:#}\n") }
        });
        outcomes.push(Outcome { suite: *suite, results, seconds: started.elapsed().as_secs_f32() });
    }
    Ok(if report(&outcomes) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// `netdp` is the agent's binary, built by the first suite that needs it.
fn run_suite(suite: Suite, netdp: &mut Option<PathBuf>, json: Option<&Path>) -> Result<Results> {
    match suite {
        Suite::Unit => run_unit(),
        Suite::Tidy => run_tidy().map(Results::from),
        Suite::Lab
        | Suite::Load
        | Suite::Datapath
        | Suite::Fuzz
        | Suite::Property
        | Suite::Differential
        | Suite::Sockets
        | Suite::Lifecycle => run_packets(suite, agent(netdp)?, None),
        Suite::Conformance => match json {
            Some(json) => run_conformance(agent(netdp)?, json),
            None => run_packets(suite, agent(netdp)?, None),
        },
        // It needs no agent, and says what it misses.
        Suite::Docker => run_as_root(suite, &borrowed(&[root(&DOCKER)])),
        Suite::Engines | Suite::Through => {
            let netdp = agent(netdp)?.clone().into_os_string();
            let mut environment = vec![Some(("NETDP_BIN", netdp))];
            environment.extend([DOCKER].iter().chain(&CLIENTS).map(root));
            run_as_root(suite, &borrowed(&environment))
        }
        Suite::Demo => {
            let finished = run_shown("demo", &mut demo::command(agent(netdp)?)?)?;
            if !finished.status.success() {
                eprintln!("demo: {}", finished.status);
            }
            Ok(Counts::of_one(finished.status.success()).into())
        }
        Suite::Bench => {
            bench::run(&[], bench::Options { only: None, is_quick: true, json: None })?;
            Ok(Counts::of_one(true).into())
        }
        Suite::Vm => Ok(run_machines().into()),
    }
}

/// An environment variable of a suite.
type Variable = (&'static str, OsString);

/// The variable that tells a suite where an engine is, if there is one; whoever has set it is right.
fn root(engine: &Engine) -> Option<Variable> {
    let set = env::var_os(engine.variable);
    let root = set.or_else(|| Some(unpacked::get(engine).ok()?.into_os_string()))?;
    Some((engine.variable, root))
}

fn borrowed(variables: &[Option<Variable>]) -> Vec<(&str, &OsStr)> {
    variables.iter().flatten().map(|(name, value)| (*name, value.as_os_str())).collect()
}

/// The gate of every kernel, and the agent on one without eBPF: one after the other, whatever fails.
fn run_machines() -> Counts {
    let gate = vm::GATE.map(|line| (line, vm::Options::all(&[Suite::Load])));
    let machines = gate.into_iter().chain([(vm::Line::V5_10, vm::Options::fallback())]);
    let run = |(line, options): (vm::Line, vm::Options<'_>)| {
        vm::run_on(line, &options).unwrap_or_else(|error| {
            eprintln!("{}: {error:#}", line.name());
            Counts::of_one(false)
        })
    };
    machines.map(run).sum()
}

fn agent(built: &mut Option<PathBuf>) -> Result<&PathBuf> {
    match built {
        Some(path) => Ok(path),
        None => Ok(built.insert(demo::netdp_binary()?)),
    }
}

fn run_unit() -> Result<Results> {
    let unit = |more: &[&str]| -> Command {
        let mut command = cargo::command(&["test", "--locked"]);
        command.args(UNIT_TESTED).args(more);
        command
    };
    run_quiet("build the unit tests", &mut unit(&["--no-run"]))?;
    counted("unit", &mut unit(&["--no-fail-fast"]))
}

fn run_tidy() -> Result<Counts> {
    let findings = tidy::findings(cargo::root())?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    let broken = |rule: &str| findings.iter().any(|finding| finding.rule == rule);
    Ok(tidy::rules().map(|rule| Counts::of_one(!broken(rule))).sum())
}

/// Where fuzzing adds what it found, if that is asked for.
const CORPUS: &str = "tests/corpus/frames.hex";

/// Runs the suite fuzz for `seconds`. With `keep`, inputs that led to something new stay.
pub(crate) fn fuzz(seconds: u32, keep: bool) -> Result<ExitCode> {
    setup::run(setup::Scope::Everything)?;
    ensure_root("fuzzing in network namespaces")?;
    let (seconds, corpus) = (seconds.to_string(), cargo::root().join(CORPUS));
    let mut environment: Vec<(&str, &OsStr)> = vec![("NETDP_FUZZ_SECONDS", seconds.as_ref())];
    environment.extend(keep.then_some(("NETDP_FUZZ_KEEP", corpus.as_os_str())));
    let counts = run_as_root(Suite::Fuzz, &environment)?.counts;
    Ok(if counts.is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs a suite of the tests crate that needs the agent.
fn run_packets(suite: Suite, netdp: &Path, json: Option<&Path>) -> Result<Results> {
    let mut environment: Vec<(&str, &OsStr)> = vec![("NETDP_BIN", netdp.as_os_str())];
    environment.extend(json.map(|json| ("NETDP_TEST_JSON", json.as_os_str())));
    run_as_root(suite, &environment)
}

/// Builds a suite of the tests crate and runs it as root.
fn run_as_root(suite: Suite, environment: &[(&str, &OsStr)]) -> Result<Results> {
    let (name, executable) = (suite.name(), executable(suite)?);
    // What sudo would drop.
    let passed = ["NETDP_SEED", "NETDP_WITHOUT"].map(|name| (name, env::var_os(name)));
    let mut environment = environment.to_vec();
    for (name, value) in &passed {
        environment.extend(value.as_deref().map(|value| (*name, value)));
    }
    counted(&name, as_root(&executable, &environment)?.current_dir(cargo::root()))
}

/// Builds a suite of the tests crate.
fn executable(suite: Suite) -> Result<PathBuf> {
    executable_built_as(suite, "dev")
}

/// Builds a suite of the tests crate by one of the workspace's profiles.
pub(crate) fn executable_built_as(suite: Suite, profile: &str) -> Result<PathBuf> {
    let name = suite.name();
    let package = ["test", "--no-run", "--package", "netdp-tests"];
    let arguments = [&package[..], &["--profile", profile, "--test", &name]].concat();
    cargo::build_one(&format!("build the suite {name}"), &name, &arguments)
}

fn run_conformance(netdp: &Path, json: &Path) -> Result<Results> {
    let json = std::path::absolute(json).context("make the results' path absolute")?;
    if json.exists() {
        // Results of an earlier run must not pass for this one's.
        fs::remove_file(&json).with_context(|| format!("remove old {}", json.display()))?;
    }
    let mut results = run_packets(Suite::Conformance, netdp, Some(&json))?;
    let text = fs::read_to_string(&json);
    let verified = text.context("read").and_then(|text| verify_results(&text));
    if let Err(error) = verified {
        results.fail(&format!("conformance results {}: {error:#}", json.display()));
    }
    Ok(results)
}

/// Checks that `text` is a list of {id, backend, family, result, reason}.
fn verify_results(text: &str) -> Result<()> {
    let results: Vec<Value> = serde_json::from_str(text).context("read a list")?;
    ensure!(!results.is_empty(), "the list is empty");
    for result in &results {
        for field in ["id", "backend", "family"] {
            ensure!(result[field].is_string(), "{field} is missing in {result}");
        }
        let known = matches!(result["result"].as_str(), Some("pass" | "fail" | "skip"));
        ensure!(known, "result is none of pass, fail, skip in {result}");
        ensure!(result.get("reason").is_some(), "reason is missing in {result}");
    }
    Ok(())
}

fn counted(title: &str, command: &mut Command) -> Result<Results> {
    let Finished { status, stdout, .. } = run_shown(title, command)?;
    let counts: Counts = stdout.lines().filter_map(result_line).sum();
    let mut results = Results { counts, failures: failures(&stdout) };
    if !status.success() && counts.failed == 0 {
        results.fail(&format!("{title}: ended without naming a failed test: {status}"));
    }
    Ok(results)
}

/// What libtest says of the tests that failed: each by its name, with its reason.
fn failures(stdout: &str) -> String {
    let (mut told, mut is_told) = (String::new(), false);
    for line in stdout.lines() {
        if line == "failures:" || line.starts_with("test result: ") {
            // A list of bare names follows the reasons.
            is_told = false;
        }
        is_told |= line.starts_with("---- ");
        if is_told && !line.is_empty() {
            told.push_str(line);
            told.push('\n');
        }
    }
    told
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; …`.
pub(crate) fn result_line(line: &str) -> Option<Counts> {
    let numbers = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count = |what: &str| -> Option<usize> {
        let mut parts = numbers.split(';');
        parts.find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
    };
    Some(Counts { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    passed: usize,
    pub(crate) failed: usize,
    skipped: usize,
}

impl Counts {
    pub(crate) fn of_one(passed: bool) -> Self {
        Self { passed: usize::from(passed), failed: usize::from(!passed), skipped: 0 }
    }

    /// So many that passed.
    pub(crate) fn of_passed(passed: usize) -> Self {
        Self { passed, failed: 0, skipped: 0 }
    }

    /// Whether tests ran and none failed.
    pub(crate) fn is_well(self) -> bool {
        self.passed > 0 && self.failed == 0
    }
}

impl Display for Counts {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

impl Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

impl Sum for Counts {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), Add::add)
    }
}

/// What came of a suite.
#[derive(Debug, PartialEq, Eq)]
struct Results {
    counts: Counts,
    /// Lines about what failed; empty where the suite has said it at its end.
    failures: String,
}

impl From<Counts> for Results {
    fn from(counts: Counts) -> Self {
        Self { counts, failures: String::new() }
    }
}

impl Results {
    /// Counts and tells a failure that is no test's.
    fn fail(&mut self, reason: &str) {
        eprintln!("{reason}");
        self.counts = self.counts + Counts::of_one(false);
        self.failures.push_str(reason);
        self.failures.push('\n');
    }
}

struct Outcome {
    suite: Suite,
    results: Results,
    seconds: f32,
}

/// Tells once more what failed, prints the table and, alone on the very last line, the counts. Returns whether all is well.
fn report(outcomes: &[Outcome]) -> bool {
    for Outcome { suite, results, .. } in outcomes {
        if !results.failures.is_empty() {
            print!("\n== failed in {}\n{}", suite.name(), results.failures);
        }
    }
    println!("\n{:<12} {:>8} {:>8} {:>8} {:>8}", "suite", "passed", "failed", "skipped", "seconds");
    for Outcome { suite, results, seconds } in outcomes {
        let Counts { passed, failed, skipped } = results.counts;
        println!("{:<12} {passed:>8} {failed:>8} {skipped:>8} {seconds:>8.1}", suite.name());
    }
    let idle = |outcome: &&Outcome| {
        let Counts { passed, failed, .. } = outcome.results.counts;
        passed + failed == 0
    };
    let idle: Vec<_> = outcomes.iter().filter(idle).map(|outcome| outcome.suite.name()).collect();
    if !idle.is_empty() {
        eprintln!("error: no test ran in {}", idle.join(", "));
    }
    let total: Counts = outcomes.iter().map(|outcome| outcome.results.counts).sum();
    println!("{total}");
    total.failed == 0 && idle.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_counted() {
        let line = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 9 filtered out";
        assert_eq!(result_line(line), Some(Counts { passed: 3, failed: 2, skipped: 1 }));
        assert_eq!(result_line("test result_line ... ok"), None);
    }

    #[test]
    fn failures_are_told_with_their_reasons() {
        let stdout = "test a ... FAILED\n\nfailures:\n\n---- a ----\nbyte 22\n\nof 30\n\n\n\
            failures:\n    a\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\nlater\n";
        assert_eq!(failures(stdout), "---- a ----\nbyte 22\nof 30\n");
        assert_eq!(failures("test a ... ok\n\ntest result: ok. 1 passed\n"), "");
    }

    #[test]
    fn crash_without_result_line_is_a_failure() {
        let mut crash = Command::new("sh");
        let results = counted("crash", crash.args(["-c", "kill -SEGV $$"])).unwrap();
        assert_eq!(results.counts, Counts::of_one(false));
        assert!(results.failures.contains("signal"), "{}", results.failures);
    }

    #[test]
    fn suites_run_once_and_in_their_order() {
        use Suite::{Conformance, Unit};
        assert!(selection(&[Conformance, Unit, Conformance]) == [Unit, Conformance]);
        assert!(selection(&[]) == Suite::value_variants());
    }

    #[test]
    fn idle_suite_is_an_error() {
        let outcome = |passed| Outcome {
            suite: Suite::Tidy,
            results: Counts { passed, failed: 0, skipped: 1 }.into(),
            seconds: 0.0,
        };
        assert!(report(&[outcome(1)]));
        assert!(!report(&[outcome(0)]));
    }

    #[test]
    fn conformance_results_are_verified() {
        let good =
            r#"[{"id":"PUB-01","backend":"ebpf","family":"v4","result":"pass","reason":null}]"#;
        assert!(verify_results(good).is_ok());
        for bad in ["", "{}", "[]", &good.replace("pass", "maybe"), &good.replace("id", "name")] {
            assert!(verify_results(bad).is_err(), "{bad}");
        }
    }
}
