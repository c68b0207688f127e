//! What a runtime says in the environment: which container, which interface, and what else.

use std::{collections::BTreeMap, env, path::Path};

use super::error::{Code, Error};

/// What an endpoint's name begins with that is an attachment of CNI's. No other is touched.
pub(super) const NAME_PREFIX: &str = "cni-";
/// Longest name of an endpoint.
const MAX_NAME: usize = 64;
/// How much of a long container id its endpoint's name shows.
const SHOWN_ID: usize = 24;
/// `IFNAMSIZ` without the final NUL.
const MAX_INTERFACE_NAME: usize = 15;

/// An attachment, named as the runtime names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    pub(super) container: String,
    pub(super) interface: String,
}

/// Which of the variables a command can't do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Netns {
    Required,
    Optional,
}

/// Reads `CNI_CONTAINERID` and `CNI_IFNAME`, and `CNI_NETNS`, empty where there is none.
///
/// # Errors
/// Names all variables that are missing, or one that no runtime may set so.
pub(super) fn attachment(netns: Netns) -> Result<(Attachment, String), Error> {
    let variable = |name: &str| env::var(name).unwrap_or_default();
    let read =
        [("CNI_CONTAINERID", true), ("CNI_IFNAME", true), ("CNI_NETNS", netns == Netns::Required)]
            .map(|(name, is_required)| (name, variable(name), is_required));
    let missing: Vec<&str> = read
        .iter()
        .filter(|(_, value, is_required)| *is_required && value.is_empty())
        .map(|(name, ..)| *name)
        .collect();
    if !missing.is_empty() {
        let details = format!("{} is missing: runtimes set it", missing.join(", "));
        return Err(Error::new(Code::InvalidEnvironment, details));
    }
    let [(_, container, _), (_, interface, _), (_, path, _)] = read;
    let attachment = Attachment { container, interface };
    attachment.check()?;
    if netns == Netns::Required && !Path::new(&path).exists() {
        let details = format!("CNI_NETNS={path}: there is no such network namespace");
        return Err(Error::new(Code::UnknownContainer, details));
    }
    Ok((attachment, path))
}

/// Reads `CNI_ARGS`: `KEY=VALUE;KEY=VALUE`.
pub(super) fn arguments() -> BTreeMap<String, String> {
    let text = env::var("CNI_ARGS").unwrap_or_default();
    let pairs = text.split(';').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

impl Attachment {
    fn check(&self) -> Result<(), Error> {
        let invalid = |variable: &str, value: &str, advice: &str| {
            Error::new(Code::InvalidEnvironment, format!("{variable}={value}: {advice}"))
        };
        if !is_plain(&self.container) {
            let advice = "take a-z A-Z 0-9 _ . - and begin with a letter or digit";
            return Err(invalid("CNI_CONTAINERID", &self.container, advice));
        }
        let name = &self.interface;
        let is_good = name.len() <= MAX_INTERFACE_NAME
            && !matches!(name.as_str(), "." | "..")
            && !name.contains(|c: char| c.is_whitespace() || matches!(c, '/' | ':'));
        if !is_good {
            let advice = format!(
                "take up to {MAX_INTERFACE_NAME} characters without blanks, slashes and colons"
            );
            return Err(invalid("CNI_IFNAME", name, &advice));
        }
        Ok(())
    }

    /// The name of its endpoint: always the same one, and no other attachment's.
    pub(super) fn endpoint_name(&self) -> String {
        let Self { container, interface } = self;
        let name = format!("{NAME_PREFIX}{interface}-{container}");
        if name.len() <= MAX_NAME && is_plain(interface) {
            return name;
        }
        // Ids of containers are as long as a name may be. Their beginning is what people know them by.
        let shown: String = container.chars().take(SHOWN_ID).collect();
        let plain: String =
            interface.chars().map(|c| if is_plain_character(c) { c } else { '_' }).collect();
        let digest = fnv1a(name.as_bytes());
        format!("{NAME_PREFIX}{plain}-{shown}-{digest:016x}")
    }
}

fn is_plain(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(is_plain_character)
}

fn is_plain_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')
}

/// FNV-1a of 64 bits (draft-eastlake-fnv): names are kept on disk, so it must never be another hash.
fn fnv1a(bytes: &[u8]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.iter().fold(OFFSET, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(container: &str, interface: &str) -> String {
        Attachment { container: container.into(), interface: interface.into() }.endpoint_name()
    }

    #[test]
    fn hash_is_fnv1a() {
        // From the draft's table of test vectors.
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x85944171f73967e8);
    }

    #[test]
    fn names_of_endpoints_are_short_and_differ() {
        assert_eq!(name("web", "eth0"), "cni-eth0-web");
        let id = "0123456789abcdef".repeat(4);
        let long = name(&id, "eth0");
        assert!(long.starts_with("cni-eth0-0123456789abcdef01234567-"), "{long}");
        let names = [long, name(&format!("{id}0"), "eth0"), name(&id, "eth1"), name("web", "e@h0")];
        for (index, name) in names.iter().enumerate() {
            assert!(name.len() <= MAX_NAME && is_plain(name), "{name}");
            assert!(!names[..index].contains(name), "{name}");
        }
        let longest = name(&id, "123456789012345");
        assert!(longest.len() <= MAX_NAME, "{longest}");
    }

    #[test]
    fn names_that_no_runtime_may_use_are_refused() {
        let check = |container: &str, interface: &str| {
            Attachment { container: container.into(), interface: interface.into() }.check()
        };
        assert_eq!(check("web_1.a-b", "eth0"), Ok(()));
        for (container, interface, variable) in [
            ("-web", "eth0", "CNI_CONTAINERID"),
            ("a/b", "eth0", "CNI_CONTAINERID"),
            ("web", "0123456789abcdef", "CNI_IFNAME"),
            ("web", "..", "CNI_IFNAME"),
            ("web", "a b", "CNI_IFNAME"),
        ] {
            let error = check(container, interface).unwrap_err();
            assert_eq!(error.code, Code::InvalidEnvironment);
            assert!(error.details.starts_with(variable), "{}", error.details);
        }
    }
}
