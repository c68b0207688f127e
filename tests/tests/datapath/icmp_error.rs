//! ICMP errors about packets, as routers and hosts send them.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{
    Icmpv4Type, Icmpv6Type, PacketBuilder, icmpv4,
    icmpv4::DestUnreachableHeader,
    icmpv6::{DestUnreachableCode, TimeExceededCode},
};
use netdp_tests::packet::ETHERNET_BYTES;

use crate::{
    datagram::{Datagram, Kind, Wire, octets},
    family::Family,
};

/// What is wrong with a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    TimeExceeded,
    PortUnreachable,
    /// The next hop's MTU.
    TooBig(u16),
}

/// An error and where it goes.
#[derive(Clone, Debug)]
pub(crate) struct Error {
    /// Hardware addresses it comes from and goes to.
    pub(crate) macs: ([u8; 6], [u8; 6]),
    /// Who complains.
    pub(crate) source: Ipv4Addr,
    /// Who sent the packet.
    pub(crate) destination: Ipv4Addr,
    /// What is wrong with it.
    pub(crate) fault: Fault,
    /// As much of it is quoted.
    pub(crate) quoted_bytes: usize,
}

impl Error {
    /// The frame, quoting a packet of this kind between these.
    pub(crate) fn about(&self, family: Family, kind: Kind, wire: Wire) -> Vec<u8> {
        self.quoting(family, &Datagram::new(kind, wire).frame(family)[ETHERNET_BYTES..])
    }

    /// The frame, quoting this packet.
    pub(crate) fn quoting(&self, family: Family, packet: &[u8]) -> Vec<u8> {
        let quoted = &packet[..self.quoted_bytes.min(packet.len())];
        let ethernet = PacketBuilder::ethernet2(self.macs.0, self.macs.1);
        let mut frame = Vec::new();
        match (family.address(self.source), family.address(self.destination)) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => ethernet
                .ipv4(source.octets(), destination.octets(), 60)
                .icmpv4(self.fault.icmpv4())
                .write(&mut frame, quoted),
            (source, destination) => ethernet
                .ipv6(octets(source), octets(destination), 60)
                .icmpv6(self.fault.icmpv6())
                .write(&mut frame, quoted),
        }
        .expect("a small packet is written to memory");
        frame
    }
}

impl Fault {
    fn icmpv4(self) -> Icmpv4Type {
        match self {
            Self::TimeExceeded => {
                Icmpv4Type::TimeExceeded(icmpv4::TimeExceededCode::TtlExceededInTransit)
            }
            Self::PortUnreachable => {
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port)
            }
            Self::TooBig(next_hop_mtu) => {
                Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                    next_hop_mtu,
                })
            }
        }
    }

    fn icmpv6(self) -> Icmpv6Type {
        match self {
            Self::TimeExceeded => Icmpv6Type::TimeExceeded(TimeExceededCode::HopLimitExceeded),
            Self::PortUnreachable => Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Port),
            Self::TooBig(mtu) => Icmpv6Type::PacketTooBig { mtu: mtu.into() },
        }
    }
}
