//! Where things lie: slots, their header, the consumer's cursor line.

use core::fmt;

use crate::message::{EXTENSION_BYTES, MAX_PAYLOAD_BYTES};
use crate::sync::AtomicU32;
#[cfg(loom)]
use crate::sync::UnsafeCell;

/// The unit of transfer between cores and over PCIe, in bytes.
pub const LINE_BYTES: usize = 64;

/// Distance that keeps two writers apart, in bytes: two lines, because x86 prefetchers fetch lines in pairs
/// (Intel 64 and IA-32 Architectures Optimization Reference Manual, "spatial prefetcher").
pub const CURSOR_BYTES: usize = 2 * LINE_BYTES;

/// Smallest number of slots. With one slot the producer could never work ahead of the consumer.
pub const MIN_CAPACITY: usize = 2;

/// Largest number of slots, 2^24: sequences are 32 bits wide and must never be ambiguous across a lap, and a ring of
/// this size is a gigabyte already.
pub const MAX_CAPACITY: usize = 1 << 24;

/// The first 16 bytes of a slot as both sides access them: four words, each loaded and stored whole.
#[repr(C, align(16))]
#[derive(Debug)]
pub struct SlotHeader {
    /// Position plus one once the slot is published; position plus one minus capacity until then.
    pub(super) sequence: AtomicU32,
    /// See [`MessageHeader`](crate::message::MessageHeader).
    pub(super) correlation: AtomicU32,
    /// Length and flags.
    pub(super) length_flags: AtomicU32,
    /// Kind and lane.
    pub(super) kind_lane: AtomicU32,
    /// Lets loom see every access to the body that belongs to this header.
    #[cfg(loom)]
    pub(super) body: UnsafeCell<()>,
}

impl SlotHeader {
    pub(super) fn new(sequence: u32) -> Self {
        Self {
            sequence: AtomicU32::new(sequence),
            correlation: AtomicU32::new(0),
            length_flags: AtomicU32::new(0),
            kind_lane: AtomicU32::new(0),
            #[cfg(loom)]
            body: UnsafeCell::new(()),
        }
    }
}

#[cfg(all(test, not(loom), feature = "vulkan"))]
impl SlotHeader {
    /// Of `sequence`, `correlation`, `length_flags` and `kind_lane`, in bytes.
    pub(crate) const OFFSETS: [usize; 4] = [
        core::mem::offset_of!(SlotHeader, sequence),
        core::mem::offset_of!(SlotHeader, correlation),
        core::mem::offset_of!(SlotHeader, length_flags),
        core::mem::offset_of!(SlotHeader, kind_lane),
    ];
}

/// The line in which a consumer publishes how far it has read.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct CursorLine {
    /// Messages consumed since the ring was made, modulo 2^32. Written by the consumer, read by the producer.
    pub(super) consumed: AtomicU32,
}

/// Size of [`SlotHeader`] as this build lays it out; 16 except under loom, whose atomics are larger.
pub(super) const SLOT_HEADER_BYTES: usize = size_of::<SlotHeader>();

#[cfg(not(loom))]
const _: () = {
    use core::mem::{align_of, offset_of};
    assert!(SLOT_HEADER_BYTES == crate::message::HEADER_BYTES);
    assert!(align_of::<SlotHeader>() == 16);
    assert!(offset_of!(SlotHeader, sequence) == 0);
    assert!(offset_of!(SlotHeader, correlation) == 4);
    assert!(offset_of!(SlotHeader, length_flags) == 8);
    assert!(offset_of!(SlotHeader, kind_lane) == 12);
    assert!(size_of::<CursorLine>() == LINE_BYTES);
    assert!(align_of::<CursorLine>() == LINE_BYTES);
    assert!(offset_of!(CursorLine, consumed) == 0);
};
const _: () = assert!(size_of::<CursorLine>() <= CURSOR_BYTES);

/// Number and size of a ring's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Slots, a power of two in `MIN_CAPACITY..=MAX_CAPACITY`.
    capacity: u32,
    /// Bytes from one slot to the next, a multiple of 64.
    stride: u32,
}

