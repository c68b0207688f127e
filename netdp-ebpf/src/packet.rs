//! A packet, parsed once.
//!
//! Reads go through `bpf_skb_load_bytes`, which also sees what lies in pages of a GSO packet.

use core::ops::Deref;

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SKIP_NEIGH, bpf_fib_lookup as FibLookup,
    },
    helpers::generated::{bpf_fib_lookup, bpf_skb_load_bytes},
    programs::{TcContext, sk_buff::SkBuff},
};
use netdp_common::{
    addr::{Be16, Be32, Tuple},
    checksum::Difference,
    counter::Reason,
    flow::{IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP, seen},
    fragment::{FragmentKey, Ports},
    interface::{Interface, flag as interface_flag},
};
use network_types::{
    eth::{EthHdr, EtherType},
    icmp::Icmpv4Hdr,
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::{
    family::Family,
    kernel, maps, stroke,
    verdict::{Decision, drop},
};

const EINVAL: i32 = -22;
/// What an error quotes at least of the transport header it is about (RFC 792).
const QUOTED_TRANSPORT: usize = 8;
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
    kind == kernel::PACKET_OTHERHOST || tag & VLAN_ID != 0
}

/// The first of the words in which whoever runs a program by hand may leave a number.
#[inline(always)]
pub(crate) fn control_word(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the whole run of the program.
    unsafe { (*skb).cb[0] }
}

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carried {
    Arp,
    Ipv4,
    Ipv6,
    Other,
}

impl Carried {
    /// What the kernel takes the packet for.
    #[inline(always)]
    pub(crate) fn by_protocol(ctx: &TcContext) -> Self {
        const ARP: u32 = EtherType::Arp as u32;
        const IPV4: u32 = EtherType::Ipv4 as u32;
        const IPV6: u32 = EtherType::Ipv6 as u32;
        let skb: *mut __sk_buff = ctx.skb.skb;
        // SAFETY: the context is valid for the whole run of the program.
        match unsafe { (*skb).protocol } {
            ARP => Self::Arp,
            IPV4 => Self::Ipv4,
            IPV6 => Self::Ipv6,
            _ => Self::Other,
        }
    }

    /// What a packet of an uplink carries, which may have no Ethernet header. The kernel knows of
    /// most; of the rest the IP header itself tells.
    #[inline(always)]
    pub(crate) fn by(ctx: &TcContext) -> Self {
        let said = Self::by_protocol(ctx);
        if said != Self::Other {
            return said;
        }
        let has_no_header = maps::interface(ifindex(ctx))
            .is_some_and(|interface| interface.flags & interface_flag::ETHERNET == 0);
        match ctx.load::<u8>(0).map(|first| first >> 4) {
            Ok(4) if has_no_header => Self::Ipv4,
            Ok(6) if has_no_header => Self::Ipv6,
            _ => Self::Other,
        }
    }
}

/// Where the IP header stands in a [`Start`]: aligned, with room for MAC addresses before it.
const START_IP: usize = 16;
/// IPv6's, and TCP's.
const LONGEST_HEADERS: usize = 60;

/// The first bytes of a packet: MAC addresses, where it has them, an IP header without options, and
/// as much of a transport as flows care for. Read at once: a call costs more than what it reads.
#[repr(C, align(8))]
struct Start([u8; START_IP + LONGEST_HEADERS]);

impl Start {
    /// Reads what there is of a packet with its IP header at offset `ip`. Behind the packet's end
    /// stands what was there before.
    #[inline(always)]
    fn load<F: Family>(&mut self, skb: *mut __sk_buff, ip: usize) -> bool {
        // The verifier wants to know where it writes.
        if ip == 0 { self.load_at::<F>(skb, 0) } else { self.load_at::<F>(skb, EthHdr::LEN) }
    }

