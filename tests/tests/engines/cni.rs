//! The CNI plugin, called as runtimes call it, with the configuration of docs/cni.md.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use netdp_tests::harness::Promise;
use netdp_tests::lab::{Lab, SUBNET_B};
use netdp_tests::namespace::{Fate, Namespace};
use netdp_tests::probe::expect_same;
use serde_json::{Value, json};

use crate::page;

/// Versions of the spec, old to new.
const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const NEWEST: &str = "1.1.0";
/// As long as those of containerd and Podman.
const ID: &str = "752947ff91f961eb3cb47ffe9315016979f3ffbec09e4d96a4fae3fb03391697";

pub(super) const TESTS: &[Promise] = &[
    ("cni_gives_a_container_its_network_in_every_version", every_version),
    ("cni_tells_the_versions_that_it_speaks", tells_versions),
    ("cni_gives_addresses_and_mac_that_are_asked_for", gives_what_is_asked_for),
    ("cni_refuses_with_the_numbers_of_the_spec", refuses),
    ("cni_lets_go_whatever_is_gone_already", lets_go),
    ("cni_finds_what_is_not_as_it_should_be", finds_what_is_broken),
    ("cni_collects_what_is_not_valid_any_more", collects),
    ("cni_says_whether_there_is_an_agent", says_its_status),
    ("cni_passes_on_what_plugins_before_it_came_to", passes_on),
    ("cni_takes_a_network_that_is_as_it_says", takes_networks),
    ("cni_takes_containers_that_come_at_once", takes_many_at_once),
    ("cni_publishes_once_for_a_container_in_two_networks", publishes_once),
];

/// A runtime that has the plugin, and one network's configuration.
struct Runtime<'a> {
    lab: &'a Lab,
    plugin: PathBuf,
    config: Value,
}

/// A container as runtimes name it.
#[derive(Clone, Copy)]
struct Container<'a> {
    id: &'a str,
    netns: &'a Path,
    interface: &'a str,
}

impl<'a> Runtime<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let plugin = lab.directory().join("netdp-cni");
        symlink(lab.agent()?.program(), &plugin).context("link the plugin")?;
        Ok(Self { lab, plugin, config: config(NEWEST)? })
    }

    /// The same runtime, with other keys in the configuration.
    fn with(&self, keys: Value) -> Result<Runtime<'a>> {
        let mut config = self.config.clone();
        for (key, value) in keys.as_object().context("read keys")? {
            config[key] = value.clone();
        }
        Ok(Runtime { lab: self.lab, plugin: self.plugin.clone(), config })
    }

    /// Calls the plugin with whatever is in the environment and on standard input.
    fn call(&self, environment: &[(&str, &str)], input: &[u8]) -> Result<Output> {
        let mut child = self
            .lab
            .host()
            .command(&self.plugin, Fate::DiesWithParent)?
            .env("NETDP_SOCKET", self.lab.agent()?.socket())
            .env("CNI_PATH", self.lab.directory())
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("call the plugin")?;
        // A plugin may well refuse before it has read everything.
        child.stdin.take().context("open its input")?.write_all(input).ok();
        child.wait_with_output().context("wait for the plugin")
    }

    fn command(&self, command: &str, container: Container) -> Result<Output> {
        let netns = container.netns.display().to_string();
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", container.id),
            ("CNI_IFNAME", container.interface),
            ("CNI_NETNS", &netns),
        ];
        self.call(&environment, self.config.to_string().as_bytes())
    }

    fn add(&self, container: Container) -> Result<Value> {
        let output = self.command("ADD", container)?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "ADD: {}: {text}", output.status);
        serde_json::from_slice(&output.stdout).with_context(|| format!("read {text}"))
    }

    /// A command that answers nothing when it succeeds.
    fn quietly(&self, command: &str, container: Container) -> Result<()> {
        let output = self.command(command, container)?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{command}: {}: {text}", output.status);
        ensure!(text.is_empty(), "{command} said: {text}");
        Ok(())
    }

    /// A command without a container.
    fn bare(&self, command: &str) -> Result<Output> {
        self.call(&[("CNI_COMMAND", command)], self.config.to_string().as_bytes())
    }

    fn endpoints(&self) -> Result<Vec<String>> {
        let networks = self.lab.json(&["network", "inspect", "web"])?;
        let endpoints = networks[0]["endpoints"].as_array().context("read the endpoints")?;
        Ok(endpoints.iter().filter_map(|e| e["name"].as_str().map(String::from)).collect())
    }
}

