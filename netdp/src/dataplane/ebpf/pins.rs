//! Where everything that outlives the agent is pinned: `<bpffs>/netdp/v<ABI>/{maps,links}`.
//!
//! Owns the paths, the mount of bpffs and the removal of pins. Knows nothing of what is pinned.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use netdp_common::abi::ABI;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use tracing::info;

use super::image::Hook;

/// A directory of this name says that we mounted the bpffs ourselves, so that purge unmounts it.
const MOUNTED_BY_US: &str = "mounted";

/// A directory of this name and an ifindex says that we made the interface's clsact qdisc.
const QDISC: &str = "clsact-";

/// The pins of this host.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    bpffs: PathBuf,
}

impl Pins {
    /// The pins under a bpffs that may or may not be mounted.
    pub(super) fn at(bpffs: &Path) -> Self {
        Self { bpffs: bpffs.to_owned() }
    }

    /// Mounts the bpffs if need be and makes the directories.
    ///
    /// # Errors
    /// No right to mount, or pins of another ABI.
    pub(super) fn prepare(&self) -> Result<()> {
        let mounted = !is_bpffs(&self.bpffs);
        if mounted {
            fs::create_dir_all(&self.bpffs)
                .with_context(|| format!("create {}", self.bpffs.display()))?;
            mount(Some("bpffs"), &self.bpffs, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
                .with_context(|| {
                    format!(
                        "mount a bpffs at {}: mount one there, or name another with --bpffs",
                        self.bpffs.display()
                    )
                })?;
            info!(path = %self.bpffs.display(), "mounted a bpffs: there was none");
        }
        self.refuse_other_versions()?;
        for directory in [self.maps(), self.links()] {
            fs::create_dir_all(&directory)
                .with_context(|| format!("create {}", directory.display()))?;
        }
        if mounted {
            let marker = self.root().join(MOUNTED_BY_US);
            fs::create_dir_all(&marker).with_context(|| format!("create {}", marker.display()))?;
        }
        Ok(())
    }

    fn refuse_other_versions(&self) -> Result<()> {
        let ours = format!("v{ABI}");
        for name in list(&self.root())? {
            if name.starts_with('v') && name != ours {
                bail!(
                    "{} holds the state of another version of netdp, whose layout differs from \
                     {ours}: run `netdp purge` of that version, or of this one, first",
                    self.root().join(name).display()
                );
            }
        }
        Ok(())
    }

    /// Keeps other agents off these pins, for as long as the file is open: one in another network
    /// namespace would take ours for its own.
    ///
    /// # Errors
    /// There is one already.
    pub(super) fn lock(&self) -> Result<File> {
        let root = self.root();
        let lock = File::open(&root).with_context(|| format!("open {}", root.display()))?;
        match lock.try_lock() {
            Ok(()) => Ok(lock),
            Err(TryLockError::WouldBlock) => bail!(
                "another netdp agent works with the pins in {}: stop it, or give this one a bpffs \
                 of its own with --bpffs",
                root.display()
            ),
            Err(TryLockError::Error(error)) => {
                Err(error).with_context(|| format!("lock {}", root.display()))
            }
        }
    }

    /// Whether anything of ours is there.
    pub(super) fn exist(&self) -> bool {
        self.root().exists()
    }

    fn root(&self) -> PathBuf {
        self.bpffs.join("netdp")
    }

    fn maps(&self) -> PathBuf {
        self.root().join(format!("v{ABI}/maps"))
    }

    fn links(&self) -> PathBuf {
        self.root().join(format!("v{ABI}/links"))
    }

    /// Pin of a map.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Pin of the link that holds a program on an interface.
    pub(super) fn link(&self, hook: Hook, ifindex: u32) -> PathBuf {
        self.links().join(format!("{}-{ifindex}", hook.program()))
    }

    /// Pin of the link that holds a socket hook on the cgroup hierarchy.
    pub(super) fn socket_link(&self, hook: &str) -> PathBuf {
        self.links().join(hook)
    }

    /// Notes that a qdisc of an interface was made by us.
    ///
    /// # Errors
    /// The bpffs takes no directory.
    pub(super) fn note_qdisc(&self, ifindex: u32) -> Result<()> {
        let note = self.qdisc(ifindex);
        fs::create_dir_all(&note).with_context(|| format!("create {}", note.display()))
    }

    /// Whether we made an interface's qdisc.
    pub(super) fn has_qdisc(&self, ifindex: u32) -> bool {
        self.qdisc(ifindex).exists()
    }

    /// Forgets that we made a qdisc: it has gone.
    ///
    /// # Errors
    /// The note can't be removed.
    pub(super) fn forget_qdisc(&self, ifindex: u32) -> Result<()> {
        let note = self.qdisc(ifindex);
        fs::remove_dir(&note).with_context(|| format!("remove {}", note.display()))
    }

    /// Forgets the qdiscs of all interfaces but these.
    ///
    /// # Errors
    /// A note can't be removed.
    pub(super) fn keep_qdiscs(&self, interfaces: &[u32]) -> Result<()> {
        for name in list(&self.links())? {
            let ifindex = name.strip_prefix(QDISC).and_then(|ifindex| ifindex.parse().ok());
            if let Some(ifindex) = ifindex
                && !interfaces.contains(&ifindex)
            {
                self.forget_qdisc(ifindex)?;
            }
        }
        Ok(())
    }

    fn qdisc(&self, ifindex: u32) -> PathBuf {
        self.links().join(format!("{QDISC}{ifindex}"))
    }

    /// Every attachment to an interface that is pinned.
    ///
    /// # Errors
    /// The directory can't be read.
    pub(super) fn attachments(&self) -> Result<Vec<(Hook, u32)>> {
        let parse = |name: &str| {
            let (program, ifindex) = name.rsplit_once('-')?;
            let hook = Hook::ALL.into_iter().find(|hook| hook.program() == program)?;
            Some((hook, ifindex.parse().ok()?))
        };
        Ok(list(&self.links())?.iter().filter_map(|name| parse(name)).collect())
    }

    /// Removes every pin of every version, and the bpffs if we mounted it. A link without a pin
    /// is no link: programs are detached.
    ///
    /// # Errors
    /// The first of the failures, after trying everything.
    pub(super) fn remove(&self) -> Result<()> {
        if !self.exist() {
            return Ok(());
        }
        let mounted_by_us = self.root().join(MOUNTED_BY_US).exists();
        fs::remove_dir_all(self.root())
            .with_context(|| format!("remove {}", self.root().display()))?;
        if mounted_by_us {
            umount2(&self.bpffs, MntFlags::empty())
                .with_context(|| format!("unmount {}", self.bpffs.display()))?;
        }
        Ok(())
    }
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

/// Names in a directory; none where there is no directory.
fn list(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("read {}", directory.display()))?,
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()
        .with_context(|| format!("read {}", directory.display()))
}
