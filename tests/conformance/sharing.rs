//! Several threads, several blocks, several kernels.

use std::collections::HashSet;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use ringkernel::error::{
    CallError, MessageError, RecvTimeoutError, SendTimeoutError, TryRecvError, Unavailable,
};
use ringkernel::{Error, KernelHandle, LaunchOptions, SendOptions, WaitStrategy};

use super::kernels::{Add, GATE_OPEN, Opened, Sum};
use super::{LONG, Subject, active, eventually, runtime};

pub fn cloned_handles_lose_and_double_nothing<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        queue_capacity: Some(64),
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "echo", options);
    let (threads, each) = (4_u64, 5000_u64);
    let received = Mutex::new(HashSet::new());
    thread::scope(|scope| {
        for thread in 0..threads {
            let sender = kernel.clone();
            scope.spawn(move || {
                for number in 0..each {
                    let message = (thread * each + number).to_ne_bytes();
                    sender
                        .send_bytes_with(&message, &SendOptions::default(), LONG)
                        .unwrap();
                }
            });
            let (receiver, received) = (kernel.clone(), &received);
            scope.spawn(move || {
                let mut buffer = [0; 8];
                for _ in 0..each {
                    receiver.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                    let number = u64::from_ne_bytes(buffer);
                    assert!(received.lock().unwrap().insert(number), "{number} twice");
                }
            });
        }
    });
    assert_eq!(received.lock().unwrap().len() as u64, threads * each);
    assert_eq!(kernel.try_recv_bytes(&mut [0; 8]), Err(TryRecvError::Empty));
}

pub fn calls_from_many_threads_never_mix<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = runtime
        .launch("test.add", 2, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    thread::scope(|scope| {
        for thread in 0..6_u64 {
            let kernel = kernel.clone();
            scope.spawn(move || {
                for number in 0..3000_u64 {
                    let add = Add {
                        left: thread << 32,
                        right: number,
                        negate: number % 2 == 1,
                    };
                    let sum: Sum = kernel.call(&add, LONG).unwrap();
                    let value = i128::from((thread << 32) + number);
                    let expected = if add.negate { -value } else { value };
                    assert_eq!(sum.value, expected);
                }
            });
        }
    });
    let metrics = kernel.metrics();
    assert_eq!(
        (metrics.accepted, metrics.received_replies),
        (18_000, 18_000)
    );
    assert_eq!(metrics.dead_letters.replies(), 0);
}

pub fn a_late_reply_becomes_a_dead_letter<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.gated", LaunchOptions::default());
    let mut reply = [0; 8];
    for _ in 0..3 {
        assert_eq!(
            kernel.call_bytes(b"late", &mut reply, Duration::from_millis(5)),
            Err(CallError::Timeout)
        );
    }
    let open = Opened::new(&GATE_OPEN);
    // The next call meets the three late replies on its way, and gets its own.
    let length = kernel.call_bytes(b"mine", &mut reply, LONG).unwrap();
    assert_eq!(&reply[..length], b"mine");
    assert_eq!(kernel.metrics().dead_letters.late_replies, 3);
    assert_eq!(kernel.try_recv_bytes(&mut reply), Err(TryRecvError::Empty));
    drop(open);
    // Nothing is left behind that would refuse a split.
    drop(kernel.split_bytes().unwrap());
}

pub fn calls_beyond_the_limit_are_refused<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        max_pending_calls: 2,
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "test.gated", options);
    thread::scope(|scope| {
        let call = |payload: &'static [u8]| {
            let kernel = kernel.clone();
            move || {
                let mut reply = [0; 8];
                let length = kernel.call_bytes(payload, &mut reply, LONG).unwrap();
                assert_eq!(&reply[..length], payload);
            }
        };
        scope.spawn(call(b"one"));
        scope.spawn(call(b"two"));
        eventually("two pending calls", || kernel.metrics().accepted == 2);
        assert_eq!(
            kernel.call_bytes(b"three", &mut [0; 8], LONG),
            Err(CallError::TooManyCalls)
        );
        let error = kernel.split_bytes().unwrap_err();
        assert!(matches!(error, Error::EndpointsBusy { .. }), "{error}");
        let _open = Opened::new(&GATE_OPEN);
        // Both threads end before the gate closes: `scope` would wait for them only later.
        eventually("both replies", || kernel.metrics().received_replies == 2);
    });
    assert_eq!(kernel.metrics().accepted, 2);
}

