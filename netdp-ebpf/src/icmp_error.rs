//! ICMP errors: translating them and the packet they quote.
//!
//! An error is an answer to the packet it is about, so the half of the flow that translates
//! answers translates it; the quoted packet went the other way and gets the reverse (RFC 5508,
//! REQ-4 and REQ-5). Its receiver must find what it sent, checksums included.

use netdp_common::{
    addr::Be16,
    checksum::Difference,
    counter::Reason,
    flow::{IPPROTO_TCP, IPPROTO_UDP},
};

use crate::{
    family::Family,
    rewrite::{ICMP_CHECKSUM, ICMP_IDENTIFIER, NOWHERE, Rewrite, Writer},
};

/// Bytes of an error before what it quotes.
const ICMP_HEADER: u32 = 8;

impl<F: Family> Writer<'_, F> {
    /// Rewrites an error and what it quotes.
    #[inline(always)]
    pub(crate) fn rewrite_error(&self) -> Result<(), Reason> {
        let Rewrite { from, to, ip, l4, source, .. } = self.rewrite;
        let checksum = l4 + ICMP_CHECKSUM;
        // The quoted packet is payload to the error.
        self.update(checksum, self.rewrite_quoted()?, 0)?;
        // A router on the way keeps its address; the host that was addressed has another one here.
        let src = if *source == from.src { &to.src } else { source };
        self.set_addresses(
            *ip,
            [source, &from.dst],
            [src, &to.dst],
            (if F::ICMP_HAS_PSEUDO_HEADER { checksum } else { NOWHERE }, 0),
        )
    }

    /// Rewrites what the error quotes; returns what all of it, checksums too, changes by.
    #[inline(always)]
    fn rewrite_quoted(&self) -> Result<Difference, Reason> {
        let Rewrite { from, to, l4, .. } = self.rewrite;
        let ip = l4 + ICMP_HEADER;
        let addresses = self.store_addresses(ip, [&from.dst, &from.src], [&to.dst, &to.src])?;
        let transport = self.rewrite_quoted_transport()?;
        let mut change = addresses.plus(transport);
        if F::HEADER_CHECKSUM.is_some() {
            self.update_header_checksum(ip, addresses)?;
            change = change.plus(addresses.negated());
        }
        if let Some(checksum) = self.quoted_checksum()? {
            let covers_addresses = self.has_ports() || F::ICMP_HAS_PSEUDO_HEADER;
            let covered = if covers_addresses { transport.plus(addresses) } else { transport };
            self.update(checksum, covered, self.udp_flag())?;
            change = change.plus(covered.negated());
        }
        Ok(change)
    }

    /// Sets the quoted ports or identifier; returns what that changes.
    #[inline(always)]
    fn rewrite_quoted_transport(&self) -> Result<Difference, Reason> {
        let Rewrite { from, to, quoted_l4, .. } = self.rewrite;
        if self.has_ports() {
            let (old, new) = (from.reversed().ports(), to.reversed().ports());
            self.store(*quoted_l4, &new)?;
            Ok(Difference::of(old, new))
        } else if self.is(F::ICMP) {
            let (old, new) = (from.identifier(), to.identifier());
            self.store(quoted_l4 + ICMP_IDENTIFIER, &new)?;
            Ok(Difference::of(old.raw.into(), new.raw.into()))
        } else {
            Ok(Difference::NONE)
        }
    }

    /// Offset of the quoted transport checksum; `None` where it is not quoted, or not in use.
    #[inline(always)]
    fn quoted_checksum(&self) -> Result<Option<u32>, Reason> {
        let Some(offset) = self.checksum_offset() else { return Ok(None) };
        let at = self.rewrite.quoted_l4 + offset;
        // Eight bytes of a transport are always quoted; TCP's checksum comes later.
        let is_quoted = !self.is(IPPROTO_TCP) || at + 2 <= self.rewrite.end;
        // RFC 768: 0 means none.
        let is_used = !self.is(IPPROTO_UDP) || self.load(at)? != Be16::default();
        Ok((is_quoted && is_used).then_some(at))
    }
}
