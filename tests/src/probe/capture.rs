//! Frames as they are on a link: seen, and sent by hand.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{PATIENCE, locked};
use crate::namespace::Namespace;
use crate::runtime::poll_until;
use crate::sys;

/// A segmented frame before its segmentation may be as long as an IPv4 packet.
const FRAME_BYTES: usize = (1 << 16) + 64;
/// How soon a sniffer notices that it should stop.
const WAKE_MS: u16 = 50;

impl Namespace {
    /// Records the frames of a link, both directions, that `wanted` says yes to.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn sniff(
        &self,
        interface: &str,
        wanted: impl Fn(&[u8]) -> bool + Send + 'static,
    ) -> Result<Sniffer> {
        let socket = self.packet_socket(interface)?;
        let frames = Arc::new(Mutex::new(Vec::new()));
        let stopping = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (frames, stopping) = (Arc::clone(&frames), Arc::clone(&stopping));
            move || record(socket, &frames, &stopping, wanted)
        });
        Ok(Sniffer { frames, stopping, thread: Some(thread) })
    }

    /// Sends one frame, as it is, out of a link.
    ///
    /// # Errors
    /// When there is no such link or the kernel refuses the frame.
    pub fn inject(&self, interface: &str, frame: &[u8]) -> Result<()> {
        File::from(self.packet_socket(interface)?)
            .write_all(frame)
            .with_context(|| format!("send a frame on {interface} of {}", self.name()))
    }

    /// Sends frames, as they are, out of a link; what the link has no room for at the moment is
    /// sent again.
    ///
    /// # Errors
    /// When there is no such link or the kernel refuses a frame.
    pub fn flood(&self, interface: &str, frames: impl IntoIterator<Item = Vec<u8>>) -> Result<()> {
        let mut link = File::from(self.packet_socket(interface)?);
        for frame in frames {
            poll_until(PATIENCE, "room on the link", || match link.write_all(&frame) {
                Ok(()) => Ok(Some(())),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
                Err(error) => Err(error).with_context(|| format!("send a frame on {interface}")),
            })?;
        }
        Ok(())
    }

    fn packet_socket(&self, interface: &str) -> Result<OwnedFd> {
        self.run(|| {
            let ifindex = if_nametoindex(interface)
                .with_context(|| format!("find {interface} in {}", self.name()))?;
            sys::packet_socket(ifindex)
                .with_context(|| format!("open a packet socket on {interface}"))
        })
    }
}

/// A running capture; dropping it ends it.
#[derive(Debug)]
pub struct Sniffer {
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Every frame recorded so far.
    #[must_use]
    pub fn frames(&self) -> Vec<Vec<u8>> {
        locked(&self.frames).clone()
    }

    /// Waits for a frame that `is_it` recognises.
    ///
    /// # Errors
    /// When none comes within the time.
    pub fn wait_for(
        &self,
        patience: Duration,
        what: &str,
        is_it: impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<u8>> {
        poll_until(patience, what, || Ok(self.frames().into_iter().find(|frame| is_it(frame))))
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn record(
    socket: OwnedFd,
    frames: &Mutex<Vec<Vec<u8>>>,
    stopping: &AtomicBool,
    wanted: impl Fn(&[u8]) -> bool,
) {
    let mut socket = File::from(socket);
    let mut buffer = vec![0; FRAME_BYTES];
    while !stopping.load(Ordering::SeqCst) {
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut ready, PollTimeout::from(WAKE_MS)), Ok(count) if count > 0) {
            continue;
        }
        // A link that goes down is reported as an error once, and may come up again.
        let Ok(length) = socket.read(&mut buffer) else { continue };
        let frame = &buffer[..length];
        if wanted(frame) {
            locked(frames).push(frame.to_vec());
        }
    }
}
