//! What the hot path does not do: no allocation, shown by a counting allocator; no system call, shown by `strace`, which
//! would also show a contended lock. An uncontended lock leaves no trace that could be counted here; endpoints hold none.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringkernel::{
    KernelRegistration, LaunchOptions, RingKernelRuntime, RuntimeConfig, WaitStrategy,
};
use rkyv::{Archive, Deserialize, Serialize};

/// Counts allocations while counting is on, on threads that take part.
struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The test harness has threads of its own; only this test's and the kernel's count.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if COUNTING.load(Ordering::Relaxed) && WATCHED.try_with(Cell::get).unwrap_or(false) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count();
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LONG: Duration = Duration::from_secs(60);

/// Spinning tests starve each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn one_at_a_time() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
struct Quote {
    number: u64,
    bid: u64,
    firm: bool,
}
ringkernel::ring_message!(Quote, "test.Quote.v1");

/// An echo whose thread is watched too.
fn watched_echo() -> KernelRegistration {
    KernelRegistration::new("test.watched_echo")
        .any_message()
        .cpu_handler(|request, context| {
            WATCHED.with(|watched| watched.set(true));
            context.echo(request)
        })
}

fn spinning() -> RingKernelRuntime {
    RingKernelRuntime::builder()
        .config(RuntimeConfig {
            kernel_wait: WaitStrategy::Spin,
            host_wait: WaitStrategy::Spin,
            ..RuntimeConfig::default()
        })
        .register(watched_echo())
        .build()
        .unwrap()
}

