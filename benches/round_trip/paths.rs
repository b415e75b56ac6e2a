//! The round trips that are compared.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use hdrhistogram::Histogram;
use ringkernel::{
    Dim3, KernelHandle, LaunchOptions, RingKernelRuntime, WaitStrategy,
    thread::affinity::pin_current_thread, time::now_ns_ordered,
};
use rkyv::{Archive, Deserialize, Serialize};

use crate::shared::{CAPACITY, TIMEOUT, Target, pinned, ring, runtime};
#[cfg(feature = "vulkan")]
use crate::submit::Submitter;
use crate::{Config, Failure};

/// Kernels that are launched, and idle, beside the one that is measured.
const IDLE_KERNELS: usize = 64;

/// A payload that differs from message to message in every 8 bytes.
pub fn fill<const N: usize>(payload: &mut [u8; N], message: u64) {
    for (index, bytes) in payload.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&(message.wrapping_mul(31) + index as u64).to_ne_bytes());
    }
}

/// The same, as a typed message.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, PartialEq)]
pub struct Typed<const N: usize> {
    payload: [u8; N],
}
ringkernel::ring_message!(Typed<48>, "bench.Typed48.v1");
ringkernel::ring_message!(Typed<256>, "bench.Typed256.v1");
ringkernel::ring_message!(Typed<1024>, "bench.Typed1024.v1");

/// One way from a caller to an echo and back.
pub struct Path<const N: usize> {
    pub name: &'static str,
    pub backend: &'static str,
    /// Takes tens of microseconds a message.
    slow: bool,
    echo: Box<dyn Echo<N>>,
}

/// Sends messages and receives each one's echo, in a loop that `Meter` drives.
trait Echo<const N: usize> {
    fn round(&mut self, config: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure>;
}

/// Makes payloads, takes times, compares what comes back.
pub struct Meter<'a, const N: usize> {
    histogram: &'a mut Histogram<u64>,
    messages: usize,
    /// Between one reply and the next message.
    gap: Duration,
}

impl<const N: usize> Meter<'_, N> {
    #[inline(always)]
    fn run(
        &mut self,
        mut exchange: impl FnMut(&[u8; N], &mut [u8; N]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let (mut payload, mut reply) = ([0; N], [0; N]);
        // The first tenth warms caches and branch predictors up and is not counted.
        for message in 0..self.messages + self.messages / 10 {
            fill(&mut payload, message as u64);
            let begin = now_ns_ordered();
            exchange(&payload, &mut reply)?;
            let end = now_ns_ordered();
            if reply != payload {
                return Err(format!("message {message} came back changed").into());
            }
            if message >= self.messages / 10 {
                self.histogram.record((end - begin).max(1))?;
            }
            if !self.gap.is_zero() {
                let until = end + self.gap.as_nanos() as u64;
                while now_ns_ordered() < until {
                    spin_loop();
                }
            }
        }
        Ok(())
    }
}

impl<const N: usize> Path<N> {
    /// Some messages, a gap apart. Slow paths get a twentieth of them if there is no gap.
    pub fn round(
        &mut self,
        config: &Config,
        messages: usize,
        gap: Duration,
        histogram: &mut Histogram<u64>,
    ) -> Result<(), Failure> {
        let mut meter = Meter {
            histogram,
            messages: match self.slow && gap.is_zero() {
                true => (messages / 20).max(1),
                false => messages,
            },
            gap,
        };
        self.echo
            .round(config, &mut meter)
            .map_err(|error| format!("{}: {error}", self.name).into())
    }
}

fn path<const N: usize>(
    name: &'static str,
    target: Target,
    echo: impl Echo<N> + 'static,
) -> Path<N> {
    Path {
        name,
        backend: target.backend().name(),
        slow: false,
        echo: Box::new(echo),
    }
}

