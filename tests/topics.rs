//! Topics between threads. That kernels may subscribe is for the conformance suite, since it must hold on every backend.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ringkernel::error::{MessageError, RecvTimeoutError, TryRecvError, TrySendError, Unavailable};
use ringkernel::kernel::DeadLetterReason;
use ringkernel::message::codec::CodecError;
use ringkernel::{
    BackendType, Bytes, Error, LaunchOptions, Overflow, Publisher, RingKernelRuntime, RingMessage,
    RuntimeConfig, Subscriber, SubscriberOptions, SubscriberStats, TopicOptions, WaitStrategy,
};
use rkyv::{Archive, Deserialize, Serialize};

/// Long enough for anything on a machine with two shared cores; a test that waits so long has failed.
const LONG: Duration = Duration::from_secs(30);

#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
struct Tick {
    publisher: u32,
    number: u32,
    /// The number again, so that a torn one shows.
    copies: [u32; 8],
}
ringkernel::ring_message!(Tick, "test.Tick.v1");

#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
struct Other {
    number: u64,
}
ringkernel::ring_message!(Other, "test.Other.v1");

impl Tick {
    fn new(publisher: u32, number: u32) -> Self {
        Self {
            publisher,
            number,
            copies: [number; 8],
        }
    }

    /// Its number, if it is whole.
    fn whole(self) -> u32 {
        assert_eq!(self.copies, [self.number; 8], "torn");
        self.number
    }
}

/// Threads that spin starve each other: tests run one at a time.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn runtime_with(config: RuntimeConfig) -> RingKernelRuntime {
    RingKernelRuntime::builder()
        .backend(BackendType::Cpu)
        .config(config)
        .build()
        .unwrap()
}

fn runtime() -> RingKernelRuntime {
    runtime_with(RuntimeConfig::default())
}

fn lane(capacity: usize, overflow: Overflow) -> SubscriberOptions {
    SubscriberOptions {
        capacity: Some(capacity),
        overflow,
        ..SubscriberOptions::default()
    }
}

fn publish(publisher: &mut Publisher<Bytes>, numbers: impl IntoIterator<Item = u32>) {
    for number in numbers {
        publisher.publish_bytes(&number.to_ne_bytes()).unwrap();
    }
}

fn number(payload: &[u8]) -> u32 {
    u32::from_ne_bytes(payload.try_into().unwrap())
}

/// All that waits for a subscriber.
fn received(subscriber: &mut Subscriber<Bytes>) -> Vec<u32> {
    let mut buffer = [0; 48];
    std::iter::from_fn(|| match subscriber.try_recv_bytes(&mut buffer) {
        Ok(length) => Some(number(&buffer[..length])),
        Err(TryRecvError::Empty | TryRecvError::Unavailable(_)) => None,
        Err(error) => panic!("{error}"),
    })
    .collect()
}

/// Numbers of the messages among the dead letters.
fn letters(runtime: &RingKernelRuntime, topic: &str, reason: DeadLetterReason) -> Vec<u32> {
    std::iter::from_fn(|| runtime.dead_letters().try_recv())
        .map(|letter| {
            assert_eq!((&*letter.kernel, letter.reason), (topic, reason));
            number(&letter.payload)
        })
        .collect()
}

/// `[published, delivered, dropped, queued]`.
fn counts(stats: SubscriberStats) -> [u64; 4] {
    [
        stats.published,
        stats.delivered,
        stats.dropped,
        stats.queued,
    ]
}

#[test]
fn every_subscriber_gets_every_message_in_order() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let topic = runtime
        .topic::<Tick>("ticks", TopicOptions::default())
        .unwrap();
    let mut subscribers: Vec<_> = (0..3)
        .map(|_| topic.subscribe(SubscriberOptions::default()).unwrap())
        .collect();
    let mut publisher = topic.publisher().unwrap();
    for number in 0..200 {
        publisher.publish(&Tick::new(0, number)).unwrap();
    }
    for subscriber in &mut subscribers {
        for number in 0..200 {
            assert_eq!(subscriber.recv(), Ok(Tick::new(0, number)));
        }
        assert_eq!(subscriber.try_recv(), Err(TryRecvError::Empty));
        assert_eq!(counts(subscriber.stats()), [200, 200, 0, 0]);
    }
    let stats = topic.stats().unwrap();
    assert_eq!((stats.published, stats.publishers), (200, 1));
    assert_eq!(stats.subscribers.len(), 3);
    assert_eq!(publisher.stats().published, 200);
    assert_eq!(runtime.topics().unwrap()["ticks"], stats);
    // Another handle to the same topic.
    let again = runtime
        .topic::<Tick>("ticks", TopicOptions::default())
        .unwrap();
    again
        .publisher()
        .unwrap()
        .publish(&Tick::new(1, 1))
        .unwrap();
    assert_eq!(subscribers[0].try_recv(), Ok(Tick::new(1, 1)));
}

