//! Published ports: what a dialled address and port lead to.

use netdp_common::{
    addr::{Be16, Be32},
    flow::{IPPROTO_TCP, IPPROTO_UDP},
    publish::{Published4, PublishedKey4},
};

use crate::{
    maps,
    packet::{Packet, Transport},
};

/// The target of a packet to one of the host's own addresses.
#[inline(always)]
pub(crate) fn target(packet: &Packet) -> Option<Published4> {
    if !matches!(packet.transport, Transport::Tcp | Transport::Udp) {
        return None;
    }
    at(packet.tuple.dst, packet.tuple.dport, packet.proto)
        .or_else(|| at(Be32::default(), packet.tuple.dport, packet.proto))
}

/// The target of exactly this address.
#[inline(always)]
pub(crate) fn at(address: Be32, port: Be16, proto: u8) -> Option<Published4> {
    maps::published(&PublishedKey4 { address, port, proto, pad: 0 })
}

/// Whether the port of a host address is published, or published on all of them.
#[inline(always)]
pub(crate) fn is_published(address: Be32, port: Be16, proto: u8) -> bool {
    matches!(proto, IPPROTO_TCP | IPPROTO_UDP)
        && (at(address, port, proto).is_some() || at(Be32::default(), port, proto).is_some())
}
