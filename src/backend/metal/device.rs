//! Metal devices: opening, memory, libraries, and launches.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;

use super::api::{Description, Gpu, Pipeline, Shared};
use super::bridge::{Bridge, Health};
use super::slice_kernel::SliceKernel;
use crate::backend::cpp::{self, LaunchWords};
use crate::backend::stall::StallLimits;
use crate::backend::{
    Account, Backend, BackendType, Device, DeviceInfo, DeviceKind, DeviceMemory, Dispatch,
    DispatchRequest, ExecutionMode, Handler, MetalConfig, MetalDeviceInfo, MetalMode, Placement,
    ResidentDispatch, probe,
};
use crate::error::Error;
use crate::kernel::MetalCode;
use crate::logging;
use crate::ring::WriteCombining;
use crate::thread::event_count::EventCount;
use crate::thread::{affinity, driver_thread};

/// Metal's own part of the prelude.
const PRELUDE: &str = include_str!("../../../kernels/ringkernel.metal");

/// The kernel of the probe.
const ECHO: &str = include_str!("../../../kernels/echo.rk");

/// Where it includes the common part: the runtime compiler has no include path.
const INCLUDE: &str = "#include \"ringkernel.h\"\n";

/// The Metal backend.
#[derive(Debug)]
pub(crate) struct MetalBackend {
    config: MetalConfig,
    cores: Vec<usize>,
    limits: StallLimits,
    devices: Vec<(Arc<dyn Gpu>, Description, DeviceInfo)>,
}

impl MetalBackend {
    /// Lists the system's devices.
    pub(crate) fn load(
        config: &MetalConfig,
        reserved_cores: &[usize],
        limits: StallLimits,
    ) -> Result<Self, Error> {
        let devices = super::gpus()?
            .into_iter()
            .enumerate()
            .map(|(index, gpu)| {
                let described = gpu.describe();
                let info = describe(index, &described, config);
                (gpu, described, info)
            })
            .collect();
        Ok(Self {
            config: config.clone(),
            cores: affinity::unreserved_cores(reserved_cores),
            limits,
            devices,
        })
    }
}

fn describe(index: usize, described: &Description, config: &MetalConfig) -> DeviceInfo {
    DeviceInfo {
        backend: BackendType::Metal,
        index,
        name: described.name.clone(),
        kind: if described.unified_memory {
            DeviceKind::IntegratedGpu
        } else {
            DeviceKind::DiscreteGpu
        },
        memory_limit: config.memory_limit.unwrap_or(described.working_set_bytes),
        cores: Vec::new(),
        vulkan: None,
        cuda: None,
        metal: Some(MetalDeviceInfo {
            registry_id: described.registry_id,
            unified_memory: described.unified_memory,
            removable: described.removable,
            max_block_threads: described.max_threads,
            max_buffer_bytes: described.max_buffer_bytes,
            mode: ExecutionMode::Unknown,
            mode_reason: "not opened yet".into(),
        }),
    }
}

impl Backend for MetalBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        self.devices
            .iter()
            .map(|(_, _, info)| info.clone())
            .collect()
    }

    fn open(&self, index: usize) -> Result<Arc<dyn Device>, Error> {
        let (gpu, described, info) = self.devices.get(index).ok_or(Error::DeviceNotFound {
            backend: BackendType::Metal.name(),
            index,
            available: self.devices.len(),
        })?;
        let account = Arc::new(Account::new(info.memory_limit));
        let (gpu, described, info) = (Arc::clone(gpu), described.clone(), info.clone());
        let (config, cores, limits) = (self.config.clone(), self.cores.clone(), self.limits);
        let open = {
            let gpu = Arc::clone(&gpu);
            move |mode, coherent| {
                let health = Health::new(&info);
                let bridge = Bridge::start(&info, mode, &health, cores.clone(), limits)?;
                Ok::<_, Error>(MetalDevice {
                    info: info.clone(),
                    mode,
                    described: described.clone(),
                    bridge,
                    health,
                    coherent,
                    libraries: Mutex::new(HashMap::new()),
                    account: Arc::clone(&account),
                    gpu: Arc::clone(&gpu),
                })
            }
        };
        // Drivers start threads, which inherit the cores of the thread that calls them.
        let (mut device, reason) =
            driver_thread::on_cores("rk-metal-open", self.cores.clone(), move || {
                // What the compiler has against code that is coherent with the host, if anything.
                let incoherent = gpu.pipeline(&library_source(ECHO, true)).err();
                let coherent = incoherent.is_none();
                let (mode, reason) = match (config.mode, &incoherent) {
                    (MetalMode::Resident, _) => (ExecutionMode::Resident, "forced".to_owned()),
                    (MetalMode::Exchange, _) => (ExecutionMode::Exchange, "forced".to_owned()),
                    (MetalMode::Auto, Some(log)) => (
                        ExecutionMode::Exchange,
                        format!(
                            "this system's Metal has no memory that is coherent with the host: {}",
                            log.trim()
                        ),
                    ),
                    (MetalMode::Auto, None) => {
                        let device = open(ExecutionMode::Resident, coherent)?;
                        match device.probe() {
                            Ok(Ok(seen)) => return Ok((device, seen)),
                            Ok(Err(failed)) => (
                                ExecutionMode::Exchange,
                                format!("the probe failed: {failed}"),
                            ),
                            // A slice that polls was ended by the system; those of exchange mode do
                            // not.
                            Err(lost @ Error::DeviceLost { .. }) => {
                                (ExecutionMode::Exchange, format!("the probe failed: {lost}"))
                            }
                            Err(error) => return Err(error),
                        }
                    }
                };
                Ok::<_, Error>((open(mode, coherent)?, reason))
            })?;
        logging::info!(
            "device '{}' is in {} mode: {reason}",
            device.info.name,
            device.mode.name()
        );
        if let Some(metal) = &mut device.info.metal {
            metal.mode = device.mode;
            metal.mode_reason = reason;
        }
        Ok(Arc::new(device))
    }
}

