//! Connections that a bridge carries: the replies of one kernel to several others, of several to one, from device to device.
//!
//! A *relay* is the way from one kernel: it holds that kernel's receiving side, and hands each reply to every kernel behind it before it
//! takes the next one. An *inlet* is the way into a kernel: it holds that kernel's sending side, for as many relays as there are.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::instance::KernelInstance;
use super::receive::ReceiveSide;
use super::send::{Route, SendSide};
use crate::bridge::{Service, Station};
use crate::error::TrySendError;
use crate::kernel::{DeadLetterReason, KernelState, TypeTable};
use crate::message::{Head, RAW_KIND};
use crate::thread::baton::{Baton, Held};
use crate::time::Deadline;

/// Kernels that one kernel's replies may go to: as many bits as tell which of them have the reply at hand.
pub(super) const MAX_TARGETS: usize = 32;

/// Replies that are carried at a time.
const PASS: u32 = 64;

/// Kinds of one kernel by kinds of another; this stands for those that have not been looked up.
const NOT_YET: u16 = u16::MAX;

/// The sending side of a kernel that others feed.
#[derive(Debug)]
pub(super) struct Inlet {
    to: Weak<KernelInstance>,
    /// `None` once it has gone back.
    side: Baton<Option<SendSide>>,
    feeders: Mutex<Feeders>,
}

/// Who uses an inlet.
#[derive(Debug, Default)]
struct Feeders {
    relays: Vec<Weak<Relay>>,
    /// Connections that are just being made.
    joining: u32,
    /// Whether the side has gone back: nobody joins in any more.
    is_over: bool,
}

impl Inlet {
    /// An inlet that its maker has joined.
    pub(super) fn new(to: &Arc<KernelInstance>, side: SendSide) -> Self {
        Self {
            to: Arc::downgrade(to),
            side: Baton::new(Some(side)),
            feeders: Mutex::new(Feeders {
                joining: 1,
                ..Feeders::default()
            }),
        }
    }

    /// Keeps it until [`joined`](Self::joined), so that a relay can be added. False if it has given its side back: then the kernel's
    /// handles have it.
    pub(super) fn join(&self) -> bool {
        let mut feeders = self.feeders.lock();
        feeders.joining += u32::from(!feeders.is_over);
        !feeders.is_over
    }

    /// The relay has been added, or is not going to be.
    pub(super) fn joined(&self) {
        let mut feeders = self.feeders.lock();
        feeders.joining -= 1;
        self.give_back_if_unused(&mut feeders);
    }

    /// The kernels before it.
    pub(super) fn feeders(&self) -> Vec<Arc<KernelInstance>> {
        let feeders = self.feeders.lock();
        let relays = feeders.relays.iter().filter_map(Weak::upgrade);
        relays.filter_map(|relay| relay.from.upgrade()).collect()
    }

    /// Waits until no relay is just putting a request into the kernel's ring.
    pub(super) fn await_publisher(&self, deadline: Deadline) {
        drop(take_before(&self.side, deadline));
    }

    /// One relay uses it no more. With the last one the side goes back to the kernel's handles.
    fn leave(&self, relay: &Relay) {
        let mut feeders = self.feeders.lock();
        feeders
            .relays
            .retain(|other| !std::ptr::eq(other.as_ptr(), relay));
        self.give_back_if_unused(&mut feeders);
    }

    /// Gives the side back unless a relay uses it, or is about to. Whoever wants to join in meanwhile waits for that.
    fn give_back_if_unused(&self, feeders: &mut Feeders) {
        if feeders.joining > 0 || !feeders.relays.is_empty() {
            return;
        }
        feeders.is_over = true;
        let Some(to) = self.to.upgrade() else {
            return;
        };
        // Whoever has it puts one message into a ring.
        if let Some(mut side) = take_before(&self.side, Deadline::after(to.termination_timeout))
            && let Some(side) = side.take()
        {
            *to.send.lock() = Some(side);
        }
        to.pipes.forget_entry(self);
    }
}

/// The value of a baton that is never held for longer than it takes to move a few messages.
fn take_before<T>(baton: &Baton<T>, deadline: Deadline) -> Option<Held<'_, T>> {
    loop {
        if let Some(held) = baton.try_take() {
            return Some(held);
        }
        if deadline.has_passed() {
            return None;
        }
        std::thread::yield_now();
    }
}

