//! The netavark plugin, called as Podman and netavark call it.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use anyhow::{Context, Result, ensure};
use netdp_tests::harness::Promise;
use netdp_tests::lab::{Lab, SUBNET_B};
use netdp_tests::namespace::{Fate, Namespace};
use netdp_tests::probe::expect_same;
use serde_json::{Value, json};

pub(super) const TESTS: &[Promise] = &[
    ("netavark_says_what_it_is", says_what_it_is),
    ("netavark_sets_a_container_up_and_tears_it_down", sets_up_and_tears_down),
    ("netavark_creates_networks_as_podman_wants_them", creates_networks),
    ("netavark_says_what_it_refuses", says_what_it_refuses),
    ("netavark_publishes_once_for_a_container_in_two_networks", publishes_once),
];

const ID: &str = "752947ff91f961eb3cb47ffe9315016979f3ffbec09e4d96a4fae3fb03391697";

/// A host with the plugin.
struct Host<'a> {
    lab: &'a Lab,
    plugin: PathBuf,
}

impl<'a> Host<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let plugin = lab.directory().join("netdp-netavark");
        symlink(lab.agent()?.program(), &plugin).context("link the plugin")?;
        Ok(Self { lab, plugin })
    }

    fn output(&self, arguments: &[&str], input: &Value) -> Result<Output> {
        let mut child = self
            .lab
            .host()
            .command(&self.plugin, Fate::DiesWithParent)?
            .args(arguments)
            .env("NETDP_SOCKET", self.lab.agent()?.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("call the plugin")?;
        // A plugin may well refuse before it has read everything.
        child.stdin.take().context("open its input")?.write_all(input.to_string().as_bytes()).ok();
        child.wait_with_output().context("wait for the plugin")
    }

    /// Calls the plugin and returns its answer, null where it has none.
    fn call(&self, arguments: &[&str], input: &Value) -> Result<Value> {
        let output = self.output(arguments, input)?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{arguments:?}: {}: {text}", output.status);
        let text = if text.is_empty() { "null" } else { &text };
        serde_json::from_str(text).with_context(|| format!("read {text}"))
    }

    /// Calls the plugin and returns why it fails.
    fn refused(&self, arguments: &[&str], input: &Value) -> Result<String> {
        let output = self.output(arguments, input)?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.code() == Some(1), "{arguments:?}: {}: {text}", output.status);
        let answer: Value =
            serde_json::from_slice(&output.stdout).with_context(|| format!("read {text}"))?;
        Ok(answer["error"].as_str().context("read the error")?.to_owned())
    }

    fn endpoints(&self, network: &str) -> Result<usize> {
        let networks = self.lab.json(&["network", "inspect", network])?;
        Ok(networks[0]["endpoints"].as_array().context("read the endpoints")?.len())
    }
}

/// A network as Podman hands it to `create`.
fn network(name: &str) -> Value {
    json!({
        "name": name,
        "id": "2f259bab93aaaaa2542ba43ef33eb990d0999ee1b9924b557b7be53c0b7a1bb9",
        "driver": "netdp-netavark",
        "created": "2026-01-01T00:00:00Z",
        "ipv6_enabled": false,
        "internal": false,
        "dns_enabled": true,
        "labels": {"purpose": "test"},
    })
}

/// What netavark hands to `setup` and `teardown`.
fn attachment(network: &Value, interface: &str, options: Value) -> Value {
    let mut network_options = json!({"aliases": [&ID[..12]], "interface_name": interface});
    for (key, value) in options.as_object().into_iter().flatten() {
        network_options[key] = value.clone();
    }
    json!({
        "container_id": ID,
        "container_name": "web1",
        "port_mappings": [
            {"container_port": 80, "host_ip": "", "host_port": 8080, "protocol": "tcp", "range": 1},
            {"container_port": 7000, "host_ip": "10.0.0.2", "host_port": 9000,
             "protocol": "tcp,udp", "range": 2},
        ],
        "network": network,
        "network_options": network_options,
    })
}

