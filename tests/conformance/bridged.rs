//! Connections that a bridge carries.

use std::thread;
use std::time::Instant;

use ringkernel::error::{
    CallError, MessageError, RecvTimeoutError, TryRecvError, TrySendError, Unavailable,
};
use ringkernel::{
    ClientOptions, Connection, ConnectionKind, Error, KernelHandle, LaunchOptions,
    RingKernelRuntime, SendOptions, WaitStrategy,
};

use super::kernels::{Add, OVERFLOW, Sum};
use super::{LONG, Subject, eventually, runtime, runtime_from, small};

fn launch<const N: usize>(runtime: &RingKernelRuntime, ids: [&str; N]) -> [KernelHandle; N] {
    ids.map(|id| runtime.launch(id, 1, 1, small()).unwrap())
}

fn launch_with<const N: usize>(
    runtime: &RingKernelRuntime,
    options: LaunchOptions,
) -> [KernelHandle; N] {
    [(); N].map(|()| runtime.launch("echo", 1, 1, options.clone()).unwrap())
}

fn connect(
    runtime: &RingKernelRuntime,
    pairs: &[(&KernelHandle, &KernelHandle)],
) -> Vec<Connection> {
    pairs
        .iter()
        .map(|(from, to)| runtime.connect(from, to).unwrap())
        .collect()
}

fn activate(kernels: &[KernelHandle]) {
    for kernel in kernels {
        kernel.activate().unwrap();
    }
}

fn recv(kernel: &KernelHandle) -> Result<u32, RecvTimeoutError> {
    let mut buffer = [0; 48];
    let length = kernel.recv_bytes_timeout(&mut buffer, LONG)?;
    assert_eq!(length, 4);
    Ok(u32::from_ne_bytes(*buffer.first_chunk().unwrap()))
}

fn messages<S: Subject>() -> u32 {
    (S::PING_PONGS / 2500).clamp(50, 400)
}

pub fn every_kernel_behind_gets_every_reply<S: Subject>() {
    let messages = messages::<S>();
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 4]);
    let [a, b, c, d] = &kernels;
    let connections = connect(&runtime, &[(a, b), (a, c), (a, d)]);
    for (connection, to) in connections.iter().zip([b, c, d]) {
        assert_eq!(connection.kind(), ConnectionKind::Bridged);
        assert_eq!((connection.from(), connection.to()), (a.name(), to.name()));
        assert!(connection.is_connected());
    }
    activate(&kernels);
    assert_eq!(
        b.try_send_bytes(b"x"),
        Err(TrySendError::Unavailable(Unavailable::Connected))
    );
    thread::scope(|scope| {
        for kernel in [b, c, d] {
            scope.spawn(move || {
                for message in 0..messages {
                    assert_eq!(recv(kernel), Ok(message));
                }
            });
        }
        for message in 0..messages {
            a.send_bytes_with(&message.to_ne_bytes(), &SendOptions::default(), LONG)
                .unwrap();
        }
    });
    for connection in &connections {
        assert_eq!(connection.delivered(), u64::from(messages));
    }
    drop(connections);
    drop(kernels);
    let report = runtime.complete_shutdown().unwrap();
    let all = u64::from(4 * messages);
    assert_eq!(
        (report.requests.accepted, report.requests.delivered),
        (all, all)
    );
    assert_eq!(report.replies.delivered, all, "{report}");
    assert!(report.requests.adds_up() && report.replies.adds_up());
}

pub fn several_kernels_feed_one<S: Subject>() {
    let messages = messages::<S>();
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 3]);
    let [a, b, c] = &kernels;
    connect(&runtime, &[(a, c), (b, c)]);
    activate(&kernels);
    thread::scope(|scope| {
        for (source, kernel) in [(0, a), (1, b)] {
            scope.spawn(move || {
                for message in 0..messages {
                    let number = source << 31 | message;
                    kernel
                        .send_bytes_with(&number.to_ne_bytes(), &SendOptions::default(), LONG)
                        .unwrap();
                }
            });
        }
        let mut next = [0; 2];
        for _ in 0..2 * messages {
            let number = recv(c).unwrap();
            let source = (number >> 31) as usize;
            assert_eq!(number & 0x7fff_ffff, next[source]);
            next[source] += 1;
        }
        assert_eq!(next, [messages; 2]);
    });
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.requests.delivered, u64::from(4 * messages));
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

