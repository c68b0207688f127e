//! The way past the host's stack: what takes it leaves as it would have by the stack, and what the
//! stack has to see does not take it. The journeys walk it, too.

use std::{
    cell::Cell,
    net::{IpAddr, SocketAddrV4},
};

use anyhow::{Context, Result, anyhow, ensure};
use netdp::model::Action;
use netdp_common::counter::Reason;
use proptest::{
    prelude::*,
    test_runner::{Config, RngSeed, TestRunner},
};

use crate::{
    datagram::{Datagram, Kind, Wire},
    family::Family,
    fixture::{
        A, At, Fixture, HOST, OUTSIDE, Outcome, TCX_NEXT, TCX_REDIRECT, bridge_mac, dropped,
        from_container, from_container_wire, from_outside_wire, from_uplink, hex, id_of, mac, pass,
        pass_as, sent_as, socket, to_uplink,
    },
    halves::Fate,
    policies,
};

/// Every mutation follows from it.
const SEED: u64 = 20_261_126;
/// Mutated packets; each goes both ways.
const MUTATIONS: u32 = 6000;
/// Bytes of MAC addresses, and of a whole Ethernet header.
const MACS: usize = 12;
const ETHERNET: usize = 14;

/// From the world to a1's published port.
fn into() -> Wire {
    from_outside_wire(SocketAddrV4::new(OUTSIDE, 5000), SocketAddrV4::new(HOST, 8080))
}

/// The same as a1 gets it.
fn delivered() -> Wire {
    into().to(socket("a1", 80)).on_link(bridge_mac(A), mac("a1"))
}

/// From a1 to the world.
fn out() -> Wire {
    from_container_wire("a1", 4000, SocketAddrV4::new(OUTSIDE, 80))
}

/// The same as it leaves, on its way to the next hop's MAC address.
fn left() -> Wire {
    out().from(SocketAddrV4::new(HOST, 4000))
}

const UPLINK: At = from_uplink("up0");
const CONTAINER: At = from_container("a1");

/// Opens a flow in and one out, both with packets in both directions.
fn talk(fixture: &mut Fixture) -> Result<()> {
    fixture.set_fast_path(true)?;
    for kind in [Kind::Udp, Kind::Segment] {
        let packet = |wire| Datagram::new(kind, wire);
        fixture.expect(
            "in",
            UPLINK,
            &packet(into()),
            sent_as(delivered(), 1).opening(A, Reason::FlowIn),
        )?;
        fixture.expect(
            "out",
            CONTAINER,
            &packet(out()),
            sent_as(left(), 1).opening(A, Reason::FlowOut),
        )?;
        for _ in 0..2 {
            carry_on(fixture, kind)?;
        }
    }
    Ok(())
}

/// A packet of each direction of both flows, each past the stack.
fn carry_on(fixture: &mut Fixture, kind: Kind) -> Result<()> {
    let packet = |wire| Datagram::new(kind, wire);
    let answer_in = delivered().answer();
    let answer_out = left().on_link(into().destination_mac, into().source_mac).answer();
    fixture.expect("in", UPLINK, &packet(into()), sent_as(delivered(), 1))?;
    let leaves = answer_in.from(into().destination);
    fixture.expect("answer to in", CONTAINER, &packet(answer_in), sent_as(leaves, 1))?;
    fixture.expect("out", CONTAINER, &packet(out()), sent_as(left(), 1))?;
    let arrives = answer_out.to(out().source).on_link(bridge_mac(A), mac("a1"));
    fixture.expect("answer to out", UPLINK, &packet(answer_out), sent_as(arrives, 1))?;
    Ok(())
}

pub(crate) fn a_flow_is_looked_at_once_a_second(fixture: &mut Fixture) -> Result<()> {
    talk(fixture)?;
    for seconds in [1, 30] {
        fixture.age(seconds)?;
        let before = oldest_of(fixture)?;
        carry_on(fixture, Kind::Udp)?;
        carry_on(fixture, Kind::Segment)?;
        let after = oldest_of(fixture)?;
        ensure!(after >= before + seconds, "last seen at {after}, {before} before");
    }
    Ok(())
}

fn oldest_of(fixture: &Fixture) -> Result<u32> {
    let mut oldest = u32::MAX;
    fixture.visit_halves(|half| {
        oldest = oldest.min(half.last_seen);
        Fate::Kept
    })?;
    Ok(oldest)
}

