//! Cores that the user did not name never decide whether something runs: on systems whose
//! `sched_setaffinity` and `sched_getaffinity` behave as in a container, in a sandbox, or on a very
//! large machine. Both functions are replaced here, for the whole test program; one test at a time
//! says how they behave.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use ringkernel::thread::affinity;
use ringkernel::thread::realtime::{Need, RealtimeThread};
use ringkernel::{
    BackendType, Error, KernelHandle, LaunchOptions, RingKernelRuntime, RuntimeConfig, WaitStrategy,
};

/// As the system is.
const PLAIN: usize = 0;
/// The process's cpuset has only the last of its cores left.
const SHRUNK: usize = 1;
/// A sandbox refuses to place threads.
const REFUSED: usize = 2;
/// The cores have numbers from [`FIRST`] on, and smaller sets are refused.
const LARGE: usize = 3;

const FIRST: usize = 1500;
const WORDS: usize = 64;

static SYSTEM: AtomicUsize = AtomicUsize::new(PLAIN);
/// The one core that a shrunk cpuset has.
static LEFT: AtomicUsize = AtomicUsize::new(0);
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

type Set = [u64; WORDS];

fn fail(number: i32) -> i32 {
    // SAFETY: the address of this thread's error number.
    unsafe { *libc::__errno_location() = number };
    -1
}

fn cores_of(set: &[u64]) -> impl Iterator<Item = usize> {
    (0..set.len() * 64).filter(|core| set[core / 64] >> (core % 64) & 1 != 0)
}

fn set_of(cores: impl IntoIterator<Item = usize>) -> Set {
    let mut set = [0; WORDS];
    // As the system does, which ignores what no core can have.
    for core in cores.into_iter().filter(|core| *core < WORDS * 64) {
        set[core / 64] |= 1 << (core % 64);
    }
    set
}

/// Replaces the C library's.
///
/// # Safety
/// As of that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sched_getaffinity(thread: i32, size: usize, mask: *mut u64) -> i32 {
    let system = SYSTEM.load(Ordering::SeqCst);
    if system == LARGE && size < (FIRST + 64) / 8 {
        return fail(libc::EINVAL);
    }
    let mut real = [0; WORDS];
    // SAFETY: the pointer and the size describe the set.
    let got = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            thread,
            size_of_val(&real),
            real.as_mut_ptr(),
        )
    };
    if got < 0 {
        return -1;
    }
    let shown = match system {
        SHRUNK => set_of([LEFT.load(Ordering::SeqCst)]),
        LARGE => set_of(cores_of(&real).map(|core| core + FIRST)),
        _ => real,
    };
    // SAFETY: the caller's set has `size` bytes.
    let given = unsafe { std::slice::from_raw_parts_mut(mask, size / 8) };
    for (index, word) in given.iter_mut().enumerate() {
        *word = shown.get(index).copied().unwrap_or(0);
    }
    0
}

/// Replaces the C library's.
///
/// # Safety
/// As of that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sched_setaffinity(thread: i32, size: usize, mask: *const u64) -> i32 {
    // SAFETY: the caller's set has `size` bytes.
    let wanted = unsafe { std::slice::from_raw_parts(mask, size / 8) };
    let real = match SYSTEM.load(Ordering::SeqCst) {
        REFUSED => return fail(libc::EPERM),
        SHRUNK => {
            let left = LEFT.load(Ordering::SeqCst);
            set_of(cores_of(wanted).filter(|core| *core == left))
        }
        LARGE => set_of(cores_of(wanted).filter_map(|core| core.checked_sub(FIRST))),
        _ => set_of(cores_of(wanted)),
    };
    // SAFETY: the pointer and the size describe the set.
    let set = unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            thread,
            size_of_val(&real),
            real.as_ptr(),
        )
    };
    if set < 0 { -1 } else { 0 }
}

/// How the system behaves until this is dropped.
struct System {
    _alone: MutexGuard<'static, ()>,
}

impl System {
    fn plain() -> Self {
        let alone = ONE_AT_A_TIME
            .lock()
            .unwrap_or_else(|panicked| panicked.into_inner());
        Self { _alone: alone }
    }

    fn becomes(&self, system: usize) {
        SYSTEM.store(system, Ordering::SeqCst);
    }
}

impl Drop for System {
    fn drop(&mut self) {
        self.becomes(PLAIN);
    }
}

fn runtime(config: RuntimeConfig) -> Result<RingKernelRuntime, Error> {
    RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .config(config)
        .build()
}

const STRATEGIES: [WaitStrategy; 4] = [
    WaitStrategy::Park,
    WaitStrategy::Auto,
    WaitStrategy::Spin,
    WaitStrategy::SpinYield,
];

