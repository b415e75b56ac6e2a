//! `fork`: kernels and threads stay with the parent. The child is told so at once by everything
//! that it inherited, waits for nothing when it drops it, and builds a runtime of its own; the
//! parent notices nothing.

#![cfg(all(feature = "std", target_os = "linux"))]

use std::fmt::Debug;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ringkernel::error::{
    CallError, RecvTimeoutError, SendTimeoutError, TryRecvError, TrySendError, Unavailable,
};
use ringkernel::kernel::FailureReason;
use ringkernel::thread::realtime::{RealtimeHandle, RealtimeThread};
use ringkernel::{
    BackendType, Bytes, Client, Error, KernelHandle, KernelState, LaunchOptions, LifecycleState,
    Publisher, Receiver, RingKernelRuntime, Sender, Subscriber, SubscriberOptions, TopicOptions,
    WaitStrategy,
};

/// Longer than any wait that ends.
const LONG: Duration = Duration::from_secs(60);

/// What a child may take for everything that is to happen at once. It is far below `LONG`, for
/// which calls may wait.
const AT_ONCE: Duration = Duration::from_secs(30);

/// Children are made one at a time: each would inherit what the other tests do at the moment.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `act` in a child of this process, and gives back what the parent keeps. Fails unless it
/// ends in time, without a panic.
fn in_a_child<T>(kept: T, fork: fn() -> libc::pid_t, act: impl FnOnce(T)) -> T {
    let mut ends = [0; 2];
    // SAFETY: the pointer is to two numbers.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: both were just opened, and nothing else owns them.
    let (mut said, mut says) = unsafe {
        (
            std::fs::File::from_raw_fd(ends[0]),
            std::fs::File::from_raw_fd(ends[1]),
        )
    };
    let child = fork();
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        // The hook of the test harness takes locks that other threads may have held.
        std::panic::set_hook(Box::new(|_| ()));
        let outcome = catch_unwind(AssertUnwindSafe(|| act(kept)));
        let code = match outcome {
            Ok(()) => 0,
            Err(panic) => {
                let text = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied());
                let _ = says.write_all(text.unwrap_or("a panic").as_bytes());
                1
            }
        };
        // SAFETY: it ends this process, and returns to nothing of what the parent has.
        unsafe { libc::_exit(code) };
    }
    drop(says);
    let begin = Instant::now();
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to a number; the child is this process's own.
        let ended = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
        assert!(ended >= 0, "{}", std::io::Error::last_os_error());
        if ended == child {
            break;
        }
        if begin.elapsed() > AT_ONCE {
            // SAFETY: the child is this process's own, and has not been waited for.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &raw mut status, 0);
            }
            panic!("the child waits for something");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut text = String::new();
    let _ = said.read_to_string(&mut text);
    assert!(status == 0, "status {status:#x}: {text}");
    kept
}

fn fork() -> libc::pid_t {
    // SAFETY: the child keeps to this crate and to what allocates, whose own handlers make that
    // safe with this C library.
    unsafe { libc::fork() }
}

/// A child that no handler of `pthread_atfork` is told of.
fn clone_alone() -> libc::pid_t {
    // SAFETY: a copy of the process with the same stack, as `fork` makes it.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    child as libc::pid_t
}

fn runtime() -> RingKernelRuntime {
    RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .build()
        .unwrap()
}

