//! The desired state: networks, endpoints, published ports and policies as the user asked for
//! them, with every choice that was made on the way (ids, addresses, ports).
//!
//! Owns the shapes and the pure operations on them. Knows nothing of kernel objects, of files, of
//! wire formats.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use ipnet::Ipv6Net;

use crate::{
    family::{Family, V4, V6},
    runs::{Ported, Runs},
};

mod endpoint;
pub mod engine;
mod network;
mod options;
pub mod policy;
mod publish;
mod refusal;
#[cfg(test)]
pub(crate) mod tests;

pub use self::{
    endpoint::ConnectSpec,
    engine::OfferSpec,
    network::NetworkSpec,
    publish::PublishSpec,
    refusal::{Refusal, RefusalKind},
};

/// Identifies a network in maps and flow keys: 1..=4095, never reused while flows of it may live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkId(pub u32);

/// Identifies one attachment of one container, never reused: a successor with the same name and
/// address has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub u32);

/// Everything the user asked for. The controller makes the kernel agree with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// By id; names are unique among them.
    pub networks: BTreeMap<NetworkId, Network>,
    /// By id; names are unique within a network.
    pub endpoints: BTreeMap<EndpointId, Endpoint>,
    /// The next network id to try and the next endpoint id to give.
    pub next: NextIds,
    /// This host's own /48 of unique local addresses (RFC 4193), where IPv6 subnets come from
    /// that the user left open; chosen with the first of them.
    pub unique_local: Option<Ipv6Net>,
}

/// Where the search for a free id goes on; part of the state so that ids are not reused early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextIds {
    /// Next network id to try.
    pub network: u32,
    /// Next endpoint id.
    pub endpoint: u32,
}

impl Default for NextIds {
    fn default() -> Self {
        Self { network: 1, endpoint: 1 }
    }
}

/// One bridge, its subnets, its options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// See [`NetworkId`].
    pub id: NetworkId,
    /// The user's name for it.
    pub name: String,
    /// How the container engine that made it calls it; `None` where the user did.
    pub engine_id: Option<String>,
    /// Name of the Linux bridge.
    pub bridge: String,
    /// The IPv4 side. A network has at least one of the two.
    pub ipv4: Option<Subnet<V4>>,
    /// The IPv6 side.
    pub ipv6: Option<Subnet<V6>>,
    /// How packets from and to the outside are treated.
    pub gateway_mode: GatewayMode,
    /// No way in or out; members and the gateway only.
    pub internal: bool,
    /// Whether members may talk to each other directly.
    pub icc: bool,
    /// Source NAT for what leaves through an uplink.
    pub masquerade: bool,
    /// How much that depends on whom an endpoint talks to.
    pub nat: NatBehaviour,
    /// MTU of bridge and endpoints in bytes; the kernel's 1500 where the user said nothing.
    pub mtu: u32,
    /// Most flows that one endpoint may have opened, in both families together; 0 = no limit.
    pub endpoint_flows: u32,
    /// Addresses that are chosen for no endpoint: somebody else's, on the same bridge.
    pub reserved: BTreeSet<IpAddr>,
    /// The user's rules, evaluated in order before our own.
    pub policy: Vec<PolicyRule>,
    /// Incremented with every change of `policy`; flows classified under an older one are
    /// classified again.
    pub policy_generation: u32,
}

/// One family of a network: its subnet, the gateway, the part that addresses are chosen from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet<F: Family> {
    /// Network address and prefix length.
    pub subnet: F::Net,
    /// The bridge's own address.
    pub gateway: F::Address,
    /// Addresses are chosen from here; the subnet where the user said nothing.
    pub range: F::Net,
    /// Address at which the search for the next free one starts.
    pub next_address: F::Address,
    /// Host address that `-p` without one means: unspecified = every local address, `None` = such
    /// ports are not published in this family.
    pub host_binding: Option<F::Address>,
    /// Source address towards the world instead of the uplink's own.
    pub snat_ip: Option<F::Address>,
}

/// Docker's gateway modes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GatewayMode {
    /// Masquerade out, published ports in, everything else dropped.
    #[default]
    Nat,
    /// As `Nat`, but containers also accept direct access from outside.
    NatUnprotected,
    /// No translation; published ports and ping accepted.
    Routed,
    /// As an internal network, and the host is unreachable.
    Isolated,
}

/// How much source NAT depends on whom an endpoint talks to (RFC 4787, sections 4.1 and 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NatBehaviour {
    /// Each flow gets a port of its own, and only its peer's packets come back by it.
    #[default]
    EndpointDependent,
    /// An endpoint's port gets one port outside for all its flows; packets come back as above.
    EndpointIndependentMapping,
    /// The same, and whoever sends to that port reaches the endpoint, if the policy agrees.
    EndpointIndependent,
}

impl NatBehaviour {
    /// Whether an endpoint's port gets one port outside for all its flows.
    #[must_use]
    pub const fn maps(self) -> bool {
        !matches!(self, Self::EndpointDependent)
    }
}

