//! The host's reading end of a ring, which copies what the other end may still write.

use std::ptr::NonNull;
use std::sync::Arc;

use super::host_memory::{HostMemory, HostPool};
use crate::error::Error;
use crate::message::{EXTENSION_BYTES, Extension, MessageHeader};
use crate::ring::{Consumer, LINE_BYTES, Peek, RingLayout};

/// Whatever must outlive a ring's endpoint.
pub(crate) type KeepAlive = Arc<dyn std::fmt::Debug + Send + Sync>;

/// The host's reading end of a ring. On cache lines of its own, as `HostProducer`.
///
/// A message of a thread of this process is read in its slot. One of a device is copied when it is
/// found, and read in the copy alone: the device's code may be wrong, and change a slot while safe
/// code reads what has been checked.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct HostConsumer {
    consumer: Consumer,
    copy: Option<PrivateCopy>,
    _memory: KeepAlive,
}

/// Where the message that was found last lies, behind its header.
#[derive(Debug)]
struct PrivateCopy {
    /// The ring's `max_payload()` bytes, of this consumer alone.
    body: NonNull<u8>,
    /// Header of the message that lies there, so that a message that is looked at again is not
    /// copied again.
    header: Option<MessageHeader>,
    _memory: Arc<HostMemory>,
}

// SAFETY: the memory that `body` reaches belongs to this value alone, and lives as long as it.
unsafe impl Send for PrivateCopy {}
// SAFETY: as for `Send`; it is written to only through `&mut`.
unsafe impl Sync for PrivateCopy {}

impl HostConsumer {
    /// An end that reads in place.
    pub(super) fn new(consumer: Consumer, memory: KeepAlive) -> Self {
        Self {
            consumer,
            copy: None,
            _memory: memory,
        }
    }

    /// Bytes of memory for the copies of one ring's messages.
    pub(super) fn copy_bytes(ring: RingLayout) -> usize {
        ring.max_payload().next_multiple_of(LINE_BYTES)
    }

    /// Has these, all of rings of this layout, read copies from now on.
    pub(super) fn read_copies<'a>(
        consumers: impl ExactSizeIterator<Item = &'a mut Self>,
        pool: &HostPool,
        ring: RingLayout,
    ) -> Result<(), Error> {
        let each = Self::copy_bytes(ring);
        let memory = pool.allocate(each.saturating_mul(consumers.len()))?;
        for (index, consumer) in consumers.enumerate() {
            consumer.copy = Some(PrivateCopy {
                // SAFETY: `each` bytes were allocated for every index.
                body: unsafe { memory.start().add(index * each) },
                header: None,
                _memory: Arc::clone(&memory),
            });
        }
        Ok(())
    }

    /// Looks at the next position without taking anything.
    #[inline]
    pub(crate) fn peek(&mut self) -> Peek {
        let found = self.consumer.peek();
        self.secure(found)
    }

    /// As `peek`, but looks up to `polls` times, a pause apart, before it reports an empty ring.
    #[inline]
    pub(crate) fn peek_spinning(&mut self, polls: u32) -> Peek {
        let found = self.consumer.peek_spinning(polls);
        self.secure(found)
    }

    /// Copies a message that was found, if it is to be read in a copy.
    #[inline]
    fn secure(&mut self, found: Peek) -> Peek {
        if let Peek::Ready = found
            && let Some(copy) = &mut self.copy
            && copy.header != Some(*self.consumer.header())
        {
            copy.header = Some(*self.consumer.header());
            // SAFETY: the copy has `max_payload()` bytes, and is memory of its own.
            unsafe { self.consumer.copy_body(copy.body) };
        }
        found
    }

    /// Header of the message that was just found.
    #[inline]
    pub(crate) fn header(&self) -> &MessageHeader {
        self.consumer.header()
    }

    /// Extension of the message that was just found.
    #[inline]
    pub(crate) fn extension(&self) -> Option<Extension> {
        match &self.copy {
            None => self.consumer.extension(),
            Some(_) if !self.header().is_extended() => None,
            Some(copy) => {
                // SAFETY: a ring whose message is extended has room for the extension, as `peek`
                // found, and the copy has as much. The memory was zeroed at first: all of it is
                // initialised.
                let bytes = unsafe { copy.body.cast::<[u8; EXTENSION_BYTES]>().read_unaligned() };
                Some(Extension::from_bytes(&bytes))
            }
        }
    }

    /// Payload of the message that was just found, 16-byte aligned.
    #[inline]
    pub(crate) fn payload(&self) -> &[u8] {
        match &self.copy {
            None => self.consumer.payload(),
            Some(copy) => {
                let offset = if self.header().is_extended() {
                    EXTENSION_BYTES
                } else {
                    0
                };
                // SAFETY: `peek` found that `offset + length` is within `max_payload()`, which the
                // copy has; the memory is initialised, belongs to this value, and is written to
                // only through `&mut self`.
                unsafe {
                    std::slice::from_raw_parts(
                        copy.body.add(offset).as_ptr(),
                        self.header().length(),
                    )
                }
            }
        }
    }

    /// Position of the next message.
    #[inline]
    pub(crate) fn position(&self) -> u32 {
        self.consumer.position()
    }

    /// Gives the current slot back.
    #[inline]
    pub(crate) fn release(&mut self) {
        self.consumer.release();
    }

    /// Tells the producer of every slot given back so far.
    #[inline]
    pub(crate) fn publish_cursor(&mut self) {
        self.consumer.publish_cursor();
    }

    /// As `publish_cursor`, unless the producer has been told.
    #[inline]
    pub(crate) fn publish_progress(&mut self) {
        self.consumer.publish_progress();
    }

    /// The ring's end itself, which reads in place: for a probe, which does no more than compare
    /// bytes.
    #[cfg(any(feature = "vulkan", feature = "cuda", feature = "metal"))]
    pub(super) fn in_place(&mut self) -> &mut Consumer {
        &mut self.consumer
    }
}

