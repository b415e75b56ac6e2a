//! Topics: publish and subscribe by name, over the same rings and mailboxes as everything else.

mod core;
mod kernel;
mod lane;
mod options;
mod publisher;
mod registry;
mod subscriber;

pub use kernel::{KernelSubscription, KernelSubscriptionStats};
pub use options::{
    Overflow, PublisherStats, SubscriberOptions, SubscriberStats, TopicOptions, TopicStats,
};
pub use publisher::Publisher;
pub use registry::Topic;
pub(super) use registry::Topics;
pub use subscriber::Subscriber;
