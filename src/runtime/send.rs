//! The sending side of a kernel: the request rings of all its blocks, and which one a message goes into.

use std::fmt;
use std::time::Duration;

use super::calls::CALL_BIT;
use super::link::KernelLink;
use crate::backend::HostProducer;
use crate::backend::cpu::runs_here;
use crate::error::{Rejection, SendTimeoutError, TrySendError, Unavailable};
use crate::message::codec::CodecError;
use crate::message::{Envelope, Extension, Head, MessageEncoder, Priority, RingMessage};
use crate::ring::{Batch, PushError, Reservation};
use crate::time;

/// How long a sender that may sleep does so between two looks at a full ring. A full ring has work for longer.
const NAP: Duration = Duration::from_micros(100);

/// What a message carries besides its payload. The default is the plain, one-line message.
///
/// ```
/// use ringkernel::{Priority, SendOptions};
/// let options = SendOptions { priority: Priority::High, ..SendOptions::default() };
/// # assert_eq!(options.correlation, 0);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendOptions {
    /// Copied into every reply; below 2^31. 0 means "not correlated".
    pub correlation: u32,
    /// Urgency, for the handler to see; messages are delivered in order whatever it says.
    pub priority: Priority,
    /// Messages of equal key go to the same block of the grid, in order. Without a key they go round-robin.
    pub key: Option<u64>,
    /// Stamps the message with the time of sending: larger than any stamp of this kernel before it, and than any other that its
    /// clock gave, if it was launched with one ([`LaunchOptions::hlc`](crate::LaunchOptions::hlc)). Takes the 32-byte extension, and
    /// reads the clock.
    pub timestamp: bool,
    /// When the message stops being of use, in nanoseconds since the Unix epoch
    /// ([`now_ns`](crate::time::now_ns) gives the present); `Some(0)` has passed, as any time of
    /// the past. An expired message goes to the dead letters instead of the handler: of every
    /// message on the CPU backend; elsewhere of those that a [`Client`](crate::Client) sends, until
    /// they are in the kernel's ring. Takes the extension.
    pub deadline_ns: Option<u64>,
    /// The same as a time from the moment of sending; the earlier one counts if there are both. Takes the extension, and reads the clock.
    pub time_to_live: Option<Duration>,
    /// W3C trace id. Takes the extension.
    pub trace_id: Option<[u8; 16]>,
}

/// Which block a message goes to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Route {
    RoundRobin,
    Key(u64),
    /// This block.
    Block(usize),
}

impl Route {
    /// The route of a request in a lane, as its header says it: a block, plus one, or 0 for whose turn it is.
    #[inline]
    pub(super) fn of_lane(lane: u16) -> Self {
        match lane {
            0 => Self::RoundRobin,
            lane => Self::Block(usize::from(lane) - 1),
        }
    }

    /// What a request in a lane says of its route, to a kernel of so many blocks, of which there are at most 1024.
    #[inline]
    fn in_lane(self, blocks: usize) -> u16 {
        match self {
            _ if blocks == 1 => 0,
            Self::RoundRobin => 0,
            Self::Key(key) => block_of(key, blocks) as u16 + 1,
            Self::Block(block) => block as u16 + 1,
        }
    }
}

/// Everything about a message but its payload: which block it goes to, and its header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    route: Route,
    head: Head,
    extension: Option<Extension>,
    /// Whether the extension gets the time of sending.
    stamped: bool,
}

impl Address {
    /// A plain message of this kind, to the block whose turn it is.
    #[inline]
    pub(super) const fn plain(kind: u16) -> Self {
        Self {
            route: Route::RoundRobin,
            head: Head::of_kind(kind),
            extension: None,
            stamped: false,
        }
    }

    /// A plain request of this kind, whose reply is to carry this correlation.
    #[inline]
    pub(super) const fn call(kind: u16, correlation: u32) -> Self {
        Self {
            head: Head::of_kind(kind).correlated(correlation),
            ..Self::plain(kind)
        }
    }

