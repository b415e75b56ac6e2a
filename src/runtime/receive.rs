//! The receiving side of a kernel: the reply rings of all its blocks, and an inbox for replies that a call came across
//! while it looked for its own.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use super::calls::{CALL_BIT, PendingCall};
use super::instance::KernelInstance;
use crate::backend::{HostConsumer, HostProducer};
use crate::error::{HandlerError, MessageError, RecvTimeoutError, TryRecvError};
use crate::kernel::DeadLetterReason;
use crate::message::{Extension, MessageHeader, RAW_KIND, RingMessage};
use crate::ring::{Corruption, Peek};
use crate::thread::Waiter;

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
}

/// Where a message lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Block(usize),
    Inbox,
}

/// A message that has been found and not yet taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    source: Source,
    header: MessageHeader,
}

impl ReceiveSide {
    pub(super) fn new(replies: Vec<HostConsumer>, inbox: (HostProducer, HostConsumer)) -> Self {
        Self {
            replies: replies.into_boxed_slice(),
            next: 0,
            inbox_in: inbox.0,
            inbox: inbox.1,
            inbox_depth: 0,
        }
    }

    /// Messages that calls put aside and nobody has received.
    pub(super) fn inbox_depth(&self) -> usize {
        self.inbox_depth
    }

    /// The next message that is not the reply to a call. Replies to calls are handed to them on the way.
    ///
    /// Fails with `Empty`, or with why there will never be one.
    #[inline]
    pub(super) fn find(&mut self, instance: &KernelInstance) -> Result<Found, TryRecvError> {
        if let Some(found) = self.next_uncorrelated(instance) {
            return Ok(found);
        }
        let Err(unavailable) = instance.signals.gate.check_receive() else {
            return Err(TryRecvError::Empty);
        };
        // The kernel ended after the look above; what it wrote before that still counts.
        self.next_uncorrelated(instance)
            .ok_or(TryRecvError::Unavailable(unavailable))
    }

    /// The reply to one call. Other calls' replies are handed to them, uncorrelated ones put aside.
    #[inline]
    pub(super) fn find_reply(
        &mut self,
        instance: &KernelInstance,
        call: &PendingCall<'_>,
    ) -> Option<Found> {
        loop {
            let (block, header) = self.next_reply(instance)?;
            if header.correlation() == call.correlation {
                return Some(Found {
                    source: Source::Block(block),
                    header,
                });
            }
            if header.correlation() & CALL_BIT != 0 {
                self.hand_over(instance, block, &header);
            } else {
                self.put_aside(instance, block, &header);
            }
        }
    }

    /// Whether a look at the rings would find anything.
    pub(super) fn has_message(&mut self) -> bool {
        self.inbox_depth > 0
            || self
                .replies
                .iter_mut()
                .any(|consumer| !matches!(consumer.peek(), Peek::Empty))
    }

    #[inline]
    fn next_uncorrelated(&mut self, instance: &KernelInstance) -> Option<Found> {
        if self.inbox_depth > 0
            && let Peek::Ready(header) = self.inbox.peek()
        {
            return Some(Found {
                source: Source::Inbox,
                header,
            });
        }
        loop {
            let (block, header) = self.next_reply(instance)?;
            if header.correlation() & CALL_BIT == 0 {
                return Some(Found {
                    source: Source::Block(block),
                    header,
                });
            }
            self.hand_over(instance, block, &header);
        }
    }

