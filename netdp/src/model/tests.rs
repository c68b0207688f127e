//! Operations of the model: what is chosen, what is refused, and that a refusal changes nothing.

use std::{collections::BTreeSet, net::IpAddr};

use super::*;
use crate::facts::{HostFacts, Ipv6Mode, Link, LinkAddress, Links, Route};

mod engine;
mod families;

pub(crate) fn link(name: &str, addresses: &[&str]) -> Link {
    Link {
        name: name.to_owned(),
        alias: None,
        kind: match name {
            _ if name.starts_with("nd-") => Some("bridge".into()),
            _ if name.starts_with("ndv") => Some("veth".into()),
            _ => None,
        },
        master: None,
        mac: Some(MacAddress([2, 0, 0, 0, 0, 1])),
        mtu: 1500,
        up: true,
        loopback: name == "lo",
        addresses: addresses.iter().map(|net| steady(net)).collect(),
        forwarding: false,
        forces_forwarding: false,
        is_filtered: false,
        ipv6: Ipv6Mode::Other,
    }
}

pub(crate) fn steady(net: &str) -> LinkAddress {
    LinkAddress { net: net.parse().unwrap(), is_steady: true }
}

/// A host with one uplink, a second address on it, and a VPN that took the default route's place.
pub(crate) fn host() -> HostFacts {
    let mut vpn = link("tun0", &["10.99.0.2/32"]);
    vpn.mac = None;
    let route = |net: &str, ifindex| Route { destination: net.parse().unwrap(), ifindex };
    HostFacts {
        is_router: false,
        is_ipv6_router: false,
        has_ipv6: true,
        can_force_forwarding: true,
        links: Links::from_iter([
            (1, link("lo", &["127.0.0.1/8"])),
            (2, link("eth0", &["10.0.0.2/24", "10.0.0.4/24", "fd00::2/64", "fe80::1/64"])),
            (3, vpn),
        ]),
        routes: vec![
            route("10.0.0.0/24", 2),
            route("0.0.0.0/1", 3),
            route("128.0.0.0/1", 3),
            route("192.168.0.0/16", 3),
            route("fd00::/64", 2),
            route("fd77::/32", 3),
            route("2000::/3", 3),
        ],
        ephemeral_ports: (32_768, 60_999),
        reserved_ports: None,
        has_ipsec: false,
        ports_in_use: BTreeSet::new(),
    }
}

pub(crate) fn network_spec(name: &str, subnet: &str) -> NetworkSpec {
    NetworkSpec {
        name: name.to_owned(),
        subnets: vec![subnet.parse().unwrap()],
        ..NetworkSpec::default()
    }
}

pub(crate) fn model_with_network(name: &str) -> Model {
    let mut model = Model::default();
    model.create_network(network_spec(name, "172.20.0.0/24"), &host()).unwrap();
    model
}

pub(crate) fn connect_spec(network: &str, netns: &str) -> ConnectSpec {
    let inode = netns.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31) + u64::from(byte));
    ConnectSpec {
        network: network.to_owned(),
        netns: PathBuf::from("/run/netns").join(netns),
        netns_identity: NetnsIdentity { device: 4, inode },
        netns_interfaces: ["lo".to_owned()].into(),
        name: None,
        addresses: Vec::new(),
        mac: None,
        interface: None,
        publish: Vec::new(),
    }
}

/// Two networks as in the behaviour catalogue: a with A1 and A2, b with B1.
fn lab() -> Model {
    let mut model = model_with_network("a");
    model.create_network(network_spec("b", "172.21.0.0/24"), &host()).unwrap();
    for (network, netns) in [("a", "A1"), ("a", "A2"), ("b", "B1")] {
        model.connect(connect_spec(network, netns), &host()).unwrap();
    }
    model
}

fn ports(specs: &[&str]) -> Vec<PublishSpec> {
    specs.iter().map(|spec| spec.parse().unwrap()).collect()
}

fn publish(model: &mut Model, name: &str, specs: &[&str]) -> Result<Vec<String>, Refusal> {
    let published = model.publish(name, None, &ports(specs), &host())?;
    Ok(published.iter().map(|port| format!("{port}->{}", port.container_port)).collect())
}

/// Runs an operation that must be refused for this reason and must change nothing.
#[track_caller]
fn refuse<T: fmt::Debug>(
    model: &mut Model,
    operation: impl FnOnce(&mut Model) -> Result<T, Refusal>,
    kind: RefusalKind,
    message: &str,
) {
    let before = model.clone();
    let refusal = operation(model).unwrap_err();
    assert_eq!(refusal.message, message);
    assert_eq!(refusal.kind, kind, "{message}");
    assert_eq!(*model, before, "a refusal changed the model: {message}");
}

