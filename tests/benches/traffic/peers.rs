//! What other engines make networks with, called as those do: Podman's netavark, and the CNI project's own
//! plugins `bridge` and `portmap`.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::{Fate, Namespace};
use netdp_tests::net::IPV4;
use netdp_tests::podman;
use serde_json::{Value, json};

use crate::system::NETWORK;

/// Name the root directories that have the programs.
const PODMAN: &str = "NETDP_PODMAN";
const PODMAN_WITH_CNI: &str = "NETDP_PODMAN_WITH_CNI";

/// A port of the host that leads to the same one of a container, and its protocol.
pub(crate) type Port = (u16, &'static str);

/// Where netavark is.
pub(crate) fn netavark() -> Result<PathBuf> {
    program(PODMAN, "usr/lib/podman/netavark")
}

/// Where the plugin `bridge` is; the others are beside it.
pub(crate) fn cni_bridge() -> Result<PathBuf> {
    program(PODMAN_WITH_CNI, "usr/lib/cni/bridge")
}

fn program(variable: &str, path: &str) -> Result<PathBuf> {
    let program = podman::find(variable)?.join(path);
    ensure!(program.is_file(), "find {}", program.display());
    Ok(program)
}

/// Gives a container a network by netavark.
pub(crate) fn set_up(
    lab: &Lab,
    container: &Namespace,
    address: IpAddr,
    ports: &[Port],
) -> Result<()> {
    let name = container.name();
    let mappings = ports.iter().map(|(port, protocol)| {
        json!({
            "host_ip": "",
            "host_port": port,
            "container_port": port,
            "protocol": protocol,
            "range": 1,
        })
    });
    let options = json!({
        "container_id": id(name),
        "container_name": name,
        "port_mappings": mappings.collect::<Vec<_>>(),
        "networks": { NETWORK: {
            "interface_name": "eth0",
            "static_ips": [address],
        }},
        "network_info": { NETWORK: {
            "name": NETWORK,
            "id": id(NETWORK),
            "driver": "bridge",
            "network_interface": NETWORK,
            "subnets": [{ "subnet": IPV4.subnet_a, "gateway": IPV4.gateway_a }],
            "ipv6_enabled": false,
            "internal": false,
            "dns_enabled": false,
            "ipam_options": { "driver": "host-local" },
        }},
    });
    let state = lab.directory().join("netavark");
    fs::create_dir_all(&state).context("create a directory")?;
    let program = netavark()?;
    let mut command = lab.host().command(loader(PODMAN)?, Fate::DiesWithParent)?;
    command.arg("--library-path").arg(libraries(PODMAN)?).arg(&program);
    command.arg("--config").arg(&state).arg("setup").arg(container.path());
    answer(&mut command, &options).map(drop)
}

/// Gives a container a network by CNI's plugins.
pub(crate) fn add(lab: &Lab, container: &Namespace, address: IpAddr, ports: &[Port]) -> Result<()> {
    const VERSION: &str = "1.0.0";

    let plugins = cni_bridge()?;
    let plugins = plugins.parent().context("find the plugins")?;
    let call = |plugin: &str, configuration: &Value| -> Result<Value> {
        let mut command = lab.host().command(plugins.join(plugin), Fate::DiesWithParent)?;
        command
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", container.name())
            .env("CNI_NETNS", container.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", plugins);
        answer(&mut command, configuration)
    };
    let address = format!("{address}/24");
    let connected = call(
        "bridge",
        &json!({
            "cniVersion": VERSION,
            "name": NETWORK,
            "type": "bridge",
            "bridge": NETWORK,
            "isGateway": true,
            "ipMasq": true,
            "ipam": {
                "type": "static",
                "addresses": [{ "address": address, "gateway": IPV4.gateway_a }],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }),
    )?;
    let mappings = ports.iter().map(
        |(port, protocol)| json!({ "hostPort": port, "containerPort": port, "protocol": protocol }),
    );
    let mappings: Vec<_> = mappings.collect();
    if mappings.is_empty() {
        return Ok(());
    }
    let configuration = json!({
        "cniVersion": VERSION,
        "name": NETWORK,
        "type": "portmap",
        "runtimeConfig": { "portMappings": mappings },
        "prevResult": connected,
    });
    call("portmap", &configuration).map(drop)
}

/// Runs a program that takes JSON and gives JSON.
fn answer(command: &mut Command, question: &Value) -> Result<Value> {
    let title = format!("{:?}", command.get_program());
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.with_context(|| format!("run {title}"))?;
    let mut input = child.stdin.take().context("open its input")?;
    input.write_all(question.to_string().as_bytes()).with_context(|| title.clone())?;
    drop(input);
    let output = child.wait_with_output().with_context(|| title.clone())?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !output.status.success() {
        // Plugins say why on either.
        bail!("{title}: {} {}", said(&output.stdout), said(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("read what {title} says"))
}

/// The dynamic loader of another release's programs, which want its libraries.
fn loader(variable: &str) -> Result<PathBuf> {
    let root = podman::find(variable)?;
    let found = fs::read_dir(root.join("lib64")).context("find the dynamic loader")?;
    let mut paths = found.filter_map(|entry| Some(entry.ok()?.path()));
    let is_loader = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("ld-linux"))
    };
    paths.find(is_loader).context("find the dynamic loader")
}

fn libraries(variable: &str) -> Result<PathBuf> {
    let libraries = podman::find(variable)?.join("lib");
    Ok(libraries.join(format!("{}-linux-gnu", std::env::consts::ARCH)))
}

/// 64 digits that stand for a name, as engines number what they make.
fn id(name: &str) -> String {
    let digits: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{digits:0<64.64}")
}
