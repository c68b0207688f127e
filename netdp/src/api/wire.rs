//! What requests and answers look like in JSON, and how they become the model's terms.
//!
//! Requests refuse fields that they do not know; addresses and ports travel as text, so that a
//! refusal can say what is wrong with them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    str::FromStr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    dataplane::{Count, FlowRecord, Program},
    facts::HostFacts,
    model::{self, ConnectSpec, Model, NetworkSpec, PublishSpec, Refusal, RefusalKind},
    netlink::namespace::Survey,
};

/// Where names of network namespaces live (ip-netns(8)).
const NAMED_NAMESPACES: &str = "/run/netns";

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// One line: what, and what to do.
    pub error: String,
    /// See [`ErrorKind`].
    pub kind: ErrorKind,
}

/// What sort of failure it is; decides the status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// 400: the request makes no sense.
    Invalid,
    /// 404: it names something that is not there.
    NotFound,
    /// 409: it contradicts what is there.
    Conflict,
    /// 500: the host did not let it happen; nothing was changed.
    Failed,
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let kind = match refusal.kind {
            RefusalKind::Invalid => ErrorKind::Invalid,
            RefusalKind::Conflict => ErrorKind::Conflict,
            RefusalKind::NotFound => ErrorKind::NotFound,
        };
        Self { error: refusal.message, kind }
    }
}

/// `POST /v1/networks`: a network to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateNetwork {
    /// Its name.
    pub name: String,
    /// CIDRs.
    #[serde(default)]
    pub subnets: Vec<String>,
    /// The bridge's addresses.
    #[serde(default)]
    pub gateways: Vec<String>,
    /// CIDR that addresses are chosen from.
    #[serde(default)]
    pub ip_range: Option<String>,
    /// No way in or out.
    #[serde(default)]
    pub internal: bool,
    /// Whether members may talk to each other.
    #[serde(default)]
    pub icc: Option<bool>,
    /// In bytes.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Source NAT on the way out.
    #[serde(default)]
    pub masquerade: Option<bool>,
    /// "nat", "nat-unprotected", "routed", "isolated".
    #[serde(default)]
    pub gateway_mode: Option<String>,
    /// Host address of published ports that name none.
    #[serde(default)]
    pub host_binding: Option<String>,
    /// Source address towards the world.
    #[serde(default)]
    pub snat_ip: Option<String>,
    /// Docker's bridge options.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
}

impl CreateNetwork {
    /// In the model's terms.
    ///
    /// # Errors
    /// Refuses what does not read.
    pub fn into_spec(self) -> Result<NetworkSpec, Refusal> {
        let mut spec = NetworkSpec {
            name: self.name,
            subnets: self
                .subnets
                .iter()
                .map(|text| cidr("subnet", text))
                .collect::<Result<_, _>>()?,
            gateways: addresses("gateway", &self.gateways)?,
            ip_range: self.ip_range.as_deref().map(|text| cidr("IP range", text)).transpose()?,
            bridge: None,
            gateway_mode: self.gateway_mode.as_deref().map(str::parse).transpose()?,
            internal: self.internal,
            icc: self.icc,
            masquerade: self.masquerade,
            mtu: self.mtu,
            host_binding: self
                .host_binding
                .as_deref()
                .map(|text| address("host binding", text))
                .transpose()?,
            snat_ip: self
                .snat_ip
                .as_deref()
                .map(|text| address("SNAT address", text))
                .transpose()?,
        };
        for (key, value) in &self.options {
            spec.apply_option(key, value)?;
        }
        Ok(spec)
    }
}

/// `POST /v1/networks/{network}/endpoints`: a namespace to be attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Connect {
    /// Absolute path of a network namespace, or a name under `/run/netns`.
    pub netns: String,
    /// The endpoint's name.
    #[serde(default)]
    pub name: Option<String>,
    /// Its addresses.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Its MAC address.
    #[serde(default)]
    pub mac: Option<String>,
    /// Name of the interface inside the container.
    #[serde(default)]
    pub interface: Option<String>,
    /// Ports in the form of `-p`.
    #[serde(default)]
    pub publish: Vec<String>,
}

