//! A ring whose memory is its own. Shared by the property tests and the model checks.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use ringkernel::ring::{
    CURSOR_BYTES, Consumer, LINE_BYTES, Producer, RingLayout, RingParts, WriteCombining,
};

/// A ring in heap memory.
pub struct HeapRing {
    pub parts: RingParts,
    layout: RingLayout,
    memory: Layout,
}

impl HeapRing {
    pub fn new(layout: RingLayout, start: u32, write_combining: WriteCombining) -> Self {
        let memory =
            Layout::from_size_align(layout.slots_bytes() + CURSOR_BYTES, LINE_BYTES).unwrap();
        // SAFETY: the size is not zero; the cursor lies behind the slots; nobody else has the memory yet.
        unsafe {
            let slots = NonNull::new(alloc_zeroed(memory)).unwrap();
            let parts = RingParts {
                slots,
                cursor: slots.add(layout.slots_bytes()).cast(),
                write_combining,
                cursor_write_combining: write_combining,
            };
            parts.initialise(layout, start);
            Self {
                parts,
                layout,
                memory,
            }
        }
    }

    /// Both ends; for one pair, which is dropped before the ring.
    pub fn ends(&self, start: u32) -> (Producer, Consumer) {
        // SAFETY: initialised with this layout and start; callers keep to what is said above.
        unsafe {
            (
                Producer::new(self.parts, self.layout, start),
                Consumer::new(self.parts, self.layout, start),
            )
        }
    }
}

impl Drop for HeapRing {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout.
        unsafe { dealloc(self.parts.slots.as_ptr(), self.memory) };
    }
}
