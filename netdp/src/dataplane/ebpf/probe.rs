//! What a kernel may have or not: how we find out, and what netdp does without it.
//!
//! Owns the one table of it, which `doctor`, `status` and docs/kernels.md show. Never asks for a
//! version: distributions take features back and switch them off. The versions in the table are for
//! readers, and for the test that a kernel which should have a feature has it.

use std::{collections::BTreeSet, env, io, os::fd::AsFd, path::Path};

use anyhow::{Result, anyhow, bail};
use aya::{
    programs::{ProgramType, SchedClassifier, TcAttachType},
    sys::{BpfHelper, is_helper_supported, is_program_supported},
};
use nix::{
    net::if_::if_indextoname,
    sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit},
};
use tracing::debug;

use super::sys;
use crate::{
    dataplane::KernelFeature,
    netlink::{sockets, sysctl},
    plan::force_forwarding_sysctl,
};

/// Names features that the agent is to do without although the kernel has them, separated by commas:
/// tests try every fall-back on one kernel.
const WITHOUT_VARIABLE: &str = "NETDP_WITHOUT";

/// The loopback interface of every network namespace.
const LOOPBACK: u32 = 1;

/// Something that netdp uses and not every kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// bpf(2), for whoever runs netdp.
    Bpf,
    /// Programs for tc hooks.
    TcPrograms,
    /// Reading many rows of a map at once.
    MapBatches,
    /// tcx hooks.
    Tcx,
    /// A clock that is read from memory.
    CoarseClock,
    /// Programs for sockets.
    SocketHooks,
    /// Asking a socket for the name of its network namespace.
    NamespaceCookie,
    /// Programs for sockets that say why they refuse.
    BindRefusal,
    /// Ending sockets of the host.
    SocketDestroy,
    /// Listing sockets that have a port and do nothing with it.
    BoundSockets,
    /// Forwarding IPv6 by interface.
    Ipv6ForceForwarding,
}

/// A row of the table.
#[derive(Debug)]
pub struct Description {
    /// What it is about.
    pub feature: Feature,
    /// Its name: in output, and for the variable `NETDP_WITHOUT`.
    pub name: &'static str,
    /// The version of Linux that brought it.
    pub since: (u32, u32),
    /// How we find out.
    pub probe: &'static str,
    /// What is lost, and what takes its place.
    pub without: &'static str,
    /// Whether netdp is nothing without it.
    pub needed: bool,
    is_there: fn() -> bool,
}

/// Everything that netdp asks a kernel for before it uses it.
pub static FEATURES: [Description; 11] = [
    Description {
        feature: Feature::Bpf,
        name: "bpf",
        since: (4, 4),
        probe: "makes a map",
        without: "nothing works",
        needed: true,
        is_there: || sys::trial_map().is_ok(),
    },
    Description {
        feature: Feature::TcPrograms,
        name: "tc-programs",
        since: (4, 1),
        probe: "loads an empty program",
        without: "nothing works",
        needed: true,
        is_there: || is_program_supported(ProgramType::SchedClassifier).unwrap_or(false),
    },
    Description {
        feature: Feature::MapBatches,
        name: "map-batches",
        since: (5, 6),
        probe: "reads a map that way",
        without: "nothing works: idle flows could not be collected",
        needed: true,
        is_there: has_map_batches,
    },
    Description {
        feature: Feature::Tcx,
        name: "tcx",
        since: (6, 6),
        probe: "asks for the programs at a hook",
        without: "programs are filters of clsact qdiscs: others can take the qdisc away, and with it \
                  the filters, until the agent looks",
        needed: false,
        is_there: has_tcx,
    },
    Description {
        feature: Feature::CoarseClock,
        name: "coarse-clock",
        since: (5, 11),
        probe: "loads a program that calls the helper",
        without: "the exact clock, once in each tick",
        needed: false,
        is_there: has_coarse_clock,
    },
    Description {
        feature: Feature::SocketHooks,
        name: "socket-hooks",
        since: (4, 17),
        probe: "loads an empty program",
        without: "programs of the host don't reach published ports",
        needed: false,
        is_there: || is_program_supported(ProgramType::CgroupSockAddr).unwrap_or(false),
    },
    Description {
        feature: Feature::NamespaceCookie,
        name: "namespace-cookie",
        since: (5, 14),
        probe: "asks a socket",
        without: "a program at a cgroup hook says it when the agent starts, if the agent is in that \
                  cgroup; if not, programs of the host don't reach published ports",
        needed: false,
        is_there: || sys::network_namespace().is_ok(),
    },
    Description {
        feature: Feature::BindRefusal,
        name: "bind-refusal",
        since: (5, 18),
        probe: "loads a program that calls the helper",
        without: "the agent holds each published port with a socket of its own: while it runs, and for \
                  as many ports as it may have open files",
        needed: false,
        is_there: has_bind_refusal,
    },
    Description {
        feature: Feature::SocketDestroy,
        name: "socket-destroy",
        since: (4, 5),
        probe: "orders the end of a socket that nobody has",
        without: "connections of the host to a container that has gone end by their own timeouts",
        needed: false,
        is_there: || sockets::can_destroy().unwrap_or(false),
    },
    Description {
        feature: Feature::BoundSockets,
        name: "bound-sockets",
        since: (6, 8),
        probe: "binds a socket and looks for it",
        without: "a flow that gets a port of source NAT's own is compared with the sockets of the host, \
                  even where none can have one",
        needed: false,
        is_there: || sockets::are_all_shown().unwrap_or(false),
    },
    Description {
        feature: Feature::Ipv6ForceForwarding,
        name: "ipv6-force-forwarding",
        since: (6, 17),
        probe: "looks for the setting of the loopback interface",
        without: "with the first IPv6 network the host becomes a router on all of its interfaces",
        needed: false,
        is_there: has_force_forwarding,
    },
];

