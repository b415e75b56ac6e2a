//! What a thread does between two empty polls.

use std::time::Duration;

use super::cores::SpinPermit;
use super::event_count::EventCount;
use crate::time::Deadline;

/// Polls of a slot in a row, a pause apart, before anything else is looked at: whether the kernel ended, whether the
/// timeout has passed. At 25 to 45 ns a poll, these are seen within half a microsecond.
pub(crate) const POLLS_PER_STEP: u32 = 8;

/// Empty steps between two looks at the clock: some 1 us, so that a clock read (10 to 40 ns) stays below 4 %.
const STEPS_PER_CLOCK_READ: u32 = 4;

/// Empty steps before `SpinYield` starts to yield: the reply of a busy CPU kernel comes within a few.
const STEPS_BEFORE_YIELD: u32 = 32;

/// Empty steps before `Park` sleeps, about as long as the wake-up that sleeping costs (5 us).
const STEPS_BEFORE_PARK: u32 = 16;

/// Empty steps before a caller among others asks whether it may go on spinning: 1 us, in which the reply of an idle CPU kernel comes.
const STEPS_AMONG_OTHERS: u32 = 4;

/// Times that a caller among others offers its core before it sleeps. A yield to nobody takes half a microsecond; one to another caller as long
/// as that needs the core, and what comes meanwhile is found in one piece.
const YIELDS_BEFORE_SLEEP: u32 = 64;

/// Empty steps before `Auto` asks whether it may go on spinning: 50 to 100 us, an order of magnitude above a wake-up.
const STEPS_BEFORE_AUTO: u32 = 256;

/// How a thread waits for a message.
///
/// | strategy | between empty polls | wakes | core used while idle |
/// |---|---|---|---|
/// | `Spin` | a pause instruction | at once | all of one |
/// | `SpinYield` | a pause, after some 256 polls `sched_yield` | at once, or when scheduled | all that nobody else wants |
/// | `Park` | a pause, after some 128 polls it sleeps | by a system call of the other side | none |
/// | `Auto` | as `Spin` while there are cores for all spinning threads, else as `Park` | | |
///
/// `Auto` for a kernel is decided at launch, for all blocks of its grid together: they spin if every one of them gets
/// a core that no other spinning kernel of this process has, and one core is left for the callers. `Auto` for a caller
/// is decided during each wait that lasts longer than some 50 us. A [`Client`](crate::Client) beside others asks after some 1 us, because others can do its work
/// meanwhile; without a core it offers its own to them (`sched_yield`, up to 64 times) before it sleeps.
///
/// The side that wakes a sleeper pays for it: `try_send` to a kernel that may park has a memory fence, and a system
/// call if the kernel sleeps. To a kernel that spins it has neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WaitStrategy {
    /// Busy-wait and nothing else. For pinned threads on cores of their own.
    Spin,
    /// Busy-wait, but offer the core to others after a while.
    SpinYield,
    /// Sleep after a short spin.
    Park,
    /// Spin if there are cores for all spinners, else park.
    #[default]
    Auto,
}

impl WaitStrategy {
    /// Whether a thread that waits so can be asleep.
    pub(crate) const fn may_park(self) -> bool {
        matches!(self, Self::Park | Self::Auto)
    }
}

/// How the polling loop of a resident kernel waits; `WaitStrategy` after `Auto` has been decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KernelWait {
    Spin,
    SpinYield,
    Park,
    /// Look once per interval.
    Interval(Duration),
}

impl KernelWait {
    /// Whether a sender must look for a sleeping kernel after each message.
    pub(crate) const fn needs_wake(self) -> bool {
        matches!(self, Self::Park)
    }
}

/// What the polling loop of a kernel does after an empty step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdleStep {
    /// Poll again.
    Poll,
    /// Sleep until woken, at most until the next heartbeat is due.
    Sleep,
    /// Sleep for this long.
    SleepFor(Duration),
}

impl KernelWait {
    /// What follows after the `empty_steps`-th empty step in a row.
    #[inline]
    pub(crate) fn idle(self, empty_steps: u32) -> IdleStep {
        match self {
            Self::Spin => std::hint::spin_loop(),
            Self::SpinYield if empty_steps < STEPS_BEFORE_YIELD => std::hint::spin_loop(),
            Self::SpinYield => std::thread::yield_now(),
            Self::Park if empty_steps < STEPS_BEFORE_PARK => std::hint::spin_loop(),
            Self::Park => return IdleStep::Sleep,
            Self::Interval(interval) => return IdleStep::SleepFor(interval),
        }
        IdleStep::Poll
    }
}

/// One bounded wait of a caller: pause after each empty step, until the deadline.
#[derive(Debug)]
pub(crate) struct Waiter {
    strategy: WaitStrategy,
    timeout: Duration,
    deadline: Option<Deadline>,
    steps: u32,
    permit: Option<SpinPermit>,
    longest_sleep: Duration,
    is_among_others: bool,
}

/// What a waiting caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallerStep {
    Poll,
    Sleep,
    Expired,
}

impl Waiter {
    #[inline]
    pub(crate) fn new(strategy: WaitStrategy, timeout: Duration) -> Self {
        Self {
            strategy,
            timeout,
            deadline: None,
            steps: 0,
            permit: None,
            longest_sleep: Duration::MAX,
            is_among_others: false,
        }
    }

    /// The same wait for somebody whose work others do as well: with `Auto` it asks soon whether it may go on spinning, and may so only if
    /// a core is left then for the others, who would otherwise have to share one with it or with the kernel.
    #[inline]
    pub(crate) fn among_others(self) -> Self {
        Self {
            is_among_others: true,
            ..self
        }
    }

