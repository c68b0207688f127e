//! Whole plans from whole models, and what holds for every plan.

use std::{collections::BTreeSet, path::PathBuf};

use proptest::prelude::*;

use super::*;
use crate::{
    dataplane::PublishedTarget,
    model::{GatewayMode, Protocol, PublishedPort, Subnet4},
};

const A: NetworkId = NetworkId(1);
const A1: EndpointId = EndpointId(1);

fn network(id: u32) -> Network {
    let subnet = format!("172.{}.0.0/24", 19 + id).parse().unwrap();
    let gateway = Ipv4Addr::new(172, 19 + id as u8, 0, 1);
    Network {
        id: NetworkId(id),
        name: format!("n{id}"),
        bridge: format!("nd-{id}"),
        ipv4: Subnet4 { subnet, gateway, range: subnet },
        gateway_mode: GatewayMode::Nat,
        internal: false,
        icc: true,
        masquerade: true,
        mtu: 1500,
        host_binding: Ipv4Addr::UNSPECIFIED,
        snat_ip: None,
        policy: Vec::new(),
        policy_generation: 0,
        next_address: gateway,
    }
}

fn endpoint(id: u32, network: &Network, published: Vec<PublishedPort>) -> Endpoint {
    let [a, b, c, _] = network.ipv4.gateway.octets();
    Endpoint {
        id: EndpointId(id),
        network: network.id,
        name: format!("e{id}"),
        netns: PathBuf::from(format!("/run/netns/e{id}")),
        netns_identity: NetnsIdentity { device: 4, inode: u64::from(id) },
        host_interface: format!("ndv{id}"),
        interface: "eth0".into(),
        address: Ipv4Addr::new(a, b, c, 1 + id as u8),
        mac: MacAddress([2, 0x42, a, b, c, 1 + id as u8]),
        published,
    }
}

const WEB: PublishedPort = PublishedPort {
    protocol: Protocol::Tcp,
    host_address: Ipv4Addr::UNSPECIFIED,
    host_port: 8080,
    container_port: 80,
};

fn model() -> Model {
    let network = network(1);
    let endpoint = endpoint(1, &network, vec![WEB]);
    Model {
        networks: [(A, network)].into(),
        endpoints: [(A1, endpoint)].into(),
        ..Model::default()
    }
}

fn link(name: &str) -> Link {
    Link {
        name: name.into(),
        alias: None,
        kind: match name {
            _ if name.starts_with("nd-") => Some("bridge".into()),
            _ if name.starts_with("ndv") => Some("veth".into()),
            _ => None,
        },
        master: None,
        mac: Some(MacAddress([6; 6])),
        mtu: 1500,
        up: true,
        loopback: false,
        addresses: Vec::new(),
        forwarding: false,
    }
}

/// lo, eth0 with two addresses, a tun device, and a bond with its port.
fn host() -> HostFacts {
    let addresses = |nets: &[&str]| nets.iter().map(|net| net.parse().unwrap()).collect();
    let lo =
        Link { loopback: true, mac: None, addresses: addresses(&["127.0.0.1/8"]), ..link("lo") };
    let eth0 = Link { addresses: addresses(&["10.0.0.2/24", "10.0.0.9/24"]), ..link("eth0") };
    let tun0 = Link { mac: None, forwarding: true, up: false, ..link("tun0") };
    let port = Link { master: Some(5), ..link("eth1") };
    let bond = Link { addresses: addresses(&["169.254.1.1/16", "10.1.0.2/24"]), ..link("bond0") };
    HostFacts {
        links: [(1, lo), (2, eth0), (3, tun0), (4, port), (5, bond)].into(),
        routes: Vec::new(),
        is_router: false,
        ephemeral_ports: (32_768, 60_999),
        ports_in_use: BTreeSet::new(),
    }
}

/// The same host after the links of [`model`] were made.
fn host_with_links() -> HostFacts {
    let mut facts = host();
    let bridge = Link {
        alias: Some("netdp network n1".into()),
        addresses: vec!["172.20.0.1/24".parse().unwrap()],
        forwarding: true,
        ..link("nd-1")
    };
    let veth =
        Link { alias: Some("netdp endpoint n1/e1".into()), master: Some(10), ..link("ndv1") };
    facts.links.extend([(10, bridge), (11, veth)]);
    facts
}

#[test]
fn a_host_without_networks_is_left_as_it_is() {
    let plan = plan(&Model::default(), &host(), &Setting::default());
    let expected = Plan {
        program: Program {
            local: ["10.0.0.2", "10.0.0.9", "169.254.1.1", "10.1.0.2"]
                .map(|address| address.parse().unwrap())
                .into(),
            ..Program::default()
        },
        ..Plan::default()
    };
    assert_eq!(plan, expected);
}