/// All paths, the floor first.
pub fn all<const N: usize>(config: &Config) -> Result<Vec<Path<N>>, Failure>
where
    Typed<N>: ringkernel::RingMessage,
{
    let ours = Target::of(config);
    let kernel = |target, idle, telemetry| Kernel::new::<N>(config, target, idle, telemetry);
    let mut paths = vec![path("floor", Target::Cpu, Floor)];
    if ours != Target::Cpu {
        let endpoints = Endpoints(kernel(Target::Cpu, 0, false)?);
        paths.push(path("endpoints", Target::Cpu, endpoints));
    }
    paths.extend([
        path("endpoints", ours, Endpoints(kernel(ours, 0, false)?)),
        path(
            "endpoints_typed",
            ours,
            EndpointsTyped(kernel(ours, 0, false)?),
        ),
        path("handle_call", ours, HandleCall(kernel(ours, 0, false)?)),
        path(
            "endpoints_telemetry",
            ours,
            Endpoints(kernel(ours, 0, true)?),
        ),
        path(
            "endpoints_64_idle_kernels",
            ours,
            Endpoints(kernel(ours, IDLE_KERNELS, false)?),
        ),
    ]);
    match ours {
        Target::Cpu => paths.extend([
            path("ring", ours, Ring),
            path("rtrb", ours, Rtrb),
            path("crossbeam", ours, Crossbeam),
            path("std_mpsc", ours, StdMpsc),
        ]),
        Target::Vulkan(_) => paths.extend(submissions::<N>(config)?),
        Target::Cuda | Target::Metal => {}
    }
    Ok(paths)
}

/// The paths whose latency depends on how long nothing was sent before.
pub fn with_gaps(config: &Config) -> Result<Vec<Path<48>>, Failure> {
    let ours = Target::of(config);
    let kernel = |target| Kernel::new::<48>(config, target, 0, false);
    let mut paths = vec![
        path("floor", Target::Cpu, Floor),
        path("endpoints", Target::Cpu, Endpoints(kernel(Target::Cpu)?)),
    ];
    if ours != Target::Cpu {
        paths.push(path("endpoints", ours, Endpoints(kernel(ours)?)));
        let asleep = Kernel::asleep::<48>(config, ours)?;
        paths.push(path("endpoints_park", ours, Endpoints(asleep)));
        if let Target::Vulkan(_) = ours {
            paths.extend(submissions::<48>(config)?);
        }
    }
    Ok(paths)
}

/// A submission a message, by hand and by our exchange mode.
#[cfg(feature = "vulkan")]
fn submissions<const N: usize>(config: &Config) -> Result<Vec<Path<N>>, Failure> {
    let target = Target::Vulkan(ringkernel::VulkanMode::Exchange);
    let kernel = Kernel::new::<N>(config, target, 0, false)?;
    let name = kernel.device_name();
    let submitter = |polls| Submitter::open(&name, N, config.kernel_core, polls);
    let mut paths = vec![
        path("endpoints_exchange", target, Endpoints(kernel)),
        path("submit_and_wait", target, Submit(submitter(false)?)),
        path("submit_and_poll", target, Submit(submitter(true)?)),
    ];
    for path in &mut paths {
        path.slow = true;
    }
    Ok(paths)
}

#[cfg(not(feature = "vulkan"))]
fn submissions<const N: usize>(_: &Config) -> Result<Vec<Path<N>>, Failure> {
    Err("this build lacks the feature `vulkan`".into())
}

/// A submission a message, from the caller's own thread.
#[cfg(feature = "vulkan")]
struct Submit(Submitter);

#[cfg(feature = "vulkan")]
impl<const N: usize> Echo<N> for Submit {
    fn round(&mut self, _: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        meter.run(|payload, reply| self.0.exchange(payload, reply))
    }
}

/// Runs `echo` on a thread of the kernel core while `caller` runs here. A caller that fails ends the other side too.
fn with_echo_thread(
    config: &Config,
    echo: impl FnOnce(&AtomicBool) + Send,
    caller: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let (started, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let pinned = pin_current_thread(config.kernel_core);
            started.store(true, Ordering::Release);
            if pinned.is_ok() {
                echo(&stop);
            }
            pinned
        });
        while !started.load(Ordering::Acquire) {
            thread::yield_now();
        }
        let outcome = caller();
        stop.store(true, Ordering::Release);
        let pinned = thread.join().map_err(|_| "the echo thread panicked")?;
        pinned?;
        outcome
    })
}

/// The least that can be done: a payload and a sequence word that one core writes and the other polls, in the same
/// memory every time.
struct Floor;

#[repr(align(128))]
struct Mailbox<const N: usize> {
    sequence: AtomicU32,
    payload: UnsafeCell<[u8; N]>,
}

// SAFETY: the payload is written before the sequence is stored with release, and read after the sequence was loaded
// with acquire; the other side writes only after it has seen this side's answer.
unsafe impl<const N: usize> Sync for Mailbox<N> {}

impl<const N: usize> Mailbox<N> {
    const fn new() -> Self {
        Self {
            sequence: AtomicU32::new(0),
            payload: UnsafeCell::new([0; N]),
        }
    }

