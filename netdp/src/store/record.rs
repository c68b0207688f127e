//! What the store's records look like: the model with serde.
//!
//! Owns the shapes on disk. A change that an older record does not read as needs a new schema.

use std::{net::Ipv4Addr, path::PathBuf};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::model::{
    Action, Endpoint, EndpointId, GatewayMode, MacAddress, NetnsIdentity, Network, NetworkId,
    Protocol, PublishedPort, Rule, Subnet4,
};

#[derive(Serialize, Deserialize)]
pub(super) struct NetworkRecord {
    name: String,
    bridge: String,
    subnet: Ipv4Net,
    gateway: Ipv4Addr,
    range: Ipv4Net,
    gateway_mode: ModeRecord,
    internal: bool,
    icc: bool,
    masquerade: bool,
    mtu: u32,
    host_binding: Ipv4Addr,
    snat_ip: Option<Ipv4Addr>,
    policy: Vec<RuleRecord>,
    policy_generation: u32,
    next_address: Ipv4Addr,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ModeRecord {
    Nat,
    NatUnprotected,
    Routed,
    Isolated,
}

#[derive(Serialize, Deserialize)]
struct RuleRecord {
    allow: bool,
    first: Ipv4Addr,
    last: Ipv4Addr,
}

#[derive(Serialize, Deserialize)]
pub(super) struct EndpointRecord {
    network: u32,
    name: String,
    netns: PathBuf,
    netns_device: u64,
    netns_inode: u64,
    host_interface: String,
    interface: String,
    address: Ipv4Addr,
    mac: [u8; 6],
    published: Vec<PublishedRecord>,
}

#[derive(Serialize, Deserialize)]
struct PublishedRecord {
    protocol: ProtocolRecord,
    host_address: Ipv4Addr,
    host_port: u16,
    container_port: u16,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ProtocolRecord {
    Tcp,
    Udp,
}

impl From<&Network> for NetworkRecord {
    fn from(network: &Network) -> Self {
        Self {
            name: network.name.clone(),
            bridge: network.bridge.clone(),
            subnet: network.ipv4.subnet,
            gateway: network.ipv4.gateway,
            range: network.ipv4.range,
            gateway_mode: match network.gateway_mode {
                GatewayMode::Nat => ModeRecord::Nat,
                GatewayMode::NatUnprotected => ModeRecord::NatUnprotected,
                GatewayMode::Routed => ModeRecord::Routed,
                GatewayMode::Isolated => ModeRecord::Isolated,
            },
            internal: network.internal,
            icc: network.icc,
            masquerade: network.masquerade,
            mtu: network.mtu,
            host_binding: network.host_binding,
            snat_ip: network.snat_ip,
            policy: network.policy.iter().map(RuleRecord::from).collect(),
            policy_generation: network.policy_generation,
            next_address: network.next_address,
        }
    }
}

impl NetworkRecord {
    pub(super) fn into_network(self, id: NetworkId) -> Network {
        Network {
            id,
            name: self.name,
            bridge: self.bridge,
            ipv4: Subnet4 { subnet: self.subnet, gateway: self.gateway, range: self.range },
            gateway_mode: match self.gateway_mode {
                ModeRecord::Nat => GatewayMode::Nat,
                ModeRecord::NatUnprotected => GatewayMode::NatUnprotected,
                ModeRecord::Routed => GatewayMode::Routed,
                ModeRecord::Isolated => GatewayMode::Isolated,
            },
            internal: self.internal,
            icc: self.icc,
            masquerade: self.masquerade,
            mtu: self.mtu,
            host_binding: self.host_binding,
            snat_ip: self.snat_ip,
            policy: self.policy.into_iter().map(Rule::from).collect(),
            policy_generation: self.policy_generation,
            next_address: self.next_address,
        }
    }
}

impl From<&Rule> for RuleRecord {
    fn from(rule: &Rule) -> Self {
        Self { allow: rule.action == Action::Allow, first: rule.first, last: rule.last }
    }
}

impl From<RuleRecord> for Rule {
    fn from(record: RuleRecord) -> Self {
        let action = if record.allow { Action::Allow } else { Action::Deny };
        Self { action, first: record.first, last: record.last }
    }
}

impl From<&Endpoint> for EndpointRecord {
    fn from(endpoint: &Endpoint) -> Self {
        Self {
            network: endpoint.network.0,
            name: endpoint.name.clone(),
            netns: endpoint.netns.clone(),
            netns_device: endpoint.netns_identity.device,
            netns_inode: endpoint.netns_identity.inode,
            host_interface: endpoint.host_interface.clone(),
            interface: endpoint.interface.clone(),
            address: endpoint.address,
            mac: endpoint.mac.0,
            published: endpoint.published.iter().map(PublishedRecord::from).collect(),
        }
    }
}

impl EndpointRecord {
    pub(super) fn into_endpoint(self, id: EndpointId) -> Endpoint {
        Endpoint {
            id,
            network: NetworkId(self.network),
            name: self.name,
            netns: self.netns,
            netns_identity: NetnsIdentity { device: self.netns_device, inode: self.netns_inode },
            host_interface: self.host_interface,
            interface: self.interface,
            address: self.address,
            mac: MacAddress(self.mac),
            published: self.published.into_iter().map(PublishedPort::from).collect(),
        }
    }
}

impl From<&PublishedPort> for PublishedRecord {
    fn from(port: &PublishedPort) -> Self {
        Self {
            protocol: match port.protocol {
                Protocol::Tcp => ProtocolRecord::Tcp,
                Protocol::Udp => ProtocolRecord::Udp,
            },
            host_address: port.host_address,
            host_port: port.host_port,
            container_port: port.container_port,
        }
    }
}

impl From<PublishedRecord> for PublishedPort {
    fn from(record: PublishedRecord) -> Self {
        Self {
            protocol: match record.protocol {
                ProtocolRecord::Tcp => Protocol::Tcp,
                ProtocolRecord::Udp => Protocol::Udp,
            },
            host_address: record.host_address,
            host_port: record.host_port,
            container_port: record.container_port,
        }
    }
}
