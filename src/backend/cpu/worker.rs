//! The polling loop of one block: the same protocol that device code speaks.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use super::auto_spin::AutoSpin;
use super::berth::{Berth, Lent, Turn};
use super::on_thread::Running;
use super::panics;
use crate::backend::block::DeviceEnds;
use crate::backend::{Account, BlockMemory};
use crate::error::HandlerError;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{
    BlockState, CpuHandler, DeadLetterReason, Dim3, FailureReason, KernelContext, KernelFailure,
    Lost, ReplyPort, Request, TelemetryWriter, Tracer, TypeTable, UndeliveredMessage,
};
use crate::message::RAW_KIND;
use crate::ring::{Consumer, Corruption, Peek};
use crate::thread::{IdleStep, KernelWait, POLLS_PER_STEP, foreign};
use crate::time::{self, Stopwatch};

/// Empty steps between two heartbeats: a few microseconds.
const STEPS_PER_BEAT: u32 = 8;

/// Empty steps after a message until the counters are written out: late enough that the next message of a ping-pong
/// never waits for it.
const STEPS_BEFORE_STORE: u32 = 6;

/// Empty steps between two writes of the counters, for their sign of life: some 100 us.
const STEPS_PER_STORE: u32 = 512;

/// Messages without an empty poll between two writes of the counters.
const MESSAGES_PER_STORE: u32 = 256;

/// How often a block's own thread looks after it while another one runs it.
const LOOK_AFTER: Duration = Duration::from_millis(10);

/// What all blocks of a kernel have in common. On cache lines of its own: the loop looks at it with every poll.
#[repr(align(128))]
pub(super) struct WorkerSetup {
    pub(super) handler: Arc<dyn CpuHandler>,
    pub(super) types: Arc<TypeTable>,
    pub(super) grid: Dim3,
    pub(super) block_size: Dim3,
    pub(super) wait: KernelWait,
    pub(super) telemetry: bool,
    /// One message in so many is traced; 0 if none is.
    pub(super) trace_every: u32,
    pub(super) heartbeat_interval: Duration,
    /// Where replies are booked that wait for room.
    pub(super) account: Arc<Account>,
    pub(super) blocks: Arc<[Arc<BlockMemory>]>,
}

/// One block on its thread.
pub(super) struct Worker {
    ends: DeviceEnds,
    setup: Arc<WorkerSetup>,
    signals: Arc<KernelSignals>,
    /// If it waits by `Auto`.
    spin: Option<AutoSpin>,
}

impl Worker {
    pub(super) fn new(
        ends: DeviceEnds,
        setup: Arc<WorkerSetup>,
        signals: Arc<KernelSignals>,
        spin: Option<AutoSpin>,
    ) -> Self {
        Self {
            ends,
            setup,
            signals,
            spin,
        }
    }

    /// Runs until the block is told to end, or fails. Whatever happens, the block's end is
    /// announced before code of the crate's user runs that may not return: destructors of a panic's
    /// payload, and of what the handler captured.
    pub(super) fn run(self) {
        let Self {
            ends,
            setup,
            signals,
            spin,
        } = self;
        let running = Running::new(&signals, &ends.memory);
        running.run(|| {
            let panic = Self::run_block((ends, spin), &setup, &signals, &running);
            if let Some(panic) = panic {
                foreign::dispose(panic);
            }
            drop(setup);
        });
    }