/// What a runtime makes of the page's configuration for a version of the spec.
fn config(version: &str) -> Result<Value> {
    let list: Value = serde_json::from_str(&page::block("docs/cni.md", "json")?)?;
    let mut config = list["plugins"][0].clone();
    let keys = config.as_object_mut().context("read the plugin's configuration")?;
    keys.remove("capabilities").context("read the plugin's capabilities")?;
    keys.insert("cniVersion".into(), version.into());
    keys.insert("name".into(), list["name"].clone());
    Ok(config)
}

/// Fails unless the plugin ended with this error of the spec, and returns its details.
fn expect_error(output: &Output, version: &str, code: u32) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(!output.status.success(), "expected error {code}, it succeeded: {text}");
    let error: Value =
        serde_json::from_slice(&output.stdout).with_context(|| format!("read {text}"))?;
    expect_same("the error's version", &error["cniVersion"], &version.into())?;
    ensure!(error["code"] == code, "expected error {code}: {text}");
    ensure!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "no message: {text}");
    Ok(error["details"].as_str().context("read the details")?.to_owned())
}

/// Fails unless an object has these keys and no other.
fn expect_keys(value: &Value, expected: &[&str]) -> Result<()> {
    let keys = value.as_object().with_context(|| format!("read the object {value}"))?.keys();
    let keys: Vec<&str> = keys.map(String::as_str).collect();
    let mut expected = expected.to_vec();
    expected.sort_unstable();
    expect_same(&format!("the keys of {value}"), &keys, &expected)
}

/// Fails unless a result is what the spec's version says, for a container with an IPv4 address.
fn expect_shape(result: &Value, version: &str, container: Container, address: &str) -> Result<()> {
    expect_keys(result, &["cniVersion", "interfaces", "ips", "routes"])?;
    expect_same("the version", &result["cniVersion"], &version.into())?;
    let interfaces = result["interfaces"].as_array().context("read the interfaces")?;
    let [bridge, host, inside] = &interfaces[..] else { bail!("no three interfaces: {result}") };
    let mtu: &[&str] = if version == "1.1.0" { &["mtu"] } else { &[] };
    expect_keys(bridge, &[&["name"], mtu].concat())?;
    expect_keys(host, &[&["name"], mtu].concat())?;
    expect_keys(inside, &[&["mac", "name", "sandbox"], mtu].concat())?;
    expect_same("the interface's name", &inside["name"], &container.interface.into())?;
    let sandbox = container.netns.display().to_string();
    expect_same("the sandbox", &inside["sandbox"], &sandbox.into())?;
    let mut ip = json!({"address": address, "gateway": "172.20.0.1", "interface": 2});
    if ["0.3.1", "0.4.0"].contains(&version) {
        ip["version"] = "4".into();
    }
    expect_same("the addresses", &result["ips"], &json!([ip]))?;
    expect_same("the routes", &result["routes"], &json!([{"dst": "0.0.0.0/0", "gw": "172.20.0.1"}]))
}

fn every_version() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        for version in VERSIONS {
            in_version(&runtime, version).with_context(|| format!("version {version}"))?;
        }
        lab.expect_no_netfilter()
    })())
}

/// A container's whole life.
fn in_version(runtime: &Runtime, version: &str) -> Result<()> {
    let lab = runtime.lab;
    let ports =
        json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
    let runtime = runtime.with(json!({"cniVersion": version, "runtimeConfig": ports}))?;
    let namespace = lab.container(&format!("v{version}"))?;
    let netns = namespace.path();
    let container = Container { id: ID, netns: &netns, interface: "eth0" };
    let result = runtime.add(container)?;
    let address = result["ips"][0]["address"].as_str().context("read the address")?.to_owned();
    expect_shape(&result, version, container, &address)?;
    let ip = address.trim_end_matches("/24");

    let server = namespace.tcp_server("web", (ip, 80))?;
    let outside = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
    lab.outside().tcp("10.0.0.2:8080").exchange()?.by("web")?.saw_client_at("10.0.0.3")?;
    namespace.tcp("10.0.0.3:7").exchange()?.by("outside")?.saw_client_at("10.0.0.2")?;
    drop((server, outside));

    let after = runtime.with(json!({"prevResult": result}))?;
    if version == "0.3.1" {
        expect_error(&after.command("CHECK", container)?, NEWEST, 1)?;
    } else {
        after.quietly("CHECK", container)?;
    }
    after.quietly("DEL", container)?;
    expect_same("endpoints", &runtime.endpoints()?, &vec![])?;
    lab.outside().tcp("10.0.0.2:8080").refused()?;
    after.quietly("DEL", container)?;
    expect_same("the container's links", &namespace.links()?, &vec!["lo".to_owned()])
}

