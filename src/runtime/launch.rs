//! From a registration and options to a resident kernel.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::calls::{CallTable, MAX_CALLS};
use super::clients::LaneHub;
use super::config::RuntimeConfig;
use super::instance::{ControlPlane, KernelInstance};
use super::link::{KernelLink, Lanes};
use super::pipeline::Pipes;
use super::receive::ReceiveSide;
use super::send::SendSide;
use super::traces::Tracing;
use crate::backend::{
    Account, BackendType, BlockLayout, Device, DeviceKind, DispatchRequest, GridMemory, Handler,
    host_ring, host_ring_bytes,
};
use crate::bridge::Bridge;
use crate::error::{Error, HandlerError};
use crate::kernel::outlet::Counter;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{
    DeadLetterQueue, Dim3, KernelRegistration, KernelState, LaunchOptions, TRACE_SLOTS,
};
use crate::message::MessageEncoder;
use crate::process;
use crate::ring::RingLayout;
use crate::system;
use crate::thread::{
    CoreLease, KernelWait, PlacedThread, SpinPermit, WaitStrategy, affinity, budget,
};
use crate::time::{Stamps, TimestampSource};

/// Most blocks of a grid: on the CPU each is a thread.
const MAX_BLOCKS: u64 = 1024;

/// Most threads that may share a message, as on every GPU there is (CUDA C++ Programming Guide, table "Technical
/// Specifications per Compute Capability"; Vulkan's `maxComputeWorkGroupInvocations` is 1024 on all current drivers).
const MAX_BLOCK_THREADS: u64 = 1024;

/// Most bytes of payload in a ring whose capacity is the default.
const DEFAULT_RING_BYTES: usize = 16 << 20;

/// Fewest slots that the default becomes for large messages.
const LEAST_DEFAULT_CAPACITY: usize = 4;

/// How long a caller sleeps at a time whom no device wakes: about what a wake-up costs.
const CALLER_NAP: Duration = Duration::from_micros(50);

