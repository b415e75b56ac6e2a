//! CUDA devices: opening, memory, and launches.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::bar::Bar;
use super::context::Context;
use super::launched::Launched;
use super::monitor::Monitor;
use super::physical::{self, Physical};
use super::{driver, unavailable};
use crate::backend::cpp::{self, LaunchWords};
use crate::backend::stall::StallLimits;
use crate::backend::{
    Account, Backend, BlockClock, CudaConfig, CudaRingMemory, Device, DeviceInfo, DeviceMemory,
    Dispatch, DispatchRequest, Handler, Placement, ResidentDispatch, probe,
};
use crate::error::Error;
use crate::kernel::CudaCode;
use crate::logging;
use crate::process::PerProcess;
use crate::thread::event_count::EventCount;
use crate::thread::{KernelWait, affinity, driver_thread};

/// Longest pause between two empty polls of a kernel that parks: what waking a thread would take.
const PARKED_NAP: Duration = Duration::from_micros(10);

/// Longest pause that a multiprocessor makes at all (PTX ISA, `nanosleep`).
const LONGEST_NAP: Duration = Duration::from_millis(1);

/// Held while a device is opened and probed, and while code is made ready.
static OPENING: PerProcess<Mutex<()>> = PerProcess::new(|| Mutex::new(()));

/// The CUDA backend.
#[derive(Debug)]
pub(crate) struct CudaBackend {
    config: CudaConfig,
    cores: Vec<usize>,
    limits: StallLimits,
    devices: Vec<Physical>,
}

impl CudaBackend {
    /// Opens the driver and lists its devices.
    pub(crate) fn load(
        config: &CudaConfig,
        reserved_cores: &[usize],
        limits: StallLimits,
    ) -> Result<Self, Error> {
        let cores = affinity::unreserved_cores(reserved_cores);
        let settings = config.clone();
        let devices = driver_thread::on_cores("rk-cuda-open", cores.clone(), move || {
            driver::load()?;
            physical::enumerate(&settings)
        })?;
        Ok(Self {
            config: config.clone(),
            cores,
            limits,
            devices,
        })
    }
}

impl Backend for CudaBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        self.devices
            .iter()
            .map(|device| device.info.clone())
            .collect()
    }

    fn open(&self, index: usize) -> Result<Arc<dyn Device>, Error> {
        // Another runtime that opens the device at the same time would meet a running probe.
        let _opening = OPENING.get().lock();
        let physical = self.devices.get(index).ok_or(Error::DeviceNotFound {
            backend: crate::backend::BackendType::Cuda.name(),
            index,
            available: self.devices.len(),
        })?;
        let account = Arc::new(Account::new(physical.info.memory_limit));
        // Drivers start threads, which inherit the cores of the thread that calls them.
        let (config, opened) = (self.config.clone(), physical.clone());
        let (context, no_bar) =
            driver_thread::on_cores("rk-cuda-open", self.cores.clone(), move || {
                let physical = &opened;
                let (bar, no_bar) = match config.ring_memory {
                    CudaRingMemory::Host => (None, "decided by the configuration".to_owned()),
                    _ => match physical.uuid.map_or_else(
                        || Err("the driver does not tell its UUID".into()),
                        Bar::open,
                    ) {
                        Ok(bar) => (Some(bar), String::new()),
                        Err(reason) => (None, reason),
                    },
                };
                if bar.is_none() && config.ring_memory == CudaRingMemory::Device {
                    return Err(unavailable(format!(
                        "'{}' cannot have rings in its own memory: {no_bar}",
                        physical.info.name
                    )));
                }
                match Context::open(physical, &config, bar.clone(), Arc::clone(&account)) {
                    // Without what may be missing.
                    Err(Error::BackendUnavailable { reason, .. })
                        if bar.is_some() && config.ring_memory == CudaRingMemory::Auto =>
                    {
                        Ok((Context::open(physical, &config, None, account)?, reason))
                    }
                    opened => Ok((opened?, no_bar)),
                }
            })?;
        let monitor = Monitor::start(&context, self.cores.clone(), self.limits)?;
        let mut device = CudaDevice {
            info: physical.info.clone(),
            config: self.config.clone(),
            monitor,
            launching: Mutex::new(()),
            context,
        };
        let (ring_memory, reason) = device.place_rings(no_bar)?;
        logging::info!(
            "device '{}' has rings in {} memory: {reason}",
            device.info.name,
            ring_memory.name()
        );
        if let Some(cuda) = &mut device.info.cuda {
            cuda.ring_memory = ring_memory;
            cuda.ring_memory_reason = reason;
        }
        Ok(Arc::new(device))
    }
}

/// The kernel of the probe.
fn echo() -> Handler {
    let echo = include_bytes!("../../../kernels/ptx/echo.ptx").as_slice();
    // SAFETY: what the compiler made of our own source, which uses accessors alone.
    let code = unsafe { CudaCode::ptx(echo) };
    Handler::Cuda(Arc::new(code))
}

/// An open device.
#[derive(Debug)]
struct CudaDevice {
    info: DeviceInfo,
    config: CudaConfig,
    monitor: Monitor,
    /// Held during a launch, so that no other takes the room that was found.
    launching: Mutex<()>,
    /// After the monitor, whose thread uses it.
    context: Arc<Context>,
}

