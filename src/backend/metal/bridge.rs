//! The thread of a device, which keeps the slices of its kernels coming.
//!
//! Each kernel has a command queue, in which two slices are committed at any time while it is active: one runs, one waits. The
//! thread sleeps until one is done. Commands to a kernel are stores to its control block, which the running slice sees.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::slice_kernel::SliceKernel;
use crate::backend::resident::life;
use crate::backend::slices::{Attention, PARKING_IDLE_POLLS, Pace, SHARED_POLLS};
use crate::backend::stall::{Stall, StallLimits};
use crate::backend::{DeviceInfo, ExecutionMode, Keeper};
use crate::error::Error;
use crate::kernel::BlockState;
use crate::logging;
use crate::thread::affinity;
use crate::thread::bounded::{BoundedThread, Join};
use crate::thread::event_count::EventCount;
use crate::time::Deadline;

/// Slices of a kernel that are committed at once: one more than runs.
const SLICES: usize = 2;

/// Longest sleep without work, and between two looks whether a slice is overdue.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
const OVERDUE_LOOK: Duration = Duration::from_millis(50);

/// Whether a device still works, for everybody who uses it.
#[derive(Debug)]
pub(super) struct Health {
    name: String,
    lost: OnceLock<String>,
}

impl Health {
    pub(super) fn new(info: &DeviceInfo) -> Arc<Self> {
        Arc::new(Self {
            name: info.name.clone(),
            lost: OnceLock::new(),
        })
    }

    /// Marks the device as lost; the first reason is kept.
    fn lose(&self, reason: String) {
        if self.lost.set(reason).is_ok() {
            logging::error!("device '{}' is lost: {}", self.name, self.reason());
        }
    }

    fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    fn reason(&self) -> &str {
        self.lost.get().map_or("", String::as_str)
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        match self.lost.get() {
            None => Ok(()),
            Some(reason) => Err(Error::DeviceLost {
                device: self.name.clone(),
                reason: reason.clone(),
            }),
        }
    }
}

/// What everybody may ask of a bridge.
#[derive(Debug)]
pub(super) struct BridgeHandle {
    inbox: Mutex<Vec<Arc<SliceKernel>>>,
    /// Rung by senders. The thread waits for it only while some kernel has no slices that would see a request.
    pub(super) work: Arc<EventCount>,
    /// What it waits for otherwise.
    news: EventCount,
    stop: AtomicBool,
}

impl BridgeHandle {
    /// Hands a kernel over.
    pub(super) fn admit(&self, kernel: Arc<SliceKernel>) {
        self.inbox.lock().push(kernel);
        self.look();
    }
}

impl Keeper for BridgeHandle {
    fn look(&self) {
        self.news.notify();
        self.work.notify();
    }
}

/// A bridge, for the device that owns it.
#[derive(Debug)]
pub(super) struct Bridge {
    pub(super) handle: Arc<BridgeHandle>,
    thread: BoundedThread,
    /// How long its end is waited for.
    patience: Duration,
}

impl Bridge {
    /// Starts the thread, on any of `cores`.
    pub(super) fn start(
        info: &DeviceInfo,
        mode: ExecutionMode,
        health: &Arc<Health>,
        cores: Vec<usize>,
        limits: StallLimits,
    ) -> Result<Self, Error> {
        let handle = Arc::new(BridgeHandle {
            inbox: Mutex::new(Vec::new()),
            work: Arc::new(EventCount::new()),
            news: EventCount::new(),
            stop: AtomicBool::new(false),
        });
        let thread = BridgeThread {
            handle: Arc::clone(&handle),
            health: Arc::clone(health),
            members: Vec::new(),
            on_request: mode == ExecutionMode::Exchange,
            shared: false,
            limits,
        };
        let name = format!("rk-bridge-{}", info.index);
        let thread = BoundedThread::spawn(name, move || {
            if let Err(error) = affinity::prefer_cores(&cores) {
                logging::warning!("the thread of a Metal device runs anywhere: {error}");
            }
            thread.run();
        })
        .map_err(|source| Error::Os {
            operation: "start the thread of a Metal device",
            source,
        })?;
        Ok(Self {
            handle,
            thread,
            patience: limits.thread_end(),
        })
    }
}

