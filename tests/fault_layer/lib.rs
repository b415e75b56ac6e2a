//! A Vulkan layer that makes calls fail on demand, between the loader and whatever driver there is. Loaded only by
//! `tests/vulkan_faults.rs`, which says what is to fail by the two functions at the end: faults strike once in a while, claims hold for whatever is opened while they are made.
//!
//! The loader's interface: "Architecture of the Vulkan Loader Interfaces", Loader and Layer Interface, version 2.

#![allow(missing_docs)]

use std::ffi::{CStr, c_char, c_void};
use std::mem::transmute;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use ash::vk;
use ash::vk::Handle;

/// Nothing fails.
pub const NONE: u32 = 0;
/// `vkQueueSubmit` says that the device is lost, and so does everything else of that device from then on.
pub const LOSE_AT_SUBMIT: u32 = 1;
/// The same from `vkWaitForFences` on.
pub const LOSE_AT_WAIT: u32 = 2;
/// Fences of the device never signal.
pub const HANG: u32 = 3;
/// `vkAllocateMemory` has none.
pub const NO_MEMORY: u32 = 4;
/// `vkEnumeratePhysicalDevices` finds none.
pub const NO_DEVICES: u32 = 5;
/// `vkEnumeratePhysicalDevices` fails.
pub const NO_DRIVER: u32 = 6;
/// `vkCreateDevice` fails.
pub const NO_DEVICE: u32 = 7;
/// `vkCreateComputePipelines` has no memory.
pub const NO_PIPELINE: u32 = 8;
/// `vkQueueSubmit` has no memory, once.
pub const NO_SUBMISSION: u32 = 9;

/// Devices say that they are discrete GPUs.
pub const CLAIM_DISCRETE: u32 = 1;
/// No memory is cached by the host.
pub const CLAIM_UNCACHED: u32 = 2;
/// Host and device see each other's writes only at submissions and fences, which is all that the specification promises.
pub const CLAIM_BATCHED: u32 = 4;
/// Shaders have no clock of the device.
pub const CLAIM_NO_CLOCK: u32 = 8;
/// The driver's stamps are those of another clock, an hour ahead of the shaders' and its low word as well.
pub const CLAIM_OTHER_CLOCK: u32 = 16;

static FAULT: AtomicU32 = AtomicU32::new(NONE);
/// Matching calls that still succeed.
static AFTER: AtomicI64 = AtomicI64::new(0);
/// The device that was made last: faults of devices strike this one, when they strike.
static LATEST: AtomicU64 = AtomicU64::new(0);
/// The device that was lost, or hangs.
static VICTIM: AtomicU64 = AtomicU64::new(0);

/// What devices claim to be, or are made to be.
static CLAIMS: AtomicU32 = AtomicU32::new(0);

fn claims(claim: u32) -> bool {
    CLAIMS.load(Ordering::SeqCst) & claim != 0
}

/// Mapped memory of a device that works by batches: what the host sees, what the device sees, and what both saw last.
struct Mapping {
    device: vk::Device,
    memory: vk::DeviceMemory,
    host: Vec<Line>,
    real: usize,
    base: Vec<u32>,
}

/// Aligned as a driver's mapping is.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Line([u32; 32]);

/// Bytes of each piece of memory, the latest last: a driver may use a handle again.
static SIZES: Mutex<Vec<(vk::DeviceMemory, u64)>> = Mutex::new(Vec::new());
static MAPPINGS: Mutex<Vec<Mapping>> = Mutex::new(Vec::new());

impl Mapping {
    /// Shows each side what the other wrote since last time: whole words, each of which has one writer.
    fn exchange(&mut self, to_device: bool) {
        let host = self.host.as_mut_ptr().cast::<u32>();
        for (index, base) in self.base.iter_mut().enumerate() {
            // SAFETY: both sides have as many words as `base`; the other sides write whole words as well.
            unsafe {
                let host = AtomicU32::from_ptr(host.add(index));
                let real = AtomicU32::from_ptr((self.real as *mut u32).add(index));
                let (from, to) = if to_device {
                    (host, real)
                } else {
                    (real, host)
                };
                let value = from.load(Ordering::Acquire);
                if value != *base {
                    *base = value;
                    to.store(value, Ordering::Release);
                }
            }
        }
    }
}

