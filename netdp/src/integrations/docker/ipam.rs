//! The IPAM driver: subnets and addresses by netdp's own rules, for `--ipam-driver netdp`.
//!
//! Docker asks for an address before it makes the endpoint that has it. What is in the model is known
//! from there; the ledger has what was given and is not in the model yet, so that an agent that starts
//! anew can do without it. Whether an address that Docker names is anybody else's
//! is for the model to say, when the endpoint is made: after a restart of its daemon Docker asks once
//! more for all that it has.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use axum::{Router, extract::State, routing::post};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Answer, Call, DONE, Done, Driver, Reply,
    wire::{address, parse},
};
use crate::{
    api::server::global_id,
    family::{Family, V4, V6},
    ipam,
    model::{Model, Network, Refusal, Subnet},
};

/// Name of the one address space that there is.
const ADDRESS_SPACE: &str = "netdp";

/// Option that says what an address is for.
const ADDRESS_TYPE: &str = "RequestAddressType";
/// What it is for a gateway.
const GATEWAY: &str = "com.docker.network.gateway";

/// What was given and is in no endpoint yet, by subnet.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<BTreeMap<IpNet, Given>>);

/// What was given of one subnet.
#[derive(Debug, Default)]
struct Given {
    addresses: BTreeSet<IpAddr>,
    /// Where the search for the next one goes on.
    next: Option<IpAddr>,
}

/// A subnet and the part of it that addresses are chosen from. Its text is what Docker knows it by, so
/// that it means the same to the next agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pool {
    subnet: IpNet,
    range: IpNet,
}

impl Pool {
    fn id(self) -> String {
        format!("{} {}", self.subnet, self.range)
    }

