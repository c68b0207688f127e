//! Networks and endpoints of container engines.

use super::*;
use crate::model::{OfferSpec, Place};

const NETWORK: &str = "a4f0c2d91b7e55aa";
const FIRST: &str = "e1e1e1e1e1e1e1e1";
const SECOND: &str = "e2e2e2e2e2e2e2e2";

/// Network `web` of an engine's beside those of [`lab`].
fn engine_lab() -> Model {
    let mut model = lab();
    let spec = NetworkSpec {
        engine_id: Some(NETWORK.to_owned()),
        reserved: ["172.22.0.3".parse().unwrap()].into(),
        ..network_spec("web", "172.22.0.0/24")
    };
    model.create_network(spec, &host()).unwrap();
    model
}

fn offer(id: &str) -> OfferSpec {
    OfferSpec {
        network: NETWORK.to_owned(),
        id: id.to_owned(),
        name: None,
        addresses: Vec::new(),
        mac: None,
    }
}

fn published(model: &Model, id: &str) -> Vec<String> {
    let endpoint = model.endpoint_of_engine(id).unwrap();
    endpoint.ports().map(|port| port.to_string()).collect()
}

#[test]
fn an_offer_has_all_but_a_namespace() {
    let mut model = engine_lab();
    model.offer(offer(FIRST), &host()).unwrap();
    model.offer(OfferSpec { name: Some("shop".into()), ..offer(SECOND) }, &host()).unwrap();
    let first = model.endpoint("web", "e1e1e1e1e1e1").unwrap();
    assert_eq!(first.ipv4, Some(Ipv4Addr::new(172, 22, 0, 2)));
    assert_eq!((first.host_interface.as_str(), first.interface.as_str()), ("ndv4", "ndc4"));
    assert_eq!(first.netns_identity(), None);
    let second = model.endpoint("web", "shop").unwrap();
    assert_eq!(second.ipv4, Some(Ipv4Addr::new(172, 22, 0, 4)), "the one before is reserved");
    assert!(!model.gateway_endpoints().values().any(|&id| id == first.id || id == second.id));
}

#[test]
fn what_an_engine_repeats_changes_nothing() {
    let mut model = engine_lab();
    let id = model.offer(offer(FIRST), &host()).unwrap();
    let before = model.clone();
    assert_eq!(model.offer(offer(FIRST), &host()), Ok(id));
    assert_eq!(model, before);
    model.leave(FIRST);
    model.conceal(FIRST);
    model.leave("unknown");
    assert_eq!(model, before);

    assert!(model.withdraw(FIRST).is_some());
    assert!(model.withdraw(FIRST).is_none());
    assert!(model.remove_network_of_engine(NETWORK).unwrap().is_some());
    assert!(model.remove_network_of_engine(NETWORK).unwrap().is_none());
    let lab = lab();
    assert_eq!((model.networks, model.endpoints), (lab.networks, lab.endpoints));
}

/// The agent was killed after it had made the first, and before it could say so.
#[test]
fn an_offer_that_its_engine_forgot_makes_way() {
    let asked = |id: &str| OfferSpec {
        name: Some("shop".to_owned()),
        addresses: vec!["172.22.0.9".parse().unwrap()],
        mac: Some(MacAddress([2, 0, 0, 0, 0, 9])),
        ..offer(id)
    };
    let only_name = |id: &str| OfferSpec { addresses: Vec::new(), mac: None, ..asked(id) };
    let only_mac = |id: &str| OfferSpec { name: None, addresses: Vec::new(), ..asked(id) };
    let only_address = |id: &str| OfferSpec { name: None, mac: None, ..asked(id) };
    for again in [only_name(SECOND), only_mac(SECOND), only_address(SECOND)] {
        let mut model = engine_lab();
        model.offer(asked(FIRST), &host()).unwrap();
        model.offer(again.clone(), &host()).unwrap();
        assert!(model.endpoint_of_engine(FIRST).is_err(), "{again:?}");

        // What a container has stays its own.
        let mut model = engine_lab();
        model.offer(asked(FIRST), &host()).unwrap();
        model.take(FIRST, "/run/docker/netns/1".into()).unwrap();
        let before = model.clone();
        let refusal = model.offer(again, &host()).unwrap_err();
        assert_eq!((refusal.kind, &model), (RefusalKind::Conflict, &before));
    }
    let mut model = engine_lab();
    model.offer(offer(FIRST), &host()).unwrap();
    model.offer(asked(SECOND), &host()).unwrap();
    assert!(model.endpoint_of_engine(FIRST).is_ok(), "it has nothing of the other's");
}

