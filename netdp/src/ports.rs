//! Published ports, kept from the host's other programs.
//!
//! Owns the look at who has a port already, and, where the backend keeps nobody off a published port,
//! a bound socket for each: nobody else can bind it, and nobody answers on it. Packets to it are the
//! dataplane's, this module never sees one.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
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
        sockopt::{IpFreebind, Ipv6V6Only, RcvBuf, ReuseAddr},
    },
};
use thiserror::Error;

use crate::{
    difference::Step,
    model::{Protocol, PublishedKey},
    netlink::sockets::{self, Bound},
    runs::Runs,
};

/// Enough for every TCP and UDP port of two addresses.
const OPEN_FILES: u64 = 262_144 + 4096;

/// Files that published ports leave for requests, the store, the kernel's tables and other programs.
const SPARE_FILES: u64 = 128;

/// Most ports that are had for a moment, one by one.
const FEW: usize = 64;

/// Most ports in use that an error names with their holders.
const NAMED: usize = 16;

/// Who keeps programs of the host off published ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeper {
    /// The backend, those of TCP and UDP.
    Backend,
    /// We, with a socket for each.
    Sockets,
}

impl Keeper {
    /// Whether a port needs a socket of ours.
    fn wants_socket(self, key: PublishedKey) -> bool {
        // The kernel asks nobody when an SCTP socket is bound.
        self == Self::Sockets || key.protocol == Protocol::Sctp
    }
}

/// The ports that we hold.
#[derive(Debug, Default)]
pub struct Reservations {
    held: Runs<PublishedKey, ()>,
    /// Of those that need one, and can have it.
    sockets: BTreeMap<PublishedKey, OwnedFd>,
}

/// Ports taken for a change that may still fail; dropped, they are free again.
#[derive(Debug, Default)]
pub struct Prepared {
    taken: Vec<PublishedKey>,
    sockets: BTreeMap<PublishedKey, OwnedFd>,
    /// Keep ports free until the backend does.
    meanwhile: Vec<OwnedFd>,
    /// Those that were only looked for.
    doubtful: Vec<PublishedKey>,
}

impl Prepared {
    /// Ports that others could have taken since: [`Reservations::check`] tells.
    pub fn doubtful(&self) -> &[PublishedKey] {
        &self.doubtful
    }
}

/// A port that somebody else has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// The port.
    pub key: PublishedKey,
    /// Who has it, as far as `/proc` tells.
    pub holder: Holder,
}

/// Why ports could not be had.
#[derive(Debug, Error)]
pub enum PortError {
    /// Somebody else has these.
    #[error("{}", in_use(.0))]
    InUse(Vec<InUse>),
    /// The kernel refused for another reason.
    #[error("reserve {}: {error}{}", endpoint(.key), advice(.error))]
    Refused {
        /// The port.
        key: PublishedKey,
        /// Why.
        error: io::Error,
    },
    /// The kernel does not say who has which port.
    #[error("look for ports in use: {0:#}")]
    Unknown(anyhow::Error),
}

