//! Sends messages to a resident echo kernel, checks every byte that comes back, and prints how long that took.
//!
//! `cargo run --release --example echo -- [--backend cpu|vulkan|cuda|metal] [--device INDEX|NAME] [--messages N]
//! [--payload BYTES] [--json FILE]`

mod support;

use std::process::ExitCode;
use std::time::Duration;

use hdrhistogram::Histogram;
use ringkernel::time::now_ns_ordered;
use ringkernel::{Dim3, LaunchOptions};
use support::{Failure, parse, report, runtime};

const TIMEOUT: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let Some(arguments) = parse("echo", 48)? else {
        return Ok(());
    };
    let runtime = runtime(&arguments)?;
    let options = LaunchOptions {
        message_size: Some(arguments.payload),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("echo", Dim3::x(1), Dim3::x(1), options)?;
    kernel.activate()?;

    let mut histogram = Histogram::<u64>::new(3)?;
    let mut message = vec![0; arguments.payload];
    let mut reply = vec![0; arguments.payload];
    {
        let (mut sender, mut receiver) = kernel.split_bytes()?;
        for number in 0..arguments.messages {
            for (index, byte) in message.iter_mut().enumerate() {
                *byte = (number as usize).wrapping_mul(31).wrapping_add(index) as u8;
            }
            let begin = now_ns_ordered();
            sender.try_send_bytes(&message)?;
            let length = receiver.recv_bytes_timeout(&mut reply, TIMEOUT)?;
            histogram.record((now_ns_ordered() - begin).max(1))?;
            if reply[..length] != message {
                return Err(format!("message {number} came back changed").into());
            }
        }
    }

    kernel.terminate()?;
    let devices = runtime.devices();
    let device = &devices[runtime.default_device()];
    let shutdown = runtime.complete_shutdown()?;
    if shutdown.replies.delivered != arguments.messages || !shutdown.requests.adds_up() {
        return Err(format!("the accounts do not add up: {shutdown}").into());
    }
    report("echo", &arguments, device, &histogram)
}
