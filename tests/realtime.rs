//! Realtime threads: what is granted is there, what is refused says why, and what is prefaulted faults no more. Settings that a process
//! keeps are tried in processes of their own.

#![cfg(all(feature = "std", target_os = "linux"))]

use std::hint::black_box;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringkernel::Error;
use ringkernel::thread::affinity::{current_affinity, usable_cores};
use ringkernel::thread::realtime::{
    Need, RealtimeHandle, RealtimeThread, RealtimeWarning, Refusal, Schedule, Setting,
};

/// Longer than any wait that ends.
const LONG: Duration = Duration::from_secs(30);

const CHILD: &str = "RINGKERNEL_REALTIME_CHILD";

/// Tests that pin themselves, or fault, run one at a time.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this process is the test's own; starts it otherwise, and hands on how it ended.
fn in_a_process_of_its_own(test: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let _one = one_at_a_time();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    for line in text.lines().filter(|line| line.starts_with("skipped:")) {
        println!("{line}");
    }
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    false
}

/// Takes every privilege from the calling thread, as an ordinary user has none: capabilities, and what limits allow.
fn give_privileges_up() {
    /// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
    const VERSION: u32 = 0x2008_0522;
    let header = [VERSION, 0];
    let none = [0_u32; 6];
    // SAFETY: the structures are those of capset(2): version and thread (0, the calling one); three words for each half.
    let dropped = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(dropped, 0, "{}", std::io::Error::last_os_error());
    // A nice value that is there already could be asked for.
    // SAFETY: no pointers; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 0) };
    for which in [libc::RLIMIT_RTPRIO, libc::RLIMIT_MEMLOCK, libc::RLIMIT_NICE] {
        let limits = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the pointer is to a local.
        assert_eq!(unsafe { libc::setrlimit(which, &raw const limits) }, 0);
    }
}

fn policy() -> (i32, i32) {
    // SAFETY: plain numbers; the pointer is to a local; 0 is the calling thread.
    unsafe {
        let mut parameters: libc::sched_param = std::mem::zeroed();
        libc::sched_getparam(0, &raw mut parameters);
        let policy = libc::sched_getscheduler(0) & !libc::SCHED_RESET_ON_FORK;
        (policy, parameters.sched_priority)
    }
}

fn locked_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmLck:"))
        .unwrap();
    let number = line.split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

fn page() -> libc::c_long {
    // SAFETY: no pointers.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }
}

/// Page faults of the calling thread so far that needed no disk.
fn faults() -> libc::c_long {
    // SAFETY: the structure is plain numbers; the pointer is to a local.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage), 0);
        usage.ru_minflt
    }
}

#[test]
fn what_is_granted_is_there() {
    if !in_a_process_of_its_own("what_is_granted_is_there") {
        return;
    }
    let core = usable_cores()[0];
    for (schedule, expected) in [
        (Schedule::Fifo(7), (libc::SCHED_FIFO, 7)),
        (Schedule::RoundRobin(3), (libc::SCHED_RR, 3)),
    ] {
        let thread = RealtimeThread::new("rk-granted")
            .cores(&[core], Need::Required)
            .lock_memory(Need::BestEffort)
            .prefault_stack(256 * 1024, Need::Required)
            .prefault_heap(1 << 20, Need::BestEffort)
            .schedule(schedule, Need::BestEffort)
            .spawn(|context| {
                let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
                let grants = context.report().grants.len();
                let inherited = std::thread::spawn(policy).join().unwrap();
                assert_eq!(
                    inherited.0,
                    libc::SCHED_OTHER,
                    "its own threads are ordinary"
                );
                (current_affinity(), policy(), locked_kib(), name, grants)
            })
            .unwrap();
        let report = thread.report().clone();
        let (cores, policy, locked, name, grants) = thread.join().unwrap();
        assert_eq!(cores, [core]);
        assert_eq!(name.trim(), "rk-granted");
        assert_eq!(grants, 5);
        if report.is_complete() {
            assert_eq!(policy, expected);
            assert!(locked > 1024, "{locked} KiB are locked");
        } else {
            println!("skipped: not all of it is granted here: {report}");
        }
    }
}

