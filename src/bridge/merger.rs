//! Merging the lanes of a kernel's clients into its request rings, and routing its replies back to their lanes.
//!
//! One thread at a time does so (see [`Hub`](super::Hub)). Nothing here allocates, locks or calls the system.
//!
//! A lane has *credit*: as many requests may be on their way, and replies unread, as its reply ring has room for. So a reply always finds
//! room, and a client that reads none holds up nobody else. A request is *settled* once the kernel is done with it and everything that the
//! kernel wrote until then has been routed; kernels that answer a request with nothing give its credit back as well.

use std::sync::atomic::Ordering;

use super::lane::{LEVELS, Lane, MAX_LANES};
use crate::backend::{Booked, HostPool};
use crate::error::{Error, TrySendError, Unavailable};
use crate::kernel::DeadLetterReason;
use crate::message::{Extension, Head, MessageHeader};
use crate::time;

/// Most messages that one pass moves each way: a few microseconds, for which another thread may have to wait for its turn.
const PASS: u32 = 64;

/// A kernel's rings, as its clients' messages go through them.
pub(crate) trait Port: Send {
    fn blocks(&self) -> usize;

    /// Requests that a block is done with, modulo 2^32, as it says itself.
    fn processed(&self, block: usize) -> u32;

    /// Whether the kernel takes requests that its clients were allowed to send, now.
    fn is_active(&self) -> bool;

    /// Whether the kernel has ended, so that it takes no request any more.
    fn has_ended(&self) -> bool;

    /// Whether a request that may go to any block has room.
    fn has_room(&mut self) -> bool;

    /// Puts a request into the ring of a block: `route` less one, or whose turn it is if that is 0. Gives the block and the request's
    /// position. `write` puts the payload into the slot.
    fn send<E>(
        &mut self,
        route: u16,
        head: Head,
        extension: Option<Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(usize, u32), TrySendError>
    where
        TrySendError: From<E>;

    /// The block that has the next reply. Looks up to `polls` times.
    fn next_reply(&mut self, polls: u32) -> Option<usize>;

    /// Gives the kernel's rings back to its handle.
    fn put_back(&mut self);

    /// Notes signs of life of the kernel.
    fn sample(&self, now_ns: u64);

    /// The reply that `next_reply` found.
    fn reply(&self, block: usize) -> (&MessageHeader, Option<Extension>, &[u8]);

    /// Gives that reply's slot back.
    fn release(&mut self, block: usize);

    /// Puts that reply, which is for no lane, where the kernel's handle finds it, and gives its slot back.
    fn put_aside(&mut self, block: usize);

    /// Gives that reply up; its slot is given back separately.
    fn lose_reply(&self, block: usize, reason: DeadLetterReason);

    /// Gives a request up that was in a lane.
    fn lose_request(
        &self,
        reason: DeadLetterReason,
        header: &MessageHeader,
        extension: Option<Extension>,
        payload: &[u8],
    );

    /// Gives a request back that was left in this lane when the kernel ended; its header says of
    /// the route what it says in a lane.
    fn return_request(
        &self,
        lane: u16,
        header: &MessageHeader,
        extension: Option<Extension>,
        payload: &[u8],
    );

    /// Whether a look at the reply rings would find anything.
    fn has_reply(&mut self) -> bool;

    /// Whether it falls to the bridge to see to it that replies are routed.
    fn is_unwatched(&self) -> bool;

    /// From now on replies go to lanes.
    fn use_lanes(&self);

    /// Counts the lanes that the kernel has had, for their numbers; modulo 256.
    fn next_generation(&self) -> u16;
}

/// Whose the requests are that a block has not settled yet.
#[derive(Debug)]
struct Outstanding {
    /// Place of the lane, by position; twice as many as the ring has slots.
    places: Booked<Box<[u8]>>,
    forwarded: u32,
    settled: u32,
}

/// What became of an attempt to forward a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It is with the kernel, or was given up.
    Moved,
    /// There is none.
    None,
    /// It has no credit, or there is no room in the ring that it is for.
    HeldUp,
    /// There is no room in any ring.
    NoRoom,
}

/// What one turn of each lane came to.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    moved: u32,
    /// Whether a lane has requests left because its turn was over.
    has_more: bool,
    /// Whether any request was held up.
    is_blocked: bool,
}

