//! Both families of addresses, for tests that are written once.
//!
//! A test names everybody by an IPv4 address. Where it runs for IPv6, each of them has the IPv6
//! address that [`Family::address`] gives: one for one, a /64 for each /24, in the same order, and
//! such that two addresses differ in as many words as they can, so that no word is forgotten when
//! one is rewritten to the other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};

use crate::{
    datagram::{Datagram, Kind, Shape, verify},
    fixture::{Fixture, from_outside_wire, socket},
};

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// The families that the suite runs for.
pub(crate) const FAMILIES: &[Family] = &[Family::V4, Family::V6];

impl Family {
    /// Name in test names.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }

    /// The address that somebody has in this family.
    pub(crate) fn address(self, party: Ipv4Addr) -> IpAddr {
        match self {
            Self::V4 => party.into(),
            Self::V6 => ipv6(party).into(),
        }
    }

    /// Who has the address; `None` for an address of no party.
    pub(crate) fn party(self, address: IpAddr) -> Option<Ipv4Addr> {
        match (self, address) {
            (Self::V4, IpAddr::V4(party)) => Some(party),
            (Self::V6, IpAddr::V6(address)) => {
                let [_, high, third, .., last] = address.segments();
                let named = [
                    Ipv4Addr::UNSPECIFIED,
                    Ipv4Addr::LOCALHOST,
                    Ipv4Addr::BROADCAST,
                    Ipv4Addr::from([224, 0, 0, last as u8]),
                    Ipv4Addr::from(u32::from(high) << 16 | u32::from(third) << 8 | u32::from(last)),
                ];
                named.into_iter().find(|party| ipv6(*party) == address)
            }
            _ => None,
        }
    }
}

/// See [`Family::address`].
pub(crate) fn ipv6(party: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = party.octets().map(u16::from);
    if party.is_unspecified() {
        Ipv6Addr::UNSPECIFIED
    } else if party.is_broadcast() {
        // Nobody has it, but rules about everybody end here.
        Ipv6Addr::from([0xff; 16])
    } else if party.is_loopback() {
        Ipv6Addr::LOCALHOST
    } else if party.is_multicast() {
        // 224.0.0.0/24 stays on the link (RFC 5771, 4), and so does ff02::/16.
        let scope = if [a, b, c] == [224, 0, 0] { 0xff02 } else { 0xff05 };
        Ipv6Addr::new(scope, 0, 0, 0, 0, 0, (b << 8) | c, d)
    } else {
        let subnet = (a << 8) | b;
        let inside = 0x1000 + d;
        Ipv6Addr::new(0xfd00, subnet, c, 0, subnet ^ 0x5a5a, 0x0200 | c, inside, d)
    }
}

/// One to one and in the same order, so that rules about ranges mean the same.
pub(crate) fn parties_have_one_address_in_each_family(_: &mut Fixture) -> Result<()> {
    let parties = [
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [10, 0, 0, 2],
        [10, 0, 0, 9],
        [10, 1, 0, 2],
        [172, 20, 0, 1],
        [172, 20, 0, 255],
        [172, 28, 0, 2],
        [198, 51, 100, 1],
        [223, 255, 255, 255],
        [255, 255, 255, 255],
    ]
    .map(Ipv4Addr::from);
    assert!(parties.is_sorted_by(|a, b| ipv6(*a) < ipv6(*b)), "IPv6 addresses out of order");
    for family in [Family::V4, Family::V6] {
        for party in parties {
            assert_eq!(family.party(family.address(party)), Some(party), "{family:?}");
        }
    }
    Ok(())
}

/// What the tests send and want is right to begin with.
pub(crate) fn datagrams_of_both_families_are_sound(fixture: &mut Fixture) -> Result<()> {
    let wire = from_outside_wire(socket("a1", 5000), socket("b1", 80));
    for kind in [Kind::Syn, Kind::Segment, Kind::Udp, Kind::Request, Kind::Reply, Kind::OtherIcmp] {
        for shape in Shape::ALL {
            let frames = Datagram::new(kind, wire).shaped(shape).frames(fixture.family);
            verify(&frames).with_context(|| format!("{kind:?}, {shape:?}"))?;
            ensure!(frames.len() == if shape.cut { 3 } else { 1 }, "{kind:?}, {shape:?}");
        }
    }
    Ok(())
}
