//! Whoever has netdp do the networks of containers, and gets what the command line gives: each by its
//! own protocol, with real packets.

mod cni;
mod page;
mod run;

use std::process::ExitCode;

use netdp_tests::harness::run_tests;

fn main() -> ExitCode {
    let tests = [run::TESTS, cni::TESTS];
    run_tests(&tests.concat())
}
