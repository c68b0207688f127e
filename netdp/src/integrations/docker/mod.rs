//! Docker's plugin protocol: netdp as the network driver of that name, and as an IPAM driver.
//!
//! Owns the calls (`/NetworkDriver.…`, `/IpamDriver.…`, JSON over HTTP) and how failures are told.
//! Docker repeats calls whose answers it did not get, calls to remove what is gone, and forgets to:
//! the model's operations for engines bear all of that. Docker's own API is never asked from here: its
//! daemon holds locks while it waits for an answer.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Error;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequest, Request, State},
    http::{StatusCode, Uri, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::post,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tracing::{debug, error, info};

use self::wire::{
    CreateEndpoint, CreateNetwork, Endpoint, External, Join, Joined, MadeEndpoint, Network,
};
use crate::{
    api::server::global_id,
    controller::{ChangeError, Controller},
    model::{self, Refusal, engine::short_id},
};

mod ipam;
mod wire;

/// What Docker's own plugins answer with.
const MEDIA_TYPE: &str = "application/vnd.docker.plugins.v1.2+json";

/// What Docker uses, or used on an earlier run: where one of them is, it will ask for its plugins.
const TRACES: [&str; 2] = ["/run/docker", "/var/lib/docker"];

/// Largest call in bytes: Docker says more than a hundred for each port of a container, in every call
/// about one of its endpoints, and all ports of each protocol fit.
const CALL_LIMIT: usize = 64 << 20;

/// Where Docker's daemon looks for a plugin that goes by the name of netdp.
pub const PLUGIN_SOCKET: &str = "/run/docker/plugins/netdp.sock";

/// Whether this host has Docker, running or not.
pub fn is_present() -> bool {
    TRACES.iter().any(|trace| Path::new(trace).exists())
}

/// The network driver, working with an agent's controller.
#[derive(Clone)]
pub struct Driver {
    controller: Controller,
    ledger: Arc<ipam::Ledger>,
}

/// An error on its way out.
#[derive(Debug)]
struct Failure(String);

type Answer<T> = Result<Reply<T>, Failure>;

/// What Docker takes for an answer.
#[derive(Debug)]
struct Reply<T>(T);

/// The answer where there is nothing to say.
const DONE: Reply<Done> = Reply(Done {});

#[derive(Debug, Serialize)]
struct Done {}

impl<T: Serialize> IntoResponse for Reply<T> {
    fn into_response(self) -> Response {
        ([(CONTENT_TYPE, MEDIA_TYPE)], Json(self.0)).into_response()
    }
}

impl IntoResponse for Failure {
    /// Docker shows it to its user, whatever the status code; other codes it has uses of its own for.
    fn into_response(self) -> Response {
        // The first is what network drivers are read for, the second what IPAM drivers are.
        Reply(json!({ "Err": self.0, "Error": self.0 })).into_response()
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        info!("refused to Docker: {refusal}");
        Self(refusal.message)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let error = format!("{error:#}");
        error!("{error}");
        Self(error)
    }
}

impl From<ChangeError> for Failure {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Refused(refusal) => refusal.into(),
            ChangeError::Failed(error) => error.into(),
        }
    }
}

/// What a call says.
struct Call<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Call<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let name = request.uri().path().trim_start_matches('/').to_owned();
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(|rejection| Failure(format!("read {name}: {}", rejection.body_text())))?;
        debug!(call = name, body = %String::from_utf8_lossy(&bytes), "called by Docker");
        // Docker 28 repeats a call that broke off, and has read what to say to its end by then.
        if bytes.is_empty() {
            let reason = "the agent went away in the middle of it, and Docker repeats it empty";
            return Err(Failure(format!("read {name}: {reason}: try again")));
        }
        let value = serde_json::from_slice(&bytes)
            .map_err(|error| Failure(format!("read {name}: {error}")))?;
        Ok(Self(value))
    }
}

impl Driver {
    /// Serves networks of this controller.
    pub fn new(controller: Controller) -> Self {
        Self { controller, ledger: Arc::default() }
    }

    /// All calls.
    pub fn router(self) -> Router {
        Router::new()
            .route("/Plugin.Activate", post(activate))
            .route("/NetworkDriver.GetCapabilities", post(capabilities))
            .route("/NetworkDriver.CreateNetwork", post(create_network))
            .route("/NetworkDriver.DeleteNetwork", post(delete_network))
            .route("/NetworkDriver.CreateEndpoint", post(create_endpoint))
            .route("/NetworkDriver.DeleteEndpoint", post(delete_endpoint))
            .route("/NetworkDriver.EndpointOperInfo", post(endpoint_info))
            .route("/NetworkDriver.Join", post(join))
            .route("/NetworkDriver.Leave", post(leave))
            .route("/NetworkDriver.ProgramExternalConnectivity", post(expose))
            .route("/NetworkDriver.RevokeExternalConnectivity", post(conceal))
            // Those are for drivers that span several hosts.
            .route("/NetworkDriver.AllocateNetwork", post(nothing))
            .route("/NetworkDriver.FreeNetwork", post(nothing))
            .route("/NetworkDriver.DiscoverNew", post(nothing))
            .route("/NetworkDriver.DiscoverDelete", post(nothing))
            .merge(ipam::router())
            .fallback(unknown)
            .layer(DefaultBodyLimit::max(CALL_LIMIT))
            .with_state(self)
    }
}