fn exchange(device: vk::Device, to_device: bool) {
    if claims(CLAIM_BATCHED) {
        for mapping in MAPPINGS.lock().unwrap().iter_mut() {
            if mapping.device == device {
                mapping.exchange(to_device);
            }
        }
    }
}

/// The next element of the chain, for one instance.
#[derive(Clone, Copy)]
struct NextOfInstance {
    get: vk::PFN_vkGetInstanceProcAddr,
    destroy: vk::PFN_vkDestroyInstance,
    enumerate_physical_devices: vk::PFN_vkEnumeratePhysicalDevices,
    create_device: vk::PFN_vkCreateDevice,
    properties: vk::PFN_vkGetPhysicalDeviceProperties2,
    features: vk::PFN_vkGetPhysicalDeviceFeatures2,
    memory_properties: vk::PFN_vkGetPhysicalDeviceMemoryProperties,
    memory_properties2: vk::PFN_vkGetPhysicalDeviceMemoryProperties2,
}

/// The next element of the chain, for one device.
#[derive(Clone, Copy)]
struct NextOfDevice {
    device: vk::Device,
    get: vk::PFN_vkGetDeviceProcAddr,
    destroy: vk::PFN_vkDestroyDevice,
    queue_submit: vk::PFN_vkQueueSubmit,
    wait_for_fences: vk::PFN_vkWaitForFences,
    allocate_memory: vk::PFN_vkAllocateMemory,
    free_memory: vk::PFN_vkFreeMemory,
    map_memory: vk::PFN_vkMapMemory,
    create_compute_pipelines: vk::PFN_vkCreateComputePipelines,
    /// Where the device has the extension.
    stamps: Option<vk::PFN_vkGetCalibratedTimestampsKHR>,
}

/// By the loader's dispatch table, which an instance shares with its physical devices and a device with its queues.
/// Functions are asked for while their object is made: later the loader may answer with the head of the chain.
static INSTANCES: Mutex<Vec<(usize, NextOfInstance)>> = Mutex::new(Vec::new());
static DEVICES: Mutex<Vec<(usize, NextOfDevice)>> = Mutex::new(Vec::new());

/// The dispatch table of an object.
fn table<T: Handle>(object: T) -> usize {
    // SAFETY: every dispatchable object begins with the pointer to its table.
    unsafe { *(object.as_raw() as *const usize) }
}

fn next_of<Next: Copy, T: Handle>(known: &Mutex<Vec<(usize, Next)>>, object: T) -> Next {
    let table = table(object);
    let known = known.lock().unwrap();
    let found = known.iter().find(|(of, _)| *of == table);
    found.expect("made through this layer").1
}

fn remember<Next, T: Handle>(known: &Mutex<Vec<(usize, Next)>>, object: T, next: Next) {
    known.lock().unwrap().push((table(object), next));
}

fn forget<Next, T: Handle>(known: &Mutex<Vec<(usize, Next)>>, object: T) {
    let table = table(object);
    known.lock().unwrap().retain(|(of, _)| *of != table);
}

#[repr(C)]
pub struct NegotiateLayerInterface {
    s_type: u32,
    p_next: *mut c_void,
    version: u32,
    get_instance: Option<vk::PFN_vkGetInstanceProcAddr>,
    get_device: Option<vk::PFN_vkGetDeviceProcAddr>,
    get_physical_device: *const c_void,
}

#[repr(C)]
struct InstanceLink {
    next: *mut InstanceLink,
    get_instance: vk::PFN_vkGetInstanceProcAddr,
    get_physical_device: *const c_void,
}

#[repr(C)]
struct DeviceLink {
    next: *mut DeviceLink,
    get_instance: vk::PFN_vkGetInstanceProcAddr,
    get_device: vk::PFN_vkGetDeviceProcAddr,
}

/// `VkLayerInstanceCreateInfo` and `VkLayerDeviceCreateInfo`, whose union holds a link where `function` is 0.
#[repr(C)]
struct LayerCreateInfo<Link> {
    s_type: vk::StructureType,
    p_next: *const c_void,
    function: u32,
    link: *mut Link,
}

