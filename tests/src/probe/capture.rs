//! Frames as they are on a link: seen, and sent by hand.

use std::fmt::{self, Debug, Formatter};
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
        let wakes = socket.try_clone().context("clone a packet socket")?;
        let recording = Arc::new(Mutex::new(Recording {
            link: File::from(socket),
            wanted: Box::new(wanted),
            frames: Vec::new(),
            buffer: vec![0; FRAME_BYTES],
        }));
        let stopping = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (recording, stopping) = (Arc::clone(&recording), Arc::clone(&stopping));
            move || record(&wakes, &recording, &stopping)
        });
        Ok(Sniffer { recording, stopping, thread: Some(thread) })
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
    recording: Arc<Mutex<Recording>>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sniffer {
    /// Every frame that the link has carried so far: one that is not there has not come.
    #[must_use]
    pub fn frames(&self) -> Vec<Vec<u8>> {
        let mut recording = locked(&self.recording);
        recording.catch_up();
        recording.frames.clone()
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

/// Says which frames are recorded.
type Wanted = dyn Fn(&[u8]) -> bool + Send;

/// What a sniffer has seen, and where the rest comes from.
struct Recording {
    link: File,
    wanted: Box<Wanted>,
    frames: Vec<Vec<u8>>,
    buffer: Vec<u8>,
}

impl Debug for Recording {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recording").field("frames", &self.frames).finish_non_exhaustive()
    }
}

impl Recording {
    /// Reads what has arrived.
    fn catch_up(&mut self) {
        while is_ready(&self.link, PollTimeout::ZERO) {
            // A link that goes down is reported as an error once, and may come up again.
            let Ok(length) = self.link.read(&mut self.buffer) else { continue };
            let frame = &self.buffer[..length];
            if (self.wanted)(frame) {
                self.frames.push(frame.to_vec());
            }
        }
    }
}

/// Whether there is something to read, now or before the time is over.
fn is_ready(link: &impl AsFd, timeout: PollTimeout) -> bool {
    let mut ready = [PollFd::new(link.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut ready, timeout), Ok(count) if count > 0)
}

/// Reads in time, so that the socket has room for what comes.
fn record(wakes: &OwnedFd, recording: &Mutex<Recording>, stopping: &AtomicBool) {
    while !stopping.load(Ordering::SeqCst) {
        if is_ready(wakes, PollTimeout::from(WAKE_MS)) {
            locked(recording).catch_up();
        }
    }
}
