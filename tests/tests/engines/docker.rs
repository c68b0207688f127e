//! Docker with networks of netdp's: its own daemon and command line, without a rule of its firewall.
//!
//! All tests share one host with one daemon and one agent. After each of them nothing may be left but
//! these, and the host's netfilter is empty at all times.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Completion, Failed, Trial};
use netdp_tests::backend::{Backend, Firewall};
use netdp_tests::docker::{Docker, IMAGE, Installation};
use netdp_tests::harness::{brief, catch, full};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::probe::locked;
use netdp_tests::runtime::poll_until;
use serde_json::{Value, json};

mod addresses;
mod blank;
mod crowd;
mod guide;
mod lifecycle;
mod networks;
mod ports;

/// How long the agent may take to see that something has gone.
const NOTICED: Duration = Duration::from_secs(10);

/// What the image nginx of these tests does: a page by HTTP, and no more.
const SERVE: [&str; 4] = [
    "/bin/busybox",
    "sh",
    "-c",
    "echo hello > /index.html && exec /bin/busybox httpd -f -p 80 -h /",
];

type Test = fn(&Scene) -> Result<()>;

const TESTS: &[(&str, Test)] = &[
    ("published_port_is_reached_from_everywhere", ports::published_port_is_reached_from_everywhere),
    ("all_kinds_of_ports_are_published", ports::all_kinds_of_ports_are_published),
    ("taken_port_is_refused_and_nothing_stays", ports::taken_port_is_refused_and_nothing_stays),
    ("what_leaves_is_masqueraded", networks::what_leaves_is_masqueraded),
    ("networks_are_apart", networks::networks_are_apart),
    ("internal_network_has_no_way_out", networks::internal_network_has_no_way_out),
    ("container_is_in_two_networks", networks::container_is_in_two_networks),
    ("ports_follow_the_gateway", networks::ports_follow_the_gateway),
    ("addresses_are_as_asked", networks::addresses_are_as_asked),
    ("ipv6_works_like_ipv4", networks::ipv6_works_like_ipv4),
    ("names_are_resolved", networks::names_are_resolved),
    ("options_are_dockers_and_netdps", networks::options_are_dockers_and_netdps),
    ("web_app_and_database", networks::web_app_and_database),
    ("addresses_are_chosen_by_netdp", addresses::addresses_are_chosen_by_netdp),
    ("guide_does_what_it_says", guide::guide_does_what_it_says),
    ("host_moves_network_by_network", guide::host_moves_network_by_network),
    ("iptables_serves_docker_as_well", ports::iptables_serves_docker_as_well),
    ("many_containers_leave_nothing", crowd::many_containers_leave_nothing),
    ("start_is_timed_beside_dockers_own_bridge", crowd::start_is_timed_beside_dockers_own_bridge),
    ("the_blank_becomes_the_next_container", blank::the_blank_becomes_the_next_container),
    ("the_blank_outlives_the_agent", blank::the_blank_outlives_the_agent),
    ("the_agent_may_die_while_it_makes_a_blank", blank::the_agent_may_die_while_it_makes_a_blank),
    ("agent_may_restart", lifecycle::agent_may_restart),
    ("containers_start_while_the_agent_dies", lifecycle::containers_start_while_the_agent_dies),
    (
        "interface_that_is_lost_is_not_made_again",
        lifecycle::interface_that_is_lost_is_not_made_again,
    ),
    ("daemon_may_restart", lifecycle::daemon_may_restart),
    ("containers_live_through_a_restart", lifecycle::containers_live_through_a_restart),
];

/// What all tests share, started by the first of them.
#[derive(Clone, Default)]
pub(crate) struct Stage(Arc<Mutex<Option<Scene>>>);

impl Stage {
    /// Every test, in an order that needs few restarts.
    pub(crate) fn trials(&self) -> Vec<Trial> {
        let trial = |&(name, test): &(&'static str, Test)| {
            let stage = self.clone();
            Trial::ignorable_test(format!("docker/{name}"), move || stage.run(test))
        };
        TESTS.iter().map(trial).collect()
    }

    /// Takes everything down.
    pub(crate) fn end(&self) {
        drop(locked(&self.0).take());
    }

    fn run(&self, test: Test) -> Result<Completion, Failed> {
        if let Err(error) = Installation::find() {
            return Ok(Completion::ignored_with(brief(&error)));
        }
        let mut stage = locked(&self.0);
        let result = catch(|| {
            if stage.is_none() {
                *stage = Some(Scene::start(Backend::Ebpf, Firewall::Off)?);
            }
            let scene = stage.as_ref().context("find the stage")?;
            scene.lab.expect_no_netfilter().context("before the test")?;
            let result = test(scene).with_context(|| scene.docker.log_tail());
            let result = result.and_then(|()| scene.lab.expect_no_netfilter());
            let result = scene.lab.explain(result);
            let cleared = scene.clear().context("clear up");
            result.and(scene.lab.explain(cleared))
        });
        if result.is_err() {
            // The next test is not to suffer from what is left of this one.
            stage.take();
        }
        result.map(|()| Completion::Completed).map_err(|error| full(&error).into())
    }
}