    /// A message of this kind with options.
    #[inline]
    pub(super) fn with(kind: u16, options: &SendOptions) -> Result<Self, Rejection> {
        if options.correlation & CALL_BIT != 0 {
            return Err(Rejection::Correlation {
                correlation: options.correlation,
            });
        }
        let deadline_ns = match options.time_to_live {
            None => options.deadline_ns,
            Some(time_to_live) => {
                let nanos = u64::try_from(time_to_live.as_nanos()).unwrap_or(u64::MAX);
                let own = time::now_ns().saturating_add(nanos);
                Some(
                    options
                        .deadline_ns
                        .map_or(own, |deadline| deadline.min(own)),
                )
            }
        };
        let extended = options.timestamp || deadline_ns.is_some() || options.trace_id.is_some();
        let extension = extended.then(|| Extension {
            timestamp_ns: 0,
            // In a message 0 means "never": a deadline of 1970 is the nanosecond after it, which
            // has passed as well.
            deadline_ns: deadline_ns.map_or(0, |deadline| deadline.max(1)),
            trace_id: options.trace_id.unwrap_or_default(),
        });
        let envelope = Envelope {
            correlation: options.correlation,
            kind,
            priority: options.priority,
            extension,
            ..Envelope::default()
        };
        Ok(Self {
            route: options.key.map_or(Route::RoundRobin, Route::Key),
            head: envelope.head(),
            extension,
            stamped: options.timestamp,
        })
    }

    /// The extension at the moment of sending. Stamped by whoever holds the sending side, so that stamps increase in
    /// the order of the messages.
    #[inline]
    pub(super) fn extension_now(&self, link: &KernelLink) -> Option<Extension> {
        self.extension.map(|extension| Extension {
            timestamp_ns: if self.stamped {
                link.timestamps.next()
            } else {
                0
            },
            ..extension
        })
    }
}

impl Address {
    /// The header's words.
    #[inline]
    pub(super) fn head(&self) -> Head {
        self.head
    }

    /// What a request in a lane says of its route.
    #[inline]
    pub(super) fn route_in_lane(&self, blocks: usize) -> u16 {
        self.route.in_lane(blocks)
    }

    /// Whether it has a deadline.
    #[inline]
    pub(super) fn has_deadline(&self) -> bool {
        self.extension
            .is_some_and(|extension| extension.deadline_ns != 0)
    }

    /// The same for a call.
    #[inline]
    pub(super) fn for_call(self, correlation: u32) -> Self {
        Self {
            head: self.head.correlated(correlation),
            ..self
        }
    }
}

/// The request rings of all blocks. One holder at a time.
#[derive(Debug)]
pub(super) struct SendSide {
    producers: Box<[HostProducer]>,
    /// Block of the next message that has no key.
    next: usize,
}

impl SendSide {
    pub(super) fn new(producers: Vec<HostProducer>) -> Self {
        Self {
            producers: producers.into_boxed_slice(),
            next: 0,
        }
    }

    /// The end of the one ring, of a kernel of one block.
    pub(super) fn into_only(self) -> Option<HostProducer> {
        self.producers.into_vec().pop()
    }