/// What this kernel has.
#[derive(Clone, Debug)]
pub struct Features(BTreeSet<Feature>);

impl Features {
    /// Asks the kernel for everything in the table.
    #[must_use]
    pub fn probe() -> Self {
        raise_locked_memory();
        let found = FEATURES.iter().filter(|row| !Self::is_declined(row) && (row.is_there)());
        Self(found.map(|row| row.feature).collect())
    }

    /// Whether `NETDP_WITHOUT` names it.
    #[must_use]
    pub fn is_declined(row: &Description) -> bool {
        let without = env::var(WITHOUT_VARIABLE).unwrap_or_default();
        without.split(',').any(|name| name == row.name)
    }

    /// Whether the kernel has it.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        self.0.contains(&feature)
    }

    /// The rows of what it has not.
    pub fn missing(&self) -> impl Iterator<Item = &'static Description> {
        FEATURES.iter().filter(|row| !self.has(row.feature))
    }

    /// The table, for people.
    #[must_use]
    pub fn rows(&self) -> Vec<KernelFeature> {
        let row = |row: &Description| KernelFeature {
            name: row.name,
            since: row.since,
            is_there: self.has(row.feature),
            without: row.without,
        };
        FEATURES.iter().map(row).collect()
    }

    /// Refuses a kernel that netdp can't work on.
    ///
    /// # Errors
    /// In one line what is missing and what to do.
    pub fn require(&self) -> Result<()> {
        if !self.has(Feature::Bpf)
            && let Err(error) = sys::trial_map()
        {
            return Err(without_bpf(error));
        }
        match self.missing().find(|row| row.needed) {
            None => Ok(()),
            Some(row) => bail!(
                "this kernel has no {}, which came with Linux {}.{}: boot Linux 5.10 or later, \
                 built with CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS",
                row.name,
                row.since.0,
                row.since.1
            ),
        }
    }
}

/// Lifts this process's limit of locked memory as far as it may. Before Linux 5.11 maps count as
/// such, those of all agents of a user together.
fn raise_locked_memory() {
    let kind = Resource::RLIMIT_MEMLOCK;
    if setrlimit(kind, RLIM_INFINITY, RLIM_INFINITY).is_err()
        && let Ok((_, hard)) = getrlimit(kind)
        && let Err(error) = setrlimit(kind, hard, hard)
    {
        debug!(%error, "the limit of locked memory stays as it is");
    }
}

/// Why a kernel gives nobody a map, and what to do.
fn without_bpf(error: io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => {
            anyhow!("this kernel has no BPF: boot one that is built with CONFIG_BPF_SYSCALL")
        }
        Some(libc::EPERM | libc::EACCES) => anyhow!(
            "BPF is forbidden here: run the agent as root with CAP_BPF and CAP_NET_ADMIN, where no \
             seccomp filter or lockdown forbids bpf(2); before Linux 5.11 raise the limit of locked \
             memory, too (ulimit -l, LimitMEMLOCK=)"
        ),
        _ => anyhow::Error::from(error).context("make a BPF map"),
    }
}

