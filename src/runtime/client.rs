//! Clients: any number of threads share a kernel, each with a private lane.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use super::client_inbox::Wanted;
use super::client_lane::ClientLane;
use super::client_options::ClientStats;
use super::link::KernelLink;
use super::receive::{read_reply, read_reply_bytes};
use super::send::{Address, SendOptions, write_bytes, write_message};
use crate::error::{CallError, RecvTimeoutError, SendTimeoutError, TryRecvError, TrySendError};
use crate::message::{MessageEncoder, MessageHeader, RAW_KIND, RingMessage};

/// One of several clients of a kernel, for one thread. `Send`, but neither `Sync` nor `Clone`; each has a private lane, so that no other
/// client holds it up by what it sends or does not read, and its replies never reach another one.
///
/// Sending and receiving are wait-free, allocate nothing and take no lock. Who has to wait for a reply passes the time by moving messages
/// between lanes and kernel, unless a bridge spins on a core of its own and does so ([`RuntimeConfig::bridge_wait`](crate::RuntimeConfig)).
/// The only client of a kernel writes to its ring and reads from it directly. A second one may come at any time; from then on messages go through
/// lanes, until all clients have gone.
///
/// ```
/// use std::time::Duration;
/// use ringkernel::{LaunchOptions, RingKernelRuntime};
///
/// let runtime = RingKernelRuntime::builder().build()?;
/// let kernel = runtime.launch("echo", 1, 1, LaunchOptions::default())?;
/// kernel.activate()?;
/// let (mut one, mut two) = (kernel.client_bytes()?, kernel.client_bytes()?);
/// one.try_send_bytes(b"one")?;
/// let mut reply = [0; 48];
/// assert_eq!(two.call_bytes(b"two!", &mut reply, Duration::from_secs(1))?, 4);
/// assert_eq!(one.recv_bytes_timeout(&mut reply, Duration::from_secs(1))?, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Two threads that use one cannot be written:
/// ```compile_fail,E0277
/// use ringkernel::{Bytes, Client};
/// fn share(client: &'static Client<Bytes, Bytes>) { std::thread::spawn(move || println!("{client:?}")); }
/// ```
/// Nor can two of one lane:
/// ```compile_fail,E0599
/// use ringkernel::{Bytes, Client};
/// fn copy(client: Client<Bytes, Bytes>) -> [Client<Bytes, Bytes>; 2] { [client.clone(), client] }
/// ```
pub struct Client<Req, Resp> {
    lane: ClientLane,
    encoder: MessageEncoder,
    kind: u16,
    reply_kind: Option<u16>,
    /// Address of messages that are sent without options.
    plain: Address,
    messages: PhantomData<fn(Req) -> Resp>,
}

impl<Req, Resp> fmt::Debug for Client<Req, Resp> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("kernel", &self.lane.instance())
            .field("lane", &self.lane.number)
            .finish_non_exhaustive()
    }
}

impl<Req, Resp> Client<Req, Resp> {
    pub(super) fn new(lane: ClientLane, kind: u16, reply_kind: Option<u16>) -> Self {
        let encoder = match kind {
            RAW_KIND => MessageEncoder::default(),
            _ => lane.instance().encoder_of_its_own(),
        };
        Self {
            plain: lane.address(kind),
            lane,
            encoder,
            kind,
            reply_kind,
            messages: PhantomData,
        }
    }

