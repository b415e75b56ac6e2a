//! Exchange mode: the rings that the host's endpoints use are ordinary memory, and the lane's thread carries messages
//! between them and the rings that the shader uses, only while no dispatch runs.
//!
//! Both have the same layout, and a message has the same position in both. A request stays in the host's ring until the
//! shader has processed it, and the shader never has more room for replies than the host's ring has, so that capacities
//! and accounts are those of the host's rings alone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ash::vk;

use super::slice_kernel::{SliceKernel, raw_buffer};
use crate::backend::slices::BLOCKED_NAP;
use crate::backend::{BlockMemory, GridMemory, corrupt_device};
use crate::kernel::{BlockState, KernelFailure};
use crate::thread::KernelWait;

/// Looks without work between two signs of life.
const LOOKS_PER_BEAT: u32 = 64;

/// What carries one kernel's messages.
#[derive(Debug)]
pub(super) struct Relay {
    blocks: Vec<BlockRelay>,
    /// In staged mode, the memory that the host writes and reads, and what is copied from and to.
    staging: Option<Staging>,
    /// Replies to expect for each request.
    replies: u32,
    looks: u32,
    /// Positions at the last round that brought nothing, to not repeat it for nothing.
    blocked: bool,
}

#[derive(Debug)]
struct Staging {
    host: Arc<GridMemory>,
    device: Arc<GridMemory>,
}

#[derive(Debug)]
struct BlockRelay {
    /// The device's half, as the host sees it.
    device: Arc<BlockMemory>,
    /// Requests up to here were carried in, before the last round and now.
    carried: u32,
    moved: u32,
    /// Requests up to here are processed, and the handler was run so often for the next one.
    processed: u32,
    step: u32,
    /// Replies up to here were published to the host's ring.
    published: u32,
    /// The host's reply cursor at the last look.
    read: u32,
    /// That of the kernel that replies are passed on to.
    next_read: Option<u32>,
    /// Samples that were carried out.
    traced: u32,
}

impl Relay {
    /// The one epoch of exchange mode: nothing is in flight when the host changes its mind.
    pub(super) const EPOCH: u32 = 1;

    pub(super) fn new(kernel: &SliceKernel, staged: bool) -> Self {
        let blocks = kernel
            .relay_blocks()
            .iter()
            .map(|device| {
                let control = device.control();
                control.set_epoch(Self::EPOCH);
                // A slice ends when there is nothing left to do.
                control.set_budgets(kernel.software_budget(), 1);
                control.set_active(true);
                let (processed, produced) = (control.processed(), control.produced());
                BlockRelay {
                    device: Arc::clone(device),
                    carried: processed,
                    moved: processed,
                    processed,
                    step: 0,
                    published: produced,
                    read: produced,
                    next_read: None,
                    traced: 0,
                }
            })
            .collect();
        Self {
            blocks,
            staging: kernel
                .relay_blocks()
                .first()
                .filter(|_| staged)
                .map(|block| Staging {
                    host: Arc::clone(&block.grid),
                    device: Arc::clone(kernel.device_grid()),
                }),
            replies: kernel.replies(),
            looks: 0,
            blocked: false,
        }
    }

    pub(super) fn is_staged(&self) -> bool {
        self.staging.is_some()
    }

    /// Answers the host's command in the host's control blocks; true if the kernel shall work.
    pub(super) fn answer(&mut self, kernel: &SliceKernel) -> bool {
        let wanted = kernel.is_wanted();
        let state = if wanted {
            BlockState::Polling
        } else {
            BlockState::Idle
        };
        self.looks = self.looks.wrapping_add(1);
        let beat = self.looks.is_multiple_of(LOOKS_PER_BEAT) || kernel.wait != KernelWait::Spin;
        for block in &kernel.blocks {
            let control = block.control();
            if control.state() != Some(state) && control.state() != Some(BlockState::Faulted) {
                control.store_state(state);
            }
            if beat {
                control.beat();
            }
        }
        if beat {
            kernel.show_life();
        }
        wanted
    }

    /// Carries waiting requests to the device's half. True if a slice has something to do.
    pub(super) fn collect(&mut self, kernel: &SliceKernel) -> bool {
        let capacity = kernel.capacity();
        let mut news = false;
        let mut waiting = false;
        for (host, relay) in kernel.blocks.iter().zip(&mut self.blocks) {
            let device = &relay.device;
            relay.carried = relay.moved;
            while relay.moved.wrapping_sub(relay.processed) < capacity {
                if host.has_request(relay.moved) {
                    host.copy_request_to(device, relay.moved);
                } else if !device.has_request(relay.moved) {
                    // Nor has a kernel before this one written there.
                    break;
                }
                relay.moved = relay.moved.wrapping_add(1);
                news = true;
            }
            let next_read = kernel.next_cursor();
            if next_read != relay.next_read {
                relay.next_read = next_read;
                news = true;
            }
            let read = host.reply_cursor().load(Ordering::Acquire);
            if read != relay.read {
                relay.read = read;
                news = true;
            }
            device.reply_cursor().store(read, Ordering::Release);
            waiting |= relay.moved != relay.processed;
        }
        if news {
            self.blocked = false;
        }
        waiting && !self.blocked
    }

