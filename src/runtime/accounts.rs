//! What became of a kernel's messages.
//!
//! The accounts of a kernel that has ended are not closed: replies can still be received, a request
//! may lie in its ring of a sender that had just found it open, and kernels behind it take what it
//! has passed on. So they are read when a report is made. While there is a handle they are the
//! kernel's own counters; with the last one they go into its [`Books`].

use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::instance::KernelInstance;
use super::lifecycle::{MessageTally, ShutdownReport};
use super::pipeline::Settling;
use crate::backend::{Dispatch, Leftovers};
use crate::kernel::{BlockState, DeadLetterReason, KernelState, Lost, UndeliveredMessage};
use crate::logging;
use crate::time::Deadline;

/// Most returned messages that a report holds; beyond that they are only counted.
const MAX_RETURNED: usize = 1 << 16;

/// How long a report waits for a kernel whose last handle is just being dropped, which takes
/// microseconds.
const LAST_DROP: Duration = Duration::from_secs(1);

/// What became of the requests of a kernel that has ended, as far as it is known.
#[derive(Debug)]
pub(super) struct Closing {
    /// Without those that were given up in lanes, which the lanes count.
    requests: MessageTally,
    returned: Vec<UndeliveredMessage>,
    /// Where a late request may still appear.
    rings: Vec<Leftovers>,
    /// Threads that are still there, and where each of them is.
    left_behind: Vec<String>,
}

impl Closing {
    /// Counts a request as returned, and keeps it if there is room.
    fn give_back(&mut self, kernel: &str, lost: &Lost<'_>) {
        self.requests.accepted += 1;
        self.requests.returned += 1;
        keep_returned(&mut self.returned, || {
            let mut payload = Vec::new();
            payload.try_reserve_exact(lost.payload.len()).ok()?;
            payload.extend_from_slice(lost.payload);
            Some(UndeliveredMessage {
                kernel: kernel.to_owned(),
                block: lost.block.unwrap_or(0),
                header: lost.header?,
                extension: lost.extension,
                payload,
            })
        });
    }
}

/// Keeps a message, if there are not too many of them and there is memory for it.
fn keep_returned(
    returned: &mut Vec<UndeliveredMessage>,
    message: impl FnOnce() -> Option<UndeliveredMessage>,
) {
    if returned.len() < MAX_RETURNED
        && returned.try_reserve(1).is_ok()
        && let Some(message) = message()
    {
        returned.push(message);
    }
}

/// What became of a kernel's messages at some moment.
#[derive(Debug)]
pub(super) struct Accounts {
    requests: MessageTally,
    replies: MessageTally,
    returned: Vec<UndeliveredMessage>,
    left_behind: Vec<String>,
    /// Replies that kernels behind it may yet take.
    settling: Option<Settling>,
}

impl Accounts {
    fn add_to(self, report: &mut ShutdownReport) {
        report.requests.merge(&self.requests);
        report.replies.merge(&self.replies);
        for message in self.returned {
            keep_returned(&mut report.returned, || Some(message));
        }
        report.left_behind.extend(self.left_behind);
    }

    /// Books what kernels behind it have taken meanwhile; whether nothing changes any more.
    fn settle(&mut self) -> bool {
        let Some(settling) = &mut self.settling else {
            return true;
        };
        settling.book(&mut self.replies);
        settling.is_over()
    }
}

/// The accounts of a kernel that is no more.
#[derive(Debug, Default)]
pub(super) struct Books {
    last: Mutex<Option<Accounts>>,
}

/// A kernel that has ended and that the runtime lists no more.
#[derive(Debug)]
pub(super) struct Ended {
    instance: Weak<KernelInstance>,
    books: Arc<Books>,
}

impl Ended {
    /// `None` unless the kernel has ended.
    pub(super) fn of(instance: &Arc<KernelInstance>) -> Option<Self> {
        instance.has_ended().then(|| Self {
            instance: Arc::downgrade(instance),
            books: Arc::clone(&instance.books),
        })
    }

    /// Where the kernel is, or was.
    pub(super) fn kernel(&self) -> *const KernelInstance {
        self.instance.as_ptr()
    }

