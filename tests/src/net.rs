//! The lab's addresses, once per family: a test names a place and gets its address there.
//!
//! Owns the address plan. Knows nothing of namespaces or of netdp.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4, in networks that have nothing else.
    Ipv4,
    /// IPv6, in networks that have both.
    Ipv6,
}

impl Family {
    /// Its name in results.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }

    /// The lab's addresses in it.
    #[must_use]
    pub const fn net(self) -> &'static Net {
        match self {
            Self::Ipv4 => &IPV4,
            Self::Ipv6 => &IPV6,
        }
    }
}

/// The lab's addresses in one family, and what else differs between families.
#[derive(Clone, Copy, Debug)]
pub struct Net {
    /// Which family.
    pub family: Family,
    /// The host, on `up0`.
    pub host: IpAddr,
    /// The host's second address on `up0`.
    pub host_second: IpAddr,
    /// E, on the other side of `up0`.
    pub outside: IpAddr,
    /// Further addresses of E, beyond a route.
    pub guests: [IpAddr; 5],
    /// The prefix of all guests.
    pub guests_prefix: &'static str,
    /// The host, on `up1`.
    pub host_up1: IpAddr,
    /// F, on the other side of `up1`.
    pub second: IpAddr,
    /// Subnet of network a.
    pub subnet_a: &'static str,
    /// Gateway of network a.
    pub gateway_a: IpAddr,
    /// First container of network a.
    pub a1: IpAddr,
    /// Second container of network a.
    pub a2: IpAddr,
    /// An address of network a that is free for a third container.
    pub a3: IpAddr,
    /// An address of network a that no test gives to anybody.
    pub a_nobody: IpAddr,
    /// Subnet of network b.
    pub subnet_b: &'static str,
    /// Gateway of network b.
    pub gateway_b: IpAddr,
    /// First container of network b.
    pub b1: IpAddr,
    /// An address outside that nobody has.
    pub elsewhere: IpAddr,
    /// A multicast group that is not confined to a link.
    pub group: IpAddr,
    /// The loopback address.
    pub loopback: IpAddr,
    /// The wildcard address.
    pub any: IpAddr,
    /// Length of the prefix of a link, in bits.
    pub link_bits: u8,
    /// Length of an IP header without options, in bytes.
    pub header_bytes: usize,
    /// Protocol number of the family's ICMP.
    pub icmp: u8,
    /// ICMP type and code of "time to live exceeded in transit".
    pub time_exceeded: (u8, u8),
    /// ICMP type and code of "packet too big".
    pub too_big: (u8, u8),
    /// ICMP type and code of "administratively prohibited".
    pub prohibited: (u8, u8),
    /// The EtherType, as it is on the wire.
    pub ether_type: [u8; 2],
}

/// The families that netdp carries: what is promised for a family is tried in it.
pub const FAMILIES: &[Family] = &[Family::Ipv4, Family::Ipv6];

/// The lab's IPv4 addresses.
pub static IPV4: Net = Net {
    family: Family::Ipv4,
    host: v4(10, 0, 0, 2),
    host_second: v4(10, 0, 0, 22),
    outside: v4(10, 0, 0, 3),
    guests: [
        v4(192, 0, 2, 1),
        v4(192, 0, 2, 2),
        v4(192, 0, 2, 3),
        v4(192, 0, 2, 4),
        v4(192, 0, 2, 5),
    ],
    guests_prefix: "192.0.2.0/24",
    host_up1: v4(10, 1, 0, 2),
    second: v4(10, 1, 0, 3),
    subnet_a: "172.20.0.0/24",
    gateway_a: v4(172, 20, 0, 1),
    a1: v4(172, 20, 0, 2),
    a2: v4(172, 20, 0, 3),
    a3: v4(172, 20, 0, 4),
    a_nobody: v4(172, 20, 0, 99),
    subnet_b: "172.21.0.0/24",
    gateway_b: v4(172, 21, 0, 1),
    b1: v4(172, 21, 0, 2),
    elsewhere: v4(198, 51, 100, 7),
    group: v4(239, 1, 2, 3),
    loopback: IpAddr::V4(Ipv4Addr::LOCALHOST),
    any: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    link_bits: 24,
    header_bytes: 20,
    icmp: 1,
    // RFC 792; code 13: RFC 1812 5.2.7.1.
    time_exceeded: (11, 0),
    too_big: (3, 4),
    prohibited: (3, 13),
    ether_type: [0x08, 0x00],
};