impl Connect {
    /// Path of the namespace.
    ///
    /// # Errors
    /// Refuses a relative path: the agent's directory is nobody's business.
    pub fn netns_path(&self) -> Result<PathBuf, Refusal> {
        let path = Path::new(&self.netns);
        if path.is_absolute() {
            return Ok(path.to_owned());
        }
        if self.netns.is_empty() || self.netns.contains('/') || self.netns.starts_with('.') {
            return Err(Refusal::invalid(format!(
                "{:?} is no namespace: give an absolute path or a name under {NAMED_NAMESPACES}",
                self.netns
            )));
        }
        Ok(Path::new(NAMED_NAMESPACES).join(path))
    }

    /// In the model's terms, `survey` being what was found at `netns`.
    ///
    /// # Errors
    /// Refuses what does not read.
    pub fn into_spec(
        self,
        network: String,
        netns: PathBuf,
        survey: Survey,
    ) -> Result<ConnectSpec, Refusal> {
        Ok(ConnectSpec {
            network,
            netns,
            netns_identity: survey.identity,
            netns_interfaces: survey.interfaces,
            name: self.name,
            addresses: addresses("address", &self.addresses)?,
            mac: self.mac.as_deref().map(str::parse).transpose()?,
            interface: self.interface,
            publish: ports(&self.publish)?,
        })
    }
}

/// `POST /v1/publish` and `/v1/unpublish`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// The endpoint.
    pub name: String,
    /// Its network, where the name alone is not enough.
    #[serde(default)]
    pub network: Option<String>,
    /// Ports in the form of `-p`.
    pub ports: Vec<String>,
}

/// `PUT` (replace) and `POST` (append) `/v1/networks/{network}/policy`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Rules, one per line, with comments.
    pub text: String,
}

/// Query of `GET /v1/flows`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlowsQuery {
    /// Only flows of this network.
    #[serde(default)]
    pub network: Option<String>,
}

/// What a network is set to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: u32,
    /// Name of the Linux bridge.
    pub bridge: String,
    /// CIDRs.
    pub subnets: Vec<String>,
    /// The bridge's addresses.
    pub gateways: Vec<String>,
    /// CIDR that addresses are chosen from; `null` = the subnet.
    pub ip_range: Option<String>,
    /// No way in or out.
    pub internal: bool,
    /// Members may talk to each other.
    pub icc: bool,
    /// Source NAT on the way out.
    pub masquerade: bool,
    /// "nat", "nat-unprotected", "routed", "isolated".
    pub gateway_mode: String,
    /// In bytes.
    pub mtu: u32,
    /// Host address of published ports that name none.
    pub host_binding: String,
    /// Source address towards the world; `null` = the uplink's own.
    pub snat_ip: Option<String>,
}

/// A network in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// See [`Settings`].
    #[serde(flatten)]
    pub settings: Settings,
    /// How many endpoints it has.
    pub endpoints: usize,
}

/// A network with all that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkDetail {
    /// See [`Settings`].
    #[serde(flatten)]
    pub settings: Settings,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Its rules.
    pub policy: Vec<String>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its name.
    pub name: String,
    /// Its network's name.
    pub network: String,
    /// Path of the container's namespace.
    pub netns: String,
    /// Interface inside the container.
    pub interface: String,
    /// Interface of the host.
    pub host_interface: String,
    /// Addresses with the subnet's prefix length.
    pub addresses: Vec<String>,
    /// MAC address.
    pub mac: String,
    /// Published ports.
    pub published: Vec<Published>,
}

/// A published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// "tcp", "udp".
    pub protocol: String,
    /// 0.0.0.0 = every local address.
    pub host_ip: String,
    /// Host port.
    pub host_port: u16,
    /// Port in the container.
    pub container_port: u16,
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumberedRule {
    /// Counted from 1.
    pub number: usize,
    /// As it is written.
    pub rule: String,
}

