//! A kernel whose blocks run on a device that is not this CPU: what the host knows of it, and says for it.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::{BlockMemory, Dispatch, DispatchRequest, DispatchStatus, Leftovers};
use crate::kernel::outlet::{Outlet, Warden};
use crate::kernel::signals::KernelSignals;
use crate::kernel::{BlockFault, BlockState, FailureReason, KernelFailure};
use crate::thread::KernelWait;
use crate::thread::event_count::EventCount;
use crate::time::{self, Deadline};

/// The host's side of such a kernel.
#[derive(Debug)]
pub(crate) struct Resident {
    pub(crate) signals: Arc<KernelSignals>,
    /// What the host's endpoints see.
    pub(crate) blocks: Vec<Arc<BlockMemory>>,
    pub(crate) wait: KernelWait,
    pub(crate) heartbeat_interval: Duration,
    /// The way of its replies into another kernel's ring, if there is one.
    passing: Mutex<Option<Passing>>,
    end: Arc<KernelEnd>,
}

/// A way into the ring of another kernel on the same device.
#[derive(Debug)]
struct Passing {
    outlet: Box<Outlet>,
    offset: u32,
    /// What the next kernel had accepted at the last look.
    accepted: u64,
}

/// Where such a way leads.
#[derive(Debug)]
pub(crate) struct Next {
    /// The block whose request ring it is.
    pub(crate) block: Arc<BlockMemory>,
    /// From the count of replies that were passed on to the position in that ring.
    pub(crate) offset: u32,
}

/// Whether a kernel will never run again. Apart from the kernel, so that its lane can let go of it before it says so.
#[derive(Debug)]
pub(crate) struct KernelEnd {
    finished: AtomicBool,
    event: EventCount,
    signals: Arc<KernelSignals>,
}

impl KernelEnd {
    /// To be called when the lane holds nothing of the kernel any more.
    pub(crate) fn set(&self) {
        self.finished.store(true, Ordering::Release);
        self.event.notify();
        self.signals.wake_all();
        self.signals.announce_failure();
    }
}

impl Resident {
    /// Takes over what was asked for; its blocks are idle.
    pub(crate) fn new(request: DispatchRequest) -> Self {
        let end = Arc::new(KernelEnd {
            finished: AtomicBool::new(false),
            event: EventCount::new(),
            signals: Arc::clone(&request.signals),
        });
        let kernel = Self {
            signals: request.signals,
            blocks: request.blocks.into_iter().map(|ends| ends.memory).collect(),
            wait: request.wait,
            heartbeat_interval: request.heartbeat_interval,
            passing: Mutex::new(None),
            end,
        };
        for block in &kernel.blocks {
            block.control().store_state(BlockState::Idle);
        }
        kernel
    }

    /// Whether its replies are to go elsewhere than they do.
    pub(crate) fn wants_exchange(&self) -> bool {
        let passing = self.passing.lock();
        let outlet = passing.as_ref().map(|passing| &*passing.outlet);
        self.signals.outlet.is_due(outlet)
    }

    /// Takes the outlet that waits for the kernel: from now on it may write to where that leads, until `give_back`. The kernel finds the next
    /// one's kinds in the memory of `own`. To be called while no message of it is under way.
    pub(crate) fn take_outlet(
        &self,
        own: Arc<BlockMemory>,
        warden: Arc<dyn Warden>,
    ) -> Option<Next> {
        let mut passing = self.passing.lock();
        let [block] = &self.blocks[..] else {
            return None;
        };
        let outlet = match *passing {
            None => self.signals.outlet.take()?,
            Some(_) => return None,
        };
        let next = Arc::clone(&outlet.block).downcast::<BlockMemory>();
        let may_begin = outlet.begin(
            Arc::<BlockMemory>::clone(block),
            warden,
            move |kind, next| own.set_next_kind(kind, next),
        );
        match next {
            Ok(next) if may_begin => {
                let offset = outlet
                    .producer
                    .position()
                    .wrapping_sub(block.control().passed());
                let accepted = outlet.accepted[0].get();
                *passing = Some(Passing {
                    outlet,
                    offset,
                    accepted,
                });
                Some(Next {
                    block: next,
                    offset,
                })
            }
            // It has ended meanwhile.
            _ => {
                outlet.end();
                self.signals.outlet.bring_back(outlet);
                None
            }
        }
    }

