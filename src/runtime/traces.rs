//! The traces of a kernel: its blocks' samples, on the host's clock.

use std::time::Duration;

use crate::backend::BlockMemory;
use crate::kernel::{MessageTrace, Sample, read_samples};

/// All samples that blocks keep which read the host's clock: by block, oldest first.
pub(super) fn read<'a>(blocks: impl Iterator<Item = &'a BlockMemory>) -> Vec<MessageTrace> {
    blocks
        .flat_map(|block| {
            read_samples(block.traces())
                .into_iter()
                .map(|sample| trace(block.index, &sample))
        })
        .collect()
}

fn trace(block: u32, sample: &Sample) -> MessageTrace {
    MessageTrace {
        block,
        sample: sample.number,
        correlation: sample.correlation,
        trace_id: (sample.trace_id != [0; 16]).then_some(sample.trace_id),
        sent_ns: (sample.sent_ns != 0).then_some(sample.sent_ns),
        seen_ns: sample.seen,
        done_ns: sample.done,
        clock_error: Duration::ZERO,
    }
}
