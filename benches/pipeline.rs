//! Round trips through pipelines of kernels: one kernel, several that share rings, the same several connected by the bridge, and with the
//! caller carrying each message from one to the next; beside the floor of the same machine, in one run.
//!
//! `cargo bench --bench pipeline -- [--backend cpu|vulkan] [--quick] [--json FILE]`
//!
//! The caller has a core, and all stages together have another. The paths take turns in short rounds. `--backend vulkan` takes the device
//! that `RINGKERNEL_VULKAN_DEVICE` names, or the first one.

#[path = "support/machine.rs"]
mod machine;

use std::fs;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use lexopt::prelude::*;
use ringkernel::thread::affinity::{pin_current_thread, usable_cores};
use ringkernel::time::now_ns_ordered;
use ringkernel::{
    BackendType, Bytes, ConnectionKind, KernelHandle, KernelRegistration, LaunchOptions, Receiver,
    RingKernelRuntime, RuntimeConfig, Sender, ShaderCode, WaitStrategy,
};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

const PAYLOAD: usize = 48;
const CAPACITY: usize = 1024;
const TIMEOUT: Duration = Duration::from_secs(10);

struct Config {
    backend: BackendType,
    quick: bool,
    json: Option<String>,
    rounds: usize,
    messages: usize,
    caller_core: usize,
    kernel_core: usize,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pipeline: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Config, Failure> {
    let (mut quick, mut json, mut backend) = (false, None, BackendType::Cpu);
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            // Cargo passes this to every benchmark.
            Long("bench") => {}
            Long("quick") => quick = true,
            Long("backend") => backend = arguments.value()?.string()?.parse()?,
            Long("json") => json = Some(arguments.value()?.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    let cores = usable_cores();
    let [caller_core, kernel_core, ..] = cores[..] else {
        return Err("two cores are needed, one for each end".into());
    };
    if !matches!(backend, BackendType::Cpu | BackendType::Vulkan) {
        return Err(format!("no stages for {backend}").into());
    }
    Ok(Config {
        backend,
        quick,
        json,
        rounds: if quick { 10 } else { 60 },
        messages: if quick { 5_000 } else { 20_000 },
        caller_core,
        kernel_core,
    })
}

/// One way of a message from the caller back to the caller.
trait Path {
    /// Called before and after a round.
    fn wake(&mut self) -> Result<(), Failure>;
    fn rest(&mut self) -> Result<(), Failure>;
    fn exchange(&mut self, payload: &[u8], reply: &mut [u8]) -> Result<usize, Failure>;
}

/// Two cache lines and two threads, and nothing else.
struct Floor {
    lines: &'static [Line; 2],
    sequence: u32,
    stop: &'static AtomicBool,
    thread: Option<std::thread::JoinHandle<()>>,
    core: usize,
}

#[repr(align(128))]
struct Line {
    sequence: AtomicU32,
    words: [AtomicU32; PAYLOAD / 4],
}

impl Line {
    fn write(&self, sequence: u32, payload: &[u8]) {
        for (word, bytes) in self.words.iter().zip(payload.chunks_exact(4)) {
            let mut value = [0; 4];
            value.copy_from_slice(bytes);
            word.store(u32::from_ne_bytes(value), Ordering::Relaxed);
        }
        self.sequence.store(sequence, Ordering::Release);
    }

    fn read(&self, payload: &mut [u8]) {
        for (word, bytes) in self.words.iter().zip(payload.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
    }
}

impl Floor {
    fn new(core: usize) -> Self {
        let line = || Line {
            sequence: AtomicU32::new(0),
            words: [const { AtomicU32::new(0) }; PAYLOAD / 4],
        };
        Self {
            lines: Box::leak(Box::new([line(), line()])),
            sequence: 0,
            stop: Box::leak(Box::new(AtomicBool::new(false))),
            thread: None,
            core,
        }
    }
}

impl Path for Floor {
    fn wake(&mut self) -> Result<(), Failure> {
        let (lines, stop, core, mut sequence) = (self.lines, self.stop, self.core, self.sequence);
        stop.store(false, Ordering::Release);
        self.thread = Some(std::thread::spawn(move || {
            let _ = pin_current_thread(core);
            let mut payload = [0; PAYLOAD];
            while !stop.load(Ordering::Relaxed) {
                if lines[0].sequence.load(Ordering::Acquire) == sequence + 1 {
                    sequence += 1;
                    lines[0].read(&mut payload);
                    lines[1].write(sequence, &payload);
                }
                std::hint::spin_loop();
            }
        }));
        Ok(())
    }

    fn rest(&mut self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Release);
        match self.thread.take().map(std::thread::JoinHandle::join) {
            Some(Err(_)) => Err("the echo thread panicked".into()),
            _ => Ok(()),
        }
    }

    fn exchange(&mut self, payload: &[u8], reply: &mut [u8]) -> Result<usize, Failure> {
        self.sequence += 1;
        self.lines[0].write(self.sequence, payload);
        while self.lines[1].sequence.load(Ordering::Acquire) != self.sequence {
            std::hint::spin_loop();
        }
        self.lines[1].read(reply);
        Ok(PAYLOAD)
    }
}

/// How a message gets from one stage to the next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hop {
    Shared,
    Bridged,
    ByHand,
}

/// Echoes, one behind the other.
struct Stages {
    _runtime: RingKernelRuntime,
    kernels: Vec<KernelHandle>,
    /// Kernels that never work, and only make others need the bridge.
    _idle: Vec<KernelHandle>,
    /// One pair through all of them, or one a kernel.
    endpoints: Vec<(Sender<Bytes>, Receiver<Bytes>)>,
}

impl Stages {
    fn new(config: &Config, stages: usize, hop: Hop, wait: WaitStrategy) -> Result<Self, Failure> {
        let echo = include_bytes!("../shaders/echo.spv");
        let mut builder = RingKernelRuntime::builder()
            .backend(config.backend)
            .config(RuntimeConfig {
                host_wait: WaitStrategy::Spin,
                enable_telemetry: false,
                reserved_cores: vec![config.caller_core],
                ..RuntimeConfig::default()
            })
            .register(
                KernelRegistration::new("stage")
                    // SAFETY: a module of our own, validated when it is built.
                    .shader(unsafe { ShaderCode::spirv(echo.as_slice()) })
                    .cpu_handler(|request, context| context.echo(request)),
            );
        let on_threads = config.backend == BackendType::Cpu;
        if !on_threads && std::env::var_os("RINGKERNEL_VULKAN_DEVICE").is_none() {
            builder = builder.device(0);
        }
        let runtime = builder.build()?;
        let launch = || {
            let options = LaunchOptions {
                queue_capacity: Some(CAPACITY),
                message_size: Some(PAYLOAD),
                wait: Some(wait),
                cores: if on_threads {
                    vec![config.kernel_core]
                } else {
                    Vec::new()
                },
                ..LaunchOptions::default()
            };
            runtime.launch("stage", 1, 1, options)
        };
        let kernels = (0..stages)
            .map(|_| launch())
            .collect::<Result<Vec<_>, _>>()?;
        let mut idle = Vec::new();
        let endpoints = if hop == Hop::ByHand {
            kernels
                .iter()
                .map(KernelHandle::split_bytes)
                .collect::<Result<Vec<_>, _>>()?
        } else {
            for pair in kernels.windows(2) {
                if hop == Hop::Bridged {
                    // Whatever is fed by two kernels is fed by the bridge.
                    let other = launch()?;
                    runtime.connect(&other, &pair[1])?;
                    idle.push(other);
                }
                let kind = runtime.connect(&pair[0], &pair[1])?.kind();
                if (kind == ConnectionKind::Bridged) != (hop == Hop::Bridged) {
                    return Err(format!("a connection is {kind:?}").into());
                }
            }
            vec![kernels[0].split_bytes_through(&kernels[stages - 1])?]
        };
        Ok(Self {
            _runtime: runtime,
            kernels,
            _idle: idle,
            endpoints,
        })
    }
}

impl Path for Stages {
    fn wake(&mut self) -> Result<(), Failure> {
        for kernel in &self.kernels {
            kernel.activate()?;
        }
        Ok(())
    }

