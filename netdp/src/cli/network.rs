//! `netdp network`: make, show and remove networks.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, builder::NonEmptyStringValueParser};
use hyper::Method;

use super::{print, print_json, table::Table};
use crate::api::{
    client::{self, Client},
    wire,
};

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Make a network
    Create(Create),
    /// List networks
    #[command(visible_alias = "list")]
    Ls(List),
    /// Show networks with their endpoints, ports and rules
    Inspect(Inspect),
    /// Remove networks that have no endpoints
    #[command(visible_alias = "remove")]
    Rm(Remove),
}

#[derive(Args, Debug)]
pub(super) struct Create {
    /// Its name
    name: String,
    /// Its subnet, one per family; chosen from Docker's default pools where none is given
    #[arg(long = "subnet", value_name = "CIDR")]
    subnets: Vec<String>,
    /// The bridge's address, one per family; the subnet's first where none is given
    #[arg(long = "gateway", value_name = "IP")]
    gateways: Vec<String>,
    /// Part of the subnet that addresses are chosen from, one per family
    #[arg(long = "ip-range", value_name = "CIDR")]
    ip_ranges: Vec<String>,
    /// Whether it has IPv4 [default: true]
    #[arg(long, value_name = "BOOL")]
    ipv4: Option<bool>,
    /// Whether it has IPv6; a unique local /64 is chosen where no IPv6 subnet is given
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true")]
    ipv6: Option<bool>,
    /// No way in or out
    #[arg(long)]
    internal: bool,
    /// Whether members may talk to each other [default: true]
    #[arg(long, value_name = "BOOL")]
    icc: Option<bool>,
    /// MTU in bytes [default: 1500]
    #[arg(long, value_name = "N")]
    mtu: Option<u32>,
    /// Whether packets to the outside get an address of the host [default: true]
    #[arg(long, value_name = "BOOL")]
    masquerade: Option<bool>,
    /// How packets from and to the outside are treated [default: nat]
    #[arg(long, value_name = "MODE", value_parser = ["nat", "nat-unprotected", "routed", "isolated"])]
    gateway_mode: Option<String>,
    /// Host address of published ports that name none, one per family [default: 0.0.0.0 and ::]
    #[arg(long = "host-binding", value_name = "IP")]
    host_bindings: Vec<String>,
    /// Source address towards the outside instead of the uplink's, one per family
    #[arg(long = "snat-ip", value_name = "IP")]
    snat_ips: Vec<String>,
    /// One of Docker's bridge options; netdp.endpoint_flows=N: most flows of one endpoint;
    /// netdp.nat=endpoint-independent[-mapping]: one port outside for each port of an endpoint
    #[arg(long = "opt", short = 'o', value_name = "K=V", value_parser = parse_option)]
    options: Vec<(String, String)>,
    /// Print the network as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(super) struct List {
    /// Print a JSON list
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(super) struct Inspect {
    /// Their names
    #[arg(value_name = "NAME", required = true, value_parser = NonEmptyStringValueParser::new())]
    names: Vec<String>,
    /// Print a JSON list
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(super) struct Remove {
    /// Their names
    #[arg(value_name = "NAME", required = true, value_parser = NonEmptyStringValueParser::new())]
    names: Vec<String>,
}

fn parse_option(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl Verb {
    pub(super) async fn run(self, client: &Client) -> Result<()> {
        match self {
            Self::Create(verb) => verb.run(client).await,
            Self::Ls(verb) => verb.run(client).await,
            Self::Inspect(verb) => verb.run(client).await,
            Self::Rm(verb) => verb.run(client).await,
        }
    }
}

impl Create {
    async fn run(self, client: &Client) -> Result<()> {
        let mut options = BTreeMap::new();
        for (key, value) in self.options {
            if options.get(&key).is_some_and(|said| *said != value) {
                bail!("--opt {key} is given twice with different values: give it once");
            }
            options.insert(key, value);
        }
        let request = wire::CreateNetwork {
            name: self.name,
            subnets: self.subnets,
            gateways: self.gateways,
            enable_ipv4: self.ipv4,
            enable_ipv6: self.ipv6,
            ip_ranges: self.ip_ranges,
            internal: self.internal,
            icc: self.icc,
            mtu: self.mtu,
            masquerade: self.masquerade,
            gateway_mode: self.gateway_mode,
            host_bindings: self.host_bindings,
            snat_ips: self.snat_ips,
            options,
        };
        let path = client::path(&["networks"]);
        let network: wire::Network = client.send(Method::POST, &path, &request).await?;
        if self.json {
            return print_json(&network);
        }
        let wire::Settings { name, bridge, subnets, gateways, .. } = &network.settings;
        print(&format!(
            "{name}: subnet {}, gateway {}, bridge {bridge}\n",
            subnets.join(", "),
            gateways.join(", ")
        ))
    }
}

impl List {
    async fn run(self, client: &Client) -> Result<()> {
        let networks: Vec<wire::Network> = client.get(&client::path(&["networks"])).await?;
        if self.json {
            return print_json(&networks);
        }
        let mut table = Table::new(["NAME", "SUBNET", "GATEWAY", "BRIDGE", "MODE", "ENDPOINTS"]);
        for wire::Network { settings, endpoints } in networks {
            table.row([
                settings.name.clone(),
                settings.subnets.join(","),
                settings.gateways.join(","),
                settings.bridge.clone(),
                mode(&settings),
                endpoints.to_string(),
            ]);
        }
        print(&table.to_string())
    }
}

impl Inspect {
    async fn run(self, client: &Client) -> Result<()> {
        let mut networks: Vec<wire::NetworkDetail> = Vec::new();
        for name in &self.names {
            networks.push(client.get(&client::path(&["networks", name])).await?);
        }
        if self.json {
            return print_json(&networks);
        }
        let texts: Vec<String> = networks.iter().map(render).collect();
        print(&texts.join("\n"))
    }
}

impl Remove {
    async fn run(self, client: &Client) -> Result<()> {
        let mut refusals = Vec::new();
        for name in &self.names {
            match client.order(Method::DELETE, &client::path(&["networks", name])).await {
                Ok(()) => print(&format!("{name}\n"))?,
                Err(error) => refusals.push(format!("{error:#}")),
            }
        }
        if refusals.is_empty() { Ok(()) } else { bail!(refusals.join("; ")) }
    }
}

/// The gateway mode and whatever differs from a plain network.
fn mode(settings: &wire::Settings) -> String {
    let mut words = vec![settings.gateway_mode.as_str()];
    if settings.internal {
        words.push("internal");
    }
    if !settings.icc {
        words.push("no icc");
    }
    let translates = settings.gateway_mode.starts_with("nat") && !settings.internal;
    if translates && !settings.masquerade {
        words.push("no masquerade");
    }
    if settings.nat != "endpoint-dependent" {
        words.push(&settings.nat);
    }
    words.join(", ")
}

fn render(network: &wire::NetworkDetail) -> String {
    let settings = &network.settings;
    let mut facts = vec![
        ("network", settings.name.clone()),
        ("subnet", settings.subnets.join(", ")),
        ("gateway", settings.gateways.join(", ")),
    ];
    let listed = |name, list: &[String]| (!list.is_empty()).then(|| (name, list.join(", ")));
    facts.extend(listed("ip range", &settings.ip_ranges));
    facts
        .push(("bridge", format!("{}, mtu {}, id {}", settings.bridge, settings.mtu, settings.id)));
    facts.push(("mode", mode(settings)));
    facts.extend(settings.engine_id.clone().map(|id| ("engine id", id)));
    if settings.endpoint_flows > 0 {
        let flows = settings.endpoint_flows;
        facts.push(("flows", format!("at most {flows} opened by each endpoint")));
    }
    facts.extend(listed("publishes on", &settings.host_bindings));
    facts.extend(listed("leaves as", &settings.snat_ips));
    let mut text = String::new();
    for (name, value) in facts {
        text.push_str(&format!("{name:14}{value}\n"));
    }
    for (number, rule) in (1..).zip(&network.policy) {
        text.push_str(&format!("{:14}{rule}\n", format!("rule {number}")));
    }
    if network.endpoints.is_empty() {
        return text;
    }
    let titles = ["ENDPOINT", "ADDRESS", "MAC", "INTERFACE", "HOST SIDE", "NETNS", "PUBLISHED"];
    let mut table = Table::new(titles);
    for endpoint in &network.endpoints {
        table.row([
            endpoint.name.clone(),
            endpoint.addresses.join(","),
            endpoint.mac.clone(),
            endpoint.interface.clone(),
            endpoint.host_interface.clone(),
            endpoint.netns.clone(),
            endpoint.published.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        ]);
    }
    text + "\n" + &table.to_string()
}
