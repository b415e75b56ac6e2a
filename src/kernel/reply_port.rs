//! The way from a CPU handler back to the callers: the reply ring, with what must happen around each reply.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::control_block::{BlockState, ControlBlock};
use super::dead_letters::{DeadLetterReason, Lost};
use super::outlet::Outlet;
use super::signals::KernelSignals;
use super::telemetry::TelemetryBuffer;
use crate::error::HandlerError;
use crate::message::{AlignedBytes, Extension, Head, MessageEncoder, MessageHeader};
use crate::ring::{Producer, PushError};
use crate::system::memory::MemoryAccount;

/// Empty looks at a full reply ring before the block sleeps between them. Nobody reads then, so nobody waits.
const LOOKS_BEFORE_NAP: u32 = 4096;

/// How long it sleeps between two looks.
const NAP: Duration = Duration::from_micros(200);

/// One block's replies. Not for other threads.
pub(crate) struct ReplyPort<'a> {
    /// Of the block's own reply ring; while there is an outlet, of the request ring behind it.
    producer: Producer,
    /// Where replies go instead of to callers. Holds the end of the own reply ring meanwhile.
    outlet: Option<Box<Outlet>>,
    /// Whether another block's thread runs this one: it must not wait here.
    hosted: bool,
    /// Whether there is no outlet, and nobody's thread but the block's own.
    plain: bool,
    /// Replies that a hosted block had no room for, in order.
    spilled: VecDeque<Spilled>,
    /// Where their memory is booked.
    account: Arc<dyn MemoryAccount>,
    pub(crate) control: ControlBlock<'a>,
    /// `None` if none is kept.
    pub(crate) telemetry: Option<&'a TelemetryBuffer>,
    pub(crate) signals: Arc<KernelSignals>,
    pub(crate) block: u32,
    /// Whether this block may sleep at all.
    may_nap: bool,
    /// Position up to which replies have been written, modulo 2^32, wherever they went.
    produced: u32,
    /// A quarter of the own reply ring less one: so often it is asked whether replies are to be routed to lanes although nobody waits for them.
    due_mask: u32,
    /// Replies written and their payload bytes.
    pub(crate) replies: u64,
    pub(crate) bytes: u64,
    /// For replies of types that need scratch memory.
    pub(crate) encoder: MessageEncoder,
}

/// A reply that is still to be written.
struct Spilled {
    account: Arc<dyn MemoryAccount>,
    head: Head,
    extension: Option<Extension>,
    /// As aligned as a slot, for the handler that reads it.
    payload: AlignedBytes,
    length: usize,
}

impl Drop for Spilled {
    fn drop(&mut self) {
        self.account.give_back(self.payload.len() as u64);
    }
}

impl Spilled {
    /// Room for so many bytes; `None` if there is no memory for it.
    fn new(
        account: &Arc<dyn MemoryAccount>,
        head: Head,
        extension: Option<&Extension>,
        bytes: usize,
    ) -> Option<Self> {
        let payload = AlignedBytes::try_zeroed(bytes)?;
        account.take(payload.len() as u64).then(|| Self {
            account: Arc::clone(account),
            head,
            extension: extension.copied(),
            payload,
            length: 0,
        })
    }

    fn payload(&self) -> &[u8] {
        let payload = &*self.payload;
        payload.get(..self.length).unwrap_or(payload)
    }
}

impl fmt::Debug for ReplyPort<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyPort")
            .field("producer", &self.producer)
            .field("replies", &self.replies)
            .finish_non_exhaustive()
    }
}

impl<'a> ReplyPort<'a> {
    pub(crate) fn new(
        producer: Producer,
        control: ControlBlock<'a>,
        telemetry: Option<&'a TelemetryBuffer>,
        signals: Arc<KernelSignals>,
        block: u32,
        may_nap: bool,
        account: Arc<dyn MemoryAccount>,
    ) -> Self {
        Self {
            produced: producer.position(),
            due_mask: (producer.layout().capacity() / 4).max(1) - 1,
            producer,
            outlet: None,
            hosted: false,
            plain: true,
            spilled: VecDeque::new(),
            account,
            control,
            telemetry,
            signals,
            block,
            may_nap,
            replies: 0,
            bytes: 0,
            encoder: MessageEncoder::default(),
        }
    }

    /// Takes scratch memory for typed replies.
    pub(crate) fn prepare_encoder(&mut self) {
        let bytes = self.producer.layout().max_payload();
        self.encoder = MessageEncoder::for_slots_of(bytes, Arc::clone(&self.account));
    }

