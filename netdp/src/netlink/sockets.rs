//! Sockets of the host, by `sock_diag`: listing those that have a port, and ending connected ones
//! (Linux 4.5, `CONFIG_INET_DIAG_DESTROY`).
//!
//! Owns the socket and the messages. Which sockets have to end, and which ports matter, is the
//! caller's to say.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4},
    ops::RangeInclusive,
    os::fd::AsRawFd,
};

use anyhow::{Context, Result};
use netlink_packet_sock_diag::{
    SOCK_DESTROY, SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP},
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, bind, getsockname, socket,
};
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG},
};

/// `TCPF_BOUND_INACTIVE` (net/tcp_states.h).
const BOUND_INACTIVE: StateFlags = StateFlags::from_bits_retain(1 << 13);

/// A socket of the host that is connected to somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    /// The kernel's name of it.
    pub cookie: u64,
    /// Whom it is connected to; an IPv4-mapped address is an IPv4 one.
    pub peer: IpAddr,
}

/// Ends the connected TCP and UDP sockets of the calling thread's namespace that `is_doomed` says:
/// whoever has one gets ECONNABORTED. Blocks for as long as the kernel takes to list its sockets.
/// Returns how many.
///
/// # Errors
/// The kernel does not list sockets, or does not end them.
pub fn destroy(is_doomed: impl Fn(&Connected) -> bool) -> Result<usize> {
    let mut diagnosis = Diagnosis::open().context("open a socket diagnosis netlink socket")?;
    let mut destroyed = 0;
    for family in [AF_INET, AF_INET6] {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            let mut sockets = Vec::new();
            is_listed(diagnosis.connected(family, protocol, &mut sockets))?;
            for id in sockets {
                let cookie = u64::from_ne_bytes(id.cookie);
                let peer = id.destination_address.to_canonical();
                if is_doomed(&Connected { cookie, peer }) {
                    let ended = diagnosis.destroy(family, protocol, id);
                    destroyed += usize::from(ended.context(
                        "end a socket of the host: the kernel needs CONFIG_INET_DIAG_DESTROY",
                    )?);
                }
            }
        }
    }
    Ok(destroyed)
}

/// Whether the kernel ends sockets when it is told to: asks it to end one that nobody has.
///
/// # Errors
/// The kernel gives no socket to ask by.
pub fn can_destroy() -> Result<bool> {
    let mut diagnosis = Diagnosis::open().context("open a socket diagnosis netlink socket")?;
    // Port 0 is nobody's.
    Ok(diagnosis.destroy(AF_INET, IPPROTO_TCP, SocketId::new_v4()).is_ok())
}

/// A socket of the host that has a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// IP protocol number.
    pub protocol: u8,
    /// Its own address; an IPv4-mapped one is an IPv4 one.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether it has the port of every IPv4 address, too: it is bound to `::`, and not to IPv6
    /// alone.
    pub takes_ipv4: bool,
    /// Inode of its file; 0 where no file belongs to it any more.
    pub inode: u64,
}

/// The TCP and UDP sockets of the calling thread's namespace that have a port, but for what is only
/// remembered of closed connections. A TCP socket that is bound and neither listens nor is
/// connected is among them from Linux 6.8 on. Blocks for as long as the kernel takes.
///
/// # Errors
/// The kernel does not list sockets.
pub fn bound() -> Result<Vec<Bound>> {
    let mut sockets = Vec::new();
    each_bound(|protocol, InetResponse { header, nlas }| {
        let address = header.socket_id.source_address;
        // The kernel tells of sockets that listen or are not connected; others have an address of
        // their own.
        let is_ipv6_only = nlas.iter().any(|nla| matches!(nla, Nla::SkV6Only(true)));
        sockets.push(Bound {
            protocol,
            address: address.to_canonical(),
            port: header.socket_id.source_port,
            takes_ipv4: address == Ipv6Addr::UNSPECIFIED && !is_ipv6_only,
            inode: header.inode.into(),
        });
    })?;
    Ok(sockets)
}

