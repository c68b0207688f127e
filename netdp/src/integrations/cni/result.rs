//! What a command answers: the interfaces, addresses and routes of an attachment.
//!
//! Values of plugins before this one stay as they are, whatever is in them.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::{
    config::Dns,
    error::{Code, Error},
};
use crate::api::wire;

/// An attachment that is to be told of.
pub(super) struct Attached<'a> {
    pub(super) endpoint: &'a wire::Endpoint,
    pub(super) network: &'a wire::Settings,
    /// `CNI_NETNS`, as the runtime wrote it.
    pub(super) netns: &'a str,
    pub(super) dns: &'a Dns,
}

impl Attached<'_> {
    /// The result of ADD: what was there before, and this attachment behind it.
    ///
    /// # Errors
    /// Refuses a previous result that is none.
    pub(super) fn result(&self, previous: &Value, version: &str) -> Result<Value, Error> {
        let mut result = match previous {
            Value::Null => Map::new(),
            Value::Object(previous) => previous.clone(),
            _ => return Err(malformed("it is no object")),
        };
        result.insert("cniVersion".into(), version.into());
        let first = append(&mut result, "interfaces", self.interfaces(version))?;
        // The container's interface is the last one of the three.
        append(&mut result, "ips", self.ips(first + 2, version))?;
        append(&mut result, "routes", self.routes())?;
        if !self.dns.is_empty() {
            result.insert("dns".into(), json!(self.dns));
        }
        Ok(result.into())
    }

    fn interfaces(&self, version: &str) -> Vec<Value> {
        let wire::Endpoint { host_interface, interface, mac, .. } = self.endpoint;
        let mut interfaces = vec![
            json!({"name": self.network.bridge}),
            json!({"name": host_interface}),
            json!({"name": interface, "mac": mac, "sandbox": self.netns}),
        ];
        if version == "1.1.0" {
            for interface in &mut interfaces {
                interface["mtu"] = self.network.mtu.into();
            }
        }
        interfaces
    }

    fn ips(&self, interface: usize, version: &str) -> Vec<Value> {
        let ip = |address: &String| {
            let mut ip = json!({"address": address, "interface": interface});
            let is_ipv6 = address.contains(':');
            let gateway = self.endpoint.gateways.iter().find(|ip| ip.contains(':') == is_ipv6);
            if let Some(gateway) = gateway {
                ip["gateway"] = gateway.as_str().into();
            }
            // Version 1.0.0 of the spec took it away.
            if matches!(version, "0.3.1" | "0.4.0") {
                ip["version"] = (if is_ipv6 { "6" } else { "4" }).into();
            }
            ip
        };
        self.endpoint.addresses.iter().map(ip).collect()
    }

    fn routes(&self) -> Vec<Value> {
        let route = |gateway: &String| {
            let everything = if gateway.contains(':') { "::/0" } else { "0.0.0.0/0" };
            json!({"dst": everything, "gw": gateway})
        };
        self.endpoint.gateways.iter().map(route).collect()
    }
}

/// Puts values behind those that a list has, and says how many those are.
fn append(result: &mut Map<String, Value>, key: &str, values: Vec<Value>) -> Result<usize, Error> {
    let list = result.entry(key).or_insert(Value::Null);
    if list.is_null() {
        *list = Value::Array(Vec::new());
    }
    let list = list.as_array_mut().ok_or_else(|| malformed(&format!("{key} is no list")))?;
    let before = list.len();
    list.extend(values);
    Ok(before)
}

/// The addresses that a previous result gives to the interface of this name in this namespace.
///
/// # Errors
/// Refuses a result that does not have the interface.
pub(super) fn addresses_of(
    previous: &Value,
    interface: &str,
    netns: &str,
) -> Result<Vec<IpNet>, Error> {
    if previous.is_null() {
        return Err(malformed("it is missing"));
    }
    let is_meant = |other: &Value| other["name"] == interface && other["sandbox"] == netns;
    let mut interfaces = previous["interfaces"].as_array().into_iter().flatten();
    let index = interfaces
        .position(is_meant)
        .ok_or_else(|| malformed(&format!("it has no interface {interface} in {netns}")))?;
    let of_interface = |ip: &&Value| ip["interface"].as_u64() == u64::try_from(index).ok();
    let ips = previous["ips"].as_array().into_iter().flatten();
    ips.filter(of_interface)
        .map(|ip| {
            let address = ip["address"].as_str().unwrap_or_default();
            address.parse().map_err(|_| malformed(&format!("address {address:?} is none")))
        })
        .collect()
}

