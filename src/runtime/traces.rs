//! The traces of a kernel: its blocks' samples, on the host's clock.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use crate::backend::{BlockClock, BlockMemory, DriverClock};
use crate::kernel::{MessageTrace, Sample, read_samples};
use crate::time::{Bracket, Deadline, DeviceClock, HostTime, now_ns_ordered};

/// How long a device may take to tell its clock for the first time: it may be in a handler, or between two slices. One that takes longer
/// is asked again by the next call.
const FIRST_ANSWER: Duration = Duration::from_millis(100);

/// How long it is then asked again, for the one answer that came fastest, and how often: looks at the host's commands are up to 64 polls
/// apart, so that one in so many questions meets one at once.
const MORE_ANSWERS: Duration = Duration::from_millis(2);
const QUESTIONS: u32 = 64;

/// How often a driver is asked, for the one answer that came fastest: a thread may lose its core in any of them.
const DRIVER_QUESTIONS: u32 = 16;

/// One reading of a clock that the driver tells.
fn ask(driver: &dyn DriverClock) -> Option<Bracket> {
    let before_ns = now_ns_ordered();
    let ticks = driver.ticks()?;
    Some(Bracket {
        before_ns,
        ticks,
        after_ns: now_ns_ordered(),
    })
}

/// What a kernel that is traced needs to read its traces.
#[derive(Debug)]
pub(super) struct Tracing {
    /// `None` where blocks read the host's clock.
    device: Option<Mutex<DeviceClock>>,
    /// Who tells that clock; `None` where the blocks do.
    driver: Option<Arc<dyn DriverClock>>,
}

impl Tracing {
    pub(super) fn new(clock: BlockClock) -> Self {
        let (device, driver) = match clock {
            BlockClock::Host => (None, None),
            BlockClock::Device => (Some(DeviceClock::default()), None),
            BlockClock::Driver(driver) => {
                (Some(DeviceClock::with_step(driver.step())), Some(driver))
            }
        };
        Self {
            device: device.map(Mutex::new),
            driver,
        }
    }

    /// Compares the device's clock with the host's. Waits for a kernel that tells it and does not answer, so that such a one should be polling.
    pub(super) fn compare(&self, blocks: &[Arc<BlockMemory>]) {
        if let (Some(clock), Some(driver)) = (&self.device, &self.driver) {
            // One asks at a time, so that the answers come in order.
            let mut clock = clock.lock();
            let answers = (0..DRIVER_QUESTIONS).filter_map(|_| ask(driver.as_ref()));
            if let Some(best) = answers.min_by_key(Bracket::width_ns) {
                clock.add(best);
            }
            return;
        }
        let (Some(clock), Some(block)) = (&self.device, blocks.first()) else {
            return;
        };
        // One asks at a time.
        let mut clock = clock.lock();
        let Some(mut best) = block.read_clock(Deadline::after(FIRST_ANSWER)) else {
            return;
        };
        let end = Deadline::after(MORE_ANSWERS);
        for _ in 1..QUESTIONS {
            let Some(bracket) = block.read_clock(end) else {
                break;
            };
            clock.observe(bracket.ticks);
            if bracket.width_ns() <= best.width_ns() {
                best = bracket;
            }
        }
        clock.add(best);
    }

    /// All samples that the blocks keep, by block and oldest first.
    pub(super) fn read(&self, blocks: &[Arc<BlockMemory>]) -> Vec<(u32, Sample)> {
        blocks
            .iter()
            .flat_map(|block| {
                let samples = read_samples(block.traces());
                samples.into_iter().map(|sample| (block.index, sample))
            })
            .collect()
    }

    /// Samples that were read before the clocks were last compared, on the host's clock. `None` if nothing is known of the device's yet.
    pub(super) fn place(&self, samples: &[(u32, Sample)]) -> Option<Vec<MessageTrace>> {
        let clock = self.device.as_ref().map(Mutex::lock);
        let host_time = |ticks| match &clock {
            None => Some(HostTime {
                ns: ticks,
                error_ns: 0,
            }),
            Some(clock) => clock.host_time(ticks),
        };
        samples
            .iter()
            .map(|(block, sample)| {
                let (seen, done) = (host_time(sample.seen)?, host_time(sample.done)?);
                Some(MessageTrace {
                    block: *block,
                    sample: sample.number,
                    correlation: sample.correlation,
                    trace_id: (sample.trace_id != [0; 16]).then_some(sample.trace_id),
                    sent_ns: (sample.sent_ns != 0).then_some(sample.sent_ns),
                    seen_ns: seen.ns,
                    done_ns: done.ns,
                    clock_error: Duration::from_nanos(seen.error_ns.max(done.error_ns)),
                })
            })
            .collect()
    }
}
