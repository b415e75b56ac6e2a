//! The system's own clock, which the counter is held against.

/// Nanoseconds since some moment before the process began: never goes back, the same on every core,
/// and not slewed towards the time of day where the system has such a clock. Some 30 ns, without a
/// system call where the system's clock source allows that.
#[cfg(any(target_os = "linux", target_os = "android"))]
#[inline]
pub(super) fn system_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a local.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &raw mut now) };
    // Since the machine was booted: neither negative nor near to 64 bits.
    (now.tv_sec as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(now.tv_nsec as u64)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(super) fn system_ns() -> u64 {
    use std::sync::OnceLock;
    use std::time::Instant;
    static BASE: OnceLock<Instant> = OnceLock::new();
    // From one on, so that no reading is zero.
    let passed = BASE.get_or_init(Instant::now).elapsed().as_nanos();
    u64::try_from(passed).unwrap_or(u64::MAX - 1) + 1
}
