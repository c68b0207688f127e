//! `netdp agent`: from a command line to a running agent, and its orderly end.
//!
//! Owns the order of starting and stopping. A stop leaves the datapath as it is.

use std::{
    env,
    fs::{self, DirBuilder},
    io::{self, IsTerminal},
    os::{
        fd::AsRawFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::DirBuilderExt,
            net::{SocketAddr, UnixListener},
        },
    },
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, UnixCredentials, connect, getsockopt, socket,
    sockopt::PeerCredentials,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::spawn_blocking,
    time::sleep,
};
use tracing::{info, level_filters::LevelFilter, warn};
use tracing_subscriber::EnvFilter;

use super::{doctor::missing_rights, print};
use crate::{
    api::{
        server::{Api, Socket},
        wire,
    },
    config::{Config, DataplaneChoice, DockerSocket, Paths, Switch},
    controller::{Controller, Snapshot},
    dataplane::{
        ebpf::{EbpfOptions, cgroup2_mount},
        select::{self, Selected, select},
    },
    integrations::docker,
    store::Store,
};

/// How long requests may go on after the agent was told to stop.
const GRACE: Duration = Duration::from_secs(5);

pub(super) fn run(config: &Config, socket: &Path) -> Result<()> {
    config.check()?;
    check_rights()?;
    start_logging();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the async runtime")?
        .block_on(serve(config, socket))
}

pub(super) fn check_rights() -> Result<()> {
    let missing = missing_rights()?;
    if !missing.is_empty() {
        bail!("this needs {}: run it as root", missing.join(", "));
    }
    Ok(())
}

/// Opens the store, its directory made if need be.
pub(super) fn open_store(paths: &Paths) -> Result<Store> {
    make_directory(&paths.state_dir, 0o700)?;
    Store::open(&paths.state_dir)
}

/// Opens the backend that this configuration means.
pub(super) fn open_dataplane(config: &Config) -> Result<Selected> {
    let cgroup = match &config.paths.cgroup {
        Some(cgroup) => Some(cgroup.clone()),
        None => cgroup2_mount()?,
    };
    if cgroup.is_none() && config.dataplane != DataplaneChoice::Iptables {
        warn!(
            "programs of this host don't reach published ports: no cgroup2 hierarchy is mounted; \
             mount one, or name one with --cgroup"
        );
    }
    let options = EbpfOptions {
        bpffs: config.paths.bpffs.clone(),
        flows: config.flows,
        timeouts: config.timeouts(),
        cgroup,
        fast_path: config.fast_path == Switch::On,
    };
    select(config.dataplane, options)
}

/// Takes away what the other backend left, now that this one enforces everything.
async fn purge_others(controller: &Controller, paths: &Paths, kept: &'static str) -> Result<()> {
    let (program, bpffs) = (controller.snapshot().program, paths.bpffs.clone());
    let purge = move || select::purge_others(kept, &program, &bpffs);
    if let Err(error) = spawn_blocking(purge).await.context("finish the purge")? {
        // What is left of it enforces more, not less.
        warn!("{error:#}");
    }
    Ok(())
}

/// Name of the abstract socket by which an agent claims its network namespace.
const CLAIM: &str = "netdp-agent";

/// Keeps a second agent, whatever its directories, off this network namespace: each would take
/// the other's interfaces for orphans. Abstract sockets belong to a network namespace and go with
/// their process. Anybody may have one of our name, so only root's counts.
///
/// # Errors
/// There is an agent already.
pub(super) fn claim_namespace() -> Result<()> {
    let address = SocketAddr::from_abstract_name(CLAIM).context("name the claim")?;
    match UnixListener::bind_addr(&address) {
        Ok(listener) => {
            // For as long as the process lives: who asks gets our credentials, and no more.
            thread::Builder::new()
                .name("claim".into())
                .spawn(move || listener.incoming().for_each(drop))
                .context("start a thread for the claim")?;
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match claimant() {
            Ok(rival) if rival.uid() == 0 => bail!(
                "another netdp agent (pid {}) runs in this network namespace: stop it first",
                rival.pid()
            ),
            _ => {
                warn!("a process without rights claims to be an agent (@{CLAIM}): ignoring it");
                Ok(())
            }
        },
        Err(error) => Err(error).context("claim the network namespace"),
    }
}

/// Who has claimed the namespace. Does not wait: the other side may mean ill.
fn claimant() -> nix::Result<UnixCredentials> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new_abstract(CLAIM.as_bytes())?)?;
    getsockopt(&socket, PeerCredentials)
}

