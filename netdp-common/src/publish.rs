//! PUBLISHED4, PUBLISHED6 and PUBLISHED_PORT: which host ports lead to which container.

use crate::{abi::wire, addr::Be16};

wire! {
    /// Key of PUBLISHED4 and PUBLISHED6. In a routed network the container's own address and port stand here.
    pub struct PublishedKey<A> {
        /// Dialled address; 0.0.0.0 or :: = every address of the host of that family.
        pub address: A,
        /// Dialled port.
        pub port: Be16,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: u8,
    }
}

wire! {
    /// Value of PUBLISHED4 and PUBLISHED6.
    pub struct Published<A> {
        /// The container's address.
        pub address: A,
        /// Its port.
        pub port: Be16,
        /// Zero.
        pub pad: u16,
        /// Network id of the container.
        pub network: u32,
    }
}

wire! {
    /// Key of PUBLISHED_PORT: a port that is published on some addresses of the host, but not on
    /// all. Who binds it on all addresses would have it on those, too.
    pub struct PublishedPort {
        /// The port.
        pub port: Be16,
        /// IP protocol number.
        pub proto: u8,
        /// [`AF_INET`] or [`AF_INET6`].
        pub family: u8,
    }
}

/// IPv4's address family (linux/socket.h).
pub const AF_INET: u8 = 2;
/// IPv6's.
pub const AF_INET6: u8 = 10;
