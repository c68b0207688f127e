//! The host's sysctls: set, remembered as they were, and given back byte for byte.
//!
//! Owns the order of writes, because one of them writes others along.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};

use super::State;
use crate::{
    facts::{HostFacts, PortRanges},
    netlink::sysctl,
    plan::{
        IPV6_CONF, IPV6_ROUTER_SYSCTL, RESERVED_PORTS_SYSCTL, SysctlPlan, forwarding_sysctl,
        sysctl_interface, sysctl_of_interface,
    },
};

/// Whether a sysctl follows the one that makes an IPv6 router of the host.
fn is_overwritten_by_router(path: &str) -> bool {
    path.starts_with(IPV6_CONF) && path.ends_with("/forwarding")
}

impl State {
    /// Makes the host's sysctls say what they have to. One that fails keeps no other from it.
    pub(super) async fn ensure_sysctls(
        &mut self,
        wanted: &BTreeMap<String, SysctlPlan>,
    ) -> Vec<Result<()>> {
        // Last what makes a router of the host: it forgets what was advertised to it wherever it
        // has not been told otherwise by then.
        let mut wanted: Vec<_> = wanted.iter().collect();
        wanted.sort_by_key(|(path, _)| *path == IPV6_ROUTER_SYSCTL);
        let mut results = Vec::new();
        for (path, plan) in wanted {
            results.push(self.ensure_sysctl(path, plan).await);
        }
        results
    }

    /// Gives back what is not wanted any more. One that fails keeps no other from it.
    pub(super) async fn give_back_sysctls(
        &mut self,
        wanted: &BTreeMap<String, SysctlPlan>,
    ) -> Vec<Result<()>> {
        let is_router = wanted.contains_key(IPV6_ROUTER_SYSCTL);
        let mut given_back: Vec<_> = self
            .setting
            .originals
            .iter()
            .filter(|(path, _)| !wanted.contains_key(*path))
            .filter(|(path, _)| !(is_router && is_overwritten_by_router(path)))
            .map(|(path, original)| (path.clone(), original.clone()))
            .collect();
        // First what overwrites others.
        given_back.sort_by_key(|(path, _)| path != IPV6_ROUTER_SYSCTL);
        let mut results = Vec::new();
        for (path, original) in given_back {
            results.push(self.give_back(path, original).await);
        }
        results
    }

    /// Remembers what a sysctl says, then makes it say what it has to.
    async fn ensure_sysctl(&mut self, path: &str, wanted: &SysctlPlan) -> Result<()> {
        let Some(present) = sysctl::read(path)? else { return Ok(()) };
        let value = match wanted {
            SysctlPlan::Is(value) => value.clone(),
            SysctlPlan::Replaces(from, to) if present == *from => to.clone(),
            SysctlPlan::Replaces(..) => return Ok(()),
            SysctlPlan::Covers(first, last) => {
                PortRanges::parse(&present).with(*first, *last).to_string()
            }
        };
        if present == value {
            return Ok(());
        }
        if path == IPV6_ROUTER_SYSCTL {
            self.remember_overwritten(&present).await?;
        }
        self.remember(path, present).await?;
        // Until now the ports were anybody's.
        self.forget_host_ports(path).await?;
        sysctl::write(path, &value)
    }

    /// Has the backend know that other sockets may have ports of source NAT's, if the sysctl is the one
    /// that keeps them from it.
    async fn forget_host_ports(&self, path: &str) -> Result<()> {
        if path == RESERVED_PORTS_SYSCTL {
            self.dataplane.call(|dataplane| dataplane.forget_host_ports()).await.flatten()?;
        }
        Ok(())
    }

    /// Remembers the switches of single interfaces that a write to the one for all would change for
    /// good: those that differ from it.
    async fn remember_overwritten(&mut self, present: &str) -> Result<()> {
        let directory = Path::new("/proc/sys").join(IPV6_CONF);
        let entries =
            fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))?;
        for entry in entries.flatten() {
            let Ok(interface) = entry.file_name().into_string() else { continue };
            // What belongs to a link of ours goes with it.
            if self.facts.link(&interface).is_some_and(|(_, link)| link.is_ours()) {
                continue;
            }
            let path = format!("{IPV6_CONF}{interface}/forwarding");
            match sysctl::read(&path)? {
                Some(value) if value != present => self.remember(&path, value).await?,
                _ => {}
            }
        }
        Ok(())
    }

    async fn give_back(&mut self, path: String, original: String) -> Result<()> {
        // Who made the host a router since then meant all its interfaces.
        let is_overruled = self.facts.is_router
            && sysctl_interface(&path).is_some_and(|name| path == forwarding_sysctl(name));
        if !is_overruled {
            self.forget_host_ports(&path).await?;
            sysctl::ensure(&path, &original)?;
        }
        self.forget(path).await
    }

    async fn remember(&mut self, path: &str, original: String) -> Result<()> {
        if self.setting.originals.contains_key(path) {
            return Ok(());
        }
        let record = (path.to_owned(), original.clone());
        self.store
            .call(move |store| store.remember_sysctl(&record.0, &record.1))
            .await
            .flatten()?;
        self.setting.originals.insert(path.to_owned(), original);
        Ok(())
    }

    async fn forget(&mut self, path: String) -> Result<()> {
        self.setting.originals.remove(&path);
        self.store.call(move |store| store.forget_sysctl(&path)).await.flatten()
    }

    /// A renamed uplink keeps its sysctls, so what we remember of it moves to its new name.
    pub(super) async fn follow_renames(&mut self, facts: &HostFacts) -> Result<()> {
        let renamed: Vec<_> = self
            .setting
            .originals
            .iter()
            .filter_map(|(path, original)| {
                let (ifindex, link) = self.facts.link(sysctl_interface(path)?)?;
                let now = facts.links.get(&ifindex).filter(|now| now.name != link.name)?;
                let moved = sysctl_of_interface(path, &now.name)?;
                Some((path.clone(), moved, original.clone()))
            })
            .collect();
        for (old, new, original) in renamed {
            self.remember(&new, original).await?;
            self.forget(old).await?;
        }
        Ok(())
    }
}
