//! Values of which only the newest counts.

use std::time::Duration;

use super::client::Client;
use super::client_inbox::Wanted;
use super::client_options::ClientStats;
use crate::error::{RecvTimeoutError, TryRecvError, TrySendError};
use crate::message::RingMessage;

/// An endpoint through which a kernel gets the newest request, and a caller the newest reply. `Send`, but neither `Sync` nor `Clone`.
///
/// ```
/// use ringkernel::{KernelRegistration, LaunchOptions, RingKernelRuntime};
/// use rkyv::{Archive, Deserialize, Serialize};
///
/// #[derive(Archive, Serialize, Deserialize, Debug, PartialEq)]
/// struct Position { metres: i64 }
/// ringkernel::ring_message!(Position, "example.Position.v1");
///
/// let runtime = RingKernelRuntime::builder().build()?;
/// let kernel = runtime.launch("echo", 1, 1, LaunchOptions::default())?;
/// kernel.activate()?;
/// let mut position = kernel.latest::<Position, Position>()?;
/// for metres in 0..1000 {
///     position.publish(&Position { metres })?;   // never waits, and never fails for want of room
/// }
/// while position.newest_timeout(std::time::Duration::from_secs(1))? != (Position { metres: 999 }) {}
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Latest<Req, Resp> {
    client: Client<Req, Resp>,
}

impl<Req: RingMessage, Resp: RingMessage> Latest<Req, Resp> {
    pub(super) fn new(client: Client<Req, Resp>) -> Self {
        Self { client }
    }

    /// Gives the kernel a value; one that it has not begun with is replaced, and goes to the dead letters. Wait-free.
    ///
    /// # Errors
    /// [`TrySendError`], but neither `Full` nor `Busy`.
    #[inline]
    pub fn publish(&mut self, value: &Req) -> Result<(), TrySendError> {
        self.client.try_send(value)
    }

    /// The newest reply of those that are there; the others are received and dropped. Does not wait.
    ///
    /// # Errors
    /// [`TryRecvError`]: there is none, or the newest is an error. One that is not of this type goes to the dead letters.
    #[inline]
    pub fn newest(&mut self) -> Result<Resp, TryRecvError> {
        let mut newest = self.client.try_find(Wanted::ANY_OF_USE);
        // As many as there can be, so that a fast kernel cannot keep the caller here.
        for _ in 0..MOST_REPLIES {
            if let Err(TryRecvError::Empty | TryRecvError::Busy | TryRecvError::Unavailable(_)) =
                newest
            {
                break;
            }
            match self.client.try_find(Wanted::ANY_OF_USE) {
                Err(TryRecvError::Empty | TryRecvError::Busy | TryRecvError::Unavailable(_)) => {
                    break;
                }
                newer => newest = newer,
            }
        }
        newest
    }

    /// As [`newest`](Self::newest), waiting for `timeout` at most until there is one.
    ///
    /// # Errors
    /// [`RecvTimeoutError`]: as for `newest`.
    #[inline]
    pub fn newest_timeout(&mut self, timeout: Duration) -> Result<Resp, RecvTimeoutError> {
        let first = self.client.find_until(Wanted::ANY_OF_USE, timeout);
        if let Err(RecvTimeoutError::Timeout | RecvTimeoutError::Unavailable(_)) = first {
            return first;
        }
        match self.newest() {
            Ok(newest) => Ok(newest),
            Err(TryRecvError::Message(error)) => Err(RecvTimeoutError::Message(error)),
            Err(_) => first,
        }
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        self.client.stats()
    }
}

/// Replies that `newest` passes over at most. Its lane has a credit of one.
const MOST_REPLIES: usize = 64;
