//! Published ports of Docker's containers.

use anyhow::{Context, Result, ensure};
use netdp_tests::backend::{Backend, Firewall, Variant};
use netdp_tests::probe::expect_same;
use serde_json::Value;

use super::Scene;

/// The published ports of the only endpoint of a network, as `protocol host_ip:host_port → port`.
fn published(scene: &Scene, network: &str) -> Result<Vec<String>> {
    let network = scene.network(network)?;
    let ports = network["endpoints"][0]["published"].as_array().context("read the ports")?;
    let text = |port: &Value| {
        let word = |field: &str| port[field].to_string().trim_matches('"').to_owned();
        let [protocol, ip, host, there] =
            ["protocol", "host_ip", "host_port", "container_port"].map(word);
        format!("{protocol} {ip}:{host} → {there}")
    };
    let mut ports: Vec<String> = ports.iter().map(text).collect();
    ports.sort();
    Ok(ports)
}

pub(super) fn published_port_is_reached_from_everywhere(scene: &Scene) -> Result<()> {
    scene.docker("network create --driver netdp web")?;
    let web = scene.run("web1", "--network web --publish 8080:80")?;
    let address = scene.address(&web, "web")?;
    let _server = web.namespace.tcp_server("web1", (address, 80))?;
    let (host, outside) = (scene.lab.host(), scene.lab.outside());
    let net = scene.lab.net();
    let seen = outside.tcp((net.host, 8080)).exchange()?;
    seen.by("web1")?.saw_client_at(net.outside)?;
    for destination in [net.host, net.loopback] {
        host.tcp((destination, 8080)).exchange()?.by("web1")?;
    }
    let neighbour = scene.run("web2", "--network web")?;
    let seen = neighbour.namespace.tcp((net.host, 8080)).exchange()?;
    seen.by("web1")?.saw_client_at(scene.address(&neighbour, "web")?)?;
    // A port belongs to a container that runs.
    scene.docker("stop web1")?;
    outside.tcp((net.host, 8080)).refused()?;
    scene.docker("start web1")?;
    scene.find_again(&web)?;
    let _server = web.namespace.tcp_server("web1 again", (scene.address(&web, "web")?, 80))?;
    outside.tcp((net.host, 8080)).exchange()?.by("web1 again")?;
    Ok(())
}

/// A host that can't do eBPF has the same networks, and rules of netdp's.
pub(super) fn iptables_serves_docker_as_well(_: &Scene) -> Result<()> {
    let scene = Scene::start(Backend::Iptables(Variant::Nft), Firewall::Off)?;
    let result = serve_by_iptables(&scene).with_context(|| scene.docker.log_tail());
    scene.lab.explain(result)
}

fn serve_by_iptables(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp web")?;
    scene.docker("network create --driver netdp other")?;
    let web = scene.run("web1", "--network web --publish 8080:80")?;
    let other = scene.run("other1", "--network other")?;
    let address = scene.address(&web, "web")?;
    let _server = web.namespace.tcp_server("web1", (address, 80))?;
    let seen = scene.lab.outside().tcp((net.host, 8080)).exchange()?;
    seen.by("web1")?.saw_client_at(net.outside)?;
    for destination in [net.host, net.loopback] {
        scene.lab.host().tcp((destination, 8080)).exchange()?.by("web1")?;
    }
    other.namespace.tcp((address, 80)).dropped()?;
    scene.docker("rm --force web1 other1")?;
    scene.lab.outside().tcp((net.host, 8080)).refused()
}

pub(super) fn all_kinds_of_ports_are_published(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp web")?;
    let options = "--publish 8000-8002:80-82 --publish 10.0.0.22:53:53/udp \
                   --publish 7000-7009:70 --publish 90 --publish 91/udp";
    let web = scene.run("web1", &format!("--network web {options}"))?;
    let address = scene.address(&web, "web")?;
    let expected = [
        "tcp 0.0.0.0:49153 → 90",
        "tcp 0.0.0.0:7000 → 70",
        "tcp 0.0.0.0:8000 → 80",
        "tcp 0.0.0.0:8001 → 81",
        "tcp 0.0.0.0:8002 → 82",
        "udp 0.0.0.0:49153 → 91",
        "udp 10.0.0.22:53 → 53",
    ];
    expect_same("ports", &published(scene, "web")?, &expected.map(String::from).to_vec())?;
    let outside = scene.lab.outside();
    for (host, port) in [(8002, 82), (7000, 70), (49_153, 90)] {
        let _server = web.namespace.tcp_server("web1", (address, port))?;
        outside.tcp((net.host, host)).exchange()?.by("web1")?.saw_client_at(net.outside)?;
    }
    let _server = web.namespace.udp_server("web1", (address, 53))?;
    outside.udp((net.host_second, 53)).exchange()?.by("web1")?;
    outside.udp((net.host, 53)).refused()?;
    // A second one has the next of the range; -P takes what the image exposes.
    scene.docker("rm --force web1")?;
    scene.run("web2", "--network web --publish-all --expose 80 --expose 53/udp")?;
    let expected = ["tcp 0.0.0.0:49153 → 80", "udp 0.0.0.0:49153 → 53"].map(String::from);
    expect_same("ports", &published(scene, "web")?, &expected.to_vec())
}

pub(super) fn taken_port_is_refused_and_nothing_stays(scene: &Scene) -> Result<()> {
    let net = scene.lab.net();
    scene.docker("network create --driver netdp web")?;
    let _program = scene.lab.host().tcp_server("a program of the host", (net.host, 8080))?;
    let create =
        "run --detach --network web --publish 8080:80 --name web1 busybox /bin/busybox sleep 1d";
    let said = scene.docker_fails(create)?;
    ensure!(said.contains("8080"), "what Docker says does not name the port: {said}");
    scene.docker("rm --force web1")?;
    let members = scene.network("web")?;
    expect_same("endpoints", &members["endpoints"], &Value::Array(Vec::new()))
}
