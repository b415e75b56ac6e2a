//! What the driver can be told to do wrong, or differently (`rk_fake_arm`); 0 is nothing.

/// Memory is refused.
pub const NO_MEMORY: u32 = 1;
/// A kernel fails with an error that sticks.
pub const FAULTY_KERNEL: u32 = 2;
/// There is no device.
pub const NO_DEVICES: u32 = 3;
/// Devices end kernels that run for long.
pub const WATCHDOG: u32 = 4;
/// Devices are older than system-scope accesses.
pub const OLD_DEVICE: u32 = 5;
/// The compiler is older than the device.
pub const OLD_COMPILER: u32 = 6;
/// Memory is not imported.
pub const NO_IMPORT: u32 = 7;
/// Kernels need local memory.
pub const LOCAL_MEMORY: u32 = 8;
/// Another thread captures a graph.
pub const FOREIGN_CAPTURE: u32 = 9;
