//! The numbers that a runtime works with.

use std::time::Duration;

#[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
use crate::backend::stall::StallLimits;
use crate::backend::{CudaConfig, MetalConfig, VulkanConfig};
use crate::error::Error;
use crate::ring::RingLayout;
use crate::thread::{WaitStrategy, affinity};

/// Longest time that any of the durations below may be set to: a day. A wait has to be bounded by something sensible.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// How a runtime behaves. Every field is honoured; a launch may override some by its
/// [`LaunchOptions`](crate::LaunchOptions).
///
/// | preset | `kernel_wait` | `host_wait` | `enable_telemetry` | `termination_timeout` | `default_timeout` |
/// |---|---|---|---|---|---|
/// | [`development`](Self::development) | `Park` | `Park` | on | 30 s | 30 s |
/// | [`production`](Self::production), and the default | `Auto` | `Auto` | on | 5 s | 5 s |
/// | [`high_performance`](Self::high_performance) | `Spin` | `Spin` | off | 5 s | 1 s |
///
/// All other fields are the same in the three.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// Slots of each request ring and each reply ring, for kernels that declare none: 1 to 2^24,
    /// rounded up to a power of two. Default 4096. A kernel whose messages are larger than
    /// `default_message_size` gets fewer where its rings would hold more than 16 MiB of payload
    /// each (or what both defaults together come to, if that is more): as many as fit, at least 4.
    /// A capacity that a launch or a registration names is never changed.
    pub default_queue_capacity: usize,
    /// Largest payload in bytes, for kernels that declare none: 0 to 2^24 - 1. Default 48, which is one cache line
    /// with its header.
    pub default_message_size: usize,
    /// How long a thread that polls rings on behalf of a device (the threads of the CPU backend, and each device's bridge) sleeps between
    /// two empty polls. Zero, the default, means that the wait strategy decides; anything else overrides it, saves the
    /// core, and adds up to that much latency. At most a day.
    pub bridge_poll_interval: Duration,
    /// How long `activate`, `deactivate` and `terminate` wait for a kernel. Default 5 s; 1 ms to a day.
    pub termination_timeout: Duration,
    /// How long the kernels that run on a device may show no progress (no heartbeat, no message, no
    /// new slice) until the device counts as lost and every kernel on it fails. A device that
    /// answers late is not lost; one that its driver reports as lost is lost at once. `None`, the
    /// default, means 10 s on hardware and 30 s on a driver that runs on this machine's cores,
    /// which may lack processor time. A handler that never returns holds its device for as long,
    /// unless the driver cuts its loops. At least 100 ms, at most a day. No effect on the CPU
    /// backend.
    pub stall_timeout: Option<Duration>,
    /// How the thread of a device's bridge waits ([`RingBufferBridge`](crate::RingBufferBridge)). While it spins, clients leave the moving of
    /// messages between lanes and kernels to it; else those who wait for replies do so themselves. It only ever spins while several clients
    /// share a kernel, or one is subscribed to a topic; with `Auto`, the default, if there is a core for it then.
    pub bridge_wait: WaitStrategy,
    /// The core that the bridges' threads run on; building the runtime, or what needs a bridge
    /// later, fails if it cannot be had. `None`, the default, lets them run on any that is not
    /// reserved.
    pub bridge_core: Option<usize>,
    /// Whether kernels keep [`Telemetry`](crate::kernel::Telemetry). It costs two counter reads (some 20 ns) a
    /// message.
    pub enable_telemetry: bool,
    /// How kernels wait for requests.
    pub kernel_wait: WaitStrategy,
    /// How callers wait for replies, and for room.
    pub host_wait: WaitStrategy,
    /// How long `send` and `recv`, which take no timeout, wait. Default 5 s, at most a day.
    pub default_timeout: Duration,
    /// How often a kernel that sleeps wakes up to show a sign of life. Default 1 s; 1 ms to a day.
    pub heartbeat_interval: Duration,
    /// Cores that no kernel is put on unless a launch names them, nor any thread of a GPU driver or of this crate: those
    /// of the callers. Ignored if that would leave none. A software GPU leaves one core free if this is empty.
    pub reserved_cores: Vec<usize>,
    /// How many CPU devices there are; more than one share the cores and stand in for several devices. Default 1, at
    /// most 64.
    pub cpu_devices: usize,
    /// Bytes that kernels, their clients, and topics may take on each CPU device; `None` means an
    /// even share of the least of the machine's memory, the limits of the process's control groups
    /// (version 1 and 2), `RLIMIT_AS` and `RLIMIT_DATA`. Whatever this says, on Linux what would
    /// take more than the process can still have is [`Error::OutOfMemory`]. Swap does not count as
    /// memory, what the system can drop (contents of files) does, and `memory.high` is a limit like
    /// `memory.max`: beyond it, the system slows the process down.
    pub cpu_memory_limit: Option<u64>,
    /// Whether this process's memory for rings (those of kernels on the CPU backend, and clients' lanes on all) is to lie in huge pages: each
    /// ring of at least 2 MiB, by `madvise` on Linux, as far as the system grants it. No effect on other systems. Default false. Rings are
    /// written to when they are taken, in pages of either size, so that no message has to fault one in.
    pub huge_pages: bool,
    /// Messages that could not be delivered and wait to be read ([`DeadLetterQueue`](crate::kernel::DeadLetterQueue)); the oldest make
    /// room for newer ones. Default 256; 0 keeps none, at most 2^20.
    pub dead_letter_capacity: usize,
    /// Bytes of its payload that each of them keeps; the memory is taken when the runtime is built. Default 256; at most 1 MiB, and
    /// 1 GiB for all of them.
    pub dead_letter_bytes: usize,
    /// How the Vulkan backend works.
    pub vulkan: VulkanConfig,
    /// How the CUDA backend works.
    pub cuda: CudaConfig,
    /// How the Metal backend works.
    pub metal: MetalConfig,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            default_queue_capacity: 4096,
            default_message_size: 48,
            bridge_poll_interval: Duration::ZERO,
            bridge_wait: WaitStrategy::Auto,
            bridge_core: None,
            termination_timeout: Duration::from_secs(5),
            stall_timeout: None,
            enable_telemetry: true,
            kernel_wait: WaitStrategy::Auto,
            host_wait: WaitStrategy::Auto,
            default_timeout: Duration::from_secs(5),
            heartbeat_interval: Duration::from_secs(1),
            reserved_cores: Vec::new(),
            cpu_devices: 1,
            cpu_memory_limit: None,
            huge_pages: false,
            dead_letter_capacity: 256,
            dead_letter_bytes: 256,
            vulkan: VulkanConfig::default(),
            cuda: CudaConfig::default(),
            metal: MetalConfig::default(),
        }
    }
}

