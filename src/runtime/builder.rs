//! Building a runtime.

use super::config::RuntimeConfig;
use super::ring_kernel_runtime::RingKernelRuntime;
use crate::backend::BackendType;
use crate::error::Error;
use crate::kernel::KernelRegistration;

/// Collects what a runtime is built from. Nothing is checked or started before [`build`](Self::build).
///
/// ```
/// use ringkernel::{BackendType, KernelRegistration, RingKernelRuntime};
/// let runtime = RingKernelRuntime::builder()
///     .backend(BackendType::Cpu)
///     .development()
///     .register(KernelRegistration::new("nop").cpu_handler(|_, _| Ok(())))
///     .build()?;
/// assert!(runtime.registered().contains(&"nop".to_owned()));
/// # Ok::<(), ringkernel::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct RuntimeBuilder {
    backend: Option<BackendType>,
    device: DeviceChoice,
    config: RuntimeConfig,
    registrations: Vec<KernelRegistration>,
}

/// Which device launches use unless they name one.
#[derive(Clone, Debug, Default)]
pub(super) enum DeviceChoice {
    /// The backend's best.
    #[default]
    Best,
    Index(usize),
    /// The first whose name contains this.
    Name(String),
}

impl RingKernelRuntime {
    /// Starts to describe a runtime.
    pub fn builder() -> RuntimeBuilder {
        RuntimeBuilder::default()
    }
}

impl RuntimeBuilder {
    /// The backend to use. Without it, the best that this machine has: Vulkan if there is a hardware GPU that passes the
    /// probe (or a Vulkan device is asked for by name) and every registered kernel has code for it, else the CPU. CUDA must be
    /// asked for.
    pub fn backend(mut self, backend: BackendType) -> Self {
        self.backend = Some(backend);
        self
    }

    /// Index of the device that launches use unless they name one. Without index or name, the best: the first CPU
    /// device; of Vulkan devices the one that the environment variable `RINGKERNEL_VULKAN_DEVICE` names (index or part
    /// of the name), else the first discrete GPU that passes the probe, then the first integrated or virtual one. A software
    /// device is used only when asked for, because the CPU backend is faster.
    pub fn device(mut self, index: usize) -> Self {
        self.device = DeviceChoice::Index(index);
        self
    }

    /// The device that launches use unless they name one: the first whose name contains this, whatever the case.
    pub fn device_name(mut self, name: impl Into<String>) -> Self {
        self.device = DeviceChoice::Name(name.into());
        self
    }

    /// Replaces the whole configuration.
    pub fn config(mut self, config: RuntimeConfig) -> Self {
        self.config = config;
        self
    }

    /// [`RuntimeConfig::development`].
    pub fn development(self) -> Self {
        self.config(RuntimeConfig::development())
    }

    /// [`RuntimeConfig::production`].
    pub fn production(self) -> Self {
        self.config(RuntimeConfig::production())
    }

    /// [`RuntimeConfig::high_performance`].
    pub fn high_performance(self) -> Self {
        self.config(RuntimeConfig::high_performance())
    }

    /// Sets [`RuntimeConfig::cpu_devices`]; call it after any preset.
    pub fn cpu_devices(mut self, count: usize) -> Self {
        self.config.cpu_devices = count;
        self
    }

    /// Adds a kernel that only this runtime knows.
    pub fn register(mut self, registration: KernelRegistration) -> Self {
        self.registrations.push(registration);
        self
    }

    /// Builds the runtime. Blocks for some 10 ms the first time in a process, to calibrate the clock.
    ///
    /// The first one in a process puts a panic hook before the one that is set then, so that
    /// callers learn of a handler's panic before that one runs; it waits for hooks that run at that
    /// moment. A hook that is set later replaces both: set yours first.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] or [`Error::CoreNotFound`] for a bad configuration; [`Error::DuplicateKernel`];
    /// [`Error::DeviceNotFound`] or [`Error::DeviceNotNamed`]; [`Error::BackendUnavailable`] with the reason: no driver,
    /// say.
    pub fn build(self) -> Result<RingKernelRuntime, Error> {
        RingKernelRuntime::build(self.backend, self.device, self.config, self.registrations)
    }
}