#[track_caller]
fn refuse_network(spec: NetworkSpec, kind: RefusalKind, message: &str) {
    refuse(&mut lab(), |model| model.create_network(spec, &host()), kind, message);
}

#[track_caller]
fn refuse_connect(change: impl FnOnce(&mut ConnectSpec), kind: RefusalKind, message: &str) {
    let mut spec = connect_spec("a", "new");
    change(&mut spec);
    refuse(&mut lab(), |model| model.connect(spec, &host()), kind, message);
}

#[test]
fn a_network_gets_what_the_user_left_open() {
    let mut model = Model::default();
    let spec = NetworkSpec { name: "web".into(), ..NetworkSpec::default() };
    let id = model.create_network(spec, &host()).unwrap();
    let network = &model.networks[&id];
    assert_eq!(network.bridge, "nd-1");
    assert_eq!(network.ipv4.unwrap().subnet.to_string(), "172.17.0.0/16");
    let side = network.ipv4.unwrap();
    assert_eq!(side.gateway, Ipv4Addr::new(172, 17, 0, 1));
    assert_eq!(side.range, side.subnet);
    assert_eq!(side.host_binding, Some(Ipv4Addr::UNSPECIFIED));
    assert_eq!((network.ipv6, model.unique_local), (None, None));
    assert!(network.icc && network.masquerade && !network.internal);
    assert_eq!(network.mtu, 1500);
    assert_eq!(network.alias(), "netdp network web");

    let spec = NetworkSpec { name: "db".into(), internal: true, ..NetworkSpec::default() };
    let id = model.create_network(spec, &host()).unwrap();
    let network = &model.networks[&id];
    assert_eq!(network.ipv4.unwrap().subnet.to_string(), "172.18.0.0/16");
    assert_eq!(network.bridge, "nd-2");
    assert!(!network.masquerade);
}

#[test]
fn the_default_pools_avoid_the_hosts_own_networks() {
    let mut facts = host();
    facts.links.extend([(4, link("docker0", &["172.17.0.1/16"]))]);
    facts.routes.push(Route { destination: "172.18.0.0/15".parse().unwrap(), ifindex: 3 });
    let mut model = Model::default();
    let spec = NetworkSpec { name: "web".into(), ..NetworkSpec::default() };
    let id = model.create_network(spec, &facts).unwrap();
    assert_eq!(model.networks[&id].ipv4.unwrap().subnet.to_string(), "172.20.0.0/16");
}

#[test]
fn links_of_ours_are_no_obstacle() {
    let mut facts = host();
    let mut bridge = link("nd-1", &["172.17.0.1/16"]);
    bridge.alias = Some("netdp network web".into());
    facts.links.extend([(4, bridge)]);
    facts.routes.push(Route { destination: "172.17.0.0/16".parse().unwrap(), ifindex: 4 });
    let mut model = Model::default();
    let id = model.create_network(network_spec("web", "172.17.0.0/16"), &facts).unwrap();
    assert_eq!(model.networks[&id].bridge, "nd-1");
}

#[test]
fn foreign_links_keep_their_names() {
    let mut facts = host();
    facts.links.extend([(4, link("nd-1", &[]))]);
    facts.links.extend([(5, link("ndv1", &[]))]);
    let mut model = Model::default();
    let id = model.create_network(network_spec("a", "172.20.0.0/24"), &facts).unwrap();
    assert_eq!(model.networks[&id].bridge, "nd-2");
    let id = model.connect(connect_spec("a", "A1"), &facts).unwrap();
    assert_eq!(model.endpoints[&id].host_interface, "ndv2");

    let spec = NetworkSpec { bridge: Some("nd-1".into()), ..network_spec("b", "172.21.0.0/24") };
    refuse(
        &mut model,
        |model| model.create_network(spec, &facts),
        RefusalKind::Conflict,
        "interface \"nd-1\" exists already and is not netdp's: choose another bridge name",
    );
}

#[test]
fn network_ids_go_round_and_come_back_last() {
    let mut model = lab();
    model.next.network = 4095;
    let id = model.create_network(network_spec("c", "172.22.0.0/24"), &host()).unwrap();
    assert_eq!(id, NetworkId(4095));
    let id = model.create_network(network_spec("d", "172.23.0.0/24"), &host()).unwrap();
    assert_eq!(id, NetworkId(3), "1 and 2 are in use");
}

#[test]
fn bad_names_are_refused() {
    let long = "x".repeat(65);
    for name in ["", "-a", ".", "a b", "a/b", "ä", long.as_str()] {
        let message = format!(
            "{name:?} is no network name: take up to 64 of a-z A-Z 0-9 _ . - \
             and begin with a letter or digit"
        );
        refuse_network(network_spec(name, "172.22.0.0/24"), RefusalKind::Invalid, &message);
    }
    refuse_network(
        network_spec("a", "172.22.0.0/24"),
        RefusalKind::Conflict,
        "network \"a\" exists already: choose another name",
    );
}

