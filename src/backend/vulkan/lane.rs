//! A queue of a device and the thread behind it, which keeps the slices of its kernels coming.
//!
//! Two command buffers are always submitted: while the slices of one run, the other waits its turn, and the thread sleeps
//! until the first is done and submits it again. Each holds many *steps*; a step is one slice of each running kernel, so
//! that kernels on one queue take turns. Commands to a kernel are stores to its control block, which the running slice
//! sees. Only when the set of running kernels changes must the command buffers be made anew: the *epoch* is raised then,
//! and slices of an older one fall through at once.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ash::vk;
use parking_lot::Mutex;

use super::context::Context;
use super::relay::Relay;
use super::slice_kernel::{SOFTWARE_ITERATIONS, SliceKernel};
use crate::backend::slices::{Attention, PARKING_IDLE_POLLS, Pace, SHARED_POLLS};
use crate::backend::stall::{Stall, StallLimits};
use crate::backend::{ExecutionMode, Keeper};
use crate::error::Error;
use crate::kernel::outlet::Warden;
use crate::kernel::{BlockState, FailureReason, KernelFailure};
use crate::logging;
use crate::thread::affinity;
use crate::thread::bounded::{BoundedThread, Join};
use crate::time::Deadline;

/// Command buffers that take turns.
const BATCHES: usize = 2;

/// Between two looks whether the device is lost, during one fence wait.
const FENCE_CHUNK: Duration = Duration::from_millis(20);

/// Longest sleep without work.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// Slices in a row in a command buffer: while kernels have the queue for themselves, on a software device and on hardware; and
/// while a sleeping kernel may want its turn.
const SOFTWARE_STEPS: u32 = 16;
const HARDWARE_STEPS: u32 = 4;
const IMPATIENT_STEPS: u32 = 2;

/// How often a submission without memory is tried again, and how long after.
const SUBMIT_TRIES: u32 = 100;
const SUBMIT_INTERVAL: Duration = Duration::from_millis(1);

/// Empty polls after which a slice ends while several blocks share an execution unit: whoever has nothing to do gives way at
/// once.
const SHARED_IDLE_POLLS: u32 = 48;

/// What everybody may ask of a lane.
pub(super) struct LaneHandle {
    context: Arc<Context>,
    inbox: Mutex<Vec<Arc<SliceKernel>>>,
    /// Kernels that are on the lane, for whoever makes it look.
    members: Mutex<Vec<Arc<SliceKernel>>>,
    epoch: AtomicU32,
    stop: AtomicBool,
}

impl fmt::Debug for LaneHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaneHandle")
            .field("device", &self.context.name())
            .field("kernels", &self.load())
            .finish_non_exhaustive()
    }
}

impl LaneHandle {
    /// Kernels on the lane.
    pub(super) fn load(&self) -> usize {
        self.members.lock().len()
    }

    /// Puts a kernel on the lane.
    pub(super) fn admit(&self, kernel: Arc<SliceKernel>) {
        {
            let mut members = self.members.lock();
            let epoch = self.epoch.load(Ordering::Relaxed);
            for block in &kernel.blocks {
                block.control().set_epoch(epoch);
            }
            members.push(Arc::clone(&kernel));
            self.inbox.lock().push(kernel);
        }
        self.context.doorbell.notify();
    }

    fn remove(&self, kernel: &Arc<SliceKernel>) {
        self.members
            .lock()
            .retain(|member| !Arc::ptr_eq(member, kernel));
    }
}

impl Keeper for LaneHandle {
    /// Makes all slices in flight end at once, so that the lane looks at its kernels again. Those that go on lose some
    /// 100 us by it.
    fn look(&self) {
        {
            let members = self.members.lock();
            let epoch = self.epoch.load(Ordering::Relaxed).wrapping_add(1);
            self.epoch.store(epoch, Ordering::Release);
            for block in members.iter().flat_map(|kernel| &kernel.blocks) {
                block.control().set_epoch(epoch);
            }
        }
        self.context.doorbell.notify();
    }
}

impl Warden for LaneHandle {
    fn call(&self) {
        self.look();
    }
}

/// A lane, for the device that owns it.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) handle: Arc<LaneHandle>,
    thread: BoundedThread,
    /// How long its end is waited for.
    patience: Duration,
}

