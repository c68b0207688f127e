//! Frames built field by field, and an oracle that recomputes every checksum from nothing.
//!
//! IP in Ethernet. The builders let etherparse compute checksums; [`verify_checksums`] does not
//! use it for them, so one can't hide a mistake of the other.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Icmpv4Type, Icmpv6Type, IpFragOffset,
    IpHeaders, IpNumber, Ipv4Header, Ipv6Header, NetSlice, PacketBuilder, PacketBuilderStep,
    SlicedPacket, TransportSlice, icmpv4, icmpv6, ip_number,
};

mod checksum;
mod neighbour;
mod sctp;

pub use checksum::verify_checksums;
pub use neighbour::{Station, advertise_neighbour, advertise_router, redirect, solicit_neighbour};
pub use sctp::verify_sctp;

/// Ethernet header length in bytes.
pub const ETHERNET_BYTES: usize = 14;
/// The hardware address that every station listens to.
pub const BROADCAST: [u8; 6] = [0xff; 6];

/// The two lower layers of a frame to be built.
#[derive(Clone, Copy, Debug)]
pub struct Envelope {
    /// Hardware address it comes from.
    pub source_mac: [u8; 6],
    /// Hardware address it goes to.
    pub destination_mac: [u8; 6],
    /// Address it comes from.
    pub source: IpAddr,
    /// Address it goes to, of the same family.
    pub destination: IpAddr,
    /// Time to live, or hop limit.
    pub ttl: u8,
}

