//! The `netdp` binary: agent, command line, and plugins of container runtimes under names of their own.

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    let called = env::args_os().next().unwrap_or_default();
    match netdp::integrations::plugin(&called) {
        Some(plugin) => plugin(),
        None => netdp::cli::run(),
    }
}
