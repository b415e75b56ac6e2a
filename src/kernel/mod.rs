//! Floor 5: what a kernel *is*: its registration, its handler, its launch options, its states, and the blocks of memory
//! through which host and device steer and watch it.

mod builtin;
mod control_block;
mod dead_letters;
mod device_code;
mod handler;
mod options;
pub(crate) mod outlet;
mod registration;
mod registry;
mod reply_port;
mod shader;
pub(crate) mod signals;
mod state;
mod telemetry;
mod trace;
mod types;

pub use builtin::{saxpy_reply, saxpy_request};
#[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
pub(crate) use control_block::BlockFault;
#[cfg(all(test, feature = "vulkan"))]
pub(crate) use control_block::CONTROL_VALUES;
#[cfg(feature = "cuda")]
pub(crate) use control_block::NextRing;
pub(crate) use control_block::{BlockState, HostCommands};
pub use control_block::{CONTROL_BLOCK_BYTES, ControlBlock, DeviceLines, HostLine};
pub use dead_letters::{DeadLetter, DeadLetterCounts, DeadLetterQueue, DeadLetterReason};
pub(crate) use dead_letters::{DeadLetters, Lost};
#[cfg(feature = "cuda")]
pub(crate) use device_code::CudaSource;
pub use device_code::{CudaCode, MetalCode, PortableCode};
pub use handler::{CpuHandler, HandlerResult, KernelContext, Request};
pub use options::{Dim3, LaunchOptions};
pub use registration::KernelRegistration;
pub use registry::{KERNELS, find_kernel, registered_kernels};
pub(crate) use reply_port::ReplyPort;
pub use shader::ShaderCode;
#[cfg(feature = "vulkan")]
pub(crate) use shader::ShaderSource;
pub use state::{FailureReason, KernelFailure, KernelState, UndeliveredMessage};
pub(crate) use telemetry::TelemetryWriter;
pub use telemetry::{TELEMETRY_BUFFER_BYTES, Telemetry, TelemetryBuffer};
pub use trace::MessageTrace;
#[cfg(all(test, feature = "vulkan"))]
pub(crate) use trace::{CLOCK_OFFSETS, TRACE_OFFSETS};
pub(crate) use trace::{Sample, TRACE_SLOTS, TraceHeader, TraceSlot, Tracer, read as read_samples};
pub(crate) use types::TypeTable;