/// Names all ports, and the holders of the first.
fn in_use(ports: &[InUse]) -> String {
    let named = |(index, InUse { key, holder }): (usize, &InUse)| {
        let is_in = if index == 0 { "is in use" } else { "" };
        [&endpoint(key), is_in, "by", &holder.to_string()].join(" ").replace("  ", " ")
    };
    let mut list: Vec<String> = ports.iter().take(NAMED).enumerate().map(named).collect();
    list.extend(ports.iter().skip(NAMED).map(|port| endpoint(&port.key)));
    let advice = match ports {
        [_] => "choose another port or stop it",
        _ => "choose other ports or stop them",
    };
    format!("{}: {advice}", list.join(", "))
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
    /// takes one or two where the backend keeps none.
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
    /// Names the ports that could not be had, and who has them.
    pub fn prepare(
        &self,
        wanted: &Runs<PublishedKey, ()>,
        keeper: Keeper,
    ) -> Result<Prepared, PortError> {
        let missing = self.missing(wanted, keeper);
        let mut sockets = missing.iter().filter(|&&key| keeper.wants_socket(key));
        if let Some(&key) = sockets.next()
            && !has_room(1 + sockets.count())
        {
            return Err(PortError::Refused { key, error: Errno::EMFILE.into() });
        }
        let (prepared, mut failures) = take(missing, keeper);
        let mut in_use = Vec::new();
        while let Some(failure) = failures.pop() {
            match failure {
                PortError::InUse(ports) => in_use.extend(ports),
                other => return Err(other),
            }
        }
        if !in_use.is_empty() {
            in_use.sort_by_key(|port| port.key);
            return Err(PortError::InUse(in_use));
        }
        Ok(prepared)
    }

    /// Looks again whether somebody has one of those that are [doubtful](Prepared::doubtful): between
    /// the first look and the backend's word they were free to be had.
    ///
    /// # Errors
    /// As [`Reservations::prepare`].
    pub fn check(doubtful: &[PublishedKey]) -> Result<(), PortError> {
        match taken_by_others(doubtful)? {
            ports if ports.is_empty() => Ok(()),
            ports => Err(PortError::InUse(ports)),
        }
    }

    /// Holds exactly `wanted` from now on, as far as it was prepared or held before.
    pub fn commit(&mut self, prepared: Prepared, wanted: &Runs<PublishedKey, ()>) {
        // The backend keeps the others from now on.
        self.add(prepared);
        self.give_up_others(wanted);
    }

    /// Holds as much of `wanted` as can be had, gives up the rest, and says what could not be had.
    pub fn hold(&mut self, wanted: &Runs<PublishedKey, ()>, keeper: Keeper) -> Vec<PortError> {
        self.give_up_others(wanted);
        let (prepared, failures) = take(self.missing(wanted, keeper), keeper);
        self.add(prepared);
        failures
    }

    fn add(&mut self, Prepared { taken, sockets, .. }: Prepared) {
        self.held.extend(taken.into_iter().map(|key| (key, ())));
        self.sockets.extend(sockets);
    }

    /// Runs `take`, which binds a socket of ours beside the one that holds the port: with SO_REUSEADDR
    /// on both they don't conflict, and for no longer than that. Once ours listens, or has no such
    /// option any more, nobody else's can join them.
    ///
    /// # Errors
    /// Those of `take`, and of the option.
    pub fn share<T>(
        &self,
        key: PublishedKey,
        take: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let on_all = match key.address {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        let holders = [key, PublishedKey { address: on_all, ..key }];
        let holders: Vec<&OwnedFd> =
            holders.iter().filter_map(|key| self.sockets.get(key)).collect();
        let set = |is_shared: bool| {
            holders.iter().try_for_each(|holder| setsockopt(holder, ReuseAddr, &is_shared))
        };
        set(true)?;
        let taken = take();
        set(false)?;
        taken
    }

    /// Holds nothing but `wanted`.
    fn give_up_others(&mut self, wanted: &Runs<PublishedKey, ()>) {
        let others: Vec<_> = self
            .held
            .steps(wanted)
            .filter_map(|step| match step {
                Step::Remove(key) => Some(key),
                Step::Put(..) => None,
            })
            .collect();
        for key in others {
            self.held.remove(key);
            self.sockets.remove(&key);
        }
    }

    /// Those of `wanted` that are not held, or lack the socket that they need by now.
    fn missing(&self, wanted: &Runs<PublishedKey, ()>, keeper: Keeper) -> Vec<PublishedKey> {
        let new = self.held.steps(wanted).filter_map(|step| match step {
            Step::Put(key, ()) => Some(key),
            Step::Remove(_) => None,
        });
        if keeper == Keeper::Backend {
            return new.collect();
        }
        let lacks_socket = |&key: &PublishedKey| {
            let is_held = self.held.contains_key(key);
            !is_held || key.protocol != Protocol::Sctp && !self.sockets.contains_key(&key)
        };
        wanted.keys().filter(lacks_socket).collect()
    }
}

/// Whether this process may open as many files as so many ports take.
fn has_room(ports: usize) -> bool {
    let open = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let may_open = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    most_ports(open as u64, may_open) >= ports as u64
}

/// Most ports that leave some files for all else: without one the agent could not even take a request
/// to give ports back. Each may take two, one where it is kept and one where it is served at loopback
/// addresses.
fn most_ports(open: u64, may_open: u64) -> u64 {
    may_open.saturating_sub(open + SPARE_FILES) / 2
}

/// Takes what can be had, and says what can't.
fn take(wanted: Vec<PublishedKey>, keeper: Keeper) -> (Prepared, Vec<PortError>) {
    let (ours, backends): (Vec<_>, Vec<_>) =
        wanted.into_iter().partition(|&key| keeper.wants_socket(key));
    let (mut prepared, mut failures) = (Prepared::default(), Vec::new());
    for key in ours {
        match reserve(key) {
            Ok(socket) => {
                prepared.taken.push(key);
                prepared.sockets.extend(socket.map(|socket| (key, socket)));
            }
            Err(error) => failures.push(error),
        }
    }
    // To have a few for a moment is faster than to look at all sockets of the host, and sure. One that
    // can't be had is not always somebody's: a closed connection keeps its port for a minute.
    let mut doubtful = backends;
    if doubtful.len() <= FEW {
        doubtful.retain(|&key| match bound_socket(key) {
            Ok(socket) => {
                prepared.taken.push(key);
                prepared.meanwhile.push(socket);
                false
            }
            Err(_) => true,
        });
    }
    match taken_by_others(&doubtful) {
        Ok(in_use) => {
            let others: BTreeSet<_> = in_use.iter().map(|port| port.key).collect();
            doubtful.retain(|key| !others.contains(key));
            prepared.taken.extend(&doubtful);
            prepared.doubtful = doubtful;
            failures.extend((!in_use.is_empty()).then_some(PortError::InUse(in_use)));
        }
        Err(error) => failures.push(error),
    }
    (prepared, failures)
}

/// Which of these ports sockets of the host have, and whose they are.
fn taken_by_others(keys: &[PublishedKey]) -> Result<Vec<InUse>, PortError> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let mut by_port: HashMap<(u8, u16), Vec<Bound>> = HashMap::new();
    for socket in sockets::bound().map_err(PortError::Unknown)? {
        by_port.entry((socket.protocol, socket.port)).or_default().push(socket);
    }
    let conflict = |key: &PublishedKey| {
        let sockets = by_port.get(&(key.protocol.number(), key.port))?;
        let inode = sockets.iter().find(|socket| is_conflict(socket, *key))?.inode;
        Some((*key, inode))
    };
    let conflicts: Vec<_> = keys.iter().filter_map(conflict).collect();
    let named: BTreeSet<u64> = conflicts.iter().take(NAMED).map(|(_, inode)| *inode).collect();
    let processes = if named.is_empty() { HashMap::new() } else { processes_with(&named) };
    let holder = |inode| match processes.get(&inode).cloned() {
        Some((name, pid)) => Holder::Process { name, pid },
        None => Holder::Unknown,
    };
    Ok(conflicts.into_iter().map(|(key, inode)| InUse { key, holder: holder(inode) }).collect())
}

