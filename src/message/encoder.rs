//! The scratch memory of one sender.

use std::mem::MaybeUninit;
use std::sync::Arc;

use super::codec::{CodecError, SCRATCH_BYTES};
use super::ring_message::RingMessage;
use crate::system::memory::{self, MemoryAccount};

/// How much more scratch than a slot's bytes is taken at most. Hash maps need the most: up to eight
/// times.
const MOST_TIMES_THE_SLOT: usize = 16;

/// What a sender archives its messages with: scratch memory as large as a slot, taken at set-up,
/// for types that need more than there is on the stack. A type that needs still more (a hash map of
/// small entries) makes it grow, once.
#[derive(Debug, Default)]
pub(crate) struct MessageEncoder {
    scratch: Vec<MaybeUninit<u8>>,
    /// Where the scratch memory is booked. Without an account there is none.
    account: Option<Arc<dyn MemoryAccount>>,
}

impl MessageEncoder {
    /// An encoder that takes scratch memory once a message needs it.
    pub(crate) fn new(account: Arc<dyn MemoryAccount>) -> Self {
        Self {
            scratch: Vec::new(),
            account: Some(account),
        }
    }

    /// An encoder for slots with this much room for a payload. Without memory for it, it has none
    /// until it is needed.
    pub(crate) fn for_slots_of(bytes: usize, account: Arc<dyn MemoryAccount>) -> Self {
        let mut encoder = Self::new(account);
        encoder.grow_to(Self::bytes_for(bytes));
        encoder
    }

    /// Bytes of scratch memory that an encoder for such slots takes at set-up.
    pub(crate) fn bytes_for(slot: usize) -> usize {
        if slot > SCRATCH_BYTES { slot } else { 0 }
    }

    /// Archives a message at the start of a slot; its length, which is within the slot whatever the
    /// type says.
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

    /// Takes memory, and touches it, so that no message has to fault a page in; whether there was
    /// enough.
    fn grow_to(&mut self, bytes: usize) -> bool {
        let more = bytes.saturating_sub(self.scratch.len());
        let Some(account) = &self.account else {
            return more == 0;
        };
        if more == 0 {
            return true;
        }
        if !account.take(more as u64) {
            return false;
        }
        // Until it is written to.
        let grant = memory::ask(more as u64);
        let is_there = grant.is_ok() && self.scratch.try_reserve_exact(more).is_ok();
        if is_there {
            self.scratch.resize(bytes, MaybeUninit::new(0));
        } else {
            account.give_back(more as u64);
        }
        is_there
    }
}

impl Drop for MessageEncoder {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.give_back(self.scratch.len() as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rkyv::{Archive, Deserialize, Serialize};

    use super::*;
    use crate::message::AlignedBytes;

    #[derive(Archive, Serialize, Deserialize)]
    struct Prices {
        by_name: HashMap<u32, u8>,
    }
    crate::ring_message!(Prices, "test.encoder.Prices");

    #[derive(Debug, Default)]
    struct Limited {
        used: AtomicU64,
        limit: u64,
    }

    impl MemoryAccount for Limited {
        fn take(&self, bytes: u64) -> bool {
            let used = self.used.load(Ordering::Relaxed) + bytes;
            let is_within = used <= self.limit;
            if is_within {
                self.used.store(used, Ordering::Relaxed);
            }
            is_within
        }

        fn give_back(&self, bytes: u64) {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    fn account(limit: u64) -> Arc<Limited> {
        Arc::new(Limited {
            limit,
            ..Limited::default()
        })
    }

    #[test]
    fn scratch_memory_is_booked_and_may_be_refused() {
        let prices = Prices {
            by_name: (0..1000).map(|name| (name, 1)).collect(),
        };
        let mut slot = AlignedBytes::try_zeroed(16 << 10).unwrap();
        let used = |account: &Arc<Limited>| account.used.load(Ordering::Relaxed);
        let small = account(1 << 20);
        let mut encoder = MessageEncoder::for_slots_of(SCRATCH_BYTES, small.clone());
        assert_eq!(used(&small), 0);
        // It grows, once.
        assert!(encoder.encode(&prices, &mut slot).is_ok());
        let grown = used(&small);
        assert!(grown > SCRATCH_BYTES as u64);
        assert!(encoder.encode(&prices, &mut slot).is_ok());
        assert_eq!(used(&small), grown);
        drop(encoder);
        assert_eq!(used(&small), 0);
        // What the account refuses is not taken, and the message is refused instead.
        let none = account(100);
        let mut encoder = MessageEncoder::for_slots_of(slot.len(), none.clone());
        assert_eq!(used(&none), 0);
        assert_eq!(encoder.encode(&prices, &mut slot), Err(CodecError::Scratch));
        assert_eq!(used(&none), 0);
    }
}
