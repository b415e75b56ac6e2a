//! Publishing.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::core::{PublisherShared, TopicShared};
use super::options::PublisherStats;
use crate::backend::{Account, Booked, HostProducer};
use crate::error::{Error, Rejection, SendTimeoutError, TrySendError};
use crate::message::{AlignedBytes, MessageEncoder, RingMessage};
use crate::runtime::receive::Bytes;
use crate::runtime::send::{refused, write_bytes, write_message};
use crate::thread::{AnyThread, Waiter};

/// Between two attempts to publish while another publisher stands still: most of the time it gets the core within one turn of the scheduler.
const NAP: Duration = Duration::from_micros(20);

/// A publisher but for the type of its messages.
#[derive(Debug)]
pub(super) struct PublisherLane {
    pub(super) topic: Arc<TopicShared>,
    outbox: HostProducer,
    shared: Arc<PublisherShared>,
    /// Whether it publishes what a kernel replies.
    by_kernel: bool,
}

impl PublisherLane {
    pub(super) fn new(topic: Arc<TopicShared>, by_kernel: bool) -> Result<Self, Error> {
        let (outbox, shared) = topic.add_publisher()?;
        Ok(Self {
            topic,
            outbox,
            shared,
            by_kernel,
        })
    }

    /// Gives a message to all subscribers, or to the publisher that is just at it.
    #[inline]
    pub(super) fn publish(&mut self, payload: &[u8]) -> Result<(), TrySendError> {
        let max = self.topic.shape.message_size;
        if payload.len() > max {
            return Err(Rejection::TooLarge { max }.into());
        }
        let by_kernel = self.by_kernel;
        // With the topic in hand first what lies in outboxes is published, in this one's too.
        let published = self
            .topic
            .core
            .try_with(|core| core.publish(payload, by_kernel));
        if let Some(published) = published {
            published?;
            self.shared.published.add(1);
            return Ok(());
        }
        self.leave(payload)
    }

    /// Leaves a message to the publisher that is just at it.
    #[cold]
    fn leave(&mut self, payload: &[u8]) -> Result<(), TrySendError> {
        self.shared.announce();
        let left = self.put_into_outbox(payload);
        self.shared.left();
        if !matches!(
            left,
            Err(TrySendError::Unavailable(_) | TrySendError::Rejected(_))
        ) {
            // Also if there was no room: no other thread may look later.
            self.topic.core.leave();
        }
        left
    }

    fn put_into_outbox(&mut self, payload: &[u8]) -> Result<(), TrySendError> {
        self.topic.signals.check_publish(self.by_kernel)?;
        let head = self.topic.signals.letters.head();
        let Ok(mut slot) = self.outbox.reserve_head(head, None) else {
            self.shared.busy.add(1);
            return Err(TrySendError::Busy);
        };
        let length = write_bytes(payload, slot.body_mut())?;
        slot.commit(length).map_err(refused)?;
        self.shared.handed_over.add(1);
        Ok(())
    }

    /// Whether one more message can be left to another publisher at least.
    pub(super) fn has_room(&mut self) -> bool {
        self.outbox.free_slots(1) > 0
    }

    pub(super) fn stats(&self) -> PublisherStats {
        self.shared.stats()
    }

    fn publish_until(&mut self, payload: &[u8], timeout: Duration) -> Result<(), SendTimeoutError> {
        let mut waiter = Waiter::new(self.topic.host_wait, timeout);
        let mut last = false;
        loop {
            match self.publish(payload) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Unavailable(unavailable)) => return Err(unavailable.into()),
                Err(TrySendError::Rejected(rejection)) => return Err(rejection.into()),
                Err(TrySendError::Full | TrySendError::Busy) if last => {
                    return Err(SendTimeoutError::Timeout);
                }
                Err(TrySendError::Full | TrySendError::Busy) => {
                    last = !waiter.pause_or_nap(&AnyThread, NAP)
                }
            }
        }
    }
}

impl Drop for PublisherLane {
    /// What was published reaches the subscribers all the same.
    fn drop(&mut self) {
        if self.topic.has_forked_since() {
            return;
        }
        self.shared.closed.store(true, Ordering::Release);
        self.topic.core.leave();
    }
}

