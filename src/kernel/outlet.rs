//! The way from a block straight into the request ring of another kernel: what its reply port writes to while the two are
//! connected, and how it comes and goes.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::signals::KernelSignals;
use super::types::TypeTable;
use crate::error::HandlerError;
use crate::message::{Head, RAW_KIND};
use crate::ring::Producer;

/// A counter on a cache line pair of its own, written by one thread at a time.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Counter {
    count: AtomicU64,
    /// What counts by itself, if a device does, and what of it has been added.
    meter: Mutex<Option<(Arc<dyn Meter>, u32)>>,
}

/// Counts messages that a block of a device has passed on.
pub(crate) trait Meter: Send + Sync + fmt::Debug {
    /// So far, modulo 2^32.
    fn passed(&self) -> u32;
}

impl Counter {
    /// Not a read-modify-write: whoever calls this is the only writer at that time.
    #[inline]
    pub(crate) fn add(&self, count: u64) {
        self.count.store(
            self.count.load(Ordering::Relaxed) + count,
            Ordering::Relaxed,
        );
    }

    pub(crate) fn get(&self) -> u64 {
        let mut meter = self.meter.lock();
        self.read(&mut meter);
        self.count.load(Ordering::Relaxed)
    }

    /// What has been counted so far, without what a device has passed on since it was last asked.
    /// One load.
    pub(crate) fn latest(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Adds what has been passed on since the last look, of which there must be one in 2^32 messages.
    fn read(&self, meter: &mut Option<(Arc<dyn Meter>, u32)>) {
        if let Some((meter, seen)) = meter {
            let passed = meter.passed();
            // Under the lock: while there is a meter, nobody else adds.
            self.add(passed.wrapping_sub(*seen).into());
            *seen = passed;
        }
    }

    /// Counts by this meter from now on.
    fn count_by(&self, meter: Arc<dyn Meter>) {
        let seen = meter.passed();
        *self.meter.lock() = Some((meter, seen));
    }

    /// Counts by no meter any more.
    fn count_again(&self) {
        let mut meter = self.meter.lock();
        self.read(&mut meter);
        *meter = None;
    }
}

/// Tells whether a block is just publishing a message into another kernel's ring. On cache lines of its own: the block
/// writes it with every message, and whoever ends that kernel looks at it once. A block of a device does not know it: the
/// valve is open then as long as it may publish.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Valve {
    publishing: AtomicBool,
    /// Whoever closes it, if a device publishes.
    warden: Mutex<Option<Arc<dyn Warden>>>,
}

/// Keeps a device from publishing into the ring of a kernel that has ended.
pub(crate) trait Warden: Send + Sync + fmt::Debug {
    /// Makes it look at the kernel's gate.
    fn call(&self);
}

impl Valve {
    /// Announces a message to the kernel of these signals. If it is false, that kernel takes none any more.
    #[inline]
    fn enter(&self, next: &KernelSignals) -> bool {
        // ORDERING: valve. Sequentially consistent, as are the change of the state that `is_open` reads and the load in
        // `is_publishing`: either the kernel's end sees this announcement and waits, or we see the end.
        self.publishing.swap(true, Ordering::SeqCst);
        next.gate.is_open()
    }

    #[inline]
    fn leave(&self) {
        // ORDERING: valve. The message and its count are visible to whoever sees that it is published.
        self.publishing.store(false, Ordering::Release);
    }

    /// Whether a message is just being published. Once this has been false after the kernel ceased to be open, nothing
    /// is published any more.
    pub(crate) fn is_publishing(&self) -> bool {
        // ORDERING: valve. Pairs with `enter` and `leave`.
        self.publishing.load(Ordering::SeqCst)
    }

    /// Makes whoever is to close it look whether it must.
    pub(crate) fn call_warden(&self) {
        let warden = self.warden.lock().clone();
        if let Some(warden) = warden {
            warden.call();
        }
    }
}

