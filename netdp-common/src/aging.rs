//! COLLECTION and USAGE: how flows end, and how many each endpoint has.

use crate::{abi::wire, config::Timeouts};

/// Where the keys begin in the frame that carries an order: behind room for an Ethernet header.
pub const KEYS_AT: usize = 14;

/// Most keys of flows in one order to `collect4` or `collect6`.
pub const KEYS_MAX: usize = 32;

/// The agent collects every few seconds; without a word from it for this many it counts as gone.
pub const AGENT_SECONDS: u32 = 60;

wire! {
    /// The single entry of COLLECTION, which the agent writes each time it collects.
    pub struct Collection {
        /// How long idle flows are kept at present: the fuller the table, the shorter.
        pub timeouts: Timeouts,
        /// Seconds of CLOCK_MONOTONIC of the agent's last collection.
        pub at: u32,
    }
}

/// What an order asks for; stands in the first control word of the frame that carries it.
pub mod order {
    /// Remove those that have been idle for too long.
    pub const EXPIRE: u32 = 0;
    /// Remove all: what they rest on is gone.
    pub const REMOVE: u32 = 1;
}