/// One kernel behind a relay.
struct Target {
    edge: Arc<Edge>,
    inlet: Arc<Inlet>,
    /// Type tables of the kernel before it and of its own.
    types: [Arc<TypeTable>; 2],
    /// Its kinds by those of the kernel before it.
    kinds: [u16; TypeTable::MAX_TYPES + 1],
}

/// What the bridge needs of a relay.
struct Flow {
    /// `None` once it has gone back.
    replies: Option<ReceiveSide>,
    targets: [Option<Target>; MAX_TARGETS],
    /// The block whose reply is at hand: it is looked at until every target has been given it.
    at_hand: Option<usize>,
    /// The targets that have been given it, a bit each.
    given: u32,
    /// Whether any of them took it, or one that is no target any more.
    taken: bool,
}

impl Flow {
    /// Whether it has no targets.
    fn is_unused(&self) -> bool {
        self.targets.iter().all(Option::is_none)
    }

    fn has_reply(&mut self) -> bool {
        self.replies.as_mut().is_some_and(ReceiveSide::has_reply)
    }
}

/// Why a relay takes no further kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotAdded {
    /// It has given its side back.
    Over,
    TooMany,
    /// Another thread does not let go of it.
    Busy,
}

/// The way of a kernel's replies to others.
pub(super) struct Relay {
    from: Weak<KernelInstance>,
    flow: Baton<Flow>,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Edge {
    pub(super) relay: Weak<Relay>,
    pub(super) to: Weak<KernelInstance>,
    /// Messages that have gone this way.
    pub(super) carried: AtomicU64,
}

impl Edge {
    /// Whether messages go this way.
    pub(super) fn is_live(&self) -> bool {
        let (relay, to) = (self.relay.upgrade(), self.to.upgrade());
        let (Some(relay), Some(to)) = (relay, to) else {
            return false;
        };
        relay.is_live()
            && to.signals.gate.is_open()
            && relay
                .targets()
                .iter()
                .any(|target| Arc::ptr_eq(target, &to))
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").finish_non_exhaustive()
    }
}

/// What became of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Given {
    Taken,
    /// It can never be given.
    Refused,
    /// There is no room for it now.
    Full,
    /// The kernel has ended.
    Gone,
}

impl Target {
    fn kind(&mut self, kind: u16) -> Option<u16> {
        if kind == RAW_KIND {
            return Some(RAW_KIND);
        }
        let known = self.kinds.get_mut(usize::from(kind))?;
        if *known == NOT_YET {
            let [own, next] = &self.types;
            *known = next.kind_of(own.type_of(kind)?).ok()?;
        }
        Some(*known)
    }

    /// Gives it the reply at hand.
    fn give(&mut self, replies: &ReceiveSide, block: usize) -> Given {
        let reply = replies.reply(block);
        let header = *reply.header();
        let Some(to) = self.inlet.to.upgrade() else {
            return Given::Gone;
        };
        let Some(kind) = self.kind(header.kind()) else {
            return Given::Refused;
        };
        let Some(mut side) = self.inlet.side.try_take() else {
            return Given::Full;
        };
        // Under the baton, so that nothing is put into a ring whose accounts are being closed.
        let Some(side) = side.as_mut().filter(|_| to.signals.gate.is_open()) else {
            return Given::Gone;
        };
        let head: Head = header.head().with_kind(kind).on_lane(0);
        let payload = reply.payload();
        let put = side.put(&to, Route::RoundRobin, head, reply.extension(), |body| {
            let max = body.len();
            body.get_mut(..payload.len())
                .ok_or(crate::error::Rejection::TooLarge { max })?
                .copy_from_slice(payload);
            Ok::<_, crate::error::Rejection>(payload.len())
        });
        match put {
            Ok(_) => Given::Taken,
            Err(TrySendError::Full | TrySendError::Busy) => Given::Full,
            Err(TrySendError::Rejected(_)) => Given::Refused,
            Err(TrySendError::Unavailable(_)) => Given::Gone,
        }
    }
}

impl Relay {
    pub(super) fn new(from: &Arc<KernelInstance>, replies: ReceiveSide) -> Self {
        Self {
            from: Arc::downgrade(from),
            flow: Baton::new(Flow {
                replies: Some(replies),
                targets: [const { None }; MAX_TARGETS],
                at_hand: None,
                given: 0,
                taken: false,
            }),
        }
    }

