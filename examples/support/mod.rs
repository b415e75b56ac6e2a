//! What both examples share: their command line, and the table at the end.

use std::fs;
use std::io::{self, Write};

use hdrhistogram::Histogram;
use lexopt::prelude::*;
use ringkernel::{
    BackendType, DeviceInfo, MetalMode, RingKernelRuntime, RuntimeConfig, VulkanMode,
};
use serde_json::json;

#[path = "../../benches/support/machine.rs"]
pub mod machine;

/// Any failure; its text is the one line on stderr.
pub type Failure = Box<dyn std::error::Error>;

/// The command line.
pub struct Arguments {
    pub backend: BackendType,
    /// Index, or part of the name.
    pub device: Option<String>,
    pub mode: VulkanMode,
    pub messages: u64,
    /// Bytes of each message.
    pub payload: usize,
    pub json: Option<String>,
}

/// Reads the command line; `None` if only help was asked for.
pub fn parse(name: &str, payload: usize) -> Result<Option<Arguments>, Failure> {
    let mut parsed = Arguments {
        backend: BackendType::Cpu,
        device: None,
        mode: VulkanMode::Auto,
        messages: 200_000,
        payload,
        json: None,
    };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("backend") => parsed.backend = arguments.value()?.string()?.parse()?,
            Long("device") => parsed.device = Some(arguments.value()?.string()?),
            Long("mode") => parsed.mode = arguments.value()?.string()?.parse()?,
            Long("messages") => parsed.messages = arguments.value()?.parse()?,
            Long("payload") => parsed.payload = arguments.value()?.parse()?,
            Long("json") => parsed.json = Some(arguments.value()?.string()?),
            Short('h') | Long("help") => {
                say(&format!(
                    "usage: {name} [--backend cpu|vulkan|cuda|metal] [--device INDEX|NAME] [--mode auto|resident|exchange|staged] \
                     [--messages {}] [--payload {payload}] [--json FILE]",
                    parsed.messages
                ))?;
                return Ok(None);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if parsed.messages == 0 {
        return Err("--messages must not be 0".into());
    }
    Ok(Some(parsed))
}

/// A runtime on the backend and device asked for. Without a device it is the first, which of Vulkan devices is the best,
/// or the one that `RINGKERNEL_VULKAN_DEVICE` names.
pub fn runtime(arguments: &Arguments) -> Result<RingKernelRuntime, Failure> {
    let mut config = RuntimeConfig::default();
    match (arguments.backend, arguments.mode) {
        (_, VulkanMode::Auto) => {}
        (BackendType::Vulkan, mode) => config.vulkan.mode = mode,
        (BackendType::Metal, VulkanMode::Resident) => config.metal.mode = MetalMode::Resident,
        (BackendType::Metal, VulkanMode::Exchange) => config.metal.mode = MetalMode::Exchange,
        (backend, mode) => {
            return Err(format!("backend {backend} has no mode '{}'", mode.name()).into());
        }
    }
    let builder = RingKernelRuntime::builder()
        .backend(arguments.backend)
        .config(config);
    let builder = match &arguments.device {
        None if std::env::var_os("RINGKERNEL_VULKAN_DEVICE").is_some() => builder,
        None => builder.device(0),
        Some(device) => match device.parse() {
            Ok(index) => builder.device(index),
            Err(_) => builder.device_name(device),
        },
    };
    Ok(builder.build()?)
}

/// Prints a line; a closed pipe is an error like any other.
pub fn say(line: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{line}")
}

/// Prints the latencies, and writes them to a file if asked to.
pub fn report(
    name: &str,
    arguments: &Arguments,
    device: &DeviceInfo,
    histogram: &Histogram<u64>,
) -> Result<(), Failure> {
    let machine = machine::describe();
    let at = |quantile| histogram.value_at_quantile(quantile);
    say(&format!("machine: {}", machine::one_line(&machine)))?;
    say(&format!(
        "{name} on {} device {} ('{}'): {} messages of {} bytes, every byte verified",
        device.backend,
        device.index,
        device.name,
        histogram.len(),
        arguments.payload
    ))?;
    if let Some(vulkan) = &device.vulkan {
        say(&format!(
            "{} mode: {}",
            vulkan.mode.name(),
            vulkan.mode_reason
        ))?;
    }
    if let Some(cuda) = &device.cuda {
        say(&format!(
            "CUDA {}.{}, compute capability {}.{}",
            cuda.driver_version.0,
            cuda.driver_version.1,
            cuda.compute_capability.0,
            cuda.compute_capability.1
        ))?;
    }
    say("round trip     p50      p90      p99    p99.9      max")?;
    say(&format!(
        "ns       {:>9}{:>9}{:>9}{:>9}{:>9}",
        at(0.5),
        at(0.9),
        at(0.99),
        at(0.999),
        histogram.max()
    ))?;
    if let Some(path) = &arguments.json {
        let report = json!({
            "machine": machine,
            "example": name,
            "backend": device.backend.name(),
            "device": device.name,
            "messages": histogram.len(),
            "payload_bytes": arguments.payload,
            "p50_ns": at(0.5),
            "p90_ns": at(0.9),
            "p99_ns": at(0.99),
            "p99_9_ns": at(0.999),
            "max_ns": histogram.max(),
        });
        fs::write(path, format!("{report:#}\n")).map_err(|error| format!("{path}: {error}"))?;
    }
    Ok(())
}
