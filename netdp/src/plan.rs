//! From what the user wants and what the host looks like to what has to exist.
//!
//! Pure: the same model and the same facts give the same plan. Knows no netlink, no files, no
//! backend; carrying a plan out is the controller's work.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use self::blank::Blank;
use crate::{
    dataplane::{
        Drift, EndpointProgram, NatPorts, NetworkProgram, Program, PublishedKey, PublishedTarget,
        SubnetProgram, Uplink,
    },
    facts::{HostFacts, Link, is_ipv6_link_local},
    family::{Family, V4, V6},
    model::{
        Endpoint, EndpointId, GatewayMode, MacAddress, Model, Netns, Network, NetworkId, Place,
        PolicyRule, Subnet,
    },
    runs::Runs,
};

pub mod blank;

/// What the operator decides and the model does not hold, and what is known of the host from
/// before we changed it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// Names of the uplinks; empty = every interface that can be one.
    pub uplinks: BTreeSet<String>,
    /// Sysctls that we changed and the values they had, by path under `/proc/sys`.
    pub originals: BTreeMap<String, String>,
    /// The backend works with iptables: what our bridges switch meets its rules, and may leave by the
    /// port it came by.
    pub filters_bridges: bool,
    /// See [`Nature::keeps_blank`](crate::dataplane::Nature::keeps_blank).
    pub keeps_blank: bool,
}

/// What has to exist, complete: what is ours and not in it has to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// One bridge per network.
    pub bridges: BTreeMap<NetworkId, BridgePlan>,
    /// One veth pair per endpoint.
    pub veths: BTreeMap<EndpointId, VethPlan>,
    /// The pair for the next endpoint of an engine's, where there is one and there has to be.
    pub blank: Option<Blank>,
    /// Links of ours, by ifindex, that nothing in the model names any more.
    pub orphans: BTreeSet<u32>,
    /// Sysctls of the host, by path under `/proc/sys`. What only concerns a link of ours is not
    /// here: it comes and goes with the link.
    pub sysctls: BTreeMap<String, SysctlPlan>,
    /// What the backend has to enforce, as far as its interfaces exist already.
    pub program: Arc<Program>,
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
    /// See [`Network::bridge_mac`].
    pub mac: MacAddress,
    /// In bytes.
    pub mtu: u32,
    /// The IPv4 gateway, with the subnet's prefix length.
    pub ipv4: Option<Ipv4Net>,
    /// The IPv6 gateway; without one the bridge does no IPv6.
    pub ipv6: Option<Ipv6Net>,
    /// See [`Setting::filters_bridges`].
    pub is_filtered: bool,
}

impl BridgePlan {
    /// Its addresses, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpNet> {
        self.ipv4.map(IpNet::V4).into_iter().chain(self.ipv6.map(IpNet::V6))
    }
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
    /// The container's namespace; `None` where the container's end is offered on the host, for an
    /// engine to take it elsewhere.
    pub netns: Option<Netns>,
    /// Name of the container's end.
    pub interface: String,
    /// MAC of the container's end.
    pub mac: MacAddress,
    /// Its IPv4 side.
    pub ipv4: Option<InterfacePlan<V4>>,
    /// Its IPv6 side; without one the interface does no IPv6.
    pub ipv6: Option<InterfacePlan<V6>>,
    /// See [`Setting::filters_bridges`].
    pub is_filtered: bool,
}

impl VethPlan {
    /// What marks a container's end that is offered as ours, while it waits.
    pub fn offer_alias(&self) -> Option<String> {
        self.netns.is_none().then(|| Link::offer_alias(&self.interface))
    }
}

/// One family of a container's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterfacePlan<F: Family> {
    /// The container's address, with the subnet's prefix length.
    pub address: F::Net,
    /// Where the container's default route leads, if it has to have one.
    pub gateway: Option<F::Address>,
}

