//! Model checks: every interleaving of the ring's two sides, and of parking, within loom's bounds.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom`
#![cfg(loom)]

mod heap_ring;

use heap_ring::HeapRing;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use ringkernel::message::Envelope;
use ringkernel::ring::{Consumer, PushError, RingLayout, WriteCombining};

/// A ring for payloads of 8 bytes.
fn ring(capacity: usize, start: u32) -> HeapRing {
    let layout = RingLayout::new(capacity, 8, false).unwrap();
    HeapRing::new(layout, start, WriteCombining::No)
}

fn receive(consumer: &mut Consumer) -> u8 {
    loop {
        if let Some(incoming) = consumer.try_next().unwrap() {
            let payload = incoming.payload();
            assert_eq!(payload.len(), 1);
            return payload[0];
        }
        thread::yield_now();
    }
}

/// Publish and consume, through more messages than the ring has slots: the consumer sees whole messages in order, and
/// no slot is written while it is read.
fn laps(capacity: usize, messages: u8, start: u32) {
    loom::model(move || {
        let ring = ring(capacity, start);
        let (mut producer, mut consumer) = ring.ends(start);
        let sender = thread::spawn(move || {
            for message in 0..messages {
                loop {
                    match producer.try_push(&Envelope::default(), &[message]) {
                        Ok(()) => break,
                        Err(PushError::Full) => thread::yield_now(),
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            assert_eq!(producer.bad_cursors(), 0);
        });
        for message in 0..messages {
            assert_eq!(receive(&mut consumer), message);
        }
        sender.join().unwrap();
        assert!(consumer.try_next().unwrap().is_none());
        drop(consumer);
        drop(ring);
    });
}

#[test]
fn messages_arrive_whole_and_in_order_over_several_laps() {
    laps(2, 4, 0);
}

#[test]
fn sequences_wrap_around_at_the_integer_limit() {
    laps(2, 4, u32::MAX - 1);
}

#[test]
fn a_batch_is_seen_from_its_first_message_on() {
    loom::model(|| {
        let ring = ring(4, 0);
        let (mut producer, mut consumer) = ring.ends(0);
        let sender = thread::spawn(move || {
            let mut batch = producer.batch(3);
            for message in 0..3_u8 {
                batch
                    .stage(&Envelope::default(), |body| {
                        body[0] = message;
                        Ok::<_, PushError>(1)
                    })
                    .unwrap();
            }
            assert_eq!(batch.commit(), 3);
        });
        for message in 0..3 {
            assert_eq!(receive(&mut consumer), message);
        }
        sender.join().unwrap();
        drop(consumer);
        drop(ring);
    });
}

/// A receiver that sleeps while the other side closes instead of sending is woken; a message written before the close
/// is received.
#[test]
fn a_close_while_waiting_is_seen_after_the_last_message() {
    loom::model(|| {
        let ring = ring(2, 0);
        let (mut producer, mut consumer) = ring.ends(0);
        let closed = Arc::new(AtomicBool::new(false));
        let closing = Arc::clone(&closed);
        let sender = thread::spawn(move || {
            producer.try_push(&Envelope::default(), &[7]).unwrap();
            closing.store(true, Ordering::Release);
        });
        let received = loop {
            if let Some(incoming) = consumer.try_next().unwrap() {
                break Some(incoming.payload()[0]);
            }
            if closed.load(Ordering::Acquire) {
                // The runtime's receivers look once more, exactly so.
                break consumer
                    .try_next()
                    .unwrap()
                    .map(|incoming| incoming.payload()[0]);
            }
            thread::yield_now();
        };
        assert_eq!(received, Some(7));
        sender.join().unwrap();
        drop(consumer);
        drop(ring);
    });
}
