//! The flow table, seen from the agent: reading, collecting, purging.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::{Context, Result};
use aya::maps::{Map, MapError};
use netdp_common::{
    addr::{Be16, Be32},
    flow::{Flow4, FlowKey4, State, flag},
};
use nix::time::{ClockId, clock_gettime};

use super::{
    image::Image,
    sys::Wire,
    tables::{Hash, absent_is_fine},
};
use crate::{dataplane::FlowRecord, model::NetworkId};

/// A reply half without its original is left alone for this long: it may be new, and the original
/// half on its way.
const ORPHAN_SECONDS: u32 = 30;

/// FLOW4.
pub(super) struct Flows {
    map: Hash<FlowKey4, Flow4>,
}

impl Flows {
    pub(super) fn new(map: Map) -> Result<Self> {
        Ok(Self { map: Hash::try_from(map).context("open map FLOW4")? })
    }

    fn get(&self, key: FlowKey4) -> Result<Option<Flow4>> {
        match self.map.get(&Wire(key), 0) {
            Ok(half) => Ok(Some(half.0)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).context("read map FLOW4"),
        }
    }

    fn halves(&self) -> impl Iterator<Item = Result<(FlowKey4, Flow4)>> {
        self.map
            .iter()
            .map(|entry| entry.map(|(key, half)| (key.0, half.0)).context("read map FLOW4"))
    }

    /// Removes both halves of each; they may be gone already.
    fn remove(&mut self, flows: &[(FlowKey4, Flow4)]) -> Result<()> {
        for (key, half) in flows {
            for key in [half.peer_key(key.proto), *key] {
                absent_is_fine(self.map.remove(&Wire(key))).context("delete from map FLOW4")?;
            }
        }
        Ok(())
    }

    /// Every flow.
    pub(super) fn records(&self) -> Result<Vec<FlowRecord>> {
        let now = now()?;
        let mut records = Vec::new();
        for entry in self.halves() {
            let (key, half) = entry?;
            if half.flags & flag::ORIGINAL == 0 {
                continue;
            }
            let reply = self.get(half.peer_key(key.proto))?;
            let (state, idle) = judge(&key, &half, reply.as_ref(), now);
            let expires = state.timeout(key.proto).saturating_sub(idle);
            let at = |address: Be32, port: Be16| (Ipv4Addr::from(address), port.get());
            records.push(FlowRecord {
                protocol: key.proto,
                network: NetworkId(half.network),
                source: at(key.tuple.src, key.tuple.sport),
                destination: at(key.tuple.dst, key.tuple.dport),
                translated_source: at(half.to.src, half.to.sport),
                translated_destination: at(half.to.dst, half.to.dport),
                state: state.name(),
                idle: Duration::from_secs(idle.into()),
                expires: Duration::from_secs(expires.into()),
            });
        }
        Ok(records)
    }

    /// Removes what has been idle for longer than its timeout, and what is only half there.
    pub(super) fn collect(&mut self) -> Result<usize> {
        let now = now()?;
        let mut expired = Vec::new();
        for entry in self.halves() {
            let (key, half) = entry?;
            if half.flags & flag::ORIGINAL != 0 {
                let reply = self.get(half.peer_key(key.proto))?;
                let (state, idle) = judge(&key, &half, reply.as_ref(), now);
                // Without its reply, which was there first, it is no flow: the next packet
                // opens a whole one.
                if reply.is_none() || idle > state.timeout(key.proto) {
                    expired.push((key, half));
                }
            } else if now.saturating_sub(half.last_seen) > ORPHAN_SECONDS
                && self.get(half.peer_key(key.proto))?.is_none()
            {
                expired.push((key, half));
            }
        }
        self.remove(&expired)?;
        Ok(expired.len())
    }

    /// Removes what rests on something that `image` no longer has.
    pub(super) fn purge_stale(&mut self, image: &Image) -> Result<usize> {
        let mut stale = Vec::new();
        for entry in self.halves() {
            let (key, half) = entry?;
            if image.is_stale(&key, &half) {
                stale.push((key, half));
            }
        }
        self.remove(&stale)?;
        Ok(stale.len())
    }
}

/// State of a flow and the seconds since its last packet in either direction.
fn judge(key: &FlowKey4, half: &Flow4, reply: Option<&Flow4>, now: u32) -> (State, u32) {
    let reply_seen = reply.map_or(0, |reply| reply.seen);
    let last_seen = half.last_seen.max(reply.map_or(0, |reply| reply.last_seen));
    (State::new(key.proto, half.seen, reply_seen), now.saturating_sub(last_seen))
}

/// The programs' clock: seconds of CLOCK_BOOTTIME.
fn now() -> Result<u32> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).context("read the boot clock")?;
    u32::try_from(now.tv_sec()).context("uptime in 32 bits of seconds")
}
