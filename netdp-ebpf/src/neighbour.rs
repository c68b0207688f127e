//! IPv6 on the link: neighbour discovery and multicast listeners, which say only what is true of
//! their sender, and link-local addresses, which no router forwards.

use aya_ebpf::{bindings::__sk_buff, programs::sk_buff::SkBuff};
use netdp_common::{
    addr::{Address, Be128},
    counter::Reason,
    flow::IPPROTO_ICMPV6,
    interface::Interface,
    network::flag,
};

use crate::{
    container::{self, Sender},
    family::V6,
    packet::{Headers, Packet},
    shortcut,
    verdict::{Decision, Verdict},
};

/// ICMPv6 types (RFC 4861, 4; RFC 2710, 3; RFC 3810, 5.2).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const LISTENER_QUERY: u8 = 130;
const LISTENER_REPORT: u8 = 131;
const LISTENER_DONE: u8 = 132;
const LISTENER_REPORT_2: u8 = 143;

/// Bytes of a solicitation or advertisement before its options.
const FIXED: u32 = 24;
/// Offset of the target address.
const TARGET: usize = 8;
/// Options that hold the sender's MAC: source and target link-layer address.
const SOURCE_MAC: u8 = 1;
const TARGET_MAC: u8 = 2;
/// More options than this are no honest sender's.
const OPTIONS: u32 = 8;

/// What becomes of a container's packet that never leaves the link; `None` = it may leave.
#[inline(always)]
pub(crate) fn on_link(packet: &Packet<'_, V6>, sender: &Sender) -> Option<Decision> {
    let own = sender.interface.ipv6;
    let link_local = Be128::link_local(sender.interface.mac);
    let source = packet.source;
    let is_unspecified = source.is_unspecified();
    if source != own && source != link_local && !is_unspecified {
        return Some(sender.drop(Reason::SpoofedSource));
    }
    if packet.proto == IPPROTO_ICMPV6 {
        match packet.icmp_type {
            // Who asks who listens is a router, too.
            ROUTER_ADVERTISEMENT | REDIRECT | LISTENER_QUERY => {
                return Some(sender.drop(Reason::Impostor));
            }
            NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => {
                return Some(if is_true(packet.skb(), packet, sender.interface) {
                    Ok(shortcut::to_neighbour(packet, sender, introduce))
                } else {
                    sender.drop(Reason::SpoofedNeighbour)
                });
            }
            ROUTER_SOLICITATION | LISTENER_REPORT | LISTENER_DONE | LISTENER_REPORT_2 => {
                return Some(Ok(Verdict::Pass));
            }
            _ => {}
        }
    }
    let destination = packet.destination;
    if source == own && !destination.is_link_local() {
        return None;
    }
    if is_unspecified {
        // Nothing but the above is sent without an address.
        return Some(sender.drop(Reason::SpoofedSource));
    }
    Some(between_link_locals(packet, sender))
}

/// Whether it is a solicitation or advertisement.
#[inline(always)]
pub(crate) fn is_discovery(headers: &Headers<V6>) -> bool {
    headers.proto == IPPROTO_ICMPV6
        && matches!(headers.icmp_type, NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT)
}

/// From or to a link-local address: a neighbour, or the host.
#[inline(always)]
fn between_link_locals(packet: &Packet<'_, V6>, sender: &Sender) -> Decision {
    let destination = packet.destination;
    let is_multicast = destination.is_multicast_or_broadcast();
    if !is_multicast && !destination.is_link_local() {
        // From a link-local address to one behind a router (RFC 4291, 2.5.6).
        return sender.drop(Reason::Martian);
    }
    if is_multicast || sender.is_for_neighbour {
        if container::poses_as_dhcp_server(packet) {
            return sender.drop(Reason::Impostor);
        }
        return if sender.network.has(flag::ICC) {
            Ok(Verdict::Pass)
        } else {
            sender.drop(Reason::Icc)
        };
    }
    if sender.network.has(flag::ISOLATED) {
        return sender.drop(Reason::HostAccess);
    }
    Ok(Verdict::Pass)
}

/// Hands a solicitation to the neighbour that it asks for, and an advertisement to the one that it is
/// for. A sub-program of its own, as [`is_true`].
#[inline(never)]
fn introduce(skb: *mut __sk_buff, headers: &Headers<V6>, network: u32, own: u32) -> i32 {
    if headers.icmp_type == NEIGHBOUR_ADVERTISEMENT {
        return shortcut::hand_over(skb, headers, &headers.destination, network, own);
    }
    match SkBuff::new(skb).load(headers.outer.l4 + TARGET) {
        Ok(target) => shortcut::hand_over(skb, headers, &target, network, own),
        Err(_) => shortcut::LEFT,
    }
}

/// Whether a solicitation or advertisement is about its sender, or asks for somebody.
///
/// A sub-program of its own: kernels before Linux 6.8 count stacks in steps of 32 bytes, and that of
/// its caller is as large as it may be.
#[inline(never)]
fn is_true(skb: *mut __sk_buff, headers: &Headers<V6>, sender: &Interface) -> bool {
    let skb = SkBuff::new(skb);
    let Ok(target) = skb.load::<Be128>(headers.outer.l4 + TARGET) else { return false };
    let is_own = target == sender.ipv6 || target == Be128::link_local(sender.mac);
    let advertises = headers.icmp_type == NEIGHBOUR_ADVERTISEMENT;
    // Without an address of its own, it asks whether its future one is taken (RFC 4862, 5.4.2).
    let must_be_own = advertises || headers.source.is_unspecified();
    if must_be_own && !is_own {
        return false;
    }
    let (options, end) = (headers.outer.l4 as u32 + FIXED, headers.outer.end as u32);
    has_true_options(&skb, options, end, &sender.mac)
}

/// Whether every MAC that the options hold is the sender's.
#[inline(always)]
fn has_true_options(skb: &SkBuff, start: u32, end: u32, mac: &[u8; 6]) -> bool {
    let mut at = start;
    for _ in 0..OPTIONS {
        if at + 8 > end {
            return at == end;
        }
        let Ok(option) = skb.load::<[u8; 8]>(at as usize) else { return false };
        let [kind, length, a, b, c, d, e, f] = option;
        if length == 0 {
            return false;
        }
        if matches!(kind, SOURCE_MAC | TARGET_MAC) && [a, b, c, d, e, f] != *mac {
            return false;
        }
        at += u32::from(length) * 8;
    }
    false
}
