//! `WaitStrategy::Auto`, the default, against the better of `Spin` and `Park`: beside busy threads,
//! on one core, with a quota and beside realtime threads. Each comparison is made in turns within
//! one run, as a ratio with much room.
//!
//! What changes a whole process (its cores, its group, its namespace) is done in a process of its
//! own: the test starts itself once more.
#![cfg(target_os = "linux")]

use std::io::{self, BufRead};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::TrySendError;
use ringkernel::thread::affinity;
use ringkernel::thread::realtime::{Need, RealtimeThread, Schedule};
use ringkernel::time::Deadline;
use ringkernel::{
    BackendType, KernelHandle, LaunchOptions, RingKernelRuntime, RuntimeConfig, WaitStrategy,
};

const LONG: Duration = Duration::from_secs(10);

/// How much longer than with the better strategy nine of ten calls may take.
const ROOM: u32 = 40;
const ROOM_AT_LEAST: Duration = Duration::from_millis(2);

/// Set in the processes that a test starts.
const CHILD: &str = "RINGKERNEL_AUTO_CHILD";

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn one_at_a_time() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs a test of this file in a process of its own, which `prepare` readies.
fn run_child(test: &str, prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    run_child_with(test, (CHILD, "1"), prepare);
}

/// As `run_child`, with one more variable in its environment.
fn run_child_with(
    test: &str,
    variable: (&str, &str),
    prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .env(variable.0, variable.1)
        .stdout(Stdio::piped());
    // SAFETY: what the tests pass only makes system calls, and takes no lock.
    unsafe { command.pre_exec(prepare) };
    let output = command.spawn().unwrap().wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    assert!(output.status.success(), "{test}");
}

/// Leaves the process one core.
fn confine(core: usize) -> io::Result<()> {
    // SAFETY: `cpu_set_t` is an array of integers, all zeros the empty set; the core is below its
    // size.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set)
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn runtime(wait: WaitStrategy) -> RingKernelRuntime {
    let config = RuntimeConfig {
        kernel_wait: wait,
        host_wait: wait,
        // Beside busy processes a thread may not get a turn for seconds.
        termination_timeout: 6 * LONG,
        ..RuntimeConfig::default()
    };
    RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .config(config)
        .build()
        .unwrap()
}

fn echo(runtime: &RingKernelRuntime) -> KernelHandle {
    let kernel = runtime
        .launch("echo", 1, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    kernel
}

/// What nine of ten calls take at most, a call a millisecond, for so long.
fn p90(wait: WaitStrategy, length: Duration) -> Duration {
    let runtime = runtime(wait);
    let kernel = echo(&runtime);
    let (mut latencies, begin) = (Vec::new(), Instant::now());
    while begin.elapsed() < length {
        let sent = Instant::now();
        kernel.call_bytes(b"x", &mut [0; 48], LONG).unwrap();
        latencies.push(sent.elapsed());
        thread::sleep(Duration::from_millis(1));
    }
    latencies.sort();
    latencies[latencies.len() * 9 / 10]
}

/// Compares the strategies under whatever conditions there are.
fn auto_is_hardly_worse(rounds: usize) {
    let length = Duration::from_millis(1500);
    let [mut park, mut spin, mut auto] = [Duration::ZERO; 3];
    for _ in 0..rounds {
        park += p90(WaitStrategy::Park, length);
        auto += p90(WaitStrategy::Auto, length);
        spin += p90(WaitStrategy::Spin, length);
    }
    let better = park.min(spin);
    println!("p90 of {rounds} rounds together: park {park:?}, spin {spin:?}, auto {auto:?}");
    assert!(
        auto <= better * ROOM + ROOM_AT_LEAST,
        "park {park:?}, spin {spin:?}, auto {auto:?}"
    );
}

/// Keeps every core busy while `body` runs.
fn beside_busy_threads(body: impl FnOnce()) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in affinity::usable_cores() {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::hint::black_box(0);
                }
            });
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        over.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[test]
fn auto_is_hardly_worse_than_the_better_of_spin_and_park() {
    let _turn = one_at_a_time();
    auto_is_hardly_worse(1);
}

#[test]
fn auto_is_hardly_worse_than_park_beside_busy_threads() {
    let _turn = one_at_a_time();
    beside_busy_threads(|| auto_is_hardly_worse(2));
}

#[test]
fn auto_is_hardly_worse_than_park_on_one_core() {
    if is_child() {
        return auto_is_hardly_worse(2);
    }
    let _turn = one_at_a_time();
    let core = affinity::usable_cores()[0];
    run_child("auto_is_hardly_worse_than_park_on_one_core", move || {
        confine(core)
    });
}