pub fn a_diamond_delivers_by_both_ways<S: Subject>() {
    let messages = messages::<S>() / 2;
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 4]);
    let [a, b, c, d] = &kernels;
    connect(&runtime, &[(a, b), (a, c), (b, d), (c, d)]);
    // Nor can anything be led back.
    for (from, to) in [(d, a), (b, a), (d, d)] {
        assert!(matches!(
            runtime.connect(from, to),
            Err(Error::Cycle { .. })
        ));
    }
    assert!(matches!(
        runtime.connect(a, c),
        Err(Error::ConnectedAlready { .. })
    ));
    activate(&kernels);
    thread::scope(|scope| {
        scope.spawn(|| {
            for message in 0..messages {
                a.send_bytes_with(&message.to_ne_bytes(), &SendOptions::default(), LONG)
                    .unwrap();
            }
        });
        let mut seen = vec![0; messages as usize];
        for _ in 0..2 * messages {
            seen[recv(d).unwrap() as usize] += 1;
        }
        assert!(seen.iter().all(|count| *count == 2));
    });
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
    assert_eq!(report.requests.delivered, u64::from(5 * messages));
}

/// Nobody reads at the end: everything fills up, nothing is lost.
pub fn a_full_kernel_behind_holds_the_first_back<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 3]);
    let [a, b, c] = &kernels;
    connect(&runtime, &[(a, b), (a, c)]);
    activate(&kernels);
    let mut sent = 0_u32;
    let mut quiet = 0;
    // Four rings of sixteen at least, however long that takes; then nothing more for a while.
    while sent < 48 || quiet < 100 {
        match a.try_send_bytes(&sent.to_ne_bytes()) {
            Ok(()) => {
                sent += 1;
                quiet = 0;
            }
            Err(TrySendError::Full) => {
                quiet += 1;
                thread::sleep(std::time::Duration::from_micros(200));
            }
            Err(error) => panic!("{error}"),
        }
    }
    // And what is in the handlers' hands.
    assert!(sent <= 80, "{sent}");
    for kernel in [b, c] {
        // The other one is full of them still.
        let mut read = 0;
        while read < sent.min(16) {
            assert_eq!(recv(kernel), Ok(read));
            read += 1;
        }
    }
    thread::scope(|scope| {
        for kernel in [b, c] {
            scope.spawn(move || {
                for message in sent.min(16)..sent {
                    assert_eq!(recv(kernel), Ok(message));
                }
            });
        }
    });
    assert_eq!(runtime.dead_letters().len(), 0);
}

pub fn connections_over_the_bridge_come_and_go<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 3]);
    let [a, b, c] = &kernels;
    for round in 0..5_u32 {
        let connections = connect(&runtime, &[(a, b), (a, c)]);
        activate(&kernels);
        a.send_bytes(&round.to_ne_bytes()).unwrap();
        assert_eq!((recv(b), recv(c)), (Ok(round), Ok(round)));
        assert!(matches!(
            connections[0].disconnect(),
            Err(Error::InvalidTransition { .. })
        ));
        for kernel in &kernels {
            kernel.deactivate().unwrap();
        }
        connections[0].disconnect().unwrap();
        assert!(!connections[0].is_connected() && connections[1].is_connected());
        activate(&kernels);
        a.send_bytes(&round.to_ne_bytes()).unwrap();
        assert_eq!(recv(c), Ok(round));
        b.send_bytes(&7_u32.to_ne_bytes()).unwrap();
        assert_eq!(recv(b), Ok(7));
        for kernel in &kernels {
            kernel.deactivate().unwrap();
        }
        connections[1].disconnect().unwrap();
        activate(&kernels);
        for kernel in &kernels {
            kernel.send_bytes(&round.to_ne_bytes()).unwrap();
            assert_eq!(recv(kernel), Ok(round));
            kernel.deactivate().unwrap();
        }
    }
}

/// When one kernel behind another ends, the rest goes on; when the first ends, the others are as they were before.
pub fn what_ends_leaves_the_rest_of_the_bridge<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 3]);
    let [a, b, c] = &kernels;
    connect(&runtime, &[(a, b), (a, c)]);
    activate(&kernels);
    for message in 0..8_u32 {
        a.send_bytes(&message.to_ne_bytes()).unwrap();
    }
    for message in 0..8 {
        assert_eq!((recv(b), recv(c)), (Ok(message), Ok(message)));
    }
    b.terminate().unwrap();
    for message in 8..16_u32 {
        a.send_bytes(&message.to_ne_bytes()).unwrap();
        assert_eq!(recv(c), Ok(message));
    }
    a.terminate().unwrap();
    eventually("the last kernel's own requests", || {
        c.try_send_bytes(&99_u32.to_ne_bytes()).is_ok()
    });
    assert_eq!(recv(c), Ok(99));
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
    assert_eq!(report.requests.delivered, 16 + 8 + 17);
}