pub fn replies_put_aside_by_calls_can_be_received<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    for number in 0..10_u8 {
        kernel.send_bytes(&[number]).unwrap();
    }
    let mut reply = [0; 8];
    assert_eq!(kernel.call_bytes(b"called", &mut reply, LONG), Ok(6));
    assert_eq!(&reply[..6], b"called");
    let error = kernel.split_bytes().unwrap_err();
    assert!(matches!(error, Error::EndpointsBusy { .. }), "{error}");
    kernel.send_bytes(&[10]).unwrap();
    for number in 0..=10 {
        assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(1));
        assert_eq!(reply[0], number, "in the order in which they were sent");
    }
    drop(kernel.split_bytes().unwrap());
}

pub fn an_inbox_that_nobody_empties_overflows_into_the_dead_letters<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        queue_capacity: Some(4),
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "echo", options);
    let mut reply = [0; 8];
    for number in 0..6_u8 {
        kernel.send_bytes(&[number]).unwrap();
        kernel.call_bytes(b"c", &mut reply, LONG).unwrap();
    }
    assert_eq!(kernel.metrics().dead_letters.inbox_full, 2);
    for number in 0..4 {
        assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(1));
        assert_eq!(reply[0], number);
    }
    assert_eq!(kernel.try_recv_bytes(&mut reply), Err(TryRecvError::Empty));
}

pub fn split_is_exclusive_and_gives_back<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let mut reply = [0; 8];
    let (sender, receiver) = kernel.split_bytes().unwrap();
    let busy = |error: Error| assert!(matches!(error, Error::EndpointsBusy { .. }), "{error}");
    busy(kernel.split_bytes().unwrap_err());
    assert_eq!(
        kernel.send_bytes(b"x"),
        Err(SendTimeoutError::Unavailable(Unavailable::Split))
    );
    assert_eq!(
        kernel.recv_bytes_timeout(&mut reply, LONG),
        Err(RecvTimeoutError::Unavailable(Unavailable::Split))
    );
    assert_eq!(
        kernel.call_bytes(b"x", &mut reply, LONG),
        Err(CallError::Unavailable(Unavailable::Split))
    );
    drop(sender);
    // One is back, the other is not.
    kernel.send_bytes(b"one").unwrap();
    busy(kernel.split_bytes().unwrap_err());
    drop(receiver);
    assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(3));
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    // Endpoints work from other threads, and outlive the handle.
    drop(kernel);
    thread::scope(|scope| {
        scope.spawn(move || {
            for number in 0..1000_u32 {
                sender
                    .send_bytes_timeout(&number.to_ne_bytes(), LONG)
                    .unwrap();
            }
        });
        scope.spawn(move || {
            let mut reply = [0; 4];
            for number in 0..1000_u32 {
                receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
                assert_eq!(u32::from_ne_bytes(reply), number);
            }
        });
    });
}

pub fn a_grid_spreads_messages_and_keeps_keys_together<S: Subject>() {
    let runtime = runtime::<S>();
    let grid = 4_u32;
    let kernel = runtime
        .launch("test.count", grid, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    let mut reply = [0; 12];
    let block = |reply: &[u8; 12]| u32::from_ne_bytes(*reply[8..].first_chunk().unwrap());
    for _ in 0..400 {
        kernel.send_bytes(b"").unwrap();
    }
    let mut hits = vec![0; grid as usize];
    for _ in 0..400 {
        kernel.recv_bytes_timeout(&mut reply, LONG).unwrap();
        hits[block(&reply) as usize] += 1;
    }
    assert_eq!(hits, [100; 4], "round-robin");
    let mut used = HashSet::new();
    for key in 0..32 {
        let keyed = SendOptions {
            key: Some(key),
            ..SendOptions::default()
        };
        let mut blocks = HashSet::new();
        for _ in 0..3 {
            kernel.send_bytes_with(b"", &keyed, LONG).unwrap();
            kernel.recv_bytes_timeout(&mut reply, LONG).unwrap();
            blocks.insert(block(&reply));
        }
        assert_eq!(blocks.len(), 1, "key {key} went to several blocks");
        used.extend(blocks);
    }
    assert!(used.len() > 1, "all keys went to one block");
    eventually("the counts of all messages", || {
        kernel.metrics().processed == 400 + 3 * 32
    });
}

fn ping_pong(kernel: &KernelHandle, messages: u32) {
    let mut reply = [0; 4];
    for number in 0..messages {
        kernel
            .call_bytes(&number.to_ne_bytes(), &mut reply, LONG)
            .unwrap();
        assert_eq!(u32::from_ne_bytes(reply), number);
    }
}

pub fn every_wait_strategy_delivers<S: Subject>() {
    let runtime = runtime::<S>();
    let strategies = [
        WaitStrategy::Spin,
        WaitStrategy::SpinYield,
        WaitStrategy::Park,
        WaitStrategy::Auto,
    ];
    for wait in strategies {
        for host_wait in strategies {
            let options = LaunchOptions {
                wait: Some(wait),
                host_wait: Some(host_wait),
                ..LaunchOptions::default()
            };
            let kernel = active(&runtime, "echo", options);
            ping_pong(&kernel, 200);
            // Long enough for whoever sleeps to be asleep.
            thread::sleep(Duration::from_millis(5));
            ping_pong(&kernel, 200);
            kernel.terminate().unwrap();
        }
    }
}

pub fn auto_starves_nobody<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels: Vec<KernelHandle> = (0..6)
        .map(|_| active(&runtime, "echo", LaunchOptions::default()))
        .collect();
    // No more kernels spin than there are cores beside the callers'.
    let spinning = kernels
        .iter()
        .filter(|kernel| kernel.metrics().spins)
        .count();
    let cores = ringkernel::thread::affinity::usable_cores().len();
    assert!(spinning < cores.max(2), "{spinning} spin on {cores} cores");
    // All of them, with a caller each, get their work done side by side.
    thread::scope(|scope| {
        for kernel in &kernels {
            scope.spawn(|| ping_pong(kernel, 2000));
        }
    });
    for kernel in &kernels {
        assert_eq!(kernel.metrics().received_replies, 2000);
    }
}

