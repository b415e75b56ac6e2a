//! Handlers that misbehave, and memory that is not there.

use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::{CallError, RecvTimeoutError, Unavailable};
use ringkernel::kernel::FailureReason;
use ringkernel::{
    CudaConfig, Error, KernelState, LaunchOptions, MetalConfig, RuntimeConfig, VulkanConfig,
    WaitStrategy,
};

use super::kernels::{Opened, UNSTUCK};
use super::{LONG, Subject, active, eventually, runtime, runtime_from, small};

pub fn a_panic_fails_its_kernel_and_no_other<S: Subject>() {
    let runtime = runtime::<S>();
    for host_wait in [WaitStrategy::Spin, WaitStrategy::Park] {
        let options = LaunchOptions {
            host_wait: Some(host_wait),
            ..LaunchOptions::default()
        };
        let kernel = active(&runtime, "test.panic", options);
        let other = active(&runtime, "echo", LaunchOptions::default());
        kernel.send_bytes(b"before").unwrap();
        let mut reply = [0; 8];
        thread::scope(|scope| {
            let blocked = scope.spawn(|| {
                let first = kernel.recv_bytes_timeout(&mut [0; 8], LONG);
                (first, kernel.recv_bytes_timeout(&mut [0; 8], LONG))
            });
            thread::sleep(Duration::from_millis(5));
            assert_eq!(
                kernel.call_bytes(b"panic", &mut reply, LONG),
                Err(CallError::Unavailable(Unavailable::Failed))
            );
            let (before, after) = blocked.join().unwrap();
            assert_eq!(before, Ok(6));
            assert_eq!(
                after,
                Err(RecvTimeoutError::Unavailable(Unavailable::Failed))
            );
        });
        let status = kernel.status();
        assert_eq!(status.state, KernelState::Failed);
        let failure = status.failure.unwrap();
        assert_eq!(failure.reason, FailureReason::Panic);
        assert_eq!(failure.message, "told to panic");
        assert_eq!(failure.block, Some(0));
        assert_eq!(failure.request.unwrap().payload, b"panic");
        assert!(matches!(
            kernel.activate(),
            Err(Error::InvalidTransition { from: "Failed", .. })
        ));
        assert_eq!(other.call_bytes(b"fine", &mut reply, LONG), Ok(4));
        // Its threads and cores are given back; its state stays.
        kernel.terminate().unwrap();
        assert_eq!(kernel.status().state, KernelState::Failed);
        assert!(kernel.terminate().is_err());
        other.terminate().unwrap();
    }
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.failed_kernels.len(), 2);
    assert!(report.requests.adds_up(), "{report}");
    assert_eq!(report.requests.dead_lettered, 2);
    assert_eq!(report.requests.delivered, 4);
}

pub fn a_panic_in_one_block_ends_the_whole_grid<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = runtime
        .launch("test.panic", 3, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    for message in [&b"a"[..], b"b", b"c", b"panic"] {
        kernel.send_bytes(message).unwrap();
    }
    eventually("the failure", || {
        kernel.status().state == KernelState::Failed
    });
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.requests.adds_up(), "{report}");
    assert_eq!(report.requests.accepted, 4);
    assert_eq!(report.requests.dead_lettered, 1);
    assert!(report.errors.is_empty(), "{report}");
}

