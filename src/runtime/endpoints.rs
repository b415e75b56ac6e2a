//! Exclusive endpoints: wait-free, without a lock, for one realtime thread each.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::instance::KernelInstance;
use super::receive::{Miss, ReceiveSide, Received, WaitEnd, until_found};
use super::send::{
    Address, SendBatch, SendOptions, SendSide, SendSlot, until_sent, write_bytes, write_message,
};
use crate::error::{RecvTimeoutError, SendTimeoutError, TryRecvError, TrySendError, Unavailable};
use crate::message::{Envelope, MessageEncoder, RAW_KIND, RingMessage};

/// The exclusive sending endpoint of a kernel. `Send`, but neither `Sync` nor `Clone`: two threads that send through
/// one cannot be written.
///
/// This compiles, because the sender moves:
/// ```
/// use ringkernel::{Bytes, Sender};
/// fn give_away(sender: Sender<Bytes>) { std::thread::spawn(move || drop(sender)); }
/// ```
/// This does not, because it would be shared:
/// ```compile_fail,E0277
/// use ringkernel::{Bytes, Sender};
/// fn share(sender: &'static Sender<Bytes>) { std::thread::spawn(move || println!("{sender:?}")); }
/// ```
/// Nor does this:
/// ```compile_fail,E0599
/// use ringkernel::{Bytes, Sender};
/// fn copy(sender: Sender<Bytes>) -> (Sender<Bytes>, Sender<Bytes>) { (sender.clone(), sender) }
/// ```
/// Nor a slot that outlives the next send:
/// ```compile_fail,E0499
/// use ringkernel::{Bytes, Sender};
/// fn twice(mut sender: Sender<Bytes>) {
///     let first = sender.reserve().unwrap();
///     let second = sender.reserve().unwrap();
///     first.commit(0).unwrap();
///     second.commit(0).unwrap();
/// }
/// ```
pub struct Sender<M> {
    instance: Arc<KernelInstance>,
    /// `None` only while the endpoint is being dropped.
    side: Option<SendSide>,
    encoder: MessageEncoder,
    kind: u16,
    message: PhantomData<fn(M)>,
}

/// The exclusive receiving endpoint of a kernel. `Send`, but neither `Sync` nor `Clone`: two threads that receive
/// through one cannot be written.
///
/// This compiles, because the receiver moves:
/// ```
/// use ringkernel::{Bytes, Receiver};
/// fn give_away(receiver: Receiver<Bytes>) { std::thread::spawn(move || drop(receiver)); }
/// ```
/// This does not, because it would be shared:
/// ```compile_fail,E0277
/// use ringkernel::{Bytes, Receiver};
/// fn share(receiver: &'static Receiver<Bytes>) { std::thread::spawn(move || println!("{receiver:?}")); }
/// ```
/// Nor does this:
/// ```compile_fail,E0599
/// use ringkernel::{Bytes, Receiver};
/// fn copy(receiver: Receiver<Bytes>) -> (Receiver<Bytes>, Receiver<Bytes>) { (receiver.clone(), receiver) }
/// ```
/// Nor a message that is read after the next one was received:
/// ```compile_fail,E0499
/// use ringkernel::{Bytes, Receiver};
/// fn twice(mut receiver: Receiver<Bytes>) {
///     let first = receiver.try_recv_ref().unwrap();
///     let second = receiver.try_recv_ref().unwrap();
///     assert_eq!(first.payload(), second.payload());
/// }
/// ```
pub struct Receiver<M> {
    instance: Arc<KernelInstance>,
    /// `None` only while the endpoint is being dropped.
    side: Option<ReceiveSide>,
    message: PhantomData<fn() -> M>,
}

impl<M> fmt::Debug for Sender<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sender").field(&self.instance).finish()
    }
}

impl<M> fmt::Debug for Receiver<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Receiver").field(&self.instance).finish()
    }
}

impl<M> Sender<M> {
    pub(super) fn new(instance: Arc<KernelInstance>, side: SendSide, kind: u16) -> Self {
        let encoder = match kind {
            RAW_KIND => MessageEncoder::default(),
            _ => instance.encoder_of_its_own(),
        };
        Self {
            encoder,
            instance,
            side: Some(side),
            kind,
            message: PhantomData,
        }
    }

