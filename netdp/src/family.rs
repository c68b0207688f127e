//! IPv4 and IPv6 as types, for shapes that both have, and the arithmetic on their addresses.
//!
//! Owns what differs between the families and nothing else. Arithmetic is done in 128 bits for
//! both: it is the control plane's, and short.

use std::{
    fmt::{Debug, Display},
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// A family of IP addresses.
pub trait Family: Copy + Debug + Default + Eq + Ord + 'static {
    /// Its addresses.
    type Address: Copy + Debug + Display + Eq + Ord + Hash + FromStr + Into<IpAddr>;
    /// An address with a prefix length.
    type Net: Copy + Debug + Display + Eq + Ord + FromStr + Into<IpNet>;

    /// "IPv4", "IPv6".
    const NAME: &'static str;
    /// Every local address, where it is bound to.
    const UNSPECIFIED: Self::Address;
    /// Prefix lengths that a container subnet may have: below, it would swallow the world; above,
    /// there is no room for the gateway and one container.
    const SUBNET_PREFIXES: RangeInclusive<u8>;
    /// Never a container subnet, because hosts can't have such addresses, or only beside others.
    const UNUSABLE: &'static [Self::Net];
    /// Whether the last address of a subnet means all of its hosts.
    const HAS_BROADCAST: bool;

    /// An address as a number.
    fn bits(address: Self::Address) -> u128;

    /// The address of a number; what does not fit is cut off at the top.
    fn address(bits: u128) -> Self::Address;

    /// The address, if it is of this family.
    fn of(address: IpAddr) -> Option<Self::Address>;

    /// The net, if it is of this family.
    fn of_net(net: IpNet) -> Option<Self::Net>;

    /// Length of a net's prefix in bits.
    fn prefix_len(net: Self::Net) -> u8;

    /// First address of a net.
    fn first(net: Self::Net) -> Self::Address;

    /// Last address of a net.
    fn last(net: Self::Net) -> Self::Address;

    /// An address with the prefix length of a net.
    fn with_prefix_of(address: Self::Address, net: Self::Net) -> Self::Net {
        Self::net(address, Self::prefix_len(net))
    }

    /// An address and the length of a prefix that is at most as long as the address.
    fn net(address: Self::Address, prefix_len: u8) -> Self::Net;

    /// The address that follows; behind the last one comes the first.
    fn next(address: Self::Address) -> Self::Address {
        Self::address(Self::bits(address).wrapping_add(1))
    }
}

/// IPv4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct V6;

impl Family for V4 {
    type Address = Ipv4Addr;
    type Net = Ipv4Net;

    const NAME: &'static str = "IPv4";
    const UNSPECIFIED: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
    const SUBNET_PREFIXES: RangeInclusive<u8> = 8..=30;
    /// "This network", loopback, multicast.
    const UNUSABLE: &'static [Ipv4Net] = &[
        Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
        Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
        Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4),
    ];
    const HAS_BROADCAST: bool = true;

    fn bits(address: Ipv4Addr) -> u128 {
        u32::from(address).into()
    }

    fn address(bits: u128) -> Ipv4Addr {
        Ipv4Addr::from(bits as u32)
    }

    fn of(address: IpAddr) -> Option<Ipv4Addr> {
        match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }
    }

    fn of_net(net: IpNet) -> Option<Ipv4Net> {
        match net {
            IpNet::V4(net) => Some(net),
            IpNet::V6(_) => None,
        }
    }

    fn prefix_len(net: Ipv4Net) -> u8 {
        net.prefix_len()
    }

    fn first(net: Ipv4Net) -> Ipv4Addr {
        net.network()
    }

    fn last(net: Ipv4Net) -> Ipv4Addr {
        net.broadcast()
    }

    fn net(address: Ipv4Addr, prefix_len: u8) -> Ipv4Net {
        Ipv4Net::new_assert(address, prefix_len)
    }
}

impl Family for V6 {
    type Address = Ipv6Addr;
    type Net = Ipv6Net;

    const NAME: &'static str = "IPv6";
    const UNSPECIFIED: Ipv6Addr = Ipv6Addr::UNSPECIFIED;
    const SUBNET_PREFIXES: RangeInclusive<u8> = 48..=126;
    /// Unspecified, loopback and mapped IPv4; link-local, which every interface has besides;
    /// multicast.
    const UNUSABLE: &'static [Ipv6Net] = &[
        Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 8),
        Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
        Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    ];
    const HAS_BROADCAST: bool = false;

    fn bits(address: Ipv6Addr) -> u128 {
        address.into()
    }

    fn address(bits: u128) -> Ipv6Addr {
        bits.into()
    }

    fn of(address: IpAddr) -> Option<Ipv6Addr> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address),
        }
    }

    fn of_net(net: IpNet) -> Option<Ipv6Net> {
        match net {
            IpNet::V4(_) => None,
            IpNet::V6(net) => Some(net),
        }
    }

    fn prefix_len(net: Ipv6Net) -> u8 {
        net.prefix_len()
    }

    fn first(net: Ipv6Net) -> Ipv6Addr {
        net.network()
    }

    fn last(net: Ipv6Net) -> Ipv6Addr {
        net.broadcast()
    }

    fn net(address: Ipv6Addr, prefix_len: u8) -> Ipv6Net {
        Ipv6Net::new_assert(address, prefix_len)
    }
}
