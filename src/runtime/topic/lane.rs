//! A subscriber's lane: the end that publishers write to, one at a time, and the end that the subscriber reads from.
//!
//! It is a ring, a mailbox, or both. Where the oldest message may be dropped, both ends can take from the ring: who does so has the baton of
//! [`Out`]. The subscriber has it while it reads one message. A publisher that finds it taken uses the other half of the ring, and behind
//! that the mailbox; so it never waits, and the newest message is never lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::options::{Overflow, SubscriberStats};
use crate::backend::{HostConsumer, HostPool, HostProducer, host_ring};
use crate::bridge::{Letter, Tally};
use crate::error::Error;
use crate::kernel::{DeadLetterReason, DeadLetters, Lost};
use crate::message::{Head, MessageHeader, RAW_KIND};
use crate::ring::{Peek, RingLayout};
use crate::thread::baton::Baton;
use crate::thread::event_count::EventCount;
use crate::thread::{MailboxReader, MailboxWriter, mailbox_of};

/// Kind of typed messages within a topic, which has one type.
const TYPED_KIND: u16 = 1;

/// What is to be known of messages that are lost.
#[derive(Debug)]
pub(super) struct Letters {
    pub(super) letters: DeadLetters,
    /// `None` for raw bytes.
    pub(super) type_id: Option<u64>,
}

impl Letters {
    /// The header words that all messages of the topic have.
    #[inline]
    pub(super) fn head(&self) -> Head {
        Head::of_kind(if self.type_id.is_some() {
            TYPED_KIND
        } else {
            RAW_KIND
        })
    }

    #[cold]
    pub(super) fn put(&self, reason: DeadLetterReason, payload: &[u8]) {
        let head = self.head();
        let header = [0, 0, head.length_flags(payload.len()), head.kind_lane];
        let lost = Lost {
            header: Some(MessageHeader::from_words(header)),
            type_id: self.type_id,
            payload,
            ..Lost::default()
        };
        self.letters.request(reason, &lost);
    }
}

/// The reading ends.
#[derive(Debug)]
struct Out {
    ring: Option<HostConsumer>,
    mailbox: Option<MailboxReader<Letter>>,
    /// A message that came out of the mailbox and was not taken; older than all others.
    kept: Option<Letter>,
    /// What `kept` is made of.
    spare: Option<Letter>,
}

/// What both ends see of a lane.
#[derive(Debug)]
pub(super) struct LaneShared {
    out: Baton<Out>,
    /// Messages for it. Written by whoever publishes.
    published: Tally,
    /// Messages received. Written by whoever has `out`.
    delivered: Tally,
    /// Messages lost.
    dropped: AtomicU64,
    /// Wakes the subscriber.
    pub(super) event: Arc<EventCount>,
    /// Whether it may sleep.
    parks: bool,
    /// The subscriber is gone.
    pub(super) closed: AtomicBool,
}

/// What became of an attempt to take a message.
#[derive(Debug)]
pub(super) enum Took<R> {
    Message(R),
    Empty,
    /// A publisher is just dropping the oldest message.
    Busy,
}

/// What is to be done with a message that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Delivered,
    Lost(DeadLetterReason),
    /// It waits for the next look.
    Kept,
    /// It is nobody's any more.
    GivenUp,
}

/// The writing end.
#[derive(Debug)]
pub(super) struct LaneIn {
    pub(super) shared: Arc<LaneShared>,
    ring: Option<HostProducer>,
    mailbox: Option<MailboxWriter<Letter>>,
    overflow: Overflow,
    /// Messages that may wait.
    capacity: u32,
}

/// What a lane is made of.
#[derive(Debug)]
pub(super) struct LanePlan {
    /// Messages that may wait, a power of two.
    pub(super) capacity: usize,
    pub(super) overflow: Overflow,
    /// Bytes of the largest payload.
    pub(super) message_size: usize,
    pub(super) event: Arc<EventCount>,
    pub(super) parks: bool,
}

