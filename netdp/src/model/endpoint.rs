//! Endpoints: attaching a container's namespace to a network and letting go of it.
//!
//! Every operation validates everything before it changes anything. Whether a path is a
//! namespace at all is for the caller to find out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    str::FromStr,
};

use super::{
    Endpoint, EndpointId, GatewayMode, MacAddress, Model, Netns, NetnsIdentity, Network, NetworkId,
    Place, PublishSpec, PublishedPort, Refusal, Subnet,
    network::{check_interface_name, check_name},
};
use crate::{
    facts::{HostFacts, Link},
    family::Family,
    ipam,
};

/// An attachment as it is asked for; `None` and empty mean that netdp decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectSpec {
    /// Name of the network.
    pub network: String,
    /// Path of the container's network namespace.
    pub netns: PathBuf,
    /// Which namespace that is at present.
    pub netns_identity: NetnsIdentity,
    /// Names of the interfaces that are in it.
    pub netns_interfaces: BTreeSet<String>,
    /// The endpoint's name.
    pub name: Option<String>,
    /// Its addresses, one per family at most.
    pub addresses: Vec<IpAddr>,
    /// Its MAC address.
    pub mac: Option<MacAddress>,
    /// Name of the interface inside the container.
    pub interface: Option<String>,
    /// Ports to publish along with it.
    pub publish: Vec<PublishSpec>,
}

/// What is decided of an endpoint before it has addresses.
pub(super) struct NewEndpoint<'a> {
    pub(super) id: EndpointId,
    pub(super) network: NetworkId,
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) host_interface: String,
    pub(super) interface: String,
    pub(super) addresses: &'a [IpAddr],
    pub(super) mac: Option<MacAddress>,
    pub(super) published: Vec<PublishedPort>,
}

impl Endpoint {
    /// Which namespace it was attached to; an engine's is the engine's to know.
    pub fn netns_identity(&self) -> Option<NetnsIdentity> {
        match &self.place {
            Place::Netns(netns) => Some(netns.identity),
            Place::Engine(_) => None,
        }
    }
}

impl Model {
    /// The link alias by which an endpoint's host interface is recognised.
    pub fn alias(&self, endpoint: &Endpoint) -> String {
        let network = self.networks.get(&endpoint.network).map_or("", |network| &network.name);
        format!("{}endpoint {network}/{}", Link::ALIAS_PREFIX, endpoint.name)
    }

    /// Attaches a namespace to a network and chooses what the user left open.
    ///
    /// # Errors
    /// Refuses an unknown network, a used name, an address that is outside the subnet or taken,
    /// a MAC address that is no station's or taken, an interface name that is taken, a namespace
    /// that is attached already, and whatever [`Model::publish`] refuses.
    pub fn connect(&mut self, spec: ConnectSpec, facts: &HostFacts) -> Result<EndpointId, Refusal> {
        let network = self.network(&spec.network)?;
        let is_twin = |e: &&Endpoint| e.netns_identity() == Some(spec.netns_identity);
        if let Some(twin) = self.endpoints_of(network.id).find(is_twin) {
            return Err(Refusal::conflict(format!(
                "{} is attached to network {:?} already, as {:?}: disconnect that first",
                spec.netns.display(),
                network.name,
                twin.name
            )));
        }

        let (id, host_interface) = self.choose_id(facts)?;
        let name = spec.name.clone().unwrap_or_else(|| default_name(&spec.netns, id));
        let interface = self.choose_interface(&spec)?;
        let place = Place::Netns(Netns { path: spec.netns, identity: spec.netns_identity });
        let published = self.resolve_ports(network, &spec.publish, facts)?;
        let new = NewEndpoint {
            id,
            network: network.id,
            name,
            place,
            host_interface,
            interface,
            addresses: &spec.addresses,
            mac: spec.mac,
            published,
        };
        self.add_endpoint(new)
    }

