//! Messages that could not be delivered: how many, why, and the latest of them themselves.
//!
//! Whoever comes upon one may be a realtime thread. So it is copied into a slot that was made beforehand, by one attempt to take that slot;
//! when all are full the oldest letter makes room.

use std::cell::UnsafeCell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::message::{Extension, MessageHeader};
use crate::time;

/// Why a message could not be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeadLetterReason {
    /// A reply to a call that had timed out, or that had its reply already.
    LateReply,
    /// A header or archive that no correct sender writes.
    Corrupt,
    /// The request whose handling failed the kernel.
    KernelFailed,
    /// An uncorrelated reply that came while calls were pending and nobody received: the kernel's inbox, as large as
    /// its reply ring, was full.
    InboxFull,
    /// A call's reply that the call could not take: of another type, or larger than its buffer; a kernel's reply that a topic could not take.
    Mismatch,
    /// A request whose deadline had passed before its handler saw it.
    Expired,
    /// A request of a client that keeps only the newest one, replaced by a newer one or without room in its block's ring; a message of a topic
    /// that a subscriber's lane had no room for; a reply that found its client's lane full (of a kernel that answers a request more than once).
    Full,
    /// A request that was still queued when its kernel ended, a reply that nobody had received when its last handle went, or a message of a
    /// topic that its subscriber had not received when it went. The reports count all of them as returned.
    Shutdown,
}

impl DeadLetterReason {
    /// The reason's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LateReply => "late reply",
            Self::Corrupt => "corrupt",
            Self::KernelFailed => "kernel failed",
            Self::InboxFull => "inbox full",
            Self::Mismatch => "mismatch",
            Self::Expired => "expired",
            Self::Full => "full",
            Self::Shutdown => "shutdown",
        }
    }
}

impl fmt::Display for DeadLetterReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A message that could not be delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Name of the kernel instance that it was for, or from, or of the topic that it was published to; cut after 64 bytes.
    pub kernel: String,
    /// Why.
    pub reason: DeadLetterReason,
    /// Whether it is a reply; a request, or a topic's message, otherwise.
    pub is_reply: bool,
    /// Block of the kernel's grid, if it is known.
    pub block: Option<u32>,
    /// Its header; `None` if none could be read.
    pub header: Option<MessageHeader>,
    /// Its timestamp, deadline and trace id, if it carried them and they could be read.
    pub extension: Option<Extension>,
    /// Its type, by which another kernel knows it too; `None` for raw bytes and unknown kinds.
    pub type_id: Option<u64>,
    /// Its payload, as much of it as `RuntimeConfig::dead_letter_bytes` keeps.
    pub payload: Vec<u8>,
    /// Bytes that the payload had.
    pub payload_bytes: usize,
    /// When it was given up, in nanoseconds since the Unix epoch.
    pub at_ns: u64,
}

impl DeadLetter {
    /// Whether part of its payload is missing.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.payload.len() < self.payload_bytes
    }
}

/// The counters of one kernel, or of a runtime.
#[derive(Debug, Default)]
struct Counters {
    late_replies: AtomicU64,
    corrupt_requests: AtomicU64,
    corrupt_replies: AtomicU64,
    kernel_failed: AtomicU64,
    inbox_full: AtomicU64,
    mismatched: AtomicU64,
    expired: AtomicU64,
    full_requests: AtomicU64,
    full_replies: AtomicU64,
    shutdown: AtomicU64,
}

/// Messages that could not be delivered, since a kernel's launch, or since a runtime was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeadLetterCounts {
    /// [`DeadLetterReason::LateReply`]; replies.
    pub late_replies: u64,
    /// [`DeadLetterReason::Corrupt`]; requests.
    pub corrupt_requests: u64,
    /// [`DeadLetterReason::Corrupt`]; replies.
    pub corrupt_replies: u64,
    /// [`DeadLetterReason::KernelFailed`]; requests.
    pub kernel_failed: u64,
    /// [`DeadLetterReason::InboxFull`]; replies.
    pub inbox_full: u64,
    /// [`DeadLetterReason::Mismatch`]; replies.
    pub mismatched: u64,
    /// [`DeadLetterReason::Expired`]; requests.
    pub expired: u64,
    /// [`DeadLetterReason::Full`]; requests, and messages of topics.
    pub full_requests: u64,
    /// [`DeadLetterReason::Full`]; replies.
    pub full_replies: u64,
    /// [`DeadLetterReason::Shutdown`]; requests and replies, which are returned.
    pub shutdown: u64,
}

