//! Whole plans from whole models, and what holds for every plan.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{
    dataplane::PublishedTarget,
    facts::{Ipv6Mode, LinkAddress, Links, PortRanges},
    model::{
        Engaged, GatewayMode, NatBehaviour, NetnsIdentity, Protocol, PublishedPort, policy,
        tests::steady,
    },
};

const A: NetworkId = NetworkId(1);
const A1: EndpointId = EndpointId(1);

fn side<F: Family>(subnet: F::Net) -> Option<Subnet<F>> {
    Some(Subnet {
        subnet,
        gateway: F::next(F::first(subnet)),
        range: subnet,
        next_address: F::first(subnet),
        host_binding: Some(F::UNSPECIFIED),
        snat_ip: None,
    })
}

fn network(id: u32) -> Network {
    Network {
        id: NetworkId(id),
        name: format!("n{id}"),
        engine_id: None,
        bridge: format!("nd-{id}"),
        ipv4: side(format!("172.{}.0.0/24", 19 + id).parse().unwrap()),
        ipv6: None,
        gateway_mode: GatewayMode::Nat,
        internal: false,
        icc: true,
        masquerade: true,
        nat: NatBehaviour::EndpointIndependent,
        mtu: 1500,
        endpoint_flows: 1000,
        reserved: BTreeSet::new(),
        policy: Vec::new(),
        policy_generation: 0,
    }
}

/// The same network with an IPv6 side.
fn dual_network(id: u32) -> Network {
    let ipv6 = side(format!("fd00:{}::/64", 19 + id).parse().unwrap());
    Network { ipv6, ..network(id) }
}

fn netns(id: u32) -> Netns {
    Netns {
        path: format!("/run/netns/e{id}").into(),
        identity: NetnsIdentity { device: 4, inode: u64::from(id) },
    }
}

fn endpoint(id: u32, network: &Network, published: Vec<PublishedPort>) -> Endpoint {
    let host = |first: u128| first + 1 + u128::from(id);
    let ipv4 = network.ipv4.map(|side| V4::address(host(V4::bits(V4::first(side.subnet)))));
    let ipv6 = network.ipv6.map(|side| V6::address(host(V6::bits(V6::first(side.subnet)))));
    Endpoint {
        id: EndpointId(id),
        network: network.id,
        name: format!("e{id}"),
        place: Place::Netns(netns(id)),
        host_interface: format!("ndv{id}"),
        interface: "eth0".into(),
        ipv4,
        ipv6,
        mac: MacAddress([2, 0x42, 172, 20, 0, 1 + id as u8]),
        published: published.iter().map(|port| (port.key(), port.container_port)).collect(),
    }
}

const WEB: PublishedPort = PublishedPort {
    protocol: Protocol::Tcp,
    host_address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    host_port: 8080,
    container_port: 80,
};

fn in_ipv6(port: PublishedPort) -> PublishedPort {
    PublishedPort { host_address: Ipv6Addr::UNSPECIFIED.into(), ..port }
}

/// [`model`] with both families.
fn dual_model() -> Model {
    let network = dual_network(1);
    let endpoint = endpoint(1, &network, vec![WEB, in_ipv6(WEB)]);
    Model {
        networks: [(A, network)].into(),
        endpoints: [(A1, endpoint)].into(),
        ..Model::default()
    }
}

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
        forces_forwarding: false,
        is_filtered: false,
        ipv6: Ipv6Mode::Other,
    }
}