/// Launches a kernel: resident, idle, not yet polling.
pub(super) fn launch(
    device: &dyn Device,
    config: &RuntimeConfig,
    registration: &KernelRegistration,
    name: String,
    (grid, block_size): (Dim3, Dim3),
    options: &LaunchOptions,
    (dead_letters, bridge): (&Arc<DeadLetterQueue>, &Arc<Bridge>),
) -> Result<Arc<KernelInstance>, Error> {
    let blocks = check_shape(grid, block_size)?;

    let calls = check_calls(options)?;
    let handler = handler(device.info().backend, registration)?;
    let clock = options.trace_every.and_then(|_| device.clock(&handler));
    let trace_every = clock
        .as_ref()
        .and(options.trace_every)
        .map_or(0, NonZeroU32::get);
    let layout = layout(config, registration, options, clock.is_some())?;
    let host_wait = options.host_wait.unwrap_or(config.host_wait);
    let mut placement = Placing::choose(device, config, options, blocks)?;

    let signals = Arc::new(KernelSignals::new(
        name,
        blocks,
        host_wait.may_park(),
        device.doorbell(),
        Some(Arc::clone(dead_letters)),
    ));
    signals.lanes.set_bell(Arc::clone(&bridge.attention.bell));
    let types = Arc::new(registration.type_table());
    let pool = device.host_pool();
    let call_bytes = CallTable::bytes(calls, layout.ring.max_payload());
    let scratch_bytes = match types.last_kind() {
        0 => 0,
        _ => MessageEncoder::bytes_for(layout.ring.max_payload()) as u64,
    };
    // The handles' one, and one for the replies of each block of this CPU.
    let encoders = match device.info().kind {
        DeviceKind::Cpu => 1 + u64::from(blocks),
        _ => 1,
    };
    let memory_bytes = (layout.total() as u64)
        .saturating_mul(blocks.into())
        .saturating_add(host_ring_bytes(layout.ring) as u64)
        .saturating_add(call_bytes)
        .saturating_add(scratch_bytes.saturating_mul(encoders));
    // All of it at once, before a page is written to.
    if device.info().kind == DeviceKind::Cpu {
        system::memory::ask(memory_bytes)
            .map_err(|available| pool.out_of_memory(memory_bytes, available))?;
    }
    let (mut producers, mut consumers, mut device_ends) = (Vec::new(), Vec::new(), Vec::new());
    for (producer, consumer, ends) in GridMemory::allocate(device, blocks, layout)? {
        producers.push(producer);
        consumers.push(consumer);
        device_ends.push(ends);
    }
    let inbox = host_ring(&pool, layout.ring)?;
    let calls = CallTable::new(&pool, calls, layout.ring.max_payload())?;
    let encoder = match types.last_kind() {
        0 => MessageEncoder::default(),
        _ => {
            let account = Arc::<Account>::clone(pool.account());
            MessageEncoder::for_slots_of(layout.ring.max_payload(), account)
        }
    };
    let copy_bytes = device_ends
        .first()
        .map_or(0, |ends| ends.memory.grid.copy_bytes(blocks));
    let memory_bytes = memory_bytes.saturating_add(copy_bytes);
    let memories = device_ends
        .iter()
        .map(|ends| Arc::clone(&ends.memory))
        .collect();

    let replies = handler.replies();
    let places: Arc<[PlacedThread]> = match device.info().kind {
        DeviceKind::Cpu => (0..blocks).map(|_| PlacedThread::new()).collect(),
        _ => Arc::new([]),
    };
    let dispatch = device.dispatch(DispatchRequest {
        handler,
        signals: Arc::clone(&signals),
        types: Arc::clone(&types),
        grid,
        block_size,
        blocks: device_ends,
        wait: placement.wait,
        cores: placement.cores(),
        cores_are_named: !options.cores.is_empty(),
        shared_cores: std::mem::take(&mut placement.shared),
        places: Arc::clone(&places),
        permits: std::mem::take(&mut placement.block_permits),
        telemetry: config.enable_telemetry,
        trace_every,
        heartbeat_interval: config.heartbeat_interval,
    })?;
    placement.keep_held(&places);
    let memory_bytes = memory_bytes + dispatch.memory_bytes();
    if matches!(placement.wait, KernelWait::Spin | KernelWait::SpinYield) {
        signals.spinning.store(blocks, Ordering::Relaxed);
    }
    // Cannot fail: the kernel was created here.
    let _ = signals.gate.transition(KernelState::Launched);
    let link = KernelLink {
        kernel: registration.id().to_owned(),
        device: device.info().index,
        signals,
        types,
        blocks: memories,
        capacity: layout.ring.capacity().into(),
        needs_wake: placement.wait.needs_wake() && device.needs_bell(),
        host_wait,
        longest_sleep: if device.wakes_callers() {
            Duration::MAX
        } else {
            CALLER_NAP
        },
        default_timeout: config.default_timeout,
        termination_timeout: config.termination_timeout,
        telemetry: config.enable_telemetry,
        tracing: clock.map(Tracing::new),
        wait: placement.wait,
        cores: placement.cores(),
        places,
        memory_bytes,
        timestamps: match &options.hlc {
            Some(clock) => Stamps::Shared(Arc::clone(clock)),
            None => Stamps::Own(TimestampSource::new()),
        },
        calls,
        accepted: (0..blocks).map(|_| Counter::default()).collect(),
        delivered: Counter::default(),
        handed_over: AtomicU64::new(0),
        waiters: AtomicU32::new(0),
        ring: layout.ring,
        lanes: Lanes::default(),
        shares_rings: device.shares_rings(),
        replies,
        is_on_threads: device.info().kind == DeviceKind::Cpu,
        pipes: Pipes::default(),
    };
    let instance = Arc::new(KernelInstance {
        link,
        send: Mutex::new(Some(SendSide::new(producers))),
        receiver_split: AtomicBool::new(false),
        receive: Mutex::new(Some(ReceiveSide::new(consumers, inbox))),
        control: Mutex::new(ControlPlane {
            dispatch: Some(dispatch),
            permit: placement.permit,
            leases: placement.leases,
        }),
        closing: Mutex::new(None),
        encoder: Mutex::new(encoder),
        books: Arc::default(),
        bridge: Arc::clone(bridge),
        clients: Mutex::new(LaneHub::new()),
        ended: AtomicBool::new(false),
    });
    process::register(&instance);
    Ok(instance)
}

