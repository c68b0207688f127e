//! Labs that tests use one after the other, where to start one takes longer than a test.
//!
//! A lab is handed on only if it is as it was at its beginning, in all that a [`Snapshot`] sees, and only
//! if it is a standard one: others are hardly asked for twice.

use std::mem;
use std::sync::Mutex;

use anyhow::Result;

use crate::lab::{Lab, LabBuilder};
use crate::probe::locked;
use crate::snapshot::Snapshot;

/// Those that nobody uses at the moment.
static SPARE: Mutex<Vec<Scene>> = Mutex::new(Vec::new());

/// A lab, and what it is to be compared with.
struct Scene {
    lab: Lab,
    builder: LabBuilder,
    beginning: Snapshot,
}

impl Scene {
    fn build(builder: LabBuilder) -> Result<Self> {
        let lab = builder.clone().build()?;
        let beginning = Snapshot::of_lab(&lab)?;
        Ok(Self { lab, builder, beginning })
    }

    /// Whether it is what would be built, in this family or the other: it has addresses of both.
    fn fits(&self, wanted: &LabBuilder) -> bool {
        self.builder.clone().family(wanted.chosen_family()) == *wanted
    }
}

/// Runs a test in such a lab. What the test has asked an engine for, it has removed itself then.
///
/// # Errors
/// As the test, or when no lab can be had.
pub fn with_lab(builder: LabBuilder, test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    let spare = {
        let mut spare = locked(&SPARE);
        let fitting = spare.iter().position(|scene| scene.fits(&builder));
        fitting.map(|fitting| spare.swap_remove(fitting))
    };
    let family = builder.chosen_family();
    let mut scene = spare.map_or_else(|| Scene::build(builder), Ok)?;
    scene.lab.turn_to(family);
    test(&scene.lab)?;
    if scene.builder.is_standard() && Snapshot::of_lab(&scene.lab)? == scene.beginning {
        locked(&SPARE).push(scene);
    }
    Ok(())
}

/// Ends all labs that nobody uses.
pub fn end() {
    drop(mem::take(&mut *locked(&SPARE)));
}
