//! The agent's configuration: flags, their defaults, and what follows from them.
//!
//! Owns where things are on the host. Knows nothing of networks.

use std::{convert::Infallible, path::PathBuf, str::FromStr};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use netdp_common::{config::Timeouts, flow::FLOWS_DEFAULT};

/// What the agent is told on its command line.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What enforces the rules
    #[arg(long, value_enum, default_value = "auto")]
    pub dataplane: DataplaneChoice,
    /// Interface to the outside; all that can be one where none is given
    #[arg(long = "uplink", value_name = "IFACE")]
    pub uplinks: Vec<String>,
    /// Whether packets of flows go past the host's stack, its firewall included, where they can
    #[arg(
        long,
        value_name = "on|off",
        value_enum,
        default_value = "on",
        hide_possible_values = true
    )]
    pub fast_path: Switch,
    /// Most flows of each family that are tracked at a time
    // Linux 5.10 refuses arrays of 4 GiB: an IPv6 flow takes 224 bytes of one.
    #[arg(long, value_name = "N", default_value_t = FLOWS_DEFAULT,
          value_parser = clap::value_parser!(u32).range(16..=16_777_216))]
    pub flows: u32,
    /// How long an idle flow is kept: tcp-established, tcp-transitory, udp-replied, udp-unreplied,
    /// icmp or other
    #[arg(long = "timeout", value_name = "KIND=SECONDS")]
    pub timeouts: Vec<Timeout>,
    /// Where Docker finds its network driver netdp: a path, auto (where Docker is on this host) or off
    #[arg(long, value_name = "PATH|auto|off", default_value = "auto")]
    pub docker_socket: DockerSocket,
    /// See [`Paths`].
    #[command(flatten)]
    pub paths: Paths,
}

/// How long idle flows of one kind are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout {
    kind: &'static str,
    seconds: u32,
}

/// Whether and where Docker is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DockerSocket {
    /// Where Docker looks, if there is Docker here. An agent with a run directory of its own is not
    /// the one that this host's Docker would want.
    Auto,
    /// Nowhere.
    Off,
    /// At this path.
    At(PathBuf),
}

impl FromStr for DockerSocket {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "auto" => Self::Auto,
            "off" => Self::Off,
            path => Self::At(path.into()),
        })
    }
}

/// A field of [`Timeouts`].
type TimeoutField = fn(&mut Timeouts) -> &mut u32;

/// Kinds of [`Timeout`] by name.
const TIMEOUTS: [(&str, TimeoutField); 6] = [
    ("tcp-established", |timeouts| &mut timeouts.tcp_established),
    ("tcp-transitory", |timeouts| &mut timeouts.tcp_transitory),
    ("udp-replied", |timeouts| &mut timeouts.udp_replied),
    ("udp-unreplied", |timeouts| &mut timeouts.udp_unreplied),
    ("icmp", |timeouts| &mut timeouts.icmp),
    ("other", |timeouts| &mut timeouts.other),
];

/// Longest timeout, in seconds: ten years fit into the programs' clock with room to spare.
const LONGEST_TIMEOUT: u32 = 315_360_000;

impl FromStr for Timeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kinds = TIMEOUTS.map(|(name, _)| name).join(", ");
        let (name, seconds) =
            text.split_once('=').ok_or("write it as KIND=SECONDS, for example icmp=60")?;
        let (kind, _) = TIMEOUTS
            .into_iter()
            .find(|(kind, _)| *kind == name)
            .ok_or_else(|| format!("{name:?} is no kind of flow: give one of {kinds}"))?;
        match seconds.parse() {
            Ok(seconds @ 1..=LONGEST_TIMEOUT) => Ok(Self { kind, seconds }),
            _ => Err(format!("{seconds:?} is no timeout: give seconds, at least 1")),
        }
    }
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
    /// Mount point of the cgroup2 hierarchy, where the mount table names none or another
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

/// What can be had or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Where it works.
    On,
    /// Nowhere.
    Off,
}

impl Config {
    /// The timeouts asked for, and those of the RFCs for what was not.
    pub fn timeouts(&self) -> Timeouts {
        let mut timeouts = Timeouts::RFC;
        for Timeout { kind, seconds } in &self.timeouts {
            for (_, field) in TIMEOUTS.iter().filter(|(name, _)| name == kind) {
                *field(&mut timeouts) = *seconds;
            }
        }
        timeouts
    }

    /// Looks for what can't work, before anything is touched.
    ///
    /// # Errors
    /// Fails for a dataplane that this version lacks and a cgroup directory that is none.
    pub fn check(&self) -> Result<()> {
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
    /// Whether this is the host's own agent, and none beside it with a run directory of its own.
    pub fn is_default_agent(&self) -> bool {
        self.run_dir.as_os_str() == RUN_DIR
    }

    /// Where the agent listens.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("netdp.sock")
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        config: Config,
    }

    fn timeouts(arguments: &[&str]) -> Result<Timeouts, String> {
        Line::try_parse_from([&["agent"], arguments].concat())
            .map(|line| line.config.timeouts())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn timeouts_are_those_of_the_rfcs_unless_told() {
        assert_eq!(timeouts(&[]), Ok(Timeouts::RFC));
        let asked = timeouts(&["--timeout", "icmp=10", "--timeout", "tcp-established=86400"]);
        assert_eq!(asked, Ok(Timeouts { icmp: 10, tcp_established: 86_400, ..Timeouts::RFC }));
    }

    #[test]
    fn docker_is_served_where_it_is_or_where_one_is_told() {
        let asked = |arguments: &[&str]| {
            let line = [&["agent"], arguments].concat();
            Line::try_parse_from(line).unwrap().config
        };
        assert_eq!(asked(&[]).docker_socket, DockerSocket::Auto);
        assert!(asked(&[]).paths.is_default_agent());
        assert!(!asked(&["--run-dir", "/tmp/r"]).paths.is_default_agent());
        assert_eq!(asked(&["--docker-socket", "off"]).docker_socket, DockerSocket::Off);
        let at = DockerSocket::At("/tmp/s".into());
        assert_eq!(asked(&["--docker-socket", "/tmp/s"]).docker_socket, at);
    }

    #[test]
    fn a_bad_timeout_is_named() {
        for (bad, hint) in [("icmp", "KIND=SECONDS"), ("tcp=5", "tcp-established"), ("icmp=0", "1")]
        {
            let refusal = timeouts(&["--timeout", bad]).unwrap_err();
            assert!(refusal.contains(hint), "{bad}: {refusal}");
        }
    }
}
