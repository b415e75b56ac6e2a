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

/// Looks of a client whose time is up: some 50 us, longer than anybody who is running has the baton at a time.
const TRIES: u32 = 1024;

/// How long it waits beyond its timeout for somebody who was moved aside with the baton in hand, as callers by handle do for a side.
const PATIENCE: Duration = Duration::from_micros(100);

/// The lanes of one kernel, and who attends to them.
pub(crate) struct Hub<P: Port> {
    merger: Baton<Merger<P>>,
    attention: Arc<Attention>,
    /// Whether its lanes are in use: there are several, or one that must not be left out.
    crowded: AtomicBool,
    /// Whether the bridge is to look after it although its only client goes past the lane.
    wanted: AtomicBool,
    /// Whether a client has gone since the bridge last looked.
    closing: AtomicBool,
    /// Whether a lane is still there whose client has gone, as the bridge last saw it.
    leaving: AtomicBool,
}

impl<P: Port> fmt::Debug for Hub<P> {
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
            leaving: AtomicBool::new(false),
        }
    }

    /// The merger, if nobody else has it right now.
    #[inline]
    pub(crate) fn try_take(&self) -> Option<Held<'_, Merger<P>>> {
        self.merger.try_take()
    }

    /// The merger, if nobody else has it for long: for a client whose time is up.
    pub(crate) fn take_soon(&self) -> Option<Held<'_, Merger<P>>> {
        for _ in 0..TRIES {
            if let Some(merger) = self.try_take() {
                return Some(merger);
            }
            std::hint::spin_loop();
        }
        // Whoever has it is not running.
        self.take_before(Deadline::after(PATIENCE))
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
        // A bridge that is to spin begins now.
        self.attention.bell.notify();
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
            // ORDERING: wanted. Pairs with `take` in `serve`: who clears it sees the message.
            self.wanted.store(true, Ordering::Release);
        }
        self.attention.bell.notify();
    }

    /// A client has gone. Gives its lane up, here if that can be done at once and the caller has
    /// the merger.
    pub(crate) fn close_lane(&self, merger: Option<Held<'_, Merger<P>>>) {
        if let Some(mut merger) = merger {
            merger.pass();
            merger.retire();
        }
        // In any case: a lane may be left, and with the last one the bridge lets go of the hub.
        self.call_to_retire();
    }

    /// Has the bridge let go of lanes whose clients are gone.
    pub(crate) fn call_to_retire(&self) {
        // ORDERING: wanted. See `call_bridge`.
        self.closing.store(true, Ordering::Release);
        self.attention.bell.notify();
    }
}

/// Clears a flag; whether it was set.
fn take(flag: &AtomicBool) -> bool {
    // ORDERING: wanted. A read-modify-write: whoever sets the flag from now on does so after it.
    flag.load(Ordering::Relaxed) && flag.swap(false, Ordering::AcqRel)
}

impl<P: Port + 'static> Station for Hub<P> {
    fn serve(&self) -> Service {
        let flags = [&self.wanted, &self.closing, &self.leaving];
        let is_asked = flags.iter().any(|flag| flag.load(Ordering::Relaxed));
        if !(is_asked || self.is_crowded()) {
            return Service::IDLE;
        }
        let Some(mut merger) = self.try_take() else {
            return Service::CONTENDED;
        };
        // Before the lanes are looked at: who leaves something in one, or goes, from now on sets them again.
        take(&self.wanted);
        let is_closing = take(&self.closing) || self.leaving.load(Ordering::Relaxed);
        let moved = merger.pass();
        let is_any_left = is_closing && merger.retire();
        self.leaving.store(is_any_left, Ordering::Relaxed);
        if merger.is_over() {
            return Service::DONE;
        }
        let has_backlog = merger.has_any_backlog();
        if has_backlog && !self.is_crowded() {
            self.wanted.store(true, Ordering::Release);
        }
        // While the kernel takes nothing there is nothing to be done; whoever changes that rings.
        let is_active = merger.port().is_active();
        Service {
            moved,
            is_waiting: is_active && (has_backlog || is_any_left),
            is_crowded: is_active && self.is_crowded(),
            ..Service::IDLE
        }
    }

    fn is_ready(&self) -> bool {
        if self.closing.load(Ordering::Relaxed) {
            return true;
        }
        if !(self.is_crowded() || self.wanted.load(Ordering::Relaxed)) {
            return false;
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
