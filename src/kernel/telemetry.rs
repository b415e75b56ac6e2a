//! Exact counters of one block, written by its loop and read without disturbing it.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// Size of a telemetry buffer in bytes.
pub const TELEMETRY_BUFFER_BYTES: usize = 128;

/// How often a reader retries a snapshot that the loop was writing meanwhile, in all and before it lets others run. A
/// write takes some 20 ns, and there are microseconds between two.
const SNAPSHOT_TRIES: u32 = 1_000_000;
const TRIES_BEFORE_YIELD: u32 = 1000;

/// One block's counters as they lie in memory. The block's loop is the only writer; a version that is odd during a
/// write lets readers take a consistent copy (a seqlock).
#[repr(C, align(64))]
#[derive(Debug)]
pub struct TelemetryBuffer {
    version: AtomicU32,
    _pad: u32,
    received: AtomicU64,
    replied: AtomicU64,
    errors: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    handler_count: AtomicU64,
    handler_total_ns: AtomicU64,

    handler_min_ns: AtomicU64,
    handler_max_ns: AtomicU64,
    alive_at_ns: AtomicU64,
    _reserved: [u64; 5],
}

const _: () = {
    assert!(size_of::<TelemetryBuffer>() == TELEMETRY_BUFFER_BYTES);
    assert!(offset_of!(TelemetryBuffer, version) == 0);
    assert!(offset_of!(TelemetryBuffer, received) == 8);
    assert!(offset_of!(TelemetryBuffer, replied) == 16);
    assert!(offset_of!(TelemetryBuffer, errors) == 24);
    assert!(offset_of!(TelemetryBuffer, bytes_in) == 32);
    assert!(offset_of!(TelemetryBuffer, bytes_out) == 40);
    assert!(offset_of!(TelemetryBuffer, handler_count) == 48);
    assert!(offset_of!(TelemetryBuffer, handler_total_ns) == 56);
    assert!(offset_of!(TelemetryBuffer, handler_min_ns) == 64);
    assert!(offset_of!(TelemetryBuffer, handler_max_ns) == 72);
    assert!(offset_of!(TelemetryBuffer, alive_at_ns) == 80);
};

/// A copy of a kernel's counters: of one block, or summed over a grid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Telemetry {
    /// Requests taken from the ring and given to the handler.
    pub received: u64,
    /// Replies written, error replies included.
    pub replied: u64,
    /// Requests that the handler answered with an error.
    pub errors: u64,
    /// Payload bytes of the requests.
    pub bytes_in: u64,
    /// Payload bytes of the replies.
    pub bytes_out: u64,
    /// Handler runs that were timed.
    pub handler_count: u64,
    /// Time in the handler, all runs together.
    pub handler_total: Duration,
    /// Shortest run of the handler; zero before the first.
    pub handler_min: Duration,
    /// Longest run of the handler.
    pub handler_max: Duration,
    /// When the loop last showed a sign of life, in nanoseconds since the Unix epoch; of a grid, its oldest.
    pub alive_at_ns: u64,
}