/// What a sysctl of the host has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SysctlPlan {
    /// Exactly this.
    Is(String),
    /// The second where it says the first; anything else stays.
    Replaces(String, String),
    /// A list of port ranges that covers this one, inclusive; what is on it already stays.
    Covers(u16, u16),
}

/// Path under `/proc/sys` of the switch that lets IPv4 packets from an interface be forwarded.
pub fn forwarding_sysctl(interface: &str) -> String {
    format!("{IPV4_CONF}{interface}/forwarding")
}

/// The same for IPv6, beside a host that is no router (Linux 6.17).
pub fn force_forwarding_sysctl(interface: &str) -> String {
    format!("{IPV6_CONF}{interface}/force_forwarding")
}

/// The interface that a sysctl belongs to, if it belongs to a single one.
pub fn sysctl_interface(path: &str) -> Option<&str> {
    let rest = path.strip_prefix(IPV4_CONF).or_else(|| path.strip_prefix(IPV6_CONF))?;
    let (interface, _) = rest.rsplit_once('/')?;
    (!matches!(interface, "all" | "default")).then_some(interface)
}

/// The same sysctl of another interface.
pub fn sysctl_of_interface(path: &str, interface: &str) -> Option<String> {
    let old = sysctl_interface(path)?;
    let (head, tail) = path.split_at(IPV4_CONF.len());
    Some(format!("{head}{interface}{}", tail.strip_prefix(old)?))
}

/// Directory of IPv4's sysctls of interfaces; as long as [`IPV6_CONF`].
const IPV4_CONF: &str = "net/ipv4/conf/";
/// Directory of IPv6's sysctls of interfaces.
pub const IPV6_CONF: &str = "net/ipv6/conf/";

/// Path under `/proc/sys` of the switch that makes the host an IPv6 router: a write to it is one to
/// the `forwarding` of every interface.
pub const IPV6_ROUTER_SYSCTL: &str = "net/ipv6/conf/all/forwarding";

/// Path under `/proc/sys` of the ports that the kernel gives to no socket by itself.
pub const RESERVED_PORTS_SYSCTL: &str = "net/ipv4/ip_local_reserved_ports";

/// Draws up what has to exist.
pub fn plan(model: &Model, facts: &HostFacts, setting: &Setting) -> Plan {
    let bridges: BTreeMap<_, _> =
        model.networks.iter().map(|(&id, network)| (id, bridge(network, setting))).collect();
    let gateways = model.gateway_endpoints();
    // An endpoint without a network can't come out of the model's operations; it would only be
    // unreachable, so it is left out.
    let veths: BTreeMap<_, _> = model
        .endpoints
        .iter()
        .filter_map(|(&id, endpoint)| {
            let network = model.networks.get(&endpoint.network)?;
            let is_gateway = |is_ipv4| {
                let container = endpoint.netns_identity();
                container.and_then(|it| gateways.get(&(it, is_ipv4))) == Some(&id)
            };
            let gateways = (is_gateway(true), is_gateway(false));
            let veth = veth(endpoint, network, model.alias(endpoint), gateways);
            Some((id, VethPlan { is_filtered: setting.filters_bridges, ..veth }))
        })
        .collect();
    let uplinks = uplinks(model, facts, setting);
    let blank = if blank::is_wanted(model, setting) { blank::find(facts) } else { None };

    let nat_ports = NatPorts { ephemeral: facts.ephemeral_ports, ..NatPorts::default() };
    let sysctls = sysctls(model, facts, &uplinks, &nat_ports);

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
                ipv4: endpoint.ipv4,
                ipv6: endpoint.ipv6,
                mac: endpoint.mac,
            };
            Some((*id, program))
        })
        .collect();
    let mut published = Runs::default();
    for ((key, last, port), endpoint) in publications(model) {
        // A port of a family that the endpoint lacks can't come out of the model's operations;
        // it would only be unreachable, so it is left out.
        let address = match key.address {
            IpAddr::V4(_) => endpoint.ipv4.map(IpAddr::V4),
            IpAddr::V6(_) => endpoint.ipv6.map(IpAddr::V6),
        };
        if let Some(address) = address.filter(|_| endpoints.contains_key(&endpoint.id)) {
            published.insert_run(
                key,
                last,
                PublishedTarget { endpoint: endpoint.id, address, port },
            );
        }
    }
    let local = facts
        .links
        .values()
        .flat_map(|link| &link.addresses)
        .map(|address| address.net.addr())
        .filter(|&address| !address.is_loopback() && !is_ipv6_link_local(address))
        .collect();

    let named = networks
        .values()
        .map(|network| network.bridge_ifindex)
        .chain(endpoints.values().map(|endpoint| endpoint.ifindex))
        .chain(uplinks.keys().copied());
    let names = named
        .filter_map(|ifindex| Some((ifindex, facts.links.get(&ifindex)?.name.clone())))
        .collect();

    Plan {
        orphans: orphans(facts, &bridges, &veths, blank),
        bridges,
        veths,
        blank,
        sysctls,
        program: Arc::new(Program {
            nat_ports,
            networks,
            endpoints,
            blank: blank.map(|blank| blank.host_end),
            published,
            uplinks,
            needs_stack: facts.has_ipsec,
            local,
            names,
        }),
    }
}