pub fn a_handler_that_never_returns_is_reported_in_time<S: Subject>() {
    let timeout = Duration::from_millis(100);
    let config = RuntimeConfig {
        termination_timeout: timeout,
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(S::builder_with(config));
    let kernel = active(&runtime, "test.stuck", LaunchOptions::default());
    let other = active(&runtime, "echo", LaunchOptions::default());
    for _ in 0..3 {
        kernel.send_bytes(b"x").unwrap();
    }
    thread::sleep(Duration::from_millis(10));
    let begin = Instant::now();
    let error = kernel.terminate().unwrap_err();
    let took = begin.elapsed();
    assert!(matches!(&error, Error::Timeout { after, .. } if *after == timeout));
    assert!(took >= timeout.mul_f64(0.999), "{took:?}");
    assert!(
        took < Duration::from_secs(4),
        "{took:?}: the default is 5 s"
    );
    let status = kernel.status();
    assert_eq!(status.state, KernelState::Failed);
    assert_eq!(status.failure.unwrap().reason, FailureReason::Stuck);
    assert_eq!(
        kernel.recv_bytes_timeout(&mut [0; 8], LONG),
        Err(RecvTimeoutError::Unavailable(Unavailable::Failed))
    );
    assert_eq!(other.call_bytes(b"fine", &mut [0; 8], LONG), Ok(4));
    // Shutting down finds another one, says so, and ends.
    let second = active(&runtime, "test.stuck", LaunchOptions::default());
    second.send_bytes(b"x").unwrap();
    thread::sleep(Duration::from_millis(10));
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        matches!(report.errors[..], [Error::Timeout { .. }]),
        "{report}"
    );
    assert!(report.requests.adds_up(), "{report}");
    assert_eq!(report.requests.dead_lettered, 2, "one in each handler");
    assert_eq!(report.requests.returned, 2);
    drop((runtime, kernel, second, other));
    // The threads that were left behind end once their handlers do.
    let _open = Opened::new(&UNSTUCK);
    #[cfg(target_os = "linux")]
    eventually("the end of the threads left behind", || {
        !std::fs::read_dir("/proc/self/task").unwrap().any(|task| {
            // A thread may end between the listing and the reading.
            std::fs::read_to_string(task.unwrap().path().join("comm"))
                .is_ok_and(|name| name.starts_with("rk-test.stuck"))
        })
    });
}

