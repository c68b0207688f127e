//! The user's rules: who may open, and keep, a flow into a network.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;
use netdp::{
    dataplane::Program,
    model::{Action, Rule},
};
use netdp_common::counter::Reason;

use crate::{
    datagram::{Datagram, Kind, Shape},
    family::Family,
    fixture::{
        A, B, Fixture, HOST, OUTSIDE, Want, address, bridge_mac, dropped, from_container,
        from_container_wire, from_outside_wire, from_uplink, mac, pass, pass_as, socket,
    },
};

const DIALLED: SocketAddrV4 = SocketAddrV4::new(HOST, 8080);

/// A rule about the parties from the first to the last, in both families.
pub(crate) fn rule(action: Action, first: [u8; 4], last: [u8; 4]) -> [Rule; 2] {
    [Family::V4, Family::V6].map(|family| Rule {
        action,
        first: family.address(first.into()),
        last: family.address(last.into()),
    })
}

const EVERYONE: ([u8; 4], [u8; 4]) = ([0; 4], [255; 4]);

/// Gives network a these rules.
pub(crate) fn set(program: &mut Program, rules: Vec<[Rule; 2]>) {
    let network = program.networks.get_mut(&A).unwrap();
    network.policy = rules.concat();
    network.policy_generation += 1;
}

/// A packet from a source outside to a1's published port.
fn dials(
    fixture: &mut Fixture,
    kind: Kind,
    source: Ipv4Addr,
    port: u16,
    want: Answer,
) -> Result<()> {
    let wire = from_outside_wire(SocketAddrV4::new(source, port), DIALLED);
    let passes = pass_as(wire.to(socket("a1", 80)));
    fixture.expect("dials", from_uplink("up0"), &Datagram::new(kind, wire), want.of(passes))?;
    Ok(())
}

#[derive(Clone, Copy)]
enum Answer {
    Opens,
    Follows,
    Denied,
}

impl Answer {
    fn of(self, passes: Want) -> Want {
        match self {
            Self::Opens => passes.opening(A, Reason::FlowIn),
            Self::Follows => passes,
            Self::Denied => dropped(A, Reason::Policy),
        }
    }
}

pub(crate) fn the_examples_of_docker_user_hold(fixture: &mut Fixture) -> Result<()> {
    let deny_rest = rule(Action::Deny, EVERYONE.0, EVERYONE.1);
    for (first, last) in [
        ([192, 0, 2, 1], [192, 0, 2, 1]),
        ([192, 0, 2, 0], [192, 0, 2, 255]),
        ([192, 0, 2, 1], [192, 0, 2, 3]),
    ] {
        fixture.apply(|program| set(program, vec![rule(Action::Allow, first, last), deny_rest]))?;
        for source in [
            [0, 0, 0, 1],
            [192, 0, 1, 255],
            [192, 0, 2, 0],
            [192, 0, 2, 1],
            [192, 0, 2, 2],
            [192, 0, 2, 3],
            [192, 0, 2, 4],
            [192, 0, 2, 255],
            [192, 0, 3, 0],
            [223, 255, 255, 255],
        ] {
            let listed = (first..=last).contains(&source);
            let want = if listed { Answer::Opens } else { Answer::Denied };
            for kind in [Kind::Syn, Kind::Udp] {
                dials(fixture, kind, source.into(), 5000, want)?;
            }
        }
        fixture.remove_flows()?;
    }
    Ok(())
}

pub(crate) fn the_first_rule_that_matches_decides(fixture: &mut Fixture) -> Result<()> {
    let broad = rule(Action::Deny, [10, 0, 0, 0], [10, 255, 255, 255]);
    let narrow = rule(Action::Allow, [10, 0, 0, 3], [10, 0, 0, 3]);
    fixture.apply(|program| set(program, vec![narrow, broad]))?;
    dials(fixture, Kind::Syn, OUTSIDE, 5000, Answer::Opens)?;
    dials(fixture, Kind::Syn, [10, 0, 0, 4].into(), 5000, Answer::Denied)?;
    dials(fixture, Kind::Syn, [192, 0, 2, 1].into(), 5000, Answer::Opens)?;
    fixture.apply(|program| set(program, vec![broad, narrow]))?;
    dials(fixture, Kind::Syn, OUTSIDE, 5001, Answer::Denied)
}

pub(crate) fn a_new_rule_cuts_the_flow_at_its_next_packet(fixture: &mut Fixture) -> Result<()> {
    let deny = |first| vec![rule(Action::Deny, first, first)];
    for kind in [Kind::Segment, Kind::Udp] {
        fixture.apply(|program| set(program, Vec::new()))?;
        dials(fixture, kind, OUTSIDE, 5000, Answer::Opens)?;
        // A change that does not concern it.
        fixture.apply(|program| set(program, deny([192, 0, 2, 1])))?;
        dials(fixture, kind, OUTSIDE, 5000, Answer::Follows)?;
        fixture.apply(|program| set(program, deny(OUTSIDE.octets())))?;
        dials(fixture, kind, OUTSIDE, 5000, Answer::Denied)?;
        fixture.expect_flows(&[])?;
        dials(fixture, kind, OUTSIDE, 5000, Answer::Denied)?;
        fixture.apply(|program| set(program, Vec::new()))?;
        dials(fixture, kind, OUTSIDE, 5000, Answer::Opens)?;
        fixture.remove_flows()?;
    }
    Ok(())
}

