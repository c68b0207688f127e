//! Podman itself, with the lines of the guides: version 5 by netavark, version 4 by CNI.

use std::fs;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use netdp_tests::backend::{Backend, Variant};
use netdp_tests::harness::{self, Promise, brief};
use netdp_tests::lab::{Lab, SUBNET_B};
use netdp_tests::podman::{self, Podman};
use netdp_tests::probe::expect_same;
use serde_json::{Value, json};

use crate::page;

/// Names the root directory of Podman 5.
const PODMAN: &str = "NETDP_PODMAN";
/// Names the root directory of Podman 4.
const PODMAN_WITH_CNI: &str = "NETDP_PODMAN_WITH_CNI";

/// What a host has that can't do eBPF.
const IPTABLES: Backend = Backend::Iptables(Variant::Nft);

const NETAVARK: &[Promise] = &[
    ("podman_5_runs_a_container_as_its_guide_says", runs_by_netavark),
    ("podman_5_connects_a_container_to_networks_while_it_runs", connects_while_it_runs),
    ("podman_5_creates_networks_as_they_are_asked_for", creates_networks),
    ("podman_5_says_why_netdp_refuses", says_why),
    ("podman_5_runs_a_container_with_iptables", || serve_by_netavark(IPTABLES)),
];
const CNI: &[Promise] = &[
    ("podman_4_runs_a_container_as_its_guide_says", || serve_by_cni(Backend::Ebpf)),
    ("podman_4_runs_a_container_with_iptables", || serve_by_cni(IPTABLES)),
    ("podman_4_has_other_plugins_behind_netdp", chains),
];

pub(super) fn trials() -> Vec<Trial> {
    let trials = |tests, variable| match podman::find(variable) {
        Ok(_) => harness::trials(tests),
        Err(error) => harness::skipped(tests, &brief(&error)),
    };
    [trials(NETAVARK, PODMAN), trials(CNI, PODMAN_WITH_CNI)].into_iter().flatten().collect()
}

/// The words of the first line of a guide's shell block that begins so, behind `podman`.
fn line(page: &str, beginning: &str) -> Result<Vec<String>> {
    let block = page::block(page, "sh")?;
    let line = block.lines().find(|line| line.starts_with(beginning));
    let line = line.with_context(|| format!("find {beginning:?} in {page}"))?;
    Ok(line.split_whitespace().skip(1).map(String::from).collect())
}

/// A guide's line that runs a container, with what the lab has for an image.
fn line_that_runs(page: &str, podman: &Podman) -> Result<Vec<String>> {
    let mut words = line(page, "podman run ")?;
    words.pop().context("take the image away")?;
    words.extend(podman.container());
    Ok(words)
}

fn start(lab: &Lab, variable: &str, page: &str) -> Result<Podman> {
    Podman::start(lab, &podman::find(variable)?, &page::block(page, "toml")?)
}

/// The endpoints of network `web`.
fn endpoints(lab: &Lab) -> Result<Vec<Value>> {
    let networks = lab.json(&["network", "inspect", "web"])?;
    Ok(networks[0]["endpoints"].as_array().context("read the endpoints")?.clone())
}

/// Fails unless container web1 of network `web` is published at port 8080 and reaches the world, and is
/// gone when it is removed.
fn expect_service(lab: &Lab, podman: &Podman) -> Result<()> {
    let container = lab.container("web1")?;
    podman.enter("web1", &container)?;
    let endpoint = endpoints(lab)?.pop().context("find the endpoint")?;
    let address = endpoint["addresses"][0].as_str().context("read the address")?;
    let address = address.split('/').next().context("read the address")?;
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let shown = podman.run(&["inspect", "--format", format, "web1"])?;
    expect_same("the address that Podman shows", &shown.as_str(), &address)?;

    let server = container.tcp_server("web1", (address, 80))?;
    let outside = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
    lab.outside().tcp("10.0.0.2:8080").exchange()?.by("web1")?.saw_client_at("10.0.0.3")?;
    container.tcp("10.0.0.3:7").exchange()?.by("outside")?.saw_client_at("10.0.0.2")?;
    if lab.json(&["status"])?["dataplane"] == Backend::Ebpf.name() {
        lab.expect_no_netfilter()?;
    }
    drop((server, outside));

    podman.run(&["rm", "--force", "--time", "0", "web1"])?;
    expect_same("endpoints", &endpoints(lab)?.len(), &0)?;
    lab.vanish(&container)?;
    lab.outside().tcp("10.0.0.2:8080").refused()
}

fn runs_by_netavark() -> Result<()> {
    const PAGE: &str = "docs/podman.md";
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let podman = start(&lab, PODMAN, PAGE)?;
        podman.run(&line(PAGE, "podman network create ")?)?;
        let mut words = line_that_runs(PAGE, &podman)?;
        podman.run(&words)?;
        expect_service(&lab, &podman)?;

        let asked = ["--ip", "172.20.0.77", "--mac-address", "02:42:ac:14:00:77"];
        words.splice(1..1, asked.map(String::from));
        podman.run(&words)?;
        let endpoint = endpoints(&lab)?.pop().context("find the endpoint")?;
        expect_same("the address", &endpoint["addresses"][0], &"172.20.0.77/24".into())?;
        expect_same("the MAC", &endpoint["mac"], &"02:42:ac:14:00:77".into())?;
        expect_service(&lab, &podman)
    })())
}

