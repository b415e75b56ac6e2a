//! The reading half of a ring.

use core::fmt;

use super::layout::RingLayout;
use super::memory::{RingParts, Slots, WriteCombining, store_fence};
use crate::message::{EXTENSION_BYTES, Extension, MessageHeader};
use crate::sync::Ordering;

/// The one reader of a ring. `Send`, but neither `Sync` nor `Clone`: two consumers on one ring cannot be written.
///
/// Nothing here blocks, allocates, locks or calls the system.
pub struct Consumer {
    slots: Slots,
    /// Position of the next message, modulo 2^32.
    position: u32,
    /// What the cursor line says; `position - published` is below the give-back interval between calls.
    published: u32,
    /// Header of the message that was looked at last. It stays here, word by word: moving it about as a whole would make
    /// the processor wait for the stores of its words.
    header: MessageHeader,
}

// SAFETY: the pointers in `slots` reach memory whose validity `new` was promised for the consumer's whole life, on
// any thread; all state that is not shared is owned. `Sync` stays off because of `NonNull`.
unsafe impl Send for Consumer {}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("layout", &self.slots.layout)
            .field("position", &self.position)
            .field("published", &self.published)
            .finish_non_exhaustive()
    }
}

/// What [`Consumer::peek`] found at the next position.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Peek {
    /// Nothing yet.
    Empty,
    /// A message whose header passed the checks; it is the consumer's `header`.
    Ready,
    /// Something that no correct producer writes.
    Corrupt(Corruption),
}

impl Consumer {
    /// The consumer of a ring that was [initialised](RingParts::initialise) with the same `layout` and `start`, or the
    /// successor of a consumer that ended at position `start`.
    ///
    /// # Safety
    /// `parts` must have been initialised so, must stay valid for reads and writes as long as the consumer lives, and
    /// must have no other consumer at the same time. Apart from this consumer and one
    /// [`Producer`](super::Producer) (here or on a device), nobody may write to the memory.
    #[must_use]
    pub unsafe fn new(parts: RingParts, layout: RingLayout, start: u32) -> Self {
        Self {
            slots: Slots { parts, layout },
            position: start,
            published: start,
            header: MessageHeader::from_words([0; 4]),
        }
    }

