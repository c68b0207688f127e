//! Published ports: Docker's `-p` grammar, the choice of host ports, collisions.
//!
//! Owns text → [`PublishSpec`] → [`PublishedPort`]s. Whether another program of the host listens
//! on a port is for the controller to find out when it reserves it.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    str::FromStr,
};

use super::{
    Endpoint, EndpointId, GatewayMode, Model, Network, Protocol, PublishedKey, PublishedPort,
    Refusal,
};
use crate::{facts::HostFacts, runs::Runs};

/// Host ports that are chosen from where the user names none: dynamic ports (RFC 6335) below
/// those that are reserved for source NAT.
const CHOSEN_PORTS: RangeInclusive<u16> = 49_153..=49_999;

/// One `-p` argument: `[HOSTIP:][HOST[-END]:]PORT[-END][/tcp|udp|sctp]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishSpec {
    protocol: Protocol,
    /// In brackets where it is an IPv6 one.
    host_address: Option<IpAddr>,
    host_ports: HostPorts,
    container_ports: RangeInclusive<u16>,
}

/// How the host side of a `-p` argument is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
enum HostPorts {
    /// Left open: netdp chooses for each container port.
    Any,
    /// One free port of this range, for a single container port.
    OneOf(RangeInclusive<u16>),
    /// One to one, from this host port on; the range ends within the port space.
    From(u16),
}

impl FromStr for PublishSpec {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        let refused = |reason: &str| Refusal::invalid(format!("port {text:?}: {reason}"));
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = protocol.parse().map_err(|Refusal { message, .. }| refused(&message))?;
        // The colons of an IPv6 address are not ours.
        let (bracketed, ports) = match ports.strip_prefix('[') {
            None => (None, ports),
            Some(rest) => {
                let (address, ports) = rest
                    .split_once("]:")
                    .ok_or_else(|| refused("an IPv6 address is written [ADDRESS]:HOST:PORT"))?;
                (Some(address), ports)
            }
        };
        let parts: Vec<&str> = ports.split(':').collect();
        let (address, host, container) = match (bracketed, &parts[..]) {
            (None, [container]) => (None, "", *container),
            (address, [host, container]) => (address, *host, *container),
            (None, [address, host, container]) => (Some(*address), *host, *container),
            _ => return Err(refused("write [HOSTIP:]HOST[-END]:PORT[-END][/tcp|udp|sctp]")),
        };
        let host_address = match address {
            None => None,
            Some("") if bracketed.is_none() => None,
            Some(address) => {
                let family = if bracketed.is_some() { "IPv6" } else { "IPv4" };
                let is_right = |parsed: &IpAddr| parsed.is_ipv6() == bracketed.is_some();
                let parsed = address.parse().ok().filter(is_right);
                let unreadable = || refused(&format!("{address:?} is no {family} address"));
                Some(parsed.ok_or_else(unreadable)?)
            }
        };
        let container_ports = parse_range(container).map_err(|reason| refused(&reason))?;
        let host_ports = if host.is_empty() {
            HostPorts::Any
        } else {
            let host = parse_range(host).map_err(|reason| refused(&reason))?;
            if host.len() == container_ports.len() {
                HostPorts::From(*host.start())
            } else if container_ports.len() == 1 {
                HostPorts::OneOf(host)
            } else {
                return Err(refused(&format!(
                    "{} host ports can't lead to {} container ports: give ranges of equal length",
                    host.len(),
                    container_ports.len()
                )));
            }
        };
        Ok(Self { protocol, host_address, host_ports, container_ports })
    }
}

fn parse_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |text: &str| match text.parse() {
        // `parse` would take "+80".
        Ok(port) if port > 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
        _ => Err(format!("{text:?} is no port: give a number from 1 to 65535")),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    if first > last {
        return Err(format!("the range {text} is empty: write {last}-{first}"));
    }
    Ok(first..=last)
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

impl Protocol {
    /// The one with this IP protocol number.
    ///
    /// # Errors
    /// Refuses what ports can't be published for.
    pub fn from_number(number: u8) -> Result<Self, Refusal> {
        let mut known = [Self::Tcp, Self::Udp, Self::Sctp].into_iter();
        known.find(|protocol| protocol.number() == number).ok_or_else(|| {
            Refusal::invalid(format!("IP protocol {number} has no ports: give tcp, udp or sctp"))
        })
    }
}

impl FromStr for Protocol {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "sctp" => Ok(Self::Sctp),
            _ => Err(Refusal::invalid(format!("{text:?} is no protocol: give tcp, udp or sctp"))),
        }
    }
}

