//! A kernel on a Vulkan device: its pipeline, its buffers, and what its slices need.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ash::vk;
use parking_lot::Mutex;

use super::context::{BINDINGS, Context, PushConstants, Specialization};
use super::memory::Buffer;
use crate::backend::resident::life;
use crate::backend::{
    BlockMemory, DeviceMemory, DispatchRequest, GridMemory, Handler, Next, Resident,
};
use crate::error::Error;
use crate::kernel::ShaderCode;
use crate::kernel::outlet::Warden;

/// Software drivers run a shader in SIMD groups, 8 invocations each as a rule. A block that is no multiple of them has
/// invocations that exist in part, and whose loops do not end (measured on lavapipe of Mesa 22.3). A block of one group is
/// run in lockstep; larger ones are multiples of this. So they are elsewhere: four invocations of each subgroup read a
/// request's header.
const BLOCK_UNIT: u32 = 16;

/// Passes over the largest message that a handler's loops are charged with by default.
const DEFAULT_PASSES: u32 = 5;

/// The prelude's own loop iterations a message: the check for cut loops, and the ends of loops.
const OWN_ITERATIONS: u32 = 6;

/// Loop iterations of a whole dispatch on software drivers: lavapipe ends loops silently after 65 535 (Mesa,
/// `LP_MAX_TGSI_LOOP_ITERATIONS`).
pub(super) const SOFTWARE_ITERATIONS: u32 = 60_000;

/// SIMD groups whose slices may have all of these iterations: slices of 16 ms, at some 60 ns for each group's turn (lavapipe).
const FEW_GROUPS: u32 = 4;

/// What a slice has at least beside one run of the handler.
const LEAST_BUDGET: u32 = 1_000;

/// Most iterations of one handler run elsewhere: what a watchdog allows is a matter of time, not of iterations.
const HARDWARE_ITERATIONS: u32 = 1 << 30;

/// A launched kernel.
pub(super) struct SliceKernel {
    pub(super) context: Arc<Context>,
    /// What the host's endpoints see of it.
    resident: Resident,
    /// What the shader sees; the same memory on a device with resident dispatches.
    device_grid: Arc<GridMemory>,
    /// In exchange mode, the memory through which the host reaches the shader's.
    relay_blocks: Vec<Arc<BlockMemory>>,
    pub(super) pipeline: vk::Pipeline,
    /// For slices whose replies go into the kernel's own ring, and for those whose replies go into another kernel's.
    sets: [vk::DescriptorSet; 2],
    pool: vk::DescriptorPool,
    /// Where replies go, if into another kernel's ring.
    next: Mutex<Option<Next>>,
    constants: PushConstants,
    /// SIMD groups of a block, on a software driver.
    simd_groups: u32,
    /// Whether its blocks read a clock that shows its low word alone, and must be told the rest.
    needs_clock_half: bool,
}

impl Deref for SliceKernel {
    type Target = Resident;

    fn deref(&self) -> &Resident {
        &self.resident
    }
}

impl fmt::Debug for SliceKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SliceKernel")
            .field("name", &self.signals.name)
            .field("finished", &self.is_finished())
            .finish_non_exhaustive()
    }
}