impl Telemetry {
    /// Mean time in the handler; zero before the first run.
    #[must_use]
    pub fn handler_mean(&self) -> Duration {
        let total = u64::try_from(self.handler_total.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(total.checked_div(self.handler_count).unwrap_or(0))
    }

    /// Adds another block's counters.
    pub(crate) fn merge(&mut self, other: &Self) {
        if other.handler_count > 0 {
            self.handler_min = if self.handler_count == 0 {
                other.handler_min
            } else {
                self.handler_min.min(other.handler_min)
            };
        }
        self.alive_at_ns = if self.alive_at_ns == 0 {
            other.alive_at_ns
        } else {
            self.alive_at_ns.min(other.alive_at_ns)
        };
        self.received += other.received;
        self.replied += other.replied;
        self.errors += other.errors;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.handler_count += other.handler_count;
        self.handler_total += other.handler_total;
        self.handler_max = self.handler_max.max(other.handler_max);
    }
}

#[cfg(all(test, feature = "vulkan"))]
impl TelemetryBuffer {
    /// Names as in shaders, and offsets in bytes.
    pub(crate) const OFFSETS: [(&'static str, usize); 6] = [
        ("VERSION", offset_of!(TelemetryBuffer, version)),
        ("RECEIVED", offset_of!(TelemetryBuffer, received)),
        ("REPLIED", offset_of!(TelemetryBuffer, replied)),
        ("ERRORS", offset_of!(TelemetryBuffer, errors)),
        ("BYTES_IN", offset_of!(TelemetryBuffer, bytes_in)),
        ("BYTES_OUT", offset_of!(TelemetryBuffer, bytes_out)),
    ];
}

impl Default for TelemetryBuffer {
    fn default() -> Self {
        // SAFETY: every field is an integer or an atomic integer, for which all zeros is a valid value.
        unsafe { std::mem::zeroed() }
    }
}

impl TelemetryBuffer {
    /// A consistent copy. Does not disturb the writer beyond the transfer of two cache lines.
    #[must_use]
    pub fn snapshot(&self) -> Telemetry {
        let mut copy = Telemetry::default();
        for attempt in 1..=SNAPSHOT_TRIES {
            // ORDERING: telemetry. Acquire pairs with the last release in `store`.
            let before = self.version.load(Ordering::Acquire);
            copy = self.copy();
            // ORDERING: telemetry. Keeps the copy's loads before the second look at the version.
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return copy;
            }
            if attempt.is_multiple_of(TRIES_BEFORE_YIELD) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        copy
    }

    /// Says that the loop is alive, though its counters have not changed. For the loop alone.
    pub(crate) fn show_life(&self) {
        self.alive_at_ns
            .store(crate::time::now_ns(), Ordering::Relaxed);
    }

    /// Takes over another buffer's counters, which nobody changes meanwhile.
    #[cfg(feature = "vulkan")]
    pub(crate) fn mirror(&self, other: &Self) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        // ORDERING: telemetry. As in `TelemetryWriter::store`.
        fence(Ordering::Release);
        for (to, from) in [
            (&self.received, &other.received),
            (&self.replied, &other.replied),
            (&self.errors, &other.errors),
            (&self.bytes_in, &other.bytes_in),
            (&self.bytes_out, &other.bytes_out),
        ] {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        // ORDERING: telemetry. Release pairs with the acquire in `snapshot`.
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    fn copy(&self) -> Telemetry {
        let nanos = |word: &AtomicU64| Duration::from_nanos(word.load(Ordering::Relaxed));
        Telemetry {
            received: self.received.load(Ordering::Relaxed),
            replied: self.replied.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            bytes_in: self.bytes_in.load(Ordering::Relaxed),
            bytes_out: self.bytes_out.load(Ordering::Relaxed),
            handler_count: self.handler_count.load(Ordering::Relaxed),
            handler_total: nanos(&self.handler_total_ns),
            handler_min: nanos(&self.handler_min_ns),
            handler_max: nanos(&self.handler_max_ns),
            alive_at_ns: self.alive_at_ns.load(Ordering::Relaxed),
        }
    }
}

/// The loop's own copy of its counters, written out now and then.
#[derive(Debug, Default)]
pub(crate) struct TelemetryWriter {
    pub(crate) received: u64,
    pub(crate) replied: u64,
    pub(crate) errors: u64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
    handler_count: u64,
    handler_total_ticks: u64,
    handler_min_ticks: u64,
    handler_max_ticks: u64,
}

impl TelemetryWriter {
    /// Counts one run of the handler, in counter ticks.
    #[inline]
    pub(crate) fn time_handler(&mut self, ticks: u64) {
        if self.handler_count == 0 || ticks < self.handler_min_ticks {
            self.handler_min_ticks = ticks;
        }
        self.handler_max_ticks = self.handler_max_ticks.max(ticks);
        self.handler_total_ticks = self.handler_total_ticks.saturating_add(ticks);
        self.handler_count += 1;
    }

