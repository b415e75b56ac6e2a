//! What happens when a driver fails: the faults are made by a layer of our own (`tests/fault_layer`). Each test runs in a
//! process of its own, because a layer is chosen by the environment, and because some leave a device behind.

#![cfg(all(feature = "vulkan", unix))]

#[path = "support/vulkan.rs"]
mod vulkan;

use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::ffi::{CStr, CString, c_void};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use ringkernel::backend::{DeviceKind, ExecutionMode, VulkanDeviceInfo};
use ringkernel::error::{CallError, RecvTimeoutError, SendTimeoutError, Unavailable};
use ringkernel::kernel::FailureReason;
use ringkernel::time::now_ns;
use ringkernel::{
    BackendType, Error, KernelHandle, KernelRegistration, KernelState, LaunchOptions,
    RingKernelRuntime, RuntimeConfig, ShaderCode, VulkanConfig, VulkanMode, WaitStrategy,
};

const LONG: Duration = Duration::from_secs(30);

/// Set in the child processes.
const LAYER: &str = "RINGKERNEL_TEST_FAULT_LAYER";

/// The faults of `tests/fault_layer/lib.rs`.
#[derive(Clone, Copy)]
enum Fault {
    None = 0,
    LoseAtSubmit = 1,
    LoseAtWait = 2,
    Hang = 3,
    NoMemory = 4,
    NoDevices = 5,
    NoDriver = 6,
    NoDevice = 7,
    NoPipeline = 8,
    NoSubmission = 9,
}

/// Where cargo puts the layer, which is built as an example.
fn layer() -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let file = format!("{DLL_PREFIX}fault_layer{DLL_SUFFIX}");
    let layer = test.parent()?.parent()?.join("examples").join(file);
    layer.exists().then_some(layer)
}

/// True in the child process, where the test shall go on. In the parent, runs the child and reports what it says.
fn in_child(name: &str) -> bool {
    if std::env::var_os(LAYER).is_some() {
        return true;
    }
    if let Some(reason) = vulkan::missing() {
        println!("skipped: {reason}");
        return false;
    }
    let Some(layer) = layer() else {
        assert!(
            std::env::var_os("RINGKERNEL_REQUIRE_VULKAN").is_none(),
            "the layer is not built: cargo build --example fault_layer"
        );
        println!("skipped: the layer is not built (cargo build --example fault_layer)");
        return false;
    };
    let folder = std::env::temp_dir().join(format!("rk-fault-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let manifest = format!(
        r#"{{ "file_format_version": "1.2.0", "layer": {{ "name": "VK_LAYER_RINGKERNEL_fault", "type": "GLOBAL",
            "library_path": "{}", "api_version": "1.3.0", "implementation_version": "1",
            "description": "makes calls fail" }} }}"#,
        layer.display()
    );
    std::fs::write(folder.join("fault.json"), manifest).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("VK_LAYER_PATH", &folder)
        .env("VK_INSTANCE_LAYERS", "VK_LAYER_RINGKERNEL_fault")
        .env(LAYER, &layer)
        // Mesa's own layer crashes where enumeration finds no device or fails (22.3).
        .env("NODEVICE_SELECT", "1")
        .output()
        .unwrap();
    let _ = std::fs::remove_dir_all(&folder);
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{}: {text}", output.status);
    assert!(text.contains("1 passed"), "{text}");
    false
}

/// A function of the layer, which the loader has loaded into this process or will.
fn function(name: &CStr) -> *mut c_void {
    let path = CString::new(std::env::var(LAYER).unwrap()).unwrap();
    // SAFETY: the library is the layer, whose initialisers do nothing.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        assert!(!library.is_null());
        let function = libc::dlsym(library, name.as_ptr());
        assert!(!function.is_null());
        function
    }
}

/// Tells the layer what is to fail.
fn arm(fault: Fault, after: u32) {
    // SAFETY: this is its signature.
    let arm: extern "C" fn(u32, u32) = unsafe { std::mem::transmute(function(c"rk_fault_arm")) };
    arm(fault as u32, after);
}

/// Tells the layer what devices are to claim.
fn claim(claims: u32) {
    // SAFETY: this is its signature.
    let claim: extern "C" fn(u32) = unsafe { std::mem::transmute(function(c"rk_fault_claim")) };
    claim(claims);
}

