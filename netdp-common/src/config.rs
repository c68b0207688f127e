//! CONFIG: what the programs need to know once per host.

use crate::abi::wire;

wire! {
    /// The single entry of CONFIG. Port ranges are inclusive, in host byte order.
    pub struct Config {
        /// First port that source NAT may choose; the controller reserves the range.
        pub nat_first: u16,
        /// Last one.
        pub nat_last: u16,
        /// First of the host's ephemeral ports: a container's source port in this range is never
        /// kept, because a socket of the host may have the same one.
        pub ephemeral_first: u16,
        /// Last one.
        pub ephemeral_last: u16,
    }
}
