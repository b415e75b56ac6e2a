//! The compiler; callers as the real one demands.

use super::modules::{MARK, compile, repository};
use super::*;

pub(crate) struct Program {
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
