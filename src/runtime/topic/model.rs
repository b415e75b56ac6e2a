//! Model check of a lane that drops the oldest (`lane.rs`), over the real ring, mailbox and baton.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --lib`

use loom::sync::Arc;
use loom::thread;

use crate::heap_ring::HeapRing;
use crate::message::Envelope;
use crate::ring::{Consumer, Producer, RingLayout, WriteCombining};
use crate::thread::baton::Baton;
use crate::thread::{MailboxReader, MailboxWriter, mailbox};

/// Messages that may wait. The ring has two slots then, the fewest that there can be.
const CAPACITY: u32 = 1;

/// As `Out`.
struct Out {
    ring: Consumer,
    mailbox: MailboxReader<u8>,
}

/// As `LaneIn`.
struct LaneIn {
    out: Arc<Baton<Out>>,
    ring: Producer,
    mailbox: MailboxWriter<u8>,
    lost: u8,
}

impl LaneIn {
    fn push(&mut self, message: u8) -> bool {
        self.ring.try_push(&Envelope::default(), &[message]).is_ok()
    }

    /// As `put_newest`.
    fn put(&mut self, message: u8) {
        let wanted = CAPACITY + 1;
        if !self.mailbox.is_pending() && self.ring.free_slots(wanted) >= wanted {
            assert!(self.push(message));
            return;
        }
        let shared = Arc::clone(&self.out);
        if let Some(mut out) = shared.try_take() {
            self.trim(&mut out);
            if let Some(waiting) = out.mailbox.take().map(|waiting| *waiting) {
                assert!(self.push(waiting));
                self.trim(&mut out);
            }
            assert!(self.push(message));
            return;
        }
        if self.mailbox.is_pending() || !self.push(message) {
            self.lost += u8::from(self.mailbox.replace(message));
        }
    }

    fn trim(&mut self, out: &mut Out) {
        while self.ring.position().wrapping_sub(out.ring.position()) >= CAPACITY {
            pop(&mut out.ring).unwrap();
            self.lost += 1;
        }
        out.ring.publish_cursor();
    }
}

fn pop(ring: &mut Consumer) -> Option<u8> {
    let incoming = ring.try_next().unwrap()?;
    Some(incoming.payload()[0])
}

/// As `LaneShared::take`.
fn take(out: &Baton<Out>) -> Option<u8> {
    let mut out = out.try_take()?;
    let is_in_mailbox = out.mailbox.is_pending();
    if let Some(message) = pop(&mut out.ring) {
        out.ring.publish_cursor();
        return Some(message);
    }
    if !is_in_mailbox {
        return None;
    }
    out.mailbox.take().map(|message| *message)
}

/// A subscriber takes now and then while messages come. It sees them in order and each at most once, whatever half of the lane they lay in; all
/// others are counted; and the newest is there at the end.
#[test]
fn a_lane_that_drops_the_oldest_keeps_order_and_the_newest() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        const LAST: u8 = 4;
        let ring = HeapRing::new(RingLayout::new(2, 8, false).unwrap(), 0, WriteCombining::No);
        let (producer, consumer) = ring.ends(0);
        let (writer, reader) = mailbox(|| 0);
        let out = Arc::new(Baton::new(Out {
            ring: consumer,
            mailbox: reader,
        }));
        let mut lane = LaneIn {
            out: Arc::clone(&out),
            ring: producer,
            mailbox: writer,
            lost: 0,
        };
        let publishing = thread::spawn(move || {
            for message in 1..=LAST {
                lane.put(message);
            }
            lane
        });
        let (mut last, mut taken) = (0, 0);
        let mut look = || {
            let message = take(&out);
            if let Some(message) = message {
                assert!(message > last, "{message} after {last}");
                last = message;
                taken += 1;
            }
            message
        };
        look();
        look();
        let lane = publishing.join().unwrap();
        while look().is_some() {}
        assert_eq!(last, LAST, "the newest");
        assert_eq!(taken + lane.lost, LAST);
        drop((lane, out));
    });
}
