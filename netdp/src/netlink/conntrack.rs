//! Netfilter's connection tracking, by `ctnetlink`: listing connections, and ending some.
//!
//! Owns the socket and the messages (linux/netfilter/nfnetlink_conntrack.h). What a connection means
//! is the caller's to say.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Context, Result};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// One way of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Who sends, and from which port or with which echo identifier; 0 = there is none.
    pub source: (IpAddr, u16),
    /// To whom; a ping has no port.
    pub destination: (IpAddr, u16),
}

/// A tracked connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// IP protocol number.
    pub protocol: u8,
    /// As its first packet had it, before translation.
    pub original: Way,
    /// As answers have it, before translation back.
    pub reply: Way,
    /// `IPS_*` bits.
    status: u32,
    /// `TCP_CONNTRACK_*`, of TCP.
    tcp_state: Option<u8>,
    /// Until it ends if nothing more comes.
    pub expires: Duration,
    /// What names it to the kernel: its attributes, as they came.
    name: Vec<u8>,
}

impl Tracked {
    /// Whether its destination was translated.
    pub fn is_destination_translated(&self) -> bool {
        const DST_NAT: u32 = 1 << 5;
        self.status & DST_NAT != 0
    }

    /// Whether an address or a port of it was translated.
    pub fn is_translated(&self) -> bool {
        (self.original.source, self.original.destination)
            != (self.reply.destination, self.reply.source)
    }

    /// Whether an answer was seen.
    pub fn is_answered(&self) -> bool {
        const SEEN_REPLY: u32 = 1 << 1;
        self.status & SEEN_REPLY != 0
    }

    /// How far it is, in the words of flows.
    pub fn state(&self) -> &'static str {
        // linux/netfilter/nf_conntrack_tcp.h.
        match self.tcp_state {
            Some(1 | 2 | 9) => "half-open",
            Some(3) => "established",
            Some(4 | 5) => "half-closed",
            Some(6 | 7) => "closing",
            Some(8) => "reset",
            Some(_) => "half-open",
            None if self.is_answered() => "replied",
            None => "unreplied",
        }
    }
}

/// Message types: `NFNL_SUBSYS_CTNETLINK` in the high byte.
const NEW: u16 = 0x100;
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
/// Netlink's own (linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// Lengths of the headers of netlink and of netfilter.
const HEADER: usize = 16;
const SUB_HEADER: usize = 4;

/// Attributes of a connection.
mod attribute {
    pub(super) const ORIGINAL: u16 = 1;
    pub(super) const REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const PROTOCOL_INFO: u16 = 4;
    pub(super) const TIMEOUT: u16 = 7;
    pub(super) const ID: u16 = 12;
    pub(super) const ZONE: u16 = 18;
}

/// The connections of the calling thread's namespace, of both families. Blocks for as long as the
/// kernel takes.
///
/// # Errors
/// The kernel does not list them.
pub fn list() -> Result<Vec<Tracked>> {
    let mut connections = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut tracking = Tracking::open().context("open a netfilter netlink socket")?;
        let request = message(GET, REQUEST | DUMP, family, &[]);
        let listed = tracking.ask(&request, |message| connections.extend(parse(message)));
        listed.context("list tracked connections: the kernel needs CONFIG_NF_CT_NETLINK")?;
    }
    Ok(connections)
}

/// Forgets connections: their next packets are first ones. Returns how many there still were.
///
/// # Errors
/// The kernel refuses.
pub fn end<'a>(connections: impl IntoIterator<Item = &'a Tracked>) -> Result<usize> {
    let mut tracking = Tracking::open().context("open a netfilter netlink socket")?;
    let mut ended = 0;
    for connection in connections {
        let is_ipv4 = connection.original.source.0.is_ipv4();
        let family = if is_ipv4 { libc::AF_INET } else { libc::AF_INET6 };
        let request = message(DELETE, REQUEST | ACK, family, &connection.name);
        match tracking.ask(&request, |_| {}) {
            Ok(()) => ended += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("end a tracked connection"),
        }
    }
    Ok(ended)
}

struct Tracking(Socket);

