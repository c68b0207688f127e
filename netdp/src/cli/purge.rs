//! `netdp purge`: the host as it was before netdp.
//!
//! Asks the agent where one runs; does the same by itself where none does.

use std::path::Path;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use hyper::Method;

use super::{agent, print};
use crate::{
    api::{
        client::{self, Client},
        wire,
    },
    config::{Config, Paths},
    controller::Controller,
    dataplane::{Program, ebpf::Ebpf, iptables::Iptables, select},
    facts::Link,
    model::Model,
    netlink::Netlink,
    store::Store,
};

#[derive(Args, Debug)]
pub(super) struct Purge {
    #[command(flatten)]
    paths: Paths,
}

impl Purge {
    pub(super) fn paths(&self) -> &Paths {
        &self.paths
    }

    /// `socket` is the one that `client` talks to.
    pub(super) async fn run(&self, client: &Client, socket: &Path) -> Result<()> {
        let purged = if client.is_answered().await {
            Some(client.order(Method::POST, &client::path(&["purge"])).await?)
        } else {
            let purged = purge_without_agent(&self.paths).await?;
            agent::remove_traces(&self.paths, socket)?;
            purged
        };
        print(&purged.map_or_else(|| "nothing of netdp is on this host\n".to_owned(), render))
    }
}

/// What was removed; `None` where there was nothing.
async fn purge_without_agent(paths: &Paths) -> Result<Option<wire::Purged>> {
    agent::check_rights()?;
    agent::claim_namespace()?;
    let has_store = Store::exists(&paths.state_dir);
    let facts = Netlink::open()?.read_facts().await?;
    if !has_store && !facts.links.values().any(Link::is_ours) {
        let had_pins = Ebpf::purge_pins(&paths.bpffs)?;
        let had_rules = Iptables::purge_rules(&Program::default())?;
        return Ok((had_pins || had_rules).then(wire::Purged::default));
    }

    let mut store = agent::open_store(paths)?;
    let model = store.load()?;
    let purged = wire::Purged::of(&model);
    // Without this the controller would first put right what is about to go.
    store.save(&model, &Model::default())?;
    let config = default_config(paths)?;
    let dataplane = agent::open_dataplane(&config)?;
    let controller = Controller::open(&config, store, Box::new(dataplane)).await?;
    let (snapshot, backend) = (controller.snapshot(), controller.backend().await?);
    controller.purge().await?;
    select::purge_others(backend.name, &snapshot.program, &paths.bpffs)?;
    Ok(Some(purged))
}

/// What an agent would work with that was told nothing but its paths.
fn default_config(paths: &Paths) -> Result<Config> {
    #[derive(Parser)]
    struct Defaults {
        #[command(flatten)]
        config: Config,
    }
    let Defaults { config } =
        Defaults::try_parse_from(["netdp"]).context("make up a configuration")?;
    Ok(Config { paths: paths.clone(), ..config })
}

fn render(purged: wire::Purged) -> String {
    let mut text = String::new();
    for endpoint in &purged.endpoints {
        text.push_str(&format!("removed endpoint {endpoint}\n"));
    }
    for network in &purged.networks {
        text.push_str(&format!("removed network {network}\n"));
    }
    if purged.published > 0 {
        text.push_str(&format!("gave back {} published ports\n", purged.published));
    }
    text + "removed programs, maps, rules and settings\n"
}
