//! The maps that the agent writes, typed, and bringing them to what an image says.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use bytemuck::{Pod, Zeroable};

use netdp_common::interface::Slot;

use super::{
    image::Prefix,
    sys::{Wire, delete_batch, for_each_batch, update_batch},
};
use crate::{
    difference::{Step, steps},
    runs::{Along, Ported, Runs},
};

/// A map whose whole contents the agent decides.
pub(super) struct Table<M> {
    name: &'static str,
    map: M,
}

/// Somebody else may have been faster with a deletion: a program, or an operator.
pub(super) fn absent_is_fine(deleted: Result<(), MapError>) -> Result<(), MapError> {
    match deleted {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        deleted => deleted,
    }
}

/// The kinds of maps a [`Table`] can be.
pub(super) trait Backing<K: Copy, V: Copy> {
    fn entries(&self) -> Result<BTreeMap<K, V>, MapError>;
    fn write(&mut self, key: K, value: V) -> Result<(), MapError>;
    fn delete(&mut self, key: K) -> Result<(), MapError>;

    /// Writes entries in their order; how many, and why not all.
    fn write_all(&mut self, entries: &[(K, V)]) -> (usize, Result<(), MapError>) {
        for (done, &(key, value)) in entries.iter().enumerate() {
            if let Err(error) = self.write(key, value) {
                return (done, Err(error));
            }
        }
        (entries.len(), Ok(()))
    }

    /// Deletes entries in their order, those that are there; how many are not any more, and why not
    /// all.
    fn delete_all(&mut self, keys: &[K]) -> (usize, Result<(), MapError>) {
        for (done, &key) in keys.iter().enumerate() {
            if let Err(error) = absent_is_fine(self.delete(key)) {
                return (done, Err(error));
            }
        }
        (keys.len(), Ok(()))
    }
}

/// What a map holds, as a table keeps it in mind.
pub(super) trait Contents<K, V>: Extend<(K, V)> {
    /// What leads to other contents.
    fn steps<'a>(&'a self, next: &'a Self) -> impl Iterator<Item = Step<K, V>>
    where
        K: 'a,
        V: 'a;

    /// Whether there is an entry.
    fn has(&self, key: K) -> bool;

    /// Takes an entry out.
    fn take(&mut self, key: K);
}

impl<K: Copy + Ord, V: Copy + PartialEq> Contents<K, V> for BTreeMap<K, V> {
    fn steps<'a>(&'a self, next: &'a Self) -> impl Iterator<Item = Step<K, V>>
    where
        K: 'a,
        V: 'a,
    {
        steps(self, next).map(Step::copied)
    }

    fn has(&self, key: K) -> bool {
        self.contains_key(&key)
    }

    fn take(&mut self, key: K) {
        self.remove(&key);
    }
}

impl<K: Ported, V: Along> Contents<K, V> for Runs<K, V> {
    fn steps<'a>(&'a self, next: &'a Self) -> impl Iterator<Item = Step<K, V>>
    where
        K: 'a,
        V: 'a,
    {
        Self::steps(self, next)
    }

    fn has(&self, key: K) -> bool {
        self.contains_key(key)
    }

    fn take(&mut self, key: K) {
        self.remove(key);
    }
}

pub(super) type Hash<K, V> = HashMap<MapData, Wire<K>, Wire<V>>;
pub(super) type Lpm<K, V> = LpmTrie<MapData, Wire<K>, Wire<V>>;
pub(super) type Indexed<V> = Array<MapData, Wire<V>>;

impl<K: Pod + Ord, V: Pod> Backing<K, V> for Hash<K, V> {
    fn entries(&self) -> Result<BTreeMap<K, V>, MapError> {
        self.iter().map(|entry| entry.map(|(key, value)| (key.0, value.0))).collect()
    }

    fn write(&mut self, key: K, value: V) -> Result<(), MapError> {
        self.insert(Wire(key), Wire(value), 0)
    }

    fn delete(&mut self, key: K) -> Result<(), MapError> {
        self.remove(&Wire(key))
    }
}

/// A hash map that changes by tens of thousands of entries at once.
pub(super) struct Batched<K: Pod, V: Pod> {
    map: Hash<K, V>,
    /// Of the same map.
    fd: OwnedFd,
}

impl<K: Pod, V: Pod> TryFrom<Map> for Batched<K, V> {
    type Error = MapError;

    fn try_from(map: Map) -> Result<Self, MapError> {
        let fd = match &map {
            Map::HashMap(data) => data.fd().as_fd().try_clone_to_owned(),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        // The wrong kind of map is refused here, by name.
        let map = map.try_into()?;
        Ok(Self { map, fd: fd? })
    }
}

impl<K: Pod + Ord, V: Pod> Backing<K, V> for Batched<K, V> {
    fn entries(&self) -> Result<BTreeMap<K, V>, MapError> {
        let mut entries = BTreeMap::new();
        let read = for_each_batch(self.fd.as_fd(), |keys: &[K], values: &[V]| {
            entries.extend(keys.iter().copied().zip(values.iter().copied()));
            Ok::<_, MapError>(())
        });
        read.map_err(MapError::IoError)??;
        Ok(entries)
    }

    fn write(&mut self, key: K, value: V) -> Result<(), MapError> {
        Backing::write(&mut self.map, key, value)
    }

    fn delete(&mut self, key: K) -> Result<(), MapError> {
        self.map.delete(key)
    }

    fn write_all(&mut self, entries: &[(K, V)]) -> (usize, Result<(), MapError>) {
        let (keys, values): (Vec<K>, Vec<V>) = entries.iter().copied().unzip();
        let (done, outcome) = update_batch(self.fd.as_fd(), &keys, &values);
        (done, outcome.map_err(MapError::IoError))
    }

