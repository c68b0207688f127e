//! Loads: what one pair of programs does for a while, and what both ends counted.
//!
//! Client and server are threads on CPUs of their own. What goes on before the clock runs (the first
//! packet of a flow, a neighbour's MAC address) is no part of it.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};
use std::{fs, panic};

use anyhow::{Context, Result, bail, ensure};
use netdp_tests::bench::Cpu;
use netdp_tests::figures::percentile;
use netdp_tests::namespace::Namespace;
use nix::sys::socket::sockopt::{IpBindAddressNoPort, RcvBufForce};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, setsockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// What makes an Ethernet frame of 64 bytes over IPv4, its checksum included.
const SMALL: usize = 18;
/// Small packets for one system call.
const BATCH: usize = 32;
/// What arrives in bursts has to lie somewhere, in bytes.
const RECEIVE_BUFFER: usize = 8 << 20;
/// Bytes that a program writes and reads at once.
const BULK: usize = 128 << 10;
/// Nothing that is not there by then comes.
const PATIENCE: Duration = Duration::from_secs(5);
/// A sink that has heard nothing for so long has heard all.
const QUIET: Duration = Duration::from_millis(20);
/// Exchanges before the clock runs.
const WARM_UP: usize = 20;
/// What `/proc/stat` counts time in (proc(5): `USER_HZ`, which is 100 on every architecture).
const TICKS_PER_SECOND: f64 = 100.0;

/// Two ends of a connection, and how to get from one to the other.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    pub(crate) client: Namespace,
    pub(crate) server: Namespace,
    /// What the client dials; its port is the server's, too.
    pub(crate) dial: SocketAddr,
    /// What the server listens at.
    pub(crate) listen: IpAddr,
    /// Addresses that the client has, to take turns.
    pub(crate) sources: Vec<IpAddr>,
}

/// The CPUs of both ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seats {
    pub(crate) client: Cpu,
    pub(crate) server: Cpu,
}

impl Way {
    /// The same to another port.
    pub(crate) fn to_port(&self, port: u16) -> Self {
        Self { dial: SocketAddr::new(self.dial.ip(), port), ..self.clone() }
    }

    fn listen(&self) -> SocketAddr {
        SocketAddr::new(self.listen, self.dial.port())
    }

    /// Runs a server, and a client once that listens; returns what both say.
    fn run<S, C, T>(
        &self,
        seats: Seats,
        listen: impl FnOnce(SocketAddr) -> io::Result<S> + Send,
        serve: impl FnOnce(S, &AtomicBool) -> Result<T> + Send,
        work: impl FnOnce(&Self) -> Result<C> + Send,
    ) -> Result<(C, T)>
    where
        S: Send,
        C: Send,
        T: Send,
    {
        let is_over = AtomicBool::new(false);
        let address = self.listen();
        let socket = self.server.run(|| listen(address).context("listen"))?;
        thread::scope(|scope| -> Result<_> {
            let server = scope.spawn(|| {
                self.server.run(|| {
                    seats.server.stay()?;
                    serve(socket, &is_over)
                })
            });
            let worked = self.client.run(|| {
                seats.client.stay()?;
                work(self)
            });
            is_over.store(true, Ordering::Relaxed);
            let served = join(server);
            // What the client has to say says more.
            Ok((worked?, served?))
        })
        .with_context(|| format!("{} to {}", self.client.name(), self.dial))
    }
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
}