fn launch(
    runtime: &RingKernelRuntime,
    wait: WaitStrategy,
    cores: &[usize],
) -> Result<KernelHandle, Error> {
    let options = LaunchOptions {
        wait: Some(wait),
        cores: cores.to_vec(),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("echo", 1, 1, options)?;
    kernel.activate()?;
    answers(&kernel);
    Ok(kernel)
}

fn answers(kernel: &KernelHandle) {
    let mut reply = [0; 48];
    kernel
        .call_bytes(b"x", &mut reply, Duration::from_secs(30))
        .unwrap();
    // By way of the bridge, too.
    let mut client = kernel.client_bytes().unwrap();
    client
        .call_bytes(b"y", &mut reply, Duration::from_secs(30))
        .unwrap();
}

fn is_about_cores(error: &Error) -> bool {
    matches!(
        error,
        Error::PinningFailed { .. } | Error::CoreNotFound { .. }
    )
}

#[test]
fn kernels_run_on_what_a_shrunk_cpuset_has_left() {
    let system = System::plain();
    let all = affinity::usable_cores();
    let [first, .., last] = all[..] else {
        println!("skipped: it takes two cores");
        return;
    };
    let runtime = runtime(RuntimeConfig::default()).unwrap();
    // The highest core is taken first.
    let taken = launch(&runtime, WaitStrategy::Spin, &[first]).unwrap();
    assert_eq!(taken.metrics().cores, [first]);
    LEFT.store(last, Ordering::SeqCst);
    system.becomes(SHRUNK);
    assert_eq!(affinity::usable_cores(), [last]);
    // The system has moved it.
    assert_eq!(taken.metrics().cores, [last]);
    taken.terminate().unwrap();
    for wait in STRATEGIES {
        let kernel = launch(&runtime, wait, &[]).unwrap();
        assert_eq!(kernel.metrics().cores, [last], "{wait:?}");
        kernel.terminate().unwrap();
    }
    // What a user names is an error if it cannot be had.
    let error = launch(&runtime, WaitStrategy::Park, &[first]).unwrap_err();
    assert!(is_about_cores(&error), "{error}");
    let kernel = launch(&runtime, WaitStrategy::Spin, &[last]).unwrap();
    assert_eq!(kernel.metrics().cores, [last]);
    kernel.terminate().unwrap();
    system.becomes(PLAIN);
    assert_eq!(affinity::usable_cores(), all);
}

#[test]
fn a_sandbox_that_refuses_placement_refuses_only_what_was_named() {
    let system = System::plain();
    system.becomes(REFUSED);
    let mine = affinity::current_affinity();
    let core = mine[0];
    assert_eq!(affinity::usable_cores(), mine);
    for config in [
        RuntimeConfig::default(),
        RuntimeConfig {
            reserved_cores: vec![core],
            ..RuntimeConfig::default()
        },
    ] {
        let runtime = runtime(config).unwrap();
        for wait in STRATEGIES {
            let kernel = launch(&runtime, wait, &[]).unwrap();
            // Where it is, not where it was to be.
            let expected = if mine.len() == 1 { &mine[..] } else { &[] };
            assert_eq!(kernel.metrics().cores, expected, "{wait:?}");
            kernel.terminate().unwrap();
            let error = launch(&runtime, wait, &[core]).unwrap_err();
            assert!(matches!(error, Error::PinningFailed { .. }), "{error}");
        }
    }
    let bridge = RuntimeConfig {
        bridge_core: Some(core),
        ..RuntimeConfig::default()
    };
    let error = runtime(bridge).unwrap_err();
    assert!(matches!(error, Error::PinningFailed { .. }), "{error}");
    let error = affinity::pin_current_thread(core).unwrap_err();
    assert!(matches!(error, Error::PinningFailed { .. }), "{error}");
    let thread = || RealtimeThread::new("rt");
    let error = thread().cores(&[core], Need::Required).adopt().unwrap_err();
    assert!(matches!(error, Error::RealtimeRefused { .. }), "{error}");
    let report = thread().cores(&[core], Need::BestEffort).adopt().unwrap();
    assert!(!report.is_complete());
}

#[test]
fn a_bridge_that_lost_its_core_says_so_when_it_is_needed() {
    let system = System::plain();
    let core = affinity::usable_cores()[0];
    let config = RuntimeConfig {
        bridge_core: Some(core),
        ..RuntimeConfig::default()
    };
    let runtime = runtime(config).unwrap();
    let kernel = runtime
        .launch("echo", 1, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    system.becomes(REFUSED);
    let error = kernel.client_bytes().unwrap_err();
    assert!(matches!(error, Error::PinningFailed { .. }), "{error}");
    system.becomes(PLAIN);
    answers(&kernel);
}

#[test]
fn cores_beyond_the_first_thousand_are_used() {
    let system = System::plain();
    let real = affinity::usable_cores();
    system.becomes(LARGE);
    let cores: Vec<usize> = real.iter().map(|core| core + FIRST).collect();
    assert_eq!(affinity::usable_cores(), cores);
    assert_eq!(affinity::current_affinity(), cores);
    let runtime = runtime(RuntimeConfig::default()).unwrap();
    assert_eq!(runtime.devices()[0].cores, cores);
    let kernel = launch(&runtime, WaitStrategy::Spin, &[]).unwrap();
    assert!(cores.contains(&kernel.metrics().cores[0]));
    kernel.terminate().unwrap();
    for &core in &cores {
        let kernel = launch(&runtime, WaitStrategy::Spin, &[core]).unwrap();
        assert_eq!(kernel.metrics().cores, [core]);
        kernel.terminate().unwrap();
        std::thread::spawn(move || {
            affinity::pin_current_thread(core).unwrap();
            assert_eq!(affinity::current_affinity(), [core]);
            RealtimeThread::new("rt")
                .cores(&[core], Need::Required)
                .adopt()
                .unwrap();
        })
        .join()
        .unwrap();
    }
    for core in [1023, 1024, 65_535, 65_536, usize::MAX] {
        let error = launch(&runtime, WaitStrategy::Park, &[core]).unwrap_err();
        assert!(is_about_cores(&error), "{core}: {error}");
        let error = affinity::pin_current_thread(core).unwrap_err();
        assert!(is_about_cores(&error), "{core}: {error}");
        let error = RealtimeThread::new("rt")
            .cores(&[core], Need::Required)
            .adopt()
            .unwrap_err();
        assert!(matches!(error, Error::RealtimeRefused { .. }), "{error}");
    }
}

/// What may lie where the system lists its cores, and whether it does list this machine's. A name
/// that begins with `/` is a file of the system that is put there instead.
const LISTS: [&str; 9] = [
    "0\n",
    "0-2047\n",
    "",
    "0-4294967295\n",
    "0-18446744073709551615\n",
    "7-3,x,-,--,1-,-1,99999999999999999999999999\n",
    "0-65535,0-65535,0-65535,0-65535,0-65535,0-65535,0-65535,0-65535,0-65535\n",
    "\u{fffd}\0\0\n",
    "/dev/zero",
];

/// Runs again, in a place of its own where the list of cores is another.
#[test]
fn what_the_system_lists_never_decides_whether_a_kernel_runs() {
    use std::os::unix::process::CommandExt;
    let _alone = System::plain();
    let file = std::env::temp_dir().join(format!("rk-online-{}", std::process::id()));
    for list in LISTS {
        let source = if list.starts_with('/') {
            list.into()
        } else {
            std::fs::write(&file, list).unwrap();
            file.clone()
        };
        let source = std::ffi::CString::new(source.to_str().unwrap()).unwrap();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "--ignored", "--nocapture", "in_a_container"]);
        // SAFETY: only system calls, which allocate nothing.
        unsafe { child.pre_exec(move || container(&source)) };
        let output = match child.output() {
            Ok(output) => output,
            Err(error) => {
                println!("skipped: this process may not mount: {error}");
                break;
            }
        };
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{list:?}: {}\n{text}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let _ = std::fs::remove_file(&file);
}

/// Has one core, the last, and 4 GiB of addresses, and finds `source` where the system lists its
/// cores.
fn container(source: &std::ffi::CStr) -> io::Result<()> {
    let check = |result: i64| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let online = c"/sys/devices/system/cpu/online";
    // SAFETY: each pointer is to a string that ends with a NUL byte, to a local, or null where the
    // call allows it.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) != 0 {
            check(libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS).into())?;
        }
        let flags = libc::MS_REC | libc::MS_PRIVATE;
        let (none, root) = (std::ptr::null(), c"/".as_ptr());
        check(libc::mount(none, root, none, flags, none.cast()).into())?;
        let flags = libc::MS_BIND;
        check(libc::mount(source.as_ptr(), online.as_ptr(), none, flags, none.cast()).into())?;
        let limit = libc::rlimit {
            rlim_cur: 4 << 30,
            rlim_max: 4 << 30,
        };
        check(libc::setrlimit(libc::RLIMIT_AS, &raw const limit).into())?;
        let mut set = [0; WORDS];
        check(sched_getaffinity(0, size_of_val(&set), set.as_mut_ptr()).into())?;
        let mut last = [0; WORDS];
        if let Some(core) = cores_of(&set).last() {
            last[core / 64] = 1 << (core % 64);
        }
        check(sched_setaffinity(0, size_of_val(&last), last.as_ptr()).into())
    }
}

#[test]
#[ignore = "run by another test, in a place of its own"]
fn in_a_container() {
    let mine = affinity::current_affinity();
    let [core] = mine[..] else {
        panic!("{mine:?} are not one core");
    };
    assert_eq!(affinity::usable_cores(), mine);
    assert!(affinity::online_cores().contains(&core));
    let runtime = runtime(RuntimeConfig::default()).unwrap();
    assert_eq!(runtime.devices()[0].cores, mine);
    for wait in STRATEGIES {
        for cores in [&[][..], &mine] {
            let kernel = launch(&runtime, wait, cores).unwrap();
            assert_eq!(kernel.metrics().cores, mine, "{wait:?}");
            kernel.terminate().unwrap();
        }
    }
    affinity::pin_current_thread(core).unwrap();
    let report = RealtimeThread::new("rt")
        .cores(&mine, Need::Required)
        .adopt()
        .unwrap();
    assert!(report.is_complete());
    for core in [1500, 4_000_000, usize::MAX] {
        let error = launch(&runtime, WaitStrategy::Park, &[core]).unwrap_err();
        assert!(is_about_cores(&error), "{error}");
    }
}
