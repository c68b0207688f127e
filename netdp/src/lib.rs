//! netdp: container networks without iptables in the packet path.
//!
//! The library behind the one binary: agent, command line and what they share. `ARCHITECTURE.md`
//! in the repository has the map of the house.

pub mod api;
pub mod cli;
pub mod config;
pub mod controller;
pub mod dataplane;
mod difference;
pub mod facts;
pub mod family;
pub mod integrations;
pub mod ipam;
pub mod loopback;
pub mod model;
pub mod netlink;
pub mod plan;
pub mod ports;
pub mod runs;
pub mod store;
