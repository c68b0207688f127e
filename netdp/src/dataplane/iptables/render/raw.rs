//! Table raw: who sends what it may not say, before connections are tracked.

use std::collections::BTreeMap;

use netdp_common::counter::Reason;

use super::{Net, View, host};
use crate::dataplane::{
    SubnetProgram,
    iptables::{
        family::Filtered,
        rules::{RuleSet, Table, hook_chain},
    },
};

pub(super) fn render<F: Filtered>(view: &View<'_, F>, rules: &mut RuleSet) {
    let mut first = rules.chain(Table::Raw, hook_chain("PREROUTING"));
    first.add("-i lo", "-j RETURN");
    for net in &view.networks {
        first.add(&format!("-i {}", net.bridge), &format!("-j {}", net.chain("FROM")));
    }
    for martian in F::MARTIANS {
        first.count(martian, None, Reason::Martian, "-j DROP");
    }
    for net in &view.networks {
        if let Some(side) = net.side {
            let forged = format!("! -i {} -s {}", net.bridge, side.subnet);
            first.drop(&forged, net.id, Reason::OutsideSpoof);
        }
    }
    for net in &view.networks {
        match net.side {
            Some(side) => from_members(net, side, rules),
            None => {
                rules.chain(Table::Raw, net.chain("FROM")).drop("", net.id, Reason::Family);
            }
        }
    }
}

/// What members of a network send.
fn from_members<F: Filtered>(net: &Net<'_, F>, side: SubnetProgram<F>, rules: &mut RuleSet) {
    let shards = shards(net);
    let mut from = rules.chain(Table::Raw, net.chain("FROM"));
    for impostor in F::IMPOSTORS {
        from.drop(impostor, net.id, Reason::Impostor);
    }
    for nobody in F::WITHOUT_ADDRESS {
        from.add(nobody, "-j RETURN");
    }
    for (prefix, (chain, _)) in &shards {
        from.add(&format!("-s {prefix}"), &format!("-g {chain}"));
    }
    from.drop("", net.id, Reason::SpoofedSource);

    let honest = if net.is_closed() {
        sent_in_closed(net, side, rules);
        format!("-g {}", net.chain("SENT"))
    } else {
        "-j RETURN".to_owned()
    };
    let mut by_chain: BTreeMap<&String, Vec<&String>> = BTreeMap::new();
    for (chain, senders) in shards.values() {
        by_chain.entry(chain).or_default().extend(senders);
    }
    for (chain, senders) in by_chain {
        let mut own = rules.chain(Table::Raw, chain);
        for sender in senders {
            own.add(sender, &honest);
        }
        own.drop("", net.id, Reason::SpoofedSource);
    }
}

/// Prefixes of the members' addresses, each with the chain that knows them and, for each member, the
/// match of what it may send: a packet passes a handful of rules whatever their number.
fn shards<F: Filtered>(net: &Net<'_, F>) -> BTreeMap<F::Net, (String, Vec<String>)> {
    let mut shards: BTreeMap<F::Net, (String, Vec<String>)> = BTreeMap::new();
    for member in &net.members {
        for address in [Some(member.address), F::link_local(member.mac)].into_iter().flatten() {
            let prefix = shard::<F>(address);
            let (_, senders) = shards.entry(prefix).or_insert_with(|| {
                let number = fold(F::bits(F::first(prefix)));
                (format!("{}-{number:08x}", net.chain("OWN")), Vec::new())
            });
            senders.push(format!(
                "-s {} -m physdev --physdev-in {} -m mac --mac-source {}",
                host::<F>(address),
                member.interface,
                member.mac
            ));
        }
    }
    shards
}

fn shard<F: Filtered>(address: F::Address) -> F::Net {
    let below = u32::from(F::BITS - F::SHARD_BITS);
    let first = F::address(F::bits(address) >> below << below);
    F::net(first, F::SHARD_BITS)
}

/// A number for a chain's name, which has no room for an address. Where two prefixes get the same,
/// they share a chain.
fn fold(bits: u128) -> u32 {
    let words = [bits >> 96, bits >> 64, bits >> 32, bits].map(|word| word as u32);
    words.into_iter().fold(0, |sum: u32, word| sum.wrapping_mul(31).wrapping_add(word))
}

/// What a member of a closed network may send: to its neighbours, and to the gateway.
fn sent_in_closed<F: Filtered>(net: &Net<'_, F>, side: SubnetProgram<F>, rules: &mut RuleSet) {
    let mut sent = rules.chain(Table::Raw, net.chain("SENT"));
    sent.add(&format!("-d {}", side.subnet), "-j RETURN");
    for destination in F::ON_LINK {
        sent.add(&format!("-d {destination}"), "-j RETURN");
    }
    if net.is_isolated() {
        // Dropped where it reaches the host, and counted as such.
        sent.add("-m addrtype --dst-type LOCAL", "-j RETURN");
    }
    sent.drop("", net.id, Reason::Internal);
}