    /// Adds the accounts to a report if nothing changes any more; whether that is so.
    pub(super) fn close(&self, report: &mut ShutdownReport) -> bool {
        let mut last = self.books.last.lock();
        if last.as_mut().is_some_and(Accounts::settle)
            && let Some(accounts) = last.take()
        {
            accounts.add_to(report);
            return true;
        }
        false
    }

    /// Adds the accounts to a report as they are now.
    pub(super) fn report(self, report: &mut ShutdownReport) {
        if let Some(instance) = self.instance.upgrade() {
            instance.settle_requests();
            if let Some(accounts) = instance.accounts() {
                accounts.add_to(report);
            }
            return;
        }
        let deadline = Deadline::after(LAST_DROP);
        loop {
            if let Some(mut accounts) = self.books.last.lock().take() {
                accounts.settle();
                accounts.add_to(report);
                return;
            }
            if deadline.has_passed() {
                logging::error!(
                    "the accounts of a kernel whose last handle was dropped are missing"
                );
                return;
            }
            std::thread::yield_now();
        }
    }
}

impl KernelInstance {
    /// Opens the accounts of a kernel that has ended. Each block's progress is read once, and what
    /// lies in its ring behind that is what no handler saw: the ring decides, so that the accounts
    /// add up whatever a handler that returns after all does meanwhile.
    ///
    /// `is_between` says of a kernel of one block that its handler has no request, wherever its
    /// thread is.
    pub(super) fn close(&self, dispatch: &dyn Dispatch, is_between: bool) {
        let letters = &self.signals.dead_letters;
        // Device code counts what it refuses; only this CPU's blocks have written letters.
        let refused: u64 = self
            .blocks
            .iter()
            .map(|block| u64::from(block.control().dropped()))
            .sum();
        // In this order: what expired in a lane has its letter before it is counted.
        let in_lanes = self.lanes.totals().expired;
        let counts = letters.counts();
        let known = (counts.corrupt_requests + counts.expired).saturating_sub(in_lanes);
        for _ in known..refused {
            letters.request(DeadLetterReason::Corrupt, &Lost::default());
        }
        let mut closing = Closing {
            requests: MessageTally::default(),
            returned: Vec::new(),
            rings: Vec::new(),
            left_behind: dispatch.left_behind(),
        };
        for (block, counter) in self.blocks.iter().zip(&*self.accepted) {
            let control = block.control();
            let position = control.processed();
            // A request that a handler panicked on, or sits on for ever, is still the first in its
            // ring.
            let in_hand = self.signals.is_poisoned(block.index)
                || (control.state() != Some(BlockState::Ended) && !is_between);
            // In this order: a request that is counted only now was sent before, and lies in the
            // ring.
            let (accepted, processed) = self.progress(counter, position);
            let processed = processed + uncounted(accepted, position, self.capacity);
            let refused = u64::from(control.dropped());
            let mut found = 0;
            let mut failed = 0;
            if let Some(mut ring) = dispatch.leftovers(block.index, position) {
                if in_hand && ring.next(|lost| self.lose_failed(lost)) {
                    failed = 1;
                }
                found = failed + self.give_ring_back(&mut closing, &mut ring);
                closing.rings.push(ring);
            }
            // Behind a corrupt slot nothing can be read.
            let unreadable = accepted.saturating_sub(processed + found);
            for _ in 0..unreadable {
                let lost = Lost {
                    block: Some(block.index),
                    ..Lost::default()
                };
                letters.request(DeadLetterReason::Corrupt, &lost);
            }
            closing.requests.merge(&MessageTally {
                accepted: processed + failed + unreadable,
                delivered: processed.saturating_sub(refused),
                dead_lettered: refused.min(processed) + unreadable + failed,
                returned: 0,
            });
        }
        *self.closing.lock() = Some(closing);
        self.give_lanes_back();
        if let Some(hub) = self.clients.lock().upgrade() {
            // Lanes whose clients had gone before are of no use any more.
            hub.call_to_retire();
        }
    }

    /// Takes back what a sender put into a ring or a lane that had found the kernel open just
    /// before it ended.
    pub(super) fn settle_requests(&self) {
        if let Some(closing) = &mut *self.closing.lock() {
            let mut rings = std::mem::take(&mut closing.rings);
            for ring in &mut rings {
                self.give_ring_back(closing, ring);
            }
            closing.rings = rings;
        }
        if self.lanes.totals().backlog > 0 {
            self.give_lanes_back();
        }
    }

