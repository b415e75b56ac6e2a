//! Fences of unequal cost: one side hardly pays, because the other makes every thread of the
//! process pass a full fence.
//!
//! A [`light`] fence on one side and a [`heavy`] one on the other order memory accesses as two
//! sequentially consistent fences would (P1202, "Asymmetric thread fences"): a light fence keeps
//! the compiler from moving accesses, and the heavy one executes a full fence on each core that
//! runs a thread of this process, wherever that thread just is (membarrier(2),
//! `MEMBARRIER_CMD_PRIVATE_EXPEDITED`). Two light fences order nothing between each other.

#[cfg(not(loom))]
pub(super) use system::{heavy, is_available, light};

#[cfg(all(not(loom), target_os = "linux"))]
mod system {
    use std::sync::atomic::{AtomicU8, Ordering, compiler_fence};

    // linux/membarrier.h
    const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

    fn membarrier(command: libc::c_int) -> bool {
        let (flags, cpu): (libc::c_uint, libc::c_int) = (0, 0);
        // SAFETY: the call takes three integers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_membarrier, command, flags, cpu) == 0 }
    }

    /// Whether there are heavy fences; registers this process for them at the first call.
    pub(crate) fn is_available() -> bool {
        /// No `OnceLock`: the child of a fork would wait for ever for a thread that was just at it.
        static REGISTERED: AtomicU8 = AtomicU8::new(UNKNOWN);
        const UNKNOWN: u8 = 0;
        const NO: u8 = 1;
        const YES: u8 = 2;
        // Relaxed: it guards no data, and threads that ask the system at once get the same answer.
        match REGISTERED.load(Ordering::Relaxed) {
            UNKNOWN => {
                let is_available = membarrier(REGISTER_PRIVATE_EXPEDITED);
                REGISTERED.store(if is_available { YES } else { NO }, Ordering::Relaxed);
                is_available
            }
            known => known == YES,
        }
    }

    /// The expensive side: microseconds. False if the system refused it; then nothing is ordered.
    #[must_use]
    pub(crate) fn heavy() -> bool {
        is_available() && membarrier(PRIVATE_EXPEDITED)
    }

    /// The cheap side.
    #[inline]
    pub(crate) fn light() {
        compiler_fence(Ordering::SeqCst);
    }
}

#[cfg(all(not(loom), not(target_os = "linux")))]
mod system {
    pub(crate) fn is_available() -> bool {
        false
    }

    #[must_use]
    pub(crate) fn heavy() -> bool {
        false
    }

    #[inline]
    pub(crate) fn light() {}
}

/// Loom knows no such fences: the model shows what follows from their guarantee.
#[cfg(loom)]
pub(super) fn is_available() -> bool {
    true
}

#[cfg(loom)]
#[must_use]
pub(super) fn heavy() -> bool {
    crate::sync::fence(crate::sync::Ordering::SeqCst);
    true
}

#[cfg(loom)]
pub(super) fn light() {
    crate::sync::fence(crate::sync::Ordering::SeqCst);
}

#[cfg(all(test, not(loom), target_os = "linux"))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    /// Each round both sides store and then load what the other stores. Ordered by the fences, at
    /// least one sees the other.
    #[test]
    fn of_a_light_and_a_heavy_side_one_sees_the_other() {
        if !is_available() {
            return;
        }
        const ROUNDS: u32 = 20_000;
        let (mine, theirs) = (AtomicU32::new(0), AtomicU32::new(0));
        let (round, seen) = (AtomicU32::new(0), AtomicU32::new(0));
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut done = 0;
                while !over.load(Ordering::Acquire) {
                    let now = round.load(Ordering::Acquire);
                    if now == done {
                        std::thread::yield_now();
                        continue;
                    }
                    done = now;
                    theirs.store(now, Ordering::Relaxed);
                    light();
                    let found = mine.load(Ordering::Relaxed) == now;
                    seen.store(now << 1 | u32::from(found), Ordering::Release);
                }
            });
            for now in 1..=ROUNDS {
                round.store(now, Ordering::Release);
                mine.store(now, Ordering::Relaxed);
                assert!(heavy());
                let found = theirs.load(Ordering::Relaxed) == now;
                let other = loop {
                    let seen = seen.load(Ordering::Acquire);
                    if seen >> 1 == now {
                        break seen & 1 == 1;
                    }
                    std::thread::yield_now();
                };
                assert!(found || other, "neither saw the other in round {now}");
            }
            over.store(true, Ordering::Release);
        });
    }
}
