//! Code of the crate's user in places where it could keep the library from telling its state, or
//! from ending.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::{CallError, RecvTimeoutError, SendTimeoutError, Unavailable};
use ringkernel::kernel::FailureReason;
use ringkernel::{
    ConnectionKind, Error, HandlerResult, KernelContext, KernelHandle, KernelRegistration,
    KernelState, LaunchOptions, Request, RingKernelRuntime, RuntimeConfig, WaitStrategy,
};

use super::kernels::{Opened, UNSTUCK};
use super::{LONG, Subject, active, eventually, runtime, runtime_from, small};

/// What a wait for oneself would take at least, in these tests: far longer than anything else.
const TIMEOUT: Duration = LONG;

/// What is far shorter.
const AT_ONCE: Duration = Duration::from_secs(15);

/// What a kernel may take to end: enough for a thread that must first be woken on a busy machine.
const SHORT: Duration = Duration::from_secs(2);

fn patient<S: Subject>() -> RingKernelRuntime {
    let config = RuntimeConfig {
        termination_timeout: TIMEOUT,
        default_timeout: TIMEOUT,
        ..RuntimeConfig::default()
    };
    runtime_from(S::builder_with(config))
}

fn impatient<S: Subject>() -> RingKernelRuntime {
    let config = RuntimeConfig {
        termination_timeout: SHORT,
        ..RuntimeConfig::default()
    };
    runtime_from(S::builder_with(config))
}

/// Launches and activates a kernel with this handler.
fn with_handler<F>(runtime: &RingKernelRuntime, id: &str, handler: F) -> KernelHandle
where
    F: Fn(&Request<'_>, &mut KernelContext<'_, '_>) -> HandlerResult + Send + Sync + 'static,
{
    runtime
        .register(KernelRegistration::new(id).cpu_handler(handler))
        .unwrap();
    active(runtime, id, LaunchOptions::default())
}

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic_any(Self)
    }
}

/// Blocks until its sender is gone, or the test has waited in vain.
struct BlocksWhenDropped(Mutex<Receiver<()>>);

impl BlocksWhenDropped {
    fn new() -> (Self, Sender<()>) {
        let (open, gate) = mpsc::channel();
        (Self(Mutex::new(gate)), open)
    }
}

impl Drop for BlocksWhenDropped {
    fn drop(&mut self) {
        let _ = self.0.lock().unwrap().recv_timeout(4 * LONG);
    }
}

thread_local! {
    /// Of a kernel's thread.
    static LOCAL: RefCell<Option<BlocksWhenDropped>> = const { RefCell::new(None) };
}

/// Callers learn of a panic although its payload cannot be dropped, be it that the destructor
/// panics without end.
pub fn a_panic_payload_whose_destructor_panics_fails_the_kernel_at_once<S: Subject>() {
    let runtime = patient::<S>();
    let kernel = with_handler(&runtime, "test.bomb", |_, _| panic_any(PanicsWhenDropped));
    let begin = Instant::now();
    assert_eq!(
        kernel.call_bytes(b"x", &mut [0; 8], TIMEOUT),
        Err(CallError::Unavailable(Unavailable::Failed))
    );
    assert!(begin.elapsed() < AT_ONCE);
    let status = kernel.status();
    assert_eq!(status.state, KernelState::Failed);
    assert_eq!(status.failure.unwrap().reason, FailureReason::Panic);
    kernel.terminate().unwrap();
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.left_behind.is_empty(), "{report}");
    assert!(begin.elapsed() < AT_ONCE);
}

/// The same of a destructor that never returns; the thread in it is reported.
pub fn a_panic_payload_whose_destructor_blocks_holds_nobody_up<S: Subject>() {
    let runtime = impatient::<S>();
    let (payload, open) = BlocksWhenDropped::new();
    let payload = Mutex::new(Some(payload));
    let kernel = with_handler(&runtime, "test.bomb", move |_, _| {
        panic_any(payload.lock().unwrap().take())
    });
    let begin = Instant::now();
    assert_eq!(
        kernel.call_bytes(b"x", &mut [0; 8], LONG),
        Err(CallError::Unavailable(Unavailable::Failed))
    );
    assert_eq!(kernel.status().state, KernelState::Failed);
    kernel.terminate().unwrap();
    let report = runtime.complete_shutdown().unwrap();
    assert!(begin.elapsed() < AT_ONCE);
    assert_eq!(report.left_behind.len(), 1, "{report}");
    assert!(report.left_behind[0].contains("destructor"), "{report}");
    drop(open);
}

