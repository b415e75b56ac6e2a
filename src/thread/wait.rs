//! What a thread does between two empty polls.

use std::cell::Cell;
use std::time::Duration;

use super::awaited::Awaited;
use super::cores::SpinPermit;
use super::event_count::EventCount;
use super::spin_watch::SpinWatch;
use crate::time::{self, Deadline};

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

/// Empty steps between two looks of `Auto` whether spinning gets on: 20 to 40 us, of which a look
/// takes less than 1 %.
const STEPS_PER_LOOK: u32 = 64;

/// Looks in which those that a caller waits for, and that have something to do, show no sign of
/// life, until it parks: some 200 us, so that what the wake-up costs is little of what they take,
/// be they busy or without a core.
const LOOKS_WITHOUT_LIFE: u32 = 6;

/// How a thread waits for a message.
///
/// | strategy | between empty polls | wakes | core used while idle |
/// |---|---|---|---|
/// | `Spin` | a pause instruction | at once | all of one |
/// | `SpinYield` | a pause, after some 256 polls `sched_yield` | at once, or when scheduled | all that nobody else wants |
/// | `Park` | a pause, after some 128 polls it sleeps | by a system call of the other side | none |
/// | `Auto` | as `Spin` while there are cores for all spinning threads and spinning gets on, else as `Park` | | |
///
/// Cores are counted as the process may use them now, and as far as the quotas of its control
/// groups reach (`cpu.max`, `cpu.cfs_quota_us`): with half a core nothing spins.
///
/// `Auto` for a kernel of the CPU backend is decided at launch, for all blocks of its grid
/// together: they spin if every one of them gets a core that no other spinning kernel has, of this
/// process or of another one, and one core is left for the callers. A block that finds that it was
/// not running for half a millisecond while it spun (others use its core, or the quota is used up)
/// parks, may run on other cores meanwhile, and tries again after twenty times as long as it was
/// not running, 10 ms at least; each time that it fails soon, after twice as long as before, up to
/// 5 s.
///
/// `Auto` for a caller is decided during each wait that lasts longer than some 5 us. It spins on if there is a core for it,
/// for each spinner, and for a kernel that parks. It parks when it finds itself on a core that the kernel spins on, when it
/// was not running for half a millisecond (with the same pauses, thread by thread), or when the kernel has requests
/// and shows no sign of life for some 200 us: its handler takes long, or it has no core. A
/// [`Client`](crate::Client) beside others asks after some 1 us, because others can do its work
/// meanwhile; without a core it offers its own to them (`sched_yield`, up to 64 times) before it sleeps.
///
/// The side that wakes a sleeper pays for it: `try_send` to a kernel that parks has a memory fence,
/// and a system call if the kernel sleeps. To a kernel that spins it has neither. Where Linux's
/// `membarrier` is missing or refused, as on other systems, sending to a kernel with `Auto` has the
/// fence in either case. With it, a block that goes over from spinning to parking, at most once in
/// 10 ms, interrupts each core that runs a thread of the process.
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
    /// Spin, and park for a while when that does not get on. Of threads of this process only.
    Auto,
    SpinYield,
    Park,
    /// Look once per interval.
    Interval(Duration),
}

impl KernelWait {
    /// Whether a sender must look for a sleeping kernel after each message.
    pub(crate) const fn needs_wake(self) -> bool {
        matches!(self, Self::Park | Self::Auto)
    }
}

/// What the polling loop of a kernel does after an empty step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdleStep {
    /// Poll again.
    Poll,
    /// See whether spinning gets on, and poll again.
    Look,
    /// Sleep until woken, at most until the next heartbeat is due.
    Sleep,
    /// Sleep for this long.
    SleepFor(Duration),
}

impl KernelWait {
    /// Whether the look after the `empty_steps`-th empty step is the first one in a row.
    pub(crate) const fn is_first_look(empty_steps: u32) -> bool {
        empty_steps <= STEPS_PER_LOOK
    }

    /// Whether there was a look in so many empty steps in a row.
    #[inline]
    pub(crate) const fn has_looked(empty_steps: u32) -> bool {
        empty_steps >= STEPS_PER_LOOK
    }

