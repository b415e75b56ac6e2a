//! A synchronous runtime for persistent compute kernels.
//!
//! A kernel is launched once and stays resident on a device. Realtime threads exchange small messages with it by blocking
//! calls, over lock-free rings in memory that both sides see. No async executor, no thread pool: dedicated threads poll.
//!
//! ```
//! use std::time::Duration;
//! use ringkernel::{Dim3, KernelRegistration, LaunchOptions, RingKernelRuntime};
//! use rkyv::{Archive, Deserialize, Serialize};
//!
//! #[derive(Archive, Serialize, Deserialize)]
//! struct Order { price: u64, quantity: u64 }
//! ringkernel::ring_message!(Order, "example.Order.v1");
//!
//! #[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
//! struct Value { total: u64 }
//! ringkernel::ring_message!(Value, "example.Value.v1");
//!
//! let value = KernelRegistration::new("value").typed_cpu_handler::<Order, Value, _>(|order, _context| {
//!     Ok(Value { total: order.price.to_native() * order.quantity.to_native() })
//! });
//!
//! let runtime = RingKernelRuntime::builder().register(value).build()?;
//! let kernel = runtime.launch("value", Dim3::x(1), Dim3::x(1), LaunchOptions::default())?;
//! kernel.activate()?;
//!
//! // Any thread:
//! let reply: Value = kernel.call(&Order { price: 7, quantity: 6 }, Duration::from_millis(100))?;
//! assert_eq!(reply, Value { total: 42 });
//!
//! // One realtime thread, wait-free:
//! let (mut sender, mut receiver) = kernel.split::<Order, Value>()?;
//! sender.try_send(&Order { price: 2, quantity: 3 })?;
//! assert_eq!(receiver.recv_timeout(Duration::from_millis(100))?.total, 6);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The realtime promise
//!
//! | call | allocates | locks | system calls | bound |
//! |---|---|---|---|---|
//! | [`Sender::try_send`], [`Receiver::try_recv`] | no | no | no ¹ | wait-free ¹ |
//! | [`Receiver::recv_timeout`] with [`WaitStrategy::Spin`] | no | no | no | the timeout |
//! | [`Client::try_send`], [`try_recv`](Client::try_recv) | no | no | no ¹ | wait-free ¹ ² |
//! | [`Client::recv_timeout`], [`call`](Client::call) with [`WaitStrategy::Spin`] | no | no | no ¹ | the timeout |
//! | [`Publisher::publish`], [`Subscriber::try_recv`] | no | no | no ¹ | wait-free ³ |
//! | [`Subscriber::recv_timeout`] with [`WaitStrategy::Spin`] | no | no | no | the timeout |
//! | [`KernelHandle::send`], [`recv_timeout`](KernelHandle::recv_timeout) | no | one, uncontended | none while spinning ¹ | the timeout |
//! | [`KernelHandle::call`] | no | one a direction, uncontended | none while spinning ¹ | the timeout |
//! | [`launch`](RingKernelRuntime::launch), [`activate`](KernelHandle::activate), [`terminate`](KernelHandle::terminate) | yes | yes | yes | `termination_timeout` |
//!
//! ¹ To a kernel, or a subscriber, that spins. Waking a kernel that sleeps ([`WaitStrategy::Park`], or `Auto` on a machine without a core
//! for it) is one system call and takes the lock under its condition variable; likewise for a kernel that wakes callers.
//!
//! ² A client that finds the lanes in nobody's hands moves up to 64 messages each way, for all clients of its kernel, before it returns, and where
//! credit is used up all the replies that lie in the kernel's rings; neither while a bridge spins ([`RuntimeConfig::bridge_wait`]).
//!
//! ³ For the only publisher of a topic. One of several is lock-free: it publishes what the others leave to it meanwhile.
//!
//! Messages whose own type allocates (a `Vec`) allocate when they are received by value; read in place they do not.
//! Allocations and system calls are counted by `tests/hot_path.rs` (`nothing_is_allocated_per_message`,
//! `no_system_call_is_made_per_message`, which would also see a lock that is contended). That endpoints take no lock at
//! all follows from their code, which has none. The bounds are tested by the conformance suite (`tests/conformance/`:
//! `a_full_ring_gives_the_message_back_and_frees_its_slots`, `terminate_wakes_blocked_senders_and_receivers`,
//! `a_handler_that_never_returns_is_reported_in_time`, `terminate_wakes_clients`, `a_client_that_reads_nothing_holds_up_nobody`).
//!
//! # Features
//!
//! - `std` (default): threads, kernels, the CPU backend, the runtime. Without it the crate is `no_std` and allocation-free:
//!   [`message`] and [`ring`] alone, for the far side of a link.
//! - `vulkan` (default): the Vulkan backend. Loader and drivers are opened at run time; without them
//!   [`Error::BackendUnavailable`] says so.
//! - `cuda` (default): the CUDA backend; its driver, and the compiler of handlers in source (NVRTC), are opened at run time.
//! - `metal` (default): the Metal backend, on macOS; elsewhere it only says that it is unavailable.
//! - `glsl`: shader handlers as source, compiled at launch. Builds a C++ compiler library, which takes minutes.

