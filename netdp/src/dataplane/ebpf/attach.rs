//! Programs at tc hooks: on tcx, held by links that are pinned; where the kernel has no tcx, as
//! filters of clsact qdiscs, which hold themselves.
//!
//! Owns both ways, and going from one program to the next in one step. Which program has to be where
//! is the caller's to say.

use std::{collections::BTreeSet, os::fd::AsFd, thread};

use anyhow::{Context, Result, anyhow};
use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        links::{FdLink, PinnedLink},
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};
use nix::{
    net::if_::if_indextoname,
    sched::{CloneFlags, unshare},
};
use tracing::debug;

use super::{
    image::Hook,
    object::{classifier, remove_pin},
    pins::Pins,
    probe::{Feature, Features},
};
use crate::netlink::tc::{Direction, TrafficControl};

impl Hook {
    fn direction(self) -> Direction {
        match self {
            Self::FromContainer | Self::FromUplink => Direction::Ingress,
            Self::IntoNetwork | Self::ToUplink => Direction::Egress,
        }
    }

    fn attach_type(self) -> TcAttachType {
        match self.direction() {
            Direction::Ingress => TcAttachType::Ingress,
            Direction::Egress => TcAttachType::Egress,
        }
    }
}

/// Where a program is: hook and ifindex.
pub(super) type Place = (Hook, u32);

/// The tc hooks of this host.
pub(super) struct TcHooks {
    pins: Pins,
    has_tcx: bool,
    /// Places that are held by filters; all others are held by links.
    filters: BTreeSet<Place>,
}

impl TcHooks {
    pub(super) fn new(pins: Pins, features: &Features) -> Self {
        Self { pins, has_tcx: features.has(Feature::Tcx), filters: BTreeSet::new() }
    }

    /// Moves every place that an earlier agent left over to the programs of this one. Returns the
    /// places.
    ///
    /// # Errors
    /// A pin is no link, or the kernel refuses.
    pub(super) fn adopt(&mut self, ebpf: &mut Ebpf) -> Result<BTreeSet<Place>> {
        let mut places = BTreeSet::new();
        for (hook, ifindex) in self.pins.attachments()? {
            if self.adopt_link(classifier(ebpf, hook)?, hook, ifindex)? {
                places.insert((hook, ifindex));
            }
        }
        let mut control = TrafficControl::open()?;
        let interfaces = control.interfaces()?;
        self.pins.keep_qdiscs(&interfaces)?;
        for ifindex in interfaces {
            for direction in Direction::ALL {
                let Some(filter) = control.filter(ifindex, direction)? else { continue };
                let is_it =
                    |hook: &Hook| hook.program() == filter.name && hook.direction() == direction;
                match Hook::ALL.into_iter().find(is_it) {
                    Some(hook) if !places.contains(&(hook, ifindex)) => {
                        put(&mut control, classifier(ebpf, hook)?, hook, ifindex)?;
                        self.filters.insert((hook, ifindex));
                        places.insert((hook, ifindex));
                    }
                    // Held twice, or by a program that this version has not.
                    _ => control.remove(ifindex, direction)?,
                }
            }
        }
        Ok(places)
    }

    /// `false` where there is no interface any more.
    fn adopt_link(&self, program: &mut SchedClassifier, hook: Hook, ifindex: u32) -> Result<bool> {
        let path = self.pins.link(hook, ifindex);
        let pinned = PinnedLink::from_pin(&path)
            .with_context(|| format!("open the pinned link {}", path.display()))?;
        let link = SchedClassifierLink::try_from(FdLink::from(pinned))
            .with_context(|| format!("recognise the pinned link {}", path.display()))?;
        match program.attach_to_link(link) {
            Ok(id) => {
                // Still pinned: our descriptor may go.
                program.take_link(id)?;
                Ok(true)
            }
            Err(error) => {
                // The interface has gone, and the kernel detached the link.
                debug!(path = %path.display(), %error, "dropping a pin without an interface");
                remove_pin(&path)?;
                Ok(false)
            }
        }
    }

