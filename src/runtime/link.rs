//! What the sending and the receiving side of a kernel share: its signals, types, blocks and counters. The control plane
//! is not in here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::calls::CallTable;
use super::lifecycle::MessageTally;
use super::pipeline::Pipes;
use super::traces::Tracing;
use crate::backend::BlockMemory;
use crate::bridge::LaneShared;
use crate::kernel::outlet::Counter;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{DeadLetterReason, FailureReason, KernelFailure, KernelState, Lost, TypeTable};
use crate::message::{Extension, MessageHeader};
use crate::ring::RingLayout;
use crate::thread::{Awaited, KernelWait, PlacedThread, WaitStrategy, Waiter};
use crate::time::Stamps;

/// Everything about a launched kernel but who holds its sides and who controls it.
#[derive(Debug)]
pub(crate) struct KernelLink {
    /// Id of the registration.
    pub(super) kernel: String,
    pub(super) device: usize,
    pub(super) signals: Arc<KernelSignals>,
    pub(super) types: Arc<TypeTable>,
    pub(super) blocks: Box<[Arc<BlockMemory>]>,
    /// Slots of each ring.
    pub(super) capacity: u64,
    /// The same, and their size.
    pub(super) ring: RingLayout,
    /// Whether a sender must look for a sleeping kernel.
    pub(super) needs_wake: bool,
    pub(super) host_wait: WaitStrategy,
    /// How long a caller may sleep without looking for itself.
    pub(super) longest_sleep: Duration,
    pub(super) default_timeout: Duration,
    pub(super) termination_timeout: Duration,
    pub(super) telemetry: bool,
    /// `None` unless messages are traced.
    pub(super) tracing: Option<Tracing>,
    /// How its blocks wait.
    pub(super) wait: KernelWait,
    /// The core of each block that has one of its own, as it was given; empty if they share cores.
    pub(super) cores: Vec<usize>,
    /// Where the blocks run, if each is a thread.
    pub(super) places: Arc<[PlacedThread]>,
    pub(super) memory_bytes: u64,
    pub(super) timestamps: Stamps,
    pub(super) calls: CallTable,
    /// Requests accepted, by block; written by whoever holds the sending side.
    pub(super) accepted: Arc<[Counter]>,
    /// Replies received; written by whoever holds the receiving side.
    pub(super) delivered: Counter,
    /// Replies that reached a call by way of another thread.
    pub(super) handed_over: AtomicU64,
    /// Threads that wait by handle for a message or for room.
    pub(super) waiters: AtomicU32,
    /// The lanes of its clients.
    pub(super) lanes: Lanes,
    /// Whether its blocks can write their replies into the rings of others.
    pub(super) shares_rings: bool,
    /// Replies that one run of the handler may write, of a device that must know it.
    pub(super) replies: u32,
    /// Whether its blocks are threads of this process, whose loop gives expired requests up.
    pub(super) is_on_threads: bool,
    /// The kernels before and behind this one.
    pub(super) pipes: Pipes,
}

/// The lanes of a kernel's clients, for its accounts.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    /// The highest number that a lane has had.
    highest: AtomicU32,
    /// Counts lanes.
    generation: AtomicU32,
    book: Mutex<LaneBook>,
}

#[derive(Debug, Default)]
struct LaneBook {
    live: Vec<Arc<LaneShared>>,
    gone: LaneTotals,
}

/// What became of the messages in a kernel's lanes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LaneTotals {
    /// Requests waiting.
    pub(super) backlog: u64,
    /// Requests that had expired there.
    pub(super) expired: u64,
    /// Requests that newer ones replaced, or that found no room.
    pub(super) overflowed: u64,
    /// Replies that clients received.
    pub(super) delivered: u64,
}

impl LaneTotals {
    /// Requests given up in lanes.
    pub(super) fn dead(&self) -> u64 {
        self.expired + self.overflowed
    }

    fn add(&mut self, lane: &LaneShared) {
        self.backlog += lane.backlog();
        self.expired += lane.expired.get();
        self.overflowed += lane.displaced.get() + lane.overflowed.get();
        self.delivered += lane.delivered.get();
    }
}

impl Lanes {
    /// Whether there is, or was, a lane of this number.
    #[inline]
    pub(super) fn knows(&self, number: u16) -> bool {
        u32::from(number) <= self.highest.load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, number: u16, lane: Arc<LaneShared>) {
        self.highest.fetch_max(number.into(), Ordering::Relaxed);
        let mut book = self.book.lock();
        book.settle();
        book.live.push(lane);
    }

    /// Tells apart the lanes that follow one another in a place: 8 bits.
    pub(super) fn next_generation(&self) -> u16 {
        let before = self.generation.fetch_add(1, Ordering::Relaxed);
        (before.wrapping_add(1) & 0xff) as u16
    }

    pub(super) fn totals(&self) -> LaneTotals {
        let mut book = self.book.lock();
        book.settle();
        let mut totals = book.gone;
        for lane in &book.live {
            totals.add(lane);
        }
        totals
    }
}

impl LaneBook {
    /// Closes the accounts of lanes that are gone.
    fn settle(&mut self) {
        let Self { live, gone } = self;
        live.retain(|lane| {
            let is_gone = lane.retired.load(Ordering::Acquire);
            if is_gone {
                gone.add(lane);
            }
            !is_gone
        });
    }
}

/// A thread that waits by handle.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    link: &'a KernelLink,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.link.waiters.fetch_sub(1, Ordering::Relaxed);
    }
}

