//! Programs of the host and published ports: the destination is chosen when it is named, so no
//! packet has to be translated.
//!
//! And the other way round: nobody but the container gets a published port.
//!
//! Sockets of other network namespaces, containers' above all, are none of our business, although
//! the hooks run for them, too.

use aya_ebpf::programs::{SockAddrContext, SockContext};
use netdp_common::{
    addr::{Address, Be16, Be32, Be128},
    flow::{IPPROTO_TCP, IPPROTO_UDP},
    publish::PublishedPort,
    socket::{SocketAddress, SocketPeer},
};

use crate::{
    family::{Family, V4, V6},
    kernel,
    maps::{self, Maps},
    publish,
    sock_addr::{self, Form},
};

/// What a hook returns to let the call go on.
const GO_ON: i32 = 1;

/// What hooks return to make the call fail, with EPERM unless they say otherwise.
const REFUSE: i32 = 0;

/// asm-generic/errno.h.
const EADDRINUSE: i32 = 98;

/// A program asks for a port: one that is published is as good as taken, and one that source NAT chooses
/// is noted. Where it leaves the choice to the kernel, the kernel does not ask, and chooses none of
/// these.
#[inline(always)]
pub(crate) fn bind<F: Form>(ctx: &SockAddrContext) -> i32 {
    let (asked, proto) = (F::read(ctx), sock_addr::protocol(ctx));
    let has_ports = matches!(proto, IPPROTO_TCP | IPPROTO_UDP);
    if !has_ports || asked.port.raw == 0 || !is_host(sock_addr::namespace(ctx)) {
        return GO_ON;
    }
    let is_taken = match asked.ipv4() {
        Some(address) => is_taken::<V4>(address, asked.port, proto),
        None => {
            is_taken::<V6>(asked.address, asked.port, proto)
                // Who binds `::` has all IPv4 addresses as well, unless it said otherwise.
                || asked.address.is_unspecified()
                    && is_taken::<V4>(Be32::default(), asked.port, proto)
                    && !sock_addr::is_ipv6_only(ctx, proto)
        }
    };
    if is_taken {
        kernel::fail_with(EADDRINUSE);
        return REFUSE;
    }
    if maps::config().is_some_and(|config| config.is_nat_port(asked.port.get())) {
        maps::claim_port();
    }
    GO_ON
}

/// Whether a port of an address is published, or of any address if it is the unspecified one.
#[inline(always)]
fn is_taken<F: Family>(address: F::Address, port: Be16, proto: u8) -> bool {
    let somewhere = PublishedPort { port, proto, family: F::ADDRESS_FAMILY };
    publish::is_published::<F>(address, port, proto)
        || address.is_unspecified() && maps::is_published_somewhere(&somewhere)
}

/// A program names whom it wants to talk to: a published port becomes the container's.
#[inline(always)]
pub(crate) fn dial<F: Form>(ctx: &SockAddrContext) -> i32 {
    if !is_host(sock_addr::namespace(ctx)) {
        return GO_ON;
    }
    let dialled = meant(F::read(ctx));
    let Some(target) = target(&dialled, sock_addr::protocol(ctx)) else {
        if is_container(&dialled) {
            // What comes from the container's own port is no answer from a published one any more.
            maps::forget_socket_origin(&peer(ctx, dialled));
        }
        return GO_ON;
    };
    // A loopback address is no source on the way to a container: the kernel would say EINVAL, or
    // for IPv6 nothing at all. As little may the packet reach whoever has the port on the host
    // while the agent is away.
    let (bound4, bound6) = sock_addr::bound(ctx);
    let is_ipv4 = target.ipv4().is_some();
    if is_ipv4 && bound4.is_loopback() || !is_ipv4 && bound6.is_loopback() {
        return REFUSE;
    }
    let peer = peer(ctx, target);
    // Datagrams keep coming: a look is cheaper than a write, and keeps the entry young as well.
    if maps::socket_origin(&peer) != Some(dialled) {
        maps::remember_socket_origin(&peer, &dialled);
    }
    F::write(ctx, &target);
    GO_ON
}

