//! A packet, parsed once.
//!
//! Reads go through `bpf_skb_load_bytes`, which also sees what lies in pages of a GSO packet.

use core::ops::Deref;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibLookup,
    },
    helpers::generated::bpf_fib_lookup,
    programs::{TcContext, sk_buff::SkBuff},
};
use netdp_common::{
    addr::{Be16, Be32, Tuple4},
    counter::Reason,
    flow::{IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, seen},
    fragment::{FragmentKey4, Ports},
};
use network_types::{
    eth::{EthHdr, EtherType},
    icmp::Icmpv4Hdr,
    ip::Ipv4Hdr,
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    maps, rewrite,
    verdict::{Decision, drop},
};

/// Bits of the IPv4 header's flags and fragment offset (RFC 791, 3.1).
const FRAGMENT_OFFSET: u16 = 0x1fff;
const MORE_FRAGMENTS: u16 = 0x2000;
const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP_ECHO: u8 = 8;
const ICMP_TIME_EXCEEDED: u8 = 11;
const ICMP_PARAMETER_PROBLEM: u8 = 12;
/// What an error quotes at least of the transport header it is about (RFC 792).
const QUOTED_TRANSPORT: usize = 8;
const AF_INET: u8 = 2;
const PACKET_OTHERHOST: u32 = 3;
const VLAN_ID: u32 = 0x0fff;

/// ifindex of the interface whose hook runs.
#[inline(always)]
pub(crate) fn ifindex(ctx: &TcContext) -> u32 {
    let skb: *mut __sk_buff = ctx.skb.skb;
    // SAFETY: the context is valid for the whole run of the program.
    unsafe { (*skb).ifindex }
}

/// ifindex of the interface through which the packet last came into this namespace; 0 for what the
/// host itself sends.
#[inline(always)]
pub(crate) fn arrived_at(ctx: &TcContext) -> u32 {
    let skb: *mut __sk_buff = ctx.skb.skb;
    // SAFETY: the context is valid for the whole run of the program.
    unsafe { (*skb).ingress_ifindex }
}

/// Whether a VLAN tag stands in the packet's metadata rather than in its bytes.
#[inline(always)]
pub(crate) fn is_tagged(ctx: &TcContext) -> bool {
    let skb: *mut __sk_buff = ctx.skb.skb;
    // SAFETY: the context is valid for the whole run of the program.
    unsafe { (*skb).vlan_present != 0 }
}

/// Whether an arriving frame is not this interface's own: for another station (macvlan,
/// promiscuous mode) or in a VLAN. VLAN 0 only says a priority (IEEE 802.1Q, 9.6).
#[inline(always)]
pub(crate) fn is_for_another(ctx: &TcContext) -> bool {
    let skb: *mut __sk_buff = ctx.skb.skb;
    // SAFETY: the context is valid for the whole run of the program.
    let kind = unsafe { (*skb).pkt_type };
    // SAFETY: as above.
    let tag = unsafe { (*skb).vlan_tci };
    kind == PACKET_OTHERHOST || tag & VLAN_ID != 0
}

/// The Ethernet header.
pub(crate) struct Frame {
    pub(crate) destination: [u8; 6],
    pub(crate) source: [u8; 6],
    ether_type: u16,
}

impl Frame {
    /// Errors: the frame is too short.
    #[inline(always)]
    pub(crate) fn parse(ctx: &TcContext) -> Result<Self, Reason> {
        let header: EthHdr = ctx.load(0).map_err(|_| Reason::Malformed)?;
        Ok(Self {
            destination: header.dst_addr,
            source: header.src_addr,
            ether_type: header.ether_type,
        })
    }

    #[inline(always)]
    pub(crate) fn is_ipv4(&self) -> bool {
        self.ether_type == EtherType::Ipv4 as u16
    }

    #[inline(always)]
    pub(crate) fn is_arp(&self) -> bool {
        self.ether_type == EtherType::Arp as u16
    }
}

