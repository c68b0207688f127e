//! The behaviour catalogue through a container engine: which rows its words don't say. Knows nothing of
//! how rows are tested.

use crate::harness::Unkept;

/// A row that can't be asked in Docker's words, of networks of netdp's.
#[derive(Clone, Copy, Debug)]
pub struct Unsaid {
    /// Its id in the catalogue.
    pub id: &'static str,
    /// What the row says when it meets that, one of these.
    pub seen: &'static [&'static str],
    /// Why there are no such words.
    pub reason: &'static str,
}

/// Every such row. One that is listed and passes fails the suite, as does one that fails in another way
/// than the list says, or is not listed.
pub const UNSAID: &[Unsaid] = &[Unsaid {
    id: "LIF-07",
    seen: &["take a container's namespace away: Docker holds it"],
    reason: "a namespace is Docker's for as long as there is the container, and nobody else takes it away",
}];

/// What is held against a row that there are no words for.
#[must_use]
pub fn unkept(id: &str) -> Option<Unkept> {
    let Unsaid { seen, reason, .. } = UNSAID.iter().find(|unsaid| unsaid.id == id)?;
    Some(Unkept::Unsaid { seen, reason })
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;
    use crate::page::expect_part;

    #[test]
    fn the_page_of_behaviour_says_what_docker_has_no_words_for() {
        let mut table = "| row | why it can't be asked through Docker |\n|---|---|\n".to_owned();
        for Unsaid { id, reason, .. } in UNSAID {
            writeln!(table, "| `{id}` | {reason} |").unwrap();
        }
        expect_part("behaviour.md", "unsaid", &table);
    }
}