impl RuntimeConfig {
    /// For a developer's machine: nothing spins, and timeouts leave time for a debugger.
    #[must_use]
    pub fn development() -> Self {
        Self {
            kernel_wait: WaitStrategy::Park,
            host_wait: WaitStrategy::Park,
            bridge_wait: WaitStrategy::Park,
            termination_timeout: Duration::from_secs(30),
            default_timeout: Duration::from_secs(30),
            ..Self::default()
        }
    }

    /// The default: spins where there are cores for it.
    #[must_use]
    pub fn production() -> Self {
        Self::default()
    }

    /// For machines with a core for every spinning thread: nothing ever sleeps, nothing is counted.
    #[must_use]
    pub fn high_performance() -> Self {
        Self {
            kernel_wait: WaitStrategy::Spin,
            host_wait: WaitStrategy::Spin,
            enable_telemetry: false,
            default_timeout: Duration::from_secs(1),
            ..Self::default()
        }
    }

    /// How long devices may show no progress.
    #[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
    pub(crate) fn stall_limits(&self) -> StallLimits {
        StallLimits::new(self.stall_timeout, self.termination_timeout)
    }

    /// Fails on the first value that is out of its range.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let invalid = |option, reason: String| Err(Error::InvalidOption { option, reason });
        if let Err(error) =
            RingLayout::new(self.default_queue_capacity, self.default_message_size, true)
        {
            return invalid(
                "default_queue_capacity or default_message_size",
                error.to_string(),
            );
        }
        for (option, value) in [
            ("bridge_poll_interval", self.bridge_poll_interval),
            ("termination_timeout", self.termination_timeout),
            ("default_timeout", self.default_timeout),
            ("heartbeat_interval", self.heartbeat_interval),
        ] {
            if value > LONGEST {
                return invalid(option, format!("{value:?} exceeds a day"));
            }
        }
        for (option, value) in [
            ("termination_timeout", self.termination_timeout),
            ("heartbeat_interval", self.heartbeat_interval),
        ] {
            if value < Duration::from_millis(1) {
                return invalid(option, format!("{value:?} is below 1 ms"));
            }
        }
        if let Some(value) = self.stall_timeout
            && !(Duration::from_millis(100)..=LONGEST).contains(&value)
        {
            let reason = format!("{value:?} is not within 100 ms to a day");
            return invalid("stall_timeout", reason);
        }
        if !(1..=64).contains(&self.cpu_devices) {
            return invalid(
                "cpu_devices",
                format!("{} is not within 1 to 64", self.cpu_devices),
            );
        }
        for (option, value) in [
            ("dead_letter_capacity", self.dead_letter_capacity),
            ("dead_letter_bytes", self.dead_letter_bytes),
        ] {
            if value > 1 << 20 {
                return invalid(option, format!("{value} exceeds 2^20"));
            }
        }
        let bytes = self.dead_letter_capacity as u64 * self.dead_letter_bytes as u64;
        if bytes > 1 << 30 {
            let reason = format!("{bytes} bytes of dead letters exceed 2^30");
            return invalid("dead_letter_bytes", reason);
        }
        self.cuda.validate()?;
        affinity::check_cores(&self.reserved_cores)?;
        if let Some(core) = self.bridge_core {
            affinity::try_core(core)?;
        }
        Ok(())
    }
}