impl RingLayout {
    /// A layout of at least `capacity` slots, each with room for `payload` bytes (and for an
    /// [`Extension`](crate::message::Extension) besides, if `extended`).
    ///
    /// `capacity` is rounded up to a power of two, at least [`MIN_CAPACITY`]; the slot to a multiple of 64 bytes.
    ///
    /// # Errors
    /// [`LayoutError`] if `capacity` is 0 or above [`MAX_CAPACITY`], or `payload` above
    /// [`MAX_PAYLOAD_BYTES`].
    ///
    /// ```
    /// use ringkernel::ring::RingLayout;
    /// let layout = RingLayout::new(1000, 48, false)?;
    /// assert_eq!((layout.capacity(), layout.stride(), layout.max_payload()), (1024, 64, 48));
    /// # Ok::<(), ringkernel::ring::LayoutError>(())
    /// ```
    pub const fn new(capacity: usize, payload: usize, extended: bool) -> Result<Self, LayoutError> {
        if capacity == 0 || capacity > MAX_CAPACITY {
            return Err(LayoutError::Capacity { asked: capacity });
        }
        if payload > MAX_PAYLOAD_BYTES {
            return Err(LayoutError::Payload { asked: payload });
        }
        let body = payload + if extended { EXTENSION_BYTES } else { 0 };
        let stride = (SLOT_HEADER_BYTES + body).next_multiple_of(LINE_BYTES);
        let rounded = capacity.next_power_of_two();
        // Only an address space of 32 bits is smaller than the largest ring.
        if stride.checked_mul(rounded).is_none() {
            return Err(LayoutError::Capacity { asked: capacity });
        }
        Ok(Self {
            capacity: if rounded < MIN_CAPACITY {
                MIN_CAPACITY as u32
            } else {
                rounded as u32
            },
            stride: stride as u32,
        })
    }

    /// The same slots, but `capacity` of them, rounded up as by [`new`](Self::new).
    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) fn with_capacity(&self, capacity: usize) -> Result<Self, LayoutError> {
        let payload = self.max_payload().min(MAX_PAYLOAD_BYTES);
        Ok(Self {
            stride: self.stride,
            ..Self::new(capacity, payload, false)?
        })
    }

    /// Number of slots, a power of two.
    #[inline]
    #[must_use]
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Bytes from one slot to the next, a multiple of 64.
    #[inline]
    #[must_use]
    pub const fn stride(&self) -> usize {
        self.stride as usize
    }

    /// Largest payload of a plain message, in bytes; an extended one has 32 less.
    #[inline]
    #[must_use]
    pub const fn max_payload(&self) -> usize {
        self.stride as usize - SLOT_HEADER_BYTES
    }

    /// Bytes that all slots take together.
    #[inline]
    #[must_use]
    pub const fn slots_bytes(&self) -> usize {
        self.capacity as usize * self.stride as usize
    }

    #[inline]
    pub(super) const fn mask(&self) -> u32 {
        self.capacity - 1
    }

    /// How many messages a busy consumer takes before it publishes its cursor: a quarter ring.
    #[inline]
    pub(super) const fn give_back_interval(&self) -> u32 {
        if self.capacity < 8 {
            1
        } else {
            self.capacity / 4
        }
    }
}

/// A ring that cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// No slots, or more than [`MAX_CAPACITY`].
    Capacity {
        /// Slots asked for.
        asked: usize,
    },
    /// A payload above [`MAX_PAYLOAD_BYTES`].
    Payload {
        /// Bytes asked for.
        asked: usize,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capacity { asked } => {
                write!(f, "a ring has 1 to {MAX_CAPACITY} slots, not {asked}")
            }
            Self::Payload { asked } => write!(
                f,
                "a payload has at most {MAX_PAYLOAD_BYTES} bytes, not {asked}"
            ),
        }
    }
}

impl core::error::Error for LayoutError {}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn capacities_are_rounded_or_refused() {
        let capacity = |asked| RingLayout::new(asked, 1, false).map(|layout| layout.capacity());
        assert_eq!(capacity(0), Err(LayoutError::Capacity { asked: 0 }));
        assert_eq!(capacity(1), Ok(2));
        assert_eq!(capacity(3), Ok(4));
        assert_eq!(capacity(1000), Ok(1024));
        assert_eq!(capacity(MAX_CAPACITY), Ok(MAX_CAPACITY as u32));
        assert_eq!(
            capacity(MAX_CAPACITY + 1),
            Err(LayoutError::Capacity {
                asked: MAX_CAPACITY + 1
            })
        );
        assert_eq!(
            capacity(usize::MAX),
            Err(LayoutError::Capacity { asked: usize::MAX })
        );
    }

    #[test]
    fn slots_are_whole_lines_and_one_line_holds_48_bytes() {
        let stride = |payload, extended| RingLayout::new(2, payload, extended).unwrap().stride();
        assert_eq!(stride(0, false), 64);
        assert_eq!(stride(48, false), 64);
        assert_eq!(stride(49, false), 128);
        assert_eq!(stride(16, true), 64);
        assert_eq!(stride(17, true), 128);
        assert!(RingLayout::new(2, MAX_PAYLOAD_BYTES, true).is_ok());
        assert!(RingLayout::new(2, MAX_PAYLOAD_BYTES + 1, false).is_err());
    }
}
