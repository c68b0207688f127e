//! The end of flows as connections end: one by one and each by its keys, with nothing else of the
//! tables looked at.

use anyhow::{Context, Result};
use aya::maps::{HashMap, Map, Queue};
use bytemuck::{Pod, bytes_of, pod_read_unaligned};
use netdp_common::{
    addr::{Address, Be32, Be128},
    flow::{Flow, FlowKey},
};

use crate::{family::Family, fixture::Fixture};

/// Ends all flows of a family, those first that were opened first, and forgets their order. Returns how
/// many there were.
pub(crate) fn of_all(fixture: &Fixture, family: Family) -> Result<usize> {
    const KEY4: usize = size_of::<FlowKey<Be32>>();
    const KEY6: usize = size_of::<FlowKey<Be128>>();
    const HALF4: usize = size_of::<Flow<Be32>>();
    const HALF6: usize = size_of::<Flow<Be128>>();
    match family {
        Family::V4 => of_table::<Be32, KEY4, HALF4>(fixture, "FLOW4", "PENDING4"),
        Family::V6 => of_table::<Be128, KEY6, HALF6>(fixture, "FLOW6", "PENDING6"),
    }
}

fn of_table<A: Address, const KEY: usize, const HALF: usize>(
    fixture: &Fixture,
    table: &str,
    order: &str,
) -> Result<usize>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut table: HashMap<_, [u8; KEY], [u8; HALF]> =
        Map::HashMap(fixture.map(table)?).try_into()?;
    let mut order: Queue<_, [u8; KEY]> = Map::Queue(fixture.map(order)?).try_into()?;
    let mut ended = 0;
    // A queue that is empty answers with an error.
    while let Ok(key) = order.pop(0) {
        let half: Flow<A> = pod_read_unaligned(&table.get(&key, 0).context("find a flow")?);
        let proto = pod_read_unaligned::<FlowKey<A>>(&key).proto;
        let answers = half.peer_key(proto);
        table.remove(&<[u8; KEY]>::try_from(bytes_of(&answers))?).context("end a flow")?;
        table.remove(&key).context("end a flow")?;
        ended += 1;
    }
    Ok(ended)
}
