//! A CNI plugin (containernetworking/cni, SPEC.md): `netdp-cni`, which makes the interface of a
//! container and everything behind it.
//!
//! Owns the commands. What a configuration says is read by `config`, what a result is by `result`.

mod config;
mod error;
mod parameters;
mod result;

use std::{
    env,
    io::{self, Read, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use hyper::Method;
use ipnet::IpNet;
use serde_json::{Value, json};

use self::{
    config::{Config, NEWEST, PortMapping, VERSIONS, Wishes},
    error::{Code, Error},
    parameters::{Attachment, NAME_PREFIX, Netns},
    result::{Attached, addresses_of, has_default_route},
};
use super::network;
use crate::{
    api::{
        client::{self, Client, wait_for},
        wire::{self, ErrorKind},
    },
    config::Paths,
    netlink::namespace,
};

/// Names the agent's socket, as for the command line.
const SOCKET_VARIABLE: &str = "NETDP_SOCKET";

/// Carries out the command that the environment names, and answers on standard output.
pub(super) fn run() -> ExitCode {
    let mut version = NEWEST;
    let answer = match wait_for(async { Ok(execute(&mut version).await) }) {
        Ok(answer) => answer,
        Err(error) => Err(error.into()),
    };
    let (text, code) = match answer {
        Ok(None) => (String::new(), ExitCode::SUCCESS),
        Ok(Some(value)) => (format!("{value:#}\n"), ExitCode::SUCCESS),
        Err(error) => (format!("{:#}\n", error.to_json(version)), ExitCode::FAILURE),
    };
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        // Nobody heard the answer, so nobody may believe that all is well.
        Err(_) => ExitCode::FAILURE,
    }
}

/// Does what was asked for; `spoken` becomes the version of the protocol that the answer is in.
async fn execute(spoken: &mut &'static str) -> Result<Option<Value>, Error> {
    let command = env::var("CNI_COMMAND").unwrap_or_default();
    let since = match command.as_str() {
        "ADD" | "DEL" | "VERSION" => VERSIONS[0],
        "CHECK" => "0.4.0",
        "GC" | "STATUS" => "1.1.0",
        _ => {
            let details = format!(
                "CNI_COMMAND={command}: container runtimes call this plugin, with one of ADD, DEL, \
                 CHECK, GC, STATUS and VERSION"
            );
            return Err(Error::new(Code::InvalidEnvironment, details));
        }
    };
    let text = read_input()?;
    if command == "VERSION" {
        return Ok(Some(versions(&text)));
    }
    let config = Config::read(&text)?;
    *spoken = config.version(since)?;
    if config.name.is_empty() {
        return Err(Error::new(Code::InvalidConfig, "name is missing: give the network's"));
    }
    let client = Client::new(&socket(&config));
    if let Err(error) = client.reach().await {
        let code = if command == "STATUS" { Code::NotAvailable } else { Code::TryAgainLater };
        return Err(Error::new(code, format!("{error:#}")));
    }
    match command.as_str() {
        "ADD" => add(&client, &config, spoken).await.map(Some),
        "DEL" => delete(&client, &config).await.map(|()| None),
        "CHECK" => check(&client, &config).await.map(|()| None),
        "GC" => collect(&client, &config).await.map(|()| None),
        _ => status(&client).await.map(|()| None),
    }
}

fn read_input() -> Result<Vec<u8>, Error> {
    let mut text = Vec::new();
    io::stdin()
        .read_to_end(&mut text)
        .map_err(|error| Error::new(Code::InputOutput, format!("read standard input: {error}")))?;
    Ok(text)
}

fn socket(config: &Config) -> PathBuf {
    let named = env::var_os(SOCKET_VARIABLE).map(PathBuf::from);
    config.socket.clone().or(named).unwrap_or_else(|| Paths::default().socket())
}

/// The answer to VERSION, whose input is worth no error.
fn versions(text: &[u8]) -> Value {
    let said = Config::read(text).map(|config| config.cni_version).unwrap_or_default();
    let version = if said.is_empty() { NEWEST } else { &said };
    json!({"cniVersion": version, "supportedVersions": VERSIONS})
}

async fn add(client: &Client, config: &Config, version: &str) -> Result<Value, Error> {
    let (attachment, netns) = parameters::attachment(Netns::Required)?;
    let request = config.network()?;
    let Wishes { addresses, mac, ports, dns } = config.wishes(&parameters::arguments())?;
    let network = network::ensure(client, &request).await?;
    let path = client::absolute(&netns)?;
    let missing = not_published(client, &path, &ports).await?;
    let connect = wire::Connect {
        netns: path,
        name: Some(attachment.endpoint_name()),
        addresses,
        mac,
        interface: Some(attachment.interface),
        publish: missing.into_iter().map(PortMapping::argument).collect(),
    };
    let endpoint = network::connect(client, &network.name, &connect).await?;
    let attached = Attached { endpoint: &endpoint, network: &network, netns: &netns, dns: &dns };
    let result = attached.result(&config.prev_result, version);
    if result.is_err() {
        // Who is told of a failure need not come back to clean up.
        disconnect(client, &network.name, &endpoint.name).await?;
    }
    result
}

/// Those of a container's ports that none of its networks has published.
async fn not_published<'a>(
    client: &Client,
    netns: &str,
    ports: &'a [PortMapping],
) -> anyhow::Result<Vec<&'a PortMapping>> {
    if ports.is_empty() {
        return Ok(Vec::new());
    }
    let published = network::published_of(client, netns).await?;
    Ok(ports.iter().filter(|port| !published.iter().any(|other| port.is(other))).collect())
}

