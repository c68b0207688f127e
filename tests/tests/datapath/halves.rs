//! The halves in the flow tables: reading them, changing them, deleting them behind the programs'
//! back.

use std::net::IpAddr;

use anyhow::Result;
use aya::maps::{HashMap, Map, MapData};
use bytemuck::{Pod, bytes_of, pod_read_unaligned};
use netdp_common::{
    addr::{Address, Be32, Be128, Tuple},
    flow::{Flow, FlowKey, flag},
};

/// Where packets of a half arrive: a network's id, or 0 for the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zone(pub(crate) u32);

/// See [`Zone`].
pub(crate) const WORLD: Zone = Zone(0);

/// A half of a flow in either table, as far as tests look at it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Half {
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
    Gone,
}

/// Shows every half of both tables to `visit`, which says what becomes of it; returns how many
/// were not kept as they were.
pub(crate) fn visit(
    table4: MapData,
    table6: MapData,
    mut visit: impl FnMut(&mut Half) -> Fate,
) -> Result<usize> {
    const KEY4: usize = size_of::<FlowKey<Be32>>();
    const KEY6: usize = size_of::<FlowKey<Be128>>();
    const HALF4: usize = size_of::<Flow<Be32>>();
    const HALF6: usize = size_of::<Flow<Be128>>();
    let mut table4: HashMap<_, [u8; KEY4], [u8; HALF4]> = Map::HashMap(table4).try_into()?;
    let mut table6: HashMap<_, [u8; KEY6], [u8; HALF6]> = Map::HashMap(table6).try_into()?;
    let address4 = |address| IpAddr::V4(Be32::into(address));
    let address6 = |address| IpAddr::V6(Be128::into(address));
    Ok(visit_table::<Be32, KEY4, HALF4>(&mut table4, address4, &mut visit)?
        + visit_table::<Be128, KEY6, HALF6>(&mut table6, address6, &mut visit)?)
}

/// See [`visit`].
fn visit_table<A: Address, const KEY: usize, const HALF: usize>(
    table: &mut HashMap<MapData, [u8; KEY], [u8; HALF]>,
    address: impl Fn(A) -> IpAddr,
    visit: &mut impl FnMut(&mut Half) -> Fate,
) -> Result<usize>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let ends = |tuple: &Tuple<A>| {
        [(address(tuple.src), tuple.sport.get()), (address(tuple.dst), tuple.dport.get())]
    };
    let mut visited = 0;
    for (key, value) in table.iter().collect::<Result<Vec<_>, _>>()? {
        let mut flow: Flow<A> = pod_read_unaligned(&value);
        let arrives: FlowKey<A> = pod_read_unaligned(&key);
        let mut half = Half {
            zone: Zone(arrives.zone.into()),
            protocol: arrives.proto,
            from: ends(&arrives.tuple),
            to: ends(&flow.to),
            reply_zone: Zone(flow.reply_zone()),
            is_original: flow.flags & flag::ORIGINAL != 0,
            network: flow.network(),
            policy_generation: flow.policy_generation,
            seen: flow.seen,
            generation: flow.generation,
            last_seen: flow.last_seen,
        };
        match visit(&mut half) {
            Fate::Kept => continue,
            Fate::Gone => table.remove(&key)?,
            Fate::Changed => {
                (flow.generation, flow.last_seen) = (half.generation, half.last_seen);
                table.insert(key, <[u8; HALF]>::try_from(bytes_of(&flow))?, 0)?;
            }
        }
        visited += 1;
    }
    Ok(visited)
}
