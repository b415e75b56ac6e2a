//! A device's clock against the host's.
//!
//! The device's clock is read between two readings of the host's: this bounds the error whatever the device is (Cristian, "Probabilistic clock
//! synchronization", 1989). Two such readings give the rate; units need not be known.
//!
//! Nobody promises how the clock that device code reads relates to anything that a driver tells. CUDA has no call that would tell
//! `globaltimer`: there the running kernel itself is asked. Vulkan's calibrated timestamps speak of the clock of its timestamp queries, not of
//! that of its shaders: whether these are one is tried before the driver is asked in the kernel's place.

/// Brackets that are kept. When there are more, every other one goes, so that they span the kernel's whole life.
const MOST_BRACKETS: usize = 64;

/// One reading of the device's clock, taken after the host's clock showed `before_ns` and before it showed `after_ns`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bracket {
    pub(crate) before_ns: u64,
    pub(crate) ticks: u64,
    pub(crate) after_ns: u64,
}

impl Bracket {
    /// Between the two readings of the host.
    pub(crate) const fn width_ns(&self) -> u64 {
        self.after_ns.saturating_sub(self.before_ns)
    }

    /// What the host's clock showed at the reading, to half the width.
    const fn middle_ns(&self) -> u64 {
        self.before_ns + self.width_ns() / 2
    }

    const fn error_ns(&self) -> u64 {
        self.width_ns().div_ceil(2)
    }
}

/// A time of the device, on the host's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostTime {
    pub(crate) ns: u64,
    /// By how much it may be off, in either direction.
    pub(crate) error_ns: u64,
}

/// What is known of a device's clock: brackets in the order of time.
#[derive(Debug, Default)]
pub(crate) struct DeviceClock {
    brackets: Vec<Bracket>,
    /// The last reading, and the greatest common divisor of all differences between readings: no less than the steps in which the
    /// clock goes on, some of which are microseconds.
    last: Option<u64>,
    step: u64,
    /// Whether the steps were known beforehand: then readings say nothing of them.
    is_step_known: bool,
}

impl DeviceClock {
    /// A clock whose steps are known.
    pub(crate) fn with_step(step: u64) -> Self {
        Self {
            step,
            is_step_known: true,
            ..Self::default()
        }
    }

    /// Learns from a reading in what steps the clock goes on.
    pub(crate) fn observe(&mut self, ticks: u64) {
        if self.is_step_known {
            return;
        }
        if let Some(last) = self.last.replace(ticks) {
            let (mut a, mut b) = (self.step, ticks.abs_diff(last));
            while b != 0 {
                (a, b) = (b, a % b);
            }
            self.step = a;
        }
    }

