//! TCP: a server that witnesses, single exchanges, sessions that stay open, continuous traffic.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    Endpoint, Failure, PATIENCE, SHORT_PATIENCE, TCP_PAYLOAD_BYTES, Witness, bind_once_free,
    check_reply, encode_reply, expect_failure, locked, payload,
};
use crate::namespace::Namespace;
use crate::runtime::{patient, poll_until};

/// Largest request a server accepts, in bytes.
const MAX_REQUEST_BYTES: u32 = 64 << 20;

impl Namespace {
    /// Starts a server that answers every exchange with what it saw, until dropped.
    ///
    /// # Errors
    /// When the address can't be bound.
    pub fn tcp_server(&self, name: &str, address: impl Endpoint) -> Result<TcpServer> {
        let address = address.endpoint();
        let listener = self.run(|| {
            bind_once_free(|| TcpListener::bind(address))
                .with_context(|| format!("bind tcp {address} in {}", self.name()))
        })?;
        TcpServer::start(name.to_owned(), listener)
    }

    /// Prepares a TCP probe to `destination`.
    #[must_use]
    pub fn tcp(&self, destination: impl Endpoint) -> TcpProbe {
        TcpProbe {
            namespace: self.clone(),
            destination: destination.endpoint(),
            source: None,
            bytes: TCP_PAYLOAD_BYTES,
            patience: patient(PATIENCE),
        }
    }
}

/// A listening server; dropping it closes its connections.
#[derive(Debug)]
pub struct TcpServer {
    listener: TcpListener,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    stopping: AtomicBool,
    accepted: Mutex<Vec<SocketAddr>>,
    connections: Mutex<Vec<(TcpStream, JoinHandle<()>)>>,
}

impl TcpServer {
    fn start(name: String, listener: TcpListener) -> Result<Self> {
        let shared = Arc::new(Shared {
            name,
            stopping: AtomicBool::new(false),
            accepted: Mutex::default(),
            connections: Mutex::default(),
        });
        let incoming = listener.try_clone().context("clone a listener")?;
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept_all(&incoming, &shared)
        });
        Ok(Self { listener, shared, acceptor: Some(acceptor) })
    }

    /// The address and port it listens on.
    ///
    /// # Errors
    /// When the socket can't say.
    pub fn address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().context("read a listener's address")
    }

    /// Every client address accepted so far, as the server saw it.
    #[must_use]
    pub fn accepted(&self) -> Vec<SocketAddr> {
        locked(&self.shared.accepted).clone()
    }

    /// Ends when all clients have closed their connections, which no end of the server's then keeps in
    /// TIME_WAIT: its port is free at once.
    ///
    /// # Errors
    /// When a client has not.
    pub fn end_after_clients(self) -> Result<()> {
        poll_until(PATIENCE, "the clients to close their connections", || {
            let connections = locked(&self.shared.connections);
            let is_known = connections.len() == locked(&self.shared.accepted).len();
            let is_over = connections.iter().all(|(_, thread)| thread.is_finished());
            Ok((is_known && is_over).then_some(()))
        })
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // On Linux, shutdown of a listener wakes its accept with EINVAL.
        let woken =
            nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let (Ok(()), Some(acceptor)) = (woken, self.acceptor.take()) {
            acceptor.join().ok();
        }
        let connections = std::mem::take(&mut *locked(&self.shared.connections));
        for (stream, _) in &connections {
            stream.shutdown(Shutdown::Both).ok();
        }
        for (_, thread) in connections {
            thread.join().ok();
        }
    }
}

fn accept_all(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((stream, peer)) = listener.accept() {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        locked(&shared.accepted).push(peer);
        let Ok(kept) = stream.try_clone() else { return };
        let name = shared.name.clone();
        let thread = thread::spawn(move || {
            // The client notices whatever ends this: it reports, the server only stops.
            serve(&name, &stream, peer).ok();
            stream.shutdown(Shutdown::Both).ok();
        });
        locked(&shared.connections).push((kept, thread));
    }
}

fn serve(name: &str, mut stream: &TcpStream, peer: SocketAddr) -> Result<()> {
    let local = stream.local_addr()?;
    loop {
        let length = read_length(&mut stream)?;
        if length > MAX_REQUEST_BYTES {
            return Err(anyhow!("read a request of {length} bytes"));
        }
        let mut request = vec![0; length as usize];
        stream.read_exact(&mut request)?;
        stream.write_all(&encode_reply(name, peer, local, request)?)?;
    }
}

fn read_length(stream: &mut impl Read) -> std::io::Result<u32> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    Ok(u32::from_be_bytes(length))
}

/// A TCP connection to be opened.
#[derive(Clone, Debug)]
pub struct TcpProbe {
    namespace: Namespace,
    destination: SocketAddr,
    source: Option<SocketAddr>,
    bytes: usize,
    patience: Duration,
}

impl TcpProbe {
    /// Binds the client; port 0 leaves the port to the kernel.
    #[must_use]
    pub fn from(mut self, source: impl Endpoint) -> Self {
        self.source = Some(source.endpoint());
        self
    }

