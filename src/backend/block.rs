//! The memory of one block of a kernel's grid: a ring pair, a control block, telemetry, traces, state.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use super::host_consumer::{HostConsumer, KeepAlive};
use super::host_memory::{HostMemory, HostPool};
use super::{Device, DeviceMemory, Placement};
use crate::error::Error;
use crate::kernel::{
    ControlBlock, DeviceLines, HostCommands, HostLine, Lost, TELEMETRY_BUFFER_BYTES,
    TelemetryBuffer, TraceHeader, TraceSlot, TypeTable, UndeliveredMessage, outlet::Meter,
};
use crate::ring::{
    CURSOR_BYTES, Consumer, LINE_BYTES, Peek, Producer, RingLayout, RingParts, WriteCombining,
    store_fence,
};
use crate::time::{Bracket, Deadline, now_ns_ordered};

/// Looks at a device's answer before others get a chance to run: on a machine with few cores it may be they who give it. Some
/// ten microseconds, which an answer over a bus takes.
const CLOCK_LOOKS: u32 = 1000;

/// Bytes of the next kernel's kinds, one for each that there can be.
const NEXT_KINDS_BYTES: usize = TypeTable::MAX_TYPES * size_of::<AtomicU16>();

/// Stands for a kind that the next kernel does not take.
pub(crate) const NO_KIND: u16 = u16::MAX;

/// Sizes of one block's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockLayout {
    /// Of the request ring and of the reply ring.
    pub(crate) ring: RingLayout,
    pub(crate) state_bytes: usize,
    /// Messages whose traces are kept; 0 for a kernel that is not traced.
    pub(crate) trace_slots: u32,
}

/// Offsets in a block's host-to-device and device-to-host memory.
impl BlockLayout {
    /// Request slots, the cursor of the reply ring, the host's line of the control block, the link, the next kernel's kinds: all that the
    /// host writes, and in the link and the slots a kernel that passes its replies on.
    pub(crate) fn host_to_device(&self) -> usize {
        (self.next_kinds() + NEXT_KINDS_BYTES).next_multiple_of(CURSOR_BYTES)
    }

    /// Reply slots, the cursor of the request ring, the device's lines of the control block, telemetry, traces.
    pub(crate) fn device_to_host(&self) -> usize {
        (self.trace_header() + self.trace_bytes()).next_multiple_of(CURSOR_BYTES)
    }

    /// The cursor of the ring whose slots lie in the other memory.
    pub(crate) fn cursor(&self) -> usize {
        self.ring.slots_bytes()
    }

    pub(crate) fn host_line(&self) -> usize {
        self.cursor() + CURSOR_BYTES
    }

    /// The line by which a kernel that passes its replies on to this one learns how far this one has read: a device that knows only one
    /// piece of another kernel's memory finds it there.
    pub(crate) fn link(&self) -> usize {
        self.host_line() + size_of::<HostLine>()
    }

    /// For each kind of this kernel that of the kernel that its replies are passed on to, two in a word.
    pub(crate) fn next_kinds(&self) -> usize {
        self.link() + LINE_BYTES
    }

    pub(crate) fn device_lines(&self) -> usize {
        self.cursor() + CURSOR_BYTES
    }

    pub(crate) fn telemetry(&self) -> usize {
        self.device_lines() + size_of::<DeviceLines>()
    }

    pub(crate) fn trace_header(&self) -> usize {
        self.telemetry() + TELEMETRY_BUFFER_BYTES
    }

    fn trace_bytes(&self) -> usize {
        match self.trace_slots {
            0 => 0,
            slots => size_of::<TraceHeader>() + slots as usize * size_of::<TraceSlot>(),
        }
    }

    pub(crate) fn state(&self) -> usize {
        self.state_bytes.next_multiple_of(LINE_BYTES)
    }

    /// Words of a block's state, the last of which may lie in it in part: what a device's accessors
    /// reach.
    #[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
    pub(crate) fn state_words(&self) -> u32 {
        // Registrations bound the size.
        u32::try_from(self.state_bytes.div_ceil(4)).unwrap_or(u32::MAX)
    }