    /// Publishes what the shader wrote: replies, then how far it is.
    pub(super) fn publish(&mut self, kernel: &SliceKernel) -> Result<(), Box<KernelFailure>> {
        let capacity = kernel.capacity();
        let (mut progressed, mut replied) = (false, false);
        let mut failure = None;
        for (host, relay) in kernel.blocks.iter().zip(&mut self.blocks) {
            let device = relay.device.control();
            let processed = device.processed();
            // Without what went into another kernel's ring.
            let produced = device.produced().wrapping_sub(device.passed());
            // Untrusted: no more than there is room for, no reply where the host has not read the last one.
            let progress = processed.wrapping_sub(relay.processed);
            if progress > capacity
                || produced.wrapping_sub(relay.read) > capacity
                || produced.wrapping_sub(relay.published) > capacity
            {
                return Err(Box::new(corrupt_device(host.index)));
            }
            while relay.published != produced {
                if !relay.device.copy_reply_to(host, relay.published) {
                    return Err(Box::new(corrupt_device(host.index)));
                }
                relay.published = relay.published.wrapping_add(1);
                replied = true;
            }
            if progress > relay.moved.wrapping_sub(relay.processed) {
                // A kernel before this one has written into its ring meanwhile.
                relay.moved = processed;
            }
            progressed |= processed != relay.processed || device.step() != relay.step;
            relay.processed = processed;
            relay.step = device.step();
            let control = host.control();
            control.mirror(device);
            control.beat();
            host.telemetry().mirror(relay.device.telemetry());
            relay.traced = host.mirror_traces(&relay.device, relay.traced);
            host.request_cursor().store(processed, Ordering::Release);
            if device.state() == Some(BlockState::Faulted) {
                control.store_state(BlockState::Faulted);
                failure = failure.or(kernel.fault());
            }
        }
        if replied {
            kernel.signals.reply_written(true);
        }
        self.blocked = !progressed && !replied;
        failure.map_or(Ok(()), |failure| Err(Box::new(failure)))
    }

    /// Puts the requests that another kernel has written, and that are not processed, where the host looks for what is left. To be called
    /// when no slice of the kernel will follow.
    pub(super) fn hand_back(&self, kernel: &SliceKernel) {
        for (host, relay) in kernel.blocks.iter().zip(&self.blocks) {
            let mut position = relay.processed;
            for _ in 0..kernel.capacity() {
                if !host.has_request(position) {
                    if !relay.device.has_request(position) {
                        break;
                    }
                    relay.device.copy_request_to(host, position);
                }
                position = position.wrapping_add(1);
            }
        }
    }

    /// Goes on after replies were led elsewhere.
    pub(super) fn begin_again(&mut self) {
        self.blocked = false;
    }

    /// Whether a slice wrote more replies than were copied out with it.
    pub(super) fn needs_more(&mut self) -> bool {
        self.is_staged()
            && self.blocks.iter().any(|relay| {
                let produced = relay.device.control().produced();
                produced.wrapping_sub(relay.published) > relay.copied_out(self.replies)
            })
    }

    /// How long the kernel can do without a look.
    pub(super) fn nap(&self, kernel: &SliceKernel) -> Duration {
        match kernel.wait {
            KernelWait::Spin | KernelWait::Auto | KernelWait::SpinYield => Duration::ZERO,
            // Whoever makes room rings no bell.
            KernelWait::Park if self.waits_for_room() => BLOCKED_NAP.min(kernel.heartbeat_interval),
            KernelWait::Park => kernel.heartbeat_interval,
            KernelWait::Interval(interval) => interval.min(kernel.heartbeat_interval),
        }
    }

    /// Whether requests wait until the host reads replies.
    fn waits_for_room(&self) -> bool {
        self.blocked
            && self
                .blocks
                .iter()
                .any(|relay| relay.moved != relay.processed)
    }

    /// Whether something happened that must not wait for the next look.
    pub(super) fn needs_attention(&self, kernel: &SliceKernel) -> bool {
        let wanted = kernel.is_wanted();
        let answer = if wanted {
            BlockState::Polling
        } else {
            BlockState::Idle
        };
        let unanswered = kernel
            .blocks
            .iter()
            .any(|block| block.control().state() != Some(answer));
        let requested = kernel.wait == KernelWait::Park
            && kernel.blocks.iter().zip(&self.blocks).any(|(host, relay)| {
                host.has_request(relay.moved)
                    || relay.device.has_request(relay.moved)
                    || (relay.moved != relay.processed
                        && (!self.blocked
                            || host.reply_cursor().load(Ordering::Acquire) != relay.read
                            || kernel.next_cursor() != relay.next_read))
            });
        unanswered || (wanted && requested)
    }