/// One of the publishers of a topic, for one thread. `Send`, but neither `Sync` nor `Clone`; made by [`Topic::publisher`](super::Topic::publisher).
///
/// Publishing copies the message into the lane of every subscriber. It never waits for a subscriber, allocates nothing, takes no lock, and
/// calls the system only to wake a subscriber that sleeps. Where several publishers share a topic, one of them does so at a time: who finds
/// another one at it leaves its message to that one, and goes on. Subscribers see all messages in the same order, and those of one publisher
/// in the order in which it published them.
///
/// ```
/// use std::time::Duration;
/// use ringkernel::{RingKernelRuntime, SubscriberOptions, TopicOptions};
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
/// struct Price { cents: u64 }
/// ringkernel::ring_message!(Price, "example.Price.v1");
///
/// let runtime = RingKernelRuntime::builder().build()?;
/// let prices = runtime.topic::<Price>("prices", TopicOptions::default())?;
/// let mut publisher = prices.publisher()?;
/// publisher.publish(&Price { cents: 100 })?;
/// // Comes late, and gets the last value all the same.
/// let mut subscriber = prices.subscribe(SubscriberOptions::default())?;
/// publisher.publish(&Price { cents: 101 })?;
/// assert_eq!(subscriber.recv_timeout(Duration::from_secs(1))?, Price { cents: 100 });
/// assert_eq!(subscriber.recv_timeout(Duration::from_secs(1))?, Price { cents: 101 });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Two threads that use one cannot be written:
/// ```compile_fail,E0277
/// use ringkernel::{Bytes, Publisher};
/// fn share(publisher: &'static Publisher<Bytes>) { std::thread::spawn(move || println!("{publisher:?}")); }
/// ```
/// Nor can two of one outbox:
/// ```compile_fail,E0599
/// use ringkernel::{Bytes, Publisher};
/// fn copy(publisher: Publisher<Bytes>) -> [Publisher<Bytes>; 2] { [publisher.clone(), publisher] }
/// ```
pub struct Publisher<M> {
    lane: PublisherLane,
    /// Where messages are archived.
    archive: Booked<AlignedBytes>,
    encoder: MessageEncoder,
    messages: PhantomData<fn(M)>,
}

impl<M> fmt::Debug for Publisher<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher")
            .field("topic", &self.lane.topic.name)
            .finish_non_exhaustive()
    }
}

impl<M> Publisher<M> {
    pub(super) fn new(lane: PublisherLane) -> Result<Self, Error> {
        let bytes = match lane.topic.shape.type_id {
            0 => 0,
            _ => lane.topic.shape.message_size,
        };
        let account = Arc::<Account>::clone(lane.topic.pool.account());
        let encoder = MessageEncoder::for_slots_of(bytes, account);
        Ok(Self {
            archive: lane.topic.pool.payload(bytes)?,
            lane,
            encoder,
            messages: PhantomData,
        })
    }

    /// Name of the topic.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.lane.topic.name
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> PublisherStats {
        self.lane.stats()
    }
}

impl Publisher<Bytes> {
    /// Publishes raw bytes. Does not wait: wait-free for the only publisher of a topic, lock-free for one of several, which may have to
    /// publish what the others leave to it. Neither allocates, locks nor (unless a subscriber sleeps) calls the system.
    ///
    /// # Errors
    /// [`TrySendError::Rejected`] if they exceed the topic's `message_size`; [`TrySendError::Busy`] if another publisher, or a subscriber that
    /// comes, stands still with the topic in hand, and this one has left 64 messages to it already; [`TrySendError::Unavailable`] once the runtime drains
    /// (`Draining`) or has shut down (`Closed`). Nothing has been published then.
    #[inline]
    pub fn publish_bytes(&mut self, payload: &[u8]) -> Result<(), TrySendError> {
        self.lane.publish(payload)
    }

    /// As [`publish_bytes`](Self::publish_bytes), waiting for `timeout` at most while another publisher stands still. It never waits for a
    /// subscriber.
    ///
    /// # Errors
    /// [`SendTimeoutError`], but never `Full`; nothing has been published then.
    #[inline]
    pub fn publish_bytes_timeout(
        &mut self,
        payload: &[u8],
        timeout: Duration,
    ) -> Result<(), SendTimeoutError> {
        self.lane.publish_until(payload, timeout)
    }
}

impl<M: RingMessage> Publisher<M> {
    /// Publishes a message. Does not wait: wait-free for the only publisher of a topic, lock-free for one of several, which may have to
    /// publish what the others leave to it. Neither allocates, locks nor (unless a subscriber sleeps) calls the system.
    ///
    /// # Errors
    /// [`TrySendError::Rejected`] if it exceeds the topic's `message_size`; [`TrySendError::Busy`] if another publisher, or a subscriber that
    /// comes, stands still with the topic in hand, and this one has left 64 messages to it already; [`TrySendError::Unavailable`] once the runtime drains
    /// (`Draining`) or has shut down (`Closed`). Nothing has been published then.
    #[inline]
    pub fn publish(&mut self, message: &M) -> Result<(), TrySendError> {
        let length = self.encode(message)?;
        self.lane.publish(&self.archive[..length])
    }

    /// As [`publish`](Self::publish), waiting for `timeout` at most while another publisher stands still. It never waits for a subscriber.
    ///
    /// # Errors
    /// [`SendTimeoutError`], but never `Full`; nothing has been published then.
    #[inline]
    pub fn publish_timeout(
        &mut self,
        message: &M,
        timeout: Duration,
    ) -> Result<(), SendTimeoutError> {
        let length = self.encode(message)?;
        self.lane.publish_until(&self.archive[..length], timeout)
    }

    /// Archives a message before the topic is in hand: whatever the type does to be archived, nobody waits for it.
    #[inline]
    fn encode(&mut self, message: &M) -> Result<usize, Rejection> {
        let max = self.lane.topic.shape.message_size;
        let length = match write_message(&mut self.encoder, message, &mut self.archive) {
            Err(Rejection::TooLarge { .. }) => Err(Rejection::TooLarge { max }),
            other => other,
        }?;
        if length > max {
            return Err(Rejection::TooLarge { max });
        }
        Ok(length)
    }
}
