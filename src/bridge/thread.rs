//! A device's bridge: a thread, what it looks after, and what it says of itself.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use parking_lot::Mutex;

use super::load::{BridgeLoad, LoadMeter};
use crate::backend::HostPool;
use crate::error::Error;
use crate::logging;
use crate::process::{self, InChild};
use crate::thread::bounded::{BoundedThread, Join};
use crate::thread::event_count::EventCount;
use crate::thread::{
    CoreLease, IdleStep, KernelWait, SpinPermit, SpinWatch, WaitStrategy, affinity,
};
use crate::time::{self, Deadline, Stopwatch};

/// Kernels, connections and subscriptions of kernels that one bridge looks after at most.
const MAX_STATIONS: usize = 1024;

/// Commands that may wait for the thread.
const COMMANDS: usize = 64;

/// Rounds between two looks at the commands while there is work: some 10 us.
const ROUNDS_PER_COMMAND: u32 = 64;

/// How long the thread sleeps while messages wait for a kernel that has no room for them: what waking it up would cost, ten times. A full
/// ring has work for longer.
const BLOCKED_NAP: Duration = Duration::from_micros(50);

/// How long the thread may take to reach the core that a user named for it. Only a machine that is
/// busy with threads of a higher priority needs seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a stop waits for the thread, which does nothing that blocks.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What threads that need the bridge see of it.
#[derive(Debug)]
pub(crate) struct Attention {
    /// Wakes the thread.
    pub(crate) bell: Arc<EventCount>,
    /// Whether the thread spins at the moment, so that nobody needs to do its work.
    spinning: AtomicBool,
    /// Whether the thread is to end.
    stopped: AtomicBool,
}

impl Attention {
    pub(crate) fn new() -> Self {
        Self {
            bell: Arc::new(EventCount::new()),
            spinning: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        }
    }

    #[inline]
    pub(crate) fn is_spinning(&self) -> bool {
        self.spinning.load(Ordering::Relaxed)
    }
}

/// What one look at a station came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    /// Messages moved.
    pub(crate) moved: u32,
    /// Whether messages wait that could not be moved.
    pub(crate) is_waiting: bool,
    /// Whether another thread is at it.
    pub(crate) is_contended: bool,
    /// Whether it is worth to spin for it.
    pub(crate) is_crowded: bool,
    /// Whether there is nothing left to look after.
    pub(crate) is_done: bool,
}

impl Service {
    pub(crate) const IDLE: Self = Self {
        moved: 0,
        is_waiting: false,
        is_contended: false,
        is_crowded: false,
        is_done: false,
    };
    pub(crate) const CONTENDED: Self = Self {
        is_contended: true,
        is_crowded: true,
        ..Self::IDLE
    };
    pub(crate) const DONE: Self = Self {
        is_done: true,
        ..Self::IDLE
    };
}

/// Something that a bridge looks after.
pub(crate) trait Station: Send + Sync + fmt::Debug {
    /// Moves what can be moved, a bounded number of messages. Neither blocks nor allocates.
    fn serve(&self) -> Service;

    /// Whether `serve` would find anything to move.
    fn is_ready(&self) -> bool;

    /// Notes signs of life of the kernels behind it.
    fn sample(&self, now_ns: u64);
}

/// How a bridge's thread behaves.
#[derive(Clone, Debug)]
pub(crate) struct BridgeSettings {
    /// Name of the device.
    pub(crate) device: String,
    pub(crate) wait: WaitStrategy,
    /// How long it sleeps between two looks that find nothing; zero means that the strategy decides.
    pub(crate) poll_interval: Duration,
    /// The core it is to run on.
    pub(crate) core: Option<usize>,
    /// The cores it may run on otherwise.
    pub(crate) cores: Vec<usize>,
    /// Between two looks at the kernels' signs of life.
    pub(crate) sample_interval: Duration,
}

/// A station to look after from now on.
struct Command(Place, Arc<dyn Station>);

