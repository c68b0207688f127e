//! IPv4 and IPv6: what the two differ in, so that all else is written once.

use aya_ebpf::{bindings::bpf_fib_lookup as FibLookup, programs::sk_buff::SkBuff};
use netdp_common::{
    addr::{Be32, Be128, Tuple},
    interface::{Interface, flag as interface_flag},
    network::{Network, Subnet, flag},
};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    container::Sender,
    maps::Maps,
    neighbour,
    packet::{Datagram, Headers, Packet},
    subprogram::Subprograms,
    verdict::Decision,
};

/// A family of IP addresses.
pub(crate) trait Family: Maps + Subprograms + Copy + 'static {
    /// Its header without options.
    type Header;
    /// [`Network::flags`]: the network carries the family.
    const CARRIED: u32;
    /// [`Interface::flags`]: the host forwarded the family before netdp did.
    const FORWARDED: u8;
    /// AF_INET, AF_INET6.
    const ADDRESS_FAMILY: u8;
    /// Protocol number of its ICMP.
    const ICMP: u8;
    /// ICMP types of a query and its answer.
    const ECHO: u8;
    /// See [`Self::ECHO`].
    const ECHO_REPLY: u8;
    /// Offset of the time to live, or hop limit, in the header.
    const TTL: u32;
    /// Offset of the protocol number in the header.
    const PROTOCOL: u32;
    /// Offset of the source address in the header; the destination follows.
    const ADDRESSES: u32;
    /// Offset of the header's own checksum, where it has one.
    const HEADER_CHECKSUM: Option<u32>;
    /// Whether ICMP's checksum covers the addresses.
    const ICMP_HAS_PSEUDO_HEADER: bool;

    /// Its side of a network.
    fn subnet(network: &Network) -> &Subnet<Self::Address>;

    /// Its address of an interface.
    fn address(interface: &Interface) -> &Self::Address;

    /// Reads a header at offset `ip` and what stands between it and the transport. `None`: they
    /// contradict themselves or end too early.
    fn parse(
        skb: &SkBuff,
        header: &Self::Header,
        ip: usize,
        datagram: &mut Datagram<Self::Address>,
    ) -> Option<()>;

    /// Whether an ICMP type is that of an error about a packet that could belong to a flow.
    fn is_error(icmp_type: u8) -> bool;

    /// Whether packets of a protocol stay correct when only their addresses change.
    fn is_translatable(proto: u8) -> bool;

    /// What becomes of a container's packet that never leaves the link; `None` = it may leave.
    fn on_link(packet: &Packet<'_, Self>, sender: &Sender) -> Option<Decision>;

    /// Whether it asks for a neighbour's MAC address, or tells one.
    fn is_discovery(headers: &Headers<Self>) -> bool;

    /// Writes the addresses of a packet into the parameters of a routing lookup.
    fn set_route(lookup: &mut FibLookup, tuple: &Tuple<Self::Address>);
}

/// IPv4.
#[derive(Clone, Copy)]
pub(crate) enum V4 {}

/// IPv6.
#[derive(Clone, Copy)]
pub(crate) enum V6 {}

/// Bits of IPv4's flags and fragment offset (RFC 791, 3.1).
const V4_OFFSET: u16 = 0x1fff;
const V4_MORE: u16 = 0x2000;
/// Bits of the same of an IPv6 fragment header (RFC 8200, 4.5).
const V6_OFFSET: u16 = 0xfff8;
const V6_MORE: u16 = 1;

/// IPv6 extension headers (RFC 8200, 4.1; RFC 4302).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
/// More of them than this is no honest packet's.
const EXTENSIONS: usize = 6;

/// Protocols whose checksums cover the addresses, and which nobody brings up to date here: DCCP,
/// UDP-Lite; and AH, which signs them.
const DCCP: u8 = 33;
const UDP_LITE: u8 = 136;
/// OSPF's checksum covers IPv6 addresses (RFC 5340, A.3.1), not IPv4's.
const OSPF: u8 = 89;

impl Family for V4 {
    type Header = Ipv4Hdr;
    const CARRIED: u32 = flag::IPV4;
    const FORWARDED: u8 = interface_flag::FORWARDED_IPV4;
    const ADDRESS_FAMILY: u8 = 2;
    const ICMP: u8 = netdp_common::flow::IPPROTO_ICMP;
    const ECHO: u8 = 8;
    const ECHO_REPLY: u8 = 0;
    const TTL: u32 = 8;
    const PROTOCOL: u32 = 9;
    const ADDRESSES: u32 = 12;
    const HEADER_CHECKSUM: Option<u32> = Some(10);
    const ICMP_HAS_PSEUDO_HEADER: bool = false;

    #[inline(always)]
    fn subnet(network: &Network) -> &Subnet<Be32> {
        &network.ipv4
    }

    #[inline(always)]
    fn address(interface: &Interface) -> &Be32 {
        &interface.ipv4
    }

    #[inline(always)]
    fn parse(_: &SkBuff, header: &Ipv4Hdr, ip: usize, datagram: &mut Datagram<Be32>) -> Option<()> {
        let header_length = usize::from(header.vihl & 0x0f) * 4;
        let length = usize::from(u16::from_be_bytes(header.tot_len));
        if header.vihl >> 4 != 4 || header_length < Ipv4Hdr::LEN || length < header_length {
            return None;
        }
        let offset_and_flags = u16::from_be_bytes(header.frags);
        datagram.headless = offset_and_flags & V4_OFFSET != 0;
        datagram.heads_fragments = !datagram.headless && offset_and_flags & V4_MORE != 0;
        datagram.src = Be32 { raw: u32::from_ne_bytes(header.src_addr) };
        datagram.dst = Be32 { raw: u32::from_ne_bytes(header.dst_addr) };
        datagram.proto = header.proto;
        datagram.ttl = header.ttl;
        datagram.id = Be32 { raw: u16::from_ne_bytes(header.id).into() };
        datagram.fragment_proto = header.proto;
        datagram.l4 = ip + header_length;
        datagram.end = ip + length;
        Some(())
    }

