//! A network as a plugin needs it: there when a container comes, and as its configuration says.
//!
//! Owns the comparison of what is asked for with what is there. What is not asked for may be as it
//! is.

use std::fmt::Display;

use anyhow::Result;
use hyper::Method;

use crate::{
    api::{
        client::{self, Client},
        wire::{self, ErrorKind, Settings},
    },
    model::{NetworkSpec, Refusal},
};

/// Makes the network that is asked for, unless it is there.
///
/// # Errors
/// The agent's refusal; a refusal of our own where another network has the name.
pub(super) async fn ensure(client: &Client, wanted: &wire::CreateNetwork) -> Result<Settings> {
    // Random only where a network is made, which is the agent's to do.
    let spec = wanted.clone().into_spec(Default::default()).map_err(wire::Error::from)?;
    let refused = match find(client, &wanted.name).await? {
        Some(network) => return check(&spec, network),
        None => {
            let path = client::path(&["networks"]);
            match client.send::<wire::Network>(Method::POST, &path, wanted).await {
                Ok(network) => return Ok(network.settings),
                Err(error) => error,
            }
        }
    };
    // Another container's plugin may have been here in between.
    match find(client, &wanted.name).await? {
        Some(network) => check(&spec, network),
        None => Err(refused),
    }
}

/// Connects a container.
///
/// # Errors
/// The agent's refusal. Podman holds a port of the host before it asks anybody to publish it, so who
/// reads that is told how to have it otherwise.
pub(super) async fn connect(
    client: &Client,
    network: &str,
    container: &wire::Connect,
) -> Result<wire::Endpoint> {
    let path = client::path(&["networks", network, "endpoints"]);
    client.send(Method::POST, &path, container).await.map_err(|error| {
        if !error.to_string().contains("is in use by podman") {
            return error;
        }
        error.context("set enable_port_reservation = false in containers.conf, for Podman")
    })
}

/// The ports that a container has published, whichever its networks. Runtimes name them anew for each
/// network that a container joins; published once, they lead to it by the network that it answers by.
///
/// # Errors
/// The agent's, but for networks that are gone meanwhile.
pub(super) async fn published_of(client: &Client, netns: &str) -> Result<Vec<wire::Published>> {
    let networks: Vec<wire::Network> = client.get(&client::path(&["networks"])).await?;
    let mut published = Vec::new();
    for network in networks.iter().filter(|network| network.endpoints > 0) {
        let path = client::path(&["networks", &network.settings.name]);
        match client.get::<wire::NetworkDetail>(&path).await {
            Ok(detail) => {
                let endpoints = detail.endpoints.into_iter();
                let own = endpoints.filter(|endpoint| endpoint.netns == netns);
                published.extend(own.flat_map(|endpoint| endpoint.published));
            }
            Err(error) if client::refusal(&error) == Some(ErrorKind::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(published)
}

async fn find(client: &Client, name: &str) -> Result<Option<Settings>> {
    let path = client::path(&["networks", name]);
    match client.get::<wire::NetworkDetail>(&path).await {
        Ok(network) => Ok(Some(network.settings)),
        Err(error) if client::refusal(&error) == Some(ErrorKind::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn check(spec: &NetworkSpec, network: Settings) -> Result<Settings> {
    let differences = differences(spec, &network);
    if differences.is_empty() {
        return Ok(network);
    }
    let name = &network.name;
    let refusal = Refusal::invalid(format!(
        "network {name:?} is there already and differs from what is asked for: {}: change the \
         configuration, or remove the network by `netdp network rm {name}`",
        differences.join("; ")
    ));
    Err(wire::Error::from(refusal).into())
}

/// What was asked for and is otherwise, in words.
fn differences(spec: &NetworkSpec, network: &Settings) -> Vec<String> {
    let has_family = |colons: bool| {
        network.subnets.iter().any(|subnet| subnet.contains(':') == colons).to_string()
    };
    let has_range = |subnet: &&String| {
        network.ip_ranges.iter().any(|range| range.contains(':') == subnet.contains(':'))
    };
    let whole = network.subnets.iter().filter(|subnet| !has_range(subnet));
    let ip_ranges: Vec<String> = network.ip_ranges.iter().chain(whole).cloned().collect();
    let lists = [
        listed("subnet", &spec.subnets, &network.subnets),
        listed("gateway", &spec.gateways, &network.gateways),
        listed("IP range", &spec.ip_ranges, &ip_ranges),
        listed("host binding", &spec.host_bindings, &network.host_bindings),
        listed("SNAT address", &spec.snat_ips, &network.snat_ips),
    ];
    let values = [
        single("IPv4", spec.enable_ipv4, &has_family(false)),
        single("IPv6", spec.enable_ipv6, &has_family(true)),
        single("bridge", spec.bridge.as_ref(), &network.bridge),
        single("gateway mode", spec.gateway_mode, &network.gateway_mode),
        single("internal", spec.internal.then_some(true), &network.internal),
        single("icc", spec.icc, &network.icc),
        single("masquerade", spec.masquerade, &network.masquerade),
        single("netdp.nat", spec.nat, &network.nat),
        single("MTU", spec.mtu, &network.mtu),
        single("netdp.endpoint_flows", spec.endpoint_flows, &network.endpoint_flows),
    ];
    lists.into_iter().chain(values).flatten().collect()
}

fn listed(noun: &str, wanted: &[impl Display], present: &[String]) -> Option<String> {
    let missing = wanted.iter().map(ToString::to_string).find(|value| !present.contains(value))?;
    Some(format!("{noun} {missing}, and it has {}", present.join(", ")))
}

fn single(noun: &str, wanted: Option<impl Display>, present: &impl Display) -> Option<String> {
    let wanted = wanted?.to_string();
    let present = present.to_string();
    (wanted != present).then(|| format!("{noun} {wanted}, and it has {present}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::tests as fixture;

    #[track_caller]
    fn check(request: Value, expected: &[&str]) {
        let request: wire::CreateNetwork = serde_json::from_value(request).unwrap();
        let spec = request.into_spec([0; 5]).unwrap();
        let model = fixture::model_with_network("a");
        let settings = Settings::from(model.network("a").unwrap());
        assert_eq!(differences(&spec, &settings), expected);
    }

    #[test]
    fn a_network_that_is_as_asked_for_is_taken() {
        check(json!({"name": "a"}), &[]);
        check(
            json!({
                "name": "a",
                "subnets": ["172.20.0.0/24"],
                "gateways": ["172.20.0.1"],
                "ip_range": "172.20.0.0/24",
                "host_binding": "0.0.0.0",
                "enable_ipv4": true,
                "enable_ipv6": false,
                "gateway_mode": "nat",
                "mtu": 1500,
                "options": {
                    "com.docker.network.bridge.name": "nd-1",
                    "netdp.nat": "endpoint-dependent",
                    "netdp.endpoint_flows": "0",
                },
            }),
            &[],
        );
    }

    #[test]
    fn every_difference_is_named() {
        check(
            json!({
                "name": "a",
                "subnets": ["172.20.0.0/24", "fd00:20::/64"],
                "internal": true,
                "icc": false,
                "options": {"com.docker.network.driver.mtu": "1400"},
            }),
            &[
                "subnet fd00:20::/64, and it has 172.20.0.0/24",
                "internal true, and it has false",
                "icc false, and it has true",
                "MTU 1400, and it has 1500",
            ],
        );
    }
}
