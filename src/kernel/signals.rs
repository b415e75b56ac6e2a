//! What the host side of a kernel and the thread or bridge behind it tell each other outside the device's memory.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::dead_letters::{DeadLetterQueue, DeadLetters};
use super::outlet::OutletSlot;
use super::state::{FailureReason, KernelFailure, KernelState};
use crate::error::Unavailable;
use crate::logging;
use crate::thread::event_count::EventCount;
use crate::thread::watch::Watch;

const STATE_MASK: u32 = 0xff;
const DRAINING: u32 = 1 << 8;
const DEVICE_LOST: u32 = 1 << 9;
/// In the child of a fork. The state is `Failed` then, so that no check on the way of a message
/// asks for it.
const FORKED: u32 = 1 << 10;

/// A kernel's state, and whether the runtime drains, in one word that every send looks at.
#[derive(Debug)]
pub(crate) struct Gate {
    bits: AtomicU32,
}

impl Gate {
    fn new() -> Self {
        Self {
            bits: AtomicU32::new(KernelState::Created as u32),
        }
    }

    #[inline]
    pub(crate) fn state(&self) -> KernelState {
        KernelState::from_bits(self.bits.load(Ordering::Acquire) & STATE_MASK)
    }

    /// Whether a message may be sent now. One load while it may.
    #[inline]
    pub(crate) fn check_send(&self) -> Result<(), Unavailable> {
        let bits = self.bits.load(Ordering::Relaxed);
        if bits == KernelState::Active as u32 {
            return Ok(());
        }
        Err(Self::why(bits))
    }

    /// Why nothing will ever be received again, if so.
    #[inline]
    pub(crate) fn check_receive(&self) -> Result<(), Unavailable> {
        let bits = self.bits.load(Ordering::Acquire);
        if KernelState::from_bits(bits & STATE_MASK).is_final() {
            return Err(Self::why(bits));
        }
        Ok(())
    }

    /// Whether the kernel takes requests now or may do so later: it has not begun to end.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        // ORDERING: valve. See `Valve::enter`.
        self.bits.load(Ordering::SeqCst) & STATE_MASK < KernelState::Terminating as u32
    }

    #[cold]
    fn why(bits: u32) -> Unavailable {
        match KernelState::from_bits(bits & STATE_MASK) {
            _ if bits & FORKED != 0 => Unavailable::Forked,
            KernelState::Failed if bits & DEVICE_LOST != 0 => Unavailable::DeviceLost,
            KernelState::Failed => Unavailable::Failed,
            KernelState::Terminating | KernelState::Terminated => Unavailable::Terminated,
            _ if bits & DRAINING != 0 => Unavailable::Draining,
            KernelState::Deactivated => Unavailable::Deactivated,
            KernelState::Created | KernelState::Launched | KernelState::Active => {
                Unavailable::NotActivated
            }
        }
    }

    /// Goes from the present state to `next` if that is legal; gives the present state if not.
    pub(crate) fn transition(&self, next: KernelState) -> Result<KernelState, KernelState> {
        self.bits
            // ORDERING: valve. Whoever ends a kernel looks at the valve of its ring after this.
            .fetch_update(Ordering::SeqCst, Ordering::Acquire, |bits| {
                KernelState::from_bits(bits & STATE_MASK)
                    .can_become(next)
                    .then_some((bits & !STATE_MASK) | next as u32)
            })
            .map(|bits| KernelState::from_bits(bits & STATE_MASK))
            .map_err(|bits| KernelState::from_bits(bits & STATE_MASK))
    }

    /// Closes it for good in the child of a fork. Stores only.
    pub(crate) fn close_in_child(&self) {
        let bits = KernelState::Failed as u32 | FORKED;
        self.bits.store(bits, Ordering::SeqCst);
    }

    /// Whether this process is a child that the kernel is not in.
    pub(crate) fn has_forked_since(&self) -> bool {
        self.bits.load(Ordering::Relaxed) & FORKED != 0
    }

    pub(crate) fn set_draining(&self) {
        self.bits.fetch_or(DRAINING, Ordering::AcqRel);
    }
}

/// What a kernel's clients and its blocks know of each other where replies go to lanes.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct LaneWatch {
    /// Who sees to it that replies reach the lanes.
    pub(crate) watch: Watch,
    /// Whether replies go to lanes at all.
    pub(crate) in_use: AtomicBool,
    /// Whether the bridge is told of requests: it carries the replies of a device, which says nothing of them.
    pub(crate) tells_bridge: AtomicBool,
    /// What wakes the bridge.
    bell: OnceLock<Arc<EventCount>>,
    /// What wakes each client.
    clients: Mutex<Vec<Arc<EventCount>>>,
}

impl LaneWatch {
    fn new() -> Self {
        Self {
            watch: Watch::new(),
            in_use: AtomicBool::new(false),
            tells_bridge: AtomicBool::new(false),
            bell: OnceLock::new(),
            clients: Mutex::new(Vec::new()),
        }
    }

