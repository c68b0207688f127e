//! Published ports, kept from the host's other programs.
//!
//! Owns a bound socket per published port: nobody else can bind it, and nobody answers on it.
//! Packets to it are the dataplane's, this module never sees one.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt, fs, io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket,
        sockopt::{IpFreebind, RcvBuf},
    },
};
use thiserror::Error;

use crate::{dataplane::PublishedKey, model::Protocol};

/// Enough for every TCP and UDP port of two addresses.
const OPEN_FILES: u64 = 262_144 + 4096;

/// The ports that we hold.
#[derive(Debug, Default)]
pub struct Reservations {
    held: BTreeMap<PublishedKey, OwnedFd>,
}

/// Ports taken for a change that may still fail; dropped, they are free again.
#[derive(Debug)]
pub struct Prepared(BTreeMap<PublishedKey, OwnedFd>);

/// Why a port could not be had.
#[derive(Debug, Error)]
pub enum PortError {
    /// Somebody else has it.
    #[error("{} is in use by {holder}: choose another port or stop it", endpoint(.key))]
    InUse {
        /// The port.
        key: PublishedKey,
        /// Who has it, as far as `/proc` tells.
        holder: Holder,
    },
    /// The kernel refused for another reason.
    #[error("reserve {}: {error}{}", endpoint(.key), advice(.error))]
    Refused {
        /// The port.
        key: PublishedKey,
        /// Why.
        error: io::Error,
    },
}

/// Who holds a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process.
    Process {
        /// Its short name.
        name: String,
        /// Its id.
        pid: u32,
    },
    /// Closed TCP connections of a program that is gone; they pass within a minute.
    TimeWait,
    /// A process in another pid namespace, or one that went away while we looked.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { name, pid } => write!(f, "{name} (pid {pid})"),
            Self::TimeWait => {
                write!(f, "closed connections of an earlier program (TIME_WAIT, up to a minute)")
            }
            Self::Unknown => write!(f, "another process"),
        }
    }
}

impl Reservations {
    /// Holds nothing yet. Raises the process's limit of open files as far as it may be: every port
    /// takes one.
    pub fn new() -> Self {
        // Where it can't be raised enough, `prepare` says so once it is reached.
        if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
            let ample = hard.max(OPEN_FILES);
            let _lower = setrlimit(Resource::RLIMIT_NOFILE, ample, ample)
                .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
        }
        Self::default()
    }

    /// Takes those of `wanted` that are not held yet, all or none.
    ///
    /// # Errors
    /// Names the first port that could not be had, and who has it.
    pub fn prepare(&self, wanted: &BTreeSet<PublishedKey>) -> Result<Prepared, PortError> {
        let missing = wanted.iter().filter(|key| !self.held.contains_key(key));
        missing.map(|&key| Ok((key, reserve(key)?))).collect::<Result<_, _>>().map(Prepared)
    }

    /// Holds exactly `wanted` from now on, as far as it was prepared or held before.
    pub fn commit(&mut self, prepared: Prepared, wanted: &BTreeSet<PublishedKey>) {
        self.held.extend(prepared.0);
        self.held.retain(|key, _| wanted.contains(key));
    }

    /// Holds as much of `wanted` as can be had, gives up the rest, and says what could not be had.
    pub fn hold(&mut self, wanted: &BTreeSet<PublishedKey>) -> Vec<PortError> {
        self.held.retain(|key, _| wanted.contains(key));
        let mut failures = Vec::new();
        for &key in wanted {
            let Entry::Vacant(free) = self.held.entry(key) else { continue };
            match reserve(key) {
                Ok(socket) => {
                    free.insert(socket);
                }
                Err(error) => failures.push(error),
            }
        }
        failures
    }
}

/// Binds a port without SO_REUSEADDR and without ever listening: the kernel refuses every other
/// bind with EADDRINUSE, and a connection that gets here finds a closed port.
fn reserve(key: PublishedKey) -> Result<OwnedFd, PortError> {
    bound_socket(key).map_err(|errno| match errno {
        Errno::EADDRINUSE => PortError::InUse { key, holder: holder(key) },
        errno => PortError::Refused { key, error: errno.into() },
    })
}

fn bound_socket(key: PublishedKey) -> nix::Result<OwnedFd> {
    let kind = match key.protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
    // The address may come later than the agent: DHCP, a floating address.
    setsockopt(&socket, IpFreebind, &true)?;
    // UDP has no closed state: what no program of ours handles must at least not pile up. The
    // kernel rounds up to its minimum of one small packet.
    setsockopt(&socket, RcvBuf, &0)?;
    let address = SocketAddrV4::new(key.address, key.port);
    bind(socket.as_raw_fd(), &SockaddrIn::from(address))?;
    Ok(socket)
}

fn endpoint(key: &PublishedKey) -> String {
    let protocol = match key.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    format!("{protocol} {}:{}", key.address, key.port)
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EMFILE) => ": raise the agent's limit of open files (LimitNOFILE)",
        Some(Errno::EACCES) => ": the agent needs CAP_NET_BIND_SERVICE",
        _ => "",
    }
}

/// Who has a port that we could not bind.
fn holder(key: PublishedKey) -> Holder {
    let tables = match key.protocol {
        Protocol::Tcp => ["tcp", "tcp6"],
        Protocol::Udp => ["udp", "udp6"],
    };
    let sockets: Vec<SocketEntry> = tables
        .iter()
        // Of the thread, not of the process: a thread may be in another network namespace.
        .filter_map(|table| fs::read_to_string(Path::new("/proc/thread-self/net").join(table)).ok())
        .flat_map(|table| table.lines().filter_map(SocketEntry::parse).collect::<Vec<_>>())
        .filter(|socket| socket.conflicts_with(key))
        .collect();
    let owned = sockets.iter().filter(|socket| socket.inode != 0);
    if let Some((name, pid)) = owned.into_iter().find_map(|socket| process_with(socket.inode)) {
        return Holder::Process { name, pid };
    }
    if sockets.iter().any(|socket| socket.time_wait) { Holder::TimeWait } else { Holder::Unknown }
}

