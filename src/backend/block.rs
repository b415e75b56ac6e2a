//! The memory of one block of a kernel's grid: a ring pair, a control block, telemetry, state.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use super::{Device, DeviceMemory, Placement};
use crate::error::Error;
use crate::kernel::{
    CONTROL_BLOCK_BYTES, ControlBlock, TELEMETRY_BUFFER_BYTES, TelemetryBuffer, UndeliveredMessage,
};
use crate::ring::{CURSOR_BYTES, Consumer, LINE_BYTES, Producer, RingLayout, RingParts};

/// Sizes of one block's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockLayout {
    /// Of the request ring and of the reply ring.
    pub(crate) ring: RingLayout,
    pub(crate) state_bytes: usize,
}

impl BlockLayout {
    /// Request slots, then the cursor of the reply ring: all that the host writes but the control block's line.
    fn host_to_device(&self) -> usize {
        self.ring.slots_bytes() + CURSOR_BYTES
    }

    /// Reply slots, the cursor of the request ring, control block, telemetry.
    fn device_to_host(&self) -> usize {
        self.ring.slots_bytes() + CURSOR_BYTES + CONTROL_BLOCK_BYTES + TELEMETRY_BUFFER_BYTES
    }

    fn state(&self) -> usize {
        self.state_bytes.next_multiple_of(LINE_BYTES)
    }

    /// Bytes of device memory that a block takes.
    pub(crate) fn total(&self) -> usize {
        self.host_to_device() + self.device_to_host() + self.state()
    }
}

/// The memory itself. Shared by the host's endpoints and the device's; freed with the last of them.
pub(crate) struct BlockMemory {
    /// Index in the grid.
    pub(crate) index: u32,
    layout: BlockLayout,
    host_to_device: Arc<dyn DeviceMemory>,
    device_to_host: Arc<dyn DeviceMemory>,
    /// Absent for a kernel without state.
    _state: Option<Arc<dyn DeviceMemory>>,
}

impl fmt::Debug for BlockMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockMemory")
            .field("index", &self.index)
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

/// Whatever must outlive a ring's endpoint.
type KeepAlive = Arc<dyn fmt::Debug + Send + Sync>;

/// The host's writing end of a ring. On cache lines of its own: its position changes with every message, and a neighbour
/// on the heap that the kernel's thread polls would drag the line to and fro.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct HostProducer {
    producer: Producer,
    _memory: KeepAlive,
}

/// The host's reading end of a ring. On cache lines of its own, as [`HostProducer`].
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct HostConsumer {
    consumer: Consumer,
    _memory: KeepAlive,
}

/// The device's ends of a block's rings, and its state.
#[derive(Debug)]
pub(crate) struct DeviceEnds {
    pub(crate) requests: Consumer,
    pub(crate) replies: Producer,
    pub(crate) state: BlockStateBytes,
    /// Keeps the memory of all of them alive.
    pub(crate) memory: Arc<BlockMemory>,
}

/// Exclusive access to a block's state bytes.
#[derive(Debug)]
pub(crate) struct BlockStateBytes {
    bytes: NonNull<[u8]>,
}

// SAFETY: the pointer reaches memory that only this value gives access to (`BlockMemory::allocate` makes one a block),
// and that `DeviceEnds` keeps alive.
unsafe impl Send for BlockStateBytes {}

impl BlockStateBytes {
    #[inline]
    pub(crate) fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: `allocate` made the slice from zeroed memory of exactly this length, for this value alone; the
        // memory outlives it because `DeviceEnds` holds both, and hands out the bytes only while it lives.
        unsafe { self.bytes.as_mut() }
    }
}

impl BlockMemory {
    /// Takes a block's memory from a device, prepares empty rings in it, and makes all four of their ends. Touches
    /// every page, so that no message has to.
    pub(crate) fn allocate(
        device: &dyn Device,
        index: u32,
        layout: BlockLayout,
    ) -> Result<(HostProducer, HostConsumer, DeviceEnds), Error> {
        let host_to_device = device.allocate(layout.host_to_device(), Placement::HostToDevice)?;
        let device_to_host = device.allocate(layout.device_to_host(), Placement::DeviceToHost)?;
        let state = match layout.state() {
            0 => None,
            bytes => Some(device.allocate(bytes, Placement::DeviceState)?),
        };
        let state_start = state
            .as_ref()
            .map_or(NonNull::<u64>::dangling().cast(), |state| state.host_ptr());
        let memory = Arc::new(Self {
            index,
            layout,
            host_to_device,
            device_to_host,
            _state: state,
        });
        let (requests, replies) = (memory.request_parts(), memory.reply_parts());
        // SAFETY: both parts lie within the two allocations above, whose sizes `host_to_device` and `device_to_host`
        // computed from the same layout; the memory is zeroed, 64-byte aligned and not shared with anybody yet.
        unsafe {
            requests.initialise(layout.ring, 0);
            replies.initialise(layout.ring, 0);
        }
        // SAFETY: both rings have just been initialised with this layout and start. Exactly one producer and one
        // consumer is made of each, here, and each is stored beside an `Arc` of the memory, which outlives it.
        let ends = unsafe {
            (
                HostProducer {
                    producer: Producer::new(requests, layout.ring, 0),
                    _memory: Arc::<Self>::clone(&memory),
                },
                HostConsumer {
                    consumer: Consumer::new(replies, layout.ring, 0),
                    _memory: Arc::<Self>::clone(&memory),
                },
                DeviceEnds {
                    requests: Consumer::new(requests, layout.ring, 0),
                    replies: Producer::new(replies, layout.ring, 0),
                    state: BlockStateBytes {
                        bytes: NonNull::slice_from_raw_parts(state_start, layout.state_bytes),
                    },
                    memory,
                },
            )
        };
        Ok(ends)
    }

