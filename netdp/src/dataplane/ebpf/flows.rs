//! A family's flow table, seen from the agent: reading, collecting, purging.
//!
//! The agent reads the table in batches and names what may have to go; a program in the kernel looks
//! again and removes both halves, so no packet that comes meanwhile loses its flow.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hasher, RandomState},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result};
use aya::{
    TestRun, TestRunOptions,
    maps::{Map, MapData, MapError},
    programs::SchedClassifier,
};
use netdp_common::{
    addr::{Address, Be16},
    aging::{KEYS_AT, KEYS_MAX, order},
    config::Timeouts,
    flow::{Flow, FlowKey, State, flag},
};
use nix::time::{ClockId, clock_gettime};

use super::{
    family::{Wired, show},
    image::Footing,
    sys::{Wire, for_each_batch},
    tables::Hash,
};
use crate::{dataplane::FlowRecord, model::NetworkId};

/// FLOW4 or FLOW6.
pub(super) struct Flows<F: Wired> {
    map: Hash<FlowKey<F::Wire>, Flow<F::Wire>>,
    /// The same, for what aya does not do.
    fd: OwnedFd,
    /// Size in flows.
    capacity: u32,
}

/// A half and where it is found.
type Half<A> = (FlowKey<A>, Flow<A>);

/// What one reading of a table has shown.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Flows in the table.
    pub(super) flows: u32,
    /// Flows by the generation of the endpoint that opened them.
    pub(super) by_endpoint: HashMap<u32, u64>,
}

impl<F: Wired> Flows<F> {
    /// The flow table over the object's map.
    ///
    /// # Errors
    /// The map's type or sizes are not those of a flow table.
    pub(super) fn new(map: Map) -> Result<Self> {
        let context = || format!("open map {}", F::MAPS.flow);
        let data = map_data(&map).with_context(context)?;
        let fd = data.fd().as_fd().try_clone_to_owned().with_context(context)?;
        let capacity = data.info().with_context(context)?.max_entries() / 2;
        Ok(Self { map: Hash::try_from(map).with_context(context)?, fd, capacity })
    }

    /// Size in flows.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    fn get(&self, key: FlowKey<F::Wire>) -> Result<Option<Flow<F::Wire>>> {
        match self.map.get(&Wire(key), 0) {
            Ok(half) => Ok(Some(half.0)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read map {}", F::MAPS.flow)),
        }
    }

    /// Shows every half to `visit`, a batch at a time. One that moves within the table meanwhile
    /// may be missed, or shown twice.
    fn for_each(&self, mut visit: impl FnMut(&[Half<F::Wire>]) -> Result<()>) -> Result<()> {
        let mut batch = Vec::new();
        let read = for_each_batch(self.fd.as_fd(), |keys, values| {
            batch.clear();
            batch.extend(keys.iter().copied().zip(values.iter().copied()));
            visit(&batch)
        });
        read.with_context(|| format!("read map {}", F::MAPS.flow))?
    }

    /// Every flow.
    ///
    /// # Errors
    /// The table can't be read.
    pub(super) fn records(&self, timeouts: &Timeouts) -> Result<Vec<FlowRecord>> {
        let now = now()?;
        let mut records = Vec::new();
        self.for_each(|batch| {
            for (key, half) in batch {
                if half.flags & flag::ORIGINAL == 0 {
                    continue;
                }
                let reply = self.get(half.peer_key(key.proto))?;
                let (state, idle) = judge(key, half, reply.as_ref(), now);
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

    /// Removes what has been idle for longer than its timeout, and what is only half there.
    /// Returns how many, and what is left.
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
        let mut pairing = Pairing::default();
        self.for_each(|batch| {
            let mut suspects = Vec::new();
            for (key, half) in batch {
                let idle = now.saturating_sub(half.last_seen);
                let is_original = half.flags & flag::ORIGINAL != 0;
                pairing.add(key, half);
                if is_original {
                    survey.flows += 1;
                    *survey.by_endpoint.entry(half.generation).or_default() += 1;
                }
                // The collector asks the other half, too. A reply half is looked at only when even
                // the longest-lived flow would be over: its original half tells sooner, as long
                // as there is one.
                let limit =
                    if is_original { shortest(key, timeouts) } else { longest(key, timeouts) };
                if idle > limit {
                    suspects.push(*key);
                }
            }
            removed += run(collector, order::EXPIRE, &suspects)?;
            Ok(())
        })?;
        // Some flow may have lost a half: the collector knows which, if it is asked about all.
        if !pairing.is_whole() {
            self.for_each(|batch| {
                let all: Vec<_> = batch.iter().map(|(key, _)| *key).collect();
                removed += run(collector, order::EXPIRE, &all)?;
                Ok(())
            })?;
        }
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
            let stale: Vec<_> = batch
                .iter()
                .filter(|(key, half)| footing.is_lost(key, half))
                .map(|(key, _)| *key)
                .collect();
            removed += run(collector, order::REMOVE, &stale)?;
            Ok(())
        })?;
        Ok(removed)
    }
}

/// Whether each half has its other one, told without remembering any: what both halves say of their
/// flow is hashed; originals add it, replies take it away.
#[derive(Default)]
struct Pairing {
    /// Random, so that nobody can choose flows that hide each other's losses.
    state: RandomState,
    sum: u64,
}

impl Pairing {
    fn add<A: Address>(&mut self, key: &FlowKey<A>, half: &Flow<A>) {
        let peer_key = half.peer_key(key.proto);
        let hash = |original: &FlowKey<A>, reply: &FlowKey<A>| {
            let mut hasher = self.state.build_hasher();
            hasher.write(bytemuck::bytes_of(original));
            hasher.write(bytemuck::bytes_of(reply));
            hasher.finish()
        };
        self.sum = if half.flags & flag::ORIGINAL != 0 {
            self.sum.wrapping_add(hash(key, &peer_key))
        } else {
            self.sum.wrapping_sub(hash(&peer_key, key))
        };
    }

