//! An open CUDA device: its context, memory, streams and modules, and whether it is lost.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::{self, CUcontext, CUresult, CUstream};
use parking_lot::Mutex;

use super::arena::{Arena, NotTaken, Piece, Place};
use super::bar::Bar;
use super::current::Current;
use super::driver::{CallFailed, check};
use super::module::Module;
use super::physical::Physical;
use super::residents::{Remains, Residents, Shape};
use super::unavailable;
use crate::backend::{Account, CudaConfig, CudaRingMemory, DeviceMemory, Placement};
use crate::error::Error;
use crate::kernel::CudaSource;
use crate::logging;
use crate::ring::WriteCombining;

/// An open device.
pub(super) struct Context {
    pub(super) physical: Physical,
    pub(super) account: Arc<Account>,
    raw: CUcontext,
    /// Streams for kernels, made before any runs.
    streams: Mutex<Vec<CUstream>>,
    memory: Mutex<Memory>,
    modules: Mutex<HashMap<CudaSource, Arc<Module>>>,
    /// What runs on the device, of all runtimes of the process.
    residents: Arc<Mutex<Residents>>,
    lost: OnceLock<String>,
    /// Whether request rings lie in `Memory::bar`, and whether they may as well lie in the host's memory.
    rings_on_device: AtomicBool,
    rings_anywhere: bool,
    /// Whether a kernel is left on it that never ended.
    abandoned: AtomicBool,
}

// SAFETY: the handles are the driver's, which may be used by any thread that makes the context current; each call here does.
unsafe impl Send for Context {}
// SAFETY: as above; what changes is behind locks.
unsafe impl Sync for Context {}

/// The arenas of a device.
#[derive(Debug)]
struct Memory {
    host: Arena,
    device: Arena,
    /// The device's memory that the host maps, where there is some and it is used.
    bar: Option<Arena>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Host,
    Device,
    Bar,
}

impl Memory {
    fn arena(&mut self, which: Which) -> Option<&mut Arena> {
        match which {
            Which::Host => Some(&mut self.host),
            Which::Device => Some(&mut self.device),
            Which::Bar => self.bar.as_mut(),
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("device", &self.name())
            .field("lost", &self.lost())
            .finish_non_exhaustive()
    }
}

/// What a running kernel takes of the device; given back when dropped.
#[derive(Debug)]
pub(super) struct Residency {
    context: Arc<Context>,
    shape: Shape,
}

impl Drop for Residency {
    fn drop(&mut self) {
        let mut residents = self.context.residents.lock();
        if let Some(index) = residents
            .kernels
            .iter()
            .position(|shape| *shape == self.shape)
        {
            residents.kernels.swap_remove(index);
        }
        if residents.kernels.is_empty() && residents.abandoned.is_none() {
            for remains in residents.remains.drain(..) {
                // SAFETY: nothing runs, and nothing starts while the lock is held; whoever left this had ended its own kernels.
                unsafe { remains.free() };
            }
        }
    }
}

impl Context {
    pub(super) fn open(
        physical: &Physical,
        config: &CudaConfig,
        bar: Option<Arc<Bar>>,
        account: Arc<Account>,
    ) -> Result<Arc<Self>, Error> {
        if let Some(lacks) = &physical.lacks {
            return Err(unavailable(format!(
                "'{}' cannot be used: {lacks}",
                physical.info.name
            )));
        }
        let failed = |error: NotTaken| {
            unavailable(format!(
                "'{}' cannot be opened: {error}",
                physical.info.name
            ))
        };
        let residents = Residents::of(physical.handle);
        let lock = residents.lock();
        if let Some(reason) = &lock.abandoned {
            return Err(Error::DeviceLost {
                device: physical.info.name.clone(),
                reason: reason.clone(),
            });
        }
        if !lock.kernels.is_empty() {
            return Err(Error::DeviceBusy {
                device: physical.info.name.clone(),
                reason: "kernels of another runtime of this process run on it, and taking memory would wait for them: build every runtime \
                         before the first launch"
                    .into(),
            });
        }
        let mut raw: CUcontext = ptr::null_mut();
        // SAFETY: the device came from the driver; the pointer is to a local.
        check("open its primary context", unsafe {
            sys::cuDevicePrimaryCtxRetain(&raw mut raw, physical.handle)
        })
        .map_err(|error| failed(error.into()))?;
        let opened = Self::fill(physical, config, bar, account, raw, Arc::clone(&residents));
        drop(lock);
        opened.map_err(failed)
    }

