//! What `iptables-save` prints and `iptables-restore` reads.
//!
//! Owns the text: what was found, and the one transaction from there to what is wanted. Runs
//! nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use super::rules::{Mark, PREFIX, RuleSet, Table, hook_chain};

/// A rule that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FoundRule {
    /// As the tool says it, which is not to the letter what it was told.
    pub(super) text: String,
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

/// What one table has that concerns us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FoundTable {
    /// Our chains.
    pub(super) chains: BTreeMap<String, Vec<FoundRule>>,
    /// The kernel's chains: where in it our jump is found, from 0.
    pub(super) jumps: BTreeMap<String, Vec<usize>>,
}

/// What one family's tables have that concerns us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found(pub(super) BTreeMap<Table, FoundTable>);

impl Found {
    /// From the output of `iptables-save --counters`; tables and chains of others are left out.
    pub(super) fn parse(text: &str) -> Self {
        let mut found = Self::default();
        let mut table = None;
        let mut lengths: BTreeMap<&str, usize> = BTreeMap::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::of(name);
                lengths.clear();
                continue;
            }
            let Some(table) = table else { continue };
            if let Some(name) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
                if name.starts_with(PREFIX) {
                    let chains = &mut found.0.entry(table).or_default().chains;
                    chains.entry(name.to_owned()).or_default();
                }
                continue;
            }
            let Some((chain, rule)) = FoundRule::parse(line) else { continue };
            if chain.starts_with(PREFIX) {
                let chains = &mut found.0.entry(table).or_default().chains;
                chains.entry(chain.to_owned()).or_default().push(rule);
                continue;
            }
            let length = lengths.entry(chain).or_default();
            if rule.text == format!("-j {}", hook_chain(chain)) {
                let jumps = &mut found.0.entry(table).or_default().jumps;
                jumps.entry(chain.to_owned()).or_default().push(*length);
            }
            *length += 1;
        }
        found
    }

    /// The rules of a chain of ours, if it is there.
    pub(super) fn chain(&self, table: Table, name: &str) -> Option<&[FoundRule]> {
        Some(self.0.get(&table)?.chains.get(name)?)
    }

    /// Every rule of ours.
    pub(super) fn rules(&self) -> impl Iterator<Item = &FoundRule> {
        self.0.values().flat_map(|table| table.chains.values()).flatten()
    }

    fn jumps(&self, table: Table, hook: &str) -> &[usize] {
        self.0.get(&table).and_then(|table| table.jumps.get(hook)).map_or(&[], Vec::as_slice)
    }

    /// Hooks whose first rule is not our jump, or that have more than one.
    pub(super) fn displaced(&self) -> impl Iterator<Item = (Table, &'static str)> {
        let hooks = Table::ALL
            .into_iter()
            .flat_map(|table| table.hooks().iter().map(move |&hook| (table, hook)));
        hooks.filter(|&(table, hook)| self.jumps(table, hook) != [0])
    }
}

