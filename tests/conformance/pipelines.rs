//! Kernels whose replies are other kernels' requests.

use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::{
    CallError, HandlerError, MessageError, RecvTimeoutError, SendTimeoutError, TryRecvError,
    TrySendError, Unavailable,
};
use ringkernel::kernel::{DeadLetterReason, FailureReason};
use ringkernel::{
    Connection, ConnectionKind, Error, KernelHandle, KernelRegistration, KernelState,
    LaunchOptions, Priority, RingKernelRuntime, RuntimeConfig, SendOptions, WaitStrategy,
};

use super::kernels::{Add, GATE_OPEN, OVERFLOW, Opened, Sum};
use super::{LONG, Subject, active, eventually, runtime, runtime_from, small};

/// Kernels that only these tests have.
fn with_kernels(runtime: RingKernelRuntime) -> RingKernelRuntime {
    for registration in [
        // Declares its types in another order than `test.add`, so that kinds differ.
        KernelRegistration::new("pipe.negate").typed_cpu_handler::<Sum, Sum, _>(|sum, _| {
            Ok(Sum {
                value: -sum.value.to_native(),
            })
        }),
        // Adds one to a number; fails on 1000, panics on 2000.
        KernelRegistration::new("pipe.step").cpu_handler(|request, context| {
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

fn number(payload: &[u8]) -> u64 {
    u64::from_ne_bytes(payload.try_into().unwrap())
}

/// Launches kernels and connects each with the next.
fn chain_of(
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
fn pipeline(
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

fn send(kernel: &KernelHandle, number: u64) -> Result<(), SendTimeoutError> {
    kernel.send_bytes(&number.to_ne_bytes())
}

fn receive(kernel: &KernelHandle) -> Result<u64, RecvTimeoutError> {
    let mut buffer = [0; 8];
    kernel.recv_bytes_timeout(&mut buffer, LONG)?;
    Ok(u64::from_ne_bytes(buffer))
}

pub fn a_pipeline_delivers_everything_once_and_in_order<S: Subject>() {
    const MESSAGES: u64 = 100_000;
    for stages in [2, 4] {
        let runtime = with_kernels(runtime::<S>());
        let kernels = pipeline(
            &runtime,
            &vec!["pipe.step"; stages],
            &LaunchOptions::default(),
        );
        let (mut sender, mut receiver) = kernels[0]
            .split_bytes_through(&kernels[stages - 1])
            .unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                for number in 0..MESSAGES {
                    let payload = (10_000 + number).to_ne_bytes();
                    sender.send_bytes_timeout(&payload, LONG).unwrap();
                }
            });
            let mut buffer = [0; 8];
            for number in 0..MESSAGES {
                receiver.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                assert_eq!(u64::from_ne_bytes(buffer), 10_000 + number + stages as u64);
            }
        });
        assert_eq!(
            receiver.try_recv_bytes(&mut [0; 8]),
            Err(TryRecvError::Empty)
        );
        drop(receiver);
        for kernel in &kernels {
            let metrics = kernel.metrics();
            assert_eq!(
                (
                    metrics.accepted,
                    metrics.processed,
                    metrics.produced,
                    metrics.received_replies
                ),
                (MESSAGES, MESSAGES, MESSAGES, MESSAGES)
            );
        }
        let report = runtime.complete_shutdown().unwrap();
        let all = MESSAGES * stages as u64;
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
            deadline_ns: Some(u64::from(correlation)),
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
        assert_eq!(extension.deadline_ns, u64::from(correlation));
        assert_eq!(extension.trace_id, [correlation as u8; 16]);
        assert!(extension.timestamp_ns > 0);
        assert_eq!(received.payload(), b"marked");
    }
}

/// Nobody reads at the end: every ring fills, and then the first kernel takes nothing more. Nothing is lost.
pub fn a_pipeline_that_nobody_empties_holds_its_senders_back<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    let kernels = pipeline(&runtime, &["pipe.step"; 3], &small());
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
    let runtime = with_kernels(runtime::<S>());
    let kernels = pipeline(&runtime, &["pipe.step"; 3], &small());
    let mut buffer = [0; 8];
    // The number at which each stage fails, as the first one sees it.
    for (stage, number) in [(0, 1000_u64), (1, 999), (2, 998)] {
        let error =
            kernels[0].call_bytes_through(&kernels[2], &number.to_ne_bytes(), &mut buffer, LONG);
        let Err(CallError::Message(MessageError::Handler(error))) = error else {
            panic!("{error:?}");
        };
        assert_eq!((error.code, error.text()), (17, "a thousand"));
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
    // Twice in a direction: the same again, fan-out, fan-in, a diamond.
    let d = runtime.launch("pipe.step", 1, 1, small()).unwrap();
    for (from, to, kernel, with) in [
        (a, b, a, b),
        (a, &d, a, b),
        (&d, b, b, a),
        (a, c, a, b),
        (&d, c, c, b),
    ] {
        match runtime.connect(from, to) {
            Err(Error::ConnectedAlready {
                kernel: found,
                with: other,
            }) => {
                assert_eq!((found, other), (name(kernel), name(with)));
            }
            other => panic!("{other:?}"),
        }
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
    let elsewhere = with_kernels(super::runtime::<S>());
    let foreign = elsewhere.launch("pipe.step", 1, 1, small()).unwrap();
    let grid = runtime.launch("pipe.step", 2, 1, small()).unwrap();
    for other in [&foreign, &grid] {
        for (from, to) in [(&d, other), (other, &d)] {
            assert!(matches!(
                runtime.connect(from, to),
                Err(Error::CannotConnect { .. })
            ));
        }
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

pub fn devices_apart_are_not_connected_by_a_ring<S: Subject>() {
    let runtime = with_kernels(runtime_from(S::builder().cpu_devices(2)));
    let on = |device| {
        let options = LaunchOptions {
            device: Some(device),
            ..small()
        };
        runtime.launch("pipe.step", 1, 1, options).unwrap()
    };
    assert!(matches!(
        runtime.connect(&on(0), &on(1)),
        Err(Error::CannotConnect { .. })
    ));
}

/// What was queued before, and what is queued when it is undone, stays where it is and in order.
pub fn connections_come_and_go_without_a_loss<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    let options = LaunchOptions::default();
    let a = active(&runtime, "pipe.step", options.clone());
    let b = active(&runtime, "pipe.step", options.clone());
    let other = active(&runtime, "pipe.step", options);
    let pause = || {
        for kernel in [&a, &b, &other] {
            kernel.deactivate().unwrap();
        }
    };
    let resume = || {
        for kernel in [&a, &b, &other] {
            kernel.activate().unwrap();
        }
    };
    for round in 0..20 {
        // Queued at `b` by its own sender, perhaps not all handled yet when the connection is made.
        for number in 0..10 {
            send(&b, 10_000 + number).unwrap();
        }
        pause();
        let to = if round % 2 == 0 { &b } else { &other };
        let connection = runtime.connect(&a, to).unwrap();
        resume();
        assert!(connection.is_connected());
        for number in 0..100 {
            send(&a, 20_000 + number).unwrap();
        }
        for number in 0..10 {
            assert_eq!(receive(&b), Ok(10_001 + number));
        }
        for number in 0..50 {
            assert_eq!(receive(to), Ok(20_002 + number));
        }
        let error = connection.disconnect().unwrap_err();
        assert!(matches!(error, Error::InvalidTransition { .. }), "{error}");
        pause();
        connection.disconnect().unwrap();
        connection.disconnect().unwrap();
        assert!(!connection.is_connected());
        resume();
        // What `a` had not passed on yet comes out at `a`, all else at the other.
        let passed = |accepted: u64| accepted;
        eventually("all of it", || {
            a.metrics().queue_depth == 0 && to.metrics().queue_depth == 0
        });
        let mut at_the_end = 50;
        let mut buffer = [0; 8];
        while to.try_recv_bytes(&mut buffer).is_ok() {
            assert_eq!(u64::from_ne_bytes(buffer), 20_002 + passed(at_the_end));
            at_the_end += 1;
        }
        for number in at_the_end..100 {
            assert_eq!(receive(&a), Ok(20_001 + number));
        }
        // Both are what they were.
        send(&a, 1).unwrap();
        assert_eq!(receive(&a), Ok(2));
        send(to, 1).unwrap();
        assert_eq!(receive(to), Ok(2));
        assert_eq!(connection.delivered(), at_the_end);
    }
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
    assert_eq!(report.requests.delivered, report.requests.accepted);
    assert_eq!(report.replies.delivered, report.replies.accepted);
}

/// Either kernel can be deactivated, whatever its neighbour waits for, and goes on where it was.
pub fn stages_can_be_deactivated_at_any_time<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    let kernels = pipeline(&runtime, &["pipe.step"; 3], &small());
    let mut next = 0;
    for stage in 0..3 {
        kernels[stage].deactivate().unwrap();
        let mut sent = 0;
        // Fills what lies before the stage, and makes those waiting that write to it.
        for _ in 0..200 {
            match kernels[0].try_send_bytes(&(10_000 + next + sent).to_ne_bytes()) {
                Ok(()) => sent += 1,
                Err(TrySendError::Full) => thread::sleep(Duration::from_micros(50)),
                Err(TrySendError::Unavailable(Unavailable::Deactivated)) => break,
                Err(error) => panic!("{error}"),
            }
        }
        if stage > 0 {
            // The one that waits for room can be deactivated too, and disturbs nobody.
            kernels[stage - 1].deactivate().unwrap();
            kernels[stage - 1].activate().unwrap();
        }
        kernels[stage].activate().unwrap();
        for number in 0..sent {
            assert_eq!(receive(&kernels[2]), Ok(10_000 + next + number + 3));
        }
        next += sent;
    }
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.requests.delivered, report.replies.delivered),
        (3 * next, 3 * next)
    );
}

/// The orders in which three things can happen.
const ORDERS: [[usize; 3]; 6] = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
];

