//! A value that threads use in turns, and that none of them ever waits for.
//!
//! Who finds it taken goes on with something else. That makes it no lock: it cannot block, and the holder needs to wake nobody.

use crate::sync::{AtomicU32, Ordering, UnsafeCell};
use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

const FREE: u32 = 0;
const TAKEN: u32 = 1;

/// On cache lines of its own: its holders change all the time.
#[repr(align(128))]
pub(crate) struct Baton<T> {
    taken: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached through `Held` alone, of which there is one at a time (`try_take`); so it only ever moves from thread to
// thread, which `T: Send` allows.
unsafe impl<T: Send> Sync for Baton<T> {}
// SAFETY: as for `Sync`.
unsafe impl<T: Send> Send for Baton<T> {}

impl<T> fmt::Debug for Baton<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Baton").finish_non_exhaustive()
    }
}

impl<T> Baton<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            taken: AtomicU32::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    /// The value, if no other thread has it right now. One atomic exchange; a load if it is taken.
    #[inline]
    pub(crate) fn try_take(&self) -> Option<Held<'_, T>> {
        // Relaxed: only spares the other holder's line an exchange that would fail.
        if self.taken.load(Ordering::Relaxed) == TAKEN {
            return None;
        }
        // ORDERING: baton. Acquire pairs with the release in `Held::drop`: what the last holder did is visible.
        self.taken
            .compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed)
            .ok()
            .map(|_| Held {
                baton: self,
                one_thread: PhantomData,
            })
    }
}

/// The value in hand; passed on when dropped.
#[derive(Debug)]
pub(crate) struct Held<'a, T> {
    baton: &'a Baton<T>,
    /// For one thread: `T` need not be `Sync`.
    one_thread: PhantomData<Cell<()>>,
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: `try_take` took the baton for this value alone, and `drop` gives it back; the reference ends before.
        self.baton.value.with(|value| unsafe { &*value })
    }
}

impl<T> DerefMut for Held<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as for `deref`; `&mut self` keeps other references away.
        self.baton.value.with_mut(|value| unsafe { &mut *value })
    }
}

impl<T> Drop for Held<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // ORDERING: baton. Pairs with the acquire in `Baton::try_take`.
        self.baton.taken.store(FREE, Ordering::Release);
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release --lib`
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::sync::Arc;

    #[test]
    fn one_thread_at_a_time_has_the_value_and_sees_what_the_last_one_did() {
        loom::model(|| {
            let baton = Arc::new(Baton::new(UnsafeCell::new(0_u32)));
            let add = |baton: &Baton<UnsafeCell<u32>>| match baton.try_take() {
                // SAFETY: the baton is held.
                Some(held) => held.with_mut(|value| unsafe {
                    *value += 1;
                    1
                }),
                None => 0,
            };
            let other = Arc::clone(&baton);
            let thread = loom::thread::spawn(move || add(&other));
            let mine = add(&baton);
            let added = mine + thread.join().unwrap();
            let held = baton.try_take().unwrap();
            // SAFETY: the baton is held.
            assert_eq!(held.with(|value| unsafe { *value }), added);
        });
    }
}