    /// Attaches a program in a namespace that ends with the thread that makes it.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn try_out(&self, program: &mut SchedClassifier) -> Result<()> {
        /// That of the loopback interface, everywhere.
        const LOOPBACK: u32 = 1;
        let attach = || -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
            if !self.has_tcx {
                let mut control = TrafficControl::open()?;
                control.add_clsact(LOOPBACK)?;
                return put(&mut control, program, Hook::FromUplink, LOOPBACK);
            }
            let order = TcAttachOptions::TcxOrder(LinkOrder::last());
            let id = program.attach_with_options("lo", TcAttachType::Ingress, order)?;
            program.detach(id).context("detach it again")
        };
        thread::scope(|scope| {
            let tried = scope.spawn(attach).join();
            tried.unwrap_or_else(|_| Err(anyhow!("the try ended early")))
        })
    }

    /// Attaches a program behind the programs of others at the hook.
    ///
    /// # Errors
    /// The interface has gone, or somebody else is in the place.
    pub(super) fn attach(
        &mut self,
        program: &mut SchedClassifier,
        hook: Hook,
        ifindex: u32,
    ) -> Result<()> {
        let name = if_indextoname(ifindex)
            .with_context(|| format!("find the interface with ifindex {ifindex}"))?;
        let name = name.to_string_lossy().into_owned();
        let action = || format!("attach {} to {name} (ifindex {ifindex})", hook.program());
        // A pin of an interface that had this ifindex before.
        let path = self.pins.link(hook, ifindex);
        remove_pin(&path)?;
        if !self.has_tcx {
            self.attach_filter(program, hook, ifindex).with_context(action)?;
            self.filters.insert((hook, ifindex));
            return Ok(());
        }
        let order = TcAttachOptions::TcxOrder(LinkOrder::last());
        let id =
            program.attach_with_options(&name, hook.attach_type(), order).with_context(action)?;
        let link: FdLink = program.take_link(id)?.try_into().with_context(action)?;
        link.pin(&path).with_context(|| format!("pin the link {}", path.display()))?;
        Ok(())
    }

    fn attach_filter(&self, program: &mut SchedClassifier, hook: Hook, ifindex: u32) -> Result<()> {
        let mut control = TrafficControl::open()?;
        if control.add_clsact(ifindex)? {
            self.pins.note_qdisc(ifindex)?;
        }
        put(&mut control, program, hook, ifindex)
    }

    /// Detaches a program.
    ///
    /// # Errors
    /// The pin can't be removed, or the filter.
    pub(super) fn detach(&mut self, hook: Hook, ifindex: u32) -> Result<()> {
        remove_pin(&self.pins.link(hook, ifindex))?;
        if self.filters.remove(&(hook, ifindex)) {
            let mut control = TrafficControl::open()?;
            control.remove(ifindex, hook.direction())?;
            tidy_qdisc(&mut control, &self.pins, ifindex)?;
        }
        Ok(())
    }

    /// Whether the kernel runs a program at a place: someone may have detached it, or removed the
    /// pin.
    pub(super) fn is_attached(&self, program: &SchedClassifier, hook: Hook, ifindex: u32) -> bool {
        let Ok(ours) = program.info().map(|info| info.id()) else { return false };
        if self.filters.contains(&(hook, ifindex)) {
            let filter = TrafficControl::open()
                .and_then(|mut control| control.filter(ifindex, hook.direction()));
            return matches!(filter, Ok(Some(filter)) if filter.program == ours);
        }
        if !self.pins.link(hook, ifindex).exists() {
            return false;
        }
        let Ok(name) = if_indextoname(ifindex) else { return false };
        SchedClassifier::query_tcx(&name.to_string_lossy(), hook.attach_type())
            .is_ok_and(|(_, programs)| programs.iter().any(|info| info.id() == ours))
    }
}

/// Takes every filter of ours off the interfaces of this namespace, and the qdiscs that were made for
/// them. Returns whether there was one.
///
/// # Errors
/// The kernel's.
pub(super) fn remove_filters(pins: &Pins) -> Result<bool> {
    let mut control = TrafficControl::open()?;
    let mut found = false;
    for ifindex in control.interfaces()? {
        for direction in Direction::ALL {
            if control.filter(ifindex, direction)?.is_some() {
                control.remove(ifindex, direction)?;
                found = true;
            }
        }
        tidy_qdisc(&mut control, pins, ifindex)?;
    }
    Ok(found)
}

fn put(
    control: &mut TrafficControl,
    program: &mut SchedClassifier,
    hook: Hook,
    ifindex: u32,
) -> Result<()> {
    let descriptor = program.fd().context("find a loaded program")?;
    control.put(ifindex, hook.direction(), hook.program(), descriptor.as_fd())
}

/// Takes away a qdisc that we made, once nobody has a filter there.
fn tidy_qdisc(control: &mut TrafficControl, pins: &Pins, ifindex: u32) -> Result<()> {
    if pins.has_qdisc(ifindex) {
        control.remove_clsact_without_filters(ifindex)?;
        if !control.interfaces()?.contains(&ifindex) {
            pins.forget_qdisc(ifindex)?;
        }
    }
    Ok(())
}
