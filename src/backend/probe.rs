//! Whether host and running kernel really exchange messages on a device: tried, with verified content, before anything relies
//! on it.
//!
//! How busy the machine is decides nothing. A message that comes back from the very dispatch that
//! ran when it was sent shows that running dispatches see what the host writes, however long it
//! took. Only a device that is seen to go on, and of whose messages none ever comes back so, does
//! not see them. What shows neither is slow, and is tried again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::resident::life;
use super::stall::Stall;
use super::{
    BlockLayout, BlockMemory, Device, DispatchRequest, GridMemory, Handler, HostConsumer,
    HostProducer,
};
use crate::error::Error;
#[cfg(feature = "vulkan")]
use crate::kernel::read_samples;
use crate::kernel::signals::KernelSignals;
use crate::kernel::{BlockState, Dim3, TRACE_SLOTS, TypeTable};
use crate::message::Envelope;
use crate::ring::RingLayout;
use crate::thread::KernelWait;
use crate::time::Deadline;

/// Slots of the probe's rings: few, so that they wrap around many times.
const CAPACITY: usize = 16;

/// Payload of the probe's messages: more than a line, so that a torn message would show.
const PAYLOAD: usize = 200;

/// Messages that must come back, and how many are in flight at once at most.
const MESSAGES: u32 = 256;
const DEPTH: u32 = 8;

/// How many that came back while the slice that took them still ran are enough; the others may have
/// met a seam.
const ENOUGH: u32 = 8;

/// Exchanges of a few messages each that an attempt makes while none comes back from the dispatch
/// that ran when it was sent. None in all attempts together is no chance: on a busy machine one
/// message in four came back so.
const UNSEEN_ROUNDS: u32 = 8;

/// Longest pause between two looks for a reply in an exchange that says something: a thread that is
/// held up finds the reply when other slices run already.
const PROMPT: Duration = Duration::from_micros(500);

/// Slices after which a message that has not come back never will: more than two command buffers
/// hold.
const SLICES_TO_SEE: u32 = 256;

/// Position of the first one: they cross the wrap-around of positions.
const START: u32 = u32::MAX - MESSAGES / 2;

/// How long an attempt may take, and how long nothing may come of it meanwhile. Milliseconds are
/// usual; the rest is for machines without a core to spare.
const TIMEOUT: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_secs(3);

/// For the first slice, which a driver may compile the kernel for, and for the last one.
const START_TIMEOUT: Duration = Duration::from_secs(15);

/// Block sizes that are tried: more than one SIMD group or warp, and the least. They are held together differently.
pub(crate) const BLOCK_SIZES: [u32; 2] = [64, 1];

/// Attempts with each block size, while they are slow: at least so many, and for so long.
const ATTEMPTS: u32 = 3;
const ATTEMPTS_TIME: Duration = Duration::from_secs(10);

/// What one attempt, or several, showed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) sent: u32,
    pub(crate) received: u32,
    /// Those that came back from the dispatch that ran when they were sent.
    pub(crate) mid_slice: u32,
    /// Exchanges that were completed, and of which the host saw each step at once.
    rounds: u32,
    /// Whether those that did not come back had slices enough to be seen by.
    is_lost: bool,
}

/// Why an attempt did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// The device does what it should not, however fast it is.
    Broken(String),
    /// Too little time, for whatever reason.
    Slow(String),
}

/// Tries the device. What was seen, or why messages do not reach a running dispatch as far as that
/// is known.
pub(crate) fn run(device: &dyn Device, echo: &Handler) -> Result<Result<String, String>, Error> {
    let begin = Instant::now();
    let mut all = Seen::default();
    let mut is_slow = false;
    for block_size in BLOCK_SIZES {
        match judge(ATTEMPTS_TIME, || {
            run_block(device, echo, block_size, UNSEEN_ROUNDS)
        })? {
            Ok((seen, slow)) => {
                all.sent += seen.sent;
                all.received += seen.received;
                all.mid_slice += seen.mid_slice;
                is_slow |= slow;
            }
            Err(reason) => return Ok(Err(reason)),
        }
    }
    let slow = match is_slow {
        true => "; it was slow: the machine is busy, or the device is",
        false => "",
    };
    Ok(Ok(format!(
        "the probe saw {} messages echoed, {} of them by a running dispatch, in {:.1?}{slow}",
        all.received,
        all.mid_slice,
        begin.elapsed()
    )))
}

