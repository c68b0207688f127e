//! The flow tables: reading them, changing and removing flows behind the programs' back.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use aya::maps::{Array, Map, MapData, Stack};
use bytemuck::{Pod, bytes_of, pod_read_unaligned};
use netdp_common::{
    addr::{Address, Be32, Be128, Tuple},
    flow::{FlowTable, IndexSet, Place, flag, tag},
};

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
    index: Array<MapData, [u8; size_of::<IndexSet>()]>,
    free: Stack<MapData, u32>,
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
            index: Map::Array(map("INDEX")?).try_into()?,
            free: Map::Stack(map("FREE")?).try_into()?,
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

    /// Removes those flows that `is_doomed` says of their two halves; returns how many. The place that is
    /// freed last is the first to be taken again: the lowest.
    pub(crate) fn remove<A: Address>(
        &mut self,
        mut is_doomed: impl FnMut(&[Place<A>; 2]) -> bool,
    ) -> Result<usize>
    where
        Place<A>: Pod,
    {
        let mut removed = 0;
        for number in (0..self.table()?.top).rev() {
            let mut halves: [Place<A>; 2] = Default::default();
            for (side, half) in (0..).zip(&mut halves) {
                *half = pod_read_unaligned(&self.places.get(&(2 * number + side), 0)?);
            }
            if halves[0].is_taken == 0 || !is_doomed(&halves) {
                continue;
            }
            for half in &mut halves {
                self.take_out(half)?;
                half.is_taken = 0;
                self.places.set(half.number, <[u8; PLACE]>::try_from(bytes_of(half))?, 0)?;
            }
            self.free.push(number, 0)?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Leaves a table without flows as it is before it may be used.
    pub(crate) fn unfinish(&mut self) -> Result<()> {
        Ok(self.table.set(0, [0; size_of::<FlowTable>()], 0)?)
    }

    /// Takes a half out of the index.
    fn take_out<A: Address>(&mut self, half: &Place<A>) -> Result<()> {
        let FlowTable { seed, mask, .. } = self.table()?;
        let hash = half.key.hash(seed);
        let number = hash as u32 & mask;
        let mut set: IndexSet = pod_read_unaligned(&self.index.get(&number, 0)?);
        let mut tags = [0; 12];
        tags[..8].copy_from_slice(&set.first_tags.to_le_bytes());
        tags[8..].copy_from_slice(&set.last_tags.to_le_bytes());
        let is_it = |slot: &usize| tags[*slot] == tag(hash) && set.places[*slot] == half.number;
        let slots: Vec<_> = (0..tags.len()).filter(is_it).collect();
        ensure!(slots.len() == 1, "place {} stands in slots {slots:?} of {set:?}", half.number);
        tags[slots[0]] = 0;
        set.first_tags = u64::from_le_bytes(tags[..8].try_into()?);
        set.last_tags = u32::from_le_bytes(tags[8..].try_into()?);
        self.index.set(number, <[u8; size_of::<IndexSet>()]>::try_from(bytes_of(&set))?, 0)?;
        Ok(())
    }
}