/// Takes the next link out of a creation chain, and advances the chain for it.
unsafe fn take_link<Link>(
    mut chain: *const c_void,
    s_type: vk::StructureType,
    next: impl Fn(*mut Link) -> *mut Link,
) -> *mut Link {
    while !chain.is_null() {
        let info = chain.cast_mut().cast::<LayerCreateInfo<Link>>();
        // SAFETY: every structure of a chain begins with its type and the next pointer; the loader's own kind has the
        // other two fields as well.
        unsafe {
            if (*info).s_type == s_type && (*info).function == 0 {
                let link = (*info).link;
                (*info).link = next(link);
                return link;
            }
            chain = (*info).p_next;
        }
    }
    ptr::null_mut()
}

/// Whether the fault strikes now. One that strikes once is over then.
fn strikes(fault: u32) -> bool {
    let strikes =
        FAULT.load(Ordering::SeqCst) == fault && AFTER.fetch_sub(1, Ordering::SeqCst) <= 0;
    if strikes && fault == NO_SUBMISSION {
        FAULT.store(NONE, Ordering::SeqCst);
    }
    strikes
}

/// The latest device falls; the others stand.
fn fall(device: vk::Device) {
    VICTIM.store(device.as_raw(), Ordering::SeqCst);
}

fn is_latest(device: vk::Device) -> bool {
    LATEST.load(Ordering::SeqCst) == device.as_raw()
}

fn is_victim(device: vk::Device) -> bool {
    VICTIM.load(Ordering::SeqCst) == device.as_raw()
}

fn is_lost(device: vk::Device) -> bool {
    let fault = FAULT.load(Ordering::SeqCst);
    is_victim(device) && matches!(fault, LOSE_AT_SUBMIT | LOSE_AT_WAIT)
}

/// The next function of this name, as its own type.
macro_rules! named {
    ($get:expr, $object:expr, $name:literal, $pfn:ty) => {
        // SAFETY: the object is live or null, and the function of this name has this type.
        unsafe { transmute::<vk::PFN_vkVoidFunction, Option<$pfn>>($get($object, $name.as_ptr())) }
            .expect("the driver has this function")
    };
}

unsafe extern "system" fn create_instance(
    info: *const vk::InstanceCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    instance: *mut vk::Instance,
) -> vk::Result {
    // SAFETY: the loader passes a valid chain, which it lets layers change.
    let link = unsafe {
        take_link::<InstanceLink>(
            (*info).p_next,
            vk::StructureType::LOADER_INSTANCE_CREATE_INFO,
            |link| (*link).next,
        )
    };
    if link.is_null() {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    }
    // SAFETY: the loader's link is valid during this call.
    let get = unsafe { (*link).get_instance };
    let null = vk::Instance::null();
    let create = named!(get, null, c"vkCreateInstance", vk::PFN_vkCreateInstance);
    // SAFETY: the arguments are the caller's own.
    let result = unsafe { create(info, allocator, instance) };
    if result == vk::Result::SUCCESS {
        // SAFETY: written by the call above.
        let instance = unsafe { *instance };
        let next = NextOfInstance {
            get,
            destroy: named!(
                get,
                instance,
                c"vkDestroyInstance",
                vk::PFN_vkDestroyInstance
            ),
            enumerate_physical_devices: named!(
                get,
                instance,
                c"vkEnumeratePhysicalDevices",
                vk::PFN_vkEnumeratePhysicalDevices
            ),
            create_device: named!(get, instance, c"vkCreateDevice", vk::PFN_vkCreateDevice),
            properties: named!(
                get,
                instance,
                c"vkGetPhysicalDeviceProperties2",
                vk::PFN_vkGetPhysicalDeviceProperties2
            ),
            features: named!(
                get,
                instance,
                c"vkGetPhysicalDeviceFeatures2",
                vk::PFN_vkGetPhysicalDeviceFeatures2
            ),
            memory_properties: named!(
                get,
                instance,
                c"vkGetPhysicalDeviceMemoryProperties",
                vk::PFN_vkGetPhysicalDeviceMemoryProperties
            ),
            memory_properties2: named!(
                get,
                instance,
                c"vkGetPhysicalDeviceMemoryProperties2",
                vk::PFN_vkGetPhysicalDeviceMemoryProperties2
            ),
        };
        remember(&INSTANCES, instance, next);
    }
    result
}

unsafe extern "system" fn destroy_instance(
    instance: vk::Instance,
    allocator: *const vk::AllocationCallbacks<'_>,
) {
    if instance == vk::Instance::null() {
        return;
    }
    let next = next_of(&INSTANCES, instance);
    forget(&INSTANCES, instance);
    // SAFETY: the arguments are the caller's own.
    unsafe { (next.destroy)(instance, allocator) }
}

