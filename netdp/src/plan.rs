//! From what the user wants and what the host looks like to what has to exist.
//!
//! Pure: the same model and the same facts give the same plan. Knows no netlink, no files, no
//! backend; carrying a plan out is the controller's work.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    path::PathBuf,
};

use ipnet::Ipv4Net;

use crate::{
    dataplane::{
        Drift, EndpointProgram, NatPorts, NetworkProgram, Program, PublishedKey, PublishedTarget,
        Uplink,
    },
    facts::{HostFacts, Link},
    model::{
        Endpoint, EndpointId, GatewayMode, MacAddress, Model, NetnsIdentity, Network, NetworkId,
    },
};

/// What the operator decides and the model does not hold, and what is known of the host from
/// before we changed it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// Names of the uplinks; empty = every interface that can be one.
    pub uplinks: BTreeSet<String>,
    /// Sysctls that we changed and the values they had, by path under `/proc/sys`.
    pub originals: BTreeMap<String, String>,
}

/// What has to exist, complete: what is ours and not in it has to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// One bridge per network.
    pub bridges: BTreeMap<NetworkId, BridgePlan>,
    /// One veth pair per endpoint.
    pub veths: BTreeMap<EndpointId, VethPlan>,
    /// Links of ours, by ifindex, that nothing in the model names any more.
    pub orphans: BTreeSet<u32>,
    /// Sysctls of the host, by path under `/proc/sys`. What only concerns a link of ours is not
    /// here: it comes and goes with the link.
    pub sysctls: BTreeMap<String, SysctlPlan>,
    /// What the backend has to enforce, as far as its interfaces exist already.
    pub program: Program,
    /// Host ports that no other program may bind.
    pub reservations: BTreeSet<PublishedKey>,
}

impl Plan {
    /// Whether a link of this name has to exist.
    pub fn names(&self, link: &str) -> bool {
        self.bridges.values().any(|bridge| bridge.name == link)
            || self.veths.values().any(|veth| veth.name == link)
    }
}

/// A bridge as it has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgePlan {
    /// Interface name.
    pub name: String,
    /// Marks it as ours and says whose it is.
    pub alias: String,
    /// Derived from the gateway, so that neighbour entries in containers outlive the bridge.
    pub mac: MacAddress,
    /// In bytes.
    pub mtu: u32,
    /// The gateway, with the subnet's prefix length.
    pub address: Ipv4Net,
}

/// A veth pair as it has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VethPlan {
    /// Name of the host's end.
    pub name: String,
    /// Marks the host's end as ours and says whose it is.
    pub alias: String,
    /// Name of the bridge that the host's end is a port of.
    pub bridge: String,
    /// In bytes, both ends.
    pub mtu: u32,
    /// The container's namespace.
    pub netns: PathBuf,
    /// Which namespace that path has to mean.
    pub netns_identity: NetnsIdentity,
    /// Name of the container's end.
    pub interface: String,
    /// MAC of the container's end.
    pub mac: MacAddress,
    /// The container's address, with the subnet's prefix length.
    pub address: Ipv4Net,
    /// Where the container's default route leads, if it has to have one.
    pub gateway: Option<Ipv4Addr>,
}

/// What a sysctl of the host has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SysctlPlan {
    /// Exactly this.
    Is(String),
    /// A list of port ranges that covers this one, inclusive; what is on it already stays.
    Covers(u16, u16),
}

/// Path under `/proc/sys` of the switch that lets packets from an interface be forwarded.
pub fn forwarding_sysctl(interface: &str) -> String {
    format!("{FORWARDING_PREFIX}{interface}{FORWARDING_SUFFIX}")
}

/// The interface whose [`forwarding_sysctl`] this is.
pub fn forwarding_interface(path: &str) -> Option<&str> {
    path.strip_prefix(FORWARDING_PREFIX)?.strip_suffix(FORWARDING_SUFFIX)
}

const FORWARDING_PREFIX: &str = "net/ipv4/conf/";
const FORWARDING_SUFFIX: &str = "/forwarding";

/// Path under `/proc/sys` of the ports that the kernel gives to no socket by itself.
pub const RESERVED_PORTS_SYSCTL: &str = "net/ipv4/ip_local_reserved_ports";

