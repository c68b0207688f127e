//! netdp's packet path. Four programs, each: parse → decide → act.
//!
//! `docs/packet-walk.md` follows a packet through them, hook by hook.
#![no_std]
#![no_main]

mod bridge;
mod container;
mod flow;
mod icmp_error;
mod kernel;
mod maps;
mod packet;
mod policy;
mod publish;
mod rewrite;
mod uplink;
mod verdict;

use aya_ebpf::{macros::classifier, programs::TcContext};
use verdict::Verdict;

/// tcx ingress of the host's end of each veth: everything a container sends.
#[classifier]
fn from_container(ctx: TcContext) -> i32 {
    container::from_container(&ctx).unwrap_or_else(Verdict::from).finish(&ctx)
}

/// tcx egress of each bridge: everything the host's stack sends into a network.
#[classifier]
fn into_network(ctx: TcContext) -> i32 {
    bridge::into_network(&ctx).unwrap_or_else(Verdict::from).finish(&ctx)
}

/// tcx ingress of each uplink: everything that comes from outside.
#[classifier]
fn from_uplink(ctx: TcContext) -> i32 {
    uplink::from_uplink(&ctx).unwrap_or_else(Verdict::from).finish(&ctx)
}

/// tcx egress of each uplink: everything that leaves the host.
#[classifier]
fn to_uplink(ctx: TcContext) -> i32 {
    uplink::to_uplink(&ctx).unwrap_or_else(Verdict::from).finish(&ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: the verifier accepts no path that panics.
    loop {}
}