    /// Bytes of device memory that a block takes.
    pub(crate) fn total(&self) -> usize {
        self.host_to_device() + self.device_to_host() + self.state()
    }
}

/// The memory of all blocks of a grid: a piece a placement, in which each block has its share.
pub(crate) struct GridMemory {
    pub(crate) layout: BlockLayout,
    pub(crate) host_to_device: Arc<dyn DeviceMemory>,
    pub(crate) device_to_host: Arc<dyn DeviceMemory>,
    /// Absent for a kernel without state.
    pub(crate) state: Option<Arc<dyn DeviceMemory>>,
    /// What the device uses instead of it, of the same layout, where a thread carries messages between the two.
    pub(crate) behind: OnceLock<Arc<Self>>,
}

impl fmt::Debug for GridMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GridMemory")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

/// The memory of one block. Shared by the host's endpoints and the device's; freed with the last of the grid's.
pub(crate) struct BlockMemory {
    /// Index in the grid.
    pub(crate) index: u32,
    pub(crate) grid: Arc<GridMemory>,
    /// This block's shares.
    host_to_device: NonNull<u8>,
    device_to_host: NonNull<u8>,
    commands: HostCommands,
}

// SAFETY: the pointers reach memory that `grid` keeps alive and that is accessed through atomics and ring endpoints.
unsafe impl Send for BlockMemory {}
// SAFETY: as for `Send`.
unsafe impl Sync for BlockMemory {}

impl fmt::Debug for BlockMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockMemory")
            .field("index", &self.index)
            .field("layout", &self.grid.layout)
            .finish_non_exhaustive()
    }
}

/// The host's writing end of a ring. On cache lines of its own: its position changes with every message, and a neighbour
/// on the heap that the kernel's thread polls would drag the line to and fro.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct HostProducer {
    producer: Producer,
    _memory: KeepAlive,
}

/// The device's ends of a block's rings, and its state.
#[derive(Debug)]
pub(crate) struct DeviceEnds {
    pub(crate) requests: Consumer,
    pub(crate) replies: Producer,
    /// Absent where the state is not in this process's reach.
    pub(crate) state: Option<BlockStateBytes>,
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

/// One block's four ring ends: the host's two, and the device's.
pub(crate) type BlockEnds = (HostProducer, HostConsumer, DeviceEnds);

impl GridMemory {
    /// Takes the memory of `blocks` blocks from a device, prepares empty rings in it, and makes all of their ends.
    /// Touches every page, so that no message has to.
    pub(crate) fn allocate(
        device: &dyn Device,
        blocks: u32,
        layout: BlockLayout,
    ) -> Result<Vec<BlockEnds>, Error> {
        let grid = Self::new(device, blocks, layout, |bytes, placement| {
            device.allocate(bytes, placement)
        })?;
        let mut ends = grid.ends(device, blocks, 0)?;
        if grid.device_to_host.is_shared() {
            let pool = device.host_pool();
            let consumers = ends.iter_mut().map(|(_, consumer, _)| consumer);
            HostConsumer::read_copies(consumers, &pool, layout.ring)?;
        }
        Ok(ends)
    }

    /// Bytes that `allocate` takes beside the rings, for the host's copies of what a device may
    /// still write.
    pub(crate) fn copy_bytes(&self, blocks: u32) -> u64 {
        if self.device_to_host.is_shared() {
            HostConsumer::copy_bytes(self.layout.ring) as u64 * u64::from(blocks)
        } else {
            0
        }
    }

    /// The memory alone, each piece of it as `take` gives it.
    pub(crate) fn new(
        device: &dyn Device,
        blocks: u32,
        layout: BlockLayout,
        take: impl Fn(usize, Placement) -> Result<Arc<dyn DeviceMemory>, Error>,
    ) -> Result<Arc<Self>, Error> {
        let take = |bytes: usize, placement| {
            let all = bytes
                .checked_mul(blocks as usize)
                .ok_or_else(|| Error::OutOfMemory {
                    device: device.info().name.clone(),
                    asked: u64::MAX,
                    available: device.account().available(),
                })?;
            take(all, placement)
        };
        Ok(Arc::new(Self {
            layout,
            host_to_device: take(layout.host_to_device(), Placement::HostToDevice)?,
            device_to_host: take(layout.device_to_host(), Placement::DeviceToHost)?,
            state: match layout.state() {
                0 => None,
                bytes => Some(take(bytes, Placement::DeviceState)?),
            },
            behind: OnceLock::new(),
        }))
    }