/// An open device.
#[derive(Debug)]
struct MetalDevice {
    info: DeviceInfo,
    mode: ExecutionMode,
    described: Description,
    bridge: Bridge,
    health: Arc<Health>,
    /// Whether kernels are compiled to be coherent with the host.
    coherent: bool,
    libraries: Mutex<HashMap<Cow<'static, str>, Arc<dyn Pipeline>>>,
    account: Arc<Account>,
    gpu: Arc<dyn Gpu>,
}

impl MetalDevice {
    /// Tries whether messages reach a running slice, and come back: what is seen, or why not.
    fn probe(&self) -> Result<Result<String, String>, Error> {
        let echo = Handler::Metal(Arc::new(MetalCode::source(ECHO)));
        probe::run(self, &echo)
    }

    /// The pipeline of a handler, compiled once.
    fn pipeline(&self, kernel: &str, code: &MetalCode) -> Result<Arc<dyn Pipeline>, Error> {
        let mut libraries = self.libraries.lock();
        if let Some(pipeline) = libraries.get(&code.handler) {
            return Ok(Arc::clone(pipeline));
        }
        let compiled = self
            .gpu
            .pipeline(&library_source(&code.handler, self.coherent));
        let pipeline: Arc<dyn Pipeline> = compiled
            .map_err(|log| Error::Compile {
                kernel: kernel.to_owned(),
                log: log.trim().to_owned(),
            })?
            .into();
        libraries.insert(code.handler.clone(), Arc::clone(&pipeline));
        Ok(pipeline)
    }
}

/// The whole source of a kernel. Lines are counted anew where the handler begins.
pub(super) fn library_source(handler: &str, coherent: bool) -> String {
    let scope = match coherent {
        true => "#define RK_SYSTEM_SCOPE\n",
        false => "",
    };
    let prelude = PRELUDE.replace(INCLUDE, cpp::PRELUDE);
    format!("{scope}{prelude}\n#line 1 \"handler\"\n{handler}\n")
}

impl Device for MetalDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn account(&self) -> &Arc<Account> {
        &self.account
    }

    fn check_lost(&self) -> Result<(), Error> {
        self.health.check()
    }

    fn doorbell(&self) -> Option<Arc<EventCount>> {
        Some(Arc::clone(&self.bridge.handle.work))
    }

    fn takes_cores(&self) -> bool {
        // The bridge's own, where no running slice polls.
        self.mode != ExecutionMode::Resident
    }

    fn wakes_callers(&self) -> bool {
        false
    }

    fn allocate(
        &self,
        bytes: usize,
        _placement: Placement,
    ) -> Result<Arc<dyn DeviceMemory>, Error> {
        self.check_lost()?;
        let asked = bytes as u64;
        let out_of_memory = || Error::OutOfMemory {
            device: self.info.name.clone(),
            asked,
            available: self.account.available(),
        };
        if asked > self.described.max_buffer_bytes || !self.account.take(asked) {
            return Err(out_of_memory());
        }
        let Some(shared) = self.gpu.buffer(bytes) else {
            self.account.give_back(asked);
            return Err(out_of_memory());
        };
        // SAFETY: the buffer has these bytes, and nobody else knows of it yet.
        unsafe { shared.start().write_bytes(0, bytes) };
        Ok(Arc::new(Buffer {
            shared,
            bytes: asked,
            account: Arc::clone(&self.account),
        }))
    }

    fn dispatch(&self, request: DispatchRequest) -> Result<Box<dyn Dispatch>, Error> {
        self.check_lost()?;
        let name = request.signals.name.clone();
        let code: Arc<MetalCode> = match &request.handler {
            Handler::Metal(code) => Arc::clone(code),
            _ => {
                return Err(Error::NoHandler {
                    kernel: name,
                    backend: self.info.backend.name(),
                });
            }
        };
        let grid = cpp::grid(&request)?;
        cpp::check_replies(&name, code.replies, grid.layout.ring)?;
        let pipeline = self.pipeline(&name, &code)?;
        let threads = cpp::whole_groups(
            &request,
            pipeline.simd_width(),
            pipeline.max_threads().min(self.described.max_threads),
            &self.info.name,
        )?;
        let mut words = LaunchWords::new(
            &request,
            grid.layout,
            code.replies,
            cpp::message_cost(code.loop_iterations, grid.layout.ring, threads),
            false,
            0,
        );
        // Memory is zeroed when it is taken; slices find what the one before left.
        words.fresh = 0;
        let queue = self
            .gpu
            .queue(&format!("rk-{name}"))
            .ok_or_else(|| Error::DriverFailed {
                device: self.info.name.clone(),
                reason: "there is no further command queue".into(),
            })?;
        let kernel = SliceKernel::new(request, pipeline, queue, words, threads, grid);
        let (kernel, bridge) = (Arc::new(kernel), Arc::clone(&self.bridge.handle));
        bridge.admit(Arc::clone(&kernel));
        Ok(Box::new(ResidentDispatch::new(kernel, bridge, 0)))
    }
}

/// Memory that host and device see.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) shared: Box<dyn Shared>,
    bytes: u64,
    account: Arc<Account>,
}

impl DeviceMemory for Buffer {
    fn host_ptr(&self) -> Option<NonNull<u8>> {
        Some(self.shared.start())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn write_combining(&self) -> WriteCombining {
        WriteCombining::No
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.account.give_back(self.bytes);
    }
}
