//! The `ebpf` backend: programs on tc hooks that decide from maps.
//!
//! Everything that works is pinned and goes on without the agent. Opening the backend adopts what
//! is there; `apply` writes the difference between what the maps hold and what they should.

use std::{
    collections::BTreeSet,
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, PerCpuHashMap};
use netdp_common::{
    aging::Collection,
    config::{Config, Timeouts},
    counter::{Counter, CounterKey, Reason},
    endpoint::Endpoint,
    interface::Interface,
    network::Network,
    policy::{PolicyKey, PolicyVerdict},
    publish::{Published, PublishedKey, PublishedPort},
};
use tracing::{debug, info, warn};

use self::{
    family::Wired,
    flows::{Flows, Survey},
    image::{Footing, Host, Image, Mark, Side},
    object::Object,
    origins::Origins,
    pins::Pins,
    sys::Wire,
    tables::{Batched, Hash, Indexed, Lpm, Slots, Table, absent_is_fine},
};
use super::{
    Applied, Count, Dataplane, Drift, FlowRecord, FlowTable, KernelFeature, Lanes, Nature, Program,
};
use crate::{
    family::{Family, V4, V6},
    model::NetworkId,
};

mod aging;
mod attach;
mod cgroup;
mod claims;
mod drift;
mod family;
mod flows;
mod image;
mod object;
mod origins;
mod pins;
mod policy;
mod probe;
mod sys;
mod tables;

pub use self::{
    cgroup::{can_know_ports, cgroup2_mount},
    probe::{Description, FEATURES, Feature, Features},
};

/// An account of an endpoint's flows may be off by this many, and an eighth, before it is settled.
const USAGE_TOLERANCE: u64 = 16;

/// How to open the backend.
#[derive(Clone, Debug)]
pub struct EbpfOptions {
    /// Where bpffs is, or will be mounted.
    pub bpffs: PathBuf,
    /// Size of new flow tables, in flows: one of this size for each family.
    pub flows: u32,
    /// How long idle flows are kept in a table that has room.
    pub timeouts: Timeouts,
    /// The cgroup2 hierarchy, for the socket hooks; without one the host itself does not reach
    /// published ports.
    pub cgroup: Option<PathBuf>,
    /// Whether packets of flows go past the host's stack where they can.
    pub fast_path: bool,
}

/// The backend, open: programs loaded, pins adopted.
pub struct Ebpf {
    pins: Pins,
    /// Held, not read.
    _lock: File,
    features: Features,
    object: Object,
    tables: Tables,
    flows4: Flows<V4>,
    flows6: Flows<V6>,
    origins: Origins,
    counters: PerCpuHashMap<MapData, Wire<CounterKey>, Wire<Counter>>,
    lanes: PerCpuArray<MapData, u64>,
    collection: Array<MapData, Wire<Collection>>,
    /// Flows that each endpoint has opened, by its generation.
    usage: HashMap<MapData, u32, u64>,
    /// What the maps hold.
    current: Image,
    timeouts: Timeouts,
    fast_path: bool,
    /// Whether the flows were checked against the maps since the backend was opened.
    flows_checked: bool,
    /// As the last collection left them.
    flow_tables: Vec<FlowTable>,
}

/// The maps whose contents follow from the program.
struct Tables {
    config: Table<Indexed<Config>>,
    networks: Table<Indexed<Network>>,
    interfaces: Table<Hash<u32, Interface>>,
    slots: Table<Slots>,
    published_ports: Table<Batched<PublishedPort, Mark>>,
    ipv4: SideTables<V4>,
    ipv6: SideTables<V6>,
}

/// PUBLISHED4 or PUBLISHED6.
type PublishedTable<A> = Table<Batched<PublishedKey<A>, Published<A>>>;

/// Those of one family.
struct SideTables<F: Wired> {
    endpoints: Table<Hash<F::Wire, Endpoint>>,
    published: PublishedTable<F::Wire>,
    subnets: Table<Lpm<F::Wire, u32>>,
    local: Table<Hash<F::Wire, u32>>,
    policies: Table<Lpm<PolicyKey<F::Wire>, PolicyVerdict>>,
}

