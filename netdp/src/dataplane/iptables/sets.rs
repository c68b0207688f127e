//! Sets of prefixes in the kernel, for policies that name many: one lookup instead of a rule for each.
//!
//! A set's name follows from what is in it, so a rule goes from one set to the next in the same
//! transaction as everything else: before it the new sets are made, behind it the old ones destroyed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::{rules::PREFIX, tool::find};
use crate::model::NetworkId;

/// Room in a set, at least: the kernel's default.
const ROOM: usize = 65_536;

/// There where the kernel has sets, built in or loaded.
const MODULE: &str = "/sys/module/ip_set";

/// Sets of one family that a rule set refers to, by name: prefixes.
pub(super) type Sets = BTreeMap<String, BTreeSet<String>>;

/// A set's name: at most 31 bytes. `family` is the one digit by which families differ.
pub(super) fn name(network: NetworkId, family: char, prefixes: &BTreeSet<String>) -> String {
    let mut hasher = DefaultHasher::new();
    prefixes.hash(&mut hasher);
    format!("{}{family}-{:016x}", stem(network), hasher.finish())
}

fn stem(network: NetworkId) -> String {
    format!("{PREFIX}{}-", network.0)
}

/// Whether a set of ours is of a family.
fn is_of(name: &str, family: char) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.split('-').nth(1))
        .is_some_and(|found| found.starts_with(family))
}

/// The program `ipset`.
#[derive(Clone, Debug)]
pub(super) struct IpSet(PathBuf);

impl IpSet {
    /// `None` where there is none, or the kernel has no sets.
    pub(super) fn find() -> Option<Self> {
        let ipset = Self(find("ipset")?);
        ipset.run(&["list", "-name"], "").ok()?;
        Some(ipset)
    }

    /// The same, without having the kernel load sets just to see that there are none.
    pub(super) fn find_loaded() -> Option<Self> {
        Path::new(MODULE).exists().then(Self::find).flatten()
    }

    /// How many prefixes each set of ours in a family has.
    pub(super) fn found(&self, family: char) -> Result<BTreeMap<String, usize>> {
        let mut sizes = BTreeMap::new();
        for line in self.run(&["save"], "")?.lines() {
            let mut words = line.split(' ');
            let (verb, set) = (words.next(), words.next().unwrap_or_default());
            if is_of(set, family) {
                *sizes.entry(set.to_owned()).or_default() += usize::from(verb == Some("add"));
            }
        }
        Ok(sizes)
    }

    /// Makes sets that are not there, or not whole.
    pub(super) fn ensure(&self, wanted: &Sets, family: char) -> Result<()> {
        let there = if wanted.is_empty() { BTreeMap::new() } else { self.found(family)? };
        let text = creation(wanted, &there, family);
        if text.is_empty() {
            return Ok(());
        }
        self.run(&["restore", "-exist"], &text).map(drop).context("make sets of prefixes")
    }

    /// Destroys sets of ours in a family that nothing refers to any more. Returns whether there were
    /// some.
    pub(super) fn retain(&self, wanted: &Sets, family: char) -> Result<bool> {
        let found = self.found(family)?;
        let gone = found.keys().filter(|name| !wanted.contains_key(*name));
        let text: String = gone.map(|name| format!("destroy {name}\n")).collect();
        if text.is_empty() {
            return Ok(false);
        }
        self.run(&["restore", "-exist"], &text).context("destroy sets of prefixes")?;
        Ok(true)
    }

    fn run(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = Command::new(&self.0)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run ipset")?;
        if let Some(mut stdin) = child.stdin.take() {
            // Where it stops reading, it says why below.
            let _stopped = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().context("wait for ipset")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("ipset failed ({}): {}", output.status, said.trim());
        }
        String::from_utf8(output.stdout).context("read ipset")
    }
}

/// What `ipset restore` has to read for sets that are not there with all that is in them.
fn creation(wanted: &Sets, there: &BTreeMap<String, usize>, family: char) -> String {
    let words = if family == '4' { "inet" } else { "inet6" };
    let mut text = String::new();
    for (name, prefixes) in wanted {
        if there.get(name) == Some(&prefixes.len()) {
            continue;
        }
        let room = prefixes.len().max(ROOM);
        let mut line = |line: String| text.push_str(&(line + "\n"));
        line(format!("create {name} hash:net family {words} maxelem {room}"));
        line(format!("flush {name}"));
        for prefix in prefixes {
            line(format!("add {name} {prefix}"));
        }
    }
    text
}

/// Sets that are not there, or not whole, in words for the operator.
pub(super) fn drift(wanted: &Sets, found: &BTreeMap<String, usize>) -> Vec<String> {
    let differing =
        wanted.iter().filter(|(name, prefixes)| found.get(*name) != Some(&prefixes.len()));
    differing
        .map(|(name, prefixes)| {
            let mut what = format!("set {name} of {} prefixes ", prefixes.len());
            let rest = match found.get(name) {
                None => what.write_str("is missing"),
                Some(there) => what.write_fmt(format_args!("has {there}")),
            };
            // A string takes whatever it is given.
            debug_assert!(rest.is_ok());
            what
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_made_again() {
        let prefixes: BTreeSet<String> = ["10.0.0.0/8", "192.0.2.1/32"].map(String::from).into();
        let set = name(NetworkId(4095), '4', &prefixes);
        assert!(set.len() <= 31 && is_of(&set, '4') && !is_of(&set, '6'), "{set}");
        let wanted: Sets = [(set.clone(), prefixes)].into();
        let whole = [(set.clone(), 2)].into();
        assert_eq!(creation(&wanted, &whole, '4'), "");
        assert_eq!(drift(&wanted, &whole), [""; 0]);
        let robbed = [(set.clone(), 1)].into();
        let expected = format!(
            "create {set} hash:net family inet maxelem 65536\nflush {set}\nadd {set} 10.0.0.0/8\n\
             add {set} 192.0.2.1/32\n"
        );
        assert_eq!(creation(&wanted, &robbed, '4'), expected);
        assert_eq!(drift(&wanted, &robbed), [format!("set {set} of 2 prefixes has 1")]);
        assert_eq!(
            drift(&wanted, &BTreeMap::new()),
            [format!("set {set} of 2 prefixes is missing")]
        );
    }

    #[test]
    fn other_contents_have_another_name() {
        let of = |prefix: &str| name(NetworkId(1), '6', &[prefix.to_owned()].into());
        assert_ne!(of("fd00::/8"), of("fd00::/9"));
        assert!(!is_of("NETDP-FORWARD", '4') && !is_of("mine", '4'));
    }
}