    #[inline(always)]
    fn load_at<F: Family>(&mut self, skb: *mut __sk_buff, ip: usize) -> bool {
        let least = (ip + size_of::<F::Header>()) as u32;
        let length = kernel::length(skb);
        if length < least {
            return false;
        }
        let length = length.min(least + TcpHdr::LEN as u32);
        let to = self.0.as_mut_ptr().wrapping_add(START_IP - ip);
        // SAFETY: from `to` on there is room for the most that is read.
        unsafe { bpf_skb_load_bytes(skb.cast(), 0, to.cast(), length) == 0 }
    }

    /// A header, counted from the IP header on.
    #[inline(always)]
    fn header<T>(&self, offset: usize) -> &T {
        const { assert!(align_of::<T>() == 1 && size_of::<T>() <= 40) };
        let at = self.0.as_ptr().wrapping_add(START_IP + offset);
        // SAFETY: all that is asked for are IP headers and transports right behind them, which
        // lie in the bytes; any bytes are such a header.
        unsafe { &*at.cast::<T>() }
    }

    /// Reads a header from somewhere in the packet into the place of another.
    #[inline(always)]
    fn fetch<T>(&mut self, skb: &SkBuff, at: usize, offset: usize) -> Option<&T> {
        let to = self.0.as_mut_ptr().wrapping_add(START_IP + offset);
        let (at, length) = (at as u32, size_of::<T>() as u32);
        // SAFETY: as in `header`, there is room for it.
        let outcome = unsafe { bpf_skb_load_bytes(skb.skb.cast(), at, to.cast(), length) };
        if outcome == 0 { Some(self.header(offset)) } else { None }
    }

    /// A transport's header, which must lie within the payload of what carries it.
    #[inline(always)]
    fn transport<F: Family, T>(
        &mut self,
        skb: &SkBuff,
        ip: usize,
        at: usize,
        payload: usize,
    ) -> Option<&T> {
        let behind = size_of::<F::Header>();
        if payload < size_of::<T>() {
            None
        } else if at == ip + behind {
            Some(self.header(behind))
        } else {
            self.fetch(skb, at, behind)
        }
    }

    #[inline(always)]
    fn frame(&self) -> Frame {
        let at = self.0.as_ptr().wrapping_add(START_IP - EthHdr::LEN);
        // SAFETY: it lies in the bytes; any bytes are MAC addresses.
        unsafe { at.cast::<Frame>().read() }
    }
}

/// Offset of the IP header in what an interface sends and receives.
#[inline(always)]
pub(crate) fn ip_offset(interface: &Interface) -> usize {
    if interface.flags & interface_flag::ETHERNET == 0 { 0 } else { EthHdr::LEN }
}

/// The MAC addresses of a frame.
#[repr(C)]
pub(crate) struct Frame {
    pub(crate) destination: [u8; 6],
    pub(crate) source: [u8; 6],
}

