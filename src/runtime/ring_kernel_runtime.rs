//! The runtime: devices, registered kernels, launched kernels, and one life.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::accounts::Ended;
use super::builder::DeviceChoice;
use super::config::RuntimeConfig;
use super::connection::Connection;
use super::handle::KernelHandle;
use super::instance::KernelInstance;
use super::launch;
use super::lifecycle::{DrainReport, LifecycleState, ShutdownReport};
use super::metrics::KernelStatus;
use super::pipeline;
use super::topic::Topics;
use crate::backend::cpu::{CpuBackend, install_hook, running_here};
use crate::backend::{Backend, BackendType, Device, DeviceInfo, ExecutionMode};
use crate::bridge::{Bridge, BridgeSettings, RingBufferBridge};
use crate::error::Error;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{
    DeadLetterQueue, Dim3, KernelRegistration, KernelState, LaunchOptions, registered_kernels,
};
use crate::thread::{affinity, foreign};
use crate::time::{self, Deadline};

/// Between two looks whether a drain is complete.
const DRAIN_INTERVAL: Duration = Duration::from_micros(200);

/// Names the Vulkan device to use, by index or part of its name, where the program does not.
const DEVICE_VARIABLE: &str = "RINGKERNEL_VULKAN_DEVICE";

/// A runtime of persistent kernels on the devices of one backend.
///
/// Dropping it terminates its kernels and joins their threads, as [`complete_shutdown`](Self::complete_shutdown) does. In a handler of one of
/// them, that kernel ends once the handler returns. Then it drops what the handlers of registered kernels captured, on this thread; a panic of
/// theirs goes no further.
///
/// ```
/// use std::time::Duration;
/// use ringkernel::{Dim3, LaunchOptions, RingKernelRuntime};
///
/// let runtime = RingKernelRuntime::builder().build()?;
/// let kernel = runtime.launch("echo", Dim3::x(1), Dim3::x(32), LaunchOptions::default())?;
/// kernel.activate()?;
/// kernel.send_bytes(b"hello")?;
/// let mut reply = [0; 48];
/// let length = kernel.recv_bytes_timeout(&mut reply, Duration::from_secs(1))?;
/// assert_eq!(&reply[..length], b"hello");
/// runtime.drain(Duration::from_secs(1))?;
/// let report = runtime.complete_shutdown()?;
/// assert_eq!(report.requests.delivered, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RingKernelRuntime {
    backend: BackendType,
    default_device: usize,
    config: RuntimeConfig,
    devices: Devices,
    registry: Mutex<BTreeMap<String, KernelRegistration>>,
    /// Devices on which the code of registered kernels was made ready.
    prepared: Mutex<BTreeSet<usize>>,
    built: Instant,
    dead_letters: Arc<DeadLetterQueue>,
    /// One a device that kernels were launched on.
    bridges: Mutex<BTreeMap<usize, Arc<Bridge>>>,
    pub(super) topics: Topics,
    inner: Mutex<Inner>,
}

/// The backend's devices, each opened when it is first used.
#[derive(Debug)]
struct Devices {
    backend: Box<dyn Backend>,
    described: Vec<DeviceInfo>,
    open: Mutex<BTreeMap<usize, Arc<dyn Device>>>,
    huge_pages: bool,
}

#[derive(Debug)]
struct Inner {
    state: LifecycleState,
    /// Launched and neither terminated nor reaped.
    kernels: Vec<Arc<KernelInstance>>,
    /// Launches so far, for names.
    launches: u64,
    /// Accounts of the kernels that have ended, and that nothing changes any more.
    totals: ShutdownReport,
    /// The others that have ended.
    ended: Vec<Ended>,
}

