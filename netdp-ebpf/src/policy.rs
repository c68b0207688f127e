//! The user's rules: whether a source may open, or keep, a flow into a network.

use netdp_common::{
    network::{Network, flag},
    policy::PolicyKey,
};

use crate::family::Family;

/// No matching rule lets the packet go on to netdp's own rules.
#[inline(always)]
pub(crate) fn allows<F: Family>(id: u32, network: &Network, source: F::Address) -> bool {
    if !network.has(flag::POLICY) {
        return true;
    }
    let key = PolicyKey { network: id, generation: network.policy_generation, address: source };
    F::policy(key).is_none_or(|verdict| verdict.allow != 0)
}
