//! Sends pairs of vectors to a resident `a * x + y` kernel, checks every element that comes back, and prints how long
//! that took.
//!
//! `cargo run --release --example saxpy -- [--backend cpu|vulkan|cuda|metal] [--device INDEX|NAME] [--messages N]
//! [--payload BYTES] [--json FILE]`
//!
//! A payload is two words and two vectors of equal length: 8 bytes and a multiple of 8.

mod support;

use std::process::ExitCode;
use std::time::Duration;

use hdrhistogram::Histogram;
use ringkernel::kernel::{saxpy_reply, saxpy_request};
use ringkernel::time::now_ns_ordered;
use ringkernel::{Dim3, LaunchOptions};
use support::{Failure, parse, report, runtime};

const TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("saxpy: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let Some(arguments) = parse("saxpy", 1032)? else {
        return Ok(());
    };
    if arguments.payload < 8 || !arguments.payload.is_multiple_of(8) {
        return Err("--payload must be 8 and a multiple of 8".into());
    }
    let runtime = runtime(&arguments)?;
    let options = LaunchOptions {
        message_size: Some(arguments.payload),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("saxpy", Dim3::x(1), Dim3::x(1), options)?;
    kernel.activate()?;

    let elements = (arguments.payload - 8) / 8;
    let mut histogram = Histogram::<u64>::new(3)?;
    let mut request = vec![0; arguments.payload];
    let mut reply = vec![0; arguments.payload];
    let (mut x, mut y) = (vec![0.0; elements], vec![0.0; elements]);
    for number in 0..arguments.messages {
        // Small integers: every product and sum is exact, whether the device fuses the two or not.
        let a = (number % 7) as f32;
        for (index, (x, y)) in x.iter_mut().zip(&mut y).enumerate() {
            *x = ((number as usize + index) % 1000) as f32;
            *y = (index % 500) as f32;
        }
        let length = saxpy_request(a, &x, &y, &mut request).ok_or("the request does not fit")?;
        let begin = now_ns_ordered();
        let length = kernel.call_bytes(&request[..length], &mut reply, TIMEOUT)?;
        histogram.record((now_ns_ordered() - begin).max(1))?;
        let mut expected = x.iter().zip(&y).map(|(x, y)| a * x + y);
        if length != elements * 4 || !saxpy_reply(&reply[..length]).eq(&mut expected) {
            return Err(format!("message {number} came back wrong").into());
        }
    }

    kernel.terminate()?;
    let devices = runtime.devices();
    let device = &devices[runtime.default_device()];
    let shutdown = runtime.complete_shutdown()?;
    if shutdown.replies.delivered != arguments.messages || !shutdown.requests.adds_up() {
        return Err(format!("the accounts do not add up: {shutdown}").into());
    }
    report("saxpy", &arguments, device, &histogram)
}
