//! One network namespace with a name: threads and commands that run in it, links, settings.
//!
//! Knows nothing of netdp or of the lab's addresses.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::{panic, thread};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use serde_json::Value;

use crate::net::Family;
use crate::runtime::NETNS_DIRECTORY;
use crate::sys;
pub use crate::sys::Fate;

/// A named network namespace; a clone is the same namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    name: String,
}

/// Link features that let segments and checksums stay unfinished between two ends of a veth:
/// receive checksum, send checksum, scatter, TSO, GSO, GRO (`ETHTOOL_S*`, linux/ethtool.h).
const OFFLOAD_COMMANDS: [u32; 6] = [0x15, 0x17, 0x19, 0x1f, 0x24, 0x2c];

impl Namespace {
    /// Creates a namespace with nothing but `lo`, up.
    ///
    /// IPv6 addresses are usable at once, and nothing asks for a router: neither would a test's
    /// counts survive, nor its patience.
    ///
    /// # Errors
    /// When the name is taken or the kernel refuses.
    pub fn create(name: &str) -> Result<Self> {
        let namespace = Self { name: name.to_owned() };
        fs::create_dir_all(NETNS_DIRECTORY).with_context(|| format!("create {NETNS_DIRECTORY}"))?;
        File::create_new(namespace.path())
            .with_context(|| format!("create {}", namespace.path().display()))?;
        thread::scope(|scope| join(scope.spawn(|| namespace.bind_new())))
            .with_context(|| format!("create namespace {name}"))?;
        for setting in ["all", "default"] {
            for (name, value) in [("accept_dad", "0"), ("accept_ra", "0")] {
                namespace.set_sysctl(&format!("net.ipv6.conf.{setting}.{name}"), value)?;
            }
        }
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Gives the name to another namespace that somebody else has made; the old one ends.
    ///
    /// # Errors
    /// When `path` is no namespace.
    pub fn become_another(&self, path: &Path) -> Result<()> {
        let own = self.path();
        umount2(&own, MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {}", own.display()))?;
        mount(Some(path), &own, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("bind {} to {}", path.display(), own.display()))
    }

    fn bind_new(&self) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("unshare the network")?;
        let this = Some("/proc/thread-self/ns/net");
        mount(this, &self.path(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .context("bind the namespace to its name")
    }

    /// Names a namespace that exists already.
    #[must_use]
    pub fn existing(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    /// The name under `/run/netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds the namespace.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(NETNS_DIRECTORY).join(&self.name)
    }

    /// Lets go of the name; the namespace ends with its last socket and process.
    ///
    /// # Errors
    /// When the mount or the file can't be removed.
    pub fn remove(&self) -> Result<()> {
        let path = self.path();
        umount2(&path, MntFlags::MNT_DETACH)
            .with_context(|| format!("unmount {}", path.display()))?;
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    fn open(&self) -> Result<File> {
        File::open(self.path()).with_context(|| format!("open namespace {}", self.name))
    }

    /// Runs `work` on a thread inside the namespace; threads and sockets it starts stay there.
    ///
    /// # Errors
    /// When the namespace is gone, or `work` fails.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let netns = self.open()?;
        thread::scope(|scope| {
            join(scope.spawn(move || {
                setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("enter namespace {}", self.name))?;
                work()
            }))
        })
    }

    /// Prepares a command that runs inside the namespace.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn command(&self, program: impl AsRef<Path>, fate: Fate) -> Result<Command> {
        let mut command = Command::new(program.as_ref());
        sys::enter_before_exec(&mut command, self.open()?.into(), fate);
        Ok(command)
    }

    /// Runs a command inside the namespace to its end, without input.
    ///
    /// # Errors
    /// When it can't be started; its exit code is the caller's to judge.
    pub fn output<S: AsRef<std::ffi::OsStr>>(
        &self,
        program: &str,
        arguments: &[S],
    ) -> Result<Output> {
        self.command(program, Fate::DiesWithParent)?
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {program} in {}", self.name))
    }

    /// Gives lines to `ip -batch`.
    ///
    /// # Errors
    /// With what `ip` said when it refuses one.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("run ip; install iproute2")?;
        child.stdin.take().context("open the input of ip")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output().context("wait for ip")?;
        ensure!(
            output.status.success(),
            "configure {}: {}\n{lines}",
            self.name,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    /// Asks `ip` a question and returns its JSON answer.
    ///
    /// # Errors
    /// When `ip` refuses or answers no JSON.
    pub fn ip_json(&self, arguments: &[&str]) -> Result<Value> {
        let output = Command::new("ip")
            .args(["-n", &self.name, "-json"])
            .args(arguments)
            .output()
            .context("run ip; install iproute2")?;
        ensure!(
            output.status.success(),
            "ask ip {arguments:?} in {}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        // `ip -json` prints nothing at all where a list would be empty.
        if output.stdout.trim_ascii().is_empty() {
            return Ok(Value::Array(Vec::new()));
        }
        serde_json::from_slice(&output.stdout).context("parse the answer of ip")
    }

    /// The hardware address of a link.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn mac(&self, interface: &str) -> Result<[u8; 6]> {
        let links = self.ip_json(&["link", "show", "dev", interface])?;
        let text = links[0]["address"].as_str().context("read the link's address")?;
        let mut mac = [0; 6];
        for (byte, digits) in mac.iter_mut().zip(text.split(':')) {
            *byte = u8::from_str_radix(digits, 16).with_context(|| format!("parse {text}"))?;
        }
        Ok(mac)
    }

    /// The names of all links, `lo` included.
    ///
    /// # Errors
    /// When `ip` can't be asked.
    pub fn links(&self) -> Result<Vec<String>> {
        let links = self.ip_json(&["link", "show"])?;
        let links = links.as_array().context("read the list of links")?;
        Ok(links.iter().filter_map(|link| link["ifname"].as_str().map(String::from)).collect())
    }

    /// Writes a setting such as `net.ipv4.ip_forward`.
    ///
    /// # Errors
    /// When there is no such setting.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = sysctl_path(name);
        // /proc/sys/net shows the namespace of the thread that looks.
        self.run(|| fs::write(&path, value).with_context(|| format!("write {value} to {path}")))
    }

    /// Reads a setting.
    ///
    /// # Errors
    /// When there is no such setting.
    pub fn sysctl(&self, name: &str) -> Result<String> {
        let path = sysctl_path(name);
        let text =
            self.run(|| fs::read_to_string(&path).with_context(|| format!("read {path}")))?;
        Ok(text.trim().to_owned())
    }

    /// Lets packets of a family that come in by a link be routed further.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn forward_from(&self, link: &str, family: Family) -> Result<()> {
        let setting = match family {
            Family::Ipv4 => format!("net.ipv4.conf.{link}.forwarding"),
            // Since Linux 6.17; before, the host routes between all of its links or none.
            Family::Ipv6 => format!("net.ipv6.conf.{link}.force_forwarding"),
        };
        let path = sysctl_path(&setting);
        if self.run(|| Ok(Path::new(&path).exists()))? {
            self.set_sysctl(&setting, "1")
        } else {
            self.set_sysctl("net.ipv6.conf.all.forwarding", "1")
        }
    }

    /// Switches segmentation and checksum offload off on every link that has it.
    ///
    /// From then on each frame on the wire is complete: a wrong checksum is a lost packet.
    ///
    /// # Errors
    /// When the links can't be listed or the call fails for another reason than "not supported".
    pub fn disable_offload(&self) -> Result<()> {
        let links = self.links()?;
        self.run(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").context("open a socket")?;
            for link in links.iter().filter(|link| *link != "lo") {
                for command in OFFLOAD_COMMANDS {
                    match sys::ethtool_set(&socket, link, command, 0) {
                        Err(error) if error.raw_os_error() != Some(libc::EOPNOTSUPP) => {
                            return Err(error)
                                .with_context(|| format!("switch offload of {link} off"));
                        }
                        _ => {}
                    }
                }
            }
            Ok(())
        })
    }
}

fn sysctl_path(name: &str) -> String {
    format!("/proc/sys/{}", name.replace('.', "/"))
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
}