impl Tracking {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Sends a request and shows what comes, up to the end of the answer.
    fn ask(&mut self, request: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
        self.0.send(request, 0)?;
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = &bytes[..];
            while let Some((kind, payload, next)) = split_message(rest) {
                rest = next;
                match kind {
                    NEW => each(payload.get(SUB_HEADER..).unwrap_or_default()),
                    DONE => return Ok(()),
                    ERROR => {
                        return match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
                            Some(0) => Ok(()),
                            Some(code) => Err(io::Error::from_raw_os_error(-code)),
                            None => Err(io::ErrorKind::InvalidData.into()),
                        };
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Type and payload of the first message, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let payload = bytes.get(HEADER..length)?;
    Some((kind, payload, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn message(kind: u16, flags: u16, family: i32, attributes: &[u8]) -> Vec<u8> {
    let length = HEADER + SUB_HEADER + attributes.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence and port, which one request at a time does not need; then nfgenmsg.
    bytes.extend([0; 8]);
    bytes.extend([u8::try_from(family).unwrap_or_default(), 0, 0, 0]);
    bytes.extend(attributes);
    bytes
}

/// The attributes in a buffer, each with its type and value.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    // The two highest bits say that it is nested, and in network order.
    const TYPE: u16 = 0x3fff;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?) & TYPE;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn write_nested(bytes: &mut Vec<u8>, kind: u16, value: &[u8], is_nested: bool) {
    const NESTED: u16 = 1 << 15;
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    bytes.extend(length.to_ne_bytes());
    bytes.extend((kind | if is_nested { NESTED } else { 0 }).to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

fn be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*value.first_chunk()?))
}

fn be16(value: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*value.first_chunk()?))
}

/// A connection from its attributes.
fn parse(bytes: &[u8]) -> Option<Tracked> {
    let mut name = Vec::new();
    let (mut original, mut reply) = (None, None);
    let (mut status, mut tcp_state, mut expires) = (0, None, 0);
    for (kind, value) in attributes(bytes) {
        match kind {
            attribute::ORIGINAL => {
                original = Tuple::parse(value);
                write_nested(&mut name, kind, value, true);
            }
            attribute::REPLY => reply = Tuple::parse(value),
            attribute::STATUS => status = be32(value)?,
            attribute::TIMEOUT => expires = be32(value)?,
            attribute::PROTOCOL_INFO => tcp_state = tcp_state_of(value),
            attribute::ID | attribute::ZONE => write_nested(&mut name, kind, value, false),
            _ => {}
        }
    }
    let original = original?;
    Some(Tracked {
        protocol: original.protocol,
        original: original.way,
        reply: reply?.way,
        status,
        tcp_state,
        expires: Duration::from_secs(expires.into()),
        name,
    })
}

fn tcp_state_of(info: &[u8]) -> Option<u8> {
    const TCP: u16 = 1;
    const STATE: u16 = 1;
    let (_, tcp) = attributes(info).find(|(kind, _)| *kind == TCP)?;
    let (_, state) = attributes(tcp).find(|(kind, _)| *kind == STATE)?;
    state.first().copied()
}

struct Tuple {
    protocol: u8,
    way: Way,
}

impl Tuple {
    fn parse(bytes: &[u8]) -> Option<Self> {
        const ADDRESSES: u16 = 1;
        const PROTOCOL: u16 = 2;
        let (mut source, mut destination) = (None, None);
        let (mut protocol, mut source_port, mut destination_port) = (None, 0, 0);
        for (kind, value) in attributes(bytes) {
            match kind {
                ADDRESSES => {
                    for (kind, value) in attributes(value) {
                        match kind {
                            1 => source = ipv4(value),
                            2 => destination = ipv4(value),
                            3 => source = ipv6(value),
                            4 => destination = ipv6(value),
                            _ => {}
                        }
                    }
                }
                PROTOCOL => {
                    for (kind, value) in attributes(value) {
                        match kind {
                            1 => protocol = value.first().copied(),
                            // A port, or the identifier of a ping of either family.
                            2 | 4 | 7 => source_port = be16(value)?,
                            3 => destination_port = be16(value)?,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        let way =
            Way { source: (source?, source_port), destination: (destination?, destination_port) };
        Some(Self { protocol: protocol?, way })
    }
}

fn ipv4(value: &[u8]) -> Option<IpAddr> {
    Some(Ipv4Addr::from(*value.first_chunk::<4>()?).into())
}

fn ipv6(value: &[u8]) -> Option<IpAddr> {
    Some(Ipv6Addr::from(*value.first_chunk::<16>()?).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(kind: u16, parts: &[(u16, &[u8])]) -> Vec<u8> {
        let mut inner = Vec::new();
        for (kind, value) in parts {
            write_nested(&mut inner, *kind, value, false);
        }
        let mut bytes = Vec::new();
        write_nested(&mut bytes, kind, &inner, true);
        bytes
    }

    fn tuple(source: [u8; 4], destination: [u8; 4], ports: [u8; 2]) -> Vec<u8> {
        let addresses = nested(1, &[(1, &source), (2, &destination)]);
        let protocol = nested(2, &[(1, &[6]), (2, &[0, ports[0]]), (3, &[0, ports[1]])]);
        [addresses, protocol].concat()
    }

    #[test]
    fn a_connection_is_read_and_named_by_its_original_way() {
        let mut bytes = Vec::new();
        let original = tuple([10, 0, 0, 3], [10, 0, 0, 2], [50, 80]);
        write_nested(&mut bytes, attribute::ORIGINAL, &original, true);
        let reply = tuple([172, 20, 0, 2], [10, 0, 0, 3], [8, 50]);
        write_nested(&mut bytes, attribute::REPLY, &reply, true);
        write_nested(&mut bytes, attribute::STATUS, &0x2a_u32.to_be_bytes(), false);
        write_nested(&mut bytes, attribute::TIMEOUT, &90_u32.to_be_bytes(), false);
        bytes.extend(nested(attribute::PROTOCOL_INFO, &[(1, &nested(1, &[])[..0])]));
        let tracked = parse(&bytes).unwrap();
        let end = |address: [u8; 4], port| (IpAddr::from(address), port);
        assert_eq!(tracked.protocol, 6);
        assert_eq!(tracked.original.source, end([10, 0, 0, 3], 50));
        assert_eq!(tracked.original.destination, end([10, 0, 0, 2], 80));
        assert_eq!(tracked.reply.source, end([172, 20, 0, 2], 8));
        assert!(tracked.is_destination_translated() && tracked.is_answered());
        assert_eq!((tracked.expires, tracked.state()), (Duration::from_secs(90), "replied"));
        let (kind, value) = attributes(&tracked.name).next().unwrap();
        assert_eq!((kind, value), (attribute::ORIGINAL, &original[..]));
    }

    #[test]
    fn a_message_that_ends_too_early_is_nothing() {
        let whole = message(NEW, 0, libc::AF_INET, &tuple([1; 4], [2; 4], [1, 2]));
        assert!(split_message(&whole).is_some());
        for length in 0..whole.len() {
            assert!(split_message(&whole[..length]).is_none(), "{length}");
        }
        assert!(parse(&[5, 0, 1]).is_none());
    }
}
