//! ICMP errors: translating them and the packet they quote.
//!
//! An error is an answer to the packet it is about, so the half of the flow that translates
//! answers translates it; the quoted packet went the other way and gets the reverse (RFC 5508,
//! REQ-4 and REQ-5). Its receiver must find what it sent, checksums included.

use netdp_common::{
    addr::{Be16, Be32},
    counter::Reason,
    flow::{IPPROTO_TCP, IPPROTO_UDP},
};

use crate::rewrite::{
    ICMP_CHECKSUM, ICMP_IDENTIFIER, IPV4_CHECKSUM, IPV4_DESTINATION, IPV4_SOURCE, Rewrite,
    TCP_CHECKSUM, Writer,
};

impl Writer<'_> {
    /// Rewrites an error and what it quotes.
    #[inline(always)]
    pub(crate) fn rewrite_error(&self) -> Result<(), Reason> {
        let Rewrite { from, to, is_sent_by_router, .. } = *self.rewrite;
        self.rewrite_quoted()?;
        // A router on the way keeps its address; the host that was addressed has another one here.
        if is_sent_by_router == 0 {
            self.set_error_address(from.src, to.src, IPV4_SOURCE)?;
        }
        self.set_error_address(from.dst, to.dst, IPV4_DESTINATION)
    }

    #[inline(always)]
    fn rewrite_quoted(&self) -> Result<(), Reason> {
        let Rewrite { from, to, .. } = *self.rewrite;
        let (ip, l4) = (self.rewrite.quoted.ip, self.rewrite.quoted.l4);
        let checksum = self.quoted_checksum()?;
        let ip_before = self.load(ip + IPV4_CHECKSUM)?;
        let transport_before = self.load_if(checksum)?;

        self.set_quoted_address(from.dst, to.dst, ip + IPV4_SOURCE, checksum)?;
        self.set_quoted_address(from.src, to.src, ip + IPV4_DESTINATION, checksum)?;
        if self.has_ports() {
            self.set_quoted_port(from.dport, to.dport, l4, checksum)?;
            self.set_quoted_port(from.sport, to.sport, l4 + 2, checksum)?;
        } else {
            let at = l4 + ICMP_IDENTIFIER;
            self.set_quoted_port(from.identifier(), to.identifier(), at, checksum)?;
        }
        // To the error's own checksum, the quoted ones are payload.
        self.account(ip_before, self.load(ip + IPV4_CHECKSUM)?)?;
        self.account(transport_before, self.load_if(checksum)?)
    }

    /// Offset of the quoted transport checksum; 0 where it is not quoted, or not in use.
    #[inline(always)]
    fn quoted_checksum(&self) -> Result<u32, Reason> {
        let at = self.rewrite.quoted.l4 + self.transport_checksum_offset();
        let is_quoted = !self.is(IPPROTO_TCP) || self.rewrite.quoted.length >= TCP_CHECKSUM + 2;
        // RFC 768: 0 means none.
        let is_used = !self.is(IPPROTO_UDP) || self.load(at)? != Be16::default();
        Ok(if is_quoted && is_used { at } else { 0 })
    }

    #[inline(always)]
    fn load_if(&self, at: u32) -> Result<Be16, Reason> {
        if at == 0 { Ok(Be16::default()) } else { self.load(at) }
    }

    /// Sets a quoted address; of the transports only TCP and UDP have it in their checksums.
    #[inline(always)]
    fn set_quoted_address(
        &self,
        from: Be32,
        to: Be32,
        at: u32,
        checksum: u32,
    ) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        let (old, new) = (u64::from(from.raw), u64::from(to.raw));
        self.replace_ip_checksum(self.rewrite.quoted.ip, old, new)?;
        if checksum != 0 && self.has_ports() {
            self.replace(checksum, old, new, self.udp_flag() | 4)?;
        }
        self.replace(self.error_checksum(), old, new, 4)?;
        self.store(at, &to)
    }

    /// Sets a quoted port or identifier.
    #[inline(always)]
    fn set_quoted_port(&self, from: Be16, to: Be16, at: u32, checksum: u32) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        let (old, new) = (u64::from(from.raw), u64::from(to.raw));
        if checksum != 0 {
            self.replace(checksum, old, new, self.udp_flag() | 2)?;
        }
        self.replace(self.error_checksum(), old, new, 2)?;
        self.store(at, &to)
    }

    /// Sets an address of the error itself; ICMP's checksum knows nothing of those (RFC 792).
    #[inline(always)]
    fn set_error_address(&self, from: Be32, to: Be32, at: u32) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        let ip = self.rewrite.ip;
        self.replace_ip_checksum(ip, from.raw.into(), to.raw.into())?;
        self.store(ip + at, &to)
    }

    /// Brings the error's own checksum up to a field that was changed already.
    #[inline(always)]
    fn account(&self, from: Be16, to: Be16) -> Result<(), Reason> {
        if from == to {
            return Ok(());
        }
        self.replace(self.error_checksum(), from.raw.into(), to.raw.into(), 2)
    }

    #[inline(always)]
    fn error_checksum(&self) -> u32 {
        self.rewrite.l4 + ICMP_CHECKSUM
    }
}
