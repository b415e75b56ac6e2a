//! Where the publishers of a topic and the lanes of its subscribers meet.
//!
//! One thread at a time puts messages into all lanes. A publisher that finds another one at it leaves its message in a ring of its own, its
//! outbox, and whoever is at it takes it from there ([`Errands`]). So all subscribers see all messages in one order, in which those of one
//! publisher keep theirs; and the retained value, which is written in the same turn, is exactly the last of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::time::Duration;

use super::lane::{LaneIn, LaneShared, Letters};
use super::options::{
    MAX_PUBLISHERS, MAX_SUBSCRIBERS, PublisherStats, SubscriberStats, TopicStats,
};
use crate::backend::{HostConsumer, HostPool, HostProducer, host_ring};
use crate::bridge::{Letter, Tally};
use crate::error::{Error, Unavailable};
use crate::kernel::DeadLetterReason;
use crate::process::{self, InChild};
use crate::ring::{Peek, RingLayout};
use crate::runtime::config::RuntimeConfig;
use crate::thread::WaitStrategy;
use crate::thread::errands::{Errand, Errands};
use crate::time::Deadline;

/// Messages that a publisher may leave to another one: what that one can put into some lanes in a few turns of the scheduler would be more,
/// but it would have to do all of it at once.
const OUTBOX_SLOTS: usize = 64;

/// Between two attempts of the control plane to have the topic: whoever has it copies a few messages.
const NAP: Duration = Duration::from_micros(20);

const OPEN: u32 = 0;
const DRAINING: u32 = 1;
const CLOSED: u32 = 2;
/// In the child of a fork.
const FORKED: u32 = 3;

/// What a topic is opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// 0 for raw bytes.
    pub(super) type_id: u64,
    pub(super) type_name: &'static str,
    /// Bytes of the largest payload.
    pub(super) message_size: usize,
    pub(super) retain: bool,
}

/// What everybody sees of a topic.
#[derive(Debug)]
pub(crate) struct TopicShared {
    pub(super) name: String,
    pub(super) shape: Shape,
    pub(super) signals: Arc<Signals>,
    pub(super) core: Errands<Core>,
    /// Where the memory of lanes is taken from.
    pub(super) pool: HostPool,
    pub(super) host_wait: WaitStrategy,
    pub(super) default_timeout: Duration,
    pub(super) termination_timeout: Duration,
}

/// What changes of it, outside of the lanes.
#[derive(Debug)]
pub(super) struct Signals {
    state: AtomicU32,
    publishers: AtomicU32,
    /// Whether there ever was a publisher.
    had_publisher: AtomicBool,
    pub(super) letters: Letters,
}

impl Signals {
    /// Whether anything can be published.
    #[inline]
    pub(super) fn check_publish(&self, by_kernel: bool) -> Result<(), Unavailable> {
        match self.state.load(Ordering::Acquire) {
            OPEN => Ok(()),
            DRAINING if by_kernel => Ok(()),
            DRAINING => Err(Unavailable::Draining),
            FORKED => Err(Unavailable::Forked),
            _ => Err(Unavailable::Closed),
        }
    }

    /// Why no message will come, if so. To be looked at before a lane is.
    #[inline]
    pub(super) fn check_receive(&self) -> Result<(), Unavailable> {
        let state = self.state.load(Ordering::Acquire);
        if state >= CLOSED {
            return Err(match state {
                FORKED => Unavailable::Forked,
                _ => Unavailable::Closed,
            });
        }
        // In this order: one that comes now is counted before it is known that there ever was one.
        if self.had_publisher.load(Ordering::Acquire)
            && self.publishers.load(Ordering::Acquire) == 0
        {
            return Err(Unavailable::NoPublisher);
        }
        Ok(())
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.load(Ordering::Acquire) >= CLOSED
    }
}

