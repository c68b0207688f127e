//! What leads from one sorted map to another, found in one walk over both: there are tens of thousands
//! of published ports, and a change is most often of one.

use std::{cmp::Ordering, collections::BTreeMap, iter};

/// One step from an old map to a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<K, V> {
    /// The key has another value, or had none.
    Put(K, V),
    /// The key is gone.
    Remove(K),
}

impl<K: Copy, V: Copy> Step<&K, &V> {
    /// The same step, of copies.
    pub(crate) fn copied(self) -> Step<K, V> {
        match self {
            Self::Put(&key, &value) => Step::Put(key, value),
            Self::Remove(&key) => Step::Remove(key),
        }
    }
}

/// All steps, in the order of the keys.
pub(crate) fn steps<'a, K: Ord, V: PartialEq>(
    old: &'a BTreeMap<K, V>,
    new: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = Step<&'a K, &'a V>> {
    let (mut old, mut new) = (old.iter().peekable(), new.iter().peekable());
    iter::from_fn(move || {
        loop {
            let order = match (old.peek(), new.peek()) {
                (Some((old, _)), Some((new, _))) => old.cmp(new),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return None,
            };
            match order {
                Ordering::Less => return old.next().map(|(key, _)| Step::Remove(key)),
                Ordering::Greater => return new.next().map(|(key, value)| Step::Put(key, value)),
                Ordering::Equal => {
                    let ((_, before), (key, after)) = (old.next()?, new.next()?);
                    if before != after {
                        return Some(Step::Put(key, after));
                    }
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_lead_from_the_old_map_to_the_new_one() {
        let old = BTreeMap::from([(1, 'a'), (2, 'b'), (3, 'c'), (7, 'g')]);
        let new = BTreeMap::from([(0, 'z'), (2, 'b'), (3, 'd'), (9, 'i')]);
        let found: Vec<_> = steps(&old, &new).collect();
        let expected = [
            Step::Put(&0, &'z'),
            Step::Remove(&1),
            Step::Put(&3, &'d'),
            Step::Remove(&7),
            Step::Put(&9, &'i'),
        ];
        assert_eq!(found, expected);
        assert_eq!(steps(&new, &new).count(), 0);
        assert_eq!(steps(&BTreeMap::new(), &new).count(), new.len());
        assert_eq!(steps(&old, &BTreeMap::new()).count(), old.len());
    }
}
