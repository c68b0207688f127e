//! What a guide says, taken from it: a test that does as the page says keeps the page true.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The first fenced block of a language on a page, by the page's path in the repository.
pub(super) fn block(page: &str, language: &str) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(page);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let (_, rest) = text
        .split_once(&format!("```{language}\n"))
        .with_context(|| format!("find a block of {language} in {page}"))?;
    let (block, _) = rest.split_once("```").with_context(|| format!("read a block of {page}"))?;
    Ok(block.to_owned())
}