/// Publishers and subscribers of all kinds, on threads of their own, some of which sleep. Every subscriber must see the messages of each
/// publisher in their order, each at most once; what it did not see must be counted, and in the accounts of the runtime as well; and those who
/// lose nothing must all see the same order.
#[test]
fn with_many_publishers_and_subscribers_every_message_is_accounted_for() {
    let _one = one_at_a_time();
    const PUBLISHERS: u32 = 3;
    const MESSAGES: u32 = 10_000;
    let all = u64::from(PUBLISHERS * MESSAGES);
    let runtime = runtime();
    let topic = runtime
        .topic::<Tick>("ticks", TopicOptions::default())
        .unwrap();
    let kinds = [
        (lane(1 << 15, Overflow::DropNewest), WaitStrategy::Park),
        (lane(1 << 15, Overflow::DropOldest), WaitStrategy::SpinYield),
        (lane(4, Overflow::DropNewest), WaitStrategy::SpinYield),
        (lane(4, Overflow::DropOldest), WaitStrategy::Park),
        (lane(4, Overflow::DropOldest), WaitStrategy::SpinYield),
        (SubscriberOptions::latest(), WaitStrategy::Park),
    ];
    let subscribers = kinds.map(|(options, wait)| {
        let options = SubscriberOptions {
            wait: Some(wait),
            ..options
        };
        topic.subscribe(options).unwrap()
    });
    // Before any of them is done.
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|_| topic.publisher().unwrap())
        .collect();
    let seen = thread::scope(|scope| {
        let threads: Vec<_> = subscribers
            .into_iter()
            .map(|mut subscriber| {
                scope.spawn(move || {
                    let mut seen = Vec::new();
                    let mut next = [0; PUBLISHERS as usize];
                    loop {
                        match subscriber.recv_timeout(LONG) {
                            Ok(tick) => {
                                let next = &mut next[tick.publisher as usize];
                                assert!(tick.whole() >= *next, "{tick:?} after {next}");
                                *next = tick.number + 1;
                                seen.push((tick.publisher, tick.number));
                            }
                            Err(RecvTimeoutError::Unavailable(Unavailable::NoPublisher)) => break,
                            Err(error) => panic!("{error}"),
                        }
                    }
                    let stats = subscriber.stats();
                    assert_eq!(stats.published, all);
                    assert_eq!(stats.delivered, seen.len() as u64);
                    assert_eq!(stats.delivered + stats.dropped, all);
                    assert_eq!(stats.queued, 0);
                    seen
                })
            })
            .collect();
        for (publisher, mut own) in (0..).zip(publishers) {
            scope.spawn(move || {
                for number in 0..MESSAGES {
                    own.publish_timeout(&Tick::new(publisher, number), LONG)
                        .unwrap();
                }
            });
        }
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect::<Vec<_>>()
    });
    assert_eq!(seen[0].len() as u64, all, "nothing was lost");
    assert_eq!(seen[0], seen[1], "one order");
    for some in &seen[2..] {
        // What the others have seen is a part of that, in the same order.
        let mut rest = seen[0].iter();
        assert!(some.iter().all(|tick| rest.any(|other| other == tick)));
    }
    for newest in &seen[3..] {
        assert_eq!(
            newest.last(),
            seen[0].last(),
            "the newest one is never lost"
        );
    }
    let delivered: usize = seen.iter().map(Vec::len).sum();
    let stats = topic.stats().unwrap();
    assert_eq!(
        (stats.published, stats.gone.published, stats.gone.delivered),
        (all, 6 * all, delivered as u64)
    );
    let dropped = 6 * all - delivered as u64;
    assert_eq!(runtime.dead_letters().counts().full_requests, dropped);
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.topics.adds_up());
    assert_eq!(
        (report.topics.accepted, report.topics.dead_lettered),
        (6 * all, dropped)
    );
    assert_eq!(report.topics.returned, 0);
}

#[test]
fn a_full_lane_drops_the_oldest_exactly() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
    let mut subscriber = topic.subscribe(lane(4, Overflow::DropOldest)).unwrap();
    let mut publisher = topic.publisher().unwrap();
    publish(&mut publisher, 0..4);
    assert_eq!(counts(subscriber.stats()), [4, 0, 0, 4]);
    publish(&mut publisher, 4..10);
    assert_eq!(counts(subscriber.stats()), [10, 0, 6, 4]);
    let full = DeadLetterReason::Full;
    assert_eq!(letters(&runtime, "t", full), [0, 1, 2, 3, 4, 5]);
    let mut buffer = [0; 48];
    assert_eq!(subscriber.try_recv_bytes(&mut buffer), Ok(4));
    assert_eq!(number(&buffer[..4]), 6);
    // There is room for one again.
    publish(&mut publisher, [10]);
    assert!(letters(&runtime, "t", full).is_empty());
    publish(&mut publisher, [11]);
    assert_eq!(letters(&runtime, "t", full), [7]);
    assert_eq!(received(&mut subscriber), [8, 9, 10, 11]);
    assert_eq!(counts(subscriber.stats()), [12, 5, 7, 0]);
}

#[test]
fn a_full_lane_drops_the_newest_exactly() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
    let mut subscriber = topic.subscribe(lane(8, Overflow::DropNewest)).unwrap();
    let mut publisher = topic.publisher().unwrap();
    publish(&mut publisher, 0..12);
    assert_eq!(counts(subscriber.stats()), [12, 0, 4, 8]);
    let full = DeadLetterReason::Full;
    assert_eq!(letters(&runtime, "t", full), [8, 9, 10, 11]);
    let mut buffer = [0; 48];
    subscriber.try_recv_bytes(&mut buffer).unwrap();
    // There is room for one again, and no more.
    publish(&mut publisher, [12, 13]);
    assert_eq!(letters(&runtime, "t", full), [13]);
    assert_eq!(received(&mut subscriber), [1, 2, 3, 4, 5, 6, 7, 12]);
    assert_eq!(counts(subscriber.stats()), [14, 9, 5, 0]);
}

