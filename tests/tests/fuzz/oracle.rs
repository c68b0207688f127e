//! What may become of a frame, whatever it is: judged from the bytes that went in and came out.
//!
//! Pure. Parses on its own, knows no flow and no program.

use std::ops::Range;

use anyhow::{Context, Result, ensure};

const ETHERNET_BYTES: usize = 14;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// What is left of the life of a packet whose last hop this is.
const LAST_HOP: u8 = 1;
/// No protocol's number.
const RESERVED: u8 = 255;

/// An IP header and what it says of the rest.
#[derive(Debug)]
struct Ip {
    addresses: Range<usize>,
    /// Of the time to live, or hop limit.
    life: usize,
    /// Of the header's checksum, and the header.
    checksum: Option<(usize, Range<usize>)>,
    /// From the transport header to the end of the packet, or of the frame where that is shorter.
    transport: Range<usize>,
    protocol: u8,
    /// A later fragment.
    is_headless: bool,
}

/// What translation may touch in a packet, and the sums that must not change by it.
#[derive(Debug, Default)]
struct Layout {
    fields: Vec<Range<usize>>,
    /// Where the packet's own time to live stands.
    life: Option<usize>,
    /// Where a checksum stands, and what it covers together.
    sums: Vec<(usize, Vec<Range<usize>>)>,
    /// Checksums that say "none" and must go on to.
    unused: Vec<usize>,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// The protocol, or none that is known if it is the ICMP of the other family: what its checksum
/// would cover here nobody says.
fn own_protocol(protocol: u8, foreign: u8) -> u8 {
    if protocol == foreign { RESERVED } else { protocol }
}

fn parse_ip(frame: &[u8], at: usize) -> Option<Ip> {
    match frame.get(at)? >> 4 {
        4 => {
            let header = usize::from(frame[at] & 0x0f) * 4;
            let end = frame.len().min(at + usize::from(be16(frame, at + 2)?));
            let transport = at + header..end;
            if header < 20 || transport.start > end {
                return None;
            }
            Some(Ip {
                addresses: at + 12..at + 20,
                life: at + 8,
                checksum: Some((at + 10, at..at + header)),
                transport,
                protocol: own_protocol(frame[at + 9], ICMPV6),
                is_headless: be16(frame, at + 6)? & 0x1fff != 0,
            })
        }
        6 => {
            let end = frame.len().min(at + 40 + usize::from(be16(frame, at + 4)?));
            let (mut next, mut start, mut is_headless) = (*frame.get(at + 6)?, at + 40, false);
            // Hop-by-hop, routing and destination options; the fragment header (RFC 8200, 4).
            while matches!(next, 0 | 43 | 60 | 44) && !is_headless {
                let length = match next {
                    44 => 8,
                    _ => 8 * (1 + usize::from(*frame.get(start + 1)?)),
                };
                is_headless = next == 44 && be16(frame, start + 2)? & 0xfff8 != 0;
                next = *frame.get(start)?;
                start += length;
            }
            (start <= end).then_some(Ip {
                addresses: at + 8..at + 40,
                life: at + 7,
                checksum: None,
                transport: start..end,
                protocol: own_protocol(next, ICMP),
                is_headless,
            })
        }
        _ => None,
    }
}

/// Whether a message is an error that quotes a packet.
fn is_error(protocol: u8, kind: u8) -> bool {
    match protocol {
        ICMP => matches!(kind, 3 | 11 | 12),
        ICMPV6 => (1..=4).contains(&kind),
        _ => false,
    }
}

impl Layout {
    /// Of the packet at `at`; `quoted` if an error quotes it, which ends where `frame` does.
    fn add(&mut self, frame: &[u8], at: usize, quoted: bool) -> Option<()> {
        let ip = parse_ip(frame, at)?;
        self.fields.push(ip.addresses.clone());
        if !quoted {
            self.life = Some(ip.life);
        }
        if let Some((checksum, header)) = ip.checksum {
            self.fields.push(checksum..checksum + 2);
            self.sums.push((checksum, vec![header]));
        }
        if ip.is_headless {
            return Some(());
        }
        let start = ip.transport.start;
        let (checksum, ports) = match ip.protocol {
            TCP => (start + 16, start..start + 4),
            UDP => (start + 6, start..start + 4),
            ICMP | ICMPV6 => (start + 2, start + 4..start + 6),
            _ => return Some(()),
        };
        let kind = *frame.get(start)?;
        if is_error(ip.protocol, kind) {
            if !quoted {
                // Behind the packet's own end lies padding.
                self.add(&frame[..ip.transport.end], start + 8, true)?;
            }
        } else {
            self.fields.push(ports);
        }
        if checksum + 2 > ip.transport.end {
            return Some(());
        }
        self.fields.push(checksum..checksum + 2);
        if ip.protocol == UDP && be16(frame, checksum) == Some(0) {
            self.unused.push(checksum);
            return Some(());
        }
        // The pseudo header's protocol and length never change.
        let pseudo = (ip.protocol != ICMP).then_some(ip.addresses);
        self.sums.push((checksum, pseudo.into_iter().chain([ip.transport]).collect()));
        Some(())
    }
}

/// Sum of 16-bit words in one's complement, where 0 and 0xffff are the same (RFC 1071).
fn sum(frame: &[u8], ranges: &[Range<usize>]) -> u64 {
    let words = |range: &Range<usize>| -> u64 {
        let pairs = frame[range.clone()].chunks(2);
        pairs.map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |&b| b.into())).sum()
    };
    ranges.iter().map(words).sum::<u64>() % 0xffff
}

