//! A link of IP packets without Ethernet headers: two tun devices and what carries packets between.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::namespace::Namespace;
use crate::sys;

/// Larger than any packet of a link.
const PACKET_BYTES: usize = 1 << 16;
/// How soon the carrier notices that it should stop.
const WAKE_MS: u16 = 50;

impl Namespace {
    /// Makes a tun device here and one in `peer`, of the same name, and carries packets between
    /// them until dropped. Neither is up.
    ///
    /// # Errors
    /// When the name is taken or there is no tun driver.
    pub fn tunnel(&self, peer: &Namespace, name: &str) -> Result<Tunnel> {
        let open = |namespace: &Namespace| -> Result<File> {
            namespace.run(|| {
                sys::open_tun(name)
                    .with_context(|| format!("make tun device {name} in {}", namespace.name()))
            })
        };
        let ends = [open(self)?, open(peer)?];
        let stopping = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stopping = Arc::clone(&stopping);
            move || carry(ends, &stopping)
        });
        Ok(Tunnel { stopping, thread: Some(thread) })
    }
}

/// Two tun devices; dropping it removes both.
#[derive(Debug)]
pub struct Tunnel {
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn carry([mut one, mut other]: [File; 2], stopping: &AtomicBool) {
    let mut packet = vec![0; PACKET_BYTES];
    while !stopping.load(Ordering::SeqCst) {
        let mut ready = [&one, &other].map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
        if !matches!(poll(&mut ready, PollTimeout::from(WAKE_MS)), Ok(count) if count > 0) {
            continue;
        }
        let [from_one, from_other] = ready.map(|end| end.any().unwrap_or_default());
        // A device that is down refuses packets, as a wire without a far end loses them.
        if from_one && let Ok(length) = one.read(&mut packet) {
            other.write_all(&packet[..length]).ok();
        }
        if from_other && let Ok(length) = other.read(&mut packet) {
            one.write_all(&packet[..length]).ok();
        }
    }
}
