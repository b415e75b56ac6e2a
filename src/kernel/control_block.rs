//! The control block: how the host steers a resident block of a kernel, and what that block tells of itself.

use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::ring::store_fence;

/// Size of a control block in bytes: one line that the host writes, three that the device writes.
pub const CONTROL_BLOCK_BYTES: usize = size_of::<HostLine>() + size_of::<DeviceLines>();

const _: () = assert!(CONTROL_BLOCK_BYTES == 256);

/// One block's control block. Every line has one writer, every word is loaded and stored whole. The host's line lies in
/// memory that is near the device, who polls it; the device's lines in memory that is near the host. Of a device that runs slices,
/// the host says in the `state` word for blocks that have none in flight what they would have said.
///
/// | line | written by | words |
/// |---|---|---|
/// | 0 | host | `active`, `terminate`, `slice_budget`, `epoch`, `idle_budget`, `clock_asked`, `way`, and where that leads: `next_*`; `clock_half` |
/// | 1 | device, per message | `processed`, `produced`, `step`, `passed` |
/// | 2 | device, per poll or rarer | `state`, `heartbeat`, `dropped`, `last_error`, `slice_number`, `has_terminated`, `fault`, `way_taken` |
/// | 3 | device | reserved |
///
/// `slice_budget`, `epoch`, `idle_budget`, `step`, `slice_number` and `fault` are there for devices that run a kernel in
/// slices; the CPU leaves them 0. `clock_asked` and `clock_half` are for traces on devices with clocks of their own. Of the replies that a
/// device has `produced`, it has `passed` so many on into the request ring of another kernel; `way` and what follows tell a device that is
/// told nothing else between its launch and its end where that ring is, and `way_taken` that it goes by it.
#[derive(Clone, Copy, Debug)]
pub struct ControlBlock<'a> {
    pub(crate) host: &'a HostLine,
    pub(crate) device: &'a DeviceLines,
    /// What the host line says, where the host may read it.
    pub(crate) commands: &'a HostCommands,
}

/// The host's own copy of its commands. The host's line may lie in memory of the device, which takes microseconds to read.
#[derive(Debug, Default)]
pub(crate) struct HostCommands {
    active: AtomicBool,
    terminate: AtomicBool,
    clock_asked: AtomicU32,
    way: AtomicU32,
}

/// The line of a control block that the host writes.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct HostLine {
    active: AtomicU32,
    terminate: AtomicU32,
    /// Polls, and loop iterations of handlers, after which a slice ends.
    slice_budget: AtomicU32,
    /// Which command buffers are valid: a slice of another epoch ends at once.
    epoch: AtomicU32,
    /// Empty polls in a row after which a slice ends.
    idle_budget: AtomicU32,
    /// Changes when the host wants to know the device's clock.
    clock_asked: AtomicU32,
    /// Changes when replies are to go elsewhere: even while they go into the own ring, odd while into that of another kernel.
    way: AtomicU32,
    /// Addresses of the next kernel's request slots and of their cursor, low words first.
    next_slots: [AtomicU32; 2],
    next_cursor: [AtomicU32; 2],
    next_capacity: AtomicU32,
    next_slot_words: AtomicU32,
    /// From the count of replies that were passed on to the position in that ring.
    next_offset: AtomicU32,
    _reserved: u32,
    /// In which half of its low word's range the device's clock last was, counted from the clock's beginning; 0 if it shows more than its low word.
    clock_half: AtomicU32,
}

/// Where a device that knows addresses finds the request ring of another kernel.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct NextRing {
    pub(crate) slots: u64,
    pub(crate) cursor: u64,
    pub(crate) capacity: u32,
    pub(crate) slot_words: u32,
    pub(crate) offset: u32,
}

/// The lines of a control block that the device writes.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct DeviceLines {
    processed: AtomicU32,
    produced: AtomicU32,
    /// Runs of the handler for the request in hand, for handlers that take several.
    step: AtomicU32,
    /// Replies among those produced that went into the ring of another kernel.
    passed: AtomicU32,
    _message_line: [u32; 12],

    state: AtomicU32,
    heartbeat: AtomicU32,
    dropped: AtomicU32,
    last_error: AtomicU32,
    slice_number: AtomicU32,
    has_terminated: AtomicU32,
    fault: AtomicU32,
    /// The `way` of the host's line that the block goes by.
    way_taken: AtomicU32,
    _state_line: [u32; 8],

    _reserved: [u32; 16],
}

