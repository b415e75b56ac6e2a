//! The devices that an instance knows, before any is opened.

use ash::{ext, vk};

use super::loader::{API_VERSION, Instance};
use super::unavailable;
use crate::backend::{
    BackendType, DeviceInfo, DeviceKind, ExecutionMode, MemoryHeap, QueueFamily, VulkanConfig,
    VulkanDeviceInfo,
};
use crate::error::Error;

/// Most queues that are used of a device: each has a thread.
const MAX_QUEUES: u32 = 8;

/// What only some devices have, and only some handlers use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Features {
    pub(super) int64: bool,
    pub(super) float64: bool,
    /// Clocks that shaders can read: one of the whole device, and one of where they run.
    pub(super) device_clock: bool,
    pub(super) subgroup_clock: bool,
}

/// A device that can be opened.
#[derive(Clone, Debug)]
pub(super) struct Physical {
    pub(super) handle: vk::PhysicalDevice,
    pub(super) info: DeviceInfo,
    /// The queue family that kernels run on, and how many of its queues are used.
    pub(super) family: u32,
    pub(super) queues: u32,
    pub(super) max_block_threads: u32,
    pub(super) max_blocks: u32,
    pub(super) max_buffer_bytes: u64,
    /// Invocations of a subgroup.
    pub(super) subgroup_size: u32,
    /// Whether shaders run on this machine's CPU, whatever kind the driver claims: loops are cut short, and a subgroup is one
    /// thread.
    pub(super) software: bool,
    /// What handlers may use.
    pub(super) features: Features,
    /// Whether the driver tells the clock of the device's timestamps.
    pub(super) tells_clock: bool,
    /// What the shaders need and the device lacks, if anything.
    pub(super) lacks: Option<String>,
    /// Whether the driver demands that the subset of Vulkan it lacks is acknowledged.
    pub(super) portability_subset: bool,
}

/// Every device with a compute queue, sorted by kind.
pub(super) fn enumerate(
    instance: &Instance,
    config: &VulkanConfig,
) -> Result<Vec<Physical>, Error> {
    // SAFETY: the instance is live.
    let handles = unsafe { instance.raw().enumerate_physical_devices() }
        .map_err(|error| unavailable(format!("the drivers list no devices: {error}")))?;
    let mut devices: Vec<Physical> = handles
        .into_iter()
        .filter_map(|handle| describe(instance, handle, config))
        .collect();
    if devices.is_empty() {
        return Err(unavailable("no driver has a device with a compute queue"));
    }
    devices.sort_by_key(|device| device.info.kind);
    for (index, device) in devices.iter_mut().enumerate() {
        device.info.index = index;
    }
    Ok(devices)
}