    /// Says who is to be woken for replies that no client waits for.
    pub(crate) fn set_bell(&self, bell: Arc<EventCount>) {
        // There is one bridge.
        let _ = self.bell.set(bell);
    }

    #[inline]
    fn reply_written(&self, is_due: bool) {
        if self.watch.must_ring(is_due)
            && let Some(bell) = self.bell.get()
        {
            bell.notify();
        }
    }

    /// Adds what wakes a client.
    pub(crate) fn add_client(&self, event: Arc<EventCount>) {
        self.clients.lock().push(event);
    }

    pub(crate) fn remove_client(&self, event: &Arc<EventCount>) {
        self.clients
            .lock()
            .retain(|other| !Arc::ptr_eq(other, event));
    }

    fn wake_all(&self) {
        for event in self.clients.lock().iter() {
            event.notify();
        }
        // What carries messages to the kernel has to know as well.
        if let Some(bell) = self.bell.get() {
            bell.notify();
        }
    }
}

/// Everything about one kernel that is host memory and shared between its callers and whoever runs it. On cache lines of
/// its own: both sides look at it with every message, and it hardly ever changes.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct KernelSignals {
    /// Name of the instance, for errors and logs.
    pub(crate) name: String,
    pub(crate) gate: Gate,
    /// Callers asleep until a reply comes or the kernel ends.
    pub(crate) replied: EventCount,
    /// Whether callers may sleep at all; if not, nobody needs to look for sleepers.
    pub(crate) callers_park: bool,
    /// Blocks that spin while they are idle; with `Auto` it changes.
    pub(crate) spinning: AtomicU32,
    /// What wakes each block when a request or a command comes; one for all where one thread stands behind them.
    pub(crate) work: Box<[Arc<EventCount>]>,
    /// When somebody last saw blocks make progress that keep no clock themselves, in nanoseconds since the Unix epoch.
    pub(crate) alive_at_ns: AtomicU64,
    /// Messages that could not be delivered.
    pub(crate) dead_letters: DeadLetters,
    /// Its clients' lanes.
    pub(crate) lanes: LaneWatch,
    /// Where the block finds the outlet to the kernel that its replies go to, if they do.
    pub(crate) outlet: OutletSlot,
    /// What the backend left for the block if the block before it runs it on its own thread.
    pub(crate) berth: Mutex<Option<Arc<dyn Any + Send + Sync>>>,
    /// The first failure; of use only while the state is `Failed`.
    failure: OnceLock<KernelFailure>,
    /// Whether the log has the failure.
    is_announced: AtomicBool,
    /// Of each block, whether its handler panicked: the request that it had is still the first in
    /// its ring.
    poisoned: Box<[AtomicBool]>,
    /// Whether the kernel has terminated as soon as its blocks have ended: its control plane is
    /// gone.
    ends_with_blocks: AtomicBool,
}

impl KernelSignals {
    pub(crate) fn new(
        name: String,
        blocks: u32,
        callers_park: bool,
        doorbell: Option<Arc<EventCount>>,
        dead_letters: Option<Arc<DeadLetterQueue>>,
    ) -> Self {
        let bell = || {
            doorbell
                .clone()
                .unwrap_or_else(|| Arc::new(EventCount::new()))
        };
        Self {
            dead_letters: DeadLetters::new(&name, dead_letters),
            name,
            gate: Gate::new(),
            replied: EventCount::new(),
            callers_park,
            spinning: AtomicU32::new(0),
            work: (0..blocks).map(|_| bell()).collect(),
            alive_at_ns: AtomicU64::new(0),
            lanes: LaneWatch::new(),
            outlet: OutletSlot::default(),
            berth: Mutex::new(None),
            failure: OnceLock::new(),
            is_announced: AtomicBool::new(false),
            poisoned: (0..blocks).map(|_| AtomicBool::new(false)).collect(),
            ends_with_blocks: AtomicBool::new(false),
        }
    }

    /// Fails the kernel, keeps the first failure, wakes every thread that waits for it, and logs
    /// the failure. Does nothing to a kernel that has ended.
    pub(crate) fn fail(&self, failure: KernelFailure) {
        self.fail_silently(failure);
        self.announce_failure();
    }

    /// As `fail`, but leaves the log to the next thread that announces the failure: the calling one
    /// holds a side of the kernel, and a logger is foreign code.
    pub(crate) fn fail_silently(&self, failure: KernelFailure) {
        if let (Some(block), Some(_)) = (failure.block, &failure.request)
            && let Some(poisoned) = self.poisoned.get(block as usize)
        {
            poisoned.store(true, Ordering::Release);
        }
        if self.gate.state().is_final() {
            return;
        }
        let reason = failure.reason;
        // The failure is there before the state that points to it. A later one changes nothing of
        // it.
        if self.failure.set(failure).is_ok() && reason == FailureReason::DeviceLost {
            self.gate.bits.fetch_or(DEVICE_LOST, Ordering::AcqRel);
        }
        let _ = self.gate.transition(KernelState::Failed);
        self.wake_all();
    }