/// Makes attempts until they show something. All that was seen, and whether it took more than one
/// good attempt; or why it is not enough.
fn judge(
    time: Duration,
    mut attempt: impl FnMut() -> Result<Result<Seen, Failed>, Error>,
) -> Result<Result<(Seen, bool), String>, Error> {
    let mut all = Seen::default();
    let mut last = String::new();
    let begin = Instant::now();
    let mut attempts = 0;
    while attempts < ATTEMPTS || begin.elapsed() < time {
        attempts += 1;
        match attempt()? {
            Ok(seen) => {
                all.sent += seen.sent;
                all.received += seen.received;
                all.mid_slice += seen.mid_slice;
                all.rounds += seen.rounds;
                let is_whole = seen.received == MESSAGES;
                if seen.is_lost {
                    return Ok(Err(format!(
                        "{} of {MESSAGES} messages came back; the next one did not, in {SLICES_TO_SEE} slices",
                        seen.received
                    )));
                }
                if all.mid_slice >= ENOUGH {
                    return Ok(Ok((all, !is_whole || attempts > 1)));
                }
                last = format!(
                    "only {} of {} messages were answered by the dispatch that was running when they were sent",
                    all.mid_slice, all.received
                );
                if all.mid_slice == 0 && all.rounds >= ATTEMPTS * UNSEEN_ROUNDS {
                    return Ok(Err(last));
                }
            }
            Err(Failed::Broken(reason)) => return Ok(Err(reason)),
            Err(Failed::Slow(reason)) => last = reason,
        }
        crate::logging::debug!("probe, attempt {attempts}: {last}");
    }
    Ok(match all.mid_slice {
        1.. => Ok((all, true)),
        0 => Err(format!(
            "slow: {attempts} attempts did not show whether a running dispatch sees messages: {last}"
        )),
    })
}

/// What comes back of the messages, and from where; at most so many exchanges if none comes back
/// from a dispatch that ran before.
pub(crate) fn run_block(
    device: &dyn Device,
    echo: &Handler,
    block_size: u32,
    unseen_rounds: u32,
) -> Result<Result<Seen, Failed>, Error> {
    with_echo(
        device,
        echo,
        block_size,
        false,
        |producer, consumer, memory| exchange(producer, consumer, memory, unseen_rounds),
    )
}

/// The fastest round trip of a short message, one at a time: what else the machine does makes no
/// round trip faster.
#[cfg(feature = "cuda")]
pub(crate) fn round_trip(
    device: &dyn Device,
    echo: &Handler,
) -> Result<Result<Duration, String>, Error> {
    let outcome = with_echo(device, echo, 1, false, |producer, consumer, _| {
        time(producer, consumer)
    });
    outcome.map(|outcome| outcome.map_err(Failed::into_reason))
}

/// A reading of a kernel's clock, between two of a clock that the host can read.
#[cfg(feature = "vulkan")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClockReading {
    pub(crate) before: u64,
    pub(crate) seen: u64,
    pub(crate) done: u64,
    pub(crate) after: u64,
}

/// What the clock of a kernel shows that echoes, and is traced, by its samples; `ticks` reads the host's.
#[cfg(feature = "vulkan")]
pub(crate) fn read_clock(
    device: &dyn Device,
    echo: &Handler,
    ticks: impl Fn() -> Option<u64>,
) -> Result<Result<Vec<ClockReading>, String>, Error> {
    let outcome = with_echo(device, echo, 1, true, |producer, consumer, memory| {
        compare(producer, consumer, memory, ticks).map_err(Failed::Slow)
    });
    outcome.map(|outcome| outcome.map_err(Failed::into_reason))
}

