//! Debian's kernels for virtual machines: which line comes from which suite, fetching one, and
//! finding the modules that it needs. A kernel that was fetched once is used without a network;
//! removing its directory fetches the newest of its line.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::apt::{self, Part, Suite};
use crate::process::{find_program, run_quiet};

/// The smallest flavour of Debian's kernels for this machine.
const FLAVOUR: &str = "-cloud-amd64";

/// A line of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Line {
    /// Debian 11, the oldest that netdp works on
    #[value(name = "5.10")]
    V5_10,
    /// Debian 12
    #[value(name = "6.1")]
    V6_1,
    /// Debian 13
    #[value(name = "6.12")]
    V6_12,
    /// Debian's unstable suite
    #[value(name = "7.2")]
    V7_2,
}

impl Line {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7_2 => "7.2",
        }
    }

    /// Where Debian has it. Debian gives `sid` a new line every few months, so this is where a line
    /// that is gone has to be replaced.
    fn places(self) -> &'static [(Part, &'static str)] {
        match self {
            Self::V5_10 => &[(Part::Main, "bullseye"), (Part::Security, "bullseye-security")],
            Self::V6_1 => &[(Part::Main, "bookworm"), (Part::Security, "bookworm-security")],
            Self::V6_12 => &[(Part::Main, "trixie"), (Part::Security, "trixie-security")],
            Self::V7_2 => &[(Part::Main, "sid")],
        }
    }
}

/// A kernel that is unpacked on this machine.
pub(crate) struct Kernel {
    /// As `uname -r` says it.
    pub(crate) release: String,
    pub(crate) image: PathBuf,
    /// What has `lib/modules`.
    root: PathBuf,
}

impl Kernel {
    /// The kernel of `line` below `cache`, fetched from Debian unless it is there.
    pub(crate) fn get(line: Line, cache: &Path) -> Result<Self> {
        let root = cache.join(line.name());
        if root.exists() {
            return Self::open(root);
        }
        ensure!(apt::is_available(), "no apt here to take Debian's kernel {} from", line.name());
        fs::create_dir_all(cache).with_context(|| format!("create {}", cache.display()))?;
        let scratch = tempfile::tempdir_in(cache).context("create a directory")?;
        let mut newest: Option<(String, Suite)> = None;
        let mut seen = Vec::new();
        for &(part, name) in line.places() {
            match newest_in(part, name, line, &scratch.path().join(name)) {
                Ok(found) => {
                    let is_newer = |best: &(String, Suite)| numbers(&found.0) > numbers(&best.0);
                    if newest.as_ref().is_none_or(is_newer) {
                        newest = Some(found);
                    }
                }
                Err(error) => seen.push(format!("{name}: {error:#}")),
            }
        }
        let Some((release, suite)) = newest else {
            bail!("no Debian suite gave a kernel {} ({})", line.name(), seen.join("; "))
        };
        let unfinished = scratch.path().join("root");
        fetch(&suite, &release, &unfinished)?;
        // Whoever interrupts it leaves no half of a kernel.
        fs::rename(&unfinished, &root).with_context(|| format!("create {}", root.display()))?;
        Self::open(root)
    }

    fn open(root: PathBuf) -> Result<Self> {
        let modules = root.join("lib/modules");
        let mut releases = fs::read_dir(&modules)
            .with_context(|| format!("list {}", modules.display()))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let release = releases.next().with_context(|| format!("find {}", modules.display()))?;
        let image = root.join("vmlinuz");
        Ok(Self { release, image, root })
    }

    fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    /// The files of the modules `names`, with all that they need and with what finds them by name,
    /// relative to the directory that has `lib/modules`. A name that is built in has no file.
    pub(crate) fn module_files(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let modules = self.modules();
        let index = modules.join("modules.dep");
        let text =
            fs::read_to_string(&index).with_context(|| format!("read {}", index.display()))?;
        let needed = closure(&text, names);
        let indices = ["modules.dep", "modules.dep.bin", "modules.alias", "modules.alias.bin"];
        let more = ["modules.builtin", "modules.builtin.bin", "modules.softdep"];
        let indices = indices.into_iter().chain(more).map(str::to_owned);
        let directory = Path::new("lib/modules").join(&self.release);
        let files = needed.into_iter().chain(indices).map(|file| directory.join(file));
        Ok(files.filter(|file| self.root.join(file).is_file()).collect())
    }

    /// Where `file` of [`Kernel::module_files`] lies.
    pub(crate) fn path(&self, file: &Path) -> PathBuf {
        self.root.join(file)
    }
}

/// What the names of packages with kernels begin with.
const IMAGE: &str = "linux-image-";

