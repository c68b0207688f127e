//! NETWORK: options of each network.

use crate::{
    abi::wire,
    addr::{Address, Be32, Be128},
};

/// Entries of NETWORK, an array indexed by network id; id 0 stands for "no network".
pub const NETWORKS_MAX: u32 = 4096;

wire! {
    /// Value of NETWORK.
    pub struct Network {
        /// Bits of [`flag`].
        pub flags: u32,
        /// Generation of the policy in force; part of the key of POLICY4 and POLICY6.
        pub policy_generation: u32,
        /// Most flows that one endpoint may have opened; 0 = as many as there are.
        pub endpoint_flows: u32,
        /// ifindex of the bridge.
        pub bridge: u32,
        /// MAC of the bridge.
        pub mac: [u8; 6],
        /// Zero.
        pub pad: [u8; 2],
        /// The IPv4 side; zeros without [`flag::IPV4`].
        pub ipv4: Subnet<Be32>,
        /// The IPv6 side; zeros without [`flag::IPV6`].
        pub ipv6: Subnet<Be128>,
    }
}

wire! {
    /// One family of a network.
    pub struct Subnet<A> {
        /// Network address.
        pub address: A,
        /// Its netmask.
        pub mask: A,
        /// The bridge's address.
        pub gateway: A,
        /// Source address towards the world; 0.0.0.0 or :: = the uplink's own.
        pub snat: A,
    }
}

/// Bits of [`Network::flags`].
pub mod flag {
    /// The entry is in use.
    pub const PRESENT: u32 = 1;
    /// Members may talk to each other.
    pub const ICC: u32 = 2;
    /// What leaves through an uplink gets the uplink's address.
    pub const MASQUERADE: u32 = 4;
    /// No way out or in.
    pub const INTERNAL: u32 = 8;
    /// The host is unreachable, too.
    pub const ISOLATED: u32 = 16;
    /// Direct access from outside: everything.
    pub const UNPROTECTED: u32 = 32;
    /// Direct access from outside: published ports and ping.
    pub const ROUTED: u32 = 64;
    /// New flows into the network are looked up in POLICY4 and POLICY6.
    pub const POLICY: u32 = 128;
    /// The network carries IPv4, and ARP.
    pub const IPV4: u32 = 256;
    /// The network carries IPv6.
    pub const IPV6: u32 = 512;
    /// Masquerade gives an endpoint's port one port outside, whomever it talks to (RFC 4787, REQ-1).
    pub const MAPPING: u32 = 1024;
    /// With [`MAPPING`]: whoever sends to that port reaches the endpoint (RFC 4787, REQ-8).
    pub const FULL_CONE: u32 = 2048;
}

impl Network {
    /// Whether all bits of `flags` are set.
    #[inline(always)]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags == flags
    }
}

impl<A: Address> Subnet<A> {
    /// Whether the address lies in the subnet.
    #[inline(always)]
    pub fn contains(&self, address: A) -> bool {
        address.masked(self.mask) == self.address
    }

    /// Whether it is the subnet's directed broadcast address.
    #[inline(always)]
    pub fn is_broadcast(&self, address: A) -> bool {
        self.address.broadcast(self.mask) == Some(address)
    }
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn subnet_membership() {
        let subnet = Subnet::<Be32> {
            address: Ipv4Addr::new(172, 20, 4, 0).into(),
            mask: Ipv4Addr::new(255, 255, 252, 0).into(),
            ..Subnet::default()
        };
        assert!(subnet.contains(Ipv4Addr::new(172, 20, 7, 255).into()));
        assert!(!subnet.contains(Ipv4Addr::new(172, 20, 8, 0).into()));
        assert!(subnet.is_broadcast(Ipv4Addr::new(172, 20, 7, 255).into()));
        assert!(!subnet.is_broadcast(Ipv4Addr::new(172, 20, 4, 255).into()));
    }

    #[test]
    fn ipv6_has_no_broadcast() {
        let subnet = Subnet::<Be128> {
            address: Ipv6Addr::new(0xfd00, 0x20, 0, 0, 0, 0, 0, 0).into(),
            mask: Ipv6Addr::new(0xffff, 0xffff, 0xffff, 0xffff, 0, 0, 0, 0).into(),
            ..Subnet::default()
        };
        let last = Ipv6Addr::new(0xfd00, 0x20, 0, 0, 0xffff, 0xffff, 0xffff, 0xffff).into();
        assert!(subnet.contains(last));
        assert!(!subnet.is_broadcast(last));
        assert!(!subnet.contains(Ipv6Addr::new(0xfd00, 0x21, 0, 0, 0, 0, 0, 1).into()));
    }
}
