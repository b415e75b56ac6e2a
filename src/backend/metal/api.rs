//! What the backend asks of Metal. `objc` asks the framework; tests ask this CPU.

// Nobody implements it elsewhere.
#![cfg_attr(not(target_os = "macos"), allow(dead_code))]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;

/// An `MTLDevice`.
pub(super) trait Gpu: Send + Sync + fmt::Debug {
    fn describe(&self) -> Description;

    /// A buffer in shared storage, or `None` if there is no memory for it.
    fn buffer(&self, bytes: usize) -> Option<Box<dyn Shared>>;

    /// Compiles a library and makes a pipeline of its function `rk_main`; the compiler's log if that fails.
    fn pipeline(&self, source: &str) -> Result<Box<dyn Pipeline>, String>;

    /// A command queue, whose command buffers run one after the other as far as they use the same buffers; `None` if there are
    /// no more.
    fn queue(&self, label: &str) -> Option<Box<dyn Queue>>;
}

/// What a device says of itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Description {
    pub(super) name: String,
    pub(super) registry_id: u64,
    /// Whether it shares the host's memory.
    pub(super) unified_memory: bool,
    /// Bytes that it should not exceed.
    pub(super) working_set_bytes: u64,
    pub(super) max_buffer_bytes: u64,
    pub(super) max_threads: u32,
    pub(super) removable: bool,
}

/// An `MTLBuffer` that host and device see.
pub(super) trait Shared: Send + Sync + fmt::Debug {
    /// Where the host sees it.
    fn start(&self) -> NonNull<u8>;

    fn as_any(&self) -> &dyn Any;
}

/// An `MTLComputePipelineState`.
pub(super) trait Pipeline: Send + Sync + fmt::Debug {
    /// Most threads of a block.
    fn max_threads(&self) -> u32;

    /// Threads that run in lockstep.
    fn simd_width(&self) -> u32;

    fn as_any(&self) -> &dyn Any;
}

/// An `MTLCommandQueue`.
pub(super) trait Queue: Send + Sync + fmt::Debug {
    /// Commits one slice in a command buffer of its own, and returns at once. The command buffer keeps what it uses alive. `done`
    /// is called when it is done, or has failed, with the reason; never if this fails.
    fn commit(&self, slice: &Slice<'_>, done: Done) -> Result<(), String>;
}

/// What to call when a slice is done.
pub(super) type Done = Box<dyn Fn(Result<(), String>) + Send + Sync>;

/// One dispatch of `rk_main`.
pub(super) struct Slice<'a> {
    pub(super) pipeline: &'a dyn Pipeline,
    /// Its `[[buffer(0)]]` to `[[buffer(2)]]`.
    pub(super) buffers: [&'a dyn Shared; 3],
    /// Its `[[buffer(3)]]`.
    pub(super) launch: &'a [u8],
    pub(super) blocks: u32,
    pub(super) threads: u32,
}