#[test]
fn what_is_refused_says_why() {
    if !in_a_process_of_its_own("what_is_refused_says_why") {
        return;
    }
    let asked = || {
        RealtimeThread::new("rk-refused")
            .lock_memory(Need::BestEffort)
            .schedule(Schedule::Fifo(1), Need::BestEffort)
    };
    let reports = std::thread::spawn(move || {
        give_privileges_up();
        // New threads inherit having none; and so does this one.
        let thread = asked().spawn(|_| policy().0).unwrap();
        let spawned = thread.report().clone();
        assert_eq!(thread.join().unwrap(), libc::SCHED_OTHER, "it runs without");
        let nice = RealtimeThread::new("rk-nice")
            .schedule(Schedule::Nice(-1), Need::BestEffort)
            .adopt()
            .unwrap();
        [spawned, asked().adopt().unwrap(), nice]
    });
    let reports = reports.join().unwrap();
    for report in &reports {
        assert!(!report.is_complete());
        for (setting, refusal) in report.refused() {
            let Refusal {
                errno,
                reason,
                limit,
                remedy,
            } = refusal;
            let (errnos, name, capability) = match setting {
                Setting::LockedMemory => (
                    [libc::EPERM, libc::ENOMEM],
                    "RLIMIT_MEMLOCK is 0",
                    "CAP_IPC_LOCK",
                ),
                Setting::Schedule(Schedule::Nice(_)) => (
                    [libc::EPERM, libc::EACCES],
                    "RLIMIT_NICE is 0",
                    "CAP_SYS_NICE",
                ),
                _ => (
                    [libc::EPERM, libc::EPERM],
                    "RLIMIT_RTPRIO is 0",
                    "CAP_SYS_NICE",
                ),
            };
            assert!(errnos.contains(&errno.unwrap()), "{refusal}");
            assert!(!reason.is_empty());
            assert_eq!(limit.as_deref(), Some(name));
            assert!(remedy.contains(capability), "{remedy}");
            assert!(report.to_string().contains(name));
        }
    }
    assert_eq!(
        reports.map(|report| report.refused().count()),
        [2, 2, 1],
        "each refusal is reported"
    );
}

#[test]
fn a_thread_does_not_run_without_what_it_requires() {
    if !in_a_process_of_its_own("a_thread_does_not_run_without_what_it_requires") {
        return;
    }
    let ran = Arc::new(AtomicBool::new(false));
    let has_run = Arc::clone(&ran);
    let error = std::thread::spawn(|| {
        give_privileges_up();
        RealtimeThread::new("rk-required")
            .schedule(Schedule::Fifo(1), Need::Required)
            .spawn(move |_| has_run.store(true, Ordering::SeqCst))
            .unwrap_err()
    })
    .join()
    .unwrap();
    match error {
        Error::RealtimeRefused {
            thread,
            setting,
            reason,
            report,
        } => {
            assert_eq!(thread, "rk-required");
            assert!(
                report.contains("refused: SCHED_FIFO priority 1"),
                "{report}"
            );
            assert_eq!(setting, "SCHED_FIFO priority 1");
            assert!(reason.contains("RLIMIT_RTPRIO is 0"), "{reason}");
        }
        other => panic!("{other}"),
    }
    assert!(!ran.load(Ordering::SeqCst));
    assert_eq!(Arc::strong_count(&ran), 1, "the thread has ended");
}

/// Uses some 200 KiB of stack.
#[inline(never)]
fn deep(depth: u32) -> u32 {
    let mut frame = [0_u8; 4096];
    black_box(&mut frame);
    if depth == 0 {
        return 0;
    }
    deep(depth - 1) + u32::from(black_box(frame[1]))
}

#[test]
fn prefaulted_stack_faults_no_more() {
    let _one = one_at_a_time();
    let count = |bytes: usize| {
        let thread = RealtimeThread::new("rk-stack");
        let thread = match bytes {
            0 => thread,
            _ => thread.prefault_stack(bytes, Need::Required),
        };
        let thread = thread.spawn(|_| {
            let before = faults();
            black_box(deep(50));
            faults() - before
        });
        thread.unwrap().join().unwrap()
    };
    let (without, with) = (count(0), count(256 * 1024));
    assert!(
        without >= 40 * 4096 / page(),
        "{without} faults without prefaulting"
    );
    assert!(with <= 2, "{with} faults with it");
}

