//! What Docker's calls and their answers look like in JSON, and how they become the model's terms.
//!
//! Fields that are not known are left alone: later versions of Docker say more.

use std::{collections::BTreeMap, net::IpAddr, ops::RangeInclusive};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::model::{self, Model, NetworkSpec, OfferSpec, PublishSpec, Refusal, engine::short_id};

/// Key of what `--opt` said, among the options of a network.
const GENERIC: &str = "com.docker.network.generic";
/// Key of `--ipv4`.
const ENABLE_IPV4: &str = "com.docker.network.enable_ipv4";
/// Key of `--ipv6`.
const ENABLE_IPV6: &str = "com.docker.network.enable_ipv6";
/// Key of `--internal`.
const INTERNAL: &str = "com.docker.network.internal";
/// Key of a container's published ports.
const PORT_MAP: &str = "com.docker.network.portmap";
/// Option by which the user names a network or an endpoint for netdp, since Docker does not.
const NAME: &str = "netdp.name";

/// What interfaces inside containers are called, followed by a number.
const INTERFACE_PREFIX: &str = "eth";

/// `null` where there are none.
fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn map<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    from: D,
) -> Result<BTreeMap<String, T>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// `/NetworkDriver.CreateNetwork`.
#[derive(Debug, Deserialize)]
pub(super) struct CreateNetwork {
    #[serde(rename = "NetworkID")]
    id: String,
    #[serde(rename = "Options", default, deserialize_with = "map")]
    options: BTreeMap<String, Value>,
    #[serde(rename = "IPv4Data", default, deserialize_with = "list")]
    ipv4: Vec<Pool>,
    #[serde(rename = "IPv6Data", default, deserialize_with = "list")]
    ipv6: Vec<Pool>,
}

/// A subnet that Docker has got from its IPAM driver.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Pool {
    #[serde(default)]
    pool: String,
    /// With the subnet's prefix length.
    #[serde(default)]
    gateway: String,
    /// By name; with the subnet's prefix length.
    #[serde(default, deserialize_with = "map")]
    aux_addresses: BTreeMap<String, String>,
}

impl CreateNetwork {
    /// In the model's terms, `global_id` being random.
    pub(super) fn into_spec(self, global_id: [u8; 5]) -> Result<NetworkSpec, Refusal> {
        let mut spec = NetworkSpec {
            name: short_id(&self.id),
            engine_id: Some(self.id),
            global_id,
            ..NetworkSpec::default()
        };
        let flag = |key: &str| self.options.get(key).and_then(Value::as_bool);
        spec.internal = flag(INTERNAL).unwrap_or_default();
        // Docker before 28 knows no network without IPv4, and does not say that there is any.
        spec.enable_ipv4 = flag(ENABLE_IPV4).or(Some(!self.ipv4.is_empty()));
        spec.enable_ipv6 = flag(ENABLE_IPV6);
        let pools = self.ipv4.iter().chain(&self.ipv6);
        for pool in pools.filter(|pool| !pool.pool.is_empty()) {
            spec.subnets.push(parse("subnet", &pool.pool)?);
            if !pool.gateway.is_empty() {
                spec.gateways.push(address("gateway", &pool.gateway)?);
            }
            for text in pool.aux_addresses.values() {
                spec.reserved.insert(address("auxiliary address", text)?);
            }
        }
        let generic = self.options.get(GENERIC).and_then(Value::as_object);
        for (key, value) in generic.into_iter().flatten() {
            let value = text(value);
            if key == NAME {
                spec.name = value;
            } else {
                spec.apply_option(key, &value)?;
            }
        }
        Ok(spec)
    }
}

/// Calls about a network.
#[derive(Debug, Deserialize)]
pub(super) struct Network {
    /// Docker's id of it.
    #[serde(rename = "NetworkID")]
    pub(super) id: String,
}

/// Calls about an endpoint.
#[derive(Debug, Deserialize)]
pub(super) struct Endpoint {
    /// Docker's id of its network.
    #[serde(rename = "NetworkID")]
    pub(super) network: String,
    /// Docker's id of it.
    #[serde(rename = "EndpointID")]
    pub(super) id: String,
}

/// `/NetworkDriver.CreateEndpoint`.
#[derive(Debug, Deserialize)]
pub(super) struct CreateEndpoint {
    #[serde(flatten)]
    endpoint: Endpoint,
    #[serde(rename = "Interface")]
    pub(super) interface: Option<Interface>,
    #[serde(rename = "Options", default, deserialize_with = "map")]
    options: BTreeMap<String, Value>,
}

