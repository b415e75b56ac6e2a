//! Where requests to a CUDA device should lie, and what a message costs beside what it must cost: a word that a resident kernel sends
//! back, with requests in the host's memory and in the device's own; our messages in the same places; a launch and a graph a message.
//!
//! `cargo bench --bench placement -- [--device INDEX] [--quick] [--json FILE]`
//!
//! The paths take turns in short rounds, so that whatever else happens on the machine happens to all of them. Every message is
//! compared.

#[path = "../support/machine.rs"]
mod machine;
mod raw;
#[path = "../round_trip/row.rs"]
mod row;

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use lexopt::prelude::*;
use raw::{Flag, Graph, Launch, MESSAGE, Raw};
use ringkernel::{
    BackendType, CudaConfig, CudaRingMemory, KernelHandle, LaunchOptions, RingKernelRuntime,
    RuntimeConfig, time::now_ns_ordered,
};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

/// A message that takes longer is a failure.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long nothing is sent before each message, and how many messages of each path a round has then.
const GAPS: [(Duration, usize); 4] = [
    (Duration::ZERO, 10_000),
    (Duration::from_micros(100), 1_000),
    (Duration::from_millis(1), 200),
    (Duration::from_millis(10), 20),
];

struct Config {
    device: usize,
    quick: bool,
    json: Option<String>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("placement: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Config, Failure> {
    let mut config = Config {
        device: 0,
        quick: false,
        json: None,
    };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            // Cargo passes this to every benchmark.
            Long("bench") => {}
            Long("device") => config.device = arguments.value()?.parse()?,
            Long("quick") => config.quick = true,
            Long("json") => config.json = Some(arguments.value()?.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(config)
}

/// A way to the device and back.
enum Way {
    Flag(Flag),
    Ours(KernelHandle),
    Launch(Launch),
    Graph(Graph),
}

struct Path {
    name: &'static str,
    placement: &'static str,
    way: Way,
    /// Whether each message takes tens of microseconds.
    slow: bool,
}

impl Path {
    fn round(
        &mut self,
        messages: usize,
        gap: Duration,
        histogram: &mut Histogram<u64>,
    ) -> Result<(), Failure> {
        let messages = match self.slow {
            true => messages.div_ceil(10),
            false => messages,
        };
        let mut endpoints = match &self.way {
            Way::Ours(kernel) => Some(kernel.split_bytes()?),
            _ => None,
        };
        let (mut payload, mut reply) = ([0; MESSAGE], [0; MESSAGE]);
        for message in 0..messages {
            for (byte, index) in payload.iter_mut().zip(0_usize..) {
                *byte = (message * 31 + index * 7) as u8;
            }
            let last = Instant::now();
            while last.elapsed() < gap {
                std::hint::spin_loop();
            }
            let begin = now_ns_ordered();
            match (&mut self.way, &mut endpoints) {
                (Way::Flag(flag), _) => flag.exchange()?,
                (Way::Launch(launch), _) => launch.exchange(&payload, &mut reply)?,
                (Way::Graph(graph), _) => graph.exchange(&payload, &mut reply)?,
                (Way::Ours(_), Some((sender, receiver))) => {
                    sender.send_bytes_timeout(&payload, TIMEOUT)?;
                    receiver.recv_bytes_timeout(&mut reply, TIMEOUT)?;
                }
                (Way::Ours(_), None) => return Err("no endpoints".into()),
            }
            histogram.record((now_ns_ordered() - begin).max(1))?;
            if !matches!(self.way, Way::Flag(_)) && reply != payload {
                return Err(format!("{}: message {message} came back changed", self.name).into());
            }
        }
        Ok(())
    }
}

fn runtime(config: &Config, ring_memory: CudaRingMemory) -> Result<RingKernelRuntime, Failure> {
    let runtime = RingKernelRuntime::builder()
        .backend(BackendType::Cuda)
        .device(config.device)
        .config(RuntimeConfig {
            enable_telemetry: false,
            cuda: CudaConfig {
                ring_memory,
                ..CudaConfig::default()
            },
            ..RuntimeConfig::high_performance()
        })
        .build()?;
    Ok(runtime)
}

fn run() -> Result<(), Failure> {
    let config = parse()?;
    let machine = machine::describe();
    println!("machine: {}", machine::one_line(&machine));
    if !raw::has_driver() {
        return Err("there is no CUDA driver".into());
    }
    let cores = ringkernel::thread::affinity::usable_cores();
    let core = *cores.first().ok_or("no core")?;
    // Whatever is taken from the driver is taken before any kernel stays.
    let mut raw = Raw::open(i32::try_from(config.device)?)?;
    let host = runtime(&config, CudaRingMemory::Host)?;
    let device = host.devices().swap_remove(host.default_device());
    let cuda = device.cuda.ok_or("not a CUDA device")?;
    println!(
        "device: '{}', CUDA {:?}, compute capability {:?}, {}",
        device.name,
        cuda.driver_version,
        cuda.compute_capability,
        cuda.pci_address.as_deref().unwrap_or("no PCI address")
    );
    let mut own = None;
    let reason = match raw.no_own_memory() {
        Some(reason) => Some(reason.to_owned()),
        None => match runtime(&config, CudaRingMemory::Device) {
            Ok(runtime) => {
                own = Some(runtime);
                None
            }
            Err(error) => Some(error.to_string()),
        },
    };
    if let Some(reason) = &reason {
        println!("requests cannot lie in the device's own memory: {reason}");
    }
    println!(
        "configuration: caller on core {core}, spins; flags are 4 bytes, messages {MESSAGE}; kernels pause {:?} between empty polls, \
         flags do not",
        CudaConfig::default().poll_nap
    );
    let mut ways = vec![("flag", "host", Way::Flag(raw.flag(false)?), false)];
    if own.is_some() {
        ways.push(("flag", "device", Way::Flag(raw.flag(true)?), false));
    }
    ways.push((
        "launch_and_synchronise",
        "host",
        Way::Launch(raw.launch()?),
        true,
    ));
    ways.push(("graph_launch", "host", Way::Graph(raw.graph()?), true));
    // The first of each may take something from the driver as well.
    let (payload, mut reply) = ([1; MESSAGE], [0; MESSAGE]);
    for (_, _, way, _) in &mut ways {
        match way {
            Way::Launch(launch) => launch.exchange(&payload, &mut reply)?,
            Way::Graph(graph) => graph.exchange(&payload, &mut reply)?,
            Way::Flag(_) | Way::Ours(_) => {}
        }
    }
    // Now kernels stay.
    for (_, _, way, _) in &ways {
        if let Way::Flag(flag) = way {
            flag.start()?;
        }
    }
    let placed = [(Some(&host), "host"), (own.as_ref(), "device")];
    for (runtime, placement) in placed {
        if let Some(runtime) = runtime {
            let options = LaunchOptions {
                message_size: Some(MESSAGE),
                ..LaunchOptions::default()
            };
            let kernel = runtime.launch("echo", 1, 1, options)?;
            kernel.activate()?;
            ways.push(("endpoints", placement, Way::Ours(kernel), false));
        }
    }
    let mut paths: Vec<Path> = ways
        .into_iter()
        .map(|(name, placement, way, slow)| Path {
            name,
            placement,
            way,
            slow,
        })
        .collect();
    // Threads that the driver started have inherited every core.
    ringkernel::thread::affinity::pin_current_thread(core)?;
    let mut rows = Vec::new();
    for (gap, messages) in GAPS {
        rows.extend(measure(&config, &mut paths, gap, messages)?);
    }
    if let Some(path) = &config.json {
        let report = json!({
            "machine": machine,
            "device": {
                "name": device.name,
                "cuda_version": cuda.driver_version,
                "compute_capability": cuda.compute_capability,
                "pci_address": cuda.pci_address,
                "no_own_memory": reason,
            },
            "config": { "core": core, "quick": config.quick, "message_bytes": MESSAGE },
            "round_trips": rows,
        });
        fs::write(path, format!("{report:#}\n"))?;
        println!("written: {path}");
    }
    // Kernels end before what they use is given back.
    drop(paths);
    drop((own, host));
    drop(raw);
    Ok(())
}

/// All paths, with a gap before each message.
fn measure(
    config: &Config,
    paths: &mut [Path],
    gap: Duration,
    messages: usize,
) -> Result<Vec<Value>, Failure> {
    let (rounds, messages) = match config.quick {
        true => (3, messages.div_ceil(10)),
        false => (20, messages),
    };
    let mut histograms = vec![Histogram::new(3)?; paths.len()];
    for _ in 0..rounds {
        for (path, histogram) in paths.iter_mut().zip(&mut histograms) {
            path.round(messages, gap, histogram)?;
        }
    }
    println!(
        "\n{gap:?} after the last reply, round trip in ns; floor: a flag of the same placement"
    );
    row::head();
    let mut rows = Vec::new();
    for (path, histogram) in paths.iter().zip(&histograms) {
        let floor = paths
            .iter()
            .zip(&histograms)
            .find(|(floor, _)| floor.name == "flag" && floor.placement == path.placement)
            .map_or(0, |(_, histogram)| histogram.value_at_quantile(0.5));
        let mut row = row::print(path.name, path.placement, histogram, floor);
        row["placement"] = json!(path.placement);
        row["gap_ns"] = json!(gap.as_nanos() as u64);
        rows.push(row);
    }
    Ok(rows)
}