/// A kernel's code for a backend.
pub(super) fn handler(
    backend: BackendType,
    registration: &KernelRegistration,
) -> Result<Handler, Error> {
    let handler = match backend {
        BackendType::Cpu => registration
            .handler()
            .map(|handler| Handler::Cpu(Arc::clone(handler))),
        BackendType::Vulkan => registration.shader_code().map(Handler::Shader),
        BackendType::Cuda => registration.cuda_code().map(Handler::Cuda),
        BackendType::Metal => registration.metal_code().map(Handler::Metal),
    };
    handler.ok_or_else(|| Error::NoHandler {
        kernel: registration.id().to_owned(),
        backend: backend.name(),
    })
}

fn invalid<T>(option: &'static str, reason: String) -> Result<T, Error> {
    Err(Error::InvalidOption { option, reason })
}

fn check_shape(grid: Dim3, block_size: Dim3) -> Result<u32, Error> {
    let blocks = grid.count();
    if !(1..=MAX_BLOCKS).contains(&blocks) {
        return invalid(
            "grid",
            format!("{blocks} blocks are not within 1 to {MAX_BLOCKS}"),
        );
    }
    let threads = block_size.count();
    if !(1..=MAX_BLOCK_THREADS).contains(&threads) {
        return invalid(
            "block size",
            format!("{threads} threads are not within 1 to {MAX_BLOCK_THREADS}"),
        );
    }
    Ok(blocks as u32)
}

fn check_calls(options: &LaunchOptions) -> Result<usize, Error> {
    let calls = options.max_pending_calls;
    if !(1..=MAX_CALLS).contains(&calls) {
        return invalid(
            "max_pending_calls",
            format!("{calls} is not within 1 to {MAX_CALLS}"),
        );
    }
    Ok(calls)
}

fn layout(
    config: &RuntimeConfig,
    registration: &KernelRegistration,
    options: &LaunchOptions,
    traced: bool,
) -> Result<BlockLayout, Error> {
    let payload = options
        .message_size
        .or(registration.message_size())
        .unwrap_or(config.default_message_size);
    let capacity = options
        .queue_capacity
        .or(registration.capacity())
        .unwrap_or_else(|| default_capacity(config, payload));
    let ring = match RingLayout::new(capacity, payload, options.extended) {
        Ok(ring) => ring,
        Err(error) => return invalid("queue_capacity or message_size", error.to_string()),
    };
    // One line holds an error's code and text, so that this cannot fail; it says what the slots rely on.
    debug_assert!(ring.max_payload() >= HandlerError::MAX_BYTES);
    Ok(BlockLayout {
        ring,
        state_bytes: registration.state_bytes(),
        trace_slots: if traced { TRACE_SLOTS } else { 0 },
    })
}

/// Slots of a ring whose capacity neither launch nor registration names: fewer than the configuration says if their payloads would exceed
/// [`DEFAULT_RING_BYTES`], and what the configuration's own rings take.
fn default_capacity(config: &RuntimeConfig, payload: usize) -> usize {
    let capacity = config.default_queue_capacity;
    let configured = capacity.saturating_mul(config.default_message_size);
    let fit = DEFAULT_RING_BYTES.max(configured) / payload.max(1);
    // Capacities are powers of two: rounded down here, so that they are not rounded up.
    let fit = 1 << fit.max(LEAST_DEFAULT_CAPACITY).ilog2();
    capacity.min(fit)
}

