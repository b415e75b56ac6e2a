//! A CUDA driver and compiler that run kernels on this CPU: the backend's host side and the very sources of its kernels are then
//! tested where there is no GPU. Loaded as `libcuda` and `libnvrtc` by `tests/conformance_cuda.rs` alone.
//!
//! "PTX" of its compiler names a library that the C++ compiler made of the same source (`tests/on_cpu/`); the committed PTX of the
//! built-in kernels is recognised, and stands for their sources. Calls that a real driver lets wait for running kernels fail
//! here instead, as do calls without a current context.
//!
//! Names and numbers are those of the CUDA Driver API and of NVRTC.

#![allow(missing_docs, non_snake_case, clippy::missing_safety_doc)]

use std::alloc::{Layout, alloc, dealloc};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

type Code = c_int;
const SUCCESS: Code = 0;
const INVALID_VALUE: Code = 1;
const OUT_OF_MEMORY: Code = 2;
const INVALID_IMAGE: Code = 200;
const INVALID_CONTEXT: Code = 201;
const NOT_FOUND: Code = 500;
const NOT_READY: Code = 600;
const NOT_SUPPORTED: Code = 801;
const CAPTURE_UNSUPPORTED: Code = 900;
const ILLEGAL_ADDRESS: Code = 700;
const DEADLOCK: Code = 999;

/// What is to fail, as in `tests/conformance_cuda.rs`.
const NO_MEMORY: u32 = 1;
const FAULTY_KERNEL: u32 = 2;
const NO_DEVICES: u32 = 3;
const WATCHDOG: u32 = 4;
const OLD_DEVICE: u32 = 5;
const OLD_COMPILER: u32 = 6;
const NO_IMPORT: u32 = 7;
const LOCAL_MEMORY: u32 = 8;
const FOREIGN_CAPTURE: u32 = 9;

static FAULT: AtomicU32 = AtomicU32::new(0);

fn faulty(fault: u32) -> bool {
    FAULT.load(Ordering::SeqCst) == fault
}

/// Launches that are not done.
static RUNNING: AtomicUsize = AtomicUsize::new(0);
/// What was taken and not given back: memory, streams, events, modules, contexts.
static LIVE: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The contexts that were pushed, the current one last.
    static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

thread_local! {
    /// What graphs that others capture mean for this thread: 0 forbids most calls, 2 does not.
    static CAPTURE_MODE: Cell<c_int> = const { Cell::new(0) };
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) -> Code {
    // SAFETY: the caller passes a valid pointer, as the real driver demands.
    unsafe { *mode = CAPTURE_MODE.replace(*mode) };
    SUCCESS
}

/// Fails a call that needs a current context, and one that a real driver would let wait for running kernels.
fn ready(operation: &str, waits: bool) -> Result<(), Code> {
    if CURRENT.with_borrow(Vec::is_empty) {
        eprintln!("fake CUDA: {operation} without a current context");
        return Err(INVALID_CONTEXT);
    }
    if faulty(FOREIGN_CAPTURE) && CAPTURE_MODE.get() != 2 {
        eprintln!("fake CUDA: {operation} spoils the graph that another thread captures");
        return Err(CAPTURE_UNSUPPORTED);
    }
    // After an error that sticks a GPU runs nothing any more; here kernels still have to see that they shall end.
    while waits && faulty(FAULTY_KERNEL) && RUNNING.load(Ordering::SeqCst) > 0 {
        std::thread::yield_now();
    }
    if waits && RUNNING.load(Ordering::SeqCst) > 0 {
        eprintln!("fake CUDA: {operation} while kernels run: this waits for them for ever");
        return Err(DEADLOCK);
    }
    Ok(())
}

macro_rules! tri {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(code) => return code,
        }
    };
}

type Done = Mutex<bool>;

struct Stream {
    last: Mutex<Option<Arc<Done>>>,
    /// What is launched while a graph is recorded.
    captured: Mutex<Option<Vec<Job>>>,
}

struct Event {
    marks: Mutex<Weak<Done>>,
}

fn is_done(done: &Done) -> bool {
    *done.lock().unwrap()
}

type RunBlock =
    unsafe extern "C" fn(*const c_void, *mut u32, *mut u32, *mut u32, c_uint, c_uint, c_uint);

