//! Many containers, one after the other: none leaves anything, and how long each takes to start.

use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netdp_tests::backend::{Backend, Firewall};
use netdp_tests::docker::IMAGE;

use super::Scene;

/// Names the number of containers.
const COUNT_VARIABLE: &str = "NETDP_CONTAINERS";
/// Enough for a median, and for what each leaves to add up.
const DEFAULT_COUNT: usize = 20;
/// Docker's own and ours, which take turns.
const DRIVERS: [&str; 2] = ["bridge", "netdp"];

fn count() -> Result<usize> {
    match env::var(COUNT_VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("read {COUNT_VARIABLE}={text}")),
        Err(_) => Ok(DEFAULT_COUNT),
    }
}

pub(super) fn many_containers_leave_nothing(scene: &Scene) -> Result<()> {
    scene.docker("network create --driver netdp crowd")?;
    for number in 0..count()? {
        start(scene, number, "crowd")?;
    }
    scene.docker("network rm crowd")?;
    scene.expect_nothing_left()
}

/// On a host of its own, where Docker makes its rules, as most do: what its own bridge costs there.
pub(super) fn start_is_timed_beside_dockers_own_bridge(_: &Scene) -> Result<()> {
    let scene = Scene::start(Backend::Ebpf, Firewall::Iptables)?;
    let result = timed(&scene).with_context(|| scene.docker.log_tail());
    scene.lab.explain(result)
}

fn timed(scene: &Scene) -> Result<()> {
    for driver in DRIVERS {
        scene.docker(&format!("network create --driver {driver} by-{driver}"))?;
    }
    let mut times = DRIVERS.map(|_| Vec::new());
    for number in 0..count()? {
        for (driver, times) in DRIVERS.iter().zip(&mut times) {
            times.push(start(scene, number, &format!("by-{driver}"))?);
        }
    }
    let [dockers, ours] = &times;
    ensure!(!ours.is_empty(), "no container was started");
    for (driver, times) in DRIVERS.iter().zip(&times) {
        let median = median(times.iter().map(Duration::as_secs_f64));
        println!("docker run, driver {driver}: median of {} is {median:.0} ms", times.len());
    }
    // Neighbours in time, so that what else goes on is the same for both.
    let more =
        dockers.iter().zip(ours).map(|(theirs, ours)| ours.as_secs_f64() - theirs.as_secs_f64());
    println!(
        "docker run, netdp's less Docker's: median of the differences is {:.1} ms",
        median(more)
    );
    Ok(())
}

/// The median of what is given in seconds, in milliseconds.
fn median(seconds: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = seconds.map(|seconds| seconds * 1e3).collect();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Starts a container that publishes a port, and removes it; how long the start took.
fn start(scene: &Scene, number: usize, network: &str) -> Result<Duration> {
    let options = format!("--name c{number} --network {network} --publish 8080:80");
    let begun = Instant::now();
    scene.docker(&format!("run --detach {options} {IMAGE} /bin/busybox sleep 1d"))?;
    let took = begun.elapsed();
    scene.docker(&format!("rm --force c{number}"))?;
    Ok(took)
}
