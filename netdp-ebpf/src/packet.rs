//! A packet: parsed once, rewritten in place. The only code that touches packet bytes.
//!
//! Reads go through `bpf_skb_load_bytes`, which also sees what lies in pages of a GSO packet;
//! rewrites through the checksum helpers, which also know CHECKSUM_PARTIAL and
//! CHECKSUM_COMPLETE.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_FIB_LKUP_RET_FRAG_NEEDED,
        BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibLookup,
    },
    helpers::generated::bpf_fib_lookup,
    programs::TcContext,
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
    maps,
    verdict::{Decision, drop},
};

/// Bits of the IPv4 header's flags and fragment offset (RFC 791, 3.1).
const FRAGMENT_OFFSET: u16 = 0x1fff;
const MORE_FRAGMENTS: u16 = 0x2000;
const IPV4_CHECKSUM: usize = 10;
const IPV4_SOURCE: usize = 12;
const IPV4_DESTINATION: usize = 16;
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const ICMP_CHECKSUM: usize = 2;
const ICMP_IDENTIFIER: usize = 4;
const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_ECHO: u8 = 8;
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
    let (kind, tag) = unsafe { ((*skb).pkt_type, (*skb).vlan_tci) };
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
    /// Not tracked; the reason for which it is dropped where only flows may pass.
    Untracked(Reason),
}

/// An IPv4 packet.
pub(crate) struct Packet<'a> {
    ctx: &'a TcContext,
    /// Offset of the IP header: 14, or 0 on interfaces without Ethernet.
    ip: usize,
    /// Offset of the transport header.
    l4: usize,
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
    /// Addresses and ports; ports are 0 where the transport is not tracked.
    pub(crate) tuple: Tuple4,
    /// What this packet shows of its flow: bits of [`seen`].
    pub(crate) seen: u8,
    /// A TCP SYN without ACK.
    pub(crate) opens: bool,
    /// Whether a flow may begin with it. Not with a reset, an echo reply or a later fragment; with
    /// any other TCP packet, so that a connection survives the loss of its flow.
    pub(crate) may_open: bool,
}

impl<'a> Packet<'a> {
    /// Parses the IPv4 packet at offset `ip` that arrived in `zone`.
    ///
    /// Errors: headers that contradict themselves or end too early (RFC 1122, 3.2.1).
    #[inline(always)]
    pub(crate) fn parse(ctx: &'a TcContext, ip: usize, zone: u32) -> Result<Self, Reason> {
        let header: Ipv4Hdr = ctx.load(ip).map_err(|_| Reason::Malformed)?;
        let header_length = usize::from(header.vihl & 0x0f) * 4;
        let length = usize::from(u16::from_be_bytes(header.tot_len));
        if header.vihl >> 4 != 4
            || header_length < Ipv4Hdr::LEN
            || length < header_length
            || ip + length > ctx.len() as usize
        {
            return Err(Reason::Malformed);
        }
        let offset_and_flags = u16::from_be_bytes(header.frags);
        let src = Be32 { raw: u32::from_ne_bytes(header.src_addr) };
        let dst = Be32 { raw: u32::from_ne_bytes(header.dst_addr) };
        let id = Be16 { raw: u16::from_ne_bytes(header.id) };
        let headless = offset_and_flags & FRAGMENT_OFFSET != 0;
        let mut packet = Packet {
            ctx,
            ip,
            l4: ip + header_length,
            headless,
            heads_fragments: !headless && offset_and_flags & MORE_FRAGMENTS != 0,
            id,
            zone,
            transport: Transport::Untracked(Reason::Protocol),
            proto: header.proto,
            ttl: header.ttl,
            tuple: Tuple4 { src, dst, ..Tuple4::default() },
            seen: seen::ANY,
            opens: false,
            may_open: false,
        };
        if headless {
            packet.recall_ports();
        } else {
            packet.parse_transport(length - header_length)?;
        }
        Ok(packet)
    }

