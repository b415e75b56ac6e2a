//! Pipelines: the replies of one kernel as the requests of another, over one ring that both share.
//!
//! While two kernels are connected, the block of the first holds the writing end of the second one's request ring. It
//! takes it, and brings it back, while it is idle, by way of its [`OutletSlot`](crate::kernel::outlet::OutletSlot); the
//! reading end of its own reply ring waits here until then. For blocks on a device, whoever keeps them running does so.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use super::instance::{ControlPlane, KernelInstance};
use super::lifecycle::MessageTally;
use super::link::progress;
use super::receive::ReceiveSide;
use super::relay::{Edge, Inlet, NotAdded, Relay};
use super::send::SendSide;
use crate::backend::cpu::Berth;
use crate::backend::{BlockMemory, HostProducer};
use crate::bridge::Place;
use crate::error::Error;
use crate::kernel::KernelState;
use crate::kernel::outlet::{Counter, Guest, Outlet, Valve};
use crate::kernel::signals::KernelSignals;
use crate::logging;
use crate::time::Deadline;

/// Between two looks whether a block has followed.
const NAP: Duration = Duration::from_micros(50);

/// How long the control plane waits for a thread that uses a side: far longer than to copy a
/// message, unless the message's own code takes its time.
const SIDE_IN_USE: Duration = Duration::from_millis(100);

/// How a connection works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectionKind {
    /// The first kernel writes straight into the second one's request ring: both have one block, on the same device.
    SharedRing,
    /// As `SharedRing`, and the first kernel's thread runs the second one's handler between its own messages: both have the
    /// same core, or none of their own, so that two threads would wait for the scheduler with every message. A handler that
    /// takes long holds the other up. The second kernel's own thread takes over while the first one is not active.
    ///
    /// If the second kernel's handler does not return, only the second kernel has failed. The first
    /// one can be terminated all the same; its thread is left behind then, which
    /// [`ShutdownReport::left_behind`](crate::ShutdownReport::left_behind) tells, and ends when
    /// that handler returns. A command to the first kernel that is not followed in time gives
    /// [`Error::ThreadHeld`], with the second one's name. If the first kernel's handler does not
    /// return, the second one's own thread goes on with the second kernel.
    SharedThread,
    /// The bridge of the first kernel's device carries each message: between devices, kernels of several blocks, wherever a kernel feeds
    /// several others or is fed by several, and on devices whose kernels cannot write into one another's rings (Metal, Vulkan in
    /// staged mode).
    Bridged,
}

/// What a connection is made of.
#[derive(Clone)]
pub(super) enum Way {
    Ring(Arc<Joint>),
    Bridge(Arc<Edge>),
}

/// What a kernel has to do with pipelines.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    /// By which its requests come.
    inlet: Mutex<Option<Arc<Joint>>>,
    /// By which its replies go.
    outlet: Mutex<Option<Arc<Joint>>>,
    /// What has gone there, now and earlier.
    passed: Mutex<Passed>,
    /// By which its requests come, if a bridge carries them.
    entry: Mutex<Option<Arc<Inlet>>>,
    /// By which its replies go, if a bridge carries them.
    exit: Mutex<Option<Arc<Relay>>>,
}

#[derive(Debug, Default)]
struct Passed {
    /// Delivered by ways that are closed and settled.
    settled: u64,
    passages: Vec<Arc<Passage>>,
}

/// The messages of one connection: requests of the kernel behind it from one position to another.
pub(super) struct Passage {
    valve: Arc<Valve>,
    next: Arc<KernelSignals>,
    block: Arc<BlockMemory>,
    capacity: u64,
    accepted: Arc<[Counter]>,
    first: u64,
    /// `u64::MAX` while it goes on.
    end: AtomicU64,
}

