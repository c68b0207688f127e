//! Which promises which kernels can't keep, and which kernel this is. Knows nothing of how promises
//! are tested.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::net::Family;

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
pub const EXCEPTIONS: &[Exception] = &[];

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
