//! A datagram as a test thinks of it, and the frames that it makes on the wire.
//!
//! What a program should have made of a packet is the frame of the wanted datagram, built from
//! nothing: byte for byte, so whatever is not to be rewritten must be as it was.

use std::net::{IpAddr, SocketAddrV4};

use anyhow::{Context, Result, bail, ensure};
use etherparse::{
    EtherType, IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, IpFragOffset,
    IpNumber, Ipv4Header, TcpHeader, UdpHeader, ip_number,
};
use netdp_tests::packet::{ETHERNET_BYTES, verify_checksums};

use crate::family::{Family, ipv6};

/// Router alert, which every fragment carries, and padding (RFC 791, 3.1; RFC 2113).
const OPTIONS: [u8; 8] = [148, 4, 0, 0, 1, 1, 1, 0];
/// The same as a hop-by-hop header, which every fragment carries, behind its next header (RFC
/// 8200, 4.3; RFC 2711).
const HOP_BY_HOP: [u8; 7] = [0, 5, 2, 0, 0, 1, 0];
/// Destination options that are padding, behind their next header; only the first fragment has
/// them (RFC 8200, 4.5 and 4.6).
const DESTINATION_OPTIONS: [u8; 7] = [0, 1, 4, 0, 0, 0, 0];
/// Bytes of an IPv6 header, and of a fragment header.
const IPV6_BYTES: usize = 40;
const FRAGMENT_BYTES: usize = 8;
/// Sequence number that both ends of a connection begin with, and acknowledge.
pub(crate) const SEQUENCE: u32 = 0x0102_0304;
/// Payload bytes of the first, second and last fragment end here. A TCP header fits in the first.
const CUTS: [usize; 2] = [32, 56];

/// Both ends of a packet. ICMP: the identifier stands where the asking side's port would, the
/// other port is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wire {
    /// Hardware address it comes from.
    pub(crate) source_mac: [u8; 6],
    /// Hardware address it goes to.
    pub(crate) destination_mac: [u8; 6],
    /// Address and port it comes from.
    pub(crate) source: SocketAddrV4,
    /// Address and port it goes to.
    pub(crate) destination: SocketAddrV4,
}

impl Wire {
    /// The same packet one link further.
    pub(crate) fn on_link(self, source_mac: [u8; 6], destination_mac: [u8; 6]) -> Self {
        Self { source_mac, destination_mac, ..self }
    }

    /// The same with another source.
    pub(crate) fn from(self, source: SocketAddrV4) -> Self {
        Self { source, ..self }
    }

    /// The same with another destination.
    pub(crate) fn to(self, destination: SocketAddrV4) -> Self {
        Self { destination, ..self }
    }

    /// The answer, sent to where the packet came from.
    pub(crate) fn answer(self) -> Self {
        Self {
            source_mac: self.destination_mac,
            destination_mac: self.source_mac,
            source: self.destination,
            destination: self.source,
        }
    }
}

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// TCP SYN.
    Syn,
    /// TCP SYN and ACK.
    SynAck,
    /// TCP ACK with data.
    Segment,
    /// TCP FIN and ACK.
    Fin,
    /// TCP RST.
    Reset,
    /// UDP.
    Udp,
    /// UDP without a checksum.
    BareUdp,
    /// SCTP: its checksum covers no address, and its ports stay (RFC 9260, 3.1).
    Sctp,
    /// A protocol without ports: GRE.
    Gre,
    /// ICMP echo request.
    Request,
    /// ICMP echo reply.
    Reply,
    /// ICMP that is neither echo nor error.
    OtherIcmp,
    /// ICMP of the other family: a protocol without ports in this one.
    StrayIcmp,
}

impl Kind {
    /// A source port that translation keeps, made of a number below the host's ephemeral ports; for
    /// a ping an identifier, of which it keeps those of the range that it chooses from.
    pub(crate) const fn kept(self, number: u16) -> u16 {
        match self {
            Self::Request | Self::Reply => 50_000 + number,
            _ => number,
        }
    }

    /// IP protocol number.
    pub(crate) fn protocol(self, family: Family) -> IpNumber {
        match (self, family) {
            (Self::Udp | Self::BareUdp, _) => ip_number::UDP,
            (Self::Sctp, _) => ip_number::SCTP,
            (Self::Gre, _) => ip_number::GRE,
            (Self::Request | Self::Reply | Self::OtherIcmp, Family::V4) => ip_number::ICMP,
            (Self::Request | Self::Reply | Self::OtherIcmp, Family::V6) => ip_number::IPV6_ICMP,
            (Self::StrayIcmp, Family::V4) => ip_number::IPV6_ICMP,
            (Self::StrayIcmp, Family::V6) => ip_number::ICMP,
            _ => ip_number::TCP,
        }
    }

