//! Floor 1: a clock that costs one counter read, and deadlines on it.
//!
//! On x86-64 with an invariant time-stamp counter and on AArch64 the CPU's own counter is read; elsewhere
//! [`Instant`]. The x86 counter is calibrated once against [`Instant`]: 10 ms, with an error below 10 ppm.

mod device_clock;
mod hlc;

pub(crate) use device_clock::{Bracket, DeviceClock, HostTime};
pub use hlc::{Hlc, HlcTimestamp, TooFarAhead};

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long the x86 counter is compared with `Instant`. Both ends of the comparison are known to some 40 ns, so that
/// 10 ms give 8 ppm: over the longest timeout that anyone waits for, far below what the scheduler adds.
const CALIBRATION: Duration = Duration::from_millis(10);

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// How raw counter readings relate to nanoseconds. One per process.
#[derive(Debug)]
struct Calibration {
    source: Source,
    /// Counter reading that belongs to `epoch_ns`.
    base: u64,
    /// Nanoseconds since the Unix epoch at `base`.
    epoch_ns: u64,
    /// Counter ticks per second.
    frequency: u64,
    /// Nanoseconds per tick, as a fixed-point number with 32 fractional bits.
    nanos_per_tick: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    Counter,
    Instant,
}

static CALIBRATION_RESULT: OnceLock<Calibration> = OnceLock::new();
static INSTANT_BASE: OnceLock<Instant> = OnceLock::new();

#[inline]
fn calibration() -> &'static Calibration {
    CALIBRATION_RESULT.get_or_init(Calibration::measure)
}

/// Calibrates the clock if that has not happened yet; blocks for 10 ms then. The runtime's builder calls it, so that
/// no message call has to.
pub(crate) fn initialise() {
    let _ = calibration();
}

impl Calibration {
    fn measure() -> Self {
        #[cfg(target_arch = "x86_64")]
        if invariant_tsc() {
            let (ticks_0, instant_0) = tight_pair();
            while instant_0.elapsed() < CALIBRATION {
                std::hint::spin_loop();
            }
            let (ticks_1, instant_1) = tight_pair();
            let nanos = instant_1.duration_since(instant_0).as_nanos();
            let ticks = u128::from(ticks_1.wrapping_sub(ticks_0));
            if let Ok(frequency) = u64::try_from(ticks * NANOS_PER_SECOND / nanos.max(1))
                && frequency > 0
            {
                return Self::new(Source::Counter, ticks_1, frequency);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            let frequency: u64;
            // SAFETY: `cntfrq_el0` is readable from user space on every AArch64 OS that Rust's std supports.
            unsafe {
                core::arch::asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nomem, nostack));
            }
            if frequency > 0 {
                return Self::new(Source::Counter, counter(), frequency);
            }
        }
        let base = instant_ticks();
        Self::new(Source::Instant, base, NANOS_PER_SECOND as u64)
    }

    fn new(source: Source, base: u64, frequency: u64) -> Self {
        let epoch_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
            });
        Self {
            source,
            base,
            epoch_ns,
            frequency,
            nanos_per_tick: ((NANOS_PER_SECOND << 32) / u128::from(frequency)) as u64,
        }
    }

    #[inline]
    fn nanos(&self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.nanos_per_tick)) >> 32) as u64
    }
}

/// A counter reading and an `Instant` that are as close together as a few tries allow.
#[cfg(target_arch = "x86_64")]
fn tight_pair() -> (u64, Instant) {
    let mut best: Option<(u64, u64, Instant)> = None;
    for _ in 0..16 {
        let before = counter();
        let instant = Instant::now();
        let width = counter().wrapping_sub(before);
        if best.is_none_or(|(narrowest, ..)| width < narrowest) {
            best = Some((width, before.wrapping_add(width / 2), instant));
        }
    }
    best.map_or_else(
        || (counter(), Instant::now()),
        |(_, ticks, instant)| (ticks, instant),
    )
}

