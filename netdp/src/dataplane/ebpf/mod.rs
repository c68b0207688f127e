//! The `ebpf` backend: programs on tcx hooks that decide from maps.
//!
//! Everything that works is pinned and goes on without the agent. Opening the backend adopts what
//! is there; `apply` writes the difference between what the maps hold and what they should.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use aya::maps::{MapData, PerCpuHashMap};
use netdp_common::{
    addr::Be32,
    config::Config,
    counter::{Counter, CounterKey, Reason},
    endpoint::Endpoint4,
    interface::Interface,
    network::Network,
    policy::{PolicyKey4, PolicyVerdict},
    publish::{Published4, PublishedKey4},
};
use tracing::{debug, warn};

use self::{
    flows::Flows,
    image::Image,
    object::Object,
    pins::Pins,
    sys::Wire,
    tables::{Hash, Indexed, Lpm, Table},
};
use super::{Applied, Count, Dataplane, Drift, FlowRecord, Program};
use crate::model::NetworkId;

mod drift;
mod flows;
mod image;
mod object;
mod pins;
mod policy;
mod sys;
mod tables;

/// How to open the backend.
#[derive(Clone, Debug)]
pub struct EbpfOptions {
    /// Where bpffs is, or will be mounted.
    pub bpffs: PathBuf,
    /// Size of a new flow table, in flows.
    pub flows: u32,
}

/// The backend, open: programs loaded, pins adopted.
pub struct Ebpf {
    pins: Pins,
    /// Held, not read.
    _lock: File,
    object: Object,
    tables: Tables,
    flows: Flows,
    counters: PerCpuHashMap<MapData, Wire<CounterKey>, Wire<Counter>>,
    /// What the maps hold.
    current: Image,
    /// Whether the flows were checked against the maps since the backend was opened.
    flows_checked: bool,
}

/// The maps whose contents follow from the program.
struct Tables {
    config: Table<Indexed<Config>>,
    networks: Table<Indexed<Network>>,
    interfaces: Table<Hash<u32, Interface>>,
    endpoints: Table<Hash<Be32, Endpoint4>>,
    published: Table<Hash<PublishedKey4, Published4>>,
    subnets: Table<Lpm<Be32, u32>>,
    local: Table<Hash<Be32, u32>>,
    policies: Table<Lpm<PolicyKey4, PolicyVerdict>>,
}

impl Ebpf {
    /// Loads the programs and adopts the pins of an earlier agent: its packets never notice.
    ///
    /// # Errors
    /// No bpffs, no right to BPF, a kernel that refuses a program, pins of another layout; each
    /// with what to do.
    pub fn open(options: EbpfOptions) -> Result<Self> {
        let pins = Pins::at(&options.bpffs);
        pins.prepare()?;
        let lock = pins.lock()?;
        let mut object = Object::load(pins.clone(), options.flows)?;
        let tables = Tables {
            config: Table::new("CONFIG", object.take_map("CONFIG")?)?,
            networks: Table::new("NETWORK", object.take_map("NETWORK")?)?,
            interfaces: Table::new("INTERFACE", object.take_map("INTERFACE")?)?,
            endpoints: Table::new("ENDPOINT4", object.take_map("ENDPOINT4")?)?,
            published: Table::new("PUBLISHED4", object.take_map("PUBLISHED4")?)?,
            subnets: Table::new("SUBNET4", object.take_map("SUBNET4")?)?,
            local: Table::new("LOCAL4", object.take_map("LOCAL4")?)?,
            policies: Table::new("POLICY4", object.take_map("POLICY4")?)?,
        };
        let flows = Flows::new(object.take_map("FLOW4")?)?;
        let counters =
            PerCpuHashMap::try_from(object.take_map("COUNTERS")?).context("open map COUNTERS")?;
        let current = tables.read(&object)?;
        let mut backend = Self {
            pins,
            _lock: lock,
            object,
            tables,
            flows,
            counters,
            current,
            flows_checked: false,
        };
        // Drops that belong to no network.
        backend.ensure_counters(0)?;
        Ok(backend)
    }

