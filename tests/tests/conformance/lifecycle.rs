//! LIF: what remains when a container or netdp itself goes.

use anyhow::{Result, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::probe::{PATIENCE, expect_same};
use netdp_tests::runtime::poll_until;
use netdp_tests::snapshot::Snapshot;

use crate::{Containers, expect_no_flows_of, standard_containers};

/// Names of the endpoints that netdp knows in a network.
fn endpoint_names(lab: &Lab, network: &str) -> Result<Vec<String>> {
    let inspected = lab.json(&["network", "inspect", network])?;
    let endpoints = inspected[0]["endpoints"].as_array().cloned().unwrap_or_default();
    Ok(endpoints.iter().filter_map(|one| one["name"].as_str().map(String::from)).collect())
}

pub(crate) fn vanished_container_leaves_nothing(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let Containers { a1, a2: _a2, b1: _b1, a1_tcp, a1_udp } = standard_containers(lab)?;
        let mut client = lab.outside().udp((net.host, 8080)).from((net.outside, 5000)).open()?;
        client.exchange()?.by("a1")?;
        let mut session = lab.outside().tcp((net.host, 8080)).from((net.outside, 5001)).open()?;
        session.exchange(1000)?.by("a1")?;
        ensure!(expect_no_flows_of(lab, net.a1).is_err(), "expect open flows");

        drop((a1_tcp, a1_udp));
        lab.vanish(&a1)?;
        poll_until(PATIENCE, "the end of endpoint a1", || {
            let names = endpoint_names(lab, "net-a")?;
            Ok((!names.contains(&"a1".to_owned())).then_some(()))
        })?;
        expect_same("endpoints left", &endpoint_names(lab, "net-a")?, &vec!["a2".to_owned()])?;
        expect_no_flows_of(lab, net.a1)?;
        lab.outside().tcp((net.host, 8080)).refused()?;
        lab.outside().udp((net.host, 8080)).refused()?;

        // The address is free again, and its next owner inherits nothing.
        let heir = lab.attach("net-a", "heir", net.a1, &[])?;
        let tcp = heir.tcp_server("heir", (net.a1, 80))?;
        let udp = heir.udp_server("heir", (net.a1, 80))?;
        client.send()?;
        ensure!(session.exchange(1000).is_err(), "a session outlived its container");
        lab.host().udp((net.a1, 80)).exchange()?.by("heir")?;
        expect_same("datagrams of the heir", &udp.received().len(), &1)?;
        expect_same("clients of the heir", &tcp.accepted(), &vec![])?;
        // So is the host port.
        let a3 = lab.attach("net-a", "a3", net.a3, &["8080:80"])?;
        let _a3 = a3.tcp_server("a3", (net.a3, 80))?;
        lab.outside().tcp((net.host, 8080)).exchange()?.by("a3")?.saw_client_at(net.outside)?;
        Ok(())
    })
}

pub(crate) fn purge_leaves_the_host_as_before(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_lab(
        |builder| builder.agent_stopped(),
        |lab| {
            // What must come back is not a default.
            lab.host().set_sysctl("net.ipv4.ip_local_reserved_ports", "61000-61010")?;
            lab.host().set_sysctl("net.ipv4.conf.up0.rp_filter", "1")?;
            let before = Snapshot::of_host(lab)?;
            lab.agent()?.start()?;
            {
                let containers = standard_containers(lab)?;
                let rules = format!("allow from {}\ndeny from any\n", net.outside);
                lab.set_policy("net-a", &rules)?;
                let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
                lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?;
                containers.b1.tcp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
            }
            ensure!(before != Snapshot::of_host(lab)?, "the snapshot missed a running netdp");
            lab.netdp(&["purge"])?;
            lab.agent()?.stop()?;
            before.expect_same(&Snapshot::of_host(lab)?)?;
            for container in lab.namespaces().iter().skip(2) {
                expect_same("links of a container", &container.links()?, &vec!["lo".to_owned()])?;
            }
            lab.outside().tcp((net.host, 8080)).refused()?;
            // The next start finds nothing of the last one.
            lab.agent()?.start()?;
            let networks = lab.json(&["network", "ls"])?;
            expect_same("networks", &networks, &serde_json::json!([]))
        },
    )
}
