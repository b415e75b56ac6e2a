//! Rings that two kernels share, and when they do not.

use std::thread;
use std::time::{Duration, Instant};

use ringkernel::{
    ConnectionKind, KernelHandle, KernelRegistration, LaunchOptions, PortableCode,
    RingKernelRuntime, RuntimeConfig, WaitStrategy,
};

use super::kernels::module;
use super::{LONG, Subject, eventually, runtime, runtime_from, small};

/// Messages that the bridge of a kernel's device has moved.
fn carried(runtime: &RingKernelRuntime, kernel: &KernelHandle) -> u64 {
    let bridge = runtime.bridge(kernel.status().device);
    let load = bridge.and_then(|bridge| bridge.load());
    load.map_or(0, |load| load.moved)
}

/// Sends numbers to one kernel, and receives them from another.
fn exchange(first: &KernelHandle, last: &KernelHandle, messages: u32) {
    thread::scope(|scope| {
        scope.spawn(|| {
            for message in 0..messages {
                first.send_bytes(&message.to_ne_bytes()).unwrap();
            }
        });
        for message in 0..messages {
            let mut buffer = [0; 4];
            assert_eq!(last.recv_bytes_timeout(&mut buffer, LONG), Ok(4));
            assert_eq!(u32::from_ne_bytes(buffer), message);
        }
    });
}

pub fn no_host_hop_lies_between_kernels_that_share_a_ring<S: Subject>() {
    const MESSAGES: u32 = 200;
    let runtime = runtime::<S>();
    let [a, b, c, d] =
        ["echo"; 4].map(|id| runtime.launch(id, 1, 1, LaunchOptions::default()).unwrap());
    let connections = [(&a, &b), (&b, &c)].map(|(from, to)| runtime.connect(from, to).unwrap());
    for connection in &connections {
        if S::THREADS {
            assert_ne!(connection.kind(), ConnectionKind::Bridged);
        } else {
            assert_eq!(connection.kind(), ConnectionKind::SharedRing);
        }
    }
    for kernel in [&a, &b, &c, &d] {
        kernel.activate().unwrap();
    }
    exchange(&a, &c, MESSAGES);
    for connection in &connections {
        eventually("the count", || {
            connection.delivered() == u64::from(MESSAGES)
        });
    }
    assert_eq!(carried(&runtime, &a), 0);
    // The same over the bridge, as soon as another kernel joins in: then it carries each of them.
    for kernel in [&a, &b, &c, &d] {
        kernel.deactivate().unwrap();
    }
    let other = runtime.connect(&a, &d).unwrap();
    let kinds = [&connections[0], &connections[1], &other].map(|connection| connection.kind());
    assert_eq!(
        [kinds[0], kinds[2]],
        [ConnectionKind::Bridged, ConnectionKind::Bridged]
    );
    assert_ne!(kinds[1], ConnectionKind::Bridged);
    for kernel in [&a, &b, &c, &d] {
        kernel.activate().unwrap();
    }
    thread::scope(|scope| {
        scope.spawn(|| {
            for message in 0..MESSAGES {
                let mut buffer = [0; 4];
                d.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                assert_eq!(u32::from_ne_bytes(buffer), message);
            }
        });
        exchange(&a, &c, MESSAGES);
    });
    eventually("the count", || carried(&runtime, &a) == u64::from(MESSAGES));
    eventually("the counts", || {
        connections
            .iter()
            .all(|connection| connection.delivered() == u64::from(2 * MESSAGES))
    });
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
    assert_eq!(report.requests.delivered, u64::from(7 * MESSAGES));
}

/// A reply is written as the ring that it goes into demands, not as the kernel's own.
pub fn rings_of_other_sizes_are_shared<S: Subject>() {
    let sizes = |queue_capacity, message_size, extended| LaunchOptions {
        queue_capacity: Some(queue_capacity),
        message_size: Some(message_size),
        extended,
        ..LaunchOptions::default()
    };
    let runtime = runtime::<S>();
    for [from, to] in [
        [sizes(64, 500, false), sizes(4, 48, false)],
        [sizes(4, 48, false), sizes(64, 500, false)],
        [sizes(16, 200, true), sizes(1, 48, false)],
        [sizes(2, 48, false), sizes(32, 200, true)],
    ] {
        let a = runtime.launch("echo", 1, 1, from.clone()).unwrap();
        let b = runtime.launch("echo", 1, 1, to).unwrap();
        let c = runtime.launch("echo", 1, 1, from).unwrap();
        for (from, to) in [(&a, &b), (&b, &c)] {
            let connection = runtime.connect(from, to).unwrap();
            assert_ne!(connection.kind(), ConnectionKind::Bridged);
        }
        for kernel in [&a, &b, &c] {
            kernel.activate().unwrap();
        }
        exchange(&a, &c, 300);
        for kernel in [&a, &b, &c] {
            kernel.terminate().unwrap();
        }
    }
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.requests.delivered, 4 * 3 * 300);
    assert_eq!(report.replies.delivered, 4 * 3 * 300);
}

