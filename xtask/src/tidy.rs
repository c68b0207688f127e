//! The invariants of ARCHITECTURE.md that a search of the tree can see. Each rule is a
//! function from one file to what breaks the rule; walking the tree is the only I/O.

use std::ffi::OsStr;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

use crate::mask::code_only;

/// 800 lines is a prompt to look, 900 a file with two subjects.
const LINE_LIMIT: usize = 900;

/// Where `unsafe` may be: raw packet and map pointers, wire layouts, system calls.
const UNSAFE_HOMES: [&str; 11] = [
    "netdp-common/src/abi.rs",
    "netdp-ebpf/src/bytes.rs",
    "netdp-ebpf/src/packet.rs",
    "netdp-ebpf/src/sock_addr.rs",
    "netdp-ebpf/src/maps.rs",
    "netdp-ebpf/src/kernel.rs",
    "netdp-ebpf/src/subprogram.rs",
    "netdp-ebpf/src/table.rs",
    "netdp/src/dataplane/ebpf/sys.rs",
    "tests/src/sys.rs",
    "tests/src/runtime.rs",
];

/// Where the agent meets the outside world, and values become text.
const SERDE_HOMES: [&str; 5] = ["api", "cli", "config", "integrations", "store"];

/// What a rule says of one file.
type Check = fn(&File) -> Vec<Breach>;

const RULES: [(&str, Check); 12] = [
    ("aya", aya),
    ("netfilter", netfilter),
    ("netlink", netlink),
    ("serde", serde),
    ("unsafe", unsafe_code),
    ("head", head),
    ("length", length),
    ("unfinished", unfinished),
    ("exceptions", exceptions),
    ("sleep", sleep),
    ("links", links),
    ("promises", promises),
];

/// One place that breaks a rule.
#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) rule: &'static str,
    path: PathBuf,
    breach: Breach,
}

impl Display for Finding {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { rule, path, breach: Breach { line, message } } = self;
        write!(f, "{}:{line}: {message} (tidy: {rule})", path.display())
    }
}

/// The names of all rules.
pub(crate) fn rules() -> impl Iterator<Item = &'static str> {
    RULES.iter().map(|(name, _)| *name)
}

/// All that breaks a rule below `root`, in the order of paths.
pub(crate) fn findings(root: &Path) -> Result<Vec<Finding>> {
    let mut paths = Vec::new();
    walk(root, &mut paths)?;
    paths.sort();
    let mut findings = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let path = path.strip_prefix(root).unwrap_or(&path).to_owned();
        let file = File::new(root, path, text);
        for (rule, check) in RULES {
            let found = check(&file).into_iter();
            findings.extend(found.map(|breach| Finding { rule, path: file.path.clone(), breach }));
        }
    }
    Ok(findings)
}

/// Collects Rust and Markdown files, leaving out what cargo builds and what is hidden.
fn walk(directory: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    let list = || format!("list {}", directory.display());
    for entry in fs::read_dir(directory).with_context(list)? {
        let entry = entry.with_context(list)?;
        let (path, name) = (entry.path(), entry.file_name());
        let skipped = name == "target" || name.as_encoded_bytes().starts_with(b".");
        if entry.file_type().with_context(list)?.is_dir() {
            if !skipped {
                walk(&path, paths)?;
            }
        } else if matches!(path.extension().and_then(OsStr::to_str), Some("rs" | "md")) {
            paths.push(path);
        }
    }
    Ok(())
}

struct File<'a> {
    root: &'a Path,
    /// Relative to `root`.
    path: PathBuf,
    text: String,
    /// The text without comments and the insides of literals; empty unless it is Rust.
    code: String,
}

#[derive(Debug)]
struct Breach {
    /// From 1.
    line: usize,
    message: String,
}

impl<'a> File<'a> {
    fn new(root: &'a Path, path: PathBuf, text: String) -> Self {
        let is_rust = path.extension() == Some(OsStr::new("rs"));
        let code = if is_rust { code_only(&text) } else { String::new() };
        Self { root, path, text, code }
    }

    fn is_rust(&self) -> bool {
        self.path.extension() == Some(OsStr::new("rs"))
    }

    fn is_below(&self, directory: &str) -> bool {
        self.path.starts_with(directory)
    }

    /// Whether this is the module `name` below `directory`, as a file or inside its folder.
    fn is_module(&self, directory: &str, name: &str) -> bool {
        let Ok(rest) = self.path.strip_prefix(directory) else { return false };
        rest == Path::new(name).with_extension("rs") || rest.starts_with(name)
    }

