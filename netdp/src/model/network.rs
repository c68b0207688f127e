//! Networks: making and removing them, and how names and subnets are judged.
//!
//! Every operation validates everything before it changes anything.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::{Endpoint, GatewayMode, Model, Network, NetworkId, Refusal, Subnet4};
use crate::{
    facts::{HostFacts, Link},
    ipam,
};

/// Highest network id; ids start at 1.
const MAX_NETWORK_ID: u32 = 4095;
/// Longest name of a network or endpoint: two of them fit into a link's alias.
const MAX_NAME: usize = 64;
/// `IFNAMSIZ` without the final NUL.
const MAX_INTERFACE_NAME: usize = 15;
/// What IPv4 asks of a link (RFC 791) up to the most that a bridge takes.
const MTUS: std::ops::RangeInclusive<u32> = 68..=65_535;
/// The kernel's default for Ethernet.
const DEFAULT_MTU: u32 = 1500;

/// Never a container subnet: "this network", loopback, multicast.
const UNUSABLE: [Ipv4Net; 3] = [
    Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4),
];

/// A network as it is asked for; `None` and empty mean that netdp decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkSpec {
    /// Its name.
    pub name: String,
    /// Its subnets; one IPv4 subnet at most for now.
    pub subnets: Vec<IpNet>,
    /// The bridge's address in each subnet.
    pub gateways: Vec<IpAddr>,
    /// The part of the subnet that addresses are chosen from.
    pub ip_range: Option<IpNet>,
    /// Name of the Linux bridge.
    pub bridge: Option<String>,
    /// See [`Network::gateway_mode`].
    pub gateway_mode: Option<GatewayMode>,
    /// See [`Network::internal`].
    pub internal: bool,
    /// See [`Network::icc`].
    pub icc: Option<bool>,
    /// See [`Network::masquerade`].
    pub masquerade: Option<bool>,
    /// See [`Network::mtu`].
    pub mtu: Option<u32>,
    /// See [`Network::host_binding`].
    pub host_binding: Option<IpAddr>,
    /// See [`Network::snat_ip`].
    pub snat_ip: Option<IpAddr>,
}

impl Network {
    /// The link alias by which its bridge is recognised.
    pub fn alias(&self) -> String {
        format!("{}network {}", Link::ALIAS_PREFIX, self.name)
    }

    /// Whether nothing comes in from outside, so that nothing can be published.
    pub fn is_closed(&self) -> bool {
        self.internal || self.gateway_mode == GatewayMode::Isolated
    }
}

impl Model {
    /// The network with this name.
    ///
    /// # Errors
    /// Refuses an unknown name.
    pub fn network(&self, name: &str) -> Result<&Network, Refusal> {
        self.networks.values().find(|network| network.name == name).ok_or_else(|| unknown(name))
    }

    pub(super) fn network_mut(&mut self, name: &str) -> Result<&mut Network, Refusal> {
        self.networks.values_mut().find(|network| network.name == name).ok_or_else(|| unknown(name))
    }

