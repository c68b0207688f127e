//! FRAGMENT4: which ports the first fragment of a datagram had.

use crate::{
    abi::wire,
    addr::{Be16, Be32},
};

wire! {
    /// Key of FRAGMENT4: what all fragments of a datagram share (RFC 791, 3.2), as the packet
    /// stands at the hook that looks.
    pub struct FragmentKey4 {
        /// Where the packet arrived, as in [`crate::flow::FlowKey4`]: nobody teaches us about
        /// the datagrams of others.
        pub zone: u32,
        /// Source address.
        pub src: Be32,
        /// Destination address.
        pub dst: Be32,
        /// IP identification.
        pub id: Be16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
    }
}

wire! {
    /// Value of FRAGMENT4: source and destination port, or what [`crate::addr::Tuple4`] holds for
    /// an ICMP query.
    pub struct Ports {
        /// Source port.
        pub sport: Be16,
        /// Destination port.
        pub dport: Be16,
    }
}