impl LanePlan {
    /// Takes the lane's memory, every page of it present.
    pub(super) fn build(&self, pool: &HostPool) -> Result<LaneIn, Error> {
        let slots = match self.overflow {
            Overflow::Latest => None,
            Overflow::DropNewest => Some(self.capacity),
            // One half for what waits, the other for what comes while the oldest is in the subscriber's hands.
            Overflow::DropOldest => Some(2 * self.capacity),
        };
        let (ring_in, ring_out) = match slots {
            Some(slots) => {
                let layout = RingLayout::new(slots, self.message_size, false).map_err(|error| {
                    Error::InvalidOption {
                        option: "capacity",
                        reason: error.to_string(),
                    }
                })?;
                let (producer, consumer) = host_ring(pool, layout)?;
                (Some(producer), Some(consumer))
            }
            None => (None, None),
        };
        let (box_in, box_out) = match self.overflow {
            Overflow::DropNewest => (None, None),
            Overflow::DropOldest | Overflow::Latest => {
                let letter = || Letter::new(pool, self.message_size);
                let (writer, reader) = mailbox_of([letter()?, letter()?, letter()?]);
                (Some(writer), Some(reader))
            }
        };
        let spare = match box_out {
            Some(_) => Some(Letter::new(pool, self.message_size)?),
            None => None,
        };
        Ok(LaneIn {
            shared: Arc::new(LaneShared {
                out: Baton::new(Out {
                    ring: ring_out,
                    spare,
                    mailbox: box_out,
                    kept: None,
                }),
                published: Tally::default(),
                delivered: Tally::default(),
                dropped: AtomicU64::new(0),
                event: Arc::clone(&self.event),
                parks: self.parks,
                closed: AtomicBool::new(false),
            }),
            ring: ring_in,
            mailbox: box_in,
            overflow: self.overflow,
            capacity: self.capacity as u32,
        })
    }
}

impl LaneShared {
    pub(super) fn stats(&self) -> SubscriberStats {
        // In this order: what was delivered or lost has been published before.
        let (delivered, dropped) = (self.delivered.get(), self.dropped.load(Ordering::Acquire));
        let published = self.published.get().max(delivered + dropped);
        SubscriberStats {
            published,
            delivered,
            dropped,
            queued: published - delivered - dropped,
        }
    }

    #[cold]
    fn lose(&self, letters: &Letters, reason: DeadLetterReason, payload: &[u8]) {
        self.dropped.fetch_add(1, Ordering::Release);
        letters.put(reason, payload);
    }

    /// The next message, handed to `read`, which says what is to become of it. Looks at the ring up to `polls` times.
    #[inline]
    pub(super) fn take<R>(
        &self,
        letters: &Letters,
        polls: u32,
        read: impl FnOnce(&[u8]) -> (R, Fate),
    ) -> Took<R> {
        let Some(mut out) = self.out.try_take() else {
            return Took::Busy;
        };
        let out = &mut *out;
        // Looked at before the ring: while something is in the mailbox nothing is put into the ring, and what is in it then is older.
        let is_in_mailbox = out.mailbox.as_ref().is_some_and(MailboxReader::is_pending);
        if out.kept.is_some() {
            if out.ring.is_some() || !is_in_mailbox {
                return self.take_kept(letters, out, read);
            }
            self.lose_kept(letters, out);
        }
        if let Some(ring) = &mut out.ring
            && let Peek::Ready = ring.peek_spinning(if is_in_mailbox { 1 } else { polls })
        {
            let (result, fate) = read(ring.payload());
            self.settle(letters, fate, ring.payload());
            if fate != Fate::Kept {
                ring.release();
                // At once, so that a message is dropped only if so many wait as may.
                ring.publish_progress();
            }
            return Took::Message(result);
        }
        if !is_in_mailbox {
            return Took::Empty;
        }
        let Some(letter) = out.mailbox.as_mut().and_then(MailboxReader::take) else {
            return Took::Empty;
        };
        let (result, fate) = read(letter.payload());
        self.settle(letters, fate, letter.payload());
        if fate == Fate::Kept
            && let Some(mut kept) = out.spare.take()
        {
            std::mem::swap(&mut kept, letter);
            out.kept = Some(kept);
        }
        Took::Message(result)
    }

    #[cold]
    fn take_kept<R>(
        &self,
        letters: &Letters,
        out: &mut Out,
        read: impl FnOnce(&[u8]) -> (R, Fate),
    ) -> Took<R> {
        let Some(letter) = out.kept.take() else {
            return Took::Empty;
        };
        let (result, fate) = read(letter.payload());
        self.settle(letters, fate, letter.payload());
        if fate == Fate::Kept {
            out.kept = Some(letter);
        } else {
            out.spare = Some(letter);
        }
        Took::Message(result)
    }

    /// Drops the message that was kept, for a newer one.
    #[cold]
    fn lose_kept(&self, letters: &Letters, out: &mut Out) {
        if let Some(letter) = out.kept.take() {
            self.lose(letters, DeadLetterReason::Full, letter.payload());
            out.spare = Some(letter);
        }
    }

    #[inline]
    fn settle(&self, letters: &Letters, fate: Fate, payload: &[u8]) {
        match fate {
            Fate::Delivered => self.delivered.add(1),
            Fate::Lost(reason) => self.lose(letters, reason, payload),
            Fate::GivenUp => letters.put(DeadLetterReason::Shutdown, payload),
            Fate::Kept => {}
        }
    }

