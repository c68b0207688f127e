//! The agent's configuration: flags, their defaults, and what follows from them.
//!
//! Owns where things are on the host. Knows nothing of networks.

use std::path::PathBuf;

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
    /// Mount point of the cgroup2 hierarchy; checked, and not used before there are socket hooks
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
}
