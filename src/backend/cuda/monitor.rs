//! The thread of a device, which looks whether its kernels still run: nobody else would notice that one has died.
//!
//! On a device whose driver ends long kernels it also keeps slices coming, one more queued than running.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUresult;
use parking_lot::Mutex;

use super::context::Context;
use super::launched::Launched;
use crate::backend::Keeper;
use crate::backend::resident::life;
use crate::backend::stall::{Stall, StallLimits};
use crate::error::Error;
use crate::kernel::BlockState;
use crate::kernel::outlet::Warden;
use crate::logging;
use crate::thread::affinity;
use crate::thread::bounded::{BoundedThread, Join};
use crate::thread::event_count::EventCount;
use crate::time::Deadline;

/// Between two looks: how late a failure is noticed at most, and next to no time of a core.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// The same while a kernel ends, or has slices.
const BUSY_INTERVAL: Duration = Duration::from_micros(50);

/// Longest sleep of a device without kernels.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// Polls of a slice at most; over PCIe its time (`LaunchWords`) is over before.
const SLICE_POLLS: u32 = 50_000;

/// What everybody may ask of a monitor.
#[derive(Debug)]
pub(super) struct MonitorHandle {
    inbox: Mutex<Vec<Arc<Launched>>>,
    pub(super) doorbell: Arc<EventCount>,
    stop: AtomicBool,
}

impl MonitorHandle {
    /// Hands a kernel over.
    pub(super) fn admit(&self, kernel: Arc<Launched>) {
        self.inbox.lock().push(kernel);
        self.doorbell.notify();
    }
}

impl Keeper for MonitorHandle {
    /// A resident kernel sees commands itself; one that runs by slices may have none, and one that ends is looked at more often.
    fn look(&self) {
        self.doorbell.notify();
    }
}

impl Warden for MonitorHandle {
    fn call(&self) {
        self.look();
    }
}

/// A monitor, for the device that owns it.
#[derive(Debug)]
pub(super) struct Monitor {
    pub(super) handle: Arc<MonitorHandle>,
    thread: BoundedThread,
    /// How long its end is waited for.
    patience: Duration,
}

impl Monitor {
    /// Starts the thread, on any of `cores`.
    pub(super) fn start(
        context: &Arc<Context>,
        cores: Vec<usize>,
        limits: StallLimits,
    ) -> Result<Self, Error> {
        let handle = Arc::new(MonitorHandle {
            inbox: Mutex::new(Vec::new()),
            doorbell: Arc::new(EventCount::new()),
            stop: AtomicBool::new(false),
        });
        let watch = Watch {
            context: Arc::clone(context),
            handle: Arc::clone(&handle),
            kernels: Vec::new(),
            limits,
        };
        let name = format!("rk-bridge-{}", context.physical.info.index);
        let thread = BoundedThread::spawn(name, move || {
            if let Err(error) = affinity::prefer_cores(&cores) {
                logging::warning!("the thread of a CUDA device runs anywhere: {error}");
            }
            watch.run();
        })
        .map_err(|source| Error::Os {
            operation: "start the thread of a CUDA device",
            source,
        })?;
        Ok(Self {
            handle,
            thread,
            patience: limits.thread_end(),
        })
    }
}

impl Drop for Monitor {
    /// Ends the thread once all kernels have: bounded, because one that does not end in time loses
    /// the device, and a thread that the driver keeps is left behind.
    fn drop(&mut self) {
        self.handle.stop.store(true, Ordering::Release);
        self.handle.doorbell.notify();
        match self.thread.join(Deadline::after(self.patience)) {
            Join::Ended => {}
            Join::Panicked => logging::error!("the thread of a CUDA device panicked"),
            Join::LeftBehind(place) => {
                logging::error!("the thread of a CUDA device is left behind: {place}");
            }
        }
    }
}

/// A kernel as the monitor sees it.
struct Watched {
    kernel: Arc<Launched>,
    heartbeats: u32,
    /// For how long nothing has come of it since it was told to end.
    ending: Option<Stall>,
    /// Whether it was told that its device is lost.
    lost: bool,
    /// Whether it was told to lead its replies elsewhere, and has not followed.
    turning: bool,
    slices: Option<Slices>,
}

/// The slices of a kernel on a device with a watchdog.
struct Slices {
    /// Those that were launched and are not done, the oldest first.
    in_flight: VecDeque<usize>,
}

/// The thread's own.
struct Watch {
    context: Arc<Context>,
    handle: Arc<MonitorHandle>,
    kernels: Vec<Watched>,
    limits: StallLimits,
}

impl Watch {
    fn run(mut self) {
        loop {
            // What is logged while locks are held leaves at the end of the round.
            let deferral = logging::defer();
            let admitted = std::mem::take(&mut *self.handle.inbox.lock());
            self.kernels
                .extend(admitted.into_iter().map(|kernel| Watched {
                    heartbeats: 0,
                    ending: None,
                    lost: false,
                    turning: false,
                    slices: kernel.is_sliced().then(|| Slices {
                        in_flight: VecDeque::new(),
                    }),
                    kernel,
                }));
            self.look();
            if self.handle.stop.load(Ordering::Acquire) {
                if self.kernels.is_empty() && self.handle.inbox.lock().is_empty() {
                    return;
                }
                for watched in &self.kernels {
                    watched.kernel.ask_to_end();
                }
            }
            drop(deferral);
            self.sleep();
        }
    }

