//! A thread in network and mount namespaces of its own, and a command that it runs there.
//!
//! Owns the namespaces and the name servers that are known in them. Knows nothing of networks.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{self, Command, ExitStatus},
    sync::mpsc,
    thread,
};

use anyhow::{Context, Result, anyhow};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{Pid, gettid},
};
use tokio::sync::oneshot;

/// Where programs look for name servers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// What systemd-resolved asks behind the loopback address that it puts into [`RESOLV_CONF`].
const UPSTREAM_RESOLV_CONF: &str = "/run/systemd/resolve/resolv.conf";

/// Namespaces with a thread in them; dropped, both go, unless a process is left inside.
#[derive(Debug)]
pub(super) struct Room {
    netns: String,
    orders: mpsc::Sender<Order>,
}

/// A command to be run, and who wants to hear of it.
struct Order {
    command: Command,
    started: oneshot::Sender<io::Result<Pid>>,
    ended: oneshot::Sender<io::Result<ExitStatus>>,
}

/// A command that runs in a room.
#[derive(Debug)]
pub(super) struct Running {
    /// Its process.
    pub(super) pid: Pid,
    /// How it ends.
    pub(super) ended: oneshot::Receiver<io::Result<ExitStatus>>,
}

impl Room {
    /// Makes the namespaces. Names are asked of `nameservers` there; of those of the host that can
    /// be reached from there, where none are given.
    ///
    /// # Errors
    /// Fails where the kernel refuses: it takes root.
    pub(super) fn open(nameservers: &[IpAddr]) -> Result<Self> {
        let resolv_conf = resolv_conf(nameservers);
        let (entered, is_entered) = mpsc::channel();
        let (orders, received) = mpsc::channel();
        thread::Builder::new()
            .name("room".into())
            .spawn(move || {
                let is_in = enter(resolv_conf.as_deref()).map(|()| gettid());
                // Nobody hears of it where `open` has gone, and then nobody gives orders.
                let _unheard = entered.send(is_in);
                serve(&received);
            })
            .context("start a thread for the command")?;
        let thread = is_entered.recv().context("the thread for the command ended early")??;
        let netns = format!("/proc/{}/task/{thread}/ns/net", process::id());
        Ok(Self { netns, orders })
    }

    /// Path of the network namespace. It ends with this process, however that ends.
    pub(super) fn netns(&self) -> &str {
        &self.netns
    }

    /// Starts a command inside.
    ///
    /// # Errors
    /// Fails where the program can't be run.
    pub(super) async fn start(&self, command: Command) -> Result<Running> {
        let (started, is_started) = oneshot::channel();
        let (ended, is_ended) = oneshot::channel();
        self.orders
            .send(Order { command, started, ended })
            .map_err(|_| anyhow!("the thread for the command has ended"))?;
        let pid = is_started.await.context("the thread for the command has ended")??;
        Ok(Running { pid, ended: is_ended })
    }
}

/// Moves this thread, and whatever it starts.
fn enter(resolv_conf: Option<&str>) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("make namespaces for the command: run as root")?;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .context("keep the command's mounts from the host")?;
    resolv_conf.map_or(Ok(()), show_resolv_conf)
}

/// Has programs of this mount namespace read `text` for [`RESOLV_CONF`].
fn show_resolv_conf(text: &str) -> Result<()> {
    if !Path::new(RESOLV_CONF).exists() {
        return Ok(());
    }
    let path = std::env::temp_dir().join(format!("netdp-run-{}", process::id()));
    let mut file = File::create_new(&path).with_context(|| format!("create {}", path.display()))?;
    let shown = file.write_all(text.as_bytes()).map_err(anyhow::Error::from).and_then(|()| {
        mount(Some(&path), RESOLV_CONF, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    });
    // The mount needs the file, and not its name.
    fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    shown.with_context(|| format!("mount a file on {RESOLV_CONF}"))
}

fn serve(orders: &mpsc::Receiver<Order>) {
    while let Ok(Order { mut command, started, ended }) = orders.recv() {
        let spawned = command.spawn().map(|child| (Pid::from_raw(child.id().cast_signed()), child));
        // Who asked may have gone: what was started is waited for all the same.
        match spawned {
            Err(error) => drop(started.send(Err(error))),
            Ok((pid, mut child)) => {
                drop(started.send(Ok(pid)));
                drop(ended.send(child.wait()));
            }
        }
    }
}

/// The exit code by which shells tell of how a command ended.
pub(super) fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

/// The text of [`RESOLV_CONF`] for the command, where it has to be another one than the host's.
fn resolv_conf(nameservers: &[IpAddr]) -> Option<String> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let own = read(RESOLV_CONF);
    if !nameservers.is_empty() {
        let servers = nameservers.iter().map(|server| format!("nameserver {server}\n"));
        return Some(servers.chain([lines(&own, |server| server.is_none())]).collect());
    }
    let is_loopback = |server: Option<IpAddr>| server.is_some_and(|server| server.is_loopback());
    if lines(&own, is_loopback).is_empty() {
        return None;
    }
    let reachable = |text: &str| lines(text, |server| !is_loopback(server));
    let has_server = |text: &String| !lines(text, |server| server.is_some()).is_empty();
    [own, read(UPSTREAM_RESOLV_CONF)].iter().map(|text| reachable(text)).find(has_server)
}

/// The lines of a resolv.conf for which `is_wanted`: it is told the name server that they name.
fn lines(text: &str, is_wanted: impl Fn(Option<IpAddr>) -> bool) -> String {
    let server = |line: &str| line.strip_prefix("nameserver")?.trim().parse().ok();
    let wanted = text.lines().filter(|line| is_wanted(server(line)));
    wanted.flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_chosen_by_the_server_that_they_name() {
        let text = "search example.org\nnameserver 127.0.0.53\nnameserver 192.0.2.1\n";
        assert_eq!(lines(text, |server| server.is_none()), "search example.org\n");
        let is_reachable = |server: Option<IpAddr>| server.is_some_and(|ip| !ip.is_loopback());
        assert_eq!(lines(text, is_reachable), "nameserver 192.0.2.1\n");
    }

    #[test]
    fn given_name_servers_take_the_place_of_the_hosts() {
        let text = resolv_conf(&["192.0.2.9".parse().unwrap()]).unwrap();
        assert!(text.starts_with("nameserver 192.0.2.9\n"), "{text}");
        assert_eq!(text.matches("nameserver").count(), 1, "{text}");
    }

    #[test]
    fn ends_are_told_as_by_shells() {
        assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_code(ExitStatus::from_raw(15)), 143);
    }
}