    /// The next message of any block, whose header has been checked.
    #[inline]
    fn next_reply(&mut self, instance: &KernelInstance) -> Option<(usize, MessageHeader)> {
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
                    Peek::Ready(header) => {
                        if instance.types.type_id_of(header.kind()).is_some() && header.lane() == 0
                        {
                            self.next = if block + 1 < count { block + 1 } else { 0 };
                            return Some((block, header));
                        }
                        self.skip_corrupt(instance, block, "kind or lane out of range");
                    }
                    Peek::Corrupt(corruption @ Corruption::Length { .. }) => {
                        self.skip_corrupt(instance, block, &corruption.to_string());
                    }
                    Peek::Corrupt(corruption) => {
                        // Nothing behind a bad sequence can be trusted, and it does not go away.
                        instance.quarantine(block, &format!("reply ring: {corruption}"));
                        break;
                    }
                }
            }
        }
        None
    }

    /// Passes over a message that no correct kernel writes, and fails the kernel that wrote it.
    #[cold]
    fn skip_corrupt(&mut self, instance: &KernelInstance, block: usize, what: &str) {
        self.replies[block].release();
        instance
            .signals
            .dead_letters
            .count_reply(DeadLetterReason::Corrupt);
        instance.quarantine(block, &format!("reply ring: {what}"));
    }

    /// Gives a reply to the call that waits for it.
    #[cold]
    fn hand_over(&mut self, instance: &KernelInstance, block: usize, header: &MessageHeader) {
        let consumer = &mut self.replies[block];
        let extension = consumer.extension(header);
        if instance
            .calls
            .deliver(*header, extension, consumer.payload(header))
        {
            instance.count_delivered();
        } else {
            instance
                .signals
                .dead_letters
                .count_reply(DeadLetterReason::LateReply);
        }
        consumer.release();
        // Whoever waits for it announced itself before this side's lock was taken, or will look for itself.
        instance.signals.replies_written();
    }

    /// Moves an uncorrelated reply into the inbox.
    #[cold]
    fn put_aside(&mut self, instance: &KernelInstance, block: usize, header: &MessageHeader) {
        let consumer = &mut self.replies[block];
        let envelope = header.envelope(consumer.extension(header));
        match self.inbox_in.try_push(&envelope, consumer.payload(header)) {
            Ok(()) => self.inbox_depth += 1,
            Err(_) => instance
                .signals
                .dead_letters
                .count_reply(DeadLetterReason::InboxFull),
        }
        consumer.release();
        instance.signals.replies_written();
    }

    #[inline]
    fn consumer(&self, source: Source) -> &HostConsumer {
        match source {
            Source::Block(block) => &self.replies[block],
            Source::Inbox => &self.inbox,
        }
    }

    #[inline]
    fn release(&mut self, source: Source) {
        match source {
            Source::Block(block) => self.replies[block].release(),
            Source::Inbox => {
                self.inbox.release();
                self.inbox_depth -= 1;
            }
        }
    }

    /// The message that was found, as a guard that takes it when dropped.
    #[inline]
    pub(super) fn take<'a, M>(
        &'a mut self,
        instance: &'a KernelInstance,
        found: Found,
    ) -> Received<'a, M> {
        Received {
            side: self,
            instance,
            found,
            corrupt: Cell::new(false),
            message: PhantomData,
        }
    }
}

/// Repeats `attempt` until it does anything but report emptiness, or the timeout has passed. The last attempt is made
/// after the deadline, so that a message that came before it is never missed. Sleeps, if at all, only while
/// `is_ready` says no.
#[inline]
pub(super) fn until_received<S, R>(
    instance: &KernelInstance,
    timeout: Duration,
    side: &mut S,
    mut attempt: impl FnMut(&mut S) -> Result<R, TryRecvError>,
    mut is_ready: impl FnMut(&mut S) -> bool,
) -> Result<R, RecvTimeoutError> {
    let mut waiter = Waiter::new(instance.host_wait, timeout);
    let mut last = false;
    loop {
        match attempt(side) {
            Ok(received) => return Ok(received),
            Err(TryRecvError::Unavailable(unavailable)) => {
                return Err(RecvTimeoutError::Unavailable(unavailable));
            }
            Err(TryRecvError::Message(error)) => return Err(RecvTimeoutError::Message(error)),
            Err(TryRecvError::Empty | TryRecvError::Busy) if last => {
                return Err(RecvTimeoutError::Timeout);
            }
            Err(TryRecvError::Empty | TryRecvError::Busy) => {
                last = !waiter.pause(&instance.signals.replied, || is_ready(side));
            }
        }
    }
}

