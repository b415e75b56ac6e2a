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
    device: usize,
    config: RuntimeConfig,
    registrations: Vec<KernelRegistration>,
}

impl RingKernelRuntime {
    /// Starts to describe a runtime.
    pub fn builder() -> RuntimeBuilder {
        RuntimeBuilder::default()
    }
}

impl RuntimeBuilder {
    /// The backend to use. Without it, the best that this machine has.
    pub fn backend(mut self, backend: BackendType) -> Self {
        self.backend = Some(backend);
        self
    }

    /// Index of the device that launches use unless they name one. Default 0.
    pub fn device(mut self, index: usize) -> Self {
        self.device = index;
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
    /// # Errors
    /// [`Error::InvalidOption`] or [`Error::CoreNotFound`] for a bad configuration; [`Error::DuplicateKernel`];
    /// [`Error::DeviceNotFound`]; [`Error::BackendUnavailable`].
    pub fn build(self) -> Result<RingKernelRuntime, Error> {
        RingKernelRuntime::build(self.backend, self.device, self.config, self.registrations)
    }
}
