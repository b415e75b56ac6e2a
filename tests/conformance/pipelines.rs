//! Kernels whose replies are other kernels' requests.

use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::{
    CallError, HandlerError, MessageError, RecvTimeoutError, SendTimeoutError, TryRecvError,
    TrySendError, Unavailable,
};

use ringkernel::thread::affinity::usable_cores;
use ringkernel::{
    Connection, ConnectionKind, Error, KernelHandle, KernelRegistration, KernelState,
    LaunchOptions, PortableCode, Priority, RingKernelRuntime, SendOptions, WaitStrategy,
};

use super::kernels::{Add, OVERFLOW, Sum, module};
use super::{LONG, Subject, active, eventually, runtime, small};

/// Kernels that only these tests have.
pub(super) fn with_kernels(runtime: RingKernelRuntime) -> RingKernelRuntime {
    for registration in [
        // Declares its types in another order than `test.add`, so that kinds differ.
        KernelRegistration::new("pipe.negate")
            .shader(module!("negate"))
            .portable(PortableCode::new(include_str!("../kernels/negate.rk")))
            .typed_cpu_handler::<Sum, Sum, _>(|sum, _| {
                Ok(Sum {
                    value: -sum.value.to_native(),
                })
            }),
        // Adds one to a number; fails on 1000. On 2000 it panics, or does on a device what it must not.
        KernelRegistration::new("pipe.step")
            .shader(module!("step"))
            .portable(PortableCode::new(include_str!("../kernels/step.rk")))
            .cpu_handler(|request, context| {
                let number = number(request.payload());
                assert!(number != 2000, "told to panic");
                if number == 1000 {
                    return Err(HandlerError::new(17, "a thousand"));
                }
                context.reply_bytes(&(number + 1).to_ne_bytes())
            }),
    ] {
        runtime.register(registration).unwrap();
    }
    runtime
}

/// Rings of sixteen slots; kernels wherever the runtime puts them, or all on one core, where one thread runs them. On a device, kernels
/// that spin and such that sleep.
pub(super) fn placements<S: Subject>() -> [LaunchOptions; 2] {
    if !S::THREADS {
        let sleeping = LaunchOptions {
            wait: Some(WaitStrategy::Park),
            ..small()
        };
        return [small(), sleeping];
    }
    let together = LaunchOptions {
        cores: vec![*usable_cores().last().unwrap()],
        // Callers that spin would leave it no time.
        wait: Some(WaitStrategy::Park),
        host_wait: Some(WaitStrategy::Park),
        ..small()
    };
    [small(), together]
}

pub(super) fn number(payload: &[u8]) -> u64 {
    u64::from_ne_bytes(payload.try_into().unwrap())
}

/// Launches kernels and connects each with the next.
pub(super) fn chain_of(
    runtime: &RingKernelRuntime,
    ids: &[&str],
    options: &LaunchOptions,
) -> (Vec<KernelHandle>, Vec<Connection>) {
    let kernels: Vec<_> = ids
        .iter()
        .map(|id| runtime.launch(id, 1, 1, options.clone()).unwrap())
        .collect();
    let connections = kernels
        .windows(2)
        .map(|pair| runtime.connect(&pair[0], &pair[1]).unwrap())
        .collect();
    (kernels, connections)
}

/// The same, active.
pub(super) fn pipeline(
    runtime: &RingKernelRuntime,
    ids: &[&str],
    options: &LaunchOptions,
) -> Vec<KernelHandle> {
    let (kernels, _) = chain_of(runtime, ids, options);
    for kernel in &kernels {
        kernel.activate().unwrap();
    }
    kernels
}

pub(super) fn send(kernel: &KernelHandle, number: u64) -> Result<(), SendTimeoutError> {
    kernel.send_bytes(&number.to_ne_bytes())
}

pub(super) fn receive(kernel: &KernelHandle) -> Result<u64, RecvTimeoutError> {
    let mut buffer = [0; 8];
    kernel.recv_bytes_timeout(&mut buffer, LONG)?;
    Ok(u64::from_ne_bytes(buffer))
}

