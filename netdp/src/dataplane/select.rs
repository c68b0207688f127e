//! Which backend enforces, and why: the one that was asked for, or the best that this host can do.
//!
//! Owns the choice and its reason, giving way to the other backend where the first one fails before
//! it has enforced anything, and taking away what the other one left. A host has one backend or the
//! other, never half of each.

use std::path::Path;

use anyhow::{Context, Result};
use tracing::{info, warn};

use super::{
    Applied, Count, Dataplane, Drift, FlowRecord, FlowTable, KernelFeature, Lanes, Nature, Program,
    ebpf::{Ebpf, EbpfOptions},
    iptables::Iptables,
};
use crate::config::DataplaneChoice;

/// What opens the other backend.
type Spare = Box<dyn FnOnce() -> Result<Box<dyn Dataplane>> + Send>;

/// The backend of choice.
pub struct Selected {
    backend: Box<dyn Dataplane>,
    reason: String,
    /// There until the first program that asks for something is enforced.
    spare: Option<Spare>,
}

/// Opens the backend that was asked for.
///
/// # Errors
/// It can't work on this host, or none can; with what to do.
pub fn select(choice: DataplaneChoice, options: EbpfOptions) -> Result<Selected> {
    let asked = || "as --dataplane asks for".to_owned();
    let selected = match choice {
        DataplaneChoice::Ebpf => {
            let backend = open_ebpf(options).context("open the ebpf dataplane")?;
            Selected { backend: Box::new(backend), reason: asked(), spare: None }
        }
        DataplaneChoice::Iptables => {
            Selected { backend: open_iptables()?, reason: asked(), spare: None }
        }
        DataplaneChoice::Auto => match open_ebpf(options) {
            Ok(backend) => Selected {
                backend: Box::new(backend),
                reason: "this host can do all that it needs".to_owned(),
                spare: Some(Box::new(open_iptables)),
            },
            Err(error) => {
                let reason = format!("ebpf does not work here: {error:#}");
                let backend = open_iptables().with_context(|| reason.clone())?;
                Selected { backend, reason, spare: None }
            }
        },
    };
    info!(dataplane = selected.name(), "chose the dataplane: {}", selected.reason);
    Ok(selected)
}

fn open_ebpf(options: EbpfOptions) -> Result<Ebpf> {
    let mut backend = Ebpf::open(options)?;
    backend.try_out().context("attach a program, for a try")?;
    Ok(backend)
}

fn open_iptables() -> Result<Box<dyn Dataplane>> {
    Ok(Box::new(Iptables::open().context("open the iptables dataplane")?))
}

/// Takes away what the backend that is not `kept` may have left here. To be called once the one that
/// is kept enforces `program`.
///
/// # Errors
/// Names what could not be taken away.
pub fn purge_others(kept: &str, program: &Program, bpffs: &Path) -> Result<()> {
    let (other, purged) = match kept {
        "iptables" => ("ebpf", Ebpf::purge_pins(bpffs)),
        _ => ("iptables", Iptables::purge_rules(program)),
    };
    if purged.with_context(|| format!("take away what the {other} dataplane left"))? {
        info!("took away what the {other} dataplane left");
    }
    Ok(())
}

impl Dataplane for Selected {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn reason(&self) -> String {
        self.reason.clone()
    }

    fn apply(&mut self, program: &Program) -> Result<Applied> {
        let error = match self.backend.apply(program) {
            Ok(applied) => {
                if !program.networks.is_empty() {
                    self.spare = None;
                }
                return Ok(applied);
            }
            Err(error) => error,
        };
        let Some(spare) = self.spare.take() else { return Err(error) };
        let name = self.backend.name();
        let mut backend = match spare() {
            Ok(backend) => backend,
            Err(other) => return Err(error.context(format!("and not the other way: {other:#}"))),
        };
        self.reason = format!("{name} failed: {error:#}");
        warn!(dataplane = backend.name(), "changing the dataplane: {}", self.reason);
        // The new one first: there is no moment without rules.
        let applied = backend.apply(program)?;
        let mut failed = std::mem::replace(&mut self.backend, backend);
        if let Err(error) = failed.purge() {
            warn!("take away what the {name} dataplane left: {error:#}");
        }
        Ok(applied)
    }

    fn check(&mut self, program: &Program) -> Result<Vec<Drift>> {
        self.backend.check(program)
    }

    fn purge(&mut self) -> Result<()> {
        self.backend.purge()
    }

    fn counters(&mut self) -> Result<Vec<Count>> {
        self.backend.counters()
    }

    fn lanes(&mut self) -> Result<Option<Lanes>> {
        self.backend.lanes()
    }

    fn flows(&mut self) -> Result<Vec<FlowRecord>> {
        self.backend.flows()
    }

    fn collect(&mut self) -> Result<usize> {
        self.backend.collect()
    }

    fn forget_host_ports(&mut self) -> Result<()> {
        self.backend.forget_host_ports()
    }

    fn flow_tables(&self) -> Vec<FlowTable> {
        self.backend.flow_tables()
    }

    fn nature(&self) -> Nature {
        self.backend.nature()
    }

    fn features(&self) -> Vec<KernelFeature> {
        self.backend.features()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::{NetworkProgram, SubnetProgram, fake::Fake};
    use crate::model::{GatewayMode, MacAddress, NatBehaviour, NetworkId};

    fn program() -> Program {
        let network = NetworkProgram {
            bridge_ifindex: 1,
            bridge_mac: MacAddress([2; 6]),
            mtu: 1500,
            ipv4: Some(SubnetProgram {
                subnet: "172.20.0.0/24".parse().unwrap(),
                gateway: "172.20.0.1".parse().unwrap(),
                snat_ip: None,
            }),
            ipv6: None,
            gateway_mode: GatewayMode::Nat,
            internal: false,
            icc: true,
            masquerade: true,
            nat: NatBehaviour::EndpointDependent,
            endpoint_flows: 0,
            policy: Vec::new(),
            policy_generation: 0,
        };
        Program { networks: [(NetworkId(1), network)].into(), ..Program::default() }
    }

    fn selected(first: &Fake, second: &Fake) -> Selected {
        let second = second.clone();
        Selected {
            backend: Box::new(first.clone()),
            reason: String::new(),
            spare: Some(Box::new(move || Ok(Box::new(second)))),
        }
    }

    #[test]
    fn a_backend_that_fails_at_first_gives_way_as_a_whole() {
        let (first, second) = (Fake::default(), Fake::default());
        let mut selected = selected(&first, &second);
        // A host without networks asks for nothing, and proves nothing.
        selected.apply(&Program::default()).unwrap();
        first.fail_next(1);
        selected.apply(&program()).unwrap();
        assert_eq!((first.purges(), second.applied()), (1, vec![program()]));
        assert!(selected.reason().contains("failed: apply failed"), "{}", selected.reason());
    }

    #[test]
    fn a_backend_that_has_worked_stays() {
        let (first, second) = (Fake::default(), Fake::default());
        let mut selected = selected(&first, &second);
        selected.apply(&program()).unwrap();
        first.fail_next(1);
        selected.apply(&program()).unwrap_err();
        assert_eq!((first.purges(), second.applied()), (0, vec![]));
        selected.apply(&program()).unwrap();
    }
}