async fn serve(config: &Config, path: &Path) -> Result<()> {
    // First what keeps a second agent from touching anything.
    claim_namespace()?;
    let store = open_store(&config.paths)?;
    make_directory(&config.paths.run_dir, 0o755)?;
    let socket = Socket::bind(path).await?;
    let dataplane = open_dataplane(config)?;
    let controller = Controller::open(config, store, Box::new(dataplane)).await?;
    let backend = controller.backend().await?;
    purge_others(&controller, &config.paths, backend.name).await?;
    print(&format!("{}\n", ready(&controller.snapshot())))?;

    let docker = docker_socket(config).await?;
    let driver = docker::Driver::new(controller.clone());
    let api = Api::new(controller, backend);
    let purged = api.purged();
    let stop_docker = stop(purged.clone());
    let serve_docker = async {
        match docker {
            Some(docker) => docker.serve(driver.router(), stop_docker).await,
            None => Ok(()),
        }
    };
    let serve_clients = socket.serve(api.router(), stop(purged.clone()));
    let overdue = async {
        stop(purged.clone()).await;
        info!("stopping");
        sleep(GRACE).await;
    };
    tokio::select! {
        served = async { tokio::try_join!(serve_clients, serve_docker) } => drop(served?),
        () = overdue => warn!("a request takes too long: stopping without its answer"),
    }
    if *purged.borrow() {
        remove_traces(&config.paths, path)?;
    }
    Ok(())
}

/// Listens for Docker, if this agent is to serve it. What nobody has asked for by name stands in no
/// agent's way.
async fn docker_socket(config: &Config) -> Result<Option<Socket>> {
    let (path, is_asked_for) = match &config.docker_socket {
        DockerSocket::At(path) => (path.as_path(), true),
        DockerSocket::Auto if config.paths.is_default_agent() && docker::is_present() => {
            (Path::new(docker::PLUGIN_SOCKET), false)
        }
        DockerSocket::Auto | DockerSocket::Off => return Ok(None),
    };
    let listen = async {
        if let Some(parent) = path.parent() {
            // As Docker's daemon makes it, which may come later.
            make_directory(parent, 0o700)?;
        }
        Socket::bind(path).await
    };
    match listen.await.with_context(|| format!("serve Docker at {}", path.display())) {
        Ok(socket) => {
            info!("serving Docker at {}", path.display());
            Ok(Some(socket))
        }
        Err(error) if is_asked_for => Err(error),
        Err(error) => {
            warn!("{error:#}");
            Ok(None)
        }
    }
}

/// Removes what only a running or returning agent needs.
pub(super) fn remove_traces(paths: &Paths, socket: &Path) -> Result<()> {
    Store::remove(&paths.state_dir)?;
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove socket {}", socket.display()));
        }
        _ => {}
    }
    // What else is in the directory is not ours, and keeps it.
    let _not_empty = fs::remove_dir(&paths.run_dir);
    Ok(())
}

/// Waits until the agent is told to stop: by a signal, or by a client that purged everything.
async fn stop(mut purged: watch::Receiver<bool>) {
    let signalled = async {
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(mut terminate), Ok(mut interrupt)) => {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            }
            // Without handlers the kernel's own treatment is in force: the process ends.
            _ => std::future::pending().await,
        }
    };
    tokio::select! {
        () = signalled => {}
        // An error says that nobody can purge any more, which is as good as being told to stop.
        _ = purged.wait_for(|&purged| purged) => {}
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("create directory {}", path.display()))
}

/// To standard error; what the user asks for in `NETDP_LOG`, "info" otherwise. The journal has
/// its own timestamps.
fn start_logging() {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .with_env_var("NETDP_LOG")
        .from_env_lossy();
    let logging = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    if env::var_os("JOURNAL_STREAM").is_some() {
        logging.without_time().init();
    } else {
        logging.init();
    }
}

/// The line that says that the agent answers from now on.
fn ready(snapshot: &Snapshot) -> String {
    let uplinks: Vec<String> = wire::Uplink::of(&snapshot.program, &snapshot.facts)
        .iter()
        .map(ToString::to_string)
        .collect();
    let uplinks = match &uplinks[..] {
        // None is worked with before there is a network to lead out of.
        [] if snapshot.model.networks.is_empty() => String::new(),
        [] => ", no uplinks".to_owned(),
        [uplink] => format!(", uplink {uplink}"),
        _ => format!(", uplinks {}", uplinks.join(", ")),
    };
    let networks = count(snapshot.model.networks.len(), "network");
    let endpoints = count(snapshot.model.endpoints.len(), "endpoint");
    format!("netdp ready: {networks}, {endpoints}{uplinks}")
}

fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}