/// Room for one station. Given back when dropped.
pub(crate) struct Place {
    taken: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Thread {
    NotStarted(Receiver<Command>),
    Running(BoundedThread),
    Stopped,
}

/// The bridge of one device. Its thread is started when it is first needed, and ended by [`stop`](Self::stop).
pub(crate) struct Bridge {
    settings: BridgeSettings,
    /// Where the memory of its lanes is taken from.
    pub(crate) pool: HostPool,
    pub(crate) attention: Arc<Attention>,
    commands: Sender<Command>,
    /// Places that are taken.
    taken: Arc<AtomicUsize>,
    thread: Mutex<Thread>,
    load: Arc<LoadMeter>,
    /// Whether this process is the child of a fork, and the thread stays with its parent.
    has_forked_since: AtomicBool,
}

impl fmt::Debug for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bridge")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl InChild for Bridge {
    fn close_in_child(&self) {
        self.has_forked_since.store(true, Ordering::Relaxed);
    }
}

impl Bridge {
    pub(crate) fn new(settings: BridgeSettings, pool: HostPool) -> Self {
        let (commands, receiver) = bounded(COMMANDS);
        Self {
            settings,
            pool,
            attention: Arc::new(Attention::new()),
            commands,
            taken: Arc::new(AtomicUsize::new(0)),
            thread: Mutex::new(Thread::NotStarted(receiver)),
            load: Arc::new(LoadMeter::default()),
            has_forked_since: AtomicBool::new(false),
        }
    }

    /// Has the thread look after a station until that says that it is done. Starts the thread if nobody has.
    pub(crate) fn add(&self, station: Arc<dyn Station>) -> Result<(), Error> {
        self.put(self.place()?, station)
    }

    /// Room for a station. Starts the thread if nobody has.
    pub(crate) fn place(&self) -> Result<Place, Error> {
        self.ensure_running(|commands| self.start(commands))?;
        self.taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                (taken < MAX_STATIONS).then_some(taken + 1)
            })
            .map_err(|_| Error::DeviceBusy {
                device: self.settings.device.clone(),
                reason: format!(
                    "its bridge looks after {MAX_STATIONS} kernels and connections already"
                ),
            })?;
        Ok(Place {
            taken: Arc::clone(&self.taken),
        })
    }

    /// Starts the thread if nobody has. If that fails, the next one may try again.
    fn ensure_running(
        &self,
        start: impl FnOnce(Receiver<Command>) -> Result<BoundedThread, Error>,
    ) -> Result<(), Error> {
        let mut thread = self.thread.lock();
        match &*thread {
            Thread::NotStarted(commands) => {
                *thread = Thread::Running(start(commands.clone())?);
                Ok(())
            }
            Thread::Running(_) => Ok(()),
            Thread::Stopped => Err(self.stopped()),
        }
    }

    /// As `add`, with room that there is.
    pub(crate) fn put(&self, place: Place, station: Arc<dyn Station>) -> Result<(), Error> {
        let thread = self.thread.lock();
        if !matches!(*thread, Thread::Running(_)) {
            return Err(self.stopped());
        }
        let deadline = Deadline::after(STOP_TIMEOUT);
        let mut command = Command(place, station);
        loop {
            match self.commands.try_send(command) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) if !deadline.has_passed() => command = back,
                Err(_) => return Err(self.stopped()),
            }
            self.attention.bell.notify();
            std::thread::sleep(BLOCKED_NAP);
        }
        self.attention.bell.notify();
        Ok(())
    }

    fn stopped(&self) -> Error {
        Error::InvalidLifecycle {
            state: "Stopped",
            operation: "start or reach a bridge",
        }
    }

    fn start(&self, commands: Receiver<Command>) -> Result<BoundedThread, Error> {
        let wait = if self.settings.poll_interval.is_zero() {
            self.settings.wait
        } else {
            WaitStrategy::Park
        };
        let worker = Worker {
            settings: self.settings.clone(),
            attention: Arc::clone(&self.attention),
            commands,
            load: Arc::clone(&self.load),
            stations: Vec::with_capacity(MAX_STATIONS),
            wait,
            permit: None,
            watch: SpinWatch::new(),
            _lease: self.settings.core.map(CoreLease::of),
        };
        // Names of threads have 15 bytes on Linux: what tells them apart comes first.
        let core = self.settings.core;
        // Without a place for the answer: it reaches who waits for it, or the thread does not run.
        let (started, starting) = bounded(0);
        let name = format!("rk-br-{}", self.settings.device);
        let mut thread = BoundedThread::spawn(name, move || {
            if let Some(core) = core {
                let pinned = affinity::pin_current_thread(core);
                let runs = pinned.is_ok();
                if started.send(pinned).is_err() || !runs {
                    return;
                }
            }
            worker.run();
        })
        .map_err(|source| Error::Os {
            operation: "start a bridge",
            source,
        })?;
        if core.is_none() {
            return Ok(thread);
        }
        match starting.recv_timeout(START_TIMEOUT) {
            Ok(Ok(())) => Ok(thread),
            // The user named a core that cannot be had. The thread has nothing left to do.
            Ok(Err(error)) => {
                let _ = thread.join(Deadline::after(STOP_TIMEOUT));
                Err(error)
            }
            Err(_) => Err(Error::Timeout {
                operation: "start a bridge",
                kernel: self.settings.device.clone(),
                after: START_TIMEOUT,
            }),
        }
    }

    /// Ends the thread, and lets go of everything that it looked after. Does not wait on the thread
    /// itself, where the last one to let go of a kernel, or a logger, may call it.
    pub(crate) fn stop(&self) {
        process::look();
        if self.has_forked_since.load(Ordering::Relaxed) {
            return;
        }
        let thread = std::mem::replace(&mut *self.thread.lock(), Thread::Stopped);
        let Thread::Running(mut thread) = thread else {
            return;
        };
        self.attention.stopped.store(true, Ordering::SeqCst);
        self.attention.bell.notify();
        match thread.join(Deadline::after(STOP_TIMEOUT)) {
            Join::Ended => {}
            Join::Panicked => logging::error!("the bridge of {} panicked", self.settings.device),
            Join::LeftBehind(place) => logging::error!(
                "the thread of the bridge of {} is left behind: {place}",
                self.settings.device
            ),
        }
    }

    /// How busy the thread is; `None` if it was never started.
    pub(crate) fn load(&self) -> Option<BridgeLoad> {
        process::look();
        if self.has_forked_since.load(Ordering::Relaxed) {
            return None;
        }
        match *self.thread.lock() {
            Thread::NotStarted(_) => None,
            Thread::Running(_) | Thread::Stopped => Some(self.load.read()),
        }
    }
}