    /// Prepares empty rings, whose first messages have position `start` (0, except to try wrap-around), and makes all of their
    /// ends; to be called once, of memory that the host can reach.
    pub(crate) fn ends(
        self: &Arc<Self>,
        device: &dyn Device,
        blocks: u32,
        start: u32,
    ) -> Result<Vec<BlockEnds>, Error> {
        (0..blocks)
            .map(|index| Ok(self.block(device, index)?.ends(start)))
            .collect()
    }

    fn block(self: &Arc<Self>, device: &dyn Device, index: u32) -> Result<BlockMemory, Error> {
        let share = |memory: &Arc<dyn DeviceMemory>, bytes: usize| {
            let start = memory.host_ptr().ok_or_else(|| Error::DeviceLost {
                device: device.info().name.clone(),
                reason: "ring memory that the host cannot reach".into(),
            })?;
            // SAFETY: `allocate` took this many bytes for each block, and `index` is below their number.
            Ok::<_, Error>(unsafe { start.add(index as usize * bytes) })
        };
        Ok(BlockMemory {
            index,
            host_to_device: share(&self.host_to_device, self.layout.host_to_device())?,
            device_to_host: share(&self.device_to_host, self.layout.device_to_host())?,
            grid: Arc::clone(self),
            commands: HostCommands::default(),
        })
    }

    /// A block's state, where this process can reach it.
    fn state_of(&self, index: u32) -> Option<BlockStateBytes> {
        let start = match &self.state {
            Some(state) => {
                let offset = index as usize * self.layout.state();
                // SAFETY: `allocate` took this many bytes for each block, and `index` is below their number.
                unsafe { state.host_ptr()?.add(offset) }
            }
            None => NonNull::<u64>::dangling().cast(),
        };
        Some(BlockStateBytes {
            bytes: NonNull::slice_from_raw_parts(start, self.layout.state_bytes),
        })
    }
}

impl BlockMemory {
    /// Prepares the block's rings and makes their four ends.
    fn ends(self, start: u32) -> BlockEnds {
        let ring = self.grid.layout.ring;
        let state = self.grid.state_of(self.index);
        let memory = Arc::new(self);
        let (requests, replies) = (memory.request_parts(), memory.reply_parts());
        // SAFETY: both parts lie within the block's shares, whose sizes `host_to_device` and `device_to_host` computed
        // from the same layout; the memory is zeroed, 64-byte aligned and not shared with anybody yet.
        unsafe {
            requests.initialise(ring, start);
            replies.initialise(ring, start);
        }
        memory.control().set_start(start);
        memory.link().store(start, Ordering::Release);
        // SAFETY: both rings have just been initialised with this layout and start. Exactly one producer and one
        // consumer is made of each, here, and each is stored beside an `Arc` of the memory, which outlives it.
        unsafe {
            (
                HostProducer {
                    producer: Producer::new(requests, ring, start),
                    _memory: Arc::<Self>::clone(&memory),
                },
                HostConsumer::new(
                    Consumer::new(replies, ring, start),
                    Arc::<Self>::clone(&memory),
                ),
                DeviceEnds {
                    requests: Consumer::new(requests, ring, start),
                    replies: Producer::new(replies, ring, start),
                    state,
                    memory,
                },
            )
        }
    }

    fn request_parts(&self) -> RingParts {
        RingParts {
            slots: self.host_to_device,
            cursor: self.device_to_host_at(self.grid.layout.cursor()),
            write_combining: self.grid.host_to_device.write_combining(),
            cursor_write_combining: self.grid.device_to_host.write_combining(),
        }
    }

    fn reply_parts(&self) -> RingParts {
        RingParts {
            slots: self.device_to_host,
            cursor: self.host_to_device_at(self.grid.layout.cursor()),
            write_combining: self.grid.device_to_host.write_combining(),
            cursor_write_combining: self.grid.host_to_device.write_combining(),
        }
    }

