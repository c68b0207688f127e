//! Ends that a container engine takes: what the controller makes, adopts, and lets go.

use super::*;
use crate::model::OfferSpec;

/// Network `web` of an engine's, and an endpoint of it.
async fn offer(controller: &Controller) {
    let network = NetworkSpec {
        name: "web".into(),
        engine_id: Some("n".into()),
        subnets: vec!["172.20.0.0/24".parse().unwrap()],
        ..NetworkSpec::default()
    };
    controller.change(|model, facts| model.create_network(network.clone(), facts)).await.unwrap();
    offer_another(controller, "e").await;
}

/// An endpoint of network `web` that the engine calls so.
async fn offer_another(controller: &Controller, id: &str) {
    let endpoint = OfferSpec {
        network: "n".into(),
        id: id.into(),
        name: None,
        addresses: Vec::new(),
        mac: None,
    };
    controller.change(|model, facts| model.offer(endpoint.clone(), facts)).await.unwrap();
}

fn mark(link: &str, alias: &str) {
    let status = Command::new("ip").args(["link", "set", link, "alias", alias]).status().unwrap();
    assert!(status.success(), "ip link set {link} alias {alias}: {status}");
}

/// ifindex of the host's end of the blank, once it is there and has its program.
async fn blank(host: &Host, controller: &Controller) -> u32 {
    eventually("a blank", async || host.program().blank.is_some()).await;
    assert_eq!(controller.check().await.unwrap(), []);
    assert_eq!(controller.snapshot().troubles, Vec::<String>::new());
    let blank = host.program().blank.unwrap();
    let links = ip("link");
    assert!(links.contains(&format!("{blank}: ndv0@ndc0:")), "{links}");
    blank
}

/// Does what an engine does with what it is offered.
fn take(container: &Namespace) {
    let tid = container.run(gettid);
    ip(&format!("link set ndc1 netns {tid} name eth0"));
    container.run(|| {
        ip("addr add 172.20.0.2/24 dev eth0");
        ip("link set eth0 up");
    });
}

#[test]
fn an_end_that_is_taken_carries_traffic_and_is_adopted_by_the_next_agent() {
    on_a_host(async |host| {
        let before = settled();
        let controller = host.start(&[]).await.unwrap();
        offer(&controller).await;
        assert_eq!(controller.check().await.unwrap(), []);
        // What waits is no uplink, and out of everybody's way.
        let waiting = ip("-d link show ndc1");
        assert!(
            waiting.contains("netdp offer ndc1") && waiting.contains("state DOWN"),
            "{waiting}"
        );
        assert_eq!(host.program().uplinks.len(), 2);

        let container = Namespace::new().unwrap();
        take(&container);
        container.serve(7);
        assert_eq!(ask(Ipv4Addr::new(172, 20, 0, 2), 7).as_deref(), Some("172.20.0.1"));
        assert_eq!(controller.check().await.unwrap(), []);
        drop(controller);

        let controller = host.start(&[]).await.unwrap();
        assert_eq!(controller.check().await.unwrap(), []);
        container.serve(8);
        assert_eq!(ask(Ipv4Addr::new(172, 20, 0, 2), 8).as_deref(), Some("172.20.0.1"));
        // The bridge can be made again, and the end is found where it was.
        ip("link del nd-1");
        eventually("no drift", async || controller.check().await.unwrap().is_empty()).await;
        container.serve(9);
        assert_eq!(ask(Ipv4Addr::new(172, 20, 0, 2), 9).as_deref(), Some("172.20.0.1"));

        controller.change(|model, _| Ok(model.withdraw("e"))).await.unwrap();
        assert!(!container.run(|| ip("link")).contains("eth0"));
        controller.purge().await.unwrap();
        assert_same(&before, &dump());
    });
}

#[test]
fn an_end_that_is_given_back_waits_to_be_removed() {
    on_a_host(async |host| {
        let controller = host.start(&[]).await.unwrap();
        offer(&controller).await;
        let container = Namespace::new().unwrap();
        take(&container);
        let tid = gettid();
        container.run(move || ip(&format!("link set eth0 down name ndc1 netns {tid}")));
        assert_eq!(controller.check().await.unwrap(), []);
        controller.change(|model, _| Ok(model.leave("e"))).await.unwrap();
        assert!(ip("link").contains("ndc1"));
        controller.change(|model, _| Ok(model.withdraw("e"))).await.unwrap();
        let links = ip("link");
        assert!(!links.contains("ndc1") && !links.contains("ndv1"), "{links}");
    });
}

#[test]
fn an_end_that_goes_with_its_container_is_not_made_again() {
    on_a_host(async |host| {
        let controller = host.start(&[]).await.unwrap();
        offer(&controller).await;
        let container = Namespace::new().unwrap();
        take(&container);
        drop(container);
        eventually("the endpoint is released", async || {
            controller.model().await.endpoints.is_empty()
        })
        .await;
        assert!(!ip("link").contains("ndv1"));
        assert_eq!(controller.check().await.unwrap(), []);
        drop(controller);
        // Neither is one that went while nobody looked: after a start of the machine there is none.
        let controller = host.start(&[]).await.unwrap();
        offer_another(&controller, "e").await;
        drop(controller);
        ip("link del ndv2");
        let controller = host.start(&[]).await.unwrap();
        assert!(controller.model().await.endpoints.is_empty());
        assert!(!ip("link").contains("ndv"));
    });
}

