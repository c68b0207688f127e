//! The standard laboratory: a host, the outside, containers, and an agent on the host.
//!
//! ```text
//!   F 10.1.0.3 ──── up1 10.1.0.2 ┐
//!     fd00:1::3         fd00:1::2
//!                                H ── bridges ── containers
//!   E 10.0.0.3 ──── up0 10.0.0.2 ┘
//!     fd00::3           fd00::2
//!     192.0.2.1-5       10.0.0.22
//!     2001:db8::1-5     fd00::22
//! ```
//!
//! E and F have routes to the networks' subnets, so that direct access really arrives at H.
//! Knows netdp's command line, not its inside.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, SMALL_FLOWS};
use crate::backend::{Backend, Engine, Firewall};
use crate::diagnose;
use crate::docker::Docker;
use crate::harness::Report;
use crate::namespace::{Fate, Namespace};
use crate::net::{Family, IPV4, IPV6, Net, ipv4_beside};
use crate::probe::{Address, PATIENCE, locked};
use crate::runtime::{ensure_root, poll_until};

/// Subnet of the first network of the standard lab.
pub const SUBNET_A: &str = "172.20.0.0/24";
/// Subnet of the second network of the standard lab.
pub const SUBNET_B: &str = "172.21.0.0/24";

/// Tells the labs of one process apart.
static NEXT_LAB: AtomicU32 = AtomicU32::new(0);

/// What is on the other end of `up1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondInterface {
    /// There is no `up1`.
    Absent,
    /// F, and `up1` is an uplink.
    Uplink,
    /// F, and the agent is told that `up0` is its only uplink: `up1` has no program.
    Unlisted,
}

/// Whether links may leave segments and checksums to the hardware that they don't have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// As the kernel sets up veths.
    On,
    /// Every frame on every veth is complete.
    Off,
}

/// What runs on the host when the lab is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AgentState {
    Missing,
    Stopped,
    Running,
}

/// A lab to be built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabBuilder {
    family: Family,
    backend: Backend,
    second: SecondInterface,
    offload: Offload,
    agent: AgentState,
    flows: Option<u32>,
    timeouts: Vec<(&'static str, u32)>,
    serves_docker: bool,
    engine: Option<Engine>,
    name: Option<String>,
    kept_in: Option<PathBuf>,
}

impl LabBuilder {
    /// Chooses what networks are made of: with IPv6 they have both families.
    #[must_use]
    pub fn family(mut self, family: Family) -> Self {
        self.family = family;
        self
    }

    /// Chooses what enforces the networks.
    #[must_use]
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Adds `up1` and F.
    #[must_use]
    pub fn second(mut self, second: SecondInterface) -> Self {
        self.second = second;
        self
    }

    /// Chooses whether links have offloads.
    #[must_use]
    pub fn offload(mut self, offload: Offload) -> Self {
        self.offload = offload;
        self
    }

    /// Gives the flow table room for `flows` flows: few, so that a test can fill it.
    #[must_use]
    pub fn flows(mut self, flows: u32) -> Self {
        self.flows = Some(flows);
        self
    }

    /// Has idle flows of a kind kept for `seconds` only.
    #[must_use]
    pub fn timeout(mut self, kind: &'static str, seconds: u32) -> Self {
        self.timeouts.push((kind, seconds));
        self
    }

    /// Has the agent serve Docker, where [`Docker`] looks for its plugins.
    #[must_use]
    pub fn serving_docker(mut self) -> Self {
        self.serves_docker = true;
        self
    }

    /// Has networks and containers asked for in the words of an engine, which netdp serves.
    #[must_use]
    pub fn by_engine(mut self, engine: Option<Engine>) -> Self {
        self.engine = engine;
        self
    }

    /// Leaves the host without an agent.
    #[must_use]
    pub fn without_agent(mut self) -> Self {
        self.agent = AgentState::Missing;
        self
    }

    /// Leaves the agent to be started by the test.
    #[must_use]
    pub fn agent_stopped(mut self) -> Self {
        self.agent = AgentState::Stopped;
        self
    }

