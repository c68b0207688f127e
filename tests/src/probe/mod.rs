//! Typed probes: each acts inside a namespace and reports the addresses that both ends saw.
//!
//! The two ends speak one small protocol: a request carries bytes, the reply carries a [`Witness`]
//! of what the server saw, then the same bytes inverted. Knows nothing of netdp.

use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::runtime::poll_until;
use crate::sys;

mod capture;
mod crowd;
mod icmp;
mod tcp;
mod tunnel;
mod udp;

pub use capture::Sniffer;
pub use crowd::{Crowd, CrowdServer, allow_open_files};
pub use icmp::{Answer, IcmpError, Ping};
pub use tcp::{Exchange, TcpProbe, TcpServer, TcpSession, Traffic, TrafficReport};
pub use tunnel::Tunnel;
pub use udp::{Datagram, UdpExchange, UdpProbe, UdpServer, UdpSession};

/// How long a probe that should succeed may take.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long a probe that should find nothing waits.
pub const SHORT_PATIENCE: Duration = Duration::from_secs(1);
/// What a TCP exchange carries each way unless told: several windows and many segments.
pub const TCP_PAYLOAD_BYTES: usize = 4 << 20;

/// Why a probe got no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A reset answered the first packet, or port unreachable came back.
    #[error("refused")]
    Refused,
    /// Nothing came back.
    #[error("timed out")]
    TimedOut,
    /// No route, or an ICMP error said so.
    #[error("unreachable")]
    Unreachable,
    /// An open connection was reset.
    #[error("reset")]
    Reset,
    /// An open connection was closed before the answer.
    #[error("closed early")]
    Closed,
    /// The bytes that arrived are not those that were sent.
    #[error("corrupt: {0}")]
    Corrupt(String),
    /// Anything else: most likely a mistake of the test.
    #[error("{0}")]
    Other(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::ConnectionRefused => Self::Refused,
            Kind::TimedOut | Kind::WouldBlock => Self::TimedOut,
            Kind::HostUnreachable | Kind::NetworkUnreachable => Self::Unreachable,
            Kind::ConnectionReset | Kind::ConnectionAborted | Kind::BrokenPipe => Self::Reset,
            Kind::UnexpectedEof => Self::Closed,
            _ => Self::Other(error.to_string()),
        }
    }
}

/// What the server saw of one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// The server's own name.
    pub server: String,
    /// The address and port that the request came from.
    pub peer: SocketAddr,
    /// The address and port that it came to.
    pub local: SocketAddr,
    /// Digest of the request's bytes.
    digest: u64,
}

impl Witness {
    /// Fails unless the server named `name` answered.
    ///
    /// # Errors
    /// When it was another one.
    pub fn by(&self, name: &str) -> Result<&Self> {
        expect_same("the server that answered", &self.server.as_str(), &name)?;
        Ok(self)
    }

    /// Fails unless the server saw the client under `address`.
    ///
    /// # Errors
    /// When it saw another.
    pub fn saw_client_at(&self, address: impl Address) -> Result<&Self> {
        let what = "the client's address as the server saw it";
        expect_same(what, &self.peer.ip(), &address.address())?;
        Ok(self)
    }
}

/// Fails when two observations differ.
///
/// # Errors
/// With both of them.
pub fn expect_same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    seen: &T,
    expected: &T,
) -> Result<()> {
    if seen != expected {
        bail!("compare {what}: expected {expected:?}, saw {seen:?}");
    }
    Ok(())
}

/// Fails unless the probe failed exactly so.
///
/// # Errors
/// When it succeeded, or failed in another way.
pub fn expect_failure<T: std::fmt::Debug>(
    result: Result<T>,
    expected: &Failure,
    what: &str,
) -> Result<()> {
    match result {
        Ok(value) => bail!("{what}: expected {expected}, it succeeded with {value:?}"),
        Err(error) => match error.downcast_ref::<Failure>() {
            Some(failure) if failure == expected => Ok(()),
            _ => Err(error.context(format!("{what}: expected {expected}"))),
        },
    }
}

/// What a test may name an address by.
pub trait Address {
    /// The address; a malformed one is a mistake of the test and ends it.
    fn address(self) -> IpAddr;
}

impl Address for IpAddr {
    fn address(self) -> IpAddr {
        self
    }
}