    /// Whether the family knows it: without its checksum nothing would protect the addresses of
    /// an IPv6 packet (RFC 8200, 8.1).
    pub(crate) fn is_of(self, family: Family) -> bool {
        self != Self::BareUdp || family == Family::V4
    }
}

/// How a datagram comes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// With IP options; IPv6: hop-by-hop and destination options.
    pub(crate) options: bool,
    /// In three fragments, in order.
    pub(crate) cut: bool,
}

impl Shape {
    /// One packet, no options.
    pub(crate) const PLAIN: Self = Self { options: false, cut: false };
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [
        Self::PLAIN,
        Self { options: true, cut: false },
        Self { options: false, cut: true },
        Self { options: true, cut: true },
    ];
}

/// A whole datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Datagram {
    /// Its ends.
    pub(crate) wire: Wire,
    /// What it carries.
    pub(crate) kind: Kind,
    /// How it comes along.
    pub(crate) shape: Shape,
    /// Time to live.
    pub(crate) ttl: u8,
    /// IP identification.
    pub(crate) identification: u16,
    /// TCP sequence number.
    pub(crate) sequence: u32,
    /// What follows the transport header.
    pub(crate) payload: Vec<u8>,
}

impl Datagram {
    /// A datagram in one packet.
    pub(crate) fn new(kind: Kind, wire: Wire) -> Self {
        Self {
            wire,
            kind,
            shape: Shape::PLAIN,
            ttl: 64,
            identification: 0x1234,
            sequence: SEQUENCE,
            payload: (0..75).collect(),
        }
    }

    /// The same datagram between other ends.
    pub(crate) fn with_wire(&self, wire: Wire) -> Self {
        Self { wire, ..self.clone() }
    }

    /// The same datagram in another shape.
    pub(crate) fn shaped(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }

    /// The same datagram with another time to live.
    pub(crate) fn with_ttl(self, ttl: u8) -> Self {
        Self { ttl, ..self }
    }

