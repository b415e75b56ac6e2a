//! Kernels that subscribe to topics: the bridge of the kernel's device makes the messages its requests, and may publish its replies.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::lane::{Fate, LaneShared, Took};
use super::options::SubscriberStats;
use super::publisher::PublisherLane;
use super::subscriber::SubscriberLane;
use crate::bridge::{Service, Station};
use crate::error::{MessageError, TrySendError};
use crate::kernel::{DeadLetterReason, KernelState};
use crate::message::{MessageHeader, RAW_KIND};
use crate::runtime::client_inbox::Wanted;
use crate::runtime::client_lane::ClientLane;
use crate::runtime::instance::KernelInstance;
use crate::runtime::link::KernelLink;
use crate::runtime::receive::Miss;
use crate::runtime::send::write_bytes;
use crate::thread::baton::Baton;

/// Messages that are moved each way at a time.
const PASS: u32 = 64;

/// What the bridge needs to move messages from a topic to a kernel.
struct Flow {
    messages: SubscriberLane,
    client: ClientLane,
    /// Kind that the topic's messages have for the kernel.
    kind: u16,
    /// Where the kernel's replies go, if anywhere.
    replies: Option<PublisherLane>,
}

/// The way from a topic to a kernel, and perhaps from there to another topic.
pub(crate) struct Pump {
    topic: String,
    pub(super) kernel: Arc<KernelInstance>,
    lane: Arc<LaneShared>,
    /// `None` once it has ended.
    flow: Baton<Option<Flow>>,
    /// Whether the kernel's replies are published.
    publishes: bool,
    /// Nobody wants it any more.
    cancelled: AtomicBool,
    has_ended: AtomicBool,
    published: AtomicU64,
    errors: AtomicU64,
    unpublished: AtomicU64,
}

impl fmt::Debug for Pump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pump")
            .field("topic", &self.topic)
            .field("kernel", &self.kernel)
            .finish_non_exhaustive()
    }
}

/// What became of an attempt to hand something on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Moved,
    /// There is none, or it cannot be moved before something else happens that rings for the bridge.
    Nothing,
    /// There is one, for which there is no room yet.
    HeldUp,
    /// The kernel has ended.
    Over,
}

impl Pump {
    pub(super) fn new(
        kernel: Arc<KernelInstance>,
        messages: SubscriberLane,
        client: ClientLane,
        kind: u16,
        replies: Option<PublisherLane>,
    ) -> Self {
        Self {
            topic: messages.topic.name.clone(),
            kernel,
            lane: Arc::clone(&messages.lane),
            publishes: replies.is_some(),
            flow: Baton::new(Some(Flow {
                messages,
                client,
                kind,
                replies,
            })),
            cancelled: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
            published: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            unpublished: AtomicU64::new(0),
        }
    }

    /// Whether everything that it can move has been moved. Takes the flow for it; false if the bridge has that.
    pub(super) fn is_settled(&self) -> bool {
        let Some(mut flow) = self.flow.try_take() else {
            return false;
        };
        let Some(flow) = &mut *flow else {
            return true;
        };
        self.kernel.state() != KernelState::Active
            || !(self.lane.may_have_message() || (self.publishes && self.owes_replies(flow)))
    }

    /// Whether replies may come.
    fn owes_replies(&self, flow: &mut Flow) -> bool {
        // In this order: what the kernel is done with it has replied to.
        self.kernel.state() == KernelState::Active && self.kernel.queue_depth() > 0
            || flow.client.may_have_reply()
    }

    /// Publishes the next reply, or drops it if nobody wants it.
    fn reply(&self, flow: &mut Flow) -> Step {
        let Flow {
            client, replies, ..
        } = flow;
        if replies.as_mut().is_some_and(|replies| !replies.has_room()) {
            return Step::HeldUp;
        }
        let publish = |_: &KernelLink, header: &MessageHeader, payload: &[u8]| {
            if header.is_error() {
                self.errors.fetch_add(1, Ordering::Relaxed);
            } else if let Some(replies) = replies.as_mut() {
                return self.publish(replies, header, payload);
            }
            Ok(())
        };
        match client.find(Wanted::ANY_OF_USE, 1, publish) {
            Ok(_) => Step::Moved,
            Err(Miss::Empty | Miss::Busy) => Step::Nothing,
            Err(Miss::Unavailable(_)) => Step::Over,
        }
    }

