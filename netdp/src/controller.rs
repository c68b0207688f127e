//! The agent's heart: holds the model, changes it, and keeps the kernel in agreement with it.
//!
//! Owns the order of a change (refuse, reserve, kernel, store), going back where one fails, and the
//! loop that answers to the kernel's events. What has to exist is the planner's to say, how it is
//! made is netlink's and the backend's; wire formats are unknown here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use anyhow::{Context, Error, Result, anyhow};
use thiserror::Error;
use tokio::{
    select,
    sync::{Mutex, OwnedMutexGuard, watch},
    task::AbortHandle,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, info, warn};

use self::{
    alarms::{About, Alarm, alarms, unheard},
    blocking::Blocking,
    converge::{Dressed, Failure, Settled, Subject},
};
use crate::{
    config::Config,
    dataplane::{
        Count, Dataplane, Drift, FlowRecord, FlowTable, KernelFeature, Lanes, Nature, Program,
        PublishedKey,
    },
    facts::HostFacts,
    loopback::{self, Loopback},
    model::{Endpoint, EndpointId, Model, Netns, Place, Refusal},
    netlink::{
        Netlink,
        events::{Events, Word},
        namespace,
    },
    plan::{Setting, blank, link_drift, plan, reservations},
    ports::{Keeper, PortError, Prepared, Reservations},
    runs::Runs,
    store::Store,
};

mod alarms;
mod blocking;
mod converge;
mod sysctls;

/// How often flows are collected, and facts read again in case an event got lost.
const TICK: Duration = Duration::from_secs(5);

/// How many ticks pass between two comparisons of the backend's objects: reading all maps costs
/// more than a look at the links.
const TICKS_TO_COMPARE: u64 = 3;

/// How long nobody may have changed a link before a blank is made. It takes the lock that all changes
/// of links and addresses take, and whoever starts a container makes a dozen of them.
const QUIET: Duration = Duration::from_millis(50);

/// How long no other blank is made after one that nobody was given: it could not be made, or somebody
/// who sets new links up has spoiled it, and would spoil the next one, too.
const BLANK_PAUSE: Duration = Duration::from_secs(60);

/// Handle to the one controller of an agent; clones are the same one. The last one that goes ends
/// the loop, and leaves the kernel as it is: networks outlive the agent.
#[derive(Clone)]
pub struct Controller {
    shared: Arc<Shared>,
}

struct Shared {
    /// Held for the whole of a change or a repair: there is one at a time.
    state: Arc<Mutex<State>>,
    /// What readers see, without waiting for a change that is under way.
    snapshot: watch::Receiver<Snapshot>,
    /// Beside the state, so that counters can be read during a change.
    dataplane: Arc<Blocking<Box<dyn Dataplane>>>,
    background: AbortHandle,
}

/// What the controller knew when it last finished something.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The desired state.
    pub model: Arc<Model>,
    /// The host.
    pub facts: Arc<HostFacts>,
    /// What the backend enforces; its uplinks are the ones in use.
    pub program: Arc<Program>,
    /// What could not be repaired so far, one line each.
    pub troubles: Vec<String>,
    /// What the operator should know of and the agent can't repair, one line each.
    pub alarms: Vec<String>,
    /// How full the flow tables were when flows were last collected.
    pub flow_tables: Vec<FlowTable>,
}

struct State {
    model: Arc<Model>,
    /// As of the end of the last pass.
    facts: HostFacts,
    setting: Setting,
    program: Arc<Program>,
    /// Of the backend, as it was when that was last told what to do.
    nature: Nature,
    troubles: Vec<String>,
    /// As of the last collection.
    flow_tables: Vec<FlowTable>,
    /// Alarms that are in the log already.
    heard: BTreeSet<About>,
    /// What the last pass made right; `None` where something was left undone.
    settled: Option<Settled>,
    /// See [`BLANK_PAUSE`]; `None` once a blank was given.
    no_blank_before: Option<Instant>,
    /// Endpoints whose container's end was made right by this agent.
    dressed: BTreeMap<EndpointId, Dressed>,
    netlink: Netlink,
    store: Blocking<Store>,
    reservations: Blocking<Reservations>,
    loopback: Loopback,
    dataplane: Arc<Blocking<Box<dyn Dataplane>>>,
    snapshot: watch::Sender<Snapshot>,
}

