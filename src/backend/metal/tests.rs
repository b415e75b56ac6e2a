//! The conformance suite on a Metal of our own, which runs the kernels' sources on this CPU; and what only this backend has.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::fake;
use crate::backend::ExecutionMode;
use crate::conformance::{LONG, Subject, active, eventually, one_at_a_time, runtime_from, small};
use crate::error::{CallError, RecvTimeoutError, SendTimeoutError, Unavailable};
use crate::kernel::FailureReason;
use crate::{
    BackendType, Error, KernelHandle, KernelRegistration, KernelState, LaunchOptions, MetalCode,
    MetalConfig, MetalMode, PortableCode, RingKernelRuntime, RuntimeBuilder, RuntimeConfig,
    WaitStrategy,
};

fn builder(mode: MetalMode, config: RuntimeConfig) -> RuntimeBuilder {
    RingKernelRuntime::builder()
        .backend(BackendType::Metal)
        .device(0)
        .config(RuntimeConfig {
            metal: MetalConfig {
                mode,
                ..config.metal
            },
            // Its slices run on this machine's cores, beside everything else.
            stall_timeout: config.stall_timeout.or(Some(2 * LONG)),
            ..config
        })
}

fn missing() -> Option<String> {
    let missing = fake::gpus().is_empty();
    let required = std::env::var_os("RINGKERNEL_REQUIRE_COMPILERS");
    assert!(!missing || required.is_none(), "no C++ compiler (c++)");
    missing.then(|| "no C++ compiler (c++)".to_owned())
}

macro_rules! mode {
    ($module:ident, $mode:ident) => {
        mod $module {
            use super::*;

            pub(super) struct Metal;

            impl Subject for Metal {
                const ECHO_BYTES: u64 = 1 << 20;
                const PING_PONGS: u32 = 20_000;

                fn builder_with(config: RuntimeConfig) -> RuntimeBuilder {
                    builder(MetalMode::$mode, config)
                }

                fn missing() -> Option<String> {
                    missing()
                }
            }

            mod suite {
                crate::conformance! { on a device: crate::backend::metal::tests::$module::Metal }

                mod traces {
                    crate::conformance! { no traces: crate::backend::metal::tests::$module::Metal }
                }

                mod shared_rings {
                    crate::conformance! { no shared rings: crate::backend::metal::tests::$module::Metal }
                }
            }
        }
    };
}

mode!(resident, Resident);
mode!(exchange, Exchange);

/// The fake, which nothing else uses meanwhile; `None`, and the reason printed, where there is none.
struct Fake {
    _one: MutexGuard<'static, ()>,
}

impl Fake {
    fn get() -> Option<Self> {
        let one = one_at_a_time();
        match missing() {
            None => Some(Self { _one: one }),
            Some(reason) => {
                println!("skipped: {reason}");
                None
            }
        }
    }

    fn arm(&self, fault: u32) {
        fake::FAULT.store(fault, Ordering::SeqCst);
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.arm(0);
        // What hung goes on, and what it holds is freed.
        if !std::thread::panicking() {
            eventually("the end of all slices", || {
                fake::COMMITTED.load(Ordering::SeqCst) == 0
            });
            eventually("the end of all buffers", || {
                fake::BUFFERS.load(Ordering::SeqCst) == 0
            });
        }
    }
}

fn resident() -> RingKernelRuntime {
    runtime_from(builder(MetalMode::Resident, RuntimeConfig::default()))
}

#[test]
fn a_device_cannot_change_what_was_received() {
    let Some(_fake) = Fake::get() else { return };
    let runtime = resident();
    let kernel = active(&runtime, "echo", LaunchOptions::default());
    kernel.check_that_replies_stay();
}

#[test]
fn devices_are_described_and_chosen() {
    let Some(fake) = Fake::get() else { return };
    let runtime = RingKernelRuntime::builder()
        .backend(BackendType::Metal)
        .device_name("metal 1")
        .build()
        .unwrap();
    assert_eq!(runtime.default_device(), 1);
    let info = runtime.devices().swap_remove(0);
    assert_eq!(
        (info.name.as_str(), info.memory_limit),
        ("Fake Metal 0", 1 << 30)
    );
    let metal = info.metal.unwrap();
    assert_eq!((metal.registry_id, metal.max_block_threads), (100, 1024));
    assert!(metal.unified_memory && !metal.removable);
    drop(runtime);
    // It is for those who ask for it.
    let best = RingKernelRuntime::builder().build().unwrap();
    assert_ne!(best.backend(), BackendType::Metal);
    fake.arm(fake::NO_DEVICES);
    match builder(MetalMode::Auto, RuntimeConfig::default()).build() {
        Err(Error::BackendUnavailable { backend, reason }) => {
            assert_eq!(backend, "metal");
            assert!(!reason.is_empty());
        }
        other => panic!("{other:?}"),
    }
}

