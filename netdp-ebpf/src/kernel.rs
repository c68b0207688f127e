//! The kernel's helpers that touch neither packet nor map.

use core::sync::atomic::AtomicU64;

use aya_ebpf::{
    Global,
    bindings::__sk_buff,
    helpers::generated::{
        bpf_csum_update, bpf_get_prandom_u32, bpf_jiffies64, bpf_ktime_get_coarse_ns,
        bpf_ktime_get_ns, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer,
        bpf_set_retval, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_change_tail,
        bpf_skb_change_type, bpf_skb_load_bytes_relative,
    },
};
use netdp_common::{
    addr::{Address, Tuple},
    checksum::Difference,
    counter::Reason,
    flow::{IPPROTO_TCP, IPPROTO_UDP},
};

/// `BPF_F_CURRENT_NETNS`, which the bindings lack as a 64-bit number.
const CURRENT_NETNS: u64 = u64::MAX;

/// Whether the kernel has `bpf_ktime_get_coarse_ns` (Linux 5.11). The agent writes it before it loads
/// the programs: the verifier knows the number, and does not look at a call that is never reached.
#[unsafe(no_mangle)]
static COARSE_CLOCK: Global<u8> = Global::new(1);

/// The second in which a tick of the kernel's was: the tick's number in the upper half, the second in
/// the lower; 0 before anybody asked. A CPU that writes an older one has others ask once more. For this
/// target the compiler has no atomic loads and stores; an aligned word is read and written whole.
static SECOND: AtomicU64 = AtomicU64::new(0);

/// Seconds of CLOCK_MONOTONIC_COARSE; 32 bits last for 136 years of uptime. That clock goes on with the
/// kernel's ticks, so it is asked once in each: the number of the tick is read without a call (Linux
/// 5.5), where the clock takes three and as long as the lookup of a flow.
#[inline(always)]
pub(crate) fn now() -> u32 {
    // SAFETY: takes nothing, returns a number.
    let tick = unsafe { bpf_jiffies64() } as u32;
    // SAFETY: an aligned word that lives as long as the program.
    let noted = unsafe { SECOND.as_ptr().read_volatile() };
    if noted >> 32 == tick.into() && noted != 0 {
        return noted as u32;
    }
    // Not a sub-program: the callers have no stack for one on old kernels.
    let nanos = if COARSE_CLOCK.load() != 0 {
        // SAFETY: takes nothing, returns a number.
        unsafe { bpf_ktime_get_coarse_ns() }
    } else {
        // SAFETY: as above.
        unsafe { bpf_ktime_get_ns() }
    };
    let second = (nanos / 1_000_000_000) as u32;
    // SAFETY: as above; a packet that comes meanwhile asks for itself.
    unsafe { SECOND.as_ptr().write_volatile(u64::from(tick) << 32 | u64::from(second)) };
    second
}

