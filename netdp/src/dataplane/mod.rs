//! What enforces a plan: the backends behind one level-triggered trait.
//!
//! Owns the vocabulary that the planner speaks to every backend ([`Program`]) and what comes back
//! (counters, flows, drift). Knows nothing of how a backend does it.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::Result;
use netdp_common::counter::Reason;

use crate::{
    family::{Family, V4, V6},
    model::{EndpointId, GatewayMode, MacAddress, NatBehaviour, NetworkId, Rule},
    runs::{Along, Runs},
};

pub use crate::model::PublishedKey;

pub mod ebpf;
pub mod fake;
pub mod iptables;
pub mod select;

/// Everything a backend has to enforce, complete: what is not in it has to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    /// Source ports for translated flows.
    pub nat_ports: NatPorts,
    /// Networks whose bridge exists.
    pub networks: BTreeMap<NetworkId, NetworkProgram>,
    /// Endpoints whose host interface exists.
    pub endpoints: BTreeMap<EndpointId, EndpointProgram>,
    /// Host interface of the endpoint to come, by ifindex: nothing passes it yet.
    pub blank: Option<u32>,
    /// Published ports and where they lead; no two entries collide.
    pub published: Runs<PublishedKey, PublishedTarget>,
    /// Interfaces to the outside, by ifindex.
    pub uplinks: BTreeMap<u32, Uplink>,
    /// The host's stack has to see what is forwarded: there are IPsec policies.
    pub needs_stack: bool,
    /// The host's own addresses; loopback and IPv6 link-local ones left out.
    pub local: BTreeSet<IpAddr>,
    /// Names of the interfaces above, by ifindex.
    pub names: BTreeMap<u32, String>,
}

/// Port ranges (inclusive) that source NAT works with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NatPorts {
    /// Reserved for us in `ip_local_reserved_ports`.
    pub reserved: (u16, u16),
    /// The host's own `ip_local_port_range`: a container's port in here is never kept.
    pub ephemeral: (u16, u16),
}

impl Default for NatPorts {
    fn default() -> Self {
        Self { reserved: (50_000, 60_999), ephemeral: (32_768, 60_999) }
    }
}

/// A network as a backend sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkProgram {
    /// ifindex of the bridge.
    pub bridge_ifindex: u32,
    /// MAC of the bridge: the source of what is switched into a container on its behalf.
    pub bridge_mac: MacAddress,
    /// MTU of the bridge and of the members' interfaces, in bytes.
    pub mtu: u32,
    /// The IPv4 side; without one the network carries no IPv4 and no ARP.
    pub ipv4: Option<SubnetProgram<V4>>,
    /// The IPv6 side; without one the network carries no IPv6.
    pub ipv6: Option<SubnetProgram<V6>>,
    /// See [`GatewayMode`].
    pub gateway_mode: GatewayMode,
    /// No way in or out.
    pub internal: bool,
    /// Members may talk to each other.
    pub icc: bool,
    /// Source NAT on the way out.
    pub masquerade: bool,
    /// How much that depends on whom an endpoint talks to.
    pub nat: NatBehaviour,
    /// Most flows that one endpoint may have opened, in both families together; 0 = no limit.
    pub endpoint_flows: u32,
    /// The user's rules in order; first match decides, no match goes on.
    pub policy: Vec<Rule>,
    /// Changes whenever `policy` does.
    pub policy_generation: u32,
}

/// One family of a network as a backend sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubnetProgram<F: Family> {
    /// The network's subnet.
    pub subnet: F::Net,
    /// The bridge's address.
    pub gateway: F::Address,
    /// Fixed source address for masquerade.
    pub snat_ip: Option<F::Address>,
}

/// An endpoint as a backend sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointProgram {
    /// Its network; present in [`Program::networks`].
    pub network: NetworkId,
    /// ifindex of the host's end of its veth.
    pub ifindex: u32,
    /// Its IPv4 address; there iff the network has an IPv4 side.
    pub ipv4: Option<Ipv4Addr>,
    /// Its global IPv6 address; there iff the network has an IPv6 side. Its link-local address
    /// follows from its MAC (RFC 4291, appendix A).
    pub ipv6: Option<Ipv6Addr>,
    /// Its MAC.
    pub mac: MacAddress,
}

/// Where a published port leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedTarget {
    /// The endpoint; present in [`Program::endpoints`].
    pub endpoint: EndpointId,
    /// The endpoint's address, of the key's family.
    pub address: IpAddr,
    /// Port in the container.
    pub port: u16,
}

impl Along for PublishedTarget {
    fn along(self, ports: u16) -> Self {
        Self { port: self.port.along(ports), ..self }
    }
}

/// An interface to the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Source address for masquerade; `None` while the interface has none.
    pub masquerade4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub masquerade6: Option<Ipv6Addr>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether frames carry an Ethernet header (tun devices do not).
    pub ethernet: bool,
    /// Whether the host forwarded IPv4 packets from here before us. Where it did not, only packets
    /// to and from our networks are forwarded, and the rest is dropped as it was before.
    pub forwarded_before4: bool,
    /// The same for IPv6.
    pub forwarded_before6: bool,
}

/// A difference between a program and the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drift {
    /// What differs, in words for the operator: "published tcp 0.0.0.0:8080 is missing".
    pub what: String,
}