    /// Name of the kernel.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.lane.instance().signals.name
    }

    /// Number of the client's lane, as handlers see it in a request's header; never 0.
    #[must_use]
    pub fn lane(&self) -> u16 {
        self.lane.number
    }

    /// Whether messages go to the kernel directly at the moment, past the lane.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        !self.lane.hub.is_crowded() && !self.lane.options.newest_only()
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        self.lane.stats()
    }

    /// Sends raw bytes without waiting for room. Wait-free; neither allocates, locks nor (unless somebody sleeps who must be woken) calls
    /// the system.
    ///
    /// # Errors
    /// [`TrySendError`], but never `Busy`; nothing has been sent then.
    #[inline]
    pub fn try_send_bytes(&mut self, payload: &[u8]) -> Result<(), TrySendError> {
        let address = self.lane.address(RAW_KIND);
        self.lane
            .try_send(&address, |body| write_bytes(payload, body))
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
        let address = Address::with(RAW_KIND, options)?;
        self.lane
            .try_send(&address, |body| write_bytes(payload, body))
    }

    /// Sends raw bytes; without room it does what the client's [`Backpressure`](crate::Backpressure) says, for `timeout` at most.
    ///
    /// # Errors
    /// [`SendTimeoutError`]; nothing has been sent then.
    #[inline]
    pub fn send_bytes_timeout(
        &mut self,
        payload: &[u8],
        timeout: Duration,
    ) -> Result<(), SendTimeoutError> {
        let address = self.lane.address(RAW_KIND);
        self.lane
            .send(&address, timeout, |body| write_bytes(payload, body))
    }

    /// Receives a reply of any type as raw bytes, if one is waiting, and returns its length. Wait-free.
    ///
    /// # Errors
    /// [`TryRecvError`], but never `Busy`. `Empty` also while another thread is just moving messages, or more than 64 of other clients lie in front
    /// of it. A message that `buffer` is too small for stays where it is.
    #[inline]
    pub fn try_recv_bytes(&mut self, buffer: &mut [u8]) -> Result<usize, TryRecvError> {
        let read = |_: &KernelLink, header: &MessageHeader, payload: &[u8]| {
            read_reply_bytes(buffer, header, payload)
        };
        Ok(self.lane.find(Wanted::ANY, 1, read)??)
    }

    /// Receives a reply of any type as raw bytes, waiting for `timeout` at most, and returns its length.
    ///
    /// # Errors
    /// [`RecvTimeoutError`]. A message that `buffer` is too small for stays where it is.
    #[inline]
    pub fn recv_bytes_timeout(
        &mut self,
        buffer: &mut [u8],
        timeout: Duration,
    ) -> Result<usize, RecvTimeoutError> {
        let read = |_: &KernelLink, header: &MessageHeader, payload: &[u8]| {
            read_reply_bytes(buffer, header, payload)
        };
        Ok(self.lane.find_until(Wanted::ANY, timeout, read)??)
    }

    /// Sends raw bytes and waits for the reply to them, `timeout` at most for both; returns its length. A reply of any type is taken.
    ///
    /// # Errors
    /// As [`call`](Self::call); a reply that exceeds `reply` is lost.
    #[inline]
    pub fn call_bytes(
        &mut self,
        request: &[u8],
        reply: &mut [u8],
        timeout: Duration,
    ) -> Result<usize, CallError> {
        let address = self.lane.address(RAW_KIND);
        self.lane.call(
            address,
            timeout,
            |body| write_bytes(request, body),
            |_, header, payload| read_reply_bytes(reply, header, payload),
        )
    }
}

impl<Req: RingMessage, Resp: RingMessage> Client<Req, Resp> {
    /// Sends a message without waiting for room, archived straight into its slot. Wait-free; neither allocates, locks nor (unless somebody
    /// sleeps who must be woken) calls the system.
    ///
    /// # Errors
    /// [`TrySendError`], but never `Busy`; nothing has been sent then.
    #[inline]
    pub fn try_send(&mut self, message: &Req) -> Result<(), TrySendError> {
        let address = self.plain_address();
        let encoder = &mut self.encoder;
        self.lane
            .try_send(&address, |body| write_message(encoder, message, body))
    }

    /// As [`try_send`](Self::try_send), with options, which replace the client's own priority and time to live.
    ///
    /// # Errors
    /// As `try_send`.
    #[inline]
    pub fn try_send_with(
        &mut self,
        message: &Req,
        options: &SendOptions,
    ) -> Result<(), TrySendError> {
        let address = Address::with(self.kind, options)?;
        let encoder = &mut self.encoder;
        self.lane
            .try_send(&address, |body| write_message(encoder, message, body))
    }

