//! `netdp publish` and `netdp unpublish`: ports of the host that lead into containers.

use std::{fmt, net::IpAddr};

use anyhow::Result;
use clap::{Args, builder::NonEmptyStringValueParser};
use hyper::Method;

use super::{print, print_json};
use crate::api::{
    client::{self, Client},
    wire,
};

#[derive(Args, Debug)]
pub(super) struct Publish {
    #[command(flatten)]
    what: What,
    /// Print the published ports as a JSON list
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(super) struct Unpublish {
    #[command(flatten)]
    what: What,
}

#[derive(Args, Debug)]
struct What {
    /// The endpoint
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    name: String,
    /// Its network, where the name alone is not enough
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// Port of the host and port of the container; an IPv6 HOSTIP is written in brackets
    #[arg(
        long = "publish",
        short = 'p',
        value_name = "[[HOSTIP:]HOST[-END]:]PORT[-END][/tcp|udp|sctp]",
        required = true
    )]
    ports: Vec<String>,
}

impl From<What> for wire::Publish {
    fn from(what: What) -> Self {
        Self { name: what.name, network: what.network, ports: what.ports }
    }
}

impl Publish {
    pub(super) async fn run(self, client: &Client) -> Result<()> {
        let request = wire::Publish::from(self.what);
        let path = client::path(&["publish"]);
        let ports: Vec<wire::Published> = client.send(Method::POST, &path, &request).await?;
        if self.json {
            return print_json(&ports);
        }
        note_loopback(&ports);
        print(&ports.iter().map(|port| format!("{port}\n")).collect::<String>())
    }
}

/// Says what an SCTP port on a loopback address is good for: nothing, because the kernel asks no
/// program about an SCTP socket that dials, and nobody else gets there.
pub(super) fn note_loopback(ports: &[wire::Published]) {
    let is_loopback = |port: &&wire::Published| {
        port.host_ip.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    };
    for port in ports.iter().filter(is_loopback).filter(|port| port.protocol == "sctp") {
        eprintln!("netdp: note: {port}: the host can't dial published SCTP ports");
    }
}

impl Unpublish {
    pub(super) async fn run(self, client: &Client) -> Result<()> {
        let request = wire::Publish::from(self.what);
        let path = client::path(&["unpublish"]);
        let _removed: Vec<wire::Published> = client.send(Method::POST, &path, &request).await?;
        Ok(())
    }
}

/// As `docker ps` writes it.
impl fmt::Display for wire::Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, host_ip, host_port, container_port } = self;
        if host_ip.contains(':') {
            return write!(f, "[{host_ip}]:{host_port}->{container_port}/{protocol}");
        }
        write!(f, "{host_ip}:{host_port}->{container_port}/{protocol}")
    }
}
