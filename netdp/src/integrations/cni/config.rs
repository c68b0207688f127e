//! What a runtime says on standard input: a network's configuration, and what one attachment wants.
//!
//! Keys that the spec does not know are those of the agent's request to create a network, so that a
//! configuration can say what `netdp network create` can, and a misspelt key is refused.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::error::{Code, Error};
use crate::{api::wire, integrations::port_argument};

/// The versions of the spec that this plugin speaks, old to new.
pub(super) const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The newest of them.
pub(super) const NEWEST: &str = VERSIONS[VERSIONS.len() - 1];

/// Keys that are the runtime's business.
const OF_THE_RUNTIME: [&str; 6] =
    ["type", "capabilities", "cniVersions", "disableCheck", "disableGC", "loadOnlyInlinedPlugins"];

/// A plugin's configuration, read as far as every command needs it: who deletes must not stumble over
/// what only matters to who adds.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Config {
    #[serde(default)]
    pub(super) cni_version: String,
    /// The network's name.
    #[serde(default)]
    pub(super) name: String,
    /// Where the agent listens.
    pub(super) socket: Option<PathBuf>,
    /// What the plugins before this one came to.
    #[serde(default)]
    pub(super) prev_result: Value,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    pub(super) valid_attachments: Option<Vec<ValidAttachment>>,
    #[serde(default)]
    runtime_config: Value,
    #[serde(default)]
    args: Value,
    #[serde(default)]
    dns: Option<Dns>,
    ip_masq: Option<bool>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// An attachment that is to stay.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub(super) container: String,
    #[serde(rename = "ifname")]
    pub(super) interface: String,
}

/// Name servers and how to ask them; passed on as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Dns {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    domain: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    options: Vec<String>,
}

/// What one attachment wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wishes {
    pub(super) addresses: Vec<String>,
    pub(super) mac: Option<String>,
    pub(super) ports: Vec<PortMapping>,
    /// For the result.
    pub(super) dns: Dns,
}

/// What runtimes give to plugins whose configuration asks for it (CONVENTIONS.md of CNI).
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    port_mappings: Option<Vec<PortMapping>>,
    ips: Option<Vec<String>>,
    mac: Option<String>,
    dns: Option<RuntimeDns>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// A port to be published.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PortMapping {
    host_port: u16,
    container_port: u16,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostIP")]
    host_ip: String,
}

/// As [`Dns`], under the names that it has here.
#[derive(Deserialize)]
struct RuntimeDns {
    servers: Option<Vec<String>>,
    searches: Option<Vec<String>>,
    options: Option<Vec<String>>,
}

/// `args` of a configuration, of which `cni` is the part that plugins share.
#[derive(Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: CniArgs,
}

#[derive(Default, Deserialize)]
struct CniArgs {
    ips: Option<Vec<String>>,
    mac: Option<String>,
}

impl Config {
    /// Reads a configuration.
    ///
    /// # Errors
    /// Refuses what is no JSON of the right shape.
    pub(super) fn read(text: &[u8]) -> Result<Self, Error> {
        serde_json::from_slice(text)
            .map_err(|error| Error::new(Code::Undecodable, format!("read standard input: {error}")))
    }

