//! The contexts of the socket hooks, and all pointers into them.
//!
//! The verifier wants each field read and written at its own constant offset and in its own size:
//! every access is volatile, so that the compiler neither narrows nor merges them.

use core::ptr::{read_volatile, write_volatile};

use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::generated::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_skc_to_tcp6_sock, bpf_skc_to_udp6_sock,
    },
    programs::{SockAddrContext, SockContext},
};
use netdp_common::{
    addr::{Be16, Be32, Be128},
    flow::IPPROTO_TCP,
    socket::SocketAddress,
};

/// `AF_INET` (linux/socket.h).
const AF_INET: u32 = 2;

/// The form in which a hook names addresses.
pub(crate) trait Form {
    /// The address and port that the hook is about.
    fn read(ctx: &SockAddrContext) -> SocketAddress;

    /// Puts another one in its place; of an IPv4 hook, the address has to be an IPv4 one.
    fn write(ctx: &SockAddrContext, address: &SocketAddress);
}

/// `struct sockaddr_in`.
pub(crate) struct Inet4;

/// `struct sockaddr_in6`; IPv4-mapped addresses stand in it, too.
pub(crate) struct Inet6;

macro_rules! read {
    ($context:expr, $type:ty, $($field:ident).+ $([$index:literal])?) => {{
        let context: *const $type = $context;
        // SAFETY: the kernel's context is valid for the whole run; the field is part of it.
        unsafe { read_volatile(&raw const (*context).$($field).+ $([$index])?) }
    }};
}

macro_rules! write {
    ($context:expr, $field:ident $([$index:literal])? = $value:expr) => {{
        let (context, value): (*mut bpf_sock_addr, u32) = ($context, $value);
        // SAFETY: as in `read`; the kernel lets these hooks write the field.
        unsafe { write_volatile(&raw mut (*context).$field $([$index])?, value) }
    }};
}

macro_rules! words {
    ($context:expr, $type:ty, $field:ident) => {
        Be128 {
            raw: [
                read!($context, $type, $field[0]),
                read!($context, $type, $field[1]),
                read!($context, $type, $field[2]),
                read!($context, $type, $field[3]),
            ],
        }
    };
}

/// The field is wider than the port: its lower half, in network byte order.
#[inline(always)]
fn port(ctx: &SockAddrContext) -> Be16 {
    Be16 { raw: read!(ctx.sock_addr, bpf_sock_addr, user_port) as u16 }
}

impl Form for Inet4 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> SocketAddress {
        let address = Be32 { raw: read!(ctx.sock_addr, bpf_sock_addr, user_ip4) };
        SocketAddress::from_ipv4(address, port(ctx))
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, address: &SocketAddress) {
        write!(ctx.sock_addr, user_ip4 = address.address.raw[3]);
        write!(ctx.sock_addr, user_port = u32::from(address.port.raw));
    }
}

impl Form for Inet6 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> SocketAddress {
        let address = words!(ctx.sock_addr, bpf_sock_addr, user_ip6);
        SocketAddress { address, port: port(ctx), pad: 0 }
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, address: &SocketAddress) {
        write!(ctx.sock_addr, user_ip6[0] = address.address.raw[0]);
        write!(ctx.sock_addr, user_ip6[1] = address.address.raw[1]);
        write!(ctx.sock_addr, user_ip6[2] = address.address.raw[2]);
        write!(ctx.sock_addr, user_ip6[3] = address.address.raw[3]);
        write!(ctx.sock_addr, user_port = u32::from(address.port.raw));
    }
}

/// IP protocol number of a hook's socket.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u8 {
    // MPTCP's number is no byte; nothing is published for it.
    u8::try_from(read!(ctx.sock_addr, bpf_sock_addr, protocol)).unwrap_or(0)
}

/// IP protocol number of a socket that is being closed.
#[inline(always)]
pub(crate) fn closed_protocol(ctx: &SockContext) -> u8 {
    u8::try_from(read!(ctx.sock, bpf_sock, protocol)).unwrap_or(0)
}

/// The addresses that the socket is bound to, 0.0.0.0 and :: where it is not. Of an IPv6 socket
/// that is bound to an IPv4-mapped address the first is that one (net/ipv6/af_inet6.c,
/// `__inet6_bind`); of an IPv4 socket the second says nothing.
#[inline(always)]
pub(crate) fn bound(ctx: &SockAddrContext) -> (Be32, Be128) {
    // Linux 5.3.
    let socket = read!(ctx.sock_addr, bpf_sock_addr, __bindgen_anon_1.sk);
    (Be32 { raw: read!(socket, bpf_sock, src_ip4) }, words!(socket, bpf_sock, src_ip6))
}

/// Whether an IPv6 socket of TCP or UDP takes no IPv4 packets (IPV6_V6ONLY). Needs the kernel's
/// types (`CONFIG_DEBUG_INFO_BTF`) and Linux 5.9.
#[inline(always)]
pub(crate) fn is_ipv6_only(ctx: &SockAddrContext, proto: u8) -> bool {
    /// Bit `skc_ipv6only` of `struct sock_common` (net/sock.h), at that place since Linux 3.18.
    const PLACE: usize = 19;
    const IPV6_ONLY: u8 = 1 << 5;
    let socket = read!(ctx.sock_addr, bpf_sock_addr, __bindgen_anon_1.sk).cast();
    let socket: *const u8 = if proto == IPPROTO_TCP {
        // SAFETY: the hook's socket; the helper looks whether it is one of this kind.
        unsafe { bpf_skc_to_tcp6_sock(socket) }.cast()
    } else {
        // SAFETY: as above.
        unsafe { bpf_skc_to_udp6_sock(socket) }.cast()
    };
    // SAFETY: checked for null; `struct sock_common` comes first in both, and is longer.
    !socket.is_null() && unsafe { read_volatile(socket.wrapping_add(PLACE)) } & IPV6_ONLY != 0
}

/// The kernel's name of a hook's socket.
#[inline(always)]
pub(crate) fn cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the kernel's context; the helper returns a number.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// The kernel's name of the socket's network namespace (Linux 5.7).
#[inline(always)]
pub(crate) fn namespace(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: as in `cookie`.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Whom a socket that is being closed was connected to; port 0 where it was not.
#[inline(always)]
pub(crate) fn connected_to(ctx: &SockContext) -> SocketAddress {
    let port = Be16 { raw: read!(ctx.sock, bpf_sock, dst_port) };
    // Both, whatever the family: of two branches the compiler would make one with a computed
    // offset. What an IPv4 socket has in the other field is not looked at.
    let ipv4 = Be32 { raw: read!(ctx.sock, bpf_sock, dst_ip4) };
    let address = words!(ctx.sock, bpf_sock, dst_ip6);
    if read!(ctx.sock, bpf_sock, family) == AF_INET {
        SocketAddress::from_ipv4(ipv4, port)
    } else {
        SocketAddress { address, port, pad: 0 }
    }
}
