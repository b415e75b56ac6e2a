//! Memory of this process, counted against a device's limit.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::DeviceMemory;
use crate::error::Error;
use crate::ring::WriteCombining;

/// Alignment of every allocation, and the distance at which pages are touched: the smallest page there is.
const PAGE_BYTES: usize = 4096;

/// Bytes taken on one device.
#[derive(Debug)]
pub(crate) struct Account {
    limit: u64,
    used: AtomicU64,
}

impl Account {
    pub(crate) fn new(limit: u64) -> Self {
        Self {
            limit,
            used: AtomicU64::new(0),
        }
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(crate) fn available(&self) -> u64 {
        self.limit.saturating_sub(self.used())
    }

    /// Books `bytes`, unless that would exceed the limit.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|after| *after <= self.limit)
            })
            .is_ok()
    }

    /// Gives back what was taken.
    pub(crate) fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Memory of this process that is booked on a device.
#[derive(Clone, Debug)]
pub(crate) struct HostPool {
    device: String,
    account: Arc<Account>,
}

impl HostPool {
    pub(crate) fn new(device: String, account: Arc<Account>) -> Self {
        Self { device, account }
    }

    /// At least `bytes` of zeroed memory, every page of it present.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<Arc<HostMemory>, Error> {
        match HostMemory::allocate(bytes, &self.account) {
            Some(memory) => Ok(Arc::new(memory)),
            None => Err(Error::OutOfMemory {
                device: self.device.clone(),
                asked: bytes as u64,
                available: self.account.available(),
            }),
        }
    }
}

/// A zeroed run of pages.
#[derive(Debug)]
pub(crate) struct HostMemory {
    start: NonNull<u8>,
    layout: Layout,
    account: Arc<Account>,
}

// SAFETY: the memory belongs to this value alone; nothing in it is bound to a thread.
unsafe impl Send for HostMemory {}
// SAFETY: as for `Send`; a shared reference gives nothing but the address.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// The first byte.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// At least `bytes` of zeroed memory, every page of it present; `None` if the account or the system has none left.
    pub(crate) fn allocate(bytes: usize, account: &Arc<Account>) -> Option<Self> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE_BYTES)?;
        let layout = Layout::from_size_align(bytes, PAGE_BYTES).ok()?;
        if !account.take(bytes as u64) {
            return None;
        }
        // SAFETY: the layout's size is at least one page, so not zero.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            account.give_back(bytes as u64);
            return None;
        };
        for offset in (0..bytes).step_by(PAGE_BYTES) {
            // SAFETY: the offset is within the allocation. Volatile, so that the page is really written to.
            unsafe { start.add(offset).write_volatile(0) };
        }
        Some(Self {
            start,
            layout,
            account: Arc::clone(account),
        })
    }
}

impl DeviceMemory for HostMemory {
    fn host_ptr(&self) -> Option<NonNull<u8>> {
        Some(self.start)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn write_combining(&self) -> WriteCombining {
        WriteCombining::No
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this very layout, and is freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
        self.account.give_back(self.layout.size() as u64);
    }
}