    /// Names the lab's namespaces `<name>-<role>`.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// Leaves the lab running when it is dropped, with its files in `directory`.
    #[must_use]
    pub fn kept_in(mut self, directory: &Path) -> Self {
        self.kept_in = Some(directory.to_owned());
        self
    }

    /// What networks are made of.
    pub(crate) fn chosen_family(&self) -> Family {
        self.family
    }

    /// Whether it is the lab that most tests are content with, in whatever family and words.
    #[must_use]
    pub fn is_standard(&self) -> bool {
        let &Self { family, backend, offload, engine, .. } = self;
        *self == Self { family, backend, offload, engine, ..Lab::builder() }
    }

    /// Builds the lab and starts its agent.
    ///
    /// # Errors
    /// When the process is not root, `netdp` is not built, or the kernel refuses.
    pub fn build(self) -> Result<Lab> {
        ensure_root()?;
        let name = self.name.unwrap_or_else(|| {
            let number = NEXT_LAB.fetch_add(1, Ordering::Relaxed);
            format!("ndp{}-{number}", std::process::id())
        });
        let (directory, temporary) = match self.kept_in {
            Some(directory) => (directory, None),
            None => {
                let temporary = TempDir::with_prefix("netdp-lab-").context("create a directory")?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let fate = if temporary.is_some() { Fate::DiesWithParent } else { Fate::Detached };
        // From here on Drop cleans up after a step that fails.
        let mut lab = Lab {
            agent: None,
            docker: None,
            host: Namespace::existing(&format!("{name}-host")),
            outside: Namespace::existing(&format!("{name}-outside")),
            second: None,
            namespaces: Mutex::default(),
            family: self.family,
            offload: self.offload,
            name,
            directory,
            temporary,
        };
        lab.create_namespace("host")?;
        lab.create_namespace("outside")?;
        lab.wire_outside()?;
        if self.second != SecondInterface::Absent {
            lab.second = Some(lab.create_namespace("second")?);
            lab.wire_second()?;
        }
        // Without a list the agent takes all that can be one, as on most hosts.
        let uplinks = match self.second {
            SecondInterface::Unlisted => vec!["up0".to_owned()],
            SecondInterface::Absent | SecondInterface::Uplink => Vec::new(),
        };
        for directory in ["state", "run", "bpf"] {
            fs::create_dir_all(lab.directory.join(directory)).context("create a directory")?;
        }
        mount(Some("bpffs"), &lab.bpffs(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mount a bpffs")?;
        if let Backend::Docker(firewall) = self.backend {
            lab.docker = Some(Docker::start(&lab.host, &lab.directory, firewall)?);
            return Ok(lab);
        }
        if self.agent != AgentState::Missing {
            let serves_docker = self.serves_docker || self.engine == Some(Engine::Docker);
            let socket = serves_docker.then(|| Docker::plugin_socket(&lab.directory));
            let agent = Agent::new(&lab.host, &lab.directory, uplinks, fate)?
                .with_timeouts(self.timeouts)
                .with_docker_socket(socket);
            agent.use_backend(self.backend);
            // Containers take their time, and so would tables for all that a host may carry.
            let small = self.engine.map(|_| SMALL_FLOWS);
            lab.agent = Some(match self.flows.or(small) {
                Some(flows) => agent.with_flows(flows),
                None => agent,
            });
        }
        if self.agent == AgentState::Running {
            lab.agent()?.start()?;
        }
        if self.engine == Some(Engine::Docker) {
            lab.docker = Some(Docker::start(&lab.host, &lab.directory, Firewall::Off)?);
        }
        Ok(lab)
    }
}

/// A running lab; dropping it removes all of it.
#[derive(Debug)]
pub struct Lab {
    // First, so that agent or Docker is gone before its namespace.
    agent: Option<Agent>,
    docker: Option<Docker>,
    name: String,
    host: Namespace,
    outside: Namespace,
    second: Option<Namespace>,
    namespaces: Mutex<Vec<Namespace>>,
    family: Family,
    offload: Offload,
    directory: PathBuf,
    temporary: Option<TempDir>,
}

impl Lab {
    /// Starts with the standard lab.
    #[must_use]
    pub fn builder() -> LabBuilder {
        LabBuilder {
            family: Family::Ipv4,
            backend: Backend::Ebpf,
            second: SecondInterface::Absent,
            offload: Offload::On,
            agent: AgentState::Running,
            flows: None,
            timeouts: Vec::new(),
            serves_docker: false,
            engine: None,
            name: None,
            kept_in: None,
        }
    }

    /// The lab's addresses in the family that it was built for.
    #[must_use]
    pub fn net(&self) -> &'static Net {
        self.family.net()
    }

    /// Has networks that are made from now on be of a family, as [`LabBuilder::family`] does.
    pub(crate) fn turn_to(&mut self, family: Family) {
        self.family = family;
    }

    /// H, with `up0` 10.0.0.2 and 10.0.0.22.
    #[must_use]
    pub fn host(&self) -> &Namespace {
        &self.host
    }

    /// E, with `out0` 10.0.0.3 and 192.0.2.1 to 192.0.2.5.
    #[must_use]
    pub fn outside(&self) -> &Namespace {
        &self.outside
    }

    /// F, with `out1` 10.1.0.3.
    ///
    /// # Errors
    /// When the lab was built without.
    pub fn second(&self) -> Result<&Namespace> {
        self.second.as_ref().context("find the second outside host: the lab has none")
    }

    /// The agent.
    ///
    /// # Errors
    /// When the lab was built without.
    pub fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("find the agent: the lab has none")
    }

    /// Docker, where it makes the containers: of networks of its own, in the agent's place, or of
    /// netdp's.
    #[must_use]
    pub fn docker(&self) -> Option<&Docker> {
        self.docker.as_ref()
    }

    /// Whether networks are netdp's, in whosever words they are asked for, and its command line there.
    #[must_use]
    pub fn has_netdp(&self) -> bool {
        self.agent.is_some()
    }

    /// Every namespace, the host first.
    #[must_use]
    pub fn namespaces(&self) -> Vec<Namespace> {
        locked(&self.namespaces).clone()
    }

    /// Where the lab's files are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The lab's own bpffs.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.directory.join("bpf")
    }

    /// Creates an empty namespace, as a container runtime does.
    ///
    /// # Errors
    /// When the role exists already.
    pub fn container(&self, role: &str) -> Result<Namespace> {
        self.create_namespace(role)
    }

    /// Removes a container's namespace behind netdp's back.
    ///
    /// # Errors
    /// When it is gone already, or held by an engine.
    pub fn vanish(&self, container: &Namespace) -> Result<()> {
        ensure!(self.docker.is_none(), "take a container's namespace away: Docker holds it");
        locked(&self.namespaces).retain(|namespace| namespace != container);
        container.remove()
    }

    /// Runs one `netdp` command on the host; see [`Agent::netdp`].
    ///
    /// # Errors
    /// With what it said when it fails.
    pub fn netdp(&self, arguments: &[&str]) -> Result<String> {
        self.agent()?.netdp(arguments)
    }

    /// Runs one `netdp` command with `--json`; see [`Agent::json`].
    ///
    /// # Errors
    /// When it fails.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        self.agent()?.json(arguments)
    }