impl fmt::Debug for Passage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passage")
            .field("next", &self.next.name)
            .field("first", &self.first)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl Passage {
    fn processed(&self) -> u64 {
        // In this order, so that what is processed has been accepted.
        let processed = self.block.control().processed();
        progress(&self.accepted[0], processed, self.capacity).1
    }

    pub(super) fn delivered(&self) -> u64 {
        let end = self.end.load(Ordering::Acquire);
        self.processed().min(end).saturating_sub(self.first)
    }

    /// Whether `delivered` stays as it is.
    fn is_settled(&self) -> bool {
        let end = self.end.load(Ordering::Acquire);
        end != u64::MAX && (self.next.gate.state().is_final() || self.processed() >= end)
    }
}

/// Two connected kernels, and what the connection keeps from their callers.
pub(super) struct Joint {
    pub(super) from: Weak<KernelInstance>,
    pub(super) to: Weak<KernelInstance>,
    names: [String; 2],
    pub(super) kind: ConnectionKind,
    pub(super) passage: Arc<Passage>,
    /// The receiving side of the first kernel.
    replies: Mutex<Option<ReceiveSide>>,
    /// The connection over the bridge that it gave way to.
    pub(super) moved: Mutex<Option<Arc<Edge>>>,
}

impl fmt::Debug for Joint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Joint")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

impl Joint {
    /// Both kernels, unless one of them has begun to end.
    fn live(&self) -> Option<(Arc<KernelInstance>, Arc<KernelInstance>)> {
        let (from, to) = (self.from.upgrade()?, self.to.upgrade()?);
        let is_open = from.signals.gate.is_open() && to.signals.gate.is_open();
        is_open.then_some((from, to))
    }

    pub(super) fn is_live(&self) -> bool {
        self.live().is_some() && self.replies.lock().is_some()
    }

    /// Gives back what is there: to the first kernel its receiving side, to the second one its sending side once the
    /// first one has brought it back.
    pub(super) fn undo(&self) {
        let Some(from) = self.from.upgrade() else {
            return;
        };
        {
            let mut replies = self.replies.lock();
            if replies.is_some() {
                // The kernel has no such side while it lies here, so that no thread decodes a
                // message under this lock.
                *from.receive.lock() = replies.take();
                from.receiver_split.store(false, Ordering::Release);
            }
        }
        let Some(side) = self.take_requests(&from) else {
            return;
        };
        from.pipes.outlet.lock().take();
        if let Some(to) = self.to.upgrade() {
            *to.send.lock() = Some(side);
            to.pipes.inlet.lock().take();
        }
    }

    /// The sending side of the second kernel, once the first one has brought it back.
    fn take_requests(&self, from: &KernelInstance) -> Option<SendSide> {
        let outlet = from.signals.outlet.take_back()?;
        let end = self.passage.accepted[0].get();
        self.passage.end.store(end, Ordering::Release);
        if let Some(to) = self.to.upgrade() {
            to.signals.berth.lock().take();
        }
        let producer = HostProducer::from_parts(outlet.producer, outlet.memory);
        Some(SendSide::new(vec![producer]))
    }

    /// Gives way to the bridge. Both kernels' control planes are locked, and both are idle. The sides pass from hand to hand: no caller gets
    /// hold of them meanwhile.
    fn give_way(
        &self,
        from: &Arc<KernelInstance>,
        to: &Arc<KernelInstance>,
        place: Place,
    ) -> Result<(), Error> {
        recall(from)?;
        let replies = self.replies.lock().take();
        let (Some(replies), Some(requests)) = (replies, self.take_requests(from)) else {
            return Err(busy(from, "the connection that it has has just ended"));
        };
        let exit = Exit::new(from, replies, place);
        let entry = Entry::new(to, requests);
        from.pipes.outlet.lock().take();
        to.pipes.inlet.lock().take();
        *self.moved.lock() = Some(exit.lead_to(from, to, &entry)?);
        Ok(())
    }
}

impl Pipes {
    /// Whether requests come from another kernel.
    pub(super) fn has_inlet(&self) -> bool {
        self.inlet.lock().is_some() || self.entry.lock().is_some()
    }