/// Whether a previous result has a default route of the address's family.
pub(super) fn has_default_route(previous: &Value, family: IpAddr) -> bool {
    let mut routes = previous["routes"].as_array().into_iter().flatten();
    let everything = if family.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
    routes.any(|route| route["dst"] == everything)
}

fn malformed(what: &str) -> Error {
    Error::new(Code::InvalidConfig, format!("prevResult: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Model, tests as fixture};

    const NETNS: &str = "/var/run/netns/web";

    /// The result of an attachment with addresses of both families.
    fn result(previous: &Value, version: &str) -> Result<Value, Error> {
        let mut model = Model::default();
        let mut spec = fixture::network_spec("a", "172.20.0.0/24");
        spec.subnets.push("fd00:20::/64".parse().unwrap());
        model.create_network(spec, &fixture::host()).unwrap();
        model.connect(fixture::connect_spec("a", "A1"), &fixture::host()).unwrap();
        let network = wire::NetworkDetail::of(&model, model.network("a").unwrap());
        let attached = Attached {
            endpoint: &network.endpoints[0],
            network: &network.settings,
            netns: NETNS,
            dns: &Dns::default(),
        };
        attached.result(previous, version)
    }

    #[test]
    fn a_result_reads_as_the_spec_has_it() {
        let expected = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "nd-1", "mtu": 1500},
                {"name": "ndv1", "mtu": 1500},
                {"name": "eth0", "mac": "02:42:ac:14:00:02", "sandbox": NETNS, "mtu": 1500},
            ],
            "ips": [
                {"address": "172.20.0.2/24", "gateway": "172.20.0.1", "interface": 2},
                {"address": "fd00:20::2/64", "gateway": "fd00:20::1", "interface": 2},
            ],
            "routes": [
                {"dst": "0.0.0.0/0", "gw": "172.20.0.1"},
                {"dst": "::/0", "gw": "fd00:20::1"},
            ],
        });
        assert_eq!(result(&Value::Null, "1.1.0").unwrap(), expected);
        let old = result(&Value::Null, "0.4.0").unwrap();
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["ips"][1]["version"], "6");
        assert_eq!(old["interfaces"][0], json!({"name": "nd-1"}));
    }

    #[test]
    fn what_plugins_before_came_to_is_passed_on() {
        let previous = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "lo", "sandbox": NETNS, "pciID": "0000:04:00.5"}],
            "ips": [{"address": "127.0.0.1/8", "interface": 0}],
            "dns": {"nameservers": ["192.0.2.53"]},
            "of-others": 1,
        });
        let result = result(&previous, "1.0.0").unwrap();
        assert_eq!(result["interfaces"][0], previous["interfaces"][0]);
        assert_eq!(result["ips"][0], previous["ips"][0]);
        assert_eq!(result["ips"][1]["interface"], 3);
        assert_eq!(result["interfaces"][3]["name"], "eth0");
        assert_eq!(result["dns"], previous["dns"]);
        assert_eq!(result["of-others"], 1);
    }

    #[test]
    fn a_previous_result_that_is_none_is_refused() {
        for bad in [json!([]), json!({"ips": 1})] {
            assert_eq!(result(&bad, "1.0.0").unwrap_err().code, Code::InvalidConfig);
        }
    }

    #[test]
    fn expected_addresses_are_those_of_the_interface() {
        let result = result(&Value::Null, "1.0.0").unwrap();
        let expected: Vec<IpNet> =
            ["172.20.0.2/24", "fd00:20::2/64"].map(|net| net.parse().unwrap()).into();
        assert_eq!(addresses_of(&result, "eth0", NETNS).unwrap(), expected);
        for (interface, netns) in [("eth1", NETNS), ("eth0", "/elsewhere")] {
            let error = addresses_of(&result, interface, netns).unwrap_err();
            assert_eq!(error.code, Code::InvalidConfig);
        }
        assert!(addresses_of(&Value::Null, "eth0", NETNS).is_err());
        assert!(has_default_route(&result, "10.0.0.1".parse().unwrap()));
        assert!(!has_default_route(&json!({}), "::1".parse().unwrap()));
    }
}
