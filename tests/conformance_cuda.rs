//! The conformance suite on the first CUDA device, and what only that backend has.
//!
//! Where there is no GPU, `on_the_fake_driver` runs all of it in a process of its own, against a driver and compiler that run
//! the kernels' sources on this CPU (`tests/fake_cuda`). What the suite leaves out for Vulkan it leaves out here for the same
//! reasons; and that kernels which spin leave cores to others: they take none.

#![cfg(feature = "cuda")]

// Some of the suite is for other backends.
#[allow(dead_code)]
mod conformance;
#[path = "support/cuda.rs"]
mod cuda;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use conformance::{LONG, Subject, active, eventually, one_at_a_time, runtime_from, small};
use cuda::{
    FAKE, FAULTY_KERNEL, FOREIGN_CAPTURE, Fake, LOCAL_MEMORY, NO_DEVICES, NO_IMPORT, NO_MEMORY,
    OLD_COMPILER, OLD_DEVICE, RINGS, WATCHDOG, fake, has_vulkan, run_on_the_fake,
};
use ringkernel::error::{
    CallError, HandlerError, MessageError, RecvTimeoutError, SendTimeoutError, Unavailable,
};
use ringkernel::kernel::FailureReason;
use ringkernel::{
    BackendType, CudaCode, CudaConfig, CudaRingMemory, Error, KernelRegistration, LaunchOptions,
    PortableCode, RingKernelRuntime, RuntimeBuilder, RuntimeConfig, WaitStrategy,
};

/// Set where a real device must be there: a test that is skipped fails then.
const REQUIRED: &str = "RINGKERNEL_REQUIRE_CUDA";

pub struct Cuda;

impl Subject for Cuda {
    const ECHO_BYTES: u64 = 1 << 20;
    const PING_PONGS: u32 = 20_000;

    fn builder_with(mut config: RuntimeConfig) -> RuntimeBuilder {
        // Real devices choose for themselves.
        if std::env::var_os(FAKE).is_some() {
            let device = std::env::var_os(RINGS).is_some() && has_vulkan();
            config.cuda.ring_memory = match device {
                true => CudaRingMemory::Device,
                false => CudaRingMemory::Host,
            };
        }
        RingKernelRuntime::builder()
            .backend(BackendType::Cuda)
            .device(0)
            .config(config)
    }

    fn missing() -> Option<String> {
        static MISSING: Mutex<Option<Option<String>>> = Mutex::new(None);
        let mut missing = MISSING.lock().unwrap_or_else(PoisonError::into_inner);
        missing
            .get_or_insert_with(|| {
                let missing = Self::builder().build().err().map(|error| error.to_string());
                let required = std::env::var_os(REQUIRED).or(std::env::var_os(FAKE));
                assert!(missing.is_none() || required.is_none(), "{missing:?}");
                missing
            })
            .clone()
    }
}

conformance! { on a device: crate::Cuda }

mod traces {
    crate::conformance! { traces: crate::Cuda }
}

mod shared_rings {
    crate::conformance! { shared rings on a device: crate::Cuda }
}

#[test]
fn on_the_fake_driver() {
    run_on_the_fake(&[], &[]);
}

/// The same of those that exchange messages, through memory that software Vulkan exports.
#[test]
fn on_the_fake_driver_with_rings_in_its_memory() {
    run_on_the_fake(&["messages::"], &[(RINGS, "1")]);
}

