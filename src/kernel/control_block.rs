//! The control block: how the host steers a resident block of a kernel, and what that block tells of itself.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

/// Size of a control block in bytes: one line that the host writes, three that the device writes.
pub const CONTROL_BLOCK_BYTES: usize = 256;

/// One block's control block, visible to host and device. Every line has one writer, every word is loaded and stored
/// whole.
///
/// | line | written by | words |
/// |---|---|---|
/// | 0 | host | `active`, `terminate`, `slice_budget`, `epoch` |
/// | 1 | device, per message | `processed`, `produced` |
/// | 2 | device, per poll or rarer | `state`, `heartbeat`, `dropped`, `last_error`, `slice_number`, `has_terminated` |
/// | 3 | device | reserved |
///
/// `slice_budget`, `epoch` and `slice_number` are there for devices that run a kernel in slices; the CPU leaves them 0.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct ControlBlock {
    active: AtomicU32,
    terminate: AtomicU32,
    slice_budget: AtomicU32,
    epoch: AtomicU32,
    _host_line: [u32; 12],

    processed: AtomicU32,
    produced: AtomicU32,
    _message_line: [u32; 14],

    state: AtomicU32,
    heartbeat: AtomicU32,
    dropped: AtomicU32,
    last_error: AtomicU32,
    slice_number: AtomicU32,
    has_terminated: AtomicU32,
    _state_line: [u32; 10],

    _reserved: [u32; 16],
}

const _: () = {
    assert!(size_of::<ControlBlock>() == CONTROL_BLOCK_BYTES);
    assert!(align_of::<ControlBlock>() == 64);
    assert!(offset_of!(ControlBlock, active) == 0);
    assert!(offset_of!(ControlBlock, terminate) == 4);
    assert!(offset_of!(ControlBlock, slice_budget) == 8);
    assert!(offset_of!(ControlBlock, epoch) == 12);
    assert!(offset_of!(ControlBlock, processed) == 64);
    assert!(offset_of!(ControlBlock, produced) == 68);
    assert!(offset_of!(ControlBlock, state) == 128);
    assert!(offset_of!(ControlBlock, heartbeat) == 132);
    assert!(offset_of!(ControlBlock, dropped) == 136);
    assert!(offset_of!(ControlBlock, last_error) == 140);
    assert!(offset_of!(ControlBlock, slice_number) == 144);
    assert!(offset_of!(ControlBlock, has_terminated) == 148);
};

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
}

impl Default for ControlBlock {
    fn default() -> Self {
        // SAFETY: every field is an integer or an atomic integer, for which all zeros is a valid value.
        unsafe { std::mem::zeroed() }
    }
}

impl ControlBlock {
    // Host line.

    pub(crate) fn set_active(&self, active: bool) {
        // ORDERING: control. Release pairs with `is_active`: whatever the host prepared is visible to the block.
        self.active.store(active.into(), Ordering::Release);
    }

    pub(crate) fn set_terminate(&self) {
        // ORDERING: control. Pairs with `must_terminate`.
        self.terminate.store(1, Ordering::Release);
    }

    // Read by the block.

    #[inline]
    pub(crate) fn is_active(&self) -> bool {
        // ORDERING: control. Pairs with `set_active`.
        self.active.load(Ordering::Acquire) != 0
    }

    #[inline]
    pub(crate) fn must_terminate(&self) -> bool {
        // ORDERING: control. Pairs with `set_terminate`.
        self.terminate.load(Ordering::Acquire) != 0
    }

    // Device lines, written by the block.

    #[inline]
    pub(crate) fn store_processed(&self, position: u32) {
        // ORDERING: progress. Release pairs with `processed`: the host may take over behind this position.
        self.processed.store(position, Ordering::Release);
    }

    #[inline]
    pub(crate) fn store_produced(&self, position: u32) {
        // ORDERING: progress. Pairs with `produced`.
        self.produced.store(position, Ordering::Release);
    }

    #[inline]
    pub(crate) fn beat(&self) {
        // Single writer: a load and a store, not a read-modify-write.
        let beats = self.heartbeat.load(Ordering::Relaxed);
        self.heartbeat
            .store(beats.wrapping_add(1), Ordering::Relaxed);
    }

    pub(crate) fn store_state(&self, state: BlockState) {
        // ORDERING: control. Release pairs with `state`.
        self.state.store(state as u32, Ordering::Release);
        if state == BlockState::Ended {
            self.has_terminated.store(1, Ordering::Release);
        }
    }

    /// Counts a request that was consumed, but given to no handler.
    pub(crate) fn count_dropped(&self) {
        let dropped = self.dropped.load(Ordering::Relaxed);
        self.dropped
            .store(dropped.wrapping_add(1), Ordering::Relaxed);
    }

    pub(crate) fn store_last_error(&self, code: u32) {
        self.last_error.store(code, Ordering::Relaxed);
    }

    // Device lines, read by the host.

    pub(crate) fn state(&self) -> Option<BlockState> {
        // ORDERING: control. Pairs with `store_state`.
        match self.state.load(Ordering::Acquire) {
            0 => Some(BlockState::Absent),
            1 => Some(BlockState::Idle),
            2 => Some(BlockState::Polling),
            3 => Some(BlockState::Ended),
            _ => None,
        }
    }

    /// Position up to which requests have been consumed, modulo 2^32.
    pub(crate) fn processed(&self) -> u32 {
        // ORDERING: progress. Pairs with `store_processed`.
        self.processed.load(Ordering::Acquire)
    }

    /// Position up to which replies have been written, modulo 2^32.
    pub(crate) fn produced(&self) -> u32 {
        // ORDERING: progress. Pairs with `store_produced`.
        self.produced.load(Ordering::Acquire)
    }

    /// Counts the polling loop's signs of life, modulo 2^32.
    pub(crate) fn heartbeat(&self) -> u32 {
        self.heartbeat.load(Ordering::Relaxed)
    }

    /// Requests that the block consumed, but gave to no handler.
    pub(crate) fn dropped(&self) -> u32 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Code of the last error reply.
    pub(crate) fn last_error(&self) -> u32 {
        self.last_error.load(Ordering::Relaxed)
    }
}
