//! Building and running benchmarks as root. What they measure is the tests crate's business.

use std::path::{self, Path};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::process::{as_root, ensure_root};
use crate::{cargo, setup};

/// A benchmark.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// The BPF programs alone: nanoseconds for one packet, established and new flows
    Bpf,
}

/// Runs a benchmark at this terminal. Its figures go to `json`, too.
pub(crate) fn run(bench: Bench, json: Option<&Path>, quick: bool) -> Result<()> {
    setup::run(setup::Scope::Everything)?;
    ensure_root("measuring in network namespaces")?;
    let Bench::Bpf = bench;
    // The test profile: what is measured is the kernel's, and the programs are always optimised.
    let arguments = ["test", "--no-run", "--package", "netdp-tests", "--bench", "bpf"];
    let executable = cargo::build_one("build the benchmark", "bpf", &arguments)?;
    let mut command = as_root(&executable, &[])?;
    if quick {
        command.arg("--quick");
    }
    if let Some(json) = json {
        command.arg("--json");
        command.arg(path::absolute(json).context("make the figures' path absolute")?);
    }
    let status = command.current_dir(cargo::root()).status().context("run the benchmark")?;
    ensure!(status.success(), "the benchmark failed: {status}");
    Ok(())
}
