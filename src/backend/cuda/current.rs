//! Whose context the calling thread's calls are about.

use std::marker::PhantomData;
use std::ptr;

use cudarc::driver::sys::{self, CUcontext, CUstreamCaptureMode};

use super::driver::{CallFailed, check};

/// A context that is the calling thread's as long as this lives; then the one before is it again.
///
/// A graph that another thread of the process captures in global mode forbids most calls to all threads; those here have nothing
/// to do with it, and say so (`cuThreadExchangeStreamCaptureMode`).
#[must_use]
#[derive(Debug)]
pub(super) struct Current {
    /// The thread's own mode, for when it gets its context back.
    capture_mode: CUstreamCaptureMode,
    /// It belongs to the thread.
    _not_send: PhantomData<*const ()>,
}

impl Current {
    pub(super) fn push(context: CUcontext) -> Result<Self, CallFailed> {
        // SAFETY: the context is live.
        check("make a context current", unsafe {
            sys::cuCtxPushCurrent_v2(context)
        })?;
        let mut capture_mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the pointer is to a local.
        unsafe {
            let _ = sys::cuThreadExchangeStreamCaptureMode(&raw mut capture_mode);
        }
        Ok(Self {
            capture_mode,
            _not_send: PhantomData,
        })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped: CUcontext = ptr::null_mut();
        // SAFETY: `push` has pushed one, on this thread, and exchanged the mode.
        unsafe {
            let _ = sys::cuThreadExchangeStreamCaptureMode(&raw mut self.capture_mode);
            let _ = sys::cuCtxPopCurrent_v2(&raw mut popped);
        }
    }
}
