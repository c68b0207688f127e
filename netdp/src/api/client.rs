//! The command line's side: one request to the agent's socket, one answer.
//!
//! Owns the connection and what its failures mean. Knows nothing of what is asked.

use std::{
    io,
    path::{self, Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use super::wire::{self, ErrorKind};

/// Where the agent is.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// A path of the API, its segments encoded: names come from users.
pub fn path(segments: &[&str]) -> String {
    let encoded: Vec<_> = segments
        .iter()
        .map(|segment| utf8_percent_encode(segment, NON_ALPHANUMERIC).to_string())
        .collect();
    format!("/v1/{}", encoded.join("/"))
}

/// A path of a file as it looks from the agent's directory.
///
/// # Errors
/// Fails for a path that is not UTF-8.
pub fn absolute(path: &str) -> Result<String> {
    let path = path::absolute(path).with_context(|| format!("resolve {path}"))?;
    path.into_os_string()
        .into_string()
        .map_err(|path| anyhow!("{} is not UTF-8: give another path", path.display()))
}

/// A path with one query parameter.
pub fn with_query(path: &str, key: &str, value: &str) -> String {
    format!("{path}?{key}={}", utf8_percent_encode(value, NON_ALPHANUMERIC))
}

/// Runs what asks the agent, on this thread, in a process that has nothing else to do.
///
/// # Errors
/// As `work`, or why it can't be begun.
pub fn wait_for<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?
        .block_on(work)
}

/// What sort of refusal an answer was; `None` where the agent did not refuse.
pub fn refusal(error: &anyhow::Error) -> Option<ErrorKind> {
    error.downcast_ref::<wire::Error>().map(|refusal| refusal.kind)
}

impl Client {
    /// A client of the agent that listens here.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// The agent's refusal, or why it was not reached.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.answer(Method::GET, path, Bytes::new()).await
    }

    /// Sends a request and reads what it led to.
    ///
    /// # Errors
    /// The agent's refusal, or why it was not reached.
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        request: &impl Serialize,
    ) -> Result<T> {
        let body = serde_json::to_vec(request).context("encode the request")?;
        self.answer(method, path, body.into()).await
    }

    /// Has something done that takes no further words.
    ///
    /// # Errors
    /// The agent's refusal, or why it was not reached.
    pub async fn order<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T> {
        self.answer(method, path, Bytes::new()).await
    }

    /// Whether an agent answers.
    pub async fn is_answered(&self) -> bool {
        self.connect().await.is_ok()
    }

    /// Connects, to see whether an agent answers.
    ///
    /// # Errors
    /// Why it does not, and what to do about it.
    pub async fn reach(&self) -> Result<()> {
        self.connect().await.map(drop)
    }

    async fn connect(&self) -> Result<UnixStream> {
        UnixStream::connect(&self.socket).await.map_err(|error| self.explain(error))
    }

    async fn answer<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T> {
        let stream = self.connect().await?;
        let (status, bytes) = exchange(stream, method, path, body)
            .await
            .with_context(|| format!("talk to the agent on {}", self.socket.display()))?;
        if !status.is_success() {
            match serde_json::from_slice::<wire::Error>(&bytes) {
                Ok(refusal) => bail!(refusal),
                Err(_) => bail!(
                    "{} answers {status}, which is no agent's answer: give --socket",
                    self.socket.display()
                ),
            }
        }
        // No content stands for nothing, which is JSON's null.
        let bytes = if bytes.is_empty() { Bytes::from_static(b"null") } else { bytes };
        serde_json::from_slice(&bytes)
            .context("understand the agent's answer: are command and agent of the same version?")
    }

    fn explain(&self, error: io::Error) -> anyhow::Error {
        let socket = self.socket.display();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => anyhow!(
                "no agent answers on {socket}: start one with `netdp agent`, or give --socket"
            ),
            io::ErrorKind::PermissionDenied => {
                anyhow!("{socket} is not for this user: run as root")
            }
            _ => anyhow::Error::new(error).context(format!("connect to {socket}")),
        }
    }
}

async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes)> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "netdp")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let bytes = response.into_body().collect().await?.to_bytes();
    connection.abort();
    Ok((status, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_not_leave_their_segment() {
        assert_eq!(path(&["networks", "a"]), "/v1/networks/a");
        assert_eq!(path(&["networks", "../x y?z"]), "/v1/networks/%2E%2E%2Fx%20y%3Fz");
    }

    #[test]
    fn who_may_not_ask_is_told_so() {
        let client = Client::new(Path::new("/run/netdp/netdp.sock"));
        let error = client.explain(io::ErrorKind::PermissionDenied.into()).to_string();
        assert_eq!(error, "/run/netdp/netdp.sock is not for this user: run as root");
    }

    #[tokio::test]
    async fn a_missing_agent_is_named_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("netdp.sock");
        let error = Client::new(&socket).get::<()>("/v1/status").await.unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "no agent answers on {}: start one with `netdp agent`, or give --socket",
                socket.display()
            )
        );
    }
}
