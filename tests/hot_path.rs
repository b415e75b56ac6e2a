//! What the hot path does not do: no allocation, shown by a counting allocator; no system call, shown by `strace`, which
//! would also show a contended lock. An uncontended lock leaves no trace that could be counted here; endpoints hold none.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringkernel::error::TrySendError;
use ringkernel::message::RingMessage;
use ringkernel::{
    Bytes, Client, ClientOptions, KernelRegistration, LaunchOptions, Overflow, Publisher,
    RingKernelRuntime, RuntimeConfig, SubscriberOptions, TopicOptions, WaitStrategy,
};
use rkyv::{Archive, Deserialize, Serialize};

/// Counts allocations while counting is on, on threads that take part.
struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
/// Those of them that bridges made.
static BY_BRIDGES: AtomicU64 = AtomicU64::new(0);
/// Those of them that threads made which a test watches.
static BY_WATCHED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The test harness has threads of its own; only this test's, the kernel's and the bridge's count.
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if !COUNTING.load(Ordering::Relaxed) {
        return;
    }
    let by_bridge = is_bridge();
    if by_bridge {
        BY_BRIDGES.fetch_add(1, Ordering::Relaxed);
    }
    let by_watched = WATCHED.try_with(Cell::get).unwrap_or(false);
    if by_watched {
        BY_WATCHED.fetch_add(1, Ordering::Relaxed);
    }
    if by_bridge || by_watched {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether the calling thread is a bridge's: those run no code of a test that could mark them, so they are known by their names.
#[cfg(target_os = "linux")]
fn is_bridge() -> bool {
    let mut name = [0_u8; 16];
    // SAFETY: the call writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(b"rk-br-")
}

#[cfg(not(target_os = "linux"))]
fn is_bridge() -> bool {
    false
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count();
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) };
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LONG: Duration = Duration::from_secs(60);

/// Spinning tests starve each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn one_at_a_time() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
struct Quote {
    number: u64,
    bid: u64,
    firm: bool,
}
ringkernel::ring_message!(Quote, "test.Quote.v1");

/// An echo whose thread is watched too.
fn watched_echo() -> KernelRegistration {
    KernelRegistration::new("test.watched_echo")
        .any_message()
        .cpu_handler(|request, context| {
            WATCHED.with(|watched| watched.set(true));
            context.echo(request)
        })
}

fn spinning() -> RingKernelRuntime {
    RingKernelRuntime::builder()
        .config(RuntimeConfig {
            kernel_wait: WaitStrategy::Spin,
            host_wait: WaitStrategy::Spin,
            ..RuntimeConfig::default()
        })
        .register(watched_echo())
        .build()
        .unwrap()
}

