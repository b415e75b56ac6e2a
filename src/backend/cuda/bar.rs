//! The GPU's own memory where the host can write it: Vulkan takes it, maps it through a window of the bus (a BAR), and exports it
//! for CUDA. No kernel module is needed for that, unlike for GPUDirect RDMA.
//!
//! Knows nothing of this crate, so that a benchmark can include it.

use std::ffi::CStr;
use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use ash::{khr, vk};

const API_VERSION: u32 = vk::API_VERSION_1_1;

/// What CUDA imports.
const HANDLE: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD;

/// What the host writes and the GPU polls: the GPU's own memory, mapped, coherent.
const WANTED: vk::MemoryPropertyFlags = vk::MemoryPropertyFlags::from_raw(
    vk::MemoryPropertyFlags::DEVICE_LOCAL.as_raw()
        | vk::MemoryPropertyFlags::HOST_VISIBLE.as_raw()
        | vk::MemoryPropertyFlags::HOST_COHERENT.as_raw(),
);

const USAGE: vk::BufferUsageFlags = vk::BufferUsageFlags::STORAGE_BUFFER;

/// A Vulkan device that gives such memory.
pub struct Bar {
    external: khr::external_memory_fd::Device,
    device: ash::Device,
    instance: ash::Instance,
    memory_type: u32,
    /// Whether a piece of memory must belong to one buffer.
    dedicated: bool,
    /// Keeps the loader's library open.
    _entry: ash::Entry,
}

impl fmt::Debug for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bar")
            .field("dedicated", &self.dedicated)
            .finish_non_exhaustive()
    }
}

/// An instance, and then a device too, that are destroyed unless they are taken.
struct Opening {
    instance: Option<ash::Instance>,
    device: Option<ash::Device>,
}

impl Drop for Opening {
    fn drop(&mut self) {
        // SAFETY: made by `open`, and nothing of them is in use.
        unsafe {
            if let Some(device) = self.device.take() {
                device.destroy_device(None);
            }
            if let Some(instance) = self.instance.take() {
                instance.destroy_instance(None);
            }
        }
    }
}

