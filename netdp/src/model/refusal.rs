//! Why an operation on the model was not carried out.
//!
//! Owns the error type that every operation returns. Knows nothing of HTTP or exit codes: the
//! kind is what callers branch on.

use thiserror::Error;

/// An operation that was refused and changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Refusal {
    /// What sort of refusal it is.
    pub kind: RefusalKind,
    /// One line: what was refused, and what to do.
    pub message: String,
}

/// What sort of refusal it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The request makes no sense, whatever the state.
    Invalid,
    /// The request contradicts what is there.
    Conflict,
    /// The request names something that is not there.
    NotFound,
}

impl Refusal {
    /// The request makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self { kind: RefusalKind::Invalid, message: message.into() }
    }

    /// The request contradicts what is there.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self { kind: RefusalKind::Conflict, message: message.into() }
    }

    /// The request names something that is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self { kind: RefusalKind::NotFound, message: message.into() }
    }
}
