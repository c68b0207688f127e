//! The end of flows: collected when they have been idle for too long, by the agent's order and
//! without it.
//!
//! The agent reads the tables and names candidates; `collect4` and `collect6` look again and remove
//! both halves at once, so that a packet that comes meanwhile keeps its flow. Where the agent is not
//! there, whoever opens a flow looks after the two whose turn it is: a hand goes round the table. Where
//! the table is full, it looks for one that nobody has answered and takes its place; the next in turn
//! are then those that were opened longest ago.

use aya_ebpf::{bindings::__sk_buff, programs::sk_buff::SkBuff};
use netdp_common::{
    aging::{AGENT_SECONDS, Collection, KEYS_AT, KEYS_MAX, order},
    flow::{Flow, FlowKey, State, flag},
};

use crate::{
    family::Family,
    flow, kernel, maps, packet,
    table::{self, FlowRef},
};

/// Flows looked at for each new one while nobody else does.
const EACH_TIME: u32 = 2;
/// Flows looked at in search of room in a full table.
const RECLAIM: u32 = 8;
/// Besides those of [`order`]: remove it if nobody has answered it.
const MAKE_ROOM: u32 = 2;

/// What became of a flow that was looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    /// There was none.
    Nothing,
    Alive,
    /// It is removed.
    Over,
}

/// Carries out an order of the agent: a frame that holds keys of flows behind room for an Ethernet
/// header. Returns how many flows it removed.
#[inline(always)]
pub(crate) fn collect<F: Family>(skb: *mut __sk_buff) -> i32 {
    let (Some(collection), Some(suspect)) = (maps::collection(), F::suspect()) else { return 0 };
    let kind = packet::control_word(skb);
    let now = kernel::now();
    let frame = SkBuff::new(skb);
    // In memory, of whose contents the verifier knows nothing: it would follow each number.
    suspect.removed = 0;
    for place in 0..KEYS_MAX {
        let at = KEYS_AT + place * size_of::<FlowKey<F::Address>>();
        let Ok(key) = frame.load(at) else { break };
        suspect.key = key;
        if look_at::<F>(suspect, kind, collection, now) == Found::Over {
            suspect.removed += 1;
        }
    }
    suspect.removed as i32
}

/// Notes that a flow has begun `now`: looks after others where nobody else does.
#[inline(always)]
pub(crate) fn begin<F: Family>(now: u32) {
    if is_agent_there(now) {
        return;
    }
    for _ in 0..EACH_TIME {
        F::look_at_next(order::EXPIRE);
    }
}

/// Whether the agent has been there of late.
#[inline(always)]
pub(crate) fn is_agent_there(now: u32) -> bool {
    maps::collection().is_some_and(|collection| now.saturating_sub(collection.at) < AGENT_SECONDS)
}

/// Makes room in a full table, where a flow that nobody has answered takes some.
#[inline(always)]
pub(crate) fn make_room<F: Family>() -> bool {
    for _ in 0..RECLAIM {
        if F::look_at_next(MAKE_ROOM) == Found::Over as u32 {
            return true;
        }
    }
    false
}

/// Looks at the flow whose turn it is and removes it if it should go. Returns one of [`Found`].
#[inline(always)]
pub(crate) fn look_at_next<F: Family>(kind: u32) -> u32 {
    let (Some(collection), Some(suspect)) = (maps::collection(), F::suspect()) else {
        return Found::Nothing as u32;
    };
    let next = table::next_in_turn::<F>().and_then(|number| table::at::<F>(2 * number));
    let Some(next) = next.filter(|next| next.is_taken()) else { return Found::Nothing as u32 };
    suspect.key = *next.key();
    look_at::<F>(suspect, kind, collection, kernel::now()) as u32
}

/// A flow that may have to go. It lies in a map ([`crate::maps::Maps::suspect`]): the stack is too
/// small.
pub(crate) struct Suspect<F: Family> {
    key: FlowKey<F::Address>,
    pub(crate) half: Flow<F::Address>,
    /// Suspects removed by this order.
    removed: u32,
}

/// Looks at a flow by one of its halves and removes it if it should go.
#[inline(always)]
fn look_at<F: Family>(
    suspect: &mut Suspect<F>,
    kind: u32,
    collection: &Collection,
    now: u32,
) -> Found {
    let Some(found) = table::flow::<F>(&suspect.key) else { return Found::Nothing };
    if !found.copy_of(&suspect.key, &mut suspect.half) {
        return Found::Nothing;
    }
    if !is_over(suspect, found, kind, collection, now) {
        return Found::Alive;
    }
    if flow::remove::<F>(&suspect.key) == 0 { Found::Nothing } else { Found::Over }
}

#[inline(always)]
fn is_over<F: Family>(
    suspect: &Suspect<F>,
    found: FlowRef<F::Address>,
    kind: u32,
    collection: &Collection,
    now: u32,
) -> bool {
    if kind == order::REMOVE {
        return true;
    }
    let Suspect { key, half, .. } = suspect;
    let Some(peer) = found.peer::<F>() else { return false };
    let (peer_seen, peer_last_seen) = (peer.seen(), peer.last_seen());
    let is_original = half.flags & flag::ORIGINAL != 0;
    let (original, reply) =
        if is_original { (half.seen, peer_seen) } else { (peer_seen, half.seen) };
    let state = State::new(key.proto, original, reply);
    if kind == MAKE_ROOM && state.is_tentative() {
        return true;
    }
    let idle = now.saturating_sub(half.last_seen).min(now.saturating_sub(peer_last_seen));
    idle > state.timeout(key.proto, &collection.timeouts)
}