impl DeadLetterCounts {
    /// Requests among them that were not returned.
    #[must_use]
    pub const fn requests(&self) -> u64 {
        self.corrupt_requests + self.kernel_failed + self.expired + self.full_requests
    }

    /// Replies among them.
    #[must_use]
    pub const fn replies(&self) -> u64 {
        self.late_replies
            + self.corrupt_replies
            + self.inbox_full
            + self.mismatched
            + self.full_replies
    }
}

impl Counters {
    fn count(&self, reason: DeadLetterReason, is_reply: bool) {
        let counter = match (reason, is_reply) {
            (DeadLetterReason::LateReply, _) => &self.late_replies,
            (DeadLetterReason::KernelFailed, _) => &self.kernel_failed,
            (DeadLetterReason::InboxFull, _) => &self.inbox_full,
            (DeadLetterReason::Mismatch, _) => &self.mismatched,
            (DeadLetterReason::Shutdown, _) => &self.shutdown,
            (DeadLetterReason::Expired, _) => &self.expired,
            (DeadLetterReason::Full, true) => &self.full_replies,
            (DeadLetterReason::Full, false) => &self.full_requests,
            (DeadLetterReason::Corrupt, true) => &self.corrupt_replies,
            (DeadLetterReason::Corrupt, false) => &self.corrupt_requests,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn counts(&self) -> DeadLetterCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeadLetterCounts {
            late_replies: of(&self.late_replies),
            corrupt_requests: of(&self.corrupt_requests),
            corrupt_replies: of(&self.corrupt_replies),
            kernel_failed: of(&self.kernel_failed),
            inbox_full: of(&self.inbox_full),
            mismatched: of(&self.mismatched),
            expired: of(&self.expired),
            full_requests: of(&self.full_requests),
            full_replies: of(&self.full_replies),
            shutdown: of(&self.shutdown),
        }
    }
}

/// What is known of a message that is given up.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lost<'a> {
    pub(crate) block: Option<u32>,
    pub(crate) header: Option<MessageHeader>,
    pub(crate) extension: Option<Extension>,
    pub(crate) type_id: Option<u64>,
    pub(crate) payload: &'a [u8],
}

/// Longest name of a kernel that a letter keeps, in bytes; a longer one is cut.
const NAME_BYTES: usize = 64;

/// What a slot is doing.
const EMPTY: u32 = 0;
const TAKEN: u32 = 1;
const FULL: u32 = 2;

/// Room for one letter.
#[derive(Debug)]
struct Slot {
    /// `EMPTY`, `FULL`, or `TAKEN`: then its content is that thread's alone which has set this.
    state: AtomicU32,
    /// The letter's number.
    number: AtomicU64,
    content: UnsafeCell<Content>,
}

#[derive(Debug)]
struct Content {
    name: [u8; NAME_BYTES],
    name_bytes: usize,
    reason: DeadLetterReason,
    is_reply: bool,
    block: Option<u32>,
    header: Option<MessageHeader>,
    extension: Option<Extension>,
    type_id: Option<u64>,
    payload: Box<[u8]>,
    kept: usize,
    payload_bytes: usize,
    at_ns: u64,
}

// SAFETY: the content is only touched by the thread that has taken the slot.
unsafe impl Sync for Slot {}

impl Slot {
    /// Takes it from a state; whether that was its state.
    fn take(&self, from: u32) -> bool {
        // ORDERING: letters. Pairs with the release stores of the state: whoever takes a slot sees what was written to it.
        self.state
            .compare_exchange(from, TAKEN, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }
}

/// The latest messages of a runtime that could not be delivered, in the order in which they were given up.
///
/// Bounded: when it is full the oldest makes room, and is counted by [`overflowed`](Self::overflowed). Any thread may read it. Putting a
/// letter in is wait-free, allocates nothing and locks nothing; if the slot whose turn it is happens to be in another thread's hands, the
/// letter is only counted.
#[derive(Debug)]
pub struct DeadLetterQueue {
    slots: Box<[Slot]>,
    /// Letters so far.
    next: AtomicU64,
    overflowed: AtomicU64,
    counters: Counters,
}

impl DeadLetterQueue {
    /// Room for so many letters, each with so many bytes of payload; `None` if there is no memory for it.
    pub(crate) fn new(capacity: usize, payload: usize) -> Option<Self> {
        let mut slots = Vec::new();
        slots.try_reserve_exact(capacity).ok()?;
        for _ in 0..capacity {
            let mut buffer = Vec::new();
            buffer.try_reserve_exact(payload).ok()?;
            // Written to, so that no letter has to fault a page in.
            buffer.resize(payload, 0xff);
            slots.push(Slot {
                state: AtomicU32::new(EMPTY),
                number: AtomicU64::new(0),
                content: UnsafeCell::new(Content {
                    name: [0; NAME_BYTES],
                    name_bytes: 0,
                    reason: DeadLetterReason::Corrupt,
                    is_reply: false,
                    block: None,
                    header: None,
                    extension: None,
                    type_id: None,
                    payload: buffer.into_boxed_slice(),
                    kept: 0,
                    payload_bytes: 0,
                    at_ns: 0,
                }),
            });
        }
        Some(Self {
            slots: slots.into_boxed_slice(),
            next: AtomicU64::new(0),
            overflowed: AtomicU64::new(0),
            counters: Counters::default(),
        })
    }

