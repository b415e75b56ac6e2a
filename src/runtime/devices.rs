//! The devices of a runtime, each opened when it is first used.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use super::builder::DeviceChoice;
use super::config::RuntimeConfig;
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, BackendType, Device, DeviceInfo, ExecutionMode};
use crate::error::Error;
use crate::logging;
use crate::process::InChild;

/// Names the Vulkan device to use, by index or part of its name, where the program does not.
const DEVICE_VARIABLE: &str = "RINGKERNEL_VULKAN_DEVICE";

/// How long a thread waits for another one that opens the device.
const OPENING_TIMEOUT: Duration = Duration::from_secs(30);

/// The backend's devices.
#[derive(Debug)]
pub(super) struct Devices {
    backend: Box<dyn Backend>,
    described: Vec<DeviceInfo>,
    /// One a device.
    places: Box<[Place]>,
    huge_pages: bool,
}

impl InChild for Devices {
    // Registered so that no device is closed there.
    fn close_in_child(&self) {}
}

/// Where a device is kept. No lock is needed to look at one that is open.
#[derive(Debug, Default)]
struct Place {
    device: OnceLock<Arc<dyn Device>>,
    /// Held while the device is opened.
    opening: Mutex<()>,
    /// Whether the code of registered kernels was made ready on it.
    is_prepared: AtomicBool,
}

impl Devices {
    pub(super) fn new(backend: BackendType, config: &RuntimeConfig) -> Result<Self, Error> {
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
        let described = backend.devices();
        Ok(Self {
            places: described.iter().map(|_| Place::default()).collect(),
            described,
            backend,
            huge_pages: config.huge_pages,
        })
    }

    /// The best backend: Vulkan, if it has hardware that keeps kernels resident and all kernels
    /// have code for it. CUDA and Metal are for those who ask for them, until they have been seen
    /// to work on a GPU.
    pub(super) fn best(
        config: &RuntimeConfig,
        choice: &DeviceChoice,
        runs_on: impl Fn(BackendType) -> bool,
    ) -> Result<(BackendType, Self, usize), Error> {
        if runs_on(BackendType::Vulkan) {
            match Self::good(BackendType::Vulkan, config, choice) {
                Ok(Some((devices, index))) => return Ok((BackendType::Vulkan, devices, index)),
                Ok(None) => {
                    logging::debug!("no Vulkan device keeps kernels resident without taking cores");
                }
                Err(error) => logging::debug!("not chosen: {error}"),
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

    /// Where a device is kept once it is open.
    fn place(&self, backend: BackendType, index: usize) -> Result<&Place, Error> {
        self.places.get(index).ok_or_else(|| Error::DeviceNotFound {
            backend: backend.name(),
            index,
            available: self.described.len(),
        })
    }

    /// A device if it is open already.
    pub(super) fn opened(
        &self,
        backend: BackendType,
        index: usize,
    ) -> Result<Option<&Arc<dyn Device>>, Error> {
        Ok(self.place(backend, index)?.device.get())
    }

    /// How many devices there are.
    pub(super) fn count(&self) -> usize {
        self.described.len()
    }

    /// All devices that are open.
    pub(super) fn all_open(&self) -> impl Iterator<Item = &Arc<dyn Device>> {
        self.places.iter().filter_map(|place| place.device.get())
    }

    /// A device, opened if it is not yet.
    pub(super) fn get(&self, backend: BackendType, index: usize) -> Result<Arc<dyn Device>, Error> {
        let place = self.place(backend, index)?;
        if let Some(device) = place.device.get() {
            return Ok(Arc::clone(device));
        }
        // Before the lock: what drivers say of the device is logged behind it.
        let _deferral = logging::defer();
        let Some(_one) = place.opening.try_lock_for(OPENING_TIMEOUT) else {
            return Err(Error::DeviceBusy {
                device: self.name(index),
                reason: format!("another thread has been opening it for {OPENING_TIMEOUT:?}"),
            });
        };
        if let Some(device) = place.device.get() {
            return Ok(Arc::clone(device));
        }
        let device = self.backend.open(index)?;
        device.account().use_huge_pages(self.huge_pages);
        // Nothing else sets it: the lock is held.
        let _ = place.device.set(Arc::clone(&device));
        Ok(device)
    }

    fn name(&self, index: usize) -> String {
        let described = self.described.get(index);
        described.map_or_else(String::new, |info| info.name.clone())
    }

    /// How each device is described; by itself if it is open.
    pub(super) fn describe(&self) -> Vec<DeviceInfo> {
        self.described
            .iter()
            .zip(&self.places)
            .map(|(described, place)| match place.device.get() {
                Some(device) => device.info().clone(),
                None => described.clone(),
            })
            .collect()
    }

    /// Whether the code of registered kernels has yet to be made ready on a device; true once.
    pub(super) fn begin_preparing(&self, index: usize) -> bool {
        let place = self.places.get(index);
        place.is_some_and(|place| !place.is_prepared.swap(true, Ordering::AcqRel))
    }

    /// The index of the device that is meant.
    pub(super) fn choose(
        &self,
        backend: BackendType,
        choice: &DeviceChoice,
    ) -> Result<usize, Error> {
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

    /// The first hardware device that keeps kernels resident; the first that runs them at all if
    /// none does.
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

/// Whether a running dispatch of the device sees messages.
fn is_resident(device: &dyn Device) -> bool {
    match &device.info().vulkan {
        Some(vulkan) => vulkan.mode == ExecutionMode::Resident,
        None => true,
    }
}
