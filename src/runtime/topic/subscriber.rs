//! Receiving what was published.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::core::TopicShared;
use super::lane::{Fate, LanePlan, LaneShared, Took};
use super::options::{SubscriberOptions, SubscriberStats};
use crate::error::{Error, MessageError, RecvTimeoutError, TryRecvError, Unavailable};
use crate::kernel::DeadLetterReason;
use crate::message::RingMessage;
use crate::runtime::receive::copy_payload;
use crate::thread::event_count::EventCount;
use crate::thread::{AnyThread, WaitStrategy, Waiter};

/// A subscriber but for the type of its messages.
#[derive(Debug)]
pub(super) struct SubscriberLane {
    pub(super) topic: Arc<TopicShared>,
    pub(super) lane: Arc<LaneShared>,
    wait: WaitStrategy,
}

impl SubscriberLane {
    /// `event` wakes who reads from it.
    pub(super) fn new(
        topic: Arc<TopicShared>,
        options: &SubscriberOptions,
        event: Arc<EventCount>,
        wait: WaitStrategy,
    ) -> Result<Self, Error> {
        let plan = LanePlan {
            capacity: options.checked_capacity()?,
            overflow: options.overflow,
            message_size: topic.shape.message_size,
            event,
            parks: wait.may_park(),
        };
        let lane = match plan.build(&topic.pool) {
            // Of subscribers that have gone there may be some.
            Err(Error::OutOfMemory { .. }) => {
                topic.free_retired()?;
                plan.build(&topic.pool)?
            }
            built => built?,
        };
        let lane = topic.add_lane(lane, options.retained)?;
        Ok(Self { topic, lane, wait })
    }

    /// A message that is there, handed to `read`.
    #[inline]
    fn find<R>(
        &self,
        polls: u32,
        read: &mut impl FnMut(&[u8]) -> Result<R, MessageError>,
    ) -> Result<Result<R, MessageError>, TryRecvError> {
        // Looked at before the lane: what was published until then is found below.
        let state = self.topic.signals.check_receive();
        let took = self
            .lane
            .take(&self.topic.signals.letters, polls, |payload| {
                let outcome = read(payload);
                let fate = match &outcome {
                    Ok(_) => Fate::Delivered,
                    Err(MessageError::BufferTooSmall { .. }) => Fate::Kept,
                    Err(_) => Fate::Lost(DeadLetterReason::Corrupt),
                };
                (outcome, fate)
            });
        match (took, state) {
            (Took::Message(outcome), _) => Ok(outcome),
            (Took::Busy, _) => Err(TryRecvError::Busy),
            (Took::Empty, Err(unavailable)) => Err(unavailable.into()),
            (Took::Empty, Ok(())) => Err(TryRecvError::Empty),
        }
    }

    /// Waits for a message, and hands it to `read`.
    #[inline]
    fn find_until<R>(
        &self,
        timeout: Duration,
        mut read: impl FnMut(&[u8]) -> Result<R, MessageError>,
    ) -> Result<R, RecvTimeoutError> {
        let mut waiter = Waiter::new(self.wait, timeout);
        let mut polls = 1;
        let mut last = false;
        loop {
            match self.find(polls, &mut read) {
                Ok(outcome) => return Ok(outcome?),
                Err(TryRecvError::Unavailable(unavailable)) => return Err(unavailable.into()),
                Err(TryRecvError::Message(error)) => return Err(error.into()),
                Err(TryRecvError::Empty | TryRecvError::Busy) if last => {
                    return Err(RecvTimeoutError::Timeout);
                }
                Err(TryRecvError::Busy) if self.wait != WaitStrategy::Spin => {
                    // The publisher may need this core to go on.
                    std::thread::yield_now();
                }
                Err(TryRecvError::Empty | TryRecvError::Busy) => {}
            }
            polls = waiter.polls();
            last = !waiter.pause(&AnyThread, &self.lane.event, || {
                self.topic.signals.check_receive().is_err() || self.lane.may_have_message()
            });
        }
    }
}

impl Drop for SubscriberLane {
    /// What it has not received goes to the dead letters.
    fn drop(&mut self) {
        if self.topic.has_forked_since() {
            return;
        }
        self.lane.closed.store(true, Ordering::Release);
        self.topic.core.leave();
    }
}

