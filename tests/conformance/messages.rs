//! What happens to one message after the other.

use std::time::{Duration, Instant};

use ringkernel::error::{
    CallError, HandlerError, MessageError, RecvTimeoutError, Rejection, SendTimeoutError,
    TryRecvError, TrySendError,
};
use ringkernel::kernel::{saxpy_reply, saxpy_request};
use ringkernel::{LaunchOptions, Priority, SendOptions, WaitStrategy};

use super::kernels::{Add, GATE_OPEN, OVERFLOW, Opened, Stranger, Sum, numbers_of};
use super::{LONG, Subject, active, eventually, runtime};

fn sized(bytes: usize) -> LaunchOptions {
    LaunchOptions {
        message_size: Some(bytes),
        queue_capacity: Some(64),
        ..LaunchOptions::default()
    }
}

fn patterned(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + seed) as u8).collect()
}

pub fn echo_returns_every_size_unchanged_and_in_order<S: Subject>() {
    let runtime = runtime::<S>();
    let largest = 1000;
    let kernel = active(&runtime, "echo", sized(largest));
    let sizes = [
        0,
        1,
        15,
        16,
        47,
        48,
        49,
        111,
        112,
        113,
        largest - 1,
        largest,
    ];
    for (seed, size) in sizes.into_iter().enumerate() {
        kernel.send_bytes(&patterned(size, seed)).unwrap();
    }
    let mut reply = vec![0; largest];
    for (seed, size) in sizes.into_iter().enumerate() {
        let length = kernel.recv_bytes_timeout(&mut reply, LONG).unwrap();
        assert_eq!(reply[..length], patterned(size, seed), "{size} bytes");
    }
    // Laps of the ring, with every size in turn.
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    for seed in 0..5000 {
        let message = patterned(seed % (largest + 1), seed);
        sender.send_bytes_timeout(&message, LONG).unwrap();
        let length = receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
        assert_eq!(reply[..length], message);
    }
}

pub fn a_payload_one_byte_too_long_is_refused_and_loses_nothing<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", sized(100));
    let max = 112;
    let long = vec![1; max + 1];
    let refused = Rejection::TooLarge { max };
    assert_eq!(
        kernel.send_bytes(&long),
        Err(SendTimeoutError::Rejected(refused))
    );
    assert_eq!(
        kernel.try_send_bytes(&long),
        Err(TrySendError::Rejected(refused))
    );
    let mut reply = vec![0; max];
    assert_eq!(
        kernel.call_bytes(&long, &mut reply, LONG),
        Err(CallError::Rejected(refused))
    );
    {
        let (mut sender, _receiver) = kernel.split_bytes().unwrap();
        assert_eq!(
            sender.try_send_bytes(&long),
            Err(TrySendError::Rejected(refused))
        );
        let slot = sender.reserve().unwrap();
        assert_eq!(slot.commit(max + 1), Err(TrySendError::Rejected(refused)));
        // An extension takes its bytes from the payload's room.
        let traced = SendOptions {
            trace_id: Some([1; 16]),
            ..SendOptions::default()
        };
        assert_eq!(
            sender.try_send_bytes_with(&long[..max - 31], &traced),
            Err(TrySendError::Rejected(Rejection::TooLarge {
                max: max - 32
            }))
        );
    }
    assert_eq!(kernel.metrics().accepted, 0);
    let length = kernel.call_bytes(&long[..max], &mut reply, LONG).unwrap();
    assert_eq!(reply[..length], long[..max]);
}

pub fn typed_messages_travel_there_and_back<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", LaunchOptions::default());
    let add = Add {
        left: 40,
        right: 2,
        negate: true,
    };
    let sum: Sum = kernel.call(&add, LONG).unwrap();
    assert_eq!(sum, Sum { value: -42 });
    kernel.send(&add).unwrap();
    kernel.send_timeout(&add, LONG).unwrap();
    kernel.try_send(&add).unwrap();
    for _ in 0..2 {
        assert_eq!(kernel.recv_timeout::<Sum>(LONG).unwrap(), sum);
    }
    assert_eq!(kernel.recv::<Sum>().unwrap(), sum);
    let (mut sender, mut receiver) = kernel.split::<Add, Sum>().unwrap();
    sender.try_send(&add).unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), sum);
    sender.send(&add).unwrap();
    let received = receiver.recv_ref_timeout(LONG).unwrap();
    assert_eq!(received.access().unwrap().value, -42);
    // An open type table takes types as they come.
    let echo = active(&runtime, "echo", LaunchOptions::default());
    assert_eq!(echo.call::<Add, Add>(&add, LONG).unwrap(), add);
    assert_eq!(echo.call::<Sum, Sum>(&sum, LONG).unwrap(), sum);
}