/// The claims of `tests/fault_layer/lib.rs`.
const DISCRETE: u32 = 1;
const UNCACHED: u32 = 2;
const BATCHED: u32 = 4;
const NO_CLOCK: u32 = 8;
const OTHER_CLOCK: u32 = 16;

fn build(mode: VulkanMode) -> Result<RingKernelRuntime, Error> {
    build_with(mode, None)
}

fn build_with(
    mode: VulkanMode,
    stall_timeout: Option<Duration>,
) -> Result<RingKernelRuntime, Error> {
    RingKernelRuntime::builder()
        .backend(BackendType::Vulkan)
        .device(0)
        .config(RuntimeConfig {
            termination_timeout: Duration::from_secs(2),
            stall_timeout,
            vulkan: VulkanConfig {
                mode,
                ..VulkanConfig::default()
            },
            ..RuntimeConfig::default()
        })
        .build()
}

fn active(runtime: &RingKernelRuntime, id: &str) -> KernelHandle {
    let options = LaunchOptions {
        queue_capacity: Some(16),
        wait: Some(WaitStrategy::Spin),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch(id, 1, 1, options).unwrap();
    activate(&kernel);
    kernel
}

/// Beside busy processes a software driver may not compile and run the first slice within the
/// configured time.
fn activate(kernel: &KernelHandle) {
    let begin = Instant::now();
    loop {
        match kernel.activate() {
            Err(Error::Timeout { .. }) if begin.elapsed() < LONG => {}
            activated => break activated.unwrap(),
        }
    }
}

/// Every blocked call ends with `DeviceLost`, long before its timeout; other devices go on; everything can be dropped.
fn expect_loss(mode: VulkanMode, fault: Fault) {
    let other = build(mode).unwrap();
    let unharmed = active(&other, "echo");
    let runtime = build_with(mode, Some(Duration::from_secs(2))).unwrap();
    let kernel = active(&runtime, "echo");
    let silent = active(&runtime, "sink");
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    let lost = Unavailable::DeviceLost;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| kernel.recv_bytes_timeout(&mut [0; 8], LONG));
        let caller = scope.spawn(|| silent.call_bytes(b"z", &mut [0; 8], LONG));
        std::thread::sleep(Duration::from_millis(50));
        // In exchange mode the device is only used when there is something to carry.
        arm(fault, 0);
        let begin = Instant::now();
        loop {
            match silent.send_bytes(b"x") {
                Ok(()) | Err(SendTimeoutError::Timeout) if begin.elapsed() < LONG => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                end => {
                    assert_eq!(end, Err(SendTimeoutError::Unavailable(lost)));
                    break;
                }
            }
        }
        assert_eq!(
            receiver.join().unwrap(),
            Err(RecvTimeoutError::Unavailable(lost))
        );
        assert_eq!(caller.join().unwrap(), Err(CallError::Unavailable(lost)));
        assert!(begin.elapsed() < LONG / 2, "{:?}", begin.elapsed());
    });
    let failure = kernel.status().failure.unwrap();
    assert_eq!(kernel.status().state, KernelState::Failed);
    assert_eq!(failure.reason, FailureReason::DeviceLost);
    println!("{failure}");
    // Nothing is launched on it any more, and the reason is still known.
    match runtime.launch("echo", 1, 1, LaunchOptions::default()) {
        Err(Error::DeviceLost { reason, .. }) => assert!(failure.message.contains(&reason)),
        outcome => panic!("{outcome:?}"),
    }
    assert_eq!(unharmed.call_bytes(b"alive", &mut [0; 8], LONG), Ok(5));
    kernel.terminate().unwrap();
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.failed_kernels.len(), 2);
    assert!(report.requests.adds_up(), "{report}");
    drop((kernel, silent, runtime));
    assert_eq!(unharmed.call_bytes(b"still", &mut [0; 8], LONG), Ok(5));
    arm(Fault::None, 0);
    // A new device is as good as any.
    let again = build(mode).unwrap();
    let kernel = active(&again, "echo");
    assert_eq!(kernel.call_bytes(b"again", &mut [0; 8], LONG), Ok(5));
}

#[test]
fn a_device_lost_at_a_submission_ends_every_wait() {
    if in_child("a_device_lost_at_a_submission_ends_every_wait") {
        expect_loss(VulkanMode::Resident, Fault::LoseAtSubmit);
    }
}

