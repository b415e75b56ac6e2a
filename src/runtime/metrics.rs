//! What a kernel tells of itself.

use std::time::Duration;

use crate::kernel::{DeadLetterCounts, KernelFailure, KernelState, Telemetry};

/// Where a kernel stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelStatus {
    /// Name of the instance.
    pub name: String,
    /// Id of its registration.
    pub kernel: String,
    /// Index of its device.
    pub device: usize,
    /// Its state.
    pub state: KernelState,
    /// How it failed, if it did.
    pub failure: Option<KernelFailure>,
}

/// What a kernel has done. Counters are exact once the kernel has been idle for a moment; reading them does not disturb
/// its loop beyond the transfer of a few cache lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelMetrics {
    /// Where it stands.
    pub status: KernelStatus,
    /// Blocks in its grid.
    pub blocks: u32,
    /// Requests accepted by sends: those processed, those queued, and those that were given up in a client's lane.
    pub accepted: u64,
    /// Requests that the handler is done with.
    pub processed: u64,
    /// Requests accepted and not yet processed, those in the lanes of clients included.
    pub queue_depth: u64,
    /// Replies written.
    pub produced: u64,
    /// Replies received by callers.
    pub received_replies: u64,
    /// Requests that the kernel could make no sense of.
    pub dropped: u64,
    /// Code of the last error that a handler returned, of the last block that had one; 0 if none had.
    pub last_error: u32,
    /// Signs of life of all blocks' loops, modulo 2^32 each.
    pub heartbeats: u64,
    /// Slices that the blocks have begun, modulo 2^32 each: dispatches of a loop that a device runs piece by piece (Vulkan).
    /// While heartbeats stand still, a number that grows means "between slices", one that does not means "stuck". Always 0 on
    /// the CPU.
    pub slices: u64,
    /// Time since the oldest sign of life among the blocks; `None` before the first, and without telemetry unless the device's
    /// bridge has seen one.
    pub heartbeat_age: Option<Duration>,
    /// The loop's own counters, summed over the grid; `None` if `RuntimeConfig::enable_telemetry` is off.
    pub telemetry: Option<Telemetry>,
    /// Messages that could not be delivered.
    pub dead_letters: DeadLetterCounts,
    /// Bytes of memory that the kernel takes, on device and host.
    pub memory_bytes: u64,
    /// The core that each block runs on, read back from the system (on Linux; elsewhere the core
    /// that it was put on): of a kernel that has ended, the last. Empty if a block may run on
    /// several, and for kernels on other devices than the CPU.
    pub cores: Vec<usize>,
    /// Whether any of the kernel's loops spins (rather than sleeps) at present while it has nothing
    /// to do. With [`WaitStrategy::Auto`](crate::WaitStrategy) this changes.
    pub spins: bool,
}
