//! What a CPU handler gets and gives.

use std::fmt;

use bytemuck::Pod;

use super::options::Dim3;
use super::reply_port::ReplyPort;
use super::types::TypeTable;
use crate::error::HandlerError;
use crate::message::codec::CodecError;
use crate::message::{Extension, MessageHeader, RAW_KIND, RingMessage};
use crate::ring::Consumer;

/// What a handler returns: nothing, or an error that is counted and answered as an error reply.
pub type HandlerResult = Result<(), HandlerError>;

/// The code of a kernel on the CPU. Closures of this shape are handlers.
///
/// One handler serves all blocks of all launches, each on a thread of its own; what it keeps between messages belongs
/// into [`KernelContext::state`].
pub trait CpuHandler: Send + Sync {
    /// Handles one request. It may write any number of replies through `context`.
    ///
    /// A panic fails the kernel; other kernels go on. What a handler calls must not wait for its
    /// own kernel: control calls give
    /// [`Error::CalledFromHandler`](crate::Error::CalledFromHandler), calls
    /// [`CallError::OwnKernel`](crate::error::CallError::OwnKernel), at once.
    ///
    /// # Errors
    /// Whatever it likes; the error becomes an error reply, which `call` returns to its caller.
    fn handle(&self, request: &Request<'_>, context: &mut KernelContext<'_, '_>) -> HandlerResult;
}

impl<F> CpuHandler for F
where
    F: Fn(&Request<'_>, &mut KernelContext<'_, '_>) -> HandlerResult + Send + Sync,
{
    #[inline]
    fn handle(&self, request: &Request<'_>, context: &mut KernelContext<'_, '_>) -> HandlerResult {
        self(request, context)
    }
}

/// One request, read in place.
#[derive(Debug)]
pub struct Request<'a> {
    pub(crate) ring: &'a Consumer,
    pub(crate) types: &'a TypeTable,
}

impl<'a> Request<'a> {
    /// The request's header.
    #[inline]
    #[must_use]
    pub fn header(&self) -> MessageHeader {
        *self.ring.header()
    }

    /// Timestamp, deadline and trace id, if the request carries them.
    #[inline]
    #[must_use]
    pub fn extension(&self) -> Option<Extension> {
        self.ring.extension()
    }

    /// The payload, 16-byte aligned.
    #[inline]
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        self.ring.payload()
    }

    /// Whether the request is of type `T`.
    #[inline]
    #[must_use]
    pub fn is<T: RingMessage>(&self) -> bool {
        self.types.type_id_of(self.ring.header().kind()) == Some(T::TYPE_ID)
    }

    /// The request as the archived form of `T`, in place. Does not allocate.
    ///
    /// # Errors
    /// [`HandlerError::BAD_REQUEST`] if it is of another type or no valid archive; with `?` the caller learns so.
    #[inline]
    pub fn access<T: RingMessage>(&self) -> Result<&'a T::Archived, HandlerError> {
        if !self.is::<T>() {
            return Err(HandlerError::new(
                HandlerError::BAD_REQUEST,
                "unexpected message type",
            ));
        }
        Ok(T::access(self.ring.payload())?)
    }
}

/// A handler's surroundings: who it is, what it remembers, and the way to answer.
pub struct KernelContext<'a, 'p> {
    pub(crate) block: u32,
    pub(crate) grid: Dim3,
    pub(crate) block_size: Dim3,
    pub(crate) state: &'a mut [u8],
    pub(crate) port: &'a mut ReplyPort<'p>,
    pub(crate) ring: &'a Consumer,
    pub(crate) types: &'a TypeTable,
}

impl fmt::Debug for KernelContext<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelContext")
            .field("kernel", &self.port.signals.name)
            .field("block", &self.block)
            .field("grid", &self.grid)
            .field("block_size", &self.block_size)
            .field("state_bytes", &self.state.len())
            .finish_non_exhaustive()
    }
}

