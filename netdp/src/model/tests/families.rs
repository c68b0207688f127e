//! Networks of both families, and of IPv6 alone.

use super::*;

/// Network d has both families, s IPv6 only; D1 and S1 are in them.
fn dual_lab() -> Model {
    let mut model = lab();
    let mut dual = network_spec("d", "172.22.0.0/24");
    dual.subnets.push("fd00:22::/64".parse().unwrap());
    model.create_network(dual, &host()).unwrap();
    let single =
        NetworkSpec { enable_ipv4: Some(false), ..network_spec("s", "2001:db8:0:23::/64") };
    model.create_network(single, &host()).unwrap();
    for (network, netns) in [("d", "D1"), ("s", "S1")] {
        model.connect(connect_spec(network, netns), &host()).unwrap();
    }
    model
}

#[test]
fn both_families_of_a_network_get_what_the_user_left_open() {
    let model = dual_lab();
    let network = model.network("d").unwrap();
    let side = network.ipv6.unwrap();
    assert_eq!(side.gateway.to_string(), "fd00:22::1");
    assert_eq!(side.range, side.subnet);
    assert_eq!(
        network.host_bindings().map(|a| a.to_string()).collect::<Vec<_>>(),
        ["0.0.0.0", "::"]
    );
    assert_eq!(network.bridge_mac().to_string(), "02:42:ac:16:00:01");
    assert_eq!(model.unique_local, None, "not needed so far");
    let endpoint = model.endpoint("d", "D1").unwrap();
    assert_eq!(endpoint.ipv4, Some(Ipv4Addr::new(172, 22, 0, 2)));
    assert_eq!(endpoint.ipv6, Some("fd00:22::2".parse().unwrap()));
    assert_eq!(endpoint.mac.to_string(), "02:42:ac:16:00:02", "as Docker's, whatever the IPv6");
}

#[test]
fn a_network_without_ipv4_has_none_of_it() {
    let mut model = dual_lab();
    let network = model.network("s").unwrap();
    assert_eq!(network.ipv4, None);
    assert_eq!(
        network.subnets().map(|net| net.to_string()).collect::<Vec<_>>(),
        ["2001:db8:0:23::/64"]
    );
    let endpoint = model.endpoint("s", "S1").unwrap();
    assert_eq!((endpoint.ipv4, endpoint.ipv6), (None, Some("2001:db8:0:23::2".parse().unwrap())));
    assert_eq!(publish(&mut model, "S1", &["8080:80"]).unwrap(), ["tcp [::]:8080->80"]);
    refuse(
        &mut model,
        |model| publish(model, "S1", &["10.0.0.2:8081:80"]),
        RefusalKind::Invalid,
        "network \"s\" has no IPv4: 10.0.0.2 can't lead into it",
    );
}

#[test]
fn unique_local_subnets_are_this_hosts_own() {
    let mut model = Model::default();
    let spec = |name: &str, global_id| NetworkSpec {
        name: name.to_owned(),
        enable_ipv6: Some(true),
        global_id,
        ..NetworkSpec::default()
    };
    let mut create = |name: &str, global_id| {
        let id = model.create_network(spec(name, global_id), &host()).unwrap();
        model.networks[&id].ipv6.unwrap().subnet.to_string()
    };
    assert_eq!(create("a", [0x12, 0x34, 0x56, 0x78, 0x9a]), "fd12:3456:789a::/64");
    assert_eq!(create("b", [1; 5]), "fd12:3456:789a:1::/64", "the first choice stays");
    model.remove_network("a").unwrap();
    let id = model.create_network(spec("c", [2; 5]), &host()).unwrap();
    assert_eq!(model.networks[&id].ipv6.unwrap().subnet.to_string(), "fd12:3456:789a::/64");
}

