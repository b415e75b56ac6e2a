//! The writing half of a ring.

use core::fmt;

use super::layout::RingLayout;
use super::memory::{RingParts, Slots, WriteCombining, store_fence};
use crate::message::{EXTENSION_BYTES, Envelope, Extension, Head};
use crate::sync::Ordering;

/// The one writer of a ring. `Send`, but neither `Sync` nor `Clone`: two producers on one ring cannot be written.
///
/// Nothing here blocks, allocates, locks or calls the system.
pub struct Producer {
    slots: Slots,
    /// Position of the next message, modulo 2^32.
    position: u32,
    /// Last cursor value that was read and believed; `position - consumed` is in `0..=capacity`.
    consumed: u32,
    /// Cursor values that could not be true.
    bad_cursors: u64,
}

// SAFETY: the pointers in `slots` reach memory whose validity `new` was promised for the producer's whole life, on
// any thread; all state that is not shared is owned. `Sync` stays off because of `NonNull`.
unsafe impl Send for Producer {}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("layout", &self.slots.layout)
            .field("position", &self.position)
            .field("consumed", &self.consumed)
            .finish_non_exhaustive()
    }
}

impl Producer {
    /// The producer of a ring that was [initialised](RingParts::initialise) with the same `layout` and `start`.
    ///
    /// # Safety
    /// `parts` must have been initialised so, must stay valid for reads and writes as long as the producer lives, and
    /// must have no other producer. Apart from this producer and one [`Consumer`](super::Consumer) (here or on a
    /// device), nobody may write to the memory.
    #[must_use]
    pub unsafe fn new(parts: RingParts, layout: RingLayout, start: u32) -> Self {
        Self {
            slots: Slots { parts, layout },
            position: start,
            consumed: start,
            bad_cursors: 0,
        }
    }