/// Judges what came out of a program that did not drop the packet, which begins at `ip`. Returns
/// whether it was rewritten. A packet that nobody may forward lives for [`LAST_HOP`] more.
///
/// Errors: bytes changed that translation has no business with, or a checksum became right or
/// wrong by it.
pub(crate) fn judge(before: &[u8], after: &[u8], ip: usize) -> Result<bool> {
    ensure!(before.len() == after.len(), "{} bytes became {}", before.len(), after.len());
    if before == after {
        return Ok(false);
    }
    let mut layout = Layout::default();
    if ip == ETHERNET_BYTES {
        layout.fields.push(0..12);
    }
    layout.add(before, ip, false).context("rewritten, and no packet")?;
    let mut changed = (0..before.len()).filter(|&at| before[at] != after[at]);
    if let Some(life) = layout.life.filter(|&at| before[at] != after[at]) {
        ensure!(after[life] == LAST_HOP, "byte {life}, its life, became {}", after[life]);
        let checksum = layout.sums.first().filter(|_| before[ip] >> 4 == 4).map(|&(at, _)| at);
        let is_its_sum = |at| checksum.is_some_and(|sum| (sum..sum + 2).contains(&at));
        let other = changed.find(|&at| at != life && !is_its_sum(at));
        ensure!(other.is_none(), "its life was ended, and byte {other:?} was changed");
    }
    for at in changed {
        ensure!(layout.fields.iter().any(|field| field.contains(&at)), "byte {at} was changed");
    }
    for (at, covered) in &layout.sums {
        let (old, new) = (sum(before, covered), sum(after, covered));
        ensure!(old == new, "the checksum at {at} was off by {old:#x}, and now is by {new:#x}");
    }
    for &at in &layout.unused {
        ensure!(be16(after, at) == Some(0), "the checksum at {at} said none");
    }
    Ok(true)
}

/// Whether the packet at `ip` is an ICMP error, of either family.
pub(crate) fn is_icmp_error(frame: &[u8], ip: usize) -> bool {
    parse_ip(frame, ip).is_some_and(|ip| {
        let kind = frame.get(ip.transport.start);
        !ip.is_headless && kind.is_some_and(|&kind| is_error(ip.protocol, kind))
    })
}

/// What kind of packet it is, coarsely: family, protocol, fragment or not.
pub(crate) fn class(frame: &[u8], ip: usize) -> (u8, u8, bool) {
    let family = frame.get(ip).map_or(0, |first| first >> 4);
    parse_ip(frame, ip).map_or((family, u8::MAX, false), |ip| {
        let known = [ICMP, TCP, UDP, ICMPV6].contains(&ip.protocol);
        (family, if known { ip.protocol } else { 0 }, ip.is_headless)
    })
}

/// The oracle notices what it is for.
pub(crate) fn oracle_notices_every_change() -> Result<()> {
    let frames = crate::seeds::valid();
    let mut judged = 0;
    for frame in &frames {
        let mut layout = Layout::default();
        layout.add(frame, ETHERNET_BYTES, false);
        let is_free = |at: usize| layout.fields.iter().any(|field| field.contains(&at));
        for at in ETHERNET_BYTES..frame.len() {
            // Without a checksum, what changes can't be told from what is translated.
            let is_unsummed = layout.sums.is_empty() || !layout.unused.is_empty();
            if is_unsummed && is_free(at) && !layout.unused.contains(&at) {
                continue;
            }
            let mut changed = frame.clone();
            changed[at] ^= 0x10;
            ensure!(judge(frame, &changed, ETHERNET_BYTES).is_err(), "byte {at} of {frame:02x?}");
            judged += 1;
        }
        ensure!(judge(frame, frame, ETHERNET_BYTES).is_ok_and(|rewritten| !rewritten));
        ensure!(judge(frame, &frame[1..], ETHERNET_BYTES).is_err(), "a byte less");
    }
    ensure!(judged > 1000, "only {judged} changes");
    Ok(())
}
