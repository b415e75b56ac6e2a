//! Reading rings whose bytes nobody vouches for. Shared by the property tests and the fuzz target.

use std::ptr::NonNull;

use ringkernel::message::{Envelope, RingMessage};
use ringkernel::ring::{
    Consumer, Corruption, CursorLine, LINE_BYTES, Producer, RingLayout, RingParts, WriteCombining,
};
use rkyv::{Archive, Deserialize, Serialize};

/// Has fields of which not every bit pattern is valid.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub number: u64,
    pub flag: bool,
    pub letter: char,
    pub choice: Option<u16>,
}
ringkernel::ring_message!(Sample, "test.Sample.v1");

const CAPACITY: usize = 4;
const STRIDE: usize = 2 * LINE_BYTES;

/// The memory of a ring of four slots of two lines, with a margin on both sides that must never change.
#[repr(C, align(64))]
struct Memory {
    before: [u8; LINE_BYTES],
    slots: [u8; CAPACITY * STRIDE],
    cursor: [u8; LINE_BYTES],
    after: [u8; LINE_BYTES],
}

impl Memory {
    fn new() -> Box<Self> {
        Box::new(Self {
            before: [0xa5; LINE_BYTES],
            slots: [0; CAPACITY * STRIDE],
            cursor: [0; LINE_BYTES],
            after: [0xa5; LINE_BYTES],
        })
    }

    fn parts(&mut self) -> RingParts {
        RingParts {
            slots: NonNull::from(&mut self.slots).cast(),
            cursor: NonNull::from(&mut self.cursor).cast::<CursorLine>(),
            write_combining: WriteCombining::No,
            cursor_write_combining: WriteCombining::No,
        }
    }

    fn check_margins(&self) {
        assert_eq!(self.before, [0xa5; LINE_BYTES]);
        assert_eq!(self.after, [0xa5; LINE_BYTES]);
    }
}

fn layout() -> RingLayout {
    let layout = RingLayout::new(CAPACITY, 100, false).unwrap();
    assert_eq!(layout.stride(), STRIDE);
    layout
}

/// Reads until the ring is empty, stuck, or has given more than it can hold.
fn read_all(consumer: &mut Consumer) {
    for _ in 0..3 * CAPACITY {
        match consumer.try_next() {
            Ok(None) => return,
            Ok(Some(incoming)) => {
                let header = incoming.header();
                let extended = if header.is_extended() { 32 } else { 0 };
                assert_eq!(incoming.payload().len(), header.length());
                assert!(header.length() + extended <= layout().max_payload());
                assert_eq!(incoming.extension().is_some(), header.is_extended());
                // Validation decides; whatever it accepts can be read.
                if let Ok(archived) = Sample::access(incoming.payload()) {
                    let letter = archived.letter.to_native();
                    assert!(char::from_u32(letter as u32).is_some());
                    let _ = Sample::decode(incoming.payload()).unwrap();
                }
            }
            Err(Corruption::Sequence { expected, found }) => {
                assert_ne!(expected, found);
                return;
            }
            // Skipped; the next slot follows.
            Err(_) => {}
        }
    }
}

/// A ring whose slots and cursor are these bytes, as far as they reach.
pub fn read_a_ring_of(bytes: &[u8]) {
    let mut memory = Memory::new();
    let parts = memory.parts();
    // SAFETY: the memory has the layout's size, is aligned to 64, and is not shared.
    unsafe { parts.initialise(layout(), 0) };
    let (slots, cursor) = bytes.split_at(bytes.len().min(CAPACITY * STRIDE));
    memory.slots[..slots.len()].copy_from_slice(slots);
    let cursor = &cursor[..cursor.len().min(LINE_BYTES)];
    memory.cursor[..cursor.len()].copy_from_slice(cursor);
    let parts = memory.parts();
    // SAFETY: initialised above, and then overwritten with valid words of another content, which is the very thing
    // that both ends must survive. The memory outlives both.
    let (mut producer, mut consumer) = unsafe {
        (
            Producer::new(parts, layout(), 0),
            Consumer::new(parts, layout(), 0),
        )
    };
    read_all(&mut consumer);
    let full = [0xff; 112];
    for _ in 0..3 * CAPACITY {
        let _ = producer.try_push(&Envelope::default(), &full);
    }
    read_all(&mut consumer);
    drop(consumer);
    memory.check_margins();
}

/// A ring of four valid messages, of one of which one header word was overwritten.
pub fn read_a_ring_with_a_bad_word(slot: usize, word: usize, value: u32) {
    let mut memory = Memory::new();
    let parts = memory.parts();
    // SAFETY: as above.
    let (mut producer, mut consumer) = unsafe {
        parts.initialise(layout(), 0);
        (
            Producer::new(parts, layout(), 0),
            Consumer::new(parts, layout(), 0),
        )
    };
    let sample = Sample {
        number: 1,
        flag: true,
        letter: 'x',
        choice: Some(3),
    };
    for _ in 0..CAPACITY {
        let mut reservation = producer.reserve(&Envelope::default()).unwrap();
        let length = sample.encode(reservation.body_mut()).unwrap();
        reservation.commit(length).unwrap();
    }
    let offset = (slot % CAPACITY) * STRIDE + (word % 4) * 4;
    // SAFETY: within the slots, aligned to 4.
    unsafe {
        parts.slots.add(offset).cast::<u32>().write_volatile(value);
    }
    read_all(&mut consumer);
    drop(consumer);
    memory.check_margins();
}