#[test]
fn bad_subnets_are_refused() {
    for (subnet, kind, message) in [
        (
            "172.20.0.128/25",
            RefusalKind::Conflict,
            "subnet 172.20.0.128/25 overlaps 172.20.0.0/24 of network \"a\": give another one",
        ),
        (
            "172.16.0.0/12",
            RefusalKind::Conflict,
            "subnet 172.16.0.0/12 overlaps 172.20.0.0/24 of network \"a\": give another one",
        ),
        (
            "10.0.0.0/16",
            RefusalKind::Conflict,
            "subnet 10.0.0.0/16 overlaps address 10.0.0.2/24 of interface eth0: give another one",
        ),
        (
            "192.168.7.0/24",
            RefusalKind::Conflict,
            "subnet 192.168.7.0/24 overlaps the host's route to 192.168.0.0/16 by tun0: \
             give another one",
        ),
        (
            "172.22.0.5/24",
            RefusalKind::Invalid,
            "subnet 172.22.0.5/24 has host bits set: did you mean 172.22.0.0/24?",
        ),
        (
            "172.22.0.0/31",
            RefusalKind::Invalid,
            "subnet 172.22.0.0/31 has an unusable size: give a prefix length from 8 to 30",
        ),
        (
            "0.0.0.0/0",
            RefusalKind::Invalid,
            "subnet 0.0.0.0/0 has an unusable size: give a prefix length from 8 to 30",
        ),
        (
            "127.1.0.0/16",
            RefusalKind::Invalid,
            "subnet 127.1.0.0/16 lies in 127.0.0.0/8, which hosts can't have: give another one",
        ),
        (
            "239.0.0.0/24",
            RefusalKind::Invalid,
            "subnet 239.0.0.0/24 lies in 224.0.0.0/4, which hosts can't have: give another one",
        ),
        (
            "fd77:0:1::/64",
            RefusalKind::Conflict,
            "subnet fd77:0:1::/64 overlaps the host's route to fd77::/32 by tun0: \
             give another one",
        ),
        (
            "fd00::/48",
            RefusalKind::Conflict,
            "subnet fd00::/48 overlaps address fd00::2/64 of interface eth0: give another one",
        ),
        (
            "fd00:22::1/64",
            RefusalKind::Invalid,
            "subnet fd00:22::1/64 has host bits set: did you mean fd00:22::/64?",
        ),
        (
            "fd00:22::/127",
            RefusalKind::Invalid,
            "subnet fd00:22::/127 has an unusable size: give a prefix length from 48 to 126",
        ),
        (
            "fe80:0:0:1::/64",
            RefusalKind::Invalid,
            "subnet fe80:0:0:1::/64 lies in fe80::/10, which hosts can't have: give another one",
        ),
        (
            "ff05::/64",
            RefusalKind::Invalid,
            "subnet ff05::/64 lies in ff00::/8, which hosts can't have: give another one",
        ),
        (
            "::/64",
            RefusalKind::Invalid,
            "subnet ::/64 lies in ::/8, which hosts can't have: give another one",
        ),
    ] {
        refuse_network(network_spec("c", subnet), kind, message);
    }
    let mut two = network_spec("c", "172.22.0.0/24");
    two.subnets.push("172.23.0.0/24".parse().unwrap());
    refuse_network(
        two,
        RefusalKind::Invalid,
        "more than one IPv4 subnet is not supported: give one per family",
    );
}

#[test]
fn bad_gateways_and_ranges_are_refused() {
    let with = |gateway: Option<&str>, range: Option<&str>| NetworkSpec {
        gateways: gateway.iter().map(|address| address.parse().unwrap()).collect(),
        ip_ranges: range.iter().map(|range| range.parse().unwrap()).collect(),
        ..network_spec("c", "172.22.0.0/24")
    };
    for gateway in ["172.22.1.1", "172.22.0.0", "172.22.0.255"] {
        let message = format!(
            "gateway {gateway} is no host address in 172.22.0.0/24: \
             give one from 172.22.0.1 to 172.22.0.254"
        );
        refuse_network(with(Some(gateway), None), RefusalKind::Invalid, &message);
    }
    for (gateway, range, message) in [
        (
            None,
            Some("172.23.0.0/25"),
            "IP range 172.23.0.0/25 is not part of subnet 172.22.0.0/24: give one that is",
        ),
        (
            None,
            Some("172.22.0.0/23"),
            "IP range 172.22.0.0/23 is not part of subnet 172.22.0.0/24: give one that is",
        ),
        (
            Some("172.22.0.9"),
            Some("172.22.0.9/32"),
            "IP range 172.22.0.9/32 has no address for a container: give a larger one",
        ),
        (
            Some("fd00::1"),
            None,
            "gateway fd00::1 is of no use in a network without IPv6: \
             leave it out or enable IPv6",
        ),
        (
            None,
            Some("fd00::/64"),
            "IP range fd00::/64 is of no use in a network without IPv6: \
             leave it out or enable IPv6",
        ),
    ] {
        refuse_network(with(gateway, range), RefusalKind::Invalid, message);
    }
    let lonely = NetworkSpec { subnets: Vec::new(), ..with(Some("172.22.0.1"), None) };
    refuse_network(
        lonely,
        RefusalKind::Invalid,
        "an IPv4 gateway or IP range needs an IPv4 subnet: give one",
    );
}