#[test]
fn the_first_plan_makes_links_and_keeps_them_from_the_backend_until_they_exist() {
    let plan = plan(&model(), &host(), &Setting::default());
    let bridge = BridgePlan {
        name: "nd-1".into(),
        alias: "netdp network n1".into(),
        mac: MacAddress([0x02, 0x42, 172, 20, 0, 1]),
        mtu: 1500,
        address: "172.20.0.1/24".parse().unwrap(),
    };
    let veth = VethPlan {
        name: "ndv1".into(),
        alias: "netdp endpoint n1/e1".into(),
        bridge: "nd-1".into(),
        mtu: 1500,
        netns: "/run/netns/e1".into(),
        netns_identity: NetnsIdentity { device: 4, inode: 1 },
        interface: "eth0".into(),
        mac: MacAddress([0x02, 0x42, 172, 20, 0, 2]),
        address: "172.20.0.2/24".parse().unwrap(),
        gateway: Some(Ipv4Addr::new(172, 20, 0, 1)),
    };
    assert_eq!(plan.bridges, [(A, bridge)].into());
    assert_eq!(plan.veths, [(A1, veth)].into());
    assert_eq!(plan.orphans, BTreeSet::new());
    assert_eq!(plan.reservations, [PublishedKey::from(&WEB)].into());
    assert!(plan.program.networks.is_empty() && plan.program.endpoints.is_empty());
    assert!(plan.program.published.is_empty());
}

#[test]
fn the_program_names_what_exists() {
    let plan = plan(&model(), &host_with_links(), &Setting::default());
    let target = PublishedTarget { endpoint: A1, address: Ipv4Addr::new(172, 20, 0, 2), port: 80 };
    let uplink = |masquerade: Option<[u8; 4]>, ethernet, forwarded_before| Uplink {
        masquerade: masquerade.map(Ipv4Addr::from),
        ethernet,
        forwarded_before,
    };
    let expected = Program {
        nat_ports: NatPorts::default(),
        networks: [(
            A,
            NetworkProgram {
                bridge_ifindex: 10,
                bridge_mac: MacAddress([0x02, 0x42, 172, 20, 0, 1]),
                subnet: "172.20.0.0/24".parse().unwrap(),
                gateway: Ipv4Addr::new(172, 20, 0, 1),
                gateway_mode: GatewayMode::Nat,
                internal: false,
                icc: true,
                masquerade: true,
                snat_ip: None,
                policy: Vec::new(),
                policy_generation: 0,
            },
        )]
        .into(),
        endpoints: [(
            A1,
            EndpointProgram {
                network: A,
                ifindex: 11,
                address: Ipv4Addr::new(172, 20, 0, 2),
                mac: MacAddress([0x02, 0x42, 172, 20, 0, 2]),
            },
        )]
        .into(),
        published: [(PublishedKey::from(&WEB), target)].into(),
        uplinks: [
            (2, uplink(Some([10, 0, 0, 2]), true, false)),
            (3, uplink(None, false, true)),
            (5, uplink(Some([10, 1, 0, 2]), true, false)),
        ]
        .into(),
        local: ["10.0.0.2", "10.0.0.9", "169.254.1.1", "10.1.0.2", "172.20.0.1"]
            .map(|address| address.parse().unwrap())
            .into(),
    };
    assert_eq!(plan.program, expected);
    let on = || SysctlPlan::Is("1".into());
    let sysctls = [
        ("net/ipv4/conf/bond0/forwarding", on()),
        ("net/ipv4/conf/eth0/forwarding", on()),
        ("net/ipv4/conf/tun0/forwarding", on()),
        (RESERVED_PORTS_SYSCTL, SysctlPlan::Covers(50_000, 60_999)),
    ];
    assert_eq!(plan.sysctls, sysctls.map(|(path, value)| (path.to_owned(), value)).into());
    assert_eq!(link_drift(&plan, &host_with_links())[0].what, "uplink eth0 does not forward");
}

#[test]
fn named_uplinks_are_the_only_ones() {
    let setting =
        Setting { uplinks: ["eth0".to_owned(), "wan0".to_owned()].into(), ..Setting::default() };
    let plan = plan(&model(), &host(), &setting);
    assert_eq!(plan.program.uplinks.into_keys().collect::<Vec<_>>(), [2]);
}

#[test]
fn an_uplink_that_we_switched_on_did_not_forward_before() {
    let mut facts = host();
    facts.links.get_mut(&2).unwrap().forwarding = true;
    let originals = [(forwarding_sysctl("eth0"), "0".to_owned())].into();
    let ours = plan(&model(), &facts, &Setting { originals, ..Setting::default() });
    assert!(!ours.program.uplinks[&2].forwarded_before);
    let foreign = plan(&model(), &facts, &Setting::default());
    assert!(foreign.program.uplinks[&2].forwarded_before);
}

