//! CUDA by hand: flags in memory of either kind, launches and graphs. Nothing of the runtime under test.

use std::ffi::{CStr, c_void};
use std::ptr;
use std::time::Instant;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUgraphExec, CUresult, CUstream,
};

#[cfg(all(feature = "vulkan", unix))]
#[allow(dead_code)]
#[path = "../../src/backend/cuda/bar.rs"]
mod bar;
#[cfg(not(all(feature = "vulkan", unix)))]
#[allow(dead_code)]
#[path = "../../src/backend/cuda/no_bar.rs"]
mod bar;

use crate::{Failure, TIMEOUT};

/// Bytes of a message, and of everything that is taken for one path.
pub const MESSAGE: usize = 48;
const PIECE: usize = 4096;

/// What ends an `rk_flag`.
const STOP: u32 = u32::MAX;

fn check(operation: &str, code: CUresult) -> Result<(), Failure> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(format!("{operation}: {code:?}").into()),
    }
}

/// Memory that host and device see.
#[derive(Clone, Copy)]
struct Both {
    host: *mut u8,
    device: CUdeviceptr,
}

/// A device, and memory for requests in the host's and in its own memory.
pub struct Raw {
    pub device: CUdevice,
    context: CUcontext,
    module: sys::CUmodule,
    host: Both,
    taken: usize,
    own: Result<Both, String>,
    imported: Option<(sys::CUexternalMemory, bar::BarMemory)>,
}

