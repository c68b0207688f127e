//! UDP: a server that witnesses, unconnected clients that see who really answers.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{InterfaceIndexOrAddress, SockRef};

use super::{
    Address, Endpoint, Failure, PATIENCE, SHORT_PATIENCE, Witness, any_address, bind_once_free,
    check_reply, encode_reply, expect_failure, locked, payload, set_fragmentation,
};
use crate::namespace::Namespace;
use crate::runtime::patient;

/// Larger than any UDP payload over IPv4.
const BUFFER_BYTES: usize = 1 << 16;

impl Namespace {
    /// Starts a server that answers every datagram with what it saw, until dropped.
    ///
    /// # Errors
    /// When the address can't be bound.
    pub fn udp_server(&self, name: &str, address: impl Endpoint) -> Result<UdpServer> {
        let address = address.endpoint();
        let socket = self.run(|| {
            bind_once_free(|| UdpSocket::bind(address))
                .with_context(|| format!("bind udp {address} in {}", self.name()))
        })?;
        UdpServer::start(self.clone(), name.to_owned(), socket)
    }

    /// Prepares a UDP probe to `destination`.
    #[must_use]
    pub fn udp(&self, destination: impl Endpoint) -> UdpProbe {
        let destination = destination.endpoint();
        UdpProbe {
            namespace: self.clone(),
            destination,
            source: any_address(destination),
            bytes: 64,
            patience: patient(PATIENCE),
            dont_fragment: false,
            connected: false,
        }
    }
}

/// A datagram as it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Where it came from.
    pub peer: SocketAddr,
    /// Its payload.
    pub bytes: usize,
}

/// A server on one UDP socket.
#[derive(Debug)]
pub struct UdpServer {
    namespace: Namespace,
    socket: UdpSocket,
    stopping: Arc<AtomicBool>,
    received: Arc<Mutex<Vec<Datagram>>>,
    thread: Option<JoinHandle<()>>,
}

impl UdpServer {
    fn start(namespace: Namespace, name: String, socket: UdpSocket) -> Result<Self> {
        let received = Arc::new(Mutex::new(Vec::new()));
        let stopping = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (received, stopping) = (Arc::clone(&received), Arc::clone(&stopping));
            let socket = socket.try_clone().context("clone a socket")?;
            move || {
                let mut buffer = vec![0; BUFFER_BYTES];
                loop {
                    // A receive that a shutdown ends has no sender, and the standard library takes
                    // whatever is on its stack for one.
                    let mut readable = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                    poll(&mut readable, PollTimeout::NONE).ok();
                    if stopping.load(Ordering::SeqCst) {
                        break;
                    }
                    // An ICMP error for an earlier reply surfaces here and is no reason to stop.
                    let Ok((bytes, peer)) = socket.recv_from(&mut buffer) else { continue };
                    locked(&received).push(Datagram { peer, bytes });
                    answer(&name, &socket, peer, &buffer[..bytes]).ok();
                }
            }
        });
        Ok(Self { namespace, socket, stopping, received, thread: Some(thread) })
    }

    /// Joins a multicast group on an interface.
    ///
    /// # Errors
    /// When there is no such interface or the kernel refuses.
    pub fn join_group(&self, group: impl Address, interface: &str) -> Result<()> {
        let group = group.address();
        let joined = self.namespace.run(|| {
            let index = if_nametoindex(interface)?;
            let socket = SockRef::from(&self.socket);
            match group {
                IpAddr::V4(group) => {
                    socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(index))?;
                }
                IpAddr::V6(group) => socket.join_multicast_v6(&group, index)?,
            }
            Ok(())
        });
        joined.with_context(|| format!("join {group} on {interface} of {}", self.namespace.name()))
    }

    /// Every datagram so far.
    #[must_use]
    pub fn received(&self) -> Vec<Datagram> {
        locked(&self.received).clone()
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        // ENOTCONN for a socket without peer, yet Linux wakes its readers.
        let wake = nix::sys::socket::Shutdown::Both;
        nix::sys::socket::shutdown(self.socket.as_raw_fd(), wake).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn answer(name: &str, socket: &UdpSocket, peer: SocketAddr, request: &[u8]) -> Result<()> {
    let reply = encode_reply(name, peer, socket.local_addr()?, request.to_vec())?;
    socket.send_to(&reply, peer).context("send a reply")?;
    Ok(())
}

/// A UDP exchange to be made.
#[derive(Clone, Debug)]
pub struct UdpProbe {
    namespace: Namespace,
    destination: SocketAddr,
    source: SocketAddr,
    bytes: usize,
    patience: Duration,
    dont_fragment: bool,
    connected: bool,
}

impl UdpProbe {
    /// Binds the client.
    #[must_use]
    pub fn from(mut self, source: impl Endpoint) -> Self {
        self.source = source.endpoint();
        self
    }

    /// Sets the size of the request; the reply is somewhat larger.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Connects the client's socket: it then hears its peer only.
    #[must_use]
    pub fn connected(mut self) -> Self {
        self.connected = true;
        self
    }

    /// Sends one datagram and checks the answer.
    ///
    /// # Errors
    /// A [`Failure`], in context.
    pub fn exchange(&self) -> Result<UdpExchange> {
        self.open()?.exchange()
    }

    /// Sends one datagram and awaits nothing.
    ///
    /// # Errors
    /// When the kernel refuses to send it.
    pub fn send(&self) -> Result<()> {
        self.open()?.send()
    }

    /// Opens the client's socket, to be used several times.
    ///
    /// # Errors
    /// When the socket can't be bound or the destination has no route.
    pub fn open(&self) -> Result<UdpSession> {
        let (socket, source) = self
            .namespace
            .run(|| self.bind().map_err(Failure::from).with_context(|| self.to_string()))?;
        Ok(UdpSession { socket, source, probe: self.clone(), exchanges: 0 })
    }

    fn bind(&self) -> std::io::Result<(UdpSocket, SocketAddr)> {
        let socket = bind_once_free(|| UdpSocket::bind(self.source))?;
        socket.set_broadcast(true)?;
        socket.set_read_timeout(Some(self.patience))?;
        set_fragmentation(&socket, self.destination.ip(), self.dont_fragment)?;
        if self.connected {
            socket.connect(self.destination)?;
        }
        let mut source = socket.local_addr()?;
        if source.ip().is_unspecified() {
            // An unconnected socket shows the real sender of a reply, but not its own address.
            let scout = UdpSocket::bind(any_address(self.destination))?;
            scout.set_broadcast(true)?;
            scout.connect(self.destination)?;
            source.set_ip(scout.local_addr()?.ip());
        }
        Ok((socket, source))
    }

    /// Fails unless the answer is port unreachable.
    ///
    /// # Errors
    /// When there is another answer, or none.
    pub fn refused(&self) -> Result<()> {
        let session = self.open()?;
        // Only a connected socket hears of ICMP errors.
        session.socket.connect(self.destination).context("connect a udp socket")?;
        expect_failure(session.answer_connected(), &Failure::Refused, &self.to_string())
    }

    /// Fails unless no answer comes.
    ///
    /// # Errors
    /// When one does.
    pub fn dropped(&self) -> Result<()> {
        let probe = Self { patience: SHORT_PATIENCE, ..self.clone() };
        expect_failure(probe.exchange(), &Failure::TimedOut, &self.to_string())
    }
}

impl std::fmt::Display for UdpProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "udp {} → {}", self.namespace.name(), self.destination)
    }
}

