//! Whoever has netdp do the networks of containers, and gets what the command line gives: each by its
//! own protocol, with real packets.

mod cni;
mod netavark;
mod page;
mod podman;
mod run;

use std::process::ExitCode;

use netdp_tests::harness::{run_trials, trials};

fn main() -> ExitCode {
    let protocols = trials(&[run::TESTS, cni::TESTS, netavark::TESTS].concat());
    run_trials([protocols, podman::trials()].into_iter().flatten().collect())
}