/// Whether packets to a published port could also be meant for a socket with the same port.
fn is_conflict(socket: &Bound, key: PublishedKey) -> bool {
    let (own, wanted) = (socket.address, key.address);
    let is_wild = own.is_unspecified() || wanted.is_unspecified();
    own == wanted
        || is_wild && own.is_ipv4() == wanted.is_ipv4()
        || socket.takes_ipv4 && wanted.is_ipv4()
}

/// Binds a port without SO_REUSEADDR and without ever listening: the kernel refuses every other
/// bind with EADDRINUSE, and a connection that gets here finds a closed port. `None` where the
/// kernel has no SCTP: then nobody else can bind an SCTP port either.
fn reserve(key: PublishedKey) -> Result<Option<OwnedFd>, PortError> {
    match bound_socket(key) {
        Ok(socket) => Ok(Some(socket)),
        Err(Errno::EPROTONOSUPPORT) if key.protocol == Protocol::Sctp => Ok(None),
        Err(Errno::EADDRINUSE) => Err(PortError::InUse(vec![InUse { key, holder: holder(key) }])),
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
    let owned = sockets.iter().map(|socket| socket.inode).filter(|inode| *inode != 0).collect();
    if let Some((name, pid)) = processes_with(&owned).into_values().next() {
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

/// The processes that have sockets of these inodes open: their names and ids.
fn processes_with(inodes: &BTreeSet<u64>) -> HashMap<u64, (String, u32)> {
    let mut found = HashMap::new();
    if inodes.is_empty() {
        return found;
    }
    let inode_of =
        |target: &Path| target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        let targets = descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
        for inode in targets.filter_map(|target| inode_of(&target)) {
            if inodes.contains(&inode)
                && !found.contains_key(&inode)
                && let Ok(name) = fs::read_to_string(process.path().join("comm"))
            {
                found.insert(inode, (name.trim_end().to_owned(), pid));
            }
        }
        if found.len() == inodes.len() {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream, UdpSocket},
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    fn loopback(protocol: Protocol, port: u16) -> PublishedKey {
        PublishedKey { address: Ipv4Addr::LOCALHOST.into(), port, protocol }
    }

    fn only(keys: impl IntoIterator<Item = PublishedKey>) -> Runs<PublishedKey, ()> {
        keys.into_iter().map(|key| (key, ())).collect()
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
    fn ports_leave_files_for_requests() {
        assert_eq!(most_ports(20, 1024), (1024 - 20 - SPARE_FILES) / 2);
        assert_eq!(most_ports(1000, 1024), 0);
        assert!(most_ports(20, OPEN_FILES) >= 2 * 65_535);
    }

    #[test]
    fn a_reserved_port_can_not_be_bound_by_others() {
        let port = free_port();
        let wanted = only([Protocol::Tcp, Protocol::Udp].map(|protocol| loopback(protocol, port)));
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&wanted, Keeper::Sockets).unwrap();
        reservations.commit(prepared, &wanted);

        // The standard library sets SO_REUSEADDR, as servers do.
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
        assert_eq!(tcp.kind(), io::ErrorKind::AddrInUse);
        let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap_err();
        assert_eq!(udp.kind(), io::ErrorKind::AddrInUse);

        assert!(reservations.hold(&Runs::default(), Keeper::Sockets).is_empty());
        assert!(becomes_free(port));
    }

    #[test]
    fn a_taken_port_is_refused_with_the_name_of_its_holder() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let key = loopback(Protocol::Tcp, server.local_addr().unwrap().port());
        for keeper in [Keeper::Sockets, Keeper::Backend] {
            let prepared = Reservations::default().prepare(&only([key]), keeper);
            let error = prepared.unwrap_err().to_string();
            let start = format!("tcp 127.0.0.1:{} is in use by ", key.port);
            assert!(error.starts_with(&start), "{error}");
            assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
        }
    }

    #[test]
    fn every_port_in_use_is_named() {
        let servers: Vec<_> =
            (0..20).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
        let ports: BTreeSet<u16> =
            servers.iter().map(|server| server.local_addr().unwrap().port()).collect();
        let wanted = only(ports.iter().map(|&port| loopback(Protocol::Tcp, port)));
        for keeper in [Keeper::Sockets, Keeper::Backend] {
            let error = Reservations::default().prepare(&wanted, keeper).unwrap_err().to_string();
            for port in &ports {
                assert!(error.contains(&format!("127.0.0.1:{port}")), "{port}: {error}");
            }
            assert!(error.ends_with(": choose other ports or stop them"), "{error}");
        }
    }

    #[test]
    fn what_the_backend_keeps_takes_no_socket() {
        let port = free_port();
        let wanted = only([loopback(Protocol::Tcp, port)]);
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&wanted, Keeper::Backend).unwrap();
        reservations.commit(prepared, &wanted);
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        // What is held is not looked at again, until it takes a socket.
        assert!(reservations.hold(&wanted, Keeper::Backend).is_empty());
        assert_eq!(reservations.hold(&wanted, Keeper::Sockets).len(), 1);
        drop(server);
        assert!(becomes_free(port));
        assert!(reservations.hold(&wanted, Keeper::Sockets).is_empty());
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
    }

    #[test]
    fn a_port_that_closed_connections_have_is_free_and_looked_for_again() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let mut client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        // Who closes first has the port for a minute.
        drop(server.accept().unwrap());
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        drop((client, server));
        let (closed, other) = (loopback(Protocol::Tcp, port), loopback(Protocol::Udp, port));
        let wanted = only([closed, other]);
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&wanted, Keeper::Backend).unwrap();
        assert_eq!(prepared.doubtful(), [closed]);
        // The other one is had by a socket of ours, which is no reason against it.
        Reservations::check(prepared.doubtful()).unwrap();
        UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).unwrap_err();
        reservations.commit(prepared, &wanted);
        assert!(reservations.hold(&wanted, Keeper::Backend).is_empty());

        // Somebody comes between the two looks; servers don't mind closed connections.
        let prepared = Reservations::default().prepare(&wanted, Keeper::Backend).unwrap();
        let _server = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        Reservations::check(prepared.doubtful()).unwrap_err();
    }

    #[test]
    fn all_or_none_are_taken() {
        let server = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let taken = loopback(Protocol::Udp, server.local_addr().unwrap().port());
        let free = loopback(Protocol::Tcp, free_port());
        let reservations = Reservations::default();
        reservations.prepare(&only([taken, free]), Keeper::Sockets).unwrap_err();
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
        let wanted = only([loopback(Protocol::Sctp, free_port())]);
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&wanted, Keeper::Sockets).unwrap();
        reservations.commit(prepared, &wanted);
        let kernel_has_sctp = fs::read_to_string("/proc/net/protocols").unwrap().contains("SCTP");
        let sockets = reservations.sockets.len();
        assert_eq!(sockets, usize::from(kernel_has_sctp));
        // Whoever comes second is refused, if anybody can come.
        let second = Reservations::default().prepare(&wanted, Keeper::Backend);
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
        let both = only([key(Ipv4Addr::UNSPECIFIED.into()), key(Ipv6Addr::UNSPECIFIED.into())]);
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&both, Keeper::Sockets).unwrap();
        reservations.commit(prepared, &both);
        for address in ["127.0.0.1", "::1"] {
            let address: IpAddr = address.parse().unwrap();
            let error = TcpListener::bind((address, port)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{address}");
        }

        let server = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let key = |address: IpAddr| PublishedKey { address, port, protocol: Protocol::Tcp };
        let both = only([key(Ipv4Addr::UNSPECIFIED.into()), key(Ipv6Addr::UNSPECIFIED.into())]);
        let error = reservations.prepare(&both, Keeper::Sockets).unwrap_err().to_string();
        assert!(error.starts_with(&format!("tcp [::]:{port} is in use by ")), "{error}");
        assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
        assert!(becomes_free(port));
    }
}