/// A termination does not wait longer than it may for what a handler left in its thread.
pub fn a_thread_local_destructor_that_blocks_does_not_delay_a_termination<S: Subject>() {
    let runtime = impatient::<S>();
    let (local, open) = BlocksWhenDropped::new();
    let local = Mutex::new(Some(local));
    let kernel = with_handler(&runtime, "test.local", move |request, context| {
        if let Some(local) = local.lock().unwrap().take() {
            LOCAL.set(Some(local));
        }
        context.echo(request)
    });
    assert_eq!(kernel.call_bytes(b"x", &mut [0; 8], LONG), Ok(1));
    let begin = Instant::now();
    kernel.terminate().unwrap();
    assert!(begin.elapsed() < AT_ONCE);
    // The kernel itself has ended as it should.
    assert_eq!(kernel.status().state, KernelState::Terminated);
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.requests.adds_up() && report.errors.is_empty());
    assert_eq!(report.left_behind.len(), 1, "{report}");
    assert!(report.left_behind[0].contains("thread-local"), "{report}");
    drop(open);
}

/// What a handler captured is dropped with the runtime, and a panic there goes no further, even on
/// a thread that unwinds.
pub fn a_captured_value_that_panics_when_dropped_harms_nobody<S: Subject>() {
    let start = || {
        let runtime = runtime::<S>();
        let captured = PanicsWhenDropped;
        let kernel = with_handler(&runtime, "test.captured", move |request, context| {
            let _captured = &captured;
            context.echo(request)
        });
        assert_eq!(kernel.call_bytes(b"x", &mut [0; 8], LONG), Ok(1));
        (runtime, kernel)
    };
    let (runtime, kernel) = start();
    drop(runtime);
    assert_eq!(kernel.status().state, KernelState::Terminated);
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let _runtime = start();
        std::panic::resume_unwind(Box::new("the first panic"));
    }));
    let payload = unwound.unwrap_err();
    assert_eq!(payload.downcast_ref::<&str>(), Some(&"the first panic"));
}

/// What a handler is given to call, and what became of it.
type Attempt = Box<dyn FnOnce() -> Result<(), Error> + Send>;

/// Where the handler finds the next one.
type NextAttempt = Arc<Mutex<Option<Attempt>>>;

/// What becomes of each.
type Outcomes = Receiver<Result<(), Error>>;

/// A kernel whose handler makes the attempt that it is sent, and says what became of it.
struct Attempts {
    kernel: KernelHandle,
    next: NextAttempt,
    outcomes: Outcomes,
}

impl Attempts {
    fn handler() -> (NextAttempt, Outcomes, KernelRegistration) {
        let next = Arc::new(Mutex::new(None::<Attempt>));
        let taken = Arc::clone(&next);
        let (tell, outcomes) = mpsc::channel();
        let tell = Mutex::new(tell);
        let registration =
            KernelRegistration::new("test.attempt").cpu_handler(move |request, context| {
                let attempt = taken.lock().unwrap().take();
                if let Some(attempt) = attempt {
                    let _ = tell.lock().unwrap().send(attempt());
                }
                context.echo(request)
            });
        (next, outcomes, registration)
    }

    fn new(runtime: &RingKernelRuntime) -> Self {
        let (next, outcomes, registration) = Self::handler();
        runtime.register(registration).unwrap();
        Self {
            kernel: active(runtime, "test.attempt", LaunchOptions::default()),
            next,
            outcomes,
        }
    }

    /// Makes the attempt in the handler, which `first` leads to.
    fn make(
        &self,
        first: &KernelHandle,
        attempt: impl FnOnce() -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        *self.next.lock().unwrap() = Some(Box::new(attempt));
        first.send_bytes(b"x").unwrap();
        let begin = Instant::now();
        let outcome = self.outcomes.recv_timeout(2 * TIMEOUT).unwrap();
        assert!(begin.elapsed() < AT_ONCE, "{outcome:?}");
        outcome
    }
}

#[track_caller]
fn assert_refused(outcome: Result<(), Error>, wanted: &str, name: &str) {
    match &outcome {
        Err(error @ Error::CalledFromHandler { operation, kernel }) => {
            assert_eq!((*operation, kernel.as_str()), (wanted, name));
            assert!(error.to_string().contains(name), "{error}");
        }
        other => panic!("{wanted}: {other:?}"),
    }
}

