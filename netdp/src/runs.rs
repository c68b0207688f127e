//! Maps of ports, kept as runs: ports that follow each other and lead to what follows each other, too,
//! are one entry. There may be tens of thousands of published ports, and nearly all come in ranges.
//!
//! Seen from outside, a map from single ports to single values. Knows nothing of what they are.

use std::{collections::BTreeMap, iter, ops::RangeInclusive};

use crate::difference::Step;

/// A key with a port in it.
pub trait Ported: Copy {
    /// All of it but the port.
    type Line: Copy + Ord;

    /// Its line, and its port.
    fn split(self) -> (Self::Line, u16);

    /// The key with this port.
    fn join(line: Self::Line, port: u16) -> Self;
}

/// A value that changes with the port along a run, or does not.
pub trait Along: Copy + PartialEq {
    /// The value of the port that comes so many after this one's.
    #[must_use]
    fn along(self, ports: u16) -> Self;
}

impl Along for () {
    fn along(self, _ports: u16) {}
}

impl Along for &str {
    fn along(self, _ports: u16) -> Self {
        self
    }
}

/// Another port.
impl Along for u16 {
    fn along(self, ports: u16) -> Self {
        self.wrapping_add(ports)
    }
}

/// A sorted map from ports to values. Equal ones have equal runs: each is as long as it can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs<K: Ported, V> {
    /// By line and first port.
    runs: BTreeMap<(K::Line, u16), Run<V>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run<V> {
    last: u16,
    /// Of the first port.
    value: V,
}

/// Some ports of a line, the first one's value with them.
#[derive(Clone, Copy)]
struct Part<L, V> {
    line: L,
    first: u16,
    last: u16,
    value: V,
}

impl<L: Copy + Ord, V: Along> Part<L, V> {
    /// What begins at a later port of it.
    fn from(self, first: u16) -> Self {
        Self { first, value: self.value.along(first - self.first), ..self }
    }

    /// Takes away the ports up to `last`; `None` where nothing is left.
    fn beyond(self, last: u16) -> Option<Self> {
        (last < self.last).then(|| self.from(last + 1))
    }

    fn ports(self) -> impl Iterator<Item = (u16, V)> {
        (self.first..=self.last).map(move |port| (port, self.value.along(port - self.first)))
    }
}

impl<K: Ported, V> Default for Runs<K, V> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<K: Ported, V: Along> Runs<K, V> {
    /// Sets a port's value.
    pub fn insert(&mut self, key: K, value: V) {
        let (_, port) = key.split();
        self.insert_run(key, port, value);
    }

    /// Sets the values of `key` and the ports after it up to `last`; `value` is the first one's.
    pub fn insert_run(&mut self, key: K, mut last: u16, mut value: V) {
        let (line, mut first) = key.split();
        if last < first {
            return;
        }
        self.cut(line, first..=last);
        if let Some(before) = self.run_before(line, first)
            && before.last.checked_add(1) == Some(first)
            && before.value.along(first - before.first) == value
        {
            (first, value) = (before.first, before.value);
        }
        if let Some(next) = last.checked_add(1)
            && let Some(after) = self.runs.get(&(line, next))
            && value.along(next - first) == after.value
        {
            last = after.last;
            self.runs.remove(&(line, next));
        }
        self.runs.insert((line, first), Run { last, value });
    }

    /// Takes a port away; returns the value that it had.
    pub fn remove(&mut self, key: K) -> Option<V> {
        let value = self.get(key)?;
        let (line, port) = key.split();
        self.cut(line, port..=port);
        Some(value)
    }

    /// A port's value.
    pub fn get(&self, key: K) -> Option<V> {
        let (line, port) = key.split();
        let ((found, first), run) = self.runs.range(..=(line, port)).next_back()?;
        let is_in = *found == line && port <= run.last;
        is_in.then(|| run.value.along(port - first))
    }

    /// Whether a port has a value.
    pub fn contains_key(&self, key: K) -> bool {
        self.get(key).is_some()
    }