impl Drop for Bridge {
    /// Ends the thread once all kernels have: bounded, because a slice that does not end in time
    /// loses the device, and a thread that the driver keeps is left behind.
    fn drop(&mut self) {
        self.handle.stop.store(true, Ordering::Release);
        self.handle.look();
        match self.thread.join(Deadline::after(self.patience)) {
            Join::Ended => {}
            Join::Panicked => logging::error!("the thread of a Metal device panicked"),
            Join::LeftBehind(place) => {
                logging::error!("the thread of a Metal device is left behind: {place}");
            }
        }
    }
}

/// A kernel as its bridge sees it.
struct Member {
    kernel: Arc<SliceKernel>,
    attention: Attention,
    pace: Pace,
    /// Slices that are not done, the oldest first: when each was committed, and with how many polls, if those alone end it.
    in_flight: VecDeque<(Instant, Option<u32>)>,
    /// When the last one was done.
    last_done: Instant,
    /// For how long nothing has come of them.
    stall: Stall,
    lost: bool,
}

/// The thread's own.
struct BridgeThread {
    handle: Arc<BridgeHandle>,
    health: Arc<Health>,
    members: Vec<Member>,
    on_request: bool,
    /// Whether several kernels were active when slices were last committed.
    shared: bool,
    limits: StallLimits,
}

impl BridgeThread {
    fn run(mut self) {
        loop {
            // What is logged while locks are held leaves at the end of the round.
            let deferral = logging::defer();
            let admitted = std::mem::take(&mut *self.handle.inbox.lock());
            let on_request = self.on_request;
            self.members
                .extend(admitted.into_iter().map(|kernel| Member {
                    kernel,
                    attention: Attention::new(on_request),
                    pace: Pace::hardware(),
                    in_flight: VecDeque::with_capacity(SLICES),
                    last_done: Instant::now(),
                    stall: Stall::new(0, Instant::now()),
                    lost: false,
                }));
            self.collect();
            if self.health.is_lost() {
                for member in self.members.iter_mut().filter(|member| !member.lost) {
                    member.lost = true;
                    member.kernel.lose(self.health.reason());
                }
            }
            self.settle();
            self.commit();
            if self.handle.stop.load(Ordering::Acquire) {
                if self.members.is_empty() && self.handle.inbox.lock().is_empty() {
                    return;
                }
                for member in &self.members {
                    member.kernel.ask_to_end();
                }
            }
            drop(deferral);
            self.sleep();
        }
    }

    /// Takes note of slices that are done, or should be.
    fn collect(&mut self) {
        let now = Instant::now();
        let is_closing = self.handle.stop.load(Ordering::Acquire) || self.health.is_lost();
        let limit = match is_closing {
            true => self.limits.closing(false),
            false => self.limits.in_use(false),
        };
        for member in &mut self.members {
            let outcomes = member.kernel.take_outcomes();
            let done = !outcomes.is_empty();
            for outcome in outcomes {
                let slice = member.in_flight.pop_front();
                match outcome {
                    Ok(()) => member.adapt(slice, now),
                    // Whatever it was, the device may have done anything meanwhile.
                    Err(reason) => self.health.lose(reason),
                }
            }
            if done {
                member.attention.observe(&member.kernel, now);
            }
            if done || member.in_flight.is_empty() {
                member.stall = Stall::new(life(&member.kernel.blocks), now);
                continue;
            }
            if member.stall.look(life(&member.kernel.blocks), now) >= limit {
                self.health.lose(format!(
                    "nothing came of a slice of kernel '{}' for {limit:?}: a handler that never ends, or a driver that hangs",
                    member.kernel.signals.name
                ));
                // Left to the system: command buffers keep what they use.
                member.in_flight.clear();
            }
        }
    }

    /// Answers for kernels that have no slices in flight any more, and lets go of those that ended.
    fn settle(&mut self) {
        let mut index = 0;
        while let Some(member) = self.members.get(index) {
            if member.settle() {
                // Nothing else here holds the kernel any more: what it took is given back before its end is known.
                SliceKernel::finish(self.members.swap_remove(index).kernel);
            } else {
                index += 1;
            }
        }
    }