pub fn a_message_of_another_type_stays_where_it_is<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let sum = Sum { value: 5 };
    kernel.send(&sum).unwrap();
    let mismatch = MessageError::TypeMismatch {
        expected: <Add as ringkernel::RingMessage>::TYPE_ID,
        found: <Sum as ringkernel::RingMessage>::TYPE_ID,
    };
    for _ in 0..2 {
        assert_eq!(
            kernel.recv_timeout::<Add>(LONG),
            Err(RecvTimeoutError::Message(mismatch))
        );
    }
    assert_eq!(
        kernel.try_recv_bytes(&mut [0; 3]),
        Err(TryRecvError::Message(MessageError::BufferTooSmall {
            length: 16
        }))
    );
    assert_eq!(kernel.try_recv::<Sum>().unwrap(), sum);
    // A call's reply has nobody else to go to.
    assert_eq!(
        kernel.call::<Sum, Add>(&sum, LONG),
        Err(CallError::Message(mismatch))
    );
    assert_eq!(kernel.try_recv::<Add>(), Err(TryRecvError::Empty));
}

pub fn a_type_that_was_not_registered_is_refused<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", LaunchOptions::default());
    let unknown = Rejection::UnknownType {
        type_id: <Stranger as ringkernel::RingMessage>::TYPE_ID,
    };
    assert_eq!(
        kernel.try_send(&Stranger { value: 1 }),
        Err(TrySendError::Rejected(unknown))
    );
    let error = kernel.split::<Stranger, Sum>().unwrap_err().to_string();
    assert!(error.contains("test.Stranger.v1"), "{error}");
    // Raw bytes are taken by the ring and refused by a handler that wants a type.
    let mut reply = [0; 48];
    match kernel.call_bytes(b"raw", &mut reply, LONG) {
        Err(CallError::Message(MessageError::Handler(error))) => {
            assert_eq!(error.code, HandlerError::BAD_REQUEST);
        }
        other => panic!("{other:?}"),
    }
}

pub fn a_corrupt_archive_is_an_error_of_that_message_alone<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.corrupt", LaunchOptions::default());
    let add = Add {
        left: 1,
        right: 2,
        negate: false,
    };
    kernel.send(&add).unwrap();
    assert_eq!(
        kernel.recv_timeout::<Add>(LONG),
        Err(RecvTimeoutError::Message(MessageError::Corrupt))
    );
    assert_eq!(kernel.metrics().dead_letters.corrupt_replies, 1);
    assert_eq!(
        kernel.call::<Add, Add>(&add, LONG),
        Err(CallError::Message(MessageError::Corrupt))
    );
    // The kernel is as well as before.
    let mut reply = [0; 48];
    let mut archived = [0; 24];
    archived[16] = 1;
    kernel.call_bytes(&archived, &mut reply, LONG).unwrap();
    assert_eq!(reply[16], 2);
    // On the way in, the same.
    let adder = active(&runtime, "test.add", LaunchOptions::default());
    let (mut sender, mut receiver) = adder.split::<Add, Sum>().unwrap();
    let mut slot = sender.reserve().unwrap();
    slot.body_mut()[..32].fill(2);
    slot.commit(32).unwrap();
    match receiver.recv_timeout(LONG) {
        Err(RecvTimeoutError::Message(MessageError::Handler(error))) => {
            assert_eq!(error.code, HandlerError::BAD_REQUEST);
        }
        other => panic!("{other:?}"),
    }
    sender.try_send(&add).unwrap();
    assert_eq!(receiver.recv_timeout(LONG).unwrap().value, 3);
}

