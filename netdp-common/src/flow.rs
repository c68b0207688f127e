//! FLOW4 and FLOW6: tracked connections, as two halves that find and translate each direction; and
//! INDEX4 and INDEX6, by which halves are found.
//!
//! A half is found by what a packet looks like when it arrives and says what it looks like when it
//! leaves; the key of the other half is the reverse of that. Each half records only what its own
//! direction has shown, so that no packet ever writes to two entries; the state of the connection
//! is what both show together.
//!
//! Flow number n has places 2n (the half of the direction that opened it) and 2n + 1 (the answer's) of its
//! table. The index is an array of sets with [`SLOTS_PER_SET`] slots each, and a key's hash says in which of
//! them its place stands, or beside which if that is full. Both halves get their numbers at once and give
//! them back at once; a packet finds one as long as its place stands in the index.

use crate::{
    abi::wire,
    addr::{Address, Be16, Be32, Be128, Tuple},
    config::Timeouts,
    network::NETWORKS_MAX,
};

/// Default size of each flow table in flows; the table has two places for each.
pub const FLOWS_DEFAULT: u32 = 262_144;

/// Zone of packets that arrive from outside; other zones are network ids.
pub const ZONE_WORLD: u32 = 0;

/// Added to the zones of a mapping, in which no packet arrives.
///
/// A mapping is a flow to nobody in particular: it holds the port outside that an endpoint's port
/// has whomever it talks to. The flows that leave by it are flows of their own.
pub const ZONE_MAPPING: u32 = 0x8000;

wire! {
    /// Key of FLOW4 and FLOW6.
    pub struct FlowKey<A> {
        /// Addresses and ports on arrival.
        pub tuple: Tuple<A>,
        /// Where the packet arrives: a network id, or [`ZONE_WORLD`]; of a mapping, with
        /// [`ZONE_MAPPING`] added.
        pub zone: u16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
    }
}

wire! {
    /// Value of FLOW4 and FLOW6: one half of a flow.
    pub struct Flow<A> {
        /// Addresses and ports when the packet leaves.
        pub to: Tuple<A>,
        /// Zone in which the answer to that arrives.
        pub reply_zone: u16,
        /// Network whose policy and counters the flow belongs to.
        pub network: u16,
        /// Generation of the container whose packets this half is for; 0 in [`ZONE_WORLD`].
        pub generation: u32,
        /// ifindex of the interface by which the packet leaves past the host's stack: an uplink, or
        /// the host's end of a container's veth; 0 where the stack has to take it, or nobody has looked
        /// since [`Self::last_seen`] moved.
        pub exit: u32,
        /// Generation of its policy under which the flow was last judged.
        pub policy_generation: u32,
        /// Seconds of CLOCK_MONOTONIC at which this direction last had a packet.
        pub last_seen: u32,
        /// TCP: the acknowledgement number that this direction last sent, in host byte order;
        /// valid with [`seen::ACK`]. The other direction goes on from there.
        pub acknowledged: u32,
        /// Bits of [`seen`].
        pub seen: u8,
        /// Bits of [`flag`].
        pub flags: u8,
        /// One of [`stage`].
        pub stage: u8,
        /// Zero.
        pub pad: u8,
    }
}

wire! {
    /// Value of FLOW4 and FLOW6: a place.
    pub struct Place<A> {
        /// How the half is found.
        pub key: FlowKey<A>,
        /// The half.
        pub half: Flow<A>,
        /// 1 while a flow has it, 0 when it is free.
        pub is_taken: u32,
        /// Its own number, while it is taken.
        pub number: u32,
    }
}

// A cache line: packets of both directions write to lines of their own.
const _: () = assert!(size_of::<Place<Be32>>() == 64);

/// Slots of a set.
pub const SLOTS_PER_SET: usize = 12;