    /// Whether replies go to another kernel.
    pub(super) fn has_outlet(&self) -> bool {
        let exit = self.exit.lock().clone();
        live(&self.outlet).is_some() || exit.is_some_and(|relay| relay.is_live())
    }

    /// The way into the kernel has been given up.
    pub(super) fn forget_entry(&self, inlet: &Inlet) {
        let mut entry = self.entry.lock();
        entry.take_if(|other| std::ptr::eq(&**other, inlet));
    }

    /// The way out of the kernel has been given up.
    pub(super) fn forget_exit(&self, relay: &Relay) {
        let mut exit = self.exit.lock();
        exit.take_if(|other| std::ptr::eq(&**other, relay));
    }

    /// The kernels whose replies come here.
    fn before(&self) -> Vec<Arc<KernelInstance>> {
        let joint = live(&self.inlet).and_then(|joint| joint.from.upgrade());
        let entry = self.entry.lock().clone();
        let feeders = entry.map_or_else(Vec::new, |inlet| inlet.feeders());
        joint.into_iter().chain(feeders).collect()
    }

    /// The kernels that replies go to.
    fn behind(&self) -> Vec<Arc<KernelInstance>> {
        let joint = live(&self.outlet).and_then(|joint| joint.to.upgrade());
        let exit = self.exit.lock().clone();
        let targets = exit.map_or_else(Vec::new, |relay| relay.targets());
        joint.into_iter().chain(targets).collect()
    }

    /// Whether what `first` replies comes to this kernel, `own`.
    pub(super) fn comes_from(&self, first: &Arc<KernelInstance>, own: &KernelInstance) -> bool {
        std::ptr::eq(&**first, own) || way_to(first, self.before(), Self::before).is_some()
    }

    /// Replies that kernels have taken.
    pub(super) fn delivered(&self) -> u64 {
        let passed = self.passed.lock();
        let open: u64 = passed.passages.iter().map(|way| way.delivered()).sum();
        passed.settled + open
    }

    /// Waits until no other kernel is just publishing a request. To be called once the kernel takes none any more: then
    /// none is published after this.
    pub(super) fn await_publisher(&self, timeout: Duration) {
        let entry = self.entry.lock().clone();
        if let Some(inlet) = entry {
            inlet.await_publisher(Deadline::after(timeout));
        }
        let Some(joint) = self.inlet.lock().clone() else {
            return;
        };
        let deadline = Deadline::after(timeout);
        joint.passage.valve.call_warden();
        while joint.passage.valve.is_publishing() && !deadline.has_passed() {
            std::thread::yield_now();
        }
    }

    /// Ends connections whose kernels have ended, as far as that is possible now.
    pub(super) fn settle(&self) {
        for way in [&self.inlet, &self.outlet] {
            let joint = way.lock().clone();
            if let Some(joint) = joint.filter(|joint| joint.live().is_none()) {
                joint.undo();
            }
        }
        let exit = self.exit.lock().clone();
        if let Some(relay) = exit.filter(|relay| !relay.is_live()) {
            relay.end();
        }
    }
}

/// The connection there is, unless it is over.
fn live(way: &Mutex<Option<Arc<Joint>>>) -> Option<Arc<Joint>> {
    let joint = way.lock().clone();
    joint.filter(|joint| joint.live().is_some())
}

