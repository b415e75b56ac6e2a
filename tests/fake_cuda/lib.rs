//! A CUDA driver and compiler that run kernels on this CPU: the backend's host side and the very sources of its kernels are then
//! tested where there is no GPU. Loaded as `libcuda` and `libnvrtc` by `tests/conformance_cuda.rs` alone.
//!
//! "PTX" of its compiler names a library that the C++ compiler made of the same source (`tests/on_cpu/`); the committed PTX of the
//! built-in kernels is recognised, and stands for their sources. Calls that a real driver lets wait for running kernels fail
//! here instead, as do calls without a current context.
//!
//! Names and numbers are those of the CUDA Driver API and of NVRTC.

#![allow(missing_docs, non_snake_case, clippy::missing_safety_doc)]

use std::alloc::{Layout, alloc, dealloc};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use faults::*;

type Code = c_int;
const SUCCESS: Code = 0;
const INVALID_VALUE: Code = 1;
const OUT_OF_MEMORY: Code = 2;
const INVALID_IMAGE: Code = 200;
const INVALID_CONTEXT: Code = 201;
const NOT_FOUND: Code = 500;
const NOT_READY: Code = 600;
const NOT_SUPPORTED: Code = 801;
const CAPTURE_UNSUPPORTED: Code = 900;
const ILLEGAL_ADDRESS: Code = 700;
const DEADLOCK: Code = 999;

static FAULT: AtomicU32 = AtomicU32::new(0);

fn faulty(fault: u32) -> bool {
    FAULT.load(Ordering::SeqCst) == fault
}

/// Launches that are not done.
static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// What was taken and not given back: memory, streams, events, modules, contexts.
static LIVE: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The contexts that were pushed, the current one last.
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

thread_local! {
    /// What graphs that others capture mean for this thread: 0 forbids most calls, 2 does not.
    static CAPTURE_MODE: Cell<c_int> = const { Cell::new(0) };
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) -> Code {
    // SAFETY: the caller passes a valid pointer, as the real driver demands.
    unsafe { *mode = CAPTURE_MODE.replace(*mode) };
    SUCCESS
}

/// Fails a call that needs a current context, and one that a real driver would let wait for running kernels.
fn ready(operation: &str, waits: bool) -> Result<(), Code> {
    if CURRENT.with_borrow(Vec::is_empty) {
        eprintln!("fake CUDA: {operation} without a current context");
        return Err(INVALID_CONTEXT);
    }
    if faulty(FOREIGN_CAPTURE) && CAPTURE_MODE.get() != 2 {
        eprintln!("fake CUDA: {operation} spoils the graph that another thread captures");
        return Err(CAPTURE_UNSUPPORTED);
    }
    // After an error that sticks a GPU runs nothing any more; here kernels still have to see that they shall end.
    while waits && faulty(FAULTY_KERNEL) && RUNNING.load(Ordering::SeqCst) > 0 {
        std::thread::yield_now();
    }
    if waits && RUNNING.load(Ordering::SeqCst) > 0 {
        eprintln!("fake CUDA: {operation} while kernels run: this waits for them for ever");
        return Err(DEADLOCK);
    }
    Ok(())
}

macro_rules! tri {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(code) => return code,
        }
    };
}

mod faults;
mod memory;
mod modules;
mod nvrtc;
mod streams;

fn new_handle<T>(value: T) -> *mut c_void {
    LIVE.fetch_add(1, Ordering::SeqCst);
    Box::into_raw(Box::new(value)).cast()
}

/// # Safety
/// The handle must be one of `new_handle` for this type, given back once.
unsafe fn drop_handle<T>(handle: *mut c_void) {
    LIVE.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: the caller's promise.
    drop(unsafe { Box::from_raw(handle.cast::<T>()) });
}

// ---------------------------------------------------------------------------------------------------------------------
// The driver. Callers pass valid pointers and handles of the functions here, as the real driver demands.

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    // SAFETY: see above.
    unsafe { *version = 12_090 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
    // SAFETY: see above.
    unsafe { *count = if faulty(NO_DEVICES) { 0 } else { 2 } };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    // SAFETY: see above.
    unsafe { *device = ordinal };
    SUCCESS
}