impl Address for Ipv4Addr {
    fn address(self) -> IpAddr {
        self.into()
    }
}

impl Address for Ipv6Addr {
    fn address(self) -> IpAddr {
        self.into()
    }
}

impl Address for &str {
    fn address(self) -> IpAddr {
        self.parse().unwrap_or_else(|error| panic!("address {self:?} in a test: {error}"))
    }
}

/// What a test may name an address with port by.
pub trait Endpoint {
    /// Address and port; malformed ones are a mistake of the test and end it.
    fn endpoint(self) -> SocketAddr;
}

impl Endpoint for SocketAddr {
    fn endpoint(self) -> SocketAddr {
        self
    }
}

impl<A: Address> Endpoint for (A, u16) {
    fn endpoint(self) -> SocketAddr {
        SocketAddr::new(self.0.address(), self.1)
    }
}

impl Endpoint for &str {
    fn endpoint(self) -> SocketAddr {
        self.parse().unwrap_or_else(|error| panic!("address {self:?} in a test: {error}"))
    }
}

impl Endpoint for &String {
    fn endpoint(self) -> SocketAddr {
        self.as_str().endpoint()
    }
}

/// The wildcard address of the same family.
pub(crate) fn any_address(of: SocketAddr) -> SocketAddr {
    match of {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).endpoint(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).endpoint(),
    }
}

/// The value behind a lock; a probe thread that panicked has reported already.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Lets the sender fragment, or forbids it to the sender and everybody on the way.
fn set_fragmentation(socket: &impl AsFd, towards: IpAddr, forbidden: bool) -> io::Result<()> {
    match towards {
        IpAddr::V4(_) => {
            let policy = if forbidden { libc::IP_PMTUDISC_PROBE } else { libc::IP_PMTUDISC_DONT };
            sys::set_socket_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, policy)
        }
        IpAddr::V6(_) => {
            let policy =
                if forbidden { libc::IPV6_PMTUDISC_PROBE } else { libc::IPV6_PMTUDISC_DONT };
            sys::set_socket_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, policy)?;
            let forbidden = i32::from(forbidden);
            sys::set_socket_option(socket, libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, forbidden)
        }
    }
}

/// Bytes that no offset error maps onto themselves (xorshift64*, Marsaglia 2003).
fn payload(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn digest(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

fn invert(bytes: &mut [u8]) {
    for byte in bytes {
        *byte = !*byte;
    }
}

/// Frames a witness and the request's bytes as the reply.
fn encode_reply(
    name: &str,
    peer: SocketAddr,
    local: SocketAddr,
    mut request: Vec<u8>,
) -> Result<Vec<u8>> {
    let witness = Witness { server: name.to_owned(), peer, local, digest: digest(&request) };
    let header = serde_json::to_vec(&witness).context("encode a witness")?;
    invert(&mut request);
    let length = u32::try_from(header.len()).context("encode the length of a witness")?;
    Ok([&length.to_be_bytes()[..], &header, &request].concat())
}

/// Checks a reply against the request it answers.
fn check_reply(request: &[u8], witness: &[u8], mut echo: Vec<u8>) -> Result<Witness, Failure> {
    let witness: Witness =
        serde_json::from_slice(witness).map_err(|error| Failure::Corrupt(error.to_string()))?;
    if witness.digest != digest(request) {
        return Err(Failure::Corrupt("the server read other bytes than were sent".into()));
    }
    invert(&mut echo);
    if echo != request {
        return Err(Failure::Corrupt("the client read other bytes than were sent".into()));
    }
    Ok(witness)
}

/// Binds a socket, waiting a moment for the address: a program that another test is starting has
/// copies of all our sockets until it is that program, closed ones included; and the kernel takes its
/// time, on a busy machine, until an IPv6 address that was added can be used.
fn bind_once_free<T>(bind: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let is_taken = |bound: &io::Result<T>| {
        let kind = bound.as_ref().map_err(io::Error::kind).err();
        matches!(kind, Some(io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable))
    };
    let free = poll_until(SHORT_PATIENCE, "the address", || {
        let bound = bind();
        Ok((!is_taken(&bound)).then_some(bound))
    });
    free.unwrap_or_else(|_| bind())
}
