//! What the host looks like: the part of the planner's input that the user does not decide.
//!
//! Owns the shapes. Filling them is netlink's work; drawing conclusions is the planner's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::{self, Display, Formatter},
    net::IpAddr,
    ops::Deref,
    sync::Arc,
};

use ipnet::IpNet;

use crate::model::{MacAddress, Protocol};

/// A reading of the host's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Every link.
    pub links: Links,
    /// Destinations of the main table's unicast routes, default routes left out.
    pub routes: Vec<Route>,
    /// `net.ipv4.ip_forward`: the host was told to be a router.
    pub is_router: bool,
    /// `net.ipv6.conf.all.forwarding`: the same for IPv6. Unlike there, an interface's own switch
    /// lets nothing be forwarded without it; see [`Self::can_force_forwarding`].
    pub is_ipv6_router: bool,
    /// The kernel does IPv6 at all.
    pub has_ipv6: bool,
    /// Interfaces have `net.ipv6.conf.<name>.force_forwarding` (Linux 6.17).
    pub can_force_forwarding: bool,
    /// There are IPsec policies, which have to see what is forwarded.
    pub has_ipsec: bool,
    /// `net.ipv4.ip_local_port_range`, inclusive.
    pub ephemeral_ports: (u16, u16),
    /// `net.ipv4.ip_local_reserved_ports`; `None` where it can't be seen.
    pub reserved_ports: Option<PortRanges>,
    /// Ports that other programs of the host were found to have: none to choose.
    pub ports_in_use: BTreeSet<(Protocol, u16)>,
}

/// Ports as `ip_local_reserved_ports` has them ("80,1000-1010"): ranges with both ends, in order; those
/// that meet are one, as when the kernel lists them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortRanges(Vec<(u16, u16)>);

impl PortRanges {
    /// From a list; what is no range is left out.
    pub fn parse(list: &str) -> Self {
        Self::of(list.split(',').filter_map(|item| {
            let (first, last) = item.trim().split_once('-').unwrap_or((item.trim(), item.trim()));
            Some((first.parse().ok()?, last.parse().ok()?))
        }))
    }

    fn of(ranges: impl Iterator<Item = (u16, u16)>) -> Self {
        let mut ranges: Vec<_> = ranges.collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (first, last) in ranges {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// With one more range.
    #[must_use]
    pub fn with(&self, first: u16, last: u16) -> Self {
        Self::of(self.0.iter().copied().chain([(first, last)]))
    }

    /// Whether all ports of a range are among them.
    pub fn cover(&self, first: u16, last: u16) -> bool {
        self.0.iter().any(|range| range.0 <= first && last <= range.1)
    }
}

impl Display for PortRanges {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{first}")?;
            if first != last {
                write!(f, "-{last}")?;
            }
        }
        Ok(())
    }
}

/// Links by ifindex, which are found by name, too: there may be a thousand of ours.
/// Copies share what they hold until one changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links(Arc<Index>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Index {
    by_index: BTreeMap<u32, Link>,
    by_name: HashMap<String, u32>,
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
    /// Its addresses in the kernel's order: IPv4 first, primaries before secondaries.
    pub addresses: Vec<LinkAddress>,
    /// `net.ipv4.conf.<name>.forwarding`.
    pub forwarding: bool,
    /// `net.ipv6.conf.<name>.force_forwarding`, of links that are no port of another.
    pub forces_forwarding: bool,
    /// A bridge whose packets meet the rules of iptables, or a port by which packets may leave that
    /// came by it: what the iptables backend needs of ours.
    pub is_filtered: bool,
    /// How IPv6 is set here.
    pub ipv6: Ipv6Mode,
}

/// How IPv6 is set at an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ipv6Mode {
    /// Switched off.
    Off,
    /// On, as at ours: addresses from us, a link-local one that follows from the MAC address (RFC 4291,
    /// appendix A) and counts at once, and nothing that somebody advertises.
    Quiet,
    /// On in some other way, or not there at all.
    #[default]
    Other,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkAddress {
    /// With the length of its prefix.
    pub net: IpNet,
    /// Fit to be what the world sees for long: neither tentative, deprecated nor temporary
    /// (RFC 8981), as IPv6 addresses may be.
    pub is_steady: bool,
}

/// A unicast route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it leads to.
    pub destination: IpNet,
    /// The interface it leaves by.
    pub ifindex: u32,
}

impl HostFacts {
    /// The link with this name.
    pub fn link(&self, name: &str) -> Option<(u32, &Link)> {
        let ifindex = *self.links.0.by_name.get(name)?;
        Some((ifindex, self.links.get(&ifindex)?))
    }

