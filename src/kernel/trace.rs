//! When a kernel saw messages and was done with them: samples that each block writes, and that are read without disturbing it.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use crate::message::Extension;

/// Samples that a block keeps; the oldest makes room for the next. 16 KiB a block: a reader that comes by ten times a second loses none
/// of 2500 a second.
pub(crate) const TRACE_SLOTS: u32 = 256;

/// How often a reader tries a sample that is being written. A write takes some 20 ns; who meets it so often reads a block that writes
/// nothing but samples, and this one's successor is there next time.
const READ_TRIES: u32 = 8;

/// What a kernel with traces keeps of one message: [`KernelHandle::traces`](crate::KernelHandle::traces). All times are nanoseconds
/// since the Unix epoch, on the clock of [`now_ns`](crate::time::now_ns).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MessageTrace {
    /// The block of the grid that handled it.
    pub block: u32,
    /// Number of this sample in its block, from 0, modulo 2^32. A gap means that samples were overwritten before they were read.
    pub sample: u32,
    /// The request's correlation; that of a `call` is the runtime's own, and 2^31 or more.
    pub correlation: u32,
    /// The trace id that the request carried.
    pub trace_id: Option<[u8; 16]>,
    /// The timestamp that the request carried.
    pub sent_ns: Option<u64>,
    /// When the block took the request up, before its handler ran. On a device this waits for room for the replies too.
    pub seen_ns: u64,
    /// When the handler had returned; its replies were written before.
    pub done_ns: u64,
    /// By how much `seen_ns` and `done_ns` may be off, in either direction and both alike: zero where the kernel reads the host's clock,
    /// and what the comparison of the clocks left open on a device with its own.
    pub clock_error: Duration,
}

impl MessageTrace {
    /// From the time of sending until the kernel saw the message; `None` if it was not stamped. Zero if the clocks disagree by more than it
    /// waited.
    #[must_use]
    pub const fn queue_time(&self) -> Option<Duration> {
        match self.sent_ns {
            Some(sent) => Some(Duration::from_nanos(self.seen_ns.saturating_sub(sent))),
            None => None,
        }
    }

    /// From when the kernel saw the message until its handler had returned.
    #[must_use]
    pub const fn handler_time(&self) -> Duration {
        Duration::from_nanos(self.done_ns.saturating_sub(self.seen_ns))
    }
}

/// A sample as it was read: times are still on the block's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) number: u32,
    pub(crate) correlation: u32,
    /// 0 if the request was not stamped.
    pub(crate) sent_ns: u64,
    pub(crate) seen: u64,
    pub(crate) done: u64,
    /// Zero if the request had none.
    pub(crate) trace_id: [u8; 16],
}

/// One sample as it lies in memory: a line of its own, with the block as its only writer.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub(crate) struct TraceSlot {
    /// Odd while the block writes the slot, 0 before the first time (a seqlock).
    version: AtomicU32,
    number: AtomicU32,
    correlation: AtomicU32,
    _reserved: u32,
    sent_ns: AtomicU64,
    seen: AtomicU64,
    done: AtomicU64,
    _pad: u64,
    trace_id: [AtomicU64; 2],
}

const _: () = {
    assert!(size_of::<TraceSlot>() == 64);
    assert!(offset_of!(TraceSlot, version) == 0);
    assert!(offset_of!(TraceSlot, number) == 4);
    assert!(offset_of!(TraceSlot, correlation) == 8);
    assert!(offset_of!(TraceSlot, sent_ns) == 16);
    assert!(offset_of!(TraceSlot, seen) == 24);
    assert!(offset_of!(TraceSlot, done) == 32);
    assert!(offset_of!(TraceSlot, trace_id) == 48);
    assert!(TRACE_SLOTS.is_power_of_two());
};

impl TraceSlot {
    /// For the block alone.
    fn write(&self, sample: &Sample) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        // ORDERING: telemetry. The odd version is visible before any of the stores below.
        fence(Ordering::Release);
        self.number.store(sample.number, Ordering::Relaxed);
        self.correlation
            .store(sample.correlation, Ordering::Relaxed);
        self.sent_ns.store(sample.sent_ns, Ordering::Relaxed);
        self.seen.store(sample.seen, Ordering::Relaxed);
        self.done.store(sample.done, Ordering::Relaxed);
        let [low, high] = halves(sample.trace_id);
        self.trace_id[0].store(low, Ordering::Relaxed);
        self.trace_id[1].store(high, Ordering::Relaxed);
        // ORDERING: telemetry. Release pairs with the acquire in `read`.
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// The slot's sample, if it has one that is not just being replaced.
    fn read(&self) -> Option<Sample> {
        for _ in 0..READ_TRIES {
            // ORDERING: telemetry. Acquire pairs with the last release in `write`, and in the loops of device code.
            let before = self.version.load(Ordering::Acquire);
            if before == 0 {
                return None;
            }
            let sample = Sample {
                number: self.number.load(Ordering::Relaxed),
                correlation: self.correlation.load(Ordering::Relaxed),
                sent_ns: self.sent_ns.load(Ordering::Relaxed),
                seen: self.seen.load(Ordering::Relaxed),
                done: self.done.load(Ordering::Relaxed),
                trace_id: whole(
                    self.trace_id
                        .each_ref()
                        .map(|half| half.load(Ordering::Relaxed)),
                ),
            };
            // ORDERING: telemetry. Keeps the copy's loads before the second look at the version.
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before {
                return Some(sample);
            }
            std::hint::spin_loop();
        }
        None
    }
}