    #[inline(always)]
    fn write(&self, sequence: u32, payload: &[u8; N]) {
        // SAFETY: it is this side's turn; see `Sync`.
        unsafe { self.payload.get().copy_from_nonoverlapping(payload, 1) };
        self.sequence.store(sequence, Ordering::Release);
    }

    #[inline(always)]
    fn read(&self, payload: &mut [u8; N]) {
        // SAFETY: the caller has seen the sequence; see `Sync`.
        unsafe { self.payload.get().copy_to_nonoverlapping(payload, 1) };
    }
}

impl<const N: usize> Echo<N> for Floor {
    fn round(&mut self, config: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        let (there, back) = (Mailbox::<N>::new(), Mailbox::<N>::new());
        with_echo_thread(
            config,
            |stop| {
                let mut payload = [0; N];
                let mut sequence = 1;
                while !stop.load(Ordering::Relaxed) {
                    if there.sequence.load(Ordering::Acquire) == sequence {
                        there.read(&mut payload);
                        back.write(sequence, &payload);
                        sequence += 1;
                    } else {
                        spin_loop();
                    }
                }
            },
            || {
                let mut sequence = 0;
                meter.run(|payload, reply| {
                    sequence += 1;
                    there.write(sequence, payload);
                    while back.sequence.load(Ordering::Acquire) != sequence {
                        spin_loop();
                    }
                    back.read(reply);
                    Ok(())
                })
            },
        )
    }
}

/// A kernel that is launched when it is first used: where kernels stay on a device, every runtime is built before any of them.
struct Kernel {
    launched: Option<Launched>,
    options: LaunchOptions,
    /// Kernels beside it that are never activated.
    idle: usize,
    /// Outlives the kernels.
    runtime: RingKernelRuntime,
}

struct Launched {
    handle: KernelHandle,
    _idle: Vec<KernelHandle>,
}

impl Kernel {
    fn new<const N: usize>(
        config: &Config,
        target: Target,
        idle: usize,
        telemetry: bool,
    ) -> Result<Self, Failure> {
        Ok(Self {
            launched: None,
            options: pinned::<N>(config, target),
            idle,
            runtime: runtime(config, target, telemetry)?,
        })
    }

    /// One that sleeps when it has nothing to do.
    fn asleep<const N: usize>(config: &Config, target: Target) -> Result<Self, Failure> {
        let mut kernel = Self::new::<N>(config, target, 0, false)?;
        kernel.options.wait = Some(WaitStrategy::Park);
        Ok(kernel)
    }

    fn launch(&self) -> Result<Launched, Failure> {
        let one = Dim3::x(1);
        let handle = self
            .runtime
            .launch("echo", one, one, self.options.clone())?;
        let idle = (0..self.idle)
            .map(|_| {
                let small = LaunchOptions {
                    queue_capacity: Some(64),
                    wait: Some(WaitStrategy::Park),
                    ..LaunchOptions::default()
                };
                self.runtime.launch("echo", one, one, small)
            })
            .collect::<Result<_, _>>()?;
        Ok(Launched {
            handle,
            _idle: idle,
        })
    }

    #[cfg(feature = "vulkan")]
    fn device_name(&self) -> String {
        let device = self.runtime.default_device();
        self.runtime.devices()[device].name.clone()
    }

    fn active(
        &mut self,
        run: impl FnOnce(&KernelHandle) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let launched = match self.launched.take() {
            Some(launched) => launched,
            None => self.launch()?,
        };
        let handle = &self.launched.insert(launched).handle;
        handle.activate()?;
        run(handle)?;
        Ok(handle.deactivate()?)
    }
}

/// Exclusive endpoints, raw bytes.
struct Endpoints(Kernel);

impl<const N: usize> Echo<N> for Endpoints {
    fn round(&mut self, _: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        self.0.active(|kernel| {
            let (mut sender, mut receiver) = kernel.split_bytes()?;
            meter.run(|payload, reply| {
                sender.try_send_bytes(payload)?;
                receiver.recv_bytes_timeout(reply, TIMEOUT)?;
                Ok(())
            })
        })
    }
}

/// Exclusive endpoints, archived and validated messages.
struct EndpointsTyped(Kernel);

impl<const N: usize> Echo<N> for EndpointsTyped
where
    Typed<N>: ringkernel::RingMessage,
{
    fn round(&mut self, _: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        self.0.active(|kernel| {
            let (mut sender, mut receiver) = kernel.split::<Typed<N>, Typed<N>>()?;
            meter.run(|payload, reply| {
                sender.try_send(&Typed { payload: *payload })?;
                *reply = receiver.recv_timeout(TIMEOUT)?.payload;
                Ok(())
            })
        })
    }
}

