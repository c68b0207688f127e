//! SCTP, and protocols that have no ports: frames by hand, because a kernel may have no sockets for
//! them.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use netdp_tests::harness::{Outcome, Row};
use netdp_tests::lab::Lab;
use netdp_tests::namespace::Namespace;
use netdp_tests::packet::{Envelope, payload_of, summarise, verify_checksums, verify_sctp};
use netdp_tests::probe::{PATIENCE, expect_same};

use super::{Containers, Neighbours, bridge_mac, containers_publishing, counted_soon, neighbours};

/// IP protocol numbers (IANA).
const SCTP: u8 = 132;
const GRE: u8 = 47;
const ESP: u8 = 50;
/// DCCP, UDP-Lite and AH: checksums or signatures cover addresses in ways that nobody puts right here.
const REFUSED: [u8; 3] = [33, 136, 51];

/// Types of SCTP's chunks (RFC 9260, 3.2).
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

/// The way from E to an address of H.
fn from_outside(lab: &Lab, destination: IpAddr) -> Result<Envelope> {
    Ok(Envelope {
        source_mac: lab.outside().mac("out0")?,
        destination_mac: lab.host().mac("up0")?,
        source: lab.net().outside,
        destination,
        ttl: 64,
    })
}

/// The way out of a container.
fn from_container(
    lab: &Lab,
    network: &str,
    container: &Namespace,
    ends: (IpAddr, IpAddr),
) -> Result<Envelope> {
    Ok(Envelope {
        source_mac: container.mac("eth0")?,
        destination_mac: bridge_mac(lab, network)?,
        source: ends.0,
        destination: ends.1,
        ttl: 64,
    })
}

/// Sends a frame on a link and returns what arrives of it on another one: of this protocol, between
/// these addresses, everything but the addresses as it was.
fn expect_arrival(
    (sender, link): (&Namespace, &str),
    frame: &[u8],
    (receiver, other_link): (&Namespace, &str),
    ends: (IpAddr, IpAddr),
) -> Result<Vec<u8>> {
    let protocol = summarise(frame).map_or(0, |packet| packet.protocol);
    let arrivals = receiver.sniff(other_link, move |frame| {
        let packet = summarise(frame).filter(|packet| packet.protocol == protocol);
        packet.is_some_and(|packet| (packet.source, packet.destination) == ends)
    })?;
    let what = format!("protocol {protocol} from {} to {}", ends.0, ends.1);
    let content = |frame: &[u8]| payload_of(frame, protocol.into()).map(<[u8]>::to_vec);
    let is_whole = |arrived: &[u8]| content(arrived) == content(frame);
    sender.inject(link, frame)?;
    let mut arrived = arrivals.wait_for(PATIENCE, &what, |_| true)?;
    if protocol == SCTP && !is_whole(&arrived) {
        // A receiver whose kernel has SCTP puts zero for the checksum while it computes it, in the
        // packet that the sniffer is about to copy (sctp_compute_cksum). It hardly does so twice.
        sender.inject(link, frame)?;
        arrived = arrivals.wait_for(PATIENCE, &what, is_whole)?;
    }
    expect_same(&what, &content(&arrived), &content(frame))?;
    Ok(arrived)
}

