//! Every kind of party at once, at random by seed, against ground truth: each message that a party
//! was told is taken is received once or is a dead letter once, and the report, the letters and the
//! counters say the same.
//!
//! A failure prints its seed. `RINGKERNEL_CHAOS_SEED` runs that one scenario,
//! `RINGKERNEL_CHAOS_SECONDS` says how long new ones are tried on each backend (default 3),
//! `RINGKERNEL_CHAOS_BACKEND` which backends: `cpu`, `vulkan` or `both` (the default, as far as
//! they are there).

mod ledger;
mod random;
mod scenario;

// Some of the suite's kernels are for other tests.
#[allow(dead_code)]
#[path = "../conformance/kernels.rs"]
mod kernels;
#[cfg(feature = "vulkan")]
#[path = "../support/vulkan.rs"]
mod vulkan;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ringkernel::{BackendType, RingKernelRuntime, RuntimeBuilder, RuntimeConfig};

/// A scenario that takes so long hangs: each of its waits is bounded by seconds.
const BOUND: Duration = Duration::from_secs(180);

/// What is being done, for the watchdog: when that began, and which scenario it is.
static STEP: Mutex<Option<(Instant, String)>> = Mutex::new(None);

fn begin(scenario: Option<String>) {
    let mut step = STEP.lock().unwrap_or_else(PoisonError::into_inner);
    *step = scenario.map(|scenario| (Instant::now(), scenario));
}

/// Ends the process if a scenario does not end.
fn watch() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let step = STEP.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((since, scenario)) = &*step
                && since.elapsed() > BOUND
            {
                eprintln!("hangs: {scenario}; {}", scenario::steps());
                std::process::exit(101);
            }
        }
    });
}

/// A builder for a backend, by the way that the scenario chooses.
fn builder(backend: BackendType, config: RuntimeConfig, choice: u64) -> RuntimeBuilder {
    #[cfg(feature = "vulkan")]
    if backend == BackendType::Vulkan {
        use ringkernel::VulkanMode;
        let modes = [
            VulkanMode::Resident,
            VulkanMode::Exchange,
            VulkanMode::Staged,
        ];
        return vulkan::builder(modes[(choice % 3) as usize], config);
    }
    let _ = choice;
    RingKernelRuntime::builder().backend(backend).config(config)
}

fn backends() -> Vec<BackendType> {
    let wanted = std::env::var("RINGKERNEL_CHAOS_BACKEND").unwrap_or_else(|_| "both".into());
    let mut backends = Vec::new();
    if wanted != "vulkan" {
        backends.push(BackendType::Cpu);
    }
    #[cfg(feature = "vulkan")]
    if wanted != "cpu" {
        match vulkan::missing() {
            None => backends.push(BackendType::Vulkan),
            Some(reason) => println!("skipped on Vulkan: {reason}"),
        }
    }
    backends
}

/// Runs a scenario, beside a second runtime now and then.
fn run(backend: BackendType, seed: u64) {
    std::thread::scope(|scope| {
        if seed.is_multiple_of(4) {
            scope.spawn(move || scenario::run(backend, !seed));
        }
        scenario::run(backend, seed);
    });
}

#[test]
fn whatever_happens_every_message_is_accounted_for_once() {
    watch();
    let number = |name| {
        std::env::var(name)
            .ok()
            .map(|text: String| text.parse().unwrap())
    };
    let one: Option<u64> = number("RINGKERNEL_CHAOS_SEED");
    let seconds = number("RINGKERNEL_CHAOS_SECONDS").unwrap_or(3);
    let first = one.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        now.unwrap_or_default().as_nanos() as u64 / 1000
    });
    for backend in backends() {
        let until = Instant::now() + Duration::from_secs(seconds);
        let mut seed = first;
        loop {
            let name = format!("RINGKERNEL_CHAOS_SEED={seed} RINGKERNEL_CHAOS_BACKEND={backend}");
            begin(Some(name.clone()));
            let outcome = std::panic::catch_unwind(|| run(backend, seed));
            begin(None);
            if outcome.is_err() {
                panic!("{name}\n{}", scenario::steps());
            }
            if one.is_some() || Instant::now() > until {
                break;
            }
            seed = seed.wrapping_add(1);
        }
        println!("{backend}: seeds {first} to {seed}");
    }
}
