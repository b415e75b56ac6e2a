//! How many threads of this process may spin at once without one having to wait for another: the
//! cores that it may use, or the processor time that its control groups allow, whichever is less.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{affinity, quota};
use crate::time;

/// How long an answer holds for threads that ask again while kernels run: quotas change by hand.
const HOLDS_FOR_NS: u64 = 1_000_000_000;

/// One more than the budget; 0 until the first look.
static BUDGET: AtomicUsize = AtomicUsize::new(0);

/// The cores that it was last reckoned with.
static CORES: AtomicUsize = AtomicUsize::new(1);

/// When it was last looked at, in nanoseconds since the Unix epoch.
static LOOKED_NS: AtomicU64 = AtomicU64::new(0);

/// Threads that may spin at once. One load, but for the first call.
#[inline]
pub(super) fn spinners() -> usize {
    match BUDGET.load(Ordering::Relaxed) {
        0 => refresh(),
        more => more - 1,
    }
}

/// Asks the system again. Reads files, and may start a thread; for the control plane only.
pub(crate) fn refresh() -> usize {
    CORES.store(affinity::usable_cores().len().max(1), Ordering::Relaxed);
    refresh_quota()
}

fn refresh_quota() -> usize {
    LOOKED_NS.store(time::now_ns(), Ordering::Relaxed);
    let budget = limited(CORES.load(Ordering::Relaxed), quota::cpu_quota());
    BUDGET.store(budget + 1, Ordering::Relaxed);
    budget
}

/// Asks for the quota again unless that was done within the last second. Reads files; for threads
/// that have just not got on for longer than that takes.
pub(super) fn refresh_if_old() {
    let (now, looked) = (time::now_ns(), LOOKED_NS.load(Ordering::Relaxed));
    // A clock that was set back makes it old as well.
    if now.abs_diff(looked) >= HOLDS_FOR_NS {
        refresh_quota();
    }
}

/// A thread that spins uses all of its time, so parts of a core do not count.
fn limited(cores: usize, quota: Option<f64>) -> usize {
    // A conversion that exceeds the range gives its largest number.
    quota.map_or(cores, |quota| cores.min(quota as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_core_is_none_to_spin_on() {
        assert_eq!(limited(8, None), 8);
        assert_eq!(limited(8, Some(0.5)), 0);
        assert_eq!(limited(8, Some(2.9)), 2);
        assert_eq!(limited(2, Some(64.0)), 2);
        assert_eq!(limited(2, Some(f64::INFINITY)), 2);
    }

    #[test]
    fn the_budget_is_at_most_the_usable_cores() {
        assert!(refresh() <= affinity::usable_cores().len().max(1));
        refresh_if_old();
        assert!(spinners() <= affinity::usable_cores().len().max(1));
    }
}