/// What both ends of an outbox see.
#[derive(Debug, Default)]
pub(super) struct PublisherShared {
    /// The publisher is gone.
    pub(super) closed: AtomicBool,
    /// The publisher is just putting a message into its outbox, or about to look whether it may.
    leaving: AtomicBool,
    /// Messages put into lanes by itself.
    pub(super) published: Tally,
    /// Messages left in the outbox.
    pub(super) handed_over: Tally,
    pub(super) busy: Tally,
}

impl PublisherShared {
    /// Announces that a message may be put into the outbox, until [`left`](Self::left). What the
    /// caller looks at after this was not changed by a topic that closes without waiting for it.
    pub(super) fn announce(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        // ORDERING: leaving. Either the topic that closes sees the announcement, or the publisher
        // sees that it is closed.
        fence(Ordering::SeqCst);
    }

    pub(super) fn left(&self) {
        // ORDERING: leaving. A thread that sees this finds the message in the outbox.
        self.leaving.store(false, Ordering::Release);
    }

    pub(super) fn stats(&self) -> PublisherStats {
        let handed_over = self.handed_over.get();
        PublisherStats {
            published: self.published.get() + handed_over,
            handed_over,
            busy: self.busy.get(),
        }
    }
}

/// A publisher's messages, as whoever publishes finds them.
#[derive(Debug)]
struct Outbox {
    messages: HostConsumer,
    shared: Arc<PublisherShared>,
}

/// What is known of a topic by whoever publishes.
#[derive(Debug)]
pub(super) struct Core {
    lanes: Lanes,
    outboxes: Vec<Outbox>,
}

#[derive(Debug)]
struct Lanes {
    signals: Arc<Signals>,
    retain: bool,
    lanes: Vec<LaneIn>,
    /// Those of subscribers that have gone; their memory is given back when the next one comes, not by who publishes.
    retired: Vec<LaneIn>,
    last: Letter,
    has_last: bool,
    published: u64,
    gone: SubscriberStats,
}

impl Lanes {
    /// Puts a message into all lanes.
    #[inline]
    fn publish(&mut self, payload: &[u8]) {
        self.published += 1;
        if self.retain
            && let Some(body) = self.last.body_mut().get_mut(..payload.len())
        {
            body.copy_from_slice(payload);
            self.last.length = payload.len();
            self.has_last = true;
        }
        for lane in &mut self.lanes {
            lane.put(&self.signals.letters, payload);
        }
    }

    /// Takes out the lanes of subscribers that have gone.
    fn sweep(&mut self) {
        let mut index = 0;
        while let Some(lane) = self.lanes.get(index) {
            if !lane.shared.closed.load(Ordering::Acquire) {
                index += 1;
                continue;
            }
            // In order: messages go to lanes in the order in which their subscribers came.
            let lane = self.lanes.remove(index);
            // Before it is counted: a message that gives way to a newer one is lost, not left.
            lane.give_up(&self.signals.letters);
            let stats = lane.shared.stats();
            self.gone.published += stats.published;
            self.gone.delivered += stats.delivered;
            self.gone.dropped += stats.dropped;
            self.gone.queued += stats.queued;
            self.retired.push(lane);
        }
    }

    fn wake_all(&self) {
        for lane in &self.lanes {
            lane.shared.event.notify();
        }
    }
}

impl Core {
    /// Puts a message into all lanes, unless the topic takes none any more. What kernels publish it takes while it drains, too.
    #[inline]
    pub(super) fn publish(&mut self, payload: &[u8], by_kernel: bool) -> Result<(), Unavailable> {
        self.lanes.signals.check_publish(by_kernel)?;
        self.lanes.publish(payload);
        Ok(())
    }

    fn forget_publishers(&mut self) {
        let before = self.outboxes.len();
        // In this order: what it left was left before it went.
        self.outboxes.retain_mut(|outbox| {
            let is_gone = outbox.shared.closed.load(Ordering::Acquire);
            !(is_gone && matches!(outbox.messages.peek(), Peek::Empty))
        });
        let gone = before - self.outboxes.len();
        if gone > 0 {
            let signals = &self.lanes.signals;
            signals.publishers.fetch_sub(gone as u32, Ordering::Release);
            self.lanes.wake_all();
        }
    }

