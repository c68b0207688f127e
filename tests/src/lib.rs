//! The laboratory of netdp: network namespaces, typed probes, packets, an agent runner.
//!
//! Tests meet netdp as its users do, through the command line and through packets, so nothing here
//! may name the `netdp` crate. Every probe reports the addresses that it saw at both ends:
//! reachability alone proves nothing about translation.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use netdp_tests::lab::Lab;
//!
//! netdp_tests::runtime::isolate()?;
//! let lab = Lab::builder().build()?;
//! lab.create_network("web", "172.20.0.0/24", &[])?;
//! let a1 = lab.attach("web", "a1", "172.20.0.2", &["8080:80"])?;
//! let _server = a1.tcp_server("a1", "172.20.0.2:80")?;
//! let exchange = lab.outside().tcp("10.0.0.2:8080").exchange()?;
//! assert_eq!(exchange.server_peer, exchange.client_local);
//! # Ok(())
//! # }
//! ```

#![expect(clippy::panic, reason = "a malformed address in a test is a mistake of the test")]

pub mod agent;
pub mod backend;
pub mod bench;
pub mod beside;
pub mod bpf;
pub mod diagnose;
pub mod docker;
pub mod figures;
pub mod harness;
pub mod kept;
pub mod kernels;
pub mod lab;
pub mod namespace;
pub mod net;
pub mod packet;
#[cfg(test)]
mod page;
pub mod podman;
pub mod probe;
pub mod runtime;
pub mod snapshot;
pub mod stage;
mod sys;
pub mod through;