    /// Looks at every kernel once.
    fn look(&mut self) {
        if self.kernels.is_empty() {
            return;
        }
        let context = Arc::clone(&self.context);
        let Ok(_current) = context.enter_anyway() else {
            // Not even that: nothing can run in a context that is no more.
            context.lose("its context cannot be made current any more".into());
            for watched in self.kernels.drain(..) {
                watched.kernel.lose(context.lost().unwrap_or("lost"));
                Launched::finish(watched.kernel);
            }
            return;
        };
        let limit = match self.handle.stop.load(Ordering::Acquire) {
            true => self.limits.closing(false),
            false => self.limits.in_use(false),
        };
        let mut index = 0;
        while let Some(watched) = self.kernels.get_mut(index) {
            if let Some(reason) = context.lost() {
                watched.lose(reason);
            }
            match watched.look(&context, &self.handle, limit) {
                // Nothing else here holds the kernel any more: what it took is given back before its end is known.
                Ok(true) => Launched::finish(self.kernels.swap_remove(index).kernel),
                Ok(false) => index += 1,
                Err(error) => {
                    context.lose(error.to_string());
                    index += 1;
                }
            }
        }
        if context.is_abandoned() {
            // Whatever runs is left behind.
            for watched in self.kernels.drain(..) {
                watched.kernel.lose(context.lost().unwrap_or("lost"));
                Launched::finish(watched.kernel);
            }
        }
    }

    fn sleep(&self) {
        let interval = self
            .kernels
            .iter()
            .map(|watched| {
                let is_busy = watched.has_slices() || watched.lost || watched.turning;
                if watched.kernel.must_terminate() || is_busy {
                    BUSY_INTERVAL
                } else {
                    LOOK_INTERVAL
                }
            })
            .min()
            .unwrap_or(IDLE_INTERVAL);
        let prepared = self.handle.doorbell.prepare();
        let wanted = !self.handle.inbox.lock().is_empty()
            || (self.handle.stop.load(Ordering::Acquire) && self.kernels.is_empty());
        if !wanted {
            prepared.wait(interval);
        }
    }
}

impl Watched {
    fn has_slices(&self) -> bool {
        self.slices
            .as_ref()
            .is_some_and(|slices| !slices.in_flight.is_empty())
    }

    /// Fails a kernel whose device is lost, once: every wait for it ends, it is told to end, and it is watched until it has.
    fn lose(&mut self, reason: &str) {
        if !self.lost {
            self.lost = true;
            self.kernel.lose(reason);
        }
    }

    /// Reports a fault that the kernel has found in itself.
    fn report(&self) {
        if let Some(failure) = self.kernel.fault()
            && !self.kernel.signals.gate.state().is_final()
        {
            self.kernel.fail(failure);
        }
    }

    /// Whether the kernel has ended, and nothing of it runs any more.
    fn look(
        &mut self,
        context: &Context,
        handle: &Arc<MonitorHandle>,
        limit: Duration,
    ) -> Result<bool, Error> {
        let heartbeats = self.kernel.heartbeats();
        if heartbeats != self.heartbeats {
            self.heartbeats = heartbeats;
            self.kernel.show_life();
        }
        self.report();
        let kernel = &self.kernel;
        let runs = match &mut self.slices {
            None => match kernel.query() {
                CUresult::CUDA_ERROR_NOT_READY => true,
                // After an error that sticks nothing runs any more.
                _ if self.lost => false,
                code => {
                    context.check(super::driver::check("run a kernel", code))?;
                    false
                }
            },
            Some(slices) => slices.keep_coming(kernel, context, self.lost)?,
        };
        self.turning = kernel.exchange(Arc::clone(handle) as Arc<dyn Warden>, runs);
        kernel.look_at_passing();
        if runs {
            if !kernel.must_terminate() {
                self.ending = None;
                return Ok(false);
            }
            let (life, now) = (life(&kernel.blocks), Instant::now());
            let stall = self.ending.get_or_insert_with(|| Stall::new(life, now));
            if stall.look(life, now) >= limit {
                context.abandon(format!(
                    "kernel '{}' is to end, and nothing came of it for {limit:?}: a handler that never ends, or blocks that never began",
                    kernel.signals.name
                ));
            }
            return Ok(false);
        }
        // What it said before it ended.
        self.report();
        let kernel = &self.kernel;
        if self.slices.is_some() && !kernel.must_terminate() {
            // Deactivated, or about to get its first slice.
            return Ok(false);
        }
        if !kernel.must_terminate() {
            // It is gone although nobody told it to end.
            context.lose(format!("kernel '{}' ended by itself", kernel.signals.name));
            return Ok(false);
        }
        kernel.answer_end();
        Ok(true)
    }
}

impl Slices {
    /// Launches what is missing. Whether any slice is in flight.
    fn keep_coming(
        &mut self,
        kernel: &Arc<Launched>,
        context: &Context,
        lost: bool,
    ) -> Result<bool, Error> {
        while let Some(&oldest) = self.in_flight.front() {
            match kernel.query_slice(oldest) {
                CUresult::CUDA_ERROR_NOT_READY => break,
                // After an error that sticks nothing runs any more.
                _ if lost => {}
                code => context.check(super::driver::check("run a slice", code))?,
            }
            self.in_flight.pop_front();
        }
        if kernel.is_wanted() {
            for block in &kernel.blocks {
                block.control().set_budgets(SLICE_POLLS, u32::MAX);
            }
            while self.in_flight.len() < kernel.slices() {
                let free = (0..kernel.slices()).find(|index| !self.in_flight.contains(index));
                let Some(index) = free else { break };
                context.check(kernel.launch_slice(index))?;
                self.in_flight.push_back(index);
            }
        } else if self.in_flight.is_empty() && !kernel.must_terminate() {
            for block in &kernel.blocks {
                if block.control().state() == Some(BlockState::Polling) {
                    block.control().store_state(BlockState::Idle);
                }
            }
        }
        Ok(!self.in_flight.is_empty())
    }
}
