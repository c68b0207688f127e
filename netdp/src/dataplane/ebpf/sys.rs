//! What the dataplane asks of the kernel beyond aya: the only `unsafe` code of the agent.

use std::io;

/// A key or value of a map, for aya.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Wire<T>(pub(super) T);

// SAFETY: `bytemuck::Pod` is the stronger promise: any bit pattern is valid and nothing is padding.
unsafe impl<T: bytemuck::Pod> aya::Pod for Wire<T> {}

/// Waits until every packet that is being handled now has been handled: programs run under RCU,
/// and `MEMBARRIER_CMD_GLOBAL` (Linux 4.3) waits for a grace period of it.
///
/// # Errors
/// The kernel's: without membarrier (`nohz_full` hosts) EINVAL.
pub(super) fn wait_for_packets_in_flight() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: takes numbers only.
    let outcome = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