/// Whether none of these sockets has one of these ports; `false`, too, where the kernel does not list
/// both protocols. Who begins to listen in the middle may be missed. Blocks for as long as the
/// kernel takes.
///
/// # Errors
/// The kernel does not list sockets.
pub fn have_none_of(ports: &RangeInclusive<u16>) -> Result<bool> {
    let mut are_free = true;
    let is_complete =
        each_bound(|_, socket| are_free &= !ports.contains(&socket.header.socket_id.source_port))?;
    Ok(are_free && is_complete)
}

/// Whether the kernel shows sockets that are bound and no more: looks for one of ours.
///
/// # Errors
/// The kernel gives no socket, or does not list them.
pub fn are_all_shown() -> Result<bool> {
    let example =
        socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)
            .context("open a socket")?;
    let anywhere = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    bind(example.as_raw_fd(), &anywhere).context("bind a socket")?;
    let own = getsockname::<SockaddrIn>(example.as_raw_fd()).context("ask for its port")?.port();
    let mut is_shown = false;
    let mut diagnosis = Diagnosis::open().context("open a socket diagnosis netlink socket")?;
    diagnosis
        .list(AF_INET, IPPROTO_TCP, BOUND_INACTIVE, |socket| {
            is_shown |= socket.header.socket_id.source_port == own;
        })
        .context("list sockets")?;
    Ok(is_shown)
}

/// Shows the sockets that [`bound`] is about, each with its IP protocol number. Returns whether the kernel
/// lists sockets of both protocols: `CONFIG_INET_UDP_DIAG` is an option of its own.
fn each_bound(mut each: impl FnMut(u8, InetResponse)) -> Result<bool> {
    let mut diagnosis = Diagnosis::open().context("open a socket diagnosis netlink socket")?;
    let states = StateFlags::all().difference(StateFlags::TIME_WAIT) | BOUND_INACTIVE;
    let mut is_complete = true;
    for family in [AF_INET, AF_INET6] {
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            let listed =
                diagnosis.list(family, protocol, states.clone(), |socket| each(protocol, socket));
            is_complete &= is_listed(listed)?;
        }
    }
    Ok(is_complete)
}

/// Whether there was a list; a kernel that has none of a protocol is no error.
fn is_listed(listed: io::Result<()>) -> Result<bool> {
    match listed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).context("list sockets"),
    }
}

struct Diagnosis(Socket);

impl Diagnosis {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Adds the ids of all connected sockets of a family and a protocol.
    fn connected(&mut self, family: u8, protocol: u8, ids: &mut Vec<SocketId>) -> io::Result<()> {
        // Neither listening nor unconnected nor a mere memory of one.
        let states = StateFlags::all()
            .difference(StateFlags::LISTEN | StateFlags::CLOSE | StateFlags::TIME_WAIT);
        self.list(family, protocol, states, |socket| ids.push(socket.header.socket_id))
    }

    /// Shows all sockets of a family and a protocol in these states.
    fn list(
        &mut self,
        family: u8,
        protocol: u8,
        states: StateFlags,
        each: impl FnMut(InetResponse),
    ) -> io::Result<()> {
        let any = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
        let request = InetRequest {
            family,
            protocol,
            extensions: ExtensionFlags::empty(),
            states,
            socket_id: any,
        };
        self.send(NLM_F_DUMP, None, request)?;
        self.answers(each)
    }

