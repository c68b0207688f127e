//! The blank: a veth pair that is nobody's yet and has its program already.
//!
//! To attach a program takes the kernel as long as packets may still be looking at the programs that
//! were there before; a pair that is made ahead takes that off the start of a container. This file says
//! what marks the blank, whether there has to be one, and which links it is.

use super::{Setting, own};
use crate::{
    facts::{HostFacts, Link},
    model::Model,
};

/// Name of the host's end. Those of endpoints begin at 1.
pub const HOST_END: &str = "ndv0";

/// Name of the end that will be a container's.
pub const CONTAINER_END: &str = "ndc0";

/// Marks the host's end, once all else is done.
pub const ALIAS: &str = Link::BLANK_ALIAS;

/// A blank that is whole, by its links' ifindexes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blank {
    /// The end that stays on the host.
    pub host_end: u32,
    /// The end that will be a container's.
    pub container_end: u32,
}

impl Blank {
    /// Whether a link is an end of it.
    pub(super) fn has(&self, ifindex: u32) -> bool {
        [self.host_end, self.container_end].contains(&ifindex)
    }
}

/// Whether there has to be one: an engine that has a network is going to ask for endpoints.
pub fn is_wanted(model: &Model, setting: &Setting) -> bool {
    setting.keeps_blank && model.networks.values().any(|network| network.engine_id.is_some())
}

/// The one that is there. What somebody has begun to use is none.
pub(super) fn find(facts: &HostFacts) -> Option<Blank> {
    let unused = |name: &str, alias: &str| {
        let (ifindex, link) = own(facts, name, alias)?;
        (!link.up && link.master.is_none()).then_some(ifindex)
    };
    Some(Blank {
        host_end: unused(HOST_END, ALIAS)?,
        container_end: unused(CONTAINER_END, &Link::offer_alias(CONTAINER_END))?,
    })
}
