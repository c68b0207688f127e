//! A netavark plugin (containers/netavark, plugin-API.md): `netdp-netavark`, by which Podman 5 has its
//! networks made.
//!
//! Owns Podman's words for networks, containers and ports. Podman keeps the network's configuration;
//! whatever it does not have is left as it is.

use std::{
    collections::BTreeMap,
    env,
    io::{self, Read, Write},
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use hyper::Method;
use ipnet::IpNet;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{network, port_argument};
use crate::{
    api::{
        client::{self, Client, wait_for},
        wire::{self, ErrorKind},
    },
    config::Paths,
};

/// Of the plugin API; there is no other.
const API_VERSION: &str = "1.0.0";
/// Names the agent's socket, as for the command line.
const SOCKET_VARIABLE: &str = "NETDP_SOCKET";
/// How much of a container's id Podman shows to people, and how endpoints are named.
const SHOWN_ID: usize = 12;
/// Docker's name of the option that names the bridge.
const BRIDGE_OPTION: &str = "com.docker.network.bridge.name";
/// Podman's own name of the option for the MTU, and Docker's.
const MTU_OPTIONS: [&str; 2] = ["mtu", "com.docker.network.driver.mtu"];

/// A network as Podman has it.
#[derive(Clone, Debug, Deserialize)]
struct Network {
    name: String,
    #[serde(default)]
    internal: bool,
    #[serde(default)]
    ipv6_enabled: bool,
    network_interface: Option<String>,
    options: Option<BTreeMap<String, String>>,
    ipam_options: Option<BTreeMap<String, String>>,
    subnets: Option<Vec<Subnet>>,
    routes: Option<Vec<Value>>,
    network_dns_servers: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Subnet {
    subnet: IpNet,
    gateway: Option<IpAddr>,
    lease_range: Option<LeaseRange>,
}

/// Where addresses are chosen from.
#[derive(Clone, Debug, Deserialize)]
struct LeaseRange {
    start_ip: Option<IpAddr>,
    end_ip: Option<IpAddr>,
}

/// What `setup` and `teardown` are told.
#[derive(Clone, Debug, Deserialize)]
struct Attachment {
    container_id: String,
    port_mappings: Option<Vec<PortMapping>>,
    network: Network,
    network_options: Options,
}

/// What one container wants of a network.
#[derive(Clone, Debug, Deserialize)]
struct Options {
    interface_name: String,
    static_ips: Option<Vec<String>>,
    static_mac: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct PortMapping {
    container_port: u16,
    #[serde(default)]
    host_ip: String,
    #[serde(default)]
    host_port: u16,
    /// One or several, between commas.
    #[serde(default)]
    protocol: String,
    /// How many ports, counting up.
    #[serde(default)]
    range: u16,
}

/// Carries out the command that the arguments name, and answers on standard output.
pub(super) fn run() -> ExitCode {
    let (answer, code) = match wait_for(execute(env::args().skip(1).collect())) {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(error) => (Some(json!({"error": format!("{error:#}")})), ExitCode::FAILURE),
    };
    let text = answer.map(|value| format!("{value}\n")).unwrap_or_default();
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        // Nobody heard the answer, so nobody may believe that all is well.
        Err(_) => ExitCode::FAILURE,
    }
}

async fn execute(arguments: Vec<String>) -> Result<Option<Value>> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let client = || {
        let named = env::var_os(SOCKET_VARIABLE).map(PathBuf::from);
        Client::new(&named.unwrap_or_else(|| Paths::default().socket()))
    };
    match words[..] {
        [] | ["info"] => {
            Ok(Some(json!({"version": env!("CARGO_PKG_VERSION"), "api_version": API_VERSION})))
        }
        ["create"] => create(&client(), read_input()?).await.map(Some),
        ["setup", netns] => set_up(&client(), netns, read_input()?).await.map(Some),
        ["teardown", _] => tear_down(&client(), &read_input()?).await.map(|()| None),
        _ => bail!(
            "{words:?} is none of create, setup NETNS, teardown NETNS and info: netavark calls this \
             plugin, for `podman network create --driver netdp-netavark`"
        ),
    }
}

fn read_input<T: DeserializeOwned>() -> Result<T> {
    let mut text = Vec::new();
    io::stdin().read_to_end(&mut text).context("read standard input")?;
    serde_json::from_slice(&text).context("understand standard input")
}

/// Makes a network, and writes into Podman's configuration what netdp chose.
async fn create(client: &Client, mut config: Map<String, Value>) -> Result<Value> {
    let wanted: Network =
        serde_json::from_value(config.clone().into()).context("understand standard input")?;
    let network = network::ensure(client, &wanted.request()?).await?;
    let given = config.get("subnets").and_then(Value::as_array).cloned().unwrap_or_default();
    let subnets: Vec<Value> = network
        .subnets
        .iter()
        .map(|subnet| {
            let is_ipv6 = subnet.contains(':');
            let gateway = network.gateways.iter().find(|gateway| gateway.contains(':') == is_ipv6);
            let mut known = json!({"subnet": subnet, "gateway": gateway});
            let given = given.iter().find(|given| given["subnet"] == subnet.as_str());
            if let Some(range) = given.and_then(|given| given.get("lease_range")) {
                known["lease_range"] = range.clone();
            }
            known
        })
        .collect();
    let has_ipv6 = network.subnets.iter().any(|subnet| subnet.contains(':'));
    config.insert("subnets".into(), subnets.into());
    config.insert("ipv6_enabled".into(), has_ipv6.into());
    config.insert("network_interface".into(), network.bridge.into());
    // Names of containers would be aardvark-dns's to answer, which netavark starts for its own drivers.
    config.insert("dns_enabled".into(), false.into());
    config.insert("ipam_options".into(), json!({"driver": "host-local"}));
    Ok(config.into())
}

async fn set_up(client: &Client, netns: &str, attachment: Attachment) -> Result<Value> {
    let network = network::ensure(client, &attachment.network.request()?).await?;
    let mut publish = ports(attachment.port_mappings.as_deref().unwrap_or_default())?;
    if !publish.is_empty() && !network::published_of(client, netns).await?.is_empty() {
        // By another of the container's networks.
        publish.clear();
    }
    let connect = wire::Connect {
        netns: netns.to_owned(),
        name: Some(attachment.endpoint_name()),
        addresses: attachment.network_options.static_ips.unwrap_or_default(),
        mac: attachment.network_options.static_mac.filter(|mac| !mac.is_empty()),
        interface: Some(attachment.network_options.interface_name),
        publish,
    };
    let endpoint = network::connect(client, &network.name, &connect).await?;
    let subnet = |address: &String| {
        let is_ipv6 = address.contains(':');
        let gateway = endpoint.gateways.iter().find(|gateway| gateway.contains(':') == is_ipv6);
        json!({"ipnet": address, "gateway": gateway})
    };
    let subnets: Vec<Value> = endpoint.addresses.iter().map(subnet).collect();
    Ok(json!({
        "dns_search_domains": [],
        "dns_server_ips": attachment.network.network_dns_servers.unwrap_or_default(),
        "interfaces": {&endpoint.interface: {"mac_address": endpoint.mac, "subnets": subnets}},
    }))
}

async fn tear_down(client: &Client, attachment: &Attachment) -> Result<()> {
    let (network, endpoint) = (&attachment.network.name, attachment.endpoint_name());
    let path = client::path(&["networks", network, "endpoints", &endpoint]);
    match client.order(Method::DELETE, &path).await {
        // What is not there is torn down.
        Err(error) if client::refusal(&error) == Some(ErrorKind::NotFound) => Ok(()),
        answer => answer,
    }
}

impl Network {
    /// The network in the agent's words.
    fn request(&self) -> Result<wire::CreateNetwork> {
        if self.routes.as_ref().is_some_and(|routes| !routes.is_empty()) {
            bail!("netdp gives containers default routes only: leave --route out");
        }
        let ipam = self.ipam_options.as_ref().and_then(|options| options.get("driver"));
        if let Some(driver) = ipam.filter(|driver| !matches!(driver.as_str(), "" | "host-local")) {
            bail!("netdp gives addresses itself, and {driver:?} can't: leave --ipam-driver out");
        }
        let mut options = self.options.clone().unwrap_or_default();
        let [podman, docker] = MTU_OPTIONS;
        if let Some(mtu) = options.remove(podman) {
            options.insert(docker.to_owned(), mtu);
        }
        let bridge = self.network_interface.clone().filter(|bridge| !bridge.is_empty());
        if let Some(bridge) = bridge.filter(|bridge| !is_chosen(bridge)) {
            options.insert(BRIDGE_OPTION.to_owned(), bridge);
        }
        let subnets = self.subnets.as_deref().unwrap_or_default();
        let has_ipv4 = subnets.iter().any(|subnet| subnet.subnet.addr().is_ipv4());
        let ranges = subnets.iter().filter_map(Subnet::range).collect::<Result<Vec<_>>>()?;
        Ok(wire::CreateNetwork {
            name: self.name.clone(),
            subnets: subnets.iter().map(|subnet| subnet.subnet.to_string()).collect(),
            gateways: subnets
                .iter()
                .filter_map(|subnet| Some(subnet.gateway?.to_string()))
                .collect(),
            // Who names IPv6 subnets alone wants nothing else.
            enable_ipv4: (!subnets.is_empty()).then_some(has_ipv4),
            enable_ipv6: self.ipv6_enabled.then_some(true),
            ip_ranges: ranges.iter().map(ToString::to_string).collect(),
            internal: self.internal,
            options,
            ..wire::CreateNetwork::default()
        })
    }
}

impl Subnet {
    /// The prefix that `podman network create --ip-range` made a range of.
    fn range(&self) -> Option<Result<IpNet>> {
        let LeaseRange { start_ip, end_ip } = self.lease_range.as_ref()?;
        let (Some(start), Some(end)) = (start_ip, end_ip) else {
            return (start_ip.is_some() || end_ip.is_some()).then(|| Err(no_prefix(self.subnet)));
        };
        // Podman leaves the first address of the prefix out, and of an IPv4 subnet perhaps the last.
        let is_it = |net: &IpNet| {
            let mut hosts = [net.network()].into_iter().chain(net.hosts().take(2));
            hosts.any(|host| host == *start) && [net.broadcast(), last_host(*net)].contains(end)
        };
        let mut prefixes = (self.subnet.prefix_len()..=self.subnet.max_prefix_len())
            .filter_map(|length| Some(IpNet::new(*start, length).ok()?.trunc()));
        Some(prefixes.find(is_it).ok_or_else(|| no_prefix(self.subnet)))
    }
}

/// Whether netdp gave a bridge its name: Podman keeps it, and netdp may give it to another network when it
/// begins anew.
fn is_chosen(bridge: &str) -> bool {
    bridge.strip_prefix("nd-").is_some_and(|number| number.parse::<u32>().is_ok())
}

/// The last address of a prefix that is not its broadcast address.
fn last_host(net: IpNet) -> IpAddr {
    match net {
        IpNet::V4(net) => IpAddr::V4((u32::from(net.broadcast()).saturating_sub(1)).into()),
        IpNet::V6(net) => IpAddr::V6(net.broadcast()),
    }
}

fn no_prefix(subnet: IpNet) -> anyhow::Error {
    anyhow::anyhow!("the range of addresses in {subnet} is no prefix: give --ip-range as a CIDR")
}

impl Attachment {
    /// The same for as long as the container lives; its name may change.
    fn endpoint_name(&self) -> String {
        self.container_id.chars().take(SHOWN_ID).collect()
    }
}

/// Port mappings as `-p` takes them.
fn ports(mappings: &[PortMapping]) -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    for mapping in mappings {
        let PortMapping { container_port, host_ip, host_port, protocol, range } = mapping;
        let more = range.saturating_sub(1);
        let ports = |first: u16| match (first, first.checked_add(more)) {
            (first, Some(last)) if last > first => Ok(format!("{first}-{last}")),
            (first, Some(_)) => Ok(first.to_string()),
            (first, None) => bail!("{range} ports from {first} on are more than there are"),
        };
        let host_ports = if *host_port == 0 { String::new() } else { ports(*host_port)? };
        let container_ports = ports(*container_port)?;
        let protocols = if protocol.is_empty() { "tcp" } else { protocol };
        for protocol in protocols.split(',') {
            arguments.push(port_argument(host_ip, &host_ports, &container_ports, protocol));
        }
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(value: Value) -> Result<wire::CreateNetwork> {
        serde_json::from_value::<Network>(value).unwrap().request()
    }

    #[test]
    fn a_network_of_podman_becomes_a_request() {
        let expected = wire::CreateNetwork {
            name: "web".into(),
            subnets: vec!["10.0.0.0/16".into(), "fd00:20::/64".into()],
            gateways: vec!["10.0.0.1".into()],
            enable_ipv4: Some(true),
            enable_ipv6: Some(true),
            ip_ranges: vec!["10.0.128.0/17".into()],
            internal: true,
            options: [(BRIDGE_OPTION, "web0"), (MTU_OPTIONS[1], "1400")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..wire::CreateNetwork::default()
        };
        let network = json!({
            "name": "web",
            "id": "2f259bab93aa",
            "driver": "netdp-netavark",
            "network_interface": "web0",
            "subnets": [
                {
                    "subnet": "10.0.0.0/16",
                    "gateway": "10.0.0.1",
                    "lease_range": {"start_ip": "10.0.128.1", "end_ip": "10.0.255.255"},
                },
                {"subnet": "fd00:20::/64"},
            ],
            "ipv6_enabled": true,
            "internal": true,
            "dns_enabled": true,
            "ipam_options": {"driver": "host-local"},
            "options": {"mtu": "1400"},
        });
        assert_eq!(request(network).unwrap(), expected);
        let nothing = request(json!({"name": "web", "options": null})).unwrap();
        let bare = wire::CreateNetwork { name: "web".into(), ..wire::CreateNetwork::default() };
        assert_eq!(nothing, bare);
        let chosen = request(json!({"name": "web", "network_interface": "nd-1"})).unwrap();
        assert_eq!(chosen, bare);
        let ipv6 = request(json!({"name": "web", "subnets": [{"subnet": "fd00:20::/64"}]}));
        assert_eq!(ipv6.unwrap().enable_ipv4, Some(false));
    }

    #[test]
    fn what_netdp_does_not_do_is_refused() {
        for (key, value, hint) in [
            ("routes", json!([{"destination": "10.9.0.0/24"}]), "--route"),
            ("ipam_options", json!({"driver": "dhcp"}), "--ipam-driver"),
        ] {
            let error = request(json!({"name": "web", key: value})).unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
    }

    #[test]
    fn ranges_are_those_of_a_prefix() {
        let range = |subnet: &str, start: &str, end: &str| {
            let subnet: Subnet = serde_json::from_value(json!({
                "subnet": subnet,
                "lease_range": {"start_ip": start, "end_ip": end},
            }))
            .unwrap();
            subnet.range().unwrap().map(|net| net.to_string()).ok()
        };
        let prefix = |net: &str| Some(net.to_owned());
        assert_eq!(range("10.0.0.0/24", "10.0.0.1", "10.0.0.255"), prefix("10.0.0.0/24"));
        assert_eq!(range("10.0.0.0/24", "10.0.0.129", "10.0.0.254"), prefix("10.0.0.128/25"));
        assert_eq!(range("10.0.0.0/24", "10.0.0.64", "10.0.0.127"), prefix("10.0.0.64/26"));
        assert_eq!(range("fd00::/64", "fd00::1", "fd00::ff"), prefix("fd00::/120"));
        assert_eq!(range("10.0.0.0/24", "10.0.0.10", "10.0.0.20"), None);
    }

    #[test]
    fn port_mappings_become_arguments() {
        let mappings: Vec<PortMapping> = serde_json::from_value(json!([
            {"container_port": 80, "host_ip": "", "host_port": 8080, "protocol": "tcp", "range": 1},
            {"container_port": 53, "host_ip": "::1", "host_port": 53, "protocol": "tcp,udp"},
            {"container_port": 7000, "host_port": 9000, "protocol": "", "range": 3},
            {"container_port": 80, "host_port": 0, "protocol": "tcp", "range": 1},
        ]))
        .unwrap();
        let expected = [
            "8080:80/tcp",
            "[::1]:53:53/tcp",
            "[::1]:53:53/udp",
            "9000-9002:7000-7002/tcp",
            ":80/tcp",
        ];
        assert_eq!(ports(&mappings).unwrap(), expected);
        let beyond: Vec<PortMapping> =
            serde_json::from_value(json!([{"container_port": 80, "host_port": 65535, "range": 2}]))
                .unwrap();
        assert!(ports(&beyond).is_err());
    }

    #[test]
    fn an_endpoint_keeps_its_name_when_the_container_is_renamed() {
        let attachment: Attachment = serde_json::from_value(json!({
            "container_id": "752947ff91f961eb3cb47ffe9315016979f3ffbec09e4d96a4fae3fb03391697",
            "container_name": "web1",
            "network": {"name": "web"},
            "network_options": {"interface_name": "eth0"},
        }))
        .unwrap();
        assert_eq!(attachment.endpoint_name(), "752947ff91f9");
    }
}
