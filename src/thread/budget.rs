//! How many threads of this process may spin at once without one having to wait for another: the cores that it may use,
//! or the processor time that its control groups allow, whichever is less.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{affinity, quota};

/// One more than the budget; 0 until the first look.
static BUDGET: AtomicUsize = AtomicUsize::new(0);

/// Threads that may spin at once. One load, but for the first call.
#[inline]
pub(super) fn spinners() -> usize {
    match BUDGET.load(Ordering::Relaxed) {
        0 => refresh(),
        more => more - 1,
    }
}

/// Asks the system again. Reads files; for the control plane only.
pub(crate) fn refresh() -> usize {
    let budget = limited(affinity::usable_cores().len().max(1), quota::cpu_quota());
    BUDGET.store(budget + 1, Ordering::Relaxed);
    budget
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
        assert!(spinners() <= affinity::usable_cores().len().max(1));
    }
}
