//! What only the Vulkan backend has: devices and their choice, shaders and their checks, faults, sharing, endings.

#![cfg(feature = "vulkan")]

// Some of the suite is for other backends.
#[allow(dead_code)]
mod conformance;
#[path = "support/vulkan.rs"]
mod vulkan;

use std::num::NonZeroU32;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use conformance::{LONG, active, eventually, one_at_a_time, runtime_from, small};
use ringkernel::backend::{DeviceKind, ExecutionMode};
use ringkernel::error::{
    CallError, RecvTimeoutError, SendTimeoutError, TryRecvError, TrySendError, Unavailable,
};
use ringkernel::kernel::FailureReason;
use ringkernel::time::now_ns_ordered;
use ringkernel::{
    BackendType, ConnectionKind, Error, KernelHandle, KernelRegistration, KernelState,
    LaunchOptions, MessageTrace, RingKernelRuntime, RuntimeConfig, SendOptions, ShaderCode,
    VulkanConfig, VulkanMode, WaitStrategy,
};

/// Holds the tests apart, and looks for validation messages at the end of each.
struct Turn {
    _one: MutexGuard<'static, ()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            vulkan::expect_no_validation_message();
        }
    }
}

/// `None`, and the reason printed, where there is no Vulkan.
fn turn() -> Option<Turn> {
    let one = one_at_a_time();
    if let Some(reason) = vulkan::missing() {
        println!("skipped: {reason}");
        return None;
    }
    Some(Turn { _one: one })
}

const MODES: [VulkanMode; 3] = [
    VulkanMode::Resident,
    VulkanMode::Exchange,
    VulkanMode::Staged,
];

fn runtime(mode: VulkanMode) -> RingKernelRuntime {
    runtime_from(vulkan::builder(mode, RuntimeConfig::default()))
}

fn is_software(runtime: &RingKernelRuntime) -> bool {
    runtime.devices()[runtime.default_device()].kind == DeviceKind::SoftwareGpu
}

