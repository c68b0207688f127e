//! What requests and answers look like in JSON, and how they become the model's terms.
//!
//! Requests refuse fields that they do not know; addresses and ports travel as text, so that a
//! refusal can say what is wrong with them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
    net::IpAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use self::observed::network_name;
use crate::{
    family::{Family, V4, V6},
    model::{
        self, ConnectSpec, EndpointId, Model, NetnsIdentity, NetworkSpec, PublishSpec, Refusal,
        RefusalKind,
    },
    netlink::namespace::Survey,
};

mod observed;

pub use self::observed::{Counter, Feature, Flow, FlowTable, Lanes, Status, Uplink};

/// Where names of network namespaces live (ip-netns(8)).
const NAMED_NAMESPACES: &str = "/run/netns";

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
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
    /// Whether it has an IPv4 side; `null` = yes.
    #[serde(default)]
    pub enable_ipv4: Option<bool>,
    /// Whether it has an IPv6 side; `null` = if there is an IPv6 subnet.
    #[serde(default)]
    pub enable_ipv6: Option<bool>,
    /// CIDRs that addresses are chosen from, one per family at most; a single one may go without
    /// the list, as `ip_range`.
    #[serde(default, alias = "ip_range", deserialize_with = "one_or_more")]
    pub ip_ranges: Vec<String>,
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
    /// Host addresses of published ports that name none, one per family at most; also
    /// `host_binding`.
    #[serde(default, alias = "host_binding", deserialize_with = "one_or_more")]
    pub host_bindings: Vec<String>,
    /// Source addresses towards the world, one per family at most; also `snat_ip`.
    #[serde(default, alias = "snat_ip", deserialize_with = "one_or_more")]
    pub snat_ips: Vec<String>,
    /// Docker's bridge options, `netdp.endpoint_flows` and `netdp.nat`.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
}

/// A text, a list of them, or `null`.
fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string or a list of strings")]
    enum Texts {
        None(()),
        One(String),
        More(Vec<String>),
    }
    Ok(match Texts::deserialize(deserializer)? {
        Texts::None(()) => Vec::new(),
        Texts::One(text) => vec![text],
        Texts::More(texts) => texts,
    })
}

