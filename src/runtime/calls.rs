//! Calls that wait for their reply, found by the correlation in it.

use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::backend::{Booked, HostPool};
use crate::error::Error;
use crate::message::codec::MAX_ALIGNMENT;
use crate::message::{AlignedBytes, MessageHeader};

/// Correlations with this bit belong to calls; those below it to the users of endpoints.
pub(super) const CALL_BIT: u32 = 1 << 31;

/// Low bits of a call's correlation: its slot. Those between are the slot's generation.
const INDEX_BITS: u32 = 8;

/// Most slots that the index has room for.
pub(super) const MAX_CALLS: usize = 255;

const FREE: u32 = 0;
const PENDING: u32 = 1;
const FILLING: u32 = 2;
const DONE: u32 = 3;

/// A fixed number of slots, one for each call that may be pending.
#[derive(Debug)]
pub(super) struct CallTable {
    slots: Box<[CallSlot]>,
    /// Where the last search for a free slot ended.
    hint: AtomicU32,
}

#[derive(Debug)]
struct CallSlot {
    state: AtomicU32,
    /// Counts uses, so that a late reply to an earlier call is told apart. 23 bits of it travel.
    generation: AtomicU32,
    /// Never contended: the state says whose turn it is.
    reply: Mutex<StoredReply>,
}

/// A reply that another thread took out of the ring.
#[derive(Debug)]
struct StoredReply {
    header: MessageHeader,
    payload: Booked<AlignedBytes>,
}

/// A call's own slot; free again when dropped.
#[derive(Debug)]
pub(super) struct PendingCall<'a> {
    slot: &'a CallSlot,
    pub(super) correlation: u32,
    /// No reply can be stored any more.
    given_up: bool,
}

impl CallTable {
    /// Room for `calls` at once, each with a reply of up to `payload` bytes.
    pub(super) fn new(pool: &HostPool, calls: usize, payload: usize) -> Result<Self, Error> {
        let mut slots = Vec::new();
        for _ in 0..calls.min(MAX_CALLS) {
            slots.push(CallSlot {
                state: AtomicU32::new(FREE),
                generation: AtomicU32::new(0),
                reply: Mutex::new(StoredReply {
                    header: MessageHeader::from_words([0; 4]),
                    payload: pool.payload(payload)?,
                }),
            });
        }
        Ok(Self {
            slots: slots.into_boxed_slice(),
            hint: AtomicU32::new(0),
        })
    }

    /// Bytes that the buffers of such a table take.
    pub(super) fn bytes(calls: usize, payload: usize) -> u64 {
        calls as u64 * payload.next_multiple_of(MAX_ALIGNMENT) as u64
    }

    /// Whether any call waits for its reply.
    pub(super) fn any_pending(&self) -> bool {
        self.slots
            .iter()
            .any(|slot| slot.state.load(Ordering::Acquire) != FREE)
    }

    /// A slot for a new call; `None` if all are taken. Lock-free.
    #[inline]
    pub(super) fn begin(&self) -> Option<PendingCall<'_>> {
        let count = self.slots.len();
        let hint = self.hint.load(Ordering::Relaxed) as usize;
        for offset in 0..count {
            let index = (hint + offset) % count;
            let slot = &self.slots[index];
            if slot.state.load(Ordering::Relaxed) == FREE
                && slot
                    .state
                    .compare_exchange(FREE, PENDING, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                if offset > 0 {
                    self.hint.store(index as u32, Ordering::Relaxed);
                }
                let generation = slot.generation.load(Ordering::Relaxed);
                return Some(PendingCall {
                    slot,
                    correlation: correlation(index, generation),
                    given_up: false,
                });
            }
        }
        None
    }

    /// Stores a reply for the call that waits for it; false if there is none (any more).
    pub(super) fn deliver(&self, header: MessageHeader, payload: &[u8]) -> bool {
        let index = (header.correlation() & ((1 << INDEX_BITS) - 1)) as usize;
        let Some(slot) = self.slots.get(index) else {
            return false;
        };
        let generation = slot.generation.load(Ordering::Acquire);
        if correlation(index, generation) != header.correlation()
            || slot
                .state
                .compare_exchange(PENDING, FILLING, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
        {
            return false;
        }
        // The slot may have been freed and taken again between the two checks above.
        if correlation(index, slot.generation.load(Ordering::Acquire)) != header.correlation() {
            slot.state.store(PENDING, Ordering::Release);
            return false;
        }
        {
            let mut reply = slot.reply.lock();
            reply.header = header;
            // Never shorter than the payload: both are sized by the reply ring's slots.
            for (stored, byte) in reply.payload.iter_mut().zip(payload) {
                *stored = *byte;
            }
        }
        slot.state.store(DONE, Ordering::Release);
        true
    }
}