#[test]
fn a_missing_loader_is_an_error_with_its_reason() {
    let config = RuntimeConfig {
        vulkan: VulkanConfig {
            loader: Some("/nonexistent/libvulkan.so".into()),
            ..VulkanConfig::default()
        },
        ..RuntimeConfig::default()
    };
    let build = |backend| {
        let builder = RingKernelRuntime::builder().config(config.clone());
        match backend {
            Some(backend) => builder.backend(backend).build(),
            None => builder.build(),
        }
    };
    match build(Some(BackendType::Vulkan)) {
        Err(Error::BackendUnavailable { backend, reason }) => {
            assert_eq!(backend, "vulkan");
            assert!(reason.contains("no Vulkan loader"), "{reason}");
            assert!(reason.contains("/nonexistent/libvulkan.so"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    // An automatic choice goes on to the next backend.
    assert_eq!(build(None).unwrap().backend(), BackendType::Cpu);
}

#[test]
fn devices_are_described() {
    let Some(_turn) = turn() else { return };
    let runtime = runtime(VulkanMode::Auto);
    let devices = runtime.devices();
    let info = &devices[runtime.default_device()];
    assert_eq!(info.backend, BackendType::Vulkan);
    assert!(!info.name.is_empty() && info.memory_limit > 0);
    let vulkan = info.vulkan.as_ref().unwrap();
    assert!(!vulkan.driver.is_empty());
    assert!(vulkan.api_version >= (1, 1, 0));
    assert!(vulkan.heaps.iter().any(|heap| heap.bytes > 0));
    assert!(vulkan.queue_families.iter().any(|family| family.compute));
    assert!(vulkan.max_block_threads >= 128 && vulkan.max_blocks >= 65_535);
    assert!(vulkan.max_buffer_bytes >= 1 << 27);
    println!("{info:#?}");
    // What the probe saw, and where the memory lies.
    assert_eq!(
        vulkan.mode,
        ExecutionMode::Resident,
        "{}",
        vulkan.mode_reason
    );
    assert!(
        // On a busy machine it need not have waited for all 512.
        vulkan.mode_reason.starts_with("the probe saw "),
        "{}",
        vulkan.mode_reason
    );
    let placement = |purpose| {
        *vulkan
            .placements
            .iter()
            .find(|placement| placement.purpose == purpose)
            .unwrap()
    };
    assert!(placement("host-to-device").host_visible);
    assert!(placement("device-to-host").host_cached);
    assert!(placement("state").device_local);
}

#[test]
fn modes_can_be_forced_and_say_so() {
    let Some(_turn) = turn() else { return };
    for (mode, expected) in MODES.into_iter().zip([
        ExecutionMode::Resident,
        ExecutionMode::Exchange,
        ExecutionMode::Staged,
    ]) {
        let runtime = runtime(mode);
        let info = &runtime.devices()[runtime.default_device()];
        let vulkan = info.vulkan.as_ref().unwrap();
        assert_eq!(
            (vulkan.mode, vulkan.mode_reason.as_str()),
            (expected, "forced")
        );
    }
}

#[test]
fn devices_are_chosen_by_index_and_by_name() {
    let Some(_turn) = turn() else { return };
    let builder = || RingKernelRuntime::builder().backend(BackendType::Vulkan);
    let by_index = builder().device(0).build().unwrap();
    let name = by_index.devices()[0].name.clone();
    let part = name[..name.len() / 2].to_uppercase();
    let by_name = builder().device_name(part).build().unwrap();
    assert_eq!(by_name.devices()[by_name.default_device()].name, name);
    match builder().device_name("no such device").build() {
        Err(Error::DeviceNotNamed {
            name: asked,
            available,
            ..
        }) => {
            assert_eq!(asked, "no such device");
            assert!(available.contains(&name), "{available:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        builder().device(99).build(),
        Err(Error::DeviceNotFound { index: 99, .. })
    ));
}

#[test]
fn software_is_used_only_when_asked_for() {
    let Some(_turn) = turn() else { return };
    if std::env::var_os("RINGKERNEL_VULKAN_DEVICE").is_some() {
        println!("skipped: RINGKERNEL_VULKAN_DEVICE asks for a device");
        return;
    }
    let kinds: Vec<DeviceKind> = runtime(VulkanMode::Exchange)
        .devices()
        .iter()
        .map(|info| info.kind)
        .collect();
    let best = RingKernelRuntime::builder().build().unwrap();
    let explicit = RingKernelRuntime::builder()
        .backend(BackendType::Vulkan)
        .build();
    if kinds.iter().all(|kind| *kind == DeviceKind::SoftwareGpu) {
        assert_eq!(best.backend(), BackendType::Cpu);
        match explicit {
            Err(Error::BackendUnavailable { reason, .. }) => {
                assert!(reason.contains("must be asked for"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    } else {
        assert_eq!(best.backend(), BackendType::Vulkan);
        assert!(!is_software(&explicit.unwrap()));
    }
    // A kernel without code for it rules a GPU out.
    let bare = KernelRegistration::new("test.cpu_only").cpu_handler(|_, _| Ok(()));
    let cpu = RingKernelRuntime::builder().register(bare).build().unwrap();
    assert_eq!(cpu.backend(), BackendType::Cpu);
}

#[test]
fn code_that_is_none_is_refused_before_a_driver_sees_it() {
    let Some(_turn) = turn() else { return };
    let echo: &[u8] = include_bytes!("../shaders/echo.spv");
    let mut newer = echo.to_vec();
    let version = newer
        .windows(4)
        .rposition(|word| word == 50_u32.wrapping_add(4 << 16).to_le_bytes())
        .unwrap();
    newer[version + 12] = 9;
    let with_module = |id, module: Vec<u8>| {
        // SAFETY: each of them fails the checks, and no driver sees it.
        KernelRegistration::new(id).shader(unsafe { ShaderCode::spirv(module) })
    };
    let runtime = vulkan::builder(VulkanMode::Exchange, RuntimeConfig::default())
        .register(with_module("empty", Vec::new()))
        .register(with_module("noise", vec![7; 400]))
        .register(with_module("cut", echo[..1000].to_vec()))
        .register(with_module("newer", newer))
        .register(KernelRegistration::new("none").cpu_handler(|_, _| Ok(())))
        .build()
        .unwrap();
    for (id, expected) in [
        ("empty", "header"),
        ("noise", "begins with"),
        ("cut", ""),
        ("newer", "layout 9"),
    ] {
        match runtime.launch(id, 1, 1, small()) {
            Err(Error::InvalidCode { kernel, reason }) => {
                assert_eq!(kernel, id);
                assert!(reason.contains(expected), "{id}: {reason}");
            }
            other => panic!("{id}: {other:?}"),
        }
    }
    assert!(matches!(
        runtime.launch("none", 1, 1, small()),
        Err(Error::NoHandler {
            backend: "vulkan",
            ..
        })
    ));
    assert_eq!(runtime.memory_in_use(runtime.default_device()).unwrap(), 0);
}

#[test]
fn what_the_device_cannot_do_is_refused() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let runtime = runtime(mode);
        let refused =
            |outcome: Result<ringkernel::KernelHandle, Error>, expected: &str| match outcome {
                Err(Error::InvalidOption { option, .. }) => assert_eq!(option, expected),
                other => panic!("{other:?}"),
            };
        let cores = LaunchOptions {
            cores: vec![ringkernel::thread::affinity::online_cores()[0]],
            ..small()
        };
        refused(runtime.launch("echo", 1, 1, cores), "cores");
        refused(runtime.launch("echo", 1, 1025, small()), "block size");
        if is_software(&runtime) {
            // More loop iterations than a dispatch of this driver has.
            let large = LaunchOptions {
                message_size: Some(4 << 20),
                queue_capacity: Some(2),
                ..LaunchOptions::default()
            };
            refused(runtime.launch("echo", 1, 16, large), "loop iterations");
        }
        assert_eq!(runtime.memory_in_use(runtime.default_device()).unwrap(), 0);
    }
}

#[test]
fn any_block_size_gives_the_same_answers() {
    let Some(_turn) = turn() else { return };
    for mode in [VulkanMode::Resident, VulkanMode::Exchange] {
        let runtime = runtime(mode);
        for threads in [1, 8, 16, 17, 32, 100, 128] {
            let options = LaunchOptions {
                message_size: Some(1000),
                ..small()
            };
            let kernel = runtime.launch("echo", 1, threads, options).unwrap();
            kernel.activate().unwrap();
            let mut reply = [0; 1000];
            for length in (0..=1000).step_by(37) {
                let message: Vec<u8> = (0..length).map(|byte| (byte * 7) as u8).collect();
                let received = kernel.call_bytes(&message, &mut reply, LONG).unwrap();
                assert_eq!(reply[..received], message, "{threads} threads");
            }
            kernel.terminate().unwrap();
        }
    }
}

/// As `active`, on a driver that compiles for long when it first runs a shader: an activation that
/// comes late can be asked for again.
fn active_at_last(runtime: &RingKernelRuntime, id: &str) -> KernelHandle {
    let kernel = runtime.launch(id, 1, 1, small()).unwrap();
    eventually("the activation", || match kernel.activate() {
        Ok(()) => true,
        Err(Error::Timeout { .. }) => false,
        Err(error) => panic!("{error}"),
    });
    kernel
}

/// Whether the driver ends loops after 65 535 iterations, without a word.
fn cuts_loops(mode: VulkanMode) -> bool {
    let runtime = runtime(mode);
    let kernel = active_at_last(&runtime, "test.loops");
    let turns = 100_000_u32.to_ne_bytes();
    match kernel.call_bytes(&turns, &mut [0; 8], LONG) {
        Ok(8) => false,
        Err(CallError::Unavailable(Unavailable::Failed)) => true,
        outcome => panic!("{outcome:?}"),
    }
}

/// What a handler that never ends leads to: a driver that cuts its loops lets the kernel fail, any
/// other holds the device up.
#[test]
fn a_handler_that_never_ends_fails_its_kernel_or_its_device() {
    let Some(_turn) = turn() else { return };
    if !is_software(&runtime(VulkanMode::Exchange)) {
        println!("skipped: hardware would hang");
        return;
    }
    for mode in MODES {
        let cuts = cuts_loops(mode);
        // In a process of its own: a driver that does not cut the loop goes on with it.
        let name = "a_handler_is_asked_to_go_on_for_ever";
        let output = ignored_test_with(name, &[(MODE, mode.name())]);
        let expected = match cuts {
            true => "the kernel failed, the device goes on",
            false => "the device is lost",
        };
        assert!(output.contains(expected), "{mode:?}, {cuts}: {output}");
        assert!(output.contains("1 passed"), "{mode:?}, {cuts}: {output}");
    }
}

/// Names the mode of the test below.
const MODE: &str = "RINGKERNEL_TEST_MODE";

#[test]
#[ignore = "run by `a_handler_that_never_ends_fails_its_kernel_or_its_device` in a process of its own"]
fn a_handler_is_asked_to_go_on_for_ever() {
    let mode: VulkanMode = std::env::var(MODE).unwrap().parse().unwrap();
    let config = RuntimeConfig {
        termination_timeout: Duration::from_secs(1),
        // Long enough for a driver that first compiles what it runs, on a busy machine.
        stall_timeout: Some(LONG / 2),
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(vulkan::builder(mode, config));
    let kernel = active_at_last(&runtime, "test.stuck");
    let other = active_at_last(&runtime, "echo");
    assert_eq!(kernel.call_bytes(b"", &mut [0; 8], LONG), Ok(0));
    assert_eq!(other.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    kernel.send_bytes(b"for ever").unwrap();
    // No reply of a run that was cut short, and a wait that ends in time whatever holds the kernel
    // up.
    let waited = Instant::now();
    let timeout = Duration::from_millis(50);
    match kernel.recv_bytes_timeout(&mut [0; 8], timeout) {
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Unavailable(_)) => {}
        outcome => panic!("{outcome:?}"),
    }
    assert!(waited.elapsed() < LONG / 3, "{:?}", waited.elapsed());
    eventually("the failure", || {
        kernel.status().state == KernelState::Failed
    });
    let failure = kernel.status().failure.unwrap();
    let unavailable = match failure.reason {
        FailureReason::Fault => {
            assert!(failure.message.contains("iterations"), "{failure}");
            assert_eq!(other.call_bytes(b"fine", &mut [0; 8], LONG), Ok(4));
            println!("the kernel failed, the device goes on");
            Unavailable::Failed
        }
        _ => {
            assert_eq!(failure.reason, FailureReason::DeviceLost);
            assert!(failure.message.contains("a handler that never ends"));
            assert!(matches!(
                runtime.launch("echo", 1, 1, small()),
                Err(Error::DeviceLost { .. })
            ));
            eventually("the other's failure", || {
                other.status().state == KernelState::Failed
            });
            println!("the device is lost");
            Unavailable::DeviceLost
        }
    };
    assert_eq!(
        kernel.recv_bytes_timeout(&mut [0; 8], LONG),
        Err(RecvTimeoutError::Unavailable(unavailable))
    );
    kernel.terminate().unwrap();
    let begin = Instant::now();
    drop((runtime, kernel, other));
    assert!(begin.elapsed() < LONG, "{:?}", begin.elapsed());
}

#[test]
fn declared_loops_are_never_cut() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let runtime = runtime(mode);
        for threads in [1, 32] {
            let kernel = runtime.launch("test.loops", 1, threads, small()).unwrap();
            kernel.activate().unwrap();
            let answer = |reply: &[u8]| u32::from_ne_bytes(reply[..4].try_into().unwrap());
            // In bursts, so that several share a slice, and after pauses, so that polls have used some of it up.
            for round in 0..20 {
                for _ in 0..12 {
                    kernel.send_bytes(&24_990_u32.to_ne_bytes()).unwrap();
                }
                for _ in 0..12 {
                    let mut reply = [0; 8];
                    assert_eq!(kernel.recv_bytes_timeout(&mut reply, LONG), Ok(8));
                    assert_eq!(answer(&reply), 24_990);
                }
                std::thread::sleep(Duration::from_micros(300 * round));
            }
            kernel.terminate().unwrap();
        }
    }
}

#[test]
fn nonsense_from_a_device_is_refused_and_loses_nothing_else() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        for wish in 1..=8_u8 {
            let runtime = runtime(mode);
            let other = active(&runtime, "echo", small());
            let kernel = active(&runtime, "test.hostile", small());
            let mut reply = [0; 64];
            assert_eq!(kernel.call_bytes(&[0, 1, 2], &mut reply, LONG), Ok(3));
            kernel.send_bytes(&[wish, 1, 2]).unwrap();
            // What comes is what was sent, or (4, a lane that nobody has) an empty message that the device made up.
            let failed = || kernel.status().state == KernelState::Failed;
            let begin = Instant::now();
            while !failed() && begin.elapsed() < Duration::from_millis(300) {
                match kernel.recv_bytes_timeout(&mut reply, Duration::from_millis(10)) {
                    Ok(0) => assert_eq!(wish, 4, "{mode:?}"),
                    Ok(length) => assert_eq!(reply[..length], [wish, 1, 2], "{mode:?}, {wish}"),
                    Err(_) => {}
                }
            }
            // Slots that cannot be read end the kernel where they are read: on a resident device at once. Positions that cannot be end
            // it where somebody goes by them: the bridge of the other modes.
            let resident = matches!(mode, VulkanMode::Resident);
            match wish {
                1..=3 if resident => assert!(failed(), "{mode:?}, {wish}"),
                6..=8 if !resident => assert!(failed(), "{mode:?}, {wish}"),
                _ => {}
            }
            if failed() {
                let reason = kernel.status().failure.unwrap().reason;
                assert_eq!(reason, FailureReason::CorruptRing, "{mode:?}, {wish}");
            }
            assert_eq!(other.call_bytes(b"well", &mut reply, LONG), Ok(4));
            kernel.terminate().unwrap();
            let report = runtime.complete_shutdown().unwrap();
            println!("{mode:?}, {wish}: {report}");
        }
    }
}

/// A device that lies of what it has written into the ring of another kernel.
#[test]
fn nonsense_that_is_passed_on_ends_the_kernel_behind_at_most() {
    let Some(_turn) = turn() else { return };
    for mode in [VulkanMode::Resident, VulkanMode::Exchange] {
        for wish in [7, 8_u8] {
            let runtime = runtime(mode);
            let kernels = ["test.hostile", "echo", "echo"]
                .map(|id| runtime.launch(id, 1, 1, small()).unwrap());
            let [first, behind, other] = &kernels;
            let connection = runtime.connect(first, behind).unwrap();
            assert_eq!(connection.kind(), ConnectionKind::SharedRing);
            for kernel in &kernels {
                kernel.activate().unwrap();
            }
            let mut reply = [0; 64];
            for message in [[0, 1, 2], [wish, 1, 2]] {
                let length = first.call_bytes_through(behind, &message, &mut reply, LONG);
                assert_eq!((length, &reply[..3]), (Ok(3), &message[..]));
            }
            first.deactivate().unwrap();
            behind.deactivate().unwrap();
            connection.disconnect().unwrap();
            // Positions that cannot be are seen by whoever goes on there; a gap of a few, only by what is missing at the end.
            let failure = behind.status().failure.map(|failure| failure.reason);
            assert_eq!(failure, (wish == 8).then_some(FailureReason::CorruptRing));
            assert_eq!(other.call_bytes(b"well", &mut reply, LONG), Ok(4));
            let report = runtime.complete_shutdown().unwrap();
            assert!(
                report.requests.adds_up() && report.replies.adds_up(),
                "{report}"
            );
        }
    }
}

#[test]
fn telemetry_equals_ground_truth() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let runtime = runtime(mode);
        let options = LaunchOptions {
            message_size: Some(100),
            ..LaunchOptions::default()
        };
        let kernel = runtime.launch("echo", 2, 1, options).unwrap();
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
        // Shaders have no clock.
        assert_eq!(telemetry.handler_count, 0);
        let silent = RuntimeConfig {
            enable_telemetry: false,
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(vulkan::builder(mode, silent));
        let kernel = active(&runtime, "echo", small());
        kernel.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
        assert_eq!(kernel.metrics().telemetry, None);
    }
}

#[test]
fn idle_kernels_show_signs_of_life() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let config = RuntimeConfig {
            heartbeat_interval: Duration::from_millis(5),
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(vulkan::builder(mode, config));
        for wait in [WaitStrategy::Spin, WaitStrategy::Park] {
            let options = LaunchOptions {
                wait: Some(wait),
                ..small()
            };
            let kernel = active(&runtime, "echo", options);
            let beats = kernel.metrics().heartbeats;
            eventually("heartbeats", || kernel.metrics().heartbeats > beats + 10);
            eventually("a recent sign of life", || {
                kernel.metrics().heartbeat_age.is_some_and(|age| age < LONG)
            });
            kernel.terminate().unwrap();
        }
    }
}

#[test]
fn kernels_take_turns_on_one_queue() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let runtime = runtime(mode);
        let kernels: Vec<_> = (0..6)
            .map(|index| {
                let options = LaunchOptions {
                    wait: Some(WaitStrategy::Spin),
                    ..small()
                };
                let kernel = runtime
                    .launch(
                        if index % 2 == 0 { "echo" } else { "test.count" },
                        1,
                        1,
                        options,
                    )
                    .unwrap();
                kernel.activate().unwrap();
                kernel
            })
            .collect();
        let mut reply = [0; 16];
        for round in 0..50_u64 {
            for (index, kernel) in kernels.iter().enumerate() {
                let message = round.to_ne_bytes();
                let length = kernel.call_bytes(&message, &mut reply, LONG).unwrap();
                if index % 2 == 0 {
                    assert_eq!(reply[..length], message);
                } else {
                    assert_eq!(reply[..8], (round + 1).to_ne_bytes());
                }
            }
        }
        // The others go on when some end, in the middle of traffic.
        for kernel in &kernels[..3] {
            kernel.terminate().unwrap();
        }
        for kernel in &kernels[3..] {
            kernel.call_bytes(b"still", &mut reply, LONG).unwrap();
        }
    }
}