/// Messages of every kind through every kind of call that may be on a realtime thread, `rounds` times, after a warm-up;
/// `mark` is called when the steady state begins and when it ends.
fn steady_state(rounds: u64, mark: impl Fn()) {
    let runtime = spinning();
    let options = LaunchOptions {
        message_size: Some(256),
        queue_capacity: Some(256),
        // Every other message is one that is sampled.
        trace_every: std::num::NonZeroU32::new(2),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("test.watched_echo", 1, 1, options).unwrap();
    kernel.activate().unwrap();
    let mut buffer = [0; 256];
    let payload = [7; 200];
    let quote = |number| Quote {
        number,
        bid: 100,
        firm: true,
    };
    for phase in 0..2 {
        let rounds = if phase == 0 { 1000 } else { rounds };
        // The kernel's handle, then exclusive endpoints; taking them apart is not part of the steady state.
        let marked = |run: &mut dyn FnMut()| {
            if phase == 1 {
                mark();
            }
            run();
            if phase == 1 {
                mark();
            }
        };
        marked(&mut || {
            for number in 0..rounds {
                kernel.send_bytes(&payload).unwrap();
                kernel.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                kernel.call_bytes(&payload, &mut buffer, LONG).unwrap();
                let reply: Quote = kernel.call(&quote(number), LONG).unwrap();
                assert_eq!(reply.number, number);
                kernel.send(&quote(number)).unwrap();
                assert_eq!(kernel.recv_timeout::<Quote>(LONG).unwrap(), quote(number));
            }
        });
        let (mut sender, mut receiver) = kernel.split::<Quote, Quote>().unwrap();
        marked(&mut || {
            for number in 0..rounds {
                sender.try_send(&quote(number)).unwrap();
                assert_eq!(receiver.recv_timeout(LONG).unwrap(), quote(number));
                sender.try_send_bytes(&payload).unwrap();
                receiver.recv_bytes_timeout(&mut buffer, LONG).unwrap();
                let batch = [quote(1), quote(2), quote(3)];
                assert_eq!(sender.send_batch(&batch), Ok(3));
                for _ in 0..3 {
                    let received = receiver.recv_ref_timeout(LONG).unwrap();
                    assert!(received.access().unwrap().firm);
                }
            }
        });
    }
}

#[test]
fn nothing_is_allocated_per_message() {
    let _one = one_at_a_time();
    WATCHED.with(|watched| watched.set(true));
    steady_state(20_000, || {
        COUNTING.fetch_xor(true, Ordering::SeqCst);
    });
    assert_eq!(ALLOCATIONS.swap(0, Ordering::SeqCst), 0);
    // The counter counts.
    COUNTING.store(true, Ordering::SeqCst);
    drop(std::hint::black_box(vec![1]));
    COUNTING.store(false, Ordering::SeqCst);
    assert_eq!(ALLOCATIONS.swap(0, Ordering::SeqCst), 2);
}

/// What needs scratch memory beside its slot: each element's place until all of them are written.
#[derive(Archive, Serialize, Deserialize, Debug)]
struct Orders {
    sizes: Vec<Option<u32>>,
    names: Vec<Vec<String>>,
}
ringkernel::ring_message!(Orders, "test.Orders.v1");

/// What may need more scratch memory than its slot has bytes.
#[derive(Archive, Serialize, Deserialize, Debug)]
struct Counts {
    by_name: std::collections::HashMap<u32, u8>,
}
ringkernel::ring_message!(Counts, "test.Counts.v1");

const LARGE_SLOT: usize = 64 << 10;

static ORDERS: LazyLock<Orders> = LazyLock::new(|| Orders {
    sizes: (0..3000)
        .map(|size| (size % 3 > 0).then_some(size))
        .collect(),
    names: (0..300)
        .map(|name| vec![format!("a name that is not short {name}"); 2])
        .collect(),
});
static COUNTS: LazyLock<Counts> = LazyLock::new(|| Counts {
    by_name: (0..4000).map(|name| (name, 1)).collect(),
});

/// Sends a large message by every kind of sender, and has the handler reply with it; how often
/// anything was allocated while the first one of each sender was sent, and while others like it
/// were.
fn allocations_for<T: RingMessage + Send + Sync + 'static>(message: &'static T) -> [u64; 2] {
    WATCHED.with(|watched| watched.set(true));
    let counted = |run: &mut dyn FnMut()| {
        COUNTING.store(true, Ordering::SeqCst);
        run();
        COUNTING.store(false, Ordering::SeqCst);
        // Not those of a bridge, which archives nothing and may just be starting.
        BY_WATCHED.swap(0, Ordering::SeqCst)
    };
    let mut buffer = vec![0; LARGE_SLOT];
    let mut allocations = [0; 2];
    let echo = KernelRegistration::new("large")
        .message::<T>()
        .largest_message(LARGE_SLOT)
        .queue_capacity(4)
        .cpu_handler(move |request, context| {
            WATCHED.with(|watched| watched.set(true));
            match request.payload().is_empty() {
                true => context.reply_bytes(&[]),
                false => context.reply(message),
            }
        });
    let runtime = RingKernelRuntime::builder()
        .config(RuntimeConfig {
            kernel_wait: WaitStrategy::Park,
            host_wait: WaitStrategy::Park,
            ..RuntimeConfig::default()
        })
        .register(echo)
        .build()
        .unwrap();
    let kernel = runtime
        .launch("large", 1, 1, LaunchOptions::default())
        .unwrap();
    kernel.activate().unwrap();
    // What a thread takes once is none of the messages'.
    kernel.call_bytes(&[], &mut buffer, LONG).unwrap();
    for round in 0..4 {
        allocations[round.min(1)] += counted(&mut || {
            kernel.send(message).unwrap();
            kernel.recv_bytes_timeout(&mut buffer, LONG).unwrap();
        });
    }
    let (mut sender, mut receiver) = kernel.split::<T, T>().unwrap();
    for round in 0..4 {
        allocations[round.min(1)] += counted(&mut || {
            sender.try_send(message).unwrap();
            receiver.recv_bytes_timeout(&mut buffer, LONG).unwrap();
        });
    }
    drop((sender, receiver));
    let mut client = kernel.client::<T, T>().unwrap();
    for round in 0..4 {
        allocations[round.min(1)] += counted(&mut || {
            client.try_send(message).unwrap();
            client.recv_bytes_timeout(&mut buffer, LONG).unwrap();
        });
    }
    let options = TopicOptions {
        message_size: Some(LARGE_SLOT),
        ..TopicOptions::default()
    };
    let topic = runtime.topic::<T>("large", options).unwrap();
    let mut publisher = topic.publisher().unwrap();
    for round in 0..4 {
        allocations[round.min(1)] += counted(&mut || publisher.publish(message).unwrap());
    }
    allocations
}

