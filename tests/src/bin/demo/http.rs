//! Real HTTP: a small server that answers with what it saw, and curl as its client.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netdp_tests::namespace::{Fate, Namespace};
use netdp_tests::runtime::poll_until;

/// First argument that makes this program the server.
pub(crate) const SERVE: &str = "--serve";
/// Seconds that curl waits for a connection and an answer.
const CURL_SECONDS: &str = "2";
/// How long a server may take to listen.
const START_DEADLINE: Duration = Duration::from_secs(5);

/// A server process in a namespace.
pub(crate) struct Site {
    child: Child,
    log: PathBuf,
    fate: Fate,
}

impl Site {
    /// Starts this program as the server of `name` and waits until it listens.
    pub(crate) fn start(
        namespace: &Namespace,
        name: &str,
        address: &str,
        directory: &Path,
        fate: Fate,
    ) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let this = std::env::current_exe().context("find this program")?;
        let child = namespace
            .command(&this, fate)?
            .args([SERVE, name, address])
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("clone a log")?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("start the server of {name}"))?;
        let site = Self { child, log, fate };
        poll_until(START_DEADLINE, &format!("the server of {name}"), || {
            Ok((!site.lines()?.is_empty()).then_some(()))
        })?;
        Ok(site)
    }

    /// Clients that it has seen so far.
    pub(crate) fn clients(&self) -> Result<usize> {
        // The first line says where it listens.
        Ok(self.lines()?.len() - 1)
    }

    fn lines(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(&self.log)
            .with_context(|| format!("read {}", self.log.display()))?;
        Ok(text.lines().map(String::from).collect())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.fate == Fate::DiesWithParent {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

/// The server: one line of text per request, and one on standard output.
pub(crate) fn serve(name: &str, address: &str) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("bind {address}"))?;
    println!("{name} listens on {address}");
    for stream in listener.incoming() {
        let stream = stream.context("accept a client")?;
        let peer = stream.peer_addr().context("read a client's address")?;
        println!("{peer}");
        if let Err(error) = answer(&stream, name, peer) {
            eprintln!("answer {peer}: {error:#}");
        }
    }
    Ok(())
}

fn answer(mut stream: &TcpStream, name: &str, peer: SocketAddr) -> Result<()> {
    for line in BufReader::new(stream).lines() {
        if line.context("read a request")?.is_empty() {
            break;
        }
    }
    let local = stream.local_addr().context("read the server's address")?;
    let body = format!("{name} {peer} {local}\n");
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
    .context("write an answer")
}

/// What both ends of one request saw.
pub(crate) struct Visit {
    /// Name of the server that answered.
    pub(crate) server: String,
    /// The client's address and port as the server saw it.
    pub(crate) seen_client: SocketAddr,
    /// The server's own address and port.
    pub(crate) seen_self: SocketAddr,
    /// The client's own address and port.
    pub(crate) client: SocketAddr,
}

/// Arguments of curl, as shown.
pub(crate) fn curl_line(url: &str, from: Option<&str>) -> String {
    let source = from.map(|address| format!("--interface {address} ")).unwrap_or_default();
    format!("curl {source}{url}")
}

/// Runs curl; nothing when no answer came.
pub(crate) fn curl(namespace: &Namespace, url: &str, from: Option<&str>) -> Result<Option<Visit>> {
    let mut arguments = vec!["-sS", "--max-time", CURL_SECONDS];
    arguments.extend(["--write-out", "%{local_ip}:%{local_port}\\n"]);
    if let Some(address) = from {
        arguments.extend(["--interface", address]);
    }
    arguments.push(url);
    let output = namespace.output("curl", &arguments)?;
    // 7: no connection; 28: no answer in time. Anything else is a mistake of the demo.
    if matches!(output.status.code(), Some(7 | 28)) {
        return Ok(None);
    }
    let problem = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "run curl {url}: {}: {problem}", output.status);
    let text = String::from_utf8(output.stdout).context("read the output of curl")?;
    let words: Vec<_> = text.split_whitespace().collect();
    let [server, seen_client, seen_self, client] = words[..] else {
        anyhow::bail!("read the output of curl: {text:?}");
    };
    Ok(Some(Visit {
        server: server.to_owned(),
        seen_client: seen_client.parse().context("parse an address")?,
        seen_self: seen_self.parse().context("parse an address")?,
        client: client.parse().context("parse an address")?,
    }))
}
