//! Container engines for the suites that ask them: Debian's packages, with all that they need down to the C
//! library, unpacked into a directory that can be the root of their processes. Nothing is installed: no
//! daemon starts, and none of the machine's rules changes. What was fetched once is used without a network;
//! removing the directory fetches the newest.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::apt::{self, Part, Suite};
use crate::cargo;

/// An engine to be had.
pub(crate) struct Engine {
    /// What it is to whoever waits for it.
    pub(crate) title: &'static str,
    /// Its directory below the build directory.
    directory: &'static str,
    /// Names the directory to the tests, and what to take instead to this program.
    pub(crate) variable: &'static str,
    /// Suites of Debian's to take it from, the first that has it.
    suites: &'static [&'static str],
    packages: &'static [&'static str],
}

/// What holds networks together, and what containers are made of. The next release changes less often
/// than unstable.
pub(crate) const DOCKER: Engine = Engine {
    title: "Docker",
    directory: "docker",
    variable: "NETDP_DOCKER",
    suites: &["forky", "sid"],
    packages: &["docker.io", "docker-cli", "iptables", "nftables", "busybox-static"],
};

/// The one whose networks are netavark's.
const PODMAN: Engine = Engine {
    title: "Podman 5",
    directory: "podman",
    variable: "NETDP_PODMAN",
    suites: &["trixie"],
    packages: &["podman", "netavark", "crun", "busybox-static"],
};

/// The last one whose networks may be of CNI plugins.
const PODMAN_WITH_CNI: Engine = Engine {
    title: "Podman 4",
    directory: "podman-with-cni",
    variable: "NETDP_PODMAN_WITH_CNI",
    suites: &["bookworm"],
    packages: &["podman", "crun", "busybox-static"],
};

/// Engines that have netdp do their networks.
pub(crate) const CLIENTS: [Engine; 2] = [PODMAN, PODMAN_WITH_CNI];

/// Where the parts of a system are that packages put below `usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// Directories that whoever has the root mounts something on.
const MOUNT_POINTS: [&str; 6] =
    ["dev", "etc/containers/containers.conf.d", "proc", "run", "sys", "tmp"];

/// The root directory with an engine, fetched from Debian unless it is there.
pub(crate) fn get(engine: &Engine) -> Result<PathBuf> {
    let root = cargo::side_target_dir(engine.directory);
    if root.exists() {
        return Ok(root);
    }
    ensure!(apt::is_available(), "no apt here to take it from");
    let parent = root.parent().context("find the build directory")?;
    let scratch = tempfile::tempdir_in(parent).context("create a directory")?;
    let unfinished = scratch.path().join("root");
    let mut seen = Vec::new();
    for name in engine.suites {
        match fetch(engine, name, &scratch.path().join(name), &unfinished) {
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

/// Unpacks an engine of a suite, whose lists go to `directory`, into `root`.
fn fetch(engine: &Engine, name: &str, directory: &Path, root: &Path) -> Result<()> {
    let archive = apt::archives(Part::Main)?.into_iter().next().context("no apt source here")?;
    Suite::open(&archive, name, directory)?.unpack_whole(engine.packages, root)?;
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
    if root.join("usr/sbin/xtables-nft-multi").exists() {
        for family in ["iptables", "ip6tables"] {
            for tool in ["", "-save", "-restore"] {
                link("xtables-nft-multi", &format!("usr/sbin/{family}{tool}"))?;
            }
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
        fs::write(root.path().join("usr/sbin/xtables-nft-multi"), "").unwrap();
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