impl fmt::Debug for RingKernelRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingKernelRuntime")
            .field("backend", &self.backend)
            .field("devices", &self.devices.described.len())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl RingKernelRuntime {
    pub(super) fn build(
        backend: Option<BackendType>,
        device: DeviceChoice,
        config: RuntimeConfig,
        registrations: Vec<KernelRegistration>,
    ) -> Result<Self, Error> {
        config.validate()?;
        time::initialise();
        affinity::initialise();
        install_hook();
        let mut registry = BTreeMap::new();
        for registration in registered_kernels().into_iter().chain(registrations) {
            add(&mut registry, registration)?;
        }
        let runs_on = |backend| {
            registry
                .values()
                .all(|registration| launch::handler(backend, registration).is_ok())
        };
        let (backend, devices, default_device) = match backend {
            Some(backend) => {
                let devices = Devices::new(backend, &config)?;
                let index = devices.choose(backend, &device)?;
                (backend, devices, index)
            }
            None => Devices::best(&config, &device, runs_on)?,
        };
        let bytes = config.dead_letter_capacity as u64 * config.dead_letter_bytes as u64;
        let dead_letters =
            DeadLetterQueue::new(config.dead_letter_capacity, config.dead_letter_bytes)
                .ok_or_else(|| Error::OutOfMemory {
                    device: "the host".into(),
                    asked: bytes,
                    available: 0,
                })?;
        let runtime = Self {
            dead_letters: Arc::new(dead_letters),
            backend,
            default_device,
            config,
            devices,
            registry: Mutex::new(registry),
            prepared: Mutex::new(BTreeSet::new()),
            built: Instant::now(),
            bridges: Mutex::new(BTreeMap::new()),
            topics: Topics::default(),
            inner: Mutex::new(Inner {
                state: LifecycleState::Initializing,
                kernels: Vec::new(),
                launches: 0,
                totals: ShutdownReport::default(),
                ended: Vec::new(),
            }),
        };
        runtime.device(default_device)?;
        log::debug!("runtime built: backend {backend}, device {default_device}");
        Ok(runtime)
    }

    /// An open device, whose kernels' code is ready.
    pub(super) fn device(&self, index: usize) -> Result<Arc<dyn Device>, Error> {
        let device = self.devices.get(self.backend, index)?;
        if self.prepared.lock().insert(index) {
            let registry = self.registry.lock();
            for registration in registry.values() {
                prepare(&*device, self.backend, registration);
            }
        }
        Ok(device)
    }

    /// The bridge of a device, whose thread runs from when it is first needed.
    fn bridge_of(&self, device: &dyn Device) -> Arc<Bridge> {
        let info = device.info();
        let mut bridges = self.bridges.lock();
        let bridge = bridges.entry(info.index).or_insert_with(|| {
            let settings = BridgeSettings {
                device: format!("{}{}", self.backend, info.index),
                wait: self.config.bridge_wait,
                poll_interval: self.config.bridge_poll_interval,
                core: self.config.bridge_core,
                cores: affinity::unreserved_cores(&self.config.reserved_cores),
                sample_interval: self.config.heartbeat_interval,
            };
            Arc::new(Bridge::new(settings, device.host_pool()))
        });
        Arc::clone(bridge)
    }

    /// The bridge of a device, once a kernel was launched there.
    #[must_use]
    pub fn bridge(&self, device: usize) -> Option<RingBufferBridge> {
        let bridges = self.bridges.lock();
        bridges.get(&device).map(RingBufferBridge::new)
    }

    /// The backend in use.
    #[must_use]
    pub fn backend(&self) -> BackendType {
        self.backend
    }

    /// The devices that kernels can be launched on. One that has not been used yet is only described.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let open = self.devices.open.lock();
        self.devices
            .described
            .iter()
            .enumerate()
            .map(|(index, described)| match open.get(&index) {
                Some(device) => device.info().clone(),
                None => described.clone(),
            })
            .collect()
    }

    /// Index of the device that launches use unless they name one.
    #[must_use]
    pub fn default_device(&self) -> usize {
        self.default_device
    }

    /// Bytes that live kernels, their clients, and topics take on a device.
    ///
    /// # Errors
    /// [`Error::DeviceNotFound`].
    pub fn memory_in_use(&self, device: usize) -> Result<u64, Error> {
        Ok(self.device(device)?.memory_in_use())
    }

    /// The messages of its kernels and topics that could not be delivered, and how many there were; also of kernels that have ended.
    #[must_use]
    pub fn dead_letters(&self) -> &DeadLetterQueue {
        &self.dead_letters
    }

    pub(super) fn letter_queue(&self) -> Arc<DeadLetterQueue> {
        Arc::clone(&self.dead_letters)
    }

    /// The configuration as built.
    #[must_use]
    pub fn config(&self) -> &RuntimeConfig {
        &self.config
    }

    /// Adds a kernel that only this runtime knows.
    ///
    /// # Errors
    /// [`Error::DuplicateKernel`] if its id is taken; [`Error::InvalidOption`].
    pub fn register(&self, registration: KernelRegistration) -> Result<(), Error> {
        let open: Vec<_> = self.devices.open.lock().values().cloned().collect();
        add(&mut self.registry.lock(), registration.clone())?;
        for device in open {
            prepare(&*device, self.backend, &registration);
        }
        Ok(())
    }

    /// Ids of all kernels that can be launched, sorted.
    #[must_use]
    pub fn registered(&self) -> Vec<String> {
        self.registry.lock().keys().cloned().collect()
    }

    /// Launches a kernel: afterwards it is resident on its device, and idle until it is activated. Starts the runtime
    /// if nobody has. Blocks while threads start and pin themselves.
    ///
    /// # Errors
    /// [`Error::KernelNotFound`], which lists what is registered; [`Error::InvalidOption`] (a grid of zero, a message
    /// size out of range), [`Error::CoreNotFound`], [`Error::DeviceNotFound`], [`Error::OutOfMemory`],
    /// [`Error::NoHandler`], [`Error::InvalidLifecycle`] once the runtime drains, [`Error::Os`].
    pub fn launch(
        &self,
        id: &str,
        grid: impl Into<Dim3>,
        block_size: impl Into<Dim3>,
        options: LaunchOptions,
    ) -> Result<KernelHandle, Error> {
        let registration = {
            let registry = self.registry.lock();
            registry
                .get(id)
                .cloned()
                .ok_or_else(|| Error::KernelNotFound {
                    id: id.to_owned(),
                    registered: registry.keys().cloned().collect(),
                })?
        };
        let device = self.device(options.device.unwrap_or(self.default_device))?;
        let mut inner = self.inner.lock();
        if inner.state > LifecycleState::Running {
            return Err(Error::InvalidLifecycle {
                state: inner.state.name(),
                operation: "launch a kernel",
            });
        }
        inner.sweep();
        let name = inner.name_for(id, options.name.as_deref())?;
        let instance = launch::launch(
            device.as_ref(),
            &self.config,
            &registration,
            name,
            (grid.into(), block_size.into()),
            &options,
            (&self.dead_letters, &self.bridge_of(&*device)),
        )?;
        inner.state = LifecycleState::Running;
        inner.launches += 1;
        inner.kernels.push(Arc::clone(&instance));
        log::info!(
            "kernel '{}' launched on {} device {}",
            instance.signals.name,
            self.backend,
            instance.device
        );
        Ok(KernelHandle::new(instance))
    }

    /// Makes the replies of `from` the requests of `to`. Chains of any length can be made so; a kernel may feed up to 32 others, each of which
    /// gets every reply, and be fed by any number.
    ///
    /// Kernels that share a thread share its time: see [`ConnectionKind::SharedThread`](crate::ConnectionKind::SharedThread) for what that
    /// means when a handler does not return.
    ///
    /// Kernels of one block on one device that have no other connection in that direction share a ring: no host thread lies between them.
    /// So it is on the CPU, on CUDA, and on Vulkan but in staged mode, if `to` has at least as many slots as one run of `from`'s handler may
    /// write replies. All others are connected by the bridge of `from`'s device ([`ConnectionKind`](crate::ConnectionKind)). A ring gives way
    /// to the bridge when another kernel joins in; the kernels that share it must be idle then too.
    ///
    /// While they are connected, `to` cannot be sent to, and `from` can be neither received from nor called:
    /// [`Unavailable::Connected`](crate::error::Unavailable::Connected). Whoever sends to the first kernel receives from
    /// the last ([`KernelHandle::call_through`], [`KernelHandle::split_through`], or any other way): correlation, priority
    /// and extension travel through, types are translated. A reply of a type that `to` does not take is an error of
    /// `from`'s handler. Errors of handlers travel through as well, past the handlers behind them, and reach whoever
    /// receives from the last kernel. Over the bridge, a reply that no kernel behind can take (of another type, or too large) goes to the dead
    /// letters.
    ///
    /// What `to` has been sent before comes first. A full ring makes `from` wait, whose own ring then fills. A drain waits
    /// for the whole chain. A reply that `to` has taken counts as delivered; one that it gives back when it ends as
    /// returned, and the request that it had become is among those that the report returns. When either kernel ends or
    /// fails, so does the connection: the replies of `from` wait for its callers again, and `to` can be sent to. After a panic that
    /// takes until the panic hook has ended. A device learns of a failure a moment later (a millisecond as a rule): what `from` writes until then lies in the ring of the kernel that has failed, and is returned
    /// with it.
    ///
    /// Blocks for a moment, until `from` has its new ring.
    ///
    /// # Errors
    /// [`Error::InvalidTransition`] unless both kernels are launched or deactivated; [`Error::Cycle`];
    /// [`Error::CalledFromHandler`] in a handler of one of them;
    /// [`Error::ConnectedAlready`] if they are;
    /// [`Error::EndpointsBusy`] if a side is split off, or `from` has pending calls or replies that nobody has received;
    /// [`Error::CannotConnect`] unless both are kernels of this runtime; [`Error::DeviceBusy`] if the bridge looks after 1024 kernels with
    /// clients and kernels with connections already, [`Error::Os`] if its thread cannot be started;
    /// [`Error::Timeout`]; [`Error::InvalidLifecycle`] once the runtime drains. Nothing has changed then; but if a kernel or the bridge's thread
    /// did not follow in time ([`Error::Timeout`], [`Error::InvalidLifecycle`]) or a kernel ended meanwhile, rings may have given way already.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringkernel::{KernelRegistration, LaunchOptions, RingKernelRuntime};
    ///
    /// let double = KernelRegistration::new("double").cpu_handler(|request, context| {
    ///     context.reply_bytes(&[request.payload()[0] * 2])
    /// });
    /// let runtime = RingKernelRuntime::builder().backend(ringkernel::BackendType::Cpu).register(double).build()?;
    /// let launch = || runtime.launch("double", 1, 1, LaunchOptions::default());
    /// let (first, second) = (launch()?, launch()?);
    /// runtime.connect(&first, &second)?;
    /// first.activate()?;
    /// second.activate()?;
    /// let mut reply = [0; 1];
    /// first.call_bytes_through(&second, &[10], &mut reply, Duration::from_secs(1))?;
    /// assert_eq!(reply, [40]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn connect(&self, from: &KernelHandle, to: &KernelHandle) -> Result<Connection, Error> {
        for kernel in [from, to] {
            kernel.instance.check_not_here("connection")?;
        }
        let inner = self.inner.lock();
        if inner.state > LifecycleState::Running {
            return Err(Error::InvalidLifecycle {
                state: inner.state.name(),
                operation: "connect kernels",
            });
        }
        // Under the lock: no other connection is made meanwhile, so that cycles are seen.
        let way = pipeline::connect(&from.instance, &to.instance, &inner.kernels)?;
        Ok(Connection::new(&from.instance, &to.instance, way))
    }

    /// Where each kernel stands that has not been terminated, in the order of their launches.
    #[must_use]
    pub fn kernels(&self) -> Vec<KernelStatus> {
        let mut inner = self.inner.lock();
        inner.sweep();
        inner
            .kernels
            .iter()
            .map(|instance| instance.status())
            .collect()
    }

    /// A handle to the kernel of this name, if it has not been terminated.
    #[must_use]
    pub fn kernel(&self, name: &str) -> Option<KernelHandle> {
        let inner = self.inner.lock();
        inner
            .kernels
            .iter()
            .find(|instance| instance.signals.name == name)
            .map(|instance| KernelHandle::new(Arc::clone(instance)))
    }

    /// Fails once the runtime drains.
    pub(super) fn check_running(&self, operation: &'static str) -> Result<(), Error> {
        match self.state() {
            LifecycleState::Initializing | LifecycleState::Running => Ok(()),
            state => Err(Error::InvalidLifecycle {
                state: state.name(),
                operation,
            }),
        }
    }

    /// Whether a kernel is one of this runtime's, and has not been terminated.
    pub(super) fn has_kernel(&self, instance: &Arc<KernelInstance>) -> bool {
        let inner = self.inner.lock();
        inner
            .kernels
            .iter()
            .any(|other| Arc::ptr_eq(other, instance))
    }

    /// Where the runtime is in its life.
    #[must_use]
    pub fn state(&self) -> LifecycleState {
        self.inner.lock().state
    }

    /// Makes the runtime `Running`; the first launch does so too. Does nothing if it is already.
    ///
    /// # Errors
    /// [`Error::InvalidLifecycle`] once it drains or has stopped.
    pub fn start(&self) -> Result<(), Error> {
        self.inner.lock().advance(LifecycleState::Running, "start")
    }

    /// Refuses new launches and messages, and waits until active kernels have handled all that they had accepted, and what had been
    /// published to topics that they subscribe to, at most for `timeout`. Replies, and messages of topics, stay receivable. A drain cannot be undone; a second one waits again.
    ///
    /// # Errors
    /// [`Error::InvalidLifecycle`] unless the runtime is running or draining; [`Error::CalledFromHandler`] in a handler of one of its
    /// kernels, whose request would never be done meanwhile.
    pub fn drain(&self, timeout: Duration) -> Result<DrainReport, Error> {
        let begin = Instant::now();
        let deadline = Deadline::after(timeout);
        let kernels = {
            let mut inner = self.inner.lock();
            inner.check_none_here("drain")?;
            if inner.state != LifecycleState::Draining {
                if inner.state != LifecycleState::Running {
                    return Err(Error::InvalidLifecycle {
                        state: inner.state.name(),
                        operation: "drain",
                    });
                }
                inner.advance(LifecycleState::Draining, "drain")?;
            }
            // In this order, so that what a kernel has passed on is seen behind it.
            pipeline::upstream_first(&inner.kernels)
        };
        // What was published before reaches the kernels that subscribe.
        self.topics.drain(deadline);
        for kernel in &kernels {
            kernel.signals.gate.set_draining();
            kernel.bridge.attention.bell.notify();
        }
        let busy = || {
            kernels.iter().any(|kernel| {
                kernel.state() == KernelState::Active
                    && (kernel.queue_depth() > 0 || kernel.owes_replies())
            })
        };
        while busy() && !deadline.has_passed() {
            std::thread::sleep(DRAIN_INTERVAL.min(deadline.remaining()));
        }
        let remaining = kernels
            .iter()
            .filter(|kernel| !kernel.state().is_final())
            .map(|kernel| kernel.queue_depth())
            .sum();
        Ok(DrainReport {
            complete: !busy(),
            remaining,
            took: begin.elapsed(),
        })
    }

    /// Closes all topics, terminates all kernels, joins their threads, and closes the accounts. Without a drain before it, queued requests
    /// come back in the report. Blocks for `termination_timeout` at most for each kernel whose handler does not
    /// return; what goes wrong is in the report's `errors`.
    ///
    /// # Errors
    /// [`Error::InvalidLifecycle`] if the runtime has been shut down before; [`Error::CalledFromHandler`] in a handler of one of its kernels:
    /// nothing has changed then.
    pub fn complete_shutdown(&self) -> Result<ShutdownReport, Error> {
        self.inner.lock().check_none_here("shutdown")?;
        self.shut_down()
    }

    /// As `complete_shutdown`. A kernel whose handler the calling thread is in ends once that returns.
    fn shut_down(&self) -> Result<ShutdownReport, Error> {
        let kernels = {
            let mut inner = self.inner.lock();
            inner.advance(LifecycleState::ShuttingDown, "shut down")?;
            pipeline::upstream_first(&inner.kernels)
        };
        // Not under the lock: status calls must not wait for a stuck handler.
        let mut errors = Vec::new();
        self.topics.close(&mut errors);
        for kernel in &kernels {
            match kernel.terminate() {
                Ok(()) => {}
                // Somebody else has terminated it.
                Err(Error::InvalidTransition { .. }) => {}
                Err(Error::CalledFromHandler { .. }) => kernel.end_after_handler(),
                Err(error) => errors.push(error),
            }
        }
        drop(kernels);
        for bridge in self.bridges.lock().values() {
            bridge.stop();
        }
        let mut inner = self.inner.lock();
        for instance in &inner.kernels {
            // Of one that another thread terminates.
            drop(instance.control.lock());
        }
        inner.sweep();
        inner.state = LifecycleState::Stopped;
        let mut report = std::mem::take(&mut inner.totals);
        for account in inner.ended.drain(..) {
            account.report(&mut report);
        }
        report.kernels = inner.launches;
        report.uptime = self.built.elapsed();
        report.topics = self.topics.tally(&mut errors);
        report.errors = errors;
        log::info!("runtime stopped after {:?}", report.uptime);
        Ok(report)
    }
}