    /// Writes one reply in place. Waits while the reply ring is full, until the kernel ends.
    #[inline]
    pub(crate) fn reply(
        &mut self,
        head: Head,
        extension: Option<&Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, HandlerError>,
    ) -> Result<(), HandlerError> {
        if !self.plain {
            return self.reply_elsewhere(head, extension, write);
        }
        if self.producer.free_slots(1) == 0 {
            self.wait_for_room()?;
        }
        self.write(head, extension, write)
    }

    /// As `reply`, through an outlet or on another block's thread.
    #[inline(never)]
    fn reply_elsewhere(
        &mut self,
        head: Head,
        extension: Option<&Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, HandlerError>,
    ) -> Result<(), HandlerError> {
        let full = self.producer.free_slots(1) == 0;
        if self.hosted && (full || !self.spilled.is_empty()) {
            return self.spill(head, extension, write);
        }
        if full {
            self.wait_for_room()?;
        }
        if self.outlet.is_some() {
            return self.pass_on(head, extension, write);
        }
        self.write(head, extension, write)
    }

    /// Writes one reply in place into the own ring, which has room.
    #[inline]
    fn write(
        &mut self,
        head: Head,
        extension: Option<&Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, HandlerError>,
    ) -> Result<(), HandlerError> {
        let mut reservation = self
            .producer
            .reserve_head(head, extension)
            .map_err(too_large)?;
        let length = write(reservation.body_mut())?;
        reservation.commit(length).map_err(too_large)?;
        self.count(length);
        let is_due = self.produced & self.due_mask == 0 && self.is_half_full();
        self.signals.reply_written(is_due);
        Ok(())
    }

    /// Whether nobody seems to fetch replies. Who does so gives slots back by the quarter ring.
    #[cold]
    fn is_half_full(&mut self) -> bool {
        let capacity = self.producer.layout().capacity();
        let unread = capacity - self.producer.free_slots(capacity);
        2 * unread >= capacity
    }

    #[inline]
    fn count(&mut self, length: usize) {
        self.produced = self.produced.wrapping_add(1);
        self.control.store_produced(self.produced);
        self.replies += 1;
        self.bytes += length as u64;
    }

    /// Takes back what `count` did, unseen by other threads: the reply is just about to be counted
    /// again.
    fn uncount(&mut self, length: usize) {
        self.produced = self.produced.wrapping_sub(1);
        self.replies -= 1;
        self.bytes -= length as u64;
    }

    /// Writes one reply in place into the next kernel's request ring, which has room.
    #[inline]
    fn pass_on(
        &mut self,
        head: Head,
        extension: Option<&Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, HandlerError>,
    ) -> Result<(), HandlerError> {
        let Some(outlet) = &mut self.outlet else {
            return Ok(());
        };
        let translated = outlet.translate(head)?;
        let mut reservation = self
            .producer
            .reserve_head(translated, extension)
            .map_err(too_large)?;
        let length = write(reservation.body_mut())?;
        let is_open = outlet.enter();
        let committed = if is_open {
            reservation.commit(length).map_err(too_large)
        } else {
            Ok(())
        };
        outlet.leave(is_open && committed.is_ok());
        if !is_open {
            return self.keep(head, translated, extension, length);
        }
        committed?;
        self.count(length);
        Ok(())
    }

    /// Writes a reply to the own ring that lies unpublished in the ring of a kernel that has ended.
    #[cold]
    fn keep(
        &mut self,
        head: Head,
        translated: Head,
        extension: Option<&Extension>,
        length: usize,
    ) -> Result<(), HandlerError> {
        let Some(mut outlet) = self.disconnect() else {
            return Ok(());
        };
        let outcome = self.copy_from(&mut outlet.producer, head, translated, extension, length);
        self.signals.outlet.bring_back(outlet);
        outcome
    }

    fn copy_from(
        &mut self,
        other: &mut Producer,
        head: Head,
        translated: Head,
        extension: Option<&Extension>,
        length: usize,
    ) -> Result<(), HandlerError> {
        // Nobody wrote to it since: it is the slot that was reserved and not published.
        let mut written = other
            .reserve_head(translated, extension)
            .map_err(too_large)?;
        let payload = written.body_mut().get(..length);
        self.reply(head, extension, |body| {
            match payload.and_then(|payload| Some((body.get_mut(..length)?, payload))) {
                Some((body, payload)) => {
                    body.copy_from_slice(payload);
                    Ok(length)
                }
                None => Err(too_large(PushError::TooLong {
                    length,
                    max: body.len(),
                })),
            }
        })
    }

