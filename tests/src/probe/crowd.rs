//! Thousands of TCP connections at a time, each of which proves that it is itself.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};

use super::{Endpoint, PATIENCE};
use crate::namespace::Namespace;
use crate::runtime::patient;

/// Lets this process open `files` files more than a test usually does.
///
/// # Errors
/// When the kernel allows fewer.
pub fn allow_open_files(files: u64) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of files")?;
    let wanted = files + 1024;
    if soft < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted))
            .with_context(|| format!("raise the limit of open files to {wanted}"))?;
    }
    Ok(())
}

/// A listening server whose clients all wait in the kernel, connected, until it answers them one
/// by one.
#[derive(Debug)]
pub struct CrowdServer {
    listener: TcpListener,
}

impl Namespace {
    /// Starts a server that has room for `count` clients.
    ///
    /// # Errors
    /// When the address can't be bound.
    pub fn crowd_server(&self, address: impl Endpoint, count: u16) -> Result<CrowdServer> {
        let address = address.endpoint();
        self.set_sysctl("net.core.somaxconn", &count.to_string())?;
        let listener: TcpListener = self.run(|| {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&address.into()).with_context(|| format!("bind tcp {address}"))?;
            socket.listen(count.into())?;
            Ok(socket.into())
        })?;
        Ok(CrowdServer { listener })
    }

    /// Opens `count` connections, each marked with its number from `first` on.
    ///
    /// # Errors
    /// When one can't be opened.
    pub fn crowd(&self, server: impl Endpoint, first: u64, count: u64) -> Result<Crowd> {
        let server = server.endpoint();
        let streams = self.run(|| {
            (first..first + count)
                .map(|mark| {
                    let stream = TcpStream::connect_timeout(&server, patient(PATIENCE))
                        .with_context(|| format!("open connection {mark} to {server}"))?;
                    stream.set_read_timeout(Some(patient(PATIENCE)))?;
                    Ok((mark, stream))
                })
                .collect::<Result<Vec<_>>>()
        })?;
        Ok(Crowd { streams })
    }
}

/// Connections of one client.
#[derive(Debug)]
pub struct Crowd {
    streams: Vec<(u64, TcpStream)>,
}

impl Crowd {
    /// The client's end of each connection, by mark.
    ///
    /// # Errors
    /// When a socket can't say.
    pub fn local_addresses(&self) -> Result<Vec<(u64, SocketAddr)>> {
        let local = |(mark, stream): &(u64, TcpStream)| Ok((*mark, stream.local_addr()?));
        self.streams.iter().map(local).collect()
    }

    /// Says each connection's mark on it.
    ///
    /// # Errors
    /// When a connection has ended.
    pub fn speak(&mut self) -> Result<()> {
        for (mark, stream) in &mut self.streams {
            stream.write_all(&mark.to_be_bytes()).with_context(|| format!("mark {mark}"))?;
        }
        Ok(())
    }

    /// Fails unless each connection is answered with its own mark.
    ///
    /// # Errors
    /// When one has another's, or none.
    pub fn expect_own_answers(&mut self) -> Result<()> {
        for (mark, stream) in &mut self.streams {
            let answer = read_mark(stream).with_context(|| format!("answer to {mark}"))?;
            ensure!(answer == *mark, "connection {mark} got the answer to {answer}");
        }
        Ok(())
    }
}

impl CrowdServer {
    /// Answers `count` clients and returns each as the server saw it, with its mark.
    ///
    /// # Errors
    /// When a client says nothing.
    pub fn answer(&self, count: usize) -> Result<Vec<(SocketAddr, u64)>> {
        let mut seen = Vec::with_capacity(count);
        for _ in 0..count {
            let (mut client, peer) = self.listener.accept().context("accept one of a crowd")?;
            client.set_read_timeout(Some(patient(PATIENCE)))?;
            let mark = read_mark(&mut client).with_context(|| format!("hear {peer}"))?;
            client.write_all(&mark.to_be_bytes())?;
            seen.push((peer, mark));
        }
        Ok(seen)
    }
}

fn read_mark(stream: &mut impl Read) -> Result<u64> {
    let mut mark = [0; 8];
    stream.read_exact(&mut mark).context("read a mark")?;
    Ok(u64::from_be_bytes(mark))
}
