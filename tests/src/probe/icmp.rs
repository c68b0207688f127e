//! ICMP echo with every answer it may get: a reply, or an error and who sent it.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, Ipv4Header,
    Ipv4HeaderSlice, Ipv6Header, Ipv6HeaderSlice, icmpv4, icmpv6,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Address, Failure, PATIENCE, SHORT_PATIENCE, expect_failure, payload, set_fragmentation,
};
use crate::namespace::Namespace;
use crate::runtime::patient;

/// Header of an ICMP echo, of either family.
const ECHO_BYTES: usize = 8;

/// Tells the probes of one process apart: raw sockets see each other's answers.
static NEXT_IDENTIFIER: AtomicU16 = AtomicU16::new(1);

impl Namespace {
    /// Prepares an echo request to `destination`.
    #[must_use]
    pub fn ping(&self, destination: impl Address) -> Ping {
        Ping {
            namespace: self.clone(),
            destination: destination.address(),
            source: None,
            identifier: None,
            ttl: 64,
            packet_bytes: 84,
            dont_fragment: false,
            patience: patient(PATIENCE),
        }
    }
}

/// An echo request to be sent.
#[derive(Clone, Debug)]
pub struct Ping {
    namespace: Namespace,
    destination: IpAddr,
    source: Option<IpAddr>,
    identifier: Option<u16>,
    ttl: u32,
    packet_bytes: usize,
    dont_fragment: bool,
    patience: Duration,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// An echo reply with the bytes that were sent.
    Reply {
        /// Who answered.
        source: IpAddr,
    },
    /// An ICMP error about this request.
    Error(IcmpError),
}

/// An ICMP error about a request of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IcmpError {
    /// Who sent it.
    pub source: IpAddr,
    /// ICMP type.
    pub kind: u8,
    /// ICMP code.
    pub code: u8,
    /// The next hop's MTU in bytes, of "fragmentation needed" and "packet too big".
    pub next_hop_mtu: Option<u32>,
    /// Destination in the quoted packet.
    pub quoted_destination: IpAddr,
}

impl Ping {
    /// Binds the client.
    #[must_use]
    pub fn from(mut self, source: impl Address) -> Self {
        self.source = Some(source.address());
        self
    }

    /// Chooses the identifier, instead of one that no other probe of the process has.
    #[must_use]
    pub fn identifier(mut self, identifier: u16) -> Self {
        self.identifier = Some(identifier);
        self
    }

    /// Sets the time to live.
    #[must_use]
    pub fn ttl(mut self, ttl: u32) -> Self {
        self.ttl = ttl;
        self
    }

    /// Sets the size of the whole packet in bytes, IP header included.
    #[must_use]
    pub fn packet_bytes(mut self, bytes: usize) -> Self {
        self.packet_bytes = bytes;
        self
    }

    /// Forbids fragmentation on the way.
    #[must_use]
    pub fn dont_fragment(mut self) -> Self {
        self.dont_fragment = true;
        self
    }

    /// Sends the request and returns the first answer to it.
    ///
    /// # Errors
    /// A [`Failure`], in context.
    pub fn send(&self) -> Result<Answer> {
        self.namespace.run(|| self.try_send().with_context(|| self.to_string()))
    }

    /// Fails unless an echo reply comes back from the destination.
    ///
    /// # Errors
    /// When there is another answer, or none.
    pub fn replied(&self) -> Result<()> {
        let answer = self.send()?;
        super::expect_same(&self.to_string(), &answer, &Answer::Reply { source: self.destination })
    }

    /// Fails unless nothing comes back.
    ///
    /// # Errors
    /// When something does.
    pub fn dropped(&self) -> Result<()> {
        let probe = Self { patience: SHORT_PATIENCE, ..self.clone() };
        expect_failure(probe.send(), &Failure::TimedOut, &self.to_string())
    }

    fn try_send(&self) -> Result<Answer, Failure> {
        let next = || NEXT_IDENTIFIER.fetch_add(1, Ordering::Relaxed);
        let id = self.identifier.unwrap_or_else(next);
        let echo = IcmpEchoHeader { id, seq: 1 };
        let socket = match self.destination {
            IpAddr::V4(_) => {
                let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
                socket.set_ttl_v4(self.ttl)?;
                socket
            }
            IpAddr::V6(_) => {
                let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
                socket.set_unicast_hops_v6(self.ttl)?;
                socket
            }
        };
        set_fragmentation(&socket, self.destination, self.dont_fragment)?;
        if let Some(source) = self.source {
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        let overhead = Quoted::header_bytes(self.destination) + ECHO_BYTES;
        let data = payload(u64::from(id), self.packet_bytes.saturating_sub(overhead));
        let header = match self.destination {
            IpAddr::V4(_) => Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &data)
                .to_bytes()
                .to_vec(),
            // The kernel knows the source and computes the checksum (RFC 3542 3.1).
            IpAddr::V6(_) => Icmpv6Header::new(Icmpv6Type::EchoRequest(echo)).to_bytes().to_vec(),
        };
        let request = [&header[..], &data].concat();
        socket.send_to(&request, &SocketAddr::new(self.destination, 0).into())?;

        // Any socket of the internet families has the calls of a UDP socket.
        let socket = UdpSocket::from(socket);
        let end = Instant::now() + self.patience;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::TimedOut);
            }
            socket.set_read_timeout(Some(left))?;
            let (length, from) = socket.recv_from(&mut buffer)?;
            // Raw IPv4 sockets are given the IP header, raw IPv6 sockets are not (RFC 3542 3).
            let start = match from {
                SocketAddr::V4(_) => usize::from(buffer[0] & 0x0f) * 4,
                SocketAddr::V6(_) => 0,
            };
            let message = buffer[..length].get(start..).unwrap_or_default();
            if let Some(answer) = parse_answer(from.ip(), message, id, &data)? {
                return Ok(answer);
            }
        }
    }
}

