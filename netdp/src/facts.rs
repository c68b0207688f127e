//! What the host looks like: the part of the planner's input that the user does not decide.
//!
//! Owns the shapes. Filling them is netlink's work; drawing conclusions is the planner's.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;

use crate::model::{MacAddress, Protocol};

/// A reading of the host's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Every link, by ifindex.
    pub links: BTreeMap<u32, Link>,
    /// Destinations of the main table's unicast routes, the default route left out.
    pub routes: Vec<Route>,
    /// `net.ipv4.ip_forward`: the host was told to be a router.
    pub is_router: bool,
    /// `net.ipv4.ip_local_port_range`, inclusive.
    pub ephemeral_ports: (u16, u16),
    /// Ports that other programs of the host were found to have: none to choose.
    pub ports_in_use: BTreeSet<(Protocol, u16)>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// `IFLA_IFALIAS`; ours say what they belong to.
    pub alias: Option<String>,
    /// Driver kind: "bridge", "veth", "tun"; `None` for hardware.
    pub kind: Option<String>,
    /// ifindex of the bridge or bond it is a port of.
    pub master: Option<u32>,
    /// Hardware address, where it has an Ethernet one.
    pub mac: Option<MacAddress>,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The loopback interface.
    pub loopback: bool,
    /// Its IPv4 addresses in the kernel's order, primaries first.
    pub addresses: Vec<Ipv4Net>,
    /// `net.ipv4.conf.<name>.forwarding`.
    pub forwarding: bool,
}

/// A unicast route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it leads to.
    pub destination: Ipv4Net,
    /// The interface it leaves by.
    pub ifindex: u32,
}

impl HostFacts {
    /// The link with this name.
    pub fn link(&self, name: &str) -> Option<(u32, &Link)> {
        self.links
            .iter()
            .find(|(_, link)| link.name == name)
            .map(|(&ifindex, link)| (ifindex, link))
    }

    /// Whether one of the host's interfaces has this address.
    pub fn is_local(&self, address: Ipv4Addr) -> bool {
        self.links.values().any(|link| link.addresses.iter().any(|net| net.addr() == address))
    }
}

impl Link {
    /// What the alias of every link of ours begins with.
    pub const ALIAS_PREFIX: &str = "netdp ";

    /// Whether we made it; any other link is left alone. An operator's own notes may begin with
    /// our name: the noun and the kind of link have to be right, too.
    pub fn is_ours(&self) -> bool {
        let Some(alias) = &self.alias else { return false };
        let Some(noun) = alias.strip_prefix(Self::ALIAS_PREFIX) else { return false };
        let noun = noun.split(' ').next().unwrap_or_default();
        match self.kind.as_deref() {
            Some("bridge") => matches!(noun, "network" | "unfinished"),
            Some("veth") => matches!(noun, "endpoint" | "unfinished"),
            _ => false,
        }
    }
}