/// lo, eth0 with two addresses, a tun device, and a bond with its port.
fn host() -> HostFacts {
    let addresses = |nets: &[&str]| nets.iter().map(|net| steady(net)).collect();
    let lo =
        Link { loopback: true, mac: None, addresses: addresses(&["127.0.0.1/8"]), ..link("lo") };
    let eth0 = Link { addresses: addresses(&["10.0.0.2/24", "10.0.0.9/24"]), ..link("eth0") };
    let tun0 = Link { mac: None, forwarding: true, up: false, ..link("tun0") };
    let port = Link { master: Some(5), ..link("eth1") };
    let bond = Link { addresses: addresses(&["169.254.1.1/16", "10.1.0.2/24"]), ..link("bond0") };
    HostFacts {
        links: Links::from_iter([(1, lo), (2, eth0), (3, tun0), (4, port), (5, bond)]),
        routes: Vec::new(),
        is_router: false,
        is_ipv6_router: false,
        has_ipv6: true,
        can_force_forwarding: true,
        ephemeral_ports: (32_768, 60_999),
        reserved_ports: Some(PortRanges::parse("50000-60999")),
        has_ipsec: false,
        ports_in_use: BTreeSet::new(),
    }
}

/// The same host after the links of [`model`] were made.
fn host_with_links() -> HostFacts {
    let mut facts = host();
    let bridge = Link {
        alias: Some("netdp network n1".into()),
        addresses: vec![steady("172.20.0.1/24")],
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
        program: Arc::new(Program {
            local: ["10.0.0.2", "10.0.0.9", "169.254.1.1", "10.1.0.2"]
                .map(|address| address.parse().unwrap())
                .into(),
            ..Program::default()
        }),
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
        ipv4: Some("172.20.0.1/24".parse().unwrap()),
        ipv6: None,
        is_filtered: false,
    };
    let veth = VethPlan {
        name: "ndv1".into(),
        alias: "netdp endpoint n1/e1".into(),
        bridge: "nd-1".into(),
        mtu: 1500,
        netns: Some(netns(1)),
        interface: "eth0".into(),
        mac: MacAddress([0x02, 0x42, 172, 20, 0, 2]),
        ipv4: Some(InterfacePlan {
            address: "172.20.0.2/24".parse().unwrap(),
            gateway: Some(Ipv4Addr::new(172, 20, 0, 1)),
        }),
        ipv6: None,
        is_filtered: false,
    };
    assert_eq!(plan.bridges, [(A, bridge)].into());
    assert_eq!(plan.veths, [(A1, veth)].into());
    assert_eq!(plan.orphans, BTreeSet::new());
    assert_eq!(reservations(&model()), [(WEB.key(), ())].into());
    assert!(plan.program.networks.is_empty() && plan.program.endpoints.is_empty());
    assert!(plan.program.published.is_empty());
}

#[test]
fn a_container_has_one_way_out_and_its_ports_follow_it() {
    let (mut model, b, b1) = (model(), NetworkId(2), EndpointId(2));
    let place = Place::Netns(netns(1));
    let second = Endpoint { place, ..endpoint(2, &network(2), vec![WEB]) };
    model.networks.insert(b, network(2));
    model.endpoints.insert(b1, second);
    let gateways = |model: &Model| {
        let plan = plan(model, &host(), &Setting::default());
        [A1, b1].map(|id| plan.veths[&id].ipv4.unwrap().gateway.is_some())
    };
    let targets = |model: &Model| -> Vec<EndpointId> {
        publications(model).map(|(_, endpoint)| endpoint.id).collect()
    };
    // Whichever endpoint a port was given to.
    model.endpoints.get_mut(&A1).unwrap().published.clear();
    assert_eq!((gateways(&model), targets(&model)), ([true, false], vec![A1]));
    model.networks.get_mut(&A).unwrap().internal = true;
    assert_eq!((gateways(&model), targets(&model)), ([false, true], vec![b1]));
    // Without any way out there is nowhere to follow it to.
    model.networks.get_mut(&b).unwrap().internal = true;
    assert_eq!((gateways(&model), targets(&model)), ([false, false], vec![b1]));
}

