//! The user's rules: whether a source may open, or keep, a flow into a network.

use netdp_common::{
    addr::Be32,
    network::{Network, flag},
    policy::PolicyKey4,
};

use crate::maps;

/// No matching rule lets the packet go on to netdp's own rules.
#[inline(always)]
pub(crate) fn allows(id: u32, network: &Network, source: Be32) -> bool {
    if !network.has(flag::POLICY) {
        return true;
    }
    let key = PolicyKey4 { network: id, generation: network.policy_generation, address: source };
    maps::policy(key).is_none_or(|verdict| verdict.allow != 0)
}