    fn host_to_device_at<T>(&self, offset: usize) -> NonNull<T> {
        debug_assert!(offset + size_of::<T>() <= self.grid.layout.host_to_device());
        // SAFETY: the layout's offsets lie within the block's share.
        unsafe { self.host_to_device.add(offset) }.cast()
    }

    fn device_to_host_at<T>(&self, offset: usize) -> NonNull<T> {
        debug_assert!(offset + size_of::<T>() <= self.grid.layout.device_to_host());
        // SAFETY: the layout's offsets lie within the block's share.
        unsafe { self.device_to_host.add(offset) }.cast()
    }

    /// How far the block has read, for the kernel that passes its replies on to it.
    fn link(&self) -> &AtomicU32 {
        // SAFETY: within the share, zero at first, only accessed as an atomic.
        unsafe { self.host_to_device_at(self.grid.layout.link()).as_ref() }
    }

    /// Says what a kind of this kernel is to the kernel that its replies are passed on to. Kind 0 is 0 to all of them.
    pub(crate) fn set_next_kind(&self, kind: u16, next: Option<u16>) {
        let index = usize::from(kind).wrapping_sub(1);
        if index >= TypeTable::MAX_TYPES {
            return;
        }
        let offset = self.grid.layout.next_kinds() + index * size_of::<AtomicU16>();
        // SAFETY: within the share, zero at first, only written by the host, and read whole by the device.
        let word: &AtomicU16 = unsafe { self.host_to_device_at(offset).as_ref() };
        word.store(next.unwrap_or(NO_KIND), Ordering::Release);
        store_fence();
    }

    /// Overwrites a word of a reply slot, as a faulty device might.
    #[cfg(test)]
    pub(crate) fn overwrite_reply_word(&self, slot: usize, word: usize, value: u32) {
        let ring = self.grid.layout.ring;
        let offset = slot * ring.stride() + 4 * word;
        assert!(offset < ring.slots_bytes() && 4 * word < ring.stride());
        // SAFETY: within the slots, aligned to 4; accesses to a header's words are atomic, and
        // tests overwrite others only where they are read in copies.
        unsafe {
            self.device_to_host_at::<std::sync::atomic::AtomicU32>(offset)
                .as_ref()
                .store(value, std::sync::atomic::Ordering::Release);
        }
    }

    #[inline]
    pub(crate) fn control(&self) -> ControlBlock<'_> {
        let layout = &self.grid.layout;
        // SAFETY: the bytes were zero at first, which is valid for both; all their fields are atomics, so that both
        // sides may store to them; offsets and bases are multiples of 64. They live as long as `self`.
        unsafe {
            ControlBlock {
                host: self.host_to_device_at(layout.host_line()).as_ref(),
                device: self.device_to_host_at(layout.device_lines()).as_ref(),
                commands: &self.commands,
            }
        }
    }

    #[inline]
    pub(crate) fn telemetry(&self) -> &TelemetryBuffer {
        // SAFETY: as for `control`.
        unsafe {
            self.device_to_host_at(self.grid.layout.telemetry())
                .as_ref()
        }
    }

    /// What lies in front of the block's traces, if it is traced.
    pub(crate) fn trace_header(&self) -> Option<&TraceHeader> {
        let layout = &self.grid.layout;
        // SAFETY: as for `control`; it is there if there are slots.
        (layout.trace_slots > 0)
            .then(|| unsafe { self.device_to_host_at(layout.trace_header()).as_ref() })
    }