pub fn a_drain_waits_for_what_the_bridge_carries<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo", "test.repeat", "test.repeat"]);
    let [a, b, c] = &kernels;
    connect(&runtime, &[(a, b), (a, c)]);
    activate(&kernels);
    for _ in 0..100 {
        a.send_bytes_with(&[0], &SendOptions::default(), LONG)
            .unwrap();
    }
    let drained = runtime.drain(LONG).unwrap();
    assert!(drained.complete && drained.remaining == 0, "{drained:?}");
    assert_eq!((b.metrics().processed, c.metrics().processed), (100, 100));
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.requests.accepted, report.requests.delivered),
        (300, 300)
    );
    assert_eq!(report.replies.delivered, 100, "{report}");
    assert!(report.requests.adds_up() && report.replies.adds_up());
}

/// A call goes the whole way, and types are translated.
pub fn calls_go_over_the_bridge<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo", "test.add", "echo"]);
    let [a, b, c] = &kernels;
    connect(&runtime, &[(a, b), (a, c)]);
    activate(&kernels);
    // Fewer than make the other one full, whose replies nobody receives.
    for left in 0..16 {
        let add = Add {
            left,
            right: 1,
            negate: true,
        };
        let sum: Sum = a.call_through(b, &add, LONG).unwrap();
        assert_eq!(sum.value, -i128::from(left + 1));
    }
}

/// Rings give way to the bridge when another kernel joins in.
pub fn a_ring_gives_way_to_the_bridge<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 4]);
    let [a, b, c, d] = &kernels;
    let first = runtime.connect(a, b).unwrap();
    assert_ne!(first.kind(), ConnectionKind::Bridged);
    activate(&kernels);
    for message in 0..10_u32 {
        a.send_bytes(&message.to_ne_bytes()).unwrap();
        assert_eq!(recv(b), Ok(message));
    }
    for kernel in &kernels {
        kernel.deactivate().unwrap();
    }
    let second = runtime.connect(a, c).unwrap();
    assert_eq!(
        (first.kind(), second.kind()),
        (ConnectionKind::Bridged, ConnectionKind::Bridged)
    );
    let third = runtime.connect(d, b).unwrap();
    activate(&kernels);
    a.send_bytes(&10_u32.to_ne_bytes()).unwrap();
    assert_eq!((recv(b), recv(c)), (Ok(10), Ok(10)));
    d.send_bytes(&11_u32.to_ne_bytes()).unwrap();
    assert_eq!(recv(b), Ok(11));
    assert_eq!((first.delivered(), second.delivered()), (11, 1));
    assert!(first.is_connected() && third.is_connected());
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

/// From device to device, from grid to grid; handlers' errors reach the end.
pub fn the_bridge_carries_between_devices_and_grids<S: Subject>() {
    let runtime = runtime_from(S::builder().cpu_devices(2));
    let on = |id, device, blocks| {
        let options = LaunchOptions {
            device: Some(device),
            ..small()
        };
        runtime.launch(id, blocks, 1, options).unwrap()
    };
    let kernels = [on("test.add", 0, 2), on("echo", 1, 3)];
    let [a, b] = &kernels;
    let connection = runtime.connect(a, b).unwrap();
    assert_eq!(connection.kind(), ConnectionKind::Bridged);
    activate(&kernels);
    let mut seen = [false; 200];
    thread::scope(|scope| {
        scope.spawn(|| {
            for left in 0..200 {
                let add = Add {
                    left,
                    right: 0,
                    negate: false,
                };
                a.send_timeout(&add, LONG).unwrap();
            }
        });
        for _ in 0..200 {
            let sum: Sum = b.recv_timeout(LONG).unwrap();
            assert!(!std::mem::replace(&mut seen[sum.value as usize], true));
        }
    });
    let overflow = Add {
        left: u64::MAX,
        right: 1,
        negate: false,
    };
    a.send(&overflow).unwrap();
    match b.recv_timeout::<Sum>(LONG) {
        Err(RecvTimeoutError::Message(MessageError::Handler(error))) => {
            assert_eq!(error.code, OVERFLOW);
        }
        other => panic!("{other:?}"),
    }
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

pub fn bridged_kernels_may_be_dropped_in_any_order<S: Subject>() {
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let runtime = runtime::<S>();
        let kernels = launch(&runtime, ["echo"; 3]);
        let [a, b, c] = &kernels;
        let connections = connect(&runtime, &[(a, b), (a, c)]);
        activate(&kernels);
        for message in 0..20_u32 {
            a.send_bytes(&message.to_ne_bytes()).unwrap();
        }
        let mut parts: [Option<Box<dyn std::any::Any>>; 3] = [
            Some(Box::new(runtime)),
            Some(Box::new(kernels)),
            Some(Box::new(connections)),
        ];
        for index in order {
            parts[index] = None;
        }
    }
}