    /// A breach for each place in the code where `is_found` sees a word it looks for.
    fn words(&self, is_found: impl Fn(&Word) -> bool, message: &str) -> Vec<Breach> {
        let found = self.code_words().filter(is_found);
        found.map(|word| self.breach(word.start, format!("{} {message}", word.text))).collect()
    }

    /// The identifiers of the code.
    fn code_words(&self) -> impl Iterator<Item = Word<'_>> {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        let mut end = 0;
        std::iter::from_fn(move || {
            let start = end + self.code[end..].find(is_part)?;
            let length = self.code[start..].find(|c| !is_part(c));
            end = length.map_or(self.code.len(), |length| start + length);
            let (before, after) = (&self.code[..start], &self.code[end..]);
            Some(Word { text: &self.code[start..end], start, before, after })
        })
    }

    fn breach(&self, offset: usize, message: String) -> Breach {
        Breach { line: self.text[..offset].matches('\n').count() + 1, message }
    }
}

struct Word<'a> {
    text: &'a str,
    /// In bytes, from the beginning of the file.
    start: usize,
    before: &'a str,
    after: &'a str,
}

fn aya(file: &File) -> Vec<Breach> {
    let agent = file.is_below("netdp/src") && !file.is_module("netdp/src/dataplane", "ebpf");
    let homes = [("tests/tests", "datapath"), ("tests/benches", "bpf")];
    let tests =
        file.is_below("tests") && !homes.iter().any(|(parent, name)| file.is_module(parent, name));
    if !agent && !tests {
        return Vec::new();
    }
    file.words(
        |word| word.text == "aya",
        "is for dataplane/ebpf (and the tests of its programs) alone",
    )
}

fn netfilter(file: &File) -> Vec<Breach> {
    let agent = file.is_below("netdp") || file.is_below("netdp-common");
    if !agent || file.is_module("netdp/src/dataplane", "iptables") {
        return Vec::new();
    }
    let call = "Command::new(";
    let mut breaches = Vec::new();
    for (at, _) in file.code.match_indices(call) {
        let argument = file.text[at + call.len()..].trim_start();
        let Some(literal) = argument.strip_prefix('"').and_then(|text| text.split('"').next())
        else {
            continue;
        };
        let program = literal.rsplit('/').next().unwrap_or(literal);
        if ["iptables", "ip6tables", "nft", "ebtables"].iter().any(|name| program.starts_with(name))
        {
            let message = format!("{program} is for dataplane/iptables alone to run");
            breaches.push(file.breach(at, message));
        }
    }
    breaches
}

fn netlink(file: &File) -> Vec<Breach> {
    if !file.is_below("netdp/src") || file.is_module("netdp/src", "netlink") {
        return Vec::new();
    }
    let is_netlink = |word: &Word| {
        matches!(word.text, "rtnetlink" | "netlink_sys") || word.text.starts_with("netlink_packet_")
    };
    file.words(is_netlink, "is for the netlink module alone")
}

fn serde(file: &File) -> Vec<Breach> {
    let agent = ["netdp/src", "netdp-common/src"].iter().any(|home| file.is_below(home));
    if !agent || SERDE_HOMES.iter().any(|home| file.is_module("netdp/src", home)) {
        return Vec::new();
    }
    let is_serde = |word: &Word| matches!(word.text, "serde" | "serde_json");
    file.words(is_serde, &format!("is for the edges alone: {}", SERDE_HOMES.join(", ")))
}

fn unsafe_code(file: &File) -> Vec<Breach> {
    if UNSAFE_HOMES.iter().any(|home| file.path == Path::new(home)) {
        return Vec::new();
    }
    // `#[unsafe(link_section = …)]` marks an attribute; it guards no code.
    let is_code = |word: &Word| {
        word.text == "unsafe" && !(word.before.ends_with('[') && word.after.starts_with('('))
    };
    file.words(is_code, "outside its homes, which xtask/src/tidy.rs lists")
}

fn head(file: &File) -> Vec<Breach> {
    if !file.is_rust() || file.text.starts_with("//! ") {
        return Vec::new();
    }
    vec![file.breach(0, "the file does not begin with `//!`: what it owns".to_owned())]
}

fn length(file: &File) -> Vec<Breach> {
    let lines = file.text.lines().count();
    if !file.is_rust() || lines <= LINE_LIMIT {
        return Vec::new();
    }
    vec![Breach { line: lines, message: format!("{lines} lines, over {LINE_LIMIT}: split it") }]
}