    /// Nothing is published from now on. What publishers were told is taken reaches the lanes
    /// before.
    fn close(&mut self, deadline: Deadline) {
        self.lanes.signals.state.fetch_max(CLOSED, Ordering::SeqCst);
        // ORDERING: leaving. See `PublisherShared::announce`.
        fence(Ordering::SeqCst);
        for outbox in &mut self.outboxes {
            while outbox.shared.leaving.load(Ordering::Acquire) && !deadline.has_passed() {
                std::thread::yield_now();
            }
            while let Peek::Ready = outbox.messages.peek() {
                self.lanes.publish(outbox.messages.payload());
                outbox.messages.release();
            }
        }
        self.lanes.wake_all();
    }
}

impl Errand for Core {
    /// Publishes what others left, and notices who has gone.
    fn run(&mut self) -> bool {
        let is_closed = self.lanes.signals.is_closed();
        let mut is_left = false;
        for outbox in &mut self.outboxes {
            let mut count = 0;
            while let Peek::Ready = outbox.messages.peek() {
                if count == OUTBOX_SLOTS {
                    is_left = true;
                    break;
                }
                count += 1;
                let payload = outbox.messages.payload();
                if is_closed {
                    // Of a publisher that stood still while the topic was closed, for longer than
                    // that waits.
                    let letters = &self.lanes.signals.letters;
                    letters.put(DeadLetterReason::Shutdown, payload);
                } else {
                    self.lanes.publish(payload);
                }
                outbox.messages.release();
            }
            outbox.messages.publish_progress();
        }
        self.lanes.sweep();
        self.forget_publishers();
        is_left
    }
}

impl TopicShared {
    /// A topic without subscribers and publishers.
    pub(super) fn new(
        name: &str,
        shape: Shape,
        letters: Letters,
        pool: HostPool,
        config: &RuntimeConfig,
    ) -> Result<Self, Error> {
        let signals = Arc::new(Signals {
            state: AtomicU32::new(OPEN),
            publishers: AtomicU32::new(0),
            had_publisher: AtomicBool::new(false),
            letters,
        });
        // A topic that retains nothing needs no room for it.
        let retained = if shape.retain { shape.message_size } else { 0 };
        Ok(Self {
            core: Errands::new(Core {
                lanes: Lanes {
                    signals: Arc::clone(&signals),
                    retain: shape.retain,
                    lanes: Vec::with_capacity(MAX_SUBSCRIBERS),
                    retired: Vec::with_capacity(MAX_SUBSCRIBERS),
                    last: Letter::new(&pool, retained)?,
                    has_last: false,
                    published: 0,
                    gone: SubscriberStats::default(),
                },
                outboxes: Vec::with_capacity(MAX_PUBLISHERS),
            }),
            name: name.to_owned(),
            shape,
            signals,
            pool,
            host_wait: config.host_wait,
            default_timeout: config.default_timeout,
            termination_timeout: config.termination_timeout,
        })
    }

    /// Whether this process is the child of a fork, and the topic stays with its parent.
    pub(super) fn has_forked_since(&self) -> bool {
        process::look();
        self.signals.state.load(Ordering::Relaxed) == FORKED
    }

    /// The core in hand, for the control plane.
    fn with<R>(&self, mut act: impl FnMut(&mut Core) -> R) -> Result<R, Error> {
        if self.has_forked_since() {
            return Err(Error::Forked {
                operation: "use a topic",
            });
        }
        let deadline = Deadline::after(self.termination_timeout);
        loop {
            if let Some(result) = self.core.try_with(&mut act) {
                return Ok(result);
            }
            if deadline.has_passed() {
                return Err(Error::TopicBusy {
                    topic: self.name.clone(),
                    after: self.termination_timeout,
                });
            }
            std::thread::sleep(NAP);
        }
    }

