//! One-way streams: how many messages a second reach the other core.

use std::hint::spin_loop;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use ringkernel::message::Envelope;
use ringkernel::{
    Dim3, KernelHandle, KernelRegistration, RingKernelRuntime, error::TrySendError,
    thread::affinity::pin_current_thread,
};
use serde_json::{Value, json};

use crate::shared::{CAPACITY, TIMEOUT, Target, pinned, ring, runtime};
use crate::{Config, Failure};

/// The payload's first eight bytes of the message that asks for the sum of all before it.
const ASK: u64 = u64::MAX;

/// Sums the first eight bytes of all payloads, so that a lost, doubled or changed message shows.
fn sum_kernel() -> KernelRegistration {
    KernelRegistration::new("bench.sum")
        .state_size(8)
        .cpu_handler(|request, context| {
            let number = first_word(request.payload());
            if number == ASK {
                let sum = std::mem::take(context.state_as::<u64>()?);
                return context.reply_bytes(&sum.to_ne_bytes());
            }
            let sum = context.state_as::<u64>()?;
            *sum = sum.wrapping_add(number);
            Ok(())
        })
}

#[inline(always)]
fn first_word(payload: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&payload[..8]);
    u64::from_ne_bytes(word)
}

#[inline(always)]
fn numbered<const N: usize>(number: u64) -> [u8; N] {
    let mut payload = [0; N];
    payload[..8].copy_from_slice(&number.to_ne_bytes());
    payload
}

fn expected(messages: usize) -> u64 {
    (0..messages as u64).sum()
}

/// One way of streaming: sends `messages` numbered payloads and returns what the other side's sum is.
type Stream<'a> = (
    &'static str,
    &'static str,
    Box<dyn FnMut(usize) -> Result<u64, Failure> + 'a>,
);

/// Measures all streams with payloads of `N` bytes, in rounds that take turns; medians are reported.
pub fn measure<const N: usize>(config: &Config) -> Result<Vec<Value>, Failure> {
    let runtime = runtime(config, Target::Cpu, false)?;
    runtime.register(sum_kernel())?;
    let one = Dim3::x(1);
    let kernel = runtime.launch("bench.sum", one, one, pinned::<N>(config, Target::Cpu))?;
    let ours = "cpu";
    let mut streams: Vec<Stream<'_>> = vec![
        (
            "endpoints",
            ours,
            Box::new(|messages| endpoints::<N>(&kernel, messages)),
        ),
        (
            "endpoints_batch",
            ours,
            Box::new(|messages| endpoints_batch::<N>(&kernel, messages)),
        ),
        (
            "handle_send",
            ours,
            Box::new(|messages| handle_send::<N>(&kernel, messages)),
        ),
        (
            "ring",
            "cpu",
            Box::new(|messages| bare_ring::<N>(config, messages)),
        ),
        (
            "rtrb",
            "cpu",
            Box::new(|messages| rtrb::<N>(config, messages)),
        ),
        (
            "crossbeam",
            "cpu",
            Box::new(|messages| crossbeam::<N>(config, messages)),
        ),
        (
            "std_mpsc",
            "cpu",
            Box::new(|messages| std_mpsc::<N>(config, messages)),
        ),
    ];
    let rounds = config.rounds.div_ceil(4) | 1;
    let mut rates = vec![Vec::new(); streams.len()];
    for _ in 0..rounds {
        for ((name, _, stream), rates) in streams.iter_mut().zip(&mut rates) {
            let begin = Instant::now();
            let sum = stream(config.streamed).map_err(|error| format!("{name}: {error}"))?;
            rates.push(config.streamed as f64 / begin.elapsed().as_secs_f64());
            if sum != expected(config.streamed) {
                return Err(format!("{name}: messages were lost, doubled or changed").into());
            }
        }
    }
    println!("\n{N}-byte payload, one-way stream, median of {rounds} rounds");
    let medians: Vec<f64> = rates
        .iter_mut()
        .map(|rates| {
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        })
        .collect();
    let rtrb = streams
        .iter()
        .position(|(name, ..)| *name == "rtrb")
        .map_or(f64::NAN, |index| medians[index]);
    let mut rows = Vec::new();
    for ((name, backend, _), median) in streams.iter().zip(&medians) {
        println!(
            "{name:<28}{:>9.1} M messages/s{:>9.2} x rtrb",
            median / 1e6,
            median / rtrb
        );
        rows.push(json!({
            "path": name,
            "backend": backend,
            "payload_bytes": N,
            "messages": config.streamed * rounds,
            "messages_per_second": median.round(),
        }));
    }
    drop(streams);
    shut_down(runtime)?;
    Ok(rows)
}

fn shut_down(runtime: RingKernelRuntime) -> Result<(), Failure> {
    let report = runtime.complete_shutdown()?;
    if !report.requests.adds_up() {
        return Err(format!("the accounts do not add up: {report}").into());
    }
    Ok(())
}

