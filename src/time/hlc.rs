//! A hybrid logical clock: timestamps of several threads, kernels, devices and processes that agree with causality, and are close
//! to the time of day (Kulkarni, Demirbas, Madeppa, Avva and Leone, "Logical Physical Clocks", OPODIS 2014).

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::clock::now_ns;

/// Low bits that count. The paper has 16, beside 48 bits in units of 15 us, which is longer than most messages of this crate live: queue
/// times are taken from these stamps. With 10 bits the physical part is in units of 1.024 us. It costs nothing: whatever the
/// split, a timestamp that counts moves by one, and one more event a nanosecond than the clock has is what it takes to
/// overflow.
const LOGICAL_BITS: u32 = 10;

const LOGICAL_MASK: u64 = (1 << LOGICAL_BITS) - 1;

/// How far a remote timestamp may be ahead unless the clock is told otherwise. Clocks of machines that keep the time of day are
/// milliseconds apart; that of a process strays from it by 10 ppm at most ([`now_ns`]), which is a second a day. What is ten seconds ahead
/// is no timestamp, or comes from a machine without the time of day.
const DEFAULT_MAX_AHEAD: Duration = Duration::from_secs(10);

/// The most that may be asked for: a day, as for every duration of the runtime. It keeps sums
/// within 64 bits: this machine's clock begins in 2262 at the latest, and the numbers end in 2554.
const LONGEST_AHEAD: Duration = Duration::from_secs(24 * 60 * 60);

/// A timestamp of an [`Hlc`]. Greater means "not before": if one event can have had an influence on another, its timestamp is the lesser.
///
/// | bits | what |
/// |---|---|
/// | 10 to 63 | physical part: time since the Unix epoch in units of 1024 ns, the largest that the event can know of |
/// | 0 to 9 | logical part: counts events that share a physical part |
///
/// A logical part that overflows carries into the physical one, so that the whole goes on to increase. Read as one number it is
/// nanoseconds since the Unix epoch, like [`now_ns`], at most 1024 ns behind the clock of the event; that is how it travels in
/// [`Extension::timestamp_ns`](crate::message::Extension::timestamp_ns).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HlcTimestamp(u64);

impl HlcTimestamp {
    /// From what [`as_u64`](Self::as_u64) gave, or from an extension's `timestamp_ns`. Any number is a timestamp; stamps in nanoseconds that
    /// no `Hlc` gave order as what they say.
    #[inline]
    #[must_use]
    pub const fn from_u64(bits: u64) -> Self {
        Self(bits)
    }

    /// All 64 bits: nanoseconds since the Unix epoch, to 1024 ns.
    #[inline]
    #[must_use]
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// The physical part, in nanoseconds since the Unix epoch: a multiple of 1024.
    #[inline]
    #[must_use]
    pub const fn physical_ns(self) -> u64 {
        self.0 & !LOGICAL_MASK
    }

    /// The logical part, 0 to 1023.
    #[inline]
    #[must_use]
    pub const fn logical(self) -> u16 {
        (self.0 & LOGICAL_MASK) as u16
    }
}

/// A remote timestamp that is further ahead of this machine's clock than an [`Hlc`] accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooFarAhead {
    /// How far it is ahead.
    pub ahead: Duration,
    /// How far it may be.
    pub max: Duration,
}

impl fmt::Display for TooFarAhead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the timestamp is {:?} ahead of this clock, which accepts {:?}",
            self.ahead, self.max
        )
    }
}

impl std::error::Error for TooFarAhead {}

