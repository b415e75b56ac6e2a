//! The kernel's type table: which 64-bit type id each 16-bit kind stands for.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Rejection;
use crate::message::RAW_KIND;

/// Type ids by kind; kind 0 is raw bytes, kind `n` the `n`th entry. Entries are never removed.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct TypeTable {
    /// 0 marks a free entry.
    ids: [AtomicU64; Self::MAX_TYPES],
    /// Whether types that nobody declared are added when they first appear (kernels that look at no payload).
    open: bool,
}

impl TypeTable {
    /// Entries of a table. Kinds are 16 bits wide, but a kernel that speaks more than 64 types is several kernels.
    pub(crate) const MAX_TYPES: usize = 64;

    /// A table of `declared` types, of which the first 64 are taken.
    pub(crate) fn new(declared: &[u64], open: bool) -> Self {
        let table = Self {
            ids: [const { AtomicU64::new(0) }; Self::MAX_TYPES],
            open,
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
        for (index, entry) in self.ids.iter().enumerate().skip(from) {
            match entry.compare_exchange(0, type_id, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(index as u16 + 1),
                Err(id) if id == type_id => return Ok(index as u16 + 1),
                Err(_) => {}
            }
        }
        Err(self.full(type_id))
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