/// What an ARP packet says of its sender (RFC 826).
#[repr(C)]
pub(crate) struct Arp {
    /// Hardware type 1, protocol 0x0800, lengths 6 and 4: anything else is no ARP for IPv4.
    format: [u8; 6],
    _operation: [u8; 2],
    pub(crate) sender_mac: [u8; 6],
    pub(crate) sender_address: [u8; 4],
    _target_mac: [u8; 6],
    _target_address: [u8; 4],
}

impl Arp {
    /// Errors: too short, or not ARP for IPv4 over Ethernet.
    #[inline(always)]
    pub(crate) fn parse(ctx: &TcContext) -> Result<Self, Reason> {
        let arp: Self = ctx.load(EthHdr::LEN).map_err(|_| Reason::Malformed)?;
        if arp.format != [0, 1, 8, 0, 6, 4] {
            return Err(Reason::Malformed);
        }
        Ok(arp)
    }
}

/// What follows the IP header, as far as flows care.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Udp,
    /// ICMP echo request or reply.
    Query,
    /// An ICMP error about a packet that belongs, or could, to a flow.
    Error,
    /// Not tracked; the reason for which it is dropped where only flows may pass.
    Untracked(Reason),
}

/// Where the packet that an error quotes lies, in bytes from the first header that the hook sees.
#[derive(Clone, Copy, Default)]
pub(crate) struct Quoted {
    pub(crate) ip: u32,
    pub(crate) l4: u32,
    /// Bytes from `l4` on, 8 or more.
    pub(crate) length: u32,
}

/// What the headers of an IPv4 packet say. It lies in a map ([`maps::headers`]): the stack is too
/// small.
pub(crate) struct Headers {
    /// Offset of the IP header: 14, or 0 on interfaces without Ethernet.
    ip: u32,
    /// Offset of the transport header.
    l4: u32,
    /// A later fragment: no transport header in it.
    headless: bool,
    /// The first of several fragments.
    heads_fragments: bool,
    /// Identification of its datagram.
    id: Be16,
    /// Where it arrived.
    zone: u32,
    pub(crate) transport: Transport,
    pub(crate) proto: u8,
    pub(crate) ttl: u8,
    /// Source address of the packet itself.
    pub(crate) source: Be32,
    /// Destination address of the packet itself.
    pub(crate) destination: Be32,
    /// What the flow table knows the packet by: its own addresses and ports, ports being 0 where
    /// the transport is not tracked. An error counts as an answer to the packet it is about.
    pub(crate) tuple: Tuple4,
    quoted: Quoted,
    /// What this packet shows of its flow: bits of [`seen`]; an error shows nothing.
    pub(crate) seen: u8,
    /// A TCP SYN without ACK.
    pub(crate) opens: bool,
    /// Whether a flow may begin with it. Not with a reset, an echo reply or a later fragment; with
    /// any other TCP packet, so that a connection survives the loss of its flow.
    pub(crate) may_open: bool,
}

/// An IPv4 packet.
pub(crate) struct Packet<'a> {
    ctx: &'a TcContext,
    headers: &'static mut Headers,
}

impl Deref for Packet<'_> {
    type Target = Headers;

    #[inline(always)]
    fn deref(&self) -> &Headers {
        self.headers
    }
}

impl<'a> Packet<'a> {
    /// Parses the IPv4 packet at offset `ip` that arrived in `zone`.
    ///
    /// Errors: headers that contradict themselves or end too early (RFC 1122, 3.2.1).
    #[inline(always)]
    pub(crate) fn parse(ctx: &'a TcContext, ip: usize, zone: u32) -> Result<Self, Reason> {
        let Some(headers) = maps::headers() else { return Err(Reason::NotReady) };
        parse_headers(ctx.skb.skb, ip as u32, zone, headers);
        if headers.transport == Transport::Untracked(Reason::Malformed) {
            return Err(Reason::Malformed);
        }
        Ok(Packet { ctx, headers })
    }

