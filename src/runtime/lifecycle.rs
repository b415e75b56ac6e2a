//! The life of a runtime, and the accounts it closes with.

use std::fmt;
use std::time::Duration;

use crate::error::Error;
use crate::kernel::UndeliveredMessage;

/// Where a runtime is in its life. It only ever goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum LifecycleState {
    /// Built. The first launch, or `start`, makes it `Running`.
    Initializing = 0,
    /// Takes launches and messages.
    Running = 1,
    /// Takes no new launches and no new messages; kernels work off what they have.
    Draining = 2,
    /// Terminates its kernels.
    ShuttingDown = 3,
    /// All kernels have ended.
    Stopped = 4,
}

impl LifecycleState {
    /// The inverse of `as u8`; what is no state counts as the last one.
    pub(super) const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Initializing,
            1 => Self::Running,
            2 => Self::Draining,
            3 => Self::ShuttingDown,
            _ => Self::Stopped,
        }
    }

    /// The state's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Initializing => "Initializing",
            Self::Running => "Running",
            Self::Draining => "Draining",
            Self::ShuttingDown => "ShuttingDown",
            Self::Stopped => "Stopped",
        }
    }
}

impl fmt::Display for LifecycleState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What became of the messages of one direction, or of topics. `accepted = delivered + dead_lettered + returned`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MessageTally {
    /// Requests that a send accepted; replies that a kernel wrote; messages that were published, counted once for each subscriber.
    pub accepted: u64,
    /// Requests that a handler saw to its end; replies that a caller received; messages that a subscriber received.
    pub delivered: u64,
    /// Messages that could not be delivered; see [`DeadLetterCounts`](crate::kernel::DeadLetterCounts).
    pub dead_lettered: u64,
    /// Requests given back in the report; replies, and messages of topics, that nobody has received yet.
    pub returned: u64,
}

impl MessageTally {
    /// Whether every accepted message is accounted for.
    #[must_use]
    pub const fn adds_up(&self) -> bool {
        self.accepted == self.delivered + self.dead_lettered + self.returned
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.accepted += other.accepted;
        self.delivered += other.delivered;
        self.dead_lettered += other.dead_lettered;
        self.returned += other.returned;
    }
}

/// How a drain ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainReport {
    /// Whether every request that an active kernel had accepted was handled in time.
    pub complete: bool,
    /// Requests still queued: of kernels that are not active, or that ran out of time.
    pub remaining: u64,
    /// How long the drain took.
    pub took: Duration,
}

/// The accounts of a runtime that has stopped, as they were when the report was made. Kernels
/// terminated earlier are included, with the replies that were received from them after their end.
/// Replies can be received still: they are among the returned ones here.
#[derive(Debug, Default)]
pub struct ShutdownReport {
    /// Since the runtime was built.
    pub uptime: Duration,
    /// Kernels launched in all.
    pub kernels: u64,
    /// Names of the kernels that failed.
    pub failed_kernels: Vec<String>,
    /// What became of the requests.
    pub requests: MessageTally,
    /// What became of the replies.
    pub replies: MessageTally,
    /// What became of the messages of topics, up to the moment of the report: subscribers can still receive what they have.
    pub topics: MessageTally,
    /// The requests counted as returned: accepted, but no handler saw them.
    pub returned: Vec<UndeliveredMessage>,
    /// Threads of kernels that could not be joined in time: the name of each, and where it is (in a
    /// handler, whose kernel is named, or in a destructor). Each ends by itself should that return.
    pub left_behind: Vec<String>,
    /// What went wrong during the shutdown, if anything did.
    pub errors: Vec<Error>,
}

impl fmt::Display for ShutdownReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tally = |f: &mut fmt::Formatter<'_>, name, tally: &MessageTally| {
            writeln!(
                f,
                "{name}: {} accepted = {} delivered + {} dead-lettered + {} returned",
                tally.accepted, tally.delivered, tally.dead_lettered, tally.returned
            )
        };
        writeln!(
            f,
            "up {:?}, {} kernels launched, {} failed",
            self.uptime,
            self.kernels,
            self.failed_kernels.len()
        )?;
        tally(f, "requests", &self.requests)?;
        tally(f, "replies", &self.replies)?;
        tally(f, "topics", &self.topics)?;
        for thread in &self.left_behind {
            writeln!(f, "left behind: thread {thread}")?;
        }
        for error in &self.errors {
            writeln!(f, "error: {error}")?;
        }
        Ok(())
    }
}
