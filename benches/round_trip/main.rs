//! Round trips and one-way streams: ours, those of other queues, and the floor of the same machine, in one run.
//!
//! `cargo bench --bench round_trip -- [--backend cpu] [--quick] [--payload 48] [--json FILE]`
//!
//! Every path sends, has the message echoed by another pinned thread, receives it, and compares every byte. The paths
//! take turns in short rounds, so that whatever else happens on the machine happens to all of them.

#[path = "../support/machine.rs"]
mod machine;
mod paths;
mod shared;
mod streams;

use std::fs;
use std::process::ExitCode;

use hdrhistogram::Histogram;
use lexopt::prelude::*;
use ringkernel::BackendType;
use serde_json::{Value, json};

/// What a run measures, and where.
struct Config {
    backend: BackendType,
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
    let (mut rounds, mut messages, mut payload) = (None, None, None);
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            // Cargo passes this to every benchmark.
            Long("bench") => {}
            Long("backend") => backend = arguments.value()?.string()?.parse()?,
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
    if config.payload.is_none() {
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
            "round_trips": round_trips,
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
            path.round(config, histogram)?;
        }
    }
    println!(
        "\n{N}-byte payload, round trip in ns\n{:<28}{:>9}{:>9}{:>9}{:>9}{:>11}{:>9}",
        "path", "p50", "p90", "p99", "p99.9", "max", "x floor"
    );
    let floor = measured[0].1.value_at_quantile(0.5);
    let mut rows = Vec::new();
    for (path, histogram) in &measured {
        let at = |quantile| histogram.value_at_quantile(quantile);
        println!(
            "{:<28}{:>9}{:>9}{:>9}{:>9}{:>11}{:>9.2}",
            path.name,
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            histogram.max(),
            at(0.5) as f64 / floor as f64
        );
        rows.push(json!({
            "path": path.name,
            "backend": path.backend,
            "payload_bytes": N,
            "messages": histogram.len(),
            "p50_ns": at(0.5),
            "p90_ns": at(0.9),
            "p99_ns": at(0.99),
            "p99_9_ns": at(0.999),
            "max_ns": histogram.max(),
        }));
    }
    Ok(rows)
}
