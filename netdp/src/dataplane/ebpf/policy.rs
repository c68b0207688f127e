//! The policy compiler: ordered rules of address ranges → longest-prefix entries with the same
//! meaning, so that a packet pays one lookup however many rules there are.

use std::{collections::BTreeMap, net::Ipv4Addr};

use crate::model::{Action, Rule};

/// A prefix and what the first rule that matches it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// First address of the prefix.
    pub(super) address: Ipv4Addr,
    /// Length of the prefix in bits.
    pub(super) length: u8,
    /// What happens to a match.
    pub(super) action: Action,
    /// Index of the rule that decides.
    pub(super) rule: usize,
}

/// Compiles rules into prefixes that do not overlap. Addresses that no rule matches have none.
///
/// Each rule gets what the rules before it have left over: the first match decides.
pub(super) fn compile(rules: &[Rule]) -> Vec<Entry> {
    let mut entries = Vec::new();
    // Addresses that no rule has matched so far: first → last, disjoint.
    let mut unmatched = BTreeMap::from([(u32::MIN, u32::MAX)]);
    for (index, rule) in rules.iter().enumerate() {
        let (first, last) = (u32::from(rule.first), u32::from(rule.last));
        for (start, end) in take(&mut unmatched, first, last) {
            for (address, length) in prefixes(start, end) {
                entries.push(Entry {
                    address: address.into(),
                    length,
                    action: rule.action,
                    rule: index,
                });
            }
        }
    }
    entries
}

/// Takes first..=last out of a set of intervals and returns what of it was there.
fn take(set: &mut BTreeMap<u32, u32>, first: u32, last: u32) -> Vec<(u32, u32)> {
    // The interval before may reach into the range; all others begin in it.
    let begin = set.range(..=first).next_back().map_or(first, |(&start, _)| start);
    let touched: Vec<(u32, u32)> = set
        .range(begin..=last.max(begin))
        .map(|(&start, &end)| (start, end))
        .filter(|&(start, end)| start <= last && end >= first)
        .collect();
    let mut taken = Vec::with_capacity(touched.len());
    for (start, end) in touched {
        set.remove(&start);
        if start < first {
            set.insert(start, first - 1);
        }
        if end > last {
            set.insert(last + 1, end);
        }
        taken.push((start.max(first), end.min(last)));
    }
    taken
}

/// The shortest list of prefixes that covers first..=last exactly.
fn prefixes(first: u32, last: u32) -> impl Iterator<Item = (u32, u8)> {
    let mut next = Some(first);
    std::iter::from_fn(move || {
        let start = next.filter(|&start| start <= last)?;
        // The largest aligned block that begins here and does not reach past the end.
        let aligned = start.trailing_zeros();
        let fits = (u64::from(last - start) + 1).ilog2();
        let bits = aligned.min(fits);
        next = u32::try_from(u64::from(start) + (1 << bits)).ok();
        Some((start, (32 - bits) as u8))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rule(action: Action, first: [u8; 4], last: [u8; 4]) -> Rule {
        Rule { action, first: first.into(), last: last.into() }
    }

    /// What the rules say, read as they are written.
    fn first_match(rules: &[Rule], address: u32) -> Option<usize> {
        rules
            .iter()
            .position(|rule| (u32::from(rule.first)..=u32::from(rule.last)).contains(&address))
    }

    /// What the entries say, read as the kernel reads them.
    fn lookup(entries: &[Entry], address: u32) -> Option<usize> {
        entries
            .iter()
            .filter(|entry| {
                let shift = 32 - u32::from(entry.length);
                u64::from(u32::from(entry.address)) >> shift == u64::from(address) >> shift
            })
            .max_by_key(|entry| entry.length)
            .map(|entry| entry.rule)
    }

    #[test]
    fn the_allowlist_examples_of_docker_user() {
        let everyone = rule(Action::Deny, [0, 0, 0, 0], [255; 4]);
        let single = rule(Action::Allow, [192, 0, 2, 1], [192, 0, 2, 1]);
        let entries = compile(&[single, everyone]);
        assert_eq!(entries[0].length, 32);
        // Everything but one address: one prefix for each bit.
        assert_eq!(entries.len(), 1 + 32);

        let range = rule(Action::Allow, [192, 0, 2, 1], [192, 0, 2, 3]);
        let lengths: Vec<u8> = compile(&[range]).iter().map(|entry| entry.length).collect();
        assert_eq!(lengths, [32, 31]);

        assert_eq!(compile(&[everyone]).len(), 1);
        assert_eq!(compile(&[everyone])[0].length, 0);
        assert!(compile(&[]).is_empty());
    }

    #[test]
    fn a_rule_behind_a_broader_one_is_dead() {
        let broad = rule(Action::Deny, [10, 0, 0, 0], [10, 255, 255, 255]);
        let narrow = rule(Action::Allow, [10, 1, 0, 0], [10, 1, 255, 255]);
        assert!(compile(&[broad, narrow]).iter().all(|entry| entry.rule == 0));
        let entries = compile(&[narrow, broad]);
        assert_eq!(lookup(&entries, u32::from(Ipv4Addr::new(10, 1, 2, 3))), Some(0));
        assert_eq!(lookup(&entries, u32::from(Ipv4Addr::new(10, 2, 2, 3))), Some(1));
    }

    fn address() -> impl Strategy<Value = u32> {
        // Crowded around few places, so that ranges meet, nest and touch; and both ends.
        prop_oneof![
            (0u32..64).prop_map(|low| 0x0a00_0000 + low),
            (0u32..4).prop_map(|low| u32::MAX - low),
            0u32..4,
            any::<u32>(),
        ]
    }

    proptest! {
        #[test]
        fn entries_mean_what_the_rules_say(
            ranges in prop::collection::vec((address(), address(), any::<bool>()), 0..24),
            probes in prop::collection::vec(address(), 64),
        ) {
            let rules: Vec<Rule> = ranges
                .iter()
                .map(|&(a, b, allow)| Rule {
                    action: if allow { Action::Allow } else { Action::Deny },
                    first: a.min(b).into(),
                    last: a.max(b).into(),
                })
                .collect();
            let entries = compile(&rules);
            let edges = ranges.iter().flat_map(|&(a, b, _)| {
                [a, b].into_iter().flat_map(|edge| [edge.wrapping_sub(1), edge, edge.wrapping_add(1)])
            });
            for probe in probes.iter().copied().chain(edges) {
                prop_assert_eq!(lookup(&entries, probe), first_match(&rules, probe));
            }
        }
    }
}
