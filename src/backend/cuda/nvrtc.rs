//! Handlers in source, compiled by NVRTC at launch.

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use crate::backend::cpp;
use crate::error::Error;

/// CUDA's own part of the prelude.
const PRELUDE: &str = include_str!("../../../kernels/ringkernel.cuh");

/// Functions that are called; see `driver::FUNCTIONS`.
const FUNCTIONS: [&str; 12] = [
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetErrorString",
    "nvrtcGetNumSupportedArchs",
    "nvrtcGetSupportedArchs",
    "nvrtcGetPTX",
    "nvrtcGetPTXSize",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
];

/// A program; destroyed when dropped.
struct Program(nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once.
        unsafe {
            let _ = sys::nvrtcDestroyProgram(&raw mut self.0);
        }
    }
}

/// What NVRTC compiles for: the device itself, or else the newest architecture that it knows and the device runs, as PTX.
fn target(capability: (u32, u32)) -> Result<(bool, u32), String> {
    let mut count: c_int = 0;
    // SAFETY: the pointer is to a local.
    let counted = unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) };
    let mut known = vec![0 as c_int; usize::try_from(count).unwrap_or(0)];
    // SAFETY: there is room for as many as were counted.
    let listed = unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) };
    for code in [counted, listed] {
        if code != nvrtcResult::NVRTC_SUCCESS {
            return Err(explain(code));
        }
    }
    let own = capability.0 * 10 + capability.1;
    let best = known
        .into_iter()
        .filter_map(|known| u32::try_from(known).ok())
        .filter(|known| *known <= own)
        .max();
    match best {
        Some(best) => Ok((best == own, best)),
        None => Err(format!(
            "NVRTC knows no architecture as old as {}.{}",
            capability.0, capability.1
        )),
    }
}

/// A handler's code for devices of this compute capability, zero-terminated.
pub(super) fn compile(
    kernel: &str,
    handler: &str,
    capability: (u32, u32),
) -> Result<Vec<u8>, Error> {
    let failed = |log: String| Error::Compile {
        kernel: kernel.to_owned(),
        log: log.trim().to_owned(),
    };
    // SAFETY: opening the library runs its initialisers; the names are NVRTC's.
    if !unsafe { sys::is_culib_present() } {
        return Err(failed(
            "NVRTC (libnvrtc), which compiles handlers in source, is not installed".into(),
        ));
    }
    // SAFETY: as above; it is there.
    let library = unsafe { sys::culib() };
    for name in FUNCTIONS {
        // SAFETY: the symbol is only looked up, not called by this type.
        if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
            return Err(failed(format!("NVRTC has no {name}: it is too old")));
        }
    }
    let c =
        |text: &str| CString::new(text).map_err(|_| failed("the source holds a zero byte".into()));
    // Lines are counted anew where the handler begins.
    let source = c(&format!(
        "#include \"ringkernel.cuh\"\n#line 1 \"handler\"\n{handler}\n"
    ))?;
    let (own, common) = (c(PRELUDE)?, c(cpp::PRELUDE)?);
    let headers = [own.as_ptr(), common.as_ptr()];
    let names = [c"ringkernel.cuh".as_ptr(), c"ringkernel.h".as_ptr()];
    // Code for the device itself asks nothing of the driver's own compiler, which may be older than NVRTC.
    let (is_own, architecture) = target(capability).map_err(failed)?;
    let kind = if is_own { "sm" } else { "compute" };
    let architecture = c(&format!("--gpu-architecture={kind}_{architecture}"))?;
    let options: [*const c_char; 2] = [architecture.as_ptr(), c"--std=c++17".as_ptr()];
    let mut raw: nvrtcProgram = ptr::null_mut();
    // SAFETY: every string lives until the program is destroyed; the pointer is to a local.
    let created = unsafe {
        sys::nvrtcCreateProgram(
            &raw mut raw,
            source.as_ptr(),
            c"handler.cu".as_ptr(),
            headers.len() as c_int,
            headers.as_ptr(),
            names.as_ptr(),
        )
    };
    if created != nvrtcResult::NVRTC_SUCCESS {
        return Err(failed(explain(created)));
    }
    let program = Program(raw);
    // SAFETY: the program is live, and so are the options.
    let compiled =
        unsafe { sys::nvrtcCompileProgram(program.0, options.len() as c_int, options.as_ptr()) };
    if compiled != nvrtcResult::NVRTC_SUCCESS {
        let log = read(
            // SAFETY: the program is live, and `size` a valid pointer.
            |size| unsafe { sys::nvrtcGetProgramLogSize(program.0, size) },
            // SAFETY: the program is live, and the buffer has the size that was asked for.
            |to| unsafe { sys::nvrtcGetProgramLog(program.0, to) },
        );
        let log = log.map(|log| {
            String::from_utf8_lossy(&log)
                .trim_end_matches('\0')
                .to_owned()
        });
        return Err(failed(match log {
            Ok(log) if !log.trim().is_empty() => log,
            _ => explain(compiled),
        }));
    }
    let code = if is_own {
        read(
            // SAFETY: as above.
            |size| unsafe { sys::nvrtcGetCUBINSize(program.0, size) },
            // SAFETY: as above.
            |to| unsafe { sys::nvrtcGetCUBIN(program.0, to) },
        )
    } else {
        read(
            // SAFETY: as above.
            |size| unsafe { sys::nvrtcGetPTXSize(program.0, size) },
            // SAFETY: as above.
            |to| unsafe { sys::nvrtcGetPTX(program.0, to) },
        )
    };
    code.map_err(|code| failed(explain(code)))
}

/// A text that NVRTC writes into a buffer of the size that it asks for.
fn read(
    size: impl FnOnce(*mut usize) -> nvrtcResult,
    write: impl FnOnce(*mut c_char) -> nvrtcResult,
) -> Result<Vec<u8>, nvrtcResult> {
    let mut bytes = 0_usize;
    match size(&raw mut bytes) {
        nvrtcResult::NVRTC_SUCCESS => {}
        code => return Err(code),
    }
    let mut buffer = vec![0_u8; bytes + 1];
    match write(buffer.as_mut_ptr().cast()) {
        nvrtcResult::NVRTC_SUCCESS => Ok(buffer),
        code => Err(code),
    }
}

fn explain(code: nvrtcResult) -> String {
    // SAFETY: the function takes any code and returns a static string, or null.
    unsafe {
        let text = sys::nvrtcGetErrorString(code);
        match text.is_null() {
            true => format!("{code:?}"),
            false => CStr::from_ptr(text).to_string_lossy().into_owned(),
        }
    }
}
