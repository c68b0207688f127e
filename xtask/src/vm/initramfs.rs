//! The file system that a virtual machine starts with: a cpio archive, written here, with programs,
//! the libraries that they need and whatever else is put in. Knows nothing of what is run.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::run_quiet;

/// Kinds of files and their modes, as the archive has them (inode(7)).
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// Debian's libraries and programs lie below `/usr`, and these lead there.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// An archive in the format that kernels unpack (`newc`, early-userspace/buffer-format.rst). Not
/// compressed: under emulation, unpacking would cost more than reading.
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    /// What is in, to be put in once.
    paths: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// One with the directories of a Debian system.
    pub(crate) fn new() -> Self {
        let mut archive = Self { bytes: Vec::new(), paths: BTreeSet::new() };
        for name in MERGED {
            archive.entry(Path::new("usr").join(name), DIRECTORY, &[]);
            archive.entry(PathBuf::from(name), LINK, format!("usr/{name}").as_bytes());
        }
        for name in ["dev", "proc", "run", "sys", "tmp", "etc"] {
            archive.entry(PathBuf::from(name), DIRECTORY, &[]);
        }
        archive
    }

    /// Puts `contents` in at `path`, as a file that may be run.
    pub(crate) fn add(&mut self, path: impl AsRef<Path>, contents: &[u8]) {
        self.entry(inside(path.as_ref()), PROGRAM, contents);
    }

    /// Puts the file `source` in at `path`.
    pub(crate) fn add_file(&mut self, path: impl AsRef<Path>, source: &Path) -> Result<()> {
        if !self.paths.contains(&inside(path.as_ref())) {
            let contents =
                fs::read(source).with_context(|| format!("read {}", source.display()))?;
            self.add(path, &contents);
        }
        Ok(())
    }

    /// Puts the program `source` in at `path`, and the libraries that it needs where it looks for
    /// them.
    pub(crate) fn add_program(&mut self, path: impl AsRef<Path>, source: &Path) -> Result<()> {
        self.add_file(path, source)?;
        let title = format!("ask for the libraries of {}", source.display());
        // A static program has none and makes ldd fail.
        let mut ldd = Command::new("ldd");
        let listed = crate::process::try_quiet(&title, ldd.arg(source), super::PATIENCE);
        for library in libraries(&listed.unwrap_or_default()) {
            self.add_file(library, Path::new(library))?;
        }
        Ok(())
    }

    /// As [`Initramfs::add_program`], without what only debuggers read: most of a Rust program.
    pub(crate) fn add_stripped(
        &mut self,
        path: impl AsRef<Path>,
        source: &Path,
        scratch: &Path,
    ) -> Result<()> {
        let name = source.file_name().context("name a program")?;
        let stripped = scratch.join(name);
        let mut strip = Command::new("strip");
        strip.arg("-o").args([&stripped, source]);
        run_quiet(&format!("strip {}", source.display()), &mut strip)?;
        self.add_program(path, &stripped)
    }

    /// Writes the archive to `file`.
    pub(crate) fn write(mut self, file: &Path) -> Result<()> {
        self.entry(PathBuf::from("TRAILER!!!"), 0, &[]);
        fs::write(file, &self.bytes).with_context(|| format!("write {}", file.display()))
    }

    fn entry(&mut self, path: PathBuf, mode: u32, contents: &[u8]) {
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
            let parent = parent.to_owned();
            if !self.paths.contains(&parent) {
                self.entry(parent, DIRECTORY, &[]);
            }
        }
        let name = path.as_os_str().as_encoded_bytes();
        let (inode, links) = (self.paths.len() + 1, 1);
        // Magic, inode, mode, uid, gid, links, time, size, device ×2, special device ×2, length of
        // the name with its closing zero, checksum.
        let numbers = [inode, mode as usize, 0, 0, links, 0, contents.len(), 0, 0, 0, 0];
        let mut header = "070701".to_owned();
        for number in numbers.into_iter().chain([name.len() + 1, 0]) {
            header.push_str(&format!("{number:08X}"));
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
        self.paths.insert(path);
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Where the archive has what is found at `path`: no leading slash, nothing behind a link.
fn inside(path: &Path) -> PathBuf {
    let names: Vec<_> =
        path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let merged = names.first().is_some_and(|first| {
        MERGED.iter().any(|name| first.as_os_str() == *name) && names.len() > 1
    });
    let start = if merged { PathBuf::from("usr") } else { PathBuf::new() };
    start.join(names.into_iter().collect::<PathBuf>())
}

/// The paths in what ldd says: `libc.so.6 => /lib/…/libc.so.6 (0x…)`, `/lib64/ld-… (0x…)`.
fn libraries(listed: &str) -> impl Iterator<Item = &str> {
    listed.lines().filter_map(|line| {
        let path = line.split_once("=>").map_or(line, |(_, path)| path).trim();
        path.split_whitespace().next().filter(|path| path.starts_with('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let listed = "\tlinux-vdso.so.1 (0x00)\n\tlibc.so.6 => /lib/x/libc.so.6 (0x0a)\n\
                      \tlibgone.so => not found\n\t/lib64/ld-linux.so.2 (0x0b)\n";
        let found: Vec<_> = libraries(listed).collect();
        assert_eq!(found, ["/lib/x/libc.so.6", "/lib64/ld-linux.so.2"]);
    }

    #[test]
    fn nothing_lies_behind_a_link() {
        assert_eq!(inside(Path::new("/lib64/ld.so")), Path::new("usr/lib64/ld.so"));
        assert_eq!(inside(Path::new("/usr/sbin/ip")), Path::new("usr/sbin/ip"));
        assert_eq!(inside(Path::new("/init")), Path::new("init"));
    }

    #[test]
    fn directories_come_before_what_they_hold_and_files_once() {
        let mut archive = Initramfs { bytes: Vec::new(), paths: BTreeSet::new() };
        archive.add("/a/b", b"text");
        let length = archive.bytes.len();
        archive.add_file("/a/b", Path::new("/nowhere")).unwrap();
        assert_eq!(archive.bytes.len(), length);
        let text = String::from_utf8(archive.bytes).unwrap();
        let (directory, file) = (text.find("a\0").unwrap(), text.find("a/b\0").unwrap());
        assert!(directory < file);
        assert!(text.starts_with("0707010000000100004"));
        assert_eq!(text.len() % 4, 0);
    }
}