/// # Safety
/// `to` must have this room.
unsafe fn write_text(to: *mut c_char, room: c_int, text: &str) -> Code {
    if text.len() >= room as usize {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's promise.
    unsafe {
        to.cast::<u8>().copy_from(text.as_ptr(), text.len());
        *to.add(text.len()) = 0;
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(to: *mut c_char, room: c_int, device: c_int) -> Code {
    // SAFETY: see above.
    unsafe { write_text(to, room, &format!("Fake GPU {device}")) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(to: *mut c_char, room: c_int, device: c_int) -> Code {
    // SAFETY: see above.
    unsafe { write_text(to, room, &format!("FFFF:0{device}:00.0")) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Code {
    // SAFETY: see above.
    unsafe { *bytes = 1 << 30 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    _device: c_int,
) -> Code {
    let found = match attribute {
        // Threads of a block, of a warp (each is a context of its own here), multiprocessors.
        1 => 1024,
        10 => 2,
        16 => 16,
        // Whether there is a watchdog, and whether host memory can be mapped.
        17 => c_int::from(faulty(WATCHDOG)),
        19 => 1,
        // Compute capability, major.
        75 if faulty(OLD_DEVICE) => 6,
        75 => 9,
        _ => 0,
    };
    // SAFETY: see above.
    unsafe { *value = found };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut c_int, from: c_int, to: c_int) -> Code {
    // SAFETY: see above.
    unsafe { *can = c_int::from(from != to) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetP2PAttribute(
    value: *mut c_int,
    _attribute: c_int,
    _from: c_int,
    _to: c_int,
) -> Code {
    // SAFETY: see above.
    unsafe { *value = 1 };
    SUCCESS
}

/// The UUID of the software Vulkan device, if there is one.
fn software_vulkan() -> Option<[u8; 16]> {
    static UUID: OnceLock<Option<[u8; 16]>> = OnceLock::new();
    *UUID.get_or_init(|| {
        #[cfg(feature = "vulkan")]
        // SAFETY: the system's loader; handles are of the instance, which is destroyed last.
        unsafe {
            use ash::vk;
            let entry = ash::Entry::load().ok()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&info, None).ok()?;
            let devices = instance.enumerate_physical_devices().unwrap_or_default();
            let uuid = devices.into_iter().find_map(|device| {
                let mut ids = vk::PhysicalDeviceIDProperties::default();
                let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut ids);
                instance.get_physical_device_properties2(device, &mut properties);
                let software = properties.properties.device_type == vk::PhysicalDeviceType::CPU;
                software.then_some(ids.device_uuid)
            });
            instance.destroy_instance(None);
            uuid
        }
        #[cfg(not(feature = "vulkan"))]
        None
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn rk_fake_has_vulkan() -> bool {
    software_vulkan().is_some()
}

/// Device 0 is the software Vulkan device, whose memory it imports.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> Code {
    let vulkan = software_vulkan().filter(|_| device == 0);
    // SAFETY: see above.
    unsafe { *uuid = vulkan.unwrap_or([0xfa; 16]) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Code {
    LIVE.fetch_add(1, Ordering::SeqCst);
    // SAFETY: see above.
    unsafe { *context = 0x1000 + device as usize };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Code {
    LIVE.fetch_sub(1, Ordering::SeqCst);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: usize) -> Code {
    CURRENT.with_borrow_mut(|current| current.push(context));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut usize) -> Code {
    match CURRENT.with_borrow_mut(Vec::pop) {
        Some(popped) => {
            // SAFETY: see above.
            unsafe { *context = popped };
            SUCCESS
        }
        None => INVALID_CONTEXT,
    }
}

fn name_of(code: Code) -> &'static CStr {
    match code {
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        INVALID_IMAGE => c"CUDA_ERROR_INVALID_IMAGE",
        NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        _ => c"CUDA_ERROR_OF_THE_FAKE",
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: see above.
    unsafe { *text = name_of(code).as_ptr() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: see above.
    unsafe { *text = name_of(code).as_ptr() };
    SUCCESS
}

// ---------------------------------------------------------------------------------------------------------------------
// For tests.

/// Makes calls fail from now on.
#[unsafe(no_mangle)]
pub extern "C" fn rk_fake_arm(fault: u32) {
    FAULT.store(fault, Ordering::SeqCst);
}

/// Contexts that are current on the calling thread.
#[unsafe(no_mangle)]
pub extern "C" fn rk_fake_pushed() -> usize {
    CURRENT.with_borrow(Vec::len)
}

/// What was taken and not given back.
#[unsafe(no_mangle)]
pub extern "C" fn rk_fake_live() -> usize {
    LIVE.load(Ordering::SeqCst) + RUNNING.load(Ordering::SeqCst)
}
