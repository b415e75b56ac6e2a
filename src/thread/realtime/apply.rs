//! Asks the system for each setting, for the calling thread.

use std::hint::black_box;

use super::report::{Refusal, Schedule};
use crate::system::memory;
#[cfg(target_os = "linux")]
use crate::thread::affinity;

/// Step in which stack and heap are touched: the smallest page there is.
const PAGE: usize = 4096;

/// Bytes of stack that a thread may use while it prefaults, beside what it prefaults.
pub(super) const STACK_MARGIN: usize = 64 * 1024;

/// A piece of heap that is taken while prefaulting: below the size from which allocators map each piece for itself (128 KiB in
/// glibc, `M_MMAP_THRESHOLD`).
const HEAP_PIECE: usize = 64 * 1024;

/// Most bytes of heap that can be prefaulted: a thread's own heap has 64 MiB (`HEAP_MAX_SIZE` of glibc on 64-bit systems), and further
/// ones are given back whatever the allocator was told.
const HEAP_MOST: usize = 48 << 20;

fn refused(reason: impl Into<String>, remedy: &'static str) -> Refusal {
    Refusal {
        errno: None,
        reason: reason.into(),
        limit: None,
        remedy,
    }
}

#[cfg(not(target_os = "linux"))]
fn elsewhere() -> Refusal {
    refused("this system is not Linux: nothing is known of it here", "")
}

/// On these cores, in ascending order, or where the thread was before.
#[cfg(target_os = "linux")]
pub(super) fn cores(cores: &[usize]) -> Result<(), Refusal> {
    affinity::confine_current_thread(cores).map_err(|error| {
        refused(
            error.to_string(),
            "name cores that are online and that the process's cpuset holds",
        )
    })
}

#[cfg(not(target_os = "linux"))]
pub(super) fn cores(_cores: &[usize]) -> Result<(), Refusal> {
    Err(elsewhere())
}

/// A resource limit of this process, as people write it; `None` if there is none. A macro because the type of a limit's name differs
/// between C libraries.
#[cfg(target_os = "linux")]
macro_rules! limit {
    ($name:literal, $which:expr) => {{
        let mut limits = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the pointer is to a local.
        let told = unsafe { libc::getrlimit($which, &raw mut limits) };
        (told == 0 && limits.rlim_cur != libc::RLIM_INFINITY)
            .then(|| format!("{} is {}", $name, limits.rlim_cur))
    }};
}

