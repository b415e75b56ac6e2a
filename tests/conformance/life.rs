//! Launch to termination, of kernels and of the runtime.

use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::{
    CallError, RecvTimeoutError, SendTimeoutError, TryRecvError, TrySendError, Unavailable,
};
use ringkernel::{
    Dim3, Error, KernelHandle, KernelState, LaunchOptions, LifecycleState, RuntimeConfig,
    WaitStrategy,
};

use super::kernels::{GATE_OPEN, Opened};
use super::{LONG, Subject, active, eventually, runtime, small};

fn state(kernel: &KernelHandle) -> KernelState {
    kernel.status().state
}

pub fn an_unknown_kernel_is_refused_with_a_list<S: Subject>() {
    let runtime = runtime::<S>();
    let error = runtime.launch("no.such.kernel", 1, 1, small()).unwrap_err();
    match &error {
        Error::KernelNotFound { id, registered } => {
            assert_eq!(id, "no.such.kernel");
            assert_eq!(registered, &runtime.registered());
            assert!(registered.is_sorted());
            for built_in in ["echo", "saxpy", "sink", "test.add"] {
                assert!(registered.iter().any(|id| id == built_in));
            }
        }
        other => panic!("{other}"),
    }
    let echo = ringkernel::KernelRegistration::new("echo");
    assert!(matches!(
        runtime.register(echo),
        Err(Error::DuplicateKernel { .. })
    ));
    assert!(ringkernel::find_kernel("echo").is_some());
    assert!(ringkernel::find_kernel("test.add").is_none());
}

pub fn bad_launch_options_are_refused<S: Subject>() {
    let runtime = runtime::<S>();
    let launch = |grid: Dim3, block: Dim3, options| {
        runtime
            .launch("echo", grid, block, options)
            .map(|_| ())
            .unwrap_err()
    };
    let one = Dim3::x(1);
    let invalid = |error: Error, expected: &str| match &error {
        Error::InvalidOption { option, .. } => assert_eq!(*option, expected, "{error}"),
        other => panic!("{expected}: {other}"),
    };
    invalid(launch(Dim3::x(0), one, small()), "grid");
    invalid(launch(Dim3::new(1, 0, 1), one, small()), "grid");
    invalid(launch(Dim3::x(u32::MAX), one, small()), "grid");
    invalid(launch(one, Dim3::x(0), small()), "block size");
    invalid(launch(one, Dim3::x(1025), small()), "block size");
    let sizes = "queue_capacity or message_size";
    for capacity in [0, (1 << 24) + 1, usize::MAX] {
        let options = LaunchOptions {
            queue_capacity: Some(capacity),
            ..small()
        };
        invalid(launch(one, one, options), sizes);
    }
    for size in [1 << 24, usize::MAX] {
        let options = LaunchOptions {
            message_size: Some(size),
            ..small()
        };
        invalid(launch(one, one, options), sizes);
    }
    for calls in [0, 256] {
        let options = LaunchOptions {
            max_pending_calls: calls,
            ..small()
        };
        invalid(launch(one, one, options), "max_pending_calls");
    }
    let options = LaunchOptions {
        cores: vec![0, 0],
        ..small()
    };
    invalid(launch(one, one, options), "cores");
    let options = LaunchOptions {
        cores: vec![100_000],
        ..small()
    };
    assert!(matches!(
        launch(one, one, options),
        Error::CoreNotFound { core: 100_000, .. }
    ));
    let options = LaunchOptions {
        device: Some(9),
        ..small()
    };
    assert!(matches!(
        launch(one, one, options),
        Error::DeviceNotFound { index: 9, .. }
    ));
    let named = LaunchOptions {
        name: Some("twin".into()),
        ..small()
    };
    let twin = runtime.launch("echo", 1, 1, named.clone()).unwrap();
    invalid(launch(one, one, named), "name");
    assert_eq!(twin.name(), "twin");
    // Capacities are rounded up to a power of two, 2 at least.
    for (asked, rounded) in [(1, 2), (3, 4), (1000, 1024)] {
        let options = LaunchOptions {
            queue_capacity: Some(asked),
            ..small()
        };
        let kernel = active(&runtime, "sink", options);
        kernel.deactivate().unwrap();
        kernel.activate().unwrap();
        let (mut sender, _receiver) = kernel.split_bytes().unwrap();
        eventually("an empty ring", || {
            sender
                .batch(5000)
                .is_ok_and(|batch| batch.room() == rounded)
        });
    }
}

