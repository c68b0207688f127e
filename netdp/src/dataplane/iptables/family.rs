//! What differs between `iptables` and `ip6tables`: words, and what there is on a link.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv4Subnets, Ipv6Net, Ipv6Subnets};

use crate::{
    dataplane::{EndpointProgram, NetworkProgram, SubnetProgram, Uplink},
    family::{Family, V4, V6},
    model::MacAddress,
};

/// A family whose packets a pair of tools filters.
pub(super) trait Filtered: Family {
    /// First word of the tools' names.
    const TOOL: &'static str;
    /// Loopback addresses.
    const LOOPBACK: &'static str;
    /// Matches for packets with a loopback address. Of IPv6 the kernel drops them before any rule
    /// (`ip6_rcv_core`).
    const MARTIANS: &'static [&'static str];
    /// Matches a ping's question.
    const ECHO_REQUEST: &'static str;
    /// Match what only a router or a DHCP server sends (RFC 2131, 4.1; RFC 4861, 4; RFC 8415, 7.2).
    const IMPOSTORS: &'static [&'static str];
    /// Destinations that no router forwards.
    const ON_LINK: &'static [&'static str];
    /// Match the packets by which neighbours find each other. ARP is not for these tools to see.
    const DISCOVERY: &'static [&'static str];
    /// Match what a member may send that has no address yet.
    const WITHOUT_ADDRESS: &'static [&'static str];
    /// Length of the prefix whose members' addresses are checked in one chain.
    const SHARD_BITS: u8;
    /// Length of an address in bits.
    const BITS: u8;
    /// What tells the names of its sets from the other family's.
    const DIGIT: char;

    /// A network's side in this family.
    fn side(network: &NetworkProgram) -> Option<SubnetProgram<Self>>;

    /// An endpoint's address.
    fn address_of(endpoint: &EndpointProgram) -> Option<Self::Address>;

    /// The link-local address that an interface with this MAC has beside its own.
    fn link_local(mac: MacAddress) -> Option<Self::Address>;

    /// What leaves by an uplink has this source.
    fn masquerade(uplink: &Uplink) -> Option<Self::Address>;

    /// Whether the host forwarded packets from an uplink before us.
    fn forwarded_before(uplink: &Uplink) -> bool;

    /// The prefixes that a range of addresses is made of.
    fn prefixes(first: Self::Address, last: Self::Address) -> Vec<Self::Net>;

    /// An address as it is written before a port.
    fn before_port(address: Self::Address) -> String;

    /// Whether an address that a port is published on is one to translate.
    fn is_translated(address: Self::Address) -> bool {
        !Into::<IpAddr>::into(address).is_loopback()
    }
}

impl Filtered for V4 {
    const TOOL: &'static str = "iptables";
    const LOOPBACK: &'static str = "127.0.0.0/8";
    const MARTIANS: &'static [&'static str] = &["-s 127.0.0.0/8", "-d 127.0.0.0/8"];
    const ECHO_REQUEST: &'static str = "-p icmp -m icmp --icmp-type 8";
    const IMPOSTORS: &'static [&'static str] = &["-p udp -m udp --sport 67 --dport 68"];
    const ON_LINK: &'static [&'static str] = &["224.0.0.0/4", "255.255.255.255/32"];
    const DISCOVERY: &'static [&'static str] = &[];
    const WITHOUT_ADDRESS: &'static [&'static str] = &[];
    const SHARD_BITS: u8 = 27;
    const BITS: u8 = 32;
    const DIGIT: char = '4';

    fn side(network: &NetworkProgram) -> Option<SubnetProgram<V4>> {
        network.ipv4
    }

    fn address_of(endpoint: &EndpointProgram) -> Option<Ipv4Addr> {
        endpoint.ipv4
    }

    fn link_local(_: MacAddress) -> Option<Ipv4Addr> {
        None
    }

    fn masquerade(uplink: &Uplink) -> Option<Ipv4Addr> {
        uplink.masquerade4
    }

    fn forwarded_before(uplink: &Uplink) -> bool {
        uplink.forwarded_before4
    }

    fn prefixes(first: Ipv4Addr, last: Ipv4Addr) -> Vec<Ipv4Net> {
        Ipv4Subnets::new(first, last, 0).collect()
    }

    fn before_port(address: Ipv4Addr) -> String {
        address.to_string()
    }
}

impl Filtered for V6 {
    const TOOL: &'static str = "ip6tables";
    const LOOPBACK: &'static str = "::1/128";
    const MARTIANS: &'static [&'static str] = &[];
    const ECHO_REQUEST: &'static str = "-p ipv6-icmp -m icmp6 --icmpv6-type 128";
    const IMPOSTORS: &'static [&'static str] = &[
        "-p udp -m udp --sport 547 --dport 546",
        "-p ipv6-icmp -m icmp6 --icmpv6-type 134",
        "-p ipv6-icmp -m icmp6 --icmpv6-type 137",
        // Who asks who listens is a router, too.
        "-p ipv6-icmp -m icmp6 --icmpv6-type 130",
    ];
    const ON_LINK: &'static [&'static str] = &["fe80::/10", "ff00::/8"];
    const DISCOVERY: &'static [&'static str] =
        &["-p ipv6-icmp -m icmp6 --icmpv6-type 135", "-p ipv6-icmp -m icmp6 --icmpv6-type 136"];
    const WITHOUT_ADDRESS: &'static [&'static str] = &[
        "-s ::/128 -p ipv6-icmp -m icmp6 --icmpv6-type 133",
        "-s ::/128 -p ipv6-icmp -m icmp6 --icmpv6-type 135",
        "-s ::/128 -p ipv6-icmp -m icmp6 --icmpv6-type 143",
    ];
    const SHARD_BITS: u8 = 123;
    const BITS: u8 = 128;
    const DIGIT: char = '6';

    fn side(network: &NetworkProgram) -> Option<SubnetProgram<V6>> {
        network.ipv6
    }

    fn address_of(endpoint: &EndpointProgram) -> Option<Ipv6Addr> {
        endpoint.ipv6
    }

    fn link_local(mac: MacAddress) -> Option<Ipv6Addr> {
        // RFC 4291, appendix A.
        let [a, b, c, d, e, f] = mac.0.map(u16::from);
        let tail = [(a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f];
        Some(Ipv6Addr::new(0xfe80, 0, 0, 0, tail[0], tail[1], tail[2], tail[3]))
    }

    fn masquerade(uplink: &Uplink) -> Option<Ipv6Addr> {
        uplink.masquerade6
    }

    fn forwarded_before(uplink: &Uplink) -> bool {
        uplink.forwarded_before6
    }

    fn prefixes(first: Ipv6Addr, last: Ipv6Addr) -> Vec<Ipv6Net> {
        Ipv6Subnets::new(first, last, 0).collect()
    }

    fn before_port(address: Ipv6Addr) -> String {
        format!("[{address}]")
    }
}