fn tells_versions() -> Result<()> {
    let lab = Lab::builder().agent_stopped().build()?;
    let runtime = Runtime::new(&lab)?;
    for (input, version) in
        [(&br#"{"cniVersion": "0.4.0"}"#[..], "0.4.0"), (b"", NEWEST), (b"no JSON", NEWEST)]
    {
        let output = runtime.call(&[("CNI_COMMAND", "VERSION")], input)?;
        ensure!(output.status.success(), "VERSION failed: {}", output.status);
        let answer: Value = serde_json::from_slice(&output.stdout)?;
        let expected = json!({"cniVersion": version, "supportedVersions": VERSIONS});
        expect_same("the answer", &answer, &expected)?;
    }
    Ok(())
}

fn gives_what_is_asked_for() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let plain = Runtime::new(&lab)?;
        let both = json!({"subnets": ["172.20.0.0/24", "fd00:20::/64"]});
        let runtime = plain.with(both)?;
        let asked = [
            json!({"runtimeConfig": {"ips": ["172.20.0.9", "fd00:20::9/64"], "mac": "02:42:ac:14:00:99"},
                   "dns": {"nameservers": ["192.0.2.53"], "search": ["example.org"]}}),
            json!({"args": {"cni": {"ips": ["172.20.0.10/24"], "mac": "02:42:ac:14:00:9a"}}}),
        ];
        let mut results = Vec::new();
        for (number, asked) in asked.iter().enumerate() {
            let namespace = lab.container(&format!("c{number}"))?;
            let id = format!("c{number}");
            let netns = namespace.path();
            let container = Container { id: &id, netns: &netns, interface: "net0" };
            results.push((runtime.with(asked.clone())?.add(container)?, namespace));
        }
        let addresses = |result: &Value| -> Vec<Value> {
            result["ips"].as_array().into_iter().flatten().map(|ip| ip["address"].clone()).collect()
        };
        let (first, namespace) = &results[0];
        let expected = [json!("172.20.0.9/24"), json!("fd00:20::9/64")];
        expect_same("the addresses", &addresses(first), &expected.to_vec())?;
        expect_same("the MAC", &namespace.mac("net0")?, &[0x02, 0x42, 0xac, 0x14, 0, 0x99])?;
        let routes = json!([
            {"dst": "0.0.0.0/0", "gw": "172.20.0.1"},
            {"dst": "::/0", "gw": "fd00:20::1"},
        ]);
        expect_same("the routes", &first["routes"], &routes)?;
        let dns = json!({"nameservers": ["192.0.2.53"], "search": ["example.org"]});
        expect_same("the DNS", &first["dns"], &dns)?;
        let (second, namespace) = &results[1];
        expect_same("the address", &addresses(second)[0], &json!("172.20.0.10/24"))?;
        expect_same("the MAC", &namespace.mac("net0")?, &[0x02, 0x42, 0xac, 0x14, 0, 0x9a])?;

        let namespace = lab.container("arguments")?;
        let netns = namespace.path().display().to_string();
        let environment = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c2"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", &netns),
            ("CNI_ARGS", "IgnoreUnknown=1;IP=172.20.0.11;MAC=02:42:ac:14:00:9b"),
        ];
        let output = runtime.call(&environment, runtime.config.to_string().as_bytes())?;
        let third: Value = serde_json::from_slice(&output.stdout)?;
        expect_same("the address", &addresses(&third)[0], &json!("172.20.0.11/24"))?;
        expect_same("the MAC", &namespace.mac("eth0")?, &[0x02, 0x42, 0xac, 0x14, 0, 0x9b])
    })())
}

