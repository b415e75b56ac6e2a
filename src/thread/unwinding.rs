//! Whether a panic that has just begun ends where we catch it, or in code of the crate's user that
//! catches it before.
//!
//! A panic hook runs before the stack is unwound. It may take long: one that prints a backtrace
//! some 300 ms. What a panic leads to can be told before that only if it is known that nothing on
//! the way catches it. The unwinder finds that in tables, and so does this: the language-specific
//! data of each frame (Itanium C++ ABI: Exception Handling, section 7), as
//! `library/std/src/sys/personality/dwarf/eh.rs` reads it for Rust.

/// Whether a frame between this one and that of a local variable at the address `end` catches a
/// panic; the frame of the variable itself does not count. `None` if that cannot be told here: also
/// where this frame is not below the variable, as on a stack of its own that a coroutine runs on.
pub(crate) fn catches_before(end: usize) -> Option<bool> {
    imp::catches_before(end)
}

#[cfg(all(unix, panic = "unwind", not(target_arch = "arm")))]
mod imp {
    use core::ffi::{c_int, c_void};
    use core::ptr;

    /// `_URC_NO_REASON`, with which a walk goes on, and any other, with which it ends.
    const GO_ON: c_int = 0;
    const END: c_int = 4;

    /// `DW_EH_PE_omit`.
    const OMITTED: u8 = 0xff;

    /// Longest table that is believed: none of a real function comes near.
    const LONGEST: usize = 1 << 24;

    type Callback = extern "C" fn(*mut c_void, *mut c_void) -> c_int;

    // The platform's unwinder, which std links for panics.
    unsafe extern "C" {
        fn _Unwind_Backtrace(callback: Callback, argument: *mut c_void) -> c_int;
        fn _Unwind_GetCFA(context: *mut c_void) -> usize;
        fn _Unwind_GetIPInfo(context: *mut c_void, before: *mut c_int) -> usize;
        fn _Unwind_GetRegionStart(context: *mut c_void) -> usize;
        fn _Unwind_GetLanguageSpecificData(context: *mut c_void) -> *const u8;
    }

    struct Walk {
        end: usize,
        /// Whether a frame was seen below the variable.
        is_below: bool,
        /// Whether the frame that was seen last catches.
        catches: bool,
        found: Option<bool>,
    }

    pub(super) fn catches_before(end: usize) -> Option<bool> {
        let mut walk = Walk {
            end,
            is_below: false,
            catches: false,
            found: None,
        };
        // SAFETY: `frame` takes the pointer for what it is, a `Walk` that outlives the call.
        unsafe { _Unwind_Backtrace(frame, (&raw mut walk).cast()) };
        walk.found
    }

    /// Sees one frame, from the innermost one on.
    extern "C" fn frame(context: *mut c_void, argument: *mut c_void) -> c_int {
        // SAFETY: the argument is the `Walk` of `catches_before`, which nothing else uses
        // meanwhile.
        let walk = unsafe { &mut *argument.cast::<Walk>() };
        // SAFETY: the unwinder's own context of this frame. What it calls so is the frame's stack
        // pointer: where the frame that was seen last ends.
        let stack = unsafe { _Unwind_GetCFA(context) };
        if stack > walk.end {
            // The last frame holds the variable; if there is none, another stack does.
            walk.found = walk.is_below.then_some(false);
            return END;
        }
        walk.is_below = true;
        if walk.catches {
            walk.found = Some(true);
            return END;
        }
        // SAFETY: the unwinder's own context.
        match unsafe { catches(context) } {
            Some(catches) => {
                walk.catches = catches;
                GO_ON
            }
            None => END,
        }
    }

    /// Whether the call that a frame is in has a handler that catches. `None` if its tables cannot
    /// be read.
    ///
    /// # Safety
    /// `context` must be that of the unwinder for the frame.
    unsafe fn catches(context: *mut c_void) -> Option<bool> {
        let mut before = 0;
        // SAFETY: as the caller promises.
        let (data, ip, start) = unsafe {
            (
                _Unwind_GetLanguageSpecificData(context),
                _Unwind_GetIPInfo(context, &raw mut before),
                _Unwind_GetRegionStart(context),
            )
        };
        if data.is_null() {
            // It has nothing to clean up, and catches nothing.
            return Some(false);
        }
        // The address is behind the call, which may be the last instruction of its region.
        let ip = if before == 0 { ip.wrapping_sub(1) } else { ip };
        // SAFETY: the tables of a loaded function, in the one format that the compilers of this
        // platform write.
        unsafe { action(Reader(data), ip.wrapping_sub(start)) }
    }

    /// Whether the entry of a function's tables for the instruction at this offset catches.
    ///
    /// # Safety
    /// The reader must be at the beginning of a function's language-specific data.
    unsafe fn action(mut reader: Reader, ip: usize) -> Option<bool> {
        // SAFETY: each item is there, as the format has it; what follows is read only as far as its
        // lengths say.
        unsafe {
            let landing_pads = reader.byte();
            if landing_pads != OMITTED {
                let _ = reader.encoded(landing_pads)?;
            }
            if reader.byte() != OMITTED {
                let _ = reader.uleb();
            }
            let encoding = reader.byte();
            let length = reader.uleb();
            if length > LONGEST {
                return None;
            }
            let actions = reader.0.add(length);
            while reader.0 < actions {
                let start = reader.encoded(encoding)?;
                let bytes = reader.encoded(encoding)?;
                let pad = reader.encoded(encoding)?;
                let entry = reader.uleb();
                if ip < start {
                    break;
                }
                if ip < start.wrapping_add(bytes) {
                    return if pad == 0 || entry == 0 {
                        Some(false)
                    } else {
                        chain_catches(Reader(actions.add(entry - 1)))
                    };
                }
            }
            // No entry: the unwinder ends the process there. It does not catch.
            Some(false)
        }
    }

