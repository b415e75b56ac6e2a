//! The receiving side of a kernel: the reply rings of all its blocks, and an inbox for replies that a call came across
//! while it looked for its own.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use super::calls::{CALL_BIT, PendingCall};
use super::link::KernelLink;
use crate::backend::{HostConsumer, HostProducer};
use crate::error::{HandlerError, MessageError, RecvTimeoutError, TryRecvError, Unavailable};
use crate::kernel::{DeadLetterReason, Lost};
use crate::message::{Extension, MessageHeader, RAW_KIND, RingMessage};
use crate::ring::{Corruption, Peek};

/// The reply rings of all blocks, and the inbox. One holder at a time.
#[derive(Debug)]
pub(super) struct ReceiveSide {
    /// One a block.
    replies: Box<[HostConsumer]>,
    /// Block that is looked at first.
    next: usize,
    /// Uncorrelated replies that calls put aside, older than all in `replies`.
    inbox: HostConsumer,
    inbox_in: HostProducer,
    /// Messages in the inbox.
    inbox_depth: usize,
    /// Whether a sequence has been found in a ring that no correct kernel writes.
    is_corrupt: bool,
}

/// Marks endpoints of raw bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bytes {}

/// Where a message lies that has been found and not yet taken: a block, or behind the last of them the inbox.
///
/// One word; the header stays in its consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found(usize);

/// Why no message was found. Two bytes, so that an empty poll moves nothing about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss {
    /// There is none yet.
    Empty,
    /// Another thread holds the receiving side.
    Busy,
    /// There never will be one.
    Unavailable(Unavailable),
}

impl From<Miss> for TryRecvError {
    fn from(miss: Miss) -> Self {
        match miss {
            Miss::Empty => Self::Empty,
            Miss::Busy => Self::Busy,
            Miss::Unavailable(unavailable) => Self::Unavailable(unavailable),
        }
    }
}

/// Why a wait for a message ended without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitEnd {
    Timeout,
    Unavailable(Unavailable),
}

impl From<WaitEnd> for RecvTimeoutError {
    fn from(end: WaitEnd) -> Self {
        match end {
            WaitEnd::Timeout => Self::Timeout,
            WaitEnd::Unavailable(unavailable) => Self::Unavailable(unavailable),
        }
    }
}

impl ReceiveSide {
    pub(super) fn new(replies: Vec<HostConsumer>, inbox: (HostProducer, HostConsumer)) -> Self {
        Self {
            replies: replies.into_boxed_slice(),
            next: 0,
            inbox_in: inbox.0,
            inbox: inbox.1,
            inbox_depth: 0,
            is_corrupt: false,
        }
    }

    /// Messages that calls put aside and nobody has received.
    pub(super) fn inbox_depth(&self) -> usize {
        self.inbox_depth
    }

    /// The next message that is not the reply to a call. Replies to calls are handed to them on the way. Looks up to
    /// `polls` times.
    #[inline(always)]
    pub(super) fn find(&mut self, link: &KernelLink, polls: u32) -> Result<Found, Miss> {
        if self.inbox_depth == 0
            && let [only] = &mut *self.replies
        {
            // One block, nothing put aside: the message, if there is one, is at hand.
            match only.peek_spinning(polls) {
                Peek::Ready if is_uncorrelated(only.header()) && is_valid(link, only.header()) => {
                    return Ok(Found(0));
                }
                Peek::Empty => {
                    return match link.signals.gate.check_receive() {
                        Ok(()) => Err(Miss::Empty),
                        Err(unavailable) => self.find_after_end(link, unavailable),
                    };
                }
                _ => {}
            }
        }
        self.find_anywhere(link)
    }

    /// As `find`, over all rings and for messages that need more than to be handed out.
    fn find_anywhere(&mut self, link: &KernelLink) -> Result<Found, Miss> {
        if let Some(found) = self.next_uncorrelated(link) {
            return Ok(found);
        }
        match link.signals.gate.check_receive() {
            Ok(()) => Err(Miss::Empty),
            Err(unavailable) => self.find_after_end(link, unavailable),
        }
    }

    /// The kernel ended after the last look; what it wrote before that still counts.
    #[cold]
    fn find_after_end(
        &mut self,
        link: &KernelLink,
        unavailable: Unavailable,
    ) -> Result<Found, Miss> {
        self.next_uncorrelated(link)
            .ok_or(Miss::Unavailable(unavailable))
    }