/// See [`RingKernelRuntime::connect`](super::RingKernelRuntime::connect).
pub(super) fn connect(
    from: &Arc<KernelInstance>,
    to: &Arc<KernelInstance>,
    ours: &[Arc<KernelInstance>],
) -> Result<Way, Error> {
    let refuse = |reason| {
        Err(Error::CannotConnect {
            from: from.signals.name.clone(),
            to: to.signals.name.clone(),
            reason,
        })
    };
    check_states(from, to, "Connected")?;
    let is_ours = |kernel| ours.iter().any(|ours| Arc::ptr_eq(ours, kernel));
    if !is_ours(from) || !is_ours(to) {
        return refuse("they are not of the same runtime");
    }
    check_cycle(from, to)?;
    if from
        .pipes
        .behind()
        .iter()
        .any(|kernel| Arc::ptr_eq(kernel, to))
    {
        return Err(Error::ConnectedAlready {
            kernel: from.signals.name.clone(),
            with: to.signals.name.clone(),
        });
    }
    let is_alone = !from.pipes.has_outlet() && !to.pipes.has_inlet();
    if !is_alone || !can_share(from, to) {
        return bridge(from, to);
    }
    let _controls = lock_both(from, to);
    check_states(from, to, "Connected")?;
    // What is left of earlier connections, whose other kernels have ended.
    if !from.signals.outlet.is_back() {
        recall(from)?;
    }
    from.pipes.settle();
    to.pipes.settle();
    let (requests, mut replies) = take_sides(from, to)?;
    let kind = if from.is_on_threads && from.cores == to.cores {
        ConnectionKind::SharedThread
    } else {
        ConnectionKind::SharedRing
    };
    let joint = match offer(from, to, requests, kind) {
        Ok(passage) => Joint {
            from: Arc::downgrade(from),
            to: Arc::downgrade(to),
            names: [from, to].map(|kernel| kernel.signals.name.clone()),
            kind,
            passage,
            replies: Mutex::new(None),
            moved: Mutex::new(None),
        },
        Err(error) => {
            give_back_replies(from, replies);
            return Err(error);
        }
    };
    // It was about to write one to its own ring, and has done so.
    let unread = replies.has_reply();
    *joint.replies.lock() = Some(replies);
    if unread {
        recall(from)?;
        joint.undo();
        return Err(busy(from, "replies have not been received"));
    }
    let joint = Arc::new(joint);
    let mut passed = from.pipes.passed.lock();
    let mut settled = 0;
    passed.passages.retain(|way| {
        let over = way.is_settled();
        settled += if over { way.delivered() } else { 0 };
        !over
    });
    passed.settled += settled;
    passed.passages.push(Arc::clone(&joint.passage));
    drop(passed);
    *from.pipes.outlet.lock() = Some(Arc::clone(&joint));
    *to.pipes.inlet.lock() = Some(Arc::clone(&joint));
    // Whoever waits for a reply or for room finds the side gone.
    from.signals.wake_all();
    logging::debug!("kernel '{}' -> kernel '{}'", joint.names[0], joint.names[1]);
    Ok(Way::Ring(joint))
}

/// Whether one kernel can write straight into the other's ring.
fn can_share(from: &KernelInstance, to: &KernelInstance) -> bool {
    let has_one_block = from.blocks.len() == 1 && to.blocks.len() == 1;
    // A handler is run when there is room for all that it may reply.
    let has_room = u64::from(from.replies) <= to.capacity;
    from.shares_rings && to.shares_rings && from.device == to.device && has_one_block && has_room
}

/// Connects two kernels by way of the first one's bridge, with whatever is connected with them already.
fn bridge(from: &Arc<KernelInstance>, to: &Arc<KernelInstance>) -> Result<Way, Error> {
    // Rings that only two kernels share give way to the bridge.
    let mut rings = Vec::new();
    for joint in [live(&from.pipes.outlet), live(&to.pipes.inlet)] {
        if let Some(joint) = joint
            && let Some((before, behind)) = joint.live()
        {
            rings.push((joint, before, behind));
        }
    }
    let kernels = rings
        .iter()
        .flat_map(|(_, before, behind)| [before, behind]);
    let _controls = lock_all(kernels.chain([from, to]));
    check_states(from, to, "Connected")?;
    for (_, before, behind) in &rings {
        check_states(before, behind, "Connected")?;
    }
    // Unless it has been undone since.
    let rings: Vec<_> = rings.iter().filter(|(joint, ..)| joint.is_live()).collect();
    // What can be refused is refused before any ring gives way.
    let places: Vec<_> = rings
        .iter()
        .map(|(_, before, _)| before.bridge.place())
        .collect::<Result<_, _>>()?;
    let leads_on = rings.iter().any(|ring| Arc::ptr_eq(&ring.1, from));
    let is_led_to = rings.iter().any(|ring| Arc::ptr_eq(&ring.2, to));
    let exit = (!leads_on).then(|| Exit::of(from)).transpose()?;
    let entry = (!is_led_to).then(|| Entry::of(to)).transpose()?;
    for ((joint, before, behind), place) in rings.into_iter().zip(places) {
        joint.give_way(before, behind, place)?;
    }
    let exit = exit.map_or_else(|| Exit::of(from), Ok)?;
    let entry = entry.map_or_else(|| Entry::of(to), Ok)?;
    let edge = exit.lead_to(from, to, &entry)?;
    // Whoever waits for a reply or for room finds the side gone.
    from.signals.wake_all();
    to.signals.wake_all();
    logging::debug!(
        "kernel '{}' -> bridge -> kernel '{}'",
        from.signals.name,
        to.signals.name
    );
    Ok(Way::Bridge(edge))
}