#[test]
fn the_latest_replaces_what_still_waits() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
    let mut subscriber = topic.subscribe(SubscriberOptions::latest()).unwrap();
    let mut publisher = topic.publisher().unwrap();
    publish(&mut publisher, 0..3);
    assert_eq!(
        letters(&runtime, "t", DeadLetterReason::Full),
        [0, 1],
        "two were replaced"
    );
    assert_eq!(received(&mut subscriber), [2]);
    publish(&mut publisher, [3]);
    assert_eq!(received(&mut subscriber), [3]);
    assert_eq!(counts(subscriber.stats()), [4, 2, 2, 0]);
}

#[test]
fn a_message_that_a_buffer_is_too_small_for_stays() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
    let options = [
        lane(4, Overflow::DropOldest),
        lane(4, Overflow::DropNewest),
        SubscriberOptions::latest(),
    ];
    let mut subscribers = options.map(|options| topic.subscribe(options).unwrap());
    let mut publisher = topic.publisher().unwrap();
    let too_small = Err(TryRecvError::Message(MessageError::BufferTooSmall {
        length: 4,
    }));
    publish(&mut publisher, [1]);
    for subscriber in &mut subscribers {
        for _ in 0..3 {
            assert_eq!(subscriber.try_recv_bytes(&mut [0; 3]), too_small);
        }
        assert_eq!(counts(subscriber.stats()), [1, 0, 0, 1]);
        assert_eq!(received(subscriber), [1]);
        // Where it waits makes no difference to what comes behind it.
        assert_eq!(counts(subscriber.stats()), [1, 1, 0, 0]);
    }
    publish(&mut publisher, [2]);
    for subscriber in &mut subscribers {
        assert_eq!(subscriber.try_recv_bytes(&mut [0; 3]), too_small);
    }
    publish(&mut publisher, 3..7);
    let [oldest, newest, latest] = &mut subscribers;
    assert_eq!(received(oldest), [3, 4, 5, 6]);
    assert_eq!(received(newest), [2, 3, 4, 5]);
    assert_eq!(received(latest), [6]);
}

/// Subscribers that come while a publisher is at it get one value that had been published, and then every one that follows.
#[test]
fn a_late_subscriber_gets_the_last_value_once_and_in_order() {
    let _one = one_at_a_time();
    const ROUNDS: u32 = 300;
    for round in 0..ROUNDS {
        let runtime = runtime();
        let topic = runtime
            .topic::<Tick>("ticks", TopicOptions::default())
            .unwrap();
        let mut publisher = topic.publisher().unwrap();
        publisher.publish(&Tick::new(0, 0)).unwrap();
        let end = AtomicBool::new(false);
        thread::scope(|scope| {
            let publishing = scope.spawn(|| {
                let mut number = 0;
                while !end.load(Ordering::Acquire) && number < 12_000 {
                    number += 1;
                    // A subscriber that is just coming may be moved aside with the topic in hand.
                    publisher
                        .publish_timeout(&Tick::new(0, number), LONG)
                        .unwrap();
                }
                number
            });
            let options = [Overflow::DropOldest, Overflow::DropNewest];
            let mut late: Vec<_> = options
                .into_iter()
                .cycle()
                .zip(0..4)
                .map(|(overflow, index)| {
                    for _ in 0..(round * 37) % 500 {
                        std::hint::spin_loop();
                    }
                    let retained = index < 3;
                    let options = SubscriberOptions {
                        retained,
                        ..lane(1 << 14, overflow)
                    };
                    (retained, topic.subscribe(options).unwrap())
                })
                .collect();
            if round % 2 == 0 {
                thread::sleep(Duration::from_micros(u64::from(round % 100)));
            }
            end.store(true, Ordering::Release);
            let last = publishing.join().unwrap();
            for (retained, subscriber) in &mut late {
                let stats = subscriber.stats();
                let mut next = None;
                while let Ok(tick) = subscriber.try_recv() {
                    let number = tick.whole();
                    assert_eq!(*next.get_or_insert(number), number);
                    next = Some(number + 1);
                }
                match next {
                    Some(next) => assert_eq!(next, last + 1, "all up to the last"),
                    None => assert!(!*retained, "at least the last value"),
                }
                assert_eq!(stats.dropped, 0);
            }
        });
    }
}

#[test]
fn the_last_value_is_kept_as_long_as_the_runtime_and_only_if_asked_for() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let kept = runtime
        .topic_bytes("kept", TopicOptions::default())
        .unwrap();
    let options = TopicOptions {
        retain: false,
        ..TopicOptions::default()
    };
    let lost = runtime.topic_bytes("lost", options).unwrap();
    for topic in [&kept, &lost] {
        let mut early = topic.subscribe(SubscriberOptions::default()).unwrap();
        assert!(received(&mut early).is_empty(), "nothing was published");
        publish(&mut topic.publisher().unwrap(), 0..9);
    }
    drop((kept, lost));
    let kept = runtime
        .topic_bytes("kept", TopicOptions::default())
        .unwrap();
    let lost = runtime.topic_bytes("lost", options).unwrap();
    let unwanted = SubscriberOptions {
        retained: false,
        ..SubscriberOptions::default()
    };
    for (topic, options, expected) in [
        (&kept, SubscriberOptions::default(), &[8][..]),
        (&kept, SubscriberOptions::latest(), &[8]),
        (&kept, lane(2, Overflow::DropNewest), &[8]),
        (&kept, unwanted, &[]),
        (&lost, SubscriberOptions::default(), &[]),
    ] {
        let mut subscriber = topic.subscribe(options).unwrap();
        assert_eq!(received(&mut subscriber), expected);
        assert_eq!(subscriber.stats().published, expected.len() as u64);
    }
    // A message that was refused leaves no trace.
    let mut publisher = kept.publisher().unwrap();
    assert!(matches!(
        publisher.publish_bytes(&[0; 49]),
        Err(TrySendError::Rejected(_))
    ));
    let mut subscriber = kept.subscribe(SubscriberOptions::default()).unwrap();
    assert_eq!(received(&mut subscriber), [8]);
}

