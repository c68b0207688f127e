//! SCTP packets, whose checksum covers nothing but themselves, and an oracle for it.

use anyhow::{Context, Result, ensure};
use etherparse::ip_number;

use super::{Envelope, payload_of};

/// Bytes of the common header (RFC 9260, 3.1).
const HEADER_BYTES: usize = 12;

impl Envelope {
    /// An SCTP packet with a chunk of this type (RFC 9260, 3.2), without a verification tag, as INIT.
    #[must_use]
    pub fn sctp(&self, ports: (u16, u16), chunk: u8, value: &[u8]) -> Vec<u8> {
        self.sctp_tagged(ports, [0; 4], chunk, value)
    }

    /// The same with the tag that the other end has chosen.
    #[must_use]
    pub fn sctp_tagged(&self, ports: (u16, u16), tag: [u8; 4], chunk: u8, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).expect("a chunk fits into a packet");
        let mut packet = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
        packet.extend(tag);
        // Room for the checksum.
        packet.extend([0; 4]);
        packet.extend([chunk, 0]);
        packet.extend(length.to_be_bytes());
        packet.extend(value);
        packet.resize(packet.len().next_multiple_of(4), 0);
        let checksum = crc32c(&packet).to_le_bytes();
        packet[8..HEADER_BYTES].copy_from_slice(&checksum);
        self.other(ip_number::SCTP, &packet)
    }
}

/// Ports of the SCTP packet in a frame, whose checksum is recomputed.
///
/// # Errors
/// When there is none, or the checksum is wrong.
pub fn verify_sctp(frame: &[u8]) -> Result<(u16, u16)> {
    let mut packet = payload_of(frame, ip_number::SCTP).context("find an SCTP packet")?.to_vec();
    ensure!(packet.len() >= HEADER_BYTES, "read the SCTP header: cut off");
    let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let ports = (port(0), port(2));
    let found = u32::from_le_bytes([packet[8], packet[9], packet[10], packet[11]]);
    packet[8..HEADER_BYTES].fill(0);
    let right = crc32c(&packet);
    ensure!(found == right, "verify the SCTP checksum: {found:#010x}, not {right:#010x}");
    Ok(ports)
}

/// RFC 9260, appendix A, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let step = |crc: u32, _| (crc >> 1) ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
    let add = |crc: u32, byte: &u8| (0..8).fold(crc ^ u32::from(*byte), step);
    !bytes.iter().fold(u32::MAX, add)
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::net::{IPV4, IPV6};

    #[test]
    fn the_checksum_is_the_known_one() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn built_packets_are_right_and_changed_ones_are_not() {
        for net in [&IPV4, &IPV6] {
            let envelope = Envelope {
                source_mac: [2; 6],
                destination_mac: [4; 6],
                source: net.outside,
                destination: net.host,
                ttl: 64,
            };
            let frame = envelope.sctp((5000, 7000), 1, b"sixteen bytes...");
            assert_eq!(verify_sctp(&frame).unwrap(), (5000, 7000));
            let mut changed = frame.clone();
            let last = changed.len() - 1;
            changed[last] ^= 1;
            verify_sctp(&changed).unwrap_err();
        }
    }
}