impl Failed {
    #[cfg(any(feature = "vulkan", feature = "cuda"))]
    fn into_reason(self) -> String {
        match self {
            Self::Broken(reason) | Self::Slow(reason) => reason,
        }
    }
}

/// What `talk` finds out with the ends of a kernel that echoes.
fn with_echo<T>(
    device: &dyn Device,
    echo: &Handler,
    block_size: u32,
    traced: bool,
    talk: impl FnOnce(HostProducer, HostConsumer, &Arc<BlockMemory>) -> Result<T, Failed>,
) -> Result<Result<T, Failed>, Error> {
    let ring = RingLayout::new(CAPACITY, PAYLOAD, false).map_err(|error| Error::InvalidOption {
        option: "probe",
        reason: error.to_string(),
    })?;
    let layout = BlockLayout {
        ring,
        state_bytes: 0,
        trace_slots: if traced { TRACE_SLOTS } else { 0 },
    };
    let mut ends = GridMemory::new(device, 1, layout, |bytes, placement| {
        device.allocate(bytes, placement)
    })?
    .ends(device, 1, START)?;
    let Some((producer, consumer, device_ends)) = ends.pop() else {
        return Ok(Err(Failed::Broken("the probe has no rings".into())));
    };
    let memory = Arc::clone(&device_ends.memory);
    let mut dispatch = device.dispatch(DispatchRequest {
        handler: echo.clone(),
        signals: Arc::new(KernelSignals::new(
            "rk-probe".into(),
            1,
            false,
            device.doorbell(),
            None,
        )),
        types: Arc::new(TypeTable::new(&[], true)),
        grid: Dim3::x(1),
        block_size: Dim3::x(block_size),
        blocks: vec![device_ends],
        wait: KernelWait::Spin,
        permits: Vec::new(),
        cores: Vec::new(),
        cores_are_named: false,
        shared_cores: Vec::new(),
        places: Arc::new([]),
        telemetry: false,
        trace_every: traced.into(),
        heartbeat_interval: Duration::from_secs(1),
    })?;
    memory.control().set_active(true);
    dispatch.command();
    let outcome = if wait_for_start(|| memory.control().state() == Some(BlockState::Polling)) {
        talk(producer, consumer, &memory)
    } else {
        Err(Failed::Slow(format!(
            "no slice began within {START_TIMEOUT:?}"
        )))
    };
    dispatch.request_stop();
    dispatch.join(Deadline::after(START_TIMEOUT));
    device.check_lost()?;
    Ok(outcome)
}

