//! What traffic notices of the collection of a large table: the longest time in which no packet got
//! through, with and without a collection beside it.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use netdp::dataplane::Dataplane;
use netdp_common::config::Timeouts;
use netdp_tests::{
    bench::Cpu,
    bpf::{self, Checksum, Rotation},
    figures::Figure,
    packet::ETHERNET_BYTES,
};

use crate::{
    datagram::{Datagram, Kind},
    family::Family,
    fixture::{Fixture, HOST, from_outside_wire, from_uplink},
    report::SYSTEM,
};

/// Flows in the table, and in that of a quick run.
const FLOWS: u32 = 1_000_000;
const QUICK_FLOWS: u32 = 100_000;
/// Flows opened by one rotation.
const BATCH: u32 = 50_000;

/// The longest pauses of traffic: beside nothing, beside a collection that finds nothing, and beside
/// one that removes everything.
pub(crate) fn measure(is_quick: bool) -> Result<Vec<Figure>> {
    let flows = if is_quick { QUICK_FLOWS } else { FLOWS };
    // The thread that measures wants a CPU that the collection does not use.
    let cpus = Cpu::all()?;
    let traffic = *cpus.last().context("find a CPU")?;
    cpus[0].stay()?;
    let fixture = &mut Fixture::new(flows + 1)?;
    fixture.set_collection(Timeouts::RFC, true)?;
    let begun = Instant::now();
    for batch in 0..flows / BATCH {
        open(fixture, batch)?;
    }
    let filled = begun.elapsed();
    let mut figures = Vec::new();
    let idle = beside(fixture, traffic, |_| {
        stay_parked(Duration::from_secs(2));
        Ok(())
    })?;
    figures.push(pause("beside_nothing", idle.0));
    let looked = beside(fixture, traffic, |fixture| {
        let removed = fixture.backend().collect()?;
        ensure!(removed == 0, "{removed} flows were collected, none was idle");
        Ok(())
    })?;
    figures.push(pause("beside_a_look", looked.0));
    // All of them idle, as far as the collection is told.
    let mut short = Timeouts::RFC;
    short.udp_unreplied = 0;
    stay_parked(Duration::from_secs(2));
    fixture.set_collection(short, true)?;
    let emptied = beside(fixture, traffic, |fixture| {
        let removed = fixture.backend().collect()?;
        ensure!(removed + 1 >= flows as usize, "{removed} flows of {flows} were collected");
        Ok(())
    })?;
    figures.push(pause("beside_a_clearance", emptied.0));
    println!(
        "\n{flows} flows opened in {filled:.1?}; longest pause of traffic: {:.2?} beside nothing, \
         {:.2?} beside a look at all (which took {:.2?}), {:.2?} while all were collected ({:.2?})",
        idle.0, looked.0, looked.1, emptied.0, emptied.1
    );
    Ok(figures)
}

fn pause(beside: &str, longest: Duration) -> Figure {
    let pause = longest.as_secs_f64() * 1e3;
    Figure::of(&format!("longest_pause.{beside}"), SYSTEM, "ms", &[pause], 1)
}

/// Opens the flows of a batch, inwards.
fn open(fixture: &Fixture, batch: u32) -> Result<()> {
    let frames: Vec<_> = (0..BATCH)
        .map(|n| {
            let n = batch * BATCH + n;
            let client = Ipv4Addr::from(0x0b00_0001 + n / 50_000);
            let client = SocketAddrV4::new(client, 1024 + (n % 50_000) as u16);
            let wire = from_outside_wire(client, SocketAddrV4::new(HOST, 8080));
            Datagram::new(Kind::Udp, wire).frame(Family::V4)
        })
        .collect();
    let at = from_uplink("up0");
    let rotation = Rotation::new(&frames, ETHERNET_BYTES + 20 + 8)?;
    rotation.run(fixture.loaded(at)?, &fixture.context(at), BATCH)?;
    Ok(())
}

/// Waits for as long as it says: the end of a scope's thread ends one parking of ours.
fn stay_parked(time: Duration) {
    let begun = Instant::now();
    while let Some(left) = time.checked_sub(begun.elapsed()) {
        thread::park_timeout(left);
    }
}

/// The longest time between two packets of one flow while `work` is done on another CPU, and how
/// long that took.
fn beside(
    fixture: &mut Fixture,
    cpu: Cpu,
    work: impl FnOnce(&mut Fixture) -> Result<()>,
) -> Result<(Duration, Duration)> {
    let at = from_uplink("up0");
    let client = SocketAddrV4::new(Ipv4Addr::new(12, 0, 0, 1), 4000);
    let wire = from_outside_wire(client, SocketAddrV4::new(HOST, 8080));
    let frame = Datagram::new(Kind::Udp, wire).frame(Family::V4);
    let context = fixture.context(at);
    let program = fixture.loaded(at)?.try_clone_to_owned().context("keep the program")?;
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let packets = scope.spawn(|| -> Result<Duration> {
            cpu.stay()?;
            let mut longest = Duration::ZERO;
            let mut last = Instant::now();
            while !is_done.load(Ordering::Relaxed) {
                bpf::run(program.as_fd(), &frame, &context, Checksum::Unknown)?;
                let now = Instant::now();
                longest = longest.max(now - last);
                last = now;
            }
            Ok(longest)
        });
        let begun = Instant::now();
        let outcome = work(fixture);
        let took = begun.elapsed();
        is_done.store(true, Ordering::Relaxed);
        let longest = packets.join().expect("no panic")?;
        outcome?;
        Ok((longest, took))
    })
}
