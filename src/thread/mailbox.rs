//! A mailbox for one value: whoever writes replaces what has not been read, whoever reads gets the newest.
//!
//! Three buffers (one being written, one being read, one between them) and one atomic exchange a side: triple buffering, as graphics has
//! always had it. Wait-free on both sides; a value is never torn, and never copied by a reader that might have to try again.

use crate::sync::{AtomicU32, Ordering, UnsafeCell};
use std::fmt;
use std::sync::Arc;

/// Set while the buffer between the two sides holds a value that has not been taken.
const FRESH: u32 = 4;
const INDEX: u32 = 3;

#[repr(align(128))]
struct Shared<T> {
    /// Index of the buffer between the two sides, and `FRESH`.
    between: AtomicU32,
    buffers: [UnsafeCell<T>; 3],
}

// SAFETY: each buffer belongs to the side that holds its index: the writer's, the reader's, and the one in `between`, which only an exchange
// gives away. So values only ever move from thread to thread, which `T: Send` allows.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as for `Sync`.
unsafe impl<T: Send> Send for Shared<T> {}

/// The writing side. `Send`, not `Clone`.
pub struct MailboxWriter<T> {
    shared: Arc<Shared<T>>,
    /// The buffer that is the writer's.
    index: u32,
}

/// The reading side. `Send`, not `Clone`.
pub struct MailboxReader<T> {
    shared: Arc<Shared<T>>,
    /// The buffer that is the reader's.
    index: u32,
}

impl<T> fmt::Debug for MailboxWriter<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MailboxWriter").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for MailboxReader<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MailboxReader").finish_non_exhaustive()
    }
}

/// A mailbox whose three buffers `make` fills; it is empty at first.
///
/// ```
/// let (mut writer, mut reader) = ringkernel::thread::mailbox(|| 0);
/// assert_eq!(reader.take(), None);
/// assert!(!writer.replace(1), "nothing was lost");
/// assert!(writer.replace(2), "1 was");
/// assert_eq!(reader.take(), Some(&mut 2));
/// assert_eq!(reader.take(), None);
/// ```
pub fn mailbox<T: Send>(mut make: impl FnMut() -> T) -> (MailboxWriter<T>, MailboxReader<T>) {
    mailbox_of([make(), make(), make()])
}

/// A mailbox of three buffers that were made before; it is empty at first.
pub(crate) fn mailbox_of<T: Send>(buffers: [T; 3]) -> (MailboxWriter<T>, MailboxReader<T>) {
    let shared = Arc::new(Shared {
        between: AtomicU32::new(1),
        buffers: buffers.map(UnsafeCell::new),
    });
    (
        MailboxWriter {
            shared: Arc::clone(&shared),
            index: 0,
        },
        MailboxReader { shared, index: 2 },
    )
}

impl<T: Send> MailboxWriter<T> {
    /// Publishes a value; whether one that nobody has taken was lost by that. Wait-free; does not allocate.
    #[inline]
    pub fn replace(&mut self, value: T) -> bool {
        *self.buffer_mut() = value;
        self.publish().is_some()
    }

    /// The writer's buffer, to write the next value into. Its content is whatever it was before; nobody sees it before
    /// [`publish`](Self::publish).
    #[inline]
    pub fn buffer_mut(&mut self) -> &mut T {
        // SAFETY: the buffer of this index is the writer's (`Shared`); `&mut self` keeps other references away while this one lives.
        self.shared.buffers[self.index as usize].with_mut(|buffer| unsafe { &mut *buffer })
    }

    /// Publishes the writer's buffer. Gives the value that was lost by that, if one was; it lies in the buffer that is the writer's now.
    /// Wait-free.
    #[inline]
    pub fn publish(&mut self) -> Option<&mut T> {
        // ORDERING: mailbox. Release publishes the value to the reader's acquire in `take`; acquire pairs with the reader's release there:
        // it has done with the buffer that comes back.
        let before = self
            .shared
            .between
            .swap(self.index | FRESH, Ordering::AcqRel);
        self.index = before & INDEX;
        if before & FRESH == 0 {
            return None;
        }
        Some(self.buffer_mut())
    }

    /// Whether the reader has not taken the last value yet. May change at any time.
    #[inline]
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.shared.between.load(Ordering::Relaxed) & FRESH != 0
    }
}

impl<T: Send> MailboxReader<T> {
    /// The newest value, if it has not been taken before. It stays until the next call. Wait-free.
    #[inline]
    pub fn take(&mut self) -> Option<&mut T> {
        if !self.is_pending() {
            return None;
        }
        // ORDERING: mailbox. See `MailboxWriter::publish`.
        let before = self.shared.between.swap(self.index, Ordering::AcqRel);
        // Only this side ever makes it stale.
        self.index = before & INDEX;
        // SAFETY: the buffer of this index is the reader's (`Shared`); `&mut self` keeps other references away.
        Some(self.shared.buffers[self.index as usize].with_mut(|buffer| unsafe { &mut *buffer }))
    }

    /// Whether there is a value to take. May become true at any time. If it is true, what the writer did before it published is visible.
    #[inline]
    #[must_use]
    pub fn is_pending(&self) -> bool {
        // ORDERING: mailbox. Pairs with the release in `MailboxWriter::publish`, for those who look at something else before they take.
        self.shared.between.load(Ordering::Acquire) & FRESH != 0
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_newest_value_wins_and_every_other_is_given_back() {
        let (mut writer, mut reader) = mailbox(|| 0_u64);
        let (mut lost, mut read) = (0, 0);
        let last = 200_000_u64;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut before = 0;
                while before < last {
                    if let Some(value) = reader.take() {
                        assert!(*value > before, "{value} after {before}");
                        before = *value;
                        read += 1;
                    }
                }
            });
            for value in 1..=last {
                *writer.buffer_mut() = value;
                if let Some(displaced) = writer.publish() {
                    assert_eq!(*displaced, value - 1, "it is the one before");
                    lost += 1;
                }
            }
        });
        assert_eq!(lost + read, last);
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test --release --lib`
#[cfg(all(test, loom))]
mod model {
    use super::*;

    #[test]
    fn no_value_is_torn_lost_unseen_or_read_twice() {
        loom::model(|| {
            let (mut writer, mut reader) = mailbox(|| [0_u32; 2]);
            let thread = loom::thread::spawn(move || {
                let mut lost = 0;
                for value in 1..=2 {
                    *writer.buffer_mut() = [value; 2];
                    if let Some(displaced) = writer.publish() {
                        assert_eq!(*displaced, [value - 1; 2]);
                        lost += 1;
                    }
                }
                lost
            });
            let mut read = 0;
            let mut before = 0;
            let mut look = |reader: &mut MailboxReader<[u32; 2]>| {
                if let Some(&mut [one, two]) = reader.take() {
                    assert_eq!(one, two);
                    assert!(one > before);
                    before = one;
                    read += 1;
                }
            };
            look(&mut reader);
            let lost = thread.join().unwrap();
            look(&mut reader);
            assert_eq!(before, 2, "the newest is seen");
            assert_eq!(lost + read, 2);
        });
    }
}