    /// Takes everything that must be there before a kernel runs.
    fn fill(
        physical: &Physical,
        config: &CudaConfig,
        bar: Option<Arc<Bar>>,
        account: Arc<Account>,
        raw: CUcontext,
        residents: Arc<Mutex<Residents>>,
    ) -> Result<Arc<Self>, NotTaken> {
        let mut remains = Remains {
            device: physical.handle,
            raw,
            streams: Vec::new(),
            modules: Vec::new(),
            host: Arena::new(Place::Host, config.host_arena_bytes),
            state: Arena::new(Place::Device, config.device_arena_bytes),
            bar: bar.map(|bar| Arena::new(Place::Bar(bar), config.host_arena_bytes)),
        };
        match remains.take(config.max_kernels) {
            Ok(()) => {}
            Err(error) => {
                // SAFETY: nothing runs: the caller holds the lock.
                unsafe { remains.free() };
                return Err(error);
            }
        }
        let Remains {
            streams,
            host,
            state,
            bar,
            ..
        } = remains;
        Ok(Arc::new(Self {
            physical: physical.clone(),
            account,
            raw,
            streams: Mutex::new(streams),
            memory: Mutex::new(Memory {
                host,
                device: state,
                bar,
            }),
            modules: Mutex::new(HashMap::new()),
            residents,
            lost: OnceLock::new(),
            rings_on_device: AtomicBool::new(false),
            rings_anywhere: config.ring_memory == CudaRingMemory::Auto,
            abandoned: AtomicBool::new(false),
        }))
    }

    pub(super) fn name(&self) -> &str {
        &self.physical.info.name
    }

    /// Makes the context the calling thread's for a while. To be called before every other driver call.
    pub(super) fn enter(&self) -> Result<Current, Error> {
        self.check_lost()?;
        self.check(Current::push(self.raw))
    }

    /// The same of a context that may be lost.
    pub(super) fn enter_anyway(&self) -> Result<Current, CallFailed> {
        Current::push(self.raw)
    }

    /// What a driver's answer means for this device. Errors after which nothing works any more are latched.
    pub(super) fn check<T>(&self, result: Result<T, CallFailed>) -> Result<T, Error> {
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let device = self.name().to_owned();
        if !error.is_sticky() {
            let reason = error.to_string();
            return Err(Error::DriverFailed { device, reason });
        }
        let reason =
            format!("{error}; this process must be restarted before it can use the device again");
        self.lose(reason.clone());
        Err(Error::DeviceLost { device, reason })
    }

    pub(super) fn out_of_memory(&self, asked: u64) -> Error {
        Error::OutOfMemory {
            device: self.name().to_owned(),
            asked,
            available: self.account.available(),
        }
    }

    /// Marks the device as lost; the first reason is kept.
    pub(super) fn lose(&self, reason: String) {
        if self.lost.set(reason).is_ok() {
            logging::error!(
                "device '{}' is lost: {}",
                self.name(),
                self.lost().unwrap_or("")
            );
        }
    }

    /// Marks the device as one on which a kernel is left that never ends, so that nothing it may use is ever freed.
    pub(super) fn abandon(&self, reason: String) {
        let reason =
            format!("{reason}; this process must be restarted before it can use the device again");
        self.residents
            .lock()
            .abandoned
            .get_or_insert(reason.clone());
        self.abandoned.store(true, Ordering::Release);
        self.lose(reason);
    }

    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    pub(super) fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    pub(super) fn check_lost(&self) -> Result<(), Error> {
        match self.lost() {
            None => Ok(()),
            Some(reason) => Err(Error::DeviceLost {
                device: self.name().to_owned(),
                reason: reason.to_owned(),
            }),
        }
    }

    fn busy(&self, reason: String) -> Error {
        Error::DeviceBusy {
            device: self.name().to_owned(),
            reason,
        }
    }