    /// Adds a kernel by an inlet that has been joined; says what forbids it.
    pub(super) fn add(
        self: &Arc<Self>,
        from: &KernelInstance,
        to: &Arc<KernelInstance>,
        inlet: &Arc<Inlet>,
    ) -> Result<Arc<Edge>, NotAdded> {
        let deadline = Deadline::after(from.termination_timeout);
        let mut flow = take_before(&self.flow, deadline).ok_or(NotAdded::Busy)?;
        if flow.replies.is_none() {
            return Err(NotAdded::Over);
        }
        let place = flow.targets.iter_mut().find(|target| target.is_none());
        let place = place.ok_or(NotAdded::TooMany)?;
        let edge = Arc::new(Edge {
            relay: Arc::downgrade(self),
            to: Arc::downgrade(to),
            carried: AtomicU64::new(0),
        });
        inlet.feeders.lock().relays.push(Arc::downgrade(self));
        *place = Some(Target {
            edge: Arc::clone(&edge),
            inlet: Arc::clone(inlet),
            types: [Arc::clone(&from.types), Arc::clone(&to.types)],
            kinds: [NOT_YET; TypeTable::MAX_TYPES + 1],
        });
        Ok(edge)
    }

    pub(super) fn from(&self) -> Option<Arc<KernelInstance>> {
        self.from.upgrade()
    }

    fn deadline(&self) -> Deadline {
        let timeout = self.from.upgrade().map(|from| from.termination_timeout);
        Deadline::after(timeout.unwrap_or_default())
    }

    /// The kernels behind it.
    pub(super) fn targets(&self) -> Vec<Arc<KernelInstance>> {
        let Some(flow) = take_before(&self.flow, self.deadline()) else {
            return Vec::new();
        };
        let targets = flow.targets.iter().flatten();
        targets
            .filter_map(|target| target.edge.to.upgrade())
            .collect()
    }

    /// Whether it carries anything.
    pub(super) fn is_live(&self) -> bool {
        self.from
            .upgrade()
            .is_some_and(|from| from.signals.gate.is_open())
    }

    /// Whether replies wait to be carried. Waits for whoever is just carrying some.
    pub(super) fn owes_replies(&self) -> bool {
        let flow = take_before(&self.flow, self.deadline());
        flow.is_none_or(|mut flow| flow.has_reply())
    }

    /// Takes a connection out; the last one takes the relay with it. False if the relay could not be had in time.
    pub(super) fn remove(&self, edge: &Edge, deadline: Deadline) -> bool {
        let Some(mut flow) = take_before(&self.flow, deadline) else {
            return false;
        };
        self.drop_targets(&mut flow, |_, target| std::ptr::eq(&*target.edge, edge));
        if flow.is_unused() {
            self.give_back(&mut flow);
        }
        true
    }

    /// Carries what can be carried, and ends. To be called when the kernel before it has ended.
    pub(super) fn end(&self) {
        let Some(mut flow) = take_before(&self.flow, self.deadline()) else {
            return;
        };
        if let Some(from) = self.from.upgrade() {
            // No more than there can be.
            for _ in 0..=from.capacity * from.blocks.len() as u64 / u64::from(PASS) {
                if flow.is_unused() || self.carry(&from, &mut flow).moved == 0 {
                    break;
                }
            }
        }
        self.drop_targets(&mut flow, |_, _| true);
        self.give_back(&mut flow);
    }

    fn drop_targets(&self, flow: &mut Flow, is_out: impl Fn(usize, &Target) -> bool) {
        for (index, slot) in flow.targets.iter_mut().enumerate() {
            if slot.as_ref().is_some_and(|target| is_out(index, target))
                && let Some(target) = slot.take()
            {
                flow.given &= !(1 << index);
                target.inlet.leave(self);
            }
        }
    }

    /// Gives the receiving side back to the handles of the kernel before it.
    fn give_back(&self, flow: &mut Flow) {
        let Some(from) = self.from.upgrade() else {
            return;
        };
        if let Some(mut replies) = flow.replies.take() {
            // A reply that a kernel has taken is not given to a caller too.
            if std::mem::take(&mut flow.taken)
                && let Some(block) = flow.at_hand
            {
                replies.release_reply(block);
                from.count_delivered();
            }
            flow.at_hand = None;
            flow.given = 0;
            from.signals.lanes.in_use.store(false, Ordering::SeqCst);
            from.signals
                .lanes
                .tells_bridge
                .store(false, Ordering::SeqCst);
            from.signals.lanes.watch.end_carrying();
            *from.receive.lock() = Some(replies);
            from.receiver_split.store(false, Ordering::Release);
            from.pipes.forget_exit(self);
            // Whoever waited for the connection finds the side again.
            from.signals.wake_all();
        }
    }

