//! What the maps hold for a program. Pure: rendering here, writing elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use bytemuck::{Pod, Zeroable};
use netdp_common::{
    addr::{Address, Be16, Be32, Be128},
    config::Config,
    endpoint::Endpoint,
    flow::{Flow, FlowKey, IPPROTO_ICMP, IPPROTO_ICMPV6, flag as flow_flag},
    interface::{Interface, Slot, flag as interface_flag, role, slot},
    network::{Network, Subnet, flag},
    policy::{PREFIX_BASE, PolicyKey, PolicyVerdict},
    publish::{AF_INET, AF_INET6, Published, PublishedKey, PublishedPort},
    socket::{SocketAddress, SocketPeer},
};

use super::{
    family::{Wired, parts},
    policy,
    tables::Contents,
};
use crate::{
    dataplane::{NetworkProgram, Program, PublishedTarget},
    difference::Step,
    family::{V4, V6},
    model::{Action, GatewayMode, NatBehaviour},
    runs::{Along, Ported, Runs},
};

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Hook {
    /// tc ingress of an endpoint's host interface.
    FromContainer,
    /// tc egress of a bridge.
    IntoNetwork,
    /// tc ingress of an uplink.
    FromUplink,
    /// tc egress of an uplink.
    ToUplink,
}

impl Hook {
    pub(super) const ALL: [Self; 4] =
        [Self::FromContainer, Self::IntoNetwork, Self::FromUplink, Self::ToUplink];

    /// Whether nothing of a container passes the interface but by this program.
    pub(super) const fn guards(self) -> bool {
        matches!(self, Self::FromContainer | Self::IntoNetwork)
    }

    /// Name of the program in the object, and of its pins.
    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::FromContainer => "from_container",
            Self::IntoNetwork => "into_network",
            Self::FromUplink => "from_uplink",
            Self::ToUplink => "to_uplink",
        }
    }
}

/// A prefix of an LPM map: length in bits, data.
pub(super) type Prefix<K> = (u32, K);

/// Contents of all maps that the agent writes, and all attachments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Image {
    /// CONFIG, by index.
    pub(super) config: BTreeMap<u32, Config>,
    /// NETWORK.
    pub(super) networks: BTreeMap<u32, Network>,
    /// INTERFACE.
    pub(super) interfaces: BTreeMap<u32, Interface>,
    /// INTERFACE_SLOT.
    pub(super) slots: BTreeMap<u32, Slot>,
    /// PUBLISHED_PORT.
    pub(super) published_ports: Runs<PublishedPort, Mark>,
    /// Programs by ifindex.
    pub(super) hooks: BTreeSet<(Hook, u32)>,
    /// Maps of IPv4.
    pub(super) ipv4: Side<Be32>,
    /// Maps of IPv6.
    pub(super) ipv6: Side<Be128>,
}

/// A value that says no more than that its key is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub(super) struct Mark(u32);

impl Mark {
    const SET: Self = Self(1);
}

impl Along for Mark {
    fn along(self, _ports: u16) -> Self {
        self
    }
}

impl<A: Address> Ported for PublishedKey<A> {
    type Line = (A, u8);

    fn split(self) -> ((A, u8), u16) {
        ((self.address, self.proto), self.port.get())
    }

    fn join((address, proto): (A, u8), port: u16) -> Self {
        Self { address, port: Be16::new(port), proto, pad: 0 }
    }
}

impl<A: Address> Along for Published<A> {
    fn along(self, ports: u16) -> Self {
        Self { port: Be16::new(self.port.get().along(ports)), ..self }
    }
}

impl Ported for PublishedPort {
    type Line = (u8, u8);

    fn split(self) -> ((u8, u8), u16) {
        ((self.proto, self.family), self.port.get())
    }

    fn join((proto, family): (u8, u8), port: u16) -> Self {
        Self { port: Be16::new(port), proto, family }
    }
}