const _: () = {
    assert!(size_of::<HostLine>() == 64);
    assert!(offset_of!(HostLine, active) == 0);
    assert!(offset_of!(HostLine, terminate) == 4);
    assert!(offset_of!(HostLine, slice_budget) == 8);
    assert!(offset_of!(HostLine, epoch) == 12);
    assert!(offset_of!(HostLine, idle_budget) == 16);
    assert!(offset_of!(HostLine, clock_asked) == 20);
    assert!(offset_of!(HostLine, way) == 24);
    assert!(offset_of!(HostLine, next_slots) == 28);
    assert!(offset_of!(HostLine, next_cursor) == 36);
    assert!(offset_of!(HostLine, next_capacity) == 44);
    assert!(offset_of!(HostLine, next_slot_words) == 48);
    assert!(offset_of!(HostLine, next_offset) == 52);
    assert!(offset_of!(HostLine, clock_half) == 60);
    assert!(size_of::<DeviceLines>() == 192);
    assert!(offset_of!(DeviceLines, processed) == 0);
    assert!(offset_of!(DeviceLines, produced) == 4);
    assert!(offset_of!(DeviceLines, step) == 8);
    assert!(offset_of!(DeviceLines, passed) == 12);
    assert!(offset_of!(DeviceLines, state) == 64);
    assert!(offset_of!(DeviceLines, heartbeat) == 68);
    assert!(offset_of!(DeviceLines, dropped) == 72);
    assert!(offset_of!(DeviceLines, last_error) == 76);
    assert!(offset_of!(DeviceLines, slice_number) == 80);
    assert!(offset_of!(DeviceLines, has_terminated) == 84);
    assert!(offset_of!(DeviceLines, fault) == 88);
    assert!(offset_of!(DeviceLines, way_taken) == 92);
};

#[cfg(all(test, feature = "vulkan"))]
impl HostLine {
    /// Names as in shaders, and offsets in bytes.
    pub(crate) const OFFSETS: [(&'static str, usize); 5] = [
        ("ACTIVE", offset_of!(HostLine, active)),
        ("TERMINATE", offset_of!(HostLine, terminate)),
        ("SLICE_BUDGET", offset_of!(HostLine, slice_budget)),
        ("EPOCH", offset_of!(HostLine, epoch)),
        ("IDLE_BUDGET", offset_of!(HostLine, idle_budget)),
    ];

    /// Of what only preludes with a clock know.
    pub(crate) const CLOCK_ASKED: usize = offset_of!(HostLine, clock_asked);

    /// Of what only preludes with addresses know.
    pub(crate) const WAY_OFFSETS: [(&'static str, usize); 6] = [
        ("WAY", offset_of!(HostLine, way)),
        ("NEXT_SLOTS", offset_of!(HostLine, next_slots)),
        ("NEXT_CURSOR", offset_of!(HostLine, next_cursor)),
        ("NEXT_CAPACITY", offset_of!(HostLine, next_capacity)),
        ("NEXT_SLOT_WORDS", offset_of!(HostLine, next_slot_words)),
        ("NEXT_OFFSET", offset_of!(HostLine, next_offset)),
    ];

    /// Of what only shaders with a clock know.
    pub(crate) const CLOCK_HALF: usize = offset_of!(HostLine, clock_half);
}

#[cfg(all(test, feature = "vulkan"))]
impl DeviceLines {
    /// Names as in shaders, and offsets in bytes.
    pub(crate) const OFFSETS: [(&'static str, usize); 11] = [
        ("PROCESSED", offset_of!(DeviceLines, processed)),
        ("PRODUCED", offset_of!(DeviceLines, produced)),
        ("STEP", offset_of!(DeviceLines, step)),
        ("PASSED", offset_of!(DeviceLines, passed)),
        ("STATE", offset_of!(DeviceLines, state)),
        ("HEARTBEAT", offset_of!(DeviceLines, heartbeat)),
        ("DROPPED", offset_of!(DeviceLines, dropped)),
        ("LAST_ERROR", offset_of!(DeviceLines, last_error)),
        ("SLICE_NUMBER", offset_of!(DeviceLines, slice_number)),
        ("HAS_TERMINATED", offset_of!(DeviceLines, has_terminated)),
        ("FAULT", offset_of!(DeviceLines, fault)),
    ];

    /// Of what only preludes with addresses know.
    pub(crate) const WAY_TAKEN: usize = offset_of!(DeviceLines, way_taken);
}

/// Values of the `state` and `fault` words, as shaders name them.
#[cfg(all(test, feature = "vulkan"))]
pub(crate) const CONTROL_VALUES: [(&str, u32); 8] = [
    ("STATE_IDLE", BlockState::Idle as u32),
    ("STATE_POLLING", BlockState::Polling as u32),
    ("STATE_ENDED", BlockState::Ended as u32),
    ("STATE_FAULTED", BlockState::Faulted as u32),
    ("FAULT_NONE", 0),
    ("FAULT_CORRUPT_RING", BlockFault::CorruptRing as u32),
    ("FAULT_LOOP_CUT", BlockFault::LoopCut as u32),
    ("FAULT_TOO_MANY_REPLIES", BlockFault::TooManyReplies as u32),
];

/// What a resident block says of itself in the `state` word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum BlockState {
    /// Not started.
    Absent = 0,
    /// Resident, not polling.
    Idle = 1,
    /// Polling.
    Polling = 2,
    /// Ended.
    Ended = 3,
    /// Ended by a fault that the `fault` word names.
    Faulted = 4,
}

/// What the `fault` word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum BlockFault {
    /// A request slot holds what no correct producer writes.
    CorruptRing = 1,
    /// The driver ended a loop before its condition did.
    LoopCut = 2,
    /// The handler wrote more replies than it declared, into a full ring.
    TooManyReplies = 3,
}

impl ControlBlock<'_> {
    // Host line.

