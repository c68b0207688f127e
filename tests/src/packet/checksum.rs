//! An oracle that recomputes every checksum of a frame from nothing, and believes no library.

use anyhow::{Context, Result, bail, ensure};
use etherparse::{EtherType, IpNumber, Ipv4Header, Ipv6Header, ip_number};

use super::ETHERNET_BYTES;

/// Recomputes the IPv4 header checksum and that of TCP, UDP or ICMP in an Ethernet frame.
///
/// A packet quoted in an ICMP error must have a right IPv4 header checksum too; its transport is
/// cut off and can't be checked. The transport of a lone fragment can't either. A UDP checksum of
/// zero means "none" over IPv4 (RFC 768) and is forbidden over IPv6 (RFC 8200 8.1).
///
/// # Errors
/// When the frame is not IP over Ethernet, lengths contradict each other, or a sum is wrong.
pub fn verify_checksums(frame: &[u8]) -> Result<()> {
    let kind =
        frame.get(12..ETHERNET_BYTES).context("read the Ethernet header: frame too short")?;
    let packet = &frame[ETHERNET_BYTES..];
    match EtherType(u16::from_be_bytes([kind[0], kind[1]])) {
        EtherType::IPV4 => verify_ipv4(packet),
        EtherType::IPV6 => verify_ipv6(packet),
        other => bail!("verify checksums: EtherType {other:?} is not IP"),
    }
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
    if IpNumber(protocol) == ip_number::ICMP {
        return verify_icmp(body).context("verify ICMP");
    }
    verify_transport(&packet[12..20], protocol, body, true)
}

fn verify_ipv6(packet: &[u8]) -> Result<()> {
    let header = ipv6_header(packet)?;
    let length = usize::from(be16(packet, 4)?);
    let mut body = packet
        .get(header.len()..header.len() + length)
        .context("read the IPv6 packet: shorter than it says")?;
    let mut protocol = header[6];
    loop {
        // RFC 8200 4: the length is in units of 8 bytes, without the first.
        let bytes = match IpNumber(protocol) {
            ip_number::IPV6_HEADER_HOP_BY_HOP
            | ip_number::IPV6_DESTINATION_OPTIONS
            | ip_number::IPV6_ROUTE_HEADER => (usize::from(be16(body, 0)? & 0xff) + 1) * 8,
            ip_number::IPV6_FRAGMENTATION_HEADER if be16(body, 2)? & !0x6 != 0 => return Ok(()),
            ip_number::IPV6_FRAGMENTATION_HEADER => 8,
            _ => break,
        };
        protocol = body[0];
        body = body.get(bytes..).context("read an extension header: cut off")?;
    }
    let addresses = &header[8..];
    if IpNumber(protocol) == ip_number::IPV6_ICMP {
        return verify_icmpv6(addresses, body).context("verify ICMPv6");
    }
    verify_transport(addresses, protocol, body, false)
}

fn verify_transport(addresses: &[u8], protocol: u8, body: &[u8], may_be_zero: bool) -> Result<()> {
    match IpNumber(protocol) {
        ip_number::TCP => verify_pseudo(addresses, protocol, body).context("verify TCP"),
        ip_number::UDP => {
            let length = usize::from(be16(body, 4)?);
            ensure!(length == body.len(), "verify UDP: length {length}, {} bytes", body.len());
            if be16(body, 6)? == 0 {
                ensure!(may_be_zero, "verify UDP: no checksum over IPv6");
                return Ok(());
            }
            verify_pseudo(addresses, protocol, body).context("verify UDP")
        }
        // What their checksums cover is no part of what this project rewrites, nor of IP's
        // pseudo-header: SCTP's is a CRC over itself, GRE has none that would have to be there.
        ip_number::SCTP | ip_number::GRE => Ok(()),
        // The other family's, which means nothing in this one.
        ip_number::ICMP | ip_number::IPV6_ICMP => Ok(()),
        _ => bail!("verify checksums: IP protocol {protocol} is unknown"),
    }
}

/// The IPv6 header's bytes.
fn ipv6_header(packet: &[u8]) -> Result<&[u8]> {
    let header = packet.get(..Ipv6Header::LEN).context("read the IPv6 header: cut off")?;
    ensure!(header[0] >> 4 == 6, "read the IPv6 header: version {}", header[0] >> 4);
    Ok(header)
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

/// Verifies a sum that covers a pseudo header: source, destination, protocol, length. The lengths
/// of its fields differ between families (RFC 9293 3.1, RFC 8200 8.1), their sum does not.
fn verify_pseudo(addresses: &[u8], protocol: u8, segment: &[u8]) -> Result<()> {
    let length = u16::try_from(segment.len()).context("sum a segment")?;
    let pseudo_header = [addresses, &[0, protocol], &length.to_be_bytes()].concat();
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

fn verify_icmpv6(addresses: &[u8], message: &[u8]) -> Result<()> {
    verify_pseudo(addresses, ip_number::IPV6_ICMP.0, message)?;
    // RFC 4443 2.1: errors are the types below 128.
    if message.first().is_some_and(|kind| *kind < 128) {
        ipv6_header(message.get(8..).context("read the quoted packet: cut off")?)
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