async fn delete(client: &Client, config: &Config) -> Result<(), Error> {
    let (attachment, _) = parameters::attachment(Netns::Optional)?;
    disconnect(client, &config.name, &attachment.endpoint_name()).await
}

/// Disconnects an endpoint; one that is not there is as it should be.
async fn disconnect(client: &Client, network: &str, endpoint: &str) -> Result<(), Error> {
    let path = client::path(&["networks", network, "endpoints", endpoint]);
    match client.order::<()>(Method::DELETE, &path).await {
        Err(error) if client::refusal(&error) != Some(ErrorKind::NotFound) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Compares what ADD came to with what the agent has and what the container has.
async fn check(client: &Client, config: &Config) -> Result<(), Error> {
    let (attachment, netns) = parameters::attachment(Netns::Required)?;
    let wishes = config.wishes(&parameters::arguments())?;
    let expected = addresses_of(&config.prev_result, &attachment.interface, &netns)?;
    let (network, endpoint) = find(client, &config.name, &attachment).await?;
    for address in &expected {
        if !endpoint.addresses.contains(&address.to_string()) {
            return Err(broken(format!("the agent does not have {address} for it")));
        }
    }
    if let Some(port) =
        not_published(client, &client::absolute(&netns)?, &wishes.ports).await?.first()
    {
        return Err(broken(format!("port {} is not published", port.argument())));
    }
    let drift: Vec<String> = client.get(&client::path(&["check"])).await?;
    let ours = [network.bridge.as_str(), &endpoint.host_interface];
    if let Some(what) = drift.iter().find(|what| what.split(' ').any(|word| ours.contains(&word))) {
        return Err(broken(what.clone()));
    }
    check_inside(&netns, &attachment.interface, &expected, &endpoint, &config.prev_result).await
}

/// Whether the container itself still has what it was given.
async fn check_inside(
    netns: &str,
    interface: &str,
    expected: &[IpNet],
    endpoint: &wire::Endpoint,
    previous: &Value,
) -> Result<(), Error> {
    let interior = namespace::look_inside(Path::new(netns)).await?;
    let Some(link) = interior.links.iter().find(|link| link.name == interface) else {
        return Err(broken(format!("{netns} has no interface {interface}")));
    };
    if !link.up {
        return Err(broken(format!("{interface} is down")));
    }
    if let Some(address) = expected.iter().find(|&&address| !link.has_address(address)) {
        return Err(broken(format!("{interface} lacks {address}")));
    }
    for gateway in &endpoint.gateways {
        let gateway: IpAddr = gateway.parse().context("read a gateway")?;
        let has_route = match gateway {
            IpAddr::V4(_) => interior.has_ipv4_route,
            IpAddr::V6(_) => interior.has_ipv6_route,
        };
        if has_default_route(previous, gateway) && !has_route {
            return Err(broken(format!("the default route by {gateway} is gone")));
        }
    }
    Ok(())
}

/// The endpoint of an attachment, with its network.
async fn find(
    client: &Client,
    network: &str,
    attachment: &Attachment,
) -> Result<(wire::Settings, wire::Endpoint), Error> {
    let path = client::path(&["networks", network]);
    let wire::NetworkDetail { settings, endpoints, .. } = client.get(&path).await?;
    let name = attachment.endpoint_name();
    let endpoint = endpoints.into_iter().find(|endpoint| endpoint.name == name);
    let endpoint =
        endpoint.ok_or_else(|| broken(format!("network {network:?} has no endpoint {name:?}")))?;
    Ok((settings, endpoint))
}

fn broken(what: String) -> Error {
    Error::new(Code::Broken, what)
}

/// Lets go of the network's attachments that the runtime does not name.
async fn collect(client: &Client, config: &Config) -> Result<(), Error> {
    let Some(valid) = &config.valid_attachments else {
        let details = "cni.dev/valid-attachments is missing: give a list, if only an empty one";
        return Err(Error::new(Code::InvalidConfig, details));
    };
    let valid: Vec<String> = valid
        .iter()
        .map(|valid| {
            let (container, interface) = (valid.container.clone(), valid.interface.clone());
            Attachment { container, interface }.endpoint_name()
        })
        .collect();
    let path = client::path(&["networks", &config.name]);
    let network: wire::NetworkDetail = match client.get(&path).await {
        Ok(network) => network,
        // No network, no attachments.
        Err(error) if client::refusal(&error) == Some(ErrorKind::NotFound) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let names = network.endpoints.iter().map(|endpoint| &endpoint.name);
    let mut failures = Vec::new();
    for name in names.filter(|name| name.starts_with(NAME_PREFIX) && !valid.contains(name)) {
        failures.extend(disconnect(client, &config.name, name).await.err());
    }
    match failures.first() {
        None => Ok(()),
        Some(first) => {
            let details: Vec<&str> = failures.iter().map(|error| error.details.as_str()).collect();
            Err(Error::new(first.code, details.join("; ")))
        }
    }
}

/// Whether the agent could serve ADD. That it answers on its socket is known already.
async fn status(client: &Client) -> Result<(), Error> {
    let answer: Result<wire::Status, _> = client.get(&client::path(&["status"])).await;
    answer.map(drop).map_err(|error| Error::new(Code::NotAvailable, format!("{error:#}")))
}