impl Ebpf {
    /// Loads the programs and adopts the pins of an earlier agent: its packets never notice.
    ///
    /// # Errors
    /// No bpffs, no right to BPF, a kernel that refuses a program, pins of another layout; each
    /// with what to do.
    pub fn open(options: EbpfOptions) -> Result<Self> {
        let features = Features::probe();
        features.require()?;
        for row in features.missing() {
            info!(feature = row.name, "the kernel lacks it: {}", row.without);
        }
        let pins = Pins::at(&options.bpffs);
        pins.prepare()?;
        let lock = pins.lock()?;
        let cgroup = options.cgroup.as_deref();
        let mut object = Object::load(pins.clone(), &features, options.flows, cgroup)?;
        let tables = Tables {
            config: Table::new("CONFIG", object.take_map("CONFIG")?)?,
            networks: Table::new("NETWORK", object.take_map("NETWORK")?)?,
            interfaces: Table::new("INTERFACE", object.take_map("INTERFACE")?)?,
            slots: Table::new("INTERFACE_SLOT", object.take_map("INTERFACE_SLOT")?)?,
            published_ports: Table::new("PUBLISHED_PORT", object.take_map("PUBLISHED_PORT")?)?,
            ipv4: SideTables::open(&mut object)?,
            ipv6: SideTables::open(&mut object)?,
        };
        let flows4 = Flows::open(object.take_flow_maps::<V4>()?)?;
        let flows6 = Flows::open(object.take_flow_maps::<V6>()?)?;
        let origins = Origins::new(object.take_map("SOCKET_ORIGIN")?)?;
        let counters =
            PerCpuHashMap::try_from(object.take_map("COUNTERS")?).context("open map COUNTERS")?;
        let lanes = PerCpuArray::try_from(object.take_map("LANES")?).context("open map LANES")?;
        let collection = open_collection(&mut object, &options.timeouts)?;
        let usage = HashMap::try_from(object.take_map("USAGE")?).context("open map USAGE")?;
        let current = tables.read(&object)?;
        let mut backend = Self {
            pins,
            _lock: lock,
            features,
            object,
            tables,
            flows4,
            flows6,
            origins,
            counters,
            lanes,
            collection,
            usage,
            current,
            timeouts: options.timeouts,
            fast_path: options.fast_path,
            flows_checked: false,
            flow_tables: Vec::new(),
        };
        // Drops that belong to no network.
        backend.ensure_counters(0)?;
        backend.ensure_timeouts()?;
        Ok(backend)
    }