    /// Whether one of the host's interfaces has this address.
    pub fn is_local(&self, address: IpAddr) -> bool {
        // One that is link-local may be on several, and says nothing without its interface.
        !is_ipv6_link_local(address)
            && self
                .links
                .values()
                .any(|link| link.addresses.iter().any(|candidate| candidate.net.addr() == address))
    }
}

impl Links {
    /// A link to be changed; its name stays.
    pub fn get_mut(&mut self, ifindex: u32) -> Option<&mut Link> {
        Arc::make_mut(&mut self.0).by_index.get_mut(&ifindex)
    }
}

impl Deref for Links {
    type Target = BTreeMap<u32, Link>;

    fn deref(&self) -> &Self::Target {
        &self.0.by_index
    }
}

impl Extend<(u32, Link)> for Links {
    fn extend<T: IntoIterator<Item = (u32, Link)>>(&mut self, links: T) {
        let Index { by_index, by_name } = Arc::make_mut(&mut self.0);
        for (ifindex, link) in links {
            by_name.insert(link.name.clone(), ifindex);
            by_index.insert(ifindex, link);
        }
    }
}

impl FromIterator<(u32, Link)> for Links {
    fn from_iter<T: IntoIterator<Item = (u32, Link)>>(links: T) -> Self {
        let mut all = Self::default();
        all.extend(links);
        all
    }
}

/// Whether an address is fe80::/10. IPv4's link-local addresses mean one thing on a whole host.
pub fn is_ipv6_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

impl Route {
    /// Whether it is a part of the address space so large that it stands for all of it: VPN
    /// clients take halves, and 2000::/3 is all of IPv6 that is routed at all.
    pub fn is_default_in_disguise(&self) -> bool {
        match self.destination {
            IpNet::V4(net) => net.prefix_len() <= 1,
            IpNet::V6(net) => net.prefix_len() <= 3,
        }
    }
}

impl Link {
    /// What the alias of every link of ours begins with.
    pub const ALIAS_PREFIX: &str = "netdp ";

    /// The alias of the host's end of a pair that waits for the next endpoint.
    pub const BLANK_ALIAS: &str = "netdp blank";

    /// The alias of a container's end that waits on the host under this name. Whoever takes it gives
    /// it another: the name is in it so that it is not ours any more then, wherever it is.
    pub fn offer_alias(name: &str) -> String {
        format!("{}offer {name}", Self::ALIAS_PREFIX)
    }

    /// Whether it has this address with this prefix length.
    pub fn has_address(&self, net: IpNet) -> bool {
        self.addresses.iter().any(|address| address.net == net)
    }

    /// Whether we made it; any other link is left alone. An operator's own notes may begin with
    /// our name: the noun and the kind of link have to be right, too.
    pub fn is_ours(&self) -> bool {
        let Some(alias) = &self.alias else { return false };
        let Some(noun) = alias.strip_prefix(Self::ALIAS_PREFIX) else { return false };
        let noun = noun.split(' ').next().unwrap_or_default();
        match self.kind.as_deref() {
            Some("bridge") => matches!(noun, "network" | "unfinished"),
            Some("veth") => {
                matches!(noun, "endpoint" | "unfinished")
                    || alias == Self::BLANK_ALIAS
                    || *alias == Self::offer_alias(&self.name)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(list: &str, first: u16, last: u16) -> String {
        PortRanges::parse(list).with(first, last).to_string()
    }

    #[test]
    fn a_port_list_keeps_what_was_reserved_before() {
        assert_eq!(with("", 50_000, 60_999), "50000-60999");
        assert_eq!(with("80,1000-1010", 50_000, 60_999), "80,1000-1010,50000-60999");
        assert_eq!(with("49999,60000-61000", 50_000, 60_999), "49999-61000");
        assert_eq!(with("65535", 1, 2), "1-2,65535");
    }

    #[test]
    fn a_port_list_has_what_its_ranges_have_together() {
        for list in ["50000-60999", "7,49999-61000", "55000-60999,50000-54999"] {
            assert!(PortRanges::parse(list).cover(50_000, 60_999), "{list}");
        }
        for list in ["", "50000,60999", "50000-54999,55001-60999", "50001-65535"] {
            assert!(!PortRanges::parse(list).cover(50_000, 60_999), "{list}");
        }
    }

    #[test]
    fn adding_a_range_twice_changes_nothing() {
        let once = with("7,55000", 50_000, 60_999);
        assert_eq!(with(&once, 50_000, 60_999), once);
    }
}
