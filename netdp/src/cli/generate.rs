//! `netdp completions` and `netdp man`: what packagers ship beside the binary.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, print};

#[derive(Args, Debug)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

#[derive(Args, Debug)]
pub(super) struct Man {
    /// An existing directory
    directory: PathBuf,
}

impl Completions {
    pub(super) fn run(self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "netdp", &mut script);
        print(&String::from_utf8_lossy(&script))
    }
}

impl Man {
    pub(super) fn run(self) -> Result<()> {
        clap_mangen::generate_to(Cli::command(), &self.directory)
            .with_context(|| format!("write manual pages into {}", self.directory.display()))
    }
}
