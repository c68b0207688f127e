//! Table nat: published ports, and the source of what leaves.

use std::collections::{BTreeMap, BTreeSet};

use super::{Net, View, host};
use crate::{
    dataplane::{
        PublishedKey, PublishedTarget,
        iptables::{
            family::Filtered,
            rules::{RuleSet, Table, hook_chain},
        },
    },
    model::{GatewayMode, Protocol},
};

/// Published ports whose numbers differ in these bits only share a chain: a packet passes at most as
/// many rules, and a change writes no others.
const SHARD_BITS: u32 = 8;

pub(super) fn render<F: Filtered>(view: &View<'_, F>, rules: &mut RuleSet) {
    let local = "-m addrtype --dst-type LOCAL";
    let (doors, ports) = (hook_chain("DOORS"), hook_chain("PORTS"));
    let to_doors = format!("-j {doors}");
    rules.chain(Table::Nat, hook_chain("PREROUTING")).add(local, &to_doors);
    // A loopback address is the agent's to serve: a packet with one can't be sent to a container.
    let dialled = format!("! -d {} {local}", F::LOOPBACK);
    let to_ports = format!("-j {ports}");
    rules.chain(Table::Nat, hook_chain("OUTPUT")).add(&dialled, &to_ports);

    let mut chain = rules.chain(Table::Nat, doors);
    let bridges = view.networks.iter().filter(|net| !net.is_closed()).map(|net| net.bridge);
    for interface in view.uplinks.iter().map(|door| door.name).chain(bridges) {
        chain.add(&format!("-i {interface}"), &to_ports);
    }
    published(view, &ports, rules);

    for net in &view.networks {
        leaving(view, net, rules);
    }
}

/// Where published ports lead.
fn published<F: Filtered>(view: &View<'_, F>, ports: &str, rules: &mut RuleSet) {
    rules.chain(Table::Nat, ports);
    let mut shards: BTreeMap<(Protocol, u16), Vec<Run<F>>> = BTreeMap::new();
    for (key, target) in view.program.published.iter() {
        let Some(run) = translation(view, key, target) else { continue };
        let runs = shards.entry((key.protocol, key.port >> SHARD_BITS)).or_default();
        match runs.last_mut() {
            Some(before) if before.is_continued_by(&run) => before.last = run.last,
            _ => runs.push(run),
        }
    }
    for ((protocol, shard), mut runs) in shards {
        let first = shard << SHARD_BITS;
        let last = first + ((1 << SHARD_BITS) - 1);
        let chain = format!("{ports}-{protocol}-{shard:02x}");
        let dialled = format!("-p {protocol} -m {protocol} --dport {first}:{last}");
        rules.chain(Table::Nat, ports).add(&dialled, &format!("-j {chain}"));
        // One address before all of them.
        runs.sort_by_key(|run| (run.on == F::UNSPECIFIED, run.first, run.on));
        let mut chain = rules.chain(Table::Nat, chain);
        for run in runs {
            let on = match run.on {
                any if any == F::UNSPECIFIED => String::new(),
                address => format!("-d {} ", host::<F>(address)),
            };
            let dialled = format!("{on}-p {protocol} -m {protocol} --dport {}", run.ports());
            chain.add(&dialled, &format!("-j DNAT --to-destination {}", run.target()));
        }
    }
}

/// Host ports that follow each other, and where they lead.
struct Run<F: Filtered> {
    /// The host's address.
    on: F::Address,
    first: u16,
    last: u16,
    to: F::Address,
    /// Of the first one.
    port: u16,
}

impl<F: Filtered> Run<F> {
    /// Whether the next port of the same address belongs to it: without a port, a rule keeps the
    /// one that was dialled.
    fn is_continued_by(&self, next: &Self) -> bool {
        let keeps = self.port == self.first && next.port == next.first;
        let is_same = (self.on, self.to) == (next.on, next.to);
        keeps && is_same && self.last.checked_add(1) == Some(next.first)
    }

    fn ports(&self) -> String {
        if self.first == self.last {
            self.first.to_string()
        } else {
            format!("{}:{}", self.first, self.last)
        }
    }

    fn target(&self) -> String {
        if self.port == self.first {
            self.to.to_string()
        } else {
            format!("{}:{}", F::before_port(self.to), self.port)
        }
    }
}

/// What a published port is in this family; nothing where no packet is translated for it.
fn translation<F: Filtered>(
    view: &View<'_, F>,
    key: PublishedKey,
    target: PublishedTarget,
) -> Option<Run<F>> {
    let on = F::of(key.address).filter(|&address| F::is_translated(address))?;
    let endpoint = view.program.endpoints.get(&target.endpoint)?;
    let network = view.program.networks.get(&endpoint.network)?;
    // Dialled at its own address.
    if network.gateway_mode == GatewayMode::Routed {
        return None;
    }
    let to = F::of(target.address)?;
    Some(Run { on, first: key.port, last: key.port, to, port: target.port })
}

/// The source of what leaves a network, and of what comes back into it by a published port.
fn leaving<F: Filtered>(view: &View<'_, F>, net: &Net<'_, F>, rules: &mut RuleSet) {
    let Some(side) = net.side else { return };
    if net.is_closed() {
        return;
    }
    let back = format!("-j {}", net.chain("BACK"));
    let translated = format!("-o {} -m conntrack --ctstate DNAT", net.bridge);
    rules.chain(Table::Nat, hook_chain("POSTROUTING")).add(&translated, &back);
    let gateway = format!("-j SNAT --to-source {}", side.gateway);
    let mut chain = rules.chain(Table::Nat, net.chain("BACK"));
    chain.add("-m addrtype --src-type LOCAL", &gateway);
    // A container that dialled itself would not take an answer from its own address.
    for address in publishing(view, net) {
        let address = host::<F>(address);
        chain.add(&format!("-s {address} -d {address}"), &gateway);
    }

    let Some(side) = net.masqueraded() else { return };
    let out = format!("-j {}", net.chain("OUT"));
    let source = format!("-s {}", side.subnet);
    rules.chain(Table::Nat, hook_chain("POSTROUTING")).add(&source, &out);
    let (first, last) = view.program.nat_ports.reserved;
    let mut chain = rules.chain(Table::Nat, net.chain("OUT"));
    for door in &view.uplinks {
        // From the range that no socket of the host gets a port of.
        let (all, with_ports) = match net.source(door) {
            Some(address) => (
                format!("-j SNAT --to-source {address}"),
                format!("-j SNAT --to-source {}:{first}-{last}", F::before_port(address)),
            ),
            // The filter lets nothing pass without an address. But it is written after this table, and
            // the address may be back by then: what passes meanwhile is translated or dropped.
            None => {
                ("-j MASQUERADE".to_owned(), format!("-j MASQUERADE --to-ports {first}-{last}"))
            }
        };
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            chain.add(&format!("-o {} -p {protocol}", door.name), &with_ports);
        }
        chain.add(&format!("-o {}", door.name), &all);
    }
}

/// Addresses of a network's members that have published ports.
fn publishing<F: Filtered>(view: &View<'_, F>, net: &Net<'_, F>) -> BTreeSet<F::Address> {
    let of_net = |target: &PublishedTarget| {
        let endpoint = view.program.endpoints.get(&target.endpoint);
        endpoint.is_some_and(|endpoint| endpoint.network == net.id)
    };
    let targets = view.program.published.runs().map(|(_, _, target)| target).filter(of_net);
    targets.filter_map(|target| F::of(target.address)).collect()
}
