//! NETWORK: options of each network.

use crate::{abi::wire, addr::Be32};

/// Entries of NETWORK, an array indexed by network id; id 0 stands for "no network".
pub const NETWORKS_MAX: u32 = 4096;

wire! {
    /// Value of NETWORK.
    pub struct Network {
        /// Bits of [`flag`].
        pub flags: u32,
        /// Generation of the policy in force; part of the key of POLICY4.
        pub policy_generation: u32,
        /// Network address of the subnet.
        pub subnet: Be32,
        /// Its netmask.
        pub mask: Be32,
        /// The bridge's address.
        pub gateway: Be32,
        /// Source address towards the world; 0.0.0.0 = the uplink's own.
        pub snat: Be32,
        /// ifindex of the bridge.
        pub bridge: u32,
        /// MAC of the bridge.
        pub mac: [u8; 6],
        /// Zero.
        pub pad: [u8; 2],
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
    /// New flows into the network are looked up in POLICY4.
    pub const POLICY: u32 = 128;
}

impl Network {
    /// Whether all bits of `flags` are set.
    #[inline(always)]
    pub const fn has(&self, flags: u32) -> bool {
        self.flags & flags == flags
    }

    /// Whether the address lies in the subnet.
    #[inline(always)]
    pub const fn contains(&self, address: Be32) -> bool {
        address.raw & self.mask.raw == self.subnet.raw
    }

    /// Whether it is the subnet's directed broadcast address.
    #[inline(always)]
    pub const fn is_broadcast(&self, address: Be32) -> bool {
        address.raw == self.subnet.raw | !self.mask.raw
    }
}

#[cfg(test)]
mod tests {
    use core::net::Ipv4Addr;

    use super::*;

    #[test]
    fn subnet_membership() {
        let network = Network {
            subnet: Ipv4Addr::new(172, 20, 4, 0).into(),
            mask: Ipv4Addr::new(255, 255, 252, 0).into(),
            ..Network::default()
        };
        assert!(network.contains(Ipv4Addr::new(172, 20, 7, 255).into()));
        assert!(!network.contains(Ipv4Addr::new(172, 20, 8, 0).into()));
        assert!(network.is_broadcast(Ipv4Addr::new(172, 20, 7, 255).into()));
        assert!(!network.is_broadcast(Ipv4Addr::new(172, 20, 4, 255).into()));
    }
}