impl Devices {
    fn new(backend: BackendType, config: &RuntimeConfig) -> Result<Self, Error> {
        let backend: Box<dyn Backend> = match backend {
            BackendType::Cpu => Box::new(CpuBackend::new(
                config.cpu_devices,
                config.cpu_memory_limit,
                &config.reserved_cores,
            )),
            #[cfg(feature = "vulkan")]
            BackendType::Vulkan => Box::new(crate::backend::vulkan::VulkanBackend::load(
                &config.vulkan,
                &config.reserved_cores,
                config.stall_limits(),
            )?),
            #[cfg(not(feature = "vulkan"))]
            BackendType::Vulkan => {
                return Err(Error::BackendUnavailable {
                    backend: backend.name(),
                    reason: "this build lacks the feature `vulkan`".into(),
                });
            }
            #[cfg(feature = "cuda")]
            BackendType::Cuda => Box::new(crate::backend::cuda::CudaBackend::load(
                &config.cuda,
                &config.reserved_cores,
                config.stall_limits(),
            )?),
            #[cfg(not(feature = "cuda"))]
            BackendType::Cuda => {
                return Err(Error::BackendUnavailable {
                    backend: backend.name(),
                    reason: "this build lacks the feature `cuda`".into(),
                });
            }
            #[cfg(feature = "metal")]
            BackendType::Metal => Box::new(crate::backend::metal::MetalBackend::load(
                &config.metal,
                &config.reserved_cores,
                config.stall_limits(),
            )?),
            #[cfg(not(feature = "metal"))]
            BackendType::Metal => {
                return Err(Error::BackendUnavailable {
                    backend: backend.name(),
                    reason: "this build lacks the feature `metal`".into(),
                });
            }
        };
        Ok(Self {
            described: backend.devices(),
            backend,
            open: Mutex::new(BTreeMap::new()),
            huge_pages: config.huge_pages,
        })
    }

