//! The list of development commands. Each command lives in the file of its name; this one
//! only parses arguments and turns an error into one line and an exit status.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

mod apt;
mod bench;
mod cargo;
mod check;
mod demo;
mod docker;
mod mask;
mod process;
mod rust_src;
mod setup;
mod test;
mod tidy;
mod vm;

/// netdp's development commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building and testing need and this machine misses
    Setup,
    /// Formatting, lints, unit tests and the tree's own rules: no root needed
    Check,
    /// Run test suites (all by default); packets flow in namespaces of the tests' own
    Test {
        /// Suites to run
        #[arg(value_enum)]
        suites: Vec<test::Suite>,
        /// Write the conformance results to FILE: a list of {id, backend, family, result, reason}
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
    /// Run suites on other kernels, in virtual machines
    Vm {
        /// The kernel's line
        #[arg(long, value_enum)]
        kernel: vm::Choice,
        /// Suites to run (load by default)
        #[arg(value_enum)]
        suites: Vec<test::Suite>,
        /// Run only tests whose names contain WORD
        #[arg(long, value_name = "WORD")]
        only: Option<String>,
        /// Leave out tests whose names contain WORD
        #[arg(long, value_name = "WORD")]
        skip: Vec<String>,
        /// Leave out what has passed on the kernel since the last whole run began
        #[arg(long)]
        resume: bool,
        /// Take from the kernel what attaches eBPF to interfaces, and give the machine iptables
        #[arg(long)]
        without_ebpf: bool,
        /// End a machine that is not over after this long
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<u64>,
    },
    /// Measure, in namespaces of its own
    Bench {
        /// What to measure (everything by default)
        #[arg(value_enum)]
        what: Vec<bench::Bench>,
        /// Measure only what has WORD in its name
        #[arg(long, value_name = "WORD")]
        only: Option<String>,
        /// Write the figures to FILE: a list of {metric, system, unit, median, p50, p99, ci95, …}
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Few rounds, wide intervals: to see that it runs
        #[arg(long)]
        quick: bool,
    },
    /// Run frames that make no sense through the BPF programs
    Fuzz {
        /// How long
        #[arg(long, default_value_t = 60)]
        seconds: u32,
        /// Add inputs that led to something new to the corpus
        #[arg(long)]
        keep: bool,
    },
    /// Show the main job on real traffic in a lab of namespaces
    Demo {
        /// Leave the lab standing and say how to enter it
        #[arg(long)]
        keep: bool,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Task::Setup => setup::run(setup::Scope::Everything)?,
        Task::Check => check::run()?,
        Task::Test { suites, json } => {
            let suites = test::selection(&suites);
            if json.is_some() && !suites.contains(&test::Suite::Conformance) {
                let message = "--json holds conformance results: name the suite conformance too";
                Cli::command().error(ErrorKind::ArgumentConflict, message).exit()
            }
            return test::run(&suites, json.as_deref());
        }
        Task::Vm { kernel, mut suites, only, skip, resume, without_ebpf, timeout } => {
            if suites.is_empty() {
                suites.push(test::Suite::Load);
            }
            if let Some(suite) = suites.iter().find(|suite| !suite.is_executable()) {
                let message = format!("{} is no suite for a virtual machine", suite.name());
                Cli::command().error(ErrorKind::InvalidValue, message).exit()
            }
            let limit = timeout.map(Duration::from_secs);
            let (filter, skipped) = (only.as_deref(), &skip[..]);
            let suites = &suites[..];
            let options = vm::Options { suites, filter, skipped, resume, limit, without_ebpf };
            return vm::run(kernel, &options);
        }
        Task::Bench { what, only, json, quick } => {
            let (only, json) = (only.as_deref(), json.as_deref());
            bench::run(&what, bench::Options { only, is_quick: quick, json })?;
        }
        Task::Fuzz { seconds, keep } => return test::fuzz(seconds, keep),
        Task::Demo { keep } => demo::run(keep)?,
    }
    Ok(ExitCode::SUCCESS)
}
