//! Points in time at which waits end.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use super::clock::{clock, ticks};

/// Before this part of a timeout has passed, only the counter is read. The rest is room for an
/// error of its rate, and for a system's clock that is slewed.
const LAST_PART: u32 = 8;

/// A point in time at which a wait ends. It has passed when the system's monotonic clock says so:
/// no wait ends early. Earlier looks read the counter, which is cheaper.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// On the system's monotonic clock. `None` is "never".
    until: Option<Instant>,
    /// When it becomes worth while to look at that clock, on the counter.
    look_at: u64,
}

impl Deadline {
    /// `timeout` from now. A timeout beyond what the system's clock can express (at least 292
    /// years) means "never".
    #[inline]
    #[must_use]
    pub fn after(timeout: Duration) -> Self {
        let now = ticks();
        let nanos = timeout - timeout / LAST_PART;
        let nanos = u64::try_from(nanos.as_nanos()).unwrap_or(u64::MAX);
        Self {
            until: Instant::now().checked_add(timeout),
            look_at: now.saturating_add(clock().counter.ticks(nanos)),
        }
    }

    /// Whether the deadline has passed. One counter read, and one look at the system's clock in the
    /// last eighth of the timeout.
    #[inline]
    #[must_use]
    pub fn has_passed(&self) -> bool {
        ticks() >= self.look_at && self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// Time left, zero once it has passed; 584 years for "never". One look at the system's clock.
    #[inline]
    #[must_use]
    pub fn remaining(&self) -> Duration {
        const LONGEST: Duration = Duration::from_nanos(u64::MAX);
        self.until.map_or(LONGEST, |until| {
            until.saturating_duration_since(Instant::now()).min(LONGEST)
        })
    }
}

/// The deadline that passes first is the lesser; "never" is the greatest.
impl Ord for Deadline {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |deadline: &Self| (deadline.until.is_none(), deadline.until);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Deadline {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Deadline {
    fn eq(&self, other: &Self) -> bool {
        self.until == other.until
    }
}

impl Eq for Deadline {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_passes_and_reports_what_is_left() {
        let deadline = Deadline::after(Duration::from_secs(3600));
        assert!(!deadline.has_passed());
        let left = deadline.remaining().as_secs();
        assert!((3500..=3600).contains(&left), "{left}");
        assert!(Deadline::after(Duration::ZERO).has_passed());
        assert_eq!(Deadline::after(Duration::ZERO).remaining(), Duration::ZERO);
    }

    #[test]
    fn the_longest_timeouts_never_pass() {
        for timeout in [
            Duration::MAX,
            Duration::from_secs(u64::MAX),
            Duration::from_nanos(u64::MAX),
        ] {
            let deadline = Deadline::after(timeout);
            assert!(!deadline.has_passed());
            assert!(deadline.remaining() > Duration::from_secs(500 * 365 * 86_400));
        }
    }

    #[test]
    fn deadlines_are_in_the_order_in_which_they_pass() {
        let soon = Deadline::after(Duration::from_secs(1));
        let late = Deadline::after(Duration::from_secs(2));
        let never = Deadline::after(Duration::MAX);
        assert!(soon < late && late < never && soon < never);
        assert!(soon == soon && never == Deadline::after(Duration::MAX));
        assert_ne!(soon, late);
    }

    #[test]
    fn a_deadline_passes_no_earlier_than_the_systems_clock_says() {
        for micros in [1, 10, 100, 1_000, 10_000] {
            let timeout = Duration::from_micros(micros);
            let begin = Instant::now();
            let deadline = Deadline::after(timeout);
            while !deadline.has_passed() {
                std::hint::spin_loop();
            }
            assert!(begin.elapsed() >= timeout);
        }
    }
}
