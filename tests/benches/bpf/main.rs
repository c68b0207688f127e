//! What a packet costs in the programs themselves, without the kernel around them.
//!
//! Every figure is nanoseconds for one packet in one program, over thousands of flows that take
//! turns, less what the taking of turns costs. All cases run once in each round; with an argument
//! like "established out, tcp over ipv4" only those whose names hold it.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use cases::Case;
use fixture::Fixture;
use netdp_common::{
    addr::Be32,
    flow::{FLOWS_DEFAULT, Flow, FlowKey},
};
use netdp_tests::{bpf::BareFlows, runtime::isolate};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    unistd::Pid,
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
/// Rounds of a quick one.
const QUICK_ROUNDS: usize = 15;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let (mut rounds, mut json, mut only) = (ROUNDS, None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => rounds = QUICK_ROUNDS,
            "--json" => {
                json = Some(PathBuf::from(arguments.next().context("--json wants a file")?))
            }
            // Cargo says this to every benchmark.
            "--bench" => {}
            other if other.starts_with('-') => bail!("unknown argument {other}"),
            other => only = Some(other.to_owned()),
        }
    }
    isolate()?;
    let pauses = match &only {
        // Most of the time goes into opening the flows.
        Some(only) if !"collection".contains(only.as_str()) => Vec::new(),
        _ => collection::measure()?,
    };
    Cpu::here()?.stay()?;
    let fixture = &mut Fixture::new(FLOWS_DEFAULT)?;
    let wanted = |place: &cases::Place| {
        only.as_ref().is_none_or(|only| place.to_string().contains(only.as_str()))
    };
    let established = cases::established(fixture, wanted)?;
    let mut series = measure(fixture, &established, rounds)?;
    fixture.remove_halves(|_| true)?;
    series.extend(measure(fixture, &cases::new(wanted)?, rounds)?);
    report::print(&series);
    let mut others = pauses;
    others.push(floor(rounds)?);
    if let Some(path) = json {
        report::write(&path, &series, others)?;
    }
    Ok(())
}

/// What no program that opens flows of two halves can do without, over IPv4.
fn floor(rounds: usize) -> Result<report::Figure> {
    let (key, half) = (size_of::<FlowKey<Be32>>() as u32, size_of::<Flow<Be32>>() as u32);
    let bare = BareFlows::new(FLOWS_DEFAULT, key, half)?;
    let nanos = (0..rounds).map(|_| bare.measure(cases::NEW)).collect::<Result<_>>()?;
    Ok(report::floor(nanos, cases::NEW))
}

/// A CPU that the process may use. Another one has other caches.
#[derive(Clone, Copy)]
pub(crate) struct Cpu(usize);

impl Cpu {
    fn here() -> Result<Self> {
        Ok(Self(sched_getcpu()?))
    }

    pub(crate) fn all() -> Result<Vec<Self>> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("ask for CPUs")?;
        let is_allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
        Ok((0..CpuSet::count()).filter(is_allowed).map(Self).collect())
    }

    /// Keeps this thread there.
    pub(crate) fn stay(self) -> Result<()> {
        let mut here = CpuSet::new();
        here.set(self.0)?;
        sched_setaffinity(Pid::from_raw(0), &here).context("stay on one CPU")
    }
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