#[test]
fn bad_options_are_refused() {
    let spec = || network_spec("c", "172.22.0.0/24");
    let address = |text: &str| vec![text.parse::<IpAddr>().unwrap()];
    for (spec, message) in [
        (
            NetworkSpec { mtu: Some(67), ..spec() },
            "an MTU of 67 does not work: give one from 68 to 65535",
        ),
        (
            NetworkSpec { host_bindings: address("224.0.0.1"), ..spec() },
            "host binding 224.0.0.1 is no host's address: give one of this host or 0.0.0.0",
        ),
        (
            NetworkSpec { snat_ips: address("127.0.0.1"), ..spec() },
            "SNAT address 127.0.0.1 can't be answered: \
             give one that the world routes to this host",
        ),
        (
            NetworkSpec { snat_ips: address("10.0.0.4"), masquerade: Some(false), ..spec() },
            "a SNAT address needs masquerade: leave one out or switch the other on",
        ),
        (
            NetworkSpec {
                gateway_mode: Some(GatewayMode::Routed),
                masquerade: Some(true),
                ..spec()
            },
            "gateway mode routed translates nothing: leave masquerade out or take mode nat",
        ),
        (
            NetworkSpec { bridge: Some("a-name-too-long!".into()), ..spec() },
            "\"a-name-too-long!\" is no usable bridge name: take up to 15 characters \
             without spaces, slashes, colons and percent signs",
        ),
    ] {
        refuse_network(spec, RefusalKind::Invalid, message);
    }
    refuse_network(
        NetworkSpec { bridge: Some("nd-1".into()), ..spec() },
        RefusalKind::Conflict,
        "bridge \"nd-1\" belongs to network \"a\": choose another bridge name",
    );
}

#[test]
fn a_network_goes_only_when_it_is_empty() {
    let mut model = lab();
    refuse(
        &mut model,
        |model| model.remove_network("a"),
        RefusalKind::Conflict,
        "network \"a\" still has endpoints (A1, A2): disconnect them first",
    );
    refuse(
        &mut model,
        |model| model.remove_network("c"),
        RefusalKind::NotFound,
        "there is no network \"c\": `netdp network ls` shows those that are",
    );
    model.disconnect("b", "B1").unwrap();
    assert_eq!(model.remove_network("b").unwrap().name, "b");
    assert_eq!(model.networks.len(), 1);
}

#[test]
fn an_endpoint_gets_what_the_user_left_open() {
    let model = lab();
    let endpoint = model.endpoint("a", "A2").unwrap();
    assert_eq!(endpoint.id, EndpointId(2));
    assert_eq!(endpoint.host_interface, "ndv2");
    assert_eq!(endpoint.interface, "eth0");
    assert_eq!(endpoint.ipv4, Some(Ipv4Addr::new(172, 20, 0, 3)));
    assert_eq!(endpoint.mac.to_string(), "02:42:ac:14:00:03");
    assert_eq!(model.alias(endpoint), "netdp endpoint a/A2");
}

#[test]
fn an_endpoint_gets_what_the_user_asked_for() {
    let mut model = lab();
    let mut spec = connect_spec("a", "new");
    spec.name = Some("web".into());
    spec.addresses = vec!["172.20.0.77".parse().unwrap()];
    spec.mac = Some("02:00:00:AB:cd:ef".parse().unwrap());
    spec.interface = Some("net0".into());
    spec.publish = ports(&["8080:80"]);
    let id = model.connect(spec, &host()).unwrap();
    let endpoint = &model.endpoints[&id];
    assert_eq!(endpoint.name, "web");
    assert_eq!(endpoint.ipv4, Some(Ipv4Addr::new(172, 20, 0, 77)));
    assert_eq!(endpoint.mac.to_string(), "02:00:00:ab:cd:ef");
    assert_eq!(endpoint.interface, "net0");
    let ports: Vec<_> = endpoint.ports().map(|port| port.to_string()).collect();
    assert_eq!(ports, ["tcp 0.0.0.0:8080"]);

    let id = model.connect(connect_spec("a", "next"), &host()).unwrap();
    assert_eq!(model.endpoints[&id].ipv4, Some(Ipv4Addr::new(172, 20, 0, 4)), "goes on behind A2");
}

