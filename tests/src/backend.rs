//! What enforces the networks of a lab.

use crate::runtime::is_installed;

/// A backend, as the agent is told to use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// eBPF programs.
    Ebpf,
    /// The same with all packets by the host's stack.
    EbpfByStack,
    /// iptables, by these programs.
    Iptables(Variant),
    /// Docker instead of netdp, with this firewall: the outside oracle.
    Docker(Firewall),
}

/// A container engine whose words are spoken instead of netdp's, for networks that are netdp's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Docker's daemon and command line, with netdp as a network driver.
    Docker,
}

impl Engine {
    /// Its name in results.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Docker => "docker",
        }
    }
}

/// What Docker puts its rules into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firewall {
    /// iptables, as ever.
    Iptables,
    /// nftables, since Docker 29.
    Nftables,
    /// Nothing: its networks are netdp's.
    Off,
}

impl Firewall {
    /// Its name in Docker's settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::Off => "off",
        }
    }
}

/// Which of the host's iptables programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Those that write to nf_tables.
    Nft,
    /// Those that write to the old tables.
    Legacy,
}

impl Backend {
    /// Its name on the command line and in results.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ebpf | Self::EbpfByStack => "ebpf",
            Self::Iptables(_) => "iptables",
            Self::Docker(_) => "docker",
        }
    }

    /// Whether it is Docker, which has words and promises of its own.
    #[must_use]
    pub const fn is_docker(self) -> bool {
        matches!(self, Self::Docker(_))
    }

    /// Whether it is eBPF, however packets go.
    #[must_use]
    pub const fn is_ebpf(self) -> bool {
        matches!(self, Self::Ebpf | Self::EbpfByStack)
    }

    /// What the agent is told besides its name.
    #[must_use]
    pub const fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::EbpfByStack => &["--fast-path", "off"],
            Self::Ebpf | Self::Iptables(_) | Self::Docker(_) => &[],
        }
    }

    /// A program that it needs and that is not installed: guests with other kernels have few.
    #[must_use]
    pub fn missing_program(self) -> Option<&'static str> {
        let programs: &[&str] = match self {
            Self::Ebpf | Self::EbpfByStack | Self::Docker(_) => &[],
            Self::Iptables(Variant::Nft) => &["iptables-nft-restore", "ip6tables-nft-restore"],
            Self::Iptables(Variant::Legacy) => {
                &["iptables-legacy-restore", "ip6tables-legacy-restore"]
            }
        };
        programs.iter().copied().find(|program| !is_installed(program))
    }

    /// What the agent's environment says of it.
    #[must_use]
    pub const fn environment(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Ebpf | Self::EbpfByStack | Self::Docker(_) => None,
            Self::Iptables(Variant::Nft) => Some(("NETDP_IPTABLES", "nft")),
            Self::Iptables(Variant::Legacy) => Some(("NETDP_IPTABLES", "legacy")),
        }
    }
}