    /// Back-pressure: nothing is dropped, so the block waits until a caller has read.
    #[cold]
    fn wait_for_room(&mut self) -> Result<(), HandlerError> {
        self.signals.outlet.set_in_handler(true);
        let waited = self.wait_until_room();
        self.signals.outlet.set_in_handler(false);
        waited
    }

    fn wait_until_room(&mut self) -> Result<(), HandlerError> {
        let mut looks = 0_u32;
        let mut paused = false;
        while self.producer.free_slots(1) == 0 {
            self.run_guest();
            if self.outlet.is_some() && self.leave_if_over(paused) {
                continue;
            }
            if self.control.must_terminate() {
                return Err(HandlerError::new(HandlerError::ENDING, "kernel is ending"));
            }
            // A deactivation must be acknowledged here too: there may never be room.
            if self.control.is_active() == paused {
                paused = !paused;
                self.control.store_state(if paused {
                    BlockState::Idle
                } else {
                    BlockState::Polling
                });
            }
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(64) {
                self.control.beat();
            }
            if looks.is_multiple_of(LOOKS_BEFORE_NAP) {
                self.show_life();
            }
            if self.may_nap && looks > LOOKS_BEFORE_NAP {
                self.show_life();
                if let Some(work) = self.signals.work.get(self.block as usize) {
                    work.prepare().wait(NAP);
                }
            } else {
                std::hint::spin_loop();
            }
        }
        if paused {
            self.control.store_state(BlockState::Polling);
        }
        Ok(())
    }
}