    /// Adds an endpoint to its network, with an address of each family of it.
    ///
    /// # Errors
    /// See [`Model::connect`].
    pub(super) fn add_endpoint(&mut self, new: NewEndpoint<'_>) -> Result<EndpointId, Refusal> {
        let NewEndpoint { id, network, name, place, host_interface, interface, .. } = new;
        let network = self.networks.get(&network).ok_or_else(|| {
            Refusal::not_found(format!("the network of endpoint {name:?} is gone"))
        })?;
        let members: Vec<&Endpoint> = self.endpoints_of(network.id).collect();
        check_name("endpoint", &name)?;
        if members.iter().any(|endpoint| endpoint.name == name) {
            return Err(Refusal::conflict(format!(
                "network {:?} has an endpoint {name:?} already: choose another name",
                network.name
            )));
        }
        let used4 = members.iter().filter_map(|e| Some((e.ipv4?, e.name.as_str()))).collect();
        let used6 = members.iter().filter_map(|e| Some((e.ipv6?, e.name.as_str()))).collect();
        let ipv4 = choose_address(network, network.ipv4, &used4, new.addresses)?;
        let ipv6 = choose_address(network, network.ipv6, &used6, new.addresses)?;
        let address4 = ipv4.as_ref().map(|choice| choice.address);
        let address6 = ipv6.as_ref().map(|choice| choice.address);
        let mac = match new.mac {
            Some(mac) => check_mac(network, &members, mac)?,
            None => choose_mac(network, &members, address4, address6)?,
        };
        let endpoint = Endpoint {
            id,
            network: network.id,
            name,
            place,
            host_interface,
            interface,
            ipv4: address4,
            ipv6: address6,
            mac,
            published: new.published.iter().map(|port| (port.key(), port.container_port)).collect(),
        };
        if let Some(network) = self.networks.get_mut(&endpoint.network) {
            if let (Some(side), Some(choice)) = (&mut network.ipv4, ipv4) {
                side.next_address = choice.next_address;
            }
            if let (Some(side), Some(choice)) = (&mut network.ipv6, ipv6) {
                side.next_address = choice.next_address;
            }
        }
        self.next.endpoint = id.0 + 1;
        self.endpoints.insert(id, endpoint);
        Ok(id)
    }

    /// Detaches an endpoint; its address is free again, and its ports go on with the endpoint by
    /// which the container now reaches the world, if there is one.
    ///
    /// # Errors
    /// Refuses an unknown network or endpoint.
    pub fn disconnect(&mut self, network: &str, name: &str) -> Result<Endpoint, Refusal> {
        let id = self.endpoint(network, name)?.id;
        let endpoint = self.release(id).ok_or_else(|| unknown(network, name))?;
        // An engine says itself by which endpoint a container's ports go on.
        if let Some(container) = endpoint.netns_identity() {
            let gateways = self.gateway_endpoints();
            for port in endpoint.ports() {
                self.hand_over(port, container, &gateways);
            }
        }
        Ok(endpoint)
    }

    /// Publishes a port of a container from another of its endpoints; without one it is free.
    fn hand_over(
        &mut self,
        port: PublishedPort,
        container: NetnsIdentity,
        gateways: &HashMap<(NetnsIdentity, bool), EndpointId>,
    ) {
        let container = (container, port.host_address.is_ipv4());
        let Some(&id) = gateways.get(&container) else { return };
        let Some(heir) = self.endpoints.get_mut(&id) else { return };
        // What only a routed network can do: it translates nothing.
        let mode = self.networks.get(&heir.network).map(|network| network.gateway_mode);
        if !port.protocol.has_changeable_ports()
            && port.host_port != port.container_port
            && mode != Some(GatewayMode::Routed)
        {
            return;
        }
        heir.publish(&[port]);
    }

    /// The endpoints by which containers reach the world, by container and whether it is by IPv4: as
    /// their default routes do, by the first that they were given of a network that has a way out.
    /// Engines choose for themselves.
    pub fn gateway_endpoints(&self) -> HashMap<(NetnsIdentity, bool), EndpointId> {
        let mut gateways = HashMap::new();
        for (&id, endpoint) in &self.endpoints {
            let Some(container) = endpoint.netns_identity() else { continue };
            if self.networks.get(&endpoint.network).is_none_or(Network::is_closed) {
                continue;
            }
            for (is_ipv4, has) in
                [(true, endpoint.ipv4.is_some()), (false, endpoint.ipv6.is_some())]
            {
                if has {
                    gateways.entry((container, is_ipv4)).or_insert(id);
                }
            }
        }
        gateways
    }

