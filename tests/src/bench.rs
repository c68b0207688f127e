//! What benchmarks have in common: their command line, and the CPUs that they run on.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::Pid;

use crate::backend::Backend;

/// The command line of a benchmark.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Few rounds: to see that it runs.
    pub is_quick: bool,
    /// Where figures go besides the terminal.
    pub json: Option<PathBuf>,
    /// Where plots go.
    pub plots: Option<PathBuf>,
    /// A word that the names of what is measured have to hold.
    pub only: Option<String>,
}

impl Options {
    /// Reads the arguments of this process.
    ///
    /// # Errors
    /// When one is unknown or misses its value.
    pub fn read() -> Result<Self> {
        Self::parse(std::env::args().skip(1))
    }

    fn parse(arguments: impl Iterator<Item = String>) -> Result<Self> {
        let (mut options, mut arguments) = (Self::default(), arguments);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--quick" => options.is_quick = true,
                "--json" => {
                    options.json = Some(arguments.next().context("--json wants a file")?.into());
                }
                "--plots" => {
                    let directory = arguments.next().context("--plots wants a directory")?;
                    options.plots = Some(directory.into());
                }
                // Cargo says this to every benchmark.
                "--bench" => {}
                other if other.starts_with('-') => bail!("unknown argument {other}"),
                other => options.only = Some(other.to_owned()),
            }
        }
        Ok(options)
    }

    /// Whether something of this name is to be measured.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }
}

/// Ends a benchmark: an error is one line and an exit code.
#[must_use]
pub fn exit_code(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Why an agent with this backend can't have so many published ports here; `None` where it can.
///
/// # Errors
/// The kernel's.
pub fn obstacle(backend: Backend, ports: u32) -> Result<Option<String>> {
    // One keeps the port, one serves it at loopback addresses.
    const FOR_EACH: u64 = 2;
    // For what else it has open.
    const SPARE: u64 = 200;

    if backend.is_ebpf() {
        return Ok(None);
    }
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE).context("ask for the limit of files")?;
    let is_enough = files >= FOR_EACH * u64::from(ports) + SPARE;
    let said =
        || format!("each of {ports} ports takes {FOR_EACH} open files, and {files} are allowed");
    Ok((!is_enough).then(said))
}

/// A CPU that the process may use. Another one has other caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu(usize);

impl Cpu {
    /// The one that this thread is on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn here() -> Result<Self> {
        Ok(Self(sched_getcpu().context("ask for the CPU")?))
    }

    /// All of them.
    ///
    /// # Errors
    /// The kernel's.
    pub fn all() -> Result<Vec<Self>> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("ask for CPUs")?;
        let is_allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
        Ok((0..CpuSet::count()).filter(is_allowed).map(Self).collect())
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> usize {
        self.0
    }

    /// Keeps this thread there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stay(self) -> Result<()> {
        let mut here = CpuSet::new();
        here.set(self.0).context("name a CPU")?;
        sched_setaffinity(Pid::from_raw(0), &here).context("stay on one CPU")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Options> {
        Options::parse(arguments.iter().map(|argument| (*argument).to_owned()))
    }

    #[test]
    fn arguments_are_read() {
        let options =
            parsed(&["--bench", "--quick", "--json", "f", "--plots", "d", "udp"]).unwrap();
        let expected = Options {
            is_quick: true,
            json: Some("f".into()),
            plots: Some("d".into()),
            only: Some("udp".to_owned()),
        };
        assert_eq!(options, expected);
        assert!(options.wants("udp64") && !options.wants("tcp"));
        assert!(parsed(&[]).unwrap().wants("tcp"));
    }

    #[test]
    fn what_is_no_argument_is_named() {
        for (arguments, named) in [(&["--fast"][..], "--fast"), (&["--json"], "--json")] {
            let error = parsed(arguments).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
