//! The runtime: devices, registered kernels, launched kernels, and one life.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::accounts::Ended;
use super::builder::DeviceChoice;
use super::config::RuntimeConfig;
use super::connection::Connection;
use super::devices::Devices;
use super::handle::KernelHandle;
use super::instance::KernelInstance;
use super::launch;
use super::lifecycle::{DrainReport, LifecycleState, ShutdownReport};
use super::metrics::KernelStatus;
use super::pipeline;
use super::snapshot::Snapshot;
use super::topic::Topics;
use crate::backend::cpu::{install_hook, running_here, runs_here};
use crate::backend::{BackendType, Device, DeviceInfo};
use crate::bridge::{Bridge, BridgeSettings, RingBufferBridge};
use crate::error::Error;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{
    DeadLetterQueue, Dim3, KernelRegistration, KernelState, LaunchOptions, registered_kernels,
};
use crate::logging;
use crate::process::{self, OriginProcess};
use crate::system;
use crate::thread::{affinity, budget, foreign};
use crate::time::{self, Deadline};

/// Between two looks whether a drain is complete.
const DRAIN_INTERVAL: Duration = Duration::from_micros(200);

/// A runtime of persistent kernels on the devices of one backend.
///
/// Dropping it terminates its kernels and joins their threads, as [`complete_shutdown`](Self::complete_shutdown) does. In a handler of one of
/// them, that kernel ends once the handler returns. Then it drops what the handlers of registered kernels captured, on this thread; a panic of
/// theirs goes no further.
///
/// # `fork`
/// Kernels, bridges and devices stay with the parent, which notices nothing. In the child every handle, endpoint, client,
/// publisher and subscriber says so at once ([`Unavailable::Forked`](crate::error::Unavailable::Forked)), and everything else
/// is [`Error::Forked`]; dropping them waits for no thread and calls no driver. A new runtime can be built there. Of devices
/// other than the CPU, what their driver says to that is its own. A child that was made by the system call `clone`, without
/// the handlers of `pthread_atfork`, learns of it when the control plane is asked, on Linux; a child of `vfork` may only
/// execute another program, as ever.
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
    devices: Arc<Devices>,
    /// The process that the runtime is of.
    origin: OriginProcess,
    registry: Snapshot<BTreeMap<String, KernelRegistration>>,
    built: Instant,
    dead_letters: Arc<DeadLetterQueue>,
    /// One a device that kernels were launched on.
    bridges: Snapshot<BTreeMap<usize, Arc<Bridge>>>,
    pub(super) topics: Topics,
    /// A [`LifecycleState`]; changed under the lock of `inner`.
    state: AtomicU8,
    /// Launched, and neither booked into the totals nor forgotten.
    kernels: Snapshot<Vec<Arc<KernelInstance>>>,
    /// Held while kernels are connected.
    connecting: Mutex<()>,
    /// What no getter needs: it may be held while memory is allocated.
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Names of kernels that are being launched.
    names: Vec<String>,
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
            .field("devices", &self.devices.count())
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
        let _deferral = logging::defer();
        config.validate()?;
        time::initialise();
        budget::refresh();
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
        let refused = |available| Error::OutOfMemory {
            device: "the host".into(),
            asked: bytes,
            available,
        };
        let _grant = system::memory::ask(bytes).map_err(refused)?;
        let dead_letters =
            DeadLetterQueue::new(config.dead_letter_capacity, config.dead_letter_bytes)
                .ok_or_else(|| refused(0))?;
        let devices = Arc::new(devices);
        process::register(&devices);
        let runtime = Self {
            origin: OriginProcess::current(),
            dead_letters: Arc::new(dead_letters),
            backend,
            default_device,
            config,
            devices,
            registry: Snapshot::new(registry),
            built: Instant::now(),
            bridges: Snapshot::new(BTreeMap::new()),
            topics: Topics::default(),
            state: AtomicU8::new(LifecycleState::Initializing as u8),
            kernels: Snapshot::new(Vec::new()),
            connecting: Mutex::new(()),
            inner: Mutex::new(Inner {
                names: Vec::new(),
                launches: 0,
                totals: ShutdownReport::default(),
                ended: Vec::new(),
            }),
        };
        runtime.device(default_device)?;
        logging::debug!("runtime built: backend {backend}, device {default_device}");
        Ok(runtime)
    }

    /// An open device, whose kernels' code is ready.
    pub(super) fn device(&self, index: usize) -> Result<Arc<dyn Device>, Error> {
        self.check_here("use a device")?;
        let _deferral = logging::defer();
        let device = self.devices.get(self.backend, index)?;
        if self.devices.begin_preparing(index) {
            for registration in self.registry.load().values() {
                prepare(&*device, self.backend, registration);
            }
        }
        Ok(device)
    }

    /// The bridge of a device, whose thread runs from when it is first needed.
    fn bridge_of(&self, device: &dyn Device) -> Arc<Bridge> {
        let info = device.info();
        let found = self.bridges.load().get(&info.index).cloned();
        found.unwrap_or_else(|| {
            let settings = BridgeSettings {
                device: format!("{}{}", self.backend, info.index),
                wait: self.config.bridge_wait,
                poll_interval: self.config.bridge_poll_interval,
                core: self.config.bridge_core,
                cores: affinity::unreserved_cores(&self.config.reserved_cores),
                sample_interval: self.config.heartbeat_interval,
            };
            let new = Arc::new(Bridge::new(settings, device.host_pool()));
            process::register(&new);
            self.bridges.update(|bridges| {
                let mut bridges = bridges.clone();
                // Another thread may have been faster: then its bridge counts.
                let bridge = Arc::clone(bridges.entry(info.index).or_insert(Arc::clone(&new)));
                (bridges, bridge)
            })
        })
    }

    /// The bridge of a device, once a kernel was launched there.
    #[must_use]
    pub fn bridge(&self, device: usize) -> Option<RingBufferBridge> {
        if self.origin.has_forked_since() {
            return None;
        }
        self.bridges.load().get(&device).map(RingBufferBridge::new)
    }

    /// The backend in use.
    #[must_use]
    pub fn backend(&self) -> BackendType {
        self.backend
    }

    /// The devices that kernels can be launched on. One that has not been used yet is only described.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceInfo> {
        self.devices.describe()
    }

    /// Index of the device that launches use unless they name one.
    #[must_use]
    pub fn default_device(&self) -> usize {
        self.default_device
    }

    /// Bytes that live kernels, their clients, and topics take on a device; 0 while the device has
    /// not been used. First gives back what failed kernels took that no handle or endpoint refers
    /// to any more.
    ///
    /// # Errors
    /// [`Error::DeviceNotFound`].
    pub fn memory_in_use(&self, device: usize) -> Result<u64, Error> {
        let device = self.devices.opened(self.backend, device)?;
        self.check_here("tell the memory in use")?;
        self.reclaim();
        Ok(device.map_or(0, |device| device.memory_in_use()))
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
        self.check_here("register a kernel")?;
        let _deferral = logging::defer();
        self.registry.try_update(|registry| {
            let mut registry = registry.clone();
            add(&mut registry, registration.clone())?;
            Ok::<_, Error>((registry, ()))
        })?;
        for device in self.devices.all_open() {
            prepare(&**device, self.backend, &registration);
        }
        Ok(())
    }

    /// Ids of all kernels that can be launched, sorted.
    #[must_use]
    pub fn registered(&self) -> Vec<String> {
        self.registry.load().keys().cloned().collect()
    }

    /// Launches a kernel: afterwards it is resident on its device, and idle until it is activated. Starts the runtime
    /// if no thread has. Blocks while threads start and pin themselves, for a minute at most.
    ///
    /// # Errors
    /// [`Error::KernelNotFound`], which lists what is registered; [`Error::InvalidOption`] (a grid of zero, a message
    /// size out of range), [`Error::CoreNotFound`], [`Error::DeviceNotFound`], [`Error::OutOfMemory`],
    /// [`Error::NoHandler`], [`Error::InvalidLifecycle`] once the runtime drains, [`Error::Os`];
    /// [`Error::Timeout`] if a thread has not started within that minute.
    pub fn launch(
        &self,
        id: &str,
        grid: impl Into<Dim3>,
        block_size: impl Into<Dim3>,
        options: LaunchOptions,
    ) -> Result<KernelHandle, Error> {
        self.check_here("launch a kernel")?;
        let _deferral = logging::defer();
        let registry = self.registry.load();
        let registration = registry.get(id).ok_or_else(|| Error::KernelNotFound {
            id: id.to_owned(),
            registered: registry.keys().cloned().collect(),
        })?;
        let device = self.device(options.device.unwrap_or(self.default_device))?;
        self.reclaim();
        self.sweep();
        let name = self.reserve_name(id, options.name.as_deref())?;
        // No lock: a device may take seconds.
        let instance = launch::launch(
            device.as_ref(),
            &self.config,
            registration,
            name.name.clone(),
            (grid.into(), block_size.into()),
            &options,
            (&self.dead_letters, &self.bridge_of(&*device)),
        )?;
        let is_listed = {
            let mut inner = self.inner.lock();
            let is_in_time = self.state() <= LifecycleState::Running;
            if is_in_time {
                self.set_state(LifecycleState::Running);
                inner.launches += 1;
                self.kernels.update(|kernels| {
                    let mut kernels = kernels.clone();
                    kernels.push(Arc::clone(&instance));
                    (kernels, ())
                });
            }
            is_in_time
        };
        if !is_listed {
            // The runtime was told to drain meanwhile. The kernel has never been active.
            let _ = instance.terminate();
            return Err(self.not_running("launch a kernel"));
        }
        logging::info!(
            "kernel '{}' launched on {} device {}",
            instance.signals.name,
            self.backend,
            instance.device
        );
        Ok(KernelHandle::new(instance))
    }

    /// Reserves a name that no live kernel has, as long as the result lives.
    fn reserve_name(&self, id: &str, asked: Option<&str>) -> Result<ReservedName<'_>, Error> {
        let mut inner = self.inner.lock();
        self.check_running("launch a kernel")?;
        let name = inner.name_for(id, asked, &self.kernels.load())?;
        inner.names.push(name.clone());
        Ok(ReservedName {
            runtime: self,
            name,
        })
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
        self.check_here("connect kernels")?;
        for kernel in [from, to] {
            kernel.instance.check_not_here("connection")?;
        }
        let _deferral = logging::defer();
        // No other connection is made meanwhile, so that cycles are seen.
        let _one = self.connecting.lock();
        self.check_running("connect kernels")?;
        let way = pipeline::connect(&from.instance, &to.instance, &self.kernels.load())?;
        Ok(Connection::new(&from.instance, &to.instance, way))
    }

    /// Where each kernel stands that has not been terminated, in the order of their launches.
    #[must_use]
    pub fn kernels(&self) -> Vec<KernelStatus> {
        if !self.origin.has_forked_since() {
            let _deferral = logging::defer();
            self.try_sweep();
        }
        self.kernels
            .load()
            .iter()
            .filter(|instance| !instance.has_ended())
            .map(|instance| instance.status())
            .collect()
    }

    /// A handle to the kernel of this name, if it has not been terminated.
    #[must_use]
    pub fn kernel(&self, name: &str) -> Option<KernelHandle> {
        self.kernels
            .load()
            .iter()
            .find(|instance| !instance.has_ended() && instance.signals.name == name)
            .map(|instance| KernelHandle::new(Arc::clone(instance)))
    }

    /// Fails in the child of a fork.
    pub(super) fn check_here(&self, operation: &'static str) -> Result<(), Error> {
        if self.origin.has_forked_since() {
            return Err(Error::Forked { operation });
        }
        Ok(())
    }

    /// Fails on a thread that runs a handler of one of the kernels, which would wait for itself.
    fn check_none_here(&self, operation: &'static str) -> Result<(), Error> {
        let kernels = self.kernels.load();
        let is_ours = |signals: &Arc<KernelSignals>| {
            let mut kernels = kernels.iter();
            kernels.any(|kernel| Arc::ptr_eq(&kernel.signals, signals))
        };
        match running_here(is_ours) {
            Some(kernel) => Err(Error::CalledFromHandler { operation, kernel }),
            None => Ok(()),
        }
    }

    /// Fails once the runtime drains, and in the child of a fork.
    pub(super) fn check_running(&self, operation: &'static str) -> Result<(), Error> {
        self.check_here(operation)?;
        match self.state() {
            LifecycleState::Initializing | LifecycleState::Running => Ok(()),
            _ => Err(self.not_running(operation)),
        }
    }

    fn not_running(&self, operation: &'static str) -> Error {
        Error::InvalidLifecycle {
            state: self.state().name(),
            operation,
        }
    }

    /// Whether a kernel is one of this runtime's, and has not been terminated.
    pub(super) fn has_kernel(&self, instance: &Arc<KernelInstance>) -> bool {
        self.kernels
            .load()
            .iter()
            .any(|other| Arc::ptr_eq(other, instance))
    }

    /// Where the runtime is in its life; `Stopped` in the child of a fork. It waits for nothing
    /// that the runtime does.
    #[must_use]
    pub fn state(&self) -> LifecycleState {
        if self.origin.has_forked_since() {
            return LifecycleState::Stopped;
        }
        LifecycleState::from_bits(self.state.load(Ordering::Acquire))
    }

    /// Under the lock of `inner`.
    fn set_state(&self, state: LifecycleState) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// Goes forward to `next`; staying is allowed only in `Running`. Under the lock of `inner`.
    fn advance(&self, next: LifecycleState, operation: &'static str) -> Result<(), Error> {
        let state = self.state();
        if state < next || (state == next && next == LifecycleState::Running) {
            self.set_state(next);
            return Ok(());
        }
        Err(self.not_running(operation))
    }

    /// Makes the runtime `Running`; the first launch does so too. Does nothing if it is already.
    ///
    /// # Errors
    /// [`Error::InvalidLifecycle`] once it drains or has stopped.
    pub fn start(&self) -> Result<(), Error> {
        self.check_here("start")?;
        let _inner = self.inner.lock();
        self.advance(LifecycleState::Running, "start")
    }

    /// Refuses new launches and messages, and waits until active kernels have handled all that they had accepted, and what had been
    /// published to topics that they subscribe to, at most for `timeout`. Replies, and messages of topics, stay receivable. A drain cannot be undone; a second one waits again.
    ///
    /// # Errors
    /// [`Error::InvalidLifecycle`] unless the runtime is running or draining; [`Error::CalledFromHandler`] in a handler of one of its
    /// kernels, whose request would never be done meanwhile.
    pub fn drain(&self, timeout: Duration) -> Result<DrainReport, Error> {
        self.check_here("drain")?;
        let begin = Instant::now();
        let deadline = Deadline::after(timeout);
        self.check_none_here("drain")?;
        {
            let _inner = self.inner.lock();
            match self.state() {
                LifecycleState::Draining => {}
                LifecycleState::Running => self.set_state(LifecycleState::Draining),
                _ => return Err(self.not_running("drain")),
            }
        }
        // In this order, so that what a kernel has passed on is seen behind it.
        let kernels = pipeline::upstream_first(&self.kernels.load());
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
        self.check_here("shut down")?;
        self.check_none_here("shutdown")?;
        self.shut_down()
    }

    /// As `complete_shutdown`. A kernel whose handler the calling thread is in ends once that
    /// returns.
    fn shut_down(&self) -> Result<ShutdownReport, Error> {
        self.check_here("shut down")?;
        let _deferral = logging::defer();
        {
            let _inner = self.inner.lock();
            self.advance(LifecycleState::ShuttingDown, "shut down")?;
        }
        let kernels = pipeline::upstream_first(&self.kernels.load());
        // Not under the lock: status calls must not wait for a stuck handler.
        let mut errors = Vec::new();
        self.topics.close(&mut errors);
        for kernel in &kernels {
            match kernel.terminate() {
                Ok(()) => {}
                // Another thread has terminated it.
                Err(Error::InvalidTransition { .. }) => {}
                Err(Error::CalledFromHandler { .. }) => kernel.end_after_handler(),
                Err(error) => errors.push(error),
            }
        }
        drop(kernels);
        for bridge in self.bridges.load().values() {
            bridge.stop();
        }
        for instance in &*self.kernels.load() {
            // Of one that another thread terminates; not of one whose handler this is, which that
            // thread waits for.
            if !runs_here(&instance.signals) {
                drop(instance.control.lock());
            }
        }
        let mut inner = self.inner.lock();
        let forgotten = self.forget_ended(&mut inner);
        self.set_state(LifecycleState::Stopped);
        let mut report = std::mem::take(&mut inner.totals);
        let ended = std::mem::take(&mut inner.ended);
        report.kernels = inner.launches;
        drop(inner);
        // Where no lock is held: it may be what drops a kernel.
        drop(forgotten);
        for account in ended {
            account.report(&mut report);
        }
        report.uptime = self.built.elapsed();
        report.topics = self.topics.tally(&mut errors);
        report.errors = errors;
        logging::info!("runtime stopped after {:?}", report.uptime);
        Ok(report)
    }

    /// Forgets the kernels that have ended, but for their accounts.
    fn sweep(&self) {
        let mut inner = self.inner.lock();
        let forgotten = self.forget_ended(&mut inner);
        drop(inner);
        // Where no lock is held.
        drop(forgotten);
    }

    /// As `sweep`, for a getter: waits for nothing, and may leave it to the next one.
    fn try_sweep(&self) {
        let Some(mut inner) = self.inner.try_lock() else {
            return;
        };
        let forgotten = self.forget_ended(&mut inner);
        drop(inner);
        drop(forgotten);
    }

    /// Ends failed kernels that only this runtime refers to any more, if that takes no time, and
    /// forgets them: their memory, names and cores can be had again.
    fn reclaim(&self) {
        let _deferral = logging::defer();
        for instance in &*self.kernels.load() {
            // Another thread may still read an older list: the next look finds the kernel.
            if instance.state() == KernelState::Failed && Arc::strong_count(instance) == 1 {
                instance.end_if_finished();
            }
        }
        self.try_sweep();
    }

    /// Takes the kernels that have ended out of the list, and keeps their accounts. What it returns
    /// is to be dropped behind the lock: a kernel's end calls its driver, and frees what is its
    /// own.
    fn forget_ended(&self, inner: &mut Inner) -> Forgotten {
        // Only changed under this lock.
        let kernels = self.kernels.load();
        let before = inner.ended.len();
        for instance in &*kernels {
            let Some(account) = Ended::of(instance) else {
                continue;
            };
            if instance.has_failed() {
                let name = instance.signals.name.clone();
                inner.totals.failed_kernels.push(name);
            }
            inner.ended.push(account);
        }
        if inner.ended.len() > before {
            // One that ends meanwhile is still there, and is found by the next look.
            let known: Vec<_> = inner.ended[before..].iter().map(Ended::kernel).collect();
            self.kernels.update(|kernels| {
                let is_left = |kernel: &&Arc<_>| !known.contains(&Arc::as_ptr(kernel));
                (kernels.iter().filter(is_left).cloned().collect(), ())
            });
        }
        let Inner { ended, totals, .. } = inner;
        let closed: Vec<_> = ended
            .extract_if(.., |account| account.close(totals))
            .collect();
        Forgotten {
            _kernels: kernels,
            _closed: closed,
        }
    }
}