    /// Lets go of an endpoint whose namespace has vanished, or what an engine has taken.
    pub fn release(&mut self, id: EndpointId) -> Option<Endpoint> {
        self.endpoints.remove(&id)
    }

    /// The endpoint with this name in this network.
    ///
    /// # Errors
    /// Refuses unknown names.
    pub fn endpoint(&self, network: &str, name: &str) -> Result<&Endpoint, Refusal> {
        let id = self.network(network)?.id;
        self.endpoints_of(id)
            .find(|endpoint| endpoint.name == name)
            .ok_or_else(|| unknown(network, name))
    }

    /// The next id whose host interface name nobody else has taken.
    pub(super) fn choose_id(&self, facts: &HostFacts) -> Result<(EndpointId, String), Refusal> {
        // The last id is never given, so that the next one can always be written down.
        (self.next.endpoint..u32::MAX)
            .map(|id| (EndpointId(id), format!("ndv{id}")))
            .find(|(_, name)| facts.link(name).is_none_or(|(_, link)| link.is_ours()))
            .ok_or_else(|| {
                Refusal::conflict("all endpoint ids are used up: `netdp purge` starts over")
            })
    }

    /// `eth0` or the next free one, where the user said nothing.
    fn choose_interface(&self, spec: &ConnectSpec) -> Result<String, Refusal> {
        let ours: Vec<&Endpoint> = self
            .endpoints
            .values()
            .filter(|endpoint| endpoint.netns_identity() == Some(spec.netns_identity))
            .collect();
        let is_taken = |name: &str| {
            spec.netns_interfaces.contains(name) || ours.iter().any(|e| e.interface == name)
        };
        let Some(wanted) = &spec.interface else {
            return (0..u32::MAX)
                .map(|number| format!("eth{number}"))
                .find(|name| !is_taken(name))
                .ok_or_else(|| Refusal::conflict("no interface name is free: give one"));
        };
        check_interface_name("interface name", wanted)?;
        if is_taken(wanted) {
            return Err(Refusal::conflict(format!(
                "{} has an interface {wanted:?} already: choose another name",
                spec.netns.display()
            )));
        }
        Ok(wanted.clone())
    }
}

fn unknown(network: &str, name: &str) -> Refusal {
    Refusal::not_found(format!(
        "network {network:?} has no endpoint {name:?}: `netdp network inspect {network}` shows \
         those that it has"
    ))
}

/// The namespace's own name where it has a telling one.
fn default_name(netns: &Path, id: EndpointId) -> String {
    let name = netns.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if netns.starts_with("/proc") || check_name("endpoint", name).is_err() {
        return format!("endpoint-{}", id.0);
    }
    name.to_owned()
}

/// An address of an endpoint, and where the search for the next one's starts.
struct Choice<F: Family> {
    address: F::Address,
    next_address: F::Address,
}