    /// The best backend: Vulkan, if it has hardware that keeps kernels resident and all kernels have code for it. CUDA and Metal are
    /// for those who ask for them, until they have been seen to work on a GPU.
    fn best(
        config: &RuntimeConfig,
        choice: &DeviceChoice,
        runs_on: impl Fn(BackendType) -> bool,
    ) -> Result<(BackendType, Self, usize), Error> {
        if runs_on(BackendType::Vulkan) {
            match Self::good(BackendType::Vulkan, config, choice) {
                Ok(Some((devices, index))) => return Ok((BackendType::Vulkan, devices, index)),
                Ok(None) => {
                    log::debug!("no Vulkan device keeps kernels resident without taking cores");
                }
                Err(error) => log::debug!("not chosen: {error}"),
            }
        }
        let cpu = Self::new(BackendType::Cpu, config)?;
        let index = cpu.choose(BackendType::Cpu, choice)?;
        Ok((BackendType::Cpu, cpu, index))
    }

    /// The devices of a backend and the one that is meant, if it is better than the CPU.
    fn good(
        backend: BackendType,
        config: &RuntimeConfig,
        choice: &DeviceChoice,
    ) -> Result<Option<(Self, usize)>, Error> {
        let devices = Self::new(backend, config)?;
        let index = devices.choose(backend, choice)?;
        // A software device that is named is asked for; an index may as well be meant for the CPU.
        let named = match choice {
            DeviceChoice::Best => backend == BackendType::Vulkan && device_variable().is_some(),
            DeviceChoice::Name(_) => true,
            DeviceChoice::Index(_) => false,
        };
        let good = match devices.described.get(index) {
            None => false,
            Some(_) if named => true,
            Some(info) => info.kind.is_hardware() && is_resident(&*devices.get(backend, index)?),
        };
        Ok(good.then_some((devices, index)))
    }

