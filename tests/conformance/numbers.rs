//! Numbers: what is configured is honoured, what is counted is true, what is taken is given back.

use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::{RecvTimeoutError, SendTimeoutError};
use ringkernel::{LaunchOptions, RingKernelRuntime, RuntimeConfig, WaitStrategy};

use super::kernels::{GATE_OPEN, Opened};
use super::{LONG, Subject, active, eventually, runtime, runtime_from, small};

/// Threads and open files of this process.
#[cfg(target_os = "linux")]
fn process_resources() -> (usize, usize) {
    let count = |path| std::fs::read_dir(path).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

#[cfg(not(target_os = "linux"))]
fn process_resources() -> (usize, usize) {
    (0, 0)
}

pub fn many_launches_leave_nothing_behind<S: Subject>() {
    let runtime = runtime::<S>();
    let mut reply = [0; 8];
    let mut cycle = |runtime: &RingKernelRuntime| {
        let kernel = active(runtime, "echo", small());
        kernel.call_bytes(b"x", &mut reply, LONG).unwrap();
        kernel.terminate().unwrap();
    };
    cycle(&runtime);
    assert_eq!(runtime.kernels().len(), 0);
    let (resources, memory) = (process_resources(), runtime.memory_in_use(0).unwrap());
    assert_eq!(memory, 0);
    for _ in 0..1000 {
        cycle(&runtime);
    }
    assert_eq!(runtime.kernels().len(), 0);
    assert_eq!(runtime.memory_in_use(0).unwrap(), 0);
    // What an earlier test left behind may have ended meanwhile, and threads of others come and go.
    eventually("the end of what the launches took", || {
        let (threads, files) = process_resources();
        threads <= resources.0 && files <= resources.1
    });
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.kernels, 1001);
    assert_eq!(report.requests.delivered, 1001);
    assert_eq!(report.replies.delivered, 1001);
}

pub fn telemetry_equals_ground_truth<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = runtime
        .launch(
            "test.panic",
            2,
            1,
            LaunchOptions {
                message_size: Some(100),
                ..LaunchOptions::default()
            },
        )
        .unwrap();
    kernel.activate().unwrap();
    let mut bytes = 0;
    for length in 0..500_u64 {
        let payload = vec![1; length as usize % 100];
        bytes += payload.len() as u64;
        kernel.send_bytes(&payload).unwrap();
    }
    for _ in 0..500 {
        kernel.recv_bytes_timeout(&mut [0; 128], LONG).unwrap();
    }
    eventually("the written counters", || {
        kernel.metrics().telemetry.unwrap().received == 500
    });
    let metrics = kernel.metrics();
    let telemetry = metrics.telemetry.unwrap();
    assert_eq!((metrics.accepted, metrics.processed), (500, 500));
    assert_eq!((metrics.produced, metrics.received_replies), (500, 500));
    assert_eq!((metrics.queue_depth, metrics.dropped), (0, 0));
    assert_eq!((telemetry.replied, telemetry.errors), (500, 0));
    assert_eq!((telemetry.bytes_in, telemetry.bytes_out), (bytes, bytes));
    assert_eq!(telemetry.handler_count, 500);
    let mean = telemetry.handler_mean();
    assert!(telemetry.handler_min <= mean && mean <= telemetry.handler_max);
    assert_eq!(metrics.blocks, 2);
    // Handler times are what the handler takes.
    let slow = active(&runtime, "test.sleep", small());
    slow.call_bytes(&[10], &mut [0; 8], LONG).unwrap();
    eventually("the written counters", || {
        slow.metrics().telemetry.unwrap().received == 1
    });
    let telemetry = slow.metrics().telemetry.unwrap();
    assert!(telemetry.handler_min >= Duration::from_micros(9_900));
    assert_eq!(telemetry.handler_min, telemetry.handler_max);
    // Reading never disturbs: counters go on to be exact while they are being read.
    let sink = active(&runtime, "sink", LaunchOptions::default());
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for _ in 0..100_000 {
                sink.send_bytes(b"12345678").unwrap();
            }
        });
        while !sender.is_finished() {
            let metrics = sink.metrics();
            assert!(metrics.processed <= metrics.accepted);
        }
    });
    eventually("all messages", || {
        sink.metrics().telemetry.unwrap().received == 100_000
    });
    assert_eq!(sink.metrics().telemetry.unwrap().bytes_in, 800_000);
    assert_eq!(sink.metrics().produced, 0);
}