/// A reply that one kernel has and another has no room for waits for that one, whatever the first kernel's other blocks reply meanwhile.
pub fn a_reply_of_a_grid_that_is_held_up_is_given_once<S: Subject>() {
    let runtime = runtime::<S>();
    let a = runtime.launch("echo", 2, 1, small()).unwrap();
    let [b, c] = &launch(&runtime, ["echo"; 2]);
    connect(&runtime, &[(&a, b), (&a, c)]);
    a.activate().unwrap();
    b.activate().unwrap();
    // Key 1 belongs to the second block, 0 to the first.
    let send = |key, message: u32| {
        let options = SendOptions {
            key: Some(key),
            ..SendOptions::default()
        };
        a.send_bytes_with(&message.to_ne_bytes(), &options, LONG)
            .unwrap();
    };
    // The last of them finds no room in `c`.
    for message in 0..17 {
        send(1, message);
        assert_eq!(recv(b), Ok(message));
    }
    send(0, 17);
    eventually("all replies", || a.metrics().produced == 18);
    c.activate().unwrap();
    assert_eq!(recv(b), Ok(17));
    for message in 0..18 {
        assert_eq!(recv(c), Ok(message));
    }
    assert!(runtime.drain(LONG).unwrap().complete);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.requests.delivered, 3 * 18, "{report}");
    assert_eq!(report.replies.delivered, 3 * 18, "{report}");
}

/// A reply that one of several kernels has been given is not received a second time when the connections end, however they do.
pub fn a_reply_that_went_one_way_is_no_callers<S: Subject>() {
    for is_terminated in [false, true] {
        let runtime = runtime::<S>();
        let kernels = launch(&runtime, ["echo"; 3]);
        let [a, b, c] = &kernels;
        let connections = connect(&runtime, &[(a, b), (a, c)]);
        a.activate().unwrap();
        b.activate().unwrap();
        // The last of them finds no room in `c`.
        for message in 0..17_u32 {
            a.send_bytes(&message.to_ne_bytes()).unwrap();
            assert_eq!(recv(b), Ok(message));
        }
        if is_terminated {
            a.terminate().unwrap();
            assert_eq!(
                a.try_recv_bytes(&mut [0; 48]),
                Err(TryRecvError::Unavailable(Unavailable::Terminated))
            );
        } else {
            a.deactivate().unwrap();
            b.deactivate().unwrap();
            for connection in connections {
                connection.disconnect().unwrap();
            }
            a.activate().unwrap();
            a.send_bytes(&17_u32.to_ne_bytes()).unwrap();
            assert_eq!(recv(a), Ok(17));
        }
        let report = runtime.complete_shutdown().unwrap();
        let at_a = if is_terminated { 17 } else { 18 };
        assert_eq!(report.replies.delivered, at_a + 17, "{report}");
        assert_eq!(report.replies.accepted, at_a + 17, "{report}");
    }
}

/// A drain waits for replies that the bridge carries, and for no others that nobody will ever receive.
pub fn a_drain_does_not_wait_for_what_a_client_left<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 3]);
    let [a, b, c] = &kernels;
    a.activate().unwrap();
    let mut client = a
        .client_bytes_with(ClientOptions {
            direct: false,
            ..ClientOptions::default()
        })
        .unwrap();
    client.try_send_bytes(&[0; 4]).unwrap();
    assert_eq!(
        client.recv_bytes_timeout(&mut [0; 2], LONG),
        Err(RecvTimeoutError::Message(MessageError::BufferTooSmall {
            length: 4
        }))
    );
    drop(client);
    a.deactivate().unwrap();
    // The bridge gives the kernel back.
    eventually("the connection", || runtime.connect(a, b).is_ok());
    runtime.connect(a, c).unwrap();
    activate(&kernels);
    for message in 0..8_u32 {
        a.send_bytes(&message.to_ne_bytes()).unwrap();
    }
    let drained = runtime.drain(LONG).unwrap();
    assert!(drained.complete && drained.remaining == 0, "{drained:?}");
    assert_eq!((b.metrics().processed, c.metrics().processed), (8, 8));
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