    fn get(&self, backend: BackendType, index: usize) -> Result<Arc<dyn Device>, Error> {
        if index >= self.described.len() {
            return Err(Error::DeviceNotFound {
                backend: backend.name(),
                index,
                available: self.described.len(),
            });
        }
        let mut open = self.open.lock();
        if let Some(device) = open.get(&index) {
            return Ok(Arc::clone(device));
        }
        let device = self.backend.open(index)?;
        device.account().use_huge_pages(self.huge_pages);
        open.insert(index, Arc::clone(&device));
        Ok(device)
    }

    /// The index of the device that is meant.
    fn choose(&self, backend: BackendType, choice: &DeviceChoice) -> Result<usize, Error> {
        let named = |name: &str| {
            let wanted = name.to_lowercase();
            self.described
                .iter()
                .position(|info| info.name.to_lowercase().contains(&wanted))
                .ok_or_else(|| Error::DeviceNotNamed {
                    backend: backend.name(),
                    name: name.to_owned(),
                    available: self
                        .described
                        .iter()
                        .map(|info| info.name.clone())
                        .collect(),
                })
        };
        match choice {
            DeviceChoice::Index(index) => Ok(*index),
            DeviceChoice::Name(name) => named(name),
            DeviceChoice::Best if backend == BackendType::Cpu => Ok(0),
            DeviceChoice::Best => match device_variable() {
                Some(name) if backend == BackendType::Vulkan => match name.parse() {
                    Ok(index) => Ok(index),
                    Err(_) => named(&name),
                },
                _ => self.best_hardware(backend),
            },
        }
    }

