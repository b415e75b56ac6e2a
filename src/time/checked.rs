//! A counter that is held against the system's clock while it is read.
//!
//! A counter read is cheap, and on a sound machine exact. It is not sound everywhere: it may step
//! when a virtual machine is moved, restored or resumed, differ between cores, or stop. The
//! system's clock does none of these. Each thread compares the two once in a millisecond in which
//! it reads the counter, and at once when the counter goes back, stands still or leaps. The first
//! disagreement ends the use of the counter in this process: from then on readings are computed
//! from the system's clock, in the same units and without a step.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

/// How long a thread reads the counter before it looks at the system's clock again.
const CHECK_INTERVAL_NS: u64 = 1_000_000;

/// By how much the counter may be off without being found out, far more than a comparison is off
/// by.
const TOLERANCE_NS: u64 = 250_000;

/// Of the time since the last comparison that was kept: 1/1024 of it may be missing. Calibration is
/// good to 10 ppm.
const RATE_TOLERANCE_SHIFT: u32 = 10;

/// How old the kept comparison becomes before a newer one takes its place. Long against the
/// tolerance, so that a counter of a wrong rate is found out.
const COMPARISON_LIFETIME_NS: u64 = 1_000_000_000;

/// How often a counter is read again that shows what it did before: some count in steps of 40 ns,
/// within which a thread reads them several times. Longer than such a step; one that still shows
/// the same is compared.
const REREADINGS: u32 = 64;

/// How precise a comparison must be to be kept.
const PRECISE_NS: u64 = 5_000;

/// What reads the counter and the system's clock. Tests have their own.
pub(super) trait Readings {
    fn counter(&self) -> u64;
    /// After everything before it.
    fn counter_ordered(&self) -> u64;
    fn system_ns(&self) -> u64;
}

/// What one thread has seen of the counter.
#[derive(Debug)]
pub(super) struct Seen {
    /// The reading that was compared with the system's clock. At first one that no counter is near
    /// to.
    checked: Cell<u64>,
    /// The last reading that was given.
    last: Cell<u64>,
}

impl Seen {
    pub(super) const fn new() -> Self {
        Self {
            checked: Cell::new(1 << 63),
            last: Cell::new(0),
        }
    }
}

/// A counter, its rate, and whether it is still believed. One for all threads.
#[derive(Debug)]
pub(super) struct CheckedCounter {
    is_trusted: AtomicBool,
    /// Counter and system's clock at one moment.
    base_ticks: u64,
    base_ns: u64,
    /// Fixed-point numbers with 32 fractional bits.
    nanos_per_tick: u64,
    ticks_per_nano: u64,
    check_interval: u64,
    /// By how much the system's clock had gone ahead of the counter, since `base`, at the
    /// comparison that is kept; and when that was, by the system's clock.
    lead_ns: AtomicI64,
    compared_at_ns: AtomicU64,
}

impl CheckedCounter {
    /// A counter of `frequency` ticks per second that showed `base_ticks` when the system's clock
    /// showed `base_ns`. `None` for a frequency that no counter has.
    #[cfg(any(test, target_arch = "x86_64", target_arch = "aarch64"))]
    pub(super) fn new(base_ticks: u64, base_ns: u64, frequency: u64) -> Option<Self> {
        if !(1_000_000..=1_000_000_000_000).contains(&frequency) {
            return None;
        }
        let per = |a: u64, b: u64| ((u128::from(a) << 32) / u128::from(b)) as u64;
        let ticks_per_nano = per(frequency, 1_000_000_000);
        Some(Self {
            is_trusted: AtomicBool::new(true),
            base_ticks,
            base_ns,
            nanos_per_tick: per(1_000_000_000, frequency),
            ticks_per_nano,
            check_interval: multiply(CHECK_INTERVAL_NS, ticks_per_nano),
            lead_ns: AtomicI64::new(0),
            compared_at_ns: AtomicU64::new(base_ns),
        })
    }