unsafe extern "system" fn create_device(
    physical: vk::PhysicalDevice,
    info: *const vk::DeviceCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    device: *mut vk::Device,
) -> vk::Result {
    if strikes(NO_DEVICE) {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    }
    // SAFETY: the loader passes a valid chain, which it lets layers change.
    let link = unsafe {
        take_link::<DeviceLink>(
            (*info).p_next,
            vk::StructureType::LOADER_DEVICE_CREATE_INFO,
            |link| (*link).next,
        )
    };
    if link.is_null() {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    }
    // SAFETY: the loader's link is valid during this call.
    let get = unsafe { (*link).get_device };
    let create = next_of(&INSTANCES, physical).create_device;
    // SAFETY: the arguments are the caller's own.
    let result = unsafe { create(physical, info, allocator, device) };
    if result == vk::Result::SUCCESS {
        // SAFETY: written by the call above.
        let device = unsafe { *device };
        let next = NextOfDevice {
            device,
            get,
            destroy: named!(get, device, c"vkDestroyDevice", vk::PFN_vkDestroyDevice),
            queue_submit: named!(get, device, c"vkQueueSubmit", vk::PFN_vkQueueSubmit),
            wait_for_fences: named!(get, device, c"vkWaitForFences", vk::PFN_vkWaitForFences),
            allocate_memory: named!(get, device, c"vkAllocateMemory", vk::PFN_vkAllocateMemory),
            free_memory: named!(get, device, c"vkFreeMemory", vk::PFN_vkFreeMemory),
            map_memory: named!(get, device, c"vkMapMemory", vk::PFN_vkMapMemory),
            create_compute_pipelines: named!(
                get,
                device,
                c"vkCreateComputePipelines",
                vk::PFN_vkCreateComputePipelines
            ),
            // SAFETY: the device is live, and the function of this name has this type.
            stamps: unsafe {
                transmute::<vk::PFN_vkVoidFunction, Option<vk::PFN_vkGetCalibratedTimestampsKHR>>(
                    get(device, c"vkGetCalibratedTimestampsEXT".as_ptr()),
                )
            },
        };
        remember(&DEVICES, device, next);
        LATEST.store(device.as_raw(), Ordering::SeqCst);
    }
    result
}

unsafe extern "system" fn destroy_device(
    device: vk::Device,
    allocator: *const vk::AllocationCallbacks<'_>,
) {
    if device == vk::Device::null() {
        return;
    }
    let next = next_of(&DEVICES, device);
    forget(&DEVICES, device);
    // SAFETY: the arguments are the caller's own.
    unsafe { (next.destroy)(device, allocator) }
}

unsafe extern "system" fn enumerate_physical_devices(
    instance: vk::Instance,
    count: *mut u32,
    devices: *mut vk::PhysicalDevice,
) -> vk::Result {
    if strikes(NO_DRIVER) {
        return vk::Result::ERROR_INITIALIZATION_FAILED;
    }
    if strikes(NO_DEVICES) {
        // SAFETY: the caller passes a valid count.
        unsafe { *count = 0 };
        return vk::Result::SUCCESS;
    }
    let next = next_of(&INSTANCES, instance);
    // SAFETY: the arguments are the caller's own.
    unsafe { (next.enumerate_physical_devices)(instance, count, devices) }
}

unsafe extern "system" fn queue_submit(
    queue: vk::Queue,
    count: u32,
    submits: *const vk::SubmitInfo<'_>,
    fence: vk::Fence,
) -> vk::Result {
    let next = next_of(&DEVICES, queue);
    if is_latest(next.device) {
        if strikes(LOSE_AT_SUBMIT) {
            fall(next.device);
        }
        if strikes(NO_SUBMISSION) {
            return vk::Result::ERROR_OUT_OF_HOST_MEMORY;
        }
    }
    if is_lost(next.device) {
        return vk::Result::ERROR_DEVICE_LOST;
    }
    exchange(next.device, true);
    // SAFETY: the arguments are the caller's own.
    unsafe { (next.queue_submit)(queue, count, submits, fence) }
}