    fn full(&self, what: &'static str, max: usize) -> Error {
        Error::TopicFull {
            topic: self.name.clone(),
            what,
            max,
        }
    }

    fn closed(&self) -> Error {
        Error::InvalidLifecycle {
            state: "Stopped",
            operation: "use a topic",
        }
    }

    /// Adds a lane: it gets the retained value, if it wants it, and everything that is published after that.
    pub(super) fn add_lane(&self, lane: LaneIn, retained: bool) -> Result<Arc<LaneShared>, Error> {
        let shared = Arc::clone(&lane.shared);
        let mut lane = Some(lane);
        // Freed once no thread holds the topic.
        let mut retired = Vec::with_capacity(MAX_SUBSCRIBERS);
        let added = self.with(|core| {
            let lanes = &mut core.lanes;
            lanes.sweep();
            retired.append(&mut lanes.retired);
            if lanes.signals.is_closed() {
                return Err(self.closed());
            }
            if lanes.lanes.len() == MAX_SUBSCRIBERS {
                return Err(self.full("subscribers", MAX_SUBSCRIBERS));
            }
            if let Some(mut lane) = lane.take() {
                if retained && lanes.has_last {
                    lane.put(&lanes.signals.letters, lanes.last.payload());
                }
                lanes.lanes.push(lane);
            }
            Ok(())
        });
        added?.map(|()| shared)
    }

    /// Gives the memory back that subscribers had which have gone.
    pub(super) fn free_retired(&self) -> Result<(), Error> {
        // Freed once no thread holds the topic.
        let mut retired = Vec::with_capacity(MAX_SUBSCRIBERS);
        self.with(|core| {
            core.lanes.sweep();
            retired.append(&mut core.lanes.retired);
        })
    }

    /// Adds a publisher.
    pub(super) fn add_publisher(&self) -> Result<(HostProducer, Arc<PublisherShared>), Error> {
        let layout = RingLayout::new(OUTBOX_SLOTS, self.shape.message_size, false);
        let layout = layout.map_err(|error| Error::InvalidOption {
            option: "message_size",
            reason: error.to_string(),
        })?;
        let (producer, messages) = host_ring(&self.pool, layout)?;
        let shared = Arc::new(PublisherShared::default());
        let mut outbox = Some(Outbox {
            messages,
            shared: Arc::clone(&shared),
        });
        let added = self.with(|core| {
            let signals = &core.lanes.signals;
            if signals.is_closed() {
                return Err(self.closed());
            }
            if core.outboxes.len() == MAX_PUBLISHERS {
                return Err(self.full("publishers", MAX_PUBLISHERS));
            }
            signals.publishers.fetch_add(1, Ordering::Release);
            signals.had_publisher.store(true, Ordering::Release);
            core.outboxes.extend(outbox.take());
            Ok(())
        });
        added?.map(|()| (producer, shared))
    }

    pub(super) fn stats(&self) -> Result<TopicStats, Error> {
        let mut subscribers = Vec::with_capacity(MAX_SUBSCRIBERS);
        let stats = self.with(|core| {
            let lanes = &core.lanes;
            subscribers.clear();
            subscribers.extend(lanes.lanes.iter().map(|lane| lane.shared.stats()));
            (lanes.published, core.outboxes.len(), lanes.gone)
        });
        let (published, publishers, gone) = stats?;
        Ok(TopicStats {
            published,
            publishers,
            subscribers,
            gone,
        })
    }

    /// Refuses publishers from now on.
    pub(super) fn drain(&self) {
        self.refuse_publishers();
        // Once this thread has held the topic, no publisher is in the middle of publishing, and the
        // outboxes hold no message that was left before.
        self.core.leave();
        let _ = self.with(|_| ());
    }

    fn refuse_publishers(&self) {
        let state = &self.signals.state;
        let _ = state.compare_exchange(OPEN, DRAINING, Ordering::SeqCst, Ordering::Relaxed);
    }