    #[cold]
    fn put(&self, kernel: &str, reason: DeadLetterReason, is_reply: bool, lost: &Lost<'_>) {
        self.counters.count(reason, is_reply);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let index = number
            .checked_rem(self.slots.len() as u64)
            .map(|index| index as usize);
        let Some(slot) = index.and_then(|index| self.slots.get(index)) else {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if !slot.take(EMPTY) {
            // The oldest letter makes room, or this one goes.
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            if !slot.take(FULL) {
                return;
            }
        }
        // SAFETY: the slot was taken above.
        let content = unsafe { &mut *slot.content.get() };
        content.write(kernel, reason, is_reply, lost);
        slot.number.store(number, Ordering::Relaxed);
        // ORDERING: letters. Publishes the content; pairs with `take`.
        slot.state.store(FULL, Ordering::Release);
    }

    /// The oldest letter, which is taken. Does not wait; allocates its copy. One that there is no
    /// memory for stays.
    pub fn try_recv(&self) -> Option<DeadLetter> {
        // Another thread may take what was just found: then there is a newer one, or none.
        for _ in 0..=self.slots.len() {
            let full = |slot: &&Slot| slot.state.load(Ordering::Acquire) == FULL;
            let oldest = self
                .slots
                .iter()
                .filter(full)
                .min_by_key(|slot| slot.number.load(Ordering::Relaxed))?;
            if oldest.take(FULL) {
                // SAFETY: the slot was taken above.
                let letter = unsafe { &*oldest.content.get() }.read();
                let state = if letter.is_some() { EMPTY } else { FULL };
                // ORDERING: letters. The content has been read; pairs with `take`.
                oldest.state.store(state, Ordering::Release);
                return letter;
            }
        }
        None
    }

    /// Letters that wait to be read.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots
            .iter()
            .filter(|slot| slot.state.load(Ordering::Relaxed) == FULL)
            .count()
    }

    /// Whether none waits to be read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Letters that nobody read before they had to make room, or that found none.
    #[must_use]
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// How many there were, by reason, of all kernels of the runtime, those included that have ended.
    #[must_use]
    pub fn counts(&self) -> DeadLetterCounts {
        self.counters.counts()
    }
}

impl Content {
    fn write(&mut self, kernel: &str, reason: DeadLetterReason, is_reply: bool, lost: &Lost<'_>) {
        let mut name_bytes = kernel.len().min(NAME_BYTES);
        while !kernel.is_char_boundary(name_bytes) {
            name_bytes -= 1;
        }
        self.name[..name_bytes].copy_from_slice(&kernel.as_bytes()[..name_bytes]);
        self.name_bytes = name_bytes;
        self.reason = reason;
        self.is_reply = is_reply;
        self.block = lost.block;
        self.header = lost.header;
        self.extension = lost.extension;
        self.type_id = lost.type_id;
        self.kept = lost.payload.len().min(self.payload.len());
        self.payload[..self.kept].copy_from_slice(&lost.payload[..self.kept]);
        self.payload_bytes = lost.payload.len();
        self.at_ns = time::now_ns();
    }

