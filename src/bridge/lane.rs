//! A client's private rings: requests on their way to the kernel, replies on their way back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::backend::{Booked, HostConsumer, HostPool, HostProducer, host_ring};
use crate::error::Error;
use crate::message::{AlignedBytes, Extension, Head, MessageHeader, Priority};
use crate::ring::{Peek, RingLayout};
use crate::thread::event_count::EventCount;
use crate::thread::{MailboxReader, MailboxWriter, mailbox_of};

/// Levels of priority, each with a ring of its own.
pub(crate) const LEVELS: usize = 4;

/// Most lanes of a kernel at a time: a lane's place is 8 bits of its number.
pub(crate) const MAX_LANES: usize = 255;

/// A counter with one writer at a time, on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Tally(AtomicU64);

impl Tally {
    #[inline]
    pub(crate) fn add(&self, count: u64) {
        // Not a read-modify-write: there is one writer at a time.
        self.0
            .store(self.0.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What both ends of a lane, and the kernel's accounts, see of it.
#[derive(Debug)]
pub(crate) struct LaneShared {
    /// Requests that the client put into the lane, without those that went to the kernel directly. Written by the client.
    pub(crate) pushed: Tally,
    /// Requests that newer ones replaced. Written by the client.
    pub(crate) displaced: Tally,
    /// Replies that the client received. Written by the client.
    pub(crate) delivered: Tally,
    /// Requests taken out of the lane, whatever became of them. Written by who merges.
    pub(crate) taken: Tally,
    /// Requests among them that had expired. Written by who merges.
    pub(crate) expired: Tally,
    /// Requests among them for whose block there was no room. Written by who merges.
    pub(crate) overflowed: Tally,
    /// Replies that found no room. Written by who merges.
    pub(crate) lost_replies: Tally,
    /// Levels that the client has used, a bit each. Written by the client.
    pub(crate) levels: AtomicU32,
    /// Wakes the client.
    pub(crate) replied: Arc<EventCount>,
    /// The client is gone.
    pub(crate) closed: AtomicBool,
    /// Nobody merges the lane any more.
    pub(crate) retired: AtomicBool,
}

impl LaneShared {
    fn new() -> Self {
        Self {
            pushed: Tally::default(),
            displaced: Tally::default(),
            delivered: Tally::default(),
            taken: Tally::default(),
            expired: Tally::default(),
            overflowed: Tally::default(),
            lost_replies: Tally::default(),
            levels: AtomicU32::new(0),
            replied: Arc::new(EventCount::new()),
            closed: AtomicBool::new(false),
            retired: AtomicBool::new(false),
        }
    }

    /// Requests that are still in the lane.
    pub(crate) fn backlog(&self) -> u64 {
        // In this order: what has been taken was pushed before.
        let gone = self.taken.get() + self.displaced.get();
        self.pushed.get().saturating_sub(gone)
    }
}

/// A message in a mailbox.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) head: Head,
    pub(crate) extension: Option<Extension>,
    pub(crate) length: usize,
    /// As aligned as in a slot.
    body: Booked<AlignedBytes>,
}

impl Letter {
    /// One with room for so many bytes of payload.
    pub(crate) fn new(pool: &HostPool, bytes: usize) -> Result<Self, Error> {
        Ok(Self {
            head: Head::of_kind(0),
            extension: None,
            length: 0,
            body: pool.payload(bytes)?,
        })
    }

    /// All the room that there is for a payload.
    pub(crate) fn body_mut(&mut self) -> &mut [u8] {
        &mut self.body
    }

    pub(crate) fn payload(&self) -> &[u8] {
        let body = &*self.body;
        body.get(..self.length).unwrap_or(body)
    }

    /// The header as it would be in a ring.
    pub(crate) fn header(&self) -> MessageHeader {
        MessageHeader::from_words([
            0,
            self.head.correlation,
            self.head.length_flags(self.length),
            self.head.kind_lane,
        ])
    }
}

/// Requests, as the client writes them.
#[derive(Debug)]
// In place: one indirection less with every message, and there is one of them a client.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Outbox {
    /// In order, by priority.
    Queues([HostProducer; LEVELS]),
    /// The newest one only.
    Mailbox(MailboxWriter<Letter>),
}

/// Requests, as they are merged.
#[derive(Debug)]
// In place: one indirection less with every message, and there is one of them a client.
#[allow(clippy::large_enum_variant)]
enum Requests {
    Queues([HostConsumer; LEVELS]),
    Mailbox(MailboxReader<Letter>),
}

/// The client's ends.
#[derive(Debug)]
pub(crate) struct ClientEnds {
    pub(crate) outbox: Outbox,
    pub(crate) replies: HostConsumer,
    /// Replies that a call put aside; both ends are the client's.
    pub(crate) aside: (HostProducer, HostConsumer),
    pub(crate) shared: Arc<LaneShared>,
}

/// The other ends, and what the merger knows of the lane.
#[derive(Debug)]
pub(crate) struct Lane {
    /// Number that travels in headers.
    pub(super) number: u16,
    requests: Requests,
    pub(super) replies: HostProducer,
    pub(super) shared: Arc<LaneShared>,
    /// Messages that it may forward each time that it is its turn.
    pub(super) weight: u32,
    /// Most requests whose replies it may have or expect.
    pub(super) credit: u32,
    /// Requests forwarded, modulo 2^32.
    pub(super) forwarded: u32,
    /// Those of them that the kernel is done with, and whose replies have all been routed.
    pub(super) settled: u32,
    /// The sweep in which something more urgent of it was held up.
    pub(super) held_in: u64,
    /// Level of what is in the mailbox.
    level: usize,
}

/// What a lane is made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LanePlan {
    /// Slots of each of its rings, and its credit.
    pub(crate) capacity: usize,
    /// Of the kernel's rings.
    pub(crate) kernel: RingLayout,
    pub(crate) weight: u32,
    /// The newest request replaces one that is still waiting.
    pub(crate) newest_only: bool,
    pub(crate) priority: Priority,
}