fn launched(runtime: &RingKernelRuntime, id: &str, wait: WaitStrategy) -> KernelHandle {
    let options = LaunchOptions {
        wait: Some(wait),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch(id, 1, 1, options).unwrap();
    kernel.activate().unwrap();
    kernel
}

/// Waits until the kernel has written so many replies.
fn until_produced(kernel: &KernelHandle, replies: u64) {
    let begin = Instant::now();
    while kernel.metrics().produced < replies {
        assert!(begin.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One of everything, each with a message that has not been received.
struct All {
    handle: KernelHandle,
    sender: Sender<Bytes>,
    receiver: Receiver<Bytes>,
    client: Client<Bytes, Bytes>,
    publisher: Publisher<Bytes>,
    subscriber: Subscriber<Bytes>,
    thread: RealtimeHandle<()>,
    of_clients: KernelHandle,
    runtime: RingKernelRuntime,
}

impl All {
    fn new() -> Self {
        let runtime = runtime();
        let handle = launched(&runtime, "echo", WaitStrategy::Spin);
        handle.send_bytes(b"handle").unwrap();
        let split = launched(&runtime, "echo", WaitStrategy::Park);
        let (mut sender, receiver) = split.split_bytes().unwrap();
        sender.try_send_bytes(b"sender").unwrap();
        let of_clients = launched(&runtime, "echo", WaitStrategy::Park);
        let mut client = of_clients.client_bytes().unwrap();
        client.try_send_bytes(b"client").unwrap();
        let topic = runtime
            .topic_bytes("topic", TopicOptions::default())
            .unwrap();
        let subscriber = topic.subscribe(SubscriberOptions::default()).unwrap();
        let mut publisher = topic.publisher().unwrap();
        publisher.publish_bytes(b"topic").unwrap();
        let thread = RealtimeThread::new("fork")
            .spawn(|context| {
                while !context.must_stop() {
                    std::thread::sleep(Duration::from_millis(1));
                }
            })
            .unwrap();
        for kernel in [&handle, &split, &of_clients] {
            until_produced(kernel, 1);
        }
        Self {
            handle,
            sender,
            receiver,
            client,
            publisher,
            subscriber,
            thread,
            of_clients,
            runtime,
        }
    }

    /// In a child: everything says where it is.
    fn expect_elsewhere(&mut self) {
        let forked = Unavailable::Forked;
        let mut buffer = [0; 64];
        let Self {
            handle, runtime, ..
        } = self;
        assert_eq!(runtime.state(), LifecycleState::Stopped);
        assert_eq!(
            handle.try_send_bytes(b"x"),
            Err(TrySendError::Unavailable(forked))
        );
        assert_eq!(
            handle.send_bytes(b"x"),
            Err(SendTimeoutError::Unavailable(forked))
        );
        assert_eq!(
            handle.try_recv_bytes(&mut buffer),
            Err(TryRecvError::Unavailable(forked))
        );
        assert_eq!(
            handle.recv_bytes_timeout(&mut buffer, LONG),
            Err(RecvTimeoutError::Unavailable(forked))
        );
        assert_eq!(
            handle.call_bytes(b"x", &mut buffer, LONG),
            Err(CallError::Unavailable(forked))
        );
        assert_eq!(
            self.sender.try_send_bytes(b"x"),
            Err(TrySendError::Unavailable(forked))
        );
        assert_eq!(
            self.receiver.recv_bytes_timeout(&mut buffer, LONG),
            Err(RecvTimeoutError::Unavailable(forked))
        );
        assert_eq!(
            self.client.try_send_bytes(b"x"),
            Err(TrySendError::Unavailable(forked))
        );
        assert_eq!(
            self.client.recv_bytes_timeout(&mut buffer, LONG),
            Err(RecvTimeoutError::Unavailable(forked))
        );
        assert_eq!(
            self.publisher.publish_bytes(b"x"),
            Err(TrySendError::Unavailable(forked))
        );
        assert_eq!(
            self.subscriber.recv_bytes_timeout(&mut buffer, LONG),
            Err(RecvTimeoutError::Unavailable(forked))
        );
        let status = handle.status();
        assert_eq!(status.state, KernelState::Failed);
        let reason = status.failure.map(|failure| failure.reason);
        assert_eq!(reason, Some(FailureReason::Forked));
        assert_eq!(handle.metrics().status.state, KernelState::Failed);
        assert!(handle.traces().is_none());
        expect_forked(handle.activate());
        expect_forked(handle.deactivate());
        expect_forked(handle.terminate());
        expect_forked(handle.split_bytes());
        expect_forked(self.of_clients.client_bytes());
        expect_forked(runtime.launch("echo", 1, 1, LaunchOptions::default()));
        expect_forked(runtime.connect(handle, &self.of_clients));
        expect_forked(runtime.memory_in_use(0));
        expect_forked(runtime.topic_bytes("other", TopicOptions::default()));
        expect_forked(runtime.topics());
        expect_forked(runtime.start());
        expect_forked(runtime.drain(LONG));
        expect_forked(runtime.complete_shutdown());
        assert!(runtime.bridge(0).is_none());
        let _ = (runtime.devices(), runtime.registered(), runtime.kernels());
        self.thread.stop();
        assert!(self.thread.wait_finished(LONG));
    }

    /// In the parent: nothing has happened, and everything comes once.
    fn expect_untouched(mut self) {
        let mut buffer = [0; 64];
        for expected in [b"handle".as_slice(), b"after"] {
            let length = self.handle.recv_bytes_timeout(&mut buffer, LONG).unwrap();
            assert_eq!(&buffer[..length], expected);
            let _ = self.handle.send_bytes(b"after");
        }
        for (sent, length) in [(b"sender".as_slice(), 6), (b"again", 5)] {
            let received = self.receiver.recv_bytes_timeout(&mut buffer, LONG);
            assert_eq!(received, Ok(length), "{sent:?}");
            self.sender.try_send_bytes(b"again").unwrap();
        }
        assert_eq!(self.client.recv_bytes_timeout(&mut buffer, LONG), Ok(6));
        assert_eq!(self.subscriber.recv_bytes_timeout(&mut buffer, LONG), Ok(5));
        assert_eq!(
            self.subscriber.try_recv_bytes(&mut buffer),
            Err(TryRecvError::Empty)
        );
        self.publisher.publish_bytes(b"more").unwrap();
        assert_eq!(self.subscriber.recv_bytes_timeout(&mut buffer, LONG), Ok(4));
        assert!(!self.thread.is_finished());
        self.thread.stop();
        self.thread.join().unwrap();
        assert_eq!(self.runtime.state(), LifecycleState::Running);
        drop((self.sender, self.receiver, self.client));
        let report = self.runtime.complete_shutdown().unwrap();
        assert!(report.errors.is_empty(), "{report}");
        assert!(report.failed_kernels.is_empty(), "{report}");
        assert!(report.requests.adds_up(), "{report}");
    }
}

fn expect_forked<T: Debug>(outcome: Result<T, Error>) {
    assert!(matches!(outcome, Err(Error::Forked { .. })), "{outcome:?}");
}

/// A runtime from its building to its end.
fn live_anew() {
    let runtime = runtime();
    for wait in [WaitStrategy::Spin, WaitStrategy::Park, WaitStrategy::Auto] {
        let kernel = launched(&runtime, "echo", wait);
        let mut buffer = [0; 64];
        assert_eq!(kernel.call_bytes(b"anew", &mut buffer, LONG), Ok(4));
        let mut client = kernel.client_bytes().unwrap();
        client.try_send_bytes(b"client").unwrap();
        assert_eq!(client.recv_bytes_timeout(&mut buffer, LONG), Ok(6));
        drop(client);
        kernel.terminate().unwrap();
    }
    // The bridge lets go of the clients' lanes a moment later.
    let begin = Instant::now();
    while runtime.memory_in_use(0).unwrap() > 0 {
        assert!(begin.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.errors.is_empty(), "{report}");
}

#[test]
fn in_a_child_everything_says_at_once_that_it_is_elsewhere() {
    let _one = one_at_a_time();
    let all = in_a_child(All::new(), fork, |mut all| {
        all.expect_elsewhere();
        // Nor does anything wait when it is dropped.
        drop(all);
    });
    all.expect_untouched();
}

#[test]
fn a_child_builds_a_runtime_of_its_own_and_so_does_its_child() {
    let _one = one_at_a_time();
    let all = in_a_child(All::new(), fork, |all| {
        live_anew();
        let own = All::new();
        let mut both = in_a_child((all, own), fork, |(mut all, mut own)| {
            all.expect_elsewhere();
            own.expect_elsewhere();
            live_anew();
        });
        both.0.expect_elsewhere();
        both.1.expect_untouched();
    });
    all.expect_untouched();
}

#[test]
fn a_child_made_without_handlers_learns_of_it_from_the_control_plane() {
    let _one = one_at_a_time();
    let all = in_a_child(All::new(), clone_alone, |mut all| {
        assert_eq!(all.runtime.state(), LifecycleState::Stopped);
        all.expect_elsewhere();
        drop(all);
    });
    all.expect_untouched();
}

/// Locks that other threads hold in the very moment of the fork are held for ever in the child.
#[test]
fn no_child_waits_for_what_other_threads_held_when_it_was_made() {
    let _one = one_at_a_time();
    let stop = AtomicBool::new(false);
    let mut kept = Some(All::new());
    let shared_by = runtime();
    let shared = launched(&shared_by, "echo", WaitStrategy::Park);
    let busy = runtime();
    std::thread::scope(|scope| {
        let (stop, shared, busy) = (&stop, &shared, &busy);
        for _ in 0..2 {
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = shared.try_send_bytes(b"x");
                    let _ = shared.try_recv_bytes(&mut [0; 64]);
                    let _ = (shared.status(), shared.metrics());
                }
            });
        }
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let kernel = launched(busy, "echo", WaitStrategy::Park);
                drop(kernel.client_bytes().unwrap());
                let _ = (busy.kernels(), busy.memory_in_use(0));
                kernel.terminate().unwrap();
            }
        });
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            for round in 0..40 {
                let all = kept.take().unwrap();
                kept = Some(in_a_child(all, fork, |mut inherited| {
                    inherited.expect_elsewhere();
                    let forked = Err(TrySendError::Unavailable(Unavailable::Forked));
                    assert_eq!(shared.try_send_bytes(b"x"), forked, "round {round}");
                    expect_forked(busy.launch("echo", 1, 1, LaunchOptions::default()));
                    expect_forked(shared.terminate());
                    drop(inherited);
                    live_anew();
                }));
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    drop(shared);
    kept.unwrap().expect_untouched();
}

/// The clock is calibrated for 10 ms when a process first builds a runtime.
#[test]
fn a_child_made_while_the_first_runtime_is_built_builds_its_own() {
    let _one = one_at_a_time();
    for millis in [1, 3, 5, 7, 9] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .arg("in_a_process_that_builds_its_first_runtime")
            .env(MILLIS, millis.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{millis} ms: {text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// After how many milliseconds the child is made.
const MILLIS: &str = "RINGKERNEL_FORK_MILLIS";

#[test]
#[ignore = "run by another test, in a process of its own"]
fn in_a_process_that_builds_its_first_runtime() {
    let millis = std::env::var(MILLIS).unwrap().parse().unwrap();
    std::thread::scope(|scope| {
        let first = scope.spawn(runtime);
        std::thread::sleep(Duration::from_millis(millis));
        in_a_child((), fork, |()| live_anew());
        assert_eq!(first.join().unwrap().state(), LifecycleState::Initializing);
    });
}
