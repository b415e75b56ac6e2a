//! What holds when the CPU's counter cannot be believed.
//!
//! Each test runs in a process of its own, in which reads of the time-stamp counter trap and are
//! answered with what the test wants the counter to show. The system's clock, whose code reads the
//! counter as well, is given the truth.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "counter/fake.rs"]
mod fake;

use std::num::NonZeroU32;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ringkernel::error::RecvTimeoutError;
use ringkernel::thread::periodic::{Periodic, PeriodicWait};
use ringkernel::time::{ClockSource, Deadline, TimestampSource, clock_source, now_ns};
use ringkernel::{
    BackendType, Hlc, KernelHandle, KernelRegistration, LaunchOptions, RingKernelRuntime,
    RuntimeConfig, SendOptions, WaitStrategy,
};

/// Names the case that a process is for.
const CASE: &str = "RINGKERNEL_COUNTER_CASE";

const HOUR_NS: i64 = 3_600_000_000_000;

/// How long waits are, and how long they may take on a machine however loaded.
const TIMEOUT: Duration = Duration::from_millis(500);
const LONG: Duration = Duration::from_secs(20);

/// Runs `body` for each case in a process of its own, where the counter is that of `fake`.
fn in_own_process(test: &str, cases: &[&str], body: impl Fn(&str)) {
    if let Ok(case) = std::env::var(CASE) {
        assert!(fake::install(), "the parent has asked");
        assert_eq!(clock_source(), ClockSource::Counter);
        assert!(fake::reads() > 0, "the clock reads the counter");
        return body(&case);
    }
    if clock_source() != ClockSource::Counter || !fake::is_possible() {
        println!("skipped: the counter is not used on this machine, or cannot be made to trap");
        return;
    }
    for case in cases {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env(CASE, case)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{case}: {text}\n{errors}");
        assert!(text.contains("1 passed"), "{case}: {text}");
    }
}

/// Makes the counter step after a while.
fn step_soon(step_ns: i64) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        std::thread::sleep(TIMEOUT / 5);
        fake::step(step_ns);
    })
}

fn echo(options: LaunchOptions) -> (RingKernelRuntime, KernelHandle) {
    let runtime = RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .build()
        .unwrap();
    let kernel = runtime.launch("echo", 1, 1, options).unwrap();
    kernel.activate().unwrap();
    (runtime, kernel)
}

/// Waits for a reply that does not come.
fn a_wait_lasts_as_long_as_it_should(strategy: &str, disturb: impl FnOnce()) {
    let host_wait = match strategy {
        "spin" => WaitStrategy::Spin,
        "yield" => WaitStrategy::SpinYield,
        "park" => WaitStrategy::Park,
        _ => WaitStrategy::Auto,
    };
    let (_runtime, kernel) = echo(LaunchOptions {
        host_wait: Some(host_wait),
        ..LaunchOptions::default()
    });
    let begin = Instant::now();
    disturb();
    let outcome = kernel.recv_bytes_timeout(&mut [0; 48], TIMEOUT);
    let took = begin.elapsed();
    assert!(matches!(outcome, Err(RecvTimeoutError::Timeout)));
    assert!((TIMEOUT..LONG).contains(&took), "{took:?}");
}

const STRATEGIES: [&str; 4] = ["spin", "yield", "park", "auto"];

#[test]
fn a_wait_ends_in_time_though_the_counter_steps_back() {
    let test = "a_wait_ends_in_time_though_the_counter_steps_back";
    in_own_process(test, &STRATEGIES, |strategy| {
        let mut stepper = None;
        a_wait_lasts_as_long_as_it_should(strategy, || stepper = Some(step_soon(-HOUR_NS)));
        stepper.unwrap().join().unwrap();
    });
}

#[test]
fn no_wait_ends_early_though_the_counter_steps_forward() {
    let test = "no_wait_ends_early_though_the_counter_steps_forward";
    in_own_process(test, &STRATEGIES, |strategy| {
        let mut stepper = None;
        a_wait_lasts_as_long_as_it_should(strategy, || stepper = Some(step_soon(HOUR_NS)));
        stepper.unwrap().join().unwrap();
        // On a busy machine the counter may have stepped after the wait.
        let _ = now_ns();
        assert_eq!(clock_source(), ClockSource::System);
    });
}

#[test]
fn a_wait_ends_in_time_though_the_counter_stops() {
    let test = "a_wait_ends_in_time_though_the_counter_stops";
    in_own_process(test, &STRATEGIES, |strategy| {
        a_wait_lasts_as_long_as_it_should(strategy, fake::stop);
    });
}

