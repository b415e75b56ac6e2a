//! Round trips and one-way streams: ours, those of other queues, and the floor of the same machine, in one run.
//!
//! `cargo bench --bench round_trip -- [--backend cpu|vulkan|cuda|metal] [--device INDEX|NAME] [--mode auto|resident|exchange|staged]
//! [--quick] [--payload 48] [--json FILE]`
//!
//! Every path sends, has the message echoed by another pinned thread, receives it, and compares every byte. The paths
//! take turns in short rounds, so that whatever else happens on the machine happens to all of them.

mod device;
#[path = "../support/machine.rs"]
mod machine;
mod paths;
mod row;
mod shared;
mod streams;
#[cfg(feature = "vulkan")]
mod submit;

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use hdrhistogram::Histogram;
use lexopt::prelude::*;
use ringkernel::{BackendType, VulkanMode};
use serde_json::{Value, json};

/// What a run measures, and where.
struct Config {
    backend: BackendType,
    /// Of a backend with several devices: index, or part of the name.
    device: Option<String>,
    mode: VulkanMode,
    quick: bool,
    json: Option<String>,
    rounds: usize,
    /// Messages of each path in each round.
    messages: usize,
    /// Messages of each stream in each round.
    streamed: usize,
    /// Measure round trips of this payload only, and no streams.
    payload: Option<usize>,
    caller_core: usize,
    kernel_core: usize,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("round_trip: {error}");
            ExitCode::FAILURE
        }
    }
}

type Failure = Box<dyn std::error::Error>;

fn parse() -> Result<Config, Failure> {
    let (mut backend, mut quick, mut json) = (BackendType::Cpu, false, None);
    let (mut device, mut mode) = (None, VulkanMode::Auto);
    let (mut rounds, mut messages, mut payload) = (None, None, None);
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            // Cargo passes this to every benchmark.
            Long("bench") => {}
            Long("backend") => backend = arguments.value()?.string()?.parse()?,
            Long("device") => device = Some(arguments.value()?.string()?),
            Long("mode") => mode = arguments.value()?.string()?.parse()?,
            Long("quick") => quick = true,
            Long("json") => json = Some(arguments.value()?.string()?),
            Long("rounds") => rounds = Some(arguments.value()?.parse()?),
            Long("payload") => payload = Some(arguments.value()?.parse()?),
            Long("messages") => messages = Some(arguments.value()?.parse()?),
            other => return Err(other.unexpected().into()),
        }
    }
    let cores = ringkernel::thread::affinity::usable_cores();
    let [caller_core, kernel_core, ..] = cores[..] else {
        return Err("two cores are needed, one for each end".into());
    };
    Ok(Config {
        backend,
        device,
        mode,
        quick,
        json,
        rounds: rounds.unwrap_or(if quick { 15 } else { 60 }),
        messages: messages.unwrap_or(if quick { 10_000 } else { 20_000 }),
        streamed: if quick { 400_000 } else { 1_000_000 },
        payload,
        caller_core,
        kernel_core,
    })
}

fn run() -> Result<(), Failure> {
    let config = parse()?;
    let machine = machine::describe();
    println!("machine: {}", machine::one_line(&machine));
    println!(
        "configuration: backend {}, {} rounds of {} messages, caller on core {}, kernel on core {}, both spin, \
         kernel telemetry off but where named, rings of {} slots",
        config.backend,
        config.rounds,
        config.messages,
        config.caller_core,
        config.kernel_core,
        shared::CAPACITY,
    );
    ringkernel::thread::affinity::pin_current_thread(config.caller_core)?;
    let described = describe_device(&config)?;

    let mut round_trips = Vec::new();
    let wanted = |payload| config.payload.is_none_or(|only| only == payload);
    if wanted(48) {
        round_trips.extend(measure::<48>(&config)?);
    }
    if wanted(256) {
        round_trips.extend(measure::<256>(&config)?);
    }
    if wanted(1024) {
        round_trips.extend(measure::<1024>(&config)?);
    }
    let mut streams = Vec::new();
    let (mut gaps, mut sharing, mut life) = (Vec::new(), Vec::new(), Value::Null);
    if config.payload.is_none() && config.backend != BackendType::Cpu {
        gaps = device::gaps(&config)?;
        sharing = device::sharing(&config)?;
        life = device::life(&config)?;
    }
    // Streams are sums, which the CPU's own handler makes.
    if config.payload.is_none() && config.backend == BackendType::Cpu {
        streams.extend(streams::measure::<32>(&config)?);
        streams.extend(streams::measure::<1024>(&config)?);
    }

    if let Some(path) = &config.json {
        let report = json!({
            "machine": machine,
            "config": {
                "backend": config.backend.name(),
                "quick": config.quick,
                "rounds": config.rounds,
                "messages_per_round": config.messages,
                "caller_core": config.caller_core,
                "kernel_core": config.kernel_core,
                "wait": "spin",
                "telemetry": false,
                "queue_capacity": shared::CAPACITY,
            },
            "device": described,
            "round_trips": round_trips,
            "gaps": gaps,
            "sharing": sharing,
            "life": life,
            "streams": streams,
        });
        fs::write(path, format!("{report:#}\n"))?;
        println!("written: {path}");
    }
    Ok(())
}

