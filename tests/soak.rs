//! Fifty million messages whose content is verified, through a resident kernel and back.

use std::time::{Duration, Instant};

use ringkernel::error::TrySendError;
use ringkernel::{LaunchOptions, RingKernelRuntime};

const MESSAGES: u64 = 50_000_000;

/// More than a slow, shared machine needs.
const BOUND: Duration = Duration::from_secs(900);

/// Every 8 bytes depend on the message's number.
fn payload(number: u64) -> [u8; 24] {
    let mut payload = [0; 24];
    payload[..8].copy_from_slice(&number.to_ne_bytes());
    payload[8..16].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_ne_bytes());
    payload[16..].copy_from_slice(&(!number).to_ne_bytes());
    payload
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "takes minutes without optimisation: run with --release"
)]
fn fifty_million_messages_come_back_unchanged_and_in_order() {
    let runtime = RingKernelRuntime::builder().build().unwrap();
    let kernel = runtime
        .launch("echo", 1, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    let begin = Instant::now();
    {
        let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
        let (mut sent, mut received) = (0, 0);
        while received < MESSAGES {
            match sender.batch(usize::try_from(MESSAGES - sent).unwrap().min(64)) {
                Ok(mut batch) => {
                    for _ in 0..batch.room() {
                        batch.stage_bytes(&payload(sent)).unwrap();
                        sent += 1;
                    }
                    batch.commit().unwrap();
                }
                Err(error) => assert_eq!(error, TrySendError::Full),
            }
            // Never more than the rings hold: what is on its way fits into the reply ring.
            let _ = receiver.drain(256, |reply| {
                assert_eq!(reply.payload(), payload(received));
                received += 1;
            });
            if received % (1 << 20) < 256 {
                assert!(begin.elapsed() < BOUND, "{received} in {BOUND:?}");
            }
        }
        assert_eq!(sent, MESSAGES);
        assert!(receiver.try_recv_ref().is_err());
    }
    let metrics = kernel.metrics();
    assert_eq!((metrics.accepted, metrics.processed), (MESSAGES, MESSAGES));
    assert_eq!(
        (metrics.produced, metrics.received_replies),
        (MESSAGES, MESSAGES)
    );
    let report = runtime.complete_shutdown().unwrap();
    assert!(
        report.requests.adds_up() && report.replies.adds_up(),
        "{report}"
    );
    println!(
        "{MESSAGES} verified round trips in {:.1} s",
        begin.elapsed().as_secs_f64()
    );
}
