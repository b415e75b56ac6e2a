//! Many clients of one kernel: round trips and throughput through lanes, beside the same over crossbeam-channel with a thread in the middle;
//! the mailbox beside a mutex and a seqlock; and what a bridge costs that has nothing to do.
//!
//! `cargo bench --bench clients -- [--quick] [--json FILE]`

#[path = "support/machine.rs"]
mod machine;

use std::fs;
use std::hint::spin_loop;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select_biased};
use hdrhistogram::Histogram;
use lexopt::prelude::*;
use ringkernel::error::TrySendError;
use ringkernel::thread::affinity::{pin_current_thread, usable_cores};
use ringkernel::thread::mailbox;
use ringkernel::time::now_ns_ordered;
use ringkernel::{
    Bytes, Client, ClientOptions, KernelHandle, LaunchOptions, RingKernelRuntime, RuntimeConfig,
    WaitStrategy,
};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;
type Payload = [u8; 48];

const TIMEOUT: Duration = Duration::from_secs(60);

/// Requests that each client has on their way at most, when throughput is measured.
const WINDOW: u64 = 64;

/// Clients at a time.
const CLIENTS: [usize; 4] = [1, 2, 4, 8];

struct Config {
    quick: bool,
    json: Option<String>,
    caller: usize,
    kernel: usize,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("clients: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Config, Failure> {
    let cores = usable_cores();
    let mut config = Config {
        quick: false,
        json: None,
        caller: *cores.first().ok_or("no core")?,
        kernel: *cores.last().ok_or("no core")?,
    };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            // Cargo passes this to every benchmark.
            Long("bench") => {}
            Long("quick") => config.quick = true,
            Long("json") => config.json = Some(arguments.value()?.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(config)
}

fn run() -> Result<(), Failure> {
    let config = parse()?;
    let machine = machine::describe();
    println!("machine: {}", machine::one_line(&machine));
    println!(
        "48-byte messages; one caller on core {}, kernel on core {}; {WINDOW} requests on their way for each client of a stream",
        config.caller, config.kernel
    );
    let report = json!({
        "machine": machine,
        "round_trips": round_trips(&config)?,
        "throughput": throughput(&config)?,
        "newest": newest(&config)?,
        "idle": idle(&config)?,
    });
    if let Some(path) = &config.json {
        fs::write(path, serde_json::to_string_pretty(&report)?)
            .map_err(|error| format!("{path}: {error}"))?;
    }
    Ok(())
}

fn row(name: &str, histogram: &Histogram<u64>, against: u64) -> Value {
    let at = |quantile| histogram.value_at_quantile(quantile);
    let ratio = match against {
        0 => String::new(),
        against => format!("{:.2}", at(0.5) as f64 / against as f64),
    };
    println!(
        "{name:<44}{:>8}{:>9}{:>9}{:>11}{ratio:>8}",
        at(0.5),
        at(0.99),
        at(0.999),
        histogram.max()
    );
    json!({
        "path": name, "count": histogram.len(), "p50_ns": at(0.5), "p99_ns": at(0.99), "p99_9_ns": at(0.999), "max_ns": histogram.max(),
    })
}

fn histogram() -> Result<Histogram<u64>, Failure> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}

/// Times `count` exchanges, each compared.
fn exchanges(
    histogram: &mut Histogram<u64>,
    count: u64,
    mut exchange: impl FnMut(&Payload, &mut Payload) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut reply = [0; 48];
    for message in 0..count + count / 10 {
        let mut payload = [0; 48];
        payload[..8].copy_from_slice(&message.to_ne_bytes());
        payload[40..].copy_from_slice(&message.to_ne_bytes());
        let begin = now_ns_ordered();
        exchange(&payload, &mut reply)?;
        let end = now_ns_ordered();
        if reply != payload {
            return Err(format!("message {message} came back changed").into());
        }
        // The first ones warm up.
        if message >= count / 10 {
            histogram.record((end - begin).max(1))?;
        }
    }
    Ok(())
}

struct Kernel {
    _runtime: RingKernelRuntime,
    handle: KernelHandle,
}

fn kernel(config: &Config, bridge_wait: WaitStrategy) -> Result<Kernel, Failure> {
    let runtime = RingKernelRuntime::builder()
        .config(RuntimeConfig {
            bridge_wait,
            bridge_core: Some(config.kernel),
            kernel_wait: WaitStrategy::Spin,
            host_wait: WaitStrategy::Spin,
            enable_telemetry: false,
            reserved_cores: vec![config.caller],
            ..RuntimeConfig::default()
        })
        .build()?;
    let options = LaunchOptions {
        cores: vec![config.kernel],
        ..LaunchOptions::default()
    };
    let handle = runtime.launch("echo", 1, 1, options)?;
    handle.activate()?;
    Ok(Kernel {
        _runtime: runtime,
        handle,
    })
}

/// A line of memory that two threads pass to and fro: no exchange of messages can be faster.
fn floor(config: &Config, histogram: &mut Histogram<u64>, count: u64) -> Result<(), Failure> {
    #[repr(align(128))]
    struct Line(AtomicU32);
    let (there, back) = (Line(AtomicU32::new(0)), Line(AtomicU32::new(0)));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = pin_current_thread(config.kernel);
            let mut seen = 0;
            while !done.load(Ordering::Relaxed) {
                let now = there.0.load(Ordering::Acquire);
                if now != seen {
                    seen = now;
                    back.0.store(now, Ordering::Release);
                }
                spin_loop();
            }
        });
        let mut number = 0;
        let result = exchanges(histogram, count, |payload, reply| {
            number += 1;
            there.0.store(number, Ordering::Release);
            while back.0.load(Ordering::Acquire) != number {
                spin_loop();
            }
            *reply = *payload;
            Ok(())
        });
        done.store(true, Ordering::Relaxed);
        result
    })
}