#[test]
fn a_container_on_two_networks_gets_two_interfaces() {
    let mut model = lab();
    let id = model.connect(connect_spec("b", "A1"), &host()).unwrap();
    assert_eq!(model.endpoints[&id].interface, "eth1");
    let mut spec = connect_spec("a", "new");
    spec.netns_interfaces = ["eth0", "eth1"].map(str::to_owned).into();
    let id = model.connect(spec, &host()).unwrap();
    assert_eq!(model.endpoints[&id].interface, "eth2");
}

#[test]
fn ports_go_on_with_the_endpoint_that_is_left() {
    let mut model = lab();
    let second = model.connect(connect_spec("b", "A1"), &host()).unwrap();
    let ports_of = |model: &Model, id| -> Vec<String> {
        model.endpoints[&id].ports().map(|port| port.to_string()).collect()
    };
    model.publish("A1", Some("a"), &ports(&["8085:80"]), &host()).unwrap();
    let given = ports_of(&model, EndpointId(1));
    model.disconnect("a", "A1").unwrap();
    assert_eq!(ports_of(&model, second), given);
    // The last one takes them along.
    model.disconnect("b", "A1").unwrap();
    model.publish("A2", None, &ports(&["8085:80"]), &host()).unwrap();
}

#[test]
fn names_come_from_the_namespace_where_it_has_one() {
    let mut model = lab();
    let mut spec = connect_spec("a", "x");
    spec.netns = "/proc/4711/ns/net".into();
    let id = model.connect(spec, &host()).unwrap();
    assert_eq!(model.endpoints[&id].name, "endpoint-4");
}

#[test]
fn a_freed_address_is_given_last_and_ids_never_again() {
    let mut model = lab();
    model.disconnect("a", "A1").unwrap();
    let id = model.connect(connect_spec("a", "A1"), &host()).unwrap();
    assert_eq!(id, EndpointId(4));
    assert_eq!(model.endpoints[&id].ipv4, Some(Ipv4Addr::new(172, 20, 0, 4)));
    assert_eq!(model.release(id).unwrap().name, "A1");
    assert_eq!(model.release(id), None);
}

#[test]
fn bad_attachments_are_refused() {
    use RefusalKind::{Conflict, Invalid, NotFound};

    let address = |text: &str| vec![text.parse::<IpAddr>().unwrap()];
    refuse_connect(
        |spec| spec.network = "c".into(),
        NotFound,
        "there is no network \"c\": `netdp network ls` shows those that are",
    );
    refuse_connect(
        |spec| *spec = connect_spec("a", "A1"),
        Conflict,
        "/run/netns/A1 is attached to network \"a\" already, as \"A1\": disconnect that first",
    );
    refuse_connect(
        |spec| spec.name = Some("A2".into()),
        Conflict,
        "network \"a\" has an endpoint \"A2\" already: choose another name",
    );
    refuse_connect(
        |spec| spec.name = Some("../A2".into()),
        Invalid,
        "\"../A2\" is no endpoint name: take up to 64 of a-z A-Z 0-9 _ . - \
         and begin with a letter or digit",
    );
    refuse_connect(
        |spec| spec.addresses = address("172.21.0.9"),
        Invalid,
        "172.21.0.9 is no host address in 172.20.0.0/24 of network \"a\": give one that is",
    );
    refuse_connect(
        |spec| spec.addresses = address("172.20.0.255"),
        Invalid,
        "172.20.0.255 is no host address in 172.20.0.0/24 of network \"a\": give one that is",
    );
    refuse_connect(
        |spec| spec.addresses = address("172.20.0.1"),
        Conflict,
        "172.20.0.1 is the gateway of network \"a\": give another address",
    );
    refuse_connect(
        |spec| spec.addresses = address("172.20.0.3"),
        Conflict,
        "172.20.0.3 belongs to endpoint \"A2\" of network \"a\": give another address",
    );
    refuse_connect(
        |spec| spec.addresses = address("fd00::9"),
        Invalid,
        "network \"a\" has no IPv6: leave address fd00::9 out",
    );
    refuse_connect(
        |spec| spec.addresses = ["172.20.0.8", "172.20.0.9"].map(|a| a.parse().unwrap()).into(),
        Invalid,
        "more than one IPv4 address is not supported: give one per family",
    );
    refuse_connect(
        |spec| spec.mac = Some(MacAddress([1, 0, 0x5e, 0, 0, 1])),
        Invalid,
        "MAC address 01:00:5e:00:00:01 is no station's: give one with an even first octet",
    );
    refuse_connect(
        |spec| spec.mac = Some(MacAddress([0x02, 0x42, 172, 20, 0, 2])),
        Conflict,
        "MAC address 02:42:ac:14:00:02 belongs to endpoint \"A1\" of network \"a\": \
         give another one",
    );
    refuse_connect(
        |spec| {
            spec.interface = Some("eth0".into());
            spec.netns_interfaces.insert("eth0".into());
        },
        Conflict,
        "/run/netns/new has an interface \"eth0\" already: choose another name",
    );
    refuse_connect(
        |spec| spec.interface = Some("lo".into()),
        Invalid,
        "\"lo\" is no usable interface name: take up to 15 characters \
         without spaces, slashes, colons and percent signs",
    );
    refuse_connect(
        |spec| spec.publish = ports(&["8080:80", "8080:81"]),
        Conflict,
        "tcp 0.0.0.0:8080 is published by this request already: give another host port",
    );
}