#[test]
fn with_a_quota_of_half_a_core_auto_parks() {
    if is_child() {
        let runtime = runtime(WaitStrategy::Auto);
        let kernel = echo(&runtime);
        assert!(!kernel.metrics().spins);
        return auto_is_hardly_worse(1);
    }
    let _turn = one_at_a_time();
    let Some(group) = Group::new(50_000, 100_000) else {
        println!("left out: there is no group that this process may limit");
        return;
    };
    let procs = std::ffi::CString::new(format!("{}/cgroup.procs", group.0)).unwrap();
    run_child("with_a_quota_of_half_a_core_auto_parks", move || {
        // SAFETY: the path ends with a zero, and the text is as long as said. "0" is the process
        // that writes it.
        unsafe {
            let file = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            match libc::write(file, c"0".as_ptr().cast(), 1) {
                1 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
    });
}

#[test]
fn a_kernel_that_spins_parks_once_there_is_a_quota() {
    const SELF: &str = "a_kernel_that_spins_parks_once_there_is_a_quota";
    if is_child() {
        let runtime = runtime(WaitStrategy::Auto);
        let kernel = echo(&runtime);
        if affinity::usable_cores().len() > 1 && !kernel.metrics().spins {
            println!("left out: other processes have the cores");
            return;
        }
        let procs = std::env::var("RINGKERNEL_AUTO_GROUP").unwrap();
        std::fs::write(procs, "0").unwrap();
        let begin = Instant::now();
        while kernel.metrics().spins {
            assert!(begin.elapsed() < LONG * 3, "it spins on");
            thread::sleep(Duration::from_millis(10));
        }
        kernel.call_bytes(b"x", &mut [0; 48], LONG).unwrap();
        return;
    }
    let _turn = one_at_a_time();
    let Some(group) = Group::new(50_000, 100_000) else {
        println!("left out: there is no group that this process may limit");
        return;
    };
    let procs = format!("{}/cgroup.procs", group.0);
    run_child_with(
        SELF,
        ("RINGKERNEL_AUTO_GROUP", &procs),
        see_no_other_process,
    );
}

/// Leaves the process alone with those that it starts, if that may be had: tests in other processes
/// spin as well.
fn see_no_other_process() -> io::Result<()> {
    // SAFETY: the call takes an integer.
    let _ = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    Ok(())
}

/// A control group with a quota, of either version; removed when dropped.
struct Group(String);

impl Group {
    fn new(quota_us: u32, period_us: u32) -> Option<Self> {
        let name = format!("ringkernel-auto-{}", std::process::id());
        for root in ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"] {
            let group = Self(format!("{root}/{name}"));
            if std::fs::create_dir(&group.0).is_ok()
                && group.write("cpu.cfs_period_us", period_us.to_string())
                && group.write("cpu.cfs_quota_us", quota_us.to_string())
            {
                return Some(group);
            }
        }
        let group = Self(format!("/sys/fs/cgroup/{name}"));
        (std::fs::create_dir(&group.0).is_ok()
            && group.write("cpu.max", format!("{quota_us} {period_us}")))
        .then_some(group)
    }

    fn write(&self, file: &str, text: String) -> bool {
        let path = format!("{}/{file}", self.0);
        std::path::Path::new(&path).exists() && std::fs::write(path, text).is_ok()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// How many of 20 calls of 100 ms a realtime thread on this core waits for in vain; `None` if there
/// may be none.
fn timeouts_of_a_realtime_caller(wait: WaitStrategy, core: usize) -> Option<usize> {
    let runtime = runtime(wait);
    let kernel = echo(&runtime);
    let caller = RealtimeThread::new("caller")
        .cores(&[core], Need::Required)
        .schedule(Schedule::Fifo(50), Need::Required)
        .spawn(move |_| {
            (0..20)
                .filter(|_| {
                    thread::sleep(Duration::from_millis(1));
                    kernel
                        .call_bytes(b"x", &mut [0; 48], Duration::from_millis(100))
                        .is_err()
                })
                .count()
        });
    match caller {
        Ok(caller) => Some(caller.join().unwrap()),
        Err(error) => {
            println!("left out: {error}");
            None
        }
    }
}

fn realtime_callers_starve_nobody(core: usize) {
    let Some(park) = timeouts_of_a_realtime_caller(WaitStrategy::Park, core) else {
        return;
    };
    let Some(auto) = timeouts_of_a_realtime_caller(WaitStrategy::Auto, core) else {
        return;
    };
    println!("timeouts on core {core}: park {park}, auto {auto} of 20");
    assert!(auto <= park + 8, "park {park}, auto {auto} of 20");
}

#[test]
fn a_realtime_caller_leaves_the_kernel_its_core() {
    let _turn = one_at_a_time();
    // On the core that a spinning kernel is put on, and on others.
    for core in affinity::usable_cores().into_iter().rev().take(2) {
        realtime_callers_starve_nobody(core);
    }
}

#[test]
fn a_realtime_caller_leaves_the_kernel_the_only_core() {
    let core = affinity::usable_cores()[0];
    if is_child() {
        return realtime_callers_starve_nobody(core);
    }
    let _turn = one_at_a_time();
    run_child(
        "a_realtime_caller_leaves_the_kernel_the_only_core",
        move || confine(core),
    );
}

/// The loop that docs/realtime.md recommends.
#[test]
fn a_realtime_sender_that_sleeps_while_there_is_no_room_starves_nobody() {
    let _turn = one_at_a_time();
    let runtime = runtime(WaitStrategy::Auto);
    let options = LaunchOptions {
        queue_capacity: Some(8),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("sink", 1, 1, options).unwrap();
    kernel.activate().unwrap();
    // The kernel's core, if it has one.
    let cores = kernel.metrics().cores;
    let core = cores
        .first()
        .copied()
        .unwrap_or(affinity::usable_cores()[0]);
    let sender = RealtimeThread::new("sender")
        .cores(&[core], Need::Required)
        .schedule(Schedule::Fifo(50), Need::Required)
        .spawn(move |_| {
            let mut failed = 0;
            for message in 0..400 {
                if message % 2 == 0 {
                    failed += u32::from(kernel.send_bytes(b"x").is_err());
                    continue;
                }
                let deadline = Deadline::after(LONG);
                let sent = loop {
                    match kernel.try_send_bytes(b"x") {
                        Err(TrySendError::Full) if !deadline.has_passed() => {
                            thread::sleep(Duration::from_micros(20));
                        }
                        outcome => break outcome,
                    }
                };
                failed += u32::from(sent.is_err());
            }
            failed
        });
    match sender {
        Ok(sender) => assert_eq!(sender.join().unwrap(), 0),
        Err(error) => println!("left out: {error}"),
    }
}

#[test]
fn two_processes_spin_on_different_cores() {
    const SELF: &str = "two_processes_spin_on_different_cores";
    if std::env::var_os("RINGKERNEL_AUTO_GRANDCHILD").is_some() {
        let runtime = runtime(WaitStrategy::Spin);
        println!("cores {:?}.", echo(&runtime).metrics().cores);
        // Until the other one has chosen as well.
        io::copy(&mut io::stdin(), &mut io::sink()).unwrap();
        return;
    }
    if is_child() {
        let start = || {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", SELF, "--nocapture"])
                .env("RINGKERNEL_AUTO_GRANDCHILD", "1")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut children = [start(), start()];
        let cores = children.each_mut().map(|child| {
            let lines = io::BufReader::new(child.stdout.as_mut().unwrap()).lines();
            let text = lines.map(Result::unwrap).find_map(|line| {
                let (_, cores) = line.split_once("cores ")?;
                Some(cores.to_owned())
            });
            text.unwrap()
        });
        for mut child in children {
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        assert_ne!(cores[0], cores[1]);
        return;
    }
    if affinity::usable_cores().len() < 2 {
        println!("left out: there is one core");
        return;
    }
    let _turn = one_at_a_time();
    run_child(SELF, see_no_other_process);
}

#[test]
fn a_kernel_that_changes_between_spinning_and_parking_misses_no_request() {
    let _turn = one_at_a_time();
    // Neighbours that come and go make it change.
    let runtime = runtime(WaitStrategy::Auto);
    let kernel = echo(&runtime);
    let mut calls = 0_u64;
    for round in 0..20_u64 {
        let mut burst = || {
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_millis(50) {
                kernel.call_bytes(b"x", &mut [0; 48], LONG).unwrap();
                calls += 1;
                if calls.is_multiple_of(16) {
                    thread::sleep(Duration::from_micros(round * 37 % 300));
                }
            }
        };
        beside_busy_threads(&mut burst);
        burst();
    }
    assert_eq!(kernel.metrics().received_replies, calls);
}