/// An echo behind two crossbeam channels.
fn crossbeam(config: &Config, histogram: &mut Histogram<u64>, count: u64) -> Result<(), Failure> {
    let (requests, incoming) = bounded::<Payload>(256);
    let (outgoing, replies) = bounded::<Payload>(256);
    thread::scope(|scope| {
        scope.spawn(move || {
            let _ = pin_current_thread(config.kernel);
            while let Some(payload) = spin_recv(&incoming) {
                let _ = outgoing.try_send(payload);
            }
        });
        let result = exchanges(histogram, count, |payload, reply| {
            requests.try_send(*payload)?;
            *reply = spin_recv(&replies).ok_or("closed")?;
            Ok(())
        });
        drop(requests);
        result
    })
}

fn spin_recv(channel: &Receiver<Payload>) -> Option<Payload> {
    loop {
        match channel.try_recv() {
            Ok(payload) => return Some(payload),
            Err(crossbeam_channel::TryRecvError::Empty) => spin_loop(),
            Err(crossbeam_channel::TryRecvError::Disconnected) => return None,
        }
    }
}

fn round_trips(config: &Config) -> Result<Value, Failure> {
    pin_current_thread(config.caller)?;
    let (turns, count) = if config.quick {
        (2, 20_000)
    } else {
        (10, 100_000)
    };
    let names = [
        "floor: one line to and fro",
        "exclusive endpoints",
        "client, alone (direct)",
        "client, lane (moved while it waits)",
        "crossbeam, echo thread",
    ];
    let mut histograms = [(); 5].map(|()| histogram());
    for _ in 0..turns {
        let [floor_h, endpoints_h, direct_h, lane_h, crossbeam_h] = &mut histograms;
        let (floor_h, endpoints_h, direct_h, lane_h, crossbeam_h) = (
            floor_h.as_mut().map_err(|error| error.to_string())?,
            endpoints_h.as_mut().map_err(|error| error.to_string())?,
            direct_h.as_mut().map_err(|error| error.to_string())?,
            lane_h.as_mut().map_err(|error| error.to_string())?,
            crossbeam_h.as_mut().map_err(|error| error.to_string())?,
        );
        floor(config, floor_h, count)?;
        {
            let kernel = kernel(config, WaitStrategy::Park)?;
            let (mut sender, mut receiver) = kernel.handle.split_bytes()?;
            exchanges(endpoints_h, count, |payload, reply| {
                sender.try_send_bytes(payload)?;
                receiver.recv_bytes_timeout(reply, TIMEOUT)?;
                Ok(())
            })?;
        }
        for (direct, histogram) in [(true, direct_h), (false, lane_h)] {
            let kernel = kernel(config, WaitStrategy::Park)?;
            let options = ClientOptions {
                direct,
                ..ClientOptions::default()
            };
            let mut client = kernel.handle.client_bytes_with(options)?;
            exchanges(histogram, count, |payload, reply| {
                client.call_bytes(payload, reply, TIMEOUT)?;
                Ok(())
            })?;
        }
        crossbeam(config, crossbeam_h, count)?;
    }
    println!(
        "\nround trip, ns{:>38}{:>9}{:>9}{:>11}{:>8}",
        "p50", "p99", "p99.9", "max", "x direct"
    );
    let direct = histograms[2]
        .as_ref()
        .map_or(0, |direct| direct.value_at_quantile(0.5));
    let mut rows = Vec::new();
    for (name, histogram) in names.into_iter().zip(&histograms) {
        if let Ok(histogram) = histogram {
            rows.push(row(name, histogram, direct));
        }
    }
    let lane = histograms[3]
        .as_ref()
        .map_or(0, |lane| lane.value_at_quantile(0.5));
    println!(
        "lane / direct: {:.2} (goal: at most 2.2)",
        lane as f64 / direct as f64
    );
    Ok(json!(rows))
}

