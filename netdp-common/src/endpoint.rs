//! ENDPOINT4 and ENDPOINT6: who has a container address.

use crate::abi::wire;

wire! {
    /// Value of ENDPOINT4 and ENDPOINT6; the key is the container's address.
    pub struct Endpoint {
        /// ifindex of the host's end of its veth.
        pub ifindex: u32,
        /// Network id.
        pub network: u32,
        /// Tells it from an earlier container with the same address or ifindex; never 0.
        pub generation: u32,
        /// Its MAC address.
        pub mac: [u8; 6],
        /// Zero.
        pub pad: [u8; 2],
    }
}