    /// No counter: all readings come from the system's clock, and a tick is a nanosecond.
    pub(super) fn system_only(base_ns: u64) -> Self {
        Self {
            is_trusted: AtomicBool::new(false),
            base_ticks: base_ns,
            base_ns,
            nanos_per_tick: 1 << 32,
            ticks_per_nano: 1 << 32,
            check_interval: CHECK_INTERVAL_NS,
            lead_ns: AtomicI64::new(0),
            compared_at_ns: AtomicU64::new(base_ns),
        }
    }

    #[inline]
    pub(super) fn is_trusted(&self) -> bool {
        // Relaxed: it guards no data. What a thread reads that learns of it late is checked all the
        // same.
        self.is_trusted.load(Ordering::Relaxed)
    }

    pub(super) fn base_ticks(&self) -> u64 {
        self.base_ticks
    }

    pub(super) fn check_interval(&self) -> u64 {
        self.check_interval
    }

    /// Ticks as nanoseconds.
    #[inline]
    pub(super) fn nanos(&self, ticks: u64) -> u64 {
        multiply(ticks, self.nanos_per_tick)
    }

    /// Nanoseconds as ticks.
    #[inline]
    pub(super) fn ticks(&self, nanos: u64) -> u64 {
        multiply(nanos, self.ticks_per_nano)
    }

    /// The present in ticks. Never goes back on one thread.
    #[inline]
    pub(super) fn read(&self, readings: &impl Readings, seen: &Seen) -> u64 {
        if self.is_trusted() {
            self.accept(readings.counter(), readings, seen)
        } else {
            self.read_system(readings, seen)
        }
    }

    /// As `read`, but not before what precedes it has happened.
    #[inline]
    pub(super) fn read_ordered(&self, readings: &impl Readings, seen: &Seen) -> u64 {
        if self.is_trusted() {
            self.accept(readings.counter_ordered(), readings, seen)
        } else {
            self.read_system(readings, seen)
        }
    }

    #[inline]
    fn accept(&self, ticks: u64, readings: &impl Readings, seen: &Seen) -> u64 {
        // Wraps for what lies before the last check: that is no small number either.
        let since = ticks.wrapping_sub(seen.checked.get());
        if since < self.check_interval && ticks > seen.last.get() {
            seen.last.set(ticks);
            ticks
        } else {
            self.look_again(ticks, readings, seen)
        }
    }

    /// Waits for the next step of a counter that shows what was given last, and compares it with
    /// the system's clock if there is none, or if another reason led here.
    #[cold]
    #[inline(never)]
    fn look_again(&self, ticks: u64, readings: &impl Readings, seen: &Seen) -> u64 {
        let last = seen.last.get();
        if ticks == last {
            for _ in 0..REREADINGS {
                let next = readings.counter();
                let since = next.wrapping_sub(seen.checked.get());
                if next > last && since < self.check_interval {
                    seen.last.set(next);
                    return next;
                }
            }
        }
        self.check(readings, seen)
    }