/// Messages a second of so many clients, each with a window of requests on their way.
fn ours(clients: usize, messages: u64, bridge_wait: WaitStrategy) -> Result<(f64, Value), Failure> {
    let runtime = RingKernelRuntime::builder()
        .config(RuntimeConfig {
            bridge_wait,
            enable_telemetry: false,
            ..RuntimeConfig::default()
        })
        .build()?;
    let kernel = runtime.launch("echo", 1, 1, LaunchOptions::default())?;
    kernel.activate()?;
    let options = ClientOptions {
        direct: false,
        ..ClientOptions::default()
    };
    let mut lanes = Vec::new();
    for _ in 0..clients {
        lanes.push(kernel.client_bytes_with(options)?);
    }
    let begin = Instant::now();
    thread::scope(|scope| {
        for client in &mut lanes {
            scope.spawn(|| stream(client, messages));
        }
    });
    let rate = (clients as u64 * messages) as f64 / begin.elapsed().as_secs_f64();
    let load = runtime.bridge(0).and_then(|bridge| bridge.load());
    let load = load.map_or(Value::Null, |load| {
        json!({
            "busy_share": load.busy_share, "rounds": load.rounds, "moved": load.moved, "moved_per_round": load.moved_per_round,
            "round_p50_ns": load.round_p50.as_nanos() as u64, "round_p99_ns": load.round_p99.as_nanos() as u64,
            "round_max_ns": load.round_max.as_nanos() as u64, "sleeps": load.sleeps,
        })
    });
    Ok((rate, load))
}

fn stream(client: &mut Client<Bytes, Bytes>, messages: u64) {
    let (mut sent, mut received) = (0_u64, 0_u64);
    let (mut payload, mut reply) = ([0; 48], [0; 48]);
    while received < messages {
        while sent < messages && sent - received < WINDOW {
            payload[..8].copy_from_slice(&sent.to_ne_bytes());
            match client.try_send_bytes(&payload) {
                Ok(()) => sent += 1,
                Err(TrySendError::Full) => break,
                Err(error) => panic!("{error}"),
            }
        }
        if let Err(error) = client.recv_bytes_timeout(&mut reply, TIMEOUT) {
            panic!("{error}");
        }
        assert_eq!(reply[..8], received.to_ne_bytes());
        received += 1;
        while client.try_recv_bytes(&mut reply).is_ok() {
            assert_eq!(reply[..8], received.to_ne_bytes());
            received += 1;
        }
    }
}

