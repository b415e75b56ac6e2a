//! How kernels that are connected stop, fail and end, and what becomes of their messages.

use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::{
    CallError, HandlerError, MessageError, RecvTimeoutError, SendTimeoutError, TrySendError,
    Unavailable,
};
use ringkernel::kernel::{DeadLetterReason, FailureReason};
use ringkernel::{Error, KernelHandle, KernelState, LaunchOptions, RuntimeConfig};

use super::kernels::{GATE_OPEN, Opened};
use super::pipelines::{chain_of, number, pipeline, placements, receive, send, with_kernels};
use super::{LONG, Subject, active, eventually, runtime, runtime_from, small};

/// The orders in which three things can happen.
const ORDERS: [[usize; 3]; 6] = [
    [0, 1, 2],
    [0, 2, 1],
    [1, 0, 2],
    [1, 2, 0],
    [2, 0, 1],
    [2, 1, 0],
];

/// A short wait for what may not come.
const NAP: Duration = Duration::from_millis(2);

fn send_now(kernel: &KernelHandle, number: u64) -> bool {
    match kernel.try_send_bytes(&number.to_ne_bytes()) {
        Ok(()) => true,
        Err(TrySendError::Full | TrySendError::Unavailable(_)) => false,
        Err(error) => panic!("{error}"),
    }
}

/// What was queued before, and what is queued when it is undone, stays where it is and in order.
pub fn connections_come_and_go_without_a_loss<S: Subject>() {
    for options in placements::<S>() {
        let runtime = with_kernels(runtime::<S>());
        let options = LaunchOptions {
            queue_capacity: None,
            ..options
        };
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
            eventually("all of it", || {
                a.metrics().queue_depth == 0 && to.metrics().queue_depth == 0
            });
            let mut at_the_end = 50;
            let mut buffer = [0; 8];
            while to.try_recv_bytes(&mut buffer).is_ok() {
                assert_eq!(u64::from_ne_bytes(buffer), 20_002 + at_the_end);
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
}

/// Either kernel can be deactivated, whatever its neighbour waits for, and goes on where it was.
pub fn stages_can_be_deactivated_at_any_time<S: Subject>() {
    for options in placements::<S>() {
        let runtime = with_kernels(runtime::<S>());
        let kernels = pipeline(&runtime, &["pipe.step"; 3], &options);
        let mut next = 0;
        for stage in 0..3 {
            kernels[stage].deactivate().unwrap();
            let mut sent = 0;
            // Fills what lies before the stage, and makes those waiting that write to it.
            for _ in 0..200 {
                match kernels[0].try_send_bytes(&(10_000_u64 + next + sent).to_ne_bytes()) {
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
}

/// Kernels end in every order while messages flow, with rings that are full or not: none waits for ever, and every message
/// is somewhere.
pub fn stages_end_in_any_order_and_every_message_is_accounted_for<S: Subject>() {
    for options in placements::<S>() {
        for order in ORDERS {
            for reads in [false, true] {
                let runtime = with_kernels(runtime::<S>());
                let kernels = pipeline(&runtime, &["pipe.step"; 3], &options);
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
                let context =
                    format!("{order:?} {reads} sent {sent} received {received:?}\n{report}");
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
}

/// Threads send and receive without pause while kernels end in every order: exact accounts all the same.
pub fn stages_end_under_load_in_any_order<S: Subject>() {
    for options in placements::<S>() {
        for order in ORDERS {
            let runtime = with_kernels(runtime::<S>());
            let kernels = pipeline(&runtime, &["pipe.step"; 3], &options);
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
}

/// A handler that panics fails its own kernel; those before and behind it end or go on as they like.
pub fn a_panic_in_any_stage_fails_that_kernel_alone<S: Subject>() {
    for options in placements::<S>() {
        for stage in 0..3_usize {
            let runtime = with_kernels(runtime::<S>());
            let kernels = pipeline(&runtime, &["pipe.step"; 3], &options);
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
            // The kernel behind it can be sent to again, as soon as the thread of the one that
            // failed has ended.
            if let Some(behind) = kernels.get(stage + 1) {
                eventually("its end of the connection", || send_now(behind, 0));
                for number in 0..40 {
                    assert_eq!(receive(&kernels[2]), Ok(number + 2 - stage as u64));
                    send(behind, number + 1).unwrap();
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
}

/// The same of a device, where the handler does what its kernel did not declare.
pub fn a_fault_in_any_stage_fails_that_kernel_alone<S: Subject>() {
    for options in placements::<S>() {
        for stage in 0..3_usize {
            let runtime = with_kernels(runtime::<S>());
            let kernels = pipeline(&runtime, &["pipe.step"; 3], &options);
            send(&kernels[0], 5).unwrap();
            assert_eq!(receive(&kernels[2]), Ok(8));
            // The stage sees 2000, and then others that it never handles.
            for number in 0..4 {
                let sent = send_now(&kernels[0], 2000 - stage as u64 - 100 * number);
                // The first kernel may have failed by then.
                assert!(sent || number > 0);
            }
            eventually("the failure", || {
                kernels[stage].status().state == KernelState::Failed
            });
            for (index, kernel) in kernels.iter().enumerate() {
                let status = kernel.status();
                let failed = status.failure.map(|failure| failure.reason);
                assert_eq!(
                    failed,
                    (index == stage).then_some(FailureReason::Fault),
                    "stage {stage}"
                );
            }
            // The kernel before it answers its own callers again, as soon as its device has seen the failure.
            if let Some(before) = stage.checked_sub(1) {
                eventually("a reply", || {
                    send_now(&kernels[0], 30_000);
                    let mut buffer = [0; 8];
                    let received = kernels[before].recv_bytes_timeout(&mut buffer, NAP);
                    received == Ok(8) && number(&buffer) == 30_000 + stage as u64
                });
            }
            // The kernel behind it can be sent to again.
            if let Some(behind) = kernels.get(stage + 1) {
                eventually("its end of the connection", || send_now(behind, 40_000));
                while receive(&kernels[2]).unwrap() != 40_002 - stage as u64 {}
            }
            let report = runtime.complete_shutdown().unwrap();
            assert!(
                report.requests.adds_up() && report.replies.adds_up(),
                "stage {stage} {report}"
            );
            assert_eq!(report.failed_kernels, [kernels[stage].name()]);
        }
    }
}

/// What is left behind by a kernel that has ended can be connected again.
pub fn the_place_of_a_kernel_that_ended_can_be_taken<S: Subject>() {
    for options in placements::<S>() {
        let runtime = with_kernels(runtime::<S>());
        for ended in 0..2 {
            let (kernels, connections) = chain_of(&runtime, &["pipe.step"; 2], &options);
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
            let other = runtime.launch("pipe.step", 1, 1, options.clone()).unwrap();
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
    for options in placements::<S>() {
        for order in ORDERS {
            for runtime_at in 0..4 {
                let runtime = with_kernels(runtime::<S>());
                let (kernels, connections) = chain_of(&runtime, &["pipe.step"; 3], &options);
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