#[test]
fn termination_takes_milliseconds() {
    let Some(_turn) = turn() else { return };
    let runtime = runtime(VulkanMode::Resident);
    let mut fall = Vec::new();
    let mut alone = Duration::ZERO;
    for _ in 0..50 {
        let kernel = active(&runtime, "echo", small());
        kernel.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
        // For comparison within this run: what a slice takes that is not told to end.
        if alone.is_zero() {
            let begin = Instant::now();
            let beats = kernel.metrics().heartbeats;
            eventually("a sign of life", || {
                kernel.metrics().heartbeats > beats + 100
            });
            alone = begin.elapsed();
        }
        let begin = Instant::now();
        kernel.terminate().unwrap();
        fall.push(begin.elapsed());
    }
    fall.sort_unstable();
    println!("terminate: median {:?}, longest {:?}", fall[25], fall[49]);
    // Two batches of sixteen slices are always queued: a hundred heartbeats are a fraction of one slice.
    assert!(fall[25] < alone, "{:?} against {alone:?}", fall[25]);
}

#[test]
fn a_million_messages_cross_slices_unchanged_and_in_order() {
    const MESSAGES: u32 = 1_000_000;
    let Some(_turn) = turn() else { return };
    let runtime = runtime(VulkanMode::Resident);
    // A block of one SIMD group and one of several, which software drivers run differently.
    for threads in [1, 32] {
        let options = LaunchOptions {
            message_size: Some(200),
            queue_capacity: Some(64),
            wait: Some(WaitStrategy::Spin),
            ..LaunchOptions::default()
        };
        let kernel = runtime.launch("echo", 1, threads, options).unwrap();
        kernel.activate().unwrap();
        let slices = || kernel.metrics().slices;
        let (before, begin) = (slices(), Instant::now());
        let mut total = 0;
        {
            let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
            let (mut sent, mut received) = (0_u32, 0_u32);
            let (mut message, mut reply) = ([0; 200], [0; 200]);
            // Sizes and bytes that tell each message, and how many are on their way, between one and two rings full.
            let size = |number: u32| (number.wrapping_mul(2_654_435_761) >> 16) as usize % 201;
            let fill = |number: u32, bytes: &mut [u8]| {
                for (index, byte) in bytes.iter_mut().enumerate() {
                    *byte = (number.wrapping_mul(31) >> (index % 4 * 8)) as u8 ^ index as u8;
                }
            };
            while received < MESSAGES || kernel.metrics().slices - before < 100 {
                let depth = 1 + (received >> 10) % 128;
                while sent.wrapping_sub(received) < depth {
                    let bytes = &mut message[..size(sent)];
                    fill(sent, bytes);
                    if sender.try_send_bytes(bytes).is_err() {
                        break;
                    }
                    sent += 1;
                }
                let bytes = &mut message[..size(received)];
                fill(received, bytes);
                let length = receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
                assert_eq!(reply[..length], *bytes, "message {received}");
                received += 1;
            }
            while received < sent {
                receiver.recv_bytes_timeout(&mut reply, LONG).unwrap();
                received += 1;
            }
            assert!(receiver.try_recv_bytes(&mut reply).is_err(), "one too many");
            total += u64::from(received);
        }
        println!(
            "{threads} threads: {total} messages, {} slices, {:.1?}",
            slices() - before,
            begin.elapsed()
        );
        eventually("the last progress", || kernel.metrics().processed == total);
        let metrics = kernel.metrics();
        assert_eq!(metrics.accepted, total);
        assert_eq!((metrics.produced, metrics.received_replies), (total, total));
        kernel.terminate().unwrap();
    }
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
}