    /// Room for a kernel's blocks of so many threads, of which one multiprocessor holds `each`: all of them must be resident at
    /// once, beside those of the other kernels.
    pub(super) fn reserve(
        self: &Arc<Self>,
        blocks: u32,
        threads: u32,
        each: u32,
    ) -> Result<Residency, Error> {
        let shape = Shape {
            blocks,
            threads,
            each,
        };
        let mut residents = self.residents.lock();
        let room = residents.room(shape, self.physical.multiprocessors);
        if blocks > room {
            return Err(Error::InvalidOption {
                option: "grid",
                reason: format!(
                    "{blocks} blocks are not certain to be resident at once: '{}' has room for {}, for {room} beside the kernels that run",
                    self.name(),
                    each.saturating_mul(self.physical.multiprocessors)
                ),
            });
        }
        residents.kernels.push(shape);
        Ok(Residency {
            context: Arc::clone(self),
            shape,
        })
    }

    /// A stream of its own for a kernel.
    pub(super) fn take_stream(&self) -> Result<CUstream, Error> {
        self.streams.lock().pop().ok_or_else(|| {
            self.busy("all streams are taken: raise `CudaConfig::max_kernels`".into())
        })
    }

    /// Gives a stream back on which nothing runs any more.
    pub(super) fn give_stream_back(&self, stream: CUstream) {
        self.streams.lock().push(stream);
    }

    /// Memory for a kernel; what the host sees of it is zeroed.
    pub(super) fn allocate(
        self: &Arc<Self>,
        bytes: usize,
        placement: Placement,
    ) -> Result<Buffer, Error> {
        let asked = bytes as u64;
        let _current = self.enter()?;
        if !self.account.take(asked) {
            return Err(self.out_of_memory(asked));
        }
        let which = match placement {
            Placement::DeviceState => Which::Device,
            Placement::HostToDevice if self.rings_on_device.load(Ordering::Acquire) => Which::Bar,
            _ => Which::Host,
        };
        let mut which = which;
        let mut taken = self.take_piece(asked, which);
        if let Err(error) = &taken
            && which == Which::Bar
            && self.rings_anywhere
            && self.lost().is_none()
        {
            logging::info!(
                "device '{}': a ring lies in host memory: {error}",
                self.name()
            );
            which = Which::Host;
            taken = self.take_piece(asked, which);
        }
        let (piece, write_combining) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                self.account.give_back(asked);
                return Err(error);
            }
        };
        let buffer = Buffer {
            context: Arc::clone(self),
            which,
            bytes: asked,
            piece: Some(piece),
            write_combining,
        };
        buffer.zero();
        Ok(buffer)
    }

    fn take_piece(&self, bytes: u64, which: Which) -> Result<(Piece, WriteCombining), Error> {
        // Held for as long as an arena grows, so that no kernel starts meanwhile.
        let residents = self.residents.lock();
        let mut memory = self.memory.lock();
        let option = match which {
            Which::Device => "device_arena_bytes",
            Which::Host | Which::Bar => "host_arena_bytes",
        };
        let Some(arena) = memory.arena(which) else {
            return Err(self.out_of_memory(bytes));
        };
        let write_combining = arena.write_combining();
        if let Some(piece) = arena.take(bytes) {
            return Ok((piece, write_combining));
        }
        self.check_abandoned(&residents)?;
        if !residents.kernels.is_empty() {
            return Err(self.busy(format!(
                "{bytes} bytes do not fit into the {} that are left in one piece, and no memory can be taken from the driver while kernels \
                 run: raise `CudaConfig::{option}`",
                arena.largest()
            )));
        }
        match arena.grow(bytes) {
            Err(NotTaken::Driver(error)) if error.code == CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                return Err(self.out_of_memory(bytes));
            }
            Err(NotTaken::Driver(error)) => self.check(Err(error))?,
            Err(NotTaken::Vulkan(error)) if error.out_of_memory => {
                return Err(self.out_of_memory(bytes));
            }
            Err(NotTaken::Vulkan(error)) => {
                return Err(Error::DriverFailed {
                    device: self.name().to_owned(),
                    reason: error.reason,
                });
            }
            Ok(()) => {}
        }
        match arena.take(bytes) {
            Some(piece) => Ok((piece, write_combining)),
            None => Err(self.out_of_memory(bytes)),
        }
    }

    /// Puts request rings of kernels that are launched from now on into the device's own memory, or the host's.
    pub(super) fn put_rings_on_device(&self, on_device: bool) {
        self.rings_on_device.store(on_device, Ordering::Release);
    }

    /// Gives the device's memory back that the host maps, if nothing is in it and nothing runs.
    pub(super) fn give_bar_back(&self) {
        let Ok(_current) = self.enter() else { return };
        let residents = self.residents.lock();
        if !residents.kernels.is_empty() || residents.abandoned.is_some() {
            // It would wait for them.
            return;
        }
        let mut memory = self.memory.lock();
        if memory.bar.as_ref().is_some_and(Arena::is_unused)
            && let Some(mut bar) = memory.bar.take()
        {
            // SAFETY: nothing is in it; nothing runs, and nothing starts while the lock is held.
            unsafe { bar.free() };
        }
    }

    /// Fails if nothing can be taken from the driver any more.
    fn check_abandoned(&self, residents: &Residents) -> Result<(), Error> {
        match &residents.abandoned {
            None => Ok(()),
            Some(reason) => Err(Error::DeviceLost {
                device: self.name().to_owned(),
                reason: reason.clone(),
            }),
        }
    }

    /// The module of a kernel's code, loaded once.
    pub(super) fn module(&self, kernel: &str, source: &CudaSource) -> Result<Arc<Module>, Error> {
        let _current = self.enter()?;
        // Held while a module is loaded, so that no kernel starts meanwhile.
        let residents = self.residents.lock();
        let mut modules = self.modules.lock();
        if let Some(module) = modules.get(source) {
            return Ok(Arc::clone(module));
        }
        self.check_abandoned(&residents)?;
        if !residents.kernels.is_empty() {
            return Err(self.busy(format!(
                "the code of kernel '{kernel}' is not loaded yet, and loading it would wait for the kernels that run: register it before the \
                 first launch"
            )));
        }
        let module = Arc::new(Module::load(self, kernel, source)?);
        modules.insert(source.clone(), Arc::clone(&module));
        Ok(module)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.is_abandoned() {
            // A kernel that never ends may still use all of it, and every call would wait for it.
            return;
        }
        let memory = self.memory.get_mut();
        let streams = std::mem::take(self.streams.get_mut());
        let remains = Remains {
            device: self.physical.handle,
            raw: self.raw,
            streams,
            modules: self
                .modules
                .get_mut()
                .drain()
                .map(|(_, module)| module)
                .collect(),
            host: memory.host.take_all(),
            state: memory.device.take_all(),
            bar: memory.bar.as_mut().map(Arena::take_all),
        };
        let mut residents = self.residents.lock();
        if residents.abandoned.is_some() {
            // Every call would wait for a kernel that never ends.
            std::mem::forget(remains);
        } else if !residents.kernels.is_empty() {
            // Those of other runtimes; the last of them gives this back.
            residents.remains.push(remains);
        } else {
            // SAFETY: no kernel of this runtime is left, each holds the context; nothing starts while the lock is held.
            unsafe { remains.free() };
        }
    }
}