/// A hybrid logical clock. Share one among all threads that need not be told apart (`Arc<Hlc>`), and hand it to the kernels whose messages
/// it is to stamp ([`LaunchOptions::hlc`](crate::LaunchOptions::hlc)); whoever receives a stamped message that another clock may have
/// stamped calls [`update`](Self::update).
///
/// What it promises: if event a happened before event b (on one thread in this order, or by a chain of messages, each taken up by
/// `update`), the timestamp of a is less than that of b. All timestamps of one clock differ. They stay within the largest clock
/// error among those that talk to each other, and so within `max_ahead` of this machine's clock, plus a nanosecond for each event
/// that comes faster than the clock goes on.
///
/// No call blocks, allocates or calls the system once [`now_ns`] is calibrated (a runtime's builder does that); each is lock-free and
/// repeats only when another thread was given a timestamp meanwhile. Two clocks are equal if they are the same one.
///
/// ```
/// use ringkernel::time::{Hlc, HlcTimestamp};
/// let (here, there) = (Hlc::new(), Hlc::new());
/// let sent = here.now();
/// // `sent.as_u64()` travels with a message. On the other side:
/// let received = there.update(HlcTimestamp::from_u64(sent.as_u64()))?;
/// assert!(sent < received && received < there.now());
/// # Ok::<(), ringkernel::time::TooFarAhead>(())
/// ```
#[derive(Debug)]
pub struct Hlc {
    /// The last timestamp given.
    last: AtomicU64,
    max_ahead: Duration,
}

impl Hlc {
    /// A clock that accepts remote timestamps up to ten seconds ahead.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            last: AtomicU64::new(0),
            max_ahead: DEFAULT_MAX_AHEAD,
        }
    }

    /// A clock that accepts remote timestamps up to this far ahead of the machine's own; more than a day counts as a day.
    #[must_use]
    pub fn with_max_ahead(max_ahead: Duration) -> Self {
        Self {
            max_ahead: max_ahead.min(LONGEST_AHEAD),
            ..Self::new()
        }
    }

    /// The timestamp of a local event, or of a message that is about to be sent: greater than all that this clock gave or accepted before.
    #[inline]
    #[must_use]
    pub fn now(&self) -> HlcTimestamp {
        self.advance(now_ns(), 0)
    }

    /// The timestamp of a message's arrival: greater than the message's own, and than all that this clock gave or accepted before.
    ///
    /// # Errors
    /// [`TooFarAhead`] if the message's timestamp is further ahead of this machine's clock than `max_ahead`. The clock is as it was then.
    #[inline]
    pub fn update(&self, remote: HlcTimestamp) -> Result<HlcTimestamp, TooFarAhead> {
        self.receive(now_ns(), remote)
    }

    /// The last timestamp that this clock gave; zero before the first. May be out of date when it is looked at.
    #[must_use]
    pub fn latest(&self) -> HlcTimestamp {
        HlcTimestamp(self.last.load(Ordering::Relaxed))
    }

    #[inline]
    fn receive(&self, now: u64, remote: HlcTimestamp) -> Result<HlcTimestamp, TooFarAhead> {
        let ahead = Duration::from_nanos(remote.0.saturating_sub(now));
        if ahead > self.max_ahead {
            return Err(TooFarAhead {
                ahead,
                max: self.max_ahead,
            });
        }
        Ok(self.advance(now, remote.0))
    }

    /// The paper's rules for sending and for receiving in one: the physical part is the largest of those known; where that is the
    /// machine's own it counts from zero, elsewhere one up from the largest. As physical and logical part are one number, the largest number
    /// has the largest parts.
    #[inline]
    fn advance(&self, now: u64, remote: u64) -> HlcTimestamp {
        let physical = now & !LOGICAL_MASK;
        // Relaxed: whoever learns of a timestamp by other means than this word has been synchronised by those means, and
        // read-modify-writes of one word are in one order anyway.
        let mut last = self.last.load(Ordering::Relaxed);
        loop {
            // Does not saturate before the year 2554: `remote` is within a day of this machine's
            // clock, `last` by induction.
            let next = physical.max(last.max(remote).saturating_add(1));
            match self
                .last
                .compare_exchange_weak(last, next, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return HlcTimestamp(next),
                Err(current) => last = current,
            }
        }
    }
}

impl Default for Hlc {
    fn default() -> Self {
        Self::new()
    }
}

