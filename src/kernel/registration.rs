//! What must be known of a kernel before it can be launched.

use std::fmt;
use std::sync::Arc;

use super::device_code::{CudaCode, MetalCode, PortableCode};
use super::handler::{CpuHandler, HandlerResult, KernelContext, Request};
use super::shader::ShaderCode;
use super::types::TypeTable;
use crate::error::{Error, HandlerError};
use crate::message::RingMessage;

/// Most state that a block may have: a tebibyte, beyond any device and far from any overflow.
const MAX_STATE_BYTES: u64 = 1 << 40;

/// A kernel: its id, the messages it speaks, the memory it needs, and its code.
///
/// ```
/// use ringkernel::KernelRegistration;
///
/// let registration = KernelRegistration::new("sum").state_size(8).cpu_handler(|request, context| {
///     let state = context.state_as::<u64>()?;
///     *state += request.payload().len() as u64;
///     let sum = *state;
///     context.reply_bytes(&sum.to_ne_bytes())
/// });
/// # assert_eq!(registration.id(), "sum");
/// ```
#[derive(Clone)]
pub struct KernelRegistration {
    id: String,
    types: Vec<DeclaredType>,
    any_type: bool,
    largest_message: Option<usize>,
    queue_capacity: Option<usize>,
    state_size: usize,
    cpu_handler: Option<Arc<dyn CpuHandler>>,
    shader: Option<Arc<ShaderCode>>,
    cuda: Option<Arc<CudaCode>>,
    metal: Option<Arc<MetalCode>>,
    portable: Option<PortableCode>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DeclaredType {
    id: u64,
    archived_bytes: usize,
}

impl fmt::Debug for KernelRegistration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelRegistration")
            .field("id", &self.id)
            .field("types", &self.types)
            .field("any_type", &self.any_type)
            .field("largest_message", &self.largest_message)
            .field("queue_capacity", &self.queue_capacity)
            .field("state_size", &self.state_size)
            .field("cpu_handler", &self.cpu_handler.is_some())
            .field("shader", &self.shader)
            .field("cuda", &self.cuda)
            .field("metal", &self.metal)
            .field("portable", &self.portable.is_some())
            .finish()
    }
}