impl std::fmt::Display for Ping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ping {} → {}", self.namespace.name(), self.destination)
    }
}

/// ICMP types of one family.
struct Types {
    echo_request: u8,
    echo_reply: u8,
    errors: &'static [u8],
    too_big: (u8, u8),
}

/// RFC 792.
const ICMP: Types = Types {
    echo_request: icmpv4::TYPE_ECHO_REQUEST,
    echo_reply: icmpv4::TYPE_ECHO_REPLY,
    errors: &[icmpv4::TYPE_DEST_UNREACH, icmpv4::TYPE_TIME_EXCEEDED],
    too_big: (icmpv4::TYPE_DEST_UNREACH, icmpv4::CODE_DST_UNREACH_NEED_FRAG),
};

/// RFC 4443.
const ICMPV6: Types = Types {
    echo_request: icmpv6::TYPE_ECHO_REQUEST,
    echo_reply: icmpv6::TYPE_ECHO_REPLY,
    errors: &[icmpv6::TYPE_DST_UNREACH, icmpv6::TYPE_PACKET_TOO_BIG, icmpv6::TYPE_TIME_EXCEEDED],
    too_big: (icmpv6::TYPE_PACKET_TOO_BIG, 0),
};

/// The answer in an ICMP message, if it is one to the echo request with identifier `id`.
fn parse_answer(
    source: IpAddr,
    message: &[u8],
    id: u16,
    data: &[u8],
) -> Result<Option<Answer>, Failure> {
    let types = if source.is_ipv4() { ICMP } else { ICMPV6 };
    let Some((head, body)) = message.split_first_chunk::<ECHO_BYTES>() else {
        return Err(Failure::Corrupt(format!("an ICMP message of {} bytes", message.len())));
    };
    let [kind, code, _, _, high, low, ..] = *head;
    if kind == types.echo_reply && u16::from_be_bytes([high, low]) == id {
        if body != data {
            return Err(Failure::Corrupt("echo reply with other bytes".into()));
        }
        return Ok(Some(Answer::Reply { source }));
    }
    if !types.errors.contains(&kind) {
        return Ok(None);
    }
    let Some(quoted) = Quoted::parse(source, body) else { return Ok(None) };
    if quoted.kind != types.echo_request || quoted.id != id {
        return Ok(None);
    }
    // RFC 1191 4: 16 bits, behind 16 that are zero; RFC 4443 3.2: 32 bits.
    let mtu = u32::from_be_bytes([high, low, head[6], head[7]]);
    Ok(Some(Answer::Error(IcmpError {
        source,
        kind,
        code,
        next_hop_mtu: ((kind, code) == types.too_big).then_some(mtu),
        quoted_destination: quoted.destination,
    })))
}

/// What an ICMP error quotes of an echo request.
struct Quoted {
    destination: IpAddr,
    kind: u8,
    id: u16,
}

impl Quoted {
    /// Length of an IP header without options, of the family of `address`.
    fn header_bytes(address: IpAddr) -> usize {
        match address {
            IpAddr::V4(_) => Ipv4Header::MIN_LEN,
            IpAddr::V6(_) => Ipv6Header::LEN,
        }
    }

    /// At least 8 bytes of the payload are quoted (RFC 792); more tells nothing new.
    fn parse(reporter: IpAddr, quoted: &[u8]) -> Option<Self> {
        let (destination, echo) = match reporter {
            IpAddr::V4(_) => {
                let header = Ipv4HeaderSlice::from_slice(quoted).ok()?;
                (IpAddr::V4(header.destination_addr()), &quoted[header.slice().len()..])
            }
            IpAddr::V6(_) => {
                let header = Ipv6HeaderSlice::from_slice(quoted).ok()?;
                (IpAddr::V6(header.destination_addr()), &quoted[header.slice().len()..])
            }
        };
        let echo = echo.first_chunk::<ECHO_BYTES>()?;
        Some(Self { destination, kind: echo[0], id: u16::from_be_bytes([echo[4], echo[5]]) })
    }
}