    /// Whether a look is worth while. Takes the baton for it; true if another thread has that.
    pub(super) fn may_have_message(&self) -> bool {
        let Some(mut out) = self.out.try_take() else {
            return true;
        };
        let out = &mut *out;
        out.kept.is_some()
            || out.mailbox.as_ref().is_some_and(MailboxReader::is_pending)
            || out
                .ring
                .as_mut()
                .is_some_and(|ring| !matches!(ring.peek(), Peek::Empty))
    }
}

impl LaneIn {
    /// Puts a message into the lane, and wakes its subscriber. Never waits.
    #[inline]
    pub(super) fn put(&mut self, letters: &Letters, payload: &[u8]) {
        // Counted before it can be taken.
        self.shared.published.add(1);
        match self.overflow {
            Overflow::DropNewest => {
                if !push(&mut self.ring, letters, payload) {
                    let full = DeadLetterReason::Full;
                    self.shared.lose(letters, full, payload);
                }
            }
            Overflow::DropOldest => self.put_newest(letters, payload),
            Overflow::Latest => self.replace(letters, payload),
        }
        if self.shared.parks {
            self.shared.event.notify();
        }
    }

    /// Puts a message into the ring, and makes room for it by dropping the oldest.
    #[inline]
    fn put_newest(&mut self, letters: &Letters, payload: &[u8]) {
        // Free slots if there is room for one more of those that may wait.
        let wanted = self.capacity + 1;
        let is_in_mailbox = self.is_in_mailbox();
        if let Some(ring) = &mut self.ring
            && !is_in_mailbox
            && ring.free_slots(wanted) >= wanted
        {
            push(&mut self.ring, letters, payload);
            return;
        }
        self.make_room(letters, payload);
    }

    #[cold]
    fn make_room(&mut self, letters: &Letters, payload: &[u8]) {
        let shared = Arc::clone(&self.shared);
        if let Some(mut out) = shared.out.try_take() {
            self.trim(letters, &mut out);
            if self.is_in_mailbox()
                && let Some(letter) = out.mailbox.as_mut().and_then(MailboxReader::take)
            {
                push(&mut self.ring, letters, letter.payload());
                self.trim(letters, &mut out);
            }
            push(&mut self.ring, letters, payload);
            return;
        }
        // The subscriber is in the middle of taking the oldest.
        if self.is_in_mailbox() || !push(&mut self.ring, letters, payload) {
            self.replace(letters, payload);
        }
    }

    /// Drops the oldest messages until there is room for one more of those that may wait.
    fn trim(&self, letters: &Letters, out: &mut Out) {
        let Some(ring) = &self.ring else {
            return;
        };
        let position = ring.position();
        let waiting = |out: &Out| {
            let taken = out.ring.as_ref().map_or(position, |ring| ring.position());
            position.wrapping_sub(taken) + u32::from(out.kept.is_some())
        };
        if waiting(out) >= self.capacity {
            self.shared.lose_kept(letters, out);
        }
        while waiting(out) >= self.capacity
            && let Some(ring) = &mut out.ring
            && let Peek::Ready = ring.peek()
        {
            self.shared
                .lose(letters, DeadLetterReason::Full, ring.payload());
            ring.release();
        }
        if let Some(ring) = &mut out.ring {
            ring.publish_progress();
        }
    }

    /// Puts a message into the mailbox.
    #[inline]
    fn replace(&mut self, letters: &Letters, payload: &[u8]) {
        let Some(mailbox) = &mut self.mailbox else {
            return;
        };
        let letter = mailbox.buffer_mut();
        let Some(body) = letter.body_mut().get_mut(..payload.len()) else {
            return;
        };
        body.copy_from_slice(payload);
        letter.length = payload.len();
        letter.head = letters.head();
        if let Some(displaced) = mailbox.publish() {
            self.shared
                .lose(letters, DeadLetterReason::Full, displaced.payload());
        }
    }

    #[inline]
    fn is_in_mailbox(&self) -> bool {
        self.mailbox.as_ref().is_some_and(MailboxWriter::is_pending)
    }

    /// Takes back what a subscriber that has gone did not take.
    pub(super) fn give_up(&self, letters: &Letters) {
        // It is gone, so that nobody else has the baton.
        while let Took::Message(()) = self.shared.take(letters, 1, |_| ((), Fate::GivenUp)) {}
    }
}

/// Puts a message into a ring; false if there is no room.
#[inline]
fn push(ring: &mut Option<HostProducer>, letters: &Letters, payload: &[u8]) -> bool {
    let Some(ring) = ring else {
        return false;
    };
    let Ok(mut slot) = ring.reserve_head(letters.head(), None) else {
        return false;
    };
    // The topic has looked at its length.
    let Some(body) = slot.body_mut().get_mut(..payload.len()) else {
        return false;
    };
    body.copy_from_slice(payload);
    slot.commit(payload.len()).is_ok()
}
