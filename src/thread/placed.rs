//! Where threads run, as the system tells it when it is asked.

use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

/// Stands for "no core alone".
const NO_CORE: usize = usize::MAX;

/// Where one thread runs.
#[derive(Debug)]
pub(crate) struct PlacedThread {
    /// Its number in the system; 0 while it does not run, or where threads have none.
    thread: AtomicI32,
    /// The core that it was last seen on.
    core: AtomicUsize,
}

/// The thread runs until this is dropped, on that thread.
pub(crate) struct Running<'a>(&'a PlacedThread);

impl PlacedThread {
    pub(crate) const fn new() -> Self {
        Self {
            thread: AtomicI32::new(0),
            core: AtomicUsize::new(NO_CORE),
        }
    }

    /// To be called by the thread itself, once it was put where it shall run; `asked` is the core
    /// that it was put on, if it was one.
    pub(crate) fn run(&self, asked: Option<usize>) -> Running<'_> {
        self.core.store(asked.unwrap_or(NO_CORE), Ordering::Relaxed);
        #[cfg(target_os = "linux")]
        {
            self.look(0);
            // SAFETY: no preconditions. By number, because not every C library has the function.
            let thread = unsafe { libc::syscall(libc::SYS_gettid) };
            self.thread
                .store(thread.try_into().unwrap_or(0), Ordering::Release);
        }
        Running(self)
    }

    /// The core that the thread may run on, if it is only one; of a thread that has ended, the
    /// last.
    ///
    /// A system call on Linux, while the thread runs; elsewhere the core that it was put on.
    pub(crate) fn core(&self) -> Option<usize> {
        #[cfg(target_os = "linux")]
        {
            let thread = self.thread.load(Ordering::Acquire);
            if thread != 0 {
                self.look(thread);
            }
        }
        Some(self.core.load(Ordering::Relaxed)).filter(|core| *core != NO_CORE)
    }

    /// Asks the system where this thread is, if it is still this one.
    #[cfg(target_os = "linux")]
    fn look(&self, thread: libc::pid_t) {
        let core = match super::affinity::affinity_of(thread)[..] {
            // It does not tell: what was asked for counts.
            [] => return,
            [core] => core,
            _ => NO_CORE,
        };
        // A number may be another thread's once this one has ended.
        if thread == 0 || self.thread.load(Ordering::Acquire) == thread {
            self.core.store(core, Ordering::Relaxed);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::affinity::{pin_current_thread, usable_cores};

    #[test]
    fn a_thread_that_moves_is_found_where_it_is() {
        let place = PlacedThread::new();
        assert_eq!(place.core(), None);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for core in usable_cores() {
                    pin_current_thread(core).unwrap();
                    // It was put somewhere else, as far as its owner knows.
                    let running = place.run(None);
                    let elsewhere =
                        std::thread::scope(|inner| inner.spawn(|| place.core()).join().unwrap());
                    if cfg!(target_os = "linux") {
                        assert_eq!(elsewhere, Some(core));
                    }
                    drop(running);
                }
            });
        });
        if cfg!(target_os = "linux") {
            assert_eq!(place.core(), usable_cores().last().copied());
        }
    }
}
