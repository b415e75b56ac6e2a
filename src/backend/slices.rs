//! Kernels that run by slices: how long a slice is, and which kernel needs one.

use std::time::{Duration, Instant};

use super::Resident;
use crate::kernel::BlockState;
use crate::thread::KernelWait;

/// How long a slice on hardware should take: far below every watchdog (from 2 s on Windows and macOS), even with another one
/// queued.
const SLICE_TARGET: Duration = Duration::from_millis(25);

/// Bounds of a hardware slice's polls. The upper one keeps even a slice whose polls became ten times slower (1 us each, over a bus)
/// below a watchdog's time.
const FEWEST_POLLS: u32 = 1_000;
const MOST_POLLS: u32 = 1 << 18;

/// Polls of a first slice on hardware: some 5 ms over PCIe.
const FIRST_POLLS: u32 = 4_000;

/// Polls of a slice while kernels share what runs them: nobody keeps the others waiting for long.
pub(crate) const SHARED_POLLS: u32 = 2_000;

/// Empty polls after which a slice of a kernel that sleeps when idle ends.
pub(crate) const PARKING_IDLE_POLLS: u32 = 2_000;

/// How long a sleeping kernel that is blocked on a full reply ring is left alone.
pub(crate) const BLOCKED_NAP: Duration = Duration::from_micros(200);

/// The polls of a slice, made such that it takes as long as it should.
#[derive(Debug)]
pub(crate) struct Pace {
    polls: u32,
    most: u32,
}

impl Pace {
    /// For hardware, whose speed is found out.
    pub(crate) fn hardware() -> Self {
        Self {
            polls: FIRST_POLLS,
            most: MOST_POLLS,
        }
    }

    /// For a driver that allows no more polls than these.
    #[cfg(feature = "vulkan")]
    pub(crate) fn software(most: u32) -> Self {
        Self { polls: most, most }
    }

    pub(crate) fn polls(&self) -> u32 {
        self.polls
    }

    /// Goes by how long a slice took that had these polls alone to end it. Only one that was idle may lead to longer ones: messages are
    /// charged with more polls than they take, and the next slice may have none.
    pub(crate) fn measured(&mut self, slice: Duration, idle: bool) {
        if slice > SLICE_TARGET {
            let ratio = SLICE_TARGET.as_secs_f64() / slice.as_secs_f64();
            self.polls = ((f64::from(self.polls) * ratio.max(0.1)) as u32).max(FEWEST_POLLS);
        } else if slice < SLICE_TARGET / 2 && idle {
            self.polls = (self.polls + self.polls / 2).min(self.most);
        }
    }
}

/// Whether a kernel needs slices, going by what its last ones did.
#[derive(Debug)]
pub(crate) struct Attention {
    /// Whether it gets slices only while it has requests, whatever its wait strategy is: where none sees requests that were
    /// written after it began.
    on_request: bool,
    /// Whether it sleeps, when to look at it again, whether requests do not matter until then.
    asleep: bool,
    look_at: Instant,
    blocked: bool,
    /// Whether a request was there already when the last slices ended.
    waited: bool,
    /// Progress and heartbeats when last looked at.
    progress: u32,
    heartbeats: u32,
}

impl Attention {
    pub(crate) fn new(on_request: bool) -> Self {
        Self {
            on_request,
            asleep: false,
            look_at: Instant::now(),
            blocked: false,
            waited: false,
            progress: 0,
            heartbeats: 0,
        }
    }

    /// Whether slices of it should be submitted now.
    pub(crate) fn wants_slices(&self, kernel: &Resident, now: Instant) -> bool {
        if !kernel.is_wanted() {
            return false;
        }
        let answered = kernel
            .blocks
            .iter()
            .all(|block| block.control().state() == Some(BlockState::Polling));
        !self.asleep
            || !answered
            || now >= self.look_at
            || (!matches!(kernel.wait, KernelWait::Interval(_))
                && !self.blocked
                && kernel.has_request())
    }

    /// Whether nothing has come of its slices since they were last looked at.
    pub(crate) fn was_idle(&self, kernel: &Resident) -> bool {
        kernel.progress() == self.progress
    }

    /// Looks at what slices that are done have done for it.
    pub(crate) fn observe(&mut self, kernel: &Resident, now: Instant) {
        let heartbeats = kernel.heartbeats();
        if heartbeats != self.heartbeats {
            self.heartbeats = heartbeats;
            kernel.show_life();
        }
        let progress = kernel.progress();
        let idle = progress == self.progress;
        self.progress = progress;
        self.asleep = self.on_request || (idle && kernel.may_sleep());
        if self.asleep {
            // Requests that no slice took up although it looked for long: there is no room for their replies.
            let has_request = kernel.has_request();
            self.blocked = idle && has_request && self.waited;
            self.waited = has_request;
            let nap = match kernel.wait {
                _ if self.blocked => BLOCKED_NAP,
                KernelWait::Interval(interval) => interval.min(kernel.heartbeat_interval),
                _ => kernel.heartbeat_interval,
            };
            self.look_at = now + nap;
        }
    }

    /// How long it can do without being looked at, unless somebody rings; zero for one that must be polled for requests.
    pub(crate) fn nap(&self, kernel: &Resident, now: Instant) -> Duration {
        let nobody_rings = matches!(kernel.wait, KernelWait::Spin | KernelWait::SpinYield);
        if self.on_request && nobody_rings && !self.blocked {
            return Duration::ZERO;
        }
        self.look_at.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_become_as_long_as_they_should_be() {
        // One microsecond a poll.
        let mut pace = Pace::hardware();
        for _ in 0..50 {
            pace.measured(Duration::from_micros(pace.polls().into()), true);
        }
        let slice = Duration::from_micros(pace.polls().into());
        assert!(
            slice > SLICE_TARGET / 3 && slice <= SLICE_TARGET,
            "{slice:?}"
        );
        // A tenth of the speed.
        for _ in 0..5 {
            pace.measured(10 * Duration::from_micros(pace.polls().into()), true);
        }
        assert!(10 * Duration::from_micros(pace.polls().into()) <= SLICE_TARGET);
    }

    #[test]
    fn busy_slices_and_cut_ones_let_no_slice_grow_beyond_bounds() {
        let mut pace = Pace::hardware();
        for _ in 0..1000 {
            pace.measured(Duration::from_micros(10), false);
        }
        assert_eq!(pace.polls(), FIRST_POLLS, "busy ones tell nothing");
        // Idle ones that something else has cut short.
        for _ in 0..1000 {
            pace.measured(Duration::from_micros(10), true);
        }
        assert!(Duration::from_micros(pace.polls().into()) < Duration::from_secs(1));
    }
}
