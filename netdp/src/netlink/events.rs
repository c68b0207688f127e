//! Word from the kernel that links or addresses changed.
//!
//! Owns the multicast socket. Says only *that* something changed: who listens reads the facts
//! again, so a lost or doubled event does no harm.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, channel::mpsc::UnboundedReceiver};
use rtnetlink::{
    MulticastGroup, new_multicast_connection, packet_core::NetlinkMessage,
    packet_route::RouteNetlinkMessage, sys::SocketAddr,
};
use tokio::{
    task::AbortHandle,
    time::{sleep, timeout},
};

/// Changes come in bursts (a new veth is a dozen of them); what follows this soon is read at once.
const BURST: Duration = Duration::from_millis(20);

/// What there is to say of links and addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Some have changed.
    Changed,
    /// None has, for as long as somebody wanted to wait.
    Quiet,
}

/// Subscription to changes of links and addresses of both families. Routes are not in it: nothing that is
/// enforced depends on them, and a routing daemon can change thousands a second.
pub struct Events {
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    connection: AbortHandle,
}

impl Events {
    /// Subscribes in the calling thread's namespace. Needs a tokio runtime.
    ///
    /// # Errors
    /// Fails where the kernel gives no socket.
    pub fn subscribe() -> Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, _, messages) =
            new_multicast_connection(&groups).context("subscribe to netlink events")?;
        Ok(Self { messages, connection: tokio::spawn(connection).abort_handle() })
    }

    /// Whether nothing has come that was not reported yet; forgets it.
    pub fn are_over(&mut self) -> bool {
        let mut are_over = true;
        while self.messages.try_recv().is_ok() {
            are_over = false;
        }
        are_over
    }

    /// Waits for a burst of changes to come and go by, or for so long without one. `None` when the
    /// kernel closed the socket. Cancel-safe: an event that was taken but not reported yet is followed
    /// by a re-read anyway.
    pub async fn next(&mut self, patience: Duration) -> Option<Word> {
        match timeout(patience, self.messages.next()).await {
            Err(_elapsed) => Some(Word::Quiet),
            Ok(message) => {
                message?;
                sleep(BURST).await;
                while self.messages.try_recv().is_ok() {}
                Some(Word::Changed)
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
