//! The pair that waits with its program for the next container.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use netdp_tests::probe::expect_same;
use netdp_tests::runtime::poll_until;
use serde_json::{Value, json};

use super::{NOTICED, Scene};

/// How often the agent is killed while it makes a pair.
const KILLS: usize = 5;

impl Scene {
    /// A link of the host by its name, with all that is to be said of it.
    fn link(&self, name: &str) -> Result<Option<Value>> {
        let links = self.lab.host().ip_json(&["link", "show"])?;
        let mut links = links.as_array().into_iter().flatten();
        Ok(links.find(|link| link["ifname"] == name).cloned())
    }

    /// Whether a program waits at an interface for what a container sends: a link that is pinned, or the
    /// note of a qdisc where the kernel has no such links.
    fn is_guarded(&self, ifindex: u64) -> bool {
        let links: PathBuf =
            self.lab.bpffs().join(format!("netdp/v{}/links", netdp_common::abi::ABI));
        [format!("from_container-{ifindex}"), format!("clsact-{ifindex}")]
            .iter()
            .any(|name| links.join(name).exists())
    }

    /// ifindex of the blank, once it is whole and has its program.
    fn blank(&self) -> Result<u64> {
        poll_until(NOTICED, "a blank", || {
            let Some(link) = self.link("ndv0")? else { return Ok(None) };
            let ifindex = link["ifindex"].as_u64().context("read an ifindex")?;
            let is_whole = link["ifalias"] == "netdp blank" && self.link("ndc0")?.is_some();
            Ok((is_whole && self.is_guarded(ifindex)).then_some(ifindex))
        })
    }
}

pub(super) fn the_blank_becomes_the_next_container(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    // Which the world has a route to.
    scene.docker("network create --driver netdp --subnet 172.20.0.0/24 web")?;
    let first = scene.blank()?;
    let link = scene.link("ndv0")?.context("find the blank")?;
    expect_same("the blank's state", &link["operstate"], &json!("DOWN"))?;
    let web = scene.run("web1", "--network web --publish 8080:80")?;
    let network = scene.network("web")?;
    let name = network["endpoints"][0]["host_interface"].as_str().context("read a name")?;
    let link = scene.link(name)?.with_context(|| format!("find {name}"))?;
    expect_same("the container's interface", &link["ifindex"].as_u64(), &Some(first))?;

    let address = scene.address(&web, "web")?;
    let _server = web.namespace.tcp_server("web1", (address, 80))?;
    scene.lab.outside().tcp((net.host, 8080)).exchange()?.by("web1")?;
    let _outside = scene.lab.outside().tcp_server("outside", (net.outside, 7))?;
    web.namespace.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
    let before = scene.lab.counters()?;
    scene.lab.outside().tcp((address, 80)).dropped()?;
    scene.lab.counters()?.expect_moved(&before, "direct_access", &[])?;

    let second = scene.blank()?;
    ensure!(second != first, "the next blank has the ifindex of the first, {first}");
    // None is kept for a host that no engine has a network on.
    scene.docker("rm --force web1")?;
    scene.docker("network rm web")?;
    scene.expect_nothing_left()?;
    ensure!(!scene.is_guarded(second), "a program is left at ifindex {second}");
    Ok(())
}

pub(super) fn the_blank_outlives_the_agent(scene: &Scene) -> Result<()> {
    let agent = scene.lab.agent()?;
    scene.docker("network create --driver netdp web")?;
    let before = scene.blank()?;
    agent.kill9()?;
    ensure!(scene.is_guarded(before), "the blank has lost its program");
    agent.start()?;
    expect_same("the blank", &scene.blank()?, &before)?;
    scene.run("web1", "--network web")?;
    ensure!(scene.blank()? != before, "the blank is not used");
    Ok(())
}

pub(super) fn the_agent_may_die_while_it_makes_a_blank(scene: &Scene) -> Result<()> {
    let agent = scene.lab.agent()?;
    scene.docker("network create --driver netdp web")?;
    for _ in 0..KILLS {
        scene.blank()?;
        // One that goes while the agent is there is not followed by another for a while.
        agent.kill9()?;
        scene.lab.host().ip("link delete ndv0\n")?;
        agent.start()?;
        // As soon as there is something of it.
        poll_until(NOTICED, "a pair", || scene.link("ndv0"))?;
        agent.kill9()?;
        agent.start()?;
        expect_same("troubles", &scene.lab.json(&["status"])?["troubles"], &json!([]))?;
    }
    scene.blank()?;
    let links = scene.lab.host().links()?;
    let ends = links.iter().filter(|name| name.starts_with("ndv") || name.starts_with("ndc"));
    expect_same("ends of pairs", &ends.count(), &2)?;
    scene.run("web1", "--network web").map(drop)
}
