//! SOCKET_ORIGIN: what sockets of the host dialled, where the socket hooks chose another
//! destination. PORT_CLAIMS: what ports they ask for.

use crate::{
    abi::wire,
    addr::{Be16, Be32, Be128},
};

/// The third word of an IPv4 address in its IPv4-mapped form, `::ffff:a.b.c.d` (RFC 4291,
/// 2.5.5.2); the first two are 0.
const MAPPED: u32 = 0xffff_u32.to_be();

wire! {
    /// Address and port as a program of the host names them. An IPv4 address stands in its
    /// IPv4-mapped form, whichever kind of socket it was given to: a program may name it in one
    /// form and be answered in the other.
    pub struct SocketAddress {
        /// The address.
        pub address: Be128,
        /// The port.
        pub port: Be16,
        /// Zero.
        pub pad: u16,
    }
}

wire! {
    /// Key of SOCKET_ORIGIN; the value is the [`SocketAddress`] that was dialled.
    pub struct SocketPeer {
        /// The kernel's name of the socket; it never gives the same one to another.
        pub cookie: u64,
        /// The container that the socket really talks to.
        pub peer: SocketAddress,
        /// IP protocol number.
        pub proto: u8,
        /// Zero.
        pub pad: [u8; 3],
    }
}

/// Places in PORT_CLAIMS: whether a socket of the host may have a port that source NAT chooses.
pub mod claim {
    /// How often a program of the host has asked for one.
    pub const ASKED: u32 = 0;
    /// What [`settled`] makes of the number in [`ASKED`] when no socket had one; 0 = nobody has looked.
    /// As long as they agree, no socket has one.
    pub const SETTLED: u32 = 1;

    /// What stands at [`SETTLED`] if no socket has had a port since one was asked for so often.
    #[inline(always)]
    pub const fn settled(asked: u64) -> u64 {
        asked.wrapping_add(1)
    }
}

impl SocketAddress {
    /// From an IPv4 address.
    #[inline(always)]
    pub const fn from_ipv4(address: Be32, port: Be16) -> Self {
        Self { address: Be128 { raw: [0, 0, MAPPED, address.raw] }, port, pad: 0 }
    }

    /// The IPv4 address, if it is one.
    #[inline(always)]
    pub const fn ipv4(&self) -> Option<Be32> {
        match self.address.raw {
            [0, 0, MAPPED, raw] => Some(Be32 { raw }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn an_ipv4_address_stands_in_its_mapped_form() {
        let address = Ipv4Addr::new(172, 20, 0, 2);
        let wire = SocketAddress::from_ipv4(address.into(), Be16::new(80));
        assert_eq!(wire.ipv4(), Some(address.into()));
        assert_eq!(wire.address, address.to_ipv6_mapped().into());
    }

    #[test]
    fn an_ipv6_address_is_no_ipv4_address() {
        for address in [Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED] {
            let wire = SocketAddress { address: address.into(), ..SocketAddress::default() };
            assert_eq!(wire.ipv4(), None);
        }
    }
}