    /// The endpoints of a network, by id.
    pub fn endpoints_of(&self, network: NetworkId) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.values().filter(move |endpoint| endpoint.network == network)
    }

    /// Makes a network and chooses what the user left open.
    ///
    /// # Errors
    /// Refuses a bad or used name, a subnet that is no IPv4 network or overlaps one of ours or
    /// the host's, addresses outside of it, options that contradict each other, and a bridge name
    /// that another interface has.
    pub fn create_network(
        &mut self,
        spec: NetworkSpec,
        facts: &HostFacts,
    ) -> Result<NetworkId, Refusal> {
        check_name("network", &spec.name)?;
        if self.network(&spec.name).is_ok() {
            return Err(Refusal::conflict(format!(
                "network {:?} exists already: choose another name",
                spec.name
            )));
        }
        let ipv4 = self.choose_subnet(&spec, facts)?;
        let mtu = spec.mtu.unwrap_or(DEFAULT_MTU);
        if !MTUS.contains(&mtu) {
            return Err(Refusal::invalid(format!(
                "an MTU of {mtu} does not work: give one from {} to {}",
                MTUS.start(),
                MTUS.end()
            )));
        }
        let host_binding = match spec.host_binding {
            Some(address) => host_address("host binding", address)?,
            None => Ipv4Addr::UNSPECIFIED,
        };
        let gateway_mode = spec.gateway_mode.unwrap_or_default();
        let translates = matches!(gateway_mode, GatewayMode::Nat | GatewayMode::NatUnprotected);
        if spec.masquerade == Some(true) && gateway_mode == GatewayMode::Routed {
            return Err(Refusal::invalid(
                "gateway mode routed translates nothing: leave masquerade out or take mode nat",
            ));
        }
        let masquerade = spec.masquerade.unwrap_or(translates && !spec.internal);
        let snat_ip =
            spec.snat_ip.map(|address| source_address(address, masquerade)).transpose()?;
        let (id, bridge) = self.choose_bridge(spec.bridge.as_deref(), &spec.name, facts)?;

        self.next.network = if id.0 == MAX_NETWORK_ID { 1 } else { id.0 + 1 };
        let network = Network {
            id,
            name: spec.name,
            bridge,
            next_address: ipv4.range.network(),
            ipv4,
            gateway_mode,
            internal: spec.internal,
            icc: spec.icc.unwrap_or(true),
            masquerade,
            mtu,
            host_binding,
            snat_ip,
            policy: Vec::new(),
            policy_generation: 1,
        };
        self.networks.insert(id, network);
        Ok(id)
    }

    /// Removes a network.
    ///
    /// # Errors
    /// Refuses an unknown network and one that still has endpoints, naming them.
    pub fn remove_network(&mut self, name: &str) -> Result<Network, Refusal> {
        let id = self.network(name)?.id;
        let members: Vec<&str> =
            self.endpoints_of(id).map(|endpoint| endpoint.name.as_str()).collect();
        if !members.is_empty() {
            return Err(Refusal::conflict(format!(
                "network {name:?} still has endpoints ({}): disconnect them first",
                members.join(", ")
            )));
        }
        self.networks.remove(&id).ok_or_else(|| unknown(name))
    }

    fn choose_subnet(&self, spec: &NetworkSpec, facts: &HostFacts) -> Result<Subnet4, Refusal> {
        let [subnet] = spec.subnets[..] else {
            if !spec.subnets.is_empty() {
                return Err(Refusal::invalid(
                    "more than one subnet is not supported yet: give one",
                ));
            }
            if !spec.gateways.is_empty() || spec.ip_range.is_some() {
                return Err(Refusal::invalid("a gateway or an IP range needs a subnet: give one"));
            }
            let subnet = ipam::choose_subnet(|pool| self.overlapping(pool, facts).is_some())
                .ok_or_else(|| {
                    Refusal::conflict("all default subnets are in use: give a subnet")
                })?;
            let gateway = first_host(subnet);
            return Ok(Subnet4 { subnet, gateway, range: subnet });
        };

        let subnet = check_cidr("subnet", subnet)?;
        if !ipam::SUBNET_PREFIXES.contains(&subnet.prefix_len()) {
            return Err(Refusal::invalid(format!(
                "subnet {subnet} has an unusable size: give a prefix length from {} to {}",
                ipam::SUBNET_PREFIXES.start(),
                ipam::SUBNET_PREFIXES.end()
            )));
        }
        if let Some(unusable) = UNUSABLE.iter().find(|&&unusable| ipam::overlap(subnet, unusable)) {
            return Err(Refusal::invalid(format!(
                "subnet {subnet} lies in {unusable}, which hosts can't have: give another one"
            )));
        }
        if let Some(other) = self.overlapping(subnet, facts) {
            return Err(Refusal::conflict(format!(
                "subnet {subnet} overlaps {other}: give another one"
            )));
        }

        let gateway = match spec.gateways[..] {
            [] => first_host(subnet),
            [IpAddr::V4(gateway)] => gateway,
            [IpAddr::V6(_)] => return Err(ipv6_refused("gateways", "address")),
            _ => return Err(Refusal::invalid("one subnet has one gateway: give one")),
        };
        if !ipam::is_host_address(subnet, gateway) {
            return Err(Refusal::invalid(format!(
                "gateway {gateway} is no host address in {subnet}: give one from {} to {}",
                first_host(subnet),
                last_host(subnet)
            )));
        }

        let range = match spec.ip_range {
            None => subnet,
            Some(range) => check_cidr("IP range", range)?,
        };
        if !subnet.contains(&range) {
            return Err(Refusal::invalid(format!(
                "IP range {range} is not part of subnet {subnet}: give one that is"
            )));
        }
        let ipv4 = Subnet4 { subnet, gateway, range };
        if ipam::choose_address(&ipv4, range.network(), &Default::default()).is_none() {
            return Err(Refusal::invalid(format!(
                "IP range {range} has no address for a container: give a larger one"
            )));
        }
        Ok(ipv4)
    }

    /// What a subnet overlaps, in words.
    fn overlapping(&self, subnet: Ipv4Net, facts: &HostFacts) -> Option<String> {
        if let Some(network) =
            self.networks.values().find(|network| ipam::overlap(network.ipv4.subnet, subnet))
        {
            return Some(format!("{} of network {:?}", network.ipv4.subnet, network.name));
        }
        // What stands on links of ours is in the model, or about to go.
        let mut links = facts.links.values().filter(|link| !link.is_ours());
        let address = links.find_map(|link| {
            let address = link.addresses.iter().find(|net| ipam::overlap(**net, subnet))?;
            Some(format!("address {address} of interface {}", link.name))
        });
        address.or_else(|| {
            facts.routes.iter().find_map(|route| {
                let link = facts.links.get(&route.ifindex);
                // Halves of the address space are a default route in disguise (VPN clients).
                let is_default = route.destination.prefix_len() <= 1;
                if is_default
                    || link.is_some_and(Link::is_ours)
                    || !ipam::overlap(route.destination, subnet)
                {
                    return None;
                }
                let interface = link.map_or("an interface", |link| &link.name);
                Some(format!("the host's route to {} by {interface}", route.destination))
            })
        })
    }

    fn choose_bridge(
        &self,
        wanted: Option<&str>,
        network: &str,
        facts: &HostFacts,
    ) -> Result<(NetworkId, String), Refusal> {
        let is_foreign = |bridge: &str| facts.link(bridge).is_some_and(|(_, link)| !link.is_ours());
        let owner = |bridge: &str| self.networks.values().find(|other| other.bridge == bridge);

        if let Some(bridge) = wanted {
            check_interface_name("bridge name", bridge)?;
            // Interfaces of endpoints to come would find their names taken.
            let number = bridge.strip_prefix("ndv");
            if number.is_some_and(|number| number.parse::<u32>().is_ok()) {
                return Err(Refusal::invalid(format!(
                    "bridge name {bridge:?} is of the kind that netdp gives to endpoints' \
                     interfaces: choose another"
                )));
            }
            if is_foreign(bridge) {
                return Err(Refusal::conflict(format!(
                    "interface {bridge:?} exists already and is not netdp's: \
                     choose another bridge name"
                )));
            }
            if let Some(other) = owner(bridge) {
                return Err(Refusal::conflict(format!(
                    "bridge {bridge:?} belongs to network {:?}: choose another bridge name",
                    other.name
                )));
            }
        }
        let start = self.next.network.clamp(1, MAX_NETWORK_ID);
        (start..=MAX_NETWORK_ID)
            .chain(1..start)
            .map(NetworkId)
            .filter(|id| !self.networks.contains_key(id))
            .map(|id| (id, wanted.map_or_else(|| format!("nd-{}", id.0), str::to_owned)))
            .find(|(_, bridge)| wanted.is_some() || !is_foreign(bridge) && owner(bridge).is_none())
            .ok_or_else(|| {
                Refusal::conflict(format!(
                    "there is no room for network {network:?} beside {} others: remove one",
                    self.networks.len()
                ))
            })
    }
}