    /// Remembers the ports of the first fragment, since later ones have none. To be called when
    /// the sender is known to be who it says.
    #[inline(always)]
    pub(crate) fn remember_ports(&self) {
        if self.heads_fragments && self.is_tracked() {
            let Tuple4 { sport, dport, .. } = self.tuple;
            maps::remember_fragment(&self.fragment(), &Ports { sport, dport });
        }
    }

    /// The context, for helpers that want it raw.
    #[inline(always)]
    pub(crate) fn skb(&self) -> *mut __sk_buff {
        self.ctx.skb.skb
    }

    /// Bytes, from the first header that the hook sees.
    #[inline(always)]
    pub(crate) fn len(&self) -> u32 {
        self.ctx.len()
    }

    /// Drops what can't begin a flow, counting it for `network`.
    #[inline(always)]
    pub(crate) fn require_opening(&self, network: u32) -> Decision<()> {
        match self.transport {
            Transport::Untracked(reason) => drop(reason, network),
            _ if !self.may_open => drop(Reason::NoFlow, network),
            _ => Ok(()),
        }
    }

    /// The interface that the stack would send it out of, had it come in at `ifindex`; `None`
    /// where the stack would not forward it.
    #[inline(always)]
    pub(crate) fn route(&self, ifindex: u32) -> Option<u32> {
        let (src, dst) = (self.source, self.destination);
        match route(self.ctx.skb.skb, ifindex, src.raw, dst.raw, self.proto.into()) {
            0 => None,
            ifindex => Some(ifindex),
        }
    }

    /// Rewrites addresses and ports to `to`, and all checksums with them.
    ///
    /// Errors: the kernel refused a write (no memory to unshare the packet).
    #[inline(always)]
    pub(crate) fn rewrite(&mut self, to: &Tuple4) -> Result<(), Reason> {
        let Some(rewrite) = maps::rewrite() else { return Err(Reason::NotReady) };
        rewrite.from = self.tuple;
        rewrite.to = *to;
        rewrite.ip = self.ip;
        rewrite.l4 = self.l4;
        rewrite.proto = self.proto.into();
        rewrite.headless = self.headless.into();
        rewrite.is_error = u32::from(self.transport == Transport::Error);
        rewrite.is_sent_by_router = u32::from(self.source != self.tuple.src);
        rewrite.quoted = self.quoted;
        rewrite::apply(self.ctx.skb.skb, rewrite)?;
        self.headers.tuple = *to;
        Ok(())
    }

    /// Sets the destination MAC; Ethernet only.
    #[inline(always)]
    pub(crate) fn set_destination_mac(&self, mac: &[u8; 6]) -> Result<(), Reason> {
        self.ctx.store(0, mac, 0).map_err(|_| Reason::Rewrite)
    }

    /// Sets the source MAC; Ethernet only.
    #[inline(always)]
    pub(crate) fn set_source_mac(&self, mac: &[u8; 6]) -> Result<(), Reason> {
        self.ctx.store(6, mac, 0).map_err(|_| Reason::Rewrite)
    }
}

impl Headers {
    #[inline(always)]
    fn parse(&mut self, skb: &SkBuff, ip: usize, zone: u32) {
        self.ip = ip as u32;
        self.zone = zone;
        self.transport = Transport::Untracked(Reason::Malformed);
        self.seen = seen::ANY;
        self.opens = false;
        self.may_open = false;
        let Ok(header) = skb.load::<Ipv4Hdr>(ip) else { return };
        let header_length = usize::from(header.vihl & 0x0f) * 4;
        let length = usize::from(u16::from_be_bytes(header.tot_len));
        if header.vihl >> 4 != 4
            || header_length < Ipv4Hdr::LEN
            || length < header_length
            || ip + length > skb.len() as usize
        {
            return;
        }
        let offset_and_flags = u16::from_be_bytes(header.frags);
        self.headless = offset_and_flags & FRAGMENT_OFFSET != 0;
        self.heads_fragments = !self.headless && offset_and_flags & MORE_FRAGMENTS != 0;
        self.id = Be16 { raw: u16::from_ne_bytes(header.id) };
        self.proto = header.proto;
        self.ttl = header.ttl;
        self.source = Be32 { raw: u32::from_ne_bytes(header.src_addr) };
        self.destination = Be32 { raw: u32::from_ne_bytes(header.dst_addr) };
        self.tuple = Tuple4 { src: self.source, dst: self.destination, ..Tuple4::default() };
        let l4 = ip + header_length;
        self.l4 = l4 as u32;
        self.transport = if self.headless {
            self.recall_ports()
        } else {
            self.parse_transport(skb, l4, length - header_length)
        };
    }

