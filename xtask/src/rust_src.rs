//! The source of `core`, which no compiler ships for the BPF target: finding it and getting
//! it into the toolchain. Knows nothing of what else setting up means.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::apt::{self, Archive, Suite};
use crate::process::{find_program, run_quiet, try_quiet};

/// Long enough for a slow line to fetch 4 MB, short enough to wait for in vain.
const RUSTUP_PATIENCE: Duration = Duration::from_secs(60);
/// Debian's suites that may carry a current compiler's source, likeliest and smallest first.
const SUITES: [&str; 5] =
    ["stable-backports", "oldstable-backports", "testing", "unstable", "stable"];
/// The package, in Debian and as a rustup component.
const PACKAGE: &str = "rust-src";

/// Beside a library that this program put there: the release it is of. rustup leaves what is
/// not its own in place when it updates the compiler.
const MARKER: &str = "library.release";

/// Makes sure that the compiler has the source of its own `core`, and says how.
pub(crate) fn ensure() -> Result<()> {
    let sysroot = PathBuf::from(rustc(&["--print", "sysroot"])?.trim());
    let release = release(&rustc(&["-vV"])?)?;
    let library = sysroot.join("lib/rustlib/src/rust/library");
    remove_outdated(&library, &release)?;
    if is_complete(&library) {
        println!("{PACKAGE}: there");
        return Ok(());
    }
    println!("{PACKAGE}: missing; BPF programs need core built from source, asking rustup");
    let Err(error) = add_with_rustup(&library) else {
        println!("{PACKAGE}: added by rustup");
        return Ok(());
    };
    println!("{PACKAGE}: {error:#}; asking Debian for the source of {release}");
    add_from_debian(&library, &release).with_context(|| {
        format!(
            "{PACKAGE} of rustc {release} is missing: run `rustup component add {PACKAGE}` where \
             rustup can reach its server"
        )
    })
}

fn rustc(arguments: &[&str]) -> Result<String> {
    run_quiet("ask rustc about itself", Command::new("rustc").args(arguments))
}

/// The version without what distributions append to it.
fn release(verbose_version: &str) -> Result<String> {
    let line = verbose_version.lines().find_map(|line| line.strip_prefix("release: "));
    line.map(str::to_owned).context("find the release in `rustc -vV`")
}

/// Building `core` also reads the lock file of the standard library's own workspace.
fn is_complete(library: &Path) -> bool {
    library.join("core/src/lib.rs").is_file() && library.join("Cargo.lock").is_file()
}

/// Removes a library of this program's own that is of another release than the compiler.
fn remove_outdated(library: &Path, release: &str) -> Result<()> {
    let marker = library.with_file_name(MARKER);
    match fs::read_to_string(&marker) {
        Ok(marked) if marked != release => {
            remove_directory(library)?;
            fs::remove_file(&marker).with_context(|| format!("remove {}", marker.display()))
        }
        _ => Ok(()),
    }
}

fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn add_with_rustup(library: &Path) -> Result<()> {
    ensure!(find_program("rustup").is_some(), "rustup is not installed");
    let mut add = Command::new("rustup");
    add.args(["component", "add", PACKAGE]);
    try_quiet("rustup component add rust-src", &mut add, RUSTUP_PATIENCE)?;
    ensure!(is_complete(library), "rustup says it is there, but not in {}", library.display());
    Ok(())
}

fn add_from_debian(library: &Path, release: &str) -> Result<()> {
    ensure!(apt::is_available(), "no apt here to take Debian's {PACKAGE} from");
    let archives = apt::archives(apt::Part::Main)?;
    ensure!(!archives.is_empty(), "none of the machine's apt sources is Debian's archive");
    let mut seen = Vec::new();
    for archive in &archives {
        for suite in SUITES {
            match add_from_suite(archive, suite, library, release) {
                Ok(version) => {
                    println!("{PACKAGE}: unpacked {version} of {suite} into the toolchain");
                    return Ok(());
                }
                Err(error) => seen.push(format!("{suite}: {error:#}")),
            }
        }
    }
    bail!("no Debian suite has {PACKAGE} {release} ({})", seen.join("; "))
}

/// Returns the version of the package that was unpacked.
fn add_from_suite(archive: &Archive, suite: &str, library: &Path, release: &str) -> Result<String> {
    let scratch = tempfile::tempdir().context("create a temporary directory")?;
    let suite = Suite::open(archive, suite, scratch.path())?;
    let versions = suite.versions(PACKAGE)?;
    let Some(version) = versions.iter().find(|version| is_version_of(version, release)) else {
        bail!("has {}", if versions.is_empty() { "none".to_owned() } else { versions.join(", ") });
    };
    let unpacked = scratch.path().join("unpacked");
    suite.unpack(PACKAGE, version, &unpacked)?;
    let source = unpacked.join(format!("usr/src/rustc-{release}/library"));
    ensure!(is_complete(&source), "{PACKAGE} {version} has no library/core");
    install(&source, library, release)?;
    Ok(version.clone())
}

/// Whether the Debian `version` packages the upstream `release`: 1.95.0+dfsg1-2 is of 1.95.0.
fn is_version_of(version: &str, release: &str) -> bool {
    version.strip_prefix(release).is_some_and(|rest| rest.starts_with(['+', '-', '~']))
}

/// Copies beside the target first: whoever interrupts it leaves no half of a library.
fn install(source: &Path, library: &Path, release: &str) -> Result<()> {
    let parent = library.parent().context("find the toolchain's source directory")?;
    let staging = library.with_file_name("library.partial");
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    remove_directory(&staging)?;
    remove_directory(library)?;
    let title = format!("copy core's source to {}", parent.display());
    run_quiet(&title, Command::new("cp").arg("-a").args([source, &staging]))?;
    let marker = library.with_file_name(MARKER);
    fs::write(&marker, release).with_context(|| format!("write {}", marker.display()))?;
    fs::rename(&staging, library).with_context(|| format!("create {}", library.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_is_read_from_rustc() {
        let told = "rustc 1.95.0 (abc 2026-04-14)\nbinary: rustc\nrelease: 1.95.0\n";
        assert_eq!(release(told).unwrap(), "1.95.0");
    }

    #[test]
    fn debian_version_matches_its_release_only() {
        assert!(is_version_of("1.95.0+dfsg1-2~bpo13+1", "1.95.0"));
        assert!(is_version_of("1.95.0-1", "1.95.0"));
        assert!(!is_version_of("1.95.01-1", "1.95.0"));
        assert!(!is_version_of("1.96.1+dfsg1-2~bpo13+1", "1.95.0"));
    }

    #[test]
    fn library_is_replaced_when_half_copied_and_removed_when_outdated() {
        let scratch = tempfile::tempdir().unwrap();
        let (source, library) = (scratch.path().join("new"), scratch.path().join("to/library"));
        for (file, text) in [(source.join("Cargo.lock"), "new"), (library.join("old"), "old")] {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        install(&source, &library, "1.95.0").unwrap();
        assert_eq!(fs::read_to_string(library.join("Cargo.lock")).unwrap(), "new");
        assert!(!library.join("old").exists());

        remove_outdated(&library, "1.95.0").unwrap();
        assert!(library.exists());
        remove_outdated(&library, "1.96.0").unwrap();
        assert!(!library.exists());
    }

    #[test]
    fn library_that_is_not_ours_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let library = scratch.path().join("library");
        fs::create_dir(&library).unwrap();
        remove_outdated(&library, "1.96.0").unwrap();
        assert!(library.exists());
    }
}