    /// The parts of a live endpoint.
    #[inline]
    fn parts(
        &mut self,
    ) -> Result<(&mut SendSide, &KernelInstance, &mut MessageEncoder), TrySendError> {
        match &mut self.side {
            Some(side) => Ok((side, &self.instance, &mut self.encoder)),
            // Only `drop` takes the side.
            None => Err(TrySendError::Unavailable(Unavailable::Split)),
        }
    }

    /// Sends raw bytes. Wait-free; neither allocates, locks nor (to a kernel that spins) calls the system.
    ///
    /// # Errors
    /// [`TrySendError`], but never `Busy`; nothing has been sent then.
    #[inline]
    pub fn try_send_bytes(&mut self, payload: &[u8]) -> Result<(), TrySendError> {
        let (side, instance, _) = self.parts()?;
        side.try_send(instance, &Address::plain(RAW_KIND), |body| {
            write_bytes(payload, body)
        })
    }

    /// As [`try_send_bytes`](Self::try_send_bytes), with options.
    ///
    /// # Errors
    /// As `try_send_bytes`.
    #[inline]
    pub fn try_send_bytes_with(
        &mut self,
        payload: &[u8],
        options: &SendOptions,
    ) -> Result<(), TrySendError> {
        let (side, instance, _) = self.parts()?;
        let address = Address::with(RAW_KIND, options)?;
        side.try_send(instance, &address, |body| write_bytes(payload, body))
    }

    /// Sends raw bytes, waiting for room for `timeout` at most.
    ///
    /// # Errors
    /// [`SendTimeoutError`]; nothing has been sent then.
    #[inline]
    pub fn send_bytes_timeout(
        &mut self,
        payload: &[u8],
        timeout: Duration,
    ) -> Result<(), SendTimeoutError> {
        let instance = Arc::clone(&self.instance);
        until_sent(&instance, timeout, || self.try_send_bytes(payload))
    }

    /// A free slot, to write a message into it in place. Wait-free.
    ///
    /// # Errors
    /// As [`try_send_bytes`](Self::try_send_bytes).
    #[inline]
    pub fn reserve(&mut self) -> Result<SendSlot<'_>, TrySendError> {
        self.reserve_with(&SendOptions::default())
    }

    /// As [`reserve`](Self::reserve), with options. The slot's message counts as one of this endpoint's type.
    ///
    /// # Errors
    /// As `reserve`.
    #[inline]
    pub fn reserve_with(&mut self, options: &SendOptions) -> Result<SendSlot<'_>, TrySendError> {
        let kind = self.kind;
        let (side, instance, _) = self.parts()?;
        let address = Address::with(kind, options)?;
        side.reserve(instance, &address)
    }

    /// Up to `wanted` free slots of one block, to be written one by one and published with one pass. Wait-free.
    ///
    /// # Errors
    /// As [`try_send_bytes`](Self::try_send_bytes); `Full` if there is not a single slot.
    #[inline]
    pub fn batch(&mut self, wanted: usize) -> Result<SendBatch<'_>, TrySendError> {
        let (side, instance, _) = self.parts()?;
        side.batch(instance, wanted)
    }
}

impl<M: RingMessage> Sender<M> {
    /// Sends a message, archived straight into its slot. Wait-free; neither allocates, locks nor (to a kernel that
    /// spins) calls the system.
    ///
    /// # Errors
    /// [`TrySendError`], but never `Busy`; nothing has been sent then.
    #[inline]
    pub fn try_send(&mut self, message: &M) -> Result<(), TrySendError> {
        let address = Address::plain(self.kind);
        let (side, instance, encoder) = self.parts()?;
        side.try_send(instance, &address, |body| {
            write_message(encoder, message, body)
        })
    }

    /// As [`try_send`](Self::try_send), with options.
    ///
    /// # Errors
    /// As `try_send`.
    #[inline]
    pub fn try_send_with(
        &mut self,
        message: &M,
        options: &SendOptions,
    ) -> Result<(), TrySendError> {
        let kind = self.kind;
        let (side, instance, encoder) = self.parts()?;
        let address = Address::with(kind, options)?;
        side.try_send(instance, &address, |body| {
            write_message(encoder, message, body)
        })
    }