    /// Ends the topic, and wakes everybody who waits for a message.
    pub(super) fn close(&self) -> Result<(), Error> {
        // First: publishers that go on without a pause would keep this thread from the topic.
        self.refuse_publishers();
        self.core.leave();
        let deadline = Deadline::after(self.termination_timeout);
        let closed = self.with(|core| core.close(deadline));
        // Even if whoever has it stands still: nobody is to publish any more.
        self.signals.state.fetch_max(CLOSED, Ordering::SeqCst);
        closed
    }
}

impl InChild for TopicShared {
    fn close_in_child(&self) {
        self.signals.state.store(FORKED, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::error::TrySendError;
    use crate::runtime::{RuntimeBuilder, SubscriberOptions, TopicOptions};

    use super::super::publisher::PublisherLane;
    use super::*;

    /// What another publisher does while this thread has the topic in hand.
    #[test]
    fn who_finds_the_topic_taken_leaves_its_messages_and_none_is_lost() {
        let runtime = RuntimeBuilder::default().build().unwrap();
        let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
        let mut subscriber = topic.subscribe(SubscriberOptions::default()).unwrap();
        let shared = runtime.topics.find("t").unwrap();
        let mut one = PublisherLane::new(Arc::clone(&shared), false).unwrap();
        let mut two = PublisherLane::new(Arc::clone(&shared), false).unwrap();
        one.publish(&[0]).unwrap();
        let slots = OUTBOX_SLOTS as u8;
        shared
            .core
            .try_with(|core| {
                for number in 1..=slots {
                    one.publish(&[number]).unwrap();
                }
                assert_eq!(one.publish(&[0xff]), Err(TrySendError::Busy));
                core.publish(&[100], false).unwrap();
                two.publish(&[101]).unwrap();
                // It goes, and what it has left is published all the same.
                drop(two);
                assert_eq!(core.outboxes.len(), 2);
            })
            .unwrap();
        one.publish(&[102]).unwrap();
        let stats = one.stats();
        assert_eq!(
            (stats.published, stats.handed_over, stats.busy),
            (66, 64, 1)
        );
        let mut expected = vec![0, 100];
        expected.extend(1..=slots);
        expected.extend([101, 102]);
        let mut received = Vec::new();
        let mut buffer = [0];
        while subscriber.try_recv_bytes(&mut buffer).is_ok() {
            received.push(buffer[0]);
        }
        assert_eq!(received, expected);
        assert_eq!(topic.stats().unwrap().publishers, 1);
    }

    /// The control plane waits for the topic, but not for ever.
    #[test]
    fn a_publisher_that_stands_still_is_reported() {
        let config = crate::RuntimeConfig {
            termination_timeout: Duration::from_millis(20),
            ..Default::default()
        };
        let runtime = RuntimeBuilder::default().config(config).build().unwrap();
        let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
        let mut publisher = topic.publisher().unwrap();
        let shared = runtime.topics.find("t").unwrap();
        let report = shared.core.try_with(|_| {
            assert!(matches!(topic.stats(), Err(Error::TopicBusy { .. })));
            assert!(matches!(topic.publisher(), Err(Error::TopicBusy { .. })));
            let timeout = Duration::from_millis(5);
            for _ in 0..OUTBOX_SLOTS {
                publisher.publish_bytes_timeout(&[1], timeout).unwrap();
            }
            assert_eq!(
                publisher.publish_bytes_timeout(&[1], timeout),
                Err(crate::error::SendTimeoutError::Timeout)
            );
            runtime.complete_shutdown().unwrap()
        });
        assert!(matches!(
            report.unwrap().errors[..],
            [Error::TopicBusy { .. }, Error::TopicBusy { .. }]
        ));
        assert_eq!(
            publisher.publish_bytes(&[1]),
            Err(TrySendError::Unavailable(Unavailable::Closed))
        );
    }
}
