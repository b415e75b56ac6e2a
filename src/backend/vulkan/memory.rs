//! Buffers that shaders see.

use std::any::Any;
use std::ffi::CString;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use ash::vk;
use ash::vk::Handle;
use gpu_allocator::vulkan::{Allocation, AllocationCreateDesc, AllocationScheme};
use gpu_allocator::{AllocationError, MemoryLocation};

use super::context::Context;
use crate::backend::{DeviceKind, DeviceMemory, MemoryPlacement, Placement};
use crate::error::Error;
use crate::logging;
use crate::ring::WriteCombining;
use crate::system::memory::ask;

/// A buffer with memory of its own, mapped for as long as it lives if the host can reach it.
pub(super) struct Buffer {
    context: Arc<Context>,
    raw: vk::Buffer,
    bytes: u64,
    allocation: Option<Allocation>,
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("bytes", &self.bytes)
            .field("properties", &self.properties())
            .finish_non_exhaustive()
    }
}

impl Buffer {
    /// A buffer for shaders and transfers; zeroed if the host can reach it.
    pub(super) fn new(
        context: &Arc<Context>,
        name: &str,
        bytes: usize,
        location: MemoryLocation,
    ) -> Result<Self, Error> {
        let asked = bytes as u64;
        if asked > context.physical.max_buffer_bytes {
            return Err(Error::OutOfMemory {
                device: context.name().to_owned(),
                asked,
                available: context.physical.max_buffer_bytes,
            });
        }
        // Of a device without memory of its own the host's is taken.
        let _grant = match context.physical.info.kind {
            DeviceKind::SoftwareGpu | DeviceKind::IntegratedGpu => {
                Some(ask(asked).map_err(|available| Error::OutOfMemory {
                    device: context.name().to_owned(),
                    asked,
                    available,
                })?)
            }
            _ => None,
        };
        if !context.account.take(asked) {
            return Err(context.out_of_memory(asked));
        }
        let info = vk::BufferCreateInfo::default()
            .size(asked.max(4))
            .usage(
                vk::BufferUsageFlags::STORAGE_BUFFER
                    | vk::BufferUsageFlags::TRANSFER_SRC
                    | vk::BufferUsageFlags::TRANSFER_DST,
            )
            .sharing_mode(vk::SharingMode::EXCLUSIVE);
        // From here on, dropping `buffer` undoes whatever was done.
        let mut buffer = Self {
            context: Arc::clone(context),
            raw: vk::Buffer::null(),
            bytes: asked,
            allocation: None,
        };
        // SAFETY: the device is live; a size of zero was excluded.
        buffer.raw = context.check("create a buffer", unsafe {
            context.raw.create_buffer(&info, None)
        })?;
        context.set_name(buffer.raw, name);
        // SAFETY: the buffer was just created by this device.
        let requirements = unsafe { context.raw.get_buffer_memory_requirements(buffer.raw) };
        let allocated = context
            .allocator
            .lock()
            .as_mut()
            .map(|allocator| {
                allocator.allocate(&AllocationCreateDesc {
                    name,
                    requirements,
                    location,
                    linear: true,
                    // Its own memory object: exact accounts, and everything is given back at once.
                    allocation_scheme: AllocationScheme::DedicatedBuffer(buffer.raw),
                })
            })
            .unwrap_or(Err(AllocationError::OutOfMemory));
        let allocation = match allocated {
            Ok(allocation) => allocation,
            Err(AllocationError::OutOfMemory) => return Err(context.out_of_memory(asked)),
            Err(error) => {
                logging::warning!("device '{}': {error}", context.name());
                return Err(context.out_of_memory(asked));
            }
        };
        let (memory, offset) = {
            // SAFETY: the memory handle is only used to bind the buffer, and lives as long as the allocation.
            let memory = unsafe { allocation.memory() };
            (memory, allocation.offset())
        };
        buffer.allocation = Some(allocation);
        // SAFETY: memory and offset were made for this buffer's requirements, and nothing is bound to it yet.
        context.check("bind a buffer", unsafe {
            context.raw.bind_buffer_memory(buffer.raw, memory, offset)
        })?;
        if let Some(start) = buffer.mapped() {
            // SAFETY: the mapping covers the buffer's bytes, and nobody else knows of it yet.
            unsafe { start.write_bytes(0, bytes) };
        }
        Ok(buffer)
    }

    /// Where kernel memory of a placement is best, on this device.
    pub(super) fn location(placement: Placement) -> MemoryLocation {
        match placement {
            // Prefers memory of the device that the host can map (ReBAR).
            Placement::HostToDevice => MemoryLocation::CpuToGpu,
            // Prefers memory that the host's caches hold.
            Placement::DeviceToHost => MemoryLocation::GpuToCpu,
            Placement::DeviceState => MemoryLocation::GpuOnly,
        }
    }

    pub(super) fn raw(&self) -> vk::Buffer {
        self.raw
    }

    pub(super) fn mapped(&self) -> Option<NonNull<u8>> {
        self.allocation
            .as_ref()
            .and_then(Allocation::mapped_ptr)
            .map(NonNull::cast)
    }

    fn properties(&self) -> vk::MemoryPropertyFlags {
        self.allocation
            .as_ref()
            .map(Allocation::memory_properties)
            .unwrap_or_default()
    }

    /// Where the buffer's memory lies.
    pub(super) fn placement(&self, purpose: &'static str) -> MemoryPlacement {
        let properties = self.properties();
        MemoryPlacement {
            purpose,
            device_local: properties.contains(vk::MemoryPropertyFlags::DEVICE_LOCAL),
            host_visible: properties.contains(vk::MemoryPropertyFlags::HOST_VISIBLE),
            host_cached: properties.contains(vk::MemoryPropertyFlags::HOST_CACHED),
        }
    }
}

impl DeviceMemory for Buffer {
    fn host_ptr(&self) -> Option<NonNull<u8>> {
        self.mapped()
    }

    fn write_combining(&self) -> WriteCombining {
        if self
            .properties()
            .contains(vk::MemoryPropertyFlags::HOST_CACHED)
        {
            WriteCombining::No
        } else {
            WriteCombining::Yes
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let _deferral = logging::defer();
        self.context.account.give_back(self.bytes);
        if self.context.is_abandoned() {
            // A dispatch that never ended may still use it.
            std::mem::forget(self.allocation.take());
            return;
        }
        // SAFETY: whoever submitted work with this buffer held it until that work was done; destroyed once. Null is
        // allowed.
        unsafe { self.context.raw.destroy_buffer(self.raw, None) };
        if let Some(allocation) = self.allocation.take()
            && let Some(allocator) = self.context.allocator.lock().as_mut()
            && let Err(error) = allocator.free(allocation)
        {
            logging::warning!("device '{}': {error}", self.context.name());
        }
    }
}

/// Gives Vulkan objects names that the validation layer and debuggers show.
impl Context {
    pub(super) fn set_name<H: Handle>(&self, handle: H, name: &str) {
        let (Some(names), Ok(text)) = (&self.names, CString::new(name)) else {
            return;
        };
        let info = vk::DebugUtilsObjectNameInfoEXT::default()
            .object_handle(handle)
            .object_name(&text);
        // SAFETY: the handle is one of this device's live objects. A name that is refused is no loss.
        let _ = unsafe { names.set_debug_utils_object_name(&info) };
    }
}
