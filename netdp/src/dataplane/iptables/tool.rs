//! The programs: which of them this host uses, and running them.
//!
//! The only place that runs iptables, and `nft` to take away tables that are empty.

use std::{
    env,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, anyhow, bail};

use super::{
    rules::Table,
    text::{self, Found},
};

/// Chooses the variant whatever the host uses: "legacy" or "nft". Tests try both on one host.
const VARIANT_VARIABLE: &str = "NETDP_IPTABLES";

/// Where the programs are when the search path does not say so, as under `su`.
const DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// How long to wait for others that change rules, in seconds.
const LOCK_PATIENCE: &str = "10";

/// Which part of the kernel holds the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The old tables.
    Legacy,
    /// nf_tables, in compatible tables.
    Nft,
}

impl Variant {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Legacy, Self::Nft];

    /// As the names of its programs have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        }
    }

    /// From what `iptables --version` says. Before 1.8 there was one.
    fn of_version(version: &str) -> Self {
        if version.contains("nf_tables") { Self::Nft } else { Self::Legacy }
    }
}

/// The pair of programs for one family.
#[derive(Clone, Debug)]
pub(super) struct Tool {
    name: String,
    variant: Variant,
    list: PathBuf,
    save: PathBuf,
    restore: PathBuf,
}

impl Tool {
    /// The programs of a variant; `None` where they are not installed. `family` is "iptables" or
    /// "ip6tables".
    pub(super) fn of(family: &str, variant: Variant) -> Option<Self> {
        let name = format!("{family}-{}", variant.name());
        let programs = |name: &str| {
            let (save, restore) =
                (find(&format!("{name}-save"))?, find(&format!("{name}-restore"))?);
            Some((find(name)?, save, restore))
        };
        let (list, save, restore) = match programs(&name) {
            Some(own) => own,
            // Hosts with one variant only may call it by the plain name.
            None if default_variant(family).ok()? == variant => programs(family)?,
            None => return None,
        };
        Some(Self { name, variant, list, save, restore })
    }

    /// What this host's tables have of ours.
    pub(super) fn found(&self) -> Result<Found> {
        let mut command = Command::new(&self.save);
        command.arg("--counters").stdin(Stdio::null());
        let output = command.output().with_context(|| format!("run {}-save", self.name))?;
        Ok(Found::parse(&self.succeeded("save", output)?))
    }

    /// Reads the rules of these chains, all at once: a process takes longer to start than to read.
    pub(super) fn rules_of(&self, chains: &[(Table, String)]) -> Result<Vec<Vec<String>>> {
        let start = |(table, chain): &(Table, String)| {
            Command::new(&self.list)
                .args(["--wait", LOCK_PATIENCE, "--table", table.name(), "--list-rules", chain])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("run {}", self.name))
        };
        let started: Vec<_> = chains.iter().map(start).collect();
        // Whatever becomes of one, none of them is left behind.
        let ended = started.into_iter().map(|child| {
            let output = child?.wait_with_output();
            self.succeeded("list", output.with_context(|| format!("read {}", self.name))?)
        });
        let listings: Vec<_> = ended.collect();
        let read = listings.into_iter().zip(chains);
        read.map(|(listing, (_, chain))| Ok(text::rules_of(&listing?, chain))).collect()
    }

    /// Carries out one transaction: all of a table or nothing of it.
    pub(super) fn restore(&self, text: &str) -> Result<()> {
        let mut child = Command::new(&self.restore)
            .args(["--noflush", "--counters", "--wait", LOCK_PATIENCE])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {}-restore", self.name))?;
        let fed = match child.stdin.take() {
            // Closed at the end of the statement, which is the end of the input.
            Some(mut input) => input.write_all(text.as_bytes()),
            None => Ok(()),
        };
        let output = child.wait_with_output().context("wait for iptables-restore")?;
        // What it says of a bad line comes first: then it has read no further.
        self.succeeded("restore", output)?;
        fed.with_context(|| format!("feed {}-restore", self.name))
    }

    fn succeeded(&self, what: &str, output: Output) -> Result<String> {
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said: Vec<&str> = said.lines().filter(|line| !line.starts_with('#')).collect();
            bail!("{}-{what} failed ({}): {}", self.name, output.status, said.join("; "));
        }
        String::from_utf8(output.stdout).with_context(|| format!("read {}-{what}", self.name))
    }

    /// Takes away tables that nothing is left in, which the nft variant makes on its way. Without
    /// `nft` they stay.
    pub(super) fn remove_empty_tables(&self) -> Result<()> {
        let Some(nft) = find("nft").filter(|_| self.variant == Variant::Nft) else { return Ok(()) };
        let family = if self.name.starts_with("ip6") { "ip6" } else { "ip" };
        for table in Table::ALL {
            let name = [family, table.name()];
            let listed = Command::new(&nft).args(["list", "table"]).args(name).output();
            let listed = listed.context("run nft")?;
            let text = String::from_utf8_lossy(&listed.stdout);
            if listed.status.success() && is_empty_table(&text) {
                let deleted = Command::new(&nft).args(["delete", "table"]).args(name).output();
                let deleted = deleted.context("run nft")?;
                if !deleted.status.success() {
                    let said = String::from_utf8_lossy(&deleted.stderr);
                    bail!("delete the empty table {}: {}", table.name(), said.trim());
                }
            }
        }
        Ok(())
    }
}