    fn delete_all(&mut self, keys: &[K]) -> (usize, Result<(), MapError>) {
        let mut gone = 0;
        while gone < keys.len() {
            let (done, outcome) = delete_batch(self.fd.as_fd(), &keys[gone..]);
            gone += done;
            match outcome {
                Ok(()) => {}
                // Somebody was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => gone += 1,
                Err(error) => return (gone, Err(MapError::IoError(error))),
            }
        }
        (gone, Ok(()))
    }
}

impl<K: Pod + Ord, V: Pod> Backing<Prefix<K>, V> for Lpm<K, V> {
    fn entries(&self) -> Result<BTreeMap<Prefix<K>, V>, MapError> {
        self.iter()
            .map(|entry| entry.map(|(key, value)| ((key.prefix_len(), key.data().0), value.0)))
            .collect()
    }

    fn write(&mut self, (length, data): Prefix<K>, value: V) -> Result<(), MapError> {
        self.insert(&Key::new(length, Wire(data)), Wire(value), 0)
    }

    fn delete(&mut self, (length, data): Prefix<K>) -> Result<(), MapError> {
        self.remove(&Key::new(length, Wire(data)))
    }
}

/// In an array, an entry of zeros is none.
impl<V: Pod + Zeroable + PartialEq> Backing<u32, V> for Indexed<V> {
    fn entries(&self) -> Result<BTreeMap<u32, V>, MapError> {
        (0..)
            .zip(self.iter())
            .filter(|(_, value)| !value.as_ref().is_ok_and(|value| value.0 == V::zeroed()))
            .map(|(index, value)| Ok((index, value?.0)))
            .collect()
    }

    fn write(&mut self, index: u32, value: V) -> Result<(), MapError> {
        self.set(index, Wire(value), 0)
    }

    fn delete(&mut self, index: u32) -> Result<(), MapError> {
        self.set(index, Wire(V::zeroed()), 0)
    }
}

/// INTERFACE_SLOT. A write to an array is not done at once, and the programs read meanwhile: they find
/// no interface there while it changes, and look in INTERFACE.
pub(super) struct Slots(Indexed<Slot>);

impl TryFrom<Map> for Slots {
    type Error = MapError;

    fn try_from(map: Map) -> Result<Self, MapError> {
        map.try_into().map(Self)
    }
}

impl Backing<u32, Slot> for Slots {
    fn entries(&self) -> Result<BTreeMap<u32, Slot>, MapError> {
        self.0.entries()
    }

    fn write(&mut self, index: u32, slot: Slot) -> Result<(), MapError> {
        let there = self.0.get(&index, 0)?.0;
        Backing::write(&mut self.0, index, Slot { ifindex: 0, ..there })?;
        Backing::write(&mut self.0, index, Slot { ifindex: 0, ..slot })?;
        Backing::write(&mut self.0, index, slot)
    }

    fn delete(&mut self, index: u32) -> Result<(), MapError> {
        let there = self.0.get(&index, 0)?.0;
        Backing::write(&mut self.0, index, Slot { ifindex: 0, ..there })?;
        self.0.delete(index)
    }
}

impl<M> Table<M> {
    /// The table over the object's map of this name.
    ///
    /// # Errors
    /// The map's type or sizes are not what the table needs.
    pub(super) fn new(name: &'static str, map: Map) -> Result<Self>
    where
        M: TryFrom<Map, Error = MapError>,
    {
        let map = M::try_from(map).with_context(|| format!("open map {name}"))?;
        Ok(Self { name, map })
    }

    /// Reads everything.
    pub(super) fn entries<K: Copy, V: Copy, C: FromIterator<(K, V)>>(&self) -> Result<C>
    where
        M: Backing<K, V>,
    {
        let entries = self.map.entries().with_context(|| format!("read map {}", self.name))?;
        Ok(entries.into_iter().collect())
    }

    /// Writes what is new or changed in `wanted`; `current` follows. Returns the number of
    /// writes.
    pub(super) fn write<K, V, C>(&mut self, current: &mut C, wanted: &C) -> Result<usize>
    where
        M: Backing<K, V>,
        K: Copy + Debug,
        V: Copy,
        C: Contents<K, V>,
    {
        let new: Vec<(K, V)> = current
            .steps(wanted)
            .filter_map(|step| match step {
                Step::Put(key, value) => Some((key, value)),
                Step::Remove(_) => None,
            })
            .collect();
        let (written, outcome) = self.map.write_all(&new);
        current.extend(new.iter().take(written).copied());
        let next = || new.get(written).map(|(key, _)| key);
        outcome.with_context(|| format!("write {:?} to map {}", next(), self.name))?;
        Ok(new.len())
    }

    /// Deletes what is not in `wanted`; `current` follows. Returns the number of writes.
    pub(super) fn delete<K, V, C>(&mut self, current: &mut C, wanted: &C) -> Result<usize>
    where
        M: Backing<K, V>,
        K: Copy + Debug,
        V: Copy,
        C: Contents<K, V>,
    {
        let gone: Vec<K> = current
            .steps(wanted)
            .filter_map(|step| match step {
                Step::Remove(key) => Some(key),
                Step::Put(..) => None,
            })
            .collect();
        let (deleted, outcome) = self.map.delete_all(&gone);
        for &key in gone.iter().take(deleted) {
            current.take(key);
        }
        let next = || gone.get(deleted);
        outcome.with_context(|| format!("delete {:?} from map {}", next(), self.name))?;
        Ok(gone.len())
    }
}
