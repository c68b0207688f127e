//! Random stories of packets, time, losses and an agent, through the loaded programs and through a
//! small model of what they should do: after every event the flow table, every byte and every drop
//! are what the model says.
//!
//! A story that fails is shortened to the events that matter. `NETDP_SEED` repeats the stories of a
//! run; the ports that the programs choose and the order in which two CPUs come are new each time.

use std::{cell::RefCell, process::ExitCode};

use anyhow::{Result, anyhow, bail, ensure};
use event::{Event, story};
use family::{FAMILIES, Family};
use libtest_mimic::{Arguments, Trial};
use netdp_tests::runtime::{isolate, seed};
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner};
use stage::Stage;

#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/datagram.rs"]
mod datagram;
mod event;
#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/family.rs"]
mod family;
#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/fixture.rs"]
mod fixture;
#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/halves.rs"]
mod halves;
#[path = "../datapath/host.rs"]
mod host;
#[expect(dead_code, reason = "shared with the datapath tests, which need more of it")]
#[path = "../datapath/icmp_error.rs"]
mod icmp_error;
mod letter;
mod model;
mod stage;
#[path = "../datapath/standard.rs"]
mod standard;

/// Stories for each family, of 40 events on average.
const STORIES: u32 = 1350;
/// Events that each family gets at least.
const EVENTS: usize = 50_000;
/// Attempts to shorten a story that failed.
const SHRINKS: u32 = 2000;

fn stories_hold(family: Family, seed: u64) -> Result<()> {
    let stage = RefCell::new(Stage::build(family)?);
    let mut runner = TestRunner::new(Config {
        cases: STORIES,
        max_shrink_iters: SHRINKS,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(seed),
        ..Config::default()
    });
    let outcome = runner.run(&story(), |story| {
        stage.borrow_mut().play(&story).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    let stage = stage.into_inner();
    println!("{}: {}", family.name(), stage.summary());
    match outcome {
        Ok(()) => {
            ensure!(stage.events >= EVENTS, "{} events are too few", stage.events);
            Ok(())
        }
        Err(TestError::Fail(reason, story)) => bail!(
            "{reason}\nthe shortest story that fails (NETDP_SEED={seed}):\n{}",
            listed(&story)
        ),
        Err(error) => Err(anyhow!("NETDP_SEED={seed}: {error}")),
    }
}

fn listed(story: &[Event]) -> String {
    story.iter().map(|event| format!("    {event:?}\n")).collect()
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Namespaces belong to threads, and this one is in the right place.
    arguments.test_threads = Some(1);
    let mut trials: Vec<_> = model::TESTS
        .iter()
        .map(|&(name, test)| {
            Trial::test(name, move || test().map_err(|error| format!("{error:#}").into()))
        })
        .collect();
    if !arguments.list {
        match isolate().and_then(|()| seed()) {
            Ok(seed) => trials.extend(FAMILIES.iter().map(|&family| {
                Trial::test(format!("stories_hold/{}", family.name()), move || {
                    stories_hold(family, seed).map_err(|error| format!("{error:#}").into())
                })
            })),
            Err(error) => {
                eprintln!("error: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