    fn parse(id: &str) -> Result<Self, Refusal> {
        let (subnet, range) = id
            .split_once(' ')
            .ok_or_else(|| Refusal::invalid(format!("pool {id:?} is none of netdp's")))?;
        Ok(Self { subnet: parse("subnet", subnet)?, range: parse("IP range", range)? })
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RequestPool {
    /// Empty = to be chosen.
    #[serde(default)]
    pool: String,
    /// Empty = all of it.
    #[serde(default)]
    sub_pool: String,
    #[serde(default)]
    v6: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct GivenPool {
    #[serde(rename = "PoolID")]
    pool_id: String,
    pool: String,
    data: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AddressOfPool {
    #[serde(rename = "PoolID")]
    pool_id: String,
    /// Empty = to be chosen.
    #[serde(default)]
    address: String,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
}

impl AddressOfPool {
    /// Whether it is about the gateway, which may be outside of the range that containers are in.
    fn is_gateway(&self) -> bool {
        let kind = self.options.as_ref().and_then(|options| options.get(ADDRESS_TYPE));
        kind.is_some_and(|kind| kind == GATEWAY)
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct GivenAddress {
    /// With the subnet's prefix length.
    address: String,
    data: BTreeMap<String, String>,
}

pub(super) fn router() -> Router<Driver> {
    Router::new()
        .route("/IpamDriver.GetCapabilities", post(capabilities))
        .route("/IpamDriver.GetDefaultAddressSpaces", post(address_spaces))
        .route("/IpamDriver.RequestPool", post(request_pool))
        .route("/IpamDriver.ReleasePool", post(release_pool))
        .route("/IpamDriver.RequestAddress", post(request_address))
        .route("/IpamDriver.ReleaseAddress", post(release_address))
}

async fn capabilities() -> Reply<Value> {
    Reply(json!({ "RequiresMACAddress": false, "RequiresRequestReplay": true }))
}

async fn address_spaces() -> Reply<Value> {
    Reply(json!({
        "LocalDefaultAddressSpace": ADDRESS_SPACE,
        "GlobalDefaultAddressSpace": ADDRESS_SPACE,
    }))
}

async fn request_pool(
    State(driver): State<Driver>,
    Call(request): Call<RequestPool>,
) -> Answer<GivenPool> {
    let subnet = if request.pool.is_empty() {
        let (held, id) = (driver.ledger.subnets(), global_id()?);
        driver
            .controller
            .change(|model, facts| model.propose_subnet(request.v6, &held, id, facts))
            .await?
    } else {
        parse("subnet", &request.pool)?
    };
    let range = match request.sub_pool.as_str() {
        "" => subnet,
        range => parse("IP range", range)?,
    };
    driver.ledger.hold(subnet);
    let pool = Pool { subnet, range };
    let pool = GivenPool { pool_id: pool.id(), pool: subnet.to_string(), data: BTreeMap::new() };
    Ok(Reply(pool))
}

async fn release_pool(
    State(driver): State<Driver>,
    Call(request): Call<AddressOfPool>,
) -> Answer<Done> {
    driver.ledger.release(Pool::parse(&request.pool_id)?.subnet);
    Ok(DONE)
}

async fn request_address(
    State(driver): State<Driver>,
    Call(request): Call<AddressOfPool>,
) -> Answer<GivenAddress> {
    let mut pool = Pool::parse(&request.pool_id)?;
    if request.is_gateway() {
        pool.range = pool.subnet;
    }
    let wanted = match request.address.as_str() {
        "" => None,
        text => Some(address("address", text)?),
    };
    let model = driver.controller.model().await;
    let address = driver.ledger.give(&model, pool, wanted)?;
    let address = format!("{address}/{}", pool.subnet.prefix_len());
    Ok(Reply(GivenAddress { address, data: BTreeMap::new() }))
}

async fn release_address(
    State(driver): State<Driver>,
    Call(request): Call<AddressOfPool>,
) -> Answer<Done> {
    let pool = Pool::parse(&request.pool_id)?;
    driver.ledger.take_back(pool, address("address", &request.address)?);
    Ok(DONE)
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpNet, Given>> {
        // Every change of it is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is held for networks, made or not.
    fn subnets(&self) -> BTreeSet<IpNet> {
        self.lock().keys().copied().collect()
    }

    fn hold(&self, subnet: IpNet) {
        self.lock().entry(subnet).or_default();
    }

    fn release(&self, subnet: IpNet) {
        self.lock().remove(&subnet);
    }

    /// Gives an address of a pool: the one that is wanted, or the next that nobody has.
    fn give(&self, model: &Model, pool: Pool, wanted: Option<IpAddr>) -> Result<IpAddr, Refusal> {
        let mut ledger = self.lock();
        let given = ledger.entry(pool.subnet).or_default();
        let address = match (wanted, pool.subnet, pool.range) {
            (Some(wanted), subnet, _) if subnet.contains(&wanted) => Some(wanted),
            (Some(wanted), subnet, _) => {
                return Err(Refusal::invalid(format!("{wanted} is not in subnet {subnet}")));
            }
            (None, IpNet::V4(subnet), IpNet::V4(range)) => {
                let side = |network: &Network| network.ipv4;
                given.choose::<V4>(model, subnet, range, side).map(IpAddr::V4)
            }
            (None, IpNet::V6(subnet), IpNet::V6(range)) => {
                let side = |network: &Network| network.ipv6;
                given.choose::<V6>(model, subnet, range, side).map(IpAddr::V6)
            }
            (None, subnet, range) => {
                return Err(Refusal::invalid(format!(
                    "IP range {range} is not part of subnet {subnet}: give one that is"
                )));
            }
        };
        let address = address.ok_or_else(|| {
            Refusal::conflict(format!("no address is free in {}: remove a container", pool.range))
        })?;
        given.addresses.insert(address);
        Ok(address)
    }

    fn take_back(&self, pool: Pool, address: IpAddr) {
        if let Some(given) = self.lock().get_mut(&pool.subnet) {
            given.addresses.remove(&address);
        }
    }
}

impl Given {
    /// The next address that neither the ledger nor the model has given to anybody. `side` is the
    /// family's part of a network.
    fn choose<F: Family>(
        &mut self,
        model: &Model,
        subnet: F::Net,
        range: F::Net,
        side: impl Fn(&Network) -> Option<Subnet<F>>,
    ) -> Option<F::Address> {
        let has_subnet =
            |network: &&Network| side(network).is_some_and(|side| side.subnet == subnet);
        let network = model.networks.values().find(has_subnet);
        let mut used: BTreeSet<IpAddr> = self.addresses.clone();
        if let Some(network) = network {
            used.extend(&network.reserved);
            for endpoint in model.endpoints_of(network.id) {
                used.extend(endpoint.ipv4.map(IpAddr::V4));
                used.extend(endpoint.ipv6.map(IpAddr::V6));
            }
        }
        // Docker asks for the gateway first, in a subnet that has no network yet: it is the first.
        let gateway = network.and_then(side).map_or(F::first(subnet), |side| side.gateway);
        let side: Subnet<F> = Subnet {
            subnet,
            gateway,
            range,
            next_address: self.next.and_then(F::of).unwrap_or_else(|| F::first(range)),
            host_binding: None,
            snat_ip: None,
        };
        let used: BTreeSet<F::Address> = used.into_iter().filter_map(F::of).collect();
        let address = ipam::choose_address(&side, &used)?;
        self.next = Some(F::next(address).into());
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests as fixture;

    fn pool(subnet: &str, range: &str) -> Pool {
        Pool { subnet: subnet.parse().unwrap(), range: range.parse().unwrap() }
    }

    #[test]
    fn pools_mean_the_same_to_the_next_agent() {
        for pool in [pool("172.20.0.0/24", "172.20.0.128/25"), pool("fd00:20::/64", "fd00:20::/64")]
        {
            assert_eq!(Pool::parse(&pool.id()), Ok(pool));
        }
        assert!(Pool::parse("LocalDefault/172.17.0.0/16").is_err());
    }

    #[test]
    fn addresses_are_nobody_elses() {
        let mut model = fixture::model_with_network("a");
        model.connect(fixture::connect_spec("a", "A1"), &fixture::host()).unwrap();
        let network = model.networks.values_mut().next().unwrap();
        network.reserved.insert("172.20.0.3".parse().unwrap());
        let ledger = Ledger::default();
        let pool = pool("172.20.0.0/24", "172.20.0.0/29");
        let next = || ledger.give(&model, pool, None).map(|address| address.to_string());
        // .1 is the gateway, .2 A1, .3 reserved.
        assert_eq!(next().unwrap(), "172.20.0.4");
        ledger.give(&model, pool, Some("172.20.0.5".parse().unwrap())).unwrap();
        assert_eq!(next().unwrap(), "172.20.0.6");
        // What comes back is given again last.
        ledger.take_back(pool, "172.20.0.4".parse().unwrap());
        assert_eq!(next().unwrap(), "172.20.0.7");
        assert_eq!(next().unwrap(), "172.20.0.4");
        assert!(next().unwrap_err().message.contains("no address is free"));
        assert!(ledger.give(&model, pool, Some("10.0.0.1".parse().unwrap())).is_err());
    }

    #[test]
    fn gateway_of_a_network_to_come_is_its_first_address() {
        let ledger = Ledger::default();
        let first = |subnet| {
            let pool = pool(subnet, subnet);
            ledger.give(&Model::default(), pool, None).unwrap().to_string()
        };
        assert_eq!(first("10.1.0.0/24"), "10.1.0.1");
        assert_eq!(first("fd00:1::/64"), "fd00:1::1");
    }
}
