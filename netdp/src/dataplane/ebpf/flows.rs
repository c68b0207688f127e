//! A family's flow table, seen from the agent: reading, collecting, purging.
//!
//! The agent makes the table usable, reads it in batches and names what may have to go; a program in
//! the kernel looks again and removes both halves, so no packet that comes meanwhile loses its flow.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    marker::PhantomData,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result};
use aya::{
    TestRun, TestRunOptions,
    maps::{Array, Map, MapData},
    programs::SchedClassifier,
};
use netdp_common::{
    addr::{Address, Be16},
    aging::{KEYS_AT, KEYS_MAX, order},
    config::Timeouts,
    flow::{Flow, FlowKey, FlowTable, Place, State},
};
use nix::time::{ClockId, clock_gettime};

use super::{
    family::{Wired, show},
    image::Footing,
    sys::{Wire, lookup_batch},
};
use crate::{dataplane::FlowRecord, model::NetworkId};

/// FLOW4 or FLOW6, and what belongs to it.
pub(super) struct Flows<F: Wired> {
    table: Array<MapData, Wire<FlowTable>>,
    /// The places, for what aya does not do.
    places: OwnedFd,
    /// Size in flows.
    capacity: u32,
    family: PhantomData<F>,
}

/// The maps of a flow table.
pub(super) struct FlowMaps {
    pub(super) table: Map,
    pub(super) places: Map,
    pub(super) index: Map,
    pub(super) free: Map,
}

/// What one reading of a table has shown.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Flows in the table.
    pub(super) flows: u32,
    /// Flows by the generation of the endpoint that opened them.
    pub(super) by_endpoint: HashMap<u32, u64>,
}

impl<F: Wired> Flows<F> {
    /// The flow table over the object's maps; one that is new is made usable.
    ///
    /// # Errors
    /// A map's type or sizes are not those of a flow table, or it can't be written.
    pub(super) fn open(maps: FlowMaps) -> Result<Self> {
        let entries = |map: &Map, name| -> Result<u32> {
            let info = map_data(map).and_then(|data| Ok(data.info()?));
            Ok(info.with_context(|| format!("open map {name}"))?.max_entries())
        };
        let places =
            map_data(&maps.places).and_then(|map| Ok(map.fd().as_fd().try_clone_to_owned()?));
        let places = places.with_context(|| format!("open map {}", F::MAPS.flow))?;
        let table = Array::try_from(maps.table);
        let table = table.with_context(|| format!("open map {}", F::MAPS.table))?;
        let mut flows = Self { table, places, capacity: 0, family: PhantomData };
        let mut table = flows.table()?;
        if table.mask == 0 {
            let room = entries(&maps.places, F::MAPS.flow)? / 2;
            let sets = entries(&maps.index, F::MAPS.index)?;
            let numbers = entries(&maps.free, F::MAPS.free)?;
            table.seed = RandomState::new().hash_one(numbers);
            // The maps of an agent that was interrupted may be of several sizes.
            table.flows = room.min(numbers).min(2 * sets);
            table.mask = sets - 1;
            let written = flows.table.set(0, Wire(table), 0);
            written.with_context(|| format!("write map {}", F::MAPS.table))?;
        }
        flows.capacity = table.flows;
        Ok(flows)
    }