#[test]
fn nothing_is_allocated_per_large_message() {
    let _one = one_at_a_time();
    BY_WATCHED.store(0, Ordering::SeqCst);
    // Vectors, strings and options need no more than was taken at set-up.
    assert_eq!(allocations_for(&*ORDERS), [0, 0]);
    // A hash map does, when the first one is sent.
    let [first, others] = allocations_for(&*COUNTS);
    assert!(first > 0);
    assert_eq!(others, 0);
    ALLOCATIONS.store(0, Ordering::SeqCst);
    BY_BRIDGES.store(0, Ordering::SeqCst);
}

/// Messages through kernels that are connected, with a thread each and on one thread.
#[test]
fn nothing_is_allocated_per_message_in_a_pipeline() {
    let _one = one_at_a_time();
    WATCHED.with(|watched| watched.set(true));
    let runtime = spinning();
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    let cores = ringkernel::thread::affinity::usable_cores();
    let last = *cores.last().unwrap();
    for (places, wait) in [
        ([last, last, last], WaitStrategy::Spin),
        ([cores[0], last, cores[0]], WaitStrategy::SpinYield),
    ] {
        let kernels = places.map(|core| {
            let options = LaunchOptions {
                cores: vec![core],
                wait: Some(wait),
                ..LaunchOptions::default()
            };
            runtime.launch("test.watched_echo", 1, 1, options).unwrap()
        });
        for pair in kernels.windows(2) {
            runtime.connect(&pair[0], &pair[1]).unwrap();
        }
        for kernel in &kernels {
            kernel.activate().unwrap();
        }
        let (mut sender, mut receiver) = kernels[0]
            .split_through::<Quote, Quote>(&kernels[2])
            .unwrap();
        for phase in 0..2 {
            COUNTING.store(phase == 1, Ordering::SeqCst);
            for number in 0..1000 {
                let quote = Quote {
                    number,
                    bid: 100,
                    firm: true,
                };
                sender.try_send(&quote).unwrap();
                // Other threads are to have this core too.
                while receiver.try_recv() != Ok(quote) {
                    std::thread::yield_now();
                }
            }
            COUNTING.store(false, Ordering::SeqCst);
        }
        drop((sender, receiver));
        for kernel in &kernels {
            kernel.terminate().unwrap();
        }
    }
    assert_eq!(ALLOCATIONS.load(Ordering::SeqCst), before);
}