wire! {
    /// Value of INDEX4 and INDEX6: the slots of keys whose hashes have the same lower bits, and of those
    /// that the set beside it had no room for; a cache line.
    pub struct IndexSet {
        /// [`tag`]s of the first eight slots, the first one's in the lowest byte; 0 where a slot is free.
        pub first_tags: u64,
        /// The same of the others.
        pub last_tags: u32,
        /// In the bits of [`WRITERS`] how many CPUs write to the set or want to: who makes it 1 may. In
        /// steps of [`BESIDE`] how many keys that belong here stand in the set beside this one, whose
        /// number differs in the last bit, because there was no room for them.
        pub writers: u32,
        /// Where the halves lie.
        pub places: [u32; SLOTS_PER_SET],
    }
}

const _: () = assert!(size_of::<IndexSet>() == 64);

/// Bits of [`IndexSet::writers`].
pub const WRITERS: u32 = 0xffff;
/// One key in [`IndexSet::writers`].
pub const BESIDE: u32 = 1 << 16;

wire! {
    /// The single entry of TABLE4 and TABLE6: what holds for a whole table.
    pub struct FlowTable {
        /// Random, so that nobody can tell which keys share a set.
        pub seed: u64,
        /// Sets of the index, less 1: a mask. 0 before the table may be used.
        pub mask: u32,
        /// How many flows there may be.
        pub flows: u32,
        /// How many numbers were ever taken at once: flows have lower ones.
        pub top: u32,
        /// Number of the flow that was looked at last, where no agent does.
        pub hand: u32,
        /// As [`IndexSet::writers`], of `top`.
        pub writers: u32,
        /// Zero.
        pub pad: u32,
    }
}

/// Sets of an index for so many flows, each of which has two slots: a power of two, such that a third of
/// a full table's slots are taken.
pub const fn sets(flows: u32) -> u32 {
    let sets = flows.next_power_of_two() / 2;
    if sets < 64 { 64 } else { sets }
}

/// The tag of a hash: six of its bits that do not choose the set, one by which it is not 0, and the last
/// bit of its set's number, by which those that belong there differ from those of the set beside it.
#[inline(always)]
pub const fn tag(hash: u64) -> u8 {
    (hash >> 56) as u8 & !1 | 0x80 | (hash & 1) as u8
}

// A zone is 16 bits of a key: a table has two keys for each flow, so their bytes count.
const _: () = assert!(NETWORKS_MAX <= ZONE_MAPPING && ZONE_MAPPING < 1 << 16);

// The programs copy halves in words of 64 bits.
const _: () = assert!(
    size_of::<Flow<Be32>>().is_multiple_of(8) && size_of::<Flow<Be128>>().is_multiple_of(8)
);

/// Bits of [`Flow::flags`].
pub mod flag {
    /// The half of the direction that opened the flow.
    pub const ORIGINAL: u8 = 1;
    /// The flow entered its network from elsewhere: the policy has a say.
    pub const INBOUND: u8 = 2;
    /// The flow leaves by a mapping, which it keeps alive; with [`INBOUND`]: it came in by one.
    pub const MAPPED: u8 = 4;
}

/// Values of [`Flow::stage`]: which hook rewrites the packet. Netfilter's order, for the stack's
/// sake: a destination has to be right before routing, and a source must not be one of the host's
/// own addresses until after it.
pub mod stage {
    /// The hook at which it arrives.
    pub const INGRESS: u8 = 0;
    /// The hook at which the host's stack sends it on.
    pub const EGRESS: u8 = 1;
    /// At arrival, and the bridge hands it on: the answer stays in the network.
    pub const SWITCH: u8 = 2;
}

/// Bits of [`Flow::seen`].
pub mod seen {
    /// A packet that is not a first SYN.
    pub const DATA: u8 = 1;
    /// TCP FIN.
    pub const FIN: u8 = 2;
    /// TCP RST.
    pub const RST: u8 = 4;
    /// Any packet at all.
    pub const ANY: u8 = 8;
    /// A TCP ACK.
    pub const ACK: u8 = 16;
    /// The flow is ending.
    pub const CLOSING: u8 = FIN | RST;
}

