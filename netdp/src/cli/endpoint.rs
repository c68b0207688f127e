//! `netdp connect` and `netdp disconnect`: attach a container to a network, and let go of it.

use anyhow::Result;
use clap::{Args, builder::NonEmptyStringValueParser};
use hyper::Method;

use super::{print, print_json, publish::note_loopback};
use crate::api::{
    client::{self, Client},
    wire,
};

/// How an endpoint is to be, whoever connects it.
#[derive(Args, Debug)]
pub(super) struct Wishes {
    /// Its address, one per family; the next free one where none is given
    #[arg(long = "ip", value_name = "IP")]
    pub(super) addresses: Vec<String>,
    /// Its MAC address; made from the address where none is given
    #[arg(long)]
    pub(super) mac: Option<String>,
    /// Port to publish on the host; an IPv6 HOSTIP is written in brackets
    #[arg(long, short = 'p', value_name = "[[HOSTIP:]HOST[-END]:]PORT[-END][/tcp|udp|sctp]")]
    pub(super) publish: Vec<String>,
}

#[derive(Args, Debug)]
pub(super) struct Connect {
    /// The network
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    network: String,
    /// The container's network namespace: a path, or a name under /run/netns
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    netns: String,
    /// The endpoint's name; the namespace's where none is given
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    wishes: Wishes,
    /// Name of the interface inside the container; eth0 or the next free one where none is given
    #[arg(long, value_name = "IFACE")]
    interface: Option<String>,
    /// Print the endpoint as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(super) struct Disconnect {
    /// The network
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    network: String,
    /// The endpoint
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    name: String,
}

impl Connect {
    pub(super) async fn run(self, client: &Client) -> Result<()> {
        let request = wire::Connect {
            netns: absolute(&self.netns)?,
            name: self.name,
            addresses: self.wishes.addresses,
            mac: self.wishes.mac,
            interface: self.interface,
            publish: self.wishes.publish,
        };
        let path = client::path(&["networks", &self.network, "endpoints"]);
        let endpoint: wire::Endpoint = client.send(Method::POST, &path, &request).await?;
        if self.json {
            return print_json(&endpoint);
        }
        let wire::Endpoint { name, addresses, mac, interface, published, .. } = &endpoint;
        let mut text = format!("{name}: {} on {interface}, {mac}\n", addresses.join(", "));
        for port in published {
            text.push_str(&format!("{name}: {port}\n"));
        }
        note_loopback(published);
        print(&text)
    }
}

impl Disconnect {
    pub(super) async fn run(self, client: &Client) -> Result<()> {
        let path = client::path(&["networks", &self.network, "endpoints", &self.name]);
        client.order(Method::DELETE, &path).await
    }
}

/// A path as it looks from the agent's directory; a name stays a name.
fn absolute(netns: &str) -> Result<String> {
    if netns.contains('/') { client::absolute(netns) } else { Ok(netns.to_owned()) }
}