/// Messages of every kind through every kind of call that may be on a realtime thread, `rounds` times, after a warm-up;
/// `mark` is called when the steady state begins and when it ends.
fn steady_state(rounds: u64, mark: impl Fn()) {
    let runtime = spinning();
    let options = LaunchOptions {
        message_size: Some(256),
        queue_capacity: Some(256),
        // Every other message is one that is sampled.
        trace_every: std::num::NonZeroU32::new(2),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("test.watched_echo", 1, 1, options).unwrap();
    kernel.activate().unwrap();
    let mut buffer = [0; 256];
    let payload = [7; 200];
    let quote = |number| Quote {
        number,
        bid: 100,
        firm: true,
    };
    for phase in 0..2 {
        let rounds = if phase == 0 { 1000 } else { rounds };
        // The kernel's handle, then exclusive endpoints; taking them apart is not part of the steady state.
        let marked = |run: &mut dyn FnMut()| {
            if phase == 1 {
                mark();
            }
            run();
            if phase == 1 {
                mark();
            }
        };
        marked(&mut || {
            for number in 0..rounds {
                kernel.send_bytes(&payload).unwrap();
                kernel.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                kernel.call_bytes(&payload, &mut buffer, LONG).unwrap();
                let reply: Quote = kernel.call(&quote(number), LONG).unwrap();
                assert_eq!(reply.number, number);
                kernel.send(&quote(number)).unwrap();
                assert_eq!(kernel.recv_timeout::<Quote>(LONG).unwrap(), quote(number));
            }
        });
        let (mut sender, mut receiver) = kernel.split::<Quote, Quote>().unwrap();
        marked(&mut || {
            for number in 0..rounds {
                sender.try_send(&quote(number)).unwrap();
                assert_eq!(receiver.recv_timeout(LONG).unwrap(), quote(number));
                sender.try_send_bytes(&payload).unwrap();
                receiver.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                let batch = [quote(1), quote(2), quote(3)];
                assert_eq!(sender.send_batch(&batch), Ok(3));
                for _ in 0..3 {
                    let received = receiver.recv_ref_timeout(LONG).unwrap();
                    assert!(received.access().unwrap().firm);
                }
            }
        });
    }
}

#[test]
fn nothing_is_allocated_per_message() {
    let _one = one_at_a_time();
    WATCHED.with(|watched| watched.set(true));
    steady_state(20_000, || {
        COUNTING.fetch_xor(true, Ordering::SeqCst);
    });
    assert_eq!(ALLOCATIONS.swap(0, Ordering::SeqCst), 0);
    // The counter counts.
    COUNTING.store(true, Ordering::SeqCst);
    drop(std::hint::black_box(vec![1]));
    COUNTING.store(false, Ordering::SeqCst);
    assert_eq!(ALLOCATIONS.swap(0, Ordering::SeqCst), 2);
}

/// Messages through kernels that are connected, with a thread each and on one thread.
#[test]
fn nothing_is_allocated_per_message_in_a_pipeline() {
    let _one = one_at_a_time();
    WATCHED.with(|watched| watched.set(true));
    let runtime = spinning();
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    let cores = ringkernel::thread::affinity::usable_cores();
    let last = *cores.last().unwrap();
    for (places, wait) in [
        ([last, last, last], WaitStrategy::Spin),
        ([cores[0], last, cores[0]], WaitStrategy::SpinYield),
    ] {
        let kernels = places.map(|core| {
            let options = LaunchOptions {
                cores: vec![core],
                wait: Some(wait),
                ..LaunchOptions::default()
            };
            runtime.launch("test.watched_echo", 1, 1, options).unwrap()
        });
        for pair in kernels.windows(2) {
            runtime.connect(&pair[0], &pair[1]).unwrap();
        }
        for kernel in &kernels {
            kernel.activate().unwrap();
        }
        let (mut sender, mut receiver) = kernels[0]
            .split_through::<Quote, Quote>(&kernels[2])
            .unwrap();
        for phase in 0..2 {
            COUNTING.store(phase == 1, Ordering::SeqCst);
            for number in 0..1000 {
                let quote = Quote {
                    number,
                    bid: 100,
                    firm: true,
                };
                sender.try_send(&quote).unwrap();
                // Other threads are to have this core too.
                while receiver.try_recv() != Ok(quote) {
                    std::thread::yield_now();
                }
            }
            COUNTING.store(false, Ordering::SeqCst);
        }
        drop((sender, receiver));
        for kernel in &kernels {
            kernel.terminate().unwrap();
        }
    }
    assert_eq!(ALLOCATIONS.load(Ordering::SeqCst), before);
}

/// The system call that brackets the steady state in the trace: cheap, harmless, and made by nobody else here.
#[cfg(target_os = "linux")]
fn mark_in_trace() {
    // SAFETY: no preconditions.
    unsafe { libc::getppid() };
}

/// Messages of the traced run; see `no_system_call_is_made_per_message`.
#[cfg(target_os = "linux")]
const TRACED_ROUNDS: u64 = 125_000;

/// Runs only as the child of the test below.
#[test]
#[cfg(target_os = "linux")]
fn traced_child() {
    if std::env::var_os("RINGKERNEL_TRACED").is_some() {
        steady_state(TRACED_ROUNDS, mark_in_trace);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn no_system_call_is_made_per_message() {
    let _one = one_at_a_time();
    if Command::new("strace").arg("-V").output().is_err() {
        println!("skipped: strace is not installed");
        return;
    }
    let log = std::env::temp_dir().join(format!("ringkernel-strace-{}", std::process::id()));
    let output = Command::new("strace")
        .args(["-f", "-o"])
        .arg(&log)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "traced_child", "--test-threads=1"])
        .env("RINGKERNEL_TRACED", "1")
        .output()
        .unwrap();
    let trace = std::fs::read_to_string(&log).unwrap_or_default();
    let _ = std::fs::remove_file(&log);
    if trace.is_empty() || trace.contains("Operation not permitted") && !output.status.success() {
        println!("skipped: strace may not trace here");
        return;
    }
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<&str> = trace.lines().collect();
    let marks: Vec<usize> = (0..lines.len())
        .filter(|line| lines[*line].contains("getppid("))
        .collect();
    assert_eq!(marks.len(), 4, "two steady states");
    for bracket in marks.chunks(2) {
        // The kernel's thread and the caller's; the harness's main thread waits in its own call all the time.
        let calls = &lines[bracket[0] + 1..bracket[1]];
        assert!(calls.is_empty(), "{} calls: {calls:?}", calls.len());
    }
    println!("0 system calls in {} messages", TRACED_ROUNDS * (4 + 5));
}
