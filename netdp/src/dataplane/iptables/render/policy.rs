//! The user's rules of a network.

use netdp_common::counter::Reason;

use super::Net;
use crate::{
    dataplane::iptables::{
        family::Filtered,
        rules::{RuleSet, Table},
    },
    model::{Action, Rule},
};

/// Writes the rules of this family; whether there are any.
pub(super) fn render<F: Filtered>(net: &Net<'_, F>, rules: &mut RuleSet) -> bool {
    if net.is_closed() || net.side.is_none() {
        return false;
    }
    let matches: Vec<_> = net
        .network
        .policy
        .iter()
        .filter_map(|rule| Some((rule.action, sources::<F>(rule)?)))
        .collect();
    if matches.is_empty() {
        return false;
    }
    let mut chain = rules.chain(Table::Filter, net.chain("RULES"));
    for (action, sources) in matches {
        match action {
            Action::Allow => chain.add(&sources, "-j RETURN"),
            Action::Deny => chain.drop(&sources, net.id, Reason::Policy),
        };
    }
    true
}

/// The match of a rule's sources; `None` where it is another family's.
fn sources<F: Filtered>(rule: &Rule) -> Option<String> {
    let (first, last) = (F::of(rule.first)?, F::of(rule.last)?);
    let (low, high) = (F::bits(first), F::bits(last));
    // A prefix is as large as the distance to its last address has bits, all of them set.
    let size = high ^ low;
    let is_prefix = size & size.wrapping_add(1) == 0 && low & size == 0;
    if !is_prefix {
        return Some(format!("-m iprange --src-range {first}-{last}"));
    }
    match F::BITS - size.count_ones() as u8 {
        0 => Some(String::new()),
        bits => Some(format!("-s {first}/{bits}")),
    }
}