#[test]
fn a_deadline_passes_in_time_though_the_counter_steps() {
    let test = "a_deadline_passes_in_time_though_the_counter_steps";
    in_own_process(test, &["-1", "1"], |sign| {
        let sign: i64 = sign.parse().unwrap();
        let begin = Instant::now();
        let deadline = Deadline::after(TIMEOUT);
        let stepper = step_soon(sign * HOUR_NS);
        while !deadline.has_passed() {
            assert!(begin.elapsed() < LONG);
            std::thread::yield_now();
        }
        assert!(begin.elapsed() >= TIMEOUT);
        assert_eq!(deadline.remaining(), Duration::ZERO);
        stepper.join().unwrap();
    });
}

/// A kernel whose handler blocks until it is told that this is over.
struct Blocking {
    _runtime: RingKernelRuntime,
    kernel: KernelHandle,
    has_entered: mpsc::Receiver<()>,
    over: Arc<AtomicBool>,
}

fn blocking(termination_timeout: Duration) -> Blocking {
    let (entered, has_entered) = mpsc::channel();
    let over = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&over);
    let registration = KernelRegistration::new("blocking").cpu_handler(move |_, _| {
        let _ = entered.send(());
        while !is_over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    let runtime = RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .register(registration)
        .config(RuntimeConfig {
            termination_timeout,
            ..RuntimeConfig::default()
        })
        .build()
        .unwrap();
    let options = LaunchOptions {
        extended: true,
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("blocking", 1, 1, options).unwrap();
    kernel.activate().unwrap();
    Blocking {
        _runtime: runtime,
        kernel,
        has_entered,
        over,
    }
}

#[test]
fn terminate_gives_up_in_time_though_the_counter_steps() {
    let test = "terminate_gives_up_in_time_though_the_counter_steps";
    in_own_process(test, &["-1", "1"], |sign| {
        let sign: i64 = sign.parse().unwrap();
        let allowed = Duration::from_secs(1);
        let blocking = blocking(allowed);
        blocking.kernel.send_bytes(b"x").unwrap();
        blocking.has_entered.recv_timeout(LONG).unwrap();
        let begin = Instant::now();
        let stepper = step_soon(sign * HOUR_NS);
        assert!(blocking.kernel.terminate().is_err());
        let took = begin.elapsed();
        assert!((allowed..LONG).contains(&took), "{took:?}");
        blocking.over.store(true, Ordering::Relaxed);
        stepper.join().unwrap();
    });
}

#[test]
fn an_expired_message_is_not_handled_though_the_counter_steps_back() {
    let test = "an_expired_message_is_not_handled_though_the_counter_steps_back";
    in_own_process(test, &[""], |_| {
        let blocking = blocking(LONG);
        let (mut sender, _receiver) = blocking.kernel.split_bytes().unwrap();
        sender.try_send_bytes(b"holds the kernel up").unwrap();
        blocking.has_entered.recv_timeout(LONG).unwrap();
        let live = TIMEOUT / 5;
        let options = SendOptions {
            time_to_live: Some(live),
            ..SendOptions::default()
        };
        sender.try_send_bytes_with(b"expires", &options).unwrap();
        fake::step(-HOUR_NS);
        std::thread::sleep(2 * live);
        blocking.over.store(true, Ordering::Relaxed);
        let begin = Instant::now();
        while blocking.kernel.metrics().processed < 2 {
            assert!(begin.elapsed() < LONG);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(blocking.kernel.metrics().dropped, 1);
        assert!(blocking.has_entered.try_recv().is_err());
    });
}

/// All threads but the caller's have a counter that is far off, as on a core of another socket.
#[test]
fn messages_live_as_long_as_they_should_though_cores_differ() {
    let test = "messages_live_as_long_as_they_should_though_cores_differ";
    in_own_process(test, &["-1", "1"], |sign| {
        let sign: i64 = sign.parse().unwrap();
        fake::skew_others(sign * HOUR_NS);
        let (_runtime, kernel) = echo(LaunchOptions {
            extended: true,
            trace_every: NonZeroU32::new(1),
            ..LaunchOptions::default()
        });
        let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
        let mut last = 0;
        for _ in 0..100 {
            let options = SendOptions {
                timestamp: true,
                time_to_live: Some(LONG),
                ..SendOptions::default()
            };
            sender.try_send_bytes_with(b"x", &options).unwrap();
            let reply = receiver.recv_ref_timeout(LONG).unwrap();
            let stamp = reply.extension().unwrap().timestamp_ns;
            assert!(stamp > last, "{stamp} after {last}");
            last = stamp;
        }
        kernel.terminate().unwrap();
        let traces = kernel.traces().unwrap();
        assert!(!traces.is_empty());
        for trace in traces {
            assert!(trace.queue_time().unwrap() < LONG);
            assert!(trace.handler_time() < LONG);
            assert!(trace.seen_ns.abs_diff(trace.sent_ns.unwrap()) < LONG.as_nanos() as u64);
        }
    });
}

#[test]
fn timestamps_increase_and_stay_with_the_time_of_day_though_the_counter_steps() {
    let test = "timestamps_increase_and_stay_with_the_time_of_day_though_the_counter_steps";
    in_own_process(test, &["-1", "1", "0"], |sign| {
        let sign: i64 = sign.parse().unwrap();
        let (clock, source) = (Hlc::new(), TimestampSource::new());
        let (mut last_time, mut last_now, mut last_stamp) = (clock.now(), 0, 0);
        for round in 0..300 {
            if round == 100 {
                match sign {
                    0 => fake::stop(),
                    sign => fake::step(sign * HOUR_NS),
                }
            }
            let (time, now, stamp) = (clock.now(), now_ns(), source.next());
            assert!(time > last_time && now >= last_now && stamp > last_stamp);
            (last_time, last_now, last_stamp) = (time, now, stamp);
            let of_day = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let off = u128::from(now).abs_diff(of_day.as_nanos());
            // Room for a system that corrects its time of day, and for one that is busy.
            assert!(off < LONG.as_nanos(), "round {round}: off by {off}");
            if round % 30 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        assert_eq!(clock_source(), ClockSource::System);
    });
}

#[test]
fn a_periodic_loop_keeps_its_period_though_the_counter_steps() {
    let test = "a_periodic_loop_keeps_its_period_though_the_counter_steps";
    in_own_process(test, &["-1", "1"], |sign| {
        let sign: i64 = sign.parse().unwrap();
        for wait in [PeriodicWait::Sleep, PeriodicWait::Spin] {
            let begin = Instant::now();
            let period = Duration::from_millis(5);
            let mut control = Periodic::every(period).wait(wait).start().unwrap();
            for round in 0..20 {
                if round == 5 {
                    fake::step(sign * HOUR_NS);
                }
                let tick = control.wait().unwrap();
                let due = period * (u32::try_from(tick.index).unwrap() + 1);
                assert!(begin.elapsed() >= due);
                assert!(tick.lateness < LONG);
            }
        }
    });
}

#[test]
fn heartbeats_have_a_sound_age_though_the_counter_steps() {
    let test = "heartbeats_have_a_sound_age_though_the_counter_steps";
    in_own_process(test, &["-1", "1"], |sign| {
        let sign: i64 = sign.parse().unwrap();
        let (_runtime, kernel) = echo(LaunchOptions::default());
        let call = || kernel.call_bytes(b"x", &mut [0; 48], LONG).unwrap();
        call();
        fake::step(sign * HOUR_NS);
        call();
        // Its last sign of life was given before or after the step, and is as old as the test is.
        let age = kernel.metrics().heartbeat_age.unwrap_or_default();
        assert!(age < LONG, "{age:?}");
        kernel.terminate().unwrap();
        let telemetry = kernel.metrics().telemetry.unwrap();
        assert!(telemetry.handler_max < LONG, "{telemetry:?}");
    });
}

/// A kernel that has found the counter unstable says so by the name of its clock source.
#[test]
fn a_counter_that_the_system_distrusts_is_not_read() {
    if std::env::var(CASE).is_ok() {
        assert!(fake::install());
        let (_runtime, kernel) = echo(LaunchOptions::default());
        let mut reply = [0; 48];
        kernel.call_bytes(b"x", &mut reply, LONG).unwrap();
        let begin = Instant::now();
        assert!(kernel.recv_bytes_timeout(&mut reply, TIMEOUT).is_err());
        assert!(begin.elapsed() >= TIMEOUT);
        let _ = (now_ns(), Hlc::new().now(), Deadline::after(TIMEOUT));
        assert_eq!(clock_source(), ClockSource::System);
        assert_eq!(fake::reads(), 0);
        return;
    }
    // Another file in the place of the kernel's, for one process.
    let dir = std::env::temp_dir().join(format!("ringkernel-source-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("hpet"), "hpet\n").unwrap();
    let script = "set -e
        for which in current available; do
            mount --bind \"$1/hpet\" \\
                /sys/devices/system/clocksource/clocksource0/${which}_clocksource || exit 77
        done
        exec \"$2\" a_counter_that_the_system_distrusts_is_not_read --exact --nocapture";
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(&dir)
        .arg(std::env::current_exe().unwrap())
        .env(CASE, "hpet")
        .output();
    let _ = std::fs::remove_dir_all(&dir);
    let output = match output {
        Ok(output) if fake::is_possible() => output,
        _ => return println!("skipped: there is no `unshare`, or reads cannot be made to trap"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) || errors.contains("unshare") {
        return println!("skipped: no mounts of our own here: {errors}");
    }
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("1 passed"), "{text}");
}
