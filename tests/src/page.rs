//! Parts of pages of the documentation that follow from lists in the code.

use std::sync::Mutex;
use std::{env, fs};

use crate::probe::locked;

/// Held by whoever writes a page: some have several parts.
static WRITING: Mutex<()> = Mutex::new(());

/// Fails unless a page of `docs` has `text` between a marker of this name and the next end, or writes it
/// there, where `NETDP_WRITE_DOCS` says so.
pub(crate) fn expect_part(page: &str, marker: &str, text: &str) {
    let _turn = locked(&WRITING);
    let path = format!("{}/../docs/{page}", env!("CARGO_MANIFEST_DIR"));
    let old = fs::read_to_string(&path).unwrap();
    let beginning = format!("<!-- {marker} -->\n");
    let (before, rest) = old.split_once(&beginning).unwrap();
    let (_, after) = rest.split_once("<!-- end -->\n").unwrap();
    let wanted = format!("{before}{beginning}{text}<!-- end -->\n{after}");
    if env::var_os("NETDP_WRITE_DOCS").is_some() {
        fs::write(path, &wanted).unwrap();
    } else {
        assert_eq!(old, wanted, "NETDP_WRITE_DOCS=1 cargo test -p netdp-tests page_of");
    }
}
