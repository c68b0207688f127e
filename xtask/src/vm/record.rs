//! What has passed on a kernel, kept in a file, so that a run that was broken off can be taken up.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Tests that passed, a line for each: suite and name.
pub(crate) struct Record {
    path: PathBuf,
    lines: BTreeSet<String>,
}

impl Record {
    /// Reads the record at `path`; there may be none yet.
    pub(crate) fn open(path: PathBuf) -> Self {
        let text = fs::read_to_string(&path).unwrap_or_default();
        Self { path, lines: text.lines().map(str::to_owned).collect() }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) -> Result<()> {
        self.lines.clear();
        fs::write(&self.path, "").with_context(|| format!("empty {}", self.path.display()))
    }

    /// Adds a test at once: whoever ends this program loses nothing.
    pub(crate) fn add(&mut self, suite: &str, test: &str) -> Result<()> {
        let line = format!("{suite} {test}");
        if self.lines.contains(&line) {
            return Ok(());
        }
        append(&self.path, &line).with_context(|| format!("write to {}", self.path.display()))?;
        self.lines.insert(line);
        Ok(())
    }

    /// The tests of `suite` in it.
    pub(crate) fn passed<'a>(&'a self, suite: &'a str) -> impl Iterator<Item = &'a str> {
        self.lines.iter().filter_map(move |line| {
            let (of, test) = line.split_once(' ')?;
            (of == suite).then_some(test)
        })
    }
}

fn append(path: &Path, line: &str) -> std::io::Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    writeln!(file, "{line}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passed_is_known_to_the_next_run() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("record");
        let mut record = Record::open(path.clone());
        record.add("load", "a").unwrap();
        record.add("load", "a").unwrap();
        record.add("lab", "b").unwrap();
        let mut record = Record::open(path.clone());
        assert_eq!(record.passed("load").collect::<Vec<_>>(), ["a"]);
        record.clear().unwrap();
        assert_eq!(Record::open(path).passed("load").count(), 0);
    }
}
