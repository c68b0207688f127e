//! The agent's side: routes, the socket, and handlers that hand over to the controller.
//!
//! Owns who may connect, here and at other sockets of the agent's, and what becomes of a request that
//! is no good. Decides nothing else.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context, Result, bail};
use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequest, Path as Segments, Query, Request, State},
    http::{Method, StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use serde::de::DeserializeOwned;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};
use tracing::{error, info};

use super::{
    BODY_LIMIT,
    wire::{self, ErrorKind},
};
use crate::{
    controller::{Backend, ChangeError, Controller},
    dataplane::Lanes,
    model::{self, Refusal},
    netlink::namespace,
};

/// What handlers work with.
#[derive(Clone)]
pub struct Api {
    controller: Controller,
    backend: Backend,
    purged: watch::Sender<bool>,
}

/// An error on its way out.
#[derive(Debug)]
struct Failure(wire::Error);

type Answer<T> = Result<Json<T>, Failure>;

impl Api {
    /// Serves this controller, which has this backend.
    pub fn new(controller: Controller, backend: Backend) -> Self {
        Self { controller, backend, purged: watch::Sender::new(false) }
    }

    /// Becomes true when a client has purged everything: the agent has nothing left to do.
    pub fn purged(&self) -> watch::Receiver<bool> {
        self.purged.subscribe()
    }

    /// All routes.
    pub fn router(self) -> Router {
        Router::new()
            .route("/v1/networks", get(list_networks).post(create_network))
            .route("/v1/networks/{network}", get(inspect_network).delete(remove_network))
            .route("/v1/networks/{network}/endpoints", post(connect))
            .route("/v1/networks/{network}/endpoints/{endpoint}", delete(disconnect))
            .route(
                "/v1/networks/{network}/policy",
                get(show_policy).put(set_policy).post(add_rules),
            )
            .route("/v1/networks/{network}/policy/{number}", delete(remove_rule))
            .route("/v1/publish", post(publish))
            .route("/v1/unpublish", post(unpublish))
            .route("/v1/flows", get(flows))
            .route("/v1/status", get(status))
            .route("/v1/check", get(check))
            .route("/v1/purge", post(purge))
            .fallback(unknown_path)
            .method_not_allowed_fallback(wrong_method)
            .layer(DefaultBodyLimit::max(BODY_LIMIT))
            .with_state(self)
    }
}

/// A socket that clients can connect to; dropped, it is gone.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            error!(path = %self.0.display(), %error, "could not remove the socket");
        }
    }
}

impl Socket {
    /// Listens at a path, for root and root's group only. A socket that nobody answers on is
    /// replaced.
    ///
    /// # Errors
    /// Fails when another agent answers there, and when the directory can't be written.
    pub async fn bind(path: &Path) -> Result<Self> {
        if UnixStream::connect(path).await.is_ok() {
            bail!(
                "another agent answers on {}: stop it, or give this one its own --run-dir",
                path.display()
            );
        }
        // Under another name until the mode is right: nobody gets in between.
        let unfinished = path.with_extension("new");
        let prepare = || -> Result<UnixListener> {
            if unfinished.exists() {
                fs::remove_file(&unfinished)?;
            }
            let listener = UnixListener::bind(&unfinished)?;
            fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o660))?;
            fs::rename(&unfinished, path)?;
            Ok(listener)
        };
        let listener = prepare().with_context(|| format!("listen on {}", path.display()))?;
        Ok(Self { listener, file: SocketFile(path.to_owned()) })
    }

    /// Answers requests until `stop` is done; those under way are finished.
    ///
    /// # Errors
    /// Fails when the socket does.
    pub async fn serve(
        self,
        router: Router,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Result<()> {
        let Self { listener, file } = self;
        axum::serve(listener, router)
            .with_graceful_shutdown(stop)
            .await
            .with_context(|| format!("serve {}", file.0.display()))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.0)).into_response()
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self(refusal.into())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        let error = format!("{error:#}");
        error!("{error}");
        Self(wire::Error { error, kind: ErrorKind::Failed })
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

/// A JSON body, whatever its content type is said to be.
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            Refusal::invalid(match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => {
                    format!("the request is larger than {} MiB: send less", BODY_LIMIT >> 20)
                }
                _ => format!("read the request: {}", rejection.body_text()),
            })
        })?;
        let value = serde_json::from_slice(&bytes)
            .map_err(|error| Refusal::invalid(format!("the request's JSON is no good: {error}")))?;
        Ok(Self(value))
    }
}

async fn unknown_path(method: Method, uri: Uri) -> Failure {
    Refusal::not_found(format!("there is no {method} {}: paths begin with /v1", uri.path())).into()
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    Refusal::invalid(format!("{method} is not for {}", uri.path())).into()
}

