//! The main job of netdp, shown on real packets: the real agent and the real command line in a
//! laboratory of network namespaces, with curl and HTTP servers as containers.
//!
//! Every verdict is computed from the addresses that both ends saw. Without `--keep` nothing of it
//! is visible outside of this process.

use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use netdp_tests::lab::{Lab, SUBNET_A, SUBNET_B};
use netdp_tests::namespace::{Fate, Namespace};
use netdp_tests::runtime::{ensure_root, is_installed, isolate};
use netdp_tests::snapshot::Snapshot;

mod http;
mod keep;
mod screen;

use http::{SERVE, Site, Visit, curl, curl_line, serve};
use screen::Screen;

/// Namespaces of the demo are `netdp-demo-<role>`.
const NAME: &str = "netdp-demo";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => isolate().and_then(|()| run(None)),
        ["--keep"] => ensure_root().and_then(|()| run(Some(&keep::directory()))),
        ["--remove"] => ensure_root().and_then(|()| keep::remove()).map(|()| true),
        [SERVE, name, address] => serve(name, address).map(|()| true),
        _ => {
            eprintln!("usage: demo [--keep | --remove]");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Shows everything and says whether all verdicts were good.
fn run(kept_in: Option<&Path>) -> Result<bool> {
    ensure!(is_installed("curl"), "run the demo: curl is missing; install it");
    let started = Instant::now();
    let mut screen = Screen::new();
    screen.title("netdp demo: a host, the outside, two networks, three containers");
    screen.saw("host", "10.0.0.2 on up0; runs `netdp agent`; has no iptables or nft rule");
    screen.saw("outside", "10.0.0.3, 192.0.2.1, 192.0.2.2; has routes to both container subnets");

    let mut builder = Lab::builder().named(NAME).agent_stopped();
    if let Some(directory) = kept_in {
        keep::prepare(directory)?;
        builder = builder.kept_in(directory);
    }
    let lab = builder.build()?;
    let before = Snapshot::of_host(&lab)?;
    lab.agent()?.start()?;
    let fate = if kept_in.is_some() { Fate::Detached } else { Fate::DiesWithParent };
    let stage = Stage::set_up(&lab, fate, &mut screen)?;
    lab.explain(stage.show_packets(&mut screen))?;
    stage.show_tables(&mut screen)?;
    match kept_in {
        Some(_) => keep::explain(&lab, &mut screen)?,
        None => {
            drop(stage);
            remove(lab, &before, &mut screen)?;
        }
    }
    let failures = screen.failures();
    let seconds = started.elapsed().as_secs();
    println!();
    if failures == 0 {
        screen.title(&format!("all as promised, in {seconds} s"));
    } else {
        screen.title(&format!("{failures} not as promised, in {seconds} s"));
    }
    Ok(failures == 0)
}

/// The containers, and what serves in them.
struct Stage<'a> {
    lab: &'a Lab,
    web1: Namespace,
    web2: Namespace,
    db1: Namespace,
    web1_site: Site,
    _outside_site: Site,
}

impl<'a> Stage<'a> {
    fn set_up(lab: &'a Lab, fate: Fate, screen: &mut Screen) -> Result<Self> {
        screen.step("Two networks, three containers, one published port");
        for (name, subnet) in [("web", SUBNET_A), ("db", SUBNET_B)] {
            netdp(lab, screen, &["network", "create", name, "--subnet", subnet])?;
        }
        let connect = |screen: &Screen, network, name, address, ports: &[&str]| {
            let container = lab.container(name)?;
            let arguments = ["connect", network, container.name(), "--name", name, "--ip", address];
            netdp(lab, screen, &[&arguments[..], ports].concat())?;
            Ok::<_, anyhow::Error>(container)
        };
        let web1 = connect(screen, "web", "web1", "172.20.0.2", &["-p", "8080:80"])?;
        let web2 = connect(screen, "web", "web2", "172.20.0.3", &[])?;
        let db1 = connect(screen, "db", "db1", "172.21.0.2", &[])?;
        let directory = lab.directory();
        let web1_site = Site::start(&web1, "web1", "172.20.0.2:80", directory, fate)?;
        let _outside_site = Site::start(lab.outside(), "outside", "10.0.0.3:80", directory, fate)?;
        Ok(Self { lab, web1, web2, db1, web1_site, _outside_site })
    }