/// The mode that the probe finds, and why.
fn probed() -> (ExecutionMode, String) {
    let runtime = runtime_from(builder(MetalMode::Auto, RuntimeConfig::default()));
    let kernel = active(&runtime, "test.count", small());
    assert_eq!(kernel.call_bytes(b"x", &mut [0; 16], LONG), Ok(12));
    let metal = runtime.devices().swap_remove(0).metal.unwrap();
    (metal.mode, metal.mode_reason)
}

#[test]
fn the_probe_tells_devices_apart() {
    let Some(fake) = Fake::get() else { return };
    // A machine without a core to spare may fail it now and then.
    eventually("resident mode", || {
        let (mode, reason) = probed();
        mode == ExecutionMode::Resident && reason.contains("the probe saw 512 messages")
    });
    for (fault, expected) in [
        (fake::BLIND, "the probe failed: "),
        (
            fake::FAILING_PROBE,
            "the probe failed: device 'Fake Metal 0' is lost",
        ),
        (
            fake::OLD_COMPILER,
            "no memory that is coherent with the host: handler: unknown",
        ),
    ] {
        fake.arm(fault);
        let (mode, reason) = probed();
        assert_eq!(mode, ExecutionMode::Exchange, "{reason}");
        assert!(reason.contains(expected), "{reason}");
    }
}

#[test]
fn a_device_that_sees_nothing_while_it_runs_exchanges_messages_all_the_same() {
    let Some(fake) = Fake::get() else { return };
    fake.arm(fake::BLIND);
    for (mode, wait) in [
        (MetalMode::Exchange, WaitStrategy::Spin),
        (MetalMode::Exchange, WaitStrategy::Park),
        (MetalMode::Resident, WaitStrategy::Spin),
    ] {
        let runtime = runtime_from(builder(mode, RuntimeConfig::default()));
        let options = LaunchOptions {
            wait: Some(wait),
            ..small()
        };
        let kernel = active(&runtime, "test.count", options);
        for count in 1..=100_u64 {
            let mut reply = [0; 16];
            assert_eq!(kernel.call_bytes(b"x", &mut reply, LONG), Ok(12));
            assert_eq!(reply[..8], count.to_ne_bytes());
        }
        kernel.deactivate().unwrap();
        kernel.activate().unwrap();
        assert_eq!(kernel.call_bytes(b"x", &mut [0; 16], LONG), Ok(12));
        kernel.terminate().unwrap();
    }
}

#[test]
fn slices_keep_coming_and_state_goes_from_one_to_the_next() {
    let Some(_fake) = Fake::get() else { return };
    for wait in [WaitStrategy::Spin, WaitStrategy::Park] {
        let runtime = resident();
        let options = LaunchOptions {
            wait: Some(wait),
            ..small()
        };
        let kernel = active(&runtime, "test.count", options);
        let mut count = 0_u64;
        let mut call = |kernel: &KernelHandle| {
            count += 1;
            let mut reply = [0; 16];
            kernel.call_bytes(b"x", &mut reply, LONG).unwrap();
            assert_eq!(reply[..8], count.to_ne_bytes());
        };
        let begin = Instant::now();
        while kernel.metrics().slices < 20 {
            call(&kernel);
            assert!(begin.elapsed() < LONG);
        }
        for _ in 0..5 {
            kernel.deactivate().unwrap();
            // One may wait still, and one be on its way.
            eventually("no slices while it is inactive", no_slices);
            kernel.activate().unwrap();
            call(&kernel);
        }
    }
}

/// Whether no slices come, for a while.
fn no_slices() -> bool {
    let slices = fake::SLICES.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(20));
    fake::COMMITTED.load(Ordering::SeqCst) == 0 && fake::SLICES.load(Ordering::SeqCst) == slices
}

/// A kernel that costs more polls than it takes, and then has nothing to do.
#[test]
fn idle_slices_are_not_longer_because_busy_ones_were_short() {
    let Some(_fake) = Fake::get() else { return };
    let code = PortableCode::new(include_str!("../../../kernels/echo.rk")).loop_iterations(2_000);
    let runtime = builder(MetalMode::Resident, RuntimeConfig::default())
        .register(KernelRegistration::new("dear").any_message().portable(code))
        .build()
        .unwrap();
    let kernel = active(&runtime, "dear", small());
    for _ in 0..2_000 {
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    }
    // A slice that is too long would keep the next one waiting.
    let slices = kernel.metrics().slices;
    let begin = Instant::now();
    eventually("more slices", || kernel.metrics().slices >= slices + 5);
    assert!(begin.elapsed() < LONG / 10, "{:?}", begin.elapsed());
}

