//! POL: the user's allowlist.

use anyhow::{Result, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::probe::expect_same;

use crate::{Containers, counted, standard_containers};

/// Fails unless exactly the first sources reach the published port.
fn expect_admitted(
    lab: &Lab,
    containers: &Containers,
    listed: &[&str],
    others: &[&str],
) -> Result<()> {
    for source in listed {
        let from = format!("{source}:0");
        let seen = lab.outside().tcp("10.0.0.2:8080").from(&from).exchange()?;
        seen.by("a1")?.saw_client_at(source)?;
        let seen = lab.outside().udp("10.0.0.2:8080").from(&from).exchange()?;
        seen.by("a1")?.saw_client_at(source)?;
    }
    let admitted = containers.a1_tcp.accepted().len();
    for source in others {
        let from = format!("{source}:0");
        counted(lab, "policy", || lab.outside().tcp("10.0.0.2:8080").from(&from).dropped())?;
    }
    if let Some(source) = others.first() {
        let from = format!("{source}:0");
        counted(lab, "policy", || lab.outside().udp("10.0.0.2:8080").from(&from).dropped())?;
    }
    expect_same("clients of the container", &containers.a1_tcp.accepted().len(), &admitted)
}

pub(crate) fn listed_sources_pass_and_others_do_not(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        lab.set_policy("net-a", "# one address\nallow from 192.0.2.1\ndeny from any\n")?;
        expect_admitted(lab, &containers, &["192.0.2.1"], &["192.0.2.2", "10.0.0.3"])?;
        lab.set_policy("net-a", "allow from 192.0.2.0/24\ndeny from any\n")?;
        expect_admitted(lab, &containers, &["192.0.2.1", "192.0.2.5"], &["10.0.0.3"])?;
        lab.set_policy("net-a", "allow from 192.0.2.1-192.0.2.3\ndeny from any\n")?;
        expect_admitted(lab, &containers, &["192.0.2.1", "192.0.2.3"], &["192.0.2.4", "10.0.0.3"])?;

        // What the container itself dials is answered, whoever is listed.
        let _outside = lab.outside().tcp_server("outside", "10.0.0.3:7")?;
        containers.a1.tcp("10.0.0.3:7").exchange()?.by("outside")?.saw_client_at("10.0.0.2")?;
        lab.set_policy("net-a", "")?;
        expect_admitted(lab, &containers, &["10.0.0.3"], &[])
    })
}

pub(crate) fn bad_rule_file_is_refused_whole(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        lab.set_policy("net-a", "allow from 192.0.2.1\ndeny from any\n")?;
        let before = lab.netdp(&["policy", "show", "net-a", "--json"])?;
        let bad = [
            "allow from 192.0.2.2\nallow from 192.0.2.300\n",
            "allow from 192.0.2.2\nallow from 192.0.2.0/33\n",
            "allow from 192.0.2.2\nallow from 192.0.2.9-192.0.2.3\n",
            "allow from 192.0.2.2\npermit from any\n",
            "allow from 192.0.2.2\nallow from\n",
        ];
        for text in bad {
            let file = lab.policy_file(text)?;
            let reason = lab.netdp_fails(&["policy", "set", "net-a", &file])?;
            ensure!(reason.contains("line 2"), "name the line: {reason}");
            let after = lab.netdp(&["policy", "show", "net-a", "--json"])?;
            expect_same("the policy", &after, &before)?;
        }
        expect_admitted(lab, &containers, &["192.0.2.1"], &["192.0.2.2", "10.0.0.3"])
    })
}

pub(crate) fn first_match_decides(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        lab.set_policy("net-a", "deny from 192.0.2.1\nallow from 192.0.2.0/24\ndeny from any\n")?;
        expect_admitted(lab, &containers, &["192.0.2.2"], &["192.0.2.1", "10.0.0.3"])?;
        lab.set_policy("net-a", "allow from 192.0.2.0/24\ndeny from 192.0.2.1\n")?;
        expect_admitted(lab, &containers, &["192.0.2.1", "192.0.2.2", "10.0.0.3"], &[])?;
        // The user's rules come before netdp's own, and an allow is no way around those.
        lab.set_policy("net-a", "allow from any\n")?;
        counted(lab, "direct_access", || lab.outside().tcp("172.20.0.2:80").dropped())
    })
}

pub(crate) fn narrower_rules_hold_where_they_are_written(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        lab.set_policy("net-a", "allow from 192.0.2.2-192.0.2.3\ndeny from 192.0.2.0/24\n")?;
        expect_admitted(lab, &containers, &["192.0.2.3", "10.0.0.3"], &["192.0.2.1", "192.0.2.4"])?;
        lab.set_policy("net-a", "deny from 192.0.2.0/24\nallow from 192.0.2.2-192.0.2.3\n")?;
        expect_admitted(lab, &containers, &["10.0.0.3"], &["192.0.2.1", "192.0.2.3"])
    })
}

pub(crate) fn new_deny_cuts_an_open_flow(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let open = || lab.outside().tcp("10.0.0.2:8080").from("192.0.2.1:0").open();
        let mut cut = open()?;
        cut.exchange(100_000)?.by("a1")?;
        let mut spared = lab.outside().tcp("10.0.0.2:8080").from("192.0.2.2:0").open()?;
        spared.exchange(100_000)?.by("a1")?;
        lab.set_policy("net-a", "deny from 192.0.2.1\n")?;
        counted(lab, "policy", || {
            ensure!(cut.exchange(1000).is_err(), "the denied flow goes on");
            Ok(())
        })?;
        spared.exchange(100_000)?.by("a1")?;
        expect_admitted(lab, &containers, &["192.0.2.2"], &["192.0.2.1"])
    })
}

pub(crate) fn allow_put_back_opens_again(row: &Row) -> Result<Outcome> {
    row.in_standard_lab(|lab| {
        let containers = standard_containers(lab)?;
        let allowed = "allow from 192.0.2.1\ndeny from any\n";
        lab.set_policy("net-a", allowed)?;
        let mut session = lab.outside().tcp("10.0.0.2:8080").from("192.0.2.1:0").open()?;
        session.exchange(100_000)?.by("a1")?;
        lab.netdp(&["policy", "rm", "net-a", "1"])?;
        counted(lab, "policy", || {
            ensure!(session.exchange(1000).is_err(), "the flow outlived its allow");
            Ok(())
        })?;
        lab.set_policy("net-a", allowed)?;
        expect_admitted(lab, &containers, &["192.0.2.1"], &["192.0.2.2"])
    })
}
