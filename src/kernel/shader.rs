//! A kernel's code for devices that run shaders.

use std::borrow::Cow;
use std::fmt;

/// A kernel's code for Vulkan: a shader built with `shaders/ringkernel.glsl`, and what it needs.
///
/// ```
/// use ringkernel::{KernelRegistration, ShaderCode};
///
/// // Built by: glslangValidator -V --target-env vulkan1.1 -Ishaders -o echo.spv echo.comp
/// static SPIRV: &[u8] = include_bytes!("../../shaders/echo.spv");
/// // SAFETY: the module is what the compiler made of our source, which uses the prelude's
/// // accessors alone.
/// let code = unsafe { ShaderCode::spirv(SPIRV) };
/// let registration = KernelRegistration::new("mine").shader(code);
/// # assert_eq!(registration.id(), "mine");
/// ```
#[derive(Clone)]
pub struct ShaderCode {
    pub(crate) source: ShaderSource,
    /// The module of the same kernel that can be traced.
    traced: Option<ShaderSource>,
    pub(crate) loop_iterations: Option<u32>,
    pub(crate) replies: u32,
}

#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) enum ShaderSource {
    /// A module, as bytes.
    Spirv(Cow<'static, [u8]>),
    /// A handler, to be compiled behind the prelude.
    #[cfg(feature = "glsl")]
    Glsl(Cow<'static, str>),
}

impl fmt::Debug for ShaderCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("ShaderCode");
        match &self.source {
            ShaderSource::Spirv(bytes) => debug.field("spirv_bytes", &bytes.len()),
            #[cfg(feature = "glsl")]
            ShaderSource::Glsl(text) => debug.field("glsl_bytes", &text.len()),
        }
        .field("traced", &self.traced.is_some())
        .field("loop_iterations", &self.loop_iterations)
        .field("replies", &self.replies)
        .finish()
    }
}

impl ShaderCode {
    /// The text of `shaders/ringkernel.glsl`, for programs that compile their shaders in a build script: write it to a file
    /// beside them and include it.
    pub const PRELUDE: &str = include_str!("../../shaders/ringkernel.glsl");

    /// A SPIR-V module that was built with `shaders/ringkernel.glsl`. At launch its header, its
    /// entry point, its layout and what it needs of the device are checked, and
    /// [`Error::InvalidCode`](crate::Error::InvalidCode) says what is wrong. It is not validated.
    ///
    /// # Safety
    /// A module that passes these checks must be valid SPIR-V for Vulkan 1.1, as `spirv-val
    /// --target-env vulkan1.1` finds, and its code must access no memory beyond its arrays and
    /// buffers, whatever messages it is sent: the prelude's accessors see to that. Drivers trust
    /// modules: one that is not valid can crash the process, or worse.
    #[must_use]
    pub unsafe fn spirv(module: impl Into<Cow<'static, [u8]>>) -> Self {
        Self::from_source(ShaderSource::Spirv(module.into()))
    }

    /// The source of a handler, `RK_HANDLER { ... }`, which is compiled behind
    /// `shaders/ringkernel.glsl` at launch. An error there is
    /// [`Error::Compile`](crate::Error::Compile) with the compiler's log, whose line numbers are
    /// those of this source. As for [`PortableCode::new`](super::PortableCode::new), the source
    /// must be the program's own.
    #[cfg(feature = "glsl")]
    #[must_use]
    pub fn glsl(handler: impl Into<Cow<'static, str>>) -> Self {
        Self::from_source(ShaderSource::Glsl(handler.into()))
    }

    /// The same kernel built with `-DRK_TRACES` beside: the module that is taken where
    /// [`LaunchOptions::trace_every`](crate::LaunchOptions::trace_every) asks for traces and the device's shaders can read a clock. A kernel
    /// without is not traced on Vulkan; one in GLSL needs none.
    ///
    /// # Safety
    /// As for [`spirv`](Self::spirv).
    #[must_use]
    pub unsafe fn traced(mut self, module: impl Into<Cow<'static, [u8]>>) -> Self {
        self.traced = Some(ShaderSource::Spirv(module.into()));
        self
    }

    /// What is run if messages are traced; nothing if they cannot be.
    #[cfg(feature = "vulkan")]
    pub(crate) fn traced_source(&self) -> Option<&ShaderSource> {
        match &self.source {
            #[cfg(feature = "glsl")]
            ShaderSource::Glsl(_) => Some(&self.source),
            ShaderSource::Spirv(_) => self.traced.as_ref(),
        }
    }

    fn from_source(source: ShaderSource) -> Self {
        Self {
            source,
            traced: None,
            loop_iterations: None,
            replies: 1,
        }
    }

    /// Most iterations of loops, of all together, in one run of the handler by one invocation. Some drivers end a
    /// dispatch's loops silently after 65 535 iterations in all: a slice ends before. A run that exceeds what is
    /// declared and so meets that limit fails the kernel. Default: enough for five loops over the largest message,
    /// shared by the block's threads (`RK_FOR`).
    #[must_use]
    pub fn loop_iterations(mut self, iterations: u32) -> Self {
        self.loop_iterations = Some(iterations);
        self
    }

    /// Most replies that one run of the handler writes; it is run when there is room for so many. Default 1. A handler
    /// that needs more asks to be run again for the same request, by `rk_again()`.
    #[must_use]
    pub fn replies(mut self, replies: u32) -> Self {
        self.replies = replies;
        self
    }
}

#[cfg(feature = "glsl")]
impl From<&super::PortableCode> for ShaderCode {
    fn from(code: &super::PortableCode) -> Self {
        Self {
            source: ShaderSource::Glsl(code.handler.clone()),
            traced: None,
            loop_iterations: code.loop_iterations,
            replies: code.replies,
        }
    }
}
