//! Properties of the ring over generated inputs: any capacity, any start position (wrap-around), any mixture of single
//! messages and batches, and any bytes that a bad peer may leave behind.

mod heap_ring;
mod slot_bytes;

use std::collections::VecDeque;

use heap_ring::HeapRing;
use proptest::collection::vec;
use proptest::prelude::*;
use ringkernel::message::{Envelope, Extension, MAX_PAYLOAD_BYTES, Priority};
use ringkernel::ring::{PushError, RingLayout, WriteCombining};

#[derive(Clone, Debug)]
enum Step {
    Push(Vec<u8>),
    Batch(Vec<Vec<u8>>),
    Abandon(Vec<u8>),
    Take(usize),
    Keep,
}

fn step() -> impl Strategy<Value = Step> {
    let payload = || vec(any::<u8>(), 0..=112);
    prop_oneof![
        payload().prop_map(Step::Push),
        vec(payload(), 0..12).prop_map(Step::Batch),
        payload().prop_map(Step::Abandon),
        (0..20_usize).prop_map(Step::Take),
        Just(Step::Keep),
    ]
}

fn start() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        (0..40_u32).prop_map(|back| u32::MAX - back),
        any::<u32>()
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Against a plain queue as the model.
    #[test]
    fn the_ring_is_a_bounded_queue(
        capacity in 1..40_usize,
        start in start(),
        combining in any::<bool>(),
        steps in vec(step(), 0..60),
    ) {
        let layout = RingLayout::new(capacity, 100, false).unwrap();
        let combining = if combining { WriteCombining::Yes } else { WriteCombining::No };
        let ring = HeapRing::new(layout, start, combining);
        let (mut producer, mut consumer) = ring.ends(start);
        let mut model: VecDeque<Vec<u8>> = VecDeque::new();
        let capacity = layout.capacity() as usize;
        let plain = Envelope::default();
        for step in steps {
            match step {
                Step::Push(payload) => match producer.try_push(&plain, &payload) {
                    Ok(()) => model.push_back(payload),
                    Err(error) => {
                        prop_assert_eq!(error, PushError::Full);
                        // Slots may still be on their way back, at most a quarter ring of them.
                        prop_assert!(model.len() + capacity.div_ceil(4) >= capacity);
                    }
                },
                Step::Batch(payloads) => {
                    let mut batch = producer.batch(payloads.len() as u32);
                    let room = batch.room() as usize;
                    for payload in payloads.iter().take(room) {
                        batch.stage(&plain, |body| {
                            body[..payload.len()].copy_from_slice(payload);
                            Ok::<_, PushError>(payload.len())
                        }).unwrap();
                    }
                    let refused = batch.stage(&plain, |_| Ok::<_, PushError>(0));
                    prop_assert_eq!(refused, Err(PushError::Full));
                    prop_assert_eq!(batch.commit() as usize, room);
                    model.extend(payloads.into_iter().take(room));
                }
                Step::Abandon(payload) => {
                    if let Ok(mut reservation) = producer.reserve(&plain) {
                        reservation.body_mut()[..payload.len()].copy_from_slice(&payload);
                    }
                }
                Step::Take(count) => for _ in 0..count {
                    let taken = consumer.try_next().unwrap().map(|incoming| incoming.payload().to_vec());
                    prop_assert_eq!(&taken, &model.pop_front());
                    if taken.is_none() {
                        // An empty poll has given everything back.
                        prop_assert_eq!(producer.free_slots(capacity as u32) as usize, capacity);
                        break;
                    }
                },
                Step::Keep => if let Some(incoming) = consumer.try_next().unwrap() {
                    prop_assert_eq!(Some(incoming.payload()), model.front().map(Vec::as_slice));
                    incoming.keep();
                },
            }
            prop_assert!(model.len() <= capacity);
        }
        prop_assert_eq!(producer.bad_cursors(), 0);
    }

    #[test]
    fn envelopes_arrive_as_they_were_sent(
        correlation in any::<u32>(),
        kind in any::<u16>(),
        lane in any::<u16>(),
        error in any::<bool>(),
        priority in prop_oneof![
            Just(Priority::Low), Just(Priority::Normal), Just(Priority::High), Just(Priority::Critical)
        ],
        extension in proptest::option::of((any::<u64>(), any::<u64>(), any::<[u8; 16]>())),
        payload in vec(any::<u8>(), 0..=48),
    ) {
        let layout = RingLayout::new(2, 48, true).unwrap();
        let ring = HeapRing::new(layout, 0, WriteCombining::No);
        let (mut producer, mut consumer) = ring.ends(0);
        let envelope = Envelope {
            correlation,
            kind,
            lane,
            priority,
            error,
            extension: extension.map(|(timestamp_ns, deadline_ns, trace_id)| Extension {
                timestamp_ns,
                deadline_ns,
                trace_id,
            }),
        };
        producer.try_push(&envelope, &payload).unwrap();
        let incoming = consumer.try_next().unwrap().unwrap();
        prop_assert_eq!(incoming.header().envelope(incoming.extension()), envelope);
        prop_assert_eq!(incoming.payload(), &payload[..]);
        prop_assert_eq!(incoming.payload().as_ptr().addr() % 16, 0);
    }

    #[test]
    fn lengths_beyond_the_slot_are_refused_whatever_they_are(
        length in prop_oneof![113..500_usize, MAX_PAYLOAD_BYTES - 2..MAX_PAYLOAD_BYTES + 3, Just(usize::MAX)],
        extended in any::<bool>(),
    ) {
        let layout = RingLayout::new(2, 100, false).unwrap();
        let ring = HeapRing::new(layout, 0, WriteCombining::No);
        let (mut producer, mut consumer) = ring.ends(0);
        let envelope = Envelope {
            extension: extended.then(Extension::default),
            ..Envelope::default()
        };
        let max = if extended { 80 } else { 112 };
        let refused = producer.reserve(&envelope).unwrap().commit(length);
        prop_assert_eq!(refused, Err(PushError::TooLong { length, max }));
        prop_assert!(consumer.try_next().unwrap().is_none());
    }

    /// Whatever lies in a ring, reading it neither panics nor leaves the ring's memory.
    #[test]
    fn any_bytes_in_a_ring_are_survived(bytes in vec(any::<u8>(), 0..700)) {
        slot_bytes::read_a_ring_of(&bytes);
    }

    /// The same, aimed: one word of a healthy ring is overwritten.
    #[test]
    fn a_word_that_was_overwritten_is_survived(
        slot in 0..4_usize,
        word in 0..4_usize,
        value in prop_oneof![any::<u32>(), 0..8_u32, 40..130_u32],
    ) {
        slot_bytes::read_a_ring_with_a_bad_word(slot, word, value);
    }

    /// A cursor that cannot be true is not believed.
    #[test]
    fn a_bad_cursor_frees_nothing(start in start(), cursor in any::<u32>()) {
        let layout = RingLayout::new(4, 8, false).unwrap();
        let ring = HeapRing::new(layout, start, WriteCombining::No);
        let (mut producer, consumer) = ring.ends(start);
        for _ in 0..4 {
            producer.try_push(&Envelope::default(), b"").unwrap();
        }
        drop(consumer);
        // SAFETY: the cursor's first word is its count; the consumer is gone.
        unsafe { ring.parts.cursor.cast::<u32>().write_volatile(cursor) };
        let progress = cursor.wrapping_sub(start);
        let free = producer.free_slots(1);
        if progress <= 4 {
            prop_assert_eq!((free, producer.bad_cursors()), (progress, 0));
        } else {
            prop_assert_eq!((free, producer.bad_cursors()), (0, 1));
        }
    }
}