/// What is left of earlier connections of an idle kernel that has none now, whose other kernels have ended.
fn clear(kernel: &KernelInstance) -> Result<(), Error> {
    if !kernel.signals.outlet.is_back() {
        recall(kernel)?;
    }
    kernel.pipes.settle();
    Ok(())
}

/// A relay, and what it takes to have the bridge look after it if it is new. One that is not used gives its side back.
struct Exit {
    relay: Arc<Relay>,
    place: Option<Place>,
}

impl Drop for Exit {
    fn drop(&mut self) {
        if self.place.is_some() {
            self.relay.end();
        }
    }
}

impl Exit {
    /// That of a kernel whose replies do not go into a ring; a new one if it has none.
    fn of(from: &Arc<KernelInstance>) -> Result<Self, Error> {
        clear(from)?;
        let found = from.pipes.exit.lock().clone();
        if let Some(relay) = found {
            return Ok(Self { relay, place: None });
        }
        let place = from.bridge.place()?;
        Ok(Self::new(from, take_replies(from)?, place))
    }

    fn new(from: &Arc<KernelInstance>, replies: ReceiveSide, place: Place) -> Self {
        let relay = Arc::new(Relay::new(from, replies));
        *from.pipes.exit.lock() = Some(Arc::clone(&relay));
        // From now on the kernel rings for the bridge.
        from.signals.lanes.watch.begin_carrying();
        from.signals.lanes.in_use.store(true, Ordering::SeqCst);
        let tells_bridge = &from.signals.lanes.tells_bridge;
        tells_bridge.store(from.is_silent(), Ordering::SeqCst);
        Self {
            relay,
            place: Some(place),
        }
    }

    /// Has its replies carried to a kernel.
    fn lead_to(
        mut self,
        from: &Arc<KernelInstance>,
        to: &Arc<KernelInstance>,
        entry: &Entry,
    ) -> Result<Arc<Edge>, Error> {
        let edge = match self.relay.add(from, to, &entry.inlet) {
            Ok(edge) => edge,
            // All kernels behind it have just ended.
            Err(NotAdded::Over) => return Self::of(from)?.lead_to(from, to, entry),
            Err(NotAdded::TooMany) => {
                return Err(busy(from, "32 kernels take its replies already"));
            }
            Err(NotAdded::Busy) => return Err(busy(from, "they are being carried")),
        };
        // Only now: a relay that carries to nobody is over.
        if let Some(place) = self.place.take()
            && let Err(error) = from.bridge.put(place, Arc::<Relay>::clone(&self.relay))
        {
            self.relay.end();
            return Err(error);
        }
        Ok(edge)
    }
}

/// An inlet that has been joined.
struct Entry {
    inlet: Arc<Inlet>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.inlet.joined();
    }
}

