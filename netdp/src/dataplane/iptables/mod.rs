//! The `iptables` backend: rules of netfilter, for hosts without BPF.
//!
//! What is wanted is rendered as text, compared chain by chain with what was written last, and the
//! difference is one transaction for each family. Netfilter's own connection tracking holds the
//! flows. Bridged packets have to meet the rules, too (`nf_call_iptables` of our bridges).

use std::{
    collections::{BTreeMap, BTreeSet},
    marker::PhantomData,
    path::Path,
};

use anyhow::{Context, Result, anyhow};
use tracing::{debug, info};

use self::{
    family::Filtered,
    rules::{Mark, RuleSet, Table},
    sets::{IpSet, Sets},
    text::{ChainSet, Change, Found, FoundRule, counted, small_transaction, transaction},
    tool::Tool,
};
use super::{
    Applied, Count, Dataplane, Drift, FlowRecord, FlowTable, KernelFeature, Lanes, Nature, Program,
};
use crate::{
    family::{V4, V6},
    netlink::conntrack,
};

mod bridges;
mod family;
mod flows;
mod render;
mod rules;
mod sets;
mod text;
mod tool;

pub use self::tool::Variant;

/// As many chains are written without a look at all the others, which takes longer.
const LITTLE: usize = 8;

/// Gone when the kernel does no IPv6.
const IPV6_DIRECTORY: &str = "/proc/sys/net/ipv6";

/// The backend, open.
pub struct Iptables {
    ipv4: Tables<V4>,
    ipv6: Option<Tables<V6>>,
    /// What was enforced last; `None` before the first time.
    program: Option<Program>,
}

impl Iptables {
    /// Finds the programs and tries them.
    ///
    /// # Errors
    /// Says what is missing and what to do.
    pub fn open() -> Result<Self> {
        let (variant, reason) = tool::chosen_variant()?;
        info!(variant = variant.name(), "using iptables: {reason}");
        Self::open_as(variant)
    }

    /// The same with the programs of one variant.
    ///
    /// # Errors
    /// As [`Iptables::open`].
    pub fn open_as(variant: Variant) -> Result<Self> {
        bridges::ensure()?;
        let mut ipv4 = Tables::open(variant)?;
        ipv4.look().context("read the rules of this host")?;
        let ipv6 = Path::new(IPV6_DIRECTORY).exists().then(|| Tables::open(variant)).transpose()?;
        Ok(Self { ipv4, ipv6, program: None })
    }

    /// What this host's iptables is, in words for the operator.
    ///
    /// # Errors
    /// It has none.
    pub fn describe() -> Result<String> {
        let (variant, _) = tool::chosen_variant()?;
        Ok(format!("iptables of the variant {}", variant.name()))
    }

    /// Removes every rule of ours from this network namespace, whichever variant wrote it, and the
    /// connections of `program` that netfilter would go on translating. Returns whether there was
    /// something.
    ///
    /// # Errors
    /// Goes on after each failure and names them all.
    pub fn purge_rules(program: &Program) -> Result<bool> {
        let mut there = false;
        let mut errors = Vec::new();
        for variant in Variant::ALL {
            for family in [V4::TOOL, V6::TOOL] {
                let Some(tool) = Tool::of(family, variant) else { continue };
                match purge(&tool) {
                    Ok(found) => there |= found,
                    Err(error) => errors.push(format!("{error:#}")),
                }
            }
        }
        for digit in [V4::DIGIT, V6::DIGIT] {
            match IpSet::find_loaded().map(|sets| sets.retain(&Sets::new(), digit)) {
                Some(Ok(found)) => there |= found,
                Some(Err(error)) => errors.push(format!("{error:#}")),
                None => {}
            }
        }
        if there && let Err(error) = flows::end_translated(program) {
            errors.push(format!("{error:#}"));
        }
        if errors.is_empty() { Ok(there) } else { Err(anyhow!(errors.join("; "))) }
    }
}

fn purge(tool: &Tool) -> Result<bool> {
    let found = tool.found()?;
    let Some(text) = transaction(&RuleSet::default(), &found, &ChainSet::new()) else {
        return Ok(false);
    };
    tool.restore(&text).context("remove our rules")?;
    tool.remove_empty_tables()?;
    Ok(true)
}

/// One family's tables.
struct Tables<F> {
    tool: Tool,
    /// For policies that name many; `None` where the host has none.
    sets: Option<IpSet>,
    /// What was written last; `None` before the first time.
    written: Option<Written>,
    family: PhantomData<F>,
}

/// What was written, and how the tool says it.
struct Written {
    rules: RuleSet,
    said: BTreeMap<(Table, String), Vec<String>>,
}