pub fn handler_errors_reach_the_caller_and_are_counted<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", LaunchOptions::default());
    let add = Add {
        left: u64::MAX,
        right: 1,
        negate: false,
    };
    // The text is the handler's; shaders have none.
    let is_expected = |error: MessageError| match error {
        MessageError::Handler(error) => {
            error.code == OVERFLOW && ["overflow", ""].contains(&error.text())
        }
        _ => false,
    };
    match kernel.call::<Add, Sum>(&add, LONG) {
        Err(CallError::Message(error)) => assert!(is_expected(error), "{error}"),
        other => panic!("{other:?}"),
    }
    kernel.send(&add).unwrap();
    match kernel.recv_timeout::<Sum>(LONG) {
        Err(RecvTimeoutError::Message(error)) => assert!(is_expected(error), "{error}"),
        other => panic!("{other:?}"),
    }
    eventually("the last error", || kernel.metrics().last_error == OVERFLOW);
    eventually("the count of errors", || {
        kernel.metrics().telemetry.unwrap().errors == 2
    });
    // A reply that no slot holds is an error of the handler too, not a loss.
    let large = active(&runtime, "test.too_large", LaunchOptions::default());
    match large.call_bytes(b"", &mut [0; 48], LONG) {
        Err(CallError::Message(MessageError::Handler(error))) => {
            assert_eq!(error.code, HandlerError::REPLY_TOO_LARGE);
        }
        other => panic!("{other:?}"),
    }
}

pub fn a_handler_may_reply_any_number_of_times<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(
        &runtime,
        "test.repeat",
        LaunchOptions {
            queue_capacity: Some(16),
            ..LaunchOptions::default()
        },
    );
    // More than the reply ring holds: the handler waits for the caller.
    for wanted in [0, 1, 3, 100] {
        kernel.send_bytes(&[wanted]).unwrap();
        let mut reply = [0xff];
        for index in 0..wanted {
            assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(1));
            assert_eq!(reply, [index]);
        }
        assert_eq!(
            kernel.recv_bytes_timeout(&mut reply, Duration::from_millis(5)),
            Err(RecvTimeoutError::Timeout)
        );
    }
}

pub fn a_full_ring_gives_the_message_back_and_frees_its_slots<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(
        &runtime,
        "test.gated",
        LaunchOptions {
            queue_capacity: Some(8),
            ..LaunchOptions::default()
        },
    );
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    let mut sent = 0_u8;
    while sender.try_send_bytes(&[sent]).is_ok() {
        sent += 1;
    }
    assert_eq!(sent, 8, "one in the handler still holds its slot");
    assert_eq!(sender.try_send_bytes(&[99]), Err(TrySendError::Full));
    let begin = Instant::now();
    let timeout = Duration::from_millis(20);
    assert_eq!(
        sender.send_bytes_timeout(&[99], timeout),
        Err(SendTimeoutError::Timeout)
    );
    assert!(begin.elapsed() >= timeout.mul_f64(0.999));
    let _open = Opened::new(&GATE_OPEN);
    let mut reply = [0];
    for expected in 0..sent {
        receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
        assert_eq!(reply, [expected]);
    }
    // Idle now: every slot comes back.
    eventually("all free slots", || {
        sender.batch(100).is_ok_and(|batch| batch.room() == 8)
    });
}

pub fn a_full_reply_ring_holds_requests_back<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        queue_capacity: Some(8),
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "echo", options);
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    let mut sent = 0_u8;
    // Eight replies that nobody reads, and eight requests behind them.
    eventually("two full rings", || {
        while sender.try_send_bytes(&[sent]).is_ok() {
            sent += 1;
        }
        sent >= 16
    });
    assert_eq!(sent, 16);
    let timeout = Duration::from_millis(20);
    assert_eq!(
        sender.send_bytes_timeout(&[99], timeout),
        Err(SendTimeoutError::Timeout)
    );
    let mut reply = [0];
    for expected in 0..sent {
        receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
        assert_eq!(reply, [expected]);
    }
    assert_eq!(
        receiver.try_recv_bytes(&mut reply),
        Err(TryRecvError::Empty)
    );
    eventually("all free slots", || {
        sender.batch(100).is_ok_and(|batch| batch.room() == 8)
    });
}

pub fn a_quarter_of_a_busy_ring_comes_back<S: Subject>() {
    let runtime = runtime::<S>();
    let capacity = 64;
    let kernel = active(
        &runtime,
        "test.sleep",
        LaunchOptions {
            queue_capacity: Some(capacity),
            ..LaunchOptions::default()
        },
    );
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    for _ in 0..capacity {
        sender.try_send_bytes(&[1]).unwrap();
    }
    assert_eq!(sender.try_send_bytes(&[1]), Err(TrySendError::Full));
    // The kernel never finds its ring empty, yet a quarter is free once a quarter has been handled.
    for _ in 0..capacity / 4 {
        receiver.recv_bytes_timeout(&mut [0], LONG).unwrap();
    }
    eventually("a quarter of the ring", || {
        sender
            .batch(capacity)
            .is_ok_and(|batch| batch.room() >= capacity / 4)
    });
    assert!(kernel.metrics().queue_depth > 0, "the ring was never empty");
}

