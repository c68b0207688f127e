//! HTTP over a unix socket: how the command line and integrations talk to the agent.
//!
//! Owns the wire format and its translation into the model's terms. Everything that is decided is
//! decided by the model and the controller.

pub mod client;
pub mod server;
pub mod wire;

/// Largest request body in bytes: a policy of tens of thousands of rules fits.
pub const BODY_LIMIT: usize = 4 << 20;
