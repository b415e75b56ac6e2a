//! Timestamps that strictly increase.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::clock::now_ns;
use super::hlc::Hlc;

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

    /// Nanoseconds since the Unix epoch, larger than everything this source gave before. Lock-free;
    /// does not allocate or call the system.
    #[inline]
    pub fn next(&self) -> u64 {
        self.after(now_ns())
    }

    #[inline]
    fn after(&self, now: u64) -> u64 {
        let mut last = self.last.load(Ordering::Relaxed);
        loop {
            // The clock begins 292 years before the end of the numbers: there is always a next one.
            let next = now.max(last.saturating_add(1));
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

    #[test]
    fn timestamps_strictly_increase_when_the_clock_goes_back() {
        let source = TimestampSource::new();
        assert_eq!(source.after(1000), 1000);
        assert_eq!(source.after(400), 1001);
        assert_eq!(source.after(0), 1002);
        assert_eq!(source.after(1002), 1003);
        assert_eq!(source.after(2000), 2000);
        // No clock gives this; the source does not panic on it.
        assert_eq!(source.after(u64::MAX), u64::MAX);
        assert_eq!(source.after(5), u64::MAX);
    }
}
