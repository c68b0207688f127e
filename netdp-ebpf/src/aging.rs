//! The end of flows: collected when they have been idle for too long, by the agent's order and
//! without it.
//!
//! The agent reads the tables and names candidates; `collect4` and `collect6` look again and remove
//! both halves at once, so that a packet that comes meanwhile keeps its flow. Besides, each flow
//! leaves its key in a queue when it is opened. Where the agent is not there or the queue is full,
//! whoever opens a flow looks after the two oldest; where the table is full, it looks for one that
//! nobody has answered and takes its place.

use aya_ebpf::{bindings::__sk_buff, programs::sk_buff::SkBuff};
use netdp_common::{
    aging::{AGENT_SECONDS, Collection, KEYS_AT, KEYS_MAX, order},
    flow::{Flow, FlowKey, State, flag},
};

use crate::{family::Family, flow, kernel, maps, packet};

/// Old flows looked at for each new one while nobody else does.
const OLDEST: u32 = 2;
/// Old flows looked at in search of room in a full table.
const RECLAIM: u32 = 8;
/// A reply half without its original is left alone for this many seconds: it may be new, and the
/// original half on its way.
const ORPHAN_SECONDS: u32 = 30;
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

/// Notes that a flow has begun `now`, and looks after the oldest where nobody else does.
#[inline(always)]
pub(crate) fn begin<F: Family>(key: &FlowKey<F::Address>, now: u32) {
    let is_queued = F::enqueue(key);
    if is_queued && is_agent_there(now) {
        return;
    }
    for _ in 0..OLDEST {
        F::look_at_oldest(order::EXPIRE);
    }
    if !is_queued {
        F::enqueue(key);
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
        if F::look_at_oldest(MAKE_ROOM) == Found::Over as u32 {
            return true;
        }
    }
    false
}

/// Takes the oldest flow out of the queue, removes it if it should go, and puts it back if not.
/// Returns one of [`Found`].
#[inline(always)]
pub(crate) fn look_at_oldest<F: Family>(kind: u32) -> u32 {
    let (Some(collection), Some(suspect)) = (maps::collection(), F::suspect()) else {
        return Found::Nothing as u32;
    };
    if !F::dequeue(&mut suspect.key) {
        return Found::Nothing as u32;
    }
    let found = look_at::<F>(suspect, kind, collection, kernel::now());
    if found == Found::Alive {
        F::enqueue(&suspect.key);
    }
    found as u32
}

/// A flow that may have to go. It lies in a map ([`crate::maps::Maps::suspect`]): the stack is too
/// small.
pub(crate) struct Suspect<F: Family> {
    key: FlowKey<F::Address>,
    pub(crate) half: Flow<F::Address>,
    pub(crate) peer_key: FlowKey<F::Address>,
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
    let Some(found) = F::flow(&suspect.key) else { return Found::Nothing };
    found.copy_to(&mut suspect.half);
    suspect.half.write_peer_key(suspect.key.proto, &mut suspect.peer_key);
    if !is_over(suspect, kind, collection, now) {
        return Found::Alive;
    }
    flow::remove_halves::<F>(&suspect.key, &suspect.half, &suspect.peer_key);
    Found::Over
}

#[inline(always)]
fn is_over<F: Family>(suspect: &Suspect<F>, kind: u32, collection: &Collection, now: u32) -> bool {
    if kind == order::REMOVE {
        return true;
    }
    let Suspect { key, half, peer_key, .. } = suspect;
    let is_original = half.flags & flag::ORIGINAL != 0;
    let idle = now.saturating_sub(half.last_seen);
    let Some(peer) = flow::peer::<F>(key, peer_key) else {
        // Without its reply, which was there first, an original half is no flow: the next packet
        // opens a whole one.
        return is_original || idle > ORPHAN_SECONDS;
    };
    let (peer_seen, peer_last_seen) = (peer.seen(), peer.last_seen());
    let (original, reply) =
        if is_original { (half.seen, peer_seen) } else { (peer_seen, half.seen) };
    let state = State::new(key.proto, original, reply);
    if kind == MAKE_ROOM && state.is_tentative() {
        return true;
    }
    let idle = idle.min(now.saturating_sub(peer_last_seen));
    idle > state.timeout(key.proto, &collection.timeouts)
}
