//! PUBLISHED4: which host ports lead to which container.

use crate::{
    abi::wire,
    addr::{Be16, Be32},
};

wire! {
    /// Key of PUBLISHED4. In a routed network the container's own address and port stand here.
    pub struct PublishedKey4 {
        /// Dialled address; 0.0.0.0 = every address of the host.
        pub address: Be32,
        /// Dialled port.
        pub port: Be16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
    }
}

wire! {
    /// Value of PUBLISHED4.
    pub struct Published4 {
        /// The container's address.
        pub address: Be32,
        /// Its port.
        pub port: Be16,
        /// Zero.
        pub pad: u16,
        /// Network id of the container.
        pub network: u32,
    }
}