    fn is_whole(&self) -> bool {
        self.sum == 0
    }
}

/// The map as aya has it before it is typed.
fn map_data(map: &Map) -> Result<&MapData> {
    match map {
        Map::HashMap(data) => Ok(data),
        _ => anyhow::bail!("it is no hash map"),
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

/// The shortest time that a flow of this protocol may be idle, whatever its state.
fn shortest<A: Address>(key: &FlowKey<A>, timeouts: &Timeouts) -> u32 {
    limits(key, timeouts).min().unwrap_or_default()
}

/// The longest.
fn longest<A: Address>(key: &FlowKey<A>, timeouts: &Timeouts) -> u32 {
    limits(key, timeouts).max().unwrap_or_default()
}

fn limits<A: Address>(key: &FlowKey<A>, timeouts: &Timeouts) -> impl Iterator<Item = u32> {
    let states = [State::Unreplied, State::Replied, State::HalfOpen, State::Established];
    states.map(|state| state.timeout(key.proto, timeouts)).into_iter()
}

/// State of a flow and the seconds since its last packet in either direction.
fn judge<A: Address>(
    key: &FlowKey<A>,
    half: &Flow<A>,
    reply: Option<&Flow<A>>,
    now: u32,
) -> (State, u32) {
    let reply_seen = reply.map_or(0, |reply| reply.seen);
    let last_seen = half.last_seen.max(reply.map_or(0, |reply| reply.last_seen));
    (State::new(key.proto, half.seen, reply_seen), now.saturating_sub(last_seen))
}

/// The programs' clock: seconds of CLOCK_MONOTONIC, which stands still while the host sleeps.
///
/// # Errors
/// The kernel's.
pub(super) fn now() -> Result<u32> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("read the clock")?;
    u32::try_from(now.tv_sec()).context("uptime in 32 bits of seconds")
}

#[cfg(test)]
mod tests {
    use netdp_common::{
        addr::{Be32, Tuple},
        flow::IPPROTO_UDP,
    };

    use super::*;

    /// Both halves of a flow from this port.
    fn flow(port: u16) -> [Half<Be32>; 2] {
        let [container, host, world] = [0xac14_0002, 0x0a00_0002, 0x0a00_0003].map(Be32::new);
        let arrives =
            Tuple { src: container, dst: world, sport: Be16::new(port), dport: Be16::new(53) };
        let key = FlowKey::new(7, arrives, IPPROTO_UDP);
        let to = Tuple { src: host, ..arrives };
        let half = Flow { to, flags: flag::ORIGINAL, ..Flow::default() };
        let reply = Flow { to: arrives.reversed(), reply_zone: 7, ..Flow::default() };
        [(key, half), (half.peer_key(key.proto), reply)]
    }

    #[test]
    fn losses_of_different_flows_do_not_hide_each_other() {
        let is_whole = |halves: &[Half<Be32>]| {
            let mut pairing = Pairing::default();
            halves.iter().for_each(|(key, half)| pairing.add(key, half));
            pairing.is_whole()
        };
        let ([a, b], [c, d]) = (flow(4000), flow(4001));
        assert!(is_whole(&[]) && is_whole(&[a, b]) && is_whole(&[d, a, c, b]));
        assert!(!is_whole(&[a]) && !is_whole(&[b]) && !is_whole(&[a, b, d]));
        assert!(!is_whole(&[a, d]), "a reply and an original are no flow");
        let lost = (b.0, Flow { reply_zone: 8, ..b.1 });
        assert!(!is_whole(&[a, lost]), "a reply that leads elsewhere");
    }
}