    /// Writes everything out, with a sign of life.
    pub(crate) fn store(&self, buffer: &TelemetryBuffer) {
        let version = buffer.version.load(Ordering::Relaxed);
        buffer
            .version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        // ORDERING: telemetry. The odd version is visible before any of the stores below.
        fence(Ordering::Release);
        let nanos = crate::time::ticks_to_nanos;
        buffer.received.store(self.received, Ordering::Relaxed);
        buffer.replied.store(self.replied, Ordering::Relaxed);
        buffer.errors.store(self.errors, Ordering::Relaxed);
        buffer.bytes_in.store(self.bytes_in, Ordering::Relaxed);
        buffer.bytes_out.store(self.bytes_out, Ordering::Relaxed);
        buffer
            .handler_count
            .store(self.handler_count, Ordering::Relaxed);
        buffer
            .handler_total_ns
            .store(nanos(self.handler_total_ticks), Ordering::Relaxed);
        buffer
            .handler_min_ns
            .store(nanos(self.handler_min_ticks), Ordering::Relaxed);
        buffer
            .handler_max_ns
            .store(nanos(self.handler_max_ticks), Ordering::Relaxed);
        buffer
            .alive_at_ns
            .store(crate::time::now_ns(), Ordering::Relaxed);
        // ORDERING: telemetry. Release pairs with the acquire in `snapshot`.
        buffer
            .version
            .store(version.wrapping_add(2), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_what_was_stored() {
        let buffer = TelemetryBuffer::default();
        let mut writer = TelemetryWriter {
            received: 3,
            replied: 2,
            errors: 1,
            bytes_in: 30,
            bytes_out: 20,
            ..TelemetryWriter::default()
        };
        let ticks: Vec<u64> = vec![1_000_000, 3_000_000, 2_000_000];
        ticks.iter().for_each(|&ticks| writer.time_handler(ticks));
        writer.store(&buffer);
        let snapshot = buffer.snapshot();
        let nanos = |ticks| Duration::from_nanos(crate::time::ticks_to_nanos(ticks));
        assert_eq!(
            (snapshot.received, snapshot.replied, snapshot.errors),
            (3, 2, 1)
        );
        assert_eq!((snapshot.bytes_in, snapshot.bytes_out), (30, 20));
        assert_eq!(snapshot.handler_min, nanos(1_000_000));
        assert_eq!(snapshot.handler_max, nanos(3_000_000));
        assert_eq!(snapshot.handler_total, nanos(6_000_000));
        assert_eq!(
            snapshot.handler_mean().as_nanos(),
            snapshot.handler_total.as_nanos() / 3
        );
        assert!(snapshot.alive_at_ns > 0);
    }

    #[test]
    fn a_reader_never_sees_half_a_write() {
        use std::sync::atomic::AtomicBool;
        static BUFFER: std::sync::LazyLock<TelemetryBuffer> =
            std::sync::LazyLock::new(TelemetryBuffer::default);
        static DONE: AtomicBool = AtomicBool::new(false);
        let reader = std::thread::spawn(|| {
            while !DONE.load(Ordering::Relaxed) {
                let copy = BUFFER.snapshot();
                assert_eq!(
                    (copy.received, copy.bytes_in),
                    (copy.replied, copy.bytes_out)
                );
            }
        });
        let mut writer = TelemetryWriter::default();
        for count in 0..200_000 {
            writer.received = count;
            writer.replied = count;
            writer.bytes_in = count;
            writer.bytes_out = count;
            writer.store(&BUFFER);
        }
        DONE.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    }

    #[test]
    fn blocks_are_summed_and_extremes_kept() {
        let one = Telemetry {
            received: 1,
            handler_count: 1,
            handler_min: Duration::from_nanos(5),
            handler_max: Duration::from_nanos(5),
            alive_at_ns: 9,
            ..Telemetry::default()
        };
        let two = Telemetry {
            handler_min: Duration::from_nanos(3),
            handler_max: Duration::from_nanos(8),
            alive_at_ns: 7,
            ..one
        };
        let mut sum = Telemetry::default();
        sum.merge(&one);
        sum.merge(&two);
        sum.merge(&Telemetry {
            alive_at_ns: 8,
            ..Telemetry::default()
        });
        assert_eq!((sum.received, sum.handler_count), (2, 2));
        assert_eq!(sum.handler_min, Duration::from_nanos(3));
        assert_eq!(sum.handler_max, Duration::from_nanos(8));
        assert_eq!(sum.alive_at_ns, 7);
    }
}
