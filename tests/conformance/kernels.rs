//! Kernels that the suite launches, beside the built-in ones.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ringkernel::error::HandlerError;
use ringkernel::{
    HandlerResult, KernelContext, KernelRegistration, PortableCode, Request, ring_message,
};
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Add {
    pub left: u64,
    pub right: u64,
    /// Not every byte is a valid `bool`, so that a message can be corrupt.
    pub negate: bool,
}
ring_message!(Add, "test.Add.v1");

#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    pub value: i128,
}
ring_message!(Sum, "test.Sum.v1");

#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stranger {
    pub value: u8,
}
ring_message!(Stranger, "test.Stranger.v1");

/// Lets the handlers of `gated` go on.
pub static GATE_OPEN: AtomicBool = AtomicBool::new(false);

/// Lets the handlers of `stuck` go on.
pub static UNSTUCK: AtomicBool = AtomicBool::new(false);

/// Code of the error that `add` answers an overflow with.
pub const OVERFLOW: u32 = 7;

/// A kernel's committed module for Vulkan, and the one with traces.
macro_rules! module {
    ($name:literal) => {
        // SAFETY: a module of our own, validated when it is built.
        unsafe {
            ringkernel::ShaderCode::spirv(
                include_bytes!(concat!("../shaders/", $name, ".spv")).as_slice(),
            )
        }
    };
    ($name:literal with traces) => {{
        let plain = module!($name);
        // SAFETY: as above.
        unsafe {
            plain.traced(include_bytes!(concat!("../shaders/", $name, ".traced.spv")).as_slice())
        }
    }};
}

// Not every test file has kernels beside these.
#[allow(unused_imports)]
pub(super) use module;

/// The source of the same, for other devices.
macro_rules! source {
    ($name:literal) => {
        PortableCode::new(include_str!(concat!("../kernels/", $name, ".rk")))
    };
}

pub fn all() -> Vec<KernelRegistration> {
    vec![
        KernelRegistration::new("test.add")
            .shader(module!("add" with traces))
            .portable(source!("add"))
            .typed_cpu_handler::<Add, Sum, _>(|add, _| {
                let sum = add
                    .left
                    .to_native()
                    .checked_add(add.right.to_native())
                    .ok_or_else(|| HandlerError::new(OVERFLOW, "overflow"))?;
                let value = i128::from(sum);
                Ok(Sum {
                    value: if add.negate { -value } else { value },
                })
            }),
        // Replies with its block, and how many messages the block has had.
        KernelRegistration::new("test.count")
            .shader(module!("count"))
            .portable(source!("count"))
            .any_message()
            .state_size(8)
            .cpu_handler(|_, context| {
                let count = context.state_as::<u64>()?;
                *count += 1;
                let (count, block) = (*count, context.block_index());
                let mut reply = [0; 12];
                reply[..8].copy_from_slice(&count.to_ne_bytes());
                reply[8..].copy_from_slice(&block.to_ne_bytes());
                context.reply_bytes(&reply)
            }),
        // The first byte says how many replies are wanted; each carries its index.
        KernelRegistration::new("test.repeat")
            .shader(module!("repeat"))
            .portable(source!("repeat"))
            .cpu_handler(|request, context| {
                for index in 0..request.payload().first().copied().unwrap_or(0) {
                    context.reply_bytes(&[index])?;
                }
                Ok(())
            }),
        // Echoes once `GATE_OPEN` is set.
        KernelRegistration::new("test.gated")
            .any_message()
            .cpu_handler(|request, context| {
                while !GATE_OPEN.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_micros(100));
                }
                context.echo(request)
            }),
        // Never returns until `UNSTUCK` is set.
        KernelRegistration::new("test.stuck")
            .shader(module!("endless"))
            .portable(source!("endless"))
            .cpu_handler(|_, _| {
                while !UNSTUCK.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            }),
        // Panics on `panic`, echoes anything else.
        KernelRegistration::new("test.panic")
            .shader(module!("fault"))
            .portable(source!("fault"))
            .cpu_handler(|request, context| {
                assert!(request.payload() != b"panic", "told to panic");
                context.echo(request)
            }),
        // Sleeps for the payload's milliseconds, then echoes.
        KernelRegistration::new("test.sleep")
            .shader(module!("sleep" with traces))
            .portable(source!("sleep"))
            .cpu_handler(|request, context| {
                let millis = request.payload().first().copied().unwrap_or(0);
                std::thread::sleep(Duration::from_millis(millis.into()));
                context.echo(request)
            }),
        // Says what it sees around itself.
        KernelRegistration::new("test.context")
            .any_message()
            .state_size(100)
            .cpu_handler(|request, context| {
                let state_bytes = context.state().len();
                let text = format!(
                    "{} {} {:?} {:?} {} {}",
                    context.kernel(),
                    context.block_index(),
                    context.grid_size(),
                    context.block_size(),
                    state_bytes,
                    request.payload().as_ptr().addr() % 16,
                );
                context.reply_bytes(text.as_bytes())
            }),
        // What all devices count, add and compare alike; see its source.
        KernelRegistration::new("test.numbers")
            .shader(module!("numbers").loop_iterations(200))
            .portable(source!("numbers"))
            .cpu_handler(numbers),
        // Makes the access that it is told to, on devices alone; see its source.
        bounds("test.bounds").state_size(20),
        bounds("test.bounds.stateless"),
        // A device that writes what it should not, in shaders alone.
        KernelRegistration::new("test.hostile")
            .any_message()
            .shader(module!("hostile")),
        // Loops as often as it is told, in shaders alone; declares 25 000 iterations.
        KernelRegistration::new("test.loops").shader(module!("loops").loop_iterations(25_000)),
        // Writes an `Add` whose bool is neither true nor false.
        KernelRegistration::new("test.corrupt")
            .shader(module!("corrupt"))
            .portable(source!("corrupt"))
            .message::<Add>()
            .cpu_handler(|request, context| {
                let mut add = *request.payload().first_chunk::<24>().unwrap();
                // `negate` is the last field of 17 bytes, padded to 24.
                add[16] = 2;
                context.reply_as::<Add>(&add)
            }),
        // Answers with more than any of its slots holds.
        KernelRegistration::new("test.too_large")
            .shader(module!("too_large"))
            .portable(source!("too_large"))
            .cpu_handler(|_, context| context.reply_bytes(&[0; 1 << 16])),
    ]
}

