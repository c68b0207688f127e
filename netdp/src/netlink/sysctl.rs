//! Files under `/proc/sys`, and what the values of some of them mean.
//!
//! Owns reading and writing. Paths are relative to `/proc/sys` with slashes, because interface
//! names may contain dots. Files under `net` belong to the network namespace of the calling thread.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use anyhow::{Context, Result};

use crate::{facts::PortRanges, plan::RESERVED_PORTS_SYSCTL};

/// Reads a value without the line end; `None` where the kernel has no such file (the interface is
/// gone, or the kernel was built without it).
///
/// # Errors
/// Fails where the file is there and can't be read.
pub fn read(path: &str) -> Result<Option<String>> {
    match read_whole(&Path::new("/proc/sys").join(path)) {
        Ok(value) => Ok(Some(value.trim_end().to_owned())),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read sysctl {path}")),
    }
}

/// Reads a file by one read(2). Of a list of ports the kernel has no more to say at the next
/// (`proc_do_large_bitmap`), so of one that is longer than the buffer the rest would be lost.
fn read_whole(path: &Path) -> io::Result<String> {
    let mut value = vec![0; 4096];
    loop {
        let length = File::open(path)?.read(&mut value)?;
        if length < value.len() {
            value.truncate(length);
            return String::from_utf8(value)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error));
        }
        value.resize(2 * length, 0);
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

/// `ip_local_reserved_ports`; `None` as for [`read`].
///
/// # Errors
/// As there.
pub fn reserved_ports() -> Result<Option<PortRanges>> {
    Ok(read(RESERVED_PORTS_SYSCTL)?.map(|list| PortRanges::parse(&list)))
}

/// No such file, by the time it was opened.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}