/// A received message, still in its slot. Dropping it gives the slot back to the kernel.
pub struct Received<'a, M> {
    side: &'a mut ReceiveSide,
    instance: &'a KernelInstance,
    found: Found,
    corrupt: Cell<bool>,
    message: PhantomData<fn() -> M>,
}

impl<M> fmt::Debug for Received<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("header", &self.found.header)
            .finish_non_exhaustive()
    }
}

impl<M> Received<'_, M> {
    /// The header.
    #[inline]
    #[must_use]
    pub fn header(&self) -> MessageHeader {
        self.found.header
    }

    /// Timestamp, deadline and trace id, if the message carries them; a reply carries those of its request.
    #[inline]
    #[must_use]
    pub fn extension(&self) -> Option<Extension> {
        self.side
            .consumer(self.found.source)
            .extension(&self.found.header)
    }

    /// The payload, in place, 16-byte aligned.
    #[inline]
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        self.side
            .consumer(self.found.source)
            .payload(&self.found.header)
    }

    /// The handler's error, if this is an error reply.
    #[inline]
    #[must_use]
    pub fn error(&self) -> Option<HandlerError> {
        self.found
            .header
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

    /// Fails, and leaves the message where it is, unless it is of type `T`.
    #[inline]
    pub(super) fn check_type<T: RingMessage>(self, kind: Option<u16>) -> Result<Self, MessageError> {
        let header = self.found.header;
        if Some(header.kind()) == kind || header.is_error() {
            return Ok(self);
        }
        let found = self.instance.types.type_id_of(header.kind());
        self.keep();
        Err(MessageError::TypeMismatch {
            expected: T::TYPE_ID,
            found: found.unwrap_or(0),
        })
    }

    #[inline]
    fn checked<R>(
        &self,
        read: impl FnOnce(&[u8]) -> Result<R, crate::message::codec::CodecError>,
    ) -> Result<R, MessageError> {
        if let Some(error) = self.error() {
            return Err(MessageError::Handler(error));
        }
        read(self.payload()).map_err(|_| {
            self.corrupt.set(true);
            MessageError::Corrupt
        })
    }
}

impl<M: RingMessage> Received<'_, M> {
    /// The message's archived form, validated and read in place. Does not allocate.
    ///
    /// # Errors
    /// [`MessageError::Handler`] if this is an error reply; [`MessageError::Corrupt`] if the bytes are no valid
    /// archive, in which case the message counts as a dead letter.
    #[inline]
    pub fn access(&self) -> Result<&M::Archived, MessageError> {
        // Validation that depends on the result's lifetime cannot go through `checked`.
        if let Some(error) = self.error() {
            return Err(MessageError::Handler(error));
        }
        M::access(self.payload()).map_err(|_| {
            self.corrupt.set(true);
            MessageError::Corrupt
        })
    }

    /// The message as an owned value. Allocates only if its type does.
    ///
    /// # Errors
    /// As [`access`](Self::access).
    #[inline]
    pub fn decode(&self) -> Result<M, MessageError> {
        self.checked(M::decode)
    }
}

impl<M> Drop for Received<'_, M> {
    #[inline]
    fn drop(&mut self) {
        self.side.release(self.found.source);
        if self.corrupt.get() {
            self.instance
                .signals
                .dead_letters
                .count_reply(DeadLetterReason::Corrupt);
        } else {
            self.instance.count_delivered();
        }
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
    let length = payload.len();
    buffer
        .get_mut(..length)
        .ok_or(MessageError::BufferTooSmall { length })?
        .copy_from_slice(payload);
    Ok(length)
}

/// The kind that received messages of `T` have; `None` if the kernel never sends any.
#[inline]
pub(super) fn kind_of<T: RingMessage>(instance: &KernelInstance) -> Option<u16> {
    instance
        .types
        .kind_of(T::TYPE_ID)
        .ok()
        .filter(|kind| *kind != RAW_KIND)
}
