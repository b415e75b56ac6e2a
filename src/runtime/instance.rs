//! One launched kernel: everything about it, and the control plane that moves it from state to state.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::calls::CallTable;
use super::lifecycle::MessageTally;
use super::metrics::{KernelMetrics, KernelStatus};
use super::receive::ReceiveSide;
use super::send::SendSide;
use crate::backend::{BlockMemory, Dispatch, DispatchStatus};
use crate::error::Error;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{
    BlockState, DeadLetterReason, FailureReason, KernelFailure, KernelState, Telemetry, TypeTable,
    UndeliveredMessage,
};
use crate::thread::{CoreLease, SpinPermit, WaitStrategy};
use crate::time::{self, Deadline, TimestampSource};

/// Between two looks whether all blocks have followed a command; a block that spins follows within a microsecond.
const COMMAND_SPINS: u32 = 1000;
const COMMAND_NAP: Duration = Duration::from_micros(50);

/// How long the end of a kernel waits for a send that has just passed the gate.
const SEND_IN_FLIGHT: Duration = Duration::from_millis(10);

/// A counter on a cache line pair of its own, written by one thread at a time.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// Not a read-modify-write: whoever calls this is the only writer at that time.
    #[inline]
    fn add(&self, count: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A launched kernel. Lives as long as anybody holds a handle or an endpoint of it, or the runtime lists it.
pub(crate) struct KernelInstance {
    /// Id of the registration.
    pub(super) kernel: String,
    pub(super) device: usize,
    pub(super) signals: Arc<KernelSignals>,
    pub(super) types: Arc<TypeTable>,
    pub(super) blocks: Box<[Arc<BlockMemory>]>,
    /// Slots of each ring.
    pub(super) capacity: u64,
    /// Whether a sender must look for a sleeping kernel.
    pub(super) needs_wake: bool,
    pub(super) host_wait: WaitStrategy,
    pub(super) default_timeout: Duration,
    pub(super) termination_timeout: Duration,
    pub(super) telemetry: bool,
    pub(super) spins: bool,
    pub(super) cores: Vec<usize>,
    pub(super) memory_bytes: u64,
    pub(super) timestamps: TimestampSource,
    pub(super) calls: CallTable,
    /// Requests accepted, by block; written by whoever holds the sending side.
    pub(super) accepted: Box<[Counter]>,
    /// Replies received; written by whoever holds the receiving side.
    pub(super) delivered: Counter,
    /// Replies that reached a call by way of another thread.
    pub(super) handed_over: AtomicU64,
    /// Threads that wait by handle for a message or for room.
    pub(super) waiters: AtomicU32,
    /// `None` while split off.
    pub(super) send: Mutex<Option<SendSide>>,
    /// `None` while split off.
    pub(super) receive: Mutex<Option<ReceiveSide>>,
    pub(super) control: Mutex<ControlPlane>,
}

/// What only the control plane touches.
#[derive(Debug)]
pub(super) struct ControlPlane {
    /// `None` once the kernel has ended.
    pub(super) dispatch: Option<Box<dyn Dispatch>>,
    pub(super) permit: Option<SpinPermit>,
    pub(super) leases: Vec<CoreLease>,
    /// The requests' accounts, once the kernel has ended.
    pub(super) closing: Option<Closing>,
}

/// What became of a kernel's requests.
#[derive(Debug)]
pub(super) struct Closing {
    pub(super) requests: MessageTally,
    pub(super) returned: Vec<UndeliveredMessage>,
}

impl fmt::Debug for KernelInstance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelInstance")
            .field("name", &self.signals.name)
            .field("kernel", &self.kernel)
            .field("state", &self.signals.gate.state())
            .field("blocks", &self.blocks.len())
            .finish_non_exhaustive()
    }
}

/// A thread that waits by handle.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    instance: &'a KernelInstance,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.instance.waiters.fetch_sub(1, Ordering::Relaxed);
    }
}

impl KernelInstance {
    /// Counts requests just published to a block, and wakes it if it may sleep.
    #[inline]
    pub(super) fn sent(&self, block: usize, count: u32) {
        self.accepted[block].add(count.into());
        if self.needs_wake {
            self.signals.work[block].notify();
        }
    }