    /// Carries up to `PASS` replies.
    fn carry(&self, from: &KernelInstance, flow: &mut Flow) -> Service {
        let (mut moved, mut is_full, mut gone) = (0, false, 0_u32);
        while moved < PASS {
            let Flow {
                replies,
                targets,
                at_hand,
                given,
                taken,
            } = &mut *flow;
            let Some(replies) = replies else {
                break;
            };
            // The same as last time, whatever other blocks have replied since.
            let next = at_hand.or_else(|| replies.next_reply_spinning(from, 1));
            let Some(block) = next else {
                break;
            };
            *at_hand = next;
            for (index, slot) in targets.iter_mut().enumerate() {
                let Some(target) = slot.as_mut().filter(|_| *given & (1 << index) == 0) else {
                    continue;
                };
                match target.give(replies, block) {
                    Given::Taken => {
                        *taken = true;
                        *given |= 1 << index;
                        target.edge.carried.fetch_add(1, Ordering::Relaxed);
                    }
                    Given::Refused => *given |= 1 << index,
                    Given::Full => is_full = true,
                    Given::Gone => gone |= 1 << index,
                }
            }
            if is_full || gone != 0 {
                break;
            }
            if std::mem::take(taken) {
                from.count_delivered();
            } else {
                let lost = replies.lost(from, block);
                let letters = &from.signals.dead_letters;
                letters.reply(DeadLetterReason::Mismatch, &lost);
            }
            *given = 0;
            *at_hand = None;
            replies.release_reply(block);
            moved += 1;
        }
        if gone != 0 {
            self.drop_targets(flow, |index, _| gone & (1 << index) != 0);
        }
        Service {
            moved,
            is_waiting: is_full || gone != 0 || owes_silently(from),
            is_crowded: from.state() == KernelState::Active,
            ..Service::IDLE
        }
    }
}

/// Whether a kernel has requests of which it will not say that there are replies: a device says nothing of them, so that somebody must look.
/// The kernel has no clients.
fn owes_silently(from: &KernelInstance) -> bool {
    from.is_silent() && {
        let (accepted, processed) = from.request_counts();
        accepted > processed
    }
}

impl Station for Relay {
    fn serve(&self) -> Service {
        let Some(from) = self.from.upgrade() else {
            return Service::DONE;
        };
        let Some(mut flow) = self.flow.try_take() else {
            return Service::CONTENDED;
        };
        let service = self.carry(&from, &mut flow);
        if flow.is_unused() {
            self.give_back(&mut flow);
        }
        match flow.replies {
            Some(_) => service,
            None => Service::DONE,
        }
    }

    fn is_ready(&self) -> bool {
        // Whoever has it may have looked before the last reply came.
        let flow = self.flow.try_take();
        flow.is_none_or(|mut flow| flow.has_reply())
            || self.from.upgrade().is_some_and(|from| owes_silently(&from))
    }

    fn sample(&self, _now_ns: u64) {
        // Kernels show their signs of life themselves; this is only the way between them.
    }
}

#[cfg(test)]
mod tests {
    use crate::runtime::relay::Inlet;
    use crate::{BackendType, LaunchOptions, RingKernelRuntime};

    #[test]
    fn an_inlet_stays_while_somebody_joins_in_and_is_over_afterwards() {
        let runtime = RingKernelRuntime::builder()
            .backend(BackendType::Cpu)
            .build()
            .unwrap();
        let kernel = runtime
            .launch("echo", 1, 1, LaunchOptions::default())
            .unwrap();
        let side = kernel.instance.send.lock().take().unwrap();
        let inlet = Inlet::new(&kernel.instance, side);
        // One more while the first is at it.
        assert!(inlet.join());
        inlet.joined();
        assert!(kernel.instance.send.lock().is_none());
        inlet.joined();
        assert!(kernel.instance.send.lock().is_some());
        // From now on it would lead nowhere.
        assert!(!inlet.join());
    }
}
