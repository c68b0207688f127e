//! The kernel's helpers that touch neither packet nor map.

use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_boot_ns, bpf_redirect};

/// Seconds of CLOCK_BOOTTIME (Linux 5.8); 32 bits last for 136 years of uptime.
#[inline(always)]
pub(crate) fn now() -> u32 {
    // SAFETY: takes nothing, returns a number.
    let nanos = unsafe { bpf_ktime_get_boot_ns() };
    (nanos / 1_000_000_000) as u32
}

/// A pseudo-random number; not for secrets.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: takes nothing, returns a number.
    unsafe { bpf_get_prandom_u32() }
}

/// Sends the packet out of an interface; to be returned at once.
#[inline(always)]
pub(crate) fn redirect(ifindex: u32) -> i32 {
    // SAFETY: takes numbers only; the kernel checks the ifindex when it acts.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
}