    /// Compares the counter with the system's clock, and gives a reading that may be believed.
    #[cold]
    #[inline(never)]
    pub(super) fn check(&self, readings: &impl Readings, seen: &Seen) -> u64 {
        // ORDERING: comparison. Acquire pairs with the release below: the lead is no older than the
        // time that it is said to be of.
        let compared_at = self.compared_at_ns.load(Ordering::Acquire);
        let lead = self.lead_ns.load(Ordering::Relaxed);
        // Between two readings of the system's clock: however long the thread is kept from running
        // here, no sound counter is convicted.
        let before = readings.system_ns();
        let ticks = readings.counter_ordered();
        let after = readings.system_ns();
        let passed = i128::from(ticks) - i128::from(self.base_ticks);
        let passed = (passed * i128::from(self.nanos_per_tick)) >> 32;
        let expected = i128::from(self.base_ns) + passed + i128::from(lead);
        let early = i128::from(before) - expected;
        let late = expected - i128::from(after);
        let age = after.saturating_sub(compared_at);
        let tolerance = TOLERANCE_NS + (age >> RATE_TOLERANCE_SHIFT);
        if early.max(late) > i128::from(tolerance) {
            self.is_trusted.store(false, Ordering::Relaxed);
            return self.read_system(readings, seen);
        }
        let width = after.saturating_sub(before);
        if age >= COMPARISON_LIFETIME_NS && width <= PRECISE_NS {
            let off = i128::from(before + width / 2) - expected;
            // Within the tolerance of `lead`: far from the ends of its type.
            let lead = lead.saturating_add(off as i64);
            self.lead_ns.store(lead, Ordering::Relaxed);
            // ORDERING: comparison. Release: see the acquire above.
            self.compared_at_ns.store(after, Ordering::Release);
        }
        seen.checked.set(ticks);
        seen.last.set(ticks.max(seen.last.get()));
        seen.last.get()
    }

    #[cold]
    fn read_system(&self, readings: &impl Readings, seen: &Seen) -> u64 {
        // What the counter would show, had it gone on as it was when it was last compared.
        let lead = self.lead_ns.load(Ordering::Relaxed);
        let passed = readings.system_ns().saturating_sub(self.base_ns);
        let ticks = self.ticks(passed.saturating_add_signed(lead.saturating_neg()));
        let ticks = self.base_ticks.saturating_add(ticks);
        seen.last.set(ticks.max(seen.last.get()));
        seen.last.get()
    }
}