/// All paths with payloads of `N` bytes.
fn measure<const N: usize>(config: &Config) -> Result<Vec<Value>, Failure>
where
    paths::Typed<N>: ringkernel::RingMessage,
{
    let mut measured: Vec<(paths::Path<N>, Histogram<u64>)> = paths::all::<N>(config)?
        .into_iter()
        .map(|path| Ok((path, Histogram::new(3)?)))
        .collect::<Result<_, Failure>>()?;
    for _ in 0..config.rounds {
        for (path, histogram) in &mut measured {
            path.round(config, config.messages, Duration::ZERO, histogram)?;
        }
    }
    println!("\n{N}-byte payload, round trip in ns");
    row::head();
    let floor = measured[0].1.value_at_quantile(0.5);
    let mut rows = Vec::new();
    for (path, histogram) in &measured {
        let mut row = row::print(path.name, path.backend, histogram, floor);
        row["payload_bytes"] = json!(N);
        rows.push(row);
    }
    Ok(rows)
}

/// Says what the device is, and how messages reach its kernels.
fn describe_device(config: &Config) -> Result<Value, Failure> {
    let runtime = shared::runtime(config, shared::Target::of(config), false)?;
    let device = runtime.devices().swap_remove(runtime.default_device());
    if let Some(cuda) = device.cuda {
        println!(
            "device: '{}', CUDA {:?}, compute capability {:?}, {}",
            device.name,
            cuda.driver_version,
            cuda.compute_capability,
            cuda.pci_address.as_deref().unwrap_or("no PCI address")
        );
        println!(
            "rings in {} memory: {}",
            cuda.ring_memory.name(),
            cuda.ring_memory_reason
        );
        return Ok(json!({
            "name": device.name,
            "cuda_version": cuda.driver_version,
            "compute_capability": cuda.compute_capability,
            "pci_address": cuda.pci_address,
            "watchdog": cuda.watchdog,
            "ring_memory": cuda.ring_memory.name(),
            "ring_memory_reason": cuda.ring_memory_reason,
        }));
    }
    if let Some(metal) = device.metal {
        println!(
            "device: '{}', {} mode: {}",
            device.name,
            metal.mode.name(),
            metal.mode_reason
        );
        return Ok(json!({
            "name": device.name,
            "mode": metal.mode.name(),
            "mode_reason": metal.mode_reason,
        }));
    }
    let Some(vulkan) = device.vulkan else {
        return Ok(json!({ "name": device.name }));
    };
    println!("device: '{}', driver {}", device.name, vulkan.driver);
    println!("{} mode: {}", vulkan.mode.name(), vulkan.mode_reason);
    for placement in &vulkan.placements {
        println!(
            "memory for {}: device-local {}, host-visible {}, host-cached {}",
            placement.purpose,
            placement.device_local,
            placement.host_visible,
            placement.host_cached
        );
    }
    Ok(json!({
        "name": device.name,
        "driver": vulkan.driver,
        "api_version": format!("{}.{}.{}", vulkan.api_version.0, vulkan.api_version.1, vulkan.api_version.2),
        "pci_address": vulkan.pci_address,
        "mode": vulkan.mode.name(),
        "mode_reason": vulkan.mode_reason,
        "placements": vulkan.placements.iter().map(|placement| json!({
            "purpose": placement.purpose,
            "device_local": placement.device_local,
            "host_visible": placement.host_visible,
            "host_cached": placement.host_cached,
        })).collect::<Vec<_>>(),
    }))
}