pub fn bad_configurations_are_refused<S: Subject>() {
    let base = RuntimeConfig::default;
    let day = Duration::from_secs(24 * 60 * 60);
    let long = day + Duration::from_nanos(1);
    let bad = [
        RuntimeConfig {
            default_queue_capacity: 0,
            ..base()
        },
        RuntimeConfig {
            default_message_size: 1 << 24,
            ..base()
        },
        RuntimeConfig {
            bridge_poll_interval: long,
            ..base()
        },
        RuntimeConfig {
            termination_timeout: long,
            ..base()
        },
        RuntimeConfig {
            default_timeout: long,
            ..base()
        },
        RuntimeConfig {
            heartbeat_interval: long,
            ..base()
        },
        RuntimeConfig {
            heartbeat_interval: Duration::ZERO,
            ..base()
        },
        RuntimeConfig {
            stall_timeout: Some(long),
            ..base()
        },
        RuntimeConfig {
            stall_timeout: Some(Duration::from_millis(99)),
            ..base()
        },
        RuntimeConfig {
            cpu_devices: 0,
            ..base()
        },
        RuntimeConfig {
            cpu_devices: 65,
            ..base()
        },
    ];
    for config in bad {
        let error = S::builder_with(config).build().unwrap_err();
        assert!(matches!(error, Error::InvalidOption { .. }), "{error}");
    }
    let reserved = RuntimeConfig {
        reserved_cores: vec![100_000],
        ..base()
    };
    assert!(matches!(
        S::builder_with(reserved).build(),
        Err(Error::CoreNotFound { .. })
    ));
    assert!(matches!(
        S::builder().device(99).build(),
        Err(Error::DeviceNotFound { index: 99, .. })
    ));
    let nameless = ringkernel::KernelRegistration::new("");
    assert!(matches!(
        S::builder().register(nameless).build(),
        Err(Error::InvalidOption { .. })
    ));
}

pub fn transitions_are_enforced<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = runtime.launch("echo", 1, 1, small()).unwrap();
    let illegal = |result: Result<(), Error>, from: &str, to: &str| match result {
        Err(Error::InvalidTransition {
            from: found_from,
            to: found_to,
            ..
        }) => assert_eq!((found_from, found_to), (from, to)),
        other => panic!("{from} -> {to}: {other:?}"),
    };
    assert_eq!(state(&kernel), KernelState::Launched);
    illegal(kernel.deactivate(), "Launched", "Deactivated");
    kernel.activate().unwrap();
    assert_eq!(state(&kernel), KernelState::Active);
    illegal(kernel.activate(), "Active", "Active");
    kernel.deactivate().unwrap();
    assert_eq!(state(&kernel), KernelState::Deactivated);
    illegal(kernel.deactivate(), "Deactivated", "Deactivated");
    kernel.activate().unwrap();
    kernel.terminate().unwrap();
    assert_eq!(state(&kernel), KernelState::Terminated);
    illegal(kernel.terminate(), "Terminated", "Terminating");
    illegal(kernel.activate(), "Terminated", "Active");
    illegal(kernel.deactivate(), "Terminated", "Deactivated");
    // From the other states as well.
    let launched = runtime.launch("echo", 1, 1, small()).unwrap();
    launched.terminate().unwrap();
    let deactivated = active(&runtime, "echo", small());
    deactivated.deactivate().unwrap();
    deactivated.terminate().unwrap();
    assert!(runtime.kernels().is_empty());
}

