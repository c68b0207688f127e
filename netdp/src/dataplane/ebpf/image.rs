//! What the maps hold for a program. Pure: rendering here, writing elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use netdp_common::{
    addr::{Be16, Be32},
    config::Config,
    endpoint::Endpoint4,
    flow::{Flow4, FlowKey4, IPPROTO_ICMP, ZONE_WORLD, flag as flow_flag},
    interface::{Interface, flag as interface_flag, role},
    network::{Network, flag},
    policy::{PREFIX_BASE, PolicyKey4, PolicyVerdict},
    publish::{Published4, PublishedKey4},
};

use super::policy;
use crate::{
    dataplane::{NetworkProgram, Program},
    model::{Action, GatewayMode},
};

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Hook {
    /// tcx ingress of an endpoint's host interface.
    FromContainer,
    /// tcx egress of a bridge.
    IntoNetwork,
    /// tcx ingress of an uplink.
    FromUplink,
    /// tcx egress of an uplink.
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
    /// ENDPOINT4.
    pub(super) endpoints: BTreeMap<Be32, Endpoint4>,
    /// PUBLISHED4.
    pub(super) published: BTreeMap<PublishedKey4, Published4>,
    /// SUBNET4.
    pub(super) subnets: BTreeMap<Prefix<Be32>, u32>,
    /// LOCAL4.
    pub(super) local: BTreeMap<Be32, u32>,
    /// POLICY4.
    pub(super) policies: BTreeMap<Prefix<PolicyKey4>, PolicyVerdict>,
    /// Programs by ifindex.
    pub(super) hooks: BTreeSet<(Hook, u32)>,
}

impl Image {
    /// What `program` looks like in the maps.
    pub(super) fn render(program: &Program) -> Self {
        let mut image = Self::default();
        let ports = program.nat_ports;
        let config = Config {
            nat_first: ports.reserved.0,
            nat_last: ports.reserved.1,
            ephemeral_first: ports.ephemeral.0,
            ephemeral_last: ports.ephemeral.1,
        };
        image.config.insert(0, config);
        for (id, network) in &program.networks {
            image.render_network(id.0, network);
        }
        for (id, endpoint) in &program.endpoints {
            image.endpoints.insert(
                endpoint.address.into(),
                Endpoint4 {
                    ifindex: endpoint.ifindex,
                    network: endpoint.network.0,
                    generation: id.0,
                    mac: endpoint.mac.0,
                    pad: [0; 2],
                },
            );
            let interface = Interface {
                role: role::ENDPOINT,
                flags: interface_flag::ETHERNET,
                mac: endpoint.mac.0,
                network: endpoint.network.0,
                address: endpoint.address.into(),
                generation: id.0,
            };
            image.interfaces.insert(endpoint.ifindex, interface);
            image.hooks.insert((Hook::FromContainer, endpoint.ifindex));
        }
        for (&ifindex, uplink) in &program.uplinks {
            let mut flags = 0;
            if uplink.ethernet {
                flags |= interface_flag::ETHERNET;
            }
            if uplink.forwarded_before {
                flags |= interface_flag::FORWARDED_BEFORE;
            }
            let interface = Interface {
                role: role::UPLINK,
                flags,
                address: uplink.masquerade.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
                ..Interface::default()
            };
            image.interfaces.insert(ifindex, interface);
            image.hooks.insert((Hook::FromUplink, ifindex));
            image.hooks.insert((Hook::ToUplink, ifindex));
        }
        image.local = program.local.iter().map(|&address| (address.into(), 1)).collect();
        image.render_published(program);
        image
    }

    fn render_network(&mut self, id: u32, network: &NetworkProgram) {
        self.networks.insert(
            id,
            Network {
                flags: network_flags(network),
                policy_generation: network.policy_generation,
                subnet: network.subnet.network().into(),
                mask: network.subnet.netmask().into(),
                gateway: network.gateway.into(),
                snat: network.snat_ip.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
                bridge: network.bridge_ifindex,
                mac: network.bridge_mac.0,
                pad: [0; 2],
            },
        );
        let interface = Interface {
            role: role::NETWORK,
            flags: interface_flag::ETHERNET,
            mac: network.bridge_mac.0,
            network: id,
            address: network.gateway.into(),
            generation: 0,
        };
        self.interfaces.insert(network.bridge_ifindex, interface);
        self.hooks.insert((Hook::IntoNetwork, network.bridge_ifindex));
        let prefix = (u32::from(network.subnet.prefix_len()), network.subnet.network().into());
        self.subnets.insert(prefix, id);
        for entry in policy::compile(&network.policy) {
            let key = PolicyKey4 {
                network: id,
                generation: network.policy_generation,
                address: entry.address.into(),
            };
            let verdict = PolicyVerdict {
                allow: u32::from(entry.action == Action::Allow),
                rule: u32::try_from(entry.rule).unwrap_or(u32::MAX),
            };
            self.policies.insert((PREFIX_BASE + u32::from(entry.length), key), verdict);
        }
    }

