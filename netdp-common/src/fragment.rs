//! FRAGMENT4 and FRAGMENT6: which ports the first fragment of a datagram had.

use crate::{
    abi::wire,
    addr::{Be16, Be32},
};

wire! {
    /// Key of FRAGMENT4 and FRAGMENT6: what all fragments of a datagram share (RFC 791, 3.2;
    /// RFC 8200, 4.5), as the packet stands at the hook that looks.
    pub struct FragmentKey<A> {
        /// Where the packet arrived, as in [`crate::flow::FlowKey`]: nobody teaches us about
        /// the datagrams of others.
        pub zone: u32,
        /// Source address.
        pub src: A,
        /// Destination address.
        pub dst: A,
        /// IP identification; IPv4's 16 bits stand in the first two bytes.
        pub id: Be32,
        /// IPv4: protocol number. IPv6: 0, for only the first fragment tells it.
        pub proto: u8,
        /// Zero.
        pub pad: [u8; 3],
    }
}

wire! {
    /// Value of FRAGMENT4 and FRAGMENT6: source and destination port, or what
    /// [`crate::addr::Tuple`] holds for an ICMP query.
    pub struct Ports {
        /// Source port.
        pub sport: Be16,
        /// Destination port.
        pub dport: Be16,
        /// Protocol that they are of.
        pub proto: u8,
        /// Zero.
        pub pad: [u8; 3],
    }
}