fn wait_for_start(mut has_begun: impl FnMut() -> bool) -> bool {
    let begin = Instant::now();
    while !has_begun() {
        if begin.elapsed() > START_TIMEOUT {
            return false;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    true
}

/// Exchanges the messages, a few at a time, for as long as something comes of it.
fn exchange(
    mut producer: HostProducer,
    mut consumer: HostConsumer,
    memory: &Arc<BlockMemory>,
    unseen_rounds: u32,
) -> Result<Seen, Failed> {
    let slice_number = || memory.control().slice_number();
    let (mut mid_slice, mut rounds) = (0, 0);
    let (mut sent, mut received) = (0_u32, 0_u32);
    let begin = Instant::now();
    let look = || life(std::slice::from_ref(memory));
    let mut stall = Stall::new(look(), begin);
    // The slice of the exchange before, if it ended within that. A reply may be seen before the
    // number of the slice that wrote it; what is sent after it cannot come back before that.
    let mut before = None;
    while received < MESSAGES && (mid_slice > 0 || rounds < unseen_rounds) {
        let slice = slice_number();
        let mut is_within = true;
        let depth = 1 + received % DEPTH;
        while sent < MESSAGES && sent - received < depth {
            let envelope = Envelope {
                correlation: sent + 1,
                ..Envelope::default()
            };
            if producer.try_push(&envelope, &payload(sent)).is_err() {
                break;
            }
            sent += 1;
        }
        let sent_in = slice_number();
        let (mut looked, mut is_prompt) = (Instant::now(), true);
        while received < sent {
            // Before the look for a reply: this thread may be held up between the two.
            let (now, looked_in) = (Instant::now(), slice_number());
            is_prompt &= now.duration_since(looked) < PROMPT;
            looked = now;
            match consumer.in_place().try_next() {
                Ok(Some(reply)) => {
                    if reply.header().correlation() != received + 1
                        || reply.payload() != payload(received)
                    {
                        return Err(Failed::Broken(format!(
                            "message {received} came back changed or out of order"
                        )));
                    }
                    received += 1;
                    is_within &= slice_number() == slice;
                    mid_slice += u32::from(is_within && before == Some(slice));
                }
                Ok(None) => {
                    let is_lost = looked_in.wrapping_sub(sent_in) > SLICES_TO_SEE;
                    let is_late = now.duration_since(begin) > TIMEOUT;
                    if is_lost || is_late || stall.look(look(), now) > QUIET {
                        return match received {
                            0 if !is_lost => Err(Failed::Slow(format!(
                                "none of the messages came back within {:.1?}",
                                begin.elapsed()
                            ))),
                            _ => Ok(Seen {
                                sent,
                                received,
                                mid_slice,
                                rounds,
                                is_lost,
                            }),
                        };
                    }
                    std::hint::spin_loop();
                }
                Err(corruption) => {
                    let reason = format!("the reply ring is corrupt: {corruption}");
                    return Err(Failed::Broken(reason));
                }
            }
        }
        rounds += u32::from(is_prompt);
        before = is_within.then_some(slice);
    }
    Ok(Seen {
        sent,
        received,
        mid_slice,
        rounds,
        is_lost: false,
    })
}

/// Round trips that are timed, and those before them that are not.
#[cfg(feature = "cuda")]
const ROUND_TRIPS: u32 = 200;
#[cfg(feature = "cuda")]
const WARM_UP: u32 = 50;

#[cfg(feature = "cuda")]
fn time(mut producer: HostProducer, mut consumer: HostConsumer) -> Result<Duration, Failed> {
    let mut fastest = Duration::MAX;
    let begin = Instant::now();
    for message in 1..=ROUND_TRIPS + WARM_UP {
        let envelope = Envelope {
            correlation: message,
            ..Envelope::default()
        };
        let sent = Instant::now();
        if producer
            .try_push(&envelope, &message.to_ne_bytes())
            .is_err()
        {
            return Err(Failed::Broken("there is no room for one message".into()));
        }
        loop {
            match consumer.in_place().try_next() {
                Ok(Some(_)) => break,
                // On a busy machine some are enough.
                Ok(None) if begin.elapsed() > TIMEOUT && fastest < Duration::MAX => {
                    return Ok(fastest);
                }
                Ok(None) if begin.elapsed() > TIMEOUT => {
                    return Err(Failed::Slow(format!(
                        "{} of {} round trips took {TIMEOUT:?}",
                        message - 1,
                        ROUND_TRIPS + WARM_UP
                    )));
                }
                Ok(None) => std::hint::spin_loop(),
                Err(corruption) => {
                    let reason = format!("the reply ring is corrupt: {corruption}");
                    return Err(Failed::Broken(reason));
                }
            }
        }
        if message > WARM_UP {
            fastest = fastest.min(sent.elapsed());
        }
    }
    Ok(fastest)
}

/// Messages by which a clock is read.
#[cfg(feature = "vulkan")]
const CLOCK_READINGS: usize = 16;

#[cfg(feature = "vulkan")]
fn compare(
    mut producer: HostProducer,
    mut consumer: HostConsumer,
    memory: &BlockMemory,
    ticks: impl Fn() -> Option<u64>,
) -> Result<Vec<ClockReading>, String> {
    let ticks = || ticks().ok_or_else(|| "the driver does not tell its clock".to_owned());
    let begin = Instant::now();
    let mut readings = Vec::with_capacity(CLOCK_READINGS);
    for count in 1..=CLOCK_READINGS {
        let before = ticks()?;
        if producer.try_push(&Envelope::default(), &[]).is_err() {
            return Err("there is no room for one message".into());
        }
        // Samples are written after the replies.
        let sample = loop {
            let _ = consumer
                .in_place()
                .try_next()
                .map_err(|corruption| format!("the reply ring is corrupt: {corruption}"))?;
            let samples = read_samples(memory.traces());
            if let (true, Some(sample)) = (samples.len() == count, samples.last()) {
                break *sample;
            }
            if begin.elapsed() > TIMEOUT {
                return Err(format!(
                    "{} of {CLOCK_READINGS} messages were traced within {TIMEOUT:?}",
                    count - 1
                ));
            }
            std::hint::spin_loop();
        };
        readings.push(ClockReading {
            before,
            seen: sample.seen,
            done: sample.done,
            after: ticks()?,
        });
    }
    Ok(readings)
}

/// Content that tells its message, and each of its bytes, apart.
fn payload(message: u32) -> [u8; PAYLOAD] {
    let mut payload = [0; PAYLOAD];
    for (index, byte) in payload.iter_mut().enumerate() {
        *byte = (message as usize * 31 + index * 7) as u8;
    }
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(received: u32, mid_slice: u32) -> Result<Seen, Failed> {
        Ok(Seen {
            sent: (received + DEPTH).min(MESSAGES),
            received,
            mid_slice,
            rounds: received / DEPTH,
            is_lost: false,
        })
    }

    fn slow() -> Result<Seen, Failed> {
        Err(Failed::Slow("no slice began".into()))
    }

    /// The verdict on attempts that come out like this, and how many were made.
    fn verdict(attempts: &[Result<Seen, Failed>]) -> (Result<(Seen, bool), String>, usize) {
        let mut made = 0;
        let outcome = judge(Duration::ZERO, || {
            made += 1;
            Ok(attempts[made - 1].clone())
        });
        (outcome.unwrap(), made)
    }

    #[test]
    fn a_busy_machine_does_not_decide_whether_messages_are_seen() {
        // As they should be.
        let (outcome, made) = verdict(&[seen(MESSAGES, 200)]);
        assert!(matches!(outcome, Ok((_, false))), "{outcome:?}");
        assert_eq!(made, 1);
        // Most of them late, or not there in time.
        for attempt in [seen(MESSAGES, ENOUGH), seen(MESSAGES - 1, 61)] {
            let (outcome, made) = verdict(&[attempt]);
            assert!(outcome.is_ok(), "{outcome:?}");
            assert_eq!(made, 1);
        }
        // Slow at first.
        let (outcome, made) = verdict(&[slow(), seen(40, 2), seen(MESSAGES, 100)]);
        assert!(matches!(outcome, Ok((_, true))), "{outcome:?}");
        assert_eq!(made, 3);
        // One that was seen was seen.
        let (outcome, _) = verdict(&[slow(), seen(3, 1), slow()]);
        assert!(matches!(outcome, Ok((_, true))), "{outcome:?}");
    }

    #[test]
    fn slow_and_not_seen_are_told_apart() {
        let unseen = || seen(UNSEEN_ROUNDS * DEPTH, 0);
        let (outcome, made) = verdict(&[unseen(), unseen(), unseen()]);
        let reason = outcome.unwrap_err();
        assert!(reason.starts_with("only 0 of 192"), "{reason}");
        assert_eq!(made, 3);
        for attempts in [[slow(), slow(), slow()], [seen(5, 0), slow(), seen(7, 0)]] {
            let reason = verdict(&attempts).0.unwrap_err();
            assert!(reason.starts_with("slow: "), "{reason}");
        }
        // What a device does wrong is not tried again.
        let lost = Ok(Seen {
            is_lost: true,
            ..seen(100, 0).unwrap()
        });
        let (outcome, made) = verdict(&[lost]);
        assert!(outcome.unwrap_err().contains("the next one did not"));
        assert_eq!(made, 1);
        let broken = Err(Failed::Broken("message 3 came back changed".into()));
        let (outcome, made) = verdict(&[slow(), broken]);
        assert!(outcome.unwrap_err().contains("changed"));
        assert_eq!(made, 2);
    }
}