/// A host with Docker and netdp, and who is around it.
pub(crate) struct Scene {
    // First, so that containers end before what they are connected by.
    docker: Docker,
    lab: Lab,
    containers: Mutex<Vec<Namespace>>,
}

/// A container that runs.
struct Container {
    name: &'static str,
    namespace: Namespace,
}

impl Scene {
    fn start(backend: Backend, firewall: Firewall) -> Result<Self> {
        let lab = Lab::builder().backend(backend).serving_docker().build()?;
        let docker = Docker::start(lab.host(), lab.directory(), firewall)?;
        docker.import("nginx", &format!("CMD {}", json!(SERVE)))?;
        Ok(Self { docker, lab, containers: Mutex::default() })
    }

    /// Runs one `docker` command, given as it would be typed.
    fn docker(&self, line: &str) -> Result<String> {
        self.docker.run(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs one `docker` command that should be refused, and returns what it says.
    fn docker_fails(&self, line: &str) -> Result<String> {
        let output = self.docker.output(&line.split_whitespace().collect::<Vec<_>>())?;
        ensure!(!output.status.success(), "docker {line}: it succeeds");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Runs a container that does nothing but be there for probes, with options as they would be typed.
    fn run(&self, name: &'static str, options: &str) -> Result<Container> {
        // Its program heeds no other signal.
        let line = format!("run --detach --name {name} --stop-signal KILL {options} {IMAGE}");
        self.docker(&format!("{line} /bin/busybox sleep 1d"))?;
        let namespace = self.lab.container(name)?;
        locked(&self.containers).push(namespace.clone());
        let container = Container { name, namespace };
        self.find_again(&container)?;
        Ok(container)
    }

    /// Follows a container into the network that it has since it was started anew.
    fn find_again(&self, container: &Container) -> Result<()> {
        self.docker.enter_sandbox(&container.namespace, container.name).map(drop)
    }

    /// A container's address in a network, as Docker has it.
    fn address(&self, container: &Container, network: &str) -> Result<IpAddr> {
        self.field(container, network, "IPAddress")?.parse().context("read an address")
    }

    /// What Docker knows of a container in a network.
    fn field(&self, container: &Container, network: &str, field: &str) -> Result<String> {
        let inspected = self.docker.inspect(container.name)?;
        let value = inspected["NetworkSettings"]["Networks"][network][field].as_str();
        value.map(str::to_owned).with_context(|| format!("read {field} of {}", container.name))
    }

    /// A network of Docker's as netdp shows it. Without another name it goes by the beginning of its id.
    fn network(&self, name: &str) -> Result<Value> {
        let id = self.docker(&format!("network inspect --format {{{{.Id}}}} {name}"))?;
        let id = id.trim().get(..12).context("read the network's id")?;
        Ok(self.lab.json(&["network", "inspect", id])?[0].take())
    }

    /// Removes containers and networks by Docker's words, and expects that nothing is left.
    fn clear(&self) -> Result<()> {
        let containers = self.docker("ps --all --quiet")?;
        if !containers.trim().is_empty() {
            self.docker(&format!("rm --force --volumes {containers}"))?;
        }
        let networks = self.docker("network ls --quiet --filter driver=netdp")?;
        if !networks.trim().is_empty() {
            self.docker(&format!("network rm {networks}"))?;
        }
        for namespace in locked(&self.containers).drain(..) {
            self.lab.vanish(&namespace)?;
        }
        self.expect_nothing_left()
    }

    fn expect_nothing_left(&self) -> Result<()> {
        let links: BTreeSet<String> = self.lab.host().links()?.into_iter().collect();
        let expected = BTreeSet::from(["lo", "up0"].map(String::from));
        ensure!(links == expected, "links are left: {links:?}");
        let status = self.lab.json(&["status"])?;
        for what in ["networks", "endpoints", "published"] {
            ensure!(status[what] == 0, "{what} are left: {}", status[what]);
        }
        ensure!(status["troubles"].as_array().is_some_and(Vec::is_empty), "{}", status["troubles"]);
        poll_until(NOTICED, "the end of all flows", || {
            let flows = self.lab.json(&["flows"])?;
            Ok(flows.as_array().is_some_and(Vec::is_empty).then_some(()))
        })?;
        self.lab.expect_no_netfilter()
    }
}