pub fn a_pipeline_delivers_everything_once_and_in_order<S: Subject>() {
    let messages = u64::from(S::PING_PONGS) / if S::THREADS { 10 } else { 50 };
    let [_, together] = placements::<S>();
    for (stages, options) in [
        (2, LaunchOptions::default()),
        (4, LaunchOptions::default()),
        (2, together.clone()),
        (4, together),
    ] {
        let runtime = with_kernels(runtime::<S>());
        let kernels = pipeline(&runtime, &vec!["pipe.step"; stages], &options);
        let (mut sender, mut receiver) = kernels[0]
            .split_bytes_through(&kernels[stages - 1])
            .unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                for number in 0..messages {
                    let payload = (10_000 + number).to_ne_bytes();
                    sender.send_bytes_timeout(&payload, LONG).unwrap();
                }
            });
            let mut buffer = [0; 8];
            for number in 0..messages {
                receiver.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                assert_eq!(u64::from_ne_bytes(buffer), 10_000 + number + stages as u64);
            }
        });
        assert_eq!(
            receiver.try_recv_bytes(&mut [0; 8]),
            Err(TryRecvError::Empty)
        );
        drop(receiver);
        eventually("the last counts", || {
            kernels
                .iter()
                .all(|kernel| kernel.metrics().received_replies == messages)
        });
        for kernel in &kernels {
            let metrics = kernel.metrics();
            assert_eq!(
                (
                    metrics.accepted,
                    metrics.processed,
                    metrics.produced,
                    metrics.received_replies
                ),
                (messages, messages, messages, messages)
            );
        }
        let report = runtime.complete_shutdown().unwrap();
        let all = messages * stages as u64;
        assert_eq!(
            (report.requests.accepted, report.requests.delivered),
            (all, all)
        );
        assert_eq!(
            (report.replies.accepted, report.replies.delivered),
            (all, all)
        );
        assert!(report.errors.is_empty());
    }
}

pub fn what_travels_through_keeps_its_marks<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        extended: true,
        ..small()
    };
    let kernels = pipeline(&runtime, &["echo", "echo", "echo"], &options);
    let (mut sender, mut receiver) = kernels[0].split_bytes_through(&kernels[2]).unwrap();
    for correlation in 1..=100 {
        let options = SendOptions {
            correlation,
            priority: Priority::Critical,
            timestamp: true,
            deadline_ns: Some(u64::MAX - u64::from(correlation)),
            trace_id: Some([correlation as u8; 16]),
            ..SendOptions::default()
        };
        sender.try_send_bytes_with(b"marked", &options).unwrap();
        let received = receiver.recv_ref_timeout(LONG).unwrap();
        let (header, extension) = (received.header(), received.extension().unwrap());
        assert_eq!(
            (header.correlation(), header.priority()),
            (correlation, Priority::Critical)
        );
        assert_eq!(extension.deadline_ns, u64::MAX - u64::from(correlation));
        assert_eq!(extension.trace_id, [correlation as u8; 16]);
        assert!(extension.timestamp_ns > 0);
        assert_eq!(received.payload(), b"marked");
    }
}

/// Nobody reads at the end: every ring fills, and then the first kernel takes nothing more. Nothing is lost.
pub fn a_pipeline_that_nobody_empties_holds_its_senders_back<S: Subject>() {
    for options in placements::<S>() {
        let runtime = with_kernels(runtime::<S>());
        let kernels = pipeline(&runtime, &["pipe.step"; 3], &options);
        let mut sent = 0;
        let mut full_since = Instant::now();
        // Full for a while: whatever can move on has done so.
        while full_since.elapsed() < Duration::from_millis(50) {
            match kernels[0].try_send_bytes(&(10_000_u64 + sent).to_ne_bytes()) {
                Ok(()) => {
                    sent += 1;
                    full_since = Instant::now();
                }
                Err(TrySendError::Full) => thread::sleep(Duration::from_micros(100)),
                Err(error) => panic!("{error}"),
            }
        }
        // Four rings of sixteen; each of the three kernels may hold less than a quarter of its ring back.
        assert!((4 * 16 - 3 * 3..=4 * 16).contains(&sent), "{sent}");
        for number in 0..sent {
            assert_eq!(receive(&kernels[2]), Ok(10_000 + number + 3));
        }
        assert_eq!(
            kernels[2].try_recv_bytes(&mut [0; 8]),
            Err(TryRecvError::Empty)
        );
        let report = runtime.complete_shutdown().unwrap();
        assert_eq!(
            (report.requests.delivered, report.replies.delivered),
            (3 * sent, 3 * sent)
        );
    }
}