impl SliceKernel {
    /// Prepares everything that the slices of a kernel need. `device_grid` is what the shader will see, `short_clock` whether its clock shows
    /// its low word alone.
    pub(super) fn new(
        context: &Arc<Context>,
        request: DispatchRequest,
        device_grid: Arc<GridMemory>,
        relay_blocks: Vec<Arc<BlockMemory>>,
        short_clock: bool,
    ) -> Result<Self, Error> {
        let software = context.physical.software;
        let kernel = request.signals.name.clone();
        let Handler::Shader(code) = &request.handler else {
            return Err(Error::NoHandler {
                kernel,
                backend: context.physical.info.backend.name(),
            });
        };
        let layout = device_grid.layout;
        let specialization = specialization(context, request.block_size.count())?;
        let block_size = specialization.block_size;
        check_blocks(context, request.grid.count())?;
        let slot_words = (layout.ring.stride() / 4) as u32;
        if code.replies > layout.ring.capacity() {
            return Err(Error::InvalidOption {
                option: "queue_capacity",
                reason: format!(
                    "{} slots are fewer than the {} replies that kernel '{kernel}' declares",
                    layout.ring.capacity(),
                    code.replies
                ),
            });
        }
        let constants = PushConstants {
            host_to_device_words: words(layout.host_to_device()),
            device_to_host_words: words(layout.device_to_host()),
            state_words: layout.state_words(),
            capacity: layout.ring.capacity(),
            slot_words,
            epoch: 0,
            message_cost: message_cost(code, slot_words, block_size, software)?,
            replies: code.replies,
            kinds: request.types.last_kind(),
            telemetry: request.telemetry.into(),
            next_capacity: 0,
            next_slot_words: 0,
            next_offset: 0,
            two: 2,
            trace_every: request.trace_every,
        };
        let is_traced = constants.trace_every > 0;
        let source = code.traced_source().filter(|_| is_traced);
        let source = source.unwrap_or(&code.source);
        let pipeline = context.pipeline(&kernel, source, is_traced, specialization)?;
        let mut kernel = Self {
            context: Arc::clone(context),
            resident: Resident::new(request),
            device_grid,
            relay_blocks,
            pipeline,
            sets: [vk::DescriptorSet::null(); 2],
            pool: vk::DescriptorPool::null(),
            next: Mutex::new(None),
            constants,
            simd_groups: block_size.div_ceil(context.physical.subgroup_size.max(1)),
            needs_clock_half: is_traced && short_clock,
        };
        kernel.bind()?;
        Ok(kernel)
    }

    fn bind(&mut self) -> Result<(), Error> {
        let context = Arc::clone(&self.context);
        let count = self.sets.len() as u32;
        let sizes = [vk::DescriptorPoolSize::default()
            .ty(vk::DescriptorType::STORAGE_BUFFER)
            .descriptor_count(count * BINDINGS)];
        let info = vk::DescriptorPoolCreateInfo::default()
            .max_sets(count)
            .pool_sizes(&sizes);
        // SAFETY: the device is live; the sizes live until the call returns.
        self.pool = context.check("create a descriptor pool", unsafe {
            context.raw.create_descriptor_pool(&info, None)
        })?;
        let layouts = [context.set_layout; 2];
        let info = vk::DescriptorSetAllocateInfo::default()
            .descriptor_pool(self.pool)
            .set_layouts(&layouts);
        // SAFETY: pool and layout are this device's, and the pool has room for so many sets.
        let sets = context.check("allocate descriptor sets", unsafe {
            context.raw.allocate_descriptor_sets(&info)
        })?;
        for set in &sets {
            context.set_name(*set, &self.signals.name);
        }
        if let Some(sets) = sets.first_chunk() {
            self.sets = *sets;
        }
        let own = raw_buffer(&self.device_grid.device_to_host);
        self.fill(self.sets[0], own);
        Ok(())
    }

    /// Says to a set which buffers its slices see, and that their replies go into this one. It must not be in use.
    fn fill(&self, set: vk::DescriptorSet, replies: vk::Buffer) {
        let buffers = self.buffers(replies).map(|buffer| {
            [vk::DescriptorBufferInfo::default()
                .buffer(buffer)
                .range(vk::WHOLE_SIZE)]
        });
        let writes: Vec<_> = buffers
            .iter()
            .zip(0..)
            .map(|(info, binding)| {
                vk::WriteDescriptorSet::default()
                    .dst_set(set)
                    .dst_binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .buffer_info(info)
            })
            .collect();
        // SAFETY: set and buffers are this device's; the kernel's own live as long as `self`, those of the next kernel are held as
        // long as the set may be used with them. The caller says that it is not in use.
        unsafe { self.context.raw.update_descriptor_sets(&writes, &[]) };
    }

