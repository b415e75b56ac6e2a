//! A client's end of its lane: how it sends, finds its replies, and moves messages for all while it waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::calls::CALL_BIT;
use super::client_options::{Backpressure, ClientOptions, ClientStats};
use super::instance::KernelInstance;
use super::port::KernelPort;
use super::receive::{Miss, WaitEnd, uselessness};
use super::send::{Address, SendOptions, refused, until_sent};
use crate::bridge::{ClientEnds, Hub, Outbox, Port};
use crate::error::{CallError, MessageError, Rejection, SendTimeoutError, TrySendError};
use crate::kernel::{DeadLetterReason, Lost};
use crate::message::{EXTENSION_BYTES, Extension, MessageHeader};
use crate::ring::Peek;
use crate::time::Deadline;

/// Which reply is looked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Correlation of a call; 0 for any reply that is no call's.
    call: u32,
}

impl Wanted {
    pub(super) const ANY: Self = Self { call: 0 };
}

/// What is to be done with a reply that was found in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    /// It is wanted.
    Wanted,
    /// It is for `recv`, and a call goes on looking.
    Aside,
    /// Its call has timed out, or had its reply.
    Late,
}

impl Wanted {
    #[inline]
    fn fit(self, header: &MessageHeader) -> Fit {
        let correlation = header.correlation();
        if self.call != 0 {
            match correlation {
                own if own == self.call => Fit::Wanted,
                other if other & CALL_BIT != 0 => Fit::Late,
                _ => Fit::Aside,
            }
        } else if correlation & CALL_BIT != 0 {
            Fit::Late
        } else {
            Fit::Wanted
        }
    }
}