unsafe extern "system" fn wait_for_fences(
    device: vk::Device,
    count: u32,
    fences: *const vk::Fence,
    all: vk::Bool32,
    timeout: u64,
) -> vk::Result {
    if is_latest(device) && (strikes(LOSE_AT_WAIT) || strikes(HANG)) {
        fall(device);
    }
    if is_lost(device) {
        // A device that is lost runs nothing any more; the one below still does.
        let next = next_of(&DEVICES, device);
        // SAFETY: the arguments are the caller's own.
        let _ = unsafe { (next.wait_for_fences)(device, count, fences, all, 5_000_000_000) };
        return vk::Result::ERROR_DEVICE_LOST;
    }
    if is_victim(device) {
        std::thread::sleep(Duration::from_nanos(timeout.min(10_000_000)));
        return vk::Result::TIMEOUT;
    }
    let next = next_of(&DEVICES, device);
    // SAFETY: the arguments are the caller's own.
    let result = unsafe { (next.wait_for_fences)(device, count, fences, all, timeout) };
    if result == vk::Result::SUCCESS {
        exchange(device, false);
    }
    result
}

unsafe extern "system" fn allocate_memory(
    device: vk::Device,
    info: *const vk::MemoryAllocateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    memory: *mut vk::DeviceMemory,
) -> vk::Result {
    if strikes(NO_MEMORY) {
        return vk::Result::ERROR_OUT_OF_DEVICE_MEMORY;
    }
    let next = next_of(&DEVICES, device);
    // SAFETY: the arguments are the caller's own.
    let result = unsafe { (next.allocate_memory)(device, info, allocator, memory) };
    if result == vk::Result::SUCCESS && claims(CLAIM_BATCHED) {
        // SAFETY: the driver has read and written both.
        SIZES
            .lock()
            .unwrap()
            .push(unsafe { (*memory, (*info).allocation_size) });
    }
    result
}

unsafe extern "system" fn free_memory(
    device: vk::Device,
    memory: vk::DeviceMemory,
    allocator: *const vk::AllocationCallbacks<'_>,
) {
    let mut mappings = MAPPINGS.lock().unwrap();
    mappings.retain(|mapping| (mapping.device, mapping.memory) != (device, memory));
    let next = next_of(&DEVICES, device);
    // SAFETY: the arguments are the caller's own.
    unsafe { (next.free_memory)(device, memory, allocator) }
}

unsafe extern "system" fn map_memory(
    device: vk::Device,
    memory: vk::DeviceMemory,
    offset: vk::DeviceSize,
    size: vk::DeviceSize,
    flags: vk::MemoryMapFlags,
    data: *mut *mut c_void,
) -> vk::Result {
    let next = next_of(&DEVICES, device);
    // SAFETY: the arguments are the caller's own.
    let result = unsafe { (next.map_memory)(device, memory, offset, size, flags, data) };
    if result == vk::Result::SUCCESS && claims(CLAIM_BATCHED) {
        let allocated = SIZES
            .lock()
            .unwrap()
            .iter()
            .rfind(|(of, _)| *of == memory)
            .map(|(_, size)| *size);
        let bytes = if size == vk::WHOLE_SIZE {
            allocated.expect("allocated here") - offset
        } else {
            size
        };
        let words = usize::try_from(bytes / 4).unwrap();
        // SAFETY: the call above has stored where the memory is mapped, for these bytes, and nobody writes it yet.
        let base = unsafe { std::slice::from_raw_parts((*data).cast::<u32>(), words) }.to_vec();
        let mut host = vec![Line([0; 32]); words.div_ceil(32)];
        // SAFETY: there are as many words or a few more.
        unsafe {
            host.as_mut_ptr()
                .cast::<u32>()
                .copy_from(base.as_ptr(), words)
        };
        // SAFETY: as above. The lines stay where they are until the memory is freed.
        let real = unsafe { std::mem::replace(&mut *data, host.as_mut_ptr().cast()) } as usize;
        MAPPINGS.lock().unwrap().push(Mapping {
            device,
            memory,
            host,
            real,
            base,
        });
    }
    result
}

unsafe extern "system" fn properties(
    physical: vk::PhysicalDevice,
    properties: *mut vk::PhysicalDeviceProperties2<'_>,
) {
    let next = next_of(&INSTANCES, physical);
    // SAFETY: the arguments are the caller's own.
    unsafe { (next.properties)(physical, properties) };
    if claims(CLAIM_DISCRETE) {
        // SAFETY: the caller's structure, which was just filled.
        unsafe { (*properties).properties.device_type = vk::PhysicalDeviceType::DISCRETE_GPU };
    }
}

