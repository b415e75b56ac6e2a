//! A block whose thread spins as long as that gets on, and parks otherwise: `WaitStrategy::Auto` on
//! the CPU.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::kernel::signals::KernelSignals;
use crate::thread::{KernelWait, SpinPermit, SpinWatch, affinity};
use crate::time;

/// Of one block. All calls but `new` are for the block's own thread.
#[derive(Debug)]
pub(super) struct AutoSpin {
    signals: Arc<KernelSignals>,
    block: usize,
    /// Held while it spins.
    permit: Option<SpinPermit>,
    watch: SpinWatch,
    /// Where it spins, and where it may run while it parks; `None` if the user named its core.
    cores: Option<(usize, Vec<usize>)>,
}

impl AutoSpin {
    /// The block spins from the beginning. Its senders do not look for a sleeper from now on.
    pub(super) fn new(
        signals: Arc<KernelSignals>,
        block: usize,
        permit: SpinPermit,
        cores: Option<(usize, Vec<usize>)>,
    ) -> Self {
        let mut spin = Self {
            signals,
            block,
            permit: None,
            watch: SpinWatch::new(),
            cores,
        };
        spin.begin(permit);
        spin
    }

    fn begin(&mut self, permit: SpinPermit) {
        self.permit = Some(permit);
        self.signals.spinning.fetch_add(1, Ordering::Relaxed);
        if let Some(work) = self.signals.work.get(self.block) {
            work.disarm();
        }
    }

    /// How the block waits after a look, the `is_first` in a row or another one.
    pub(super) fn look(&mut self, is_first: bool) -> KernelWait {
        let now = time::now_ns();
        if is_first {
            self.watch.begin(now);
        } else if !self.watch.gets_on(now) {
            return self.stop(now);
        }
        KernelWait::Auto
    }

    fn stop(&mut self, now_ns: u64) -> KernelWait {
        self.watch.pause(now_ns);
        if self.permit.take().is_some() {
            self.signals.spinning.fetch_sub(1, Ordering::Relaxed);
        }
        if let Some((_, shared)) = &self.cores {
            // Where it cannot move it parks on the core that it spun on.
            let _ = affinity::prefer_cores(shared);
        }
        match self.signals.work.get(self.block) {
            Some(work) if work.arm() => KernelWait::Park,
            // A sender might not see it sleep.
            _ => KernelWait::SpinYield,
        }
    }

    /// How the block waits instead of sleeping, if it is time to try whether spinning gets on
    /// again.
    pub(super) fn try_again(&mut self) -> Option<KernelWait> {
        let now = time::now_ns();
        if !self.watch.may_spin(now) {
            return None;
        }
        let Some(permit) = SpinPermit::for_block_again() else {
            self.watch.pause(now);
            return None;
        };
        if let Some((core, _)) = &self.cores {
            // It spins where it is if the core is gone.
            let _ = affinity::pin_current_thread(*core);
        }
        self.begin(permit);
        Some(KernelWait::Auto)
    }
}

impl Drop for AutoSpin {
    fn drop(&mut self) {
        if self.permit.is_some() {
            self.signals.spinning.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