impl<A: Address> FlowKey<A> {
    /// Key of packets with these addresses that arrive in `zone`.
    #[inline(always)]
    pub const fn new(zone: u32, tuple: Tuple<A>, proto: u8) -> Self {
        Self { tuple, zone: zone as u16, proto, pad: 0 }
    }

    /// Its hash in a table with this seed.
    ///
    /// Words are mixed in by multiplication, which carries upwards, and by shifts, which carry down.
    #[inline(always)]
    pub fn hash(&self, seed: u64) -> u64 {
        let Tuple { src, dst, sport, dport } = &self.tuple;
        let mut hash = seed;
        for (src, dst) in src.words().iter().zip(dst.words()) {
            hash = mix(hash, u64::from(*src) | u64::from(*dst) << 32);
        }
        let ports = u64::from(sport.raw) | u64::from(dport.raw) << 16;
        let rest = u64::from(self.zone) << 32 | u64::from(self.proto) << 48;
        hash = mix(hash, ports | rest).wrapping_mul(0xd6e8_feb8_6659_fd93);
        hash ^ hash >> 32
    }

    /// Makes it the key of the mapping that gives the sender of such packets its port outside: in
    /// place, for a caller that has no stack for another.
    #[inline(always)]
    pub fn make_mapping(&mut self) {
        self.tuple.dst = A::default();
        self.tuple.dport = Be16::default();
        self.zone |= ZONE_MAPPING as u16;
    }

    /// The network whose endpoint sends such packets; `None` = they come from the world.
    pub const fn network(&self) -> Option<u32> {
        match self.zone as u32 & !ZONE_MAPPING {
            ZONE_WORLD => None,
            network => Some(network),
        }
    }

    /// Whether it is of a mapping.
    #[inline(always)]
    pub const fn is_mapping(&self) -> bool {
        self.zone as u32 & ZONE_MAPPING != 0
    }
}

impl<A: Address> Flow<A> {
    /// [`Self::network`] as other tables have it.
    #[inline(always)]
    pub const fn network(&self) -> u32 {
        self.network as u32
    }

    /// [`Self::reply_zone`] as other tables have it.
    #[inline(always)]
    pub const fn reply_zone(&self) -> u32 {
        self.reply_zone as u32
    }

    /// Key of the other half.
    #[inline(always)]
    pub const fn peer_key(&self, proto: u8) -> FlowKey<A> {
        FlowKey::new(self.reply_zone as u32, self.to.reversed(), proto)
    }

    /// Writes the key of the other half: field by field, for a caller that has no stack for it.
    #[inline(always)]
    pub fn write_peer_key(&self, proto: u8, key: &mut FlowKey<A>) {
        key.zone = self.reply_zone;
        key.tuple.src = self.to.dst;
        key.tuple.dst = self.to.src;
        key.tuple.sport = self.to.dport;
        key.tuple.dport = self.to.sport;
        key.proto = proto;
        key.pad = 0;
    }
}

#[inline(always)]
const fn mix(hash: u64, word: u64) -> u64 {
    let hash = (hash ^ word).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    hash ^ hash >> 32
}

/// Farthest that an end of a connection is taken to be ahead of what the other has acknowledged,
/// in bytes: more than is in flight on most paths, and little enough that somebody who can't see
/// the connection has to send thousands of packets to hit it.
const IN_FLIGHT: u32 = 1 << 20;

/// Whether a TCP FIN or RST with this sequence number can come from an end of the connection:
/// its peer has acknowledged up to `acknowledged`. Both in host byte order.
#[inline(always)]
pub const fn is_in_window(sequence: u32, acknowledged: u32) -> bool {
    sequence.wrapping_sub(acknowledged) <= IN_FLIGHT
}

/// What both halves together say about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Packets in one direction only (not TCP).
    Unreplied,
    /// Packets in both directions (not TCP).
    Replied,
    /// TCP, the handshake is not complete.
    HalfOpen,
    /// TCP, data may flow.
    Established,
    /// TCP, one direction has ended; the other may go on for as long as it likes.
    HalfClosed,
    /// TCP, both directions have ended.
    Closing,
    /// TCP, reset.
    Reset,
}

