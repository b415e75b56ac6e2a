//! Many clients of one kernel, each with its own lane.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ringkernel::error::{
    CallError, MessageError, RecvTimeoutError, SendTimeoutError, TryRecvError, TrySendError,
    Unavailable,
};
use ringkernel::kernel::{DeadLetter, DeadLetterReason};
use ringkernel::{
    Backpressure, Bytes, Client, ClientOptions, Error, KernelHandle, KernelRegistration,
    LaunchOptions, Priority, RingKernelRuntime, RuntimeConfig, SendOptions, WaitStrategy,
};

use super::kernels::{Add, GATE_OPEN, Opened, Sum};
use super::{LONG, Subject, active, eventually, runtime, runtime_from, small};

type BytesClient = Client<Bytes, Bytes>;

/// A client that uses its lane from the beginning.
fn laned(capacity: usize) -> ClientOptions {
    ClientOptions {
        capacity: Some(capacity),
        direct: false,
        ..ClientOptions::default()
    }
}

fn number(payload: &[u8]) -> u32 {
    u32::from_ne_bytes(*payload.first_chunk().unwrap())
}

fn recv(client: &mut BytesClient) -> u32 {
    let mut buffer = [0; 48];
    let length = client.recv_bytes_timeout(&mut buffer, LONG).unwrap();
    number(&buffer[..length])
}

fn letters(runtime: &RingKernelRuntime, reason: DeadLetterReason) -> Vec<DeadLetter> {
    std::iter::from_fn(|| runtime.dead_letters().try_recv())
        .filter(|letter| letter.reason == reason)
        .collect()
}

/// Sends numbers from `begin` to `end` through a client of an echo, some ahead of what it has received, and checks that each comes back once
/// and in its turn.
fn stream(client: &mut BytesClient, begin: u32, end: u32) {
    let (mut sent, mut received) = (begin, begin);
    let mut buffer = [0; 48];
    while received < end {
        while sent < end && sent - received < 32 {
            match client.try_send_bytes(&sent.to_ne_bytes()) {
                Ok(()) => sent += 1,
                Err(TrySendError::Full) => break,
                Err(error) => panic!("{error}"),
            }
        }
        let length = client.recv_bytes_timeout(&mut buffer, LONG).unwrap();
        assert_eq!(number(&buffer[..length]), received);
        received += 1;
    }
    assert_eq!(client.try_recv_bytes(&mut buffer), Err(TryRecvError::Empty));
}

pub fn many_clients_of_many_kernels_lose_double_and_mix_nothing<S: Subject>() {
    const THREADS: u32 = 8;
    const KERNELS: usize = 4;
    let messages = (S::PING_PONGS / 2000).clamp(50, 500);
    let runtime = runtime::<S>();
    let kernels: Vec<KernelHandle> = (0..KERNELS)
        .map(|_| active(&runtime, "echo", LaunchOptions::default()))
        .collect();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let mut clients: Vec<BytesClient> = kernels
                .iter()
                .map(|kernel| kernel.client_bytes().unwrap())
                .collect();
            scope.spawn(move || {
                let mut buffer = [0; 48];
                for message in 0..messages {
                    let payload = [thread, message].map(u32::to_ne_bytes).concat();
                    for client in &mut clients {
                        client.send_bytes_timeout(&payload, LONG).unwrap();
                    }
                    // Every other message is a call that overtakes nothing.
                    for client in &mut clients {
                        if message % 2 == 0 {
                            let length = client.call_bytes(b"call", &mut buffer, LONG).unwrap();
                            assert_eq!(&buffer[..length], b"call");
                        }
                        let length = client.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                        assert_eq!(&buffer[..length], payload);
                    }
                }
                for client in &clients {
                    let stats = client.stats();
                    let all = u64::from(messages + messages.div_ceil(2));
                    assert_eq!((stats.sent, stats.received, stats.queued), (all, all, 0));
                    assert_eq!(
                        (stats.dropped, stats.expired, stats.lost_replies),
                        (0, 0, 0)
                    );
                }
            });
        }
    });
    drop(kernels);
    let report = runtime.complete_shutdown().unwrap();
    let all = u64::from(THREADS * (messages + messages.div_ceil(2))) * KERNELS as u64;
    assert_eq!(report.requests.accepted, all, "{report}");
    assert_eq!(report.requests.delivered, all, "{report}");
    assert_eq!(report.replies.delivered, all, "{report}");
    assert!(report.requests.adds_up() && report.replies.adds_up());
    assert_eq!(report.errors.len(), 0);
}

