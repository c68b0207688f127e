//! Calling cargo on this workspace, and finding what it built. Knows no suite or command.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;

/// The workspace's root directory.
pub(crate) fn root() -> &'static Path {
    let member = Path::new(env!("CARGO_MANIFEST_DIR"));
    member.parent().unwrap_or(member)
}

/// `cargo arguments…`, run in the workspace's root by the cargo that runs this program.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

/// Where builds go that must not share locks and caches with the main build.
pub(crate) fn side_target_dir(name: &str) -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    root().join(target).join(name)
}

/// Builds what `arguments` (a `cargo build` or `cargo test --no-run`) name and returns the
/// executables by target name.
pub(crate) fn build(title: &str, arguments: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
    let mut command = command(arguments);
    command.args(["--locked", "--message-format=json-render-diagnostics"]);
    executables(&process::run_quiet(title, &mut command)?)
}

/// Builds `arguments` and returns the executable of target `name`.
pub(crate) fn build_one(title: &str, name: &str, arguments: &[&str]) -> Result<PathBuf> {
    let mut built = build(title, arguments)?;
    built.remove(name).with_context(|| format!("{title}: cargo built no executable {name}"))
}

fn executables(messages: &str) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("read cargo's messages")?;
        let name = message["target"]["name"].as_str();
        if let (Some(name), Some(path)) = (name, message["executable"].as_str()) {
            found.insert(name.to_owned(), path.into());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_among_other_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}"#,
            "\nnoise\n",
            r#"{"reason":"compiler-artifact","target":{"name":"demo"},"executable":"/t/demo"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let found = executables(messages).unwrap();
        assert_eq!(found, BTreeMap::from([("demo".to_owned(), PathBuf::from("/t/demo"))]));
    }
}