/// The maps of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Side<A: Address> {
    /// ENDPOINT4, ENDPOINT6.
    pub(super) endpoints: BTreeMap<A, Endpoint>,
    /// PUBLISHED4, PUBLISHED6.
    pub(super) published: Runs<PublishedKey<A>, Published<A>>,
    /// SUBNET4, SUBNET6.
    pub(super) subnets: BTreeMap<Prefix<A>, u32>,
    /// LOCAL4, LOCAL6.
    pub(super) local: BTreeMap<A, u32>,
    /// POLICY4, POLICY6.
    pub(super) policies: BTreeMap<Prefix<PolicyKey<A>>, PolicyVerdict>,
}

impl Image {
    /// What `program` looks like in the maps on this host.
    pub(super) fn render(program: &Program, host: Host) -> Self {
        let mut image = Self::default();
        let ports = program.nat_ports;
        let config = Config {
            netns_cookie: host.netns_cookie,
            nat_first: ports.reserved.0,
            nat_last: ports.reserved.1,
            ephemeral_first: ports.ephemeral.0,
            ephemeral_last: ports.ephemeral.1,
            is_nat_published: program
                .published
                .runs()
                .any(|(key, last, _)| key.port <= ports.reserved.1 && last >= ports.reserved.0)
                .into(),
            has_mappings: program.networks.values().any(|network| network.nat.maps()).into(),
            fast_path: (host.fast_path && !program.needs_stack).into(),
        };
        image.config.insert(0, config);
        for (id, network) in &program.networks {
            image.render_network(id.0, network);
        }
        for (id, endpoint) in &program.endpoints {
            let interface = Interface {
                role: role::ENDPOINT,
                flags: interface_flag::ETHERNET,
                mac: endpoint.mac.0,
                network: endpoint.network.0,
                generation: id.0,
                mtu: program.networks.get(&endpoint.network).map_or(0, |network| network.mtu),
                ipv4: endpoint.ipv4.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
                ipv6: endpoint.ipv6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
            };
            image.interfaces.insert(endpoint.ifindex, interface);
            image.hooks.insert((Hook::FromContainer, endpoint.ifindex));
        }
        // Without an entry: its program lets nothing pass.
        image.hooks.extend(program.blank.map(|ifindex| (Hook::FromContainer, ifindex)));
        for (&ifindex, uplink) in &program.uplinks {
            let flag = |condition: bool, flag: u8| if condition { flag } else { 0 };
            let interface = Interface {
                role: role::UPLINK,
                flags: flag(uplink.ethernet, interface_flag::ETHERNET)
                    | flag(uplink.forwarded_before4, interface_flag::FORWARDED_IPV4)
                    | flag(uplink.forwarded_before6, interface_flag::FORWARDED_IPV6),
                mtu: uplink.mtu,
                ipv4: uplink.masquerade4.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
                ipv6: uplink.masquerade6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
                ..Interface::default()
            };
            image.interfaces.insert(ifindex, interface);
            image.hooks.insert((Hook::FromUplink, ifindex));
            image.hooks.insert((Hook::ToUplink, ifindex));
        }
        image.slots = slots(&image.interfaces);
        image.ipv4 = side::<V4>(program);
        image.ipv6 = side::<V6>(program);
        image.published_ports = published_ports(program);
        image
    }

    fn render_network(&mut self, id: u32, network: &NetworkProgram) {
        let gateway4 = network.ipv4.map_or(Ipv4Addr::UNSPECIFIED, |side| side.gateway);
        let gateway6 = network.ipv6.map_or(Ipv6Addr::UNSPECIFIED, |side| side.gateway);
        self.networks.insert(
            id,
            Network {
                flags: network_flags(network),
                policy_generation: network.policy_generation,
                endpoint_flows: network.endpoint_flows,
                bridge: network.bridge_ifindex,
                mac: network.bridge_mac.0,
                pad: [0; 2],
                ipv4: subnet::<V4>(network),
                ipv6: subnet::<V6>(network),
            },
        );
        let interface = Interface {
            role: role::NETWORK,
            flags: interface_flag::ETHERNET,
            mac: network.bridge_mac.0,
            network: id,
            generation: 0,
            mtu: network.mtu,
            ipv4: gateway4.into(),
            ipv6: gateway6.into(),
        };
        self.interfaces.insert(network.bridge_ifindex, interface);
        self.hooks.insert((Hook::IntoNetwork, network.bridge_ifindex));
    }