fn unavailable(outcome: Result<RingKernelRuntime, Error>) -> String {
    match outcome {
        Err(Error::BackendUnavailable { backend, reason }) => {
            assert_eq!(backend, "cuda");
            reason
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_missing_driver_is_an_error_with_its_reason_and_not_the_choice() {
    let _one = one_at_a_time();
    if Cuda::missing().is_none() {
        println!("there is a driver");
        return;
    }
    let reason = unavailable(Cuda::builder().build());
    assert!(!reason.is_empty());
    let best = RingKernelRuntime::builder().build().unwrap();
    assert_ne!(best.backend(), BackendType::Cuda);
}

#[test]
fn devices_are_described_and_chosen() {
    let Some(_fake) = fake() else { return };
    let runtime = RingKernelRuntime::builder()
        .backend(BackendType::Cuda)
        .build()
        .unwrap();
    assert_eq!(runtime.default_device(), 0);
    let devices = runtime.devices();
    assert_eq!(devices.len(), 2);
    assert_eq!(devices[0].name, "Fake GPU 0");
    let cuda = devices[1].cuda.as_ref().unwrap();
    assert_eq!(
        (cuda.driver_version, cuda.compute_capability),
        ((12, 9), (9, 0))
    );
    assert_eq!((cuda.memory_bytes, cuda.multiprocessors), (1 << 30, 16));
    assert_eq!(cuda.pci_address.as_deref(), Some("ffff:01:00.0"));
    assert_eq!(
        (cuda.nvlink_peers.as_slice(), cuda.watchdog),
        ([0].as_slice(), false)
    );
    let named = RingKernelRuntime::builder()
        .backend(BackendType::Cuda)
        .device_name("gpu 1")
        .build()
        .unwrap();
    assert_eq!(named.default_device(), 1);
}

#[test]
fn devices_that_cannot_be_used_say_why() {
    let Some(fake) = fake() else { return };
    for (fault, expected) in [
        (NO_DEVICES, "has no device"),
        (OLD_DEVICE, "compute capability is 6.0"),
        (NO_MEMORY, "OUT_OF_MEMORY"),
    ] {
        fake.arm(fault);
        let reason = unavailable(Cuda::builder().build());
        assert!(reason.contains(expected), "{reason}");
    }
    fake.arm(0);
    assert_eq!(fake.live(), 0, "left behind");
    Cuda::builder().build().unwrap();
}

#[test]
fn everything_is_given_back() {
    let Some(fake) = fake() else { return };
    assert_eq!(fake.live(), 0);
    let runtime = runtime_from(Cuda::builder());
    let kernels: Vec<_> = (0..4)
        .map(|_| active(&runtime, "test.count", small()))
        .collect();
    for kernel in &kernels {
        assert_eq!(kernel.call_bytes(b"x", &mut [0; 16], LONG), Ok(12));
    }
    assert!(fake.live() > 4);
    drop(runtime);
    drop(kernels);
    assert_eq!(fake.live(), 0);
    assert_eq!(fake.pushed(), 0, "a caller's context is its own again");
}

fn with_rings(ring_memory: CudaRingMemory, device: usize) -> Result<RingKernelRuntime, Error> {
    RingKernelRuntime::builder()
        .backend(BackendType::Cuda)
        .device(device)
        .config(RuntimeConfig {
            cuda: CudaConfig {
                ring_memory,
                ..CudaConfig::default()
            },
            ..RuntimeConfig::default()
        })
        .build()
}

/// Where the rings of a runtime's device lie, and why.
fn rings(runtime: &RingKernelRuntime) -> (CudaRingMemory, String) {
    let device = runtime.devices().swap_remove(runtime.default_device());
    let cuda = device.cuda.unwrap();
    (cuda.ring_memory, cuda.ring_memory_reason)
}

/// Memory of software Vulkan that this process maps or holds open.
fn vulkan_memory() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = maps.lines().filter(|line| line.contains("memfd:")).count();
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let open = open
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().contains("memfd:"));
    mapped + open.count()
}

#[test]
fn rings_lie_where_they_are_faster() {
    let Some(fake) = fake() else { return };
    if !has_vulkan() {
        return;
    }
    let before = vulkan_memory();
    let runtime = with_rings(CudaRingMemory::Auto, 0).unwrap();
    let (chosen, reason) = rings(&runtime);
    assert!(
        matches!(chosen, CudaRingMemory::Host | CudaRingMemory::Device),
        "{reason}"
    );
    // What was measured; a loaded machine may take too long for one of them.
    assert!(
        reason.contains("a round trip takes") || reason.contains("cannot be used"),
        "{reason}"
    );
    let kernel = active(&runtime, "echo", small());
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    drop((runtime, kernel));
    let runtime = with_rings(CudaRingMemory::Device, 0).unwrap();
    assert_eq!(rings(&runtime).0, CudaRingMemory::Device);
    // More than one piece of memory.
    let kernels: Vec<_> = (0..3)
        .map(|_| {
            runtime
                .launch("echo", 16, 1, LaunchOptions::default())
                .unwrap()
        })
        .collect();
    for kernel in &kernels {
        kernel.activate().unwrap();
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    }
    assert!(vulkan_memory() > before);
    drop((runtime, kernels));
    assert_eq!(fake.live(), 0, "left behind");
    assert_eq!(vulkan_memory(), before, "left behind");
}

/// A device with little memory that the host can map takes the rest of the rings from the host's, unless that is ruled out.
#[test]
fn rings_that_do_not_fit_lie_in_host_memory() {
    let Some(fake) = fake() else { return };
    if !has_vulkan() {
        return;
    }
    // Opening takes one piece; what more there is, is refused.
    let large = LaunchOptions {
        queue_capacity: Some(1 << 16),
        message_size: Some(1 << 10),
        ..LaunchOptions::default()
    };
    let runtime = with_rings(CudaRingMemory::Device, 0).unwrap();
    fake.arm(NO_IMPORT);
    assert!(matches!(
        runtime.launch("echo", 1, 1, large.clone()),
        Err(Error::DriverFailed { .. })
    ));
    fake.arm(0);
    drop(runtime);
    let mut runtime = with_rings(CudaRingMemory::Auto, 0).unwrap();
    let begin = Instant::now();
    while rings(&runtime).0 != CudaRingMemory::Device {
        assert!(begin.elapsed() < LONG, "{}", rings(&runtime).1);
        drop(runtime);
        runtime = with_rings(CudaRingMemory::Auto, 0).unwrap();
    }
    fake.arm(NO_IMPORT);
    let kernel = active(&runtime, "echo", large);
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    fake.arm(0);
    drop((runtime, kernel));
    assert_eq!(fake.live(), 0, "left behind");
}

#[test]
fn rings_stay_in_host_memory_where_the_device_has_none_for_them() {
    let Some(fake) = fake() else { return };
    let check = |device, expected: &str| {
        let runtime = with_rings(CudaRingMemory::Auto, device).unwrap();
        let (chosen, reason) = rings(&runtime);
        assert_eq!(chosen, CudaRingMemory::Host);
        assert!(reason.contains(expected), "{reason}");
        let kernel = active(&runtime, "echo", small());
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
        drop((runtime, kernel));
        let reason = unavailable(with_rings(CudaRingMemory::Device, device));
        assert!(reason.contains(expected), "{reason}");
        assert_eq!(fake.live(), 0, "left behind");
    };
    if !has_vulkan() {
        return;
    }
    check(1, "Vulkan does not know it");
    fake.arm(NO_IMPORT);
    check(0, "import memory: CUDA_ERROR_NOT_SUPPORTED");
}

#[test]
fn kernels_with_local_memory_start_beside_others() {
    let Some(fake) = fake() else { return };
    fake.arm(LOCAL_MEMORY);
    let runtime = runtime_from(Cuda::builder());
    let first = active(&runtime, "echo", small());
    let second = active(&runtime, "test.count", small());
    assert_eq!(first.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    assert_eq!(second.call_bytes(b"x", &mut [0; 16], LONG), Ok(12));
}

#[test]
fn graphs_that_others_capture_are_left_alone() {
    let Some(fake) = fake() else { return };
    fake.arm(FOREIGN_CAPTURE);
    let runtime = runtime_from(Cuda::builder());
    let kernel = active(&runtime, "echo", small());
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    // The monitor's calls too.
    eventually("somebody who looked", || {
        kernel.metrics().heartbeat_age.is_some()
    });
    kernel.terminate().unwrap();
}

#[test]
fn an_older_compiler_is_good_enough() {
    let Some(fake) = fake() else { return };
    fake.arm(OLD_COMPILER);
    let runtime = runtime_from(Cuda::builder());
    let kernel = active(&runtime, "test.sleep", small());
    assert_eq!(kernel.call_bytes(b"\0x", &mut [0; 8], LONG), Ok(2));
}

#[test]
fn runtimes_may_be_built_at_the_same_time() {
    let Some(_fake) = fake() else { return };
    std::thread::scope(|scope| {
        let built: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| runtime_from(Cuda::builder())))
            .collect();
        let runtimes: Vec<_> = built
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect();
        for runtime in &runtimes {
            let kernel = active(runtime, "test.count", small());
            assert_eq!(kernel.call_bytes(b"x", &mut [0; 16], LONG), Ok(12));
        }
    });
}