/// How the messages of clients reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The only client writes to the kernel's ring itself.
    Direct,
    /// Two clients have lanes, and move messages themselves.
    Lanes,
    /// Two clients have lanes, and the bridge spins for them.
    Bridge,
}

impl Way {
    const ALL: [Self; 3] = [Self::Direct, Self::Lanes, Self::Bridge];
}

/// Requests that a client has on their way before it looks for replies. Where there are fewer cores than threads that spin, a turn of the
/// scheduler is then worth many messages.
const WINDOW: u64 = 1024;

/// `messages` through clients, after a warm-up; `mark` is called when the steady state begins and when it ends. The clients are
/// one thread's: what one of them does while another one's replies lie in the kernel's ring is what is of interest.
fn clients_in_steady_state(way: Way, messages: u64, mark: impl Fn()) {
    let runtime = RingKernelRuntime::builder()
        .config(RuntimeConfig {
            kernel_wait: WaitStrategy::Spin,
            host_wait: WaitStrategy::Spin,
            bridge_wait: match way {
                Way::Direct | Way::Lanes => WaitStrategy::Park,
                Way::Bridge => WaitStrategy::Spin,
            },
            // No sign of life falls into the steady state.
            heartbeat_interval: Duration::from_secs(3600),
            ..RuntimeConfig::default()
        })
        .register(watched_echo())
        .build()
        .unwrap();
    let options = LaunchOptions {
        message_size: Some(64),
        ..LaunchOptions::default()
    };
    let kernel = runtime.launch("test.watched_echo", 1, 1, options).unwrap();
    kernel.activate().unwrap();
    // Every client wakes the bridge. Once it has slept, its thread has made itself at home.
    loop {
        drop(kernel.client_bytes());
        if runtime.bridge(0).unwrap().load().unwrap().sleeps > 0 {
            break;
        }
        std::thread::yield_now();
    }
    // It lets go of those clients' lanes, for which it needs a core: later there may be none for a while.
    std::thread::sleep(Duration::from_millis(50));
    let number = if way == Way::Direct { 1 } else { 2 };
    let mut clients: Vec<Client<Bytes, Bytes>> = (0..number)
        .map(|_| {
            let options = ClientOptions {
                capacity: Some(WINDOW as usize),
                ..ClientOptions::default()
            };
            kernel.client_bytes_with(options).unwrap()
        })
        .collect();
    let bridge = runtime.bridge(0).unwrap();
    let payload = [7; 64];
    let mut buffer = [0; 64];
    for phase in 0..2 {
        let rounds = if phase == 0 { 8 } else { messages / WINDOW };
        let before = bridge.load().unwrap().moved;
        if phase == 1 {
            mark();
        }
        for _ in 0..rounds {
            // Some of the messages one at a time, the others as many at a time as there is room for; a spinning bridge only the latter, because
            // every single one would wait for the scheduler where cores are scarce.
            let single = if way == Way::Bridge { 2 } else { WINDOW / 8 };
            for turn in 0..single {
                let client = &mut clients[turn as usize % number];
                client.call_bytes(&payload, &mut buffer, LONG).unwrap();
            }
            for turn in 0..WINDOW - single {
                let client = &mut clients[turn as usize % number];
                client.send_bytes_timeout(&payload, LONG).unwrap();
            }
            for turn in 0..WINDOW - single {
                let client = &mut clients[turn as usize % number];
                client.recv_bytes_timeout(&mut buffer, LONG).unwrap();
            }
        }
        if phase == 1 {
            mark();
        }
        let moved = bridge.load().unwrap().moved - before;
        if phase == 1 {
            assert_eq!(bridge.is_spinning(), way == Way::Bridge);
        }
        if way == Way::Bridge && phase == 1 {
            // Requests and replies.
            assert!(moved >= rounds * WINDOW, "the bridge moved {moved}");
        }
    }
    assert_eq!(clients[0].is_direct(), way == Way::Direct);
}

