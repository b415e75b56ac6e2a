//! The threads of one launched kernel.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::auto_spin::AutoSpin;
use super::on_thread::runs_here;
use super::worker::{Worker, WorkerSetup};
use crate::backend::{
    Account, BackendType, BlockMemory, Dispatch, DispatchRequest, DispatchStatus, Handler,
    Leftovers,
};
use crate::error::Error;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{BlockState, FailureReason};
use crate::logging;
use crate::thread::affinity;
use crate::thread::bounded::{BoundedThread, Join};
use crate::time::Deadline;

/// How long a thread may take to start and to pin itself. Milliseconds are usual. Beside many busy
/// processes of a higher priority it has been more than ten seconds. Nothing else makes it late.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Between two looks whether a thread has ended.
const JOIN_INTERVAL: Duration = Duration::from_micros(100);

/// A thread a block.
#[derive(Debug)]
pub(super) struct CpuDispatch {
    signals: Arc<KernelSignals>,
    blocks: Arc<[Arc<BlockMemory>]>,
    /// One a block, in their order.
    threads: Vec<BoundedThread>,
    /// Whether `join` has been called.
    was_joined: bool,
    /// Which were still there then, and where.
    left_behind: Vec<String>,
}

impl CpuDispatch {
    /// Starts all threads, and returns once each has pinned itself and is idle.
    pub(super) fn start(request: DispatchRequest, account: &Arc<Account>) -> Result<Self, Error> {
        let Handler::Cpu(handler) = request.handler else {
            return Err(Error::NoHandler {
                kernel: request.signals.name.clone(),
                backend: BackendType::Cpu.name(),
            });
        };
        let blocks: Arc<[Arc<BlockMemory>]> = request
            .blocks
            .iter()
            .map(|ends| Arc::clone(&ends.memory))
            .collect();
        let setup = Arc::new(WorkerSetup {
            handler,
            types: request.types,
            grid: request.grid,
            block_size: request.block_size,
            wait: request.wait,
            telemetry: request.telemetry,
            trace_every: request.trace_every,
            heartbeat_interval: request.heartbeat_interval,
            account: Arc::clone(account),
            blocks: Arc::clone(&blocks),
        });
        let mut dispatch = Self {
            signals: Arc::clone(&request.signals),
            blocks,
            threads: Vec::new(),
            was_joined: false,
            left_behind: Vec::new(),
        };
        let (started, startings) = sync_channel(request.blocks.len());
        let mut permits = request.permits.into_iter();
        for (index, ends) in request.blocks.into_iter().enumerate() {
            let pin = Pin {
                core: request.cores.get(index).copied(),
                is_named: request.cores_are_named,
                shared: request.shared_cores.clone(),
            };
            let places = Arc::clone(&request.places);
            let (setup, signals) = (Arc::clone(&setup), Arc::clone(&request.signals));
            let spin = permits.next().map(|permit| {
                let core = request.cores.get(index).copied();
                let cores = core.filter(|_| !request.cores_are_named).map(|core| {
                    let mut parked = request.shared_cores.clone();
                    parked.push(core);
                    parked.sort_unstable();
                    parked.dedup();
                    (core, parked)
                });
                AutoSpin::new(Arc::clone(&request.signals), index, permit, cores)
            });
            let started = started.clone();
            let name = format!("rk-{}-{index}", request.signals.name);
            let thread = BoundedThread::spawn(name, move || {
                let memory = Arc::clone(&ends.memory);
                let control = memory.control();
                let pinned = pin.apply();
                let failed = pinned.is_err();
                let core = pinned.as_ref().map_or(None, |pinned| pinned.core);
                let _running = places.get(index).map(|place| place.run(core));
                control.store_state(BlockState::Idle);
                // The receiver lives until every thread has answered, or gives all of them up.
                if started.send(pinned).is_ok() && !failed {
                    Worker::new(ends, setup, signals, spin).run();
                } else {
                    control.store_state(BlockState::Ended);
                }
            })
            .map_err(|source| Error::Os {
                operation: "start a kernel thread",
                source,
            })?;
            dispatch.threads.push(thread);
        }
        let deadline = Deadline::after(START_TIMEOUT);
        let mut refused = None;
        for _ in 0..dispatch.threads.len() {
            match startings.recv_timeout(deadline.remaining()) {
                Ok(pinned) => refused = pinned?.refused.or(refused),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(Error::Timeout {
                        operation: "start",
                        kernel: request.signals.name.clone(),
                        after: START_TIMEOUT,
                    });
                }
            }
        }
        if let Some(error) = refused {
            logging::warning!(
                "kernel '{}' runs where the system lets it: {error}",
                request.signals.name
            );
        }
        Ok(dispatch)
    }

    /// Whether the thread is in the handler of another kernel that was given up as stuck.
    fn is_held_for_ever(&self) -> bool {
        let failure = self
            .signals
            .outlet
            .holder()
            .and_then(|holder| holder.failure());
        failure.is_some_and(|failure| failure.reason == FailureReason::Stuck)
    }

    /// Joins the threads of blocks that have ended, and notes which ones are left, and where.
    fn join_threads(&mut self, deadline: Deadline) {
        let mut left_behind = Vec::new();
        for (block, thread) in self.blocks.iter().zip(&mut self.threads) {
            let place = if block.control().state() == Some(BlockState::Ended) {
                match thread.join(deadline) {
                    Join::Ended | Join::Panicked => continue,
                    Join::LeftBehind(_) if !thread.is_done() => {
                        "in the destructor of what its handler captured or panicked with".into()
                    }
                    Join::LeftBehind(place) => place.to_owned(),
                }
            } else {
                let holder = self.signals.outlet.holder();
                let name = holder
                    .as_ref()
                    .map_or(&self.signals.name, |holder| &holder.name);
                format!("in the handler of kernel '{name}'")
            };
            left_behind.push(format!("{}: {place}", thread.name()));
        }
        self.left_behind = left_behind;
        self.was_joined = true;
    }

    /// Whether every block has ended, which each tells before its thread runs destructors of the
    /// crate's user.
    fn has_ended(&self) -> bool {
        // Fewer threads than blocks if not all could be started.
        let mut blocks = self.threads.iter().zip(self.blocks.iter());
        blocks.all(|(_, block)| block.control().state() == Some(BlockState::Ended))
    }
}