/// The host side, as `ss` writes it: `tcp 0.0.0.0:8080`, `tcp [::]:8080`.
impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.protocol, SocketAddr::new(self.host_address, self.host_port))
    }
}

impl PublishSpec {
    /// One container port, published on any of a range of host ports, or where netdp chooses.
    ///
    /// # Errors
    /// Refuses port 0 and a range that is empty.
    pub fn of_port(
        protocol: Protocol,
        host_address: Option<IpAddr>,
        host_ports: Option<RangeInclusive<u16>>,
        container_port: u16,
    ) -> Result<Self, Refusal> {
        let host_ports = match host_ports {
            None => HostPorts::Any,
            Some(range) if range.start() == range.end() => HostPorts::From(*range.start()),
            Some(range) => HostPorts::OneOf(range),
        };
        let is_unusable = match &host_ports {
            HostPorts::Any => false,
            HostPorts::From(port) => *port == 0,
            HostPorts::OneOf(range) => range.is_empty() || *range.start() == 0,
        };
        if is_unusable || container_port == 0 {
            return Err(Refusal::invalid(format!(
                "container port {container_port}/{protocol} is published on no usable host port: \
                 give ports from 1 to 65535"
            )));
        }
        let container_ports = container_port..=container_port;
        Ok(Self { protocol, host_address, host_ports, container_ports })
    }

    /// Whether `port` came of an argument like this one.
    fn matches(&self, port: &PublishedPort) -> bool {
        let host_matches = match &self.host_ports {
            HostPorts::Any => true,
            HostPorts::OneOf(range) => range.contains(&port.host_port),
            HostPorts::From(first) => {
                let offset = port.container_port.checked_sub(*self.container_ports.start());
                offset.and_then(|offset| first.checked_add(offset)) == Some(port.host_port)
            }
        };
        host_matches
            && self.protocol == port.protocol
            && self.container_ports.contains(&port.container_port)
            && self.host_address.is_none_or(|address| address == port.host_address)
    }

    /// Whether a container port may be published under its own number.
    fn allows_same(&self, container_port: u16) -> bool {
        match &self.host_ports {
            HostPorts::Any => true,
            HostPorts::OneOf(range) => range.contains(&container_port),
            HostPorts::From(first) => first == self.container_ports.start(),
        }
    }
}

impl Model {
    /// Publishes ports of an endpoint; all of them or none.
    ///
    /// # Errors
    /// Refuses an unknown or ambiguous endpoint, a network that nothing comes into, a host
    /// address that the host does not have, and ports that are published already.
    pub fn publish(
        &mut self,
        name: &str,
        network: Option<&str>,
        specs: &[PublishSpec],
        facts: &HostFacts,
    ) -> Result<Vec<PublishedPort>, Refusal> {
        let endpoint = self.find_endpoint(name, network)?;
        let (id, network) = (endpoint.id, self.network_of(endpoint)?);
        let ports = self.resolve_ports(network, specs, facts)?;
        self.endpoint_mut(id)?.publish(&ports);
        Ok(ports)
    }