fn has_map_batches() -> bool {
    let Ok(map) = sys::trial_map() else { return false };
    let read = sys::lookup_batch::<u32, u32>(map.as_fd(), None, &mut [0], &mut [0]);
    read.is_ok()
}

fn has_tcx() -> bool {
    let Ok(loopback) = if_indextoname(LOOPBACK) else { return false };
    SchedClassifier::query_tcx(&loopback.to_string_lossy(), TcAttachType::Ingress).is_ok()
}

fn has_coarse_clock() -> bool {
    let helper = BpfHelper::BPF_FUNC_ktime_get_coarse_ns;
    is_helper_supported(ProgramType::SchedClassifier, helper).unwrap_or(false)
}

fn has_bind_refusal() -> bool {
    // The socket itself is asked whether it is for IPv6 alone, which takes the kernel's BTF.
    let helpers = [BpfHelper::BPF_FUNC_set_retval, BpfHelper::BPF_FUNC_skc_to_udp6_sock];
    let is_there = |&helper: &BpfHelper| {
        is_helper_supported(ProgramType::CgroupSockAddr, helper).unwrap_or(false)
    };
    helpers.iter().all(is_there) && Path::new("/sys/kernel/btf/vmlinux").exists()
}

fn has_force_forwarding() -> bool {
    let Ok(loopback) = if_indextoname(LOOPBACK) else { return false };
    let name = force_forwarding_sysctl(&loopback.to_string_lossy());
    matches!(sysctl::read(&name), Ok(Some(_)))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    /// Debian's kernels, which the suite load and docs/kernels.md are about.
    const KERNELS: [(u32, u32); 4] = [(5, 10), (6, 1), (6, 12), (7, 2)];

    #[test]
    fn the_table_has_a_row_for_each_feature_and_a_name_for_each_row() {
        let features: BTreeSet<_> = FEATURES.iter().map(|row| row.feature).collect();
        let names: BTreeSet<_> = FEATURES.iter().map(|row| row.name).collect();
        assert_eq!(features.len(), FEATURES.len());
        assert_eq!(names.len(), FEATURES.len());
        // What is needed is there on the oldest kernel that netdp works on.
        assert!(FEATURES.iter().all(|row| !row.needed || row.since <= KERNELS[0]));
    }

    #[test]
    fn a_kernel_without_bpf_is_refused_in_one_line() {
        for (code, expected) in [(libc::ENOSYS, "CONFIG_BPF_SYSCALL"), (libc::EPERM, "as root")] {
            let refusal = format!("{:#}", without_bpf(io::Error::from_raw_os_error(code)));
            assert!(refusal.contains(expected) && !refusal.contains('\n'), "{refusal}");
        }
        let old = FEATURES.iter().filter(|row| row.since < (5, 6)).map(|row| row.feature);
        let refusal = format!("{:#}", Features(old.collect()).require().unwrap_err());
        assert!(refusal.contains("no map-batches, which came with Linux 5.6"), "{refusal}");
    }

    /// The part of docs/kernels.md that follows from the table.
    fn table() -> String {
        let version = |(major, minor): (u32, u32)| format!("{major}.{minor}");
        let names = KERNELS.map(version).join(" | ");
        let mut text =
            format!("| feature | since | {names} | how netdp finds out | without it |\n");
        text.push_str(&format!("|{}\n", "---|".repeat(4 + KERNELS.len())));
        for row in &FEATURES {
            let marks = KERNELS.map(|kernel| if kernel >= row.since { "✅" } else { "❌" });
            let (since, marks) = (version(row.since), marks.join(" | "));
            let Description { name, probe, without, .. } = row;
            writeln!(text, "| {name} | {since} | {marks} | {probe} | {without} |").unwrap();
        }
        text
    }

    #[test]
    fn the_page_of_kernels_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/kernels.md");
        let page = std::fs::read_to_string(path).unwrap();
        let (before, rest) = page.split_once("<!-- features -->\n").unwrap();
        let (_, after) = rest.split_once("<!-- end -->\n").unwrap();
        let wanted = format!("{before}<!-- features -->\n{}<!-- end -->\n{after}", table());
        if env::var_os("NETDP_WRITE_DOCS").is_some() {
            std::fs::write(path, &wanted).unwrap();
        } else {
            assert_eq!(page, wanted, "NETDP_WRITE_DOCS=1 cargo test -p netdp page_of_kernels");
        }
    }
}