    /// The version of the protocol that is spoken.
    ///
    /// # Errors
    /// Refuses one that this plugin does not speak, and one that is older than `since`.
    pub(super) fn version(&self, since: &str) -> Result<&'static str, Error> {
        let said = &self.cni_version;
        let known = VERSIONS.iter().position(|version| version == said);
        let first = VERSIONS.iter().position(|&version| version == since).unwrap_or_default();
        match known {
            Some(known) if known >= first => Ok(VERSIONS[known]),
            _ => Err(Error::new(
                Code::IncompatibleVersion,
                format!("cniVersion is {said:?}: give one of {}", VERSIONS[first..].join(", ")),
            )),
        }
    }

    /// The network that the configuration describes.
    ///
    /// # Errors
    /// Refuses a key that is unknown here, and `ipam`: addresses are the agent's.
    pub(super) fn network(&self) -> Result<wire::CreateNetwork, Error> {
        let mut request = self.rest.clone();
        request.retain(|key, _| {
            !OF_THE_RUNTIME.contains(&key.as_str()) && !key.starts_with("cni.dev/")
        });
        if let Some(ipam) = request.remove("ipam").filter(|ipam| !is_nothing(ipam)) {
            return Err(unsupported("ipam", &ipam, "netdp gives addresses itself: see `subnets`"));
        }
        request.insert("name".into(), self.name.clone().into());
        if let Some(masquerade) = self.ip_masq {
            let said = request.insert("masquerade".into(), masquerade.into());
            if said.is_some_and(|said| said != Value::Bool(masquerade)) {
                let details = "ipMasq and masquerade contradict each other: leave one out";
                return Err(Error::new(Code::InvalidConfig, details));
            }
        }
        if let Some(key) = unknown_key(&request) {
            return Err(unsupported(key, &request[key], "netdp does not know it"));
        }
        decode("the network", request.into())
    }

    /// What the attachment wants, `arguments` being those of `CNI_ARGS`. The runtime's own words come
    /// before `args`, and those before `CNI_ARGS`.
    ///
    /// # Errors
    /// Refuses what can't be read, and capabilities that netdp does not have.
    pub(super) fn wishes(&self, arguments: &BTreeMap<String, String>) -> Result<Wishes, Error> {
        let runtime: RuntimeConfig =
            decode_optional("runtimeConfig", &self.runtime_config)?.unwrap_or_default();
        if let Some((key, value)) = runtime.rest.iter().find(|(_, value)| !is_nothing(value)) {
            let advice = "netdp does not do it: leave it out of `capabilities`";
            return Err(unsupported(&format!("runtimeConfig.{key}"), value, advice));
        }
        let Args { cni } = decode_optional("args", &self.args)?.unwrap_or_default();
        let argument = |key: &str| arguments.get(key).filter(|value| !value.is_empty()).cloned();
        let ips = runtime.ips.or(cni.ips).or_else(|| Some(vec![argument("IP")?]));
        let ports = runtime.port_mappings.unwrap_or_default();
        if let Some(port) =
            ports.iter().find(|port| port.host_port == 0 || port.container_port == 0)
        {
            let details = format!("portMappings: {}: 0 is no port", port.argument());
            return Err(Error::new(Code::InvalidConfig, details));
        }
        let dns = match runtime.dns {
            None => self.dns.clone().unwrap_or_default(),
            Some(RuntimeDns { servers, searches, options }) => Dns {
                nameservers: servers.unwrap_or_default(),
                domain: String::new(),
                search: searches.unwrap_or_default(),
                options: options.unwrap_or_default(),
            },
        };
        Ok(Wishes {
            addresses: ips.unwrap_or_default().iter().map(|ip| without_prefix(ip)).collect(),
            mac: runtime.mac.or(cni.mac).or_else(|| argument("MAC")).filter(|mac| !mac.is_empty()),
            ports,
            dns,
        })
    }
}

impl PortMapping {
    /// As `-p` takes it.
    pub(super) fn argument(&self) -> String {
        let (host, container) = (self.host_port.to_string(), self.container_port.to_string());
        port_argument(&self.host_ip, &host, &container, &self.protocol())
    }

    /// Whether a published port came of it.
    pub(super) fn is(&self, published: &wire::Published) -> bool {
        let address = |text: &str| text.parse::<IpAddr>().ok();
        published.protocol == self.protocol()
            && published.host_port == self.host_port
            && published.container_port == self.container_port
            && (self.host_ip.is_empty() || address(&published.host_ip) == address(&self.host_ip))
    }

    fn protocol(&self) -> String {
        if self.protocol.is_empty() { "tcp".to_owned() } else { self.protocol.to_lowercase() }
    }
}

