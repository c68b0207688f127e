//! The policy compiler: ordered rules of address ranges → longest-prefix entries with the same
//! meaning, so that a packet pays one lookup however many rules there are.

use std::collections::BTreeMap;

use netdp_common::addr::Address;

use super::family::Wired;
use crate::model::{Action, Rule};

/// A prefix and what the first rule that matches it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry<F: Wired> {
    /// First address of the prefix.
    pub(super) address: F::Address,
    /// Length of the prefix in bits.
    pub(super) length: u8,
    /// What happens to a match.
    pub(super) action: Action,
    /// Index of the rule that decides.
    pub(super) rule: usize,
}

/// Compiles the rules of a family into prefixes that do not overlap. Addresses that no rule matches
/// have none.
///
/// Each rule gets what the rules before it have left over: the first match decides.
pub(super) fn compile<F: Wired>(rules: &[Rule]) -> Vec<Entry<F>> {
    let bits = <F::Wire as Address>::BITS;
    let mut entries = Vec::new();
    // Addresses that no rule has matched so far: first → last, disjoint.
    let mut unmatched = BTreeMap::from([(0, u128::MAX >> (128 - bits))]);
    for (index, rule) in rules.iter().enumerate() {
        let (Some(first), Some(last)) = (F::of(rule.first), F::of(rule.last)) else { continue };
        for (start, end) in take(&mut unmatched, F::bits(first), F::bits(last)) {
            for (number, free) in prefixes(start, end, bits) {
                entries.push(Entry {
                    address: F::address(number),
                    // Not more than 128.
                    length: (bits - free) as u8,
                    action: rule.action,
                    rule: index,
                });
            }
        }
    }
    entries
}