    /// Takes a bracket in that is later than those before it. One that shows that the clock went backwards, or stood still for longer than the
    /// brackets are wide, begins anew: nothing before it can be placed any more.
    pub(crate) fn add(&mut self, bracket: Bracket) {
        self.observe(bracket.ticks);
        if let Some(last) = self.brackets.last()
            && bracket.ticks <= last.ticks
        {
            self.brackets.clear();
        }
        if self.brackets.len() == MOST_BRACKETS {
            let mut index = 0;
            self.brackets.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
        self.brackets.push(bracket);
    }

    /// What the host's clock showed when the device's showed `ticks`: on the line through the two
    /// brackets around it, or through the nearest two. `None` before there are two, and where
    /// readings are so far apart that nothing can be said.
    pub(crate) fn host_time(&self, ticks: u64) -> Option<HostTime> {
        let later = self
            .brackets
            .partition_point(|bracket| bracket.ticks <= ticks)
            .clamp(
                1,
                self.brackets
                    .len()
                    .checked_sub(1)
                    .filter(|last| *last > 0)?,
            );
        let (a, b) = (self.brackets.get(later - 1)?, self.brackets.get(later)?);
        // Differences of clocks over a kernel's life. In 128 bits their products do not overflow,
        // unless a device tells anything.
        let of = |value: u64, from: u64| i128::from(value) - i128::from(from);
        let (at, span) = (of(ticks, a.ticks), of(b.ticks, a.ticks).max(1));
        let passed = of(b.middle_ns(), a.middle_ns());
        let ns = i128::from(a.middle_ns()) + passed.checked_mul(at)? / span;
        let ns = u64::try_from(ns).ok()?;
        // The clock shows the last of its steps, which take no longer than the steepest line that the brackets allow says.
        let ticks = i128::from(self.step.max(1));
        let most = passed + i128::from(a.error_ns()) + i128::from(b.error_ns()) + 1;
        let step = ticks.checked_mul(most)? / (span - ticks).max(1) + 1;
        let step = u64::try_from(step).ok()?;
        // A line through two points that are off by so much is off by no more than this between them, and by more and more beyond.
        let part = |weight: i128, error: u64| {
            let error = u128::from(error) + u128::from(step);
            weight.unsigned_abs().checked_mul(error)
        };
        let error = part(span - at, a.error_ns())?.checked_add(part(at, b.error_ns())?)?;
        let error = error.div_ceil(span.unsigned_abs()) + u128::from(step);
        Some(HostTime {
            ns,
            // One more for what was rounded off.
            error_ns: u64::try_from(error).ok()?.saturating_add(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn exact(ns: u64, ticks: u64) -> Bracket {
        Bracket {
            before_ns: ns,
            ticks,
            after_ns: ns,
        }
    }

    #[test]
    fn one_bracket_places_nothing_and_two_do() {
        let mut clock = DeviceClock::default();
        assert_eq!(clock.host_time(5), None);
        clock.add(exact(1000, 50));
        assert_eq!(clock.host_time(50), None);
        clock.add(exact(3000, 150));
        for (ticks, ns) in [(50, 1000), (100, 2000), (150, 3000), (151, 3020), (10, 200)] {
            assert_eq!(clock.host_time(ticks).unwrap().ns, ns);
        }
        // Before time began.
        assert_eq!(clock.host_time(0).unwrap().ns, 0);
        clock.add(exact(3001, 10_000));
        assert_eq!(clock.host_time(0).unwrap().ns, 0);
    }

    #[test]
    fn a_clock_of_coarse_steps_is_known_by_its_readings() {
        let mut clock = DeviceClock::default();
        for reading in [3, 5, 10, 14, 15] {
            clock.observe(reading * 1024 + 7);
        }
        assert_eq!(clock.step, 1024);
        // Both ends may be a step off, and so may the time itself.
        clock.add(exact(10_000_000, 20 * 1024 + 7));
        clock.add(exact(20_000_000, 30 * 1024 + 7));
        let time = clock.host_time(25 * 1024 + 7).unwrap();
        assert_eq!(time.ns, 15_000_000);
        assert_eq!(time.error_ns / 1_000_000, 2);
    }

    #[test]
    fn steps_that_are_known_are_not_learnt() {
        let mut clock = DeviceClock::with_step(1000);
        clock.add(exact(10_000_000, 20_001));
        clock.add(exact(20_000_000, 30_002));
        clock.observe(5);
        assert_eq!(clock.step, 1000);
        let error_ns = clock.host_time(25_000).unwrap().error_ns;
        assert!(error_ns > 2_000_000, "{error_ns}");
    }

    #[test]
    fn a_clock_that_goes_backwards_is_learnt_anew() {
        let mut clock = DeviceClock::default();
        clock.add(exact(1000, 50));
        clock.add(exact(3000, 150));
        clock.add(exact(4000, 20));
        assert_eq!(clock.host_time(100), None);
        clock.add(exact(5000, 21));
        assert_eq!(clock.host_time(21).unwrap().ns, 5000);
    }

    #[test]
    fn brackets_are_bounded_and_reach_from_the_first_to_the_last() {
        let mut clock = DeviceClock::default();
        for at in 1..10_000 {
            // A clock that is not steady: it is its neighbours that place a time.
            clock.add(exact(at * 1000 + at / 100, at * 10));
            assert!(clock.brackets.len() <= MOST_BRACKETS);
        }
        assert_eq!(clock.brackets.first(), Some(&exact(1000, 10)));
        assert_eq!(clock.host_time(99_990).unwrap().ns, 9_999_099);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// A device may tell anything.
        #[test]
        fn no_reading_is_too_absurd(
            brackets in proptest::collection::vec(any::<[u64; 3]>(), 1..6),
            asked in any::<u64>(),
            step in any::<u64>(),
            is_step_known in any::<bool>(),
        ) {
            let mut clock = DeviceClock::default();
            if is_step_known {
                clock = DeviceClock::with_step(step);
            }
            for [before_ns, ticks, after_ns] in brackets {
                clock.add(Bracket { before_ns, ticks, after_ns });
                let _ = clock.host_time(asked);
                let _ = clock.host_time(ticks);
            }
        }

        /// A device whose clock has any offset and rate is read between readings of the host, anywhere between them.
        #[test]
        fn the_error_is_no_larger_than_it_says(
            offset in 0_u64..1 << 60,
            ticks_per_second in 1_000_000_u64..5_000_000_000,
            readings in proptest::collection::vec((1_u64..50_000_000, 0_u64..20_000, 0_u64..20_000), 2..8),
            share in 0_u64..1_500,
            step in 1_u64..5000,
        ) {
            const BEGIN: u64 = 1_790_000_000_000_000_000;
            let ticks_at = |ns: u64| {
                let passed = u128::from(ns - BEGIN) * u128::from(ticks_per_second) / 1_000_000_000;
                offset + passed as u64 / step * step
            };
            let mut clock = DeviceClock::default();
            let (mut now, mut last) = (BEGIN, 0);
            for (pause, before, after) in readings {
                now += pause + before;
                prop_assume!(ticks_at(now) > last);
                last = ticks_at(now);
                clock.add(Bracket { before_ns: now - before, ticks: last, after_ns: now + after });
                now += after;
            }
            // Up to half as long again behind the last reading.
            let truth = BEGIN + (now - BEGIN) * share / 1000;
            let time = clock.host_time(ticks_at(truth)).unwrap();
            let off = time.ns.abs_diff(truth);
            prop_assert!(off <= time.error_ns, "off by {off}: {time:?}");
        }
    }
}
