//! What traffic costs with netdp and with what people have instead, side by side.
//!
//! All systems stand at once, each in namespaces of its own, and take turns: in each round every load
//! is put on one after the other, so that what disturbs the machine disturbs all of them. With an
//! argument only loads whose names hold it.

use std::iter;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use load::Seats;
use metric::{BULK, Conditions, Load, Numbers, PORTS, STEADY};
use netdp_tests::bench::{Cpu, Options, exit_code};
use netdp_tests::figures;
use netdp_tests::lab::Offload;
use netdp_tests::runtime::isolate;
use system::{Stand, System};

mod load;
mod metric;
mod peers;
mod plot;
mod report;
mod rules;
mod system;

/// How often each load is put on each system, and for how long.
struct Plan {
    rounds: usize,
    window: Duration,
    ports: &'static [u16],
}

const WHOLE: Plan = Plan { rounds: 11, window: Duration::from_millis(400), ports: &PORTS };
const QUICK: Plan = Plan { rounds: 1, window: Duration::from_millis(100), ports: &[1, 1000] };

fn main() -> ExitCode {
    exit_code(run())
}

fn run() -> Result<()> {
    let options = Options::read()?;
    let plan = if options.is_quick { QUICK } else { WHOLE };
    isolate()?;
    let cpus = Cpu::all()?;
    let [client, server, ..] = cpus[..] else {
        bail!("measure with one CPU: client and server want one each")
    };
    let conditions = Conditions { seats: Seats { client, server }, window: plan.window };
    let mut loads = STEADY.to_vec();
    loads.extend(plan.ports.iter().map(|ports| Load::Connections(*ports)));
    loads.retain(|load| options.wants(&load.name()));
    println!(
        "clients on CPU {}, servers on CPU {}, {} rounds of {} ms",
        client.number(),
        server.number(),
        plan.rounds,
        plan.window.as_millis()
    );
    let mut numbers = Numbers::default();
    measure(Offload::On, &loads, &plan, conditions, &mut numbers)?;
    // Segments that no interface cuts are 64 kB: the same with packets as they are on a wire.
    loads.retain(|load| BULK.contains(load));
    measure(Offload::Off, &loads, &plan, conditions, &mut numbers)?;
    report::print(&numbers);
    report::print_goals(&numbers);
    if let Some(directory) = &options.plots {
        plot::draw(directory, &numbers)?;
    }
    match &options.json {
        Some(path) => figures::write(path, &numbers.figures()),
        None => Ok(()),
    }
}

/// Puts every load on every system, round by round.
///
/// What costs more with more ports stands once for each number of them: to publish thousands takes some
/// systems longer than all rounds.
fn measure(
    offload: Offload,
    loads: &[Load],
    plan: &Plan,
    conditions: Conditions,
    numbers: &mut Numbers,
) -> Result<()> {
    if loads.is_empty() {
        return Ok(());
    }
    let many = loads.iter().filter_map(|load| match load {
        Load::Connections(ports) if *ports > 1 => Some(*ports),
        _ => None,
    });
    let stands = build(offload, &iter::once(1).chain(many).collect::<Vec<_>>())?;
    for round in 1..=plan.rounds {
        eprintln!("round {round} of {}, offloads {offload:?}", plan.rounds);
        for load in loads {
            for stand in stands.iter().filter(|stand| load.is_for(stand)) {
                load.measure(stand, conditions, numbers)
                    .with_context(|| format!("{}, {}", stand.system().name(), load.name()))?;
            }
        }
    }
    Ok(())
}

/// Every system that can be had here, with each of these numbers of published ports.
fn build(offload: Offload, ports: &[u16]) -> Result<Vec<Stand>> {
    let mut stands = Vec::new();
    for system in System::ALL {
        if let Some(reason) = system.missing() {
            eprintln!("without {}: {reason}", system.name());
            continue;
        }
        for &ports in ports.iter().filter(|ports| system.has_ports(**ports)) {
            stands.push(Stand::build(system, ports, offload)?);
        }
    }
    Ok(stands)
}