    /// The reply to one call. Other calls' replies are handed to them, uncorrelated ones put aside. Looks up to
    /// `polls` times.
    #[inline(always)]
    pub(super) fn find_reply(
        &mut self,
        link: &KernelLink,
        call: &PendingCall<'_>,
        polls: u32,
    ) -> Option<Found> {
        if let [only] = &mut *self.replies {
            match only.peek_spinning(polls) {
                Peek::Empty => return None,
                Peek::Ready
                    if only.header().correlation() == call.correlation
                        && only.header().lane() == 0
                        && is_valid(link, only.header()) =>
                {
                    return Some(Found(0));
                }
                _ => {}
            }
        }
        self.find_reply_anywhere(link, call)
    }

    fn find_reply_anywhere(&mut self, link: &KernelLink, call: &PendingCall<'_>) -> Option<Found> {
        loop {
            let block = self.next_reply(link)?;
            let header = *self.replies[block].header();
            if header.lane() != 0 {
                self.give_late_up(link, block);
                continue;
            }
            if header.correlation() == call.correlation {
                return Some(Found(block));
            }
            if header.correlation() & CALL_BIT != 0 {
                self.hand_over(link, block, &header);
            } else {
                self.put_aside(link, block, &header);
            }
        }
    }

    /// Whether a look at the inbox and the rings would find anything.
    pub(super) fn has_message(&mut self) -> bool {
        self.inbox_depth > 0 || self.has_reply()
    }

    /// Whether a look at the rings would find anything. What lies behind a bad sequence, which does not go away, it would not.
    pub(super) fn has_reply(&mut self) -> bool {
        let is_corrupt = self.is_corrupt;
        self.replies
            .iter_mut()
            .any(|consumer| match consumer.peek() {
                Peek::Empty => false,
                Peek::Ready | Peek::Corrupt(Corruption::Length { .. }) => true,
                Peek::Corrupt(_) => !is_corrupt,
            })
    }

    #[inline]
    fn next_uncorrelated(&mut self, link: &KernelLink) -> Option<Found> {
        if self.inbox_depth > 0
            && let Peek::Ready = self.inbox.peek()
        {
            return Some(Found(self.replies.len()));
        }
        loop {
            let block = self.next_reply(link)?;
            let header = *self.replies[block].header();
            if is_uncorrelated(&header) {
                return Some(Found(block));
            }
            if header.lane() != 0 {
                self.give_late_up(link, block);
            } else {
                self.hand_over(link, block, &header);
            }
        }
    }

    /// Gives the reply to a client up that is gone.
    #[cold]
    fn give_late_up(&mut self, link: &KernelLink, block: usize) {
        give_up(link, DeadLetterReason::LateReply, &self.lost(link, block));
        self.release_reply(block);
    }

    /// As `next_reply`, but looks up to `polls` times.
    #[inline]
    pub(super) fn next_reply_spinning(&mut self, link: &KernelLink, polls: u32) -> Option<usize> {
        if let [only] = &mut *self.replies {
            match only.peek_spinning(polls) {
                Peek::Empty => return None,
                Peek::Ready if is_valid(link, only.header()) => return Some(0),
                _ => {}
            }
        }
        self.next_reply(link)
    }

    /// A block's reply that `next_reply` found.
    #[inline]
    pub(super) fn reply(&self, block: usize) -> &HostConsumer {
        &self.replies[block]
    }

    /// The next message of any block, whose header has been checked.
    #[inline]
    fn next_reply(&mut self, link: &KernelLink) -> Option<usize> {
        let count = self.replies.len();
        for offset in 0..count {
            let block = if self.next + offset < count {
                self.next + offset
            } else {
                self.next + offset - count
            };
            loop {
                match self.replies[block].peek() {
                    Peek::Empty => break,
                    Peek::Ready => {
                        if is_valid(link, self.replies[block].header()) {
                            return Some(block);
                        }
                        let lost = self.lost(link, block);
                        give_up(link, DeadLetterReason::Corrupt, &lost);
                        self.skip_corrupt(link, block, "kind or lane out of range");
                    }
                    Peek::Corrupt(corruption @ Corruption::Length { .. }) => {
                        give_up(
                            link,
                            DeadLetterReason::Corrupt,
                            &Lost {
                                block: u32::try_from(block).ok(),
                                ..Lost::default()
                            },
                        );
                        self.skip_corrupt(link, block, &corruption.to_string());
                    }
                    // Nothing behind a bad sequence can be trusted, and it does not go away.
                    Peek::Corrupt(_) if self.is_corrupt => break,
                    Peek::Corrupt(corruption) => {
                        self.is_corrupt = true;
                        link.quarantine(block, &format!("reply ring: {corruption}"));
                        break;
                    }
                }
            }
        }
        None
    }

