//! POLICY4 and POLICY6: the user's rules of a network, compiled to longest-prefix matches.

use crate::abi::wire;

/// Bits of [`PolicyKey`] that come before the address: every lookup and every entry has at least
/// these, so networks and generations never match each other.
pub const PREFIX_BASE: u32 = 64;

wire! {
    /// Data of the LPM key of POLICY4 and POLICY6.
    pub struct PolicyKey<A> {
        /// Network id.
        pub network: u32,
        /// A new policy is written under a new generation, then made the network's, then the old
        /// one is deleted: a packet meets the old policy or the new one.
        pub generation: u32,
        /// Source address.
        pub address: A,
    }
}

wire! {
    /// Value of POLICY4 and POLICY6. No entry: no rule matches.
    pub struct PolicyVerdict {
        /// 1 = go on to our own rules, 0 = drop.
        pub allow: u32,
        /// Index of the rule that decides.
        pub rule: u32,
    }
}
