//! Which promises which kernels can't keep, and which kernel this is. Knows nothing of how promises
//! are tested.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::net::{FAMILIES, Family};

/// A version, as `uname -r` begins: 6.12 is `(6, 12)`.
pub type Version = (u32, u32);

/// A promise of the behaviour catalogue that older kernels can't keep.
#[derive(Clone, Copy, Debug)]
pub struct Exception {
    /// Its id in the catalogue.
    pub id: &'static str,
    /// In which families.
    pub families: &'static [Family],
    /// The first kernel that can.
    pub since: Version,
    /// What the older ones lack, and what happens instead.
    pub reason: &'static str,
}

/// Every exception there is. A row that is listed and passes fails the suite, as does one that is
/// not and fails.
pub const EXCEPTIONS: &[Exception] = &[Exception {
    id: "PUB-11",
    families: FAMILIES,
    since: (5, 18),
    reason: "published ports are kept by sockets, so on an address that has all of its ports \
             published no program of the host finds one to dial from",
}];

impl Exception {
    /// The one for a promise on a kernel.
    #[must_use]
    pub fn find(id: &str, family: Family, kernel: Version) -> Option<&'static Self> {
        EXCEPTIONS.iter().find(|exception| {
            exception.id == id && exception.families.contains(&family) && kernel < exception.since
        })
    }
}

/// The version of the kernel that runs this.
///
/// # Errors
/// When the kernel names none.
pub fn running() -> Result<Version> {
    let path = "/proc/sys/kernel/osrelease";
    let release = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("read the version in {release:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::page::expect_part;

    /// Those that `cargo xtask vm` runs suites on.
    const KERNELS: [Version; 4] = [(5, 10), (6, 1), (6, 12), (7, 2)];

    /// The part of docs/kernels.md that follows from the table.
    fn table() -> String {
        let names = KERNELS.map(|(major, minor)| format!("{major}.{minor}")).join(" | ");
        let mut text = format!("| row | family | {names} | why not |\n");
        text.push_str(&format!("|{}\n", "---|".repeat(3 + KERNELS.len())));
        for Exception { id, families, since, reason } in EXCEPTIONS {
            let marks = KERNELS.map(|kernel| if kernel >= *since { "✅" } else { "❌" });
            let families: Vec<_> = families.iter().map(|family| family.name()).collect();
            let (families, marks) = (families.join(", "), marks.join(" | "));
            writeln!(text, "| {id} | {families} | {marks} | {reason} |").unwrap();
        }
        text
    }

    #[test]
    fn the_page_of_kernels_says_what_they_cannot_keep() {
        expect_part("kernels.md", "exceptions", &table());
    }

    #[test]
    fn exceptions_are_for_kernels_that_are_tried_and_only_for_those_before() {
        for exception in EXCEPTIONS {
            assert!(KERNELS.iter().any(|kernel| *kernel < exception.since), "{exception:?}");
            for &family in exception.families {
                assert!(Exception::find(exception.id, family, exception.since).is_none());
            }
        }
        assert!(
            FAMILIES.iter().all(|&family| Exception::find("XYZ-01", family, (5, 10)).is_none())
        );
    }
}
