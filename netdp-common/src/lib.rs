//! What netdp's eBPF programs and its agent agree on: the keys and values of every map, and the
//! pure logic over them.
//!
//! One file per map family. Knows nothing of sockets, syscalls or aya; everything is tested on
//! the host.
#![cfg_attr(not(any(test, feature = "std")), no_std)]

pub mod abi;
pub mod addr;
pub mod aging;
pub mod checksum;
pub mod config;
pub mod counter;
pub mod endpoint;
pub mod flow;
pub mod fragment;
pub mod interface;
pub mod network;
pub mod policy;
pub mod publish;
pub mod socket;
