//! When a device that answers late counts as one that never will.
//!
//! A driver that gets no processor time is late, and so is a device that other processes use:
//! neither is lost. A device counts as lost when its driver says so, or when nothing of its running
//! kernels has changed for long: no sign of life, no message, no new slice.

use std::time::{Duration, Instant};

/// How long nothing may change if the configuration does not say: on hardware, and on a driver that
/// shares this machine's cores with everything else.
const HARDWARE_LIMIT: Duration = Duration::from_secs(10);
const SOFTWARE_LIMIT: Duration = Duration::from_secs(30);

/// How long the end of a device waits at least, whatever the termination timeout is.
const SHORTEST_CLOSING: Duration = Duration::from_secs(2);

/// Most that one look adds. A thread that looks late had no processor time either, and the process
/// may have been stopped.
const MOST_PER_LOOK: Duration = Duration::from_millis(100);

/// What the end of a device's thread may take beyond that.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a device may show no progress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StallLimits {
    configured: Option<Duration>,
    termination_timeout: Duration,
}

impl StallLimits {
    /// `configured` is [`RuntimeConfig::stall_timeout`](crate::RuntimeConfig::stall_timeout).
    pub(crate) fn new(configured: Option<Duration>, termination_timeout: Duration) -> Self {
        Self {
            configured,
            termination_timeout,
        }
    }

    /// Until the device counts as lost; `software` for one that runs on this machine's cores.
    pub(crate) fn in_use(&self, software: bool) -> Duration {
        self.configured.unwrap_or(match software {
            true => SOFTWARE_LIMIT,
            false => HARDWARE_LIMIT,
        })
    }

    /// Until it is left behind once it is to be closed, or is lost.
    pub(crate) fn closing(&self, software: bool) -> Duration {
        let closing = self.termination_timeout.max(SHORTEST_CLOSING);
        closing.min(self.in_use(software))
    }

    /// How long the end of a device's thread is waited for. Far longer than the thread takes to
    /// leave a device that does nothing behind: only a driver's call, or the destructor of a
    /// thread-local value, takes longer.
    pub(crate) fn thread_end(&self) -> Duration {
        let longest = self.closing(true).max(self.closing(false));
        END_TIMEOUT.saturating_add(longest.saturating_mul(4))
    }
}

/// For how long nothing has changed, as a thread finds that looks every few milliseconds.
#[derive(Debug)]
pub(crate) struct Stall {
    /// What was last seen: a number that changes with every progress.
    life: u32,
    looked: Instant,
    quiet: Duration,
}

impl Stall {
    pub(crate) fn new(life: u32, now: Instant) -> Self {
        Self {
            life,
            looked: now,
            quiet: Duration::ZERO,
        }
    }

    /// For how long nothing has changed, going by the looks at it: a pause between two looks counts
    /// little.
    pub(crate) fn look(&mut self, life: u32, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.looked);
        self.looked = now;
        if life == self.life {
            self.quiet += passed.min(MOST_PER_LOOK);
        } else {
            self.life = life;
            self.quiet = Duration::ZERO;
        }
        self.quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_however_slow_is_no_stall() {
        let mut now = Instant::now();
        let mut stall = Stall::new(0, now);
        for look in 1..10_000 {
            now += Duration::from_millis(50);
            // Every five seconds.
            assert!(stall.look(look / 100, now) < Duration::from_secs(6));
        }
        for _ in 0..100 {
            now += Duration::from_millis(50);
            stall.look(99, now);
        }
        assert!(stall.look(99, now) >= Duration::from_secs(5));
    }

    /// As after a stop of the process, or a suspension of the machine.
    #[test]
    fn one_late_look_decides_nothing() {
        let begin = Instant::now();
        let mut stall = Stall::new(7, begin);
        let late = begin + Duration::from_secs(3600);
        assert!(stall.look(7, late) <= MOST_PER_LOOK);
        // Nor does a clock that goes backwards.
        assert!(stall.look(7, begin) <= MOST_PER_LOOK);
    }

    #[test]
    fn limits_are_as_documented() {
        let limits = |configured, termination| {
            StallLimits::new(configured, Duration::from_millis(termination))
        };
        assert_eq!(limits(None, 100).in_use(false), Duration::from_secs(10));
        assert_eq!(limits(None, 100).in_use(true), Duration::from_secs(30));
        assert_eq!(limits(None, 100).closing(true), Duration::from_secs(2));
        assert_eq!(limits(None, 5000).closing(true), Duration::from_secs(5));
        let second = Duration::from_secs(1);
        assert_eq!(limits(Some(second), 5000).in_use(true), second);
        assert_eq!(limits(Some(second), 5000).closing(false), second);
    }
}