#[test]
fn families_that_contradict_the_rest_are_refused() {
    let spec = || network_spec("c", "172.24.0.0/24");
    let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    for (spec, message) in [
        (
            NetworkSpec { enable_ipv4: Some(false), subnets: Vec::new(), ..spec() },
            "a network without IPv4 needs IPv6: give --ipv6 or an IPv6 subnet",
        ),
        (
            NetworkSpec { enable_ipv4: Some(false), enable_ipv6: Some(true), ..spec() },
            "subnet 172.24.0.0/24 is of no use in a network without IPv4: \
             leave it out or enable IPv4",
        ),
        (
            NetworkSpec { enable_ipv6: Some(false), snat_ips: addresses(&["fd00::9"]), ..spec() },
            "SNAT address fd00::9 is of no use in a network without IPv6: \
             leave it out or enable IPv6",
        ),
        (
            NetworkSpec {
                enable_ipv6: Some(true),
                host_bindings: addresses(&["::1", "fd00::2"]),
                ..spec()
            },
            "more than one IPv6 host binding is not supported: give one per family",
        ),
        (
            NetworkSpec { enable_ipv6: Some(true), mtu: Some(1279), ..spec() },
            "an MTU of 1279 is too small for IPv6: give one from 1280",
        ),
        (
            NetworkSpec { enable_ipv6: Some(true), gateways: addresses(&["fd00:22::1"]), ..spec() },
            "an IPv6 gateway or IP range needs an IPv6 subnet: give one",
        ),
        (
            NetworkSpec {
                enable_ipv6: Some(true),
                host_bindings: addresses(&["fe80::1"]),
                ..spec()
            },
            "host binding fe80::1 is no host's address: give one of this host or ::",
        ),
        (
            NetworkSpec { enable_ipv6: Some(true), snat_ips: addresses(&["::1"]), ..spec() },
            "SNAT address ::1 can't be answered: give one that the world routes to this host",
        ),
    ] {
        refuse_network(spec, RefusalKind::Invalid, message);
    }
    let facts = HostFacts { has_ipv6: false, ..host() };
    refuse(
        &mut lab(),
        |model| model.create_network(network_spec("c", "fd00:22::/64"), &facts),
        RefusalKind::Invalid,
        "this host has IPv6 switched off (ipv6.disable=1): boot without that, or leave IPv6 out",
    );
}

#[test]
fn gateways_and_addresses_keep_off_the_routers_anycast_address() {
    let mut spec = network_spec("c", "fd00:24::/64");
    spec.gateways = vec!["fd00:24::".parse().unwrap()];
    refuse_network(
        spec,
        RefusalKind::Invalid,
        "gateway fd00:24:: is no host address in fd00:24::/64: \
         give one from fd00:24::1 to fd00:24::ffff:ffff:ffff:ffff",
    );
    let model = dual_lab();
    let connect = |address: &str| {
        let mut spec = connect_spec("d", address);
        spec.name = Some("new".into());
        spec.addresses = vec![address.parse().unwrap()];
        model.clone().connect(spec, &host()).map(|_| ()).map_err(|refusal| refusal.message)
    };
    assert_eq!(
        connect("fd00:22::").unwrap_err(),
        "fd00:22:: is no host address in fd00:22::/64 of network \"d\": give one that is"
    );
    assert_eq!(
        connect("fd00:22::1").unwrap_err(),
        "fd00:22::1 is the gateway of network \"d\": give another address"
    );
    assert_eq!(
        connect("fd00:22::2").unwrap_err(),
        "fd00:22::2 belongs to endpoint \"D1\" of network \"d\": give another address"
    );
    assert_eq!(connect("fd00:22::ffff:ffff:ffff:ffff"), Ok(()), "IPv6 has no broadcast");
}

#[test]
fn an_endpoint_takes_one_address_per_family() {
    let mut model = dual_lab();
    let mut spec = connect_spec("d", "D2");
    spec.addresses = vec!["fd00:22::77".parse().unwrap(), "172.22.0.77".parse().unwrap()];
    let id = model.connect(spec, &host()).unwrap();
    assert_eq!(model.endpoints[&id].ipv4, Some(Ipv4Addr::new(172, 22, 0, 77)));
    assert_eq!(model.endpoints[&id].ipv6, Some("fd00:22::77".parse().unwrap()));
    let id = model.connect(connect_spec("d", "D3"), &host()).unwrap();
    assert_eq!(model.endpoints[&id].ipv6, Some("fd00:22::3".parse().unwrap()), "goes on behind D1");
}

