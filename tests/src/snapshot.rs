//! The state of a host that a program might leave traces in, to be compared.
//!
//! Reads only; what changes by itself (counters, timers, learnt neighbours) is left out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::namespace::Namespace;
use crate::runtime::is_installed;

/// What `ip` is asked of a namespace.
const QUESTIONS: [&[&str]; 7] = [
    &["-details", "link", "show"],
    &["address", "show"],
    &["route", "show", "table", "all"],
    &["rule", "show"],
    &["-6", "rule", "show"],
    &["neighbour", "show", "nud", "permanent"],
    &["neighbour", "show", "proxy"],
];

/// States of a TCP socket that say nothing more to anybody, as /proc has them: TIME_WAIT, LISTEN
/// (net/tcp_states.h).
const SILENT: [&str; 2] = ["06", "0A"];

/// Everything of one host, by what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, String>);

impl Snapshot {
    /// Looks at the lab's host: links, addresses, routes, rules, netfilter, settings, pins.
    ///
    /// # Errors
    /// When something can't be read.
    pub fn of_host(lab: &Lab) -> Result<Self> {
        let host = lab.host();
        let mut state = BTreeMap::new();
        look_at_network(host, "ip", &mut state)?;
        let rules = host.output("nft", &["list", "ruleset"])?;
        state.insert("nft".into(), String::from_utf8_lossy(&rules.stdout).into_owned());
        if is_installed("bpftool") {
            let attached = host.output("bpftool", &["net", "list"])?;
            // Each program that is loaded has another number.
            let words = String::from_utf8_lossy(&attached.stdout);
            let words = words.split_whitespace().filter(|word| word.parse::<u32>().is_err());
            state.insert("bpf".into(), words.collect::<Vec<_>>().join(" "));
        }
        let settings = host.run(|| {
            let mut settings = BTreeMap::new();
            read_tree(Path::new("/proc/sys/net"), &mut settings)?;
            Ok(settings)
        })?;
        state.extend(settings);
        // Not a setting: netfilter says there how many connections it knows.
        state.retain(|name, _| !name.ends_with("/nf_conntrack_count"));
        let mut pins = BTreeMap::new();
        read_tree(&lab.bpffs(), &mut pins)?;
        state.extend(pins);
        Ok(Self(state))
    }

    /// Looks at all that a test finds in a lab: the host, the network outside, and connections that
    /// somebody may still speak on.
    ///
    /// # Errors
    /// When something can't be read.
    pub fn of_lab(lab: &Lab) -> Result<Self> {
        let Self(mut state) = Self::of_host(lab)?;
        look_at_network(lab.outside(), "outside: ip", &mut state)?;
        let connections = lab.outside().run(open_connections)?;
        state.insert("outside: connections".into(), connections.join(" "));
        Ok(Self(state))
    }

    /// Fails when the host is not as it was, naming each difference.
    ///
    /// # Errors
    /// With the differences.
    pub fn expect_same(&self, later: &Self) -> Result<()> {
        let mut differences = Vec::new();
        for (what, before) in &self.0 {
            match later.0.get(what) {
                None => differences.push(format!("{what}: gone, was {before}")),
                Some(after) if after != before => {
                    differences.push(format!("{what}: was {before}, is {after}"));
                }
                Some(_) => {}
            }
        }
        for (what, after) in later.0.iter().filter(|(what, _)| !self.0.contains_key(*what)) {
            differences.push(format!("{what}: new, is {after}"));
        }
        ensure!(differences.is_empty(), "compare the host:\n{}", differences.join("\n"));
        Ok(())
    }
}

/// Adds what `ip` says of a namespace.
fn look_at_network(
    namespace: &Namespace,
    title: &str,
    state: &mut BTreeMap<String, String>,
) -> Result<()> {
    for question in QUESTIONS {
        let rows = namespace.ip_json(question)?;
        for (number, row) in rows.as_array().into_iter().flatten().enumerate() {
            let name = row["ifname"].as_str().map_or_else(|| number.to_string(), String::from);
            state.insert(format!("{title} {} {name}", question.join(" ")), row.to_string());
        }
    }
    Ok(())
}

/// The TCP sockets of this thread's namespace that may still send something.
fn open_connections() -> Result<Vec<String>> {
    let mut open = Vec::new();
    for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let text = fs::read_to_string(table).with_context(|| format!("read {table}"))?;
        for line in text.lines().skip(1) {
            // proc(5): number, local address, peer's address, state.
            let fields: Vec<_> = line.split_whitespace().collect();
            if let [_, local, peer, state, ..] = fields[..]
                && !SILENT.contains(&state)
            {
                open.push(format!("{local}-{peer}"));
            }
        }
    }
    Ok(open)
}

/// Adds every entry below `directory`: a file with its text, where it has one for us.
fn read_tree(directory: &Path, entries: &mut BTreeMap<String, String>) -> Result<()> {
    let listed =
        fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    for entry in listed {
        let path = entry.context("list a directory")?.path();
        let text = if path.is_dir() {
            read_tree(&path, entries)?;
            String::new()
        } else {
            // Write-only settings and pinned objects have no text; that they exist is enough.
            fs::read_to_string(&path).unwrap_or_default().trim().to_owned()
        };
        entries.insert(path.display().to_string(), text);
    }
    Ok(())
}