#[cfg(test)]
mod tests {
    use super::super::host_memory::Account;
    use super::*;
    use crate::message::Envelope;
    use crate::ring::{Producer, RingParts, WriteCombining};

    /// A ring, and its memory as a device sees it.
    fn ring(layout: RingLayout, pool: &HostPool) -> (Producer, HostConsumer, Arc<HostMemory>) {
        let memory = pool.allocate(layout.slots_bytes() + LINE_BYTES).unwrap();
        // SAFETY: the memory was taken for this.
        let cursor = unsafe { memory.start().add(layout.slots_bytes()) }.cast();
        let parts = RingParts {
            slots: memory.start(),
            cursor,
            write_combining: WriteCombining::No,
            cursor_write_combining: WriteCombining::No,
        };
        // SAFETY: valid, aligned memory of its own, which both ends' owners keep.
        unsafe {
            parts.initialise(layout, 0);
            let producer = Producer::new(parts, layout, 0);
            let consumer = Consumer::new(parts, layout, 0);
            let consumer = HostConsumer::new(consumer, Arc::<HostMemory>::clone(&memory));
            (producer, consumer, memory)
        }
    }

    #[test]
    fn a_copied_message_stays_what_it_was_when_it_was_found() {
        let pool = HostPool::new("test".into(), Arc::new(Account::new(1 << 20)));
        let layout = RingLayout::new(4, 100, false).unwrap();
        let (mut producer, mut consumer, memory) = ring(layout, &pool);
        let before = pool.clone();
        HostConsumer::read_copies(std::iter::once(&mut consumer), &before, layout).unwrap();
        let extension = Extension {
            timestamp_ns: 1,
            deadline_ns: 2,
            trace_id: [3; 16],
        };
        let extended = Envelope {
            extension: Some(extension),
            ..Envelope::default()
        };
        // More than a lap, messages of all lengths.
        for round in 0..20_u8 {
            let payload = vec![round; usize::from(round)];
            for (envelope, expected) in [(Envelope::default(), None), (extended, Some(extension))] {
                producer.try_push(&envelope, &payload).unwrap();
                assert!(matches!(consumer.peek_spinning(2), Peek::Ready));
                assert!(consumer.payload().as_ptr().addr().is_multiple_of(16));
                let index = (consumer.position() & 3) as usize;
                // SAFETY: behind the header of a slot that nothing refers to, as only the copy is
                // read.
                unsafe {
                    let slot = memory.start().add(index * layout.stride() + 16);
                    slot.write_bytes(0xff, layout.stride() - 16);
                }
                for _ in 0..2 {
                    assert_eq!(consumer.payload(), payload);
                    assert_eq!(consumer.extension(), expected);
                    // Found again, as a message is that was left where it is.
                    assert!(matches!(consumer.peek(), Peek::Ready));
                }
                consumer.release();
                assert!(matches!(consumer.peek(), Peek::Empty));
            }
        }
    }

    #[test]
    fn a_changed_header_is_checked_and_copied_again() {
        let pool = HostPool::new("test".into(), Arc::new(Account::new(1 << 20)));
        let layout = RingLayout::new(4, 100, false).unwrap();
        let (mut producer, mut consumer, memory) = ring(layout, &pool);
        HostConsumer::read_copies(std::iter::once(&mut consumer), &pool, layout).unwrap();
        producer.try_push(&Envelope::default(), &[7; 100]).unwrap();
        assert!(matches!(consumer.peek(), Peek::Ready));
        let length_flags = memory.start().cast::<u32>();
        // SAFETY: the third word of the first slot's header, which is accessed as an atomic
        // everywhere else.
        let length_flags = unsafe { length_flags.add(2) };
        let overwrite = |length: u32| {
            // SAFETY: as above; nothing else runs.
            unsafe {
                length_flags.write_volatile((length_flags.read_volatile() & !0xff_ffff) | length)
            };
        };
        overwrite(0xff_ffff);
        // What was found stays, until it is looked for again.
        assert_eq!(consumer.payload(), [7; 100]);
        assert!(matches!(consumer.peek(), Peek::Corrupt(_)));
        assert_eq!(consumer.payload(), [7; 100]);
        overwrite(3);
        assert!(matches!(consumer.peek(), Peek::Ready));
        assert_eq!(consumer.payload(), [7; 3]);
    }
}
