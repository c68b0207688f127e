//! Frames of IPv6 neighbour discovery (RFC 4861): true ones and lies are built alike.

use std::net::Ipv6Addr;

use etherparse::{PacketBuilder, icmpv6};

/// RFC 4861 7.1: nothing from beyond the link has the highest hop limit.
const HOP_LIMIT: u8 = 255;
/// Options that name the hardware address of who sends and of who is spoken of (RFC 4861 4.6.1).
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// Solicited and override (RFC 4861 4.4).
const ADVERTISEMENT_FLAGS: u8 = 0x60;

/// Hardware and IP address of one end of a frame.
pub type Station = ([u8; 6], Ipv6Addr);

fn frame(from: Station, to: Station, kind: u8, head: [u8; 4], body: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(from.0, to.0)
        .ipv6(from.1.octets(), to.1.octets(), HOP_LIMIT)
        .icmpv6_raw(kind, 0, head);
    let mut frame = Vec::with_capacity(builder.size(body.len()));
    builder.write(&mut frame, body).expect("a vector takes every frame below 64 KiB");
    frame
}

/// An option of 8 bytes: type, length in units of 8 bytes, address.
fn link_address(kind: u8, mac: [u8; 6]) -> Vec<u8> {
    [&[kind, 1], &mac[..]].concat()
}

/// Asks for `target`; who asks claims to have the hardware address `mac`.
#[must_use]
pub fn solicit_neighbour(from: Station, to: Station, target: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    let body = [&target.octets()[..], &link_address(SOURCE_LINK_ADDRESS, mac)].concat();
    frame(from, to, icmpv6::TYPE_NEIGHBOR_SOLICITATION, [0; 4], &body)
}

/// Claims that `target` has the hardware address `mac`.
#[must_use]
pub fn advertise_neighbour(from: Station, to: Station, target: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    let body = [&target.octets()[..], &link_address(TARGET_LINK_ADDRESS, mac)].concat();
    let head = [ADVERTISEMENT_FLAGS, 0, 0, 0];
    frame(from, to, icmpv6::TYPE_NEIGHBOR_ADVERTISEMENT, head, &body)
}

/// Claims to be a router for half an hour.
#[must_use]
pub fn advertise_router(from: Station, to: Station) -> Vec<u8> {
    // Hop limit 64, no flags, lifetime 1800 s; reachable time and retransmission as they are.
    let head = [64, 0, 0x07, 0x08];
    let body = [&[0; 8][..], &link_address(SOURCE_LINK_ADDRESS, from.0)].concat();
    frame(from, to, icmpv6::TYPE_ROUTER_ADVERTISEMENT, head, &body)
}

/// Says that `target` is the better first hop towards `destination`.
#[must_use]
pub fn redirect(from: Station, to: Station, target: Station, destination: Ipv6Addr) -> Vec<u8> {
    let option = link_address(TARGET_LINK_ADDRESS, target.0);
    let body = [&target.1.octets()[..], &destination.octets(), &option].concat();
    frame(from, to, icmpv6::TYPE_REDIRECT_MESSAGE, [0; 4], &body)
}

#[cfg(test)]
mod tests {
    use super::super::verify_checksums;
    use super::*;

    #[test]
    fn built_frames_have_right_checksums() {
        let from = ([2; 6], "fd00:20::2".parse().unwrap());
        let to = ([4; 6], "fd00:20::3".parse().unwrap());
        for frame in [
            solicit_neighbour(from, to, to.1, from.0),
            advertise_neighbour(from, to, from.1, from.0),
            advertise_router(from, to),
            redirect(from, to, from, to.1),
        ] {
            verify_checksums(&frame).unwrap();
        }
    }
}