    /// Runs one `netdp` command that should be refused; see [`Agent::netdp_fails`].
    ///
    /// # Errors
    /// When it is not.
    pub fn netdp_fails(&self, arguments: &[&str]) -> Result<String> {
        self.agent()?.netdp_fails(arguments)
    }

    /// Creates a network. In an IPv6 lab an IPv6 subnet gets its IPv4 neighbour beside it.
    ///
    /// # Errors
    /// When netdp refuses.
    pub fn create_network(&self, name: &str, subnet: &str, options: &[&str]) -> Result<()> {
        let beside = ipv4_beside(subnet);
        let subnets: Vec<_> = beside.iter().map(String::as_str).chain([subnet]).collect();
        self.create_network_of(name, &subnets, options)
    }

    /// Creates a network of these subnets and no other.
    ///
    /// # Errors
    /// When netdp refuses.
    pub fn create_network_of(&self, name: &str, subnets: &[&str], options: &[&str]) -> Result<()> {
        if let Some(docker) = &self.docker {
            docker.create_network(name, subnets, options)?;
            return self.apply_offload();
        }
        let mut arguments = vec!["network", "create", name];
        for subnet in subnets {
            arguments.extend(["--subnet", subnet]);
        }
        self.netdp(&[&arguments[..], options].concat())?;
        self.apply_offload()
    }

