//! From a [`Program`] to the rules of one family. Pure.
//!
//! Owns the look at a program that all tables share; each table has a file. What the chains are for
//! is in docs/iptables.md.

use std::collections::BTreeMap;

use super::{
    family::Filtered,
    rules::{RuleSet, Table, hook_chain},
};
use crate::{
    dataplane::{NetworkProgram, Program, SubnetProgram},
    model::{GatewayMode, MacAddress, NetworkId},
};

mod filter;
mod nat;
mod policy;
mod raw;
#[cfg(test)]
mod tests;

/// The rules of one family, with sets where the kernel has them. A host without networks has none.
pub(super) fn render<F: Filtered>(program: &Program, has_sets: bool) -> RuleSet {
    let mut rules = RuleSet::default();
    if program.networks.is_empty() {
        return rules;
    }
    let view = View::<F>::of(program);
    for table in Table::ALL {
        for hook in table.hooks() {
            rules.chain(table, hook_chain(hook));
        }
    }
    raw::render(&view, &mut rules);
    nat::render(&view, &mut rules);
    filter::render(&view, has_sets, &mut rules);
    rules
}

/// A program as one family sees it.
struct View<'a, F: Filtered> {
    program: &'a Program,
    networks: Vec<Net<'a, F>>,
    uplinks: Vec<Door<'a, F>>,
}

/// A network and its members.
struct Net<'a, F: Filtered> {
    id: NetworkId,
    bridge: &'a str,
    network: &'a NetworkProgram,
    /// `None` where the network does not carry this family.
    side: Option<SubnetProgram<F>>,
    members: Vec<Member<'a, F>>,
}

/// An endpoint.
struct Member<'a, F: Filtered> {
    interface: &'a str,
    mac: MacAddress,
    address: F::Address,
}

/// An uplink.
struct Door<'a, F: Filtered> {
    name: &'a str,
    masquerade: Option<F::Address>,
    forwarded_before: bool,
}

impl<'a, F: Filtered> View<'a, F> {
    fn of(program: &'a Program) -> Self {
        let name = |ifindex: u32| program.names.get(&ifindex).map(String::as_str);
        let mut members: BTreeMap<NetworkId, Vec<Member<'a, F>>> = BTreeMap::new();
        for endpoint in program.endpoints.values() {
            let (Some(address), Some(interface)) =
                (F::address_of(endpoint), name(endpoint.ifindex))
            else {
                continue;
            };
            let member = Member { interface, mac: endpoint.mac, address };
            members.entry(endpoint.network).or_default().push(member);
        }
        let networks = program.networks.iter().filter_map(|(&id, network)| {
            let members = members.remove(&id).unwrap_or_default();
            let bridge = name(network.bridge_ifindex)?;
            Some(Net { id, bridge, network, side: F::side(network), members })
        });
        let uplinks = program.uplinks.iter().filter_map(|(&ifindex, uplink)| {
            Some(Door {
                name: name(ifindex)?,
                masquerade: F::masquerade(uplink),
                forwarded_before: F::forwarded_before(uplink),
            })
        });
        Self { program, networks: networks.collect(), uplinks: uplinks.collect() }
    }
}

impl<F: Filtered> Net<'_, F> {
    /// The name of a chain of its own.
    fn chain(&self, what: &str) -> String {
        hook_chain(&format!("{what}-{}", self.id.0))
    }

    /// Whether nothing leads out of it or into it.
    fn is_closed(&self) -> bool {
        self.network.internal || self.is_isolated()
    }

    fn is_isolated(&self) -> bool {
        self.network.gateway_mode == GatewayMode::Isolated
    }

    /// Its side, if what leaves it gets another source.
    fn masqueraded(&self) -> Option<SubnetProgram<F>> {
        let translates = self.network.gateway_mode != GatewayMode::Routed
            && self.network.masquerade
            && !self.is_closed();
        self.side.filter(|_| translates)
    }

    /// The source of what leaves it through an uplink.
    fn source(&self, door: &Door<'_, F>) -> Option<F::Address> {
        self.side.and_then(|side| side.snat_ip).or(door.masquerade)
    }

    /// Whether something may leave through an uplink.
    fn leads_to(&self, door: &Door<'_, F>) -> bool {
        !self.is_closed() && (self.masqueraded().is_none() || self.source(door).is_some())
    }
}

/// An address as rules have it.
fn host<F: Filtered>(address: F::Address) -> String {
    format!("{address}/{}", F::BITS)
}