pub fn each_state_refuses_sends_with_an_error_of_its_own<S: Subject>() {
    let runtime = runtime::<S>();
    let refused = |kernel: &KernelHandle, why| {
        let begin = Instant::now();
        assert_eq!(
            kernel.send_bytes(b"x"),
            Err(SendTimeoutError::Unavailable(why))
        );
        assert_eq!(
            kernel.try_send_bytes(b"x"),
            Err(TrySendError::Unavailable(why))
        );
        assert_eq!(
            kernel.call_bytes(b"x", &mut [0; 8], LONG),
            Err(CallError::Unavailable(why))
        );
        assert!(begin.elapsed() < LONG / 2, "not at once");
    };
    let kernel = runtime.launch("test.panic", 1, 1, small()).unwrap();
    refused(&kernel, Unavailable::NotActivated);
    kernel.activate().unwrap();
    kernel.deactivate().unwrap();
    refused(&kernel, Unavailable::Deactivated);
    kernel.activate().unwrap();
    kernel.send_bytes(b"panic").unwrap();
    eventually("the failure", || state(&kernel) == KernelState::Failed);
    refused(&kernel, Unavailable::Failed);
    let ended = active(&runtime, "echo", small());
    ended.terminate().unwrap();
    refused(&ended, Unavailable::Terminated);
    let draining = active(&runtime, "echo", small());
    runtime.drain(LONG).unwrap();
    refused(&draining, Unavailable::Draining);
}

pub fn deactivation_keeps_state_and_queue<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.count", LaunchOptions::default());
    let mut reply = [0; 12];
    kernel.call_bytes(b"", &mut reply, LONG).unwrap();
    // Sends until the kernel is deactivated under it: some messages are handled, some stay queued.
    let accepted = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut accepted = 0_u64;
            loop {
                match kernel.try_send_bytes(b"") {
                    Ok(()) => accepted += 1,
                    Err(TrySendError::Full | TrySendError::Busy) => thread::yield_now(),
                    Err(TrySendError::Unavailable(Unavailable::Deactivated)) => return accepted,
                    Err(error) => panic!("{error}"),
                }
            }
        });
        thread::sleep(Duration::from_millis(2));
        kernel.deactivate().unwrap();
        sender.join().unwrap()
    });
    let frozen = kernel.metrics();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(
        kernel.metrics().processed,
        frozen.processed,
        "still working"
    );
    assert_eq!(frozen.accepted, accepted + 1);
    kernel.activate().unwrap();
    // It goes on counting where it stopped, through all that was queued.
    for expected in 2..accepted + 2 {
        kernel.recv_bytes_timeout(&mut reply, LONG).unwrap();
        assert_eq!(reply[..8], expected.to_ne_bytes());
    }
    assert_eq!(kernel.try_recv_bytes(&mut reply), Err(TryRecvError::Empty));
}

pub fn a_kernel_blocked_on_a_full_reply_ring_can_be_deactivated_and_terminated<S: Subject>() {
    let runtime = runtime::<S>();
    for wait in [WaitStrategy::Spin, WaitStrategy::Park] {
        let options = LaunchOptions {
            wait: Some(wait),
            ..small()
        };
        let kernel = active(&runtime, "test.repeat", options);
        kernel.send_bytes(&[200]).unwrap();
        eventually("a full reply ring", || kernel.metrics().produced == 16);
        kernel.deactivate().unwrap();
        kernel.activate().unwrap();
        let mut reply = [0];
        for index in 0..50 {
            kernel.recv_bytes_timeout(&mut reply, LONG).unwrap();
            assert_eq!(reply, [index]);
        }
        // But for a quarter, which comes back as a whole.
        eventually("a reply ring that is full again", || {
            kernel.metrics().produced >= 50 + 16 - 4
        });
        kernel.terminate().unwrap();
        assert_eq!(state(&kernel), KernelState::Terminated);
        // What was written before the end can still be read, and then the reason follows.
        let mut left = 0;
        let end = loop {
            match kernel.recv_bytes_timeout(&mut reply, LONG) {
                Ok(_) => left += 1,
                Err(error) => break error,
            }
        };
        assert!(left >= 16 - 4, "{left} replies left");
        assert_eq!(end, RecvTimeoutError::Unavailable(Unavailable::Terminated));
    }
}