fn refuses() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        let namespace = lab.container("c")?;
        let netns = namespace.path();
        let container = Container { id: "c", netns: &netns, interface: "eth0" };
        let ports = json!([{"hostPort": 8080, "containerPort": 80}]);
        let publishing = runtime.with(json!({"runtimeConfig": {"portMappings": ports}}))?;
        publishing.add(container)?;
        let expect = |runtime: &Runtime, container, code, hint: &str| -> Result<()> {
            let details = expect_error(&runtime.command("ADD", container)?, NEWEST, code)
                .with_context(|| format!("expecting {hint:?}"))?;
            ensure!(details.contains(hint), "expected {hint:?} in: {details}");
            let endpoints = runtime.endpoints()?;
            expect_same("endpoints", &endpoints, &vec!["cni-eth0-c".to_owned()])
        };
        expect(&runtime, container, 100, "cni-eth0-c")?;
        expect(&runtime, Container { id: "d", ..container }, 100, "is attached to network")?;

        let other = lab.container("d")?;
        other.ip("link add taken0 type veth peer name taken1\n")?;
        let netns = other.path();
        let container = Container { id: "d", netns: &netns, interface: "eth0" };
        expect(&publishing, container, 100, "8080")?;
        expect(&runtime, Container { interface: "taken0", ..container }, 100, "taken0")?;
        let host = lab.host().path();
        expect(&runtime, Container { netns: &host, ..container }, 7, "host's own")?;
        let nowhere = Container { netns: Path::new("/run/netns/nobody"), ..container };
        expect(&runtime, nowhere, 3, "/run/netns/nobody")?;
        expect(&runtime, Container { id: "-", ..container }, 4, "CNI_CONTAINERID")?;
        expect(
            &runtime,
            Container { id: "", interface: "", ..container },
            4,
            "CNI_CONTAINERID, CNI_IFNAME",
        )?;
        for (keys, code, hint) in [
            (json!({"mtuu": 1400}), 2, "mtuu=1400"),
            (json!({"ipam": {"type": "host-local"}}), 2, "ipam={\"type\":\"host-local\"}"),
            (json!({"runtimeConfig": {"bandwidth": {"egressRate": 4096}}}), 2, "bandwidth"),
            (json!({"mtu": "much"}), 7, "much"),
            (json!({"mtu": 1400}), 7, "MTU 1400"),
            (json!({"runtimeConfig": {"ips": ["192.0.2.1"]}}), 7, "192.0.2.1"),
            (
                json!({"runtimeConfig": {"portMappings": [{"hostPort": 0, "containerPort": 80}]}}),
                7,
                "port",
            ),
            (json!({"name": ""}), 7, "name"),
            (json!({"prevResult": []}), 7, "prevResult"),
        ] {
            expect(&runtime.with(keys)?, container, code, hint)?;
        }
        for version in ["", "0.2.0", "9.0.0"] {
            expect(&runtime.with(json!({"cniVersion": version}))?, container, 1, "0.3.1")?;
        }
        let malformed = runtime.call(&[("CNI_COMMAND", "ADD")], b"{\"cniVersion\": ")?;
        expect_error(&malformed, NEWEST, 6)?;
        for command in ["", "add", "UPDATE"] {
            expect_error(&runtime.bare(command)?, NEWEST, 4)?;
        }
        lab.agent()?.stop()?;
        for command in ["ADD", "DEL"] {
            expect_error(&runtime.command(command, container)?, NEWEST, 11)?;
        }
        expect_same("the container's links", &other.links()?.contains(&"eth0".to_owned()), &false)
    })())
}

fn lets_go() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        let nowhere = Container { id: ID, netns: Path::new(""), interface: "eth0" };
        // There is no network yet.
        runtime.quietly("DEL", nowhere)?;

        let namespace = lab.container("c")?;
        let netns = namespace.path();
        let container = Container { netns: &netns, ..nowhere };
        runtime.add(container)?;
        runtime.quietly("DEL", Container { interface: "eth1", ..nowhere })?;
        expect_same("endpoints", &runtime.endpoints()?.len(), &1)?;
        // A configuration that ADD would refuse by now.
        runtime.with(json!({"mtuu": 1400, "runtimeConfig": 7}))?.quietly("DEL", nowhere)?;
        expect_same("endpoints", &runtime.endpoints()?.len(), &0)?;

        runtime.add(container)?;
        lab.vanish(&namespace)?;
        runtime.quietly("DEL", container)?;
        runtime.quietly("DEL", container)?;
        expect_same("endpoints", &runtime.endpoints()?.len(), &0)
    })())
}