/// A program is told whom it talks to: whom it dialled, not the container.
#[inline(always)]
pub(crate) fn name_peer<F: Form>(ctx: &SockAddrContext) -> i32 {
    if is_host(sock_addr::namespace(ctx))
        && let Some(dialled) = maps::socket_origin(&peer(ctx, F::read(ctx)))
    {
        F::write(ctx, &dialled);
    }
    GO_ON
}

/// A socket is closed. Those of an unconnected one are left for the map to forget: nobody else
/// will ever have its cookie.
#[inline(always)]
pub(crate) fn release(ctx: &SockContext) -> i32 {
    if is_host(sock_addr::namespace(ctx)) {
        let peer = sock_addr::connected_to(ctx);
        if peer.port.raw != 0 {
            let (cookie, proto) = (sock_addr::cookie(ctx), sock_addr::closed_protocol(ctx));
            maps::forget_socket_origin(&SocketPeer { cookie, peer, proto, pad: [0; 3] });
        }
    }
    GO_ON
}

/// A socket of the agent's shows in which namespace it is.
#[inline(always)]
pub(crate) fn name_namespace(ctx: &SockAddrContext) -> i32 {
    maps::name_namespace(sock_addr::cookie(ctx), sock_addr::namespace(ctx));
    GO_ON
}

/// No namespace has the cookie 0, which stands there before the agent has written it.
#[inline(always)]
fn is_host(namespace: u64) -> bool {
    maps::config().is_some_and(|config| config.netns_cookie == namespace)
}

#[inline(always)]
fn peer(ctx: &SockAddrContext, peer: SocketAddress) -> SocketPeer {
    let (cookie, proto) = (sock_addr::cookie(ctx), sock_addr::protocol(ctx));
    SocketPeer { cookie, peer, proto, pad: [0; 3] }
}

/// Who dials 0.0.0.0 or :: means 127.0.0.1 or ::1 (net/ipv4/route.c,
/// `ip_route_output_key_hash_rcu`; net/ipv6/tcp_ipv6.c, `tcp_v6_connect`).
#[inline(always)]
fn meant(dialled: SocketAddress) -> SocketAddress {
    match dialled.ipv4() {
        Some(address) if address.is_unspecified() => {
            SocketAddress::from_ipv4(LOOPBACK4, dialled.port)
        }
        None if dialled.address.is_unspecified() => SocketAddress { address: LOOPBACK6, ..dialled },
        _ => dialled,
    }
}

/// Where a dialled published port leads.
#[inline(always)]
fn target(dialled: &SocketAddress, protocol: u8) -> Option<SocketAddress> {
    if !matches!(protocol, IPPROTO_TCP | IPPROTO_UDP) {
        return None;
    }
    if let Some(address) = dialled.ipv4() {
        let (address, port) = target_of::<V4>(address, dialled.port, protocol)?;
        Some(SocketAddress::from_ipv4(address, port))
    } else {
        let (address, port) = target_of::<V6>(dialled.address, dialled.port, protocol)?;
        Some(SocketAddress { address, port, pad: 0 })
    }
}

/// The same in one family.
#[inline(always)]
fn target_of<F: Family>(
    address: F::Address,
    port: Be16,
    protocol: u8,
) -> Option<(F::Address, Be16)> {
    if !address.is_loopback() && !F::is_local(address) {
        return None;
    }
    let published = publish::at::<F>(address, port, protocol)
        .or_else(|| publish::at::<F>(F::Address::default(), port, protocol))?;
    Some((published.address, published.port))
}

/// 127.0.0.1.
const LOOPBACK4: Be32 = Be32::new(0x7f00_0001);

/// `::1`.
const LOOPBACK6: Be128 = Be128 { raw: [0, 0, 0, 1_u32.to_be()] };

/// Whether it is the own address of a container of ours.
#[inline(always)]
fn is_container(address: &SocketAddress) -> bool {
    match address.ipv4() {
        Some(address) => V4::endpoint(address).is_some(),
        None => V6::endpoint(address.address).is_some(),
    }
}