    /// Attaches a program in a network namespace of its own, and detaches it: a kernel may load what it
    /// does not let us attach.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn try_out(&mut self) -> Result<()> {
        self.object.try_out()
    }

    /// Removes everything that is pinned under a bpffs, and every filter of ours in this network
    /// namespace, without loading anything. Returns whether there was something.
    ///
    /// # Errors
    /// A pin or a filter can't be removed.
    pub fn purge_pins(bpffs: &Path) -> Result<bool> {
        let pins = Pins::at(bpffs);
        let there = pins.exist() | attach::remove_filters(&pins)?;
        pins.remove()?;
        Ok(there)
    }

    /// Loads every program by itself and returns, by name, what became of it.
    ///
    /// # Errors
    /// No right to BPF, or a kernel that refuses a map.
    pub fn load_each() -> Result<Vec<(&'static str, Result<()>)>> {
        let features = Features::probe();
        features.require()?;
        object::load_each(&features)
    }

    /// Whether programs of the host are led to published ports, by whichever agent works with this
    /// bpffs.
    pub fn has_socket_hooks(bpffs: &Path) -> bool {
        cgroup::are_pinned(&Pins::at(bpffs))
    }

    fn host(&self) -> Host {
        Host { netns_cookie: self.object.netns_cookie(), fast_path: self.fast_path }
    }

    /// Makes the counter rows of a network; the programs count only in rows that are there.
    fn ensure_counters(&mut self, network: u32) -> Result<usize> {
        let mut writes = 0;
        for &reason in Reason::ALL {
            let key = Wire(CounterKey { network, reason: reason as u32 });
            if self.counters.get(&key, 0).is_ok() {
                continue;
            }
            let cpus = aya::util::nr_cpus().map_err(|(file, error)| {
                anyhow::Error::from(error).context(format!("count the CPUs in {file}"))
            })?;
            let zeros = vec![Wire(Counter::default()); cpus].try_into().context("size counters")?;
            self.counters.insert(key, zeros, 0).context("write map COUNTERS")?;
            writes += 1;
        }
        Ok(writes)
    }

    /// Removes the flows of what is gone; returns how many.
    fn purge_stale_flows(&mut self) -> Result<usize> {
        let Image { networks, ipv4, ipv6, .. } = &self.current;
        let footing4 = Footing { networks, side: ipv4, subnet: |network| &network.ipv4 };
        let footing6 = Footing { networks, side: ipv6, subnet: |network| &network.ipv6 };
        Ok(self.flows4.purge_stale(self.object.collector::<V4>()?, &footing4)?
            + self.flows6.purge_stale(self.object.collector::<V6>()?, &footing6)?)
    }

    /// Collects from both tables; returns how many flows went.
    fn collect_flows(&mut self) -> Result<usize> {
        let timeouts = self.collection.get(&0, 0).context("read map COLLECTION")?.0.timeouts;
        let (removed4, survey4) = self.flows4.collect(self.object.collector::<V4>()?, &timeouts)?;
        let (removed6, survey6) = self.flows6.collect(self.object.collector::<V6>()?, &timeouts)?;
        let left = |family, survey: &Survey, removed| FlowTable {
            family,
            flows: survey.flows.saturating_sub(u32::try_from(removed).unwrap_or(u32::MAX)),
            capacity: self.flows4.capacity(),
        };
        self.flow_tables =
            vec![left(V4::NAME, &survey4, removed4), left(V6::NAME, &survey6, removed6)];
        // The fuller of the two decides for both.
        let capacity = self.flows4.capacity();
        let timeouts = aging::timeouts(&self.timeouts, survey4.flows.max(survey6.flows), capacity);
        let collection = Collection { timeouts, at: flows::now()? };
        self.collection.set(0, Wire(collection), 0).context("write map COLLECTION")?;
        self.settle_usage(&[survey4, survey6])?;
        Ok(removed4 + removed6)
    }

    /// The programs know how long to keep flows before the first collection.
    fn ensure_timeouts(&mut self) -> Result<()> {
        let there = self.collection.get(&0, 0).context("read map COLLECTION")?.0;
        if there == Collection::default() {
            let first = Collection { timeouts: self.timeouts, at: flows::now()? };
            self.collection.set(0, Wire(first), 0).context("write map COLLECTION")?;
        }
        Ok(())
    }

    /// Puts right what a lost race has left in the accounts of endpoints.
    fn settle_usage(&mut self, surveys: &[Survey]) -> Result<()> {
        for entry in self.usage.iter().collect::<Result<Vec<_>, _>>().context("read map USAGE")? {
            let (generation, account) = entry;
            let flows: u64 =
                surveys.iter().filter_map(|survey| survey.by_endpoint.get(&generation)).sum();
            // Flows come and go while they are counted.
            if account.abs_diff(flows) > USAGE_TOLERANCE + flows / 8 {
                debug!(generation, account, flows, "settling the flows of an endpoint");
                self.usage.insert(generation, flows, 0).context("write map USAGE")?;
            }
        }
        Ok(())
    }

    /// Opens and closes the accounts of endpoints.
    fn keep_accounts(&mut self, wanted: &Image) -> Result<()> {
        let generations: BTreeSet<u32> = wanted
            .interfaces
            .values()
            .map(|interface| interface.generation)
            .filter(|&generation| generation != 0)
            .collect();
        let kept: BTreeSet<u32> =
            self.usage.keys().collect::<Result<_, _>>().context("read map USAGE")?;
        for generation in generations.difference(&kept) {
            self.usage.insert(generation, 0, 0).context("write map USAGE")?;
        }
        for generation in kept.difference(&generations) {
            absent_is_fine(self.usage.remove(generation)).context("delete from map USAGE")?;
        }
        Ok(())
    }

    fn forget_counters(&mut self, network: u32) {
        for &reason in Reason::ALL {
            let key = Wire(CounterKey { network, reason: reason as u32 });
            if let Err(error) = self.counters.remove(&key) {
                debug!(network, reason = reason.name(), %error, "a counter is gone already");
            }
        }
    }

    /// Writes what `wanted` has and the maps have not: values before what leads to them, so that
    /// a packet sees the old state or the new one.
    fn write(&mut self, wanted: &Image) -> Result<usize> {
        let (tables, current) = (&mut self.tables, &mut self.current);
        let mut writes = 0;
        if current.config != wanted.config {
            // Other ports are others' ports.
            self.object.forget_claims()?;
        }
        writes += tables.config.write(&mut current.config, &wanted.config)?;
        writes += tables.ipv4.write_policies(&mut current.ipv4, &wanted.ipv4)?;
        writes += tables.ipv6.write_policies(&mut current.ipv6, &wanted.ipv6)?;
        writes += tables.networks.write(&mut current.networks, &wanted.networks)?;
        writes += tables.ipv4.write_addresses(&mut current.ipv4, &wanted.ipv4)?;
        writes += tables.ipv6.write_addresses(&mut current.ipv6, &wanted.ipv6)?;
        // Programs before entries: without one a program lets nothing of a container pass, but
        // towards an uplink with an entry `from_container` lets flows begin, and only the
        // program there translates them.
        for &(hook, ifindex) in &wanted.hooks {
            if !self.object.attached.contains(&(hook, ifindex)) {
                self.object.attach(hook, ifindex)?;
                writes += 1;
            }
        }
        writes += tables.interfaces.write(&mut current.interfaces, &wanted.interfaces)?;
        writes += tables.slots.write(&mut current.slots, &wanted.slots)?;
        writes +=
            tables.published_ports.write(&mut current.published_ports, &wanted.published_ports)?;
        writes += tables.ipv4.write_published(&mut current.ipv4, &wanted.ipv4)?;
        writes += tables.ipv6.write_published(&mut current.ipv6, &wanted.ipv6)?;
        // A host without networks is left as it is.
        if !wanted.networks.is_empty() {
            writes += self.object.attach_sockets()?;
        }
        Ok(writes)
    }

    /// Deletes what the maps have and `wanted` has not, in the opposite order. Programs go last:
    /// without entries they let nothing pass.
    fn delete(&mut self, wanted: &Image) -> Result<usize> {
        let (tables, current) = (&mut self.tables, &mut self.current);
        let mut writes = 0;
        writes += tables.ipv4.delete_published(&mut current.ipv4, &wanted.ipv4)?;
        writes += tables.ipv6.delete_published(&mut current.ipv6, &wanted.ipv6)?;
        writes +=
            tables.published_ports.delete(&mut current.published_ports, &wanted.published_ports)?;
        writes += tables.slots.delete(&mut current.slots, &wanted.slots)?;
        writes += tables.interfaces.delete(&mut current.interfaces, &wanted.interfaces)?;
        writes += tables.ipv4.delete_addresses(&mut current.ipv4, &wanted.ipv4)?;
        writes += tables.ipv6.delete_addresses(&mut current.ipv6, &wanted.ipv6)?;
        writes += tables.networks.delete(&mut current.networks, &wanted.networks)?;
        writes += tables.ipv4.delete_policies(&mut current.ipv4, &wanted.ipv4)?;
        writes += tables.ipv6.delete_policies(&mut current.ipv6, &wanted.ipv6)?;
        let gone: Vec<_> = self.object.attached.difference(&wanted.hooks).copied().collect();
        for (hook, ifindex) in gone {
            self.object.detach(hook, ifindex)?;
            writes += 1;
        }
        current.hooks.clone_from(&self.object.attached);
        if wanted.networks.is_empty() {
            writes += self.object.detach_sockets()?;
        }
        Ok(writes)
    }
}