/// The shared handle's `call`.
struct HandleCall(Kernel);

impl<const N: usize> Echo<N> for HandleCall {
    fn round(&mut self, _: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        self.0.active(|kernel| {
            meter.run(|payload, reply| {
                kernel.call_bytes(payload, reply, TIMEOUT)?;
                Ok(())
            })
        })
    }
}

/// Our bare ring between two threads: neither runtime nor kernel.
struct Ring;

impl<const N: usize> Echo<N> for Ring {
    fn round(&mut self, config: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        use ringkernel::message::Envelope;
        let (there, back) = (ring(N)?, ring(N)?);
        let (mut sender, mut echo_in) = there.ends();
        let (mut echo_out, mut receiver) = back.ends();
        let plain = Envelope::default();
        with_echo_thread(
            config,
            move |stop| {
                while !stop.load(Ordering::Relaxed) {
                    match echo_in.try_next() {
                        Ok(Some(incoming)) => {
                            if echo_out.try_push(&plain, incoming.payload()).is_err() {
                                return;
                            }
                        }
                        _ => spin_loop(),
                    }
                }
            },
            move || {
                meter.run(|payload, reply| {
                    sender.try_push(&plain, payload)?;
                    loop {
                        if let Some(incoming) = receiver.try_next()? {
                            reply.copy_from_slice(incoming.payload());
                            return Ok(());
                        }
                        spin_loop();
                    }
                })
            },
        )
    }
}

/// rtrb, both sides spinning.
struct Rtrb;

impl<const N: usize> Echo<N> for Rtrb {
    fn round(&mut self, config: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        let (mut sender, mut echo_in) = rtrb::RingBuffer::<[u8; N]>::new(CAPACITY);
        let (mut echo_out, mut receiver) = rtrb::RingBuffer::<[u8; N]>::new(CAPACITY);
        with_echo_thread(
            config,
            move |stop| {
                while !stop.load(Ordering::Relaxed) {
                    match echo_in.pop() {
                        Ok(payload) => {
                            if echo_out.push(payload).is_err() {
                                return;
                            }
                        }
                        Err(_) => spin_loop(),
                    }
                }
            },
            move || {
                meter.run(|payload, reply| {
                    sender.push(*payload)?;
                    loop {
                        if let Ok(payload) = receiver.pop() {
                            *reply = payload;
                            return Ok(());
                        }
                        spin_loop();
                    }
                })
            },
        )
    }
}

/// crossbeam-channel, bounded, both sides spinning.
struct Crossbeam;

impl<const N: usize> Echo<N> for Crossbeam {
    fn round(&mut self, config: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        let (sender, echo_in) = crossbeam_channel::bounded::<[u8; N]>(CAPACITY);
        let (echo_out, receiver) = crossbeam_channel::bounded::<[u8; N]>(CAPACITY);
        with_echo_thread(
            config,
            move |stop| {
                while !stop.load(Ordering::Relaxed) {
                    match echo_in.try_recv() {
                        Ok(payload) => {
                            if echo_out.try_send(payload).is_err() {
                                return;
                            }
                        }
                        Err(_) => spin_loop(),
                    }
                }
            },
            move || {
                meter.run(|payload, reply| {
                    sender.try_send(*payload)?;
                    loop {
                        if let Ok(payload) = receiver.try_recv() {
                            *reply = payload;
                            return Ok(());
                        }
                        spin_loop();
                    }
                })
            },
        )
    }
}

/// The standard library's bounded channel, both sides spinning.
struct StdMpsc;

impl<const N: usize> Echo<N> for StdMpsc {
    fn round(&mut self, config: &Config, meter: &mut Meter<'_, N>) -> Result<(), Failure> {
        let (sender, echo_in) = mpsc::sync_channel::<[u8; N]>(CAPACITY);
        let (echo_out, receiver) = mpsc::sync_channel::<[u8; N]>(CAPACITY);
        with_echo_thread(
            config,
            move |stop| {
                while !stop.load(Ordering::Relaxed) {
                    match echo_in.try_recv() {
                        Ok(payload) => {
                            if echo_out.try_send(payload).is_err() {
                                return;
                            }
                        }
                        Err(_) => spin_loop(),
                    }
                }
            },
            move || {
                meter.run(|payload, reply| {
                    sender.try_send(*payload)?;
                    loop {
                        if let Ok(payload) = receiver.try_recv() {
                            *reply = payload;
                            return Ok(());
                        }
                        spin_loop();
                    }
                })
            },
        )
    }
}
