//! The systems that are compared, each in a lab of its own with the same wiring, addresses and ports.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use netdp_tests::backend::{Backend, Firewall, Variant};
use netdp_tests::bench::obstacle;
use netdp_tests::docker::Installation;
use netdp_tests::lab::{Lab, LabBuilder, Offload};
use netdp_tests::namespace::{Fate, Namespace};
use netdp_tests::net::IPV4;

use crate::load::Way;
use crate::peers::{self, Port};
use crate::rules::Published;

/// Port for bulk and exchanges, and for small packets.
pub(crate) const PORT: u16 = 32_000;
/// Ports that are published in numbers begin here.
const FIRST: u16 = 1001;
/// The network, and its bridge where we make it.
pub(crate) const NETWORK: &str = "bench";
/// The container that has published ports.
const CONTAINER: &str = "a1";

/// What forwards between containers and the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum System {
    /// Nothing: both ends of one veth.
    VethDirect,
    /// A bridge and the host's routing, without a rule.
    Routed,
    /// The rules that Docker writes, in the old tables.
    IptablesLegacy,
    /// The same in nf_tables.
    IptablesNft,
    /// What they mean, in maps of nftables.
    NftMap,
    /// Docker itself.
    Docker,
    /// Podman's netavark.
    Netavark,
    /// The CNI project's plugins.
    CniBridge,
    /// netdp with eBPF.
    NetdpEbpf,
    /// netdp with iptables.
    NetdpIptables,
}

impl System {
    /// All of them.
    pub(crate) const ALL: [Self; 10] = [
        Self::VethDirect,
        Self::Routed,
        Self::IptablesLegacy,
        Self::IptablesNft,
        Self::NftMap,
        Self::Docker,
        Self::Netavark,
        Self::CniBridge,
        Self::NetdpEbpf,
        Self::NetdpIptables,
    ];

    /// Its name in tables and files.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::VethDirect => "veth-direct",
            Self::Routed => "routed",
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesNft => "iptables-nft",
            Self::NftMap => "nft-map",
            Self::Docker => "docker",
            Self::Netavark => "netavark",
            Self::CniBridge => "cni-bridge",
            Self::NetdpEbpf => "netdp-ebpf",
            Self::NetdpIptables => "netdp-iptables",
        }
    }

    /// Whether what it costs can depend on how many ports are published. Engines take longer to publish
    /// many than all else together.
    const fn has_many_ports(self) -> bool {
        use System::{CniBridge, Docker, Netavark, Routed, VethDirect};
        !matches!(self, VethDirect | Routed | Docker | Netavark | CniBridge)
    }

    /// Whether it can be asked for so many published ports here.
    pub(crate) fn has_ports(self, ports: u16) -> bool {
        let backend = match self {
            Self::NetdpIptables => Backend::Iptables(Variant::Nft),
            _ => Backend::Ebpf,
        };
        ports == 1 || self.has_many_ports() && matches!(obstacle(backend, ports.into()), Ok(None))
    }

    /// Whether it has a bridge, with neighbours on it.
    pub(crate) const fn has_bridge(self) -> bool {
        !matches!(self, Self::VethDirect)
    }

    /// Why it can't be measured here.
    pub(crate) fn missing(self) -> Option<String> {
        let program = match self {
            Self::VethDirect | Self::Routed | Self::NetdpEbpf => None,
            Self::IptablesLegacy => Backend::Iptables(Variant::Legacy).missing_program(),
            Self::IptablesNft | Self::NetdpIptables => {
                Backend::Iptables(Variant::Nft).missing_program()
            }
            Self::NftMap => (!netdp_tests::runtime::is_installed("nft")).then_some("nft"),
            Self::Docker => return Installation::find().err().map(|error| format!("{error:#}")),
            Self::Netavark => return peers::netavark().err().map(|error| format!("{error:#}")),
            Self::CniBridge => return peers::cni_bridge().err().map(|error| format!("{error:#}")),
        };
        program.map(|program| format!("{program} is not installed"))
    }

    fn lab(self) -> LabBuilder {
        match self {
            Self::NetdpEbpf => Lab::builder(),
            Self::NetdpIptables => Lab::builder().backend(Backend::Iptables(Variant::Nft)),
            Self::Docker => Lab::builder().backend(Backend::Docker(Firewall::Iptables)),
            _ => Lab::builder().without_agent(),
        }
    }
}

/// A system that is up, with two containers and one that is outside.
#[derive(Debug)]
pub(crate) struct Stand {
    system: System,
    lab: Lab,
    container: Namespace,
    neighbour: Option<Namespace>,
    /// How many ports are published in numbers.
    ports: u16,
    offload: Offload,
}

impl Stand {
    /// Builds a system with so many published ports; without offloads every frame is complete and has
    /// 1,500 bytes at most.
    pub(crate) fn build(system: System, ports: u16, offload: Offload) -> Result<Self> {
        let lab = system.lab().offload(offload).build()?;
        let container = lab.container(CONTAINER)?;
        let mut stand = Self { system, lab, container, neighbour: None, ports, offload };
        let build = || -> Result<Option<Namespace>> {
            match system {
                System::VethDirect => stand.join_directly().map(|()| None),
                System::NetdpEbpf | System::NetdpIptables | System::Docker => {
                    stand.create_network()
                }
                System::Netavark | System::CniBridge => stand.have_network_made(),
                _ => stand.bridge(),
            }
        };
        stand.neighbour = build().with_context(|| format!("build {}", system.name()))?;
        if offload == Offload::Off {
            for namespace in stand.lab.namespaces() {
                namespace.disable_offload()?;
            }
        }
        Ok(stand)
    }

    pub(crate) fn system(&self) -> System {
        self.system
    }

