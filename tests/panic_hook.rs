//! What reaches callers while the process's panic hook runs. A test binary of its own, because
//! hooks are the process's. (On 32-bit ARM and Windows callers learn of a panic after the hook:
//! there is nothing to test there.)
#![cfg(all(unix, not(target_arch = "arm")))]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::Duration;

use ringkernel::error::{CallError, RecvTimeoutError, Unavailable};
use ringkernel::kernel::FailureReason;
use ringkernel::{
    BackendType, ConnectionKind, KernelHandle, KernelRegistration, KernelState, LaunchOptions,
    RingKernelRuntime, RuntimeConfig, WaitStrategy,
};

/// How long the hook takes: longer than a caller on a busy machine needs to be woken.
const HOOK: Duration = Duration::from_secs(3);

const LONG: Duration = Duration::from_secs(30);

static BEGUN: AtomicU32 = AtomicU32::new(0);
static ENDED: AtomicU32 = AtomicU32::new(0);

/// One test at a time, with a hook that takes its time on the threads of kernels, and with a
/// runtime that knows these kernels.
fn start() -> (MutexGuard<'static, ()>, RingKernelRuntime) {
    static LOCK: Mutex<()> = Mutex::new(());
    static HOOKED: Once = Once::new();
    let lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    // Before the first runtime is built.
    HOOKED.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if thread::current()
                .name()
                .is_none_or(|name| !name.starts_with("rk-"))
            {
                return next(info);
            }
            BEGUN.fetch_add(1, Ordering::SeqCst);
            thread::sleep(HOOK);
            ENDED.fetch_add(1, Ordering::SeqCst);
        }));
    });
    BEGUN.store(0, Ordering::SeqCst);
    ENDED.store(0, Ordering::SeqCst);
    let config = RuntimeConfig {
        kernel_wait: WaitStrategy::Park,
        host_wait: WaitStrategy::Park,
        ..RuntimeConfig::default()
    };
    let panics = KernelRegistration::new("panics").cpu_handler(|request, context| {
        assert!(request.payload() != b"panic", "told to panic");
        context.echo(request)
    });
    let catches = KernelRegistration::new("catches").cpu_handler(|request, context| {
        let caught = catch_unwind(AssertUnwindSafe(|| {
            assert!(request.payload() != b"panic", "told to panic");
        }));
        context.reply_bytes(if caught.is_err() { b"caught" } else { b"fine" })
    });
    let runtime = RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .config(config)
        .register(panics)
        .register(catches)
        .build()
        .unwrap();
    (lock, runtime)
}

fn launch(runtime: &RingKernelRuntime, id: &str) -> KernelHandle {
    runtime.launch(id, 1, 1, LaunchOptions::default()).unwrap()
}

#[track_caller]
fn assert_told_during_the_hook() {
    // The caller was woken while the hook still sleeps; it may not have begun.
    assert_eq!(ENDED.load(Ordering::SeqCst), 0);
}

fn assert_failed(kernel: &KernelHandle) {
    let status = kernel.status();
    assert_eq!(status.state, KernelState::Failed);
    let failure = status.failure.unwrap();
    assert_eq!(failure.reason, FailureReason::Panic);
    assert_eq!(failure.message, "told to panic");
    assert_eq!(failure.block, Some(0));
    assert_eq!(failure.request.unwrap().payload, b"panic");
}

#[test]
fn a_panic_reaches_callers_before_the_panic_hook_has_ended() {
    let (_lock, runtime) = start();
    let kernel = launch(&runtime, "panics");
    kernel.activate().unwrap();
    assert_eq!(kernel.call_bytes(b"fine", &mut [0; 8], LONG), Ok(4));
    assert_eq!(
        kernel.call_bytes(b"panic", &mut [0; 8], LONG),
        Err(CallError::Unavailable(Unavailable::Failed))
    );
    assert_told_during_the_hook();
    assert_failed(&kernel);
    // The hook runs to its end, once.
    kernel.terminate().unwrap();
    assert_eq!(BEGUN.load(Ordering::SeqCst), 1);
    assert_eq!(ENDED.load(Ordering::SeqCst), 1);
    assert_failed(&kernel);
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.requests.adds_up(), "{report}");
    assert_eq!(
        (report.requests.dead_lettered, report.failed_kernels.len()),
        (1, 1)
    );
}

#[test]
fn a_panic_of_a_kernel_on_another_ones_thread_reaches_its_callers_alone() {
    let (_lock, runtime) = start();
    let (first, second) = (launch(&runtime, "echo"), launch(&runtime, "panics"));
    let connection = runtime.connect(&first, &second).unwrap();
    assert_eq!(connection.kind(), ConnectionKind::SharedThread);
    first.activate().unwrap();
    second.activate().unwrap();
    let call = |request: &[u8]| first.call_bytes_through(&second, request, &mut [0; 8], LONG);
    assert_eq!(call(b"fine"), Ok(4));
    assert_eq!(
        call(b"panic"),
        Err(CallError::Unavailable(Unavailable::Failed))
    );
    assert_told_during_the_hook();
    assert_failed(&second);
    assert_eq!(first.status().state, KernelState::Active);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.failed_kernels, [second.name()], "{report}");
    assert_eq!(BEGUN.load(Ordering::SeqCst), 1);
}

/// What a handler catches itself is no failure, whatever the hook does meanwhile.
#[test]
fn a_panic_that_the_handler_catches_fails_nothing() {
    let (_lock, runtime) = start();
    let kernel = launch(&runtime, "catches");
    kernel.activate().unwrap();
    let mut reply = [0; 8];
    let length = kernel.call_bytes(b"panic", &mut reply, LONG).unwrap();
    assert_eq!(&reply[..length], b"caught");
    assert_eq!(ENDED.load(Ordering::SeqCst), 1);
    let length = kernel.call_bytes(b"x", &mut reply, LONG).unwrap();
    assert_eq!(&reply[..length], b"fine");
    assert_eq!(kernel.status().state, KernelState::Active);
    kernel.terminate().unwrap();
    assert_eq!(kernel.status().state, KernelState::Terminated);
    assert_eq!(
        kernel.recv_bytes_timeout(&mut reply, LONG),
        Err(RecvTimeoutError::Unavailable(Unavailable::Terminated))
    );
}