    /// Sends a message, waiting for room for `timeout` at most.
    ///
    /// # Errors
    /// [`SendTimeoutError`]; nothing has been sent then.
    #[inline]
    pub fn send_timeout(&mut self, message: &M, timeout: Duration) -> Result<(), SendTimeoutError> {
        let instance = Arc::clone(&self.instance);
        until_sent(&instance, timeout, || self.try_send(message))
    }

    /// Sends a message, waiting for room for `RuntimeConfig::default_timeout` at most.
    ///
    /// # Errors
    /// As [`send_timeout`](Self::send_timeout).
    #[inline]
    pub fn send(&mut self, message: &M) -> Result<(), SendTimeoutError> {
        self.send_timeout(message, self.instance.default_timeout)
    }

    /// Sends as many of `messages`, from the first on, as there is room for, published with one pass, and returns how
    /// many. Wait-free. All of them go to one block of the grid.
    ///
    /// # Errors
    /// [`TrySendError`] if not even the first could be sent; nothing has been sent then. A message in the middle that
    /// is refused ends the batch before it, and is the next call's first.
    #[inline]
    pub fn send_batch(&mut self, messages: &[M]) -> Result<usize, TrySendError> {
        let envelope = Envelope {
            kind: self.kind,
            ..Envelope::default()
        };
        if messages.is_empty() {
            return Ok(0);
        }
        let (side, instance, encoder) = self.parts()?;
        let mut batch = side.batch(instance, messages.len())?;
        let mut staged = 0;
        for message in messages {
            match batch.stage(&envelope, |body| write_message(encoder, message, body)) {
                Ok(()) => staged += 1,
                Err(error) if staged == 0 => return Err(error),
                Err(_) => break,
            }
        }
        batch.commit()
    }
}

impl<M> Drop for Sender<M> {
    /// Gives the sending side back to the kernel's handles.
    fn drop(&mut self) {
        let side = self.side.take();
        if self.instance.has_forked_since() {
            // The lock may be held by a thread that does not exist here.
            std::mem::forget(side);
            return;
        }
        *self.instance.send.lock() = side;
    }
}

impl<M> Receiver<M> {
    pub(super) fn new(instance: Arc<KernelInstance>, side: ReceiveSide) -> Self {
        Self {
            instance,
            side: Some(side),
            message: PhantomData,
        }
    }

    #[inline(always)]
    fn find(&mut self) -> Result<Received<'_, M>, Miss> {
        let Some(side) = &mut self.side else {
            // Only `drop` takes the side.
            return Err(Miss::Unavailable(Unavailable::Split));
        };
        let found = side.find(&self.instance, 1)?;
        Ok(side.take(&self.instance, found))
    }

    #[inline(always)]
    fn find_until(&mut self, timeout: Duration) -> Result<Received<'_, M>, WaitEnd> {
        let Some(side) = &mut self.side else {
            return Err(WaitEnd::Unavailable(Unavailable::Split));
        };
        let instance = &*self.instance;
        let found = until_found(
            instance,
            timeout,
            &mut *side,
            |side, look| side.find(instance, look.polls),
            |side| side.has_message() || instance.signals.gate.check_receive().is_err(),
        )?;
        Ok(side.take(instance, found))
    }

    /// The next message of any type, in its slot. Wait-free; neither allocates, locks nor calls the system.
    ///
    /// # Errors
    /// [`TryRecvError`], but never `Busy` or `Message`: error replies and messages of another type are returned as
    /// they are.
    #[inline]
    pub fn try_recv_ref(&mut self) -> Result<Received<'_, M>, TryRecvError> {
        Ok(self.find()?)
    }

    /// The next message of any type, in its slot, waiting for `timeout` at most.
    ///
    /// # Errors
    /// [`RecvTimeoutError`], but never `Message`.
    #[inline]
    pub fn recv_ref_timeout(
        &mut self,
        timeout: Duration,
    ) -> Result<Received<'_, M>, RecvTimeoutError> {
        Ok(self.find_until(timeout)?)
    }

    /// Receives a message of any type as raw bytes, and returns its length. Wait-free; neither allocates, locks nor
    /// calls the system.
    ///
    /// # Errors
    /// [`TryRecvError`], but never `Busy`. A message that `buffer` is too small for stays where it is.
    #[inline]
    pub fn try_recv_bytes(&mut self, buffer: &mut [u8]) -> Result<usize, TryRecvError> {
        Ok(self.find()?.copy_to(buffer)?)
    }

    /// Receives a message of any type as raw bytes, waiting for `timeout` at most, and returns its length. With
    /// [`WaitStrategy::Spin`](crate::WaitStrategy::Spin) it neither allocates, locks nor calls the system.
    ///
    /// # Errors
    /// [`RecvTimeoutError`]. A message that `buffer` is too small for stays where it is.
    #[inline]
    pub fn recv_bytes_timeout(
        &mut self,
        buffer: &mut [u8],
        timeout: Duration,
    ) -> Result<usize, RecvTimeoutError> {
        Ok(self.find_until(timeout)?.copy_to(buffer)?)
    }

    /// Hands up to `most` waiting messages to `read`, each in its slot, and returns how many. Does not wait; the slots
    /// go back to the kernel by quarter ring.
    ///
    /// # Errors
    /// [`TryRecvError`] if there was not a single message.
    #[inline]
    pub fn drain(
        &mut self,
        most: usize,
        mut read: impl FnMut(&Received<'_, M>),
    ) -> Result<usize, TryRecvError> {
        let mut count = 0;
        while count < most {
            match self.try_recv_ref() {
                Ok(received) => read(&received),
                Err(error) if count == 0 => return Err(error),
                Err(_) => break,
            }
            count += 1;
        }
        Ok(count)
    }
}