/// A number times a fixed-point number with 32 fractional bits.
#[inline]
fn multiply(number: u64, factor: u64) -> u64 {
    let product = (u128::from(number) * u128::from(factor)) >> 32;
    u64::try_from(product).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;
    const HOUR: u64 = 3_600_000 * MS;
    const FREQUENCY: u64 = 2_600_000_000;
    const BASE_TICKS: u64 = 1 << 60;
    const BASE_NS: u64 = 77 * HOUR;

    /// By how much a reading may be off: a leap that is too short to be noticed at once, and the
    /// tolerance.
    const WORST_NS: u64 = CHECK_INTERVAL_NS + 2 * TOLERANCE_NS;

    /// A machine whose time passes when it is told to, and by a little with each look.
    struct Fake {
        /// Nanoseconds since the base.
        time: Cell<u64>,
        /// What a look at either clock takes.
        look: Cell<u64>,
        counter: Cell<u64>,
        /// Parts in a million by which the counter runs fast.
        fast_ppm: Cell<i64>,
        /// How many ticks the counter advances at a time.
        step: Cell<u64>,
        /// Looks at the system's clock.
        system_looks: Cell<u32>,
    }

    impl Fake {
        fn new() -> Self {
            Self {
                time: Cell::new(0),
                look: Cell::new(10),
                counter: Cell::new(BASE_TICKS),
                fast_ppm: Cell::new(0),
                step: Cell::new(1),
                system_looks: Cell::new(0),
            }
        }

        fn pass(&self, ns: u64) {
            self.time.set(self.time.get() + ns);
            let ticks = i128::from(ns) * i128::from(FREQUENCY) / 1_000_000_000;
            let fast = ticks * i128::from(self.fast_ppm.get()) / 1_000_000;
            self.counter.set(self.counter.get() + (ticks + fast) as u64);
        }

        fn step_ns(&self, ns: i64) {
            let ticks = (i128::from(ns) * i128::from(FREQUENCY) / 1_000_000_000) as i64;
            self.counter
                .set(self.counter.get().wrapping_add_signed(ticks));
        }
    }

    impl Readings for Fake {
        fn counter(&self) -> u64 {
            self.pass(self.look.get());
            self.counter.get() - self.counter.get() % self.step.get()
        }

        fn counter_ordered(&self) -> u64 {
            self.counter()
        }

        fn system_ns(&self) -> u64 {
            self.pass(self.look.get());
            self.system_looks.set(self.system_looks.get() + 1);
            BASE_NS + self.time.get()
        }
    }

    fn counter() -> CheckedCounter {
        CheckedCounter::new(BASE_TICKS, BASE_NS, FREQUENCY).unwrap()
    }

    /// What the counter is read as, in nanoseconds since the base.
    fn read(counter: &CheckedCounter, fake: &Fake, seen: &Seen) -> u64 {
        counter.nanos(counter.read(fake, seen) - BASE_TICKS)
    }

    /// Reads often and seldom; every reading is near to the truth, and none goes back.
    fn readings_are_true(counter: &CheckedCounter, fake: &Fake, seen: &Seen) {
        let mut last = 0;
        for pause in [10, 10, 500, 10_000, MS / 2, MS, 20 * MS, 3_000 * MS, 10] {
            for _ in 0..300 {
                fake.pass(pause);
                let now = read(counter, fake, seen);
                let off = now.abs_diff(fake.time.get());
                assert!(off <= WORST_NS, "off by {off} ns");
                assert!(now >= last, "{now} after {last}");
                last = now;
            }
        }
    }

    #[test]
    fn a_sound_counter_is_trusted_and_given_as_it_is() {
        let (fake, seen, counter) = (Fake::new(), Seen::new(), counter());
        readings_are_true(&counter, &fake, &seen);
        fake.look.set(0);
        for pause in [HOUR, 24 * HOUR, 1_000 * HOUR, 10] {
            fake.pass(pause);
            assert_eq!(counter.read(&fake, &seen), fake.counter.get());
        }
        assert!(counter.is_trusted());
    }

    #[test]
    fn a_counter_of_long_steps_is_compared_no_more_often_than_another() {
        let (fake, seen, counter) = (Fake::new(), Seen::new(), counter());
        // 40 ns.
        fake.step.set(104);
        readings_are_true(&counter, &fake, &seen);
        fake.pass(MS);
        counter.read(&fake, &seen);
        fake.system_looks.set(0);
        let begin = fake.time.get();
        while fake.time.get() - begin < MS / 2 {
            counter.read(&fake, &seen);
        }
        assert_eq!(fake.system_looks.get(), 0);
        assert!(counter.is_trusted());
    }

    #[test]
    fn an_error_of_calibration_is_no_disagreement() {
        for fast_ppm in [-50, 50] {
            let (fake, seen, counter) = (Fake::new(), Seen::new(), counter());
            fake.fast_ppm.set(fast_ppm);
            for pause in [10, MS, 1_000 * MS, HOUR, MS, 24 * HOUR, 10] {
                for _ in 0..100 {
                    fake.pass(pause);
                    counter.read(&fake, &seen);
                }
            }
            assert!(counter.is_trusted());
        }
    }

    #[test]
    fn a_thread_that_is_kept_from_running_convicts_no_sound_counter() {
        let (fake, seen, counter) = (Fake::new(), Seen::new(), counter());
        for look in [10, 1_000 * MS, 10, 60_000 * MS, 10] {
            fake.look.set(look);
            for _ in 0..10 {
                counter.read(&fake, &seen);
            }
        }
        assert!(counter.is_trusted());
    }

    #[test]
    fn a_counter_that_steps_is_read_no_more_and_time_goes_on() {
        let hour = HOUR as i64;
        for step in [
            -hour,
            hour,
            -24 * hour,
            24 * hour,
            -(MS as i64),
            3 * MS as i64,
        ] {
            let (fake, seen, counter) = (Fake::new(), Seen::new(), counter());
            readings_are_true(&counter, &fake, &seen);
            assert!(counter.is_trusted());
            let before = read(&counter, &fake, &seen);
            fake.step_ns(step);
            let after = read(&counter, &fake, &seen);
            assert!(!counter.is_trusted(), "{step}");
            assert!(after >= before && after - before < MS, "{step}");
            readings_are_true(&counter, &fake, &seen);
        }
    }

    #[test]
    fn a_counter_that_was_reset_is_read_no_more() {
        for value in [0, 1, u64::MAX, BASE_TICKS] {
            let (fake, seen, counter) = (Fake::new(), Seen::new(), counter());
            fake.pass(100 * MS);
            fake.counter.set(value);
            fake.fast_ppm
                .set(if value == u64::MAX { -1_000_000 } else { 0 });
            readings_are_true(&counter, &fake, &seen);
            assert!(!counter.is_trusted());
        }
    }

    #[test]
    fn a_counter_that_stops_is_read_no_more() {
        let (fake, seen, counter) = (Fake::new(), Seen::new(), counter());
        readings_are_true(&counter, &fake, &seen);
        fake.fast_ppm.set(-1_000_000);
        readings_are_true(&counter, &fake, &seen);
        assert!(!counter.is_trusted());
    }

    #[test]
    fn a_counter_that_changes_its_rate_is_read_no_more() {
        for fast_ppm in [-500_000, -20_000, -3_000, 3_000, 20_000, 1_000_000] {
            let (fake, seen, counter) = (Fake::new(), Seen::new(), counter());
            readings_are_true(&counter, &fake, &seen);
            fake.fast_ppm.set(fast_ppm);
            for _ in 0..10 {
                fake.pass(1_000 * MS);
                counter.read(&fake, &seen);
            }
            assert!(!counter.is_trusted(), "{fast_ppm}");
        }
    }

    #[test]
    fn a_counter_that_differs_between_cores_is_read_no_more() {
        for skew in [50 * MS as i64, -50 * (MS as i64)] {
            let (fake, counter) = (Fake::new(), counter());
            let (here, there) = (Seen::new(), Seen::new());
            fake.pass(5 * MS);
            let sent = read(&counter, &fake, &here);
            // Another thread, on another core.
            fake.step_ns(skew);
            let seen = read(&counter, &fake, &there);
            assert!(seen.abs_diff(sent) < MS, "{sent} and {seen}");
            assert!(!counter.is_trusted());
            fake.step_ns(-skew);
            let back = read(&counter, &fake, &here);
            assert!(back >= sent && back - sent < MS);
        }
    }

    #[test]
    fn a_frequency_that_no_counter_has_is_refused() {
        for frequency in [0, 1, 999_999, u64::MAX] {
            assert!(CheckedCounter::new(BASE_TICKS, BASE_NS, frequency).is_none());
        }
    }

    #[test]
    fn without_a_counter_the_systems_clock_is_read() {
        let (fake, seen) = (Fake::new(), Seen::new());
        let counter = CheckedCounter::system_only(BASE_NS);
        for pause in [10, MS, HOUR] {
            fake.pass(pause);
            assert_eq!(counter.read(&fake, &seen), BASE_NS + fake.time.get());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Steps of all sizes but those that go unnoticed, at any time, seen by several threads.
        #[test]
        fn readings_stay_near_the_truth_and_never_go_back_on_a_thread(
            events in proptest::collection::vec(
                (0_usize..3, 0_u64..5 * MS, prop_oneof![
                    9 => Just(0_i64),
                    1 => -(HOUR as i64)..-(MS as i64),
                    1 => 3 * MS as i64..HOUR as i64,
                ]),
                1..200,
            ),
        ) {
            let (fake, counter) = (Fake::new(), counter());
            let threads: [Seen; 3] = std::array::from_fn(|_| Seen::new());
            let mut last = [0; 3];
            for (thread, pause, step) in events {
                fake.pass(pause);
                fake.step_ns(step);
                let now = read(&counter, &fake, &threads[thread]);
                prop_assert!(now >= last[thread]);
                prop_assert!(now.abs_diff(fake.time.get()) <= WORST_NS);
                last[thread] = now;
            }
        }
    }
}
