//! Frames built field by field, and an oracle that recomputes every checksum from nothing.
//!
//! IPv4 in Ethernet. The builders let etherparse compute checksums; [`verify_checksums`] does not
//! use it for them, so one can't hide a mistake of the other.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Icmpv4Type, IpFragOffset, IpNumber,
    Ipv4Header, PacketBuilder, PacketBuilderStep, SlicedPacket, TransportSlice,
    icmpv4::DestUnreachableHeader, ip_number,
};

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
    pub source: Ipv4Addr,
    /// Address it goes to.
    pub destination: Ipv4Addr,
    /// Time to live.
    pub ttl: u8,
}

impl Envelope {
    fn open(&self) -> PacketBuilderStep<etherparse::IpHeaders> {
        PacketBuilder::ethernet2(self.source_mac, self.destination_mac).ipv4(
            self.source.octets(),
            self.destination.octets(),
            self.ttl,
        )
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
        let builder = self.open().icmpv4_echo_request(identifier, sequence);
        let mut frame = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut frame, payload).expect("a vector takes every frame below 64 KiB");
        frame
    }

    /// ICMP's "fragmentation needed" with the next hop's MTU, quoting the start of a packet.
    #[must_use]
    pub fn fragmentation_needed(&self, next_hop_mtu: u16, packet: &[u8]) -> Vec<u8> {
        let header = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu };
        // An IP header and 8 bytes, as RFC 792 asks.
        let quoted = &packet[..packet.len().min(28)];
        let builder = self.open().icmpv4(Icmpv4Type::DestinationUnreachable(header));
        let mut frame = Vec::with_capacity(builder.size(quoted.len()));
        builder.write(&mut frame, quoted).expect("a vector takes every frame below 64 KiB");
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
        let mut header = Ipv4Header::new(
            length,
            self.ttl,
            protocol,
            self.source.octets(),
            self.destination.octets(),
        )
        .context("build a fragment")?;
        header.identification = identification;
        header.dont_fragment = false;
        header.more_fragments = more;
        header.fragment_offset = IpFragOffset::try_new(offset / 8).context("build a fragment")?;
        let mut frame = Vec::with_capacity(ETHERNET_BYTES + Ipv4Header::MIN_LEN + payload.len());
        frame.extend_from_slice(&self.destination_mac);
        frame.extend_from_slice(&self.source_mac);
        frame.extend_from_slice(&EtherType::IPV4.0.to_be_bytes());
        header.header_checksum = header.calc_header_checksum();
        frame.extend_from_slice(&header.to_bytes());
        frame.extend_from_slice(payload);
        Ok(frame)
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

/// What a filter of a capture asks of an IPv4 frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Address it comes from.
    pub source: Ipv4Addr,
    /// Address it goes to.
    pub destination: Ipv4Addr,
    /// IP protocol.
    pub protocol: u8,
    /// Whether it is one of several fragments.
    pub is_fragment: bool,
    /// Time to live.
    pub ttl: u8,
    /// Source and destination port, of TCP and UDP.
    pub ports: Option<(u16, u16)>,
}

/// Summarises an Ethernet frame; nothing for anything but IPv4.
#[must_use]
pub fn summarise(frame: &[u8]) -> Option<Summary> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let etherparse::NetSlice::Ipv4(ipv4) = packet.net? else { return None };
    let header = ipv4.header();
    Some(Summary {
        source: header.source_addr(),
        destination: header.destination_addr(),
        protocol: header.protocol().0,
        is_fragment: header.is_fragmenting_payload(),
        ttl: header.ttl(),
        ports: match packet.transport {
            Some(TransportSlice::Tcp(tcp)) => Some((tcp.source_port(), tcp.destination_port())),
            Some(TransportSlice::Udp(udp)) => Some((udp.source_port(), udp.destination_port())),
            _ => None,
        },
    })
}

/// Recomputes the IPv4 header checksum and that of TCP, UDP or ICMP in an Ethernet frame.
///
/// A packet quoted in an ICMP error must have a right IPv4 header checksum too; its transport is
/// cut off and can't be checked. The transport of a lone fragment can't either. A UDP checksum of
/// zero means "none" (RFC 768).
///
/// # Errors
/// When the frame is not IPv4 over Ethernet, lengths contradict each other, or a sum is wrong.
pub fn verify_checksums(frame: &[u8]) -> Result<()> {
    let kind =
        frame.get(12..ETHERNET_BYTES).context("read the Ethernet header: frame too short")?;
    ensure!(
        kind == EtherType::IPV4.0.to_be_bytes(),
        "verify checksums: EtherType {kind:02x?} is not IPv4"
    );
    verify_ipv4(&frame[ETHERNET_BYTES..])
}