fn unfinished(file: &File) -> Vec<Breach> {
    let is_stub = |word: &Word| {
        matches!(word.text, "todo" | "unimplemented" | "dbg") && word.after.starts_with('!')
    };
    file.words(is_stub, "stays out of the tree")
}

fn exceptions(file: &File) -> Vec<Breach> {
    let is_exception = |word: &Word| {
        let attribute = word.before.ends_with("#[") || word.before.ends_with("#![");
        attribute && matches!(word.text, "allow" | "ignore")
    };
    file.words(is_exception, "hides a problem: #[expect] with a reason, or a test that skips")
}

fn sleep(file: &File) -> Vec<Breach> {
    let mut function = "";
    let mut previous = "";
    let mut breaches = Vec::new();
    for word in file.code_words() {
        if previous == "fn" {
            function = word.text;
        }
        let waits = function.contains("poll") || function.contains("deadline");
        if word.text == "sleep" && word.before.ends_with("thread::") && !waits {
            let message = "thread::sleep outside a function that polls with a deadline".to_owned();
            breaches.push(file.breach(word.start, message));
        }
        previous = word.text;
    }
    breaches
}

fn links(file: &File) -> Vec<Breach> {
    if file.path.extension() != Some(OsStr::new("md")) {
        return Vec::new();
    }
    let directory = file.path.parent().unwrap_or(Path::new(""));
    let mut breaches = Vec::new();
    let mut fenced = false;
    for (index, line) in file.text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        for target in link_targets(line).into_iter().filter(|_| !fenced) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let path = normal(&directory.join(path));
            if !path.is_some_and(|path| file.root.join(path).exists()) {
                let message = format!("link to {target}, which does not exist in the tree");
                breaches.push(Breach { line: index + 1, message });
            }
        }
    }
    breaches
}

/// What a line of Markdown links to: `[text](target)`, `[name]: target`, `src="target"`.
fn link_targets(line: &str) -> Vec<&str> {
    // Every second piece between backticks is code. A link whose text is code is torn apart
    // by that, but its target stands in one piece.
    let prose = || line.split('`').step_by(2);
    let mut targets = Vec::new();
    for (opening, closing) in [("](", [')', ' ']), ("src=\"", ['"', '"']), ("href=\"", ['"', '"'])]
    {
        for piece in prose().flat_map(|text| text.split(opening).skip(1)) {
            targets.extend(piece.split(closing).next());
        }
    }
    if let Some((name, target)) = line.trim_start().split_once("]: ")
        && name.starts_with('[')
    {
        targets.extend(target.split_whitespace().next());
    }
    targets
}

/// `path` without `..`; none when it leaves the tree.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::CurDir => {}
            Component::ParentDir => {
                if !normal.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(normal)
}

/// Where promises are tested; ids stand there as `("PUB-01",` or head the file.
const PROMISE_TESTS: [&str; 2] =
    ["tests/tests/conformance/main.rs", "tests/tests/lifecycle/main.rs"];

/// Where the list of families is that tests run in.
const PROMISE_FAMILIES: &str = "tests/src/net.rs";

/// Columns of the catalogue, from 0: the backend, and what tests call the family.
const COLUMNS: [(usize, &str, &str); 4] =
    [(3, "ebpf", "Ipv4"), (4, "ebpf", "Ipv6"), (5, "iptables", "Ipv4"), (6, "iptables", "Ipv6")];

/// Begins the list of promises that a backend does not keep: `("PUB-01", FAMILIES, Unkept::…`.
const UNKEPT: &str = "const UNKEPT_BY_IPTABLES";

/// The tests, and the list of what iptables does not keep.
fn split_unkept(tests: &str) -> (String, &str) {
    let Some((before, rest)) = tests.split_once(UNKEPT) else { return (tests.to_owned(), "") };
    let (unkept, after) = rest.split_once("];").unwrap_or((rest, ""));
    (format!("{before}{after}"), unkept)
}

/// Whether the list names a promise in a family.
fn is_unkept(list: &str, id: &str, family: &str) -> bool {
    let name = format!("\"{id}\",");
    let entries = list.split(&name).skip(1);
    let mut families = entries.filter_map(|entry| entry.split("Unkept::").next());
    families.any(|families| families.contains("FAMILIES") || families.contains(family))
}