fn finds_what_is_broken() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        let ports = json!([{"hostPort": 8080, "containerPort": 80}]);
        let runtime = runtime.with(json!({"runtimeConfig": {"portMappings": ports}}))?;
        type Break = fn(&Lab, &Namespace) -> Result<()>;
        let breaks: [(&str, Break); 5] = [
            ("is down", |_, inside| inside.ip("link set eth0 down\n")),
            ("lacks", |_, inside| inside.ip("address flush dev eth0\n")),
            ("default route", |_, inside| inside.ip("route del default\n")),
            ("8080:80/tcp", |lab, _| {
                lab.netdp(&["unpublish", "cni-eth0-c", "-p", "8080:80"]).map(drop)
            }),
            ("cni-eth0-c", |lab, _| lab.disconnect("web", "cni-eth0-c")),
        ];
        for (number, (hint, destroy)) in breaks.into_iter().enumerate() {
            let namespace = lab.container(&format!("c{number}"))?;
            let netns = namespace.path();
            let container = Container { id: "c", netns: &netns, interface: "eth0" };
            let after = runtime.with(json!({"prevResult": runtime.add(container)?}))?;
            after.quietly("CHECK", container)?;
            destroy(&lab, &namespace).with_context(|| format!("bring about {hint:?}"))?;
            let details = expect_error(&after.command("CHECK", container)?, NEWEST, 102)?;
            ensure!(details.contains(hint), "expected {hint:?} in: {details}");
            after.quietly("DEL", container)?;
        }
        let namespace = lab.container("last")?;
        let netns = namespace.path();
        let container = Container { id: "c", netns: &netns, interface: "eth0" };
        runtime.add(container)?;
        let details = expect_error(&runtime.command("CHECK", container)?, NEWEST, 7)?;
        ensure!(details.contains("prevResult"), "{details}");
        Ok(())
    })())
}

fn collects() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        let collect = |valid: Value| -> Result<()> {
            let output = runtime.with(json!({"cni.dev/valid-attachments": valid}))?.bare("GC")?;
            let text = String::from_utf8_lossy(&output.stdout);
            ensure!(output.status.success() && text.is_empty(), "GC: {}: {text}", output.status);
            Ok(())
        };
        // There is no network yet.
        collect(json!([]))?;
        for id in ["a", "b", ID] {
            let namespace = lab.container(&id[..1])?;
            runtime.add(Container { id, netns: &namespace.path(), interface: "eth0" })?;
        }
        lab.attach("web", "byhand", "172.20.0.100", &[])?;
        let valid = |id: &str| json!({"containerID": id, "ifname": "eth0"});
        collect(json!([valid("a"), valid(ID), valid("never-seen")]))?;
        let names = runtime.endpoints()?;
        expect_same("endpoints", &names.len(), &3)?;
        ensure!(!names.contains(&"cni-eth0-b".to_owned()), "b is still there: {names:?}");
        collect(json!([]))?;
        expect_same("endpoints", &runtime.endpoints()?, &vec!["byhand".to_owned()])?;
        expect_error(&runtime.bare("GC")?, NEWEST, 7)?;
        let old = runtime.with(json!({"cniVersion": "1.0.0"}))?.bare("GC")?;
        expect_error(&old, NEWEST, 1).map(drop)
    })())
}

fn says_its_status() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        let output = runtime.bare("STATUS")?;
        ensure!(output.status.success() && output.stdout.is_empty(), "STATUS: {output:?}");
        let old = runtime.with(json!({"cniVersion": "1.0.0"}))?.bare("STATUS")?;
        expect_error(&old, NEWEST, 1)?;
        lab.agent()?.stop()?;
        let details = expect_error(&runtime.bare("STATUS")?, NEWEST, 50)?;
        ensure!(details.contains("netdp agent"), "no way out in: {details}");
        Ok(())
    })())
}