/// The bridge of a device, for those who watch it: a pinned thread, started when it is first needed, that merges the lanes of
/// [`Client`](crate::Client)s into the rings of kernels and routes replies back. Where and how it waits is
/// [`RuntimeConfig`](crate::RuntimeConfig)'s to say: `bridge_core`, `bridge_wait`, `bridge_poll_interval`.
#[derive(Clone, Debug)]
pub struct RingBufferBridge {
    bridge: Arc<Bridge>,
}

impl RingBufferBridge {
    pub(crate) fn new(bridge: &Arc<Bridge>) -> Self {
        Self {
            bridge: Arc::clone(bridge),
        }
    }

    /// Name of its device, by backend and index.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.bridge.settings.device
    }

    /// Its load; `None` while it has not been needed, and in the child of a fork. Allocates; does
    /// not disturb the thread beyond the transfer of a few cache lines.
    #[must_use]
    pub fn load(&self) -> Option<BridgeLoad> {
        self.bridge.load()
    }

    /// Whether its thread spins at the moment, so that clients leave the moving of messages to it.
    #[must_use]
    pub fn is_spinning(&self) -> bool {
        self.bridge.attention.is_spinning()
    }
}

struct Worker {
    settings: BridgeSettings,
    attention: Arc<Attention>,
    commands: Receiver<Command>,
    load: Arc<LoadMeter>,
    stations: Vec<(Place, Arc<dyn Station>)>,
    wait: WaitStrategy,
    /// Held while it spins by `Auto`, or because it was told to.
    permit: Option<SpinPermit>,
    /// Whether it gets on while it spins by `Auto`.
    watch: SpinWatch,
    _lease: Option<CoreLease>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // However the thread ends, nobody may rely on it any more.
        self.attention.spinning.store(false, Ordering::SeqCst);
    }
}