    fn request_parts(&self) -> RingParts {
        RingParts {
            slots: self.host_to_device.host_ptr(),
            cursor: self.behind_replies(0).cast(),
            write_combining: self.host_to_device.write_combining(),
        }
    }

    fn reply_parts(&self) -> RingParts {
        // SAFETY: the allocation has CURSOR_BYTES behind its `slots_bytes()`.
        let cursor = unsafe {
            self.host_to_device
                .host_ptr()
                .add(self.layout.ring.slots_bytes())
        };
        RingParts {
            slots: self.device_to_host.host_ptr(),
            cursor: cursor.cast(),
            write_combining: self.device_to_host.write_combining(),
        }
    }

    /// What lies `offset` bytes behind the reply slots.
    fn behind_replies(&self, offset: usize) -> NonNull<u8> {
        debug_assert!(offset < CURSOR_BYTES + CONTROL_BLOCK_BYTES + TELEMETRY_BUFFER_BYTES);
        // SAFETY: `device_to_host()` reserved these bytes behind `slots_bytes()`.
        unsafe {
            self.device_to_host
                .host_ptr()
                .add(self.layout.ring.slots_bytes() + offset)
        }
    }

    /// Overwrites a word of a reply slot's header, as a faulty device might.
    #[cfg(test)]
    pub(crate) fn overwrite_reply_word(&self, slot: usize, word: usize, value: u32) {
        let offset = slot * self.layout.ring.stride() + 4 * word;
        assert!(offset < self.layout.ring.slots_bytes() && word < 4);
        // SAFETY: within the slots, aligned to 4; all accesses to these words are atomic.
        unsafe {
            self.device_to_host
                .host_ptr()
                .add(offset)
                .cast::<std::sync::atomic::AtomicU32>()
                .as_ref()
                .store(value, std::sync::atomic::Ordering::Release);
        }
    }

    #[inline]
    pub(crate) fn control(&self) -> &ControlBlock {
        // SAFETY: the bytes were zero at first, which is a valid control block; all its fields are atomics, so that
        // both sides may store to them; offset and base are multiples of 64. They live as long as `self`.
        unsafe { self.behind_replies(CURSOR_BYTES).cast().as_ref() }
    }

    #[inline]
    pub(crate) fn telemetry(&self) -> &TelemetryBuffer {
        let offset = CURSOR_BYTES + CONTROL_BLOCK_BYTES;
        // SAFETY: as for `control`.
        unsafe { self.behind_replies(offset).cast().as_ref() }
    }

    /// Copies out what lies in the request ring from `position` on.
    ///
    /// # Safety
    /// The block must have ended, or be inside a handler that was given up as stuck, with its `terminate` word set:
    /// its consumer then takes no further slot. No sender writes a slot that was not given back, whatever it does
    /// meanwhile.
    pub(crate) unsafe fn leftovers(&self, kernel: &str, position: u32) -> Vec<UndeliveredMessage> {
        // SAFETY: the ring is initialised, and alive as long as `self`. The caller promises that the ring's own
        // consumer reads no further, so that this one is its successor.
        let mut consumer =
            unsafe { Consumer::new(self.request_parts(), self.layout.ring, position) };
        let mut messages = Vec::new();
        while let Ok(Some(incoming)) = consumer.try_next() {
            messages.push(UndeliveredMessage {
                kernel: kernel.to_owned(),
                block: self.index,
                header: incoming.header(),
                payload: incoming.payload().to_vec(),
            });
        }
        messages
    }
}

/// Both ends of a ring in host memory, of a device's account.
pub(crate) fn host_ring(
    device: &dyn Device,
    layout: RingLayout,
) -> Result<(HostProducer, HostConsumer), Error> {
    let memory = device.allocate(host_ring_bytes(layout), Placement::DeviceToHost)?;
    // SAFETY: the allocation has CURSOR_BYTES behind its `slots_bytes()`.
    let cursor = unsafe { memory.host_ptr().add(layout.slots_bytes()) };
    let parts = RingParts {
        slots: memory.host_ptr(),
        cursor: cursor.cast(),
        write_combining: memory.write_combining(),
    };
    // SAFETY: both parts lie within the allocation, which is zeroed, 64-byte aligned and not shared with anybody yet.
    unsafe { parts.initialise(layout, 0) };
    // SAFETY: the ring has just been initialised with this layout and start; one producer and one consumer is made of
    // it, each stored beside an `Arc` of the memory, which outlives it.
    Ok(unsafe {
        (
            HostProducer {
                producer: Producer::new(parts, layout, 0),
                _memory: Arc::new(Arc::clone(&memory)),
            },
            HostConsumer {
                consumer: Consumer::new(parts, layout, 0),
                _memory: Arc::new(memory),
            },
        )
    })
}

/// Bytes of device memory that a [`host_ring`] takes.
pub(crate) fn host_ring_bytes(layout: RingLayout) -> usize {
    layout.slots_bytes() + CURSOR_BYTES
}

impl Deref for HostProducer {
    type Target = Producer;

    #[inline]
    fn deref(&self) -> &Producer {
        &self.producer
    }
}

impl DerefMut for HostProducer {
    #[inline]
    fn deref_mut(&mut self) -> &mut Producer {
        &mut self.producer
    }
}

impl Deref for HostConsumer {
    type Target = Consumer;

    #[inline]
    fn deref(&self) -> &Consumer {
        &self.consumer
    }
}

impl DerefMut for HostConsumer {
    #[inline]
    fn deref_mut(&mut self) -> &mut Consumer {
        &mut self.consumer
    }
}
