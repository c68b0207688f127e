//! Published ports, kept from the host's other programs.
//!
//! Owns a bound socket per published port: nobody else can bind it, and nobody answers on it.
//! Packets to it are the dataplane's, this module never sees one.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
    sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, setsockopt, socket,
        sockopt::{IpFreebind, Ipv6V6Only, RcvBuf},
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
        let taken = missing.filter_map(|&key| Some(reserve(key).transpose()?.map(|s| (key, s))));
        taken.collect::<Result<_, _>>().map(Prepared)
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
                Ok(Some(socket)) => {
                    free.insert(socket);
                }
                Ok(None) => {}
                Err(error) => failures.push(error),
            }
        }
        failures
    }
}

/// Binds a port without SO_REUSEADDR and without ever listening: the kernel refuses every other
/// bind with EADDRINUSE, and a connection that gets here finds a closed port. `None` where the
/// kernel has no SCTP: then nobody else can bind an SCTP port either.
fn reserve(key: PublishedKey) -> Result<Option<OwnedFd>, PortError> {
    match bound_socket(key) {
        Ok(socket) => Ok(Some(socket)),
        Err(Errno::EPROTONOSUPPORT) if key.protocol == Protocol::Sctp => Ok(None),
        Err(Errno::EADDRINUSE) => Err(PortError::InUse { key, holder: holder(key) }),
        Err(errno) => Err(PortError::Refused { key, error: errno.into() }),
    }
}

fn bound_socket(key: PublishedKey) -> nix::Result<OwnedFd> {
    let (kind, protocol) = match key.protocol {
        Protocol::Tcp => (SockType::Stream, SockProtocol::Tcp),
        Protocol::Udp => (SockType::Datagram, SockProtocol::Udp),
        Protocol::Sctp => (SockType::Stream, SockProtocol::Sctp),
    };
    let family = if key.address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol)?;
    if key.address.is_ipv6() {
        // IPv4 is another key's business.
        setsockopt(&socket, Ipv6V6Only, &true)?;
    }
    // The address may come later than the agent: DHCP, a floating address. The option is IPv4's by
    // name and works for both.
    setsockopt(&socket, IpFreebind, &true)?;
    // UDP has no closed state: what no program of ours handles must at least not pile up. The
    // kernel rounds up to its minimum of one small packet.
    setsockopt(&socket, RcvBuf, &0)?;
    let address = SocketAddr::new(key.address, key.port);
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}

fn endpoint(key: &PublishedKey) -> String {
    format!("{} {}", key.protocol, SocketAddr::new(key.address, key.port))
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
    let (tables, parse): (&[_], fn(&str) -> Option<SocketEntry>) = match key.protocol {
        Protocol::Tcp => (&["tcp", "tcp6"], SocketEntry::parse),
        Protocol::Udp => (&["udp", "udp6"], SocketEntry::parse),
        Protocol::Sctp => (&["sctp/eps"], SocketEntry::parse_sctp),
    };
    let sockets: Vec<SocketEntry> = tables
        .iter()
        // Of the thread, not of the process: a thread may be in another network namespace.
        .filter_map(|table| fs::read_to_string(Path::new("/proc/thread-self/net").join(table)).ok())
        .flat_map(|table| table.lines().filter_map(parse).collect::<Vec<_>>())
        .filter(|socket| socket.conflicts_with(key))
        .collect();
    let owned = sockets.iter().filter(|socket| socket.inode != 0);
    if let Some((name, pid)) = owned.into_iter().find_map(|socket| process_with(socket.inode)) {
        return Holder::Process { name, pid };
    }
    if sockets.iter().any(|socket| socket.time_wait) { Holder::TimeWait } else { Holder::Unknown }
}

/// A line of `/proc/net/{tcp,udp}{,6}` or `/proc/net/sctp/eps`.
#[derive(Debug, PartialEq, Eq)]
struct SocketEntry {
    /// SCTP sockets may have several.
    addresses: Vec<IpAddr>,
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
            addresses: vec![parse_address(address)?],
            port: u16::from_str_radix(port, 16).ok()?,
            time_wait: state == TIME_WAIT,
            inode,
        })
    }

    /// Format: net/sctp/proc.c, `sctp_eps_seq_show`.
    fn parse_sctp(line: &str) -> Option<Self> {
        let mut fields = line.split_whitespace();
        let port = fields.nth(5)?.parse().ok()?;
        let inode = fields.nth(1)?.parse().ok()?;
        let address = |text: &str| text.parse::<IpAddr>().ok();
        let addresses = fields.filter_map(address).map(|address| address.to_canonical()).collect();
        Some(Self { addresses, port, time_wait: false, inode })
    }

    fn conflicts_with(&self, key: PublishedKey) -> bool {
        self.port == key.port
            && self.addresses.iter().any(|address| {
                // An IPv6 wildcard takes IPv4 as well, unless the program said otherwise.
                *address == Ipv6Addr::UNSPECIFIED
                    || *address == key.address
                    || address.is_ipv4() == key.address.is_ipv4()
                        && (address.is_unspecified() || key.address.is_unspecified())
            })
    }
}

