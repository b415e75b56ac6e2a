//! What a waiting thread knows of those that it waits for, so that it does not spin on the core
//! that they need.

/// Those that a caller waits for.
pub(crate) trait Awaited {
    /// Whether they need a core and are not among the threads that spin by a permit: one must be
    /// left for them.
    fn needs_core(&self) -> bool;

    /// Whether they are bound to this core.
    fn is_on(&self, core: usize) -> bool;

    /// While they have something to do: a number that changes as long as they run, and not within a
    /// run of code that is not ours.
    fn progress(&self) -> Option<u64>;
}

/// Threads of which nothing is known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AnyThread;

impl Awaited for AnyThread {
    fn needs_core(&self) -> bool {
        true
    }

    fn is_on(&self, _core: usize) -> bool {
        false
    }

    fn progress(&self) -> Option<u64> {
        None
    }
}