/// A message whose decoding the test can hold up.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
struct Slow {
    number: u32,
}

static IS_HELD_UP: Mutex<Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>> = Mutex::new(None);

impl RingMessage for Slow {
    const TYPE_ID: u64 = ringkernel::message::type_id_of("test.Slow.v1");
    const NAME: &'static str = "test.Slow.v1";

    fn encode(&self, slot: &mut [u8]) -> Result<usize, CodecError> {
        ringkernel::message::codec::encode(self, slot)
    }

    fn access(bytes: &[u8]) -> Result<&Self::Archived, CodecError> {
        ringkernel::message::codec::access::<Self>(bytes)
    }

    fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let held_up = IS_HELD_UP.lock().unwrap().take();
        if let Some((begun, go_on)) = held_up {
            begun.send(()).unwrap();
            go_on.recv().unwrap();
        }
        ringkernel::message::codec::decode::<Self>(bytes)
    }
}

/// A subscriber that stands still in the middle of taking a message holds nobody up, and has the newest one afterwards.
#[test]
fn a_subscriber_that_stands_still_holds_up_nobody() {
    let _one = one_at_a_time();
    // A few, so that all wait behind the first; so many that the lane's other half is full; far too many.
    for messages in [3, 8, 9, 10, 50] {
        let runtime = runtime();
        let topic = runtime
            .topic::<Slow>("slow", TopicOptions::default())
            .unwrap();
        let mut subscriber = topic.subscribe(lane(4, Overflow::DropOldest)).unwrap();
        let mut publisher = topic.publisher().unwrap();
        let (begun, has_begun) = mpsc::channel();
        let (let_go, go_on) = mpsc::channel();
        publisher.publish(&Slow { number: 0 }).unwrap();
        *IS_HELD_UP.lock().unwrap() = Some((begun, go_on));
        thread::scope(|scope| {
            let taking = scope.spawn(|| {
                assert_eq!(subscriber.try_recv(), Ok(Slow { number: 0 }));
                subscriber
            });
            has_begun.recv().unwrap();
            let begin = Instant::now();
            for number in 1..messages {
                publisher.publish(&Slow { number }).unwrap();
            }
            assert!(begin.elapsed() < LONG);
            assert_eq!(topic.stats().unwrap().published, u64::from(messages));
            let_go.send(()).unwrap();
            let mut subscriber = taking.join().unwrap();
            // Whoever comes next tidies up: what is beyond the capacity goes, the oldest first.
            publisher.publish(&Slow { number: messages }).unwrap();
            let mut numbers = Vec::new();
            while let Ok(Slow { number }) = subscriber.try_recv() {
                numbers.push(number);
            }
            assert!(numbers.is_sorted_by(|one, two| one < two), "{numbers:?}");
            assert!(numbers.len() <= 4, "{numbers:?}");
            assert_eq!(numbers.last(), Some(&messages), "{messages}: {numbers:?}");
            if messages > 3 {
                assert_eq!(numbers.len(), 4, "no more was dropped than had to be");
            }
            let stats = subscriber.stats();
            assert_eq!(stats.published, u64::from(messages) + 1);
            assert_eq!(stats.delivered, numbers.len() as u64 + 1);
            assert_eq!(stats.published, stats.delivered + stats.dropped);
        });
    }
}

/// A slow subscriber that keeps the newest loses much, but never the last message, whatever moment it comes in.
#[test]
fn the_newest_message_is_never_lost() {
    let _one = one_at_a_time();
    for round in 0..40 {
        let runtime = runtime();
        let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
        let options = match round % 2 {
            0 => lane(2, Overflow::DropOldest),
            _ => SubscriberOptions::latest(),
        };
        let mut subscriber = topic.subscribe(options).unwrap();
        let mut publisher = topic.publisher().unwrap();
        let last = 20_000;
        thread::scope(|scope| {
            scope.spawn(move || publish(&mut publisher, 0..=last));
            let mut before = None;
            let mut buffer = [0; 48];
            while before != Some(last) {
                let length = match subscriber.recv_bytes_timeout(&mut buffer, LONG) {
                    Ok(length) => length,
                    Err(error) => panic!("{error} after {before:?}"),
                };
                let number = number(&buffer[..length]);
                assert!(before < Some(number), "{number} after {before:?}");
                before = Some(number);
            }
        });
        let stats = subscriber.stats();
        assert_eq!(stats.published, u64::from(last) + 1);
        assert_eq!(stats.published, stats.delivered + stats.dropped);
    }
}