pub fn terminate_wakes_blocked_senders_and_receivers<S: Subject>() {
    let runtime = runtime::<S>();
    for host_wait in [
        WaitStrategy::Spin,
        WaitStrategy::SpinYield,
        WaitStrategy::Park,
        WaitStrategy::Auto,
    ] {
        let options = LaunchOptions {
            host_wait: Some(host_wait),
            queue_capacity: Some(2),
            ..LaunchOptions::default()
        };
        let kernel = active(&runtime, "test.gated", options);
        let caller = active(&runtime, "sink", small());
        while kernel.try_send_bytes(b"x").is_ok() {}
        thread::scope(|scope| {
            let unavailable = Unavailable::Terminated;
            let receiver = scope.spawn(|| kernel.recv_bytes_timeout(&mut [0; 8], LONG));
            let sender = scope
                .spawn(|| kernel.send_bytes_with(b"y", &ringkernel::SendOptions::default(), LONG));
            let calling = scope.spawn(|| caller.call_bytes(b"z", &mut [0; 8], LONG));
            thread::sleep(Duration::from_millis(20));
            let begin = Instant::now();
            caller.terminate().unwrap();
            let opener = scope.spawn(|| {
                thread::sleep(Duration::from_millis(5));
                drop(Opened::new(&GATE_OPEN));
                // Long enough for one look at the gate.
                let open = Opened::new(&GATE_OPEN);
                thread::sleep(Duration::from_millis(50));
                drop(open);
            });
            kernel.terminate().unwrap();
            opener.join().unwrap();
            // The message in the handler's hands was answered.
            let received = receiver.join().unwrap();
            assert!(
                received == Ok(1) || received == Err(RecvTimeoutError::Unavailable(unavailable)),
                "{received:?}"
            );
            assert_eq!(
                sender.join().unwrap(),
                Err(SendTimeoutError::Unavailable(unavailable))
            );
            assert_eq!(
                calling.join().unwrap(),
                Err(CallError::Unavailable(unavailable))
            );
            assert!(begin.elapsed() < LONG / 2);
        });
    }
}

pub fn terminate_wakes_those_who_wait_for_room_and_for_replies<S: Subject>() {
    let runtime = runtime::<S>();
    for host_wait in [WaitStrategy::Spin, WaitStrategy::Park, WaitStrategy::Auto] {
        let options = LaunchOptions {
            host_wait: Some(host_wait),
            ..small()
        };
        // One kernel whose rings are full, one that never answers.
        let full = active(&runtime, "echo", options.clone());
        // Some of the sixteen requests that it has handled may not have given their slots back.
        eventually("two full rings", || {
            let metrics = full.metrics();
            while full.try_send_bytes(b"x").is_ok() {}
            metrics.processed == 16 && metrics.produced == 16
        });
        let silent = active(&runtime, "sink", options);
        thread::scope(|scope| {
            let sender = scope
                .spawn(|| full.send_bytes_with(b"y", &ringkernel::SendOptions::default(), LONG));
            let receiver = scope.spawn(|| silent.recv_bytes_timeout(&mut [0; 8], LONG));
            let caller = scope.spawn(|| silent.call_bytes(b"z", &mut [0; 8], LONG));
            thread::sleep(Duration::from_millis(20));
            let begin = Instant::now();
            full.terminate().unwrap();
            silent.terminate().unwrap();
            let unavailable = Unavailable::Terminated;
            assert_eq!(
                sender.join().unwrap(),
                Err(SendTimeoutError::Unavailable(unavailable))
            );
            assert_eq!(
                receiver.join().unwrap(),
                Err(RecvTimeoutError::Unavailable(unavailable))
            );
            assert_eq!(
                caller.join().unwrap(),
                Err(CallError::Unavailable(unavailable))
            );
            assert!(begin.elapsed() < LONG / 2);
        });
    }
}