#[test]
fn closed_networks_give_no_default_route() {
    for closed in [
        Network { internal: true, ..network(1) },
        Network { gateway_mode: GatewayMode::Isolated, ..network(1) },
    ] {
        let mut model = model();
        model.networks.insert(A, closed);
        assert_eq!(plan(&model, &host(), &Setting::default()).veths[&A1].gateway, None);
    }
}

#[test]
fn a_foreign_link_under_our_name_is_neither_used_nor_an_orphan() {
    let mut facts = host_with_links();
    facts.links.get_mut(&10).unwrap().alias = None;
    let plan = plan(&model(), &facts, &Setting::default());
    assert!(plan.program.networks.is_empty());
    assert!(plan.program.endpoints.is_empty(), "an endpoint needs its network");
    assert!(plan.orphans.is_empty());
}

#[test]
fn links_of_ours_that_nothing_names_are_orphans() {
    let mut model = model();
    model.endpoints.clear();
    assert_eq!(plan(&model, &host_with_links(), &Setting::default()).orphans, [11].into());
    let plan = plan(&Model::default(), &host_with_links(), &Setting::default());
    assert_eq!(plan.orphans, [10, 11].into());
    assert_eq!(plan.program.networks, [].into());
}

#[test]
fn drift_says_what_is_missing_down_or_left_over() {
    let setting = Setting { uplinks: ["tun0".to_owned()].into(), ..Setting::default() };
    let drift = |facts: &HostFacts| -> Vec<String> {
        link_drift(&plan(&model(), facts, &setting), facts)
            .into_iter()
            .map(|drift| drift.what)
            .collect()
    };
    let mut facts = host_with_links();
    assert!(drift(&facts).is_empty());
    let bridge = facts.links.get_mut(&10).unwrap();
    (bridge.up, bridge.forwarding) = (false, false);
    bridge.addresses.clear();
    facts.links.get_mut(&11).unwrap().master = None;
    facts.links.insert(12, Link { alias: Some("netdp endpoint n1/old".into()), ..link("ndv7") });
    assert_eq!(
        drift(&facts),
        [
            "bridge nd-1 is down",
            "bridge nd-1 lacks 172.20.0.1/24",
            "bridge nd-1 does not forward",
            "interface ndv1 is no port of nd-1",
            "interface ndv7 belongs to nothing any more",
        ]
    );
    assert_eq!(
        drift(&host()),
        ["bridge nd-1 is missing", "interface ndv1 (netdp endpoint n1/e1) is missing"]
    );
}

prop_compose! {
    /// Any subset of some networks and of their endpoints, and any subset of their links.
    fn world()(
        networks in prop::collection::btree_set(1u32..6, 0..5),
        endpoints in prop::collection::btree_map(1u32..30, 1u32..6, 0..12),
        links in prop::collection::btree_set(1u32..36, 0..30),
        internal in any::<bool>(),
    ) -> (Model, HostFacts) {
        let mut model = Model::default();
        for id in networks {
            model.networks.insert(NetworkId(id), Network { internal, ..network(id) });
        }
        for (id, member_of) in endpoints {
            let port = PublishedPort { host_port: 8000 + id as u16, ..WEB };
            let endpoint = endpoint(id, &network(member_of), vec![port]);
            model.endpoints.insert(EndpointId(id), endpoint);
        }
        let mut facts = host();
        for id in links {
            let made = if id < 6 {
                Link { alias: Some(format!("netdp network n{id}")), ..link(&format!("nd-{id}")) }
            } else {
                let id = id - 5;
                let alias = model.endpoints.get(&EndpointId(id)).map_or_else(
                    || format!("netdp endpoint gone/e{id}"),
                    |endpoint| model.alias(endpoint),
                );
                Link { alias: Some(alias), ..link(&format!("ndv{id}")) }
            };
            facts.links.insert(100 + id, made);
        }
        (model, facts)
    }
}

proptest! {
    #[test]
    fn the_same_input_gives_the_same_plan((model, facts) in world()) {
        let first = plan(&model, &facts, &Setting::default());
        prop_assert_eq!(&first, &plan(&model.clone(), &facts.clone(), &Setting::default()));
    }

    #[test]
    fn a_program_is_closed_and_every_link_of_ours_is_used_or_an_orphan(
        (model, facts) in world(),
    ) {
        let plan = plan(&model, &facts, &Setting::default());
        let program = &plan.program;
        for endpoint in program.endpoints.values() {
            prop_assert!(program.networks.contains_key(&endpoint.network));
        }
        for (key, target) in &program.published {
            prop_assert!(program.endpoints.contains_key(&target.endpoint));
            prop_assert!(plan.reservations.contains(key));
        }
        for (ifindex, link) in &facts.links {
            if link.is_ours() {
                prop_assert!(!program.uplinks.contains_key(ifindex));
                prop_assert_ne!(plan.names(&link.name), plan.orphans.contains(ifindex));
            } else {
                prop_assert!(!plan.orphans.contains(ifindex));
            }
        }
    }
}
