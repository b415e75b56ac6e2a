//! What lies in the request ring of a block that reads no more.

use std::sync::Arc;

use super::block::BlockMemory;
use crate::kernel::Lost;

/// Reads the requests that a block has left in its ring, from a position on. More may come: of a
/// sender that had just found the kernel open. No slot is given back, so that no sender writes over
/// one that a stuck handler still reads.
#[derive(Debug)]
pub(crate) struct Leftovers {
    memory: Arc<BlockMemory>,
    position: u32,
}

impl Leftovers {
    /// Those from a position on.
    ///
    /// # Safety
    /// The block must have ended, or its thread be inside a handler that was given up as stuck, be
    /// it that of a block behind it, with its `terminate` word set: its consumer then takes no
    /// further slot.
    pub(super) unsafe fn new(memory: Arc<BlockMemory>, position: u32) -> Self {
        Self { memory, position }
    }

    /// Takes the next request and hands it, without its type, to `take`; false if there is none.
    /// Behind a corrupt slot nothing can be read.
    pub(crate) fn next(&mut self, take: impl FnOnce(&Lost<'_>)) -> bool {
        // SAFETY: `new` was promised that the block reads no further, and this value reads one
        // request at a time.
        let is_there = unsafe { self.memory.read_request(self.position, take) };
        self.position = self.position.wrapping_add(u32::from(is_there));
        is_there
    }
}
