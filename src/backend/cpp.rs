//! What the host knows of device code in C++ (`kernels/ringkernel.h`), which CUDA and Metal share.

use std::time::Duration;

use super::{BlockLayout, DispatchRequest};

/// How long a slice may take: far below every watchdog (from 2 s on Windows), even with another one queued.
const SLICE_LIMIT: Duration = Duration::from_millis(25);

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
}

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
            state_words: words(layout.state()),
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
        }
    }
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
        };
        let debug = format!("{words:?}");
        assert_eq!(
            layouts::fields(PRELUDE, "struct RkLaunch {"),
            layouts::debug_fields(&debug)
        );
        assert_eq!(size_of::<LaunchWords>(), 14 * 4);
    }
}