    /// Takes published ports of an endpoint back; what an argument leaves open matches anything.
    ///
    /// # Errors
    /// Refuses an unknown or ambiguous endpoint, and an argument of which something is not
    /// published.
    pub fn unpublish(
        &mut self,
        name: &str,
        network: Option<&str>,
        specs: &[PublishSpec],
    ) -> Result<Vec<PublishedPort>, Refusal> {
        let endpoint = self.find_endpoint(name, network)?;
        let id = endpoint.id;
        for spec in specs {
            let found: BTreeSet<u16> = endpoint
                .ports()
                .filter(|port| spec.matches(port))
                .map(|port| port.container_port)
                .collect();
            if let Some(missing) = spec.container_ports.clone().find(|port| !found.contains(port)) {
                return Err(Refusal::not_found(format!(
                    "container port {missing}/{} of {name:?} is not published that way: \
                     `netdp network inspect` shows what is",
                    spec.protocol
                )));
            }
        }
        let is_meant = |port: &PublishedPort| specs.iter().any(|spec| spec.matches(port));
        let meant: Vec<PublishedPort> = endpoint.ports().filter(is_meant).collect();
        let published = &mut self.endpoint_mut(id)?.published;
        for port in &meant {
            published.remove(port.key());
        }
        Ok(meant)
    }

    fn find_endpoint(&self, name: &str, network: Option<&str>) -> Result<&Endpoint, Refusal> {
        if let Some(network) = network {
            return self.endpoint(network, name);
        }
        let found: Vec<&Endpoint> =
            self.endpoints.values().filter(|endpoint| endpoint.name == name).collect();
        match found[..] {
            [endpoint] => Ok(endpoint),
            [] => Err(Refusal::not_found(format!(
                "there is no endpoint {name:?}: `netdp network inspect` shows a network's"
            ))),
            _ => {
                let networks: Vec<&str> = found
                    .iter()
                    .filter_map(|endpoint| self.networks.get(&endpoint.network))
                    .map(|network| network.name.as_str())
                    .collect();
                Err(Refusal::conflict(format!(
                    "{name:?} is an endpoint of networks {}: say which with --network",
                    networks.join(", ")
                )))
            }
        }
    }

    pub(super) fn network_of(&self, endpoint: &Endpoint) -> Result<&Network, Refusal> {
        self.networks.get(&endpoint.network).ok_or_else(|| {
            Refusal::not_found(format!("the network of {:?} is gone", endpoint.name))
        })
    }

    pub(super) fn endpoint_mut(&mut self, id: EndpointId) -> Result<&mut Endpoint, Refusal> {
        self.endpoints
            .get_mut(&id)
            .ok_or_else(|| Refusal::not_found(format!("endpoint {} is gone", id.0)))
    }

    /// The ports that `specs` mean for an endpoint of `network`, host ports chosen.
    pub(super) fn resolve_ports(
        &self,
        network: &Network,
        specs: &[PublishSpec],
        facts: &HostFacts,
    ) -> Result<Vec<PublishedPort>, Refusal> {
        if specs.is_empty() {
            return Ok(Vec::new());
        }
        if network.is_closed() {
            let kind = match network.gateway_mode {
                GatewayMode::Isolated => "isolated",
                _ => "internal",
            };
            return Err(Refusal::invalid(format!(
                "network {:?} is {kind}: nothing can be published from it",
                network.name
            )));
        }
        let mut taken = TakenPorts::of(self);
        let mut resolved = Vec::new();
        for spec in specs {
            // A routed network is dialled at the containers' own addresses and ports.
            let keeps_ports = !spec.protocol.has_changeable_ports()
                && network.gateway_mode != GatewayMode::Routed;
            let addresses = host_addresses(network, spec, facts)?;
            for (index, container_port) in (0..=u16::MAX).zip(spec.container_ports.clone()) {
                // One host port for both families: whoever is told of it need not ask which.
                let on_all = |host_port| -> Vec<PublishedPort> {
                    let port = |&host_address: &IpAddr| PublishedPort {
                        protocol: spec.protocol,
                        host_address,
                        host_port,
                        container_port,
                    };
                    addresses.iter().map(port).collect()
                };
                let choice = match &spec.host_ports {
                    _ if keeps_ports => {
                        if !spec.allows_same(container_port) {
                            return Err(cannot_translate(spec.protocol, container_port));
                        }
                        taken.claim(on_all(container_port), "give another host address")?
                    }
                    HostPorts::From(first) => {
                        let ports = on_all(first.saturating_add(index));
                        taken.claim(ports, "give another host port")?
                    }
                    HostPorts::OneOf(range) => taken.choose(range, facts, on_all)?,
                    HostPorts::Any => taken.choose(&CHOSEN_PORTS, facts, on_all)?,
                };
                for port in choice {
                    taken.add(port.key(), port.host_port, "this request");
                    resolved.push(port);
                }
            }
        }
        Ok(resolved)
    }
}

