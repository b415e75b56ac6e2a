//! Threads that meet deadlines: pinned, scheduled before others, with memory that is present, and a report of what of that was
//! granted.
//!
//! ```
//! use ringkernel::thread::realtime::{Need, RealtimeThread, Schedule};
//!
//! let core = ringkernel::thread::affinity::usable_cores()[0];
//! let thread = RealtimeThread::new("control")
//!     .cores(&[core], Need::Required)
//!     .schedule(Schedule::Fifo(50), Need::BestEffort)
//!     .prefault_stack(64 * 1024, Need::BestEffort)
//!     .spawn(|context| {
//!         let mut rounds = 0;
//!         while !context.must_stop() {
//!             rounds += 1;
//!         }
//!         rounds
//!     })?;
//! println!("{}", thread.report());
//! thread.stop();
//! let rounds: u64 = thread.join().unwrap();
//! # Ok::<(), ringkernel::Error>(())
//! ```

mod apply;
mod machine;
mod report;

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

pub use machine::RealtimeWarning;
pub use report::{Grant, Need, RealtimeReport, Refusal, Schedule, Setting};

use super::{foreign, own};
use crate::error::Error;
use crate::logging;
use crate::process::OriginProcess;
use crate::time::Deadline;

/// Between two looks whether a thread has ended.
const JOIN_LOOK: Duration = Duration::from_millis(1);

/// How long the end of a refused thread is waited for, which only drops what its body captured.
const REFUSED_END: Duration = Duration::from_secs(1);

/// Bytes of stack of a thread that asks for no other size, beside what is prefaulted: as the standard library has it.
const STACK: usize = 2 * 1024 * 1024;

/// Longest wake-up latency that can be asked for.
const LONGEST_WAKE: Duration = Duration::from_secs(3600);

/// Priorities of realtime schedules (sched(7)).
const PRIORITIES: std::ops::RangeInclusive<u8> = 1..=99;

/// Nice values (setpriority(2)).
const NICE: std::ops::RangeInclusive<i8> = -20..=19;

/// What a thread shall have; given to a new one by [`spawn`](Self::spawn), or to the calling one by [`adopt`](Self::adopt).
///
/// Each setting is `Required`, and then the thread does not run without it, or `BestEffort`. Without any it is as the thread that starts it.
#[derive(Clone, Debug)]
#[must_use = "it starts nothing by itself"]
pub struct RealtimeThread {
    name: String,
    cores: Option<(Vec<usize>, Need)>,
    schedule: Option<(Schedule, Need)>,
    lock_memory: Option<Need>,
    stack: Option<(usize, Need)>,
    heap: Option<(usize, Need)>,
    wake_latency: Option<(Duration, Need)>,
    flush_to_zero: Option<Need>,
    node: Option<u32>,
}

