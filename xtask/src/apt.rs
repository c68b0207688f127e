//! Debian's package tools: installing packages, and fetching one package from a suite that
//! the machine itself does not use, without touching its configuration. Knows no package.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::process::{as_root, ensure_root, find_program, run_quiet, try_quiet};

/// Debian's keys: whatever mirror serves the files, only Debian's signature counts.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// For one download; far above what a slow line needs.
const PATIENCE: Duration = Duration::from_secs(600);

/// Whether this is a distribution with apt.
pub(crate) fn is_available() -> bool {
    find_program("apt-get").is_some() && find_program("dpkg-deb").is_some()
}

/// Installs `packages` as root, updating the package lists if they are missing or too old.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let title = format!("install {}", packages.join(" "));
    ensure_root(&title)?;
    let mut install = apt_get_as_root()?;
    install.args(["install", "--yes", "--no-install-recommends"]).args(packages);
    // A fresh machine has no package lists yet, and old lists name files that are gone.
    if try_quiet(&title, &mut install, PATIENCE).is_err() {
        run_quiet("update the package lists", apt_get_as_root()?.arg("update"))?;
        run_quiet(&title, &mut install)?;
    }
    Ok(())
}

fn apt_get_as_root() -> Result<Command> {
    as_root(Path::new("apt-get"), &[("DEBIAN_FRONTEND", OsStr::new("noninteractive"))])
}

/// One of Debian's archives as this machine reaches it: a URI of its own apt sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Archive {
    uri: String,
}

/// Which of Debian's archives; each has suites of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Releases.
    Main,
    /// What became of their packages since, where it could not wait: `bookworm-security`.
    Security,
}

