//! What round trips and streams have in common: sizes, runtimes, and a bare ring.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::time::Duration;

use ringkernel::ring::{CURSOR_BYTES, Consumer, Producer, RingLayout, RingParts, WriteCombining};
use ringkernel::{LaunchOptions, RingKernelRuntime, RuntimeConfig};

use crate::{Config, Failure};

/// Slots of every queue.
pub const CAPACITY: usize = 4096;

/// Longer than any scheduler keeps a thread away; a message that takes longer is a failure.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// A runtime of the high-performance preset: kernels and callers spin, kernels do not time their handlers unless asked.
pub fn runtime(config: &Config, telemetry: bool) -> Result<RingKernelRuntime, Failure> {
    Ok(RingKernelRuntime::builder()
        .backend(config.backend)
        .config(RuntimeConfig {
            default_queue_capacity: CAPACITY,
            enable_telemetry: telemetry,
            ..RuntimeConfig::high_performance()
        })
        .build()?)
}

/// Options that put a one-block kernel onto the kernel core.
pub fn pinned<const N: usize>(config: &Config) -> LaunchOptions {
    LaunchOptions {
        message_size: Some(N),
        cores: vec![config.kernel_core],
        ..LaunchOptions::default()
    }
}

/// A ring of our own in plain heap memory.
pub struct HeapRing {
    parts: RingParts,
    layout: RingLayout,
    memory: Layout,
}

/// An empty ring for payloads of up to `payload` bytes.
pub fn ring(payload: usize) -> Result<HeapRing, Failure> {
    let layout = RingLayout::new(CAPACITY, payload, false)?;
    let memory = Layout::from_size_align(layout.slots_bytes() + CURSOR_BYTES, 4096)?;
    // SAFETY: the size is not zero.
    let slots = NonNull::new(unsafe { alloc_zeroed(memory) }).ok_or("out of memory")?;
    let parts = RingParts {
        slots,
        // SAFETY: the allocation has CURSOR_BYTES behind its slots.
        cursor: unsafe { slots.add(layout.slots_bytes()) }.cast(),
        write_combining: WriteCombining::No,
    };
    // SAFETY: both parts lie within the fresh allocation.
    unsafe { parts.initialise(layout, 0) };
    Ok(HeapRing {
        parts,
        layout,
        memory,
    })
}

impl HeapRing {
    /// Both ends. Called once for each ring here; the ring outlives them because it is declared first.
    pub fn ends(&self) -> (Producer, Consumer) {
        // SAFETY: the parts were initialised with this layout and start; see above for the rest.
        unsafe {
            (
                Producer::new(self.parts, self.layout, 0),
                Consumer::new(self.parts, self.layout, 0),
            )
        }
    }
}

impl Drop for HeapRing {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout.
        unsafe { dealloc(self.parts.slots.as_ptr(), self.memory) };
    }
}