/// Kernels end in every order while messages flow, with rings that are full or not: none waits for ever, and every message
/// is somewhere.
pub fn stages_end_in_any_order_and_every_message_is_accounted_for<S: Subject>() {
    for order in ORDERS {
        for reads in [false, true] {
            let runtime = with_kernels(runtime::<S>());
            let kernels = pipeline(&runtime, &["pipe.step"; 3], &small());
            let mut received = [0_u64; 3];
            let mut sent = 0;
            let mut take = |stage: usize| {
                let mut buffer = [0; 8];
                let before = received[stage];
                while kernels[stage].try_recv_bytes(&mut buffer).is_ok() {
                    received[stage] += 1;
                }
                received[stage] - before
            };
            for (step, stage) in order.into_iter().enumerate() {
                for _ in 0..500 {
                    if send_now(&kernels[0], 10_000 + sent) {
                        sent += 1;
                    }
                    if reads {
                        take(2);
                    }
                }
                kernels[stage].terminate().unwrap();
                assert_eq!(kernels[stage].status().state, KernelState::Terminated);
                if step < 2 {
                    // Those that are left still work, each for its own callers where its neighbour is gone.
                    for kernel in &kernels {
                        let state = kernel.status().state;
                        assert!(
                            matches!(state, KernelState::Active | KernelState::Terminated),
                            "{state}"
                        );
                    }
                }
            }
            for stage in 0..3 {
                // Each that wrote to its own ring at the end can be received from still.
                take(stage);
            }
            let report = runtime.complete_shutdown().unwrap();
            let context = format!("{order:?} {reads} sent {sent} received {received:?}\n{report}");
            assert!(
                report.requests.adds_up() && report.replies.adds_up(),
                "{context}"
            );
            assert_eq!(report.requests.dead_lettered, 0, "{context}");
            assert_eq!(report.replies.dead_lettered, 0, "{context}");
            assert!(report.errors.is_empty(), "{context}");
            // A message in the hands of a kernel that waits for room when it ends is handled without a reply.
            let produced = report.replies.accepted;
            let handled = report.requests.delivered;
            assert!(handled - produced <= 3, "{context}");
            // Requests are what was sent, and what was passed on: replies that nobody outside has received or will.
            let outside: u64 = received.iter().sum();
            assert!(report.requests.accepted >= sent, "{context}");
            let passed_on = report.requests.accepted - sent;
            assert!(produced >= passed_on + outside, "{context}");
            assert_eq!(
                report.requests.returned,
                report.returned.len() as u64,
                "{context}"
            );
            let letters = std::iter::from_fn(|| runtime.dead_letters().try_recv())
                .filter(|letter| !letter.is_reply)
                .inspect(|letter| assert_eq!(letter.reason, DeadLetterReason::Shutdown))
                .count() as u64;
            assert_eq!(letters, report.requests.returned, "{context}");
            // Whoever reads everything at the end, with the sender's kernel gone first, has all of it.
            if reads && order == [0, 1, 2] {
                assert_eq!(
                    outside + report.requests.returned + (handled - produced),
                    sent,
                    "{context}"
                );
            }
        }
    }
}

