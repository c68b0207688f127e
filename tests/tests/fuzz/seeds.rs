//! Valid frames of every sort, and how they are spoilt.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

use etherparse::{ArpOperation, Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4::TimeExceededCode};
use netdp_tests::packet::arp;

use crate::{
    datagram::{Datagram, Kind, Shape, Wire},
    family::{FAMILIES, Family},
    fixture::{
        A, HOST, OUTSIDE, ROUTER_MAC, UPLINK_MAC, address, bridge_mac, from_container_wire,
        from_outside_wire, gateway, mac, socket,
    },
};

const KINDS: [Kind; 10] = [
    Kind::Syn,
    Kind::SynAck,
    Kind::Segment,
    Kind::Fin,
    Kind::Reset,
    Kind::Udp,
    Kind::BareUdp,
    Kind::Request,
    Kind::Reply,
    Kind::OtherIcmp,
];

/// The ends of packets that belong to flows of [`openers`], as they look at each hook.
fn wires() -> Vec<Wire> {
    let server = SocketAddrV4::new(OUTSIDE, 80);
    let out = from_container_wire("a1", 4000, server);
    let outside = out.on_link(UPLINK_MAC, ROUTER_MAC).from(SocketAddrV4::new(HOST, 4000));
    let into = from_outside_wire(SocketAddrV4::new(OUTSIDE, 5000), SocketAddrV4::new(HOST, 8080));
    let inside = into.to(socket("a1", 80)).on_link(bridge_mac(A), mac("a1"));
    let hairpin = from_container_wire("b1", 4000, SocketAddrV4::new(HOST, 8080));
    vec![
        out,
        outside.answer(),
        into,
        inside,
        inside.answer(),
        hairpin,
        hairpin.to(socket("a1", 80)),
    ]
}

/// What opens the flows that the other frames belong to.
pub(crate) fn openers() -> Vec<(&'static str, Vec<u8>)> {
    let ping = SocketAddrV4::new(OUTSIDE, 0);
    let mut openers = Vec::new();
    for kind in [Kind::Segment, Kind::Udp] {
        let [out, _, into, _, _, hairpin, _] = wires()[..] else { continue };
        openers.push(("a1", Datagram::new(kind, out)));
        openers.push(("up0", Datagram::new(kind, into)));
        openers.push(("b1", Datagram::new(kind, hairpin)));
    }
    let request = from_container_wire("a1", 4000, ping);
    openers.push(("a1", Datagram::new(Kind::Request, request)));
    let in_family = |family| {
        openers.iter().map(move |(at, opener): &(_, Datagram)| (*at, opener.frame(family)))
    };
    FAMILIES.iter().copied().flat_map(in_family).collect()
}

fn error(envelope: Wire, quoted: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(envelope.source_mac, envelope.destination_mac)
        .ipv4(envelope.source.ip().octets(), envelope.destination.ip().octets(), 60)
        .icmpv4(Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit));
    let mut frame = Vec::with_capacity(builder.size(quoted.len()));
    builder.write(&mut frame, quoted).expect("a small packet fits");
    frame
}

fn ipv6() -> Vec<Vec<u8>> {
    let own: Ipv6Addr = "fd00::2".parse().expect("an address");
    let other: Ipv6Addr = "2001:db8::3".parse().expect("an address");
    let builder = || {
        PacketBuilder::ethernet2(mac("a1"), bridge_mac(A)).ipv6(own.octets(), other.octets(), 255)
    };
    let write = |length: usize, write: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = Vec::with_capacity(length);
        write(&mut frame);
        frame
    };
    let udp = write(80, &|frame| builder().udp(4000, 80).write(frame, b"udp").expect("fits"));
    let tcp = write(80, &|frame| {
        builder().tcp(4000, 80, 1, 1000).syn().write(frame, b"").expect("fits");
    });
    let ping = write(80, &|frame| {
        builder().icmpv6_echo_request(9, 1).write(frame, b"ping").expect("fits");
    });
    // A neighbour solicitation without options: type 135, code 0, target.
    let solicitation = write(100, &|frame| {
        let kind = Icmpv6Type::Unknown { type_u8: 135, code_u8: 0, bytes5to8: [0; 4] };
        builder().icmpv6(kind).write(frame, &other.octets()).expect("fits");
    });
    let too_big = write(160, &|frame| {
        let kind = Icmpv6Type::PacketTooBig { mtu: 1280 };
        builder().icmpv6(kind).write(frame, &udp[14..]).expect("fits");
    });
    vec![udp, tcp, ping, solicitation, too_big]
}

