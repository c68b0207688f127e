//! `netdp doctor`: whether this host can run netdp, and what the agent finds wrong.
//!
//! Works without an agent, changes nothing.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use serde::Serialize;

use super::{print, print_json, table::Table};
use crate::{
    api::{
        client::{self, Client},
        wire,
    },
    config::Paths,
    dataplane::{
        KernelFeature,
        ebpf::{Ebpf, Features, cgroup2_mount},
        iptables::Iptables,
    },
    netlink::sysctl,
    plan::IPV6_CONF,
};

#[derive(Args, Debug)]
pub(super) struct Doctor {
    #[command(flatten)]
    paths: Paths,
    /// Print a JSON list
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Check {
    check: &'static str,
    verdict: Verdict,
    /// What was found, and what to do about it.
    finding: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// Capabilities that the agent works with (capability.h), and what for.
const RIGHTS: [(u32, &str); 4] = [
    (10, "CAP_NET_BIND_SERVICE"), // reserves published ports below 1024
    (12, "CAP_NET_ADMIN"),        // makes links, attaches programs
    (21, "CAP_SYS_ADMIN"),        // enters containers' namespaces, mounts bpffs
    (39, "CAP_BPF"),              // loads programs; implied by CAP_SYS_ADMIN
];

impl Doctor {
    pub(super) fn paths(&self) -> &Paths {
        &self.paths
    }

    pub(super) async fn run(&self, client: &Client) -> Result<()> {
        let mut checks = vec![rights()?];
        checks.extend(kernel()?);
        checks.extend([ipv6()?, btf(), bpffs(&self.paths.bpffs)]);
        checks.extend([cgroup(&self.paths)?, iptables()]);
        checks.extend(agent(client, &self.paths).await?);
        if self.json {
            print_json(&checks)?;
        } else {
            let mut table = Table::new(["CHECK", "VERDICT", "FINDING"]);
            for Check { check, verdict, finding } in &checks {
                table.row([(*check).to_owned(), verdict.name().to_owned(), finding.clone()]);
            }
            print(&table.to_string())?;
        }
        match checks.iter().filter(|check| check.verdict == Verdict::Fail).count() {
            0 => Ok(()),
            1 => bail!("1 check failed: do what it says"),
            failed => bail!("{failed} checks failed: do what they say"),
        }
    }
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

fn ok(check: &'static str, finding: impl Into<String>) -> Check {
    Check { check, verdict: Verdict::Ok, finding: finding.into() }
}

fn warn(check: &'static str, finding: impl Into<String>) -> Check {
    Check { check, verdict: Verdict::Warn, finding: finding.into() }
}

fn fail(check: &'static str, finding: impl Into<String>) -> Check {
    Check { check, verdict: Verdict::Fail, finding: finding.into() }
}

/// Names of the capabilities that this process would need and does not have.
pub(super) fn missing_rights() -> Result<Vec<&'static str>> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .context("find the effective capabilities in /proc/self/status")?;
    Ok(missing_of(effective))
}

fn missing_of(effective: u64) -> Vec<&'static str> {
    const SYS_ADMIN: u32 = 21;
    const BPF: u32 = 39;
    let has = |capability: u32| effective & (1 << capability) != 0;
    RIGHTS
        .iter()
        .filter(|&&(capability, _)| !(has(capability) || capability == BPF && has(SYS_ADMIN)))
        .map(|&(_, name)| name)
        .collect()
}

fn rights() -> Result<Check> {
    let missing = missing_rights()?;
    Ok(if missing.is_empty() {
        ok("rights", "all that the agent needs")
    } else {
        fail("rights", format!("{} missing: run the agent as root", missing.join(", ")))
    })
}

/// The kernel, and what netdp would use of it.
fn kernel() -> Result<Vec<Check>> {
    let release =
        fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    if !missing_rights()?.is_empty() {
        let finding = format!("Linux {}; root finds out what it has", release.trim());
        return Ok(vec![warn("kernel", finding)]);
    }
    let features = Features::probe();
    let verdict = match (features.require(), Iptables::describe()) {
        (Ok(()), _) => ok("kernel", format!("Linux {}", release.trim())),
        (Err(error), Ok(_)) => warn("kernel", format!("{error:#}; the agent works with iptables")),
        (Err(error), Err(_)) => fail("kernel", format!("{error:#}")),
    };
    let rows = features.rows();
    Ok([verdict].into_iter().chain(rows.iter().map(judge_feature)).collect())
}

fn judge_feature(feature: &KernelFeature) -> Check {
    let (major, minor) = feature.since;
    if feature.is_there {
        ok(feature.name, format!("there (Linux {major}.{minor})"))
    } else {
        let finding = format!("not there (Linux {major}.{minor}): {}", feature.without);
        warn(feature.name, finding)
    }
}

fn ipv6() -> Result<Check> {
    let read =
        |interface: &str, name: &str| sysctl::read(&format!("{IPV6_CONF}{interface}/{name}"));
    let is_router = read("all", "forwarding")?;
    let can_force = read("lo", "force_forwarding")?.is_some();
    Ok(judge_ipv6(is_router.as_deref(), can_force))
}

/// `is_router` is the value of `net.ipv6.conf.all.forwarding`, where there is one.
fn judge_ipv6(is_router: Option<&str>, can_force: bool) -> Check {
    match is_router {
        None => warn("ipv6", "switched off (ipv6.disable=1): networks can have IPv4 only"),
        Some(_) if can_force => ok("ipv6", "forwarded by interface"),
        Some("0") => warn(
            "ipv6",
            "the kernel is older than Linux 6.17: a network with IPv6 makes this host a router \
             (net.ipv6.conf.all.forwarding)",
        ),
        Some(_) => ok("ipv6", "this host is a router"),
    }
}

fn btf() -> Check {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        ok("btf", "the kernel describes its types")
    } else {
        warn("btf", "the kernel has no BTF: fine for now, CONFIG_DEBUG_INFO_BTF for later versions")
    }
}

