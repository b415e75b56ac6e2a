//! The shape of a launch.

use std::num::NonZeroU32;
use std::sync::Arc;

use crate::thread::WaitStrategy;
use crate::time::Hlc;

/// A size in up to three dimensions, as GPU interfaces count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dim3 {
    /// First dimension.
    pub x: u32,
    /// Second dimension.
    pub y: u32,
    /// Third dimension.
    pub z: u32,
}

impl Dim3 {
    /// `x` in one dimension.
    #[must_use]
    pub const fn x(x: u32) -> Self {
        Self { x, y: 1, z: 1 }
    }

    /// All three dimensions.
    #[must_use]
    pub const fn new(x: u32, y: u32, z: u32) -> Self {
        Self { x, y, z }
    }

    /// The product of the dimensions.
    #[must_use]
    pub const fn count(&self) -> u64 {
        // Two 32-bit factors fit into 64 bits; the third may not.
        (self.x as u64 * self.y as u64).saturating_mul(self.z as u64)
    }
}

impl From<u32> for Dim3 {
    fn from(x: u32) -> Self {
        Self::x(x)
    }
}

/// What one launch asks for beyond its registration. Every `None` falls back to the registration, then to
/// [`RuntimeConfig`](crate::RuntimeConfig).
///
/// ```
/// use ringkernel::{LaunchOptions, WaitStrategy};
/// let options = LaunchOptions {
///     queue_capacity: Some(64),
///     wait: Some(WaitStrategy::Spin),
///     ..LaunchOptions::default()
/// };
/// # assert_eq!(options.max_pending_calls, 64);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchOptions {
    /// Name of this instance in errors, logs, metrics and its thread names; `None` takes the kernel's id.
    pub name: Option<String>,
    /// Index of the device; `None` takes the runtime's.
    pub device: Option<usize>,
    /// Slots of each request ring and each reply ring, 1 to 2^24, rounded up to a power of two.
    pub queue_capacity: Option<usize>,
    /// Largest payload in bytes, of requests and replies, 0 to 2^24 - 1. Slots are sized by it.
    pub message_size: Option<usize>,
    /// Adds 32 bytes to each slot, so that a message of the largest size can carry timestamp, deadline and trace id.
    pub extended: bool,
    /// How the kernel waits for requests.
    pub wait: Option<WaitStrategy>,
    /// How callers wait for its replies, and for room.
    pub host_wait: Option<WaitStrategy>,
    /// The core of each block, one a block; launching fails if one cannot be had. Empty lets the
    /// runtime choose among the device's cores: if the system then grants none of them, the blocks
    /// run where it lets them, with a warning in the log.
    pub cores: Vec<usize>,
    /// How many `call`s may be pending at once, 1 to 255; each has a buffer of `message_size`.
    pub max_pending_calls: usize,
    /// What stamps messages sent with [`SendOptions::timestamp`](crate::SendOptions::timestamp): kernels that share a clock are stamped
    /// in one order, and that of whoever else asks it. `None` gives the kernel a source of its own, to the nanosecond.
    pub hlc: Option<Arc<Hlc>>,
    /// Traces one request in so many of each block, the first one included, and every request that carries a trace id: when the
    /// kernel saw it, and when it was done with it ([`KernelHandle::traces`](crate::KernelHandle::traces)). A kernel that is
    /// traced reads the clock twice a message, and takes 16 KiB more a block. `None`, the default, traces nothing, and costs nothing. For kernels on the CPU,
    /// on CUDA, and on Vulkan where the device's shaders have a clock and the kernel a module that reads it
    /// ([`ShaderCode::traced`](crate::ShaderCode::traced)); others are not traced whatever this says.
    pub trace_every: Option<NonZeroU32>,
}

impl Default for LaunchOptions {
    fn default() -> Self {
        Self {
            name: None,
            device: None,
            queue_capacity: None,
            message_size: None,
            extended: false,
            wait: None,
            host_wait: None,
            cores: Vec::new(),
            max_pending_calls: 64,
            hlc: None,
            trace_every: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_multiply_without_overflow() {
        assert_eq!(Dim3::new(2, 3, 4).count(), 24);
        assert_eq!(Dim3::x(0).count(), 0);
        assert_eq!(Dim3::new(u32::MAX, u32::MAX, u32::MAX).count(), u64::MAX);
    }
}
