//! What a user may decide about a backend.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::error::Error;

/// How the Vulkan backend works; a part of [`RuntimeConfig`](crate::RuntimeConfig).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VulkanConfig {
    /// How messages reach kernels. Default: as the probe of the device says.
    pub mode: VulkanMode,
    /// Turns `VK_LAYER_KHRONOS_validation` on, with synchronisation validation; what it says is logged under the target
    /// `ringkernel::vulkan::validation`. For debugging: calls of the driver become many times slower. Without the
    /// layer, building the runtime fails.
    pub validation: bool,
    /// The Vulkan loader to use; `None` looks for the system's.
    pub loader: Option<PathBuf>,
    /// Bytes that kernels may take on each device; `None` means the size of its memory heaps.
    pub memory_limit: Option<u64>,
}

/// How the CUDA backend works; a part of [`RuntimeConfig`](crate::RuntimeConfig).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaConfig {
    /// Memory for rings that each device takes when it is opened, pinned in the host or its own (`ring_memory`): once a kernel runs, no more can be taken (CUDA
    /// would wait for the kernel). While none runs it grows by as much. Default 32 MiB, 1 KiB to 1 TiB.
    pub host_arena_bytes: u64,
    /// The same of the device's own memory, for state. Default 16 MiB, 1 KiB to 1 TiB.
    pub device_arena_bytes: u64,
    /// Most kernels that run on a device at once; each has a stream, made when the device is opened. Default 64, 1 to 128: no device
    /// holds more grids (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
    pub max_kernels: usize,
    /// Pause of a kernel between two empty polls (`nanosleep`), which leaves the bus and its multiprocessor to others and adds up to
    /// that much latency. Default 100 ns; at most 1 ms. Kernels that park pause for 10 us at least.
    pub poll_nap: Duration,
    /// Where request rings lie.
    pub ring_memory: CudaRingMemory,
    /// Bytes that kernels may take on each device; `None` means the size of its memory.
    pub memory_limit: Option<u64>,
}

/// Where the request rings of CUDA kernels lie: what the host writes and the device polls. Replies always lie in host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CudaRingMemory {
    /// `Device` where that works and is faster: both are tried when the device is opened, which takes longer by as much, and by opening
    /// its Vulkan device. Rings that do not fit there lie in host memory.
    #[default]
    Auto,
    /// Pinned host memory, which the device reads over the bus at each poll.
    Host,
    /// The device's own memory, which the host writes over the bus (through its BAR), so that the device polls what is near. It is
    /// taken from Vulkan, which maps and exports it, and imported by CUDA; opening a device fails where that does not work.
    Device,
}

impl CudaRingMemory {
    /// The name as command lines and errors write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Host => "host",
            Self::Device => "device",
        }
    }
}

impl Default for CudaConfig {
    fn default() -> Self {
        Self {
            host_arena_bytes: 32 << 20,
            device_arena_bytes: 16 << 20,
            max_kernels: 64,
            poll_nap: Duration::from_nanos(100),
            ring_memory: CudaRingMemory::Auto,
            memory_limit: None,
        }
    }
}

impl CudaConfig {
    /// Fails on the first value that is out of its range.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let invalid = |option, reason| Err(Error::InvalidOption { option, reason });
        for (option, bytes) in [
            ("cuda.host_arena_bytes", self.host_arena_bytes),
            ("cuda.device_arena_bytes", self.device_arena_bytes),
        ] {
            if !(1 << 10..=1 << 40).contains(&bytes) {
                return invalid(option, format!("{bytes} is not within 2^10 to 2^40"));
            }
        }
        if !(1..=128).contains(&self.max_kernels) {
            let reason = format!("{} is not within 1 to 128", self.max_kernels);
            return invalid("cuda.max_kernels", reason);
        }
        if self.poll_nap > Duration::from_millis(1) {
            let reason = format!("{:?} exceeds 1 ms", self.poll_nap);
            return invalid("cuda.poll_nap", reason);
        }
        Ok(())
    }
}

/// How the Metal backend works; a part of [`RuntimeConfig`](crate::RuntimeConfig).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetalConfig {
    /// How messages reach kernels. Default: as the probe of the device says.
    pub mode: MetalMode,
    /// Bytes that kernels may take on each device; `None` means what the system recommends (`recommendedMaxWorkingSetSize`).
    pub memory_limit: Option<u64>,
}

/// How messages reach kernels on a Metal device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MetalMode {
    /// `Resident` if the compiler has memory that is coherent with the host, and the probe succeeds; else `Exchange`.
    #[default]
    Auto,
    /// A running slice polls its rings. Metal does not promise that it sees what the host writes meanwhile, or in order, and systems
    /// before macOS 15 have no memory that is coherent with the host: for those who have tried it on theirs. No probe is made.
    Resident,
    /// A slice for each batch of messages: what was written before it was committed it sees for certain.
    Exchange,
}

/// How messages reach kernels on a Vulkan device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VulkanMode {
    /// `Resident` if the probe succeeds, else `Exchange`.
    #[default]
    Auto,
    /// A running dispatch polls rings in mapped memory. The Vulkan specification does not promise that this works; no
    /// probe is made.
    Resident,
    /// A dispatch for each batch of messages, whose memory the host touches only between dispatches. What the Vulkan
    /// specification promises; tens of microseconds a batch.
    Exchange,
    /// As `Exchange`, with rings in device memory that need not be mappable, and transfers around each dispatch.
    Staged,
}

impl VulkanMode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Resident, Self::Exchange, Self::Staged];

    /// The name as command lines and errors write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Resident => "resident",
            Self::Exchange => "exchange",
            Self::Staged => "staged",
        }
    }
}

impl FromStr for VulkanMode {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| Error::InvalidOption {
                option: "mode",
                reason: format!(
                    "'{name}' is none of: {}",
                    Self::ALL.map(Self::name).join(", ")
                ),
            })
    }
}
