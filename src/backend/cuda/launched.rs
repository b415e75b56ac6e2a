//! A launched kernel.

use std::ffi::c_void;
use std::fmt;
use std::ops::Deref;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{self, CUdeviceptr, CUevent, CUevent_flags, CUresult, CUstream};
use parking_lot::Mutex;

use super::context::{Buffer, Context, Residency};
use super::driver::{CallFailed, check};
use super::module::Module;
use crate::backend::cpp::LaunchWords;
use crate::backend::{DeviceMemory, DispatchRequest, GridMemory, Next, Resident};
use crate::error::Error;
use crate::kernel::NextRing;
use crate::kernel::outlet::Warden;

/// Slices that are launched at once: one more than runs.
const SLICES: usize = 2;

/// A kernel on a device.
pub(super) struct Launched {
    resident: Resident,
    context: Arc<Context>,
    module: Arc<Module>,
    stream: CUstream,
    /// On a device with a watchdog, one for each slice that may be in flight.
    events: Vec<CUevent>,
    words: LaunchWords,
    threads: u32,
    /// Keeps the device's side of the memory, whose addresses the kernel was given.
    grid: Arc<GridMemory>,
    /// Given back when the kernel has ended.
    residency: Mutex<Option<Residency>>,
    /// Whether a slice was launched already: the first one zeroes the state.
    launched: AtomicBool,
    /// Where its replies go, if into another kernel's ring.
    way: Mutex<Option<Way>>,
}

/// A way into another kernel's ring, whose memory it keeps.
#[derive(Debug)]
struct Way {
    next: Next,
    /// The number of the command to leave it, once that was given.
    leaving: Option<u32>,
}

impl Way {
    fn ring(&self) -> NextRing {
        let grid = &self.next.block.grid;
        let layout = grid.layout;
        NextRing {
            slots: address(Some(&grid.host_to_device)),
            cursor: address(Some(&grid.device_to_host)) + layout.cursor() as u64,
            capacity: layout.ring.capacity(),
            slot_words: (layout.ring.stride() / 4) as u32,
            offset: self.next.offset,
        }
    }
}

// SAFETY: handles of the driver, which may be used by any thread that makes the context current, as the monitor does.
unsafe impl Send for Launched {}
// SAFETY: as above; nothing changes after the launch but what is behind locks and atomics.
unsafe impl Sync for Launched {}

impl fmt::Debug for Launched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launched")
            .field("name", &self.signals.name)
            .field("finished", &self.is_finished())
            .finish_non_exhaustive()
    }
}

impl Deref for Launched {
    type Target = Resident;

    fn deref(&self) -> &Resident {
        &self.resident
    }
}

/// Where the device sees a piece of a kernel's memory; 0 if there is none.
fn address(memory: Option<&Arc<dyn DeviceMemory>>) -> CUdeviceptr {
    memory
        .and_then(|memory| memory.as_any().downcast_ref::<Buffer>())
        .map_or(0, Buffer::device)
}

impl Launched {
    /// Launches a kernel, or on a device with a watchdog prepares its slices. The context must be current.
    pub(super) fn new(
        context: &Arc<Context>,
        request: DispatchRequest,
        module: Arc<Module>,
        words: LaunchWords,
        threads: u32,
        grid: Arc<GridMemory>,
        residency: Residency,
    ) -> Result<Arc<Self>, Error> {
        let sliced = context.physical.watchdog;
        let stream = context.take_stream()?;
        // From here on, dropping the kernel undoes whatever was done.
        let mut kernel = Self {
            resident: Resident::new(request),
            context: Arc::clone(context),
            module,
            stream,
            events: Vec::new(),
            words,
            threads,
            grid,
            residency: Mutex::new(Some(residency)),
            launched: AtomicBool::new(false),
            way: Mutex::new(None),
        };
        if sliced {
            for _ in 0..SLICES {
                let mut event: CUevent = ptr::null_mut();
                let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: the context is current; the pointer is to a local.
                context.check(check("make an event", unsafe {
                    sys::cuEventCreate(&raw mut event, flags)
                }))?;
                kernel.events.push(event);
            }
        } else {
            context.check(kernel.launch())?;
        }
        Ok(Arc::new(kernel))
    }

