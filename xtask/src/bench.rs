//! Building and running benchmarks as root. What they measure is the tests crate's business.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::process::{as_root, ensure_root};
use crate::unpacked::{self, CLIENTS, DOCKER};
use crate::{cargo, setup};

/// A benchmark.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Bench {
    /// The BPF programs alone: nanoseconds for one packet, established and new flows
    Bpf,
    /// Changes: publishing, starting, the agent's memory
    Control,
    /// Traffic, beside other systems
    Traffic,
}

impl Bench {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// How to measure.
#[derive(Clone, Copy)]
pub(crate) struct Options<'a> {
    /// Only what has this in its name.
    pub(crate) only: Option<&'a str>,
    pub(crate) is_quick: bool,
    /// Where figures go, too.
    pub(crate) json: Option<&'a Path>,
}

/// Where plots go.
const PLOTS: &str = "docs/plots";
/// The same, of a run that is too short to be shown.
const QUICK_PLOTS: &str = "target/plots";

/// Runs benchmarks at this terminal, all of them where none is named.
pub(crate) fn run(named: &[Bench], options: Options<'_>) -> Result<()> {
    setup::run(setup::Scope::Everything)?;
    ensure_root("measuring in network namespaces")?;
    let mut benches = if named.is_empty() { Bench::value_variants() } else { named }.to_vec();
    benches.sort();
    benches.dedup();
    // The agent as it is installed; where nobody cares for the figures, the one of the tests.
    let agent = ["build", "--release", "--package", "netdp"];
    let agent = if options.is_quick { &["build", "--package", "netdp"][..] } else { &agent };
    let netdp = cargo::build_one("build netdp", "netdp", agent)?;
    let mut roots = Vec::new();
    for engine in [DOCKER].iter().chain(&CLIENTS) {
        match unpacked::get(engine) {
            Ok(root) => roots.push((engine.variable, root)),
            Err(error) => eprintln!("without {}: {error:#}", engine.title),
        }
    }
    let mut environment = vec![("NETDP_BIN", netdp.as_os_str())];
    environment.extend(roots.iter().map(|(variable, root)| (*variable, root.as_os_str())));
    let scratch = tempfile::tempdir().context("create a directory")?;
    let mut figures = Vec::new();
    for bench in benches {
        let name = bench.name();
        println!("\n== {name}");
        // The tests' profile: what they measure is the kernel's, and another process's.
        let arguments = ["test", "--no-run", "--package", "netdp-tests", "--bench", &name];
        let executable =
            cargo::build_one(&format!("build the benchmark {name}"), &name, &arguments)?;
        let file = scratch.path().join(&name);
        let mut command = as_root(&executable, &environment)?;
        command.arg("--json").arg(&file);
        if options.is_quick {
            command.arg("--quick");
        }
        if bench == Bench::Traffic && options.only.is_none() {
            command.args(["--plots", if options.is_quick { QUICK_PLOTS } else { PLOTS }]);
        }
        command.args(options.only);
        let status = command.current_dir(cargo::root()).status();
        let status = status.with_context(|| format!("run the benchmark {name}"))?;
        ensure!(status.success(), "the benchmark {name} failed: {status}");
        let text = fs::read_to_string(&file).context("read the figures")?;
        let list: Vec<Value> = serde_json::from_str(&text).context("read the figures")?;
        figures.extend(list);
    }
    if let Some(word) = options.only {
        // What the kernel alone takes is measured whatever the word.
        let is_asked_for = |figure: &Value| figure["system"] != "kernel";
        ensure!(
            figures.iter().any(is_asked_for),
            "nothing that is measured has {word:?} in its name"
        );
    }
    if let Some(path) = options.json {
        let text = serde_json::to_string_pretty(&figures).context("encode the figures")?;
        fs::write(path, text + "\n")
            .with_context(|| format!("write the figures to {}", path.display()))?;
    }
    Ok(())
}
