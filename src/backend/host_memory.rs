//! Memory of this process, counted against a device's limit.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::backend::DeviceMemory;
use crate::error::Error;
use crate::ring::WriteCombining;
use crate::system::{self, memory::MemoryAccount};

/// Size and alignment of a huge page, where there are any: what a page directory's entry covers with 4 KiB pages, on x86-64 and AArch64.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Alignment of every smaller allocation, and the distance at which pages are touched: the smallest page there is.
const PAGE_BYTES: usize = 4096;

/// Bytes taken on one device.
#[derive(Debug)]
pub(crate) struct Account {
    limit: u64,
    used: AtomicU64,
    huge_pages: AtomicBool,
}

impl Account {
    pub(crate) fn new(limit: u64) -> Self {
        Self {
            limit,
            used: AtomicU64::new(0),
            huge_pages: AtomicBool::new(false),
        }
    }

    /// Whether this process's memory that is taken from now on is to lie in huge pages.
    pub(crate) fn use_huge_pages(&self, huge_pages: bool) {
        self.huge_pages.store(huge_pages, Ordering::Relaxed);
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

impl MemoryAccount for Account {
    fn take(&self, bytes: u64) -> bool {
        self.take(bytes)
    }

    fn give_back(&self, bytes: u64) {
        self.give_back(bytes);
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

    /// One without a limit.
    #[cfg(test)]
    pub(crate) fn unlimited() -> Self {
        Self::new("test".into(), Arc::new(Account::new(u64::MAX)))
    }

    /// At least `bytes` of zeroed memory, every page of it present.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<Arc<HostMemory>, Error> {
        match HostMemory::allocate(bytes, &self.account) {
            Ok(memory) => Ok(Arc::new(memory)),
            Err(available) => Err(self.out_of_memory(bytes as u64, available)),
        }
    }

    /// Where the memory is booked.
    pub(crate) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// What is said where there is no such memory.
    pub(super) fn refused(&self, bytes: u64) -> Error {
        self.out_of_memory(bytes, self.account.available())
    }

    /// The same, of memory of which so much is left.
    pub(crate) fn out_of_memory(&self, asked: u64, available: u64) -> Error {
        Error::OutOfMemory {
            device: self.device.clone(),
            asked,
            available,
        }
    }
}

/// A zeroed run of pages.
#[derive(Debug)]
pub(crate) struct HostMemory {
    start: NonNull<u8>,
    layout: Layout,
    /// Whether it is cleared in the child of a fork.
    is_cleared: bool,
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

    /// At least `bytes` of zeroed memory, every page of it present; if the account or the system
    /// has not as much left, how much there is.
    pub(crate) fn allocate(bytes: usize, account: &Arc<Account>) -> Result<Self, u64> {
        let available = account.available();
        let bytes = bytes
            .max(1)
            .checked_next_multiple_of(PAGE_BYTES)
            .ok_or(available)?;
        let is_huge = account.huge_pages.load(Ordering::Relaxed) && bytes >= HUGE_PAGE_BYTES;
        let alignment = if is_huge { HUGE_PAGE_BYTES } else { PAGE_BYTES };
        let layout = Layout::from_size_align(bytes, alignment).map_err(|_| available)?;
        if !account.take(bytes as u64) {
            return Err(account.available());
        }
        let give_back = |left| {
            account.give_back(bytes as u64);
            left
        };
        // Until every page is written to.
        let _grant = system::memory::ask(bytes as u64).map_err(give_back)?;
        // An allocator that zeroes memory may touch it: advice has to come before.
        let take = if is_huge { alloc } else { alloc_zeroed };
        // SAFETY: the layout's size is at least one page, so not zero.
        let Some(start) = NonNull::new(unsafe { take(layout) }) else {
            return Err(give_back(0));
        };
        if is_huge {
            advise_huge_pages(start, bytes);
            // SAFETY: all of it is within the allocation, which is nobody else's yet.
            unsafe { start.write_bytes(0, bytes) };
        }
        let is_cleared = clear_in_child(start, bytes, true);
        for offset in (0..bytes).step_by(PAGE_BYTES) {
            // SAFETY: the offset is within the allocation. Volatile, so that the page is really written to.
            unsafe { start.add(offset).write_volatile(0) };
        }
        Ok(Self {
            start,
            layout,
            is_cleared,
            account: Arc::clone(account),
        })
    }
}

/// Has the child of a fork find zeros instead of its parent's messages, so that none is received
/// twice; whether the system does so.
#[cfg(target_os = "linux")]
fn clear_in_child(start: NonNull<u8>, bytes: usize, is_cleared: bool) -> bool {
    let advice = match is_cleared {
        true => libc::MADV_WIPEONFORK,
        false => libc::MADV_KEEPONFORK,
    };
    // SAFETY: the range is whole pages of an allocation of ours; the advice changes nothing of what
    // they hold here.
    unsafe { libc::madvise(start.as_ptr().cast(), bytes, advice) == 0 }
}

/// Other systems have no such advice.
#[cfg(not(target_os = "linux"))]
fn clear_in_child(_start: NonNull<u8>, _bytes: usize, is_cleared: bool) -> bool {
    !is_cleared
}

/// Asks for huge pages; goes on without if there are none.
#[cfg(target_os = "linux")]
fn advise_huge_pages(start: NonNull<u8>, bytes: usize) {
    // SAFETY: the range is an allocation of ours that begins with a page. The advice changes nothing of what it holds, nor of what may lie
    // behind it in its last page.
    let result = unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    if result != 0 {
        crate::logging::debug!(
            "no huge pages for {bytes} bytes: {}",
            std::io::Error::last_os_error()
        );
    }
}

/// Other systems have no such advice.
#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_start: NonNull<u8>, _bytes: usize) {}

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

    fn is_shared(&self) -> bool {
        false
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if self.is_cleared && !clear_in_child(self.start, self.layout.size(), false) {
            // The allocator may keep its own words there, which no child may lose: better never to
            // have it back.
            return;
        }
        // SAFETY: `start` came from `alloc_zeroed` or `alloc` with this very layout, and is freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
        self.account.give_back(self.layout.size() as u64);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Whether the mapping that `address` lies in is marked for huge pages; `None` if the kernel does not say.
    fn is_advised(address: usize) -> Option<bool> {
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let mut is_here = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| {
                let (from, to) = range.split_once('-')?;
                let parse = |text| usize::from_str_radix(text, 16).ok();
                Some(parse(from)?..parse(to)?)
            });
            if let Some(range) = range {
                is_here = range.contains(&address);
            } else if is_here && let Some(flags) = line.strip_prefix("VmFlags:") {
                return Some(flags.split(' ').any(|flag| flag == "hg"));
            }
        }
        None
    }

    #[test]
    fn large_memory_is_advised_on_request() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage/enabled").exists() {
            println!("skipped: this kernel has no transparent huge pages");
            return;
        }
        let account = Arc::new(Account::new(u64::MAX));
        // Larger than the largest that malloc takes from its heap, so that each is a mapping of its own.
        let bytes = 33 << 20;
        for huge_pages in [false, true] {
            account.use_huge_pages(huge_pages);
            let memory = HostMemory::allocate(bytes, &account).unwrap();
            let start = memory.start().as_ptr() as usize;
            if let Some(advised) = is_advised(start) {
                assert_eq!(advised, huge_pages);
            } else {
                println!("skipped: smaps does not say");
            }
            if huge_pages {
                assert_eq!(start % HUGE_PAGE_BYTES, 0);
                // SAFETY: the memory is there, and nobody writes to it.
                let content = unsafe { std::slice::from_raw_parts(memory.start().as_ptr(), bytes) };
                assert!(content.iter().all(|byte| *byte == 0));
                let small = HostMemory::allocate(HUGE_PAGE_BYTES / 2, &account).unwrap();
                assert_eq!(small.layout.align(), PAGE_BYTES);
            }
        }
        assert_eq!(account.used(), 0);
    }
}
