//! Bridged packets and iptables: whether the kernel can show them to it.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, bail};
use tracing::warn;

/// There once the module is.
const SETTINGS: &str = "/proc/sys/net/bridge";
const MODULE: &str = "br_netfilter";

/// Loads `br_netfilter` where it is not there. Our bridges ask for it one by one
/// (`nf_call_iptables`); by itself the module shows iptables the packets of all bridges, so that is
/// switched off again if it was we who loaded it.
///
/// # Errors
/// The module can't be loaded.
pub(super) fn ensure() -> Result<()> {
    if Path::new(SETTINGS).exists() {
        return Ok(());
    }
    let loaded = Command::new("modprobe").arg(MODULE).output();
    let said = match loaded {
        Ok(output) if output.status.success() && Path::new(SETTINGS).exists() => {
            warn!("loaded the module {MODULE}, which stays until the host is booted");
            return leave_others_alone();
        }
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => format!("run modprobe: {error}"),
    };
    bail!(
        "iptables does not see what bridges switch: this kernel has no {MODULE} ({said}); boot one \
         that is built with CONFIG_BRIDGE_NETFILTER, or use --dataplane ebpf"
    )
}

fn leave_others_alone() -> Result<()> {
    for name in ["iptables", "ip6tables", "arptables"] {
        let path = format!("{SETTINGS}/bridge-nf-call-{name}");
        fs::write(&path, "0").with_context(|| format!("write {path}"))?;
    }
    Ok(())
}