impl Entry {
    /// That of a kernel whose requests do not come by a ring; a new one if it has none.
    fn of(to: &Arc<KernelInstance>) -> Result<Self, Error> {
        to.pipes.settle();
        let found = to.pipes.entry.lock().clone();
        if let Some(inlet) = found
            && inlet.join()
        {
            return Ok(Self { inlet });
        }
        let side = lock_send(to)?.take();
        let side = side.ok_or_else(|| busy(to, "they are split off"))?;
        Ok(Self::new(to, side))
    }

    fn new(to: &Arc<KernelInstance>, side: SendSide) -> Self {
        let inlet = Arc::new(Inlet::new(to, side));
        *to.pipes.entry.lock() = Some(Arc::clone(&inlet));
        Self { inlet }
    }
}

/// The sending side of a kernel. A thread that encodes a message runs foreign code under this lock:
/// not waited for.
fn lock_send(kernel: &KernelInstance) -> Result<MutexGuard<'_, Option<SendSide>>, Error> {
    let send = kernel.send.try_lock_for(SIDE_IN_USE);
    send.ok_or_else(|| busy(kernel, "another thread is sending"))
}

/// As `lock_send`, of the receiving side, where messages are decoded.
fn lock_receive(kernel: &KernelInstance) -> Result<MutexGuard<'_, Option<ReceiveSide>>, Error> {
    let receive = kernel.receive.try_lock_for(SIDE_IN_USE);
    receive.ok_or_else(|| busy(kernel, "another thread is receiving"))
}

/// Takes the receiving side of a kernel.
fn take_replies(from: &KernelInstance) -> Result<ReceiveSide, Error> {
    let mut receive = lock_receive(from)?;
    if from.calls.any_pending() {
        return Err(busy(from, "a call is pending"));
    }
    let Some(mut side) = receive.take() else {
        return Err(busy(from, "they are split off"));
    };
    if side.has_message() {
        *receive = Some(side);
        return Err(busy(from, "replies have not been received"));
    }
    from.receiver_split.store(true, Ordering::Release);
    Ok(side)
}

fn busy(kernel: &KernelInstance, reason: &'static str) -> Error {
    Error::EndpointsBusy {
        kernel: kernel.signals.name.clone(),
        reason,
    }
}

/// Fails unless both kernels are resident and idle.
pub(super) fn check_states(
    from: &KernelInstance,
    to: &KernelInstance,
    end: &'static str,
) -> Result<(), Error> {
    for kernel in [from, to] {
        let state = kernel.state();
        if !matches!(state, KernelState::Launched | KernelState::Deactivated) {
            return Err(Error::InvalidTransition {
                kernel: kernel.signals.name.clone(),
                from: state.name(),
                to: end,
            });
        }
    }
    Ok(())
}

/// Fails if what `to` replies comes to `from`.
fn check_cycle(from: &Arc<KernelInstance>, to: &Arc<KernelInstance>) -> Result<(), Error> {
    match way_to(from, vec![Arc::clone(to)], Pipes::behind) {
        None => Ok(()),
        Some(way) => {
            let names = [from].into_iter().chain(&way);
            Err(Error::Cycle {
                kernels: names.map(|kernel| kernel.signals.name.clone()).collect(),
            })
        }
    }
}

/// A shortest way from one of the `first` kernels to `sought`, both ends included, if `next` leads there. Looks at each kernel once.
fn way_to(
    sought: &Arc<KernelInstance>,
    first: Vec<Arc<KernelInstance>>,
    next: fn(&Pipes) -> Vec<Arc<KernelInstance>>,
) -> Option<Vec<Arc<KernelInstance>>> {
    let mut seen: HashSet<_> = first.iter().map(Arc::as_ptr).collect();
    // Each with the place of the one that led to it.
    let mut found: Vec<_> = first.into_iter().map(|kernel| (kernel, None)).collect();
    let mut place = 0;
    while let Some((kernel, _)) = found.get(place) {
        if Arc::ptr_eq(kernel, sought) {
            let steps = std::iter::successors(found.get(place), |(_, led_by)| {
                led_by.and_then(|place: usize| found.get(place))
            });
            let mut way: Vec<_> = steps.map(|(kernel, _)| Arc::clone(kernel)).collect();
            way.reverse();
            return Some(way);
        }
        let fresh = next(&kernel.pipes)
            .into_iter()
            .filter(|kernel| seen.insert(Arc::as_ptr(kernel)))
            .map(|kernel| (kernel, Some(place)))
            .collect::<Vec<_>>();
        found.extend(fresh);
        place += 1;
    }
    None
}