/// Opens COLLECTION. New, it gets the configured timeouts at once: with zeros in it, a flow would
/// be over as soon as somebody looks at it.
fn open_collection(
    object: &mut Object,
    timeouts: &Timeouts,
) -> Result<Array<MapData, Wire<Collection>>> {
    let mut map: Array<_, Wire<Collection>> =
        Array::try_from(object.take_map("COLLECTION")?).context("open map COLLECTION")?;
    if map.get(&0, 0).context("read map COLLECTION")?.0.timeouts == Timeouts::default() {
        let collection = Collection { timeouts: *timeouts, at: flows::now()? };
        map.set(0, Wire(collection), 0).context("write map COLLECTION")?;
    }
    Ok(map)
}

impl Tables {
    /// What the maps hold.
    fn read(&self, object: &Object) -> Result<Image> {
        Ok(Image {
            config: self.config.entries()?,
            networks: self.networks.entries()?,
            interfaces: self.interfaces.entries()?,
            slots: self.slots.entries()?,
            published_ports: self.published_ports.entries()?,
            hooks: object.attached.clone(),
            ipv4: self.ipv4.read()?,
            ipv6: self.ipv6.read()?,
        })
    }
}

impl<F: Wired> SideTables<F> {
    fn open(object: &mut Object) -> Result<Self> {
        let mut take = |name| Ok::<_, anyhow::Error>((name, object.take_map(name)?));
        let (endpoint, published) = (take(F::MAPS.endpoint)?, take(F::MAPS.published)?);
        let (subnet, local) = (take(F::MAPS.subnet)?, take(F::MAPS.local)?);
        let policy = take(F::MAPS.policy)?;
        Ok(Self {
            endpoints: Table::new(endpoint.0, endpoint.1)?,
            published: Table::new(published.0, published.1)?,
            subnets: Table::new(subnet.0, subnet.1)?,
            local: Table::new(local.0, local.1)?,
            policies: Table::new(policy.0, policy.1)?,
        })
    }

