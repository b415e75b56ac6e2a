//! Floor 4: how threads wait, where they run, and how they pass values on.

mod barrier;
// Under loom only its own model uses it.
#[cfg_attr(loom, allow(dead_code))]
pub(crate) mod baton;
// Under loom only its own model uses it.
#[cfg_attr(loom, allow(dead_code))]
pub(crate) mod errands;
// Under loom only its own model uses it.
#[cfg_attr(loom, allow(dead_code))]
pub(crate) mod event_count;
mod mailbox;
// Under loom only its own model uses it.
#[cfg_attr(loom, allow(dead_code))]
pub(crate) mod watch;

#[cfg(not(loom))]
pub mod affinity;
#[cfg(not(loom))]
mod awaited;
#[cfg(not(loom))]
pub(crate) mod bounded;
#[cfg(not(loom))]
pub(crate) mod budget;
#[cfg(not(loom))]
mod core_claims;
#[cfg(all(target_os = "linux", not(loom)))]
mod core_mask;
#[cfg(not(loom))]
mod cores;
#[cfg(all(
    not(loom),
    any(feature = "vulkan", feature = "cuda", feature = "metal")
))]
pub(crate) mod driver_thread;
#[cfg(not(loom))]
pub(crate) mod foreign;
#[cfg(not(loom))]
pub(crate) mod own;
#[cfg(not(loom))]
pub mod periodic;
#[cfg(not(loom))]
mod placed;
#[cfg(not(loom))]
mod quota;
#[cfg(not(loom))]
pub mod realtime;
#[cfg(not(loom))]
mod spin_watch;
#[cfg(not(loom))]
pub(crate) mod unwinding;
#[cfg(not(loom))]
mod wait;

#[cfg(not(loom))]
pub(crate) use awaited::{AnyThread, Awaited};
#[cfg(not(loom))]
pub(crate) use cores::{CoreLease, SpinPermit};
#[cfg(not(loom))]
pub(crate) use mailbox::mailbox_of;
pub use mailbox::{MailboxReader, MailboxWriter, mailbox};
#[cfg(not(loom))]
pub(crate) use placed::PlacedThread;
#[cfg(not(loom))]
pub(crate) use spin_watch::SpinWatch;
#[cfg(not(loom))]
pub use wait::WaitStrategy;
#[cfg(not(loom))]
pub(crate) use wait::{CallerStep, IdleStep, KernelWait, POLLS_PER_STEP, Waiter};
