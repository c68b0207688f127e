//! A datagram as a test thinks of it, and the frames that it makes on the wire.
//!
//! What a program should have made of a packet is the frame of the wanted datagram, built from
//! nothing: byte for byte, so whatever is not to be rewritten must be as it was.

use std::net::SocketAddrV4;

use anyhow::{Context, Result, ensure};
use etherparse::{
    EtherType, IcmpEchoHeader, Icmpv4Header, Icmpv4Type, IpFragOffset, IpNumber, Ipv4Header,
    TcpHeader, UdpHeader, ip_number,
};
use netdp_tests::packet::{ETHERNET_BYTES, verify_checksums};

/// Router alert, which every fragment carries, and padding (RFC 791, 3.1; RFC 2113).
const OPTIONS: [u8; 8] = [148, 4, 0, 0, 1, 1, 1, 0];
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
    /// ICMP echo request.
    Request,
    /// ICMP echo reply.
    Reply,
    /// ICMP of another type.
    Timestamp,
}

impl Kind {
    /// IP protocol number.
    pub(crate) fn protocol(self) -> IpNumber {
        match self {
            Self::Udp | Self::BareUdp => ip_number::UDP,
            Self::Request | Self::Reply | Self::Timestamp => ip_number::ICMP,
            _ => ip_number::TCP,
        }
    }
}

/// How a datagram comes along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// With IP options.
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
    pub(crate) fn frames(&self) -> Vec<Vec<u8>> {
        let body = self.body();
        let mut starts = vec![0];
        if self.shape.cut {
            starts.extend(CUTS);
        }
        let ends = starts.iter().skip(1).copied().chain([body.len()]);
        starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| self.frame(start, &body[start..end], end < body.len()))
            .collect()
    }

    /// The only frame.
    pub(crate) fn frame_bytes(&self) -> Vec<u8> {
        self.frames().remove(0)
    }

    fn frame(&self, offset: usize, payload: &[u8], more: bool) -> Vec<u8> {
        let mut header = self.ip_header(payload.len());
        header.dont_fragment = !self.shape.cut;
        header.more_fragments = more;
        header.fragment_offset =
            IpFragOffset::try_new((offset / 8) as u16).expect("a small offset is in range");
        header.header_checksum = header.calc_header_checksum();
        let mut frame = Vec::new();
        frame.extend_from_slice(&self.wire.destination_mac);
        frame.extend_from_slice(&self.wire.source_mac);
        frame.extend_from_slice(&EtherType::IPV4.0.to_be_bytes());
        frame.extend_from_slice(&header.to_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    fn ip_header(&self, payload: usize) -> Ipv4Header {
        let mut header = Ipv4Header::new(
            payload as u16,
            self.ttl,
            self.kind.protocol(),
            self.wire.source.ip().octets(),
            self.wire.destination.ip().octets(),
        )
        .expect("a small payload is in range");
        header.identification = self.identification;
        if self.shape.options {
            header.options = OPTIONS.into();
            header.set_payload_len(payload).expect("a small payload is in range");
        }
        header
    }

    /// Transport header and payload of the whole datagram.
    fn body(&self) -> Vec<u8> {
        let (source, destination) = (self.wire.source, self.wire.destination);
        let mut body = match self.kind {
            Kind::Udp => {
                let ip = self.ip_header(self.payload.len());
                UdpHeader::with_ipv4_checksum(source.port(), destination.port(), &ip, &self.payload)
                    .expect("a small payload is in range")
                    .to_bytes()
                    .to_vec()
            }
            Kind::BareUdp => {
                let length = self.payload.len();
                UdpHeader::without_ipv4_checksum(source.port(), destination.port(), length)
                    .expect("a small payload is in range")
                    .to_bytes()
                    .to_vec()
            }
            Kind::Request => {
                let echo = IcmpEchoHeader { id: source.port(), seq: 1 };
                icmp(Icmpv4Type::EchoRequest(echo), &self.payload)
            }
            Kind::Reply => {
                let echo = IcmpEchoHeader { id: destination.port(), seq: 1 };
                icmp(Icmpv4Type::EchoReply(echo), &self.payload)
            }
            Kind::Timestamp => icmp(
                Icmpv4Type::Unknown { type_u8: 13, code_u8: 0, bytes5to8: [0, 9, 0, 1] },
                &self.payload,
            ),
            _ => self.tcp_header(),
        };
        body.extend_from_slice(&self.payload);
        body
    }

    fn tcp_header(&self) -> Vec<u8> {
        let (source, destination) = (self.wire.source, self.wire.destination);
        let mut tcp = TcpHeader::new(source.port(), destination.port(), 0x0102_0304, 64_240);
        tcp.syn = matches!(self.kind, Kind::Syn | Kind::SynAck);
        tcp.ack = matches!(self.kind, Kind::SynAck | Kind::Segment | Kind::Fin);
        tcp.psh = self.kind == Kind::Segment;
        tcp.fin = self.kind == Kind::Fin;
        tcp.rst = self.kind == Kind::Reset;
        let (from, to) = (source.ip().octets(), destination.ip().octets());
        tcp.checksum = tcp
            .calc_checksum_ipv4_raw(from, to, &self.payload)
            .expect("a small payload is in range");
        tcp.to_bytes().to_vec()
    }
}

fn icmp(kind: Icmpv4Type, payload: &[u8]) -> Vec<u8> {
    Icmpv4Header::with_checksum(kind, payload).to_bytes().to_vec()
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