    /// Copies the rings as they were prepared.
    pub(super) fn record_first_copy(&self, raw: &ash::Device, commands: vk::CommandBuffer) {
        let Some(staging) = &self.staging else { return };
        for (from, to) in [
            (&staging.host.host_to_device, &staging.device.host_to_device),
            (&staging.host.device_to_host, &staging.device.device_to_host),
        ] {
            let (from, to) = (raw_buffer(from), raw_buffer(to));
            let bytes = staging.bytes_of(to, self.blocks.len());
            let region = [vk::BufferCopy::default().size(bytes)];
            // SAFETY: the command buffer is being recorded; both buffers have these bytes, and live as long as the
            // kernel.
            unsafe { raw.cmd_copy_buffer(commands, from, to, &region) };
        }
    }

    pub(super) fn record_copy_in(&self, raw: &ash::Device, commands: vk::CommandBuffer) {
        let Some(staging) = &self.staging else { return };
        let layout = staging.host.layout;
        let share = layout.host_to_device();
        let mut regions = Vec::new();
        for (index, relay) in self.blocks.iter().enumerate() {
            let base = index * share;
            slots(&mut regions, staging, base, relay.carried, relay.moved);
            region(
                &mut regions,
                base + layout.cursor(),
                share - layout.cursor(),
            );
        }
        copy(
            raw,
            commands,
            raw_buffer(&staging.host.host_to_device),
            raw_buffer(&staging.device.host_to_device),
            &regions,
        );
    }

    pub(super) fn record_copy_out(&self, raw: &ash::Device, commands: vk::CommandBuffer) {
        let Some(staging) = &self.staging else { return };
        let layout = staging.host.layout;
        let share = layout.device_to_host();
        let mut regions = Vec::new();
        for (index, relay) in self.blocks.iter().enumerate() {
            let base = index * share;
            let end = relay.published.wrapping_add(relay.copied_out(self.replies));
            slots(&mut regions, staging, base, relay.published, end);
            region(
                &mut regions,
                base + layout.cursor(),
                share - layout.cursor(),
            );
        }
        staging.copy_out(raw, commands, &regions);
    }

    pub(super) fn record_copy_more(&self, raw: &ash::Device, commands: vk::CommandBuffer) {
        let Some(staging) = &self.staging else { return };
        let layout = staging.host.layout;
        let mut regions = Vec::new();
        for (index, relay) in self.blocks.iter().enumerate() {
            let produced = relay.device.control().produced();
            // Untrusted until `publish` has looked at it.
            let count = produced
                .wrapping_sub(relay.published)
                .min(layout.ring.capacity());
            let done = relay.copied_out(self.replies);
            if count > done {
                let from = relay.published.wrapping_add(done);
                let to = relay.published.wrapping_add(count);
                let base = index * layout.device_to_host();
                slots(&mut regions, staging, base, from, to);
            }
        }
        staging.copy_out(raw, commands, &regions);
    }
}

impl BlockRelay {
    /// How many reply slots are copied out with a slice.
    fn copied_out(&self, replies: u32) -> u32 {
        let waiting = self.moved.wrapping_sub(self.processed);
        waiting
            .saturating_mul(replies.max(1))
            .min(self.device.grid.layout.ring.capacity())
    }
}

impl Staging {
    fn bytes_of(&self, device: vk::Buffer, blocks: usize) -> u64 {
        let layout = self.device.layout;
        let share = if device == raw_buffer(&self.device.host_to_device) {
            layout.host_to_device()
        } else {
            layout.device_to_host()
        };
        (share * blocks) as u64
    }

    fn copy_out(&self, raw: &ash::Device, commands: vk::CommandBuffer, regions: &[vk::BufferCopy]) {
        copy(
            raw,
            commands,
            raw_buffer(&self.device.device_to_host),
            raw_buffer(&self.host.device_to_host),
            regions,
        );
    }
}

fn copy(
    raw: &ash::Device,
    commands: vk::CommandBuffer,
    from: vk::Buffer,
    to: vk::Buffer,
    regions: &[vk::BufferCopy],
) {
    if !regions.is_empty() {
        // SAFETY: the command buffer is being recorded; the regions lie within both buffers, which have the same layout
        // and live as long as the kernel.
        unsafe { raw.cmd_copy_buffer(commands, from, to, regions) };
    }
}

fn region(regions: &mut Vec<vk::BufferCopy>, offset: usize, bytes: usize) {
    if bytes > 0 {
        regions.push(
            vk::BufferCopy::default()
                .src_offset(offset as u64)
                .dst_offset(offset as u64)
                .size(bytes as u64),
        );
    }
}

/// The slots of positions `from..to` of a ring that begins at `base`: two regions if they wrap around.
fn slots(regions: &mut Vec<vk::BufferCopy>, staging: &Staging, base: usize, from: u32, to: u32) {
    let ring = staging.host.layout.ring;
    let capacity = ring.capacity();
    let count = to.wrapping_sub(from).min(capacity);
    let first = from & (capacity - 1);
    let until_end = count.min(capacity - first);
    let stride = ring.stride();
    region(
        regions,
        base + first as usize * stride,
        until_end as usize * stride,
    );
    region(regions, base, (count - until_end) as usize * stride);
}
