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
    /// What the shader sees where that is not what the host sees, and what lies between.
    memory_bytes: u64,
}

impl VulkanDispatch {
    /// Puts a kernel on a lane, where it is idle until its control blocks say otherwise.
    pub(super) fn start(
        kernel: Arc<SliceKernel>,
        lane: Arc<LaneHandle>,
        memory_bytes: u64,
    ) -> Self {
        lane.admit(Arc::clone(&kernel));
        Self {
            kernel,
            lane,
            memory_bytes,
        }
    }
}

impl Dispatch for VulkanDispatch {
    fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

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
        self.kernel.ask_to_end();
        self.lane.interrupt();
    }

    fn join(&mut self, deadline: Deadline) -> DispatchStatus {
        self.kernel.wait_finished(deadline);
        self.keep_alive()
    }

    fn leftovers(&self, block: u32, position: u32) -> Vec<UndeliveredMessage> {
        // SAFETY: the caller promises that the dispatch ended, or is stuck in a handler; `request_stop` has asked it to end
        // before either.
        unsafe { self.kernel.leftovers(block, position) }
    }
}
