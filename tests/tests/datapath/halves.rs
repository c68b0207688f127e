//! The flow tables: reading them, changing and removing flows behind the programs' back.

use std::{net::IpAddr, os::fd::AsFd};

use anyhow::{Context, Result};
use aya::{
    maps::{Array, Map, MapData},
    programs::{SchedClassifier, loaded_programs},
};
use bytemuck::{Pod, bytes_of, cast_slice, pod_read_unaligned};
use netdp_common::{
    addr::{Address, Be32, Be128, Tuple},
    aging::{KEYS_AT, KEYS_MAX, order},
    flow::{FlowKey, FlowTable, Place, flag},
};
use netdp_tests::bpf::{self, Checksum, SkbContext};

/// Where packets of a half arrive: a network's id, or 0 for the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zone(pub(crate) u32);

/// A half of a flow in either table, as far as tests look at it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Half {
    /// Number of its flow.
    pub(crate) number: u32,
    /// Where its packets arrive.
    pub(crate) zone: Zone,
    /// IP protocol number.
    pub(crate) protocol: u8,
    /// Source and destination of its packets when they arrive.
    pub(crate) from: [(IpAddr, u16); 2],
    /// The same when they leave.
    pub(crate) to: [(IpAddr, u16); 2],
    /// Where the answer arrives.
    pub(crate) reply_zone: Zone,
    /// Of the direction that opened the flow.
    pub(crate) is_original: bool,
    /// See [`Flow::network`].
    pub(crate) network: u32,
    /// See [`Flow::policy_generation`].
    pub(crate) policy_generation: u32,
    /// See [`Flow::seen`].
    pub(crate) seen: u8,
    /// See [`Flow::generation`]; may be changed.
    pub(crate) generation: u32,
    /// See [`Flow::last_seen`]; may be changed.
    pub(crate) last_seen: u32,
}

impl Half {
    /// Zone, source and destination of what arrives by it.
    pub(crate) fn arriving(&self) -> Arriving {
        (self.zone.0, self.from)
    }

    /// The same of the answers to what leaves by it.
    pub(crate) fn answering(&self) -> Arriving {
        let [source, destination] = self.to;
        (self.reply_zone.0, [destination, source])
    }
}

/// Zone, source and destination of a packet.
pub(crate) type Arriving = (u32, [(IpAddr, u16); 2]);

/// What becomes of a half that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Kept,
    /// Written back as it is now.
    Changed,
}

/// The flow table of a family: values of `PLACE` bytes.
pub(crate) struct Table<const PLACE: usize> {
    table: Array<MapData, [u8; size_of::<FlowTable>()]>,
    places: Array<MapData, [u8; PLACE]>,
}

/// IPv4's.
pub(crate) type Table4 = Table<{ size_of::<Place<Be32>>() }>;
/// IPv6's.
pub(crate) type Table6 = Table<{ size_of::<Place<Be128>>() }>;

impl<const PLACE: usize> Table<PLACE> {
    /// The maps that `map` finds by their names, which end like this.
    pub(crate) fn open(map: impl Fn(&str) -> Result<MapData>, ending: char) -> Result<Self> {
        let map = |name| map(&format!("{name}{ending}"));
        Ok(Self {
            table: Map::Array(map("TABLE")?).try_into()?,
            places: Map::Array(map("FLOW")?).try_into()?,
        })
    }

    /// What holds for all of it.
    pub(crate) fn table(&self) -> Result<FlowTable> {
        Ok(pod_read_unaligned(&self.table.get(&0, 0)?))
    }