    /// What follows after the `empty_steps`-th empty step in a row.
    #[inline]
    pub(crate) fn idle(self, empty_steps: u32) -> IdleStep {
        match self {
            Self::Spin => std::hint::spin_loop(),
            Self::Auto => {
                std::hint::spin_loop();
                if empty_steps.is_multiple_of(STEPS_PER_LOOK) {
                    return IdleStep::Look;
                }
            }
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
    spin: Option<CallerSpin>,
    longest_sleep: Duration,
    is_among_others: bool,
}

/// What a caller that spins by `Auto` knows.
#[derive(Debug)]
struct CallerSpin {
    _permit: SpinPermit,
    watch: SpinWatch,
    /// What those that it waits for have done so far, and how many looks ago they did so.
    progress: Option<u64>,
    looks_without_life: u32,
}

thread_local! {
    /// Whether the calling thread got on when it last spun.
    static OWN_WATCH: Cell<SpinWatch> = const { Cell::new(SpinWatch::new()) };
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
            spin: None,
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
    /// Returns false once the deadline has passed: poll once more then, and give up. The clock
    /// starts at the fourth call, some 1 us into the wait: replies that are faster cost no clock
    /// read. A timeout of zero is over at once. `awaited` are those that it waits for.
    #[inline]
    pub(crate) fn pause(
        &mut self,
        awaited: &impl Awaited,
        event: &EventCount,
        is_ready: impl FnOnce() -> bool,
    ) -> bool {
        match self.step(awaited) {
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
    pub(crate) fn pause_or_nap(&mut self, awaited: &impl Awaited, nap: Duration) -> bool {
        match self.step(awaited) {
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
    pub(crate) fn step(&mut self, awaited: &impl Awaited) -> CallerStep {
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
            WaitStrategy::Auto => return self.auto_step(awaited),
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
    fn auto_step(&mut self, awaited: &impl Awaited) -> CallerStep {
        let is_due = match self.spin {
            Some(_) => self.steps.is_multiple_of(STEPS_PER_LOOK),
            None if self.is_among_others => self.steps >= STEPS_AMONG_OTHERS,
            None => self.steps >= STEPS_BEFORE_PARK,
        };
        if is_due {
            return self.decide(awaited);
        }
        std::hint::spin_loop();
        CallerStep::Poll
    }

    /// Whether it spins on.
    #[cold]
    #[inline(never)]
    fn decide(&mut self, awaited: &impl Awaited) -> CallerStep {
        let now = time::now_ns();
        let spins = match &mut self.spin {
            Some(spin) => spin.gets_on(awaited, now),
            None => {
                self.spin = CallerSpin::begin(awaited, self.is_among_others, now);
                self.spin.is_some()
            }
        };
        if spins {
            return CallerStep::Poll;
        }
        if self.spin.take().is_none()
            && self.is_among_others
            && self.steps < STEPS_AMONG_OTHERS + YIELDS_BEFORE_SLEEP
        {
            std::thread::yield_now();
            return CallerStep::Poll;
        }
        CallerStep::Sleep
    }
}

impl CallerSpin {
    /// `None` if the caller should not spin now.
    fn begin(awaited: &impl Awaited, is_among_others: bool, now_ns: u64) -> Option<Self> {
        let mut watch = OWN_WATCH.get();
        if !watch.may_spin(now_ns) || current_core().is_some_and(|core| awaited.is_on(core)) {
            return None;
        }
        let spared = usize::from(awaited.needs_core()) + usize::from(is_among_others);
        let permit = SpinPermit::sparing(spared, 1)?;
        watch.begin(now_ns);
        Some(Self {
            _permit: permit,
            watch,
            progress: awaited.progress(),
            looks_without_life: 0,
        })
    }

    /// Whether spinning gets on: the caller's thread runs, and so do those that it waits for.
    fn gets_on(&mut self, awaited: &impl Awaited, now_ns: u64) -> bool {
        let progress = awaited.progress();
        if progress.is_none() || progress != self.progress {
            self.progress = progress;
            self.looks_without_life = 0;
        } else {
            self.looks_without_life += 1;
        }
        let gets_on = self.watch.gets_on(now_ns) && self.looks_without_life < LOOKS_WITHOUT_LIFE;
        if !gets_on {
            self.watch.pause(now_ns);
        }
        gets_on
    }
}

impl Drop for CallerSpin {
    /// A thread that was stopped mostly finds a reply when it runs again.
    fn drop(&mut self) {
        let now = time::now_ns();
        if !self.watch.gets_on(now) {
            self.watch.pause(now);
        }
        OWN_WATCH.set(self.watch);
    }
}

/// The core that the calling thread runs on. No system call on the architectures whose C libraries
/// have a faster way.
fn current_core() -> Option<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the call has no preconditions; it gives -1 where it is not supported.
        usize::try_from(unsafe { libc::sched_getcpu() }).ok()
    }
    #[cfg(not(target_os = "linux"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::thread::AnyThread;
    use std::time::Instant;

    fn run_out(strategy: WaitStrategy, timeout: Duration) -> (Duration, u64) {
        let event = EventCount::new();
        let begin = Instant::now();
        let mut waiter = Waiter::new(strategy, timeout);
        let mut polls = 0;
        while waiter.pause(&AnyThread, &event, || false) {
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
