//! Files under `/proc/sys`, and what the values of some of them mean.
//!
//! Owns reading and writing. Paths are relative to `/proc/sys` with slashes, because interface
//! names may contain dots. Files under `net` belong to the network namespace of the calling thread.

use std::{fs, io, path::Path};

use anyhow::{Context, Result};

/// Reads a value without the line end; `None` where the kernel has no such file (the interface is
/// gone, or the kernel was built without it).
///
/// # Errors
/// Fails where the file is there and can't be read.
pub fn read(path: &str) -> Result<Option<String>> {
    match fs::read_to_string(Path::new("/proc/sys").join(path)) {
        Ok(value) => Ok(Some(value.trim_end().to_owned())),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read sysctl {path}")),
    }
}

/// Writes a value; nothing happens where the kernel has no such file.
///
/// # Errors
/// Names the sysctl; a read-only `/proc/sys` is the usual reason.
pub fn write(path: &str, value: &str) -> Result<()> {
    // A list can be emptied by a lone line end only: the kernel ignores a write of no bytes.
    match fs::write(Path::new("/proc/sys").join(path), format!("{value}\n")) {
        Err(error) if is_absent(&error) => Ok(()),
        result => result.with_context(|| format!("set sysctl {path} to \"{value}\"")),
    }
}

/// Writes a value unless it is there already.
///
/// # Errors
/// As [`read`] and [`write`].
pub fn ensure(path: &str, value: &str) -> Result<()> {
    match read(path)? {
        Some(present) if present != value => write(path, value),
        _ => Ok(()),
    }
}

/// The kernel's default, where `ip_local_port_range` can't be read.
const EPHEMERAL_PORTS: (u16, u16) = (32_768, 60_999);

/// `ip_local_port_range`, inclusive.
///
/// # Errors
/// As [`read`].
pub(super) fn ephemeral_ports() -> Result<(u16, u16)> {
    let range = read("net/ipv4/ip_local_port_range")?;
    let ports = range.as_deref().and_then(|range| {
        let (first, last) = range.split_once(char::is_whitespace)?;
        Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
    });
    Ok(ports.unwrap_or(EPHEMERAL_PORTS))
}

/// Adds a range, both ends included, to a list of ports as `ip_local_reserved_ports` has it
/// ("80,1000-1010"). Neighbours are merged as the kernel does when the list is read back.
pub fn with_ports(list: &str, first: u16, last: u16) -> String {
    let merged = merged(ranges(list).chain([(first, last)]));
    let items: Vec<String> = merged
        .into_iter()
        .map(
            |(first, last)| {
                if first == last { first.to_string() } else { format!("{first}-{last}") }
            },
        )
        .collect();
    items.join(",")
}

/// Whether such a list has all ports of a range, both ends included.
pub fn has_ports(list: &str, first: u16, last: u16) -> bool {
    merged(ranges(list)).iter().any(|range| range.0 <= first && last <= range.1)
}

/// The ranges of such a list.
fn ranges(list: &str) -> impl Iterator<Item = (u16, u16)> {
    list.split(',').filter_map(|item| {
        let (first, last) = item.trim().split_once('-').unwrap_or((item.trim(), item.trim()));
        Some((first.parse().ok()?, last.parse().ok()?))
    })
}

/// In order, those that meet as one.
fn merged(ranges: impl Iterator<Item = (u16, u16)>) -> Vec<(u16, u16)> {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// No such file, by the time it was opened.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

#[cfg(test)]
mod tests {
    use super::{has_ports, with_ports};

    #[test]
    fn a_port_list_keeps_what_was_reserved_before() {
        assert_eq!(with_ports("", 50_000, 60_999), "50000-60999");
        assert_eq!(with_ports("80,1000-1010", 50_000, 60_999), "80,1000-1010,50000-60999");
        assert_eq!(with_ports("49999,60000-61000", 50_000, 60_999), "49999-61000");
        assert_eq!(with_ports("65535", 1, 2), "1-2,65535");
    }

    #[test]
    fn a_port_list_has_what_its_ranges_have_together() {
        for list in
            ["50000-60999", "7,49999-61000", "55000-60999,50000-54999", "5-50000,50001-65535"]
        {
            assert!(has_ports(list, 50_000, 60_999), "{list}");
        }
        for list in ["", "50000,60999", "50000-54999,55001-60999", "50001-65535"] {
            assert!(!has_ports(list, 50_000, 60_999), "{list}");
        }
    }

    #[test]
    fn adding_a_range_twice_changes_nothing() {
        let once = with_ports("7,55000", 50_000, 60_999);
        assert_eq!(with_ports(&once, 50_000, 60_999), once);
    }
}