/// What is dropped behind the runtime's lock.
struct Forgotten {
    _kernels: Arc<Vec<Arc<KernelInstance>>>,
    _closed: Vec<Ended>,
}

/// The name of a kernel that is being launched.
struct ReservedName<'a> {
    runtime: &'a RingKernelRuntime,
    name: String,
}

impl Drop for ReservedName<'_> {
    fn drop(&mut self) {
        let mut inner = self.runtime.inner.lock();
        inner.names.retain(|name| *name != self.name);
    }
}

/// Makes a kernel's code ready on a device. What is wrong with it is an error of its launch.
fn prepare(device: &dyn Device, backend: BackendType, registration: &KernelRegistration) {
    if let Ok(handler) = launch::handler(backend, registration)
        && let Err(error) = device.prepare(registration.id(), &handler)
    {
        logging::debug!("kernel '{}' is not ready: {error}", registration.id());
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
    /// A name that no live kernel has.
    fn name_for(
        &self,
        id: &str,
        asked: Option<&str>,
        kernels: &[Arc<KernelInstance>],
    ) -> Result<String, Error> {
        let taken = |name: &str| {
            let names = kernels.iter().map(|instance| &instance.signals.name);
            names.chain(&self.names).any(|other| other == name)
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
}

impl Drop for RingKernelRuntime {
    fn drop(&mut self) {
        // In the child of a fork nothing is to be ended: it counts as stopped.
        if self.state() < LifecycleState::ShuttingDown
            && let Ok(report) = self.shut_down()
        {
            for error in report.errors {
                logging::warning!("shutdown: {error}");
            }
        }
        // What handlers captured may panic when it is dropped, and this may be the drop of an
        // unwinding thread.
        let registry = self.registry.load();
        self.registry.update(|_| (BTreeMap::new(), ()));
        for registration in Arc::unwrap_or_clone(registry).into_values() {
            let _ = foreign::contain(|| drop(registration));
        }
    }
}
