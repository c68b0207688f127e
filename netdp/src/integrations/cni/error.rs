//! Why a CNI command failed, in the spec's numbers.

use std::fmt;

use serde_json::{Value, json};

use crate::api::{client, wire::ErrorKind};

/// The spec's error codes, and from 100 on our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    IncompatibleVersion = 1,
    UnsupportedField = 2,
    UnknownContainer = 3,
    InvalidEnvironment = 4,
    InputOutput = 5,
    Undecodable = 6,
    InvalidConfig = 7,
    TryAgainLater = 11,
    NotAvailable = 50,
    /// Something that is there stands in the way.
    Conflict = 100,
    /// The host did not let it happen.
    Failed = 101,
    /// What CHECK found.
    Broken = 102,
}

/// An error as CNI has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Error {
    pub(super) code: Code,
    /// What, and what to do.
    pub(super) details: String,
}

impl Error {
    pub(super) fn new(code: Code, details: impl Into<String>) -> Self {
        Self { code, details: details.into() }
    }

    /// As it is printed, in the words of a version of the protocol.
    pub(super) fn to_json(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code as u32,
            "msg": self.code.to_string(),
            "details": self.details,
        })
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IncompatibleVersion => "incompatible CNI version",
            Self::UnsupportedField => "unsupported field in the network configuration",
            Self::UnknownContainer => "the container does not exist",
            Self::InvalidEnvironment => "invalid environment variables",
            Self::InputOutput => "input or output failed",
            Self::Undecodable => "the network configuration can't be decoded",
            Self::InvalidConfig => "invalid network configuration",
            Self::TryAgainLater => "the agent does not answer: try again later",
            Self::NotAvailable => "the plugin is not available",
            Self::Conflict => "something that is there stands in the way",
            Self::Failed => "the host did not let it happen",
            Self::Broken => "the attachment is not as it should be",
        })
    }
}

/// What comes back from the agent.
impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        let code = match client::refusal(&error) {
            Some(ErrorKind::Invalid | ErrorKind::NotFound) => Code::InvalidConfig,
            Some(ErrorKind::Conflict) => Code::Conflict,
            Some(ErrorKind::Failed) | None => Code::Failed,
        };
        Self::new(code, format!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{api::wire, model::Refusal};

    #[test]
    fn refusals_of_the_agent_have_numbers() {
        let error = |refusal: Refusal| Error::from(anyhow::Error::new(wire::Error::from(refusal)));
        assert_eq!(error(Refusal::invalid("a")), Error::new(Code::InvalidConfig, "a"));
        assert_eq!(error(Refusal::conflict("b")), Error::new(Code::Conflict, "b"));
        let printed = error(Refusal::conflict("b")).to_json("1.0.0");
        let expected = json!({
            "cniVersion": "1.0.0",
            "code": 100,
            "msg": "something that is there stands in the way",
            "details": "b",
        });
        assert_eq!(printed, expected);
    }
}