    pub(super) fn is_sliced(&self) -> bool {
        !self.events.is_empty()
    }

    pub(super) fn slices(&self) -> usize {
        self.events.len()
    }

    fn launch(&self) -> Result<(), CallFailed> {
        let mut words = self.words;
        words.fresh = u32::from(!self.launched.load(Ordering::Relaxed));
        let mut pointers = [
            address(Some(&self.grid.host_to_device)),
            address(Some(&self.grid.device_to_host)),
            address(self.grid.state.as_ref()),
        ];
        let [requests, replies, state] = &mut pointers;
        let mut arguments: [*mut c_void; 4] = [
            (&raw mut words).cast(),
            (&raw mut *requests).cast(),
            (&raw mut *replies).cast(),
            (&raw mut *state).cast(),
        ];
        // SAFETY: the context is current; the arguments are those of `rk_main`, and copied by the call; the memory they name is
        // held by `self` until the kernel has ended.
        check("launch a kernel", unsafe {
            sys::cuLaunchKernel(
                self.module.function,
                self.blocks.len() as u32,
                1,
                1,
                self.threads,
                1,
                1,
                0,
                self.stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        })?;
        self.launched.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Launches a slice, and marks its end by the event of this index. The context must be current.
    pub(super) fn launch_slice(&self, index: usize) -> Result<(), CallFailed> {
        self.launch()?;
        let event = self.events.get(index).copied().unwrap_or(ptr::null_mut());
        // SAFETY: event and stream are the kernel's own.
        check("record an event", unsafe {
            sys::cuEventRecord(event, self.stream)
        })
    }

    /// Whether the slice of this index is done. The context must be current.
    pub(super) fn query_slice(&self, index: usize) -> CUresult {
        let event = self.events.get(index).copied().unwrap_or(ptr::null_mut());
        // SAFETY: the event is the kernel's own.
        unsafe { sys::cuEventQuery(event) }
    }

    /// Whether everything that was launched is done. The context must be current.
    pub(super) fn query(&self) -> CUresult {
        // SAFETY: the stream is the kernel's own.
        unsafe { sys::cuStreamQuery(self.stream) }
    }

    /// Leads replies to where they are to go now, as far as that can be done at once: a kernel that `runs` must follow. Whether it is
    /// to be looked at again soon.
    pub(super) fn exchange(&self, warden: Arc<dyn Warden>, runs: bool) -> bool {
        let Some(block) = self.blocks.first() else {
            return false;
        };
        let control = block.control();
        let mut present = self.way.lock();
        if let Some(way) = &mut *present {
            let wanted = self.wants_exchange();
            if !wanted && way.leaving.is_none() {
                return false;
            }
            let number = *way.leaving.get_or_insert_with(|| control.set_way(None));
            if runs && control.way_taken() != number {
                return true;
            }
            if !wanted {
                // It is to stay after all.
                way.leaving = None;
                control.set_way(Some(way.ring()));
                return false;
            }
            self.give_back();
            *present = None;
        }
        if let Some(next) = self.take_outlet(Arc::clone(block), warden) {
            let way = present.insert(Way {
                next,
                leaving: None,
            });
            control.set_way(Some(way.ring()));
        }
        false
    }

    /// Brings back what it writes to. Nothing of it may run any more.
    fn stop_passing(&self) {
        self.give_back();
        self.way.lock().take();
    }

    /// Lets go of a kernel of which nothing runs any more (or, of an abandoned device, never will end), and says so.
    pub(super) fn finish(kernel: Arc<Self>) {
        kernel.stop_passing();
        let residency = kernel.residency.lock().take();
        if kernel.context.is_abandoned() {
            // It still runs.
            std::mem::forget(residency);
        } else {
            // Before anybody hears of the end, and takes what needs it.
            drop(residency);
        }
        let end = kernel.end();
        drop(kernel);
        end.set();
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        if self.context.is_abandoned() {
            return;
        }
        // Nothing of the kernel runs: its monitor held it until then.
        let Ok(_current) = self.context.enter_anyway() else {
            return;
        };
        for event in self.events.drain(..) {
            // SAFETY: made by `new`, destroyed once.
            unsafe {
                let _ = sys::cuEventDestroy_v2(event);
            }
        }
        self.context.give_stream_back(self.stream);
    }
}