impl State {
    /// The state of a flow of `proto` whose halves have `original` and `reply` in [`Flow::seen`].
    #[inline(always)]
    pub const fn new(proto: u8, original: u8, reply: u8) -> Self {
        let both = original | reply;
        let is_answered = reply & seen::ANY != 0;
        if proto != IPPROTO_TCP {
            return if is_answered { Self::Replied } else { Self::Unreplied };
        }
        if both & seen::RST != 0 {
            Self::Reset
        } else if original & reply & seen::FIN != 0 {
            Self::Closing
        } else if !is_answered || original & seen::DATA == 0 {
            Self::HalfOpen
        } else if both & seen::FIN != 0 {
            Self::HalfClosed
        } else {
            Self::Established
        }
    }

    /// Whether the flow has not been answered yet: such ones make room when the table is full.
    #[inline(always)]
    pub const fn is_tentative(self) -> bool {
        matches!(self, Self::Unreplied | Self::HalfOpen)
    }

    /// Name in JSON and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unreplied => "unreplied",
            Self::Replied => "replied",
            Self::HalfOpen => "half-open",
            Self::Established => "established",
            Self::HalfClosed => "half-closed",
            Self::Closing => "closing",
            Self::Reset => "reset",
        }
    }

    /// Seconds without a packet after which the flow is collected.
    ///
    /// A reset flow is held as transitory because an off-path attacker may have sent the reset
    /// (RFC 7857, 2.2), and one that ended in one direction only as established (RFC 6146,
    /// 3.5.2.2).
    #[inline(always)]
    pub const fn timeout(self, proto: u8, timeouts: &Timeouts) -> u32 {
        match (proto, self) {
            (IPPROTO_TCP, Self::Established | Self::HalfClosed) => timeouts.tcp_established,
            (IPPROTO_TCP, _) => timeouts.tcp_transitory,
            (IPPROTO_UDP, Self::Replied) => timeouts.udp_replied,
            (IPPROTO_UDP, _) => timeouts.udp_unreplied,
            (IPPROTO_ICMP | IPPROTO_ICMPV6, _) => timeouts.icmp,
            _ => timeouts.other,
        }
    }
}