/// What a change leads to.
struct Target {
    model: Arc<Model>,
    /// The host ports that it wants.
    ports: Arc<Runs<PublishedKey, ()>>,
}

/// What enforces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// "ebpf", "iptables".
    pub name: &'static str,
    /// Why it is this one.
    pub reason: String,
    /// What it asks of the kernel.
    pub features: Vec<KernelFeature>,
}

/// Why a change did not happen. Either way, nothing changed.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// The request can't be granted.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The request is fine and could not be carried out.
    #[error("{0:#}")]
    Failed(#[from] Error),
}

impl Controller {
    /// Loads the model, makes the kernel agree with it, and starts to answer to the kernel's
    /// events. To be called in the host's network namespace, inside a tokio runtime whose threads
    /// are in it too.
    ///
    /// # Errors
    /// Fails where the store or netlink can't be read, or the backend refuses the program. A single
    /// network or endpoint that can't be restored is logged and retried instead.
    pub async fn open(
        config: &Config,
        store: Store,
        dataplane: Box<dyn Dataplane>,
    ) -> Result<Self> {
        let netlink = Netlink::open_watching()?;
        // Before the first reading: what changes after it must not go unnoticed.
        let events = Events::subscribe()?;
        let facts = netlink.read_facts().await?;
        let store = Blocking::new(store);
        let model = store.call(|store| store.load()).await??;
        let originals = store.call(|store| store.remembered_sysctls()).await??;
        let nature = dataplane.nature();
        let dataplane = Arc::new(Blocking::new(dataplane));
        let (snapshot, readable) = watch::channel(Snapshot::default());
        let mut state = State {
            model: Arc::new(model),
            facts,
            setting: Setting {
                uplinks: config.uplinks.iter().cloned().collect(),
                originals,
                filters_bridges: false,
                keeps_blank: false,
            },
            program: Arc::default(),
            nature,
            troubles: Vec::new(),
            flow_tables: Vec::new(),
            heard: BTreeSet::new(),
            settled: None,
            no_blank_before: None,
            dressed: BTreeMap::new(),
            netlink,
            store,
            reservations: Blocking::new(Reservations::new()),
            loopback: Loopback::default(),
            dataplane: Arc::clone(&dataplane),
            snapshot,
        };
        let failures = state.repair(state.facts.clone()).await?;
        let is_backend = |failure: &Failure| failure.subject == Subject::Backend;
        if let Some(failure) = failures.into_iter().find(is_backend) {
            return Err(failure.into_error());
        }
        state.publish();
        let state = Arc::new(Mutex::new(state));
        let background = tokio::spawn(keep(Arc::downgrade(&state), events)).abort_handle();
        let shared = Arc::new(Shared { state, snapshot: readable, dataplane, background });
        Ok(Self { shared })
    }

    /// The desired state.
    pub async fn model(&self) -> Arc<Model> {
        Arc::clone(&self.shared.snapshot.borrow().model)
    }

    /// The host as it was last seen, which is milliseconds after its last change.
    pub async fn facts(&self) -> HostFacts {
        HostFacts::clone(&self.shared.snapshot.borrow().facts)
    }

