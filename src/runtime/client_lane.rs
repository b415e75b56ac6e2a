//! A client's end of its lane: how it sends, finds its replies, and moves messages for all while it waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::calls::CALL_BIT;
use super::client_inbox::{ClientInbox, Fit, Wanted};
use super::client_options::{Backpressure, ClientOptions, ClientStats};
use super::instance::KernelInstance;
use super::link::KernelLink;
use super::port::KernelPort;
use super::receive::{Miss, WaitEnd};
use super::send::{Address, SendOptions, refused, until_sent};
use crate::backend::cpu::runs_here;
use crate::bridge::{ClientEnds, Hub, Outbox, Port};
use crate::error::{CallError, MessageError, Rejection, SendTimeoutError, TrySendError};
use crate::kernel::DeadLetterReason;
use crate::message::{EXTENSION_BYTES, Extension, MessageHeader};
use crate::thread::{CallerStep, Waiter};
use crate::time::Deadline;

/// How much a look for a reply may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effort {
    /// No more than for the client itself.
    Glance,
    /// The client waits: it has the time to merge other clients' requests.
    Waiting,
    /// Its time is up. What the kernel has written it shall find, whoever is just moving messages.
    Last,
}

/// A client but for the types of its messages.
pub(super) struct ClientLane {
    pub(super) hub: Arc<Hub<KernelPort>>,
    pub(super) number: u16,
    outbox: Outbox,
    inbox: ClientInbox,
    pub(super) options: ClientOptions,
    /// Whether requests may lie in the lane that the kernel has not been given.
    is_dirty: bool,
    /// Whether it is one of those who route replies.
    is_watching: bool,
    /// Whether it is one of those who sleep until others do.
    is_asleep: bool,
    /// Counts calls.
    calls: u32,
    /// Requests that went to the kernel directly.
    direct: u64,
    waited: u64,
    refused: u64,
}

impl ClientLane {
    pub(super) fn new(
        instance: Arc<KernelInstance>,
        hub: Arc<Hub<KernelPort>>,
        number: u16,
        ends: ClientEnds,
        options: ClientOptions,
    ) -> Self {
        Self {
            hub,
            number,
            outbox: ends.outbox,
            inbox: ClientInbox::new(instance, ends.shared, ends.replies, ends.aside),
            options,
            is_dirty: false,
            is_watching: false,
            is_asleep: false,
            calls: 0,
            direct: 0,
            waited: 0,
            refused: 0,
        }
    }

    pub(super) fn instance(&self) -> &KernelInstance {
        &self.inbox.instance
    }

    /// Address of a message that is sent without options.
    #[inline]
    pub(super) fn address(&self, kind: u16) -> Address {
        let options = SendOptions {
            priority: self.options.priority,
            time_to_live: self.options.time_to_live,
            ..SendOptions::default()
        };
        // Without a correlation nothing can be wrong with it.
        Address::with(kind, &options).unwrap_or(Address::plain(kind))
    }

    pub(super) fn stats(&self) -> ClientStats {
        let shared = &self.inbox.shared;
        ClientStats {
            sent: self.direct + shared.pushed.get(),
            received: shared.delivered.get(),
            waited: self.waited,
            refused: self.refused,
            dropped: shared.displaced.get() + shared.overflowed.get(),
            expired: shared.expired.get(),
            lost_replies: shared.lost_replies.get(),
            queued: shared.backlog(),
        }
    }