impl Lane {
    /// Starts the thread of a queue, on one of `cores` if any are named.
    pub(super) fn start(
        context: &Arc<Context>,
        queue_index: u32,
        mode: ExecutionMode,
        cores: Vec<usize>,
        limits: StallLimits,
    ) -> Result<Self, Error> {
        let handle = Arc::new(LaneHandle {
            context: Arc::clone(context),
            inbox: Mutex::new(Vec::new()),
            members: Mutex::new(Vec::new()),
            epoch: AtomicU32::new(1),
            stop: AtomicBool::new(false),
        });
        let bridge = Bridge::new(Arc::clone(&handle), queue_index, mode, limits)?;
        let name = format!("rk-bridge-{}-{queue_index}", context.physical.info.index);
        let thread = BoundedThread::spawn(name, move || {
            if let Err(error) = affinity::prefer_cores(&cores) {
                logging::warning!("the thread of a Vulkan queue runs anywhere: {error}");
            }
            bridge.run();
        })
        .map_err(|source| Error::Os {
            operation: "start the thread of a Vulkan queue",
            source,
        })?;
        Ok(Self {
            handle,
            thread,
            patience: limits.thread_end(),
        })
    }
}

impl Drop for Lane {
    /// Ends the thread. Bounded: a fence that never signals ends the device, and a thread that a
    /// driver keeps is left behind.
    fn drop(&mut self) {
        let _deferral = logging::defer();
        self.handle.stop.store(true, Ordering::Release);
        self.handle.look();
        match self.thread.join(Deadline::after(self.patience)) {
            Join::Ended => {}
            Join::Panicked => logging::error!("the thread of a Vulkan queue panicked"),
            Join::LeftBehind(place) => {
                logging::error!("the thread of a Vulkan queue is left behind: {place}");
            }
        }
    }
}

/// A kernel as its lane sees it.
#[derive(Debug)]
struct Member {
    kernel: Arc<SliceKernel>,
    /// In exchange mode, what carries its messages.
    relay: Option<Relay>,
    attention: Attention,
}

impl Member {
    fn new(kernel: Arc<SliceKernel>, relay: Option<Relay>) -> Self {
        Self {
            kernel,
            relay,
            attention: Attention::new(false),
        }
    }

    fn wants_slices(&self, now: Instant) -> bool {
        self.attention.wants_slices(&self.kernel, now)
    }
}

/// A command buffer with its fence.
#[derive(Debug)]
struct Batch {
    commands: vk::CommandBuffer,
    fence: vk::Fence,
    /// What is recorded in it, and for which epoch.
    kernels: Vec<Arc<SliceKernel>>,
    epoch: u32,
    steps: u32,
    /// The polls of its slices if these alone end them; 0 otherwise.
    polls: u32,
    submitted: Instant,
}

/// The thread's own.
struct Bridge {
    handle: Arc<LaneHandle>,
    context: Arc<Context>,
    queue: vk::Queue,
    pool: vk::CommandPool,
    batches: Vec<Batch>,
    /// Indices of submitted batches, the oldest first.
    in_flight: VecDeque<usize>,
    members: Vec<Member>,
    mode: ExecutionMode,
    software: bool,
    /// How long a slice lasts that has its queue for itself.
    pace: Pace,
    limits: StallLimits,
    last_done: Instant,
}

