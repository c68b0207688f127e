//! Table filter: who may reach whom.

use netdp_common::counter::Reason;

use super::{Net, View, host, policy};
use crate::{
    dataplane::iptables::{
        family::Filtered,
        rules::{Chain, RuleSet, Table, hook_chain},
    },
    model::{GatewayMode, NetworkId},
};

/// Protocols whose checksums or signatures cover addresses in ways that nobody puts right here:
/// DCCP, UDP-Lite, AH (IANA).
const REFUSED: [u8; 3] = [33, 136, 51];

/// Matches packets whose destination was a published port, and their answers.
const TRANSLATED: &str = "-m conntrack --ctstate DNAT";
/// Matches the first packet of such a connection.
const NEWLY_TRANSLATED: &str = "-m conntrack --ctstate NEW -m conntrack --ctstate DNAT";

pub(super) fn render<F: Filtered>(view: &View<'_, F>, has_sets: bool, rules: &mut RuleSet) {
    let mut forward = rules.chain(Table::Filter, hook_chain("FORWARD"));
    for (flag, what) in [("-i", "FROM"), ("-o", "INTO")] {
        for net in &view.networks {
            forward.add(&format!("{flag} {}", net.bridge), &format!("-j {}", net.chain(what)));
        }
    }
    // Frames that the bridges of others switch are not ours to judge.
    forward.add("-m physdev --physdev-is-bridged", "-j RETURN");
    for door in view.uplinks.iter().filter(|door| !door.forwarded_before) {
        forward.count(&format!("-i {}", door.name), None, Reason::NotRouted, "-j DROP");
    }
    let mut across = rules.chain(Table::Filter, hook_chain("ACROSS"));
    for net in &view.networks {
        across.add(&format!("-o {}", net.bridge), &format!("-j {}", net.chain("ACROSS")));
    }
    for net in &view.networks {
        from(view, net, rules);
        among(net, rules);
        let has_policy = policy::render(net, has_sets, rules);
        for (chain, reason) in [("ACROSS", Reason::Isolation), ("INTO", Reason::DirectAccess)] {
            let mut into = rules.chain(Table::Filter, net.chain(chain));
            if net.is_closed() || net.side.is_none() {
                into.drop("", net.id, reason);
                continue;
            }
            if has_policy {
                let judged = "-m conntrack --ctdir ORIGINAL";
                into.add(judged, &format!("-j {}", net.chain("RULES")));
            }
            if chain == "ACROSS" {
                into.count(NEWLY_TRANSLATED, Some(net.id), Reason::FlowHairpin, "-j ACCEPT");
                into.add(TRANSLATED, "-j ACCEPT");
            } else {
                // By another interface nobody answers: who comes in there is nobody's peer.
                for door in &view.uplinks {
                    let world = format!("-j {}", net.chain("WORLD"));
                    into.add(&format!("-i {}", door.name), &world);
                }
            }
            into.drop("", net.id, reason);
        }
        if !net.is_closed() && net.side.is_some() {
            from_world(view, net, rules);
        }
        if net.is_isolated() {
            shut_off(net, rules);
        }
    }
}

/// What members of a network send that the host's stack forwards, or its bridge.
fn from<F: Filtered>(view: &View<'_, F>, net: &Net<'_, F>, rules: &mut RuleSet) {
    let mut from = rules.chain(Table::Filter, net.chain("FROM"));
    from.add(&format!("-o {}", net.bridge), &format!("-j {}", net.chain("AMONG")));
    if net.masqueraded().is_some() {
        // Nothing is translated that is not tracked.
        from.drop("-m conntrack --ctstate INVALID", net.id, Reason::Unmasqueraded);
    }
    for protocol in REFUSED {
        from.drop(&format!("-p {protocol}"), net.id, Reason::Protocol);
    }
    for door in view.uplinks.iter().filter(|door| net.leads_to(door)) {
        let leaves = format!("-o {}", door.name);
        let new = format!("{leaves} -m conntrack --ctstate NEW");
        limit(net, &leaves, &mut from);
        from.count(&new, Some(net.id), Reason::FlowOut, "-j ACCEPT");
        from.add(&leaves, "-j ACCEPT");
    }
    from.add("", &format!("-j {}", hook_chain("ACROSS")));
    from.drop("", net.id, Reason::NoUplink);
}

