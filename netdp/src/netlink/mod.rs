//! Everything that speaks netlink, and the files under `/proc/sys` that complete it.
//!
//! Owns the socket, reading facts ([`read`]), making links and what hangs on them agree with a
//! plan ([`link`]), when they carry packets ([`carrier`]), the pair that is made ahead ([`blank`]),
//! work inside a container's namespace ([`namespace`]), the event stream ([`events`]), whether to read
//! again ([`watch`]), ending sockets ([`sockets`]), netfilter's connections ([`conntrack`]), filters
//! ([`tc`]), sysctls ([`sysctl`]) and whether there is IPsec ([`xfrm`]). Decides nothing: what has to
//! exist comes from the planner.

use std::io;

use anyhow::{Context, Result};
use tokio::task::AbortHandle;

use self::watch::Watch;

mod blank;
mod carrier;
pub mod conntrack;
pub mod events;
mod link;
pub mod namespace;
mod read;
pub mod sockets;
pub mod sysctl;
pub mod tc;
mod watch;
mod xfrm;

/// A routing socket of the network namespace that the opening thread was in; it stays with that
/// namespace wherever it is used from.
pub struct Netlink {
    handle: rtnetlink::Handle,
    /// The task that moves messages between the handle and the socket.
    connection: AbortHandle,
    /// Where facts are read more than once.
    watch: Option<Watch>,
}

impl Netlink {
    /// Opens a socket in the calling thread's namespace. Needs a tokio runtime.
    ///
    /// # Errors
    /// Fails where the kernel gives no socket.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("open a routing netlink socket")?;
        Ok(Self { handle, connection: tokio::spawn(connection).abort_handle(), watch: None })
    }

    /// The same for who reads facts often: what has not changed is not read again.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_watching() -> Result<Self> {
        let mut netlink = Self::open()?;
        netlink.watch = Some(Watch::open()?);
        Ok(netlink)
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The kernel's answer as an I/O error where it is one, so that messages read "File exists" and
/// not "Received a netlink error message".
fn kernel_error(error: rtnetlink::Error) -> anyhow::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().into(),
        other => other.into(),
    }
}

/// Success also where the kernel says that it is so already.
fn unless(result: Result<(), rtnetlink::Error>, fine: &[io::ErrorKind]) -> Result<()> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if fine.contains(&message.to_io().kind()) => {
            Ok(())
        }
        other => other.map_err(kernel_error),
    }
}