/// The first client goes past the bridge; others that come and go in the middle of its stream neither lose nor reorder a message of it.
pub fn a_second_client_may_come_at_any_time<S: Subject>() {
    let rounds = if S::PING_PONGS < 1_000_000 { 5 } else { 20 };
    let runtime = runtime::<S>();
    for round in 0..rounds {
        let kernel = active(&runtime, "echo", LaunchOptions::default());
        let mut first = kernel.client_bytes().unwrap();
        assert!(first.is_direct());
        let coming = Arc::new(AtomicBool::new(false));
        let second = {
            let (kernel, coming) = (kernel.clone(), Arc::clone(&coming));
            thread::spawn(move || {
                while !coming.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                let mut second = kernel.client_bytes().unwrap();
                assert!(!second.is_direct());
                stream(&mut second, 0, 100);
                second.stats()
            })
        };
        stream(&mut first, 0, 100);
        // Requests and replies of the first are on their way when the second comes.
        for message in 0..16_u32 {
            first.try_send_bytes(&message.to_ne_bytes()).unwrap();
        }
        coming.store(true, Ordering::Release);
        for message in 0..16 {
            if message == round % 16 {
                first.try_send_bytes(&16_u32.to_ne_bytes()).unwrap();
            }
            assert_eq!(recv(&mut first), message);
        }
        assert_eq!(recv(&mut first), 16);
        stream(&mut first, 100, 400);
        assert_eq!(second.join().unwrap().received, 100);
        stream(&mut first, 400, 500);
        kernel.terminate().unwrap();
    }
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        report.requests.delivered,
        u64::from(rounds) * (500 + 17 + 100)
    );
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

pub fn calls_of_clients_never_mix<S: Subject>() {
    let calls = u64::from(S::PING_PONGS / 500).min(1000);
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", LaunchOptions::default());
    thread::scope(|scope| {
        for left in 0..4_u64 {
            let mut client = kernel.client::<Add, Sum>().unwrap();
            scope.spawn(move || {
                for right in 0..calls {
                    let add = Add {
                        left: left * 1_000_000,
                        right,
                        negate: false,
                    };
                    let sum = client.call(&add, LONG).unwrap();
                    assert_eq!(sum.value, i128::from(add.left + right));
                }
            });
        }
    });
    assert_eq!(runtime.dead_letters().len(), 0);
}

/// Replies to other requests that come while a call waits are received afterwards, in order.
pub fn a_call_of_a_client_puts_other_replies_aside<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    for options in [ClientOptions::default(), laned(64)] {
        let mut client = kernel.client_bytes_with(options).unwrap();
        for message in 0..8_u32 {
            client.try_send_bytes(&message.to_ne_bytes()).unwrap();
        }
        let mut buffer = [0; 48];
        assert_eq!(client.call_bytes(b"call", &mut buffer, LONG), Ok(4));
        client.try_send_bytes(&8_u32.to_ne_bytes()).unwrap();
        for message in 0..9 {
            assert_eq!(recv(&mut client), message);
        }
        // What a buffer is too small for stays where it is.
        client.try_send_bytes(&9_u32.to_ne_bytes()).unwrap();
        let error = client.recv_bytes_timeout(&mut [0; 2], LONG).unwrap_err();
        assert!(error.to_string().contains("4 bytes"), "{error}");
        assert_eq!(recv(&mut client), 9);
    }
}

/// A client that reads no replies loses its own credit and nothing else, whatever it sends.
pub fn a_client_that_reads_nothing_holds_up_nobody<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    let mut idle = kernel.client_bytes_with(laned(16)).unwrap();
    let mut busy = kernel.client_bytes_with(laned(16)).unwrap();
    let mut accepted = 0_u32;
    let fill = |idle: &mut BytesClient, accepted: &mut u32| {
        while idle.try_send_bytes(&accepted.to_ne_bytes()).is_ok() {
            *accepted += 1;
        }
    };
    fill(&mut idle, &mut accepted);
    for round in 0..20 {
        stream(&mut busy, 100 * round, 100 * (round + 1));
        fill(&mut idle, &mut accepted);
    }
    // Its credit, and a full ring behind it; another thread may have been moving messages at the last attempt.
    eventually("a full lane", || {
        fill(&mut idle, &mut accepted);
        accepted == 32 && idle.stats().queued == 16
    });
    assert_eq!(idle.try_send_bytes(b"too many"), Err(TrySendError::Full));
    assert!(idle.stats().refused > 0);
    for message in 0..accepted {
        assert_eq!(recv(&mut idle), message);
    }
    assert_eq!(runtime.dead_letters().len(), 0);
}