/// What both ends of a UDP exchange saw.
#[derive(Clone, Debug)]
pub struct UdpExchange {
    /// The client's own address and port.
    pub client_local: SocketAddr,
    /// Where the reply came from, or whom a connected socket takes for its peer.
    pub reply_from: SocketAddr,
    /// The server's view.
    pub witness: Witness,
    /// Payload bytes of the request.
    pub bytes: usize,
}

impl Deref for UdpExchange {
    type Target = Witness;

    fn deref(&self) -> &Witness {
        &self.witness
    }
}

/// A client's socket.
#[derive(Debug)]
pub struct UdpSession {
    socket: UdpSocket,
    source: SocketAddr,
    probe: UdpProbe,
    exchanges: u64,
}

impl UdpSession {
    /// Sends one datagram and checks the answer.
    ///
    /// # Errors
    /// A [`Failure`], in context.
    pub fn exchange(&mut self) -> Result<UdpExchange> {
        self.exchanges += 1;
        let title = format!("{}, exchange {}", self.probe, self.exchanges);
        self.try_exchange().context(title)
    }

    fn try_exchange(&self) -> Result<UdpExchange, Failure> {
        let request = payload(self.exchanges, self.probe.bytes);
        let mut buffer = vec![0; BUFFER_BYTES];
        let (length, reply_from) = if self.probe.connected {
            self.socket.send(&request)?;
            (self.socket.recv(&mut buffer)?, self.socket.peer_addr()?)
        } else {
            self.socket.send_to(&request, self.probe.destination)?;
            self.socket.recv_from(&mut buffer)?
        };
        let reply = &buffer[..length];
        let short = || Failure::Corrupt(format!("a reply of {length} bytes"));
        let (head, rest) = reply.split_first_chunk::<4>().ok_or_else(short)?;
        let (witness, echo) =
            rest.split_at_checked(u32::from_be_bytes(*head) as usize).ok_or_else(short)?;
        Ok(UdpExchange {
            client_local: self.source,
            reply_from,
            witness: check_reply(&request, witness, echo.to_vec())?,
            bytes: self.probe.bytes,
        })
    }

    /// Sends one datagram and awaits nothing.
    ///
    /// # Errors
    /// When the kernel refuses to send it.
    pub fn send(&self) -> Result<()> {
        let request = payload(self.exchanges, self.probe.bytes);
        self.socket
            .send_to(&request, self.probe.destination)
            .map_err(Failure::from)
            .with_context(|| self.probe.to_string())?;
        Ok(())
    }

    /// Sends on a connected socket and reports what comes back, errors included.
    fn answer_connected(&self) -> Result<usize> {
        let request = payload(self.exchanges, self.probe.bytes);
        self.socket.send(&request).map_err(Failure::from)?;
        let mut buffer = vec![0; BUFFER_BYTES];
        Ok(self.socket.recv(&mut buffer).map_err(Failure::from)?)
    }
}
