//! The process's clock: the checked counter, calibrated, and the time of day that belongs to it.

use std::fmt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::checked::{CheckedCounter, Readings, Seen};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::counter;
use super::system::system_ns;

use crate::logging;

/// How long the x86 counter is compared with the system's clock. Both ends of the comparison are
/// known to some 40 ns, so that 10 ms give 8 ppm.
#[cfg(target_arch = "x86_64")]
const CALIBRATION_NS: u64 = 10_000_000;

/// Latest time of day that is believed, in nanoseconds since the Unix epoch: the year 2262. Every
/// timestamp has a successor for as long as a process can run.
const LATEST_EPOCH_NS: u64 = u64::MAX / 2;

/// What [`now_ns`] and all timestamps of this process are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClockSource {
    /// The CPU's own counter: some 10 ns a reading. It is held against the system's clock once in a
    /// millisecond in which a thread reads it.
    Counter,
    /// The system's monotonic clock: some 30 ns a reading, or a system call where the system has no
    /// cheaper way. The CPU has no counter of constant rate, or the system does not trust it, or it
    /// disagreed with the system's clock while the process ran.
    System,
}

impl fmt::Display for ClockSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "the CPU's counter",
            Self::System => "the system's clock",
        })
    }
}

/// The counter and clock of this machine.
pub(super) struct Machine;

impl Readings for Machine {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline]
    fn counter(&self) -> u64 {
        counter::counter()
    }

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[inline]
    fn counter_ordered(&self) -> u64 {
        counter::counter_ordered()
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn counter(&self) -> u64 {
        system_ns()
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn counter_ordered(&self) -> u64 {
        system_ns()
    }

    #[inline]
    fn system_ns(&self) -> u64 {
        system_ns()
    }
}

/// One per process.
#[derive(Debug)]
pub(super) struct Clock {
    pub(super) counter: CheckedCounter,
    /// Nanoseconds since the Unix epoch when the clock was calibrated.
    epoch_ns: u64,
    /// Why the counter was not used from the first.
    objection: Option<String>,
}

/// Null until the clock is calibrated; never freed then. No `OnceLock`: the child of a fork would
/// wait for ever for a thread that was just calibrating.
static CLOCK: AtomicPtr<Clock> = AtomicPtr::new(null_mut());

thread_local! {
    static SEEN: Seen = const { Seen::new() };
}

#[inline]
pub(super) fn clock() -> &'static Clock {
    // ORDERING: publish. Pairs with the exchange in `first_clock`.
    let clock = CLOCK.load(Ordering::Acquire);
    // SAFETY: null, or made by `first_clock` and never freed.
    match unsafe { clock.as_ref() } {
        Some(clock) => clock,
        None => first_clock(),
    }
}

/// Calibrates the clock. Of threads that do so at once, the first one's counts.
#[cold]
fn first_clock() -> &'static Clock {
    let new = Box::into_raw(Box::new(Clock::calibrate()));
    match CLOCK.compare_exchange(null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: made above, and never freed.
        Ok(_) => unsafe { &*new },
        Err(other) => {
            // SAFETY: made above, and no other thread has seen it.
            drop(unsafe { Box::from_raw(new) });
            // SAFETY: not null, made here by another thread, and never freed.
            unsafe { &*other }
        }
    }
}

/// Calibrates the clock if that has not happened yet; blocks for 10 ms then. The runtime's builder
/// calls it, so that no message call has to. Logs once if the counter is not used.
pub(crate) fn initialise() {
    static IS_LOGGED: AtomicBool = AtomicBool::new(false);
    let clock = clock();
    if clock.counter.is_trusted() || IS_LOGGED.swap(true, Ordering::Relaxed) {
        return;
    }
    let reason = clock.objection.as_deref();
    logging::info!(
        "time is read from the system's clock, not from the CPU's counter: {}",
        reason.unwrap_or("the counter disagreed with that clock")
    );
}

/// What the clock of this process is read from at present. [`Counter`](ClockSource::Counter) may become
/// [`System`](ClockSource::System) while the process runs, never the reverse.
///
/// Blocks for 10 ms at the first use of the clock in the process.
#[must_use]
pub fn clock_source() -> ClockSource {
    if clock().counter.is_trusted() {
        ClockSource::Counter
    } else {
        ClockSource::System
    }
}

impl Clock {
    fn calibrate() -> Self {
        let (counter, objection) = match calibrated_counter() {
            Ok(counter) => (counter, None),
            Err(reason) => (CheckedCounter::system_only(system_ns()), Some(reason)),
        };
        let epoch_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
            });
        Self {
            counter,
            epoch_ns: epoch_ns.min(LATEST_EPOCH_NS),
            objection,
        }
    }

    #[inline]
    fn epoch_ns(&self, ticks: u64) -> u64 {
        let since = ticks.saturating_sub(self.counter.base_ticks());
        self.epoch_ns.saturating_add(self.counter.nanos(since))
    }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn calibrated_counter() -> Result<CheckedCounter, String> {
    if let Some(reason) = counter::objection() {
        return Err(reason);
    }
    #[cfg(target_arch = "x86_64")]
    let (frequency, ticks, ns) = {
        let (ticks_0, ns_0) = tight_pair();
        while system_ns().saturating_sub(ns_0) < CALIBRATION_NS {
            std::hint::spin_loop();
        }
        let (ticks_1, ns_1) = tight_pair();
        let ticks = u128::from(ticks_1.saturating_sub(ticks_0));
        let frequency = ticks * 1_000_000_000 / u128::from(ns_1.saturating_sub(ns_0).max(1));
        let frequency = u64::try_from(frequency).unwrap_or(u64::MAX);
        (frequency, ticks_1, ns_1)
    };
    #[cfg(target_arch = "aarch64")]
    let (frequency, (ticks, ns)) = (counter::frequency(), tight_pair());
    CheckedCounter::new(ticks, ns, frequency)
        .ok_or_else(|| format!("it seems to count {frequency} times a second"))
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn calibrated_counter() -> Result<CheckedCounter, String> {
    Err("none is known for this architecture".to_owned())
}

/// Readings of the counter and of the system's clock that are as close together as a few tries
/// allow.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn tight_pair() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..16 {
        let before = system_ns();
        let ticks = counter::counter_ordered();
        let width = system_ns().saturating_sub(before);
        if width < best.0 {
            best = (width, ticks, before + width / 2);
        }
    }
    (best.1, best.2)
}