    /// Whether something that flows may depend on is in `self` and not, or not the same, in
    /// `next`.
    pub(super) fn loses(&self, next: &Self) -> bool {
        let ids = |image: &Self| -> Vec<u32> { image.networks.keys().copied().collect() };
        self.ipv4.loses(&next.ipv4)
            || self.ipv6.loses(&next.ipv6)
            || ids(self) != ids(next)
            || self.networks.iter().any(|(id, network)| {
                next.networks.get(id).is_some_and(|next| next.flags != network.flags)
            })
    }

    /// Whether what a socket of the host dialled leads to this peer.
    pub(super) fn leads_to(&self, dialled: &SocketAddress, peer: &SocketPeer) -> bool {
        let (dialled_port, proto, peer) = (dialled.port, peer.proto, &peer.peer);
        match (dialled.ipv4(), peer.ipv4()) {
            (Some(dialled), Some(address)) => {
                self.ipv4.target(dialled, dialled_port, proto) == Some((address, peer.port))
            }
            (None, None) => {
                let target = self.ipv6.target(dialled.address, dialled_port, proto);
                target == Some((peer.address, peer.port))
            }
            _ => false,
        }
    }
}

impl<A: Address> Side<A> {
    /// Where a published port leads.
    fn target(&self, address: A, port: Be16, proto: u8) -> Option<(A, Be16)> {
        let at = |address| self.published.get(PublishedKey { address, port, proto, pad: 0 });
        let target = at(address).or_else(|| at(A::default()))?;
        Some((target.address, target.port))
    }

    /// The containers' addresses that `next` does not have, or has of other containers.
    pub(super) fn gone<'a>(&'a self, next: &'a Self) -> impl Iterator<Item = A> + 'a {
        let stays = |address: &A, generation| {
            next.endpoints.get(address).is_some_and(|next| next.generation == generation)
        };
        self.endpoints
            .iter()
            .filter(move |(address, endpoint)| !stays(address, endpoint.generation))
            .map(|(&address, _)| address)
    }
}

/// What the maps say of the host whatever the program is.
#[derive(Clone, Copy)]
pub(super) struct Host {
    /// The kernel's name of its network namespace; 0 where no socket is the host's.
    pub(super) netns_cookie: u64,
    /// Whether packets of flows go past its stack where they can.
    pub(super) fast_path: bool,
}

/// The slots of interfaces; of several that have the same one, the oldest gets it.
fn slots(interfaces: &BTreeMap<u32, Interface>) -> BTreeMap<u32, Slot> {
    let mut slots = BTreeMap::new();
    for (&ifindex, &interface) in interfaces {
        slots.entry(slot(ifindex)).or_insert(Slot { ifindex, interface });
    }
    slots
}

/// The networks by id, and a family's maps: what flows rest on.
pub(super) struct Footing<'a, A: Address> {
    pub(super) networks: &'a BTreeMap<u32, Network>,
    pub(super) side: &'a Side<A>,
    /// A family's part of a network.
    pub(super) subnet: fn(&Network) -> &Subnet<A>,
}