    #[inline(always)]
    fn is_error(icmp_type: u8) -> bool {
        // Destination unreachable, time exceeded, parameter problem (RFC 792).
        matches!(icmp_type, 3 | 11 | 12)
    }

    #[inline(always)]
    fn is_translatable(proto: u8) -> bool {
        !matches!(proto, DCCP | UDP_LITE | AUTHENTICATION)
    }

    #[inline(always)]
    fn on_link(_: &Packet<'_, Self>, _: &Sender) -> Option<Decision> {
        None
    }

    #[inline(always)]
    fn is_discovery(_: &Headers<Self>) -> bool {
        false
    }

    #[inline(always)]
    fn set_route(lookup: &mut FibLookup, tuple: &Tuple<Be32>) {
        lookup.__bindgen_anon_3.ipv4_src = tuple.src.raw;
        lookup.__bindgen_anon_4.ipv4_dst = tuple.dst.raw;
    }
}

impl Family for V6 {
    type Header = Ipv6Hdr;
    const CARRIED: u32 = flag::IPV6;
    const FORWARDED: u8 = interface_flag::FORWARDED_IPV6;
    const ADDRESS_FAMILY: u8 = 10;
    const ICMP: u8 = netdp_common::flow::IPPROTO_ICMPV6;
    const ECHO: u8 = 128;
    const ECHO_REPLY: u8 = 129;
    const TTL: u32 = 7;
    const PROTOCOL: u32 = 6;
    const ADDRESSES: u32 = 8;
    const HEADER_CHECKSUM: Option<u32> = None;
    const ICMP_HAS_PSEUDO_HEADER: bool = true;

    #[inline(always)]
    fn subnet(network: &Network) -> &Subnet<Be128> {
        &network.ipv6
    }

    #[inline(always)]
    fn address(interface: &Interface) -> &Be128 {
        &interface.ipv6
    }

    #[inline(always)]
    fn parse(
        skb: &SkBuff,
        header: &Ipv6Hdr,
        ip: usize,
        datagram: &mut Datagram<Be128>,
    ) -> Option<()> {
        if header.vcf[0] >> 4 != 6 {
            return None;
        }
        datagram.src = address_of(header.src_addr);
        datagram.dst = address_of(header.dst_addr);
        datagram.proto = header.next_hdr;
        datagram.ttl = header.hop_limit;
        datagram.headless = false;
        datagram.heads_fragments = false;
        datagram.id = Be32::default();
        datagram.fragment_proto = 0;
        datagram.l4 = ip + Ipv6Hdr::LEN;
        datagram.end = datagram.l4 + usize::from(u16::from_be_bytes(header.payload_len));
        for _ in 0..=EXTENSIONS {
            if !skip_extension(skb, datagram)? {
                return Some(());
            }
        }
        None
    }

    #[inline(always)]
    fn is_error(icmp_type: u8) -> bool {
        // Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443).
        matches!(icmp_type, 1..=4)
    }

    #[inline(always)]
    fn is_translatable(proto: u8) -> bool {
        !matches!(proto, DCCP | UDP_LITE | OSPF | AUTHENTICATION | ROUTING)
    }

    #[inline(always)]
    fn on_link(packet: &Packet<'_, Self>, sender: &Sender) -> Option<Decision> {
        neighbour::on_link(packet, sender)
    }

    #[inline(always)]
    fn is_discovery(headers: &Headers<Self>) -> bool {
        neighbour::is_discovery(headers)
    }

    #[inline(always)]
    fn set_route(lookup: &mut FibLookup, tuple: &Tuple<Be128>) {
        lookup.__bindgen_anon_3.ipv6_src = tuple.src.raw;
        lookup.__bindgen_anon_4.ipv6_dst = tuple.dst.raw;
    }
}

/// Steps over an extension header. `Some(false)`: this is none, or nothing behind it can be read.
///
/// A routing header is not stepped over: it changes where the packet goes, so the packet is of a
/// protocol that is not translated. So is what an authentication header signs.
#[inline(always)]
fn skip_extension(skb: &SkBuff, datagram: &mut Datagram<Be128>) -> Option<bool> {
    if datagram.headless || !matches!(datagram.proto, HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT) {
        return Some(false);
    }
    if datagram.l4 + 8 > datagram.end {
        return None;
    }
    let header: [u8; 8] = skb.load(datagram.l4).ok()?;
    if datagram.proto == FRAGMENT {
        let offset_and_flags = u16::from_be_bytes([header[2], header[3]]);
        datagram.headless = offset_and_flags & V6_OFFSET != 0;
        datagram.heads_fragments = !datagram.headless && offset_and_flags & V6_MORE != 0;
        let id = [header[4], header[5], header[6], header[7]];
        datagram.id = Be32 { raw: u32::from_ne_bytes(id) };
        datagram.l4 += 8;
    } else {
        datagram.l4 += (usize::from(header[1]) + 1) * 8;
    }
    datagram.proto = header[0];
    Some(true)
}

/// The words of an address as they lie in memory.
#[inline(always)]
fn address_of(octets: [u8; 16]) -> Be128 {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = octets;
    let word = |bytes| u32::from_ne_bytes(bytes);
    Be128 { raw: [word([a, b, c, d]), word([e, f, g, h]), word([i, j, k, l]), word([m, n, o, p])] }
}