    /// `false` where the socket has ended by itself.
    fn destroy(&mut self, family: u8, protocol: u8, socket_id: SocketId) -> io::Result<bool> {
        let (extensions, states) = (ExtensionFlags::empty(), StateFlags::all());
        let request = InetRequest { family, protocol, extensions, states, socket_id };
        self.send(NLM_F_ACK, Some(SOCK_DESTROY), request)?;
        match self.answers(drop) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends a request as what it is, or as another one with the same contents.
    fn send(&mut self, flags: u16, kind: Option<u16>, request: InetRequest) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
        message.finalize();
        if let Some(kind) = kind {
            message.header.message_type = kind;
        }
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0).map(drop)
    }

    /// Reads answers to their end.
    fn answers(&mut self, mut each: impl FnMut(InetResponse)) -> io::Result<()> {
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                // Messages begin at multiples of four (linux/netlink.h, NLMSG_ALIGN).
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                match message.payload {
                    NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket)) => {
                        each(*socket);
                    }
                    // A list that could not be made ends like one that is empty, but for this.
                    NetlinkPayload::Done(end) if end.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-end.code));
                    }
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{SocketAddrV6, TcpListener, TcpStream, UdpSocket},
        os::fd::AsRawFd,
    };

    use nix::sys::socket::{
        AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn6, bind, setsockopt, socket,
        sockopt::Ipv6V6Only,
    };

    use super::*;

    #[test]
    fn asking_whether_sockets_can_be_ended_ends_none() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        can_destroy().unwrap();
        assert!(client.take_error().unwrap().is_none());
    }

    #[test]
    fn sockets_that_have_a_port_are_listed() {
        let wildcard = TcpListener::bind("[::]:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let kind = (AddressFamily::Inet6, SockType::Datagram, SockFlag::SOCK_CLOEXEC);
        let only = socket(kind.0, kind.1, kind.2, SockProtocol::Udp).unwrap();
        setsockopt(&only, Ipv6V6Only, &true).unwrap();
        bind(
            only.as_raw_fd(),
            &SockaddrIn6::from(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0)),
        )
        .unwrap();
        let port = |address: io::Result<std::net::SocketAddr>| address.unwrap().port();
        let sockets = bound().unwrap();
        for (protocol, address, port, takes_ipv4) in [
            (IPPROTO_TCP, "::", port(wildcard.local_addr()), true),
            (IPPROTO_UDP, "127.0.0.1", port(udp.local_addr()), false),
            (IPPROTO_UDP, "::", port(UdpSocket::from(only).local_addr()), false),
        ] {
            let address: IpAddr = address.parse().unwrap();
            let found = sockets
                .iter()
                .find(|s| (s.protocol, s.address, s.port) == (protocol, address, port))
                .unwrap_or_else(|| panic!("{protocol} {address} {port}"));
            assert_eq!(found.takes_ipv4, takes_ipv4, "{found:?}");
            assert_ne!(found.inode, 0);
        }
    }

    #[test]
    fn ports_are_free_that_no_socket_has() {
        let tcp = TcpListener::bind("[::]:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        for port in [tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port()] {
            assert!(!have_none_of(&(port..=port)).unwrap(), "{port}");
        }
        // Nobody is given port 1 who does not ask for it.
        assert!(have_none_of(&(1..=1)).unwrap());
    }

    #[test]
    fn a_list_that_the_kernel_has_not_is_no_empty_one() {
        /// For experiments (RFC 3692): no protocol of the kernel's.
        const NOBODY: u8 = 254;
        let mut diagnosis = Diagnosis::open().unwrap();
        let listed = diagnosis.list(AF_INET, NOBODY, StateFlags::all(), drop);
        assert_eq!(listed.as_ref().unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!is_listed(listed).unwrap());
    }

    #[test]
    fn nothing_ends_that_nobody_named() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(peer.local_addr().unwrap()).unwrap();
        let mut seen = std::cell::Cell::new(0);
        assert_eq!(
            destroy(|socket| {
                seen.set(seen.get() + usize::from(socket.peer.is_loopback()));
                false
            })
            .unwrap(),
            0
        );
        assert!(*seen.get_mut() >= 3, "both ends of a connection and a connected UDP socket");
        let mut accepted = server.accept().unwrap().0;
        accepted.set_nonblocking(true).unwrap();
        assert_eq!(accepted.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