impl KernelRegistration {
    /// A kernel of this id, which must not be empty, without types, state or code. Raw bytes it always takes.
    #[must_use]
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            types: Vec::new(),
            any_type: false,
            largest_message: None,
            queue_capacity: None,
            state_size: 0,
            cpu_handler: None,
            shader: None,
            cuda: None,
            metal: None,
            portable: None,
        }
    }

    /// Declares a message type that the kernel takes or gives. At most 64 different ones.
    #[must_use]
    pub fn message<T: RingMessage>(mut self) -> Self {
        let declared = DeclaredType {
            id: T::TYPE_ID,
            archived_bytes: size_of::<T::Archived>(),
        };
        if !self.types.contains(&declared) {
            self.types.push(declared);
        }
        self
    }

    /// Lets the kernel take messages of any type, up to 64 different ones; for kernels that do not look inside.
    #[must_use]
    pub fn any_message(mut self) -> Self {
        self.any_type = true;
        self
    }

    /// Largest payload in bytes, of requests and replies. Without it, the largest archived size of the declared types
    /// counts (enough for types of fixed size), and without types `RuntimeConfig::default_message_size`.
    #[must_use]
    pub fn largest_message(mut self, bytes: usize) -> Self {
        self.largest_message = Some(bytes);
        self
    }

    /// Slots of each ring, for kernels whose messages are so large that `RuntimeConfig::default_queue_capacity` would
    /// waste memory.
    #[must_use]
    pub fn queue_capacity(mut self, slots: usize) -> Self {
        self.queue_capacity = Some(slots);
        self
    }

    /// Bytes of state of each block, zero at launch; 2^40 at most.
    #[must_use]
    pub fn state_size(mut self, bytes: usize) -> Self {
        self.state_size = bytes;
        self
    }

    /// The kernel's code on the CPU.
    #[must_use]
    pub fn cpu_handler<F>(mut self, handler: F) -> Self
    where
        F: Fn(&Request<'_>, &mut KernelContext<'_, '_>) -> HandlerResult + Send + Sync + 'static,
    {
        self.cpu_handler = Some(Arc::new(handler));
        self
    }

    /// The kernel's code on the CPU as a function from one message type to another, both of which it declares.
    ///
    /// ```
    /// # use rkyv::{Archive, Deserialize, Serialize};
    /// use ringkernel::KernelRegistration;
    ///
    /// #[derive(Archive, Serialize, Deserialize)]
    /// struct Square { of: i64 }
    /// ringkernel::ring_message!(Square, "example.Square.v1");
    ///
    /// let registration = KernelRegistration::new("square")
    ///     .typed_cpu_handler::<Square, Square, _>(|request, _| Ok(Square { of: request.of * request.of }));
    /// ```
    #[must_use]
    pub fn typed_cpu_handler<Req, Resp, F>(self, handler: F) -> Self
    where
        Req: RingMessage,
        Resp: RingMessage,
        F: Fn(&Req::Archived, &mut KernelContext<'_, '_>) -> Result<Resp, HandlerError>
            + Send
            + Sync
            + 'static,
    {
        self.message::<Req>()
            .message::<Resp>()
            .cpu_handler(move |request, context| {
                let reply = handler(request.access::<Req>()?, context)?;
                context.reply(&reply)
            })
    }

    /// The kernel's code on Vulkan devices.
    #[must_use]
    pub fn shader(mut self, code: ShaderCode) -> Self {
        self.shader = Some(Arc::new(code));
        self
    }

    /// The kernel's code on CUDA devices.
    #[must_use]
    pub fn cuda(mut self, code: CudaCode) -> Self {
        self.cuda = Some(Arc::new(code));
        self
    }

    /// The kernel's code on Metal devices.
    #[must_use]
    pub fn metal(mut self, code: MetalCode) -> Self {
        self.metal = Some(Arc::new(code));
        self
    }

    /// The kernel's code on every device that has none of its own by [`cuda`](Self::cuda), [`metal`](Self::metal) or
    /// [`shader`](Self::shader), compiled at launch. For Vulkan this needs the feature `glsl`.
    #[must_use]
    pub fn portable(mut self, code: PortableCode) -> Self {
        self.portable = Some(code);
        self
    }

    /// The kernel's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Largest payload as declared, or as the declared types imply.
    pub(crate) fn message_size(&self) -> Option<usize> {
        self.largest_message.or_else(|| {
            self.types
                .iter()
                .map(|declared| declared.archived_bytes)
                .max()
        })
    }

    pub(crate) fn capacity(&self) -> Option<usize> {
        self.queue_capacity
    }

    pub(crate) fn state_bytes(&self) -> usize {
        self.state_size
    }

    pub(crate) fn handler(&self) -> Option<&Arc<dyn CpuHandler>> {
        self.cpu_handler.as_ref()
    }

    pub(crate) fn shader_code(&self) -> Option<Arc<ShaderCode>> {
        #[cfg(feature = "glsl")]
        if self.shader.is_none()
            && let Some(portable) = &self.portable
        {
            return Some(Arc::new(ShaderCode::from(portable)));
        }
        self.shader.clone()
    }

    pub(crate) fn cuda_code(&self) -> Option<Arc<CudaCode>> {
        match (&self.cuda, &self.portable) {
            (None, Some(portable)) => Some(Arc::new(CudaCode::from(portable))),
            (own, _) => own.clone(),
        }
    }

    pub(crate) fn metal_code(&self) -> Option<Arc<MetalCode>> {
        match (&self.metal, &self.portable) {
            (None, Some(portable)) => Some(Arc::new(MetalCode::from(portable))),
            (own, _) => own.clone(),
        }
    }

    pub(crate) fn type_table(&self) -> TypeTable {
        let ids: Vec<u64> = self.types.iter().map(|declared| declared.id).collect();
        TypeTable::new(&ids, self.any_type)
    }

    /// Fails if the registration cannot be launched anywhere.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        let invalid = |option, reason| Err(Error::InvalidOption { option, reason });
        if self.id.is_empty() {
            return invalid("kernel id", "it is empty".into());
        }
        if self.id.contains('\0') {
            return invalid("kernel id", "it contains a NUL byte".into());
        }
        if self.state_size as u64 > MAX_STATE_BYTES {
            return invalid(
                "state size",
                format!("{} bytes exceed {MAX_STATE_BYTES}", self.state_size),
            );
        }
        if self.types.len() > TypeTable::MAX_TYPES {
            return invalid(
                "message types",
                format!(
                    "kernel '{}' declares {}, at most {} fit",
                    self.id,
                    self.types.len(),
                    TypeTable::MAX_TYPES
                ),
            );
        }
        Ok(())
    }
}