/// Publishes a message, whatever the other publisher does.
fn publish(publisher: &mut Publisher<Quote>, number: u64) {
    let quote = Quote {
        number,
        bid: 100,
        firm: true,
    };
    while let Err(error) = publisher.publish(&quote) {
        assert_eq!(error, TrySendError::Busy);
        std::hint::spin_loop();
    }
}

/// `messages` of this thread through a topic with lanes of each kind, some of which are full all the time, after a warm-up, while another
/// thread publishes too; `mark` is called when the steady state begins and when it ends. With a kernel that subscribes and publishes its
/// replies, if that is wanted. Messages that were left to the other publisher.
fn topics_in_steady_state(with_kernel: bool, messages: u64, mark: impl Fn()) -> u64 {
    let runtime = spinning();
    let topic = runtime
        .topic::<Quote>("quotes", TopicOptions::default())
        .unwrap();
    let replies = runtime
        .topic::<Quote>("replies", TopicOptions::default())
        .unwrap();
    let kernel = with_kernel.then(|| {
        let options = LaunchOptions {
            // Lest it starves the other threads.
            wait: Some(WaitStrategy::Park),
            ..LaunchOptions::default()
        };
        let kernel = runtime.launch("test.watched_echo", 1, 1, options).unwrap();
        kernel.activate().unwrap();
        let options = SubscriberOptions::default();
        let subscription = runtime
            .subscribe_kernel_publishing(&topic, &kernel, &replies, options)
            .unwrap();
        (kernel, subscription)
    });
    let lane = |capacity, overflow| SubscriberOptions {
        capacity,
        overflow,
        ..SubscriberOptions::default()
    };
    let mut reading = [
        lane(Some(64), Overflow::DropOldest),
        lane(Some(64), Overflow::DropNewest),
        lane(None, Overflow::Latest),
    ]
    .map(|options| topic.subscribe(options).unwrap());
    // Nobody reads from these.
    let full = [
        lane(Some(2), Overflow::DropOldest),
        lane(Some(2), Overflow::DropNewest),
        lane(None, Overflow::Latest),
    ]
    .map(|options| topic.subscribe(options).unwrap());
    let mut replied = replies.subscribe(SubscriberOptions::latest()).unwrap();
    let (mut own, mut other) = (topic.publisher().unwrap(), topic.publisher().unwrap());
    let end = AtomicBool::new(false);
    let (begun, wait) = (AtomicBool::new(false), Duration::from_secs(60));
    std::thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            WATCHED.with(|watched| watched.set(true));
            let mut number = 0;
            while !end.load(Ordering::Acquire) {
                publish(&mut other, number);
                begun.store(true, Ordering::Release);
                number += 1;
            }
            other.stats()
        });
        while !begun.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        let mut received = 0;
        for phase in 0..2 {
            let rounds = if phase == 0 { 1000 } else { messages };
            if phase == 1 {
                mark();
            }
            for number in 0..rounds {
                publish(&mut own, number);
                for subscriber in &mut reading {
                    // The other publisher goes on all the time.
                    subscriber.recv_timeout(wait).unwrap();
                    received += 1;
                    while subscriber.try_recv().is_ok() && received % 64 != 0 {
                        received += 1;
                    }
                }
                let _ = replied.try_recv();
            }
            if phase == 1 {
                mark();
            }
        }
        end.store(true, Ordering::Release);
        let stats = publishing.join().unwrap();
        assert!(received >= 3 * messages);
        for lane in &full {
            assert!(lane.stats().dropped > messages, "{lane:?}");
        }
        if let Some((_, subscription)) = &kernel {
            assert!(subscription.stats().published > 0, "{subscription:?}");
        }
        own.stats().handed_over + stats.handed_over
    })
}

/// Page faults of the process so far.
#[cfg(target_os = "linux")]
fn page_faults() -> libc::c_long {
    // SAFETY: all zeros is a value of this struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the struct.
    let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    assert_eq!(result, 0);
    usage.ru_minflt + usage.ru_majflt
}