impl Bar {
    /// Opens the Vulkan device of this UUID, or tells why it gives no such memory.
    pub fn open(uuid: [u8; 16]) -> Result<Arc<Self>, String> {
        // SAFETY: loading the system's Vulkan loader runs its initialisers.
        let entry =
            unsafe { ash::Entry::load() }.map_err(|error| format!("no Vulkan loader: {error}"))?;
        // SAFETY: the entry is loaded; the structures live until the call returns.
        let instance = unsafe {
            let version = entry.try_enumerate_instance_version().ok().flatten();
            if version.unwrap_or(vk::API_VERSION_1_0) < API_VERSION {
                return Err("the Vulkan loader is older than version 1.1".into());
            }
            let application = vk::ApplicationInfo::default().api_version(API_VERSION);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            entry.create_instance(&info, None)
        }
        .map_err(|error| format!("no Vulkan instance: {error}"))?;
        let mut opening = Opening {
            instance: Some(instance.clone()),
            device: None,
        };
        let physical = find(&instance, uuid)?;
        // SAFETY: the handle came from this instance; names and structures live until the call returns.
        let device = unsafe {
            let extensions = instance
                .enumerate_device_extension_properties(physical)
                .unwrap_or_default();
            let name: &CStr = khr::external_memory_fd::NAME;
            if !extensions
                .iter()
                .any(|extension| extension.extension_name_as_c_str() == Ok(name))
            {
                return Err("its Vulkan driver exports no memory".into());
            }
            let priorities = [0.0];
            let queue = [vk::DeviceQueueCreateInfo::default().queue_priorities(&priorities)];
            let names = [name.as_ptr()];
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queue)
                .enabled_extension_names(&names);
            instance.create_device(physical, &info, None)
        }
        .map_err(|error| format!("its Vulkan device cannot be opened: {error}"))?;
        opening.device = Some(device.clone());
        let mut exported = vk::ExternalBufferProperties::default();
        // SAFETY: the handle came from this instance.
        unsafe {
            let info = vk::PhysicalDeviceExternalBufferInfo::default()
                .usage(USAGE)
                .handle_type(HANDLE);
            instance.get_physical_device_external_buffer_properties(physical, &info, &mut exported);
        }
        let features = exported.external_memory_properties.external_memory_features;
        if !features.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE) {
            return Err("its Vulkan driver exports no buffers".into());
        }
        let mut ownership = vk::MemoryDedicatedRequirements::default();
        // SAFETY: the buffer is of this device, and destroyed once.
        let bits = unsafe {
            let buffer = make_buffer(&device, 4096).map_err(|error| error.to_string())?;
            let info = vk::BufferMemoryRequirementsInfo2::default().buffer(buffer);
            let mut needs = vk::MemoryRequirements2::default().push_next(&mut ownership);
            device.get_buffer_memory_requirements2(&info, &mut needs);
            let bits = needs.memory_requirements.memory_type_bits;
            device.destroy_buffer(buffer, None);
            bits
        };
        // SAFETY: the handle came from this instance.
        let types = unsafe { instance.get_physical_device_memory_properties(physical) };
        let found = types
            .memory_types_as_slice()
            .iter()
            .enumerate()
            .find(|(index, kind)| bits >> index & 1 != 0 && kind.property_flags.contains(WANTED));
        let Some((index, _)) = found else {
            return Err(
                "it has no memory of its own that the host can map and that can be exported".into(),
            );
        };
        opening.instance = None;
        opening.device = None;
        Ok(Arc::new(Self {
            external: khr::external_memory_fd::Device::new(&instance, &device),
            memory_type: index as u32,
            dedicated: features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY)
                || ownership.requires_dedicated_allocation == vk::TRUE,
            device,
            instance,
            _entry: entry,
        }))
    }

    /// Whether CUDA must be told that a piece belongs to one buffer.
    pub fn is_dedicated(&self) -> bool {
        self.dedicated
    }

    /// A piece of at least so many bytes, mapped, and the handle by which it is imported elsewhere.
    pub fn take(self: &Arc<Self>, bytes: u64) -> Result<(BarMemory, Exported), NotGiven> {
        let failed = |error: vk::Result| NotGiven {
            out_of_memory: matches!(
                error,
                vk::Result::ERROR_OUT_OF_DEVICE_MEMORY | vk::Result::ERROR_OUT_OF_HOST_MEMORY
            ),
            reason: format!("Vulkan gives no memory: {error}"),
        };
        // SAFETY: the device is live, and so is what each call uses; from `memory` on, dropping that undoes whatever was done.
        unsafe {
            let buffer = make_buffer(&self.device, bytes).map_err(failed)?;
            let mut memory = BarMemory {
                bar: Arc::clone(self),
                buffer,
                memory: vk::DeviceMemory::null(),
                start: NonNull::dangling(),
                bytes: 0,
            };
            let size = self.device.get_buffer_memory_requirements(buffer).size;
            let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(HANDLE);
            let mut dedicated = vk::MemoryDedicatedAllocateInfo::default().buffer(buffer);
            let mut info = vk::MemoryAllocateInfo::default()
                .allocation_size(size)
                .memory_type_index(self.memory_type)
                .push_next(&mut export);
            if self.dedicated {
                info = info.push_next(&mut dedicated);
            }
            memory.memory = self.device.allocate_memory(&info, None).map_err(failed)?;
            memory.bytes = size;
            self.device
                .bind_buffer_memory(buffer, memory.memory, 0)
                .map_err(failed)?;
            let start = self
                .device
                .map_memory(
                    memory.memory,
                    0,
                    vk::WHOLE_SIZE,
                    vk::MemoryMapFlags::empty(),
                )
                .map_err(failed)?;
            memory.start = NonNull::new(start.cast()).ok_or_else(|| NotGiven {
                out_of_memory: false,
                reason: "Vulkan maps nothing".into(),
            })?;
            let info = vk::MemoryGetFdInfoKHR::default()
                .memory(memory.memory)
                .handle_type(HANDLE);
            let fd = self.external.get_memory_fd(&info).map_err(failed)?;
            Ok((memory, Exported(OwnedFd::from_raw_fd(fd))))
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // SAFETY: every piece of memory holds this, so that none is left; both are destroyed once.
        unsafe {
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}

fn find(instance: &ash::Instance, uuid: [u8; 16]) -> Result<vk::PhysicalDevice, String> {
    // SAFETY: the instance is live.
    let all = unsafe { instance.enumerate_physical_devices() }
        .map_err(|error| format!("Vulkan lists no devices: {error}"))?;
    all.into_iter()
        .find(|physical| {
            let mut ids = vk::PhysicalDeviceIDProperties::default();
            let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut ids);
            // SAFETY: the handle came from this instance; the structure is of Vulkan 1.1, which only devices of that version fill.
            unsafe { instance.get_physical_device_properties2(*physical, &mut properties) };
            properties.properties.api_version >= API_VERSION && ids.device_uuid == uuid
        })
        .ok_or_else(|| "Vulkan does not know it".into())
}

/// # Safety
/// The device must be live.
unsafe fn make_buffer(device: &ash::Device, bytes: u64) -> Result<vk::Buffer, vk::Result> {
    let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(HANDLE);
    let info = vk::BufferCreateInfo::default()
        .size(bytes)
        .usage(USAGE)
        .push_next(&mut external);
    // SAFETY: the caller's promise; the structures live until the call returns.
    unsafe { device.create_buffer(&info, None) }
}

/// Why there is no piece.
#[derive(Debug)]
pub struct NotGiven {
    pub out_of_memory: bool,
    pub reason: String,
}

/// The handle of exported memory: a file descriptor, closed when dropped.
#[derive(Debug)]
pub struct Exported(OwnedFd);

impl Exported {
    pub fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Leaves it to whoever imported it.
    pub fn give_away(self) {
        let _ = self.0.into_raw_fd();
    }
}

/// A piece of such memory; given back when dropped.
pub struct BarMemory {
    bar: Arc<Bar>,
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    start: NonNull<u8>,
    bytes: u64,
}

// SAFETY: Vulkan's handles may be used by any thread; the memory is what its user makes of it.
unsafe impl Send for BarMemory {}
// SAFETY: as above.
unsafe impl Sync for BarMemory {}

impl fmt::Debug for BarMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BarMemory")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl BarMemory {
    /// Where the host sees it.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// The whole of it, as whoever imports it must say.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for BarMemory {
    fn drop(&mut self) {
        // SAFETY: both are this device's, and destroyed once, which unmaps the memory; null is allowed.
        unsafe {
            self.bar.device.destroy_buffer(self.buffer, None);
            self.bar.device.free_memory(self.memory, None);
        }
    }
}
