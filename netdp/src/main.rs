//! The `netdp` binary: agent and command line in one.

use std::process::ExitCode;

fn main() -> ExitCode {
    netdp::cli::run()
}
