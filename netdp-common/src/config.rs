//! CONFIG: what the programs need to know once per host.

use crate::abi::wire;

wire! {
    /// The single entry of CONFIG. Port ranges are inclusive, in host byte order.
    pub struct Config {
        /// Cookie of the host's network namespace (`SO_NETNS_COOKIE`): sockets of other namespaces
        /// are not our business. 0 = not known, no socket is ours.
        pub netns_cookie: u64,
        /// First port that source NAT may choose; the controller reserves the range, so that a socket has
        /// one of it only if it was there before or its program asked for it.
        pub nat_first: u16,
        /// Last one.
        pub nat_last: u16,
        /// First of the host's ephemeral ports: a container's source port in this range is never
        /// kept, because a socket of the host may have the same one.
        pub ephemeral_first: u16,
        /// Last one.
        pub ephemeral_last: u16,
        /// Whether some network maps independently of endpoints: 0 or 1. Where none does, nobody
        /// has to look for mappings.
        pub has_mappings: u16,
        /// Whether a port that source NAT may choose is published: 0 or 1. Where none is, nobody has
        /// to look before one is taken.
        pub is_nat_published: u16,
        /// Whether packets of flows go past the host's stack where they can: 0 or 1.
        pub fast_path: u32,
    }
}

wire! {
    /// Seconds without a packet after which a flow is collected.
    pub struct Timeouts {
        /// TCP, data may flow.
        pub tcp_established: u32,
        /// TCP, while it opens and after it has ended.
        pub tcp_transitory: u32,
        /// UDP, packets in both directions.
        pub udp_replied: u32,
        /// UDP, packets in one direction only.
        pub udp_unreplied: u32,
        /// ICMP echo.
        pub icmp: u32,
        /// Other protocols, which are translated by address.
        pub other: u32,
    }
}

impl Config {
    /// Whether source NAT may choose the port, in host byte order.
    #[inline(always)]
    pub const fn is_nat_port(&self, port: u16) -> bool {
        port >= self.nat_first && port <= self.nat_last
    }
}

impl Timeouts {
    /// What the RFCs ask for: RFC 5382 REQ-5 (established at least 2 h 4 min, transitory 4 min),
    /// RFC 4787 REQ-5 (UDP at least 2 min, 5 min recommended), RFC 5508 REQ-2 (ICMP query 60 s).
    /// None speaks of other protocols.
    pub const RFC: Self = Self {
        tcp_established: 7440,
        tcp_transitory: 240,
        udp_replied: 300,
        udp_unreplied: 120,
        icmp: 60,
        other: 600,
    };
}
