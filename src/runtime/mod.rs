//! Floor 8: what people hold. A runtime opens a device and launches kernels; a handle sends to a kernel and receives
//! from it; split endpoints do so without a lock.

mod accounts;
mod builder;
mod calls;
mod client;
mod client_inbox;
mod client_lane;
mod client_options;
mod clients;
mod config;
mod connection;
mod devices;
mod endpoints;
mod handle;
mod instance;
mod latest;
mod launch;
mod lifecycle;
mod link;
mod metrics;
mod pipeline;
mod port;
mod receive;
mod relay;
mod replay;
mod ring_kernel_runtime;
mod send;
mod snapshot;
mod topic;
mod traces;

pub use builder::RuntimeBuilder;
pub use client::Client;
pub use client_options::{Backpressure, ClientOptions, ClientStats};
pub use config::RuntimeConfig;
pub use connection::Connection;
pub use endpoints::{Receiver, Sender};
pub use handle::KernelHandle;
pub use latest::Latest;
pub use lifecycle::{DrainReport, LifecycleState, MessageTally, ShutdownReport};
pub use metrics::{KernelMetrics, KernelStatus};
pub use pipeline::ConnectionKind;
pub use receive::{Bytes, Received};
pub use ring_kernel_runtime::RingKernelRuntime;
pub use send::{SendBatch, SendOptions, SendSlot};
pub use topic::{
    KernelSubscription, KernelSubscriptionStats, Overflow, Publisher, PublisherStats, Subscriber,
    SubscriberOptions, SubscriberStats, Topic, TopicOptions, TopicStats,
};