#[test]
fn a_stack_that_is_too_small_is_not_overrun() {
    let _one = one_at_a_time();
    let adopt = || {
        RealtimeThread::new("rk-small")
            .prefault_stack(16 << 20, Need::BestEffort)
            .adopt()
            .unwrap()
    };
    let report = std::thread::Builder::new()
        .stack_size(256 * 1024)
        .spawn(adopt)
        .unwrap()
        .join()
        .unwrap();
    let (setting, refusal) = report.refused().next().unwrap();
    assert_eq!(*setting, Setting::Stack(16 << 20));
    assert!(
        refusal.reason.contains("bytes of stack are left"),
        "{refusal}"
    );
}

#[test]
fn prefaulted_heap_faults_no_more() {
    // The allocator is told to keep memory, for the whole process.
    if !in_a_process_of_its_own("prefaulted_heap_faults_no_more") {
        return;
    }
    let count = |bytes: usize| {
        let thread = RealtimeThread::new("rk-heap");
        let thread = match bytes {
            0 => thread,
            _ => thread.prefault_heap(bytes, Need::Required),
        };
        let thread = thread.spawn(|_| {
            let before = faults();
            let pieces: Vec<Vec<u8>> = (0..64).map(|_| vec![1; 32 * 1024]).collect();
            black_box(&pieces);
            faults() - before
        });
        match thread {
            Ok(thread) => Some(thread.join().unwrap()),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    };
    let without = count(0).unwrap();
    let Some(with) = count(8 << 20) else { return };
    assert!(
        without >= 400 * 4096 / page(),
        "{without} faults without prefaulting"
    );
    assert!(
        with <= without / 10,
        "{with} faults with it, {without} without"
    );
}

#[test]
fn denormals_count_as_zero_on_that_thread_alone() {
    let _one = one_at_a_time();
    if !cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
        println!("skipped: nothing is known of this processor's modes");
        return;
    }
    let half = || black_box(f32::MIN_POSITIVE) * black_box(0.5);
    // SAFETY: nothing but the one multiplication, whose operands the compiler does not know, is calculated there.
    let thread = unsafe { RealtimeThread::new("rk-ftz").flush_to_zero(Need::Required) };
    let thread = thread.spawn(move |_| half()).unwrap();
    assert_eq!(thread.join().unwrap(), 0.0);
    assert!(half() > 0.0);
}

#[test]
fn the_calling_thread_is_adopted() {
    let _one = one_at_a_time();
    let core = *usable_cores().last().unwrap();
    let (report, cores) = std::thread::spawn(move || {
        let report = RealtimeThread::new("rk-adopted")
            .cores(&[core], Need::Required)
            .schedule(Schedule::Nice(19), Need::Required)
            .adopt()
            .unwrap();
        // SAFETY: no pointers; 0 is the calling thread.
        assert_eq!(unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }, 19);
        (report, current_affinity())
    })
    .join()
    .unwrap();
    assert!(report.is_complete(), "{report}");
    assert_eq!(cores, [core]);
}

/// The power management's file is open as long as the thread lives.
#[test]
fn wake_up_latency_is_asked_for_while_the_thread_lives() {
    let _one = one_at_a_time();
    let open = || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.ends_with("cpu_dma_latency"))
            .count()
    };
    let thread = RealtimeThread::new("rk-wake")
        .wake_latency(Duration::from_micros(10), Need::BestEffort)
        .spawn(move |_| open())
        .unwrap();
    let granted = thread.report().is_complete();
    assert_eq!(thread.join().unwrap(), usize::from(granted));
    assert_eq!(open(), 0);
    if !granted {
        println!("skipped: there is no /dev/cpu_dma_latency to write to");
    }
}

