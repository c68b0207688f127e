//! INTERFACE and INTERFACE_SLOT: what each host interface is to us.

use crate::{
    abi::wire,
    addr::{Be32, Be128},
};

wire! {
    /// Value of INTERFACE; the key is the ifindex (`u32`).
    pub struct Interface {
        /// One of [`role`].
        pub role: u8,
        /// Bits of [`flag`].
        pub flags: u8,
        /// The container's MAC (endpoint) or the bridge's (network).
        pub mac: [u8; 6],
        /// Network id; 0 for uplinks.
        pub network: u32,
        /// Endpoint: its generation ([`crate::endpoint::Endpoint`]); otherwise 0.
        pub generation: u32,
        /// MTU of the interface, in bytes without the Ethernet header.
        pub mtu: u32,
        /// Endpoint: the container's address. Network: the gateway. Uplink: the source address of
        /// masquerade. 0.0.0.0 where there is none.
        pub ipv4: Be32,
        /// The same for IPv6.
        pub ipv6: Be128,
    }
}

/// Entries of INTERFACE_SLOT.
pub const SLOTS: u32 = 4096;

wire! {
    /// Value of INTERFACE_SLOT, an array in which an entry of INTERFACE stands once more, at
    /// [`slot`] of its ifindex: where it is found without a hash. Of several interfaces with the same
    /// slot one has it.
    pub struct Slot {
        /// The interface; 0 = none.
        pub ifindex: u32,
        /// Its entry.
        pub interface: Interface,
    }
}

/// Where an interface may stand in INTERFACE_SLOT.
#[inline(always)]
pub const fn slot(ifindex: u32) -> u32 {
    ifindex % SLOTS
}

/// Values of [`Interface::role`].
pub mod role {
    /// The host's end of a container's veth.
    pub const ENDPOINT: u8 = 1;
    /// The bridge of a network.
    pub const NETWORK: u8 = 2;
    /// A door to the outside.
    pub const UPLINK: u8 = 3;
}

/// Bits of [`Interface::flags`].
pub mod flag {
    /// Frames begin with an Ethernet header.
    pub const ETHERNET: u8 = 1;
    /// Uplink: the host forwarded IPv4 that came in here before netdp did.
    pub const FORWARDED_IPV4: u8 = 2;
    /// The same for IPv6.
    pub const FORWARDED_IPV6: u8 = 4;
}