/// Chains that two sets of rules do not have in common: as the second one has them.
fn changes<'a>(before: &'a RuleSet, after: &'a RuleSet) -> impl Iterator<Item = Change<'a>> {
    let chains = |set: &'a RuleSet| {
        set.tables.iter().flat_map(|(&table, chains)| {
            chains.iter().map(move |(name, rules)| (table, name.as_str(), rules.as_slice()))
        })
    };
    let is_there = |set: &RuleSet, table, name: &str| {
        set.table(table).is_some_and(|chains| chains.contains_key(name))
    };
    let written = chains(after).filter(|(table, name, rules)| {
        let known = before.table(*table).and_then(|chains| chains.get(*name));
        known.map(Vec::as_slice) != Some(*rules)
    });
    let gone = chains(before).filter(move |(table, name, _)| !is_there(after, *table, name));
    written
        .map(|(table, name, rules)| (table, name, Some(rules)))
        .chain(gone.map(|(table, name, _)| (table, name, None)))
}

impl Written {
    /// Whether a few chains differ that count nothing, and none of the kernel's is concerned.
    fn is_little_from(&self, wanted: &RuleSet) -> bool {
        let counts = |set: &RuleSet, table, name: &str| {
            let rules = set.table(table).and_then(|chains| chains.get(name));
            rules.is_some_and(|rules| rules.iter().any(|rule| Mark::of(rule).is_some()))
        };
        !wanted.tables.is_empty()
            && self.rules.sets == wanted.sets
            && changes(&self.rules, wanted).count() <= LITTLE
            && changes(&self.rules, wanted).all(|(table, name, _)| {
                !counts(&self.rules, table, name) && !counts(wanted, table, name)
            })
    }

    /// Chains of `found` that are not as they were written, or not ours.
    fn differing(&self, found: &Found) -> ChainSet {
        let texts = |rules: &[FoundRule]| -> Vec<String> {
            rules.iter().map(|rule| rule.text.clone()).collect()
        };
        let mut differing: ChainSet = self
            .said
            .iter()
            .filter(|((table, name), said)| {
                found.chain(*table, name).map(texts).as_ref() != Some(said)
            })
            .map(|(key, _)| key.clone())
            .collect();
        for (&table, there) in &found.0 {
            let keys = there.chains.keys().map(|name| (table, name.clone()));
            differing.extend(keys.filter(|key| !self.said.contains_key(key)));
        }
        differing
    }
}

impl<F: Filtered> Tables<F> {
    fn open(variant: Variant) -> Result<Self> {
        let tool = Tool::of(F::TOOL, variant).with_context(|| {
            format!(
                "no {}-{}-restore on this host: install the package iptables",
                F::TOOL,
                variant.name()
            )
        })?;
        Ok(Self { tool, sets: IpSet::find(), written: None, family: PhantomData })
    }

    fn look(&mut self) -> Result<Found> {
        self.tool.found()
    }

    /// Makes the tables say what a program wants; returns how many chains were written.
    fn apply(&mut self, program: &Program) -> Result<usize> {
        let wanted = render::render::<F>(program, self.sets.is_some());
        if self.written.as_ref().is_some_and(|written| written.rules == wanted) {
            return Ok(0);
        }
        if let Some(written) = self.written.take_if(|written| written.is_little_from(&wanted)) {
            let count = changes(&written.rules, &wanted).count();
            match self.write_little(written, wanted.clone()) {
                Ok(()) => return Ok(count),
                Err(error) => debug!("write all chains instead of a few: {error:#}"),
            }
        }
        let found = self.tool.found()?;
        let write = self.to_write(&wanted, &found);
        if let Some(sets) = &self.sets {
            sets.ensure(&wanted.sets, F::DIGIT)?;
        }
        // Until it is known to be right, the next time writes all of it.
        self.written = None;
        if let Some(text) = transaction(&wanted, &found, &write) {
            self.tool.restore(&text)?;
        }
        if let Some(sets) = &self.sets {
            sets.retain(&wanted.sets, F::DIGIT)?;
        }
        if wanted.tables.is_empty() && found != Found::default() {
            self.tool.remove_empty_tables()?;
        }
        self.note(wanted)?;
        Ok(write.len())
    }

    /// Writes the few chains that differ, and looks at no others.
    fn write_little(&mut self, written: Written, wanted: RuleSet) -> Result<()> {
        let Written { rules, mut said } = written;
        let little: Vec<Change<'_>> = changes(&rules, &wanted).collect();
        self.tool.restore(&small_transaction(&little))?;
        let mut there = Vec::new();
        for (table, name, rules) in little {
            let key = (table, name.to_owned());
            match rules {
                Some(_) => there.push(key),
                None => drop(said.remove(&key)),
            }
        }
        let texts = self.tool.rules_of(&there)?;
        said.extend(there.into_iter().zip(texts));
        self.written = Some(Written { rules: wanted, said });
        Ok(())
    }

    /// The chains that are not yet as they have to be.
    fn to_write(&self, wanted: &RuleSet, found: &Found) -> ChainSet {
        let all = wanted
            .tables
            .iter()
            .flat_map(|(&table, chains)| chains.keys().map(move |name| (table, name.clone())));
        let Some(written) = &self.written else { return all.collect() };
        let differing = written.differing(found);
        let is_same = |(table, name): &(Table, String)| {
            let rules =
                |set: &RuleSet| set.table(*table).and_then(|chains| chains.get(name)).cloned();
            rules(&written.rules) == rules(wanted)
        };
        all.filter(|key| differing.contains(key) || !is_same(key)).collect()
    }

