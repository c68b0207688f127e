//! The maps that the agent writes, typed, and bringing them to what an image says.

use std::{collections::BTreeMap, fmt::Debug, io};

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, lpm_trie::Key};
use bytemuck::{Pod, Zeroable};

use netdp_common::interface::Slot;

use super::{image::Prefix, sys::Wire};
use crate::difference::{Step, steps};

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
pub(super) trait Backing<K, V> {
    fn entries(&self) -> Result<BTreeMap<K, V>, MapError>;
    fn write(&mut self, key: K, value: V) -> Result<(), MapError>;
    fn delete(&mut self, key: K) -> Result<(), MapError>;
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
    pub(super) fn entries<K, V>(&self) -> Result<BTreeMap<K, V>>
    where
        M: Backing<K, V>,
    {
        self.map.entries().with_context(|| format!("read map {}", self.name))
    }

    /// Writes what is new or changed in `wanted`; `current` follows. Returns the number of
    /// writes.
    pub(super) fn write<K, V>(
        &mut self,
        current: &mut BTreeMap<K, V>,
        wanted: &BTreeMap<K, V>,
    ) -> Result<usize>
    where
        M: Backing<K, V>,
        K: Copy + Ord + Debug,
        V: Copy + PartialEq,
    {
        let new: Vec<(K, V)> = steps(current, wanted)
            .filter_map(|step| match step {
                Step::Put(&key, &value) => Some((key, value)),
                Step::Remove(_) => None,
            })
            .collect();
        for &(key, value) in &new {
            self.map
                .write(key, value)
                .with_context(|| format!("write {key:?} to map {}", self.name))?;
            current.insert(key, value);
        }
        Ok(new.len())
    }

    /// Deletes what is not in `wanted`; `current` follows. Returns the number of writes.
    pub(super) fn delete<K, V>(
        &mut self,
        current: &mut BTreeMap<K, V>,
        wanted: &BTreeMap<K, V>,
    ) -> Result<usize>
    where
        M: Backing<K, V>,
        K: Copy + Ord + Debug,
        V: PartialEq,
    {
        let gone: Vec<K> = steps(current, wanted)
            .filter_map(|step| match step {
                Step::Remove(&key) => Some(key),
                Step::Put(..) => None,
            })
            .collect();
        for &key in &gone {
            absent_is_fine(self.map.delete(key))
                .with_context(|| format!("delete {key:?} from map {}", self.name))?;
            current.remove(&key);
        }
        Ok(gone.len())
    }
}
