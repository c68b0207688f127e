//! FLOW4: tracked connections, as two halves that find and translate each direction.
//!
//! A half is found by what a packet looks like when it arrives and says what it looks like when it
//! leaves; the key of the other half is the reverse of that. Each half records only what its own
//! direction has shown, so that no packet ever writes to two entries; the state of the connection
//! is what both show together.

use crate::{abi::wire, addr::Tuple4};

/// Default size of FLOW4 in flows; the map has two entries for each.
pub const FLOWS_DEFAULT: u32 = 262_144;

/// Zone of packets that arrive from outside; other zones are network ids.
pub const ZONE_WORLD: u32 = 0;

wire! {
    /// Key of FLOW4.
    pub struct FlowKey4 {
        /// Where the packet arrives: a network id, or [`ZONE_WORLD`].
        pub zone: u32,
        /// Addresses and ports on arrival.
        pub tuple: Tuple4,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: [u8; 3],
    }
}

wire! {
    /// Value of FLOW4: one half of a flow.
    pub struct Flow4 {
        /// Addresses and ports when the packet leaves.
        pub to: Tuple4,
        /// Zone in which the answer to that arrives.
        pub reply_zone: u32,
        /// Generation of the container whose packets this half is for; 0 in [`ZONE_WORLD`].
        pub generation: u32,
        /// Network whose policy and counters the flow belongs to.
        pub network: u32,
        /// Generation of its policy under which the flow was last judged.
        pub policy_generation: u32,
        /// Seconds of CLOCK_BOOTTIME at which this direction last had a packet.
        pub last_seen: u32,
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

/// Bits of [`Flow4::flags`].
pub mod flag {
    /// The half of the direction that opened the flow.
    pub const ORIGINAL: u8 = 1;
    /// The flow entered its network from elsewhere: the policy has a say.
    pub const INBOUND: u8 = 2;
}

/// Values of [`Flow4::stage`]: which hook rewrites the packet. Netfilter's order, for the stack's
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

/// Bits of [`Flow4::seen`].
pub mod seen {
    /// A packet that is not a first SYN.
    pub const DATA: u8 = 1;
    /// TCP FIN.
    pub const FIN: u8 = 2;
    /// TCP RST.
    pub const RST: u8 = 4;
    /// Any packet at all.
    pub const ANY: u8 = 8;
    /// The flow is ending.
    pub const CLOSING: u8 = FIN | RST;
}

impl FlowKey4 {
    /// Key of packets with these addresses that arrive in `zone`.
    #[inline(always)]
    pub const fn new(zone: u32, tuple: Tuple4, proto: u8) -> Self {
        Self { zone, tuple, proto, pad: [0; 3] }
    }
}

impl Flow4 {
    /// Key of the other half.
    #[inline(always)]
    pub const fn peer_key(&self, proto: u8) -> FlowKey4 {
        FlowKey4::new(self.reply_zone, self.to.reversed(), proto)
    }
}

/// What both halves together say about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Packets in one direction only (UDP, ICMP).
    Unreplied,
    /// Packets in both directions (UDP, ICMP).
    Replied,
    /// TCP, the handshake is not complete.
    HalfOpen,
    /// TCP, data may flow.
    Established,
    /// TCP, at least one FIN.
    Closing,
    /// TCP, reset.
    Reset,
}

impl State {
    /// The state of a flow of `proto` whose halves have `original` and `reply` in
    /// [`Flow4::seen`].
    pub const fn new(proto: u8, original: u8, reply: u8) -> Self {
        let both = original | reply;
        match (proto, reply & seen::ANY != 0) {
            (IPPROTO_TCP, _) if both & seen::RST != 0 => Self::Reset,
            (IPPROTO_TCP, _) if both & seen::FIN != 0 => Self::Closing,
            (IPPROTO_TCP, true) if original & seen::DATA != 0 => Self::Established,
            (IPPROTO_TCP, _) => Self::HalfOpen,
            (_, true) => Self::Replied,
            (_, false) => Self::Unreplied,
        }
    }

    /// Name in JSON and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unreplied => "unreplied",
            Self::Replied => "replied",
            Self::HalfOpen => "half-open",
            Self::Established => "established",
            Self::Closing => "closing",
            Self::Reset => "reset",
        }
    }

    /// Seconds without a packet after which the flow is collected.
    ///
    /// RFC 5382 REQ-5 (established ≥ 2 h 4 min, transitory ≥ 4 min), RFC 4787 REQ-5 (UDP ≥ 2 min,
    /// 5 min recommended), RFC 5508 REQ-2 (ICMP query ≥ 60 s). A reset flow is held as transitory
    /// because an off-path attacker may have sent the reset (RFC 7857, 2.2).
    pub const fn timeout(self, proto: u8) -> u32 {
        match (self, proto) {
            (Self::Established, _) => 7440,
            (Self::HalfOpen | Self::Closing | Self::Reset, _) => 240,
            (_, IPPROTO_ICMP) => 60,
            (Self::Replied, _) => 300,
            (Self::Unreplied, _) => 120,
        }
    }
}