    /// Commits what is missing.
    fn commit(&mut self) {
        let now = Instant::now();
        let wanted = self
            .members
            .iter()
            .filter(|member| member.kernel.is_wanted());
        let shared = wanted.count() > 1;
        if std::mem::replace(&mut self.shared, shared) != shared {
            // Slices read their budget while they run: those in flight are no measure any more.
            let slices = self
                .members
                .iter_mut()
                .flat_map(|member| &mut member.in_flight);
            slices.for_each(|(_, polls)| *polls = None);
        }
        // A slice that began before its requests were written may not see them; another one would only wait behind it.
        let depth = if self.on_request { 1 } else { SLICES };
        for member in &mut self.members {
            if member.lost || !member.attention.wants_slices(&member.kernel, now) {
                continue;
            }
            let polls = if shared {
                SHARED_POLLS
            } else {
                member.pace.polls()
            };
            let idle_polls = if self.on_request {
                1
            } else if member.kernel.may_sleep() {
                PARKING_IDLE_POLLS
            } else {
                u32::MAX
            };
            for block in &member.kernel.blocks {
                block.control().set_budgets(polls, idle_polls);
            }
            while member.in_flight.len() < depth {
                if let Err(reason) = member.kernel.commit(&self.handle) {
                    self.health
                        .lose(format!("a slice cannot be committed: {reason}"));
                    break;
                }
                let paced = (!shared && idle_polls == u32::MAX).then_some(polls);
                member.in_flight.push_back((Instant::now(), paced));
            }
        }
    }

    fn sleep(&self) {
        let now = Instant::now();
        let longest = self
            .members
            .iter()
            .map(|member| {
                if !member.in_flight.is_empty() {
                    OVERDUE_LOOK
                } else if !member.kernel.is_wanted() {
                    LONGEST_SLEEP
                } else {
                    member.attention.nap(&member.kernel, now)
                }
            })
            .min()
            .unwrap_or(LONGEST_SLEEP);
        if longest.is_zero() {
            std::hint::spin_loop();
            return;
        }
        let sleeping = self
            .members
            .iter()
            .any(|member| member.in_flight.is_empty() && member.kernel.is_wanted());
        let prepared = match sleeping {
            true => self.handle.work.prepare(),
            false => self.handle.news.prepare(),
        };
        let stop = self.handle.stop.load(Ordering::Acquire);
        let wanted = !self.handle.inbox.lock().is_empty()
            || (stop && self.members.is_empty())
            || self.members.iter().any(|member| {
                let kernel = &member.kernel;
                kernel.has_outcomes()
                    || (self.health.is_lost() && !member.lost)
                    || (stop && !kernel.must_terminate())
                    || (member.in_flight.is_empty()
                        && (kernel.must_terminate()
                            || kernel.is_unanswered()
                            || member.attention.wants_slices(kernel, now)))
            });
        if !wanted {
            prepared.wait(longest);
        }
    }
}

impl Member {
    /// Reports what the kernel says, and answers for it if it has no slices in flight. Whether it has ended.
    fn settle(&self) -> bool {
        let kernel = &self.kernel;
        if let Some(failure) = kernel.fault()
            && !kernel.signals.gate.state().is_final()
        {
            kernel.fail(failure);
        }
        if !self.in_flight.is_empty() {
            return false;
        }
        if kernel.must_terminate() {
            kernel.answer_end();
            return true;
        }
        if !kernel.is_wanted() {
            for block in &kernel.blocks {
                if block.control().state() == Some(BlockState::Polling) {
                    block.control().store_state(BlockState::Idle);
                }
            }
        }
        false
    }

    /// Makes slices as long as they should be, going by one that its polls alone have ended. Its kernel has not been looked at since.
    fn adapt(&mut self, slice: Option<(Instant, Option<u32>)>, now: Instant) {
        if let Some((committed, polls)) = slice
            && polls == Some(self.pace.polls())
            && self.kernel.is_wanted()
        {
            let idle = self.attention.was_idle(&self.kernel);
            self.pace
                .measured(now.duration_since(committed.max(self.last_done)), idle);
        }
        self.last_done = now;
    }
}
