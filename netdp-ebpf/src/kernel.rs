//! The kernel's helpers that touch neither packet nor map.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{
        bpf_get_prandom_u32, bpf_ktime_get_boot_ns, bpf_redirect, bpf_sk_lookup_tcp,
        bpf_sk_lookup_udp, bpf_sk_release,
    },
};
use netdp_common::{
    addr::Tuple4,
    flow::{IPPROTO_TCP, IPPROTO_UDP},
};

/// `BPF_F_CURRENT_NETNS`, which the bindings lack as a 64-bit number.
const CURRENT_NETNS: u64 = u64::MAX;

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

/// Whether a socket of the host would take a packet that looks like this on arrival, listening or
/// connected.
///
/// A sub-program of its own: its callers have little stack left.
#[inline(never)]
pub(crate) fn has_socket(skb: *mut __sk_buff, arriving: &Tuple4, proto: u32) -> bool {
    // `Tuple4` is laid out as the IPv4 half of `bpf_sock_tuple`.
    let (tuple, size) = ((&raw const *arriving).cast_mut().cast(), size_of::<Tuple4>() as u32);
    let socket = if proto == u32::from(IPPROTO_TCP) {
        // SAFETY: context and tuple are valid; the size is that of the tuple.
        unsafe { bpf_sk_lookup_tcp(skb.cast(), tuple, size, CURRENT_NETNS, 0) }
    } else if proto == u32::from(IPPROTO_UDP) {
        // SAFETY: as above.
        unsafe { bpf_sk_lookup_udp(skb.cast(), tuple, size, CURRENT_NETNS, 0) }
    } else {
        return false;
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the reference was taken above and is given back once.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}