pub fn handles_endpoints_and_runtime_may_be_dropped_in_any_order<S: Subject>() {
    let mut reply = [0; 8];
    for order in 0..6 {
        let runtime = runtime::<S>();
        let kernel = active(&runtime, "echo", small());
        kernel.call_bytes(b"ping", &mut reply, LONG).unwrap();
        let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
        sender.try_send_bytes(b"last").unwrap();
        receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
        let terminated = Unavailable::Terminated;
        match order {
            0 => {
                drop(runtime);
                assert_eq!(
                    sender.try_send_bytes(b"x"),
                    Err(TrySendError::Unavailable(terminated))
                );
                assert_eq!(
                    receiver.try_recv_bytes(&mut reply),
                    Err(TryRecvError::Unavailable(terminated))
                );
                drop(kernel);
                drop(sender);
                drop(receiver);
            }
            1 => {
                drop(kernel);
                drop(runtime);
                drop(receiver);
                drop(sender);
            }
            2 => {
                drop(sender);
                drop(runtime);
                drop(kernel);
                drop(receiver);
            }
            3 => {
                drop(receiver);
                drop(sender);
                drop(kernel);
                drop(runtime);
            }
            4 => {
                drop(sender);
                drop(receiver);
                drop(runtime);
                assert_eq!(
                    kernel.send_bytes(b"x"),
                    Err(SendTimeoutError::Unavailable(terminated))
                );
            }
            _ => {
                kernel.terminate().unwrap();
                drop(runtime);
                assert_eq!(state(&kernel), KernelState::Terminated);
                drop(receiver);
                drop(kernel);
                drop(sender);
            }
        }
    }
}

pub fn drain_delivers_what_is_in_flight_and_its_report_adds_up<S: Subject>() {
    let runtime = runtime::<S>();
    let busy = active(&runtime, "echo", LaunchOptions::default());
    let slow = active(&runtime, "test.sleep", LaunchOptions::default());
    let idle = runtime.launch("echo", 1, 1, small()).unwrap();
    for _ in 0..1000 {
        busy.send_bytes(b"x").unwrap();
    }
    for _ in 0..20 {
        slow.send_bytes(&[1]).unwrap();
    }
    let report = runtime.drain(LONG).unwrap();
    assert!(report.complete);
    assert_eq!(report.remaining, 0);
    assert_eq!(runtime.state(), LifecycleState::Draining);
    assert_eq!(busy.metrics().processed, 1000);
    assert_eq!(slow.metrics().processed, 20);
    assert!(matches!(
        runtime.launch("echo", 1, 1, small()),
        Err(Error::InvalidLifecycle { .. })
    ));
    // Replies stay receivable, while draining and after the end.
    for _ in 0..10 {
        busy.recv_bytes_timeout(&mut [0; 8], LONG).unwrap();
    }
    assert_eq!(state(&idle), KernelState::Launched);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!((report.kernels, report.failed_kernels.len()), (3, 0));
    assert_eq!(report.requests.accepted, 1020);
    assert_eq!(report.requests.delivered, 1020);
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
    assert_eq!(report.replies.accepted, 1020);
    assert_eq!(report.replies.delivered, 10);
    assert_eq!(report.replies.returned, 1010);
    assert!(report.errors.is_empty() && report.uptime > Duration::ZERO);
    assert_eq!(busy.recv_bytes_timeout(&mut [0; 8], LONG), Ok(1));
}