    /// Number and size of the slots.
    #[inline]
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.slots.layout
    }

    /// Position of the next message: messages published since the ring was made, modulo 2^32, counted from the
    /// ring's start position.
    #[inline]
    #[must_use]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Goes on at this position, up to which somebody else has written meanwhile. False if that cannot be, as the consumer has not read so
    /// far: then nothing is known to be free.
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) fn resume_at(&mut self, position: u32) -> bool {
        let capacity = self.slots.layout.capacity();
        // ORDERING: give-back. As in `reload_cursor`.
        let consumed = self.slots.cursor().consumed.load(Ordering::Acquire);
        let is_true = position.wrapping_sub(consumed) <= capacity;
        self.position = position;
        self.consumed = if is_true {
            consumed
        } else {
            position.wrapping_sub(capacity)
        };
        is_true
    }

    /// How often the consumer published a cursor that cannot be true. Such a value is not believed.
    #[inline]
    #[must_use]
    pub fn bad_cursors(&self) -> u64 {
        self.bad_cursors
    }

    /// Slots known to be free. May be larger at any time; never smaller while this producer does not write.
    ///
    /// Reads the consumer's line only if fewer than `wanted` are known to be free.
    #[inline]
    pub fn free_slots(&mut self, wanted: u32) -> u32 {
        let capacity = self.slots.layout.capacity();
        let free = capacity - self.position.wrapping_sub(self.consumed);
        if free >= wanted {
            return free;
        }
        self.reload_cursor();
        capacity - self.position.wrapping_sub(self.consumed)
    }

    #[cold]
    fn reload_cursor(&mut self) {
        // ORDERING: give-back. Acquire pairs with the consumer's release in `Consumer::publish_cursor`: its reads of
        // the slots it gives back happen before our next writes to them.
        let consumed = self.slots.cursor().consumed.load(Ordering::Acquire);
        // Untrusted: a true cursor lies between the last one and the position of the next message.
        let progress = consumed.wrapping_sub(self.consumed);
        let outstanding = self.position.wrapping_sub(self.consumed);
        if progress <= outstanding {
            self.consumed = consumed;
        } else {
            self.bad_cursors += 1;
        }
    }

    /// Copies `payload` into the next slot and publishes it.
    ///
    /// # Errors
    /// [`PushError::Full`] if no slot is free; [`PushError::TooLong`] if payload and extension exceed the slot.
    /// Nothing has been published then.
    #[inline]
    pub fn try_push(&mut self, envelope: &Envelope, payload: &[u8]) -> Result<(), PushError> {
        let mut reservation = self.reserve(envelope)?;
        let body = reservation.body_mut();
        let Some(target) = body.get_mut(..payload.len()) else {
            return Err(PushError::TooLong {
                length: payload.len(),
                max: body.len(),
            });
        };
        target.copy_from_slice(payload);
        reservation.commit(payload.len())
    }

    /// The next slot, to write a message into it in place. Nothing is published until
    /// [`commit`](Reservation::commit); a dropped reservation leaves no trace.
    ///
    /// # Errors
    /// [`PushError::Full`] if no slot is free; [`PushError::TooLong`] if the slot cannot even hold the extension.
    #[inline]
    pub fn reserve(&mut self, envelope: &Envelope) -> Result<Reservation<'_>, PushError> {
        self.reserve_head(envelope.head(), envelope.extension.as_ref())
    }

    /// As [`reserve`](Self::reserve); `extension` goes with a head that says so.
    #[inline]
    pub(crate) fn reserve_head(
        &mut self,
        head: Head,
        extension: Option<&Extension>,
    ) -> Result<Reservation<'_>, PushError> {
        if self.free_slots(1) == 0 {
            return Err(PushError::Full);
        }
        let position = self.position;
        let offset = self.write_extension(position, head, extension)?;
        Ok(Reservation {
            head,
            offset,
            position,
            producer: self,
        })
    }

    /// Up to `wanted` free slots, to be written one after the other and published with one pass. An empty batch means
    /// that the ring is full.
    #[inline]
    pub fn batch(&mut self, wanted: u32) -> Batch<'_> {
        let room = self.free_slots(wanted).min(wanted);
        Batch {
            producer: self,
            room,
            staged: 0,
        }
    }

    /// Writes the extension, if there is one, and returns the bytes that it takes.
    ///
    /// The caller must have established that `position` is free.
    #[inline]
    fn write_extension(
        &mut self,
        position: u32,
        head: Head,
        extension: Option<&Extension>,
    ) -> Result<usize, PushError> {
        let offset = head.extension_bytes();
        if offset > 0 {
            let max = self.slots.body_bytes();
            if max < offset {
                return Err(PushError::TooLong {
                    length: offset,
                    max,
                });
            }
            let bytes = extension.copied().unwrap_or_default().to_bytes();
            // SAFETY: as in `payload_mut`, and the extension fits, as just checked.
            unsafe {
                self.slots
                    .body(position)
                    .cast::<[u8; EXTENSION_BYTES]>()
                    .write_unaligned(bytes);
            }
        }
        Ok(offset)
    }

    /// The payload bytes of a free slot.
    ///
    /// The caller must have established that `position` is free.
    #[inline]
    fn payload_mut(&mut self, position: u32, offset: usize) -> &mut [u8] {
        let length = self.slots.body_bytes() - offset;
        // SAFETY: the slot is free, so that the consumer does not read it before its sequence is published; it has
        // `body_bytes()` bytes behind its header, initialised memory of the caller of `new`; `offset` was checked
        // against them. `&mut self` keeps other references to free slots away.
        unsafe {
            core::slice::from_raw_parts_mut(self.slots.body(position).add(offset).as_ptr(), length)
        }
    }

    /// Writes everything of the header but the sequence.
    #[inline]
    fn write_header(&mut self, position: u32, head: Head, length: usize) {
        let header = self.slots.header(position);
        header
            .correlation
            .store(head.correlation, Ordering::Relaxed);
        header
            .length_flags
            .store(head.length_flags(length), Ordering::Relaxed);
        header.kind_lane.store(head.kind_lane, Ordering::Relaxed);
        // Touching the cell here, after the last write to the body, tells loom that the body was written.
        #[cfg(loom)]
        header.body.with_mut(|_| ());
    }

    /// Publishes `count` written slots, starting at the current position.
    #[inline]
    fn publish(&mut self, count: u32) {
        let combining = self.slots.parts.write_combining == WriteCombining::Yes;
        if combining {
            store_fence();
        }
        for _ in 0..count {
            let sequence = self.position.wrapping_add(1);
            // ORDERING: publish. Release pairs with the consumer's acquire in `Consumer::peek`: header words and
            // payload happen before the sequence. On write-combined memory the fence above does that job.
            self.slots
                .header(self.position)
                .sequence
                .store(sequence, Ordering::Release);
            self.position = sequence;
        }
        if combining {
            store_fence();
        }
    }
}