pub fn a_message_before_the_deadline_is_never_missed<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    let mut reply = [0; 8];
    for number in 0..u64::from(S::PING_PONGS) {
        sender
            .send_bytes_timeout(&number.to_ne_bytes(), LONG)
            .unwrap();
        receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
        assert_eq!(u64::from_ne_bytes(reply), number);
    }
}

pub fn a_receive_without_timeout_is_a_try<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let mut reply = [0; 1];
    assert_eq!(
        kernel.recv_bytes_timeout(&mut reply, Duration::ZERO),
        Err(RecvTimeoutError::Timeout)
    );
    assert_eq!(kernel.try_recv_bytes(&mut reply), Err(TryRecvError::Empty));
    kernel.send_bytes(&[1]).unwrap();
    eventually("the reply", || kernel.metrics().produced == 1);
    assert_eq!(kernel.recv_bytes_timeout(&mut reply, Duration::ZERO), Ok(1));
    let (_sender, mut receiver) = kernel.split_bytes().unwrap();
    assert_eq!(
        receiver.recv_bytes_timeout(&mut reply, Duration::ZERO),
        Err(RecvTimeoutError::Timeout)
    );
    assert_eq!(
        receiver.try_recv_ref().map(|_| ()),
        Err(TryRecvError::Empty)
    );
}

pub fn timestamps_of_one_kernel_strictly_increase<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        extended: true,
        queue_capacity: Some(1 << 14),
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "echo", options);
    let stamped = SendOptions {
        timestamp: true,
        ..SendOptions::default()
    };
    let before = ringkernel::time::now_ns();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..4000 {
                    kernel.send_bytes_with(b"", &stamped, LONG).unwrap();
                }
            });
        }
    });
    let (_sender, mut receiver) = kernel.split_bytes().unwrap();
    let stamps: Vec<u64> = (0..8000)
        .map(|_| {
            let received = receiver.recv_ref_timeout(LONG).unwrap();
            received.extension().unwrap().timestamp_ns
        })
        .collect();
    assert!(stamps.iter().all(|stamp| *stamp >= before));
    // In the order in which they were sent.
    assert!(stamps.windows(2).all(|pair| pair[0] < pair[1]));
}

pub fn extensions_travel_with_their_message<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        extended: true,
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "echo", options);
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    let payload = [7; 48];
    let options = SendOptions {
        correlation: 12,
        priority: Priority::Critical,
        key: Some(3),
        timestamp: true,
        deadline_ns: Some(u64::MAX - 77),
        trace_id: Some(*b"0123456789abcdef"),
        time_to_live: None,
    };
    sender.try_send_bytes_with(&payload, &options).unwrap();
    sender.try_send_bytes(&payload).unwrap();
    let received = receiver.recv_ref_timeout(LONG).unwrap();
    let extension = received.extension().unwrap();
    assert_eq!(extension.deadline_ns, u64::MAX - 77);
    assert_eq!(&extension.trace_id, b"0123456789abcdef");
    assert!(extension.timestamp_ns > 0);
    assert_eq!(received.header().correlation(), 12);
    assert_eq!(received.header().priority(), Priority::Critical);
    assert_eq!(received.payload(), payload);
    drop(received);
    let plain = receiver.recv_ref_timeout(LONG).unwrap();
    assert_eq!(plain.extension(), None);
    assert_eq!(plain.header().priority(), Priority::Normal);
    assert_eq!(plain.payload(), payload);
}