pub(crate) fn the_stack_answers_what_it_has_to(fixture: &mut Fixture) -> Result<()> {
    talk(fixture)?;
    for kind in [Kind::Udp, Kind::Segment] {
        let last_hop = |wire| Datagram::new(kind, wire).with_ttl(1);
        fixture.expect(
            "at its end, in",
            UPLINK,
            &last_hop(into()),
            pass_as(into().to(socket("a1", 80))),
        )?;
        fixture.expect("at its end, out", CONTAINER, &last_hop(out()), pass())?;
        let large = |wire| {
            let mut datagram = Datagram::new(kind, wire);
            datagram.payload = vec![7; 1500];
            datagram
        };
        fixture.expect(
            "too large, in",
            UPLINK,
            &large(into()),
            pass_as(into().to(socket("a1", 80))),
        )?;
        fixture.expect("too large, out", CONTAINER, &large(out()), pass())?;
        // What is as large as can be goes.
        let headers = large(out()).frame(fixture.family).len() - 1500 - ETHERNET;
        let fitting = |wire| Datagram { payload: vec![7; 1500 - headers], ..large(wire) };
        fixture.expect("fits, in", UPLINK, &fitting(into()), sent_as(delivered(), 1))?;
        fixture.expect("fits, out", CONTAINER, &fitting(out()), sent_as(left(), 1))?;
    }
    Ok(())
}

pub(crate) fn a_closed_way_is_left_at_once(fixture: &mut Fixture) -> Result<()> {
    talk(fixture)?;
    fixture.set_fast_path(false)?;
    for kind in [Kind::Udp, Kind::Segment] {
        let packet = |wire| Datagram::new(kind, wire);
        fixture.expect("in", UPLINK, &packet(into()), pass_as(into().to(socket("a1", 80))))?;
        fixture.expect("out", CONTAINER, &packet(out()), pass())?;
    }
    Ok(())
}

pub(crate) fn a_new_rule_cuts_a_flow_on_the_fast_path(fixture: &mut Fixture) -> Result<()> {
    talk(fixture)?;
    fixture.apply(|program| {
        policies::set(program, vec![policies::rule(Action::Deny, [0; 4], [255; 4])]);
    })?;
    for kind in [Kind::Udp, Kind::Segment] {
        let packet = |wire| Datagram::new(kind, wire);
        let answer = packet(delivered().answer());
        fixture.expect("answer", CONTAINER, &answer, dropped(A, Reason::Policy))?;
        fixture.expect("in", UPLINK, &packet(into()), dropped(A, Reason::Policy))?;
        // What went out is none of its business.
        fixture.expect("out", CONTAINER, &packet(out()), sent_as(left(), 1))?;
    }
    Ok(())
}

pub(crate) fn a_container_that_is_gone_gets_nothing(fixture: &mut Fixture) -> Result<()> {
    talk(fixture)?;
    let mut answers = Vec::new();
    for kind in [Kind::Udp, Kind::Segment] {
        let answer = left().on_link(into().destination_mac, into().source_mac).answer();
        answers.extend([Datagram::new(kind, into()), Datagram::new(kind, answer)]);
    }
    fixture.apply(|program| {
        program.endpoints.remove(&id_of("a1"));
        program.published.retain(|_, target| target.endpoint != id_of("a1"));
    })?;
    for packet in answers {
        fixture.expect("to nobody", UPLINK, &packet, pass())?;
    }
    Ok(())
}