impl CreateNetwork {
    /// In the model's terms, `global_id` being random.
    ///
    /// # Errors
    /// Refuses what does not read.
    pub fn into_spec(self, global_id: [u8; 5]) -> Result<NetworkSpec, Refusal> {
        let mut spec = NetworkSpec {
            name: self.name,
            engine_id: None,
            enable_ipv4: self.enable_ipv4,
            enable_ipv6: self.enable_ipv6,
            subnets: cidrs("subnet", &self.subnets)?,
            gateways: addresses("gateway", &self.gateways)?,
            ip_ranges: cidrs("IP range", &self.ip_ranges)?,
            bridge: None,
            gateway_mode: self.gateway_mode.as_deref().map(str::parse).transpose()?,
            internal: self.internal,
            icc: self.icc,
            masquerade: self.masquerade,
            mtu: self.mtu,
            // These come as options.
            endpoint_flows: None,
            nat: None,
            // Engines have them.
            reserved: BTreeSet::new(),
            host_bindings: addresses("host binding", &self.host_bindings)?,
            snat_ips: addresses("SNAT address", &self.snat_ips)?,
            global_id,
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
    /// How the container engine that made it calls it; `null` where the user did.
    pub engine_id: Option<String>,
    /// Name of the Linux bridge.
    pub bridge: String,
    /// CIDRs.
    pub subnets: Vec<String>,
    /// The bridge's addresses.
    pub gateways: Vec<String>,
    /// CIDRs that addresses are chosen from, where they are not the subnets.
    pub ip_ranges: Vec<String>,
    /// The first of them.
    pub ip_range: Option<String>,
    /// No way in or out.
    pub internal: bool,
    /// Members may talk to each other.
    pub icc: bool,
    /// Source NAT on the way out.
    pub masquerade: bool,
    /// "endpoint-dependent", "endpoint-independent-mapping", "endpoint-independent".
    pub nat: String,
    /// "nat", "nat-unprotected", "routed", "isolated".
    pub gateway_mode: String,
    /// In bytes.
    pub mtu: u32,
    /// Most flows that one endpoint may have opened, in both families together; 0 = no limit.
    pub endpoint_flows: u32,
    /// Addresses that are chosen for no endpoint.
    pub reserved: Vec<String>,
    /// Host addresses of published ports that name none.
    pub host_bindings: Vec<String>,
    /// The first of them.
    pub host_binding: String,
    /// Source addresses towards the world, where they are not the uplink's own.
    pub snat_ips: Vec<String>,
    /// The first of them.
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
    /// How the container engine that made it calls it; `null` where the user did.
    pub engine_id: Option<String>,
    /// Path of the container's namespace; empty while an engine has given it to none.
    pub netns: String,
    /// Interface inside the container; empty where an engine names it.
    pub interface: String,
    /// Interface of the host.
    pub host_interface: String,
    /// Addresses with the subnet's prefix length.
    pub addresses: Vec<String>,
    /// Gateways of the container's default routes, those that lead by this endpoint.
    pub gateways: Vec<String>,
    /// MAC address.
    pub mac: String,
    /// Published ports.
    pub published: Vec<Published>,
}

/// A published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// "tcp", "udp", "sctp".
    pub protocol: String,
    /// 0.0.0.0 and :: = every local address of that family.
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
        let (ipv4, ipv6) = (&network.ipv4, &network.ipv6);
        let ip_ranges = texts(ipv4.and_then(own_range), ipv6.and_then(own_range));
        let host_bindings: Vec<String> =
            network.host_bindings().map(|address| address.to_string()).collect();
        let snat_ips =
            texts(ipv4.and_then(|side| side.snat_ip), ipv6.and_then(|side| side.snat_ip));
        Self {
            name: network.name.clone(),
            id: network.id.0,
            engine_id: network.engine_id.clone(),
            bridge: network.bridge.clone(),
            subnets: network.subnets().map(|net| net.to_string()).collect(),
            gateways: texts(ipv4.map(|side| side.gateway), ipv6.map(|side| side.gateway)),
            ip_range: ip_ranges.first().cloned(),
            ip_ranges,
            internal: network.internal,
            icc: network.icc,
            masquerade: network.masquerade,
            nat: network.nat.to_string(),
            gateway_mode: network.gateway_mode.to_string(),
            mtu: network.mtu,
            endpoint_flows: network.endpoint_flows,
            reserved: network.reserved.iter().map(ToString::to_string).collect(),
            host_binding: host_bindings.first().cloned().unwrap_or_default(),
            host_bindings,
            snat_ip: snat_ips.first().cloned(),
            snat_ips,
        }
    }
}

/// The range that addresses are chosen from, if it is not the whole subnet.
fn own_range<F: Family>(side: model::Subnet<F>) -> Option<F::Net> {
    (side.range != side.subnet).then_some(side.range)
}