/// What an endpoint has, or is to have; empty where nobody has decided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Interface {
    /// IPv4 address with prefix length.
    address: String,
    /// IPv6 address with prefix length.
    #[serde(rename = "AddressIPv6")]
    address_ipv6: String,
    mac_address: String,
}

impl CreateEndpoint {
    /// In the model's terms.
    pub(super) fn into_spec(self) -> Result<OfferSpec, Refusal> {
        let Interface { address: ipv4, address_ipv6: ipv6, mac_address: mac } =
            self.interface.unwrap_or_default();
        let said = [ipv4, ipv6].into_iter().filter(|text| !text.is_empty());
        Ok(OfferSpec {
            network: self.endpoint.network,
            id: self.endpoint.id,
            name: self.options.get(NAME).map(text),
            addresses: said.map(|text| address("address", &text)).collect::<Result<_, _>>()?,
            mac: (!mac.is_empty()).then(|| mac.parse()).transpose()?,
        })
    }
}

/// Answer to `/NetworkDriver.CreateEndpoint`.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct MadeEndpoint {
    interface: Interface,
}

impl MadeEndpoint {
    /// What was decided here: Docker takes it amiss to be told what it has said itself.
    pub(super) fn of(model: &Model, endpoint: &model::Endpoint, asked: &Interface) -> Self {
        let network = model.networks.get(&endpoint.network);
        let unless = |said: &str, chosen: Option<String>| match said {
            "" => chosen.unwrap_or_default(),
            _ => String::new(),
        };
        let with_prefix = |address: IpAddr| {
            let mut subnets = network.iter().flat_map(|network| network.subnets());
            let subnet = subnets.find(|subnet| subnet.contains(&address))?;
            Some(format!("{address}/{}", subnet.prefix_len()))
        };
        let ipv4 = endpoint.ipv4.and_then(|address| with_prefix(address.into()));
        let ipv6 = endpoint.ipv6.and_then(|address| with_prefix(address.into()));
        let interface = Interface {
            address: unless(&asked.address, ipv4),
            address_ipv6: unless(&asked.address_ipv6, ipv6),
            mac_address: unless(&asked.mac_address, Some(endpoint.mac.to_string())),
        };
        Self { interface }
    }
}

/// `/NetworkDriver.Join`.
#[derive(Debug, Deserialize)]
pub(super) struct Join {
    #[serde(flatten)]
    pub(super) endpoint: Endpoint,
    /// Path of the container's network namespace.
    #[serde(rename = "SandboxKey", default)]
    pub(super) sandbox: String,
}

/// Answer to `/NetworkDriver.Join`.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Joined {
    interface_name: InterfaceName,
    gateway: String,
    #[serde(rename = "GatewayIPv6")]
    gateway_ipv6: String,
    /// Docker does without a network of its own for the way out (docker_gwbridge).
    disable_gateway_service: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct InterfaceName {
    /// What waits in the host's namespace.
    src_name: String,
    dst_prefix: String,
}

impl Joined {
    /// What a container gets by this endpoint.
    pub(super) fn of(model: &Model, endpoint: &model::Endpoint) -> Self {
        let network = model.networks.get(&endpoint.network);
        let open = network.filter(|network| !network.is_closed());
        let ipv4 = open.and_then(|network| network.ipv4).map(|side| side.gateway.to_string());
        let ipv6 = open.and_then(|network| network.ipv6).map(|side| side.gateway.to_string());
        Self {
            interface_name: InterfaceName {
                src_name: endpoint.interface.clone(),
                dst_prefix: INTERFACE_PREFIX.to_owned(),
            },
            gateway: ipv4.unwrap_or_default(),
            gateway_ipv6: ipv6.unwrap_or_default(),
            // With a gateway there is no need for one, and without one Docker would never ask for
            // published ports.
            disable_gateway_service: open.is_none(),
        }
    }
}

/// `/NetworkDriver.ProgramExternalConnectivity`: the container's way out, and in, is this endpoint.
#[derive(Debug, Deserialize)]
pub(super) struct External {
    #[serde(flatten)]
    pub(super) endpoint: Endpoint,
    #[serde(rename = "Options", default, deserialize_with = "map")]
    options: BTreeMap<String, Value>,
}