/// An address in hexadecimal, printed as 32-bit words in the machine's byte order; a mapped IPv4
/// address comes back as what it stands for.
fn parse_address(hex: &str) -> Option<IpAddr> {
    let word = |index: usize| {
        let word = hex.get(8 * index..8 * (index + 1))?;
        u32::from_str_radix(word, 16).ok().map(u32::to_ne_bytes)
    };
    match hex.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut octets = [0; 16];
            for (index, chunk) in octets.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(index)?);
            }
            Some(Ipv6Addr::from(octets).to_canonical())
        }
        _ => None,
    }
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
        PublishedKey { address: Ipv4Addr::LOCALHOST.into(), port, protocol }
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
            addresses: vec![Ipv4Addr::LOCALHOST.into()],
            port: 8080,
            time_wait: false,
            inode: 12345,
        };
        assert_eq!(socket, expected);
        assert!(socket.conflicts_with(loopback(Protocol::Tcp, 8080)));
    }

    #[test]
    fn a_line_of_the_sctp_table_is_read() {
        let line = " 00000000a1b2c3d4 00000000e5f60718 2   10  29   7000      0 4711 10.0.0.2 \
                    0000:0000:0000:0000:0000:0000:0000:0001 ";
        let socket = SocketEntry::parse_sctp(line).unwrap();
        let expected = SocketEntry {
            addresses: vec!["10.0.0.2".parse().unwrap(), Ipv6Addr::LOCALHOST.into()],
            port: 7000,
            time_wait: false,
            inode: 4711,
        };
        assert_eq!(socket, expected);
        let key = |address: &str| PublishedKey {
            address: address.parse().unwrap(),
            port: 7000,
            protocol: Protocol::Sctp,
        };
        assert!(socket.conflicts_with(key("0.0.0.0")) && socket.conflicts_with(key("::1")));
        assert!(!socket.conflicts_with(key("10.0.0.3")) && !socket.conflicts_with(key("fd00::2")));
        let title = " ENDPT     SOCK   STY SST HBKT LPORT   UID INODE LADDRS";
        assert_eq!(SocketEntry::parse_sctp(title), None);
    }

    #[test]
    fn sctp_ports_are_held_where_the_kernel_has_sctp() {
        let wanted = [loopback(Protocol::Sctp, free_port())].into();
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&wanted).unwrap();
        reservations.commit(prepared, &wanted);
        let kernel_has_sctp = fs::read_to_string("/proc/net/protocols").unwrap().contains("SCTP");
        assert_eq!(reservations.held.len(), usize::from(kernel_has_sctp));
        // Whoever comes second is refused, if anybody can come.
        let second = Reservations::default().prepare(&wanted);
        assert_eq!(second.is_err(), kernel_has_sctp);
    }

    #[test]
    fn addresses_of_the_socket_tables_are_read() {
        let check = |hex: &str, address: &str| {
            assert_eq!(parse_address(hex), Some(address.parse().unwrap()), "{hex}");
        };
        check("0100007F", "127.0.0.1");
        check(&"0".repeat(32), "::");
        check("0000000000000000FFFF00000100007F", "127.0.0.1");
        check("000080FE00000000FF005450B6ADE7FE", "fe80::5054:ff:fee7:adb6");
        assert_eq!(parse_address("00"), None);
    }

    #[test]
    fn an_ipv6_wildcard_takes_ipv4_too_and_no_other_address_does() {
        let conflict = |socket: &str, key: &str| {
            let socket = SocketEntry {
                addresses: vec![socket.parse().unwrap()],
                port: 80,
                time_wait: false,
                inode: 1,
            };
            let protocol = Protocol::Tcp;
            socket.conflicts_with(PublishedKey {
                address: key.parse().unwrap(),
                port: 80,
                protocol,
            })
        };
        assert!(conflict("::", "10.0.0.2") && conflict("::", "fd00::2"));
        assert!(conflict("0.0.0.0", "10.0.0.2") && !conflict("0.0.0.0", "fd00::2"));
        assert!(conflict("fd00::2", "::") && !conflict("fd00::2", "0.0.0.0"));
        assert!(conflict("fd00::2", "fd00::2") && !conflict("fd00::2", "fd00::3"));
    }

    #[test]
    fn both_families_of_a_port_are_held_apart() {
        let port = free_port();
        let key = |address: IpAddr| PublishedKey { address, port, protocol: Protocol::Tcp };
        let both = [key(Ipv4Addr::UNSPECIFIED.into()), key(Ipv6Addr::UNSPECIFIED.into())].into();
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&both).unwrap();
        reservations.commit(prepared, &both);
        for address in ["127.0.0.1", "::1"] {
            let address: IpAddr = address.parse().unwrap();
            let error = TcpListener::bind((address, port)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
        }

        let server = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let key = |address: IpAddr| PublishedKey { address, port, protocol: Protocol::Tcp };
        let both = [key(Ipv4Addr::UNSPECIFIED.into()), key(Ipv6Addr::UNSPECIFIED.into())].into();
        let error = reservations.prepare(&both).unwrap_err().to_string();
        assert!(error.starts_with(&format!("tcp [::]:{port} is in use by ")), "{error}");
        assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
        assert!(becomes_free(port));
    }
}