#[test]
fn a_full_network_refuses_another_endpoint() {
    let mut model = Model::default();
    model.create_network(network_spec("a", "172.20.0.0/30"), &host()).unwrap();
    model.connect(connect_spec("a", "A1"), &host()).unwrap();
    refuse(
        &mut model,
        |model| model.connect(connect_spec("a", "A2"), &host()),
        RefusalKind::Conflict,
        "no address is free in 172.20.0.0/30 of network \"a\": disconnect an endpoint",
    );
}

#[test]
fn macs_read_as_they_are_written() {
    for text in ["02:42:ac:14:00:02", "00:00:00:00:00:01"] {
        assert_eq!(text.parse::<MacAddress>().unwrap().to_string(), text);
    }
    for text in
        ["", "02:42:ac:14:00", "02:42:ac:14:00:02:03", "2:42:ac:14:0:2", "+2:42:ac:14:00:02"]
    {
        assert!(text.parse::<MacAddress>().is_err(), "{text}");
    }
}

#[test]
fn ports_are_published_as_docker_does() {
    for (spec, expected) in [
        ("8080:80", &["tcp 0.0.0.0:8080->80"][..]),
        ("8080:80/udp", &["udp 0.0.0.0:8080->80"]),
        ("10.0.0.4:8080:80", &["tcp 10.0.0.4:8080->80"]),
        ("127.0.0.1:8080:80/tcp", &["tcp 127.0.0.1:8080->80"]),
        ("80", &["tcp 0.0.0.0:49153->80"]),
        ("10.0.0.2::80", &["tcp 10.0.0.2:49153->80"]),
        ("80-81", &["tcp 0.0.0.0:49153->80", "tcp 0.0.0.0:49154->81"]),
        ("8000-8010:80", &["tcp 0.0.0.0:8000->80"]),
        ("9000-9001:8000-8001", &["tcp 0.0.0.0:9000->8000", "tcp 0.0.0.0:9001->8001"]),
    ] {
        assert_eq!(publish(&mut lab(), "A1", &[spec]).unwrap(), expected, "{spec}");
    }
}

#[test]
fn the_network_says_what_an_open_host_address_means() {
    let mut model = lab();
    let side = model.network_mut("a").unwrap().ipv4.as_mut().unwrap();
    side.host_binding = Some(Ipv4Addr::LOCALHOST);
    let ports = publish(&mut model, "A1", &["8080:80", "0.0.0.0:8081:81"]).unwrap();
    assert_eq!(ports, ["tcp 127.0.0.1:8080->80", "tcp 0.0.0.0:8081->81"]);
}

#[test]
fn a_range_gives_the_next_free_port() {
    let mut model = lab();
    publish(&mut model, "A2", &["8000:80", "10.0.0.4:8001:80", "8002:80/udp"]).unwrap();
    let ports = publish(&mut model, "A1", &["8000-8010:80", "8000-8010:81"]).unwrap();
    assert_eq!(ports, ["tcp 0.0.0.0:8002->80", "tcp 0.0.0.0:8003->81"]);
    let ports = publish(&mut model, "A1", &["10.0.0.2:8000-8010:82"]).unwrap();
    assert_eq!(ports, ["tcp 10.0.0.2:8001->82"], "10.0.0.4:8001 is another one");
}

#[test]
fn ports_of_other_programs_are_not_chosen() {
    let mut facts = host();
    facts.ports_in_use =
        [(Protocol::Tcp, 8000), (Protocol::Udp, 8001), (Protocol::Tcp, 49_153)].into();
    let specs = ports(&["8000-8010:80", "80", "8000:81"]);
    let published = lab().publish("A1", None, &specs, &facts).unwrap();
    let chosen: Vec<u16> = published.iter().map(|port| port.host_port).collect();
    assert_eq!(chosen, [8001, 49_154, 8000], "one that was named is the reservation's business");
}

