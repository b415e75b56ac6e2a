//! What the host knows of device code in C++ (`kernels/ringkernel.h`), which CUDA and Metal share.

use std::sync::Arc;
use std::time::Duration;

use super::{BlockLayout, DispatchRequest, GridMemory};
use crate::error::Error;
use crate::ring::RingLayout;

/// How long a slice may take: far below every watchdog (from 2 s on Windows), even with another one queued.
const SLICE_LIMIT: Duration = Duration::from_millis(25);

/// Passes over the largest message that a handler's loops are charged with by default, in slices.
const DEFAULT_PASSES: u32 = 5;

/// The loop and the accessors, common to both.
pub(crate) const PRELUDE: &str = include_str!("../../kernels/ringkernel.h");

/// `RkLaunch` of the prelude, word for word.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaunchWords {
    host_to_device_words: u32,
    device_to_host_words: u32,
    state_words: u32,
    capacity: u32,
    slot_words: u32,
    pub(crate) epoch: u32,
    message_cost: u32,
    replies: u32,
    kinds: u32,
    telemetry: u32,
    resident: u32,
    pub(crate) fresh: u32,
    slice_ns: u32,
    nap_ns: u32,
    trace_every: u32,
}

// SAFETY: words of 4 bytes each, in C's layout: nothing lies between or behind them.
unsafe impl bytemuck::NoUninit for LaunchWords {}

impl LaunchWords {
    /// For a kernel whose rings and state have this layout.
    pub(crate) fn new(
        request: &DispatchRequest,
        layout: BlockLayout,
        replies: u32,
        message_cost: u32,
        resident: bool,
        nap_ns: u32,
    ) -> Self {
        // Shares are smaller than 2^32 bytes: `RingLayout` and the backend's memory limits see to that.
        let words = |bytes: usize| (bytes / 4) as u32;
        Self {
            host_to_device_words: words(layout.host_to_device()),
            device_to_host_words: words(layout.device_to_host()),
            state_words: layout.state_words(),
            capacity: layout.ring.capacity(),
            slot_words: words(layout.ring.stride()),
            epoch: 0,
            message_cost,
            replies,
            kinds: request.types.last_kind(),
            telemetry: request.telemetry.into(),
            resident: resident.into(),
            fresh: 1,
            slice_ns: SLICE_LIMIT.as_nanos() as u32,
            nap_ns,
            trace_every: request.trace_every,
        }
    }
}

fn invalid<T>(option: &'static str, reason: String) -> Result<T, Error> {
    Err(Error::InvalidOption { option, reason })
}

/// The memory of a grid that is to be launched.
pub(crate) fn grid(request: &DispatchRequest) -> Result<Arc<GridMemory>, Error> {
    match request.blocks.first() {
        Some(first) => Ok(Arc::clone(&first.memory.grid)),
        None => invalid("grid", "it has no blocks".into()),
    }
}

/// Fails if a ring has no room for the replies that a kernel declares.
pub(crate) fn check_replies(kernel: &str, replies: u32, ring: RingLayout) -> Result<(), Error> {
    if replies > ring.capacity() {
        return invalid(
            "queue_capacity",
            format!(
                "{} slots are fewer than the {replies} replies that kernel '{kernel}' declares",
                ring.capacity()
            ),
        );
    }
    Ok(())
}

/// A block's threads, rounded up to whole groups of those that run in lockstep, which is what a device runs at least.
pub(crate) fn whole_groups(
    request: &DispatchRequest,
    group: u32,
    most: u32,
    device: &str,
) -> Result<u32, Error> {
    let threads = request
        .block_size
        .count()
        .next_multiple_of(group.max(1).into());
    match u32::try_from(threads) {
        Ok(threads) if threads <= most => Ok(threads),
        _ => invalid(
            "block size",
            format!(
                "{threads} threads exceed the {most} of kernel '{}' on '{device}'",
                request.signals.name
            ),
        ),
    }
}

/// What one run of a handler is charged of a slice's polls.
pub(crate) fn message_cost(loop_iterations: Option<u32>, ring: RingLayout, threads: u32) -> u32 {
    let words = (ring.stride() / 4) as u32;
    loop_iterations
        .unwrap_or_else(|| words.div_ceil(threads).saturating_mul(DEFAULT_PASSES))
        .saturating_add(1)
}

#[cfg(all(test, feature = "vulkan"))]
mod tests {
    use super::*;

    #[test]
    fn the_prelude_has_the_layouts_of_the_host() {
        use crate::backend::layouts;
        let lines = PRELUDE.lines();
        let mut constants = layouts::constants(
            lines.filter_map(|line| line.strip_prefix("#define ")?.split_once(' ')),
        );
        layouts::check(&mut constants);
        layouts::check_traces(&mut constants, true);
        layouts::check_ways(&mut constants);
        // What is the loop's own, and what it says to itself.
        for name in [
            "RK_RUN",
            "RK_TERMINATE",
            "RK_STALE",
            "RK_POLLS",
            "RK_MESSAGES",
            "RK_LOOKS_PER_BEAT",
            "RK_LOOK_NS",
            "RK_MAX_THREADS",
            "RK_SHARED_WORDS",
        ] {
            assert!(constants.remove(name).is_some(), "{name}");
        }
        assert!(constants.is_empty(), "not checked: {constants:?}");
        // The host's line is read by one access of four words.
        assert!(PRELUDE.contains("#define RK_HOST_EPOCH 3u"));
        let words = LaunchWords {
            host_to_device_words: 0,
            device_to_host_words: 0,
            state_words: 0,
            capacity: 0,
            slot_words: 0,
            epoch: 0,
            message_cost: 0,
            replies: 0,
            kinds: 0,
            telemetry: 0,
            resident: 0,
            fresh: 0,
            slice_ns: 0,
            nap_ns: 0,
            trace_every: 0,
        };
        let debug = format!("{words:?}");
        assert_eq!(
            layouts::fields(PRELUDE, "struct RkLaunch {"),
            layouts::debug_fields(&debug)
        );
        assert_eq!(size_of::<LaunchWords>(), 15 * 4);
    }
}
