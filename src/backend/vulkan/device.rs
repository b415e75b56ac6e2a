//! Vulkan devices: opening, probing, memory, and where kernels go.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::clock::{self, ShaderClock};
use super::context::Context;
use super::lane::Lane;
use super::loader::Instance;
use super::memory::Buffer;
use super::physical::{self, Physical};
use super::probe;
use super::slice_kernel::SliceKernel;
use crate::backend::stall::StallLimits;
use crate::backend::{
    Account, Backend, BlockClock, Device, DeviceInfo, DeviceMemory, Dispatch, DispatchRequest,
    ExecutionMode, GridMemory, Handler, Placement, ResidentDispatch, VulkanConfig, VulkanMode,
};
use crate::error::Error;
use crate::logging;
use crate::thread::event_count::EventCount;
use crate::thread::{affinity, driver_thread};

/// How often a shader's clock is tried before its answer counts: on a busy machine an attempt may
/// come to nothing.
const CLOCK_PROBES: u32 = 3;

/// How memory for replies is called in a device's description.
const DEVICE_TO_HOST: &str = "device-to-host";

/// The Vulkan backend.
#[derive(Debug)]
pub(crate) struct VulkanBackend {
    config: VulkanConfig,
    reserved_cores: Vec<usize>,
    limits: StallLimits,
    devices: Vec<Physical>,
    /// After `devices`, whose handles are its own.
    instance: Arc<Instance>,
}

impl VulkanBackend {
    /// Opens the loader and lists the devices.
    pub(crate) fn load(
        config: &VulkanConfig,
        reserved_cores: &[usize],
        limits: StallLimits,
    ) -> Result<Self, Error> {
        // Drivers start threads, which inherit the cores of the thread that calls them.
        let cores = driver_cores(reserved_cores, true);
        let (config, reserved_cores) = (config.clone(), reserved_cores.to_vec());
        driver_thread::on_cores("rk-vulkan-open", cores, move || {
            let instance = Arc::new(Instance::load(&config)?);
            let devices = physical::enumerate(&instance, &config)?;
            Ok(Self {
                config,
                reserved_cores,
                limits,
                devices,
                instance,
            })
        })
    }
}

impl Backend for VulkanBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        self.devices
            .iter()
            .map(|device| device.info.clone())
            .collect()
    }

    fn open(&self, index: usize) -> Result<Arc<dyn Device>, Error> {
        Ok(Arc::new(self.open_device(index)?))
    }
}

impl VulkanBackend {
    /// Opens and probes a device.
    pub(super) fn open_device(&self, index: usize) -> Result<VulkanDevice, Error> {
        let physical = self.devices.get(index).ok_or(Error::DeviceNotFound {
            backend: crate::backend::BackendType::Vulkan.name(),
            index,
            available: self.devices.len(),
        })?;
        let cores = driver_cores(&self.reserved_cores, physical.software);
        let open = |config: &VulkanConfig| {
            let account = Arc::new(Account::new(physical.info.memory_limit));
            let cores = cores.clone();
            let (instance, physical) = (Arc::clone(&self.instance), physical.clone());
            let context = driver_thread::on_cores("rk-vulkan-open", cores.clone(), move || {
                Context::open(&instance, &physical, account)
            })?;
            // The caller's thread exchanges messages with the probe: the driver's cores are busy.
            VulkanDevice::open(context, config, cores, self.limits)
        };
        match open(&self.config) {
            Err(Error::DeviceLost { reason, .. }) if self.config.mode == VulkanMode::Auto => {
                // The probe lost it: opened anew, it still runs a dispatch for each batch.
                let mut device = open(&VulkanConfig {
                    mode: VulkanMode::Exchange,
                    ..self.config.clone()
                })?;
                if let Some(vulkan) = &mut device.info.vulkan {
                    vulkan.mode_reason = format!("the probe lost the device: {reason}");
                }
                Ok(device)
            }
            opened => opened,
        }
    }
}

/// The cores for a driver's threads and for those of this backend: all but the reserved ones. A software GPU's threads
/// spin, so that one core is left to the callers if none is reserved.
fn driver_cores(reserved: &[usize], software: bool) -> Vec<usize> {
    let mut cores = affinity::unreserved_cores(reserved);
    if reserved.is_empty() && software && cores.len() > 1 {
        cores.remove(0);
    }
    cores
}

/// An open device.
#[derive(Debug)]
pub(super) struct VulkanDevice {
    info: DeviceInfo,
    mode: ExecutionMode,
    /// One a queue, started when first needed.
    lanes: Mutex<Vec<Lane>>,
    cores: Vec<usize>,
    limits: StallLimits,
    /// What is known of the clock that shaders read, once a kernel is to be traced; or why it is of no use. One tries it at a time.
    clock: OnceLock<Result<Arc<ShaderClock>, String>>,
    clock_probe: Mutex<()>,
    context: Arc<Context>,
}

