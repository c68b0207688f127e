//! Telling Rust code from the comments and literals in it, well enough to search it for
//! words. Knows no rule that is searched for.

use std::iter::repeat_n;

/// `source` with comments and the insides of literals blanked, byte for byte: an offset or a
/// line in one is the same place in the other.
pub(crate) fn code_only(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut masked = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &source[at..];
        let (blank_from, end) = match skipped(rest, masked.last().copied()) {
            Some(Skip { open, length }) => (at + open, at + length),
            None => {
                let length = rest.chars().next().map_or(1, char::len_utf8);
                (at + length, at + length)
            }
        };
        masked.extend_from_slice(&bytes[at..blank_from]);
        masked
            .extend(bytes[blank_from..end].iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
        at = end;
    }
    // Blanking replaces whole comments and literals, never a part of a character.
    String::from_utf8(masked).unwrap_or_else(|_| repeat_n(' ', source.len()).collect())
}

/// A comment or literal: `length` bytes, of which the first `open` stay visible.
struct Skip {
    open: usize,
    length: usize,
}

fn skipped(rest: &str, before: Option<u8>) -> Option<Skip> {
    let in_word = before.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if rest.starts_with("//") {
        return Some(Skip { open: 0, length: rest.find('\n').unwrap_or(rest.len()) });
    }
    if rest.starts_with("/*") {
        return Some(Skip { open: 0, length: block_comment(rest) });
    }
    if let Some(skip) = (!in_word).then(|| raw_string(rest)).flatten() {
        return Some(skip);
    }
    if rest.starts_with('"') {
        return Some(Skip { open: 1, length: quoted(rest, '"') });
    }
    // A quote also begins a lifetime, which has no closing one.
    let mut after_quote = rest.strip_prefix('\'')?.chars();
    let first = after_quote.next()?;
    (first == '\\' || after_quote.next() == Some('\''))
        .then(|| Skip { open: 1, length: quoted(rest, '\'') })
}

/// The length of the literal at the start of `rest`, closing quote included.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

fn raw_string(rest: &str) -> Option<Skip> {
    let start = rest.strip_prefix("br").or_else(|| rest.strip_prefix("cr"));
    let start = start.or_else(|| rest.strip_prefix('r'))?;
    let hashes = start.len() - start.trim_start_matches('#').len();
    let body = start[hashes..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    let open = rest.len() - body.len();
    let length = body.find(&close).map_or(rest.len(), |at| open + at + close.len());
    Some(Skip { open, length })
}

/// Block comments nest.
fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest.as_bytes()[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest.as_bytes()[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(source: &str, words: &[&str]) {
        let masked = code_only(source);
        assert_eq!(masked.len(), source.len());
        let found: Vec<_> = masked.split(|c: char| !c.is_alphanumeric()).collect();
        let found: Vec<_> = found.into_iter().filter(|word| !word.is_empty()).collect();
        assert_eq!(found, words, "{masked}");
    }

    #[test]
    fn comments_are_blanked() {
        check("a // b\nc /* d /* e */ f */ g", &["a", "c", "g"]);
    }

    #[test]
    fn literals_are_blanked() {
        check(r#"a("b \" // c") d"#, &["a", "d"]);
        check(r##"a(r#"b " c"#, br"d\") e"##, &["a", "r", "br", "e"]);
        check(r"a('b', '\'', '\u{1}') c", &["a", "c"]);
        check("bar\"x\" é", &["bar", "é"]);
    }

    #[test]
    fn lifetimes_are_code() {
        check("fn a<'b>(c: &'b str)", &["fn", "a", "b", "c", "b", "str"]);
        check("'static, 'é'", &["static"]);
    }

    #[test]
    fn lines_stay_where_they_are() {
        assert_eq!(code_only("/* a\nb */ c").lines().nth(1).map(str::trim), Some("c"));
    }
}