/// Commands are answered though nobody waits for a slice.
#[test]
fn commands_are_never_slept_through() {
    let Some(_fake) = Fake::get() else { return };
    // The thread sleeps for a second at most: a command that it slept through would not be answered in time.
    let config = RuntimeConfig {
        heartbeat_interval: Duration::from_secs(60),
        termination_timeout: Duration::from_millis(900),
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(builder(MetalMode::Resident, config));
    let options = LaunchOptions {
        wait: Some(WaitStrategy::Park),
        ..small()
    };
    let kernel = active(&runtime, "echo", options);
    for _ in 0..200 {
        kernel.deactivate().unwrap();
        kernel.activate().unwrap();
    }
}

#[test]
fn an_idle_kernel_that_parks_has_no_slices() {
    let Some(_fake) = Fake::get() else { return };
    for mode in [MetalMode::Resident, MetalMode::Exchange] {
        let config = RuntimeConfig {
            heartbeat_interval: Duration::from_millis(500),
            ..RuntimeConfig::default()
        };
        let runtime = runtime_from(builder(mode, config));
        let options = LaunchOptions {
            wait: Some(WaitStrategy::Park),
            ..small()
        };
        let kernel = active(&runtime, "echo", options);
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
        eventually("sleep", no_slices);
        let heartbeats = kernel.metrics().heartbeats;
        eventually("signs of life while it sleeps", || {
            kernel.metrics().heartbeats > heartbeats
        });
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    }
}

fn expect_lost(runtime: &RingKernelRuntime, kernel: &KernelHandle, expected: &str) {
    let lost = Unavailable::DeviceLost;
    assert_eq!(
        kernel.send_bytes(b"x"),
        Err(SendTimeoutError::Unavailable(lost))
    );
    let failure = kernel.status().failure.unwrap();
    assert_eq!(failure.reason, FailureReason::DeviceLost);
    assert!(failure.message.contains(expected), "{failure}");
    assert!(matches!(
        runtime.launch("echo", 1, 1, small()),
        Err(Error::DeviceLost { .. })
    ));
}

#[test]
fn a_command_buffer_that_fails_loses_the_device() {
    let Some(fake) = Fake::get() else { return };
    for (fault, expected) in [
        (fake::FAILING, "it took too long (2)"),
        (fake::NO_COMMAND_BUFFER, "cannot be committed"),
    ] {
        let runtime = resident();
        let (kernel, silent) = (
            active(&runtime, "echo", small()),
            active(&runtime, "sink", small()),
        );
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| kernel.recv_bytes_timeout(&mut [0; 8], LONG));
            let caller = scope.spawn(|| silent.call_bytes(b"z", &mut [0; 8], LONG));
            std::thread::sleep(Duration::from_millis(20));
            let begin = Instant::now();
            fake.arm(fault);
            let lost = Unavailable::DeviceLost;
            assert_eq!(
                receiver.join().unwrap(),
                Err(RecvTimeoutError::Unavailable(lost))
            );
            assert_eq!(caller.join().unwrap(), Err(CallError::Unavailable(lost)));
            assert!(begin.elapsed() < LONG / 10, "{:?}", begin.elapsed());
        });
        expect_lost(&runtime, &kernel, expected);
        let report = runtime.complete_shutdown().unwrap();
        assert_eq!(report.failed_kernels.len(), 2);
        assert!(report.requests.adds_up(), "{report}");
        fake.arm(0);
        // Another runtime opens the device anew.
        drop((kernel, silent));
        let kernel = active(&resident(), "echo", small());
        drop(kernel);
    }
}

