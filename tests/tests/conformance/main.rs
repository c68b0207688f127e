//! The behaviour catalogue, row by row, on real packets. Ids are those of docs/behaviour.md.
//!
//! Every row has a lab of its own: host H, outside E, containers A1 (publishes 8080→80 tcp and udp)
//! and A2 of network `net-a`, B1 of network `net-b`. A row passes when both ends saw the right
//! addresses; what must not pass is also counted for the right reason. Each body is written once
//! and takes its addresses from the family that it runs for ([`Row::net`]).

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::Result;
use netdp_tests::backend::{Backend, Variant};
use netdp_tests::harness::{Outcome, Row, Unkept, run_rows};
use netdp_tests::lab::{Lab, Offload};
use netdp_tests::namespace::Namespace;
use netdp_tests::net::{FAMILIES, Family};
use netdp_tests::probe::{PATIENCE, TcpServer, UdpServer};
use netdp_tests::runtime::poll_until;

mod backends;
mod hostile;
mod isolation;
mod lifecycle;
mod load;
mod other;
mod out;
mod policy;
mod publishing;
mod security;

/// Whether every row runs a second time with offloads off on all veths.
const WITH_OFFLOAD_OFF: bool = true;

/// A row's body.
pub(crate) type Check = fn(&Row) -> Result<Outcome>;

/// The rows, each for every backend and family.
pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("PUB-01", publishing::client_address_reaches_the_container),
    ("PUB-02", publishing::host_reaches_the_published_port),
    ("PUB-03", publishing::host_reaches_the_published_port_by_loopback),
    ("PUB-04", publishing::neighbour_reaches_the_published_port),
    ("PUB-05", publishing::container_reaches_its_own_published_port),
    ("PUB-06", publishing::other_network_reaches_the_published_port),
    ("PUB-07", publishing::other_host_addresses_stay_the_hosts),
    ("PUB-08", publishing::outside_port_of_the_same_number_is_reached),
    ("PUB-09", publishing::chosen_port_is_reported_and_stays),
    ("PUB-10", publishing::port_ranges_lead_each_to_its_own),
    ("PUB-11", publishing::every_port_of_an_address_is_published_at_once),
    ("PUB-12", publishing::ports_in_use_are_refused_both_ways),
    ("PUB-13", publishing::udp_flow_never_reaches_a_successor),
    ("PUB-14", publishing::unpublish_ends_open_flows),
    ("PUB-15", publishing::fragmented_datagrams_arrive_whole),
    ("PUB-16", publishing::loopback_publish_is_closed_to_the_outside),
    ("PUB-17", publishing::ports_follow_the_way_out),
    ("PUB-18", other::sctp_is_published_under_its_own_number),
    ("OUT-01", out::outside_sees_the_uplink_address),
    ("OUT-02", out::outside_sees_the_chosen_address),
    ("OUT-03", out::outside_sees_the_container_without_masquerade),
    ("OUT-04", out::each_uplink_gives_its_own_address),
    ("OUT-05", out::tunnel_is_an_uplink),
    ("OUT-06", out::errors_of_the_path_come_back),
    ("OUT-07", out::first_hop_is_the_gateway),
    ("OUT-08", out::too_large_packets_are_reported_or_fragmented),
    ("OUT-09", out::host_services_see_the_container),
    ("OUT-10", out::host_answers_pings),
    ("OUT-11", load::host_and_containers_share_a_destination),
    ("OUT-12", load::exhausted_ports_are_refused),
    ("OUT-13", out::multicast_stays_on_the_bridge),
    ("OUT-14", out::uplinks_come_and_go),
    ("OUT-15", out::nothing_leaves_by_an_interface_without_program),
    ("OUT-16", out::uplink_on_an_uplink_works),
    ("OUT-17", out::pings_with_one_identifier_stay_apart),
    ("OUT-18", other::other_protocols_leave_by_address),
    ("OUT-19", out::one_port_is_one_port_outside),
    ("OUT-20", out::ipsec_policies_of_the_host_hold),
    ("ISO-01", isolation::neighbours_talk_untranslated),
    ("ISO-02", isolation::icc_off_parts_neighbours),
    ("ISO-03", isolation::networks_are_walls),
    ("ISO-04", isolation::direct_access_from_outside_is_dropped),
    ("ISO-05", isolation::interface_without_program_opens_no_hole),
    ("ISO-06", isolation::unprotected_network_accepts_direct_access),
    ("ISO-07", isolation::routed_network_accepts_published_ports),
    ("ISO-08", isolation::internal_network_is_closed),
    ("ISO-09", isolation::isolated_network_has_no_host),
    ("ISO-10", isolation::rules_of_others_do_not_matter),
    ("ISO-11", isolation::other_family_does_not_pass),
    ("ISO-12", isolation::host_reaches_every_container_port),
    ("POL-01", policy::listed_sources_pass_and_others_do_not),
    ("POL-02", policy::first_match_decides),
    ("POL-04", policy::new_deny_cuts_an_open_flow),
    ("POL-05", policy::allow_put_back_opens_again),
    ("POL-06", policy::narrower_rules_hold_where_they_are_written),
    ("POL-11", policy::bad_rule_file_is_refused_whole),
    ("LIF-02", lifecycle::flows_age_out_without_the_agent),
    ("LIF-05", load::full_flow_table_breaks_nothing),
    ("LIF-06", load::syn_flood_leaves_open_flows_alone),
    ("LIF-07", lifecycle::vanished_container_leaves_nothing),
    ("LIF-10", lifecycle::purge_leaves_the_host_as_before),
    ("LIF-11", backends::backends_take_each_others_place),
    ("LIF-13", backends::rules_that_others_wipe_come_back),
    ("SEC-01", security::forged_sources_are_dropped),
    ("SEC-02", hostile::rogue_configuration_is_dropped),
    ("SEC-03", security::outside_can_not_pretend_to_be_inside),
    ("SEC-04", security::ports_of_the_host_stay_the_hosts),
    ("SEC-06", hostile::absurd_packets_reach_nobody),
    ("SEC-08", security::nonsense_is_refused_and_changes_nothing),
    ("SEC-09", hostile::internal_network_has_no_way_out),
];

