//! Networks: making and removing them, and how names and subnets are judged.
//!
//! Every operation validates everything before it changes anything.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::{IpNet, Ipv6Net};

use super::{
    Endpoint, GatewayMode, MacAddress, Model, NatBehaviour, Network, NetworkId, Refusal, Subnet,
};
use crate::{
    facts::{HostFacts, Link},
    family::{Family, V4, V6},
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

/// What IPv6 asks of a link (RFC 8200, section 5).
const MIN_IPV6_MTU: u32 = 1280;

/// A network as it is asked for; `None` and empty mean that netdp decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkSpec {
    /// Its name.
    pub name: String,
    /// See [`Network::engine_id`].
    pub engine_id: Option<String>,
    /// Whether it has an IPv4 side; it has unless the user said no.
    pub enable_ipv4: Option<bool>,
    /// Whether it has an IPv6 side; it has if there is an IPv6 subnet.
    pub enable_ipv6: Option<bool>,
    /// Its subnets, one per family at most.
    pub subnets: Vec<IpNet>,
    /// The bridge's address in each subnet.
    pub gateways: Vec<IpAddr>,
    /// The part of each subnet that addresses are chosen from.
    pub ip_ranges: Vec<IpNet>,
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
    /// See [`Network::nat`].
    pub nat: Option<NatBehaviour>,
    /// See [`Network::mtu`].
    pub mtu: Option<u32>,
    /// See [`Network::endpoint_flows`].
    pub endpoint_flows: Option<u32>,
    /// See [`Network::reserved`].
    pub reserved: BTreeSet<IpAddr>,
    /// See [`Subnet::host_binding`]; one per family at most.
    pub host_bindings: Vec<IpAddr>,
    /// See [`Subnet::snat_ip`]; one per family at most.
    pub snat_ips: Vec<IpAddr>,
    /// A random global ID (RFC 4193, section 3.2) for this host, in case that it has none yet.
    pub global_id: [u8; 5],
}

/// What is asked of one family of a network.
struct SideSpec<F: Family> {
    subnet: Option<F::Net>,
    gateway: Option<F::Address>,
    range: Option<F::Net>,
    host_binding: Option<F::Address>,
    snat_ip: Option<F::Address>,
}

impl<F: Family> SideSpec<F> {
    fn of(spec: &NetworkSpec) -> Result<Self, Refusal> {
        Ok(Self {
            subnet: one::<F, _>("subnet", spec.subnets.iter().copied().filter_map(F::of_net))?,
            gateway: one::<F, _>("gateway", spec.gateways.iter().copied().filter_map(F::of))?,
            range: one::<F, _>("IP range", spec.ip_ranges.iter().copied().filter_map(F::of_net))?,
            host_binding: one::<F, _>(
                "host binding",
                spec.host_bindings.iter().copied().filter_map(F::of),
            )?,
            snat_ip: one::<F, _>("SNAT address", spec.snat_ips.iter().copied().filter_map(F::of))?,
        })
    }

    /// Refuses what was said about a family that the network does not have.
    fn check_unused(&self) -> Result<(), Refusal> {
        let said = [
            self.subnet.map(|net| format!("subnet {net}")),
            self.gateway.map(|address| format!("gateway {address}")),
            self.range.map(|net| format!("IP range {net}")),
            self.host_binding.map(|address| format!("host binding {address}")),
            self.snat_ip.map(|address| format!("SNAT address {address}")),
        ];
        match said.into_iter().flatten().next() {
            None => Ok(()),
            Some(said) => Err(Refusal::invalid(format!(
                "{said} is of no use in a network without {family}: \
                 leave it out or enable {family}",
                family = F::NAME
            ))),
        }
    }
}

/// The only one of its family, if there is one.
fn one<F: Family, T>(
    noun: &str,
    mut values: impl Iterator<Item = T>,
) -> Result<Option<T>, Refusal> {
    let first = values.next();
    if values.next().is_some() {
        return Err(Refusal::invalid(format!(
            "more than one {} {noun} is not supported: give one per family",
            F::NAME
        )));
    }
    Ok(first)
}