#[test]
fn the_whole_port_space_is_one_request() {
    let ports = publish(&mut lab(), "A1", &["10.0.0.2:1-65535:1-65535"]).unwrap();
    assert_eq!(ports.len(), 65_535);
    assert_eq!(ports[65_534], "tcp 10.0.0.2:65535->65535");
}

#[test]
fn ports_that_collide_are_refused() {
    use RefusalKind::{Conflict, Invalid, NotFound};

    let mut model = lab();
    publish(&mut model, "A2", &["10.0.0.4:8080:80", "9000:90"]).unwrap();
    for (name, specs, kind, message) in [
        (
            "A1",
            &["8080:80"][..],
            Conflict,
            "tcp 0.0.0.0:8080 is published by A2 already: give another host port",
        ),
        (
            "A1",
            &["7000:70", "10.0.0.2:9000:90"],
            Conflict,
            "tcp 10.0.0.2:9000 is published by A2 already: give another host port",
        ),
        (
            "A2",
            &["9000:90"],
            Conflict,
            "tcp 0.0.0.0:9000 is published by A2 already: give another host port",
        ),
        (
            "A1",
            &["9000-9001:80", "9000-9001:81"],
            Conflict,
            "all host ports from 9000 to 9001 are published or in use: give another range",
        ),
        (
            "A1",
            &["10.0.0.9:8080:80"],
            Invalid,
            "10.0.0.9 is no address of this host: give one that is, or 0.0.0.0",
        ),
        (
            "A9",
            &["8080:80"],
            NotFound,
            "there is no endpoint \"A9\": `netdp network inspect` shows a network's",
        ),
    ] {
        refuse(&mut model, |model| publish(model, name, specs), kind, message);
    }
    assert!(publish(&mut model, "A1", &["10.0.0.2:8080:80", "8080:80/udp"]).is_ok());
}

#[test]
fn sctp_keeps_its_ports() {
    for (spec, expected) in [
        ("7000:7000/sctp", &["sctp 0.0.0.0:7000->7000"][..]),
        ("7000/sctp", &["sctp 0.0.0.0:7000->7000"]),
        ("7000-7001/sctp", &["sctp 0.0.0.0:7000->7000", "sctp 0.0.0.0:7001->7001"]),
        ("7000-7010:7005/sctp", &["sctp 0.0.0.0:7005->7005"]),
        ("10.0.0.4::7000/sctp", &["sctp 10.0.0.4:7000->7000"]),
    ] {
        assert_eq!(publish(&mut lab(), "A1", &[spec]).unwrap(), expected, "{spec}");
    }
    let mut model = lab();
    publish(&mut model, "A2", &["7000:7000", "7000:7000/udp", "10.0.0.4:8000:8000/sctp"]).unwrap();
    for (spec, port) in [
        ("7001:7000/sctp", 7000),
        ("7001-7010:7000/sctp", 7000),
        ("7001-7002:7000-7001/sctp", 7000),
    ] {
        let message = format!(
            "container port {port}/sctp can only be published as host port {port}, because the \
             checksum of sctp covers the ports: write {port}:{port}/sctp"
        );
        refuse(&mut model, |m| publish(m, "A1", &[spec]), RefusalKind::Invalid, &message);
    }
    refuse(
        &mut model,
        |model| publish(model, "A1", &["8000/sctp"]),
        RefusalKind::Conflict,
        "sctp 0.0.0.0:8000 is published by A2 already: give another host address",
    );
    publish(&mut model, "A1", &["7000/sctp"]).unwrap();
    model.unpublish("A1", None, &ports(&["7000/sctp"])).unwrap();
    assert!(model.endpoint("a", "A1").unwrap().published.is_empty());
}

#[test]
fn sctp_ports_of_a_routed_network_are_not_translated_anyway() {
    let mut model = Model::default();
    let spec = NetworkSpec {
        gateway_mode: Some(GatewayMode::Routed),
        ..network_spec("r", "172.20.0.0/24")
    };
    model.create_network(spec, &host()).unwrap();
    model.connect(connect_spec("r", "R1"), &host()).unwrap();
    let ports = publish(&mut model, "R1", &["7001:7000/sctp"]).unwrap();
    assert_eq!(ports, ["sctp 0.0.0.0:7001->7000"]);
}

