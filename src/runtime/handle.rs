//! The handle: any thread may send, receive and call through it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::{MappedMutexGuard, MutexGuard};

use super::calls::PendingCall;
use super::endpoints::{Receiver, Sender};
use super::instance::KernelInstance;
use super::metrics::{KernelMetrics, KernelStatus};
use super::receive::{
    Bytes, Found, Look, Miss, ReceiveSide, WaitEnd, kind_of, read_reply, read_reply_bytes,
    until_found, uselessness,
};
use super::send::{Address, SendOptions, SendSide, until_sent, write_bytes};
use crate::backend::cpu::runs_here;
use crate::error::{
    CallError, Error, MessageError, RecvTimeoutError, Rejection, SendTimeoutError, TryRecvError,
    TrySendError, Unavailable,
};
use crate::kernel::MessageTrace;
use crate::message::{MessageHeader, RAW_KIND, RingMessage};
use crate::time::Deadline;

/// How long a thread waits for another one to be done with a side: copying one message or looking at a slot eight times
/// takes less than a microsecond, so longer means that the other thread was preempted.
const PATIENCE: Duration = Duration::from_micros(100);

/// Looks for a reply between two looks whether the pipeline that it comes by is whole: some 100 us of spinning, which is
/// rare, and far below any timeout.
const LOOKS_PER_CHAIN: u32 = 64;

/// How long a caller sleeps at a time that waits for the reply of another kernel than it has sent to: whoever breaks the
/// chain between them does not know of it.
const CHAIN_NAP: Duration = Duration::from_millis(1);

/// A launched kernel, shared by as many threads as like to.
///
/// Sending and receiving each take one lock, uncontended unless several threads use the same direction at the same
/// time. A thread that may take none uses [`split`](Self::split). Dropping handles does not end the kernel; dropping
/// the runtime does.
///
/// ```
/// use std::time::Duration;
/// use ringkernel::{Dim3, LaunchOptions, RingKernelRuntime};
///
/// let runtime = RingKernelRuntime::builder().build()?;
/// let kernel = runtime.launch("echo", Dim3::x(1), Dim3::x(1), LaunchOptions::default())?;
/// kernel.activate()?;
/// let mut reply = [0; 48];
/// let length = kernel.call_bytes(b"ping", &mut reply, Duration::from_secs(1))?;
/// assert_eq!(&reply[..length], b"ping");
/// kernel.terminate()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct KernelHandle {
    pub(super) instance: Arc<KernelInstance>,
}

impl fmt::Debug for KernelHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KernelHandle").field(&self.instance).finish()
    }
}

impl KernelHandle {
    pub(super) fn new(instance: Arc<KernelInstance>) -> Self {
        Self { instance }
    }