fn bpffs(path: &Path) -> Check {
    let at = path.display();
    match statfs(path) {
        Ok(found) if found.filesystem_type() == BPF_FS_MAGIC => {
            ok("bpffs", format!("mounted at {at}"))
        }
        _ => warn("bpffs", format!("not mounted at {at}: the agent mounts one when it starts")),
    }
}

/// Whether there is a way without eBPF.
fn iptables() -> Check {
    match Iptables::describe() {
        Ok(variant) => ok("iptables", format!("{variant}: a way without eBPF")),
        Err(error) => warn("iptables", format!("no way without eBPF: {error:#}")),
    }
}

/// Whether programs of the host can be led to published ports.
fn cgroup(paths: &Paths) -> Result<Check> {
    let cgroup = match &paths.cgroup {
        Some(cgroup) => Some(cgroup.clone()),
        None => cgroup2_mount()?,
    };
    Ok(match cgroup {
        Some(cgroup) => ok("cgroup2", format!("mounted at {}", cgroup.display())),
        None => warn(
            "cgroup2",
            "not mounted: programs of this host don't reach published ports; \
             mount -t cgroup2 none DIR, then start the agent with --cgroup DIR",
        ),
    })
}

/// The hooks of a running agent that has networks.
fn socket_hooks(bpffs: &Path) -> Check {
    if Ebpf::has_socket_hooks(bpffs) {
        let limit = "all but those bound to a loopback address themselves";
        ok("sockets", format!("programs of this host reach published ports ({limit})"))
    } else {
        let advice = "the agent's log says why";
        warn("sockets", format!("programs of this host don't reach published ports: {advice}"))
    }
}

/// What the agent says of itself, and of the kernel's state compared with its own.
async fn agent(client: &Client, paths: &Paths) -> Result<Vec<Check>> {
    if let Err(error) = client.reach().await {
        return Ok(vec![warn("agent", format!("{error:#}"))]);
    }
    let status: wire::Status = client.get(&client::path(&["status"])).await?;
    let dataplane = format!("{}: {}", status.dataplane, status.dataplane_reason);
    let agent = format!("netdp {} (pid {})", status.version, status.pid);
    let mut checks = vec![ok("agent", agent), ok("dataplane", dataplane)];
    checks.extend(status.troubles.into_iter().map(|trouble| fail("trouble", trouble)));
    checks.extend(status.alarms.into_iter().map(|alarm| warn("alarm", alarm)));
    let uplinks: Vec<String> = status.uplinks.iter().map(ToString::to_string).collect();
    checks.push(if status.networks == 0 {
        ok("uplinks", "not needed before there is a network")
    } else if uplinks.is_empty() {
        warn("uplinks", "none: containers reach this host only; see --uplink")
    } else {
        ok("uplinks", uplinks.join(", "))
    });
    if status.networks > 0 && status.dataplane == "ebpf" {
        checks.push(socket_hooks(&paths.bpffs));
    }
    let drift: Vec<String> = client.get(&client::path(&["check"])).await?;
    if drift.is_empty() {
        checks.push(ok("drift", "the kernel agrees with what was asked for"));
    }
    let advice = "the agent repairs it within seconds; if not, restart it";
    checks.extend(drift.iter().map(|what| fail("drift", format!("{what}: {advice}"))));
    Ok(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_named() {
        assert_eq!(missing_of(u64::MAX), [""; 0]);
        assert_eq!(missing_of(1 << 10 | 1 << 12 | 1 << 21), [""; 0], "SYS_ADMIN implies BPF");
        assert_eq!(missing_of(1 << 12), ["CAP_NET_BIND_SERVICE", "CAP_SYS_ADMIN", "CAP_BPF"]);
    }

    #[test]
    fn ipv6_is_judged_by_how_it_is_forwarded() {
        for (is_router, can_force, verdict, finding) in [
            (None, false, Verdict::Warn, "switched off"),
            (Some("0"), true, Verdict::Ok, "by interface"),
            (Some("1"), true, Verdict::Ok, "by interface"),
            (Some("0"), false, Verdict::Warn, "older than Linux 6.17"),
            (Some("1"), false, Verdict::Ok, "is a router"),
        ] {
            let check = judge_ipv6(is_router, can_force);
            assert_eq!(check.verdict, verdict, "{is_router:?} {can_force}");
            assert!(check.finding.contains(finding), "{}", check.finding);
        }
    }

    #[test]
    fn what_a_kernel_lacks_is_told_with_what_that_costs() {
        let tcx = KernelFeature {
            name: "tcx",
            since: (6, 6),
            is_there: false,
            without: "filters of clsact qdiscs",
        };
        let check = judge_feature(&tcx);
        assert_eq!(check.verdict, Verdict::Warn);
        assert_eq!(check.finding, "not there (Linux 6.6): filters of clsact qdiscs");
        let check = judge_feature(&KernelFeature { is_there: true, ..tcx });
        assert_eq!(check.verdict, Verdict::Ok);
    }
}