    /// Passes over a message that no correct kernel writes, and fails the kernel that wrote it.
    #[cold]
    fn skip_corrupt(&mut self, link: &KernelLink, block: usize, what: &str) {
        self.release_reply(block);
        link.quarantine(block, &format!("reply ring: {what}"));
    }

    /// Gives a reply to the call that waits for it.
    #[cold]
    pub(super) fn hand_over(&mut self, link: &KernelLink, block: usize, header: &MessageHeader) {
        let consumer = &self.replies[block];
        // The call itself counts what it makes of the reply.
        if !link.calls.deliver(*header, consumer.payload()) {
            link.signals
                .dead_letters
                .reply(DeadLetterReason::LateReply, &self.lost(link, block));
        }
        self.release_reply(block);
        link.signals.reply_written(true);
    }

    /// Moves an uncorrelated reply into the inbox.
    #[cold]
    pub(super) fn put_aside(&mut self, link: &KernelLink, block: usize, header: &MessageHeader) {
        let consumer = &self.replies[block];
        let envelope = header.envelope(consumer.extension());
        // All that was received from it is free, not only what went back by quarter ring.
        self.inbox.publish_cursor();
        match self.inbox_in.try_push(&envelope, consumer.payload()) {
            Ok(()) => self.inbox_depth += 1,
            Err(_) => link
                .signals
                .dead_letters
                .reply(DeadLetterReason::InboxFull, &self.lost(link, block)),
        }
        self.release_reply(block);
        link.signals.reply_written(true);
    }

    /// Gives up whatever lies here: nobody will receive it. To be called when the kernel writes no more; looks at no more messages than
    /// there are slots.
    pub(super) fn give_everything_up(&mut self, link: &KernelLink) {
        let inbox = self.replies.len();
        while self.inbox_depth > 0 && matches!(self.inbox.peek(), Peek::Ready) {
            give_up(link, DeadLetterReason::Shutdown, &self.lost(link, inbox));
            self.release(Found(inbox));
        }
        for _ in 0..link.capacity.saturating_mul(inbox as u64) {
            let Some(block) = self.next_reply(link) else {
                return;
            };
            let reason = if is_uncorrelated(self.replies[block].header()) {
                DeadLetterReason::Shutdown
            } else {
                DeadLetterReason::LateReply
            };
            give_up(link, reason, &self.lost(link, block));
            self.release_reply(block);
        }
    }

    /// What is to be said of a block's reply that is given up; the inbox's is block `replies.len()`.
    pub(super) fn lost(&self, link: &KernelLink, block: usize) -> Lost<'_> {
        let consumer = self.replies.get(block).unwrap_or(&self.inbox);
        Lost {
            block: u32::try_from(block)
                .ok()
                .filter(|_| block < self.replies.len()),
            ..link.lost(consumer.header(), consumer.extension(), consumer.payload())
        }
    }

    #[inline]
    fn consumer(&self, found: Found) -> &HostConsumer {
        self.replies.get(found.0).unwrap_or(&self.inbox)
    }

    /// Gives a block's slot back. Only now is it the next block's turn: a message that stays is found again.
    #[inline]
    pub(super) fn release_reply(&mut self, block: usize) {
        self.replies[block].release();
        self.next = if block + 1 < self.replies.len() {
            block + 1
        } else {
            0
        };
    }

    #[inline]
    fn release(&mut self, found: Found) {
        match found.0 {
            block if block < self.replies.len() => self.release_reply(block),
            _ => {
                self.inbox.release();
                self.inbox_depth -= 1;
            }
        }
    }

    /// The message that was found, as a guard that takes it when dropped.
    #[inline]
    pub(super) fn take<'a, M>(&'a mut self, link: &'a KernelLink, found: Found) -> Received<'a, M> {
        Received {
            side: self,
            link,
            found,
            useless: Cell::new(None),
            message: PhantomData,
        }
    }
}

/// Gives up a reply.
#[cold]
fn give_up(link: &KernelLink, reason: DeadLetterReason, lost: &Lost<'_>) {
    link.signals.dead_letters.reply(reason, lost);
}

/// Why a call's reply is of no use to it, by what it made of it.
pub(super) fn uselessness<R>(outcome: &Result<R, MessageError>) -> Option<DeadLetterReason> {
    match outcome {
        Err(MessageError::Corrupt) => Some(DeadLetterReason::Corrupt),
        Err(MessageError::TypeMismatch { .. } | MessageError::BufferTooSmall { .. }) => {
            Some(DeadLetterReason::Mismatch)
        }
        // The caller has the handler's error.
        Err(MessageError::Handler(_)) | Ok(_) => None,
    }
}

