//! Published ports: Docker's `-p` grammar, the choice of host ports, collisions.
//!
//! Owns text → [`PublishSpec`] → [`PublishedPort`]s. Whether another program of the host listens
//! on a port is for the controller to find out when it reserves it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::Ipv4Addr,
    ops::RangeInclusive,
    str::FromStr,
};

use super::{
    Endpoint, EndpointId, GatewayMode, Model, Network, Protocol, PublishedPort, Refusal,
    network::ipv6_refused,
};
use crate::facts::HostFacts;

/// Host ports that are chosen from where the user names none: dynamic ports (RFC 6335) below
/// those that are reserved for source NAT.
const CHOSEN_PORTS: RangeInclusive<u16> = 49_153..=49_999;

/// One `-p` argument: `[HOSTIP:][HOST[-END]:]PORT[-END][/tcp|udp]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishSpec {
    protocol: Protocol,
    host_address: Option<Ipv4Addr>,
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
        if text.contains('[') {
            return Err(ipv6_refused("host addresses", "address"));
        }
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = protocol.parse().map_err(|Refusal { message, .. }| refused(&message))?;
        let parts: Vec<&str> = ports.split(':').collect();
        let (address, host, container) = match parts[..] {
            [container] => (None, "", container),
            [host, container] => (None, host, container),
            [address, host, container] => (Some(address), host, container),
            _ => return Err(refused("write [HOSTIP:]HOST[-END]:PORT[-END][/tcp|udp]")),
        };
        let host_address = match address {
            None | Some("") => None,
            Some(address) => {
                let unreadable = |_| refused(&format!("{address:?} is no IPv4 address"));
                Some(address.parse().map_err(unreadable)?)
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
        })
    }
}

impl FromStr for Protocol {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "sctp" => Err(Refusal::invalid("sctp is not supported yet: give tcp or udp")),
            _ => Err(Refusal::invalid(format!("{text:?} is no protocol: give tcp or udp"))),
        }
    }
}

/// The host side, as `ss` writes it: `tcp 0.0.0.0:8080`.
impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}:{}", self.protocol, self.host_address, self.host_port)
    }
}

impl PublishSpec {
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
        self.endpoint_mut(id)?.published.extend_from_slice(&ports);
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
                .published
                .iter()
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
        let published = &mut self.endpoint_mut(id)?.published;
        Ok(published.extract_if(.., |port| is_meant(port)).collect())
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

    fn network_of(&self, endpoint: &Endpoint) -> Result<&Network, Refusal> {
        self.networks.get(&endpoint.network).ok_or_else(|| {
            Refusal::not_found(format!("the network of {:?} is gone", endpoint.name))
        })
    }

    fn endpoint_mut(&mut self, id: EndpointId) -> Result<&mut Endpoint, Refusal> {
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
            let host_address = spec.host_address.unwrap_or(network.host_binding);
            if !(host_address.is_unspecified()
                || host_address.is_loopback()
                || facts.is_local(host_address))
            {
                return Err(Refusal::invalid(format!(
                    "{host_address} is no address of this host: give one that is, or 0.0.0.0"
                )));
            }
            for (index, container_port) in (0..=u16::MAX).zip(spec.container_ports.clone()) {
                let port = |host_port| PublishedPort {
                    protocol: spec.protocol,
                    host_address,
                    host_port,
                    container_port,
                };
                let choice = match &spec.host_ports {
                    HostPorts::From(first) => {
                        let port = port(first.saturating_add(index));
                        if let Some(owner) = taken.owner(&port) {
                            return Err(Refusal::conflict(format!(
                                "{port} is published by {owner} already: give another host port"
                            )));
                        }
                        port
                    }
                    HostPorts::OneOf(range) => taken.choose(range, facts, port)?,
                    HostPorts::Any => taken.choose(&CHOSEN_PORTS, facts, port)?,
                };
                taken.add(&choice, "this request");
                resolved.push(choice);
            }
        }
        Ok(resolved)
    }
}

/// Who has which host port, on which addresses.
struct TakenPorts<'a>(BTreeMap<(Protocol, u16), Vec<(Ipv4Addr, &'a str)>>);

impl<'a> TakenPorts<'a> {
    fn of(model: &'a Model) -> Self {
        let mut taken = Self(BTreeMap::new());
        for endpoint in model.endpoints.values() {
            for port in &endpoint.published {
                taken.add(port, &endpoint.name);
            }
        }
        taken
    }

    fn add(&mut self, port: &PublishedPort, owner: &'a str) {
        self.0.entry((port.protocol, port.host_port)).or_default().push((port.host_address, owner));
    }

    /// Who has the port on this address; 0.0.0.0 means every address.
    fn owner(&self, port: &PublishedPort) -> Option<&'a str> {
        let owners = self.0.get(&(port.protocol, port.host_port))?;
        let collides = |address: Ipv4Addr| {
            address == port.host_address
                || address.is_unspecified()
                || port.host_address.is_unspecified()
        };
        owners.iter().find(|(address, _)| collides(*address)).map(|(_, owner)| *owner)
    }

    fn choose(
        &self,
        range: &RangeInclusive<u16>,
        facts: &HostFacts,
        port: impl Fn(u16) -> PublishedPort,
    ) -> Result<PublishedPort, Refusal> {
        let is_free = |port: &PublishedPort| {
            self.owner(port).is_none()
                && !facts.ports_in_use.contains(&(port.protocol, port.host_port))
        };
        range.clone().map(port).find(is_free).ok_or_else(|| {
            Refusal::conflict(format!(
                "all host ports from {} to {} are published or in use: give another range",
                range.start(),
                range.end()
            ))
        })
    }
}