/// Runs a container by netavark, whatever enforces its network.
fn serve_by_netavark(backend: Backend) -> Result<()> {
    const PAGE: &str = "docs/podman.md";
    let lab = Lab::builder().backend(backend).build()?;
    lab.explain((|| {
        let podman = start(&lab, PODMAN, PAGE)?;
        podman.run(&line(PAGE, "podman network create ")?)?;
        podman.run(&line_that_runs(PAGE, &podman)?)?;
        expect_service(&lab, &podman)
    })())
}

fn connects_while_it_runs() -> Result<()> {
    const PAGE: &str = "docs/podman.md";
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let podman = start(&lab, PODMAN, PAGE)?;
        podman.run(&line(PAGE, "podman network create ")?)?;
        let driver = ["--driver", "netdp-netavark", "--subnet", SUBNET_B, "second"];
        podman.run(&[&["network", "create"], &driver[..]].concat())?;
        podman.run(&line_that_runs(PAGE, &podman)?)?;
        podman.run(&["network", "connect", "second", "web1"])?;
        let container = lab.container("web1")?;
        podman.enter("web1", &container)?;
        let links = container.links()?;
        ensure!(links.contains(&"eth1".to_owned()), "no second interface among {links:?}");
        let _server = container.tcp_server("web1", "0.0.0.0:80")?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("web1")?;
        podman.run(&["network", "disconnect", "web", "web1"])?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("web1")?;
        expect_same("endpoints", &endpoints(&lab)?.len(), &0)
    })())
}

fn creates_networks() -> Result<()> {
    const PAGE: &str = "docs/podman.md";
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let podman = start(&lab, PODMAN, PAGE)?;
        let create = ["network", "create", "--driver", "netdp-netavark"];
        let asked = ["--ipv6", "--subnet", SUBNET_B, "--ip-range", "172.21.0.128/25"];
        let options = ["--gateway", "172.21.0.254", "--opt", "mtu=1400", "web"];
        podman.run(&[&create[..], &asked, &options].concat())?;
        podman.run(&[&create[..], &["chosen"]].concat())?;
        let network = &lab.json(&["network", "inspect", "web"])?[0];
        expect_same("ranges", &network["ip_ranges"], &json!(["172.21.0.128/25"]))?;
        expect_same("the MTU", &network["mtu"], &json!(1400))?;
        expect_same("the gateway", &network["gateways"][0], &json!("172.21.0.254"))?;
        let chosen = &lab.json(&["network", "inspect", "chosen"])?[0];
        let format = "{{range .Subnets}}{{.Subnet}}{{end}}";
        let shown = podman.run(&["network", "inspect", "--format", format, "chosen"])?;
        expect_same("the subnet", &json!(shown), &chosen["subnets"][0])?;

        podman.run(&line_that_runs(PAGE, &podman)?)?;
        let endpoint = endpoints(&lab)?.pop().context("find the endpoint")?;
        expect_same("the address", &endpoint["addresses"][0], &json!("172.21.0.129/24"))?;
        let container = lab.container("web1")?;
        podman.enter("web1", &container)?;
        let address = endpoint["addresses"][1].as_str().context("read the IPv6 address")?;
        let address = address.split('/').next().context("read the IPv6 address")?;
        let _server = container.tcp_server("web1", (address, 80))?;
        lab.outside().tcp("[fd00::2]:8080").exchange()?.by("web1")?.saw_client_at("fd00::3")?;
        Ok(())
    })())
}

fn says_why() -> Result<()> {
    const PAGE: &str = "docs/podman.md";
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        // As Podman comes: it holds the port itself.
        let podman = Podman::start(&lab, &podman::find(PODMAN)?, "")?;
        podman.run(&line(PAGE, "podman network create ")?)?;
        let refused = podman.output(&line_that_runs(PAGE, &podman)?)?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(!refused.status.success(), "it runs with a port that Podman holds");
        ensure!(said.contains("enable_port_reservation"), "no way out in: {said}");
        expect_same("endpoints", &endpoints(&lab)?.len(), &0)
    })())
}

fn serve_by_cni(backend: Backend) -> Result<()> {
    const PAGE: &str = "docs/cni.md";
    let lab = Lab::builder().backend(backend).build()?;
    lab.explain((|| {
        let podman = start(&lab, PODMAN_WITH_CNI, PAGE)?;
        let list = page::block(PAGE, "json")?;
        fs::write(podman.networks().join("10-web.conflist"), list).context("write a network")?;
        podman.run(&line_that_runs(PAGE, &podman)?)?;
        expect_service(&lab, &podman)
    })())
}

fn chains() -> Result<()> {
    const PAGE: &str = "docs/cni.md";
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let podman = start(&lab, PODMAN_WITH_CNI, PAGE)?;
        let mut list: Value = serde_json::from_str(&page::block(PAGE, "json")?)?;
        let plugins = list["plugins"].as_array_mut().context("read the plugins")?;
        plugins.push(json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}));
        fs::write(podman.networks().join("10-web.conflist"), list.to_string())
            .context("write a network")?;
        podman.run(&line_that_runs(PAGE, &podman)?)?;
        let container = lab.container("behind")?;
        podman.enter("web1", &container)?;
        let setting = container.sysctl("net.core.somaxconn")?;
        expect_same("what the plugin behind has set", &setting.as_str(), &"500")?;
        expect_service(&lab, &podman)
    })())
}
