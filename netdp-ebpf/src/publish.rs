//! Published ports: what a dialled address and port lead to.

use netdp_common::{
    addr::Be16,
    flow::{IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP},
    publish::{Published, PublishedKey},
};

use crate::{
    family::Family,
    packet::{Packet, Transport},
};

/// The target of a packet to one of the host's own addresses.
#[inline(always)]
pub(crate) fn target<F: Family>(packet: &Packet<'_, F>) -> Option<Published<F::Address>> {
    if !matches!(packet.transport, Transport::Tcp | Transport::Udp | Transport::Sctp) {
        return None;
    }
    at::<F>(packet.tuple.dst, packet.tuple.dport, packet.proto)
        .or_else(|| at::<F>(F::Address::default(), packet.tuple.dport, packet.proto))
}

/// The target of exactly this address.
#[inline(always)]
pub(crate) fn at<F: Family>(
    address: F::Address,
    port: Be16,
    proto: u8,
) -> Option<Published<F::Address>> {
    F::published(&PublishedKey { address, port, proto, pad: 0 })
}

/// Whether the port of a host address is published, or published on all of them.
#[inline(always)]
pub(crate) fn is_published<F: Family>(address: F::Address, port: Be16, proto: u8) -> bool {
    matches!(proto, IPPROTO_TCP | IPPROTO_UDP | IPPROTO_SCTP)
        && (at::<F>(address, port, proto).is_some()
            || at::<F>(F::Address::default(), port, proto).is_some())
}