impl VulkanDevice {
    fn open(
        context: Arc<Context>,
        config: &VulkanConfig,
        cores: Vec<usize>,
        limits: StallLimits,
    ) -> Result<Self, Error> {
        let mut device = Self {
            info: context.physical.info.clone(),
            mode: ExecutionMode::Resident,
            lanes: Mutex::new(Vec::new()),
            cores,
            limits,
            clock: OnceLock::new(),
            clock_probe: Mutex::new(()),
            context,
        };
        let (mode, reason) = match config.mode {
            VulkanMode::Resident => (ExecutionMode::Resident, "forced".to_owned()),
            VulkanMode::Exchange => (ExecutionMode::Exchange, "forced".to_owned()),
            VulkanMode::Staged => (ExecutionMode::Staged, "forced".to_owned()),
            VulkanMode::Auto if !device.replies_are_cached()? => (
                ExecutionMode::Exchange,
                "the host's caches hold no memory of the device: it is not cached, and too slow to poll".to_owned(),
            ),
            VulkanMode::Auto => device.probe()?,
        };
        device.mode = mode;
        // Lanes of the probe belong to its mode.
        let lanes = std::mem::take(device.lanes.get_mut());
        drop(lanes);
        let placements = device.placements()?;
        logging::info!(
            "device '{}' is in {} mode: {reason}",
            device.info.name,
            mode.name()
        );
        if let Some(vulkan) = &mut device.info.vulkan {
            vulkan.mode = mode;
            vulkan.mode_reason = reason;
            vulkan.placements = placements;
        }
        Ok(device)
    }

    /// Whether the host can poll replies where the device writes them.
    fn replies_are_cached(&self) -> Result<bool, Error> {
        let placements = self.placements()?;
        Ok(placements
            .iter()
            .any(|placement| placement.purpose == DEVICE_TO_HOST && placement.host_cached))
    }

    fn probe(&self) -> Result<(ExecutionMode, String), Error> {
        Ok(match crate::backend::probe::run(self, &probe::echo())? {
            Ok(seen) => (ExecutionMode::Resident, seen),
            Err(reason) => (
                ExecutionMode::Exchange,
                format!("the probe failed: {reason}"),
            ),
        })
    }

    /// The clock that shaders read; why there is none that traces can be made with. Tried by a kernel of its own the first time.
    fn shader_clock(&self) -> Result<Arc<ShaderClock>, String> {
        let _one = self.clock_probe.lock();
        if let Some(known) = self.clock.get() {
            return known.clone();
        }
        let mut reason = String::new();
        for _ in 0..CLOCK_PROBES {
            match clock::probe(self, &self.context) {
                Ok(found) => return self.clock.get_or_init(|| found).clone(),
                Err(late) => reason = late,
            }
            logging::debug!("device '{}': its clock: {reason}", self.info.name);
        }
        // Tried again by the next one that asks.
        Err(reason)
    }

    /// Whether it is known that the clock shows its low word alone.
    fn has_short_clock(&self) -> bool {
        matches!(self.clock.get(), Some(Ok(clock)) if clock.is_short())
    }

    /// Where memory of each placement lies.
    fn placements(&self) -> Result<Vec<crate::backend::MemoryPlacement>, Error> {
        [
            (Placement::HostToDevice, "host-to-device"),
            (Placement::DeviceToHost, DEVICE_TO_HOST),
            (Placement::DeviceState, "state"),
        ]
        .into_iter()
        .map(|(placement, purpose)| {
            let location = match (self.mode, placement) {
                (ExecutionMode::Staged, _) => gpu_allocator::MemoryLocation::GpuOnly,
                _ => Buffer::location(placement),
            };
            Buffer::new(&self.context, purpose, 64, location)
                .map(|buffer| buffer.placement(purpose))
        })
        .collect()
    }

    fn buffer(
        &self,
        name: &str,
        bytes: usize,
        location: gpu_allocator::MemoryLocation,
    ) -> Result<Arc<dyn DeviceMemory>, Error> {
        Ok(Arc::new(Buffer::new(&self.context, name, bytes, location)?))
    }

    /// The lane with the fewest kernels; a new one while there are queues without.
    fn lane(&self) -> Result<Arc<super::lane::LaneHandle>, Error> {
        let mut lanes = self.lanes.lock();
        let least = lanes.iter().min_by_key(|lane| lane.handle.load());
        match least {
            Some(lane)
                if lane.handle.load() == 0
                    || lanes.len() >= self.context.physical.queues as usize =>
            {
                Ok(Arc::clone(&lane.handle))
            }
            _ => {
                let lane = Lane::start(
                    &self.context,
                    lanes.len() as u32,
                    self.mode,
                    self.cores.clone(),
                    self.limits,
                )?;
                let handle = Arc::clone(&lane.handle);
                lanes.push(lane);
                Ok(handle)
            }
        }
    }