impl Dns {
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The first key that is none of the request to create a network; whether its value is right is another
/// question.
fn unknown_key(request: &Map<String, Value>) -> Option<&String> {
    request.iter().find_map(|(key, value)| {
        let mut alone = Map::from_iter([("name".to_owned(), Value::from(""))]);
        alone.insert(key.clone(), value.clone());
        let error = serde_json::from_value::<wire::CreateNetwork>(alone.into()).err()?;
        error.to_string().starts_with("unknown field").then_some(key)
    })
}

/// The prefix's length follows from the network.
fn without_prefix(ip: &str) -> String {
    ip.split_once('/').map_or(ip, |(address, _)| address).to_owned()
}

/// Whether a value asks for nothing: runtimes write what was not said as well.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.values().all(is_nothing),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// The spec wants key and value named.
fn unsupported(key: &str, value: &Value, advice: &str) -> Error {
    Error::new(Code::UnsupportedField, format!("{key}={value}: {advice}"))
}

fn decode<T: DeserializeOwned>(what: &str, value: Value) -> Result<T, Error> {
    serde_json::from_value(value)
        .map_err(|error| Error::new(Code::InvalidConfig, format!("{what}: {error}")))
}

fn decode_optional<T: DeserializeOwned>(what: &str, value: &Value) -> Result<Option<T>, Error> {
    if value.is_null() { Ok(None) } else { decode(what, value.clone()).map(Some) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(value: Value) -> Config {
        Config::read(value.to_string().as_bytes()).unwrap()
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(result: Result<T, Error>, code: Code, details: &str) {
        let error = result.unwrap_err();
        assert_eq!((error.code, error.details.as_str()), (code, details));
    }

    #[test]
    fn a_configuration_says_what_network_create_can() {
        let request = config(json!({
            "cniVersion": "1.1.0",
            "cniVersions": ["1.0.0", "1.1.0"],
            "name": "web",
            "type": "netdp-cni",
            "capabilities": {"portMappings": true},
            "cni.dev/attachments": [],
            "ipam": {},
            "ipMasq": false,
            "subnets": ["172.20.0.0/24"],
            "options": {"netdp.endpoint_flows": "1000"},
        }))
        .network()
        .unwrap();
        let expected = wire::CreateNetwork {
            name: "web".into(),
            subnets: vec!["172.20.0.0/24".into()],
            masquerade: Some(false),
            options: [("netdp.endpoint_flows".into(), "1000".into())].into(),
            ..wire::CreateNetwork::default()
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn what_a_network_can_not_be_is_refused() {
        let network = |value| config(value).network();
        refused(
            network(json!({"name": "web", "subnet": "172.20.0.0/24", "mtu": 1400})),
            Code::UnsupportedField,
            "subnet=\"172.20.0.0/24\": netdp does not know it",
        );
        refused(
            network(json!({"name": "web", "ipam": {"type": "host-local"}})),
            Code::UnsupportedField,
            "ipam={\"type\":\"host-local\"}: netdp gives addresses itself: see `subnets`",
        );
        refused(
            network(json!({"name": "web", "ipMasq": true, "masquerade": false})),
            Code::InvalidConfig,
            "ipMasq and masquerade contradict each other: leave one out",
        );
        refused(
            network(json!({"name": "web", "mtu": "large"})),
            Code::InvalidConfig,
            "the network: invalid type: string \"large\", expected u32",
        );
    }

    #[test]
    fn wishes_come_from_the_runtime_first() {
        let arguments: BTreeMap<String, String> =
            [("IP".into(), "172.20.0.7/24".into()), ("MAC".into(), "02:00:00:00:00:07".into())]
                .into();
        let mut value = json!({"name": "web"});
        let wishes = |value: &Value| config(value.clone()).wishes(&arguments).unwrap();
        let of_variables = wishes(&value);
        assert_eq!(of_variables.addresses, ["172.20.0.7"]);
        assert_eq!(of_variables.mac.as_deref(), Some("02:00:00:00:00:07"));

        value["args"] = json!({"cni": {"ips": ["172.20.0.8"], "mac": "02:00:00:00:00:08"}, "x": 1});
        let of_args = wishes(&value);
        assert_eq!(of_args.addresses, ["172.20.0.8"]);
        assert_eq!(of_args.mac.as_deref(), Some("02:00:00:00:00:08"));

        value["runtimeConfig"] = json!({
            "ips": ["172.20.0.9/24", "fd00:20::9"],
            "mac": "02:00:00:00:00:09",
            "portMappings": [
                {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
                {"hostPort": 53, "containerPort": 53, "protocol": "UDP", "hostIP": "10.0.0.2"},
                {"hostPort": 81, "containerPort": 80, "hostIP": "::1"},
            ],
            "dns": {"servers": ["192.0.2.53"], "searches": ["example.org"]},
            "bandwidth": null,
            "ipRanges": [],
        });
        let of_runtime = wishes(&value);
        assert_eq!(of_runtime.addresses, ["172.20.0.9", "fd00:20::9"]);
        assert_eq!(of_runtime.mac.as_deref(), Some("02:00:00:00:00:09"));
        let ports = ["8080:80/tcp", "10.0.0.2:53:53/udp", "[::1]:81:80/tcp"];
        let arguments: Vec<String> = of_runtime.ports.iter().map(PortMapping::argument).collect();
        assert_eq!(arguments, ports);
        let dns = json!({"nameservers": ["192.0.2.53"], "search": ["example.org"]});
        assert_eq!(serde_json::to_value(of_runtime.dns).unwrap(), dns);
    }

    #[test]
    fn wishes_that_netdp_does_not_fulfil_are_refused() {
        let wishes = |value: Value| {
            config(json!({"name": "web", "runtimeConfig": value})).wishes(&BTreeMap::new())
        };
        refused(
            wishes(json!({"bandwidth": {"ingressRate": 2048}})),
            Code::UnsupportedField,
            "runtimeConfig.bandwidth={\"ingressRate\":2048}: netdp does not do it: leave it out of \
             `capabilities`",
        );
        refused(
            wishes(json!({"portMappings": [{"hostPort": 0, "containerPort": 80}]})),
            Code::InvalidConfig,
            "portMappings: 0:80/tcp: 0 is no port",
        );
        let error = wishes(json!({"portMappings": [{"hostPort": 70000, "containerPort": 80}]}));
        assert_eq!(error.unwrap_err().code, Code::InvalidConfig);
    }

    #[test]
    fn versions_are_those_of_the_command() {
        let version = |said: &str, since| config(json!({"cniVersion": said})).version(since);
        assert_eq!(version("0.3.1", "0.3.1"), Ok("0.3.1"));
        assert_eq!(version("1.1.0", "0.4.0"), Ok("1.1.0"));
        refused(
            version("1.0.0", "1.1.0"),
            Code::IncompatibleVersion,
            "cniVersion is \"1.0.0\": give one of 1.1.0",
        );
        for unknown in ["", "0.2.0", "2.0.0"] {
            assert_eq!(version(unknown, "0.3.1").unwrap_err().code, Code::IncompatibleVersion);
        }
    }
}
