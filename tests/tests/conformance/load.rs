//! What holds when there is a lot of everything: connections, flows, half-open flows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::packet::{Envelope, summarise};
use netdp_tests::probe::{PATIENCE, allow_open_files, expect_same};
use netdp_tests::runtime::{patient, poll_until};

use super::{FLOW_COUNTERS, bridge_mac, counted, neighbours, standard_containers};

/// Connections of the host and of containers, each.
const CONNECTIONS: u16 = 5000;
/// In how many turns they are opened: neither comes first.
const TURNS: u16 = 5;
/// Held by the row that has its crowd open.
static CROWD: Mutex<()> = Mutex::new(());

pub(crate) fn host_and_containers_share_a_destination(row: &Row) -> Result<Outcome> {
    let net = row.net();
    // The clients' ends; one row at a time, for there may not be files for two.
    let _turn = CROWD.lock().unwrap_or_else(PoisonError::into_inner);
    allow_open_files(u64::from(CONNECTIONS) * 2)?;
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let target = (net.outside, 7);
        let count = usize::from(CONNECTIONS) * 2;
        let server = lab.outside().crowd_server(target, CONNECTIONS * 2)?;
        let per_turn = u64::from(CONNECTIONS / TURNS);
        let mut next = 0;
        let mut crowds = Vec::new();
        let mut of_the_host = BTreeMap::new();
        for _ in 0..TURNS {
            let clients = [
                (lab.host(), per_turn),
                (&containers.a1, per_turn / 2),
                (&containers.a2, per_turn / 2),
            ];
            for (client, number) in clients {
                let crowd = client.crowd(target, next, number)?;
                next += number;
                if client == lab.host() {
                    of_the_host.extend(crowd.local_addresses()?);
                }
                crowds.push(crowd);
            }
        }
        crowds.iter_mut().try_for_each(|crowd| crowd.speak())?;
        let seen = server.answer(count)?;
        crowds.iter_mut().try_for_each(|crowd| crowd.expect_own_answers())?;
        let strangers: Vec<_> = seen.iter().filter(|(peer, _)| peer.ip() != net.host).collect();
        expect_same("clients that are not seen as the host", &strangers, &vec![])?;
        let distinct: BTreeSet<_> = seen.iter().map(|(peer, _)| peer).collect();
        expect_same("distinct clients", &distinct.len(), &count)?;
        // The host's own connections are nobody's to translate.
        for (peer, mark) in &seen {
            if let Some(own) = of_the_host.get(mark) {
                expect_same("the source of a host's connection", peer, own)?;
            }
        }
        Ok(())
    })
}

/// UDP datagrams of a container to the outside, one from each port given.
fn datagrams(
    lab: &Lab,
    container: &Namespace,
    source: IpAddr,
    port: u16,
    from: impl Iterator<Item = u16>,
) -> Result<impl Iterator<Item = Vec<u8>>> {
    let envelope = Envelope {
        source_mac: container.mac("eth0")?,
        destination_mac: bridge_mac(lab, "net-a")?,
        source,
        destination: lab.net().outside,
        ttl: 64,
    };
    Ok(from.map(move |sport| envelope.udp(sport, port, b"one of many")))
}

pub(crate) fn exhausted_ports_are_refused(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let (a1, a2) = (&containers.a1, &containers.a2);
        // Listens and says nothing: as many answers would be another test.
        let _sink = lab.outside().run(|| Ok(UdpSocket::bind((net.outside, 9))?))?;
        let _server = lab.outside().udp_server("outside", (net.outside, 7))?;
        let _other = lab.outside().udp_server("outside", (net.guests[0], 9))?;
        let mut open = a2.udp((net.outside, 7)).open()?;
        open.exchange()?.saw_client_at(net.host)?;

        // Ports that the host might have for itself are exchanged for one of the NAT range.
        let ephemeral = a1.sysctl("net.ipv4.ip_local_port_range")?;
        let (first, last) = ephemeral.split_once('\t').context("read the range of ports")?;
        let ports = first.trim().parse()?..=last.trim().parse()?;
        let before = lab.counters()?;
        a1.flood("eth0", datagrams(lab, a1, net.a1, 9, ports)?)?;
        poll_until(PATIENCE, "the end of the NAT range", || {
            let moved = lab.counters()?.since(&before);
            Ok(moved.keys().any(|(_, reason)| reason == "ports_exhausted").then_some(()))
        })?;

        let errors = a2.sniff("eth0", move |frame| {
            summarise(frame).is_some_and(|packet| packet.icmp == Some(net.prohibited))
        })?;
        counted(lab, "ports_exhausted", || a2.udp((net.outside, 9)).send())?;
        errors.wait_for(PATIENCE, "administratively prohibited", |_| true)?;
        // Other destinations have ports of their own, and open flows keep theirs.
        a2.udp((net.guests[0], 9)).exchange()?.saw_client_at(net.host)?;
        open.exchange()?.saw_client_at(net.host)?;
        Ok(())
    })
}

/// Flows that a small table holds.
const SMALL_TABLE: u32 = 512;
/// More flows than a small table holds.
const TOO_MANY: u16 = 600;