    /// Remembers how the tool says what was just written.
    fn note(&mut self, rules: RuleSet) -> Result<()> {
        let found = self.tool.found()?;
        let mut said = BTreeMap::new();
        for (&table, there) in &found.0 {
            for (name, rules) in &there.chains {
                let texts = rules.iter().map(|rule| rule.text.clone()).collect();
                said.insert((table, name.clone()), texts);
            }
        }
        self.written = Some(Written { rules, said });
        Ok(())
    }

    /// How the tables differ from what a program wants; what differs is written anew by the next
    /// [`Tables::apply`].
    fn check(&mut self, program: &Program) -> Result<Vec<Drift>> {
        let wanted = render::render::<F>(program, self.sets.is_some());
        let found = self.tool.found()?;
        let mut differing = match &self.written {
            Some(written) => written.differing(&found),
            None => ChainSet::new(),
        };
        differing.extend(self.to_write(&wanted, &found));
        let mut what: BTreeSet<String> = differing
            .iter()
            .map(|(table, chain)| {
                let table = table.name();
                match found.chain(Table::of(table).unwrap_or(Table::Raw), chain) {
                    None => format!("{} chain {chain} of table {table} is missing", F::TOOL),
                    Some(_) => format!("{} chain {chain} of table {table} differs", F::TOOL),
                }
            })
            .collect();
        if !wanted.tables.is_empty() {
            what.extend(found.displaced().map(|(table, hook)| {
                let table = table.name();
                format!("{} chain {hook} of table {table} does not begin with our jump", F::TOOL)
            }));
        }
        if let Some(sets) = &self.sets
            && !wanted.sets.is_empty()
        {
            what.extend(sets::drift(&wanted.sets, &sets.found(F::DIGIT)?));
        }
        if !what.is_empty() {
            // The next time writes all of it.
            self.written = None;
        }
        Ok(what.into_iter().map(|what| Drift { what }).collect())
    }
}

impl Dataplane for Iptables {
    fn name(&self) -> &'static str {
        "iptables"
    }

    fn apply(&mut self, program: &Program) -> Result<Applied> {
        let mut writes = self.ipv4.apply(program).context("write the rules of IPv4")?;
        if let Some(ipv6) = &mut self.ipv6 {
            writes += ipv6.apply(program).context("write the rules of IPv6")?;
        }
        if flows::may_be_stale(self.program.as_ref(), program) {
            let ended = flows::end_stale(self.program.as_ref(), program)?;
            debug!(ended, "connections of what is gone");
        }
        self.program = Some(program.clone());
        Ok(Applied { writes })
    }

    fn check(&mut self, program: &Program) -> Result<Vec<Drift>> {
        let mut drift = self.ipv4.check(program)?;
        if let Some(ipv6) = &mut self.ipv6 {
            drift.extend(ipv6.check(program)?);
        }
        Ok(drift)
    }

    fn purge(&mut self) -> Result<()> {
        self.ipv4.written = None;
        if let Some(ipv6) = &mut self.ipv6 {
            ipv6.written = None;
        }
        let program = self.program.take().unwrap_or_default();
        Self::purge_rules(&program).map(drop)
    }

    fn counters(&mut self) -> Result<Vec<Count>> {
        let mut sums: BTreeMap<_, (u64, u64)> = BTreeMap::new();
        let ipv6 = self.ipv6.as_mut().map(Tables::look).transpose()?;
        for found in [Some(self.ipv4.look()?), ipv6].into_iter().flatten() {
            for (mark, (packets, bytes)) in counted(found.rules()) {
                let sum = sums.entry(mark).or_default();
                *sum = (sum.0 + packets, sum.1 + bytes);
            }
        }
        let counts = sums.into_iter().filter(|(_, (packets, _))| *packets > 0);
        Ok(counts
            .map(|(mark, (packets, bytes))| Count {
                network: mark.network,
                reason: mark.reason,
                packets,
                bytes,
            })
            .collect())
    }

    fn lanes(&mut self) -> Result<Option<Lanes>> {
        Ok(None)
    }

    fn flows(&mut self) -> Result<Vec<FlowRecord>> {
        let Some(program) = &self.program else { return Ok(Vec::new()) };
        let tracked = conntrack::list().context("list tracked connections")?;
        Ok(flows::records(program, &tracked))
    }

    /// Netfilter collects by itself.
    fn collect(&mut self) -> Result<usize> {
        Ok(0)
    }

    /// Netfilter asks for no sockets.
    fn forget_host_ports(&mut self) -> Result<()> {
        Ok(())
    }

    /// Netfilter's table is the whole host's.
    fn flow_tables(&self) -> Vec<FlowTable> {
        Vec::new()
    }

    fn nature(&self) -> Nature {
        Nature { needs_bridge_filter: true, ..Nature::default() }
    }

    fn features(&self) -> Vec<KernelFeature> {
        Vec::new()
    }
}
