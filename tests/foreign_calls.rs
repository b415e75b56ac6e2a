//! A logger and an allocator that ask the library how it is, whenever it calls them, wait for
//! nothing: no lock that such questions need is held then. Both are global, so that this is a
//! process of its own.

#![cfg(feature = "std")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use ringkernel::{
    BackendType, Bytes, ClientOptions, KernelHandle, KernelRegistration, KernelState,
    LaunchOptions, LifecycleState, RingKernelRuntime, SubscriberOptions, Topic, TopicOptions,
};

/// Longer than any wait that ends.
const LONG: Duration = Duration::from_secs(60);

static RUNTIME: OnceLock<RingKernelRuntime> = OnceLock::new();
static KERNEL: OnceLock<KernelHandle> = OnceLock::new();
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// Whether the thread is asking already: what it asks for logs and allocates as well.
    static ASKS: Cell<bool> = const { Cell::new(false) };
}

/// Runs `ask` unless it is what calls.
fn once_a_thread(ask: impl FnOnce()) {
    if ASKS.try_with(|asks| asks.replace(true)) == Ok(false) {
        ask();
        let _ = ASKS.try_with(|asks| asks.set(false));
    }
}

/// Everything that can be asked.
fn ask_everything(runtime: &RingKernelRuntime) {
    let _ = (runtime.state(), runtime.devices(), runtime.registered());
    let _ = (
        runtime.memory_in_use(0),
        runtime.bridge(0),
        runtime.topics(),
    );
    let _ = runtime.dead_letters().counts();
    for status in runtime.kernels() {
        if let Some(kernel) = runtime.kernel(&status.name) {
            let _ = (kernel.status(), kernel.metrics(), kernel.traces());
        }
    }
    if let Some(kernel) = KERNEL.get() {
        let _ = (kernel.status(), kernel.metrics());
        let _ = kernel.try_send_bytes(b"from the logger");
        let _ = kernel.try_recv_bytes(&mut [0; 64]);
    }
}

/// What changes the runtime: a kernel comes and goes, and a topic carries the line.
fn change_something(runtime: &RingKernelRuntime, line: &str) {
    let topic: Result<Topic<Bytes>, _> = runtime.topic_bytes("log", TopicOptions::default());
    if let Ok(topic) = topic
        && let Ok(mut publisher) = topic.publisher()
    {
        let line = &line.as_bytes()[..line.len().min(40)];
        let _ = publisher.publish_bytes(line);
    }
    if let Ok(kernel) = runtime.launch("echo", 1, 1, LaunchOptions::default()) {
        let _ = kernel.activate();
        let _ = kernel.terminate();
    }
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if !record.target().starts_with("ringkernel") {
            return;
        }
        once_a_thread(|| {
            let line = record.args().to_string();
            if let Some(runtime) = RUNTIME.get() {
                ask_everything(runtime);
                change_something(runtime, &line);
            }
            LINES
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(line);
        });
    }

    fn flush(&self) {}
}

struct Allocator;

static ASKED_BY_ALLOCATOR: AtomicU64 = AtomicU64::new(0);
static ALLOCATOR_ASKS: AtomicBool = AtomicBool::new(false);

fn ask_from_the_allocator() {
    if ALLOCATOR_ASKS.load(Ordering::Relaxed)
        && let Some(runtime) = RUNTIME.get()
    {
        once_a_thread(|| {
            let _ = (runtime.state(), runtime.kernels(), runtime.registered());
            let _ = (runtime.devices(), runtime.bridge(0));
            if let Some(kernel) = KERNEL.get() {
                let _ = kernel.status();
            }
            ASKED_BY_ALLOCATOR.fetch_add(1, Ordering::Relaxed);
        });
    }
}

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ask_from_the_allocator();
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ask_from_the_allocator();
        // SAFETY: as for `alloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// A kernel's whole life, one that fails, clients, a connection, a second device.
fn live() {
    let panicking = KernelRegistration::new("panics").cpu_handler(|_, _| panic!("on purpose"));
    let runtime = RUNTIME.get_or_init(|| {
        RingKernelRuntime::builder()
            .backend(BackendType::Cpu)
            .cpu_devices(2)
            .register(panicking)
            .build()
            .unwrap()
    });
    let launch = |id: &str| runtime.launch(id, 1, 1, LaunchOptions::default()).unwrap();
    let kernel = KERNEL.get_or_init(|| launch("sink"));
    kernel.activate().unwrap();
    let echo = launch("echo");
    echo.activate().unwrap();
    assert_eq!(echo.call_bytes(b"ask", &mut [0; 64], LONG), Ok(3));
    let mut client = echo.client_bytes_with(ClientOptions::default()).unwrap();
    client.try_send_bytes(b"lane").unwrap();
    assert_eq!(client.recv_bytes_timeout(&mut [0; 64], LONG), Ok(4));
    drop(client);

    let failing = launch("panics");
    failing.activate().unwrap();
    failing.call_bytes(b"x", &mut [0; 64], LONG).unwrap_err();
    assert_eq!(failing.status().state, KernelState::Failed);
    failing.terminate().unwrap();

    let (first, second) = (launch("echo"), launch("echo"));
    runtime.connect(&first, &second).unwrap();
    first.activate().unwrap();
    second.activate().unwrap();
    let reply = first.call_bytes_through(&second, b"through", &mut [0; 64], LONG);
    assert_eq!(reply, Ok(7));
    first.deactivate().unwrap();
    first.terminate().unwrap();

    let elsewhere = LaunchOptions {
        device: Some(1),
        ..LaunchOptions::default()
    };
    drop(runtime.launch("echo", 1, 1, elsewhere).unwrap());
    let topic = runtime
        .topic_bytes("other", TopicOptions::default())
        .unwrap();
    let _subscription = runtime
        .subscribe_kernel(&topic, &launch("sink"), SubscriberOptions::default())
        .unwrap();
    runtime.drain(LONG).unwrap();
    runtime.complete_shutdown().unwrap();
    assert_eq!(runtime.state(), LifecycleState::Stopped);
}

#[test]
fn loggers_and_allocators_that_call_the_library_wait_for_nothing() {
    std::panic::set_hook(Box::new(|panic| {
        // A panic hook is foreign code as well.
        if let Some(runtime) = RUNTIME.get() {
            once_a_thread(|| ask_everything(runtime));
        }
        eprintln!("{panic}");
    }));
    log::set_boxed_logger(Box::new(Logger)).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    ALLOCATOR_ASKS.store(true, Ordering::Relaxed);
    let (tell, told) = mpsc::channel();
    let living = std::thread::spawn(move || {
        live();
        let _ = tell.send(());
    });
    let outcome = told.recv_timeout(2 * LONG);
    ALLOCATOR_ASKS.store(false, Ordering::Relaxed);
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if outcome == Err(mpsc::RecvTimeoutError::Timeout) {
        // The thread that waits for itself cannot be joined.
        panic!("it hangs after: {lines:#?}");
    }
    living.join().unwrap();
    for expected in [
        "runtime built",
        "'sink' launched",
        "Launched -> Active",
        "'panics' failed: panic in block 0",
        "Active -> Terminating",
        "runtime stopped",
    ] {
        assert!(
            lines.iter().any(|line| line.contains(expected)),
            "not logged: {expected}; {lines:#?}"
        );
    }
    assert!(ASKED_BY_ALLOCATOR.load(Ordering::Relaxed) > 0);
}