/// The block behind an outlet, where the block before it runs it on its own thread.
pub(crate) trait Guest: Send + Sync + fmt::Debug {
    /// Whether the calling thread runs it from now on, whenever it has something for it.
    fn host(&self, hosting: bool);

    /// Lets it handle a request, if it has one. Whether it may have more to do.
    fn run(&self) -> bool;

    /// The kernel of the block, while the thread of the block before it is in its loop.
    fn holder(&self) -> Option<Arc<KernelSignals>>;
}

/// Kinds of the next kernel by kinds of this one; this stands for those that have not been looked up.
const NOT_YET: u16 = u16::MAX;

/// Room for every kind, raw bytes included.
const KINDS: usize = TypeTable::MAX_TYPES + 1;

/// A writing end, and what keeps the ring's memory alive.
type RingEnd = (Producer, Arc<dyn fmt::Debug + Send + Sync>);

/// The writing end of another kernel's request ring, in the hands of a block.
pub(crate) struct Outlet {
    /// The end itself, unless the block writes to it: then the end of the block's own reply ring.
    pub(crate) producer: Producer,
    /// What keeps the ring's memory alive.
    pub(crate) memory: Arc<dyn fmt::Debug + Send + Sync>,
    pub(crate) valve: Arc<Valve>,
    /// Of the kernel behind it.
    pub(crate) next: Arc<KernelSignals>,
    /// Requests that the kernel behind it has accepted, by block.
    pub(crate) accepted: Arc<[Counter]>,
    /// Whether it may sleep.
    pub(crate) needs_wake: bool,
    /// The block behind it, if this block runs that as well.
    pub(crate) guest: Option<Arc<dyn Guest>>,
    /// Whether the guest may have something to do.
    pub(crate) pending: bool,
    /// What the backend knows the ring's block by.
    pub(crate) block: Arc<dyn Any + Send + Sync>,
    /// Type tables of this kernel and of the one behind it.
    types: [Arc<TypeTable>; 2],
    kinds: [u16; KINDS],
}

impl fmt::Debug for Outlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlet")
            .field("next", &self.next.name)
            .finish_non_exhaustive()
    }
}

impl Outlet {
    pub(crate) fn new(
        ((producer, memory), block): (RingEnd, Arc<dyn Any + Send + Sync>),
        valve: Arc<Valve>,
        next: Arc<KernelSignals>,
        accepted: Arc<[Counter]>,
        needs_wake: bool,
        guest: Option<Arc<dyn Guest>>,
        types: [Arc<TypeTable>; 2],
    ) -> Self {
        let mut kinds = [NOT_YET; KINDS];
        kinds[usize::from(RAW_KIND)] = RAW_KIND;
        Self {
            producer,
            memory,
            valve,
            next,
            accepted,
            needs_wake: needs_wake && guest.is_none(),
            guest,
            pending: false,
            block,
            types,
            kinds,
        }
    }

    /// The head of a reply as the next kernel knows it.
    #[inline]
    pub(crate) fn translate(&mut self, head: Head) -> Result<Head, HandlerError> {
        match self.kinds.get(usize::from(head.kind())) {
            Some(&kind) if kind != NOT_YET => Ok(head.with_kind(kind)),
            _ => self.look_up(head),
        }
    }

    #[cold]
    fn look_up(&mut self, head: Head) -> Result<Head, HandlerError> {
        let [own, next] = &self.types;
        let kind = own
            .type_of(head.kind())
            .and_then(|type_id| next.kind_of(type_id).ok())
            .ok_or_else(|| {
                HandlerError::new(
                    HandlerError::BAD_REQUEST,
                    "the next kernel does not take this type",
                )
            })?;
        if let Some(known) = self.kinds.get_mut(usize::from(head.kind())) {
            *known = kind;
        }
        Ok(head.with_kind(kind))
    }