    /// What the fragments of its datagram share.
    #[inline(always)]
    fn fragment(&self) -> FragmentKey4 {
        let Self { zone, id, proto, source: src, destination: dst, .. } = *self;
        FragmentKey4 { zone, src, dst, id, proto, pad: 0 }
    }

    #[inline(always)]
    fn parse_transport(&mut self, skb: &SkBuff, l4: usize, payload: usize) -> Transport {
        const MALFORMED: Transport = Transport::Untracked(Reason::Malformed);
        const UNTRACKED: Transport = Transport::Untracked(Reason::Protocol);
        match self.proto {
            IPPROTO_TCP => {
                let Some(tcp) = load_whole::<TcpHdr>(skb, l4, payload) else { return MALFORMED };
                self.tuple.sport = Be16 { raw: u16::from_ne_bytes(tcp.source) };
                self.tuple.dport = Be16 { raw: u16::from_ne_bytes(tcp.dest) };
                self.opens = tcp.syn() != 0 && tcp.ack() == 0;
                self.may_open = tcp.rst() == 0;
                if !self.opens {
                    self.seen |= seen::DATA;
                }
                if tcp.fin() != 0 {
                    self.seen |= seen::FIN;
                }
                if tcp.rst() != 0 {
                    self.seen |= seen::RST;
                }
                Transport::Tcp
            }
            IPPROTO_UDP => {
                let Some(udp) = load_whole::<UdpHdr>(skb, l4, payload) else { return MALFORMED };
                self.tuple.sport = Be16 { raw: u16::from_ne_bytes(udp.src) };
                self.tuple.dport = Be16 { raw: u16::from_ne_bytes(udp.dst) };
                self.seen |= seen::DATA;
                self.may_open = true;
                Transport::Udp
            }
            IPPROTO_ICMP => {
                let Some(icmp) = load_whole::<Icmpv4Hdr>(skb, l4, payload) else {
                    return MALFORMED;
                };
                let identifier = Be16 { raw: u16::from_ne_bytes([icmp.data[0], icmp.data[1]]) };
                match icmp.type_ {
                    ICMP_ECHO => self.tuple.sport = identifier,
                    ICMP_ECHO_REPLY => self.tuple.dport = identifier,
                    ICMP_UNREACHABLE | ICMP_TIME_EXCEEDED | ICMP_PARAMETER_PROBLEM => {
                        let is_known = self.parse_quoted(skb, l4, payload).is_some();
                        return if is_known { Transport::Error } else { UNTRACKED };
                    }
                    _ => return UNTRACKED,
                }
                self.seen |= seen::DATA;
                self.may_open = icmp.type_ == ICMP_ECHO;
                Transport::Query
            }
            _ => UNTRACKED,
        }
    }