/// The present in ticks of the clock, on every thread within a third of a millisecond of the
/// system's clock. Neither blocks, allocates nor calls the system once the clock is calibrated.
#[inline]
pub(crate) fn ticks() -> u64 {
    let clock = clock();
    SEEN.with(|seen| clock.counter.read(&Machine, seen))
}

#[inline]
fn ticks_ordered() -> u64 {
    let clock = clock();
    SEEN.with(|seen| clock.counter.read_ordered(&Machine, seen))
}

/// Ticks of the clock as nanoseconds.
#[inline]
pub(crate) fn ticks_to_nanos(ticks: u64) -> u64 {
    clock().counter.nanos(ticks)
}

/// Nanoseconds since the Unix epoch: the wall clock as it was when the process first asked,
/// advanced monotonically on each thread. Not corrected for later steps of the wall clock.
///
/// It is read from the CPU's counter where the system trusts that one, and held against the
/// system's clock once in a millisecond in which a thread reads it, or at once when the counter
/// leaps, goes back or stands still. So readings of all threads are within a millisecond and a half
/// of each other whatever the counter does; where it is sound, within tens of nanoseconds. The
/// first disagreement ends the use of the counter ([`clock_source`] tells).
///
/// The processor may read its counter before loads that precede the call have given their values:
/// some ten nanoseconds early, for a line that another core has just written. To time what another
/// thread did, use [`now_ns_ordered`].
///
/// Neither blocks, allocates nor calls the system after the first call, which takes 10 ms; where
/// the system's clock itself needs a system call, a reading of that clock is one.
#[inline]
#[must_use]
pub fn now_ns() -> u64 {
    clock().epoch_ns(ticks())
}

/// As [`now_ns`], but read when everything before it has happened: the loads before it have given
/// their values. Costs what these still take, and some 10 ns.
#[inline]
#[must_use]
pub fn now_ns_ordered() -> u64 {
    clock().epoch_ns(ticks_ordered())
}

/// Measures how long something takes that is usually short: two counter reads, and no look at the
/// system's clock unless it took a millisecond.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopwatch {
    begin: u64,
    is_counter: bool,
}

impl Stopwatch {
    #[inline]
    pub(crate) fn start() -> Self {
        let is_counter = clock().counter.is_trusted();
        Self {
            begin: if is_counter {
                Machine.counter()
            } else {
                ticks()
            },
            is_counter,
        }
    }

    /// Ticks since the start. `None` if they cannot be told: the counter was found out meanwhile.
    #[inline]
    pub(crate) fn elapsed_ticks(self) -> Option<u64> {
        if !self.is_counter {
            return Some(ticks().saturating_sub(self.begin));
        }
        let elapsed = Machine.counter().wrapping_sub(self.begin);
        if elapsed < clock().counter.check_interval() {
            Some(elapsed)
        } else {
            self.elapsed_checked()
        }
    }

    /// As `elapsed_ticks`, and starts anew.
    #[inline]
    pub(crate) fn lap(&mut self) -> Option<u64> {
        let elapsed = self.elapsed_ticks();
        match elapsed {
            Some(ticks) => self.begin = self.begin.wrapping_add(ticks),
            None => *self = Self::start(),
        }
        elapsed
    }

    #[cold]
    fn elapsed_checked(self) -> Option<u64> {
        let clock = clock();
        let now = SEEN.with(|seen| clock.counter.check(&Machine, seen));
        let is_trusted = clock.counter.is_trusted();
        is_trusted.then(|| now.saturating_sub(self.begin))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_clock_agrees_with_instant() {
        initialise();
        let (ns_0, instant_0) = (now_ns(), Instant::now());
        std::thread::sleep(Duration::from_millis(50));
        let (ns_1, elapsed) = (now_ns(), instant_0.elapsed().as_nanos() as f64);
        let ratio = (ns_1 - ns_0) as f64 / elapsed;
        assert!((0.9..1.1).contains(&ratio), "ratio {ratio}");
    }

    #[test]
    fn a_stopwatch_measures_what_is_short_and_what_is_long() {
        for sleep in [Duration::ZERO, Duration::from_millis(20)] {
            let begin = Instant::now();
            let watch = Stopwatch::start();
            std::thread::sleep(sleep);
            let measured = Duration::from_nanos(ticks_to_nanos(watch.elapsed_ticks().unwrap()));
            assert!(measured >= sleep.mul_f64(0.99), "{measured:?}");
            assert!(measured <= begin.elapsed().mul_f64(1.01), "{measured:?}");
        }
    }
}