/// The endpoint's address in one family; `None` where the network does not have the family.
fn choose_address<F: Family>(
    network: &Network,
    side: Option<Subnet<F>>,
    used: &BTreeMap<F::Address, &str>,
    wanted: &[IpAddr],
) -> Result<Option<Choice<F>>, Refusal> {
    let (reserved, network) = (&network.reserved, &network.name);
    let mut wanted = wanted.iter().copied().filter_map(F::of);
    let (first, second) = (wanted.next(), wanted.next());
    if second.is_some() {
        return Err(Refusal::invalid(format!(
            "more than one {} address is not supported: give one per family",
            F::NAME
        )));
    }
    let Some(side) = side else {
        return match first {
            None => Ok(None),
            Some(address) => Err(Refusal::invalid(format!(
                "network {network:?} has no {}: leave address {address} out",
                F::NAME
            ))),
        };
    };
    let Some(address) = first else {
        let reserved = reserved.iter().copied().filter_map(F::of);
        let used: BTreeSet<F::Address> = used.keys().copied().chain(reserved).collect();
        let address = ipam::choose_address(&side, &used).ok_or_else(|| {
            Refusal::conflict(format!(
                "no address is free in {} of network {network:?}: disconnect an endpoint",
                side.range
            ))
        })?;
        return Ok(Some(Choice { address, next_address: F::next(address) }));
    };
    if !ipam::is_host_address::<F>(side.subnet, address) {
        return Err(Refusal::invalid(format!(
            "{address} is no host address in {} of network {network:?}: give one that is",
            side.subnet
        )));
    }
    if address == side.gateway {
        return Err(Refusal::conflict(format!(
            "{address} is the gateway of network {network:?}: give another address"
        )));
    }
    if let Some(other) = used.get(&address) {
        return Err(Refusal::conflict(format!(
            "{address} belongs to endpoint {other:?} of network {network:?}: give another address"
        )));
    }
    Ok(Some(Choice { address, next_address: side.next_address }))
}

/// A MAC address that follows from the addresses, and is nobody else's in the network.
fn choose_mac(
    network: &Network,
    members: &[&Endpoint],
    ipv4: Option<Ipv4Addr>,
    ipv6: Option<Ipv6Addr>,
) -> Result<MacAddress, Refusal> {
    match (ipv4, ipv6) {
        // Somebody may have given it to another endpoint by hand, and hears of it.
        (Some(address), _) => check_mac(network, members, MacAddress::from_ipv4(address)),
        (None, Some(address)) => (0..=u8::MAX)
            .map(|attempt| MacAddress::from_ipv6(address, attempt))
            .find(|&mac| check_mac(network, members, mac).is_ok())
            .ok_or_else(|| {
                Refusal::conflict(format!("no MAC address is left for {address}: give one"))
            }),
        (None, None) => Err(Refusal::invalid(format!(
            "network {:?} has neither IPv4 nor IPv6: make it anew",
            network.name
        ))),
    }
}

fn check_mac(
    network: &Network,
    members: &[&Endpoint],
    mac: MacAddress,
) -> Result<MacAddress, Refusal> {
    if mac.0[0] & 1 == 1 || mac.0 == [0; 6] {
        return Err(Refusal::invalid(format!(
            "MAC address {mac} is no station's: give one with an even first octet"
        )));
    }
    if mac == network.bridge_mac() {
        return Err(Refusal::conflict(format!(
            "MAC address {mac} is the gateway's of network {:?}: give another one",
            network.name
        )));
    }
    if let Some(other) = members.iter().find(|endpoint| endpoint.mac == mac) {
        return Err(Refusal::conflict(format!(
            "MAC address {mac} belongs to endpoint {:?} of network {:?}: give another one",
            other.name, network.name
        )));
    }
    Ok(mac)
}

impl MacAddress {
    /// Docker's choice: locally administered, the IPv4 address in the last four octets.
    pub fn from_ipv4(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0x42, a, b, c, d])
    }

    /// Locally administered, the end of the IPv6 address in the last four octets and a digest of
    /// the rest before them. Addresses that share it get other ones at the next `attempt`.
    pub fn from_ipv6(address: Ipv6Addr, attempt: u8) -> Self {
        let [rest @ .., a, b, c, d] = address.octets();
        let digest = rest.iter().fold(attempt, |digest, octet| digest ^ octet);
        Self([0x02, digest, a, b, c, d])
    }
}

impl FromStr for MacAddress {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let octet = |part: &str| {
            let is_octet = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            is_octet.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let octets: Option<Vec<u8>> = text.split(':').map(octet).collect();
        octets.and_then(|octets| octets.try_into().ok()).map(Self).ok_or_else(|| {
            Refusal::invalid(format!(
                "{text:?} is no MAC address: write one like 02:42:ac:14:00:02"
            ))
        })
    }
}
