//! Floor 4: how threads wait, and where they run.

// Under loom only its own model uses it.
#[cfg_attr(loom, allow(dead_code))]
pub(crate) mod event_count;

#[cfg(not(loom))]
pub mod affinity;
#[cfg(not(loom))]
mod cores;
#[cfg(not(loom))]
pub mod periodic;
#[cfg(not(loom))]
pub mod realtime;
#[cfg(not(loom))]
mod wait;

#[cfg(not(loom))]
pub(crate) use cores::{CoreLease, SpinPermit};
#[cfg(not(loom))]
pub use wait::WaitStrategy;
#[cfg(not(loom))]
pub(crate) use wait::{IdleStep, KernelWait, POLLS_PER_STEP, Waiter};