/// One free slot that is being written in place.
#[derive(Debug)]
pub struct Reservation<'a> {
    producer: &'a mut Producer,
    head: Head,
    /// Bytes that the extension takes.
    offset: usize,
    position: u32,
}

impl Reservation<'_> {
    /// The whole room for the payload: 16-byte aligned, of undefined content. On write-combined memory write it in
    /// ascending order and do not read it.
    #[inline]
    pub fn body_mut(&mut self) -> &mut [u8] {
        self.producer.payload_mut(self.position, self.offset)
    }

    /// Publishes the first `length` bytes of the body as the message's payload.
    ///
    /// # Errors
    /// [`PushError::TooLong`] if `length` exceeds the body; nothing is published then.
    #[inline]
    pub fn commit(self, length: usize) -> Result<(), PushError> {
        let max = self.producer.slots.body_bytes() - self.offset;
        if length > max {
            return Err(PushError::TooLong { length, max });
        }
        self.producer.write_header(self.position, self.head, length);
        self.producer.publish(1);
        Ok(())
    }
}

/// Several free slots that are written one by one and published together.
#[derive(Debug)]
pub struct Batch<'a> {
    producer: &'a mut Producer,
    /// Slots that this batch may use.
    room: u32,
    staged: u32,
}

impl Batch<'_> {
    /// How many more messages can be staged.
    #[inline]
    #[must_use]
    pub fn room(&self) -> u32 {
        self.room - self.staged
    }

    /// Writes one more message, by a function that fills the body and returns the payload's length. The consumer does
    /// not see it before [`commit`](Batch::commit).
    ///
    /// # Errors
    /// [`PushError::Full`] if the batch has no room left, [`PushError::TooLong`] if the returned length exceeds the
    /// body, and whatever `write` returns. The message is not staged then; those before it are.
    #[inline]
    pub fn stage<E: From<PushError>>(
        &mut self,
        envelope: &Envelope,
        write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), E> {
        if self.room() == 0 {
            return Err(PushError::Full.into());
        }
        let position = self.producer.position.wrapping_add(self.staged);
        let head = envelope.head();
        let offset = self
            .producer
            .write_extension(position, head, envelope.extension.as_ref())?;
        let body = self.producer.payload_mut(position, offset);
        let max = body.len();
        let length = write(body)?;
        if length > max {
            return Err(PushError::TooLong { length, max }.into());
        }
        self.producer.write_header(position, head, length);
        self.staged += 1;
        Ok(())
    }

    /// Publishes all staged messages, in order, and returns how many.
    #[inline]
    pub fn commit(self) -> u32 {
        self.producer.publish(self.staged);
        self.staged
    }
}

/// Why a message could not be put into the ring. Nothing has been published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PushError {
    /// Every slot holds a message that the consumer has not given back yet.
    Full,
    /// The message exceeds a slot.
    TooLong {
        /// Bytes of the message.
        length: usize,
        /// Bytes that a slot has for it.
        max: usize,
    },
}

impl fmt::Display for PushError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("the ring is full"),
            Self::TooLong { length, max } => {
                write!(f, "a message of {length} bytes exceeds the slot's {max}")
            }
        }
    }
}

impl core::error::Error for PushError {}
