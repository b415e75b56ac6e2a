//! The kernels that every runtime has: `echo`, `sink` and `saxpy`.
//!
//! | id | request | reply | state |
//! |---|---|---|---|
//! | `echo` | anything | the same payload, under the same type | none |
//! | `sink` | anything | none | `u64`: messages counted |
//! | `saxpy` | words: `a` f32, `n` u32, `x` n f32, `y` n f32 | `n` f32: `a * x + y` | none |

use super::device_code::{CudaCode, MetalCode};
use super::registration::KernelRegistration;
use super::shader::ShaderCode;
use crate::error::HandlerError;

/// Largest `n` of the built-in `saxpy` at its default message size.
const SAXPY_ELEMENTS: usize = 256;

/// Slots of a default `saxpy` ring: messages of 2 KiB need no thousands of them.
const SAXPY_CAPACITY: usize = 128;

/// Words in front of the vectors: `a` and `n`.
const SAXPY_HEAD: usize = 2;

/// The committed modules of a built-in kernel, built by `shaders/build` from `kernels/<id>.rk`.
macro_rules! built_in {
    ($id:literal) => {
        // SAFETY: what the compiler makes of our source, which uses accessors alone; `shaders/build
        // --check` compares and validates.
        unsafe {
            ShaderCode::spirv(include_bytes!(concat!("../../shaders/", $id, ".spv")).as_slice())
                .traced(include_bytes!(concat!("../../shaders/", $id, ".traced.spv")).as_slice())
        }
    };
}

/// The committed PTX of the same, built by `kernels/build`.
macro_rules! built_in_ptx {
    ($id:literal) => {
        // SAFETY: what the compiler makes of our source, which uses accessors alone; `kernels/build
        // --check` compares.
        unsafe {
            CudaCode::ptx(include_bytes!(concat!("../../kernels/ptx/", $id, ".ptx")).as_slice())
        }
    };
}

/// Its source, which Metal compiles at launch.
macro_rules! built_in_source {
    ($id:literal) => {
        MetalCode::source(include_str!(concat!("../../kernels/", $id, ".rk")))
    };
}

pub(super) fn all() -> Vec<KernelRegistration> {
    vec![echo(), sink(), saxpy()]
}

fn echo() -> KernelRegistration {
    KernelRegistration::new("echo")
        .any_message()
        .cpu_handler(|request, context| context.echo(request))
        .shader(built_in!("echo"))
        .cuda(built_in_ptx!("echo"))
        .metal(built_in_source!("echo"))
}

fn sink() -> KernelRegistration {
    KernelRegistration::new("sink")
        .any_message()
        .state_size(size_of::<u64>())
        .cpu_handler(|_, context| {
            *context.state_as::<u64>()? += 1;
            Ok(())
        })
        .shader(built_in!("sink"))
        .cuda(built_in_ptx!("sink"))
        .metal(built_in_source!("sink"))
}

fn saxpy() -> KernelRegistration {
    KernelRegistration::new("saxpy")
        .largest_message(size_of::<u32>() * (SAXPY_HEAD + 2 * SAXPY_ELEMENTS))
        .queue_capacity(SAXPY_CAPACITY)
        .shader(built_in!("saxpy"))
        .cuda(built_in_ptx!("saxpy"))
        .metal(built_in_source!("saxpy"))
        .cpu_handler(|request, context| {
            let bad = |text| HandlerError::new(HandlerError::BAD_REQUEST, text);
            let words: &[u32] = bytemuck::try_cast_slice(request.payload())
                .map_err(|_| bad("payload is not whole words"))?;
            let [a, n, vectors @ ..] = words else {
                return Err(bad("payload has no a and n"));
            };
            let n = *n as usize;
            if n.checked_mul(2) != Some(vectors.len()) {
                return Err(bad("payload is not two vectors of n"));
            }
            let a = f32::from_bits(*a);
            let (x, y) = vectors.split_at(n);
            context.reply_in_place(|body| {
                let length = n * size_of::<f32>();
                let out = body
                    .get_mut(..length)
                    .and_then(|bytes| bytemuck::try_cast_slice_mut::<u8, f32>(bytes).ok())
                    .ok_or_else(|| {
                        HandlerError::new(HandlerError::REPLY_TOO_LARGE, "reply exceeds the slot")
                    })?;
                for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
                    *out = a * f32::from_bits(*x) + f32::from_bits(*y);
                }
                Ok(length)
            })
        })
}

/// Writes a `saxpy` request into `payload` and returns its length in bytes, or `None` if the vectors differ in length
/// or `payload` is too small. Does not allocate.
///
/// ```
/// let mut payload = [0; 24];
/// let length = ringkernel::kernel::saxpy_request(2.0, &[1.0, 2.0], &[10.0, 20.0], &mut payload);
/// assert_eq!(length, Some(24));
/// ```
#[must_use]
pub fn saxpy_request(a: f32, x: &[f32], y: &[f32], payload: &mut [u8]) -> Option<usize> {
    if x.len() != y.len() {
        return None;
    }
    let length = size_of::<u32>() * (SAXPY_HEAD + x.len() + y.len());
    let payload = payload.get_mut(..length)?;
    let n = u32::try_from(x.len()).ok()?;
    let words = [a.to_bits(), n]
        .into_iter()
        .chain(x.iter().chain(y).map(|value| value.to_bits()));
    for (bytes, word) in payload.chunks_exact_mut(size_of::<u32>()).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Some(length)
}

/// The vector in a `saxpy` reply. Does not allocate.
pub fn saxpy_reply(payload: &[u8]) -> impl Iterator<Item = f32> {
    payload.chunks_exact(size_of::<f32>()).map(|bytes| {
        let mut word = [0; size_of::<f32>()];
        word.copy_from_slice(bytes);
        f32::from_ne_bytes(word)
    })
}
