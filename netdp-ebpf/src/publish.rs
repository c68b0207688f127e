//! Published ports: what a dialled address and port lead to.

use netdp_common::{
    addr::Be16,
    flow::{IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP},
    publish::{Published, PublishedKey},
};

use crate::{
    family::Family,
    kernel, maps,
    packet::{Packet, Transport},
};

/// The target of a packet to one of the host's own addresses.
#[inline(always)]
pub(crate) fn target<F: Family>(packet: &Packet<'_, F>) -> Option<Published<F::Address>> {
    if !matches!(packet.transport, Transport::Tcp | Transport::Udp | Transport::Sctp) {
        return None;
    }
    // Who has a port on all addresses shares it with nobody, and most are published like that.
    let target = at::<F>(F::Address::default(), packet.tuple.dport, packet.proto)
        .or_else(|| at::<F>(packet.tuple.dst, packet.tuple.dport, packet.proto))?;
    // The kernel gives such ports to programs that dial, and asks nobody.
    let is_ephemeral = maps::config().is_some_and(|config| {
        let port = packet.tuple.dport.get();
        port >= config.ephemeral_first && port <= config.ephemeral_last
    });
    if is_ephemeral && kernel::has_connection(packet.skb(), &packet.tuple, packet.proto.into()) {
        return None;
    }
    Some(target)
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