#[test]
fn runtimes_of_one_process_stay_out_of_each_others_way() {
    let Some(fake) = fake() else { return };
    let (first, second) = (runtime_from(Cuda::builder()), runtime_from(Cuda::builder()));
    let kernel = active(&first, "echo", small());
    assert!(matches!(
        Cuda::builder().build(),
        Err(Error::DeviceBusy { .. })
    ));
    // What the second has taken is given back when nothing runs any more.
    let live = fake.live();
    drop(second);
    assert_eq!(fake.live(), live);
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    kernel.terminate().unwrap();
    assert!(fake.live() < live);
    drop((first, kernel));
    assert_eq!(fake.live(), 0);
}

#[test]
fn what_cannot_be_resident_at_once_is_refused() {
    let Some(_fake) = fake() else { return };
    let runtime = runtime_from(Cuda::builder());
    // Room for sixteen times thirty-two blocks of two threads.
    let kernel = runtime.launch("echo", 484, 1, small()).unwrap();
    let refused = |outcome: Result<ringkernel::KernelHandle, Error>, expected: &str| match outcome {
        Err(Error::InvalidOption { option, reason }) => {
            assert_eq!(option, expected);
            reason
        }
        other => panic!("{other:?}"),
    };
    let reason = refused(runtime.launch("echo", 29, 1, small()), "grid");
    assert!(
        reason.contains("28 beside the kernels that run"),
        "{reason}"
    );
    refused(runtime.launch("echo", 513, 1, small()), "grid");
    // Of another shape none is certain: any multiprocessor may be taken.
    refused(runtime.launch("echo", 1, 4, small()), "grid");
    refused(runtime.launch("echo", 1, 600, small()), "block size");
    kernel.terminate().unwrap();
    let kernel = runtime.launch("echo", 512, 1, small()).unwrap();
    kernel.terminate().unwrap();
    let few = runtime.launch("echo", 15, 1, small()).unwrap();
    runtime.launch("echo", 1, 500, small()).unwrap();
    refused(runtime.launch("echo", 1, 400, small()), "grid");
    few.terminate().unwrap();
}

