//! What the agent tells of what it sees: status, flows, counters.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{
    dataplane::{self, Count, FlowRecord, Program, protocol_name},
    facts::HostFacts,
    model::{self, Model},
};

/// A tracked connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// "tcp", "udp", "icmp", "icmpv6", "sctp", "gre", "esp", or the number.
    pub protocol: String,
    /// The network's name.
    pub network: String,
    /// `address:port`, `[address]:port` for IPv6, as the first packet had it. ICMP has the echo
    /// identifier for a port, a protocol without ports 0.
    pub source: String,
    /// The same for the destination.
    pub destination: String,
    /// Source after translation.
    pub translated_source: String,
    /// Destination after translation.
    pub translated_destination: String,
    /// "established", "half-open", "half-closed", "closing", "reset", "unreplied", "replied".
    pub state: String,
    /// Since the last packet.
    pub idle_seconds: u64,
    /// Until it is collected if nothing more comes.
    pub expires_seconds: u64,
}

/// `GET /v1/status`: how the agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// netdp's version.
    pub version: String,
    /// "ebpf", "iptables".
    pub dataplane: String,
    /// Why it is that one.
    pub dataplane_reason: String,
    /// The agent's process id.
    pub pid: u32,
    /// How many networks there are.
    pub networks: usize,
    /// How many endpoints.
    pub endpoints: usize,
    /// How many published ports.
    pub published: usize,
    /// How many tracked connections.
    pub flows: usize,
    /// How full the flow tables were when flows were last collected, seconds ago.
    pub flow_tables: Vec<FlowTable>,
    /// How packets of flows went since the agent started; `null` where all go by the host's stack.
    pub lanes: Option<Lanes>,
    /// Interfaces to the outside.
    pub uplinks: Vec<Uplink>,
    /// What was counted since the maps were made, zero rows left out.
    pub counters: Vec<Counter>,
    /// What could not be repaired so far, one line each.
    pub troubles: Vec<String>,
    /// What to know of and can't be repaired by the agent, one line each.
    pub alarms: Vec<String>,
    /// What the dataplane uses where the kernel has it.
    pub features: Vec<Feature>,
}

/// Something that a kernel may have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feature {
    /// "tcx", "coarse-clock".
    pub name: String,
    /// The version of Linux that brought it.
    pub since: String,
    /// Whether this kernel has it.
    pub is_there: bool,
    /// What is lost without it.
    pub without: String,
}

/// Packets of flows by the way they took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lanes {
    /// Past the host's stack.
    pub fast: u64,
    /// By it.
    pub stack: u64,
}

/// How full a family's flow table is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowTable {
    /// "IPv4", "IPv6".
    pub family: String,
    /// Flows in it.
    pub flows: u32,
    /// Flows that it has room for.
    pub capacity: u32,
}

/// An interface to the outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    /// Interface name.
    pub name: String,
    /// IPv4 source address for masquerade; `null` while it has none.
    pub address: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub ipv6_address: Option<Ipv6Addr>,
}

/// Packets counted for one reason in one network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// `null` where no network could be told.
    pub network: Option<String>,
    /// The reason's name.
    pub reason: String,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Flow {
    /// A flow, its network named by the model.
    pub fn of(model: &Model, flow: &FlowRecord) -> Self {
        let end = |end: (IpAddr, u16)| SocketAddr::from(end).to_string();
        Self {
            protocol: protocol_name(flow.protocol).into_owned(),
            network: network_name(model, flow.network),
            source: end(flow.source),
            destination: end(flow.destination),
            translated_source: end(flow.translated_source),
            translated_destination: end(flow.translated_destination),
            state: flow.state.to_owned(),
            idle_seconds: flow.idle.as_secs(),
            expires_seconds: flow.expires.as_secs(),
        }
    }
}

impl From<&dataplane::KernelFeature> for Feature {
    fn from(feature: &dataplane::KernelFeature) -> Self {
        let (major, minor) = feature.since;
        Self {
            name: feature.name.to_owned(),
            since: format!("{major}.{minor}"),
            is_there: feature.is_there,
            without: feature.without.to_owned(),
        }
    }
}

impl From<&dataplane::FlowTable> for FlowTable {
    fn from(table: &dataplane::FlowTable) -> Self {
        Self { family: table.family.to_owned(), flows: table.flows, capacity: table.capacity }
    }
}

impl Uplink {
    /// The uplinks of a program, by interface name.
    pub fn of(program: &Program, facts: &HostFacts) -> Vec<Self> {
        let mut uplinks: Vec<Self> = program
            .uplinks
            .iter()
            .map(|(ifindex, uplink)| Self {
                name: facts
                    .links
                    .get(ifindex)
                    .map_or_else(|| format!("#{ifindex}"), |link| link.name.clone()),
                address: uplink.masquerade4,
                ipv6_address: uplink.masquerade6,
            })
            .collect();
        uplinks.sort_by(|a, b| a.name.cmp(&b.name));
        uplinks
    }
}

impl Counter {
    /// A counter, its network named by the model.
    pub fn of(model: &Model, count: &Count) -> Self {
        Self {
            network: count.network.map(|id| network_name(model, id)),
            reason: count.reason.name().to_owned(),
            packets: count.packets,
            bytes: count.bytes,
        }
    }
}

/// A network that is gone may still have counters and the last of its flows: by number then.
pub(super) fn network_name(model: &Model, id: model::NetworkId) -> String {
    model.networks.get(&id).map_or_else(|| format!("#{}", id.0), |network| network.name.clone())
}