#[test]
fn bad_values_are_refused() {
    let refused = |thread: RealtimeThread, expected: &str| match thread.adopt() {
        Err(Error::InvalidOption { option, .. }) => assert_eq!(option, expected),
        other => panic!("{other:?}"),
    };
    let new = || RealtimeThread::new("rk-bad");
    refused(RealtimeThread::new("a\0b"), "thread name");
    refused(new().cores(&[], Need::BestEffort), "cores");
    for schedule in [
        Schedule::Fifo(0),
        Schedule::Fifo(100),
        Schedule::RoundRobin(0),
        Schedule::Nice(-21),
        Schedule::Nice(20),
    ] {
        refused(new().schedule(schedule, Need::BestEffort), "schedule");
    }
    let day = Duration::from_secs(86_400);
    refused(new().wake_latency(day, Need::BestEffort), "wake latency");
    let heap = new()
        .prefault_heap(1 << 40, Need::BestEffort)
        .adopt()
        .unwrap();
    assert_eq!(heap.refused().count(), 1);
    // The order of cores does not matter, nor that one is named twice.
    let cores = usable_cores();
    let mixed: Vec<usize> = cores.iter().rev().chain(&cores).copied().collect();
    let report = std::thread::spawn(move || {
        RealtimeThread::new("rk-mixed")
            .cores(&mixed, Need::Required)
            .adopt()
    });
    assert!(report.join().unwrap().unwrap().is_complete());
    // A core that is not there is refused, not a panic.
    let report = new().cores(&[100_000], Need::BestEffort).adopt().unwrap();
    assert_eq!(report.refused().count(), 1);
    assert!(matches!(
        new().cores(&[100_000], Need::Required).adopt(),
        Err(Error::RealtimeRefused { .. })
    ));
}

#[test]
fn threads_end_when_they_are_told_and_panics_are_handed_on() {
    let _one = one_at_a_time();
    let thread = RealtimeThread::new("rk-stop")
        .spawn(|context| {
            while !context.must_stop() {
                std::thread::sleep(Duration::from_micros(100));
            }
            "stopped"
        })
        .unwrap();
    assert!(!thread.wait_finished(Duration::from_millis(20)));
    thread.stop();
    assert!(thread.wait_finished(Duration::from_secs(30)));
    assert!(thread.is_finished());
    assert_eq!(thread.join().unwrap(), "stopped");
    // Dropping does the same.
    let ended = Arc::new(AtomicBool::new(false));
    let has_ended = Arc::clone(&ended);
    drop(RealtimeThread::new("rk-drop").spawn(move |context| {
        while !context.must_stop() {
            std::thread::sleep(Duration::from_micros(100));
        }
        has_ended.store(true, Ordering::SeqCst);
    }));
    assert!(ended.load(Ordering::SeqCst));
    let thread = RealtimeThread::new("rk-panic").spawn(|_| panic!("on purpose"));
    let panic = thread.unwrap().join().unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"on purpose"));
}

/// The payload of a panic, whose destructor panics as well.
struct PanicsAgain;

impl Drop for PanicsAgain {
    fn drop(&mut self) {
        std::panic::resume_unwind(Box::new("again"));
    }
}

#[test]
fn a_handle_whose_thread_panicked_is_dropped_without_a_panic() {
    let thread = RealtimeThread::new("rk-payload")
        .spawn(|_| std::panic::resume_unwind(Box::new(PanicsAgain)))
        .unwrap();
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(thread)));
    assert!(dropped.is_ok());
}

/// Blocks when it is dropped, until its sender is gone.
struct Blocks(std::sync::mpsc::Receiver<()>);

impl Drop for Blocks {
    fn drop(&mut self) {
        let _ = self.0.recv();
    }
}

#[test]
fn a_refused_thread_does_not_wait_for_what_its_body_captured() {
    let (open, gate) = std::sync::mpsc::channel();
    let blocks = Blocks(gate);
    let begin = std::time::Instant::now();
    let refused = RealtimeThread::new("rk-blocks")
        .cores(&[100_000], Need::Required)
        .spawn(move |_| {
            let _captured = &blocks;
        });
    assert!(matches!(refused, Err(Error::RealtimeRefused { .. })));
    assert!(begin.elapsed() < LONG);
    drop(open);
}

#[test]
fn the_machine_is_looked_at() {
    let _one = one_at_a_time();
    let core = usable_cores()[0];
    let report = std::thread::spawn(move || {
        RealtimeThread::new("rk-machine")
            .cores(&[core], Need::Required)
            .schedule(Schedule::Fifo(1), Need::BestEffort)
            .near_node(0)
            .adopt()
            .unwrap()
    })
    .join()
    .unwrap();
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let isolated = !read("/sys/devices/system/cpu/isolated").trim().is_empty();
    let warned = |of: fn(&RealtimeWarning) -> bool| report.warnings.iter().any(of);
    let partitions = read("/sys/fs/cgroup/cpuset.cpus.isolated");
    if !isolated && partitions.trim().is_empty() {
        assert!(warned(|warning| matches!(
            warning,
            RealtimeWarning::NotIsolated { .. }
        )));
    }
    let runtime = read("/proc/sys/kernel/sched_rt_runtime_us");
    let period = read("/proc/sys/kernel/sched_rt_period_us");
    if let (Ok(runtime), Ok(period)) = (runtime.trim().parse::<i64>(), period.trim().parse::<i64>())
    {
        assert_eq!(
            warned(|warning| matches!(warning, RealtimeWarning::Throttled { .. })),
            (0..period).contains(&runtime)
        );
    }
    let node = read("/sys/devices/system/node/node0/cpulist");
    if node.trim() == read("/sys/devices/system/cpu/online").trim() {
        assert!(!warned(|warning| matches!(
            warning,
            RealtimeWarning::OtherNode { .. }
        )));
    }
    for warning in &report.warnings {
        assert!(report.to_string().contains(&warning.to_string()));
    }
}