impl CudaDevice {
    /// Where request rings lie from now on, and why. `no_bar` tells why they cannot lie in the device's own memory, if so.
    fn place_rings(&self, no_bar: String) -> Result<(CudaRingMemory, String), Error> {
        let wanted = self.config.ring_memory;
        if wanted == CudaRingMemory::Device {
            self.context.put_rings_on_device(true);
            self.probe()?;
            return Ok((
                CudaRingMemory::Device,
                "decided by the configuration".into(),
            ));
        }
        self.probe()?;
        if !no_bar.is_empty() {
            return Ok((CudaRingMemory::Host, no_bar));
        }
        let host = self.time()?;
        self.context.put_rings_on_device(true);
        let device = match self.probe() {
            Ok(()) => self.time()?,
            Err(error) => {
                self.check_lost()?;
                Err(error.to_string())
            }
        };
        let (ring_memory, reason) = match (host, device) {
            (Ok(host), Ok(device)) => (
                match device < host {
                    true => CudaRingMemory::Device,
                    false => CudaRingMemory::Host,
                },
                format!(
                    "a round trip takes {device:.1?} with the device's, {host:.1?} with the host's"
                ),
            ),
            (_, Ok(device)) => (
                CudaRingMemory::Device,
                format!("a round trip takes {device:.1?}, too long with the host's"),
            ),
            (_, Err(failed)) => (
                CudaRingMemory::Host,
                format!("the device's cannot be used: {failed}"),
            ),
        };
        if ring_memory == CudaRingMemory::Host {
            self.context.put_rings_on_device(false);
            self.context.give_bar_back();
        }
        Ok((ring_memory, reason))
    }

    /// The fastest round trip with rings as they lie now, or why there is none.
    fn time(&self) -> Result<Result<Duration, String>, Error> {
        match probe::round_trip(self, &echo()) {
            Ok(outcome) => Ok(outcome),
            Err(error) => {
                self.check_lost()?;
                Ok(Err(error.to_string()))
            }
        }
    }

    /// Tries whether messages reach a resident kernel, and come back.
    fn probe(&self) -> Result<(), Error> {
        match probe::run(self, &echo())? {
            Ok(seen) => {
                logging::info!("device '{}': {seen}", self.info.name);
                Ok(())
            }
            Err(reason) => Err(unavailable(format!(
                "'{}' cannot be used: the probe failed: {reason}",
                self.info.name
            ))),
        }
    }

    fn nap(&self, wait: KernelWait) -> u32 {
        let nap = match wait {
            KernelWait::Spin | KernelWait::Auto | KernelWait::SpinYield => self.config.poll_nap,
            KernelWait::Park => self.config.poll_nap.max(PARKED_NAP),
            KernelWait::Interval(interval) => interval,
        };
        nap.min(LONGEST_NAP).as_nanos() as u32
    }
}

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn account(&self) -> &Arc<Account> {
        &self.context.account
    }

    fn allocate(&self, bytes: usize, placement: Placement) -> Result<Arc<dyn DeviceMemory>, Error> {
        Ok(Arc::new(self.context.allocate(bytes, placement)?))
    }

    fn check_lost(&self) -> Result<(), Error> {
        self.context.check_lost()
    }

    fn takes_cores(&self) -> bool {
        false
    }

    fn needs_bell(&self) -> bool {
        // Kernels poll, and the monitor is not on a message's path.
        false
    }

    fn wakes_callers(&self) -> bool {
        false
    }

    fn doorbell(&self) -> Option<Arc<EventCount>> {
        Some(Arc::clone(&self.monitor.handle.doorbell))
    }

    fn clock(&self, _handler: &Handler) -> Option<BlockClock> {
        Some(BlockClock::Device)
    }

    fn prepare(&self, kernel: &str, handler: &Handler) -> Result<(), Error> {
        match handler {
            Handler::Cuda(code) => {
                let _opening = OPENING.get().lock();
                self.context.module(kernel, &code.source).map(|_| ())
            }
            _ => Ok(()),
        }
    }

    fn shares_rings(&self) -> bool {
        true
    }

    fn dispatch(&self, request: DispatchRequest) -> Result<Box<dyn Dispatch>, Error> {
        let _launching = self.launching.lock();
        let name = request.signals.name.clone();
        let code: Arc<CudaCode> = match &request.handler {
            Handler::Cuda(code) => Arc::clone(code),
            _ => {
                return Err(Error::NoHandler {
                    kernel: name,
                    backend: self.info.backend.name(),
                });
            }
        };
        let grid = cpp::grid(&request)?;
        let ring = grid.layout.ring;
        cpp::check_replies(&name, code.replies, ring)?;
        let module = self.context.module(&name, &code.source)?;
        let threads = cpp::whole_groups(
            &request,
            self.context.physical.warp,
            module.max_threads.min(self.context.physical.max_threads),
            &self.info.name,
        )?;
        let blocks = request.blocks.len() as u32;
        let _current = self.context.enter()?;
        let each = module.blocks_each(&self.context, threads)?;
        let residency = self.context.reserve(blocks, threads, each)?;
        let launch = LaunchWords::new(
            &request,
            grid.layout,
            code.replies,
            cpp::message_cost(code.loop_iterations, ring, threads),
            !self.context.physical.watchdog,
            self.nap(request.wait),
        );
        let kernel = Launched::new(
            &self.context,
            request,
            module,
            launch,
            threads,
            grid,
            residency,
        )?;
        let monitor = Arc::clone(&self.monitor.handle);
        monitor.admit(Arc::clone(&kernel));
        Ok(Box::new(ResidentDispatch::new(kernel, monitor, 0)))
    }
}
