//! The socket hooks: programs on the cgroup2 hierarchy that lead programs of the host to published
//! ports, and keep them from binding one.
//!
//! Owns finding the hierarchy, and attaching, pinning and adopting. Without them everything else
//! works: what is lost is that the host itself reaches published ports. Without those of `bind` alone
//! somebody else has to keep published ports.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::{Ipv4Addr, UdpSocket},
    os::{fd::AsFd, linux::fs::MetadataExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf,
    maps::HashMap,
    programs::{CgroupAttachMode, Program, ProgramError, ProgramFd, links::FdLink},
};
use tracing::{debug, warn};

use super::{
    object::{refusal, remove_pin},
    pins::Pins,
    probe::{Feature, Features},
    sys::{Attachment, CgroupLink, network_namespace, socket_cookie},
};
use crate::dataplane::Drift;

/// Names of the programs in the object, and of their pins. What names peers comes first, so that
/// nobody is led to a container and then told of it.
pub(super) const HOOKS: [&str; 9] = [
    "sock_release",
    "getpeername4",
    "getpeername6",
    "recvmsg4",
    "recvmsg6",
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
];

/// Those that keep programs of the host from binding a published port.
pub(super) const BIND_HOOKS: [&str; 2] = ["bind4", "bind6"];

/// On no hook but for a moment.
pub(super) const NAMING: &str = "name_namespace";

/// Where a host usually has its cgroup2 hierarchy: the mount point of the whole of it.
///
/// # Errors
/// The mount table can't be read.
pub fn cgroup2_mount() -> Result<Option<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    Ok(find_cgroup2(&table).map(PathBuf::from))
}

/// Format: proc_pid_mountinfo(5).
fn find_cgroup2(table: &str) -> Option<&str> {
    table.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // A mount of a part of it is blind to the programs outside.
        (filesystem.starts_with("cgroup2 ") && root == "/").then_some(point)
    })
}

/// Whether the socket hooks are pinned, which is to say attached.
pub(super) fn are_pinned(pins: &Pins) -> bool {
    HOOKS.iter().all(|hook| pins.socket_link(hook).exists())
}

/// Removes the pins of the socket hooks, which detaches them.
///
/// # Errors
/// A pin can't be removed.
pub(super) fn remove_pins(pins: &Pins) -> Result<()> {
    // The other way round: what leads to containers goes first.
    let mut hooks = HOOKS.iter().chain(&BIND_HOOKS).rev();
    hooks.try_for_each(|hook| remove_pin(&pins.socket_link(hook)))
}

/// The kernel's name of the cgroup that all others are in (Linux 5.5). In a cgroup namespace of its own a
/// process takes another one for that.
const ROOT: u64 = 1;

/// Whether it can be known, with hooks on this cgroup, that no socket of the host has a port: the kernel shows
/// all sockets, and the hooks see what all programs bind.
pub fn can_know_ports(features: &Features, cgroup: Option<&Path>) -> bool {
    let has_all = |cgroup| fs::metadata(cgroup).is_ok_and(|metadata| metadata.st_ino() == ROOT);
    features.has(Feature::BindRefusal)
        && features.has(Feature::BoundSockets)
        && cgroup.is_some_and(has_all)
}

/// The socket hooks, loaded for one cgroup.
pub(super) struct SocketHooks {
    cgroup: File,
    /// The kernel's name of it.
    id: u64,
    pins: Pins,
    /// Names of the programs that the kernel has taken.
    hooks: Vec<&'static str>,
    /// The kernel's name of the network namespace that is the host's.
    pub(super) netns_cookie: u64,
    attached: BTreeSet<&'static str>,
}