/// Requests that are answered by nothing give their credit back, requests that are answered more than once lose only what has no room.
pub fn credit_comes_back_whatever_the_kernel_replies<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.repeat", small());
    let mut client = kernel.client_bytes_with(laned(8)).unwrap();
    let mut other = kernel.client_bytes_with(laned(8)).unwrap();
    for _ in 0..500 {
        client.send_bytes_timeout(&[0], LONG).unwrap();
    }
    client.send_bytes_timeout(&[1], LONG).unwrap();
    let mut buffer = [0; 48];
    assert_eq!(client.recv_bytes_timeout(&mut buffer, LONG), Ok(1));
    // A look at an empty lane gives the slot of the last reply back.
    assert_eq!(client.try_recv_bytes(&mut buffer), Err(TryRecvError::Empty));
    // Thirteen replies for eight places.
    client.send_bytes_timeout(&[13], LONG).unwrap();
    other.send_bytes_timeout(&[1], LONG).unwrap();
    assert_eq!(other.recv_bytes_timeout(&mut buffer, LONG), Ok(1));
    // Nothing orders the two lanes: the other's reply may have come first.
    eventually("thirteen replies", || client.stats().lost_replies == 5);
    for index in 0..8 {
        assert_eq!(client.recv_bytes_timeout(&mut buffer, LONG), Ok(1));
        assert_eq!(buffer[0], index);
    }
    assert_eq!(client.try_recv_bytes(&mut buffer), Err(TryRecvError::Empty));
    let full = letters(&runtime, DeadLetterReason::Full);
    assert_eq!(full.len(), 5);
    assert!(full.iter().all(|letter| letter.is_reply));
    assert_eq!(full[0].payload, [8]);
    drop((client, other));
    kernel.terminate().unwrap();
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
    assert_eq!(report.replies.dead_lettered, 5);
}

pub fn urgent_messages_overtake_at_the_merge<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let mut client = kernel.client_bytes_with(laned(8)).unwrap();
    let send = |client: &mut BytesClient, range: std::ops::Range<u32>, priority| {
        for message in range {
            let options = SendOptions {
                priority,
                ..SendOptions::default()
            };
            eventually("room", || {
                client
                    .try_send_bytes_with(&message.to_ne_bytes(), &options)
                    .is_ok()
            });
        }
    };
    // Its credit is used up, so that what follows waits in the lane.
    send(&mut client, 0..8, Priority::Normal);
    eventually("an empty lane", || client.stats().queued == 0);
    send(&mut client, 100..104, Priority::Low);
    send(&mut client, 200..204, Priority::Normal);
    send(&mut client, 300..304, Priority::Critical);
    send(&mut client, 400..404, Priority::High);
    for range in [0..8, 300..304, 400..404, 200..204, 100..104] {
        for message in range {
            assert_eq!(recv(&mut client), message);
        }
    }
}

pub fn without_room_a_client_does_what_its_policy_says<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let with = |backpressure| {
        let options = ClientOptions {
            backpressure,
            ..laned(4)
        };
        let mut client = kernel.client_bytes_with(options).unwrap();
        for _ in 0..8 {
            // Another thread may be merging what is in the lane right now.
            eventually("room", || client.try_send_bytes(b"fill").is_ok());
        }
        let before = client.stats();
        (client, before)
    };
    let (mut block, before) = with(Backpressure::Block);
    let short = Duration::from_millis(5);
    assert_eq!(
        block.send_bytes_timeout(b"x", short),
        Err(SendTimeoutError::Timeout)
    );
    let (waited, refused) = (block.stats().waited, block.stats().refused);
    assert_eq!((waited, refused), (1, before.refused + 1));
    let (mut fail, before) = with(Backpressure::Fail);
    assert_eq!(
        fail.send_bytes_timeout(b"x", LONG),
        Err(SendTimeoutError::Full)
    );
    let (waited, refused) = (fail.stats().waited, fail.stats().refused);
    assert_eq!((waited, refused), (0, before.refused + 1));
    assert_eq!((block.stats().sent, fail.stats().sent), (8, 8));
    // A reader makes room for both.
    let mut buffer = [0; 48];
    for client in [&mut block, &mut fail] {
        assert_eq!(client.recv_bytes_timeout(&mut buffer, LONG), Ok(4));
        eventually("room", || client.try_send_bytes(b"fits").is_ok());
    }
}