unsafe extern "system" fn features(
    physical: vk::PhysicalDevice,
    features: *mut vk::PhysicalDeviceFeatures2<'_>,
) {
    let next = next_of(&INSTANCES, physical);
    // SAFETY: the arguments are the caller's own.
    unsafe { (next.features)(physical, features) };
    if claims(CLAIM_NO_CLOCK) {
        // SAFETY: the caller's chain, which was just filled; every structure of it begins with its type and the next pointer.
        unsafe {
            let mut chain = (*features).p_next.cast::<vk::BaseOutStructure<'_>>();
            while !chain.is_null() {
                if (*chain).s_type == vk::StructureType::PHYSICAL_DEVICE_SHADER_CLOCK_FEATURES_KHR {
                    let clocks = chain.cast::<vk::PhysicalDeviceShaderClockFeaturesKHR<'_>>();
                    (*clocks).shader_device_clock = vk::FALSE;
                }
                chain = (*chain).p_next;
            }
        }
    }
}

unsafe extern "system" fn stamps(
    device: vk::Device,
    count: u32,
    infos: *const vk::CalibratedTimestampInfoKHR<'_>,
    stamps: *mut u64,
    deviation: *mut u64,
) -> vk::Result {
    let next = next_of(&DEVICES, device)
        .stamps
        .expect("asked for only where the device has it");
    // SAFETY: the arguments are the caller's own.
    let result = unsafe { next(device, count, infos, stamps, deviation) };
    if claims(CLAIM_OTHER_CLOCK) {
        for index in 0..count as usize {
            // SAFETY: there are as many of both.
            unsafe {
                if (*infos.add(index)).time_domain == vk::TimeDomainKHR::DEVICE {
                    *stamps.add(index) += 3_600_000_000_000;
                }
            }
        }
    }
    result
}

fn uncache(properties: &mut vk::PhysicalDeviceMemoryProperties) {
    if claims(CLAIM_UNCACHED) {
        for memory in &mut properties.memory_types {
            memory.property_flags &= !vk::MemoryPropertyFlags::HOST_CACHED;
        }
    }
}

unsafe extern "system" fn memory_properties(
    physical: vk::PhysicalDevice,
    properties: *mut vk::PhysicalDeviceMemoryProperties,
) {
    let next = next_of(&INSTANCES, physical);
    // SAFETY: the arguments are the caller's own.
    unsafe {
        (next.memory_properties)(physical, properties);
        uncache(&mut *properties);
    }
}

unsafe extern "system" fn memory_properties2(
    physical: vk::PhysicalDevice,
    properties: *mut vk::PhysicalDeviceMemoryProperties2<'_>,
) {
    let next = next_of(&INSTANCES, physical);
    // SAFETY: the arguments are the caller's own.
    unsafe {
        (next.memory_properties2)(physical, properties);
        uncache(&mut (*properties).memory_properties);
    }
}

unsafe extern "system" fn create_compute_pipelines(
    device: vk::Device,
    cache: vk::PipelineCache,
    count: u32,
    infos: *const vk::ComputePipelineCreateInfo<'_>,
    allocator: *const vk::AllocationCallbacks<'_>,
    pipelines: *mut vk::Pipeline,
) -> vk::Result {
    if strikes(NO_PIPELINE) {
        // SAFETY: the caller has room for `count` handles.
        unsafe { pipelines.write_bytes(0, count as usize) };
        return vk::Result::ERROR_OUT_OF_HOST_MEMORY;
    }
    let next = next_of(&DEVICES, device);
    // SAFETY: the arguments are the caller's own.
    unsafe { (next.create_compute_pipelines)(device, cache, count, infos, allocator, pipelines) }
}

