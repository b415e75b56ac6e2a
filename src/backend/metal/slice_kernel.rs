//! A kernel on a Metal device.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use parking_lot::Mutex;

use super::api::{Pipeline, Queue, Slice};
use super::bridge::BridgeHandle;
use super::device::Buffer;
use crate::backend::cpp::LaunchWords;
use crate::backend::{DeviceMemory, DispatchRequest, GridMemory, Keeper, Resident};

/// A launched kernel.
pub(super) struct SliceKernel {
    resident: Resident,
    pipeline: Arc<dyn Pipeline>,
    queue: Box<dyn Queue>,
    words: LaunchWords,
    threads: u32,
    grid: Arc<GridMemory>,
    /// How slices ended that are done, in order, until the bridge takes them.
    outcomes: Arc<Mutex<Vec<Result<(), String>>>>,
}

impl fmt::Debug for SliceKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SliceKernel")
            .field("name", &self.signals.name)
            .field("finished", &self.is_finished())
            .finish_non_exhaustive()
    }
}

impl Deref for SliceKernel {
    type Target = Resident;

    fn deref(&self) -> &Resident {
        &self.resident
    }
}

impl SliceKernel {
    pub(super) fn new(
        request: DispatchRequest,
        pipeline: Arc<dyn Pipeline>,
        queue: Box<dyn Queue>,
        words: LaunchWords,
        threads: u32,
        grid: Arc<GridMemory>,
    ) -> Self {
        Self {
            resident: Resident::new(request),
            pipeline,
            queue,
            words,
            threads,
            grid,
            outcomes: Arc::new(Mutex::new(Vec::new())),
        }
    }

    /// Commits a slice; the bridge is told when it is done.
    pub(super) fn commit(&self, bridge: &Arc<BridgeHandle>) -> Result<(), String> {
        let (Some(requests), Some(replies)) = (
            shared(&self.grid.host_to_device),
            shared(&self.grid.device_to_host),
        ) else {
            return Err("memory of another device".into());
        };
        // A kernel without state never touches it.
        let state = self.grid.state.as_ref().and_then(shared);
        let state = state.unwrap_or(requests);
        let (outcomes, bridge) = (Arc::clone(&self.outcomes), Arc::clone(bridge));
        self.queue.commit(
            &Slice {
                pipeline: &*self.pipeline,
                buffers: [requests, replies, state].map(|buffer| &*buffer.shared),
                launch: bytemuck::bytes_of(&self.words),
                blocks: self.blocks.len() as u32,
                threads: self.threads,
            },
            Box::new(move |outcome| {
                outcomes.lock().push(outcome);
                bridge.look();
            }),
        )
    }

    /// How slices ended since the last call.
    pub(super) fn take_outcomes(&self) -> Vec<Result<(), String>> {
        std::mem::take(&mut *self.outcomes.lock())
    }

    pub(super) fn has_outcomes(&self) -> bool {
        !self.outcomes.lock().is_empty()
    }

    /// Lets go of a kernel of which nothing runs any more, or which is left to itself, and says so.
    pub(super) fn finish(kernel: Arc<Self>) {
        let end = kernel.end();
        drop(kernel);
        end.set();
    }
}

fn shared(memory: &Arc<dyn DeviceMemory>) -> Option<&Buffer> {
    memory.as_any().downcast_ref()
}
