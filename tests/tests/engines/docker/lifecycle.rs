//! What becomes of containers and their networks when agent or daemon come and go.

use std::thread;

use anyhow::{Context, Result, bail, ensure};
use netdp_tests::probe::expect_same;
use netdp_tests::runtime::poll_until;
use serde_json::json;

use super::guide::fetch;
use super::{NOTICED, Scene};

pub(super) fn agent_may_restart(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    let agent = scene.lab.agent()?;
    scene.docker("network create --driver netdp web")?;
    let web = scene.run("web1", "--network web --publish 8080:80")?;
    let address = scene.address(&web, "web")?;
    let _server = web.namespace.tcp_server("web1", (address, 80))?;
    let mut session = scene.lab.outside().tcp((net.host, 8080)).open()?;
    session.exchange(1000)?.by("web1")?;
    let before = scene.network("web")?;
    agent.kill9()?;
    session.exchange(1000)?.by("web1")?;
    scene.lab.outside().tcp((net.host, 8080)).exchange()?.by("web1")?;
    agent.start()?;
    session.exchange(1000)?.by("web1")?;
    expect_same("the network", &scene.network("web")?, &before)?;
    // What is made and removed from then on is so with what the agent found.
    scene.run("web2", "--network web --publish 8081:80")?;
    scene.docker("rm --force web1")?;
    scene.lab.outside().tcp((net.host, 8080)).refused()
}

/// Docker waits for an agent that is away. A start during which it goes away may fail, is told so, and
/// can be tried again.
pub(super) fn containers_start_while_the_agent_dies(scene: &Scene) -> Result<()> {
    const PORTS: std::ops::Range<u16> = 8100..8106;
    let agent = scene.lab.agent()?;
    scene.docker("network create --driver netdp web")?;
    let failed = thread::scope(|scope| {
        let starts: Vec<_> = PORTS
            .map(|port| {
                let options = format!("--name c{port} --network web --publish {port}:80");
                let line = format!("run --detach {options} nginx");
                (port, scope.spawn(move || scene.docker(&line)))
            })
            .collect();
        // In the middle of things.
        poll_until(NOTICED, "an endpoint", || {
            let endpoints = scene.lab.json(&["status"])?["endpoints"].as_u64();
            Ok(endpoints.filter(|endpoints| *endpoints > 0))
        })?;
        agent.kill9()?;
        agent.start()?;
        let mut failed = Vec::new();
        for (port, start) in starts {
            match start.join() {
                Ok(Ok(_)) => {}
                Ok(Err(error)) if format!("{error:#}").contains("try again") => failed.push(port),
                Ok(Err(error)) => return Err(error),
                Err(_) => bail!("a thread panicked"),
            }
        }
        Ok(failed)
    })?;
    for port in failed {
        scene.docker(&format!("start c{port}"))?;
    }
    for port in PORTS {
        fetch(scene.lab.outside(), &format!("http://10.0.0.2:{port}/"))?;
    }
    let network = scene.network("web")?;
    expect_same("endpoints", &network["endpoints"].as_array().map(Vec::len), &Some(PORTS.len()))
}

pub(super) fn interface_that_is_lost_is_not_made_again(scene: &Scene) -> Result<()> {
    scene.docker("network create --driver netdp web")?;
    scene.run("web1", "--network web --publish 8080:80")?;
    let network = scene.network("web")?;
    let link = network["endpoints"][0]["host_interface"].as_str().context("read a name")?;
    scene.lab.host().ip(&format!("link delete {link}\n"))?;
    poll_until(NOTICED, "the end of the endpoint", || {
        let network = scene.network("web")?;
        Ok((network["endpoints"] == json!([])).then_some(()))
    })?;
    let links = scene.lab.host().links()?;
    ensure!(!links.iter().any(|name| name == link), "{link} is there again");
    // Docker hears of it with the next start.
    let web = scene.docker("restart web1")?;
    ensure!(web.trim() == "web1", "docker restart: {web}");
    let network = scene.network("web")?;
    expect_same("endpoints", &network["endpoints"].as_array().map(Vec::len), &Some(1))
}

pub(super) fn daemon_may_restart(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp web")?;
    let web = scene.run("web1", "--network web --publish 8080:80 --restart always")?;
    scene.run("web2", "--network web --publish 8081:80")?;
    scene.docker.restart(&json!({}))?;
    poll_until(NOTICED, "the container's return", || {
        Ok((scene.docker("ps --quiet --filter name=web1")?.trim() != "").then_some(()))
    })?;
    scene.find_again(&web)?;
    let _server = web.namespace.tcp_server("web1", (scene.address(&web, "web")?, 80))?;
    scene.lab.outside().tcp((net.host, 8080)).exchange()?.by("web1")?;
    // Who is not to be started anew has no port any more.
    scene.lab.outside().tcp((net.host, 8081)).refused()
}

pub(super) fn containers_live_through_a_restart(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker.restart(&json!({ "live-restore": true }))?;
    scene.docker("network create --driver netdp web")?;
    let web = scene.run("web1", "--network web --publish 8080:80")?;
    let address = scene.address(&web, "web")?;
    let _server = web.namespace.tcp_server("web1", (address, 80))?;
    let mut session = scene.lab.outside().tcp((net.host, 8080)).open()?;
    session.exchange(1000)?.by("web1")?;
    let agent = scene.lab.agent()?;
    scene.docker.restart(&json!({}))?;
    session.exchange(1000)?.by("web1")?;
    agent.stop()?;
    agent.start()?;
    scene.lab.outside().tcp((net.host, 8080)).exchange()?.by("web1")?;
    let other = scene.run("web2", "--network web --publish 8081:80")?;
    let there = scene.address(&other, "web")?;
    ensure!(there != address, "two containers have {address}");
    other.namespace.tcp((address, 80)).exchange()?.by("web1")?;
    scene.docker("rm --force web1")?;
    scene.lab.outside().tcp((net.host, 8080)).refused()?;
    scene.clear()?;
    scene.docker.restart(&json!({ "live-restore": false }))
}
