//! Parking on a condition that lives elsewhere (in a ring), without a lost wake-up.
//!
//! A sleeper announces itself, looks at its condition once more, and only then sleeps. A notifier makes the condition
//! true first and looks for sleepers afterwards. With a sequentially consistent fence on both sides, at least one of
//! the two sees the other.
//!
//! A sleeper that spins for long times, and sleeps only now and then, spares its notifiers the
//! fence: it *disarms* the event count, and notifiers that find it so do nothing. Before it sleeps
//! it arms it again, which makes every other thread pass a fence (`barrier.rs`): who still found it
//! disarmed has made the condition true before that fence, so that the sleeper's next look finds
//! it; all others announce themselves as above.

use std::sync::PoisonError;
use std::time::Duration;

use super::barrier;
use crate::sync::{AtomicU32, Condvar, Mutex, MutexGuard, Ordering, fence};

/// A gate for sleepers. Waking is free while nobody sleeps.
#[derive(Debug)]
pub(crate) struct EventCount {
    /// Threads between `prepare` and the end of `wait`.
    waiters: AtomicU32,
    /// 0 while no sleeper relies on `notify_if_armed`. It changes rarely.
    armed: AtomicU32,
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
            armed: AtomicU32::new(1),
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

    /// As [`notify`](Self::notify), but does nothing while disarmed: two loads then, and no fence.
    #[inline]
    pub(crate) fn notify_if_armed(&self) {
        // ORDERING: park. Pairs with the heavy fence in `arm`: either the load below sees that it
        // is armed, or the sleeper's looks after `arm` see what the caller made true.
        barrier::light();
        if self.armed.load(Ordering::Relaxed) != 0 {
            self.notify();
        }
    }

    /// From now on [`notify_if_armed`](Self::notify_if_armed) wakes no sleeper. There may be one
    /// sleeper only, which says this itself and does not sleep, unless for
    /// [`notify`](Self::notify), before [`arm`](Self::arm). Does nothing where the system has no
    /// such fence.
    pub(crate) fn disarm(&self) {
        if barrier::is_available() {
            self.armed.store(0, Ordering::Relaxed);
        }
    }

    /// From now on `notify_if_armed` wakes sleepers again. Takes microseconds, and interrupts the
    /// process's other threads for as long. False if the system refuses that: the caller must not
    /// sleep then for want of a notification.
    #[must_use]
    pub(crate) fn arm(&self) -> bool {
        if self.armed.load(Ordering::Relaxed) != 0 {
            return true;
        }
        self.armed.store(1, Ordering::Relaxed);
        // ORDERING: park. See `notify_if_armed`.
        barrier::heavy()
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
    /// Sleeps until the next notification or for `timeout`. May return early for no reason.
    pub(crate) fn wait(self, timeout: Duration) {
        let guard = self.event.lock();
        // One check is enough: an early return only makes the caller look at its condition again.
        if *guard == self.epoch {
            drop(
                self.event
                    .changed
                    .wait_timeout(guard, timeout)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
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
    fn a_disarmed_sleeper_is_woken_once_it_is_armed_again() {
        let event = EventCount::new();
        assert!(event.arm(), "armed from the beginning");
        event.disarm();
        event.notify_if_armed();
        if !event.arm() {
            return;
        }
        let begin = Instant::now();
        let woken = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !woken.load(Ordering::Acquire) {
                    let prepared = event.prepare();
                    if !woken.load(Ordering::Acquire) {
                        prepared.wait(Duration::from_secs(60));
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(20));
            woken.store(true, Ordering::Release);
            event.notify_if_armed();
        });
        assert!(begin.elapsed() < Duration::from_secs(30));
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

    /// A sleeper that spins first, and then goes over to sleeping.
    #[test]
    fn no_wake_up_is_lost_when_a_spinning_thread_goes_to_sleep() {
        loom::model(|| {
            let shared = Arc::new((EventCount::new(), AtomicU32::new(0)));
            shared.0.disarm();
            let other = Arc::clone(&shared);
            let sleeper = loom::thread::spawn(move || {
                if other.1.load(Ordering::Relaxed) == 0 {
                    assert!(other.0.arm());
                    sleep_until_set(&other);
                }
            });
            shared.1.store(1, Ordering::Relaxed);
            shared.0.notify_if_armed();
            sleeper.join().unwrap();
        });
    }

    /// It sleeps for one message, spins for the next, and sleeps again.
    #[test]
    fn no_wake_up_is_lost_when_a_thread_spins_and_sleeps_by_turns() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let shared = Arc::new((EventCount::new(), AtomicU32::new(0)));
            let other = Arc::clone(&shared);
            let sleeper = loom::thread::spawn(move || {
                let sleep_until = |count| {
                    while other.1.load(Ordering::Relaxed) < count {
                        let prepared = other.0.prepare();
                        if other.1.load(Ordering::Relaxed) < count {
                            prepared.wait(Duration::from_secs(1));
                        }
                    }
                };
                sleep_until(1);
                other.0.disarm();
                if other.1.load(Ordering::Relaxed) < 2 {
                    assert!(other.0.arm());
                    sleep_until(2);
                }
            });
            for count in 1..=2 {
                shared.1.store(count, Ordering::Relaxed);
                shared.0.notify_if_armed();
            }
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
