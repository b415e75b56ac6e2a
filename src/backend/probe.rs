//! Whether host and running kernel really exchange messages on a device: tried, with verified content, before anything relies
//! on it.

use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// How many of them must come back while the slice that took them still runs; the others may have met a seam.
const MID_SLICE: u32 = MESSAGES / 2;

/// Position of the first one: they cross the wrap-around of positions.
const START: u32 = u32::MAX - MESSAGES / 2;

/// How long all of them may take. Milliseconds are usual; the rest is for machines without a core to spare.
const TIMEOUT: Duration = Duration::from_millis(500);

/// Longer than any slice budget.
const START_TIMEOUT: Duration = Duration::from_secs(2);

/// Block sizes that are tried: more than one SIMD group or warp, and the least. They are held together differently.
pub(crate) const BLOCK_SIZES: [u32; 2] = [64, 1];

/// Tries the device. What was seen, or why messages do not reach a running dispatch.
pub(crate) fn run(device: &dyn Device, echo: &Handler) -> Result<Result<String, String>, Error> {
    let begin = Instant::now();
    let mut mid_slice = 0;
    for block_size in BLOCK_SIZES {
        match run_block(device, echo, block_size)? {
            Ok(seen) => mid_slice += seen,
            Err(reason) => return Ok(Err(reason)),
        }
    }
    Ok(Ok(format!(
        "the probe saw {} messages echoed, {mid_slice} of them by a running dispatch, in {:.1?}",
        MESSAGES * BLOCK_SIZES.len() as u32,
        begin.elapsed()
    )))
}

/// How many messages came back from a running dispatch.
pub(crate) fn run_block(
    device: &dyn Device,
    echo: &Handler,
    block_size: u32,
) -> Result<Result<u32, String>, Error> {
    with_echo(device, echo, block_size, false, exchange)
}

/// The median round trip of a short message, one at a time.
#[cfg(feature = "cuda")]
pub(crate) fn round_trip(
    device: &dyn Device,
    echo: &Handler,
) -> Result<Result<Duration, String>, Error> {
    with_echo(device, echo, 1, false, |producer, consumer, _| {
        time(producer, consumer)
    })
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
    with_echo(device, echo, 1, true, |producer, consumer, memory| {
        compare(producer, consumer, memory, ticks)
    })
}

/// What `talk` finds out with the ends of a kernel that echoes.
fn with_echo<T>(
    device: &dyn Device,
    echo: &Handler,
    block_size: u32,
    traced: bool,
    talk: impl FnOnce(HostProducer, HostConsumer, &BlockMemory) -> Result<T, String>,
) -> Result<Result<T, String>, Error> {
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
        return Ok(Err("the probe has no rings".into()));
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
        Err("no slice began within two seconds".into())
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

/// Exchanges the messages, a few at a time; how many came back within one slice.
fn exchange(
    mut producer: HostProducer,
    mut consumer: HostConsumer,
    memory: &BlockMemory,
) -> Result<u32, String> {
    let slice_number = || memory.control().slice_number();
    let mut mid_slice = 0;
    let (mut sent, mut received) = (0_u32, 0_u32);
    let begin = Instant::now();
    while received < MESSAGES {
        if begin.elapsed() > TIMEOUT {
            return Err(late(received, mid_slice));
        }
        let slice = slice_number();
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
        while received < sent {
            match consumer.try_next() {
                Ok(Some(reply)) => {
                    if reply.header().correlation() != received + 1
                        || reply.payload() != payload(received)
                    {
                        return Err(format!(
                            "message {received} came back changed or out of order"
                        ));
                    }
                    received += 1;
                    mid_slice += u32::from(slice_number() == slice);
                }
                Ok(None) if begin.elapsed() > TIMEOUT => {
                    return Err(late(received, mid_slice));
                }
                Ok(None) => std::hint::spin_loop(),
                Err(corruption) => return Err(format!("the reply ring is corrupt: {corruption}")),
            }
        }
    }
    if mid_slice < MID_SLICE {
        return Err(format!(
            "only {mid_slice} of {MESSAGES} messages were answered by the dispatch that was running when they were sent"
        ));
    }
    Ok(mid_slice)
}

/// Round trips that are timed, and those before them that are not.
#[cfg(feature = "cuda")]
const ROUND_TRIPS: u32 = 200;
#[cfg(feature = "cuda")]
const WARM_UP: u32 = 50;

#[cfg(feature = "cuda")]
fn time(mut producer: HostProducer, mut consumer: HostConsumer) -> Result<Duration, String> {
    let mut times = Vec::with_capacity(ROUND_TRIPS as usize);
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
            return Err("there is no room for one message".into());
        }
        loop {
            match consumer.try_next() {
                Ok(Some(_)) => break,
                Ok(None) if begin.elapsed() > TIMEOUT => {
                    return Err(format!(
                        "{} of {} round trips took {TIMEOUT:?}",
                        message - 1,
                        ROUND_TRIPS + WARM_UP
                    ));
                }
                Ok(None) => std::hint::spin_loop(),
                Err(corruption) => return Err(format!("the reply ring is corrupt: {corruption}")),
            }
        }
        if message > WARM_UP {
            times.push(sent.elapsed());
        }
    }
    let middle = times.len() / 2;
    Ok(*times.select_nth_unstable(middle).1)
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

fn late(received: u32, mid_slice: u32) -> String {
    format!(
        "{received} of {MESSAGES} messages came back within {TIMEOUT:?}, {mid_slice} of them from the dispatch that was running \
         when they were sent"
    )
}

/// Content that tells its message, and each of its bytes, apart.
fn payload(message: u32) -> [u8; PAYLOAD] {
    let mut payload = [0; PAYLOAD];
    for (index, byte) in payload.iter_mut().enumerate() {
        *byte = (message as usize * 31 + index * 7) as u8;
    }
    payload
}
