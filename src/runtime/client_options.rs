//! What one client asks for, and what it says of itself.

use std::time::Duration;

use crate::error::Error;
use crate::message::Priority;
use crate::ring::MAX_CAPACITY;

/// Slots of a lane, unless its client says otherwise: so that four levels and their replies are 80 KiB of one-line messages.
const DEFAULT_CAPACITY: usize = 256;

/// Largest weight, so that one lane's turn is over within some 10 us.
const MAX_WEIGHT: u32 = 64;

/// What a client's `send` does when its lane has no room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backpressure {
    /// It waits for room, as long as its timeout says.
    #[default]
    Block,
    /// It fails at once, with [`SendTimeoutError::Full`](crate::error::SendTimeoutError::Full).
    Fail,
    /// It never fails for want of room: the newest request replaces one that still waits, which goes to the dead letters. For values of
    /// which only the newest counts, a sensor's say.
    DropOldest,
}

/// How a client's lane works. The default is a lane of 256 messages that waits for room.
///
/// ```
/// use ringkernel::{Backpressure, ClientOptions, Priority};
/// let options = ClientOptions {
///     priority: Priority::High,
///     backpressure: Backpressure::Fail,
///     ..ClientOptions::default()
/// };
/// # assert_eq!(options.weight, 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// Slots of the lane's rings, rounded up to a power of two, and its *credit*: the most requests that may be on their way while their
    /// replies, if there are any, are unread. 1 to 2^24. Default 256; 1 with [`Backpressure::DropOldest`], so that nothing older than the
    /// newest waits behind what the kernel works on.
    pub capacity: Option<usize>,
    /// Messages that the lane may forward each time that it is its turn, 1 to 64. Default 1.
    pub weight: u32,
    /// Urgency of messages that are sent without options. Where lanes are merged, a more urgent message overtakes all less urgent ones, of its
    /// own lane too; those of one level and lane stay in order.
    pub priority: Priority,
    /// What `send` does when there is no room.
    pub backpressure: Backpressure,
    /// When messages that are sent without options stop being of use, from the moment of sending. Takes the extension; see
    /// [`SendOptions::time_to_live`](crate::SendOptions::time_to_live).
    pub time_to_live: Option<Duration>,
    /// Whether a client that is alone may write to the kernel's ring and read from it directly. Default true; false has it use its lane
    /// always.
    pub direct: bool,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            capacity: None,
            weight: 1,
            priority: Priority::Normal,
            backpressure: Backpressure::Block,
            time_to_live: None,
            direct: true,
        }
    }
}

impl ClientOptions {
    pub(super) fn newest_only(&self) -> bool {
        self.backpressure == Backpressure::DropOldest
    }

    /// Slots of the lane.
    pub(super) fn checked_capacity(&self) -> Result<usize, Error> {
        let invalid = |option, reason| Err(Error::InvalidOption { option, reason });
        if !(1..=MAX_WEIGHT).contains(&self.weight) {
            return invalid(
                "weight",
                format!("{} is not within 1 to {MAX_WEIGHT}", self.weight),
            );
        }
        match self.capacity {
            Some(capacity) if !(1..=MAX_CAPACITY).contains(&capacity) => invalid(
                "capacity",
                format!("{capacity} is not within 1 to {MAX_CAPACITY}"),
            ),
            Some(capacity) => Ok(capacity),
            None if self.newest_only() => Ok(1),
            None => Ok(DEFAULT_CAPACITY),
        }
    }
}

/// What a client has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// Requests accepted.
    pub sent: u64,
    /// Replies received.
    pub received: u64,
    /// Sends that had to wait for room.
    pub waited: u64,
    /// Sends that failed because there was no room.
    pub refused: u64,
    /// Requests that newer ones replaced, or that found no room in their block's ring ([`Backpressure::DropOldest`]).
    pub dropped: u64,
    /// Requests that had expired before they were forwarded.
    pub expired: u64,
    /// Replies that found the lane full: of a kernel that answers a request more than once.
    pub lost_replies: u64,
    /// Requests that wait in the lane now.
    pub queued: u64,
}
