//! `netdp run`: a command in a network, for as long as it runs.
//!
//! Owns the order of things: connected before the command starts, disconnected when it has ended.
//! What the command runs in is `room`'s business.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::ErrorKind,
    net::IpAddr,
    os::unix::process::CommandExt,
    process::{self, Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use clap::{Args, builder::NonEmptyStringValueParser};
use hyper::Method;
use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::{Pid, getpgrp, getppid, tcgetpgrp},
};
use tokio::{
    select,
    signal::unix::{self, SignalKind, signal},
};

use super::{
    complain,
    endpoint::Wishes,
    publish::note_loopback,
    room::{Room, Running, exit_code},
};
use crate::api::{
    client::{self, Client},
    wire,
};

/// Exit code where it was not the command that failed, as of env(1) and `docker run`.
pub(super) const FAILED: u8 = 125;
/// Exit code where the command can't be run.
const NOT_EXECUTABLE: u8 = 126;
/// Exit code where there is no such command.
const NOT_FOUND: u8 = 127;

/// The verb by which this program becomes the command: hidden, since it says nothing by itself.
const BECOME: &str = "become";

#[derive(Args, Debug)]
pub(super) struct Run {
    /// The network
    #[arg(long, value_parser = NonEmptyStringValueParser::new())]
    network: String,
    /// The endpoint's name; a number where none is given
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    wishes: Wishes,
    /// Name server; the host's that are no loopback addresses where none is given
    #[arg(long = "dns", value_name = "IP")]
    nameservers: Vec<IpAddr>,
    /// The command and its arguments
    #[arg(value_name = "CMD", required = true, trailing_var_arg = true)]
    command: Vec<OsString>,
}

#[derive(Args, Debug)]
pub(super) struct Become {
    /// The process to end with
    parent: i32,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

impl Run {
    /// Runs the command to its end and returns its exit code.
    pub(super) async fn run(self, client: &Client) -> Result<ExitCode> {
        // From here on a signal waits until there is a command to have it.
        let mut signals = Signals::listen()?;
        let room = Room::open(&self.nameservers)?;
        let request = wire::Connect {
            netns: room.netns().to_owned(),
            name: self.name,
            addresses: self.wishes.addresses,
            mac: self.wishes.mac,
            interface: None,
            publish: self.wishes.publish,
        };
        let path = client::path(&["networks", &self.network, "endpoints"]);
        let endpoint: wire::Endpoint = client.send(Method::POST, &path, &request).await?;
        note_loopback(&endpoint.published);

        let ended = run_to_end(&room, &self.command, &mut signals).await;
        let path = client::path(&["networks", &self.network, "endpoints", &endpoint.name]);
        match client.order::<()>(Method::DELETE, &path).await {
            Err(error) if client::refusal(&error) != Some(wire::ErrorKind::NotFound) => {
                complain(&error.context(format!("disconnect {}", endpoint.name)));
            }
            _ => {}
        }
        ended
    }
}

/// Runs a command in a room, with the signals that this process gets.
async fn run_to_end(room: &Room, words: &[OsString], signals: &mut Signals) -> Result<ExitCode> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("netdp").args([BECOME, &process::id().to_string(), "--"]).args(words);
    let Running { pid, mut ended } = room.start(command).await.context("start the command")?;
    loop {
        select! {
            status = &mut ended => {
                let status = status.context("the thread for the command has ended")?;
                return Ok(exit_code(status.context("wait for the command")?).into());
            }
            signal = signals.next() => pass_on(signal, pid)?,
        }
    }
}

/// Gives the command a signal that this process got, unless it has it from the terminal already.
fn pass_on(signal: Signal, command: Pid) -> Result<()> {
    if matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && has_terminal() {
        return Ok(());
    }
    match kill(command, signal) {
        // It has ended, and its end is about to be heard of.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("give the command {signal}")),
    }
}

/// Whether Ctrl-C at the terminal is for this process and what it has started.
fn has_terminal() -> bool {
    let foreground = File::open("/dev/tty").ok().and_then(|terminal| tcgetpgrp(terminal).ok());
    foreground == Some(getpgrp())
}

/// Signals by which a command is told to end.
struct Signals {
    hangup: unix::Signal,
    interrupt: unix::Signal,
    quit: unix::Signal,
    terminate: unix::Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("listen to signals");
        Ok(Self {
            hangup: listen(SignalKind::hangup())?,
            interrupt: listen(SignalKind::interrupt())?,
            quit: listen(SignalKind::quit())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> Signal {
        select! {
            _ = self.hangup.recv() => Signal::SIGHUP,
            _ = self.interrupt.recv() => Signal::SIGINT,
            _ = self.quit.recv() => Signal::SIGQUIT,
            _ = self.terminate.recv() => Signal::SIGTERM,
        }
    }
}

impl Become {
    /// Returns only where the command can't be run.
    pub(super) fn run(self) -> Result<ExitCode> {
        // A killed `netdp run` can't end the command; the kernel does.
        prctl::set_pdeathsig(Signal::SIGKILL).context("ask for an end with the parent")?;
        if getppid() != Pid::from_raw(self.parent) {
            bail!("process {} has ended already", self.parent);
        }
        let mut words = self.command.iter().map(OsString::as_os_str);
        let program = words.next().unwrap_or(OsStr::new(""));
        let error = Command::new(program).args(words).exec();
        let code = if error.kind() == ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE };
        complain(&anyhow::Error::new(error).context(format!("run {}", program.display())));
        Ok(code.into())
    }
}