    /// How many ports there are.
    pub fn len(&self) -> usize {
        self.parts().map(|part| usize::from(part.last - part.first) + 1).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Takes all away.
    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// Keeps the ports that `is_kept` says.
    pub fn retain(&mut self, mut is_kept: impl FnMut(K, V) -> bool) {
        let gone: Vec<K> =
            self.iter().filter(|&(key, value)| !is_kept(key, value)).map(|(key, _)| key).collect();
        for key in gone {
            self.remove(key);
        }
    }

    /// All ports with their values, in the order of lines and ports.
    pub fn iter(&self) -> impl Iterator<Item = (K, V)> {
        self.parts().flat_map(|part| {
            part.ports().map(move |(port, value)| (K::join(part.line, port), value))
        })
    }

    /// All ports, in the same order.
    pub fn keys(&self) -> impl Iterator<Item = K> {
        self.iter().map(|(key, _)| key)
    }

    /// The runs: the first port, the number of the last one, the value of the first.
    pub fn runs(&self) -> impl Iterator<Item = (K, u16, V)> {
        self.parts().map(|part| (K::join(part.line, part.first), part.last, part.value))
    }

    /// What leads from this map to `next`, port by port; takes as long as there are runs and changes.
    pub fn steps<'a>(&'a self, next: &'a Self) -> impl Iterator<Item = Step<K, V>> {
        let (mut olds, mut news) = (self.parts(), next.parts());
        let (mut old, mut new) = (olds.next(), news.next());
        let changes = iter::from_fn(move || {
            loop {
                let (is_new, part) = match (old, new) {
                    (None, None) => return None,
                    (Some(before), None) => {
                        old = olds.next();
                        (false, before)
                    }
                    (None, Some(after)) => {
                        new = news.next();
                        (true, after)
                    }
                    (Some(before), Some(after)) => {
                        let (from, to) = ((before.line, before.first), (after.line, after.first));
                        if from == to {
                            let last = before.last.min(after.last);
                            old = before.beyond(last).or_else(|| olds.next());
                            new = after.beyond(last).or_else(|| news.next());
                            if before.value == after.value {
                                continue;
                            }
                            (true, Part { last, ..after })
                        } else if from < to {
                            let last = match before.line == after.line {
                                true => before.last.min(after.first - 1),
                                false => before.last,
                            };
                            old = before.beyond(last).or_else(|| olds.next());
                            (false, Part { last, ..before })
                        } else {
                            let last = match before.line == after.line {
                                true => after.last.min(before.first - 1),
                                false => after.last,
                            };
                            new = after.beyond(last).or_else(|| news.next());
                            (true, Part { last, ..after })
                        }
                    }
                };
                return Some((is_new, part));
            }
        });
        changes.flat_map(|(is_new, part)| {
            part.ports().map(move |(port, value)| {
                let key = K::join(part.line, port);
                if is_new { Step::Put(key, value) } else { Step::Remove(key) }
            })
        })
    }

    fn parts(&self) -> impl Iterator<Item = Part<K::Line, V>> {
        self.runs.iter().map(|(&(line, first), &Run { last, value })| Part {
            line,
            first,
            last,
            value,
        })
    }

    /// The last run of a line that begins before `port`.
    fn run_before(&self, line: K::Line, port: u16) -> Option<Part<K::Line, V>> {
        let (&(found, first), &Run { last, value }) =
            self.runs.range(..(line, port)).next_back()?;
        (found == line).then_some(Part { line, first, last, value })
    }

    /// Takes these ports away, whatever runs they are in.
    fn cut(&mut self, line: K::Line, ports: RangeInclusive<u16>) {
        let (first, last) = ports.into_inner();
        let begun = self.run_before(line, first).filter(|part| part.last >= first);
        if let Some(Part { first: begin, value, .. }) = begun {
            self.runs.insert((line, begin), Run { last: first - 1, value });
        }
        let within = self.runs.extract_if((line, first)..=(line, last), |_, _| true);
        let within =
            within.map(|((line, first), Run { last, value })| Part { line, first, last, value });
        // Of the runs that are cut only the last can reach beyond.
        let left = begun.into_iter().chain(within).filter_map(|part| part.beyond(last)).last();
        if let Some(Part { first, last, value, .. }) = left {
            self.runs.insert((line, first), Run { last, value });
        }
    }
}

impl<K: Ported, V: Along> Extend<(K, V)> for Runs<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

impl<K: Ported, V: Along> FromIterator<(K, V)> for Runs<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut runs = Self::default();
        runs.extend(entries);
        runs
    }
}