struct Module {
    library: usize,
    run_block: Option<RunBlock>,
    /// Whether it is that of the benchmark.
    flags: bool,
}

fn new_handle<T>(value: T) -> *mut c_void {
    LIVE.fetch_add(1, Ordering::SeqCst);
    Box::into_raw(Box::new(value)).cast()
}

/// # Safety
/// The handle must be one of `new_handle` for this type, given back once.
unsafe fn drop_handle<T>(handle: *mut c_void) {
    LIVE.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: the caller's promise.
    drop(unsafe { Box::from_raw(handle.cast::<T>()) });
}

// ---------------------------------------------------------------------------------------------------------------------
// The driver. Callers pass valid pointers and handles of the functions here, as the real driver demands.

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    // SAFETY: see above.
    unsafe { *version = 12_090 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Code {
    // SAFETY: see above.
    unsafe { *count = if faulty(NO_DEVICES) { 0 } else { 2 } };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    // SAFETY: see above.
    unsafe { *device = ordinal };
    SUCCESS
}

/// # Safety
/// `to` must have this room.
unsafe fn write_text(to: *mut c_char, room: c_int, text: &str) -> Code {
    if text.len() >= room as usize {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's promise.
    unsafe {
        to.cast::<u8>().copy_from(text.as_ptr(), text.len());
        *to.add(text.len()) = 0;
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(to: *mut c_char, room: c_int, device: c_int) -> Code {
    // SAFETY: see above.
    unsafe { write_text(to, room, &format!("Fake GPU {device}")) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(to: *mut c_char, room: c_int, device: c_int) -> Code {
    // SAFETY: see above.
    unsafe { write_text(to, room, &format!("FFFF:0{device}:00.0")) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> Code {
    // SAFETY: see above.
    unsafe { *bytes = 1 << 30 };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    _device: c_int,
) -> Code {
    let found = match attribute {
        // Threads of a block, of a warp (each is a context of its own here), multiprocessors.
        1 => 1024,
        10 => 2,
        16 => 16,
        // Whether there is a watchdog, and whether host memory can be mapped.
        17 => c_int::from(faulty(WATCHDOG)),
        19 => 1,
        // Compute capability, major.
        75 if faulty(OLD_DEVICE) => 6,
        75 => 9,
        _ => 0,
    };
    // SAFETY: see above.
    unsafe { *value = found };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut c_int, from: c_int, to: c_int) -> Code {
    // SAFETY: see above.
    unsafe { *can = c_int::from(from != to) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetP2PAttribute(
    value: *mut c_int,
    _attribute: c_int,
    _from: c_int,
    _to: c_int,
) -> Code {
    // SAFETY: see above.
    unsafe { *value = 1 };
    SUCCESS
}

/// The UUID of the software Vulkan device, if there is one.
fn software_vulkan() -> Option<[u8; 16]> {
    static UUID: OnceLock<Option<[u8; 16]>> = OnceLock::new();
    *UUID.get_or_init(|| {
        #[cfg(feature = "vulkan")]
        // SAFETY: the system's loader; handles are of the instance, which is destroyed last.
        unsafe {
            use ash::vk;
            let entry = ash::Entry::load().ok()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&info, None).ok()?;
            let devices = instance.enumerate_physical_devices().unwrap_or_default();
            let uuid = devices.into_iter().find_map(|device| {
                let mut ids = vk::PhysicalDeviceIDProperties::default();
                let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut ids);
                instance.get_physical_device_properties2(device, &mut properties);
                let software = properties.properties.device_type == vk::PhysicalDeviceType::CPU;
                software.then_some(ids.device_uuid)
            });
            instance.destroy_instance(None);
            uuid
        }
        #[cfg(not(feature = "vulkan"))]
        None
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn rk_fake_has_vulkan() -> bool {
    software_vulkan().is_some()
}

/// Device 0 is the software Vulkan device, whose memory it imports.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> Code {
    let vulkan = software_vulkan().filter(|_| device == 0);
    // SAFETY: see above.
    unsafe { *uuid = vulkan.unwrap_or([0xfa; 16]) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> Code {
    LIVE.fetch_add(1, Ordering::SeqCst);
    // SAFETY: see above.
    unsafe { *context = 0x1000 + device as usize };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> Code {
    LIVE.fetch_sub(1, Ordering::SeqCst);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: usize) -> Code {
    CURRENT.with_borrow_mut(|current| current.push(context));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut usize) -> Code {
    match CURRENT.with_borrow_mut(Vec::pop) {
        Some(popped) => {
            // SAFETY: see above.
            unsafe { *context = popped };
            SUCCESS
        }
        None => INVALID_CONTEXT,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, flags: c_uint) -> Code {
    tri!(ready("cuStreamCreate", true));
    if flags != 1 {
        eprintln!("fake CUDA: a stream that waits for the legacy one");
        return INVALID_VALUE;
    }
    let made = Stream {
        last: Mutex::new(None),
        captured: Mutex::new(None),
    };
    // SAFETY: see above.
    unsafe { *stream = new_handle(made) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> Code {
    tri!(ready("cuStreamDestroy", true));
    // SAFETY: see above.
    unsafe { drop_handle::<Stream>(stream) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: *mut c_void) -> Code {
    tri!(ready("cuStreamQuery", false));
    if faulty(FAULTY_KERNEL) {
        return ILLEGAL_ADDRESS;
    }
    // SAFETY: see above.
    let stream = unsafe { &*stream.cast::<Stream>() };
    match &*stream.last.lock().unwrap() {
        Some(last) if !is_done(last) => NOT_READY,
        _ => SUCCESS,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> Code {
    tri!(ready("cuEventCreate", false));
    let marks = Mutex::new(Weak::new());
    // SAFETY: see above.
    unsafe { *event = new_handle(Event { marks }) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> Code {
    // SAFETY: see above.
    unsafe { drop_handle::<Event>(event) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> Code {
    tri!(ready("cuEventRecord", false));
    // SAFETY: see above.
    let (event, stream) = unsafe { (&*event.cast::<Event>(), &*stream.cast::<Stream>()) };
    let last = stream.last.lock().unwrap();
    *event.marks.lock().unwrap() = last.as_ref().map_or_else(Weak::new, Arc::downgrade);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: *mut c_void) -> Code {
    tri!(ready("cuEventQuery", false));
    if faulty(FAULTY_KERNEL) {
        return ILLEGAL_ADDRESS;
    }
    // SAFETY: see above.
    let event = unsafe { &*event.cast::<Event>() };
    let marks = event.marks.lock().unwrap().upgrade();
    match marks {
        Some(done) if !is_done(&done) => NOT_READY,
        _ => SUCCESS,
    }
}

/// Bytes of each piece of memory.
static PIECES: Mutex<Option<HashMap<usize, Layout>>> = Mutex::new(None);

fn take(bytes: usize) -> Result<usize, Code> {
    if faulty(NO_MEMORY) || bytes > 1 << 30 {
        return Err(OUT_OF_MEMORY);
    }
    let layout = Layout::from_size_align(bytes.max(1), 4096).map_err(|_| INVALID_VALUE)?;
    // SAFETY: the size is not zero; memory of a driver holds anything.
    let start = unsafe {
        let start = alloc(layout);
        if start.is_null() {
            return Err(OUT_OF_MEMORY);
        }
        start.write_bytes(0xcd, layout.size());
        start as usize
    };
    LIVE.fetch_add(1, Ordering::SeqCst);
    let mut pieces = PIECES.lock().unwrap();
    pieces.get_or_insert_default().insert(start, layout);
    Ok(start)
}

fn give_back(start: usize) -> Code {
    let taken = PIECES
        .lock()
        .unwrap()
        .get_or_insert_default()
        .remove(&start);
    let Some(layout) = taken else {
        return INVALID_VALUE;
    };
    LIVE.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: allocated by `take` with this layout, and removed from the list.
    unsafe { dealloc(start as *mut u8, layout) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(to: *mut usize, bytes: usize, flags: c_uint) -> Code {
    tri!(ready("cuMemHostAlloc", true));
    if flags != 3 {
        eprintln!("fake CUDA: host memory that is not mapped, or write-combined: {flags}");
        return INVALID_VALUE;
    }
    let taken = tri!(take(bytes));
    // SAFETY: see above.
    unsafe { *to = taken };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetDevicePointer_v2(
    to: *mut usize,
    host: usize,
    _flags: c_uint,
) -> Code {
    // SAFETY: see above.
    unsafe { *to = host };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(start: usize) -> Code {
    tri!(ready("cuMemFreeHost", true));
    give_back(start)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(to: *mut usize, bytes: usize) -> Code {
    tri!(ready("cuMemAlloc", true));
    let taken = tri!(take(bytes));
    // SAFETY: see above.
    unsafe { *to = taken };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(start: usize) -> Code {
    tri!(ready("cuMemFree", true));
    let mut mapped = MAPPED.lock().unwrap();
    if let Some(index) = mapped.iter().position(|mapped| *mapped == start) {
        mapped.swap_remove(index);
        LIVE.fetch_sub(1, Ordering::SeqCst);
        return SUCCESS;
    }
    drop(mapped);
    give_back(start)
}

/// Memory of software Vulkan (Mesa's llvmpipe), whose file begins with its size and where it begins (`os_memory_fd.c`).
struct External {
    start: *mut c_void,
    length: usize,
    offset: usize,
    bytes: usize,
}

/// Where imported memory is mapped and not freed.
static MAPPED: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// `CUDA_EXTERNAL_MEMORY_HANDLE_DESC`.
#[repr(C)]
pub struct HandleDescriptor {
    kind: c_int,
    /// A union of two pointers; a file descriptor is in its first word.
    handle: [u64; 2],
    bytes: u64,
    flags: c_uint,
    reserved: [c_uint; 16],
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuImportExternalMemory(
    to: *mut *mut c_void,
    descriptor: *const HandleDescriptor,
) -> Code {
    tri!(ready("cuImportExternalMemory", true));
    // SAFETY: see above.
    let descriptor = unsafe { &*descriptor };
    if descriptor.kind != 1 || descriptor.flags != 0 || descriptor.reserved != [0; 16] {
        eprintln!("fake CUDA: not a file descriptor of Vulkan");
        return INVALID_VALUE;
    }
    if faulty(NO_IMPORT) {
        return NOT_SUPPORTED;
    }
    let fd = descriptor.handle[0] as c_int;
    let mut header = [0_usize; 2];
    // SAFETY: the buffer has the size that is asked for; the descriptor is the caller's until it is closed here, on success.
    unsafe {
        let read = libc::pread(fd, header.as_mut_ptr().cast(), size_of_val(&header), 0);
        let [bytes, offset] = header;
        if read != 16 || (bytes as u64) < descriptor.bytes {
            eprintln!(
                "fake CUDA: no memory of llvmpipe of {} bytes",
                descriptor.bytes
            );
            return INVALID_VALUE;
        }
        let length = offset + bytes;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let start = libc::mmap(
            std::ptr::null_mut(),
            length,
            access,
            libc::MAP_SHARED,
            fd,
            0,
        );
        if start == libc::MAP_FAILED {
            return OUT_OF_MEMORY;
        }
        libc::close(fd);
        *to = new_handle(External {
            start,
            length,
            offset,
            bytes,
        });
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuExternalMemoryGetMappedBuffer(
    to: *mut usize,
    memory: *mut c_void,
    descriptor: *const [u64; 3],
) -> Code {
    tri!(ready("cuExternalMemoryGetMappedBuffer", true));
    // SAFETY: see above.
    let (memory, [offset, bytes, _flags]) = unsafe { (&*memory.cast::<External>(), *descriptor) };
    if offset as usize + bytes as usize > memory.bytes {
        return INVALID_VALUE;
    }
    let start = memory.start as usize + memory.offset + offset as usize;
    MAPPED.lock().unwrap().push(start);
    LIVE.fetch_add(1, Ordering::SeqCst);
    // SAFETY: see above.
    unsafe { *to = start };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDestroyExternalMemory(memory: *mut c_void) -> Code {
    tri!(ready("cuDestroyExternalMemory", true));
    // SAFETY: see above; the mapping was made by `cuImportExternalMemory`.
    unsafe {
        let external = &*memory.cast::<External>();
        libc::munmap(external.start, external.length);
        drop_handle::<External>(memory);
    }
    SUCCESS
}

/// The built-in kernels by their committed PTX.
const BUILT_IN: [(&str, &[u8]); 3] = [
    ("echo", include_bytes!("../../kernels/ptx/echo.ptx")),
    ("saxpy", include_bytes!("../../kernels/ptx/saxpy.ptx")),
    ("sink", include_bytes!("../../kernels/ptx/sink.ptx")),
];

/// The kernels of the benchmark.
const FLAGS: &[u8] = include_bytes!("../../benches/placement/flag.ptx");

/// What the "PTX" of a compiled handler begins with.
const MARK: &[u8] = b"rk-fake:";

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Compiles a kernel for this CPU, in the folder that whoever loads this library names: the library's path, or the compiler's
/// log.
fn compile(handler: &str) -> Result<String, String> {
    static KNOWN: Mutex<Option<HashMap<String, String>>> = Mutex::new(None);
    let mut known = KNOWN.lock().unwrap();
    let known = known.get_or_insert_default();
    if let Some(path) = known.get(handler) {
        return Ok(path.clone());
    }
    let folder = PathBuf::from(std::env::var_os("RINGKERNEL_FAKE_CUDA").expect("a folder"));
    let source = folder.join(format!("kernel{}.cu", known.len()));
    let library = source.with_extension("so");
    let text = format!("#include \"ringkernel.cuh\"\n#line 1 \"handler\"\n{handler}\n");
    std::fs::write(&source, text).map_err(|error| error.to_string())?;
    let root = repository();
    let output = Command::new("c++")
        .args([
            "-std=c++17",
            "-O2",
            "-shared",
            "-fPIC",
            "-ffp-contract=off",
            "-w",
            "-I",
        ])
        .arg(root.join("kernels"))
        .arg("-I")
        .arg(root.join("tests/on_cpu"))
        .arg(format!("-DRK_SOURCE=\"{}\"", source.display()))
        .arg(root.join("tests/on_cpu/block.cpp"))
        .arg("-o")
        .arg(&library)
        .output()
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let path = library.display().to_string();
    known.insert(handler.to_owned(), path.clone());
    Ok(path)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut *mut c_void,
    image: *const c_char,
    _count: c_uint,
    _options: *mut c_void,
    _values: *mut c_void,
) -> Code {
    tri!(ready("cuModuleLoadDataEx", true));
    // SAFETY: see above; images end with a zero.
    let text = unsafe { CStr::from_ptr(image) }.to_bytes();
    let path = if let Some(path) = text.strip_prefix(MARK) {
        String::from_utf8_lossy(path).into_owned()
    } else if let Some((name, _)) = BUILT_IN.iter().find(|(_, ptx)| *ptx == text) {
        let source = repository().join(format!("kernels/{name}.rk"));
        let handler = std::fs::read_to_string(source).expect("the built-in kernels' sources");
        compile(&handler).expect("the built-in kernels compile")
    } else if text == FLAGS || text.starts_with(b".version") {
        // PTX of somebody else: a module without our functions.
        String::new()
    } else {
        return INVALID_IMAGE;
    };
    let mut made = Module {
        library: 0,
        run_block: None,
        flags: text == FLAGS,
    };
    if !path.is_empty() {
        let path = CString::new(path).unwrap();
        // SAFETY: the library was made by `compile`, and its function has this type.
        unsafe {
            let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
            if library.is_null() {
                return INVALID_IMAGE;
            }
            let run_block = libc::dlsym(library, c"rk_run_block".as_ptr());
            made.library = library as usize;
            made.run_block = std::mem::transmute::<*mut c_void, Option<RunBlock>>(run_block);
        }
    }
    // SAFETY: see above.
    unsafe { *module = new_handle(made) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(module: *mut c_void) -> Code {
    tri!(ready("cuModuleUnload", true));
    // The library stays: it may be loaded again.
    // SAFETY: see above.
    unsafe { drop_handle::<Module>(module) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> Code {
    tri!(ready("cuModuleGetFunction", true));
    // SAFETY: see above.
    unsafe {
        if (*module.cast::<Module>()).flags {
            let name = CStr::from_ptr(name);
            for known in [&FLAG, &COPY] {
                if known.0 == name {
                    *function = known.handle();
                    return SUCCESS;
                }
            }
            return NOT_FOUND;
        }
        let library = (*module.cast::<Module>()).library;
        if library == 0 || libc::dlsym(library as *mut c_void, name).is_null() {
            return NOT_FOUND;
        }
        *function = module;
    }
    SUCCESS
}

/// Bytes of local memory that each thread has; a launch that needs more waits for running kernels.
static LOCAL: AtomicUsize = AtomicUsize::new(1024);

fn local_memory_needed() -> usize {
    if faulty(LOCAL_MEMORY) { 4096 } else { 0 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetLimit(value: *mut usize, limit: c_int) -> Code {
    if limit != 0 {
        return INVALID_VALUE;
    }
    // SAFETY: see above.
    unsafe { *value = LOCAL.load(Ordering::SeqCst) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetLimit(limit: c_int, value: usize) -> Code {
    tri!(ready("cuCtxSetLimit", true));
    if limit != 0 {
        return INVALID_VALUE;
    }
    LOCAL.store(value, Ordering::SeqCst);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    _function: *mut c_void,
) -> Code {
    let found = match attribute {
        // Most threads of a block, bytes of local memory.
        0 => 512,
        3 => local_memory_needed() as c_int,
        _ => return INVALID_VALUE,
    };
    // SAFETY: see above.
    unsafe { *value = found };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut c_int,
    _function: *mut c_void,
    threads: c_int,
    _shared: usize,
) -> Code {
    // SAFETY: see above.
    unsafe { *blocks = (2048 / threads.max(1)).min(32) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    blocks: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    threads: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared: c_uint,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Code {
    let more = local_memory_needed() > LOCAL.load(Ordering::SeqCst);
    tri!(ready("cuLaunchKernel", more));
    if stream.is_null() {
        return DEADLOCK;
    }
    // SAFETY: see above. `rk_main` has a structure of fourteen words and three addresses, the kernels of the benchmark have two
    // addresses; all are copied here.
    let (job, stream) = unsafe {
        let address = |index: usize| *(*arguments.add(index)).cast::<u64>() as usize;
        let job: Job = if function == FLAG.handle() {
            let (request, reply) = (address(0), address(1));
            Arc::new(move || run_flag(request, reply))
        } else if function == COPY.handle() {
            let (request, reply) = (address(0), address(1));
            Arc::new(move || run_copy(request, reply, threads as usize))
        } else {
            let words = *(*arguments).cast::<[u32; 14]>();
            let addresses = [1, 2, 3].map(address);
            let Some(run_block) = (*function.cast::<Module>()).run_block else {
                return NOT_FOUND;
            };
            Arc::new(move || run_blocks(run_block, words, addresses, blocks, threads))
        };
        (job, &*stream.cast::<Stream>())
    };
    let mut captured = stream.captured.lock().unwrap();
    match &mut *captured {
        Some(captured) => captured.push(job),
        None => start(stream, job),
    }
    SUCCESS
}

/// What a kernel does.
type Job = Arc<dyn Fn() + Send + Sync>;

/// Runs it once what was launched before on its stream is done.
fn start(stream: &Stream, job: Job) {
    RUNNING.fetch_add(1, Ordering::SeqCst);
    let done = Arc::new(Mutex::new(false));
    let before = stream.last.lock().unwrap().replace(Arc::clone(&done));
    std::thread::spawn(move || {
        // A GPU does not stay on its caller's core.
        // SAFETY: the set is whole; pid 0 is this thread.
        unsafe {
            let mut every: libc::cpu_set_t = std::mem::zeroed();
            (0..libc::CPU_SETSIZE as usize).for_each(|core| libc::CPU_SET(core, &mut every));
            libc::sched_setaffinity(0, size_of_val(&every), &raw const every);
        }
        while before.as_ref().is_some_and(|before| !is_done(before)) {
            std::thread::yield_now();
        }
        job();
        RUNNING.fetch_sub(1, Ordering::SeqCst);
        *done.lock().unwrap() = true;
    });
}

fn run_blocks(
    run_block: RunBlock,
    words: [u32; 14],
    addresses: [usize; 3],
    blocks: c_uint,
    threads: c_uint,
) {
    std::thread::scope(|scope| {
        for block in 0..blocks {
            scope.spawn(move || {
                let [requests, replies, state] = addresses.map(|at| at as *mut u32);
                let words = (&raw const words).cast();
                // SAFETY: the host holds this memory until the kernel has ended.
                unsafe { run_block(words, requests, replies, state, block, blocks, threads) };
            });
        }
    });
}

/// The kernels of `benches/placement/flag.ptx`.
struct Known(&'static CStr);
static FLAG: Known = Known(c"rk_flag");
static COPY: Known = Known(c"rk_copy");

impl Known {
    fn handle(&'static self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

fn word(at: usize) -> &'static AtomicU32 {
    // SAFETY: the host holds this memory until the kernel has ended, and uses whole words.
    unsafe { &*(at as *const AtomicU32) }
}

fn run_flag(request: usize, reply: usize) {
    let mut last = 0;
    while last != u32::MAX {
        let value = word(request).load(Ordering::Acquire);
        if value == last {
            std::thread::yield_now();
            continue;
        }
        last = value;
        word(reply).store(value, Ordering::Release);
    }
}

fn run_copy(request: usize, reply: usize, threads: usize) {
    for thread in 0..threads {
        let value = word(request + 4 * thread).load(Ordering::Relaxed);
        word(reply + 4 * thread).store(value, Ordering::Relaxed);
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> Code {
    tri!(ready("cuStreamSynchronize", false));
    // SAFETY: see above.
    let stream = unsafe { &*stream.cast::<Stream>() };
    let last = stream.last.lock().unwrap().clone();
    while last.as_ref().is_some_and(|last| !is_done(last)) {
        std::thread::yield_now();
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamBeginCapture_v2(stream: *mut c_void, _mode: c_int) -> Code {
    // SAFETY: see above.
    let stream = unsafe { &*stream.cast::<Stream>() };
    *stream.captured.lock().unwrap() = Some(Vec::new());
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: *mut c_void, graph: *mut *mut c_void) -> Code {
    // SAFETY: see above.
    let stream = unsafe { &*stream.cast::<Stream>() };
    let Some(captured) = stream.captured.lock().unwrap().take() else {
        return INVALID_VALUE;
    };
    // SAFETY: see above.
    unsafe { *graph = new_handle::<Vec<Job>>(captured) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut *mut c_void,
    graph: *mut c_void,
    _flags: u64,
) -> Code {
    // SAFETY: see above.
    unsafe { *executable = new_handle((*graph.cast::<Vec<Job>>()).clone()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(executable: *mut c_void, stream: *mut c_void) -> Code {
    // SAFETY: see above.
    let (jobs, stream) = unsafe { (&*executable.cast::<Vec<Job>>(), &*stream.cast::<Stream>()) };
    for job in jobs {
        start(stream, Arc::clone(job));
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: *mut c_void) -> Code {
    // SAFETY: see above.
    unsafe { drop_handle::<Vec<Job>>(graph) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(executable: *mut c_void) -> Code {
    // SAFETY: see above.
    unsafe { drop_handle::<Vec<Job>>(executable) };
    SUCCESS
}

fn name_of(code: Code) -> &'static CStr {
    match code {
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        INVALID_IMAGE => c"CUDA_ERROR_INVALID_IMAGE",
        NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        _ => c"CUDA_ERROR_OF_THE_FAKE",
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: see above.
    unsafe { *text = name_of(code).as_ptr() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: see above.
    unsafe { *text = name_of(code).as_ptr() };
    SUCCESS
}

// ---------------------------------------------------------------------------------------------------------------------
// The compiler; callers as above.

struct Program {
    source: String,
    headers: HashMap<String, String>,
    outcome: Result<String, String>,
}

impl Program {
    fn ptx(&self) -> Vec<u8> {
        let path = self.outcome.as_deref().unwrap_or_default();
        [MARK, path.as_bytes(), &[0]].concat()
    }

    fn log(&self) -> Vec<u8> {
        let log = self.outcome.as_ref().err().map_or("", String::as_str);
        [log.as_bytes(), &[0]].concat()
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    source: *const c_char,
    _name: *const c_char,
    count: c_int,
    headers: *const *const c_char,
    names: *const *const c_char,
) -> Code {
    // SAFETY: see above; there are `count` of each.
    unsafe {
        let text = |at: *const c_char| CStr::from_ptr(at).to_string_lossy().into_owned();
        let headers = (0..count as usize)
            .map(|index| (text(*names.add(index)), text(*headers.add(index))))
            .collect();
        *program = new_handle(Program {
            source: text(source),
            headers,
            outcome: Err("not compiled".into()),
        });
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut c_void) -> Code {
    // SAFETY: see above.
    unsafe { drop_handle::<Program>(*program) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    program: *mut c_void,
    count: c_int,
    options: *const *const c_char,
) -> Code {
    // SAFETY: see above; there are `count` options.
    let (program, options) = unsafe {
        let text = |at: *const c_char| CStr::from_ptr(at).to_string_lossy().into_owned();
        let options: Vec<String> = (0..count as usize)
            .map(|index| text(*options.add(index)))
            .collect();
        (&mut *program.cast::<Program>(), options)
    };
    let own = format!(
        "--gpu-architecture={}",
        if faulty(OLD_COMPILER) {
            "compute_80"
        } else {
            "sm_90"
        }
    );
    assert!(options.contains(&own), "{options:?}");
    for (name, text) in &program.headers {
        let own = std::fs::read_to_string(repository().join("kernels").join(name));
        assert_eq!(own.ok().as_ref(), Some(text), "{name}");
    }
    let lines = program.source.split_once("#line 1 \"handler\"\n");
    program.outcome = compile(lines.expect("lines are counted anew").1);
    if program.outcome.is_ok() { SUCCESS } else { 6 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetNumSupportedArchs(count: *mut c_int) -> Code {
    // SAFETY: see above.
    unsafe { *count = if faulty(OLD_COMPILER) { 2 } else { 3 } };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetSupportedArchs(to: *mut c_int) -> Code {
    let known: &[c_int] = if faulty(OLD_COMPILER) {
        &[70, 80]
    } else {
        &[70, 80, 90]
    };
    // SAFETY: see above; the caller asked for the number.
    unsafe { to.copy_from(known.as_ptr(), known.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut c_void, size: *mut usize) -> Code {
    // SAFETY: the caller's promise.
    unsafe { nvrtcGetPTXSize(program, size) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(program: *mut c_void, to: *mut u8) -> Code {
    // SAFETY: the caller's promise.
    unsafe { nvrtcGetPTX(program, to) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetPTXSize(program: *mut c_void, size: *mut usize) -> Code {
    // SAFETY: see above.
    unsafe { *size = (*program.cast::<Program>()).ptx().len() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetPTX(program: *mut c_void, to: *mut u8) -> Code {
    // SAFETY: see above; the caller asked for the size.
    unsafe {
        let text = (*program.cast::<Program>()).ptx();
        to.copy_from(text.as_ptr(), text.len());
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(program: *mut c_void, size: *mut usize) -> Code {
    // SAFETY: see above.
    unsafe { *size = (*program.cast::<Program>()).log().len() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(program: *mut c_void, to: *mut u8) -> Code {
    // SAFETY: see above; the caller asked for the size.
    unsafe {
        let text = (*program.cast::<Program>()).log();
        to.copy_from(text.as_ptr(), text.len());
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetErrorString(_code: Code) -> *const c_char {
    c"an error of the fake".as_ptr()
}

// ---------------------------------------------------------------------------------------------------------------------
// For tests.

/// Makes calls fail from now on.
#[unsafe(no_mangle)]
pub extern "C" fn rk_fake_arm(fault: u32) {
    FAULT.store(fault, Ordering::SeqCst);
}

/// Contexts that are current on the calling thread.
#[unsafe(no_mangle)]
pub extern "C" fn rk_fake_pushed() -> usize {
    CURRENT.with_borrow(Vec::len)
}

/// What was taken and not given back.
#[unsafe(no_mangle)]
pub extern "C" fn rk_fake_live() -> usize {
    LIVE.load(Ordering::SeqCst) + RUNNING.load(Ordering::SeqCst)
}