    fn read(&self) -> Result<Side<F::Wire>> {
        Ok(Side {
            endpoints: self.endpoints.entries()?,
            published: self.published.entries()?,
            subnets: self.subnets.entries()?,
            local: self.local.entries()?,
            policies: self.policies.entries()?,
        })
    }

    fn write_policies(
        &mut self,
        current: &mut Side<F::Wire>,
        wanted: &Side<F::Wire>,
    ) -> Result<usize> {
        self.policies.write(&mut current.policies, &wanted.policies)
    }

    fn write_addresses(
        &mut self,
        current: &mut Side<F::Wire>,
        wanted: &Side<F::Wire>,
    ) -> Result<usize> {
        Ok(self.subnets.write(&mut current.subnets, &wanted.subnets)?
            + self.local.write(&mut current.local, &wanted.local)?
            + self.endpoints.write(&mut current.endpoints, &wanted.endpoints)?)
    }

    fn write_published(
        &mut self,
        current: &mut Side<F::Wire>,
        wanted: &Side<F::Wire>,
    ) -> Result<usize> {
        self.published.write(&mut current.published, &wanted.published)
    }

    fn delete_published(
        &mut self,
        current: &mut Side<F::Wire>,
        wanted: &Side<F::Wire>,
    ) -> Result<usize> {
        self.published.delete(&mut current.published, &wanted.published)
    }

    fn delete_addresses(
        &mut self,
        current: &mut Side<F::Wire>,
        wanted: &Side<F::Wire>,
    ) -> Result<usize> {
        Ok(self.endpoints.delete(&mut current.endpoints, &wanted.endpoints)?
            + self.local.delete(&mut current.local, &wanted.local)?
            + self.subnets.delete(&mut current.subnets, &wanted.subnets)?)
    }

    fn delete_policies(
        &mut self,
        current: &mut Side<F::Wire>,
        wanted: &Side<F::Wire>,
    ) -> Result<usize> {
        self.policies.delete(&mut current.policies, &wanted.policies)
    }
}

