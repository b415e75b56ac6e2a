//! Time: clocks that order the messages of several kernels, and traces of when a kernel saw its messages.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringkernel::time::{HlcTimestamp, now_ns, now_ns_ordered};
use ringkernel::{
    Bytes, Hlc, KernelHandle, LaunchOptions, MessageTrace, Receiver, RingKernelRuntime,
    SendOptions, Sender,
};

use super::{LONG, Subject, active, eventually, runtime};

/// Says that it is over, also when a test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends a stamped message through an echo kernel; the stamp that came back.
fn stamp(ends: &mut (Sender<Bytes>, Receiver<Bytes>)) -> HlcTimestamp {
    let stamped = SendOptions {
        timestamp: true,
        ..SendOptions::default()
    };
    ends.0.try_send_bytes_with(b"", &stamped).unwrap();
    let reply = ends.1.recv_ref_timeout(LONG).unwrap();
    HlcTimestamp::from_u64(reply.extension().unwrap().timestamp_ns)
}

pub fn what_happened_before_is_stamped_lower_across_kernels_and_clocks<S: Subject>() {
    let runtime = runtime::<S>();
    // Two kernels of one clock, and one whose clock knows of that by messages alone.
    let (near, far) = (Arc::new(Hlc::new()), Arc::new(Hlc::new()));
    let launch = |clock: &Arc<Hlc>| {
        let options = LaunchOptions {
            extended: true,
            hlc: Some(Arc::clone(clock)),
            ..LaunchOptions::default()
        };
        let kernel = active(&runtime, "echo", options);
        kernel.split_bytes().unwrap()
    };
    let (mut first, mut second, mut third) = (launch(&near), launch(&near), launch(&far));
    // Somebody else draws on both clocks meanwhile.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _over = Over(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert!(near.now() < near.now());
                assert!(far.now() < far.now());
                std::thread::yield_now();
            }
        });
        let mut last = near.now();
        let mut after = |stamp: HlcTimestamp| {
            assert!(last < stamp, "{last:?} is not before {stamp:?}");
            last = stamp;
            stamp
        };
        for _ in 0..200 {
            after(stamp(&mut first));
            let sent = after(stamp(&mut second));
            after(far.update(sent).unwrap());
            let answered = after(stamp(&mut third));
            after(near.update(answered).unwrap());
        }
    });
}

/// Launches a kernel that traces one message in `every`.
fn traced(runtime: &RingKernelRuntime, id: &str, blocks: u32, every: u32) -> KernelHandle {
    let options = LaunchOptions {
        extended: true,
        trace_every: NonZeroU32::new(every),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch(id, blocks, 1, options).unwrap();
    kernel.activate().unwrap();
    kernel
}

/// Waits for samples: they are written after the replies, and a device on a loaded machine may be late to tell its clock.
fn traces(kernel: &KernelHandle, count: usize) -> Vec<MessageTrace> {
    let mut traces = None;
    eventually("the samples", || {
        traces = kernel.traces();
        traces.as_ref().is_some_and(|traces| traces.len() >= count)
    });
    traces.unwrap()
}

pub fn a_kernel_is_traced_only_if_asked_to<S: Subject>() {
    let runtime = runtime::<S>();
    let plain = active(&runtime, "echo", LaunchOptions::default());
    plain.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
    assert_eq!(plain.traces(), None);
    let traced = traced(&runtime, "echo", 1, 1);
    assert_eq!(traced.traces(), Some(Vec::new()));
    // What it takes is said, and taken for it alone.
    let bytes = |kernel: &KernelHandle| kernel.metrics().memory_bytes;
    assert!(bytes(&traced) >= bytes(&plain) + 256 * 64);
}

pub fn a_trace_tells_when_a_message_was_sent_seen_and_done<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = traced(&runtime, "echo", 1, 1);
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    let mut bounds = Vec::new();
    for correlation in 1..=100 {
        let options = SendOptions {
            correlation,
            timestamp: correlation.is_multiple_of(2),
            trace_id: correlation
                .is_multiple_of(5)
                .then_some([correlation as u8; 16]),
            ..SendOptions::default()
        };
        let before = now_ns_ordered();
        sender.try_send_bytes_with(b"payload", &options).unwrap();
        let reply = receiver.recv_ref_timeout(LONG).unwrap();
        let sent = reply.extension().map(|extension| extension.timestamp_ns);
        bounds.push((before, sent.filter(|sent| *sent != 0), now_ns_ordered()));
    }
    let traces = traces(&kernel, 100);
    assert_eq!(traces.len(), 100);
    for (index, (trace, (before, sent, after))) in traces.iter().zip(bounds).enumerate() {
        let correlation = index as u32 + 1;
        assert_eq!((trace.block, trace.sample), (0, index as u32));
        assert_eq!(trace.correlation, correlation);
        let id = correlation
            .is_multiple_of(5)
            .then_some([correlation as u8; 16]);
        assert_eq!(trace.trace_id, id);
        assert_eq!(trace.sent_ns, sent);
        assert_eq!(sent.is_some(), correlation.is_multiple_of(2));
        assert_eq!(trace.queue_time().is_some(), sent.is_some());
        // Seen after it was sent, and before its reply came; to what the clocks may differ.
        let error = trace.clock_error.as_nanos() as u64;
        let sent = sent.unwrap_or(before);
        assert!(
            trace.seen_ns + error >= sent,
            "{trace:?} was sent at {sent}"
        );
        assert!(
            trace.seen_ns <= after + error,
            "{trace:?} came back at {after}"
        );
        assert!(trace.seen_ns <= trace.done_ns, "{trace:?}");
    }
    // The next one was sent when the last one had come back, and seen after it was done with.
    let in_order = |pair: &[MessageTrace]| pair[0].done_ns <= pair[1].seen_ns;
    assert!(traces.windows(2).all(in_order), "{traces:?}");
}

