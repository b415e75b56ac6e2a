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
//! Each cell links to the test that shows it.
//!
//! | call | allocates | locks | system calls | bound |
//! |---|---|---|---|---|
//! | [`Sender::try_send`], [`Receiver::try_recv`] | [no](#nothing_is_allocated_per_message) | [no](#no_system_call_is_made_per_message) | [no](#no_system_call_is_made_per_message) ¹ | [wait-free](#a_full_ring_gives_the_message_back_and_frees_its_slots) ¹ |
//! | [`Receiver::recv_timeout`] with [`WaitStrategy::Spin`] | [no](#nothing_is_allocated_per_message) | [no](#no_system_call_is_made_per_message) | [no](#no_system_call_is_made_per_message) | [the timeout](#every_strategy_honours_its_timeout) |
//! | [`Client::try_send`], [`try_recv`](Client::try_recv) | [no](#nothing_is_allocated_per_message_of_a_client) | [no](#no_system_call_is_made_per_message_of_a_client) | [no](#no_system_call_is_made_per_message_of_a_client) ¹ | [wait-free](#a_client_that_reads_nothing_holds_up_nobody) ¹ ² |
//! | [`Client::recv_timeout`], [`call`](Client::call) with [`WaitStrategy::Spin`] | [no](#nothing_is_allocated_per_message_of_a_client) | [no](#no_system_call_is_made_per_message_of_a_client) | [no](#no_system_call_is_made_per_message_of_a_client) ¹ | [the timeout](#every_strategy_honours_its_timeout) |
//! | [`Publisher::publish`], [`Subscriber::try_recv`] | [no](#nothing_is_allocated_per_message_of_a_topic) | [no](#no_system_call_is_made_per_message_of_a_topic) | [no](#no_system_call_is_made_per_message_of_a_topic) ¹ | [wait-free](#a_subscriber_that_stands_still_holds_up_nobody) ³ |
//! | [`Subscriber::recv_timeout`] with [`WaitStrategy::Spin`] | [no](#nothing_is_allocated_per_message_of_a_topic) | [no](#no_system_call_is_made_per_message_of_a_topic) | [no](#no_system_call_is_made_per_message_of_a_topic) | [the timeout](#every_strategy_honours_its_timeout) |
//! | [`KernelHandle::send`], [`recv_timeout`](KernelHandle::recv_timeout) | [no](#nothing_is_allocated_per_message) | [one, uncontended](#no_system_call_is_made_per_message) | [none while spinning](#no_system_call_is_made_per_message) ¹ | [the timeout](#every_strategy_honours_its_timeout) |
//! | [`KernelHandle::call`] | [no](#nothing_is_allocated_per_message) | [one a direction, uncontended](#no_system_call_is_made_per_message) | [none while spinning](#no_system_call_is_made_per_message) ¹ | [the timeout](#every_strategy_honours_its_timeout) |
//! | [`launch`](RingKernelRuntime::launch), [`activate`](KernelHandle::activate), [`terminate`](KernelHandle::terminate) | yes | yes | yes | [`termination_timeout`](#a_handler_that_never_returns_is_reported_in_time) |
//!
//! ¹ To a kernel, or a subscriber, that spins. Waking a kernel that sleeps ([`WaitStrategy::Park`], or `Auto` on a machine without a core
//! for it) is one system call and takes the lock under its condition variable; likewise for a kernel that wakes callers.
//!
//! ² A client that finds the lanes in nobody's hands moves up to 64 messages each way, for all clients of its kernel, before it returns, and where
//! credit is used up all the replies that lie in the kernel's rings; neither while a bridge spins ([`RuntimeConfig::bridge_wait`]).
//!
//! On a machine whose clock is not read in the process itself (Linux with the clock source `hpet`
//! or `acpi_pm`, some virtual machines), each look at the clock is a system call as well: a wait
//! looks at it about once a microsecond, and each message is stamped by its sender.
//!
//! ³ For the only publisher of a topic. One of several is lock-free: it publishes what the others leave to it meanwhile.
//!
//! Messages whose own type allocates (a `Vec`) allocate when they are received by value; read in place they do not.
//! The first message with a large hash map may allocate scratch memory ([`RingMessage`]).
//! No wait outlives what it waits for: [`terminate_wakes_blocked_senders_and_receivers`](#terminate_wakes_blocked_senders_and_receivers).
//!
//! ## The tests
//!
//! ### `nothing_is_allocated_per_message`
//!
//! `cargo test --test hot_path`: an allocator that counts, around handle, endpoints and the kernel's own thread; `…_in_a_pipeline` beside it for
//! kernels that are connected.
//!
//! ### `nothing_is_allocated_per_message_of_a_client`
//!
//! `cargo test --test hot_path`: the same around clients that go past their lanes, through them, and by a bridge that spins; the bridge's thread
//! included (`what_a_bridge_allocates_and_frees_is_counted`).
//!
//! ### `no_system_call_is_made_per_message`
//!
//! `cargo test --test hot_path -- --nocapture`: the process under `strace`, with 10^6 messages between two marks, and `getrusage` for its page
//! faults. A lock that is contended would show as a `futex`. That endpoints take none at all follows from their code, which has none.
//!
//! ### `no_system_call_is_made_per_message_of_a_client`
//!
//! `cargo test --test hot_path -- --nocapture`: the same for clients, in all three ways.
//!
//! ### `nothing_is_allocated_per_message_of_a_topic`
//!
//! `cargo test --test hot_path`: the same around two publishers and lanes of every kind, full ones too; then with a kernel that subscribes.
//!
//! ### `no_system_call_is_made_per_message_of_a_topic`
//!
//! `cargo test --test hot_path -- --nocapture`: the same for topics.
//!
//! ### `a_subscriber_that_stands_still_holds_up_nobody`
//!
//! `cargo test --test topics`: one is stopped in the middle of taking a message, and publishing goes on.
//!
//! ### `a_full_ring_gives_the_message_back_and_frees_its_slots`
//!
//! In `tests/conformance/messages.rs` on the CPU backend, and in `tests/vulkan.rs` on Vulkan in
//! each mode: a call that finds no room, or nothing, returns at once.
//!
//! ### `a_client_that_reads_nothing_holds_up_nobody`
//!
//! In `tests/conformance/clients.rs`, on every backend: whatever other clients do, sending takes no longer.
//!
//! ### `every_strategy_honours_its_timeout`
//!
//! In `src/thread/wait.rs`, by which every blocking call waits.
//!
//! ### `a_wait_ends_in_time_though_the_counter_steps_back`
//!
//! `cargo test --test counter`, on Linux on x86-64: the CPU's counter steps back, steps forward
//! (`no_wait_ends_early_though_the_counter_steps_forward`), stops, or differs between threads.
//!
//! ### `terminate_wakes_blocked_senders_and_receivers`
//!
//! In `tests/conformance/life.rs`, on the CPU backend. On every backend:
//! `terminate_wakes_those_who_wait_for_room_and_for_replies` beside it, and
//! `terminate_wakes_clients` in `clients.rs`.
//!
//! ### `a_handler_that_never_returns_is_reported_in_time`
//!
//! In `tests/conformance/faults.rs`, on the CPU backend. What a handler that never ends leads to on
//! Vulkan is in `tests/vulkan.rs` (`a_handler_that_never_ends_fails_its_kernel_or_its_device`).
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
#[cfg(all(feature = "std", not(loom)))]
mod logging;
pub mod message;
#[cfg(all(feature = "std", not(loom)))]
mod process;
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
mod system;
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

// The promises of mergers and of topics' lanes, checked over rings of the tests' own; bridge and runtime are not built under loom.
#[cfg(all(test, loom))]
#[path = "bridge/model.rs"]
mod bridge_model;
#[cfg(all(test, loom))]
#[path = "runtime/topic/model.rs"]
mod topic_model;
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