    /// The frames that carry it.
    pub(crate) fn frames(&self, family: Family) -> Vec<Vec<u8>> {
        let mut body = self.body(family);
        if family == Family::V6 && self.shape.options {
            let next = self.kind.protocol(family).0;
            body = [&[next][..], &DESTINATION_OPTIONS, &body].concat();
        }
        let mut starts = vec![0];
        if self.shape.cut {
            starts.extend(CUTS);
        }
        let ends = starts.iter().skip(1).copied().chain([body.len()]);
        starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| {
                let more = end < body.len();
                let (kind, header) = match family {
                    Family::V4 => (EtherType::IPV4, self.ipv4_header(start, end - start, more)),
                    Family::V6 => (EtherType::IPV6, self.ipv6_headers(start, end - start, more)),
                };
                let Wire { source_mac, destination_mac, .. } = self.wire;
                let kind = kind.0.to_be_bytes();
                [&destination_mac[..], &source_mac, &kind, &header, &body[start..end]].concat()
            })
            .collect()
    }

    /// The only frame.
    pub(crate) fn frame(&self, family: Family) -> Vec<u8> {
        self.frames(family).remove(0)
    }

    fn ipv4_header(&self, offset: usize, payload: usize, more: bool) -> Vec<u8> {
        let mut header = Ipv4Header::new(
            payload as u16,
            self.ttl,
            self.kind.protocol(Family::V4),
            self.wire.source.ip().octets(),
            self.wire.destination.ip().octets(),
        )
        .expect("a small payload is in range");
        header.identification = self.identification;
        if self.shape.options {
            header.options = OPTIONS.into();
            header.set_payload_len(payload).expect("a small payload is in range");
        }
        header.dont_fragment = !self.shape.cut;
        header.more_fragments = more;
        header.fragment_offset =
            IpFragOffset::try_new((offset / 8) as u16).expect("a small offset is in range");
        header.header_checksum = header.calc_header_checksum();
        header.to_bytes().to_vec()
    }

    /// The IPv6 header and the extension headers that every fragment has.
    fn ipv6_headers(&self, offset: usize, payload: usize, more: bool) -> Vec<u8> {
        // Written from the last one on, since each names the one behind it.
        let mut next = self.kind.protocol(Family::V6);
        if self.shape.options {
            next = ip_number::IPV6_DEST_OPTIONS;
        }
        let mut extensions = Vec::new();
        if self.shape.cut {
            let [high, low] = (offset as u16 | u16::from(more)).to_be_bytes();
            let [a, b] = self.identification.to_be_bytes();
            extensions = vec![next.0, 0, high, low, 0xa5, 0x5a, a, b];
            next = ip_number::IPV6_FRAGMENTATION_HEADER;
        }
        if self.shape.options {
            extensions = [&[next.0][..], &HOP_BY_HOP, &extensions].concat();
            next = ip_number::IPV6_HEADER_HOP_BY_HOP;
        }
        let length = ((extensions.len() + payload) as u16).to_be_bytes();
        // Traffic class 0x38 and a flow label, which are nobody's to change. The first byte is odd:
        // a run on a device without Ethernet takes it for that of a MAC, and a packet to one
        // station for another host's.
        let mut header = vec![0x63, 0x81, 0x23, 0x45, length[0], length[1], next.0, self.ttl];
        for party in [self.wire.source, self.wire.destination] {
            header.extend_from_slice(&ipv6(*party.ip()).octets());
        }
        [header, extensions].concat()
    }

    /// Transport header and payload of the whole datagram.
    fn body(&self, family: Family) -> Vec<u8> {
        let (source, destination) = (self.wire.source, self.wire.destination);
        let request = IcmpEchoHeader { id: source.port(), seq: 1 };
        let reply = IcmpEchoHeader { id: destination.port(), seq: 1 };
        let header = match (self.kind, family) {
            (Kind::Udp | Kind::BareUdp, _) => self.udp_header(family),
            (Kind::Sctp, _) => self.sctp_header(),
            // Nothing optional, IPv4 inside (RFC 2784, 2).
            (Kind::Gre, _) => vec![0, 0, 8, 0],
            // What would be an echo request with an identifier.
            (Kind::StrayIcmp, Family::V4) => vec![128, 0, 1, 2, 3, 4, 5, 6],
            (Kind::StrayIcmp, Family::V6) => vec![8, 0, 1, 2, 3, 4, 5, 6],
            (Kind::Request, Family::V4) => self.icmpv4_header(Icmpv4Type::EchoRequest(request)),
            (Kind::Request, Family::V6) => self.icmpv6_header(Icmpv6Type::EchoRequest(request)),
            (Kind::Reply, Family::V4) => self.icmpv4_header(Icmpv4Type::EchoReply(reply)),
            (Kind::Reply, Family::V6) => self.icmpv6_header(Icmpv6Type::EchoReply(reply)),
            // A timestamp request (RFC 792), a node information query (RFC 4620).
            (Kind::OtherIcmp, Family::V4) => self.icmpv4_header(Icmpv4Type::Unknown {
                type_u8: 13,
                code_u8: 0,
                bytes5to8: [0, 9, 0, 1],
            }),
            (Kind::OtherIcmp, Family::V6) => self.icmpv6_header(Icmpv6Type::Unknown {
                type_u8: 139,
                code_u8: 0,
                bytes5to8: [0, 9, 0, 1],
            }),
            _ => self.tcp_header(family),
        };
        [header, self.payload.clone()].concat()
    }

    fn ends(&self, family: Family) -> (IpAddr, IpAddr) {
        let Wire { source, destination, .. } = self.wire;
        (family.address(*source.ip()), family.address(*destination.ip()))
    }

    fn udp_header(&self, family: Family) -> Vec<u8> {
        let mut udp = UdpHeader {
            source_port: self.wire.source.port(),
            destination_port: self.wire.destination.port(),
            length: (UdpHeader::LEN + self.payload.len()) as u16,
            checksum: 0,
        };
        if self.kind == Kind::Udp {
            udp.checksum = match self.ends(family) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    udp.calc_checksum_ipv4_raw(from.octets(), to.octets(), &self.payload)
                }
                (from, to) => udp.calc_checksum_ipv6_raw(octets(from), octets(to), &self.payload),
            }
            .expect("a small payload is in range");
        }
        udp.to_bytes().to_vec()
    }

    /// Ports, verification tag, checksum. Nobody else's programs look at the latter two.
    fn sctp_header(&self) -> Vec<u8> {
        let (source, destination) = (self.wire.source.port(), self.wire.destination.port());
        let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        [&ports[..], &[0xa1, 0xa2, 0xa3, 0xa4, 0xc1, 0xc2, 0xc3, 0xc4]].concat()
    }

    fn tcp_header(&self, family: Family) -> Vec<u8> {
        let (source, destination) = (self.wire.source, self.wire.destination);
        let mut tcp = TcpHeader::new(source.port(), destination.port(), self.sequence, 64_240);
        // What the other end has sent when it begins at the same number.
        tcp.acknowledgment_number = SEQUENCE;
        tcp.syn = matches!(self.kind, Kind::Syn | Kind::SynAck);
        tcp.ack = matches!(self.kind, Kind::SynAck | Kind::Segment | Kind::Fin);
        tcp.psh = self.kind == Kind::Segment;
        tcp.fin = self.kind == Kind::Fin;
        tcp.rst = self.kind == Kind::Reset;
        tcp.checksum = match self.ends(family) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                tcp.calc_checksum_ipv4_raw(from.octets(), to.octets(), &self.payload)
            }
            (from, to) => tcp.calc_checksum_ipv6_raw(octets(from), octets(to), &self.payload),
        }
        .expect("a small payload is in range");
        tcp.to_bytes().to_vec()
    }

    fn icmpv4_header(&self, kind: Icmpv4Type) -> Vec<u8> {
        Icmpv4Header::with_checksum(kind, &self.payload).to_bytes().to_vec()
    }

    fn icmpv6_header(&self, kind: Icmpv6Type) -> Vec<u8> {
        let (from, to) = self.ends(Family::V6);
        Icmpv6Header::with_checksum(kind, octets(from), octets(to), &self.payload)
            .expect("a small payload is in range")
            .to_bytes()
            .to_vec()
    }
}

