//! Floor 6: what runs kernels.
//!
//! A backend supplies devices; a device supplies memory in three placements and *dispatches*: code that stays resident,
//! polls its request rings, writes its reply rings, and obeys its control blocks until it is told to end. The protocol
//! in that memory is the same for all of them, so that the runtime above talks to the rings and asks the backend only
//! to start a dispatch, to keep it alive, to stop it, and how it ended.
//!
//! Errors that a caller cannot foresee are `OutOfMemory` and `DeviceLost`; everything else is checked before it comes
//! here.

mod block;
mod booked;
#[cfg(any(feature = "cuda", feature = "metal"))]
pub(crate) mod cpp;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod host_consumer;
mod host_memory;
pub(crate) mod info;
#[cfg(all(test, feature = "vulkan"))]
mod layouts;
mod leftovers;
#[cfg(feature = "metal")]
pub(crate) mod metal;
mod options;
#[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
mod probe;
#[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
mod resident;
#[cfg(any(feature = "vulkan", feature = "metal"))]
mod slices;
#[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
pub(crate) mod stall;
#[cfg(feature = "vulkan")]
pub(crate) mod vulkan;

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use block::{
    BlockLayout, BlockMemory, DeviceEnds, GridMemory, HostProducer, host_ring, host_ring_bytes,
};
pub(crate) use booked::Booked;
pub(crate) use host_consumer::HostConsumer;
pub(crate) use host_memory::{Account, HostPool};
pub use info::{
    CudaDeviceInfo, DeviceInfo, DeviceKind, ExecutionMode, MemoryHeap, MemoryPlacement,
    MetalDeviceInfo, QueueFamily, VulkanDeviceInfo,
};

pub(crate) use leftovers::Leftovers;
pub use options::{CudaConfig, CudaRingMemory, MetalConfig, MetalMode, VulkanConfig, VulkanMode};
#[cfg(any(feature = "vulkan", feature = "cuda"))]
pub(crate) use resident::Next;
#[cfg(feature = "vulkan")]
pub(crate) use resident::corrupt_device;
#[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
pub(crate) use resident::{Keeper, Resident, ResidentDispatch};

use crate::error::Error;
use crate::kernel::{
    CpuHandler, CudaCode, Dim3, MetalCode, ShaderCode, TypeTable, signals::KernelSignals,
};
use crate::ring::WriteCombining;
use crate::thread::event_count::EventCount;
use crate::thread::{KernelWait, PlacedThread, SpinPermit};
use crate::time::Deadline;

/// A way to run kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackendType {
    /// Pinned threads of this process.
    Cpu,
    /// Compute dispatches that are kept alive by slices.
    Vulkan,
    /// Persistent launches.
    Cuda,
    /// Compute dispatches that are kept alive by slices, on macOS.
    Metal,
}

impl BackendType {
    /// Every backend that this build knows.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Vulkan, Self::Cuda, Self::Metal];

    /// The name as command lines and errors write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Vulkan => "vulkan",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        }
    }
}

impl fmt::Display for BackendType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BackendType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|backend| backend.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| Error::InvalidOption {
                option: "backend",
                reason: format!(
                    "'{name}' is none of: {}",
                    Self::ALL.map(Self::name).join(", ")
                ),
            })
    }
}

/// Where a piece of memory has to be good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Placement {
    /// The host writes, the device reads; in request slots, kernels of the same device write too.
    HostToDevice,
    /// The device writes, the host reads; cached on the host.
    DeviceToHost,
    /// The device's own.
    DeviceState,
}

/// A piece of device memory; given back when dropped.
pub(crate) trait DeviceMemory: Send + Sync + fmt::Debug {
    /// Where this process sees it: zeroed, at least 64-byte aligned, valid as long as the value lives. Memory of
    /// placement `DeviceState` it may not see.
    fn host_ptr(&self) -> Option<NonNull<u8>>;

    /// For the device that made it.
    fn as_any(&self) -> &dyn Any;

    /// How the host's stores to it are ordered.
    fn write_combining(&self) -> WriteCombining;

    /// Whether something else than threads of this process may write to it at any time.
    fn is_shared(&self) -> bool {
        true
    }
}

/// A backend in use: its devices, open or not.
pub(crate) trait Backend: Send + Sync + fmt::Debug {
    /// Describes all devices.
    fn devices(&self) -> Vec<DeviceInfo>;

    /// Opens one of them, by index in that list.
    fn open(&self, index: usize) -> Result<Arc<dyn Device>, Error>;
}

/// An open device.
pub(crate) trait Device: Send + Sync + fmt::Debug {
    fn info(&self) -> &DeviceInfo;

    /// What is booked on it.
    fn account(&self) -> &Arc<Account>;

