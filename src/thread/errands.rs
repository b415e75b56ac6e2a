//! A baton with errands: a thread that finds it taken leaves its work where the holder looks before it goes on.
//!
//! The work itself lies elsewhere (in a ring that is the thread's own); here is only the word that says that there is some. Who leaves an
//! errand looks for the baton once more afterwards, who gives the baton back looks for errands afterwards. With a sequentially consistent
//! fence on both sides at least one of the two sees the other, so that no errand stays undone, and none waits for anybody to come by.

use crate::sync::{AtomicU32, Ordering, fence};
use crate::thread::baton::{Baton, Held};

/// A value that can do what other threads have left for it.
pub(crate) trait Errand {
    /// Does what was left, a bounded part of it at least; says whether some is left still.
    fn run(&mut self) -> bool;
}

#[derive(Debug)]
pub(crate) struct Errands<T> {
    baton: Baton<T>,
    /// Whether anything was left.
    left: AtomicU32,
}

impl<T: Errand> Errands<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            baton: Baton::new(value),
            left: AtomicU32::new(0),
        }
    }

    /// Hands the value to `act`, after what others had left for it, unless another thread has it right now. Does not wait; but what others
    /// leave meanwhile is done before it returns.
    #[inline]
    pub(crate) fn try_with<R>(&self, act: impl FnOnce(&mut T) -> R) -> Option<R> {
        let mut held = self.baton.try_take()?;
        self.run_once(&mut held);
        let result = act(&mut held);
        drop(held);
        self.look_again();
        Some(result)
    }

    /// Has the value do what the caller has just left for it: at once if nobody has it, else by whoever has.
    #[inline]
    pub(crate) fn leave(&self) {
        // ORDERING: errands. Release pairs with the acquire in `run_once`: who sees the word sees the errand. An exchange, not a store, which
        // would hide the errands of those who have said so before from whoever sees this word only.
        self.left.swap(1, Ordering::Release);
        self.look_again();
    }

    /// Does what was left while the caller had the baton, or before that.
    #[inline]
    fn look_again(&self) {
        loop {
            // ORDERING: errands. After the baton was given back or an errand left, before the other of the two is looked at: either the holder
            // sees the errand, or who left it sees that the baton is free.
            fence(Ordering::SeqCst);
            if self.left.load(Ordering::Relaxed) == 0 {
                return;
            }
            let Some(mut held) = self.baton.try_take() else {
                // Whoever has it looks again.
                return;
            };
            self.run_once(&mut held);
        }
    }

    #[inline]
    fn run_once(&self, held: &mut Held<'_, T>) {
        // Relaxed: spares the line an exchange.
        if self.left.load(Ordering::Relaxed) == 0 {
            return;
        }
        // ORDERING: errands. See `leave`. Before the errands are run: what comes meanwhile sets it again.
        self.left.swap(0, Ordering::Acquire);
        if held.run() {
            self.left.swap(1, Ordering::Release);
        }
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release --lib`
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;

    /// What two threads have left so far, each in a place that it alone writes to, as a ring's producer does; and what came of it.
    struct Counter {
        left: Arc<[AtomicU32; 2]>,
        seen: [u32; 2],
        done: u32,
    }

    impl Errand for Counter {
        fn run(&mut self) -> bool {
            for (left, seen) in self.left.iter().zip(&mut self.seen) {
                // Relaxed: what makes it visible must be the word that something was left.
                let now = left.load(Ordering::Relaxed);
                self.done += now - *seen;
                *seen = now;
            }
            false
        }
    }

    fn work(errands: &Errands<Counter>, own: &AtomicU32) {
        if errands.try_with(|counter| counter.done += 1).is_none() {
            own.store(1, Ordering::Relaxed);
            errands.leave();
        }
    }

    #[test]
    fn no_errand_stays_undone_and_none_is_done_twice() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let left = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
            let errands = Arc::new(Errands::new(Counter {
                left: Arc::clone(&left),
                seen: [0; 2],
                done: 0,
            }));
            let threads: Vec<_> = (0..2)
                .map(|own| {
                    let (errands, left) = (Arc::clone(&errands), Arc::clone(&left));
                    loom::thread::spawn(move || work(&errands, &left[own]))
                })
                .collect();
            // Somebody who only passes by, as a subscriber that comes or goes.
            errands.try_with(|_| ());
            for thread in threads {
                thread.join().unwrap();
            }
            // Without another `try_with`, which would do what was left.
            let held = errands.baton.try_take().unwrap();
            assert_eq!(held.done, 2);
        });
    }
}
