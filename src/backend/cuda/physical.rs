//! The devices that the driver knows, before any is opened.

use std::ffi::{CStr, c_char, c_int};

use cudarc::driver::sys::{self, CUdevice, CUdevice_P2PAttribute, CUdevice_attribute};

use super::driver::{self, CallFailed, check};
use super::unavailable;
use crate::backend::{
    BackendType, CudaConfig, CudaDeviceInfo, CudaRingMemory, DeviceInfo, DeviceKind,
};
use crate::error::Error;
use crate::logging;

/// Oldest architecture that has loads and stores of system scope and `nanosleep` (PTX ISA 6.3).
const OLDEST: (u32, u32) = (7, 0);

/// A device that can be opened.
#[derive(Clone, Debug)]
pub(super) struct Physical {
    pub(super) handle: CUdevice,
    pub(super) info: DeviceInfo,
    pub(super) capability: (u32, u32),
    pub(super) multiprocessors: u32,
    pub(super) warp: u32,
    /// By which Vulkan knows it too.
    pub(super) uuid: Option<[u8; 16]>,
    pub(super) max_threads: u32,
    /// Whether the driver ends kernels that run for long.
    pub(super) watchdog: bool,
    /// What the kernels need and the device lacks, if anything.
    pub(super) lacks: Option<String>,
}

/// Every device, in the driver's order.
pub(super) fn enumerate(config: &CudaConfig) -> Result<Vec<Physical>, Error> {
    let failed = |error: CallFailed| unavailable(error.to_string());
    let version = driver::version().map_err(failed)?;
    let mut count: c_int = 0;
    // SAFETY: the driver is initialised; the pointer is to a local.
    check("count its devices", unsafe {
        sys::cuDeviceGetCount(&raw mut count)
    })
    .map_err(failed)?;
    let mut handles = Vec::new();
    for ordinal in 0..count {
        let mut handle: CUdevice = 0;
        // SAFETY: as above; the ordinal is below the count.
        check("get a device", unsafe {
            sys::cuDeviceGet(&raw mut handle, ordinal)
        })
        .map_err(failed)?;
        handles.push(handle);
    }
    if handles.is_empty() {
        return Err(unavailable("the CUDA driver has no device"));
    }
    let mut last = None;
    let devices: Vec<Physical> = handles
        .iter()
        .enumerate()
        .filter_map(|(index, handle)| {
            describe(index, *handle, &handles, version, config)
                .inspect_err(|error| last = Some(*error))
                .ok()
        })
        .collect();
    match last {
        Some(error) if devices.is_empty() => Err(failed(error)),
        Some(error) => {
            logging::warning!("a CUDA device is left out: {error}");
            Ok(devices)
        }
        None => Ok(devices),
    }
}

fn attribute(device: CUdevice, attribute: CUdevice_attribute) -> Result<u32, CallFailed> {
    let mut value: c_int = 0;
    // SAFETY: the device came from the driver; the pointer is to a local.
    check("describe a device", unsafe {
        sys::cuDeviceGetAttribute(&raw mut value, attribute, device)
    })?;
    Ok(u32::try_from(value).unwrap_or(0))
}

/// A string that a driver function writes into a buffer.
fn text(write: impl FnOnce(*mut c_char, c_int) -> sys::CUresult) -> Result<String, CallFailed> {
    let mut buffer = [0 as c_char; 256];
    check(
        "name a device",
        write(buffer.as_mut_ptr(), buffer.len() as c_int - 1),
    )?;
    // SAFETY: the buffer ends with a zero that the driver was not given.
    let text = unsafe { CStr::from_ptr(buffer.as_ptr()) };
    Ok(text.to_string_lossy().into_owned())
}

fn describe(
    index: usize,
    handle: CUdevice,
    all: &[CUdevice],
    driver_version: (u32, u32),
    config: &CudaConfig,
) -> Result<Physical, CallFailed> {
    use CUdevice_attribute as Attribute;
    let of = |which| attribute(handle, which);
    // SAFETY: the device came from the driver; the buffer has room for what it is said to have.
    let name = text(|to, room| unsafe { sys::cuDeviceGetName(to, room, handle) })?;
    // SAFETY: as above.
    let pci = text(|to, room| unsafe { sys::cuDeviceGetPCIBusId(to, room, handle) })
        .ok()
        .map(|address| address.to_lowercase());
    let mut memory = 0_usize;
    // SAFETY: as above; the pointer is to a local.
    check("tell a device's memory", unsafe {
        sys::cuDeviceTotalMem_v2(&raw mut memory, handle)
    })?;
    let capability = (
        of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let multiprocessors = of(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let watchdog = of(Attribute::CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT)? != 0;
    let integrated = of(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0;
    let maps = of(Attribute::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY)? != 0;
    let max_threads = of(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
    let lacks = if capability < OLDEST {
        Some(format!(
            "its compute capability is {}.{}, 7.0 is the oldest that has accesses of system scope",
            capability.0, capability.1
        ))
    } else if !maps {
        Some("it cannot map host memory".into())
    } else {
        None
    };
    let peers = all
        .iter()
        .enumerate()
        .filter(|(_, peer)| **peer != handle && is_linked(handle, **peer))
        .map(|(index, _)| index)
        .collect();
    let numa_node = pci.as_deref().and_then(crate::backend::info::numa_node);
    Ok(Physical {
        handle,
        capability,
        multiprocessors,
        uuid: driver::uuid(handle),
        warp: of(Attribute::CU_DEVICE_ATTRIBUTE_WARP_SIZE)?.max(1),
        max_threads,
        watchdog,
        lacks,
        info: DeviceInfo {
            backend: BackendType::Cuda,
            index,
            name,
            kind: if integrated {
                DeviceKind::IntegratedGpu
            } else {
                DeviceKind::DiscreteGpu
            },
            memory_limit: config.memory_limit.unwrap_or(memory as u64),
            cores: Vec::new(),
            vulkan: None,
            cuda: Some(CudaDeviceInfo {
                driver_version,
                compute_capability: capability,
                memory_bytes: memory as u64,
                multiprocessors,
                max_block_threads: max_threads,
                pci_address: pci,
                numa_node,
                nvlink_peers: peers,
                watchdog,
                ring_memory: CudaRingMemory::Auto,
                ring_memory_reason: "not opened yet".into(),
            }),
            metal: None,
        },
    })
}

/// Whether two devices reach each other's memory by NVLink: peers whose atomics work natively, which those over PCIe do not.
fn is_linked(from: CUdevice, to: CUdevice) -> bool {
    let (mut reaches, mut atomics): (c_int, c_int) = (0, 0);
    // SAFETY: both devices came from the driver; the pointers are to locals.
    unsafe {
        let _ = sys::cuDeviceCanAccessPeer(&raw mut reaches, from, to);
        let _ = sys::cuDeviceGetP2PAttribute(
            &raw mut atomics,
            CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED,
            from,
            to,
        );
    }
    reaches != 0 && atomics != 0
}
