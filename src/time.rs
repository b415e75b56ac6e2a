//! Floor 1: a clock that costs one counter read, and deadlines on it.
//!
//! On x86-64 with an invariant time-stamp counter and on AArch64 the CPU's own counter is read,
//! where the operating system trusts it; elsewhere the system's monotonic clock. The x86 counter is
//! calibrated once against that clock: 10 ms, with an error below 10 ppm. A counter that steps,
//! stops, or differs between cores by a quarter of a millisecond is found out by comparison with
//! the system's clock, and read no more ([`clock_source`]). Waits end by the system's clock in any
//! case.

mod checked;
mod clock;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod counter;
mod deadline;
mod device_clock;
mod hlc;
mod stamps;
mod system;

pub use clock::{ClockSource, clock_source, now_ns, now_ns_ordered};
pub(crate) use clock::{Stopwatch, initialise, ticks, ticks_to_nanos};
pub use deadline::Deadline;
pub(crate) use device_clock::{Bracket, DeviceClock, HostTime};
pub use hlc::{Hlc, HlcTimestamp, TooFarAhead};
pub(crate) use stamps::Stamps;
pub use stamps::TimestampSource;
