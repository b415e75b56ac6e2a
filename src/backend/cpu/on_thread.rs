//! Which kernels' loops are on the calling thread's stack: what a handler calls must not wait for them.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::kernel::signals::KernelSignals;

thread_local! {
    /// The innermost loop on this thread. Without a destructor, so that destructors of thread-local values find it too.
    static INNERMOST: Cell<*const Entry<'static>> = const { Cell::new(std::ptr::null()) };
}

/// A kernel's loop on the stack of a thread: the kernel's own, or one whose thread runs it. Removed when dropped.
pub(super) struct Entry<'a> {
    signals: &'a Arc<KernelSignals>,
    outer: *const Entry<'static>,
    /// Stays on its thread.
    _thread: PhantomData<*const ()>,
}

impl<'a> Entry<'a> {
    /// Runs `body` as the loop of the kernel of these signals.
    #[inline]
    pub(super) fn run<R>(signals: &'a Arc<KernelSignals>, body: impl FnOnce() -> R) -> R {
        let entry = Self {
            signals,
            outer: INNERMOST.get(),
            _thread: PhantomData,
        };
        INNERMOST.set((&raw const entry).cast());
        // Takes itself out when it is dropped, also by a panic; it is not moved before.
        let entry = Pinned(&entry);
        let result = body();
        drop(entry);
        result
    }
}

/// Takes an entry out of the thread's list when dropped.
struct Pinned<'e, 'a>(&'e Entry<'a>);

impl Drop for Pinned<'_, '_> {
    #[inline]
    fn drop(&mut self) {
        INNERMOST.set(self.0.outer);
    }
}

/// Whether the loop of one of these kernels is on the calling thread's stack: whether this is one of its handlers, or that
/// of a kernel that runs on the same thread. The kernel's name then.
pub(crate) fn running_here(is_one: impl Fn(&Arc<KernelSignals>) -> bool) -> Option<String> {
    let mut next = INNERMOST.get();
    // SAFETY: entries are on this thread's stack, and taken out of the list before they are dropped.
    while let Some(entry) = unsafe { next.as_ref() } {
        if is_one(entry.signals) {
            return Some(entry.signals.name.clone());
        }
        next = entry.outer;
    }
    None
}

/// Whether the calling thread runs a handler of this kernel, or one of a kernel that shares its thread.
#[inline]
pub(crate) fn runs_here(signals: &Arc<KernelSignals>) -> bool {
    // The common case, a thread that runs no kernel, looks at one word.
    !INNERMOST.get().is_null() && running_here(|other| Arc::ptr_eq(other, signals)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_knows_the_kernels_that_it_runs_until_it_has_left_them() {
        let signals = |name: &str| Arc::new(KernelSignals::new(name.into(), 1, true, None, None));
        let (first, second) = (signals("first"), signals("second"));
        assert!(!runs_here(&first));
        Entry::run(&first, || {
            assert!(runs_here(&first) && !runs_here(&second));
            Entry::run(&second, || assert!(runs_here(&first) && runs_here(&second)));
            assert!(!runs_here(&second));
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                Entry::run(&second, || std::panic::resume_unwind(Box::new(())))
            }));
            assert!(panicked.is_err() && !runs_here(&second));
            std::thread::scope(|scope| {
                scope.spawn(|| assert!(!runs_here(&first)));
            });
        });
        assert!(!runs_here(&first));
    }
}