    /// Sets the payload of an exchange, each way.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets how long to wait for the connection.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patient(patience);
        self
    }

    /// Connects, sends the payload, and checks the answer.
    ///
    /// # Errors
    /// A [`Failure`], in context.
    pub fn exchange(&self) -> Result<Exchange> {
        self.open()?.exchange(self.bytes)
    }

    /// Connects and keeps the connection.
    ///
    /// # Errors
    /// A [`Failure`], in context.
    pub fn open(&self) -> Result<TcpSession> {
        let stream = self
            .namespace
            .run(|| self.connect().map_err(Failure::from).with_context(|| self.to_string()))?;
        Ok(TcpSession { stream, title: self.to_string(), exchanges: 0 })
    }

    fn connect(&self) -> std::io::Result<TcpStream> {
        let socket =
            Socket::new(Domain::for_address(self.destination), Type::STREAM, Some(Protocol::TCP))?;
        if let Some(source) = self.source {
            socket.set_reuse_address(true)?;
            socket.bind(&source.into())?;
        }
        socket.connect_timeout(&self.destination.into(), self.patience)?;
        socket.set_read_timeout(Some(patient(PATIENCE)))?;
        socket.set_write_timeout(Some(patient(PATIENCE)))?;
        Ok(socket.into())
    }

    /// Fails unless connecting is refused.
    ///
    /// # Errors
    /// When it succeeds, or fails in another way.
    pub fn refused(&self) -> Result<()> {
        expect_failure(self.open(), &Failure::Refused, &self.to_string())
    }

    /// Fails unless connecting meets silence.
    ///
    /// # Errors
    /// When it succeeds, or fails in another way.
    pub fn dropped(&self) -> Result<()> {
        let probe = Self { patience: SHORT_PATIENCE, ..self.clone() };
        expect_failure(probe.open(), &Failure::TimedOut, &self.to_string())
    }
}

impl std::fmt::Display for TcpProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tcp {} → {}", self.namespace.name(), self.destination)
    }
}

/// What both ends of a TCP connection saw.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// The client's own address and port.
    pub client_local: SocketAddr,
    /// What the client believes it talks to.
    pub client_peer: SocketAddr,
    /// The server's view.
    pub witness: Witness,
    /// Payload bytes, each way.
    pub bytes: usize,
}

impl Deref for Exchange {
    type Target = Witness;

    fn deref(&self) -> &Witness {
        &self.witness
    }
}

/// An open connection.
#[derive(Debug)]
pub struct TcpSession {
    stream: TcpStream,
    title: String,
    exchanges: u64,
}

impl TcpSession {
    /// Sends `bytes` bytes and checks the answer.
    ///
    /// # Errors
    /// A [`Failure`], in context.
    pub fn exchange(&mut self, bytes: usize) -> Result<Exchange> {
        self.exchanges += 1;
        let title = format!("{}, exchange {}", self.title, self.exchanges);
        self.try_exchange(bytes).context(title)
    }

    fn try_exchange(&self, bytes: usize) -> Result<Exchange, Failure> {
        let mut stream = &self.stream;
        let request = payload(self.exchanges, bytes);
        let length = u32::try_from(bytes).map_err(|error| Failure::Other(error.to_string()))?;
        stream.write_all(&length.to_be_bytes())?;
        stream.write_all(&request)?;
        let mut witness = vec![0; read_length(&mut stream)? as usize];
        stream.read_exact(&mut witness)?;
        let mut echo = vec![0; bytes];
        stream.read_exact(&mut echo)?;
        Ok(Exchange {
            client_local: stream.local_addr()?,
            client_peer: stream.peer_addr()?,
            witness: check_reply(&request, &witness, echo)?,
            bytes,
        })
    }

    /// Goes on exchanging on a thread of its own until told to stop.
    #[must_use]
    pub fn into_traffic(mut self, bytes: usize) -> Traffic {
        let progress = Arc::new(Progress::default());
        let thread = thread::spawn({
            let progress = Arc::clone(&progress);
            move || {
                let mut report = TrafficReport::default();
                while !progress.stopping.load(Ordering::SeqCst) {
                    let start = Instant::now();
                    if let Err(error) = self.exchange(bytes) {
                        *locked(&progress.failure) = Some(format!("{error:#}"));
                        return Err(error);
                    }
                    report.longest_stall = report.longest_stall.max(start.elapsed());
                    report.exchanges += 1;
                    progress.exchanges.store(report.exchanges, Ordering::SeqCst);
                }
                Ok(report)
            }
        });
        Traffic { progress, thread }
    }
}

#[derive(Debug, Default)]
struct Progress {
    stopping: AtomicBool,
    exchanges: AtomicU64,
    failure: Mutex<Option<String>>,
}

/// A session that exchanges without pause.
#[derive(Debug)]
pub struct Traffic {
    progress: Arc<Progress>,
    thread: JoinHandle<Result<TrafficReport>>,
}

/// What happened to continuous traffic.
#[derive(Clone, Copy, Debug, Default)]
pub struct TrafficReport {
    /// Exchanges that succeeded.
    pub exchanges: u64,
    /// The longest single exchange.
    pub longest_stall: Duration,
}

impl Traffic {
    /// Exchanges that succeeded so far.
    #[must_use]
    pub fn exchanges(&self) -> u64 {
        self.progress.exchanges.load(Ordering::SeqCst)
    }

    /// What has ended the traffic, if something has.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        locked(&self.progress.failure).clone()
    }

    /// Ends the traffic and says how it went.
    ///
    /// # Errors
    /// The [`Failure`] that ended it before, in context.
    pub fn stop(self) -> Result<TrafficReport> {
        self.progress.stopping.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| anyhow!("join a traffic thread: it panicked"))?
    }
}
