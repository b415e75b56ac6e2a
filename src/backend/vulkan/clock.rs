//! The clock that shaders read, held against the one that the driver tells.
//!
//! Nothing says that `clockRealtimeEXT` is the clock of `VK_TIME_DOMAIN_DEVICE`: the extension leaves its units and its beginning open. So a traced
//! kernel is run between stamps of the driver: what its shader read must lie between them. Measured on lavapipe of Mesa 22.3: both are
//! `CLOCK_MONOTONIC` in nanoseconds, but of what the shader reads the high word is always 0, so that it wraps around every 4.3 s. Such a
//! clock is completed by what the host tells ([`SliceKernel::tell_clock_half`](super::slice_kernel::SliceKernel::tell_clock_half)).

use std::sync::Arc;

use super::context::Context;
use super::device::VulkanDevice;
use super::probe;
use crate::backend::DriverClock;
use crate::backend::probe::{ClockReading, read_clock};
use crate::logging;

/// A shader's clock that is the driver's as well.
#[derive(Debug)]
pub(super) struct ShaderClock {
    context: Arc<Context>,
    found: Found,
}

/// Readings that say what a clock is.
const LEAST_READINGS: usize = 4;

impl ClockReading {
    /// Whether it took less than half of what the low word of a clock counts.
    fn is_short(&self) -> bool {
        self.after.wrapping_sub(self.before) < 1 << 31
    }
}

/// What readings of a clock show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    /// Whether the shader sees the low word alone.
    short: bool,
    step: u64,
}

impl ShaderClock {
    /// Whether the shader sees the low word alone.
    pub(super) fn is_short(&self) -> bool {
        self.found.short
    }
}

impl DriverClock for ShaderClock {
    fn ticks(&self) -> Option<u64> {
        self.context.ticks()
    }

    fn step(&self) -> u64 {
        self.found.step
    }
}

/// Tries the clock of a device: some milliseconds. Whether it is of use, or why not; an error if that was not found out this time.
pub(super) fn probe(
    device: &VulkanDevice,
    context: &Arc<Context>,
) -> Result<Result<Arc<ShaderClock>, String>, String> {
    if !context.physical.features.device_clock {
        return Ok(Err("its shaders cannot read a clock".into()));
    }
    if !context.physical.tells_clock {
        return Ok(Err("the driver does not tell the device's clock".into()));
    }
    let mut readings = read_clock(device, &probe::traced_echo(), || context.ticks())
        .map_err(|error| error.to_string())??;
    // Of a clock without its high word those that took long say nothing: it may have been around
    // once more.
    readings.retain(ClockReading::is_short);
    if readings.len() < LEAST_READINGS {
        return Err(
            "it was slow: too few readings took less than half a range of the clock".into(),
        );
    }
    Ok(judge(&readings).map(|found| {
        logging::debug!("device '{}': clock: {found:?}", context.name());
        Arc::new(ShaderClock {
            context: Arc::clone(context),
            found,
        })
    }))
}

/// Whether what a shader read is the clock of the stamps before and after.
fn judge(readings: &[ClockReading]) -> Result<Found, String> {
    let times = || {
        readings
            .iter()
            .flat_map(|reading| [reading.seen, reading.done])
    };
    // One that shows no high word may have none: that of one which has is the same.
    let short = times().all(|time| u32::try_from(time).is_ok());
    let step = times().zip(times().skip(1)).fold(0, |step, (a, b)| {
        let passed = match short {
            true => (b as u32).wrapping_sub(a as u32).into(),
            false => b.abs_diff(a),
        };
        common_divisor(step, passed)
    });
    if step == 0 {
        return Err("its shaders' clock stands still".into());
    }
    let within = readings.iter().all(|reading| {
        // The clock shows the last of its steps.
        let from = reading.before.saturating_sub(step);
        let whole = |time: u64| match short {
            // Stamps are far less than the range apart.
            true => from + u64::from((time as u32).wrapping_sub(from as u32)),
            false => time,
        };
        let (seen, done) = (whole(reading.seen), whole(reading.done));
        from <= seen && seen <= done && done <= reading.after
    });
    if within {
        Ok(Found { short, step })
    } else {
        Err(format!(
            "its shaders' clock is not the one that the driver tells: {:?}",
            readings.first()
        ))
    }
}

fn common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Readings 10 us apart of a clock that shows `shows` of what the driver's does, from there on.
    fn readings(from: u64, shows: impl Fn(u64) -> u64) -> Vec<ClockReading> {
        let readings = (0..16).map(|index| {
            let before = from + index * 10_007;
            ClockReading {
                before,
                seen: shows(before + 301 + index * 58 % 256),
                done: shows(before + 633 + index),
                after: before + 1400,
            }
        });
        readings.collect()
    }

    /// A busy machine between two stamps.
    #[test]
    fn readings_that_took_long_say_nothing() {
        let mut slow = readings(7 << 32, |now| now & 0xffff_ffff);
        slow[3].after += 1 << 33;
        // Around once, and not as far again as it was.
        slow[5].done = slow[5].seen - 100;
        slow[5].after += 1 << 32;
        assert!(judge(&slow).is_err());
        slow.retain(ClockReading::is_short);
        assert_eq!(slow.len(), 14);
        assert!(judge(&slow).is_ok());
    }

    #[test]
    fn a_clock_that_the_driver_tells_is_known() {
        let days = 1 << 50;
        assert_eq!(
            judge(&readings(days, |now| now)),
            Ok(Found {
                short: false,
                step: 1
            })
        );
        let coarse = judge(&readings(days, |now| now / 512 * 512));
        assert_eq!(
            coarse,
            Ok(Found {
                short: false,
                step: 512
            })
        );
    }

    #[test]
    fn a_clock_without_its_high_word_is_known_wherever_it_is() {
        let short = Found {
            short: true,
            step: 1,
        };
        for from in [7_u64 << 32, (8 << 32) - 80_000, (8 << 32) - 20, 100_000] {
            let found = judge(&readings(from, |now| now & 0xffff_ffff));
            assert_eq!(found, Ok(short), "{from:#x}");
            // In steps that do not divide the range.
            let found = judge(&readings(from, |now| (now / 40 * 40) & 0xffff_ffff));
            assert_eq!(found, Ok(Found { step: 40, ..short }), "{from:#x}");
        }
    }

    #[test]
    fn another_clock_is_refused() {
        let from = 1 << 50;
        let refused = |shows: &dyn Fn(u64) -> u64| judge(&readings(from, shows)).unwrap_err();
        assert!(refused(&|_| 7).contains("stands still"));
        for reason in [
            // Of another beginning, by little and by much; of another rate; of other units; that goes backwards.
            refused(&|now| now + 1_000),
            refused(&|now| now - 1_000),
            refused(&|now| now + (1 << 41)),
            refused(&|now| (now - (1 << 41)) & 0xffff_0fff),
            refused(&|now| (now + 20_000) & 0xffff_ffff),
            refused(&|now| from + (now - from) / 2),
            refused(&|now| now * 3),
            refused(&|now| 2 * from - now),
        ] {
            assert!(reason.contains("not the one"), "{reason}");
        }
    }
}
