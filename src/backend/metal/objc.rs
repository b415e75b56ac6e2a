//! Metal itself, through `objc2-metal`. It has not run on hardware: it is type-checked.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use block2::RcBlock;
use objc2::AnyThread;
use objc2::rc::{Retained, autoreleasepool};
use objc2::runtime::ProtocolObject;
use objc2_foundation::{NSError, NSString};
use objc2_metal::{
    MTLBuffer, MTLCommandBuffer, MTLCommandBufferError, MTLCommandBufferStatus, MTLCommandEncoder,
    MTLCommandQueue, MTLCompileOptions, MTLComputeCommandEncoder, MTLComputePipelineState,
    MTLDevice, MTLLibrary, MTLResourceOptions, MTLSize,
};

use super::api::{Description, Done, Gpu, Pipeline, Queue, Shared, Slice};

/// Command buffers of a queue that are not done; two are ever committed.
const COMMAND_BUFFERS: usize = 4;

// `MTLCreateSystemDefaultDevice` needs it (documentation of the bindings).
#[cfg(target_os = "macos")]
#[link(name = "CoreGraphics", kind = "framework")]
unsafe extern "C" {}

/// Every device of the system. The list may be empty in a sandbox that lets its default device be used all the same.
pub(super) fn gpus() -> Vec<Arc<dyn Gpu>> {
    autoreleasepool(|_| {
        let mut all: Vec<_> = objc2_metal::MTLCopyAllDevices().iter().collect();
        if all.is_empty() {
            all.extend(objc2_metal::MTLCreateSystemDefaultDevice());
        }
        all.into_iter()
            .map(|device| Arc::new(Device(device)) as Arc<dyn Gpu>)
            .collect()
    })
}

/// Devices may be used by any thread (`MTLDevice: Send + Sync` in the bindings).
struct Device(Retained<ProtocolObject<dyn MTLDevice>>);

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.0.name()).finish()
    }
}

impl Gpu for Device {
    fn describe(&self) -> Description {
        autoreleasepool(|_| Description {
            name: self.0.name().to_string(),
            registry_id: self.0.registryID(),
            unified_memory: self.0.hasUnifiedMemory(),
            working_set_bytes: self.0.recommendedMaxWorkingSetSize(),
            max_buffer_bytes: self.0.maxBufferLength() as u64,
            max_threads: self.0.maxThreadsPerThreadgroup().width as u32,
            removable: self.0.isRemovable(),
        })
    }

    fn buffer(&self, bytes: usize) -> Option<Box<dyn Shared>> {
        // Shared storage; hazards are tracked, so that one slice of a kernel begins when the one before is done.
        let options = MTLResourceOptions::StorageModeShared;
        let buffer = self.0.newBufferWithLength_options(bytes, options)?;
        let start = buffer.contents().cast();
        Some(Box::new(SharedBuffer { buffer, start }))
    }

    fn pipeline(&self, source: &str) -> Result<Box<dyn Pipeline>, String> {
        autoreleasepool(|_| {
            let options = MTLCompileOptions::init(MTLCompileOptions::alloc());
            // Its successor `mathMode` is there since macOS 15 only.
            #[allow(deprecated)]
            options.setFastMathEnabled(false);
            let library = self
                .0
                .newLibraryWithSource_options_error(&NSString::from_str(source), Some(&options))
                .map_err(|error| text(&error))?;
            let function = library
                .newFunctionWithName(&NSString::from_str("rk_main"))
                .ok_or("the library has no kernel `rk_main`")?;
            let pipeline = self
                .0
                .newComputePipelineStateWithFunction_error(&function)
                .map_err(|error| text(&error))?;
            Ok(Box::new(State(pipeline)) as Box<dyn Pipeline>)
        })
    }

    fn queue(&self, label: &str) -> Option<Box<dyn Queue>> {
        let queue = self
            .0
            .newCommandQueueWithMaxCommandBufferCount(COMMAND_BUFFERS)?;
        queue.setLabel(Some(&NSString::from_str(label)));
        Some(Box::new(CommandQueue(queue)))
    }
}

fn text(error: &NSError) -> String {
    error.localizedDescription().to_string()
}

struct SharedBuffer {
    buffer: Retained<ProtocolObject<dyn MTLBuffer>>,
    start: NonNull<u8>,
}