/// The lab's IPv6 addresses.
pub static IPV6: Net = Net {
    family: Family::Ipv6,
    host: v6(0xfd00, 0, 2),
    host_second: v6(0xfd00, 0, 0x22),
    outside: v6(0xfd00, 0, 3),
    guests: [
        v6(0x2001, 0xdb8, 1),
        v6(0x2001, 0xdb8, 2),
        v6(0x2001, 0xdb8, 3),
        v6(0x2001, 0xdb8, 4),
        v6(0x2001, 0xdb8, 5),
    ],
    guests_prefix: "2001:db8::/64",
    host_up1: v6(0xfd00, 1, 2),
    second: v6(0xfd00, 1, 3),
    subnet_a: "fd00:20::/64",
    gateway_a: v6(0xfd00, 0x20, 1),
    a1: v6(0xfd00, 0x20, 2),
    a2: v6(0xfd00, 0x20, 3),
    a3: v6(0xfd00, 0x20, 4),
    a_nobody: v6(0xfd00, 0x20, 0x99),
    subnet_b: "fd00:21::/64",
    gateway_b: v6(0xfd00, 0x21, 1),
    b1: v6(0xfd00, 0x21, 2),
    elsewhere: v6(0xfd00, 0xffff, 7),
    // Site-local scope: a link-local one would stay on the link whatever netdp did.
    group: v6(0xff05, 0, 0x1234),
    loopback: IpAddr::V6(Ipv6Addr::LOCALHOST),
    any: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    link_bits: 64,
    header_bytes: 40,
    icmp: 58,
    // RFC 4443 3.3, 3.2, 3.1.
    time_exceeded: (3, 0),
    too_big: (2, 0),
    prohibited: (1, 1),
    ether_type: [0x86, 0xdd],
};

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

/// `first:second::last`
const fn v6(first: u16, second: u16, last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, last))
}

impl Net {
    /// Whether it is the IPv4 one.
    #[must_use]
    pub fn is_ipv4(&self) -> bool {
        self.family == Family::Ipv4
    }

    /// An address on a further link of the host, such as 10.2.0.3 for link 2 and host 3.
    #[must_use]
    pub const fn on_link(&self, link: u8, host: u8) -> IpAddr {
        match self.family {
            Family::Ipv4 => v4(10, link, 0, host),
            Family::Ipv6 => v6(0xfd00, link as u16, host as u16),
        }
    }

    /// An address as `ip address add` wants it on a link.
    #[must_use]
    pub fn with_prefix(&self, address: IpAddr) -> String {
        format!("{address}/{}", self.link_bits)
    }

    /// A value of `-p` that publishes on one address of the host.
    #[must_use]
    pub fn publish_on(address: IpAddr, ports: &str) -> String {
        match address {
            IpAddr::V4(address) => format!("{address}:{ports}"),
            IpAddr::V6(address) => format!("[{address}]:{ports}"),
        }
    }
}

/// What stands beside an IPv6 address or subnet of a container in the plan: the IPv4 one with the
/// same digits. Nothing for what is IPv4 itself.
pub(crate) fn ipv4_beside(text: &str) -> Option<String> {
    let (address, prefix) = text.split_once('/').map_or((text, None), |(a, _)| (a, Some("/24")));
    let segments = address.parse::<Ipv6Addr>().ok()?.segments();
    Some(format!("172.{:x}.0.{:x}{}", segments[1], segments[7], prefix.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_have_the_same_plan() {
        let texts = |net: &Net| {
            let containers = [net.gateway_a, net.a1, net.a2, net.a3, net.a_nobody, net.b1];
            let addresses = containers.map(|address| address.to_string());
            [&addresses[..], &[net.subnet_a.to_owned(), net.subnet_b.to_owned()]].concat()
        };
        let beside: Vec<_> = texts(&IPV6).iter().filter_map(|text| ipv4_beside(text)).collect();
        assert_eq!(beside, texts(&IPV4));
        assert_eq!(ipv4_beside("172.20.0.2"), None);
        assert_eq!(IPV4.on_link(1, 3), IPV4.second);
        assert_eq!(IPV6.on_link(1, 3), IPV6.second);
    }

    #[test]
    fn ports_are_published_as_the_command_line_wants_them() {
        assert_eq!(Net::publish_on(IPV4.host, "8080:80"), "10.0.0.2:8080:80");
        assert_eq!(Net::publish_on(IPV6.host, "8080:80"), "[fd00::2]:8080:80");
    }
}