/// Draws up what has to exist.
pub fn plan(model: &Model, facts: &HostFacts, setting: &Setting) -> Plan {
    let bridges: BTreeMap<_, _> =
        model.networks.iter().map(|(&id, network)| (id, bridge(network))).collect();
    // An endpoint without a network can't come out of the model's operations; it would only be
    // unreachable, so it is left out.
    let veths: BTreeMap<_, _> = model
        .endpoints
        .iter()
        .filter_map(|(&id, endpoint)| {
            let network = model.networks.get(&endpoint.network)?;
            Some((id, veth(endpoint, network, model.alias(endpoint))))
        })
        .collect();
    let uplinks = uplinks(model, facts, setting);

    let mut sysctls: BTreeMap<_, _> = uplinks
        .keys()
        .filter_map(|ifindex| facts.links.get(ifindex))
        .map(|link| (forwarding_sysctl(&link.name), SysctlPlan::Is("1".into())))
        .collect();
    let nat_ports = NatPorts { ephemeral: facts.ephemeral_ports, ..NatPorts::default() };
    // A host without networks is left as it is.
    if !model.networks.is_empty() {
        let (first, last) = nat_ports.reserved;
        sysctls.insert(RESERVED_PORTS_SYSCTL.into(), SysctlPlan::Covers(first, last));
    }

    let networks: BTreeMap<_, _> = bridges
        .iter()
        .filter_map(|(id, bridge)| {
            let (ifindex, _) = own(facts, &bridge.name, &bridge.alias)?;
            Some((*id, network_program(model.networks.get(id)?, bridge, ifindex)))
        })
        .collect();
    let endpoints: BTreeMap<_, _> = veths
        .iter()
        .filter_map(|(id, veth)| {
            let (ifindex, _) = own(facts, &veth.name, &veth.alias)?;
            let endpoint = model.endpoints.get(id)?;
            networks.get(&endpoint.network)?;
            let program = EndpointProgram {
                network: endpoint.network,
                ifindex,
                address: endpoint.address,
                mac: endpoint.mac,
            };
            Some((*id, program))
        })
        .collect();
    let published = model
        .endpoints
        .iter()
        .filter(|(id, _)| endpoints.contains_key(id))
        .flat_map(|(&id, endpoint)| {
            endpoint.published.iter().map(move |port| {
                let target = PublishedTarget {
                    endpoint: id,
                    address: endpoint.address,
                    port: port.container_port,
                };
                (PublishedKey::from(port), target)
            })
        })
        .collect();
    let local = facts
        .links
        .values()
        .flat_map(|link| &link.addresses)
        .map(Ipv4Net::addr)
        .filter(|address| !address.is_loopback())
        .collect();

    Plan {
        orphans: orphans(facts, &bridges, &veths),
        bridges,
        veths,
        sysctls,
        program: Program { nat_ports, networks, endpoints, published, uplinks, local },
        reservations: reservations(model),
    }
}

/// Host ports that no other program may bind, for all that is published.
pub fn reservations(model: &Model) -> BTreeSet<PublishedKey> {
    model
        .endpoints
        .values()
        // A routed network is dialled at the containers' own addresses.
        .filter(|endpoint| {
            let network = model.networks.get(&endpoint.network);
            network.is_none_or(|network| network.gateway_mode != GatewayMode::Routed)
        })
        .flat_map(|endpoint| &endpoint.published)
        .map(PublishedKey::from)
        .collect()
}

/// How the host's links differ from the plan, in words for the operator.
pub fn link_drift(plan: &Plan, facts: &HostFacts) -> Vec<Drift> {
    let mut drift = Vec::new();
    for bridge in plan.bridges.values() {
        match own(facts, &bridge.name, &bridge.alias) {
            None => drift.push(format!("bridge {} is missing", bridge.name)),
            Some((_, link)) => {
                if !link.up {
                    drift.push(format!("bridge {} is down", bridge.name));
                }
                if !link.addresses.contains(&bridge.address) {
                    drift.push(format!("bridge {} lacks {}", bridge.name, bridge.address));
                }
                if !link.forwarding {
                    drift.push(format!("bridge {} does not forward", bridge.name));
                }
            }
        }
    }
    for veth in plan.veths.values() {
        match own(facts, &veth.name, &veth.alias) {
            None => drift.push(format!("interface {} ({}) is missing", veth.name, veth.alias)),
            Some((_, link)) if !is_port_of(facts, link, &veth.bridge) => {
                drift.push(format!("interface {} is no port of {}", veth.name, veth.bridge));
            }
            Some((_, link)) if !link.up => {
                drift.push(format!("interface {} is down", veth.name));
            }
            Some(_) => {}
        }
    }
    for ifindex in plan.program.uplinks.keys() {
        if let Some(link) = facts.links.get(ifindex).filter(|link| !link.forwarding) {
            drift.push(format!("uplink {} does not forward", link.name));
        }
    }
    for link in plan.orphans.iter().filter_map(|ifindex| facts.links.get(ifindex)) {
        drift.push(format!("interface {} belongs to nothing any more", link.name));
    }
    drift.into_iter().map(|what| Drift { what }).collect()
}