/// A container port that is to be published.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
#[derive(Default)]
struct PortBinding {
    /// IP protocol number.
    proto: u8,
    /// The container's.
    port: u16,
    #[serde(rename = "HostIP")]
    host_ip: String,
    /// 0 = to be chosen.
    host_port: u16,
    /// Last of a range to choose from.
    host_port_end: u16,
}

impl External {
    /// The ports to publish.
    pub(super) fn ports(&self) -> Result<Vec<PublishSpec>, Refusal> {
        let Some(bindings) = self.options.get(PORT_MAP) else { return Ok(Vec::new()) };
        let bindings = Option::<Vec<PortBinding>>::deserialize(bindings)
            .map_err(|error| Refusal::invalid(format!("read {PORT_MAP}: {error}")))?;
        bindings.unwrap_or_default().iter().map(PortBinding::to_spec).collect()
    }
}

impl PortBinding {
    fn to_spec(&self) -> Result<PublishSpec, Refusal> {
        let protocol = model::Protocol::from_number(self.proto)?;
        let is_said = |text: &&str| !text.is_empty();
        let host_address = Some(self.host_ip.as_str()).filter(is_said);
        let host_address = host_address.map(|text| address("host address", text)).transpose()?;
        PublishSpec::of_port(protocol, host_address, self.host_ports(), self.port)
    }

    fn host_ports(&self) -> Option<RangeInclusive<u16>> {
        let last = self.host_port_end.max(self.host_port);
        (self.host_port > 0).then_some(self.host_port..=last)
    }
}

/// A value of an option, as `--opt` had it.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

pub(super) fn parse(noun: &str, text: &str) -> Result<IpNet, Refusal> {
    text.parse().map_err(|_| Refusal::invalid(format!("{noun} {text:?} is no CIDR")))
}