impl<A: Address> Footing<'_, A> {
    /// Whether a half of a flow rests on something that is gone: a container, a published port,
    /// an address of the host.
    pub(super) fn is_lost(&self, key: &FlowKey<A>, half: &Flow<A>) -> bool {
        let Some(network) = self.networks.get(&half.network()) else { return true };
        // A half that arrives from a container is that container's.
        if key.network().is_some() {
            let own = self.side.endpoints.get(&key.tuple.src);
            if own.is_none_or(|own| own.generation != half.generation) {
                // A container that dials itself is seen as the gateway: its answer has the
                // container's own address, so this holds there, too.
                return true;
            }
        }
        if half.flags & flow_flag::ORIGINAL == 0 {
            return false;
        }
        let (from, to) = (&key.tuple, &half.to);
        let at = |address| {
            let key = PublishedKey { address, port: from.dport, proto: key.proto, pad: 0 };
            self.side.published.get(key)
        };
        let came_by_mapping = flow_flag::INBOUND | flow_flag::MAPPED;
        if half.flags & came_by_mapping == came_by_mapping {
            return !network.has(flag::MAPPING | flag::FULL_CONE)
                || !self.side.local.contains_key(&from.dst)
                || !self.side.endpoints.contains_key(&to.dst);
        }
        if from.dst != to.dst || from.dport != to.dport {
            let leads_there = |target: Option<Published<A>>| {
                target.is_some_and(|target| (target.address, target.port) == (to.dst, to.dport))
            };
            return !leads_there(at(from.dst).or_else(|| at(A::default())));
        }
        if from.src != to.src {
            // Masquerade towards an address that the host has lost (netfilter ends these, too).
            let snat = (self.subnet)(network).snat;
            return !self.side.local.contains_key(&to.src) && snat != to.src;
        }
        if half.flags & flow_flag::INBOUND != 0 && !network.has(flag::UNPROTECTED) {
            // Straight to a container of a routed network, as far as that is still open.
            let is_ping = matches!(key.proto, IPPROTO_ICMP | IPPROTO_ICMPV6);
            return !(network.has(flag::ROUTED) && (is_ping || at(from.dst).is_some()));
        }
        false
    }
}

impl<A: Address> Side<A> {
    fn loses(&self, next: &Self) -> bool {
        fn lost<K: Copy, V, C: Contents<K, V>>(old: &C, new: &C) -> bool {
            old.steps(new).any(|step| match step {
                Step::Put(key, _) => old.has(key),
                Step::Remove(_) => true,
            })
        }
        lost(&self.published, &next.published)
            || lost(&self.endpoints, &next.endpoints)
            || lost(&self.local, &next.local)
    }
}

/// A family's maps.
fn side<F: Wired>(program: &Program) -> Side<F::Wire> {
    let mut side = Side::default();
    for (id, network) in &program.networks {
        let Some(subnet) = F::subnet(network) else { continue };
        let (address, _) = parts::<F>(subnet.subnet);
        side.subnets.insert((F::prefix_len(subnet.subnet).into(), address), id.0);
        for entry in policy::compile::<F>(&network.policy) {
            let key = PolicyKey {
                network: id.0,
                generation: network.policy_generation,
                address: F::Wire::from(entry.address),
            };
            let verdict = PolicyVerdict {
                allow: u32::from(entry.action == Action::Allow),
                rule: u32::try_from(entry.rule).unwrap_or(u32::MAX),
            };
            side.policies.insert((PREFIX_BASE + u32::from(entry.length), key), verdict);
        }
    }
    for (id, endpoint) in &program.endpoints {
        let Some(address) = F::endpoint(endpoint) else { continue };
        side.endpoints.insert(
            F::Wire::from(address),
            Endpoint {
                ifindex: endpoint.ifindex,
                network: endpoint.network.0,
                generation: id.0,
                mac: endpoint.mac.0,
                pad: [0; 2],
            },
        );
    }
    let local = program.local.iter().filter_map(|&address| F::of(address));
    side.local = local.map(|address| (F::Wire::from(address), 1)).collect();
    side.published = published::<F>(program);
    side
}

