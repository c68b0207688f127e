//! The interfaces of the host under test, in a network namespace of its own.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use netdp::model::MacAddress;
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
};

use crate::{
    family::{FAMILIES, Family, ipv6},
    fixture::{
        BRIDGES, HOST_SECOND, MEMBERS, OUTSIDE, SNAT, UNREACHABLE, UPLINK_MAC, UPLINKS, bridge,
        bridge_mac, gateway,
    },
};

/// Moves the thread to a new network namespace and builds the host in it.
pub(crate) fn build_host() -> Result<BTreeMap<&'static str, u32>> {
    unshare(CloneFlags::CLONE_NEWNET).context("create a network namespace")?;
    let set = |key: &str, value: &str| {
        fs::write(format!("/proc/sys/net/{key}"), value).with_context(|| format!("set {key}"))
    };
    // Nothing that a link says of itself may disturb the counters: no link-local address, and no
    // IPv6 at all but where the host needs it.
    set("ipv6/conf/default/disable_ipv6", "1")?;
    set("ipv6/conf/default/addr_gen_mode", "1")?;
    // As the agent reserves them.
    set("ipv4/ip_local_reserved_ports", "20000-20999,50000-60999")?;
    let mac = |bytes| MacAddress(bytes).to_string();
    // Who joins a multicast group says so: bridges that snoop, routers, whoever has an address.
    const QUIET: &str = "arp off multicast off";
    let mut links = String::from("link set lo up\n");
    for (name, id) in BRIDGES {
        links += &format!(
            "link add {name} address {} type bridge mcast_snooping 0\nlink set {name} {QUIET} up\n",
            mac(bridge_mac(id)),
        );
    }
    for (name, id) in MEMBERS {
        links += &format!(
            "link add {name} type veth peer name {name}-peer\nlink set {name} master {} up\nlink set {name}-peer up\n",
            bridge(id)
        );
    }
    for (name, _) in UPLINKS {
        links += &format!(
            "link add {name} address {} type veth peer name {name}-peer\nlink set {name} {QUIET} up\nlink set {name}-peer up\n",
            mac(UPLINK_MAC)
        );
    }
    ip_batch(&links)?;
    // Now that links are quiet: a router joins a group on each that is not.
    set("ipv4/ip_forward", "1")?;
    set("ipv6/conf/all/forwarding", "1")?;
    let own = BRIDGES.map(|(name, id)| (name, gateway(id)));
    let own: Vec<_> = own.into_iter().chain(UPLINKS).collect();
    let mut addresses = String::new();
    for (name, party) in own.iter().copied().chain([("up0", HOST_SECOND), ("up0", SNAT)]) {
        addresses += &format!("address add {party}/24 dev {name}\n");
        if FAMILIES.contains(&Family::V6) {
            set(&format!("ipv6/conf/{name}/disable_ipv6"), "0")?;
            addresses += &format!("address add {}/64 dev {name} nodad\n", ipv6(party));
        }
    }
    for family in FAMILIES {
        addresses += &format!("route add default via {}\n", family.address(OUTSIDE));
        addresses += &format!("route add unreachable {}\n", family.address(UNREACHABLE));
    }
    ip_batch(&addresses)?;
    let names = BRIDGES.iter().map(|(name, _)| *name);
    let names = names.chain(MEMBERS.iter().map(|(name, _)| *name));
    names
        .chain(UPLINKS.iter().map(|(name, _)| *name))
        .map(|name| {
            Ok((name, if_nametoindex(name).with_context(|| format!("find interface {name}"))?))
        })
        .collect()
}

/// Runs lines of `ip` in this thread's namespace.
fn ip_batch(script: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start ip: install iproute2")?;
    child.stdin.take().context("open ip's input")?.write_all(script.as_bytes())?;
    let output = child.wait_with_output().context("run ip")?;
    ensure!(output.status.success(), "build the host: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