    /// Whether one of the actions of a landing pad catches.
    ///
    /// # Safety
    /// The reader must be at an entry of an action table.
    unsafe fn chain_catches(mut reader: Reader) -> Option<bool> {
        for _ in 0..64 {
            // SAFETY: each entry is a filter and the distance to the next one, from where that
            // distance lies.
            unsafe {
                if reader.sleb() > 0 {
                    return Some(true);
                }
                let here = reader.0;
                let distance = reader.sleb();
                if distance == 0 {
                    return Some(false);
                }
                reader.0 = here.offset(distance);
            }
        }
        None
    }

    /// Reads the tables on.
    struct Reader(*const u8);

    impl Reader {
        /// # Safety
        /// There must be such an item.
        unsafe fn take<T>(&mut self) -> T {
            // SAFETY: as the caller promises; items are not aligned.
            unsafe {
                let item = ptr::read_unaligned(self.0.cast::<T>());
                self.0 = self.0.add(size_of::<T>());
                item
            }
        }

        /// # Safety
        /// As for `take`.
        unsafe fn byte(&mut self) -> u8 {
            // SAFETY: as the caller promises.
            unsafe { self.take() }
        }

        /// # Safety
        /// As for `take`.
        unsafe fn uleb(&mut self) -> usize {
            let (mut value, mut shift) = (0_usize, 0_u32);
            loop {
                // SAFETY: as the caller promises: the last byte of an item says that it is.
                let byte = unsafe { self.byte() };
                value |= usize::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
                shift += 7;
                if byte & 0x80 == 0 {
                    return value;
                }
            }
        }

        /// # Safety
        /// As for `take`.
        unsafe fn sleb(&mut self) -> isize {
            let (mut value, mut shift) = (0_isize, 0_u32);
            loop {
                // SAFETY: as the caller promises.
                let byte = unsafe { self.byte() };
                value |= isize::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
                shift += 7;
                if byte & 0x80 == 0 {
                    if byte & 0x40 != 0 && shift < isize::BITS {
                        value |= -1 << shift;
                    }
                    return value;
                }
            }
        }

        /// An offset, in the format that the encoding's lower half names (DWARF, `DW_EH_PE_*`);
        /// `None` if there is none such.
        ///
        /// # Safety
        /// As for `take`.
        unsafe fn encoded(&mut self, encoding: u8) -> Option<usize> {
            // SAFETY: as the caller promises.
            unsafe {
                Some(match encoding & 0x0f {
                    0x00 => self.take::<usize>(),
                    0x01 => self.uleb(),
                    0x02 => self.take::<u16>().into(),
                    0x03 => self.take::<u32>() as usize,
                    0x04 => self.take::<u64>() as usize,
                    0x09 => self.sleb() as usize,
                    0x0a => self.take::<i16>() as usize,
                    0x0b => self.take::<i32>() as usize,
                    0x0c => self.take::<i64>() as usize,
                    _ => return None,
                })
            }
        }
    }
}

// Windows has tables of another kind, and 32-bit ARM an unwinder of another kind.
#[cfg(not(all(unix, panic = "unwind", not(target_arch = "arm"))))]
mod imp {
    pub(super) fn catches_before(_end: usize) -> Option<bool> {
        None
    }
}

#[cfg(all(
    test,
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
mod tests {
    use std::hint::black_box;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Something to clean up on the way.
    struct Cleanup(u32);

    impl Drop for Cleanup {
        fn drop(&mut self) {
            black_box(self.0);
        }
    }

    type Ask<'a> = &'a mut dyn FnMut();

    #[inline(never)]
    fn deeper(ask: Ask<'_>) {
        let cleanup = Cleanup(1);
        ask();
        black_box(&cleanup);
    }

    #[inline(never)]
    fn catching(ask: Ask<'_>) {
        let _ = black_box(catch_unwind(AssertUnwindSafe(|| deeper(ask))));
    }

    /// Has caught, but does not catch where it asks.
    #[inline(never)]
    fn has_caught(ask: Ask<'_>) {
        let caught = catch_unwind(|| {
            if black_box(true) {
                std::panic::resume_unwind(Box::new(()));
            }
        });
        assert!(caught.is_err());
        deeper(ask);
    }

    /// What is found below a frame of its own, which `body` is given to call.
    #[inline(never)]
    fn found_below(body: fn(Ask<'_>)) -> Option<bool> {
        let mut found = None;
        // Ours, around the variable whose address counts.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let end = black_box(0_u8);
            let address = (&raw const end).addr();
            black_box(body)(&mut || found = catches_before(address));
            black_box(end)
        }));
        assert!(outcome.is_ok());
        found
    }

    #[test]
    fn a_frame_that_catches_on_the_way_is_found_and_no_other() {
        assert_eq!(found_below(deeper), Some(false));
        assert_eq!(found_below(catching), Some(true));
        assert_eq!(found_below(has_caught), Some(false));
        assert_eq!(found_below(|ask| deeper(&mut || catching(ask))), Some(true));
        assert_eq!(found_below(|ask| catching(&mut || deeper(ask))), Some(true));
        // The thread's own first frames catch.
        assert_eq!(catches_before(usize::MAX), Some(true));
        // A variable that is on no stack below which this frame lies.
        assert_eq!(catches_before(0), None);
    }
}