impl PartialEq for Hlc {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Hlc {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A time of day in 2026, a multiple of 1024.
    const NOW: u64 = 1_790_000_000_000_000_000 & !LOGICAL_MASK;

    fn physical(ns: u64) -> u64 {
        ns & !LOGICAL_MASK
    }

    #[test]
    fn a_timestamp_has_the_parts_that_it_was_made_of() {
        let stamp = HlcTimestamp::from_u64(NOW | 5);
        assert_eq!((stamp.physical_ns(), stamp.logical()), (NOW, 5));
        assert_eq!(stamp.as_u64(), NOW | 5);
        let last = HlcTimestamp::from_u64(u64::MAX);
        assert_eq!(last.logical(), 1023);
        assert_eq!(last.physical_ns() | u64::from(last.logical()), u64::MAX);
    }

    /// Figure 5 of the paper, in its four cases.
    #[test]
    fn the_rules_are_those_of_the_paper() {
        let clock = Hlc::new();
        let parts = |stamp: HlcTimestamp| (stamp.physical_ns(), stamp.logical());
        // A local event: the machine's clock leads, then stands still, then goes on.
        assert_eq!(parts(clock.advance(NOW, 0)), (NOW, 0));
        assert_eq!(parts(clock.advance(NOW + 7, 0)), (NOW, 1));
        assert_eq!(parts(clock.advance(NOW + 1024, 0)), (NOW + 1024, 0));
        // A message from a clock that is ahead: one up from it, for as long as it leads.
        let remote = HlcTimestamp(NOW + 4096 + 9);
        let received = clock.receive(NOW + 1024, remote).unwrap();
        assert_eq!(parts(received), (NOW + 4096, 10));
        assert_eq!(parts(clock.advance(NOW + 2048, 0)), (NOW + 4096, 11));
        // A message of the same physical part with the smaller count: one up from our own.
        let remote = HlcTimestamp(NOW + 4096 + 2);
        let received = clock.receive(NOW + 2048, remote).unwrap();
        assert_eq!(parts(received), (NOW + 4096, 12));
        // The machine's clock leads again.
        let received = clock.receive(NOW + 8192, remote).unwrap();
        assert_eq!(parts(received), (NOW + 8192, 0));
    }

    #[test]
    fn a_logical_part_that_overflows_carries() {
        let clock = Hlc::new();
        let mut before = clock.advance(NOW, 0);
        for _ in 0..5000 {
            // The machine's clock stands still, or is set back.
            let next = clock.advance(NOW - 1_000_000, 0);
            assert!(next > before);
            before = next;
        }
        assert_eq!(before.physical_ns(), NOW + 4 * 1024);
        assert_eq!(before.logical(), 5000 - 4 * 1024);
    }

    #[test]
    fn a_timestamp_too_far_ahead_is_refused_and_changes_nothing() {
        let max = Duration::from_millis(5);
        let clock = Hlc::with_max_ahead(max);
        let before = clock.advance(NOW, 0);
        let bound = NOW + 5_000_000;
        for ahead in [1, 1_000_000, u64::MAX - bound] {
            let error = clock.receive(NOW, HlcTimestamp(bound + ahead)).unwrap_err();
            assert_eq!(error.max, max);
            assert_eq!(error.ahead, max + Duration::from_nanos(ahead));
            assert_eq!(clock.latest(), before);
        }
        assert!(clock.receive(NOW, HlcTimestamp(bound)).unwrap().as_u64() > bound);
        // What cannot be asked for.
        let clock = Hlc::with_max_ahead(Duration::MAX);
        let error = clock.update(HlcTimestamp(u64::MAX)).unwrap_err();
        assert_eq!(error.max, LONGEST_AHEAD);
    }

    #[test]
    fn timestamps_are_the_time_of_day() {
        let clock = Hlc::new();
        let (before, stamp, after) = (now_ns(), clock.now().as_u64(), now_ns());
        assert!(physical(before) <= stamp && stamp <= after);
    }