    /// The memory that the shader sees in exchange mode, and the memory through which the host sees it.
    fn exchange_memory(
        &self,
        front: &GridMemory,
        blocks: u32,
    ) -> Result<(Arc<GridMemory>, Arc<GridMemory>), Error> {
        use gpu_allocator::MemoryLocation::{CpuToGpu, GpuOnly, GpuToCpu};
        let grid = |staged: bool| {
            GridMemory::new(self, blocks, front.layout, |bytes, placement| {
                match (placement, staged) {
                    (Placement::DeviceState, _) => self.buffer("state", bytes, GpuOnly),
                    (_, true) => self.buffer("device ring", bytes, GpuOnly),
                    (Placement::HostToDevice, false) => self.buffer("requests", bytes, CpuToGpu),
                    (Placement::DeviceToHost, false) => self.buffer("replies", bytes, GpuToCpu),
                }
            })
        };
        if self.mode == ExecutionMode::Staged {
            let host = GridMemory::new(
                self,
                blocks,
                crate::backend::BlockLayout {
                    state_bytes: 0,
                    ..front.layout
                },
                |bytes, placement| match placement {
                    Placement::HostToDevice => self.buffer("staged requests", bytes, CpuToGpu),
                    _ => self.buffer("staged replies", bytes, GpuToCpu),
                },
            )?;
            Ok((grid(true)?, host))
        } else {
            let grid = grid(false)?;
            Ok((Arc::clone(&grid), grid))
        }
    }
}

impl Device for VulkanDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn account(&self) -> &Arc<Account> {
        &self.context.account
    }

    fn check_lost(&self) -> Result<(), Error> {
        self.context.check_lost()
    }

    fn allocate(&self, bytes: usize, placement: Placement) -> Result<Arc<dyn DeviceMemory>, Error> {
        self.context.check_lost()?;
        match (self.mode, placement) {
            (ExecutionMode::Resident, _) => {
                let name = match placement {
                    Placement::HostToDevice => "requests",
                    Placement::DeviceToHost => "replies",
                    Placement::DeviceState => "state",
                };
                self.buffer(name, bytes, Buffer::location(placement))
            }
            // The state is taken with the rest of the shader's memory.
            (_, Placement::DeviceState) => Ok(self.host_pool().allocate(1)?),
            _ => Ok(self.host_pool().allocate(bytes)?),
        }
    }

    fn doorbell(&self) -> Option<Arc<EventCount>> {
        Some(Arc::clone(&self.context.doorbell))
    }

    fn takes_cores(&self) -> bool {
        // A software driver's thread, or the lane's own where no dispatch polls.
        self.context.physical.software || self.mode != ExecutionMode::Resident
    }

    fn clock(&self, handler: &Handler) -> Option<BlockClock> {
        let Handler::Shader(code) = handler else {
            return None;
        };
        let found = match code.traced_source() {
            None => Err("the kernel has no module that was built with -DRK_TRACES".to_owned()),
            Some(_) => self.shader_clock(),
        };
        match found {
            Ok(clock) => Some(BlockClock::Driver(clock)),
            Err(reason) => {
                logging::warning!(
                    "a kernel on device '{}' cannot be traced: {reason}",
                    self.info.name
                );
                None
            }
        }
    }

    fn wakes_callers(&self) -> bool {
        self.mode != ExecutionMode::Resident
    }

    fn shares_rings(&self) -> bool {
        // In staged mode nobody could tell what one kernel has written into the other's memory.
        self.mode != ExecutionMode::Staged
    }

    fn dispatch(&self, request: DispatchRequest) -> Result<Box<dyn Dispatch>, Error> {
        self.context.check_lost()?;
        let blocks = request.blocks.len() as u32;
        let Some(first) = request.blocks.first() else {
            return Err(Error::InvalidOption {
                option: "grid",
                reason: "it has no blocks".into(),
            });
        };
        let front = Arc::clone(&first.memory.grid);
        let start = first.memory.control().processed();
        let before = self.memory_in_use();
        let (device_grid, relay_grid) = if self.mode == ExecutionMode::Resident {
            (front, None)
        } else {
            let (device, host) = self.exchange_memory(&front, blocks)?;
            // Whatever else writes into the kernel's ring. Set once: the memory was made for this kernel.
            let _ = front.behind.set(Arc::clone(&device));
            (device, Some(host))
        };
        // Launches come one at a time; what kernels that end meanwhile give back is not counted.
        let memory_bytes = self.memory_in_use().saturating_sub(before);
        let relay_blocks = match relay_grid {
            None => Vec::new(),
            Some(grid) => grid
                .ends(self, blocks, start)?
                .into_iter()
                .map(|(_, _, ends)| ends.memory)
                .collect(),
        };
        let kernel = Arc::new(SliceKernel::new(
            &self.context,
            request,
            device_grid,
            relay_blocks,
            self.has_short_clock(),
        )?);
        let lane = self.lane()?;
        lane.admit(Arc::clone(&kernel));
        Ok(Box::new(ResidentDispatch::new(kernel, lane, memory_bytes)))
    }
}