impl Dataplane for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn apply(&mut self, program: &Program) -> Result<Applied> {
        let wanted = Image::render(program, self.host());
        let mut writes = 0;
        for &id in wanted.networks.keys() {
            if !self.current.networks.contains_key(&id) {
                writes += self.ensure_counters(id)?;
            }
        }
        let stale_flows = !self.flows_checked || self.current.loses(&wanted);
        self.origins.note_gone(&self.current, &wanted);
        let removed: Vec<u32> = self
            .current
            .networks
            .keys()
            .filter(|id| !wanted.networks.contains_key(id))
            .copied()
            .collect();
        // Marked before the first write: an apply that fails half-way is followed by one that
        // looks at the flows again.
        self.flows_checked &= !stale_flows;
        self.keep_accounts(&wanted)?;
        writes += self.write(&wanted)?;
        writes += self.delete(&wanted)?;
        for id in removed {
            self.forget_counters(id);
        }
        if stale_flows {
            // A packet that found the old entries may still be opening a flow.
            if let Err(error) = sys::wait_for_packets_in_flight() {
                warn!(%error, "no membarrier: packets in flight may outlive a removal");
            }
            let purged = self.purge_stale_flows()?;
            debug!(purged, "flows of what is gone");
            match self.origins.purge_stale(&self.current) {
                Ok(ended) => debug!(ended, "sockets of the host, connected to what is gone"),
                Err(error) => warn!("end sockets connected to what is gone: {error:#}"),
            }
            self.flows_checked = true;
        }
        Ok(Applied { writes })
    }

    fn check(&mut self, program: &Program) -> Result<Vec<Drift>> {
        let host = self.host();
        let mut found = self.tables.read(&self.object)?;
        let object = &mut self.object;
        found.hooks.retain(|&(hook, ifindex)| object.is_attached(hook, ifindex));
        // What was found is what the next apply starts from, so it repairs.
        object.attached.clone_from(&found.hooks);
        self.current = found.clone();
        let wanted = Image::render(program, host);
        // A guard that stays where nothing may pass is no drift.
        found
            .hooks
            .retain(|&(hook, ifindex)| wanted.hooks.contains(&(hook, ifindex)) || !hook.guards());
        let mut drift = drift::between(&wanted, &found);
        if !wanted.networks.is_empty() {
            drift.extend(self.object.missing_sockets());
        }
        Ok(drift)
    }

    fn purge(&mut self) -> Result<()> {
        attach::remove_filters(&self.pins)?;
        self.pins.remove()
    }

    fn counters(&mut self) -> Result<Vec<Count>> {
        let mut counts = Vec::new();
        for entry in self.counters.iter() {
            let (Wire(key), values) = entry.context("read map COUNTERS")?;
            let Some(reason) = Reason::from_number(key.reason) else { continue };
            let packets = values.iter().map(|value| value.0.packets).sum();
            let bytes = values.iter().map(|value| value.0.bytes).sum();
            if packets > 0 {
                let network = Some(NetworkId(key.network)).filter(|id| id.0 != 0);
                counts.push(Count { network, reason, packets, bytes });
            }
        }
        counts.sort_by_key(|count| (count.network, count.reason));
        Ok(counts)
    }

    fn lanes(&mut self) -> Result<Option<Lanes>> {
        let packets = |lane| -> Result<u64> {
            Ok(self.lanes.get(&lane, 0).context("read map LANES")?.iter().sum())
        };
        Ok(Some(Lanes { fast: packets(0)?, stack: packets(1)? }))
    }

    fn flows(&mut self) -> Result<Vec<FlowRecord>> {
        let mut records = self.flows4.records(&self.timeouts)?;
        records.extend(self.flows6.records(&self.timeouts)?);
        Ok(records)
    }

    fn collect(&mut self) -> Result<usize> {
        if let Err(error) = self.object.look_for_claims(self.current.config.get(&0)) {
            // Each new flow looks for itself.
            debug!("look for sockets that have ports of source NAT's: {error:#}");
        }
        self.collect_flows()
    }

    fn forget_host_ports(&mut self) -> Result<()> {
        self.object.forget_claims()
    }

    fn flow_tables(&self) -> Vec<FlowTable> {
        self.flow_tables.clone()
    }

    fn nature(&self) -> Nature {
        Nature {
            keeps_ports: self.object.keeps_ports(),
            reaches_loopback: true,
            needs_bridge_filter: false,
            keeps_blank: true,
        }
    }

    fn features(&self) -> Vec<KernelFeature> {
        self.features.rows()
    }
}