    /// Brings the outlet back, if it has one. To be called when nothing of the kernel writes to it any more, and `passed` says how much has
    /// been written.
    pub(crate) fn give_back(&self) {
        let Some(Passing {
            mut outlet, offset, ..
        }) = self.passing.lock().take()
        else {
            return;
        };
        let passed = self
            .blocks
            .first()
            .map_or(0, |block| block.control().passed());
        if !outlet.producer.resume_at(passed.wrapping_add(offset)) {
            outlet.next.fail(corrupt_device(0));
        }
        outlet.end();
        self.signals.outlet.bring_back(outlet);
    }

    /// Whether it passes its replies on to a kernel that may sleep, and must be woken for them.
    pub(crate) fn wakes_next(&self) -> bool {
        let passing = self.passing.lock();
        passing
            .as_ref()
            .is_some_and(|passing| passing.outlet.needs_wake)
    }

    /// Counts what has been passed on, and wakes whoever is to take it. To be called now and then.
    pub(crate) fn look_at_passing(&self) {
        if let Some(passing) = &mut *self.passing.lock() {
            passing.outlet.look(&mut passing.accepted);
        }
    }

    /// Whether it gets no slices while it has nothing to do.
    pub(crate) fn may_sleep(&self) -> bool {
        matches!(self.wait, KernelWait::Park | KernelWait::Interval(_))
    }

    /// Whether the host wants it to poll.
    pub(crate) fn is_wanted(&self) -> bool {
        !self.must_terminate()
            && self
                .blocks
                .first()
                .is_some_and(|block| block.control().wants_active())
            && !self.signals.gate.state().is_final()
    }

    /// Whether it is not wanted, and nobody has said for it yet that it is idle.
    pub(crate) fn is_unanswered(&self) -> bool {
        !self.is_wanted()
            && self
                .blocks
                .iter()
                .any(|block| block.control().state() == Some(BlockState::Polling))
    }

    /// Whether the host wants it to end.
    pub(crate) fn must_terminate(&self) -> bool {
        self.blocks
            .first()
            .is_none_or(|block| block.control().wants_end())
    }

    /// Whether a request lies in any of its rings behind what it says to have processed.
    pub(crate) fn has_request(&self) -> bool {
        self.blocks
            .iter()
            .any(|block| block.has_request(block.control().processed()))
    }

    /// A number that changes when messages were handled or written, or a handler was run once more for the same one.
    pub(crate) fn progress(&self) -> u32 {
        self.blocks.iter().fold(0, |sum, block| {
            let control = block.control();
            sum.wrapping_add(control.processed())
                .wrapping_add(control.produced())
                .wrapping_add(control.step())
        })
    }

    /// A number that changes while its blocks run.
    pub(crate) fn heartbeats(&self) -> u32 {
        self.blocks.iter().fold(0, |sum, block| {
            sum.wrapping_add(block.control().heartbeat())
        })
    }

    /// Notes that its blocks were seen to live.
    pub(crate) fn show_life(&self) {
        self.signals
            .alive_at_ns
            .store(time::now_ns(), Ordering::Relaxed);
    }

    /// How a block faulted, if one did.
    pub(crate) fn fault(&self) -> Option<KernelFailure> {
        self.blocks
            .iter()
            .find(|block| block.control().state() == Some(BlockState::Faulted))
            .map(|block| failure(block.index, block.control().fault()))
    }

    /// Ends the kernel for good: it failed, and none of its blocks may go on.
    pub(crate) fn fail(&self, failure: KernelFailure) {
        for block in &self.blocks {
            block.control().set_terminate();
        }
        self.signals.fail(failure);
    }

    /// The failure of a kernel whose device is lost.
    pub(crate) fn lose(&self, reason: &str) {
        self.fail(KernelFailure {
            reason: FailureReason::DeviceLost,
            message: reason.to_owned(),
            block: None,
            request: None,
        });
    }

    /// Says for blocks that cannot do so any more that they ended.
    pub(crate) fn answer_end(&self) {
        for block in &self.blocks {
            let control = block.control();
            if !matches!(
                control.state(),
                Some(BlockState::Ended | BlockState::Faulted)
            ) {
                control.store_state(BlockState::Ended);
            }
        }
    }

    /// What says that the kernel has ended.
    pub(crate) fn end(&self) -> Arc<KernelEnd> {
        Arc::clone(&self.end)
    }

    pub(crate) fn is_finished(&self) -> bool {
        self.end.finished.load(Ordering::Acquire)
    }

