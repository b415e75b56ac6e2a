//! Floor 7: the pinned thread of a device that merges the lanes of many clients into its kernels' rings, routes replies back, carries the
//! messages of connected kernels and of topics to kernels, and watches their signs of life.
//!
//! Threads that keep dispatches alive (a Vulkan queue's slices, say) are the backends' own: they wait inside a driver, which nothing that is
//! on a message's path may do.

mod hub;
mod lane;
mod load;
mod merger;
mod thread;

pub(crate) use hub::Hub;
pub(crate) use lane::{ClientEnds, Lane, LanePlan, LaneShared, Letter, Outbox, Tally};
pub use load::BridgeLoad;
pub(crate) use merger::{Merger, Port};
pub use thread::RingBufferBridge;
pub(crate) use thread::{Bridge, BridgeSettings, Place, Service, Station};
