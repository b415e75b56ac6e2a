//! The threads of one launched kernel.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::worker::{Worker, WorkerSetup};
use crate::backend::{
    Account, BackendType, BlockMemory, Dispatch, DispatchRequest, DispatchStatus, Handler,
    Leftovers,
};
use crate::error::Error;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{BlockState, FailureReason, KernelFailure};
use crate::logging;
use crate::thread::{affinity, own};
use crate::time::Deadline;

/// How long a thread may take to start and to pin itself. Milliseconds are usual; only an overloaded machine needs more.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two looks whether a thread has ended.
const JOIN_INTERVAL: Duration = Duration::from_micros(100);

/// A thread a block.
#[derive(Debug)]
pub(super) struct CpuDispatch {
    signals: Arc<KernelSignals>,
    blocks: Arc<[Arc<BlockMemory>]>,
    /// `None` once joined.
    threads: Vec<Option<JoinHandle<()>>>,
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
        };
        let (started, startings) = sync_channel(request.blocks.len());
        for (index, ends) in request.blocks.into_iter().enumerate() {
            let pin = Pin {
                core: request.cores.get(index).copied(),
                is_named: request.cores_are_named,
                shared: request.shared_cores.clone(),
            };
            let places = Arc::clone(&request.places);
            let (setup, signals) = (Arc::clone(&setup), Arc::clone(&request.signals));
            let started = started.clone();
            let thread = std::thread::Builder::new()
                .name(format!("rk-{}-{index}", request.signals.name))
                .spawn(move || {
                    let pinned = pin.apply();
                    let failed = pinned.is_err();
                    let core = pinned.as_ref().map_or(None, |pinned| pinned.core);
                    let _running = places.get(index).map(|place| place.run(core));
                    if failed {
                        ends.memory.control().store_state(BlockState::Ended);
                    } else {
                        ends.memory.control().store_state(BlockState::Idle);
                    }
                    // The receiver lives until every thread has answered, or gives all of them up.
                    if started.send(pinned).is_ok() && !failed {
                        Worker::new(ends, setup, signals).run();
                    }
                })
                .map_err(|source| Error::Os {
                    operation: "start a kernel thread",
                    source,
                })?;
            dispatch.threads.push(Some(thread));
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

    /// Joins what has ended. A thread that panicked outside its handler is a failure of its block.
    fn reap(&mut self) -> Option<KernelFailure> {
        let mut failure = None;
        for (block, slot) in self.threads.iter_mut().enumerate() {
            // Its last act may be an allocator's or a destructor's, which asks for the kernel's status here: the next
            // look joins it.
            let is_finished =
                |thread: &JoinHandle<()>| thread.is_finished() && !own::is_current(thread);
            if slot.as_ref().is_some_and(is_finished)
                && let Some(thread) = slot.take()
                && thread.join().is_err()
            {
                failure = Some(KernelFailure {
                    reason: FailureReason::Panic,
                    message: "the kernel's thread panicked outside its handler".into(),
                    block: u32::try_from(block).ok(),
                    request: None,
                });
            }
        }
        failure
    }
}

impl Dispatch for CpuDispatch {
    fn keep_alive(&mut self) -> DispatchStatus {
        if let Some(failure) = self.reap() {
            return DispatchStatus::Failed(failure);
        }
        if self.threads.iter().all(Option::is_none) {
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
        loop {
            let status = self.keep_alive();
            if !matches!(status, DispatchStatus::Running) || deadline.has_passed() {
                return status;
            }
            std::thread::sleep(JOIN_INTERVAL);
        }
    }

    fn leftovers(&self, block: u32, position: u32) -> Option<Leftovers> {
        let block = self.blocks.get(block as usize)?;
        // SAFETY: the caller promises that the dispatch ended, or is stuck in a handler; `request_stop` has set every
        // `terminate` word before either.
        Some(unsafe { Leftovers::new(Arc::clone(block), position) })
    }
}

impl Drop for CpuDispatch {
    /// Asks the threads to end and joins those that do so promptly. One that sits in a handler that never returns
    /// cannot be joined; it keeps its own memory alive and ends by itself should the handler ever return.
    fn drop(&mut self) {
        if self.threads.iter().all(Option::is_none) {
            return;
        }
        self.request_stop();
        let _ = self.join(Deadline::after(Duration::from_millis(100)));
        let abandoned = self.threads.iter().flatten().count();
        if abandoned > 0 {
            logging::warning!(
                "kernel '{}': {abandoned} threads are stuck in their handler and were left behind",
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