#[test]
fn what_would_wait_for_running_kernels_is_refused() {
    let Some(_fake) = fake() else { return };
    let config = RuntimeConfig {
        cuda: CudaConfig {
            host_arena_bytes: 64 << 10,
            device_arena_bytes: 1 << 10,
            max_kernels: 3,
            ..CudaConfig::default()
        },
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(Cuda::builder_with(config));
    let busy = |outcome: Result<ringkernel::KernelHandle, Error>, expected: &str| match outcome {
        Err(Error::DeviceBusy { reason, .. }) => {
            assert!(reason.contains(expected), "{reason}");
        }
        other => panic!("{other:?}"),
    };
    let first = active(&runtime, "echo", small());
    // Memory, more than is left; code that is not loaded; streams.
    busy(
        runtime.launch("echo", 1, 1, LaunchOptions::default()),
        "host_arena_bytes",
    );
    let late = CudaCode::source("RK_HANDLER { rk_reply_raw(0u); } // Late.");
    runtime
        .register(KernelRegistration::new("late").cuda(late))
        .unwrap();
    busy(
        runtime.launch("late", 1, 1, small()),
        "before the first launch",
    );
    let others = [
        active(&runtime, "echo", small()),
        active(&runtime, "echo", small()),
    ];
    busy(runtime.launch("echo", 1, 1, small()), "max_kernels");
    assert_eq!(first.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    // While nothing runs all of it works.
    for kernel in others.iter().chain([&first]) {
        kernel.terminate().unwrap();
    }
    active(&runtime, "echo", LaunchOptions::default())
        .terminate()
        .unwrap();
    active(&runtime, "late", small());
}

#[test]
fn code_that_is_none_and_source_that_does_not_compile_say_why() {
    let Some(_fake) = fake() else { return };
    let wrong = "RK_HANDLER {\n    uint n = rk_in_words();\n    rk_reply(m);\n}\n";
    let double = "RK_HANDLER { RK_FOR(i, rk_in_words()) { rk_out(i, 2u * rk_in(i)); } rk_reply(rk_in_bytes()); }";
    let kernel = KernelRegistration::new;
    // SAFETY: no driver takes either.
    let (noise, foreign) = unsafe {
        (
            CudaCode::cubin(vec![7; 100]),
            CudaCode::ptx(b".version 7.0".as_slice()),
        )
    };
    let runtime = Cuda::builder()
        .register(kernel("noise").cuda(noise))
        .register(kernel("foreign").cuda(foreign))
        .register(kernel("wrong").cuda(CudaCode::source(wrong)))
        .register(kernel("double").portable(PortableCode::new(double)))
        .register(kernel("cpu").cpu_handler(|_, _| Ok(())))
        .build()
        .unwrap();
    for (id, expected) in [("noise", "INVALID_IMAGE"), ("foreign", "rk_main")] {
        match runtime.launch(id, 1, 1, small()) {
            Err(Error::InvalidCode { reason, .. }) => {
                assert!(reason.contains(expected), "{reason}")
            }
            other => panic!("{id}: {other:?}"),
        }
    }
    match runtime.launch("wrong", 1, 1, small()) {
        Err(Error::Compile { kernel, log }) => {
            assert_eq!(kernel, "wrong");
            // The third line of the handler, whatever stands before it.
            assert!(log.contains("handler:3:") && log.contains('m'), "{log}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        runtime.launch("cpu", 1, 1, small()),
        Err(Error::NoHandler {
            backend: "cuda",
            ..
        })
    ));
    let kernel = active(&runtime, "double", small());
    let mut reply = [0; 8];
    kernel
        .call_bytes(&[1, 0, 0, 0, 21, 0, 0, 0], &mut reply, LONG)
        .unwrap();
    assert_eq!(reply, [2, 0, 0, 0, 42, 0, 0, 0]);
}

#[test]
fn an_error_that_sticks_ends_every_wait_and_says_what_helps() {
    let Some(fake) = fake() else { return };
    let runtime = runtime_from(Cuda::builder());
    let (kernel, silent) = (
        active(&runtime, "echo", small()),
        active(&runtime, "sink", small()),
    );
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    let lost = Unavailable::DeviceLost;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| kernel.recv_bytes_timeout(&mut [0; 8], LONG));
        let caller = scope.spawn(|| silent.call_bytes(b"z", &mut [0; 8], LONG));
        std::thread::sleep(Duration::from_millis(20));
        let begin = Instant::now();
        fake.arm(FAULTY_KERNEL);
        assert_eq!(
            receiver.join().unwrap(),
            Err(RecvTimeoutError::Unavailable(lost))
        );
        assert_eq!(caller.join().unwrap(), Err(CallError::Unavailable(lost)));
        assert!(begin.elapsed() < LONG / 10, "{:?}", begin.elapsed());
    });
    assert_eq!(
        silent.send_bytes(b"x"),
        Err(SendTimeoutError::Unavailable(lost))
    );
    let failure = kernel.status().failure.unwrap();
    assert_eq!(failure.reason, FailureReason::DeviceLost);
    for text in ["ILLEGAL_ADDRESS", "must be restarted"] {
        assert!(failure.message.contains(text), "{failure}");
    }
    assert!(matches!(
        runtime.launch("echo", 1, 1, small()),
        Err(Error::DeviceLost { .. })
    ));
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.failed_kernels.len(), 2);
    assert!(report.requests.adds_up(), "{report}");
}