fn path(namespace: &Namespace) -> String {
    namespace.path().display().to_string()
}

fn says_what_it_is() -> Result<()> {
    let lab = Lab::builder().agent_stopped().build()?;
    let host = Host::new(&lab)?;
    for arguments in [&["info"][..], &[]] {
        let answer = host.call(arguments, &Value::Null)?;
        expect_same("the API's version", &answer["api_version"], &json!("1.0.0"))?;
        ensure!(answer["version"].is_string(), "no version in {answer}");
    }
    let refusal = host.refused(&["create"], &network("web"))?;
    ensure!(refusal.contains("netdp agent"), "no way out in: {refusal}");
    Ok(())
}

fn sets_up_and_tears_down() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let host = Host::new(&lab)?;
        let mut wanted = network("web");
        wanted["subnets"] = json!([{"subnet": "172.20.0.0/24"}]);
        wanted["network_dns_servers"] = json!(["192.0.2.53"]);
        let created = host.call(&["create"], &wanted)?;
        let subnets = json!([{"subnet": "172.20.0.0/24", "gateway": "172.20.0.1"}]);
        expect_same("the subnets", &created["subnets"], &subnets)?;

        let namespace = lab.container("web1")?;
        let netns = path(&namespace);
        let options = json!({"static_ips": ["172.20.0.50"], "static_mac": "aa:bb:cc:dd:aa:00"});
        let input = attachment(&created, "net0", options);
        let status = host.call(&["setup", &netns], &input)?;
        let expected = json!({
            "dns_search_domains": [],
            "dns_server_ips": ["192.0.2.53"],
            "interfaces": {
                "net0": {
                    "mac_address": "aa:bb:cc:dd:aa:00",
                    "subnets": [{"gateway": "172.20.0.1", "ipnet": "172.20.0.50/24"}],
                },
            },
        });
        expect_same("the status", &status, &expected)?;
        let _servers = [
            namespace.tcp_server("web1", "172.20.0.50:80")?,
            namespace.tcp_server("second of a range", "172.20.0.50:7001")?,
        ];
        let outside = lab.outside();
        outside.tcp("10.0.0.2:8080").exchange()?.by("web1")?.saw_client_at("10.0.0.3")?;
        outside.tcp("10.0.0.2:9001").exchange()?.by("second of a range")?;
        outside.tcp("10.0.0.22:9001").refused()?;

        let refusal = host.refused(&["setup", &netns], &input)?;
        ensure!(refusal.contains("attached"), "set up twice: {refusal}");
        // The container has another name by now.
        let mut renamed = input.clone();
        renamed["container_name"] = "web2".into();
        expect_same("teardown", &host.call(&["teardown", &netns], &renamed)?, &Value::Null)?;
        expect_same("endpoints", &host.endpoints("web")?, &0)?;
        outside.tcp("10.0.0.2:8080").refused()?;
        host.call(&["teardown", &netns], &input)?;

        host.call(&["setup", &netns], &input)?;
        lab.vanish(&namespace)?;
        host.call(&["teardown", &netns], &input)?;
        expect_same("endpoints", &host.endpoints("web")?, &0)?;
        // A host on which netdp was purged in between.
        lab.netdp(&["network", "rm", "web"])?;
        let namespace = lab.container("web2")?;
        host.call(&["setup", &path(&namespace)], &input)?;
        lab.expect_no_netfilter()
    })())
}