    pub(crate) fn set_active(&self, active: bool) {
        // ORDERING: control. Release pairs with `is_active`: whatever the host prepared is visible to the block.
        self.commands.active.store(active, Ordering::Release);
        self.host.active.store(active.into(), Ordering::Release);
        store_fence();
    }

    pub(crate) fn set_terminate(&self) {
        // ORDERING: control. Pairs with `must_terminate`.
        self.commands.terminate.store(true, Ordering::Release);
        self.host.terminate.store(1, Ordering::Release);
        store_fence();
    }

    /// Whether the host wants the block to poll; for the host.
    pub(crate) fn wants_active(&self) -> bool {
        self.commands.active.load(Ordering::Acquire)
    }

    /// Whether the host wants the block to end; for the host.
    pub(crate) fn wants_end(&self) -> bool {
        self.commands.terminate.load(Ordering::Acquire)
    }

    /// How long slices last from the next one on.
    pub(crate) fn set_budgets(&self, slice: u32, idle: u32) {
        self.host.slice_budget.store(slice, Ordering::Relaxed);
        self.host.idle_budget.store(idle, Ordering::Release);
        store_fence();
    }

    /// Makes slices of all other epochs end at once.
    pub(crate) fn set_epoch(&self, epoch: u32) {
        // ORDERING: control. Whatever was prepared for the epoch is visible to its slices.
        self.host.epoch.store(epoch, Ordering::Release);
        store_fence();
    }

    /// Asks for the device's clock; the question's number, which its answer will carry. One asks at a time.
    pub(crate) fn ask_clock(&self) -> u32 {
        let number = self
            .commands
            .clock_asked
            .load(Ordering::Relaxed)
            .wrapping_add(1);
        self.commands.clock_asked.store(number, Ordering::Relaxed);
        // ORDERING: control. The block reads its clock after it has seen the question.
        self.host.clock_asked.store(number, Ordering::Release);
        store_fence();
        number
    }

    /// Replies go to this ring from now on, or into the own one; the number that `way_taken` will have when they do. What was said before must
    /// have been followed.
    #[cfg(feature = "cuda")]
    pub(crate) fn set_way(&self, next: Option<NextRing>) -> u32 {
        let host = self.host;
        let before = self.commands.way.load(Ordering::Relaxed);
        // The next even or odd one: none is like that before it.
        let way = match next {
            None => (before | 1).wrapping_add(1),
            Some(_) => before.wrapping_add(1) | 1,
        };
        self.commands.way.store(way, Ordering::Relaxed);
        if let Some(next) = next {
            let words = |to: &[AtomicU32; 2], value: u64| {
                to[0].store(value as u32, Ordering::Relaxed);
                to[1].store((value >> 32) as u32, Ordering::Relaxed);
            };
            words(&host.next_slots, next.slots);
            words(&host.next_cursor, next.cursor);
            host.next_capacity.store(next.capacity, Ordering::Relaxed);
            host.next_slot_words
                .store(next.slot_words, Ordering::Relaxed);
            host.next_offset.store(next.offset, Ordering::Relaxed);
        }
        store_fence();
        // ORDERING: control. Whatever describes the way is visible to a block that sees it.
        host.way.store(way, Ordering::Release);
        store_fence();
        way
    }

    /// The way that the block goes by.
    #[cfg(feature = "cuda")]
    pub(crate) fn way_taken(&self) -> u32 {
        // ORDERING: control. What was published by the way before is visible, and counted in `passed`.
        self.device.way_taken.load(Ordering::Acquire)
    }

    /// Says where the device's clock is, for one that shows its low word alone.
    #[cfg(feature = "vulkan")]
    pub(crate) fn set_clock_half(&self, half: u32) {
        self.host.clock_half.store(half, Ordering::Release);
        store_fence();
    }

    /// Where an empty kernel begins.
    pub(crate) fn set_start(&self, position: u32) {
        self.device.processed.store(position, Ordering::Release);
        self.device.produced.store(position, Ordering::Release);
    }

    // Read by the block.

