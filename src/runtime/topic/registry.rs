//! The topics of a runtime: who opens one, who joins it.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::core::{Shape, TopicShared};
use super::kernel::{KernelSubscription, Pump, kind_for};
use super::lane::Letters;
use super::options::{MAX_NAME_BYTES, MAX_TOPICS, SubscriberOptions, TopicOptions, TopicStats};
use super::publisher::{Publisher, PublisherLane};
use super::subscriber::{Subscriber, SubscriberLane};
use crate::error::Error;
use crate::kernel::DeadLetters;
use crate::logging;
use crate::message::RingMessage;
use crate::process;
use crate::runtime::client_options::ClientOptions;
use crate::runtime::handle::KernelHandle;
use crate::runtime::lifecycle::MessageTally;
use crate::runtime::receive::Bytes;
use crate::runtime::ring_kernel_runtime::RingKernelRuntime;
use crate::thread::WaitStrategy;
use crate::thread::event_count::EventCount;
use crate::time::Deadline;

/// Between two looks whether kernels have what was published.
const DRAIN_NAP: Duration = Duration::from_micros(200);

/// All topics of a runtime. They live as long as it does.
#[derive(Debug, Default)]
pub(crate) struct Topics {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    topics: BTreeMap<String, Arc<TopicShared>>,
    /// The ways from topics to kernels.
    pumps: Vec<Weak<Pump>>,
    is_closed: bool,
}

impl Topics {
    fn all(&self) -> Vec<Arc<TopicShared>> {
        self.inner.lock().topics.values().cloned().collect()
    }

    /// The topic of a name.
    #[cfg(test)]
    pub(super) fn find(&self, name: &str) -> Option<Arc<TopicShared>> {
        self.inner.lock().topics.get(name).cloned()
    }

    /// Refuses publishers from now on, and waits until active kernels have what was published before.
    pub(in crate::runtime) fn drain(&self, deadline: Deadline) {
        for topic in self.all() {
            topic.drain();
        }
        let pumps: Vec<Arc<Pump>> = {
            let inner = self.inner.lock();
            inner.pumps.iter().filter_map(Weak::upgrade).collect()
        };
        // What one kernel replies another one may be given, and so on: as often as there are kernels.
        let is_settled = || (0..=pumps.len()).all(|_| pumps.iter().all(|pump| pump.is_settled()));
        while !is_settled() && !deadline.has_passed() {
            for pump in &pumps {
                pump.kernel.bridge.attention.bell.notify();
            }
            std::thread::sleep(DRAIN_NAP.min(deadline.remaining()));
        }
    }

    /// Ends all topics, and wakes everybody who waits for a message.
    pub(in crate::runtime) fn close(&self, errors: &mut Vec<Error>) {
        self.inner.lock().is_closed = true;
        for topic in self.all() {
            errors.extend(topic.close().err());
        }
    }

    /// What became of everything that was published.
    pub(in crate::runtime) fn tally(&self, errors: &mut Vec<Error>) -> MessageTally {
        let mut tally = MessageTally::default();
        for topic in self.all() {
            match topic.stats() {
                Ok(stats) => {
                    for stats in stats.subscribers.iter().chain([&stats.gone]) {
                        tally.merge(&MessageTally {
                            accepted: stats.published,
                            delivered: stats.delivered,
                            dead_lettered: stats.dropped,
                            returned: stats.queued,
                        });
                    }
                }
                Err(error) => errors.push(error),
            }
        }
        tally
    }
}

/// A topic of a runtime: where [`Publisher`]s and [`Subscriber`]s of one type of message meet. Any thread may use it; copies are of the same
/// topic, which lives as long as its runtime.
pub struct Topic<M> {
    shared: Arc<TopicShared>,
    messages: PhantomData<fn(M) -> M>,
}

impl<M> Clone for Topic<M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            messages: PhantomData,
        }
    }
}

impl<M> fmt::Debug for Topic<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Topic")
            .field("name", &self.shared.name)
            .finish_non_exhaustive()
    }
}

impl<M> Topic<M> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Largest payload in bytes.
    #[must_use]
    pub fn message_size(&self) -> usize {
        self.shared.shape.message_size
    }

    /// A publisher of its own for one thread, one of at most 64 at a time. Takes the memory of its outbox, 64 messages.
    ///
    /// # Errors
    /// [`Error::TopicFull`]; [`Error::TopicBusy`] if another publisher stands still for `termination_timeout`; [`Error::OutOfMemory`];
    /// [`Error::InvalidLifecycle`] once the runtime has shut down.
    pub fn publisher(&self) -> Result<Publisher<M>, Error> {
        let lane = PublisherLane::new(Arc::clone(&self.shared), false)?;
        Publisher::new(lane)
    }

    /// A subscriber of its own for one thread, one of at most 64 at a time, kernels included. Takes its lane's memory.
    ///
    /// Unless its options or the topic's say otherwise it gets the last value that was published first, if there is one; then everything that is
    /// published from now on, each message once and in the order of publishing, but for what its lane has no room for.
    ///
    /// # Errors
    /// As [`publisher`](Self::publisher); [`Error::InvalidOption`].
    pub fn subscribe(&self, options: SubscriberOptions) -> Result<Subscriber<M>, Error> {
        let wait = options.wait.unwrap_or(self.shared.host_wait);
        let event = Arc::new(EventCount::new());
        let lane = SubscriberLane::new(Arc::clone(&self.shared), &options, event, wait)?;
        Ok(Subscriber::new(lane))
    }

    /// How it stands. Allocates; takes a turn between publishers.
    ///
    /// # Errors
    /// [`Error::TopicBusy`] if a publisher stands still for `termination_timeout`.
    pub fn stats(&self) -> Result<TopicStats, Error> {
        self.shared.stats()
    }
}