/// The newest kernel of `line` in a suite of Debian's, and the suite, with its lists in
/// `directory`: from the first of the machine's sources that has one.
fn newest_in<'a>(
    part: Part,
    name: &'a str,
    line: Line,
    directory: &Path,
) -> Result<(String, Suite<'a>)> {
    let mut seen = Vec::new();
    for archive in apt::archives(part)? {
        let found = Suite::open(&archive, name, directory).and_then(|suite| {
            let names = suite.names(&format!("{IMAGE}{}.", line.name()))?;
            let releases = names.iter().filter_map(|name| name.strip_prefix(IMAGE));
            let of_flavour = releases.filter(|release| release.ends_with(FLAVOUR));
            let newest = of_flavour.max_by_key(|release| numbers(release)).context("has none")?;
            Ok((newest.to_owned(), suite))
        });
        match found {
            Ok(found) => return Ok(found),
            Err(error) => seen.push(format!("{error:#}")),
        }
    }
    bail!("{}", if seen.is_empty() { "no apt source here".to_owned() } else { seen.join("; ") })
}

/// Unpacks the kernel `release` into `root`: `vmlinuz` and `lib/modules`.
fn fetch(suite: &Suite, release: &str, root: &Path) -> Result<()> {
    let unpacked = root.with_extension("unpacked");
    // Since Linux 7.1 Debian has image and modules in packages of their own.
    for package in [IMAGE, "linux-binary-", "linux-modules-"] {
        let package = format!("{package}{release}");
        let versions = suite.versions(&package)?;
        if let Some(version) = versions.first() {
            suite.unpack(&package, version, &unpacked)?;
        }
    }
    let found = |paths: &[String]| -> Result<PathBuf> {
        let mut paths = paths.iter().map(|path| unpacked.join(path));
        paths.find(|path| path.exists()).with_context(|| format!("find {release} unpacked"))
    };
    let modules = found(&[format!("usr/lib/modules/{release}"), format!("lib/modules/{release}")])?;
    let image =
        found(&[format!("boot/vmlinuz-{release}"), format!("usr/lib/modules/{release}/vmlinuz")])?;
    let target = root.join("lib/modules");
    fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
    fs::rename(&image, root.join("vmlinuz")).context("move the kernel's image")?;
    fs::rename(&modules, target.join(release)).context("move the kernel's modules")?;
    let depmod = find_program("depmod").context("find depmod: install kmod")?;
    run_quiet("index the modules", Command::new(depmod).arg("-b").arg(root).arg(release))?;
    Ok(())
}

/// The numbers in a release, which sort as releases do.
fn numbers(release: &str) -> Vec<u32> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// The files of the modules `names` and of all that they need, as `modules.dep` lists them.
fn closure(index: &str, names: &[&str]) -> BTreeSet<String> {
    let name = |path: &str| -> Option<String> {
        let file = path.rsplit('/').next()?;
        Some(file.split('.').next()?.replace('-', "_"))
    };
    let lines: BTreeMap<String, (&str, &str)> = index
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter_map(|(path, needs)| Some((name(path)?, (path, needs))))
        .collect();
    let mut files = BTreeSet::new();
    for (path, needs) in names.iter().filter_map(|name| lines.get(&name.replace('-', "_"))) {
        // depmod lists what is needed to the last.
        files.extend([*path].into_iter().chain(needs.split_whitespace()).map(str::to_owned));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_sort_by_their_numbers() {
        let mut releases = [
            "6.12.117+deb13-cloud-amd64",
            "6.12.90+deb12.1-cloud-amd64",
            "6.12.107+deb13-cloud-amd64",
        ];
        releases.sort_by_key(|release| numbers(release));
        assert_eq!(releases.last(), Some(&"6.12.117+deb13-cloud-amd64"));
        assert!(numbers("5.10.0-46-cloud-amd64") > numbers("5.10.0-9-cloud-amd64"));
    }

    #[test]
    fn modules_come_with_what_they_need() {
        let index = "\
kernel/net/bridge/bridge.ko.xz: kernel/net/802/stp.ko.xz kernel/net/llc/llc.ko.xz
kernel/net/802/stp.ko.xz: kernel/net/llc/llc.ko.xz
kernel/net/sched/cls_bpf.ko.xz:
kernel/net/sched/cls_u32.ko.xz:
";
        let found = closure(index, &["bridge", "cls-bpf", "built_in"]);
        let expected = [
            "kernel/net/802/stp.ko.xz",
            "kernel/net/bridge/bridge.ko.xz",
            "kernel/net/llc/llc.ko.xz",
            "kernel/net/sched/cls_bpf.ko.xz",
        ];
        assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
    }
}