impl Frame {
    /// Errors: the frame is too short.
    #[inline(always)]
    pub(crate) fn parse(ctx: &TcContext) -> Result<Self, Reason> {
        ctx.load(0).map_err(|_| Reason::Malformed)
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

/// What the headers before the transport say.
pub(crate) struct Datagram<A> {
    pub(crate) src: A,
    pub(crate) dst: A,
    /// Protocol of the transport.
    pub(crate) proto: u8,
    pub(crate) ttl: u8,
    /// A later fragment: no transport header in it.
    pub(crate) headless: bool,
    /// The first of several fragments.
    pub(crate) heads_fragments: bool,
    /// Identification, as in [`FragmentKey::id`].
    pub(crate) id: Be32,
    /// As in [`FragmentKey::proto`].
    pub(crate) fragment_proto: u8,
    /// Offset of the transport header.
    pub(crate) l4: usize,
    /// Offset of the packet's end, as the header has it.
    pub(crate) end: usize,
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
    /// SCTP: its checksum covers the whole packet, so its ports stay as they are.
    Sctp,
    /// No ports: known by its addresses.
    Addresses,
    /// Not tracked; the reason for which it is dropped where only flows may pass.
    Untracked(Reason),
}

/// What the headers of a packet say. It lies in a map ([`crate::maps::Maps::headers`]): the stack
/// is too small.
pub(crate) struct Headers<F: Family> {
    start: Start,
    /// Offset of the IP header: 14, or 0 on interfaces without Ethernet.
    ip: u32,
    /// The packet itself.
    pub(crate) outer: Datagram<F::Address>,
    /// The packet that an ICMP error quotes.
    quoted: Datagram<F::Address>,
    /// See [`FragmentKey`].
    fragment: FragmentKey<F::Address>,
    pub(crate) transport: Transport,
    /// IP protocol; of an ICMP error, that of the quoted packet.
    pub(crate) proto: u8,
    pub(crate) ttl: u8,
    /// Type of an ICMP message.
    pub(crate) icmp_type: u8,
    /// What this packet shows of its flow: bits of [`seen`]; an error shows nothing.
    pub(crate) seen: u8,
    /// A TCP SYN without ACK.
    pub(crate) opens: bool,
    /// Whether a flow may begin with it. Not with a reset, an echo reply or a later fragment; with
    /// any other TCP packet, so that a connection survives the loss of its flow.
    pub(crate) may_open: bool,
    /// TCP: sequence number, host byte order.
    pub(crate) sequence: u32,
    /// TCP: acknowledgement number, host byte order; valid with [`seen::ACK`].
    pub(crate) acknowledged: u32,
    /// Source address of the packet itself.
    pub(crate) source: F::Address,
    /// Destination address of the packet itself.
    pub(crate) destination: F::Address,
    /// What the flow table knows the packet by: its own addresses and ports, ports being 0 where
    /// the transport has none. An error counts as an answer to the packet it is about.
    pub(crate) tuple: Tuple<F::Address>,
}

/// An IP packet.
pub(crate) struct Packet<'a, F: Family> {
    ctx: &'a TcContext,
    headers: &'static Headers<F>,
}

impl<F: Family> Deref for Packet<'_, F> {
    type Target = Headers<F>;

    #[inline(always)]
    fn deref(&self) -> &Headers<F> {
        self.headers
    }
}

impl<'a, F: Family> Packet<'a, F> {
    /// Parses the packet at offset `ip` that arrived in `zone`.
    ///
    /// Errors: headers that contradict themselves or end too early (RFC 1122, 3.2.1).
    #[inline(always)]
    pub(crate) fn parse(ctx: &'a TcContext, ip: usize, zone: u32) -> Result<Self, Reason> {
        if F::parse_headers(ctx.skb.skb, ip as u32, zone) == 0 {
            return Err(Reason::Malformed);
        }
        match F::headers() {
            Some(headers) => Ok(Packet { ctx, headers }),
            None => Err(Reason::NotReady),
        }
    }

    /// The packet that was parsed before, in another function.
    #[inline(always)]
    pub(crate) fn parsed(ctx: &'a TcContext) -> Option<Self> {
        Some(Packet { ctx, headers: F::headers()? })
    }

    /// Remembers the ports of the first fragment, since later ones have none. To be called when
    /// the sender is known to be who it says.
    #[inline(always)]
    pub(crate) fn remember_ports(&self) {
        if self.outer.heads_fragments && self.is_tracked() {
            let Tuple { sport, dport, .. } = self.tuple;
            F::remember_fragment(
                &self.fragment,
                &Ports { sport, dport, proto: self.proto, pad: [0; 3] },
            );
        }
    }

    /// The context.
    #[inline(always)]
    pub(crate) fn context(&self) -> &TcContext {
        self.ctx
    }

    /// The same, for helpers that want it raw.
    #[inline(always)]
    pub(crate) fn skb(&self) -> *mut __sk_buff {
        self.ctx.skb.skb
    }