fn unknown(name: &str) -> Refusal {
    Refusal::not_found(format!(
        "there is no network {name:?}: `netdp network ls` shows those that are"
    ))
}

fn first_host(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()) + 1)
}

fn last_host(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.broadcast()) - 1)
}

/// Names of networks and endpoints: as Docker's, and short enough for a link's alias.
pub(super) fn check_name(noun: &str, name: &str) -> Result<(), Refusal> {
    let mut characters = name.chars();
    let good = characters.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && characters.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
        && name.len() <= MAX_NAME;
    if good {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "{name:?} is no {noun} name: take up to {MAX_NAME} of a-z A-Z 0-9 _ . - \
         and begin with a letter or digit"
    )))
}

/// What the kernel takes for an interface name (`dev_valid_name`), and does not print oddly.
pub(super) fn check_interface_name(noun: &str, name: &str) -> Result<(), Refusal> {
    let good = !name.is_empty()
        && name.len() <= MAX_INTERFACE_NAME
        && !matches!(name, "." | ".." | "lo" | "all" | "default")
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if good {
        return Ok(());
    }
    Err(Refusal::invalid(format!(
        "{name:?} is no usable {noun}: take up to {MAX_INTERFACE_NAME} characters \
         without spaces, slashes, colons and percent signs"
    )))
}

fn check_cidr(noun: &str, net: IpNet) -> Result<Ipv4Net, Refusal> {
    let IpNet::V4(net) = net else {
        return Err(ipv6_refused(&format!("{noun}s"), "CIDR"));
    };
    if net.addr() != net.network() {
        return Err(Refusal::invalid(format!(
            "{noun} {net} has host bits set: did you mean {}?",
            net.trunc()
        )));
    }
    Ok(net)
}

pub(super) fn ipv6_refused(nouns: &str, wanted: &str) -> Refusal {
    Refusal::invalid(format!("IPv6 {nouns} are not supported yet: give an IPv4 {wanted}"))
}

/// An address that ports of the host may be bound to.
fn host_address(noun: &str, address: IpAddr) -> Result<Ipv4Addr, Refusal> {
    let IpAddr::V4(address) = address else {
        return Err(ipv6_refused(&format!("{noun}s"), "address"));
    };
    if address.is_multicast() || address.is_broadcast() {
        return Err(Refusal::invalid(format!(
            "{noun} {address} is no host's address: give one of this host or 0.0.0.0"
        )));
    }
    Ok(address)
}

fn source_address(address: IpAddr, masquerade: bool) -> Result<Ipv4Addr, Refusal> {
    let address = host_address("SNAT address", address)?;
    if address.is_unspecified() || address.is_loopback() {
        return Err(Refusal::invalid(format!(
            "SNAT address {address} can't be answered: give one that the world routes to this host"
        )));
    }
    if !masquerade {
        return Err(Refusal::invalid(
            "a SNAT address needs masquerade: leave one out or switch the other on",
        ));
    }
    Ok(address)
}