pub fn the_newest_value_wins<S: Subject>() {
    let values = u64::from(S::PING_PONGS / 100).min(2000);
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let mut latest = kernel.latest::<Add, Add>().unwrap();
    let value = |left| Add {
        left,
        right: 0,
        negate: false,
    };
    let mut before = 0;
    for left in 1..=values {
        latest.publish(&value(left)).unwrap();
        match latest.newest() {
            Ok(newest) => {
                assert!(newest.left > before && newest.left <= left);
                before = newest.left;
            }
            Err(TryRecvError::Empty) => {}
            Err(error) => panic!("{error}"),
        }
    }
    while before < values {
        let newest = latest.newest_timeout(LONG).unwrap();
        assert!(newest.left > before);
        before = newest.left;
    }
    let stats = latest.stats();
    assert_eq!(stats.sent, values);
    assert_eq!(stats.received + stats.dropped, values);
    assert_eq!(kernel.metrics().dead_letters.full_requests, stats.dropped);
    drop(latest);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.requests.accepted, values);
    assert_eq!(report.requests.dead_lettered, stats.dropped);
    assert!(report.requests.adds_up(), "{report}");
}

pub fn expired_messages_never_reach_the_kernel<S: Subject>() {
    let runtime = runtime::<S>();
    let extended = LaunchOptions {
        extended: true,
        ..small()
    };
    let kernel = active(&runtime, "echo", extended);
    let expired = SendOptions {
        deadline_ns: Some(1),
        ..SendOptions::default()
    };
    let at_once = SendOptions {
        time_to_live: Some(Duration::ZERO),
        correlation: 7,
        ..SendOptions::default()
    };
    let later = SendOptions {
        time_to_live: Some(LONG),
        ..SendOptions::default()
    };
    for options in [ClientOptions::default(), laned(8)] {
        let mut client = kernel.client_bytes_with(options).unwrap();
        client.try_send_bytes_with(b"never", &expired).unwrap();
        client.try_send_bytes_with(b"nor this", &at_once).unwrap();
        client.try_send_bytes_with(b"this", &later).unwrap();
        let mut buffer = [0; 48];
        assert_eq!(client.recv_bytes_timeout(&mut buffer, LONG), Ok(4));
        assert_eq!(&buffer[..4], b"this");
        let letters = letters(&runtime, DeadLetterReason::Expired);
        assert_eq!(letters.len(), 2);
        assert_eq!(
            (&*letters[0].payload, &*letters[1].payload),
            (&b"never"[..], &b"nor this"[..])
        );
        assert_eq!(letters[0].extension.unwrap().deadline_ns, 1);
        assert_eq!(letters[1].header.unwrap().correlation(), 7);
        assert!(!letters[0].is_reply);
    }
    assert_eq!(kernel.metrics().dead_letters.expired, 4);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.requests.accepted, 6);
    assert_eq!(
        (report.requests.delivered, report.requests.dead_lettered),
        (2, 4)
    );
    assert!(report.requests.adds_up(), "{report}");
}

/// Also those that a handle sends: a loop on this CPU looks at the clock itself.
pub fn the_loop_gives_expired_messages_up<S: Subject>() {
    let runtime = runtime::<S>();
    let extended = LaunchOptions {
        extended: true,
        ..small()
    };
    let kernel = active(&runtime, "echo", extended);
    let expired = SendOptions {
        deadline_ns: Some(1),
        ..SendOptions::default()
    };
    kernel.send_bytes_with(b"never", &expired, LONG).unwrap();
    let mut buffer = [0; 48];
    assert_eq!(kernel.call_bytes(b"this", &mut buffer, LONG), Ok(4));
    assert_eq!(letters(&runtime, DeadLetterReason::Expired).len(), 1);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.requests.delivered, report.requests.dead_lettered),
        (1, 1)
    );
    assert_eq!(runtime.dead_letters().counts().corrupt_requests, 0);
}

