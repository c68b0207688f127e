//! The user's rules of a network.

use std::collections::BTreeSet;

use netdp_common::counter::Reason;

use super::Net;
use crate::{
    dataplane::iptables::{
        family::Filtered,
        rules::{RuleSet, Table},
        sets,
    },
    model::{Action, Rule},
};

/// As many rules with the same effect, one behind the other, become one set.
pub(super) const MANY: usize = 32;

/// Writes the rules of this family; whether there are any. Without `has_sets` each is one of its own.
pub(super) fn render<F: Filtered>(net: &Net<'_, F>, has_sets: bool, rules: &mut RuleSet) -> bool {
    if net.is_closed() || net.side.is_none() {
        return false;
    }
    let ranges: Vec<(Action, Range<F>)> = net
        .network
        .policy
        .iter()
        .filter_map(|rule| Some((rule.action, Range::of(rule)?)))
        .collect();
    if ranges.is_empty() {
        return false;
    }
    // Everybody is no prefix that a set would take.
    let alike = ranges.chunk_by(|(before, a), (action, b)| {
        before == action && !a.is_everybody() && !b.is_everybody()
    });
    for alike in alike {
        let action = alike[0].0;
        if !has_sets || alike.len() < MANY {
            for (_, range) in alike {
                add(net, action, &range.matches(), rules);
            }
            continue;
        }
        let prefixes: BTreeSet<String> =
            alike.iter().flat_map(|(_, range)| range.prefixes()).collect();
        let name = sets::name(net.id, F::DIGIT, &prefixes);
        add(net, action, &format!("-m set --match-set {name} src"), rules);
        rules.sets.insert(name, prefixes);
    }
    true
}

fn add<F: Filtered>(net: &Net<'_, F>, action: Action, sources: &str, rules: &mut RuleSet) {
    let mut chain = rules.chain(Table::Filter, net.chain("RULES"));
    match action {
        Action::Allow => chain.add(sources, "-j RETURN"),
        Action::Deny => chain.drop(sources, net.id, Reason::Policy),
    };
}

/// The sources of a rule, first and last address.
struct Range<F: Filtered>(F::Address, F::Address);

impl<F: Filtered> Range<F> {
    /// `None` where it is another family's.
    fn of(rule: &Rule) -> Option<Self> {
        Some(Self(F::of(rule.first)?, F::of(rule.last)?))
    }

    /// Length of the prefix that it is, if it is one.
    fn prefix_len(&self) -> Option<u8> {
        let (low, high) = (F::bits(self.0), F::bits(self.1));
        // A prefix is as large as the distance to its last address has bits, all of them set.
        let size = high ^ low;
        let is_prefix = size & size.wrapping_add(1) == 0 && low & size == 0;
        is_prefix.then(|| F::BITS - size.count_ones() as u8)
    }

    fn is_everybody(&self) -> bool {
        self.prefix_len() == Some(0)
    }

    fn matches(&self) -> String {
        match self.prefix_len() {
            None => format!("-m iprange --src-range {}-{}", self.0, self.1),
            Some(0) => String::new(),
            Some(bits) => format!("-s {}/{bits}", self.0),
        }
    }

    fn prefixes(&self) -> Vec<String> {
        F::prefixes(self.0, self.1).into_iter().map(|net| net.to_string()).collect()
    }
}
