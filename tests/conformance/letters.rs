//! Messages that could not be delivered.

use std::time::Duration;

use ringkernel::error::{
    CallError, MessageError, RecvTimeoutError, ReplayError, TrySendError, Unavailable,
};
use ringkernel::kernel::{DeadLetter, DeadLetterReason};
use ringkernel::{
    KernelHandle, KernelState, LaunchOptions, RingKernelRuntime, RuntimeConfig, SendOptions,
};

use super::kernels::{Add, GATE_OPEN, Opened, Sum};
use super::{LONG, Subject, active, eventually, runtime, runtime_from, small};

fn letters(runtime: &RingKernelRuntime) -> Vec<DeadLetter> {
    std::iter::from_fn(|| runtime.dead_letters().try_recv()).collect()
}

/// Rings of sixteen slots with room for deadlines and trace ids.
fn extended() -> LaunchOptions {
    LaunchOptions {
        extended: true,
        ..small()
    }
}

/// Sends by `send` until a kernel of sixteen slots is stuck on replies that nobody reads: the first sixteen are handled, all others
/// stay in its ring.
fn queue_up(kernel: &KernelHandle, messages: u32, mut send: impl FnMut(u32)) {
    for number in 0..messages {
        send(number);
    }
    eventually("sixteen replies", || kernel.metrics().processed == 16);
}

/// What is queued when a kernel ends can be sent to another one, under its type.
pub fn what_is_queued_at_the_end_can_be_sent_again<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.add", extended());
    queue_up(&kernel, 22, |number| {
        let options = SendOptions {
            correlation: number + 1,
            deadline_ns: Some(u64::MAX),
            trace_id: Some([7; 16]),
            ..SendOptions::default()
        };
        let add = Add {
            left: number.into(),
            right: 1,
            negate: false,
        };
        match number {
            21 => kernel.send_bytes(b"raw").unwrap(),
            _ => kernel.send_with(&add, &options, LONG).unwrap(),
        }
    });
    let name = kernel.status().name;
    kernel.terminate().unwrap();
    let letters = letters(&runtime);
    // One may be in its handler's hands.
    let queued = letters.len() as u64;
    assert!(queued == 5 || queued == 6, "{queued}");
    let other = active(&runtime, "test.add", extended());
    for (letter, left) in letters.iter().zip(22 - queued..) {
        assert_eq!(letter.kernel, name);
        assert_eq!(letter.reason, DeadLetterReason::Shutdown);
        assert!(!letter.is_reply && !letter.is_cut() && letter.at_ns > 0);
        assert_eq!(letter.block, Some(0));
        let header = letter.header.unwrap();
        if left < 21 {
            assert_eq!(u64::from(header.correlation()), left + 1);
            assert!(letter.type_id.is_some());
            let extension = letter.extension.unwrap();
            assert_eq!(
                (extension.deadline_ns, extension.trace_id),
                (u64::MAX, [7; 16])
            );
            other.replay(letter).unwrap();
            let sum: Sum = other.recv_timeout(LONG).unwrap();
            assert_eq!(sum.value, i128::from(left) + 1);
        } else {
            assert_eq!(
                (letter.payload.as_slice(), letter.type_id),
                (b"raw".as_slice(), None)
            );
        }
    }
    // To a kernel that does not know the type, or is gone, nothing is sent.
    let closed = active(&runtime, "test.repeat", small());
    assert!(matches!(
        closed.replay(&letters[0]),
        Err(ReplayError::Send(TrySendError::Rejected(_)))
    ));
    let echo = active(&runtime, "echo", small());
    let mut reply = [0; 16];
    echo.replay(letters.last().unwrap()).unwrap();
    assert_eq!(echo.recv_bytes_timeout(&mut reply, LONG), Ok(3));
    assert_eq!(reply[..3], *b"raw");
    assert_eq!(
        kernel.replay(&letters[0]),
        Err(ReplayError::Send(TrySendError::Unavailable(
            Unavailable::Terminated
        )))
    );
    let counts = runtime.dead_letters().counts();
    assert_eq!((counts.shutdown, counts.requests()), (queued, 0));
    assert!(runtime.complete_shutdown().unwrap().requests.adds_up());
}

