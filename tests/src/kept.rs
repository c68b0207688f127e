//! Processes that outlive the thread that asked for them, and not this process.
//!
//! The kernel takes the thread that has started a process for its parent, where a process is to die with
//! its parent. So a thread of its own starts it, and stays.

use std::io;
use std::ops::{Deref, DerefMut};
use std::process::{Child, Command};
use std::sync::mpsc::{self, Sender};
use std::thread;

/// A process that is killed when this is dropped, if it has a fate of that kind.
#[derive(Debug)]
pub struct Kept {
    child: Child,
    /// What the thread waits for the end of.
    _thread: Sender<()>,
}

impl Kept {
    /// Starts a process.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub fn spawn(mut command: Command) -> io::Result<Self> {
        let (thread, end) = mpsc::channel::<()>();
        let (reply, started) = mpsc::channel();
        thread::spawn(move || {
            if reply.send(command.spawn()).is_ok() {
                // Nobody sends anything: it fails when there is nobody left.
                end.recv().ok();
            }
        });
        let child = started.recv().map_err(io::Error::other)??;
        Ok(Self { child, _thread: thread })
    }
}

impl Deref for Kept {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for Kept {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}