fn passes_on() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        let namespace = lab.container("c")?;
        let netns = namespace.path();
        let container = Container { id: "c", netns: &netns, interface: "eth0" };
        let sandbox = netns.display().to_string();
        let previous = json!({
            "cniVersion": NEWEST,
            "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": sandbox}],
            "ips": [{"address": "127.0.0.1/8", "interface": 0}],
            "routes": [{"dst": "192.0.2.0/24", "scope": 253}],
            "dns": {"nameservers": ["192.0.2.53"]},
        });
        let result = runtime.with(json!({"prevResult": previous}))?.add(container)?;
        for list in ["interfaces", "ips", "routes"] {
            expect_same(list, &result[list][0], &previous[list][0])?;
        }
        expect_same("the DNS", &result["dns"], &previous["dns"])?;
        expect_same("the address's interface", &result["ips"][1]["interface"], &json!(3))?;
        expect_same("the interface", &result["interfaces"][3]["name"], &json!("eth0"))?;
        runtime.with(json!({"prevResult": result}))?.quietly("CHECK", container)
    })())
}

fn takes_networks() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        let namespace = lab.container("c")?;
        let netns = namespace.path();
        let container = Container { id: "c", netns: &netns, interface: "eth0" };
        lab.create_network("web", SUBNET_B, &["--internal"])?;
        let details = expect_error(&runtime.command("ADD", container)?, NEWEST, 7)?;
        ensure!(details.contains("172.20.0.0/24") && details.contains(SUBNET_B), "{details}");
        lab.netdp(&["network", "rm", "web"])?;
        lab.create_network("web", "172.20.0.0/24", &["--internal", "--gateway", "172.20.0.254"])?;
        let result = runtime.add(container)?;
        // No way out, no default route.
        expect_same("the routes", &result["routes"], &json!([]))?;
        ensure!(result["ips"][0].get("gateway").is_none(), "a gateway in {result}");
        runtime.with(json!({"prevResult": result}))?.quietly("CHECK", container)
    })())
}

fn takes_many_at_once() -> Result<()> {
    const CONTAINERS: usize = 8;
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let runtime = Runtime::new(&lab)?;
        let namespaces: Vec<Namespace> =
            (0..CONTAINERS).map(|n| lab.container(&format!("c{n}"))).collect::<Result<_>>()?;
        let results: Vec<Result<Value>> = thread::scope(|scope| {
            let runtime = &runtime;
            let add = |namespace: &Namespace| {
                let (id, netns) = (namespace.name().to_owned(), namespace.path());
                scope.spawn(move || {
                    runtime.add(Container { id: &id, netns: &netns, interface: "eth0" })
                })
            };
            let adding: Vec<_> = namespaces.iter().map(add).collect();
            let join = |adding: thread::ScopedJoinHandle<'_, Result<Value>>| {
                adding.join().unwrap_or_else(|_| Err(anyhow!("ADD panicked")))
            };
            adding.into_iter().map(join).collect()
        });
        let mut addresses: Vec<String> = Vec::new();
        for result in results {
            addresses.push(result?["ips"][0]["address"].to_string());
        }
        addresses.sort();
        addresses.dedup();
        expect_same("different addresses", &addresses.len(), &CONTAINERS)
    })())
}

fn publishes_once() -> Result<()> {
    let lab = Lab::builder().build()?;
    lab.explain((|| {
        let ports = json!([{"hostPort": 8080, "containerPort": 80}]);
        let first = Runtime::new(&lab)?.with(json!({"runtimeConfig": {"portMappings": ports}}))?;
        let second = first.with(json!({"name": "second", "subnets": [SUBNET_B]}))?;
        let namespace = lab.container("c")?;
        let netns = namespace.path();
        let container = Container { id: "c", netns: &netns, interface: "eth0" };
        let other = Container { interface: "eth1", ..container };
        let first_result = first.add(container)?;
        let second_result = second.add(other)?;
        expect_same("routes by the second network", &second_result["routes"], &json!([]))?;
        first.with(json!({"prevResult": first_result}))?.quietly("CHECK", container)?;
        second.with(json!({"prevResult": second_result}))?.quietly("CHECK", other)?;
        let _server = namespace.tcp_server("c", "0.0.0.0:80")?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("c")?;
        // What is left leads to the container by the network that is left.
        first.quietly("DEL", container)?;
        lab.outside().tcp("10.0.0.2:8080").exchange()?.by("c")?;
        second.quietly("DEL", other)?;
        lab.outside().tcp("10.0.0.2:8080").refused()
    })())
}
