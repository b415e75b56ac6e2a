//! What the runtime holds of a kernel on a Vulkan device.

use std::sync::Arc;

use super::lane::LaneHandle;
use super::slice_kernel::SliceKernel;
use crate::backend::{Dispatch, DispatchStatus};
use crate::kernel::UndeliveredMessage;
use crate::time::Deadline;

/// A kernel on its lane.
#[derive(Debug)]
pub(super) struct VulkanDispatch {
    kernel: Arc<SliceKernel>,
    lane: Arc<LaneHandle>,
}

impl VulkanDispatch {
    /// Puts a kernel on a lane, where it is idle until its control blocks say otherwise.
    pub(super) fn start(kernel: Arc<SliceKernel>, lane: Arc<LaneHandle>) -> Self {
        lane.admit(Arc::clone(&kernel));
        Self { kernel, lane }
    }
}

impl Dispatch for VulkanDispatch {
    fn command(&mut self) {
        self.lane.interrupt();
    }

    fn keep_alive(&mut self) -> DispatchStatus {
        if self.kernel.is_finished() {
            // A failure has been reported by whoever saw it.
            DispatchStatus::Ended
        } else {
            DispatchStatus::Running
        }
    }

    fn request_stop(&mut self) {
        for block in &self.kernel.blocks {
            block.control().set_terminate();
        }
        self.kernel.signals.wake_all();
        self.lane.interrupt();
    }

    fn join(&mut self, deadline: Deadline) -> DispatchStatus {
        self.kernel.wait_finished(deadline);
        self.keep_alive()
    }

    fn leftovers(&self, block: u32, position: u32) -> Vec<UndeliveredMessage> {
        let Some(block) = self.kernel.blocks.get(block as usize) else {
            return Vec::new();
        };
        // SAFETY: the caller promises that the dispatch ended, or is stuck in a handler; `request_stop` has set every
        // `terminate` word before either.
        unsafe { block.leftovers(&self.kernel.signals.name, position) }
    }
}