// SAFETY: the framework's objects may be used by any thread (Metal documentation, "Thread safety"); what is in the buffer is the
// protocol's matter.
unsafe impl Send for SharedBuffer {}
// SAFETY: as above.
unsafe impl Sync for SharedBuffer {}

impl fmt::Debug for SharedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedBuffer").finish_non_exhaustive()
    }
}

impl Shared for SharedBuffer {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct State(Retained<ProtocolObject<dyn MTLComputePipelineState>>);

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").finish_non_exhaustive()
    }
}

impl Pipeline for State {
    fn max_threads(&self) -> u32 {
        self.0.maxTotalThreadsPerThreadgroup() as u32
    }

    fn simd_width(&self) -> u32 {
        self.0.threadExecutionWidth() as u32
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct CommandQueue(Retained<ProtocolObject<dyn MTLCommandQueue>>);

impl fmt::Debug for CommandQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandQueue").finish_non_exhaustive()
    }
}

impl Queue for CommandQueue {
    fn commit(&self, slice: &Slice<'_>, done: Done) -> Result<(), String> {
        autoreleasepool(|_| {
            let foreign = || "an object of another device".to_owned();
            let State(pipeline) = slice
                .pipeline
                .as_any()
                .downcast_ref::<State>()
                .ok_or_else(foreign)?;
            // It keeps references to what it uses until it is done.
            let commands = self.0.commandBuffer().ok_or("no command buffer")?;
            let encoder = commands
                .computeCommandEncoder()
                .ok_or("no command encoder")?;
            encoder.setComputePipelineState(pipeline);
            for (index, buffer) in slice.buffers.iter().enumerate() {
                let shared = buffer.as_any().downcast_ref::<SharedBuffer>();
                let Some(shared) = shared else {
                    // An encoder must be ended before it is released.
                    encoder.endEncoding();
                    return Err(foreign());
                };
                // SAFETY: `rk_main` stays within the buffers, whose sizes the launch words tell; what host and device do to them at
                // the same time are single words, ordered by the ring's protocol.
                unsafe { encoder.setBuffer_offset_atIndex(Some(&shared.buffer), 0, index) };
            }
            let words = NonNull::from(slice.launch).cast::<c_void>();
            // SAFETY: the words are copied by the call; they are `RkLaunch`, which `rk_main` expects at index 3.
            unsafe { encoder.setBytes_length_atIndex(words, slice.launch.len(), 3) };
            let size = |width: u32| MTLSize {
                width: width as usize,
                height: 1,
                depth: 1,
            };
            encoder.dispatchThreadgroups_threadsPerThreadgroup(
                size(slice.blocks),
                size(slice.threads),
            );
            encoder.endEncoding();
            let handler = RcBlock::new(
                move |commands: NonNull<ProtocolObject<dyn MTLCommandBuffer>>| {
                    // SAFETY: Metal hands its handler a live command buffer.
                    done(outcome(unsafe { commands.as_ref() }));
                },
            );
            // SAFETY: the block is live, and copied by the call; it may be run by any thread, as `Done` may.
            unsafe { commands.addCompletedHandler(RcBlock::as_ptr(&handler)) };
            commands.commit();
            Ok(())
        })
    }
}

/// How a command buffer ended.
fn outcome(commands: &ProtocolObject<dyn MTLCommandBuffer>) -> Result<(), String> {
    if commands.status() == MTLCommandBufferStatus::Completed {
        return Ok(());
    }
    let Some(error) = commands.error() else {
        return Err("a command buffer was not completed".into());
    };
    let name =
        usize::try_from(error.code()).map_or("unknown", |code| match MTLCommandBufferError(code) {
            MTLCommandBufferError::Internal => "internal error",
            MTLCommandBufferError::Timeout => "it took too long",
            MTLCommandBufferError::PageFault => "page fault",
            MTLCommandBufferError::AccessRevoked => "access revoked",
            MTLCommandBufferError::NotPermitted => "not permitted",
            MTLCommandBufferError::OutOfMemory => "out of memory",
            MTLCommandBufferError::InvalidResource => "invalid resource",
            MTLCommandBufferError::DeviceRemoved => "device removed",
            MTLCommandBufferError::StackOverflow => "stack overflow",
            _ => "unknown",
        });
    Err(format!(
        "a command buffer failed: {name} ({}): {}",
        error.code(),
        text(&error)
    ))
}