    /// Creates a container and connects it to a network, publishing each `-p` argument.
    ///
    /// # Errors
    /// When netdp refuses.
    pub fn attach(
        &self,
        network: &str,
        role: &str,
        address: impl Address,
        published: &[&str],
    ) -> Result<Namespace> {
        let container = self.container(role)?;
        self.connect(network, &container, role, address, published)?;
        Ok(container)
    }

    /// Connects a container to a network and returns netdp's description of the endpoint. An IPv6
    /// address gets its IPv4 neighbour beside it.
    ///
    /// # Errors
    /// When netdp refuses.
    pub fn connect(
        &self,
        network: &str,
        container: &Namespace,
        name: &str,
        address: impl Address,
        published: &[&str],
    ) -> Result<Value> {
        let address = address.address().to_string();
        let beside = ipv4_beside(&address);
        let addresses: Vec<_> = beside.iter().map(String::as_str).chain([&*address]).collect();
        self.connect_at(network, container, name, &addresses, published)
    }

    /// Connects a container to a network at these addresses and no other; see [`Lab::connect`].
    ///
    /// # Errors
    /// When netdp refuses.
    pub fn connect_at(
        &self,
        network: &str,
        container: &Namespace,
        name: &str,
        addresses: &[&str],
        published: &[&str],
    ) -> Result<Value> {
        let endpoint = match &self.docker {
            Some(docker) => {
                let shown = docker.connect(network, container, name, addresses, published)?;
                if self.has_netdp() { self.endpoint(network, name)? } else { shown }
            }
            None => self.json(&words_to_connect(network, container, name, addresses, published))?,
        };
        self.apply_offload()?;
        Ok(endpoint)
    }

    /// Asks for what should be refused, with a container that goes by its name, and returns why it is.
    ///
    /// # Errors
    /// When it is not refused.
    pub fn connect_fails(
        &self,
        network: &str,
        container: &Namespace,
        name: &str,
        address: impl Address,
        published: &[&str],
    ) -> Result<String> {
        if self.docker.is_some() {
            let refused = self.connect(network, container, name, address, published);
            let error = refused.err().context("expect a refusal: the container is connected")?;
            return Ok(format!("{error:#}"));
        }
        let address = address.address().to_string();
        self.netdp_fails(&words_to_connect(network, container, name, &[&address], published))
    }

    /// What netdp says of an endpoint.
    fn endpoint(&self, network: &str, name: &str) -> Result<Value> {
        let inspected = self.json(&["network", "inspect", network])?;
        let endpoints = inspected[0]["endpoints"].as_array().into_iter().flatten();
        let mut named = endpoints.filter(|endpoint| endpoint["name"] == name);
        named.next().cloned().with_context(|| format!("find endpoint {name}: netdp has none"))
    }

    /// Disconnects a container from a network.
    ///
    /// # Errors
    /// When netdp refuses.
    pub fn disconnect(&self, network: &str, name: &str) -> Result<()> {
        match &self.docker {
            Some(docker) => docker.disconnect(network, name),
            None => self.netdp(&["disconnect", network, name]).map(drop),
        }
    }

    /// Removes in an engine's words what was asked for in them.
    ///
    /// # Errors
    /// When the engine refuses, or something of netdp's is left then.
    pub fn clear(&self) -> Result<()> {
        let Some(docker) = &self.docker else { return Ok(()) };
        docker.clear()?;
        let is_containers = |namespace: &mut Namespace| {
            let own = [Some(&self.host), Some(&self.outside), self.second.as_ref()];
            !own.contains(&Some(namespace))
        };
        for container in locked(&self.namespaces).extract_if(.., is_containers) {
            container.remove()?;
        }
        let links = self.host.links()?;
        let is_netdps = |link: &&String| link.starts_with("nd");
        let left: Vec<_> = links.iter().filter(is_netdps).collect();
        ensure!(left.is_empty(), "links are left: {left:?}");
        let status = self.json(&["status"])?;
        for what in ["networks", "endpoints", "published"] {
            ensure!(status[what] == 0, "{what} are left: {}", status[what]);
        }
        poll_until(PATIENCE, "the end of all flows", || {
            let flows = self.json(&["flows"])?;
            Ok(flows.as_array().is_some_and(Vec::is_empty).then_some(()))
        })
    }