pub fn one_message_in_n_is_traced_and_every_one_with_a_trace_id<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = traced(&runtime, "echo", 2, 10);
    let (mut sender, mut receiver) = kernel.split_bytes().unwrap();
    for correlation in 1..=100 {
        let options = SendOptions {
            correlation,
            key: Some(u64::from(correlation % 2)),
            trace_id: (correlation == 33 || correlation == 98).then_some([1; 16]),
            ..SendOptions::default()
        };
        sender.try_send_bytes_with(b"", &options).unwrap();
        receiver.recv_ref_timeout(LONG).unwrap();
    }
    let traces = traces(&kernel, 10 + 2);
    for trace in &traces {
        let with_id = trace.correlation == 33 || trace.correlation == 98;
        assert_eq!(trace.trace_id.is_some(), with_id, "{trace:?}");
        assert_eq!((trace.sent_ns, trace.queue_time()), (None, None));
    }
    assert_eq!(traces.len(), 12);
    // Each block counts its own messages, and tells its own samples.
    for block in traces.chunk_by(|a, b| a.block == b.block) {
        assert_eq!(block.len(), 6);
        assert!(block.iter().zip(0..).all(|(trace, at)| trace.sample == at));
        assert!(
            block
                .iter()
                .all(|trace| (trace.correlation - block[0].correlation) % 2 == 0)
        );
        let plain: Vec<u32> = block
            .iter()
            .filter(|trace| trace.trace_id.is_none())
            .map(|trace| trace.correlation)
            .collect();
        assert_eq!(plain.len(), 5);
        assert!(plain.windows(2).all(|pair| pair[1] - pair[0] == 20));
    }
}

pub fn the_latest_traces_are_kept_and_outlive_a_pause<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = traced(&runtime, "echo", 1, 1);
    let mut reply = [0; 8];
    for _ in 0..300 {
        kernel.call_bytes(b"", &mut reply, LONG).unwrap();
    }
    traces(&kernel, 256);
    kernel.deactivate().unwrap();
    let before = traces(&kernel, 256);
    assert_eq!(before.len(), 256);
    assert!(
        before
            .iter()
            .zip(44..)
            .all(|(trace, at)| trace.sample == at)
    );
    kernel.activate().unwrap();
    let activated = now_ns();
    kernel.call_bytes(b"", &mut reply, LONG).unwrap();
    eventually("one more sample", || {
        kernel.traces().unwrap().last().unwrap().sample == 300
    });
    kernel.terminate().unwrap();
    let after = kernel.traces().unwrap();
    assert_eq!(after.len(), 256);
    let last = after.last().unwrap();
    let error = last.clock_error.as_nanos() as u64;
    assert!(last.seen_ns + error >= activated, "{last:?}");
}

pub fn a_kernel_that_cannot_be_traced_says_so<S: Subject>() {
    let runtime = runtime::<S>();
    let plain = active(&runtime, "echo", LaunchOptions::default());
    let options = LaunchOptions {
        trace_every: NonZeroU32::new(1),
        ..LaunchOptions::default()
    };
    let traced = active(&runtime, "echo", options);
    traced.call_bytes(b"x", &mut [0; 8], LONG).unwrap();
    assert_eq!(traced.traces(), None);
    // Nor is anything taken for it.
    let bytes = |kernel: &KernelHandle| kernel.metrics().memory_bytes;
    assert_eq!(bytes(&traced), bytes(&plain));
}

pub fn handler_time_is_all_of_the_handlers_time<S: Subject>() {
    let runtime = runtime::<S>();
    let kernel = traced(&runtime, "test.sleep", 1, 1);
    let mut reply = [0; 8];
    // On a device the first one takes thousands of runs of the handler, the others one.
    for millis in [20_u8, 0, 0, 0, 0, 0] {
        kernel.call_bytes(&[millis], &mut reply, LONG).unwrap();
    }
    let traces = traces(&kernel, 6);
    let (long, short) = (traces[0], &traces[1..]);
    let shortest = short.iter().map(MessageTrace::handler_time).min().unwrap();
    assert!(long.handler_time() > 10 * shortest, "{traces:?}");
    assert!(long.done_ns <= traces[1].seen_ns, "{traces:?}");
}