pub fn memory_that_is_not_there_is_an_error<S: Subject>() {
    // Room for one, but not for two.
    let enough = {
        let runtime = runtime::<S>();
        let _kernel = active(&runtime, "echo", LaunchOptions::default());
        runtime.memory_in_use(0).unwrap() * 3 / 2
    };
    let config = RuntimeConfig {
        cpu_memory_limit: Some(enough),
        vulkan: VulkanConfig {
            memory_limit: Some(enough),
            ..VulkanConfig::default()
        },
        cuda: CudaConfig {
            memory_limit: Some(enough),
            ..CudaConfig::default()
        },
        metal: MetalConfig {
            memory_limit: Some(enough),
            ..MetalConfig::default()
        },
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(S::builder_with(config));
    let first = active(&runtime, "echo", LaunchOptions::default());
    let error = runtime
        .launch("echo", 1, 1, LaunchOptions::default())
        .unwrap_err();
    match &error {
        Error::OutOfMemory {
            asked, available, ..
        } => assert!(asked > available, "{error}"),
        other => panic!("{other}"),
    }
    assert_eq!(first.call_bytes(b"fine", &mut [0; 8], LONG), Ok(4));
    first.terminate().unwrap();
    drop(first);
    let _ = runtime.kernels();
    active(&runtime, "echo", LaunchOptions::default())
        .terminate()
        .unwrap();
    // More than any machine has, without a limit.
    let unlimited = runtime_from(S::builder());
    let huge = LaunchOptions {
        queue_capacity: Some(1 << 24),
        message_size: Some((1 << 24) - 1),
        ..LaunchOptions::default()
    };
    assert!(matches!(
        unlimited.launch("echo", 1, 1, huge),
        Err(Error::OutOfMemory { .. })
    ));
    assert_eq!(unlimited.memory_in_use(0).unwrap(), 0);
}

pub fn a_failed_launch_leaves_nothing_behind<S: Subject>() {
    let config = RuntimeConfig {
        cpu_memory_limit: Some(1 << 20),
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(S::builder_with(config));
    // The first of four blocks fits, the second does not.
    assert!(matches!(
        runtime.launch("echo", 4, 1, LaunchOptions::default()),
        Err(Error::OutOfMemory { .. })
    ));
    let bare = ringkernel::KernelRegistration::new("test.no_code");
    runtime.register(bare).unwrap();
    assert!(matches!(
        runtime.launch("test.no_code", 1, 1, LaunchOptions::default()),
        Err(Error::NoHandler { .. })
    ));
    assert_eq!(runtime.memory_in_use(0).unwrap(), 0);
    assert!(runtime.kernels().is_empty());
    let report = runtime.complete_shutdown();
    assert_eq!(report.unwrap().kernels, 0);
}

pub fn a_failed_kernel_that_nothing_refers_to_gives_everything_back<S: Subject>() {
    let runtime = runtime::<S>();
    let named = || LaunchOptions {
        name: Some("the only one".into()),
        wait: Some(ringkernel::WaitStrategy::Spin),
        ..LaunchOptions::default()
    };
    // More than the bridge has places for, if each kept one.
    for _ in 0..20 {
        let kernel = runtime.launch("test.panic", 1, 1, named()).unwrap();
        kernel.activate().unwrap();
        let mut client = kernel.client_bytes().unwrap();
        client.try_send_bytes(b"panic").unwrap();
        eventually("the failure", || {
            kernel.status().state == KernelState::Failed
        });
        // While it is referred to, it keeps its name and can be asked.
        assert!(matches!(
            runtime.launch("test.panic", 1, 1, named()),
            Err(Error::InvalidOption { option: "name", .. })
        ));
        let status = runtime.kernels();
        assert_eq!(status.len(), 1);
        assert_eq!(status[0].state, KernelState::Failed);
        drop(client);
        drop(kernel);
        eventually("its memory", || runtime.memory_in_use(0).unwrap() == 0);
        assert!(runtime.kernels().is_empty());
        assert!(runtime.kernel("the only one").is_none());
    }
    let kernel = active(&runtime, "echo", named());
    assert_eq!(kernel.call_bytes(b"x", &mut [0; 8], LONG), Ok(1));
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.failed_kernels.len(), 20);
    assert_eq!(report.kernels, 21);
    assert!(report.requests.adds_up(), "{report}");
}

pub fn panics_of_several_blocks_are_all_accounted_for<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = runtime
        .launch("test.panic", 2, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    // Both blocks have theirs before either looks.
    let (mut sender, _receiver) = kernel.split_bytes().unwrap();
    sender.try_send_bytes(b"panic").unwrap();
    let second = sender.try_send_bytes(b"panic");
    eventually("the failure", || {
        kernel.status().state == KernelState::Failed
    });
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.requests.adds_up(), "{report}");
    let accepted = 1 + u64::from(second.is_ok());
    assert_eq!(report.requests.accepted, accepted);
    // The second one either killed its block too, or was never looked at.
    assert_eq!(
        report.requests.dead_lettered + report.requests.returned,
        accepted
    );
    assert!(report.requests.dead_lettered >= 1);
}

/// Of handlers for devices: those on the CPU may reply as often as they like.
pub fn a_handler_that_replies_too_often_fails_its_kernel_and_no_other<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = runtime.launch("test.panic", 2, 1, small()).unwrap();
    kernel.activate().unwrap();
    let other = active(&runtime, "echo", small());
    assert_eq!(kernel.call_bytes(b"fine", &mut [0; 8], LONG), Ok(4));
    kernel.send_bytes(b"panic").unwrap();
    // For the other block; the kernel may have failed already.
    let _ = kernel.send_bytes(b"after");
    eventually("the failure", || {
        kernel.status().state == KernelState::Failed
    });
    let failure = kernel.status().failure.unwrap();
    assert_eq!(failure.reason, FailureReason::Fault);
    assert!(failure.message.contains("more replies"), "{failure}");
    // Waits end, with the reason.
    let end = loop {
        match kernel.recv_bytes_timeout(&mut [0; 8], LONG) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(end, RecvTimeoutError::Unavailable(Unavailable::Failed));
    assert_eq!(other.call_bytes(b"well", &mut [0; 8], LONG), Ok(4));
    kernel.terminate().unwrap();
    assert_eq!(kernel.status().state, KernelState::Failed);
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(report.failed_kernels, [kernel.name()]);
    assert!(report.requests.adds_up(), "{report}");
    // The request that it failed on, and no other.
    assert_eq!(report.requests.dead_lettered, 1, "{report}");
}