#[test]
fn devices_with_a_watchdog_run_slices() {
    let Some(fake) = fake() else { return };
    for wait in [WaitStrategy::Spin, WaitStrategy::Park] {
        run_slices(&fake, wait);
    }
}

fn run_slices(fake: &Fake, wait: WaitStrategy) {
    fake.arm(WATCHDOG);
    let runtime = runtime_from(Cuda::builder());
    let options = LaunchOptions {
        wait: Some(wait),
        ..small()
    };
    let kernel = active(&runtime, "test.count", options);
    let mut reply = [0; 16];
    let mut count = 0_u64;
    let mut call = |kernel: &ringkernel::KernelHandle| {
        count += 1;
        kernel.call_bytes(b"x", &mut reply, LONG).unwrap();
        assert_eq!(reply[..8], count.to_ne_bytes());
    };
    // State goes from slice to slice.
    let begin = Instant::now();
    while kernel.metrics().slices < 20 {
        call(&kernel);
        assert!(begin.elapsed() < LONG);
    }
    for _ in 0..5 {
        kernel.deactivate().unwrap();
        let slices = kernel.metrics().slices;
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(kernel.metrics().slices, slices, "none while it is inactive");
        kernel.activate().unwrap();
        call(&kernel);
    }
    kernel.terminate().unwrap();
    drop((runtime, kernel));
    fake.arm(0);
    assert_eq!(fake.live(), 0);
}

