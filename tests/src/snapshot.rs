//! The state of a host that a program might leave traces in, to be compared.
//!
//! Reads only; what changes by itself (counters, timers, learnt neighbours) is left out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;
use crate::runtime::is_installed;

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
        let questions: [&[&str]; 7] = [
            &["-details", "link", "show"],
            &["address", "show"],
            &["route", "show", "table", "all"],
            &["rule", "show"],
            &["-6", "rule", "show"],
            &["neighbour", "show", "nud", "permanent"],
            &["neighbour", "show", "proxy"],
        ];
        for question in questions {
            let rows = host.ip_json(question)?;
            for (number, row) in rows.as_array().into_iter().flatten().enumerate() {
                let name = row["ifname"].as_str().map_or_else(|| number.to_string(), String::from);
                state.insert(format!("ip {} {name}", question.join(" ")), row.to_string());
            }
        }
        let rules = host.output("nft", &["list", "ruleset"])?;
        state.insert("nft".into(), String::from_utf8_lossy(&rules.stdout).into_owned());
        if is_installed("bpftool") {
            let attached = host.output("bpftool", &["net", "list"])?;
            state.insert("bpf".into(), String::from_utf8_lossy(&attached.stdout).into_owned());
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
