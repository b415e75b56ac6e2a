//! Whatever lies in a ring's memory, reading it neither panics nor leaves that memory.
#![no_main]

#[path = "../../slot_bytes/mod.rs"]
mod slot_bytes;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    slot_bytes::read_a_ring_of(bytes);
    if let [slot, word, value @ ..] = bytes
        && let Some(value) = value.first_chunk()
    {
        slot_bytes::read_a_ring_with_a_bad_word(
            usize::from(*slot),
            usize::from(*word),
            u32::from_ne_bytes(*value),
        );
    }
});