    /// The buffers that the shader sees, in the order of their bindings. A kernel without state gets its own replies' once
    /// more, which its handler has no business to touch.
    fn buffers(&self, replies: vk::Buffer) -> [vk::Buffer; BINDINGS as usize] {
        let grid = &self.device_grid;
        let own = raw_buffer(&grid.device_to_host);
        [
            raw_buffer(&grid.host_to_device),
            own,
            self.state_buffer().unwrap_or(own),
            replies,
        ]
    }

    /// Leads replies to where they are to go now. No slice of the kernel may be in flight, nor what was recorded of it be submitted again.
    pub(super) fn exchange(&self, warden: Arc<dyn Warden>) {
        self.stop_passing();
        // In exchange mode it reads what the relay writes.
        let mut own = self.relay_blocks.iter().chain(&self.blocks);
        if let Some(next) = own
            .next()
            .and_then(|own| self.take_outlet(Arc::clone(own), warden))
        {
            let grid = &next.block.grid;
            let grid = grid.behind.get().unwrap_or(grid);
            self.fill(self.sets[1], raw_buffer(&grid.host_to_device));
            *self.next.lock() = Some(next);
        }
    }

    /// Leads replies into the kernel's own ring again, as `exchange`.
    pub(super) fn stop_passing(&self) {
        self.give_back();
        self.next.lock().take();
    }

    /// How far the kernel that its replies are passed on to has read, if there is one.
    pub(super) fn next_cursor(&self) -> Option<u32> {
        let next = self.next.lock();
        let cursor = next.as_ref()?.block.request_cursor();
        Some(cursor.load(Ordering::Acquire))
    }

    /// Whether its replies go into the ring of that kernel; of any, if none is named.
    pub(super) fn passes_to(&self, other: Option<&Self>) -> bool {
        let next = self.next.lock();
        next.as_ref().is_some_and(|next| {
            other.is_none_or(|other| {
                let block = other.blocks.first();
                block.is_some_and(|block| Arc::ptr_eq(block, &next.block))
            })
        })
    }

    /// What a slice is bound to.
    pub(super) fn set(&self) -> vk::DescriptorSet {
        self.sets[usize::from(self.next.lock().is_some())]
    }

    /// The state's buffer, if the kernel has state.
    pub(super) fn state_buffer(&self) -> Option<vk::Buffer> {
        self.device_grid.state.as_ref().map(raw_buffer)
    }

    /// Whether the state still has to be zeroed by the device.
    pub(super) fn needs_fill(&self) -> bool {
        self.device_grid
            .state
            .as_ref()
            .is_some_and(|state| state.host_ptr().is_none())
    }

    pub(super) fn device_grid(&self) -> &Arc<GridMemory> {
        &self.device_grid
    }

    pub(super) fn relay_blocks(&self) -> &[Arc<BlockMemory>] {
        &self.relay_blocks
    }

    /// Slots of each ring.
    pub(super) fn capacity(&self) -> u32 {
        self.device_grid.layout.ring.capacity()
    }

    /// Replies that one run of the handler may write.
    pub(super) fn replies(&self) -> u32 {
        self.constants.replies
    }

    /// Iterations of a slice on a software driver: whatever is begun must end before the driver's own limit. Fewer for large blocks,
    /// whose SIMD groups take turns at each.
    pub(super) fn software_budget(&self) -> u32 {
        let whole = SOFTWARE_ITERATIONS - self.constants.message_cost;
        whole.min((FEW_GROUPS * SOFTWARE_ITERATIONS / self.simd_groups).max(LEAST_BUDGET))
    }

    /// A number that changes with every progress of its slices that the host can see while they
    /// run.
    pub(super) fn life(&self) -> u32 {
        match &self.relay_blocks[..] {
            [] => life(&self.blocks),
            blocks => life(blocks),
        }
    }

