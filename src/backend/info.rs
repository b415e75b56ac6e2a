//! What is known of a device.

use super::{BackendType, CudaRingMemory};

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The backend it belongs to.
    pub backend: BackendType,
    /// Its index within the backend.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// What kind of device it is.
    pub kind: DeviceKind,
    /// Bytes that kernels may take on it, all together.
    pub memory_limit: u64,
    /// Cores that its kernels are put on when a launch names none; empty for a device that is not this CPU.
    pub cores: Vec<usize>,
    /// More, if it is a Vulkan device.
    pub vulkan: Option<VulkanDeviceInfo>,
    /// More, if it is a CUDA device.
    pub cuda: Option<CudaDeviceInfo>,
    /// More, if it is a Metal device.
    pub metal: Option<MetalDeviceInfo>,
}

/// Kinds of device, in the order of an automatic choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// A GPU with memory of its own.
    DiscreteGpu,
    /// A GPU that shares the host's memory.
    IntegratedGpu,
    /// A GPU that a hypervisor passes on.
    VirtualGpu,
    /// This machine's CPU.
    Cpu,
    /// A GPU driver that runs on the CPU.
    SoftwareGpu,
    /// A device that says nothing of itself.
    Other,
}

impl DeviceKind {
    /// Whether it is a GPU that takes no core of this machine.
    pub(crate) const fn is_hardware(self) -> bool {
        matches!(
            self,
            Self::DiscreteGpu | Self::IntegratedGpu | Self::VirtualGpu
        )
    }
}

/// How messages reach a kernel on a Vulkan or Metal device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExecutionMode {
    /// Not opened yet, so not probed.
    Unknown,
    /// A running dispatch polls rings in memory that the host writes: no submission per message.
    Resident,
    /// A dispatch for each batch of messages, whose rings the host only touches between dispatches.
    Exchange,
    /// As `Exchange`, with rings in device memory and transfer commands around each dispatch.
    Staged,
}

impl ExecutionMode {
    /// The mode's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Resident => "resident",
            Self::Exchange => "exchange",
            Self::Staged => "staged",
        }
    }
}

/// What a Vulkan device says of itself, and what was found out about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VulkanDeviceInfo {
    /// Name and version of the driver.
    pub driver: String,
    /// Vulkan version, as major, minor, patch.
    pub api_version: (u32, u32, u32),
    /// `domain:bus:device.function`, if the driver tells.
    pub pci_address: Option<String>,
    /// The host's NUMA node that it is attached to, if the system tells.
    pub numa_node: Option<u32>,
    /// Its memory heaps.
    pub heaps: Vec<MemoryHeap>,
    /// Its queue families.
    pub queue_families: Vec<QueueFamily>,
    /// Most invocations of a workgroup, in its first dimension.
    pub max_block_threads: u32,
    /// Most workgroups of a dispatch, in its first dimension.
    pub max_blocks: u32,
    /// Largest buffer that a shader can see, in bytes: of one placement, for all blocks of a kernel.
    pub max_buffer_bytes: u64,
    /// How messages reach its kernels.
    pub mode: ExecutionMode,
    /// Why in that mode: what the probe saw, or who forced it.
    pub mode_reason: String,
    /// Where each kind of kernel memory lies, once the device is open.
    pub placements: Vec<MemoryPlacement>,
}

/// What a CUDA device says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDeviceInfo {
    /// CUDA version of the driver, as major, minor.
    pub driver_version: (u32, u32),
    /// Compute capability, as major, minor.
    pub compute_capability: (u32, u32),
    /// Its memory.
    pub memory_bytes: u64,
    /// Its multiprocessors.
    pub multiprocessors: u32,
    /// Most threads of a block.
    pub max_block_threads: u32,
    /// `domain:bus:device.function`, if the driver tells.
    pub pci_address: Option<String>,
    /// The host's NUMA node that it is attached to, if the system tells.
    pub numa_node: Option<u32>,
    /// Indices of the devices whose memory it reaches by NVLink.
    pub nvlink_peers: Vec<usize>,
    /// Whether the driver ends kernels that run for long: kernels are launched in slices then.
    pub watchdog: bool,
    /// Where request rings lie: `Host` or `Device`, once the device is open.
    pub ring_memory: CudaRingMemory,
    /// Why there: what was measured, or who decided it.
    pub ring_memory_reason: String,
}

/// What a Metal device says of itself, and what was found out about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetalDeviceInfo {
    /// The system's number for it.
    pub registry_id: u64,
    /// Whether it shares the host's memory.
    pub unified_memory: bool,
    /// Whether it may be unplugged.
    pub removable: bool,
    /// Most threads of a block, in its first dimension; a kernel may allow fewer.
    pub max_block_threads: u32,
    /// Largest buffer, in bytes: of one placement, for all blocks of a kernel.
    pub max_buffer_bytes: u64,
    /// How messages reach its kernels: `Resident` or `Exchange`.
    pub mode: ExecutionMode,
    /// Why in that mode: what the probe saw, or who forced it.
    pub mode_reason: String,
}

/// The NUMA node of a PCI device; `None` where the system does not tell, or has only one.
#[cfg(any(feature = "vulkan", feature = "cuda"))]
pub(crate) fn numa_node(address: &str) -> Option<u32> {
    crate::system::number(&format!("/sys/bus/pci/devices/{address}/numa_node"))
}

/// A heap of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryHeap {
    /// Its size in bytes.
    pub bytes: u64,
    /// Whether it is the device's own.
    pub device_local: bool,
    /// Whether the host can map memory of it.
    pub host_visible: bool,
}

/// A family of queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueFamily {
    /// Number of queues.
    pub queues: u32,
    /// Whether they run compute work.
    pub compute: bool,
    /// Whether they run graphics work.
    pub graphics: bool,
}

/// Where a kind of kernel memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlacement {
    /// `host-to-device`, `device-to-host` or `state`.
    pub purpose: &'static str,
    /// Whether it is the device's own memory.
    pub device_local: bool,
    /// Whether the host can map it.
    pub host_visible: bool,
    /// Whether the host's caches hold it; memory without is write-combined.
    pub host_cached: bool,
}