    /// All that there is to see without waiting.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.snapshot.borrow().clone()
    }

    /// One transaction: runs the operation on a copy of the model, makes the kernel agree, stores
    /// it. Where anything fails, kernel, model and store go back to what they were. Once the
    /// operation was granted, the change goes on even if the caller drops the future.
    ///
    /// The operation runs again where it chose a port that another program of the host has; the
    /// facts then say so.
    ///
    /// # Errors
    /// The operation's refusal, a published port that another program has, or what failed.
    pub async fn change<T: Send>(
        &self,
        operation: impl Fn(&mut Model, &HostFacts) -> Result<T, Refusal> + Send,
    ) -> Result<T, ChangeError> {
        let mut state = self.lock().await;
        let found = state.netlink.read_facts().await?;
        let mut facts = found.clone();
        let (value, target, prepared) = loop {
            let mut model = Model::clone(&state.model);
            let value = operation(&mut model, &facts)?;
            let target = Target { ports: Arc::new(reservations(&model)), model: Arc::new(model) };
            match state.prepare_ports(&target).await? {
                Ok(prepared) => break (value, target, prepared),
                Err(PortError::InUse(ports)) => {
                    let known = facts.ports_in_use.len();
                    let numbers = ports.iter().map(|port| (port.key.protocol, port.key.port));
                    facts.ports_in_use.extend(numbers);
                    // The second time, the user gave the ports.
                    if facts.ports_in_use.len() == known {
                        let error = PortError::InUse(ports);
                        return Err(Refusal::conflict(error.to_string()).into());
                    }
                }
                Err(error) => return Err(ChangeError::Failed(error.into())),
            }
        };
        // A task of its own: a caller who hangs up must not stop a change half-way.
        let change = tokio::spawn(async move { state.change(target, prepared, found).await });
        change.await.context("finish the change")??;
        Ok(value)
    }

    /// What enforces, why it is that, and what it asks of the kernel.
    ///
    /// # Errors
    /// The backend has panicked.
    pub async fn backend(&self) -> Result<Backend> {
        let describe = |dataplane: &mut Box<dyn Dataplane>| Backend {
            name: dataplane.name(),
            reason: dataplane.reason(),
            features: dataplane.features(),
        };
        self.shared.dataplane.call(describe).await
    }

    /// All tracked connections.
    ///
    /// # Errors
    /// Fails where the backend can't read them.
    pub async fn flows(&self) -> Result<Vec<FlowRecord>> {
        self.shared.dataplane.call(|dataplane| dataplane.flows()).await?
    }

    /// How packets of flows went.
    ///
    /// # Errors
    /// Fails where the backend can't read it.
    pub async fn lanes(&self) -> Result<Option<Lanes>> {
        self.shared.dataplane.call(|dataplane| dataplane.lanes()).await?
    }

    /// What was counted so far.
    ///
    /// # Errors
    /// Fails where the backend can't read it.
    pub async fn counters(&self) -> Result<Vec<Count>> {
        self.shared.dataplane.call(|dataplane| dataplane.counters()).await?
    }

    /// How the kernel differs from the model, changing nothing.
    ///
    /// # Errors
    /// Fails where the kernel can't be read.
    pub async fn check(&self) -> Result<Vec<Drift>> {
        let state = self.lock().await;
        state.netlink.forget_facts();
        let facts = state.netlink.read_facts().await?;
        let plan = plan(&state.model, &facts, &state.setting);
        let mut drift = link_drift(&plan, &facts);
        let program = plan.program;
        drift.extend(state.dataplane.call(move |dataplane| dataplane.check(&program)).await??);
        Ok(drift)
    }

    /// Takes everything of ours off the host: links, neighbour entries, sysctls, the backend's
    /// objects, the model, what the store holds.
    ///
    /// # Errors
    /// Goes on after each failure and names them all; what is left can be purged again.
    pub async fn purge(&self) -> Result<()> {
        let mut state = self.lock().await;
        let purge = tokio::spawn(async move { state.purge().await });
        purge.await.context("finish the purge")?
    }

    async fn lock(&self) -> OwnedMutexGuard<State> {
        Arc::clone(&self.shared.state).lock_owned().await
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.background.abort();
    }
}

