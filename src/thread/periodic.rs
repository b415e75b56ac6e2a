//! Loops that do something every so often, on time.
//!
//! ```
//! use std::time::Duration;
//! use ringkernel::thread::periodic::{Overrun, Periodic};
//!
//! let mut control = Periodic::every(Duration::from_millis(1)).overrun(Overrun::Skip).start()?;
//! for _ in 0..5 {
//!     let tick = control.wait()?;
//!     // What is to be done in each period.
//!     assert!(tick.lateness < Duration::from_secs(10));
//! }
//! println!("{}", control.report());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::error::Error;

/// Longest lateness that is told apart from longer ones, in nanoseconds: a minute.
const LATEST_NS: u64 = 60_000_000_000;

/// Significant digits of the histogram.
const DIGITS: u8 = 3;

/// Bounds of a period.
const SHORTEST: Duration = Duration::from_micros(10);
const LONGEST: Duration = Duration::from_secs(86_400);

#[cfg(target_os = "linux")]
const NS_PER_SECOND: u64 = 1_000_000_000;

/// What happens when a round took so long that its successor's time has passed already, by one period at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overrun {
    /// The periods that were missed are left out; the next round begins at the next multiple of the period.
    #[default]
    Skip,
    /// They are made up for: rounds follow one another without a pause until the loop is on time again.
    CatchUp,
    /// The loop ends: [`PeriodicLoop::wait`] returns [`Missed`].
    Abort,
}

/// How a loop waits for its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeriodicWait {
    /// Asleep until the deadline: late by what the system takes to wake a thread.
    Sleep,
    /// Asleep until so long before the deadline, then looking at the clock without pause: takes the core for that long in each period.
    SleepThenSpin(Duration),
    /// Looking at the clock without pause: takes the core.
    Spin,
}

/// A period, and how to keep it; [`start`](Self::start) begins.
#[derive(Clone, Copy, Debug)]
#[must_use = "it starts nothing by itself"]
pub struct Periodic {
    period: Duration,
    overrun: Overrun,
    wait: PeriodicWait,
}

impl Periodic {
    /// One round in each `period`, 10 us to a day.
    pub fn every(period: Duration) -> Self {
        Self {
            period,
            overrun: Overrun::default(),
            wait: PeriodicWait::Sleep,
        }
    }

    /// What happens when rounds take too long. Default: the missed ones are left out.
    pub fn overrun(mut self, overrun: Overrun) -> Self {
        self.overrun = overrun;
        self
    }

    /// How to wait. Default: asleep.
    pub fn wait(mut self, wait: PeriodicWait) -> Self {
        self.wait = wait;
        self
    }

    /// Begins: the first round is due one period from now. Allocates, so that no round has to.
    ///
    /// # Errors
    /// `InvalidOption`: a period out of its range, or a spin longer than the period.
    pub fn start(self) -> Result<PeriodicLoop, Error> {
        let invalid = |option, reason| Err(Error::InvalidOption { option, reason });
        if !(SHORTEST..=LONGEST).contains(&self.period) {
            let reason = format!("{:?} is not within 10 us to a day", self.period);
            return invalid("period", reason);
        }
        if let PeriodicWait::SleepThenSpin(spin) = self.wait
            && spin > self.period
        {
            let reason = format!("{spin:?} exceeds the period of {:?}", self.period);
            return invalid("spin", reason);
        }
        let lateness = Histogram::new_with_bounds(1, LATEST_NS, DIGITS).map_err(|error| {
            Error::InvalidOption {
                option: "period",
                reason: error.to_string(),
            }
        })?;
        let period_ns = self.period.as_nanos() as u64;
        Ok(PeriodicLoop {
            settings: self,
            period_ns,
            due_ns: clock_ns().saturating_add(period_ns),
            report: PeriodicReport {
                period: self.period,
                rounds: 0,
                overruns: 0,
                skipped: 0,
                lateness,
            },
        })
    }
}

/// A round that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// Counts rounds from 0, those included that were left out.
    pub index: u64,
    /// How long after its time the round began, or after that of the first one that was left out before it.
    pub lateness: Duration,
    /// Rounds that were left out before it.
    pub skipped: u64,
}

/// A round of a loop with [`Overrun::Abort`] came too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missed {
    /// The round.
    pub index: u64,
    /// How long after its time.
    pub lateness: Duration,
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "round {} came {:?} after its time",
            self.index, self.lateness
        )
    }
}

impl std::error::Error for Missed {}

/// How a loop did.
#[derive(Clone, Debug)]
pub struct PeriodicReport {
    /// The period.
    pub period: Duration,
    /// Rounds that began.
    pub rounds: u64,
    /// Those of them that were due a period before, or longer.
    pub overruns: u64,
    /// Rounds that were left out.
    pub skipped: u64,
    lateness: Histogram<u64>,
}

