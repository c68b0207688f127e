//! ICMP errors that the host itself sends about packets that were translated on their way in: too
//! large for the network, at the end of their life. They quote a container; who dialled the host
//! must read of the host.

use aya_ebpf::programs::TcContext;

use crate::{
    family::Family,
    flow, kernel,
    packet::{Packet, Transport},
};

/// Whether the host sends ICMP of the family: what else it sends costs no more than this question.
#[inline(always)]
pub(crate) fn is_possible<F: Family>(ctx: &TcContext) -> bool {
    kernel::network_header_byte(ctx.skb.skb, F::PROTOCOL) == Some(F::ICMP)
}

/// Translates the packet at offset `ip` if it is such an error, and leaves any other as it is.
#[inline(always)]
pub(crate) fn translate<F: Family>(ctx: &TcContext, ip: usize) {
    let Ok(packet) = Packet::<F>::parse(ctx, ip, 0) else { return };
    if packet.transport != Transport::Error {
        return;
    }
    // An error counts as an answer to what it quotes, so to the flow table a container sends it.
    let Some(zone) = F::network_of(packet.tuple.src) else { return };
    if flow::find(&packet, zone).is_some() {
        // Without memory to rewrite it in, the error goes out as it is: it names an address that
        // its receiver can't use.
        let _ = packet.rewrite_by_parts(0);
    }
}