impl FoundRule {
    /// From a line `[PACKETS:BYTES] -A CHAIN RULE`; the chain, and the rule.
    fn parse(line: &str) -> Option<(&str, Self)> {
        let (counters, rest) = line.strip_prefix('[')?.split_once("] -A ")?;
        let (packets, bytes) = counters.split_once(':')?;
        let (chain, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let (packets, bytes) = (packets.parse().ok()?, bytes.parse().ok()?);
        Some((chain, Self { text: text.to_owned(), packets, bytes }))
    }
}

/// Chains, by table and name.
pub(super) type ChainSet = BTreeSet<(Table, String)>;

/// What `iptables-restore --noflush --counters` has to read to get from what was found to what is
/// wanted, writing these chains of it anew; `None` where that is nothing. What was counted so far
/// goes on being counted.
pub(super) fn transaction(wanted: &RuleSet, found: &Found, write: &ChainSet) -> Option<String> {
    let mut text = String::new();
    for table in Table::ALL {
        text.push_str(&of_table(table, wanted, found, write));
    }
    (!text.is_empty()).then_some(text)
}

/// A chain that is written anew; `None` where it goes.
pub(super) type Change<'a> = (Table, &'a str, Option<&'a [String]>);

/// What `iptables-restore --noflush` has to read for a few chains that count nothing, where all others
/// are known to be right.
pub(super) fn small_transaction(changes: &[Change<'_>]) -> String {
    let mut text = String::new();
    for table in Table::ALL {
        let changes = || changes.iter().filter(move |change| change.0 == table);
        if changes().next().is_none() {
            continue;
        }
        line(&mut text, format_args!("*{}", table.name()));
        for (_, name, _) in changes() {
            line(&mut text, format_args!(":{name} - [0:0]"));
        }
        for (_, name, rules) in changes() {
            for rule in rules.unwrap_or_default() {
                line(&mut text, format_args!("-A {name} {rule}"));
            }
        }
        for (_, name, _) in changes().filter(|change| change.2.is_none()) {
            line(&mut text, format_args!("-X {name}"));
        }
        line(&mut text, format_args!("COMMIT"));
    }
    text
}

/// The rules of one chain from the output of `iptables -S CHAIN`.
pub(super) fn rules_of(listing: &str, chain: &str) -> Vec<String> {
    let head = format!("-A {chain} ");
    listing.lines().filter_map(|line| line.strip_prefix(&head)).map(str::to_owned).collect()
}

fn of_table(table: Table, wanted: &RuleSet, found: &Found, write: &ChainSet) -> String {
    let none = BTreeMap::new();
    let chains = wanted.table(table).unwrap_or(&none);
    let written = || chains.iter().filter(|(name, _)| write.contains(&(table, (*name).clone())));
    let gone: Vec<&String> = found
        .0
        .get(&table)
        .into_iter()
        .flat_map(|found| found.chains.keys())
        .filter(|name| !chains.contains_key(*name))
        .collect();

    let mut text = String::new();
    // Named so, a chain is made, or emptied where it is there.
    for name in written().map(|(name, _)| name).chain(gone.iter().copied()) {
        line(&mut text, format_args!(":{name} - [0:0]"));
    }
    for hook in table.hooks() {
        let chain = hook_chain(hook);
        let (there, is_wanted) = (found.jumps(table, hook), chains.contains_key(&chain));
        if is_wanted && there == [0] {
            continue;
        }
        for _ in there {
            line(&mut text, format_args!("-D {hook} -j {chain}"));
        }
        if is_wanted {
            line(&mut text, format_args!("-I {hook} 1 -j {chain}"));
        }
    }
    for (name, rules) in written() {
        let mut counted = counted(found.chain(table, name).unwrap_or_default());
        for rule in rules {
            let (packets, bytes) =
                Mark::of(rule).and_then(|mark| counted.remove(&mark)).unwrap_or_default();
            line(&mut text, format_args!("[{packets}:{bytes}] -A {name} {rule}"));
        }
    }
    for name in gone {
        line(&mut text, format_args!("-X {name}"));
    }
    if text.is_empty() {
        return text;
    }
    format!("*{}\n{text}COMMIT\n", table.name())
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    let written = text.write_fmt(line).and_then(|()| text.write_char('\n'));
    // A string takes whatever it is given.
    debug_assert!(written.is_ok());
}

/// Packets and bytes by mark.
pub(super) fn counted<'a>(
    rules: impl IntoIterator<Item = &'a FoundRule>,
) -> BTreeMap<Mark, (u64, u64)> {
    let mut sums: BTreeMap<Mark, (u64, u64)> = BTreeMap::new();
    for rule in rules {
        if let Some(mark) = Mark::of(&rule.text) {
            let sum = sums.entry(mark).or_default();
            *sum = (sum.0 + rule.packets, sum.1 + rule.bytes);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "\
# Generated by iptables-save
*filter
:INPUT ACCEPT [0:0]
:NETDP-FORWARD - [0:0]
:NETDP-OLD - [0:0]
[3:120] -A FORWARD -j DOCKER
[0:0] -A FORWARD -j NETDP-FORWARD
[2:80] -A NETDP-FORWARD -i a -m comment --comment netdp:1:icc -j DROP
[1:40] -A NETDP-FORWARD -i b -m comment --comment \"netdp:1:icc\" -j DROP
COMMIT
*mangle
[0:0] -A FORWARD -j NETDP-FORWARD
COMMIT
";

    fn wanted() -> RuleSet {
        let mut rules = RuleSet::default();
        for hook in ["INPUT", "FORWARD", "OUTPUT"] {
            rules.chain(Table::Filter, hook_chain(hook));
        }
        rules
            .chain(Table::Filter, "NETDP-FORWARD")
            .add("-i c -m comment --comment netdp:1:icc", "-j DROP");
        rules
    }

    #[test]
    fn what_concerns_us_is_found_and_nothing_else() {
        let found = Found::parse(SAVED);
        assert_eq!(found.0.keys().collect::<Vec<_>>(), [&Table::Filter]);
        let forward = found.chain(Table::Filter, "NETDP-FORWARD").unwrap();
        assert_eq!(forward.len(), 2);
        assert_eq!(forward[0].text, "-i a -m comment --comment netdp:1:icc -j DROP");
        assert_eq!(found.jumps(Table::Filter, "FORWARD"), [1]);
        assert!(found.displaced().any(|hook| hook == (Table::Filter, "FORWARD")));
        assert_eq!(Found::parse("*filter\nCOMMIT\n"), Found::default());
    }

    #[test]
    fn a_transaction_moves_jumps_first_keeps_counts_and_removes_what_is_gone() {
        let write = [(Table::Filter, "NETDP-FORWARD".to_owned())].into();
        let text = transaction(&wanted(), &Found::parse(SAVED), &write).unwrap();
        let expected = "\
*filter
:NETDP-FORWARD - [0:0]
:NETDP-OLD - [0:0]
-I INPUT 1 -j NETDP-INPUT
-D FORWARD -j NETDP-FORWARD
-I FORWARD 1 -j NETDP-FORWARD
-I OUTPUT 1 -j NETDP-OUTPUT
[3:120] -A NETDP-FORWARD -i c -m comment --comment netdp:1:icc -j DROP
-X NETDP-OLD
COMMIT
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_small_change_names_its_chains_and_no_others() {
        let rules = ["-i a -j DROP".to_owned()];
        let changes: [Change<'_>; 3] = [
            (Table::Nat, "NETDP-A", Some(&rules)),
            (Table::Nat, "NETDP-B", None),
            (Table::Raw, "NETDP-C", Some(&[])),
        ];
        let expected = "*raw\n:NETDP-C - [0:0]\nCOMMIT\n*nat\n:NETDP-A - [0:0]\n:NETDP-B - [0:0]\n\
                        -A NETDP-A -i a -j DROP\n-X NETDP-B\nCOMMIT\n";
        assert_eq!(small_transaction(&changes), expected);
        let listing = "-N NETDP-A\n-A NETDP-A -i a -j DROP\n-A NETDP-AB -j DROP\n";
        assert_eq!(rules_of(listing, "NETDP-A"), rules);
    }

    #[test]
    fn nothing_to_do_is_no_transaction() {
        assert_eq!(transaction(&RuleSet::default(), &Found::default(), &ChainSet::new()), None);
        let all = transaction(&RuleSet::default(), &Found::parse(SAVED), &ChainSet::new()).unwrap();
        assert!(
            all.contains("-D FORWARD -j NETDP-FORWARD\n-X NETDP-FORWARD\n-X NETDP-OLD\n"),
            "{all}"
        );
    }
}