#[test]
fn a_topic_has_one_type_and_one_size() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let default = TopicOptions::default();
    runtime.topic::<Tick>("ticks", default).unwrap();
    let mismatch = |error| match error {
        Error::TopicMismatch { topic, reason } => {
            assert_eq!(topic, "ticks");
            reason
        }
        error => panic!("{error}"),
    };
    let reason = mismatch(runtime.topic::<Other>("ticks", default).unwrap_err());
    assert!(reason.contains("test.Tick.v1") && reason.contains("test.Other.v1"));
    mismatch(runtime.topic_bytes("ticks", default).unwrap_err());
    for options in [
        TopicOptions {
            message_size: Some(64),
            ..default
        },
        TopicOptions {
            retain: false,
            ..default
        },
    ] {
        mismatch(runtime.topic::<Tick>("ticks", options).unwrap_err());
    }
    // What it has by default may be asked for.
    let options = TopicOptions {
        message_size: Some(48),
        ..default
    };
    runtime.topic::<Tick>("ticks", options).unwrap();
    // A typed message that is too large is refused as bytes are.
    let options = TopicOptions {
        message_size: Some(39),
        ..default
    };
    let small = runtime.topic::<Tick>("small", options).unwrap();
    assert!(matches!(
        small.publisher().unwrap().publish(&Tick::new(0, 0)),
        Err(TrySendError::Rejected(
            ringkernel::error::Rejection::TooLarge { max: 39 }
        ))
    ));
    // Its subscribers may read the archive itself.
    let topic = runtime.topic::<Tick>("ticks", default).unwrap();
    let mut subscriber = topic.subscribe(SubscriberOptions::default()).unwrap();
    topic
        .publisher()
        .unwrap()
        .publish(&Tick::new(1, 2))
        .unwrap();
    let mut buffer = [0; 48];
    assert_eq!(subscriber.try_recv_bytes(&mut buffer), Ok(40));
}

#[test]
fn names_numbers_and_options_have_bounds() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let default = TopicOptions::default();
    let long = "n".repeat(255);
    assert_eq!(runtime.topic_bytes(&long, default).unwrap().name(), long);
    for name in ["", "a\0b", &"n".repeat(256)] {
        assert!(matches!(
            runtime.topic_bytes(name, default),
            Err(Error::InvalidOption { .. })
        ));
    }
    let options = TopicOptions {
        message_size: Some(1 << 24),
        ..default
    };
    assert!(matches!(
        runtime.topic_bytes("large", options),
        Err(Error::InvalidOption {
            option: "message_size",
            ..
        })
    ));
    let topic = runtime.topic_bytes("t", default).unwrap();
    for options in [
        lane(0, Overflow::DropOldest),
        lane(1, Overflow::DropNewest),
        lane((1 << 20) + 1, Overflow::DropOldest),
        lane(1, Overflow::Latest),
    ] {
        assert!(matches!(
            topic.subscribe(options),
            Err(Error::InvalidOption {
                option: "capacity",
                ..
            })
        ));
    }
    let mut publishers: Vec<_> = (0..64).map(|_| topic.publisher().unwrap()).collect();
    assert!(matches!(
        topic.publisher(),
        Err(Error::TopicFull { max: 64, .. })
    ));
    publishers.pop();
    publishers.push(topic.publisher().unwrap());
    let small = lane(2, Overflow::DropOldest);
    let mut subscribers: Vec<_> = (0..64).map(|_| topic.subscribe(small).unwrap()).collect();
    assert!(matches!(
        topic.subscribe(small),
        Err(Error::TopicFull { max: 64, .. })
    ));
    publish(&mut publishers[63], [7]);
    subscribers.pop();
    subscribers.push(topic.subscribe(small).unwrap());
    for subscriber in &mut subscribers {
        assert_eq!(received(subscriber), [7]);
    }
    // Two there are already.
    for number in 2..1024 {
        runtime.topic_bytes(&number.to_string(), default).unwrap();
    }
    assert!(matches!(
        runtime.topic_bytes("one too many", default),
        Err(Error::TopicFull { max: 1024, .. })
    ));
}

#[test]
fn the_end_of_the_runtime_wakes_every_subscriber_at_once() {
    let _one = one_at_a_time();
    let waits = [
        WaitStrategy::Park,
        WaitStrategy::SpinYield,
        WaitStrategy::Auto,
    ];
    for overflow in [Overflow::DropOldest, Overflow::DropNewest, Overflow::Latest] {
        let runtime = runtime();
        let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
        let mut publisher = topic.publisher().unwrap();
        let waiting = Arc::new(AtomicBool::new(true));
        thread::scope(|scope| {
            let threads = waits.map(|wait| {
                let options = SubscriberOptions {
                    overflow,
                    wait: Some(wait),
                    ..SubscriberOptions::default()
                };
                let mut subscriber = topic.subscribe(options).unwrap();
                let waiting = Arc::clone(&waiting);
                scope.spawn(move || {
                    let result = subscriber.recv_bytes_timeout(&mut [0; 48], LONG);
                    assert!(!waiting.load(Ordering::Acquire), "it came too early");
                    assert_eq!(
                        result,
                        Err(RecvTimeoutError::Unavailable(Unavailable::Closed))
                    );
                    assert_eq!(subscriber.check(), Err(Unavailable::Closed));
                    Instant::now()
                })
            });
            // Long enough for those who may sleep to do so.
            thread::sleep(Duration::from_millis(20));
            let mut idle = topic.subscribe(SubscriberOptions::default()).unwrap();
            waiting.store(false, Ordering::Release);
            let begin = Instant::now();
            let report = runtime.complete_shutdown().unwrap();
            assert!(report.topics.adds_up() && report.errors.is_empty());
            for thread in threads {
                let woken = thread.join().unwrap();
                assert!(woken - begin < Duration::from_secs(5));
            }
            assert_eq!(
                publisher.publish_bytes(b"late"),
                Err(TrySendError::Unavailable(Unavailable::Closed))
            );
            assert!(received(&mut idle).is_empty());
            assert!(topic.publisher().is_err());
            assert!(topic.subscribe(SubscriberOptions::default()).is_err());
            assert!(runtime.topic_bytes("t", TopicOptions::default()).is_err());
        });
    }
}