impl LanePlan {
    /// Takes the lane's memory, every page of it present.
    pub(crate) fn build(&self, pool: &HostPool) -> Result<(ClientEnds, Box<Lane>), Error> {
        let layout =
            self.kernel
                .with_capacity(self.capacity)
                .map_err(|error| Error::InvalidOption {
                    option: "capacity",
                    reason: error.to_string(),
                })?;
        let (outbox, requests) = if self.newest_only {
            let letter = || Letter::new(pool, layout.max_payload());
            let (writer, reader) = mailbox_of([letter()?, letter()?, letter()?]);
            (Outbox::Mailbox(writer), Requests::Mailbox(reader))
        } else {
            let [a, b, c, d] = [
                host_ring(pool, layout)?,
                host_ring(pool, layout)?,
                host_ring(pool, layout)?,
                host_ring(pool, layout)?,
            ];
            (
                Outbox::Queues([a.0, b.0, c.0, d.0]),
                Requests::Queues([a.1, b.1, c.1, d.1]),
            )
        };
        let (reply_in, replies) = host_ring(pool, layout)?;
        let shared = Arc::new(LaneShared::new());
        let lane = Box::new(Lane {
            number: 0,
            requests,
            replies: reply_in,
            shared: Arc::clone(&shared),
            weight: self.weight,
            credit: self.capacity as u32,
            forwarded: 0,
            settled: 0,
            held_in: 0,
            level: self.priority as usize,
        });
        let ends = ClientEnds {
            outbox,
            replies,
            aside: host_ring(pool, layout)?,
            shared,
        };
        Ok((ends, lane))
    }
}

/// The next request of a lane.
pub(super) struct Next<'a> {
    pub(super) header: MessageHeader,
    pub(super) extension: Option<Extension>,
    pub(super) payload: &'a [u8],
}

impl Lane {
    /// Whether a request of this level is waiting.
    #[inline]
    pub(super) fn has_request(&mut self, level: usize) -> bool {
        match &mut self.requests {
            Requests::Queues(queues) => !matches!(queues[level].peek(), Peek::Empty),
            Requests::Mailbox(reader) => level == self.level && reader.is_pending(),
        }
    }

    /// Whether any request is waiting.
    #[inline]
    pub(super) fn has_any_request(&mut self) -> bool {
        let used = self.shared.levels.load(Ordering::Relaxed);
        (0..LEVELS).any(|level| used & (1 << level) != 0 && self.has_request(level))
    }

    /// The next request of this level. One of a mailbox is taken by that; one of a queue by `release`.
    #[inline]
    pub(super) fn next(&mut self, level: usize) -> Option<Next<'_>> {
        match &mut self.requests {
            Requests::Queues(queues) => {
                let queue = &mut queues[level];
                // Both ends are this process's: what is there is what was put there.
                let Peek::Ready = queue.peek() else {
                    return None;
                };
                Some(Next {
                    header: *queue.header(),
                    extension: queue.extension(),
                    payload: queue.payload(),
                })
            }
            Requests::Mailbox(reader) if level == self.level => {
                let letter = reader.take()?;
                Some(Next {
                    header: letter.header(),
                    extension: letter.extension,
                    payload: letter.payload(),
                })
            }
            Requests::Mailbox(_) => None,
        }
    }

    /// Takes the request that `next` gave.
    #[inline]
    pub(super) fn release(&mut self, level: usize) {
        if let Requests::Queues(queues) = &mut self.requests {
            queues[level].release();
        }
        self.shared.taken.add(1);
    }

    /// Lets the client have every slot back that is free: its requests have to wait.
    #[inline]
    pub(super) fn pause(&mut self, level: usize) {
        if let Requests::Queues(queues) = &mut self.requests {
            queues[level].publish_progress();
        }
    }

    /// Whether one more request may be forwarded: its reply will have room then, if it has one.
    #[inline]
    pub(super) fn has_credit(&mut self) -> bool {
        let expected = self.forwarded.wrapping_sub(self.settled);
        if expected >= self.credit {
            return false;
        }
        let spare = self.replies.layout().capacity() - self.credit;
        self.replies.free_slots(spare + expected + 1) > spare + expected
    }

    /// Whether it keeps only the newest request.
    #[inline]
    pub(super) fn takes_newest_only(&self) -> bool {
        matches!(self.requests, Requests::Mailbox(_))
    }

    pub(super) fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }
}