fn creates_networks() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let host = Host::new(&lab)?;
        // Nothing is said: netdp chooses, and Podman keeps what it has said for itself.
        let wanted = network("chosen");
        let created = host.call(&["create"], &wanted)?;
        for key in ["name", "id", "driver", "created", "labels", "internal"] {
            expect_same(key, &created[key], &wanted[key])?;
        }
        expect_same("DNS", &created["dns_enabled"], &json!(false))?;
        let subnets = created["subnets"].as_array().context("read the subnets")?;
        expect_same("subnets", &subnets.len(), &1)?;
        let known = lab.json(&["network", "inspect", "chosen"])?;
        expect_same("the subnet", &subnets[0]["subnet"], &known[0]["subnets"][0])?;
        expect_same("the gateway", &subnets[0]["gateway"], &known[0]["gateways"][0])?;
        // What came out goes in again.
        expect_same("the network again", &host.call(&["create"], &created)?, &created)?;

        let mut wanted = network("both");
        wanted["subnets"] = json!([
            {"subnet": "172.20.0.0/24", "gateway": "172.20.0.254",
             "lease_range": {"start_ip": "172.20.0.129", "end_ip": "172.20.0.255"}},
            {"subnet": "fd00:20::/64"},
        ]);
        wanted["internal"] = true.into();
        wanted["network_interface"] = "both0".into();
        wanted["options"] = json!({"mtu": "1400"});
        let created = host.call(&["create"], &wanted)?;
        expect_same("IPv6", &created["ipv6_enabled"], &json!(true))?;
        expect_same("the bridge", &created["network_interface"], &json!("both0"))?;
        let range = &wanted["subnets"][0]["lease_range"];
        expect_same("the range", &created["subnets"][0]["lease_range"], range)?;
        let known = &lab.json(&["network", "inspect", "both"])?[0];
        for (key, value) in [
            ("bridge", json!("both0")),
            ("mtu", json!(1400)),
            ("internal", json!(true)),
            ("gateways", json!(["172.20.0.254", "fd00:20::1"])),
            ("ip_ranges", json!(["172.20.0.128/25"])),
        ] {
            expect_same(key, &known[key], &value)?;
        }
        expect_same("the network again", &host.call(&["create"], &created)?, &created).map(drop)
    })())
}

fn says_what_it_refuses() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let host = Host::new(&lab)?;
        for (key, value, hint) in [
            ("routes", json!([{"destination": "10.9.0.0/24", "gateway": "172.20.0.9"}]), "--route"),
            ("ipam_options", json!({"driver": "dhcp"}), "--ipam-driver"),
            ("options", json!({"vlan": "7"}), "vlan"),
            ("subnets", json!([{"subnet": "10.0.0.0/24"}]), "10.0.0.2/24"),
            ("subnets", json!(7), "invalid type"),
        ] {
            let mut wanted = network("web");
            wanted[key] = value;
            let refusal = host.refused(&["create"], &wanted)?;
            ensure!(refusal.contains(hint), "expected {hint:?} in: {refusal}");
        }
        expect_same("networks", &lab.json(&["network", "ls"])?, &json!([]))?;

        let created = host.call(&["create"], &network("web"))?;
        let mut other = network("web");
        other["subnets"] = json!([{"subnet": SUBNET_B}]);
        let refusal = host.refused(&["create"], &other)?;
        ensure!(refusal.contains("netdp network rm web"), "no way out in: {refusal}");
        let input = attachment(&created, "eth0", json!({}));
        let refusal = host.refused(&["setup", "/run/netns/nobody"], &input)?;
        ensure!(refusal.contains("/run/netns/nobody"), "{refusal}");
        for arguments in [&["setup"][..], &["start"]] {
            host.refused(arguments, &input)?;
        }
        Ok(())
    })())
}

fn publishes_once() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let host = Host::new(&lab)?;
        let namespace = lab.container("web1")?;
        let netns = path(&namespace);
        let first = attachment(&host.call(&["create"], &network("first"))?, "eth0", json!({}));
        let second = attachment(&host.call(&["create"], &network("second"))?, "eth1", json!({}));
        host.call(&["setup", &netns], &first)?;
        host.call(&["setup", &netns], &second)?;
        let _server = namespace.tcp_server("web1", "0.0.0.0:80")?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("web1")?;
        // What is left leads to the container by the network that is left.
        host.call(&["teardown", &netns], &first)?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("web1")?;
        host.call(&["teardown", &netns], &second)?;
        lab.outside().tcp("10.0.0.2:8080").refused()
    })())
}