#[test]
fn ports_are_those_of_the_last_word() {
    let mut model = engine_lab();
    model.offer(offer(FIRST), &host()).unwrap();
    model.take(FIRST, "/run/docker/netns/1".into()).unwrap();
    model.expose(FIRST, &ports(&["8080:80", "81"]), &host()).unwrap();
    assert_eq!(published(&model, FIRST), ["tcp 0.0.0.0:8080", "tcp 0.0.0.0:49153"]);
    // The same once more, and then others.
    model.expose(FIRST, &ports(&["8080:80", "81"]), &host()).unwrap();
    assert_eq!(published(&model, FIRST), ["tcp 0.0.0.0:8080", "tcp 0.0.0.0:49153"]);
    model.expose(FIRST, &ports(&["8081:80"]), &host()).unwrap();
    assert_eq!(published(&model, FIRST), ["tcp 0.0.0.0:8081"]);
    let refusal = model.publish("A1", None, &ports(&["8081:80"]), &host()).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Conflict);

    model.leave(FIRST);
    assert_eq!(published(&model, FIRST), Vec::<String>::new());
    let place = &model.endpoint_of_engine(FIRST).unwrap().place;
    assert!(matches!(place, Place::Engine(engaged) if engaged.sandbox.is_none()), "{place:?}");
    assert!(model.expose("unknown", &[], &host()).is_err());
}

#[test]
fn a_closed_network_publishes_nothing_of_an_engines() {
    let mut model = lab();
    let spec = NetworkSpec {
        engine_id: Some(NETWORK.to_owned()),
        internal: true,
        ..network_spec("inside", "172.22.0.0/24")
    };
    model.create_network(spec, &host()).unwrap();
    model.offer(offer(FIRST), &host()).unwrap();
    assert_eq!(model.expose(FIRST, &ports(&["8080:80"]), &host()), Ok(Vec::new()));
}

#[test]
fn a_network_goes_with_what_its_engine_forgot_and_not_with_the_users() {
    let mut model = engine_lab();
    model.offer(offer(FIRST), &host()).unwrap();
    model.connect(connect_spec("web", "W1"), &host()).unwrap();
    let mut refused = model.clone();
    let refusal = refused.remove_network_of_engine(NETWORK).unwrap_err();
    assert!(refusal.message.contains("(W1)"), "{refusal}");
    model.disconnect("web", "W1").unwrap();
    model.remove_network_of_engine(NETWORK).unwrap();
    assert!(model.endpoint_of_engine(FIRST).is_err());
}

#[test]
fn a_proposed_subnet_is_beside_what_is_there_and_what_is_held() {
    let mut model = engine_lab();
    let held = ["172.17.0.0/16".parse().unwrap()].into();
    let subnet = model.propose_subnet(false, &held, [0; 5], &host()).unwrap();
    assert_eq!(subnet.to_string(), "172.18.0.0/16");
    let subnet = model.propose_subnet(true, &held, [1, 2, 3, 4, 5], &host()).unwrap();
    assert_eq!(subnet.to_string(), "fd01:203:405::/64");
    assert!(model.unique_local.is_some(), "the next one is of the same prefix");
}
