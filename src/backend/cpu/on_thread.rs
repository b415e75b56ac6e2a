//! Which kernels' loops are on the calling thread's stack: what a handler calls must not wait for
//! them, and what it panics with is their failure.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::backend::BlockMemory;
use crate::kernel::UndeliveredMessage;
use crate::kernel::signals::KernelSignals;
use crate::thread::unwinding;

thread_local! {
    /// The innermost loop on this thread. Without a destructor, so that destructors of thread-local
    /// values find it too.
    static INNERMOST: Cell<*const Entry<'static>> = const { Cell::new(std::ptr::null()) };
}

/// A block, as threads that run it know it.
pub(super) struct Running {
    pub(super) signals: Arc<KernelSignals>,
    memory: Arc<BlockMemory>,
    /// Whether the handler has the request at the consumer's position right now. Written by the
    /// thread that runs the block.
    in_hand: AtomicBool,
}

impl Running {
    pub(super) fn new(signals: &Arc<KernelSignals>, memory: &Arc<BlockMemory>) -> Self {
        Self {
            signals: Arc::clone(signals),
            memory: Arc::clone(memory),
            in_hand: AtomicBool::new(false),
        }
    }

    #[inline]
    pub(super) fn set_in_hand(&self, in_hand: bool) {
        self.in_hand.store(in_hand, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn is_in_hand(&self) -> bool {
        self.in_hand.load(Ordering::Relaxed)
    }
}

/// A kernel's loop on the stack of a thread: the kernel's own, or one whose thread runs it. Removed
/// when dropped.
struct Entry<'a> {
    running: &'a Running,
    outer: *const Entry<'static>,
    /// Stays on its thread.
    _thread: PhantomData<*const ()>,
}

impl Running {
    /// Runs `body` as the block's loop on this thread.
    #[inline]
    pub(super) fn run<R>(&self, body: impl FnOnce() -> R) -> R {
        let entry = Entry {
            running: self,
            outer: INNERMOST.get(),
            _thread: PhantomData,
        };
        INNERMOST.set((&raw const entry).cast());
        // Takes the entry out when it is dropped, also by a panic; the entry is not moved before.
        let entered = Entered(&entry);
        let result = body();
        drop(entered);
        result
    }
}

/// Takes an entry out of the thread's list when dropped.
struct Entered<'e, 'a>(&'e Entry<'a>);

impl Drop for Entered<'_, '_> {
    #[inline]
    fn drop(&mut self) {
        INNERMOST.set(self.0.outer);
    }
}

/// The kernel whose handler has just begun to panic on the calling thread, its block and the
/// request that it had, if nothing between the handler and its loop catches the panic.
pub(super) fn panicking_handler() -> Option<(Arc<KernelSignals>, u32, UndeliveredMessage)> {
    let innermost = INNERMOST.get();
    // SAFETY: entries are on this thread's stack, and taken out of the list before they are
    // dropped.
    let running = unsafe { innermost.as_ref() }?.running;
    // The entry lies within what the loop's own `catch_unwind` runs.
    if !running.is_in_hand() || unwinding::catches_before(innermost.addr()) != Some(false) {
        return None;
    }
    let memory = &running.memory;
    let position = memory.control().processed();
    // SAFETY: this thread is in the block's handler, whose request is the first that has not been
    // processed.
    let request = unsafe { memory.request_at(&running.signals.name, position) }?;
    Some((Arc::clone(&running.signals), memory.index, request))
}

/// Whether the loop of one of these kernels is on the calling thread's stack: whether this is one
/// of its handlers, or that of a kernel that runs on the same thread. The kernel's name then.
pub(crate) fn running_here(is_one: impl Fn(&Arc<KernelSignals>) -> bool) -> Option<String> {
    let mut next = INNERMOST.get();
    // SAFETY: entries are on this thread's stack, and taken out of the list before they are
    // dropped.
    while let Some(entry) = unsafe { next.as_ref() } {
        if is_one(&entry.running.signals) {
            return Some(entry.running.signals.name.clone());
        }
        next = entry.outer;
    }
    None
}

/// Whether the calling thread runs a handler of this kernel, or one of a kernel that shares its
/// thread.
#[inline]
pub(crate) fn runs_here(signals: &Arc<KernelSignals>) -> bool {
    // The common case, a thread that runs no kernel, looks at one word.
    !INNERMOST.get().is_null() && running_here(|other| Arc::ptr_eq(other, signals)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, BlockLayout, GridMemory, cpu::CpuBackend};
    use crate::ring::RingLayout;

    #[test]
    fn a_thread_knows_the_kernels_that_it_runs_until_it_has_left_them() {
        let device = CpuBackend::new(1, None, &[]).open(0).unwrap();
        let layout = BlockLayout {
            ring: RingLayout::new(2, 48, false).unwrap(),
            state_bytes: 0,
            trace_slots: 0,
        };
        let block = |name: &str| {
            let signals = Arc::new(KernelSignals::new(name.into(), 1, true, None, None));
            let ends = GridMemory::allocate(device.as_ref(), 1, layout).unwrap();
            let memory = &ends.first().unwrap().2.memory;
            (Running::new(&signals, memory), signals)
        };
        let ((one, first), (other, second)) = (block("first"), block("second"));
        assert!(!runs_here(&first));
        one.run(|| {
            assert!(runs_here(&first) && !runs_here(&second));
            other.run(|| assert!(runs_here(&first) && runs_here(&second)));
            assert!(!runs_here(&second));
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                other.run(|| std::panic::resume_unwind(Box::new(())))
            }));
            assert!(panicked.is_err() && !runs_here(&second));
            std::thread::scope(|scope| {
                scope.spawn(|| assert!(!runs_here(&first)));
            });
        });
        assert!(!runs_here(&first));
    }
}