impl RealtimeThread {
    /// A thread of this name, of which the system keeps the first 15 bytes.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            cores: None,
            schedule: None,
            lock_memory: None,
            stack: None,
            heap: None,
            wake_latency: None,
            flush_to_zero: None,
            node: None,
        }
    }

    /// Lets it run on these cores only. One core keeps it from moving.
    pub fn cores(mut self, cores: &[usize], need: Need) -> Self {
        let mut cores = cores.to_vec();
        cores.sort_unstable();
        cores.dedup();
        self.cores = Some((cores, need));
        self
    }

    /// Schedules it so; threads that it starts itself are ordinary ones again. A thread of realtime priority that never waits lets no other run on its core, and is itself stopped for part of
    /// each second unless the machine is told otherwise ([`RealtimeWarning::Throttled`]).
    pub fn schedule(mut self, schedule: Schedule, need: Need) -> Self {
        self.schedule = Some((schedule, need));
        self
    }

    /// Keeps all memory of the process, now and later, in RAM (`mlockall`): no page of it is read from a disk again. Whatever is
    /// mapped afterwards is present at once, thread stacks in full.
    pub fn lock_memory(mut self, need: Need) -> Self {
        self.lock_memory = Some(need);
        self
    }

    /// Touches so many bytes of its stack beforehand, so that using them faults no more. A new thread's stack is larger by as much.
    pub fn prefault_stack(mut self, bytes: usize, need: Need) -> Self {
        self.stack = Some((bytes, need));
        self
    }

    /// Takes so many bytes of heap beforehand, touches them and gives them back to the allocator, which is told to keep all memory that
    /// it has (with glibc's allocator, not with one of the program's own; for the whole process, `M_TRIM_THRESHOLD` and `M_MMAP_MAX`). At
    /// most 48 MiB. Allocations that fit fault no more; they still take time and locks.
    pub fn prefault_heap(mut self, bytes: usize, need: Need) -> Self {
        self.heap = Some((bytes, need));
        self
    }

    /// Keeps every core of the machine from sleeping so deeply that waking it takes longer, in whole microseconds up to an hour, as long as
    /// the thread lives (`/dev/cpu_dma_latency`). Zero keeps them awake: it costs power, and turbo frequencies of other cores.
    pub fn wake_latency(mut self, latency: Duration, need: Need) -> Self {
        self.wake_latency = Some((latency, need));
        self
    }

    /// Makes denormal inputs and results of floating-point operations count as zero on this thread, which spares the slow paths that
    /// some processors have for them.
    ///
    /// # Safety
    /// Compilers assume the default mode: what they calculate beforehand, move across the change, or deduce from it does not follow the
    /// new one, and the documentation of Rust's own `_mm_setcsr` calls that undefined behaviour. Audio and control code has done it for
    /// decades by setting the mode before any floating-point work of the thread; whoever asks for it answers for that.
    pub unsafe fn flush_to_zero(mut self, need: Need) -> Self {
        self.flush_to_zero = Some(need);
        self
    }

    /// Names the NUMA node of the device that the thread serves (`VulkanDeviceInfo::numa_node`, `CudaDeviceInfo::numa_node`): the
    /// report warns if the thread's cores are elsewhere.
    pub fn near_node(mut self, node: u32) -> Self {
        self.node = Some(node);
        self
    }

    /// Fails on the first value that is out of its range.
    fn validate(&self) -> Result<(), Error> {
        let invalid = |option, reason| Err(Error::InvalidOption { option, reason });
        if self.name.contains('\0') {
            return invalid("thread name", "it contains a NUL byte".into());
        }
        if let Some((cores, _)) = &self.cores
            && cores.is_empty()
        {
            return invalid("cores", "none is named".into());
        }
        if let Some((latency, _)) = self.wake_latency
            && latency > LONGEST_WAKE
        {
            return invalid("wake latency", format!("{latency:?} exceeds an hour"));
        }
        match self.schedule {
            Some((Schedule::Fifo(priority) | Schedule::RoundRobin(priority), _))
                if !PRIORITIES.contains(&priority) =>
            {
                invalid(
                    "schedule",
                    format!("priority {priority} is not within 1 to 99"),
                )
            }
            Some((Schedule::Nice(nice), _)) if !NICE.contains(&nice) => invalid(
                "schedule",
                format!("nice value {nice} is not within -20 to 19"),
            ),
            _ => Ok(()),
        }
    }

    /// Gives the calling thread everything, as far as the system grants it. Its name stays.
    ///
    /// # Errors
    /// `InvalidOption`; [`Error::RealtimeRefused`] for the first setting that is required and refused, with the report: what was granted by
    /// then stays, nothing after it was asked for.
    pub fn adopt(self) -> Result<RealtimeReport, Error> {
        self.validate()?;
        check(self.apply())
    }

    /// Starts a thread that has everything, as far as the system grants it, and runs `body` there.
    ///
    /// Returns when the settings are made; the body runs meanwhile.
    ///
    /// # Errors
    /// `InvalidOption`; `Os` if there is no further thread; [`Error::RealtimeRefused`] for the first setting that is required and refused:
    /// `body` was not run then. The thread has ended, unless dropping what `body` captured takes
    /// longer than a second.
    pub fn spawn<T, F>(self, body: F) -> Result<RealtimeHandle<T>, Error>
    where
        T: Send + 'static,
        F: FnOnce(&RealtimeContext) -> T + Send + 'static,
    {
        self.validate()?;
        let prefaulted = self.stack.map_or(0, |(bytes, _)| bytes);
        let (tell, told) = mpsc::sync_channel(1);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(self.name.clone())
            .stack_size(STACK.saturating_add(prefaulted))
            .spawn(move || {
                let report = self.apply();
                let runs = report.fatal().is_none();
                let _ = tell.send(report.clone());
                let context = RealtimeContext {
                    report,
                    stop: stopped,
                };
                runs.then(|| body(&context))
            })
            .map_err(|source| Error::Os {
                operation: "start a realtime thread",
                source,
            })?;
        let outcome = match told.recv() {
            Ok(report) => check(report),
            // It panicked, in `apply`.
            Err(_) => Err(Error::Os {
                operation: "prepare a realtime thread",
                source: std::io::Error::other("it panicked"),
            }),
        };
        match outcome {
            Ok(report) => Ok(RealtimeHandle {
                origin: OriginProcess::current(),
                report,
                stop,
                thread: Some(thread),
            }),
            Err(error) => {
                let deadline = Deadline::after(REFUSED_END);
                while !thread.is_finished() && !deadline.has_passed() {
                    std::thread::sleep(JOIN_LOOK);
                }
                if thread.is_finished()
                    && let Err(panic) = thread.join()
                {
                    foreign::dispose(panic);
                }
                Err(error)
            }
        }
    }

    /// Asks for everything, for the calling thread. Nothing is asked for after a required setting was refused.
    fn apply(self) -> RealtimeReport {
        let mut report = RealtimeReport {
            thread: self.name,
            ..RealtimeReport::default()
        };
        let cores = self.cores.as_ref().map(|(cores, _)| cores.clone());
        let schedule = self.schedule.map(|(schedule, _)| schedule);
        let mut ask = |setting, need, apply: &mut dyn FnMut() -> Result<(), Refusal>| {
            if report.fatal().is_none() {
                let refusal = apply().err();
                report.grants.push(Grant {
                    setting,
                    need,
                    refusal,
                });
            }
        };
        let mut is_locked = false;
        // The scheduler last: nothing that takes long is then done before everybody else.
        if let Some((cores, need)) = self.cores {
            ask(Setting::Cores(cores.clone()), need, &mut || {
                apply::cores(&cores)
            });
        }
        if let Some(need) = self.lock_memory {
            ask(Setting::LockedMemory, need, &mut || {
                let locked = apply::lock_memory();
                is_locked = locked.is_ok();
                locked
            });
        }
        if let Some((bytes, need)) = self.stack {
            ask(Setting::Stack(bytes), need, &mut || apply::stack(bytes));
        }
        if let Some((bytes, need)) = self.heap {
            ask(Setting::Heap(bytes), need, &mut || apply::heap(bytes));
        }
        if let Some((latency, need)) = self.wake_latency {
            ask(Setting::WakeLatency(latency), need, &mut || {
                apply::wake_latency(latency)
            });
        }
        if let Some(need) = self.flush_to_zero {
            // SAFETY: whoever asked for it has taken over what it means.
            ask(Setting::FlushToZero, need, &mut || unsafe {
                apply::flush_to_zero()
            });
        }
        let on = cores.unwrap_or_else(crate::thread::affinity::current_affinity);
        let warnings = machine::warnings(&on, schedule, self.node, is_locked);
        if let Some((schedule, need)) = self.schedule {
            ask(Setting::Schedule(schedule), need, &mut || {
                apply::schedule(schedule)
            });
        }
        report.warnings = warnings;
        report
    }
}