fn main() -> ExitCode {
    let variants: &[Offload] =
        if WITH_OFFLOAD_OFF { &[Offload::On, Offload::Off] } else { &[Offload::On] };
    let mut rows = Vec::new();
    for &offload in variants {
        for &family in FAMILIES {
            let backends =
                [Backend::Ebpf, Backend::EbpfByStack, Backend::Iptables(programs(offload))];
            for backend in backends {
                let row = |&(id, run)| {
                    let unkept = unkept(id, backend, family);
                    Row { id, backend, engine: None, unkept, family, offload, run }
                };
                rows.extend(CHECKS.iter().map(row).filter(is_worth_it));
            }
        }
    }
    run_rows(rows)
}

/// Rows of iptables that run with both sets of programs, once with offloads and once without: those in
/// which every kind of rule is met, or a lot of data. The others run with offloads only, or the suite
/// would take twice as long: both sets write the same rules, and rules don't care for offloads.
const WITH_BOTH_PROGRAMS: &[&str] = &[
    "PUB-01", "PUB-02", "PUB-03", "PUB-04", "PUB-05", "PUB-06", "PUB-07", "PUB-13", "PUB-14",
    "PUB-15", "PUB-17", "PUB-18", "OUT-01", "OUT-02", "OUT-04", "OUT-05", "OUT-06", "OUT-08",
    "ISO-01", "ISO-02", "ISO-03", "ISO-07", "ISO-08", "ISO-09", "POL-01", "LIF-07", "LIF-10",
    "LIF-11", "LIF-13", "SEC-06", "SEC-09",
];

/// Rows of eBPF that run once more with all packets by the host's stack, which other programs then see:
/// those in which packets of flows have the say.
const BY_STACK: &[&str] = &[
    "PUB-01", "PUB-04", "PUB-05", "PUB-06", "PUB-13", "PUB-14", "PUB-15", "PUB-17", "PUB-18",
    "OUT-01", "OUT-02", "OUT-03", "OUT-04", "OUT-06", "OUT-07", "OUT-08", "OUT-14", "OUT-15",
    "OUT-16", "OUT-18", "OUT-19", "ISO-01", "ISO-02", "ISO-03", "ISO-05", "ISO-06", "ISO-07",
    "POL-04", "LIF-07", "SEC-06",
];

/// Whether a row runs.
fn is_worth_it(row: &Row) -> bool {
    match row.backend {
        Backend::Ebpf => true,
        Backend::EbpfByStack => row.offload == Offload::On && BY_STACK.contains(&row.id),
        Backend::Iptables(_) => row.offload == Offload::On || WITH_BOTH_PROGRAMS.contains(&row.id),
        // The suite docker chooses for itself.
        Backend::Docker(_) => false,
    }
}

/// The programs of iptables, which don't care for offloads: each set is tried with one of the two.
fn programs(offload: Offload) -> Variant {
    match offload {
        Offload::On => Variant::Nft,
        Offload::Off => Variant::Legacy,
    }
}

/// Promises that iptables can't keep, in which family, and why.
const UNKEPT_BY_IPTABLES: &[(&str, &[Family], Unkept)] = &[
    (
        "PUB-11",
        FAMILIES,
        Unkept::Perhaps(
            "each published port takes an open file of the agent, of which it may have few",
        ),
    ),
    ("OUT-12", FAMILIES, Unkept::For("netfilter drops such a packet without a word or a count")),
    ("OUT-18", FAMILIES, Unkept::For("what has no port and would collide is dropped uncounted")),
    ("OUT-19", FAMILIES, Unkept::For("netfilter maps by destination")),
    (
        "ISO-10",
        FAMILIES,
        Unkept::For("what another chain drops is dropped, whoever has accepted it"),
    ),
    ("ISO-11", &[Family::Ipv6], Unkept::For("iptables sees no ARP")),
    ("LIF-02", FAMILIES, Unkept::For("the test reads the maps of eBPF; netfilter ages by itself")),
    (
        "LIF-05",
        FAMILIES,
        Unkept::For("netfilter's table is the whole host's, and has no count of ours"),
    ),
    ("SEC-01", &[Family::Ipv4], Unkept::For("iptables sees no ARP")),
    ("SEC-01", &[Family::Ipv6], Unkept::For("ip6tables does not read neighbour discovery")),
    (
        "SEC-03",
        &[Family::Ipv6],
        Unkept::For("the kernel drops ::1 from outside before any rule, uncounted"),
    ),
];

