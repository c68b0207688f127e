//! netdp's packet path. Four tc programs, each: parse → decide → act; and the socket hooks, which
//! lead programs of the host to published ports before there is a packet, and keep them off.
//!
//! `docs/packet-walk.md` follows a packet through them, hook by hook. Each program parts into the
//! families at once; what they do is written once, for both.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod aging;
mod bridge;
mod bytes;
mod container;
mod express;
mod family;
mod flow;
mod icmp_error;
mod kernel;
mod mapping;
mod maps;
mod neighbour;
mod own_error;
mod packet;
mod policy;
mod publish;
mod refuse;
mod rewrite;
mod shortcut;
mod sock_addr;
mod socket;
mod stroke;
mod subprogram;
mod table;
mod uplink;
mod verdict;

use aya_ebpf::{
    bindings::__sk_buff,
    macros::{cgroup_sock, cgroup_sock_addr, classifier},
    programs::{SockAddrContext, SockContext, TcContext},
};
use express::Plain;
use family::{Family, V4, V6};
use packet::Carried;
use sock_addr::{Inet4, Inet6};
use verdict::Verdict;

/// tc ingress of the host's end of each veth: everything a container sends.
#[classifier]
fn from_container(ctx: TcContext) -> i32 {
    match Carried::by_protocol(&ctx) {
        Carried::Ipv4 => ip_from_container::<V4>(&ctx),
        Carried::Ipv6 => ip_from_container::<V6>(&ctx),
        Carried::Arp => arp_from_container(ctx.skb.skb),
        Carried::Other => other_from_container(ctx.skb.skb),
    }
}

/// tc egress of each bridge: everything the host's stack sends into a network.
#[classifier]
fn into_network(ctx: TcContext) -> i32 {
    match Carried::by_protocol(&ctx) {
        Carried::Ipv4 => ip_into_network::<V4>(ctx.skb.skb),
        Carried::Ipv6 => ip_into_network::<V6>(ctx.skb.skb),
        other => bridge::other_into_network(&ctx, other).unwrap_or_else(Verdict::from).finish(&ctx),
    }
}

/// tc ingress of each uplink: everything that comes from outside.
#[classifier]
fn from_uplink(ctx: TcContext) -> i32 {
    match Carried::by(&ctx) {
        Carried::Ipv4 => ip_from_uplink::<V4>(&ctx),
        Carried::Ipv6 => ip_from_uplink::<V6>(&ctx),
        _ => Verdict::Pass.finish(&ctx),
    }
}

/// tc egress of each uplink: everything that leaves the host.
#[classifier]
fn to_uplink(ctx: TcContext) -> i32 {
    match Carried::by(&ctx) {
        Carried::Ipv4 => ip_to_uplink::<V4>(ctx.skb.skb),
        Carried::Ipv6 => ip_to_uplink::<V6>(ctx.skb.skb),
        _ => uplink::other_to_uplink(&ctx).unwrap_or_else(Verdict::from).finish(&ctx),
    }
}

/// cgroup hook of `bind` (Linux 4.17).
#[cgroup_sock_addr(bind4)]
fn bind4(ctx: SockAddrContext) -> i32 {
    socket::bind::<Inet4>(&ctx)
}

/// cgroup hook of `bind` with IPv6 addresses (Linux 4.17).
#[cgroup_sock_addr(bind6)]
fn bind6(ctx: SockAddrContext) -> i32 {
    socket::bind::<Inet6>(&ctx)
}

/// cgroup hook of `connect`, and what libraries make of it.
#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    socket::dial::<Inet4>(&ctx)
}

/// cgroup hook of `connect`, and what libraries make of it, with IPv6 addresses.
#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    socket::dial::<Inet6>(&ctx)
}

/// cgroup hook of `sendto` and `sendmsg` of unconnected UDP sockets (Linux 4.18).
#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    socket::dial::<Inet4>(&ctx)
}

/// cgroup hook of `sendto` and `sendmsg` of unconnected UDP sockets (Linux 4.18), with IPv6
/// addresses.
#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    socket::dial::<Inet6>(&ctx)
}

/// cgroup hook of `recvfrom` and `recvmsg` of UDP sockets (Linux 5.2).
#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    socket::name_peer::<Inet4>(&ctx)
}

/// cgroup hook of `recvfrom` and `recvmsg` of UDP sockets (Linux 5.2), with IPv6 addresses.
#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    socket::name_peer::<Inet6>(&ctx)
}

/// cgroup hook of `getpeername` (Linux 5.8).
#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    socket::name_peer::<Inet4>(&ctx)
}

/// cgroup hook of `getpeername` (Linux 5.8), with IPv6 addresses.
#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    socket::name_peer::<Inet6>(&ctx)
}

/// cgroup hook of a socket's last `close` (Linux 5.9).
#[cgroup_sock(sock_release)]
fn sock_release(ctx: SockContext) -> i32 {
    socket::release(&ctx)
}

/// cgroup hook of `connect`, for a moment: tells the agent what the kernel calls its network
/// namespace, where no socket does (before Linux 5.14).
#[cgroup_sock_addr(connect4)]
fn name_namespace(ctx: SockAddrContext) -> i32 {
    socket::name_namespace(&ctx)
}

/// An order of the agent about IPv4 flows: on no hook, run by hand.
#[classifier]
fn collect4(ctx: TcContext) -> i32 {
    aging::collect::<V4>(ctx.skb.skb)
}

/// An order of the agent about IPv6 flows: on no hook, run by hand.
#[classifier]
fn collect6(ctx: TcContext) -> i32 {
    aging::collect::<V6>(ctx.skb.skb)
}

/// IP packets of containers.
#[inline(always)]
fn ip_from_container<F: Plain>(ctx: &TcContext) -> i32 {
    match express_from_container::<F>(ctx.skb.skb) {
        express::LEFT => any_from_container::<F>(ctx.skb.skb),
        code => code,
    }
}

/// IP packets from outside.
#[inline(always)]
fn ip_from_uplink<F: Plain>(ctx: &TcContext) -> i32 {
    match express_from_uplink::<F>(ctx.skb.skb) {
        express::LEFT => any_from_uplink::<F>(ctx.skb.skb),
        code => code,
    }
}

/// An express lane as a sub-program.
macro_rules! lane {
    ($name:ident, $take:path) => {
        #[inline(never)]
        fn $name<F: Plain>(skb: *mut __sk_buff) -> i32 {
            let ctx = TcContext::new(skb);
            match $take(&ctx) {
                Ok(code) => code,
                Err(dropped) => Verdict::from(dropped).finish(&ctx),
            }
        }
    };
}

lane!(express_from_container, express::from_container::<F>);
lane!(express_from_uplink, express::from_uplink::<F>);

/// A part of a program as a sub-program: its stack is its own.
macro_rules! part {
    ($name:ident$(<$family:ident>)?, $decide:path) => {
        #[inline(never)]
        fn $name$(<$family: Family>)?(skb: *mut __sk_buff) -> i32 {
            let ctx = TcContext::new(skb);
            $decide(&ctx).unwrap_or_else(Verdict::from).finish(&ctx)
        }
    };
}

part!(any_from_container<F>, container::from_container::<F>);
part!(arp_from_container, container::arp_from_container);
part!(other_from_container, container::other_from_container);
part!(ip_into_network<F>, bridge::into_network::<F>);
part!(any_from_uplink<F>, uplink::from_uplink::<F>);
part!(ip_to_uplink<F>, uplink::to_uplink::<F>);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: the verifier accepts no path that panics.
    loop {}
}
