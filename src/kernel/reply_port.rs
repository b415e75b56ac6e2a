//! The way from a CPU handler back to the callers: the reply ring, with what must happen around each reply.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::control_block::{BlockState, ControlBlock};
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
    pub(crate) producer: Producer,
    pub(crate) control: ControlBlock<'a>,
    /// `None` if none is kept.
    pub(crate) telemetry: Option<&'a TelemetryBuffer>,
    pub(crate) signals: Arc<KernelSignals>,
    pub(crate) block: u32,
    /// Whether this block may sleep at all.
    pub(crate) may_nap: bool,
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
        let mut reservation = self
            .producer
            .reserve_head(head, extension)
            .map_err(too_large)?;
        let length = write(reservation.body_mut())?;
        reservation.commit(length).map_err(too_large)?;
        self.control.store_produced(self.producer.position());
        self.replies += 1;
        self.bytes += length as u64;
        self.signals.reply_written();
        Ok(())
    }

    /// Back-pressure: nothing is dropped, so the block waits until a caller has read.
    #[cold]
    fn wait_for_room(&mut self) -> Result<(), HandlerError> {
        let mut looks = 0_u32;
        let mut paused = false;
        while self.producer.free_slots(1) == 0 {
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