/// Docker takes 404 for a call that a driver does without.
async fn unknown(uri: Uri) -> (StatusCode, Failure) {
    (StatusCode::NOT_FOUND, Failure(format!("netdp has no {}", uri.path())))
}

async fn activate() -> Reply<serde_json::Value> {
    info!("Docker takes netdp for a driver");
    Reply(json!({ "Implements": ["NetworkDriver", "IpamDriver"] }))
}

async fn capabilities() -> Reply<serde_json::Value> {
    Reply(json!({ "Scope": "local", "ConnectivityScope": "local" }))
}

async fn nothing() -> Reply<Done> {
    DONE
}

async fn create_network(
    State(driver): State<Driver>,
    Call(request): Call<CreateNetwork>,
) -> Answer<Done> {
    let spec = request.into_spec(global_id()?)?;
    let (name, bridge) = driver
        .controller
        .change(move |model, facts| {
            let id = spec.engine_id.as_deref().unwrap_or_default();
            if model.network_of_engine(id).is_err() {
                model.create_network(spec.clone(), facts)?;
            }
            let network = model.network_of_engine(id)?;
            Ok((network.name.clone(), network.bridge.clone()))
        })
        .await?;
    info!("created network {name} of Docker's on {bridge}");
    Ok(DONE)
}

async fn delete_network(
    State(driver): State<Driver>,
    Call(Network { id }): Call<Network>,
) -> Answer<Done> {
    let removed = driver.controller.change(|model, _| model.remove_network_of_engine(&id)).await?;
    match removed {
        Some(network) => info!("removed network {} of Docker's", network.name),
        None => info!("Docker removes network {}, which is gone", short_id(&id)),
    }
    Ok(DONE)
}

async fn create_endpoint(
    State(driver): State<Driver>,
    Call(request): Call<CreateEndpoint>,
) -> Answer<MadeEndpoint> {
    let asked = request.interface.clone().unwrap_or_default();
    let spec = request.into_spec()?;
    let endpoint = driver
        .controller
        .change(move |model, facts| {
            model.offer(spec.clone(), facts)?;
            model.endpoint_of_engine(&spec.id).cloned()
        })
        .await?;
    info!("offered {} to Docker as {}", endpoint.name, endpoint.interface);
    let model = driver.controller.model().await;
    Ok(Reply(MadeEndpoint::of(&model, &endpoint, &asked)))
}

async fn delete_endpoint(
    State(driver): State<Driver>,
    Call(Endpoint { id, .. }): Call<Endpoint>,
) -> Answer<Done> {
    let withdrawn = driver.controller.change(|model, _| Ok(model.withdraw(&id))).await?;
    if let Some(model::Endpoint { name, .. }) = withdrawn {
        info!("withdrew {name}");
    }
    Ok(DONE)
}

async fn endpoint_info(Call(_): Call<Endpoint>) -> Reply<serde_json::Value> {
    Reply(json!({ "Value": {} }))
}

async fn join(State(driver): State<Driver>, Call(request): Call<Join>) -> Answer<Joined> {
    let Join { endpoint: Endpoint { id, .. }, sandbox } = request;
    let sandbox = PathBuf::from(sandbox);
    driver.controller.change(|model, _| model.take(&id, sandbox.clone()).map(drop)).await?;
    let model = driver.controller.model().await;
    let endpoint = model.endpoint_of_engine(&id)?;
    Ok(Reply(Joined::of(&model, endpoint)))
}

async fn leave(
    State(driver): State<Driver>,
    Call(Endpoint { id, .. }): Call<Endpoint>,
) -> Answer<Done> {
    driver.controller.change(|model, _| Ok(model.leave(&id))).await?;
    Ok(DONE)
}

async fn expose(State(driver): State<Driver>, Call(request): Call<External>) -> Answer<Done> {
    let specs = request.ports()?;
    let id = &request.endpoint.id;
    let ports = driver.controller.change(|model, facts| model.expose(id, &specs, facts)).await?;
    if !ports.is_empty() {
        let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
        info!("published of {}: {}", short_id(id), ports.join(", "));
    }
    Ok(DONE)
}

async fn conceal(
    State(driver): State<Driver>,
    Call(Endpoint { id, .. }): Call<Endpoint>,
) -> Answer<Done> {
    driver.controller.change(|model, _| Ok(model.conceal(&id))).await?;
    Ok(DONE)
}
