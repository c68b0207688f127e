//! Docker for the suite of that name: Debian's newest, with all that it needs down to the C library,
//! unpacked into a directory that can be the root of its processes. Nothing is installed: no daemon
//! starts, and none of the machine's rules changes. What was fetched once is used without a network;
//! removing the directory fetches the newest.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::apt::{self, Part, Suite};
use crate::cargo;

/// What holds networks together, and what containers are made of.
const PACKAGES: [&str; 5] = ["docker.io", "docker-cli", "iptables", "nftables", "busybox-static"];

/// Suites of Debian's to take it from, the first that has it: the next release changes less often
/// than unstable.
const SUITES: [&str; 2] = ["forky", "sid"];

/// Where the parts of a system are that packages put below `usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// Directories that whoever has the root mounts something on.
const MOUNT_POINTS: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];

/// The root directory with Docker, fetched from Debian unless it is there.
pub(crate) fn get() -> Result<PathBuf> {
    let root = cargo::side_target_dir("docker");
    if root.exists() {
        return Ok(root);
    }
    ensure!(apt::is_available(), "no apt here to take it from");
    let parent = root.parent().context("find the build directory")?;
    let scratch = tempfile::tempdir_in(parent).context("create a directory")?;
    let unfinished = scratch.path().join("root");
    let mut seen = Vec::new();
    for name in SUITES {
        match fetch(name, &scratch.path().join(name), &unfinished) {
            Ok(()) => {
                // Whoever interrupts it leaves no half of it.
                fs::rename(&unfinished, &root)
                    .with_context(|| format!("create {}", root.display()))?;
                return Ok(root);
            }
            Err(error) => seen.push(format!("{name}: {error:#}")),
        }
    }
    bail!("no Debian suite gave it ({})", seen.join("; "))
}

/// Unpacks Docker of a suite, whose lists go to `directory`, into `root`.
fn fetch(name: &str, directory: &Path, root: &Path) -> Result<()> {
    let archive = apt::archives(Part::Main)?.into_iter().next().context("no apt source here")?;
    Suite::open(&archive, name, directory)?.unpack_whole(&PACKAGES, root)?;
    complete(root)
}

/// Does what installing would have done beside unpacking.
fn complete(root: &Path) -> Result<()> {
    let link = |target: &str, path: &str| -> Result<()> {
        let path = root.join(path);
        if path.symlink_metadata().is_ok() {
            return Ok(());
        }
        symlink(target, &path).with_context(|| format!("link {}", path.display()))
    };
    for name in MERGED {
        link(&format!("usr/{name}"), name)?;
    }
    for family in ["iptables", "ip6tables"] {
        for tool in ["", "-save", "-restore"] {
            link("xtables-nft-multi", &format!("usr/sbin/{family}{tool}"))?;
        }
    }
    for name in MOUNT_POINTS {
        fs::create_dir_all(root.join(name)).with_context(|| format!("create {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacked_root_is_completed_without_touching_what_packages_brought() {
        let root = tempfile::tempdir().unwrap();
        for directory in ["usr/sbin", "lib"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        for _ in 0..2 {
            complete(root.path()).unwrap();
        }
        let target = |path: &str| fs::read_link(root.path().join(path)).ok();
        assert_eq!(target("sbin"), Some("usr/sbin".into()));
        assert_eq!(target("lib"), None);
        assert_eq!(target("usr/sbin/ip6tables-save"), Some("xtables-nft-multi".into()));
        assert!(root.path().join("proc").is_dir());
    }
}