pub(crate) fn sctp_is_published_under_its_own_number(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = containers_publishing(lab, &["7000/sctp"])?;
        let Containers { a1, a2, b1, .. } = &containers;
        let reason = lab.netdp_fails(&["publish", "a1", "-p", "7001:7000/sctp"])?;
        ensure!(reason.contains("7000:7000/sctp"), "say what can be had: {reason}");

        // From the world, and back; the checksum stays right without anybody's doing.
        let out0 = (lab.outside(), "out0");
        let eth0 = (a1, "eth0");
        let asks = from_outside(lab, net.host)?.sctp((5000, 7000), INIT, &[1; 16]);
        let arrived = expect_arrival(out0, &asks, eth0, (net.outside, net.a1))?;
        verify_checksums(&arrived)?;
        expect_same("the ports at A1", &verify_sctp(&arrived)?, &(5000, 7000))?;
        let back = from_container(lab, "net-a", a1, (net.a1, net.outside))?;
        let answers = back.sctp_tagged((7000, 5000), [1; 4], INIT_ACK, &[2; 20]);
        let arrived = expect_arrival(eth0, &answers, out0, (net.host, net.outside))?;
        verify_checksums(&arrived)?;
        expect_same("the ports at E", &verify_sctp(&arrived)?, &(7000, 5000))?;

        // From the same network and from another one.
        for (container, network, source) in [(a2, "net-a", net.a2), (b1, "net-b", net.b1)] {
            let way = from_container(lab, network, container, (source, net.host))?;
            let asks = way.sctp((5000, 7000), INIT, &[3; 16]);
            let arrived = expect_arrival((container, "eth0"), &asks, eth0, (source, net.a1))?;
            expect_same("the ports at A1", &verify_sctp(&arrived)?, &(5000, 7000))?;
            let back = from_container(lab, "net-a", a1, (net.a1, source))?;
            // A neighbour is answered on the bridge.
            let destination_mac =
                if network == "net-a" { container.mac("eth0")? } else { back.destination_mac };
            let back = Envelope { destination_mac, ..back };
            let answers = back.sctp_tagged((7000, 5000), [3; 4], INIT_ACK, &[4; 20]);
            let there = (container, "eth0");
            let arrived = expect_arrival(eth0, &answers, there, (net.host, source))?;
            expect_same("the ports at the client", &verify_sctp(&arrived)?, &(7000, 5000))?;
        }

        // Out, from a port that stays; another container with the same one would be the same flow.
        let way = from_container(lab, "net-a", a1, (net.a1, net.outside))?;
        let asks = way.sctp((4000, 9), INIT, &[5; 16]);
        let arrived = expect_arrival(eth0, &asks, out0, (net.host, net.outside))?;
        expect_same("the ports at E", &verify_sctp(&arrived)?, &(4000, 9))?;
        let way = from_container(lab, "net-a", a2, (net.a2, net.outside))?;
        let second = way.sctp((4000, 9), INIT, &[6; 16]);
        if row.is_ebpf() {
            counted_soon(lab, "ports_exhausted", || a2.inject("eth0", &second))?;
        }

        // Not published any more, it is the host's.
        lab.netdp(&["unpublish", "a1", "-p", "7000/sctp"])?;
        let late = a1.sniff("eth0", |frame| {
            summarise(frame).is_some_and(|packet| packet.protocol == SCTP)
        })?;
        let asks = from_outside(lab, net.host)?.sctp((5000, 7000), INIT, &[1; 16]);
        lab.outside().inject("out0", &asks)?;
        lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?;
        expect_same("packets at A1", &late.frames(), &vec![])
    })
}

pub(crate) fn other_protocols_leave_by_address(row: &Row) -> Result<Outcome> {
    let net = row.net();
    row.in_standard_lab(|lab| {
        let containers = neighbours(lab)?;
        let Neighbours { a1, a2, .. } = &containers;
        let (out0, eth0) = ((lab.outside(), "out0"), (a1, "eth0"));
        for protocol in [GRE, ESP] {
            let number = protocol.into();
            // Nothing comes in that nobody has asked for.
            let early = a1.sniff("eth0", move |frame| {
                summarise(frame).is_some_and(|packet| packet.protocol == protocol)
            })?;
            let answer = from_outside(lab, net.host)?.other(number, b"an answer of some length");
            lab.outside().inject("out0", &answer)?;
            lab.outside().tcp((net.host, 8080)).exchange()?.by("a1")?;
            expect_same("packets at A1", &early.frames(), &vec![])?;
            drop(early);

            let way = from_container(lab, "net-a", a1, (net.a1, net.outside))?;
            let asks = way.other(number, b"a question, twice as long as that");
            for _ in 0..2 {
                expect_arrival(eth0, &asks, out0, (net.host, net.outside))?;
                expect_arrival(out0, &answer, eth0, (net.outside, net.a1))?;
            }
            // One flow for each pair of addresses: the second container has another destination.
            let way = from_container(lab, "net-a", a2, (net.a2, net.outside))?;
            let refused = way.other(number, b"the same for another one");
            counted_soon(lab, "ports_exhausted", || a2.inject("eth0", &refused))?;
            let elsewhere = Envelope { destination: net.guests[0], ..way };
            let asks = elsewhere.other(number, b"elsewhere there is room");
            expect_arrival((a2, "eth0"), &asks, out0, (net.host, net.guests[0]))?;
        }
        for protocol in REFUSED {
            let way = from_container(lab, "net-a", a1, (net.a1, net.outside))?;
            let frame = way.other(protocol.into(), &[0; 64]);
            counted_soon(lab, "protocol", || a1.inject("eth0", &frame))?;
        }
        // Between neighbours nothing has to be put right.
        let way = Envelope {
            destination_mac: a1.mac("eth0")?,
            ..from_container(lab, "net-a", a2, (net.a2, net.a1))?
        };
        for protocol in [REFUSED[0], REFUSED[1], GRE, ESP] {
            let frame = way.other(protocol.into(), &[0; 64]);
            expect_arrival((a2, "eth0"), &frame, eth0, (net.a2, net.a1))?;
        }
        Ok(())
    })
}