#[test]
fn what_nobody_has_received_at_the_end_is_returned_and_can_still_be_received() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
    let mut subscriber = topic.subscribe(lane(4, Overflow::DropOldest)).unwrap();
    let gone = topic.subscribe(lane(4, Overflow::DropNewest)).unwrap();
    let mut publisher = topic.publisher().unwrap();
    publish(&mut publisher, 0..6);
    assert_eq!(letters(&runtime, "t", DeadLetterReason::Full).len(), 4);
    drop(gone);
    // What it had not received, in order.
    let shutdown = DeadLetterReason::Shutdown;
    assert_eq!(letters(&runtime, "t", shutdown), [0, 1, 2, 3]);
    assert_eq!(counts(topic.stats().unwrap().gone), [6, 0, 2, 4]);
    let mut buffer = [0; 48];
    subscriber.recv_bytes_timeout(&mut buffer, LONG).unwrap();
    let report = runtime.complete_shutdown().unwrap();
    let topics = report.topics;
    assert_eq!(
        [
            topics.accepted,
            topics.delivered,
            topics.dead_lettered,
            topics.returned
        ],
        [12, 1, 4, 7]
    );
    assert!(report.to_string().contains("topics: 12 accepted"));
    assert_eq!(received(&mut subscriber), [3, 4, 5]);
    assert_eq!(
        subscriber.recv_bytes_timeout(&mut buffer, LONG),
        Err(RecvTimeoutError::Unavailable(Unavailable::Closed))
    );
}

#[test]
fn a_subscriber_is_told_when_all_publishers_have_gone() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
    let options = SubscriberOptions {
        wait: Some(WaitStrategy::Park),
        ..SubscriberOptions::default()
    };
    let mut subscriber = topic.subscribe(options).unwrap();
    let mut buffer = [0; 48];
    let short = Duration::from_millis(5);
    // There never was one: it may come.
    assert_eq!(
        subscriber.recv_bytes_timeout(&mut buffer, short),
        Err(RecvTimeoutError::Timeout)
    );
    let (mut one, two) = (topic.publisher().unwrap(), topic.publisher().unwrap());
    publish(&mut one, [1]);
    drop(one);
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(20));
            drop(two);
        });
        assert_eq!(subscriber.recv_bytes_timeout(&mut buffer, LONG), Ok(4));
        let begin = Instant::now();
        assert_eq!(
            subscriber.recv_bytes_timeout(&mut buffer, LONG),
            Err(RecvTimeoutError::Unavailable(Unavailable::NoPublisher))
        );
        assert!(begin.elapsed() < LONG / 2, "at once, not at the timeout");
    });
    assert_eq!(
        subscriber.try_recv_bytes(&mut buffer),
        Err(TryRecvError::Unavailable(Unavailable::NoPublisher))
    );
    // One that comes now is heard; a late subscriber has the last value before it is told.
    let mut late = topic.subscribe(SubscriberOptions::default()).unwrap();
    assert_eq!(received(&mut late), [1]);
    publish(&mut topic.publisher().unwrap(), [2]);
    assert_eq!(received(&mut subscriber), [2]);
    assert_eq!(received(&mut late), [2]);
}

#[test]
fn every_wait_is_bounded_and_ends_with_the_message() {
    let _one = one_at_a_time();
    for wait in [
        WaitStrategy::Spin,
        WaitStrategy::SpinYield,
        WaitStrategy::Park,
        WaitStrategy::Auto,
    ] {
        for overflow in [Overflow::DropOldest, Overflow::DropNewest, Overflow::Latest] {
            let runtime = runtime();
            let topic = runtime
                .topic::<Other>("t", TopicOptions::default())
                .unwrap();
            let options = SubscriberOptions {
                overflow,
                wait: Some(wait),
                ..SubscriberOptions::default()
            };
            let mut subscriber = topic.subscribe(options).unwrap();
            let mut publisher = topic.publisher().unwrap();
            let begin = Instant::now();
            assert_eq!(
                subscriber.recv_timeout(Duration::ZERO),
                Err(RecvTimeoutError::Timeout)
            );
            let short = Duration::from_millis(10);
            assert_eq!(
                subscriber.recv_timeout(short),
                Err(RecvTimeoutError::Timeout)
            );
            assert!(begin.elapsed() >= short.mul_f64(0.999) && begin.elapsed() < LONG);
            let (ask, asked) = mpsc::channel();
            thread::scope(|scope| {
                scope.spawn(move || {
                    while let Ok(number) = asked.recv() {
                        // Now and then late enough for the subscriber to sleep.
                        if number % 4 == 0 {
                            thread::sleep(Duration::from_millis(1));
                        }
                        publisher.publish(&Other { number }).unwrap();
                    }
                });
                for number in 0..20 {
                    ask.send(number).unwrap();
                    assert_eq!(subscriber.recv_timeout(LONG), Ok(Other { number }));
                }
                drop(ask);
            });
        }
    }
}