impl Envelope {
    fn open(&self) -> PacketBuilderStep<IpHeaders> {
        let ethernet = PacketBuilder::ethernet2(self.source_mac, self.destination_mac);
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                ethernet.ipv4(source.octets(), destination.octets(), self.ttl)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                ethernet.ipv6(source.octets(), destination.octets(), self.ttl)
            }
            (source, destination) => panic!("frame from {source} to {destination} in a test"),
        }
    }

    /// The frame around an IP packet, with the EtherType of the packet's family.
    #[must_use]
    pub fn wrap(&self, packet: &[u8]) -> Vec<u8> {
        let kind = if self.source.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
        [&self.destination_mac[..], &self.source_mac, &kind.0.to_be_bytes(), packet].concat()
    }

    /// A packet of any other protocol.
    #[must_use]
    pub fn other(&self, protocol: IpNumber, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        let written = self.open().write(&mut frame, protocol, payload);
        written.expect("a vector takes every frame below 64 KiB");
        frame
    }

    /// A UDP datagram.
    #[must_use]
    pub fn udp(&self, source_port: u16, destination_port: u16, payload: &[u8]) -> Vec<u8> {
        let builder = self.open().udp(source_port, destination_port);
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut frame, payload).expect("a vector takes every frame below 64 KiB");
        frame
    }

    /// A TCP segment that asks for a connection.
    #[must_use]
    pub fn tcp_syn(&self, source_port: u16, destination_port: u16, sequence: u32) -> Vec<u8> {
        let builder = self.open().tcp(source_port, destination_port, sequence, 64_240).syn();
        let mut frame = Vec::with_capacity(builder.size(0));
        builder.write(&mut frame, &[]).expect("a vector takes every frame below 64 KiB");
        frame
    }

    /// A TCP segment with data in an open connection.
    #[must_use]
    pub fn tcp_data(
        &self,
        ports: (u16, u16),
        sequence: u32,
        acknowledged: u32,
        payload: &[u8],
    ) -> Vec<u8> {
        let builder = self.open().tcp(ports.0, ports.1, sequence, 64_240).ack(acknowledged).psh();
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut frame, payload).expect("a vector takes every frame below 64 KiB");
        frame
    }

    /// An ICMP echo request.
    #[must_use]
    pub fn echo_request(&self, identifier: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        let written = if self.source.is_ipv4() {
            self.open().icmpv4_echo_request(identifier, sequence).write(&mut frame, payload)
        } else {
            self.open().icmpv6_echo_request(identifier, sequence).write(&mut frame, payload)
        };
        written.expect("a vector takes every frame below 64 KiB");
        frame
    }

    /// "Fragmentation needed" or "packet too big" with the next hop's MTU, quoting the start of a
    /// packet.
    #[must_use]
    pub fn too_big(&self, next_hop_mtu: u16, packet: &[u8]) -> Vec<u8> {
        if self.source.is_ipv4() {
            let header = icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu };
            self.error(Icmpv4Type::DestinationUnreachable(header), packet)
        } else {
            self.errorv6(Icmpv6Type::PacketTooBig { mtu: next_hop_mtu.into() }, packet)
        }
    }

    /// "Port unreachable", quoting the start of a packet.
    #[must_use]
    pub fn port_unreachable(&self, packet: &[u8]) -> Vec<u8> {
        if self.source.is_ipv4() {
            let header = icmpv4::DestUnreachableHeader::Port;
            self.error(Icmpv4Type::DestinationUnreachable(header), packet)
        } else {
            self.errorv6(
                Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port),
                packet,
            )
        }
    }

    /// "Time exceeded in transit", quoting the start of a packet.
    #[must_use]
    pub fn time_exceeded(&self, packet: &[u8]) -> Vec<u8> {
        if self.source.is_ipv4() {
            let code = icmpv4::TimeExceededCode::TtlExceededInTransit;
            self.error(Icmpv4Type::TimeExceeded(code), packet)
        } else {
            let code = icmpv6::TimeExceededCode::HopLimitExceeded;
            self.errorv6(Icmpv6Type::TimeExceeded(code), packet)
        }
    }

    fn error(&self, kind: Icmpv4Type, packet: &[u8]) -> Vec<u8> {
        // An IP header and 8 bytes, as RFC 792 asks.
        let quoted = &packet[..packet.len().min(28)];
        let mut frame = Vec::new();
        let written = self.open().icmpv4(kind).write(&mut frame, quoted);
        written.expect("a vector takes every frame below 64 KiB");
        frame
    }

    fn errorv6(&self, kind: Icmpv6Type, packet: &[u8]) -> Vec<u8> {
        // As much as the minimum MTU leaves room for (RFC 4443 3.1).
        let quoted = &packet[..packet.len().min(1232)];
        let mut frame = Vec::new();
        let written = self.open().icmpv6(kind).write(&mut frame, quoted);
        written.expect("a vector takes every frame below 64 KiB");
        frame
    }

    /// One fragment with `payload` at `offset` bytes, a multiple of 8.
    ///
    /// # Errors
    /// When the offset or the length has no place in the header.
    pub fn fragment(
        &self,
        protocol: IpNumber,
        identification: u16,
        offset: u16,
        more: bool,
        payload: &[u8],
    ) -> Result<Vec<u8>> {
        let length = u16::try_from(payload.len()).context("build a fragment")?;
        let header = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (source, destination) = (source.octets(), destination.octets());
                let mut header = Ipv4Header::new(length, self.ttl, protocol, source, destination)
                    .context("build a fragment")?;
                header.identification = identification;
                header.dont_fragment = false;
                header.more_fragments = more;
                header.fragment_offset =
                    IpFragOffset::try_new(offset / 8).context("build a fragment")?;
                header.header_checksum = header.calc_header_checksum();
                header.to_bytes().to_vec()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                // RFC 8200 4.5: the offset is in the upper 13 bits, "more" in the lowest.
                let place = (offset & !0x7) | u16::from(more);
                let [high, low] = place.to_be_bytes();
                let [id_high, id_low] = identification.to_be_bytes();
                let fragment = [protocol.0, 0, high, low, 0, 0, id_high, id_low];
                let header = Ipv6Header {
                    payload_length: length + 8,
                    next_header: ip_number::IPV6_FRAGMENTATION_HEADER,
                    hop_limit: self.ttl,
                    source: source.octets(),
                    destination: destination.octets(),
                    ..Ipv6Header::default()
                };
                [&header.to_bytes()[..], &fragment].concat()
            }
            (source, destination) => panic!("frame from {source} to {destination} in a test"),
        };
        Ok(self.wrap(&[&header[..], payload].concat()))
    }
}