/// Small UDP packets for as long as the window, of one flow: those that arrive, per second.
pub(crate) fn small_packets(way: &Way, seats: Seats, window: Duration) -> Result<f64> {
    let arrived = &AtomicU64::new(0);
    let sink = |socket: UdpSocket, is_over: &AtomicBool| -> Result<()> {
        let mut packet = [0; SMALL];
        loop {
            match socket.recv(&mut packet) {
                Ok(_) => arrived.fetch_add(1, Ordering::Relaxed),
                Err(error) if is_quiet(&error) && is_over.load(Ordering::Relaxed) => return Ok(()),
                Err(error) if is_quiet(&error) => continue,
                Err(error) => return Err(error).context("receive"),
            };
        }
    };
    let send = |way: &Way| -> Result<(u64, Duration)> {
        let socket = UdpSocket::bind((unspecified(way.dial), 0)).context("bind")?;
        socket.connect(way.dial).context("connect")?;
        let begun = Instant::now();
        while arrived.load(Ordering::Relaxed) == 0 {
            ensure!(begun.elapsed() < PATIENCE, "no packet arrived");
            socket.send(&[0; SMALL]).context("send")?;
            poll_pause();
        }
        let before = arrived.load(Ordering::Relaxed);
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH, None);
        let packets = [[IoSlice::new(&[0; SMALL])]; BATCH];
        let begun = Instant::now();
        while begun.elapsed() < window {
            sendmmsg(
                socket.as_raw_fd(),
                &mut headers,
                &packets,
                [None; BATCH],
                [],
                MsgFlags::empty(),
            )
            .context("send")?;
        }
        Ok((before, begun.elapsed()))
    };
    let ((before, took), ()) = way.run(seats, bind_sink, sink, send)?;
    Ok((arrived.load(Ordering::Relaxed) - before) as f64 / took.as_secs_f64())
}

fn bind_sink(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(address)?;
    setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
    socket.set_read_timeout(Some(QUIET))?;
    Ok(socket)
}

fn is_quiet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Lets the other end have its turn.
fn poll_pause() {
    thread::sleep(Duration::from_millis(1));
}

/// What one connection carried in one direction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bulk {
    /// Gbit/s.
    pub(crate) rate: f64,
    /// CPU seconds of the whole machine for a Gbit.
    pub(crate) cpu: f64,
}

/// As much as one TCP connection carries from the client to the server.
pub(crate) fn bulk(way: &Way, seats: Seats, window: Duration) -> Result<Bulk> {
    let receive = |listener: TcpListener, is_over: &AtomicBool| -> Result<(u64, Duration)> {
        let mut stream = accept(&listener, is_over)?;
        let mut buffer = vec![0; BULK];
        let first = stream.read(&mut buffer).context("receive")?;
        let (begun, mut bytes) = (Instant::now(), first as u64);
        loop {
            match stream.read(&mut buffer).context("receive")? {
                0 => return Ok((bytes, begun.elapsed())),
                more => bytes += more as u64,
            }
        }
    };
    let send = |way: &Way| -> Result<f64> {
        let mut stream = dial(way)?;
        let buffer = vec![0; BULK];
        let (begun, busy) = (Instant::now(), busy()?);
        while begun.elapsed() < window {
            stream.write_all(&buffer).context("send")?;
        }
        drop(stream);
        Ok(self::busy()? - busy)
    };
    let (busy, (bytes, took)) = way.run(seats, listen, receive, send)?;
    let gbits = bytes as f64 * 8.0 / 1e9;
    Ok(Bulk { rate: gbits / took.as_secs_f64(), cpu: busy / gbits })
}

/// Seconds that the machine's CPUs have worked, together.
fn busy() -> Result<f64> {
    const FILE: &str = "/proc/stat";
    let text = fs::read_to_string(FILE).with_context(|| format!("read {FILE}"))?;
    // proc(5): user, nice, system, idle, iowait, irq, softirq, steal.
    let first = text.lines().next().and_then(|line| line.strip_prefix("cpu "));
    let numbers: Vec<f64> =
        first.into_iter().flat_map(str::split_whitespace).flat_map(str::parse).collect();
    let [user, nice, system, _, _, irq, softirq, ..] = numbers[..] else {
        bail!("read {FILE}: {first:?}")
    };
    Ok((user + nice + system + irq + softirq) / TICKS_PER_SECOND)
}

/// How long exchanges of one byte over one connection take, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// How many there were.
    pub(crate) count: u64,
}

impl Latency {
    fn of(mut nanos: Vec<u64>) -> Result<Self> {
        ensure!(!nanos.is_empty(), "no exchange was over in time");
        nanos.sort_unstable();
        let micros: Vec<_> = nanos.iter().map(|nanos| *nanos as f64 / 1e3).collect();
        let (p50, p99) = (percentile(&micros, 0.5), percentile(&micros, 0.99));
        Ok(Self { p50, p99, count: micros.len() as u64 })
    }
}

