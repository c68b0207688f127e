//! What may happen next, and how likely that is.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    ops::RangeInclusive,
};

use netdp_common::flow::{IPPROTO_TCP, IPPROTO_UDP};
use proptest::{
    collection::vec,
    prelude::{Just, Strategy, any, prop_oneof},
    sample::select,
};

use crate::{
    datagram::Kind,
    fixture::{HOST, OUTSIDE, address},
    model::{CONTAINERS, PUBLISHED},
};

/// Somebody else outside, whom the policy may keep out.
pub(crate) const STRANGER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);
/// A port of the host where nobody is at home.
const CLOSED: u16 = 9999;
/// Events of a story: one that fails can shrink to a single one.
const LENGTH: RangeInclusive<usize> = 1..=79;

/// Somebody sends a packet of its own accord.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dial {
    pub(crate) from: SocketAddrV4,
    pub(crate) to: SocketAddrV4,
    pub(crate) kind: Kind,
}

/// Something that happens. A half is named by its place in the table, as often around as it takes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A packet, that may be a flow's first.
    Dial(Dial),
    /// The same packet on two CPUs at once.
    Race(Dial),
    /// A packet of a half's flow, in its direction or the answer's. A forged one has a sequence
    /// number that nobody awaits.
    Follow { half: usize, back: bool, tcp: Kind, forged: bool },
    /// An error about a packet as a half has sent it on, from its receiver or a router.
    Complain { half: usize, router: bool },
    /// Time passes.
    Age,
    /// The agent collects.
    Collect,
    /// The agent dies, or is there again.
    Agent { is_there: bool },
    /// The halves of a container become those of a predecessor.
    Outdate { container: Ipv4Addr },
    /// The agent gives a container's place to another one.
    Replace { container: Ipv4Addr },
    /// Network a keeps somebody out, or nobody.
    Deny(Option<Ipv4Addr>),
}

/// A story from an empty table on.
pub(crate) fn story() -> impl Strategy<Value = Vec<Event>> {
    vec(event(), LENGTH)
}

fn event() -> impl Strategy<Value = Event> {
    let half = || 0..64_usize;
    let container = || select(CONTAINERS.map(|(name, _)| address(name)).to_vec());
    let clients = [None, Some(STRANGER), Some(address("b1"))];
    prop_oneof![
        70 => dial().prop_map(Event::Dial),
        6 => dial().prop_map(Event::Race),
        80 => (half(), any::<bool>(), tcp(), prop_oneof![9 => Just(false), 1 => Just(true)])
            .prop_map(|(half, back, tcp, forged)| Event::Follow { half, back, tcp, forged }),
        16 => (half(), any::<bool>()).prop_map(|(half, router)| Event::Complain { half, router }),
        12 => Just(Event::Age),
        6 => Just(Event::Collect),
        2 => any::<bool>().prop_map(|is_there| Event::Agent { is_there }),
        2 => container().prop_map(|container| Event::Outdate { container }),
        // What the agent applies takes the kernel milliseconds.
        1 => container().prop_map(|container| Event::Replace { container }),
        1 => select(clients.to_vec()).prop_map(Event::Deny),
    ]
}

fn tcp() -> impl Strategy<Value = Kind> {
    prop_oneof![
        3 => Just(Kind::Syn),
        3 => Just(Kind::SynAck),
        4 => Just(Kind::Segment),
        2 => Just(Kind::Fin),
        1 => Just(Kind::Reset),
    ]
}

fn dial() -> impl Strategy<Value = Dial> {
    // Kept, published, two that have to move, in the reserved range.
    let inside = (
        select(CONTAINERS.map(|(name, _)| address(name)).to_vec()),
        select(vec![4000_u16, 8080, 40_000, 40_001, 50_000]),
        select(
            [(OUTSIDE, 80), (OUTSIDE, 80), (OUTSIDE, 80), (OUTSIDE, 81)]
                .into_iter()
                .chain(ports())
                .collect::<Vec<_>>(),
        ),
    );
    let outside = (
        select(vec![OUTSIDE, STRANGER]),
        select(vec![5000_u16, 5001, 80]),
        select(ports().collect::<Vec<_>>()),
    );
    let ends = prop_oneof![2 => inside, 1 => outside];
    let kind = prop_oneof![
        3 => tcp(),
        3 => Just(Kind::Udp),
        1 => Just(Kind::Request),
    ];
    (ends, kind).prop_map(|((from, port, (to, to_port)), kind)| {
        let to_port = if kind == Kind::Request { 0 } else { to_port };
        Dial { from: SocketAddrV4::new(from, port), to: SocketAddrV4::new(to, to_port), kind }
    })
}

/// Ports of the host.
fn ports() -> impl Iterator<Item = (Ipv4Addr, u16)> {
    PUBLISHED.into_iter().map(|(port, _)| port).chain([CLOSED]).map(|port| (HOST, port))
}

/// What a packet of a flow may be: of TCP there is some choice.
pub(crate) fn kind_along(protocol: u8, from_asking: bool, tcp: Kind) -> Kind {
    match protocol {
        IPPROTO_TCP => tcp,
        IPPROTO_UDP => Kind::Udp,
        _ if from_asking => Kind::Request,
        _ => Kind::Reply,
    }
}
