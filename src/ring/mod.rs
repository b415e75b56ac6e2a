//! Floor 3: the shared-memory protocol between one producer and one consumer.
//!
//! A ring is a power-of-two array of slots, each a multiple of 64 bytes: a 16-byte [header](crate::message::MessageHeader),
//! then the payload. The slot carries its own sequence, so one small message is one cache line (or one PCIe read) per
//! hop: the consumer polls `slot[position & mask].sequence == position + 1`, the producer writes that word last.
//!
//! Only the way back needs an index: the consumer publishes how far it has read in a [`CursorLine`] of its own, by
//! quarter ring and whenever it finds the ring empty; the producer reads that line only when its own copy says "full".
//!
//! Every line has one writer, nothing here is a read-modify-write, and nothing allocates or calls the system: either
//! half may run on a device across PCIe. For the same reason neither half believes what the other wrote: sequences,
//! lengths and cursors are checked before use.
//!
//! | shared word | written by | read by | pair |
//! |---|---|---|---|
//! | `SlotHeader::sequence` | [`Producer`] (release) | [`Consumer`] (acquire) | publish |
//! | `CursorLine::consumed` | [`Consumer`] (release) | [`Producer`] (acquire) | give-back |

mod consumer;
mod layout;
mod memory;
mod producer;

#[cfg(all(feature = "std", not(loom)))]
pub(crate) use consumer::Peek;
pub use consumer::{Consumer, Corruption, Incoming};
pub use layout::{
    CURSOR_BYTES, CursorLine, LINE_BYTES, LayoutError, MAX_CAPACITY, MIN_CAPACITY, RingLayout,
    SlotHeader,
};
#[cfg(all(feature = "std", not(loom)))]
pub(crate) use memory::store_fence;
pub use memory::{RingParts, WriteCombining};
pub use producer::{Batch, Producer, PushError, Reservation};