    /// Name of the instance.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.instance.signals.name
    }

    // Control.

    /// Starts polling for messages. Blocks until every block of the grid does, `termination_timeout` at most.
    ///
    /// # Errors
    /// [`Error::InvalidTransition`] unless the kernel is launched or deactivated;
    /// [`Error::Timeout`]; [`Error::ThreadHeld`]; [`Error::CalledFromHandler`].
    pub fn activate(&self) -> Result<(), Error> {
        self.instance.activate()
    }

    /// Refuses new messages and stops polling; state and queued messages are kept for the next `activate`. Blocks until
    /// every block has finished the message at hand, `termination_timeout` at most.
    ///
    /// # Errors
    /// [`Error::InvalidTransition`] unless the kernel is active; [`Error::Timeout`];
    /// [`Error::ThreadHeld`]; [`Error::CalledFromHandler`].
    pub fn deactivate(&self) -> Result<(), Error> {
        self.instance.deactivate()
    }

    /// Ends the kernel and joins its threads; every blocked send and receive fails at once. What is queued is not
    /// handled any more and appears in the runtime's [`ShutdownReport`](crate::ShutdownReport); replies already written
    /// can still be received. Blocks until every block has finished the message at hand, `termination_timeout` at
    /// most.
    ///
    /// A failed kernel stays `Failed`, and gives its threads and cores back.
    ///
    /// # Errors
    /// [`Error::InvalidTransition`] if the kernel has been terminated before; [`Error::Timeout`] if
    /// a handler did not return in time: the kernel is `Failed` then, and the handler's thread is
    /// left behind. [`Error::CalledFromHandler`] in a handler of this kernel, or of one that shares
    /// its thread: nothing has changed then.
    ///
    /// It is no error if only the thread does not end in time, because the handler of another
    /// kernel or a destructor holds it:
    /// [`ShutdownReport::left_behind`](crate::ShutdownReport::left_behind) tells of that.
    pub fn terminate(&self) -> Result<(), Error> {
        self.instance.terminate()
    }

    /// Where the kernel stands, and how it failed, if it did. Allocates; for the control plane.
    #[must_use]
    pub fn status(&self) -> KernelStatus {
        self.instance.status()
    }

    /// What the kernel has done. Allocates; does not disturb the kernel's loop.
    #[must_use]
    pub fn metrics(&self) -> KernelMetrics {
        self.instance.metrics()
    }

    /// When the kernel saw messages, and when it was done with them: the latest samples that it keeps, up to 256 a block, by block and
    /// oldest first. Each call gives all of them; [`MessageTrace::sample`] tells which are new. A sample appears when its
    /// handler has returned, which may be shortly after its reply was received. Allocates; does not disturb the kernel's loop.
    ///
    /// Of a kernel that reads a device's own clock and is active, it asks for that clock first. On CUDA it asks the kernel: for some 2 ms, and up to
    /// 100 ms if that does not answer, because it is in a handler. On Vulkan it asks the driver, some microseconds, and does not wait on the CPU.
    ///
    /// `None` if the kernel is not traced: it was launched without [`LaunchOptions::trace_every`](crate::LaunchOptions::trace_every), or on a
    /// device whose kernels cannot be traced: on Metal, on Vulkan devices whose shaders have no clock or another one than the driver tells, and
    /// there if the kernel has no module for it ([`ShaderCode::traced`](crate::ShaderCode::traced)); the log says which. `None` too while
    /// nothing is known of the device's clock, because it was not told twice.
    #[must_use]
    pub fn traces(&self) -> Option<Vec<MessageTrace>> {
        self.instance.traces()
    }

    // Sending.

    /// Sends a typed message without waiting for room. Waits some 100 us at most for another thread that is sending.
    ///
    /// # Errors
    /// [`TrySendError`]; nothing has been sent then.
    #[inline]
    pub fn try_send<T: RingMessage>(&self, message: &T) -> Result<(), TrySendError> {
        self.try_send_with(message, &SendOptions::default())
    }

    /// As [`try_send`](Self::try_send), with options.
    ///
    /// # Errors
    /// As `try_send`.
    #[inline]
    pub fn try_send_with<T: RingMessage>(
        &self,
        message: &T,
        options: &SendOptions,
    ) -> Result<(), TrySendError> {
        let kind = self.instance.types.kind_of(T::TYPE_ID)?;
        let address = Address::with(kind, options)?;
        self.send_once(&address, |body| self.instance.write_message(message, body))
    }

    /// Sends a typed message, waiting for room for `timeout` at most.
    ///
    /// # Errors
    /// [`SendTimeoutError`]; nothing has been sent then.
    #[inline]
    pub fn send_timeout<T: RingMessage>(
        &self,
        message: &T,
        timeout: Duration,
    ) -> Result<(), SendTimeoutError> {
        self.send_with(message, &SendOptions::default(), timeout)
    }

    /// As [`send_timeout`](Self::send_timeout), with options.
    ///
    /// # Errors
    /// As `send_timeout`.
    #[inline]
    pub fn send_with<T: RingMessage>(
        &self,
        message: &T,
        options: &SendOptions,
        timeout: Duration,
    ) -> Result<(), SendTimeoutError> {
        let kind = self.instance.types.kind_of(T::TYPE_ID)?;
        let address = Address::with(kind, options)?;
        self.send_until(timeout, &address, |body| {
            self.instance.write_message(message, body)
        })
    }

    /// Sends a typed message, waiting for room for `RuntimeConfig::default_timeout` at most.
    ///
    /// # Errors
    /// As [`send_timeout`](Self::send_timeout).
    #[inline]
    pub fn send<T: RingMessage>(&self, message: &T) -> Result<(), SendTimeoutError> {
        self.send_timeout(message, self.instance.default_timeout)
    }

    /// Sends raw bytes, waiting for room for `RuntimeConfig::default_timeout` at most.
    ///
    /// # Errors
    /// As [`send_timeout`](Self::send_timeout).
    #[inline]
    pub fn send_bytes(&self, payload: &[u8]) -> Result<(), SendTimeoutError> {
        self.send_bytes_with(
            payload,
            &SendOptions::default(),
            self.instance.default_timeout,
        )
    }

    /// Sends raw bytes without waiting for room; see [`try_send`](Self::try_send).
    ///
    /// # Errors
    /// As `try_send`.
    #[inline]
    pub fn try_send_bytes(&self, payload: &[u8]) -> Result<(), TrySendError> {
        self.send_once(&Address::plain(RAW_KIND), |body| write_bytes(payload, body))
    }

    /// Sends raw bytes with options, waiting for room for `timeout` at most.
    ///
    /// # Errors
    /// As [`send_timeout`](Self::send_timeout).
    #[inline]
    pub fn send_bytes_with(
        &self,
        payload: &[u8],
        options: &SendOptions,
        timeout: Duration,
    ) -> Result<(), SendTimeoutError> {
        let address = Address::with(RAW_KIND, options)?;
        self.send_until(timeout, &address, |body| write_bytes(payload, body))
    }

    #[inline]
    pub(super) fn send_once(
        &self,
        address: &Address,
        write: impl FnOnce(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), TrySendError> {
        // An uncontended attempt looks at no clock, whatever the bound.
        let mut guard = self
            .instance
            .send
            .try_lock_for(PATIENCE)
            .ok_or_else(|| self.sender_in_use())?;
        let Some(side) = guard.as_mut() else {
            drop(guard);
            return self.send_once_settled(address, write);
        };
        side.try_send(&self.instance, address, write)
    }

    /// Why the sending side cannot be locked: in the child of a fork, its owner may not exist.
    #[cold]
    fn sender_in_use(&self) -> TrySendError {
        match self.elsewhere() {
            Some(unavailable) => unavailable.into(),
            None => TrySendError::Busy,
        }
    }

    /// As `sender_in_use`, of the receiving side.
    #[cold]
    fn receiver_in_use(&self) -> Miss {
        match self.elsewhere() {
            Some(unavailable) => Miss::Unavailable(unavailable),
            None => Miss::Busy,
        }
    }

    /// Whether this process is the child of a fork.
    fn elsewhere(&self) -> Option<Unavailable> {
        let has_forked_since = self.instance.signals.gate.has_forked_since();
        has_forked_since.then_some(Unavailable::Forked)
    }

    /// As `send_once`, after what a connection that has ended held back is there again.
    #[cold]
    fn send_once_settled(
        &self,
        address: &Address,
        write: impl FnOnce(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), TrySendError> {
        if let Some(unavailable) = self.elsewhere() {
            return Err(unavailable.into());
        }
        self.instance.pipes.settle();
        let send = &self.instance.send;
        let mut guard = send.try_lock_for(PATIENCE).ok_or(TrySendError::Busy)?;
        let side = guard
            .as_mut()
            .ok_or_else(|| self.split_off(self.instance.pipes.has_inlet()))?;
        side.try_send(&self.instance, address, write)
    }

    #[inline]
    fn send_until(
        &self,
        timeout: Duration,
        address: &Address,
        write: impl Fn(&mut [u8]) -> Result<usize, Rejection>,
    ) -> Result<(), SendTimeoutError> {
        match self.send_once(address, &write) {
            Err(TrySendError::Full | TrySendError::Busy) if !timeout.is_zero() => {}
            Err(TrySendError::Full | TrySendError::Busy) => return Err(SendTimeoutError::Timeout),
            Err(TrySendError::Unavailable(unavailable)) => return Err(unavailable.into()),
            Err(TrySendError::Rejected(rejection)) => return Err(rejection.into()),
            Ok(()) => return Ok(()),
        }
        let _waiting = self.instance.waiting();
        until_sent(&self.instance, timeout, || self.send_once(address, &write))
    }

    /// Why a side is gone: the kernel's own reason if it has one, else that it is connected, or was split off.
    #[cold]
    fn split_off(&self, connected: bool) -> Unavailable {
        match self.instance.signals.gate.check_receive() {
            Err(unavailable) => unavailable,
            Ok(()) if connected => Unavailable::Connected,
            Ok(()) => Unavailable::Split,
        }
    }

    /// As `split_off`, of the receiving side, unless what a connection that has ended held back is there again.
    #[cold]
    fn no_receiver(&self) -> Miss {
        if let Some(unavailable) = self.elsewhere() {
            return Miss::Unavailable(unavailable);
        }
        self.instance.pipes.settle();
        let has_outlet = self.instance.pipes.has_outlet();
        if !has_outlet {
            // A thread that holds the side may run a decoder, which is not waited for.
            let receive = self.instance.receive.try_lock();
            if receive.is_none_or(|side| side.is_some()) {
                return Miss::Busy;
            }
        }
        Miss::Unavailable(self.split_off(has_outlet))
    }

    // Receiving.

    /// Receives a typed message if one is waiting. Does not wait.
    ///
    /// Replies to pending `call`s are never returned here.
    ///
    /// # Errors
    /// [`TryRecvError`]. A message of another type stays where it is.
    #[inline]
    pub fn try_recv<T: RingMessage>(&self) -> Result<T, TryRecvError> {
        let (mut side, found) = self.find(Look::ONCE)?;
        Ok(self.typed(&mut side, found)?)
    }

    /// Receives a typed message, waiting for `timeout` at most. A message that comes before the deadline is never
    /// missed.
    ///
    /// # Errors
    /// [`RecvTimeoutError`]. A message of another type stays where it is.
    #[inline]
    pub fn recv_timeout<T: RingMessage>(&self, timeout: Duration) -> Result<T, RecvTimeoutError> {
        let (mut side, found) = self.find_until(timeout)?;
        Ok(self.typed(&mut side, found)?)
    }

    /// Receives a typed message, waiting for `RuntimeConfig::default_timeout` at most.
    ///
    /// # Errors
    /// As [`recv_timeout`](Self::recv_timeout).
    #[inline]
    pub fn recv<T: RingMessage>(&self) -> Result<T, RecvTimeoutError> {
        self.recv_timeout(self.instance.default_timeout)
    }

    /// Receives a message of any type as raw bytes, if one is waiting, and returns its length. Does not wait.
    ///
    /// # Errors
    /// [`TryRecvError`]. A message that `buffer` is too small for stays where it is.
    #[inline]
    pub fn try_recv_bytes(&self, buffer: &mut [u8]) -> Result<usize, TryRecvError> {
        let (mut side, found) = self.find(Look::ONCE)?;
        Ok(side.take::<Bytes>(&self.instance, found).copy_to(buffer)?)
    }

    /// Receives a message of any type as raw bytes, waiting for `timeout` at most, and returns its length.
    ///
    /// # Errors
    /// [`RecvTimeoutError`]. A message that `buffer` is too small for stays where it is.
    #[inline]
    pub fn recv_bytes_timeout(
        &self,
        buffer: &mut [u8],
        timeout: Duration,
    ) -> Result<usize, RecvTimeoutError> {
        let (mut side, found) = self.find_until(timeout)?;
        Ok(side.take::<Bytes>(&self.instance, found).copy_to(buffer)?)
    }

    #[inline]
    fn typed<T: RingMessage>(
        &self,
        side: &mut ReceiveSide,
        found: Found,
    ) -> Result<T, MessageError> {
        side.take::<T>(&self.instance, found).into_message()
    }

    /// The next message, with the receiving side locked around it.
    #[inline(always)]
    fn find(&self, look: Look) -> Result<(MappedMutexGuard<'_, ReceiveSide>, Found), Miss> {
        let receive = &self.instance.receive;
        let guard = if look.last {
            receive.try_lock_for(PATIENCE)
        } else {
            receive.try_lock()
        }
        .ok_or_else(|| self.receiver_in_use())?;
        let mut side = MutexGuard::try_map(guard, Option::as_mut).map_err(|guard| {
            drop(guard);
            self.no_receiver()
        })?;
        let found = side.find(&self.instance, look.polls)?;
        Ok((side, found))
    }

    #[inline]
    fn find_until(
        &self,
        timeout: Duration,
    ) -> Result<(MappedMutexGuard<'_, ReceiveSide>, Found), WaitEnd> {
        match self.find(Look::ONCE) {
            Err(Miss::Empty | Miss::Busy) if !timeout.is_zero() => {}
            Err(Miss::Empty | Miss::Busy) => return Err(WaitEnd::Timeout),
            Err(Miss::Unavailable(unavailable)) => return Err(WaitEnd::Unavailable(unavailable)),
            Ok(found) => return Ok(found),
        }
        let _waiting = self.instance.waiting();
        until_found(
            &self.instance,
            timeout,
            (),
            |(), look| self.find(look),
            |()| self.may_have_message(None),
        )
    }

    /// Whether a thread about to sleep should look once more instead. Another thread inside the receiving side may
    /// just be handing something over.
    fn may_have_message(&self, call: Option<&PendingCall<'_>>) -> bool {
        let Some(mut guard) = self.instance.receive.try_lock() else {
            return true;
        };
        if self.instance.signals.gate.check_receive().is_err() {
            return true;
        }
        match call {
            // Looked at under the lock: whoever handed it over did so under the lock as well. The inbox is nothing to
            // a call.
            Some(call) => call.is_done() || guard.as_mut().is_none_or(ReceiveSide::has_reply),
            None => guard.as_mut().is_none_or(ReceiveSide::has_message),
        }
    }

    // Calls.

    /// Sends a request and waits for the reply to it, `timeout` at most for both. Any number of threads may call at the
    /// same time, up to `LaunchOptions::max_pending_calls`; each gets the first reply to its own request. Further
    /// replies, and those that come after the timeout, go to the dead letters.
    ///
    /// # Errors
    /// [`CallError`]; `CallError::Message(MessageError::Handler(_))` if the handler returned an error.
    #[inline]
    pub fn call<Req: RingMessage, Resp: RingMessage>(
        &self,
        request: &Req,
        timeout: Duration,
    ) -> Result<Resp, CallError> {
        self.call_through(self, request, timeout)
    }

    /// Sends a request to this kernel and waits for the reply of `last`, the end of the pipeline that begins here
    /// ([`RingKernelRuntime::connect`](crate::RingKernelRuntime::connect)), `timeout` at most for both. As
    /// [`call`](Self::call) otherwise; the call is one of `last`'s.
    ///
    /// # Errors
    /// [`CallError`]; `CallError::Message(MessageError::Handler(_))` if a handler on the way returned an error;
    /// [`Unavailable::NotConnected`] if this kernel's replies do not come to `last` (any more).
    #[inline]
    pub fn call_through<Req: RingMessage, Resp: RingMessage>(
        &self,
        last: &Self,
        request: &Req,
        timeout: Duration,
    ) -> Result<Resp, CallError> {
        let types = &last.instance.types;
        let kind = self.instance.types.kind_of(Req::TYPE_ID)?;
        let reply_kind = kind_of::<Resp>(&last.instance);
        last.exchange(
            self,
            kind,
            timeout,
            |body| self.instance.write_message(request, body),
            |header, payload| {
                let found = || types.type_id_of(header.kind());
                read_reply::<Resp>(reply_kind, found, header, payload)
            },
        )
    }

    /// As [`call`](Self::call), with raw bytes both ways; returns the length of the reply. A reply of any type is
    /// taken.
    ///
    /// # Errors
    /// As `call`; a reply that exceeds `reply` is lost.
    #[inline]
    pub fn call_bytes(
        &self,
        request: &[u8],
        reply: &mut [u8],
        timeout: Duration,
    ) -> Result<usize, CallError> {
        self.call_bytes_through(self, request, reply, timeout)
    }

    /// As [`call_through`](Self::call_through), with raw bytes both ways; returns the length of the reply. A reply of any
    /// type is taken.
    ///
    /// # Errors
    /// As `call_through`; a reply that exceeds `reply` is lost.
    #[inline]
    pub fn call_bytes_through(
        &self,
        last: &Self,
        request: &[u8],
        reply: &mut [u8],
        timeout: Duration,
    ) -> Result<usize, CallError> {
        last.exchange(
            self,
            RAW_KIND,
            timeout,
            |body| write_bytes(request, body),
            |header, payload| read_reply_bytes(reply, header, payload),
        )
    }

    /// Sends to `first`, whose replies, or what becomes of them, are this kernel's.
    #[inline]
    fn exchange<R>(
        &self,
        first: &Self,
        kind: u16,
        timeout: Duration,
        write: impl Fn(&mut [u8]) -> Result<usize, Rejection>,
        read: impl FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    ) -> Result<R, CallError> {
        let instance = &*self.instance;
        if runs_here(&instance.signals) || runs_here(&first.instance.signals) {
            return Err(CallError::OwnKernel);
        }
        // A request whose reply nobody could fetch must not be sent.
        if instance.receiver_split.load(Ordering::Acquire) {
            match self.no_receiver() {
                Miss::Unavailable(unavailable) => return Err(unavailable.into()),
                Miss::Empty | Miss::Busy => {}
            }
        }
        let mut call = instance.calls.begin().ok_or(CallError::TooManyCalls)?;
        let address = Address::call(kind, call.correlation);
        let longest_sleep = if Arc::ptr_eq(&first.instance, &self.instance) {
            instance.longest_sleep
        } else {
            instance.longest_sleep.min(CHAIN_NAP)
        };
        let mut waiter = instance.waiter(timeout).sleeping_at_most(longest_sleep);
        // The common case needs no clock: there is room.
        match first.send_once(&address, &write) {
            Ok(()) => {}
            Err(TrySendError::Unavailable(unavailable)) => return Err(unavailable.into()),
            Err(TrySendError::Rejected(rejection)) => return Err(rejection.into()),
            Err(TrySendError::Full | TrySendError::Busy) => {
                let deadline = Deadline::after(timeout);
                first.send_until(timeout, &address, &write)?;
                waiter = instance
                    .waiter(deadline.remaining())
                    .sleeping_at_most(longest_sleep);
            }
        }
        let mut read = Some(read);
        let mut last = false;
        let mut looks = 0_u32;
        loop {
            let look = Look {
                polls: waiter.polls(),
                last,
            };
            if let Some(outcome) = self.look_for_reply(&mut call, &mut read, look) {
                return outcome.map_err(CallError::from);
            }
            if last {
                break;
            }
            looks = looks.wrapping_add(1);
            let ended = instance.signals.gate.check_receive().is_err()
                || (looks.is_multiple_of(LOOKS_PER_CHAIN)
                    && !instance.pipes.comes_from(&first.instance, instance));
            last = ended
                || !waiter.pause(&instance.link, &instance.signals.replied, || {
                    self.may_have_message(Some(&call))
                });
        }
        // Whatever comes from now on is late. What came in this very moment is not.
        if !call.give_up()
            && let Some(outcome) = self.take_stored(&call, &mut read)
        {
            return outcome.map_err(CallError::from);
        }
        for kernel in [instance, &*first.instance] {
            kernel.signals.gate.check_receive()?;
        }
        if !instance.pipes.comes_from(&first.instance, instance) {
            return Err(Unavailable::NotConnected.into());
        }
        Err(CallError::Timeout)
    }

    /// Takes the call's reply out of the ring, or from the thread that did so first.
    #[inline]
    fn look_for_reply<R, F>(
        &self,
        call: &mut PendingCall<'_>,
        read: &mut Option<F>,
        look: Look,
    ) -> Option<Result<R, MessageError>>
    where
        F: FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    {
        if call.is_done() {
            return self.take_stored(call, read);
        }
        let receive = &self.instance.receive;
        let mut guard = if look.last {
            receive.try_lock_for(PATIENCE)?
        } else {
            receive.try_lock()?
        };
        // There is a side: `split` refuses while a call is pending.
        let side = guard.as_mut()?;
        if call.is_done() {
            // Whoever held the side has stored it meanwhile; what lies in the ring now is not the first reply.
            drop(guard);
            return self.take_stored(call, read);
        }
        let Some(found) = side.find_reply(&self.instance, call, look.polls) else {
            drop(guard);
            return self.take_stored(call, read);
        };
        // With the side in hand: no further reply is handed to a call that has this one, and would
        // never look for it.
        call.give_up();
        let received = side.take::<Bytes>(&self.instance, found);
        Some(received.read_with(read.take()?))
    }

    #[inline]
    fn take_stored<R, F>(
        &self,
        call: &PendingCall<'_>,
        read: &mut Option<F>,
    ) -> Option<Result<R, MessageError>>
    where
        F: FnOnce(&MessageHeader, &[u8]) -> Result<R, MessageError>,
    {
        if !call.is_done() {
            return None;
        }
        let read = read.take()?;
        call.take(|header, payload| {
            let outcome = read(header, payload);
            match uselessness(&outcome) {
                Some(reason) => self.instance.give_handed_over_up(reason, header, payload),
                None => self.instance.count_handed_over(),
            }
            outcome
        })
    }

    // Endpoints.

    /// Gives the kernel's sending and receiving sides away as exclusive endpoints for typed messages. Until both are
    /// dropped, the handle itself cannot send, receive, call or split.
    ///
    /// # Errors
    /// [`Error::UnknownType`] if the kernel was not registered for one of the types; [`Error::EndpointsBusy`] if the
    /// sides are split off already, in use by another thread, awaited by a pending call, or hold replies that a call
    /// put aside.
    pub fn split<Req: RingMessage, Resp: RingMessage>(
        &self,
    ) -> Result<(Sender<Req>, Receiver<Resp>), Error> {
        self.split_through(self)
    }

    /// Gives the sending side of this kernel and the receiving side of `last` away as exclusive endpoints: the two ends of
    /// the pipeline that begins here ([`RingKernelRuntime::connect`](crate::RingKernelRuntime::connect)). As
    /// [`split`](Self::split) otherwise.
    ///
    /// # Errors
    /// As `split`, of either kernel.
    pub fn split_through<Req: RingMessage, Resp: RingMessage>(
        &self,
        last: &Self,
    ) -> Result<(Sender<Req>, Receiver<Resp>), Error> {
        let request = self.declared_kind(Req::TYPE_ID, Req::NAME)?;
        last.declared_kind(Resp::TYPE_ID, Resp::NAME)?;
        let (send, receive) = self.take_sides(last)?;
        Ok((
            Sender::new(Arc::clone(&self.instance), send, request),
            Receiver::new(Arc::clone(&last.instance), receive),
        ))
    }

    /// As [`split`](Self::split), for raw bytes.
    ///
    /// # Errors
    /// As `split`.
    pub fn split_bytes(&self) -> Result<(Sender<Bytes>, Receiver<Bytes>), Error> {
        self.split_bytes_through(self)
    }

    /// As [`split_through`](Self::split_through), for raw bytes.
    ///
    /// # Errors
    /// As `split_through`.
    pub fn split_bytes_through(
        &self,
        last: &Self,
    ) -> Result<(Sender<Bytes>, Receiver<Bytes>), Error> {
        let (send, receive) = self.take_sides(last)?;
        Ok((
            Sender::new(Arc::clone(&self.instance), send, RAW_KIND),
            Receiver::new(Arc::clone(&last.instance), receive),
        ))
    }

    /// The kind of a type that the kernel must know.
    pub(super) fn declared_kind(
        &self,
        type_id: u64,
        type_name: &'static str,
    ) -> Result<u16, Error> {
        self.instance
            .types
            .kind_of(type_id)
            .map_err(|_| Error::UnknownType {
                kernel: self.name().to_owned(),
                type_name,
            })
    }

    pub(super) fn busy(&self, reason: &'static str) -> Error {
        Error::EndpointsBusy {
            kernel: self.name().to_owned(),
            reason,
        }
    }

    pub(super) fn take_sides(&self, last: &Self) -> Result<(SendSide, ReceiveSide), Error> {
        for kernel in [&self.instance, &last.instance] {
            kernel.check_here("split a kernel")?;
        }
        let busy = |reason| last.busy(reason);
        let instance = &*last.instance;
        for kernel in [&self.instance, &last.instance] {
            kernel.pipes.settle();
        }
        let mut send = self
            .instance
            .send
            .try_lock()
            .ok_or_else(|| self.busy("another thread is sending"))?;
        let mut receive = instance
            .receive
            .try_lock()
            .ok_or_else(|| busy("another thread is receiving"))?;
        if instance.calls.any_pending() {
            return Err(busy("a call is pending"));
        }
        // Read under both locks: whoever starts to wait after this looks at the sides again, and finds them gone.
        if instance.has_waiters() || self.instance.has_waiters() {
            return Err(busy("another thread waits for a message or for room"));
        }
        if receive.as_ref().is_some_and(|side| side.inbox_depth() > 0) {
            return Err(busy("replies that a call put aside have not been received"));
        }
        match (send.take(), receive.take()) {
            (Some(send), Some(receive)) => {
                instance.receiver_split.store(true, Ordering::Release);
                Ok((send, receive))
            }
            (put_back_send, put_back_receive) => {
                *send = put_back_send;
                *receive = put_back_receive;
                if self.instance.pipes.has_inlet() || instance.pipes.has_outlet() {
                    return Err(busy("another kernel holds one of them"));
                }
                Err(busy(
                    "they are split off already, or in the hands of clients",
                ))
            }
        }
    }
}

#[cfg(test)]
impl KernelHandle {
    /// Overwrites a word of a reply's slot, as a faulty device might.
    pub(crate) fn overwrite_reply_word(&self, slot: usize, word: usize, value: u32) {
        self.instance.blocks[0].overwrite_reply_word(slot, word, value);
    }

    /// Receives a reply of 48 bytes in place and checks whether a device that writes to its slot
    /// meanwhile changes it.
    pub(crate) fn check_that_replies_stay(&self) {
        let timeout = Duration::from_secs(30);
        self.send_bytes(&[7; 48]).unwrap();
        self.send_bytes(&[8; 48]).unwrap();
        let (_sender, mut receiver) = self.split_bytes().unwrap();
        for (slot, byte) in [7, 8].into_iter().enumerate() {
            let received = receiver.recv_ref_timeout(timeout).unwrap();
            for word in 4..16 {
                self.overwrite_reply_word(slot, word, u32::MAX);
            }
            assert_eq!(received.payload(), [byte; 48]);
            // Found again, it is what was looked at before.
            received.keep();
            let received = receiver.recv_ref_timeout(timeout).unwrap();
            assert_eq!(received.payload(), [byte; 48]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{FailureReason, KernelState, LaunchOptions};
    use crate::runtime::RingKernelRuntime;

    const LONG: Duration = Duration::from_secs(30);

    fn echo(runtime: &RingKernelRuntime) -> KernelHandle {
        let kernel = runtime
            .launch("echo", 1, 1, LaunchOptions::default())
            .unwrap();
        kernel.activate().unwrap();
        kernel
    }

    /// Clients find out as well, and the bridge does not look at what does not go away again and again.
    #[test]
    fn a_bad_sequence_leaves_the_bridge_asleep() {
        let config = crate::RuntimeConfig {
            bridge_wait: crate::WaitStrategy::Park,
            heartbeat_interval: Duration::from_millis(10),
            ..crate::RuntimeConfig::default()
        };
        let runtime = RingKernelRuntime::builder().config(config).build().unwrap();
        let kernel = echo(&runtime);
        let mut clients = [kernel.client_bytes(), kernel.client_bytes()].map(Result::unwrap);
        clients[0].try_send_bytes(b"ok").unwrap();
        let begin = std::time::Instant::now();
        while kernel.metrics().produced < 1 {
            assert!(begin.elapsed() < LONG);
        }
        kernel.instance.blocks[0].overwrite_reply_word(1, 0, 17);
        let mut buffer = [0; 64];
        assert_eq!(clients[0].recv_bytes_timeout(&mut buffer, LONG), Ok(2));
        for client in &mut clients {
            assert_eq!(
                client.recv_bytes_timeout(&mut buffer, LONG),
                Err(RecvTimeoutError::Unavailable(Unavailable::Failed))
            );
        }
        let bridge = runtime.bridge(0).unwrap();
        let before = bridge.load().unwrap().sleeps;
        let begin = std::time::Instant::now();
        while bridge.load().unwrap().sleeps < before + 3 {
            assert!(begin.elapsed() < LONG, "it does not sleep");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What a device may get wrong in the header of a reply that it has published or is about to.
    #[test]
    fn a_reply_that_no_correct_kernel_writes_is_counted_and_quarantines() {
        let (sequence, length_flags, kind_lane) = (0, 2, 3);
        for (word, value) in [
            (sequence, 17),
            (length_flags, 0x00ff_ffff),
            (length_flags, 0x0800_0030),
            (kind_lane, 40),
            (kind_lane, 0xffff),
            (kind_lane, 1 << 16),
        ] {
            let runtime = RingKernelRuntime::builder().build().unwrap();
            let (kernel, other) = (echo(&runtime), echo(&runtime));
            kernel.send_bytes(b"ok").unwrap();
            kernel.send_bytes(b"bad").unwrap();
            let begin = std::time::Instant::now();
            while kernel.metrics().produced < 2 {
                assert!(begin.elapsed() < LONG);
            }
            kernel.instance.blocks[0].overwrite_reply_word(1, word, value);
            let mut buffer = [0; 64];
            assert_eq!(kernel.recv_bytes_timeout(&mut buffer, LONG), Ok(2));
            assert_eq!(
                kernel.recv_bytes_timeout(&mut buffer, LONG),
                Err(RecvTimeoutError::Unavailable(Unavailable::Failed)),
                "word {word} = {value:#x}"
            );
            let status = kernel.status();
            assert_eq!(status.state, KernelState::Failed);
            assert_eq!(
                status.failure.map(|failure| failure.reason),
                Some(FailureReason::CorruptRing)
            );
            let corrupt = kernel.metrics().dead_letters.corrupt_replies;
            // A slot that was never published is no message.
            assert_eq!(corrupt, u64::from(word != sequence));
            assert_eq!(other.call_bytes(b"fine", &mut buffer, LONG), Ok(4));
            let report = runtime.complete_shutdown().unwrap();
            assert!(report.requests.adds_up(), "{report}");
        }
    }
}