    /// Workgroups of a slice.
    pub(super) fn groups(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Tells blocks whose clock shows its low word alone in which half of that word's range it is. To be called before slices are submitted, and
    /// while they run: what they know must be less than half a range old (2.1 s of a clock that counts nanoseconds).
    pub(super) fn tell_clock_half(&self) {
        if !self.needs_clock_half {
            return;
        }
        let Some(ticks) = self.context.ticks() else {
            return;
        };
        let blocks = match &self.relay_blocks[..] {
            [] => &self.blocks[..],
            blocks => blocks,
        };
        for block in blocks {
            block.control().set_clock_half((ticks >> 31) as u32);
        }
    }

    /// The push constants of a slice of this epoch.
    pub(super) fn constants(&self, epoch: u32) -> PushConstants {
        let mut constants = PushConstants {
            epoch,
            ..self.constants
        };
        if let Some(next) = &*self.next.lock() {
            let ring = next.block.grid.layout.ring;
            constants.next_capacity = ring.capacity();
            constants.next_slot_words = words(ring.stride());
            constants.next_offset = next.offset;
        }
        constants
    }
}

impl Drop for SliceKernel {
    fn drop(&mut self) {
        if !self.context.is_abandoned() {
            // SAFETY: the lane holds the kernel until its last slice is done, so that the set is not in use; destroyed
            // once. Null is allowed.
            unsafe {
                self.context.raw.destroy_descriptor_pool(self.pool, None);
            }
        }
    }
}

fn words(bytes: usize) -> u32 {
    // Buffers are smaller than 2^32 bytes (`max_buffer_bytes`), so that no share exceeds it either.
    (bytes / 4) as u32
}

/// The Vulkan buffer behind a piece of memory that this backend made.
pub(super) fn raw_buffer(memory: &Arc<dyn DeviceMemory>) -> vk::Buffer {
    memory
        .as_any()
        .downcast_ref::<Buffer>()
        .map(Buffer::raw)
        .unwrap_or_default()
}

/// The block size that the device will run, and how.
fn specialization(context: &Context, asked: u64) -> Result<Specialization, Error> {
    let physical = &context.physical;
    let group: u64 = physical.subgroup_size.into();
    let lockstep = physical.software && asked <= group;
    let unit = match physical.software {
        true => group.max(BLOCK_UNIT.into()),
        false => BLOCK_UNIT.into(),
    };
    let size = match lockstep {
        true => group,
        false => asked.checked_next_multiple_of(unit).unwrap_or(u64::MAX),
    };
    match u32::try_from(size) {
        Ok(block_size) if block_size <= physical.max_block_threads => Ok(Specialization {
            block_size,
            lockstep: lockstep.into(),
        }),
        _ => Err(Error::InvalidOption {
            option: "block size",
            reason: format!(
                "{size} threads exceed the {} of device '{}'",
                physical.max_block_threads,
                context.name()
            ),
        }),
    }
}

fn check_blocks(context: &Context, blocks: u64) -> Result<(), Error> {
    let limit = context.physical.max_blocks;
    if blocks <= limit.into() {
        return Ok(());
    }
    Err(Error::InvalidOption {
        option: "grid",
        reason: format!(
            "{blocks} blocks exceed the {limit} of device '{}'",
            context.name()
        ),
    })
}

/// Loop iterations that one run of the handler may take.
fn message_cost(
    code: &ShaderCode,
    slot_words: u32,
    block_size: u32,
    software: bool,
) -> Result<u32, Error> {
    let limit = if software {
        SOFTWARE_ITERATIONS - LEAST_BUDGET
    } else {
        HARDWARE_ITERATIONS
    };
    let cost = code
        .loop_iterations
        .unwrap_or_else(|| {
            slot_words
                .div_ceil(block_size)
                .saturating_mul(DEFAULT_PASSES)
        })
        .saturating_add(OWN_ITERATIONS);
    if cost < limit {
        return Ok(cost);
    }
    Err(Error::InvalidOption {
        option: "loop iterations",
        reason: format!(
            "a message may take {cost}, a dispatch on this device ends after {limit}: declare fewer, or use larger blocks \
             or smaller messages"
        ),
    })
}