impl State {
    /// Takes the host ports that a change wants and that are not held yet.
    async fn prepare_ports(&mut self, target: &Target) -> Result<Result<Prepared, PortError>> {
        let (wanted, keeper) = (Arc::clone(&target.ports), self.port_keeper());
        self.reservations.call(move |reservations| reservations.prepare(&wanted, keeper)).await
    }

    /// Who keeps programs of the host off published ports.
    fn port_keeper(&self) -> Keeper {
        if self.nature.keeps_ports { Keeper::Backend } else { Keeper::Sockets }
    }

    /// Serves published ports at loopback addresses, where the backend can't; what could not be.
    async fn serve_loopback(&self) -> Result<Vec<String>> {
        let wanted = match self.nature.reaches_loopback {
            true if self.loopback.is_idle() => return Ok(Vec::new()),
            true => BTreeMap::new(),
            false => loopback::wanted(self.program.published.iter()),
        };
        let loopback = self.loopback.clone();
        self.reservations.call(move |ports| loopback.follow(&wanted, ports)).await
    }

    async fn change(
        &mut self,
        target: Target,
        prepared: Prepared,
        facts: HostFacts,
    ) -> Result<(), ChangeError> {
        let before = Arc::clone(&self.model);
        if target.model == before {
            return Ok(());
        }
        match self.enforce_and_store(&target, prepared.doubtful(), &before, facts).await {
            Ok(failures) => {
                let (keeper, wanted) = (self.port_keeper(), target.ports);
                let refused = self.reservations.call(move |reservations| {
                    reservations.commit(prepared, &wanted);
                    // The backend may have found out that it can't.
                    reservations.hold(&wanted, keeper)
                });
                let mut troubles = troubles(&failures, refused.await?);
                troubles.extend(self.serve_loopback().await?);
                self.report(troubles);
                self.model = target.model;
                self.publish();
                Ok(())
            }
            Err(error) => {
                let left = self.undo().await;
                self.serve_loopback().await?;
                self.publish();
                Err(ChangeError::Failed(match left {
                    None => error,
                    Some(left) => error.context(format!("undo the change: {left}")),
                }))
            }
        }
    }

    async fn enforce_and_store(
        &mut self,
        Target { model, .. }: &Target,
        doubtful: &[PublishedKey],
        before: &Arc<Model>,
        facts: HostFacts,
    ) -> Result<Vec<Failure>> {
        let failures = self.converge(model, Some(before), facts).await?;
        if !doubtful.is_empty() {
            let doubtful = doubtful.to_vec();
            self.reservations.call(move |_| Reservations::check(&doubtful)).await??;
        }
        // The kernel first: killed in between, the next start takes back what nobody was told of.
        let (old, new) = (Arc::clone(before), Arc::clone(model));
        self.store
            .call(move |store| store.save(&old, &new))
            .await
            .flatten()
            .context("store the change")?;
        Ok(failures)
    }

    /// Goes back to the model that is still the stored one; what could not be undone is returned,
    /// and retried later.
    async fn undo(&mut self) -> Option<String> {
        let model = Arc::clone(&self.model);
        // Sysctls may have been written, which the kernel does not tell of.
        self.netlink.forget_facts();
        let facts = match self.netlink.read_facts().await {
            Ok(facts) => facts,
            Err(error) => return Some(format!("{error:#}")),
        };
        match self.converge(&model, None, facts).await {
            Ok(failures) => {
                let left = lines(&failures);
                self.report(left.clone());
                (!left.is_empty()).then(|| left.join("; "))
            }
            Err(error) => Some(format!("{error:#}")),
        }
    }