/// A line of `/proc/net/{tcp,udp}{,6}`.
#[derive(Debug, PartialEq, Eq)]
struct SocketEntry {
    /// `None` for an IPv6 address that no IPv4 packet can reach.
    address: Option<Ipv4Addr>,
    port: u16,
    time_wait: bool,
    /// 0 where no file belongs to it any more.
    inode: u64,
}

impl SocketEntry {
    /// Format: net/ipv4/tcp_ipv4.c, `get_tcp4_sock`.
    fn parse(line: &str) -> Option<Self> {
        const TIME_WAIT: &str = "06";
        let mut fields = line.split_whitespace();
        let (address, port) = fields.nth(1)?.split_once(':')?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?.parse().ok()?;
        Some(Self {
            address: parse_address(address),
            port: u16::from_str_radix(port, 16).ok()?,
            time_wait: state == TIME_WAIT,
            inode,
        })
    }

    fn conflicts_with(&self, key: PublishedKey) -> bool {
        self.port == key.port
            && self.address.is_some_and(|address| {
                address == key.address || address.is_unspecified() || key.address.is_unspecified()
            })
    }
}

/// An address in hexadecimal, printed as 32-bit words in the machine's byte order. An IPv6 wildcard
/// takes IPv4 as well, unless the program said otherwise; so does a mapped address.
fn parse_address(hex: &str) -> Option<Ipv4Addr> {
    const MAPPED: &str = "0000000000000000FFFF0000";
    let word = match hex.len() {
        8 => hex,
        _ if hex.bytes().all(|digit| digit == b'0') => return Some(Ipv4Addr::UNSPECIFIED),
        _ => hex.strip_prefix(MAPPED)?,
    };
    u32::from_str_radix(word, 16).ok().map(|word| Ipv4Addr::from(word.to_ne_bytes()))
}

/// The process that has a socket of this inode open.
fn process_with(inode: u64) -> Option<(String, u32)> {
    let wanted = format!("socket:[{inode}]");
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        let mut descriptors = fs::read_dir(process.path().join("fd")).ok()?.flatten();
        descriptors.find(|descriptor| {
            fs::read_link(descriptor.path()).is_ok_and(|target| target.as_os_str() == &*wanted)
        })?;
        let name = fs::read_to_string(process.path().join("comm")).ok()?;
        Some((name.trim_end().to_owned(), pid))
    })
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, UdpSocket},
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    fn loopback(protocol: Protocol, port: u16) -> PublishedKey {
        PublishedKey { address: Ipv4Addr::LOCALHOST, port, protocol }
    }

    /// A port that was free a moment ago.
    fn free_port() -> u16 {
        let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        probe.local_addr().unwrap().port()
    }

    /// Other tests start programs, and a child has a copy of our sockets until it is one.
    fn becomes_free(port: u16) -> bool {
        let deadline = Instant::now() + Duration::from_secs(4);
        while TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
            if Instant::now() > deadline {
                return false;
            }
            thread::yield_now();
        }
        true
    }

    #[test]
    fn a_reserved_port_can_not_be_bound_by_others() {
        let port = free_port();
        let wanted = [Protocol::Tcp, Protocol::Udp].map(|protocol| loopback(protocol, port)).into();
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&wanted).unwrap();
        reservations.commit(prepared, &wanted);

        // The standard library sets SO_REUSEADDR, as servers do.
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
        assert_eq!(tcp.kind(), io::ErrorKind::AddrInUse);
        let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap_err();
        assert_eq!(udp.kind(), io::ErrorKind::AddrInUse);

        assert!(reservations.hold(&BTreeSet::new()).is_empty());
        assert!(becomes_free(port));
    }

    #[test]
    fn a_taken_port_is_refused_with_the_name_of_its_holder() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let key = loopback(Protocol::Tcp, server.local_addr().unwrap().port());
        let error = Reservations::default().prepare(&[key].into()).unwrap_err().to_string();
        let start = format!("tcp 127.0.0.1:{} is in use by ", key.port);
        assert!(error.starts_with(&start), "{error}");
        assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
    }

    #[test]
    fn all_or_none_are_taken() {
        let server = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let taken = loopback(Protocol::Udp, server.local_addr().unwrap().port());
        let free = loopback(Protocol::Tcp, free_port());
        let reservations = Reservations::default();
        reservations.prepare(&[taken, free].into()).unwrap_err();
        assert!(becomes_free(free.port));
    }

    #[test]
    fn a_line_of_the_socket_table_is_read() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     \
                    0        0 12345 1 0000000000000000 100 0 0 10 0";
        let socket = SocketEntry::parse(line).unwrap();
        let expected = SocketEntry {
            address: Some(Ipv4Addr::LOCALHOST),
            port: 8080,
            time_wait: false,
            inode: 12345,
        };
        assert_eq!(socket, expected);
        assert!(socket.conflicts_with(loopback(Protocol::Tcp, 8080)));
    }

    #[test]
    fn an_ipv6_wildcard_takes_ipv4_too() {
        assert_eq!(parse_address(&"0".repeat(32)), Some(Ipv4Addr::UNSPECIFIED));
        let mapped = "0000000000000000FFFF00000100007F";
        assert_eq!(parse_address(mapped), Some(Ipv4Addr::LOCALHOST));
        assert_eq!(parse_address("000080FE00000000FF005450B6ADE7FE"), None);
    }
}