/// One of the subscribers of a topic, for one thread. `Send`, but neither `Sync` nor `Clone`; made by [`Topic::subscribe`](super::Topic::subscribe).
///
/// It has a lane of its own, so that no other subscriber, and no publisher, ever waits for it: when the lane is full something is lost, as
/// its [`SubscriberOptions::overflow`] says. Receiving allocates nothing, takes no lock, and calls the system only to sleep.
///
/// Once the runtime has shut down, and once the topic's publishers have all gone, it still gives what it has;
/// then it says [`Unavailable::Closed`] or [`Unavailable::NoPublisher`], at once even to who waits. The latter may change: a publisher may
/// come at any time. A subscriber of a topic that never had a publisher waits for one.
///
/// Two threads that use one cannot be written:
/// ```compile_fail,E0277
/// use ringkernel::{Bytes, Subscriber};
/// fn share(subscriber: &'static Subscriber<Bytes>) { std::thread::spawn(move || println!("{subscriber:?}")); }
/// ```
/// Nor can two of one lane:
/// ```compile_fail,E0599
/// use ringkernel::{Bytes, Subscriber};
/// fn copy(subscriber: Subscriber<Bytes>) -> [Subscriber<Bytes>; 2] { [subscriber.clone(), subscriber] }
/// ```
pub struct Subscriber<M> {
    lane: SubscriberLane,
    messages: PhantomData<fn() -> M>,
    /// One thread's at a time, as a publisher is.
    not_sync: PhantomData<Cell<()>>,
}

impl<M> fmt::Debug for Subscriber<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscriber")
            .field("topic", &self.lane.topic.name)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl<M> Subscriber<M> {
    pub(super) fn new(lane: SubscriberLane) -> Self {
        Self {
            lane,
            messages: PhantomData,
            not_sync: PhantomData,
        }
    }

    /// Name of the topic.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.lane.topic.name
    }

    /// What has come to it so far.
    #[must_use]
    pub fn stats(&self) -> SubscriberStats {
        self.lane.lane.stats()
    }

    /// Whether the topic will give nothing any more but what waits here already; see the type.
    ///
    /// # Errors
    /// [`Unavailable::Closed`], [`Unavailable::NoPublisher`].
    pub fn check(&self) -> Result<(), Unavailable> {
        self.lane.topic.signals.check_receive()
    }

    /// Receives a message as the bytes that were published (of a typed topic, the archive), if one is waiting, and returns its length. Does
    /// not wait.
    ///
    /// # Errors
    /// [`TryRecvError::Empty`]; [`TryRecvError::Busy`] while a publisher drops the oldest message of a full lane, which takes it as long as
    /// to copy it; [`TryRecvError::Unavailable`]; [`TryRecvError::Message`] if `buffer` is too small: the message stays where it is.
    #[inline]
    pub fn try_recv_bytes(&mut self, buffer: &mut [u8]) -> Result<usize, TryRecvError> {
        let mut read = |payload: &[u8]| copy_payload(payload, buffer);
        Ok(self.lane.find(1, &mut read)??)
    }

    /// As [`try_recv_bytes`](Self::try_recv_bytes), waiting for `timeout` at most.
    ///
    /// # Errors
    /// [`RecvTimeoutError`]. A message that `buffer` is too small for stays where it is.
    #[inline]
    pub fn recv_bytes_timeout(
        &mut self,
        buffer: &mut [u8],
        timeout: Duration,
    ) -> Result<usize, RecvTimeoutError> {
        self.lane
            .find_until(timeout, |payload| copy_payload(payload, buffer))
    }
}

impl<M: RingMessage> Subscriber<M> {
    /// Receives a message, if one is waiting. Does not wait; allocates only if the type does.
    ///
    /// # Errors
    /// [`TryRecvError::Empty`]; [`TryRecvError::Busy`] while a publisher drops the oldest message of a full lane, which takes it as long as
    /// to copy it; [`TryRecvError::Unavailable`]; [`TryRecvError::Message`] if it is no valid archive: then it is lost.
    #[inline]
    pub fn try_recv(&mut self) -> Result<M, TryRecvError> {
        Ok(self.lane.find(1, &mut decode::<M>)??)
    }

    /// Receives a message, waiting for `timeout` at most. One that comes before the deadline is never missed, unless a publisher stands still
    /// then in the middle of dropping the oldest message of a full lane.
    ///
    /// # Errors
    /// [`RecvTimeoutError`].
    #[inline]
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<M, RecvTimeoutError> {
        self.lane.find_until(timeout, decode::<M>)
    }

    /// Receives a message, waiting for `RuntimeConfig::default_timeout` at most.
    ///
    /// # Errors
    /// As [`recv_timeout`](Self::recv_timeout).
    #[inline]
    pub fn recv(&mut self) -> Result<M, RecvTimeoutError> {
        self.recv_timeout(self.lane.topic.default_timeout)
    }
}

#[inline]
fn decode<M: RingMessage>(payload: &[u8]) -> Result<M, MessageError> {
    M::decode(payload).map_err(|_| MessageError::Corrupt)
}