/// Whether the counter runs at a constant rate in every power state: CPUID leaf 0x8000_0007, EDX bit 8 (Intel SDM
/// volume 3, "Invariant TSC"; the same bit on AMD).
#[cfg(target_arch = "x86_64")]
fn invariant_tsc() -> bool {
    use core::arch::x86_64::__cpuid;
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & (1 << 8) != 0
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn counter() -> u64 {
    // SAFETY: RDTSC is part of the x86-64 baseline, and every OS that std supports leaves it enabled for users.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(target_arch = "aarch64")]
#[inline]
fn counter() -> u64 {
    let ticks: u64;
    // SAFETY: `cntvct_el0` is readable from user space on every AArch64 OS that Rust's std supports.
    unsafe { core::arch::asm!("mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack)) };
    ticks
}

/// As `counter`, after everything before it: a counter may be read out of order, before a load that precedes it has given its value.
#[cfg(target_arch = "x86_64")]
#[inline]
fn counter_ordered() -> u64 {
    // Intel SDM volume 2, RDTSC: "LFENCE immediately before". AMD processors wait as well, with the setting that systems boot with
    // (APM volume 3, LFENCE).
    // SAFETY: SSE2 is part of the x86-64 baseline.
    unsafe { core::arch::x86_64::_mm_lfence() };
    counter()
}

#[cfg(target_arch = "aarch64")]
#[inline]
fn counter_ordered() -> u64 {
    // Arm ARM, "Ordering of reads of the counters": a read may be early but for an ISB before it.
    // SAFETY: a barrier has no preconditions. It may not be moved across memory accesses, so it says nothing of `nomem`.
    unsafe { core::arch::asm!("isb", options(nostack)) };
    counter()
}

fn instant_ticks() -> u64 {
    let base = *INSTANT_BASE.get_or_init(Instant::now);
    u64::try_from(base.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The current counter reading. Neither blocks, allocates nor calls the system once the clock is calibrated.
#[inline]
pub(crate) fn ticks() -> u64 {
    match calibration().source {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        Source::Counter => counter(),
        Source::Instant => instant_ticks(),
    }
}

/// As `ticks`, but not before what precedes it has happened.
#[inline]
pub(crate) fn ticks_ordered() -> u64 {
    match calibration().source {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        Source::Counter => counter_ordered(),
        Source::Instant => instant_ticks(),
    }
}

/// Counter ticks as nanoseconds.
#[inline]
pub(crate) fn ticks_to_nanos(ticks: u64) -> u64 {
    calibration().nanos(ticks)
}

/// Nanoseconds since the Unix epoch, from the counter: the wall clock as it was when the process first asked, advanced
/// monotonically. Not corrected for later steps of the wall clock.
///
/// The processor may read its counter before loads that precede the call have given their values: some ten nanoseconds early, for a line
/// that another core has just written. To time what another thread did, use [`now_ns_ordered`].
///
/// Neither blocks, allocates nor calls the system after the first call, which takes 10 ms.
#[inline]
#[must_use]
pub fn now_ns() -> u64 {
    epoch_ns(ticks())
}

/// As [`now_ns`], but read when everything before it has happened: the loads before it have given their values. Costs what these
/// still take, and some 10 ns.
#[inline]
#[must_use]
pub fn now_ns_ordered() -> u64 {
    epoch_ns(ticks_ordered())
}

/// What [`now_ns`] said when the counter stood there, since the clock was calibrated.
#[inline]
pub(crate) fn epoch_ns(ticks: u64) -> u64 {
    let calibration = calibration();
    calibration
        .epoch_ns
        .wrapping_add(calibration.nanos(ticks.wrapping_sub(calibration.base)))
}

/// A point in time at which a wait ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline {
    ticks: u64,
}

impl Deadline {
    /// `timeout` from now. A timeout beyond what the counter can express (decades) means "never".
    #[inline]
    #[must_use]
    pub fn after(timeout: Duration) -> Self {
        let calibration = calibration();
        let delta = u64::try_from(timeout.as_nanos()).map_or(u64::MAX, |nanos| {
            let ticks = u128::from(nanos) * u128::from(calibration.frequency) / NANOS_PER_SECOND;
            u64::try_from(ticks).unwrap_or(u64::MAX)
        });
        Self {
            ticks: ticks().saturating_add(delta),
        }
    }

    /// Whether the deadline has passed. One counter read.
    #[inline]
    #[must_use]
    pub fn has_passed(&self) -> bool {
        ticks() >= self.ticks
    }

    /// Time left, zero once it has passed.
    #[inline]
    #[must_use]
    pub fn remaining(&self) -> Duration {
        Duration::from_nanos(calibration().nanos(self.ticks.saturating_sub(ticks())))
    }
}

/// Timestamps that strictly increase, also when several threads share the source.
#[derive(Debug, Default)]
pub struct TimestampSource {
    last: AtomicU64,
}

impl TimestampSource {
    /// A source that has given nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            last: AtomicU64::new(0),
        }
    }

    /// Nanoseconds since the Unix epoch, larger than everything this source gave before. Lock-free; does not allocate
    /// or call the system.
    #[inline]
    pub fn next(&self) -> u64 {
        let now = now_ns();
        let mut last = self.last.load(Ordering::Relaxed);
        loop {
            let next = now.max(last + 1);
            match self
                .last
                .compare_exchange_weak(last, next, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return next,
                Err(current) => last = current,
            }
        }
    }
}

/// What stamps a kernel's messages.
#[derive(Debug)]
pub(crate) enum Stamps {
    /// A source of its own, in nanoseconds.
    Own(TimestampSource),
    /// A clock that others share.
    Shared(Arc<Hlc>),
}

impl Stamps {
    /// Larger than every stamp before it.
    #[inline]
    pub(crate) fn next(&self) -> u64 {
        match self {
            Self::Own(source) => source.next(),
            Self::Shared(clock) => clock.now().as_u64(),
        }
    }
}

#[cfg(test)]
mod tests {
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
    fn a_deadline_passes_and_reports_what_is_left() {
        let deadline = Deadline::after(Duration::from_secs(3600));
        assert!(!deadline.has_passed());
        let left = deadline.remaining().as_secs();
        assert!((3500..=3600).contains(&left), "{left}");
        assert!(Deadline::after(Duration::ZERO).has_passed());
        assert_eq!(Deadline::after(Duration::ZERO).remaining(), Duration::ZERO);
        assert!(!Deadline::after(Duration::MAX).has_passed());
    }

    #[test]
    fn timestamps_strictly_increase_under_two_threads() {
        static SOURCE: TimestampSource = TimestampSource::new();
        let take = || {
            let mut given: Vec<u64> = (0..100_000).map(|_| SOURCE.next()).collect();
            assert!(given.windows(2).all(|pair| pair[0] < pair[1]));
            given.dedup();
            given
        };
        let other = std::thread::spawn(take);
        let mut all = take();
        all.extend(other.join().unwrap());
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