    /// What distinguishes its numbers from those of a stand with offloads.
    pub(crate) fn suffix(&self) -> &'static str {
        match self.offload {
            Offload::On => "",
            Offload::Off => "_without_offload",
        }
    }

    fn join_directly(&self) -> Result<()> {
        let (outside, container) = (self.lab.outside(), &self.container);
        // The lab's route to containers would come before the link's own.
        outside.ip(&format!(
            "route del {}\nlink add direct type veth peer name eth0 netns {}\n\
             link set direct up\naddress add {}/24 dev direct\n",
            IPV4.subnet_a,
            container.name(),
            IPV4.gateway_a
        ))?;
        container.ip(&format!("link set eth0 up\naddress add {}/24 dev eth0\n", IPV4.a1))
    }

    /// A network as netdp or Docker make it.
    fn create_network(&self) -> Result<Option<Namespace>> {
        self.lab.create_network(NETWORK, IPV4.subnet_a, &[])?;
        let single = format!("{PORT}:{PORT}");
        let (first, last) = (FIRST, FIRST + self.ports - 1);
        let many = format!("{first}-{last}:{first}-{last}");
        let udp = format!("{single}/udp");
        let published = [single.as_str(), &udp, &many];
        self.lab.connect(NETWORK, &self.container, CONTAINER, IPV4.a1, &published)?;
        self.lab.attach(NETWORK, "a2", IPV4.a2, &[]).map(Some)
    }

    /// A network as an engine's helpers make it.
    fn have_network_made(&self) -> Result<Option<Namespace>> {
        let make = if self.system == System::Netavark { peers::set_up } else { peers::add };
        let neighbour = self.lab.container("a2")?;
        let ports: [Port; 3] = [(PORT, "tcp"), (PORT, "udp"), (FIRST, "tcp")];
        make(&self.lab, &self.container, IPV4.a1, &ports)?;
        make(&self.lab, &neighbour, IPV4.a2, &[])?;
        Ok(Some(neighbour))
    }

    /// A network as netdp or Docker make it, by hand and without rules.
    fn bridge(&self) -> Result<Option<Namespace>> {
        let (host, neighbour) = (self.lab.host(), self.lab.container("a2")?);
        host.set_sysctl("net.ipv4.ip_forward", "1")?;
        host.ip(&format!(
            "link add {NETWORK} type bridge\nlink set {NETWORK} up\naddress add {}/24 dev {NETWORK}\n",
            IPV4.gateway_a
        ))?;
        for (container, address) in [(&self.container, IPV4.a1), (&neighbour, IPV4.a2)] {
            let name = container.name();
            let link = format!("v{}", address.to_string().replace('.', ""));
            host.ip(&format!(
                "link add {link} type veth peer name eth0 netns {name}\n\
                 link set {link} master {NETWORK} up\n"
            ))?;
            container.ip(&format!(
                "link set eth0 up\naddress add {address}/24 dev eth0\nroute add default via {}\n",
                IPV4.gateway_a
            ))?;
        }
        self.write_rules()?;
        Ok(Some(neighbour))
    }

    /// From the container to whoever is outside.
    pub(crate) fn out(&self) -> Way {
        let server = match self.system {
            System::VethDirect => IPV4.gateway_a,
            _ => IPV4.outside,
        };
        let outside = self.lab.outside().clone();
        way(&self.container, &outside, server, server)
    }

    /// From outside to the container: where there is a published port, by that.
    pub(crate) fn published(&self) -> Way {
        let dialled = match self.system {
            System::VethDirect | System::Routed => IPV4.a1,
            _ => IPV4.host,
        };
        let way = way(self.lab.outside(), &self.container, dialled, IPV4.a1);
        match self.system {
            System::VethDirect => way,
            // One address has ports for a second or two of connections.
            _ => Way { sources: IPV4.guests.to_vec(), ..way },
        }
    }

    /// From one container to its neighbour.
    pub(crate) fn neighbour(&self) -> Option<Way> {
        self.neighbour.as_ref().map(|peer| way(peer, &self.container, IPV4.a1, IPV4.a1))
    }

    /// How many ports are published in numbers.
    pub(crate) fn ports(&self) -> u16 {
        self.ports
    }

    /// From outside to the port of the container that was published last.
    pub(crate) fn last_published(&self) -> Way {
        self.published().to_port(FIRST + self.ports - 1)
    }

    fn write_rules(&self) -> Result<()> {
        let published = Published {
            bridge: NETWORK,
            subnet: IPV4.subnet_a,
            container: IPV4.a1,
            tcp: vec![PORT..=PORT, FIRST..=FIRST + self.ports - 1],
            udp: vec![PORT],
        };
        let (program, arguments, text): (_, &[&str], _) = match self.system {
            System::IptablesLegacy => ("iptables-legacy-restore", &[], published.iptables()),
            System::IptablesNft => ("iptables-nft-restore", &[], published.iptables()),
            System::NftMap => ("nft", &["-f", "-"], published.nftables()),
            _ => return Ok(()),
        };
        let mut child = self
            .lab
            .host()
            .command(program, Fate::DiesWithParent)?
            .args(arguments)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {program}"))?;
        let mut input = child.stdin.take().context("open its input")?;
        input.write_all(text.as_bytes()).with_context(|| format!("write to {program}"))?;
        drop(input);
        let output = child.wait_with_output().with_context(|| format!("wait for {program}"))?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program}: {}", error.trim());
        Ok(())
    }
}

fn way(client: &Namespace, server: &Namespace, dial: IpAddr, listen: IpAddr) -> Way {
    Way {
        client: client.clone(),
        server: server.clone(),
        dial: SocketAddr::new(dial, PORT),
        listen,
        sources: Vec::new(),
    }
}
