//! Every BPF program, loaded and attached, and every feature of the kernel that netdp asks for: what
//! a kernel has to pass before anything else is worth trying on it. The smallest suite there is,
//! made for slow virtual machines.
//!
//! A kernel that should have a feature, by its version, fails where it has not. Below that version
//! the feature's row is skipped, and everything else has to hold without it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Completion, Trial};
use netdp::dataplane::ebpf::{Ebpf, EbpfOptions, FEATURES, Feature, Features};
use netdp::dataplane::{
    Dataplane, Drift, EndpointProgram, NatPorts, NetworkProgram, Program, SubnetProgram, Uplink,
};
use netdp::model::{EndpointId, GatewayMode, MacAddress, NatBehaviour, NetworkId};
use netdp_common::config::Timeouts;
use netdp_tests::harness::Outcome;
use netdp_tests::kernels;
use netdp_tests::namespace::Namespace;
use netdp_tests::runtime::{cgroup2_mount, isolate};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use tempfile::TempDir;

/// Each tc program and the interface that it belongs to.
const TC_PROGRAMS: [(&str, &str); 4] = [
    ("from_container", "a1"),
    ("into_network", "br-a"),
    ("from_uplink", "up0"),
    ("to_uplink", "up0"),
];
const SOCKET_HOOKS: [&str; 9] = [
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
/// Room for few flows: nothing is sent.
const FLOWS: u32 = 64;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // What there is to find out is found out before; the trials only tell.
    arguments.test_threads = Some(1);
    match results() {
        Ok(results) => {
            let trials = results.into_iter().map(|(name, outcome)| {
                Trial::ignorable_test(name, move || match outcome {
                    Ok(Outcome::Pass) => Ok(Completion::Completed),
                    Ok(Outcome::Skip(reason)) => Ok(Completion::ignored_with(reason)),
                    Err(error) => Err(format!("{error:#}").into()),
                })
            });
            libtest_mimic::run(&arguments, trials.collect()).exit_code()
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

type Results = Vec<(String, Result<Outcome>)>;

fn results() -> Result<Results> {
    isolate()?;
    let features = Features::probe();
    let mut results = Results::new();
    let kernel = kernels::running()?;
    for row in &FEATURES {
        let outcome = if features.has(row.feature) {
            Ok(Outcome::Pass)
        } else if kernel < row.since || Features::is_declined(row) {
            Ok(Outcome::Skip(format!("without it: {}", row.without)))
        } else {
            let ((major, minor), (had, had_minor)) = (kernel, row.since);
            Err(anyhow::anyhow!(
                "Linux {major}.{minor} should have it, for {had}.{had_minor} has: {}",
                row.probe
            ))
        };
        results.push((format!("kernel/{}", row.name), outcome));
    }
    for (name, loaded) in Ebpf::load_each()? {
        results.push((format!("load/{name}"), loaded.map(|()| Outcome::Pass)));
    }
    attach(&features, &mut results)?;
    Ok(results)
}

/// Attaches everything on a host of its own, restarts, repairs and purges.
fn attach(features: &Features, results: &mut Results) -> Result<()> {
    let host = Host::build()?;
    let mut backend = host.open()?;
    let program = host.program()?;
    backend.apply(&program)?;
    let drift = backend.check(&program)?;
    for (name, interface) in TC_PROGRAMS {
        let place = format!("{name} on ifindex {}", host.ifindex(interface)?);
        results.push((format!("attach/{name}"), expect_none(&drift, &place)));
    }
    let can_have_hooks = features.has(Feature::SocketHooks) && host.cgroup.is_some();
    for name in SOCKET_HOOKS {
        let outcome = if !Ebpf::has_socket_hooks(host.bpffs()) {
            let reason = "programs of the host don't reach published ports";
            if can_have_hooks {
                Err(anyhow::anyhow!("{reason}: {name} is not attached"))
            } else {
                Ok(Outcome::Skip(reason.to_owned()))
            }
        } else {
            expect_none(&drift, &format!("socket hook {name}"))
        };
        results.push((format!("attach/{name}"), outcome));
    }
    let keeps_ports = can_have_hooks && features.has(Feature::BindRefusal);
    results.push(("attach/published_ports_are_taken".to_owned(), {
        let is_kept = backend.nature().keeps_ports;
        if is_kept == keeps_ports {
            Ok(if keeps_ports { Outcome::Pass } else { Outcome::Skip("by sockets".to_owned()) })
        } else {
            Err(anyhow::anyhow!("by programs: {is_kept}, wanted {keeps_ports}"))
        }
    }));
    results.push(("attach/nothing_else_differs".to_owned(), expect_none(&drift, "")));

    let before = host.tc_state()?;
    drop(backend);
    let meanwhile = host.tc_state()?;
    let mut backend = host.open()?;
    let restarted = (|| {
        ensure!(before == meanwhile, "the agent's end changed\n{before}\nto\n{meanwhile}");
        let writes = backend.apply(&program)?.writes;
        ensure!(writes == 0, "a restart wrote {writes} times");
        expect_none(&backend.check(&program)?, "")
    })();
    results.push(("attach/a_restart_adopts_everything".to_owned(), restarted));

    let repaired = if features.has(Feature::Tcx) {
        Ok(Outcome::Skip("links can't be taken away by tc".to_owned()))
    } else {
        (|| {
            host.tc(&["qdisc", "del", "dev", "a1", "clsact"])?;
            let drift = backend.check(&program)?;
            ensure!(drift.len() == 1, "expected one difference: {drift:?}");
            backend.apply(&program)?;
            expect_none(&backend.check(&program)?, "")
        })()
    };
    results.push(("attach/filters_that_were_taken_away_come_back".to_owned(), repaired));

    let purged = (|| {
        backend.purge()?;
        let left = host.clsact()?;
        // The one that was there before us.
        let expected = BTreeSet::from(["up0".to_owned()]);
        ensure!(left == expected, "clsact qdiscs are left on {left:?}");
        let filters = host.tc_state()?;
        ensure!(!filters.contains("netdp"), "filters are left:\n{filters}");
        ensure!(!host.bpffs().join("netdp").exists(), "pins are left");
        Ok(Outcome::Pass)
    })();
    results.push(("attach/a_purge_leaves_what_others_made".to_owned(), purged));
    Ok(())
}

/// Passes unless a difference names `what`.
fn expect_none(drift: &[Drift], what: &str) -> Result<Outcome> {
    let found: Vec<_> = drift.iter().filter(|drift| drift.what.contains(what)).collect();
    ensure!(found.is_empty(), "differences: {found:?}");
    Ok(Outcome::Pass)
}

/// A network of one container and one uplink, and what the backend keeps outside of the namespace.
/// The thread is in the namespace.
struct Host {
    namespace: Namespace,
    bpffs: TempDir,
    /// `None` where there is no cgroup2.
    cgroup: Option<PathBuf>,
}

impl Host {
    fn build() -> Result<Self> {
        let namespace = Namespace::create(&format!("load{}", std::process::id()))?;
        namespace.ip("link add br-a type bridge\nlink set br-a up\n\
             link add a1 type veth peer name a1-peer\nlink set a1 master br-a up\n\
             link add up0 type veth peer name up0-peer\nlink set up0 up\n")?;
        let handle = fs::File::open(namespace.path()).context("open the namespace")?;
        setns(handle, CloneFlags::CLONE_NEWNET).context("enter the namespace")?;
        let bpffs = tempfile::tempdir().context("make a directory for bpffs")?;
        mount(Some("bpffs"), bpffs.path(), Some("bpf"), MsFlags::empty(), None::<&str>)
            .context("mount a bpffs")?;
        // Whatever is attached there looks at sockets of this namespace only, and goes with the pins.
        let cgroup = cgroup2_mount()?.map(PathBuf::from);
        let host = Self { namespace, bpffs, cgroup };
        // Somebody else's.
        host.tc(&["qdisc", "add", "dev", "up0", "clsact"])?;
        Ok(host)
    }

    fn bpffs(&self) -> &Path {
        self.bpffs.path()
    }

    fn open(&self) -> Result<Ebpf> {
        Ebpf::open(EbpfOptions {
            bpffs: self.bpffs().to_owned(),
            flows: FLOWS,
            timeouts: Timeouts::RFC,
            cgroup: self.cgroup.clone(),
            fast_path: true,
        })
    }

    fn ifindex(&self, name: &str) -> Result<u32> {
        if_nametoindex(name).with_context(|| format!("find interface {name}"))
    }

    fn program(&self) -> Result<Program> {
        let (network, mac) = (NetworkId(1), |name| self.namespace.mac(name).map(MacAddress));
        let network_program = NetworkProgram {
            bridge_ifindex: self.ifindex("br-a")?,
            bridge_mac: mac("br-a")?,
            mtu: 1500,
            ipv4: Some(SubnetProgram {
                subnet: "172.20.0.0/24".parse()?,
                gateway: "172.20.0.1".parse()?,
                snat_ip: None,
            }),
            ipv6: Some(SubnetProgram {
                subnet: "fd20::/64".parse()?,
                gateway: "fd20::1".parse()?,
                snat_ip: None,
            }),
            gateway_mode: GatewayMode::Nat,
            internal: false,
            icc: true,
            masquerade: true,
            nat: NatBehaviour::EndpointIndependent,
            endpoint_flows: 0,
            policy: Vec::new(),
            policy_generation: 1,
        };
        let endpoint = EndpointProgram {
            network,
            ifindex: self.ifindex("a1")?,
            ipv4: Some("172.20.0.2".parse()?),
            ipv6: Some("fd20::2".parse()?),
            mac: mac("a1-peer")?,
        };
        let uplink = Uplink {
            masquerade4: Some("10.0.0.2".parse()?),
            masquerade6: Some("fd00::2".parse()?),
            mtu: 1500,
            ethernet: true,
            forwarded_before4: false,
            forwarded_before6: false,
        };
        Ok(Program {
            nat_ports: NatPorts::default(),
            networks: BTreeMap::from([(network, network_program)]),
            endpoints: BTreeMap::from([(EndpointId(2), endpoint)]),
            blank: None,
            published: Default::default(),
            needs_stack: false,
            uplinks: BTreeMap::from([(self.ifindex("up0")?, uplink)]),
            local: BTreeSet::from(["10.0.0.2".parse()?, "fd00::2".parse()?]),
            names: BTreeMap::new(),
        })
    }

    /// What tc says of every interface's filters.
    fn tc_state(&self) -> Result<String> {
        let mut state = String::new();
        for interface in ["br-a", "a1", "up0"] {
            for direction in ["ingress", "egress"] {
                state += &self.tc(&["filter", "show", "dev", interface, direction])?;
            }
        }
        Ok(state)
    }

    /// Interfaces with a clsact qdisc.
    fn clsact(&self) -> Result<BTreeSet<String>> {
        let listed = self.tc(&["qdisc", "show"])?;
        let name = |line: &str| -> Option<String> {
            let (_, rest) = line.strip_prefix("qdisc clsact ")?.split_once(" dev ")?;
            rest.split(' ').next().map(str::to_owned)
        };
        Ok(listed.lines().filter_map(name).collect())
    }

    fn tc(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("tc").args(arguments).output().context("run tc")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "tc {}: {}", arguments.join(" "), said.trim());
        String::from_utf8(output.stdout).context("read what tc says")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Nobody is left to complain to; namespaces end with the process.
        let _ = umount2(self.bpffs(), MntFlags::MNT_DETACH);
    }
}