    /// A copy; `None` if there is no memory for it.
    fn read(&self) -> Option<DeadLetter> {
        let mut payload = Vec::new();
        payload.try_reserve_exact(self.kept).ok()?;
        payload.extend_from_slice(&self.payload[..self.kept]);
        Some(DeadLetter {
            kernel: String::from_utf8_lossy(&self.name[..self.name_bytes]).into_owned(),
            reason: self.reason,
            is_reply: self.is_reply,
            block: self.block,
            header: self.header,
            extension: self.extension,
            type_id: self.type_id,
            payload,
            payload_bytes: self.payload_bytes,
            at_ns: self.at_ns,
        })
    }
}

/// One kernel's account of them.
#[derive(Debug)]
pub(crate) struct DeadLetters {
    kernel: Box<str>,
    counters: Counters,
    queue: Option<Arc<DeadLetterQueue>>,
}

impl DeadLetters {
    pub(crate) fn new(kernel: &str, queue: Option<Arc<DeadLetterQueue>>) -> Self {
        Self {
            kernel: kernel.into(),
            counters: Counters::default(),
            queue,
        }
    }

    #[cold]
    pub(crate) fn request(&self, reason: DeadLetterReason, lost: &Lost<'_>) {
        self.put(reason, false, lost);
    }

    #[cold]
    pub(crate) fn reply(&self, reason: DeadLetterReason, lost: &Lost<'_>) {
        self.put(reason, true, lost);
    }

    fn put(&self, reason: DeadLetterReason, is_reply: bool, lost: &Lost<'_>) {
        self.counters.count(reason, is_reply);
        if let Some(queue) = &self.queue {
            queue.put(&self.kernel, reason, is_reply, lost);
        }
    }

    pub(crate) fn counts(&self) -> DeadLetterCounts {
        self.counters.counts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(queue: &DeadLetterQueue, kernel: &str, payload: &[u8]) {
        let lost = Lost {
            payload,
            ..Lost::default()
        };
        queue.put(kernel, DeadLetterReason::LateReply, true, &lost);
    }

    #[test]
    fn letters_are_read_in_order_and_the_oldest_makes_room() {
        let queue = DeadLetterQueue::new(4, 8).unwrap();
        let kernel = "k";
        for number in 0..10_u8 {
            put(&queue, kernel, &[number; 3]);
        }
        assert_eq!((queue.len(), queue.overflowed()), (4, 6));
        assert_eq!(queue.counts().late_replies, 10);
        for number in 6..10_u8 {
            let letter = queue.try_recv().unwrap();
            assert_eq!(letter.payload, [number; 3]);
            assert_eq!(letter.kernel, "k");
            assert!(letter.is_reply && !letter.is_cut() && letter.at_ns > 0);
        }
        assert_eq!(queue.try_recv(), None);
        // Buffers come back.
        put(&queue, kernel, b"again");
        assert_eq!(queue.try_recv().unwrap().payload, b"again");
        assert_eq!(queue.overflowed(), 6);
    }

    #[test]
    fn long_payloads_are_cut_and_no_room_is_room_for_none() {
        let kernel = "é".repeat(40);
        let queue = DeadLetterQueue::new(1, 8).unwrap();
        put(&queue, &kernel, &[7; 20]);
        let letter = queue.try_recv().unwrap();
        assert_eq!(
            (letter.payload.as_slice(), letter.payload_bytes),
            ([7; 8].as_slice(), 20)
        );
        assert!(letter.is_cut());
        assert_eq!(letter.kernel, "é".repeat(32));
        let none = DeadLetterQueue::new(0, 8).unwrap();
        put(&none, &kernel, b"x");
        assert_eq!((none.try_recv(), none.overflowed()), (None, 1));
        assert_eq!(none.counts().late_replies, 1);
    }

    #[test]
    fn every_letter_is_read_or_counted_whoever_puts_and_reads() {
        let queue = DeadLetterQueue::new(8, 16).unwrap();
        let read = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for writer in 0..3_u8 {
                let queue = &queue;
                scope.spawn(move || {
                    let kernel = format!("k{writer}");
                    for _ in 0..5_000 {
                        put(queue, &kernel, &[writer; 16]);
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..5_000 {
                        if let Some(letter) = queue.try_recv() {
                            read.fetch_add(1, Ordering::Relaxed);
                            let writer = letter.payload[0];
                            assert_eq!(letter.payload, [writer; 16], "not torn");
                            assert_eq!(letter.kernel, format!("k{writer}"));
                        }
                    }
                });
            }
        });
        while queue.try_recv().is_some() {
            read.fetch_add(1, Ordering::Relaxed);
        }
        let all = read.load(Ordering::Relaxed) + queue.overflowed();
        assert_eq!(all, 15_000);
        assert_eq!(queue.counts().late_replies, 15_000);
    }
}
