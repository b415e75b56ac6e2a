//! The runtime: devices, registered kernels, launched kernels, and one life.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::config::RuntimeConfig;
use super::handle::KernelHandle;
use super::instance::{ControlPlane, KernelInstance};
use super::launch;
use super::lifecycle::{DrainReport, LifecycleState, ShutdownReport};
use super::metrics::KernelStatus;
use crate::backend::cpu::CpuDevice;
use crate::backend::{BackendType, Device, DeviceInfo};
use crate::error::Error;
use crate::kernel::{Dim3, KernelRegistration, KernelState, LaunchOptions, registered_kernels};
use crate::thread::affinity;
use crate::time::{self, Deadline};

/// Most returned messages that a report holds; beyond that they are only counted.
const MAX_RETURNED: usize = 1 << 16;

/// Between two looks whether a drain is complete.
const DRAIN_INTERVAL: Duration = Duration::from_micros(200);

/// A runtime of persistent kernels on the devices of one backend.
///
/// Dropping it terminates its kernels and joins their threads, as [`complete_shutdown`](Self::complete_shutdown) does.
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
    devices: Vec<Arc<dyn Device>>,
    registry: Mutex<BTreeMap<String, KernelRegistration>>,
    built: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: LifecycleState,
    /// Launched and neither terminated nor reaped.
    kernels: Vec<Arc<KernelInstance>>,
    /// Launches so far, for names.
    launches: u64,
    /// Accounts of the kernels that have ended.
    totals: ShutdownReport,
}

impl fmt::Debug for RingKernelRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingKernelRuntime")
            .field("backend", &self.backend)
            .field("devices", &self.devices.len())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl RingKernelRuntime {
    pub(super) fn build(
        backend: Option<BackendType>,
        device: usize,
        config: RuntimeConfig,
        registrations: Vec<KernelRegistration>,
    ) -> Result<Self, Error> {
        config.validate()?;
        time::initialise();
        affinity::initialise();
        let mut registry = BTreeMap::new();
        for registration in registered_kernels().into_iter().chain(registrations) {
            add(&mut registry, registration)?;
        }
        let backend = backend.unwrap_or(BackendType::Cpu);
        let devices: Vec<Arc<dyn Device>> = match backend {
            BackendType::Cpu => CpuDevice::enumerate(
                config.cpu_devices,
                config.cpu_memory_limit,
                &config.reserved_cores,
            )
            .into_iter()
            .map(|info| Arc::new(CpuDevice::open(info)) as Arc<dyn Device>)
            .collect(),
        };
        let runtime = Self {
            backend,
            default_device: device,
            config,
            devices,
            registry: Mutex::new(registry),
            built: Instant::now(),
            inner: Mutex::new(Inner {
                state: LifecycleState::Initializing,
                kernels: Vec::new(),
                launches: 0,
                totals: ShutdownReport::default(),
            }),
        };
        runtime.device(device)?;
        log::debug!("runtime built: backend {backend}, device {device}");
        Ok(runtime)
    }

    fn device(&self, index: usize) -> Result<&Arc<dyn Device>, Error> {
        self.devices.get(index).ok_or(Error::DeviceNotFound {
            backend: self.backend.name(),
            index,
            available: self.devices.len(),
        })
    }

    /// The backend in use.
    #[must_use]
    pub fn backend(&self) -> BackendType {
        self.backend
    }

    /// The devices that kernels can be launched on.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceInfo> {
        self.devices
            .iter()
            .map(|device| device.info().clone())
            .collect()
    }

    /// Bytes that live kernels take on a device.
    ///
    /// # Errors
    /// [`Error::DeviceNotFound`].
    pub fn memory_in_use(&self, device: usize) -> Result<u64, Error> {
        Ok(self.device(device)?.memory_in_use())
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
        add(&mut self.registry.lock(), registration)
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
            grid.into(),
            block_size.into(),
            &options,
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

    /// Refuses new launches and messages, and waits until active kernels have handled all that they had accepted, at
    /// most for `timeout`. Replies stay receivable. A drain cannot be undone; a second one waits again.
    ///
    /// # Errors
    /// [`Error::InvalidLifecycle`] unless the runtime is running or draining.
    pub fn drain(&self, timeout: Duration) -> Result<DrainReport, Error> {
        let begin = Instant::now();
        let deadline = Deadline::after(timeout);
        let kernels = {
            let mut inner = self.inner.lock();
            if inner.state != LifecycleState::Draining {
                if inner.state != LifecycleState::Running {
                    return Err(Error::InvalidLifecycle {
                        state: inner.state.name(),
                        operation: "drain",
                    });
                }
                inner.advance(LifecycleState::Draining, "drain")?;
            }
            inner.kernels.clone()
        };
        for kernel in &kernels {
            kernel.signals.gate.set_draining();
        }
        let busy = || {
            kernels
                .iter()
                .any(|kernel| kernel.state() == KernelState::Active && kernel.queue_depth() > 0)
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

    /// Terminates all kernels, joins their threads, and closes the accounts. Without a drain before it, queued requests
    /// come back in the report. Blocks for `termination_timeout` at most for each kernel whose handler does not
    /// return; what goes wrong is in the report's `errors`.
    ///
    /// # Errors
    /// [`Error::InvalidLifecycle`] if the runtime has been shut down before.
    pub fn complete_shutdown(&self) -> Result<ShutdownReport, Error> {
        let kernels = {
            let mut inner = self.inner.lock();
            inner.advance(LifecycleState::ShuttingDown, "shut down")?;
            inner.kernels.clone()
        };
        // Not under the lock: status calls must not wait for a stuck handler.
        let mut errors = Vec::new();
        for kernel in &kernels {
            match kernel.terminate() {
                Ok(()) => {}
                // Somebody else has terminated it.
                Err(Error::InvalidTransition { .. }) => {}
                Err(error) => errors.push(error),
            }
        }
        drop(kernels);
        let mut inner = self.inner.lock();
        inner.book(|instance| Some(instance.control.lock()));
        inner.state = LifecycleState::Stopped;
        let mut report = std::mem::take(&mut inner.totals);
        report.kernels = inner.launches;
        report.uptime = self.built.elapsed();
        report.errors = errors;
        log::info!("runtime stopped after {:?}", report.uptime);
        Ok(report)
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

    /// Books the kernels that have ended into the totals, and forgets them. One that is being terminated right now is
    /// booked next time.
    fn sweep(&mut self) {
        self.book(|instance| instance.control.try_lock());
    }

    fn book(&mut self, lock: impl Fn(&KernelInstance) -> Option<MutexGuard<'_, ControlPlane>>) {
        let totals = &mut self.totals;
        self.kernels.retain(|instance| {
            let Some(mut control) = lock(instance) else {
                return true;
            };
            let Some(closing) = control.closing.take() else {
                return true;
            };
            if instance.state() == KernelState::Failed {
                totals.failed_kernels.push(instance.signals.name.clone());
            }
            totals.requests.merge(&closing.requests);
            totals.replies.merge(&instance.reply_tally());
            let room = MAX_RETURNED - totals.returned.len();
            totals
                .returned
                .extend(closing.returned.into_iter().take(room));
            false
        });
    }
}

impl Drop for RingKernelRuntime {
    fn drop(&mut self) {
        if self.state() < LifecycleState::ShuttingDown
            && let Ok(report) = self.complete_shutdown()
        {
            for error in report.errors {
                log::warn!("shutdown: {error}");
            }
        }
    }
}