#[test]
fn a_drain_refuses_publishers_and_keeps_what_was_published() {
    let _one = one_at_a_time();
    let runtime = runtime();
    runtime.start().unwrap();
    let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
    let mut subscriber = topic.subscribe(SubscriberOptions::default()).unwrap();
    let mut publisher = topic.publisher().unwrap();
    publish(&mut publisher, [1]);
    assert!(runtime.drain(LONG).unwrap().complete);
    assert_eq!(
        publisher.publish_bytes(b"x"),
        Err(TrySendError::Unavailable(Unavailable::Draining))
    );
    assert_eq!(received(&mut subscriber), [1]);
    assert!(matches!(
        runtime.topic_bytes("u", TopicOptions::default()),
        Err(Error::InvalidLifecycle { .. })
    ));
}

#[test]
fn everything_may_be_dropped_in_any_order() {
    let _one = one_at_a_time();
    const PARTS: usize = 6;
    // As many orders as there are turns of the first, each with both directions of the rest.
    for turn in 0..PARTS {
        for backwards in [false, true] {
            let runtime = runtime();
            let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
            let kernel = runtime
                .launch("echo", 1, 1, LaunchOptions::default())
                .unwrap();
            kernel.activate().unwrap();
            let subscription = runtime
                .subscribe_kernel(&topic, &kernel, SubscriberOptions::default())
                .unwrap();
            let mut subscriber = topic.subscribe(SubscriberOptions::default()).unwrap();
            let mut publisher = topic.publisher().unwrap();
            publish(&mut publisher, 0..10);
            assert_eq!(
                subscriber.recv_bytes_timeout(&mut [0; 48], LONG),
                Ok(4),
                "{turn}"
            );
            let mut parts: Vec<Option<Box<dyn std::any::Any>>> = vec![
                Some(Box::new(runtime)),
                Some(Box::new(topic)),
                Some(Box::new(kernel)),
                Some(Box::new(subscription)),
                Some(Box::new(subscriber)),
                Some(Box::new(publisher)),
            ];
            for step in 0..PARTS {
                let step = if backwards { PARTS - step } else { step };
                drop(parts[(turn + step) % PARTS].take());
            }
            assert!(parts.iter().all(Option::is_none));
        }
    }
}

#[test]
fn subscribers_and_publishers_come_and_go_while_others_publish() {
    let _one = one_at_a_time();
    let runtime = runtime();
    let topic = runtime
        .topic::<Tick>("ticks", TopicOptions::default())
        .unwrap();
    let end = AtomicBool::new(false);
    let mut all = topic
        .subscribe(lane(1 << 16, Overflow::DropNewest))
        .unwrap();
    let published = thread::scope(|scope| {
        let publishing: Vec<_> = (0..2)
            .map(|own| {
                let (topic, end) = (topic.clone(), &end);
                scope.spawn(move || {
                    let mut number = 0;
                    while !end.load(Ordering::Acquire) && number < 25_000 {
                        // A publisher that goes at once leaves nothing undone.
                        let mut publisher = topic.publisher().unwrap();
                        for _ in 0..50 {
                            publisher
                                .publish_timeout(&Tick::new(own, number), LONG)
                                .unwrap();
                            number += 1;
                        }
                    }
                    number
                })
            })
            .collect();
        for round in 0..200 {
            let options = match round % 3 {
                0 => lane(8, Overflow::DropOldest),
                1 => lane(8, Overflow::DropNewest),
                _ => SubscriberOptions::latest(),
            };
            let mut subscriber = topic.subscribe(options).unwrap();
            for _ in 0..round % 5 {
                if let Ok(tick) = subscriber.try_recv() {
                    tick.whole();
                }
            }
        }
        end.store(true, Ordering::Release);
        publishing
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect::<Vec<u32>>()
    });
    let mut next = [0; 2];
    while let Ok(tick) = all.try_recv() {
        assert_eq!(tick.whole(), next[tick.publisher as usize]);
        next[tick.publisher as usize] += 1;
    }
    assert_eq!(next.to_vec(), published, "each once and in order");
    let stats = topic.stats().unwrap();
    assert_eq!(stats.published, u64::from(published[0] + published[1]));
    assert_eq!((stats.publishers, stats.subscribers.len()), (0, 1));
    let report = runtime.complete_shutdown().unwrap();
    assert!(report.topics.adds_up());
}

