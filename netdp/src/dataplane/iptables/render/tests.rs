//! Whole rule sets as golden files: what a reader should check, and what a change changes.
//! `NETDP_WRITE_GOLDEN=1 cargo test -p netdp golden` writes them anew.

use std::{env, fs, net::IpAddr, path::Path};

use super::*;
use crate::{
    dataplane::{
        EndpointProgram, PublishedKey, PublishedTarget, Uplink,
        iptables::{
            rules::{Mark, PREFIX},
            text::{ChainSet, Found, transaction},
        },
    },
    family::{V4, V6},
    model::{Action, EndpointId, NatBehaviour, Protocol, Rule},
};

/// A network with both families, 172.20.0.0/24 and fd00:20::/64 for number 0x20.
fn network(number: u8) -> NetworkProgram {
    let (digits, group) = (format!("172.{number}.0"), format!("fd00:{number}:"));
    NetworkProgram {
        bridge_ifindex: number.into(),
        bridge_mac: MacAddress([2, 0, 0, 0, number, 1]),
        mtu: 1500,
        ipv4: Some(SubnetProgram {
            subnet: format!("{digits}.0/24").parse().unwrap(),
            gateway: format!("{digits}.1").parse().unwrap(),
            snat_ip: None,
        }),
        ipv6: Some(SubnetProgram {
            subnet: format!("{group}:/64").parse().unwrap(),
            gateway: format!("{group}:1").parse().unwrap(),
            snat_ip: None,
        }),
        gateway_mode: GatewayMode::Nat,
        internal: false,
        icc: true,
        masquerade: true,
        nat: NatBehaviour::EndpointDependent,
        endpoint_flows: 0,
        policy: Vec::new(),
        policy_generation: 0,
    }
}

fn endpoint(network: u8, host: u8) -> EndpointProgram {
    EndpointProgram {
        network: NetworkId(network.into()),
        ifindex: 100 + u32::from(host),
        ipv4: Some(format!("172.{network}.0.{host}").parse().unwrap()),
        ipv6: Some(format!("fd00:{network}::{host:x}").parse().unwrap()),
        mac: MacAddress([2, 0, 0, 0, network, host]),
    }
}

fn rule(action: Action, first: &str, last: &str) -> Rule {
    Rule { action, first: first.parse().unwrap(), last: last.parse().unwrap() }
}

/// Adds published ports of an endpoint, in both families.
fn publish(program: &mut Program, id: u32, address: &str, port: u16, to: u16, protocol: Protocol) {
    let endpoint = &program.endpoints[&EndpointId(id)];
    let (ipv4, ipv6) = (endpoint.ipv4.unwrap(), endpoint.ipv6.unwrap());
    let on = |address: IpAddr, target: IpAddr| {
        let key = PublishedKey { address, port, protocol };
        (key, PublishedTarget { endpoint: EndpointId(id), address: target, port: to })
    };
    let entries = match address {
        "any" => vec![
            on("0.0.0.0".parse().unwrap(), ipv4.into()),
            on("::".parse().unwrap(), ipv6.into()),
        ],
        address if address.contains(':') => vec![on(address.parse().unwrap(), ipv6.into())],
        address => vec![on(address.parse().unwrap(), ipv4.into())],
    };
    program.published.extend(entries);
}

/// Networks 20 and 21, a member each, by one uplink.
fn two_networks() -> Program {
    let uplink = Uplink {
        masquerade4: Some("10.0.0.2".parse().unwrap()),
        masquerade6: Some("fd00::2".parse().unwrap()),
        ethernet: true,
        mtu: 1500,
        forwarded_before4: false,
        forwarded_before6: true,
    };
    let names = [(1, "up0"), (20, "nd-20"), (21, "nd-21"), (102, "ndv2"), (103, "ndv3")];
    Program {
        networks: [20, 21].map(|number| (NetworkId(number.into()), network(number))).into(),
        endpoints: [(EndpointId(2), endpoint(20, 2)), (EndpointId(3), endpoint(21, 3))].into(),
        uplinks: [(1, uplink)].into(),
        names: names.map(|(ifindex, name)| (ifindex, name.to_owned())).into(),
        ..Program::default()
    }
}