/// This layer's own function of a name, if it has one.
fn own(name: &CStr) -> vk::PFN_vkVoidFunction {
    macro_rules! of {
        ($function:ident, $pfn:ty) => {
            // SAFETY: function pointers differ in nothing but their type, and callers cast this one back.
            unsafe { transmute::<$pfn, vk::PFN_vkVoidFunction>($function) }
        };
    }
    match name.to_bytes() {
        b"vkGetInstanceProcAddr" => of!(get_instance_proc_addr, vk::PFN_vkGetInstanceProcAddr),
        b"vkGetDeviceProcAddr" => of!(get_device_proc_addr, vk::PFN_vkGetDeviceProcAddr),
        b"vkCreateInstance" => of!(create_instance, vk::PFN_vkCreateInstance),
        b"vkCreateDevice" => of!(create_device, vk::PFN_vkCreateDevice),
        b"vkEnumeratePhysicalDevices" => {
            of!(
                enumerate_physical_devices,
                vk::PFN_vkEnumeratePhysicalDevices
            )
        }
        b"vkDestroyInstance" => of!(destroy_instance, vk::PFN_vkDestroyInstance),
        b"vkDestroyDevice" => of!(destroy_device, vk::PFN_vkDestroyDevice),
        b"vkQueueSubmit" => of!(queue_submit, vk::PFN_vkQueueSubmit),
        b"vkWaitForFences" => of!(wait_for_fences, vk::PFN_vkWaitForFences),
        b"vkFreeMemory" => of!(free_memory, vk::PFN_vkFreeMemory),
        b"vkMapMemory" => of!(map_memory, vk::PFN_vkMapMemory),
        b"vkGetPhysicalDeviceProperties2" => {
            of!(properties, vk::PFN_vkGetPhysicalDeviceProperties2)
        }
        b"vkGetPhysicalDeviceMemoryProperties" => {
            of!(
                memory_properties,
                vk::PFN_vkGetPhysicalDeviceMemoryProperties
            )
        }
        b"vkGetPhysicalDeviceMemoryProperties2" => {
            of!(
                memory_properties2,
                vk::PFN_vkGetPhysicalDeviceMemoryProperties2
            )
        }
        b"vkGetPhysicalDeviceFeatures2" => of!(features, vk::PFN_vkGetPhysicalDeviceFeatures2),
        b"vkGetCalibratedTimestampsEXT" => of!(stamps, vk::PFN_vkGetCalibratedTimestampsKHR),
        b"vkAllocateMemory" => of!(allocate_memory, vk::PFN_vkAllocateMemory),
        b"vkCreateComputePipelines" => {
            of!(create_compute_pipelines, vk::PFN_vkCreateComputePipelines)
        }
        _ => None,
    }
}

unsafe extern "system" fn get_instance_proc_addr(
    instance: vk::Instance,
    name: *const c_char,
) -> vk::PFN_vkVoidFunction {
    // SAFETY: callers pass a NUL-terminated name.
    let name = unsafe { CStr::from_ptr(name) };
    if instance == vk::Instance::null() {
        return own(name);
    }
    // SAFETY: the instance is the caller's.
    own(name).or_else(|| unsafe { (next_of(&INSTANCES, instance).get)(instance, name.as_ptr()) })
}

unsafe extern "system" fn get_device_proc_addr(
    device: vk::Device,
    name: *const c_char,
) -> vk::PFN_vkVoidFunction {
    // SAFETY: callers pass a NUL-terminated name.
    let name = unsafe { CStr::from_ptr(name) };
    // SAFETY: the device is the caller's.
    own(name).or_else(|| unsafe { (next_of(&DEVICES, device).get)(device, name.as_ptr()) })
}

/// What the loader calls first.
///
/// # Safety
/// `interface` must be the loader's structure.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn vkNegotiateLoaderLayerInterfaceVersion(
    interface: *mut NegotiateLayerInterface,
) -> vk::Result {
    // SAFETY: the loader passes its structure.
    unsafe {
        (*interface).version = (*interface).version.min(2);
        (*interface).get_instance = Some(get_instance_proc_addr);
        (*interface).get_device = Some(get_device_proc_addr);
        (*interface).get_physical_device = ptr::null();
    }
    vk::Result::SUCCESS
}

/// Makes calls fail from now on, after `after` that still succeed.
#[unsafe(no_mangle)]
pub extern "C" fn rk_fault_arm(fault: u32, after: u32) {
    FAULT.store(NONE, Ordering::SeqCst);
    AFTER.store(after.into(), Ordering::SeqCst);
    VICTIM.store(0, Ordering::SeqCst);
    FAULT.store(fault, Ordering::SeqCst);
}

/// Says what devices are to be from now on: any of the claims.
#[unsafe(no_mangle)]
pub extern "C" fn rk_fault_claim(claims: u32) {
    CLAIMS.store(claims, Ordering::SeqCst);
}