/// IP protocol numbers (IANA).
pub const IPPROTO_ICMP: u8 = 1;
/// TCP.
pub const IPPROTO_TCP: u8 = 6;
/// UDP.
pub const IPPROTO_UDP: u8 = 17;
/// ICMPv6.
pub const IPPROTO_ICMPV6: u8 = 58;
/// SCTP.
pub const IPPROTO_SCTP: u8 = 132;

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::Ipv4Addr;

    use super::*;

    #[test]
    fn halves_find_each_other() {
        let container = Be32::from(Ipv4Addr::new(172, 20, 0, 2));
        let host = Be32::from(Ipv4Addr::new(10, 0, 0, 2));
        let world = Be32::from(Ipv4Addr::new(10, 0, 0, 3));
        let arrives =
            Tuple { src: container, dst: world, sport: Be16::new(4000), dport: Be16::new(80) };
        let leaves = Tuple { src: host, sport: Be16::new(50_000), ..arrives };
        let original = FlowKey::new(7, arrives, IPPROTO_TCP);
        let half = Flow { to: leaves, reply_zone: ZONE_WORLD as u16, ..Flow::default() };
        let reply = half.peer_key(IPPROTO_TCP);
        let reply_half = Flow { to: arrives.reversed(), reply_zone: 7, ..Flow::default() };
        assert_eq!(reply.tuple.dst, host);
        assert_eq!(reply_half.peer_key(IPPROTO_TCP), original);
    }

    /// Keys as hosts have them, two for each flow of a full table, and how many would find their
    /// set full.
    #[test]
    fn keys_that_follow_each_other_spread_over_the_index() {
        const FLOWS: u32 = 8192;
        type Nth = fn(u32) -> (u32, Tuple<Be32>);
        fn between(sport: u32, dport: u16) -> Tuple<Be32> {
            let [src, dst] = [0xac14_0002, 0x0a00_0003].map(Be32::new);
            Tuple { src, dst, sport: Be16::new(sport as u16), dport: Be16::new(dport) }
        }
        let cases: [(&str, Nth); 4] = [
            ("ports", |n| (7, between(n, 80))),
            ("clients", |n| (0, Tuple { src: Be32::new(0x0b00_0000 + n), ..between(4000, 80) })),
            ("servers", |n| (7, Tuple { dst: Be32::new(n << 16), ..between(4000, 443) })),
            ("networks", |n| (n % 4096, between(n / 4096, 53))),
        ];
        let sets = sets(FLOWS);
        assert_eq!(sets, 4096);
        for (name, nth) in cases {
            for seed in [0, 0x1234_5678_9abc_def0, u64::MAX] {
                let mut taken = std::vec![0_usize; sets as usize];
                let mut tags = std::collections::BTreeSet::new();
                for n in 0..2 * FLOWS {
                    let (zone, tuple) = nth(n);
                    let hash = FlowKey::new(zone, tuple, IPPROTO_TCP).hash(seed);
                    taken[(hash as u32 & (sets - 1)) as usize] += 1;
                    tags.insert(tag(hash));
                    assert_eq!(u64::from(tag(hash)) & 1, hash & 1, "{name}: a tag tells its set");
                }
                let left_out: usize =
                    taken.iter().map(|taken| taken.saturating_sub(SLOTS_PER_SET)).sum();
                assert!(left_out <= 16, "{name}: {left_out} of {} left out", 2 * FLOWS);
                assert_eq!(tags.len(), 128, "{name}: tags");
            }
        }
    }

    #[test]
    fn state_is_what_both_directions_show() {
        use seen::{ACK, ANY, DATA, FIN, RST};
        let tcp = |original, reply| State::new(IPPROTO_TCP, original, reply);
        let (syn, data) = (ANY, ANY | DATA | ACK);
        assert_eq!(tcp(syn, 0), State::HalfOpen);
        assert_eq!(tcp(syn, syn), State::HalfOpen, "both ends open at once");
        assert_eq!(tcp(syn, data), State::HalfOpen);
        assert_eq!(tcp(data, data), State::Established);
        assert_eq!(tcp(data | FIN, data), State::HalfClosed);
        assert_eq!(tcp(data, data | FIN), State::HalfClosed);
        assert_eq!(tcp(data | FIN, data | FIN), State::Closing);
        assert_eq!(tcp(data | FIN, data | RST), State::Reset);
        assert_eq!(tcp(syn | RST, 0), State::Reset);
        assert_eq!(State::new(IPPROTO_UDP, data, 0), State::Unreplied);
        assert_eq!(State::new(IPPROTO_UDP, data, data), State::Replied);
        assert_eq!(State::new(47, data, data), State::Replied);
    }

    #[test]
    fn timeouts_keep_the_rfc_minima() {
        let timeout = |state: State, proto| state.timeout(proto, &Timeouts::RFC);
        for state in [State::Established, State::HalfClosed] {
            assert!(timeout(state, IPPROTO_TCP) >= 7440);
        }
        for state in [State::HalfOpen, State::Closing, State::Reset] {
            assert!(timeout(state, IPPROTO_TCP) >= 240);
        }
        for state in [State::Unreplied, State::Replied] {
            assert!(timeout(state, IPPROTO_UDP) >= 120);
            assert!(timeout(state, IPPROTO_ICMP) >= 60);
            assert!(timeout(state, IPPROTO_ICMPV6) >= 60);
        }
    }

    #[test]
    fn an_end_is_never_behind_what_was_acknowledged() {
        assert!(is_in_window(1000, 1000));
        assert!(is_in_window(1000 + IN_FLIGHT, 1000));
        assert!(!is_in_window(999, 1000));
        assert!(!is_in_window(1001 + IN_FLIGHT, 1000));
        assert!(is_in_window(5, u32::MAX - 5), "numbers wrap");
    }
}