pub fn saxpy_computes_what_it_says<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "saxpy", LaunchOptions::default());
    let (mut request, mut reply) = (vec![0; 4096], vec![0; 4096]);
    for n in [0, 1, 5, 256] {
        let x: Vec<f32> = (0..n).map(|index| index as f32 * 0.5).collect();
        let y: Vec<f32> = (0..n).map(|index| 100.0 - index as f32).collect();
        let length = saxpy_request(3.0, &x, &y, &mut request).unwrap();
        let length = kernel
            .call_bytes(&request[..length], &mut reply, LONG)
            .unwrap();
        let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| 3.0 * x + y).collect();
        assert_eq!(saxpy_reply(&reply[..length]).collect::<Vec<_>>(), expected);
    }
    for bad in [&b""[..], b"12345", &[0; 4], &[0, 0, 0, 0, 9, 0, 0, 0]] {
        match kernel.call_bytes(bad, &mut reply, LONG) {
            Err(CallError::Message(MessageError::Handler(error))) => {
                assert_eq!(error.code, HandlerError::BAD_REQUEST, "{bad:?}");
            }
            other => panic!("{bad:?}: {other:?}"),
        }
    }
}

/// Integers and floats, 64-bit ones, reductions over the threads of blocks of several sizes: to the last bit.
pub fn all_devices_calculate_alike<S: Subject>() {
    let runtime = runtime::<S>();
    let mut seed = 0x9e37_79b9_u32;
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed
    };
    for threads in [1, 8, 32, 100] {
        let options = LaunchOptions {
            message_size: Some(1024),
            queue_capacity: Some(16),
            ..LaunchOptions::default()
        };
        let kernel = runtime.launch("test.numbers", 1, threads, options).unwrap();
        kernel.activate().unwrap();
        for count in [1, 2, 7, 31, 64, 250] {
            let c = f64::from(random()) / 1e5;
            let c = c.to_bits();
            let mut words = vec![random(), random(), random(), c as u32, (c >> 32) as u32];
            // Sums whose last bits depend on their order.
            words.extend((0..count).map(|_| (random() as f32 / 1e3 - 1e6).to_bits()));
            let request: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let mut reply = [0; 56];
            assert_eq!(kernel.call_bytes(&request, &mut reply, LONG), Ok(56));
            let ran = u32::from_ne_bytes(reply[..4].try_into().unwrap());
            assert!(ran > 0 && ran <= 1024);
            assert_eq!(
                reply,
                numbers_of(&words, ran as usize, reply[52] == 1),
                "{count} floats, {ran} threads"
            );
        }
        kernel.terminate().unwrap();
    }
}

pub fn batches_arrive_whole_and_in_order<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        queue_capacity: Some(64),
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "test.add", options);
    let (mut sender, mut receiver) = kernel.split::<Add, Sum>().unwrap();
    assert_eq!(sender.send_batch(&[]), Ok(0));
    let messages: Vec<Add> = (0..1000)
        .map(|left| Add {
            left,
            right: 1,
            negate: false,
        })
        .collect();
    let (mut sent, mut received) = (0, Vec::new());
    while received.len() < messages.len() {
        match sender.send_batch(&messages[sent..]) {
            Ok(count) => {
                assert!(count > 0 || sent == messages.len());
                sent += count;
            }
            Err(error) => assert_eq!(error, TrySendError::Full),
        }
        match receiver.recv_batch(&mut received, 17) {
            Ok(count) => assert!((1..=17).contains(&count)),
            Err(error) => assert_eq!(error, TryRecvError::Empty),
        }
    }
    let expected: Vec<Sum> = (1..=1000).map(|value| Sum { value }).collect();
    assert_eq!(received, expected);
    // A message in the middle that does not fit ends the batch before it.
    let mut batch = sender.batch(8).unwrap();
    batch.stage_bytes(b"one").unwrap();
    assert!(batch.stage_bytes(&[0; 1000]).is_err());
    batch.stage_bytes(b"two").unwrap();
    assert_eq!(batch.commit(), Ok(2));
    let mut errors = 0;
    eventually("both replies", || {
        errors += receiver
            .drain(10, |reply| assert!(reply.error().is_some()))
            .unwrap_or(0);
        errors == 2
    });
    // A batch that is dropped sends nothing.
    sender.batch(8).unwrap().stage_bytes(b"lost").unwrap();
    assert_eq!(kernel.metrics().accepted, 1002);
}

pub fn messages_are_read_and_written_in_place<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    sender.reserve().unwrap().body_mut().fill(1);
    let mut slot = sender.reserve().unwrap();
    assert_eq!(slot.body_mut().len(), 48);
    assert_eq!(slot.body_mut().as_ptr().addr() % 16, 0);
    slot.body_mut()[..5].copy_from_slice(b"place");
    slot.commit(5).unwrap();
    let received = receiver.recv_ref_timeout(LONG).unwrap();
    assert_eq!(received.payload(), b"place");
    assert_eq!(received.payload().as_ptr().addr() % 16, 0);
    received.keep();
    assert_eq!(receiver.try_recv_ref().unwrap().payload(), b"place");
    assert!(receiver.try_recv_ref().is_err());
}