/// For samples that are carried from one memory to another.
#[cfg(feature = "vulkan")]
impl TraceSlot {
    /// Takes over the other's sample. For whoever writes this one, while nobody writes the other.
    pub(crate) fn mirror(&self, other: &Self) {
        if let Some(sample) = other.read() {
            self.write(&sample);
        }
    }
}

/// What lies in front of a block's samples.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub(crate) struct TraceHeader {
    /// Samples that a device has written.
    written: AtomicU32,
    /// Number of the last question for the device's clock that was answered.
    clock_answered: AtomicU32,
    /// What the device's clock showed then.
    clock: AtomicU64,
    /// What it showed when the block took up the request in hand, for handlers that take several slices.
    seen: AtomicU64,
    _reserved: [u64; 5],
}

const _: () = {
    assert!(size_of::<TraceHeader>() == size_of::<TraceSlot>());
    assert!(offset_of!(TraceHeader, written) == 0);
    assert!(offset_of!(TraceHeader, clock_answered) == 4);
    assert!(offset_of!(TraceHeader, clock) == 8);
    assert!(offset_of!(TraceHeader, seen) == 16);
};

impl TraceHeader {
    /// Samples that were written, modulo 2^32.
    #[cfg(feature = "vulkan")]
    pub(crate) fn written(&self) -> u32 {
        self.written.load(Ordering::Acquire)
    }

    /// Number of the last question for the clock that was answered.
    pub(crate) fn clock_answered(&self) -> u32 {
        // ORDERING: telemetry. Pairs with the device's release, which follows the store of its clock.
        self.clock_answered.load(Ordering::Acquire)
    }

    /// The last answer.
    pub(crate) fn clock(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }
}

/// Names as in the preludes, and offsets in bytes.
#[cfg(all(test, feature = "vulkan"))]
pub(crate) const TRACE_OFFSETS: [(&str, usize); 9] = [
    ("WRITTEN", offset_of!(TraceHeader, written)),
    ("HEADER_SEEN", offset_of!(TraceHeader, seen)),
    ("VERSION", offset_of!(TraceSlot, version)),
    ("NUMBER", offset_of!(TraceSlot, number)),
    ("CORRELATION", offset_of!(TraceSlot, correlation)),
    ("SENT", offset_of!(TraceSlot, sent_ns)),
    ("SEEN", offset_of!(TraceSlot, seen)),
    ("DONE", offset_of!(TraceSlot, done)),
    ("TRACE_ID", offset_of!(TraceSlot, trace_id)),
];

/// The same of what only preludes know whose kernels tell their clock.
#[cfg(all(test, feature = "vulkan"))]
pub(crate) const CLOCK_OFFSETS: [(&str, usize); 2] = [
    ("CLOCK_ANSWERED", offset_of!(TraceHeader, clock_answered)),
    ("CLOCK", offset_of!(TraceHeader, clock)),
];

fn halves(id: [u8; 16]) -> [u64; 2] {
    let [a, b, c, d, e, f, g, h, low @ ..] = id;
    [
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        u64::from_ne_bytes(low),
    ]
}

fn whole([first, last]: [u64; 2]) -> [u8; 16] {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&first.to_ne_bytes());
    id[8..].copy_from_slice(&last.to_ne_bytes());
    id
}

/// Which of its requests a block samples, and where it writes them. For the block alone.
#[derive(Debug)]
pub(crate) struct Tracer<'a> {
    every: u32,
    slots: &'a [TraceSlot],
    written: u32,
}

impl<'a> Tracer<'a> {
    /// Samples one request in `every`, beside those that carry a trace id; none if it is 0.
    pub(crate) fn new(every: u32, slots: &'a [TraceSlot]) -> Option<Self> {
        (every > 0 && !slots.is_empty()).then_some(Self {
            every,
            slots,
            written: 0,
        })
    }

    /// Whether the request of this position in the ring is to be sampled.
    #[inline]
    pub(crate) fn wants(&self, position: u32, extension: Option<&Extension>) -> bool {
        position.is_multiple_of(self.every)
            || extension.is_some_and(|extension| extension.trace_id != [0; 16])
    }