#[test]
fn a_realtime_thread_that_gives_up_its_own_handle_does_not_wait_for_itself() {
    for joins in [false, true] {
        let (give, take) = std::sync::mpsc::channel::<RealtimeHandle<()>>();
        let (tell, told) = std::sync::mpsc::channel();
        let handle = RealtimeThread::new("own-handle")
            .spawn(move |context| {
                let own = take.recv().unwrap();
                let attempt = std::panic::AssertUnwindSafe(move || {
                    if joins {
                        assert!(own.join().is_err(), "it has not ended");
                    }
                });
                let outcome = std::panic::catch_unwind(attempt).is_ok();
                tell.send((outcome, context.must_stop())).unwrap();
            })
            .unwrap();
        give.send(handle).unwrap();
        let told = told.recv_timeout(LONG);
        assert_eq!(told, Ok((true, true)), "joins: {joins}");
    }
}

#[test]
fn limits_that_end_a_realtime_process_later_are_reported() {
    if !in_a_process_of_its_own("limits_that_end_a_realtime_process_later_are_reported") {
        return;
    }
    // An hour, so that nothing here comes near it.
    const SOFT: u64 = 3_600_000_000;
    const LOCKED: u64 = 1 << 40;
    let told = |of: fn(&RealtimeWarning) -> bool| {
        let report = RealtimeThread::new("rk-limits")
            .lock_memory(Need::BestEffort)
            .schedule(Schedule::Fifo(1), Need::BestEffort)
            .adopt()
            .unwrap();
        let warning = report.warnings.iter().find(|warning| of(warning)).cloned();
        if let Some(warning) = &warning {
            assert!(report.to_string().contains(&warning.to_string()));
        }
        (warning, report)
    };
    let set = |which, name, soft: u64| {
        let mut limits = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the pointers are to a local.
        unsafe {
            assert_eq!(libc::getrlimit(which, &raw mut limits), 0);
            limits.rlim_cur = soft as libc::rlim_t;
            if limits.rlim_max < limits.rlim_cur {
                limits.rlim_max = limits.rlim_cur;
            }
            let is_set = libc::setrlimit(which, &raw const limits) == 0;
            if !is_set {
                println!("skipped: {name} cannot be set");
            }
            is_set
        }
    };
    if set(libc::RLIMIT_RTTIME, "RLIMIT_RTTIME", SOFT) {
        let (warning, report) =
            told(|warning| matches!(warning, RealtimeWarning::TimeLimit { .. }));
        assert!(
            matches!(
                warning,
                Some(RealtimeWarning::TimeLimit {
                    soft_us: Some(SOFT),
                    ..
                })
            ),
            "{report}"
        );
        assert!(report.to_string().contains("RLIMIT_RTTIME"));
        assert!(report.to_string().contains("SIGXCPU"));
    }
    if set(libc::RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK", LOCKED) {
        let is_about = |warning: &RealtimeWarning| {
            matches!(
                warning,
                RealtimeWarning::LockedMemoryLimit { limit: LOCKED }
            )
        };
        give_privileges_up_if_any();
        let (warning, report) = told(is_about);
        let is_granted = report
            .refused()
            .all(|(setting, _)| *setting != Setting::LockedMemory);
        assert_eq!(warning.is_some(), is_granted, "{report}");
    }
}

/// Takes the capabilities from the calling thread alone, and leaves its limits.
fn give_privileges_up_if_any() {
    let header = [0x2008_0522_u32, 0];
    let none = [0_u32; 6];
    // SAFETY: as in `give_privileges_up`.
    let _ = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
}