pub(crate) fn a_new_rule_cuts_the_answers_too(fixture: &mut Fixture) -> Result<()> {
    dials(fixture, Kind::Segment, OUTSIDE, 5000, Answer::Opens)?;
    fixture.apply(|program| {
        set(program, vec![rule(Action::Deny, OUTSIDE.octets(), OUTSIDE.octets())]);
    })?;
    let wire = from_container_wire("a1", 80, SocketAddrV4::new(OUTSIDE, 5000));
    let want = dropped(A, Reason::Policy);
    fixture.expect("answers", from_container("a1"), &Datagram::new(Kind::Segment, wire), want)?;
    fixture.expect_flows(&[])
}

pub(crate) fn a_flow_that_lost_its_approval_gets_no_fragment_through(
    fixture: &mut Fixture,
) -> Result<()> {
    let cut = Shape { cut: true, ..Shape::PLAIN };
    let wire = from_outside_wire(SocketAddrV4::new(OUTSIDE, 5000), DIALLED);
    let packet = Datagram::new(Kind::Udp, wire).shaped(cut);
    let opening = Answer::Opens.of(pass_as(wire.to(socket("a1", 80))));
    fixture.expect("open", from_uplink("up0"), &packet, opening)?;
    fixture.apply(|program| {
        set(program, vec![rule(Action::Deny, OUTSIDE.octets(), OUTSIDE.octets())]);
    })?;
    // The flow is cut at its first packet; the rest of the datagram is the host's.
    let frames = packet.frames(fixture.family);
    let (first, rest) = (frames[0].clone(), frames[1].clone());
    let outcome = fixture.run(from_uplink("up0"), &first)?;
    assert_eq!(outcome.verdict, crate::fixture::TCX_DROP);
    let outcome = fixture.run(from_uplink("up0"), &rest)?;
    assert!(outcome.verdict == crate::fixture::TCX_DROP || outcome.frame == rest, "{outcome:?}");
    fixture.expect_flows(&[])
}

pub(crate) fn rules_reach_other_networks_but_not_members(fixture: &mut Fixture) -> Result<()> {
    fixture.apply(|program| set(program, vec![rule(Action::Deny, EVERYONE.0, EVERYONE.1)]))?;
    let dial = |endpoint, to| Datagram::new(Kind::Syn, from_container_wire(endpoint, 4000, to));
    let want = dropped(A, Reason::Policy);
    fixture.expect("another network", from_container("b1"), &dial("b1", DIALLED), want)?;
    fixture.expect_flows(&[])?;
    // Inside the network, outward, and in other networks the rules say nothing.
    let neighbour = dial("a2", socket("a1", 80));
    fixture.expect("a neighbour", from_container("a2"), &neighbour, pass())?;
    let arrives = from_container_wire("a2", 4000, socket("a1", 80)).on_link(mac("a2"), mac("a1"));
    let opening = pass_as(arrives).opening(A, Reason::FlowHairpin);
    fixture.expect("by its port", from_container("a2"), &dial("a2", DIALLED), opening)?;
    let out = dial("a1", SocketAddrV4::new(OUTSIDE, 80));
    let opening = pass().opening(A, Reason::FlowOut);
    fixture.expect("outward", from_container("a1"), &out, opening)?;
    let other = SocketAddrV4::new(HOST, 8443);
    let arrives = from_container_wire("a1", 4000, socket("b1", 443));
    let opening = pass_as(arrives).opening(B, Reason::FlowHairpin);
    fixture.expect("elsewhere", from_container("a1"), &dial("a1", other), opening)?;
    Ok(())
}

pub(crate) fn a_hairpin_flow_is_judged_by_the_dialling_container(
    fixture: &mut Fixture,
) -> Result<()> {
    let wire = from_container_wire("b1", 4000, DIALLED);
    let arrives = wire.to(socket("a1", 80));
    let packet = Datagram::new(Kind::Segment, wire);
    let opening = pass_as(arrives).opening(A, Reason::FlowHairpin);
    fixture.expect("open", from_container("b1"), &packet, opening)?;
    let b1 = address("b1").octets();
    fixture.apply(|program| {
        set(program, vec![rule(Action::Allow, b1, b1), rule(Action::Deny, EVERYONE.0, EVERYONE.1)]);
    })?;
    fixture.expect("allowed", from_container("b1"), &packet, pass_as(arrives))?;
    let answers = arrives.answer().on_link(mac("a1"), bridge_mac(A));
    let answer = Datagram::new(Kind::Segment, answers);
    fixture.expect("its answer", from_container("a1"), &answer, pass())?;
    fixture.apply(|program| set(program, vec![rule(Action::Deny, b1, b1)]))?;
    let want = dropped(A, Reason::Policy);
    fixture.expect("denied", from_container("a1"), &answer, want)?;
    fixture.expect_flows(&[])
}
