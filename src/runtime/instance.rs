//! One launched kernel: everything about it, and the control plane that moves it from state to state.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::accounts::{Books, Closing};
use super::clients::LaneHub;
use super::link::KernelLink;
use super::metrics::{KernelMetrics, KernelStatus};
use super::receive::ReceiveSide;
use super::send::{SendSide, not_written, write_message};
use crate::backend::cpu::runs_here;
use crate::backend::{Account, Dispatch, DispatchStatus};
use crate::bridge::Bridge;
use crate::error::{Error, Rejection};
use crate::kernel::{
    BlockState, FailureReason, KernelFailure, KernelState, MessageTrace, Telemetry,
};
use crate::logging;
use crate::message::codec::CodecError;
use crate::message::{MessageEncoder, RingMessage};
use crate::process::{self, InChild};
use crate::system::memory::MemoryAccount;
use crate::thread::{CoreLease, PlacedThread, SpinPermit};
use crate::time::{self, Deadline};

/// Between two looks whether all blocks have followed a command; a block that spins follows within a microsecond.
const COMMAND_SPINS: u32 = 1000;
const COMMAND_NAP: Duration = Duration::from_micros(50);

/// How long the end of a kernel waits for a send that has just passed the gate.
const SEND_IN_FLIGHT: Duration = Duration::from_millis(10);

/// A launched kernel. Lives as long as anybody holds a handle or an endpoint of it, or the runtime lists it.
pub(crate) struct KernelInstance {
    pub(super) link: KernelLink,
    /// `None` while split off.
    pub(super) send: Mutex<Option<SendSide>>,
    /// `None` while split off.
    pub(super) receive: Mutex<Option<ReceiveSide>>,
    /// Whether an endpoint holds the receiving side; changed under its lock.
    pub(super) receiver_split: AtomicBool,
    pub(super) control: Mutex<ControlPlane>,
    /// The requests' accounts, once the kernel has ended. Held for a moment only.
    pub(super) closing: Mutex<Option<Closing>>,
    /// For messages that handles send and that need scratch memory. Tried, never waited for.
    pub(super) encoder: Mutex<MessageEncoder>,
    /// Where the accounts go with the last handle.
    pub(super) books: Arc<Books>,
    /// The bridge of its device.
    pub(super) bridge: Arc<Bridge>,
    /// Where its clients' lanes meet.
    pub(super) clients: Mutex<LaneHub>,
    /// Whether nothing of it runs any more, and its accounts are closed.
    pub(super) ended: AtomicBool,
}

/// What only the control plane touches.
#[derive(Debug)]
pub(super) struct ControlPlane {
    /// `None` once the kernel has ended.
    pub(super) dispatch: Option<Box<dyn Dispatch>>,
    pub(super) permit: Option<SpinPermit>,
    pub(super) leases: Vec<CoreLease>,
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

impl Deref for KernelInstance {
    type Target = KernelLink;

    #[inline]
    fn deref(&self) -> &KernelLink {
        &self.link
    }
}

impl KernelInstance {
    /// Archives a message that a handle sends.
    #[inline]
    pub(super) fn write_message<T: RingMessage>(
        &self,
        message: &T,
        body: &mut [u8],
    ) -> Result<usize, Rejection> {
        match message.encode(body) {
            Ok(length) if length <= body.len() => Ok(length),
            Ok(_) => Err(not_written(CodecError::TooLarge, body.len())),
            Err(CodecError::Scratch) => self.write_with_scratch(message, body),
            Err(error) => Err(not_written(error, body.len())),
        }
    }

    /// The same with the scratch memory that was taken at launch; a thread that finds it in use
    /// takes some of its own.
    #[cold]
    fn write_with_scratch<T: RingMessage>(
        &self,
        message: &T,
        body: &mut [u8],
    ) -> Result<usize, Rejection> {
        match self.encoder.try_lock() {
            Some(mut encoder) => write_message(&mut encoder, message, body),
            None => {
                let mut encoder = MessageEncoder::new(self.account());
                write_message(&mut encoder, message, body)
            }
        }
    }

    /// An encoder for an endpoint of this kernel.
    pub(super) fn encoder_of_its_own(&self) -> MessageEncoder {
        MessageEncoder::for_slots_of(self.ring.max_payload(), self.account())
    }

    /// Where memory for this kernel is booked.
    fn account(&self) -> Arc<dyn MemoryAccount> {
        Arc::<Account>::clone(self.bridge.pool.account())
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
        self.check_here("activate a kernel")?;
        self.check_not_here("activation")?;
        let _deferral = logging::defer();
        let mut control = self.control.lock();
        let from = self.state();
        if !from.can_become(KernelState::Active) {
            return Err(self.illegal(from, KernelState::Active));
        }
        let activated = self
            .command(&mut control, true, BlockState::Polling, "activation")
            .inspect(|()| self.compare_clocks())
            .and_then(|()| self.change_state(KernelState::Active));
        if activated.is_ok() {
            // What waits in lanes can go on.
            self.bridge.attention.bell.notify();
        } else {
            // No block may work for a kernel that is not active; those that did answer stop again.
            for block in &self.blocks {
                block.control().set_active(false);
            }
        }
        activated
    }