/// What an apply changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Single writes to the kernel: map entries written and deleted, programs attached and
    /// detached.
    pub writes: usize,
}

/// Packets and bytes counted for one reason in one network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// `None` where no network could be told.
    pub network: Option<NetworkId>,
    /// Why.
    pub reason: Reason,
    /// Packets.
    pub packets: u64,
    /// Bytes, Ethernet header included.
    pub bytes: u64,
}

/// Packets of flows by the way they took, since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lanes {
    /// Past the host's stack.
    pub fast: u64,
    /// By it.
    pub stack: u64,
}

/// One tracked connection, both halves put together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// IP protocol number.
    pub protocol: u8,
    /// Network that the connection belongs to: the dialled container's, else the dialler's.
    pub network: NetworkId,
    /// Source as the first packet had it. ICMP: the port is the echo identifier.
    pub source: (IpAddr, u16),
    /// Destination as the first packet had it.
    pub destination: (IpAddr, u16),
    /// Source after translation.
    pub translated_source: (IpAddr, u16),
    /// Destination after translation.
    pub translated_destination: (IpAddr, u16),
    /// "established", "half-open", "half-closed", "closing", "reset", "unreplied", "replied".
    pub state: &'static str,
    /// Time since the last packet, to the second.
    pub idle: Duration,
    /// Time until it is collected if nothing more comes.
    pub expires: Duration,
}

/// How full a family's flow table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowTable {
    /// "IPv4", "IPv6".
    pub family: &'static str,
    /// Flows in it.
    pub flows: u32,
    /// Flows that it has room for.
    pub capacity: u32,
}

/// Something that a backend uses where the kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelFeature {
    /// "tcx", "coarse-clock".
    pub name: &'static str,
    /// The version of Linux that brought it.
    pub since: (u32, u32),
    /// Whether this kernel has it.
    pub is_there: bool,
    /// What is lost without it, and what takes its place.
    pub without: &'static str,
}

/// What a backend does by itself, and what has to be done for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nature {
    /// It keeps programs of the host from binding the published ports of TCP and UDP, from `apply` on
    /// and whether the agent is there or not. Where it does not, somebody else has to.
    pub keeps_ports: bool,
    /// Programs of the host reach published ports at loopback addresses by it. Where they do not, the
    /// agent has to serve them.
    pub reaches_loopback: bool,
    /// Bridged packets have to meet the rules of iptables, and leave by the port they came by.
    pub needs_bridge_filter: bool,
    /// An endpoint is sooner in effect if its host interface was [blank](Program::blank) before.
    pub keeps_blank: bool,
}

/// Name of an IP protocol, for people; its number where it is none that flows are made of often.
pub fn protocol_name(number: u8) -> Cow<'static, str> {
    match number {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        47 => "gre".into(),
        50 => "esp".into(),
        58 => "icmpv6".into(),
        132 => "sctp".into(),
        _ => number.to_string().into(),
    }
}

/// A backend. `apply` is idempotent and level-triggered: called with the same program it changes
/// nothing, called after a restart or after meddling it repairs.
pub trait Dataplane: Send {
    /// "ebpf", "iptables".
    fn name(&self) -> &'static str;

    /// Why it is this one, in words for the operator.
    fn reason(&self) -> String {
        String::new()
    }

    /// Makes the kernel enforce `program`. Flows of endpoints and published ports that are gone
    /// are gone when it returns.
    ///
    /// # Errors
    /// Names what could not be written; what was written stays and a later call goes on from it.
    fn apply(&mut self, program: &Program) -> Result<Applied>;

    /// Compares the kernel with `program`, changing nothing.
    ///
    /// # Errors
    /// Fails where the kernel can't be read.
    fn check(&mut self, program: &Program) -> Result<Vec<Drift>>;

    /// Removes everything of this backend from the kernel. Works without a preceding `apply`.
    ///
    /// # Errors
    /// Collects all failures; goes on after each.
    fn purge(&mut self) -> Result<()>;

    /// Drops and other counted verdicts since the maps were made, zero rows left out.
    ///
    /// # Errors
    /// Fails where the kernel can't be read.
    fn counters(&mut self) -> Result<Vec<Count>>;

    /// How packets of flows went; `None` where all go one way.
    ///
    /// # Errors
    /// Fails where the kernel can't be read.
    fn lanes(&mut self) -> Result<Option<Lanes>>;

    /// All tracked connections.
    ///
    /// # Errors
    /// Fails where the kernel can't be read.
    fn flows(&mut self) -> Result<Vec<FlowRecord>>;

    /// Removes flows that have been idle for longer than their timeout; returns how many. Called
    /// every few seconds.
    ///
    /// # Errors
    /// Fails where the kernel can't be read.
    fn collect(&mut self) -> Result<usize>;

    /// The kernel may have given ports that source NAT chooses to sockets of the host by itself: what was
    /// known of these is to be found out anew.
    ///
    /// # Errors
    /// It can't be forgotten.
    fn forget_host_ports(&mut self) -> Result<()>;

    /// How full the flow tables are, as the last collection left them; none before the first.
    fn flow_tables(&self) -> Vec<FlowTable>;

    /// What it leaves to others; may be another answer after each `apply`.
    fn nature(&self) -> Nature;

    /// What the backend asks of a kernel, and whether this one has it.
    fn features(&self) -> Vec<KernelFeature>;
}