    /// Reads the host again and repairs what differs, if anything does.
    async fn look(&mut self) -> Result<()> {
        let facts = self.netlink.read_facts().await?;
        let plan = plan(&self.model, &facts, &self.setting);
        // Not only against what was seen last: a change of the host in the middle of a pass may
        // have been seen and not acted on.
        let is_fine = facts.links == self.facts.links
            && plan.program == self.program
            && link_drift(&plan, &facts).is_empty()
            && self.troubles.is_empty()
            && self.vanished(&facts).is_empty();
        if is_fine {
            self.facts = facts;
        } else {
            self.repair(facts).await?;
        }
        self.publish();
        Ok(())
    }

    /// Releases endpoints whose container is gone and makes the kernel agree with the rest, as far as
    /// possible. Returns what was not.
    async fn repair(&mut self, facts: HostFacts) -> Result<Vec<Failure>> {
        let before = Arc::clone(&self.model);
        let vanished = self.vanished(&facts);
        if !vanished.is_empty() {
            let mut model = Model::clone(&before);
            for id in vanished {
                let Some(Endpoint { name, place, .. }) = model.release(id) else { continue };
                match place {
                    Place::Netns(Netns { path, .. }) => {
                        let netns = path.display();
                        info!(endpoint = name, %netns, "releasing: its namespace vanished");
                    }
                    Place::Engine(_) => {
                        info!(endpoint = name, "releasing: its interface went with its container");
                    }
                }
            }
            self.model = Arc::new(model);
        }
        let model = Arc::clone(&self.model);
        let failures = self.converge(&model, None, facts).await?;
        let (wanted, keeper) = (reservations(&model), self.port_keeper());
        let refused = self.reservations.call(move |ports| ports.hold(&wanted, keeper)).await?;
        let mut troubles = troubles(&failures, refused);
        troubles.extend(self.serve_loopback().await?);
        self.report(troubles);
        if model != before {
            self.store.call(move |store| store.save(&before, &model)).await??;
        }
        Ok(failures)
    }

    /// Compares the backend's objects with what they should be, and repairs them: nobody tells us
    /// of a map entry or a pin that someone removes.
    async fn compare(&mut self) -> Result<()> {
        let program = Arc::clone(&self.program);
        let drift = self.dataplane.call(move |dataplane| dataplane.check(&program)).await??;
        if drift.is_empty() {
            return Ok(());
        }
        for Drift { what } in &drift {
            warn!("repairing: {what}");
        }
        let facts = self.netlink.read_facts().await?;
        self.repair(facts).await?;
        self.publish();
        Ok(())
    }

    /// Whether a blank is to be made: there has to be one, and is none.
    fn lacks_blank(&mut self) -> bool {
        if !blank::is_wanted(&self.model, &self.setting) {
            self.no_blank_before = None;
            return false;
        }
        let may_be_made = self.no_blank_before.is_none_or(|moment| moment <= Instant::now());
        may_be_made && self.program.blank.is_none()
    }

    /// Endpoints whose namespace is gone, or whose path means another one by now; and those of engines
    /// whose interfaces are gone, which only happens along with the namespace that one was taken to.
    fn vanished(&self, facts: &HostFacts) -> BTreeSet<EndpointId> {
        let is_gone = |endpoint: &Endpoint| match &endpoint.place {
            Place::Netns(netns) => !namespace::is_still(&netns.path, netns.identity),
            Place::Engine(_) => facts.link(&endpoint.host_interface).is_none(),
        };
        let endpoints = self.model.endpoints.iter();
        endpoints.filter(|(_, endpoint)| is_gone(endpoint)).map(|(&id, _)| id).collect()
    }

