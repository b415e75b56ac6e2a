//! What a caller was told is taken is in the report, once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use ringkernel::error::TryRecvError;
use ringkernel::{
    ConnectionKind, KernelRegistration, LaunchOptions, RuntimeConfig, SubscriberOptions,
    TopicOptions, WaitStrategy,
};

use super::{LONG, Subject, active, eventually, runtime, runtime_from, small};

/// Replies that are received after the end of their kernel count as delivered, whatever the runtime
/// has been asked for meanwhile and the threads that still hold a handle; those that no handle
/// received are returned.
pub fn replies_received_after_the_end_are_delivered<S: Subject>() {
    for (lists, keeps) in [(false, true), (true, true), (true, false), (false, false)] {
        let runtime = runtime::<S>();
        let kernel = active(&runtime, "echo", small());
        for number in 0..8 {
            kernel.send_bytes(&[number]).unwrap();
        }
        eventually("eight replies", || kernel.metrics().produced == 8);
        kernel.terminate().unwrap();
        if lists {
            assert!(runtime.kernels().is_empty());
        }
        let mut buffer = [0; 48];
        for number in 0..5 {
            assert_eq!(kernel.try_recv_bytes(&mut buffer), Ok(1));
            assert_eq!(buffer[0], number);
        }
        let kernel = keeps.then_some(kernel);
        if !keeps && lists {
            // Its accounts are closed now.
            assert!(runtime.kernels().is_empty());
        }
        let report = runtime.complete_shutdown().unwrap();
        let replies = report.replies;
        assert!(replies.adds_up(), "{report}");
        assert_eq!(
            (replies.accepted, replies.delivered, replies.returned),
            (8, 5, 3),
            "{report}"
        );
        assert_eq!(report.requests.delivered, 8, "{report}");
        // What is received after the report is in no report, and still there.
        if let Some(kernel) = kernel {
            for _ in 5..8 {
                assert_eq!(kernel.try_recv_bytes(&mut buffer), Ok(1));
            }
            assert!(matches!(
                kernel.try_recv_bytes(&mut buffer),
                Err(TryRecvError::Unavailable(_))
            ));
        }
        assert_eq!(
            runtime.dead_letters().counts().shutdown,
            if keeps { 0 } else { 3 }
        );
    }
}

/// The same for those that a client and a receiving endpoint receive.
pub fn clients_and_endpoints_receive_after_the_end<S: Subject>() {
    for is_client in [false, true] {
        let runtime = runtime::<S>();
        let kernel = active(&runtime, "echo", small());
        let mut buffer = [0; 48];
        let mut count = 0;
        if is_client {
            let mut clients = [kernel.client_bytes(), kernel.client_bytes()].map(Result::unwrap);
            for client in &mut clients {
                for _ in 0..4 {
                    client.try_send_bytes(b"x").unwrap();
                }
            }
            eventually("eight replies", || kernel.metrics().produced == 8);
            kernel.terminate().unwrap();
            assert!(runtime.kernels().is_empty());
            for client in &mut clients {
                while client.try_recv_bytes(&mut buffer).is_ok() {
                    count += 1;
                }
            }
        } else {
            let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
            for _ in 0..8 {
                sender.try_send_bytes(b"x").unwrap();
            }
            eventually("eight replies", || kernel.metrics().produced == 8);
            kernel.terminate().unwrap();
            assert!(runtime.kernels().is_empty());
            while receiver.try_recv_bytes(&mut buffer).is_ok() {
                count += 1;
            }
        }
        assert_eq!(count, 8);
        let report = runtime.complete_shutdown().unwrap();
        assert_eq!(
            (report.replies.delivered, report.replies.returned),
            (8, 0),
            "{report}"
        );
    }
}

