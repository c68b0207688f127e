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
    let endpoint = OfferSpec {
        network: "n".into(),
        id: "e".into(),
        name: None,
        addresses: Vec::new(),
        mac: None,
    };
    controller.change(|model, facts| model.offer(endpoint.clone(), facts)).await.unwrap();
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
        let spec = OfferSpec {
            network: "n".into(),
            id: "e".into(),
            name: None,
            addresses: Vec::new(),
            mac: None,
        };
        controller.change(|model, facts| model.offer(spec.clone(), facts)).await.unwrap();
        drop(controller);
        ip("link del ndv2");
        let controller = host.start(&[]).await.unwrap();
        assert!(controller.model().await.endpoints.is_empty());
        assert!(!ip("link").contains("ndv"));
    });
}