#[test]
fn nothing_is_allocated_per_message_of_a_client() {
    let _one = one_at_a_time();
    WATCHED.with(|watched| watched.set(true));
    for way in Way::ALL {
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        clients_in_steady_state(way, 128 * WINDOW, || {
            COUNTING.fetch_xor(true, Ordering::SeqCst);
        });
        assert_eq!(ALLOCATIONS.load(Ordering::SeqCst), before, "{way:?}");
    }
}

#[test]
fn nothing_is_allocated_per_message_of_a_topic() {
    let _one = one_at_a_time();
    WATCHED.with(|watched| watched.set(true));
    for with_kernel in [false, true] {
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        topics_in_steady_state(with_kernel, 20_000, || {
            COUNTING.fetch_xor(true, Ordering::SeqCst);
        });
        assert_eq!(
            ALLOCATIONS.load(Ordering::SeqCst),
            before,
            "with a kernel: {with_kernel}"
        );
    }
}

/// Else the tests above show nothing about bridges.
#[test]
#[cfg(target_os = "linux")]
fn what_a_bridge_allocates_and_frees_is_counted() {
    let _one = one_at_a_time();
    let runtime = spinning();
    let kernel = runtime
        .launch("test.watched_echo", 1, 1, LaunchOptions::default())
        .unwrap();
    let client = kernel.client_bytes().unwrap();
    let before = BY_BRIDGES.load(Ordering::SeqCst);
    // It frees its list when it ends, with the runtime.
    COUNTING.store(true, Ordering::SeqCst);
    drop((client, kernel, runtime));
    COUNTING.store(false, Ordering::SeqCst);
    assert_ne!(BY_BRIDGES.load(Ordering::SeqCst), before);
}

/// The system call that brackets the steady state in the trace: cheap, harmless, and made by nobody else here.
#[cfg(target_os = "linux")]
fn mark_in_trace() {
    // SAFETY: no preconditions.
    unsafe { libc::getppid() };
}

/// Messages of the traced run; see `no_system_call_is_made_per_message`.
#[cfg(target_os = "linux")]
const TRACED_ROUNDS: u64 = 125_000;

/// Messages of the traced run for each way of clients.
#[cfg(target_os = "linux")]
const TRACED_MESSAGES: u64 = 1_000_000_u64.next_multiple_of(WINDOW);

/// Messages that one of two publishers of the traced run publishes, each to six subscribers.
#[cfg(target_os = "linux")]
const TRACED_PUBLISHED: u64 = 50_000;

/// What the child below is told to run topics.
#[cfg(target_os = "linux")]
const TOPICS: &str = "Topics";

/// Names the variable by which the test below tells its child what to run.
#[cfg(target_os = "linux")]
const TRACED: &str = "RINGKERNEL_TRACED";

/// Runs only as the child of the tests below.
#[test]
#[cfg(target_os = "linux")]
fn traced_child() {
    let Some(what) = std::env::var_os(TRACED) else {
        return;
    };
    // Faults are looked at outside of what the marks enclose.
    let faults = Cell::new((page_faults(), false));
    let mark = || {
        let (before, is_open) = faults.get();
        if !is_open {
            faults.set((page_faults(), true));
            mark_in_trace();
        } else {
            mark_in_trace();
            println!("FAULTS {}", page_faults() - before);
            faults.set((0, false));
        }
    };
    if what == TOPICS {
        let left = topics_in_steady_state(false, TRACED_PUBLISHED, mark);
        println!("{left} messages were left to the other publisher");
        return;
    }
    match Way::ALL.iter().find(|way| what == *format!("{way:?}")) {
        Some(way) => clients_in_steady_state(*way, TRACED_MESSAGES, mark),
        None => steady_state(TRACED_ROUNDS, mark),
    }
}