/// A message that a newest-only subscriber left where it was gives way to the next one, also when
/// the subscriber goes.
#[test]
fn what_a_newest_only_subscriber_leaves_is_booked_once() {
    let _one = one_at_a_time();
    let runtime = runtime_with(RuntimeConfig::default());
    let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
    let mut publisher = topic.publisher().unwrap();
    let mut subscriber = topic.subscribe(SubscriberOptions::latest()).unwrap();
    publisher.publish_bytes(b"one").unwrap();
    assert!(matches!(
        subscriber.try_recv_bytes(&mut [0]),
        Err(TryRecvError::Message(MessageError::BufferTooSmall { .. }))
    ));
    publisher.publish_bytes(b"two").unwrap();
    drop(subscriber);
    let gone = topic.stats().unwrap().gone;
    let counts = runtime.dead_letters().counts();
    assert_eq!(
        (gone.published, gone.delivered, gone.dropped, gone.queued),
        (2, 0, 1, 1)
    );
    assert_eq!(
        (counts.full_requests, counts.shutdown),
        (gone.dropped, gone.queued)
    );
    let report = runtime.complete_shutdown().unwrap();
    assert_eq!(
        (report.topics.dead_lettered, report.topics.returned),
        (1, 1),
        "{report}"
    );
}

/// What a publisher was told is taken reaches the lanes, or is refused: also while the runtime
/// shuts down.
#[test]
fn what_is_published_while_the_runtime_shuts_down_is_in_the_report() {
    let _one = one_at_a_time();
    for round in 0..30 {
        let runtime = runtime_with(RuntimeConfig::default());
        let topic = runtime.topic_bytes("t", TopicOptions::default()).unwrap();
        let options = SubscriberOptions {
            retained: false,
            capacity: Some(16),
            ..SubscriberOptions::default()
        };
        let _subscriber = topic.subscribe(options).unwrap();
        let publishers: Vec<_> = (0..3).map(|_| topic.publisher().unwrap()).collect();
        let (report, taken) = thread::scope(|scope| {
            let threads: Vec<_> = publishers
                .into_iter()
                .map(|mut publisher| {
                    scope.spawn(move || {
                        let mut taken = 0;
                        loop {
                            match publisher.publish_bytes(b"x") {
                                Ok(()) => taken += 1,
                                Err(TrySendError::Unavailable(_)) => return taken,
                                Err(TrySendError::Busy) => thread::yield_now(),
                                Err(error) => panic!("{error}"),
                            }
                        }
                    })
                })
                .collect();
            thread::sleep(Duration::from_micros(200 * (round % 5)));
            let report = runtime.complete_shutdown().unwrap();
            let taken: u64 = threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum();
            (report, taken)
        });
        assert!(report.errors.is_empty(), "{report}");
        assert!(report.topics.adds_up(), "{report}");
        assert_eq!(report.topics.accepted, taken, "{report}");
    }
}

/// The last value, newest-only lanes and the archive of a publisher are booked on the device, and
/// given back.
#[test]
fn memory_of_topics_is_booked_and_may_be_refused() {
    let _one = one_at_a_time();
    const SIZE: usize = 1 << 20;
    let config = RuntimeConfig {
        cpu_memory_limit: Some(16 * SIZE as u64),
        ..RuntimeConfig::default()
    };
    let runtime = runtime_with(config);
    let options = TopicOptions {
        message_size: Some(SIZE),
        ..TopicOptions::default()
    };
    let topic = runtime.topic_bytes("t", options).unwrap();
    let with_topic = runtime.memory_in_use(0).unwrap();
    assert!(with_topic >= SIZE as u64);
    // What is written, what is read, what lies between them, and what was left there.
    let subscriber = topic.subscribe(SubscriberOptions::latest()).unwrap();
    assert!(runtime.memory_in_use(0).unwrap() >= with_topic + 4 * SIZE as u64);
    let mut subscribers = vec![subscriber];
    let error = loop {
        match topic.subscribe(SubscriberOptions::latest()) {
            Ok(subscriber) => subscribers.push(subscriber),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert_eq!(subscribers.len(), 3);
    assert!(matches!(
        topic.publisher().map(drop),
        Err(Error::OutOfMemory { .. })
    ));
    drop(subscribers);
    // One that comes finds the memory that those had.
    drop(topic.subscribe(SubscriberOptions::latest()).unwrap());
    let others: Vec<_> = (0..20)
        .map_while(|number| runtime.topic_bytes(&format!("t{number}"), options).ok())
        .collect();
    assert!(others.len() < 16, "{}", others.len());
}

/// A process that gets no more memory goes on.
#[cfg(target_os = "linux")]
#[test]
fn refused_memory_for_a_topic_is_an_error_and_no_abort() {
    const CHILD: &str = "RINGKERNEL_TEST_NO_MEMORY";
    let name = "refused_memory_for_a_topic_is_an_error_and_no_abort";
    if std::env::var_os(CHILD).is_none() {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        return;
    }
    let runtime = runtime_with(RuntimeConfig::default());
    let options = TopicOptions {
        message_size: Some(16_000_000),
        ..TopicOptions::default()
    };
    let small = runtime
        .topic_bytes("small", TopicOptions::default())
        .unwrap();
    let pages: u64 = std::fs::read_to_string("/proc/self/statm")
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let limit = libc::rlimit {
        rlim_cur: (pages * 4096 + (100 << 20)) as libc::rlim_t,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the pointer is to a local.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
    let mut topics = Vec::new();
    let error = loop {
        match runtime.topic_bytes(&format!("t{}", topics.len()), options) {
            Ok(topic) => topics.push(topic),
            Err(error) => break error,
        }
        assert!(topics.len() < 20);
    };
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    // It works on.
    let mut subscriber = small.subscribe(SubscriberOptions::latest()).unwrap();
    small.publisher().unwrap().publish_bytes(b"x").unwrap();
    assert_eq!(subscriber.try_recv_bytes(&mut [0; 8]), Ok(1));
}