    /// Number and size of the slots.
    #[inline]
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.slots.layout
    }

    /// Position of the next message: messages consumed since the ring was made, modulo 2^32, counted from the ring's
    /// start position.
    #[inline]
    #[must_use]
    pub fn position(&self) -> u32 {
        self.position
    }

    /// The next message, or `None` if there is none yet (which may change at any time).
    ///
    /// Dropping the returned [`Incoming`] gives its slot back.
    ///
    /// # Errors
    /// [`Corruption`] if the producer wrote what no correct producer writes. A slot with a bad length has been given
    /// back, and the next call looks at the next one; a bad sequence stays, because nothing behind it can be trusted.
    #[inline]
    pub fn try_next(&mut self) -> Result<Option<Incoming<'_>>, Corruption> {
        match self.peek() {
            Peek::Empty => Ok(None),
            Peek::Ready => Ok(Some(Incoming { consumer: self })),
            Peek::Corrupt(corruption) => {
                if let Corruption::Length { .. } = corruption {
                    self.release();
                }
                Err(corruption)
            }
        }
    }

    /// Looks at the next position without taking anything.
    #[inline]
    pub(crate) fn peek(&mut self) -> Peek {
        let header = self.slots.header(self.position);
        // ORDERING: publish. Acquire pairs with the producer's release in `Producer::publish`: what it wrote before
        // the sequence is visible after this load.
        let sequence = header.sequence.load(Ordering::Acquire);
        if sequence != self.position.wrapping_add(1) {
            return self.not_published(sequence);
        }
        let header = MessageHeader::from_words([
            sequence,
            header.correlation.load(Ordering::Relaxed),
            header.length_flags.load(Ordering::Relaxed),
            header.kind_lane.load(Ordering::Relaxed),
        ]);
        // Untrusted: the length must stay within the slot before anything is read by it.
        let room = self.slots.body_bytes();
        let extension = if header.is_extended() {
            EXTENSION_BYTES
        } else {
            0
        };
        if header.length() + extension > room {
            return Peek::Corrupt(Corruption::Length {
                header,
                max: room.saturating_sub(extension),
            });
        }
        self.header = header;
        Peek::Ready
    }

    /// Header of the message that `peek` just returned as ready.
    #[inline]
    pub(crate) fn header(&self) -> &MessageHeader {
        &self.header
    }

    /// As `peek`, but looks up to `polls` times, a pause apart, before it reports an empty ring. Nothing but the slot is
    /// looked at in between, so that a message is seen as soon as it can be.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) fn peek_spinning(&mut self, polls: u32) -> Peek {
        let published = self.position.wrapping_add(1);
        let sequence = &self.slots.header(self.position).sequence;
        for _ in 1..polls {
            // Relaxed: `peek` loads it again, with acquire.
            if sequence.load(Ordering::Relaxed) == published {
                break;
            }
            core::hint::spin_loop();
        }
        self.peek()
    }

    #[inline]
    fn not_published(&mut self, sequence: u32) -> Peek {
        // An unpublished slot still shows the sequence of the lap before.
        let before = self
            .position
            .wrapping_add(1)
            .wrapping_sub(self.slots.layout.capacity());
        if sequence != before {
            return Peek::Corrupt(Corruption::Sequence {
                expected: self.position.wrapping_add(1),
                found: sequence,
            });
        }
        if self.published != self.position {
            self.publish_cursor();
        }
        Peek::Empty
    }

    /// The extension of the message that `peek` just returned as ready.
    #[inline]
    pub(crate) fn extension(&self) -> Option<Extension> {
        if !self.header.is_extended() {
            return None;
        }
        // SAFETY: `peek` checked that an extended message's extension lies within the slot, and the slot is ours
        // until `release`. The bytes may be anything; every pattern is a valid `[u8; 32]`.
        let bytes = unsafe {
            self.slots
                .body(self.position)
                .cast::<[u8; EXTENSION_BYTES]>()
                .read_unaligned()
        };
        Some(Extension::from_bytes(&bytes))
    }

    /// The payload of the message that `peek` just returned as ready.
    #[inline]
    pub(crate) fn payload(&self) -> &[u8] {
        #[cfg(loom)]
        self.slots.header(self.position).body.with(|_| ());
        let offset = if self.header.is_extended() {
            EXTENSION_BYTES
        } else {
            0
        };
        // SAFETY: `peek` checked that `offset + length` lies within the slot's body. The slot was
        // published with release and read with acquire, and belongs to the consumer until
        // `release`, which needs `&mut self`. The producer is a thread of this process, whose code
        // keeps to that; what a device may write is read by way of `copy_body` alone.
        unsafe {
            core::slice::from_raw_parts(
                self.slots.body(self.position).add(offset).as_ptr(),
                self.header.length(),
            )
        }
    }

    /// Copies extension and payload of the message that `peek` just returned as ready. For rings
    /// whose other end is a device: it may break the protocol and write to a published slot, so
    /// that what has been checked of it must not be read there again.
    ///
    /// # Safety
    /// `target` must be valid for writes of the layout's `max_payload()` bytes, and outside of the
    /// ring.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) unsafe fn copy_body(&self, target: core::ptr::NonNull<u8>) {
        let extension = if self.header.is_extended() {
            EXTENSION_BYTES
        } else {
            0
        };
        // SAFETY: `peek` checked that extension and payload lie within the slot's body, and the
        // caller promises a target as large as that. No reference to the slot's bytes is made. Each
        // byte is read once; SPEC: no language memory model covers stores from outside the program,
        // and any mixture of them is as good as any other bytes.
        unsafe {
            target.copy_from_nonoverlapping(
                self.slots.body(self.position),
                extension + self.header.length(),
            );
        }
    }

    /// Gives the current slot back. The producer learns of it by quarter ring, or when this side finds the ring empty.
    #[inline]
    pub(crate) fn release(&mut self) {
        self.position = self.position.wrapping_add(1);
        if self.position.wrapping_sub(self.published) >= self.slots.layout.give_back_interval() {
            self.publish_cursor();
        }
    }

    /// As [`publish_cursor`](Self::publish_cursor), unless the producer has been told.
    #[inline]
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) fn publish_progress(&mut self) {
        if self.published != self.position {
            self.publish_cursor();
        }
    }

    /// Tells the producer of every slot given back so far. Called by itself by quarter ring and on an empty ring; call
    /// it before this side stops reading for a while.
    #[inline]
    pub fn publish_cursor(&mut self) {
        // ORDERING: give-back. Release pairs with the producer's acquire in `Producer::reload_cursor`: our reads of
        // the slots happen before it writes them again.
        self.slots
            .cursor()
            .consumed
            .store(self.position, Ordering::Release);
        if self.slots.parts.cursor_write_combining == WriteCombining::Yes {
            // Or it stays in this core until something else drives it out.
            store_fence();
        }
        self.published = self.position;
    }
}

impl Drop for Consumer {
    /// Publishes the cursor, so that a successor and the producer agree on what was read.
    fn drop(&mut self) {
        if self.published != self.position {
            self.publish_cursor();
        }
    }
}

/// A message in its slot. Dropping it gives the slot back to the producer.
#[derive(Debug)]
pub struct Incoming<'a> {
    consumer: &'a mut Consumer,
}

impl Incoming<'_> {
    /// The message's header; its length has been checked against the slot, kind and lane have not been checked.
    #[inline]
    #[must_use]
    pub fn header(&self) -> MessageHeader {
        *self.consumer.header()
    }

    /// Timestamp, deadline and trace id, if the message carries them.
    #[inline]
    #[must_use]
    pub fn extension(&self) -> Option<Extension> {
        self.consumer.extension()
    }

    /// The payload, in place, 16-byte aligned.
    #[inline]
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.consumer.payload()
    }

    /// Leaves the message where it is: the next [`try_next`](Consumer::try_next) returns it again.
    #[inline]
    pub fn keep(self) {
        core::mem::forget(self);
    }
}

impl Drop for Incoming<'_> {
    #[inline]
    fn drop(&mut self) {
        self.consumer.release();
    }
}

/// Something in a ring that no correct producer writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Corruption {
    /// The slot's sequence is neither the next one nor that of the lap before.
    Sequence {
        /// The sequence that would publish the slot.
        expected: u32,
        /// The sequence found.
        found: u32,
    },
    /// The header's length exceeds the slot.
    Length {
        /// The header as found.
        header: MessageHeader,
        /// Payload bytes that such a message could have at most.
        max: usize,
    },
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sequence { expected, found } => write!(
                f,
                "slot sequence {found} where {expected} or that of the lap before belongs"
            ),
            Self::Length { header, max } => write!(
                f,
                "payload length {} where a slot holds at most {max}",
                header.length()
            ),
        }
    }
}

impl core::error::Error for Corruption {}
