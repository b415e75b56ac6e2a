//! What would take more memory than the process can have is `Error::OutOfMemory`: by the limits of
//! a control group and of the process itself. Each is tried in a process of its own, which has the
//! limit.

#![cfg(all(feature = "std", target_os = "linux"))]
#![allow(clippy::unwrap_used)]

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use ringkernel::thread::realtime::{Need, RealtimeThread};
use ringkernel::{BackendType, Error, LaunchOptions, RingKernelRuntime, RuntimeConfig};

/// What a process of its own may have.
const LIMIT: u64 = 300 << 20;

/// What it asks for.
const TOO_MUCH: usize = 512 << 20;

fn runtime(config: RuntimeConfig) -> Result<RingKernelRuntime, Error> {
    RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .config(config)
        .build()
}

fn child() -> Command {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    child.arg("in_a_process_with_a_limit");
    // Reading symbols takes more memory than is left.
    child.env("RUST_BACKTRACE", "0");
    child
}

fn passes(mut child: Command) {
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn what_a_processs_own_limit_does_not_allow_is_out_of_memory() {
    // Threads of the C library reserve addresses that they never use.
    for (which, more) in [(libc::RLIMIT_DATA, 0), (libc::RLIMIT_AS, 128 << 20)] {
        let mut child = child();
        let limit = libc::rlimit {
            rlim_cur: (LIMIT + more) as libc::rlim_t,
            rlim_max: (LIMIT + more) as libc::rlim_t,
        };
        child.env("MALLOC_ARENA_MAX", "1");
        // SAFETY: only a system call, whose pointer is to what the closure holds.
        unsafe {
            child.pre_exec(move || match libc::setrlimit(which, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        passes(child);
    }
}

#[test]
fn what_a_control_group_does_not_allow_is_out_of_memory_and_no_kill() {
    let Some(group) = MemoryGroup::new() else {
        println!("skipped: this process may not make a control group that limits memory");
        return;
    };
    let mut child = child();
    let join = std::ffi::CString::new(format!("{}/cgroup.procs", group.0)).unwrap();
    // SAFETY: only system calls; the pointers are to what the closure holds. 0 stands for the
    // process that writes it.
    unsafe {
        child.pre_exec(move || {
            let file = libc::open(join.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            match libc::write(file, c"0".as_ptr().cast(), 1) {
                1 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    passes(child);
}

/// A control group that limits memory, of version 1 or 2; gone when dropped.
struct MemoryGroup(String);

impl MemoryGroup {
    fn new() -> Option<Self> {
        let name = format!("rk-memory-{}", std::process::id());
        for (root, limit) in [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
        ] {
            let group = Self(format!("{root}/{name}"));
            if std::fs::create_dir(&group.0).is_ok()
                && std::fs::write(format!("{}/{limit}", group.0), LIMIT.to_string()).is_ok()
            {
                return Some(group);
            }
        }
        None
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Its last process may still be on its way out.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn is_out_of_memory<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::OutOfMemory { asked, available, .. }) if available < asked)
}

#[test]
#[ignore = "run by other tests, in a process with a limit"]
fn in_a_process_with_a_limit() {
    let runtime = runtime(RuntimeConfig::default()).unwrap();
    let limit = runtime.devices()[0].memory_limit;
    assert!(limit <= LIMIT + (128 << 20), "{limit}");
    // By what the device takes for its limit, and by what there is.
    let unlimited = self::runtime(RuntimeConfig {
        cpu_memory_limit: Some(u64::MAX),
        ..RuntimeConfig::default()
    })
    .unwrap();
    for runtime in [&runtime, &unlimited] {
        for (queue_capacity, message_size, max_pending_calls) in [
            (TOO_MUCH / 4096, 4000, 1),
            (16, TOO_MUCH / 48, 1),
            (1, TOO_MUCH / 200, 200),
        ] {
            let options = LaunchOptions {
                queue_capacity: Some(queue_capacity),
                message_size: Some(message_size),
                max_pending_calls,
                ..LaunchOptions::default()
            };
            let launched = runtime.launch("echo", 1, 1, options);
            assert!(is_out_of_memory(&launched), "{launched:?}");
            assert_eq!(runtime.memory_in_use(0).unwrap(), 0);
        }
        // What fits still runs.
        let options = LaunchOptions {
            queue_capacity: Some(1024),
            message_size: Some(4000),
            max_pending_calls: 1,
            ..LaunchOptions::default()
        };
        let kernel = runtime.launch("echo", 1, 1, options).unwrap();
        kernel.activate().unwrap();
        kernel
            .call_bytes(b"x", &mut [0; 4000], Duration::from_secs(30))
            .unwrap();
        kernel.terminate().unwrap();
    }
    let letters = self::runtime(RuntimeConfig {
        dead_letter_capacity: TOO_MUCH >> 20,
        dead_letter_bytes: 1 << 20,
        ..RuntimeConfig::default()
    });
    assert!(is_out_of_memory(&letters), "{letters:?}");
    // The system may refuse the thread, or the thread its stack.
    let thread = RealtimeThread::new("rt")
        .prefault_stack(TOO_MUCH, Need::Required)
        .spawn(|_| ());
    assert!(thread.is_err());
}

#[test]
fn large_messages_make_the_default_capacity_smaller() {
    let runtime = runtime(RuntimeConfig::default()).unwrap();
    for (message_size, most_bytes) in [(48, 4 << 20), (2_000_000, 64 << 20)] {
        let options = LaunchOptions {
            message_size: Some(message_size),
            max_pending_calls: 1,
            ..LaunchOptions::default()
        };
        let kernel = runtime.launch("echo", 1, 1, options).unwrap();
        let taken = kernel.metrics().memory_bytes;
        assert!(taken <= most_bytes, "{message_size}: {taken}");
        kernel.activate().unwrap();
        let mut reply = vec![0; message_size];
        let length = kernel
            .call_bytes(&vec![7; message_size], &mut reply, Duration::from_secs(30))
            .unwrap();
        assert_eq!(length, message_size);
        kernel.terminate().unwrap();
    }
}