    #[cold]
    fn lose_failed(&self, lost: &Lost<'_>) {
        let letters = &self.signals.dead_letters;
        letters.request(DeadLetterReason::KernelFailed, &self.typed(lost));
    }

    fn typed<'a>(&self, lost: &Lost<'a>) -> Lost<'a> {
        let kind = lost.header.map(|header| header.kind());
        Lost {
            type_id: kind.and_then(|kind| self.types.type_of(kind)),
            ..*lost
        }
    }

    /// Takes back what lies in the ring of a block; how much.
    fn give_ring_back(&self, closing: &mut Closing, ring: &mut Leftovers) -> u64 {
        let mut found = 0;
        // No more than there is room for, whatever senders do meanwhile.
        while found < self.capacity && ring.next(|lost| self.give_back(closing, lost)) {
            found += 1;
        }
        found
    }

    /// Gives a request back.
    #[cold]
    fn give_back(&self, closing: &mut Closing, lost: &Lost<'_>) {
        let letters = &self.signals.dead_letters;
        letters.request(DeadLetterReason::Shutdown, &self.typed(lost));
        closing.give_back(&self.signals.name, lost);
    }

    /// Gives a request back that was left in a lane.
    #[cold]
    pub(super) fn give_lane_request_back(&self, lost: &Lost<'_>) {
        if let Some(closing) = &mut *self.closing.lock() {
            self.give_back(closing, lost);
        }
    }

    /// Takes back what no kernel will see any more of what its clients had sent.
    fn give_lanes_back(&self) {
        let Some(hub) = self.clients.lock().upgrade() else {
            return;
        };
        match hub.take_before(Deadline::after(self.termination_timeout)) {
            Some(mut merger) => merger.give_back(),
            None => logging::error!(
                "kernel '{}': a client does not let go of the lanes; what is in them is not returned",
                self.signals.name
            ),
        }
    }

    /// The accounts of a kernel that has ended; what it returns is taken.
    fn accounts(&self) -> Option<Accounts> {
        let mut closing = self.closing.lock();
        let closing = closing.as_mut()?;
        let mut requests = closing.requests;
        let dead_lettered = self.lanes.totals().dead();
        requests.merge(&MessageTally {
            accepted: dead_lettered,
            delivered: 0,
            dead_lettered,
            returned: 0,
        });
        Some(Accounts {
            requests,
            replies: self.reply_tally(),
            returned: std::mem::take(&mut closing.returned),
            left_behind: std::mem::take(&mut closing.left_behind),
            settling: None,
        })
    }

    /// Leaves the accounts to the runtime: the last handle has gone.
    pub(super) fn close_books(&self) {
        self.settle_requests();
        if let Some(mut accounts) = self.accounts() {
            (accounts.replies, accounts.settling) = self.closing_reply_tally();
            *self.books.last.lock() = Some(accounts);
        }
    }

    /// Whether it has failed, for the report.
    pub(super) fn has_failed(&self) -> bool {
        self.state() == KernelState::Failed
    }
}

/// Requests that a block has handled and that their sender, which had just published them, has not
/// counted: none of a position that cannot be.
fn uncounted(accepted: u64, position: u32, capacity: u64) -> u64 {
    let ahead = u64::from(position.wrapping_sub(accepted as u32));
    if ahead <= capacity { ahead } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::uncounted;

    #[test]
    fn what_was_handled_before_it_was_counted_is_not_forgotten() {
        assert_eq!(uncounted(7, 7, 16), 0);
        assert_eq!(uncounted(7, 8, 16), 1);
        assert_eq!(uncounted(7, 23, 16), 16);
        // Some of them wait, and around the end of the positions.
        assert_eq!(uncounted(7, 3, 16), 0);
        assert_eq!(uncounted(u64::from(u32::MAX), 1, 16), 2);
        assert_eq!(uncounted((1 << 32) + 1, u32::MAX, 16), 0);
        // Nothing that a ring could have held.
        assert_eq!(uncounted(7, 24, 16), 0);
    }
}