#[test]
fn a_full_ring_gives_the_message_back_and_frees_its_slots() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let runtime = runtime(mode);
        let options = LaunchOptions {
            queue_capacity: Some(8),
            ..LaunchOptions::default()
        };
        let kernel = active(&runtime, "test.sleep", options);
        let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
        // The first one keeps the kernel busy for a while.
        sender.try_send_bytes(&[255]).unwrap();
        let mut sent = 1_u8;
        while sender.try_send_bytes(&[0, sent]).is_ok() {
            sent += 1;
        }
        // More if this thread was kept away for so long that the first one is done.
        assert!(sent >= 8, "one in the handler still holds its slot: {sent}");
        assert_eq!(sender.try_send_bytes(&[0]), Err(TrySendError::Full));
        let (begin, timeout) = (Instant::now(), Duration::from_millis(20));
        assert_eq!(
            sender.send_bytes_timeout(&[0], timeout),
            Err(SendTimeoutError::Timeout)
        );
        assert!(begin.elapsed() >= timeout.mul_f64(0.999));
        let mut reply = [0; 2];
        assert_eq!(receiver.recv_bytes_timeout(&mut reply, LONG), Ok(1));
        for expected in 1..sent {
            assert_eq!(receiver.recv_bytes_timeout(&mut reply, LONG), Ok(2));
            assert_eq!(reply, [0, expected]);
        }
        eventually("all free slots", || {
            sender.batch(100).is_ok_and(|batch| batch.room() == 8)
        });
    }
}

