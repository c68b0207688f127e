//! What the store's records look like: the model with serde.
//!
//! Owns the shapes on disk. A change that an older record does not read as needs a new schema.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use anyhow::{Context, Result};
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::{
    family::Family,
    model::{
        Action, Endpoint, EndpointId, Engaged, GatewayMode, MacAddress, NatBehaviour, Netns,
        NetnsIdentity, Network, NetworkId, Place, PolicyRule, Protocol, PublishedKey, Source,
        Subnet,
    },
    runs::Runs,
};

#[derive(Serialize, Deserialize)]
pub(super) struct NetworkRecord {
    name: String,
    /// Older records have none.
    #[serde(default)]
    engine_id: Option<String>,
    bridge: String,
    ipv4: Option<SubnetRecord<Ipv4Net, Ipv4Addr>>,
    ipv6: Option<SubnetRecord<Ipv6Net, Ipv6Addr>>,
    gateway_mode: ModeRecord,
    internal: bool,
    icc: bool,
    masquerade: bool,
    /// Older records have none.
    #[serde(default)]
    nat: NatRecord,
    mtu: u32,
    /// Older records have none.
    #[serde(default)]
    endpoint_flows: u32,
    /// Older records have none.
    #[serde(default)]
    reserved: BTreeSet<IpAddr>,
    policy: Vec<RuleRecord>,
    policy_generation: u32,
}

