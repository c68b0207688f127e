//! Published ports at loopback addresses, for backends that can't translate those: a packet from
//! 127.0.0.1 can't leave the host, and a host that lets it (`route_localnet`) is open to its
//! neighbours (CVE-2020-8558).
//!
//! Owns a listener for each, and a task for each connection, in the agent: they end with it. Who else
//! may have the port is [`crate::ports`]' business.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdTcpListener},
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, listen,
    setsockopt, socket,
    sockopt::{Ipv6V6Only, ReuseAddr},
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UdpSocket},
    runtime::Handle,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tracing::debug;

use crate::{
    dataplane::{PublishedKey, PublishedTarget},
    model::Protocol,
    ports::Reservations,
};

/// How long a client's UDP socket towards the container is kept without a datagram (RFC 4787, 4.3).
const UDP_IDLE: Duration = Duration::from_secs(120);
/// Most clients of one UDP port at a time: each takes a socket.
const UDP_CLIENTS: usize = 1024;
/// Datagrams of one client that wait for its socket; more are lost, as on any network.
const UDP_QUEUE: usize = 64;
/// A datagram is at most this long.
const UDP_BYTES: usize = 65_535;
/// Rest after a failed accept: there are no files left, and there may be soon.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// The listeners; clones are the same ones.
#[derive(Clone, Debug, Default)]
pub struct Loopback(Arc<Mutex<BTreeMap<PublishedKey, Forwarder>>>);

