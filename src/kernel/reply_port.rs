//! The way from a CPU handler back to the callers: the reply ring, with what must happen around each reply.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::control_block::{BlockState, ControlBlock};
use super::outlet::Outlet;
use super::signals::KernelSignals;
use super::telemetry::TelemetryBuffer;
use crate::error::HandlerError;
use crate::message::{Extension, Head};
use crate::ring::{Producer, PushError};

/// Empty looks at a full reply ring before the block sleeps between them. Nobody reads then, so nobody waits.
const LOOKS_BEFORE_NAP: u32 = 4096;

/// How long it sleeps between two looks.
const NAP: Duration = Duration::from_micros(200);

/// One block's replies. Not for other threads.
pub(crate) struct ReplyPort<'a> {
    /// Of the block's own reply ring; while there is an outlet, of the request ring behind it.
    pub(crate) producer: Producer,
    /// Where replies go instead of to callers. Holds the end of the own reply ring meanwhile.
    pub(crate) outlet: Option<Box<Outlet>>,
    pub(crate) control: ControlBlock<'a>,
    /// `None` if none is kept.
    pub(crate) telemetry: Option<&'a TelemetryBuffer>,
    pub(crate) signals: Arc<KernelSignals>,
    pub(crate) block: u32,
    /// Whether this block may sleep at all.
    pub(crate) may_nap: bool,
    /// Position up to which replies have been written, modulo 2^32, wherever they went.
    pub(crate) produced: u32,
    /// Replies written and their payload bytes.
    pub(crate) replies: u64,
    pub(crate) bytes: u64,
}

impl fmt::Debug for ReplyPort<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplyPort")
            .field("producer", &self.producer)
            .field("replies", &self.replies)
            .finish_non_exhaustive()
    }
}

impl ReplyPort<'_> {
    /// Writes one reply in place. Waits while the reply ring is full, until the kernel ends.
    #[inline]
    pub(crate) fn reply(
        &mut self,
        head: Head,
        extension: Option<&Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, HandlerError>,
    ) -> Result<(), HandlerError> {
        if self.producer.free_slots(1) == 0 {
            self.wait_for_room()?;
        }
        if self.outlet.is_some() {
            return self.pass_on(head, extension, write);
        }
        let mut reservation = self
            .producer
            .reserve_head(head, extension)
            .map_err(too_large)?;
        let length = write(reservation.body_mut())?;
        reservation.commit(length).map_err(too_large)?;
        self.count(length);
        self.signals.reply_written();
        Ok(())
    }

    #[inline]
    fn count(&mut self, length: usize) {
        self.produced = self.produced.wrapping_add(1);
        self.control.store_produced(self.produced);
        self.replies += 1;
        self.bytes += length as u64;
    }

    /// Writes one reply in place into the next kernel's request ring, which has room.
    #[inline(never)]
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
        let mut looks = 0_u32;
        let mut paused = false;
        while self.producer.free_slots(1) == 0 {
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
        std::mem::swap(&mut self.producer, &mut outlet.producer);
        Some(outlet)
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