#[test]
fn a_device_lost_while_it_is_waited_for_ends_every_wait() {
    if in_child("a_device_lost_while_it_is_waited_for_ends_every_wait") {
        expect_loss(VulkanMode::Resident, Fault::LoseAtWait);
    }
}

#[test]
fn a_device_lost_in_exchange_mode_ends_every_wait() {
    if in_child("a_device_lost_in_exchange_mode_ends_every_wait") {
        expect_loss(VulkanMode::Exchange, Fault::LoseAtSubmit);
    }
}

#[test]
fn a_device_lost_in_staged_mode_ends_every_wait() {
    if in_child("a_device_lost_in_staged_mode_ends_every_wait") {
        expect_loss(VulkanMode::Staged, Fault::LoseAtWait);
    }
}

#[test]
fn slices_that_never_end_lose_their_device() {
    if in_child("slices_that_never_end_lose_their_device") {
        expect_loss(VulkanMode::Resident, Fault::Hang);
    }
}

/// Far longer than the termination timeout: as a driver that gets no processor time.
#[test]
fn a_driver_that_stands_still_for_seconds_is_late_and_not_lost() {
    if !in_child("a_driver_that_stands_still_for_seconds_is_late_and_not_lost") {
        return;
    }
    for mode in [
        VulkanMode::Resident,
        VulkanMode::Exchange,
        VulkanMode::Staged,
    ] {
        let runtime = build(mode).unwrap();
        let kernel = active(&runtime, "echo");
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
        arm(Fault::Hang, 0);
        let begin = Instant::now();
        // Who waits meanwhile waits as long as they asked for, and no longer.
        let timeout = Duration::from_millis(100);
        while begin.elapsed() < Duration::from_secs(5) {
            let outcome = kernel.call_bytes(b"well", &mut [0; 8], timeout);
            assert!(
                matches!(
                    outcome,
                    Ok(4) | Err(CallError::Timeout | CallError::TooManyCalls)
                ),
                "{outcome:?}"
            );
            assert_eq!(kernel.status().state, KernelState::Active);
        }
        arm(Fault::None, 0);
        assert_eq!(kernel.call_bytes(b"again", &mut [0; 8], LONG), Ok(5));
        kernel.deactivate().unwrap();
        activate(&kernel);
        kernel.terminate().unwrap();
        active(&runtime, "echo").terminate().unwrap();
    }
}

/// A device that never answers does not keep a caller that is done with it.
#[test]
fn a_device_that_stands_still_is_closed_in_time() {
    if !in_child("a_device_that_stands_still_is_closed_in_time") {
        return;
    }
    let runtime = build(VulkanMode::Resident).unwrap();
    let kernel = active(&runtime, "echo");
    arm(Fault::Hang, 0);
    std::thread::sleep(Duration::from_millis(50));
    let begin = Instant::now();
    assert!(matches!(kernel.terminate(), Err(Error::Timeout { .. })));
    drop((runtime, kernel));
    // Two seconds for each; on software a device in use would be given thirty.
    assert!(begin.elapsed() < LONG * 2 / 3, "{:?}", begin.elapsed());
}

#[test]
fn memory_that_the_driver_lacks_is_an_error_of_that_launch_alone() {
    if !in_child("memory_that_the_driver_lacks_is_an_error_of_that_launch_alone") {
        return;
    }
    for mode in [
        VulkanMode::Resident,
        VulkanMode::Exchange,
        VulkanMode::Staged,
    ] {
        let runtime = build(mode).unwrap();
        let kernel = active(&runtime, "echo");
        let used = runtime.memory_in_use(0).unwrap();
        // Each of the allocations of a launch in turn.
        let mut failures = 0;
        for after in 0.. {
            arm(Fault::NoMemory, after);
            match runtime.launch("sink", 1, 1, LaunchOptions::default()) {
                Err(Error::OutOfMemory { .. }) => failures += 1,
                Ok(_) => break,
                Err(error) => panic!("{error}"),
            }
            assert_eq!(runtime.memory_in_use(0).unwrap(), used, "left behind");
        }
        assert!(failures >= 3, "{failures} allocations");
        arm(Fault::None, 0);
        assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    }
}