    fn render_published(&mut self, program: &Program) {
        for (key, target) in &program.published {
            let Some(endpoint) = program.endpoints.get(&target.endpoint) else { continue };
            let Some(network) = program.networks.get(&endpoint.network) else { continue };
            let routed = network.gateway_mode == GatewayMode::Routed;
            // A routed network is dialled at the container's own address.
            let (address, port) =
                if routed { (target.address, target.port) } else { (key.address, key.port) };
            self.published.insert(
                PublishedKey4 {
                    address: address.into(),
                    port: Be16::new(port),
                    proto: key.protocol.number(),
                    pad: 0,
                },
                Published4 {
                    address: target.address.into(),
                    port: Be16::new(target.port),
                    pad: 0,
                    network: endpoint.network.0,
                },
            );
        }
    }

    /// Whether something that flows may depend on is in `self` and not, or not the same, in
    /// `next`.
    pub(super) fn loses(&self, next: &Self) -> bool {
        fn lost<K: Ord, V: PartialEq>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> bool {
            old.iter().any(|(key, value)| new.get(key) != Some(value))
        }
        let ids = |image: &Self| -> Vec<u32> { image.networks.keys().copied().collect() };
        lost(&self.published, &next.published)
            || lost(&self.endpoints, &next.endpoints)
            || lost(&self.local, &next.local)
            || ids(self) != ids(next)
            || self.networks.iter().any(|(id, network)| {
                next.networks.get(id).is_some_and(|next| next.flags != network.flags)
            })
    }

    /// Whether a half of a flow rests on something that is gone: a container, a published port,
    /// an address of the host.
    pub(super) fn is_stale(&self, key: &FlowKey4, half: &Flow4) -> bool {
        let Some(network) = self.networks.get(&half.network) else { return true };
        // A half that arrives from a container is that container's.
        if key.zone != ZONE_WORLD {
            let own = self.endpoints.get(&key.tuple.src);
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
            let key = PublishedKey4 { address, port: from.dport, proto: key.proto, pad: 0 };
            self.published.get(&key)
        };
        if from.dst != to.dst || from.dport != to.dport {
            let leads_there = |target: Option<&Published4>| {
                target.is_some_and(|target| (target.address, target.port) == (to.dst, to.dport))
            };
            return !leads_there(at(from.dst).or_else(|| at(Be32::default())));
        }
        if from.src != to.src {
            // Masquerade towards an address that the host has lost (netfilter ends these, too).
            return !self.local.contains_key(&to.src) && network.snat != to.src;
        }
        if half.flags & flow_flag::INBOUND != 0 && !network.has(flag::UNPROTECTED) {
            // Straight to a container of a routed network, as far as that is still open.
            let is_ping = key.proto == IPPROTO_ICMP;
            return !(network.has(flag::ROUTED) && (is_ping || at(from.dst).is_some()));
        }
        false
    }
}

fn network_flags(network: &NetworkProgram) -> u32 {
    let mut flags = flag::PRESENT;
    let translates = matches!(network.gateway_mode, GatewayMode::Nat | GatewayMode::NatUnprotected);
    let mut set = |condition: bool, bit: u32| flags |= if condition { bit } else { 0 };
    set(network.icc, flag::ICC);
    set(network.masquerade && translates, flag::MASQUERADE);
    set(network.internal, flag::INTERNAL);
    set(network.gateway_mode == GatewayMode::Isolated, flag::ISOLATED);
    let open_to = |mode| network.gateway_mode == mode && !network.internal;
    set(open_to(GatewayMode::NatUnprotected), flag::UNPROTECTED);
    set(open_to(GatewayMode::Routed), flag::ROUTED);
    set(!network.policy.is_empty(), flag::POLICY);
    flags
}