#[test]
fn a_slice_that_never_ends_is_reported_in_time_and_left_behind() {
    let Some(fake) = Fake::get() else { return };
    let config = RuntimeConfig {
        termination_timeout: Duration::from_millis(300),
        stall_timeout: Some(Duration::from_secs(2)),
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(builder(MetalMode::Resident, config));
    let kernel = active(&runtime, "echo", small());
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    kernel.deactivate().unwrap();
    eventually("the end of the slice that waited", || {
        fake::COMMITTED.load(Ordering::SeqCst) == 0
    });
    fake.arm(fake::HANGING);
    let begin = Instant::now();
    assert!(matches!(kernel.activate(), Err(Error::Timeout { .. })));
    assert!(begin.elapsed() < LONG / 2);
    eventually("the loss", || kernel.status().state == KernelState::Failed);
    expect_lost(&runtime, &kernel, "nothing came of a slice");
    // Bounded, although the slices still hang.
    let begin = Instant::now();
    drop((runtime, kernel));
    assert!(begin.elapsed() < LONG / 2);
    assert!(fake::COMMITTED.load(Ordering::SeqCst) > 0);
    assert!(
        fake::BUFFERS.load(Ordering::SeqCst) > 0,
        "kept by what uses it"
    );
}

/// Far longer than the termination timeout: as a system that has other work to do.
#[test]
fn a_slice_that_comes_late_loses_no_device() {
    let Some(fake) = Fake::get() else { return };
    let config = RuntimeConfig {
        termination_timeout: Duration::from_millis(300),
        ..RuntimeConfig::default()
    };
    for mode in [MetalMode::Resident, MetalMode::Exchange] {
        let runtime = runtime_from(builder(mode, config.clone()));
        let kernel = active(&runtime, "echo", small());
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
        fake.arm(fake::HANGING);
        kernel.send_bytes(b"late").unwrap();
        std::thread::sleep(Duration::from_secs(4));
        assert_eq!(kernel.status().state, KernelState::Active);
        fake.arm(0);
        assert_eq!(kernel.recv_bytes_timeout(&mut [0; 8], LONG), Ok(4));
        assert_eq!(kernel.call_bytes(b"again", &mut [0; 8], LONG), Ok(5));
    }
}

#[test]
fn what_cannot_be_launched_says_why() {
    let Some(fake) = Fake::get() else { return };
    let runtime = builder(MetalMode::Resident, RuntimeConfig::default())
        .register(KernelRegistration::new("wrong").metal(MetalCode::source(
            "RK_HANDLER {\n  uint good = 1u;\n  uint bad = nothing;\n}",
        )))
        .register(
            KernelRegistration::new("floats").portable(PortableCode::new(
                "#define RK_USE_F64\nRK_HANDLER { rk_out_f64(0u, rk_in_f64(0u)); rk_reply(8u); }",
            )),
        )
        .register(KernelRegistration::new("cpu").cpu_handler(|_, _| Ok(())))
        .register(
            KernelRegistration::new("many")
                .portable(PortableCode::new("RK_HANDLER { rk_reply(4u); }").replies(17)),
        )
        .build()
        .unwrap();
    match runtime.launch("wrong", 1, 1, small()) {
        Err(Error::Compile { kernel, log }) => {
            assert_eq!(kernel, "wrong");
            assert!(log.contains("handler:3:"), "{log}");
        }
        other => panic!("{other:?}"),
    }
    match runtime.launch("floats", 1, 1, small()) {
        Err(Error::Compile { log, .. }) => {
            assert!(log.contains("this_device_has_no_64_bit_floats"), "{log}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        runtime.launch("cpu", 1, 1, small()),
        Err(Error::NoHandler {
            backend: "metal",
            ..
        })
    ));
    for (kernel, threads, expected) in [("many", 1, "queue_capacity"), ("echo", 513, "block size")]
    {
        match runtime.launch(kernel, 1, threads, small()) {
            Err(Error::InvalidOption { option, .. }) => assert_eq!(option, expected),
            other => panic!("{other:?}"),
        }
    }
    for fault in [fake::NO_MEMORY, fake::NO_QUEUE] {
        fake.arm(fault);
        let refused = runtime.launch("echo", 1, 1, small());
        match fault {
            fake::NO_MEMORY => assert!(matches!(refused, Err(Error::OutOfMemory { .. }))),
            _ => assert!(matches!(refused, Err(Error::DriverFailed { .. }))),
        }
    }
    fake.arm(0);
    assert_eq!(runtime.memory_in_use(0).unwrap(), 0);
    let kernel = active(&runtime, "echo", small());
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
}

#[test]
fn the_library_is_one_text() {
    let source = super::device::library_source("RK_HANDLER {}", true);
    assert!(source.starts_with("#define RK_SYSTEM_SCOPE\n"));
    // The runtime compiler finds no files of ours.
    let ours = source.matches("#include \"").count();
    assert_eq!(ours, source.matches("#include \"on_cpu.h\"").count());
    assert!(source.contains("RK_FN void rk_run(RK_THREAD Rk& rk)"));
}