fn send_now(kernel: &KernelHandle, number: u64) -> bool {
    match kernel.try_send_bytes(&number.to_ne_bytes()) {
        Ok(()) => true,
        Err(TrySendError::Full | TrySendError::Unavailable(_)) => false,
        Err(error) => panic!("{error}"),
    }
}

/// Threads send and receive without pause while kernels end in every order: exact accounts all the same.
pub fn stages_end_under_load_in_any_order<S: Subject>() {
    for order in ORDERS {
        let runtime = with_kernels(runtime::<S>());
        let kernels = pipeline(&runtime, &["pipe.step"; 3], &LaunchOptions::default());
        let (mut sender, mut receiver) = kernels[0].split_bytes_through(&kernels[2]).unwrap();
        let (sent, received) = thread::scope(|scope| {
            let sending = scope.spawn(move || {
                let mut sent = 0_u64;
                loop {
                    match sender.send_bytes_timeout(&(10_000 + sent).to_ne_bytes(), LONG) {
                        Ok(()) => sent += 1,
                        Err(SendTimeoutError::Unavailable(_)) => return sent,
                        Err(error) => panic!("{error}"),
                    }
                    // Whoever sends while the chain is broken waits until the first kernel ends.
                }
            });
            let receiving = scope.spawn(move || {
                let mut received = 0_u64;
                let mut buffer = [0; 8];
                loop {
                    match receiver.recv_bytes_timeout(&mut buffer, LONG) {
                        Ok(_) => {
                            assert_eq!(u64::from_ne_bytes(buffer), 10_003 + received);
                            received += 1;
                        }
                        Err(RecvTimeoutError::Unavailable(_)) => return received,
                        // The reply that a kernel waited to write when it ended.
                        Err(RecvTimeoutError::Message(MessageError::Handler(error)))
                            if error.code == HandlerError::ENDING =>
                        {
                            received += 1;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            });
            eventually("messages", || kernels[2].metrics().processed > 1000);
            for stage in order {
                kernels[stage].terminate().unwrap();
            }
            (sending.join().unwrap(), receiving.join().unwrap())
        });
        let report = runtime.complete_shutdown().unwrap();
        let context = format!("{order:?} sent {sent} received {received}\n{report}");
        assert!(
            report.requests.adds_up() && report.replies.adds_up(),
            "{context}"
        );
        assert!(
            report.errors.is_empty() && report.failed_kernels.is_empty(),
            "{context}"
        );
        assert_eq!(
            report.requests.dead_lettered + report.replies.dead_lettered,
            0,
            "{context}"
        );
        // A send in the very moment of the end may appear in no column.
        assert!(report.requests.accepted + 1 >= sent, "{context}");
        let handled = report.requests.delivered;
        assert!(handled >= report.replies.accepted, "{context}");
        assert!(handled - report.replies.accepted <= 3, "{context}");
        // Every request is a message that was sent, or a reply that went on: those that did not are still replies.
        let passed_on = report.requests.accepted.saturating_sub(sent);
        assert!(report.replies.accepted >= passed_on + received, "{context}");
    }
}

/// A handler that panics fails its own kernel; those before and behind it end or go on as they like.
pub fn a_panic_in_any_stage_fails_that_kernel_alone<S: Subject>() {
    for stage in 0..3_usize {
        let runtime = with_kernels(runtime::<S>());
        let kernels = pipeline(&runtime, &["pipe.step"; 3], &small());
        let mut buffer = [0; 8];
        let mut call = |number: u64| {
            kernels[0].call_bytes_through(&kernels[2], &number.to_ne_bytes(), &mut buffer, LONG)
        };
        assert_eq!(call(1), Ok(8));
        // The stage sees 2000. The caller learns of it long before its timeout.
        let begin = Instant::now();
        let error = call(2000 - stage as u64).unwrap_err();
        assert!(begin.elapsed() < LONG / 2);
        let expected = match stage {
            1 => Unavailable::NotConnected,
            _ => Unavailable::Failed,
        };
        assert_eq!(error, CallError::Unavailable(expected), "stage {stage}");
        for (index, kernel) in kernels.iter().enumerate() {
            let status = kernel.status();
            let failed = status.failure.map(|failure| failure.reason);
            assert_eq!(
                failed,
                (index == stage).then_some(FailureReason::Panic),
                "stage {stage}"
            );
        }
        // The kernel before it answers its own callers again.
        if let Some(before) = stage.checked_sub(1) {
            let kernels = &kernels[..=before];
            for number in 0..40 {
                send(&kernels[0], number).unwrap();
                assert_eq!(receive(&kernels[before]), Ok(number + stage as u64));
            }
        }
        // The kernel behind it can be sent to again.
        if let Some(behind) = kernels.get(stage + 1) {
            for number in 0..40 {
                send(behind, number).unwrap();
                assert_eq!(receive(&kernels[2]), Ok(number + 2 - stage as u64));
            }
        }
        let report = runtime.complete_shutdown().unwrap();
        assert!(
            report.requests.adds_up() && report.replies.adds_up(),
            "{report}"
        );
        assert_eq!(report.requests.dead_lettered, 1, "{report}");
        assert_eq!(report.failed_kernels, [kernels[stage].name()]);
        let letter = runtime.dead_letters().try_recv().unwrap();
        assert_eq!(letter.reason, DeadLetterReason::KernelFailed);
        assert_eq!(letter.kernel, kernels[stage].name());
        assert_eq!(number(&letter.payload), 2000);
    }
}

/// What is left behind by a kernel that has ended can be connected again.
pub fn the_place_of_a_kernel_that_ended_can_be_taken<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    for ended in 0..2 {
        let (kernels, connections) = chain_of(&runtime, &["pipe.step"; 2], &small());
        for kernel in &kernels {
            kernel.activate().unwrap();
        }
        send(&kernels[0], 1).unwrap();
        assert_eq!(receive(&kernels[1]), Ok(3));
        kernels[ended].terminate().unwrap();
        assert!(!connections[0].is_connected());
        connections[0].disconnect().unwrap();
        let alive = &kernels[1 - ended];
        send(alive, 5).unwrap();
        assert_eq!(receive(alive), Ok(6));
        alive.deactivate().unwrap();
        let other = runtime.launch("pipe.step", 1, 1, small()).unwrap();
        let (from, to) = if ended == 0 {
            (&other, alive)
        } else {
            (alive, &other)
        };
        runtime.connect(from, to).unwrap();
        other.activate().unwrap();
        alive.activate().unwrap();
        for number in 0..100 {
            send(from, number).unwrap();
            assert_eq!(receive(to), Ok(number + 2));
        }
        from.terminate().unwrap();
        to.terminate().unwrap();
    }
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        report.requests.delivered, report.requests.accepted,
        "{report}"
    );
    assert_eq!(
        report.replies.delivered, report.replies.accepted,
        "{report}"
    );
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
    let runtime = with_kernels(runtime::<S>());
    let kernels = pipeline(&runtime, &["pipe.step"; 3], &LaunchOptions::default());
    thread::scope(|scope| {
        for caller in 0..4_u64 {
            let (first, last) = (kernels[0].clone(), kernels[2].clone());
            scope.spawn(move || {
                let mut buffer = [0; 8];
                for number in 0..2000 {
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
    assert_eq!(report.requests.delivered, 3 * 4 * 2000);
    assert_eq!(report.replies.delivered, 3 * 4 * 2000);
}

/// A drain that begins at the first kernel ends behind the last one.
pub fn a_drain_waits_for_the_whole_pipeline<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    // Launched against the stream, and the last one is slow.
    let last = runtime.launch("test.sleep", 1, 1, small()).unwrap();
    let middle = runtime.launch("echo", 1, 1, small()).unwrap();
    let first = runtime.launch("echo", 1, 1, small()).unwrap();
    runtime.connect(&middle, &last).unwrap();
    runtime.connect(&first, &middle).unwrap();
    for kernel in [&last, &middle, &first] {
        kernel.activate().unwrap();
    }
    for _ in 0..10 {
        first.send_bytes(&[5]).unwrap();
    }
    let drained = runtime.drain(LONG).unwrap();
    assert!(drained.complete && drained.remaining == 0, "{drained:?}");
    assert_eq!(last.metrics().produced, 10);
    assert_eq!(first.send_bytes(&[5]), Err(Unavailable::Draining.into()));
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.requests.accepted, report.requests.delivered),
        (30, 30)
    );
    assert_eq!(
        (report.replies.delivered, report.replies.returned),
        (20, 10)
    );
}

/// Accounts of a kernel that was booked long before the one behind it had taken everything.
pub fn replies_taken_after_the_end_count_as_delivered<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    let (kernels, _) = chain_of(&runtime, &["echo", "test.gated"], &small());
    for kernel in &kernels {
        kernel.activate().unwrap();
    }
    for number in 0..8 {
        send(&kernels[0], number).unwrap();
    }
    eventually("all passed on", || kernels[1].metrics().accepted == 8);
    kernels[0].terminate().unwrap();
    // Books it.
    assert_eq!(runtime.kernels().len(), 1);
    {
        let _open = Opened::new(&GATE_OPEN);
        for number in 0..8 {
            assert_eq!(receive(&kernels[1]), Ok(number));
        }
    }
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.requests.accepted, report.requests.delivered),
        (16, 16)
    );
    assert_eq!(
        (report.replies.accepted, report.replies.delivered),
        (16, 16)
    );
}

/// What lies in a ring between two kernels when both end is a returned request, and a returned reply.
pub fn what_lies_between_two_kernels_at_the_end_is_returned<S: Subject>() {
    let runtime = with_kernels(runtime::<S>());
    let (kernels, _) = chain_of(&runtime, &["pipe.step"; 2], &small());
    kernels[0].activate().unwrap();
    for number in 0..5 {
        send(&kernels[0], 10_000 + number).unwrap();
    }
    eventually("all passed on", || kernels[1].metrics().accepted == 5);
    assert_eq!(kernels[1].metrics().queue_depth, 5);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.requests.accepted, report.requests.delivered),
        (10, 5)
    );
    assert_eq!(report.requests.returned, 5);
    assert_eq!((report.replies.accepted, report.replies.returned), (5, 5));
    let returned: Vec<_> = report
        .returned
        .iter()
        .map(|message| number(&message.payload))
        .collect();
    assert_eq!(returned, [10_001, 10_002, 10_003, 10_004, 10_005]);
}

