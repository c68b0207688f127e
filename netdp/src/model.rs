//! The desired state: networks, endpoints, published ports and policies as the user asked for
//! them, with every choice that was made on the way (ids, addresses, ports).
//!
//! Owns the shapes and the pure operations on them. Knows nothing of kernel objects, of files, of
//! wire formats.

use std::{collections::BTreeMap, fmt, net::Ipv4Addr, path::PathBuf};

use ipnet::Ipv4Net;

mod endpoint;
mod network;
mod options;
pub mod policy;
mod publish;
mod refusal;
#[cfg(test)]
pub(crate) mod tests;

pub use self::{
    endpoint::ConnectSpec,
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
    /// Name of the Linux bridge.
    pub bridge: String,
    /// The IPv4 side; every network has one until IPv6-only networks come.
    pub ipv4: Subnet4,
    /// How packets from and to the outside are treated.
    pub gateway_mode: GatewayMode,
    /// No way in or out; members and the gateway only.
    pub internal: bool,
    /// Whether members may talk to each other directly.
    pub icc: bool,
    /// Source NAT for what leaves through an uplink.
    pub masquerade: bool,
    /// MTU of bridge and endpoints in bytes; the kernel's 1500 where the user said nothing.
    pub mtu: u32,
    /// Host address that `-p` without one means; 0.0.0.0 = every local address.
    pub host_binding: Ipv4Addr,
    /// Source address towards the world instead of the uplink's own.
    pub snat_ip: Option<Ipv4Addr>,
    /// The user's rules, evaluated in order before our own.
    pub policy: Vec<Rule>,
    /// Incremented with every change of `policy`; flows classified under an older one are
    /// classified again.
    pub policy_generation: u32,
    /// Address at which the search for the next free one starts.
    pub next_address: Ipv4Addr,
}

/// An IPv4 subnet with its gateway and the part that addresses are chosen from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet4 {
    /// Network address and prefix length.
    pub subnet: Ipv4Net,
    /// The bridge's own address.
    pub gateway: Ipv4Addr,
    /// Addresses are chosen from here; the subnet where the user said nothing.
    pub range: Ipv4Net,
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

/// One container's attachment to one network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// See [`EndpointId`]; also the generation that guards against stale flows.
    pub id: EndpointId,
    /// The network it belongs to.
    pub network: NetworkId,
    /// The user's name for it, unique within the network.
    pub name: String,
    /// Path of the container's network namespace.
    pub netns: PathBuf,
    /// Which namespace the path meant when the endpoint was made.
    pub netns_identity: NetnsIdentity,
    /// Name of the host's end of the veth pair.
    pub host_interface: String,
    /// Name of the interface inside the container.
    pub interface: String,
    /// Its address in the network's subnet.
    pub address: Ipv4Addr,
    /// Its MAC address.
    pub mac: MacAddress,
    /// Its published ports.
    pub published: Vec<PublishedPort>,
}

/// Device and inode of a namespace file: tells a namespace from a successor under the same path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// One host address and port that reaches one container port; ranges are stored port by port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublishedPort {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Host address; 0.0.0.0 = every local address.
    pub host_address: Ipv4Addr,
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
}

impl Protocol {
    /// IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

/// One line of a policy: what to do with new connections into the network from these sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What happens to a match.
    pub action: Action,
    /// First source address that matches.
    pub first: Ipv4Addr,
    /// Last source address that matches.
    pub last: Ipv4Addr,
}

/// A rule's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Go on to netdp's own rules.
    Allow,
    /// Drop and count.
    Deny,
}
