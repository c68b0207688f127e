//! Container engines as clients: their protocols, and how what they ask for becomes the model's terms.
//!
//! Owns no decision: what can be had and what becomes of it is the model's to say.

pub mod docker;
