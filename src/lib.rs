//! RingKernel
#![cfg_attr(not(feature = "std"), no_std)]
#![warn(clippy::unwrap_used)]

pub mod error;
pub mod message;
pub mod ring;
mod sync;

#[cfg(feature = "std")]
pub mod thread;

#[cfg(all(feature = "std", not(loom)))]
pub mod backend;
#[cfg(all(feature = "std", not(loom)))]
pub mod kernel;
#[cfg(all(feature = "std", not(loom)))]
mod runtime;
#[cfg(all(feature = "std", not(loom)))]
pub mod time;

pub use error::*;
pub use message::{MessageHeader, Priority, RingMessage};

#[cfg(all(feature = "std", not(loom)))]
pub use crate::{
    backend::{BackendType, DeviceInfo},
    kernel::{
        ControlBlock, CpuHandler, Dim3, HandlerResult, KernelContext, KernelFailure,
        KernelRegistration, KernelState, LaunchOptions, Request, TelemetryBuffer, find_kernel,
    },
    runtime::*,
    thread::WaitStrategy,
};

#[doc(hidden)]
pub mod __private {
    #[cfg(feature = "std")]
    pub use linkme;
    pub use rkyv;
}