/// Host ports that no other program may bind, for all that is published.
pub fn reservations(model: &Model) -> Runs<PublishedKey, ()> {
    let mut reserved = Runs::default();
    for ((key, last, _), endpoint) in publications(model) {
        let network = model.networks.get(&endpoint.network);
        // A routed network is dialled at the containers' own addresses.
        if network.is_none_or(|network| network.gateway_mode != GatewayMode::Routed) {
            reserved.insert_run(key, last, ());
        }
    }
    reserved
}

/// Runs of published ports and the endpoints that they lead to: whichever endpoint of a container they
/// were given to, the one by which its answers reach the world.
fn publications(model: &Model) -> impl Iterator<Item = ((PublishedKey, u16, u16), &Endpoint)> {
    let gateways = model.gateway_endpoints();
    let publishing = model.endpoints.values().filter(|endpoint| !endpoint.published.is_empty());
    publishing.flat_map(move |endpoint| {
        let gateway = |is_ipv4| {
            let container = endpoint.netns_identity();
            let id = container.and_then(|container| gateways.get(&(container, is_ipv4)));
            id.and_then(|id| model.endpoints.get(id)).unwrap_or(endpoint)
        };
        let (gateway4, gateway6) = (gateway(true), gateway(false));
        endpoint
            .published
            .runs()
            .map(move |run| (run, if run.0.address.is_ipv4() { gateway4 } else { gateway6 }))
    })
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
                if link.is_filtered != bridge.is_filtered {
                    drift.push(format!("bridge {} does not go by the dataplane", bridge.name));
                }
                for net in bridge.addresses().filter(|&net| !link.has_address(net)) {
                    drift.push(format!("bridge {} lacks {net}", bridge.name));
                }
                if bridge.ipv4.is_some() && !link.forwarding {
                    drift.push(format!("bridge {} does not forward", bridge.name));
                }
                if bridge.ipv6.is_some() && facts.can_force_forwarding && !link.forces_forwarding {
                    drift.push(format!("bridge {} does not forward IPv6", bridge.name));
                }
            }
        }
    }
    for veth in plan.veths.values() {
        match own(facts, &veth.name, &veth.alias) {
            // Gone with the container of an engine, which is about to say so.
            None if veth.netns.is_none() && facts.link(&veth.name).is_none() => {}
            None => drift.push(format!("interface {} ({}) is missing", veth.name, veth.alias)),
            Some((_, link)) if !is_port_of(facts, link, &veth.bridge) => {
                drift.push(format!("interface {} is no port of {}", veth.name, veth.bridge));
            }
            Some((_, link)) if !link.up => {
                drift.push(format!("interface {} is down", veth.name));
            }
            Some((_, link)) if link.is_filtered != veth.is_filtered => {
                drift.push(format!("interface {} does not go by the dataplane", veth.name));
            }
            Some(_) => {}
        }
    }
    for link in plan.program.uplinks.keys().filter_map(|ifindex| facts.links.get(ifindex)) {
        let is_wanted = |path| plan.sysctls.contains_key(&path);
        if is_wanted(forwarding_sysctl(&link.name)) && !link.forwarding {
            drift.push(format!("uplink {} does not forward", link.name));
        }
        if is_wanted(force_forwarding_sysctl(&link.name)) && !link.forces_forwarding {
            drift.push(format!("uplink {} does not forward IPv6", link.name));
        }
    }
    if plan.sysctls.contains_key(IPV6_ROUTER_SYSCTL) && !facts.is_ipv6_router {
        drift.push("the host does not forward IPv6".to_owned());
    }
    if let Some(&SysctlPlan::Covers(first, last)) = plan.sysctls.get(RESERVED_PORTS_SYSCTL)
        && facts.reserved_ports.as_ref().is_some_and(|ports| !ports.cover(first, last))
    {
        drift.push(format!("the host does not reserve ports {first}-{last}"));
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

fn bridge(network: &Network, setting: &Setting) -> BridgePlan {
    BridgePlan {
        name: network.bridge.clone(),
        alias: network.alias(),
        mac: network.bridge_mac(),
        mtu: network.mtu,
        ipv4: network.ipv4.map(|side| V4::with_prefix_of(side.gateway, side.subnet)),
        ipv6: network.ipv6.map(|side| V6::with_prefix_of(side.gateway, side.subnet)),
        is_filtered: setting.filters_bridges,
    }
}

/// `gateways` says whether the container's default routes lead by it, IPv4 and IPv6.
fn veth(endpoint: &Endpoint, network: &Network, alias: String, gateways: (bool, bool)) -> VethPlan {
    VethPlan {
        name: endpoint.host_interface.clone(),
        alias,
        bridge: network.bridge.clone(),
        mtu: network.mtu,
        netns: match &endpoint.place {
            Place::Netns(netns) => Some(netns.clone()),
            Place::Engine(_) => None,
        },
        interface: endpoint.interface.clone(),
        mac: endpoint.mac,
        ipv4: interface(endpoint.ipv4, network.ipv4, gateways.0),
        ipv6: interface(endpoint.ipv6, network.ipv6, gateways.1),
        is_filtered: false,
    }
}

fn interface<F: Family>(
    address: Option<F::Address>,
    side: Option<Subnet<F>>,
    is_gateway: bool,
) -> Option<InterfacePlan<F>> {
    let (address, side) = (address?, side?);
    Some(InterfacePlan {
        address: F::with_prefix_of(address, side.subnet),
        gateway: is_gateway.then_some(side.gateway),
    })
}

fn network_program(network: &Network, bridge: &BridgePlan, ifindex: u32) -> NetworkProgram {
    NetworkProgram {
        bridge_ifindex: ifindex,
        bridge_mac: bridge.mac,
        mtu: network.mtu,
        ipv4: network.ipv4.map(subnet_program),
        ipv6: network.ipv6.map(subnet_program),
        gateway_mode: network.gateway_mode,
        internal: network.internal,
        icc: network.icc,
        masquerade: network.masquerade,
        nat: network.nat,
        endpoint_flows: network.endpoint_flows,
        policy: network.policy.iter().flat_map(PolicyRule::rules).collect(),
        policy_generation: network.policy_generation,
    }
}

fn subnet_program<F: Family>(side: Subnet<F>) -> SubnetProgram<F> {
    SubnetProgram { subnet: side.subnet, gateway: side.gateway, snat_ip: side.snat_ip }
}

/// The host's sysctls, for the families that some network has.
fn sysctls(
    model: &Model,
    facts: &HostFacts,
    uplinks: &BTreeMap<u32, Uplink>,
    nat_ports: &NatPorts,
) -> BTreeMap<String, SysctlPlan> {
    let on = || SysctlPlan::Is("1".into());
    let uplinks = || uplinks.keys().filter_map(|ifindex| facts.links.get(ifindex));
    let mut sysctls = BTreeMap::new();
    if model.networks.values().any(|network| network.ipv4.is_some()) {
        sysctls.extend(uplinks().map(|link| (forwarding_sysctl(&link.name), on())));
    }
    if model.networks.values().any(|network| network.ipv6.is_some()) {
        if facts.can_force_forwarding {
            sysctls.extend(uplinks().map(|link| (force_forwarding_sysctl(&link.name), on())));
        } else {
            sysctls.insert(IPV6_ROUTER_SYSCTL.into(), on());
            // A router takes no advertisements (1) unless it is told to all the same (2); without
            // them the host's own addresses and routes would run out.
            let foreign = facts.links.values().filter(|link| !link.loopback && !link.is_ours());
            sysctls.extend(foreign.map(|link| {
                let path = format!("{IPV6_CONF}{}/accept_ra", link.name);
                (path, SysctlPlan::Replaces("1".into(), "2".into()))
            }));
        }
    }
    // A host without networks is left as it is.
    if !model.networks.is_empty() {
        // Of both families, whatever the path says.
        let (first, last) = nat_ports.reserved;
        sysctls.insert(RESERVED_PORTS_SYSCTL.into(), SysctlPlan::Covers(first, last));
    }
    sysctls
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
            let before = |path: &str, now: bool| {
                setting.originals.get(path).map_or(now, |original| original != "0")
            };
            let forwarded_before4 =
                facts.is_router || before(&forwarding_sysctl(&link.name), link.forwarding);
            let forwarded_before6 = before(IPV6_ROUTER_SYSCTL, facts.is_ipv6_router)
                || before(&force_forwarding_sysctl(&link.name), link.forces_forwarding);
            let uplink = Uplink {
                masquerade4: masquerade4(link),
                masquerade6: masquerade6(link),
                mtu: link.mtu,
                ethernet: link.mac.is_some(),
                forwarded_before4,
                forwarded_before6,
            };
            (ifindex, uplink)
        })
        .collect()
}