/// Takes first..=last out of a set of intervals and returns what of it was there.
fn take(set: &mut BTreeMap<u128, u128>, first: u128, last: u128) -> Vec<(u128, u128)> {
    // The interval before may reach into the range; all others begin in it.
    let begin = set.range(..=first).next_back().map_or(first, |(&start, _)| start);
    let touched: Vec<(u128, u128)> = set
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

/// The shortest list of prefixes of `bits` long addresses that covers first..=last exactly: each
/// with the number of bits that are free in it.
fn prefixes(first: u128, last: u128, bits: u32) -> impl Iterator<Item = (u128, u32)> {
    let mut next = Some(first);
    std::iter::from_fn(move || {
        let start = next.filter(|&start| start <= last)?;
        // The largest aligned block that begins here and does not reach past the end.
        let aligned = start.trailing_zeros().min(bits);
        let fits = (last - start).checked_add(1).map_or(128, u128::ilog2);
        let free = aligned.min(fits);
        next = 1_u128.checked_shl(free).and_then(|size| start.checked_add(size));
        Some((start, free))
    })
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::family::{V4, V6};

    fn rule(action: Action, first: [u8; 4], last: [u8; 4]) -> Rule {
        let address = |octets| IpAddr::from(Ipv4Addr::from(octets));
        Rule { action, first: address(first), last: address(last) }
    }

    /// What the rules say, read as they are written.
    fn first_match<F: Wired>(rules: &[Rule], address: F::Address) -> Option<usize> {
        let number = |address| F::of(address).map(F::bits);
        rules.iter().position(|rule| {
            let (Some(first), Some(last)) = (number(rule.first), number(rule.last)) else {
                return false;
            };
            (first..=last).contains(&F::bits(address))
        })
    }

    /// What the entries say, read as the kernel reads them.
    fn lookup<F: Wired>(entries: &[Entry<F>], address: F::Address) -> Option<usize> {
        let prefix = |address, length: u8| {
            F::bits(address).checked_shr(<F::Wire as Address>::BITS - u32::from(length))
        };
        entries
            .iter()
            .filter(|entry| prefix(entry.address, entry.length) == prefix(address, entry.length))
            .max_by_key(|entry| entry.length)
            .map(|entry| entry.rule)
    }

    #[test]
    fn the_allowlist_examples_of_docker_user() {
        let everyone = rule(Action::Deny, [0, 0, 0, 0], [255; 4]);
        let single = rule(Action::Allow, [192, 0, 2, 1], [192, 0, 2, 1]);
        let entries = compile::<V4>(&[single, everyone]);
        assert_eq!(entries[0].length, 32);
        // Everything but one address: one prefix for each bit.
        assert_eq!(entries.len(), 1 + 32);

        let range = rule(Action::Allow, [192, 0, 2, 1], [192, 0, 2, 3]);
        let lengths: Vec<u8> = compile::<V4>(&[range]).iter().map(|entry| entry.length).collect();
        assert_eq!(lengths, [32, 31]);

        assert_eq!(compile::<V4>(&[everyone]).len(), 1);
        assert_eq!(compile::<V4>(&[everyone])[0].length, 0);
        assert!(compile::<V4>(&[]).is_empty());
    }

    #[test]
    fn a_rule_behind_a_broader_one_is_dead() {
        let broad = rule(Action::Deny, [10, 0, 0, 0], [10, 255, 255, 255]);
        let narrow = rule(Action::Allow, [10, 1, 0, 0], [10, 1, 255, 255]);
        assert!(compile::<V4>(&[broad, narrow]).iter().all(|entry| entry.rule == 0));
        let entries = compile::<V4>(&[narrow, broad]);
        assert_eq!(lookup(&entries, Ipv4Addr::new(10, 1, 2, 3)), Some(0));
        assert_eq!(lookup(&entries, Ipv4Addr::new(10, 2, 2, 3)), Some(1));
    }

    #[test]
    fn everything_is_one_prefix_in_both_families() {
        let all = |first: IpAddr, last: IpAddr| [Rule { action: Action::Deny, first, last }];
        let (first, last) = (Ipv6Addr::UNSPECIFIED, Ipv6Addr::from(u128::MAX));
        let entries = compile::<V6>(&all(first.into(), last.into()));
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].address, entries[0].length), (first, 0));
        assert!(compile::<V4>(&all(first.into(), last.into())).is_empty());
        let everyone = all(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into());
        assert!(compile::<V6>(&everyone).is_empty());
    }

    /// Crowded around few places, so that ranges meet, nest and touch; and both ends.
    fn number(bits: u32) -> impl Strategy<Value = u128> {
        let last = u128::MAX >> (128 - bits);
        prop_oneof![
            (0_u128..64).prop_map(move |low| (last / 25) + low),
            (0_u128..4).prop_map(move |low| last - low),
            0_u128..4,
            any::<u128>().prop_map(move |any| any & last),
        ]
    }

    fn entries_mean_what_the_rules_say<F: Wired>(
        ranges: &[(u128, u128, bool)],
        probes: &[u128],
    ) -> Result<(), TestCaseError> {
        let last = u128::MAX >> (128 - <F::Wire as Address>::BITS);
        let rules: Vec<Rule> = ranges
            .iter()
            .map(|&(a, b, allow)| Rule {
                action: if allow { Action::Allow } else { Action::Deny },
                first: F::address(a.min(b)).into(),
                last: F::address(a.max(b)).into(),
            })
            .collect();
        let entries = compile::<F>(&rules);
        let edges = ranges.iter().flat_map(|&(a, b, _)| {
            [a, b].into_iter().flat_map(|edge| [edge.wrapping_sub(1), edge, edge.wrapping_add(1)])
        });
        for probe in probes.iter().copied().chain(edges) {
            let probe = F::address(probe & last);
            prop_assert_eq!(lookup(&entries, probe), first_match::<F>(&rules, probe));
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn entries_mean_what_the_rules_say_in_ipv4(
            ranges in prop::collection::vec((number(32), number(32), any::<bool>()), 0..24),
            probes in prop::collection::vec(number(32), 64),
        ) {
            entries_mean_what_the_rules_say::<V4>(&ranges, &probes)?;
        }

        #[test]
        fn entries_mean_what_the_rules_say_in_ipv6(
            ranges in prop::collection::vec((number(128), number(128), any::<bool>()), 0..24),
            probes in prop::collection::vec(number(128), 64),
        ) {
            entries_mean_what_the_rules_say::<V6>(&ranges, &probes)?;
        }
    }
}