async fn list_networks(State(api): State<Api>) -> Json<Vec<wire::Network>> {
    let model = api.controller.model().await;
    Json(model.networks.values().map(|network| wire::Network::of(&model, network)).collect())
}

async fn inspect_network(
    State(api): State<Api>,
    Segments(name): Segments<String>,
) -> Answer<wire::NetworkDetail> {
    let model = api.controller.model().await;
    Ok(Json(wire::NetworkDetail::of(&model, model.network(&name)?)))
}

async fn create_network(
    State(api): State<Api>,
    Body(request): Body<wire::CreateNetwork>,
) -> Result<(StatusCode, Json<wire::Network>), Failure> {
    let spec = request.into_spec(global_id()?)?;
    let network = api
        .controller
        .change(move |model, facts| {
            let name = spec.name.clone();
            model.create_network(spec.clone(), facts)?;
            Ok(wire::Network::of(model, model.network(&name)?))
        })
        .await?;
    let wire::Settings { name, bridge, subnets, .. } = &network.settings;
    info!("created network {name}: {} on {bridge}", subnets.join(", "));
    Ok((StatusCode::CREATED, Json(network)))
}

/// What RFC 4193, section 3.2, wants of a global ID: that nobody can guess it and no two hosts are
/// likely to have the same one.
pub(crate) fn global_id() -> Result<[u8; 5]> {
    const SOURCE: &str = "/dev/urandom";

    let mut id = [0; 5];
    File::open(SOURCE)
        .and_then(|mut file| file.read_exact(&mut id))
        .with_context(|| format!("read {SOURCE}"))?;
    Ok(id)
}

async fn remove_network(
    State(api): State<Api>,
    Segments(name): Segments<String>,
) -> Result<StatusCode, Failure> {
    let network = api.controller.change(|model, _| model.remove_network(&name)).await?;
    info!("removed network {}", network.name);
    Ok(StatusCode::NO_CONTENT)
}

async fn connect(
    State(api): State<Api>,
    Segments(network): Segments<String>,
    Body(request): Body<wire::Connect>,
) -> Result<(StatusCode, Json<wire::Endpoint>), Failure> {
    let netns = request.netns_path()?;
    if !netns.exists() {
        return Err(Refusal::not_found(format!(
            "there is no network namespace {}: give a path, or a name that `ip netns` shows",
            netns.display()
        ))
        .into());
    }
    let survey =
        namespace::survey(&netns).await.map_err(|error| Refusal::invalid(format!("{error:#}")))?;
    if namespace::is_still(Path::new("/proc/self/ns/net"), survey.identity) {
        return Err(Refusal::invalid(format!(
            "{} is the host's own network namespace: give a container's",
            netns.display()
        ))
        .into());
    }
    let spec = request.into_spec(network, netns, survey)?;
    let endpoint = api
        .controller
        .change(move |model, facts| {
            let network = spec.network.clone();
            let id = model.connect(spec.clone(), facts)?;
            let network = model.network(&network)?;
            let gateways = model.gateway_endpoints();
            let endpoint = model.endpoints.get(&id);
            let endpoint = endpoint.map(|e| wire::Endpoint::of(network, e, &gateways));
            endpoint.ok_or_else(|| Refusal::not_found("the endpoint is gone already"))
        })
        .await?;
    let wire::Endpoint { name, network, addresses, netns, .. } = &endpoint;
    info!("connected {name} to network {network}: {} in {netns}", addresses.join(", "));
    Ok((StatusCode::CREATED, Json(endpoint)))
}

async fn disconnect(
    State(api): State<Api>,
    Segments((network, name)): Segments<(String, String)>,
) -> Result<StatusCode, Failure> {
    api.controller.change(|model, _| model.disconnect(&network, &name)).await?;
    info!("disconnected {name} from network {network}");
    Ok(StatusCode::NO_CONTENT)
}

async fn publish(
    State(api): State<Api>,
    Body(request): Body<wire::Publish>,
) -> Answer<Vec<wire::Published>> {
    let wire::Publish { name, network, .. } = &request;
    let specs = wire::ports(&request.ports)?;
    let ports = api
        .controller
        .change(|model, facts| model.publish(name, network.as_deref(), &specs, facts))
        .await?;
    info!("published of {name}: {}", summary(&ports));
    Ok(Json(ports.into_iter().map(wire::Published::from).collect()))
}

async fn unpublish(
    State(api): State<Api>,
    Body(request): Body<wire::Publish>,
) -> Answer<Vec<wire::Published>> {
    let wire::Publish { name, network, .. } = &request;
    let specs = wire::ports(&request.ports)?;
    let ports =
        api.controller.change(|model, _| model.unpublish(name, network.as_deref(), &specs)).await?;
    info!("no longer published of {name}: {}", summary(&ports));
    Ok(Json(ports.into_iter().map(wire::Published::from).collect()))
}

