//! What happens to a packet, and the counting of it.

use aya_ebpf::{
    bindings::{tcx_action_base::TCX_DROP, tcx_action_base::TCX_NEXT},
    programs::TcContext,
};
use netdp_common::counter::Reason;

use crate::{kernel, maps, packet};

/// The outcome of a program.
#[must_use]
pub(crate) enum Verdict {
    /// On to other programs at the hook, then the kernel.
    Pass,
    /// Back out of the interface it came from.
    TurnAround,
    /// Past the host's stack: what the helper that sent it says.
    Sent(i32),
    /// Gone, and counted.
    Drop(Dropped),
    /// Gone, and counted with the bytes that it had; an error stands in its place and goes to its
    /// sender.
    Answer(Dropped, u32),
}

/// Why a packet was dropped and for whom it is counted.
#[derive(Clone, Copy)]
pub(crate) struct Dropped {
    pub(crate) reason: Reason,
    /// Network id, 0 where none could be told.
    pub(crate) network: u32,
}

/// What the decision functions return; `?` drops.
pub(crate) type Decision<T = Verdict> = Result<T, Dropped>;

/// Drops the packet.
#[inline(always)]
pub(crate) fn drop<T>(reason: Reason, network: u32) -> Decision<T> {
    Err(Dropped { reason, network })
}

impl From<Dropped> for Verdict {
    #[inline(always)]
    fn from(dropped: Dropped) -> Self {
        Self::Drop(dropped)
    }
}

impl Verdict {
    /// The hook's return code.
    #[inline(always)]
    pub(crate) fn finish(self, ctx: &TcContext) -> i32 {
        match self {
            // Not TCX_PASS: programs of others that come after ours keep working.
            Self::Pass => TCX_NEXT,
            Self::TurnAround => kernel::redirect(packet::ifindex(ctx)),
            Self::Sent(code) => code,
            Self::Drop(dropped) => {
                maps::count(dropped.network, dropped.reason as u32, ctx.len());
                TCX_DROP
            }
            Self::Answer(dropped, bytes) => {
                maps::count(dropped.network, dropped.reason as u32, bytes);
                kernel::redirect(packet::ifindex(ctx))
            }
        }
    }
}