/// An address, with or without a prefix length.
pub(super) fn address(noun: &str, text: &str) -> Result<IpAddr, Refusal> {
    let address = text.split('/').next().unwrap_or_default();
    address.parse().map_err(|_| Refusal::invalid(format!("{noun} {text:?} is no IP address")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::{GatewayMode, tests as fixture};

    const ID: &str = "1e5b878e07d95fe7295305fdabdb09a1";

    fn create(extra: Value) -> Result<NetworkSpec, Refusal> {
        let mut call = json!({
            "NetworkID": ID,
            "Options": {
                "com.docker.network.enable_ipv4": true,
                "com.docker.network.enable_ipv6": false,
                "com.docker.network.generic": {},
            },
            "IPv4Data": [{
                "AddressSpace": "LocalDefault",
                "Gateway": "172.17.0.1/16",
                "Pool": "172.17.0.0/16",
            }],
            "IPv6Data": null,
        });
        for (key, value) in extra.as_object().unwrap() {
            match value.as_object().zip(call[key].as_object_mut()) {
                Some((more, options)) => options.extend(more.clone()),
                None => call[key] = value.clone(),
            }
        }
        serde_json::from_value::<CreateNetwork>(call).unwrap().into_spec([0; 5])
    }

    #[test]
    fn a_network_is_as_docker_says() {
        let expected = NetworkSpec {
            name: "1e5b878e07d9".into(),
            engine_id: Some(ID.into()),
            enable_ipv4: Some(true),
            enable_ipv6: Some(false),
            gateways: vec!["172.17.0.1".parse().unwrap()],
            ..fixture::network_spec("", "172.17.0.0/16")
        };
        assert_eq!(create(json!({})), Ok(expected.clone()));
        let spec = create(json!({
            "Options": {
                "com.docker.network.internal": true,
                "com.docker.network.enable_ipv6": true,
                "com.docker.network.generic": {
                    "com.docker.network.bridge.gateway_mode_ipv4": "routed",
                    "com.docker.network.driver.mtu": "1400",
                    "netdp.name": "web",
                },
            },
            "IPv6Data": [{
                "Pool": "fd00:20::/64",
                "AuxAddresses": {"router": "fd00:20::9/64"},
            }],
        }));
        let subnets = [expected.subnets[0], "fd00:20::/64".parse().unwrap()];
        let expected = NetworkSpec {
            name: "web".into(),
            enable_ipv6: Some(true),
            subnets: subnets.into(),
            internal: true,
            gateway_mode: Some(GatewayMode::Routed),
            mtu: Some(1400),
            reserved: ["fd00:20::9".parse().unwrap()].into(),
            ..expected
        };
        assert_eq!(spec, Ok(expected));
        let options = json!({"com.docker.network.generic": {"netdp.speed": "high"}});
        let refusal = create(json!({ "Options": options })).unwrap_err();
        assert!(refusal.message.contains("netdp.speed"), "{refusal}");
    }

    /// A model with network `a`, and an endpoint of it that Docker has asked for in these words.
    fn offered(interface: Value) -> (Model, model::Endpoint) {
        let mut model = fixture::model_with_network("a");
        model.networks.values_mut().next().unwrap().engine_id = Some(ID.into());
        let call = json!({
            "NetworkID": ID,
            "EndpointID": "e1",
            "Interface": interface,
            "Options": {"netdp.name": "shop"},
        });
        let spec = serde_json::from_value::<CreateEndpoint>(call).unwrap().into_spec().unwrap();
        let id = model.offer(spec, &fixture::host()).unwrap();
        let endpoint = model.endpoints[&id].clone();
        (model, endpoint)
    }

    #[test]
    fn docker_is_told_of_an_endpoint_what_it_did_not_say() {
        let said = json!({"Address": "172.20.0.7/24", "AddressIPv6": "", "MacAddress": ""});
        let (model, endpoint) = offered(said.clone());
        assert_eq!(endpoint.name, "shop");
        let said: Interface = serde_json::from_value(said).unwrap();
        let answer = serde_json::to_value(MadeEndpoint::of(&model, &endpoint, &said)).unwrap();
        let chosen = json!({"Address": "", "AddressIPv6": "", "MacAddress": "02:42:ac:14:00:07"});
        assert_eq!(answer, json!({ "Interface": chosen }));

        let mac = json!({"MacAddress": "02:42:00:00:00:07"});
        let (model, endpoint) = offered(mac.clone());
        let said: Interface = serde_json::from_value(mac).unwrap();
        let answer = serde_json::to_value(MadeEndpoint::of(&model, &endpoint, &said)).unwrap();
        let chosen = json!({"Address": "172.20.0.2/24", "AddressIPv6": "", "MacAddress": ""});
        assert_eq!(answer, json!({ "Interface": chosen }));
    }

    #[test]
    fn there_is_a_gateway_or_docker_is_told_to_do_without() {
        let (mut model, endpoint) = offered(Value::Null);
        let joined = |model: &Model| serde_json::to_value(Joined::of(model, &endpoint)).unwrap();
        let name = json!({"SrcName": "ndc1", "DstPrefix": "eth"});
        let expected = json!({
            "InterfaceName": name,
            "Gateway": "172.20.0.1",
            "GatewayIPv6": "",
            "DisableGatewayService": false,
        });
        assert_eq!(joined(&model), expected);
        model.networks.values_mut().next().unwrap().internal = true;
        let expected = json!({
            "InterfaceName": name,
            "Gateway": "",
            "GatewayIPv6": "",
            "DisableGatewayService": true,
        });
        assert_eq!(joined(&model), expected);
    }

    #[test]
    fn ports_are_read_as_docker_means_them() {
        let ports = |bindings: Value| {
            let call = json!({
                "NetworkID": ID, "EndpointID": "e1",
                "Options": {"com.docker.network.portmap": bindings},
            });
            serde_json::from_value::<External>(call).unwrap().ports()
        };
        let binding = |host_ip: &str, first: u16, last: u16| {
            json!({"Proto": 6, "IP": "", "Port": 80, "HostIP": host_ip, "HostPort": first,
                   "HostPortEnd": last})
        };
        for (said, meant) in [
            (binding("", 8080, 8080), "8080:80"),
            (binding("", 0, 0), "80"),
            (binding("127.0.0.1", 8080, 8089), "127.0.0.1:8080-8089:80"),
            (binding("::1", 8080, 0), "[::1]:8080:80"),
        ] {
            assert_eq!(ports(json!([said])), Ok(vec![meant.parse().unwrap()]), "{meant}");
        }
        assert_eq!(ports(Value::Null), Ok(Vec::new()));
        assert!(ports(json!([binding("here", 1, 1)])).is_err());
        assert!(ports(json!([{"Proto": 1, "Port": 80}])).is_err());
    }
}