impl KernelContext<'_, '_> {
    /// Name of the kernel instance.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.port.signals.name
    }

    /// Index of this block in the grid, from 0.
    #[inline]
    #[must_use]
    pub fn block_index(&self) -> u32 {
        self.block
    }

    /// The grid as launched.
    #[inline]
    #[must_use]
    pub fn grid_size(&self) -> Dim3 {
        self.grid
    }

    /// The block size as launched. A CPU block is one thread whatever it says.
    #[inline]
    #[must_use]
    pub fn block_size(&self) -> Dim3 {
        self.block_size
    }

    /// Nanoseconds since the Unix epoch; one counter read.
    #[inline]
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        crate::time::now_ns()
    }

    /// This block's own state: the registered number of bytes, zero at launch, 64-byte aligned. Survives
    /// deactivation.
    #[inline]
    pub fn state(&mut self) -> &mut [u8] {
        self.state
    }

    /// The state as a plain-old-data type, from its first byte on.
    ///
    /// # Errors
    /// [`HandlerError`] if the registered state is smaller than `T`, or `T` needs more than 64-byte alignment.
    #[inline]
    pub fn state_as<T: Pod>(&mut self) -> Result<&mut T, HandlerError> {
        self.state
            .get_mut(..size_of::<T>())
            .and_then(|bytes| bytemuck::try_from_bytes_mut(bytes).ok())
            .ok_or_else(|| HandlerError::from("state is too small for its type"))
    }

    /// Answers with a typed message, archived straight into the reply's slot. Waits while the reply ring is full.
    ///
    /// # Errors
    /// [`HandlerError`] if the kernel was not registered for `T`, the archive exceeds the slot, or the kernel is
    /// ending.
    #[inline]
    pub fn reply<T: RingMessage>(&mut self, reply: &T) -> HandlerResult {
        let kind = self.kind_of::<T>()?;
        let mut needs_scratch = false;
        let replied = self.write(kind, |body| {
            let length = reply.encode(body);
            needs_scratch = length == Err(CodecError::Scratch);
            Ok(length?)
        });
        if needs_scratch {
            return self.reply_with_scratch(kind, reply);
        }
        replied
    }

    /// As `reply`, for a type that needs more scratch memory than there is on the stack. The block
    /// has some.
    #[cold]
    fn reply_with_scratch<T: RingMessage>(&mut self, kind: u16, reply: &T) -> HandlerResult {
        let mut encoder = std::mem::take(&mut self.port.encoder);
        let replied = self.write(kind, |body| Ok(encoder.encode(reply, body)?));
        self.port.encoder = encoder;
        replied
    }

    /// Answers with raw bytes. Waits while the reply ring is full.
    ///
    /// # Errors
    /// [`HandlerError`] if the bytes exceed the slot, or the kernel is ending.
    #[inline]
    pub fn reply_bytes(&mut self, payload: &[u8]) -> HandlerResult {
        self.reply_in_place(|body| copy(payload, body))
    }

    /// Answers with raw bytes that `write` puts into the reply's slot, whose length it returns. Waits while the reply
    /// ring is full.
    ///
    /// # Errors
    /// Those of `write`; [`HandlerError`] if the length exceeds the slot, or the kernel is ending.
    #[inline]
    pub fn reply_in_place(
        &mut self,
        write: impl FnOnce(&mut [u8]) -> Result<usize, HandlerError>,
    ) -> HandlerResult {
        self.write(RAW_KIND, write)
    }

    /// Answers with bytes that the handler has archived itself as a `T`; whoever receives them validates them. Waits
    /// while the reply ring is full.
    ///
    /// # Errors
    /// [`HandlerError`] if the kernel was not registered for `T`, the bytes exceed the slot, or the kernel is ending.
    #[inline]
    pub fn reply_as<T: RingMessage>(&mut self, archived: &[u8]) -> HandlerResult {
        let kind = self.kind_of::<T>()?;
        self.write(kind, |body| copy(archived, body))
    }

    /// Answers with the request's own payload, under the request's own type. Waits while the reply ring is full.
    ///
    /// # Errors
    /// [`HandlerError`] if the kernel is ending.
    #[inline]
    pub fn echo(&mut self, request: &Request<'_>) -> HandlerResult {
        let ring = request.ring;
        self.write(ring.header().kind(), |body| copy(ring.payload(), body))
    }

    #[inline]
    fn kind_of<T: RingMessage>(&self) -> Result<u16, HandlerError> {
        self.types
            .kind_of(T::TYPE_ID)
            .map_err(|_| HandlerError::from("reply type is not registered"))
    }

    #[inline]
    fn write(
        &mut self,
        kind: u16,
        write: impl FnOnce(&mut [u8]) -> Result<usize, HandlerError>,
    ) -> HandlerResult {
        let extension = self.ring.extension();
        self.port.reply(
            self.ring.header().reply_head(kind),
            extension.as_ref(),
            write,
        )
    }
}

#[inline]
fn copy(payload: &[u8], body: &mut [u8]) -> Result<usize, HandlerError> {
    body.get_mut(..payload.len())
        .ok_or_else(|| HandlerError::new(HandlerError::REPLY_TOO_LARGE, "reply exceeds the slot"))?
        .copy_from_slice(payload);
    Ok(payload.len())
}