/// What a frame that went by the stack looks like when it leaves, beside the MAC addresses; `None`
/// where it leaves as it is.
fn by_the_stack(fixture: &Fixture, at: At, slow: &Outcome) -> Result<Option<Vec<u8>>> {
    let frame = &slow.frame;
    if at.is_at_uplink() {
        return Ok(Some(frame.clone()));
    }
    if frame[..6] != bridge_mac(A) {
        return Ok(None);
    }
    let (at, length) = match fixture.family {
        Family::V4 => (ETHERNET + 16, 4),
        Family::V6 => (ETHERNET + 24, 16),
    };
    let to_b1 = match fixture.family.address(crate::fixture::address("b1")) {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    if frame[at..at + length] == to_b1[..] {
        return Ok(Some(frame.clone()));
    }
    let left = fixture.run(to_uplink("up0", Some("br-a")), frame)?;
    ensure!(left.verdict == TCX_NEXT, "the stack would not send it: {}", left.verdict);
    Ok(Some(left.frame))
}

/// Runs a frame both ways and compares.
fn compare(fixture: &Fixture, at: At, frame: &[u8]) -> Result<bool> {
    fixture.set_fast_path(false)?;
    let slow = fixture.run(at, frame)?;
    fixture.set_fast_path(true)?;
    let fast = fixture.run(at, frame)?;
    if fast.verdict != TCX_REDIRECT || slow.verdict == TCX_REDIRECT {
        ensure!(
            fast.verdict == slow.verdict && fast.frame == slow.frame,
            "by the stack {} {}, past it {} {}",
            slow.verdict,
            hex(&slow.frame),
            fast.verdict,
            hex(&fast.frame)
        );
        return Ok(false);
    }
    ensure!(slow.verdict == TCX_NEXT, "by the stack {}", slow.verdict);
    let Some(wanted) = by_the_stack(fixture, at, &slow)? else {
        ensure!(fast.frame == slow.frame, "switched as {}", hex(&fast.frame));
        return Ok(true);
    };
    let (mut seen, mut wanted) = (fast.frame.clone(), wanted);
    let life = match fixture.family {
        Family::V4 => ETHERNET + 8,
        Family::V6 => ETHERNET + 7,
    };
    ensure!(seen[life] + 1 == wanted[life], "life {} of {}", seen[life], wanted[life]);
    if fixture.family == Family::V4 {
        // Right or wrong before, the header's sum stays what it was.
        let sums = [&seen, &wanted].map(|frame| sum(&frame[ETHERNET..ETHERNET + 20]));
        ensure!(
            sums[0] == sums[1],
            "the sum of the header is {:04x}, not {:04x}",
            sums[0],
            sums[1]
        );
        for frame in [&mut seen, &mut wanted] {
            frame[ETHERNET + 10..ETHERNET + 12].fill(0);
        }
    }
    seen[life] = 0;
    wanted[life] = 0;
    ensure!(
        seen[MACS..] == wanted[MACS..],
        "past the stack {}, by it {}",
        hex(&seen),
        hex(&wanted)
    );
    Ok(true)
}

/// The Internet checksum's sum (RFC 1071), of which 0 and 0xffff are the same.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>() % 0xffff
}

pub(crate) fn the_fast_path_does_what_the_stack_would(fixture: &mut Fixture) -> Result<()> {
    talk(fixture)?;
    let across = out().to(SocketAddrV4::new(HOST, 8443));
    let to_itself = out().to(SocketAddrV4::new(HOST, 8080));
    let mut bases = Vec::new();
    for kind in [Kind::Udp, Kind::Segment] {
        for (at, wire) in [
            (UPLINK, into()),
            (CONTAINER, delivered().answer()),
            (CONTAINER, out()),
            (CONTAINER, across),
            (CONTAINER, to_itself),
            (UPLINK, left().on_link(into().destination_mac, into().source_mac).answer()),
        ] {
            let frame = Datagram::new(kind, wire).frame(fixture.family);
            // Twice, for what is looked up once.
            compare(fixture, at, &frame)?;
            compare(fixture, at, &frame)?;
            bases.push((at, frame));
        }
    }
    let config = Config {
        cases: MUTATIONS,
        rng_seed: RngSeed::Fixed(SEED),
        failure_persistence: None,
        ..Config::default()
    };
    // Where a change is not the end of all resemblance: from the IP header on, but for addresses.
    let edit = (prop_oneof![3 => 14_usize..26, 2 => 34_usize..78], any::<u8>());
    let strategy = (
        any::<prop::sample::Index>(),
        prop::collection::vec(edit, 0..3),
        prop_oneof![5 => Just(usize::MAX), 1 => 54_usize..150],
    );
    let took = Cell::new(0_u32);
    TestRunner::new(config)
        .run(&strategy, |(base, edits, length)| {
            let (at, mut frame) = base.get(&bases).clone();
            for (offset, value) in edits {
                if let Some(byte) = frame.get_mut(offset) {
                    *byte = value;
                }
            }
            frame.truncate(length);
            let compared = compare(fixture, at, &frame)
                .with_context(|| format!("{at:?}: {}", hex(&frame)))
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
            took.set(took.get() + u32::from(compared));
            Ok(())
        })
        .map_err(|error| anyhow!("seed {SEED}: {error}"))?;
    ensure!(took.get() >= MUTATIONS / 5, "only {} packets took the fast path", took.get());
    Ok(())
}
