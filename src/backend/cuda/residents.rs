//! What runs on a device in this process, and what was taken of the driver for it.

use std::collections::BTreeMap;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUstream, CUstream_flags};
use parking_lot::Mutex;

use super::arena::{Arena, NotTaken};
use super::current::Current;
use super::driver::check;
use super::module::Module;
use crate::process::PerProcess;

/// What runs on a device in this process, whose runtimes share its one primary context. Locked during everything that would
/// wait for running kernels.
#[derive(Debug, Default)]
pub(super) struct Residents {
    pub(super) kernels: Vec<Shape>,
    /// What runtimes left that ended while kernels of others ran.
    pub(super) remains: Vec<Remains>,
    /// Why nothing can be taken or given back any more: a kernel that never ends.
    pub(super) abandoned: Option<String>,
}

/// What a kernel takes of the multiprocessors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) blocks: u32,
    pub(super) threads: u32,
    /// Blocks of it that one multiprocessor holds, alone.
    pub(super) each: u32,
}

impl Residents {
    pub(super) fn of(device: CUdevice) -> Arc<Mutex<Self>> {
        static ALL: PerProcess<Mutex<BTreeMap<CUdevice, Arc<Mutex<Residents>>>>> =
            PerProcess::new(|| Mutex::new(BTreeMap::new()));
        Arc::clone(ALL.get().lock().entry(device).or_default())
    }

    /// How many more blocks of a shape are certain to be resident at once. Blocks of another shape may each lie on a
    /// multiprocessor of its own, of which then nothing is counted.
    pub(super) fn room(&self, shape: Shape, multiprocessors: u32) -> u32 {
        let (mut alike, mut others) = (0, 0);
        for kernel in &self.kernels {
            if (kernel.threads, kernel.each) == (shape.threads, shape.each) {
                alike += kernel.blocks;
            } else {
                others += kernel.blocks;
            }
        }
        let room = multiprocessors
            .saturating_sub(others)
            .saturating_mul(shape.each);
        room.saturating_sub(alike)
    }
}

/// What an open device took of the driver.
#[derive(Debug)]
pub(super) struct Remains {
    pub(super) device: CUdevice,
    pub(super) raw: CUcontext,
    pub(super) streams: Vec<CUstream>,
    pub(super) modules: Vec<Arc<Module>>,
    pub(super) host: Arena,
    pub(super) state: Arena,
    pub(super) bar: Option<Arena>,
}

// SAFETY: handles of the driver, which may be used by any thread that makes the context current.
unsafe impl Send for Remains {}

impl Remains {
    /// Takes what must be there before a kernel runs: memory, and a stream for each.
    pub(super) fn take(&mut self, kernels: usize) -> Result<(), NotTaken> {
        let _current = Current::push(self.raw)?;
        self.host.grow(0)?;
        self.state.grow(0)?;
        if let Some(bar) = &mut self.bar {
            bar.grow(0)?;
        }
        for _ in 0..kernels {
            let mut stream: CUstream = ptr::null_mut();
            let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: the context is current; the pointer is to a local.
            check("make a stream", unsafe {
                sys::cuStreamCreate(&raw mut stream, flags)
            })?;
            self.streams.push(stream);
        }
        Ok(())
    }

    /// Gives everything back.
    ///
    /// # Safety
    /// No kernel that uses any of it may run, nor any other kernel on the device: the calls would wait for it.
    pub(super) unsafe fn free(mut self) {
        let current = Current::push(self.raw);
        // SAFETY: the caller's promise; each is given back once. A lost context refuses, which is no loss.
        unsafe {
            for module in self.modules {
                module.unload();
            }
            for stream in self.streams {
                let _ = sys::cuStreamDestroy_v2(stream);
            }
            self.host.free();
            self.state.free();
            if let Some(bar) = &mut self.bar {
                bar.free();
            }
            drop(current);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