impl ReplyPort<'_> {
    /// Takes the outlet that waits for this block, or brings back the one that it has if that is wanted, or of no use any
    /// more. To be called between messages.
    pub(crate) fn exchange(&mut self) {
        if self.outlet.is_some() {
            self.leave_if_over(true);
        } else if let Some(mut outlet) = self.signals.outlet.take() {
            std::mem::swap(&mut self.producer, &mut outlet.producer);
            self.outlet = Some(outlet);
            self.plain = false;
        }
    }

    /// Whether `exchange` would do anything.
    pub(crate) fn wants_exchange(&self) -> bool {
        match &self.outlet {
            Some(outlet) => outlet.is_over() || self.signals.outlet.is_recalled(),
            None => self.signals.outlet.is_offered(),
        }
    }

    /// Brings the outlet back, if there is one. To be called when the block ends.
    pub(crate) fn close(&mut self) {
        if let Some(outlet) = self.disconnect() {
            self.signals.outlet.bring_back(outlet);
        }
    }

    /// Brings the outlet back if the kernel behind it has ended, or if it is `idle` and the outlet is recalled.
    fn leave_if_over(&mut self, idle: bool) -> bool {
        let over = self.outlet.as_ref().is_some_and(|outlet| outlet.is_over())
            || (idle && self.signals.outlet.is_recalled());
        if over {
            self.close();
        }
        over
    }

    /// Writes to the own reply ring from now on.
    fn disconnect(&mut self) -> Option<Box<Outlet>> {
        let mut outlet = self.outlet.take()?;
        if let Some(guest) = &outlet.guest {
            guest.host(false);
        }
        self.plain = !self.hosted;
        std::mem::swap(&mut self.producer, &mut outlet.producer);
        Some(outlet)
    }

    /// Whether this block's thread runs the next block from now on, if that is how they are connected.
    pub(crate) fn host_guest(&self, hosting: bool) {
        if let Some(guest) = self
            .outlet
            .as_ref()
            .and_then(|outlet| outlet.guest.as_ref())
        {
            guest.host(hosting);
        }
    }

    /// Lets the next block handle a request if this thread runs it.
    #[inline]
    pub(crate) fn run_guest(&mut self) {
        if let Some(outlet) = &mut self.outlet {
            outlet.run_guest();
        }
    }

    /// Whether the next block may have something to do on this thread.
    pub(crate) fn has_guest_work(&self) -> bool {
        self.outlet
            .as_ref()
            .is_some_and(|outlet| outlet.pending && outlet.guest.is_some())
    }

    /// Sleeps for a moment, unless the next block is woken otherwise.
    pub(crate) fn nap(&self) {
        if let Some(work) = self.signals.work.get(self.block as usize) {
            work.prepare().wait(NAP);
        }
    }

    /// Another block's thread runs this one, until it says otherwise. Whether there is room for a reply.
    pub(crate) fn set_hosted(&mut self, hosted: bool) {
        self.hosted = hosted;
        self.plain = !hosted && self.outlet.is_none();
    }

    /// Whether a request can be handled without replies piling up: writes those that have, as far as there is room.
    pub(crate) fn has_room(&mut self) -> bool {
        while !self.spilled.is_empty() && self.producer.free_slots(1) > 0 {
            self.unspill();
        }
        if self.producer.free_slots(1) == 0 && self.outlet.is_some() {
            self.leave_if_over(false);
        }
        self.spilled.is_empty() && self.producer.free_slots(1) > 0
    }

    /// Writes every reply that had no room, on the block's own thread; waits for it if need be.
    #[inline]
    pub(crate) fn write_spilled(&mut self) {
        while !self.spilled.is_empty() {
            self.unspill();
        }
    }

    /// Writes the first of the replies that had no room.
    #[cold]
    fn unspill(&mut self) {
        let Some(spilled) = self.spilled.pop_front() else {
            return;
        };
        let payload = spilled.payload();
        let hosted = std::mem::replace(&mut self.hosted, false);
        // It counts since it was taken; writing it counts it once more.
        self.uncount(payload.len());
        let written = self.reply_elsewhere(spilled.head, spilled.extension.as_ref(), |body| {
            let body = body
                .get_mut(..payload.len())
                .ok_or_else(|| HandlerError::new(HandlerError::REPLY_TOO_LARGE, ""))?;
            body.copy_from_slice(payload);
            Ok(payload.len())
        });
        self.hosted = hosted;
        if let Err(refused) = written {
            self.count(payload.len());
            self.lose(
                &spilled,
                match refused.code {
                    HandlerError::ENDING => DeadLetterReason::Shutdown,
                    // The ring that it goes to now has other slots or types than the one that it
                    // was written for.
                    _ => DeadLetterReason::Mismatch,
                },
            );
        }
    }

    /// Writes the replies that had no room as far as there is some, and gives the others up. To be
    /// called when the block ends.
    pub(crate) fn give_spilled_up(&mut self) {
        if self.spilled.is_empty() || self.has_room() {
            return;
        }
        while let Some(spilled) = self.spilled.pop_front() {
            self.lose(&spilled, DeadLetterReason::Shutdown);
        }
    }

    #[cold]
    fn lose(&self, spilled: &Spilled, reason: DeadLetterReason) {
        let payload = spilled.payload();
        let head = spilled.head;
        let header = [
            0,
            head.correlation,
            head.length_flags(payload.len()),
            head.kind_lane,
        ];
        self.signals.dead_letters.reply(
            reason,
            &Lost {
                block: Some(self.block),
                header: Some(MessageHeader::from_words(header)),
                extension: spilled.extension,
                payload,
                ..Lost::default()
            },
        );
    }

    /// Keeps a reply that there is no room for.
    #[cold]
    fn spill(
        &mut self,
        head: Head,
        extension: Option<&Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, HandlerError>,
    ) -> Result<(), HandlerError> {
        if let Some(outlet) = &mut self.outlet {
            outlet.translate(head)?;
        }
        let max = self.producer.layout().max_payload() - head.extension_bytes();
        let spilled = Spilled::new(&self.account, head, extension, max);
        let mut spilled = spilled
            .filter(|_| self.spilled.try_reserve(1).is_ok())
            .ok_or_else(|| {
                HandlerError::new(HandlerError::OUT_OF_MEMORY, "no memory for the reply")
            })?;
        let length = write(&mut spilled.payload[..max])?;
        if length > max {
            return Err(too_large(PushError::TooLong { length, max }));
        }
        spilled.length = length;
        self.spilled.push_back(spilled);
        // The handler is told that it is taken.
        self.count(length);
        Ok(())
    }

    /// A sign of life outside the message path.
    pub(crate) fn show_life(&self) {
        self.control.beat();
        if let Some(telemetry) = self.telemetry {
            telemetry.show_life();
        }
    }
}

fn too_large(error: PushError) -> HandlerError {
    match error {
        PushError::TooLong { .. } => {
            HandlerError::new(HandlerError::REPLY_TOO_LARGE, "reply exceeds the slot")
        }
        PushError::Full => HandlerError::new(HandlerError::ENDING, "reply ring is full"),
    }
}