#[test]
fn late_replies_become_dead_letters_and_calls_are_limited() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let runtime = runtime(mode);
        let options = LaunchOptions {
            max_pending_calls: 2,
            ..small()
        };
        let kernel = active(&runtime, "test.sleep", options);
        let mut reply = [0; 8];
        for _ in 0..2 {
            assert_eq!(
                kernel.call_bytes(&[50], &mut reply, Duration::from_micros(100)),
                Err(CallError::Timeout)
            );
        }
        assert_eq!(kernel.call_bytes(b"\0mine", &mut reply, LONG), Ok(5));
        assert_eq!(reply[..5], *b"\0mine");
        assert_eq!(kernel.metrics().dead_letters.late_replies, 2);
        assert_eq!(kernel.try_recv_bytes(&mut reply), Err(TryRecvError::Empty));
        let accepted = kernel.metrics().accepted;
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| kernel.call_bytes(&[255], &mut [0; 8], LONG).unwrap());
            }
            eventually("two pending calls", || {
                kernel.metrics().accepted == accepted + 2
            });
            assert_eq!(
                kernel.call_bytes(b"three", &mut [0; 8], LONG),
                Err(CallError::TooManyCalls)
            );
        });
        drop(kernel.split_bytes().unwrap());
    }
}

#[test]
fn configured_numbers_are_honoured() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let config = RuntimeConfig {
            default_queue_capacity: 8,
            default_message_size: 100,
            default_timeout: Duration::from_millis(30),
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(vulkan::builder(mode, config));
        let kernel = active(&runtime, "test.sleep", LaunchOptions::default());
        {
            let (mut sender, _receiver) = kernel.split_bytes().unwrap();
            assert_eq!(sender.reserve().unwrap().body_mut().len(), 112);
            assert_eq!(sender.batch(100).unwrap().room(), 8);
        }
        let begin = Instant::now();
        assert_eq!(
            kernel.recv::<conformance::kernels::Sum>(),
            Err(RecvTimeoutError::Timeout)
        );
        while kernel.try_send_bytes(&[255]).is_ok() {}
        assert_eq!(kernel.send_bytes(b"x"), Err(SendTimeoutError::Timeout));
        assert!(begin.elapsed() >= Duration::from_millis(59));
        assert!(
            begin.elapsed() < Duration::from_secs(4),
            "the default is 5 s"
        );
        drop(runtime);
        // How often the bridge looks at a kernel.
        let beats_in_100_ms = |interval| {
            let config = RuntimeConfig {
                bridge_poll_interval: interval,
                kernel_wait: WaitStrategy::Spin,
                ..RuntimeConfig::default()
            };
            let runtime = runtime_from(vulkan::builder(mode, config));
            let kernel = active(&runtime, "echo", small());
            kernel.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
            let before = kernel.metrics().heartbeats;
            std::thread::sleep(Duration::from_millis(100));
            kernel.metrics().heartbeats - before
        };
        let (spinning, polling) = (
            beats_in_100_ms(Duration::ZERO),
            beats_in_100_ms(Duration::from_millis(20)),
        );
        assert!(spinning > 4 * polling, "{spinning}, {polling}");
        // How much memory kernels may take.
        let config = RuntimeConfig {
            vulkan: VulkanConfig {
                memory_limit: Some(100_000),
                ..VulkanConfig::default()
            },
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(vulkan::builder(mode, config));
        assert!(matches!(
            runtime.launch("echo", 1, 1, LaunchOptions::default()),
            Err(Error::OutOfMemory { .. })
        ));
        active(&runtime, "echo", small());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn driver_and_bridge_threads_stay_off_the_reserved_cores() {
    let Some(_turn) = turn() else { return };
    // In a process of its own: this one has threads of other tests.
    let child = ignored_test("threads_of_a_runtime_stay_off_the_reserved_cores", None);
    assert!(child.contains("1 passed"), "{child}");
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "run by `driver_and_bridge_threads_stay_off_the_reserved_cores` in a process of its own"]
fn threads_of_a_runtime_stay_off_the_reserved_cores() {
    use std::collections::BTreeMap;
    let cores = ringkernel::thread::affinity::usable_cores();
    let [first, .., last] = cores[..] else {
        println!("skipped: one core only");
        return;
    };
    // Thread names and the cores that each may use, by thread id.
    let threads = || -> BTreeMap<String, (String, String)> {
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let status = read(path.join("status"));
                let allowed = status
                    .lines()
                    .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
                    .unwrap_or_default();
                let name = read(path.join("comm"));
                let id = path.file_name().unwrap().to_string_lossy().into_owned();
                (id, (name.trim().to_owned(), allowed.trim().to_owned()))
            })
            .collect()
    };
    for reserved in [first, last] {
        let before = threads();
        let config = RuntimeConfig {
            reserved_cores: vec![reserved],
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(vulkan::builder(VulkanMode::Resident, config));
        let kernel = active(&runtime, "echo", small());
        kernel.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
        let mut after = threads();
        // Mesa lets the thread that writes its shader cache run anywhere, whoever starts it; it works during launches.
        after.retain(|id, (name, _)| !before.contains_key(id) && !name.contains(":disk$"));
        println!("core {reserved} reserved: {after:?}");
        assert!(
            after
                .values()
                .any(|(name, _)| name.starts_with("rk-bridge"))
        );
        for (name, allowed) in after.values() {
            let may_use = allowed.split(',').any(|range| {
                let (low, high) = range.split_once('-').unwrap_or((range, range));
                (low.parse().unwrap()..=high.parse().unwrap()).contains(&reserved)
            });
            assert!(!may_use, "{name} may use {allowed}, {reserved} is reserved");
        }
    }
}

#[test]
fn a_sleeping_kernel_costs_nothing_and_wakes() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let runtime = runtime(mode);
        let options = LaunchOptions {
            wait: Some(WaitStrategy::Park),
            ..small()
        };
        let kernel = active(&runtime, "echo", options);
        kernel.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let beats = kernel.metrics().heartbeats;
        std::thread::sleep(Duration::from_millis(50));
        // At most the sign of life that is due once a second.
        let asleep = kernel.metrics().heartbeats - beats;
        let spinning = active(
            &runtime,
            "echo",
            LaunchOptions {
                wait: Some(WaitStrategy::Spin),
                ..small()
            },
        );
        let beats = spinning.metrics().heartbeats;
        std::thread::sleep(Duration::from_millis(50));
        let awake = spinning.metrics().heartbeats - beats;
        if !matches!(mode, VulkanMode::Resident) {
            assert!(awake > asleep, "{asleep} asleep, {awake} awake");
        } else {
            assert!(awake > 4 * asleep, "{asleep} asleep, {awake} awake");
        }
        for number in 0..20_u64 {
            std::thread::sleep(Duration::from_millis(2));
            let mut reply = [0; 8];
            kernel
                .call_bytes(&number.to_ne_bytes(), &mut reply, LONG)
                .unwrap();
            assert_eq!(u64::from_ne_bytes(reply), number);
        }
    }
}

