//! Who sees to it that replies reach the lanes of a kernel's clients.
//!
//! While a client waits awake, it routes the replies of all of them. Who ceases to, looks at the rings once more; whoever writes a reply
//! while nobody routes and somebody sleeps, rings for the bridge.

use crate::sync::{AtomicU32, Ordering, fence};

/// Watchers are counted in the lower half, sleepers in the upper one: there are at most 255 clients.
const WATCHER: u32 = 1;
const SLEEPER: u32 = 1 << 16;

/// On cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct Watch {
    /// Clients that wait awake, and those that wait asleep. One word: who leaves last has seen who fell asleep before.
    waiting: AtomicU32,
}

impl Watch {
    pub(crate) fn new() -> Self {
        Self {
            waiting: AtomicU32::new(0),
        }
    }

    /// The caller routes replies from now on.
    #[inline]
    pub(crate) fn enter(&self) {
        self.waiting.fetch_add(WATCHER, Ordering::Relaxed);
    }

    /// The caller does so no more. Whether nobody does now: then it must look at the rings once more.
    #[inline]
    pub(crate) fn leave(&self) -> bool {
        self.cease(WATCHER)
    }

    /// As `leave`, for a caller that is about to sleep until somebody routes a reply to it.
    #[inline]
    pub(crate) fn fall_asleep(&self) -> bool {
        self.cease(WATCHER.wrapping_sub(SLEEPER))
    }

    /// The bridge is to be rung for every reply from now on: they are carried on, and nobody watches.
    #[cfg(not(loom))]
    pub(crate) fn begin_carrying(&self) {
        self.waiting.fetch_add(SLEEPER, Ordering::SeqCst);
    }

    /// The inverse of `begin_carrying`.
    #[cfg(not(loom))]
    pub(crate) fn end_carrying(&self) {
        self.waiting.fetch_sub(SLEEPER, Ordering::SeqCst);
    }

    /// The caller, which had fallen asleep, routes replies again.
    #[inline]
    pub(crate) fn wake_up(&self) {
        self.waiting.fetch_sub(SLEEPER - WATCHER, Ordering::Relaxed);
    }

    #[inline]
    fn cease(&self, change: u32) -> bool {
        let before = self.waiting.fetch_sub(change, Ordering::Relaxed);
        // ORDERING: watch. See `must_ring`.
        fence(Ordering::SeqCst);
        watchers(before) == 1
    }

    /// Whether the bridge has to be rung for a reply that was just written: because somebody sleeps while nobody routes, or because nobody
    /// routes and `is_due` says that so many replies have come that it is time for it anyway.
    #[inline]
    pub(crate) fn must_ring(&self, is_due: bool) -> bool {
        // ORDERING: watch. The reply was written before; pairs with the fence in `cease`: either the last watcher sees the reply, or we see
        // that it has gone.
        fence(Ordering::SeqCst);
        let waiting = self.waiting.load(Ordering::Relaxed);
        watchers(waiting) == 0 && (is_due || waiting != 0)
    }

    /// Whether nobody routes replies, so that the bridge must.
    pub(crate) fn is_unwatched(&self) -> bool {
        watchers(self.waiting.load(Ordering::Relaxed)) == 0
    }
}

fn watchers(waiting: u32) -> u32 {
    waiting & (SLEEPER - 1)
}

/// `RUSTFLAGS="--cfg loom" cargo test --release --lib`
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::thread::event_count::EventCount;
    use loom::sync::Arc;
    use std::time::Duration;

    /// A kernel that writes one reply, and those who may route it.
    struct Kernel {
        watch: Watch,
        bell: EventCount,
        reply: AtomicU32,
        routed: AtomicU32,
    }

    impl Kernel {
        fn new() -> Self {
            Self {
                watch: Watch::new(),
                bell: EventCount::new(),
                reply: AtomicU32::new(0),
                routed: AtomicU32::new(0),
            }
        }

        fn reply(&self, is_due: bool) {
            self.reply.store(1, Ordering::Relaxed);
            if self.watch.must_ring(is_due) {
                self.bell.notify();
            }
        }

        /// A look at the ring, with a reply routed that is there.
        fn look(&self) -> bool {
            let found = self.reply.load(Ordering::Relaxed) == 1;
            if found {
                self.routed.store(1, Ordering::Relaxed);
                // Nobody else would end the model's bridge.
                self.bell.notify();
            }
            found
        }

        /// A client that waits awake for one look, and then sleeps.
        fn wait(&self) {
            self.watch.enter();
            if self.look() {
                self.watch.leave();
            } else if self.watch.fall_asleep() {
                self.look();
            }
        }

        /// A client that waits for one look, and then goes on with something else.
        fn glance(&self) {
            self.watch.enter();
            self.look();
            if self.watch.leave() {
                self.look();
            }
        }

        /// The bridge, until the reply is routed. Loom's waits never time out, so that a reply that stays where it is shows as a deadlock.
        fn bridge(&self) {
            while self.routed.load(Ordering::Relaxed) == 0 {
                let prepared = self.bell.prepare();
                if self.routed.load(Ordering::Relaxed) == 1
                    || self.watch.is_unwatched() && self.look()
                {
                    return;
                }
                prepared.wait(Duration::from_secs(1));
            }
        }
    }

    /// Three and four threads have too many interleavings for all of them (see `event_count`).
    fn check(run: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(2);
        model.check(run);
    }

    fn spawn(kernel: &Arc<Kernel>, run: fn(&Kernel)) -> loom::thread::JoinHandle<()> {
        let kernel = Arc::clone(kernel);
        loom::thread::spawn(move || run(&kernel))
    }

    #[test]
    fn no_reply_stays_unrouted_when_the_only_watcher_falls_asleep() {
        check(|| {
            let kernel = Arc::new(Kernel::new());
            let threads = [spawn(&kernel, Kernel::wait), spawn(&kernel, Kernel::bridge)];
            kernel.reply(false);
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    #[test]
    fn no_reply_stays_unrouted_when_one_sleeps_and_another_one_leaves() {
        check(|| {
            let kernel = Arc::new(Kernel::new());
            let threads = [
                spawn(&kernel, Kernel::wait),
                spawn(&kernel, Kernel::glance),
                spawn(&kernel, Kernel::bridge),
            ];
            kernel.reply(false);
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    #[test]
    fn a_reply_that_is_due_is_routed_though_nobody_sleeps() {
        check(|| {
            let kernel = Arc::new(Kernel::new());
            let threads = [
                spawn(&kernel, Kernel::glance),
                spawn(&kernel, Kernel::bridge),
            ];
            kernel.reply(true);
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }
}
