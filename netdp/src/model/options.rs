//! Docker's bridge option keys and two of our own, laid over the options of a network that is to be made.
//!
//! Owns the keys and how their values read. Whether the options make sense together is
//! `network`'s business.

use std::{fmt, net::IpAddr, str::FromStr};

use super::{GatewayMode, NatBehaviour, NetworkSpec, Refusal};
use crate::family::{Family, V4, V6};

impl NetworkSpec {
    /// Takes one `KEY=VALUE`: an option of Docker's bridge driver, or netdp's own.
    ///
    /// # Errors
    /// Refuses an unknown key, a value that does not read, and a value that contradicts what was
    /// said before.
    pub fn apply_option(&mut self, key: &str, value: &str) -> Result<(), Refusal> {
        let parsed = Value { key, text: value };
        match key {
            "com.docker.network.bridge.name" => parsed.set(&mut self.bridge, value.to_owned()),
            "com.docker.network.bridge.enable_icc" => parsed.set(&mut self.icc, parsed.boolean()?),
            "com.docker.network.bridge.enable_ip_masquerade" => {
                parsed.set(&mut self.masquerade, parsed.boolean()?)
            }
            "com.docker.network.enable_ipv4" => {
                parsed.set(&mut self.enable_ipv4, parsed.boolean()?)
            }
            "com.docker.network.enable_ipv6" => {
                parsed.set(&mut self.enable_ipv6, parsed.boolean()?)
            }
            "com.docker.network.bridge.host_binding_ipv4" => {
                parsed.add::<V4>(&mut self.host_bindings)
            }
            "com.docker.network.bridge.host_binding_ipv6" => {
                parsed.add::<V6>(&mut self.host_bindings)
            }
            "com.docker.network.host_ipv4" => parsed.add::<V4>(&mut self.snat_ips),
            "com.docker.network.host_ipv6" => parsed.add::<V6>(&mut self.snat_ips),
            "com.docker.network.driver.mtu" => parsed.set(&mut self.mtu, parsed.number()?),
            "netdp.endpoint_flows" => parsed.set(&mut self.endpoint_flows, parsed.number()?),
            "netdp.nat" => parsed.set(&mut self.nat, value.parse()?),
            "com.docker.network.bridge.gateway_mode_ipv4"
            | "com.docker.network.bridge.gateway_mode_ipv6" => {
                let mode = value.parse()?;
                if self.gateway_mode.is_some_and(|said| said != mode) {
                    return Err(Refusal::invalid(format!(
                        "option {key}={value} differs from the gateway mode given before: \
                         both families of a network have the same one"
                    )));
                }
                self.gateway_mode = Some(mode);
                Ok(())
            }
            _ => Err(Refusal::invalid(format!(
                "option {key:?} is not known: netdp takes \
                 com.docker.network.bridge.{{name,enable_icc,enable_ip_masquerade,\
                 host_binding_ipv4,host_binding_ipv6,gateway_mode_ipv4,gateway_mode_ipv6}}, \
                 com.docker.network.{{enable_ipv4,enable_ipv6,host_ipv4,host_ipv6}}, \
                 com.docker.network.driver.mtu, netdp.endpoint_flows and netdp.nat"
            ))),
        }
    }
}

/// One option on its way into its field.
struct Value<'a> {
    key: &'a str,
    text: &'a str,
}

impl Value<'_> {
    fn set<T: PartialEq>(&self, field: &mut Option<T>, value: T) -> Result<(), Refusal> {
        if field.as_ref().is_some_and(|said| *said != value) {
            return Err(self.contradiction());
        }
        *field = Some(value);
        Ok(())
    }

    /// What Docker takes for a boolean.
    fn boolean(&self) -> Result<bool, Refusal> {
        match self.text {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err(self.unreadable("true or false")),
        }
    }

    /// Takes an address that is given once per family.
    fn add<F: Family>(&self, addresses: &mut Vec<IpAddr>) -> Result<(), Refusal> {
        let address: F::Address =
            self.text.parse().map_err(|_| self.unreadable(&format!("an {} address", F::NAME)))?;
        let mut said = addresses.iter().copied().filter_map(F::of);
        if said.clone().any(|said| said != address) {
            return Err(self.contradiction());
        }
        if said.next().is_none() {
            addresses.push(address.into());
        }
        Ok(())
    }

    fn number(&self) -> Result<u32, Refusal> {
        self.text.parse().map_err(|_| self.unreadable("a number"))
    }

    fn contradiction(&self) -> Refusal {
        Refusal::invalid(format!(
            "option {}={} contradicts what was said before: give it once",
            self.key, self.text
        ))
    }

    fn unreadable(&self, wanted: &str) -> Refusal {
        Refusal::invalid(format!("option {}={:?}: give {wanted}", self.key, self.text))
    }
}

