//! Table tests of the four programs: packets through `BPF_PROG_TEST_RUN`, every rewritten byte,
//! every checksum, every counter and every flow looked at.
//!
//! Real interfaces, the real backend, the loaded programs; no traffic. Each test has a network
//! namespace of its own, which the main thread enters, so tests run one after the other on it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that fails says so by panicking")]

use std::process::ExitCode;

use anyhow::Result;
use libtest_mimic::{Arguments, Trial};
use netdp_tests::runtime::isolate;

mod datagram;
mod fixture;
mod journeys;

/// Tests by name.
macro_rules! trials {
    ($($module:ident: $($name:ident),+;)+) => {
        &[$($((concat!(stringify!($module), "::", stringify!($name)), $module::$name)),+),+]
    };
}

const TRIALS: &[(&str, fn() -> Result<()>)] = trials! {
    journeys:
        a_container_reaches_the_world_as_the_uplink,
        a_container_reaches_the_world_through_an_uplink_without_ethernet,
        a_fixed_source_address_is_kept,
        a_container_keeps_its_address_where_masquerade_is_off,
        a_published_port_answers_the_world,
        an_unprotected_network_is_dialled_directly,
        a_routed_network_is_dialled_at_published_ports_and_pinged,
        a_published_port_answers_other_networks,
        a_published_port_answers_its_own_network,
        a_published_port_answers_its_own_network_without_icc,
        a_container_reaches_its_own_published_port_as_the_gateway;
};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Namespaces belong to threads, and this one is in the right place.
    arguments.test_threads = Some(1);
    if !arguments.list
        && let Err(error) = isolate()
    {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    let trials = TRIALS.iter().map(|&(name, test)| {
        Trial::test(name, move || test().map_err(|error| format!("{error:#}").into()))
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