    /// Waits until nothing of it runs any more.
    pub(crate) fn wait_finished(&self, deadline: Deadline) -> bool {
        while !self.is_finished() {
            let remaining = deadline.remaining();
            if remaining.is_zero() {
                return false;
            }
            let prepared = self.end.event.prepare();
            if !self.is_finished() {
                prepared.wait(remaining);
            }
        }
        true
    }

    /// Asks every block to end.
    pub(crate) fn ask_to_end(&self) {
        for block in &self.blocks {
            block.control().set_terminate();
        }
        self.signals.wake_all();
    }

    /// Requests of a block that nobody handled, from a position on.
    ///
    /// # Safety
    /// The kernel must have ended, or be stuck in a handler, after `ask_to_end`.
    pub(crate) unsafe fn leftovers(&self, block: u32, position: u32) -> Option<Leftovers> {
        let block = self.blocks.get(block as usize)?;
        // SAFETY: the caller promises what this asks for.
        Some(unsafe { Leftovers::new(Arc::clone(block), position) })
    }
}

/// A number that changes with every progress that blocks make, as their memory shows it.
pub(crate) fn life(blocks: &[Arc<BlockMemory>]) -> u32 {
    blocks.iter().fold(0, |sum, block| {
        let control = block.control();
        let words = [
            control.heartbeat(),
            control.processed(),
            control.produced(),
            control.step(),
            control.slice_number(),
            control.state().map_or(0, |state| state as u32),
        ];
        // Apart from one another, so that no two changes cancel out.
        words.into_iter().fold(sum, |sum, word| {
            sum.wrapping_add(word).wrapping_mul(0x9e37_79b1)
        })
    })
}

/// The failure of a kernel whose device writes positions that cannot be.
pub(crate) fn corrupt_device(block: u32) -> KernelFailure {
    KernelFailure {
        reason: FailureReason::CorruptRing,
        message: "the device reports positions that cannot be".into(),
        block: Some(block),
        request: None,
    }
}

fn failure(block: u32, fault: Option<BlockFault>) -> KernelFailure {
    let (reason, message) = match fault {
        Some(BlockFault::CorruptRing) => (
            FailureReason::CorruptRing,
            "request ring: a slot holds what no sender wrote",
        ),
        Some(BlockFault::LoopCut) => (
            FailureReason::Fault,
            "the driver cut the handler's loops short: it runs more iterations than it declared",
        ),
        Some(BlockFault::TooManyReplies) => (
            FailureReason::Fault,
            "the handler wrote more replies than it declared into a full ring",
        ),
        None => (FailureReason::Fault, "a fault of no known kind"),
    };
    KernelFailure {
        reason,
        message: message.into(),
        block: Some(block),
        request: None,
    }
}

/// Whoever keeps such kernels running.
pub(crate) trait Keeper: Send + Sync + fmt::Debug {
    /// Makes it look at its kernels: one has a new command, or is to end.
    fn look(&self);
}

/// What the runtime holds of such a kernel.
#[derive(Debug)]
pub(crate) struct ResidentDispatch<K> {
    kernel: Arc<K>,
    keeper: Arc<dyn Keeper>,
    memory_bytes: u64,
}

impl<K> ResidentDispatch<K> {
    /// Of a kernel that its keeper has admitted, and that took these bytes beside its blocks' memory.
    pub(crate) fn new(kernel: Arc<K>, keeper: Arc<dyn Keeper>, memory_bytes: u64) -> Self {
        Self {
            kernel,
            keeper,
            memory_bytes,
        }
    }
}

impl<K> Dispatch for ResidentDispatch<K>
where
    K: Deref<Target = Resident> + Send + Sync + fmt::Debug,
{
    fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    fn command(&mut self) {
        self.keeper.look();
    }

    fn keep_alive(&mut self) -> DispatchStatus {
        if self.kernel.is_finished() {
            // A failure has been reported by whoever saw it.
            DispatchStatus::Ended
        } else {
            DispatchStatus::Running
        }
    }

    fn request_stop(&mut self) {
        self.kernel.ask_to_end();
        self.keeper.look();
    }

    fn join(&mut self, deadline: Deadline) -> DispatchStatus {
        self.kernel.wait_finished(deadline);
        self.keep_alive()
    }

    fn leftovers(&self, block: u32, position: u32) -> Option<Leftovers> {
        // SAFETY: the caller promises that the dispatch ended, or is stuck in a handler; `request_stop` has asked it to end
        // before either.
        unsafe { self.kernel.leftovers(block, position) }
    }
}