impl fmt::Display for GatewayMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nat => "nat",
            Self::NatUnprotected => "nat-unprotected",
            Self::Routed => "routed",
            Self::Isolated => "isolated",
        })
    }
}

impl FromStr for GatewayMode {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        match text {
            "nat" => Ok(Self::Nat),
            "nat-unprotected" => Ok(Self::NatUnprotected),
            "routed" => Ok(Self::Routed),
            "isolated" => Ok(Self::Isolated),
            _ => Err(Refusal::invalid(format!(
                "{text:?} is no gateway mode: give nat, nat-unprotected, routed or isolated"
            ))),
        }
    }
}

impl fmt::Display for NatBehaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EndpointDependent => "endpoint-dependent",
            Self::EndpointIndependentMapping => "endpoint-independent-mapping",
            Self::EndpointIndependent => "endpoint-independent",
        })
    }
}

impl FromStr for NatBehaviour {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        match text {
            "endpoint-dependent" => Ok(Self::EndpointDependent),
            "endpoint-independent-mapping" => Ok(Self::EndpointIndependentMapping),
            "endpoint-independent" => Ok(Self::EndpointIndependent),
            _ => Err(Refusal::invalid(format!(
                "option netdp.nat={text:?}: give endpoint-dependent, endpoint-independent-mapping \
                 or endpoint-independent"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_land_in_their_fields() {
        let mut spec = NetworkSpec::default();
        for (key, value) in [
            ("com.docker.network.bridge.name", "br-web"),
            ("com.docker.network.bridge.enable_icc", "0"),
            ("com.docker.network.bridge.enable_ip_masquerade", "True"),
            ("com.docker.network.bridge.host_binding_ipv4", "127.0.0.1"),
            ("com.docker.network.driver.mtu", "1400"),
            ("com.docker.network.bridge.gateway_mode_ipv4", "nat-unprotected"),
            ("com.docker.network.bridge.gateway_mode_ipv6", "nat-unprotected"),
            ("com.docker.network.host_ipv4", "10.0.0.9"),
            ("com.docker.network.host_ipv6", "fd00::9"),
            ("com.docker.network.host_ipv6", "fd00:0::9"),
            ("com.docker.network.bridge.host_binding_ipv6", "::1"),
            ("com.docker.network.enable_ipv4", "0"),
            ("com.docker.network.enable_ipv6", "true"),
            ("netdp.endpoint_flows", "1000"),
            ("netdp.nat", "endpoint-independent-mapping"),
        ] {
            spec.apply_option(key, value).unwrap();
        }
        assert_eq!(
            spec,
            NetworkSpec {
                bridge: Some("br-web".into()),
                icc: Some(false),
                masquerade: Some(true),
                enable_ipv4: Some(false),
                enable_ipv6: Some(true),
                host_bindings: ["127.0.0.1", "::1"].map(|text| text.parse().unwrap()).into(),
                mtu: Some(1400),
                gateway_mode: Some(GatewayMode::NatUnprotected),
                endpoint_flows: Some(1000),
                nat: Some(NatBehaviour::EndpointIndependentMapping),
                snat_ips: ["10.0.0.9", "fd00::9"].map(|text| text.parse().unwrap()).into(),
                ..NetworkSpec::default()
            }
        );
    }

    #[test]
    fn unknown_unreadable_and_contradicting_options_are_refused() {
        let mut spec = NetworkSpec {
            icc: Some(true),
            gateway_mode: Some(GatewayMode::Nat),
            snat_ips: vec!["fd00::1".parse().unwrap()],
            ..NetworkSpec::default()
        };
        spec.apply_option("com.docker.network.bridge.enable_icc", "true").unwrap();
        for (key, value, reason) in [
            ("com.docker.network.bridge.enable_icc", "false", "contradicts"),
            ("com.docker.network.bridge.enable_icc", "yes", "give true or false"),
            ("com.docker.network.driver.mtu", "-1", "give a number"),
            ("com.docker.network.host_ipv4", "::1", "give an IPv4 address"),
            ("com.docker.network.host_ipv6", "10.0.0.1", "give an IPv6 address"),
            ("com.docker.network.host_ipv6", "fd00::2", "contradicts"),
            ("com.docker.network.bridge.gateway_mode_ipv6", "routed", "have the same one"),
            ("com.docker.network.bridge.gateway_mode_ipv4", "open", "is no gateway mode"),
            ("netdp.endpoint_flows", "many", "give a number"),
            ("netdp.endpoint_flow", "1", "is not known"),
            ("netdp.nat", "full-cone", "give endpoint-dependent"),
            ("com.docker.network.bridge.inhibit_ipv4", "true", "is not known"),
        ] {
            let refusal = spec.apply_option(key, value).unwrap_err();
            assert!(refusal.message.contains(reason), "{refusal}");
        }
    }
}