/// None of them waits for the handler that calls it, and none changes anything.
pub fn control_calls_from_a_kernels_own_handler_fail_at_once<S: Subject>() {
    let runtime = Arc::new(patient::<S>());
    let attempts = Attempts::new(&runtime);
    let kernel = &attempts.kernel;
    let name = kernel.name().to_owned();
    let own = || kernel.clone();
    let try_it = |attempt: Attempt| attempts.make(kernel, attempt);

    let handle = own();
    let outcome = try_it(Box::new(move || handle.terminate()));
    assert_refused(outcome, "termination", &name);
    let handle = own();
    let outcome = try_it(Box::new(move || handle.deactivate()));
    assert_refused(outcome, "deactivation", &name);
    let handle = own();
    let outcome = try_it(Box::new(move || handle.activate()));
    assert_refused(outcome, "activation", &name);
    let (handle, shared) = (own(), Arc::clone(&runtime));
    let other = runtime
        .launch("echo", 1, 1, LaunchOptions::default())
        .unwrap();
    let outcome = try_it(Box::new(move || {
        shared.connect(&handle, &other).map(|_| ())
    }));
    assert_refused(outcome, "connection", &name);
    let shared = Arc::clone(&runtime);
    let outcome = try_it(Box::new(move || shared.drain(TIMEOUT).map(|_| ())));
    assert_refused(outcome, "drain", &name);
    let shared = Arc::clone(&runtime);
    let outcome = try_it(Box::new(move || shared.complete_shutdown().map(|_| ())));
    assert_refused(outcome, "shutdown", &name);

    // Other kernels of the same runtime can be controlled, and nothing has changed.
    let other = active(&runtime, "echo", LaunchOptions::default());
    let moved = other.clone();
    try_it(Box::new(move || {
        moved.deactivate()?;
        moved.activate()?;
        moved.terminate()
    }))
    .unwrap();
    assert_eq!(other.status().state, KernelState::Terminated);
    assert_eq!(kernel.status().state, KernelState::Active);
    for _ in 0..7 {
        assert_eq!(kernel.recv_bytes_timeout(&mut [0; 8], LONG), Ok(1));
    }
    assert_eq!(kernel.call_bytes(b"x", &mut [0; 8], LONG), Ok(1));
    let begin = Instant::now();
    runtime.drain(TIMEOUT).unwrap();
    let report = runtime.complete_shutdown().unwrap();
    assert!(begin.elapsed() < AT_ONCE);
    assert!(
        report.errors.is_empty() && report.requests.adds_up(),
        "{report}"
    );
}

