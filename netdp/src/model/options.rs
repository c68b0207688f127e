//! Docker's bridge option keys, laid over the options of a network that is to be made.
//!
//! Owns the keys and how their values read. Whether the options make sense together is
//! `network`'s business.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use super::{GatewayMode, NetworkSpec, Refusal};

impl NetworkSpec {
    /// Takes one `KEY=VALUE` of Docker's bridge options.
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
            "com.docker.network.bridge.host_binding_ipv4" => {
                parsed.set(&mut self.host_binding, parsed.address()?.into())
            }
            "com.docker.network.host_ipv4" => {
                parsed.set(&mut self.snat_ip, parsed.address()?.into())
            }
            "com.docker.network.driver.mtu" => parsed.set(&mut self.mtu, parsed.number()?),
            "com.docker.network.bridge.gateway_mode_ipv4" => {
                parsed.set(&mut self.gateway_mode, value.parse()?)
            }
            _ => Err(Refusal::invalid(format!(
                "option {key:?} is not known: netdp takes \
                 com.docker.network.bridge.{{name,enable_icc,enable_ip_masquerade,\
                 host_binding_ipv4,gateway_mode_ipv4}}, com.docker.network.driver.mtu and \
                 com.docker.network.host_ipv4"
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
            return Err(Refusal::invalid(format!(
                "option {}={} contradicts what was said before: give it once",
                self.key, self.text
            )));
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

    fn address(&self) -> Result<Ipv4Addr, Refusal> {
        self.text.parse().map_err(|_| self.unreadable("an IPv4 address"))
    }

    fn number(&self) -> Result<u32, Refusal> {
        self.text.parse().map_err(|_| self.unreadable("a number"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_options_land_in_their_fields() {
        let mut spec = NetworkSpec::default();
        for (key, value) in [
            ("com.docker.network.bridge.name", "br-web"),
            ("com.docker.network.bridge.enable_icc", "0"),
            ("com.docker.network.bridge.enable_ip_masquerade", "True"),
            ("com.docker.network.bridge.host_binding_ipv4", "127.0.0.1"),
            ("com.docker.network.driver.mtu", "1400"),
            ("com.docker.network.bridge.gateway_mode_ipv4", "nat-unprotected"),
            ("com.docker.network.host_ipv4", "10.0.0.9"),
        ] {
            spec.apply_option(key, value).unwrap();
        }
        assert_eq!(
            spec,
            NetworkSpec {
                bridge: Some("br-web".into()),
                icc: Some(false),
                masquerade: Some(true),
                host_binding: Some(Ipv4Addr::LOCALHOST.into()),
                mtu: Some(1400),
                gateway_mode: Some(GatewayMode::NatUnprotected),
                snat_ip: Some(Ipv4Addr::new(10, 0, 0, 9).into()),
                ..NetworkSpec::default()
            }
        );
    }

    #[test]
    fn unknown_unreadable_and_contradicting_options_are_refused() {
        let mut spec = NetworkSpec { icc: Some(true), ..NetworkSpec::default() };
        spec.apply_option("com.docker.network.bridge.enable_icc", "true").unwrap();
        for (key, value, reason) in [
            ("com.docker.network.bridge.enable_icc", "false", "contradicts"),
            ("com.docker.network.bridge.enable_icc", "yes", "give true or false"),
            ("com.docker.network.driver.mtu", "-1", "give a number"),
            ("com.docker.network.host_ipv4", "::1", "give an IPv4 address"),
            ("com.docker.network.bridge.gateway_mode_ipv4", "open", "is no gateway mode"),
            ("com.docker.network.bridge.inhibit_ipv4", "true", "is not known"),
        ] {
            let refusal = spec.apply_option(key, value).unwrap_err();
            assert!(refusal.message.contains(reason), "{refusal}");
        }
    }
}