impl PeriodicReport {
    /// How late rounds began: a quantile of it, 0 to 1, to three significant digits, at most a minute.
    #[must_use]
    pub fn lateness(&self, quantile: f64) -> Duration {
        Duration::from_nanos(self.lateness.value_at_quantile(quantile))
    }

    /// How late the latest round began, likewise.
    #[must_use]
    pub fn latest(&self) -> Duration {
        Duration::from_nanos(self.lateness.max())
    }
}

impl fmt::Display for PeriodicReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rounds every {:?}: late by {:?} (p50), {:?} (p99), {:?} (p99.9), {:?} (max); {} overruns, {} left out",
            self.rounds,
            self.period,
            self.lateness(0.5),
            self.lateness(0.99),
            self.lateness(0.999),
            self.latest(),
            self.overruns,
            self.skipped
        )
    }
}

/// A loop that runs. Deadlines are absolute: what a round takes does not shift the ones after it.
#[derive(Debug)]
pub struct PeriodicLoop {
    settings: Periodic,
    period_ns: u64,
    /// When the next round is due, on the monotonic clock.
    due_ns: u64,
    report: PeriodicReport,
}

impl PeriodicLoop {
    /// Waits until the next round is due. At most a period, or not at all if its time has passed. Neither allocates nor locks; one
    /// system call a round unless it spins.
    ///
    /// # Errors
    /// [`Missed`], with [`Overrun::Abort`], if the round is due a period before or longer. The loop may go on: that round is left out.
    #[inline]
    pub fn wait(&mut self) -> Result<Tick, Missed> {
        let due = self.due_ns;
        match self.settings.wait {
            PeriodicWait::Sleep => sleep_until(due),
            PeriodicWait::SleepThenSpin(spin) => {
                sleep_until(due.saturating_sub(spin.as_nanos() as u64));
                spin_until(due);
            }
            PeriodicWait::Spin => spin_until(due),
        }
        self.begin(due, clock_ns())
    }

    /// Takes note of a round that was due then and begins now.
    fn begin(&mut self, due: u64, now: u64) -> Result<Tick, Missed> {
        let late_ns = now.saturating_sub(due);
        let missed = late_ns / self.period_ns;
        let index = self.report.rounds + self.report.skipped;
        if missed > 0 {
            self.report.overruns += 1;
        }
        self.report.lateness.saturating_record(late_ns.max(1));
        let lateness = Duration::from_nanos(late_ns);
        if missed == 0 || self.settings.overrun == Overrun::CatchUp {
            self.report.rounds += 1;
            self.due_ns = due.saturating_add(self.period_ns);
            return Ok(Tick {
                index,
                lateness,
                skipped: 0,
            });
        }
        // This round takes the place of the last one whose time has passed.
        self.report.skipped += missed;
        self.due_ns = due.saturating_add((missed + 1).saturating_mul(self.period_ns));
        if self.settings.overrun == Overrun::Abort {
            self.report.skipped += 1;
            return Err(Missed { index, lateness });
        }
        self.report.rounds += 1;
        Ok(Tick {
            index: index + missed,
            lateness,
            skipped: missed,
        })
    }

    /// How it has done so far.
    #[must_use]
    pub fn report(&self) -> &PeriodicReport {
        &self.report
    }

    /// Ends it.
    #[must_use]
    pub fn into_report(self) -> PeriodicReport {
        self.report
    }
}

fn spin_until(due: u64) {
    while clock_ns() < due {
        std::hint::spin_loop();
    }
}

/// The monotonic clock, which `sleep_until` goes by as well.
#[cfg(target_os = "linux")]
#[inline]
fn clock_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a local; the clock is always there.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    (now.tv_sec as u64)
        .wrapping_mul(NS_PER_SECOND)
        .wrapping_add(now.tv_nsec as u64)
}