    /// Removes everything that is pinned under a bpffs, without loading anything. Returns whether
    /// there was something.
    ///
    /// # Errors
    /// A pin can't be removed.
    pub fn purge_pins(bpffs: &Path) -> Result<bool> {
        let pins = Pins::at(bpffs);
        let there = pins.exist();
        pins.remove()?;
        Ok(there)
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
        writes += tables.config.write(&mut current.config, &wanted.config)?;
        writes += tables.policies.write(&mut current.policies, &wanted.policies)?;
        writes += tables.networks.write(&mut current.networks, &wanted.networks)?;
        writes += tables.subnets.write(&mut current.subnets, &wanted.subnets)?;
        writes += tables.local.write(&mut current.local, &wanted.local)?;
        writes += tables.endpoints.write(&mut current.endpoints, &wanted.endpoints)?;
        writes += tables.interfaces.write(&mut current.interfaces, &wanted.interfaces)?;
        for &(hook, ifindex) in &wanted.hooks {
            if !self.object.attached.contains(&(hook, ifindex)) {
                self.object.attach(hook, ifindex)?;
                writes += 1;
            }
        }
        writes += tables.published.write(&mut current.published, &wanted.published)?;
        Ok(writes)
    }

    /// Deletes what the maps have and `wanted` has not, in the opposite order. Programs go last:
    /// without entries they let nothing pass.
    fn delete(&mut self, wanted: &Image) -> Result<usize> {
        let (tables, current) = (&mut self.tables, &mut self.current);
        let mut writes = 0;
        writes += tables.published.delete(&mut current.published, &wanted.published)?;
        writes += tables.interfaces.delete(&mut current.interfaces, &wanted.interfaces)?;
        writes += tables.endpoints.delete(&mut current.endpoints, &wanted.endpoints)?;
        writes += tables.local.delete(&mut current.local, &wanted.local)?;
        writes += tables.subnets.delete(&mut current.subnets, &wanted.subnets)?;
        writes += tables.networks.delete(&mut current.networks, &wanted.networks)?;
        writes += tables.policies.delete(&mut current.policies, &wanted.policies)?;
        let gone: Vec<_> = self.object.attached.difference(&wanted.hooks).copied().collect();
        for (hook, ifindex) in gone {
            self.object.detach(hook, ifindex)?;
            writes += 1;
        }
        current.hooks.clone_from(&self.object.attached);
        Ok(writes)
    }
}

impl Tables {
    /// What the maps hold.
    fn read(&self, object: &Object) -> Result<Image> {
        Ok(Image {
            config: self.config.entries()?,
            networks: self.networks.entries()?,
            interfaces: self.interfaces.entries()?,
            endpoints: self.endpoints.entries()?,
            published: self.published.entries()?,
            subnets: self.subnets.entries()?,
            local: self.local.entries()?,
            policies: self.policies.entries()?,
            hooks: object.attached.clone(),
        })
    }
}

impl Dataplane for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    fn apply(&mut self, program: &Program) -> Result<Applied> {
        let wanted = Image::render(program);
        let mut writes = 0;
        for &id in wanted.networks.keys() {
            if !self.current.networks.contains_key(&id) {
                writes += self.ensure_counters(id)?;
            }
        }
        let stale_flows = !self.flows_checked || self.current.loses(&wanted);
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
            let purged = self.flows.purge_stale(&self.current)?;
            debug!(purged, "flows of what is gone");
            self.flows_checked = true;
        }
        Ok(Applied { writes })
    }

    fn check(&mut self, program: &Program) -> Result<Vec<Drift>> {
        let mut found = self.tables.read(&self.object)?;
        let object = &mut self.object;
        found.hooks.retain(|&(hook, ifindex)| object.is_attached(hook, ifindex));
        // What was found is what the next apply starts from, so it repairs.
        object.attached.clone_from(&found.hooks);
        self.current = found.clone();
        let wanted = Image::render(program);
        // A guard that stays where nothing may pass is no drift.
        found
            .hooks
            .retain(|&(hook, ifindex)| wanted.hooks.contains(&(hook, ifindex)) || !hook.guards());
        Ok(drift::between(&wanted, &found))
    }

    fn purge(&mut self) -> Result<()> {
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

    fn flows(&mut self) -> Result<Vec<FlowRecord>> {
        self.flows.records()
    }

    fn collect(&mut self) -> Result<usize> {
        self.flows.collect()
    }
}