#[test]
fn a_submission_without_memory_is_tried_again() {
    if !in_child("a_submission_without_memory_is_tried_again") {
        return;
    }
    for mode in [
        VulkanMode::Resident,
        VulkanMode::Exchange,
        VulkanMode::Staged,
    ] {
        let runtime = build(mode).unwrap();
        let kernel = active(&runtime, "echo");
        for _ in 0..10 {
            arm(Fault::NoSubmission, 0);
            exchange(&kernel, 200);
        }
        arm(Fault::None, 0);
    }
}

#[test]
fn a_pipeline_that_is_not_made_is_an_error_of_that_launch_alone() {
    if !in_child("a_pipeline_that_is_not_made_is_an_error_of_that_launch_alone") {
        return;
    }
    let runtime = build(VulkanMode::Resident).unwrap();
    let kernel = active(&runtime, "echo");
    arm(Fault::NoPipeline, 0);
    assert!(matches!(
        runtime.launch("sink", 1, 1, LaunchOptions::default()),
        Err(Error::OutOfMemory { .. })
    ));
    arm(Fault::None, 0);
    active(&runtime, "sink").send_bytes(b"x").unwrap();
    assert_eq!(kernel.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
}

#[test]
fn drivers_that_vanish_are_an_error_with_its_reason() {
    if !in_child("drivers_that_vanish_are_an_error_with_its_reason") {
        return;
    }
    // The layer is loaded with the first instance.
    drop(build(VulkanMode::Exchange).unwrap());
    for (fault, expected) in [
        (Fault::NoDevices, "no driver has a device"),
        (Fault::NoDriver, "list no devices"),
        (Fault::NoDevice, "cannot be opened"),
    ] {
        arm(fault, 0);
        match build(VulkanMode::Exchange) {
            Err(Error::BackendUnavailable { reason, .. }) => {
                assert!(reason.contains(expected), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        arm(fault, 0);
        let best = RingKernelRuntime::builder().build().unwrap();
        assert_eq!(best.backend(), BackendType::Cpu);
    }
    arm(Fault::None, 0);
    build(VulkanMode::Exchange).unwrap();
}

/// Verified round trips.
fn exchange(kernel: &KernelHandle, messages: u32) {
    let mut reply = [0; 48];
    for number in 0..messages {
        let mut message = [0; 48];
        for (index, bytes) in message.chunks_exact_mut(4).enumerate() {
            bytes.copy_from_slice(
                &number
                    .wrapping_mul(31)
                    .wrapping_add(index as u32)
                    .to_ne_bytes(),
            );
        }
        assert_eq!(kernel.call_bytes(&message, &mut reply, LONG), Ok(48));
        assert_eq!(reply, message, "message {number}");
    }
}

fn vulkan_info(runtime: &RingKernelRuntime) -> VulkanDeviceInfo {
    let devices = runtime.devices();
    devices[runtime.default_device()].vulkan.clone().unwrap()
}

#[test]
fn a_device_whose_dispatches_see_nothing_new_runs_in_exchange_mode() {
    if !in_child("a_device_whose_dispatches_see_nothing_new_runs_in_exchange_mode") {
        return;
    }
    claim(BATCHED);
    let runtime = build(VulkanMode::Auto).unwrap();
    let info = vulkan_info(&runtime);
    assert_eq!(info.mode, ExecutionMode::Exchange, "{}", info.mode_reason);
    assert!(
        info.mode_reason.contains("the probe failed"),
        "{}",
        info.mode_reason
    );
    println!("{}", info.mode_reason);
    exchange(&active(&runtime, "echo"), 2000);
    // What a shader's clock lacks is told between dispatches as well.
    assert!(is_traced(&runtime));
    drop(runtime);
    // So it does when its rings are elsewhere.
    let staged = build(VulkanMode::Staged).unwrap();
    exchange(&active(&staged, "echo"), 2000);
    assert!(is_traced(&staged));
}

#[test]
fn memory_that_is_not_cached_is_not_polled() {
    if !in_child("memory_that_is_not_cached_is_not_polled") {
        return;
    }
    claim(UNCACHED);
    let runtime = build(VulkanMode::Auto).unwrap();
    let info = vulkan_info(&runtime);
    assert!(
        info.placements
            .iter()
            .all(|placement| !placement.host_cached)
    );
    assert_eq!(info.mode, ExecutionMode::Exchange);
    assert!(
        info.mode_reason.contains("not cached"),
        "{}",
        info.mode_reason
    );
    exchange(&active(&runtime, "echo"), 2000);
    // Write-combined memory has its fences: nothing is lost where it is used all the same.
    let resident = build(VulkanMode::Resident).unwrap();
    exchange(&active(&resident, "echo"), 200_000);
}

#[test]
fn the_best_hardware_is_chosen_if_it_passes_the_probe() {
    if !in_child("the_best_hardware_is_chosen_if_it_passes_the_probe") {
        return;
    }
    claim(DISCRETE);
    let best = RingKernelRuntime::builder().build().unwrap();
    if best.backend() != BackendType::Vulkan {
        panic!(
            "{}",
            vulkan_info(&build(VulkanMode::Auto).unwrap()).mode_reason
        );
    }
    let device = &best.devices()[best.default_device()];
    assert_eq!(device.kind, DeviceKind::DiscreteGpu);
    assert_eq!(vulkan_info(&best).mode, ExecutionMode::Resident);
    exchange(&active(&best, "echo"), 2000);
    // No probe, no choice; but whoever asks for Vulkan gets it.
    claim(DISCRETE | BATCHED);
    let best = RingKernelRuntime::builder().build().unwrap();
    assert_eq!(best.backend(), BackendType::Cpu);
    let asked = RingKernelRuntime::builder().backend(BackendType::Vulkan);
    let asked = asked.build().unwrap();
    assert_eq!(vulkan_info(&asked).mode, ExecutionMode::Exchange);
}

/// Launches an echo that shall be traced, and one that shall not; whether the first one is, after a message each.
fn is_traced(runtime: &RingKernelRuntime) -> bool {
    let launch = |trace_every| {
        let options = LaunchOptions {
            queue_capacity: Some(16),
            trace_every: NonZeroU32::new(trace_every),
            ..LaunchOptions::default()
        };
        let kernel = runtime.launch("echo", 1, 1, options).unwrap();
        activate(&kernel);
        exchange(&kernel, 100);
        kernel
    };
    let (plain, traced) = (launch(0), launch(1));
    assert_eq!(plain.traces(), None);
    let bytes = |kernel: &KernelHandle| kernel.metrics().memory_bytes;
    match traced.traces() {
        None => assert_eq!(bytes(&plain), bytes(&traced)),
        Some(traces) => {
            assert!(!traces.is_empty());
            let now = now_ns();
            let second = 1_000_000_000;
            let is_recent = |seen: u64| seen <= now && seen + 20 * second > now;
            assert!(traces.iter().all(|trace| is_recent(trace.seen_ns)));
        }
    }
    traced.traces().is_some()
}

#[test]
fn a_device_whose_shaders_have_no_clock_traces_nothing() {
    if !in_child("a_device_whose_shaders_have_no_clock_traces_nothing") {
        return;
    }
    assert!(is_traced(&build(VulkanMode::Resident).unwrap()));
    claim(NO_CLOCK);
    for mode in [
        VulkanMode::Resident,
        VulkanMode::Exchange,
        VulkanMode::Staged,
    ] {
        assert!(!is_traced(&build(mode).unwrap()), "{mode:?}");
    }
    // Nor does it take a module that reads one.
    let traced = include_bytes!("../shaders/echo.traced.spv").as_slice();
    // SAFETY: a module of our own, validated when it is built.
    let traced = unsafe { ShaderCode::spirv(traced) };
    let runtime = RingKernelRuntime::builder()
        .backend(BackendType::Vulkan)
        .device(0)
        .register(KernelRegistration::new("clock").shader(traced))
        .build()
        .unwrap();
    match runtime.launch("clock", 1, 1, LaunchOptions::default()) {
        Err(Error::InvalidCode { reason, .. }) => {
            assert!(
                reason.contains("has no clock that shaders can read"),
                "{reason}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn stamps_of_another_clock_are_not_believed() {
    if !in_child("stamps_of_another_clock_are_not_believed") {
        return;
    }
    for mode in [
        VulkanMode::Resident,
        VulkanMode::Exchange,
        VulkanMode::Staged,
    ] {
        claim(OTHER_CLOCK);
        assert!(!is_traced(&build(mode).unwrap()), "{mode:?}");
        claim(0);
        assert!(is_traced(&build(mode).unwrap()), "{mode:?}");
    }
}