/// The catalogue says ✅ where there is a test by that id for that backend and family, and nowhere
/// else.
fn promises(file: &File) -> Vec<Breach> {
    if file.path != Path::new("docs/behaviour.md") {
        return Vec::new();
    }
    let read = |path| fs::read_to_string(file.root.join(path)).unwrap_or_default();
    let tests = PROMISE_TESTS.map(read).concat();
    let (tests, unkept) = split_unkept(&tests);
    let families = read(PROMISE_FAMILIES);
    let families = families.lines().find(|line| line.contains("const FAMILIES")).unwrap_or("");
    let mut breaches = Vec::new();
    for (line, text) in (1..).zip(file.text.lines()) {
        let Some(row) = text.strip_prefix("| ") else { continue };
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let id = cells[0];
        let is_id = id.split_once('-').is_some_and(|(_, number)| number.parse::<u8>().is_ok());
        if !is_id {
            continue;
        }
        let tested = tests.contains(&format!("(\"{id}\",")) || tests.contains(&format!("//! {id}"));
        for (column, backend, family) in COLUMNS {
            let kept = cells.get(column) == Some(&"✅");
            let tested = tested && families.contains(&format!("Family::{family}"));
            let tested = tested && (backend == "ebpf" || !is_unkept(unkept, id, family));
            let message = match (kept, tested) {
                (true, false) => format!("{id} is ✅ for {backend}, {family} without a test"),
                (false, true) => format!("{id} has a test for {backend}, {family}, yet no ✅"),
                _ => continue,
            };
            breaches.push(Breach { line, message });
        }
    }
    breaches
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules that `text` breaks at `path`, as `rule:line`, for all but the file's head.
    #[track_caller]
    fn check(path: &str, text: &str, expected: &[&str]) {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, text).unwrap();
        let found = findings(root.path()).unwrap();
        let found = found.iter().filter(|finding| finding.rule != "head");
        let found: Vec<_> = found.map(|f| format!("{}:{}", f.rule, f.breach.line)).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn aya_is_named_by_the_ebpf_dataplane_alone() {
        let text = "use std::fs;\nuse aya::Ebpf;\n";
        check("netdp/src/plan.rs", text, &["aya:2"]);
        check("tests/src/lab.rs", text, &["aya:2"]);
        for home in ["netdp/src/dataplane/ebpf.rs", "netdp/src/dataplane/ebpf/maps.rs"] {
            check(home, text, &[]);
        }
        check("tests/tests/datapath/main.rs", text, &[]);
        check("tests/benches/bpf/ends.rs", text, &[]);
        check("netdp/src/plan.rs", "// aya\nlet aya_like = \"aya\";", &[]);
    }

    #[test]
    fn netfilter_is_run_by_the_iptables_dataplane_alone() {
        let text = "let name = \"iptables\";\nCommand::new(\n  \"/usr/sbin/ip6tables-restore\")";
        check("netdp/src/controller.rs", text, &["netfilter:2"]);
        check("netdp/src/dataplane/iptables/tool.rs", text, &[]);
        check("tests/src/lab.rs", text, &[]);
    }

    #[test]
    fn netlink_is_opened_by_its_module_alone() {
        let text = "use rtnetlink::Handle;\nuse netlink_packet_route::link::LinkMessage;";
        check("netdp/src/controller.rs", text, &["netlink:1", "netlink:2"]);
        check("netdp/src/netlink/links.rs", text, &[]);
    }

    #[test]
    fn serde_stays_at_the_edges() {
        let text = "#[derive(serde::Serialize)]\nstruct A;";
        check("netdp/src/plan.rs", text, &["serde:1"]);
        check("netdp-common/src/flow.rs", text, &["serde:1"]);
        check("netdp/src/store.rs", text, &[]);
        check("netdp/src/api/wire.rs", text, &[]);
    }

    #[test]
    fn unsafe_code_stays_in_its_files() {
        check("netdp/src/plan.rs", "fn f() {\n    unsafe { g() }\n}", &["unsafe:2"]);
        check("netdp/src/dataplane/ebpf/sys.rs", "unsafe fn f() {}", &[]);
        check("netdp-ebpf/src/main.rs", "#[unsafe(no_mangle)]\nstatic A: u8 = 0;", &[]);
        check("netdp/src/lib.rs", "#![deny(unsafe_op_in_unsafe_fn)]", &[]);
    }

    #[test]
    fn file_begins_with_what_it_owns() {
        let head_breaches = |text: &str| {
            let file = File::new(Path::new(""), "a.rs".into(), text.to_owned());
            head(&file).len()
        };
        assert_eq!(head_breaches("//! Owns a.\n"), 0);
        assert_eq!(head_breaches("use std::fs;\n//! Late.\n"), 1);
    }

    #[test]
    fn long_file_is_found() {
        check("a.rs", &"\n".repeat(LINE_LIMIT), &[]);
        check("a.rs", &"\n".repeat(LINE_LIMIT + 1), &["length:901"]);
    }

    #[test]
    fn stubs_and_exceptions_are_found_outside_literals_and_comments() {
        let text = "fn f() { todo!() }\n#[ignore = \"x\"]\n#![allow(dead_code)]\ndbg!(1);";
        let expected = ["unfinished:1", "unfinished:4", "exceptions:2", "exceptions:3"];
        check("a.rs", text, &expected);
        check("a.rs", "// todo!()\nlet a = \"#[allow(x)]\"; // dbg!(a)", &[]);
    }

    #[test]
    fn sleep_is_for_polling() {
        check("a.rs", "fn f() {\n    thread::sleep(d);\n}", &["sleep:2"]);
        check("a.rs", "fn poll_until() {\n    std::thread::sleep(d);\n}", &[]);
    }

    #[test]
    fn relative_links_resolve() {
        let good = "[a](#b) [b](https://x.example/y) [c](b.md#d) `[d](e.md)`\n```\n[e](f)\n```\n";
        check("docs/b.md", good, &[]);
        let bad =
            "[a](no.md)\n![b](../no.svg \"t\")\n[c]: no/c.md\n<img src=\"no.svg\">\n[`d`](../../x)";
        let expected = ["links:1", "links:2", "links:3", "links:4", "links:5"];
        check("docs/b.md", bad, &expected);
    }

    #[test]
    fn promises_are_kept_by_tests_of_their_name_and_family() {
        let head = "| id | x | y | 4 | 6 | 4 | 6 | note |\n|---|---|---|---|---|---|---|---|\n";
        let rows = format!(
            "{head}| PUB-01 | a | b | ✅ | ❌ | ❌ | ❌ | |\n| PUB-02 | a | b | ❌ | ❌ | ❌ | ❌ | ✅ |\n\
             | PUB-03 | a | b | ✅ | ❌ | ❌ | ❌ | |\n| PUB-04 | a | b | ✅ | ✅ | ❌ | ✅ | |\n"
        );
        check("docs/other.md", &rows, &[]);
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let found = || {
            let file = File::new(root.path(), "docs/behaviour.md".into(), rows.clone());
            promises(&file).iter().map(|breach| breach.line).collect::<Vec<_>>()
        };
        // Without any test each ✅ is a lie.
        assert_eq!(found(), [3, 5, 6, 6, 6]);
        let unkept = "const UNKEPT_BY_IPTABLES: … = &[\n(\"PUB-01\", FAMILIES, Unkept::For(1)),\n\
                      (\"PUB-02\",\nFAMILIES,\nUnkept::For(1)),\n\
                      (\"PUB-03\", FAMILIES, Unkept::For(1)),\n\
                      (\"PUB-04\", &[Family::Ipv4], Unkept::For(1)),\n];\n";
        let checks = "(\"PUB-01\", f), (\"PUB-02\", g), (\"PUB-04\", h)";
        write(PROMISE_TESTS[0], &format!("{unkept}{checks}"));
        write(PROMISE_FAMILIES, "const FAMILIES: &[Family] = &[Family::Ipv4];");
        assert_eq!(found(), [4, 5, 6, 6]);
        write(PROMISE_FAMILIES, "const FAMILIES: &[Family] = &[Family::Ipv4, Family::Ipv6];");
        assert_eq!(found(), [3, 4, 4, 5]);
        // What the list does not name is kept.
        write(PROMISE_TESTS[0], checks);
        assert_eq!(found(), [3, 3, 3, 4, 4, 4, 4, 5, 6]);
    }

    #[test]
    fn every_finding_is_reported_with_its_place() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("target")).unwrap();
        fs::write(root.path().join("target/built.rs"), "todo!()").unwrap();
        fs::write(root.path().join("a.rs"), "//! A.\nfn f() {}\nfn g() { todo!() }").unwrap();
        let found: Vec<_> = findings(root.path()).unwrap().iter().map(Finding::to_string).collect();
        assert_eq!(found, ["a.rs:3: todo stays out of the tree (tidy: unfinished)"]);
    }
}