impl SocketHooks {
    /// Loads the programs, and moves those that are attached already over to them.
    ///
    /// # Errors
    /// There is no such cgroup, or the kernel refuses a program or does not say where we are.
    pub(super) fn load(
        ebpf: &mut Ebpf,
        cgroup: &Path,
        pins: &Pins,
        features: &Features,
    ) -> Result<Self> {
        let open = || format!("open the cgroup {}", cgroup.display());
        let cgroup = File::open(cgroup).with_context(open)?;
        let id = cgroup.metadata().with_context(open)?.st_ino();
        if !features.has(Feature::SocketHooks) {
            bail!("this kernel has no programs for sockets: boot one with CONFIG_CGROUP_BPF");
        }
        let netns_cookie = if features.has(Feature::NamespaceCookie) {
            network_namespace().context("read the network namespace's cookie")?
        } else {
            ask_for_namespace(ebpf, &cgroup)?
        };
        HOOKS.iter().try_for_each(|hook| take(ebpf, hook))?;
        let mut names = HOOKS.to_vec();
        if features.has(Feature::BindRefusal) {
            BIND_HOOKS.iter().try_for_each(|hook| take(ebpf, hook))?;
            names.extend(BIND_HOOKS);
        } else {
            BIND_HOOKS.iter().try_for_each(|hook| remove_pin(&pins.socket_link(hook)))?;
        }
        let (pins, attached) = (pins.clone(), BTreeSet::new());
        let mut hooks = Self { cgroup, id, pins, hooks: names, netns_cookie, attached };
        for &hook in &hooks.hooks {
            if hooks.adopt(ebpf, hook)? {
                hooks.attached.insert(hook);
            }
        }
        Ok(hooks)
    }

    /// Whether programs of the host are kept from binding published ports.
    pub(super) fn keep_ports(&self) -> bool {
        BIND_HOOKS.iter().all(|hook| self.hooks.contains(hook))
    }

    /// Whether all are attached that the kernel has taken.
    pub(super) fn are_attached(&self) -> bool {
        self.hooks.iter().all(|hook| self.attached.contains(hook))
    }

    /// `true` where the hook was attached.
    fn adopt(&self, ebpf: &mut Ebpf, hook: &str) -> Result<bool> {
        let path = self.pins.socket_link(hook);
        if !path.exists() {
            return Ok(false);
        }
        let link = CgroupLink::open(&path)
            .with_context(|| format!("open the pinned link {}", path.display()))?;
        let is_ours = link.attachment().is_ok_and(|found| found.cgroup == self.id);
        match link.update(descriptor(ebpf, hook)?) {
            Ok(()) if is_ours => Ok(true),
            outcome => {
                debug!(path = %path.display(), ?outcome, "dropping the pin of another cgroup");
                remove_pin(&path)?;
                Ok(false)
            }
        }
    }

    /// Attaches what is not attached; returns the number of programs that were.
    ///
    /// # Errors
    /// The kernel refuses: somebody has the hierarchy for himself, or it is no cgroup2.
    pub(super) fn attach(&mut self, ebpf: &mut Ebpf) -> Result<usize> {
        let mut writes = 0;
        for &hook in &self.hooks {
            if self.attached.contains(hook) {
                continue;
            }
            let action = || format!("attach {hook} to the cgroup hierarchy");
            // A link of ours shares the place with those of others; `Single` means no flag.
            let (cgroup, mode) = (self.cgroup.as_fd(), CgroupAttachMode::Single);
            let link: FdLink = match program(ebpf, hook)? {
                Program::CgroupSockAddr(program) => {
                    let id = program.attach(cgroup, mode).with_context(action)?;
                    program.take_link(id)?.try_into().with_context(action)?
                }
                Program::CgroupSock(program) => {
                    let id = program.attach(cgroup, mode).with_context(action)?;
                    program.take_link(id)?.try_into().with_context(action)?
                }
                _ => return Err(ProgramError::UnexpectedProgramType).with_context(action),
            };
            let path = self.pins.socket_link(hook);
            remove_pin(&path)?;
            link.pin(&path).with_context(|| format!("pin the link {}", path.display()))?;
            self.attached.insert(hook);
            writes += 1;
        }
        Ok(writes)
    }

    /// Detaches all of them; returns the number of programs that were attached.
    ///
    /// # Errors
    /// A pin can't be removed.
    pub(super) fn detach(&mut self) -> Result<usize> {
        remove_pins(&self.pins)?;
        Ok(std::mem::take(&mut self.attached).len())
    }