pub fn what_is_queued_at_shutdown_is_returned<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.sleep", LaunchOptions::default());
    let sent: Vec<[u8; 2]> = (0..50).map(|number| [20, number]).collect();
    for message in &sent {
        kernel.send_bytes(message).unwrap();
    }
    // Bounded, though the kernel needs a second.
    let begin = Instant::now();
    let drained = runtime.drain(Duration::from_millis(30)).unwrap();
    assert!(!drained.complete && drained.remaining > 0, "{drained:?}");
    assert!(begin.elapsed() < LONG / 2);
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.requests.adds_up(), "{report}");
    assert_eq!(report.requests.accepted, 50);
    assert!(report.requests.returned > 0);
    // Those that no handler saw come back, and no other.
    assert_eq!(report.returned.len() as u64, report.requests.returned);
    let expected = &sent[report.requests.delivered as usize..];
    let returned: Vec<&[u8]> = report
        .returned
        .iter()
        .map(|message| message.payload.as_slice())
        .collect();
    assert_eq!(returned, expected);
    assert_eq!(report.returned[0].kernel, "test.sleep");
}

pub fn the_life_of_a_runtime_only_goes_forward<S: Subject>() {
    let fresh = runtime::<S>();
    assert_eq!(fresh.state(), LifecycleState::Initializing);
    assert!(matches!(
        fresh.drain(LONG),
        Err(Error::InvalidLifecycle { .. })
    ));
    fresh.start().unwrap();
    fresh.start().unwrap();
    assert_eq!(fresh.state(), LifecycleState::Running);
    fresh.drain(LONG).unwrap();
    fresh.drain(LONG).unwrap();
    assert!(matches!(fresh.start(), Err(Error::InvalidLifecycle { .. })));
    fresh.complete_shutdown().unwrap();
    assert_eq!(fresh.state(), LifecycleState::Stopped);
    assert!(fresh.complete_shutdown().is_err());
    assert!(fresh.drain(LONG).is_err());
    assert!(fresh.launch("echo", 1, 1, small()).is_err());
    let launched = runtime::<S>();
    let _kernel = launched.launch("echo", 1, 1, small()).unwrap();
    assert_eq!(launched.state(), LifecycleState::Running);
}

pub fn nothing_can_be_committed_after_the_end<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    let (mut sender, _receiver) = kernel.split_bytes().unwrap();
    let terminated = Err(TrySendError::Unavailable(Unavailable::Terminated));
    let slot = sender.reserve().unwrap();
    kernel.terminate().unwrap();
    assert_eq!(slot.commit(1), terminated);
    let other = active(&runtime, "echo", small());
    let (mut sender, _receiver) = other.split_bytes().unwrap();
    let mut batch = sender.batch(4).unwrap();
    batch.stage_bytes(b"x").unwrap();
    other.terminate().unwrap();
    assert_eq!(batch.commit().map(|_| ()), terminated);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.requests.accepted, 0);
}

pub fn names_are_unique_and_clean<S: Subject>() {
    let runtime = runtime::<S>();
    let named = |name: &str| LaunchOptions {
        name: Some(name.into()),
        ..small()
    };
    let first = runtime.launch("echo", 1, 1, named("echo-2")).unwrap();
    let others: Vec<KernelHandle> = (0..3)
        .map(|_| runtime.launch("echo", 1, 1, small()).unwrap())
        .collect();
    let mut names: Vec<&str> = others.iter().map(KernelHandle::name).collect();
    names.push(first.name());
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(matches!(
        runtime.launch("echo", 1, 1, named("nul\0")),
        Err(Error::InvalidOption { option: "name", .. })
    ));
    for registration in [
        ringkernel::KernelRegistration::new("nul\0"),
        ringkernel::KernelRegistration::new("huge").state_size(usize::MAX),
        ringkernel::KernelRegistration::new("huge").state_size(usize::MAX - 62),
    ] {
        assert!(matches!(
            runtime.register(registration),
            Err(Error::InvalidOption { .. })
        ));
    }
}
