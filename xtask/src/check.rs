//! What must hold before a commit and needs no root: formatting, lints, unit tests, tidy.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::process::run_quiet;
use crate::{cargo, setup, tidy};

/// The crates with unit tests that run on any host.
pub(crate) const UNIT_TESTED: [&str; 10] = [
    "--lib",
    "--bins",
    "--package",
    "netdp-common",
    "--package",
    "netdp",
    "--package",
    "netdp-tests",
    "--package",
    "xtask",
];

/// Runs every check, also after one has failed, so that one run names all that is wrong.
pub(crate) fn run() -> Result<()> {
    setup::run(setup::Scope::Toolchain)?;
    let mut failed = Vec::new();
    for (name, mut command) in commands() {
        let started = Instant::now();
        match run_quiet(name, &mut command) {
            Ok(_) => println!("ok: {name} ({:.1} s)", started.elapsed().as_secs_f32()),
            Err(error) => {
                eprintln!("{error:#}");
                failed.push(name);
            }
        }
    }
    let findings = tidy::findings(cargo::root())?;
    for finding in &findings {
        eprintln!("{finding}");
    }
    if findings.is_empty() {
        println!("ok: tidy");
    } else {
        failed.push("tidy");
    }
    ensure!(failed.is_empty(), "check failed: {}", failed.join(", "));
    Ok(())
}

fn commands() -> Vec<(&'static str, Command)> {
    let lint = ["--", "--deny", "warnings"];
    let mut host = cargo::command(&["clippy", "--locked", "--workspace", "--all-targets"]);
    host.args(["--exclude", "netdp-ebpf"]).args(lint);
    // Its own target directory: other flags would evict the main build's cache.
    let mut ebpf = cargo::command(&["clippy", "--locked", "--package", "netdp-ebpf", "--release"]);
    ebpf.args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
        .args(lint)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_DIR", cargo::side_target_dir("ebpf-check"));
    let mut unit = cargo::command(&["test", "--locked"]);
    unit.args(UNIT_TESTED);
    vec![
        ("formatting", cargo::command(&["fmt", "--all", "--check"])),
        ("lints", host),
        ("lints of the BPF programs", ebpf),
        ("unit tests", unit),
    ]
}
