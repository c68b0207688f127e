//! Many containers, one after the other: none leaves anything, and how long each takes to start.

use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netdp_tests::docker::IMAGE;

use super::Scene;

/// Names the number of containers.
const COUNT_VARIABLE: &str = "NETDP_CONTAINERS";
/// Enough for a median.
const DEFAULT_COUNT: usize = 10;

pub(super) fn many_containers_leave_nothing(scene: &Scene) -> Result<()> {
    let count = match env::var(COUNT_VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("read {COUNT_VARIABLE}={text}"))?,
        Err(_) => DEFAULT_COUNT,
    };
    // Docker's own first, then netdp's, then both once more: whatever is slow at first is nobody's.
    let mut medians = Vec::new();
    for driver in ["bridge", "netdp", "bridge", "netdp"] {
        let create = format!("network create --driver {driver} crowd");
        scene.docker(&create)?;
        medians.push((driver, median_start(scene, count / 2)?));
        scene.docker("network rm crowd")?;
        scene.expect_nothing_left()?;
    }
    for (driver, median) in medians {
        println!("docker run, driver {driver}: median {} ms", median.as_millis());
    }
    Ok(())
}

/// Starts containers that publish a port, and removes them.
fn median_start(scene: &Scene, count: usize) -> Result<Duration> {
    let mut times = Vec::new();
    for number in 0..count.max(1) {
        let options = format!("--name c{number} --network crowd --publish 8080:80");
        let begun = Instant::now();
        scene.docker(&format!("run --detach {options} {IMAGE} /bin/busybox sleep 1d"))?;
        times.push(begun.elapsed());
        scene.docker(&format!("rm --force c{number}"))?;
    }
    times.sort();
    times.get(times.len() / 2).copied().context("start a container")
}
