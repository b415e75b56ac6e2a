//! Model checks of what clients and mergers promise each other, over the real rings and the real baton.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --lib`

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use loom::thread;

use crate::heap_ring::HeapRing;
use crate::message::Envelope;
use crate::ring::{Consumer, Producer, RingLayout, WriteCombining};
use crate::thread::baton::Baton;

/// A ring for payloads of 8 bytes.
fn ring(capacity: usize) -> HeapRing {
    HeapRing::new(
        RingLayout::new(capacity, 8, false).unwrap(),
        0,
        WriteCombining::No,
    )
}

fn push(producer: &mut Producer, message: u8) -> bool {
    producer.try_push(&Envelope::default(), &[message]).is_ok()
}

fn pop(consumer: &mut Consumer) -> Option<u8> {
    let incoming = consumer.try_next().unwrap()?;
    Some(incoming.payload()[0])
}

/// More threads than two have too many interleavings for all of them (see `thread/event_count.rs`).
fn check(run: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(run);
}

/// As `Merger`, with one lane of one level.
struct Merging {
    lane: Consumer,
    kernel: Producer,
}

impl Merging {
    fn merge(&mut self) {
        while let Some(message) = pop(&mut self.lane) {
            assert!(push(&mut self.kernel, message));
        }
    }
}

/// As `ClientLane`, for what it sends.
struct Sending {
    hub: Arc<(Baton<Merging>, AtomicBool)>,
    lane: Producer,
    is_dirty: bool,
}

impl Sending {
    fn send(&mut self, message: u8) {
        let (baton, crowded) = &*self.hub;
        if !crowded.load(Ordering::Relaxed)
            && let Some(mut merging) = baton.try_take()
        {
            if self.is_dirty {
                merging.merge();
                self.is_dirty = false;
            }
            if !crowded.load(Ordering::Relaxed) {
                assert!(push(&mut merging.kernel, message));
                return;
            }
        }
        assert!(push(&mut self.lane, message));
        self.is_dirty = true;
        if let Some(mut merging) = baton.try_take() {
            merging.merge();
            self.is_dirty = false;
        }
    }
}

/// A client that is alone sends directly or, when the baton is taken, through its lane; meanwhile another one is added, and its thread
/// merges. The kernel gets everything, in order.
#[test]
fn messages_stay_in_order_when_a_second_client_comes() {
    check(|| {
        let (lane, kernel) = (ring(4), ring(4));
        let (lane_in, lane_out) = lane.ends(0);
        let (kernel_in, mut kernel_out) = kernel.ends(0);
        let merging = Merging {
            lane: lane_out,
            kernel: kernel_in,
        };
        let hub = Arc::new((Baton::new(merging), AtomicBool::new(false)));
        let other = Arc::clone(&hub);
        let second = thread::spawn(move || {
            if let Some(mut merging) = other.0.try_take() {
                other.1.store(true, Ordering::SeqCst);
                merging.merge();
            }
            if let Some(mut merging) = other.0.try_take() {
                merging.merge();
            }
        });
        let mut client = Sending {
            hub: Arc::clone(&hub),
            lane: lane_in,
            is_dirty: false,
        };
        for message in 1..=3 {
            client.send(message);
        }
        second.join().unwrap();
        // As the bridge does, which is called when a message stays in a lane.
        let mut merging = hub.0.try_take().unwrap();
        merging.merge();
        for message in 1..=3 {
            assert_eq!(pop(&mut kernel_out), Some(message));
        }
        assert_eq!(pop(&mut kernel_out), None);
        drop((merging, client));
        drop(hub);
        drop(kernel_out);
        drop((lane, kernel));
    });
}

/// A lane of two, whose client reads as late as it can. The kernel replies, says that it is done, and goes on.
#[test]
fn a_reply_always_finds_room() {
    const CREDIT: u32 = 2;
    const MESSAGES: u8 = 3;
    check(|| {
        let (requests, replies, lane) = (ring(4), ring(4), ring(CREDIT as usize));
        let (mut request_in, mut request_out) = requests.ends(0);
        let (mut reply_in, mut reply_out) = replies.ends(0);
        let (mut lane_in, mut lane_out) = lane.ends(0);
        let processed = Arc::new(AtomicU32::new(0));
        let progress = Arc::clone(&processed);
        let kernel = thread::spawn(move || {
            for message in 1..=MESSAGES {
                let request = loop {
                    if let Some(request) = pop(&mut request_out) {
                        break request;
                    }
                    thread::yield_now();
                };
                assert_eq!(request, message);
                assert!(push(&mut reply_in, request));
                progress.store(message.into(), Ordering::Release);
            }
        });
        let (mut forwarded, mut settled, mut received) = (0, 0, 0);
        while received < MESSAGES {
            let expected = forwarded - settled;
            // As `Lane::has_credit`.
            let has_credit = expected < CREDIT && lane_in.free_slots(expected + 1) > expected;
            if has_credit && forwarded < MESSAGES.into() {
                forwarded += 1;
                assert!(push(&mut request_in, forwarded as u8));
                continue;
            }
            // As `Merger::settle`: progress first.
            let done = processed.load(Ordering::Acquire);
            while let Some(reply) = pop(&mut reply_out) {
                assert!(push(&mut lane_in, reply), "reply {reply} finds no room");
            }
            if done == settled {
                // Nothing is left to wait for, or to give back: now it reads.
                if settled == forwarded {
                    received += 1;
                    assert_eq!(pop(&mut lane_out), Some(received));
                    lane_out.publish_cursor();
                }
                thread::yield_now();
            }
            settled = done;
        }
        kernel.join().unwrap();
        drop((request_in, reply_out, lane_in, lane_out));
        drop((requests, replies, lane));
    });
}