    /// What the handler panicked with, if it did.
    fn run_block(
        (ends, spin): (DeviceEnds, Option<AutoSpin>),
        setup: &WorkerSetup,
        signals: &Arc<KernelSignals>,
        running: &Running,
    ) -> Option<Box<dyn Any + Send>> {
        let DeviceEnds {
            requests,
            replies,
            mut state,
            memory,
        } = ends;
        // Before the loop, so that it is dropped after it: the consumer publishes its cursor when
        // it is dropped.
        let mut ending = Ending {
            signals,
            memory: &memory,
            blocks: &setup.blocks,
            failure: Some(KernelFailure {
                reason: FailureReason::Panic,
                message: "the kernel's thread panicked outside its handler".into(),
                block: Some(memory.index),
                request: None,
            }),
        };
        let mut block = BlockLoop {
            requests,
            port: ReplyPort::new(
                replies,
                memory.control(),
                setup.telemetry.then(|| memory.telemetry()),
                Arc::clone(signals),
                memory.index,
                setup.wait != KernelWait::Spin,
                Arc::<Account>::clone(&setup.account),
            ),
            berth: None,
            panic: None,
            is_left: false,
            // Memory of this process always is within reach.
            state: state.as_mut().map_or(&mut [], |state| state.as_mut()),
            memory: &memory,
            setup,
            wait: setup.wait,
            spin,
            handler: setup.handler.as_ref(),
            telemetry: TelemetryWriter::default(),
            tracer: Tracer::new(setup.trace_every, memory.traces()),
            unstored: 0,
            running,
        };
        if setup.types.last_kind() > 0 {
            block.port.prepare_encoder();
        }
        let end = catch_unwind(AssertUnwindSafe(|| running.run(|| block.run())));
        let (failure, panic) = match end {
            Ok(Ok(())) => (None, None),
            Ok(Err(corruption)) => (Some(block.corrupt(corruption)), None),
            Err(panic) => (Some(block.panicked(panic.as_ref())), Some(panic)),
        };
        if failure.is_some() {
            // The block waits for no other thread from here on.
            memory.control().set_terminate();
        }
        block.port.give_spilled_up();
        block.store_telemetry();
        block.port.close();
        ending.failure = failure;
        panic
    }
}

/// Announces the end of a block, on every way out of its loop.
struct Ending<'a> {
    signals: &'a KernelSignals,
    memory: &'a BlockMemory,
    /// All blocks of the kernel.
    blocks: &'a [Arc<BlockMemory>],
    failure: Option<KernelFailure>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Some(failure) = self.failure.take() {
            for block in self.blocks {
                block.control().set_terminate();
            }
            self.signals.fail_silently(failure);
        }
        // In this order: a thread that finds the block ended finds its failure as well.
        self.memory.control().store_state(BlockState::Ended);
        // Of two blocks that end together at least one finds that the other has ended.
        fence(Ordering::SeqCst);
        let has_ended =
            |block: &Arc<BlockMemory>| block.control().state() == Some(BlockState::Ended);
        if self.blocks.iter().all(has_ended) {
            self.signals.blocks_ended();
        }
        self.signals.wake_all();
        // A logger is foreign code.
        let _ = foreign::contain(|| self.signals.announce_failure());
    }
}

struct BlockLoop<'a> {
    requests: Consumer,
    port: ReplyPort<'a>,
    state: &'a mut [u8],
    memory: &'a BlockMemory,
    setup: &'a WorkerSetup,
    /// How it waits now; with `Auto` this changes.
    wait: KernelWait,
    spin: Option<AutoSpin>,
    handler: &'a dyn CpuHandler,
    telemetry: TelemetryWriter,
    tracer: Option<Tracer<'a>>,
    /// Messages since the counters were written out.
    unstored: u32,
    /// What threads know of it that run it.
    running: &'a Running,
    /// Where it lies for the thread of the block before it, if that is to run it.
    berth: Option<Arc<Berth>>,
    /// What its handler panicked with on that thread.
    panic: Option<Box<dyn Any + Send>>,
    /// Whether only its own thread can go on with it.
    is_left: bool,
}

impl Turn for BlockLoop<'_> {
    fn turn(&mut self) -> bool {
        if self.is_left || self.must_stop() {
            return false;
        }
        self.port.set_hosted(true);
        let running = self.running;
        let turn = catch_unwind(AssertUnwindSafe(|| running.run(|| self.take_turn())));
        self.port.set_hosted(false);
        turn.unwrap_or_else(|panic| {
            self.panic = Some(panic);
            self.leave_to_its_thread()
        })
    }
}

