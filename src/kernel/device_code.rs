//! A kernel's code for devices that run C++, and code that all devices run.

use std::borrow::Cow;
use std::fmt;

/// A handler in the language that all GPU preludes define, `RK_HANDLER { .. }`: compiled at launch for CUDA (by NVRTC), for
/// Metal, and with the feature `glsl` for Vulkan.
///
/// ```
/// use ringkernel::{KernelRegistration, PortableCode};
///
/// let double = PortableCode::new("RK_HANDLER { RK_FOR(i, rk_in_words()) { rk_out(i, 2u * rk_in(i)); } rk_reply(rk_in_bytes()); }");
/// let registration = KernelRegistration::new("double").portable(double);
/// # assert_eq!(registration.id(), "double");
/// ```
#[derive(Clone, Debug)]
pub struct PortableCode {
    pub(crate) handler: Cow<'static, str>,
    pub(crate) loop_iterations: Option<u32>,
    pub(crate) replies: u32,
}

impl PortableCode {
    /// The source of a handler. Within the functions of the prelude no index reaches beyond what it
    /// is for; but the compilers behind take more than these functions, and do not confine what
    /// else a source does. It must be the program's own, as any other code that is compiled into
    /// it: never text from elsewhere.
    #[must_use]
    pub fn new(handler: impl Into<Cow<'static, str>>) -> Self {
        Self {
            handler: handler.into(),
            loop_iterations: None,
            replies: 1,
        }
    }

    /// As [`ShaderCode::loop_iterations`](super::ShaderCode::loop_iterations).
    #[must_use]
    pub fn loop_iterations(mut self, iterations: u32) -> Self {
        self.loop_iterations = Some(iterations);
        self
    }

    /// Most replies that one run of the handler writes; it is run when there is room for so many. Default 1.
    #[must_use]
    pub fn replies(mut self, replies: u32) -> Self {
        self.replies = replies;
        self
    }
}

/// A kernel's code for CUDA, built with or compiled behind `kernels/ringkernel.cuh`.
///
/// ```
/// use ringkernel::{CudaCode, KernelRegistration};
///
/// let code = CudaCode::source("RK_HANDLER { rk_out_copy(rk_in_words()); rk_reply(rk_in_bytes()); }");
/// let registration = KernelRegistration::new("mine").cuda(code);
/// # assert_eq!(registration.id(), "mine");
/// ```
#[derive(Clone)]
pub struct CudaCode {
    pub(crate) source: CudaSource,
    pub(crate) loop_iterations: Option<u32>,
    pub(crate) replies: u32,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum CudaSource {
    /// PTX or a cubin: what `cuModuleLoadData` takes.
    Image(Cow<'static, [u8]>),
    /// A handler, to be compiled behind the prelude.
    Handler(Cow<'static, str>),
}

impl fmt::Debug for CudaCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("CudaCode");
        match &self.source {
            CudaSource::Image(bytes) => debug.field("image_bytes", &bytes.len()),
            CudaSource::Handler(text) => debug.field("handler_bytes", &text.len()),
        }
        .field("replies", &self.replies)
        .finish()
    }
}

impl CudaCode {
    /// PTX text that was built with `kernels/ringkernel.cuh`; the driver compiles it at launch.
    ///
    /// # Safety
    /// What the driver takes runs on the device, and can write to this process's memory: it must
    /// have been compiled from a source behind that prelude, and access no memory but what the
    /// prelude's accessors give it or it allocates itself, whatever messages it is sent.
    #[must_use]
    pub unsafe fn ptx(text: impl Into<Cow<'static, [u8]>>) -> Self {
        Self::from_source(CudaSource::Image(text.into()))
    }

    /// A cubin that was built with `kernels/ringkernel.cuh`, for the device's very architecture.
    ///
    /// # Safety
    /// As for [`ptx`](Self::ptx).
    #[must_use]
    pub unsafe fn cubin(image: impl Into<Cow<'static, [u8]>>) -> Self {
        Self::from_source(CudaSource::Image(image.into()))
    }

    /// The source of a handler, portable or in CUDA C++, which NVRTC compiles behind `kernels/ringkernel.cuh` at launch. An error
    /// there is [`Error::Compile`](crate::Error::Compile) with the compiler's log, whose line numbers are those of this
    /// source. As for [`PortableCode::new`], the source must be the program's own.
    #[must_use]
    pub fn source(handler: impl Into<Cow<'static, str>>) -> Self {
        Self::from_source(CudaSource::Handler(handler.into()))
    }

    fn from_source(source: CudaSource) -> Self {
        Self {
            source,
            loop_iterations: None,
            replies: 1,
        }
    }

    /// Loop iterations that one run of the handler is charged with, on devices whose launches are sliced because the driver has a
    /// watchdog. Default: enough for five loops over the largest message.
    #[must_use]
    pub fn loop_iterations(mut self, iterations: u32) -> Self {
        self.loop_iterations = Some(iterations);
        self
    }

    /// Most replies that one run of the handler writes; it is run when there is room for so many. Default 1.
    #[must_use]
    pub fn replies(mut self, replies: u32) -> Self {
        self.replies = replies;
        self
    }
}

/// A kernel's code for Metal, compiled at launch behind `kernels/ringkernel.metal`.
///
/// ```
/// use ringkernel::{KernelRegistration, MetalCode};
///
/// let code = MetalCode::source("RK_HANDLER { rk_out_copy(rk_in_words()); rk_reply(rk_in_bytes()); }");
/// let registration = KernelRegistration::new("mine").metal(code);
/// # assert_eq!(registration.id(), "mine");
/// ```
#[derive(Clone)]
pub struct MetalCode {
    pub(crate) handler: Cow<'static, str>,
    pub(crate) loop_iterations: Option<u32>,
    pub(crate) replies: u32,
}

impl fmt::Debug for MetalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetalCode")
            .field("handler_bytes", &self.handler.len())
            .field("replies", &self.replies)
            .finish()
    }
}

impl MetalCode {
    /// The source of a handler, portable or in the Metal Shading Language, which the system
    /// compiles at launch. An error there is [`Error::Compile`](crate::Error::Compile) with the
    /// compiler's log, whose line numbers are those of this source. As for [`PortableCode::new`],
    /// the source must be the program's own.
    #[must_use]
    pub fn source(handler: impl Into<Cow<'static, str>>) -> Self {
        Self {
            handler: handler.into(),
            loop_iterations: None,
            replies: 1,
        }
    }

    /// Loop iterations that one run of the handler is charged with: slices end by what they were charged. Default: enough for five
    /// loops over the largest message.
    #[must_use]
    pub fn loop_iterations(mut self, iterations: u32) -> Self {
        self.loop_iterations = Some(iterations);
        self
    }

    /// Most replies that one run of the handler writes; it is run when there is room for so many. Default 1.
    #[must_use]
    pub fn replies(mut self, replies: u32) -> Self {
        self.replies = replies;
        self
    }
}

impl From<&PortableCode> for MetalCode {
    fn from(code: &PortableCode) -> Self {
        Self {
            handler: code.handler.clone(),
            loop_iterations: code.loop_iterations,
            replies: code.replies,
        }
    }
}

impl From<&PortableCode> for CudaCode {
    fn from(code: &PortableCode) -> Self {
        Self {
            source: CudaSource::Handler(code.handler.clone()),
            loop_iterations: code.loop_iterations,
            replies: code.replies,
        }
    }
}