pub fn kernels_that_cannot_share_a_ring_do_not<S: Subject>() {
    let runtime = runtime::<S>();
    let many = "shared.many";
    runtime
        .register(
            KernelRegistration::new(many)
                .shader(module!("repeat").replies(32))
                .portable(PortableCode::new(include_str!("../kernels/repeat.rk")).replies(32))
                .cpu_handler(|request, context| {
                    for index in 0..request.payload()[0] {
                        context.reply_bytes(&[index])?;
                    }
                    Ok(())
                }),
        )
        .unwrap();
    let wide = LaunchOptions {
        queue_capacity: Some(32),
        ..LaunchOptions::default()
    };
    // Its handler is run when there is room for 32 replies.
    for (capacity, is_shared) in [(32, true), (16, S::THREADS)] {
        let options = LaunchOptions {
            queue_capacity: Some(capacity),
            ..LaunchOptions::default()
        };
        let a = runtime.launch(many, 1, 1, wide.clone()).unwrap();
        let b = runtime.launch("echo", 1, 1, options).unwrap();
        let connection = runtime.connect(&a, &b).unwrap();
        assert_eq!(connection.kind() != ConnectionKind::Bridged, is_shared);
        a.activate().unwrap();
        b.activate().unwrap();
        for _ in 0..5 {
            a.send_bytes(&[100]).unwrap();
            for index in 0..100 {
                let mut buffer = [0];
                assert_eq!(b.recv_bytes_timeout(&mut buffer, LONG), Ok(1));
                assert_eq!(buffer, [index]);
            }
        }
        a.terminate().unwrap();
        b.terminate().unwrap();
    }
    // Grids.
    for blocks in [[1, 2], [2, 1]] {
        let [a, b] = blocks.map(|blocks| runtime.launch("echo", blocks, 1, small()).unwrap());
        let connection = runtime.connect(&a, &b).unwrap();
        assert_eq!(connection.kind(), ConnectionKind::Bridged);
        a.activate().unwrap();
        b.activate().unwrap();
        let mut buffer = [0; 4];
        assert_eq!(a.call_bytes_through(&b, b"grid", &mut buffer, LONG), Ok(4));
        a.terminate().unwrap();
        b.terminate().unwrap();
    }
}

/// Where kernels cannot write into one another's rings, the bridge does it, and says so.
pub fn every_connection_is_carried<S: Subject>() {
    let runtime = runtime::<S>();
    let [a, b] = ["echo"; 2].map(|id| runtime.launch(id, 1, 1, small()).unwrap());
    let connection = runtime.connect(&a, &b).unwrap();
    assert_eq!(connection.kind(), ConnectionKind::Bridged);
    a.activate().unwrap();
    b.activate().unwrap();
    exchange(&a, &b, 100);
    eventually("the count", || carried(&runtime, &a) == 100);
    assert_eq!(connection.delivered(), 100);
}

/// A bridge that sleeps between messages is there for each of them, although a device says nothing of its replies.
pub fn a_bridge_that_sleeps_wakes_for_every_message<S: Subject>() {
    let config = RuntimeConfig {
        bridge_wait: WaitStrategy::Park,
        // Else it looks that often anyhow.
        heartbeat_interval: LONG,
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(S::builder_with(config));
    let kernels = ["echo"; 4].map(|id| runtime.launch(id, 1, 1, small()).unwrap());
    let [other, a, b, c] = &kernels;
    for (from, to) in [(a, b), (b, c), (other, b)] {
        runtime.connect(from, to).unwrap();
    }
    for kernel in &kernels {
        kernel.activate().unwrap();
    }
    for message in 0..20_u32 {
        // Long enough for it to fall asleep.
        thread::sleep(Duration::from_millis(2));
        let begin = Instant::now();
        let mut buffer = [0; 4];
        let length = a.call_bytes_through(c, &message.to_ne_bytes(), &mut buffer, LONG);
        assert_eq!(length, Ok(4));
        assert!(begin.elapsed() < LONG / 2, "{:?}", begin.elapsed());
    }
}