    /// Looks which hooks the kernel runs our programs at, and names those it does not. The next
    /// [`SocketHooks::attach`] starts from what was found.
    pub(super) fn missing(&mut self, ebpf: &mut Ebpf) -> Vec<Drift> {
        let id = self.id;
        let mut is_attached = |hook: &str| -> Option<bool> {
            let program = program(ebpf, hook).ok()?.info().ok()?.id();
            let link = CgroupLink::open(&self.pins.socket_link(hook)).ok()?;
            Some(link.attachment().ok()? == Attachment { program, cgroup: id })
        };
        let hooks = || self.hooks.iter().copied();
        self.attached = hooks().filter(|hook| is_attached(hook).unwrap_or(false)).collect();
        hooks()
            .filter(|hook| !self.attached.contains(hook))
            .map(|hook| Drift { what: format!("socket hook {hook} is missing") })
            .collect()
    }
}

/// Has a program say what the kernel calls this thread's network namespace: one that sees what the
/// processes of the cgroup dial, and that is there for one call only.
fn ask_for_namespace(ebpf: &mut Ebpf, cgroup: &File) -> Result<u64> {
    let action = || format!("attach {NAMING} to the cgroup hierarchy");
    load(ebpf, NAMING)?.map_err(|error| refusal(NAMING, error))?;
    let map = ebpf.take_map("NAMESPACE").context("find map NAMESPACE in the eBPF object")?;
    let mut answers: HashMap<_, u64, u64> = map.try_into().context("open map NAMESPACE")?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("open a socket")?;
    let cookie = socket_cookie(&socket).context("read a socket's cookie")?;
    // Of an agent that ended while it asked.
    for stale in answers.keys().collect::<Result<Vec<_>, _>>().context("read map NAMESPACE")? {
        answers.remove(&stale).context("delete from map NAMESPACE")?;
    }
    answers.insert(cookie, 0, 0).context("write map NAMESPACE")?;
    let Program::CgroupSockAddr(program) = program(ebpf, NAMING)? else {
        return Err(ProgramError::UnexpectedProgramType).with_context(action);
    };
    let link = program.attach(cgroup, CgroupAttachMode::Single).with_context(action)?;
    // A datagram socket that is connected sends nothing. Without a route the program was asked, too.
    let _ = socket.connect((Ipv4Addr::LOCALHOST, 0));
    program.detach(link).with_context(|| format!("detach {NAMING}"))?;
    let namespace = answers.get(&cookie, 0).context("read map NAMESPACE")?;
    answers.remove(&cookie).context("delete from map NAMESPACE")?;
    if namespace == 0 {
        bail!("the agent is outside of the cgroup: name one that it is in with --cgroup");
    }
    Ok(namespace)
}

/// Says once what does not work, and why.
pub(super) fn warn_unavailable(error: &anyhow::Error) {
    warn!("programs of this host don't reach published ports: {error:#}");
}

/// Loads a socket hook. Returns what the kernel says.
///
/// # Errors
/// The object has no such program.
pub(super) fn load(ebpf: &mut Ebpf, hook: &str) -> Result<Result<(), ProgramError>> {
    Ok(match program(ebpf, hook)? {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    })
}

fn take(ebpf: &mut Ebpf, hook: &str) -> Result<()> {
    load(ebpf, hook)?.map_err(|error| refusal(hook, error))
}

fn program<'a>(ebpf: &'a mut Ebpf, hook: &str) -> Result<&'a mut Program> {
    ebpf.program_mut(hook).with_context(|| format!("find program {hook} in the eBPF object"))
}

fn descriptor<'a>(ebpf: &'a mut Ebpf, hook: &str) -> Result<&'a ProgramFd> {
    program(ebpf, hook)?.fd().with_context(|| format!("program {hook} is loaded"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_hierarchy_is_found_wherever_it_is_mounted() {
        let line = |root: &str, point: &str, kind: &str| {
            format!("38 31 0:37 {root} {point} rw,relatime shared:9 - {kind} none rw\n")
        };
        let old = line("/", "/sys/fs/cgroup/cpu", "cgroup");
        let part = line("/system.slice", "/run/part", "cgroup2");
        let whole = line("/", "/sys/fs/cgroup/unified", "cgroup2");
        assert_eq!(find_cgroup2(&[old.as_str(), &part].concat()), None);
        let table = [old, part, whole].concat();
        assert_eq!(find_cgroup2(&table), Some("/sys/fs/cgroup/unified"));
    }
}
