//! What a packet costs in the programs themselves, without the kernel around them.
//!
//! Every figure is nanoseconds for one packet in one program, over thousands of flows that take
//! turns, less what the taking of turns costs. All cases run once in each round; with an argument
//! like "established out, tcp over ipv4" only those whose names hold it.

use std::process::ExitCode;

use anyhow::{Context, Result};
use cases::{Age, Case, SMALL};
use fixture::Fixture;
use netdp_common::flow::FLOWS_DEFAULT;
use netdp_tests::{
    bench::{Cpu, Options, exit_code},
    runtime::isolate,
};
use report::Series;

mod cases;
mod collection;
#[expect(dead_code, reason = "the suite that this belongs to uses the rest")]
#[path = "../../tests/datapath/datagram.rs"]
mod datagram;
#[expect(dead_code, reason = "the suite that this belongs to uses the rest")]
#[path = "../../tests/datapath/family.rs"]
mod family;
#[expect(dead_code, reason = "the suite that this belongs to uses the rest")]
#[path = "../../tests/datapath/fixture.rs"]
mod fixture;
#[expect(dead_code, reason = "the suite that this belongs to uses the rest")]
#[path = "../../tests/datapath/halves.rs"]
mod halves;
#[path = "../../tests/datapath/host.rs"]
mod host;
mod report;
#[path = "../../tests/datapath/standard.rs"]
mod standard;

/// Rounds of a whole run.
const ROUNDS: usize = 100;
/// Rounds of a quick one: to see that it runs.
const QUICK_ROUNDS: usize = 1;

fn main() -> ExitCode {
    exit_code(run())
}

fn run() -> Result<()> {
    let options = Options::read()?;
    let rounds = if options.is_quick { QUICK_ROUNDS } else { ROUNDS };
    isolate()?;
    // Most of the time goes into opening the flows.
    let pauses = if options.wants("collection") {
        collection::measure(options.is_quick)?
    } else {
        Vec::new()
    };
    Cpu::here()?.stay()?;
    let mut fixture = settled(FLOWS_DEFAULT)?;
    // Whether it runs, TCP over IPv4 tells as well as all of them.
    let is_quick_enough = |place: &cases::Place| {
        !options.is_quick || (place.protocol, place.family) == ("tcp", "ipv4")
    };
    let wanted = |place: &cases::Place| is_quick_enough(place) && options.wants(&place.to_string());
    let established = cases::established(&mut fixture, wanted)?;
    let mut series = measure(&mut fixture, &established, rounds)?;
    fixture.remove_flows()?;
    series.extend(measure(
        &mut fixture,
        &cases::new(&[Age::New, Age::NewInCold], wanted)?,
        rounds,
    )?);
    drop(fixture);
    let small = cases::new(&[Age::NewInSmall], wanted)?;
    if !small.is_empty() {
        series.extend(measure(&mut settled(SMALL)?, &small, rounds)?);
    }
    report::print(&series);
    if let Some(path) = &options.json {
        report::write(path, &series, pauses)?;
    }
    Ok(())
}

/// A host with room for so many flows, of which no socket has a port that source NAT chooses.
fn settled(flows: u32) -> Result<Fixture> {
    let mut fixture = Fixture::new(flows)?;
    fixture.settle_claims()?;
    Ok(fixture)
}

/// Runs every case once in each round.
fn measure(fixture: &mut Fixture, cases: &[Case], rounds: usize) -> Result<Vec<Series>> {
    let mut series: Vec<_> = cases.iter().map(|case| Series::new(case.place())).collect();
    for _ in 0..rounds {
        for (case, series) in cases.iter().zip(&mut series) {
            let nanos = case.measure(fixture).with_context(|| case.place().to_string())?;
            series.add(nanos, case.runs());
        }
    }
    Ok(series)
}