/// A network in which everything is different.
fn peculiar() -> Program {
    let mut program = two_networks();
    publish(&mut program, 2, "any", 8080, 80, Protocol::Tcp);
    publish(&mut program, 2, "any", 8080, 80, Protocol::Udp);
    publish(&mut program, 2, "10.0.0.2", 8080, 81, Protocol::Tcp);
    publish(&mut program, 2, "127.0.0.1", 8082, 82, Protocol::Tcp);
    publish(&mut program, 2, "fd00::2", 7000, 7000, Protocol::Sctp);
    for port in 254..260 {
        publish(&mut program, 2, "any", port, port, Protocol::Tcp);
    }
    let a = program.networks.get_mut(&NetworkId(20)).unwrap();
    a.icc = false;
    a.endpoint_flows = 1000;
    a.ipv4.as_mut().unwrap().snat_ip = Some("10.0.0.22".parse().unwrap());
    a.policy = vec![
        rule(Action::Deny, "192.0.2.1", "192.0.2.1"),
        rule(Action::Allow, "192.0.2.0", "192.0.2.255"),
        rule(Action::Allow, "2001:db8::1", "2001:db8::3"),
        rule(Action::Deny, "0.0.0.0", "255.255.255.255"),
        rule(Action::Deny, "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ];
    let b = program.networks.get_mut(&NetworkId(21)).unwrap();
    b.ipv6 = None;
    b.gateway_mode = GatewayMode::Routed;
    program.endpoints.get_mut(&EndpointId(3)).unwrap().ipv6 = None;
    let key =
        PublishedKey { address: "0.0.0.0".parse().unwrap(), port: 8088, protocol: Protocol::Tcp };
    let address = program.endpoints[&EndpointId(3)].ipv4.unwrap().into();
    let target = PublishedTarget { endpoint: EndpointId(3), address, port: 88 };
    program.published.insert(key, target);
    program
}

/// An internal and an isolated network.
fn closed() -> Program {
    let mut program = two_networks();
    program.networks.get_mut(&NetworkId(20)).unwrap().internal = true;
    program.networks.get_mut(&NetworkId(21)).unwrap().gateway_mode = GatewayMode::Isolated;
    program
}

fn text<F: Filtered>(program: &Program) -> String {
    let rules = render::<F>(program, true);
    let all: ChainSet = rules
        .tables
        .iter()
        .flat_map(|(&table, chains)| chains.keys().map(move |name| (table, name.clone())))
        .collect();
    transaction(&rules, &Found::default(), &all).unwrap_or_default()
}

#[track_caller]
fn check(name: &str, program: &Program) {
    for (family, text) in [("ipv4", text::<V4>(program)), ("ipv6", text::<V6>(program))] {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/src/dataplane/iptables/golden");
        let path = Path::new(directory).join(format!("{name}.{family}"));
        if env::var_os("NETDP_WRITE_GOLDEN").is_some() {
            fs::create_dir_all(directory).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(text, golden, "{}", path.display());
    }
}

#[test]
fn golden_two_networks() {
    check("two-networks", &two_networks());
}

#[test]
fn golden_ports_policy_and_other_modes() {
    check("peculiar", &peculiar());
}

#[test]
fn golden_closed_networks() {
    check("closed", &closed());
}

#[test]
fn a_host_without_networks_has_no_rules() {
    let program = Program { networks: BTreeMap::new(), ..two_networks() };
    assert_eq!(text::<V4>(&program), "");
}

#[test]
fn every_drop_is_counted_and_every_chain_is_named_and_led_to() {
    for program in [two_networks(), peculiar(), closed()] {
        let rules = render::<V6>(&program, true);
        for (table, chains) in &rules.tables {
            for (name, rules) in chains {
                assert!(name.starts_with(PREFIX) && name.len() <= 28, "{name}");
                for rule in rules.iter().filter(|rule| rule.ends_with("-j DROP")) {
                    assert!(Mark::of(rule).is_some(), "{name}: {rule}");
                }
            }
            let targets: Vec<&str> = chains
                .values()
                .flatten()
                .filter_map(|rule| rule.split(' ').next_back())
                .filter(|target| target.starts_with(PREFIX))
                .collect();
            for target in &targets {
                assert!(chains.contains_key(*target), "{target} in {}", table.name());
            }
            let hooks: Vec<String> = table.hooks().iter().map(|hook| hook_chain(hook)).collect();
            for name in chains.keys().filter(|name| !hooks.contains(name)) {
                assert!(targets.contains(&name.as_str()), "{name} in {}", table.name());
            }
        }
    }
}

/// The tables are written one after the other, so neither may count on the other.
#[test]
fn without_an_address_nothing_leaves_nor_would_it_as_it_is() {
    let mut program = two_networks();
    program.uplinks.get_mut(&1).unwrap().masquerade4 = None;
    let rules = render::<V4>(&program, true);
    let from = &rules.table(Table::Filter).unwrap()["NETDP-FROM-20"];
    assert!(!from.iter().any(|rule| rule.contains("-o up0")), "{from:?}");
    let out = &rules.table(Table::Nat).unwrap()["NETDP-OUT-20"];
    assert_eq!(
        *out,
        [
            "-o up0 -p tcp -j MASQUERADE --to-ports 50000-60999",
            "-o up0 -p udp -j MASQUERADE --to-ports 50000-60999",
            "-o up0 -j MASQUERADE",
        ]
    );
}

#[test]
fn one_port_more_is_one_chain_written() {
    let before = peculiar();
    let mut after = before.clone();
    publish(&mut after, 2, "any", 8081, 81, Protocol::Tcp);
    let (before, after) = (render::<V4>(&before, true), render::<V4>(&after, true));
    let chains = |set: &RuleSet| set.table(Table::Nat).unwrap().clone();
    let (before, after) = (chains(&before), chains(&after));
    let changed: Vec<_> =
        after.iter().filter(|(name, rules)| before.get(*name) != Some(rules)).collect();
    assert_eq!(changed.len(), 1, "{changed:?}");
    assert_eq!(changed[0].0, "NETDP-PORTS-tcp-1f");
}

#[test]
fn many_rules_with_the_same_effect_are_one_set_in_their_place() {
    let mut program = two_networks();
    let number = u32::try_from(policy::MANY).unwrap();
    let allow = |number: u32| {
        let first = IpAddr::from(std::net::Ipv4Addr::from(0xc000_0200 + 4 * number));
        let last = IpAddr::from(std::net::Ipv4Addr::from(0xc000_0200 + 4 * number + 2));
        Rule { action: Action::Allow, first, last }
    };
    let mut rules = vec![rule(Action::Deny, "192.0.2.1", "192.0.2.1")];
    rules.extend((0..number).map(allow));
    rules.push(rule(Action::Deny, "0.0.0.0", "255.255.255.255"));
    program.networks.get_mut(&NetworkId(20)).unwrap().policy = rules;

    let rendered = render::<V4>(&program, true);
    let chain = &rendered.table(Table::Filter).unwrap()["NETDP-RULES-20"];
    let (name, prefixes) = rendered.sets.first_key_value().unwrap();
    let drop = "-m comment --comment netdp:20:policy -j DROP";
    let expected = [
        format!("-s 192.0.2.1/32 {drop}"),
        format!("-m set --match-set {name} src -j RETURN"),
        drop.to_owned(),
    ];
    assert_eq!(*chain, expected);
    // Three addresses are two prefixes.
    assert_eq!((rendered.sets.len(), prefixes.len()), (1, 2 * policy::MANY));
    let without = render::<V4>(&program, false);
    assert_eq!(without.sets.len(), 0);
    assert_eq!(without.table(Table::Filter).unwrap()["NETDP-RULES-20"].len(), policy::MANY + 2);
}