/// An ARP packet: a request for `target`, or the unasked claim that `sender` has `sender_mac`.
#[must_use]
pub fn arp(
    operation: ArpOperation,
    sender_mac: [u8; 6],
    sender: Ipv4Addr,
    target_mac: [u8; 6],
    target: Ipv4Addr,
) -> Vec<u8> {
    let packet = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        operation,
        &sender_mac,
        &sender.octets(),
        &target_mac,
        &target.octets(),
    )
    .expect("the lengths of Ethernet and IPv4 addresses are in range");
    let destination = if operation == ArpOperation::REQUEST { BROADCAST } else { target_mac };
    let builder = PacketBuilder::ethernet2(sender_mac, destination).arp(packet);
    let mut frame = Vec::with_capacity(builder.size());
    builder.write(&mut frame).expect("a vector takes every frame");
    frame
}

/// What a filter of a capture asks of an IP frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Address it comes from.
    pub source: IpAddr,
    /// Address it goes to.
    pub destination: IpAddr,
    /// IP protocol, behind extension headers.
    pub protocol: u8,
    /// Whether it is one of several fragments.
    pub is_fragment: bool,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Source and destination port, of TCP and UDP.
    pub ports: Option<(u16, u16)>,
    /// Type and code, of either ICMP.
    pub icmp: Option<(u8, u8)>,
}

/// What an Ethernet frame carries of an IP protocol, in one piece.
#[must_use]
pub fn payload_of(frame: &[u8], protocol: IpNumber) -> Option<&[u8]> {
    let payload = match SlicedPacket::from_ethernet(frame).ok()?.net? {
        NetSlice::Ipv4(ip) => ip.payload().clone(),
        NetSlice::Ipv6(ip) => ip.payload().clone(),
        NetSlice::Arp(_) => return None,
    };
    (payload.ip_number == protocol && !payload.fragmented).then_some(payload.payload)
}

/// Summarises an Ethernet frame; nothing for anything but IP.
#[must_use]
pub fn summarise(frame: &[u8]) -> Option<Summary> {
    summary(&SlicedPacket::from_ethernet(frame).ok()?)
}

/// Summarises an IP packet of a link without Ethernet header.
#[must_use]
pub fn summarise_packet(packet: &[u8]) -> Option<Summary> {
    summary(&SlicedPacket::from_ip(packet).ok()?)
}

fn summary(packet: &SlicedPacket) -> Option<Summary> {
    let (ends, protocol, is_fragment, ttl): ((IpAddr, IpAddr), _, _, _) =
        match packet.net.as_ref()? {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                let ends = (header.source_addr().into(), header.destination_addr().into());
                (ends, header.protocol(), header.is_fragmenting_payload(), header.ttl())
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                let ends = (header.source_addr().into(), header.destination_addr().into());
                let is_fragment = header.next_header() == ip_number::IPV6_FRAGMENTATION_HEADER
                    && is_fragment_header(ip.extensions().slice());
                (ends, ip.payload().ip_number, is_fragment, header.hop_limit())
            }
            NetSlice::Arp(_) => return None,
        };
    let (ports, icmp) = match packet.transport.as_ref().filter(|_| !is_fragment) {
        Some(TransportSlice::Tcp(tcp)) => (Some((tcp.source_port(), tcp.destination_port())), None),
        Some(TransportSlice::Udp(udp)) => (Some((udp.source_port(), udp.destination_port())), None),
        Some(TransportSlice::Icmpv4(icmp)) => (None, Some((icmp.type_u8(), icmp.code_u8()))),
        Some(TransportSlice::Icmpv6(icmp)) => (None, Some((icmp.type_u8(), icmp.code_u8()))),
        None => (None, None),
    };
    Some(Summary {
        source: ends.0,
        destination: ends.1,
        protocol: protocol.0,
        is_fragment,
        ttl,
        ports,
        icmp,
    })
}