impl PendingCall<'_> {
    /// Whether the reply has been stored.
    #[inline]
    pub(super) fn is_done(&self) -> bool {
        self.slot.state.load(Ordering::Acquire) == DONE
    }

    /// Hands the stored reply to `read`, if it is there.
    pub(super) fn take<R>(&self, read: impl FnOnce(&MessageHeader, &[u8]) -> R) -> Option<R> {
        if !self.is_done() {
            return None;
        }
        let reply = self.slot.reply.lock();
        let stored = &*reply.payload;
        let payload = stored.get(..reply.header.length()).unwrap_or(stored);
        Some(read(&reply.header, payload))
    }

    /// Gives the call up, so that no reply is stored any more. False if one just was: take it.
    pub(super) fn give_up(&mut self) -> bool {
        let mut spins = 0_u32;
        while !self.given_up {
            match self.slot.state.compare_exchange(
                PENDING,
                FILLING,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => self.given_up = true,
                Err(DONE) => return false,
                // Another thread copies the reply right now: nanoseconds, unless it was preempted doing so.
                Err(_) if spins < 1000 => std::hint::spin_loop(),
                Err(_) => std::thread::yield_now(),
            }
            spins = spins.saturating_add(1);
        }
        true
    }
}

impl Drop for PendingCall<'_> {
    fn drop(&mut self) {
        // Whatever the answer, nobody touches the slot any more: it is given up or done.
        let _ = self.give_up();
        self.slot.generation.fetch_add(1, Ordering::AcqRel);
        self.slot.state.store(FREE, Ordering::Release);
    }
}

#[inline]
fn correlation(index: usize, generation: u32) -> u32 {
    CALL_BIT | ((generation << INDEX_BITS) & !CALL_BIT) | index as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> HostPool {
        HostPool::unlimited()
    }

    fn reply_to(correlation: u32, length: usize) -> MessageHeader {
        MessageHeader::from_words([0, correlation, length as u32, 0])
    }

    #[test]
    fn a_reply_reaches_its_call_and_no_other() {
        let table = CallTable::new(&pool(), 2, 8).unwrap();
        let (one, two) = (table.begin().unwrap(), table.begin().unwrap());
        assert!(table.begin().is_none());
        assert!(table.deliver(reply_to(two.correlation, 3), b"two"));
        assert!(!table.deliver(reply_to(two.correlation, 3), b"dup"));
        assert!(!one.is_done());
        assert_eq!(
            two.take(|_, payload| payload.to_vec()),
            Some(b"two".to_vec())
        );
    }

    #[test]
    fn a_late_reply_finds_nobody_even_when_the_slot_is_taken_again() {
        let table = CallTable::new(&pool(), 1, 8).unwrap();
        let first = table.begin().unwrap();
        let late = first.correlation;
        drop(first);
        assert!(!table.deliver(reply_to(late, 1), b"x"));
        let second = table.begin().unwrap();
        assert_ne!(second.correlation, late);
        assert!(!table.deliver(reply_to(late, 1), b"x"));
        assert!(!second.is_done());
    }

    #[test]
    fn generations_wrap_around_without_leaving_the_calls_half() {
        let table = CallTable::new(&pool(), 1, 0).unwrap();
        table.slots[0].generation.store(u32::MAX, Ordering::Relaxed);
        let last = table.begin().unwrap().correlation;
        let first = table.begin().unwrap();
        assert_ne!(first.correlation, last);
        assert!(first.correlation & CALL_BIT != 0 && last & CALL_BIT != 0);
        assert!(table.deliver(reply_to(first.correlation, 0), b""));
    }

    #[test]
    fn a_correlation_that_no_slot_has_is_nobodys() {
        let table = CallTable::new(&pool(), 1, 0).unwrap();
        assert!(!table.deliver(reply_to(CALL_BIT | 0xff, 0), b""));
    }
}
