//! Sub-programs that the verifier walks once, each by itself, and not once more for every path that
//! leads to a call: what the programs share is cheap to load that way, however often it is called.
//!
//! Such a function takes the context and numbers and returns a number; everything else it finds and
//! leaves in this CPU's scratch. Its name has no parameters, so each family has its own.

use aya_ebpf::bindings::__sk_buff;

use crate::{
    aging,
    family::{V4, V6},
    flow, packet, refuse, rewrite, shortcut, stroke, table,
};

/// The sub-programs of a family; see the functions that they are named after.
pub(crate) trait Subprograms {
    /// [`packet::parse`].
    fn parse_headers(skb: *mut __sk_buff, ip: u32, zone: u32) -> u32;
    /// [`flow::open`].
    fn open(skb: *mut __sk_buff, network: u32, kind: u32, limit: u32) -> u32;
    /// [`rewrite::apply`].
    fn apply(skb: *mut __sk_buff) -> u32;
    /// [`stroke::take`].
    fn stroke(skb: *mut __sk_buff, lost: u32) -> u32;
    /// [`shortcut::send`].
    fn send(skb: *mut __sk_buff, exit: u32, limit: u32) -> i32;
    /// [`aging::look_at_next`].
    fn look_at_next(kind: u32) -> u32;
    /// [`table::find`].
    fn find() -> u32;
    /// [`table::link`].
    fn link(number: u32, set: u32, tag: u32) -> u32;
    /// [`table::unlink`].
    fn unlink(number: u32, set: u32, tag: u32) -> u32;
    /// [`refuse::answer`].
    fn answer(skb: *mut __sk_buff, ifindex: u32) -> u32;
}

macro_rules! subprograms {
    ($family:ident: $parse:ident, $open:ident, $apply:ident, $stroke:ident, $send:ident, $look_at_next:ident, $find:ident, $link:ident, $unlink:ident, $answer:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $parse(skb: *mut __sk_buff, ip: u32, zone: u32) -> u32 {
            packet::parse::<$family>(skb, ip, zone)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $open(skb: *mut __sk_buff, network: u32, kind: u32, limit: u32) -> u32 {
            flow::open::<$family>(skb, network, kind, limit)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $apply(skb: *mut __sk_buff) -> u32 {
            rewrite::apply::<$family>(skb)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $stroke(skb: *mut __sk_buff, lost: u32) -> u32 {
            stroke::take::<$family>(skb, lost)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $send(skb: *mut __sk_buff, exit: u32, limit: u32) -> i32 {
            shortcut::send::<$family>(skb, exit, limit)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $look_at_next(kind: u32) -> u32 {
            aging::look_at_next::<$family>(kind)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $find() -> u32 {
            table::find::<$family>()
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $link(number: u32, set: u32, tag: u32) -> u32 {
            table::link::<$family>(number, set, tag as u8)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $unlink(number: u32, set: u32, tag: u32) -> u32 {
            table::unlink::<$family>(number, set, tag as u8)
        }

        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $answer(skb: *mut __sk_buff, ifindex: u32) -> u32 {
            refuse::answer::<$family>(skb, ifindex)
        }

        impl Subprograms for $family {
            #[inline(always)]
            fn parse_headers(skb: *mut __sk_buff, ip: u32, zone: u32) -> u32 {
                $parse(skb, ip, zone)
            }

            #[inline(always)]
            fn open(skb: *mut __sk_buff, network: u32, kind: u32, limit: u32) -> u32 {
                $open(skb, network, kind, limit)
            }

            #[inline(always)]
            fn apply(skb: *mut __sk_buff) -> u32 {
                $apply(skb)
            }

            #[inline(always)]
            fn stroke(skb: *mut __sk_buff, lost: u32) -> u32 {
                $stroke(skb, lost)
            }

            #[inline(always)]
            fn send(skb: *mut __sk_buff, exit: u32, limit: u32) -> i32 {
                $send(skb, exit, limit)
            }

            #[inline(always)]
            fn look_at_next(kind: u32) -> u32 {
                $look_at_next(kind)
            }

            #[inline(always)]
            fn find() -> u32 {
                $find()
            }

            #[inline(always)]
            fn link(number: u32, set: u32, tag: u32) -> u32 {
                $link(number, set, tag)
            }

            #[inline(always)]
            fn unlink(number: u32, set: u32, tag: u32) -> u32 {
                $unlink(number, set, tag)
            }

            #[inline(always)]
            fn answer(skb: *mut __sk_buff, ifindex: u32) -> u32 {
                $answer(skb, ifindex)
            }
        }
    };
}

subprograms!(V4: parse4, open4, apply4, stroke4, send4, look_at_next4, find4, link4, unlink4, answer4);
subprograms!(V6: parse6, open6, apply6, stroke6, send6, look_at_next6, find6, link6, unlink6, answer6);