    fn rest(&mut self) -> Result<(), Failure> {
        for kernel in &self.kernels {
            kernel.deactivate()?;
        }
        Ok(())
    }

    fn exchange(&mut self, payload: &[u8], reply: &mut [u8]) -> Result<usize, Failure> {
        let mut length = payload.len();
        for (index, (sender, receiver)) in self.endpoints.iter_mut().enumerate() {
            if index == 0 {
                sender.try_send_bytes(payload)?;
            } else {
                sender.try_send_bytes(&reply[..length])?;
            }
            length = receiver.recv_bytes_timeout(reply, TIMEOUT)?;
        }
        Ok(length)
    }
}

/// A path, its name, and how many messages of it are measured for each hundred of the others'.
struct Measured {
    name: String,
    percent: usize,
    path: Box<dyn Path>,
    histogram: Histogram<u64>,
}

fn round(config: &Config, measured: &mut Measured) -> Result<(), Failure> {
    let messages = config.messages * measured.percent / 100;
    measured.path.wake()?;
    let (mut payload, mut reply) = ([0; PAYLOAD], [0; PAYLOAD]);
    // The first tenth warms up and is not counted.
    for message in 0..messages + messages / 10 {
        for (index, bytes) in payload.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&(message as u64 * 31 + index as u64).to_ne_bytes());
        }
        let begin = now_ns_ordered();
        let length = measured.path.exchange(&payload, &mut reply)?;
        let end = now_ns_ordered();
        if reply[..length] != payload {
            return Err(format!("{}: message {message} came back changed", measured.name).into());
        }
        if message >= messages / 10 {
            measured.histogram.record((end - begin).max(1))?;
        }
    }
    measured.path.rest()
}