pub fn types_are_translated_and_unknown_ones_are_errors<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    // `Add` is unknown to the second kernel, `Sum` has another kind there; the third takes anything.
    let kernels = pipeline(&runtime, &["test.add", "pipe.negate", "echo"], &small());
    let add = Add {
        left: 3,
        right: 4,
        negate: false,
    };
    for _ in 0..100 {
        let sum: Sum = kernels[0].call_through(&kernels[2], &add, LONG).unwrap();
        assert_eq!(sum.value, -7);
    }
    // An echo of `Add` is nothing that the second kernel takes.
    let kernels = pipeline(&runtime, &["echo", "pipe.negate"], &small());
    let error = kernels[0].call_through::<Add, Sum>(&kernels[1], &add, LONG);
    let Err(CallError::Message(MessageError::Handler(error))) = error else {
        panic!("{error:?}");
    };
    assert_eq!(error.code, HandlerError::BAD_REQUEST);
    eventually("the count", || kernels[0].metrics().processed == 1);
    assert_eq!(kernels[0].metrics().last_error, HandlerError::BAD_REQUEST);
    let sum: Sum = kernels[0]
        .call_through(&kernels[1], &Sum { value: 5 }, LONG)
        .unwrap();
    assert_eq!(sum.value, -5);
    // So is a reply that the next kernel's slots have no room for.
    let wide = LaunchOptions {
        message_size: Some(1000),
        ..small()
    };
    let from = runtime.launch("echo", 1, 1, wide).unwrap();
    let to = runtime.launch("echo", 1, 1, small()).unwrap();
    runtime.connect(&from, &to).unwrap();
    from.activate().unwrap();
    to.activate().unwrap();
    let mut buffer = [0; 1000];
    let error = from.call_bytes_through(&to, &[1; 500], &mut buffer, LONG);
    assert!(
        matches!(error, Err(CallError::Message(MessageError::Handler(error)))
            if error.code == HandlerError::REPLY_TOO_LARGE),
        "{error:?}"
    );
    assert_eq!(
        from.call_bytes_through(&to, b"fits", &mut buffer, LONG),
        Ok(4)
    );
}

pub fn errors_of_every_stage_reach_the_end<S: Subject>() {
    for options in placements::<S>() {
        let runtime = with_kernels(runtime::<S>());
        let kernels = pipeline(&runtime, &["pipe.step"; 3], &options);
        let mut buffer = [0; 8];
        // The number at which each stage fails, as the first one sees it.
        for (stage, number) in [(0, 1000_u64), (1, 999), (2, 998)] {
            let error = kernels[0].call_bytes_through(
                &kernels[2],
                &number.to_ne_bytes(),
                &mut buffer,
                LONG,
            );
            let Err(CallError::Message(MessageError::Handler(error))) = error else {
                panic!("{error:?}");
            };
            // Device code has no texts.
            let text = if S::THREADS { "a thousand" } else { "" };
            assert_eq!((error.code, error.text()), (17, text));
            eventually("the count", || {
                let errors = kernels[stage].metrics().telemetry.unwrap().errors;
                errors == 1
            });
            assert_eq!(kernels[stage].metrics().last_error, 17);
        }
        for kernel in &kernels {
            // Each counts its own.
            eventually("the count", || kernel.metrics().processed == 3);
            assert_eq!(kernel.metrics().telemetry.unwrap().errors, 1);
        }
        // A correlation of the sender's own travels with the error.
        let options = SendOptions {
            correlation: 77,
            ..SendOptions::default()
        };
        let (mut sender, mut receiver) = kernels[0].split_bytes_through(&kernels[2]).unwrap();
        sender
            .try_send_bytes_with(&1000_u64.to_ne_bytes(), &options)
            .unwrap();
        let received = receiver.recv_ref_timeout(LONG).unwrap();
        assert_eq!(received.header().correlation(), 77);
        assert_eq!(received.error().unwrap().code, 17);
    }
}

pub fn sums_that_overflow_are_errors_behind_a_translation<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    let kernels = pipeline(&runtime, &["test.add", "pipe.negate"], &small());
    let add = Add {
        left: u64::MAX,
        right: 1,
        negate: false,
    };
    let error = kernels[0].call_through::<Add, Sum>(&kernels[1], &add, LONG);
    assert!(
        matches!(error, Err(CallError::Message(MessageError::Handler(error))) if error.code == OVERFLOW),
        "{error:?}"
    );
}