/// Ports for the log: the first few, and how many more.
fn summary(ports: &[model::PublishedPort]) -> String {
    const SHOWN: usize = 4;
    let mut words: Vec<String> = ports.iter().take(SHOWN).map(ToString::to_string).collect();
    if ports.len() > SHOWN {
        words.push(format!("{} more", ports.len() - SHOWN));
    }
    words.join(", ")
}

async fn show_policy(
    State(api): State<Api>,
    Segments(network): Segments<String>,
) -> Answer<Vec<wire::NumberedRule>> {
    let model = api.controller.model().await;
    Ok(Json(wire::NumberedRule::of(&model.network(&network)?.policy)))
}

async fn set_policy(
    State(api): State<Api>,
    Segments(network): Segments<String>,
    Body(request): Body<wire::Policy>,
) -> Answer<Vec<wire::NumberedRule>> {
    let rules = model::policy::parse(&request.text)?;
    change_policy(&api, &network, |model| model.set_policy(&network, rules.clone())).await
}

async fn add_rules(
    State(api): State<Api>,
    Segments(network): Segments<String>,
    Body(request): Body<wire::Policy>,
) -> Answer<Vec<wire::NumberedRule>> {
    let rules = model::policy::parse(&request.text)?;
    change_policy(&api, &network, |model| model.add_rules(&network, &rules)).await
}

async fn remove_rule(
    State(api): State<Api>,
    Segments((network, number)): Segments<(String, String)>,
) -> Answer<Vec<wire::NumberedRule>> {
    let number = number.parse().map_err(|_| {
        Refusal::invalid(format!("{number:?} is no rule's number: `netdp policy show` has them"))
    })?;
    change_policy(&api, &network, |model| model.remove_rule(&network, number).map(drop)).await
}

/// Changes a network's policy and answers with the whole of it.
async fn change_policy(
    api: &Api,
    network: &str,
    operation: impl Fn(&mut model::Model) -> Result<(), Refusal> + Send + Sync,
) -> Answer<Vec<wire::NumberedRule>> {
    let rules = api
        .controller
        .change(|model, _| {
            operation(model)?;
            Ok(wire::NumberedRule::of(&model.network(network)?.policy))
        })
        .await?;
    info!("changed the policy of network {network}: {} rules", rules.len());
    Ok(Json(rules))
}

async fn flows(
    State(api): State<Api>,
    query: Result<Query<wire::FlowsQuery>, axum::extract::rejection::QueryRejection>,
) -> Answer<Vec<wire::Flow>> {
    let Query(query) = query.map_err(|error| Refusal::invalid(error.body_text()))?;
    let model = api.controller.model().await;
    let wanted = query.network.map(|name| model.network(&name).map(|network| network.id));
    let wanted = wanted.transpose()?;
    let flows = api.controller.flows().await?;
    let is_wanted = |id| wanted.is_none_or(|wanted| wanted == id);
    let flows = flows.iter().filter(|flow| is_wanted(flow.network));
    Ok(Json(flows.map(|flow| wire::Flow::of(&model, flow)).collect()))
}

async fn status(State(api): State<Api>) -> Answer<wire::Status> {
    // A backend may have given way to another one since the agent began.
    let backend = api.controller.backend().await.unwrap_or(api.backend);
    let snapshot = api.controller.snapshot();
    let counters = api.controller.counters().await?;
    let lanes = api.controller.lanes().await?;
    let flows = api.controller.flows().await?.len();
    let model = &snapshot.model;
    Ok(Json(wire::Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        dataplane: backend.name.to_owned(),
        dataplane_reason: backend.reason,
        pid: process::id(),
        networks: model.networks.len(),
        endpoints: model.endpoints.len(),
        published: model.endpoints.values().map(|endpoint| endpoint.published.len()).sum(),
        flows,
        flow_tables: snapshot.flow_tables.iter().map(wire::FlowTable::from).collect(),
        lanes: lanes.map(|Lanes { fast, stack }| wire::Lanes { fast, stack }),
        uplinks: wire::Uplink::of(&snapshot.program, &snapshot.facts),
        counters: counters.iter().map(|count| wire::Counter::of(model, count)).collect(),
        troubles: snapshot.troubles,
        alarms: snapshot.alarms,
        features: backend.features.iter().map(wire::Feature::from).collect(),
    }))
}

async fn check(State(api): State<Api>) -> Answer<Vec<String>> {
    let drift = api.controller.check().await?;
    Ok(Json(drift.into_iter().map(|drift| drift.what).collect()))
}

async fn purge(State(api): State<Api>) -> Answer<wire::Purged> {
    let purged = wire::Purged::of(&*api.controller.model().await);
    api.controller.purge().await?;
    info!("purged everything: stopping");
    api.purged.send_replace(true);
    Ok(Json(purged))
}