/// A kernel joins in while the last one that fed the same kernel ends.
pub fn a_kernel_may_join_in_while_the_last_one_ends<S: Subject>() {
    let runtime = runtime::<S>();
    let [first, to] = &launch(&runtime, ["echo"; 2]);
    for round in 0..40_u32 {
        let [last] = &launch(&runtime, ["echo"]);
        let made = connect(&runtime, &[(last, to), (first, to)]);
        made[1].disconnect().unwrap();
        let connection = thread::scope(|scope| {
            scope.spawn(|| last.terminate().unwrap());
            runtime.connect(first, to).unwrap()
        });
        for kernel in [first, to] {
            kernel.activate().unwrap();
        }
        first.send_bytes(&round.to_ne_bytes()).unwrap();
        assert_eq!(recv(to), Ok(round));
        for kernel in [first, to] {
            kernel.deactivate().unwrap();
        }
        connection.disconnect().unwrap();
        assert!(!connection.is_connected());
    }
}

/// A connection that is refused leaves rings as they are.
pub fn a_refused_connection_leaves_rings_alone<S: Subject>() {
    let runtime = runtime::<S>();
    let kernels = launch(&runtime, ["echo"; 6]);
    let [a, b, c, d, e, f] = &kernels;
    let rings = connect(&runtime, &[(a, b), (e, f)]);
    let kinds = || [0, 1].map(|ring: usize| rings[ring].kind());
    let before = kinds();
    assert_ne!(before[0], ConnectionKind::Bridged);
    // Replies that nobody has received, sides that are split off, and a kernel at the other end that works.
    c.activate().unwrap();
    c.send_bytes(&1_u32.to_ne_bytes()).unwrap();
    eventually("the reply", || c.metrics().produced == 1);
    c.deactivate().unwrap();
    let endpoints = d.split_bytes().unwrap();
    for (from, to) in [(c, b), (d, b), (a, d)] {
        assert!(matches!(
            runtime.connect(from, to),
            Err(Error::EndpointsBusy { .. })
        ));
        assert_eq!(kinds(), before);
    }
    e.activate().unwrap();
    for (from, to) in [(a, f), (d, f)] {
        assert!(matches!(
            runtime.connect(from, to),
            Err(Error::InvalidTransition { .. })
        ));
        assert_eq!(kinds(), before);
    }
    e.deactivate().unwrap();
    assert!(rings.iter().all(Connection::is_connected));
    drop(endpoints);
    // Both rings give way at once.
    let between = runtime.connect(a, f).unwrap();
    assert_eq!(between.kind(), ConnectionKind::Bridged);
    assert_eq!(kinds(), [ConnectionKind::Bridged; 2]);
    for kernel in [a, b, e, f] {
        kernel.activate().unwrap();
    }
    a.send_bytes(&2_u32.to_ne_bytes()).unwrap();
    assert_eq!((recv(b), recv(f)), (Ok(2), Ok(2)));
    e.send_bytes(&3_u32.to_ne_bytes()).unwrap();
    assert_eq!(recv(f), Ok(3));
    assert_eq!(recv(c), Ok(1));
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

/// Twenty-six diamonds in a row have 2^26 ways from end to end; each kernel is looked at once.
pub fn many_ways_take_no_time<S: Subject>() {
    const DIAMONDS: usize = 26;
    let runtime = runtime::<S>();
    let options = || LaunchOptions {
        wait: Some(WaitStrategy::Park),
        ..small()
    };
    let begin = Instant::now();
    let [mut first] = launch_with(&runtime, options());
    let last = first.clone();
    for _ in 0..DIAMONDS {
        let [top, left, right] = launch_with(&runtime, options());
        let edges = [
            (&left, &first),
            (&right, &first),
            (&top, &left),
            (&top, &right),
        ];
        connect(&runtime, &edges);
        first = top;
    }
    let [stranger] = launch_with(&runtime, options());
    assert!(matches!(
        runtime.connect(&last, &first),
        Err(Error::Cycle { .. })
    ));
    stranger.activate().unwrap();
    last.activate().unwrap();
    let mut buffer = [0; 4];
    assert!(matches!(
        stranger.call_bytes_through(&last, &[0; 4], &mut buffer, LONG),
        Err(CallError::Unavailable(Unavailable::NotConnected))
    ));
    assert!(runtime.drain(LONG).unwrap().complete);
    runtime.complete_shutdown().unwrap();
    assert!(begin.elapsed() < LONG, "{:?}", begin.elapsed());
}