/// The report, or the error that it amounts to.
fn check(report: RealtimeReport) -> Result<RealtimeReport, Error> {
    for (setting, refusal) in report.refused() {
        logging::warning!("thread '{}': {setting} refused: {refusal}", report.thread);
    }
    match report.fatal() {
        None => Ok(report),
        Some(grant) => Err(Error::RealtimeRefused {
            setting: grant.setting.to_string(),
            reason: grant
                .refusal
                .as_ref()
                .map_or_else(String::new, Refusal::to_string),
            report: report.to_string(),
            thread: report.thread,
        }),
    }
}

/// What a realtime thread knows of itself.
#[derive(Debug)]
pub struct RealtimeContext {
    report: RealtimeReport,
    stop: Arc<AtomicBool>,
}

impl RealtimeContext {
    /// What the thread was granted.
    #[must_use]
    pub fn report(&self) -> &RealtimeReport {
        &self.report
    }

    /// Whether somebody wants it to end ([`RealtimeHandle::stop`]). One load: to be asked in every round.
    #[inline]
    #[must_use]
    pub fn must_stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// A realtime thread that was started.
///
/// Dropping it asks the thread to end, and waits until it has: for as long as its body takes to
/// notice. A thread that drops its own handle does not wait for itself: it has been asked to end,
/// and goes on.
#[derive(Debug)]
pub struct RealtimeHandle<T> {
    /// The process that the thread is of.
    origin: OriginProcess,
    report: RealtimeReport,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Option<T>>>,
}

impl<T> RealtimeHandle<T> {
    /// What it was granted.
    #[must_use]
    pub fn report(&self) -> &RealtimeReport {
        &self.report
    }

