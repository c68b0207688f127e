//! IPv4 and IPv6 as the maps have them.

use std::net::IpAddr;

use netdp_common::addr::{Address, Be32, Be128};

use crate::{
    dataplane::{EndpointProgram, NetworkProgram, SubnetProgram},
    family::{Family, V4, V6},
};

/// Names of a family's maps in the object.
pub(super) struct MapNames {
    /// What holds for the whole flow table.
    pub(super) table: &'static str,
    pub(super) flow: &'static str,
    pub(super) index: &'static str,
    pub(super) free: &'static str,
    pub(super) published: &'static str,
    pub(super) endpoint: &'static str,
    pub(super) subnet: &'static str,
    pub(super) local: &'static str,
    pub(super) policy: &'static str,
    /// The program that collects flows; not a map.
    pub(super) collector: &'static str,
}

/// A family whose addresses stand in maps.
pub(super) trait Wired: Family {
    /// Its addresses in packets and maps.
    type Wire: Address + From<Self::Address> + Into<Self::Address>;

    /// Its maps.
    const MAPS: MapNames;

    /// Its side of a network.
    fn subnet(network: &NetworkProgram) -> Option<&SubnetProgram<Self>>;

    /// Its address of an endpoint.
    fn endpoint(endpoint: &EndpointProgram) -> Option<Self::Address>;
}

/// Network address and netmask of a subnet.
pub(super) fn parts<F: Wired>(net: F::Net) -> (F::Wire, F::Wire) {
    let (first, last) = (F::first(net), F::last(net));
    let mask = F::address(!(F::bits(first) ^ F::bits(last)));
    (F::Wire::from(first), F::Wire::from(mask))
}

/// For people.
pub(super) fn show<F: Wired>(address: F::Wire) -> IpAddr {
    let address: F::Address = address.into();
    address.into()
}

impl Wired for V4 {
    type Wire = Be32;

    const MAPS: MapNames = MapNames {
        table: "TABLE4",
        flow: "FLOW4",
        index: "INDEX4",
        free: "FREE4",
        published: "PUBLISHED4",
        endpoint: "ENDPOINT4",
        subnet: "SUBNET4",
        local: "LOCAL4",
        policy: "POLICY4",
        collector: "collect4",
    };

    fn subnet(network: &NetworkProgram) -> Option<&SubnetProgram<Self>> {
        network.ipv4.as_ref()
    }

    fn endpoint(endpoint: &EndpointProgram) -> Option<Self::Address> {
        endpoint.ipv4
    }
}

impl Wired for V6 {
    type Wire = Be128;

    const MAPS: MapNames = MapNames {
        table: "TABLE6",
        flow: "FLOW6",
        index: "INDEX6",
        free: "FREE6",
        published: "PUBLISHED6",
        endpoint: "ENDPOINT6",
        subnet: "SUBNET6",
        local: "LOCAL6",
        policy: "POLICY6",
        collector: "collect6",
    };

    fn subnet(network: &NetworkProgram) -> Option<&SubnetProgram<Self>> {
        network.ipv6.as_ref()
    }

    fn endpoint(endpoint: &EndpointProgram) -> Option<Self::Address> {
        endpoint.ipv6
    }
}