#[test]
fn a_resident_kernel_stays_while_it_is_deactivated() {
    let Some(_fake) = fake() else { return };
    let runtime = runtime_from(Cuda::builder());
    let kernel = active(&runtime, "test.count", small());
    for round in 1..=20_u64 {
        let mut reply = [0; 16];
        kernel.call_bytes(b"x", &mut reply, LONG).unwrap();
        assert_eq!(reply[..8], round.to_ne_bytes());
        kernel.deactivate().unwrap();
        kernel.activate().unwrap();
    }
    eventually("signs of life", || kernel.metrics().heartbeats > 20);
    eventually("somebody who noted them", || {
        kernel.metrics().heartbeat_age.is_some()
    });
}

/// The kernel that `docs/writing-kernels.md` shows, on the CPU and here.
#[test]
fn the_kernel_of_the_documentation_does_the_same_on_both() {
    let _one = one_at_a_time();
    let text = include_str!("../docs/writing-kernels.md");
    let source = text.split("```glsl\n").nth(1).unwrap();
    let source = source.split("```").next().unwrap();
    let stats = || {
        KernelRegistration::new("stats")
            .largest_message(1024)
            .state_size(4)
            .portable(PortableCode::new(source))
            .cpu_handler(|request, context| {
                let floats: &[f32] = bytemuck::try_cast_slice(request.payload())
                    .map_err(|_| HandlerError::new(HandlerError::BAD_REQUEST, "not floats"))?;
                let [first, ..] = floats else {
                    return Err(HandlerError::new(HandlerError::BAD_REQUEST, "no floats"));
                };
                let count = context.state_as::<u32>()?;
                *count += floats.len() as u32;
                let count = *count;
                let (least, greatest) =
                    floats.iter().fold((*first, *first), |(low, high), value| {
                        (low.min(*value), high.max(*value))
                    });
                let mut reply = [0; 12];
                reply[..4].copy_from_slice(&count.to_ne_bytes());
                reply[4..8].copy_from_slice(&least.to_ne_bytes());
                reply[8..].copy_from_slice(&greatest.to_ne_bytes());
                context.reply_bytes(&reply)
            })
    };
    let mut backends = vec![BackendType::Cpu];
    match Cuda::missing() {
        None => backends.push(BackendType::Cuda),
        Some(reason) => println!("skipped: {reason}"),
    }
    for backend in backends {
        let runtime = RingKernelRuntime::builder()
            .backend(backend)
            .register(stats())
            .build()
            .unwrap();
        let kernel = runtime.launch("stats", 1, 32, small()).unwrap();
        kernel.activate().unwrap();
        let mut reply = [0; 12];
        for (round, floats) in [[3.5_f32, -2.0, 8.25], [0.0, 1e9, -1e-9]]
            .iter()
            .enumerate()
        {
            let request: Vec<u8> = floats.iter().flat_map(|f| f.to_ne_bytes()).collect();
            assert_eq!(kernel.call_bytes(&request, &mut reply, LONG), Ok(12));
            let count = 3 * (round as u32 + 1);
            let least = floats.iter().copied().fold(f32::INFINITY, f32::min);
            let greatest = floats.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(reply[..4], count.to_ne_bytes());
            assert_eq!(reply[4..8], least.to_ne_bytes());
            assert_eq!(reply[8..], greatest.to_ne_bytes());
        }
        assert!(matches!(
            kernel.call_bytes(b"odd", &mut reply, LONG),
            Err(CallError::Message(MessageError::Handler(_)))
        ));
    }
}