    async fn purge(&mut self) -> Result<()> {
        let before = Arc::clone(&self.model);
        self.model = Arc::default();
        let nothing = Model::default();
        let facts = self.netlink.read_facts().await?;
        let mut errors: Vec<Error> = match self.converge(&nothing, None, facts).await {
            Ok(failures) => failures.into_iter().map(Failure::into_error).collect(),
            Err(error) => vec![error],
        };
        let loopback = self.loopback.clone();
        let emptied = self.reservations.call(move |ports| {
            loopback.follow(&BTreeMap::new(), ports);
            ports.hold(&Runs::default(), Keeper::Backend)
        });
        errors.extend(emptied.await.err());
        let purged = self.dataplane.call(|dataplane| dataplane.purge()).await.flatten();
        errors.extend(purged.context("purge the dataplane").err());
        // A sysctl that could not be given back is still remembered for the next attempt.
        let is_clean = errors.is_empty();
        let forgotten =
            self.store.call(
                move |store| {
                    if is_clean { store.clear() } else { store.save(&before, &nothing) }
                },
            );
        errors.extend(forgotten.await.flatten().context("empty the store").err());
        self.troubles.clear();
        self.program = Arc::default();
        self.publish();
        if errors.is_empty() {
            return Ok(());
        }
        let errors: Vec<String> = errors.iter().map(|error| format!("{error:#}")).collect();
        Err(anyhow!("purge left something behind: {}", errors.join("; ")))
    }

    fn publish(&mut self) {
        let alarms = alarms(&self.model, &self.facts, &self.setting, &self.flow_tables);
        for Alarm { text, .. } in unheard(&alarms, &self.flow_tables, &mut self.heard) {
            warn!("{text}");
        }
        self.snapshot.send_replace(Snapshot {
            model: Arc::clone(&self.model),
            facts: Arc::new(self.facts.clone()),
            program: Arc::clone(&self.program),
            troubles: self.troubles.clone(),
            alarms: alarms.into_iter().map(|alarm| alarm.text).collect(),
            flow_tables: self.flow_tables.clone(),
        });
    }
}

/// What could not be done, and which ports not be kept.
fn troubles(failures: &[Failure], refused: Vec<PortError>) -> Vec<String> {
    let refused = refused.into_iter().map(|error| format!("keep a published port: {error}"));
    lines(failures).into_iter().chain(refused).collect()
}

fn lines(failures: &[Failure]) -> Vec<String> {
    failures.iter().map(Failure::to_string).collect()
}

/// Answers to events and to the clock until the controller is gone.
async fn keep(state: Weak<Mutex<State>>, mut events: Events) {
    let mut clock = interval(TICK);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ticks = 0u64;
    let mut patience = Duration::MAX;
    loop {
        let word = select! {
            _ = clock.tick() => None,
            Some(word) = events.next(patience) => Some(word),
        };
        let is_tick = word.is_none();
        ticks += u64::from(is_tick);
        let Some(state) = state.upgrade() else { return };
        let mut state = state.lock().await;
        // It may have taken a while to come to this.
        let is_quiet = word == Some(Word::Quiet) && events.are_over();
        if is_tick {
            // Not all that there is to see is told of.
            state.netlink.forget_facts();
            match state.dataplane.call(|dataplane| dataplane.collect()).await.flatten() {
                Ok(0) => {}
                Ok(flows) => debug!(flows, "collected idle flows"),
                Err(error) => warn!("collect idle flows: {error:#}"),
            }
            match state.dataplane.call(|dataplane| dataplane.flow_tables()).await {
                Ok(tables) => state.flow_tables = tables,
                Err(error) => warn!("look how full the flow tables are: {error:#}"),
            }
        }
        if let Err(error) = state.look().await {
            warn!("look for changes of the host: {error:#}");
        }
        if is_tick
            && ticks.is_multiple_of(TICKS_TO_COMPARE)
            && let Err(error) = state.compare().await
        {
            warn!("compare the backend with what it should be: {error:#}");
        }
        patience = Duration::MAX;
        if state.lacks_blank() {
            if is_quiet {
                match state.make_blank().await {
                    Ok(()) => debug!("made a pair for the next endpoint"),
                    // Which will wait for one of its own.
                    Err(error) => warn!("make a pair for the next endpoint: {error:#}"),
                }
            } else {
                patience = QUIET;
            }
        }
    }
}

#[cfg(test)]
mod tests;