/// A piece of an arena, for kernels.
pub(super) struct Buffer {
    context: Arc<Context>,
    which: Which,
    bytes: u64,
    piece: Option<Piece>,
    write_combining: WriteCombining,
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("which", &self.which)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Buffer {
    /// Where the device sees it.
    pub(super) fn device(&self) -> sys::CUdeviceptr {
        self.piece.as_ref().map_or(0, |piece| piece.device)
    }

    /// Zeroes what the host sees. State is zeroed by the kernel itself: a fill by the driver might wait for others.
    fn zero(&self) {
        if let Some(start) = self.host_ptr() {
            // SAFETY: the piece has at least these bytes, and nobody else knows of it yet.
            unsafe { start.write_bytes(0, self.bytes as usize) };
        }
    }
}

impl DeviceMemory for Buffer {
    fn host_ptr(&self) -> Option<NonNull<u8>> {
        self.piece.as_ref().and_then(|piece| piece.host)
    }

    fn write_combining(&self) -> WriteCombining {
        self.write_combining
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.context.account.give_back(self.bytes);
        // A kernel that never ended may still use it.
        if !self.context.is_abandoned()
            && let Some(piece) = self.piece.take()
        {
            let mut memory = self.context.memory.lock();
            if let Some(arena) = memory.arena(self.which) {
                arena.give_back(piece);
            }
        }
    }
}