impl BlockLoop<'_> {
    fn run(&mut self) -> Result<(), Corruption> {
        let control = self.memory.control();
        loop {
            if control.must_terminate() {
                return Ok(());
            }
            self.port.exchange();
            if control.is_active() {
                control.store_state(BlockState::Polling);
                self.berth = self
                    .port
                    .signals
                    .berth
                    .lock()
                    .clone()
                    .and_then(|berth| berth.downcast().ok());
                self.port.host_guest(true);
                let polled = match self.spin {
                    Some(_) => self.poll_while_active::<true>(),
                    None => self.poll_while_active::<false>(),
                };
                self.port.host_guest(false);
                polled?;
                self.store_telemetry();
                // What was read is given back before the block stops looking.
                self.requests.publish_cursor();
                control.store_state(BlockState::Idle);
            } else {
                self.port.show_life();
                self.sleep(self.setup.heartbeat_interval, |block| {
                    block.memory.control().is_active() || block.port.wants_exchange()
                });
            }
        }
    }

    /// Whether the host wants the block to stop polling.
    #[inline]
    fn must_stop(&self) -> bool {
        let control = self.port.control;
        control.must_terminate() || !control.is_active()
    }

    /// `AUTO` if it waits by `Auto`: others do not look at what concerns only that.
    #[inline]
    fn poll_while_active<const AUTO: bool>(&mut self) -> Result<(), Corruption> {
        let mut empty_steps = 0_u32;
        while !self.must_stop() {
            if self.berth.is_some() {
                self.lie_down();
            }
            match self.requests.peek_spinning(POLLS_PER_STEP) {
                Peek::Ready => {
                    // A thread that was stopped mostly finds a request when it runs again.
                    if AUTO && self.wait == KernelWait::Auto && KernelWait::has_looked(empty_steps)
                    {
                        self.look(false);
                    }
                    empty_steps = 0;
                    self.handle();
                    self.port.run_guest();
                }
                Peek::Empty => {
                    self.port.run_guest();
                    empty_steps = empty_steps.wrapping_add(1);
                    self.idle(empty_steps);
                }
                Peek::Corrupt(corruption) => return Err(corruption),
            }
        }
        Ok(())
    }

    #[inline]
    fn idle(&mut self, empty_steps: u32) {
        if empty_steps.is_multiple_of(STEPS_PER_BEAT) {
            self.port.control.beat();
        }
        if (empty_steps == STEPS_BEFORE_STORE && self.unstored > 0)
            || empty_steps.is_multiple_of(STEPS_PER_STORE)
        {
            self.store_telemetry();
        }
        match self.wait.idle(empty_steps) {
            IdleStep::Poll => {}
            IdleStep::Look => self.look(KernelWait::is_first_look(empty_steps)),
            IdleStep::Sleep if self.port.has_guest_work() => self.port.nap(),
            IdleStep::Sleep if self.spins_again() => {}
            IdleStep::Sleep => {
                self.store_telemetry();
                self.sleep(self.setup.heartbeat_interval, Self::has_request);
                self.port.control.beat();
            }
            IdleStep::SleepFor(interval) => {
                self.store_telemetry();
                // Not woken by requests, but by commands.
                self.sleep(interval.min(self.setup.heartbeat_interval), |block| {
                    !block.memory.control().is_active()
                });
                self.port.control.beat();
            }
        }
    }

    /// Sees whether spinning gets on, unless this is the first look since it did something else.
    #[cold]
    fn look(&mut self, is_first: bool) {
        if let Some(spin) = &mut self.spin {
            self.wait = spin.look(is_first);
        }
    }

    /// Whether it spins from now on instead of sleeping.
    fn spins_again(&mut self) -> bool {
        let again = self.spin.as_mut().and_then(AutoSpin::try_again);
        self.wait = again.unwrap_or(self.wait);
        again.is_some()
    }

    fn has_request(block: &mut Self) -> bool {
        !matches!(block.requests.peek(), Peek::Empty)
            || !block.memory.control().is_active()
            || block.berth.as_ref().is_some_and(|berth| berth.is_hosted())
    }

    /// One turn on the thread of the block before this one.
    #[inline]
    fn take_turn(&mut self) -> bool {
        if !self.port.has_room() {
            self.port.run_guest();
            return true;
        }
        let more = match self.requests.peek() {
            Peek::Ready => {
                self.handle();
                true
            }
            Peek::Empty => {
                self.port.control.beat();
                false
            }
            Peek::Corrupt(_) => self.leave_to_its_thread(),
        };
        self.port.run_guest();
        more || self.port.has_guest_work()
    }

    /// Leaves what follows to the block's own thread.
    #[cold]
    fn leave_to_its_thread(&mut self) -> bool {
        self.is_left = true;
        self.port.signals.wake_all();
        false
    }

    /// Lets the thread of the block before this one run it, as long as that is there and nobody wants anything else. Looks
    /// after it now and then: the other thread may be busy with its own.
    #[cold]
    fn lie_down(&mut self) {
        let Some(berth) = self.berth.clone() else {
            return;
        };
        if berth.is_hosted() && !self.is_left {
            let (signals, control) = (Arc::clone(&self.port.signals), self.port.control);
            let index = self.memory.index as usize;
            let look_after = LOOK_AFTER.min(self.setup.heartbeat_interval);
            let is_wanted =
                || control.is_active() && !control.must_terminate() && berth.is_hosted();
            let block = NonNull::from(&mut *self);
            // SAFETY: until it is taken out below, the loop is only used by way of `lent`, under the lock; this frame, and
            // so what `self` points to, outlives that.
            let lent = unsafe { Lent::new(block) };
            *berth.lock() = Some(lent);
            loop {
                {
                    let mut place = berth.lock();
                    // SAFETY: under the lock.
                    let is_left = unsafe { block.as_ref() }.is_left;
                    if is_left || !is_wanted() {
                        *place = None;
                        break;
                    }
                    // SAFETY: under the lock.
                    let _ = unsafe { lent.turn() };
                    // SAFETY: under the lock.
                    unsafe { &mut *block.as_ptr() }.store_telemetry();
                }
                let Some(work) = signals.work.get(index) else {
                    continue;
                };
                let prepared = work.prepare();
                if is_wanted() {
                    prepared.wait(look_after);
                }
            }
            if let Some(panic) = self.panic.take() {
                std::panic::resume_unwind(panic);
            }
        }
        self.port.write_spilled();
    }

    /// Sleeps for `timeout` at most, unless `is_ready` says otherwise at the last moment. Ends at once when the block
    /// must end.
    fn sleep(&mut self, timeout: Duration, is_ready: impl FnOnce(&mut Self) -> bool) {
        let signals = Arc::clone(&self.port.signals);
        let Some(work) = signals.work.get(self.memory.index as usize) else {
            return;
        };
        let prepared = work.prepare();
        if !self.memory.control().must_terminate() && !is_ready(self) {
            prepared.wait(timeout);
        }
    }

    #[inline]
    fn handle(&mut self) {
        let seen_ns = if self.tracer.is_some() {
            // Not before the message was there.
            time::now_ns_ordered()
        } else {
            0
        };
        let watch = self.setup.telemetry.then(Stopwatch::start);
        self.running.set_in_hand(true);
        if let Err(error) = &self.call_handler() {
            self.reply_error(error);
        }
        if self.tracer.is_some() {
            self.trace(seen_ns);
        }
        let length = self.requests.header().length();
        self.running.set_in_hand(false);
        self.requests.release();
        self.port.control.store_processed(self.requests.position());
        self.port.control.beat();
        self.telemetry.received += 1;
        self.telemetry.bytes_in += length as u64;
        if let Some(watch) = watch {
            if let Some(ticks) = watch.elapsed_ticks() {
                self.telemetry.time_handler(ticks);
            }
            self.unstored += 1;
            if self.unstored == MESSAGES_PER_STORE {
                self.store_telemetry();
            }
        }
    }

    /// Samples the request in hand, which was seen at `seen_ns`, if it is to be sampled.
    #[cold]
    fn trace(&mut self, seen_ns: u64) {
        let extension = self.requests.extension();
        if let Some(tracer) = &mut self.tracer
            && tracer.wants(self.requests.position(), extension.as_ref())
        {
            tracer.record(
                self.requests.header().correlation(),
                extension.as_ref(),
                seen_ns,
                time::now_ns_ordered(),
            );
        }
    }

    #[inline]
    fn call_handler(&mut self) -> Result<(), HandlerError> {
        if self.requests.header().is_error() {
            self.pass_error_on();
            return Ok(());
        }
        let types = self.setup.types.as_ref();
        let kind = self.requests.header().kind();
        if kind != RAW_KIND && types.type_id_of(kind).is_none() {
            self.port.control.count_dropped();
            let lost = Lost {
                block: Some(self.memory.index),
                header: Some(*self.requests.header()),
                extension: self.requests.extension(),
                type_id: None,
                payload: self.requests.payload(),
            };
            self.port
                .signals
                .dead_letters
                .request(DeadLetterReason::Corrupt, &lost);
            return Err(HandlerError::new(
                HandlerError::BAD_REQUEST,
                "kind is not in the type table",
            ));
        }
        if self.requests.header().is_extended() && self.has_expired() {
            return self.give_expired_up();
        }
        let request = Request {
            ring: &self.requests,
            types,
        };
        let mut context = KernelContext {
            block: self.memory.index,
            grid: self.setup.grid,
            block_size: self.setup.block_size,
            state: &mut *self.state,
            port: &mut self.port,
            ring: &self.requests,
            types,
        };
        self.handler.handle(&request, &mut context)
    }

    /// Whether the deadline of the request at hand, which carries an extension, has passed.
    fn has_expired(&self) -> bool {
        let deadline = self
            .requests
            .extension()
            .map_or(0, |extension| extension.deadline_ns);
        deadline != 0 && time::now_ns() >= deadline
    }

    /// Gives the request at hand up. It is not answered: whoever sent it with a deadline has gone on.
    #[cold]
    fn give_expired_up(&mut self) -> Result<(), HandlerError> {
        self.port.control.count_dropped();
        let kind = self.requests.header().kind();
        let lost = Lost {
            block: Some(self.memory.index),
            header: Some(*self.requests.header()),
            extension: self.requests.extension(),
            type_id: self.setup.types.type_of(kind),
            payload: self.requests.payload(),
        };
        self.port
            .signals
            .dead_letters
            .request(DeadLetterReason::Expired, &lost);
        Ok(())
    }

    #[cold]
    fn reply_error(&mut self, error: &HandlerError) {
        self.telemetry.errors += 1;
        self.port.control.store_last_error(error.code);
        // Fails only while the kernel ends: the caller learns that instead.
        let _ = self
            .port
            .reply(self.requests.header().error_head(), None, |body| {
                Ok(error.encode(body))
            });
    }

    /// Passes an error reply of the kernel before this one on, so that the caller at the end of the pipeline learns of it.
    /// Only that kernel writes such requests.
    #[cold]
    fn pass_error_on(&mut self) {
        let payload = self.requests.payload();
        // As for the handler's own errors.
        let _ = self
            .port
            .reply(self.requests.header().error_head(), None, |body| {
                // A slot has room for every error.
                let length = payload.len().min(body.len());
                body[..length].copy_from_slice(&payload[..length]);
                Ok(length)
            });
    }

    fn store_telemetry(&mut self) {
        if !self.setup.telemetry {
            return;
        }
        self.unstored = 0;
        self.telemetry.replied = self.port.replies;
        self.telemetry.bytes_out = self.port.bytes;
        self.telemetry.store(self.memory.telemetry());
        self.port.control.beat();
    }

    fn corrupt(&self, corruption: Corruption) -> KernelFailure {
        KernelFailure {
            reason: FailureReason::CorruptRing,
            message: format!("request ring: {corruption}"),
            block: Some(self.memory.index),
            request: None,
        }
    }

    fn panicked(&mut self, panic: &(dyn Any + Send)) -> KernelFailure {
        // The slot has not been given back, so the message is still there.
        let request = match self.requests.peek() {
            Peek::Ready if self.running.is_in_hand() => Some(UndeliveredMessage {
                kernel: self.port.signals.name.clone(),
                block: self.memory.index,
                header: *self.requests.header(),
                extension: self.requests.extension(),
                payload: copy_of(self.requests.payload()),
            }),
            _ => None,
        };
        KernelFailure {
            reason: FailureReason::Panic,
            message: panics::message(panic),
            block: Some(self.memory.index),
            request,
        }
    }
}

/// A copy; empty if there is no memory for it.
fn copy_of(payload: &[u8]) -> Vec<u8> {
    let mut copy = Vec::new();
    if copy.try_reserve_exact(payload.len()).is_ok() {
        copy.extend_from_slice(payload);
    }
    copy
}