pub fn what_waits_in_lanes_at_the_end_is_returned<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    let mut client = kernel.client_bytes_with(laned(4)).unwrap();
    for message in 0..8_u32 {
        client
            .send_bytes_timeout(&message.to_ne_bytes(), LONG)
            .unwrap();
    }
    eventually("four replies", || kernel.metrics().processed == 4);
    let metrics = kernel.metrics();
    assert_eq!((metrics.accepted, metrics.queue_depth), (8, 4));
    let lane = client.lane();
    kernel.terminate().unwrap();
    assert_eq!(
        client.try_send_bytes(b"late"),
        Err(TrySendError::Unavailable(Unavailable::Terminated))
    );
    // What was answered can still be received.
    for message in 0..4 {
        assert_eq!(recv(&mut client), message);
    }
    let mut buffer = [0; 48];
    assert_eq!(
        client.recv_bytes_timeout(&mut buffer, LONG),
        Err(RecvTimeoutError::Unavailable(Unavailable::Terminated))
    );
    let letters = letters(&runtime, DeadLetterReason::Shutdown);
    assert_eq!(letters.len(), 4);
    drop(client);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.returned.len(), 4);
    for (message, returned) in (4_u32..).zip(&report.returned) {
        assert_eq!(number(&returned.payload), message);
        assert_eq!(returned.header.lane(), lane);
    }
    assert_eq!((report.requests.accepted, report.requests.returned), (8, 4));
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

pub fn deactivation_keeps_what_is_in_lanes<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    let mut one = kernel.client_bytes_with(laned(4)).unwrap();
    let mut two = kernel.client_bytes_with(laned(4)).unwrap();
    for message in 0..8_u32 {
        one.send_bytes_timeout(&message.to_ne_bytes(), LONG)
            .unwrap();
        two.send_bytes_timeout(&message.to_ne_bytes(), LONG)
            .unwrap();
    }
    kernel.deactivate().unwrap();
    assert_eq!(
        one.try_send_bytes(b"x"),
        Err(TrySendError::Unavailable(Unavailable::Deactivated))
    );
    let mut buffer = [0; 48];
    let mut before = 0;
    while one
        .recv_bytes_timeout(&mut buffer, Duration::from_millis(20))
        .is_ok()
    {
        assert_eq!(number(&buffer), before);
        before += 1;
    }
    assert!(before <= 4);
    kernel.activate().unwrap();
    for message in before..8 {
        assert_eq!(recv(&mut one), message);
    }
    for message in 0..8 {
        assert_eq!(recv(&mut two), message);
    }
}

pub fn a_drain_delivers_what_is_in_lanes<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.repeat", small());
    let mut clients: Vec<BytesClient> = (0..3)
        .map(|_| kernel.client_bytes_with(laned(64)).unwrap())
        .collect();
    for client in &mut clients {
        for _ in 0..64 {
            client.send_bytes_timeout(&[0], LONG).unwrap();
        }
    }
    let report = runtime.drain(LONG).unwrap();
    assert!(report.complete && report.remaining == 0, "{report:?}");
    assert_eq!(
        clients[0].try_send_bytes(&[0]),
        Err(TrySendError::Unavailable(Unavailable::Draining))
    );
    drop(clients);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.requests.accepted, report.requests.delivered),
        (192, 192)
    );
}

pub fn terminate_wakes_clients<S: Subject>() {
    for wait in [WaitStrategy::Park, WaitStrategy::SpinYield] {
        let runtime = runtime::<S>();
        let options = LaunchOptions {
            host_wait: Some(wait),
            ..small()
        };
        let kernel = active(&runtime, "echo", options);
        thread::scope(|scope| {
            for _ in 0..3 {
                let mut client = kernel.client_bytes().unwrap();
                scope.spawn(move || {
                    let mut buffer = [0; 48];
                    assert_eq!(client.call_bytes(b"warm", &mut buffer, LONG), Ok(4));
                    assert_eq!(
                        client.recv_bytes_timeout(&mut buffer, LONG),
                        Err(RecvTimeoutError::Unavailable(Unavailable::Terminated))
                    );
                });
            }
            eventually("three calls", || kernel.metrics().received_replies == 3);
            kernel.terminate().unwrap();
        });
    }
}