/// Debian's archives of one part among the machine's apt sources, in their order.
pub(crate) fn archives(part: Part) -> Result<Vec<Archive>> {
    let codename = codename(&read(Path::new("/etc/os-release"))?);
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    let mut archives = Vec::new();
    for file in files.iter().filter(|file| file.is_file()) {
        let text = read(file)?;
        let entries = match file.extension().and_then(OsStr::to_str) {
            Some("list") => text.lines().filter_map(one_line_entry).collect(),
            Some("sources") => deb822_entries(&text),
            _ => Vec::new(),
        };
        for entry in entries.iter().filter(|entry| entry.is_debian(part, &codename)) {
            let found = entry.uris.iter().map(|uri| Archive { uri: uri.clone() });
            archives.extend(found);
        }
    }
    archives.dedup();
    Ok(archives)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn codename(os_release: &str) -> String {
    let value = os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    value.unwrap_or_default().trim_matches('"').to_owned()
}

/// What this program reads of one apt source.
#[derive(Debug, Default, PartialEq, Eq)]
struct Entry {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

impl Entry {
    /// Debian's own: its suite, its main component, and no other signer's key. A wrong guess
    /// costs a failed download and nothing else, for the signature is checked.
    fn is_debian(&self, part: Part, codename: &str) -> bool {
        let of_debian = [codename, "stable", "testing", "unstable", "sid"];
        let is_of_part = |suite: &String| {
            let release = match part {
                Part::Main => Some(suite.as_str()),
                Part::Security => suite.strip_suffix("-security"),
            };
            release.is_some_and(|release| !release.is_empty() && of_debian.contains(&release))
        };
        self.suites.iter().any(is_of_part)
            && self.components.iter().any(|component| component == "main")
            && self.signed_by.as_ref().is_none_or(|key| key.contains("debian-archive"))
    }
}

/// Reads `deb [option=value …] uri suite component…`.
fn one_line_entry(line: &str) -> Option<Entry> {
    let mut rest = line.split('#').next()?.trim().strip_prefix("deb ")?.trim_start();
    let mut signed_by = None;
    if let Some(bracketed) = rest.strip_prefix('[') {
        let (options, after) = bracketed.split_once(']')?;
        let key = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
        signed_by = key.map(str::to_owned);
        rest = after;
    }
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Entry {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by,
    })
}

/// Reads stanzas of `Field: value`, where a line that begins with a blank continues a value.
fn deb822_entries(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let without_comments: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for stanza in without_comments.split(|line| line.trim().is_empty()) {
        let field = |name: &str| -> Option<String> {
            let is_field = |line: &&str| {
                line.split_once(':').is_some_and(|(found, _)| found.eq_ignore_ascii_case(name))
            };
            let at = stanza.iter().position(is_field)?;
            let mut value = stanza[at].split_once(':')?.1.to_owned();
            for line in stanza[at + 1..].iter().take_while(|line| line.starts_with([' ', '\t'])) {
                value.push_str(line);
            }
            Some(value.trim().to_owned())
        };
        let words = |name: &str| -> Vec<String> {
            field(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        let disabled = field("Enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"));
        if !disabled && words("Types").iter().any(|kind| kind == "deb") {
            entries.push(Entry {
                uris: words("URIs"),
                suites: words("Suites"),
                components: words("Components"),
                signed_by: field("Signed-By"),
            });
        }
    }
    entries
}

/// One suite of an archive with lists of its own, below `directory`: neither its lists nor
/// its downloads meet the machine's, and no root is needed.
pub(crate) struct Suite<'a> {
    name: &'a str,
    directory: PathBuf,
}

impl<'a> Suite<'a> {
    /// Fetches the package lists of `name` from `archive`. Errors when the archive has no
    /// such suite, does not answer, or Debian has not signed what it answers.
    pub(crate) fn open(archive: &Archive, name: &'a str, directory: &Path) -> Result<Self> {
        ensure!(
            Path::new(KEYRING).exists(),
            "{KEYRING} is missing: install debian-archive-keyring"
        );
        for needed in ["lists/partial", "cache/archives/partial"] {
            let path = directory.join(needed);
            fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let source = format!("deb [signed-by={KEYRING}] {} {name} main\n", archive.uri);
        fs::write(directory.join("sources.list"), source).context("write a sources list")?;
        let suite = Self { name, directory: directory.to_owned() };
        let title = format!("fetch Debian's package list of {name}");
        try_quiet(&title, suite.tool("apt-get").arg("update"), PATIENCE)?;
        Ok(suite)
    }

    /// The versions of `package` that the suite has.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        let title = format!("look for {package} in {}", self.name);
        let listed =
            try_quiet(&title, self.tool("apt-cache").args(["madison", package]), PATIENCE)?;
        let version = |line: &str| Some(line.split('|').nth(1)?.trim().to_owned());
        Ok(listed.lines().filter_map(version).collect())
    }

    /// The names of the packages that begin with `prefix`.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let title = format!("look for {prefix}… in {}", self.name);
        let listed =
            try_quiet(&title, self.tool("apt-cache").args(["pkgnames", prefix]), PATIENCE)?;
        Ok(listed.lines().map(str::to_owned).collect())
    }

    /// Downloads `version` of `package` and unpacks it, without installing, into `target`.
    pub(crate) fn unpack(&self, package: &str, version: &str, target: &Path) -> Result<()> {
        let wanted = format!("{package}={version}");
        let downloads = self.directory.join("download").join(package);
        fs::create_dir_all(&downloads).context("create a directory for downloads")?;
        let mut download = self.tool("apt-get");
        download.args(["download", &wanted]).current_dir(&downloads);
        try_quiet(&format!("download {wanted}"), &mut download, PATIENCE)?;
        let archive = fs::read_dir(&downloads)
            .context("list downloads")?
            .find_map(|entry| Some(entry.ok()?.path()))
            .with_context(|| format!("find {wanted} among the downloads"))?;
        let mut unpack = Command::new("dpkg-deb");
        try_quiet(
            &format!("unpack {wanted}"),
            unpack.arg("-x").args([&archive, target]),
            PATIENCE,
        )?;
        Ok(())
    }

    /// Downloads `packages` with all that they need and unpacks them, without installing, into
    /// `target`: none counts as installed, so that nothing of the machine's is needed beside them.
    pub(crate) fn unpack_whole(&self, packages: &[&str], target: &Path) -> Result<()> {
        let status = self.directory.join("status");
        fs::write(&status, "").context("write an empty list of what is installed")?;
        let title = format!("download {} and what they need", packages.join(", "));
        let mut download = self.tool("apt-get");
        download
            .args(["-o", &format!("Dir::State::status={}", status.display())])
            .args(["--yes", "--no-install-recommends", "--download-only", "install"])
            .args(packages);
        try_quiet(&title, &mut download, PATIENCE)?;
        let archives = self.directory.join("cache/archives");
        for entry in fs::read_dir(&archives).context("list downloads")? {
            let archive = entry.context("list downloads")?.path();
            if archive.extension().and_then(OsStr::to_str) == Some("deb") {
                let title = format!("unpack {}", archive.display());
                let mut unpack = Command::new("dpkg-deb");
                try_quiet(&title, unpack.arg("-x").args([&archive, target]), PATIENCE)?;
            }
        }
        Ok(())
    }

    fn tool(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let place = |option: &str, path: &str| {
            format!("Dir::{option}={}", self.directory.join(path).display())
        };
        let options = [
            place("Etc::sourcelist", "sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            place("State::lists", "lists"),
            place("Cache", "cache"),
            // One exact version is wanted, so a list past its date is as good as a fresh one.
            "Acquire::Check-Valid-Until=false".to_owned(),
            // A machine's own pins speak of its own suites.
            "Dir::Etc::preferences=-".to_owned(),
            "Dir::Etc::preferencesparts=-".to_owned(),
        ];
        command.env("LC_ALL", "C");
        for option in options {
            command.args(["-o", &option]);
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uri: &str, suites: &[&str], components: &[&str], signed_by: Option<&str>) -> Entry {
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Entry {
            uris: vec![uri.to_owned()],
            suites: owned(suites),
            components: owned(components),
            signed_by: signed_by.map(str::to_owned),
        }
    }

    #[test]
    fn one_line_entry_is_read_with_and_without_options() {
        assert_eq!(
            one_line_entry("deb http://mirror.example/debian bookworm main contrib # ours"),
            Some(entry("http://mirror.example/debian", &["bookworm"], &["main", "contrib"], None))
        );
        assert_eq!(
            one_line_entry("deb [arch=amd64 signed-by=/k.gpg] https://x.example/d bookworm stable"),
            Some(entry("https://x.example/d", &["bookworm"], &["stable"], Some("/k.gpg")))
        );
        assert_eq!(one_line_entry("deb-src http://mirror.example/debian bookworm main"), None);
        assert_eq!(one_line_entry("# deb http://mirror.example/debian bookworm main"), None);
    }

    #[test]
    fn deb822_stanzas_are_read_without_disabled_ones() {
        let text = "\
Types: deb deb-src
# a comment
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Enabled: no
";
        let key = Some("/usr/share/keyrings/debian-archive-keyring.gpg");
        let uri = "http://mirror.example/debian";
        let expected = entry(uri, &["bookworm", "bookworm-updates"], &["main"], key);
        assert_eq!(deb822_entries(text), [expected]);
    }

    #[test]
    fn only_debians_own_archive_counts() {
        let debian = |entry: Entry| entry.is_debian(Part::Main, "bookworm");
        assert!(debian(entry("http://mirror.example/debian", &["bookworm"], &["main"], None)));
        assert!(!debian(entry("http://x.example/sec", &["bookworm-security"], &["main"], None)));
        assert!(!debian(entry("http://x.example/d", &["bookworm"], &["stable"], None)));
        assert!(!debian(entry("http://x.example/d", &["bookworm"], &["main"], Some("/x.gpg"))));
    }

    #[test]
    fn security_suites_are_told_from_releases() {
        let both = entry("http://x.example/d", &["bookworm", "bookworm-security"], &["main"], None);
        assert!(both.is_debian(Part::Main, "bookworm"));
        assert!(both.is_debian(Part::Security, "bookworm"));
        let security = entry("http://x.example/s", &["stable-security"], &["main"], None);
        assert!(!security.is_debian(Part::Main, "bookworm"));
        assert!(security.is_debian(Part::Security, "bookworm"));
        let other = entry("http://x.example/o", &["bookworm-updates"], &["main"], None);
        assert!(!other.is_debian(Part::Security, "bookworm"));
    }

    #[test]
    fn codename_is_read_from_os_release() {
        assert_eq!(codename("ID=debian\nVERSION_CODENAME=bookworm\n"), "bookworm");
        assert_eq!(codename("ID=debian\n"), "");
    }
}
