//! A kernel's code on a device.

use std::ffi::{CStr, c_int};
use std::ptr;

use cudarc::driver::sys::{self, CUfunction, CUfunction_attribute, CUlimit, CUmodule, CUresult};

use super::context::Context;
use super::driver::{CallFailed, check};
use super::nvrtc;
use crate::error::Error;
use crate::kernel::CudaSource;
use crate::logging;

/// What the prelude says by its name: the layout that it was built for.
const LAYOUT: &CStr = c"rk_layout_3";

/// A loaded module and its one kernel.
#[derive(Debug)]
pub(super) struct Module {
    raw: CUmodule,
    pub(super) function: CUfunction,
    /// Most threads of a block of it.
    pub(super) max_threads: u32,
}

// SAFETY: handles of the driver, which may be used by any thread that makes the context current.
unsafe impl Send for Module {}
// SAFETY: as above; nothing changes after it was loaded.
unsafe impl Sync for Module {}

impl Module {
    /// Compiles what is source, and loads the module and its function: nothing is left to be loaded at a launch. The context must be
    /// current, and no kernel may run.
    pub(super) fn load(
        context: &Context,
        kernel: &str,
        source: &CudaSource,
    ) -> Result<Self, Error> {
        // Text must end with a zero; behind a cubin one more byte does no harm.
        let image = match source {
            CudaSource::Image(bytes) => bytes.iter().copied().chain([0]).collect(),
            CudaSource::Handler(text) => nvrtc::compile(kernel, text, context.physical.capability)?,
        };
        let mut raw: CUmodule = ptr::null_mut();
        // SAFETY: the context is current; the image is zero-terminated; there are no options.
        let loaded = check("load a module", unsafe {
            sys::cuModuleLoadDataEx(
                &raw mut raw,
                image.as_ptr().cast(),
                0,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        });
        loaded.or_else(|error| refuse(context, kernel, error))?;
        // From here on, `unload` undoes it.
        let mut module = Self {
            raw,
            function: ptr::null_mut(),
            max_threads: 0,
        };
        match module.look_up(context, kernel) {
            Ok(()) => Ok(module),
            Err(error) => {
                // SAFETY: the context is current, nothing of the module runs.
                unsafe { module.unload() };
                Err(error)
            }
        }
    }

    fn look_up(&mut self, context: &Context, kernel: &str) -> Result<(), Error> {
        let invalid = |reason: String| Error::InvalidCode {
            kernel: kernel.to_owned(),
            reason,
        };
        // SAFETY: the module is live; the names are zero-terminated; the pointers are to locals and fields.
        unsafe {
            let found =
                sys::cuModuleGetFunction(&raw mut self.function, self.raw, c"rk_main".as_ptr());
            if found == CUresult::CUDA_ERROR_NOT_FOUND {
                return Err(invalid("it has no kernel `rk_main`".into()));
            }
            context.check(check("look a kernel up", found))?;
            let mut layout: CUfunction = ptr::null_mut();
            let found = sys::cuModuleGetFunction(&raw mut layout, self.raw, LAYOUT.as_ptr());
            if found == CUresult::CUDA_ERROR_NOT_FOUND {
                return Err(invalid(format!(
                    "it has no `{}`: it was not built with the kernels/ringkernel.cuh of this version",
                    LAYOUT.to_string_lossy()
                )));
            }
            context.check(check("look a kernel up", found))?;
            let mut threads: c_int = 0;
            context.check(check(
                "describe a kernel",
                sys::cuFuncGetAttribute(
                    &raw mut threads,
                    CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
                    self.function,
                ),
            ))?;
            self.max_threads = u32::try_from(threads).unwrap_or(0);
        }
        self.reserve_local_memory(context)
    }

    /// Makes the driver take, now that nothing runs, the local memory that the kernel needs: a launch that needs more than there is
    /// waits for every kernel that runs (CUDA Driver API, `cuCtxSetLimit`, `CU_LIMIT_STACK_SIZE`).
    fn reserve_local_memory(&self, context: &Context) -> Result<(), Error> {
        let (mut needed, mut there): (c_int, usize) = (0, 0);
        let limit = CUlimit::CU_LIMIT_STACK_SIZE;
        // SAFETY: the context is current, the function is live; the pointers are to locals.
        unsafe {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES;
            let told = sys::cuFuncGetAttribute(&raw mut needed, attribute, self.function);
            context.check(check("describe a kernel", told))?;
            let told = sys::cuCtxGetLimit(&raw mut there, limit);
            context.check(check("tell a limit", told))?;
            let needed = usize::try_from(needed).unwrap_or(0);
            if needed > there {
                let raised = sys::cuCtxSetLimit(limit, needed);
                context.check(check("take local memory", raised))?;
            }
        }
        Ok(())
    }

    /// How many blocks of so many threads one multiprocessor holds at once.
    pub(super) fn blocks_each(&self, context: &Context, threads: u32) -> Result<u32, Error> {
        let mut blocks: c_int = 0;
        // SAFETY: the context is current, the function is live; the pointer is to a local.
        context.check(check("tell how many blocks fit", unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &raw mut blocks,
                self.function,
                threads as c_int,
                0,
            )
        }))?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    /// # Safety
    /// The context must be current, and nothing of the module may run any more. To be called once.
    pub(super) unsafe fn unload(&self) {
        // SAFETY: the caller's promise.
        if let Err(error) = check("unload a module", unsafe { sys::cuModuleUnload(self.raw) }) {
            logging::debug!("{error}");
        }
    }
}

/// What it means that a module is not loaded: nearly every answer is about the module alone.
fn refuse(context: &Context, kernel: &str, error: CallFailed) -> Result<(), Error> {
    if error.is_sticky() {
        return context.check(Err(error));
    }
    Err(Error::InvalidCode {
        kernel: kernel.to_owned(),
        reason: error.to_string(),
    })
}