/// Where the blocks run and how they wait.
struct Placing {
    wait: KernelWait,
    permit: Option<SpinPermit>,
    /// One a block that waits by `Auto`.
    block_permits: Vec<SpinPermit>,
    /// One a block; empty for blocks that share cores.
    leases: Vec<CoreLease>,
    /// The cores that blocks without a lease share.
    shared: Vec<usize>,
}

impl Placing {
    fn choose(
        device: &dyn Device,
        config: &RuntimeConfig,
        options: &LaunchOptions,
        blocks: u32,
    ) -> Result<Self, Error> {
        let blocks = blocks as usize;
        if !options.cores.is_empty() && options.cores.len() != blocks {
            return invalid(
                "cores",
                format!("{} cores for {blocks} blocks", options.cores.len()),
            );
        }
        affinity::check_cores(&options.cores)?;
        if device.info().kind != DeviceKind::Cpu && !options.cores.is_empty() {
            return invalid(
                "cores",
                format!("'{}' runs no kernel on a core", device.info().name),
            );
        }
        let strategy = options.wait.unwrap_or(config.kernel_wait);
        let candidates = &affinity::still_usable(&device.info().cores, &config.reserved_cores);
        let wanted = if options.cores.is_empty() {
            candidates
        } else {
            &options.cores
        };
        let (wait, permit) = if config.bridge_poll_interval.is_zero() {
            match strategy {
                WaitStrategy::Spin if !device.takes_cores() => (KernelWait::Spin, None),
                WaitStrategy::Spin => (KernelWait::Spin, Some(SpinPermit::forced(blocks))),
                WaitStrategy::SpinYield => (KernelWait::SpinYield, None),
                WaitStrategy::Park => (KernelWait::Park, None),
                WaitStrategy::Auto if !device.takes_cores() => (KernelWait::Spin, None),
                WaitStrategy::Auto if device.info().kind != DeviceKind::Cpu => {
                    match SpinPermit::for_kernel(blocks) {
                        Some(permit) => (KernelWait::Spin, Some(permit)),
                        None => (KernelWait::Park, None),
                    }
                }
                WaitStrategy::Auto => {
                    budget::refresh();
                    // A core for each block, of those that it may have, and one left for callers.
                    let usable = affinity::usable_cores();
                    let permit = (CoreLease::unused(wanted) >= blocks
                        && CoreLease::unused(&usable) > blocks)
                        .then(|| SpinPermit::for_kernel(blocks))
                        .flatten();
                    match permit {
                        Some(permit) => (KernelWait::Auto, Some(permit)),
                        None => (KernelWait::Park, None),
                    }
                }
            }
        } else {
            (KernelWait::Interval(config.bridge_poll_interval), None)
        };
        let leases = if !options.cores.is_empty() {
            options.cores.iter().copied().map(CoreLease::of).collect()
        } else if matches!(wait, KernelWait::Spin | KernelWait::Auto) {
            (0..blocks)
                .filter_map(|_| CoreLease::least_used(candidates))
                .collect()
        } else {
            Vec::new()
        };
        let shared = CoreLease::free_of(candidates);
        let (permit, block_permits) = match (wait, permit) {
            // Each block gives its own back while it parks.
            (KernelWait::Auto, Some(permit)) => (None, permit.split()),
            (_, permit) => (permit, Vec::new()),
        };
        Ok(Self {
            wait,
            permit,
            block_permits,
            leases,
            shared,
        })
    }

    /// Gives the cores back that the system did not grant: of a kernel one of whose blocks runs
    /// elsewhere, all.
    fn keep_held(&mut self, places: &[PlacedThread]) {
        let mut blocks = self.leases.iter().zip(places);
        if !blocks.all(|(lease, place)| place.core() == Some(lease.core())) {
            self.leases.clear();
        }
    }

    fn cores(&self) -> Vec<usize> {
        self.leases.iter().map(CoreLease::core).collect()
    }
}