#[test]
fn macs_of_ipv6_only_endpoints_are_unlike_each_other() {
    let mut model = Model::default();
    let spec = NetworkSpec { enable_ipv4: Some(false), ..network_spec("s", "fd00:48::/48") };
    model.create_network(spec, &host()).unwrap();
    let mut macs = BTreeSet::from([model.network("s").unwrap().bridge_mac()]);
    // The same end, and twice the same digest of what is before it.
    for address in ["fd00:48::2", "fd00:48:0:1::2", "fd00:48:0:0:1::2", "fd00:48:0:100::2"] {
        let mut spec = connect_spec("s", &address.replace(':', "-"));
        spec.addresses = vec![address.parse().unwrap()];
        let id = model.connect(spec, &host()).unwrap();
        let mac = model.endpoints[&id].mac;
        assert_eq!(mac.0[0], 2, "locally administered, one station");
        assert!(macs.insert(mac), "{mac} twice");
    }
}

#[test]
fn a_port_is_published_in_both_families_under_one_number() {
    let mut model = dual_lab();
    assert_eq!(
        publish(&mut model, "D1", &["8080:80"]).unwrap(),
        ["tcp 0.0.0.0:8080->80", "tcp [::]:8080->80"]
    );
    assert_eq!(publish(&mut model, "D1", &["[::1]:8081:80"]).unwrap(), ["tcp [::1]:8081->80"]);
    assert_eq!(
        publish(&mut model, "D1", &["[fd00::2]:8082-8083:90-91/udp"]).unwrap(),
        ["udp [fd00::2]:8082->90", "udp [fd00::2]:8083->91"]
    );
    assert_eq!(
        publish(&mut model, "A1", &["8081:80"]).unwrap(),
        ["tcp 0.0.0.0:8081->80"],
        "the other family's port is another one"
    );
    // 8080 is taken in both, 8081 in one.
    assert_eq!(
        publish(&mut model, "D1", &["8080-8090:81"]).unwrap(),
        ["tcp 0.0.0.0:8082->81", "tcp [::]:8082->81"]
    );
    refuse(
        &mut model,
        |model| publish(model, "D1", &["[fe80::1]:80:80"]),
        RefusalKind::Invalid,
        "fe80::1 is no address of this host: give one that is, or ::",
    );
    refuse(
        &mut model,
        |model| publish(model, "A1", &["[::1]:80:80"]),
        RefusalKind::Invalid,
        "network \"a\" has no IPv6: ::1 can't lead into it",
    );
    refuse(
        &mut model,
        |model| publish(model, "S1", &["8080:80"]),
        RefusalKind::Conflict,
        "tcp [::]:8080 is published by D1 already: give another host port",
    );
    let removed = model.unpublish("D1", None, &ports(&["8080:80"])).unwrap();
    assert_eq!(removed.len(), 2, "what was published as one goes as one");
}

#[test]
fn a_host_binding_in_one_family_means_that_one_alone() {
    for (bindings, expected) in [
        (&["127.0.0.1"][..], &["tcp 127.0.0.1:80->80"][..]),
        (&["::1"], &["tcp [::1]:80->80"]),
        (&["::1", "127.0.0.1"], &["tcp 127.0.0.1:80->80", "tcp [::1]:80->80"]),
        (&["0.0.0.0"], &["tcp 0.0.0.0:80->80", "tcp [::]:80->80"]),
        (&["::", "127.0.0.1"], &["tcp 127.0.0.1:80->80", "tcp [::]:80->80"]),
    ] {
        let mut model = Model::default();
        let mut spec = network_spec("d", "fd00:22::/64");
        spec.host_bindings = bindings.iter().map(|text| text.parse().unwrap()).collect();
        model.create_network(spec, &host()).unwrap();
        model.connect(connect_spec("d", "D1"), &host()).unwrap();
        assert_eq!(publish(&mut model, "D1", &["80:80"]).unwrap(), expected, "{bindings:?}");
    }
}