/// A tracked connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// "tcp", "udp", "icmp", or the number.
    pub protocol: String,
    /// The network's name.
    pub network: String,
    /// `address:port` as the first packet had it; ICMP: the echo identifier for a port.
    pub source: String,
    /// The same for the destination.
    pub destination: String,
    /// Source after translation.
    pub translated_source: String,
    /// Destination after translation.
    pub translated_destination: String,
    /// "established", "half-open" and so on.
    pub state: String,
    /// Since the last packet.
    pub idle_seconds: u64,
    /// Until it is collected if nothing more comes.
    pub expires_seconds: u64,
}

/// `GET /v1/status`: how the agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// netdp's version.
    pub version: String,
    /// "ebpf", "iptables".
    pub dataplane: String,
    /// The agent's process id.
    pub pid: u32,
    /// How many networks there are.
    pub networks: usize,
    /// How many endpoints.
    pub endpoints: usize,
    /// How many published ports.
    pub published: usize,
    /// How many tracked connections.
    pub flows: usize,
    /// Interfaces to the outside.
    pub uplinks: Vec<Uplink>,
    /// What was counted since the maps were made, zero rows left out.
    pub counters: Vec<Counter>,
    /// What could not be repaired so far, one line each.
    pub troubles: Vec<String>,
}

/// An interface to the outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    /// Interface name.
    pub name: String,
    /// Source address for masquerade; `null` while it has none.
    pub address: Option<Ipv4Addr>,
}

/// Packets counted for one reason in one network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// `null` where no network could be told.
    pub network: Option<String>,
    /// The reason's name.
    pub reason: String,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// `POST /v1/purge`: what was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purged {
    /// Names of networks.
    pub networks: Vec<String>,
    /// Endpoints as `network/name`.
    pub endpoints: Vec<String>,
    /// How many published ports.
    pub published: usize,
}

impl From<&model::Network> for Settings {
    fn from(network: &model::Network) -> Self {
        let ipv4 = &network.ipv4;
        Self {
            name: network.name.clone(),
            id: network.id.0,
            bridge: network.bridge.clone(),
            subnets: vec![ipv4.subnet.to_string()],
            gateways: vec![ipv4.gateway.to_string()],
            ip_range: (ipv4.range != ipv4.subnet).then(|| ipv4.range.to_string()),
            internal: network.internal,
            icc: network.icc,
            masquerade: network.masquerade,
            gateway_mode: network.gateway_mode.to_string(),
            mtu: network.mtu,
            host_binding: network.host_binding.to_string(),
            snat_ip: network.snat_ip.map(|address| address.to_string()),
        }
    }
}

impl Network {
    /// A network of the model.
    pub fn of(model: &Model, network: &model::Network) -> Self {
        Self { settings: network.into(), endpoints: model.endpoints_of(network.id).count() }
    }
}