    /// The name of a network's bridge.
    ///
    /// # Errors
    /// When netdp does not say.
    pub fn bridge(&self, network: &str) -> Result<String> {
        if !self.has_netdp() {
            return Ok(network.to_owned());
        }
        let network = self.json(&["network", "inspect", network])?;
        let name = network[0]["bridge"].as_str().context("read the name of the bridge")?;
        Ok(name.to_owned())
    }

    /// Sets a network's policy to the rules given, one per line.
    ///
    /// # Errors
    /// When netdp refuses.
    pub fn set_policy(&self, network: &str, rules: &str) -> Result<()> {
        if let (Some(docker), false) = (&self.docker, self.has_netdp()) {
            return docker.set_policy(network, rules);
        }
        let file = self.policy_file(rules)?;
        self.netdp(&["policy", "set", network, &file]).map(drop)
    }

    /// Writes rules to a file and returns its path.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn policy_file(&self, rules: &str) -> Result<String> {
        let path = self.directory.join("policy");
        fs::write(&path, rules).context("write a policy")?;
        path.into_os_string().into_string().ok().context("name a policy file")
    }

    /// The counters as `netdp status` shows them.
    ///
    /// # Errors
    /// When it fails or shows none.
    pub fn counters(&self) -> Result<Counters> {
        Counters::read(&self.json(&["status"])?)
    }

    /// Fails when the host has a netfilter rule, table or chain of either kind.
    ///
    /// # Errors
    /// With what was found, or when `nft` is not installed.
    pub fn expect_no_netfilter(&self) -> Result<()> {
        let listed = self.host.output("nft", &["list", "ruleset"])?;
        ensure!(
            listed.status.success(),
            "list nft rules: {}",
            String::from_utf8_lossy(&listed.stderr)
        );
        let rules = String::from_utf8_lossy(&listed.stdout);
        ensure!(rules.trim().is_empty(), "expect empty netfilter tables: nft lists\n{rules}");
        let legacy = self
            .host
            .run(|| Ok(fs::read_to_string("/proc/net/ip_tables_names").unwrap_or_default()))?;
        ensure!(legacy.trim().is_empty(), "expect empty netfilter tables: iptables has {legacy}");
        Ok(())
    }

    /// Adds what explains a failure to it.
    ///
    /// # Errors
    /// The failure that it was given.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| error.context(Report(diagnose::report(self))))
    }

    fn create_namespace(&self, role: &str) -> Result<Namespace> {
        let namespace = Namespace::create(&format!("{}-{role}", self.name))?;
        locked(&self.namespaces).push(namespace.clone());
        Ok(namespace)
    }

    fn apply_offload(&self) -> Result<()> {
        if self.offload == Offload::Off {
            for namespace in self.namespaces() {
                namespace.disable_offload()?;
            }
        }
        Ok(())
    }

    fn wire_outside(&self) -> Result<()> {
        // As IPv4 addresses do, or a link that goes down would lose its IPv6 ones.
        self.host.set_sysctl("net.ipv6.conf.default.keep_addr_on_down", "1")?;
        let outside = self.outside.name();
        self.host.ip(&format!(
            "link add up0 type veth peer name out0 netns {outside}\nlink set up0 up\n"
        ))?;
        self.outside.ip("link set out0 up\n")?;
        // The kernel prefers the first IPv4 address and the last IPv6 address of a link.
        for address in [IPV4.host, IPV4.host_second, IPV6.host_second, IPV6.host] {
            self.host.ip(&add_address("up0", address))?;
        }
        for net in [&IPV4, &IPV6] {
            self.outside.ip(&add_address("out0", net.outside))?;
            for guest in net.guests {
                self.outside.ip(&format!("address add {guest} dev out0\n"))?;
            }
            self.host.ip(&format!("route add {} via {}\n", net.guests_prefix, net.outside))?;
            for subnet in [net.subnet_a, net.subnet_b] {
                self.outside.ip(&format!("route add {subnet} via {}\n", net.host))?;
            }
        }
        self.apply_offload()
    }

    fn wire_second(&self) -> Result<()> {
        let second = self.second()?;
        self.host.ip(&format!(
            "link add up1 type veth peer name out1 netns {}\nlink set up1 up\n",
            second.name()
        ))?;
        second.ip("link set out1 up\n")?;
        for net in [&IPV4, &IPV6] {
            self.host.ip(&add_address("up1", net.host_up1))?;
            second.ip(&add_address("out1", net.second))?;
            for subnet in [net.subnet_a, net.subnet_b] {
                second.ip(&format!("route add {subnet} via {}\n", net.host_up1))?;
            }
        }
        self.apply_offload()
    }
}