/// Activates the kernel, lets `send` send all payloads, and asks for the sum.
fn with_kernel<const N: usize>(
    kernel: &KernelHandle,
    send: impl FnOnce() -> Result<(), Failure>,
) -> Result<u64, Failure> {
    kernel.activate()?;
    send()?;
    let mut sum = [0; 8];
    kernel.call_bytes(&numbered::<N>(ASK), &mut sum, TIMEOUT)?;
    kernel.deactivate()?;
    Ok(u64::from_ne_bytes(sum))
}

fn endpoints<const N: usize>(kernel: &KernelHandle, messages: usize) -> Result<u64, Failure> {
    with_kernel::<N>(kernel, || {
        let (mut sender, _receiver) = kernel.split_bytes()?;
        for number in 0..messages as u64 {
            let payload = numbered::<N>(number);
            loop {
                match sender.try_send_bytes(&payload) {
                    Ok(()) => break,
                    Err(TrySendError::Full) => spin_loop(),
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    })
}

fn endpoints_batch<const N: usize>(kernel: &KernelHandle, messages: usize) -> Result<u64, Failure> {
    with_kernel::<N>(kernel, || {
        let (mut sender, _receiver) = kernel.split_bytes()?;
        let mut number = 0;
        while number < messages {
            match sender.batch((messages - number).min(64)) {
                Ok(mut batch) => {
                    for _ in 0..batch.room() {
                        batch.stage_bytes(&numbered::<N>(number as u64))?;
                        number += 1;
                    }
                    batch.commit()?;
                }
                Err(TrySendError::Full) => spin_loop(),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    })
}

fn handle_send<const N: usize>(kernel: &KernelHandle, messages: usize) -> Result<u64, Failure> {
    with_kernel::<N>(kernel, || {
        for number in 0..messages as u64 {
            kernel.send_bytes(&numbered::<N>(number))?;
        }
        Ok(())
    })
}

/// Runs `consume`, which sums `messages` payloads, on the kernel core while `produce` runs here.
fn with_consumer(
    config: &Config,
    consume: impl FnOnce() -> u64 + Send,
    produce: impl FnOnce(),
) -> Result<u64, Failure> {
    thread::scope(|scope| {
        let consumer = scope.spawn(|| {
            // Pinning failed before in `paths`, if it fails at all.
            let _ = pin_current_thread(config.kernel_core);
            consume()
        });
        produce();
        consumer.join().map_err(|_| "the consumer panicked".into())
    })
}

fn bare_ring<const N: usize>(config: &Config, messages: usize) -> Result<u64, Failure> {
    let ring = ring(N)?;
    let (mut producer, mut consumer) = ring.ends();
    with_consumer(
        config,
        move || {
            let (mut sum, mut count) = (0_u64, 0);
            while count < messages {
                match consumer.try_next() {
                    Ok(Some(incoming)) => {
                        sum = sum.wrapping_add(first_word(incoming.payload()));
                        count += 1;
                    }
                    _ => spin_loop(),
                }
            }
            sum
        },
        move || {
            for number in 0..messages as u64 {
                let payload = numbered::<N>(number);
                while producer.try_push(&Envelope::default(), &payload).is_err() {
                    spin_loop();
                }
            }
        },
    )
}

fn rtrb<const N: usize>(config: &Config, messages: usize) -> Result<u64, Failure> {
    let (mut producer, mut consumer) = rtrb::RingBuffer::<[u8; N]>::new(CAPACITY);
    with_consumer(
        config,
        move || {
            let (mut sum, mut count) = (0_u64, 0);
            while count < messages {
                match consumer.pop() {
                    Ok(payload) => {
                        sum = sum.wrapping_add(first_word(&payload));
                        count += 1;
                    }
                    Err(_) => spin_loop(),
                }
            }
            sum
        },
        move || {
            for number in 0..messages as u64 {
                while producer.push(numbered::<N>(number)).is_err() {
                    spin_loop();
                }
            }
        },
    )
}

fn crossbeam<const N: usize>(config: &Config, messages: usize) -> Result<u64, Failure> {
    let (sender, receiver) = crossbeam_channel::bounded::<[u8; N]>(CAPACITY);
    with_consumer(
        config,
        move || {
            let (mut sum, mut count) = (0_u64, 0);
            while count < messages {
                match receiver.try_recv() {
                    Ok(payload) => {
                        sum = sum.wrapping_add(first_word(&payload));
                        count += 1;
                    }
                    Err(_) => spin_loop(),
                }
            }
            sum
        },
        move || {
            for number in 0..messages as u64 {
                while sender.try_send(numbered::<N>(number)).is_err() {
                    spin_loop();
                }
            }
        },
    )
}

fn std_mpsc<const N: usize>(config: &Config, messages: usize) -> Result<u64, Failure> {
    let (sender, receiver) = mpsc::sync_channel::<[u8; N]>(CAPACITY);
    with_consumer(
        config,
        move || {
            let (mut sum, mut count) = (0_u64, 0);
            while count < messages {
                match receiver.try_recv() {
                    Ok(payload) => {
                        sum = sum.wrapping_add(first_word(&payload));
                        count += 1;
                    }
                    Err(_) => spin_loop(),
                }
            }
            sum
        },
        move || {
            for number in 0..messages as u64 {
                while sender.try_send(numbered::<N>(number)).is_err() {
                    spin_loop();
                }
            }
        },
    )
}