/// One container's attachment to one network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// See [`EndpointId`]; also the generation that guards against stale flows.
    pub id: EndpointId,
    /// The network it belongs to.
    pub network: NetworkId,
    /// The user's name for it, unique within the network.
    pub name: String,
    /// Where the container's end of the veth pair is.
    pub place: Place,
    /// Name of the host's end of the veth pair.
    pub host_interface: String,
    /// Name of the container's end: inside the container, or while it waits on the host for an
    /// engine, which then gives it another.
    pub interface: String,
    /// Its address in the network's IPv4 subnet; there iff the network has one.
    pub ipv4: Option<Ipv4Addr>,
    /// Its address in the network's IPv6 subnet; there iff the network has one.
    pub ipv6: Option<Ipv6Addr>,
    /// Its MAC address.
    pub mac: MacAddress,
    /// Its published ports, and the container's to which they lead.
    pub published: Runs<PublishedKey, u16>,
}

/// Where the container's end of an endpoint's veth pair is, and who sees to it there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a namespace that netdp was shown. It is put there by netdp, which keeps its name,
    /// addresses and routes right.
    Netns(Netns),
    /// With a container engine, which takes it from the host into a namespace of its own and gives
    /// it name, addresses and routes there. It can be offered only once: where the pair has gone with
    /// that namespace, the endpoint is over.
    Engine(Engaged),
}

/// A container's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    /// Its path.
    pub path: PathBuf,
    /// Which namespace the path meant when the endpoint was made.
    pub identity: NetnsIdentity,
}

/// What is known of an endpoint that a container engine has asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engaged {
    /// How the engine calls the endpoint.
    pub id: String,
    /// Where the engine said that it takes it; `None` while no container has it.
    pub sandbox: Option<PathBuf>,
}

/// Device and inode of a namespace file: tells a namespace from a successor under the same path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsIdentity {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// An Ethernet address in transmission order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublishedKey {
    /// 0.0.0.0 or :: = every local address of that family.
    pub address: IpAddr,
    /// Host port.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

impl Ported for PublishedKey {
    type Line = (Protocol, IpAddr);

    fn split(self) -> ((Protocol, IpAddr), u16) {
        ((self.protocol, self.address), self.port)
    }

    fn join((protocol, address): (Protocol, IpAddr), port: u16) -> Self {
        Self { address, port, protocol }
    }
}

/// One host address and port that reaches one container port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublishedPort {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Host address; 0.0.0.0 and :: = every local address of that family.
    pub host_address: IpAddr,
    /// Host port, as chosen where the user left it open.
    pub host_port: u16,
    /// Port the container listens on.
    pub container_port: u16,
}

/// Transport protocols that ports can be published for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP, IP protocol 6.
    Tcp,
    /// UDP, IP protocol 17.
    Udp,
    /// SCTP, IP protocol 132.
    Sctp,
}

impl PublishedPort {
    /// The host's side of it.
    #[must_use]
    pub fn key(&self) -> PublishedKey {
        let Self { protocol, host_address: address, host_port: port, .. } = *self;
        PublishedKey { address, port, protocol }
    }

    /// What leads to a container's port.
    #[must_use]
    pub fn new(
        PublishedKey { address, port, protocol }: PublishedKey,
        container_port: u16,
    ) -> Self {
        Self { protocol, host_address: address, host_port: port, container_port }
    }
}

impl Endpoint {
    /// Its published ports, one by one.
    pub fn ports(&self) -> impl Iterator<Item = PublishedPort> {
        self.published.iter().map(|(key, container_port)| PublishedPort::new(key, container_port))
    }

    /// Adds ports to those that it has published.
    fn publish(&mut self, ports: &[PublishedPort]) {
        self.published.extend(ports.iter().map(|port| (port.key(), port.container_port)));
    }
}

impl Protocol {
    /// IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Whether translation changes ports. SCTP's checksum covers the whole packet (RFC 9260,
    /// section 6.8), so its ports stay as they are.
    pub fn has_changeable_ports(self) -> bool {
        self != Self::Sctp
    }
}

/// One line of a policy: what to do with new connections into the network from these sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyRule {
    /// What happens to a match.
    pub action: Action,
    /// Who matches.
    pub source: Source,
}

/// Whom a line of a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Everybody, in both families.
    Any,
    /// First and last address that match.
    Ipv4(Ipv4Addr, Ipv4Addr),
    /// The same for IPv6.
    Ipv6(Ipv6Addr, Ipv6Addr),
}

/// What a backend has to know of a policy's line in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What happens to a match.
    pub action: Action,
    /// First source address that matches.
    pub first: IpAddr,
    /// Last source address that matches; of the same family.
    pub last: IpAddr,
}

/// A rule's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Go on to netdp's own rules.
    Allow,
    /// Drop and count.
    Deny,
}