/// A listener and where it leads; dropped, it ends with its connections.
#[derive(Debug)]
struct Forwarder {
    target: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Forwarder {
    /// Ends it, and returns when its socket is closed: the next one may want the port.
    fn end(mut self, runtime: &Handle) {
        self.task.abort();
        // It ends by being aborted, which is no result to look at.
        let _aborted = runtime.block_on(&mut self.task);
    }
}

/// What has to be served at loopback addresses, for these published ports. SCTP is not: the kernel
/// may have none.
pub fn wanted(
    published: impl IntoIterator<Item = (PublishedKey, PublishedTarget)>,
) -> BTreeMap<PublishedKey, SocketAddr> {
    let mut wanted = BTreeMap::new();
    for (key, target) in published {
        let loopback: IpAddr = match key.address {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let is_there = key.address.is_unspecified() || key.address.is_loopback();
        if is_there && key.protocol != Protocol::Sctp {
            let address = if key.address.is_loopback() { key.address } else { loopback };
            let target = SocketAddr::new(target.address, target.port);
            wanted.insert(PublishedKey { address, ..key }, target);
        }
    }
    wanted
}

impl Loopback {
    /// Whether nothing is served.
    pub fn is_idle(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Serves exactly these from now on, as far as they can be had, and says which could not. To be
    /// called where a tokio runtime is, on a thread that may block.
    pub fn follow(
        &self,
        wanted: &BTreeMap<PublishedKey, SocketAddr>,
        reservations: &Reservations,
    ) -> Vec<String> {
        let mut forwarders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_gone =
            |key: &PublishedKey, there: &mut Forwarder| wanted.get(key) != Some(&there.target);
        let gone: Vec<_> = forwarders.extract_if(.., is_gone).collect();
        if gone.is_empty() && wanted.is_empty() {
            return Vec::new();
        }
        let runtime = match Handle::try_current() {
            Ok(runtime) => runtime,
            Err(error) => return vec![format!("serve loopback addresses: {error}")],
        };
        for (_, forwarder) in gone {
            forwarder.end(&runtime);
        }
        let mut failures = Vec::new();
        for (&key, &target) in wanted {
            if forwarders.contains_key(&key) {
                continue;
            }
            match reservations
                .share(key, || bound(key))
                .and_then(|socket| serve(&runtime, key, socket, target))
            {
                Ok(task) => drop(forwarders.insert(key, Forwarder { target, task })),
                Err(error) => {
                    let at = SocketAddr::new(key.address, key.port);
                    failures.push(format!("serve {} {at}: {error}", key.protocol));
                }
            }
        }
        failures
    }
}

/// A socket at a loopback address, listening where its protocol does.
fn bound(key: PublishedKey) -> io::Result<OwnedFd> {
    let (kind, protocol) = match key.protocol {
        Protocol::Udp => (SockType::Datagram, SockProtocol::Udp),
        Protocol::Tcp | Protocol::Sctp => (SockType::Stream, SockProtocol::Tcp),
    };
    let family = if key.address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, kind, flags, protocol)?;
    if key.address.is_ipv6() {
        setsockopt(&socket, Ipv6V6Only, &true)?;
    }
    setsockopt(&socket, ReuseAddr, &true)?;
    let address = SocketAddr::new(key.address, key.port);
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    if key.protocol == Protocol::Tcp {
        listen(&socket, Backlog::MAXCONN)?;
    } else {
        setsockopt(&socket, ReuseAddr, &false)?;
    }
    Ok(socket)
}

fn serve(
    runtime: &Handle,
    key: PublishedKey,
    socket: OwnedFd,
    target: SocketAddr,
) -> io::Result<JoinHandle<()>> {
    let _context = runtime.enter();
    Ok(if key.protocol == Protocol::Udp {
        let listener = UdpSocket::from_std(socket.into())?;
        runtime.spawn(forward_datagrams(Arc::new(listener), target))
    } else {
        let listener = TcpListener::from_std(StdTcpListener::from(socket))?;
        runtime.spawn(forward_connections(listener, target))
    })
}

async fn forward_connections(listener: TcpListener, target: SocketAddr) {
    // Dropped with the listener, it ends them all.
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((client, _)) => drop(connections.spawn(forward_connection(client, target))),
            Err(error) => {
                debug!(%error, "accept a connection at a loopback address");
                sleep(ACCEPT_REST).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

/// Carries bytes both ways until both ends have closed theirs.
async fn forward_connection(mut client: TcpStream, target: SocketAddr) {
    let carried = async {
        let mut container = TcpStream::connect(target).await?;
        client.set_nodelay(true)?;
        container.set_nodelay(true)?;
        copy_bidirectional(&mut client, &mut container).await
    };
    if let Err(error) = carried.await {
        debug!(%target, %error, "a connection of this host to a published port ended");
        // The client is told, as by a reset, instead of an orderly end.
        if let Err(error) = client.set_zero_linger() {
            debug!(%error, "reset a connection of this host");
        }
    }
}

async fn forward_datagrams(listener: Arc<UdpSocket>, target: SocketAddr) {
    let mut clients: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut tasks = JoinSet::new();
    let mut buffer = vec![0; UDP_BYTES];
    loop {
        let Ok((length, client)) = listener.recv_from(&mut buffer).await else {
            // An error of an earlier answer: the client is gone.
            continue;
        };
        while tasks.try_join_next().is_some() {}
        clients.retain(|_, queue| !queue.is_closed());
        let queue = match clients.get(&client) {
            Some(queue) => queue,
            None if clients.len() >= UDP_CLIENTS => continue,
            None => {
                let (queue, datagrams) = mpsc::channel(UDP_QUEUE);
                tasks.spawn(forward_client(Arc::clone(&listener), client, target, datagrams));
                clients.entry(client).or_insert(queue)
            }
        };
        if queue.try_send(buffer[..length].to_vec()).is_err() {
            debug!(%client, "a datagram to a published port is lost");
        }
    }
}

/// Carries one client's datagrams both ways until there are none for a while.
async fn forward_client(
    listener: Arc<UdpSocket>,
    client: SocketAddr,
    target: SocketAddr,
    mut datagrams: mpsc::Receiver<Vec<u8>>,
) {
    let carried = async {
        let any: IpAddr = match target.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let container = UdpSocket::bind((any, 0)).await?;
        container.connect(target).await?;
        let mut buffer = vec![0; UDP_BYTES];
        loop {
            let exchanged = timeout(UDP_IDLE, async {
                tokio::select! {
                    datagram = datagrams.recv() => match datagram {
                        Some(datagram) => container.send(&datagram).await.map(|_| true),
                        None => Ok(false),
                    },
                    answer = container.recv(&mut buffer) => {
                        listener.send_to(&buffer[..answer?], client).await.map(|_| true)
                    }
                }
            });
            match exchanged.await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) | Err(_) => return Ok(()),
                Ok(Err(error)) => return Err::<(), io::Error>(error),
            }
        }
    };
    if let Err(error) = carried.await {
        debug!(%client, %target, %error, "datagrams of this host to a published port end");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{self, TcpStream},
        thread,
    };

    use super::*;
    use crate::{model::EndpointId, ports::Keeper};

    fn key(address: &str, port: u16, protocol: Protocol) -> PublishedKey {
        PublishedKey { address: address.parse().unwrap(), port, protocol }
    }

    #[test]
    fn what_is_published_everywhere_or_on_loopback_is_served_there() {
        let to = |address: &str| {
            let address = address.parse().unwrap();
            PublishedTarget { endpoint: EndpointId(1), address, port: 80 }
        };
        let published = [
            (key("0.0.0.0", 1, Protocol::Tcp), to("172.20.0.2")),
            (key("::", 1, Protocol::Udp), to("fd00:20::2")),
            (key("127.0.0.5", 2, Protocol::Udp), to("172.20.0.2")),
            (key("10.0.0.2", 3, Protocol::Tcp), to("172.20.0.2")),
            (key("0.0.0.0", 4, Protocol::Sctp), to("172.20.0.2")),
        ];
        let served = wanted(published);
        let keys: Vec<_> = served.into_keys().collect();
        let expected = [
            key("127.0.0.1", 1, Protocol::Tcp),
            key("127.0.0.5", 2, Protocol::Udp),
            key("::1", 1, Protocol::Udp),
        ];
        assert_eq!(keys, expected);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn connections_and_datagrams_reach_the_target_and_end_with_the_port() {
        let container = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let target = container.local_addr().unwrap();
        let echo = net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let echo_at = echo.local_addr().unwrap();
        thread::spawn(move || {
            let (mut client, _) = container.accept().unwrap();
            let mut text = [0; 4];
            client.read_exact(&mut text).unwrap();
            client.write_all(&text).unwrap();
            client.read_exact(&mut text).unwrap_err();
        });
        thread::spawn(move || {
            let mut text = [0; 4];
            let (length, client) = echo.recv_from(&mut text).unwrap();
            echo.send_to(&text[..length], client).unwrap();
        });
        let port = net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let published = [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| (key("0.0.0.0", port, protocol), ()))
            .into();
        let mut reservations = Reservations::default();
        let prepared = reservations.prepare(&published, Keeper::Sockets).unwrap();
        reservations.commit(prepared, &published);
        let served = [
            (key("127.0.0.1", port, Protocol::Tcp), target),
            (key("127.0.0.1", port, Protocol::Udp), echo_at),
        ];
        let loopback = Loopback::default();
        assert_eq!(loopback.follow(&served.into(), &reservations), [""; 0]);

        tokio::task::spawn_blocking(move || {
            let dialled = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let mut client = TcpStream::connect(dialled).unwrap();
            let mut text = [0; 4];
            client.write_all(b"tcp!").unwrap();
            client.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"tcp!");
            let asks = net::UdpSocket::bind("127.0.0.1:0").unwrap();
            asks.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            asks.send_to(b"udp!", dialled).unwrap();
            assert_eq!(asks.recv_from(&mut text).unwrap(), (4, dialled));

            // Nobody else gets the port, whatever options he has.
            for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED] {
                net::TcpListener::bind((address, port)).unwrap_err();
                net::UdpSocket::bind((address, port)).unwrap_err();
            }
            assert_eq!(loopback.follow(&BTreeMap::new(), &reservations), [""; 0]);
            let end = client.read(&mut text);
            assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
            while TcpStream::connect(dialled).is_ok() {
                thread::yield_now();
            }
        })
        .await
        .unwrap();
    }
}
