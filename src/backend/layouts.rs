//! For tests: what the preludes say of layouts, held against the structures of the host.

use std::collections::HashMap;

use super::block::NO_KIND;
use crate::error::HandlerError;
use crate::kernel::{
    CLOCK_OFFSETS, CONTROL_VALUES, DeviceLines, HostLine, TELEMETRY_BUFFER_BYTES, TRACE_OFFSETS,
    TRACE_SLOTS, TelemetryBuffer, TraceHeader, TypeTable,
};
use crate::message::{EXTENSION_BYTES, FLAG_MASKS, HEADER_BYTES};
use crate::ring::{CURSOR_BYTES, LINE_BYTES, SlotHeader};

/// A prelude's unsigned constants, by name.
pub(super) fn constants<'a>(
    pairs: impl Iterator<Item = (&'a str, &'a str)>,
) -> HashMap<&'a str, u64> {
    pairs
        .filter_map(|(name, value)| {
            let value = value.trim().strip_suffix('u')?;
            let value = match value.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => value.parse(),
            };
            Some((name.trim(), value.ok()?))
        })
        .collect()
}

/// Takes every constant out that speaks of memory which host and device share, and compares it.
pub(super) fn check(constants: &mut HashMap<&str, u64>) {
    let mut check = |name: &str, expected: u64| {
        assert_eq!(constants.remove(name), Some(expected), "{name}");
    };
    let words = |bytes: usize| bytes as u64 / 4;
    check("RK_HEADER_WORDS", words(HEADER_BYTES));
    check("RK_EXTENSION_WORDS", words(EXTENSION_BYTES));
    check("RK_CURSOR_WORDS", words(CURSOR_BYTES));
    let names = ["SEQUENCE", "CORRELATION", "LENGTH_FLAGS", "KIND_LANE"];
    for (name, offset) in names.into_iter().zip(SlotHeader::OFFSETS) {
        check(&format!("RK_HEADER_{name}"), words(offset));
    }
    let names = ["LENGTH_MASK", "PRIORITY_MASK", "ERROR_BIT", "EXTENDED_BIT"];
    for (name, mask) in names.into_iter().zip(FLAG_MASKS) {
        check(&format!("RK_{name}"), mask.into());
    }
    for (name, offset) in HostLine::OFFSETS {
        check(&format!("RK_HOST_{name}"), words(offset));
    }
    for (name, offset) in DeviceLines::OFFSETS {
        check(&format!("RK_DEVICE_{name}"), words(offset));
    }
    check("RK_DEVICE_WORDS", words(size_of::<DeviceLines>()));
    check("RK_HOST_WORDS", words(size_of::<HostLine>()));
    check("RK_LINK_WORDS", words(LINE_BYTES));
    check("RK_STATE_UNIT", words(LINE_BYTES));
    check("RK_NO_KIND", NO_KIND.into());
    check("RK_MAX_KINDS", TypeTable::MAX_TYPES as u64);
    for (name, offset) in TelemetryBuffer::OFFSETS {
        check(&format!("RK_TELEMETRY_{name}"), words(offset));
    }
    for (name, value) in CONTROL_VALUES {
        check(&format!("RK_{name}"), value.into());
    }
    check("RK_BAD_REQUEST", HandlerError::BAD_REQUEST.into());
    check("RK_REPLY_TOO_LARGE", HandlerError::REPLY_TOO_LARGE.into());
}

/// The same for what only preludes with addresses have: ways to other kernels' rings.
pub(super) fn check_ways(constants: &mut HashMap<&str, u64>) {
    let mut check = |name: &str, expected: usize| {
        assert_eq!(constants.remove(name), Some(expected as u64), "{name}");
    };
    for (name, offset) in HostLine::WAY_OFFSETS {
        check(&format!("RK_HOST_{name}"), offset / 4);
    }
    check("RK_DEVICE_WAY_TAKEN", DeviceLines::WAY_TAKEN / 4);
}

/// The same for what only preludes with a clock have: traces. Kernels of some tell it when they are asked, others are told what it lacks.
pub(super) fn check_traces(constants: &mut HashMap<&str, u64>, tells_clock: bool) {
    let mut check = |name: &str, expected: usize| {
        assert_eq!(constants.remove(name), Some(expected as u64), "{name}");
    };
    if tells_clock {
        check("RK_HOST_CLOCK_ASKED", HostLine::CLOCK_ASKED / 4);
        for (name, offset) in CLOCK_OFFSETS {
            check(&format!("RK_TRACE_{name}"), offset / 4);
        }
    } else {
        check("RK_HOST_CLOCK_HALF", HostLine::CLOCK_HALF / 4);
    }
    check("RK_TELEMETRY_WORDS", TELEMETRY_BUFFER_BYTES / 4);
    check("RK_TRACE_SLOTS", TRACE_SLOTS as usize);
    check("RK_TRACE_WORDS", size_of::<TraceHeader>() / 4);
    for (name, offset) in TRACE_OFFSETS {
        check(&format!("RK_TRACE_{name}"), offset / 4);
    }
}

/// The words of a structure that opens like this, in order.
pub(super) fn fields<'a>(prelude: &'a str, opening: &str) -> Vec<&'a str> {
    let body = prelude
        .split(opening)
        .nth(1)
        .and_then(|rest| rest.split('}').next());
    body.unwrap_or("")
        .lines()
        .filter_map(|line| line.trim().strip_prefix("uint ")?.split(';').next())
        .collect()
}

/// The fields of a structure of the host, as `Debug` shows them.
pub(super) fn debug_fields(debug: &str) -> Vec<&str> {
    let body = debug.split('{').nth(1).unwrap_or("").trim_end_matches('}');
    body.split(',')
        .filter_map(|field| field.split(':').next())
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect()
}