impl Network {
    /// The link alias by which its bridge is recognised.
    pub fn alias(&self) -> String {
        format!("{}network {}", Link::ALIAS_PREFIX, self.name)
    }

    /// Its subnets, IPv4 first.
    pub fn subnets(&self) -> impl Iterator<Item = IpNet> {
        let ipv4 = self.ipv4.map(|side| IpNet::V4(side.subnet));
        ipv4.into_iter().chain(self.ipv6.map(|side| IpNet::V6(side.subnet)))
    }

    /// Where `-p` without a host address publishes, IPv4 first.
    pub fn host_bindings(&self) -> impl Iterator<Item = IpAddr> {
        let ipv4 = self.ipv4.and_then(|side| side.host_binding).map(IpAddr::V4);
        let ipv6 = self.ipv6.and_then(|side| side.host_binding).map(IpAddr::V6);
        ipv4.into_iter().chain(ipv6)
    }

    /// The bridge's MAC address. It follows from the gateway, so that neighbour entries in
    /// containers outlive the bridge.
    pub fn bridge_mac(&self) -> MacAddress {
        match (self.ipv4, self.ipv6) {
            (Some(ipv4), _) => MacAddress::from_ipv4(ipv4.gateway),
            (None, Some(ipv6)) => MacAddress::from_ipv6(ipv6.gateway, 0),
            // Can't come out of the model's operations.
            (None, None) => MacAddress([0x02, 0x42, 0, 0, 0, 0]),
        }
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
    /// Refuses a bad or used name, a network of no family, a subnet that overlaps one of ours or
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
        let (side4, side6) = (SideSpec::<V4>::of(&spec)?, SideSpec::<V6>::of(&spec)?);
        let has_ipv4 = spec.enable_ipv4.unwrap_or(true);
        let has_ipv6 = spec.enable_ipv6.unwrap_or(side6.subnet.is_some());
        if !has_ipv4 && !has_ipv6 {
            return Err(Refusal::invalid(
                "a network without IPv4 needs IPv6: give --ipv6 or an IPv6 subnet",
            ));
        }
        if !has_ipv4 {
            side4.check_unused()?;
        }
        if !has_ipv6 {
            side6.check_unused()?;
        } else if !facts.has_ipv6 {
            return Err(Refusal::invalid(
                "this host has IPv6 switched off (ipv6.disable=1): \
                 boot without that, or leave IPv6 out",
            ));
        }
        let mtu = spec.mtu.unwrap_or(DEFAULT_MTU);
        if !MTUS.contains(&mtu) {
            return Err(Refusal::invalid(format!(
                "an MTU of {mtu} does not work: give one from {} to {}",
                MTUS.start(),
                MTUS.end()
            )));
        }
        if has_ipv6 && mtu < MIN_IPV6_MTU {
            return Err(Refusal::invalid(format!(
                "an MTU of {mtu} is too small for IPv6: give one from {MIN_IPV6_MTU}"
            )));
        }
        let gateway_mode = spec.gateway_mode.unwrap_or_default();
        let translates = matches!(gateway_mode, GatewayMode::Nat | GatewayMode::NatUnprotected);
        if spec.masquerade == Some(true) && gateway_mode == GatewayMode::Routed {
            return Err(Refusal::invalid(
                "gateway mode routed translates nothing: leave masquerade out or take mode nat",
            ));
        }
        let masquerade = spec.masquerade.unwrap_or(translates && !spec.internal);
        let nat = spec.nat.unwrap_or_default();
        if nat.maps() && !(masquerade && translates && !spec.internal) {
            return Err(Refusal::invalid(format!(
                "option netdp.nat={nat} is of no use in a network without masquerade: \
                 leave it out or enable masquerade"
            )));
        }
        for &address in &spec.host_bindings {
            check_host_address("host binding", address)?;
        }
        for &address in &spec.snat_ips {
            check_source_address(address, masquerade)?;
        }
        let unique_local = self.unique_local.unwrap_or_else(|| unique_local(spec.global_id));
        let takes_unique_local = has_ipv6 && side6.subnet.is_none();
        // Who names an address in one family means that one alone; a wildcard means both.
        let is_open4 = side4.host_binding.is_none_or(|address| address.is_unspecified());
        let is_open6 = side6.host_binding.is_none_or(|address| address.is_unspecified());
        let ipv4 = has_ipv4
            .then(|| {
                let pools = ipam::default_pools();
                let fallback = is_open6.then_some(V4::UNSPECIFIED);
                self.choose_side(&side4, pools, fallback, facts)
            })
            .transpose()?;
        let ipv6 = has_ipv6
            .then(|| {
                let pools = ipam::unique_local_subnets(unique_local);
                let fallback = is_open4.then_some(V6::UNSPECIFIED);
                self.choose_side(&side6, pools, fallback, facts)
            })
            .transpose()?;
        let (id, bridge) = self.choose_bridge(spec.bridge.as_deref(), &spec.name, facts)?;

        if takes_unique_local {
            self.unique_local = Some(unique_local);
        }
        self.next.network = if id.0 == MAX_NETWORK_ID { 1 } else { id.0 + 1 };
        let network = Network {
            id,
            name: spec.name,
            engine_id: spec.engine_id,
            bridge,
            ipv4,
            ipv6,
            gateway_mode,
            internal: spec.internal,
            icc: spec.icc.unwrap_or(true),
            masquerade,
            nat,
            mtu,
            endpoint_flows: spec.endpoint_flows.unwrap_or_default(),
            reserved: spec.reserved,
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

    /// One family of a new network: the subnet asked for, or the first of `pools` that is free.
    fn choose_side<F: Family>(
        &self,
        spec: &SideSpec<F>,
        pools: impl Iterator<Item = F::Net>,
        host_binding: Option<F::Address>,
        facts: &HostFacts,
    ) -> Result<Subnet<F>, Refusal> {
        let subnet = match spec.subnet {
            Some(subnet) => self.check_subnet::<F>(subnet, facts)?,
            None if spec.gateway.is_some() || spec.range.is_some() => {
                return Err(Refusal::invalid(format!(
                    "an {family} gateway or IP range needs an {family} subnet: give one",
                    family = F::NAME
                )));
            }
            None => self.choose_subnet::<F>(pools, &BTreeSet::new(), facts)?,
        };
        let first_host = F::next(F::first(subnet));
        let gateway = spec.gateway.unwrap_or(first_host);
        if !ipam::is_host_address::<F>(subnet, gateway) {
            return Err(Refusal::invalid(format!(
                "gateway {gateway} is no host address in {subnet}: give one from {first_host} \
                 to {}",
                ipam::last_host::<F>(subnet)
            )));
        }
        let range = match spec.range {
            None => subnet,
            Some(range) => check_cidr::<F>("IP range", range)?,
        };
        if !ipam::covers::<F>(subnet, range) {
            return Err(Refusal::invalid(format!(
                "IP range {range} is not part of subnet {subnet}: give one that is"
            )));
        }
        let side = Subnet {
            subnet,
            gateway,
            range,
            next_address: F::first(range),
            host_binding: spec.host_binding.or(host_binding),
            snat_ip: spec.snat_ip,
        };
        if ipam::choose_address(&side, &Default::default()).is_none() {
            return Err(Refusal::invalid(format!(
                "IP range {range} has no address for a container: give a larger one"
            )));
        }
        Ok(side)
    }

    /// The first of `pools` that is in nobody's way, nor in that of what is `held` for somebody.
    fn choose_subnet<F: Family>(
        &self,
        mut pools: impl Iterator<Item = F::Net>,
        held: &BTreeSet<IpNet>,
        facts: &HostFacts,
    ) -> Result<F::Net, Refusal> {
        let is_free = |pool: &F::Net| {
            let pool: IpNet = (*pool).into();
            !held.iter().any(|&held| ipam::overlap(held, pool))
                && self.overlapping(pool, facts).is_none()
        };
        pools.find(is_free).ok_or_else(|| {
            Refusal::conflict(format!("all default {} subnets are in use: give a subnet", F::NAME))
        })
    }

    /// A subnet for a network to come, beside all those that are `held` for others; `global_id` as in
    /// [`NetworkSpec`].
    ///
    /// # Errors
    /// Refuses when there is none left.
    pub fn propose_subnet(
        &mut self,
        is_ipv6: bool,
        held: &BTreeSet<IpNet>,
        global_id: [u8; 5],
        facts: &HostFacts,
    ) -> Result<IpNet, Refusal> {
        if !is_ipv6 {
            let pools = ipam::default_pools();
            return self.choose_subnet::<V4>(pools, held, facts).map(IpNet::V4);
        }
        let prefix = self.unique_local.unwrap_or_else(|| unique_local(global_id));
        let pools = ipam::unique_local_subnets(prefix);
        let subnet = self.choose_subnet::<V6>(pools, held, facts)?;
        self.unique_local = Some(prefix);
        Ok(IpNet::V6(subnet))
    }

    /// A subnet that the user asked for, if a network can have it.
    fn check_subnet<F: Family>(
        &self,
        subnet: F::Net,
        facts: &HostFacts,
    ) -> Result<F::Net, Refusal> {
        let subnet = check_cidr::<F>("subnet", subnet)?;
        if !F::SUBNET_PREFIXES.contains(&F::prefix_len(subnet)) {
            return Err(Refusal::invalid(format!(
                "subnet {subnet} has an unusable size: give a prefix length from {} to {}",
                F::SUBNET_PREFIXES.start(),
                F::SUBNET_PREFIXES.end()
            )));
        }
        let is_in_the_way = |unusable: &&F::Net| ipam::overlap(subnet.into(), (**unusable).into());
        if let Some(unusable) = F::UNUSABLE.iter().find(is_in_the_way) {
            return Err(Refusal::invalid(format!(
                "subnet {subnet} lies in {unusable}, which hosts can't have: give another one"
            )));
        }
        if let Some(other) = self.overlapping(subnet.into(), facts) {
            return Err(Refusal::conflict(format!(
                "subnet {subnet} overlaps {other}: give another one"
            )));
        }
        Ok(subnet)
    }

    /// What a subnet overlaps, in words.
    fn overlapping(&self, subnet: IpNet, facts: &HostFacts) -> Option<String> {
        let ours = self.networks.values().find_map(|network| {
            let other = network.subnets().find(|&other| ipam::overlap(other, subnet))?;
            Some(format!("{other} of network {:?}", network.name))
        });
        if ours.is_some() {
            return ours;
        }
        // What stands on links of ours is in the model, or about to go.
        let mut links = facts.links.values().filter(|link| !link.is_ours());
        let address = links.find_map(|link| {
            let mut nets = link.addresses.iter().map(|address| address.net);
            let net = nets.find(|&net| ipam::overlap(net, subnet))?;
            Some(format!("address {net} of interface {}", link.name))
        });
        address.or_else(|| {
            facts.routes.iter().find_map(|route| {
                let link = facts.links.get(&route.ifindex);
                if route.is_default_in_disguise()
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

/// A /48 of unique local addresses (RFC 4193, section 3.1): fd, the global ID, subnets.
fn unique_local(global_id: [u8; 5]) -> Ipv6Net {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&global_id);
    Ipv6Net::new_assert(octets.into(), 48)
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

fn check_cidr<F: Family>(noun: &str, net: F::Net) -> Result<F::Net, Refusal> {
    let given: IpNet = net.into();
    if given.addr() != given.network() {
        return Err(Refusal::invalid(format!(
            "{noun} {net} has host bits set: did you mean {}?",
            given.trunc()
        )));
    }
    Ok(net)
}

/// Whether ports of the host may be bound to an address.
fn check_host_address(noun: &str, address: IpAddr) -> Result<(), Refusal> {
    let (is_unusable, wildcard) = match address {
        IpAddr::V4(v4) => (v4.is_multicast() || v4.is_broadcast(), "0.0.0.0"),
        // A link-local address means nothing without an interface.
        IpAddr::V6(v6) => (v6.is_multicast() || v6.is_unicast_link_local(), "::"),
    };
    if is_unusable {
        return Err(Refusal::invalid(format!(
            "{noun} {address} is no host's address: give one of this host or {wildcard}"
        )));
    }
    Ok(())
}

fn check_source_address(address: IpAddr, masquerade: bool) -> Result<(), Refusal> {
    check_host_address("SNAT address", address)?;
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
    Ok(())
}