#[test]
fn room_for_replies_is_noticed_while_a_kernel_sleeps() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let config = RuntimeConfig {
            heartbeat_interval: Duration::from_secs(3600),
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(vulkan::builder(mode, config));
        let options = LaunchOptions {
            wait: Some(WaitStrategy::Park),
            ..small()
        };
        let kernel = active(&runtime, "echo", options);
        // Both rings full, and asleep.
        eventually("two full rings", || {
            while kernel.try_send_bytes(b"x").is_ok() {}
            kernel.metrics().accepted == 32
        });
        std::thread::sleep(Duration::from_millis(20));
        for _ in 0..32 {
            assert_eq!(kernel.recv_bytes_timeout(&mut [0; 8], LONG), Ok(1));
        }
    }
}

#[test]
fn a_sleeping_kernel_gets_its_turn_beside_one_that_spins() {
    let Some(_turn) = turn() else { return };
    let runtime = runtime(VulkanMode::Resident);
    let launch = |wait| {
        let options = LaunchOptions {
            wait: Some(wait),
            ..small()
        };
        active(&runtime, "echo", options)
    };
    let sleeper = launch(WaitStrategy::Park);
    let median = || {
        let mut times: Vec<Duration> = (0..100)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(1));
                let begin = Instant::now();
                sleeper.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
                begin.elapsed()
            })
            .collect();
        times.sort_unstable();
        times[50]
    };
    let alone = median();
    let _spinner = launch(WaitStrategy::Spin);
    let beside = median();
    println!("asleep: {alone:?} alone, {beside:?} beside a spinning kernel");
    // Not a whole batch of the spinner's slices, which would be hundreds of times as long.
    assert!(beside < 30 * alone, "{beside:?} against {alone:?}");
}