    /// Announces that a message is about to be published. False if the next kernel takes none any more; either way
    /// [`leave`](Self::leave) ends it.
    #[inline]
    pub(crate) fn enter(&self) -> bool {
        self.valve.enter(&self.next)
    }

    /// The message has been published, and counts; or it has not been.
    #[inline]
    pub(crate) fn leave(&mut self, published: bool) {
        if published {
            self.pending = true;
            self.accepted[0].add(1);
        }
        self.valve.leave();
        if published && self.needs_wake {
            self.next.work[0].notify_if_armed();
        }
    }

    /// A block of a device may publish from now on, which counts by this meter, and which this warden can keep from it. The kinds of
    /// the next kernel go to `translate`, now and as they come. False if the next kernel takes none any more; either way
    /// [`end`](Self::end) ends it.
    pub(crate) fn begin(
        &self,
        meter: Arc<dyn Meter>,
        warden: Arc<dyn Warden>,
        translate: impl Fn(u16, Option<u16>) + Send + Sync + 'static,
    ) -> bool {
        *self.valve.warden.lock() = Some(warden);
        self.accepted[0].count_by(meter);
        let [own, next] = &self.types;
        let next = Arc::clone(next);
        own.follow(Box::new(move |kind, type_id| {
            translate(kind, next.kind_of(type_id).ok());
        }));
        self.enter()
    }

    /// The device publishes no more, and has counted what it did.
    pub(crate) fn end(&self) {
        self.types[0].unfollow();
        self.accepted[0].count_again();
        *self.valve.warden.lock() = None;
        self.valve.leave();
    }

    /// Adds what a device has passed on, and tells the next kernel of it if that may sleep.
    pub(crate) fn look(&self, last: &mut u64) {
        let accepted = self.accepted[0].get();
        if std::mem::replace(last, accepted) == accepted {
            return;
        }
        if self.needs_wake {
            self.next.work[0].notify_if_armed();
        }
        self.next.request_written();
    }

    /// Lets the guest, if there is one, do something if it may have something to do.
    #[inline]
    pub(crate) fn run_guest(&mut self) {
        if self.pending
            && let Some(guest) = &self.guest
        {
            self.pending = guest.run();
        }
    }

    /// Whether the next kernel has ended, or is about to.
    pub(crate) fn is_over(&self) -> bool {
        !self.next.gate.is_open()
    }
}

/// Where a block finds the outlet that it is to write to, and where it leaves it. The block looks here while it is idle and
/// when it ends, never for a message.
#[derive(Debug, Default)]
pub(crate) struct OutletSlot {
    exchange: Mutex<Exchange>,
    /// The block behind the outlet that was offered, if this block runs it.
    guest: Mutex<Option<Arc<dyn Guest>>>,
    /// Whether the block waits for room in the middle of its own handler.
    in_handler: AtomicBool,
}

#[derive(Debug, Default)]
enum Exchange {
    /// The block has none, and none waits for it.
    #[default]
    Nothing,
    /// For the block to take.
    Offered(Box<Outlet>),
    /// The block has it.
    Taken,
    /// The block has it, and is to bring it back.
    Recalled,
    /// The block has brought it back.
    Returned(Box<Outlet>),
}

impl OutletSlot {
    // For the control plane.

    /// Offers an outlet to a block that has none.
    pub(crate) fn offer(&self, outlet: Outlet) {
        self.guest.lock().clone_from(&outlet.guest);
        *self.exchange.lock() = Exchange::Offered(Box::new(outlet));
    }

    /// Asks the block to bring its outlet back.
    pub(crate) fn recall(&self) {
        let mut exchange = self.exchange.lock();
        if matches!(*exchange, Exchange::Taken) {
            *exchange = Exchange::Recalled;
        }
    }

    /// Lets the block keep its outlet, unless it has brought it back already.
    pub(crate) fn cancel_recall(&self) {
        let mut exchange = self.exchange.lock();
        if matches!(*exchange, Exchange::Recalled) {
            *exchange = Exchange::Taken;
        }
    }