#[cfg(target_os = "linux")]
pub(super) fn schedule(schedule: Schedule) -> Result<(), Refusal> {
    use std::io::Error;
    let set = |policy: libc::c_int, priority: u8| {
        // SAFETY: plain numbers, of which some systems have more than this one.
        let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
        parameters.sched_priority = priority.into();
        // By number, because musl's function of this name refuses whatever it is asked for. A thread that this one starts is ordinary
        // again: threads of drivers and kernels do not inherit the priority.
        let policy = match priority {
            0 => policy,
            _ => policy | libc::SCHED_RESET_ON_FORK,
        };
        // SAFETY: the pointer is to a local; 0 is the calling thread.
        let set = unsafe {
            libc::syscall(
                libc::SYS_sched_setscheduler,
                0,
                policy,
                &raw const parameters,
            )
        };
        match set {
            0 => Ok(()),
            _ => Err(Refusal::of(
                &Error::last_os_error(),
                limit!("RLIMIT_RTPRIO", libc::RLIMIT_RTPRIO),
                "raise it (`ulimit -r`, rtprio in /etc/security/limits.conf, LimitRTPRIO= of a service), or grant CAP_SYS_NICE",
            )),
        }
    };
    match schedule {
        Schedule::Fifo(priority) => set(libc::SCHED_FIFO, priority),
        Schedule::RoundRobin(priority) => set(libc::SCHED_RR, priority),
        Schedule::Nice(nice) => {
            // A nice value means nothing to a realtime schedule.
            set(libc::SCHED_OTHER, 0)?;
            // SAFETY: no pointers; 0 is the calling thread (setpriority(2), "C library/kernel differences").
            match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice.into()) } {
                0 => Ok(()),
                _ => Err(Refusal::of(
                    &Error::last_os_error(),
                    limit!("RLIMIT_NICE", libc::RLIMIT_NICE),
                    "raise it (`ulimit -e`, nice in /etc/security/limits.conf, LimitNICE= of a service), or grant CAP_SYS_NICE",
                )),
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn schedule(_schedule: Schedule) -> Result<(), Refusal> {
    Err(elsewhere())
}

/// For the whole process: whatever is mapped now and later stays in RAM.
#[cfg(target_os = "linux")]
pub(super) fn lock_memory() -> Result<(), Refusal> {
    // SAFETY: no pointers.
    match unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } {
        0 => Ok(()),
        _ => Err(Refusal::of(
            &std::io::Error::last_os_error(),
            limit!("RLIMIT_MEMLOCK", libc::RLIMIT_MEMLOCK),
            "raise it (`ulimit -l`, memlock in /etc/security/limits.conf, LimitMEMLOCK= of a service), or grant CAP_IPC_LOCK",
        )),
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn lock_memory() -> Result<(), Refusal> {
    Err(elsewhere())
}

/// Bytes of the calling thread's stack below this frame.
#[cfg(target_os = "linux")]
fn stack_left() -> Option<usize> {
    let here = 0_u8;
    let here = std::ptr::from_ref(black_box(&here)) as usize;
    // SAFETY: the attributes are initialised by the first call, read by the second and given back by the third.
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        if libc::pthread_getattr_np(libc::pthread_self(), &raw mut attributes) != 0 {
            return None;
        }
        let (mut lowest, mut size) = (std::ptr::null_mut(), 0);
        let told =
            libc::pthread_attr_getstack(&raw const attributes, &raw mut lowest, &raw mut size);
        libc::pthread_attr_destroy(&raw mut attributes);
        (told == 0).then(|| here.saturating_sub(lowest as usize))
    }
}

#[cfg(not(target_os = "linux"))]
fn stack_left() -> Option<usize> {
    None
}

/// Leave to write to so many bytes of new memory.
fn granted(bytes: usize) -> Result<memory::Grant, Refusal> {
    memory::ask(bytes as u64).map_err(|left| {
        refused(
            format!("the process may only have {left} bytes more of memory"),
            "raise the limit of its control group, or RLIMIT_AS",
        )
    })
}

/// Touches so many bytes of stack below this frame.
pub(super) fn stack(bytes: usize) -> Result<(), Refusal> {
    match stack_left() {
        None => Err(refused(
            "the system does not tell how large the stack is",
            "",
        )),
        Some(left) if left < bytes.saturating_add(STACK_MARGIN) => Err(refused(
            format!("only {left} bytes of stack are left"),
            "start the thread with a larger stack",
        )),
        Some(_) => {
            let _grant = granted(bytes)?;
            let here = 0_u8;
            let here = std::ptr::from_ref(black_box(&here)) as usize;
            touch_stack(here.saturating_sub(bytes));
            Ok(())
        }
    }
}

/// Goes down until a frame lies at this address or below. Half a page a frame, so that no page is passed over.
#[inline(never)]
fn touch_stack(until: usize) {
    let mut frame = [0_u8; PAGE / 2];
    let here = black_box(&mut frame).as_ptr() as usize;
    if here > until {
        touch_stack(until);
    }
    // The frame lives until here, so that the call above cannot reuse it.
    black_box(&mut frame);
}

/// Takes so many bytes of heap, touches them, and gives them back to the allocator, which is told to keep them (glibc).
pub(super) fn heap(bytes: usize) -> Result<(), Refusal> {
    if bytes > HEAP_MOST {
        return Err(refused(
            format!("no more than {HEAP_MOST} bytes are certain to be kept"),
            "",
        ));
    }
    let _grant = granted(bytes)?;
    keep_heap()?;
    let mut pieces: Vec<Vec<u8>> = Vec::with_capacity(bytes.div_ceil(HEAP_PIECE));
    let mut left = bytes;
    while left > 0 {
        let size = left.min(HEAP_PIECE);
        let mut piece: Vec<u8> = Vec::new();
        if piece.try_reserve_exact(size).is_err() {
            return Err(refused("there is not so much memory", ""));
        }
        for page in piece.spare_capacity_mut().chunks_mut(PAGE) {
            if let Some(byte) = page.first_mut() {
                // A volatile store cannot be left out although nobody reads it.
                // SAFETY: the byte is within the allocation.
                unsafe { byte.as_mut_ptr().write_volatile(0) };
            }
        }
        pieces.push(piece);
        left -= size;
    }
    Ok(())
}

/// Tells the allocator not to give memory back to the system, for the whole process (mallopt(3)).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_heap() -> Result<(), Refusal> {
    // SAFETY: no pointers; both parameters may be set at any time.
    let kept = unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX) != 0
            && libc::mallopt(libc::M_MMAP_MAX, 0) != 0
    };
    match kept {
        true => Ok(()),
        false => Err(refused("the allocator does not take the settings", "")),
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_heap() -> Result<(), Refusal> {
    Err(refused("nothing is known of this system's allocator", ""))
}

/// Asks the power management for it as long as the calling thread lives (Documentation/power/pm_qos_interface.rst: 32 bits of
/// microseconds, in force while the file is open).
#[cfg(target_os = "linux")]
pub(super) fn wake_latency(latency: std::time::Duration) -> Result<(), Refusal> {
    use std::cell::RefCell;
    use std::fs::{File, OpenOptions};
    use std::io::Write;
    thread_local! {
        static OPEN: RefCell<Option<File>> = const { RefCell::new(None) };
    }
    let microseconds = i32::try_from(latency.as_micros()).unwrap_or(i32::MAX);
    let asked = OpenOptions::new()
        .write(true)
        .open("/dev/cpu_dma_latency")
        .and_then(|mut file| {
            file.write_all(&microseconds.to_ne_bytes())?;
            Ok(file)
        });
    match asked {
        Ok(file) => {
            OPEN.with_borrow_mut(|open| *open = Some(file));
            Ok(())
        }
        Err(error) => Err(Refusal::of(
            &error,
            None,
            "let the user write to /dev/cpu_dma_latency (a udev rule, or a group)",
        )),
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn wake_latency(_latency: std::time::Duration) -> Result<(), Refusal> {
    Err(elsewhere())
}

/// Makes denormal inputs and results zero.
///
/// # Safety
/// See `RealtimeThread::flush_to_zero`.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn flush_to_zero() -> Result<(), Refusal> {
    /// Flush-to-zero and denormals-are-zero (Intel SDM volume 1, 10.2.3, "MXCSR Control and Status Register").
    const FLUSH: u32 = 1 << 15 | 1 << 6;
    let mut control = 0_u32;
    // SAFETY: both instructions access the local by its address; the caller takes over what the new mode means.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut control, options(nostack, preserves_flags));
        control |= FLUSH;
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const control, options(nostack, preserves_flags, readonly));
    }
    Ok(())
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(target_arch = "aarch64")]
pub(super) unsafe fn flush_to_zero() -> Result<(), Refusal> {
    /// FPCR.FZ (Arm Architecture Reference Manual, "FPCR, Floating-point Control Register").
    const FLUSH: u64 = 1 << 24;
    let mut control: u64;
    // SAFETY: the register may be read and written in user mode; the caller takes over what the new mode means.
    unsafe {
        std::arch::asm!("mrs {}, fpcr", out(reg) control, options(nomem, nostack, preserves_flags));
        control |= FLUSH;
        std::arch::asm!("msr fpcr, {}", in(reg) control, options(nomem, nostack, preserves_flags));
    }
    Ok(())
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) unsafe fn flush_to_zero() -> Result<(), Refusal> {
    Err(refused("nothing is known of this processor's modes", ""))
}