#[derive(Serialize, Deserialize)]
struct SubnetRecord<N, A> {
    subnet: N,
    gateway: A,
    range: N,
    next_address: A,
    host_binding: Option<A>,
    snat_ip: Option<A>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ModeRecord {
    Nat,
    NatUnprotected,
    Routed,
    Isolated,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum NatRecord {
    #[default]
    Dependent,
    IndependentMapping,
    Independent,
}

impl From<NatBehaviour> for NatRecord {
    fn from(nat: NatBehaviour) -> Self {
        match nat {
            NatBehaviour::EndpointDependent => Self::Dependent,
            NatBehaviour::EndpointIndependentMapping => Self::IndependentMapping,
            NatBehaviour::EndpointIndependent => Self::Independent,
        }
    }
}

impl From<NatRecord> for NatBehaviour {
    fn from(record: NatRecord) -> Self {
        match record {
            NatRecord::Dependent => Self::EndpointDependent,
            NatRecord::IndependentMapping => Self::EndpointIndependentMapping,
            NatRecord::Independent => Self::EndpointIndependent,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct RuleRecord {
    allow: bool,
    /// First and last address; `null` = everybody.
    range: Option<(IpAddr, IpAddr)>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct EndpointRecord {
    network: u32,
    name: String,
    #[serde(flatten)]
    place: PlaceRecord,
    host_interface: String,
    interface: String,
    ipv4: Option<Ipv4Addr>,
    ipv6: Option<Ipv6Addr>,
    mac: [u8; 6],
    published: Vec<PublishedRecord>,
}

/// Told apart by their fields: older records have namespaces only.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PlaceRecord {
    Netns { netns: PathBuf, netns_device: u64, netns_inode: u64 },
    Engine { engine_id: String, sandbox: Option<PathBuf> },
}

impl From<&Place> for PlaceRecord {
    fn from(place: &Place) -> Self {
        match place {
            Place::Netns(Netns { path, identity }) => Self::Netns {
                netns: path.clone(),
                netns_device: identity.device,
                netns_inode: identity.inode,
            },
            Place::Engine(Engaged { id, sandbox }) => {
                Self::Engine { engine_id: id.clone(), sandbox: sandbox.clone() }
            }
        }
    }
}

impl From<PlaceRecord> for Place {
    fn from(record: PlaceRecord) -> Self {
        match record {
            PlaceRecord::Netns { netns, netns_device, netns_inode } => Self::Netns(Netns {
                path: netns,
                identity: NetnsIdentity { device: netns_device, inode: netns_inode },
            }),
            PlaceRecord::Engine { engine_id, sandbox } => {
                Self::Engine(Engaged { id: engine_id, sandbox })
            }
        }
    }
}

/// Ports that follow each other.
#[derive(Serialize, Deserialize)]
struct PublishedRecord {
    protocol: ProtocolRecord,
    host_address: IpAddr,
    /// The first one.
    host_port: u16,
    /// To which that one leads.
    container_port: u16,
    /// How many come after it; in schema 2, none did.
    #[serde(default)]
    more: u16,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ProtocolRecord {
    Tcp,
    Udp,
    Sctp,
}

impl From<&Network> for NetworkRecord {
    fn from(network: &Network) -> Self {
        Self {
            name: network.name.clone(),
            engine_id: network.engine_id.clone(),
            bridge: network.bridge.clone(),
            ipv4: network.ipv4.map(SubnetRecord::from),
            ipv6: network.ipv6.map(SubnetRecord::from),
            gateway_mode: match network.gateway_mode {
                GatewayMode::Nat => ModeRecord::Nat,
                GatewayMode::NatUnprotected => ModeRecord::NatUnprotected,
                GatewayMode::Routed => ModeRecord::Routed,
                GatewayMode::Isolated => ModeRecord::Isolated,
            },
            internal: network.internal,
            icc: network.icc,
            masquerade: network.masquerade,
            nat: network.nat.into(),
            mtu: network.mtu,
            endpoint_flows: network.endpoint_flows,
            reserved: network.reserved.clone(),
            policy: network.policy.iter().map(RuleRecord::from).collect(),
            policy_generation: network.policy_generation,
        }
    }
}

impl NetworkRecord {
    pub(super) fn into_network(self, id: NetworkId) -> Result<Network> {
        Ok(Network {
            id,
            name: self.name,
            engine_id: self.engine_id,
            bridge: self.bridge,
            ipv4: self.ipv4.map(Subnet::from),
            ipv6: self.ipv6.map(Subnet::from),
            gateway_mode: match self.gateway_mode {
                ModeRecord::Nat => GatewayMode::Nat,
                ModeRecord::NatUnprotected => GatewayMode::NatUnprotected,
                ModeRecord::Routed => GatewayMode::Routed,
                ModeRecord::Isolated => GatewayMode::Isolated,
            },
            internal: self.internal,
            icc: self.icc,
            masquerade: self.masquerade,
            nat: self.nat.into(),
            mtu: self.mtu,
            endpoint_flows: self.endpoint_flows,
            reserved: self.reserved,
            policy: self.policy.into_iter().map(RuleRecord::into_rule).collect::<Result<_>>()?,
            policy_generation: self.policy_generation,
        })
    }
}

impl<F: Family> From<Subnet<F>> for SubnetRecord<F::Net, F::Address> {
    fn from(side: Subnet<F>) -> Self {
        let Subnet { subnet, gateway, range, next_address, host_binding, snat_ip } = side;
        Self { subnet, gateway, range, next_address, host_binding, snat_ip }
    }
}

impl<F: Family> From<SubnetRecord<F::Net, F::Address>> for Subnet<F> {
    fn from(record: SubnetRecord<F::Net, F::Address>) -> Self {
        let SubnetRecord { subnet, gateway, range, next_address, host_binding, snat_ip } = record;
        Self { subnet, gateway, range, next_address, host_binding, snat_ip }
    }
}

impl From<&PolicyRule> for RuleRecord {
    fn from(rule: &PolicyRule) -> Self {
        let range = match rule.source {
            Source::Any => None,
            Source::Ipv4(first, last) => Some((first.into(), last.into())),
            Source::Ipv6(first, last) => Some((first.into(), last.into())),
        };
        Self { allow: rule.action == Action::Allow, range }
    }
}

impl RuleRecord {
    fn into_rule(self) -> Result<PolicyRule> {
        let action = if self.allow { Action::Allow } else { Action::Deny };
        let source = match self.range {
            None => Source::Any,
            Some((first, last)) => Source::range(first, last)
                .with_context(|| format!("a rule from {first} to {last} mixes families"))?,
        };
        Ok(PolicyRule { action, source })
    }
}

impl From<&Endpoint> for EndpointRecord {
    fn from(endpoint: &Endpoint) -> Self {
        Self {
            network: endpoint.network.0,
            name: endpoint.name.clone(),
            place: (&endpoint.place).into(),
            host_interface: endpoint.host_interface.clone(),
            interface: endpoint.interface.clone(),
            ipv4: endpoint.ipv4,
            ipv6: endpoint.ipv6,
            mac: endpoint.mac.0,
            published: endpoint.published.runs().map(PublishedRecord::from).collect(),
        }
    }
}

impl EndpointRecord {
    pub(super) fn into_endpoint(self, id: EndpointId) -> Result<Endpoint> {
        let mut published = Runs::default();
        for record in self.published {
            let PublishedRecord { host_port, container_port, more, .. } = record;
            let last = host_port.checked_add(more).filter(|_| container_port <= u16::MAX - more);
            let last = last.with_context(|| format!("{more} ports after {host_port}"))?;
            published.insert_run(record.key(), last, container_port);
        }
        Ok(Endpoint {
            id,
            network: NetworkId(self.network),
            name: self.name,
            place: self.place.into(),
            host_interface: self.host_interface,
            interface: self.interface,
            ipv4: self.ipv4,
            ipv6: self.ipv6,
            mac: MacAddress(self.mac),
            published,
        })
    }
}

impl From<(PublishedKey, u16, u16)> for PublishedRecord {
    fn from((key, last, container_port): (PublishedKey, u16, u16)) -> Self {
        Self {
            protocol: match key.protocol {
                Protocol::Tcp => ProtocolRecord::Tcp,
                Protocol::Udp => ProtocolRecord::Udp,
                Protocol::Sctp => ProtocolRecord::Sctp,
            },
            host_address: key.address,
            host_port: key.port,
            container_port,
            more: last - key.port,
        }
    }
}

impl PublishedRecord {
    /// The first port.
    fn key(&self) -> PublishedKey {
        PublishedKey {
            protocol: match self.protocol {
                ProtocolRecord::Tcp => Protocol::Tcp,
                ProtocolRecord::Udp => Protocol::Udp,
                ProtocolRecord::Sctp => Protocol::Sctp,
            },
            address: self.host_address,
            port: self.host_port,
        }
    }
}