/// IP protocol numbers that are tracked.
pub const IPPROTO_ICMP: u8 = 1;
/// TCP.
pub const IPPROTO_TCP: u8 = 6;
/// UDP.
pub const IPPROTO_UDP: u8 = 17;

#[cfg(test)]
mod tests {
    use core::net::Ipv4Addr;

    use super::*;
    use crate::addr::Be16;

    #[test]
    fn halves_find_each_other() {
        let container = Ipv4Addr::new(172, 20, 0, 2).into();
        let host = Ipv4Addr::new(10, 0, 0, 2).into();
        let world = Ipv4Addr::new(10, 0, 0, 3).into();
        let arrives =
            Tuple4 { src: container, dst: world, sport: Be16::new(4000), dport: Be16::new(80) };
        let leaves = Tuple4 { src: host, sport: Be16::new(50_000), ..arrives };
        let original = FlowKey4::new(7, arrives, IPPROTO_TCP);
        let half = Flow4 { to: leaves, reply_zone: ZONE_WORLD, ..Flow4::default() };
        let reply = half.peer_key(IPPROTO_TCP);
        let reply_half = Flow4 { to: arrives.reversed(), reply_zone: 7, ..Flow4::default() };
        assert_eq!(reply.tuple.dst, host);
        assert_eq!(reply_half.peer_key(IPPROTO_TCP), original);
    }

    #[test]
    fn state_is_what_both_directions_show() {
        use seen::{ANY, DATA, FIN, RST};
        let tcp = |original, reply| State::new(IPPROTO_TCP, original, reply);
        assert_eq!(tcp(ANY, 0), State::HalfOpen);
        assert_eq!(tcp(ANY, ANY | DATA), State::HalfOpen);
        assert_eq!(tcp(ANY | DATA, ANY | DATA), State::Established);
        assert_eq!(tcp(ANY | DATA | FIN, ANY | DATA), State::Closing);
        assert_eq!(tcp(ANY | DATA | FIN, ANY | DATA | RST), State::Reset);
        assert_eq!(State::new(IPPROTO_UDP, ANY | DATA, 0), State::Unreplied);
        assert_eq!(State::new(IPPROTO_UDP, ANY | DATA, ANY | DATA), State::Replied);
    }

    #[test]
    fn timeouts_keep_the_rfc_minima() {
        assert!(State::Established.timeout(IPPROTO_TCP) >= 7440);
        for state in [State::HalfOpen, State::Closing, State::Reset] {
            assert!(state.timeout(IPPROTO_TCP) >= 240);
        }
        assert!(State::Unreplied.timeout(IPPROTO_UDP) >= 120);
        assert!(State::Unreplied.timeout(IPPROTO_ICMP) >= 60);
        assert!(State::Replied.timeout(IPPROTO_ICMP) >= 60);
    }
}