    /// The first hardware device that keeps kernels resident; the first that runs them at all if none does.
    fn best_hardware(&self, backend: BackendType) -> Result<usize, Error> {
        let mut fallback = None;
        let mut reasons = Vec::new();
        // Vulkan's are sorted by kind, CUDA's are the driver's order.
        for (index, info) in self.described.iter().enumerate() {
            if !info.kind.is_hardware() {
                reasons.push(format!(
                    "device {index}, '{}', is software and must be asked for",
                    info.name
                ));
                continue;
            }
            match self.get(backend, index) {
                Ok(device) => {
                    if is_resident(&*device) {
                        return Ok(index);
                    }
                    fallback = fallback.or(Some(index));
                }
                Err(error) => reasons.push(format!("device {index}: {error}")),
            }
        }
        fallback.ok_or_else(|| Error::BackendUnavailable {
            backend: backend.name(),
            reason: if reasons.is_empty() {
                "there are no devices".into()
            } else {
                reasons.join("; ")
            },
        })
    }
}

/// The device that the environment names, if it names one.
fn device_variable() -> Option<String> {
    let name = std::env::var(DEVICE_VARIABLE).ok()?;
    (!name.trim().is_empty()).then_some(name)
}

/// Makes a kernel's code ready on a device. What is wrong with it is an error of its launch.
fn prepare(device: &dyn Device, backend: BackendType, registration: &KernelRegistration) {
    if let Ok(handler) = launch::handler(backend, registration)
        && let Err(error) = device.prepare(registration.id(), &handler)
    {
        log::debug!("kernel '{}' is not ready: {error}", registration.id());
    }
}