/// Bytes of a packet, from the first header that the hook sees.
#[inline(always)]
pub(crate) fn length(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the whole run of the program.
    unsafe { (*skb).len }
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

/// Sends the packet out of an interface to its next hop, whose MAC address the kernel finds (Linux
/// 5.10); to be returned at once.
#[inline(always)]
pub(crate) fn redirect_neighbour(ifindex: u32) -> i32 {
    // SAFETY: takes numbers, and no parameters where the next hop is the kernel's to find.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}

/// Hands the packet to the other end of a veth pair, in its own network namespace (Linux 5.10); to be
/// returned at once. The kernel drops it if that end is gone or down.
#[inline(always)]
pub(crate) fn redirect_peer(skb: *mut __sk_buff, ifindex: u32) -> i32 {
    // SAFETY: the context is valid for the whole run of the program.
    if unsafe { (*skb).pkt_type } == PACKET_OTHERHOST {
        // What a container sends is addressed to another station than the host's end of its veth.
        // Linux 5.10 leaves it at that, and the receiver would not take it.
        // SAFETY: the context is valid; takes a number.
        unsafe { bpf_skb_change_type(skb, PACKET_HOST) };
    }
    // SAFETY: takes numbers only; the kernel checks the ifindex when it acts.
    unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
}

/// What kinds of stations a frame is for (linux/if_packet.h).
const PACKET_HOST: u32 = 0;
pub(crate) const PACKET_OTHERHOST: u32 = 3;

/// Bytes of payload in each packet that this one will be cut into, 0 where it stays as it is (Linux
/// 5.7).
#[inline(always)]
pub(crate) fn segment_size(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the whole run of the program.
    unsafe { (*skb).gso_size }
}

/// `BPF_HDR_START_NET`.
const FROM_NETWORK_HEADER: u32 = 1;

/// A byte of the packet, counted from its IP header, wherever that lies (Linux 4.18).
#[inline(always)]
pub(crate) fn network_header_byte(skb: *mut __sk_buff, offset: u32) -> Option<u8> {
    let mut byte = 0_u8;
    let to = (&raw mut byte).cast();
    // SAFETY: the context is valid; `to` has room for the one byte asked for.
    let outcome =
        unsafe { bpf_skb_load_bytes_relative(skb.cast(), offset, to, 1, FROM_NETWORK_HEADER) };
    (outcome == 0).then_some(byte)
}

/// Cuts the packet to this many bytes. Returns whether it could be.
#[inline(always)]
pub(crate) fn cut(skb: *mut __sk_buff, bytes: u32) -> bool {
    // SAFETY: the context is valid; takes a number, which the kernel checks.
    unsafe { bpf_skb_change_tail(skb, bytes, 0) == 0 }
}

/// Brings the sum that a driver has made of the whole packet (CHECKSUM_COMPLETE) up to date;
/// without one nothing happens.
#[inline(always)]
pub(crate) fn account(skb: *mut __sk_buff, difference: Difference) {
    // SAFETY: the context is valid; takes a number.
    unsafe { bpf_csum_update(skb, difference.get()) };
}

/// Brings a transport's checksum at offset `at` up to date.
///
/// Errors: the kernel refused a write (no memory to unshare the packet).
#[inline(always)]
pub(crate) fn update_checksum(
    skb: *mut __sk_buff,
    at: u32,
    difference: Difference,
    flags: u64,
) -> Result<(), Reason> {
    // SAFETY: the context is valid; takes numbers.
    let outcome = unsafe { bpf_l4_csum_replace(skb, at, 0, difference.get().into(), flags) };
    if outcome == 0 { Ok(()) } else { Err(Reason::Rewrite) }
}

/// Makes the system call that a cgroup hook refuses fail with this error (Linux 5.18).
#[inline(always)]
pub(crate) fn fail_with(errno: i32) {
    // SAFETY: takes a number.
    unsafe { bpf_set_retval(-errno) };
}

/// Whether a socket of the host would take a packet that looks like this on arrival, listening or
/// connected.
#[inline(always)]
pub(crate) fn has_socket<A: Address>(skb: *mut __sk_buff, arriving: &Tuple<A>, proto: u32) -> bool {
    look_up(skb, arriving, proto) != NO_SOCKET
}

/// Whether a socket of the host is connected to the sender of a packet that looks like this on
/// arrival.
#[inline(always)]
pub(crate) fn has_connection<A: Address>(
    skb: *mut __sk_buff,
    arriving: &Tuple<A>,
    proto: u32,
) -> bool {
    look_up(skb, arriving, proto) == CONNECTED
}

/// What [`look_up`] finds.
const NO_SOCKET: u32 = 0;
const UNCONNECTED: u32 = 1;
const CONNECTED: u32 = 2;

/// Looks for the socket that would take a packet.
///
/// A sub-program of its own: its callers have little stack left.
#[inline(never)]
fn look_up<A: Address>(skb: *mut __sk_buff, arriving: &Tuple<A>, proto: u32) -> u32 {
    // `Tuple` is laid out as the family's half of `bpf_sock_tuple`.
    let (tuple, size) = ((&raw const *arriving).cast_mut().cast(), size_of::<Tuple<A>>() as u32);
    let socket = if proto == u32::from(IPPROTO_TCP) {
        // SAFETY: context and tuple are valid; the size is that of the tuple.
        unsafe { bpf_sk_lookup_tcp(skb.cast(), tuple, size, CURRENT_NETNS, 0) }
    } else if proto == u32::from(IPPROTO_UDP) {
        // SAFETY: as above.
        unsafe { bpf_sk_lookup_udp(skb.cast(), tuple, size, CURRENT_NETNS, 0) }
    } else {
        return NO_SOCKET;
    };
    if socket.is_null() {
        return NO_SOCKET;
    }
    // SAFETY: checked for null, and held until it is released.
    let peer_port = unsafe { (*socket).dst_port };
    // SAFETY: the reference was taken above and is given back once.
    unsafe { bpf_sk_release(socket.cast()) };
    if peer_port == 0 { UNCONNECTED } else { CONNECTED }
}