    /// Stops taking messages, then stops polling, and returns once no block does.
    pub(super) fn deactivate(&self) -> Result<(), Error> {
        self.check_here("deactivate a kernel")?;
        self.check_not_here("deactivation")?;
        let _deferral = logging::defer();
        let mut control = self.control.lock();
        self.change_state(KernelState::Deactivated)?;
        self.compare_clocks();
        self.command(&mut control, false, BlockState::Idle, "deactivation")
    }

    /// Fails on a thread that runs a handler of this kernel, which cannot follow a command until
    /// that handler returns. Takes no lock: another thread may hold the control plane's, and wait
    /// for the same handler.
    pub(super) fn check_not_here(&self, operation: &'static str) -> Result<(), Error> {
        if runs_here(&self.signals) {
            return Err(Error::CalledFromHandler {
                operation,
                kernel: self.signals.name.clone(),
            });
        }
        Ok(())
    }

    fn change_state(&self, to: KernelState) -> Result<(), Error> {
        match self.signals.gate.transition(to) {
            Ok(from) => {
                logging::debug!("kernel '{}': {from} -> {to}", self.signals.name);
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
        if let Some(dispatch) = &mut control.dispatch {
            dispatch.command();
        }
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

    /// Lets the dispatch go on.
    fn look_after(&self, control: &mut ControlPlane) {
        if let Some(dispatch) = &mut control.dispatch {
            let _ = dispatch.keep_alive();
        }
    }

    fn timeout(&self, operation: &'static str) -> Error {
        let (kernel, after) = (self.signals.name.clone(), self.termination_timeout);
        match self.signals.outlet.holder() {
            Some(holder) => Error::ThreadHeld {
                operation,
                kernel,
                holder: holder.name.clone(),
                after,
            },
            None => Error::Timeout {
                operation,
                kernel,
                after,
            },
        }
    }

    /// Ends the kernel. A failed one keeps its state and gives its threads and cores back.
    pub(super) fn terminate(&self) -> Result<(), Error> {
        self.check_here("terminate a kernel")?;
        self.check_not_here("termination")?;
        let _deferral = logging::defer();
        let mut control = self.control.lock();
        if self.state() == KernelState::Active {
            self.compare_clocks();
        }
        match self.signals.gate.transition(KernelState::Terminating) {
            Ok(from) => logging::debug!("kernel '{}': {from} -> Terminating", self.signals.name),
            Err(KernelState::Failed) if control.dispatch.is_some() => {}
            Err(from) => return Err(self.illegal(from, KernelState::Terminating)),
        }
        // Whoever waits for room learns of it now; whoever waits for replies, when the last one is written.
        self.signals.wake_all();
        // A send by handle that passed the gate before it closed ends here.
        drop(self.send.try_lock_for(SEND_IN_FLIGHT));
        if let Some(hub) = self.clients.lock().upgrade() {
            drop(hub.take_before(Deadline::after(SEND_IN_FLIGHT)));
        }
        // So does a reply of the kernel before this one.
        self.pipes.await_publisher(self.termination_timeout);
        self.end(&mut control)
    }

    /// Tells the kernel to end once its handler returns, which the calling thread is in; does not
    /// wait for it. What is left in its rings is not reported.
    pub(super) fn end_after_handler(&self) {
        // The thread that holds the lock ends the kernel as soon as the handler returns.
        let Some(mut control) = self.control.try_lock() else {
            return;
        };
        self.signals.end_with_blocks();
        if self
            .signals
            .gate
            .transition(KernelState::Terminating)
            .is_ok()
        {
            logging::debug!(
                "kernel '{}' ends once its handler returns",
                self.signals.name
            );
        }
        self.signals.wake_all();
        if let Some(mut dispatch) = control.dispatch.take() {
            dispatch.request_stop();
        }
        control.permit = None;
        control.leases.clear();
    }

    /// Fails in the child of a fork. For the control plane.
    pub(super) fn check_here(&self, operation: &'static str) -> Result<(), Error> {
        if self.has_forked_since() {
            return Err(Error::Forked { operation });
        }
        Ok(())
    }

    /// Whether this process is the child of a fork, and the kernel stays with its parent.
    pub(super) fn has_forked_since(&self) -> bool {
        process::look();
        self.signals.gate.has_forked_since()
    }

    /// Whether the kernel has ended, and only its accounts are left.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Ends a failed kernel if nothing of it runs any more. Waits for nothing.
    pub(super) fn end_if_finished(&self) {
        if let Some(mut control) = self.control.try_lock()
            && let Some(dispatch) = &mut control.dispatch
            && !matches!(dispatch.keep_alive(), DispatchStatus::Running)
        {
            // It has ended: there is nothing to wait for that could fail.
            let _ = self.end(&mut control);
        }
    }

    fn end(&self, control: &mut ControlPlane) -> Result<(), Error> {
        let Some(mut dispatch) = control.dispatch.take() else {
            return Ok(());
        };
        dispatch.request_stop();
        // Whether the kernel is between two messages although its thread is not done.
        let mut is_between = false;
        let outcome = match dispatch.join(Deadline::after(self.termination_timeout)) {
            DispatchStatus::Ended => Ok(()),
            // Not this kernel's handler keeps the thread: the kernel itself has ended.
            DispatchStatus::Running if self.signals.outlet.holder().is_some() => {
                is_between = !self.signals.outlet.is_in_handler();
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
        self.close(dispatch.as_ref(), is_between);
        self.ended.store(true, Ordering::Release);
        drop(dispatch);
        control.permit = None;
        control.leases.clear();
        self.pipes.settle();
        self.signals.wake_all();
        self.signals.announce_failure();
        outcome
    }

    fn unfinished_block(&self) -> Option<u32> {
        self.blocks
            .iter()
            .find(|block| block.control().state() != Some(BlockState::Ended))
            .map(|block| block.index)
    }

    pub(super) fn status(&self) -> KernelStatus {
        let _deferral = logging::defer();
        // Not while another thread moves the kernel to a new state: that may take a while.
        if !self.has_forked_since()
            && let Some(mut control) = self.control.try_lock()
        {
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

    pub(super) fn traces(&self) -> Option<Vec<MessageTrace>> {
        if self.has_forked_since() {
            return None;
        }
        let _deferral = logging::defer();
        let tracing = self.tracing.as_ref()?;
        let samples = tracing.read(&self.blocks);
        if self.state() == KernelState::Active {
            self.compare_clocks();
        }
        tracing.place(&samples)
    }

    /// Learns how the device's clock stands, which only a kernel that polls can tell.
    fn compare_clocks(&self) {
        if let Some(tracing) = &self.tracing {
            tracing.compare(&self.blocks);
        }
    }

    /// What is known of it in the child of a fork: that it is not there.
    fn metrics_elsewhere(&self) -> KernelMetrics {
        KernelMetrics {
            status: self.status(),
            blocks: self.blocks.len() as u32,
            accepted: 0,
            processed: 0,
            queue_depth: 0,
            produced: 0,
            received_replies: 0,
            dropped: 0,
            last_error: 0,
            heartbeats: 0,
            slices: 0,
            heartbeat_age: None,
            telemetry: None,
            dead_letters: self.signals.dead_letters.counts(),
            memory_bytes: 0,
            cores: Vec::new(),
            spins: false,
        }
    }

    pub(super) fn metrics(&self) -> KernelMetrics {
        if self.has_forked_since() {
            return self.metrics_elsewhere();
        }
        let telemetry = self.telemetry.then(|| {
            let mut sum = Telemetry::default();
            for block in &self.blocks {
                sum.merge(&block.telemetry().snapshot());
            }
            sum
        });
        // Lanes first: what leaves one meanwhile is counted twice rather than not at all.
        let lanes = self.lanes.totals();
        let (accepted, processed) = self.request_counts();
        let controls = || self.blocks.iter().map(|block| block.control());
        KernelMetrics {
            status: self.status(),
            blocks: self.blocks.len() as u32,
            accepted: accepted + lanes.backlog + lanes.dead(),
            processed,
            queue_depth: accepted - processed + lanes.backlog,
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
            slices: controls()
                .map(|control| u64::from(control.slice_number()))
                .sum(),
            heartbeat_age: Some(
                telemetry
                    .map_or(0, |telemetry| telemetry.alive_at_ns)
                    .max(self.signals.alive_at_ns.load(Ordering::Relaxed)),
            )
            .filter(|alive_at| *alive_at > 0)
            .map(|alive_at| Duration::from_nanos(time::now_ns().saturating_sub(alive_at))),
            telemetry,
            dead_letters: self.signals.dead_letters.counts(),
            memory_bytes: self.memory_bytes,
            cores: self
                .places
                .iter()
                .map(PlacedThread::core)
                .collect::<Option<Vec<_>>>()
                .unwrap_or_default(),
            spins: self.signals.spinning.load(Ordering::Relaxed) > 0,
        }
    }
}

impl InChild for KernelInstance {
    fn close_in_child(&self) {
        self.signals.gate.close_in_child();
    }
}

impl Drop for KernelInstance {
    /// Ends a kernel that was never terminated; the runtime has done so before, unless its launch failed half-way.
    fn drop(&mut self) {
        let _deferral = logging::defer();
        let control = self.control.get_mut();
        if let Some(mut dispatch) = control.dispatch.take() {
            dispatch.request_stop();
            let _ = dispatch.join(Deadline::after(self.termination_timeout));
        }
        if let Some(side) = self.receive.get_mut() {
            side.give_everything_up(&self.link);
        }
        self.close_books();
    }
}