pub fn connected_handles_say_so<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    let kernels = pipeline(&runtime, &["pipe.step"; 3], &small());
    let [first, middle, last] = &kernels[..] else {
        unreachable!()
    };
    let connected = Unavailable::Connected;
    for kernel in [middle, last] {
        assert_eq!(kernel.try_send_bytes(b"x"), Err(connected.into()));
        assert_eq!(kernel.send_bytes(b"x"), Err(connected.into()));
        assert_eq!(
            kernel.call_bytes(b"x", &mut [0], LONG),
            Err(connected.into())
        );
    }
    for kernel in [first, middle] {
        assert_eq!(kernel.try_recv_bytes(&mut [0]), Err(connected.into()));
        assert_eq!(
            kernel.recv_bytes_timeout(&mut [0], LONG),
            Err(connected.into())
        );
        assert_eq!(
            kernel.call_bytes(b"x", &mut [0], LONG),
            Err(connected.into())
        );
    }
    for kernel in &kernels {
        assert!(matches!(
            kernel.split_bytes(),
            Err(Error::EndpointsBusy { .. })
        ));
    }
    // A reply never comes to a kernel that is not behind.
    let stranger = active(&runtime, "pipe.step", small());
    assert_eq!(
        stranger.call_bytes_through(last, &1_u64.to_ne_bytes(), &mut [0; 8], LONG),
        Err(Unavailable::NotConnected.into())
    );
    let mut buffer = [0; 8];
    first
        .call_bytes_through(last, &1_u64.to_ne_bytes(), &mut buffer, LONG)
        .unwrap();
    assert_eq!(u64::from_ne_bytes(buffer), 4);
}

pub fn what_cannot_be_connected_is_refused_and_changes_nothing<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    let elsewhere = with_kernels(super::runtime::<S>());
    let (kernels, connections) = chain_of(&runtime, &["pipe.step"; 3], &small());
    let [a, b, c] = &kernels[..] else {
        unreachable!()
    };
    let name = |kernel: &KernelHandle| kernel.name().to_owned();
    assert_eq!(connections[0].kind(), ConnectionKind::SharedRing);
    assert_eq!(
        (connections[0].from(), connections[0].to()),
        (a.name(), b.name())
    );
    // In circles, of every length.
    for (from, to, way) in [
        (a, a, vec![a, a]),
        (b, a, vec![b, a, b]),
        (c, a, vec![c, a, b, c]),
    ] {
        let Err(Error::Cycle { kernels }) = runtime.connect(from, to) else {
            panic!("{} -> {}", from.name(), to.name());
        };
        assert_eq!(kernels, way.into_iter().map(name).collect::<Vec<_>>());
    }
    // Twice the same way.
    let d = runtime.launch("pipe.step", 1, 1, small()).unwrap();
    match runtime.connect(a, b) {
        Err(Error::ConnectedAlready { kernel, with }) => {
            assert_eq!((kernel, with), (name(a), name(b)));
        }
        other => panic!("{other:?}"),
    }
    // Kernels that work, have ended, or are another runtime's; grids.
    let working = active(&runtime, "pipe.step", small());
    let ended = runtime.launch("pipe.step", 1, 1, small()).unwrap();
    ended.terminate().unwrap();
    for other in [&working, &ended] {
        for (from, to) in [(&d, other), (other, &d)] {
            let error = runtime.connect(from, to).unwrap_err();
            assert!(
                matches!(&error, Error::InvalidTransition { kernel, to: "Connected", .. } if kernel == other.name()),
                "{error}"
            );
        }
    }
    let foreign = elsewhere.launch("pipe.step", 1, 1, small()).unwrap();
    let grid = runtime.launch("pipe.step", 2, 1, small()).unwrap();
    for (from, to) in [(&d, &foreign), (&foreign, &d)] {
        assert!(matches!(
            runtime.connect(from, to),
            Err(Error::CannotConnect { .. })
        ));
    }
    // Sides that are in use, and replies that would never be received.
    let e = active(&runtime, "pipe.step", small());
    send(&e, 1).unwrap();
    eventually("the reply", || e.metrics().produced == 1);
    e.deactivate().unwrap();
    let busy = |kernel: &KernelHandle, from: &KernelHandle, to: &KernelHandle| {
        let error = runtime.connect(from, to).unwrap_err();
        assert!(
            matches!(&error, Error::EndpointsBusy { kernel: busy, .. } if busy == kernel.name()),
            "{error}"
        );
    };
    busy(&e, &e, &d);
    assert_eq!(receive(&e), Ok(2));
    let endpoints = d.split_bytes().unwrap();
    busy(&d, &e, &d);
    busy(&d, &d, &e);
    drop(endpoints);
    // Nothing of all this did any harm.
    runtime.connect(c, &d).unwrap();
    runtime.connect(&d, &e).unwrap();
    for kernel in [a, b, c, &d, &e] {
        kernel.activate().unwrap();
    }
    let mut buffer = [0; 8];
    a.call_bytes_through(&e, &10_u64.to_ne_bytes(), &mut buffer, LONG)
        .unwrap();
    assert_eq!(u64::from_ne_bytes(buffer), 15);
    assert_eq!(grid.status().state, KernelState::Launched);
    runtime.drain(LONG).unwrap();
    assert!(matches!(
        runtime.connect(&e, &grid),
        Err(Error::InvalidLifecycle { .. })
    ));
}