impl<K: Ported, V: Along, const N: usize> From<[(K, V); N]> for Runs<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::difference;

    /// A line's letter, and a port.
    type Key = (char, u16);

    impl Ported for Key {
        type Line = char;

        fn split(self) -> (char, u16) {
            self
        }

        fn join(line: char, port: u16) -> Self {
            (line, port)
        }
    }

    fn singles(runs: &Runs<Key, u16>) -> BTreeMap<Key, u16> {
        runs.iter().collect()
    }

    #[test]
    fn neighbours_that_lead_to_neighbours_are_one_run() {
        let mut runs = Runs::from([(('a', 80), 8080), (('a', 82), 8082), (('b', 81), 8081)]);
        assert_eq!(runs.runs.len(), 3);
        runs.insert(('a', 81), 8081);
        let found: Vec<_> = runs.runs().collect();
        assert_eq!(found, [(('a', 80), 82, 8080), (('b', 81), 81, 8081)]);
        // One in the middle that leads elsewhere parts the run in three.
        runs.insert(('a', 81), 90);
        let found: Vec<_> = runs.runs().take(3).collect();
        assert_eq!(found, [(('a', 80), 80, 8080), (('a', 81), 81, 90), (('a', 82), 82, 8082)]);
        assert_eq!(
            (runs.get(('a', 82)), runs.get(('a', 83)), runs.get(('b', 80))),
            (Some(8082), None, None)
        );
    }

    #[test]
    fn all_ports_of_a_line_are_one_run() {
        let mut runs = Runs::default();
        runs.insert_run(('a', 0), u16::MAX, 0);
        assert_eq!((runs.runs.len(), runs.len()), (1, 65_536));
        assert_eq!(runs.remove(('a', u16::MAX)), Some(u16::MAX));
        assert_eq!(runs.remove(('a', 0)), Some(0));
        assert_eq!((runs.runs.len(), runs.len()), (1, 65_534));
        assert_eq!(runs.remove(('a', 0)), None);
        runs.insert(('a', u16::MAX), u16::MAX);
        runs.insert(('a', 0), 0);
        assert_eq!((runs.runs.len(), runs.len()), (1, 65_536));
    }

    /// A sequence of small numbers that looks random and is the same each time.
    fn numbers() -> impl FnMut(u16) -> u16 {
        let mut state = 1u64;
        move |below| {
            // Knuth's MMIX.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % u64::from(below)) as u16
        }
    }

    #[test]
    fn a_map_of_runs_is_as_a_map_of_ports() {
        let mut draw = numbers();
        let (mut runs, mut plain) = (Runs::default(), BTreeMap::new());
        for _ in 0..20_000 {
            let before = (runs.clone(), plain.clone());
            // Few ports, at the end of the port space and not, so that all meets.
            let base = if draw(2) == 0 { 100 } else { u16::MAX - 11 };
            let (line, first) = (if draw(2) == 0 { 'a' } else { 'b' }, base + draw(12));
            let last = first.saturating_add(draw(6)).min(base + 11);
            let value = first.wrapping_add(draw(2));
            match draw(3) {
                0 => {
                    assert_eq!(runs.remove((line, first)), plain.remove(&(line, first)));
                }
                1 => {
                    runs.insert((line, first), value);
                    plain.insert((line, first), value);
                }
                _ => {
                    runs.insert_run((line, first), last, value);
                    plain.extend(
                        (first..=last).map(|port| ((line, port), value.along(port - first))),
                    );
                }
            }
            assert_eq!(singles(&runs), plain);
            assert_eq!(runs.len(), plain.len());
            // However it came about.
            assert_eq!(runs, plain.iter().rev().map(|(&key, &value)| (key, value)).collect());
            let steps: Vec<_> = before.0.steps(&runs).collect();
            let expected: Vec<_> = difference::steps(&before.1, &plain).map(Step::copied).collect();
            assert_eq!(steps, expected);
        }
    }

    #[test]
    fn what_is_far_apart_differs_as_a_whole() {
        let mut draw = numbers();
        let mut any = || -> Runs<Key, u16> {
            let mut runs = Runs::default();
            for _ in 0..draw(8) {
                let (line, first) = (if draw(2) == 0 { 'a' } else { 'b' }, draw(30));
                runs.insert_run((line, first), first + draw(9), first + 10 * draw(2));
            }
            runs
        };
        for _ in 0..5000 {
            let (old, new) = (any(), any());
            let steps: Vec<_> = old.steps(&new).collect();
            let (before, after) = (singles(&old), singles(&new));
            let expected: Vec<_> = difference::steps(&before, &after).map(Step::copied).collect();
            assert_eq!(steps, expected);
        }
    }
}