    /// The headers, for sub-programs.
    #[inline(always)]
    pub(crate) fn headers(&self) -> &Headers<F> {
        self.headers
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

    /// How the stack would send it on, had it come in at `ifindex`; `None` where it would not
    /// forward it.
    #[inline(always)]
    pub(crate) fn route(&self, ifindex: u32) -> Option<Route> {
        match route(self.ctx.skb.skb, ifindex, self.headers) {
            0 => None,
            found => Some(Route { ifindex: found as u32, mtu: (found >> 32) as u32 }),
        }
    }

    /// Whether it came over Ethernet, and there is nothing in its IP header that a router would
    /// have to look at besides addresses and time to live.
    #[inline(always)]
    pub(crate) fn is_plain_frame(&self) -> bool {
        self.ip as usize == EthHdr::LEN && self.outer.l4 == EthHdr::LEN + size_of::<F::Header>()
    }

    /// Whether it, or each packet that it will be cut into, has no more than `mtu` bytes.
    #[inline(always)]
    pub(crate) fn fits(&self, mtu: u32) -> bool {
        self.headers.bytes(self.ctx.skb.skb) <= mtu
    }

    /// Rewrites addresses and ports, and all checksums with them, as the half says that it follows, which
    /// lies in [`crate::maps::Maps::half`]; of its hops it loses so many, fewer than it has.
    ///
    /// Of a program that has this in it, the kernel unshares every packet before it runs: so it is for
    /// those that translate most of what they see.
    ///
    /// Errors: the kernel refused a write (no memory to unshare the packet).
    #[inline(always)]
    pub(crate) fn rewrite(&self, lost: u8) -> Result<(), Reason> {
        match if self.is_simple() { F::stroke(self.skb(), lost.into()) } else { stroke::LEFT } {
            stroke::LEFT => self.rewrite_by_parts(lost),
            stroke::DONE => Ok(()),
            _ => Err(Reason::Rewrite),
        }
    }

    /// Whether it is plain as far as its headers tell, see [`stroke`].
    #[inline(always)]
    fn is_simple(&self) -> bool {
        matches!(self.transport, Transport::Tcp | Transport::Udp)
            && !self.outer.headless
            && self.is_plain_frame()
    }

    /// The same by helpers alone, which unshare what they write to.
    #[inline(always)]
    pub(crate) fn rewrite_by_parts(&self, lost: u8) -> Result<(), Reason> {
        let (Some(rewrite), Some(half)) = (F::rewrite(), F::half()) else {
            return Err(Reason::NotReady);
        };
        rewrite.from = self.tuple;
        rewrite.to = half.to;
        rewrite.ip = self.ip;
        rewrite.l4 = self.outer.l4 as u32;
        rewrite.proto = self.proto.into();
        rewrite.headless = self.outer.headless.into();
        rewrite.is_error = u32::from(self.transport == Transport::Error);
        rewrite.source = self.source;
        rewrite.quoted_l4 = self.quoted.l4 as u32;
        rewrite.end = self.outer.end as u32;
        if F::apply(self.ctx.skb.skb) == 0 {
            return Err(Reason::Rewrite);
        }
        if lost == 0 { Ok(()) } else { self.set_life(self.ttl.wrapping_sub(lost)) }
    }

    /// Makes this hop the packet's last, so that nobody forwards it.
    ///
    /// Errors: the kernel refused a write.
    #[inline(always)]
    pub(crate) fn end_life(&self) -> Result<(), Reason> {
        const LAST: u8 = 1;
        if self.ttl <= LAST { Ok(()) } else { self.set_life(LAST) }
    }

    /// Sets its time to live.
    ///
    /// Errors: the kernel refused a write.
    #[inline(always)]
    fn set_life(&self, ttl: u8) -> Result<(), Reason> {
        let is_set = set_life(self.ctx.skb.skb, self.headers, ttl.into());
        if is_set { Ok(()) } else { Err(Reason::Rewrite) }
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

impl<F: Family> Headers<F> {
    #[inline(always)]
    fn parse(&mut self, skb: &SkBuff, ip: usize, zone: u32) {
        self.ip = ip as u32;
        self.transport = Transport::Untracked(Reason::Malformed);
        self.seen = seen::ANY;
        self.opens = false;
        self.may_open = false;
        self.icmp_type = 0;
        if !self.start.load::<F>(skb.skb, ip) {
            return;
        }
        if F::parse(skb, self.start.header(0), ip, &mut self.outer).is_none() {
            return;
        }
        let (l4, end) = (self.outer.l4, self.outer.end);
        if l4 > end || end > skb.len() as usize {
            return;
        }
        self.fragment.zone = zone;
        self.fragment.src = self.outer.src;
        self.fragment.dst = self.outer.dst;
        self.fragment.id = self.outer.id;
        self.fragment.proto = self.outer.fragment_proto;
        self.fragment.pad = [0; 3];
        self.proto = self.outer.proto;
        self.ttl = self.outer.ttl;
        self.source = self.outer.src;
        self.destination = self.outer.dst;
        self.tuple.src = self.outer.src;
        self.tuple.dst = self.outer.dst;
        self.tuple.sport = Be16::default();
        self.tuple.dport = Be16::default();
        self.transport = if self.outer.headless {
            self.recall_ports()
        } else {
            self.parse_transport(skb, l4, end - l4)
        };
    }

    #[inline(always)]
    fn parse_transport(&mut self, skb: &SkBuff, l4: usize, payload: usize) -> Transport {
        const MALFORMED: Transport = Transport::Untracked(Reason::Malformed);
        const UNTRACKED: Transport = Transport::Untracked(Reason::Protocol);
        let (proto, ip) = (self.proto, self.ip as usize);
        if proto == IPPROTO_TCP {
            let Some(tcp) = self.start.transport::<F, TcpHdr>(skb, ip, l4, payload) else {
                return MALFORMED;
            };
            self.tuple.sport = Be16 { raw: u16::from_ne_bytes(tcp.source) };
            self.tuple.dport = Be16 { raw: u16::from_ne_bytes(tcp.dest) };
            self.sequence = u32::from_be_bytes(tcp.seq);
            self.acknowledged = u32::from_be_bytes(tcp.ack_seq);
            self.opens = tcp.syn() != 0 && tcp.ack() == 0;
            self.may_open = tcp.rst() == 0;
            let bit = |is_set: u16, bit| if is_set != 0 { bit } else { 0 };
            self.seen |= bit(tcp.ack(), seen::ACK)
                | bit(tcp.fin(), seen::FIN)
                | bit(tcp.rst(), seen::RST)
                | if self.opens { 0 } else { seen::DATA };
            Transport::Tcp
        } else if proto == IPPROTO_UDP {
            let Some(udp) = self.start.transport::<F, UdpHdr>(skb, ip, l4, payload) else {
                return MALFORMED;
            };
            self.tuple.sport = Be16 { raw: u16::from_ne_bytes(udp.src) };
            self.tuple.dport = Be16 { raw: u16::from_ne_bytes(udp.dst) };
            self.seen |= seen::DATA;
            self.may_open = true;
            Transport::Udp
        } else if proto == F::ICMP {
            let Some(icmp) = self.start.transport::<F, Icmpv4Hdr>(skb, ip, l4, payload) else {
                return MALFORMED;
            };
            let kind = icmp.type_;
            let identifier = Be16 { raw: u16::from_ne_bytes([icmp.data[0], icmp.data[1]]) };
            self.icmp_type = kind;
            if kind == F::ECHO {
                self.tuple.sport = identifier;
            } else if kind == F::ECHO_REPLY {
                self.tuple.dport = identifier;
            } else if F::is_error(kind) && self.parse_quoted(skb, l4).is_some() {
                return Transport::Error;
            } else {
                return UNTRACKED;
            }
            self.seen |= seen::DATA;
            self.may_open = kind == F::ECHO;
            Transport::Query
        } else if proto == IPPROTO_SCTP {
            let Some(&[a, b, c, d]) = self.start.transport::<F, [u8; 4]>(skb, ip, l4, payload)
            else {
                return MALFORMED;
            };
            self.tuple.sport = Be16 { raw: u16::from_ne_bytes([a, b]) };
            self.tuple.dport = Be16 { raw: u16::from_ne_bytes([c, d]) };
            self.seen |= seen::DATA;
            self.may_open = true;
            Transport::Sctp
        } else if F::is_translatable(proto) {
            self.seen |= seen::DATA;
            self.may_open = true;
            Transport::Addresses
        } else {
            UNTRACKED
        }
    }

    /// Recognises the packet that an error is about. `None` where it can't be, for it is a later
    /// fragment or cut short.
    #[inline(always)]
    fn parse_quoted(&mut self, skb: &SkBuff, l4: usize) -> Option<()> {
        let ip = l4 + Icmpv4Hdr::LEN;
        let end = self.outer.end;
        F::parse(skb, self.start.fetch(skb, ip, 0)?, ip, &mut self.quoted)?;
        let (l4, proto) = (self.quoted.l4, self.quoted.proto);
        if l4 + QUOTED_TRANSPORT > end || self.quoted.headless || self.outer.heads_fragments {
            return None;
        }
        let start: [u8; QUOTED_TRANSPORT] = skb.load(l4).ok()?;
        let first = Be16 { raw: u16::from_ne_bytes([start[0], start[1]]) };
        let second = Be16 { raw: u16::from_ne_bytes([start[2], start[3]]) };
        let identifier = Be16 { raw: u16::from_ne_bytes([start[4], start[5]]) };
        let none = Be16::default();
        let (sport, dport) = if matches!(proto, IPPROTO_TCP | IPPROTO_UDP | IPPROTO_SCTP) {
            (first, second)
        } else if proto == F::ICMP && start[0] == F::ECHO {
            (identifier, none)
        } else if proto == F::ICMP && start[0] == F::ECHO_REPLY {
            (none, identifier)
        } else if proto != F::ICMP && F::is_translatable(proto) {
            (none, none)
        } else {
            return None;
        };
        // An error goes to where the packet came from (RFC 1122, 3.2.2; RFC 4443, 2.2).
        if self.quoted.src != self.destination {
            return None;
        }
        self.tuple.src = self.quoted.dst;
        self.tuple.dst = self.quoted.src;
        self.tuple.sport = dport;
        self.tuple.dport = sport;
        self.proto = proto;
        self.seen = 0;
        Some(())
    }

    #[inline(always)]
    fn recall_ports(&mut self) -> Transport {
        let Some(ports) = F::fragment(&self.fragment) else {
            return Transport::Untracked(Reason::Fragment);
        };
        self.tuple.sport = ports.sport;
        self.tuple.dport = ports.dport;
        self.proto = ports.proto;
        self.seen |= seen::DATA;
        match ports.proto {
            IPPROTO_TCP => Transport::Tcp,
            IPPROTO_UDP => Transport::Udp,
            IPPROTO_SCTP => Transport::Sctp,
            proto if proto == F::ICMP => Transport::Query,
            _ => Transport::Addresses,
        }
    }

    /// The MAC addresses; Ethernet only.
    #[inline(always)]
    pub(crate) fn frame(&self) -> Frame {
        self.start.frame()
    }

    /// A word of the packet as it was parsed, counted from its IP header on, which has no options;
    /// of those that [`Start`] has.
    #[inline(always)]
    pub(crate) fn word(&self, word: usize) -> u32 {
        u32::from_ne_bytes(*self.start.header(word * 4))
    }

    /// Bytes of the packet, or of each that it will be cut into, IP header included.
    #[inline(always)]
    fn bytes(&self, skb: *mut __sk_buff) -> u32 {
        let segment = kernel::segment_size(skb);
        if segment == 0 {
            return self.outer.end as u32 - self.ip;
        }
        let transport = match self.transport {
            Transport::Tcp => self.tcp_header_bytes(),
            Transport::Udp => UdpHdr::LEN as u32,
            // Nobody else's packets are cut by their payload alone.
            _ => return u32::MAX,
        };
        self.outer.l4 as u32 - self.ip + transport + segment
    }

    /// Bytes of the TCP header that stands right behind the IP header.
    #[inline(always)]
    fn tcp_header_bytes(&self) -> u32 {
        let tcp: &TcpHdr = self.start.header(size_of::<F::Header>());
        u32::from(tcp.doff()) * 4
    }

    /// Whether it can belong to a flow.
    #[inline(always)]
    pub(crate) fn is_tracked(&self) -> bool {
        !matches!(self.transport, Transport::Untracked(_))
    }
}

/// Parses into [`crate::maps::Maps::headers`] and returns 1; 0 where the headers contradict
/// themselves or end too early.
#[inline(always)]
pub(crate) fn parse<F: Family>(skb: *mut __sk_buff, ip: u32, zone: u32) -> u32 {
    let Some(headers) = F::headers() else { return 0 };
    headers.parse(&SkBuff::new(skb), ip as usize, zone);
    u32::from(headers.transport != Transport::Untracked(Reason::Malformed))
}

/// A way out of the host.
#[derive(Clone, Copy)]
pub(crate) struct Route {
    pub(crate) ifindex: u32,
    /// What it carries at least, in bytes without the Ethernet header: its MTU where the kernel tells
    /// it (Linux 5.12), else what the packet has that it was asked about, if it carries that.
    pub(crate) mtu: u32,
}

/// A sub-program of its own, for its stack; the MTU in the upper half, the ifindex in the lower. 0
/// stands for none.
#[inline(never)]
fn route<F: Family>(skb: *mut __sk_buff, ifindex: u32, headers: &Headers<F>) -> u64 {
    // SAFETY: plain integers and unions of them; zero is a value of each.
    let mut lookup: FibLookup = unsafe { core::mem::zeroed() };
    lookup.family = F::ADDRESS_FAMILY;
    lookup.l4_protocol = headers.proto;
    lookup.ifindex = ifindex;
    // Named a length, the kernel compares it with the MTU, and names that. The second time, for the
    // exit of what is too large, any will do.
    let bytes = headers.bytes(skb).min(u16::MAX.into()) as u16;
    lookup.__bindgen_anon_1.tot_len = bytes;
    let addresses = Tuple { src: headers.source, dst: headers.destination, ..headers.tuple };
    F::set_route(&mut lookup, &addresses);
    let mut flags = BPF_FIB_LOOKUP_SKIP_NEIGH;
    let mut outcome = look_up(skb, &mut lookup, flags);
    if outcome == EINVAL {
        // Before Linux 6.3 it looks for the next hop's MAC address, which is not needed here.
        flags = 0;
        outcome = look_up(skb, &mut lookup, flags);
    }
    if outcome as u32 == BPF_FIB_LKUP_RET_FRAG_NEEDED {
        lookup.__bindgen_anon_1.tot_len = 1;
        outcome = look_up(skb, &mut lookup, flags);
    }
    match outcome as u32 {
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH => {
            // SAFETY: both are the same two bytes.
            let mtu = unsafe { lookup.__bindgen_anon_1.mtu_result };
            u64::from(mtu) << 32 | u64::from(lookup.ifindex)
        }
        _ => 0,
    }
}

#[inline(always)]
fn look_up(skb: *mut __sk_buff, lookup: &mut FibLookup, flags: u32) -> i32 {
    let size = size_of::<FibLookup>() as i32;
    // SAFETY: context and parameters are valid; the size is that of the structure.
    unsafe { bpf_fib_lookup(skb.cast(), lookup, size, flags) as i32 }
}

/// See [`Packet::set_life`]. A sub-program of its own, for the stacks of its callers; `false` where
/// the kernel refused.
#[inline(never)]
fn set_life<F: Family>(skb: *mut __sk_buff, headers: &Headers<F>, ttl: u32) -> bool {
    let ttl = ttl as u8;
    // What checksums see: the byte beside it stays.
    let half = |ttl: u8| {
        let bytes = if F::TTL.is_multiple_of(2) { [ttl, 0] } else { [0, ttl] };
        u32::from(u16::from_ne_bytes(bytes))
    };
    let difference = Difference::of(half(headers.ttl), half(ttl));
    let packet = SkBuff::new(skb);
    if let Some(offset) = F::HEADER_CHECKSUM {
        let at = (headers.ip + offset) as usize;
        if packet.l3_csum_replace(at, 0, difference.get().into(), 0).is_err() {
            return false;
        }
    } else {
        kernel::account(skb, difference);
    }
    packet.store((headers.ip + F::TTL) as usize, &ttl, 0).is_ok()
}
