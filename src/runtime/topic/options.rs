//! What topics, publishers and subscribers ask for, and what they say of themselves.

use crate::error::Error;
use crate::message::MAX_PAYLOAD_BYTES;
use crate::thread::WaitStrategy;

/// Most bytes of a topic's name.
pub(super) const MAX_NAME_BYTES: usize = 255;

/// Most topics of a runtime. They live as long as it does.
pub(super) const MAX_TOPICS: usize = 1024;

/// Most publishers of a topic at a time: each has a ring that whoever publishes looks at.
pub(super) const MAX_PUBLISHERS: usize = 64;

/// Most subscribers of a topic at a time: what is published is copied to each.
pub(super) const MAX_SUBSCRIBERS: usize = 64;

/// Most messages that wait for a subscriber: a ring of them is 64 MiB of one-line messages.
const MAX_CAPACITY: usize = 1 << 20;

/// Slots of a subscriber's lane, unless it says otherwise: 16 KiB of one-line messages, twice as much where the oldest are dropped.
const DEFAULT_CAPACITY: usize = 256;

/// How a topic works. The first opening decides; later ones have to ask for the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopicOptions {
    /// Largest payload in bytes, 0 to 2^24 - 1; `None`, the default, means [`RuntimeConfig::default_message_size`](crate::RuntimeConfig).
    pub message_size: Option<usize>,
    /// Whether the topic keeps the last value that was published, for subscribers that come later. Default true.
    pub retain: bool,
}

impl Default for TopicOptions {
    fn default() -> Self {
        Self {
            message_size: None,
            retain: true,
        }
    }
}

impl TopicOptions {
    /// Bytes of the largest payload.
    pub(super) fn checked_size(&self, default: usize) -> Result<usize, Error> {
        let size = self.message_size.unwrap_or(default);
        if size > MAX_PAYLOAD_BYTES {
            return Err(Error::InvalidOption {
                option: "message_size",
                reason: format!("{size} exceeds {MAX_PAYLOAD_BYTES}"),
            });
        }
        Ok(size)
    }
}

/// What is lost when a subscriber's lane is full. A publisher never waits for a subscriber. What is lost is counted by the subscriber
/// ([`SubscriberStats::dropped`]), and goes to the dead letters of the runtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Overflow {
    /// The oldest message that still waits makes room for the newest one, which is always kept.
    ///
    /// A subscriber that stands still in the very middle of taking a message cannot be dropped from: up to twice the capacity wait meanwhile,
    /// and then the one before the newest makes room.
    #[default]
    DropOldest,
    /// The message that is just published is lost.
    DropNewest,
    /// The lane has room for one message, and the newest one replaces it: for values of which only the newest counts, a sensor's say.
    Latest,
}

/// How a subscriber's lane works. The default is a lane of 256 messages that drops the oldest.
///
/// ```
/// use ringkernel::{Overflow, SubscriberOptions};
/// let options = SubscriberOptions { overflow: Overflow::Latest, ..SubscriberOptions::default() };
/// # assert!(options.retained);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubscriberOptions {
    /// Messages that may wait: 2 to 2^20, rounded up to a power of two. Default 256. Not with [`Overflow::Latest`], where it is one.
    pub capacity: Option<usize>,
    /// What is lost when so many wait.
    pub overflow: Overflow,
    /// Whether the topic's last value, if there is one and the topic retains it, comes first. Default true.
    pub retained: bool,
    /// How it waits; `None`, the default, means [`RuntimeConfig::host_wait`](crate::RuntimeConfig). A kernel that subscribes does not wait,
    /// and takes no notice.
    pub wait: Option<WaitStrategy>,
}

impl Default for SubscriberOptions {
    fn default() -> Self {
        Self {
            capacity: None,
            overflow: Overflow::DropOldest,
            retained: true,
            wait: None,
        }
    }
}

impl SubscriberOptions {
    /// The newest value only ([`Overflow::Latest`]).
    #[must_use]
    pub fn latest() -> Self {
        Self {
            overflow: Overflow::Latest,
            ..Self::default()
        }
    }

    /// Messages that may wait.
    pub(super) fn checked_capacity(&self) -> Result<usize, Error> {
        let invalid = |reason| {
            Err(Error::InvalidOption {
                option: "capacity",
                reason,
            })
        };
        match self.capacity {
            Some(capacity) if self.overflow == Overflow::Latest => {
                invalid(format!("{capacity} where only the newest message waits"))
            }
            None if self.overflow == Overflow::Latest => Ok(1),
            None => Ok(DEFAULT_CAPACITY),
            Some(capacity) if !(2..=MAX_CAPACITY).contains(&capacity) => {
                invalid(format!("{capacity} is not within 2 to {MAX_CAPACITY}"))
            }
            Some(capacity) => Ok(capacity.next_power_of_two()),
        }
    }
}

/// What a publisher has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublisherStats {
    /// Messages that the topic took.
    pub published: u64,
    /// Those of them that another publisher put into the subscribers' lanes, because it was just at it.
    pub handed_over: u64,
    /// Attempts that failed because another publisher stood still in the middle of publishing.
    pub busy: u64,
}

/// What has come to a subscriber so far: `published = delivered + dropped + queued`, once nobody is at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubscriberStats {
    /// Messages for it: those published since it subscribed, and the retained one if it got that.
    pub published: u64,
    /// Messages that it has received; of a kernel, those that became requests.
    pub delivered: u64,
    /// Messages that were lost: its lane was full, or they were no valid archive.
    pub dropped: u64,
    /// Messages that wait in its lane.
    pub queued: u64,
}

/// How a topic stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicStats {
    /// Messages published.
    pub published: u64,
    /// Publishers now.
    pub publishers: usize,
    /// Subscribers now, in the order in which they came.
    pub subscribers: Vec<SubscriberStats>,
    /// Sums of the subscribers that have gone; `queued` is what they had not received.
    pub gone: SubscriberStats,
}
