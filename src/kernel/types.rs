//! The kernel's type table: which 64-bit type id each 16-bit kind stands for.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::Rejection;
use crate::message::RAW_KIND;

/// Type ids by kind; kind 0 is raw bytes, kind `n` the `n`th entry. Entries are never removed.
#[repr(align(128))]
pub(crate) struct TypeTable {
    /// 0 marks a free entry.
    ids: [AtomicU64; Self::MAX_TYPES],
    /// Whether types that nobody declared are added when they first appear (kernels that look at no payload).
    open: bool,
    /// Who is told of every new type before it is in the table. Held while one is added.
    follower: Mutex<Option<Follower>>,
}

/// Takes a kind and the type that it stands for.
pub(crate) type Follower = Box<dyn Fn(u16, u64) + Send + Sync>;

impl fmt::Debug for TypeTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TypeTable")
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

impl TypeTable {
    /// Entries of a table. Kinds are 16 bits wide, but a kernel that speaks more than 64 types is several kernels.
    pub(crate) const MAX_TYPES: usize = 64;

    /// A table of `declared` types, of which the first 64 are taken.
    pub(crate) fn new(declared: &[u64], open: bool) -> Self {
        let table = Self {
            ids: [const { AtomicU64::new(0) }; Self::MAX_TYPES],
            open,
            follower: Mutex::new(None),
        };
        for (entry, id) in table.ids.iter().zip(declared) {
            entry.store(*id, Ordering::Relaxed);
        }
        table
    }

    /// The kind that stands for a type.
    #[inline]
    pub(crate) fn kind_of(&self, type_id: u64) -> Result<u16, Rejection> {
        for (index, entry) in self.ids.iter().enumerate() {
            match entry.load(Ordering::Acquire) {
                id if id == type_id => return Ok(index as u16 + 1),
                0 => return self.add(index, type_id),
                _ => {}
            }
        }
        Err(self.full(type_id))
    }

    #[cold]
    fn add(&self, from: usize, type_id: u64) -> Result<u16, Rejection> {
        if !self.open || type_id == 0 {
            return Err(Rejection::UnknownType { type_id });
        }
        let follower = self.follower.lock();
        for (index, entry) in self.ids.iter().enumerate().skip(from) {
            let kind = index as u16 + 1;
            match entry.load(Ordering::Acquire) {
                0 => {
                    if let Some(follower) = &*follower {
                        follower(kind, type_id);
                    }
                    entry.store(type_id, Ordering::Release);
                    return Ok(kind);
                }
                id if id == type_id => return Ok(kind),
                _ => {}
            }
        }
        Err(self.full(type_id))
    }

    /// Tells of every type that is in the table, and of each that comes before anybody can use it.
    pub(crate) fn follow(&self, follower: Follower) {
        let mut present = self.follower.lock();
        for (index, entry) in self.ids.iter().enumerate() {
            let type_id = entry.load(Ordering::Acquire);
            if type_id != 0 {
                follower(index as u16 + 1, type_id);
            }
        }
        *present = Some(follower);
    }

    /// Tells nobody any more.
    pub(crate) fn unfollow(&self) {
        self.follower.lock().take();
    }

    /// The highest kind that a message may have, now or later.
    pub(crate) fn last_kind(&self) -> u32 {
        if self.open {
            return Self::MAX_TYPES as u32;
        }
        self.ids
            .iter()
            .filter(|entry| entry.load(Ordering::Acquire) != 0)
            .count() as u32
    }

    fn full(&self, type_id: u64) -> Rejection {
        if self.open {
            Rejection::TypeTableFull { type_id }
        } else {
            Rejection::UnknownType { type_id }
        }
    }

    /// The id of a real type behind a kind.
    pub(crate) fn type_of(&self, kind: u16) -> Option<u64> {
        self.type_id_of(kind).filter(|id| *id != 0)
    }

    /// The type id behind a kind; 0 for raw bytes, `None` for a kind that stands for nothing.
    #[inline]
    pub(crate) fn type_id_of(&self, kind: u16) -> Option<u64> {
        if kind == RAW_KIND {
            return Some(0);
        }
        match self
            .ids
            .get(usize::from(kind) - 1)
            .map(|entry| entry.load(Ordering::Acquire))
        {
            None | Some(0) => None,
            found => found,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_table_knows_what_was_declared_and_nothing_else() {
        let table = TypeTable::new(&[10, 20], false);
        assert_eq!(table.kind_of(10), Ok(1));
        assert_eq!(table.kind_of(20), Ok(2));
        assert_eq!(
            table.kind_of(30),
            Err(Rejection::UnknownType { type_id: 30 })
        );
        assert_eq!(table.type_id_of(0), Some(0));
        assert_eq!(table.type_id_of(2), Some(20));
        assert_eq!(table.type_id_of(3), None);
        assert_eq!(table.type_id_of(u16::MAX), None);
    }

    #[test]
    fn a_follower_hears_of_a_type_before_anybody_can_use_it() {
        use std::sync::{Arc, Mutex};
        let table = Arc::new(TypeTable::new(&[10], true));
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (own, into) = (Arc::downgrade(&table), Arc::clone(&heard));
        table.follow(Box::new(move |kind, type_id| {
            let known = own.upgrade().and_then(|table| table.type_of(kind));
            into.lock().unwrap().push((kind, type_id, known));
        }));
        for type_id in [20, 10, 20] {
            table.kind_of(type_id).unwrap();
        }
        table.unfollow();
        assert_eq!(table.kind_of(30), Ok(3));
        assert_eq!(*heard.lock().unwrap(), [(1, 10, Some(10)), (2, 20, None)]);
    }

    #[test]
    fn an_open_table_grows_to_64_types() {
        let table = TypeTable::new(&[], true);
        for id in 1..=64 {
            assert_eq!(table.kind_of(id), Ok(id as u16));
            assert_eq!(table.kind_of(id), Ok(id as u16));
        }
        assert_eq!(
            table.kind_of(65),
            Err(Rejection::TypeTableFull { type_id: 65 })
        );
    }
}