    /// Recognises the packet that an error is about. `None` where it can't be, for it is a later
    /// fragment or cut short.
    #[inline(always)]
    fn parse_quoted(&mut self, skb: &SkBuff, l4: usize, payload: usize) -> Option<()> {
        let ip = l4 + Icmpv4Hdr::LEN;
        let header: Ipv4Hdr = skb.load(ip).ok()?;
        let header_length = usize::from(header.vihl & 0x0f) * 4;
        let is_whole = header.vihl >> 4 == 4
            && header_length >= Ipv4Hdr::LEN
            && payload >= Icmpv4Hdr::LEN + header_length + QUOTED_TRANSPORT
            && u16::from_be_bytes(header.frags) & FRAGMENT_OFFSET == 0
            && !self.heads_fragments;
        if !is_whole {
            return None;
        }
        let l4 = ip + header_length;
        let start: [u8; QUOTED_TRANSPORT] = skb.load(l4).ok()?;
        let first = Be16 { raw: u16::from_ne_bytes([start[0], start[1]]) };
        let second = Be16 { raw: u16::from_ne_bytes([start[2], start[3]]) };
        let identifier = Be16 { raw: u16::from_ne_bytes([start[4], start[5]]) };
        let none = Be16::default();
        let (sport, dport) = match (header.proto, start[0]) {
            (IPPROTO_TCP | IPPROTO_UDP, _) => (first, second),
            (IPPROTO_ICMP, ICMP_ECHO) => (identifier, none),
            (IPPROTO_ICMP, ICMP_ECHO_REPLY) => (none, identifier),
            _ => return None,
        };
        let src = Be32 { raw: u32::from_ne_bytes(header.src_addr) };
        let dst = Be32 { raw: u32::from_ne_bytes(header.dst_addr) };
        // An error goes to where the packet came from (RFC 1122, 3.2.2).
        if src != self.destination {
            return None;
        }
        self.tuple = Tuple4 { src, dst, sport, dport }.reversed();
        self.proto = header.proto;
        self.seen = 0;
        self.quoted = Quoted {
            ip: ip as u32,
            l4: l4 as u32,
            length: (payload - Icmpv4Hdr::LEN - header_length) as u32,
        };
        Some(())
    }

    #[inline(always)]
    fn recall_ports(&mut self) -> Transport {
        let Some(ports) = maps::fragment(&self.fragment()) else {
            return Transport::Untracked(Reason::Fragment);
        };
        self.tuple.sport = ports.sport;
        self.tuple.dport = ports.dport;
        self.seen |= seen::DATA;
        match self.proto {
            IPPROTO_TCP => Transport::Tcp,
            IPPROTO_UDP => Transport::Udp,
            _ => Transport::Query,
        }
    }

    /// Whether it can belong to a flow.
    #[inline(always)]
    pub(crate) fn is_tracked(&self) -> bool {
        !matches!(self.transport, Transport::Untracked(_))
    }
}

/// A sub-program of its own: the headers it copies would fill the stacks of its callers.
#[inline(never)]
fn parse_headers(skb: *mut __sk_buff, ip: u32, zone: u32, headers: &mut Headers) {
    headers.parse(&SkBuff::new(skb), ip as usize, zone);
}

/// Loads a header that must lie within the payload of what carries it.
#[inline(always)]
fn load_whole<T>(skb: &SkBuff, at: usize, payload: usize) -> Option<T> {
    if payload < size_of::<T>() {
        return None;
    }
    skb.load(at).ok()
}

/// A sub-program of its own, for its stack; 0 stands for none.
#[inline(never)]
fn route(skb: *mut __sk_buff, ifindex: u32, src: u32, dst: u32, proto: u32) -> u32 {
    // SAFETY: plain integers and unions of them; zero is a value of each.
    let mut lookup: FibLookup = unsafe { core::mem::zeroed() };
    lookup.family = AF_INET;
    lookup.l4_protocol = proto as u8;
    lookup.ifindex = ifindex;
    lookup.__bindgen_anon_3.ipv4_src = src;
    lookup.__bindgen_anon_4.ipv4_dst = dst;
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: context and parameters are valid; the size is that of the structure.
    let outcome = unsafe { bpf_fib_lookup(skb.cast(), &raw mut lookup, size, 0) } as u32;
    match outcome {
        // Too large for the exit: the stack fragments it, or answers.
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => {
            lookup.ifindex
        }
        _ => 0,
    }
}