fn describe(
    instance: &Instance,
    handle: vk::PhysicalDevice,
    config: &VulkanConfig,
) -> Option<Physical> {
    let raw = instance.raw();
    // SAFETY: the handle came from this instance.
    let extensions = unsafe { raw.enumerate_device_extension_properties(handle) }.ok()?;
    let has = |name: &std::ffi::CStr| {
        extensions
            .iter()
            .any(|extension| extension.extension_name_as_c_str() == Ok(name))
    };
    let mut driver = vk::PhysicalDeviceDriverProperties::default();
    let mut pci = vk::PhysicalDevicePCIBusInfoPropertiesEXT::default();
    let mut subgroups = vk::PhysicalDeviceSubgroupProperties::default();
    let mut properties = vk::PhysicalDeviceProperties2::default();
    let has_driver = has(ash::khr::driver_properties::NAME);
    let has_pci = has(ext::pci_bus_info::NAME);
    if has_driver {
        properties = properties.push_next(&mut driver);
    }
    if has_pci {
        properties = properties.push_next(&mut pci);
    }
    // SAFETY: the handle came from this instance.
    let version = unsafe { raw.get_physical_device_properties(handle) }.api_version;
    if version >= API_VERSION {
        properties = properties.push_next(&mut subgroups);
    }
    // SAFETY: the handle came from this instance; the chain holds only structures that the device's version or extensions
    // have.
    unsafe { raw.get_physical_device_properties2(handle, &mut properties) };
    let core = properties.properties;
    // SAFETY: the handle came from this instance.
    let (families, memory) = unsafe {
        (
            raw.get_physical_device_queue_family_properties(handle),
            raw.get_physical_device_memory_properties(handle),
        )
    };
    // A family without graphics leaves the desktop alone.
    let family = families
        .iter()
        .enumerate()
        .filter(|(_, family)| family.queue_flags.contains(vk::QueueFlags::COMPUTE))
        .min_by_key(|(_, family)| family.queue_flags.contains(vk::QueueFlags::GRAPHICS))?;
    let kind = match core.device_type {
        vk::PhysicalDeviceType::DISCRETE_GPU => DeviceKind::DiscreteGpu,
        vk::PhysicalDeviceType::INTEGRATED_GPU => DeviceKind::IntegratedGpu,
        vk::PhysicalDeviceType::VIRTUAL_GPU => DeviceKind::VirtualGpu,
        vk::PhysicalDeviceType::CPU => DeviceKind::SoftwareGpu,
        _ => DeviceKind::Other,
    };
    // SAFETY: the handle came from this instance.
    let features = unsafe { raw.get_physical_device_features(handle) };
    let mut clocks = vk::PhysicalDeviceShaderClockFeaturesKHR::default();
    if version >= API_VERSION && has(ash::khr::shader_clock::NAME) {
        let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut clocks);
        // SAFETY: the handle came from this instance; the device has the extension whose structure is in the chain.
        unsafe { raw.get_physical_device_features2(handle, &mut features) };
    }
    let tells_clock = has(ext::calibrated_timestamps::NAME) && {
        let calibrated = ext::calibrated_timestamps::Instance::new(instance.entry(), raw);
        // SAFETY: the handle came from this instance; the device has the extension.
        unsafe { calibrated.get_physical_device_calibrateable_time_domains(handle) }
            .is_ok_and(|domains| domains.contains(&vk::TimeDomainKHR::DEVICE))
    };
    let software = kind == DeviceKind::SoftwareGpu
        || matches!(
            driver.driver_id,
            vk::DriverId::MESA_LLVMPIPE | vk::DriverId::GOOGLE_SWIFTSHADER
        );
    let heaps: Vec<MemoryHeap> = memory
        .memory_heaps_as_slice()
        .iter()
        .enumerate()
        .map(|(index, heap)| MemoryHeap {
            bytes: heap.size,
            device_local: heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL),
            host_visible: memory.memory_types_as_slice().iter().any(|memory_type| {
                memory_type.heap_index as usize == index
                    && memory_type
                        .property_flags
                        .contains(vk::MemoryPropertyFlags::HOST_VISIBLE)
            }),
        })
        .collect();
    let text = |text: Result<&std::ffi::CStr, _>| {
        text.map_or_else(
            |_| String::new(),
            |text| text.to_string_lossy().into_owned(),
        )
    };
    let pci_address = has_pci.then(|| {
        format!(
            "{:04x}:{:02x}:{:02x}.{:x}",
            pci.pci_domain, pci.pci_bus, pci.pci_device, pci.pci_function
        )
    });
    let driver = if has_driver {
        let name = text(driver.driver_name_as_c_str());
        let version = text(driver.driver_info_as_c_str());
        format!("{name} {version}").trim().to_owned()
    } else {
        format!("{:#x}", core.driver_version)
    };
    let limits = core.limits;
    let max_block_threads = limits
        .max_compute_work_group_invocations
        .min(limits.max_compute_work_group_size[0]);
    let max_buffer_bytes = u64::from(limits.max_storage_buffer_range);
    Some(Physical {
        handle,
        family: family.0 as u32,
        queues: family.1.queue_count.min(MAX_QUEUES),
        max_block_threads,
        max_blocks: limits.max_compute_work_group_count[0],
        max_buffer_bytes,
        subgroup_size: subgroups.subgroup_size,
        software,
        features: Features {
            int64: features.shader_int64 != vk::FALSE,
            float64: features.shader_float64 != vk::FALSE,
            device_clock: clocks.shader_device_clock != vk::FALSE,
            subgroup_clock: clocks.shader_subgroup_clock != vk::FALSE,
        },
        tells_clock,
        lacks: lacks(core.api_version, &subgroups),
        portability_subset: has(ash::khr::portability_subset::NAME),
        info: DeviceInfo {
            backend: BackendType::Vulkan,
            index: 0,
            name: text(core.device_name_as_c_str()),
            kind,
            memory_limit: config
                .memory_limit
                .unwrap_or_else(|| heaps.iter().map(|heap| heap.bytes).sum()),
            cores: Vec::new(),
            vulkan: Some(VulkanDeviceInfo {
                driver,
                api_version: (
                    vk::api_version_major(core.api_version),
                    vk::api_version_minor(core.api_version),
                    vk::api_version_patch(core.api_version),
                ),
                numa_node: pci_address
                    .as_deref()
                    .and_then(crate::backend::info::numa_node),
                pci_address,
                heaps,
                queue_families: families
                    .iter()
                    .map(|family| QueueFamily {
                        queues: family.queue_count,
                        compute: family.queue_flags.contains(vk::QueueFlags::COMPUTE),
                        graphics: family.queue_flags.contains(vk::QueueFlags::GRAPHICS),
                    })
                    .collect(),
                max_block_threads,
                max_blocks: limits.max_compute_work_group_count[0],
                max_buffer_bytes,
                mode: ExecutionMode::Unknown,
                mode_reason: "not opened yet".into(),
                placements: Vec::new(),
            }),
            cuda: None,
            metal: None,
        },
    })
}

/// What the shaders need and a device lacks, if anything.
fn lacks(version: u32, subgroups: &vk::PhysicalDeviceSubgroupProperties<'_>) -> Option<String> {
    let operations = vk::SubgroupFeatureFlags::BASIC | vk::SubgroupFeatureFlags::SHUFFLE;
    if version < API_VERSION {
        return Some("it is older than Vulkan 1.1".into());
    }
    if !subgroups
        .supported_stages
        .contains(vk::ShaderStageFlags::COMPUTE)
        || !subgroups.supported_operations.contains(operations)
    {
        return Some("its compute shaders have no subgroup shuffle".into());
    }
    // A request's header is read by four invocations at once.
    (subgroups.subgroup_size < 4)
        .then(|| format!("its subgroups have {}, not 4", subgroups.subgroup_size))
}