pub fn the_last_client_gives_the_kernel_back<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    kernel.send_bytes(b"before").unwrap();
    let mut one = kernel.client_bytes().unwrap();
    let two = kernel.client_bytes().unwrap();
    assert_ne!(one.lane(), two.lane());
    assert_eq!(
        kernel.try_send_bytes(b"x"),
        Err(TrySendError::Unavailable(Unavailable::Split))
    );
    assert!(matches!(
        kernel.split_bytes(),
        Err(Error::EndpointsBusy { .. })
    ));
    one.try_send_bytes(b"nobody's").unwrap();
    drop((one, two));
    let mut buffer = [0; 48];
    // As soon as what its clients sent has been handled.
    eventually("the handle's turn", || {
        !matches!(
            kernel.try_send_bytes(b"after"),
            Err(TrySendError::Unavailable(Unavailable::Split))
        )
    });
    // The handle's own replies have waited for it.
    assert_eq!(kernel.recv_bytes_timeout(&mut buffer, LONG), Ok(6));
    assert_eq!(kernel.recv_bytes_timeout(&mut buffer, LONG), Ok(5));
    let late = letters(&runtime, DeadLetterReason::LateReply);
    assert_eq!(late.len(), 1);
    assert_eq!(late[0].payload, b"nobody's");
    // And others may come.
    let mut again = kernel.client_bytes().unwrap();
    assert!(again.is_direct());
    stream(&mut again, 0, 50);
}

pub fn clients_and_runtime_may_be_dropped_in_any_order<S: Subject>() {
    for order in 0..6 {
        let runtime = runtime::<S>();
        let kernel = active(&runtime, "echo", small());
        let mut one = kernel.client_bytes().unwrap();
        let mut two = kernel.client_bytes().unwrap();
        stream(&mut one, 0, 10);
        stream(&mut two, 0, 10);
        one.try_send_bytes(b"unread").unwrap();
        let mut parts: [Option<Box<dyn std::any::Any>>; 3] = [
            Some(Box::new(runtime)),
            Some(Box::new(one)),
            Some(Box::new((kernel, two))),
        ];
        for index in [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ][order]
        {
            parts[index] = None;
        }
    }
}

pub fn bad_client_options_are_refused<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", small());
    let refused = |options: ClientOptions| match kernel.client_bytes_with(options) {
        Err(Error::InvalidOption { option, .. }) => option,
        other => panic!("{other:?}"),
    };
    let default = ClientOptions::default();
    assert_eq!(
        refused(ClientOptions {
            capacity: Some(0),
            ..default
        }),
        "capacity"
    );
    assert_eq!(
        refused(ClientOptions {
            capacity: Some((1 << 24) + 1),
            ..default
        }),
        "capacity"
    );
    for weight in [0, 65] {
        assert_eq!(refused(ClientOptions { weight, ..default }), "weight");
    }
    assert!(matches!(
        kernel.client::<super::kernels::Stranger, Sum>(),
        Err(Error::UnknownType { .. })
    ));
    let held = kernel.split_bytes().unwrap();
    assert!(matches!(
        kernel.client_bytes(),
        Err(Error::EndpointsBusy { .. })
    ));
    drop(held);
    let clients: Vec<_> = (0..255)
        .map(|_| kernel.client_bytes_with(laned(1)).unwrap())
        .collect();
    assert!(matches!(
        kernel.client_bytes_with(laned(1)),
        Err(Error::EndpointsBusy { .. })
    ));
    drop(clients);
    kernel.terminate().unwrap();
    assert!(kernel.client_bytes().is_err() || runtime.complete_shutdown().is_ok());
}