/// The queue is bounded, payloads are cut where the configuration says so, and everything is counted.
pub fn letters_beyond_the_bound_are_counted<S: Subject>() {
    let config = RuntimeConfig {
        dead_letter_capacity: 3,
        dead_letter_bytes: 4,
        ..RuntimeConfig::default()
    };
    let runtime = runtime_from(S::builder_with(config));
    let kernel = active(&runtime, "echo", small());
    queue_up(&kernel, 24, |number| {
        kernel.send_bytes(&[number as u8; 6]).unwrap()
    });
    kernel.terminate().unwrap();
    let queue = runtime.dead_letters();
    let lost = queue.counts().shutdown;
    assert!(lost == 7 || lost == 8, "{lost}");
    assert_eq!((queue.len(), queue.overflowed()), (3, lost - 3));
    let other = active(&runtime, "echo", small());
    for (letter, number) in letters(&runtime).iter().zip(21_u8..) {
        assert_eq!(
            (letter.payload.as_slice(), letter.payload_bytes),
            ([number; 4].as_slice(), 6)
        );
        assert!(letter.is_cut());
        assert_eq!(other.replay(letter), Err(ReplayError::Incomplete));
    }
    assert!(runtime.dead_letters().is_empty());
}

/// Replies that a call cannot take, and those that nobody has received when the last handle goes.
pub fn replies_that_nobody_takes_are_kept<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "echo", small());
    assert_eq!(
        kernel.call_bytes(b"too long for it", &mut [0; 4], LONG),
        Err(CallError::Message(MessageError::BufferTooSmall {
            length: 15
        }))
    );
    let letter = runtime.dead_letters().try_recv().unwrap();
    assert_eq!(letter.reason, DeadLetterReason::Mismatch);
    assert!(letter.is_reply);
    assert_eq!(letter.payload, b"too long for it");
    for number in 0..3_u8 {
        kernel.send_bytes(&[number]).unwrap();
    }
    eventually("the replies", || kernel.metrics().processed == 4);
    kernel.terminate().unwrap();
    let metrics = kernel.metrics();
    assert_eq!(metrics.dead_letters.mismatched, 1);
    assert_eq!(metrics.received_replies, 0);
    assert!(
        runtime.dead_letters().is_empty(),
        "they can be received still"
    );
    drop(kernel);
    let _ = runtime.kernels();
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.replies.adds_up(), "{report}");
    assert_eq!(
        (report.replies.dead_lettered, report.replies.returned),
        (1, 3)
    );
    let letters = letters(&runtime);
    assert_eq!(letters.len(), 3);
    for (letter, number) in letters.iter().zip(0_u8..) {
        assert_eq!(letter.reason, DeadLetterReason::Shutdown);
        assert!(letter.is_reply);
        assert_eq!(letter.payload, [number]);
    }
}

/// A late reply is a letter: the call that it was for has timed out.
pub fn a_late_reply_is_kept<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.gated", small());
    let mut reply = [0; 16];
    assert!(
        kernel
            .call_bytes(b"too slow", &mut reply, Duration::from_millis(5))
            .is_err()
    );
    let _open = Opened::new(&GATE_OPEN);
    eventually("the letter", || {
        assert!(matches!(
            kernel.recv_bytes_timeout(&mut reply, Duration::from_millis(1)),
            Err(RecvTimeoutError::Timeout)
        ));
        runtime.dead_letters().len() == 1
    });
    let letter = runtime.dead_letters().try_recv().unwrap();
    assert_eq!(letter.reason, DeadLetterReason::LateReply);
    assert!(letter.is_reply);
    assert_eq!(letter.payload, b"too slow");
    assert_eq!(kernel.replay(&letter), Err(ReplayError::NotARequest));
    assert_eq!(kernel.metrics().dead_letters.late_replies, 1);
}

/// The request that a handler panicked on is a letter, and those behind it.
pub fn a_failed_kernels_requests_are_kept<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = active(&runtime, "test.panic", small());
    queue_up(&kernel, 18, |number| {
        let payload: &[u8] = match number {
            16 => b"panic",
            17 => b"behind it",
            _ => b"fine",
        };
        kernel.send_bytes(payload).unwrap();
    });
    // Now there is room for one more reply.
    assert_eq!(kernel.recv_bytes_timeout(&mut [0; 8], LONG), Ok(4));
    eventually("the failure", || {
        kernel.status().state == KernelState::Failed
    });
    drop(kernel);
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.requests.adds_up(), "{report}");
    let letters = letters(&runtime);
    let seen: Vec<_> = letters
        .iter()
        .filter(|letter| !letter.is_reply)
        .map(|letter| (letter.reason, letter.payload.as_slice()))
        .collect();
    assert_eq!(
        seen,
        [
            (DeadLetterReason::KernelFailed, b"panic".as_slice()),
            (DeadLetterReason::Shutdown, b"behind it"),
        ]
    );
}