#![cfg_attr(not(feature = "std"), no_std)]
// Control blocks, block memory and kinds have parts for devices other than the CPU.
#![cfg_attr(
    not(all(feature = "vulkan", feature = "cuda", feature = "metal")),
    allow(dead_code)
)]
#![warn(missing_docs, missing_debug_implementations)]
#![warn(clippy::unwrap_used, clippy::expect_used)]

pub mod error;
pub mod message;
pub mod ring;
mod sync;

#[cfg(feature = "std")]
pub mod thread;

#[cfg(all(feature = "std", not(loom)))]
pub mod backend;
#[cfg(all(feature = "std", not(loom)))]
pub mod bridge;
#[cfg(all(feature = "std", not(loom)))]
pub mod kernel;
#[cfg(all(feature = "std", not(loom)))]
mod runtime;
#[cfg(all(feature = "std", not(loom)))]
pub mod time;

#[cfg(feature = "std")]
pub use error::Error;
pub use message::{MessageHeader, Priority, RingMessage};

#[cfg(all(feature = "std", not(loom)))]
pub use crate::{
    backend::{
        BackendType, CudaConfig, CudaRingMemory, DeviceInfo, MetalConfig, MetalMode, VulkanConfig,
        VulkanMode,
    },
    bridge::RingBufferBridge,
    kernel::{
        ControlBlock, CpuHandler, CudaCode, Dim3, HandlerResult, KernelContext, KernelRegistration,
        KernelState, LaunchOptions, MessageTrace, MetalCode, PortableCode, Request, ShaderCode,
        TelemetryBuffer, find_kernel,
    },
    runtime::{
        Backpressure, Bytes, Client, ClientOptions, ClientStats, Connection, ConnectionKind,
        DrainReport, KernelHandle, KernelMetrics, KernelStatus, KernelSubscription,
        KernelSubscriptionStats, Latest, LifecycleState, MessageTally, Overflow, Publisher,
        PublisherStats, Received, Receiver, RingKernelRuntime, RuntimeBuilder, RuntimeConfig,
        SendBatch, SendOptions, SendSlot, Sender, ShutdownReport, Subscriber, SubscriberOptions,
        SubscriberStats, Topic, TopicOptions, TopicStats,
    },
    thread::WaitStrategy,
    time::Hlc,
};

// The merger's promises, checked over rings of the tests' own; the bridge itself is not built under loom.
#[cfg(all(test, loom))]
#[path = "bridge/model.rs"]
mod bridge_model;
#[cfg(all(test, loom))]
extern crate self as ringkernel;
#[cfg(all(test, loom))]
#[allow(clippy::unwrap_used)]
#[path = "../tests/heap_ring/mod.rs"]
mod heap_ring;

// The conformance suite runs on a Metal of our own, which is in this crate: what it asks of Metal is not public.
#[cfg(all(test, feature = "metal", target_os = "linux", not(loom)))]
extern crate self as ringkernel;
#[cfg(all(test, feature = "metal", target_os = "linux", not(loom)))]
#[allow(dead_code, missing_docs, clippy::unwrap_used, clippy::expect_used)]
#[path = "../tests/conformance/mod.rs"]
mod conformance;

#[doc(hidden)]
pub mod __private {
    //! What the macros of this crate refer to from other crates.
    #[cfg(feature = "std")]
    pub use linkme;
    pub use rkyv;
}