/// Whether a running dispatch of the device sees messages.
fn is_resident(device: &dyn Device) -> bool {
    match &device.info().vulkan {
        Some(vulkan) => vulkan.mode == ExecutionMode::Resident,
        None => true,
    }
}

fn add(
    registry: &mut BTreeMap<String, KernelRegistration>,
    registration: KernelRegistration,
) -> Result<(), Error> {
    registration.validate()?;
    let id = registration.id().to_owned();
    if registry.contains_key(&id) {
        return Err(Error::DuplicateKernel { id });
    }
    registry.insert(id, registration);
    Ok(())
}

impl Inner {
    /// Goes forward to `next`; staying is allowed only in `Running`.
    fn advance(&mut self, next: LifecycleState, operation: &'static str) -> Result<(), Error> {
        if self.state < next || (self.state == next && next == LifecycleState::Running) {
            self.state = next;
            return Ok(());
        }
        Err(Error::InvalidLifecycle {
            state: self.state.name(),
            operation,
        })
    }

    /// Fails on a thread that runs a handler of one of the kernels, which would wait for itself.
    fn check_none_here(&self, operation: &'static str) -> Result<(), Error> {
        let is_ours = |signals: &Arc<KernelSignals>| {
            let mut kernels = self.kernels.iter();
            kernels.any(|kernel| Arc::ptr_eq(&kernel.signals, signals))
        };
        match running_here(is_ours) {
            Some(kernel) => Err(Error::CalledFromHandler { operation, kernel }),
            None => Ok(()),
        }
    }