#[test]
fn the_environment_names_the_device() {
    let Some(_turn) = turn() else { return };
    // In a process of its own: the environment belongs to all threads.
    let open = |device| ignored_test("the_named_device_is_opened", Some(device));
    let output = open("no such device");
    assert!(
        output.contains("no device named 'no such device'"),
        "{output}"
    );
    let name = runtime(VulkanMode::Exchange).devices()[0].name.clone();
    for named in ["0", &name] {
        let output = open(named);
        assert!(output.contains(&format!("opened: {name}")), "{output}");
    }
    // Beyond the list, also where the backend is not named.
    let output = open("99");
    assert!(output.contains("has no device 99"), "{output}");
    assert!(output.contains("best: cpu"), "{output}");
}

/// Runs an ignored test of this file in a process of its own; what it printed.
fn ignored_test(name: &str, device: Option<&str>) -> String {
    match device {
        Some(device) => ignored_test_with(name, &[("RINGKERNEL_VULKAN_DEVICE", device)]),
        None => ignored_test_with(name, &[]),
    }
}

/// The same with these variables in its environment.
fn ignored_test_with(name: &str, variables: &[(&str, &str)]) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
#[ignore = "run by `the_environment_names_the_device` in a process of its own"]
fn the_named_device_is_opened() {
    match RingKernelRuntime::builder()
        .backend(BackendType::Vulkan)
        .build()
    {
        Ok(runtime) => println!(
            "opened: {}",
            runtime.devices()[runtime.default_device()].name
        ),
        Err(error) => println!("{error}"),
    }
    match RingKernelRuntime::builder().build() {
        Ok(runtime) => println!("best: {}", runtime.backend()),
        Err(error) => println!("{error}"),
    }
}

#[cfg(feature = "glsl")]
#[test]
fn handlers_in_glsl_are_compiled_at_launch() {
    let Some(_turn) = turn() else { return };
    let double = "RK_HANDLER {\n    RK_FOR(i, rk_in_words()) rk_out(i, 2u * rk_in(i));\n    rk_reply(rk_in_bytes());\n}\n";
    let wrong = "RK_HANDLER {\n    uint n = rk_in_words();\n    rk_reply(m);\n}\n";
    let runtime = vulkan::builder(VulkanMode::Auto, RuntimeConfig::default())
        .register(KernelRegistration::new("double").shader(ShaderCode::glsl(double)))
        .register(KernelRegistration::new("wrong").shader(ShaderCode::glsl(wrong)))
        .build()
        .unwrap();
    let kernel = active(&runtime, "double", small());
    let mut reply = [0; 8];
    kernel
        .call_bytes(&[1, 0, 0, 0, 21, 0, 0, 0], &mut reply, LONG)
        .unwrap();
    assert_eq!(reply, [2, 0, 0, 0, 42, 0, 0, 0]);
    match runtime.launch("wrong", 1, 1, small()) {
        Err(Error::Compile { kernel, log }) => {
            assert_eq!(kernel, "wrong");
            // The third line of the handler, whatever stands before it.
            assert!(log.contains(":3:") && log.contains("'m'"), "{log}");
        }
        other => panic!("{other:?}"),
    }
}

/// Options of a kernel that traces one message in `every`.
fn traced(every: u32) -> LaunchOptions {
    LaunchOptions {
        trace_every: NonZeroU32::new(every),
        ..small()
    }
}

/// Calls the kernel, and notes between which times of the host that was.
fn timed_call(kernel: &KernelHandle, bounds: &mut Vec<(u64, u64)>) {
    let before = now_ns_ordered();
    kernel.call_bytes(b"x", &mut [0; 48], LONG).unwrap();
    bounds.push((before, now_ns_ordered()));
}

/// The samples of all calls, which are where they were made on the host's clock.
fn expect_traces(kernel: &KernelHandle, bounds: &[(u64, u64)]) {
    let mut traces = Vec::new();
    eventually("the samples", || {
        traces = kernel.traces().unwrap();
        traces.len() == bounds.len()
    });
    for (trace, (before, after)) in traces.iter().zip(bounds) {
        assert!(trace.clock_error < Duration::from_millis(1), "{trace:?}");
        let error = trace.clock_error.as_nanos() as u64;
        assert!(
            trace.seen_ns + error >= *before,
            "{trace:?} began at {before}"
        );
        assert!(trace.seen_ns <= after + error, "{trace:?} ended at {after}");
        assert!(trace.seen_ns <= trace.done_ns, "{trace:?}");
    }
    let in_order = |pair: &[MessageTrace]| pair[0].done_ns <= pair[1].seen_ns;
    assert!(traces.windows(2).all(in_order), "{traces:?}");
}

#[test]
fn a_kernel_without_a_module_for_traces_is_not_traced() {
    let Some(_turn) = turn() else { return };
    for mode in MODES {
        let runtime = runtime(mode);
        let plain = active(&runtime, "test.count", small());
        let asked = active(&runtime, "test.count", traced(1));
        asked.call_bytes(b"x", &mut [0; 12], LONG).unwrap();
        assert_eq!(asked.traces(), None);
        let bytes = |kernel: &KernelHandle| kernel.metrics().memory_bytes;
        assert_eq!(bytes(&asked), bytes(&plain));
    }
}