#[test]
fn the_program_names_what_exists() {
    let plan = plan(&model(), &host_with_links(), &Setting::default());
    let address = Ipv4Addr::new(172, 20, 0, 2);
    let target = PublishedTarget { endpoint: A1, address: address.into(), port: 80 };
    let uplink = |masquerade: Option<[u8; 4]>, ethernet, forwarded_before4| Uplink {
        masquerade4: masquerade.map(Ipv4Addr::from),
        masquerade6: None,
        mtu: 1500,
        ethernet,
        forwarded_before4,
        forwarded_before6: false,
    };
    let expected = Program {
        names: [(10, "nd-1"), (11, "ndv1"), (2, "eth0"), (3, "tun0"), (5, "bond0")]
            .map(|(ifindex, name)| (ifindex, name.to_owned()))
            .into(),
        needs_stack: false,
        nat_ports: NatPorts::default(),
        networks: [(
            A,
            NetworkProgram {
                bridge_ifindex: 10,
                bridge_mac: MacAddress([0x02, 0x42, 172, 20, 0, 1]),
                mtu: 1500,
                ipv4: Some(SubnetProgram {
                    subnet: "172.20.0.0/24".parse().unwrap(),
                    gateway: Ipv4Addr::new(172, 20, 0, 1),
                    snat_ip: None,
                }),
                ipv6: None,
                gateway_mode: GatewayMode::Nat,
                internal: false,
                icc: true,
                masquerade: true,
                nat: NatBehaviour::EndpointIndependent,
                endpoint_flows: 1000,
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
                ipv4: Some(address),
                ipv6: None,
                mac: MacAddress([0x02, 0x42, 172, 20, 0, 2]),
            },
        )]
        .into(),
        blank: None,
        published: [(WEB.key(), target)].into(),
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
    assert_eq!(*plan.program, expected);
    let on = || SysctlPlan::Is("1".into());
    let sysctls = [
        ("net/ipv4/conf/bond0/forwarding", on()),
        ("net/ipv4/conf/eth0/forwarding", on()),
        ("net/ipv4/conf/tun0/forwarding", on()),
        (RESERVED_PORTS_SYSCTL, SysctlPlan::Covers(50_000, 60_999)),
    ];
    assert_eq!(plan.sysctls, sysctls.map(|(path, value)| (path.to_owned(), value)).into());
    assert_eq!(link_drift(&plan, &host_with_links())[0].what, "uplink eth0 does not forward");
    let others = Some(PortRanges::parse("7"));
    let anybodys = HostFacts { reserved_ports: others, ..host_with_links() };
    let drift = link_drift(&plan, &anybodys);
    assert!(drift.iter().any(|it| it.what == "the host does not reserve ports 50000-60999"));
}

#[test]
fn named_uplinks_are_the_only_ones() {
    let setting =
        Setting { uplinks: ["eth0".to_owned(), "wan0".to_owned()].into(), ..Setting::default() };
    let plan = plan(&model(), &host(), &setting);
    assert_eq!(plan.program.uplinks.keys().copied().collect::<Vec<_>>(), [2]);
}

#[test]
fn an_uplink_that_we_switched_on_did_not_forward_before() {
    let mut facts = host();
    facts.links.get_mut(2).unwrap().forwarding = true;
    let originals = [(forwarding_sysctl("eth0"), "0".to_owned())].into();
    let ours = plan(&model(), &facts, &Setting { originals, ..Setting::default() });
    assert!(!ours.program.uplinks[&2].forwarded_before4);
    let foreign = plan(&model(), &facts, &Setting::default());
    assert!(foreign.program.uplinks[&2].forwarded_before4);
}

#[test]
fn closed_networks_give_no_default_route() {
    for closed in [
        Network { internal: true, ..network(1) },
        Network { gateway_mode: GatewayMode::Isolated, ..network(1) },
    ] {
        let mut model = model();
        model.networks.insert(A, closed);
        assert_eq!(
            plan(&model, &host(), &Setting::default()).veths[&A1].ipv4.unwrap().gateway,
            None
        );
    }
}

#[test]
fn a_foreign_link_under_our_name_is_neither_used_nor_an_orphan() {
    let mut facts = host_with_links();
    facts.links.get_mut(10).unwrap().alias = None;
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
fn an_offered_end_is_ours_under_its_own_name_only() {
    let mut model = model();
    let engaged = Engaged { id: "e".into(), sandbox: None };
    let endpoint = model.endpoints.get_mut(&A1).unwrap();
    (endpoint.place, endpoint.interface) = (Place::Engine(engaged), "ndc1".into());
    let offered = |name: &str| {
        let alias = Some("netdp offer ndc1".into());
        (20, Link { alias, kind: Some("veth".into()), ..link(name) })
    };
    let plan_of = |model: &Model, facts: &HostFacts| plan(model, facts, &Setting::default());

    let mut facts = host_with_links();
    facts.links.extend([offered("ndc1")]);
    let waiting = plan_of(&model, &facts);
    assert_eq!(waiting.veths[&A1].netns, None);
    assert_eq!(waiting.orphans, [].into());
    assert!(!waiting.program.uplinks.contains_key(&20));
    assert_eq!(plan_of(&Model::default(), &facts).orphans, [10, 11, 20].into());
    // In a container that runs an agent of its own, it is that container's.
    facts.links.extend([offered("eth7")]);
    assert_eq!(plan_of(&Model::default(), &facts).orphans, [10, 11].into());
    // Gone with its container: nothing to repair.
    let facts = host();
    let drift = link_drift(&plan_of(&model, &facts), &facts);
    assert!(!drift.iter().any(|drift| drift.what.contains("ndv1")), "{drift:?}");
}

/// An end of a pair that carries nothing yet.
fn unused_end(name: &str, alias: &str) -> Link {
    Link { alias: Some(alias.into()), kind: Some("veth".into()), up: false, ..link(name) }
}

/// A host with a blank, 30 and 31, and the model and the setting that want it.
fn with_blank() -> (Model, HostFacts, Setting) {
    let mut model = model();
    model.networks.get_mut(&A).unwrap().engine_id = Some("n".into());
    let mut facts = host_with_links();
    facts.links.extend([
        (30, unused_end("ndv0", "netdp blank")),
        (31, unused_end("ndc0", "netdp offer ndc0")),
    ]);
    let uplinks = ["tun0".to_owned()].into();
    (model, facts, Setting { keeps_blank: true, uplinks, ..Setting::default() })
}

#[test]
fn a_blank_waits_where_an_engine_has_a_network() {
    let (model, facts, setting) = with_blank();
    let ready = plan(&model, &facts, &setting);
    assert_eq!(ready.blank, Some(Blank { host_end: 30, container_end: 31 }));
    assert_eq!((ready.program.blank, &ready.orphans), (Some(30), &[].into()));
    let anywhere = plan(&model, &facts, &Setting { uplinks: BTreeSet::new(), ..setting.clone() });
    assert!(![30, 31].iter().any(|ifindex| anywhere.program.uplinks.contains_key(ifindex)));
    assert_eq!(link_drift(&ready, &facts), []);
    // That there is none yet is nothing to repair.
    let without = host_with_links();
    let lacking = plan(&model, &without, &setting);
    assert!(blank::is_wanted(&model, &setting) && lacking.blank.is_none());
    assert_eq!(link_drift(&lacking, &without), []);
}

#[test]
fn a_blank_that_nobody_waits_for_goes() {
    let (model, facts, setting) = with_blank();
    let own_networks = self::model();
    for (model, setting) in
        [(&model, &Setting::default()), (&own_networks, &setting), (&Model::default(), &setting)]
    {
        let plan = plan(model, &facts, setting);
        assert_eq!((plan.blank, plan.program.blank), (None, None));
        assert!(plan.orphans.is_superset(&[30, 31].into()), "{:?}", plan.orphans);
    }
}

#[test]
fn what_is_no_whole_blank_goes() {
    type Damage = fn(&mut Link);
    let damages: [(u32, Damage); 5] = [
        (30, |link| link.up = true),
        (30, |link| link.master = Some(10)),
        (30, |link| link.alias = Some("netdp unfinished".into())),
        (31, |link| link.alias = Some("netdp unfinished".into())),
        (31, |link| link.up = true),
    ];
    for (ifindex, damage) in damages {
        let (model, mut facts, setting) = with_blank();
        damage(facts.links.get_mut(ifindex).unwrap());
        let plan = plan(&model, &facts, &setting);
        assert_eq!((plan.blank, plan.orphans), (None, [30, 31].into()));
    }
    // One end is somebody's by now, under another name; or was given, when the agent ended.
    for (name, alias, orphans) in
        [("eth0", "netdp offer ndc0", &[30][..]), ("ndc7", "netdp offer ndc7", &[30, 31])]
    {
        let (model, mut facts, setting) = with_blank();
        let others = facts.links.iter().filter(|(ifindex, _)| **ifindex != 31);
        let others = others.map(|(&ifindex, link)| (ifindex, link.clone()));
        facts.links = others.chain([(31, unused_end(name, alias))]).collect();
        let plan = plan(&model, &facts, &setting);
        assert_eq!((plan.blank, plan.orphans), (None, orphans.iter().copied().collect()));
    }
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
    let bridge = facts.links.get_mut(10).unwrap();
    (bridge.up, bridge.forwarding) = (false, false);
    bridge.addresses.clear();
    facts.links.get_mut(11).unwrap().master = None;
    facts
        .links
        .extend([(12, Link { alias: Some("netdp endpoint n1/old".into()), ..link("ndv7") })]);
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

#[test]
fn both_families_of_a_network_are_planned() {
    let mut model = dual_model();
    model.networks.get_mut(&A).unwrap().policy = policy::parse("deny from any").unwrap();
    let mut facts = host_with_links();
    facts.links.get_mut(2).unwrap().addresses.extend(["fd00::2/64", "fe80::2/64"].map(steady));
    let plan = plan(&model, &facts, &Setting::default());

    assert_eq!(plan.bridges[&A].ipv6, Some("fd00:20::1/64".parse().unwrap()));
    let expected = InterfacePlan {
        address: "fd00:20::2/64".parse().unwrap(),
        gateway: Some("fd00:20::1".parse().unwrap()),
    };
    assert_eq!(plan.veths[&A1].ipv6, Some(expected));
    let program = &plan.program;
    let side = SubnetProgram {
        subnet: "fd00:20::/64".parse().unwrap(),
        gateway: "fd00:20::1".parse().unwrap(),
        snat_ip: None,
    };
    assert_eq!(program.networks[&A].ipv6, Some(side));
    let ranges: Vec<_> = program.networks[&A]
        .policy
        .iter()
        .map(|rule| format!("{}-{}", rule.first, rule.last))
        .collect();
    let all_ipv6 = "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
    assert_eq!(ranges, ["0.0.0.0-255.255.255.255", all_ipv6], "any means both");
    assert_eq!(program.endpoints[&A1].ipv6, Some("fd00:20::2".parse().unwrap()));
    let target = program.published.get(in_ipv6(WEB).key()).unwrap();
    assert_eq!(target.address, "fd00:20::2".parse::<IpAddr>().unwrap());
    assert!(program.local.contains(&"fd00::2".parse().unwrap()));
    assert!(!program.local.contains(&"fe80::2".parse().unwrap()), "link-local");
    assert_eq!(reservations(&model).len(), 2);
}

#[test]
fn the_world_sees_an_address_that_stays() {
    let passing = |net: &str| LinkAddress { is_steady: false, ..steady(net) };
    for (addresses, expected) in [
        (vec![steady("fe80::1/64")], None),
        (vec![passing("2001:db8::1/64")], None),
        (vec![steady("fd00::1/64"), steady("fe80::1/64")], Some("fd00::1")),
        (vec![steady("fd00::1/64"), steady("2001:db8::1/64")], Some("2001:db8::1")),
        (vec![passing("2001:db8::1/64"), steady("2001:db8::2/64")], Some("2001:db8::2")),
    ] {
        let mut facts = host();
        facts.links.get_mut(2).unwrap().addresses.extend(addresses);
        let uplink = plan(&dual_model(), &facts, &Setting::default()).program.uplinks[&2];
        assert_eq!(uplink.masquerade6, expected.map(|address| address.parse().unwrap()));
        assert_eq!(uplink.masquerade4, Some(Ipv4Addr::new(10, 0, 0, 2)));
    }
}

#[test]
fn ipv6_is_forwarded_by_interface_where_the_kernel_can() {
    let plan = plan(&dual_model(), &host(), &Setting::default());
    let paths: Vec<&str> =
        plan.sysctls.keys().map(String::as_str).filter(|path| path.contains("ipv6")).collect();
    assert_eq!(
        paths,
        [
            "net/ipv6/conf/bond0/force_forwarding",
            "net/ipv6/conf/eth0/force_forwarding",
            "net/ipv6/conf/tun0/force_forwarding",
        ]
    );
}

#[test]
fn an_older_kernel_becomes_a_router_and_goes_on_taking_advertisements() {
    let facts = HostFacts { can_force_forwarding: false, ..host_with_links() };
    let first = plan(&dual_model(), &facts, &Setting::default());
    let ipv6: BTreeMap<_, _> =
        first.sysctls.iter().filter(|(path, _)| path.contains("ipv6")).collect();
    let accepts = || SysctlPlan::Replaces("1".into(), "2".into());
    // Of all interfaces of the host, whether they are uplinks or not.
    let expected = [
        (IPV6_ROUTER_SYSCTL, SysctlPlan::Is("1".into())),
        ("net/ipv6/conf/bond0/accept_ra", accepts()),
        ("net/ipv6/conf/eth0/accept_ra", accepts()),
        ("net/ipv6/conf/eth1/accept_ra", accepts()),
        ("net/ipv6/conf/tun0/accept_ra", accepts()),
    ]
    .map(|(path, value)| (path.to_owned(), value));
    assert_eq!(ipv6.into_iter().map(|(a, b)| (a.clone(), b.clone())).collect::<Vec<_>>(), expected);
    assert!(
        link_drift(&first, &facts).iter().any(|drift| drift.what.contains("the host does not"))
    );

    let facts = HostFacts { is_ipv6_router: true, ..facts };
    let originals = [(IPV6_ROUTER_SYSCTL.to_owned(), "0".to_owned())].into();
    let ours = plan(&dual_model(), &facts, &Setting { originals, ..Setting::default() });
    assert!(!ours.program.uplinks[&2].forwarded_before6, "it was us");
    let foreign = plan(&dual_model(), &facts, &Setting::default());
    assert!(foreign.program.uplinks[&2].forwarded_before6);
}

#[test]
fn sysctls_are_those_of_the_families_in_use() {
    let families = |networks: Vec<Network>| {
        let networks = networks.into_iter().map(|network| (network.id, network)).collect();
        let model = Model { networks, ..Model::default() };
        let sysctls = plan(&model, &host(), &Setting::default()).sysctls;
        let has = |family: &str| sysctls.keys().any(|path| path.contains(family));
        (has("ipv4/conf"), has("ipv6/conf"), sysctls.contains_key(RESERVED_PORTS_SYSCTL))
    };
    assert_eq!(families(vec![]), (false, false, false));
    assert_eq!(families(vec![network(1)]), (true, false, true));
    assert_eq!(families(vec![Network { ipv4: None, ..dual_network(1) }]), (false, true, true));
    assert_eq!(families(vec![network(1), dual_network(2)]), (true, true, true));
}

#[test]
fn closed_networks_give_no_default_route_in_either_family() {
    let mut model = dual_model();
    model.networks.get_mut(&A).unwrap().internal = true;
    let plan = plan(&model, &host(), &Setting::default());
    assert_eq!(plan.veths[&A1].ipv4.unwrap().gateway, None);
    assert_eq!(plan.veths[&A1].ipv6.unwrap().gateway, None);
}

#[test]
fn drift_of_the_ipv6_side_is_told() {
    let setting = Setting { uplinks: ["tun0".to_owned()].into(), ..Setting::default() };
    let mut facts = host_with_links();
    let drift: Vec<_> = link_drift(&plan(&dual_model(), &facts, &setting), &facts)
        .into_iter()
        .map(|drift| drift.what)
        .collect();
    assert_eq!(
        drift,
        [
            "bridge nd-1 lacks fd00:20::1/64",
            "bridge nd-1 does not forward IPv6",
            "uplink tun0 does not forward IPv6",
        ]
    );
    let bridge = facts.links.get_mut(10).unwrap();
    bridge.addresses.push(steady("fd00:20::1/64"));
    bridge.forces_forwarding = true;
    facts.links.get_mut(3).unwrap().forces_forwarding = true;
    assert_eq!(link_drift(&plan(&dual_model(), &facts, &setting), &facts), []);
}

#[test]
fn sysctls_of_interfaces_follow_them() {
    for (path, interface, moved) in [
        ("net/ipv4/conf/eth0/forwarding", Some("eth0"), Some("net/ipv4/conf/wan/forwarding")),
        ("net/ipv6/conf/eth0.7/accept_ra", Some("eth0.7"), Some("net/ipv6/conf/wan/accept_ra")),
        (IPV6_ROUTER_SYSCTL, None, None),
        ("net/ipv6/conf/default/forwarding", None, None),
        (RESERVED_PORTS_SYSCTL, None, None),
    ] {
        assert_eq!(sysctl_interface(path), interface, "{path}");
        assert_eq!(sysctl_of_interface(path, "wan").as_deref(), moved, "{path}");
    }
}

prop_compose! {
    /// Any subset of some networks and of their endpoints, and any subset of their links.
    fn world()(
        networks in prop::collection::btree_set(1u32..6, 0..5),
        endpoints in prop::collection::btree_map(1u32..30, 1u32..6, 0..12),
        links in prop::collection::btree_set(1u32..36, 0..30),
        internal in any::<bool>(),
        dual in any::<bool>(),
    ) -> (Model, HostFacts) {
        let mut model = Model::default();
        for id in networks {
            let network = if dual { dual_network(id) } else { network(id) };
            model.networks.insert(NetworkId(id), Network { internal, ..network });
        }
        for (id, member_of) in endpoints {
            let port = PublishedPort { host_port: 8000 + id as u16, ..WEB };
            let network = if dual { dual_network(member_of) } else { network(member_of) };
            let endpoint = endpoint(id, &network, vec![port, in_ipv6(port)]);
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
            facts.links.extend([(100 + id, made)]);
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
        let (program, reserved) = (&plan.program, reservations(&model));
        for endpoint in program.endpoints.values() {
            let network = &program.networks[&endpoint.network];
            prop_assert_eq!(network.ipv4.is_some(), endpoint.ipv4.is_some());
            prop_assert_eq!(network.ipv6.is_some(), endpoint.ipv6.is_some());
        }
        for (key, target) in program.published.iter() {
            prop_assert!(program.endpoints.contains_key(&target.endpoint));
            prop_assert_eq!(key.address.is_ipv4(), target.address.is_ipv4());
            prop_assert!(reserved.contains_key(key));
        }
        for (ifindex, link) in facts.links.iter() {
            if link.is_ours() {
                prop_assert!(!program.uplinks.contains_key(ifindex));
                prop_assert_ne!(plan.names(&link.name), plan.orphans.contains(ifindex));
            } else {
                prop_assert!(!plan.orphans.contains(ifindex));
            }
        }
    }
}
