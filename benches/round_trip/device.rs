//! What else there is to know of a device: latency after idle gaps and beside other kernels, how long an end takes, how much
//! memory a kernel takes.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use ringkernel::{Dim3, KernelHandle, LaunchOptions, time::now_ns_ordered};
use serde_json::{Value, json};

use crate::paths::{self, fill};
use crate::shared::{TIMEOUT, Target, pinned, runtime};
use crate::{Config, Failure, row};

/// How long nothing is sent, and how many messages of each path are then measured.
const GAPS: [(Duration, usize); 4] = [
    (Duration::ZERO, 20_000),
    (Duration::from_micros(100), 5_000),
    (Duration::from_millis(1), 1_000),
    (Duration::from_millis(10), 200),
];

/// Kernels that take turns on a device, and that share one where all of them stay.
const SHARED_BY: [usize; 4] = [1, 2, 4, 8];
const RESIDENT: [usize; 3] = [1, 8, 64];

/// Round trips with idle gaps before each message.
pub fn gaps(config: &Config) -> Result<Vec<Value>, Failure> {
    let mut paths = paths::with_gaps(config)?;
    let mut rows = Vec::new();
    for (gap, messages) in GAPS {
        println!("\n48-byte payload, {gap:?} after the last reply, round trip in ns");
        row::head();
        let rounds = if config.quick { 1 } else { 5 };
        let mut histograms = vec![Histogram::new(3)?; paths.len()];
        for _ in 0..rounds {
            for (path, histogram) in paths.iter_mut().zip(&mut histograms) {
                path.round(
                    config,
                    messages / if config.quick { 5 } else { 1 },
                    gap,
                    histogram,
                )?;
            }
        }
        let floor = histograms[0].value_at_quantile(0.5);
        for (path, histogram) in paths.iter().zip(&histograms) {
            let mut row = row::print(path.name, path.backend, histogram, floor);
            row["gap_ns"] = json!(gap.as_nanos() as u64);
            rows.push(row);
        }
    }
    Ok(rows)
}

/// Round trips of one kernel while others are active on the same device, idle or called in turns.
pub fn sharing(config: &Config) -> Result<Vec<Value>, Failure> {
    let target = Target::of(config);
    let messages = if config.quick { 2_000 } else { 20_000 };
    println!("\n48-byte payload, beside other active kernels on the device, round trip in ns");
    row::head();
    let mut rows = Vec::new();
    let numbers: &[usize] = match target {
        Target::Cuda => &RESIDENT,
        _ => &SHARED_BY,
    };
    for kernels in numbers {
        let runtime = runtime(config, target, false)?;
        let kernels = (0..*kernels)
            .map(|_| {
                let options = LaunchOptions {
                    queue_capacity: Some(64),
                    ..pinned::<48>(config, target)
                };
                let kernel = runtime.launch("echo", Dim3::x(1), Dim3::x(1), options)?;
                kernel.activate()?;
                Ok(kernel)
            })
            .collect::<Result<Vec<KernelHandle>, Failure>>()?;
        for (name, called) in [("one_called", 1), ("all_called", kernels.len())] {
            if name == "all_called" && called == 1 {
                continue;
            }
            let mut histogram = Histogram::new(3)?;
            let (mut payload, mut reply) = ([0; 48], [0; 48]);
            for message in 0..messages {
                fill(&mut payload, message as u64);
                let begin = now_ns_ordered();
                kernels[message % called].call_bytes(&payload, &mut reply, TIMEOUT)?;
                histogram.record((now_ns_ordered() - begin).max(1))?;
                if reply != payload {
                    return Err(format!("{name}: message {message} came back changed").into());
                }
            }
            let name = format!("{} kernels, {name}", kernels.len());
            let mut row = row::print(&name, target.backend().name(), &histogram, 0);
            row["kernels"] = json!(kernels.len());
            rows.push(row);
        }
    }
    Ok(rows)
}

/// How long launches, activations and terminations take, and how much memory a default `echo`.
pub fn life(config: &Config) -> Result<Value, Failure> {
    let target = Target::of(config);
    let runtime = runtime(config, target, true)?;
    let device = runtime.default_device();
    let rounds = if config.quick { 50 } else { 500 };
    let names = ["launch", "activate", "deactivate", "terminate"];
    let mut histograms = vec![Histogram::new(3)?; names.len()];
    let (mut memory, mut claimed) = (0, 0);
    for _ in 0..rounds {
        let mut times = Vec::with_capacity(names.len());
        let mut begin = Instant::now();
        let mut lap = || times.push(std::mem::replace(&mut begin, Instant::now()).elapsed());
        let options = LaunchOptions {
            queue_capacity: None,
            message_size: None,
            ..pinned::<48>(config, target)
        };
        let kernel = runtime.launch("echo", Dim3::x(1), Dim3::x(1), options)?;
        lap();
        kernel.activate()?;
        lap();
        kernel.deactivate()?;
        lap();
        kernel.activate()?;
        kernel.call_bytes(b"in the middle of it", &mut [0; 48], TIMEOUT)?;
        memory = runtime.memory_in_use(device)?;
        claimed = kernel.metrics().memory_bytes;
        begin = Instant::now();
        kernel.terminate()?;
        times.push(begin.elapsed());
        for (histogram, time) in histograms.iter_mut().zip(&times) {
            histogram.record((time.as_nanos() as u64).max(1))?;
        }
    }
    println!("\nlife of a default `echo`, times in ns");
    row::head();
    let rows: Vec<Value> = names
        .iter()
        .zip(&histograms)
        .map(|(name, histogram)| row::print(name, target.backend().name(), histogram, 0))
        .collect();
    println!(
        "memory of it: {memory} bytes in use on the device's account, {claimed} in its metrics"
    );
    Ok(json!({ "times": rows, "memory_bytes": memory, "metrics_memory_bytes": claimed }))
}