/// The same over crossbeam-channel: clients, a thread in the middle that does what our bridge does, and an echo behind it; or, without a
/// middle, an echo that answers the clients itself.
fn theirs(clients: usize, messages: u64, with_middle: bool) -> f64 {
    let (requests, incoming) = bounded::<(usize, Payload)>(256 * clients);
    let (replies, answers): (Vec<Sender<Payload>>, Vec<Receiver<Payload>>) =
        (0..clients).map(|_| bounded(256)).unzip();
    let begin = Instant::now();
    thread::scope(|scope| {
        if with_middle {
            let (to_echo, at_echo) = bounded::<(usize, Payload)>(4096);
            let (from_echo, echoed) = bounded::<(usize, Payload)>(4096);
            scope.spawn(move || {
                for message in at_echo {
                    if from_echo.send(message).is_err() {
                        return;
                    }
                }
            });
            scope.spawn(move || {
                let mut to_echo = Some(to_echo);
                let never = crossbeam_channel::never();
                let mut incoming = &incoming;
                loop {
                    select_biased! {
                        recv(echoed) -> message => match message {
                            Ok((client, payload)) => { let _ = replies[client].send(payload); }
                            Err(_) => return,
                        },
                        recv(incoming) -> message => match (message, &to_echo) {
                            (Ok(message), Some(echo)) => { let _ = echo.send(message); }
                            _ => { to_echo = None; incoming = &never; }
                        },
                    }
                }
            });
        } else {
            scope.spawn(move || {
                for (client, payload) in incoming {
                    let _ = replies[client].send(payload);
                }
            });
        }
        for (client, answers) in answers.into_iter().enumerate() {
            let requests = requests.clone();
            scope.spawn(move || {
                let (mut sent, mut received) = (0_u64, 0_u64);
                let mut payload = [0; 48];
                let mut check = |reply: Payload| {
                    assert_eq!(reply[..8], received.to_ne_bytes());
                    received += 1;
                    received
                };
                let mut done = 0;
                while done < messages {
                    while sent < messages && sent - done < WINDOW {
                        payload[..8].copy_from_slice(&sent.to_ne_bytes());
                        if requests.try_send((client, payload)).is_err() {
                            break;
                        }
                        sent += 1;
                    }
                    let Ok(reply) = answers.recv() else {
                        return;
                    };
                    done = check(reply);
                    while let Ok(reply) = answers.try_recv() {
                        done = check(reply);
                    }
                }
            });
        }
        drop(requests);
    });
    (clients as u64 * messages) as f64 / begin.elapsed().as_secs_f64()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn throughput(config: &Config) -> Result<Value, Failure> {
    let (turns, all) = if config.quick {
        (1, 200_000)
    } else {
        (5, 1_000_000)
    };
    println!(
        "\n{:<10}{:>16}{:>16}{:>16}{:>20}{:>10}",
        "clients",
        "lanes, msg/s",
        "crossbeam x3",
        "crossbeam echo",
        "ours / crossbeam x3",
        "/ echo"
    );
    let mut rows = Vec::new();
    for clients in CLIENTS {
        let messages = all / clients as u64;
        let (mut lanes, mut middle, mut echo) = (Vec::new(), Vec::new(), Vec::new());
        let mut load = Value::Null;
        for _ in 0..turns {
            // The caller of the round trips was pinned; these threads may run anywhere.
            let one_turn = || -> Result<_, Failure> {
                let (rate, load) = ours(clients, messages, WaitStrategy::Auto)?;
                Ok((
                    rate,
                    load,
                    theirs(clients, messages, true),
                    theirs(clients, messages, false),
                ))
            };
            let (ours, latest, with_middle, without) = anywhere(one_turn)?;
            lanes.push(ours);
            middle.push(with_middle);
            echo.push(without);
            load = latest;
        }
        let (lanes, middle, echo) = (median(lanes), median(middle), median(echo));
        println!(
            "{clients:<10}{lanes:>16.0}{middle:>16.0}{echo:>16.0}{:>20.2}{:>10.2}",
            lanes / middle,
            lanes / echo
        );
        rows.push(json!({
            "clients": clients, "lanes_per_s": lanes, "crossbeam_middle_per_s": middle, "crossbeam_echo_per_s": echo, "bridge": load,
        }));
    }
    println!(
        "crossbeam x3: a thread in the middle and an echo behind it (goal for 4 clients: at least 2); echo: no thread in the middle"
    );
    Ok(json!(rows))
}

/// Runs something on a thread that may run on any core.
fn anywhere<R: Send>(run: impl FnOnce() -> Result<R, Failure> + Send) -> Result<R, Failure> {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                unpin();
                run().map_err(|error| error.to_string())
            })
            .join()
            .map_err(|_| "a thread panicked")?
            .map_err(Failure::from)
    })
}

/// Lets the calling thread run on any core.
fn unpin() {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the set is plain data, valid when zeroed; the call reads it and nothing else.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            for core in usable_cores() {
                libc::CPU_SET(core, &mut set);
            }
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
        }
    }
}

/// A seqlock of 48 bytes, as commonly written: the reader tries again when the writer was at it.
struct Seqlock {
    version: AtomicU32,
    words: [AtomicU32; 12],
}

impl Seqlock {
    fn write(&self, payload: &Payload) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        for (word, bytes) in self.words.iter().zip(payload.chunks_exact(4)) {
            word.store(
                u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                Ordering::Relaxed,
            );
        }
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    fn read(&self) -> Payload {
        loop {
            let before = self.version.load(Ordering::Acquire);
            let mut payload = [0; 48];
            for (word, bytes) in self.words.iter().zip(payload.chunks_exact_mut(4)) {
                bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
            }
            fence(Ordering::Acquire);
            if before & 1 == 0 && before == self.version.load(Ordering::Relaxed) {
                return payload;
            }
            spin_loop();
        }
    }
}

