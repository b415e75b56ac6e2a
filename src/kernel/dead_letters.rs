//! Counts of messages that could not be delivered, by reason.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a message could not be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeadLetterReason {
    /// A reply to a call that had timed out, or that had its reply already.
    LateReply,
    /// A header or archive that no correct sender writes.
    Corrupt,
    /// The request whose handling failed the kernel.
    KernelFailed,
    /// An uncorrelated reply that came while calls were pending and nobody received: the kernel's inbox, as large as
    /// its reply ring, was full.
    InboxFull,
}

/// The counters themselves.
#[derive(Debug, Default)]
pub(crate) struct DeadLetters {
    late_replies: AtomicU64,
    corrupt_requests: AtomicU64,
    corrupt_replies: AtomicU64,
    kernel_failed: AtomicU64,
    inbox_full: AtomicU64,
}

/// Messages that could not be delivered, since the kernel's launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeadLetterCounts {
    /// [`DeadLetterReason::LateReply`]; replies.
    pub late_replies: u64,
    /// [`DeadLetterReason::Corrupt`]; requests.
    pub corrupt_requests: u64,
    /// [`DeadLetterReason::Corrupt`]; replies.
    pub corrupt_replies: u64,
    /// [`DeadLetterReason::KernelFailed`]; requests.
    pub kernel_failed: u64,
    /// [`DeadLetterReason::InboxFull`]; replies.
    pub inbox_full: u64,
}

impl DeadLetterCounts {
    /// Requests among them.
    #[must_use]
    pub const fn requests(&self) -> u64 {
        self.corrupt_requests + self.kernel_failed
    }

    /// Replies among them.
    #[must_use]
    pub const fn replies(&self) -> u64 {
        self.late_replies + self.corrupt_replies + self.inbox_full
    }
}

impl DeadLetters {
    #[cold]
    pub(crate) fn count_request(&self, reason: DeadLetterReason) {
        let counter = match reason {
            DeadLetterReason::KernelFailed => &self.kernel_failed,
            _ => &self.corrupt_requests,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    #[cold]
    pub(crate) fn count_reply(&self, reason: DeadLetterReason) {
        let counter = match reason {
            DeadLetterReason::LateReply => &self.late_replies,
            DeadLetterReason::InboxFull => &self.inbox_full,
            _ => &self.corrupt_replies,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> DeadLetterCounts {
        DeadLetterCounts {
            late_replies: self.late_replies.load(Ordering::Relaxed),
            corrupt_requests: self.corrupt_requests.load(Ordering::Relaxed),
            corrupt_replies: self.corrupt_replies.load(Ordering::Relaxed),
            kernel_failed: self.kernel_failed.load(Ordering::Relaxed),
            inbox_full: self.inbox_full.load(Ordering::Relaxed),
        }
    }
}
