//! What container engines ask for: networks and endpoints by the engine's own ids, ends offered,
//! taken and given back.
//!
//! Engines repeat themselves after a crash of either side, so what is there already is as good as
//! made, and what is gone as good as removed. Knows no engine's protocol.

use std::{net::IpAddr, path::PathBuf};

use super::{
    Endpoint, EndpointId, Engaged, MacAddress, Model, Network, NetworkId, Place, PublishSpec,
    PublishedPort, Refusal, endpoint::NewEndpoint,
};
use crate::facts::HostFacts;

/// How much of an engine's id names what has no other name: as much as Docker shows of its own.
const SHOWN_ID: usize = 12;

/// An endpoint as an engine asks for it; `None` and empty mean that netdp decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferSpec {
    /// The engine's id of the network.
    pub network: String,
    /// The engine's id of the endpoint.
    pub id: String,
    /// The endpoint's name.
    pub name: Option<String>,
    /// Its addresses, one per family at most.
    pub addresses: Vec<IpAddr>,
    /// Its MAC address.
    pub mac: Option<MacAddress>,
}

/// The name of what an engine calls by this id and no other name.
pub fn short_id(id: &str) -> String {
    id.chars().take(SHOWN_ID).collect()
}

impl Endpoint {
    fn engaged(&self) -> Option<&Engaged> {
        match &self.place {
            Place::Engine(engaged) => Some(engaged),
            Place::Netns(_) => None,
        }
    }
}

impl Model {
    /// The network that an engine calls so.
    ///
    /// # Errors
    /// Refuses an unknown id.
    pub fn network_of_engine(&self, id: &str) -> Result<&Network, Refusal> {
        let mut networks = self.networks.values();
        networks.find(|network| network.engine_id.as_deref() == Some(id)).ok_or_else(|| {
            Refusal::not_found(format!(
                "netdp does not know network {} any more: remove it and make it anew",
                short_id(id)
            ))
        })
    }

    /// The endpoint that an engine calls so.
    ///
    /// # Errors
    /// Refuses an unknown id.
    pub fn endpoint_of_engine(&self, id: &str) -> Result<&Endpoint, Refusal> {
        let mut endpoints = self.endpoints.values();
        let is_meant = |endpoint: &&Endpoint| endpoint.engaged().is_some_and(|it| it.id == id);
        endpoints.find(is_meant).ok_or_else(|| {
            Refusal::not_found(format!("there is no endpoint {} any more", short_id(id)))
        })
    }

    /// Makes an endpoint whose container's end waits on the host until the engine takes it. One that
    /// the engine has already stays as it is; one that it has forgotten makes way.
    ///
    /// # Errors
    /// Refuses an unknown network, a used name, and addresses as [`Model::connect`] does.
    pub fn offer(&mut self, spec: OfferSpec, facts: &HostFacts) -> Result<EndpointId, Refusal> {
        if let Ok(endpoint) = self.endpoint_of_engine(&spec.id) {
            return Ok(endpoint.id);
        }
        let network = self.network_of_engine(&spec.network)?.id;
        self.forget_rivals(network, &spec);
        let (id, host_interface) = self.choose_id(facts)?;
        self.add_endpoint(NewEndpoint {
            id,
            network,
            name: spec.name.unwrap_or_else(|| short_id(&spec.id)),
            place: Place::Engine(Engaged { id: spec.id, sandbox: None }),
            host_interface,
            interface: format!("ndc{}", id.0),
            addresses: &spec.addresses,
            mac: spec.mac,
            published: Vec::new(),
        })
    }

    /// Removes what was offered in this network, was never taken, and has what is now asked for. The
    /// engine did not hear that it was made, because one of the two went away meanwhile, and so gives
    /// its address to the next: it does not give one to two.
    fn forget_rivals(&mut self, network: NetworkId, spec: &OfferSpec) {
        let is_rival = |endpoint: &Endpoint| {
            let addresses = [endpoint.ipv4.map(IpAddr::V4), endpoint.ipv6.map(IpAddr::V6)];
            endpoint.network == network
                && endpoint.engaged().is_some_and(|engaged| engaged.sandbox.is_none())
                && (spec.name.as_ref() == Some(&endpoint.name)
                    || spec.mac == Some(endpoint.mac)
                    || addresses.iter().flatten().any(|address| spec.addresses.contains(address)))
        };
        self.endpoints.retain(|_, endpoint| !is_rival(endpoint));
    }

    /// Notes where an engine takes an endpoint's end.
    ///
    /// # Errors
    /// Refuses an unknown endpoint.
    pub fn take(&mut self, id: &str, sandbox: PathBuf) -> Result<&Endpoint, Refusal> {
        let id = self.endpoint_of_engine(id)?.id;
        let endpoint = self.endpoint_mut(id)?;
        if let Place::Engine(engaged) = &mut endpoint.place {
            engaged.sandbox = Some(sandbox);
        }
        Ok(endpoint)
    }

    /// Notes that no container has an endpoint any more; nothing leads to it from then on. Returns
    /// which one it is, if there is one.
    pub fn leave(&mut self, id: &str) -> Option<EndpointId> {
        let id = self.conceal(id)?;
        if let Place::Engine(engaged) = &mut self.endpoints.get_mut(&id)?.place {
            engaged.sandbox = None;
        }
        Some(id)
    }

    /// Publishes exactly these ports of an endpoint. From a network that nothing comes into none
    /// are, and nobody is told off: engines ask for a container's ports wherever it is.
    ///
    /// # Errors
    /// Refuses an unknown endpoint, and ports as [`Model::publish`] does.
    pub fn expose(
        &mut self,
        id: &str,
        specs: &[PublishSpec],
        facts: &HostFacts,
    ) -> Result<Vec<PublishedPort>, Refusal> {
        self.conceal(id);
        let endpoint = self.endpoint_of_engine(id)?;
        let (id, network) = (endpoint.id, self.network_of(endpoint)?);
        if network.is_closed() {
            return Ok(Vec::new());
        }
        let ports = self.resolve_ports(network, specs, facts)?;
        self.endpoint_mut(id)?.publish(&ports);
        Ok(ports)
    }

    /// Takes all ports of an endpoint back. Returns which one it is, if there is one.
    pub fn conceal(&mut self, id: &str) -> Option<EndpointId> {
        let id = self.endpoint_of_engine(id).ok()?.id;
        self.endpoints.get_mut(&id)?.published.clear();
        Some(id)
    }

    /// Removes an endpoint, if there is one.
    pub fn withdraw(&mut self, id: &str) -> Option<Endpoint> {
        let id = self.endpoint_of_engine(id).ok()?.id;
        self.release(id)
    }

    /// Removes a network, if there is one, and what the engine has forgotten in it.
    ///
    /// # Errors
    /// Refuses one that has endpoints of the user's own, naming them.
    pub fn remove_network_of_engine(&mut self, id: &str) -> Result<Option<Network>, Refusal> {
        let Ok(network) = self.network_of_engine(id) else { return Ok(None) };
        let (id, name) = (network.id, network.name.clone());
        let is_kept = |endpoint: &Endpoint| endpoint.network != id || endpoint.engaged().is_none();
        self.endpoints.retain(|_, endpoint| is_kept(endpoint));
        self.remove_network(&name).map(Some)
    }
}
