//! `netdp flows` and `netdp status`: what is going on.

use std::net::SocketAddr;

use anyhow::Result;
use clap::Args;

use super::{print, print_json, table::Table};
use crate::api::{
    client::{self, Client},
    wire,
};

#[derive(Args, Debug)]
pub(super) struct Flows {
    /// Only those of this network
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    /// Print a JSON list
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
pub(super) struct Status {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Flows {
    pub(super) async fn run(self, client: &Client) -> Result<()> {
        let path = client::path(&["flows"]);
        let path = match &self.network {
            Some(network) => client::with_query(&path, "network", network),
            None => path,
        };
        let flows: Vec<wire::Flow> = client.get(&path).await?;
        if self.json {
            return print_json(&flows);
        }
        print(&table(flows).to_string())
    }
}

fn table(flows: Vec<wire::Flow>) -> Table {
    let mut table = Table::new([
        "PROTOCOL",
        "NETWORK",
        "SOURCE",
        "DESTINATION",
        "AS",
        "TO",
        "STATE",
        "IDLE",
        "EXPIRES",
    ]);
    for flow in flows {
        // An end that stays as it was needs no second column.
        let changed =
            |before: &str, after: &str| if before == after { String::new() } else { end(after) };
        table.row([
            flow.protocol,
            flow.network,
            end(&flow.source),
            end(&flow.destination),
            changed(&flow.source, &flow.translated_source),
            changed(&flow.destination, &flow.translated_destination),
            flow.state,
            format!("{}s", flow.idle_seconds),
            format!("{}s", flow.expires_seconds),
        ]);
    }
    table
}

/// An end of a flow; port 0 stands for none, and no address at all for anybody: a mapping's peer.
fn end(text: &str) -> String {
    match text.parse::<SocketAddr>() {
        Ok(end) if end.port() == 0 && end.ip().is_unspecified() => "any".to_owned(),
        Ok(end) if end.port() == 0 => end.ip().to_string(),
        _ => text.to_owned(),
    }
}

impl Status {
    pub(super) async fn run(self, client: &Client) -> Result<()> {
        let status: wire::Status = client.get(&client::path(&["status"])).await?;
        if self.json {
            return print_json(&status);
        }
        let uplinks: Vec<String> = status.uplinks.iter().map(ToString::to_string).collect();
        let mut text = format!(
            "agent      netdp {} (pid {}), dataplane {} ({})\n\
             networks   {} with {} endpoints and {} published ports\n\
             flows      {}\n\
             uplinks    {}\n",
            status.version,
            status.pid,
            status.dataplane,
            status.dataplane_reason,
            status.networks,
            status.endpoints,
            status.published,
            flows_of(&status),
            if uplinks.is_empty() { "none".to_owned() } else { uplinks.join(", ") },
        );
        if let Some(wire::Lanes { fast, stack }) = status.lanes {
            text.push_str(&format!("packets    {fast} past the host's stack, {stack} by it\n"));
        }
        for trouble in &status.troubles {
            text.push_str(&format!("trouble    {trouble}\n"));
        }
        for alarm in &status.alarms {
            text.push_str(&format!("alarm      {alarm}\n"));
        }
        for feature in status.features.iter().filter(|feature| !feature.is_there) {
            let wire::Feature { name, since, without, .. } = feature;
            text.push_str(&format!("kernel     no {name} (Linux {since}): {without}\n"));
        }
        if !status.counters.is_empty() {
            let mut table = Table::new(["NETWORK", "COUNTED", "PACKETS", "BYTES"]);
            for counter in status.counters {
                table.row([
                    counter.network.unwrap_or_default(),
                    counter.reason,
                    counter.packets.to_string(),
                    counter.bytes.to_string(),
                ]);
            }
            text.push_str(&format!("\n{table}"));
        }
        print(&text)
    }
}

/// How many flows there are, and how many there is room for.
fn flows_of(status: &wire::Status) -> String {
    let table =
        |table: &wire::FlowTable| format!("{} {} of {}", table.family, table.flows, table.capacity);
    let tables: Vec<String> = status.flow_tables.iter().map(table).collect();
    if tables.is_empty() {
        return status.flows.to_string();
    }
    format!("{} ({})", status.flows, tables.join(", "))
}

impl std::fmt::Display for wire::Uplink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ipv4 = self.address.map(|address| address.to_string());
        let ipv6 = self.ipv6_address.map(|address| address.to_string());
        match (ipv4, ipv6) {
            (Some(ipv4), Some(ipv6)) => write!(f, "{} ({ipv4}, {ipv6})", self.name),
            (Some(address), None) | (None, Some(address)) => {
                write!(f, "{} ({address})", self.name)
            }
            (None, None) => write!(f, "{} (no address)", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        dataplane::FlowRecord,
        model::{Model, NetworkId},
    };

    #[test]
    fn flows_of_both_families_and_without_ports_are_shown() {
        let end = |address: &str, port| (address.parse().unwrap(), port);
        let peer = |source: &str| end(if source.contains(':') { "fd00::3" } else { "10.0.0.3" }, 0);
        let flow = |protocol, source: &str, source_port, translated: &str, state| FlowRecord {
            protocol,
            network: NetworkId(1),
            source: end(source, source_port),
            destination: peer(source),
            translated_source: end(translated, source_port),
            translated_destination: peer(source),
            state,
            idle: Duration::from_secs(1),
            expires: Duration::from_secs(59),
        };
        let flows = [
            flow(6, "172.20.0.2", 4000, "10.0.0.2", "half-closed"),
            flow(132, "fd00:20::2", 4000, "fd00::2", "replied"),
            flow(58, "fd00:20::2", 7, "fd00:20::2", "replied"),
            flow(47, "172.20.0.2", 0, "10.0.0.2", "unreplied"),
            flow(50, "fd00:20::2", 0, "fd00::2", "unreplied"),
            flow(99, "172.20.0.2", 0, "172.20.0.2", "unreplied"),
        ];
        let model = Model::default();
        let flows = flows.iter().map(|flow| wire::Flow::of(&model, flow)).collect();
        let shown = table(flows).to_string();
        let rows: Vec<Vec<&str>> =
            shown.lines().skip(1).map(|line| line.split_whitespace().take(7).collect()).collect();
        assert_eq!(
            rows,
            [
                ["tcp", "#1", "172.20.0.2:4000", "10.0.0.3", "10.0.0.2:4000", "-", "half-closed"],
                ["sctp", "#1", "[fd00:20::2]:4000", "fd00::3", "[fd00::2]:4000", "-", "replied"],
                ["icmpv6", "#1", "[fd00:20::2]:7", "fd00::3", "-", "-", "replied"],
                ["gre", "#1", "172.20.0.2", "10.0.0.3", "10.0.0.2", "-", "unreplied"],
                ["esp", "#1", "fd00:20::2", "fd00::3", "fd00::2", "-", "unreplied"],
                ["99", "#1", "172.20.0.2", "10.0.0.3", "-", "-", "unreplied"],
            ]
        );
    }
}
