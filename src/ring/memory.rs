//! The raw memory under a ring, and how writes to it are ordered.

use core::ptr::NonNull;

use super::layout::{CursorLine, RingLayout, SLOT_HEADER_BYTES, SlotHeader};
use crate::sync::AtomicU32;

/// Whether the producer's stores to the slots go through write-combining buffers.
///
/// Write-combined memory (a PCIe BAR, ReBAR) is not kept in order by release stores alone: x86 drains its buffers in
/// any order (Intel SDM volume 3, "Memory Cache Control"). The producer then fences between payload and sequence, and
/// once more so that the sequence leaves the core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WriteCombining {
    /// Ordinary cached memory.
    #[default]
    No,
    /// Write-combined: fence around the sequence, and never read it in a loop.
    Yes,
}

/// The two pieces of memory that a ring consists of. They may lie in different memories: the slots near the consumer
/// (or wherever the producer writes fastest), the cursor near the producer, who reads it.
#[derive(Clone, Copy, Debug)]
pub struct RingParts {
    /// `layout.slots_bytes()` bytes, aligned to 64.
    pub slots: NonNull<u8>,
    /// The consumer's line.
    pub cursor: NonNull<CursorLine>,
    /// How the producer's stores to `slots` are ordered.
    pub write_combining: WriteCombining,
    /// How the consumer's stores to `cursor` are ordered.
    pub cursor_write_combining: WriteCombining,
}

impl RingParts {
    /// Prepares both pieces for an empty ring whose first message has position `start` (0, except to test
    /// wrap-around). Touches one word of every slot and the cursor; does not clear payloads.
    ///
    /// # Safety
    /// `slots` must be valid for writes of `layout.slots_bytes()` bytes and aligned to 64; `cursor` must be valid for
    /// writes; nobody else may access either during the call.
    pub unsafe fn initialise(&self, layout: RingLayout, start: u32) {
        for index in 0..layout.capacity() {
            // The first position at or after `start` that falls on this slot.
            let position = start.wrapping_add(index.wrapping_sub(start) & layout.mask());
            let unpublished = position.wrapping_add(1).wrapping_sub(layout.capacity());
            // SAFETY: `index` is below the capacity, so the slot lies within the caller's `slots_bytes()`, at a
            // multiple of 64 from a 64-byte aligned base.
            unsafe {
                self.header_ptr(layout, index)
                    .write(SlotHeader::new(unpublished))
            };
        }
        // SAFETY: the caller promises a cursor that is valid for writes and not shared yet.
        unsafe {
            self.cursor.write(CursorLine {
                consumed: AtomicU32::new(start),
            })
        };
    }

    /// The header of the slot with this index.
    #[inline]
    fn header_ptr(&self, layout: RingLayout, index: u32) -> NonNull<SlotHeader> {
        // SAFETY: callers pass an index below the capacity, so the offset stays within the allocation of
        // `slots_bytes()`, which whoever made the endpoints promised.
        unsafe { self.slots.add(index as usize * layout.stride()).cast() }
    }
}

/// The view that both endpoints share: parts and layout, with checked-once pointer arithmetic.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    pub(super) parts: RingParts,
    pub(super) layout: RingLayout,
}

impl Slots {
    /// The header of the slot that `position` falls on.
    #[inline]
    pub(super) fn header(&self, position: u32) -> &SlotHeader {
        // SAFETY: endpoints are made (`Producer::new`, `Consumer::new`) with a promise that the parts are initialised
        // and live as long as the endpoint; `& mask` keeps the index below the capacity. All fields are atomics, so
        // that a shared reference allows the other side's stores.
        unsafe {
            self.parts
                .header_ptr(self.layout, position & self.layout.mask())
                .as_ref()
        }
    }

    /// The consumer's line.
    #[inline]
    pub(super) fn cursor(&self) -> &CursorLine {
        // SAFETY: as for `header`: initialised, live, and atomic throughout.
        unsafe { self.parts.cursor.as_ref() }
    }

    /// The first byte behind the header of the slot that `position` falls on.
    #[inline]
    pub(super) fn body(&self, position: u32) -> NonNull<u8> {
        let header = self
            .parts
            .header_ptr(self.layout, position & self.layout.mask());
        // SAFETY: a stride is at least one line and so larger than the header; the result is inside the same slot.
        unsafe { header.cast::<u8>().add(SLOT_HEADER_BYTES) }
    }

    /// Bytes behind the header of a slot.
    #[inline]
    pub(super) fn body_bytes(&self) -> usize {
        self.layout.max_payload()
    }
}

/// Orders all earlier stores, write-combined ones too, before all later ones, and drains the combining buffers.
#[inline]
pub(crate) fn store_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of the x86-64 baseline.
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}