    fn show_packets(&self, screen: &mut Screen) -> Result<()> {
        let outside = self.lab.outside();
        screen.step("Out, with masquerade");
        let visit = self.visit(screen, ("web1", &self.web1), "http://10.0.0.3/", None)?;
        let masked = visit.is_some_and(|visit| {
            visit.server == "outside"
                && visit.client.ip() == ip("172.20.0.2")
                && visit.seen_client.ip() == ip("10.0.0.2")
        });
        screen.verdict(masked, "the outside sees the host's address, not the container's");

        screen.step("In, through the published port");
        let visit = self.visit(screen, ("outside", outside), "http://10.0.0.2:8080/", None)?;
        let kept = visit.is_some_and(|visit| {
            visit.server == "web1"
                && visit.client.ip() == ip("10.0.0.3")
                && visit.seen_client == visit.client
        });
        screen.verdict(kept, "the container sees the client's own address and port");

        screen.step("Within a network");
        let visit = self.visit(screen, ("web2", &self.web2), "http://172.20.0.2/", None)?;
        let untouched = visit.is_some_and(|visit| {
            visit.server == "web1"
                && visit.client.ip() == ip("172.20.0.3")
                && visit.seen_client == visit.client
        });
        screen.verdict(untouched, "neighbours talk directly, untranslated");

        screen.step("Across networks, and straight in from outside");
        self.show_drop(screen, ("db1", &self.db1), "http://172.20.0.2/", None, "isolation")?;
        self.show_drop(screen, ("outside", outside), "http://172.20.0.2/", None, "direct_access")?;

        screen.step("An allowlist: a listed and an unlisted source");
        let rules = "allow from 192.0.2.1\ndeny from any\n";
        let file = self.lab.policy_file(rules)?;
        screen.command("host", "cat policy");
        screen.block(rules);
        screen.command("host", "netdp policy set web policy");
        self.lab.netdp(&["policy", "set", "web", &file])?;
        let url = "http://10.0.0.2:8080/";
        let visit = self.visit(screen, ("outside", outside), url, Some("192.0.2.1"))?;
        let listed = visit.is_some_and(|visit| {
            visit.server == "web1"
                && visit.client.ip() == ip("192.0.2.1")
                && visit.seen_client == visit.client
        });
        screen.verdict(listed, "a listed source passes");
        self.show_drop(screen, ("outside", outside), url, Some("192.0.2.2"), "policy")
    }

    /// One request, and what both ends saw of it.
    fn visit(
        &self,
        screen: &Screen,
        (who, client): (&str, &Namespace),
        url: &str,
        from: Option<&str>,
    ) -> Result<Option<Visit>> {
        screen.command(who, &curl_line(url, from));
        let visit = curl(client, url, from)?;
        match &visit {
            Some(visit) => {
                screen.saw(who, &format!("called from {}", visit.client));
                let (seen, own) = (visit.seen_client, visit.seen_self);
                screen.saw(&visit.server, &format!("saw {seen} come to {own}"));
            }
            None => screen.saw(who, "got no answer"),
        }
        Ok(visit)
    }

    /// One request to web1 that must be dropped, seen by nobody, and counted under `reason` alone.
    fn show_drop(
        &self,
        screen: &mut Screen,
        client: (&str, &Namespace),
        url: &str,
        from: Option<&str>,
        reason: &str,
    ) -> Result<()> {
        let (counters, clients) = (self.lab.counters()?, self.web1_site.clients()?);
        let answered = self.visit(screen, client, url, from)?.is_some();
        let moved = self.lab.counters()?.since(&counters);
        let reached = self.web1_site.clients()? != clients;
        screen.saw("web1", if reached { "saw a client" } else { "saw nobody" });
        for ((network, reason), packets) in &moved {
            let place = if network.is_empty() { "host" } else { network };
            screen.saw("host", &format!("counted {packets} packets: {place}, {reason}"));
        }
        let counted = !moved.is_empty() && moved.keys().all(|(_, name)| name == reason);
        screen.verdict(!answered && !reached && counted, &format!("dropped, counted as {reason}"));
        Ok(())
    }

    fn show_tables(&self, screen: &mut Screen) -> Result<()> {
        screen.step("Flows and counters");
        for verb in ["flows", "status"] {
            let text = netdp(self.lab, screen, &[verb])?;
            screen.block(&text);
        }
        screen.command("host", "nft list ruleset");
        let netfilter_is_empty = self.lab.expect_no_netfilter().is_ok();
        screen.verdict(netfilter_is_empty, "the host's netfilter tables are empty");
        Ok(())
    }
}

/// Runs a netdp command and shows it as typed.
fn netdp(lab: &Lab, screen: &Screen, arguments: &[&str]) -> Result<String> {
    screen.command("host", &format!("netdp {}", arguments.join(" ")));
    lab.netdp(arguments)
}

fn remove(lab: Lab, before: &Snapshot, screen: &mut Screen) -> Result<()> {
    screen.step("Everything is removed");
    netdp(&lab, screen, &["purge"])?;
    lab.agent()?.stop()?;
    let difference = before.expect_same(&Snapshot::of_host(&lab)?);
    if let Err(error) = &difference {
        screen.block(&error.to_string());
    }
    screen.verdict(difference.is_ok(), "links, routes, settings and pins are as before netdp");
    let directory = lab.directory().to_owned();
    let namespaces = lab.namespaces();
    drop(lab);
    let is_gone = !directory.exists() && !namespaces.iter().any(|one| one.path().exists());
    screen.verdict(is_gone, "agent, namespaces and files are gone");
    Ok(())
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("addresses of the demo are written right")
}