impl Bridge {
    fn new(
        handle: Arc<LaneHandle>,
        queue_index: u32,
        mode: ExecutionMode,
        limits: StallLimits,
    ) -> Result<Self, Error> {
        let context = Arc::clone(&handle.context);
        let software = context.physical.software;
        let family = context.physical.family;
        // SAFETY: the device was created with this many queues of this family.
        let queue = unsafe { context.raw.get_device_queue(family, queue_index) };
        context.set_name(queue, &format!("rk-queue-{queue_index}"));
        let info = vk::CommandPoolCreateInfo::default()
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER)
            .queue_family_index(family);
        // From here on, dropping `bridge` undoes whatever was done.
        let mut bridge = Self {
            queue,
            pool: vk::CommandPool::null(),
            batches: Vec::new(),
            in_flight: VecDeque::with_capacity(BATCHES),
            members: Vec::new(),
            mode,
            software,
            pace: match software {
                true => Pace::software(SOFTWARE_ITERATIONS),
                false => Pace::hardware(),
            },
            limits,
            last_done: Instant::now(),
            context: Arc::clone(&context),
            handle,
        };
        // SAFETY: the device is live, the family is one of its own.
        bridge.pool = context.check("create a command pool", unsafe {
            context.raw.create_command_pool(&info, None)
        })?;
        let info = vk::CommandBufferAllocateInfo::default()
            .command_pool(bridge.pool)
            .level(vk::CommandBufferLevel::PRIMARY)
            .command_buffer_count(BATCHES as u32);
        // SAFETY: the pool was just created.
        let commands = context.check("allocate command buffers", unsafe {
            context.raw.allocate_command_buffers(&info)
        })?;
        for (index, commands) in commands.into_iter().enumerate() {
            // SAFETY: the device is live.
            let fence = context.check("create a fence", unsafe {
                context
                    .raw
                    .create_fence(&vk::FenceCreateInfo::default(), None)
            })?;
            context.set_name(commands, &format!("rk-batch-{index}"));
            context.set_name(fence, &format!("rk-batch-{index}-done"));
            bridge.batches.push(Batch {
                commands,
                fence,
                kernels: Vec::new(),
                epoch: 0,
                steps: 0,
                polls: 0,
                submitted: Instant::now(),
            });
        }
        Ok(bridge)
    }

    fn run(mut self) {
        loop {
            // What is logged while the lane holds locks, or a driver calls back, leaves at the end
            // of the round.
            let deferral = logging::defer();
            let mut failed = self.admit();
            if failed.is_none() && self.context.lost().is_none() {
                failed = match self.mode {
                    ExecutionMode::Resident => self.keep_resident(),
                    _ => self.exchange(),
                }
                .err();
            }
            if let Some(error) = failed {
                // Whatever the driver refuses leaves kernels without slices: the device is lost for them.
                self.context.lose(error.to_string());
            }
            if self.context.lost().is_some() {
                self.lose_all();
            }
            if self.handle.stop.load(Ordering::Acquire)
                && self.members.is_empty()
                && self.in_flight.is_empty()
            {
                return;
            }
            drop(deferral);
            if self.in_flight.is_empty() {
                self.sleep();
            }
        }
    }

    /// Takes new kernels onto the lane.
    fn admit(&mut self) -> Option<Error> {
        let admitted = std::mem::take(&mut *self.handle.inbox.lock());
        let mut failed = None;
        for kernel in admitted {
            let relay = match self.mode {
                ExecutionMode::Resident => None,
                mode => Some(Relay::new(&kernel, mode == ExecutionMode::Staged)),
            };
            match self.prepare(&kernel, relay.as_ref()) {
                // Nothing of it has run: only this kernel goes without.
                Err(error @ Error::OutOfMemory { .. }) => kernel.fail(KernelFailure {
                    reason: FailureReason::Fault,
                    message: format!("its memory could not be prepared: {error}"),
                    block: None,
                    request: None,
                }),
                prepared => failed = failed.or(prepared.err()),
            }
            self.members.push(Member::new(kernel, relay));
        }
        failed
    }

    /// Fills what the host could not fill itself.
    fn prepare(&mut self, kernel: &Arc<SliceKernel>, relay: Option<&Relay>) -> Result<(), Error> {
        let staged = relay.is_some_and(Relay::is_staged);
        if !kernel.needs_fill() && !staged {
            return Ok(());
        }
        self.drain()?;
        let context = Arc::clone(&self.context);
        let raw = &context.raw;
        self.record(0, |commands| {
            if let Some(state) = kernel.state_buffer()
                && kernel.needs_fill()
            {
                // SAFETY: the buffer lives as long as the kernel, which is held until the batch is done.
                unsafe { raw.cmd_fill_buffer(commands, state, 0, vk::WHOLE_SIZE, 0) };
            }
            if let Some(relay) = relay {
                relay.record_first_copy(raw, commands);
            }
            transfer_barrier(&context, commands);
        })?;
        self.submit(0)?;
        self.drain()
    }

    /// One round of a device with resident dispatches: submits what is missing, and waits for the oldest batch.
    fn keep_resident(&mut self) -> Result<(), Error> {
        self.settle();
        let now = Instant::now();
        let running: Vec<Arc<SliceKernel>> = self
            .members
            .iter()
            .filter(|member| member.wants_slices(now) && !member.kernel.wants_exchange())
            .map(|member| Arc::clone(&member.kernel))
            .collect();
        let running = upstream_first(running);
        let polls = self.set_budgets(&running);
        while !running.is_empty() && self.in_flight.len() < BATCHES {
            let free = (0..BATCHES).find(|index| !self.in_flight.contains(index));
            let Some(index) = free else { break };
            self.record_slices(index, &running, polls)?;
            self.submit(index)?;
        }
        if self.in_flight.is_empty() {
            return Ok(());
        }
        let index = self.wait_oldest()?;
        self.adapt(index);
        let now = Instant::now();
        for member in &mut self.members {
            if self.batches[index]
                .kernels
                .iter()
                .any(|kernel| Arc::ptr_eq(kernel, &member.kernel))
            {
                member.attention.observe(&member.kernel, now);
                member.kernel.look_at_passing();
            }
        }
        Ok(())
    }

    /// Answers for kernels that have no slices in flight any more, leads their replies elsewhere if that is wanted, and lets go of those
    /// that ended.
    fn settle(&mut self) {
        let in_flight = |kernel: &Arc<SliceKernel>| {
            self.in_flight.iter().any(|index| {
                self.batches[*index]
                    .kernels
                    .iter()
                    .any(|running| Arc::ptr_eq(running, kernel))
            })
        };
        let epoch = self.handle.epoch.load(Ordering::Relaxed);
        let is_of_epoch = |kernel: &Arc<SliceKernel>| {
            self.in_flight.iter().any(|index| {
                let batch = &self.batches[*index];
                let is_in = batch.kernels.iter().any(|other| Arc::ptr_eq(other, kernel));
                is_in && batch.epoch == epoch
            })
        };
        let (mut ended, mut live, mut idle) = (Vec::new(), Vec::new(), Vec::new());
        let mut is_awaited = false;
        for member in std::mem::take(&mut self.members) {
            let kernel = &member.kernel;
            if let Some(failure) = kernel.fault()
                && !kernel.signals.gate.state().is_final()
            {
                kernel.fail(failure);
            }
            if in_flight(kernel) {
                is_awaited |= kernel.wants_exchange() && is_of_epoch(kernel);
                live.push(member);
            } else if kernel.must_terminate() {
                ended.push(member);
            } else {
                if !kernel.is_wanted() {
                    for block in &kernel.blocks {
                        block.control().store_state(BlockState::Idle);
                    }
                }
                idle.push(Arc::clone(kernel));
                live.push(member);
            }
        }
        self.members = live;
        for member in ended {
            member.kernel.answer_end();
            self.release(member.kernel);
        }
        if is_awaited {
            // Its slices end; it gets no others until it has what it wants.
            self.handle.look();
        }
        for kernel in idle {
            if kernel.wants_exchange() {
                // What is recorded leads to where its replies went so far.
                self.forget(&kernel);
                kernel.exchange(Arc::clone(&self.handle) as Arc<dyn Warden>);
            }
        }
    }

    /// Lets go of a kernel that has no slices in flight, and says so.
    fn release(&mut self, kernel: Arc<SliceKernel>) {
        kernel.stop_passing();
        self.handle.remove(&kernel);
        self.forget(&kernel);
        let end = kernel.end();
        drop(kernel);
        end.set();
    }

    /// Drops the references of batches that are not in flight.
    fn forget(&mut self, kernel: &Arc<SliceKernel>) {
        for batch in &mut self.batches {
            if batch.kernels.iter().any(|other| Arc::ptr_eq(other, kernel)) {
                batch.kernels.clear();
                batch.epoch = 0;
            }
        }
    }

    /// Whether somebody who sleeps may want a turn while others run, or be woken for what they write.
    fn has_sleepers(&self, running: &[Arc<SliceKernel>]) -> bool {
        if running.iter().any(|kernel| kernel.wakes_next()) {
            return true;
        }
        let wanted = self
            .members
            .iter()
            .filter(|member| member.kernel.is_wanted());
        wanted.count() > running.len()
    }

    /// How long the slices of the running kernels last; their polls, if these alone end them, or 0.
    fn set_budgets(&self, running: &[Arc<SliceKernel>]) -> u32 {
        let units: u32 = running.iter().map(|kernel| kernel.groups()).sum();
        // A GPU has room for many blocks at once; but kernels of one queue wait for one another after each step.
        let shared =
            running.len() > 1 || (self.software && units > 1) || self.has_sleepers(running);
        for kernel in running {
            let (mut polls, mut idle) = if shared {
                (SHARED_POLLS, SHARED_IDLE_POLLS)
            } else {
                (self.pace.polls(), u32::MAX)
            };
            if self.software {
                polls = polls.min(kernel.software_budget());
            }
            if kernel.may_sleep() {
                idle = idle.min(PARKING_IDLE_POLLS);
            }
            for block in &kernel.blocks {
                block.control().set_budgets(polls, idle);
            }
        }
        if shared { 0 } else { self.pace.polls() }
    }

    /// Makes slices as long as they should be, going by the batch that is done: one whose slices used up their polls.
    fn adapt(&mut self, index: usize) {
        let now = Instant::now();
        let batch = &self.batches[index];
        let begin = batch.submitted.max(self.last_done);
        self.last_done = now;
        let [kernel] = &batch.kernels[..] else { return };
        let measures = !kernel.may_sleep()
            && batch.polls == self.pace.polls()
            && batch.epoch == self.handle.epoch.load(Ordering::Relaxed);
        let member = self
            .members
            .iter()
            .find(|member| Arc::ptr_eq(&member.kernel, kernel));
        if measures && let Some(member) = member {
            let slice = now.duration_since(begin) / batch.steps.max(1);
            self.pace.measured(slice, member.attention.was_idle(kernel));
        }
    }

    /// Records steps of the kernels' slices, unless the batch holds just these.
    fn record_slices(
        &mut self,
        index: usize,
        running: &[Arc<SliceKernel>],
        polls: u32,
    ) -> Result<(), Error> {
        // Kernels that sleep when idle are looked at after each step.
        let steps = if running.iter().all(|kernel| kernel.may_sleep()) {
            1
        } else if self.has_sleepers(running) {
            IMPATIENT_STEPS
        } else if self.software {
            SOFTWARE_STEPS
        } else {
            HARDWARE_STEPS
        };
        let epoch = self.handle.epoch.load(Ordering::Acquire);
        let batch = &self.batches[index];
        let same = batch.epoch == epoch
            && batch.steps == steps
            && batch.kernels.len() == running.len()
            && batch
                .kernels
                .iter()
                .zip(running)
                .all(|(recorded, kernel)| Arc::ptr_eq(recorded, kernel));
        if same {
            self.batches[index].polls = polls;
            return Ok(());
        }
        let context = Arc::clone(&self.context);
        // Slices of one step may run at the same time, but for those that use the same ring.
        let shares = running.iter().any(|kernel| kernel.passes_to(None));
        self.record(index, |commands| {
            for _ in 0..steps {
                for (index, kernel) in running.iter().enumerate() {
                    if index > 0 && shares {
                        slice_barrier(&context, commands);
                    }
                    record_dispatch(&context, commands, kernel, epoch);
                }
                slice_barrier(&context, commands);
            }
            host_barrier(&context, commands, vk::PipelineStageFlags::COMPUTE_SHADER);
        })?;
        let batch = &mut self.batches[index];
        batch.kernels = running.to_vec();
        batch.epoch = epoch;
        batch.steps = steps;
        batch.polls = polls;
        Ok(())
    }

    /// Records a batch anew; it holds no kernels then.
    fn record(&mut self, index: usize, body: impl FnOnce(vk::CommandBuffer)) -> Result<(), Error> {
        let batch = &mut self.batches[index];
        batch.kernels.clear();
        batch.epoch = 0;
        let commands = batch.commands;
        let info = vk::CommandBufferBeginInfo::default();
        // SAFETY: the batch is not in flight, and beginning it resets it (the pool allows that).
        self.context.check("begin a command buffer", unsafe {
            self.context.raw.begin_command_buffer(commands, &info)
        })?;
        body(commands);
        // SAFETY: it was begun above.
        self.context.check("end a command buffer", unsafe {
            self.context.raw.end_command_buffer(commands)
        })
    }

    fn submit(&mut self, index: usize) -> Result<(), Error> {
        let batch = &mut self.batches[index];
        for kernel in &batch.kernels {
            kernel.tell_clock_half();
        }
        let commands = [batch.commands];
        let info = [vk::SubmitInfo::default().command_buffers(&commands)];
        // SAFETY: the fence is unsignalled and the command buffer recorded, neither is in flight; this thread alone uses
        // the queue. Whatever the commands use is held by the batch's kernels.
        self.context.check("submit slices", unsafe {
            self.context.raw.reset_fences(&[batch.fence])
        })?;
        let mut tries = 0;
        loop {
            // SAFETY: as above. A submission that failed for want of memory has changed nothing.
            let submitted = unsafe {
                self.context
                    .raw
                    .queue_submit(self.queue, &info, batch.fence)
            };
            match submitted {
                Err(
                    vk::Result::ERROR_OUT_OF_HOST_MEMORY | vk::Result::ERROR_OUT_OF_DEVICE_MEMORY,
                ) if tries < SUBMIT_TRIES => {
                    tries += 1;
                    std::thread::sleep(SUBMIT_INTERVAL);
                }
                submitted => break self.context.check("submit slices", submitted)?,
            }
        }
        batch.submitted = Instant::now();
        self.in_flight.push_back(index);
        Ok(())
    }

    /// Sleeps until the oldest batch is done.
    fn wait_oldest(&mut self) -> Result<usize, Error> {
        let Some(&index) = self.in_flight.front() else {
            return Ok(0);
        };
        let fence = [self.batches[index].fence];
        let mut stall = Stall::new(self.life(), Instant::now());
        loop {
            // SAFETY: the fence is this device's, and belongs to a submitted batch.
            let waited = unsafe {
                self.context
                    .raw
                    .wait_for_fences(&fence, true, FENCE_CHUNK.as_nanos() as u64)
            };
            match waited {
                Ok(()) => break,
                Err(vk::Result::TIMEOUT) if self.context.lost().is_some() => {
                    self.context.check_lost()?;
                }
                Err(vk::Result::TIMEOUT) => {
                    if self.mode == ExecutionMode::Resident {
                        self.in_flight_kernels()
                            .for_each(|kernel| kernel.tell_clock_half());
                    }
                    let limit = match self.handle.stop.load(Ordering::Acquire) {
                        true => self.limits.closing(self.software),
                        false => self.limits.in_use(self.software),
                    };
                    if stall.look(self.life(), Instant::now()) >= limit {
                        let reason = format!(
                            "nothing came of its slices for {limit:?}: a handler that never ends, or a driver that hangs"
                        );
                        self.context.abandon(reason);
                        self.context.check_lost()?;
                    }
                }
                Err(error) => return self.context.check("wait for slices", Err(error)),
            }
        }
        self.in_flight.pop_front();
        Ok(index)
    }

    /// The kernels whose slices are in flight.
    fn in_flight_kernels(&self) -> impl Iterator<Item = &Arc<SliceKernel>> {
        let batches = self.in_flight.iter().map(|index| &self.batches[*index]);
        batches.flat_map(|batch| &batch.kernels)
    }

    /// A number that changes with every progress of what is in flight.
    fn life(&self) -> u32 {
        self.in_flight_kernels().fold(0, |sum, kernel| {
            sum.wrapping_mul(31).wrapping_add(kernel.life())
        })
    }

    /// Waits until nothing of this lane runs on a lost device any more, or the device must be left behind with it.
    fn await_the_end(&mut self) {
        let limit = self.limits.closing(self.software);
        let mut stall = Stall::new(self.life(), Instant::now());
        while let Some(&index) = self.in_flight.front()
            && !self.context.is_abandoned()
        {
            let fence = [self.batches[index].fence];
            // SAFETY: the fence is this device's, and belongs to a submitted batch.
            let waited = unsafe {
                self.context
                    .raw
                    .wait_for_fences(&fence, true, FENCE_CHUNK.as_nanos() as u64)
            };
            match waited {
                Err(vk::Result::TIMEOUT) => {
                    if stall.look(self.life(), Instant::now()) >= limit {
                        self.context
                            .abandon("work on the lost device did not end".into());
                    }
                }
                // Done, or lost: a lost device runs nothing (Vulkan specification, "Lost Device").
                _ => {
                    self.in_flight.pop_front();
                }
            }
        }
    }

    /// Waits for everything in flight.
    fn drain(&mut self) -> Result<(), Error> {
        while !self.in_flight.is_empty() {
            self.wait_oldest()?;
        }
        Ok(())
    }

    /// One round of exchange mode: carries waiting requests in, runs a slice of each kernel that has some, and carries
    /// the replies out. Sleeps or polls if there is nothing to do.
    fn exchange(&mut self) -> Result<(), Error> {
        let mut round = Vec::new();
        for (index, member) in self.members.iter_mut().enumerate() {
            let Some(relay) = &mut member.relay else {
                continue;
            };
            if member.kernel.wants_exchange() {
                member
                    .kernel
                    .exchange(Arc::clone(&self.handle) as Arc<dyn Warden>);
                relay.begin_again();
            }
            if relay.answer(&member.kernel) && relay.collect(&member.kernel) {
                round.push(index);
            }
        }
        self.add_next(&mut round);
        if !round.is_empty() {
            self.exchange_round(&round)?;
        }
        let (ended, live) = std::mem::take(&mut self.members)
            .into_iter()
            .partition(|member| member.kernel.must_terminate());
        self.members = live;
        for Member { kernel, relay, .. } in ended {
            if let Some(relay) = relay {
                relay.hand_back(&kernel);
            }
            kernel.answer_end();
            self.release(kernel);
        }
        Ok(())
    }

    /// Adds the kernels that those of a round pass their replies on to, each behind them: a message goes the whole way in one round.
    fn add_next(&self, round: &mut Vec<usize>) {
        let is_any_passing = round
            .iter()
            .any(|index| self.members[*index].kernel.passes_to(None));
        if !is_any_passing {
            return;
        }
        let all = self.members.iter().map(|member| Arc::clone(&member.kernel));
        let mut chosen: Vec<Arc<SliceKernel>> = Vec::new();
        for kernel in upstream_first(all.collect()) {
            let is_in = round
                .iter()
                .any(|index| Arc::ptr_eq(&self.members[*index].kernel, &kernel));
            let is_fed = chosen.iter().any(|before| before.passes_to(Some(&kernel)));
            if is_in || (is_fed && kernel.is_wanted()) {
                chosen.push(kernel);
            }
        }
        *round = chosen
            .iter()
            .filter_map(|kernel| {
                let mut members = self.members.iter();
                members.position(|member| Arc::ptr_eq(&member.kernel, kernel))
            })
            .collect();
    }

    fn exchange_round(&mut self, round: &[usize]) -> Result<(), Error> {
        let context = Arc::clone(&self.context);
        let members = std::mem::take(&mut self.members);
        let recorded = self.record(0, |commands| {
            let chosen = || round.iter().filter_map(|index| members.get(*index));
            for member in chosen() {
                if let Some(relay) = &member.relay {
                    relay.record_copy_in(&context.raw, commands);
                }
            }
            transfer_barrier(&context, commands);
            for member in chosen() {
                record_dispatch(&context, commands, &member.kernel, Relay::EPOCH);
                if member.kernel.passes_to(None) {
                    slice_barrier(&context, commands);
                }
            }
            transfer_barrier(&context, commands);
            for member in chosen() {
                if let Some(relay) = &member.relay {
                    relay.record_copy_out(&context.raw, commands);
                }
            }
            host_barrier(
                &context,
                commands,
                vk::PipelineStageFlags::COMPUTE_SHADER | vk::PipelineStageFlags::TRANSFER,
            );
        });
        self.batches[0].kernels = round
            .iter()
            .filter_map(|index| members.get(*index))
            .map(|member| Arc::clone(&member.kernel))
            .collect();
        self.members = members;
        recorded?;
        self.submit(0)?;
        self.wait_oldest()?;
        // Replies that lie beyond what was copied out.
        let more: Vec<usize> = round
            .iter()
            .copied()
            .filter(|index| {
                self.members
                    .get_mut(*index)
                    .and_then(|member| member.relay.as_mut())
                    .is_some_and(Relay::needs_more)
            })
            .collect();
        if !more.is_empty() {
            let members = std::mem::take(&mut self.members);
            let recorded = self.record(0, |commands| {
                for member in more.iter().filter_map(|index| members.get(*index)) {
                    if let Some(relay) = &member.relay {
                        relay.record_copy_more(&context.raw, commands);
                    }
                }
                host_barrier(&context, commands, vk::PipelineStageFlags::TRANSFER);
            });
            self.members = members;
            recorded?;
            self.submit(0)?;
            self.wait_oldest()?;
        }
        for index in round {
            let Some(member) = self.members.get_mut(*index) else {
                continue;
            };
            let Some(relay) = &mut member.relay else {
                continue;
            };
            match relay.publish(&member.kernel) {
                Ok(()) => {
                    member.kernel.show_life();
                    member.kernel.look_at_passing();
                }
                Err(failure) => member.kernel.fail(*failure),
            }
        }
        Ok(())
    }

    /// Fails every kernel of a lost device, and lets go of them.
    fn lose_all(&mut self) {
        let reason = self.context.lost().unwrap_or("lost").to_owned();
        let members = std::mem::take(&mut self.members);
        for member in &members {
            member.kernel.lose(&reason);
        }
        // What was submitted may still run; it ends by itself, unless the device was abandoned, and then nothing is ever
        // destroyed.
        self.await_the_end();
        self.in_flight.clear();
        for Member { kernel, relay, .. } in members {
            if let Some(relay) = relay {
                relay.hand_back(&kernel);
            }
            self.release(kernel);
        }
    }

    /// Sleeps until somebody rings, or a kernel must be looked at.
    fn sleep(&mut self) {
        let now = Instant::now();
        let mut longest = LONGEST_SLEEP;
        for member in &self.members {
            longest = longest.min(member.nap(now));
        }
        if longest.is_zero() {
            std::hint::spin_loop();
            return;
        }
        let doorbell = Arc::clone(&self.context.doorbell);
        let prepared = doorbell.prepare();
        let wanted = self.handle.stop.load(Ordering::Acquire) && self.members.is_empty()
            || !self.handle.inbox.lock().is_empty()
            || (self.context.lost().is_some() && !self.members.is_empty())
            || self
                .members
                .iter()
                .any(|member| member.needs_attention(now));
        if !wanted {
            prepared.wait(longest);
        }
    }
}