/// The words of `netdp connect`.
fn words_to_connect<'a>(
    network: &'a str,
    container: &'a Namespace,
    name: &'a str,
    addresses: &[&'a str],
    published: &[&'a str],
) -> Vec<&'a str> {
    let mut words = vec!["connect", network, container.name(), "--name", name];
    words.extend(addresses.iter().flat_map(|address| ["--ip", *address]));
    words.extend(published.iter().flat_map(|port| ["-p", *port]));
    words
}

/// The line by which `ip` adds an address of the plan to a link.
fn add_address(link: &str, address: IpAddr) -> String {
    let net = if address.is_ipv4() { &IPV4 } else { &IPV6 };
    format!("address add {} dev {link}\n", net.with_prefix(address))
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", diagnose::report(self));
        }
        if self.temporary.is_none() {
            return;
        }
        drop(self.agent.take());
        drop(self.docker.take());
        // All of it is tried: one leftover must not cause the next.
        let mut failures = Vec::new();
        for namespace in locked(&self.namespaces).drain(..) {
            failures.extend(namespace.remove().err());
        }
        if self.bpffs().is_dir() {
            // EINVAL: a lab that failed before its bpffs was mounted.
            match umount2(&self.bpffs(), MntFlags::MNT_DETACH) {
                Ok(()) | Err(nix::errno::Errno::EINVAL) => {}
                Err(error) => failures.push(error.into()),
            }
        }
        for failure in failures {
            eprintln!("remove lab {}: {failure:#}", self.name);
        }
    }
}

/// Packets and bytes counted, by network and reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<(String, String), (u64, u64)>);

impl Counters {
    fn read(status: &Value) -> Result<Self> {
        let rows = status["counters"].as_array().context("read the counters of netdp status")?;
        let mut counters = BTreeMap::new();
        for row in rows {
            let text = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
            let number = |field: &str| {
                row[field].as_u64().with_context(|| format!("read {field} of the counter {row}"))
            };
            counters
                .insert((text("network"), text("reason")), (number("packets")?, number("bytes")?));
        }
        Ok(Self(counters))
    }

    /// Packets counted since `before`, by network and reason, where any were.
    #[must_use]
    pub fn since(&self, before: &Self) -> BTreeMap<(String, String), u64> {
        self.0
            .iter()
            .map(|(key, (packets, _))| {
                (key.clone(), packets - before.0.get(key).map_or(0, |(packets, _)| *packets))
            })
            .filter(|(_, packets)| *packets > 0)
            .collect()
    }

    /// Fails unless `reason` has counted packets since `before`, and nothing outside `tolerated` has.
    ///
    /// # Errors
    /// With what did count.
    pub fn expect_moved(&self, before: &Self, reason: &str, tolerated: &[&str]) -> Result<()> {
        let moved = self.since(before);
        if !moved.keys().any(|(_, name)| name == reason) {
            bail!("expect the counter {reason} to move: moved {moved:?}");
        }
        let strangers: Vec<_> = moved
            .keys()
            .filter(|(_, name)| name != reason && !tolerated.contains(&name.as_str()))
            .collect();
        ensure!(strangers.is_empty(), "expect only {reason} to move: moved {moved:?}");
        Ok(())
    }
}