impl RingKernelRuntime {
    /// The topic of this name, for messages of one type; made if there is none yet. A name has 1 to 255 bytes and no NUL; there are at most
    /// 1024 topics, each with 64 publishers and 64 subscribers at most at a time.
    ///
    /// # Errors
    /// [`Error::TopicMismatch`] if it is there already with another type of message, size or retention; [`Error::InvalidOption`];
    /// [`Error::TopicFull`]; [`Error::InvalidLifecycle`] once the runtime drains.
    pub fn topic<M: RingMessage>(
        &self,
        name: &str,
        options: TopicOptions,
    ) -> Result<Topic<M>, Error> {
        self.open_topic(name, options, (M::TYPE_ID, M::NAME))
    }

    /// As [`topic`](Self::topic), for raw bytes.
    ///
    /// # Errors
    /// As `topic`.
    pub fn topic_bytes(&self, name: &str, options: TopicOptions) -> Result<Topic<Bytes>, Error> {
        self.open_topic(name, options, (0, "raw bytes"))
    }

    fn open_topic<M>(
        &self,
        name: &str,
        options: TopicOptions,
        (type_id, type_name): (u64, &'static str),
    ) -> Result<Topic<M>, Error> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains('\0') {
            return Err(Error::InvalidOption {
                option: "name of the topic",
                reason: format!("it has 1 to {MAX_NAME_BYTES} bytes and no NUL"),
            });
        }
        let config = self.config();
        let shape = Shape {
            type_id,
            type_name,
            message_size: options.checked_size(config.default_message_size)?,
            retain: options.retain,
        };
        self.check_running("open a topic")?;
        let pool = self.device(self.default_device())?.host_pool();
        // Before the lock: taking memory may be logged.
        let _deferral = logging::defer();
        let mut inner = self.topics.inner.lock();
        if inner.is_closed {
            return Err(Error::InvalidLifecycle {
                state: "ShuttingDown",
                operation: "open a topic",
            });
        }
        let shared = match inner.topics.get(name) {
            Some(shared) if shared.shape == shape => Arc::clone(shared),
            Some(shared) => return Err(mismatch(shared, &shape)),
            None if inner.topics.len() == MAX_TOPICS => {
                return Err(Error::TopicFull {
                    topic: name.to_owned(),
                    what: "topics",
                    max: MAX_TOPICS,
                });
            }
            None => {
                let letters = Letters {
                    letters: DeadLetters::new(name, Some(self.letter_queue())),
                    type_id: Some(type_id).filter(|id| *id != 0),
                };
                let shared = TopicShared::new(name, shape, letters, pool, config)?;
                let shared = Arc::new(shared);
                process::register(&shared);
                inner.topics.insert(name.to_owned(), Arc::clone(&shared));
                shared
            }
        };
        Ok(Topic {
            shared,
            messages: PhantomData,
        })
    }

    /// How each topic stands, by name.
    ///
    /// # Errors
    /// As [`Topic::stats`].
    pub fn topics(&self) -> Result<BTreeMap<String, TopicStats>, Error> {
        self.check_here("list topics")?;
        let topics = self.topics.all();
        topics
            .iter()
            .map(|topic| Ok((topic.name.clone(), topic.stats()?)))
            .collect()
    }

