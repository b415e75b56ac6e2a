//! How late a periodic loop's rounds begin, beside `cyclictest` (Debian's `rt-tests`), which measures the same of the same machine: in turns,
//! with the same core, schedule, locked memory and wake-up latency.
//!
//! `cargo bench --bench periodic -- [--quick] [--core N] [--json FILE]`

#[path = "support/machine.rs"]
mod machine;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, ExitCode};
use std::time::Duration;

use hdrhistogram::Histogram;
use lexopt::prelude::*;
use ringkernel::thread::affinity::usable_cores;
use ringkernel::thread::periodic::{Periodic, PeriodicWait};
use ringkernel::thread::realtime::{Need, RealtimeReport, RealtimeThread, Schedule};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

/// Rates, in rounds a second.
const RATES: [u64; 2] = [1_000, 4_000];

const PRIORITY: u8 = 80;

/// How long before its time a loop that spins at the end wakes up.
const SPIN: Duration = Duration::from_micros(100);

/// Latencies that cyclictest tells apart, in microseconds.
const CYCLICTEST_US: u64 = 100_000;

struct Config {
    quick: bool,
    core: usize,
    json: Option<String>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("periodic: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Config, Failure> {
    let mut config = Config {
        quick: false,
        core: *usable_cores().last().ok_or("no core")?,
        json: None,
    };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            // Cargo passes this to every benchmark.
            Long("bench") => {}
            Long("quick") => config.quick = true,
            Long("core") => config.core = arguments.value()?.parse()?,
            Long("json") => config.json = Some(arguments.value()?.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(config)
}

/// Lateness of some rounds of our loop, in nanoseconds, and what the thread was granted.
fn ours(
    config: &Config,
    rate: u64,
    rounds: u64,
    wait: PeriodicWait,
) -> Result<(Vec<u64>, RealtimeReport), Failure> {
    let period = Duration::from_secs(1) / u32::try_from(rate)?;
    let thread = RealtimeThread::new("rk-periodic")
        .cores(&[config.core], Need::Required)
        .lock_memory(Need::BestEffort)
        .prefault_stack(64 * 1024, Need::BestEffort)
        .wake_latency(Duration::ZERO, Need::BestEffort)
        .schedule(Schedule::Fifo(PRIORITY), Need::BestEffort)
        .spawn(move |_| {
            let mut late = Vec::with_capacity(rounds as usize);
            let mut periodic = Periodic::every(period).wait(wait).start()?;
            for _ in 0..rounds {
                match periodic.wait() {
                    Ok(tick) => late.push(tick.lateness.as_nanos() as u64),
                    Err(missed) => late.push(missed.lateness.as_nanos() as u64),
                }
            }
            Ok::<_, ringkernel::Error>(late)
        })?;
    let report = thread.report().clone();
    let late = thread.join().map_err(|_| "the loop panicked")??;
    Ok((late, report))
}

/// The same of cyclictest, in whole microseconds; `None` if it is not installed.
fn cyclictest(config: &Config, rate: u64, rounds: u64) -> Result<Option<Vec<u64>>, Failure> {
    let output = Command::new("cyclictest")
        .args(["--quiet", "--mlockall", "--threads=1"])
        .arg(format!("--priority={PRIORITY}"))
        .arg(format!("--affinity={}", config.core))
        .arg(format!("--interval={}", 1_000_000 / rate))
        .arg(format!("--loops={rounds}"))
        .arg(format!("--histogram={CYCLICTEST_US}"))
        .output();
    let output = match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: cyclictest (rt-tests) is not installed");
            return Ok(None);
        }
        output => output?,
    };
    if !output.status.success() {
        // Without the right to be scheduled so it does nothing at all.
        println!(
            "skipped: cyclictest: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        return Ok(None);
    }
    let mut late = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let mut words = line.split_whitespace();
        match (
            words.next().map(str::parse::<u64>),
            words.next().map(str::parse::<usize>),
        ) {
            (Some(Ok(us)), Some(Ok(count))) => late.extend(std::iter::repeat_n(us * 1_000, count)),
            _ => {
                // Latencies beyond the histogram are known by their number only, and count as its end.
                if let Some(rest) = line.strip_prefix("# Histogram Overflows:") {
                    let count = rest.split_whitespace().next().unwrap_or("0").parse()?;
                    late.extend(std::iter::repeat_n(CYCLICTEST_US * 1_000, count));
                }
            }
        }
    }
    Ok(Some(late))
}

fn run() -> Result<(), Failure> {
    let config = parse()?;
    let machine = machine::describe();
    println!("machine: {}", machine::one_line(&machine));
    let (turns, seconds) = if config.quick { (2, 1) } else { (6, 5) };
    println!(
        "configuration: core {}, SCHED_FIFO {PRIORITY}, memory locked, wake-up latency 0; {turns} turns of {seconds} s each",
        config.core
    );
    let mut rows = Vec::new();
    let mut granted = None;
    for rate in RATES {
        let rounds = rate * seconds;
        let mut all: BTreeMap<&str, Histogram<u64>> = BTreeMap::new();
        let mut record = |name: &'static str, late: Vec<u64>| -> Result<(), Failure> {
            let histogram = match all.entry(name) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => {
                    entry.insert(Histogram::new(3)?)
                }
            };
            for late in late {
                histogram.record(late.max(1))?;
            }
            Ok(())
        };
        for _ in 0..turns {
            if let Some(late) = cyclictest(&config, rate, rounds)? {
                record("cyclictest", late)?;
            }
            let (late, report) = ours(&config, rate, rounds, PeriodicWait::Sleep)?;
            record("sleep", late)?;
            granted.get_or_insert(report);
            let (late, _) = ours(&config, rate, rounds, PeriodicWait::SleepThenSpin(SPIN))?;
            record("sleep, then spin", late)?;
            let (late, _) = ours(&config, rate, rounds, PeriodicWait::Spin)?;
            record("spin", late)?;
        }
        println!("\n{rate} rounds a second, lateness in ns");
        println!(
            "{:<20}{:>9}{:>9}{:>9}{:>10}{:>11}{:>13}",
            "loop", "rounds", "p50", "p99", "p99.9", "max", "x cyclictest"
        );
        let reference = all
            .get("cyclictest")
            .map(|histogram| histogram.value_at_quantile(0.999));
        for (name, histogram) in &all {
            let at = |quantile| histogram.value_at_quantile(quantile);
            let ratio = reference.map(|reference| at(0.999) as f64 / reference.max(1) as f64);
            println!(
                "{name:<20}{:>9}{:>9}{:>9}{:>10}{:>11}{:>13}",
                histogram.len(),
                at(0.5),
                at(0.99),
                at(0.999),
                histogram.max(),
                ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"))
            );
            rows.push(json!({
                "rate": rate,
                "loop": name,
                "rounds": histogram.len(),
                "p50_ns": at(0.5),
                "p99_ns": at(0.99),
                "p99_9_ns": at(0.999),
                "max_ns": histogram.max(),
                "p99_9_by_cyclictest": ratio,
            }));
        }
    }
    let granted = granted.map(|report| report.to_string());
    if let Some(granted) = &granted {
        println!("\n{granted}");
    }
    if let Some(path) = &config.json {
        let report: Value = json!({
            "machine": machine,
            "config": { "core": config.core, "priority": PRIORITY, "turns": turns, "seconds": seconds },
            "granted": granted,
            "rows": rows,
        });
        fs::write(path, format!("{report:#}\n"))?;
        println!("written: {path}");
    }
    Ok(())
}