/// What there is of both families, IPv4 first.
fn texts(ipv4: Option<impl Display>, ipv6: Option<impl Display>) -> Vec<String> {
    let ipv4 = ipv4.map(|value| value.to_string());
    ipv4.into_iter().chain(ipv6.map(|value| value.to_string())).collect()
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
        let gateways = model.gateway_endpoints();
        Self {
            settings: network.into(),
            endpoints: model
                .endpoints_of(network.id)
                .map(|endpoint| Endpoint::of(network, endpoint, &gateways))
                .collect(),
            policy: network.policy.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Endpoint {
    /// An endpoint of `network`, `gateways` being those of [`Model::gateway_endpoints`].
    pub fn of(
        network: &model::Network,
        endpoint: &model::Endpoint,
        gateways: &HashMap<(NetnsIdentity, bool), EndpointId>,
    ) -> Self {
        let ipv4 = endpoint.ipv4.zip(network.ipv4);
        let ipv6 = endpoint.ipv6.zip(network.ipv6);
        let leads_out = |is_ipv4| {
            let netns = endpoint.netns_identity();
            netns.is_some_and(|netns| gateways.get(&(netns, is_ipv4)) == Some(&endpoint.id))
        };
        let (engine_id, netns, interface) = match &endpoint.place {
            model::Place::Netns(netns) => (None, Some(&netns.path), endpoint.interface.clone()),
            model::Place::Engine(engaged) => {
                (Some(engaged.id.clone()), engaged.sandbox.as_ref(), String::new())
            }
        };
        Self {
            name: endpoint.name.clone(),
            network: network.name.clone(),
            engine_id,
            netns: netns.map(|path| path.display().to_string()).unwrap_or_default(),
            interface,
            host_interface: endpoint.host_interface.clone(),
            addresses: texts(
                ipv4.map(|(address, side)| V4::with_prefix_of(address, side.subnet)),
                ipv6.map(|(address, side)| V6::with_prefix_of(address, side.subnet)),
            ),
            gateways: texts(
                ipv4.filter(|_| leads_out(true)).map(|(_, side)| side.gateway),
                ipv6.filter(|_| leads_out(false)).map(|(_, side)| side.gateway),
            ),
            mac: endpoint.mac.to_string(),
            published: endpoint.ports().map(Published::from).collect(),
        }
    }
}

impl From<model::PublishedPort> for Published {
    fn from(port: model::PublishedPort) -> Self {
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
    pub fn of(policy: &[model::PolicyRule]) -> Vec<Self> {
        (1..).zip(policy).map(|(number, rule)| Self { number, rule: rule.to_string() }).collect()
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

/// Reads `-p` arguments.
///
/// # Errors
/// Refuses the first that does not read.
pub fn ports(texts: &[String]) -> Result<Vec<PublishSpec>, Refusal> {
    texts.iter().map(|text| text.parse()).collect()
}

fn cidrs(noun: &str, texts: &[String]) -> Result<Vec<IpNet>, Refusal> {
    let cidr = |text: &String| {
        text.parse().map_err(|_| {
            Refusal::invalid(format!(
                "{noun} {text:?} is no CIDR: write one like 172.20.0.0/24 or fd00:20::/64"
            ))
        })
    };
    texts.iter().map(cidr).collect()
}

fn address(noun: &str, text: &str) -> Result<IpAddr, Refusal> {
    IpAddr::from_str(text).map_err(|_| {
        Refusal::invalid(format!(
            "{noun} {text:?} is no IP address: write one like 172.20.0.1 or fd00:20::1"
        ))
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
        request.into_spec([0; 5]).unwrap_err().message
    }

    #[test]
    fn a_request_becomes_a_spec() {
        let request: CreateNetwork = serde_json::from_value(json!({
            "name": "a",
            "subnets": ["172.20.0.0/24"],
            "gateways": ["172.20.0.254"],
            "snat_ip": "10.0.0.4",
            "options": {
                "com.docker.network.bridge.enable_icc": "false",
                "netdp.endpoint_flows": "1000",
                "netdp.nat": "endpoint-independent",
            },
        }))
        .unwrap();
        let expected = NetworkSpec {
            gateways: vec!["172.20.0.254".parse().unwrap()],
            snat_ips: vec!["10.0.0.4".parse().unwrap()],
            icc: Some(false),
            endpoint_flows: Some(1000),
            nat: Some(model::NatBehaviour::EndpointIndependent),
            global_id: [1, 2, 3, 4, 5],
            ..fixture::network_spec("a", "172.20.0.0/24")
        };
        assert_eq!(request.into_spec([1, 2, 3, 4, 5]).unwrap(), expected);
    }

    #[test]
    fn what_does_not_read_is_refused_by_name() {
        assert_eq!(
            refused(json!({"name": "a", "subnets": ["172.20.0.0/40"]})),
            "subnet \"172.20.0.0/40\" is no CIDR: write one like 172.20.0.0/24 or fd00:20::/64"
        );
        assert_eq!(
            refused(json!({"name": "a", "gateways": ["one"]})),
            "gateway \"one\" is no IP address: write one like 172.20.0.1 or fd00:20::1"
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
    fn one_value_goes_without_a_list() {
        let request: CreateNetwork = serde_json::from_value(json!({
            "name": "a",
            "enable_ipv6": true,
            "ip_range": "172.20.0.0/25",
            "host_bindings": ["127.0.0.1", "::1"],
            "snat_ip": null,
        }))
        .unwrap();
        let expected = NetworkSpec {
            name: "a".into(),
            enable_ipv6: Some(true),
            ip_ranges: vec!["172.20.0.0/25".parse().unwrap()],
            host_bindings: vec!["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()],
            ..NetworkSpec::default()
        };
        assert_eq!(request.into_spec([0; 5]).unwrap(), expected);
        let error = serde_json::from_value::<CreateNetwork>(json!({"name": "a", "snat_ip": 7}));
        assert!(error.unwrap_err().to_string().contains("a string or a list of strings"));
    }

    #[test]
    fn both_families_of_a_network_are_shown() {
        let mut model = Model::default();
        let mut spec = fixture::network_spec("a", "172.20.0.0/24");
        spec.subnets.push("fd00:20::/64".parse().unwrap());
        spec.ip_ranges = vec!["fd00:20::100/120".parse().unwrap()];
        spec.snat_ips = vec!["fd00::2".parse().unwrap()];
        model.create_network(spec, &fixture::host()).unwrap();
        let mut spec = fixture::connect_spec("a", "A1");
        spec.publish = ports(&["8080:80".to_owned()]).unwrap();
        model.connect(spec, &fixture::host()).unwrap();

        let network = model.network("a").unwrap();
        let shown = serde_json::to_value(NetworkDetail::of(&model, network)).unwrap();
        assert_eq!(shown["subnets"], json!(["172.20.0.0/24", "fd00:20::/64"]));
        assert_eq!(shown["gateways"], json!(["172.20.0.1", "fd00:20::1"]));
        assert_eq!(shown["ip_ranges"], json!(["fd00:20::100/120"]));
        assert_eq!(shown["host_bindings"], json!(["0.0.0.0", "::"]));
        assert_eq!(shown["snat_ip"], json!("fd00::2"));
        let endpoint = &shown["endpoints"][0];
        assert_eq!(endpoint["addresses"], json!(["172.20.0.2/24", "fd00:20::100/64"]));
        let host_ips: Vec<_> =
            endpoint["published"].as_array().unwrap().iter().map(|port| &port["host_ip"]).collect();
        assert_eq!(host_ips, ["0.0.0.0", "::"]);
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
            "engine_id": null,
            "bridge": "nd-1",
            "subnets": ["172.20.0.0/24"],
            "gateways": ["172.20.0.1"],
            "ip_range": null,
            "ip_ranges": [],
            "internal": false,
            "icc": true,
            "masquerade": true,
            "nat": "endpoint-dependent",
            "gateway_mode": "nat",
            "mtu": 1500,
            "endpoint_flows": 0,
            "reserved": [],
            "host_binding": "0.0.0.0",
            "host_bindings": ["0.0.0.0"],
            "snat_ip": null,
            "snat_ips": [],
            "endpoints": 1,
        });
        assert_eq!(serde_json::to_value(Network::of(&model, network)).unwrap(), expected);

        expected["endpoints"] = json!([{
            "name": "A1",
            "network": "a",
            "engine_id": null,
            "netns": "/run/netns/A1",
            "interface": "eth0",
            "host_interface": "ndv1",
            "addresses": ["172.20.0.2/24"],
            "gateways": ["172.20.0.1"],
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