    /// Fails once the device is lost.
    fn check_lost(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Bytes taken by all live memory.
    fn memory_in_use(&self) -> u64 {
        self.account().used()
    }

    /// Memory of this process alone, booked on the device.
    fn host_pool(&self) -> HostPool {
        HostPool::new(self.info().name.clone(), Arc::clone(self.account()))
    }

    /// What wakes the threads behind its blocks, if one event serves all of them.
    fn doorbell(&self) -> Option<Arc<EventCount>> {
        None
    }

    /// Whether a kernel that spins takes a core of this machine.
    fn takes_cores(&self) -> bool {
        true
    }

    /// Whether somebody must be told of a request that is written while nobody polls.
    fn needs_bell(&self) -> bool {
        true
    }

    /// Whether callers that sleep are woken when a reply is written; they look for themselves otherwise.
    fn wakes_callers(&self) -> bool {
        true
    }

    /// Whether a block can write its replies into the request ring of another of its blocks.
    fn shares_rings(&self) -> bool {
        false
    }

    /// What this kernel's blocks would read the time from; nothing if it cannot be traced.
    fn clock(&self, _handler: &Handler) -> Option<BlockClock> {
        None
    }

    /// Zeroed memory of at least `bytes`. Never blocks on a running kernel.
    fn allocate(&self, bytes: usize, placement: Placement) -> Result<Arc<dyn DeviceMemory>, Error>;

    /// Makes a kernel's code ready, where that cannot be done beside running kernels.
    fn prepare(&self, _kernel: &str, _handler: &Handler) -> Result<(), Error> {
        Ok(())
    }

    /// Starts a dispatch: its blocks are resident, and idle until their control blocks say otherwise.
    fn dispatch(&self, request: DispatchRequest) -> Result<Box<dyn Dispatch>, Error>;
}

/// What the blocks of a kernel read the time from.
#[derive(Clone, Debug)]
pub(crate) enum BlockClock {
    /// The host's clock.
    Host,
    /// A clock of the device, one for all of its blocks, which they tell when they are asked.
    Device,
    /// The same, told by the driver.
    Driver(Arc<dyn DriverClock>),
}

/// A device's clock as its driver tells it, which is known to be the one that its kernels read.
pub(crate) trait DriverClock: Send + Sync + fmt::Debug {
    /// What it shows now, if the driver says so. Neither waits for kernels nor disturbs them.
    fn ticks(&self) -> Option<u64>;

    /// In what steps kernels see it go on.
    fn step(&self) -> u64;
}

/// Code that is resident on a device.
pub(crate) trait Dispatch: Send + fmt::Debug {
    /// Bytes of memory that it took beside that of its blocks.
    fn memory_bytes(&self) -> u64 {
        0
    }

    /// Tells it that a control block has a new command.
    fn command(&mut self) {}

    /// Does what the device needs to go on (a new slice, say), and tells whether the dispatch still runs.
    fn keep_alive(&mut self) -> DispatchStatus;

    /// Asks it to end, and returns at once.
    fn request_stop(&mut self);

    /// Waits for its end, but not beyond the deadline: `Running` then.
    fn join(&mut self, deadline: Deadline) -> DispatchStatus;

    /// Threads that are still there after [`join`](Self::join), and where each of them is.
    fn left_behind(&self) -> Vec<String> {
        Vec::new()
    }

    /// Requests of a block from a position on, in order. Only after the dispatch ended, or was
    /// given up as stuck, and once a block.
    fn leftovers(&self, block: u32, position: u32) -> Option<Leftovers>;
}

/// How a dispatch is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DispatchStatus {
    Running,
    /// It ended as asked, or has reported its failure itself.
    Ended,
}

/// Everything that a dispatch needs.
#[derive(Debug)]
pub(crate) struct DispatchRequest {
    pub(crate) handler: Handler,
    pub(crate) signals: Arc<KernelSignals>,
    pub(crate) types: Arc<TypeTable>,
    pub(crate) grid: Dim3,
    pub(crate) block_size: Dim3,
    /// One a block, with the ends of its rings that belong to the device.
    pub(crate) blocks: Vec<DeviceEnds>,
    pub(crate) wait: KernelWait,
    /// The core of each block, or none for blocks that only have to stay off the spinners' cores.
    pub(crate) cores: Vec<usize>,
    /// Whether a user named these cores: then the blocks run there or not at all.
    pub(crate) cores_are_named: bool,
    /// Cores for blocks without a core of their own, or that leave it while they park.
    pub(crate) shared_cores: Vec<usize>,
    /// Where the blocks' threads say that they run, of a device that has a thread for each.
    pub(crate) places: Arc<[PlacedThread]>,
    /// One a block that spins by [`KernelWait::Auto`].
    pub(crate) permits: Vec<SpinPermit>,
    pub(crate) telemetry: bool,
    /// One message in so many is traced; 0 if none is.
    pub(crate) trace_every: u32,
    /// How often a sleeping block shows a sign of life.
    pub(crate) heartbeat_interval: Duration,
}

/// A kernel's code for the backend at hand.
#[derive(Clone)]
pub(crate) enum Handler {
    Cpu(Arc<dyn CpuHandler>),
    Shader(Arc<ShaderCode>),
    Cuda(Arc<CudaCode>),
    Metal(Arc<MetalCode>),
}

impl Handler {
    /// Replies that one run may write; 1 where nobody says.
    pub(crate) fn replies(&self) -> u32 {
        match self {
            Self::Cpu(_) => 1,
            Self::Shader(code) => code.replies,
            Self::Cuda(code) => code.replies,
            Self::Metal(code) => code.replies,
        }
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(_) => f.write_str("Cpu"),
            Self::Shader(code) => code.fmt(f),
            Self::Cuda(code) => code.fmt(f),
            Self::Metal(code) => code.fmt(f),
        }
    }
}