impl NetworkDetail {
    /// A network of the model.
    pub fn of(model: &Model, network: &model::Network) -> Self {
        Self {
            settings: network.into(),
            endpoints: model
                .endpoints_of(network.id)
                .map(|endpoint| Endpoint::of(network, endpoint))
                .collect(),
            policy: network.policy.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Endpoint {
    /// An endpoint of `network`.
    pub fn of(network: &model::Network, endpoint: &model::Endpoint) -> Self {
        let prefix = network.ipv4.subnet.prefix_len();
        Self {
            name: endpoint.name.clone(),
            network: network.name.clone(),
            netns: endpoint.netns.display().to_string(),
            interface: endpoint.interface.clone(),
            host_interface: endpoint.host_interface.clone(),
            addresses: vec![format!("{}/{prefix}", endpoint.address)],
            mac: endpoint.mac.to_string(),
            published: endpoint.published.iter().map(Published::from).collect(),
        }
    }
}

impl From<&model::PublishedPort> for Published {
    fn from(port: &model::PublishedPort) -> Self {
        Self {
            protocol: port.protocol.to_string(),
            host_ip: port.host_address.to_string(),
            host_port: port.host_port,
            container_port: port.container_port,
        }
    }
}

impl NumberedRule {
    /// A policy, numbered.
    pub fn of(policy: &[model::Rule]) -> Vec<Self> {
        (1..).zip(policy).map(|(number, rule)| Self { number, rule: rule.to_string() }).collect()
    }
}

impl Flow {
    /// A flow, its network named by the model.
    pub fn of(model: &Model, flow: &FlowRecord) -> Self {
        let end = |(address, port): (Ipv4Addr, u16)| format!("{address}:{port}");
        Self {
            protocol: match flow.protocol {
                1 => "icmp".to_owned(),
                6 => "tcp".to_owned(),
                17 => "udp".to_owned(),
                number => number.to_string(),
            },
            network: network_name(model, flow.network),
            source: end(flow.source),
            destination: end(flow.destination),
            translated_source: end(flow.translated_source),
            translated_destination: end(flow.translated_destination),
            state: flow.state.to_owned(),
            idle_seconds: flow.idle.as_secs(),
            expires_seconds: flow.expires.as_secs(),
        }
    }
}

impl Uplink {
    /// The uplinks of a program, by interface name.
    pub fn of(program: &Program, facts: &HostFacts) -> Vec<Self> {
        let mut uplinks: Vec<Self> = program
            .uplinks
            .iter()
            .map(|(ifindex, uplink)| Self {
                name: facts
                    .links
                    .get(ifindex)
                    .map_or_else(|| format!("#{ifindex}"), |link| link.name.clone()),
                address: uplink.masquerade,
            })
            .collect();
        uplinks.sort_by(|a, b| a.name.cmp(&b.name));
        uplinks
    }
}

impl Counter {
    /// A counter, its network named by the model.
    pub fn of(model: &Model, count: &Count) -> Self {
        Self {
            network: count.network.map(|id| network_name(model, id)),
            reason: count.reason.name().to_owned(),
            packets: count.packets,
            bytes: count.bytes,
        }
    }
}

impl Purged {
    /// All that is in the model.
    pub fn of(model: &Model) -> Self {
        let name = |endpoint: &model::Endpoint| {
            format!("{}/{}", network_name(model, endpoint.network), endpoint.name)
        };
        Self {
            networks: model.networks.values().map(|network| network.name.clone()).collect(),
            endpoints: model.endpoints.values().map(name).collect(),
            published: model.endpoints.values().map(|endpoint| endpoint.published.len()).sum(),
        }
    }
}

/// A network that is gone may still have counters and the last of its flows: by number then.
fn network_name(model: &Model, id: model::NetworkId) -> String {
    model.networks.get(&id).map_or_else(|| format!("#{}", id.0), |network| network.name.clone())
}

/// Reads `-p` arguments.
///
/// # Errors
/// Refuses the first that does not read.
pub fn ports(texts: &[String]) -> Result<Vec<PublishSpec>, Refusal> {
    texts.iter().map(|text| text.parse()).collect()
}

fn cidr(noun: &str, text: &str) -> Result<IpNet, Refusal> {
    text.parse().map_err(|_| {
        Refusal::invalid(format!("{noun} {text:?} is no CIDR: write one like 172.20.0.0/24"))
    })
}

fn address(noun: &str, text: &str) -> Result<IpAddr, Refusal> {
    IpAddr::from_str(text).map_err(|_| {
        Refusal::invalid(format!("{noun} {text:?} is no IP address: write one like 172.20.0.1"))
    })
}

fn addresses(noun: &str, texts: &[String]) -> Result<Vec<IpAddr>, Refusal> {
    texts.iter().map(|text| address(noun, text)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::tests as fixture;

    #[track_caller]
    fn refused(request: serde_json::Value) -> String {
        let request: CreateNetwork = serde_json::from_value(request).unwrap();
        request.into_spec().unwrap_err().message
    }

    #[test]
    fn a_request_becomes_a_spec() {
        let request: CreateNetwork = serde_json::from_value(json!({
            "name": "a",
            "subnets": ["172.20.0.0/24"],
            "gateways": ["172.20.0.254"],
            "snat_ip": "10.0.0.4",
            "options": {"com.docker.network.bridge.enable_icc": "false"},
        }))
        .unwrap();
        let expected = NetworkSpec {
            gateways: vec!["172.20.0.254".parse().unwrap()],
            snat_ip: Some("10.0.0.4".parse().unwrap()),
            icc: Some(false),
            ..fixture::network_spec("a", "172.20.0.0/24")
        };
        assert_eq!(request.into_spec().unwrap(), expected);
    }

    #[test]
    fn what_does_not_read_is_refused_by_name() {
        assert_eq!(
            refused(json!({"name": "a", "subnets": ["172.20.0.0/40"]})),
            "subnet \"172.20.0.0/40\" is no CIDR: write one like 172.20.0.0/24"
        );
        assert_eq!(
            refused(json!({"name": "a", "gateways": ["one"]})),
            "gateway \"one\" is no IP address: write one like 172.20.0.1"
        );
        assert_eq!(
            refused(json!({"name": "a", "icc": true,
                "options": {"com.docker.network.bridge.enable_icc": "false"}})),
            "option com.docker.network.bridge.enable_icc=false contradicts what was said before: \
             give it once"
        );
    }

    #[test]
    fn unknown_fields_are_refused() {
        let error = serde_json::from_value::<CreateNetwork>(json!({"name": "a", "subnet": "x"}));
        assert!(error.unwrap_err().to_string().contains("unknown field `subnet`"));
    }

    #[test]
    fn a_namespace_is_a_path_or_a_name() {
        let path = |netns: &str| Connect { netns: netns.into(), ..Connect::default() }.netns_path();
        assert_eq!(path("web").unwrap(), Path::new("/run/netns/web"));
        assert_eq!(path("/proc/1/ns/net").unwrap(), Path::new("/proc/1/ns/net"));
        for bad in ["", "./web", "../web", "a/b", ".."] {
            assert!(path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_network_reads_as_documented() {
        let mut model = fixture::model_with_network("a");
        let mut spec = fixture::connect_spec("a", "A1");
        spec.publish = ports(&["8080:80".to_owned()]).unwrap();
        model.connect(spec, &fixture::host()).unwrap();
        model.set_policy("a", model::policy::parse("deny from any").unwrap()).unwrap();
        let network = model.network("a").unwrap();

        let mut expected = json!({
            "name": "a",
            "id": 1,
            "bridge": "nd-1",
            "subnets": ["172.20.0.0/24"],
            "gateways": ["172.20.0.1"],
            "ip_range": null,
            "internal": false,
            "icc": true,
            "masquerade": true,
            "gateway_mode": "nat",
            "mtu": 1500,
            "host_binding": "0.0.0.0",
            "snat_ip": null,
            "endpoints": 1,
        });
        assert_eq!(serde_json::to_value(Network::of(&model, network)).unwrap(), expected);

        expected["endpoints"] = json!([{
            "name": "A1",
            "network": "a",
            "netns": "/run/netns/A1",
            "interface": "eth0",
            "host_interface": "ndv1",
            "addresses": ["172.20.0.2/24"],
            "mac": "02:42:ac:14:00:02",
            "published": [
                {"protocol": "tcp", "host_ip": "0.0.0.0", "host_port": 8080, "container_port": 80}
            ],
        }]);
        expected["policy"] = json!(["deny from any"]);
        let detail = NetworkDetail::of(&model, network);
        assert_eq!(serde_json::to_value(&detail).unwrap(), expected);
        assert_eq!(serde_json::from_value::<NetworkDetail>(expected).unwrap(), detail);
    }
}