/// Frames with right checksums: both families in every shape, errors about IPv4, ARP and some more
/// of IPv6.
pub(crate) fn valid() -> Vec<Vec<u8>> {
    let mut frames = ipv6();
    for wire in wires() {
        for kind in KINDS {
            for shape in Shape::ALL {
                for family in FAMILIES.iter().filter(|family| kind.is_of(**family)) {
                    frames.extend(Datagram::new(kind, wire).shaped(shape).frames(*family));
                }
            }
            // About a packet of ours, from where it went.
            let quoted = Datagram::new(kind, wire).frame(Family::V4);
            let back = wire.answer();
            frames.push(error(back, &quoted[14..]));
            frames.push(error(back, &quoted[14..42]));
            let optional = Shape { options: true, cut: false };
            let quoted = Datagram::new(kind, wire).shaped(optional).frame(Family::V4);
            frames.push(error(back, &quoted[14..]));
        }
    }
    for operation in [ArpOperation::REQUEST, ArpOperation::REPLY] {
        frames.push(arp(operation, mac("a1"), address("a1"), bridge_mac(A), gateway(A)));
    }
    frames
}

/// SplitMix64: the same numbers for the same seed, everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// The frame is never shorter than the kernel takes for a test run.
pub(crate) const SHORTEST: usize = 34;
const LONGEST: usize = 1500;

fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = frame.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Spoils a frame in a few places.
pub(crate) fn mutate(random: &mut Random, frame: &mut Vec<u8>, other: &[u8]) {
    let addresses = [
        HOST,
        OUTSIDE,
        address("a1"),
        address("a2"),
        address("b1"),
        gateway(A),
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::BROADCAST,
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::new(224, 0, 0, 1),
    ];
    let macs = [mac("a1"), mac("a2"), mac("b1"), bridge_mac(A), UPLINK_MAC, [0xff; 6]];
    for _ in 0..=random.below(4) {
        let at = random.below(frame.len());
        match random.below(12) {
            0 => frame[at] ^= 1 << random.below(8),
            1 => frame[at] = random.of(&[0, 1, 0x7f, 0x80, 0xff]),
            2 => frame[at] = random.next() as u8,
            3 => put(frame, at, &(random.next() as u16).to_be_bytes()),
            4 => frame.truncate(at.max(SHORTEST)),
            5 => {
                let extra = random.below(64);
                frame.extend((0..extra).map(|_| random.next() as u8));
            }
            6 => {
                let tail = other.get(at..).unwrap_or_default();
                frame.truncate(at.max(SHORTEST));
                frame.extend_from_slice(tail);
            }
            // Addresses of the packet and of what it quotes, and ports.
            7 => put(frame, random.of(&[26, 30, 54, 58]), &random.of(&addresses).octets()),
            8 => {
                let port = random.of(&[0u16, 80, 4000, 5000, 8080, 8443, 9090, 50_000]);
                put(frame, random.of(&[34, 36, 38, 62, 64, 66]), &port.to_be_bytes());
            }
            9 => put(frame, random.of(&[0, 6]), &random.of(&macs)),
            10 => put(frame, random.of(&[23, 51]), &[random.of(&[1, 6, 17, 47, 58, 132])]),
            // Lengths, fragmentation, message types and the like.
            _ => {
                put(frame, random.of(&[12, 14, 16, 20, 22, 34, 42, 44, 48]), &[random.next() as u8])
            }
        }
    }
    frame.truncate(LONGEST);
}