/// Bytes of an IPv6 address.
pub(crate) fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// Recomputes every checksum of a datagram from the frames that carry it.
pub(crate) fn verify(frames: &[Vec<u8>]) -> Result<()> {
    for frame in frames {
        verify_checksums(frame)?;
    }
    if frames.len() > 1 {
        verify_checksums(&reassemble(frames)?).context("verify the whole datagram")?;
    }
    Ok(())
}

/// The frame that the fragments are parts of.
fn reassemble(frames: &[Vec<u8>]) -> Result<Vec<u8>> {
    let kind = frames[0].get(12..ETHERNET_BYTES).context("read the Ethernet header")?;
    if kind == EtherType::IPV6.0.to_be_bytes() {
        return reassemble_ipv6(frames);
    }
    let mut payload = Vec::new();
    let mut header = None;
    for frame in frames {
        let (fragment, body) = Ipv4Header::from_slice(&frame[ETHERNET_BYTES..])
            .context("read the IPv4 header of a fragment")?;
        let offset = usize::from(fragment.fragment_offset.byte_offset());
        ensure!(offset == payload.len(), "reassemble: a gap or overlap at byte {offset}");
        payload.extend_from_slice(body);
        header.get_or_insert(fragment);
    }
    let mut header = header.context("reassemble: no fragment")?;
    header.more_fragments = false;
    header.set_payload_len(payload.len()).context("reassemble")?;
    header.header_checksum = header.calc_header_checksum();
    Ok([&frames[0][..ETHERNET_BYTES], &header.to_bytes(), &payload].concat())
}

/// The same for IPv6 (RFC 8200, 4.5).
fn reassemble_ipv6(frames: &[Vec<u8>]) -> Result<Vec<u8>> {
    let mut whole = Vec::new();
    let mut before = 0;
    for frame in frames {
        let fragment = fragment_header(frame)?;
        let header = &frame[fragment..fragment + FRAGMENT_BYTES];
        let offset = usize::from(u16::from_be_bytes([header[2], header[3]]) & !7);
        if whole.is_empty() {
            // What names the fragment header names what is behind it from now on.
            whole.extend_from_slice(&frame[..fragment]);
            let naming = if fragment == ETHERNET_BYTES + IPV6_BYTES {
                ETHERNET_BYTES + 6
            } else {
                ETHERNET_BYTES + IPV6_BYTES
            };
            whole[naming] = header[0];
            before = fragment;
        }
        ensure!(offset == whole.len() - before, "reassemble: a gap or overlap at byte {offset}");
        whole.extend_from_slice(&frame[fragment + FRAGMENT_BYTES..]);
    }
    let length = u16::try_from(whole.len() - ETHERNET_BYTES - IPV6_BYTES).context("reassemble")?;
    whole[ETHERNET_BYTES + 4..ETHERNET_BYTES + 6].copy_from_slice(&length.to_be_bytes());
    Ok(whole)
}

/// Where the fragment header begins: behind the IPv6 header, or behind hop-by-hop options of 8
/// bytes.
fn fragment_header(frame: &[u8]) -> Result<usize> {
    let mut at = ETHERNET_BYTES + IPV6_BYTES;
    let mut next = *frame.get(ETHERNET_BYTES + 6).context("read the IPv6 header")?;
    if IpNumber(next) == ip_number::IPV6_HEADER_HOP_BY_HOP {
        next = frame[at];
        at += 8;
    }
    if IpNumber(next) != ip_number::IPV6_FRAGMENTATION_HEADER {
        bail!("reassemble: next header {next} where the fragment header should be");
    }
    Ok(at)
}
