//! Parking on a condition that lives elsewhere (in a ring), without a lost wake-up.
//!
//! A sleeper announces itself, looks at its condition once more, and only then sleeps. A notifier makes the condition
//! true first and looks for sleepers afterwards. With a sequentially consistent fence on both sides, at least one of
//! the two sees the other.

use std::sync::PoisonError;
use std::time::Duration;

use crate::sync::{AtomicU32, Condvar, Mutex, MutexGuard, Ordering, fence};

/// A gate for sleepers. Waking is free while nobody sleeps.
#[derive(Debug)]
pub(crate) struct EventCount {
    /// Threads between `prepare` and the end of `wait`.
    waiters: AtomicU32,
    /// Counts notifications that found a waiter, modulo 2^32.
    epoch: Mutex<u32>,
    changed: Condvar,
}

/// The announcement of one sleeper; holds the epoch that it saw.
#[derive(Debug)]
#[must_use = "a prepared wait must be ended by `wait` or by dropping it"]
pub(crate) struct Prepared<'a> {
    event: &'a EventCount,
    epoch: u32,
}

impl EventCount {
    pub(crate) fn new() -> Self {
        Self {
            waiters: AtomicU32::new(0),
            epoch: Mutex::new(0),
            changed: Condvar::new(),
        }
    }

    /// Announces the caller as a sleeper. It must now look at its condition once more, and then either
    /// [`wait`](Prepared::wait) or drop what it got.
    pub(crate) fn prepare(&self) -> Prepared<'_> {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        // ORDERING: park. Pairs with the fence in `notify`: either the notifier sees the increment above, or the
        // caller's next look at its condition sees what the notifier made true.
        fence(Ordering::SeqCst);
        let epoch = *self.lock();
        Prepared { event: self, epoch }
    }

    /// Wakes every sleeper, after the caller has made their condition true. No system call, and no lock, while nobody
    /// sleeps.
    #[inline]
    pub(crate) fn notify(&self) {
        // ORDERING: park. See `prepare`.
        fence(Ordering::SeqCst);
        if self.waiters.load(Ordering::Relaxed) != 0 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        let mut epoch = self.lock();
        *epoch = epoch.wrapping_add(1);
        drop(epoch);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Prepared<'_> {
    /// Sleeps until the next notification or for `timeout`. May return early for no reason. Whether there was a notification.
    pub(crate) fn wait(self, timeout: Duration) -> bool {
        let mut guard = self.event.lock();
        // One check is enough: an early return only makes the caller look at its condition again.
        if *guard == self.epoch {
            (guard, _) = self
                .event
                .changed
                .wait_timeout(guard, timeout)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *guard != self.epoch
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        self.event.waiters.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    #[test]
    fn a_sleeper_is_woken_long_before_its_timeout() {
        let shared = Arc::new((EventCount::new(), AtomicBool::new(false)));
        let other = Arc::clone(&shared);
        let sleeper = std::thread::spawn(move || {
            let begin = Instant::now();
            while !other.1.load(Ordering::Acquire) {
                let prepared = other.0.prepare();
                if !other.1.load(Ordering::Acquire) {
                    prepared.wait(Duration::from_secs(60));
                }
            }
            begin.elapsed()
        });
        std::thread::sleep(Duration::from_millis(20));
        shared.1.store(true, Ordering::Release);
        shared.0.notify();
        assert!(sleeper.join().unwrap() < Duration::from_secs(30));
    }

    #[test]
    fn an_unnotified_sleeper_wakes_at_its_timeout() {
        let event = EventCount::new();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(20) {
            event.prepare().wait(Duration::from_millis(20));
        }
        assert_eq!(event.waiters.load(Ordering::Relaxed), 0);
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release --lib`
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;

    /// Loom's `wait_timeout` never times out, so that a lost wake-up shows as a deadlock.
    fn sleep_until_set(shared: &(EventCount, AtomicU32)) {
        while shared.1.load(Ordering::Relaxed) == 0 {
            let prepared = shared.0.prepare();
            if shared.1.load(Ordering::Relaxed) == 0 {
                prepared.wait(Duration::from_secs(1));
            }
        }
    }

    #[test]
    fn no_wake_up_is_lost() {
        loom::model(|| {
            let shared = Arc::new((EventCount::new(), AtomicU32::new(0)));
            let other = Arc::clone(&shared);
            let sleeper = loom::thread::spawn(move || sleep_until_set(&other));
            shared.1.store(1, Ordering::Relaxed);
            shared.0.notify();
            sleeper.join().unwrap();
        });
    }

    #[test]
    fn two_sleepers_are_both_woken() {
        // Three threads have too many interleavings for all of them; bugs of this kind need two preemptions (loom's
        // documentation, "Large models").
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(|| {
            let shared = Arc::new((EventCount::new(), AtomicU32::new(0)));
            let sleepers: Vec<_> = (0..2)
                .map(|_| {
                    let other = Arc::clone(&shared);
                    loom::thread::spawn(move || sleep_until_set(&other))
                })
                .collect();
            shared.1.store(1, Ordering::Relaxed);
            shared.0.notify();
            for sleeper in sleepers {
                sleeper.join().unwrap();
            }
        });
    }
}
