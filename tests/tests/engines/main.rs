//! Whoever has netdp do the networks of containers, and gets what the command line gives: each by its
//! own protocol, with real packets.

mod cni;
mod docker;
mod netavark;
mod page;
mod podman;
mod run;

use std::process::ExitCode;

use netdp_tests::harness::{run_in_order, run_trials, trials};

fn main() -> ExitCode {
    let protocols = trials(&[run::TESTS, cni::TESTS, netavark::TESTS].concat());
    let by_plugins = run_trials([protocols, podman::trials()].into_iter().flatten().collect());
    let docker = docker::Stage::default();
    let by_driver = run_in_order(docker.trials());
    // What the trials shared ends here, not with the process.
    docker.end();
    if by_plugins == ExitCode::SUCCESS { by_driver } else { by_plugins }
}