    /// Shows every half to `visit`, which says what becomes of it; returns how many were changed.
    pub(crate) fn visit<A: Address>(
        &mut self,
        address: impl Fn(A) -> IpAddr,
        visit: &mut impl FnMut(&mut Half) -> Fate,
    ) -> Result<usize>
    where
        Place<A>: Pod,
    {
        let ends = |tuple: &Tuple<A>| {
            [(address(tuple.src), tuple.sport.get()), (address(tuple.dst), tuple.dport.get())]
        };
        let mut changed = 0;
        for number in 0..2 * self.table()?.top {
            let mut place: Place<A> = pod_read_unaligned(&self.places.get(&number, 0)?);
            if place.is_taken == 0 {
                continue;
            }
            let Place { key, half: flow, .. } = &mut place;
            let mut half = Half {
                number: number / 2,
                zone: Zone(key.zone.into()),
                protocol: key.proto,
                from: ends(&key.tuple),
                to: ends(&flow.to),
                reply_zone: Zone(flow.reply_zone()),
                is_original: flow.flags & flag::ORIGINAL != 0,
                network: flow.network(),
                policy_generation: flow.policy_generation,
                seen: flow.seen,
                generation: flow.generation,
                last_seen: flow.last_seen,
            };
            if visit(&mut half) == Fate::Changed {
                (flow.generation, flow.last_seen) = (half.generation, half.last_seen);
                self.places.set(number, <[u8; PLACE]>::try_from(bytes_of(&place))?, 0)?;
                changed += 1;
            }
        }
        Ok(changed)
    }

    /// The keys of all flows, by their original halves, the highest number first: the lowest is then
    /// given back last, and the first to be taken again.
    pub(crate) fn keys<A: Address>(&self) -> Result<Vec<FlowKey<A>>>
    where
        Place<A>: Pod,
    {
        let mut keys = Vec::new();
        for number in (0..self.table()?.top).rev() {
            let place: Place<A> = pod_read_unaligned(&self.places.get(&(2 * number), 0)?);
            if place.is_taken != 0 {
                keys.push(place.key);
            }
        }
        Ok(keys)
    }

    /// Number of the set of the index that a key belongs in.
    pub(crate) fn set_of<A: Address>(&self, key: &FlowKey<A>) -> Result<u32> {
        let table = self.table()?;
        Ok(key.hash(table.seed) as u32 & table.mask)
    }

    /// Leaves a table without flows as it is before it may be used.
    pub(crate) fn unfinish(&mut self) -> Result<()> {
        Ok(self.table.set(0, [0; size_of::<FlowTable>()], 0)?)
    }
}

/// A program of the agent's that removes flows of a family.
pub(crate) struct Collector(SchedClassifier);

impl Collector {
    /// Those of both families whose maps these are, by name: IPv4's and IPv6's.
    pub(crate) fn both(map: impl Fn(&str) -> Result<MapData>) -> Result<[Self; 2]> {
        Ok([Self::find("collect4", &map("FLOW4")?)?, Self::find("collect6", &map("FLOW6")?)?])
    }

    /// The one of this name that was loaded last among those that use the map.
    fn find(name: &'static str, map: &MapData) -> Result<Self> {
        let map = map.info()?.id();
        let mut newest = None;
        for info in loaded_programs() {
            // Others' programs come and go meanwhile.
            let Ok(info) = info else { continue };
            let uses_map =
                || info.map_ids().is_ok_and(|ids| ids.is_some_and(|ids| ids.contains(&map)));
            if info.name_as_str() == Some(name) && uses_map() {
                newest = Some(info);
            }
        }
        let info = newest.with_context(|| format!("find {name}"))?;
        Ok(Self(SchedClassifier::from_program_info(info, name.into())?))
    }

    /// Removes the flows that have halves with these keys; returns how many.
    pub(crate) fn remove<A: Address>(&self, keys: &[FlowKey<A>]) -> Result<usize>
    where
        FlowKey<A>: Pod,
    {
        let mut removed = 0;
        for keys in keys.chunks(KEYS_MAX) {
            let mut frame = vec![0; KEYS_AT];
            frame.extend_from_slice(cast_slice(keys));
            let context = SkbContext::order(order::REMOVE);
            let ran = bpf::run(self.0.fd()?.as_fd(), &frame, &context, Checksum::Unknown)?;
            removed += usize::try_from(ran.verdict)?;
        }
        Ok(removed)
    }
}
