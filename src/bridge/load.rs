//! How busy a bridge is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::time;

/// Buckets of the histogram: four to each power of two, so that a quantile is at most a quarter too large.
const BUCKETS: usize = 4 * 64;

/// What the thread writes. All of it by that one thread, so that nothing is a read-modify-write.
#[derive(Debug)]
pub(super) struct LoadMeter {
    /// When it began, in clock ticks.
    began: AtomicU64,
    /// Ticks in rounds that moved something.
    busy: AtomicU64,
    rounds: AtomicU64,
    moved: AtomicU64,
    most_moved: AtomicU64,
    sleeps: AtomicU64,
    longest: AtomicU64,
    /// Rounds that moved something, by their length in ticks.
    histogram: [AtomicU64; BUCKETS],
}

impl Default for LoadMeter {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            began: zero(),
            busy: zero(),
            rounds: zero(),
            moved: zero(),
            most_moved: zero(),
            sleeps: zero(),
            longest: zero(),
            histogram: [const { AtomicU64::new(0) }; BUCKETS],
        }
    }
}

/// The load of a bridge since its thread started. A *round* is one look at everything that it looks after, and counts if it moved messages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BridgeLoad {
    /// Since the thread started.
    pub uptime: Duration,
    /// Share of that time spent in rounds, 0 to 1. A thread that spins uses its core for the rest of it too.
    pub busy_share: f64,
    /// Rounds.
    pub rounds: u64,
    /// Requests and replies moved.
    pub moved: u64,
    /// Messages moved by a round, on average.
    pub moved_per_round: f64,
    /// Most messages that a round moved.
    pub most_moved: u64,
    /// How often the thread slept.
    pub sleeps: u64,
    /// Median length of a round, rounded up by a quarter at most.
    pub round_p50: Duration,
    /// 99th percentile of the length of a round, rounded up by a quarter at most.
    pub round_p99: Duration,
    /// Longest round.
    pub round_max: Duration,
}

fn add(counter: &AtomicU64, count: u64) {
    let sum = counter.load(Ordering::Relaxed).saturating_add(count);
    counter.store(sum, Ordering::Relaxed);
}

fn raise(counter: &AtomicU64, value: u64) {
    if value > counter.load(Ordering::Relaxed) {
        counter.store(value, Ordering::Relaxed);
    }
}

/// The bucket of a length: its power of two, and the two bits below it.
fn bucket(ticks: u64) -> usize {
    let ticks = ticks.max(4);
    let power = 63 - ticks.leading_zeros();
    let below = (ticks >> (power - 2)) & 3;
    (power as usize * 4 + below as usize).min(BUCKETS - 1)
}

/// The first length that is beyond a bucket.
fn end_of(bucket: usize) -> u64 {
    let (power, below) = (bucket / 4, bucket as u64 % 4);
    (4 + below + 1)
        .checked_shl(power.saturating_sub(2) as u32)
        .filter(|end| *end > 0)
        .unwrap_or(u64::MAX)
}

impl LoadMeter {
    pub(super) fn begin(&self) {
        self.began.store(time::ticks(), Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn round(&self, ticks: u64, moved: u32) {
        if moved == 0 {
            return;
        }
        add(&self.busy, ticks);
        add(&self.rounds, 1);
        add(&self.moved, moved.into());
        raise(&self.most_moved, moved.into());
        raise(&self.longest, ticks);
        add(&self.histogram[bucket(ticks)], 1);
    }

    pub(super) fn slept(&self) {
        add(&self.sleeps, 1);
    }

    pub(super) fn read(&self) -> BridgeLoad {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let nanos = |ticks| Duration::from_nanos(time::ticks_to_nanos(ticks));
        let began = of(&self.began);
        if began == 0 {
            return BridgeLoad::default();
        }
        let uptime = time::ticks().saturating_sub(began);
        let (rounds, moved, longest) = (of(&self.rounds), of(&self.moved), of(&self.longest));
        let counts: Vec<u64> = self.histogram.iter().map(of).collect();
        let all: u64 = counts.iter().sum();
        let quantile = |share: f64| {
            let wanted = (all as f64 * share).ceil() as u64;
            let mut seen = 0;
            let found = counts.iter().position(|count| {
                seen += count;
                seen >= wanted.max(1)
            });
            found.map_or(0, |bucket| end_of(bucket).min(longest))
        };
        BridgeLoad {
            uptime: nanos(uptime),
            busy_share: of(&self.busy) as f64 / uptime.max(1) as f64,
            rounds,
            moved,
            moved_per_round: moved as f64 / rounds.max(1) as f64,
            most_moved: of(&self.most_moved),
            sleeps: of(&self.sleeps),
            round_p50: nanos(quantile(0.5)),
            round_p99: nanos(quantile(0.99)),
            round_max: nanos(longest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_lies_below_the_end_of_its_bucket_and_a_quarter_above_at_most() {
        for power in 2..62 {
            for ticks in [1_u64 << power, (1 << power) + 1, (1 << (power + 1)) - 1] {
                let end = end_of(bucket(ticks));
                assert!(ticks < end && end <= ticks + ticks / 4 + 1, "{ticks} {end}");
            }
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn quantiles_are_those_of_what_was_measured() {
        time::initialise();
        let meter = LoadMeter::default();
        assert_eq!(meter.read(), BridgeLoad::default());
        meter.begin();
        for _ in 0..98 {
            meter.round(1_000, 2);
        }
        meter.round(1_000_000, 5);
        meter.round(2_000_000, 1);
        meter.round(9_000_000, 0);
        let load = meter.read();
        assert_eq!((load.rounds, load.moved, load.most_moved), (100, 202, 5));
        let nanos = |ticks| Duration::from_nanos(time::ticks_to_nanos(ticks));
        assert!(load.round_p50 >= nanos(1_000) && load.round_p50 <= nanos(1_250));
        assert!(load.round_p99 >= nanos(1_000_000) && load.round_p99 <= nanos(1_250_000));
        assert_eq!(load.round_max, nanos(2_000_000));
    }
}