/// The same where another kernel's thread runs the handler.
pub fn control_calls_from_a_handler_on_a_shared_thread_do_not_wait<S: Subject>() {
    let config = RuntimeConfig {
        termination_timeout: TIMEOUT,
        kernel_wait: WaitStrategy::Park,
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(S::builder_with(config));
    let (next, outcomes, registration) = Attempts::handler();
    runtime.register(registration).unwrap();
    let first = runtime.launch("echo", 1, 1, small()).unwrap();
    let second = runtime.launch("test.attempt", 1, 1, small()).unwrap();
    let connection = runtime.connect(&first, &second).unwrap();
    assert_eq!(connection.kind(), ConnectionKind::SharedThread);
    first.activate().unwrap();
    second.activate().unwrap();
    let attempts = Attempts {
        kernel: second,
        next,
        outcomes,
    };
    for _ in 0..20 {
        let own = attempts.kernel.clone();
        let outcome = attempts.make(&first, move || own.deactivate());
        assert_refused(outcome, "deactivation", attempts.kernel.name());
        let reply = attempts.kernel.recv_bytes_timeout(&mut [0; 8], LONG);
        assert_eq!(reply, Ok(1));
    }
    // The second kernel's own thread may have its turn: then the first kernel's is free to follow.
    let other = first.clone();
    match attempts.make(&first, move || other.terminate()) {
        Ok(()) => assert_eq!(first.status().state, KernelState::Terminated),
        refused => assert_refused(refused, "termination", first.name()),
    }
    let begin = Instant::now();
    let report = runtime.complete_shutdown().unwrap();
    assert!(begin.elapsed() < AT_ONCE);
    assert!(
        report.errors.is_empty() && report.requests.adds_up(),
        "{report}"
    );
}

/// A handler that holds the last runtime may let go of it: its kernel ends once it returns.
pub fn a_handler_may_drop_the_last_runtime<S: Subject>() {
    let runtime = patient::<S>();
    let attempts = Attempts::new(&runtime);
    let other = active(&runtime, "echo", LaunchOptions::default());
    let (kernel, moved) = (attempts.kernel.clone(), other.clone());
    attempts
        .make(&kernel, move || {
            drop(runtime);
            // Others have ended.
            assert_eq!(moved.status().state, KernelState::Terminated);
            Ok(())
        })
        .unwrap();
    assert_eq!(other.status().state, KernelState::Terminated);
    eventually("the end of the kernel", || {
        attempts.kernel.status().state == KernelState::Terminated
    });
    // What the handler replied after that can be received.
    let mut buffer = [0; 8];
    assert_eq!(kernel.recv_bytes_timeout(&mut buffer, LONG), Ok(1));
    assert_eq!(
        kernel.recv_bytes_timeout(&mut buffer, LONG),
        Err(RecvTimeoutError::Unavailable(Unavailable::Terminated))
    );
}

/// So it may while another thread waits for the end of its kernel.
pub fn a_handler_may_drop_the_last_runtime_while_its_kernel_is_terminated<S: Subject>() {
    let runtime = patient::<S>();
    let attempts = Attempts::new(&runtime);
    let kernel = attempts.kernel.clone();
    let (tell, told) = mpsc::channel();
    let (ended, own) = (kernel.clone(), kernel.clone());
    let ending = thread::spawn(move || {
        told.recv_timeout(LONG).unwrap();
        ended.terminate()
    });
    attempts
        .make(&kernel, move || {
            tell.send(()).unwrap();
            eventually("the beginning of the end", || {
                own.status().state == KernelState::Terminating
            });
            drop(runtime);
            Ok(())
        })
        .unwrap();
    ending.join().unwrap().unwrap();
    assert_eq!(kernel.status().state, KernelState::Terminated);
}

/// Neither a call nor a send waits for the handler that makes it.
pub fn a_handler_that_calls_its_own_kernel_is_told_at_once<S: Subject>() {
    let runtime = patient::<S>();
    let attempts = Attempts::new(&runtime);
    let kernel = attempts.kernel.clone();
    let handle = kernel.clone();
    let made = attempts.make(&kernel, move || {
        let outcome = handle.call_bytes(b"y", &mut [0; 8], TIMEOUT);
        assert_eq!(outcome, Err(CallError::OwnKernel));
        Ok(())
    });
    made.unwrap();
    // Nothing was sent.
    assert_eq!(kernel.metrics().accepted, 1);
    assert_eq!(kernel.recv_bytes_timeout(&mut [0; 8], LONG), Ok(1));

    // So it is with a client's call.
    let [mut outside, mut inside] = [(); 2].map(|()| kernel.client_bytes().unwrap());
    let (tell, told) = mpsc::channel();
    *attempts.next.lock().unwrap() = Some(Box::new(move || {
        let outcome = inside.call_bytes(b"y", &mut [0; 8], TIMEOUT);
        let _ = tell.send(outcome);
        Ok(())
    }));
    outside.try_send_bytes(b"x").unwrap();
    let begin = Instant::now();
    let outcome = told.recv_timeout(2 * TIMEOUT).unwrap();
    assert_eq!(outcome, Err(CallError::OwnKernel));
    assert!(begin.elapsed() < AT_ONCE);
    drop((outside, attempts, kernel, runtime));

    // A send waits for no room that only the handler could make.
    let runtime = patient::<S>();
    let (next, outcomes, registration) = Attempts::handler();
    runtime.register(registration).unwrap();
    let kernel = active(&runtime, "test.attempt", small());
    let attempts = Attempts {
        kernel: kernel.clone(),
        next,
        outcomes,
    };
    let handle = kernel.clone();
    let outcome = attempts.make(&kernel, move || {
        let full = (0..64).find_map(|_| handle.send_bytes(b"y").err());
        assert_eq!(full, Some(SendTimeoutError::Full));
        Ok(())
    });
    outcome.unwrap();
}

/// A destructor on the kernel's own thread, after its handler, may end the kernel as well.
pub fn a_thread_local_destructor_may_terminate_its_own_kernel<S: Subject>() {
    struct Ends(KernelHandle, Sender<Duration>);

    impl Drop for Ends {
        fn drop(&mut self) {
            let begin = Instant::now();
            let _ = self.0.terminate();
            let _ = self.1.send(begin.elapsed());
        }
    }

    thread_local! {
        static ENDS: RefCell<Option<Ends>> = const { RefCell::new(None) };
    }

    let runtime = patient::<S>();
    let own = Arc::new(Mutex::new(None));
    let (tell, told) = mpsc::channel();
    let (given, tell) = (Arc::clone(&own), Mutex::new(tell));
    let kernel = with_handler(&runtime, "test.ends", move |_, _| {
        let handle = given.lock().unwrap().take();
        let tell = tell.lock().unwrap().clone();
        ENDS.set(handle.map(|handle| Ends(handle, tell)));
        panic!("so that its thread ends first");
    });
    *own.lock().unwrap() = Some(kernel.clone());
    kernel.send_bytes(b"x").unwrap();
    let took = told.recv_timeout(2 * TIMEOUT).unwrap();
    assert!(took < AT_ONCE, "{took:?}");
    let begin = Instant::now();
    drop(runtime);
    assert!(begin.elapsed() < AT_ONCE);
    assert_eq!(kernel.status().state, KernelState::Failed);
}

/// Of kernels that share a thread, the one whose handler does not return has failed, and no other;
/// callers that wait for another one are told whose handler that is.
pub fn a_stuck_handler_is_the_failure_of_its_own_kernel_alone<S: Subject>() {
    for last_first in [true, false] {
        let config = RuntimeConfig {
            termination_timeout: SHORT,
            kernel_wait: WaitStrategy::Park,
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(S::builder_with(config));
        let launch = |id| runtime.launch(id, 1, 1, small()).unwrap();
        let kernels = [launch("echo"), launch("echo"), launch("test.stuck")];
        for pair in kernels.windows(2) {
            let connection = runtime.connect(&pair[0], &pair[1]).unwrap();
            assert_eq!(connection.kind(), ConnectionKind::SharedThread);
        }
        for kernel in kernels.iter().rev() {
            kernel.activate().unwrap();
        }
        let [first, middle, last] = &kernels;
        // So that all are on the first one's thread; the last one has it then.
        for _ in 0..4 {
            first.send_bytes(b"x").unwrap();
        }
        eventually("it is in its hands", || last.metrics().accepted > 0);
        thread::sleep(Duration::from_millis(50));

        if !last_first {
            // It says whose handler holds the thread, unless the last one's own thread had its
            // turn.
            match first.deactivate() {
                Err(Error::ThreadHeld { holder, kernel, .. }) => {
                    assert_eq!(
                        (holder.as_str(), kernel.as_str()),
                        (last.name(), first.name())
                    );
                }
                Ok(()) => {}
                Err(error) => panic!("{error}"),
            }
            first.terminate().unwrap();
            middle.terminate().unwrap();
            assert_eq!(last.status().state, KernelState::Active);
        }
        assert!(matches!(last.terminate(), Err(Error::Timeout { .. })));
        let failure = last.status().failure.unwrap();
        assert_eq!(failure.reason, FailureReason::Stuck);
        if last_first {
            first.terminate().unwrap();
            middle.terminate().unwrap();
        }
        for kernel in [first, middle] {
            let status = kernel.status();
            assert_eq!(status.state, KernelState::Terminated, "{status:?}");
            assert_eq!(status.failure, None);
        }
        let report = runtime.complete_shutdown().unwrap();
        assert_eq!(report.failed_kernels, [last.name()], "{report}");
        assert!(
            report.requests.adds_up() && report.replies.adds_up(),
            "{report}"
        );
        // The one that its handler has is lost, and nothing else.
        assert_eq!(report.requests.dead_lettered, 1, "{report}");
        let stuck = format!("in the handler of kernel '{}'", last.name());
        assert!(!report.left_behind.is_empty());
        for thread in &report.left_behind {
            assert!(thread.ends_with(&stuck), "{report}");
        }
        let _open = Opened::new(&UNSTUCK);
        drop((runtime, kernels));
        #[cfg(target_os = "linux")]
        eventually("the end of the threads left behind", || {
            !std::fs::read_dir("/proc/self/task").unwrap().any(|task| {
                // A thread may end between the listing and the reading.
                std::fs::read_to_string(task.unwrap().path().join("comm"))
                    .is_ok_and(|name| name.starts_with("rk-"))
            })
        });
    }
}