    /// What the fragments of its datagram share.
    #[inline(always)]
    fn fragment(&self) -> FragmentKey4 {
        let Self { zone, id, proto, tuple: Tuple4 { src, dst, .. }, .. } = *self;
        FragmentKey4 { zone, src, dst, id, proto, pad: 0 }
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

    #[inline(always)]
    fn parse_transport(&mut self, payload: usize) -> Result<(), Reason> {
        match self.proto {
            IPPROTO_TCP => {
                let tcp: TcpHdr = self.load_transport(payload)?;
                self.transport = Transport::Tcp;
                self.tuple.sport = Be16 { raw: u16::from_ne_bytes(tcp.source) };
                self.tuple.dport = Be16 { raw: u16::from_ne_bytes(tcp.dest) };
                self.opens = tcp.syn() != 0 && tcp.ack() == 0;
                if tcp.fin() != 0 {
                    self.seen |= seen::FIN;
                }
                if tcp.rst() != 0 {
                    self.seen |= seen::RST;
                }
                self.may_open = tcp.rst() == 0;
            }
            IPPROTO_UDP => {
                let udp: UdpHdr = self.load_transport(payload)?;
                self.transport = Transport::Udp;
                self.tuple.sport = Be16 { raw: u16::from_ne_bytes(udp.src) };
                self.tuple.dport = Be16 { raw: u16::from_ne_bytes(udp.dst) };
                self.may_open = true;
            }
            IPPROTO_ICMP => {
                let icmp: Icmpv4Hdr = self.load_transport(payload)?;
                let identifier = Be16 { raw: u16::from_ne_bytes([icmp.data[0], icmp.data[1]]) };
                match icmp.type_ {
                    ICMP_ECHO => self.tuple.sport = identifier,
                    ICMP_ECHO_REPLY => self.tuple.dport = identifier,
                    _ => return Ok(()),
                }
                self.transport = Transport::Query;
                self.may_open = icmp.type_ == ICMP_ECHO;
            }
            _ => return Ok(()),
        }
        if !self.opens {
            self.seen |= seen::DATA;
        }
        Ok(())
    }

    #[inline(always)]
    fn load_transport<T>(&self, payload: usize) -> Result<T, Reason> {
        if payload < size_of::<T>() {
            return Err(Reason::Malformed);
        }
        self.ctx.load(self.l4).map_err(|_| Reason::Malformed)
    }

    #[inline(always)]
    fn recall_ports(&mut self) {
        self.transport = match (maps::fragment(&self.fragment()), self.proto) {
            (None, _) => Transport::Untracked(Reason::Fragment),
            (Some(ports), proto) => {
                self.tuple.sport = ports.sport;
                self.tuple.dport = ports.dport;
                self.seen |= seen::DATA;
                match proto {
                    IPPROTO_TCP => Transport::Tcp,
                    IPPROTO_UDP => Transport::Udp,
                    _ => Transport::Query,
                }
            }
        };
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

    /// Whether it can belong to a flow.
    #[inline(always)]
    pub(crate) fn is_tracked(&self) -> bool {
        !matches!(self.transport, Transport::Untracked(_))
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
        let Tuple4 { src, dst, .. } = self.tuple;
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
        let from = self.tuple;
        self.rewrite_address(from.src, to.src, self.ip + IPV4_SOURCE)?;
        self.rewrite_address(from.dst, to.dst, self.ip + IPV4_DESTINATION)?;
        if !self.headless {
            match self.transport {
                Transport::Query => {
                    // A request has the identifier in sport, a reply in dport; the other is 0.
                    let old = Be16 { raw: from.sport.raw | from.dport.raw };
                    let new = Be16 { raw: to.sport.raw | to.dport.raw };
                    self.rewrite_port(old, new, self.l4 + ICMP_IDENTIFIER)?;
                }
                _ => {
                    self.rewrite_port(from.sport, to.sport, self.l4)?;
                    self.rewrite_port(from.dport, to.dport, self.l4 + 2)?;
                }
            }
        }
        self.tuple = *to;
        Ok(())
    }

    #[inline(always)]
    fn rewrite_address(&self, from: Be32, to: Be32, at: usize) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        let (old, new) = (u64::from(from.raw), u64::from(to.raw));
        // ICMPv4 checksums know nothing of addresses (RFC 792).
        if !self.headless && self.transport != Transport::Query {
            let flags = u64::from(BPF_F_PSEUDO_HDR) | self.checksum_flags() | 4;
            self.ctx
                .skb
                .l4_csum_replace(self.checksum(), old, new, flags)
                .map_err(|_| Reason::Rewrite)?;
        }
        self.ctx
            .skb
            .l3_csum_replace(self.ip + IPV4_CHECKSUM, old, new, 4)
            .map_err(|_| Reason::Rewrite)?;
        self.ctx.store(at, &to, 0).map_err(|_| Reason::Rewrite)
    }

    #[inline(always)]
    fn rewrite_port(&self, from: Be16, to: Be16, at: usize) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        let (old, new) = (u64::from(from.raw), u64::from(to.raw));
        self.ctx
            .skb
            .l4_csum_replace(self.checksum(), old, new, self.checksum_flags() | 2)
            .map_err(|_| Reason::Rewrite)?;
        self.ctx.store(at, &to, 0).map_err(|_| Reason::Rewrite)
    }

    /// Offset of the transport checksum.
    #[inline(always)]
    fn checksum(&self) -> usize {
        self.l4
            + match self.transport {
                Transport::Tcp => TCP_CHECKSUM,
                Transport::Udp => UDP_CHECKSUM,
                _ => ICMP_CHECKSUM,
            }
    }

    /// A UDP checksum of 0 means none (RFC 768): it stays 0, and a computed 0 becomes 0xffff.
    #[inline(always)]
    fn checksum_flags(&self) -> u64 {
        if self.transport == Transport::Udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 }
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