impl<M: RingMessage> Receiver<M> {
    /// Receives a message. Wait-free; neither allocates (unless the type does), locks nor calls the system.
    ///
    /// # Errors
    /// [`TryRecvError`], but never `Busy`. A message of another type stays where it is.
    #[inline]
    pub fn try_recv(&mut self) -> Result<M, TryRecvError> {
        Ok(self.find()?.into_message()?)
    }

    /// Receives a message, waiting for `timeout` at most. A message that comes before the deadline is never missed.
    /// With [`WaitStrategy::Spin`](crate::WaitStrategy::Spin) it neither allocates (unless the type does), locks nor
    /// calls the system.
    ///
    /// # Errors
    /// [`RecvTimeoutError`]. A message of another type stays where it is.
    #[inline]
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<M, RecvTimeoutError> {
        Ok(self.find_until(timeout)?.into_message()?)
    }

    /// Receives a message, waiting for `RuntimeConfig::default_timeout` at most.
    ///
    /// # Errors
    /// As [`recv_timeout`](Self::recv_timeout).
    #[inline]
    pub fn recv(&mut self) -> Result<M, RecvTimeoutError> {
        self.recv_timeout(self.instance.default_timeout)
    }

    /// Appends up to `most` waiting messages to `messages`, and returns how many. Does not wait; allocates only if
    /// `messages` has no room for them.
    ///
    /// # Errors
    /// As [`try_recv`](Self::try_recv), if there was not a single message. A message that cannot be received ends the
    /// batch before it.
    #[inline]
    pub fn recv_batch(
        &mut self,
        messages: &mut Vec<M>,
        most: usize,
    ) -> Result<usize, TryRecvError> {
        if most == 0 {
            return Ok(0);
        }
        messages.push(self.try_recv()?);
        let mut count = 1;
        while count < most {
            let Ok(received) = self.find() else {
                break;
            };
            match received.decode() {
                Ok(message) => messages.push(message),
                // Left where it is, so that the error comes with the next call and the messages before it with this.
                Err(_) => {
                    received.keep();
                    break;
                }
            }
            count += 1;
        }
        Ok(count)
    }
}

impl<M> Drop for Receiver<M> {
    /// Gives the receiving side back to the kernel's handles.
    fn drop(&mut self) {
        let side = self.side.take();
        if self.instance.has_forked_since() {
            // As for a sender.
            std::mem::forget(side);
            return;
        }
        let mut receive = self.instance.receive.lock();
        *receive = side;
        self.instance.receiver_split.store(false, Ordering::Release);
    }
}