impl Member {
    /// How long it can do without being looked at; zero for a kernel that is polled without pause.
    fn nap(&self, now: Instant) -> Duration {
        if !self.kernel.is_wanted() {
            return LONGEST_SLEEP;
        }
        if let Some(relay) = &self.relay {
            return relay.nap(&self.kernel);
        }
        self.attention.nap(&self.kernel, now)
    }

    /// Whether it must be looked at before anybody sleeps.
    fn needs_attention(&self, now: Instant) -> bool {
        if self.kernel.must_terminate() {
            return true;
        }
        match &self.relay {
            Some(relay) => relay.needs_attention(&self.kernel) || self.kernel.wants_exchange(),
            None => {
                self.wants_slices(now)
                    || self.kernel.is_unanswered()
                    || self.kernel.wants_exchange()
            }
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        if self.context.is_abandoned() {
            return;
        }
        // SAFETY: nothing is in flight when the thread ends; each object is destroyed once. Null is allowed.
        unsafe {
            for batch in &self.batches {
                self.context.raw.destroy_fence(batch.fence, None);
            }
            self.context.raw.destroy_command_pool(self.pool, None);
        }
    }
}

fn record_dispatch(
    context: &Context,
    commands: vk::CommandBuffer,
    kernel: &SliceKernel,
    epoch: u32,
) {
    // SAFETY: the command buffer is being recorded; pipeline, layout and set belong together and live as long as the
    // kernel, which the batch holds.
    unsafe {
        context
            .raw
            .cmd_bind_pipeline(commands, vk::PipelineBindPoint::COMPUTE, kernel.pipeline);
        context.raw.cmd_bind_descriptor_sets(
            commands,
            vk::PipelineBindPoint::COMPUTE,
            context.pipeline_layout,
            0,
            &[kernel.set()],
            &[],
        );
        context.raw.cmd_push_constants(
            commands,
            context.pipeline_layout,
            vk::ShaderStageFlags::COMPUTE,
            0,
            &kernel.constants(epoch).bytes(),
        );
        context.raw.cmd_dispatch(commands, kernel.groups(), 1, 1);
    }
}

/// The kernels, each behind those that pass their replies on to it, so that a message goes the whole way in one step; otherwise in the
/// order that they have.
fn upstream_first(mut kernels: Vec<Arc<SliceKernel>>) -> Vec<Arc<SliceKernel>> {
    if kernels.iter().any(|kernel| kernel.passes_to(None)) {
        let all = kernels.clone();
        kernels.sort_by_cached_key(|kernel| {
            let before = |kernel: &Arc<SliceKernel>| {
                let mut others = all.iter();
                others.find(|other| other.passes_to(Some(kernel))).cloned()
            };
            // There are no circles.
            std::iter::successors(before(kernel), before).count()
        });
    }
    kernels
}

/// Orders slices.
fn slice_barrier(context: &Context, commands: vk::CommandBuffer) {
    let barrier = [vk::MemoryBarrier::default()
        .src_access_mask(vk::AccessFlags::SHADER_WRITE | vk::AccessFlags::SHADER_READ)
        .dst_access_mask(vk::AccessFlags::SHADER_READ | vk::AccessFlags::SHADER_WRITE)];
    // SAFETY: the command buffer is being recorded.
    unsafe {
        context.raw.cmd_pipeline_barrier(
            commands,
            vk::PipelineStageFlags::COMPUTE_SHADER,
            vk::PipelineStageFlags::COMPUTE_SHADER,
            vk::DependencyFlags::empty(),
            &barrier,
            &[],
            &[],
        );
    }
}

/// Makes what the device wrote visible to the host once the fence is signalled.
fn host_barrier(context: &Context, commands: vk::CommandBuffer, from: vk::PipelineStageFlags) {
    let barrier = [vk::MemoryBarrier::default()
        .src_access_mask(vk::AccessFlags::MEMORY_WRITE)
        .dst_access_mask(vk::AccessFlags::HOST_READ | vk::AccessFlags::HOST_WRITE)];
    // SAFETY: the command buffer is being recorded.
    unsafe {
        context.raw.cmd_pipeline_barrier(
            commands,
            from,
            vk::PipelineStageFlags::HOST,
            vk::DependencyFlags::empty(),
            &barrier,
            &[],
            &[],
        );
    }
}

/// Orders transfers and slices.
fn transfer_barrier(context: &Context, commands: vk::CommandBuffer) {
    let both = vk::PipelineStageFlags::COMPUTE_SHADER | vk::PipelineStageFlags::TRANSFER;
    let barrier = [vk::MemoryBarrier::default()
        .src_access_mask(vk::AccessFlags::MEMORY_WRITE)
        .dst_access_mask(vk::AccessFlags::MEMORY_READ | vk::AccessFlags::MEMORY_WRITE)];
    // SAFETY: the command buffer is being recorded.
    unsafe {
        context.raw.cmd_pipeline_barrier(
            commands,
            both,
            both,
            vk::DependencyFlags::empty(),
            &barrier,
            &[],
            &[],
        );
    }
}