fn masquerade4(link: &Link) -> Option<Ipv4Addr> {
    let addresses = || link.addresses.iter().filter_map(|address| V4::of(address.net.addr()));
    // The world has no way back to a link-local address.
    addresses().find(|address| !address.is_link_local()).or(addresses().next())
}

fn masquerade6(link: &Link) -> Option<Ipv6Addr> {
    let addresses = || {
        let steady = link.addresses.iter().filter(|address| address.is_steady);
        steady
            .filter_map(|address| V6::of(address.net.addr()))
            .filter(|address| !address.is_unicast_link_local() && !address.is_loopback())
    };
    // Nor to a unique local one, unless it is next door.
    addresses().find(|address| !address.is_unique_local()).or(addresses().next())
}

fn orphans(
    facts: &HostFacts,
    bridges: &BTreeMap<NetworkId, BridgePlan>,
    veths: &BTreeMap<EndpointId, VethPlan>,
    blank: Option<Blank>,
) -> BTreeSet<u32> {
    let offers: Vec<(&str, String)> = veths
        .values()
        .filter_map(|veth| Some((veth.interface.as_str(), veth.offer_alias()?)))
        .collect();
    let wanted: BTreeSet<(&str, &str)> = bridges
        .values()
        .map(|bridge| (bridge.name.as_str(), bridge.alias.as_str()))
        .chain(veths.values().map(|veth| (veth.name.as_str(), veth.alias.as_str())))
        .chain(offers.iter().map(|(name, alias)| (*name, alias.as_str())))
        .collect();
    facts
        .links
        .iter()
        .filter(|&(&ifindex, link)| {
            link.is_ours()
                && !blank.is_some_and(|blank| blank.has(ifindex))
                && !wanted.contains(&(&link.name, link.alias.as_deref().unwrap_or_default()))
        })
        .map(|(&ifindex, _)| ifindex)
        .collect()
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