    /// Sends a message; without room it does what the client's [`Backpressure`](crate::Backpressure) says, for `timeout` at most.
    ///
    /// # Errors
    /// [`SendTimeoutError`]; nothing has been sent then.
    #[inline]
    pub fn send_timeout(
        &mut self,
        message: &Req,
        timeout: Duration,
    ) -> Result<(), SendTimeoutError> {
        let address = self.plain_address();
        let encoder = &mut self.encoder;
        self.lane.send(&address, timeout, |body| {
            write_message(encoder, message, body)
        })
    }

    /// Sends a message; without room it does what the client's [`Backpressure`](crate::Backpressure) says, for `RuntimeConfig::default_timeout` at most.
    ///
    /// # Errors
    /// As [`send_timeout`](Self::send_timeout).
    #[inline]
    pub fn send(&mut self, message: &Req) -> Result<(), SendTimeoutError> {
        let timeout = self.lane.instance().default_timeout;
        self.send_timeout(message, timeout)
    }

    /// Receives a reply, if one is waiting. Wait-free; allocates only if the type does.
    ///
    /// # Errors
    /// [`TryRecvError`], but never `Busy`. `Empty` also while another thread is just moving messages, or more than 64 of other clients lie in front
    /// of it. A message of another type stays where it is.
    #[inline]
    pub fn try_recv(&mut self) -> Result<Resp, TryRecvError> {
        self.try_find(Wanted::ANY)
    }

    #[inline]
    pub(super) fn try_find(&mut self, wanted: Wanted) -> Result<Resp, TryRecvError> {
        let kind = self.reply_kind;
        let read = |link: &KernelLink, header: &MessageHeader, payload: &[u8]| {
            read_reply::<Resp>(
                kind,
                || link.types.type_id_of(header.kind()),
                header,
                payload,
            )
        };
        Ok(self.lane.find(wanted, 1, read)??)
    }

    /// Receives a reply, waiting for `timeout` at most. One that comes before the deadline is never missed, but while the operating system keeps
    /// a thread off its core that was just moving messages: for that one it waits 100 us longer. A timeout of zero is a try.
    ///
    /// # Errors
    /// [`RecvTimeoutError`]. A message of another type stays where it is.
    #[inline]
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Resp, RecvTimeoutError> {
        self.find_until(Wanted::ANY, timeout)
    }

    #[inline]
    pub(super) fn find_until(
        &mut self,
        wanted: Wanted,
        timeout: Duration,
    ) -> Result<Resp, RecvTimeoutError> {
        let kind = self.reply_kind;
        let read = |link: &KernelLink, header: &MessageHeader, payload: &[u8]| {
            read_reply::<Resp>(
                kind,
                || link.types.type_id_of(header.kind()),
                header,
                payload,
            )
        };
        Ok(self.lane.find_until(wanted, timeout, read)??)
    }

    /// Receives a reply, waiting for `RuntimeConfig::default_timeout` at most.
    ///
    /// # Errors
    /// As [`recv_timeout`](Self::recv_timeout).
    #[inline]
    pub fn recv(&mut self) -> Result<Resp, RecvTimeoutError> {
        let timeout = self.lane.instance().default_timeout;
        self.recv_timeout(timeout)
    }

    /// Sends a request and waits for the reply to it, `timeout` at most for both. Replies to other requests, which come meanwhile, wait for
    /// `recv`. Further replies to this one, and one that comes after the timeout, go to the dead letters.
    ///
    /// # Errors
    /// [`CallError`], but never `TooManyCalls`.
    #[inline]
    pub fn call(&mut self, request: &Req, timeout: Duration) -> Result<Resp, CallError> {
        let address = self.plain_address();
        let kind = self.reply_kind;
        let encoder = &mut self.encoder;
        self.lane.call(
            address,
            timeout,
            |body| write_message(encoder, request, body),
            |link, header, payload| {
                let found = || link.types.type_id_of(header.kind());
                read_reply::<Resp>(kind, found, header, payload)
            },
        )
    }

    #[inline]
    fn plain_address(&self) -> Address {
        match self.lane.options.time_to_live {
            None => self.plain,
            Some(_) => self.lane.address(self.kind),
        }
    }
}