    /// Writes a sample over the oldest one. Wait-free.
    pub(crate) fn record(
        &mut self,
        correlation: u32,
        extension: Option<&Extension>,
        seen: u64,
        done: u64,
    ) {
        let number = self.written;
        self.written = number.wrapping_add(1);
        let index = number as usize % self.slots.len();
        if let Some(slot) = self.slots.get(index) {
            slot.write(&Sample {
                number,
                correlation,
                sent_ns: extension.map_or(0, |extension| extension.timestamp_ns),
                seen,
                done,
                trace_id: extension.map_or([0; 16], |extension| extension.trace_id),
            });
        }
    }
}

/// The samples that a block keeps, oldest first. Never torn; what is being replaced at this moment is left out.
pub(crate) fn read(slots: &[TraceSlot]) -> Vec<Sample> {
    let mut samples: Vec<Sample> = slots.iter().filter_map(TraceSlot::read).collect();
    // Modulo 2^32; all of them lie within what the slots hold, and a reader's delay.
    if let Some(newest) = samples
        .iter()
        .map(|sample| sample.number)
        .reduce(|a, b| if b.wrapping_sub(a) < 1 << 31 { b } else { a })
    {
        samples
            .sort_unstable_by_key(|sample| std::cmp::Reverse(newest.wrapping_sub(sample.number)));
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots() -> Vec<TraceSlot> {
        (0..TRACE_SLOTS).map(|_| TraceSlot::default()).collect()
    }

    fn extension(trace: u8) -> Extension {
        Extension {
            timestamp_ns: 5,
            deadline_ns: 6,
            trace_id: [trace; 16],
        }
    }

    #[test]
    fn one_request_in_n_is_sampled_and_every_one_with_a_trace_id() {
        let slots = slots();
        assert!(Tracer::new(0, &slots).is_none());
        assert!(Tracer::new(1, &[]).is_none());
        let tracer = Tracer::new(10, &slots).unwrap();
        let sampled: Vec<u32> = (0..35).filter(|at| tracer.wants(*at, None)).collect();
        assert_eq!(sampled, [0, 10, 20, 30]);
        assert!(!tracer.wants(7, Some(&extension(0))));
        assert!(tracer.wants(7, Some(&extension(1))));
    }

    #[test]
    fn the_latest_samples_are_kept_in_order() {
        let slots = slots();
        let mut tracer = Tracer::new(1, &slots).unwrap();
        assert_eq!(read(&slots), []);
        // The number of the last but one sample wraps around.
        tracer.written = u32::MAX - 1000;
        for time in 0..1002 {
            tracer.record(time as u32 + 7, Some(&extension(3)), time, time + 1);
        }
        let samples = read(&slots);
        assert_eq!(samples.len(), 256);
        for (sample, time) in samples.iter().zip(1002 - 256..) {
            assert_eq!(sample.number, (u32::MAX - 1000).wrapping_add(time));
            assert_eq!(sample.correlation, time + 7);
            assert_eq!(
                (sample.seen, sample.done),
                (time.into(), u64::from(time) + 1)
            );
            assert_eq!((sample.sent_ns, sample.trace_id), (5, [3; 16]));
        }
        assert_eq!(samples.last().unwrap().number, 0);
    }

    #[test]
    fn a_reader_never_sees_half_a_sample() {
        use std::sync::LazyLock;
        use std::sync::atomic::AtomicBool;
        static SLOTS: LazyLock<Vec<TraceSlot>> =
            LazyLock::new(|| (0..2).map(|_| TraceSlot::default()).collect());
        static DONE: AtomicBool = AtomicBool::new(false);
        let reader = std::thread::spawn(|| {
            let mut read_any = false;
            while !DONE.load(Ordering::Relaxed) || !read_any {
                for sample in read(&SLOTS) {
                    let time = u64::from(sample.number);
                    assert_eq!((sample.seen, sample.done), (time, time + 1));
                    assert_eq!(sample.correlation, sample.number);
                    assert_eq!(sample.trace_id, [sample.number as u8; 16]);
                    read_any = true;
                }
            }
        });
        let mut tracer = Tracer::new(1, &SLOTS).unwrap();
        for number in 0..300_000 {
            let id = extension(number as u8);
            tracer.record(number, Some(&id), number.into(), u64::from(number) + 1);
        }
        DONE.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    }

    #[test]
    fn times_are_differences_and_never_negative() {
        let trace = MessageTrace {
            block: 0,
            sample: 0,
            correlation: 0,
            trace_id: None,
            sent_ns: Some(100),
            seen_ns: 130,
            done_ns: 137,
            clock_error: Duration::ZERO,
        };
        assert_eq!(trace.queue_time(), Some(Duration::from_nanos(30)));
        assert_eq!(trace.handler_time(), Duration::from_nanos(7));
        let late = MessageTrace {
            sent_ns: Some(131),
            ..trace
        };
        assert_eq!(late.queue_time(), Some(Duration::ZERO));
        let unstamped = MessageTrace {
            sent_ns: None,
            ..trace
        };
        assert_eq!(unstamped.queue_time(), None);
    }
}
