//! ICMP echo with every answer it may get: a reply, or an error and who sent it.

use std::io::Read;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use etherparse::{IcmpEchoHeader, Icmpv4Slice, Icmpv4Type, Ipv4HeaderSlice, icmpv4};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Failure, PATIENCE, SHORT_PATIENCE, expect_failure, ip, payload};
use crate::namespace::Namespace;
use crate::sys;

/// IPv4 header without options plus ICMP echo header.
const HEADER_BYTES: usize = 28;

/// Tells the probes of one process apart: raw sockets see each other's answers.
static NEXT_IDENTIFIER: AtomicU16 = AtomicU16::new(1);

impl Namespace {
    /// Prepares an echo request to `destination`.
    #[must_use]
    pub fn ping(&self, destination: &str) -> Ping {
        Ping {
            namespace: self.clone(),
            destination: ip(destination),
            source: None,
            ttl: 64,
            packet_bytes: 84,
            dont_fragment: false,
            patience: PATIENCE,
        }
    }
}

/// An echo request to be sent.
#[derive(Clone, Debug)]
pub struct Ping {
    namespace: Namespace,
    destination: IpAddr,
    source: Option<IpAddr>,
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
    /// The next hop's MTU in bytes, of "fragmentation needed".
    pub next_hop_mtu: Option<u16>,
    /// Destination in the quoted packet.
    pub quoted_destination: IpAddr,
}

impl Ping {
    /// Binds the client.
    #[must_use]
    pub fn from(mut self, source: &str) -> Self {
        self.source = Some(ip(source));
        self
    }

    /// Sets the time to live.
    #[must_use]
    pub fn ttl(mut self, ttl: u32) -> Self {
        self.ttl = ttl;
        self
    }

    /// Sets the size of the whole IPv4 packet in bytes.
    #[must_use]
    pub fn packet_bytes(mut self, bytes: usize) -> Self {
        self.packet_bytes = bytes.max(HEADER_BYTES);
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
        let mut socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
        socket.set_ttl_v4(self.ttl)?;
        let policy =
            if self.dont_fragment { libc::IP_PMTUDISC_PROBE } else { libc::IP_PMTUDISC_DONT };
        sys::set_socket_option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, policy)?;
        if let Some(source) = self.source {
            socket.bind(&std::net::SocketAddr::new(source, 0).into())?;
        }
        let id = NEXT_IDENTIFIER.fetch_add(1, Ordering::Relaxed);
        let echo = IcmpEchoHeader { id, seq: 1 };
        let data = payload(u64::from(id), self.packet_bytes - HEADER_BYTES);
        let header = etherparse::Icmpv4Header::with_checksum(Icmpv4Type::EchoRequest(echo), &data);
        let request = [&header.to_bytes()[..], &data].concat();
        socket.send_to(&request, &std::net::SocketAddr::new(self.destination, 0).into())?;

        let end = Instant::now() + self.patience;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::TimedOut);
            }
            socket.set_read_timeout(Some(left))?;
            let length = socket.read(&mut buffer)?;
            if let Some(answer) = parse_answer(&buffer[..length], echo, &data)? {
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

/// The answer in an IPv4 packet, if it is one to the echo request given.
fn parse_answer(
    packet: &[u8],
    echo: IcmpEchoHeader,
    data: &[u8],
) -> Result<Option<Answer>, Failure> {
    let corrupt = |error: &dyn std::fmt::Display| Failure::Corrupt(error.to_string());
    let outer = Ipv4HeaderSlice::from_slice(packet).map_err(|error| corrupt(&error))?;
    let body = &packet[outer.slice().len()..];
    let message = Icmpv4Slice::from_slice(body).map_err(|error| corrupt(&error))?;
    let source = IpAddr::V4(outer.source_addr());
    match message.icmp_type() {
        Icmpv4Type::EchoReply(reply) if reply == echo => {
            if message.payload() != data {
                return Err(Failure::Corrupt("echo reply with other bytes".into()));
            }
            Ok(Some(Answer::Reply { source }))
        }
        Icmpv4Type::DestinationUnreachable(_) | Icmpv4Type::TimeExceeded(_) => {
            let quoted = message.payload();
            let Ok(inner) = Ipv4HeaderSlice::from_slice(quoted) else { return Ok(None) };
            let start = inner.slice().len();
            // RFC 792: at least 8 bytes of the packet's payload are quoted.
            let Some(inner_icmp) = quoted.get(start..start + 8) else { return Ok(None) };
            let identifier = u16::from_be_bytes([inner_icmp[4], inner_icmp[5]]);
            if inner_icmp[0] != icmpv4::TYPE_ECHO_REQUEST || identifier != echo.id {
                return Ok(None);
            }
            let needs_fragmentation = message.type_u8() == icmpv4::TYPE_DEST_UNREACH
                && message.code_u8() == icmpv4::CODE_DST_UNREACH_NEED_FRAG;
            Ok(Some(Answer::Error(IcmpError {
                source,
                kind: message.type_u8(),
                code: message.code_u8(),
                next_hop_mtu: needs_fragmentation.then(|| u16::from_be_bytes([body[6], body[7]])),
                quoted_destination: IpAddr::V4(inner.destination_addr()),
            })))
        }
        _ => Ok(None),
    }
}