/// However bridge, kernel and callers wait.
pub fn every_way_to_wait_serves_clients<S: Subject>() {
    let strategies = [
        WaitStrategy::Spin,
        WaitStrategy::SpinYield,
        WaitStrategy::Park,
        WaitStrategy::Auto,
    ];
    for bridge_wait in strategies {
        for host_wait in [WaitStrategy::Park, WaitStrategy::SpinYield] {
            let runtime = runtime_from(S::builder_with(RuntimeConfig {
                bridge_wait,
                host_wait,
                kernel_wait: WaitStrategy::Park,
                ..RuntimeConfig::default()
            }));
            let kernel = active(&runtime, "echo", small());
            let serve = || {
                thread::scope(|scope| {
                    for _ in 0..3 {
                        let mut client = kernel.client_bytes().unwrap();
                        scope.spawn(move || stream(&mut client, 0, 200));
                    }
                });
                runtime.bridge(0).unwrap().load().unwrap()
            };
            let mut load = serve();
            if bridge_wait == WaitStrategy::Spin {
                // Once its thread has got going, which may take a while on a busy machine.
                eventually("the bridge", || {
                    load = serve();
                    load.moved > 0
                });
                assert!(load.round_p50 <= load.round_max && load.moved >= load.rounds);
            }
        }
    }
    let interval = RuntimeConfig {
        bridge_poll_interval: Duration::from_millis(1),
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(S::builder_with(interval));
    let kernel = active(&runtime, "echo", small());
    let mut one = kernel.client_bytes_with(laned(16)).unwrap();
    stream(&mut one, 0, 20);
}

/// Messages that nobody waits for, and that found the baton taken, are merged by the bridge.
pub fn the_bridge_merges_for_those_who_do_not_wait<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.repeat", small());
    let mut clients: Vec<BytesClient> = (0..4)
        .map(|_| kernel.client_bytes_with(laned(64)).unwrap())
        .collect();
    let sent: u32 = thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter_mut()
            .map(|client| {
                scope.spawn(|| {
                    let mut sent = 0;
                    for _ in 0..500 {
                        sent += u32::from(client.try_send_bytes(&[0]).is_ok());
                    }
                    sent
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    eventually("all of them", || {
        kernel.metrics().processed == u64::from(sent)
    });
    assert_eq!(
        clients
            .iter()
            .map(|client| client.stats().sent)
            .sum::<u64>(),
        u64::from(sent)
    );
}

/// Lanes get their turns by their weights.
pub fn lanes_get_their_turns_by_weight<S: Subject>() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&log);
    let logging = KernelRegistration::new("test.log").cpu_handler(move |request, context| {
        while !GATE_OPEN.load(Ordering::Acquire) {
            thread::sleep(Duration::from_micros(100));
        }
        kept.lock().unwrap().push(request.header().lane());
        context.reply_bytes(&[])
    });
    let runtime = runtime_from(S::builder().register(logging));
    let kernel = active(&runtime, "test.log", small());
    let mut clients: Vec<BytesClient> = [3, 1, 2]
        .map(|weight| {
            let options = ClientOptions {
                weight,
                ..laned(128)
            };
            kernel.client_bytes_with(options).unwrap()
        })
        .into();
    // The kernel's ring first, then the lanes behind it.
    for _ in 0..16 {
        clients[0].try_send_bytes(&[]).unwrap();
    }
    eventually("a full ring", || clients[0].stats().queued == 0);
    for client in &mut clients {
        for _ in 0..60 {
            client.try_send_bytes(&[]).unwrap();
        }
    }
    let _open = Opened::new(&GATE_OPEN);
    eventually("196 messages", || log.lock().unwrap().len() == 196);
    let lanes: Vec<u16> = clients.iter().map(Client::lane).collect();
    let log = log.lock().unwrap();
    // Behind what the first had sent, turns of 3, 1 and 2, while all have some left; the first few may have slipped into the ring before.
    let turns = &log[40..40 + 60];
    for (lane, weight) in lanes.iter().zip([3, 1, 2]) {
        let share = turns.iter().filter(|other| *other == lane).count();
        assert_eq!(share, 10 * weight, "{log:?}");
    }
}

/// A call of a client that times out leaves its late reply to the dead letters.
pub fn a_late_reply_to_a_client_becomes_a_dead_letter<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.gated", small());
    for options in [ClientOptions::default(), laned(8)] {
        let mut client = kernel.client_bytes_with(options).unwrap();
        let mut buffer = [0; 48];
        let short = Duration::from_millis(5);
        assert_eq!(
            client.call_bytes(b"late", &mut buffer, short),
            Err(CallError::Timeout)
        );
        let _open = Opened::new(&GATE_OPEN);
        assert_eq!(client.call_bytes(b"on time", &mut buffer, LONG), Ok(7));
        assert_eq!(letters(&runtime, DeadLetterReason::LateReply).len(), 1);
    }
}

/// A kernel that fails tells every client at once, and what they had sent is accounted for.
pub fn a_failure_reaches_every_client<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.panic", small());
    let mut clients: Vec<BytesClient> = (0..3)
        .map(|_| kernel.client_bytes_with(laned(8)).unwrap())
        .collect();
    for client in &mut clients {
        stream(client, 0, 20);
    }
    clients[0].try_send_bytes(b"panic").unwrap();
    let mut buffer = [0; 48];
    for client in &mut clients {
        assert_eq!(
            client.recv_bytes_timeout(&mut buffer, LONG),
            Err(RecvTimeoutError::Unavailable(Unavailable::Failed))
        );
        assert_eq!(
            client.try_send_bytes(b"x"),
            Err(TrySendError::Unavailable(Unavailable::Failed))
        );
    }
    drop(clients);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.requests.dead_lettered, 1);
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