/// Endpoints and clients look whether the kernel takes requests, and write one, without telling
/// anybody: what they write while it ends is returned.
pub fn requests_sent_while_the_kernel_ends_are_in_the_report<S: Subject>() {
    for round in 0..30 {
        let runtime = runtime::<S>();
        let kernel = active(&runtime, "echo", small());
        let (mut sender, _receiver) = kernel.split_bytes().unwrap();
        let shared = active(&runtime, "echo", small());
        let mut clients = [shared.client_bytes(), shared.client_bytes()].map(Result::unwrap);
        let is_over = AtomicBool::new(false);
        let sent = thread::scope(|scope| {
            let endpoint = scope.spawn(|| {
                let mut sent = 0;
                while !is_over.load(Ordering::Relaxed) {
                    sent += u64::from(sender.try_send_bytes(b"x").is_ok());
                }
                sent
            });
            let clients: Vec<_> = clients
                .iter_mut()
                .map(|client| {
                    scope.spawn(|| {
                        let mut sent = 0;
                        let mut buffer = [0; 48];
                        while !is_over.load(Ordering::Relaxed) {
                            sent += u64::from(client.try_send_bytes(b"x").is_ok());
                            let _ = client.try_recv_bytes(&mut buffer);
                        }
                        sent
                    })
                })
                .collect();
            thread::sleep(std::time::Duration::from_micros(300 * (round % 7)));
            kernel.terminate().unwrap();
            shared.terminate().unwrap();
            is_over.store(true, Ordering::Relaxed);
            let threads = clients.into_iter().chain([endpoint]);
            threads.map(|thread| thread.join().unwrap()).sum::<u64>()
        });
        let report = runtime.complete_shutdown().unwrap();
        assert!(
            report.requests.adds_up() && report.replies.adds_up(),
            "{report}"
        );
        assert_eq!(report.requests.accepted, sent, "{report}");
        assert_eq!(report.requests.returned, report.returned.len() as u64);
        let counts = runtime.dead_letters().counts();
        assert_eq!(counts.requests(), report.requests.dead_lettered);
    }
}

/// Replies that a handler was told are taken, on a thread that must not wait for room, are
/// accounted for whether the kernel is told to end or its handler panics.
pub fn replies_that_wait_for_room_are_in_the_report<S: Subject>() {
    const REPLIES: u64 = 20;
    for panics in [false, true] {
        let taken = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&taken);
        let many = KernelRegistration::new("test.many").cpu_handler(move |_, context| {
            for _ in 0..REPLIES {
                context.reply_bytes(b"x")?;
                counted.fetch_add(1, Ordering::SeqCst);
            }
            assert!(!panics, "on purpose");
            Ok(())
        });
        let config = RuntimeConfig {
            kernel_wait: WaitStrategy::Park,
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(S::builder_with(config).register(many));
        let options = || LaunchOptions {
            queue_capacity: Some(2),
            ..LaunchOptions::default()
        };
        let first = runtime.launch("echo", 1, 1, options()).unwrap();
        let last = runtime.launch("test.many", 1, 1, options()).unwrap();
        let connection = runtime.connect(&first, &last).unwrap();
        assert_eq!(connection.kind(), ConnectionKind::SharedThread);
        first.activate().unwrap();
        last.activate().unwrap();
        first.send_bytes(b"x").unwrap();
        // Some of them may have been taken by the kernel's own thread, which waits for room.
        eventually("replies", || taken.load(Ordering::SeqCst) >= 2);
        thread::sleep(std::time::Duration::from_millis(20));
        let report = runtime.complete_shutdown().unwrap();
        let taken = taken.load(Ordering::SeqCst);
        // One more is the first kernel's.
        assert_eq!(report.replies.accepted, taken + 1, "{report}");
        assert!(report.replies.adds_up(), "{report}");
        drop((first, last));
        let counts = runtime.dead_letters().counts();
        assert_eq!(counts.replies(), report.replies.dead_lettered);
        // Of the requests, the one that the handler panicked on is none of them; and then it has
        // not taken the first kernel's reply either.
        assert_eq!(
            counts.shutdown,
            report.replies.returned - u64::from(panics) + report.requests.returned
        );
    }
}

/// A reply that is to be published and that the topic cannot take leaves the accounts by one door.
pub fn a_reply_that_a_topic_cannot_take_is_booked_once<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    let topic = |name, size| {
        let options = TopicOptions {
            message_size: Some(size),
            ..TopicOptions::default()
        };
        runtime.topic_bytes(name, options).unwrap()
    };
    let (requests, replies) = (topic("requests", 48), topic("replies", 4));
    let subscription = runtime
        .subscribe_kernel_publishing(&requests, &kernel, &replies, SubscriberOptions::default())
        .unwrap();
    let mut publisher = requests.publisher().unwrap();
    publisher.publish_bytes(b"fits").unwrap();
    publisher.publish_bytes(b"too large").unwrap();
    eventually("both", || {
        let stats = subscription.stats();
        (stats.published, stats.unpublished) == (1, 1)
    });
    let letter = runtime.dead_letters().try_recv().unwrap();
    assert_eq!(
        (letter.payload.as_slice(), letter.kernel.as_str()),
        (b"too large".as_slice(), kernel.name())
    );
    runtime.drain(LONG).unwrap();
    let report = runtime.complete_shutdown().unwrap();
    let replies = report.replies;
    assert_eq!(
        (replies.accepted, replies.delivered, replies.dead_lettered),
        (2, 1, 1),
        "{report}"
    );
    assert_eq!(runtime.dead_letters().counts().replies(), 1);
}