#[cfg(target_os = "linux")]
fn sleep_until(due: u64) {
    let until = libc::timespec {
        tv_sec: (due / NS_PER_SECOND) as _,
        tv_nsec: (due % NS_PER_SECOND) as _,
    };
    // A signal ends the call early.
    while clock_ns() < due {
        // SAFETY: the pointers are to a local, and null where no rest is wanted.
        unsafe {
            libc::clock_nanosleep(
                libc::CLOCK_MONOTONIC,
                libc::TIMER_ABSTIME,
                &raw const until,
                std::ptr::null_mut(),
            );
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn clock_ns() -> u64 {
    use std::sync::OnceLock;
    use std::time::Instant;
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    BEGIN.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

#[cfg(not(target_os = "linux"))]
fn sleep_until(due: u64) {
    loop {
        let now = clock_ns();
        if now >= due {
            return;
        }
        std::thread::sleep(Duration::from_nanos(due - now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(overrun: Overrun) -> PeriodicLoop {
        Periodic::every(Duration::from_millis(1))
            .overrun(overrun)
            .start()
            .unwrap()
    }

    const MS: u64 = 1_000_000;

    #[test]
    fn rounds_on_time_follow_one_another() {
        for overrun in [Overrun::Skip, Overrun::CatchUp, Overrun::Abort] {
            let mut periodic = started(overrun);
            for index in 0..10 {
                let due = periodic.due_ns;
                // Almost a period late is late, but no overrun.
                let tick = periodic.begin(due, due + MS - 1).unwrap();
                assert_eq!((tick.index, tick.skipped), (index, 0));
                assert_eq!(tick.lateness, Duration::from_nanos(MS - 1));
                assert_eq!(periodic.due_ns, due + MS);
            }
            let report = periodic.report();
            assert_eq!((report.rounds, report.overruns, report.skipped), (10, 0, 0));
        }
    }

    #[test]
    fn missed_rounds_are_left_out() {
        let mut periodic = started(Overrun::Skip);
        let due = periodic.due_ns;
        let tick = periodic.begin(due, due + 3 * MS + MS / 2).unwrap();
        assert_eq!((tick.index, tick.skipped), (3, 3));
        assert_eq!(
            periodic.due_ns,
            due + 4 * MS,
            "the next multiple of the period"
        );
        let tick = periodic.begin(due + 4 * MS, due + 4 * MS).unwrap();
        assert_eq!((tick.index, tick.skipped), (4, 0));
        let report = periodic.into_report();
        assert_eq!((report.rounds, report.overruns, report.skipped), (2, 1, 3));
        assert_eq!(report.lateness.len(), 2);
        let longest = report.latest().as_secs_f64();
        assert!((longest - 0.0035).abs() < 1e-5, "{longest}");
        assert!(report.lateness(0.5) < Duration::from_micros(1));
    }

    #[test]
    fn missed_rounds_are_made_up_for() {
        let mut periodic = started(Overrun::CatchUp);
        let due = periodic.due_ns;
        let now = due + 3 * MS + MS / 2;
        for index in 0..4 {
            let tick = periodic.begin(periodic.due_ns, now).unwrap();
            assert_eq!((tick.index, tick.skipped), (index, 0));
        }
        assert_eq!(periodic.due_ns, due + 4 * MS);
        let report = periodic.report();
        assert_eq!((report.rounds, report.overruns, report.skipped), (4, 3, 0));
    }

    #[test]
    fn a_missed_round_ends_the_loop() {
        let mut periodic = started(Overrun::Abort);
        let due = periodic.due_ns;
        let missed = periodic.begin(due, due + 2 * MS).unwrap_err();
        assert_eq!(missed.index, 0);
        assert_eq!(missed.lateness, Duration::from_millis(2));
        assert!(missed.to_string().contains("round 0"));
        // Whoever goes on is on time again, and every round is accounted for.
        let tick = periodic.begin(periodic.due_ns, periodic.due_ns).unwrap();
        assert_eq!(tick.index, 3);
        assert_eq!(periodic.report().rounds, 1);
        assert_eq!(periodic.report().skipped, 3);
    }

    #[test]
    fn bad_periods_are_refused() {
        for period in [Duration::from_nanos(9_999), Duration::from_secs(86_401)] {
            assert!(matches!(
                Periodic::every(period).start(),
                Err(Error::InvalidOption {
                    option: "period",
                    ..
                })
            ));
        }
        let spin = PeriodicWait::SleepThenSpin(Duration::from_millis(2));
        assert!(matches!(
            Periodic::every(Duration::from_millis(1)).wait(spin).start(),
            Err(Error::InvalidOption { option: "spin", .. })
        ));
    }

    /// No round begins before its time, and none is forgotten, however loaded the machine is.
    #[test]
    fn rounds_keep_to_the_clock() {
        for wait in [
            PeriodicWait::Sleep,
            PeriodicWait::SleepThenSpin(Duration::from_micros(100)),
            PeriodicWait::Spin,
        ] {
            let period = Duration::from_micros(500);
            let mut periodic = Periodic::every(period).wait(wait).start().unwrap();
            let first = periodic.due_ns;
            for _ in 0..100 {
                let tick = periodic.wait().unwrap();
                let due = first + tick.index * 500_000;
                assert!(clock_ns() >= due, "round {} began early", tick.index);
            }
            let report = periodic.into_report();
            let all = (report.rounds + report.skipped) * 500_000;
            assert_eq!(report.rounds, 100);
            assert!(clock_ns() - first + 500_000 >= all);
            assert!(report.to_string().starts_with("100 rounds every 500µs"));
        }
    }
}
