//! Whether a thread that spins gets on, and how long it does without when it does not.
//!
//! A thread that spins on a core that others want is charged for it: the scheduler takes the core
//! away for milliseconds, and a message that comes meanwhile waits. One that sleeps is given the
//! core within microseconds. A spinning thread notices by the clock: looks that follow each other
//! within 100 us are suddenly a millisecond apart. It then parks for a while, and tries again; each
//! time that this fails soon, the pause doubles. It is twenty times as long at least as the thread
//! was not running, so that on a busy machine trying takes a small part of the time.

/// Time between two looks that says that the thread was not running. The shortest slice of Linux's
/// scheduler is above it, interrupts are below it.
const GAP_NS: u64 = 500_000;

/// How long a thread parks the first time.
const FIRST_PAUSE_NS: u64 = 10_000_000;

/// How long a thread parks at least, in multiples of the time that it was not running.
const TIMES_GAP: u64 = 20;

/// How long at most.
const LONGEST_PAUSE_NS: u64 = 5_000_000_000;

/// A thread that spun so many times as long as it had paused before it was disturbed begins with
/// the first pause again.
const TIMES_PAUSE: u64 = 4;

/// Of one thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpinWatch {
    /// When it last looked; 0 if the time until now does not count.
    looked_ns: u64,
    /// How long it has spun since its last pause.
    spun_ns: u64,
    /// How long it was not running when it last did not get on.
    gap_ns: u64,
    paused_at_ns: u64,
    pause_ns: u64,
}

impl SpinWatch {
    pub(crate) const fn new() -> Self {
        Self {
            looked_ns: 0,
            spun_ns: 0,
            gap_ns: 0,
            paused_at_ns: 0,
            pause_ns: 0,
        }
    }

    /// Begins to watch: the thread did something else until now.
    #[inline]
    pub(crate) fn begin(&mut self, now_ns: u64) {
        self.looked_ns = now_ns;
    }

    /// Whether the thread ran since it last looked.
    #[inline]
    #[must_use]
    pub(crate) fn gets_on(&mut self, now_ns: u64) -> bool {
        // A clock that was set back says nothing.
        let gap = now_ns.saturating_sub(self.looked_ns);
        self.looked_ns = now_ns;
        if gap < GAP_NS {
            self.spun_ns = self.spun_ns.saturating_add(gap);
            return true;
        }
        self.gap_ns = gap;
        false
    }

    /// The thread parks from now on.
    pub(crate) fn pause(&mut self, now_ns: u64) {
        self.pause_ns = if self.spun_ns >= self.pause_ns.saturating_mul(TIMES_PAUSE) {
            FIRST_PAUSE_NS
        } else {
            self.pause_ns.saturating_mul(2).min(LONGEST_PAUSE_NS)
        };
        let gap_ns = std::mem::take(&mut self.gap_ns);
        self.pause_ns = self
            .pause_ns
            .max(gap_ns.saturating_mul(TIMES_GAP))
            .min(LONGEST_PAUSE_NS);
        self.paused_at_ns = now_ns;
        self.spun_ns = 0;
    }

    /// Whether the thread may spin: it never paused, or has done so for long enough.
    #[must_use]
    pub(crate) fn may_spin(&self, now_ns: u64) -> bool {
        // So does one that paused in what a clock that was set back takes for the future.
        now_ns.abs_diff(self.paused_at_ns) >= self.pause_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Spins from `now` on, looking every 50 us, until the thread is stopped for 3 ms after
    /// `for_ns`.
    fn spin(watch: &mut SpinWatch, mut now: u64, for_ns: u64) -> u64 {
        let end = now + for_ns;
        watch.begin(now);
        while now < end {
            now += MS / 20;
            assert!(watch.gets_on(now));
        }
        now += 3 * MS;
        assert!(!watch.gets_on(now));
        watch.pause(now);
        now
    }

    #[test]
    fn a_thread_that_never_gets_on_spins_ever_more_rarely() {
        let mut watch = SpinWatch::new();
        let (mut now, mut spun) = (1_000_000 * MS, 0);
        let end = now + 10_000 * MS;
        while now < end {
            assert!(watch.may_spin(now));
            now = spin(&mut watch, now, 3 * MS);
            spun += 6 * MS;
            while !watch.may_spin(now) {
                now += MS;
            }
        }
        assert!(spun < 100 * MS, "spun for {spun} of 10e9 ns");
        assert!(watch.pause_ns <= LONGEST_PAUSE_NS);
    }

    #[test]
    fn a_thread_that_was_stopped_for_long_parks_much_longer() {
        let mut watch = SpinWatch::new();
        watch.begin(1000 * MS);
        assert!(!watch.gets_on(1040 * MS));
        watch.pause(1040 * MS);
        assert!(!watch.may_spin(1040 * MS + 20 * 40 * MS - 1));
        assert!(watch.may_spin(1040 * MS + 20 * 40 * MS));
    }

    #[test]
    fn a_thread_that_is_rarely_disturbed_spins_nearly_always() {
        let mut watch = SpinWatch::new();
        let (mut now, mut paused) = (1_000_000 * MS, 0);
        for _ in 0..20 {
            now = spin(&mut watch, now, 500 * MS);
            let stopped = now;
            while !watch.may_spin(now) {
                now += MS;
            }
            paused += now - stopped;
        }
        // A pause each, after 3 ms.
        assert!(paused <= 20 * 61 * MS, "paused for {paused} ns");
    }

    #[test]
    fn a_clock_that_steps_neither_stops_a_thread_nor_keeps_it_parked() {
        let mut watch = SpinWatch::new();
        let hour = 3_600_000 * MS;
        watch.begin(10 * hour);
        assert!(watch.gets_on(9 * hour));
        assert!(watch.gets_on(9 * hour + MS / 10));
        // Forward it looks like a long stop: one pause.
        assert!(!watch.gets_on(11 * hour));
        watch.pause(11 * hour);
        assert!(!watch.may_spin(11 * hour + MS));
        assert!(watch.may_spin(11 * hour + LONGEST_PAUSE_NS));
        assert!(watch.may_spin(10 * hour));
    }
}
