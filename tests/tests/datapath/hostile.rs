//! Headers that are cut off, contradict themselves or make no sense, through all programs.

use std::{
    cell::Cell,
    net::{IpAddr, SocketAddrV4},
};

use anyhow::{Context, Result, anyhow, ensure};
use proptest::{
    prelude::*,
    test_runner::{Config, RngSeed, TestRunner},
};

use crate::{
    datagram::{Datagram, Kind, Shape, Wire},
    family::Family,
    fixture::{
        A, At, Fixture, HOST, OUTSIDE, Outcome, ROUTER_MAC, TCX_DROP, TCX_NEXT, TCX_REDIRECT,
        UPLINK_MAC, bridge_mac, from_container, from_container_wire, from_outside_wire,
        from_uplink, hex, host_in, into_network, mac, socket, to_uplink,
    },
};

/// `BPF_PROG_TEST_RUN` takes nothing shorter than an Ethernet and an IP header.
fn shortest(family: Family) -> usize {
    match family {
        Family::V4 => 34,
        Family::V6 => 54,
    }
}

/// Every mutation follows from it.
const SEED: u64 = 20_260_721;
/// Mutated packets; each goes through every hook.
const MUTATIONS: u32 = 4000;

/// Hooks that a packet is run through.
fn hooks() -> [At; 7] {
    [
        from_container("a1"),
        from_uplink("up0"),
        into_network(A, Some("up0")),
        into_network(A, Some("br-b")),
        into_network(A, None),
        to_uplink("up0", Some("br-a")),
        to_uplink("tun0", Some("br-a")),
    ]
}

const LEAVES_BY_UP0: usize = 5;
const LEAVES_BY_TUN0: usize = 6;

/// Opens flows of every sort, and returns packets that belong to one.
fn packets(fixture: &mut Fixture) -> Result<Vec<Vec<u8>>> {
    let server = SocketAddrV4::new(OUTSIDE, 80);
    let out = from_container_wire("a1", 4000, server);
    let ping = from_container_wire("a1", 4000, SocketAddrV4::new(OUTSIDE, 0));
    let dialled = SocketAddrV4::new(HOST, 8080);
    let into = from_outside_wire(SocketAddrV4::new(OUTSIDE, 5000), dialled);
    let inside = into.to(socket("a1", 80)).on_link(bridge_mac(A), mac("a1"));
    let own = |wire: Wire| wire.on_link(mac("a1"), bridge_mac(A));
    let mut frames = Vec::new();
    for (at, kind, wire) in [
        (from_container("a1"), Kind::Segment, out),
        (from_container("a1"), Kind::Udp, out),
        (from_container("a1"), Kind::Request, ping),
        (from_container("a1"), Kind::Segment, out.to(SocketAddrV4::new(HOST, 8443))),
        (from_container("a1"), Kind::Udp, out.to(dialled)),
        (from_uplink("up0"), Kind::Segment, into),
        (from_uplink("up0"), Kind::BareUdp, into),
        (into_network(A, Some("up0")), Kind::Segment, inside),
        (from_container("a1"), Kind::Segment, own(inside.answer())),
        (to_uplink("up0", Some("br-a")), Kind::Udp, out.on_link(UPLINK_MAC, ROUTER_MAC)),
    ] {
        for shape in Shape::ALL {
            for frame in Datagram::new(kind, wire).shaped(shape).frames(fixture.family) {
                fixture.run(at, &frame)?;
                frames.push(frame);
            }
        }
    }
    Ok(frames)
}

/// The verdict is one of ours, and nothing of network a's leaves with a container's source.
fn check(family: Family, hook: usize, outcome: &Outcome) -> Result<()> {
    let known = [TCX_NEXT, TCX_DROP, TCX_REDIRECT].contains(&outcome.verdict);
    ensure!(known, "verdict {}", outcome.verdict);
    let ip = match hook {
        LEAVES_BY_UP0 => 14,
        LEAVES_BY_TUN0 => 0,
        _ => return Ok(()),
    };
    let left = outcome.verdict == TCX_NEXT;
    // The first byte of the source, and as many as all of network a have in common.
    let (at, subnet) = match family.address(host_in(A, 0)) {
        IpAddr::V4(first) => (12, first.octets()[..3].to_vec()),
        IpAddr::V6(first) => (8, first.octets()[..8].to_vec()),
    };
    let source = outcome.frame.get(ip + at..).context("read the source of what left")?;
    ensure!(!left || !source.starts_with(&subnet), "left with the source {}", hex(&source[..16]));
    Ok(())
}

fn run_everywhere(fixture: &Fixture, frame: &[u8]) -> Result<()> {
    for (hook, at) in hooks().into_iter().enumerate() {
        // Without Ethernet, the packet begins with its IP header.
        let hidden = if hook == LEAVES_BY_TUN0 && frame.len() >= shortest(fixture.family) + 14 {
            14
        } else {
            0
        };
        let outcome = fixture.run(at, &frame[hidden..])?;
        check(fixture.family, hook, &outcome).with_context(|| format!("{at:?}: {}", hex(frame)))?;
    }
    Ok(())
}

pub(crate) fn every_prefix_of_a_packet_is_survived(fixture: &mut Fixture) -> Result<()> {
    for frame in packets(fixture)? {
        for length in shortest(fixture.family)..=frame.len() {
            run_everywhere(fixture, &frame[..length])?;
        }
    }
    Ok(())
}

pub(crate) fn every_value_of_a_header_byte_is_survived(fixture: &mut Fixture) -> Result<()> {
    let frame = packets(fixture)?.remove(0);
    let offsets: &[usize] = match fixture.family {
        // Version and length, total length, fragmentation, protocol, data offset.
        Family::V4 => &[14, 16, 17, 20, 21, 23, 46],
        // Version, payload length, next header, data offset.
        Family::V6 => &[14, 18, 19, 20, 66],
    };
    for &offset in offsets {
        for value in 0..=u8::MAX {
            let mut frame = frame.clone();
            frame[offset] = value;
            run_everywhere(fixture, &frame)?;
        }
    }
    Ok(())
}

pub(crate) fn random_mutations_are_survived(fixture: &mut Fixture) -> Result<()> {
    let frames = packets(fixture)?;
    let shortest = shortest(fixture.family);
    let config = Config {
        cases: MUTATIONS,
        rng_seed: RngSeed::Fixed(SEED),
        failure_persistence: None,
        ..Config::default()
    };
    // Mostly in the headers, mostly few.
    let edit = (prop_oneof![4 => 14_usize..78, 1 => 0_usize..200], any::<u8>());
    let strategy = (
        any::<prop::sample::Index>(),
        prop::collection::vec(edit, 0..6),
        prop_oneof![3 => Just(usize::MAX), 1 => shortest..150_usize],
    );
    let runs = Cell::new(0_u32);
    TestRunner::new(config)
        .run(&strategy, |(base, edits, length)| {
            let mut frame = base.get(&frames).clone();
            for (offset, value) in edits {
                if let Some(byte) = frame.get_mut(offset) {
                    *byte = value;
                }
            }
            frame.truncate(length.max(shortest));
            runs.set(runs.get() + 1);
            run_everywhere(fixture, &frame)
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))
        })
        .map_err(|error| anyhow!("seed {SEED}: {error}"))?;
    ensure!(runs.get() >= MUTATIONS, "{} runs", runs.get());
    Ok(())
}