/// One thread writes without a pause, the other reads without one; what each call takes.
fn contest(
    config: &Config,
    count: u64,
    write: impl FnMut(&Payload) + Send,
    mut read: impl FnMut() -> Option<Payload>,
) -> Result<[Histogram<u64>; 2], Failure> {
    let done = AtomicBool::new(false);
    let (mut writes, mut reads) = (histogram()?, histogram()?);
    thread::scope(|scope| {
        let (done, writes, mut write) = (&done, &mut writes, write);
        scope.spawn(move || {
            let _ = pin_current_thread(config.kernel);
            let mut number = 0_u64;
            while !done.load(Ordering::Relaxed) {
                number += 1;
                let mut payload = [0; 48];
                payload[..8].copy_from_slice(&number.to_ne_bytes());
                payload[40..].copy_from_slice(&number.to_ne_bytes());
                let begin = now_ns_ordered();
                write(&payload);
                let _ = writes.record((now_ns_ordered() - begin).max(1));
            }
        });
        let mut last = [0; 8];
        let mut seen = 0;
        while seen < count {
            let begin = now_ns_ordered();
            let found = read();
            let took = now_ns_ordered() - begin;
            let Some(payload) = found else {
                spin_loop();
                continue;
            };
            assert_eq!(payload[..8], payload[40..], "torn");
            let number = [0, 1, 2, 3, 4, 5, 6, 7].map(|index| payload[index]);
            // Mutex and seqlock give the same value again.
            if number != last {
                last = number;
                seen += 1;
                let _ = reads.record(took.max(1));
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    Ok([writes, reads])
}

fn newest(config: &Config) -> Result<Value, Failure> {
    pin_current_thread(config.caller)?;
    let count = if config.quick { 50_000 } else { 1_000_000 };
    println!(
        "\nnewest value, ns{:>36}{:>9}{:>9}{:>11}",
        "p50", "p99", "p99.9", "max"
    );
    let mut rows = Vec::new();
    let mut print = |name: &str, [writes, reads]: [Histogram<u64>; 2]| {
        rows.push(row(&format!("{name}: write"), &writes, 0));
        rows.push(row(&format!("{name}: read a new value"), &reads, 0));
    };
    let (mut writer, mut reader) = mailbox(|| [0; 48]);
    print(
        "mailbox (`latest`)",
        contest(
            config,
            count,
            |payload| {
                writer.replace(*payload);
            },
            || reader.take().copied(),
        )?,
    );
    let seqlock = Seqlock {
        version: AtomicU32::new(0),
        words: [const { AtomicU32::new(0) }; 12],
    };
    print(
        "seqlock",
        contest(
            config,
            count,
            |payload| seqlock.write(payload),
            || Some(seqlock.read()),
        )?,
    );
    let mutex = Mutex::new([0; 48]);
    print(
        "std mutex",
        contest(
            config,
            count,
            |payload| {
                if let Ok(mut value) = mutex.lock() {
                    *value = *payload;
                }
            },
            || mutex.lock().ok().map(|value| *value),
        )?,
    );
    Ok(json!(rows))
}

/// CPU time of the process while a kernel and a bridge that park have clients and nothing to do.
fn idle(config: &Config) -> Result<Value, Failure> {
    let runtime = RingKernelRuntime::builder().development().build()?;
    let kernel = runtime.launch("echo", 1, 1, LaunchOptions::default())?;
    kernel.activate()?;
    let options = ClientOptions {
        direct: false,
        ..ClientOptions::default()
    };
    let mut clients = [
        kernel.client_bytes_with(options)?,
        kernel.client_bytes_with(options)?,
    ];
    let mut reply = [0; 48];
    for client in &mut clients {
        client.call_bytes(b"warm", &mut reply, TIMEOUT)?;
    }
    let span = Duration::from_secs(if config.quick { 1 } else { 10 });
    let before = cpu_time()?;
    thread::sleep(span);
    let used = cpu_time()? - before;
    let share = used.as_secs_f64() / span.as_secs_f64();
    println!(
        "\nbridge (and everything else of the process) while all is idle, `Park`: {:.4} % of a core (goal: under 1 %)",
        100.0 * share
    );
    Ok(json!({ "share_of_a_core": share, "seconds": span.as_secs() }))
}

/// CPU time that the process has used.
fn cpu_time() -> Result<Duration, Failure> {
    #[cfg(unix)]
    {
        // SAFETY: the struct is plain data, valid when zeroed; the call fills it in.
        let usage = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            if libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) != 0 {
                return Err("getrusage".into());
            }
            usage
        };
        let of = |time: libc::timeval| {
            Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
        };
        Ok(of(usage.ru_utime) + of(usage.ru_stime))
    }
    #[cfg(not(unix))]
    Err("CPU time is not known here".into())
}