    #[test]
    fn timestamps_differ_and_increase_under_two_threads() {
        static CLOCK: Hlc = Hlc::new();
        let take = || {
            // As if each message went to another machine and back.
            let elsewhere = Hlc::new();
            let mut given = Vec::with_capacity(200_000);
            for _ in 0..100_000 {
                let sent = CLOCK.now();
                let answered = elsewhere.update(sent).unwrap();
                let received = CLOCK.update(answered).unwrap();
                assert!(sent < answered && answered < received);
                given.extend([sent, received]);
            }
            assert!(given.windows(2).all(|pair| pair[0] < pair[1]));
            given
        };
        let other = std::thread::spawn(take);
        let mut all = take();
        all.extend(other.join().unwrap());
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    /// What happens at one of several machines with clocks of their own.
    #[derive(Clone, Debug)]
    enum Step {
        /// Time goes on everywhere.
        Wait(u64),
        Local(usize),
        /// A message, which arrives at once, or behind others.
        Send(usize, usize),
        Arrive(usize),
    }

    const MACHINES: usize = 3;

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u64..5000).prop_map(Step::Wait),
            (0..MACHINES).prop_map(Step::Local),
            (0..MACHINES, 0..MACHINES).prop_map(|(from, to)| Step::Send(from, to)),
            (0..MACHINES).prop_map(Step::Arrive),
        ]
    }

    /// How often each machine had done something when an event happened, as far as that event can know: its causal past.
    type Past = [u32; MACHINES];

    fn happened_before(a: &Past, b: &Past) -> bool {
        a != b && a.iter().zip(b).all(|(a, b)| a <= b)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn what_happened_before_has_the_lesser_timestamp(
            offsets in proptest::collection::vec(0_u64..100_000, MACHINES),
            rates in proptest::collection::vec(900_u64..1100, MACHINES),
            steps in proptest::collection::vec(step(), 1..120),
        ) {
            let clocks: [Hlc; MACHINES] = std::array::from_fn(|_| Hlc::new());
            let mut pasts = [[0; MACHINES]; MACHINES];
            let mut mail: [Vec<(HlcTimestamp, Past)>; MACHINES] = Default::default();
            let mut events: Vec<(HlcTimestamp, Past)> = Vec::new();
            let mut time = 0_u64;
            let read = |machine: usize, time: u64| NOW + offsets[machine] + time * rates[machine] / 1000;
            for step in steps {
                let (machine, arrived) = match step {
                    Step::Wait(ns) => {
                        time += ns;
                        continue;
                    }
                    Step::Local(machine) | Step::Send(machine, _) => (machine, None),
                    Step::Arrive(machine) => match mail[machine].pop() {
                        Some(message) => (machine, Some(message)),
                        None => continue,
                    },
                };
                let now = read(machine, time);
                pasts[machine][machine] += 1;
                let stamp = match arrived {
                    None => clocks[machine].advance(now, 0),
                    Some((stamp, past)) => {
                        for (mine, theirs) in pasts[machine].iter_mut().zip(past) {
                            *mine = (*mine).max(theirs);
                        }
                        clocks[machine].receive(now, stamp).unwrap()
                    }
                };
                if let Step::Send(_, to) = step {
                    mail[to].push((stamp, pasts[machine]));
                }
                // Never behind the machine's own clock, nor ahead of every clock by more than its events.
                prop_assert!(stamp.as_u64() >= physical(now));
                let ahead = (0..MACHINES).map(|machine| read(machine, time)).max().unwrap_or(0);
                prop_assert!(stamp.as_u64() <= ahead + events.len() as u64);
                events.push((stamp, pasts[machine]));
            }
            for (a, past_a) in &events {
                for (b, past_b) in &events {
                    if happened_before(past_a, past_b) {
                        prop_assert!(a < b, "{a:?} is not before {b:?}");
                    }
                }
            }
        }
    }
}