/// What one round over all stations came to.
#[derive(Default)]
struct Round {
    moved: u32,
    is_waiting: bool,
    is_contended: bool,
    is_crowded: bool,
}

impl Worker {
    fn run(mut self) {
        if self.settings.core.is_none()
            && let Err(error) = affinity::prefer_cores(&self.settings.cores)
        {
            // It works anywhere.
            logging::warning!("the bridge of {}: {error}", self.settings.device);
        }
        self.load.begin();
        let mut empty = 0_u32;
        let mut rounds = 0_u32;
        let mut sampled = Deadline::after(self.settings.sample_interval);
        let mut watch = Stopwatch::start();
        loop {
            rounds = rounds.wrapping_add(1);
            if (empty > 0 || rounds.is_multiple_of(ROUNDS_PER_COMMAND)) && !self.obey() {
                return;
            }
            let round = self.round();
            self.load.round(watch.lap().unwrap_or(0), round.moved);
            if rounds.is_multiple_of(ROUNDS_PER_COMMAND) || empty > 0 {
                self.sample(&mut sampled);
            }
            if round.moved > 0 {
                if empty > 0 && self.wait == WaitStrategy::Auto && self.permit.is_some() {
                    // A thread that was stopped mostly finds something when it runs again.
                    self.look(time::now_ns());
                }
                empty = 0;
                continue;
            }
            empty = empty.wrapping_add(1);
            self.idle(empty, &round);
            if empty > 1 {
                // Time that it slept, or spun for nothing, is no round.
                watch = Stopwatch::start();
            }
        }
    }