/// Where published ports lead.
fn published<F: Wired>(program: &Program) -> Runs<PublishedKey<F::Wire>, Published<F::Wire>> {
    let mut entries = Runs::default();
    for (key, last, target) in program.published.runs() {
        let Some(endpoint) = program.endpoints.get(&target.endpoint) else { continue };
        let Some(network) = program.networks.get(&endpoint.network) else { continue };
        let (Some(host), Some(container)) = (F::of(key.address), F::of(target.address)) else {
            continue;
        };
        let routed = network.gateway_mode == GatewayMode::Routed;
        // A routed network is dialled at the container's own address.
        let (address, port) = if routed { (container, target.port) } else { (host, key.port) };
        entries.insert_run(
            PublishedKey {
                address: F::Wire::from(address),
                port: Be16::new(port),
                proto: key.protocol.number(),
                pad: 0,
            },
            port.along(last - key.port),
            Published {
                address: F::Wire::from(container),
                port: Be16::new(target.port),
                pad: 0,
                network: endpoint.network.0,
            },
        );
    }
    entries
}

/// Ports that are published on some addresses only. Those of routed networks are no ports of the
/// host.
fn published_ports(program: &Program) -> Runs<PublishedPort, Mark> {
    let is_of_host = |target: &PublishedTarget| {
        let endpoint = program.endpoints.get(&target.endpoint);
        let network = endpoint.and_then(|endpoint| program.networks.get(&endpoint.network));
        network.is_some_and(|network| network.gateway_mode != GatewayMode::Routed)
    };
    let somewhere = program
        .published
        .runs()
        .filter(|(key, _, target)| !key.address.is_unspecified() && is_of_host(target));
    let mut ports = Runs::default();
    for (key, last, _) in somewhere {
        let first = PublishedPort {
            port: Be16::new(key.port),
            proto: key.protocol.number(),
            family: if key.address.is_ipv4() { AF_INET } else { AF_INET6 },
        };
        ports.insert_run(first, last, Mark::SET);
    }
    ports
}

/// A family's part of a network; zeros where there is none.
fn subnet<F: Wired>(network: &NetworkProgram) -> Subnet<F::Wire> {
    let Some(side) = F::subnet(network) else { return Subnet::default() };
    let (address, mask) = parts::<F>(side.subnet);
    Subnet {
        address,
        mask,
        gateway: F::Wire::from(side.gateway),
        snat: side.snat_ip.map(F::Wire::from).unwrap_or_default(),
    }
}

fn network_flags(network: &NetworkProgram) -> u32 {
    let mut flags = flag::PRESENT;
    let translates = matches!(network.gateway_mode, GatewayMode::Nat | GatewayMode::NatUnprotected);
    let mut set = |condition: bool, bit: u32| flags |= if condition { bit } else { 0 };
    set(network.icc, flag::ICC);
    set(network.masquerade && translates, flag::MASQUERADE);
    set(network.nat.maps(), flag::MAPPING);
    set(network.nat == NatBehaviour::EndpointIndependent, flag::FULL_CONE);
    set(network.internal, flag::INTERNAL);
    set(network.gateway_mode == GatewayMode::Isolated, flag::ISOLATED);
    let open_to = |mode| network.gateway_mode == mode && !network.internal;
    set(open_to(GatewayMode::NatUnprotected), flag::UNPROTECTED);
    set(open_to(GatewayMode::Routed), flag::ROUTED);
    set(!network.policy.is_empty(), flag::POLICY);
    set(network.ipv4.is_some(), flag::IPV4);
    set(network.ipv6.is_some(), flag::IPV6);
    flags
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{MacAddress, NetworkId};

    #[test]
    fn the_limit_of_endpoints_reaches_the_programs() {
        let network = NetworkProgram {
            bridge_ifindex: 10,
            bridge_mac: MacAddress([2, 0x42, 172, 20, 0, 1]),
            mtu: 1500,
            ipv4: None,
            ipv6: None,
            gateway_mode: GatewayMode::Nat,
            internal: false,
            icc: true,
            masquerade: true,
            nat: NatBehaviour::EndpointDependent,
            endpoint_flows: 1000,
            policy: Vec::new(),
            policy_generation: 1,
        };
        let program = Program { networks: [(NetworkId(1), network)].into(), ..Program::default() };
        let image = Image::render(&program, Host { netns_cookie: 0, fast_path: false });
        assert_eq!(image.networks[&1].endpoint_flows, 1000);
    }
}