/// What a traced child did in each of its steady states: the system calls, and the number of page faults. `None` where nothing can be
/// traced, which it says.
#[cfg(target_os = "linux")]
fn trace(what: &str) -> Option<Vec<(Vec<String>, u64)>> {
    if Command::new("strace").arg("-V").output().is_err() {
        println!("skipped: strace is not installed");
        return None;
    }
    let log = std::env::temp_dir().join(format!("ringkernel-strace-{}-{what}", std::process::id()));
    let output = Command::new("strace")
        .args(["-f", "-o"])
        .arg(&log)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "traced_child", "--test-threads=1", "--nocapture"])
        .env(TRACED, what)
        .output()
        .unwrap();
    let trace = std::fs::read_to_string(&log).unwrap_or_default();
    let _ = std::fs::remove_file(&log);
    if trace.is_empty() || trace.contains("Operation not permitted") && !output.status.success() {
        println!("skipped: strace may not trace here");
        return None;
    }
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<&str> = trace.lines().collect();
    let marks: Vec<usize> = (0..lines.len())
        .filter(|line| lines[*line].contains("getppid("))
        .collect();
    let said = String::from_utf8_lossy(&output.stdout);
    let faults: Vec<u64> = said
        .split("FAULTS ")
        .skip(1)
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .collect();
    assert_eq!(marks.len(), 2 * faults.len(), "{said}");
    Some(
        marks
            .chunks(2)
            .map(|pair| {
                let calls = &lines[pair[0] + 1..pair[1]];
                calls.iter().map(|call| (*call).to_owned()).collect()
            })
            .zip(faults)
            .collect(),
    )
}

/// Page faults that a steady state may have: the child's threads come to pages of their stacks, and of its code, that nothing needed before,
/// whatever the number of messages.
#[cfg(target_os = "linux")]
const FEW: u64 = 32;

#[test]
#[cfg(target_os = "linux")]
fn no_system_call_is_made_per_message() {
    let _one = one_at_a_time();
    let Some(states) = trace("all") else {
        return;
    };
    assert_eq!(states.len(), 2, "two steady states");
    for (calls, faults) in &states {
        // The kernel's thread and the caller's; the harness's main thread waits in its own call all the time.
        assert!(calls.is_empty(), "{} calls: {calls:?}", calls.len());
        assert!(*faults <= FEW, "{faults} page faults");
    }
    let faults: u64 = states.iter().map(|(_, faults)| faults).sum();
    let messages = TRACED_ROUNDS * (4 + 5);
    println!("0 system calls and {faults} page faults in {messages} messages");
}

#[test]
#[cfg(target_os = "linux")]
fn no_system_call_is_made_per_message_of_a_client() {
    let _one = one_at_a_time();
    for way in Way::ALL {
        let Some(states) = trace(&format!("{way:?}")) else {
            return;
        };
        let [(calls, faults)] = &states[..] else {
            panic!("one steady state");
        };
        println!(
            "{way:?}: {} system calls and {faults} page faults in {TRACED_MESSAGES} messages",
            calls.len()
        );
        let some = &calls[..calls.len().min(10)];
        match way {
            Way::Direct | Way::Bridge => assert!(calls.is_empty(), "{way:?}: {some:?}"),
            // The bridge, which sleeps, is woken when replies that nobody waits for have filled half of the kernel's ring.
            Way::Lanes => assert!(calls.len() as u64 * 64 < TRACED_MESSAGES, "{some:?}"),
        }
        assert!(*faults <= FEW, "{way:?}: {faults} page faults");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn no_system_call_is_made_per_message_of_a_topic() {
    let _one = one_at_a_time();
    let Some(states) = trace(TOPICS) else {
        return;
    };
    let [(calls, faults)] = &states[..] else {
        panic!("one steady state");
    };
    println!(
        "{} system calls and {faults} page faults in {TRACED_PUBLISHED} messages",
        calls.len()
    );
    assert!(calls.is_empty(), "{:?}", &calls[..calls.len().min(10)]);
    assert!(*faults <= FEW, "{faults} page faults");
}