    /// What the topic cannot take is of no use to the client, and goes to the kernel's dead
    /// letters.
    fn publish(
        &self,
        replies: &mut PublisherLane,
        header: &MessageHeader,
        payload: &[u8],
    ) -> Result<(), MessageError> {
        let type_id = self.kernel.types.type_id_of(header.kind());
        let is_published = type_id == Some(replies.topic.shape.type_id)
            // There is room for it to be left at least; but it may be too large, or the topic closed.
            && replies.publish(payload).is_ok();
        if is_published {
            self.published.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        self.unpublished.fetch_add(1, Ordering::Relaxed);
        Err(MessageError::TypeMismatch {
            expected: replies.topic.shape.type_id,
            found: type_id.unwrap_or(0),
        })
    }

    /// Makes the next message a request.
    fn request(&self, flow: &mut Flow) -> Step {
        let Flow {
            messages,
            client,
            kind,
            ..
        } = flow;
        // Before the message is taken: while the kernel takes none, it waits in its lane and may be dropped there.
        if let Err(unavailable) = self.kernel.signals.gate.check_send() {
            return match unavailable {
                _ if !self.kernel.signals.gate.is_open() => Step::Over,
                _ => Step::Nothing,
            };
        }
        let address = client.address(*kind);
        let letters = &messages.topic.signals.letters;
        let took = messages.lane.take(letters, 1, |payload| {
            match client.try_send(&address, |body| write_bytes(payload, body)) {
                Ok(()) => (Step::Moved, Fate::Delivered),
                Err(TrySendError::Full | TrySendError::Busy) => (Step::HeldUp, Fate::Kept),
                // Neither type nor size can be wrong: both were looked at before.
                Err(TrySendError::Rejected(_)) => {
                    (Step::Moved, Fate::Lost(DeadLetterReason::Corrupt))
                }
                // Looked at again the next time.
                Err(TrySendError::Unavailable(_)) => (Step::HeldUp, Fate::Kept),
            }
        });
        match took {
            Took::Message(step) => step,
            Took::Busy => Step::HeldUp,
            Took::Empty => Step::Nothing,
        }
    }

    /// Moves up to `PASS` messages each way.
    fn carry(&self, flow: &mut Flow) -> (Service, bool) {
        let mut service = Service::IDLE;
        let mut is_over = false;
        // Replies that are to be published do not wait for the next message; nor does a device say anything of them. Looked at before they
        // are: what is owed then is found, or comes.
        let is_silent = self.kernel.longest_sleep != Duration::MAX;
        let owes = (self.publishes || is_silent) && self.owes_replies(flow);
        for way in [Self::reply, Self::request] {
            for _ in 0..PASS {
                match way(self, flow) {
                    Step::Moved => {
                        service.moved += 1;
                        continue;
                    }
                    Step::Nothing => {}
                    Step::HeldUp => service.is_waiting = true,
                    Step::Over => is_over = true,
                }
                break;
            }
        }
        service.is_waiting |= owes;
        (service, is_over)
    }
}

impl Station for Pump {
    fn serve(&self) -> Service {
        let Some(mut flow) = self.flow.try_take() else {
            return Service::CONTENDED;
        };
        let Some(held) = &mut *flow else {
            return Service::DONE;
        };
        let (service, is_over) = if self.cancelled.load(Ordering::Acquire) {
            (Service::IDLE, true)
        } else {
            self.carry(held)
        };
        if !is_over {
            return service;
        }
        let ended = flow.take();
        self.has_ended.store(true, Ordering::Release);
        drop(flow);
        drop(ended);
        Service::DONE
    }

    fn is_ready(&self) -> bool {
        if self.cancelled.load(Ordering::Acquire) || !self.kernel.signals.gate.is_open() {
            return true;
        }
        self.kernel.signals.gate.check_send().is_ok() && self.lane.may_have_message()
    }

    fn sample(&self, _now_ns: u64) {
        // The kernel's hub does so.
    }
}

/// What a kernel's subscription has carried so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelSubscriptionStats {
    /// Messages of the topic.
    pub messages: SubscriberStats,
    /// Replies that were published.
    pub published: u64,
    /// Replies that the other topic could not take: of another type, too large, or after its end. They are among the dead letters.
    pub unpublished: u64,
    /// Errors of the handler, which are not published.
    pub errors: u64,
}

/// A kernel's subscription to a topic; made by
/// [`RingKernelRuntime::subscribe_kernel`](crate::RingKernelRuntime::subscribe_kernel). It ends when this is dropped, and when the kernel ends.
#[derive(Debug)]
pub struct KernelSubscription {
    pump: Arc<Pump>,
}

impl KernelSubscription {
    pub(super) fn new(pump: Arc<Pump>) -> Self {
        Self { pump }
    }

    /// Name of the topic.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.pump.topic
    }

    /// Name of the kernel.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.pump.kernel.signals.name
    }

    /// Whether the kernel gets messages, or will once it is active.
    #[must_use]
    pub fn is_live(&self) -> bool {
        !self.pump.has_ended.load(Ordering::Acquire) && self.pump.kernel.signals.gate.is_open()
    }

    /// What it has carried so far.
    #[must_use]
    pub fn stats(&self) -> KernelSubscriptionStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        KernelSubscriptionStats {
            messages: self.pump.lane.stats(),
            published: of(&self.pump.published),
            unpublished: of(&self.pump.unpublished),
            errors: of(&self.pump.errors),
        }
    }
}

impl Drop for KernelSubscription {
    /// The bridge ends it; what waits in its lane then goes to the dead letters.
    fn drop(&mut self) {
        if self.pump.kernel.has_forked_since() {
            return;
        }
        self.pump.cancelled.store(true, Ordering::Release);
        self.pump.kernel.bridge.attention.bell.notify();
    }
}

/// Kind that messages of a topic have for a kernel.
pub(super) fn kind_for(kernel: &KernelInstance, type_id: u64) -> Option<u16> {
    match type_id {
        0 => Some(RAW_KIND),
        type_id => kernel.types.kind_of(type_id).ok(),
    }
}