// The last one by name: it leaves a thread behind that never ends, as a GPU would.
#[test]
fn z_a_handler_that_never_ends_is_reported_in_time() {
    let Some(_fake) = fake() else { return };
    let timeout = Duration::from_millis(300);
    let config = RuntimeConfig {
        termination_timeout: timeout,
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(Cuda::builder_with(config));
    let kernel = active(&runtime, "test.stuck", small());
    kernel.send_bytes(b"for ever").unwrap();
    eventually("the request in its hands", || {
        kernel.try_send_bytes(b"more").is_err()
    });
    let begin = Instant::now();
    assert!(matches!(kernel.terminate(), Err(Error::Timeout { .. })));
    drop(runtime);
    assert!(begin.elapsed() < timeout * 20, "{:?}", begin.elapsed());
    assert!(kernel.status().failure.is_some());
    // Whatever waits for running kernels would wait for this one.
    match Cuda::builder().build() {
        Err(Error::DeviceLost { reason, .. }) => {
            assert!(reason.contains("must be restarted"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

/// Where a watchdog wants slices, each finds the way of its replies anew.
#[test]
fn slices_share_rings() {
    let Some(fake) = fake() else { return };
    fake.arm(WATCHDOG);
    conformance::shared::no_host_hop_lies_between_kernels_that_share_a_ring::<Cuda>();
    conformance::pipeline_ends::connections_come_and_go_without_a_loss::<Cuda>();
    conformance::pipeline_ends::stages_end_under_load_in_any_order::<Cuda>();
}

/// Where a watchdog wants slices, requests that take several are traced as one, and an idle kernel tells its clock.
#[test]
fn traces_go_from_slice_to_slice() {
    let Some(fake) = fake() else { return };
    fake.arm(WATCHDOG);
    conformance::time::handler_time_is_all_of_the_handlers_time::<Cuda>();
    // Nothing else gives it a slice.
    let config = RuntimeConfig {
        heartbeat_interval: Duration::from_secs(3600),
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(Cuda::builder_with(config));
    for wait in [WaitStrategy::Spin, WaitStrategy::Park] {
        let options = LaunchOptions {
            wait: Some(wait),
            trace_every: std::num::NonZeroU32::new(1),
            ..small()
        };
        let kernel = active(&runtime, "test.count", options);
        kernel.call_bytes(b"x", &mut [0; 16], LONG).unwrap();
        // One that has told its clock once so far, which places nothing, and has nothing else to do.
        std::thread::sleep(Duration::from_millis(50));
        let has_samples = |count| {
            let traces = kernel.traces();
            traces.is_some_and(|traces| traces.len() == count)
        };
        eventually("its clock", || has_samples(1));
        for count in 2..=20 {
            kernel.call_bytes(b"x", &mut [0; 16], LONG).unwrap();
            eventually("the sample", || kernel.traces().unwrap().len() == count);
        }
        kernel.terminate().unwrap();
        assert_eq!(kernel.traces().unwrap().len(), 20);
    }
}