#[test]
fn the_blank_becomes_the_next_endpoint() {
    on_a_host(async |host| {
        host.dataplane.keep_blank();
        let before = settled();
        let controller = host.start(&[]).await.unwrap();
        offer(&controller).await;
        let first = blank(&host, &controller).await;
        assert_eq!(host.program().uplinks.len(), 2);

        let applied = host.dataplane.applied().len();
        offer_another(&controller, "f").await;
        let programs = host.dataplane.applied().split_off(applied);
        let given = programs.first().unwrap();
        let endpoint = given.endpoints.values().find(|endpoint| endpoint.ifindex == first);
        assert_eq!((given.blank, endpoint.is_some()), (None, true));
        let links = ip("-d link");
        for mark in ["ndv2@ndc2:", "netdp endpoint web/f", "netdp offer ndc2", "02:42:ac:14:00:03"]
        {
            assert!(links.contains(mark), "{mark} in {links}");
        }
        assert_eq!(controller.check().await.unwrap(), []);

        // Another one takes its place, and what was the blank works like any other.
        assert_ne!(blank(&host, &controller).await, first);
        let container = Namespace::new().unwrap();
        let tid = container.run(gettid);
        ip(&format!("link set ndc2 netns {tid} name eth0"));
        container.run(|| {
            ip("addr add 172.20.0.3/24 dev eth0");
            ip("link set eth0 up");
        });
        container.serve(7);
        assert_eq!(ask(Ipv4Addr::new(172, 20, 0, 3), 7).as_deref(), Some("172.20.0.1"));

        for endpoint in ["e", "f"] {
            controller.change(|model, _| Ok(model.withdraw(endpoint))).await.unwrap();
        }
        controller.change(|model, _| model.remove_network_of_engine("n")).await.unwrap();
        assert!(!ip("link").contains("nd"), "{}", ip("link"));
        controller.purge().await.unwrap();
        assert_same(&before, &dump());
    });
}

#[test]
fn a_blank_outlives_the_agent_and_what_is_left_of_one_does_not() {
    on_a_host(async |host| {
        host.dataplane.keep_blank();
        let controller = host.start(&[]).await.unwrap();
        offer(&controller).await;
        let first = blank(&host, &controller).await;
        drop(controller);
        let controller = host.start(&[]).await.unwrap();
        assert_eq!(host.program().blank, Some(first));
        // Somebody's hand, while the agent is there and while it is not.
        ip("link set ndc0 name mine0");
        eventually("another blank", async || {
            host.program().blank.is_some_and(|blank| blank != first)
        })
        .await;
        let second = blank(&host, &controller).await;
        drop(controller);
        // As if the agent had ended between giving one end and the other.
        ip("link set ndc0 name ndc2");
        mark("ndc2", "netdp offer ndc2");
        let controller = host.start(&[]).await.unwrap();
        assert!(!ip("link").contains("ndc2"), "{}", ip("link"));
        assert_ne!(blank(&host, &controller).await, second);
        drop(controller);
        // As if it had ended between making the pair and marking it: group 0x6e640000.
        ip("link del ndv0");
        ip("link add ndv0 group 1852047360 type veth peer name ndc0 group 1852047360");
        let controller = host.start(&[]).await.unwrap();
        assert_eq!(host.program().blank, None);
        blank(&host, &controller).await;

        controller.purge().await.unwrap();
        assert!(!ip("link").contains("nd"), "{}", ip("link"));
    });
}

#[test]
fn a_blank_that_somebody_sets_up_is_shut_again() {
    on_a_host(async |host| {
        host.dataplane.keep_blank();
        let controller = host.start(&[]).await.unwrap();
        offer(&controller).await;
        let first = blank(&host, &controller).await;
        // As a program does that sets each new link up.
        ip("link set ndc0 up");
        eventually("it is down", async || {
            host.program().blank == Some(first) && ip("link show up dev ndc0").is_empty()
        })
        .await;
        offer_another(&controller, "f").await;
        assert_eq!(controller.check().await.unwrap(), []);
        let endpoints = host.program().endpoints;
        assert!(endpoints.values().any(|endpoint| endpoint.ifindex == first), "{endpoints:?}");
        // One that has gone without being given is not made again at once.
        blank(&host, &controller).await;
        ip("link del ndv0");
        eventually("that is seen", async || host.program().blank.is_none()).await;
        offer_another(&controller, "g").await;
        assert_eq!(controller.check().await.unwrap(), []);
        assert!(!ip("link").contains("ndv0"), "{}", ip("link"));
        controller.purge().await.unwrap();
        assert!(!ip("link").contains("nd"), "{}", ip("link"));
    });
}