    /// Whether the block has no outlet.
    pub(crate) fn is_back(&self) -> bool {
        !matches!(*self.exchange.lock(), Exchange::Taken | Exchange::Recalled)
    }

    /// Whether the block has taken what was offered.
    pub(crate) fn is_taken(&self) -> bool {
        matches!(*self.exchange.lock(), Exchange::Taken)
    }

    /// The outlet, if the block has not taken it or has brought it back.
    pub(crate) fn take_back(&self) -> Option<Box<Outlet>> {
        let mut exchange = self.exchange.lock();
        match std::mem::take(&mut *exchange) {
            Exchange::Offered(outlet) | Exchange::Returned(outlet) => {
                *self.guest.lock() = None;
                Some(outlet)
            }
            other => {
                *exchange = other;
                None
            }
        }
    }

    /// The kernel whose loop holds the block's thread, if it is that of a block behind this one:
    /// the last one of those that share the thread.
    pub(crate) fn holder(&self) -> Option<Arc<KernelSignals>> {
        let mut holder = None;
        let mut guest = self.guest.lock().clone();
        while let Some(next) = guest.and_then(|guest| guest.holder()) {
            guest = next.outlet.guest.lock().clone();
            holder = Some(next);
        }
        holder
    }

    /// Whether the block waits for room in the middle of its own handler.
    pub(crate) fn is_in_handler(&self) -> bool {
        self.in_handler.load(Ordering::Acquire)
    }

    // For the block.

    /// The block begins, or ends, to wait for room in the middle of its own handler.
    pub(crate) fn set_in_handler(&self, in_handler: bool) {
        self.in_handler.store(in_handler, Ordering::Release);
    }

    /// What is offered.
    pub(crate) fn take(&self) -> Option<Box<Outlet>> {
        let mut exchange = self.exchange.lock();
        match std::mem::take(&mut *exchange) {
            Exchange::Offered(outlet) => {
                *exchange = Exchange::Taken;
                Some(outlet)
            }
            other => {
                *exchange = other;
                None
            }
        }
    }

    /// Whether the block that has an outlet is to bring it back now, or one is there for the block that has none.
    pub(crate) fn is_due(&self, outlet: Option<&Outlet>) -> bool {
        match outlet {
            Some(outlet) => outlet.is_over() || self.is_recalled(),
            None => self.is_offered(),
        }
    }

    /// Whether an outlet waits to be taken.
    pub(crate) fn is_offered(&self) -> bool {
        matches!(*self.exchange.lock(), Exchange::Offered(_))
    }

    /// Whether the block is to bring back what it has.
    pub(crate) fn is_recalled(&self) -> bool {
        matches!(*self.exchange.lock(), Exchange::Recalled)
    }

    /// Brings it back.
    pub(crate) fn bring_back(&self, outlet: Box<Outlet>) {
        *self.exchange.lock() = Exchange::Returned(outlet);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Debug)]
    struct Passed(AtomicU32);

    impl Meter for Passed {
        fn passed(&self) -> u32 {
            self.0.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn a_counter_counts_by_its_meter_until_it_counts_again() {
        let counter = Counter::default();
        let meter = Arc::new(Passed(AtomicU32::new(u32::MAX - 1)));
        counter.add(5);
        counter.count_by(Arc::<Passed>::clone(&meter));
        assert_eq!(counter.get(), 5);
        // Around the end of its numbers.
        meter.0.fetch_add(4, Ordering::Relaxed);
        assert_eq!((counter.get(), counter.get()), (9, 9));
        meter.0.fetch_add(1, Ordering::Relaxed);
        counter.count_again();
        meter.0.fetch_add(7, Ordering::Relaxed);
        counter.add(1);
        assert_eq!(counter.get(), 11);
    }
}
