//! What a rule set is made of: tables, chains, rules, and the marks by which drops are counted.
//!
//! Owns the shapes and how a rule reads. Knows nothing of networks, and of no program that is run.

use std::{collections::BTreeMap, fmt};

use netdp_common::counter::Reason;

use super::sets::Sets;
use crate::model::NetworkId;

/// What the name of every chain of ours begins with.
pub(super) const PREFIX: &str = "NETDP-";

/// What the comment of every counted rule begins with.
const MARK: &str = "netdp:";

/// A table that has chains of ours, in the order in which they are written: nothing is forwarded to
/// an uplink before it is translated there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    /// Who sends, before anything else.
    Raw,
    /// Addresses and ports.
    Nat,
    /// Who may.
    Filter,
}

impl Table {
    pub(super) const ALL: [Self; 3] = [Self::Raw, Self::Nat, Self::Filter];

    /// Its name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }

    /// The kernel's chains whose first rule leads to a chain of ours.
    pub(super) const fn hooks(self) -> &'static [&'static str] {
        match self {
            Self::Raw => &["PREROUTING"],
            Self::Nat => &["PREROUTING", "OUTPUT", "POSTROUTING"],
            Self::Filter => &["INPUT", "FORWARD", "OUTPUT"],
        }
    }

    pub(super) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.name() == name)
    }
}

/// Our chain of one of the kernel's.
pub(super) fn hook_chain(hook: &str) -> String {
    format!("{PREFIX}{hook}")
}

/// Why a rule's packets are counted, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark {
    /// `None` where no network can be told.
    pub(super) network: Option<NetworkId>,
    pub(super) reason: Reason,
}

impl Mark {
    /// From a rule's text, if it has one of ours.
    pub(super) fn of(rule: &str) -> Option<Self> {
        let (_, rest) = rule.split_once("--comment ")?;
        let text = rest.trim_start_matches('"').strip_prefix(MARK)?;
        let text = text.split(['"', ' ']).next()?;
        let (network, reason) = text.split_once(':')?;
        let network = network.parse().ok().map(NetworkId).filter(|id| id.0 != 0);
        let reason = Reason::ALL.iter().copied().find(|known| known.name() == reason)?;
        Some(Self { network, reason })
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let network = self.network.map_or(0, |id| id.0);
        write!(f, "{MARK}{network}:{}", self.reason.name())
    }
}

/// The chains of one table, by name, each with its rules in order: a rule is what follows
/// `-A CHAIN`.
pub(super) type Chains = BTreeMap<String, Vec<String>>;

/// Everything that one family's tables have of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RuleSet {
    pub(super) tables: BTreeMap<Table, Chains>,
    /// Sets that rules refer to.
    pub(super) sets: Sets,
}

impl RuleSet {
    /// A chain, made if need be.
    pub(super) fn chain(&mut self, table: Table, name: impl Into<String>) -> Chain<'_> {
        Chain(self.tables.entry(table).or_default().entry(name.into()).or_default())
    }

    pub(super) fn table(&self, table: Table) -> Option<&Chains> {
        self.tables.get(&table)
    }
}

/// A chain to which rules are added.
pub(super) struct Chain<'a>(&'a mut Vec<String>);

impl Chain<'_> {
    /// Adds a rule that does something to what matches; an empty match is everything.
    pub(super) fn add(&mut self, matches: &str, target: &str) -> &mut Self {
        let space = if matches.is_empty() { "" } else { " " };
        self.0.push(format!("{matches}{space}{target}"));
        self
    }

    /// Adds a rule whose packets are counted.
    pub(super) fn count(
        &mut self,
        matches: &str,
        network: Option<NetworkId>,
        reason: Reason,
        target: &str,
    ) -> &mut Self {
        let comment = format!("-m comment --comment {}", Mark { network, reason });
        let space = if matches.is_empty() { "" } else { " " };
        self.add(&format!("{matches}{space}{comment}"), target)
    }

    /// Adds a rule that drops what matches, and counts it.
    pub(super) fn drop(&mut self, matches: &str, network: NetworkId, reason: Reason) -> &mut Self {
        self.count(matches, Some(network), reason, "-j DROP")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_as_they_are_written() {
        for network in [None, Some(NetworkId(7))] {
            let mark = Mark { network, reason: Reason::DirectAccess };
            let mut rules = RuleSet::default();
            rules.chain(Table::Raw, "A").count("-i a", network, mark.reason, "-j DROP");
            let rule = &rules.table(Table::Raw).unwrap()["A"][0];
            assert_eq!(Mark::of(rule), Some(mark));
            let quoted = format!("-m comment --comment \"{mark}\" -j DROP");
            assert_eq!(Mark::of(&quoted), Some(mark));
        }
        for foreign in ["-j DROP", "-m comment --comment mine", "-m comment --comment netdp:1:x"] {
            assert_eq!(Mark::of(foreign), None, "{foreign}");
        }
    }
}