pub fn pipelines_may_be_dropped_in_any_order<S: Subject>() {
    for order in ORDERS {
        for runtime_at in 0..4 {
            let runtime = with_kernels(runtime::<S>());
            let (kernels, connections) = chain_of(&runtime, &["pipe.step"; 3], &small());
            for kernel in &kernels {
                kernel.activate().unwrap();
            }
            for number in 0..40 {
                let _ = send_now(&kernels[0], 10_000 + number);
            }
            let mut runtime = Some(runtime);
            let mut kernels: Vec<_> = kernels.into_iter().map(Some).collect();
            for (step, stage) in order.into_iter().enumerate() {
                if step == runtime_at {
                    runtime = None;
                }
                kernels[stage] = None;
            }
            if let Some(runtime) = runtime {
                let report = runtime.complete_shutdown().unwrap();
                assert!(
                    report.requests.adds_up() && report.replies.adds_up(),
                    "{report}"
                );
            }
            for connection in connections {
                assert!(!connection.is_connected());
                connection.disconnect().unwrap();
            }
        }
    }
}

/// A first kernel that is stuck in its handler holds nobody else up, and what it says too late harms nobody.
pub fn a_stuck_stage_holds_no_other_up<S: Subject>() {
    let config = RuntimeConfig {
        termination_timeout: Duration::from_millis(100),
        ..RuntimeConfig::default()
    };
    let runtime = with_kernels(runtime_from(S::builder_with(config)));
    let (kernels, _) = chain_of(&runtime, &["test.gated", "pipe.step"], &small());
    for kernel in &kernels {
        kernel.activate().unwrap();
    }
    send(&kernels[0], 10_000).unwrap();
    eventually("it is in its hands", || {
        kernels[0].metrics().queue_depth == 1
    });
    let begin = Instant::now();
    kernels[1].terminate().unwrap();
    assert!(begin.elapsed() < LONG / 2);
    assert!(matches!(kernels[0].terminate(), Err(Error::Timeout { .. })));
    let open = Opened::new(&GATE_OPEN);
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
    thread::sleep(Duration::from_millis(10));
    drop(open);
}
