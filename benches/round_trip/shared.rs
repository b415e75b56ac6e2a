//! What round trips and streams have in common: sizes, runtimes, and a bare ring.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::time::Duration;

use ringkernel::ring::{CURSOR_BYTES, Consumer, Producer, RingLayout, RingParts, WriteCombining};
use ringkernel::{BackendType, LaunchOptions, RingKernelRuntime, RuntimeConfig, VulkanMode};

use crate::{Config, Failure};

/// Slots of every queue.
pub const CAPACITY: usize = 4096;

/// Longer than any scheduler keeps a thread away; a message that takes longer is a failure.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// What runs a kernel that is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Cpu,
    Vulkan(VulkanMode),
    Cuda,
    Metal,
}

impl Target {
    /// What the command line asks for.
    pub fn of(config: &Config) -> Self {
        match config.backend {
            BackendType::Vulkan => Self::Vulkan(config.mode),
            BackendType::Cuda => Self::Cuda,
            BackendType::Metal => Self::Metal,
            _ => Self::Cpu,
        }
    }

    pub fn backend(self) -> BackendType {
        match self {
            Self::Cpu => BackendType::Cpu,
            Self::Vulkan(_) => BackendType::Vulkan,
            Self::Cuda => BackendType::Cuda,
            Self::Metal => BackendType::Metal,
        }
    }
}

/// A runtime of the high-performance preset: kernels and callers spin, kernels do not time their handlers unless asked. A
/// driver's threads stay off the caller's core.
pub fn runtime(
    config: &Config,
    target: Target,
    telemetry: bool,
) -> Result<RingKernelRuntime, Failure> {
    let mut builder = RingKernelRuntime::builder().backend(target.backend());
    let mut settings = RuntimeConfig {
        default_queue_capacity: CAPACITY,
        enable_telemetry: telemetry,
        reserved_cores: vec![config.caller_core],
        ..RuntimeConfig::high_performance()
    };
    // As many kernels as any path has, and one more.
    settings.cuda.max_kernels = 128;
    if let Target::Vulkan(mode) = target {
        settings.vulkan.mode = mode;
    }
    if target != Target::Cpu {
        let variable = std::env::var_os("RINGKERNEL_VULKAN_DEVICE").is_some();
        builder = match &config.device {
            Some(device) => match device.parse() {
                Ok(index) => builder.device(index),
                Err(_) => builder.device_name(device),
            },
            None if variable && matches!(target, Target::Vulkan(_)) => builder,
            None => builder.device(0),
        };
    }
    Ok(builder.config(settings).build()?)
}

/// Options for a kernel of one block; on the CPU it runs on the kernel core.
pub fn pinned<const N: usize>(config: &Config, target: Target) -> LaunchOptions {
    LaunchOptions {
        message_size: Some(N),
        cores: match target {
            Target::Cpu => vec![config.kernel_core],
            Target::Vulkan(_) | Target::Cuda | Target::Metal => Vec::new(),
        },
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
        cursor_write_combining: WriteCombining::No,
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
