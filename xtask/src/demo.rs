//! Building and running the demo, whose steps are the tests crate's business.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process::{as_root, ensure_root};
use crate::{cargo, setup};

/// Shows the demo at this terminal. `keep` leaves its lab standing.
pub(crate) fn run(keep: bool) -> Result<()> {
    setup::run(setup::Scope::Everything)?;
    let mut demo = command(&netdp_binary()?)?;
    if keep {
        demo.arg("--keep");
    }
    ensure_root("the demo's lab of network namespaces")?;
    let status = demo.status().context("run the demo")?;
    ensure!(status.success(), "the demo failed: {status}");
    Ok(())
}

/// Builds the agent and returns its path, which tests and demo run.
pub(crate) fn netdp_binary() -> Result<PathBuf> {
    netdp_built_as("dev")
}

/// As [`netdp_binary`], by another of the workspace's profiles.
pub(crate) fn netdp_built_as(profile: &str) -> Result<PathBuf> {
    let arguments = ["build", "--package", "netdp", "--profile", profile];
    cargo::build_one("build netdp", "netdp", &arguments)
}

/// Builds the demo and returns the command that runs it with the agent `netdp`, as root.
pub(crate) fn command(netdp: &Path) -> Result<Command> {
    let arguments = ["build", "--package", "netdp-tests", "--bin", "demo"];
    let demo = cargo::build_one("build the demo", "demo", &arguments)?;
    as_root(&demo, &[("NETDP_BIN", netdp.as_os_str())])
}
