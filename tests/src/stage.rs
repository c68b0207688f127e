//! Labs that tests use one after the other, where to start one takes longer than a test.
//!
//! A lab is handed on only if it is as it was at its beginning, in all that a [`Snapshot`] sees, and only
//! if it is a standard one: others are hardly asked for twice.

use std::sync::Mutex;
use std::sync::mpsc::{self, Sender};
use std::thread;

use anyhow::{Context, Result};

use crate::lab::{Lab, LabBuilder};
use crate::probe::locked;
use crate::snapshot::Snapshot;

/// Those that nobody uses at the moment.
static SPARE: Mutex<Vec<Kept>> = Mutex::new(Vec::new());

/// A lab, and what it is to be compared with.
struct Kept {
    lab: Lab,
    /// What its processes end with: the thread that has started them ends when this does, after the lab.
    _keeper: Sender<()>,
    builder: LabBuilder,
    beginning: Beginning,
}

/// A lab before its first test.
#[derive(PartialEq, Eq)]
struct Beginning {
    /// A later agent would end with the test that has started it.
    agent: Option<u32>,
    state: Snapshot,
}

impl Kept {
    fn build(builder: LabBuilder) -> Result<Self> {
        let (keeper, end) = mpsc::channel::<()>();
        let (reply, built) = mpsc::channel();
        let wanted = builder.clone();
        thread::spawn(move || {
            if reply.send(wanted.build()).is_ok() {
                // An error, when nobody is left to send anything.
                end.recv().ok();
            }
        });
        let lab = built.recv().context("wait for a lab")??;
        let beginning = Beginning::of(&lab)?;
        Ok(Self { lab, _keeper: keeper, builder, beginning })
    }

    /// Whether it is what would be built, in this family or the other: it has addresses of both.
    fn fits(&self, wanted: &LabBuilder) -> bool {
        self.builder.clone().family(wanted.chosen_family()) == *wanted
    }
}

impl Beginning {
    fn of(lab: &Lab) -> Result<Self> {
        let agent = lab.agent().ok().and_then(|agent| agent.pid());
        Ok(Self { agent, state: Snapshot::of_lab(lab)? })
    }
}

/// Runs a test in such a lab. What the test has asked an engine for, it has removed itself then.
///
/// # Errors
/// As the test, or when no lab can be had.
pub fn with_lab(builder: LabBuilder, test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    let spare = {
        let mut spare = locked(&SPARE);
        let fitting = spare.iter().position(|kept| kept.fits(&builder));
        fitting.map(|fitting| spare.swap_remove(fitting))
    };
    let family = builder.chosen_family();
    let mut kept = spare.map_or_else(|| Kept::build(builder), Ok)?;
    kept.lab.turn_to(family);
    test(&kept.lab)?;
    if kept.builder.is_standard() && Beginning::of(&kept.lab)? == kept.beginning {
        locked(&SPARE).push(kept);
    }
    Ok(())
}

/// Ends all labs that nobody uses.
pub fn end() {
    drop(std::mem::take(&mut *locked(&SPARE)));
}