impl Dispatch for CpuDispatch {
    fn keep_alive(&mut self) -> DispatchStatus {
        // A block reports its failure itself. A thread in a destructor of the crate's user still
        // runs.
        let (has_ended, now) = (self.has_ended(), Deadline::after(Duration::ZERO));
        let mut threads = self.threads.iter_mut();
        if has_ended && threads.all(|thread| !matches!(thread.join(now), Join::LeftBehind(_))) {
            DispatchStatus::Ended
        } else {
            DispatchStatus::Running
        }
    }

    fn request_stop(&mut self) {
        for block in self.blocks.iter() {
            block.control().set_terminate();
        }
        self.signals.wake_all();
    }

    fn join(&mut self, deadline: Deadline) -> DispatchStatus {
        // No handler waits for itself.
        let deadline = if runs_here(&self.signals) {
            Deadline::after(Duration::ZERO)
        } else {
            deadline
        };
        while !self.has_ended() && !deadline.has_passed() && !self.is_held_for_ever() {
            std::thread::sleep(JOIN_INTERVAL);
        }
        self.join_threads(deadline);
        if self.has_ended() {
            DispatchStatus::Ended
        } else {
            DispatchStatus::Running
        }
    }

    fn left_behind(&self) -> Vec<String> {
        self.left_behind.clone()
    }

    fn leftovers(&self, block: u32, position: u32) -> Option<Leftovers> {
        let block = self.blocks.get(block as usize)?;
        // SAFETY: the caller promises that the dispatch ended, or that its thread is stuck in a
        // handler, be it that of a block behind this one; `request_stop` has set every `terminate`
        // word before.
        Some(unsafe { Leftovers::new(Arc::clone(block), position) })
    }
}

impl Drop for CpuDispatch {
    /// Asks the threads to end and joins those that do so promptly, unless they have been joined.
    /// One that sits in a handler or a destructor that does not return cannot be joined; it keeps
    /// its own memory alive, and ends by itself should that return.
    fn drop(&mut self) {
        if !self.was_joined {
            self.request_stop();
            let _ = self.join(Deadline::after(Duration::from_millis(100)));
        }
        for thread in &self.left_behind {
            logging::warning!(
                "kernel '{}': a thread was left behind: {thread}",
                self.signals.name
            );
        }
    }
}

/// Where a thread is to run.
#[derive(Debug)]
struct Pin {
    core: Option<usize>,
    /// Whether a user named the core: then it is an error if it cannot be had.
    is_named: bool,
    /// Where it runs otherwise.
    shared: Vec<usize>,
}

/// Where a thread was put.
#[derive(Debug, Default)]
struct Pinned {
    core: Option<usize>,
    /// Why it is not where it was to be.
    refused: Option<Error>,
}

impl Pin {
    fn apply(&self) -> Result<Pinned, Error> {
        let refused = match self
            .core
            .map(|core| (core, affinity::pin_current_thread(core)))
        {
            Some((core, Ok(()))) => {
                return Ok(Pinned {
                    core: Some(core),
                    refused: None,
                });
            }
            Some((_, Err(error))) if self.is_named => return Err(error),
            Some((_, Err(error))) => Some(error),
            None => None,
        };
        let shared = affinity::prefer_cores(&self.shared).err();
        Ok(Pinned {
            core: None,
            refused: refused.or(shared),
        })
    }
}