    /// Asks the running device for its clock, and waits for the answer until the deadline.
    pub(crate) fn read_clock(&self, deadline: Deadline) -> Option<Bracket> {
        let header = self.trace_header()?;
        let before_ns = now_ns_ordered();
        let number = self.control().ask_clock();
        let mut looks = 0_u32;
        while header.clock_answered() != number {
            looks += 1;
            if looks.is_multiple_of(CLOCK_LOOKS) {
                if deadline.has_passed() {
                    return None;
                }
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        Some(Bracket {
            before_ns,
            ticks: header.clock(),
            after_ns: now_ns_ordered(),
        })
    }

    /// Takes over the samples that the device has written to the other memory since it had written as many as are `known`; how many it has by
    /// now. Only while the device writes none.
    #[cfg(feature = "vulkan")]
    pub(crate) fn mirror_traces(&self, other: &Self, known: u32) -> u32 {
        let Some(header) = other.trace_header() else {
            return known;
        };
        let written = header.written();
        let (to, from) = (self.traces(), other.traces());
        // Untrusted: no more than there are.
        let slots = self.grid.layout.trace_slots;
        for back in (1..=written.wrapping_sub(known).min(slots)).rev() {
            let index = (written.wrapping_sub(back) % slots) as usize;
            if let (Some(to), Some(from)) = (to.get(index), from.get(index)) {
                to.mirror(from);
            }
        }
        written
    }

    /// The block's traces; empty for a kernel that is not traced.
    pub(crate) fn traces(&self) -> &[TraceSlot] {
        let layout = &self.grid.layout;
        if layout.trace_slots == 0 {
            return &[];
        }
        let first = layout.trace_header() + size_of::<TraceHeader>();
        let first = self.device_to_host_at::<TraceSlot>(first);
        // SAFETY: as for `control`; `device_to_host` counted as many slots from this offset on.
        unsafe { NonNull::slice_from_raw_parts(first, layout.trace_slots as usize).as_ref() }
    }

    /// The sequence word of a slot.
    fn sequence(slots: NonNull<u8>, ring: RingLayout, position: u32) -> NonNull<AtomicU32> {
        let index = (position & (ring.capacity() - 1)) as usize;
        // SAFETY: the index is below the capacity of the ring whose slots these are.
        unsafe { slots.add(index * ring.stride()) }.cast()
    }

    /// Whether the request of this position is published.
    pub(crate) fn has_request(&self, position: u32) -> bool {
        Self::is_published(self.host_to_device, self.grid.layout.ring, position)
    }

    /// Copies a published request into the same slot of another block's memory of the same layout, which nobody reads
    /// meanwhile.
    pub(crate) fn copy_request_to(&self, other: &Self, position: u32) {
        debug_assert_eq!(self.grid.layout.ring, other.grid.layout.ring);
        self.copy_slot(self.host_to_device, other.host_to_device, position);
    }

    /// Copies a reply into the same slot of another block's memory of the same layout, and publishes it there. `false`, and
    /// nothing is copied, if there is no reply of this position.
    pub(crate) fn copy_reply_to(&self, other: &Self, position: u32) -> bool {
        debug_assert_eq!(self.grid.layout.ring, other.grid.layout.ring);
        let published = Self::is_published(self.device_to_host, self.grid.layout.ring, position);
        if published {
            self.copy_slot(self.device_to_host, other.device_to_host, position);
        }
        published
    }

    fn is_published(slots: NonNull<u8>, ring: RingLayout, position: u32) -> bool {
        let word = Self::sequence(slots, ring, position);
        // SAFETY: the first word of a slot is its sequence, which is only accessed as an atomic. ORDERING: publish. The
        // acquire pairs with the producer's release, so that the slot may be read.
        unsafe { word.as_ref() }.load(Ordering::Acquire) == position.wrapping_add(1)
    }

    fn copy_slot(&self, from: NonNull<u8>, to: NonNull<u8>, position: u32) {
        let ring = self.grid.layout.ring;
        let (from, to) = (
            Self::sequence(from, ring, position),
            Self::sequence(to, ring, position),
        );
        let behind = size_of::<AtomicU32>();
        // SAFETY: both slots have `stride` bytes. The source is published and not given back, so that nobody writes it;
        // the destination belongs to the caller until its sequence is stored. ORDERING: publish. The release pairs with
        // the consumer's acquire.
        unsafe {
            let (source, target) = (from.cast::<u8>().add(behind), to.cast::<u8>().add(behind));
            target.copy_from_nonoverlapping(source, ring.stride() - behind);
            to.as_ref()
                .store(position.wrapping_add(1), Ordering::Release);
        }
    }

    /// How far the consumer of the requests has read.
    pub(crate) fn request_cursor(&self) -> &AtomicU32 {
        // SAFETY: a cursor line begins with its position, which is only accessed as an atomic.
        unsafe { self.device_to_host_at(self.grid.layout.cursor()).as_ref() }
    }

    /// How far the consumer of the replies has read.
    pub(crate) fn reply_cursor(&self) -> &AtomicU32 {
        // SAFETY: as for `request_cursor`.
        unsafe { self.host_to_device_at(self.grid.layout.cursor()).as_ref() }
    }

    /// Hands the request at `position`, without its type, to `take`; false if there is none that
    /// can be read. Its slot is not given back.
    ///
    /// # Safety
    /// The block must have ended, or its thread be inside a handler that was given up as stuck, be
    /// it that of a block behind it, with its `terminate` word set: its consumer then takes no
    /// further slot. Or the calling thread must be inside the block's handler, whose request this
    /// is.
    pub(super) unsafe fn read_request(&self, position: u32, take: impl FnOnce(&Lost<'_>)) -> bool {
        // SAFETY: the ring is initialised, and alive as long as `self`. The caller promises that
        // the ring's own consumer reads no further, so that this one is its successor. It takes
        // nothing, so that it publishes nothing.
        let mut consumer =
            unsafe { Consumer::new(self.request_parts(), self.grid.layout.ring, position) };
        let Peek::Ready = consumer.peek() else {
            return false;
        };
        take(&Lost {
            block: Some(self.index),
            header: Some(*consumer.header()),
            extension: consumer.extension(),
            type_id: None,
            payload: consumer.payload(),
        });
        true
    }
}

impl BlockMemory {
    /// Copies out the request at a position.
    ///
    /// # Safety
    /// The calling thread must be inside the block's handler, whose request this is.
    pub(super) unsafe fn request_at(
        &self,
        kernel: &str,
        position: u32,
    ) -> Option<UndeliveredMessage> {
        let mut request = None;
        // SAFETY: as the caller promises.
        unsafe {
            self.read_request(position, |lost| {
                // Without its payload if there is no memory for that.
                let mut payload = Vec::new();
                if payload.try_reserve_exact(lost.payload.len()).is_ok() {
                    payload.extend_from_slice(lost.payload);
                }
                request = lost.header.map(|header| UndeliveredMessage {
                    kernel: kernel.to_owned(),
                    block: self.index,
                    header,
                    extension: lost.extension,
                    payload,
                });
            });
        }
        request
    }
}

impl Meter for BlockMemory {
    fn passed(&self) -> u32 {
        self.control().passed()
    }
}

impl HostProducer {
    /// The end, and what keeps its memory alive.
    pub(crate) fn into_parts(self) -> (Producer, KeepAlive) {
        (self.producer, self._memory)
    }

    /// The inverse of [`into_parts`](Self::into_parts).
    pub(crate) fn from_parts(producer: Producer, memory: KeepAlive) -> Self {
        Self {
            producer,
            _memory: memory,
        }
    }
}

/// Both ends of a ring in host memory.
pub(crate) fn host_ring(
    pool: &HostPool,
    layout: RingLayout,
) -> Result<(HostProducer, HostConsumer), Error> {
    let memory = pool.allocate(host_ring_bytes(layout))?;
    let start = memory.start();
    // SAFETY: the allocation has CURSOR_BYTES behind its `slots_bytes()`.
    let cursor = unsafe { start.add(layout.slots_bytes()) };
    let parts = RingParts {
        slots: start,
        cursor: cursor.cast(),
        write_combining: WriteCombining::No,
        cursor_write_combining: WriteCombining::No,
    };
    // SAFETY: both parts lie within the allocation, which is zeroed, 64-byte aligned and not shared with anybody yet.
    unsafe { parts.initialise(layout, 0) };
    // SAFETY: the ring has just been initialised with this layout and start; one producer and one consumer is made of
    // it, each stored beside an `Arc` of the memory, which outlives it.
    Ok(unsafe {
        (
            HostProducer {
                producer: Producer::new(parts, layout, 0),
                _memory: Arc::<HostMemory>::clone(&memory),
            },
            HostConsumer::new(Consumer::new(parts, layout, 0), memory),
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
