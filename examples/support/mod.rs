//! What both examples share: their command line, and the table at the end.

use std::fs;
use std::io::{self, Write};

use hdrhistogram::Histogram;
use lexopt::prelude::*;
use ringkernel::{BackendType, DeviceInfo};
use serde_json::json;

#[path = "../../benches/support/machine.rs"]
pub mod machine;

/// Any failure; its text is the one line on stderr.
pub type Failure = Box<dyn std::error::Error>;

/// The command line.
pub struct Arguments {
    pub backend: BackendType,
    pub device: usize,
    pub messages: u64,
    /// Bytes of each message.
    pub payload: usize,
    pub json: Option<String>,
}

/// Reads the command line; `None` if only help was asked for.
pub fn parse(name: &str, payload: usize) -> Result<Option<Arguments>, Failure> {
    let mut parsed = Arguments {
        backend: BackendType::Cpu,
        device: 0,
        messages: 200_000,
        payload,
        json: None,
    };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Long("backend") => parsed.backend = arguments.value()?.string()?.parse()?,
            Long("device") => parsed.device = arguments.value()?.parse()?,
            Long("messages") => parsed.messages = arguments.value()?.parse()?,
            Long("payload") => parsed.payload = arguments.value()?.parse()?,
            Long("json") => parsed.json = Some(arguments.value()?.string()?),
            Short('h') | Long("help") => {
                say(&format!(
                    "usage: {name} [--backend cpu] [--device 0] [--messages {}] [--payload {payload}] [--json FILE]",
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