/// The lanes of one kernel.
#[derive(Debug)]
pub(crate) struct Merger<P: Port> {
    port: P,
    lanes: Box<[Option<Box<Lane>>]>,
    /// Places of `lanes` that are taken, in the order in which they get their turns.
    order: Vec<u8>,
    /// Whose turn it is, by level.
    turn: [usize; LEVELS],
    /// Counts sweeps over the levels, from the most urgent down.
    sweep: u64,
    /// Messages that it may still forward in this turn, by level.
    left: [u32; LEVELS],
    outstanding: Box<[Outstanding]>,
    /// Most replies that can lie in the kernel's rings at a time.
    all_replies: u32,
    /// Places of the lanes that replies were put into and whose clients have not been told.
    touched: [u64; MAX_LANES.div_ceil(64)],
    /// Whether clients may sleep.
    clients_park: bool,
    /// Whether the requests in the lanes have been given back, because the kernel has ended.
    gave_back: bool,
    /// Whether it has given the kernel's rings back, because there are no lanes any more.
    is_over: bool,
}

impl<P: Port> Merger<P> {
    /// The lanes of a kernel whose rings have `capacity` slots, and begin where `positions` says.
    pub(crate) fn new(
        port: P,
        capacity: u32,
        positions: &[(u32, u32)],
        clients_park: bool,
        pool: &HostPool,
    ) -> Result<Self, Error> {
        let outstanding = positions.iter().map(|(processed, sent)| {
            Ok(Outstanding {
                // Requests of nobody's; 0xff is no place.
                places: pool.bytes(2 * capacity as usize, u8::MAX)?,
                forwarded: *sent,
                settled: *processed,
            })
        });
        let outstanding = outstanding.collect::<Result<_, Error>>()?;
        Ok(Self {
            port,
            lanes: (0..MAX_LANES).map(|_| None).collect(),
            order: Vec::with_capacity(MAX_LANES),
            turn: [0; LEVELS],
            sweep: 0,
            left: [0; LEVELS],
            outstanding,
            all_replies: capacity.saturating_mul(positions.len() as u32),
            touched: [0; MAX_LANES.div_ceil(64)],
            clients_park,
            gave_back: false,
            is_over: false,
        })
    }

    pub(crate) fn port(&self) -> &P {
        &self.port
    }

    pub(crate) fn port_mut(&mut self) -> &mut P {
        &mut self.port
    }

    /// Whether it has given the kernel's rings back: no lane can be added any more.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Lanes there are.
    pub(crate) fn lanes(&self) -> usize {
        self.order.len()
    }

    /// Adds a lane; gives its number, which is never 0. `None` if there are too many.
    pub(crate) fn add(&mut self, mut lane: Box<Lane>) -> Option<u16> {
        let place = self.lanes.iter().position(Option::is_none)?;
        // The number tells apart whose place it was before.
        lane.number = (self.port.next_generation() << 8) | (place as u16 + 1);
        let number = lane.number;
        self.lanes[place] = Some(lane);
        self.order.push(place as u8);
        Some(number)
    }

    fn lane(&mut self, number: u16) -> Option<&mut Lane> {
        let place = usize::from(number & 0xff).checked_sub(1)?;
        self.lanes
            .get_mut(place)?
            .as_deref_mut()
            .filter(|lane| lane.number == number)
    }

    /// Whether this lane has requests that have not been forwarded.
    pub(crate) fn has_backlog(&mut self, number: u16) -> bool {
        self.lane(number).is_some_and(Lane::has_any_request)
    }

    /// Whether any lane has requests that have not been forwarded.
    pub(crate) fn has_any_backlog(&mut self) -> bool {
        let Self { lanes, order, .. } = self;
        order.iter().any(|place| {
            let lane = lanes[usize::from(*place)].as_deref_mut();
            lane.is_some_and(Lane::has_any_request)
        })
    }

    /// Whether any lane has requests that the kernel could be given.
    pub(crate) fn has_work(&mut self) -> bool {
        self.port.is_active() && self.has_any_backlog()
    }

