//! `netdp flows` and `netdp status`: what is going on.

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
            let changed = |before: &str, after: String| {
                if before == after { String::new() } else { after }
            };
            let translated_source = changed(&flow.source, flow.translated_source);
            let translated_destination = changed(&flow.destination, flow.translated_destination);
            table.row([
                flow.protocol,
                flow.network,
                flow.source,
                flow.destination,
                translated_source,
                translated_destination,
                flow.state,
                format!("{}s", flow.idle_seconds),
                format!("{}s", flow.expires_seconds),
            ]);
        }
        print(&table.to_string())
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
            "agent      netdp {} (pid {}), dataplane {}\n\
             networks   {} with {} endpoints and {} published ports\n\
             flows      {}\n\
             uplinks    {}\n",
            status.version,
            status.pid,
            status.dataplane,
            status.networks,
            status.endpoints,
            status.published,
            status.flows,
            if uplinks.is_empty() { "none".to_owned() } else { uplinks.join(", ") },
        );
        for trouble in &status.troubles {
            text.push_str(&format!("trouble    {trouble}\n"));
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

impl std::fmt::Display for wire::Uplink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.address {
            Some(address) => write!(f, "{} ({address})", self.name),
            None => write!(f, "{} (no address)", self.name),
        }
    }
}