    #[inline]
    pub(crate) fn is_active(&self) -> bool {
        // ORDERING: control. Pairs with `set_active`.
        self.host.active.load(Ordering::Acquire) != 0
    }

    #[inline]
    pub(crate) fn must_terminate(&self) -> bool {
        // ORDERING: control. Pairs with `set_terminate`.
        self.host.terminate.load(Ordering::Acquire) != 0
    }

    // Device lines, written by the block.

    #[inline]
    pub(crate) fn store_processed(&self, position: u32) {
        // ORDERING: progress. Release pairs with `processed`: the host may take over behind this position.
        self.device.processed.store(position, Ordering::Release);
    }

    #[inline]
    pub(crate) fn store_produced(&self, position: u32) {
        // ORDERING: progress. Pairs with `produced`.
        self.device.produced.store(position, Ordering::Release);
    }

    #[inline]
    pub(crate) fn beat(&self) {
        // Single writer: a load and a store, not a read-modify-write.
        let beats = self.device.heartbeat.load(Ordering::Relaxed);
        self.device
            .heartbeat
            .store(beats.wrapping_add(1), Ordering::Relaxed);
    }

    pub(crate) fn store_state(&self, state: BlockState) {
        // ORDERING: control. Release pairs with `state`.
        self.device.state.store(state as u32, Ordering::Release);
        if state == BlockState::Ended {
            self.device.has_terminated.store(1, Ordering::Release);
        }
    }

    /// Counts a request that was consumed, but given to no handler.
    pub(crate) fn count_dropped(&self) {
        let dropped = self.device.dropped.load(Ordering::Relaxed);
        self.device
            .dropped
            .store(dropped.wrapping_add(1), Ordering::Relaxed);
    }

    pub(crate) fn store_last_error(&self, code: u32) {
        self.device.last_error.store(code, Ordering::Relaxed);
    }

    // Device lines, read by the host.

    pub(crate) fn state(&self) -> Option<BlockState> {
        // ORDERING: control. Pairs with `store_state`.
        match self.device.state.load(Ordering::Acquire) {
            0 => Some(BlockState::Absent),
            1 => Some(BlockState::Idle),
            2 => Some(BlockState::Polling),
            3 => Some(BlockState::Ended),
            4 => Some(BlockState::Faulted),
            _ => None,
        }
    }

    /// What ended a block that is `Faulted`.
    pub(crate) fn fault(&self) -> Option<BlockFault> {
        // Written before the state, whose load is an acquire.
        match self.device.fault.load(Ordering::Relaxed) {
            1 => Some(BlockFault::CorruptRing),
            2 => Some(BlockFault::LoopCut),
            3 => Some(BlockFault::TooManyReplies),
            _ => None,
        }
    }

    /// Takes over what another block's device lines say of messages; states and signs of life are this block's own.
    pub(crate) fn mirror(&self, other: ControlBlock<'_>) {
        let (to, from) = (self.device, other.device);
        for (to, from) in [
            (&to.produced, &from.produced),
            (&to.passed, &from.passed),
            (&to.dropped, &from.dropped),
            (&to.last_error, &from.last_error),
            (&to.slice_number, &from.slice_number),
            (&to.fault, &from.fault),
        ] {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.store_processed(other.processed());
    }

    /// Slices that the block has begun, modulo 2^32.
    pub(crate) fn slice_number(&self) -> u32 {
        self.device.slice_number.load(Ordering::Relaxed)
    }

    /// Position up to which requests have been consumed, modulo 2^32.
    pub(crate) fn processed(&self) -> u32 {
        // ORDERING: progress. Pairs with `store_processed`.
        self.device.processed.load(Ordering::Acquire)
    }

    /// Runs of the handler so far for the request in hand, modulo 2^32.
    pub(crate) fn step(&self) -> u32 {
        self.device.step.load(Ordering::Relaxed)
    }

    /// Position up to which replies have been written, modulo 2^32.
    pub(crate) fn produced(&self) -> u32 {
        // ORDERING: progress. Pairs with `store_produced`.
        self.device.produced.load(Ordering::Acquire)
    }

    /// Replies among them that went into the ring of another kernel, modulo 2^32.
    pub(crate) fn passed(&self) -> u32 {
        // ORDERING: progress. Stored before `processed`, so that what is processed is counted here.
        self.device.passed.load(Ordering::Acquire)
    }

    /// Counts the polling loop's signs of life, modulo 2^32.
    pub(crate) fn heartbeat(&self) -> u32 {
        self.device.heartbeat.load(Ordering::Relaxed)
    }

    /// Requests that the block consumed, but gave to no handler.
    pub(crate) fn dropped(&self) -> u32 {
        self.device.dropped.load(Ordering::Relaxed)
    }

    /// Code of the last error reply.
    pub(crate) fn last_error(&self) -> u32 {
        self.device.last_error.load(Ordering::Relaxed)
    }
}