    /// Makes the messages of a topic requests of a kernel, as long as what it returns lives. The bridge of the kernel's device carries them,
    /// through a client's lane of the kernel: while there is one, the kernel's handle can neither send, receive, call nor split, but other
    /// clients can come and go. While the kernel is not active, and while it has no room, messages wait in the subscription's lane, and are
    /// lost as `options` say. The kernel's replies to them are received and dropped.
    ///
    /// # Errors
    /// [`Error::CannotSubscribe`] if it is no kernel of this runtime, or its slots are smaller than the topic's messages;
    /// [`Error::UnknownType`] if it was not registered for the type; whatever [`Topic::subscribe`] and [`KernelHandle::client`] return.
    ///
    /// ```
    /// use std::time::Duration;
    /// use ringkernel::{LaunchOptions, RingKernelRuntime, SubscriberOptions, TopicOptions};
    ///
    /// let runtime = RingKernelRuntime::builder().build()?;
    /// let (orders, done) = (
    ///     runtime.topic_bytes("orders", TopicOptions::default())?,
    ///     runtime.topic_bytes("done", TopicOptions::default())?,
    /// );
    /// let kernel = runtime.launch("echo", 1, 1, LaunchOptions::default())?;
    /// kernel.activate()?;
    /// let _subscription =
    ///     runtime.subscribe_kernel_publishing(&orders, &kernel, &done, SubscriberOptions::default())?;
    /// let mut subscriber = done.subscribe(SubscriberOptions::default())?;
    /// orders.publisher()?.publish_bytes(b"order")?;
    /// let mut reply = [0; 48];
    /// assert_eq!(subscriber.recv_bytes_timeout(&mut reply, Duration::from_secs(5))?, 5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn subscribe_kernel<M>(
        &self,
        topic: &Topic<M>,
        kernel: &KernelHandle,
        options: SubscriberOptions,
    ) -> Result<KernelSubscription, Error> {
        self.pump(&topic.shared, kernel, None, options)
    }

    /// As [`subscribe_kernel`](Self::subscribe_kernel), and publishes the kernel's replies to another topic. Errors of its handler are only
    /// counted; replies of another type go to the dead letters.
    ///
    /// # Errors
    /// As `subscribe_kernel`; [`Error::CannotSubscribe`] if both are the same topic.
    pub fn subscribe_kernel_publishing<M, R>(
        &self,
        topic: &Topic<M>,
        kernel: &KernelHandle,
        replies: &Topic<R>,
        options: SubscriberOptions,
    ) -> Result<KernelSubscription, Error> {
        self.pump(&topic.shared, kernel, Some(&replies.shared), options)
    }

    fn pump(
        &self,
        topic: &Arc<TopicShared>,
        kernel: &KernelHandle,
        replies: Option<&Arc<TopicShared>>,
        options: SubscriberOptions,
    ) -> Result<KernelSubscription, Error> {
        let instance = &kernel.instance;
        let refused = |reason| {
            Err(Error::CannotSubscribe {
                topic: topic.name.clone(),
                kernel: kernel.name().to_owned(),
                reason,
            })
        };
        self.check_running("subscribe a kernel")?;
        let is_open = instance.signals.gate.is_open();
        if !is_open || !self.has_kernel(instance) || !self.owns(topic) {
            return refused("they are not of this runtime, or the kernel has been terminated");
        }
        if replies.is_some_and(|replies| !self.owns(replies)) {
            return refused("the topic for its replies is not of this runtime");
        }
        if replies.is_some_and(|replies| Arc::ptr_eq(replies, topic)) {
            return refused("its replies would be published to the same topic");
        }
        if topic.shape.message_size > instance.ring.max_payload() {
            return refused("its slots are smaller than the topic's messages");
        }
        let Some(kind) = kind_for(instance, topic.shape.type_id) else {
            return Err(Error::UnknownType {
                kernel: kernel.name().to_owned(),
                type_name: topic.shape.type_name,
            });
        };
        // Through its lane always: then the kernel rings for the bridge before its replies fill its ring.
        let client = kernel.lane(ClientOptions {
            direct: false,
            ..ClientOptions::default()
        })?;
        let replies = match replies {
            Some(replies) => Some(PublisherLane::new(Arc::clone(replies), true)?),
            None => None,
        };
        let bridge = &instance.bridge;
        // The bridge may sleep, whatever its strategy.
        let messages = SubscriberLane::new(
            Arc::clone(topic),
            &options,
            Arc::clone(&bridge.attention.bell),
            WaitStrategy::Park,
        )?;
        let pump = Arc::new(Pump::new(
            Arc::clone(instance),
            messages,
            client,
            kind,
            replies,
        ));
        bridge.add(Arc::<Pump>::clone(&pump))?;
        let mut inner = self.topics.inner.lock();
        inner.pumps.retain(|pump| pump.strong_count() > 0);
        inner.pumps.push(Arc::downgrade(&pump));
        drop(inner);
        Ok(KernelSubscription::new(pump))
    }

    fn owns(&self, topic: &Arc<TopicShared>) -> bool {
        let inner = self.topics.inner.lock();
        let own = inner.topics.get(&topic.name);
        own.is_some_and(|own| Arc::ptr_eq(own, topic))
    }
}

/// What is wrong with opening a topic that is there.
fn mismatch(shared: &TopicShared, asked: &Shape) -> Error {
    let describe = |shape: &Shape| {
        format!(
            "{} of at most {} bytes, {}",
            shape.type_name,
            shape.message_size,
            if shape.retain {
                "the last one retained"
            } else {
                "none retained"
            }
        )
    };
    Error::TopicMismatch {
        topic: shared.name.clone(),
        reason: format!(
            "{}; asked for: {}",
            describe(&shared.shape),
            describe(asked)
        ),
    }
}