#[test]
fn a_module_for_traces_reads_a_clock() {
    let Some(_turn) = turn() else { return };
    let plain = include_bytes!("../shaders/echo.spv").as_slice();
    let with_traces = include_bytes!("../shaders/echo.traced.spv").as_slice();
    // SAFETY: modules of our own, validated when they are built.
    let (twice, always) = unsafe {
        (
            ShaderCode::spirv(plain).traced(plain),
            ShaderCode::spirv(with_traces),
        )
    };
    let runtime = vulkan::builder(VulkanMode::Auto, RuntimeConfig::default())
        .register(KernelRegistration::new("twice").shader(twice))
        .register(KernelRegistration::new("always").shader(always))
        .build()
        .unwrap();
    match runtime.launch("twice", 1, 1, traced(1)) {
        Err(Error::InvalidCode { kernel, reason }) => {
            assert_eq!(kernel, "twice");
            assert!(reason.contains("-DRK_TRACES"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    // What is not asked for is not looked at; and a module with traces can go without.
    for id in ["twice", "always"] {
        let kernel = active(&runtime, id, small());
        for _ in 0..1000 {
            kernel.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
        }
        assert_eq!(kernel.traces(), None);
    }
}

#[test]
fn every_block_is_traced_whatever_its_size() {
    let Some(_turn) = turn() else { return };
    for (mode, threads) in MODES.into_iter().zip([64, 16, 200]) {
        let runtime = runtime(mode);
        let options = LaunchOptions {
            extended: true,
            ..traced(3)
        };
        let kernel = runtime.launch("echo", 3, threads, options).unwrap();
        kernel.activate().unwrap();
        let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
        let mut bounds = Vec::new();
        for index in 0..90 {
            // Every third message of a block, and one more.
            let options = SendOptions {
                correlation: index,
                timestamp: true,
                trace_id: (index == 76).then_some([9; 16]),
                ..SendOptions::default()
            };
            let before = now_ns_ordered();
            sender.try_send_bytes_with(b"payload", &options).unwrap();
            receiver.recv_ref_timeout(LONG).unwrap();
            bounds.push((before, now_ns_ordered()));
        }
        let mut traces = Vec::new();
        eventually("the samples", || {
            traces = kernel.traces().unwrap();
            traces.len() == 31
        });
        for block in traces.chunk_by(|a, b| a.block == b.block) {
            assert!(block.len() == 10 || block.len() == 11, "{}", block.len());
            assert!(block.iter().zip(0..).all(|(trace, at)| trace.sample == at));
        }
        for trace in traces {
            assert_eq!(trace.trace_id.is_some(), trace.correlation == 76);
            let (before, after) = bounds[trace.correlation as usize];
            let (sent, error) = (trace.sent_ns.unwrap(), trace.clock_error.as_nanos() as u64);
            assert!(before <= sent && sent <= trace.seen_ns + error, "{trace:?}");
            assert!(trace.seen_ns <= trace.done_ns, "{trace:?}");
            assert!(trace.seen_ns <= after + error, "{trace:?} ended at {after}");
        }
    }
}

/// The clock that lavapipe's shaders read shows 32 bits of nanoseconds: it wraps around every 4.3 seconds, whatever the kernel does meanwhile.
#[test]
fn times_are_right_where_a_clock_wraps_around() {
    const WRAP: Duration = Duration::from_nanos((1 << 32) + 50_000_000);
    let Some(_turn) = turn() else { return };
    let runtimes = MODES.map(runtime);
    let mut kernels: Vec<(KernelHandle, Vec<(u64, u64)>)> = Vec::new();
    for runtime in &runtimes {
        for wait in [WaitStrategy::Spin, WaitStrategy::Park] {
            let options = LaunchOptions {
                wait: Some(wait),
                ..traced(1)
            };
            kernels.push((active(runtime, "echo", options), Vec::new()));
        }
    }
    let call_all = |kernels: &mut Vec<(KernelHandle, Vec<(u64, u64)>)>, times: u32| {
        for _ in 0..times {
            for (kernel, bounds) in kernels.iter_mut() {
                timed_call(kernel, bounds);
            }
        }
    };
    // Beside messages now and then, and by two kernels that have none.
    let begin = Instant::now();
    call_all(&mut kernels, 5);
    let mut idle = kernels.split_off(4);
    while begin.elapsed() < WRAP {
        std::thread::sleep(WRAP / 40);
        call_all(&mut kernels, 1);
    }
    kernels.append(&mut idle);
    call_all(&mut kernels, 5);
    for (kernel, bounds) in &kernels {
        expect_traces(kernel, bounds);
    }
    // While they are told to do nothing.
    for (kernel, _) in &kernels {
        kernel.deactivate().unwrap();
    }
    std::thread::sleep(WRAP);
    for (kernel, _) in &kernels {
        kernel.activate().unwrap();
    }
    call_all(&mut kernels, 5);
    for (kernel, bounds) in &kernels {
        expect_traces(kernel, bounds);
        kernel.terminate().unwrap();
        expect_traces(kernel, bounds);
    }
}

#[cfg(feature = "glsl")]
#[test]
fn handlers_in_glsl_are_traced() {
    let Some(_turn) = turn() else { return };
    let echo = "RK_HANDLER {\n    rk_out_copy(rk_in_words());\n    rk_reply(rk_in_bytes());\n}\n";
    for mode in MODES {
        let runtime = vulkan::builder(mode, RuntimeConfig::default())
            .register(KernelRegistration::new("mine").shader(ShaderCode::glsl(echo)))
            .build()
            .unwrap();
        // The same source is two kernels.
        let plain = active(&runtime, "mine", small());
        plain.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
        assert_eq!(plain.traces(), None);
        let kernel = active(&runtime, "mine", traced(1));
        let mut bounds = Vec::new();
        for _ in 0..100 {
            timed_call(&kernel, &mut bounds);
        }
        expect_traces(&kernel, &bounds);
    }
}

#[cfg(feature = "glsl")]
#[test]
fn the_kernel_of_the_documentation_does_what_it_says_in_glsl() {
    let Some(_turn) = turn() else { return };
    let text = include_str!("../docs/vulkan.md");
    let source = text.split("```glsl\n").nth(1).unwrap();
    let source = source.split("```").next().unwrap();
    // What stands before the handler is what the library puts there.
    let source: String = source
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| [line, "\n"])
        .collect();
    let registration = KernelRegistration::new("mine")
        .state_size(4)
        .shader(ShaderCode::glsl(source));
    let runtime = vulkan::builder(VulkanMode::Auto, RuntimeConfig::default())
        .register(registration)
        .build()
        .unwrap();
    for threads in [1, 64] {
        let kernel = runtime.launch("mine", 1, threads, small()).unwrap();
        kernel.activate().unwrap();
        let words = [7_u32, 11, 13, 17, 19, 23, 29, 31, 37];
        let request: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut reply = [0; 4];
        for _ in 0..1000 {
            assert_eq!(kernel.call_bytes(&request, &mut reply, LONG), Ok(4));
            assert_eq!(u32::from_ne_bytes(reply), words.iter().sum::<u32>());
        }
        kernel.terminate().unwrap();
    }
}