/// The newest value waits in its lane while the kernel does, and is handled when that goes on, though nobody calls again.
pub fn the_newest_value_survives_a_pause<S: Subject>() {
    let handled = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&handled);
    let slow = KernelRegistration::new("test.slow").cpu_handler(move |request, _| {
        thread::sleep(Duration::from_millis(5));
        seen.lock().unwrap().push(request.payload().to_vec());
        Ok(())
    });
    let runtime = runtime_from(S::builder().register(slow));
    let kernel = active(&runtime, "test.slow", small());
    let mut newest = kernel
        .client_bytes_with(ClientOptions {
            backpressure: Backpressure::DropOldest,
            ..ClientOptions::default()
        })
        .unwrap();
    for round in 0..20 {
        newest.try_send_bytes(b"first").unwrap();
        // The handler is at the first one, and there is credit for one.
        newest.try_send_bytes(b"second").unwrap();
        kernel.deactivate().unwrap();
        // The bridge comes by, and finds a kernel that takes nothing.
        thread::sleep(Duration::from_millis(2));
        kernel.activate().unwrap();
        eventually("the second value", || {
            handled.lock().unwrap().len() == 2 * (round + 1)
        });
    }
}

/// What a client sent before it went is on the accounts of a kernel that fails, whoever clears the lane away.
pub fn what_a_client_left_behind_is_accounted_for<S: Subject>() {
    let failing = KernelRegistration::new("test.failing").cpu_handler(|_, _| {
        while !GATE_OPEN.load(Ordering::Acquire) {
            thread::sleep(Duration::from_micros(100));
        }
        panic!("as it should")
    });
    let runtime = runtime_from(S::builder().register(failing));
    let kernel = active(&runtime, "test.failing", small());
    let mut client = kernel.client_bytes_with(laned(4)).unwrap();
    for _ in 0..8 {
        eventually("room", || client.try_send_bytes(b"x").is_ok());
    }
    eventually("a full lane", || client.stats().queued == 4);
    let _open = Opened::new(&GATE_OPEN);
    eventually("a failure", || {
        client.try_send_bytes(b"x") == Err(TrySendError::Unavailable(Unavailable::Failed))
    });
    drop(client);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.requests.accepted, 8, "{report}");
    assert!(report.requests.adds_up(), "{report}");
    assert_eq!(
        (report.requests.dead_lettered, report.requests.returned),
        (1, 7)
    );
}

/// A reply of another type is in the way of no newer one.
pub fn the_newest_reply_is_found_behind_one_of_another_type<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", LaunchOptions::default());
    let mut latest = kernel.latest::<Add, Add>().unwrap();
    let value = Add {
        left: 1,
        right: 2,
        negate: false,
    };
    for _ in 0..3 {
        latest.publish(&value).unwrap();
        assert!(matches!(
            latest.newest_timeout(LONG),
            Err(RecvTimeoutError::Message(MessageError::TypeMismatch { .. }))
        ));
        assert_eq!(latest.newest(), Err(TryRecvError::Empty));
    }
    assert_eq!(letters(&runtime, DeadLetterReason::Mismatch).len(), 3);
}