pub fn kernels_of_a_pipeline_wait_as_they_like<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    for waits in [
        [WaitStrategy::Park, WaitStrategy::Park],
        [WaitStrategy::SpinYield, WaitStrategy::Park],
        [WaitStrategy::Park, WaitStrategy::SpinYield],
        [WaitStrategy::Auto, WaitStrategy::Auto],
    ] {
        let launch = |wait| {
            let options = LaunchOptions {
                wait: Some(wait),
                host_wait: Some(WaitStrategy::Park),
                ..small()
            };
            runtime.launch("pipe.step", 1, 1, options).unwrap()
        };
        let (from, to) = (launch(waits[0]), launch(waits[1]));
        runtime.connect(&from, &to).unwrap();
        from.activate().unwrap();
        to.activate().unwrap();
        for number in 0..200 {
            send(&from, 10_000 + number).unwrap();
            assert_eq!(receive(&to), Ok(10_002 + number));
            if number % 50 == 0 {
                // Long enough for everybody to fall asleep.
                thread::sleep(Duration::from_millis(2));
            }
        }
        from.terminate().unwrap();
        to.terminate().unwrap();
    }
}

pub fn calls_through_a_pipeline_never_mix<S: Subject>() {
    for options in placements::<S>() {
        // Callers that spin would leave the kernels no time.
        let options = LaunchOptions {
            host_wait: Some(WaitStrategy::Park),
            ..options
        };
        let runtime = with_kernels(runtime::<S>());
        let kernels = pipeline(&runtime, &["pipe.step"; 3], &options);
        thread::scope(|scope| {
            for caller in 0..4_u64 {
                let (first, last) = (kernels[0].clone(), kernels[2].clone());
                scope.spawn(move || {
                    let mut buffer = [0; 8];
                    for number in 0..500 {
                        let request = (caller + 1) * 1_000_000 + number;
                        first
                            .call_bytes_through(&last, &request.to_ne_bytes(), &mut buffer, LONG)
                            .unwrap();
                        assert_eq!(u64::from_ne_bytes(buffer), request + 3);
                    }
                });
            }
        });
        let report = runtime.complete_shutdown().unwrap();
        assert_eq!(report.requests.delivered, 3 * 4 * 500);
        assert_eq!(report.replies.delivered, 3 * 4 * 500);
    }
}

/// Many replies to one request, in kernels that one thread runs: none waits for another that cannot run meanwhile, whoever
/// ends first.
pub fn many_replies_pass_kernels_of_one_thread<S: Subject>() {
    let [_, options] = placements::<S>();
    for (ids, ended) in [
        (["echo", "test.repeat", "echo"], None),
        (["test.repeat", "echo", "echo"], None),
        (["echo", "echo", "test.repeat"], None),
        (["echo", "test.repeat", "echo"], Some(0)),
        (["echo", "echo", "test.repeat"], Some(1)),
    ] {
        let runtime = runtime::<S>();
        let (kernels, connections) = chain_of(&runtime, &ids, &options);
        assert!(
            connections
                .iter()
                .all(|connection| connection.kind() == ConnectionKind::SharedThread)
        );
        for kernel in &kernels {
            kernel.activate().unwrap();
        }
        let repeating = ids.iter().position(|id| *id == "test.repeat").unwrap();
        kernels[0].send_bytes(&[200]).unwrap();
        eventually("the request", || kernels[repeating].metrics().accepted == 1);
        // Nobody reads yet: far more replies than there is room for.
        thread::sleep(Duration::from_millis(20));
        for kernel in &kernels {
            kernel.deactivate().unwrap();
            kernel.activate().unwrap();
        }
        if let Some(ended) = ended {
            eventually("it is handled", || {
                kernels[ended].metrics().queue_depth == 0
            });
            kernels[ended].terminate().unwrap();
        }
        let mut buffer = [0];
        for number in 0..200 {
            assert_eq!(kernels[2].recv_bytes_timeout(&mut buffer, LONG), Ok(1));
            assert_eq!(buffer, [number]);
        }
        // The same once more, and the end in the middle of it.
        let first = ended.map_or(0, |ended| ended + 1);
        kernels[first].send_bytes(&[200]).unwrap();
        eventually("the request", || kernels[repeating].metrics().accepted == 2);
        let report = runtime.complete_shutdown().unwrap();
        assert!(
            report.requests.adds_up() && report.replies.adds_up(),
            "{report}"
        );
        assert!(
            report.errors.is_empty() && report.failed_kernels.is_empty(),
            "{report}"
        );
    }
}
