//! Values that are made once for each key, however many threads ask for them.

use std::{collections::HashMap, hash::Hash};

use super::sync::{Arc, Mutex, PoisonError};

/// A value's place, locked while it is being made.
type Slot<V> = Arc<Mutex<Option<V>>>;

/// A table of values, of which each is made by the first thread that asks for it, while others
/// that ask for the same wait. What failed is made again by the next one.
#[derive(Debug)]
pub(crate) struct OnceTable<K, V>(Mutex<HashMap<K, Slot<V>>>);

impl<K, V> Default for OnceTable<K, V> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

impl<K: Eq + Hash, V: Copy> OnceTable<K, V> {
    /// The value of a key; `make` is called where there is none yet. It may ask for other keys.
    ///
    /// # Errors
    /// Those of `make`.
    pub(crate) fn get_or_try_make<E>(&self, key: K, make: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        let slot = {
            let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(table.entry(key).or_default())
        };
        // Who panicked while making the value left the slot empty.
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = *slot {
            return Ok(value);
        }
        Ok(*slot.insert(make()?))
    }

    /// The keys that have a value, in no order, once those that are being made are there.
    pub(crate) fn keys(&self) -> Vec<K>
    where
        K: Clone,
    {
        let slots: Vec<_> = {
            let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            table.iter().map(|(key, slot)| (key.clone(), Arc::clone(slot))).collect()
        };
        let is_made = |slot: &Slot<V>| slot.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        slots.into_iter().filter(|(_, slot)| is_made(slot)).map(|(key, _)| key).collect()
    }
}