fn cannot_translate(protocol: Protocol, port: u16) -> Refusal {
    Refusal::invalid(format!(
        "container port {port}/{protocol} can only be published as host port {port}, because \
         the checksum of {protocol} covers the ports: write {port}:{port}/{protocol}"
    ))
}

/// The host addresses that an argument means for an endpoint of `network`.
fn host_addresses(
    network: &Network,
    spec: &PublishSpec,
    facts: &HostFacts,
) -> Result<Vec<IpAddr>, Refusal> {
    let Some(address) = spec.host_address else {
        return Ok(network.host_bindings().collect());
    };
    let (family, wildcard, has_family) = match address {
        IpAddr::V4(_) => ("IPv4", "0.0.0.0", network.ipv4.is_some()),
        IpAddr::V6(_) => ("IPv6", "::", network.ipv6.is_some()),
    };
    if !has_family {
        return Err(Refusal::invalid(format!(
            "network {:?} has no {family}: {address} can't lead into it",
            network.name
        )));
    }
    if !(address.is_unspecified() || address.is_loopback() || facts.is_local(address)) {
        return Err(Refusal::invalid(format!(
            "{address} is no address of this host: give one that is, or {wildcard}"
        )));
    }
    Ok(vec![address])
}

/// Who has which host port, on which addresses.
#[derive(Default)]
struct TakenPorts<'a> {
    owners: Runs<PublishedKey, &'a str>,
    addresses: BTreeSet<IpAddr>,
}

impl<'a> TakenPorts<'a> {
    fn of(model: &'a Model) -> Self {
        let mut taken = Self::default();
        for endpoint in model.endpoints.values() {
            for (key, last, _) in endpoint.published.runs() {
                taken.add(key, last, &endpoint.name);
            }
        }
        taken
    }

    fn add(&mut self, key: PublishedKey, last: u16, owner: &'a str) {
        self.addresses.insert(key.address);
        self.owners.insert_run(key, last, owner);
    }

    /// Who has the port on this address; 0.0.0.0 and :: mean every address of their family.
    fn owner(&self, port: &PublishedPort) -> Option<&'a str> {
        let wanted = port.host_address;
        let collides = |address: IpAddr| {
            let is_wild = address.is_unspecified() || wanted.is_unspecified();
            address == wanted || is_wild && address.is_ipv4() == wanted.is_ipv4()
        };
        let others = self.addresses.iter().filter(|address| collides(**address));
        others
            .map(|&address| PublishedKey { address, ..port.key() })
            .find_map(|key| self.owners.get(key))
    }

    /// The same ports, if nobody has one of them.
    fn claim(
        &self,
        ports: Vec<PublishedPort>,
        advice: &str,
    ) -> Result<Vec<PublishedPort>, Refusal> {
        match ports.iter().find_map(|port| Some((port, self.owner(port)?))) {
            None => Ok(ports),
            Some((port, owner)) => {
                Err(Refusal::conflict(format!("{port} is published by {owner} already: {advice}")))
            }
        }
    }

    /// The first port of a range that is free on all addresses.
    fn choose(
        &self,
        range: &RangeInclusive<u16>,
        facts: &HostFacts,
        on_all: impl Fn(u16) -> Vec<PublishedPort>,
    ) -> Result<Vec<PublishedPort>, Refusal> {
        let is_free = |port: &PublishedPort| {
            self.owner(port).is_none()
                && !facts.ports_in_use.contains(&(port.protocol, port.host_port))
        };
        range.clone().map(on_all).find(|ports| ports.iter().all(is_free)).ok_or_else(|| {
            Refusal::conflict(format!(
                "all host ports from {} to {} are published or in use: give another range",
                range.start(),
                range.end()
            ))
        })
    }
}
