//! COUNTERS: every drop, and every new flow, by network and reason.

use crate::abi::wire;

wire! {
    /// Key of COUNTERS.
    pub struct CounterKey {
        /// Network id; 0 where no network could be told.
        pub network: u32,
        /// A [`Reason`].
        pub reason: u32,
    }
}

wire! {
    /// Value of COUNTERS, one per CPU.
    pub struct Counter {
        /// Packets.
        pub packets: u64,
        /// Bytes, from the first header that the hook sees.
        pub bytes: u64,
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Why something was counted. The numbers are part of the ABI: append only.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Reason { $($(#[doc = $doc])+ $variant,)+ }

        impl Reason {
            /// All of them, by number.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// Name in JSON and tables.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// One sentence for the operator.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc,)+).trim_ascii(),)+ }
            }
        }
    };
}

reasons! {
    /// A container's packet with a source address or MAC that is not its own.
    SpoofedSource = "spoofed_source",
    /// A container's ARP packet that claims an address or MAC that is not its own.
    SpoofedArp = "spoofed_arp",
    /// A protocol family that the network does not carry.
    Family = "family",
    /// Headers that contradict themselves or end too early.
    Malformed = "malformed",
    /// A loopback address where none may be.
    Martian = "martian",
    /// A packet from outside with a source address of one of our subnets.
    OutsideSpoof = "outside_spoof",
    /// From one network into another.
    Isolation = "isolation",
    /// From outside to a container's own address.
    DirectAccess = "direct_access",
    /// Between members of a network with icc off.
    Icc = "icc",
    /// A way out of or into an internal network.
    Internal = "internal",
    /// Between the host and an isolated network.
    HostAccess = "host_access",
    /// Denied by the network's policy.
    Policy = "policy",
    /// The route leads to an interface that is no uplink, or one without an address.
    NoUplink = "no_uplink",
    /// A container's source address about to leave without a flow that translates it.
    Unmasqueraded = "unmasqueraded",
    /// No flow allows this packet.
    NoFlow = "no_flow",
    /// A flow whose container has gone.
    StaleFlow = "stale_flow",
    /// The flow table is full: a new flow was refused.
    FlowTableFull = "flow_table_full",
    /// No free source port towards this destination: a new flow was refused.
    PortsExhausted = "ports_exhausted",
    /// A fragment whose first fragment was not seen.
    Fragment = "fragment",
    /// An IP protocol or ICMP type that is not translated.
    Protocol = "protocol",
    /// From one uplink to another on a host that did not forward before netdp.
    NotRouted = "not_routed",
    /// The kernel refused a rewrite.
    Rewrite = "rewrite",
    /// An interface that has a program but no entry yet.
    NotReady = "not_ready",
    /// New flow, container to world (not a drop).
    FlowOut = "flow_out",
    /// New flow, from outside to a published port or an open container (not a drop).
    FlowIn = "flow_in",
    /// New flow, container to published port (not a drop).
    FlowHairpin = "flow_hairpin",
    /// A container's neighbour advertisement or solicitation that claims an address or MAC that is
    /// not its own.
    SpoofedNeighbour = "spoofed_neighbour",
    /// A container that poses as a router (router advertisement, redirect) or DHCP server.
    Impostor = "impostor",
    /// An endpoint with as many flows as its network allows: a new flow was refused.
    EndpointLimit = "endpoint_limit",
    /// A flow that nobody had answered made room in a full table (not a drop).
    Reclaimed = "reclaimed",
    /// New mapping of an endpoint's port, whomever it talks to (not a drop).
    Mapping = "mapping",
}

impl Reason {
    /// From its number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// Whether the packet was dropped.
    pub const fn is_drop(self) -> bool {
        !matches!(
            self,
            Self::FlowOut | Self::FlowIn | Self::FlowHairpin | Self::Reclaimed | Self::Mapping
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_unique_and_round_trip() {
        for (number, &reason) in (0u32..).zip(Reason::ALL) {
            assert_eq!(reason as u32, number);
            assert_eq!(Reason::from_number(number), Some(reason));
            assert_eq!(Reason::ALL.iter().filter(|other| other.name() == reason.name()).count(), 1);
            assert!(reason.explanation().ends_with('.') || reason.explanation().ends_with(')'));
        }
        assert_eq!(Reason::from_number(Reason::ALL.len() as u32), None);
    }
}