/// Request and response of one byte, one after the other over one TCP connection.
pub(crate) fn exchanges(way: &Way, seats: Seats, window: Duration) -> Result<Latency> {
    let echo = |listener: TcpListener, is_over: &AtomicBool| -> Result<()> {
        let mut stream = accept(&listener, is_over)?;
        stream.set_nodelay(true).context("send at once")?;
        let mut byte = [0];
        while stream.read(&mut byte).context("receive")? != 0 {
            stream.write_all(&byte).context("send")?;
        }
        Ok(())
    };
    let ask = |way: &Way| -> Result<Vec<u64>> {
        let mut stream = dial(way)?;
        stream.set_nodelay(true).context("send at once")?;
        for _ in 0..WARM_UP {
            exchange(&mut stream)?;
        }
        let (begun, mut nanos) = (Instant::now(), Vec::new());
        while begun.elapsed() < window {
            let asked = Instant::now();
            exchange(&mut stream)?;
            nanos.push(asked.elapsed().as_nanos() as u64);
        }
        Ok(nanos)
    };
    let (nanos, ()) = way.run(seats, listen, echo, ask)?;
    Latency::of(nanos)
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(&[1]).context("send")?;
    stream.read_exact(&mut [0]).context("receive")
}

/// What came of connections one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connections {
    /// Connections a second: established, one exchange, closed.
    pub(crate) rate: f64,
    /// From the first packet until the connection stands.
    pub(crate) first_packet: Latency,
}

/// Connections of one exchange, one after the other. The server closes first, so that nobody resets
/// what is not over, and the client's ports are free again.
pub(crate) fn connections(way: &Way, seats: Seats, window: Duration) -> Result<Connections> {
    let serve = |listener: TcpListener, is_over: &AtomicBool| -> Result<()> {
        while let Some(mut stream) = next(&listener, is_over)? {
            stream.read_exact(&mut [0]).context("receive")?;
            stream.write_all(&[1]).context("send")?;
        }
        Ok(())
    };
    let connect = |way: &Way| -> Result<(Vec<u64>, f64)> {
        let mut sources = way.sources.iter().cycle();
        let mut one = || -> Result<u64> {
            let source = sources.next().copied();
            let begun = Instant::now();
            let mut stream = dial_from(source, way.dial).context("connect")?;
            let took = begun.elapsed().as_nanos() as u64;
            exchange(&mut stream)?;
            let left = stream.read(&mut [0]).context("wait for the end")?;
            ensure!(left == 0, "the server said more than it should");
            Ok(took)
        };
        for _ in 0..WARM_UP {
            one()?;
        }
        let (begun, mut nanos) = (Instant::now(), Vec::new());
        while begun.elapsed() < window {
            nanos.push(one()?);
        }
        let rate = nanos.len() as f64 / begun.elapsed().as_secs_f64();
        Ok((nanos, rate))
    };
    let ((nanos, rate), ()) = way.run(seats, listen, serve, connect)?;
    Ok(Connections { rate, first_packet: Latency::of(nanos)? })
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of the round before are not quite over.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    // For `accept`, which looks whether it is over.
    socket.set_read_timeout(Some(QUIET))?;
    Ok(socket.into())
}

/// The next connection, `None` when it is over.
fn next(listener: &TcpListener, is_over: &AtomicBool) -> Result<Option<TcpStream>> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                // It inherits the listener's.
                stream.set_read_timeout(Some(PATIENCE)).context("limit the wait")?;
                return Ok(Some(stream));
            }
            Err(error) if is_quiet(&error) && is_over.load(Ordering::Relaxed) => return Ok(None),
            Err(error) if is_quiet(&error) => {}
            Err(error) => return Err(error).context("accept"),
        }
    }
}

fn accept(listener: &TcpListener, is_over: &AtomicBool) -> Result<TcpStream> {
    next(listener, is_over)?.context("nobody connected")
}

fn dial(way: &Way) -> Result<TcpStream> {
    dial_from(None, way.dial).context("connect")
}

fn dial_from(source: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(source) = source {
        // The port may be one that another address has, too.
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    // It limits `connect`, too (socket(7)).
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}

fn unspecified(beside: SocketAddr) -> IpAddr {
    if beside.is_ipv4() {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    }
}
