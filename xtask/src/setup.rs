//! What building and testing need beyond a stable toolchain, and getting it: idempotent, one
//! line per step, one clear error when a step has no way. Knows what is needed and why; how
//! packages and sources come is apt's and rust_src's business.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process::{find_program, is_root, own_status, run_quiet};
use crate::{apt, cargo, docker, rust_src};

/// The last release whose default features use rustc's own LLVM: later ones want a system
/// LLVM of the same version.
const BPF_LINKER: &str = "0.10.4";

/// The programs that tests and demo run: name, Debian package, what for.
const PROGRAMS: [(&str, &str, &str); 8] = [
    ("ip", "iproute2", "lab state in failure reports"),
    ("curl", "curl", "real HTTP in the demo"),
    ("ping", "iputils-ping", "ICMP echo from a real client"),
    ("tcpdump", "tcpdump", "what crossed a link"),
    ("bpftool", "bpftool", "programs and maps in failure reports"),
    ("nft", "nftables", "proof that netfilter stays empty"),
    ("iptables", "iptables", "the other backend; proof that the old tables stay empty, too"),
    ("ipset", "ipset", "long policies of the other backend"),
];

/// What virtual machines need: name, Debian package, what for.
const MACHINE_PROGRAMS: [(&str, &str, &str); 3] = [
    ("qemu-system-x86_64", "qemu-system-x86", "virtual machines with other kernels"),
    ("busybox", "busybox-static", "the first program of a virtual machine"),
    ("depmod", "kmod", "the kernel modules of a virtual machine"),
];

/// The oldest kernel that netdp works on.
const KERNEL_FLOOR: (u32, u32) = (5, 10);

/// How much of the machine to set up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// What compiling needs: no root, any kernel.
    Toolchain,
    /// The toolchain, and what tests in virtual machines need: no root but for installing it, any
    /// kernel.
    Machines,
    /// The toolchain, machines, and what running packets through BPF programs needs.
    Everything,
}

/// Installs what `scope` needs and this machine misses. The kernel comes first: nobody waits
/// for downloads to hear that they are for nothing.
pub(crate) fn run(scope: Scope) -> Result<()> {
    if scope == Scope::Everything {
        check_kernel()?;
        check_privilege()?;
    }
    rust_src::ensure()?;
    ensure_bpf_linker()?;
    if scope != Scope::Toolchain {
        // Machines get the programs of this one.
        ensure_programs()?;
    }
    if scope == Scope::Everything {
        look_for_docker();
    }
    Ok(())
}

/// Only two suites ask Docker, and say so where there is none.
fn look_for_docker() {
    match docker::get() {
        Ok(root) => println!("Docker: there, in {}", root.display()),
        Err(error) => {
            println!("Docker: not to be had, so the suites docker and engines skip: {error:#}")
        }
    }
}

fn check_kernel() -> Result<()> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
    let release = read("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    let (major, minor) = KERNEL_FLOOR;
    let version = kernel_version(release).with_context(|| format!("read version {release:?}"))?;
    ensure!(
        version >= KERNEL_FLOOR,
        "netdp's BPF programs need Linux {major}.{minor}, this is {release}: boot a newer kernel"
    );
    // The sysctl exists exactly where the bpf(2) system call does.
    ensure!(
        Path::new("/proc/sys/kernel/unprivileged_bpf_disabled").exists(),
        "kernel {release} has no BPF: boot one built with CONFIG_BPF_SYSCALL"
    );
    println!("kernel: {release} has BPF");
    Ok(())
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Root in a container may lack what makes it root.
fn check_privilege() -> Result<()> {
    if !is_root()? {
        ensure!(
            find_program("sudo").is_some(),
            "loading BPF programs and making namespaces needs root: run this as root or install sudo"
        );
        println!("root: sudo will be asked for the steps that need it");
        return Ok(());
    }
    let missing = missing_capabilities(&own_status("CapEff:")?)?;
    ensure!(
        missing.is_empty(),
        "this root lacks {}: run on a host or in a privileged container",
        missing.join(" and ")
    );
    Ok(())
}

/// `effective` is the hexadecimal set of `/proc/self/status`.
fn missing_capabilities(effective: &str) -> Result<Vec<&'static str>> {
    let set = u64::from_str_radix(effective, 16).context("read the effective capabilities")?;
    // Bit numbers of linux/capability.h.
    let needed = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];
    Ok(needed.iter().filter(|(bit, _)| set >> bit & 1 == 0).map(|(_, name)| *name).collect())
}

fn ensure_bpf_linker() -> Result<()> {
    let found = bpf_linker_version();
    if found.as_deref() == Some(BPF_LINKER) {
        println!("bpf-linker: there");
        return Ok(());
    }
    let found = found.map_or("missing".to_owned(), |version| format!("is {version}"));
    println!("bpf-linker: {found}; installing {BPF_LINKER}, which links with rustc's own LLVM");
    let mut install =
        cargo::command(&["install", "bpf-linker", "--locked", "--version", BPF_LINKER]);
    run_quiet(&format!("build bpf-linker {BPF_LINKER}"), &mut install)?;
    ensure!(
        bpf_linker_version().as_deref() == Some(BPF_LINKER),
        "bpf-linker {BPF_LINKER} is installed but not the first in PATH: put cargo's bin directory there"
    );
    Ok(())
}

fn bpf_linker_version() -> Option<String> {
    let output = Command::new("bpf-linker").arg("--version").output().ok()?;
    let told = String::from_utf8(output.stdout).ok()?;
    Some(told.trim().strip_prefix("bpf-linker ")?.to_owned())
}

fn ensure_programs() -> Result<()> {
    let needed = PROGRAMS.into_iter().chain(MACHINE_PROGRAMS);
    let missing: Vec<_> = needed.filter(|(program, ..)| find_program(program).is_none()).collect();
    if missing.is_empty() {
        println!("programs: there");
        return Ok(());
    }
    for (program, package, purpose) in &missing {
        println!("{program}: missing; installing {package} for {purpose}");
    }
    let packages: Vec<_> = missing.iter().map(|(_, package, _)| *package).collect();
    let programs: Vec<_> = missing.iter().map(|(program, ..)| *program).collect();
    ensure!(
        apt::is_available(),
        "no apt here: install {} with this distribution's package manager",
        programs.join(", ")
    );
    apt::install(&packages).with_context(|| format!("{} missing", programs.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_version_is_read_from_any_release() {
        assert_eq!(kernel_version("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("5.10"), Some((5, 10)));
        assert_eq!(kernel_version("5.4-rc1"), Some((5, 4)));
        assert_eq!(kernel_version("next"), None);
        assert!(kernel_version("5.4.13") < Some(KERNEL_FLOOR));
    }

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(missing_capabilities("000001ffffffffff").unwrap(), [""; 0]);
        // The default set of a Docker container.
        let both = ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"];
        assert_eq!(missing_capabilities("00000000a80425fb").unwrap(), both);
    }
}