    /// Sends a request of this lane straight to the kernel: for a client that is alone and has none in its lane.
    #[inline]
    pub(crate) fn send<E>(
        &mut self,
        number: u16,
        route: u16,
        head: Head,
        extension: Option<Extension>,
        write: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<(), TrySendError>
    where
        TrySendError: From<E>,
    {
        let Some(lane) = self.lane(number) else {
            return Err(TrySendError::Unavailable(Unavailable::Split));
        };
        if !lane.has_credit() {
            self.settle();
            if !self.lane(number).is_some_and(Lane::has_credit) {
                return Err(TrySendError::Full);
            }
        }
        let head = head.on_lane(number);
        let (block, position) = self.port.send(route, head, extension, write)?;
        self.note(block, position, number);
        Ok(())
    }

    /// Notes whose request went to a block.
    #[inline]
    fn note(&mut self, block: usize, position: u32, number: u16) {
        let outstanding = &mut self.outstanding[block];
        let mask = outstanding.places.len() - 1;
        outstanding.places[position as usize & mask] = (number & 0xff) as u8 - 1;
        outstanding.forwarded = position.wrapping_add(1);
        let unsettled = outstanding.forwarded.wrapping_sub(outstanding.settled);
        if let Some(lane) = self.lane(number) {
            lane.forwarded = lane.forwarded.wrapping_add(1);
        }
        // What the ring took again has been processed, so that this makes room long before a place is used twice.
        if unsettled as usize > mask / 2 {
            self.settle();
        }
    }

    /// Routes replies and merges requests, a bounded number of each; how many.
    #[inline]
    pub(crate) fn pass(&mut self) -> u32 {
        let routed = self.route(PASS);
        routed + self.merge(PASS)
    }

    /// Merges requests, a bounded number.
    #[inline]
    pub(crate) fn merge_some(&mut self) -> u32 {
        self.merge(PASS)
    }

    /// Forwards up to `most` requests: those of a higher level first, and lanes of one level by turns.
    fn merge(&mut self, most: u32) -> u32 {
        if !self.port.is_active() {
            return 0;
        }
        let mut moved = 0;
        let mut may_settle = true;
        let used = self.order.iter().fold(0, |used, place| {
            let lane = self.lanes[usize::from(*place)].as_ref();
            used | lane.map_or(0, |lane| lane.shared.levels.load(Ordering::Relaxed))
        });
        let mut level = LEVELS;
        while level > 0 && moved < most {
            if level == LEVELS {
                self.sweep += 1;
            }
            level -= 1;
            if used & (1 << level) == 0 {
                continue;
            }
            let Round {
                moved: count,
                has_more,
                is_blocked,
            } = self.round(level, most - moved);
            moved += count;
            if count > 0 && (has_more || is_blocked || used >> level > 1) {
                // Something more urgent may have come meanwhile.
                level = LEVELS;
            } else if is_blocked && may_settle {
                // Once a pass: it reads what the kernel writes with every message.
                may_settle = false;
                if self.settle() {
                    level = LEVELS;
                }
            }
        }
        moved
    }

    /// One turn for each lane that has requests of this level.
    fn round(&mut self, level: usize, most: u32) -> Round {
        let lanes = self.order.len();
        let mut round = Round::default();
        for _ in 0..lanes {
            if self.left[level] == 0 {
                let turn = &mut self.turn[level];
                *turn = if *turn + 1 < lanes { *turn + 1 } else { 0 };
                let lane = self.lanes[usize::from(self.order[*turn])].as_ref();
                self.left[level] = lane.map_or(0, |lane| lane.weight);
            }
            let place = self.order[self.turn[level]];
            while self.left[level] > 0 {
                match self.forward(place, level) {
                    Step::Moved => {
                        round.moved += 1;
                        self.left[level] -= 1;
                        if self.left[level] == 0 {
                            let lane = self.lanes[usize::from(place)].as_deref_mut();
                            round.has_more |= lane.is_some_and(|lane| lane.has_request(level));
                        }
                    }
                    // For nobody: the rest of its turn is still the lane's.
                    Step::NoRoom => {
                        round.is_blocked = true;
                        return round;
                    }
                    Step::None => self.left[level] = 0,
                    Step::HeldUp => {
                        round.is_blocked = true;
                        self.left[level] = 0;
                    }
                }
                if round.moved == most {
                    return round;
                }
            }
        }
        round
    }

    #[inline]
    fn forward(&mut self, place: u8, level: usize) -> Step {
        let sweep = self.sweep;
        let Some(lane) = self.lanes[usize::from(place)].as_deref_mut() else {
            return Step::None;
        };
        if !lane.has_request(level) {
            return Step::None;
        }
        // Credit that has come since must not go to something less urgent.
        if lane.held_in == sweep {
            return Step::HeldUp;
        }
        // Before it is looked at: what a mailbox has given cannot be put back.
        if !lane.has_credit() {
            lane.held_in = sweep;
            lane.pause(level);
            return Step::HeldUp;
        }
        if lane.takes_newest_only() && !self.port.has_room() {
            return Step::NoRoom;
        }
        let number = lane.number;
        let newest_only = lane.takes_newest_only();
        let Some(next) = lane.next(level) else {
            return Step::None;
        };
        // A place in a lane's own ring needs no lane; there it says which block.
        let route = next.header.lane();
        if let Some(extension) = next.extension
            && extension.deadline_ns != 0
            && time::now_ns() >= extension.deadline_ns
        {
            self.port.lose_request(
                DeadLetterReason::Expired,
                &next.header.on_lane(number),
                next.extension,
                next.payload,
            );
            lane.release(level);
            lane.shared.expired.add(1);
            return Step::Moved;
        }
        let head = next.header.head().on_lane(number);
        let payload = next.payload;
        let sent = self.port.send(route, head, next.extension, |body| {
            // The lane's slots are as large as the kernel's.
            body[..payload.len()].copy_from_slice(payload);
            Ok::<_, TrySendError>(payload.len())
        });
        match sent {
            Ok((block, position)) => {
                lane.release(level);
                self.note(block, position, number);
                Step::Moved
            }
            // It stays where it is; but for one that a mailbox has given, whose block has no room although another one has.
            Err(_) if newest_only => {
                self.port.lose_request(
                    DeadLetterReason::Full,
                    &next.header.on_lane(number),
                    next.extension,
                    next.payload,
                );
                lane.release(level);
                lane.shared.overflowed.add(1);
                Step::Moved
            }
            Err(_) => {
                lane.held_in = sweep;
                lane.pause(level);
                if route == 0 {
                    Step::NoRoom
                } else {
                    Step::HeldUp
                }
            }
        }
    }

    /// Routes up to `most` replies; how many.
    pub(crate) fn route(&mut self, most: u32) -> u32 {
        let mut routed = 0;
        while routed < most
            && let Some(block) = self.port.next_reply(1)
        {
            self.route_one(block);
            routed += 1;
        }
        self.tell_clients();
        routed
    }

    /// Wakes the clients that replies were put into lanes of.
    #[inline]
    fn tell_clients(&mut self) {
        for (index, touched) in self.touched.iter_mut().enumerate() {
            while *touched != 0 {
                let place = index * 64 + touched.trailing_zeros() as usize;
                *touched &= *touched - 1;
                if let Some(lane) = &self.lanes[place] {
                    lane.shared.replied.notify();
                }
            }
        }
    }

    /// Puts the reply at hand into its lane.
    pub(crate) fn route_one(&mut self, block: usize) {
        let number = self.port.reply(block).0.lane();
        if number == 0 {
            self.port.put_aside(block);
            return;
        }
        let place = usize::from(number & 0xff).wrapping_sub(1);
        let lane = self
            .lanes
            .get_mut(place)
            .and_then(Option::as_deref_mut)
            .filter(|lane| lane.number == number && !lane.is_closed());
        match lane {
            Some(lane) => {
                if self.clients_park {
                    self.touched[place / 64] |= 1 << (place % 64);
                }
                let (header, extension, payload) = self.port.reply(block);
                if lane
                    .replies
                    .try_push(&header.envelope(extension), payload)
                    .is_err()
                {
                    // Only of a kernel that replies more than once.
                    lane.shared.lost_replies.add(1);
                    self.port.lose_reply(block, DeadLetterReason::Full);
                }
            }
            None => self.port.lose_reply(block, DeadLetterReason::LateReply),
        }
        self.port.release(block);
    }

    /// The block whose next reply belongs to this lane; replies of other lanes are routed on the way, a bounded number of them, but as many as
    /// there can be if it `looks_at_all`. Looks up to `polls` times.
    #[inline]
    pub(crate) fn next_reply_of(
        &mut self,
        number: u16,
        polls: u32,
        looks_at_all: bool,
    ) -> Option<usize> {
        let most = if looks_at_all { self.all_replies } else { PASS };
        let mut routed = 0;
        let found = loop {
            let Some(block) = self.port.next_reply(polls) else {
                break None;
            };
            if self.port.reply(block).0.lane() == number {
                break Some(block);
            }
            self.route_one(block);
            routed += 1;
            if routed == most {
                break None;
            }
        };
        if routed > 0 {
            self.tell_clients();
        }
        found
    }

    /// Settles what the kernel is done with. Whether anything was.
    fn settle(&mut self) -> bool {
        let mut processed = [0; 16];
        let blocks = self.port.blocks();
        // Progress first, replies next: then the replies to everything that counts as done have been seen.
        if let Some(processed) = processed.get_mut(..blocks) {
            for (block, processed) in processed.iter_mut().enumerate() {
                *processed = self.port.processed(block);
            }
            self.route(self.all_replies);
            let mut any = false;
            for (block, processed) in processed.iter().enumerate() {
                any |= self.settle_block(block, *processed);
            }
            return any;
        }
        // A grid of many blocks, one by one.
        let mut any = false;
        for block in 0..blocks {
            let processed = self.port.processed(block);
            self.route(self.all_replies);
            any |= self.settle_block(block, processed);
        }
        any
    }

    fn settle_block(&mut self, block: usize, processed: u32) -> bool {
        let outstanding = &mut self.outstanding[block];
        let progress = processed.wrapping_sub(outstanding.settled);
        // Untrusted: a block cannot be done with more than it was given.
        if progress == 0 || progress > outstanding.forwarded.wrapping_sub(outstanding.settled) {
            return false;
        }
        let mask = outstanding.places.len() - 1;
        for _ in 0..progress {
            let place = outstanding.places[outstanding.settled as usize & mask];
            outstanding.settled = outstanding.settled.wrapping_add(1);
            if let Some(Some(lane)) = self.lanes.get_mut(usize::from(place)) {
                lane.settled = lane.settled.wrapping_add(1);
            }
        }
        true
    }

    /// Lets go of the lanes whose clients are gone and whose requests have all been settled, or never will be and have been given back; with
    /// the last lane, of the kernel's rings. Whether there are any left whose clients are gone.
    pub(crate) fn retire(&mut self) -> bool {
        let closed = |lane: &Option<Box<Lane>>| lane.as_ref().is_some_and(|lane| lane.is_closed());
        if !self.lanes.iter().any(closed) {
            return false;
        }
        self.settle();
        let ended = self.port.has_ended();
        let gave_back = self.gave_back;
        let Self {
            lanes, order, port, ..
        } = self;
        let mut is_any_left = false;
        order.retain(|place| {
            let slot = &mut lanes[usize::from(*place)];
            let Some(lane) = slot.as_deref_mut().filter(|lane| lane.is_closed()) else {
                return true;
            };
            if gave_back {
                // Of a client that had found the kernel open just before it ended.
                give_lane_back(port, lane);
            }
            // What is in the lane of an ended kernel is on its accounts' way back.
            let is_done = (ended || lane.forwarded == lane.settled) && !lane.has_any_request();
            if is_done {
                lane.shared.retired.store(true, Ordering::Release);
                *slot = None;
            }
            is_any_left |= !is_done;
            !is_done
        });
        self.turn = [0; LEVELS];
        self.left = [0; LEVELS];
        if self.order.is_empty() {
            self.port.put_back();
            self.is_over = true;
        }
        is_any_left
    }

    /// Gives every request in the lanes back, in the order of their urgency: the kernel will see
    /// none of them.
    pub(crate) fn give_back(&mut self) {
        self.gave_back = true;
        for lane in self.lanes.iter_mut().flatten() {
            give_lane_back(&self.port, lane);
        }
    }
}

fn give_lane_back<P: Port>(port: &P, lane: &mut Lane) {
    let number = lane.number;
    for level in (0..LEVELS).rev() {
        // No more than there can be, whatever the client does meanwhile.
        for _ in 0..=lane.replies.layout().capacity() {
            let Some(next) = lane.next(level) else {
                break;
            };
            port.return_request(number, &next.header, next.extension, next.payload);
            lane.release(level);
        }
    }
}

impl<P: Port> Drop for Merger<P> {
    /// The bridge and all clients have let go of it.
    fn drop(&mut self) {
        if self.gave_back {
            self.give_back();
        }
    }
}
