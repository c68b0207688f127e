//! LIF: what remains when a container or netdp itself goes.

use std::collections::BTreeSet;
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytemuck::{Pod, pod_read_unaligned};
use netdp_common::abi::ABI;
use netdp_common::addr::{Address, Be32, Be128};
use netdp_common::aging::Collection;
use netdp_common::flow::{FlowTable, Place};
use netdp_tests::bpf::PinnedMap;
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::probe::{PATIENCE, expect_same};
use netdp_tests::runtime::poll_until;
use netdp_tests::snapshot::Snapshot;

use super::{Containers, expect_no_flows_of, neighbours, standard_containers};

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

/// How long idle flows are kept in the lab of [`flows_age_out_without_the_agent`], in seconds.
const SHORT_LIFE: u32 = 2;
/// Time for flows to go once their life is over: each new one looks after two, in turn.
const AGED_OUT: Duration = Duration::from_secs(20);
/// Seconds that the agent is dead, as far as the programs can tell.
const AN_HOUR: u32 = 3600;

/// The pins of a lab, which need no agent to be read.
struct Pinned {
    table: PinnedMap,
    flows: PinnedMap,
    collection: PinnedMap,
    /// Protocol and source port of the half in a place, if a container sends by it.
    describe: fn(&[u8]) -> Option<(u8, u16)>,
}

impl Pinned {
    fn of<A: Address>(lab: &Lab, family: char) -> Result<Self>
    where
        Place<A>: Pod,
    {
        let maps = lab.bpffs().join(format!("netdp/v{ABI}/maps"));
        Ok(Self {
            table: PinnedMap::open(
                &maps.join(format!("TABLE{family}")),
                4,
                size_of::<FlowTable>(),
            )?,
            flows: PinnedMap::open(&maps.join(format!("FLOW{family}")), 4, size_of::<Place<A>>())?,
            collection: PinnedMap::open(&maps.join("COLLECTION"), 4, size_of::<Collection>())?,
            describe: |place| {
                let Place { key, is_taken, .. } = pod_read_unaligned::<Place<A>>(place);
                let is_sent = is_taken != 0 && key.network().is_some();
                is_sent.then(|| (key.proto, key.tuple.sport.get()))
            },
        })
    }

    /// Flows of containers, by protocol and their source port or echo identifier.
    fn flows(&self) -> Result<BTreeSet<(u8, u16)>> {
        let table: FlowTable = pod_read_unaligned(&self.table.get(&0_u32.to_ne_bytes())?);
        let places = 0..2 * table.top;
        let places = places.map(|place| self.flows.get(&place.to_ne_bytes()));
        places.filter_map(|place| place.map(|place| (self.describe)(&place)).transpose()).collect()
    }

    /// Puts the agent's last word an hour back.
    fn pass_an_hour(&self) -> Result<()> {
        let mut collection = self.collection.get(&0_u32.to_ne_bytes())?;
        let at: Range<usize> = {
            let start = offset_of!(Collection, at);
            start..start + 4
        };
        let now = u32::from_ne_bytes(collection[at.clone()].try_into()?);
        collection[at].copy_from_slice(&now.saturating_sub(AN_HOUR).to_ne_bytes());
        self.collection.set(0, &collection)
    }
}

pub(crate) fn flows_age_out_without_the_agent(row: &Row) -> Result<Outcome> {
    let net = row.net();
    let short = ["udp-replied", "udp-unreplied", "icmp"];
    row.in_lab(
        |builder| short.iter().fold(builder, |builder, kind| builder.timeout(kind, SHORT_LIFE)),
        |lab| {
            let containers = neighbours(lab)?;
            let (a1, a2, outside) = (&containers.a1, &containers.a2, lab.outside());
            let _tcp = outside.tcp_server("outside", (net.outside, 7))?;
            let _udp = outside.udp_server("outside", (net.outside, 7))?;
            let mut out = a1.tcp((net.outside, 7)).from((net.a1, 3000)).open()?;
            let mut published = outside.tcp((net.host, 8080)).open()?;
            let mut packets_go_on = || -> Result<()> {
                out.exchange(10_000)?.saw_client_at(net.host)?;
                published.exchange(10_000)?.by("a1")?.saw_client_at(net.outside)?;
                Ok(())
            };
            packets_go_on()?;

            lab.agent()?.kill9()?;
            let pinned = match net.is_ipv4() {
                true => Pinned::of::<Be32>(lab, '4'),
                false => Pinned::of::<Be128>(lab, '6'),
            }?;
            pinned.pass_an_hour()?;
            let mut ports = 20_000_u16..;
            let mut open = || -> Result<u16> {
                let port = ports.next().context("find a port")?;
                let seen = a1.udp((net.outside, 7)).from((net.a1, port)).exchange()?;
                seen.by("outside")?.saw_client_at(net.host)?;
                Ok(port)
            };
            let opened: BTreeSet<u16> = (0..20).map(|_| open()).collect::<Result<_>>()?;
            a2.ping(net.outside).replied()?;
            let (kept, old): (BTreeSet<_>, BTreeSet<_>) =
                pinned.flows()?.into_iter().partition(|(_, port)| [3000, 80].contains(port));
            expect_same("connections in the table", &kept, &[(6, 3000), (6, 80)].into())?;
            expect_same("pings in the table", &old.iter().filter(|f| f.0 == net.icmp).count(), &1)?;
            let datagrams = old.iter().filter(|f| f.0 == 17).map(|f| f.1).collect();
            expect_same("datagrams in the table", &datagrams, &opened)?;

            // Whoever opens a flow looks after others: the table is never without a clean-up.
            let left = poll_until(AGED_OUT, "the end of the old flows", || {
                open()?;
                packets_go_on()?;
                let left = pinned.flows()?;
                Ok(left.is_disjoint(&old).then_some(left))
            })?;
            ensure!(left.is_superset(&kept), "connections that are in use ended: {left:?}");
            outside.tcp((net.host, 8080)).exchange()?.by("a1")?.saw_client_at(net.outside)?;
            packets_go_on()?;
            lab.agent()?.start()?;
            packets_go_on()
        },
    )
}