/// Whether what `nft list table` says has nothing but chains of the kernel that let all pass.
fn is_empty_table(listing: &str) -> bool {
    listing.lines().map(str::trim).all(|line| {
        line.is_empty()
            || line == "}"
            || line.starts_with('#')
            || line.starts_with("table ") && line.ends_with('{')
            || line.starts_with("chain ") && line.ends_with('{')
            || line.starts_with("type ") && line.ends_with("policy accept;")
    })
}

/// The variant to work with, and why.
pub(super) fn chosen_variant() -> Result<(Variant, String)> {
    if let Ok(asked) = env::var(VARIANT_VARIABLE) {
        let variant = Variant::ALL.into_iter().find(|variant| variant.name() == asked);
        let variant = variant
            .with_context(|| format!("{VARIANT_VARIABLE}={asked}: give \"legacy\" or \"nft\""))?;
        return Ok((variant, format!("{VARIANT_VARIABLE} says so")));
    }
    let variant = default_variant("iptables")?;
    Ok((variant, "iptables --version says so".to_owned()))
}

/// The variant that this host means by the plain name.
fn default_variant(family: &str) -> Result<Variant> {
    let program = find(family).ok_or_else(|| {
        anyhow!("no {family} on this host: install the package iptables, or use --dataplane ebpf")
    })?;
    let output = Command::new(&program).arg("--version").stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("run {}", program.display()))?;
    Ok(Variant::of_version(&String::from_utf8_lossy(&output.stdout)))
}

pub(super) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = DIRECTORIES.map(PathBuf::from);
    let mut candidates =
        env::split_paths(&path).chain(usual).map(|directory| directory.join(program));
    candidates.find(|path: &PathBuf| Path::is_file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variant_is_what_the_version_says() {
        assert_eq!(Variant::of_version("iptables v1.8.9 (nf_tables)\n"), Variant::Nft);
        assert_eq!(Variant::of_version("iptables v1.8.9 (legacy)\n"), Variant::Legacy);
        assert_eq!(Variant::of_version("iptables v1.6.1\n"), Variant::Legacy);
    }

    #[test]
    fn a_table_with_a_rule_a_set_or_a_policy_is_not_empty() {
        let table = |inside: &str| {
            format!(
                "# Warning: managed by iptables-nft\ntable ip filter {{\n\tchain INPUT {{\n\t\t\
                 type filter hook input priority filter; policy accept;\n{inside}\t}}\n}}\n"
            )
        };
        assert!(is_empty_table(&table("")));
        assert!(!is_empty_table(&table("\t\tcounter packets 0 bytes 0 drop\n")));
        assert!(!is_empty_table(&table("").replace("accept", "drop")));
        assert!(!is_empty_table(&table("\t}\n\tset s {\n\t\ttype ipv4_addr\n")));
    }
}