    /// Size in flows.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    fn table(&self) -> Result<FlowTable> {
        let table = self.table.get(&0, 0).with_context(|| format!("read map {}", F::MAPS.table))?;
        Ok(table.0)
    }

    /// Shows the halves of all flows to `visit`, a batch at a time: of each flow the half of the
    /// direction that opened it, and the answer's. One that is opened meanwhile may be missed.
    fn for_each(&self, mut visit: impl FnMut(&[[Place<F::Wire>; 2]]) -> Result<()>) -> Result<()> {
        /// Flows read in one system call.
        const BATCH: usize = 4096;
        let mut left = self.table()?.top.min(self.capacity) as usize;
        let (mut keys, mut flows) = (vec![[0_u32; 2]; BATCH], vec![Default::default(); BATCH]);
        let mut at = None;
        while left > 0 {
            let wanted = left.min(BATCH);
            let places: &mut [Place<F::Wire>] = flows[..wanted].as_flattened_mut();
            let keys = keys[..wanted].as_flattened_mut();
            let (count, next) = lookup_batch(self.places.as_fd(), at, keys, places)
                .with_context(|| format!("read map {}", F::MAPS.flow))?;
            let read = &mut flows[..count / 2];
            left -= read.len();
            visit(&taken(read))?;
            if next.is_none() || count == 0 {
                break;
            }
            at = next;
        }
        Ok(())
    }

    /// Every flow.
    ///
    /// # Errors
    /// The table can't be read.
    pub(super) fn records(&self, timeouts: &Timeouts) -> Result<Vec<FlowRecord>> {
        let now = now()?;
        let mut records = Vec::new();
        self.for_each(|batch| {
            for [Place { key, half, .. }, Place { half: reply, .. }] in batch {
                let (state, idle) = judge(key, half, reply, now);
                let expires = state.timeout(key.proto, timeouts).saturating_sub(idle);
                let at = |address: F::Wire, port: Be16| (show::<F>(address), port.get());
                records.push(FlowRecord {
                    protocol: key.proto,
                    network: NetworkId(half.network()),
                    source: at(key.tuple.src, key.tuple.sport),
                    destination: at(key.tuple.dst, key.tuple.dport),
                    translated_source: at(half.to.src, half.to.sport),
                    translated_destination: at(half.to.dst, half.to.dport),
                    state: state.name(),
                    idle: Duration::from_secs(idle.into()),
                    expires: Duration::from_secs(expires.into()),
                });
            }
            Ok(())
        })?;
        Ok(records)
    }

    /// Removes what has been idle for longer than its timeout. Returns how many, and what is left.
    ///
    /// # Errors
    /// The table can't be read, or the program not be run.
    pub(super) fn collect(
        &self,
        collector: &SchedClassifier,
        timeouts: &Timeouts,
    ) -> Result<(usize, Survey)> {
        let now = now()?;
        let mut survey = Survey::default();
        let mut removed = 0;
        self.for_each(|batch| {
            let mut suspects = Vec::new();
            for [Place { key, half, .. }, Place { half: reply, .. }] in batch {
                survey.flows += 1;
                *survey.by_endpoint.entry(half.generation).or_default() += 1;
                let (state, idle) = judge(key, half, reply, now);
                if idle > state.timeout(key.proto, timeouts) {
                    suspects.push(*key);
                }
            }
            removed += run(collector, order::EXPIRE, &suspects)?;
            Ok(())
        })?;
        Ok((removed, survey))
    }

    /// Removes what rests on something that is gone. Returns how many.
    ///
    /// # Errors
    /// The table can't be read, or the program not be run.
    pub(super) fn purge_stale(
        &self,
        collector: &SchedClassifier,
        footing: &Footing<'_, F::Wire>,
    ) -> Result<usize> {
        let mut removed = 0;
        self.for_each(|batch| {
            let is_stale = |half: &&Place<F::Wire>| footing.is_lost(&half.key, &half.half);
            let stale: Vec<_> = batch
                .iter()
                .filter_map(|halves| halves.iter().find(is_stale))
                .map(|half| half.key)
                .collect();
            removed += run(collector, order::REMOVE, &stale)?;
            Ok(())
        })?;
        Ok(removed)
    }
}

/// Those that a flow has.
fn taken<A: Address>(flows: &[[Place<A>; 2]]) -> Vec<[Place<A>; 2]> {
    flows.iter().filter(|[original, _]| original.is_taken != 0).copied().collect()
}

/// The map as aya has it before it is typed.
fn map_data(map: &Map) -> Result<&MapData> {
    match map {
        Map::Array(data) | Map::Stack(data) => Ok(data),
        _ => anyhow::bail!("it is no array and no stack"),
    }
}

/// Has the collector carry out an order. Returns how many flows it removed.
fn run<A: Address>(collector: &SchedClassifier, order: u32, keys: &[FlowKey<A>]) -> Result<usize> {
    /// Bytes of `__sk_buff` up to and with its first control word, and where that lies.
    const CONTEXT: usize = 192;
    const CONTROL_WORD: usize = 48;
    let mut context = [0; CONTEXT];
    context[CONTROL_WORD..CONTROL_WORD + 4].copy_from_slice(&order.to_ne_bytes());
    let mut removed = 0;
    for chunk in keys.chunks(KEYS_MAX) {
        let mut frame = vec![0; KEYS_AT];
        frame.extend_from_slice(bytemuck::cast_slice(chunk));
        let outcome = collector
            .test_run(TestRunOptions {
                data_in: Some(&frame),
                ctx_in: Some(&context),
                ..TestRunOptions::new()
            })
            .context("run the collector")?;
        removed += outcome.return_value as usize;
    }
    Ok(removed)
}

/// State of a flow and the seconds since its last packet in either direction.
fn judge<A: Address>(key: &FlowKey<A>, half: &Flow<A>, reply: &Flow<A>, now: u32) -> (State, u32) {
    let last_seen = half.last_seen.max(reply.last_seen);
    (State::new(key.proto, half.seen, reply.seen), now.saturating_sub(last_seen))
}

/// The programs' clock: seconds of CLOCK_MONOTONIC, which stands still while the host sleeps.
///
/// # Errors
/// The kernel's.
pub(super) fn now() -> Result<u32> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the clock")?;
    u32::try_from(now.tv_sec()).context("uptime in 32 bits of seconds")
}