/// Whether a reply's header names a known type and a lane that there is or was. Its length has been checked by the ring.
#[inline]
fn is_valid(link: &KernelLink, header: &MessageHeader) -> bool {
    (header.lane() == 0 || link.lanes.knows(header.lane()))
        && (header.kind() == RAW_KIND || link.types.type_id_of(header.kind()).is_some())
}

/// Whether a reply is what `find` looks for: of the handle or the endpoints, and no call's.
#[inline]
fn is_uncorrelated(header: &MessageHeader) -> bool {
    header.lane() == 0 && header.correlation() & CALL_BIT == 0
}

/// How hard an attempt to find a message may try.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// How often it may look at a slot, a pause apart.
    pub(super) polls: u32,
    /// Whether nothing follows: another thread that holds the receiving side is waited for, briefly.
    pub(super) last: bool,
}

impl Look {
    /// One look, of which the caller wants to know what it found.
    pub(super) const ONCE: Self = Self {
        polls: 1,
        last: true,
    };
}

/// Repeats `attempt`, which may look as many times as it is told, until it does anything but report emptiness, or the
/// timeout has passed. The last attempt is made after the deadline, so that a message that came before it is never
/// missed. Sleeps, if at all, only while `is_ready` says no.
#[inline(always)]
pub(super) fn until_found<S, R>(
    link: &KernelLink,
    timeout: Duration,
    mut side: S,
    mut attempt: impl FnMut(&mut S, Look) -> Result<R, Miss>,
    mut is_ready: impl FnMut(&mut S) -> bool,
) -> Result<R, WaitEnd> {
    let mut waiter = link.waiter(timeout);
    let mut last = false;
    loop {
        let look = Look {
            polls: waiter.polls(),
            last: last || timeout.is_zero(),
        };
        match attempt(&mut side, look) {
            Ok(found) => return Ok(found),
            Err(Miss::Unavailable(unavailable)) => return Err(WaitEnd::Unavailable(unavailable)),
            Err(Miss::Empty | Miss::Busy) if last => return Err(WaitEnd::Timeout),
            Err(Miss::Empty | Miss::Busy) => {
                last = !waiter.pause(link, &link.signals.replied, || is_ready(&mut side));
            }
        }
    }
}

/// A received message, still in its slot. Dropping it gives the slot back to the kernel.
///
/// A kernel on the CPU backend cannot write to the slot meanwhile, and the message is read where it
/// lies. A device could, if its code is wrong: its message was copied into memory of the receiving
/// side, taken at launch, before its header and archive are checked, and is read there.
pub struct Received<'a, M> {
    side: &'a mut ReceiveSide,
    link: &'a KernelLink,
    found: Found,
    /// Why it is of no use to whoever took it, if so.
    useless: Cell<Option<DeadLetterReason>>,
    message: PhantomData<fn() -> M>,
}

impl<M> fmt::Debug for Received<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("header", self.side.consumer(self.found).header())
            .finish_non_exhaustive()
    }
}

impl<M> Received<'_, M> {
    /// The header.
    #[inline]
    #[must_use]
    pub fn header(&self) -> MessageHeader {
        *self.side.consumer(self.found).header()
    }

    /// Timestamp, deadline and trace id, if the message carries them; a reply carries those of its request.
    #[inline]
    #[must_use]
    pub fn extension(&self) -> Option<Extension> {
        self.side.consumer(self.found).extension()
    }

    /// The payload, 16-byte aligned.
    #[inline]
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.side.consumer(self.found).payload()
    }

    /// The handler's error, if this is an error reply.
    #[inline]
    #[must_use]
    pub fn error(&self) -> Option<HandlerError> {
        (*self.side.consumer(self.found).header())
            .is_error()
            .then(|| HandlerError::decode(self.payload()))
    }

    /// Leaves the message where it is; the next receive finds it again.
    #[inline]
    pub fn keep(self) {
        std::mem::forget(self);
    }

    /// Copies the payload into `buffer` and takes the message.
    #[inline]
    pub(super) fn copy_to(self, buffer: &mut [u8]) -> Result<usize, MessageError> {
        if let Some(error) = self.error() {
            return Err(MessageError::Handler(error));
        }
        let payload = self.payload();
        let length = payload.len();
        let Some(target) = buffer.get_mut(..length) else {
            self.keep();
            return Err(MessageError::BufferTooSmall { length });
        };
        target.copy_from_slice(payload);
        Ok(length)
    }

    /// Takes the message as a `T`. One of another type stays where it is.
    #[inline]
    pub(super) fn into_message<T: RingMessage>(self) -> Result<T, MessageError> {
        match self.check::<T>() {
            Ok(()) => T::decode(self.payload()).map_err(|_| self.mark_corrupt()),
            Err(error) => {
                if let MessageError::TypeMismatch { .. } = error {
                    self.keep();
                }
                Err(error)
            }
        }
    }

    /// Fails unless this is a `T`, and no error reply.
    #[inline]
    fn check<T: RingMessage>(&self) -> Result<(), MessageError> {
        if let Some(error) = self.error() {
            return Err(MessageError::Handler(error));
        }
        match self
            .link
            .types
            .type_id_of(self.side.consumer(self.found).header().kind())
        {
            Some(found) if found == T::TYPE_ID => Ok(()),
            found => Err(MessageError::TypeMismatch {
                expected: T::TYPE_ID,
                found: found.unwrap_or(0),
            }),
        }
    }

    /// Notes that the payload is no valid archive.
    #[cold]
    fn mark_corrupt(&self) -> MessageError {
        self.useless.set(Some(DeadLetterReason::Corrupt));
        MessageError::Corrupt
    }
}

