//! The CUDA backend: one launch a kernel, which stays until it is told to end.
//!
//! Host and kernel exchange messages through pinned host memory that the device maps, or the device's own that the host maps;
//! commands are stores to it as well, never CUDA calls. Memory and streams are taken before the first kernel runs, because many
//! CUDA calls wait for running kernels. A thread a device ([`monitor`]) looks whether its kernels still run; it is not on the path
//! of a message. Devices whose driver ends long kernels (a watchdog) get bounded launches instead, one more queued than running.

mod arena;
#[cfg(all(feature = "vulkan", unix))]
mod bar;
#[cfg(not(all(feature = "vulkan", unix)))]
#[path = "no_bar.rs"]
mod bar;
mod context;
mod current;
mod device;
mod driver;
mod launched;
mod module;
mod monitor;
mod nvrtc;
mod physical;
mod residents;

pub(crate) use device::CudaBackend;

use crate::error::Error;

fn unavailable(reason: impl Into<String>) -> Error {
    Error::BackendUnavailable {
        backend: super::BackendType::Cuda.name(),
        reason: reason.into(),
    }
}