/// A client but for the types of its messages.
pub(super) struct ClientLane {
    pub(super) instance: Arc<KernelInstance>,
    pub(super) hub: Arc<Hub<KernelPort>>,
    pub(super) number: u16,
    ends: ClientEnds,
    pub(super) options: ClientOptions,
    /// Whether requests may lie in the lane that the kernel has not been given.
    is_dirty: bool,
    /// Replies that a call put aside.
    aside: usize,
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
            instance,
            hub,
            number,
            ends,
            options,
            is_dirty: false,
            aside: 0,
            is_watching: false,
            is_asleep: false,
            calls: 0,
            direct: 0,
            waited: 0,
            refused: 0,
        }
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
        let shared = &self.ends.shared;
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
        self.instance.signals.gate.check_send()?;
        if address.has_deadline() && !self.instance.checks_deadlines && !self.hub.is_crowded() {
            // Deadlines are looked at where lanes are merged, if not by the kernel.
            match self.hub.try_take() {
                Some(merger) => self.hub.use_lanes(&merger),
                // Taken by whoever adds a client, or by the bridge, for nanoseconds.
                None => return Err(TrySendError::Full),
            }
        }
        let extension = address.extension_now(&self.instance);
        let route = address.route_in_lane(self.instance.blocks.len());
        if let Outbox::Mailbox(_) = self.ends.outbox {
            return self.replace(address, route, extension, write);
        }
        if !self.hub.is_crowded()
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
        let Outbox::Queues(queues) = &mut self.ends.outbox else {
            return Err(TrySendError::Full);
        };
        if queues[level].free_slots(1) == 0 {
            self.hand_on(true);
        }
        let Outbox::Queues(queues) = &mut self.ends.outbox else {
            return Err(TrySendError::Full);
        };
        let used = self.ends.shared.levels.load(Ordering::Relaxed);
        if used & (1 << level) == 0 {
            self.ends
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
                self.ends.shared.pushed.add(1);
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
        let Outbox::Mailbox(writer) = &mut self.ends.outbox else {
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
        self.ends.shared.pushed.add(1);
        if let Some(displaced) = writer.publish() {
            self.ends.shared.displaced.add(1);
            let lost = self.instance.lost(
                &displaced.header(),
                displaced.extension,
                displaced.payload(),
            );
            self.instance
                .signals
                .dead_letters
                .request(DeadLetterReason::Full, &lost);
        }
        // A mailbox has one level.
        self.ends.shared.levels.store(u32::MAX, Ordering::Relaxed);
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
        write: impl Fn(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), SendTimeoutError> {
        match self.try_send(address, &write) {
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
        write: impl Fn(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), SendTimeoutError> {
        if timeout.is_zero() {
            return Err(SendTimeoutError::Timeout);
        }
        let refused = self.refused - 1;
        self.waited += 1;
        let instance = Arc::clone(&self.instance);
        let sent = until_sent(&instance, timeout, || self.try_send(address, &write));
        // One send that waited is not many that failed.
        self.refused = refused + u64::from(sent.is_err());
        sent
    }

    pub(super) fn call<R>(
        &mut self,
        address: Address,
        timeout: Duration,
        write: impl Fn(&mut [u8]) -> Result<usize, Rejection>,
        read: impl FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    ) -> Result<R, CallError> {
        // 31 bits of a counter: an earlier call's reply that is late by 2^31 calls is taken for one in time.
        self.calls = self.calls.wrapping_add(1);
        let wanted = Wanted {
            call: CALL_BIT | self.calls,
        };
        let address = address.for_call(wanted.call);
        let mut left = timeout;
        match self.try_send(&address, &write) {
            Ok(()) => {}
            Err(TrySendError::Unavailable(unavailable)) => return Err(unavailable.into()),
            Err(TrySendError::Rejected(rejection)) => return Err(rejection.into()),
            Err(TrySendError::Full | TrySendError::Busy) => {
                let deadline = Deadline::after(timeout);
                self.wait_for_room(&address, timeout, &write)?;
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
        read: impl FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    ) -> Result<Result<R, MessageError>, WaitEnd> {
        let mut read = Some(read);
        match self.look(wanted, 1, &mut read) {
            Err(Miss::Empty | Miss::Busy) if !timeout.is_zero() => {}
            Err(Miss::Empty | Miss::Busy) => return Err(WaitEnd::Timeout),
            Err(Miss::Unavailable(unavailable)) => return Err(WaitEnd::Unavailable(unavailable)),
            Ok(outcome) => return Ok(outcome),
        }
        let instance = Arc::clone(&self.instance);
        let mut waiter = instance.waiter(timeout);
        if self.hub.is_crowded() {
            waiter = waiter.among_others();
        }
        let mut last = false;
        let end = loop {
            if !self.is_watching && self.hub.is_crowded() {
                self.start_watching();
            }
            match self.look(wanted, waiter.polls(), &mut read) {
                Ok(outcome) => break Ok(outcome),
                Err(Miss::Unavailable(unavailable)) => {
                    break Err(WaitEnd::Unavailable(unavailable));
                }
                Err(Miss::Empty | Miss::Busy) if last => break Err(WaitEnd::Timeout),
                Err(Miss::Empty | Miss::Busy) => {}
            }
            // In a crowd it is woken by whoever routes, alone by the kernel.
            last = if self.is_watching {
                let event = Arc::clone(&self.ends.shared.replied);
                !waiter.pause(&event, || self.may_go_on())
            } else {
                !waiter.pause(&instance.signals.replied, || {
                    self.hub.is_crowded() || self.may_have_reply()
                })
            };
        };
        if self.is_watching {
            self.is_watching = false;
            let is_last = self.instance.signals.lanes.watch.leave();
            self.look_once_more(is_last);
        }
        end
    }

    /// Routes replies from now on.
    #[inline]
    fn start_watching(&mut self) {
        let watch = &self.instance.signals.lanes.watch;
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
            Some(mut merger) => merger.port_mut().has_reply() && merger.pass() > 0,
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
        let is_last = self.instance.signals.lanes.watch.fall_asleep();
        let moved = self.look_once_more(is_last);
        moved
            || !matches!(self.ends.replies.peek(), Peek::Empty)
            || self.instance.signals.gate.check_receive().is_err()
    }

    /// A reply that is there, handed to `read`.
    #[inline]
    pub(super) fn find<R>(
        &mut self,
        wanted: Wanted,
        polls: u32,
        read: impl FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    ) -> Result<Result<R, MessageError>, Miss> {
        self.look(wanted, polls, &mut Some(read))
    }

    /// Looks for a reply, first among those put aside, then in the lane, then in the kernel's rings.
    #[inline]
    fn look<R, F>(
        &mut self,
        wanted: Wanted,
        polls: u32,
        read: &mut Option<F>,
    ) -> Result<Result<R, MessageError>, Miss>
    where
        F: FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    {
        if wanted.call == 0 && self.aside > 0 {
            let consumer = &mut self.ends.aside.1;
            if let Peek::Ready = consumer.peek() {
                let Some(read) = read.take() else {
                    return Err(Miss::Empty);
                };
                let outcome = read(consumer.header(), consumer.payload());
                let is_taken = self.settle(wanted, &outcome, |lane| {
                    let (aside, instance) = (&lane.ends.aside.1, &lane.instance);
                    instance.lost(aside.header(), aside.extension(), aside.payload())
                });
                if is_taken {
                    self.ends.aside.1.release();
                    self.aside -= 1;
                }
                return Ok(outcome);
            }
        }
        // Looked at before everything else: what the kernel wrote until it ended is found below.
        let ended = self.instance.signals.gate.check_receive();
        let helps = !self.hub.is_attended() || ended.is_err();
        if let Some(outcome) = self.look_in_lane(wanted, if helps { 1 } else { polls }, read) {
            return Ok(outcome);
        }
        if !helps {
            return Err(Miss::Empty);
        }
        let hub = Arc::clone(&self.hub);
        let Some(mut merger) = hub.try_take() else {
            // Whoever has it finds our replies too.
            return Err(Miss::Empty);
        };
        if self.is_dirty || hub.is_crowded() {
            merger.merge_some();
            self.is_dirty = self.is_dirty && merger.has_backlog(self.number);
        }
        // With the baton in hand nobody puts anything into the lane; what is there was there first.
        loop {
            if let Some(outcome) = self.look_in_lane(wanted, 1, read) {
                return Ok(outcome);
            }
            let Some(block) = merger.next_reply_of(self.number, polls) else {
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
            let outcome = read(header, payload);
            let is_taken = self.settle(wanted, &outcome, |lane| {
                let (header, extension, payload) = merger.port().reply(block);
                lane.instance.lost(header, extension, payload)
            });
            if is_taken {
                merger.port_mut().release(block);
            } else {
                merger.route_one(block);
            }
            return Ok(outcome);
        }
    }

    /// A reply in the lane, handed to `read`. Those that are of no use are cleared away.
    #[inline]
    fn look_in_lane<R, F>(
        &mut self,
        wanted: Wanted,
        polls: u32,
        read: &mut Option<F>,
    ) -> Option<Result<R, MessageError>>
    where
        F: FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    {
        let mut polls = polls;
        loop {
            let consumer = &mut self.ends.replies;
            // The lane's rings are this process's own: what is there is what was put there.
            let Peek::Ready = consumer.peek_spinning(polls) else {
                return None;
            };
            polls = 1;
            match wanted.fit(consumer.header()) {
                Fit::Wanted => {
                    let outcome = read.take()?(consumer.header(), consumer.payload());
                    let is_taken = self.settle(wanted, &outcome, Self::lost_in_lane);
                    if is_taken {
                        self.ends.replies.release();
                    }
                    return Some(outcome);
                }
                Fit::Aside => self.put_aside(),
                Fit::Late => {
                    let lost = self.lost_in_lane();
                    let letters = &self.instance.signals.dead_letters;
                    letters.reply(DeadLetterReason::LateReply, &lost);
                    self.ends.replies.release();
                }
            }
        }
    }

    /// Moves the reply at hand from the lane to those put aside.
    #[cold]
    fn put_aside(&mut self) {
        let consumer = &self.ends.replies;
        let envelope = consumer.header().envelope(consumer.extension());
        self.ends.aside.1.publish_cursor();
        match self.ends.aside.0.try_push(&envelope, consumer.payload()) {
            Ok(()) => self.aside += 1,
            Err(_) => {
                let lost = self.lost_in_lane();
                let letters = &self.instance.signals.dead_letters;
                letters.reply(DeadLetterReason::InboxFull, &lost);
            }
        }
        self.ends.replies.release();
    }

    fn lost_in_lane(&self) -> Lost<'_> {
        let consumer = &self.ends.replies;
        self.instance
            .lost(consumer.header(), consumer.extension(), consumer.payload())
    }

    /// Counts what was made of a reply; false if it is to stay where it is.
    #[inline]
    fn settle<'a, R>(
        &'a self,
        wanted: Wanted,
        outcome: &Result<R, MessageError>,
        lost: impl FnOnce(&'a Self) -> Lost<'a>,
    ) -> bool {
        match uselessness(outcome) {
            None => self.ends.shared.delivered.add(1),
            Some(DeadLetterReason::Mismatch) if wanted.call == 0 => return false,
            Some(reason) => self
                .instance
                .signals
                .dead_letters
                .reply(reason, &lost(self)),
        }
        true
    }

    /// Whether a client that is alone, about to sleep, should look once more instead.
    pub(super) fn may_have_reply(&mut self) -> bool {
        if !matches!(self.ends.replies.peek(), Peek::Empty)
            || self.instance.signals.gate.check_receive().is_err()
        {
            return true;
        }
        match self.hub.try_take() {
            // Whoever has it may just be handing something over.
            None => true,
            Some(mut merger) => merger.port_mut().has_reply(),
        }
    }
}

impl Drop for ClientLane {
    /// What was sent is handled all the same; replies that nobody has received go to the dead letters.
    fn drop(&mut self) {
        if self.is_watching {
            // Only after a panic. Who sleeps is woken by the bridge, which is called below.
            self.instance.signals.lanes.watch.leave();
        }
        let shared = &self.ends.shared;
        self.instance.signals.lanes.remove_client(&shared.replied);
        shared.closed.store(true, Ordering::Release);
        let letters = &self.instance.signals.dead_letters;
        for consumer in [&mut self.ends.aside.1, &mut self.ends.replies] {
            while let Peek::Ready = consumer.peek() {
                let lost =
                    self.instance
                        .lost(consumer.header(), consumer.extension(), consumer.payload());
                letters.reply(DeadLetterReason::Shutdown, &lost);
                consumer.release();
            }
        }
        self.hub.close_lane();
    }
}