    /// A name that no live kernel has.
    fn name_for(&self, id: &str, asked: Option<&str>) -> Result<String, Error> {
        let taken = |name: &str| {
            self.kernels
                .iter()
                .any(|instance| instance.signals.name == name)
        };
        let name = asked.unwrap_or(id);
        if name.contains('\0') {
            return Err(Error::InvalidOption {
                option: "name",
                reason: "it contains a NUL byte".into(),
            });
        }
        if !taken(name) {
            return Ok(name.to_owned());
        }
        if asked.is_some() {
            return Err(Error::InvalidOption {
                option: "name",
                reason: format!("a kernel is called '{name}' already"),
            });
        }
        // At most as many names are taken as there are kernels.
        Ok((self.launches..)
            .map(|number| format!("{id}-{number}"))
            .find(|name| !taken(name))
            .unwrap_or_default())
    }

    /// Forgets the kernels that have ended, but for their accounts.
    fn sweep(&mut self) {
        let Self {
            kernels,
            ended,
            totals,
            ..
        } = self;
        kernels.retain(|instance| {
            let Some(account) = Ended::of(instance) else {
                return true;
            };
            if instance.has_failed() {
                totals.failed_kernels.push(instance.signals.name.clone());
            }
            ended.push(account);
            false
        });
        ended.retain(|account| !account.close(totals));
    }
}

impl Drop for RingKernelRuntime {
    fn drop(&mut self) {
        if self.state() < LifecycleState::ShuttingDown
            && let Ok(report) = self.shut_down()
        {
            for error in report.errors {
                log::warn!("shutdown: {error}");
            }
        }
        // What handlers captured may panic when it is dropped, and this may be the drop of an unwinding thread.
        let registry = std::mem::take(&mut *self.registry.lock());
        for registration in registry.into_values() {
            let _ = foreign::contain(|| drop(registration));
        }
    }
}