/// Both control planes, locked in an order that all threads agree on.
pub(super) fn lock_both<'a>(
    from: &'a Arc<KernelInstance>,
    to: &'a Arc<KernelInstance>,
) -> [MutexGuard<'a, ControlPlane>; 2] {
    if Arc::as_ptr(from) < Arc::as_ptr(to) {
        let first = from.control.lock();
        [first, to.control.lock()]
    } else {
        let first = to.control.lock();
        [first, from.control.lock()]
    }
}

/// The control planes of all of these, in the same order.
fn lock_all<'a>(
    kernels: impl Iterator<Item = &'a Arc<KernelInstance>>,
) -> Vec<MutexGuard<'a, ControlPlane>> {
    let mut kernels: Vec<_> = kernels.collect();
    kernels.sort_by_key(|kernel| Arc::as_ptr(kernel));
    kernels.dedup_by(|one, other| Arc::ptr_eq(one, other));
    kernels.iter().map(|kernel| kernel.control.lock()).collect()
}

/// Takes the sides that a connection needs: both, or none.
fn take_sides(
    from: &KernelInstance,
    to: &KernelInstance,
) -> Result<(HostProducer, ReceiveSide), Error> {
    let mut send = lock_send(to)?;
    let mut receive = lock_receive(from)?;
    if from.calls.any_pending() {
        return Err(busy(from, "a call is pending"));
    }
    match receive.as_mut() {
        None => return Err(busy(from, "they are split off")),
        Some(side) => {
            if side.has_message() {
                return Err(busy(from, "replies have not been received"));
            }
        }
    }
    let requests = send.take().and_then(SendSide::into_only);
    match (requests, receive.take()) {
        (Some(requests), Some(replies)) => {
            from.receiver_split.store(true, Ordering::Release);
            Ok((requests, replies))
        }
        (_, replies) => {
            *receive = replies;
            Err(busy(to, "they are split off"))
        }
    }
}

fn give_back_replies(from: &KernelInstance, replies: ReceiveSide) {
    let mut receive = from.receive.lock();
    *receive = Some(replies);
    from.receiver_split.store(false, Ordering::Release);
}

/// Puts the writing end of `to`'s ring into the hands of `from`'s block; back where it was if that cannot be done.
fn offer(
    from: &Arc<KernelInstance>,
    to: &Arc<KernelInstance>,
    requests: HostProducer,
    kind: ConnectionKind,
) -> Result<Arc<Passage>, Error> {
    let passage = Arc::new(Passage {
        valve: Arc::new(Valve::default()),
        next: Arc::clone(&to.signals),
        block: Arc::clone(&to.blocks[0]),
        capacity: to.capacity,
        accepted: Arc::clone(&to.accepted),
        first: to.accepted[0].get(),
        end: AtomicU64::new(u64::MAX),
    });
    let guest = (kind == ConnectionKind::SharedThread).then(|| {
        let berth = Arc::new(Berth::new(Arc::clone(&to.signals)));
        *to.signals.berth.lock() = Some(Arc::<Berth>::clone(&berth));
        berth as Arc<dyn Guest>
    });
    let slot = &from.signals.outlet;
    slot.offer(Outlet::new(
        (
            requests.into_parts(),
            Arc::<BlockMemory>::clone(&to.blocks[0]),
        ),
        Arc::clone(&passage.valve),
        Arc::clone(&to.signals),
        Arc::clone(&to.accepted),
        to.needs_wake,
        guest,
        [Arc::clone(&from.types), Arc::clone(&to.types)],
    ));
    let followed = follow(from, "connection", || slot.is_taken());
    if followed.is_err()
        && let Some(outlet) = slot.take_back()
    {
        to.signals.berth.lock().take();
        let producer = HostProducer::from_parts(outlet.producer, outlet.memory);
        *to.send.lock() = Some(SendSide::new(vec![producer]));
        return followed.map(|()| passage);
    }
    Ok(passage)
}