    /// Counts a reply that has reached its caller.
    #[inline]
    pub(super) fn count_delivered(&self) {
        self.delivered.add(1);
    }

    /// Counts a reply that another thread took out of the ring for a call; `sound` if the call could read it.
    pub(super) fn count_handed_over(&self, sound: bool) {
        if sound {
            self.handed_over.fetch_add(1, Ordering::Relaxed);
        } else {
            self.signals
                .dead_letters
                .count_reply(DeadLetterReason::Corrupt);
        }
    }

    /// Notes that the calling thread waits by handle, as long as the result lives.
    pub(super) fn waiting(&self) -> Waiting<'_> {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        Waiting { instance: self }
    }

    /// Whether any thread waits by handle.
    pub(super) fn has_waiters(&self) -> bool {
        self.waiters.load(Ordering::Relaxed) > 0
    }

    /// Fails a kernel whose memory cannot be trusted any more, and ends its blocks.
    #[cold]
    pub(super) fn quarantine(&self, block: usize, what: &str) {
        for block in &self.blocks {
            block.control().set_terminate();
        }
        self.signals.fail(KernelFailure {
            reason: FailureReason::CorruptRing,
            message: what.to_owned(),
            block: u32::try_from(block).ok(),
            request: None,
        });
    }

    pub(super) fn state(&self) -> KernelState {
        self.signals.gate.state()
    }

    fn illegal(&self, from: KernelState, to: KernelState) -> Error {
        Error::InvalidTransition {
            kernel: self.signals.name.clone(),
            from: from.name(),
            to: to.name(),
        }
    }

    /// Starts polling, and returns once every block does.
    pub(super) fn activate(&self) -> Result<(), Error> {
        let mut control = self.control.lock();
        let from = self.state();
        if !from.can_become(KernelState::Active) {
            return Err(self.illegal(from, KernelState::Active));
        }
        let activated = self
            .command(&mut control, true, BlockState::Polling, "activation")
            .and_then(|()| self.change_state(KernelState::Active));
        if activated.is_err() {
            // No block may work for a kernel that is not active; those that did answer stop again.
            for block in &self.blocks {
                block.control().set_active(false);
            }
        }
        activated
    }

    /// Stops taking messages, then stops polling, and returns once no block does.
    pub(super) fn deactivate(&self) -> Result<(), Error> {
        let mut control = self.control.lock();
        self.change_state(KernelState::Deactivated)?;
        self.command(&mut control, false, BlockState::Idle, "deactivation")
    }

    fn change_state(&self, to: KernelState) -> Result<(), Error> {
        match self.signals.gate.transition(to) {
            Ok(from) => {
                log::debug!("kernel '{}': {from} -> {to}", self.signals.name);
                Ok(())
            }
            Err(from) => Err(self.illegal(from, to)),
        }
    }

    /// Tells all blocks to poll or not to poll, and waits until they have answered.
    fn command(
        &self,
        control: &mut ControlPlane,
        active: bool,
        answer: BlockState,
        operation: &'static str,
    ) -> Result<(), Error> {
        for block in &self.blocks {
            block.control().set_active(active);
        }
        self.signals.wake_all();
        let deadline = Deadline::after(self.termination_timeout);
        let mut spins = 0;
        loop {
            if self
                .blocks
                .iter()
                .all(|block| block.control().state() == Some(answer))
            {
                return Ok(());
            }
            self.look_after(control);
            let state = self.state();
            if state.is_final() {
                let to = if active {
                    KernelState::Active
                } else {
                    KernelState::Deactivated
                };
                return Err(self.illegal(state, to));
            }
            if deadline.has_passed() {
                return Err(self.timeout(operation));
            }
            if spins < COMMAND_SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::sleep(COMMAND_NAP);
            }
        }
    }

    /// Lets the dispatch go on, and notes if it has failed.
    fn look_after(&self, control: &mut ControlPlane) {
        if let Some(dispatch) = &mut control.dispatch
            && let DispatchStatus::Failed(failure) = dispatch.keep_alive()
        {
            self.signals.fail(failure);
        }
    }

    fn timeout(&self, operation: &'static str) -> Error {
        Error::Timeout {
            operation,
            kernel: self.signals.name.clone(),
            after: self.termination_timeout,
        }
    }

    /// Ends the kernel. A failed one keeps its state and gives its threads and cores back.
    pub(super) fn terminate(&self) -> Result<(), Error> {
        let mut control = self.control.lock();
        match self.signals.gate.transition(KernelState::Terminating) {
            Ok(from) => log::debug!("kernel '{}': {from} -> Terminating", self.signals.name),
            Err(KernelState::Failed) if control.dispatch.is_some() => {}
            Err(from) => return Err(self.illegal(from, KernelState::Terminating)),
        }
        // Whoever waits for room learns of it now; whoever waits for replies, when the last one is written.
        self.signals.wake_all();
        // A send by handle that passed the gate before it closed ends here.
        drop(self.send.try_lock_for(SEND_IN_FLIGHT));
        self.end(&mut control)
    }

    fn end(&self, control: &mut ControlPlane) -> Result<(), Error> {
        let Some(mut dispatch) = control.dispatch.take() else {
            return Ok(());
        };
        dispatch.request_stop();
        let outcome = match dispatch.join(Deadline::after(self.termination_timeout)) {
            DispatchStatus::Ended => Ok(()),
            DispatchStatus::Failed(failure) => {
                self.signals.fail(failure);
                Ok(())
            }
            DispatchStatus::Running => {
                let stuck = self.unfinished_block();
                self.signals.fail(KernelFailure {
                    reason: FailureReason::Stuck,
                    message: format!(
                        "the handler did not return within {:?}",
                        self.termination_timeout
                    ),
                    block: stuck,
                    request: None,
                });
                Err(self.timeout("termination"))
            }
        };
        // Fails if the kernel has failed, which it then stays.
        let _ = self.signals.gate.transition(KernelState::Terminated);
        control.closing = Some(self.close(dispatch.as_ref()));
        drop(dispatch);
        control.permit = None;
        control.leases.clear();
        self.signals.wake_all();
        outcome
    }

    fn unfinished_block(&self) -> Option<u32> {
        self.blocks
            .iter()
            .find(|block| block.control().state() != Some(BlockState::Ended))
            .map(|block| block.index)
    }

    /// Settles the requests' accounts. Each block's progress is read once, and what lies in its ring behind that is what
    /// no handler saw: the ring decides, so that the accounts add up whatever a late sender or a handler that returns
    /// after all do meanwhile. A send that passes the gate in the very moment of the end may appear in no column.
    fn close(&self, dispatch: &dyn Dispatch) -> Closing {
        let poisoned = self.signals.poisoned_blocks();
        let mut requests = MessageTally::default();
        let mut returned = Vec::new();
        for (block, counter) in self.blocks.iter().zip(&self.accepted) {
            let control = block.control();
            let position = control.processed();
            // A request that a handler panicked on, or sits on for ever, is still the first in its ring.
            let in_hand =
                poisoned.contains(&block.index) || control.state() != Some(BlockState::Ended);
            let mut left = dispatch.leftovers(block.index, position);
            let (accepted, processed) = self.progress(counter, position);
            let accepted = accepted.max(processed + left.len() as u64);
            // Behind a corrupt slot nothing can be read.
            let unreadable = accepted - processed - left.len() as u64;
            for _ in 0..unreadable {
                self.signals
                    .dead_letters
                    .count_request(DeadLetterReason::Corrupt);
            }
            let failed = u64::from(in_hand && !left.is_empty());
            if failed > 0 {
                left.remove(0);
                self.signals
                    .dead_letters
                    .count_request(DeadLetterReason::KernelFailed);
            }
            let refused = u64::from(control.dropped());
            requests.merge(&MessageTally {
                accepted,
                delivered: processed.saturating_sub(refused),
                dead_lettered: refused.min(processed) + unreadable + failed,
                returned: left.len() as u64,
            });
            returned.append(&mut left);
        }
        Closing { requests, returned }
    }

    /// Accepted and processed requests of one block, given what the block says that it has consumed.
    fn progress(&self, accepted: &Counter, processed: u32) -> (u64, u64) {
        let accepted = accepted.get();
        // Blocks count modulo 2^32; the difference cannot truly exceed what a ring holds. Negative while a send that a
        // fast kernel has already handled is not yet counted.
        let depth = (accepted as u32).wrapping_sub(processed) as i32;
        let depth = u64::from(depth.max(0).cast_unsigned())
            .min(self.capacity)
            .min(accepted);
        (accepted, accepted - depth)
    }

    /// Requests accepted so far, and those of them that blocks are done with.
    pub(super) fn request_counts(&self) -> (u64, u64) {
        self.blocks
            .iter()
            .zip(&self.accepted)
            .map(|(block, accepted)| {
                // In this order, so that what is processed has been accepted.
                let processed = block.control().processed();
                self.progress(accepted, processed)
            })
            .fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1))
    }

    /// Requests that are queued or in a handler's hands.
    pub(super) fn queue_depth(&self) -> u64 {
        let (accepted, processed) = self.request_counts();
        accepted - processed
    }

    /// Accounts of the replies, as of now.
    pub(super) fn reply_tally(&self) -> MessageTally {
        let dead_lettered = self.signals.dead_letters.counts().replies();
        let delivered = self.delivered.get() + self.handed_over.load(Ordering::Relaxed);
        let produced = self.blocks.iter().fold(0_u32, |sum, block| {
            sum.wrapping_add(block.control().produced())
        });
        let taken = delivered + dead_lettered;
        // Negative while a reply that a fast caller has already received is not yet counted by its block.
        let returned = produced.wrapping_sub(taken as u32) as i32;
        let returned = u64::from(returned.max(0).cast_unsigned());
        MessageTally {
            accepted: taken + returned,
            delivered,
            dead_lettered,
            returned,
        }
    }

    pub(super) fn status(&self) -> KernelStatus {
        // Not while another thread moves the kernel to a new state: that may take a while.
        if let Some(mut control) = self.control.try_lock() {
            self.look_after(&mut control);
        }
        KernelStatus {
            name: self.signals.name.clone(),
            kernel: self.kernel.clone(),
            device: self.device,
            state: self.state(),
            failure: self.signals.failure(),
        }
    }

    pub(super) fn metrics(&self) -> KernelMetrics {
        let telemetry = self.telemetry.then(|| {
            let mut sum = Telemetry::default();
            for block in &self.blocks {
                sum.merge(&block.telemetry().snapshot());
            }
            sum
        });
        let (accepted, processed) = self.request_counts();
        let controls = || self.blocks.iter().map(|block| block.control());
        KernelMetrics {
            status: self.status(),
            blocks: self.blocks.len() as u32,
            accepted,
            processed,
            queue_depth: accepted - processed,
            produced: self.reply_tally().accepted,
            received_replies: self.reply_tally().delivered,
            dropped: controls().map(|control| u64::from(control.dropped())).sum(),
            last_error: controls()
                .map(|control| control.last_error())
                .rfind(|code| *code != 0)
                .unwrap_or(0),
            heartbeats: controls()
                .map(|control| u64::from(control.heartbeat()))
                .sum(),
            heartbeat_age: telemetry
                .map(|telemetry| telemetry.alive_at_ns)
                .filter(|alive_at| *alive_at > 0)
                .map(|alive_at| Duration::from_nanos(time::now_ns().saturating_sub(alive_at))),
            telemetry,
            dead_letters: self.signals.dead_letters.counts(),
            memory_bytes: self.memory_bytes,
            cores: self.cores.clone(),
            spins: self.spins,
        }
    }
}

impl Drop for KernelInstance {
    /// Ends a kernel that was never terminated; the runtime has done so before, unless its launch failed half-way.
    fn drop(&mut self) {
        let control = self.control.get_mut();
        if let Some(mut dispatch) = control.dispatch.take() {
            dispatch.request_stop();
            let _ = dispatch.join(Deadline::after(self.termination_timeout));
        }
    }
}
