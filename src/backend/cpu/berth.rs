//! Where a block lies while the thread of the block before it runs it.
//!
//! Connected blocks that share a core would wait for the scheduler with every message. Instead, the second block's thread
//! lends its loop: it sleeps, and the first one's thread takes turns between its own messages. Commands are still obeyed by
//! the block's own thread, which takes its loop back for that.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::kernel::outlet::Guest;
use crate::kernel::signals::KernelSignals;

/// A block's loop, as its host sees it.
pub(super) trait Turn {
    /// Handles a request, if there is one and room for a reply. Whether there may be more to do.
    fn turn(&mut self) -> bool;
}

/// A loop that its thread has lent.
#[derive(Clone, Copy)]
pub(super) struct Lent(NonNull<dyn Turn>);

// SAFETY: it is only used under the berth's lock, one thread at a time, and what it points to may change threads: a block's
// loop consists of ring ends, shared references to what is `Sync`, and owned data.
unsafe impl Send for Lent {}

impl Lent {
    /// # Safety
    /// The loop must not be touched but through the berth until it has been taken out of it, under its lock, and must live
    /// until then.
    pub(super) unsafe fn new(block: NonNull<dyn Turn + '_>) -> Self {
        // SAFETY: only the lifetime changes, for which the caller vouches.
        Self(unsafe { std::mem::transmute::<NonNull<dyn Turn + '_>, NonNull<dyn Turn>>(block) })
    }

    /// # Safety
    /// The caller must hold the lock of the berth that this was found in.
    pub(super) unsafe fn turn(mut self) -> bool {
        // SAFETY: whoever lent it touches it only under the lock as well, and keeps it alive.
        unsafe { self.0.as_mut() }.turn()
    }
}

/// The place.
pub(crate) struct Berth {
    lent: Mutex<Option<Lent>>,
    hosted: AtomicBool,
    /// Whether the other thread is in the block's loop. On the line of the lock that it holds then.
    in_turn: AtomicBool,
    signals: Arc<KernelSignals>,
}

impl fmt::Debug for Berth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Berth")
            .field("kernel", &self.signals.name)
            .field("hosted", &self.hosted)
            .finish_non_exhaustive()
    }
}

impl Berth {
    /// For the one block of a kernel.
    pub(crate) fn new(signals: Arc<KernelSignals>) -> Self {
        Self {
            lent: Mutex::new(None),
            hosted: AtomicBool::new(false),
            in_turn: AtomicBool::new(false),
            signals,
        }
    }

    /// Whether another thread is there to run the block.
    #[inline]
    pub(super) fn is_hosted(&self) -> bool {
        self.hosted.load(Ordering::Acquire)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Lent>> {
        self.lent.lock()
    }
}

impl Guest for Berth {
    fn host(&self, hosting: bool) {
        if self.hosted.swap(hosting, Ordering::AcqRel) != hosting {
            self.signals.wake_all();
        }
    }

    fn run(&self) -> bool {
        let Some(place) = self.lent.try_lock() else {
            return true;
        };
        let Some(lent) = *place else {
            return true;
        };
        self.in_turn.store(true, Ordering::Relaxed);
        // SAFETY: the lock is held.
        let more = unsafe { lent.turn() };
        self.in_turn.store(false, Ordering::Relaxed);
        more
    }

    fn holder(&self) -> Option<Arc<KernelSignals>> {
        // The flag alone is of interest: nothing is read that it would publish.
        self.in_turn
            .load(Ordering::Relaxed)
            .then(|| Arc::clone(&self.signals))
    }
}