pub(crate) fn full_flow_table_breaks_nothing(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_lab(
        |builder| builder.flows(SMALL_TABLE),
        |lab| {
            let containers = standard_containers(lab)?;
            let (a1, a2, outside) = (&containers.a1, &containers.a2, lab.outside());
            let _tcp = outside.tcp_server("outside", (net.outside, 7))?;
            let _udp = outside.udp_server("outside", (net.outside, 7))?;
            let mut out = a1.tcp((net.outside, 7)).open()?;
            let mut published = outside.tcp((net.host, 8080)).open()?;
            let mut hairpin = containers.b1.tcp((net.host, 8080)).open()?;
            let mut datagrams_out = a1.udp((net.outside, 7)).open()?;
            let mut exchange_all = || -> Result<()> {
                out.exchange(100_000)?.saw_client_at(net.host)?;
                published.exchange(100_000)?.saw_client_at(net.outside)?;
                hairpin.exchange(100_000)?.saw_client_at(net.b1)?;
                datagrams_out.exchange()?.saw_client_at(net.host)?;
                Ok(())
            };
            exchange_all()?;

            // Each of them is answered: none is there to be sacrificed.
            let before = lab.counters()?;
            let is_refused = |port| a2.udp((net.outside, 7)).from((net.a2, port)).dropped().is_ok();
            let refused = (20_000..20_000 + TOO_MANY).find(|port| is_refused(*port));
            ensure!(refused.is_some(), "{TOO_MANY} flows are not too many");
            lab.counters()?.expect_moved(&before, "flow_table_full", &FLOW_COUNTERS)?;
            exchange_all()?;
            counted(lab, "flow_table_full", || a1.udp((net.outside, 7)).dropped())?;
            counted(lab, "flow_table_full", || outside.tcp((net.host, 8080)).dropped())?;
            // Neighbours, and the host, need no flow.
            a2.tcp((net.a1, 80)).exchange()?.by("a1")?.saw_client_at(net.a2)?;
            lab.host().tcp((net.a1, 80)).exchange()?.by("a1")?;

            // The flows of the one that filled it go with it.
            lab.disconnect("net-a", "a2")?;
            a1.udp((net.outside, 7)).exchange()?.saw_client_at(net.host)?;
            outside.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
            exchange_all()
        },
    )
}

/// Segments of a SYN flood: several times what the table holds.
const FLOOD: u32 = 20_000;
/// Longest time that an exchange may take beside the flood.
const LONGEST_STALL: Duration = Duration::from_secs(3);

/// An address of the guests' prefix that E does not have, the `number`th.
fn forged_guest(guest: IpAddr, number: u32) -> IpAddr {
    match guest {
        IpAddr::V4(guest) => Ipv4Addr::from(u32::from(guest) | (64 + number % 128)).into(),
        IpAddr::V6(guest) => {
            Ipv6Addr::from(u128::from(guest) | u128::from(0x10000 + number)).into()
        }
    }
}

pub(crate) fn syn_flood_leaves_open_flows_alone(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_lab(
        |builder| builder.flows(SMALL_TABLE * 8),
        |lab| {
            let containers = standard_containers(lab)?;
            let outside = lab.outside();
            let _server = outside.tcp_server("outside", (net.outside, 7))?;
            let open = [
                ("published", outside.tcp((net.host, 8080))),
                ("out", containers.a1.tcp((net.outside, 7))),
                ("hairpin", containers.b1.tcp((net.host, 8080))),
            ];
            let traffic = open
                .into_iter()
                .map(|(kind, probe)| Ok((kind, probe.open()?.into_traffic(10_000))))
                .collect::<Result<Vec<_>>>()?;
            let flood = Envelope {
                source_mac: outside.mac("out0")?,
                destination_mac: lab.host().mac("up0")?,
                source: net.outside,
                destination: net.host,
                ttl: 64,
            };
            let before = lab.has_netdp().then(|| lab.counters()).transpose()?;
            let segments = (0..FLOOD).map(|number| {
                let source = forged_guest(net.guests[0], number);
                let port = u16::try_from(1024 + number % 60_000).unwrap_or(1024);
                Envelope { source, ..flood }.tcp_syn(port, 8080, number)
            });
            outside.flood("out0", segments)?;
            if let Some(before) = before {
                let moved = lab.counters()?.since(&before);
                let opened: u64 = moved
                    .iter()
                    .filter(|((_, reason), _)| reason == FLOW_COUNTERS[1])
                    .map(|(_, packets)| packets)
                    .sum();
                ensure!(opened > 100, "the flood was none: {moved:?}");
            }
            for (kind, traffic) in traffic {
                let before = traffic.exchanges();
                poll_until(PATIENCE, &format!("progress of {kind}"), || {
                    Ok((traffic.exchanges() > before + 1).then_some(()))
                })?;
                let report = traffic.stop().with_context(|| format!("traffic of {kind}"))?;
                let stall = report.longest_stall;
                ensure!(stall < patient(LONGEST_STALL), "{kind} stalled for {stall:?}");
            }
            Ok(())
        },
    )
}