impl KernelLink {
    /// Whether nobody is told of its replies.
    pub(super) fn is_silent(&self) -> bool {
        self.longest_sleep != Duration::MAX
    }

    /// A wait of a caller, to be used for `timeout` at most.
    #[inline]
    pub(super) fn waiter(&self, timeout: Duration) -> Waiter {
        Waiter::new(self.host_wait, timeout).sleeping_at_most(self.longest_sleep)
    }

    /// Counts requests just published to a block, and wakes it if it may sleep.
    #[inline]
    pub(super) fn sent(&self, block: usize, count: u32) {
        self.accepted[block].add(count.into());
        if self.needs_wake {
            self.signals.work[block].notify_if_armed();
        }
        self.signals.request_written();
    }

    /// Counts a reply that has reached its caller.
    #[inline]
    pub(super) fn count_delivered(&self) {
        self.delivered.add(1);
    }

    /// Counts a reply that another thread took out of the ring for a call, and that the call has read.
    pub(super) fn count_handed_over(&self) {
        self.handed_over.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives up a reply that another thread took out of the ring for a call, and that the call could not use.
    #[cold]
    pub(super) fn give_handed_over_up(
        &self,
        reason: DeadLetterReason,
        header: &MessageHeader,
        payload: &[u8],
    ) {
        self.signals
            .dead_letters
            .reply(reason, &self.lost(header, None, payload));
    }

    /// What is to be said of a message that is given up.
    pub(super) fn lost<'a>(
        &self,
        header: &MessageHeader,
        extension: Option<Extension>,
        payload: &'a [u8],
    ) -> Lost<'a> {
        Lost {
            block: None,
            header: Some(*header),
            extension,
            type_id: self.types.type_of(header.kind()),
            payload,
        }
    }

    /// Notes that the calling thread waits by handle, as long as the result lives.
    pub(super) fn waiting(&self) -> Waiting<'_> {
        self.waiters.fetch_add(1, Ordering::Relaxed);
        Waiting { link: self }
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
        // The caller holds a side of the kernel: the block that ends, or the control plane, logs
        // it.
        self.signals.fail_silently(KernelFailure {
            reason: FailureReason::CorruptRing,
            message: what.to_owned(),
            block: u32::try_from(block).ok(),
            request: None,
        });
    }

    pub(super) fn state(&self) -> KernelState {
        self.signals.gate.state()
    }

    /// Accepted and processed requests of one block, given what the block says that it has consumed.
    pub(super) fn progress(&self, accepted: &Counter, processed: u32) -> (u64, u64) {
        progress(accepted, processed, self.capacity)
    }

    /// Requests accepted so far, and those of them that blocks are done with.
    pub(super) fn request_counts(&self) -> (u64, u64) {
        self.blocks
            .iter()
            .zip(&*self.accepted)
            .map(|(block, accepted)| {
                // In this order, so that what is processed has been accepted.
                let processed = block.control().processed();
                self.progress(accepted, processed)
            })
            .fold((0, 0), |sum, counts| (sum.0 + counts.0, sum.1 + counts.1))
    }

    /// Requests that are queued, in lanes too, or in a handler's hands.
    pub(super) fn queue_depth(&self) -> u64 {
        // Lanes first: what leaves one meanwhile is counted twice rather than not at all.
        let backlog = self.lanes.totals().backlog;
        let (accepted, processed) = self.request_counts();
        backlog + accepted - processed
    }

    /// Accounts of the replies, as of now.
    pub(super) fn reply_tally(&self) -> MessageTally {
        let dead_lettered = self.signals.dead_letters.counts().replies();
        let delivered = self.delivered.get()
            + self.handed_over.load(Ordering::Relaxed)
            + self.lanes.totals().delivered
            + self.pipes.delivered();
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
}

impl Awaited for KernelLink {
    fn needs_core(&self) -> bool {
        let spins_by_permit = match self.wait {
            KernelWait::Spin => true,
            KernelWait::Auto => self.signals.spinning.load(Ordering::Relaxed) > 0,
            KernelWait::SpinYield | KernelWait::Park | KernelWait::Interval(_) => false,
        };
        self.is_on_threads && !spins_by_permit
    }

    fn is_on(&self, core: usize) -> bool {
        self.is_on_threads
            && self.signals.spinning.load(Ordering::Relaxed) > 0
            && self.cores.contains(&core)
    }

    fn progress(&self) -> Option<u64> {
        if !self.is_on_threads {
            return None;
        }
        let mut is_idle = true;
        let mut heartbeats = 0_u64;
        for (block, accepted) in self.blocks.iter().zip(&*self.accepted) {
            let control = block.control();
            is_idle &= accepted.latest() as u32 == control.processed();
            heartbeats += u64::from(control.heartbeat());
        }
        (!is_idle).then_some(heartbeats)
    }
}

/// Accepted and processed requests of a block with so many slots, given what the block says that it has consumed.
pub(super) fn progress(accepted: &Counter, processed: u32, capacity: u64) -> (u64, u64) {
    let accepted = accepted.get();
    // Blocks count modulo 2^32; the difference cannot truly exceed what a ring holds. Negative while a send that a
    // fast kernel has already handled is not yet counted.
    let depth = (accepted as u32).wrapping_sub(processed) as i32;
    let depth = u64::from(depth.max(0).cast_unsigned())
        .min(capacity)
        .min(accepted);
    (accepted, accepted - depth)
}
