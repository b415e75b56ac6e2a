//! The Vulkan backend: a compute dispatch that stays resident by slices.
//!
//! A *slice* is one dispatch of a kernel's polling loop, bounded so that no driver's watchdog sees it. A command buffer
//! holds many slices in a row, two command buffers are always submitted, and a thread per queue (a [`lane`]) resubmits
//! them, asleep in the fence wait in between. Host and running slice exchange messages through mapped memory. A device
//! on which that does not work gets a dispatch for each batch of messages instead ([`relay`]).

mod clock;
mod context;
mod device;
#[cfg(feature = "glsl")]
mod glsl;
mod lane;
mod loader;
mod memory;
mod physical;
mod probe;
mod relay;
mod slice_kernel;
mod spirv;

pub(crate) use device::VulkanBackend;

use crate::error::Error;

fn unavailable(reason: impl Into<String>) -> Error {
    Error::BackendUnavailable {
        backend: super::BackendType::Vulkan.name(),
        reason: reason.into(),
    }
}