/// Why a backend does not keep a promise; `None` where it does.
fn unkept(id: &str, backend: Backend, family: Family) -> Option<Unkept> {
    let is_it = |(unkept, families, _): &&(&str, &[Family], Unkept)| {
        *unkept == id && families.contains(&family)
    };
    let row = UNKEPT_BY_IPTABLES.iter().find(is_it)?;
    (!backend.is_ebpf()).then_some(row.2)
}

/// Containers A1 and A2, and what serves in A1.
struct Neighbours {
    a1: Namespace,
    a2: Namespace,
    a1_tcp: TcpServer,
    a1_udp: UdpServer,
}

/// The same, and B1.
struct Containers {
    a1: Namespace,
    a2: Namespace,
    b1: Namespace,
    a1_tcp: TcpServer,
    a1_udp: UdpServer,
}

/// Creates network a and its containers; A1 publishes 8080 and serves on port 80.
fn neighbours(lab: &Lab) -> Result<Neighbours> {
    neighbours_publishing(lab, &[])
}

/// The same, and A1 publishes these, too.
fn neighbours_publishing(lab: &Lab, more: &[&str]) -> Result<Neighbours> {
    let net = lab.net();
    lab.create_network("net-a", net.subnet_a, &[])?;
    let published = [&["8080:80", "8080:80/udp"], more].concat();
    let a1 = lab.attach("net-a", "a1", net.a1, &published)?;
    let a2 = lab.attach("net-a", "a2", net.a2, &[])?;
    let a1_tcp = a1.tcp_server("a1", (net.a1, 80))?;
    let a1_udp = a1.udp_server("a1", (net.a1, 80))?;
    Ok(Neighbours { a1, a2, a1_tcp, a1_udp })
}

/// Creates both networks and their containers, the first as [`neighbours`] does.
fn standard_containers(lab: &Lab) -> Result<Containers> {
    containers_publishing(lab, &[])
}

/// The same, and A1 publishes these, too.
fn containers_publishing(lab: &Lab, more: &[&str]) -> Result<Containers> {
    let net = lab.net();
    lab.create_network("net-b", net.subnet_b, &[])?;
    let Neighbours { a1, a2, a1_tcp, a1_udp } = neighbours_publishing(lab, more)?;
    let b1 = lab.attach("net-b", "b1", net.b1, &[])?;
    Ok(Containers { a1, a2, b1, a1_tcp, a1_udp })
}

/// What is counted beside drops and says nothing about them: flows that come, and flows that make
/// room.
const FLOW_COUNTERS: [&str; 4] = ["flow_out", "flow_in", "flow_hairpin", "reclaimed"];

/// The hardware address of a network's bridge, which is its members' way out.
fn bridge_mac(lab: &Lab, network: &str) -> Result<[u8; 6]> {
    lab.host().mac(&lab.bridge(network)?)
}

/// Fails unless `attempt` moves the drop counter `reason` and no other. Docker has no such counters.
fn counted(lab: &Lab, reason: &str, attempt: impl FnOnce() -> Result<()>) -> Result<()> {
    if !lab.has_netdp() {
        return attempt();
    }
    let before = lab.counters()?;
    attempt()?;
    lab.counters()?.expect_moved(&before, reason, &FLOW_COUNTERS)
}

/// Waits until the counter `reason` has moved: an injected frame has no answer to wait for.
fn counted_soon(lab: &Lab, reason: &str, attempt: impl FnOnce() -> Result<()>) -> Result<()> {
    if !lab.has_netdp() {
        return attempt();
    }
    let before = lab.counters()?;
    counted(lab, reason, || {
        attempt()?;
        poll_until(PATIENCE, &format!("the counter {reason}"), || {
            Ok((lab.counters()? != before).then_some(()))
        })
    })
}

/// Fails when `netdp flows` still knows the address. Packets alone tell what Docker has forgotten.
fn expect_no_flows_of(lab: &Lab, address: IpAddr) -> Result<()> {
    if !lab.has_netdp() {
        return Ok(());
    }
    let flows = lab.json(&["flows"])?;
    let text = flows.to_string();
    let known = [format!("\"{address}\""), format!("\"{address}:"), format!("\"[{address}]:")];
    anyhow::ensure!(!known.iter().any(|form| text.contains(form)), "flows of {address}: {flows:#}");
    Ok(())
}