    /// Asks it to end: [`RealtimeContext::must_stop`] is true from now on. Does not wait.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether its body has ended. Always so in the child of a `fork`, where there is no such
    /// thread.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.origin.has_forked_since() || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until its body has ended, but no longer than `timeout`; whether it has.
    #[must_use]
    pub fn wait_finished(&self, timeout: Duration) -> bool {
        let deadline = Deadline::after(timeout);
        while !self.is_finished() {
            let left = deadline.remaining();
            if left.is_zero() {
                return false;
            }
            std::thread::sleep(left.min(JOIN_LOOK));
        }
        true
    }

    /// Waits for its end, and gives what its body returned. Blocks for as long as the body runs; see
    /// [`wait_finished`](Self::wait_finished) for a bound.
    ///
    /// # Errors
    /// What the body panicked with. On the thread itself, which cannot wait for its own end, a text that
    /// says so; nothing is waited for then. So it is in the child of a `fork`.
    pub fn join(mut self) -> Result<T, Box<dyn Any + Send>> {
        if self.thread.as_ref().is_some_and(own::is_current) {
            // Dropping the handle tells the thread to end.
            return Err(Box::new("a realtime thread cannot join itself"));
        }
        if self.origin.has_forked_since() {
            return Err(Box::new(
                "the process was forked, and the realtime thread stays with its parent",
            ));
        }
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Some(value))) => Ok(value),
            Some(Err(panic)) => Err(panic),
            // A handle is made only for a thread whose body runs, and joined once.
            Some(Ok(None)) | None => Err(Box::new("the thread did not run")),
        }
    }
}

impl<T> Drop for RealtimeHandle<T> {
    fn drop(&mut self) {
        if self.origin.has_forked_since() {
            // No such thread is here, neither to be joined nor to be detached.
            std::mem::forget(self.thread.take());
            return;
        }
        self.stop();
        if let Some(thread) = self.thread.take()
            && !own::is_current(&thread)
            && let Err(panic) = thread.join()
        {
            logging::error!("realtime thread '{}' panicked", self.report.thread);
            // Its destructor may panic, which ends a process that unwinds already.
            foreign::dispose(panic);
        }
    }
}
