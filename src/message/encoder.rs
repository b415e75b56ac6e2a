//! The scratch memory of one sender.

use core::mem::MaybeUninit;

use super::codec::{CodecError, SCRATCH_BYTES};
use super::ring_message::RingMessage;

/// How much more scratch than a slot's bytes is taken at most. Hash maps need the most: up to eight times.
const MOST_TIMES_THE_SLOT: usize = 16;

/// What a sender archives its messages with: scratch memory as large as a slot, taken at set-up, for types that need
/// more than there is on the stack. A type that needs still more (a hash map of small entries) makes it grow, once.
#[derive(Debug, Default)]
pub(crate) struct MessageEncoder {
    scratch: Vec<MaybeUninit<u8>>,
}

impl MessageEncoder {
    /// An encoder for slots with this much room for a payload. Without memory for it, it has none until it is needed.
    pub(crate) fn for_slots_of(bytes: usize) -> Self {
        let mut encoder = Self::default();
        if bytes > SCRATCH_BYTES {
            encoder.grow_to(bytes);
        }
        encoder
    }

    /// Archives a message at the start of a slot; its length, which is within the slot whatever the type says.
    #[inline]
    pub(crate) fn encode<T: RingMessage>(
        &mut self,
        message: &T,
        slot: &mut [u8],
    ) -> Result<usize, CodecError> {
        match message.encode(slot) {
            Ok(length) if length <= slot.len() => Ok(length),
            Err(CodecError::Scratch) => self.encode_with_scratch(message, slot),
            Ok(_) => Err(CodecError::TooLarge),
            Err(error) => Err(error),
        }
    }

    #[cold]
    fn encode_with_scratch<T: RingMessage>(
        &mut self,
        message: &T,
        slot: &mut [u8],
    ) -> Result<usize, CodecError> {
        let most = slot
            .len()
            .max(SCRATCH_BYTES)
            .saturating_mul(MOST_TIMES_THE_SLOT);
        loop {
            match message.encode_with(slot, &mut self.scratch) {
                Ok(length) if length <= slot.len() => return Ok(length),
                Err(CodecError::Scratch) => {}
                Ok(_) => return Err(CodecError::TooLarge),
                Err(error) => return Err(error),
            }
            let more = (2 * self.scratch.len()).max(4 * SCRATCH_BYTES);
            if self.scratch.len() >= most || !self.grow_to(more.min(most)) {
                return Err(CodecError::Scratch);
            }
        }
    }

    /// Takes memory, and touches it, so that no message has to fault a page in; whether there was enough.
    fn grow_to(&mut self, bytes: usize) -> bool {
        let more = bytes.saturating_sub(self.scratch.len());
        let is_there = self.scratch.try_reserve_exact(more).is_ok();
        if is_there {
            self.scratch.resize(bytes, MaybeUninit::new(0));
        }
        is_there
    }
}