    /// Sends one message that `write` puts into its slot.
    #[inline]
    pub(super) fn try_send(
        &mut self,
        link: &KernelLink,
        address: &Address,
        write: impl FnOnce(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), TrySendError> {
        link.signals.gate.check_send()?;
        let extension = address.extension_now(link);
        self.put(link, address.route, address.head, extension, write)?;
        Ok(())
    }

    /// Puts one request into the ring of a block, whatever the kernel's state; gives the block and the request's position.
    #[inline]
    pub(super) fn put<E>(
        &mut self,
        link: &KernelLink,
        route: Route,
        head: Head,
        extension: Option<Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(usize, u32), TrySendError>
    where
        TrySendError: From<E>,
    {
        let block = self.choose(link, route)?;
        let producer = &mut self.producers[block];
        let position = producer.position();
        let mut reservation = producer
            .reserve_head(head, extension.as_ref())
            .map_err(refused)?;
        let length = write(reservation.body_mut())?;
        reservation.commit(length).map_err(refused)?;
        link.sent(block, 1);
        Ok((block, position))
    }

    /// Whether a request that may go to any block has room.
    pub(super) fn has_room(&mut self) -> bool {
        self.producers
            .iter_mut()
            .any(|producer| producer.free_slots(1) > 0)
    }

    /// Position of each block's next request.
    pub(super) fn positions(&self) -> impl Iterator<Item = u32> {
        self.producers.iter().map(|producer| producer.position())
    }

    /// The block that the next message goes to, with at least one free slot.
    #[inline]
    fn choose(&mut self, link: &KernelLink, route: Route) -> Result<usize, TrySendError> {
        let count = self.producers.len();
        let first = match route {
            _ if count == 1 => 0,
            Route::RoundRobin => self.next,
            Route::Key(key) => return self.with_room(link, block_of(key, count)),
            Route::Block(block) => return self.with_room(link, block),
        };
        for offset in 0..count {
            let block = if first + offset < count {
                first + offset
            } else {
                first + offset - count
            };
            if self.producers[block].free_slots(1) > 0 {
                self.next = if block + 1 < count { block + 1 } else { 0 };
                return Ok(block);
            }
        }
        Err(self.full(link))
    }

    /// This block, if it has room.
    #[inline]
    fn with_room(&mut self, link: &KernelLink, block: usize) -> Result<usize, TrySendError> {
        let producer = self.producers.get_mut(block);
        if producer.is_some_and(|producer| producer.free_slots(1) > 0) {
            Ok(block)
        } else {
            Err(self.full(link))
        }
    }

    /// A ring that looks full because the kernel published an impossible cursor is a ring that cannot be trusted.
    #[cold]
    pub(super) fn full(&self, link: &KernelLink) -> TrySendError {
        if let Some(block) = self
            .producers
            .iter()
            .position(|producer| producer.bad_cursors() > 0)
        {
            link.quarantine(block, "request ring: the kernel's cursor is out of range");
            return TrySendError::Unavailable(Unavailable::Failed);
        }
        TrySendError::Full
    }

    /// A slot to write a message into.
    #[inline]
    pub(super) fn reserve<'a>(
        &'a mut self,
        link: &'a KernelLink,
        address: &Address,
    ) -> Result<SendSlot<'a>, TrySendError> {
        link.signals.gate.check_send()?;
        let block = self.choose(link, address.route)?;
        let extension = address.extension_now(link);
        let reservation = self.producers[block]
            .reserve_head(address.head, extension.as_ref())
            .map_err(refused)?;
        Ok(SendSlot {
            reservation,
            link,
            block,
        })
    }

    /// Slots for several messages to one block: the one with the next turn that has any.
    #[inline]
    pub(super) fn batch<'a>(
        &'a mut self,
        link: &'a KernelLink,
        wanted: usize,
    ) -> Result<SendBatch<'a>, TrySendError> {
        link.signals.gate.check_send()?;
        let block = self.choose(link, Route::RoundRobin)?;
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        Ok(SendBatch {
            batch: self.producers[block].batch(wanted),
            link,
            block,
        })
    }
}

/// Repeats `attempt` until it does anything but report a full ring, or the timeout has passed. The last attempt is made
/// after the deadline.
#[inline]
pub(super) fn until_sent<R>(
    link: &KernelLink,
    timeout: Duration,
    mut attempt: impl FnMut() -> Result<R, TrySendError>,
) -> Result<R, SendTimeoutError> {
    let mut waiter = link.waiter(timeout);
    let mut last = false;
    // The kernel's only block makes no room while its own handler waits for it.
    let is_vain = link.blocks.len() == 1 && runs_here(&link.signals);
    loop {
        match attempt() {
            Ok(sent) => return Ok(sent),
            Err(TrySendError::Unavailable(unavailable)) => {
                return Err(SendTimeoutError::Unavailable(unavailable));
            }
            Err(TrySendError::Rejected(rejection)) => {
                return Err(SendTimeoutError::Rejected(rejection));
            }
            Err(TrySendError::Full) if is_vain => return Err(SendTimeoutError::Full),
            Err(TrySendError::Full | TrySendError::Busy) if last => {
                return Err(SendTimeoutError::Timeout);
            }
            Err(TrySendError::Full | TrySendError::Busy) => last = !waiter.pause_or_nap(link, NAP),
        }
    }
}

/// The block that messages of a key go to: Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3, 6.4),
/// whose high bits are scaled to the grid.
#[inline]
fn block_of(key: u64, count: usize) -> usize {
    let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((u128::from(hash) * count as u128) >> 64) as usize
}

#[inline]
pub(super) fn refused(error: PushError) -> TrySendError {
    match error {
        PushError::Full => TrySendError::Full,
        PushError::TooLong { max, .. } => TrySendError::Rejected(Rejection::TooLarge { max }),
    }
}

/// Puts raw bytes into a slot.
#[inline]
pub(super) fn write_bytes(payload: &[u8], body: &mut [u8]) -> Result<usize, Rejection> {
    let max = body.len();
    body.get_mut(..payload.len())
        .ok_or(Rejection::TooLarge { max })?
        .copy_from_slice(payload);
    Ok(payload.len())
}