/// Whether a fragment header has an offset or says that more comes (etherparse 0.19 reads "more"
/// from another bit than RFC 8200 4.5 gives it).
fn is_fragment_header(header: &[u8]) -> bool {
    header.get(2..4).is_some_and(|field| field[0] != 0 || field[1] & !0x6 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::net::{IPV4, IPV6, Net};

    /// From E to H.
    fn envelope(net: &Net) -> Envelope {
        Envelope {
            source_mac: [2, 0, 0, 0, 0, 1],
            destination_mac: [2, 0, 0, 0, 0, 2],
            source: net.outside,
            destination: net.host,
            ttl: 64,
        }
    }

    fn frames(net: &Net) -> Vec<Vec<u8>> {
        let envelope = envelope(net);
        let quoted = envelope.udp(4000, 80, b"quoted")[ETHERNET_BYTES..].to_vec();
        vec![
            envelope.udp(4000, 80, b"odd"),
            envelope.tcp_syn(4000, 80, 1),
            envelope.tcp_data((4000, 80), 1, 1, b"data"),
            envelope.echo_request(7, 1, b"echo"),
            envelope.too_big(1280, &quoted),
            envelope.port_unreachable(&quoted),
            envelope.time_exceeded(&quoted),
            envelope.fragment(ip_number::UDP, 9, 8, false, b"rest").unwrap(),
        ]
    }

    #[test]
    fn built_frames_have_right_checksums() {
        for frame in [frames(&IPV4), frames(&IPV6)].concat() {
            verify_checksums(&frame).unwrap();
        }
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        let ipv4 = envelope(&IPV4).udp(4000, 80, b"payload");
        for offset in ETHERNET_BYTES..ipv4.len() {
            let mut changed = ipv4.clone();
            changed[offset] ^= 0x10;
            assert!(verify_checksums(&changed).is_err(), "byte {offset}");
        }
        // No sum covers traffic class, flow label and hop limit of IPv6, and what the next header
        // would be has none.
        let ipv6 = envelope(&IPV6).udp(4000, 80, b"payload");
        for offset in ETHERNET_BYTES..ipv6.len() {
            let mut changed = ipv6.clone();
            changed[offset] ^= 0x10;
            let covered = !matches!(offset - ETHERNET_BYTES, 1..=3 | 6 | 7);
            assert_eq!(verify_checksums(&changed).is_err(), covered, "byte {offset}");
        }
    }

    #[test]
    fn summary_names_addresses_and_ports() {
        for net in [&IPV4, &IPV6] {
            let envelope = envelope(net);
            let summary = summarise(&envelope.udp(4000, 80, b"x")).unwrap();
            let ends = (envelope.source, envelope.destination);
            assert_eq!((summary.source, summary.destination), ends);
            assert_eq!(summary.ports, Some((4000, 80)));
            let frame = envelope.too_big(1280, &frames(net)[0][ETHERNET_BYTES..]);
            let error = summarise(&frame).unwrap();
            assert_eq!((error.protocol, error.icmp), (net.icmp, Some(net.too_big)));
            assert_eq!(summarise_packet(&frame[ETHERNET_BYTES..]), Some(error));
            let rest = envelope.fragment(ip_number::UDP, 9, 8, false, b"rest").unwrap();
            assert!(summarise(&rest).unwrap().is_fragment);
            let first = envelope.fragment(ip_number::UDP, 9, 0, true, &[0; 16]).unwrap();
            assert!(summarise(&first).unwrap().is_fragment);
            assert!(!summarise(&frames(net)[0]).unwrap().is_fragment);
        }
        let (sender, target) = (Ipv4Addr::new(10, 0, 0, 3), Ipv4Addr::new(10, 0, 0, 2));
        assert!(summarise(&arp(ArpOperation::REQUEST, [2; 6], sender, [0; 6], target)).is_none());
    }
}
