//! The CUDA driver, loaded at run time.

use std::ffi::{CStr, c_char, c_int};
use std::fmt;

use cudarc::driver::sys::{self, CUresult};

use super::unavailable;
use crate::error::Error;

/// Every driver function that this backend calls. They are looked up here, once: cudarc would look each up on its first call, and
/// panic where the driver lacks it.
const FUNCTIONS: [&str; 39] = [
    "cuCtxGetLimit",
    "cuCtxPopCurrent_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxSetLimit",
    "cuDestroyExternalMemory",
    "cuDeviceCanAccessPeer",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetP2PAttribute",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuExternalMemoryGetMappedBuffer",
    "cuFuncGetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuImportExternalMemory",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuModuleGetFunction",
    "cuModuleLoadDataEx",
    "cuModuleUnload",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuStreamCreate",
    "cuStreamQuery",
    "cuThreadExchangeStreamCaptureMode",
];

/// Looked up as well, but only used when everything ends.
const LAST_FUNCTION: &str = "cuStreamDestroy_v2";

/// A driver call that failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct CallFailed {
    pub(super) code: CUresult,
    operation: &'static str,
}

/// What a driver's answer means: `Ok` for success, and whatever it is otherwise.
pub(super) fn check(operation: &'static str, code: CUresult) -> Result<(), CallFailed> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(CallFailed { code, operation }),
    }
}

impl CallFailed {
    /// Whether the context is of no use any more: every later call of the process on this device fails too (CUDA Driver API, "Data
    /// types used by CUDA driver", CUresult: errors after which "the process must be terminated and relaunched").
    pub(super) fn is_sticky(&self) -> bool {
        matches!(
            self.code,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
                | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
                | CUresult::CUDA_ERROR_ASSERT
                | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
                | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUresult::CUDA_ERROR_INVALID_PC
                | CUresult::CUDA_ERROR_LAUNCH_FAILED
                | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
                | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
                | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
                | CUresult::CUDA_ERROR_DEINITIALIZED
                | CUresult::CUDA_ERROR_UNKNOWN
        )
    }
}

impl fmt::Display for CallFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name: *const c_char = std::ptr::null();
        let mut text: *const c_char = std::ptr::null();
        // SAFETY: both functions store a pointer to a static string, or null for a code that they do not know; they were
        // looked up by `load`, without which no call was made that could fail.
        let (name, text) = unsafe {
            let _ = sys::cuGetErrorName(self.code, &raw mut name);
            let _ = sys::cuGetErrorString(self.code, &raw mut text);
            let of = |text: *const c_char| match text.is_null() {
                true => "unknown".into(),
                false => CStr::from_ptr(text).to_string_lossy(),
            };
            (of(name), of(text))
        };
        write!(
            f,
            "the driver failed to {}: {name} ({text})",
            self.operation
        )
    }
}

/// Opens the driver's library and initialises it.
pub(super) fn load() -> Result<(), Error> {
    if std::env::var_os("CUDA_LAUNCH_BLOCKING").is_some_and(|value| value != "0") {
        return Err(unavailable(
            "CUDA_LAUNCH_BLOCKING is set: a launch would wait for the end of a kernel that stays",
        ));
    }
    // SAFETY: opening a library runs its initialisers; the names are those of the CUDA driver.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable("there is no CUDA driver (libcuda)"));
    }
    // SAFETY: as above; it is there.
    let library = unsafe { sys::culib() };
    for name in FUNCTIONS.iter().chain([&LAST_FUNCTION]) {
        // SAFETY: the symbol is only looked up, not called by this type.
        if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
            return Err(unavailable(format!(
                "the CUDA driver has no {name}: it is too old"
            )));
        }
    }
    // SAFETY: the library is loaded; initialising twice does nothing.
    check("initialise", unsafe { sys::cuInit(0) }).map_err(|error| unavailable(error.to_string()))
}

/// By what a device is known to other interfaces too; `None` for drivers older than CUDA 11.4.
pub(super) fn uuid(device: sys::CUdevice) -> Option<[u8; 16]> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the library is loaded, and the symbol looked up before it is called; the pointer is to a local.
    let told = unsafe {
        sys::culib()
            .get::<unsafe extern "C" fn()>(b"cuDeviceGetUuid_v2")
            .ok()?;
        sys::cuDeviceGetUuid_v2(&raw mut uuid, device)
    };
    check("identify a device", told).ok()?;
    Some(uuid.bytes.map(|byte| byte as u8))
}

/// The driver's CUDA version, as major and minor.
pub(super) fn version() -> Result<(u32, u32), CallFailed> {
    let mut version: c_int = 0;
    // SAFETY: the library is loaded, the pointer is to a local.
    check("tell its version", unsafe {
        sys::cuDriverGetVersion(&raw mut version)
    })?;
    let version = u32::try_from(version).unwrap_or(0);
    Ok((version / 1000, version % 1000 / 10))
}