fn verify_ipv4(packet: &[u8]) -> Result<()> {
    let body = verify_ipv4_header(packet)?;
    let total = usize::from(be16(packet, 2)?);
    let body = packet.get(body..total).context("read the IPv4 packet: shorter than it says")?;
    let is_fragment = be16(packet, 6)? & 0x3fff != 0;
    if is_fragment {
        return Ok(());
    }
    let protocol = packet[9];
    match IpNumber(protocol) {
        ip_number::TCP => verify_transport(packet, protocol, body).context("verify TCP"),
        ip_number::UDP => {
            let length = usize::from(be16(body, 4)?);
            ensure!(length == body.len(), "verify UDP: length {length}, {} bytes", body.len());
            if be16(body, 6)? == 0 {
                return Ok(());
            }
            verify_transport(packet, protocol, body).context("verify UDP")
        }
        ip_number::ICMP => verify_icmp(body).context("verify ICMP"),
        _ => bail!("verify checksums: IP protocol {protocol} is unknown"),
    }
}

/// Checks the header and returns its length in bytes.
fn verify_ipv4_header(packet: &[u8]) -> Result<usize> {
    let first = *packet.first().context("read the IPv4 header: empty")?;
    ensure!(first >> 4 == 4, "read the IPv4 header: version {}", first >> 4);
    let length = usize::from(first & 0x0f) * 4;
    ensure!(length >= Ipv4Header::MIN_LEN, "read the IPv4 header: length {length}");
    let header = packet.get(..length).context("read the IPv4 header: cut off")?;
    expect_all_ones("IPv4 header", sum(header, 0))?;
    Ok(length)
}

fn verify_transport(packet: &[u8], protocol: u8, segment: &[u8]) -> Result<()> {
    let length = u16::try_from(segment.len()).context("sum a segment")?;
    // RFC 9293 3.1: source, destination, zero, protocol, length.
    let pseudo_header = [&packet[12..20], &[0, protocol][..], &length.to_be_bytes()[..]].concat();
    expect_all_ones("transport", sum(segment, sum(&pseudo_header, 0)))
}

fn verify_icmp(message: &[u8]) -> Result<()> {
    expect_all_ones("ICMP", sum(message, 0))?;
    // RFC 1122 3.2.2: destination unreachable, source quench, redirect, time exceeded,
    // parameter problem quote the packet they are about.
    if matches!(message.first(), Some(3 | 4 | 5 | 11 | 12)) {
        verify_ipv4_header(message.get(8..).context("read the quoted packet: cut off")?)
            .context("verify the quoted packet")?;
    }
    Ok(())
}

fn expect_all_ones(what: &str, sum: u16) -> Result<()> {
    ensure!(sum == u16::MAX, "verify the {what} checksum: off by {:#06x}", !sum);
    Ok(())
}

/// Sum of 16-bit big-endian words in one's complement, on top of `start` (RFC 1071).
fn sum(bytes: &[u8], start: u16) -> u16 {
    let mut total = u64::from(start);
    for word in bytes.chunks(2) {
        total += u64::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
    }
    while total > u64::from(u16::MAX) {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

fn be16(bytes: &[u8], offset: usize) -> Result<u16> {
    let pair = bytes.get(offset..offset + 2).context("read a field: packet cut off")?;
    Ok(u16::from_be_bytes([pair[0], pair[1]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENVELOPE: Envelope = Envelope {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [2, 0, 0, 0, 0, 2],
        source: Ipv4Addr::new(10, 0, 0, 3),
        destination: Ipv4Addr::new(10, 0, 0, 2),
        ttl: 64,
    };

    #[test]
    fn built_frames_have_right_checksums() {
        for frame in [
            ENVELOPE.udp(4000, 80, b"odd"),
            ENVELOPE.tcp_syn(4000, 80, 1),
            ENVELOPE.tcp_data((4000, 80), 1, 1, b"data"),
            ENVELOPE.echo_request(7, 1, b"echo"),
            ENVELOPE.fragment(ip_number::UDP, 9, 8, false, b"rest").unwrap(),
        ] {
            verify_checksums(&frame).unwrap();
        }
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        let frame = ENVELOPE.udp(4000, 80, b"payload");
        for offset in ETHERNET_BYTES..frame.len() {
            let mut changed = frame.clone();
            changed[offset] ^= 0x10;
            assert!(verify_checksums(&changed).is_err(), "byte {offset}");
        }
    }

    #[test]
    fn summary_names_addresses_and_ports() {
        let summary = summarise(&ENVELOPE.udp(4000, 80, b"x")).unwrap();
        assert_eq!((summary.source, summary.destination), (ENVELOPE.source, ENVELOPE.destination));
        assert_eq!(summary.ports, Some((4000, 80)));
        assert!(
            summarise(&arp(
                ArpOperation::REQUEST,
                [2; 6],
                ENVELOPE.source,
                [0; 6],
                ENVELOPE.destination
            ))
            .is_none()
        );
    }
}
