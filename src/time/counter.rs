//! The CPU's own counter, and whether the system trusts it.

#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn counter() -> u64 {
    // SAFETY: RDTSC is part of the x86-64 baseline, and every OS that std supports leaves it
    // enabled for users.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(target_arch = "aarch64")]
#[inline]
pub(super) fn counter() -> u64 {
    let ticks: u64;
    // SAFETY: `cntvct_el0` is readable from user space on every AArch64 OS that Rust's std
    // supports.
    unsafe { core::arch::asm!("mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack)) };
    ticks
}

/// As `counter`, after everything before it: a counter may be read out of order, before a load that
/// precedes it has given its value.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn counter_ordered() -> u64 {
    // Intel SDM volume 2, RDTSC: "LFENCE immediately before". AMD processors wait as well, with the
    // setting that systems boot with (APM volume 3, LFENCE).
    // SAFETY: SSE2 is part of the x86-64 baseline.
    unsafe { core::arch::x86_64::_mm_lfence() };
    counter()
}

#[cfg(target_arch = "aarch64")]
#[inline]
pub(super) fn counter_ordered() -> u64 {
    // Arm ARM, "Ordering of reads of the counters": a read may be early but for an ISB before it.
    // SAFETY: a barrier has no preconditions. It may not be moved across memory accesses, so it
    // says nothing of `nomem`.
    unsafe { core::arch::asm!("isb", options(nostack)) };
    counter()
}

/// Ticks per second, where the processor tells.
#[cfg(target_arch = "aarch64")]
pub(super) fn frequency() -> u64 {
    let frequency: u64;
    // SAFETY: `cntfrq_el0` is readable from user space on every AArch64 OS that Rust's std
    // supports.
    unsafe {
        core::arch::asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nomem, nostack));
    }
    frequency
}

/// Why the counter must not be read; `None` if it may be.
pub(super) fn objection() -> Option<String> {
    #[cfg(target_arch = "x86_64")]
    if !is_invariant() {
        let reason = "the processor does not promise a time-stamp counter of constant rate";
        return Some(reason.to_owned());
    }
    #[cfg(any(target_os = "linux", target_os = "android"))]
    if let Some(current) = read_source("current") {
        let available = read_source("available").unwrap_or_default();
        if !system_trusts_counter(&current, &available) {
            return Some(format!("the system's own clock source is {current}"));
        }
    }
    None
}

/// Whether the counter runs at a constant rate in every power state: CPUID leaf 0x8000_0007, EDX
/// bit 8 (Intel SDM volume 3, "Invariant TSC"; the same bit on AMD).
#[cfg(target_arch = "x86_64")]
fn is_invariant() -> bool {
    use core::arch::x86_64::__cpuid;
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & (1 << 8) != 0
}

/// What the kernel says of its clock sources. `None` in a sandbox without `/sys`: then the checks
/// at run time are all there is.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn read_source(which: &str) -> Option<String> {
    let path = format!("/sys/devices/system/clocksource/clocksource0/{which}_clocksource");
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}

/// Whether a Linux kernel whose clock sources are these regards the counter as sound.
///
/// A kernel that finds the time-stamp counter unstable chooses another source. The sources of
/// hypervisors are computed from that counter, and some kernels prefer them to a sound one: they
/// count if the kernel lists the counter as available, from which it strikes an unstable one.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn system_trusts_counter(current: &str, available: &str) -> bool {
    #[cfg(target_arch = "x86_64")]
    const OWN: &str = "tsc";
    #[cfg(not(target_arch = "x86_64"))]
    const OWN: &str = "arch_sys_counter";
    const COMPUTED: [&str; 3] = ["kvm-clock", "hyperv_clocksource_tsc_page", "xen"];
    let is_available = || available.split_whitespace().any(|source| source == OWN);
    current == OWN || COMPUTED.contains(&current) && is_available()
}

#[cfg(all(test, target_os = "linux", target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_the_kernel_has_given_up_is_not_read() {
        for current in ["hpet", "acpi_pm", "jiffies", "refined-jiffies", ""] {
            for available in ["hpet acpi_pm", "tsc hpet acpi_pm", ""] {
                assert!(!system_trusts_counter(current, available), "{current}");
            }
        }
        // The kernel strikes an unstable counter from the list.
        for current in ["kvm-clock", "hyperv_clocksource_tsc_page", "xen"] {
            assert!(!system_trusts_counter(current, "kvm-clock hpet acpi_pm"));
            assert!(!system_trusts_counter(current, ""));
        }
        assert!(!system_trusts_counter("hyperv_clocksource_msr", "tsc"));
    }

    #[test]
    fn a_counter_that_the_kernel_uses_or_could_use_is_read() {
        assert!(system_trusts_counter("tsc", "tsc hpet acpi_pm"));
        assert!(system_trusts_counter("tsc", ""));
        for current in ["kvm-clock", "hyperv_clocksource_tsc_page", "xen"] {
            assert!(system_trusts_counter(current, "tsc kvm-clock acpi_pm"));
        }
    }
}