/// Waits until the block of an idle kernel has brought its outlet back.
pub(super) fn recall(from: &KernelInstance) -> Result<(), Error> {
    let slot = &from.signals.outlet;
    slot.recall();
    let followed = follow(from, "disconnection", || slot.is_back());
    if followed.is_err() {
        slot.cancel_recall();
        if slot.is_back() {
            return Ok(());
        }
    }
    followed
}

/// Wakes the block of an idle kernel, and waits until it has followed.
fn follow(
    kernel: &KernelInstance,
    operation: &'static str,
    has_followed: impl Fn() -> bool,
) -> Result<(), Error> {
    let deadline = Deadline::after(kernel.termination_timeout);
    kernel.signals.wake_all();
    while !has_followed() {
        if deadline.has_passed() || kernel.state().is_final() {
            return Err(Error::Timeout {
                operation,
                kernel: kernel.signals.name.clone(),
                after: kernel.termination_timeout,
            });
        }
        std::thread::sleep(NAP);
    }
    Ok(())
}

/// The kernels, each behind all those that feed it; otherwise in the order that they have.
pub(super) fn upstream_first(kernels: &[Arc<KernelInstance>]) -> Vec<Arc<KernelInstance>> {
    // The longest way that leads to each, which is known once it is for all before it. There are no cycles.
    let mut depths = HashMap::new();
    let mut left = kernels.to_vec();
    while let Some(kernel) = left.pop() {
        let mut before = kernel.pipes.before();
        let known = before
            .iter()
            .filter_map(|kernel| depths.get(&Arc::as_ptr(kernel)));
        let deepest = known.max().map_or(0, |depth| depth + 1);
        before.retain(|kernel| !depths.contains_key(&Arc::as_ptr(kernel)));
        if before.is_empty() {
            depths.insert(Arc::as_ptr(&kernel), deepest);
        } else {
            left.push(kernel);
            left.append(&mut before);
        }
    }
    let mut kernels = kernels.to_vec();
    kernels.sort_by_key(|kernel| depths.get(&Arc::as_ptr(kernel)).copied());
    kernels
}

/// Replies of a kernel that has been booked, some of which kernels behind it may yet take.
#[derive(Debug)]
pub(super) struct Settling {
    passages: Vec<Arc<Passage>>,
    /// Delivered, and booked so.
    booked: u64,
}

impl Settling {
    /// Books what has been delivered since.
    pub(super) fn book(&mut self, replies: &mut MessageTally) {
        let delivered: u64 = self.passages.iter().map(|way| way.delivered()).sum();
        let more = (delivered - self.booked).min(replies.returned);
        replies.delivered += more;
        replies.returned -= more;
        self.booked += more;
    }

    /// Whether nothing can come any more.
    pub(super) fn is_over(&self) -> bool {
        self.passages.iter().all(|way| way.is_settled())
    }
}

impl KernelInstance {
    /// Whether a bridge has replies of this kernel to carry.
    pub(super) fn owes_replies(&self) -> bool {
        let exit = self.pipes.exit.lock().clone();
        exit.is_some_and(|relay| relay.is_live() && relay.owes_replies())
    }

    /// The replies' accounts of a kernel that has ended, and those of them that are not final.
    pub(super) fn closing_reply_tally(&self) -> (MessageTally, Option<Settling>) {
        let passages = std::mem::take(&mut self.pipes.passed.lock().passages);
        let booked: u64 = passages.iter().map(|way| way.delivered()).sum();
        self.pipes.passed.lock().settled += booked;
        let replies = self.reply_tally();
        let settling = Settling { passages, booked };
        (replies, (!settling.is_over()).then_some(settling))
    }
}
