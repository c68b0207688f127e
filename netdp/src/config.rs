//! The agent's configuration: flags, their defaults, and what follows from them.
//!
//! Owns where things are on the host. Knows nothing of networks.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use netdp_common::flow::FLOWS_DEFAULT;

/// What the agent is told on its command line.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What enforces the rules
    #[arg(long, value_enum, default_value = "auto")]
    pub dataplane: DataplaneChoice,
    /// Interface to the outside; all that can be one where none is given
    #[arg(long = "uplink", value_name = "IFACE")]
    pub uplinks: Vec<String>,
    /// Most flows that are tracked at a time
    #[arg(long, value_name = "N", default_value_t = FLOWS_DEFAULT,
          value_parser = clap::value_parser!(u32).range(16..=67_108_864))]
    pub flows: u32,
    /// See [`Paths`].
    #[command(flatten)]
    pub paths: Paths,
}

const STATE_DIR: &str = "/var/lib/netdp";
const RUN_DIR: &str = "/run/netdp";
const BPFFS: &str = "/sys/fs/bpf";

/// Where things are on the host.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Directory of the store
    #[arg(long, value_name = "D", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Directory of the socket
    #[arg(long, value_name = "D", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
    /// Mount point of the BPF file system
    #[arg(long, value_name = "D", default_value = BPFFS)]
    pub bpffs: PathBuf,
    /// Mount point of the cgroup2 hierarchy; the host's where none is given
    #[arg(long, value_name = "D")]
    pub cgroup: Option<PathBuf>,
}

/// Backends that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DataplaneChoice {
    /// The best that this host can do.
    Auto,
    /// eBPF programs.
    Ebpf,
    /// iptables rules.
    Iptables,
}

impl Config {
    /// Looks for what can't work, before anything is touched.
    ///
    /// # Errors
    /// Fails for a dataplane that this version lacks and a cgroup directory that is none.
    pub fn check(&self) -> Result<()> {
        if self.dataplane == DataplaneChoice::Iptables {
            bail!("the iptables dataplane is not available in this version: use --dataplane ebpf");
        }
        if let Some(cgroup) = &self.paths.cgroup
            && !cgroup.join("cgroup.controllers").exists()
        {
            bail!(
                "{} is no cgroup2 hierarchy: give its mount point or leave --cgroup out",
                cgroup.display()
            );
        }
        Ok(())
    }
}

impl Default for Paths {
    fn default() -> Self {
        let [state_dir, run_dir, bpffs] = [STATE_DIR, RUN_DIR, BPFFS].map(PathBuf::from);
        Self { state_dir, run_dir, bpffs, cgroup: None }
    }
}

impl Paths {
    /// Where the agent listens.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("netdp.sock")
    }

    /// The cgroup2 hierarchy: as configured, else where the host has it mounted.
    pub fn cgroup(&self) -> Option<PathBuf> {
        self.cgroup.clone().or_else(|| {
            let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
            mounts.lines().find_map(cgroup2_mount_point)
        })
    }
}

/// The mount point in a line of mountinfo (proc_pid_mountinfo(5)), if it is a cgroup2's.
fn cgroup2_mount_point(line: &str) -> Option<PathBuf> {
    let (mount, file_system) = line.split_once(" - ")?;
    let point = mount.split(' ').nth(4)?;
    // The kernel writes blanks and backslashes in octal; a mount point of that kind is no
    // cgroup2's on any host that we know of.
    let found = file_system.starts_with("cgroup2 ") && !point.contains('\\');
    found.then(|| Path::new(point).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_wherever_it_is_mounted() {
        let lines = [
            (
                "36 35 98:0 / /sys/fs/cgroup rw,noatime shared:1 - cgroup2 cgroup2 rw",
                "/sys/fs/cgroup",
            ),
            (
                "40 36 0:33 / /sys/fs/cgroup/unified rw - cgroup2 none rw,nsdelegate",
                "/sys/fs/cgroup/unified",
            ),
        ];
        for (line, point) in lines {
            assert_eq!(cgroup2_mount_point(line), Some(point.into()));
        }
        for line in [
            "37 36 0:31 / /sys/fs/cgroup/memory rw master:1 - cgroup cgroup rw,memory",
            "22 1 8:1 / / rw - ext4 /dev/cgroup2 rw",
            "",
        ] {
            assert_eq!(cgroup2_mount_point(line), None);
        }
    }
}
