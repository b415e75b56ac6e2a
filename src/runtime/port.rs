//! A kernel's rings in the hands of the bridge.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::calls::CALL_BIT;
use super::instance::KernelInstance;
use super::receive::ReceiveSide;
use super::send::{Route, SendSide};
use crate::bridge::Port;
use crate::error::{TrySendError, Unavailable};
use crate::kernel::{DeadLetterReason, KernelState, Lost};
use crate::message::{Extension, Head, MessageHeader};

/// Both sides of a kernel. They go back to its handles when this is dropped, or when there are no clients any more.
pub(super) struct KernelPort {
    instance: Arc<KernelInstance>,
    /// `None` once they have been put back.
    sides: Option<(SendSide, ReceiveSide)>,
    /// Signs of life as they were at the last look.
    heartbeats: AtomicU32,
}

impl fmt::Debug for KernelPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KernelPort").field(&self.instance).finish()
    }
}

impl KernelPort {
    pub(super) fn new(instance: Arc<KernelInstance>, send: SendSide, receive: ReceiveSide) -> Self {
        Self {
            instance,
            sides: Some((send, receive)),
            heartbeats: AtomicU32::new(0),
        }
    }

    fn lost(&self, block: usize) -> Option<Lost<'_>> {
        let (_, receive) = self.sides.as_ref()?;
        Some(receive.lost(&self.instance, block))
    }
}

impl Port for KernelPort {
    fn blocks(&self) -> usize {
        self.instance.blocks.len()
    }

    #[inline]
    fn processed(&self, block: usize) -> u32 {
        self.instance.blocks[block].control().processed()
    }

    #[inline]
    fn is_active(&self) -> bool {
        self.instance.signals.gate.state() == KernelState::Active && self.sides.is_some()
    }

    fn has_ended(&self) -> bool {
        self.instance.signals.gate.check_receive().is_err()
    }

    fn has_room(&mut self) -> bool {
        let Some((send, _)) = &mut self.sides else {
            return false;
        };
        let has_room = send.has_room();
        if !has_room {
            // It may be a kernel's bad cursor that says so: that fails the kernel.
            let _ = send.full(&self.instance);
        }
        has_room
    }

    #[inline]
    fn send<E>(
        &mut self,
        route: u16,
        head: Head,
        extension: Option<Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(usize, u32), TrySendError>
    where
        TrySendError: From<E>,
    {
        match &mut self.sides {
            Some((send, _)) => send.put(
                &self.instance,
                Route::of_lane(route),
                head,
                extension,
                write,
            ),
            None => Err(TrySendError::Unavailable(Unavailable::Split)),
        }
    }

    #[inline]
    fn next_reply(&mut self, polls: u32) -> Option<usize> {
        let (_, receive) = self.sides.as_mut()?;
        receive.next_reply_spinning(&self.instance, polls)
    }

    #[inline]
    fn reply(&self, block: usize) -> (&MessageHeader, Option<Extension>, &[u8]) {
        match &self.sides {
            Some((_, receive)) => {
                let reply = receive.reply(block);
                (reply.header(), reply.extension(), reply.payload())
            }
            // `next_reply` finds none without sides.
            None => (&NOTHING, None, &[]),
        }
    }

    #[inline]
    fn release(&mut self, block: usize) {
        if let Some((_, receive)) = &mut self.sides {
            receive.release_reply(block);
        }
    }

    fn put_aside(&mut self, block: usize) {
        let Some((_, receive)) = &mut self.sides else {
            return;
        };
        let header = *receive.reply(block).header();
        if header.correlation() & CALL_BIT != 0 {
            receive.hand_over(&self.instance, block, &header);
        } else {
            receive.put_aside(&self.instance, block, &header);
        }
    }

    fn put_back(&mut self) {
        if let Some((send, receive)) = self.sides.take() {
            let lanes = &self.instance.signals.lanes;
            lanes.in_use.store(false, Ordering::SeqCst);
            *self.instance.send.lock() = Some(send);
            *self.instance.receive.lock() = Some(receive);
            self.instance.receiver_split.store(false, Ordering::Release);
        }
    }

    fn sample(&self, now_ns: u64) {
        let heartbeats = self.instance.blocks.iter().fold(0_u32, |sum, block| {
            sum.wrapping_add(block.control().heartbeat())
        });
        if self.heartbeats.swap(heartbeats, Ordering::Relaxed) != heartbeats {
            let signals = &self.instance.signals;
            signals.alive_at_ns.fetch_max(now_ns, Ordering::Relaxed);
        }
    }

    #[cold]
    fn lose_reply(&self, block: usize, reason: DeadLetterReason) {
        if let Some(lost) = self.lost(block) {
            self.instance.signals.dead_letters.reply(reason, &lost);
        }
    }

    #[cold]
    fn lose_request(
        &self,
        reason: DeadLetterReason,
        header: &MessageHeader,
        extension: Option<Extension>,
        payload: &[u8],
    ) {
        let lost = self.instance.lost(header, extension, payload);
        self.instance.signals.dead_letters.request(reason, &lost);
    }

    #[cold]
    fn return_request(
        &self,
        lane: u16,
        header: &MessageHeader,
        extension: Option<Extension>,
        payload: &[u8],
    ) {
        self.instance.give_lane_request_back(&Lost {
            // Unless it may go to any.
            block: u32::from(header.lane()).checked_sub(1),
            header: Some(header.on_lane(lane)),
            extension,
            type_id: None,
            payload,
        });
    }

    fn has_reply(&mut self) -> bool {
        self.sides
            .as_mut()
            .is_some_and(|(_, receive)| receive.has_reply())
    }

    fn is_unwatched(&self) -> bool {
        self.instance.signals.lanes.watch.is_unwatched()
    }

    fn next_generation(&self) -> u16 {
        self.instance.lanes.next_generation()
    }

    fn use_lanes(&self) {
        let signals = &self.instance.signals;
        signals.lanes.in_use.store(true, Ordering::SeqCst);
        // Whoever sleeps for the kernel's own sign will not get one any more.
        signals.replied.notify();
    }
}

/// The header of no message.
const NOTHING: MessageHeader = MessageHeader::from_words([0; 4]);

impl Drop for KernelPort {
    fn drop(&mut self) {
        self.put_back();
    }
}