/// Archives a message into a slot. The length is within the slot, whatever the type's `encode`
/// says.
#[inline]
pub(super) fn write_message<T: RingMessage>(
    encoder: &mut MessageEncoder,
    message: &T,
    body: &mut [u8],
) -> Result<usize, Rejection> {
    let max = body.len();
    encoder
        .encode(message, body)
        .map_err(|error| not_written(error, max))
}

/// Why a message could not be archived into a slot with `max` bytes for it.
pub(super) fn not_written(error: CodecError, max: usize) -> Rejection {
    match error {
        CodecError::TooLarge => Rejection::TooLarge { max },
        _ => Rejection::NotEncodable,
    }
}

/// A free slot of a request ring, to be written in place. Dropping it sends nothing.
pub struct SendSlot<'a> {
    reservation: Reservation<'a>,
    link: &'a KernelLink,
    block: usize,
}

impl fmt::Debug for SendSlot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendSlot")
            .field("block", &self.block)
            .finish_non_exhaustive()
    }
}

impl SendSlot<'_> {
    /// All the room there is for the payload: 16-byte aligned, of undefined content. Write it in ascending order and
    /// do not read it: on a GPU it may be write-combined memory.
    #[inline]
    pub fn body_mut(&mut self) -> &mut [u8] {
        self.reservation.body_mut()
    }

    /// Sends the first `length` bytes. Wait-free, like `try_send`.
    ///
    /// # Errors
    /// [`TrySendError::Rejected`] if `length` exceeds the body, [`TrySendError::Unavailable`] if the kernel stopped
    /// taking messages since the slot was reserved; nothing is sent then.
    #[inline]
    pub fn commit(self, length: usize) -> Result<(), TrySendError> {
        self.link.signals.gate.check_send()?;
        self.reservation.commit(length).map_err(refused)?;
        self.link.sent(self.block, 1);
        Ok(())
    }
}

/// Several free slots of one request ring, published with one pass. Dropping it sends nothing.
pub struct SendBatch<'a> {
    batch: Batch<'a>,
    link: &'a KernelLink,
    block: usize,
}

impl fmt::Debug for SendBatch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendBatch")
            .field("block", &self.block)
            .field("room", &self.batch.room())
            .finish_non_exhaustive()
    }
}

/// What staging a message can fail with; the ring's errors become the channel's.
struct StageError(TrySendError);

impl From<PushError> for StageError {
    fn from(error: PushError) -> Self {
        Self(refused(error))
    }
}

impl SendBatch<'_> {
    /// How many more messages can be staged.
    #[inline]
    #[must_use]
    pub fn room(&self) -> usize {
        self.batch.room() as usize
    }

    #[inline]
    pub(super) fn stage(
        &mut self,
        envelope: &Envelope,
        write: impl FnOnce(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), TrySendError> {
        self.batch
            .stage(envelope, |body| {
                write(body).map_err(|rejection| StageError(rejection.into()))
            })
            .map_err(|StageError(error)| error)
    }

    /// Stages a message of raw bytes. It is sent by [`commit`](Self::commit).
    ///
    /// # Errors
    /// [`TrySendError::Full`] if the batch has no room left, [`TrySendError::Rejected`] if the payload exceeds a slot.
    /// What was staged before stays staged.
    #[inline]
    pub fn stage_bytes(&mut self, payload: &[u8]) -> Result<(), TrySendError> {
        self.stage(&Envelope::default(), |body| write_bytes(payload, body))
    }

    /// Sends everything staged, in order, and returns how many. Wait-free.
    ///
    /// # Errors
    /// [`TrySendError::Unavailable`] if the kernel stopped taking messages since the batch was begun; nothing is sent
    /// then.
    #[inline]
    pub fn commit(self) -> Result<usize, TrySendError> {
        self.link.signals.gate.check_send()?;
        let count = self.batch.commit();
        self.link.sent(self.block, count);
        Ok(count as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_spread_evenly_and_stay_within_the_grid() {
        for count in [1, 2, 3, 7, 64] {
            let mut hits = vec![0; count];
            for key in 0..10_000 {
                hits[block_of(key, count)] += 1;
            }
            let mean = 10_000 / count;
            assert!(hits.iter().all(|&hit| hit > mean / 2 && hit < mean * 2));
        }
    }
}