/// The link of this name, if it carries our mark for this purpose.
pub fn own<'a>(facts: &'a HostFacts, name: &str, alias: &str) -> Option<(u32, &'a Link)> {
    facts.link(name).filter(|(_, link)| link.alias.as_deref() == Some(alias))
}

/// Whether a link is a port of the bridge of this name.
pub fn is_port_of(facts: &HostFacts, link: &Link, bridge: &str) -> bool {
    link.master
        .and_then(|ifindex| facts.links.get(&ifindex))
        .is_some_and(|master| master.name == bridge)
}

fn bridge(network: &Network) -> BridgePlan {
    let Network { bridge, ipv4, mtu, .. } = network;
    let [a, b, c, d] = ipv4.gateway.octets();
    BridgePlan {
        name: bridge.clone(),
        alias: network.alias(),
        mac: MacAddress([0x02, 0x42, a, b, c, d]),
        mtu: *mtu,
        address: with_prefix_of(ipv4.gateway, ipv4.subnet),
    }
}

fn veth(endpoint: &Endpoint, network: &Network, alias: String) -> VethPlan {
    VethPlan {
        name: endpoint.host_interface.clone(),
        alias,
        bridge: network.bridge.clone(),
        mtu: network.mtu,
        netns: endpoint.netns.clone(),
        netns_identity: endpoint.netns_identity,
        interface: endpoint.interface.clone(),
        mac: endpoint.mac,
        address: with_prefix_of(endpoint.address, network.ipv4.subnet),
        gateway: (!network.is_closed()).then_some(network.ipv4.gateway),
    }
}

fn with_prefix_of(address: Ipv4Addr, subnet: Ipv4Net) -> Ipv4Net {
    Ipv4Net::new_assert(address, subnet.prefix_len())
}

fn network_program(network: &Network, bridge: &BridgePlan, ifindex: u32) -> NetworkProgram {
    NetworkProgram {
        bridge_ifindex: ifindex,
        bridge_mac: bridge.mac,
        subnet: network.ipv4.subnet,
        gateway: network.ipv4.gateway,
        gateway_mode: network.gateway_mode,
        internal: network.internal,
        icc: network.icc,
        masquerade: network.masquerade,
        snat_ip: network.snat_ip,
        policy: network.policy.clone(),
        policy_generation: network.policy_generation,
    }
}

fn uplinks(model: &Model, facts: &HostFacts, setting: &Setting) -> BTreeMap<u32, Uplink> {
    // A host without networks is left as it is.
    if model.networks.is_empty() {
        return BTreeMap::new();
    }
    facts
        .links
        .iter()
        .filter(|(_, link)| {
            if setting.uplinks.is_empty() {
                // A port's packets show up on its master; ours are no way out.
                !link.loopback && !link.is_ours() && link.master.is_none()
            } else {
                setting.uplinks.contains(&link.name)
            }
        })
        .map(|(&ifindex, link)| {
            let forwarded_before = facts.is_router
                || setting
                    .originals
                    .get(&forwarding_sysctl(&link.name))
                    .map_or(link.forwarding, |original| original != "0");
            let addresses = || link.addresses.iter().map(Ipv4Net::addr);
            // The world has no way back to a link-local address.
            let masquerade =
                addresses().find(|address| !address.is_link_local()).or(addresses().next());
            (ifindex, Uplink { masquerade, ethernet: link.mac.is_some(), forwarded_before })
        })
        .collect()
}

fn orphans(
    facts: &HostFacts,
    bridges: &BTreeMap<NetworkId, BridgePlan>,
    veths: &BTreeMap<EndpointId, VethPlan>,
) -> BTreeSet<u32> {
    let wanted: BTreeSet<(&str, &str)> = bridges
        .values()
        .map(|bridge| (bridge.name.as_str(), bridge.alias.as_str()))
        .chain(veths.values().map(|veth| (veth.name.as_str(), veth.alias.as_str())))
        .collect();
    facts
        .links
        .iter()
        .filter(|(_, link)| {
            link.is_ours()
                && !wanted.contains(&(&link.name, link.alias.as_deref().unwrap_or_default()))
        })
        .map(|(&ifindex, _)| ifindex)
        .collect()
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