pub fn metrics_show_signs_of_life<S: Subject>() {
    let config = RuntimeConfig {
        heartbeat_interval: Duration::from_millis(5),
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(S::builder_with(config));
    for wait in [WaitStrategy::Spin, WaitStrategy::Park] {
        let options = LaunchOptions {
            wait: Some(wait),
            ..small()
        };
        let kernel = active(&runtime, "test.sleep", options);
        assert_eq!(kernel.metrics().spins, wait == WaitStrategy::Spin);
        let beats = kernel.metrics().heartbeats;
        eventually("heartbeats", || kernel.metrics().heartbeats > beats + 10);
        // An idle kernel is alive, one that is inside its handler shows nothing.
        let idle = kernel.metrics().heartbeat_age.unwrap();
        kernel.send_bytes(&[200]).unwrap();
        thread::sleep(Duration::from_millis(100));
        let busy = kernel.metrics().heartbeat_age.unwrap();
        assert!(busy > idle, "{busy:?} in the handler, {idle:?} before");
        kernel.recv_bytes_timeout(&mut [0; 8], LONG).unwrap();
        kernel.terminate().unwrap();
    }
}

pub fn configured_numbers_are_honoured<S: Subject>() {
    let base = RuntimeConfig::default;
    // Capacity and message size.
    let config = RuntimeConfig {
        default_queue_capacity: 8,
        default_message_size: 100,
        ..base()
    };
    let runtime = runtime_from(S::builder_with(config));
    let kernel = active(&runtime, "test.gated", LaunchOptions::default());
    {
        let (mut sender, _receiver) = kernel.split_bytes().unwrap();
        assert_eq!(sender.reserve().unwrap().body_mut().len(), 112);
        assert_eq!(sender.batch(100).unwrap().room(), 8);
    }
    // Telemetry.
    assert!(kernel.metrics().telemetry.is_some());
    let config = RuntimeConfig {
        enable_telemetry: false,
        ..base()
    };
    let quiet = runtime_from(S::builder_with(config));
    let kernel = active(&quiet, "echo", small());
    kernel.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
    let metrics = kernel.metrics();
    assert_eq!((metrics.telemetry, metrics.heartbeat_age), (None, None));
    assert_eq!((metrics.processed, metrics.received_replies), (1, 1));
    // Timeouts of `send`, `recv` and `terminate`.
    let config = RuntimeConfig {
        default_timeout: Duration::from_millis(30),
        ..base()
    };
    let hasty = runtime_from(S::builder_with(config));
    let kernel = active(&hasty, "test.gated", small());
    let begin = Instant::now();
    assert_eq!(
        kernel.recv::<super::kernels::Sum>(),
        Err(RecvTimeoutError::Timeout)
    );
    while kernel.try_send_bytes(b"x").is_ok() {}
    assert_eq!(kernel.send_bytes(b"x"), Err(SendTimeoutError::Timeout));
    assert!(begin.elapsed() >= Duration::from_millis(59));
    assert!(
        begin.elapsed() < Duration::from_secs(4),
        "the default is 5 s"
    );
    let open = Opened::new(&GATE_OPEN);
    drop(hasty);
    drop(open);
    // How often a polling thread looks.
    let beats_in_100_ms = |interval| {
        let config = RuntimeConfig {
            bridge_poll_interval: interval,
            kernel_wait: WaitStrategy::Spin,
            ..base()
        };
        let runtime = runtime_from(S::builder_with(config));
        let kernel = active(&runtime, "echo", small());
        let before = kernel.metrics().heartbeats;
        thread::sleep(Duration::from_millis(100));
        let beats = kernel.metrics().heartbeats - before;
        kernel.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
        beats
    };
    let (spinning, polling) = (
        beats_in_100_ms(Duration::ZERO),
        beats_in_100_ms(Duration::from_millis(10)),
    );
    assert!(
        polling <= 40 && spinning > 10 * polling,
        "{spinning}, {polling}"
    );
    // Wait strategies.
    for (preset, spins) in [
        (RuntimeConfig::development(), false),
        (RuntimeConfig::high_performance(), true),
    ] {
        let runtime = runtime_from(S::builder_with(preset));
        assert_eq!(active(&runtime, "echo", small()).metrics().spins, spins);
    }
    // Reserved cores.
    let cores = ringkernel::thread::affinity::usable_cores();
    if let [first, .., last] = cores[..] {
        for (reserved, expected) in [(first, last), (last, first)] {
            let config = RuntimeConfig {
                reserved_cores: cores
                    .iter()
                    .copied()
                    .filter(|core| *core != expected)
                    .collect(),
                kernel_wait: WaitStrategy::Spin,
                ..base()
            };
            let runtime = runtime_from(S::builder_with(config));
            let kernel = active(&runtime, "echo", small());
            assert_eq!(kernel.metrics().cores, [expected], "{reserved} is reserved");
        }
    }
}

pub fn a_default_echo_takes_little_memory<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    let (claimed, used) = (
        kernel.metrics().memory_bytes,
        runtime.memory_in_use(0).unwrap(),
    );
    assert!(used < S::ECHO_BYTES, "{used} bytes");
    assert!(claimed < S::ECHO_BYTES, "{claimed} bytes");
    // Two rings of 4096 lines, at least.
    assert!(used >= 2 * 4096 * 64 && claimed >= 2 * 4096 * 64);
}

pub fn several_devices_are_told_apart<S: Subject>() {
    let runtime = runtime_from(S::builder().cpu_devices(3).device(1));
    let devices = runtime.devices();
    let described: Vec<_> = devices.iter().map(|device| device.index).collect();
    assert_eq!(described, [0, 1, 2]);
    let kernel = active(&runtime, "echo", small());
    assert_eq!(kernel.status().device, 1);
    let other = active(
        &runtime,
        "echo",
        LaunchOptions {
            device: Some(2),
            ..small()
        },
    );
    assert_eq!(other.status().device, 2);
    assert_eq!(runtime.memory_in_use(0).unwrap(), 0);
    assert!(runtime.memory_in_use(1).unwrap() > 0);
    assert!(runtime.memory_in_use(3).is_err());
    assert_eq!(runtime.kernels().len(), 2);
    assert!(runtime.kernel(other.name()).is_some());
    assert!(runtime.kernel("nobody").is_none());
}