/// `tests/kernels/bounds.rk`.
fn bounds(id: &str) -> KernelRegistration {
    KernelRegistration::new(id)
        .shader(module!("bounds").loop_iterations(200))
        .portable(source!("bounds").loop_iterations(200))
}

/// `tests/kernels/numbers.rk` for one thread.
fn numbers(request: &Request<'_>, context: &mut KernelContext<'_, '_>) -> HandlerResult {
    let words: Vec<u32> = request
        .payload()
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
        .collect();
    context.reply_bytes(&numbers_of(&words, 1, true))
}

/// What `test.numbers` answers on a block of so many threads, with or without 64-bit floats.
pub fn numbers_of(words: &[u32], threads: usize, has_f64: bool) -> [u8; 56] {
    let wide = |index: usize| u64::from(words[index]) | u64::from(words[index + 1]) << 32;
    let bits = &words[5..];
    let floats: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
    // Each thread adds every `threads`-th; then halves are added to halves.
    let mut sums: Vec<f32> = (0..threads)
        .map(|thread| {
            floats
                .iter()
                .skip(thread)
                .step_by(threads)
                .fold(0.0, |sum, value| sum + value)
        })
        .collect();
    let mut span = threads.next_power_of_two() / 2;
    while span > 0 {
        for thread in 0..span {
            if thread + span < threads {
                sums[thread] += sums[thread + span];
            }
        }
        span /= 2;
    }
    let c = f64::from_bits(wide(3));
    let b = wide(1).wrapping_mul(3).wrapping_add(1);
    let least = floats.iter().copied().fold(f32::INFINITY, f32::min);
    let greatest = floats.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let square = if has_f64 { (c * c).to_bits() } else { 0 };
    let answer = [
        threads as u32,
        words[0].wrapping_neg(),
        b as u32,
        (b >> 32) as u32,
        square as u32,
        (square >> 32) as u32,
        sums[0].to_bits(),
        least.to_bits(),
        greatest.to_bits(),
        bits.iter()
            .fold(0, |sum: u32, bits| sum.wrapping_add(*bits)),
        bits.iter().copied().min().unwrap_or(u32::MAX),
        bits.iter().copied().max().unwrap_or(0),
        1000 + threads as u32 - 1,
        has_f64.into(),
    ];
    let mut bytes = [0; 56];
    for (to, word) in bytes.chunks_exact_mut(4).zip(answer) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// Opens a gate for as long as it lives, also when a test fails.
pub struct Opened(&'static AtomicBool);

impl Opened {
    pub fn new(gate: &'static AtomicBool) -> Self {
        gate.store(true, Ordering::Release);
        Self(gate)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}