impl Raw {
    pub fn open(ordinal: i32) -> Result<Self, Failure> {
        // SAFETY: the driver's functions as its documentation says; pointers are to locals. The caller has found the driver.
        unsafe {
            let mut device = 0;
            check("cuInit", sys::cuInit(0))?;
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, ordinal))?;
            let mut context = ptr::null_mut();
            let retained = sys::cuDevicePrimaryCtxRetain(&raw mut context, device);
            check("cuDevicePrimaryCtxRetain", retained)?;
            check("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(context))?;
            let mut module = ptr::null_mut();
            let image = concat!(include_str!("flag.ptx"), "\0");
            let loaded = sys::cuModuleLoadDataEx(
                &raw mut module,
                image.as_ptr().cast(),
                0,
                ptr::null_mut(),
                ptr::null_mut(),
            );
            check("cuModuleLoadDataEx", loaded)?;
            let mut start = ptr::null_mut();
            let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
            let pinned = sys::cuMemHostAlloc(&raw mut start, 16 * PIECE, flags);
            check("cuMemHostAlloc", pinned)?;
            let mut seen = 0;
            let mapped = sys::cuMemHostGetDevicePointer_v2(&raw mut seen, start, 0);
            check("cuMemHostGetDevicePointer", mapped)?;
            start.cast::<u8>().write_bytes(0, 16 * PIECE);
            let mut raw = Self {
                device,
                context,
                module,
                host: Both {
                    host: start.cast(),
                    device: seen,
                },
                taken: 0,
                own: Err(String::new()),
                imported: None,
            };
            raw.own = raw.take_own().map_err(|error| error.to_string());
            Ok(raw)
        }
    }

    /// Memory of the device's own that the host maps.
    fn take_own(&mut self) -> Result<Both, Failure> {
        // SAFETY: as in `open`.
        unsafe {
            let mut uuid = sys::CUuuid { bytes: [0; 16] };
            let told = sys::cuDeviceGetUuid_v2(&raw mut uuid, self.device);
            check("cuDeviceGetUuid", told)?;
            let bar = bar::Bar::open(uuid.bytes.map(|byte| byte as u8))?;
            let (memory, exported) = bar.take(PIECE as u64).map_err(|error| error.reason)?;
            let handle = sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC {
                type_: sys::CUexternalMemoryHandleType::CU_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD,
                handle: sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC_st__bindgen_ty_1 {
                    fd: exported.fd(),
                },
                size: memory.bytes(),
                flags: u32::from(bar.is_dedicated()),
                reserved: [0; 16],
            };
            let mut external = ptr::null_mut();
            let imported = sys::cuImportExternalMemory(&raw mut external, &handle);
            check("cuImportExternalMemory", imported)?;
            exported.give_away();
            let all = sys::CUDA_EXTERNAL_MEMORY_BUFFER_DESC {
                offset: 0,
                size: PIECE as u64,
                flags: 0,
                reserved: [0; 16],
            };
            let mut device = 0;
            let mapped = sys::cuExternalMemoryGetMappedBuffer(&raw mut device, external, &all);
            check("cuExternalMemoryGetMappedBuffer", mapped)?;
            let host = memory.start().as_ptr();
            host.write_bytes(0, PIECE);
            self.imported = Some((external, memory));
            Ok(Both { host, device })
        }
    }

    /// Why requests cannot lie in the device's own memory, if so.
    pub fn no_own_memory(&self) -> Option<&str> {
        self.own.as_ref().err().map(String::as_str)
    }

    fn piece(&mut self) -> Result<Both, Failure> {
        if self.taken == 16 {
            return Err("too many paths".into());
        }
        let offset = self.taken * PIECE;
        self.taken += 1;
        Ok(Both {
            // SAFETY: within the allocation.
            host: unsafe { self.host.host.add(offset) },
            device: self.host.device + offset as u64,
        })
    }

    fn function(&self, name: &CStr) -> Result<sys::CUfunction, Failure> {
        let mut function = ptr::null_mut();
        // SAFETY: as in `open`; the module is live.
        check("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&raw mut function, self.module, name.as_ptr())
        })?;
        Ok(function)
    }

    fn stream() -> Result<CUstream, Failure> {
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: as in `open`.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreate(&raw mut stream, flags)
        })?;
        Ok(stream)
    }

    /// A word that goes there and back by a kernel that stays, with requests in the device's own memory or the host's. To be
    /// started when nothing more is taken from the driver.
    pub fn flag(&mut self, own: bool) -> Result<Flag, Failure> {
        let reply = self.piece()?;
        let request = match own {
            true => self.own.clone()?,
            false => self.piece()?,
        };
        Ok(Flag {
            launch: Launch::new(
                self.function(c"rk_flag")?,
                Self::stream()?,
                request,
                reply,
                1,
            ),
            combining: own,
            value: 0,
        })
    }

    /// A launch a message, and the wait for its end.
    pub fn launch(&mut self) -> Result<Launch, Failure> {
        let (request, reply) = (self.piece()?, self.piece()?);
        let threads = (MESSAGE / 4) as u32;
        let function = self.function(c"rk_copy")?;
        Ok(Launch::new(
            function,
            Self::stream()?,
            request,
            reply,
            threads,
        ))
    }

    /// The same by a graph that was made beforehand.
    pub fn graph(&mut self) -> Result<Graph, Failure> {
        let launch = self.launch()?;
        let mut graph = ptr::null_mut();
        let mut executable = ptr::null_mut();
        // SAFETY: as in `open`; the stream is the launch's own.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            let begun = sys::cuStreamBeginCapture_v2(launch.stream, mode);
            check("cuStreamBeginCapture", begun)?;
            launch.start()?;
            let ended = sys::cuStreamEndCapture(launch.stream, &raw mut graph);
            check("cuStreamEndCapture", ended)?;
            let made = sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0);
            check("cuGraphInstantiate", made)?;
            check("cuGraphDestroy", sys::cuGraphDestroy(graph))?;
        }
        Ok(Graph { launch, executable })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: every kernel has ended; each is given back once. The process ends here, whatever the driver answers.
        unsafe {
            let _ = sys::cuModuleUnload(self.module);
            let _ = sys::cuMemFreeHost(self.host.host.cast());
            if let (Ok(own), Some((external, _memory))) = (&self.own, self.imported.take()) {
                let _ = sys::cuMemFree_v2(own.device);
                let _ = sys::cuDestroyExternalMemory(external);
            }
            let mut popped = ptr::null_mut();
            let _ = sys::cuCtxPopCurrent_v2(&raw mut popped);
            debug_assert_eq!(popped, self.context);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A kernel with a request and a reply, and a stream of its own.
pub struct Launch {
    function: sys::CUfunction,
    stream: CUstream,
    request: Both,
    reply: Both,
    threads: u32,
}

impl Launch {
    fn new(
        function: sys::CUfunction,
        stream: CUstream,
        request: Both,
        reply: Both,
        threads: u32,
    ) -> Self {
        Self {
            function,
            stream,
            request,
            reply,
            threads,
        }
    }

    fn start(&self) -> Result<(), Failure> {
        let (mut request, mut reply) = (self.request.device, self.reply.device);
        let mut arguments: [*mut c_void; 2] = [(&raw mut request).cast(), (&raw mut reply).cast()];
        // SAFETY: the kernel takes two addresses, which are copied by the call, of memory that lives as long as the device.
        check("cuLaunchKernel", unsafe {
            sys::cuLaunchKernel(
                self.function,
                1,
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
        })
    }

    /// Writes the message, starts what copies it, waits, reads.
    fn exchange_by(
        &mut self,
        payload: &[u8; MESSAGE],
        reply: &mut [u8; MESSAGE],
        start: impl FnOnce(&Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        // SAFETY: both pieces have room for a message, and no kernel is using them.
        unsafe {
            self.request
                .host
                .cast::<[u8; MESSAGE]>()
                .write_volatile(*payload);
            start(self)?;
            check("cuStreamSynchronize", sys::cuStreamSynchronize(self.stream))?;
            *reply = self.reply.host.cast::<[u8; MESSAGE]>().read_volatile();
        }
        Ok(())
    }

    #[inline]
    pub fn exchange(
        &mut self,
        payload: &[u8; MESSAGE],
        reply: &mut [u8; MESSAGE],
    ) -> Result<(), Failure> {
        self.exchange_by(payload, reply, Self::start)
    }
}

/// A launch that was recorded.
pub struct Graph {
    launch: Launch,
    executable: CUgraphExec,
}

impl Graph {
    #[inline]
    pub fn exchange(
        &mut self,
        payload: &[u8; MESSAGE],
        reply: &mut [u8; MESSAGE],
    ) -> Result<(), Failure> {
        let executable = self.executable;
        self.launch.exchange_by(payload, reply, |launch| {
            // SAFETY: the graph was made of this launch, and runs once at a time.
            check("cuGraphLaunch", unsafe {
                sys::cuGraphLaunch(executable, launch.stream)
            })
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it does not run; destroyed once.
        unsafe {
            let _ = sys::cuGraphExecDestroy(self.executable);
        }
    }
}

/// A word that a resident kernel sends back.
pub struct Flag {
    launch: Launch,
    /// Whether the host's stores may wait in a buffer.
    combining: bool,
    value: u32,
}

impl Flag {
    pub fn start(&self) -> Result<(), Failure> {
        self.launch.start()
    }

    #[inline]
    pub fn exchange(&mut self) -> Result<(), Failure> {
        self.value = self.value.wrapping_add(1) % STOP;
        self.send(self.value);
        let begin = Instant::now();
        let mut polls = 0_u32;
        // SAFETY: the word is in pinned memory that lives as long as the device.
        while unsafe { self.launch.reply.host.cast::<u32>().read_volatile() } != self.value {
            std::hint::spin_loop();
            polls += 1;
            if polls.is_multiple_of(65_536) && begin.elapsed() > TIMEOUT {
                return Err("a flag did not come back".into());
            }
        }
        Ok(())
    }

    fn send(&self, value: u32) {
        // SAFETY: as above.
        unsafe { self.launch.request.host.cast::<u32>().write_volatile(value) };
        if self.combining {
            flush();
        }
    }
}

/// Sends what waits in a write-combining buffer on its way.
fn flush() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

impl Drop for Flag {
    fn drop(&mut self) {
        self.send(STOP);
        // SAFETY: the stream is the launch's own, and its kernel ends.
        unsafe {
            let _ = sys::cuStreamSynchronize(self.launch.stream);
        }
    }
}

/// Whether there is a driver.
pub fn has_driver() -> bool {
    // SAFETY: opening the driver's library runs its initialisers.
    unsafe { sys::is_culib_present() }
}
