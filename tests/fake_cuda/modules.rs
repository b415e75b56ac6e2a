//! Modules: kernels' sources, compiled for this CPU.

use super::streams::{COPY, FLAG};
use super::*;

pub(crate) type RunBlock =
    unsafe extern "C" fn(*const c_void, *mut u32, *mut u32, *mut u32, c_uint, c_uint, c_uint);

pub(crate) struct Module {
    pub(crate) library: usize,
    pub(crate) run_block: Option<RunBlock>,
    /// Whether it is that of the benchmark.
    pub(crate) flags: bool,
}

/// The built-in kernels by their committed PTX.
pub(crate) const BUILT_IN: [(&str, &[u8]); 3] = [
    ("echo", include_bytes!("../../kernels/ptx/echo.ptx")),
    ("saxpy", include_bytes!("../../kernels/ptx/saxpy.ptx")),
    ("sink", include_bytes!("../../kernels/ptx/sink.ptx")),
];

/// The kernels of the benchmark.
pub(crate) const FLAGS: &[u8] = include_bytes!("../../benches/placement/flag.ptx");

/// What the "PTX" of a compiled handler begins with.
pub(crate) const MARK: &[u8] = b"rk-fake:";

pub(crate) fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Compiles a kernel for this CPU, in the folder that whoever loads this library names: the library's path, or the compiler's
/// log.
pub(crate) fn compile(handler: &str) -> Result<String, String> {
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
pub(crate) static LOCAL: AtomicUsize = AtomicUsize::new(1024);

pub(crate) fn local_memory_needed() -> usize {
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