fn run() -> Result<(), Failure> {
    let config = parse()?;
    let machine = machine::describe();
    println!("machine: {}", machine::one_line(&machine));
    println!(
        "configuration: {}, {} rounds of {} messages of {PAYLOAD} bytes, caller on core {}, every stage on core {}, caller spins, \
         kernel telemetry off, rings of {CAPACITY} slots",
        config.backend, config.rounds, config.messages, config.caller_core, config.kernel_core,
    );
    pin_current_thread(config.caller_core)?;
    let mut paths = vec![Measured {
        name: "floor".into(),
        percent: 100,
        path: Box::new(Floor::new(config.kernel_core)),
        histogram: Histogram::new(3)?,
    }];
    let mut add = |name: String, percent, stages| -> Result<(), Failure> {
        paths.push(Measured {
            name,
            percent,
            path: Box::new(stages),
            histogram: Histogram::new(3)?,
        });
        Ok(())
    };
    let stages = |stages, hop, wait| Stages::new(&config, stages, hop, wait);
    let single = stages(1, Hop::Shared, WaitStrategy::Spin)?;
    add("1 kernel".into(), 100, single)?;
    for count in [2, 4] {
        if config.backend != BackendType::Cpu {
            let spin = WaitStrategy::Spin;
            for (hop, how) in [
                (Hop::Shared, "shared"),
                (Hop::Bridged, "bridged"),
                (Hop::ByHand, "by hand"),
            ] {
                add(format!("{count} {how}"), 5, stages(count, hop, spin)?)?;
            }
            continue;
        }
        for (wait, how) in [
            (WaitStrategy::Spin, "spin"),
            (WaitStrategy::SpinYield, "yield"),
            (WaitStrategy::Park, "park"),
        ] {
            let percent = 100;
            add(
                format!("{count} shared, {how}"),
                percent,
                stages(count, Hop::Shared, wait)?,
            )?;
            // Kernels that spin on one core and know nothing of each other wait milliseconds for the scheduler.
            if wait != WaitStrategy::Spin {
                add(
                    format!("{count} by hand, {how}"),
                    5,
                    stages(count, Hop::ByHand, wait)?,
                )?;
            }
        }
    }
    for _ in 0..config.rounds {
        for measured in &mut paths {
            round(&config, measured)?;
        }
    }
    println!(
        "\n{:<18}{:>10}{:>9}{:>9}{:>9}{:>10}{:>11}",
        "path, ns", "messages", "p50", "p99", "p99.9", "max", "x 1 kernel"
    );
    let single = paths[1].histogram.value_at_quantile(0.5);
    let mut rows = Vec::new();
    for Measured {
        name, histogram, ..
    } in &paths
    {
        let at = |quantile| histogram.value_at_quantile(quantile);
        let ratio = at(0.5) as f64 / single as f64;
        println!(
            "{name:<18}{:>10}{:>9}{:>9}{:>9}{:>10}{ratio:>11.2}",
            histogram.len(),
            at(0.5),
            at(0.99),
            at(0.999),
            histogram.max()
        );
        rows.push(json!({
            "path": name,
            "messages": histogram.len(),
            "p50_ns": at(0.5),
            "p99_ns": at(0.99),
            "p99_9_ns": at(0.999),
            "max_ns": histogram.max(),
            "p50_by_1_kernel": ratio,
        }));
    }
    if let Some(path) = &config.json {
        let report: Value = json!({
            "machine": machine,
            "config": {
                "backend": config.backend.name(),
                "rounds": config.rounds,
                "messages": config.messages,
                "payload": PAYLOAD,
                "capacity": CAPACITY,
                "caller_core": config.caller_core,
                "kernel_core": config.kernel_core,
                "quick": config.quick,
            },
            "rows": rows,
        });
        fs::write(path, format!("{report:#}\n"))?;
        println!("written: {path}");
    }
    Ok(())
}