pub fn received_messages_make_room_in_the_inbox<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        queue_capacity: Some(16),
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "echo", options);
    let mut reply = [0; 8];
    let put_aside = |number: u8| {
        kernel.send_bytes(&[number]).unwrap();
        kernel.call_bytes(b"c", &mut [0; 8], LONG).unwrap();
    };
    put_aside(0);
    assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(1));
    for number in 1..=16 {
        put_aside(number);
    }
    assert_eq!(kernel.metrics().dead_letters.inbox_full, 0);
    for number in 1..=16 {
        assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(1));
        assert_eq!(reply[0], number);
    }
}

pub fn a_message_that_stays_is_found_again_on_a_grid<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = runtime
        .launch("echo", 2, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    kernel.send_bytes(&[1; 8]).unwrap();
    kernel.send_bytes(&[2]).unwrap();
    eventually("both replies", || kernel.metrics().produced == 2);
    let too_small = RecvTimeoutError::Message(MessageError::BufferTooSmall { length: 8 });
    for _ in 0..3 {
        assert_eq!(kernel.recv_bytes_timeout(&mut [0; 4], LONG), Err(too_small));
    }
    let mut reply = [0; 8];
    assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(8));
    assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(1));
}

pub fn split_is_refused_while_another_thread_waits<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    thread::scope(|scope| {
        let receiver = scope.spawn(|| kernel.recv_bytes_timeout(&mut [0; 8], LONG));
        thread::sleep(Duration::from_millis(20));
        let error = kernel.split_bytes().unwrap_err();
        assert!(matches!(error, Error::EndpointsBusy { .. }), "{error}");
        kernel.send_bytes(b"wake").unwrap();
        assert_eq!(receiver.join().unwrap(), Ok(4));
    });
    let (sender, receiver) = kernel.split_bytes().unwrap();
    drop(sender);
    // Nobody could fetch the reply: the request is not even sent.
    assert_eq!(
        kernel.call_bytes(b"x", &mut [0; 8], LONG),
        Err(CallError::Unavailable(Unavailable::Split))
    );
    assert_eq!(kernel.metrics().accepted, 1);
    drop(receiver);
    assert_eq!(kernel.call_bytes(b"x", &mut [0; 8], LONG), Ok(1));
}

pub fn a_receive_of_no_time_succeeds_beside_a_busy_caller<S: Subject>() {
    let runtime = runtime::<S>();
    let options = LaunchOptions {
        host_wait: Some(WaitStrategy::SpinYield),
        ..LaunchOptions::default()
    };
    let kernel = active(&runtime, "test.gated", options);
    thread::scope(|scope| {
        let open = Opened::new(&GATE_OPEN);
        for _ in 0..200 {
            kernel.send_bytes(b"x").unwrap();
        }
        eventually("all replies", || kernel.metrics().produced == 200);
        drop(open);
        // Looks at the rings all the time, and puts every reply aside.
        let caller = scope.spawn(|| kernel.call_bytes(b"c", &mut [0; 8], LONG));
        eventually("the call", || kernel.metrics().accepted == 201);
        for _ in 0..200 {
            assert_eq!(
                kernel.recv_bytes_timeout(&mut [0; 8], Duration::ZERO),
                Ok(1)
            );
        }
        let open = Opened::new(&GATE_OPEN);
        assert_eq!(caller.join().unwrap(), Ok(1));
        drop(open);
    });
}