    /// Does what it is told; false once that is to end.
    fn obey(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                // No more than there are places.
                Ok(Command(place, station)) => self.stations.push((place, station)),
                Err(TryRecvError::Empty) => return !self.attention.stopped.load(Ordering::SeqCst),
                // Without a bridge there is nothing to do.
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn round(&mut self) -> Round {
        let mut round = Round::default();
        let mut index = 0;
        while let Some((_, station)) = self.stations.get(index) {
            let service = station.serve();
            if service.is_done {
                self.stations.swap_remove(index);
                continue;
            }
            round.moved += service.moved;
            round.is_waiting |= service.is_waiting;
            round.is_contended |= service.is_contended;
            round.is_crowded |= service.is_crowded;
            index += 1;
        }
        round
    }

    fn sample(&self, due: &mut Deadline) {
        if !due.has_passed() {
            return;
        }
        *due = Deadline::after(self.settings.sample_interval);
        let now = time::now_ns();
        for (_, station) in &self.stations {
            station.sample(now);
        }
    }

    /// How it waits now: `Auto` spins while there are lanes to look after and a core for it, and
    /// this gets on.
    fn strategy(&mut self, is_crowded: bool, empty: u32) -> KernelWait {
        let wait = match self.wait {
            _ if !is_crowded => KernelWait::Park,
            WaitStrategy::Spin => KernelWait::Spin,
            WaitStrategy::SpinYield => KernelWait::SpinYield,
            WaitStrategy::Park => KernelWait::Park,
            WaitStrategy::Auto => {
                let now = time::now_ns();
                if self.permit.is_none() {
                    if self.watch.may_spin(now) {
                        self.permit = SpinPermit::for_kernel(1);
                    }
                    self.watch.begin(now);
                } else if empty == 1 {
                    self.watch.begin(now);
                } else {
                    self.look(now);
                }
                match self.permit {
                    Some(_) => KernelWait::Auto,
                    None => KernelWait::Park,
                }
            }
        };
        match wait {
            KernelWait::Spin => {
                if self.permit.is_none() {
                    self.permit = Some(SpinPermit::forced(1));
                }
            }
            KernelWait::Auto => {}
            KernelWait::SpinYield | KernelWait::Park | KernelWait::Interval(_) => {
                self.permit = None;
            }
        }
        wait
    }

    /// Gives its permit back if spinning does not get on.
    fn look(&mut self, now_ns: u64) {
        if !self.watch.gets_on(now_ns) {
            self.watch.pause(now_ns);
            self.permit = None;
        }
    }

    fn idle(&mut self, empty: u32, round: &Round) {
        let wait = self.strategy(round.is_crowded, empty);
        let spins = matches!(
            wait,
            KernelWait::Spin | KernelWait::Auto | KernelWait::SpinYield
        );
        if spins != self.attention.is_spinning() {
            // Before it looks once more whether there is anything to do, in `sleep`.
            self.attention.spinning.store(spins, Ordering::SeqCst);
        }
        match wait.idle(empty) {
            IdleStep::Poll | IdleStep::Look => {}
            // Another thread does the work, and may end any time: looked at again after a nap.
            IdleStep::Sleep | IdleStep::SleepFor(_) => self.sleep(round),
        }
    }

    fn sleep(&self, round: &Round) {
        let is_waiting = round.is_waiting || round.is_contended;
        let interval = self.settings.poll_interval;
        let longest = match (is_waiting, interval.is_zero()) {
            (true, true) => BLOCKED_NAP,
            (true, false) => interval,
            (false, _) => self.settings.sample_interval,
        };
        if !interval.is_zero() {
            // Looks once an interval, whoever rings.
            std::thread::sleep(longest.min(interval));
            return;
        }
        let prepared = self.attention.bell.prepare();
        let is_ready = self.attention.stopped.load(Ordering::SeqCst)
            || !self.commands.is_empty()
            || (!is_waiting && self.stations.iter().any(|(_, station)| station.is_ready()));
        if !is_ready {
            prepared.wait(longest);
            self.load.slept();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, cpu::CpuBackend};

    /// Done when it is told so.
    #[derive(Debug, Default)]
    struct Guest {
        is_done: AtomicBool,
    }

    impl Station for Guest {
        fn serve(&self) -> Service {
            match self.is_done.load(Ordering::Relaxed) {
                true => Service::DONE,
                false => Service::IDLE,
            }
        }

        fn is_ready(&self) -> bool {
            self.is_done.load(Ordering::Relaxed)
        }

        fn sample(&self, _now_ns: u64) {}
    }

    fn bridge() -> Bridge {
        time::initialise();
        let settings = BridgeSettings {
            device: "test".into(),
            wait: WaitStrategy::Park,
            poll_interval: Duration::ZERO,
            core: None,
            cores: Vec::new(),
            sample_interval: Duration::from_millis(10),
        };
        let device = CpuBackend::new(1, None, &[]).open(0).unwrap();
        Bridge::new(settings, device.host_pool())
    }

    #[test]
    fn a_full_bridge_refuses_and_takes_again_once_there_is_room() {
        let bridge = bridge();
        let guests: Vec<_> = (0..MAX_STATIONS)
            .map(|_| Arc::new(Guest::default()))
            .collect();
        for guest in &guests {
            bridge.add(Arc::<Guest>::clone(guest)).unwrap();
        }
        let one_more = || bridge.add(Arc::new(Guest::default()));
        assert!(matches!(one_more(), Err(Error::DeviceBusy { .. })));
        guests[500].is_done.store(true, Ordering::Relaxed);
        bridge.attention.bell.notify();
        let deadline = Deadline::after(STOP_TIMEOUT);
        while let Err(error) = one_more() {
            assert!(!deadline.has_passed(), "{error}");
            std::thread::sleep(BLOCKED_NAP);
        }
        assert!(matches!(one_more(), Err(Error::DeviceBusy { .. })));
        // It lets go of everything.
        bridge.stop();
        assert!(guests.iter().all(|guest| Arc::strong_count(guest) == 1));
        assert!(matches!(one_more(), Err(Error::InvalidLifecycle { .. })));
    }

    #[test]
    fn a_bridge_that_could_not_be_started_is_started_later() {
        let bridge = bridge();
        let failed = bridge.ensure_running(|_| {
            Err(Error::Os {
                operation: "start a bridge",
                source: std::io::ErrorKind::WouldBlock.into(),
            })
        });
        assert!(matches!(failed, Err(Error::Os { .. })));
        assert_eq!(bridge.load(), None);
        let guest = Arc::new(Guest::default());
        bridge.add(Arc::<Guest>::clone(&guest)).unwrap();
        assert!(bridge.load().is_some());
        bridge.stop();
        assert_eq!(Arc::strong_count(&guest), 1);
    }
}