pub fn bad_correlations_are_refused<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let correlated = |correlation| SendOptions {
        correlation,
        ..SendOptions::default()
    };
    let highest = (1 << 31) - 1;
    kernel
        .send_bytes_with(b"", &correlated(highest), LONG)
        .unwrap();
    assert_eq!(
        kernel.send_bytes_with(b"", &correlated(highest + 1), LONG),
        Err(SendTimeoutError::Rejected(Rejection::Correlation {
            correlation: highest + 1
        }))
    );
    let (_sender, mut receiver) = kernel.split_bytes().unwrap();
    let received = receiver.recv_ref_timeout(LONG).unwrap();
    assert_eq!(received.header().correlation(), highest);
}

pub fn state_is_kept_between_messages<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        name: Some("who".into()),
        wait: Some(WaitStrategy::Park),
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "test.count", options.clone());
    let mut reply = [0; 12];
    for expected in 1..=100_u64 {
        kernel.call_bytes(b"", &mut reply, LONG).unwrap();
        assert_eq!(reply[..8], expected.to_ne_bytes());
    }
    kernel.terminate().unwrap();
    // A new launch starts from zero.
    let again = active(&runtime, "test.count", options);
    again.call_bytes(b"", &mut reply, LONG).unwrap();
    assert_eq!(reply[..8], 1_u64.to_ne_bytes());
}

pub fn a_handler_knows_its_surroundings<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = runtime
        .launch(
            "test.context",
            ringkernel::Dim3::x(1),
            ringkernel::Dim3::new(4, 2, 1),
            LaunchOptions {
                name: Some("who".into()),
                message_size: Some(256),
                queue_capacity: Some(4),
                ..LaunchOptions::default()
            },
        )
        .unwrap();
    kernel.activate().unwrap();
    let mut text = [0; 256];
    let length = kernel.call_bytes(b"", &mut text, LONG).unwrap();
    assert_eq!(
        std::str::from_utf8(&text[..length]).unwrap(),
        "who 0 Dim3 { x: 1, y: 1, z: 1 } Dim3 { x: 4, y: 2, z: 1 } 100 0"
    );
}

pub fn an_error_in_a_batch_is_not_lost<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", LaunchOptions::default());
    let (mut sender, mut receiver) = kernel.split::<Add, Sum>().unwrap();
    for left in [1, u64::MAX, 3] {
        let add = Add {
            left,
            right: 1,
            negate: false,
        };
        sender.send(&add).unwrap();
    }
    eventually("three replies", || kernel.metrics().produced == 3);
    let mut sums = Vec::new();
    assert_eq!(receiver.recv_batch(&mut sums, 0), Ok(0));
    assert_eq!(receiver.recv_batch(&mut sums, 10), Ok(1));
    match receiver.recv_batch(&mut sums, 10) {
        Err(TryRecvError::Message(MessageError::Handler(error))) => {
            assert_eq!(error.code, OVERFLOW);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(receiver.recv_batch(&mut sums, 10), Ok(1));
    assert_eq!(sums, [Sum { value: 2 }, Sum { value: 4 }]);
}

pub fn a_message_in_place_is_checked_for_its_type<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let (mut sender, mut receiver) = kernel.split::<Sum, Sum>().unwrap();
    // Sixteen zero bytes would be a valid `Sum`.
    sender.try_send_bytes(&[0; 16]).unwrap();
    let received = receiver.recv_ref_timeout(LONG).unwrap();
    let mismatch = MessageError::TypeMismatch {
        expected: <Sum as ringkernel::RingMessage>::TYPE_ID,
        found: 0,
    };
    assert_eq!(received.decode(), Err(mismatch));
    assert_eq!(received.access().map(|_| ()), Err(mismatch));
    received.keep();
    assert_eq!(receiver.try_recv(), Err(TryRecvError::Message(mismatch)));
    assert_eq!(receiver.try_recv_bytes(&mut [0; 16]), Ok(16));
    assert_eq!(kernel.metrics().dead_letters.replies(), 0);
}
