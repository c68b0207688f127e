//! Container engines as they come, with networks of netdp's: what their users type, and what then passes.

use std::process::ExitCode;

use netdp_tests::harness::run_in_order;

mod docker;

fn main() -> ExitCode {
    let docker = docker::Stage::default();
    let trials = docker.trials();
    let code = run_in_order(trials);
    // What the trials shared ends here, not with the process.
    docker.end();
    code
}