    /// The kernel terminates as soon as its last block has ended, without its control plane.
    pub(crate) fn end_with_blocks(&self) {
        self.ends_with_blocks.store(true, Ordering::SeqCst);
    }

    /// To be called when the last block has ended.
    pub(crate) fn blocks_ended(&self) {
        if self.ends_with_blocks.load(Ordering::SeqCst) {
            // Fails if the kernel has failed, which it then stays.
            let _ = self.gate.transition(KernelState::Terminated);
        }
    }

    /// Logs the failure if the kernel has failed and the log does not have it yet.
    pub(crate) fn announce_failure(&self) {
        if let Some(failure) = self.failed_with()
            && !self.is_announced.swap(true, Ordering::Relaxed)
        {
            logging::error!("kernel '{}' failed: {failure}", self.name);
        }
    }

    fn failed_with(&self) -> Option<&KernelFailure> {
        (self.gate.state() == KernelState::Failed)
            .then(|| self.failure.get())
            .flatten()
    }

    /// Wakes callers and blocks, to look at the state.
    pub(crate) fn wake_all(&self) {
        self.replied.notify();
        self.lanes.wake_all();
        for work in &self.work {
            work.notify();
        }
    }

    /// Whether the handler of a block panicked.
    pub(crate) fn is_poisoned(&self, block: u32) -> bool {
        let poisoned = self.poisoned.get(block as usize);
        poisoned.is_some_and(|poisoned| poisoned.load(Ordering::Acquire))
    }

    /// How the kernel failed, if it did. Takes no lock.
    pub(crate) fn failure(&self) -> Option<KernelFailure> {
        if self.gate.has_forked_since() {
            return Some(KernelFailure {
                reason: FailureReason::Forked,
                message: "the process was forked, and the kernel stays with its parent".into(),
                block: None,
                request: None,
            });
        }
        self.failed_with().cloned()
    }

    /// Tells whoever has to look for it that there will be a reply, if the kernel will not.
    #[inline]
    pub(crate) fn request_written(&self) {
        if self.lanes.tells_bridge.load(Ordering::Relaxed)
            && let Some(bell) = self.lanes.bell.get()
        {
            bell.notify();
        }
    }

    /// Tells callers of a reply that was just written, or handed over. `is_due` says that it is time to route replies to lanes even if
    /// nobody waits for any, so that the ring never fills up for want of somebody who looks.
    #[inline]
    pub(crate) fn reply_written(&self, is_due: bool) {
        if self.lanes.in_use.load(Ordering::Relaxed) {
            self.lanes.reply_written(is_due);
        } else if self.callers_park {
            self.replied.notify();
            // Looked at again, behind the fence of that: who has just begun to use lanes sleeps for another sign.
            if self.lanes.in_use.load(Ordering::Relaxed) {
                self.lanes.reply_written(is_due);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(reason: FailureReason) -> KernelFailure {
        KernelFailure {
            reason,
            message: "test".into(),
            block: None,
            request: None,
        }
    }

    #[test]
    fn each_state_refuses_a_send_with_an_error_of_its_own() {
        let gate = Gate::new();
        gate.transition(KernelState::Launched).unwrap();
        assert_eq!(gate.check_send(), Err(Unavailable::NotActivated));
        gate.transition(KernelState::Active).unwrap();
        assert_eq!(gate.check_send(), Ok(()));
        gate.transition(KernelState::Deactivated).unwrap();
        assert_eq!(gate.check_send(), Err(Unavailable::Deactivated));
        gate.set_draining();
        assert_eq!(gate.check_send(), Err(Unavailable::Draining));
        assert_eq!(gate.check_receive(), Ok(()));
        gate.transition(KernelState::Terminating).unwrap();
        assert_eq!(gate.check_send(), Err(Unavailable::Terminated));
        assert_eq!(gate.check_receive(), Ok(()));
        gate.transition(KernelState::Terminated).unwrap();
        assert_eq!(gate.check_receive(), Err(Unavailable::Terminated));
        assert_eq!(
            gate.transition(KernelState::Active),
            Err(KernelState::Terminated)
        );
    }

    #[test]
    fn the_first_failure_is_kept_and_a_lost_device_is_told_apart() {
        let signals = KernelSignals::new("test".into(), 1, true, None, None);
        signals.gate.transition(KernelState::Launched).unwrap();
        signals.fail(failure(FailureReason::DeviceLost));
        signals.fail(failure(FailureReason::Panic));
        assert_eq!(
            signals.failure().map(|failure| failure.reason),
            Some(FailureReason::DeviceLost)
        );
        assert_eq!(signals.gate.check_receive(), Err(Unavailable::DeviceLost));
    }
}