    #[inline]
    pub(super) fn try_send(
        &mut self,
        address: &Address,
        write: impl FnOnce(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), TrySendError> {
        self.inbox.instance.signals.gate.check_send()?;
        // Deadlines are looked at where lanes are merged, if not by the kernel.
        let needs_lane = address.has_deadline() && !self.inbox.instance.is_on_threads;
        if needs_lane
            && !self.hub.is_crowded()
            && let Some(merger) = self.hub.try_take()
        {
            self.hub.use_lanes(&merger);
        }
        let extension = address.extension_now(&self.inbox.instance);
        let route = address.route_in_lane(self.inbox.instance.blocks.len());
        if let Outbox::Mailbox(_) = self.outbox {
            return self.replace(address, route, extension, write);
        }
        if !needs_lane
            && !self.hub.is_crowded()
            && let Some(mut merger) = self.hub.try_take()
        {
            if self.is_dirty {
                merger.merge_some();
                self.is_dirty = merger.has_backlog(self.number);
            }
            // Looked at again: nobody changes it without the baton.
            if !self.is_dirty && !self.hub.is_crowded() {
                let sent = merger.send(self.number, route, address.head(), extension, write);
                match sent {
                    Ok(()) => self.direct += 1,
                    Err(TrySendError::Full) => self.refused += 1,
                    Err(_) => {}
                }
                return sent;
            }
        }
        self.push(address, route, extension, write)
    }

    /// Puts a request into the lane.
    #[inline]
    fn push(
        &mut self,
        address: &Address,
        route: u16,
        extension: Option<Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), TrySendError> {
        let head = address.head().on_lane(route);
        let level = head.level();
        let Outbox::Queues(queues) = &mut self.outbox else {
            return Err(TrySendError::Full);
        };
        if queues[level].free_slots(1) == 0 {
            self.hand_on(true);
        }
        let Outbox::Queues(queues) = &mut self.outbox else {
            return Err(TrySendError::Full);
        };
        let used = self.inbox.shared.levels.load(Ordering::Relaxed);
        if used & (1 << level) == 0 {
            self.inbox
                .shared
                .levels
                .store(used | (1 << level), Ordering::Relaxed);
        }
        let pushed = queues[level]
            .reserve_head(head, extension.as_ref())
            .map_err(refused)
            .and_then(|mut slot| {
                let length = write(slot.body_mut())?;
                slot.commit(length).map_err(refused)
            });
        match pushed {
            Ok(()) => {
                self.inbox.shared.pushed.add(1);
                self.is_dirty = true;
                self.hand_on(false);
            }
            Err(TrySendError::Full) => self.refused += 1,
            Err(_) => {}
        }
        pushed
    }

    /// Puts a request into the mailbox.
    #[inline]
    fn replace(
        &mut self,
        address: &Address,
        route: u16,
        extension: Option<Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), TrySendError> {
        let Outbox::Mailbox(writer) = &mut self.outbox else {
            return Err(TrySendError::Full);
        };
        let letter = writer.buffer_mut();
        let room = match extension {
            None => letter.body_mut(),
            // As much as there is beside it in the kernel's slots.
            Some(_) => {
                let body = letter.body_mut();
                let max = body.len().saturating_sub(EXTENSION_BYTES);
                &mut body[..max]
            }
        };
        let length = write(room)?;
        letter.head = address.head().on_lane(route);
        letter.extension = extension;
        letter.length = length;
        // Counted before it can be taken.
        self.inbox.shared.pushed.add(1);
        if let Some(displaced) = writer.publish() {
            self.inbox.shared.displaced.add(1);
            let lost = self.inbox.instance.lost(
                &displaced.header().on_lane(self.number),
                displaced.extension,
                displaced.payload(),
            );
            self.inbox
                .instance
                .signals
                .dead_letters
                .request(DeadLetterReason::Full, &lost);
        }
        // A mailbox has one level.
        self.inbox.shared.levels.store(u32::MAX, Ordering::Relaxed);
        self.is_dirty = true;
        self.hand_on(false);
        Ok(())
    }

    /// Sees to it that what lies in the lane is merged: does so itself, or has the bridge do it. Routes replies as well where there was
    /// `no_room`, because that may be why; else it leaves the kernel's reply rings alone, whose lines the kernel is writing.
    #[inline]
    fn hand_on(&mut self, no_room: bool) {
        if !self.hub.is_attended()
            && let Some(mut merger) = self.hub.try_take()
        {
            if no_room {
                merger.pass();
            } else {
                merger.merge_some();
            }
            self.is_dirty = merger.has_backlog(self.number);
            if !self.is_dirty {
                return;
            }
        }
        self.hub.call_bridge();
    }

    /// As `try_send`, but does what its policy says if there is no room.
    #[inline]
    pub(super) fn send(
        &mut self,
        address: &Address,
        timeout: Duration,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), SendTimeoutError> {
        match self.try_send(address, &mut write) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full | TrySendError::Busy) => {}
            Err(TrySendError::Unavailable(unavailable)) => return Err(unavailable.into()),
            Err(TrySendError::Rejected(rejection)) => return Err(rejection.into()),
        }
        if self.options.backpressure == Backpressure::Fail {
            return Err(SendTimeoutError::Full);
        }
        self.wait_for_room(address, timeout, write)
    }

    /// Repeats a `try_send` that found no room.
    #[cold]
    fn wait_for_room(
        &mut self,
        address: &Address,
        timeout: Duration,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), SendTimeoutError> {
        if timeout.is_zero() {
            return Err(SendTimeoutError::Timeout);
        }
        let refused = self.refused.saturating_sub(1);
        self.waited += 1;
        let instance = Arc::clone(&self.inbox.instance);
        let sent = until_sent(&instance, timeout, || self.try_send(address, &mut write));
        // One send that waited is not many that failed.
        self.refused = refused + u64::from(sent.is_err());
        sent
    }

    pub(super) fn call<R>(
        &mut self,
        address: Address,
        timeout: Duration,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, Rejection>,
        read: impl FnOnce(&KernelLink, &MessageHeader, &[u8]) -> Result<R, MessageError>,
    ) -> Result<R, CallError> {
        if runs_here(&self.instance().signals) {
            return Err(CallError::OwnKernel);
        }
        // 31 bits of a counter: an earlier call's reply that is late by 2^31 calls is taken for one in time.
        self.calls = self.calls.wrapping_add(1);
        let correlation = CALL_BIT | self.calls;
        let wanted = Wanted::call(correlation);
        let address = address.for_call(correlation);
        let mut left = timeout;
        match self.try_send(&address, &mut write) {
            Ok(()) => {}
            Err(TrySendError::Unavailable(unavailable)) => return Err(unavailable.into()),
            Err(TrySendError::Rejected(rejection)) => return Err(rejection.into()),
            Err(TrySendError::Full | TrySendError::Busy) => {
                let deadline = Deadline::after(timeout);
                self.wait_for_room(&address, timeout, &mut write)?;
                left = deadline.remaining();
            }
        }
        match self.find_until(wanted, left, read) {
            Ok(outcome) => outcome.map_err(CallError::from),
            Err(WaitEnd::Timeout) => Err(CallError::Timeout),
            Err(WaitEnd::Unavailable(unavailable)) => Err(unavailable.into()),
        }
    }

    /// Waits for a reply, and hands it to `read`.
    #[inline]
    pub(super) fn find_until<R>(
        &mut self,
        wanted: Wanted,
        timeout: Duration,
        read: impl FnOnce(&KernelLink, &MessageHeader, &[u8]) -> Result<R, MessageError>,
    ) -> Result<Result<R, MessageError>, WaitEnd> {
        let mut read = Some(read);
        match self.look(wanted, 1, Effort::Glance, &mut read) {
            Err(Miss::Empty | Miss::Busy) if !timeout.is_zero() => {}
            Err(Miss::Empty | Miss::Busy) => return Err(WaitEnd::Timeout),
            Err(Miss::Unavailable(unavailable)) => return Err(WaitEnd::Unavailable(unavailable)),
            Ok(outcome) => return Ok(outcome),
        }
        let mut waiter = self.inbox.instance.waiter(timeout);
        if self.hub.is_crowded() {
            waiter = waiter.among_others();
        }
        let mut last = false;
        let end = loop {
            if !self.is_watching && self.hub.is_crowded() {
                self.start_watching();
            }
            let effort = if last { Effort::Last } else { Effort::Waiting };
            match self.look(wanted, waiter.polls(), effort, &mut read) {
                Ok(outcome) => break Ok(outcome),
                Err(Miss::Unavailable(unavailable)) => {
                    break Err(WaitEnd::Unavailable(unavailable));
                }
                Err(Miss::Empty | Miss::Busy) if last => break Err(WaitEnd::Timeout),
                Err(Miss::Empty | Miss::Busy) => {}
            }
            last = match waiter.step(&self.inbox.instance.link) {
                CallerStep::Poll => false,
                CallerStep::Expired => true,
                CallerStep::Sleep => !self.sleep(&mut waiter),
            };
        };
        if self.is_watching {
            self.is_watching = false;
            let is_last = self.inbox.instance.signals.lanes.watch.leave();
            self.look_once_more(is_last);
        }
        end
    }

    /// Sleeps until woken, unless there is a reply after all. False once the time is up.
    fn sleep(&mut self, waiter: &mut Waiter) -> bool {
        // In a crowd it is woken by whoever routes, alone by the kernel.
        if self.is_watching {
            let event = Arc::clone(&self.inbox.shared.replied);
            waiter.sleep(&event, || self.may_go_on())
        } else {
            let instance = Arc::clone(&self.inbox.instance);
            waiter.sleep(&instance.signals.replied, || {
                self.hub.is_crowded() || self.may_have_reply()
            })
        }
    }

    /// Routes replies from now on.
    #[inline]
    fn start_watching(&mut self) {
        let watch = &self.inbox.instance.signals.lanes.watch;
        if self.is_asleep {
            watch.wake_up();
        } else {
            watch.enter();
        }
        self.is_asleep = false;
        self.is_watching = true;
    }

    /// What is to be done by one who has ceased to route replies, if it was the last one. Whether any were moved on this occasion.
    #[inline]
    fn look_once_more(&mut self, is_last: bool) -> bool {
        if !is_last {
            return false;
        }
        match self.hub.try_take() {
            // Nobody else would notice what came in this very moment.
            Some(mut merger) => {
                let moved = merger.port_mut().has_reply() && merger.pass() > 0;
                if merger.port_mut().has_reply() {
                    // More than one pass moves.
                    self.hub.call_bridge();
                }
                moved
            }
            // Whoever has it may have looked before.
            None => {
                self.hub.call_bridge();
                false
            }
        }
    }

    /// Whether a client in a crowd, about to sleep, should look once more instead. From now on others route its replies.
    fn may_go_on(&mut self) -> bool {
        self.is_watching = false;
        self.is_asleep = true;
        let is_last = self.inbox.instance.signals.lanes.watch.fall_asleep();
        let moved = self.look_once_more(is_last);
        moved || self.inbox.has_reply() || self.inbox.instance.signals.gate.check_receive().is_err()
    }

    /// A reply that is there, handed to `read`.
    #[inline]
    pub(super) fn find<R>(
        &mut self,
        wanted: Wanted,
        polls: u32,
        read: impl FnOnce(&KernelLink, &MessageHeader, &[u8]) -> Result<R, MessageError>,
    ) -> Result<Result<R, MessageError>, Miss> {
        self.look(wanted, polls, Effort::Glance, &mut Some(read))
    }

    /// Looks for a reply, first among those put aside, then in the lane, then in the kernel's rings. Looks up to `polls` times.
    #[inline]
    fn look<R, F>(
        &mut self,
        wanted: Wanted,
        polls: u32,
        effort: Effort,
        read: &mut Option<F>,
    ) -> Result<Result<R, MessageError>, Miss>
    where
        F: FnOnce(&KernelLink, &MessageHeader, &[u8]) -> Result<R, MessageError>,
    {
        let Self { hub, inbox, .. } = self;
        if let Some(outcome) = inbox.look_aside(wanted, read) {
            return Ok(outcome);
        }
        // Looked at before everything else: what the kernel wrote until it ended is found below.
        let ended = inbox.instance.signals.gate.check_receive();
        let helps = !hub.is_attended() || ended.is_err() || effort == Effort::Last;
        if let Some(outcome) = inbox.look_in_lane(wanted, if helps { 1 } else { polls }, read) {
            return Ok(outcome);
        }
        if !helps {
            return Err(Miss::Empty);
        }
        let taken = match effort {
            Effort::Glance | Effort::Waiting => hub.try_take(),
            Effort::Last => hub.take_soon(),
        };
        let Some(mut merger) = taken else {
            return Err(Miss::Empty);
        };
        if self.is_dirty || effort != Effort::Glance && hub.is_crowded() {
            merger.merge_some();
            self.is_dirty = self.is_dirty && merger.has_backlog(self.number);
        }
        // With the baton in hand nobody puts anything into the lane; what is there was there first.
        loop {
            if let Some(outcome) = inbox.look_in_lane(wanted, 1, read) {
                return Ok(outcome);
            }
            let looks_at_all = effort == Effort::Last;
            let Some(block) = merger.next_reply_of(self.number, polls, looks_at_all) else {
                return match ended {
                    Ok(()) => Err(Miss::Empty),
                    Err(unavailable) => Err(Miss::Unavailable(unavailable)),
                };
            };
            let (header, _, payload) = merger.port().reply(block);
            if wanted.fit(header) != Fit::Wanted {
                merger.route_one(block);
                continue;
            }
            let Some(read) = read.take() else {
                return Err(Miss::Empty);
            };
            let outcome = read(&inbox.instance, header, payload);
            let is_taken = inbox.settle(wanted, &outcome, |inbox| {
                let (header, extension, payload) = merger.port().reply(block);
                inbox.instance.lost(header, extension, payload)
            });
            if is_taken {
                merger.port_mut().release(block);
            } else {
                merger.route_one(block);
            }
            return Ok(outcome);
        }
    }

    /// Whether a client that is alone, about to sleep, should look once more instead.
    pub(super) fn may_have_reply(&mut self) -> bool {
        if self.inbox.instance.signals.gate.check_receive().is_err() {
            return true;
        }
        match self.hub.try_take() {
            // Whoever has it may just be handing something over.
            None => true,
            // With the baton in hand, and not before: somebody may have routed the reply since.
            Some(mut merger) => self.inbox.has_reply() || merger.port_mut().has_reply(),
        }
    }
}

impl Drop for ClientLane {
    /// What was sent is handled all the same; replies that nobody has received go to the dead letters.
    fn drop(&mut self) {
        if self.inbox.instance.has_forked_since() {
            // The child of a fork: no bridge is there to be told.
            return;
        }
        if self.is_watching {
            // Only after a panic. Who sleeps is woken by the bridge, which is called below.
            self.inbox.instance.signals.lanes.watch.leave();
        }
        let shared = &self.inbox.shared;
        self.inbox
            .instance
            .signals
            .lanes
            .remove_client(&shared.replied);
        shared.closed.store(true, Ordering::Release);
        // Who had it may have looked before, and put one more reply into the lane.
        let timeout = self.inbox.instance.termination_timeout;
        let merger = self.hub.take_before(Deadline::after(timeout));
        self.inbox.give_up();
        self.hub.close_lane(merger);
    }
}
