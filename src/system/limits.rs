//! Limits that the system sets to this process.

/// What is limited.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Resource {
    /// Bytes of addresses.
    AddressSpace,
    /// Bytes of private memory.
    Data,
    /// Bytes that stay in RAM.
    LockedMemory,
    /// Microseconds that a realtime thread may run without a blocking call.
    RealtimeTime,
}

/// The soft and the hard limit; `None` where there is none, each for itself.
#[cfg(target_os = "linux")]
pub(crate) fn limits(resource: Resource) -> (Option<u64>, Option<u64>) {
    let which = match resource {
        Resource::AddressSpace => libc::RLIMIT_AS,
        Resource::Data => libc::RLIMIT_DATA,
        Resource::LockedMemory => libc::RLIMIT_MEMLOCK,
        Resource::RealtimeTime => libc::RLIMIT_RTTIME,
    };
    let mut limits = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a local.
    if unsafe { libc::getrlimit(which, &raw mut limits) } != 0 {
        return (None, None);
    }
    // On 32-bit systems they may have fewer bits.
    #[allow(clippy::useless_conversion)]
    let finite = |limit: libc::rlim_t| (limit != libc::RLIM_INFINITY).then(|| limit.into());
    (finite(limits.rlim_cur), finite(limits.rlim_max))
}

/// Nothing is known of other systems.
#[cfg(not(target_os = "linux"))]
pub(crate) fn limits(_resource: Resource) -> (Option<u64>, Option<u64>) {
    (None, None)
}
