//! CPU devices: the machine, or several shares of it that stand in for several devices.

use std::sync::Arc;

use super::dispatch::CpuDispatch;
use crate::backend::{
    Account, Backend, BackendType, BlockClock, Device, DeviceInfo, DeviceKind, DeviceMemory,
    Dispatch, DispatchRequest, Handler, Placement,
};
use crate::error::Error;
use crate::system;
use crate::thread::affinity;

/// The CPU backend.
#[derive(Debug)]
pub(crate) struct CpuBackend {
    devices: Vec<DeviceInfo>,
}

impl CpuBackend {
    /// See [`CpuDevice::enumerate`].
    pub(crate) fn new(count: usize, memory_limit: Option<u64>, reserved: &[usize]) -> Self {
        Self {
            devices: CpuDevice::enumerate(count, memory_limit, reserved),
        }
    }
}

impl Backend for CpuBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        self.devices.clone()
    }

    fn open(&self, index: usize) -> Result<Arc<dyn Device>, Error> {
        match self.devices.get(index) {
            Some(info) => Ok(Arc::new(CpuDevice::open(info.clone()))),
            None => Err(Error::DeviceNotFound {
                backend: BackendType::Cpu.name(),
                index,
                available: self.devices.len(),
            }),
        }
    }
}

/// One CPU device.
#[derive(Debug)]
struct CpuDevice {
    info: DeviceInfo,
    account: Arc<Account>,
}

impl CpuDevice {
    /// Describes `count` devices, which share the usable cores (less `reserved`) evenly, each with
    /// `memory_limit` bytes or its share of the memory that the process may have. With fewer cores
    /// than devices, all have all cores.
    fn enumerate(count: usize, memory_limit: Option<u64>, reserved: &[usize]) -> Vec<DeviceInfo> {
        let mut cores = affinity::usable_cores();
        if cores.iter().any(|core| !reserved.contains(core)) {
            cores.retain(|core| !reserved.contains(core));
        }
        let share = (cores.len() / count.max(1)).max(1);
        (0..count)
            .map(|index| DeviceInfo {
                backend: BackendType::Cpu,
                index,
                name: format!("cpu{index}"),
                kind: DeviceKind::Cpu,
                vulkan: None,
                cuda: None,
                metal: None,
                memory_limit: memory_limit
                    .unwrap_or_else(|| system::memory::total() / count.max(1) as u64),
                cores: if cores.len() < count {
                    cores.clone()
                } else {
                    cores
                        .iter()
                        .copied()
                        .skip(index * share)
                        .take(share)
                        .collect()
                },
            })
            .collect()
    }

    fn open(info: DeviceInfo) -> Self {
        let account = Arc::new(Account::new(info.memory_limit));
        Self { info, account }
    }
}

impl Device for CpuDevice {
    fn clock(&self, _handler: &Handler) -> Option<BlockClock> {
        Some(BlockClock::Host)
    }

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn account(&self) -> &Arc<Account> {
        &self.account
    }

    fn allocate(
        &self,
        bytes: usize,
        _placement: Placement,
    ) -> Result<Arc<dyn DeviceMemory>, Error> {
        Ok(self.host_pool().allocate(bytes)?)
    }

    fn shares_rings(&self) -> bool {
        true
    }

    fn dispatch(&self, request: DispatchRequest) -> Result<Box<dyn Dispatch>, Error> {
        Ok(Box::new(CpuDispatch::start(request, &self.account)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_limited_and_given_back() {
        let mut info = CpuDevice::enumerate(1, Some(16 * 4096), &[]).remove(0);
        info.name = "test".into();
        let device = CpuDevice::open(info);
        let first = device.allocate(10 * 4096, Placement::DeviceState).unwrap();
        let error = device
            .allocate(7 * 4096, Placement::DeviceState)
            .unwrap_err();
        assert!(
            matches!(&error, Error::OutOfMemory { asked, available, .. }
                if (*asked, *available) == (7 * 4096, 6 * 4096)),
            "{error}"
        );
        drop(first);
        assert_eq!(device.memory_in_use(), 0);
        device.allocate(16 * 4096, Placement::DeviceState).unwrap();
    }

    #[test]
    fn sizes_that_no_machine_has_are_an_error() {
        let device = CpuDevice::open(CpuDevice::enumerate(1, Some(u64::MAX), &[]).remove(0));
        for bytes in [usize::MAX, usize::MAX / 2, 1 << 60] {
            assert!(device.allocate(bytes, Placement::DeviceState).is_err());
        }
        assert_eq!(device.memory_in_use(), 0);
    }

    #[test]
    fn virtual_devices_share_the_cores() {
        let cores = affinity::usable_cores();
        let devices = CpuDevice::enumerate(cores.len(), None, &[]);
        for (device, core) in devices.iter().zip(&cores) {
            assert_eq!(device.cores, [*core]);
        }
        let many = CpuDevice::enumerate(cores.len() + 1, None, &[]);
        assert!(many.iter().all(|device| device.cores == cores));
        assert!(CpuDevice::enumerate(1, None, &cores)[0].cores == cores);
    }
}