#[test]
fn closed_networks_publish_nothing() {
    for (spec, message) in [
        (
            NetworkSpec { internal: true, ..network_spec("c", "172.22.0.0/24") },
            "network \"c\" is internal: nothing can be published from it",
        ),
        (
            NetworkSpec {
                gateway_mode: Some(GatewayMode::Isolated),
                ..network_spec("c", "172.22.0.0/24")
            },
            "network \"c\" is isolated: nothing can be published from it",
        ),
    ] {
        let mut model = lab();
        model.create_network(spec, &host()).unwrap();
        let mut spec = connect_spec("c", "C1");
        spec.publish = ports(&["80"]);
        let connect = |model: &mut Model| model.connect(spec, &host());
        refuse(&mut model, connect, RefusalKind::Invalid, message);
        model.connect(connect_spec("c", "C1"), &host()).unwrap();
        refuse(&mut model, |m| publish(m, "C1", &["80"]), RefusalKind::Invalid, message);
    }
}

#[test]
fn a_name_on_two_networks_needs_the_network() {
    let mut model = lab();
    model.connect(connect_spec("b", "A1"), &host()).unwrap();
    refuse(
        &mut model,
        |model| publish(model, "A1", &["80"]),
        RefusalKind::Conflict,
        "\"A1\" is an endpoint of networks a, b: say which with --network",
    );
    model.publish("A1", Some("b"), &ports(&["8080:80"]), &host()).unwrap();
    assert_eq!(model.endpoint("b", "A1").unwrap().published.len(), 1);
    assert!(model.endpoint("a", "A1").unwrap().published.is_empty());
}

#[test]
fn published_ports_are_taken_back_by_what_was_said() {
    let publish_all = || {
        let mut model = lab();
        let specs = ["8080:80", "10.0.0.4:8081:80", "8080:80/udp", "9000-9001:90-91"];
        publish(&mut model, "A1", &specs).unwrap();
        model
    };
    for (spec, removed) in [
        ("8080:80", &[8080][..]),
        ("80", &[8080, 8081]),
        ("10.0.0.4::80", &[8081]),
        ("8000-8090:80", &[8080, 8081]),
        ("9000-9001:90-91", &[9000, 9001]),
        ("90-91", &[9000, 9001]),
    ] {
        let mut model = publish_all();
        let ports = model.unpublish("A1", None, &ports(&[spec])).unwrap();
        assert_eq!(ports.iter().map(|port| port.host_port).collect::<Vec<_>>(), removed, "{spec}");
        let left = model.endpoint("a", "A1").unwrap().published.len();
        assert_eq!(left, 5 - removed.len(), "{spec}");
    }
    for spec in ["8082:80", "9001-9002:90-91", "80-90", "81", "127.0.0.1:8080:80"] {
        let refusal = publish_all().unpublish("A1", None, &ports(&["8080:80", spec])).unwrap_err();
        assert_eq!(refusal.kind, RefusalKind::NotFound, "{spec}");
    }
}

#[test]
fn what_is_no_port_argument_is_refused() {
    for (spec, message) in [
        ("", "port \"\": \"\" is no port: give a number from 1 to 65535"),
        ("0:80", "port \"0:80\": \"0\" is no port: give a number from 1 to 65535"),
        ("80:65536", "port \"80:65536\": \"65536\" is no port: give a number from 1 to 65535"),
        ("+80", "port \"+80\": \"+80\" is no port: give a number from 1 to 65535"),
        ("9-8", "port \"9-8\": the range 9-8 is empty: write 8-9"),
        (
            "8000-8002:80-81",
            "port \"8000-8002:80-81\": 3 host ports can't lead to 2 container ports: \
             give ranges of equal length",
        ),
        ("80/SCTP", "port \"80/SCTP\": \"SCTP\" is no protocol: give tcp, udp or sctp"),
        ("80/icmp", "port \"80/icmp\": \"icmp\" is no protocol: give tcp, udp or sctp"),
        ("host:80:80", "port \"host:80:80\": \"host\" is no IPv4 address"),
        ("::1:80:80", "port \"::1:80:80\": write [HOSTIP:]HOST[-END]:PORT[-END][/tcp|udp|sctp]"),
        ("[::1]80:80", "port \"[::1]80:80\": an IPv6 address is written [ADDRESS]:HOST:PORT"),
        ("[::1]:80", "port \"[::1]:80\": write [HOSTIP:]HOST[-END]:PORT[-END][/tcp|udp|sctp]"),
        ("[10.0.0.2]:80:80", "port \"[10.0.0.2]:80:80\": \"10.0.0.2\" is no IPv6 address"),
        ("[]:80:80", "port \"[]:80:80\": \"\" is no IPv6 address"),
        ("1:2:3:4", "port \"1:2:3:4\": write [HOSTIP:]HOST[-END]:PORT[-END][/tcp|udp|sctp]"),
    ] {
        let refusal = spec.parse::<PublishSpec>().unwrap_err();
        assert_eq!(refusal.message, message);
    }
}
