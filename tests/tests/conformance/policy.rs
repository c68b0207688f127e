//! POL: the user's allowlist.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::probe::expect_same;

use super::{Neighbours, counted, neighbours};

/// Fails unless exactly the first sources reach the published port.
fn expect_admitted(
    lab: &Lab,
    containers: &Neighbours,
    listed: &[IpAddr],
    others: &[IpAddr],
) -> Result<()> {
    let published = (lab.net().host, 8080);
    for &source in listed {
        let from = (source, 0);
        let seen = lab.outside().tcp(published).from(from).exchange()?;
        seen.by("a1")?.saw_client_at(source)?;
        let seen = lab.outside().udp(published).from(from).exchange()?;
        seen.by("a1")?.saw_client_at(source)?;
    }
    let admitted = containers.a1_tcp.accepted().len();
    for &source in others {
        let from = (source, 0);
        counted(lab, "policy", || lab.outside().tcp(published).from(from).dropped())?;
    }
    if let Some(&source) = others.first() {
        let from = (source, 0);
        counted(lab, "policy", || lab.outside().udp(published).from(from).dropped())?;
    }
    expect_same("clients of the container", &containers.a1_tcp.accepted().len(), &admitted)
}

pub(crate) fn listed_sources_pass_and_others_do_not(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let [first, _, third, ..] = net.guests;
        let allow_only = |sources: &str| {
            lab.set_policy("net-a", &format!("# only\nallow from {sources}\ndeny from any\n"))
        };
        allow_only(&first.to_string())?;
        expect_admitted(lab, &containers, &[net.guests[0]], &[net.guests[1], net.outside])?;
        allow_only(net.guests_prefix)?;
        expect_admitted(lab, &containers, &[net.guests[0], net.guests[4]], &[net.outside])?;
        allow_only(&format!("{first}-{third}"))?;
        expect_admitted(
            lab,
            &containers,
            &[net.guests[0], net.guests[2]],
            &[net.guests[3], net.outside],
        )?;

        // A long list, of whom two are there.
        let last = net.guests[4];
        let strangers: String =
            (1..=100).map(|number| format!("allow from {}\n", net.on_link(9, number))).collect();
        let text = format!("{strangers}allow from {first}\nallow from {last}\ndeny from any\n");
        lab.set_policy("net-a", &text)?;
        expect_admitted(lab, &containers, &[first, last], &[net.guests[1], net.outside])?;

        // What the container itself dials is answered, whoever is listed.
        let _outside = lab.outside().tcp_server("outside", (net.outside, 7))?;
        containers.a1.tcp((net.outside, 7)).exchange()?.by("outside")?.saw_client_at(net.host)?;
        lab.set_policy("net-a", "")?;
        expect_admitted(lab, &containers, &[net.outside], &[])
    })
}

pub(crate) fn bad_rule_file_is_refused_whole(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let [first, second, third, ..] = net.guests;
        lab.set_policy("net-a", &format!("allow from {first}\ndeny from any\n"))?;
        let before = lab.netdp(&["policy", "show", "net-a", "--json"])?;
        let bad = [
            "allow from 192.0.2.300".to_owned(),
            "allow from 2001:db8::1::2".to_owned(),
            "allow from 192.0.2.0/33".to_owned(),
            "allow from 2001:db8::/129".to_owned(),
            "allow from 192.0.2.1-2001:db8::1".to_owned(),
            format!("allow from {third}-{first}"),
            "permit from any".to_owned(),
            "allow from".to_owned(),
        ];
        for line in bad {
            let file = lab.policy_file(&format!("allow from {second}\n{line}\n"))?;
            let reason = lab.netdp_fails(&["policy", "set", "net-a", &file])?;
            ensure!(reason.contains("line 2"), "name the line: {reason}");
            let after = lab.netdp(&["policy", "show", "net-a", "--json"])?;
            expect_same("the policy", &after, &before)?;
        }
        expect_admitted(lab, &containers, &[net.guests[0]], &[net.guests[1], net.outside])
    })
}

pub(crate) fn first_match_decides(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let (all, first) = (net.guests_prefix, net.guests[0]);
        let text = format!("deny from {first}\nallow from {all}\ndeny from any\n");
        lab.set_policy("net-a", &text)?;
        expect_admitted(lab, &containers, &[net.guests[1]], &[net.guests[0], net.outside])?;
        lab.set_policy("net-a", &format!("allow from {all}\ndeny from {first}\n"))?;
        expect_admitted(lab, &containers, &[net.guests[0], net.guests[1], net.outside], &[])?;
        // The user's rules come before netdp's own, and an allow is no way around those.
        lab.set_policy("net-a", "allow from any\n")?;
        counted(lab, "direct_access", || lab.outside().tcp((net.a1, 80)).dropped())
    })
}

pub(crate) fn narrower_rules_hold_where_they_are_written(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let narrow = format!("allow from {}-{}\n", net.guests[1], net.guests[2]);
        let broad = format!("deny from {}\n", net.guests_prefix);
        lab.set_policy("net-a", &format!("{narrow}{broad}"))?;
        expect_admitted(
            lab,
            &containers,
            &[net.guests[2], net.outside],
            &[net.guests[0], net.guests[3]],
        )?;
        lab.set_policy("net-a", &format!("{broad}{narrow}"))?;
        expect_admitted(lab, &containers, &[net.outside], &[net.guests[0], net.guests[2]])
    })
}

pub(crate) fn new_deny_cuts_an_open_flow(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let open = || lab.outside().tcp((net.host, 8080)).from((net.guests[0], 0)).open();
        let mut cut = open()?;
        cut.exchange(100_000)?.by("a1")?;
        let mut spared = lab.outside().tcp((net.host, 8080)).from((net.guests[1], 0)).open()?;
        spared.exchange(100_000)?.by("a1")?;
        lab.set_policy("net-a", &format!("deny from {}\n", net.guests[0]))?;
        counted(lab, "policy", || {
            ensure!(cut.exchange(1000).is_err(), "the denied flow goes on");
            Ok(())
        })?;
        spared.exchange(100_000)?.by("a1")?;
        expect_admitted(lab, &containers, &[net.guests[1]], &[net.guests[0]])
    })
}

pub(crate) fn allow_put_back_opens_again(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let allowed = format!("allow from {}\ndeny from any\n", net.guests[0]);
        lab.set_policy("net-a", &allowed)?;
        let mut session = lab.outside().tcp((net.host, 8080)).from((net.guests[0], 0)).open()?;
        session.exchange(100_000)?.by("a1")?;
        if lab.has_netdp() {
            lab.netdp(&["policy", "rm", "net-a", "1"])?;
        } else {
            lab.set_policy("net-a", "deny from any\n")?;
        }
        counted(lab, "policy", || {
            ensure!(session.exchange(1000).is_err(), "the flow outlived its allow");
            Ok(())
        })?;
        lab.set_policy("net-a", &allowed)?;
        expect_admitted(lab, &containers, &[net.guests[0]], &[net.guests[1]])
    })
}