impl<M: RingMessage> Received<'_, M> {
    /// The message's archived form, validated and read where the message lies. Does not allocate.
    ///
    /// # Errors
    /// [`MessageError::Handler`] if this is an error reply; [`MessageError::TypeMismatch`] if it is of another type
    /// ([`keep`](Self::keep) leaves it where it is); [`MessageError::Corrupt`] if the bytes are no valid archive, in
    /// which case the message counts as a dead letter.
    #[inline]
    pub fn access(&self) -> Result<&M::Archived, MessageError> {
        self.check::<M>()?;
        M::access(self.payload()).map_err(|_| self.mark_corrupt())
    }

    /// The message as an owned value. Allocates only if its type does.
    ///
    /// # Errors
    /// As [`access`](Self::access).
    #[inline]
    pub fn decode(&self) -> Result<M, MessageError> {
        self.check::<M>()?;
        M::decode(self.payload()).map_err(|_| self.mark_corrupt())
    }
}

impl<M> Drop for Received<'_, M> {
    #[inline]
    fn drop(&mut self) {
        let useless = self.useless.get();
        if let Some(reason) = useless {
            give_up(self.link, reason, &self.side.lost(self.link, self.found.0));
        }
        self.side.release(self.found);
        if useless.is_none() {
            self.link.count_delivered();
        }
    }
}

impl Received<'_, Bytes> {
    /// Hands header and payload of a call's reply to `read`.
    #[inline]
    pub(super) fn read_with<R>(
        self,
        read: impl FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    ) -> Result<R, MessageError> {
        let outcome = read(self.side.consumer(self.found).header(), self.payload());
        self.useless.set(uselessness(&outcome));
        outcome
    }
}

/// Reads a call's reply as a typed message.
#[inline]
pub(super) fn read_reply<T: RingMessage>(
    kind: Option<u16>,
    found_type: impl FnOnce() -> Option<u64>,
    header: &MessageHeader,
    payload: &[u8],
) -> Result<T, MessageError> {
    if header.is_error() {
        return Err(MessageError::Handler(HandlerError::decode(payload)));
    }
    if Some(header.kind()) != kind {
        return Err(MessageError::TypeMismatch {
            expected: T::TYPE_ID,
            found: found_type().unwrap_or(0),
        });
    }
    T::decode(payload).map_err(|_| MessageError::Corrupt)
}

/// Reads a call's reply as raw bytes.
#[inline]
pub(super) fn read_reply_bytes(
    buffer: &mut [u8],
    header: &MessageHeader,
    payload: &[u8],
) -> Result<usize, MessageError> {
    if header.is_error() {
        return Err(MessageError::Handler(HandlerError::decode(payload)));
    }
    copy_payload(payload, buffer)
}

/// Copies a payload; its length.
#[inline]
pub(super) fn copy_payload(payload: &[u8], buffer: &mut [u8]) -> Result<usize, MessageError> {
    let length = payload.len();
    buffer
        .get_mut(..length)
        .ok_or(MessageError::BufferTooSmall { length })?
        .copy_from_slice(payload);
    Ok(length)
}

/// The kind that received messages of `T` have; `None` if the kernel never sends any.
#[inline]
pub(super) fn kind_of<T: RingMessage>(link: &KernelLink) -> Option<u16> {
    link.types
        .kind_of(T::TYPE_ID)
        .ok()
        .filter(|kind| *kind != RAW_KIND)
}
