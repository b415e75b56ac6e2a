//! A time-stamp counter that shows what a test wants, by traps (`PR_SET_TSC` of Linux).

use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering::SeqCst};

/// What is added to the counter, and to that of other threads than the test's own.
static STEP: AtomicI64 = AtomicI64::new(0);
static SKEW: AtomicI64 = AtomicI64::new(0);
static OWN_THREAD: AtomicI32 = AtomicI32::new(0);

/// Where the counter stands still; zero if it does not.
static STOPPED_AT: AtomicU64 = AtomicU64::new(0);

/// Reads by others than the system's clock.
static READS: AtomicU64 = AtomicU64::new(0);

/// The code that the kernel maps into each process: the system's clock.
static VDSO: AtomicU64 = AtomicU64::new(0);
const VDSO_BYTES: u64 = 16 * 1024;

/// Ticks that stand for a nanosecond where a test speaks of time: what matters is the magnitude.
const TICKS_PER_NS: i64 = 3;

const TRAPS: libc::c_long = libc::PR_TSC_SIGSEGV as libc::c_long;
const READABLE: libc::c_long = libc::PR_TSC_ENABLE as libc::c_long;

fn set_counter(mode: libc::c_long) -> bool {
    // SAFETY: it changes whether this thread may read the counter, and no memory.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_TSC, mode, 0, 0, 0) == 0 }
}

/// Whether reads of the counter can be made to trap here.
pub fn is_possible() -> bool {
    set_counter(READABLE)
}

/// From now on the counter of this thread, and of those that it starts, is the fake one.
pub fn install() -> bool {
    // SAFETY: the handler is async-signal-safe: it touches atomics and its own arguments, and calls
    // the system. It runs on the signal stack that std gives each thread.
    unsafe {
        VDSO.store(libc::getauxval(libc::AT_SYSINFO_EHDR), SeqCst);
        OWN_THREAD.store(libc::gettid(), SeqCst);
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_trap;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        if libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()) != 0 {
            return false;
        }
    }
    set_counter(TRAPS)
}

/// The counter steps by so many nanoseconds.
pub fn step(ns: i64) {
    STEP.fetch_add(ns * TICKS_PER_NS, SeqCst);
}

/// The counter stands still.
pub fn stop() {
    // SAFETY: it traps like every other read.
    STOPPED_AT.store(unsafe { core::arch::x86_64::_rdtsc() }, SeqCst);
}

/// The counter of all threads but the one that installed the fake is off by so many nanoseconds.
pub fn skew_others(ns: i64) {
    SKEW.store(ns * TICKS_PER_NS, SeqCst);
}

/// How often the counter was read, other than by the system's clock.
pub fn reads() -> u64 {
    READS.load(SeqCst)
}

extern "C" fn on_trap(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with `SA_SIGINFO` a valid context of its thread. Code is
    // read where the thread just executed it.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize];
        let code = at as *const u8;
        let length = match (*code, *code.add(1)) {
            // RDTSC, RDTSCP.
            (0x0f, 0x31) => 2,
            (0x0f, 0x01) if *code.add(2) == 0xf9 => 3,
            // A fault that is none of ours.
            _ => libc::abort(),
        };
        set_counter(READABLE);
        let mut core = 0;
        let mut ticks = core::arch::x86_64::__rdtscp(&raw mut core);
        set_counter(TRAPS);
        let vdso = VDSO.load(SeqCst);
        if !(vdso..vdso + VDSO_BYTES).contains(&(at as u64)) {
            READS.fetch_add(1, SeqCst);
            // Far from where it wraps.
            let mut shown = ticks
                .wrapping_add(1 << 60)
                .wrapping_add_signed(STEP.load(SeqCst));
            if libc::gettid() != OWN_THREAD.load(SeqCst) {
                shown = shown.wrapping_add_signed(SKEW.load(SeqCst));
            }
            ticks = match STOPPED_AT.load(SeqCst) {
                0 => shown,
                stopped => stopped,
            };
        }
        registers[libc::REG_RAX as usize] = (ticks & 0xffff_ffff) as i64;
        registers[libc::REG_RDX as usize] = (ticks >> 32) as i64;
        if length == 3 {
            registers[libc::REG_RCX as usize] = i64::from(core);
        }
        registers[libc::REG_RIP as usize] += length;
    }
}