/// Refuses new connections of a member that has as many as it may.
fn limit<F: Filtered>(net: &Net<'_, F>, leaves: &str, chain: &mut Chain<'_>) {
    if net.network.endpoint_flows > 0 {
        let too_many = format!(
            "{leaves} -m conntrack --ctstate NEW -m connlimit --connlimit-above {} \
             --connlimit-mask {} --connlimit-saddr",
            net.network.endpoint_flows,
            F::BITS
        );
        chain.drop(&too_many, net.id, Reason::EndpointLimit);
    }
}

/// What goes from one member to another, or to itself.
fn among<F: Filtered>(net: &Net<'_, F>, rules: &mut RuleSet) {
    let mut among = rules.chain(Table::Filter, net.chain("AMONG"));
    if net.network.icc {
        among.add("", "-j ACCEPT");
        return;
    }
    for discovery in F::DISCOVERY {
        among.add(discovery, "-j ACCEPT");
    }
    among.add(TRANSLATED, "-j ACCEPT");
    among.drop("", net.id, Reason::Icc);
}

/// What comes from an uplink.
fn from_world<F: Filtered>(view: &View<'_, F>, net: &Net<'_, F>, rules: &mut RuleSet) {
    let mut world = rules.chain(Table::Filter, net.chain("WORLD"));
    world.add("-m conntrack --ctstate RELATED,ESTABLISHED", "-j ACCEPT");
    match net.network.gateway_mode {
        GatewayMode::Nat | GatewayMode::NatUnprotected => {
            world.count(NEWLY_TRANSLATED, Some(net.id), Reason::FlowIn, "-j ACCEPT");
        }
        GatewayMode::Routed => {
            world.count(F::ECHO_REQUEST, Some(net.id), Reason::FlowIn, "-j ACCEPT");
            for at in dialled_directly(view, net.id) {
                world.count(&at, Some(net.id), Reason::FlowIn, "-j ACCEPT");
            }
        }
        GatewayMode::Isolated => {}
    }
    if net.network.gateway_mode == GatewayMode::NatUnprotected {
        world.count("", Some(net.id), Reason::FlowIn, "-j ACCEPT");
    }
}

/// Matches of the published ports of a routed network, each once.
fn dialled_directly<F: Filtered>(view: &View<'_, F>, network: NetworkId) -> Vec<String> {
    let of_network = view.program.published.iter().filter(|(_, target)| {
        let endpoint = view.program.endpoints.get(&target.endpoint);
        endpoint.is_some_and(|endpoint| endpoint.network == network)
    });
    let mut matches: Vec<String> = of_network
        .filter_map(|(key, target)| {
            let (address, protocol) = (host::<F>(F::of(target.address)?), key.protocol);
            Some(format!("-d {address} -p {protocol} -m {protocol} --dport {}", target.port))
        })
        .collect();
    matches.sort();
    matches.dedup();
    matches
}

/// Keeps a network and the host from each other; they may find each other, as by ARP.
fn shut_off<F: Filtered>(net: &Net<'_, F>, rules: &mut RuleSet) {
    for (hook, flag, chain) in [("INPUT", "-i", "HOST"), ("OUTPUT", "-o", "REACH")] {
        let mut first = rules.chain(Table::Filter, hook_chain(hook));
        first.add(&format!("{flag} {}", net.bridge), &format!("-j {}", net.chain(chain)));
        let mut shut = rules.chain(Table::Filter, net.chain(chain));
        for discovery in F::DISCOVERY {
            shut.add(discovery, "-j RETURN");
        }
    }
    let mut from = rules.chain(Table::Filter, net.chain("HOST"));
    from.drop("-m addrtype --dst-type LOCAL", net.id, Reason::HostAccess);
    // What the host tells everybody is no access.
    let mut to = rules.chain(Table::Filter, net.chain("REACH"));
    to.drop("-m addrtype ! --dst-type MULTICAST", net.id, Reason::HostAccess);
}
