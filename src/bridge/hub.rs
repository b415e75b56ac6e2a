//! The place where the clients of one kernel and the bridge's thread meet.
//!
//! Whoever holds the baton merges and routes for everybody: a client that waits for its reply anyway does so while it waits, the bridge's
//! thread does so for those who do not wait, or for all of them if it has a core to spin on. A thread that finds the baton taken uses its
//! own lane and goes on. A client that is alone writes to the kernel's ring and reads from it directly, baton in hand, so that a second
//! client can come at any time: from then on both use their lanes, behind whatever the first had sent.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::lane::Lane;
use super::merger::{Merger, Port};
use super::thread::{Attention, Service, Station};
use crate::thread::baton::{Baton, Held};
use crate::time::Deadline;

/// Between two attempts of the control plane to have the baton: whoever has it moves a few messages.
const NAP: Duration = Duration::from_micros(20);

/// The lanes of one kernel, and who attends to them.
pub(crate) struct Hub<P> {
    merger: Baton<Merger<P>>,
    attention: Arc<Attention>,
    /// Whether its lanes are in use: there are several, or one that must not be left out.
    crowded: AtomicBool,
    /// Whether the bridge is to look after it although its only client goes past the lane.
    wanted: AtomicBool,
    /// Whether a client has gone whose lane is still there.
    closing: AtomicBool,
}

impl<P> fmt::Debug for Hub<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("crowded", &self.crowded)
            .finish_non_exhaustive()
    }
}

impl<P: Port> Hub<P> {
    pub(crate) fn new(merger: Merger<P>, attention: Arc<Attention>) -> Self {
        Self {
            merger: Baton::new(merger),
            attention,
            crowded: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        }
    }

    /// The merger, if nobody else has it right now.
    #[inline]
    pub(crate) fn try_take(&self) -> Option<Held<'_, Merger<P>>> {
        self.merger.try_take()
    }

    /// The merger, for the control plane; `None` if it cannot be had before the deadline.
    pub(crate) fn take_before(&self, deadline: Deadline) -> Option<Held<'_, Merger<P>>> {
        loop {
            if let Some(merger) = self.try_take() {
                return Some(merger);
            }
            if deadline.has_passed() {
                return None;
            }
            std::thread::sleep(NAP);
        }
    }

    /// Adds a lane, and gives its number; `None` if there are too many. Unless it `may_be_left_out`, all its messages go through it, even
    /// while it is the only one.
    pub(crate) fn add(
        &self,
        merger: &mut Merger<P>,
        lane: Box<Lane>,
        may_be_left_out: bool,
    ) -> Option<u16> {
        let number = merger.add(lane)?;
        if merger.lanes() > 1 || !may_be_left_out {
            self.use_lanes(merger);
        }
        Some(number)
    }

    /// From now on messages go through the lanes, those of an only client too.
    pub(crate) fn use_lanes(&self, merger: &Merger<P>) {
        self.crowded.store(true, Ordering::SeqCst);
        merger.port().use_lanes();
    }

    /// Whether messages go through the lanes.
    #[inline]
    pub(crate) fn is_crowded(&self) -> bool {
        self.crowded.load(Ordering::Relaxed)
    }

    /// Whether the bridge's thread spins for it, so that nobody else needs to.
    #[inline]
    pub(crate) fn is_attended(&self) -> bool {
        self.attention.is_spinning() && self.is_crowded()
    }

    /// Tells the bridge of a message in a lane that its client does not merge itself.
    #[inline]
    pub(crate) fn call_bridge(&self) {
        if !self.is_crowded() {
            self.wanted.store(true, Ordering::Relaxed);
        }
        self.attention.bell.notify();
    }

    /// A client has gone. Gives its lane up, here if that can be done at once.
    pub(crate) fn close_lane(&self) {
        if let Some(mut merger) = self.try_take() {
            merger.pass();
            merger.retire();
        }
        // In any case: a lane may be left, and with the last one the bridge lets go of the hub.
        self.closing.store(true, Ordering::Release);
        self.attention.bell.notify();
    }
}

impl<P: Port + 'static> Station for Hub<P> {
    fn serve(&self) -> Service {
        let is_closing = self.closing.load(Ordering::Acquire);
        if !(self.is_crowded() || is_closing || self.wanted.load(Ordering::Relaxed)) {
            return Service::IDLE;
        }
        let Some(mut merger) = self.try_take() else {
            return Service::CONTENDED;
        };
        let moved = merger.pass();
        if is_closing {
            // Cleared first: a client that goes now sets it again.
            self.closing.store(false, Ordering::Release);
            if merger.retire() {
                self.closing.store(true, Ordering::Release);
            }
        }
        if merger.is_over() {
            return Service::DONE;
        }
        let has_work = merger.has_work();
        if !has_work {
            self.wanted.store(false, Ordering::Relaxed);
        }
        Service {
            moved,
            is_waiting: has_work || is_closing,
            is_crowded: self.is_crowded() && merger.port().is_active(),
            ..Service::IDLE
        }
    }

    fn is_ready(&self) -> bool {
        if !(self.is_crowded() || self.wanted.load(Ordering::Relaxed)) {
            return self.closing.load(Ordering::Relaxed);
        }
        // Whoever has it may have looked before the last message came.
        self.try_take().is_none_or(|mut merger| {
            merger.has_work() || (merger.port().is_unwatched() && merger.port_mut().has_reply())
        })
    }

    fn sample(&self, now_ns: u64) {
        if let Some(merger) = self.try_take() {
            merger.port().sample(now_ns);
        }
    }
}
