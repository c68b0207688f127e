//! A backend that enforces nothing and remembers everything: for tests of what drives backends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};

use super::{
    Applied, Count, Dataplane, Drift, FlowRecord, FlowTable, KernelFeature, Lanes, Nature, Program,
};

/// The backend; clones share what they remember, so a test keeps one and gives one away.
#[derive(Clone, Debug, Default)]
pub struct Fake(Arc<Mutex<Record>>);

#[derive(Debug, Default)]
struct Record {
    applied: Vec<Program>,
    purges: usize,
    collections: usize,
    forgotten_ports: usize,
    failures_ahead: usize,
    flow_tables: Vec<FlowTable>,
    keeps_blank: bool,
}

impl Fake {
    /// The programs that were applied, oldest first; failed calls left out.
    pub fn applied(&self) -> Vec<Program> {
        self.record().applied.clone()
    }

    /// How often it was purged.
    pub fn purges(&self) -> usize {
        self.record().purges
    }

    /// How often flows were collected.
    pub fn collections(&self) -> usize {
        self.record().collections
    }

    /// How often it was told that ports of source NAT's were anybody's.
    pub fn forgotten_ports(&self) -> usize {
        self.record().forgotten_ports
    }

    /// Makes the next `times` calls of `apply` fail.
    pub fn fail_next(&self, times: usize) {
        self.record().failures_ahead = times;
    }

    /// Has flow tables like these from now on.
    pub fn set_flow_tables(&self, tables: Vec<FlowTable>) {
        self.record().flow_tables = tables;
    }

    /// Gains by blanks from now on.
    pub fn keep_blank(&self) {
        self.record().keeps_blank = true;
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        // A test that panicked while it looked left nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dataplane for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn apply(&mut self, program: &Program) -> Result<Applied> {
        let mut record = self.record();
        if let Some(left) = record.failures_ahead.checked_sub(1) {
            record.failures_ahead = left;
            bail!("apply failed because the test wanted it");
        }
        let writes = usize::from(record.applied.last() != Some(program));
        record.applied.push(program.clone());
        Ok(Applied { writes })
    }

    fn check(&mut self, program: &Program) -> Result<Vec<Drift>> {
        let same = self.record().applied.last() == Some(program);
        let drift = Drift { what: "another program was applied last".into() };
        Ok((!same).then_some(drift).into_iter().collect())
    }

    fn purge(&mut self) -> Result<()> {
        let mut record = self.record();
        record.purges += 1;
        record.applied.clear();
        Ok(())
    }

    fn counters(&mut self) -> Result<Vec<Count>> {
        Ok(Vec::new())
    }

    fn lanes(&mut self) -> Result<Option<Lanes>> {
        Ok(None)
    }

    fn flows(&mut self) -> Result<Vec<FlowRecord>> {
        Ok(Vec::new())
    }

    fn collect(&mut self) -> Result<usize> {
        self.record().collections += 1;
        Ok(0)
    }

    fn forget_host_ports(&mut self) -> Result<()> {
        self.record().forgotten_ports += 1;
        Ok(())
    }

    fn flow_tables(&self) -> Vec<FlowTable> {
        self.record().flow_tables.clone()
    }

    fn nature(&self) -> Nature {
        let keeps_blank = self.record().keeps_blank;
        Nature { reaches_loopback: true, keeps_blank, ..Nature::default() }
    }

    fn features(&self) -> Vec<KernelFeature> {
        Vec::new()
    }
}