    /// The same wait for an event that nobody may announce: no sleep is longer than this.
    #[inline]
    pub(crate) fn sleeping_at_most(self, longest_sleep: Duration) -> Self {
        Self {
            longest_sleep,
            ..self
        }
    }

    /// Passes the time after an empty step, asleep on `event` if the strategy says so and `is_ready` still says no.
    ///
    /// Returns false once the deadline has passed: poll once more then, and give up. The clock starts at the fourth
    /// call, some 1 us into the wait: replies that are faster cost no clock read. A timeout of zero is over at once.
    #[inline]
    pub(crate) fn pause(&mut self, event: &EventCount, is_ready: impl FnOnce() -> bool) -> bool {
        match self.step() {
            CallerStep::Poll => true,
            CallerStep::Expired => false,
            CallerStep::Sleep => self.sleep(event, is_ready),
        }
    }

    /// What [`pause`](Self::pause) does when it is time to sleep.
    pub(crate) fn sleep(&mut self, event: &EventCount, is_ready: impl FnOnce() -> bool) -> bool {
        let remaining = self.remaining();
        if remaining.is_zero() {
            return false;
        }
        let prepared = event.prepare();
        if !is_ready() {
            prepared.wait(remaining.min(self.longest_sleep));
        }
        true
    }

    /// As [`pause`](Self::pause), for a condition that no notification announces: sleeps for at most `nap`.
    #[inline]
    pub(crate) fn pause_or_nap(&mut self, nap: Duration) -> bool {
        match self.step() {
            CallerStep::Poll => true,
            CallerStep::Expired => false,
            CallerStep::Sleep => {
                let remaining = self.remaining();
                std::thread::sleep(remaining.min(nap));
                !remaining.is_zero()
            }
        }
    }

    /// How often the next step may look at its slot: once if that was all there is time for.
    #[inline]
    pub(crate) fn polls(&self) -> u32 {
        if self.timeout.is_zero() {
            1
        } else {
            POLLS_PER_STEP
        }
    }

    /// Time left of the timeout.
    pub(crate) fn remaining(&self) -> Duration {
        self.deadline
            .as_ref()
            .map_or(self.timeout, Deadline::remaining)
    }

    /// What follows after an empty step; passes the time itself, but for a sleep.
    #[inline]
    pub(crate) fn step(&mut self) -> CallerStep {
        if self.timeout.is_zero() {
            return CallerStep::Expired;
        }
        self.steps = self.steps.wrapping_add(1);
        if self.steps.is_multiple_of(STEPS_PER_CLOCK_READ) && self.has_expired() {
            return CallerStep::Expired;
        }
        match self.strategy {
            WaitStrategy::Spin => std::hint::spin_loop(),
            WaitStrategy::SpinYield if self.steps < STEPS_BEFORE_YIELD => std::hint::spin_loop(),
            WaitStrategy::SpinYield => std::thread::yield_now(),
            WaitStrategy::Park if self.steps < STEPS_BEFORE_PARK => std::hint::spin_loop(),
            WaitStrategy::Park => return CallerStep::Sleep,
            WaitStrategy::Auto => return self.auto_step(),
        }
        CallerStep::Poll
    }

    /// Looks at the clock, which starts with the first look.
    #[inline]
    fn has_expired(&mut self) -> bool {
        match &self.deadline {
            Some(deadline) => deadline.has_passed(),
            None => {
                self.deadline = Some(Deadline::after(self.timeout));
                false
            }
        }
    }

    #[inline]
    fn auto_step(&mut self) -> CallerStep {
        let steps = if self.is_among_others {
            STEPS_AMONG_OTHERS
        } else {
            STEPS_BEFORE_AUTO
        };
        if self.steps < steps || self.permit.is_some() {
            std::hint::spin_loop();
            return CallerStep::Poll;
        }
        self.permit = if self.is_among_others {
            SpinPermit::for_kernel(1)
        } else {
            SpinPermit::for_caller()
        };
        if self.permit.is_some() {
            CallerStep::Poll
        } else if self.is_among_others && self.steps < STEPS_AMONG_OTHERS + YIELDS_BEFORE_SLEEP {
            std::thread::yield_now();
            CallerStep::Poll
        } else {
            CallerStep::Sleep
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn run_out(strategy: WaitStrategy, timeout: Duration) -> (Duration, u64) {
        let event = EventCount::new();
        let begin = Instant::now();
        let mut waiter = Waiter::new(strategy, timeout);
        let mut polls = 0;
        while waiter.pause(&event, || false) {
            polls += 1;
        }
        (begin.elapsed(), polls)
    }

    #[test]
    fn every_strategy_honours_its_timeout() {
        let timeout = Duration::from_millis(20);
        for strategy in [
            WaitStrategy::Spin,
            WaitStrategy::SpinYield,
            WaitStrategy::Park,
            WaitStrategy::Auto,
        ] {
            let (elapsed, _) = run_out(strategy, timeout);
            assert!(elapsed >= timeout, "{strategy:?} {elapsed:?}");
        }
    }

    #[test]
    fn a_timeout_of_zero_is_a_single_poll() {
        assert_eq!(run_out(WaitStrategy::Spin, Duration::ZERO).1, 0);
    }

    #[test]
    fn park_really_sleeps_and_spin_really_spins() {
        let timeout = Duration::from_millis(50);
        let (_, parked) = run_out(WaitStrategy::Park, timeout);
        let (_, spun) = run_out(WaitStrategy::Spin, timeout);
        assert!(spun > 10 * parked, "{spun} polls against {parked}");
    }
}
