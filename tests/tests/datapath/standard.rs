//! The program of the host under test: its networks, endpoints, uplinks and published ports.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::{Ipv4Net, Ipv6Net};
use netdp::{
    dataplane::{
        EndpointProgram, NatPorts, NetworkProgram, Program, PublishedKey, PublishedTarget,
        SubnetProgram, Uplink,
    },
    model::{GatewayMode, MacAddress, NatBehaviour, Protocol},
    runs::Runs,
};

use crate::{
    family::{Family, ipv6},
    fixture::{
        BRIDGES, FIXED_SOURCE, HOST, HOST_SECOND, ICC_OFF, INTERNAL, ISOLATED, MEMBERS, ROUTED,
        SNAT, TUN, UNKNOWN, UNMASQUERADED, UNPROTECTED, UPLINKS, address, bridge_mac, gateway,
        host_in, id_of, mac,
    },
};

/// What the fixture begins with, on interfaces with these numbers.
pub(crate) fn standard_program(ifindexes: &BTreeMap<&'static str, u32>) -> Program {
    let networks = BRIDGES.map(|(name, id)| {
        let gateway_mode = match id {
            ISOLATED => GatewayMode::Isolated,
            UNPROTECTED => GatewayMode::NatUnprotected,
            ROUTED => GatewayMode::Routed,
            _ => GatewayMode::Nat,
        };
        let network = NetworkProgram {
            bridge_ifindex: ifindexes[name],
            bridge_mac: MacAddress(bridge_mac(id)),
            mtu: 1500,
            ipv4: Some(SubnetProgram {
                subnet: Ipv4Net::new_assert(host_in(id, 0), 24),
                gateway: gateway(id),
                snat_ip: (id == FIXED_SOURCE).then_some(SNAT),
            }),
            ipv6: Some(SubnetProgram {
                subnet: Ipv6Net::new_assert(ipv6(gateway(id)), 64).trunc(),
                gateway: ipv6(gateway(id)),
                snat_ip: (id == FIXED_SOURCE).then_some(ipv6(SNAT)),
            }),
            gateway_mode,
            internal: id == INTERNAL,
            icc: id != ICC_OFF,
            masquerade: id != UNMASQUERADED,
            nat: NatBehaviour::EndpointDependent,
            endpoint_flows: 0,
            policy: Vec::new(),
            policy_generation: 1,
        };
        (id, network)
    });
    let endpoints = MEMBERS.map(|(name, network)| {
        let endpoint = EndpointProgram {
            network,
            ifindex: ifindexes[name],
            ipv4: Some(address(name)),
            ipv6: Some(ipv6(address(name))),
            mac: MacAddress(mac(name)),
        };
        (id_of(name), endpoint)
    });
    let uplinks = UPLINKS.iter().filter(|(name, _)| *name != UNKNOWN).map(|&(name, address)| {
        let uplink = Uplink {
            masquerade4: Some(address),
            masquerade6: Some(ipv6(address)),
            mtu: 1500,
            ethernet: name != TUN,
            forwarded_before4: false,
            forwarded_before6: false,
        };
        (ifindexes[name], uplink)
    });
    let local: BTreeSet<_> = UPLINKS
        .iter()
        .map(|&(_, address)| address)
        .chain([HOST_SECOND, SNAT])
        .chain(BRIDGES.map(|(_, id)| gateway(id)))
        .flat_map(|party| [Family::V4, Family::V6].map(|family| family.address(party)))
        .collect();
    let mut program = Program {
        nat_ports: NatPorts::default(),
        networks: networks.into(),
        endpoints: endpoints.into(),
        blank: None,
        published: Runs::default(),
        uplinks: uplinks.collect(),
        needs_stack: false,
        local,
        names: BTreeMap::new(),
    };
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut publish = |address, port, endpoint, container_port| {
            for family in [Family::V4, Family::V6] {
                let (key, target) =
                    published(family, (address, port), protocol, (endpoint, container_port));
                program.published.insert(key, target);
            }
        };
        publish(Ipv4Addr::UNSPECIFIED, 8080, "a1", 80);
        publish(Ipv4Addr::UNSPECIFIED, 8081, "a1", 80);
        publish(HOST, 9090, "a1", 90);
        publish(Ipv4Addr::UNSPECIFIED, 8443, "b1", 443);
        publish(Ipv4Addr::UNSPECIFIED, 7070, "c1", 70);
        publish(Ipv4Addr::UNSPECIFIED, 8082, "r1", 80);
    }
    program
}

/// A published port: what is dialled, and where that leads.
pub(crate) fn published(
    family: Family,
    (address, port): (Ipv4Addr, u16),
    protocol: Protocol,
    (endpoint, container_port): (&str, u16),
) -> (PublishedKey, PublishedTarget) {
    (
        PublishedKey { address: family.address(address), port, protocol },
        PublishedTarget {
            endpoint: id_of(endpoint),
            address: family.address(self::address(endpoint)),
            port: container_port,
        },
    )
}
