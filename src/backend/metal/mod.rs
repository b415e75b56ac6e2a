//! The Metal backend: slices in command buffers, one more committed than runs.
//!
//! Host and kernel exchange messages through buffers in shared storage, which the running slice polls. Command buffers are used once,
//! and the system ends those that run for seconds: a thread a device ([`bridge`]) commits the next one whenever one is done. The
//! framework itself is behind [`api`], so that everything else is tested where there is no Mac.

mod api;
mod bridge;
mod device;
#[cfg(all(test, target_os = "linux", not(loom)))]
#[allow(clippy::unwrap_used)]
mod fake;
#[cfg(any(target_os = "macos", ringkernel_check_metal))]
mod objc;
mod slice_kernel;
#[cfg(all(test, target_os = "linux", not(loom)))]
#[allow(clippy::unwrap_used)]
mod tests;

use std::sync::Arc;

pub(crate) use device::MetalBackend;

use crate::error::Error;

fn unavailable(reason: impl Into<String>) -> Error {
    Error::BackendUnavailable {
        backend: super::BackendType::Metal.name(),
        reason: reason.into(),
    }
}

/// Every device of the system.
fn gpus() -> Result<Vec<Arc<dyn api::Gpu>>, Error> {
    #[cfg(any(target_os = "macos", ringkernel_check_metal))]
    let gpus = objc::gpus();
    #[cfg(all(
        test,
        target_os = "linux",
        not(loom),
        not(any(target_os = "macos", ringkernel_check_metal))
    ))]
    let gpus = fake::gpus();
    #[cfg(not(any(
        target_os = "macos",
        ringkernel_check_metal,
        all(test, target_os = "linux", not(loom))
    )))]
    let gpus = Vec::new();
    if gpus.is_empty() {
        return Err(unavailable(if cfg!(target_os = "macos") {
            "Metal has no device"
        } else {
            "Metal is there on macOS only"
        }));
    }
    Ok(gpus)
}
